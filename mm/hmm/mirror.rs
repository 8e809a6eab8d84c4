// SPDX-License-Identifier: GPL-2.0

//! The mirror of a process's address space, and the device's reads and writes through it.

use super::{
    callback::Callback,
    dma::Dma,
    entries::Entries,
    pfn::Access,
    pool::Pool,
    range::PageRange,
    region::{
        MirrorOps,
        Region,
        REGION_ORDER, //
    }, //
};
use core::{
    mem::ManuallyDrop,
    ops::Range, //
};
use kernel::{
    bindings,
    maple_tree::{
        InsertErrorKind,
        MapleTree, //
    },
    mm::{
        Mm,
        MmWithUser, //
    },
    new_spinlock,
    page::{
        PAGE_MASK,
        PAGE_SHIFT,
        PAGE_SIZE, //
    },
    prelude::*,
    sync::{
        aref::ARef,
        Arc,
        SpinLock, //
    },
    workqueue::{
        self,
        impl_has_work,
        new_work,
        Work,
        WorkItem, //
    }, //
};

/// The number of bytes that [`Mirror::read`] and [`Mirror::write`] copy before they release the
/// region's lock. Invalidations wait for this lock, and `munmap()` does so with `mmap_lock` held.
const ACCESS_BATCH: usize = 16 * PAGE_SIZE;

/// A reference to a module, which keeps its code loaded.
///
/// # Invariants
///
/// Holds a reference to the module. The pointer is null for code that is built into the kernel.
struct ModuleRef(*mut bindings::module);

// SAFETY: Any task may call module_put().
unsafe impl Send for ModuleRef {}
// SAFETY: A shared reference to this gives access to nothing.
unsafe impl Sync for ModuleRef {}

impl ModuleRef {
    fn new(module: &'static ThisModule) -> Result<Self> {
        // SAFETY: A `ThisModule` has a pointer to a module, or null, which try_module_get() allows.
        if !unsafe { bindings::try_module_get(module.as_ptr()) } {
            return Err(ENODEV);
        }
        // INVARIANT: try_module_get() has taken a reference.
        Ok(Self(module.as_ptr()))
    }
}

impl Drop for ModuleRef {
    fn drop(&mut self) {
        // SAFETY: The type invariants say that this holds a reference to the module, or that the
        // pointer is null, which module_put() allows. The reference is not used afterwards.
        unsafe { bindings::module_put(self.0) };
    }
}

/// The contents of a [`Mirror`]. They are a type of their own so that the destructors are
/// instantiated in this crate and not in drivers.
#[pin_data]
struct Inner {
    /// The regions, indexed by address >> (order + page shift). Dropped before `mm`.
    #[pin]
    regions: MapleTree<Arc<Region>>,
    mm: ARef<Mm>,
    /// How many references to `mm_users` this mirror has given out. Locked while one is taken or
    /// given back, so that the two numbers can be compared.
    #[pin]
    users: SpinLock<i32>,
    ops: Arc<dyn MirrorOps>,
    /// The memory of the device, if it has any.
    pool: Option<Arc<Pool>>,
    /// The device, if it does DMA.
    dma: Option<Arc<Dma>>,
    /// Drops this later, if the mirror is dropped in a callback, which must not wait.
    #[pin]
    work: Work<Self>,
    /// Keeps the code of `ops` loaded. Dropped last, since the code may go after that.
    _module: ModuleRef,
}

impl_has_work! {
    impl HasWork<Self> for Inner { self.work }
}

impl WorkItem for Inner {
    type Pointer = Pin<KBox<Self>>;

    fn run(this: Self::Pointer) {
        drop(this);
    }
}

