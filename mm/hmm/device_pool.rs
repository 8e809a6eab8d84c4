// SPDX-License-Identifier: GPL-2.0

//! [`DevicePool`], through which a driver owns its pool, and mirrors for devices that have one.

use super::{
    callback::Callback,
    coherent::CoherentMemory,
    cpu_fault,
    dma::{
        Dma,
        DmaDevice, //
    },
    evict::{
        close,
        evict_all,
        poison_all, //
    },
    mirror::Mirror,
    pool::{
        self,
        DriverOps,
        Pool,
        Space, //
    },
    pool_ops::{
        CpuAccess,
        PoolOps, //
    },
    region::MirrorOps, //
};
use core::{
    marker::PhantomData,
    mem::ManuallyDrop, //
};
use kernel::{
    bindings,
    prelude::*,
    sync::Arc, //
};

static PAGEMAP_OPS: bindings::dev_pagemap_ops = bindings::dev_pagemap_ops {
    folio_free: Some(pool::folio_free),
    migrate_to_ram: Some(cpu_fault::migrate_to_ram),
    memory_failure: None,
    folio_split: Some(pool::folio_split),
};

kernel::sync::global_lock! {
    // All pools that have not ended.
    //
    // SAFETY: `rust_hmm_init()` initialises the lock before any driver can use it.
    unsafe(uninit) static POOLS: Mutex<KVec<Arc<Pool>>> = KVec::new();
}

/// Initialises the list of pools. Called at boot, before the initcalls of drivers.
///
/// # Safety
///
/// This must be called once, before anything else of the crate is used.
#[no_mangle]
unsafe extern "C" fn rust_hmm_init() {
    // SAFETY: The caller calls this once, and before `POOLS` is used (see the # Safety section).
    unsafe { POOLS.init() };
}

/// Ends the pools that `module` has leaked. Called after the module's exit function, and before its
/// code is freed.
///
/// # Safety
///
/// `module` is not null.
#[no_mangle]
pub(crate) unsafe extern "C" fn rust_hmm_module_going(module: *mut bindings::module) {
    while let Some(pool) = unlist(|pool| core::ptr::eq(pool.module(), module)) {
        pr_warn!("{}: the driver has leaked its pool\n", pool.name());
        close(&pool);
        drop(pool.end());
    }
}

/// Ends the pools of a device that copies by DMA. Waits for their pages. [`Dma::begin_close`] was
/// called.
pub(crate) fn end_pools_of(dma: &Arc<Dma>) {
    let is_meant = |pool: &Pool| pool.dma().is_some_and(|own| Arc::ptr_eq(own, dma));
    while let Some(pool) = unlist(is_meant) {
        close(&pool);
    }
}

/// Removes a pool for which `is_meant` is true from the list of pools, and returns it.
fn unlist(is_meant: impl Fn(&Pool) -> bool) -> Option<Arc<Pool>> {
    let mut pools = POOLS.lock();
    let index = pools.iter().position(|pool| is_meant(pool))?;
    pools.remove(index).ok()
}

/// What copies pages between system memory and the memory of a device.
pub enum Engine {
    /// The driver, and the device is made of software. [`PoolOps::copy`] gets bytes, and
    /// [`Mirror::read`](super::Mirror::read) and [`Mirror::write`](super::Mirror::write) reach the
    /// device's memory by way of this.
    Software(Arc<dyn CpuAccess>),
    /// The driver, through a BAR or a buffer of its own. [`PoolOps::copy`] gets bytes.
    Cpu,
    /// The device, by DMA. [`PoolOps::copy`] gets DMA addresses too. The end of the device's
    /// [`DmaBinding`](super::DmaBinding) also ends the pool, before anything else.
    Dma(DmaDevice),
}

/// Memory of a device, as `struct page`s that anonymous memory can migrate to.
///
/// A pool of private memory starts empty, and grows by chunks when pages migrate to it. When it is
/// full, those pages are evicted that migrated to it first.
///
/// Dropping a pool ends it: no more pages migrate to it, all pages in use are migrated back to
/// system memory, and the struct pages are freed. The processes do not notice. The drop waits while
/// somebody has a page locked or has a reference to it, while there is no memory, and while
/// [`PoolOps::copy`] fails, because the data of processes must not be lost. Drop a pool only where
/// sleeping is allowed, and with no lock held that [`PoolOps`] takes.
///
/// The exception is a device that is lost: see [`DevicePool::lost`].
///
/// A pool that is leaked, or dropped in a callback or closure that this crate runs, ends with its
/// module: all of the above then happens after the module's exit function.
pub struct DevicePool<T: PoolOps> {
    pool: ManuallyDrop<Arc<Pool>>,
    // This makes `T` invariant, so that a pool is never used as one with other page data.
    _ops: PhantomData<fn(T) -> T>,
}

impl<T: PoolOps> DevicePool<T> {
    /// Creates a pool that can grow to `max_chunks` chunks of `chunk_pages` pages each. `module` is
    /// the module that contains the code of `ops`: `this_module::<crate::LocalModule>()`.
    ///
    /// The pool represents one part of the device's memory, which the driver uses for nothing else.
    /// Addresses that the core passes to the driver are bytes from the start of that part.
    ///
    /// `name` appears in `/proc/iomem`. Each chunk has its own `struct page`s and reserves a range
    /// of physical addresses that is rounded up to a memory section (128 MiB on x86_64), so a large
    /// device should have large chunks.
    ///
    /// # Errors
    ///
    /// - [`EINVAL`] if `max_chunks` or `chunk_pages` is zero, if `chunk_pages` is not a multiple of
    ///   512, or if there are `u32::MAX` or more pages in all.
    /// - [`EDEADLK`] if called from a callback or closure that this crate runs.
    /// - [`ENOMEM`].
    #[inline]
    pub fn new(
        module: &'static ThisModule,
        name: &CStr,
        ops: Arc<T>,
        engine: Engine,
        chunk_pages: usize,
        max_chunks: usize,
    ) -> Result<Self> {
        let space = Space::Private {
            chunk_pages,
            max_chunks,
        };
        Self::in_space(module, name, ops, engine, space)
    }

    /// Creates a pool over `memory`, which the CPU reaches, so that nothing faults: a page of a
    /// process that has migrated to the device is mapped for the CPU there. All pages are small; a
    /// large folio is split when it migrates.
    ///
    /// The device finds its own pages by their offset in `memory` as usual, and other devices find
    /// them at a DMA address, like system memory. [`PoolOps::copy`] may leave the work to
    /// [`CopyBatch::copy_by_cpu`](super::CopyBatch::copy_by_cpu), with any `engine`; a driver that
    /// does so for all copies passes [`Engine::Cpu`]. [`Mirror::read`](super::Mirror::read) and
    /// `write` reach the memory directly, whatever `engine` is.
    ///
    /// A page that cannot be copied stays mapped where it is, without a SIGBUS. mm itself copies
    /// pages to system memory for a long-term pin by GUP and for a write after fork(). The driver
    /// hears of that by [`PoolOps::page_freed`] only:
    /// [`MigrateReason::CpuFault`](super::MigrateReason::CpuFault) does not occur.
    ///
    /// The end of the pool waits for references to pages, which a process may hold for long:
    /// vmsplice() does so for a page in a pipe. The kernel has the memory mapped until then, so it
    /// must not be switched off before.
    ///
    /// # Context
    ///
    /// Sleeps: all `struct page`s are made at once.
    ///
    /// # Errors
    ///
    /// Those of [`DevicePool::new`], and those of `memremap_pages()`:
    ///
    /// - [`EINVAL`] also if `memory` is no memory, does not begin and end at a multiple of 512
    ///   pages, or lies where the kernel can map no memory.
    /// - [`EBUSY`] if it is system memory.
    /// - [`EOPNOTSUPP`] if the architecture cannot add memory.
    ///
    /// `memory` is released then.
    #[inline]
    pub fn new_coherent(
        module: &'static ThisModule,
        name: &CStr,
        ops: Arc<T>,
        engine: Engine,
        memory: CoherentMemory,
    ) -> Result<Self> {
        Self::in_space(module, name, ops, engine, Space::Coherent(memory))
    }