/// A mirror of one process's address space for one device.
///
/// A mirror does not keep the process's memory alive, and may outlive the process. Reads and faults
/// through it fail once the process is gone.
///
/// A mirror holds a reference to the driver's module, because the notifiers call its code. If a
/// driver leaks a mirror (by a cycle of references, say), its module cannot be unloaded, but
/// nothing else breaks.
///
/// Dropping a mirror does not call [`MirrorOps::invalidate`], and nobody tells the driver of
/// changes afterwards. So the device must have stopped using its translations before, TLB entries
/// included.
///
/// The drop sleeps: it waits for the running invalidations of the process, which hold locks of mm
/// and may be part of reclaim. So never drop a mirror with `mmap_lock`, a VMA lock or a lock that
/// is taken under one of them or in reclaim, nor with a lock that [`MirrorOps::invalidate`] or the
/// end of a [`Flush`](super::Flush) needs. If a mirror is dropped in a callback or closure that
/// this crate runs, a work item drops its contents later.
pub struct Mirror {
    inner: ManuallyDrop<Pin<KBox<Inner>>>,
}

/// The device has no entry for a page, or none that allows the access. The driver should fault the
/// page.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Miss {
    /// The address of the first byte that was not copied.
    pub va: usize,
    /// The access that was tried.
    pub access: Access,
}

impl Mirror {
    /// Creates a mirror of the current task's address space. `module` is the module that contains
    /// the code of `ops`: `this_module::<crate::LocalModule>()`.
    ///
    /// # Context
    ///
    /// Takes `mmap_lock` for write if the mm has no interval notifier yet. So do not call this in
    /// the open() of a misc device, which runs under `misc_mtx`; the first ioctl can do it.
    ///
    /// # Errors
    ///
    /// - [`EINVAL`] if the current task has no address space.
    /// - [`ENODEV`] if the module is being unloaded.
    /// - [`EINTR`] if any signal is pending and the mm has no interval notifier yet. Nothing was
    ///   done: an ioctl can return `ERESTARTNOINTR`.
    /// - [`EDEADLK`] if called from a callback or closure that this crate runs.
    /// - [`ENOMEM`].
    #[inline]
    pub fn new(module: &'static ThisModule, ops: Arc<dyn MirrorOps>) -> Result<Self> {
        mirror_new(module, ops, None)
    }

    pub(crate) fn with(
        module: &'static ThisModule,
        ops: Arc<dyn MirrorOps>,
        pool: Option<Arc<Pool>>,
        dma: Option<&Arc<Dma>>,
    ) -> Result<Self> {
        Callback::refuse()?;
        let current = kernel::current!();
        let mm = current.mm().ok_or(EINVAL)?;

        let init = try_pin_init!(Inner {
            regions <- MapleTree::new(),
            mm: ARef::from(&**mm),
            users <- new_spinlock!(0, "hmm_mirror::users"),
            ops,
            pool,
            dma: dma.cloned(),
            work <- new_work!("hmm_mirror"),
            _module: ModuleRef::new(module)?,
        });
        let this = Self {
            inner: ManuallyDrop::new(KBox::pin_init(init, GFP_KERNEL_ACCOUNT)?),
        };
        // Create one region now. The first interval notifier of an mm takes mmap_lock for write,
        // the later ones do not. Choose the addresses where mmap() starts to allocate in the usual
        // layout.
        //
        // SAFETY: The mm is alive, since it is that of the current task. Only exec changes
        // `mmap_base`, of a new mm that no other task uses yet.
        let mmap_base = unsafe { (*mm.as_raw()).__bindgen_anon_1.mmap_base };
        this.region_or_insert(mm, mmap_base.saturating_sub(1))?;
        Ok(this)
    }

    /// Whether the mirrored address space is that of the current task.
    #[inline(never)]
    #[export_name = "rust_hmm_mirror_is_current"]
    pub fn is_current(&self) -> bool {
        kernel::current!()
            .mm()
            .is_some_and(|mm| mm.as_raw() == self.inner.mm.as_raw())
    }

    /// The end of the user part of the mirrored address space: the process cannot map anything at
    /// or above this address.
    #[inline(never)]
    #[export_name = "rust_hmm_mirror_task_size"]
    pub fn task_size(&self) -> usize {
        // SAFETY: `mm` holds a reference to the mm, so it is not freed. Only exec changes
        // `task_size`, of a new mm that no other task uses yet.
        unsafe { (*self.inner.mm.as_raw()).__bindgen_anon_1.task_size }
    }