    #[inline]
    fn in_space(
        module: &'static ThisModule,
        name: &CStr,
        ops: Arc<T>,
        engine: Engine,
        space: Space,
    ) -> Result<Self> {
        let (cpu, dma) = match engine {
            Engine::Software(cpu) => (Some(cpu), None),
            Engine::Cpu => (None, None),
            Engine::Dma(device) => (None, Some(device)),
        };
        let ops = DriverOps { ops, cpu };
        Ok(Self {
            pool: ManuallyDrop::new(pool_new(module, name, ops, dma, space)?),
            _ops: PhantomData,
        })
    }

    /// Ends the pool, like dropping it, and returns the memory of a pool that was made with
    /// [`DevicePool::new_coherent`]. It may hold data of processes.
    ///
    /// Returns `None` for other pools, and in a callback or closure that this crate runs. Also if a
    /// part of the memory is still in use, which is possible only if the device is lost: the memory
    /// is released with its last page then.
    #[inline]
    pub fn end(self) -> Option<CoherentMemory> {
        let mut this = ManuallyDrop::new(self);
        // SAFETY: `this` is not dropped, and nothing uses the field after this.
        pool_drop(unsafe { ManuallyDrop::take(&mut this.pool) })
    }

    /// Gives the device up, for example because it has failed for good or was pulled out.
    ///
    /// [`PoolOps::copy`] is not called any more. This waits for the callbacks that are running,
    /// gives the data of all pages back with [`PoolOps::page_freed`], and drops the object that
    /// implements [`PoolOps`]. A callback must return although the device does not answer.
    ///
    /// The contents of the pages that are in the device's memory are lost. A CPU that accesses such
    /// a page gets SIGBUS, and a fault for a device [`EFAULT`]; it never finds other contents. All
    /// other memory of the processes is intact. The `struct page`s stay until the processes have
    /// freed the last of these pages, and nobody waits for that.
    ///
    /// Memory of [`DevicePool::new_coherent`] is taken away from the processes, and a CPU that
    /// accesses it gets SIGBUS as for memory with errors. [`MirrorOps::invalidate`] is called for
    /// the pages, so `Flush::wait()` must return although the device does not answer. A page to
    /// which somebody has a reference for half a second stays, with a warning, and CPUs may access
    /// it.
    ///
    /// If [`PoolOps::copy`] fails with [`ENODEV`] for such memory, CPUs go on to access it until
    /// this is called or the pool is dropped, so call this soon, from a work item.
    ///
    /// From then on [`MirroredMm::migrate_to_device`](super::MirroredMm::migrate_to_device) and
    /// [`DevicePool::evict`] fail with [`ENODEV`], and dropping the pool does not wait. Doing this
    /// again does nothing. A [`PoolOps::copy`] that fails with [`ENODEV`] begins the same, but the
    /// object stays until this is called or the pool is dropped.
    ///
    /// # Context
    ///
    /// Sleeps. The caller holds no lock that [`PoolOps`] takes.
    ///
    /// # Errors
    ///
    /// [`EDEADLK`] if called from a callback or closure that this crate runs. [`PoolOps::copy`]
    /// fails with [`ENODEV`] instead.
    #[inline]
    pub fn lost(&self) -> Result {
        pool_lost(&self.pool)
    }