    /// Copies the process's memory at `va` to `buf`, as far as the device has entries for it.
    ///
    /// # Context
    ///
    /// Any task. Sleeps to take the region's lock, and releases it after every 16 pages, because
    /// invalidations wait for it. The copy is not atomic: the process may write to the memory
    /// meanwhile, as it may while one of its own threads reads.
    ///
    /// # Errors
    ///
    /// A [`Miss`] at the first byte whose page has no entry for the device. The bytes before it
    /// were copied. If called from a callback or closure that this crate runs, a [`Miss`] at `va`.
    #[inline(never)]
    #[export_name = "rust_hmm_mirror_read"]
    pub fn read(&self, va: usize, buf: &mut [u8]) -> Result<(), Miss> {
        self.access(va, buf.len(), Access::Read, |entries, at, part| {
            entries.read(at, &mut buf[part])
        })
    }

    /// Copies `buf` to the process's memory at `va`, as far as the device has writable entries for
    /// it.
    ///
    /// # Context
    ///
    /// As for [`Mirror::read`].
    ///
    /// # Errors
    ///
    /// A [`Miss`] at the first byte whose page has no entry that the device may write. The bytes
    /// before it were copied. If called from a callback or closure that this crate runs, a [`Miss`]
    /// at `va`.
    #[inline(never)]
    #[export_name = "rust_hmm_mirror_write"]
    pub fn write(&self, va: usize, buf: &[u8]) -> Result<(), Miss> {
        self.access(va, buf.len(), Access::Write, |entries, at, part| {
            entries.write(at, &buf[part])
        })
    }

    /// Replaces the `u64` at `va` by what `f` returns for it. Returns the old value.
    ///
    /// This is an atomic operation of a device that is made of software, on a page that is
    /// exclusive to it ([`MirroredMm::make_exclusive`](super::MirroredMm::make_exclusive)). A CPU
    /// or another device would have to take the page away before it can access it, and that waits
    /// for the end of the update. An access through a reference that somebody had taken before is
    /// not excluded, as for `make_exclusive()`. On any other page this is not atomic. The core does
    /// not know which pages are exclusive, so `f` has to look that up in the page table of the
    /// device, and returns `None` for a page that is not.
    ///
    /// # Context
    ///
    /// Any task. Sleeps to take the region's lock for write, and calls `f` with it held, at most
    /// once. For `f`, as for the closure of [`MirroredMm::fault`](super::MirroredMm::fault). Do not
    /// hold a lock that [`MirrorOps::invalidate`] takes: take it in `f`.
    ///
    /// # Errors
    ///
    /// A [`Miss`] at `va`, and nothing has changed, if the page has no entry that the device may
    /// write, if `f` returns `None`, if `va` is not a multiple of 8, or if this is called from a
    /// callback or closure that this crate runs.
    #[inline]
    pub fn update(&self, va: usize, f: impl FnOnce(u64) -> Option<u64>) -> Result<u64, Miss> {
        let mut f = Some(f);
        mirror_update(self, va, &mut |old| f.take()?(old))
    }

    /// Splits the `len` bytes at `va` at page boundaries, and calls `copy` for each part with the
    /// lock of its region held for read.
    fn access(
        &self,
        va: usize,
        len: usize,
        access: Access,
        mut copy: impl FnMut(&Entries, usize, Range<usize>) -> bool,
    ) -> Result<(), Miss> {
        if Callback::is_running() {
            return Err(Miss { va, access });
        }
        let mut done = 0;
        while done < len {
            let mut at = va.wrapping_add(done);
            let region = self.region(at).ok_or(Miss { va: at, access })?;
            let batch = len.min(done + ACCESS_BATCH);
            let entries = region.entries().read();
            let _callback = Callback::begin();
            while done < batch && region.range().contains(at) {
                let end = len.min(done + PAGE_SIZE - (at & !PAGE_MASK));
                if !copy(&entries, at, done..end) {
                    return Err(Miss { va: at, access });
                }
                at = at.wrapping_add(end - done);
                done = end;
            }
        }
        Ok(())
    }

    pub(crate) fn raw_mm(&self) -> &Mm {
        &self.inner.mm
    }

    pub(crate) fn users(&self) -> &SpinLock<i32> {
        &self.inner.users
    }

    pub(crate) fn pool(&self) -> Option<&Arc<Pool>> {
        self.inner.pool.as_ref()
    }

    pub(crate) fn dma(&self) -> Option<&Arc<Dma>> {
        self.inner.dma.as_ref()
    }

    /// Returns the region that contains `va`, if it exists already.
    pub(crate) fn region(&self, va: usize) -> Option<Arc<Region>> {
        self.inner
            .regions
            .lock()
            .load(region_index(va))
            .map(Arc::from)
    }

    /// Returns the region that contains `va`, and creates it if it does not exist. The caller must
    /// not hold any lock: see [`Region::new`].
    pub(crate) fn region_or_insert(&self, mm: &MmWithUser, va: usize) -> Result<Arc<Region>> {
        match self.region(va) {
            Some(region) => Ok(region),
            None => self.publish(self.new_region(mm, va)?, va),
        }
    }

    /// Creates a region that contains `va`, without adding it to the mirror.
    pub(crate) fn new_region(&self, mm: &MmWithUser, va: usize) -> Result<Arc<Region>> {
        let range = PageRange::aligned_block(va, REGION_ORDER)?;
        let owner = Pool::owner(self.inner.pool.as_ref());
        let dma = self.inner.dma.clone();
        Region::new(mm, range, self.inner.ops.clone(), owner, dma)
    }

    /// Adds `region`, which contains `va`, to the mirror. If another task has added one for `va`
    /// meanwhile, drops `region` and returns the other one.
    pub(crate) fn publish(&self, region: Arc<Region>, va: usize) -> Result<Arc<Region>> {
        let index = region_index(va);
        let inserted = (self.inner.regions).insert(index, region.clone(), GFP_KERNEL_ACCOUNT);
        match inserted {
            Ok(()) => Ok(region),
            Err(err) => match err.cause {
                // The other region still exists: regions are dropped with the mirror only.
                InsertErrorKind::Occupied => self.region(va).ok_or(EIO),
                InsertErrorKind::AllocError(_) => Err(ENOMEM),
                InsertErrorKind::InvalidRequest => Err(EINVAL),
            },
        }
    }
}

/// Creates a mirror without a pool, for a device that does DMA if there is a `dma`.
#[inline(never)]
#[export_name = "rust_hmm_mirror_new"]
pub(crate) fn mirror_new(
    module: &'static ThisModule,
    ops: Arc<dyn MirrorOps>,
    dma: Option<&Arc<Dma>>,
) -> Result<Mirror> {
    Mirror::with(module, ops, None, dma)
}

#[inline(never)]
#[export_name = "rust_hmm_mirror_update"]
fn mirror_update(
    mirror: &Mirror,
    va: usize,
    f: &mut dyn FnMut(u64) -> Option<u64>,
) -> Result<u64, Miss> {
    let access = Access::Write;
    let miss = Miss { va, access };
    if Callback::is_running() || va % size_of::<u64>() != 0 {
        return Err(miss);
    }
    let region = mirror.region(va).ok_or(miss)?;
    let mut entries = region.entries().write();
    let _callback = Callback::begin();
    entries.update(va, f).ok_or(miss)
}

impl Drop for Mirror {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: This is the destructor: it runs once, and nothing uses `self` after it.
        unsafe { mirror_drop(self) };
    }
}

/// Drops the contents of `mirror`.
///
/// # Safety
///
/// This must be called only once, and `mirror` must not be used afterwards.
#[inline(never)]
#[export_name = "rust_hmm_mirror_drop"]
unsafe fn mirror_drop(mirror: &mut Mirror) {
    // SAFETY: The caller calls this once and does not use `mirror` afterwards (see the # Safety
    // section).
    let inner = unsafe { ManuallyDrop::take(&mut mirror.inner) };
    if Callback::is_running() {
        // Dropping the regions waits for running callbacks, and this may be called from one.
        workqueue::system_dfl().enqueue(inner);
    }
}

fn region_index(va: usize) -> usize {
    va >> (REGION_ORDER as usize + PAGE_SHIFT)
}