    /// Migrates all pages in use back to system memory, for example before the device loses power.
    ///
    /// Other pages may migrate to the device meanwhile. The driver must prevent this: for example,
    /// it can set a flag that makes its faults skip the migration, and wait for those that run.
    ///
    /// # Context
    ///
    /// Sleeps. The caller holds no lock that [`PoolOps`] takes.
    ///
    /// # Errors
    ///
    /// - [`EBUSY`] if some pages are still in use because somebody has references to them.
    /// - [`ENOMEM`], and those of [`PoolOps::copy`], if pages are still in use for this reason.
    /// - [`EINTR`] on a fatal signal.
    /// - [`ENODEV`] if the device is lost.
    /// - [`EDEADLK`] if called from a callback or closure that this crate runs.
    #[inline]
    pub fn evict(&self) -> Result {
        pool_evict(&self.pool)
    }

    #[inline]
    pub(crate) fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }
}

impl<T: PoolOps> Drop for DevicePool<T> {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: This is the destructor: nothing uses the field after this.
        drop(pool_drop(unsafe { ManuallyDrop::take(&mut self.pool) }));
    }
}

impl Mirror {
    /// Creates a mirror of the current task's address space, for a device that has memory of its
    /// own.
    ///
    /// Pages in the memory of the device get entries like other pages. Apart from that this is like
    /// [`Mirror::new`].
    ///
    /// # Errors
    ///
    /// Those of [`Mirror::new`].
    #[inline]
    pub fn new_with_pool<T: PoolOps>(
        module: &'static ThisModule,
        ops: Arc<dyn MirrorOps>,
        pool: &DevicePool<T>,
    ) -> Result<Self> {
        mirror_new_with_pool(module, ops, pool.pool(), None)
    }
}

#[inline(never)]
#[export_name = "rust_hmm_pool_new"]
fn pool_new(
    module: &'static ThisModule,
    name: &CStr,
    ops: DriverOps,
    dma: Option<DmaDevice>,
    space: Space,
) -> Result<Arc<Pool>> {
    Callback::refuse()?;
    let dma = dma.map(|device| device.dma().clone());
    let pool = Pool::new(&PAGEMAP_OPS, module.as_ptr(), name, ops, dma.clone(), space)?;
    if pool.is_coherent() {
        Pool::add_coherent(&pool)?;
    }
    let listed = list(&pool, dma.as_ref());
    if listed.is_err() {
        pool.free_chunks();
    }
    listed.map(|()| pool)
}

/// Adds a pool to the list of pools.
fn list(pool: &Arc<Pool>, dma: Option<&Arc<Dma>>) -> Result {
    let mut pools = POOLS.lock();
    // Under the lock: if the driver is unbound after this, `end_pools_of()` finds the pool.
    let _bound = dma.map(Dma::stay_bound).transpose()?;
    pools.push(pool.clone(), GFP_KERNEL)?;
    Ok(())
}

#[inline(never)]
#[export_name = "rust_hmm_pool_evict"]
fn pool_evict(pool: &Arc<Pool>) -> Result {
    Callback::refuse()?;
    evict_all(pool)
}

#[inline(never)]
#[export_name = "rust_hmm_pool_lost"]
fn pool_lost(pool: &Arc<Pool>) -> Result {
    Callback::refuse()?;
    Pool::give_up(pool, poison_all);
    Ok(())
}

#[inline(never)]
#[export_name = "rust_hmm_pool_drop"]
fn pool_drop(pool: Arc<Pool>) -> Option<CoherentMemory> {
    if Callback::is_running() {
        // Ending the pool waits for pages that this task may have locked.
        pr_warn!(
            "{}: dropped in a call by the core, stays until its module goes\n",
            pool.name()
        );
        return None;
    }
    close(&pool);
    drop(unlist(|other| core::ptr::eq(other, &*pool)));
    pool.end()
}

#[inline(never)]
#[export_name = "rust_hmm_mirror_new_with_pool"]
pub(crate) fn mirror_new_with_pool(
    module: &'static ThisModule,
    ops: Arc<dyn MirrorOps>,
    pool: &Arc<Pool>,
    dma: Option<&Arc<Dma>>,
) -> Result<Mirror> {
    Mirror::with(module, ops, Some(pool.clone()), dma)
}
