// SPDX-License-Identifier: GPL-2.0

//! The mirror of a process's address space, and the regions it is made of.
//!
//! A region is one `mmu_interval_notifier`, the lock that its sequence needs and the entries under
//! that lock. This file owns the notifier's life and its callback: the collision-retry scheme's one
//! half. The other half is `fault.rs`.
//!
//! C header: [`include/linux/mmu_notifier.h`](srctree/include/linux/mmu_notifier.h)

#[cfg(CONFIG_RUST_HMM_DEVICE)]
use super::pool::{
    DevicePool,
    PoolOps, //
};
use super::{
    entries::{
        Entries,
        LEAF_ORDER, //
    },
    pfn::Access,
    pool::Pool,
    range::PageRange,
    rwsem::{
        RwSem,
        WriteGuard, //
    },
};
use core::{
    marker::PhantomData,
    mem::ManuallyDrop,
    ops::Range, //
};
use kernel::{
    bindings,
    error::to_result,
    maple_tree::{
        InsertErrorKind,
        MapleTree, //
    },
    mm::{
        Mm,
        MmWithUser, //
    },
    page::{
        PAGE_MASK,
        PAGE_SHIFT,
        PAGE_SIZE, //
    },
    prelude::*,
    sync::{
        aref::ARef,
        static_lock_class,
        Arc, //
    },
    types::Opaque, //
};

/// The size of a region as an order of pages: 512 MiB where pages have 4 KiB.
///
/// Every region costs each invalidation of the mm a look at the interval tree; an invalidation
/// makes retry whoever faults in the same region. A multiple of a leaf.
pub(crate) const REGION_ORDER: u32 = 29 - 12;

kernel::static_assert!(REGION_ORDER >= LEAF_ORDER);

/// The bytes that are copied without releasing the region's lock, for which an `munmap()` waits
/// with `mmap_lock` held.
const ACCESS_BATCH: usize = 16 * PAGE_SIZE;

/// What a driver implements to follow changes of the address space.
pub trait MirrorOps: Send + Sync {
    /// The device must stop to use its own copies of the translations of `event.range()`, TLB
    /// included, before this returns.
    ///
    /// The core has erased its entries of the range already: nothing of it can be read, written or
    /// committed until the driver faults it again. This is not called where there was no entry to
    /// erase, and so none that a driver could use.
    ///
    /// # Context
    ///
    /// Called with the region's lock held for write, below `mmap_lock` or the locks of the reverse
    /// map, and from reclaim: it may not allocate memory in a way that waits, take `mmap_lock`,
    /// drop a reference to an mm, access user memory, nor call the [`Mirror`]. Nor may it sleep:
    /// the OOM killer may be at work. Lock order: region, then the driver's own.
    fn invalidate<'op>(&self, event: Invalidate<'op>) -> Invalidated<'op>;
}

/// A running invalidation.
///
/// The lifetime is invariant and the callback's own: neither this nor an [`Invalidated`] can be
/// kept or be taken from another callback.
pub struct Invalidate<'op> {
    range: PageRange,
    _op: PhantomData<fn(&'op ()) -> &'op ()>,
}

impl<'op> Invalidate<'op> {
    /// The range, clamped to the region.
    #[inline]
    pub fn range(&self) -> PageRange {
        self.range
    }

    /// States that the device uses the range no more.
    #[inline]
    pub fn done(self) -> Invalidated<'op> {
        Invalidated { _op: PhantomData }
    }
}

/// Proof that a driver handled the [`Invalidate`] of the same lifetime.
#[must_use]
pub struct Invalidated<'op> {
    _op: PhantomData<fn(&'op ()) -> &'op ()>,
}

/// A part of an address space: an interval notifier, and the entries with their lock.
///
/// # Invariants
///
/// `notifier` is subscribed to the range from the end of [`Region::new`] until the region is
/// dropped. Its `invalidate_seq` is written by the notifier callback only, with `entries` locked
/// for write, and for every event but that with which a page becomes exclusive to this device.
#[pin_data(PinnedDrop)]
pub(crate) struct Region {
    #[pin]
    notifier: Opaque<bindings::mmu_interval_notifier>,
    #[pin]
    entries: RwSem<Entries>,
    range: PageRange,
    ops: Arc<dyn MirrorOps>,
}

// SAFETY: The notifier may be removed by another task than the one that inserted it; the rest is
// `Send`.
unsafe impl Send for Region {}
// SAFETY: The notifier is used under its subscription's own lock and under `entries`; the rest is
// `Sync`.
unsafe impl Sync for Region {}

static NOTIFIER_OPS: bindings::mmu_interval_notifier_ops = bindings::mmu_interval_notifier_ops {
    invalidate: Some(Region::invalidate_callback),
    invalidate_start: None,
    invalidate_finish: None,
};

impl Region {
    /// Subscribes to `range` of `mm`.
    ///
    /// Holds no lock; takes `mmap_lock` for write if this is the first subscription of the mm.
    pub(crate) fn new(
        mm: &MmWithUser,
        range: PageRange,
        ops: Arc<dyn MirrorOps>,
    ) -> Result<Arc<Self>> {
        let mm = mm.as_raw();
        let entries = Entries::new(range)?;
        let init = try_pin_init!(Self {
            entries <- RwSem::new(entries, c"hmm_region", static_lock_class!()),
            range,
            ops,
            // Last, since the callback may run as soon as the notifier is inserted.
            //
            // INVARIANT: It is removed in `PinnedDrop`.
            notifier <- Opaque::try_ffi_init(|slot| {
                // SAFETY: `slot` is valid, and pinned until `PinnedDrop` has removed the notifier.
                // `mm` has users, `NOTIFIER_OPS` is static, and the callback finds the other fields
                // initialised.
                to_result(unsafe {
                    bindings::mmu_interval_notifier_insert(
                        slot,
                        mm,
                        range.start(),
                        range.len(),
                        &NOTIFIER_OPS,
                    )
                })
            }),
        }? Error);
        let region = Arc::pin_init(init, GFP_KERNEL_ACCOUNT)?;
        region.prime_lockdep();
        Ok(region)
    }

    /// Tells lockdep of the orders that only rare events would show: reclaim and `mmap_lock` come
    /// before the region's lock.
    fn prime_lockdep(&self) {
        #[cfg(CONFIG_PROVE_LOCKING)]
        {
            let mm = self.notifier_mm();

            // SAFETY: The mm is alive: the only caller has a `MmWithUser` of it.
            unsafe { bindings::mmap_read_lock(mm) };
            // SAFETY: Always safe to call; released below.
            unsafe { bindings::fs_reclaim_acquire(bindings::GFP_KERNEL) };
            drop(self.entries.write());
            // SAFETY: Acquired above.
            unsafe { bindings::fs_reclaim_release(bindings::GFP_KERNEL) };
            // SAFETY: Locked above, by this task.
            unsafe { bindings::mmap_read_unlock(mm) };
        }
    }

    fn notifier_mm(&self) -> *mut bindings::mm_struct {
        // SAFETY: By the type invariants the notifier was inserted, which set `mm` for good.
        unsafe { (*self.notifier.get()).mm }
    }

    /// Whether the region is one of `mm`.
    pub(crate) fn is_of(&self, mm: &MmWithUser) -> bool {
        self.notifier_mm() == mm.as_raw()
    }

    pub(crate) fn range(&self) -> PageRange {
        self.range
    }

    #[cfg(CONFIG_RUST_HMM_KUNIT_TEST)]
    pub(crate) fn entries(&self) -> &RwSem<Entries> {
        &self.entries
    }

    /// The notifier, for `struct hmm_range`.
    pub(crate) fn notifier(&self) -> *mut bindings::mmu_interval_notifier {
        self.notifier.get()
    }

    /// What tells the region's own events from those of others, to mm.
    #[cfg(CONFIG_RUST_HMM_DEVICE)]
    pub(crate) fn as_owner(&self) -> *mut c_void {
        (&raw const *self).cast_mut().cast()
    }

    /// The aligned block of `2^order` pages around `va`, as far as the region goes.
    pub(crate) fn window(&self, va: usize, order: u32) -> Result<PageRange> {
        let block = PageRange::aligned_block(va, order)?;
        block.intersect(&self.range).ok_or(EFAULT)
    }

    /// Waits for invalidations of the region that run, and returns the sequence to check for others
    /// later.
    pub(crate) fn read_begin(&self) -> usize {
        // SAFETY: The notifier is inserted, by the type invariants.
        unsafe { bindings::mmu_interval_read_begin(self.notifier.get()) }
    }

    /// Locks the entries for write, unless an invalidation collided since `seq` was read.
    ///
    /// # Errors
    ///
    /// [`EINTR`] if a fatal signal ends the wait.
    pub(crate) fn lock_unless_stale(&self, seq: usize) -> Result<Option<WriteGuard<'_, Entries>>> {
        let entries = self.entries.write_killable()?;
        // SAFETY: The notifier is inserted, by the type invariants, and the lock under which the
        // callback writes the sequence is held.
        let stale = unsafe { bindings::mmu_interval_read_retry(self.notifier.get(), seq) };
        Ok((!stale).then_some(entries))
    }

    /// Called by mm when something changes in the range.
    ///
    /// # Safety
    ///
    /// `notifier` is that of a [`Region`], and `event` is valid.
    pub(crate) unsafe extern "C" fn invalidate_callback(
        notifier: *mut bindings::mmu_interval_notifier,
        event: *const bindings::mmu_notifier_range,
        cur_seq: usize,
    ) -> bool {
        // SAFETY: The notifier is the field of a region, initialised but for the pin-init of the
        // notifier itself, and alive: its drop waits for callbacks.
        let region =
            unsafe { &*kernel::container_of!(Opaque::cast_from(notifier), Region, notifier) };
        // SAFETY: `event` is valid for the duration of the callback.
        let blockable = unsafe { bindings::mmu_notifier_range_blockable(event) };
        // SAFETY: As above.
        let (start, end) = unsafe { ((*event).start, (*event).end) };
        // It begins what the device has asked for, and would collide with that each time. What was
        // reported meanwhile of the page is not wrong: it stays where it is.
        //
        // SAFETY: As above.
        let is_own_exclusive = unsafe {
            (*event).event == bindings::mmu_notifier_event_MMU_NOTIFY_EXCLUSIVE
                && core::ptr::eq((*event).owner.cast(), region)
        };

        let mut entries = if blockable {
            region.entries.write()
        } else {
            match region.entries.try_write() {
                Some(entries) => entries,
                // Nothing was changed; mm does not go on with this range.
                None => return false,
            }
        };

        if !is_own_exclusive {
            // SAFETY: The notifier is inserted, and the lock is held for write.
            unsafe { bindings::mmu_interval_set_seq(notifier, cur_seq) };
        }

        // The end of an event may be ULONG_MAX: clamp before rounding.
        let start = start.max(region.range.start());
        let end = end.min(region.range.end());
        if let Ok(range) = PageRange::containing(start, end.saturating_sub(start)) {
            if entries.erase(range) != 0 {
                let _ = region.ops.invalidate(Invalidate {
                    range,
                    _op: PhantomData,
                });
            }
        }
        true
    }
}

#[pinned_drop]
impl PinnedDrop for Region {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: By the type invariants the notifier is inserted. No callback can reach this: it
        // has neither the region nor the mirror. The lock is not held, since a guard borrows.
        unsafe { bindings::mmu_interval_notifier_remove(self.notifier.get()) };
    }
}

/// A reference to a module: its code stays.
///
/// # Invariants
///
/// Holds a reference to the module, or the pointer is null, for what is built into the kernel.
struct ModuleRef(*mut bindings::module);

// SAFETY: Any task may give the reference up.
unsafe impl Send for ModuleRef {}
// SAFETY: Nothing can be done with a shared reference to this.
unsafe impl Sync for ModuleRef {}

impl ModuleRef {
    fn new(module: &'static ThisModule) -> Result<Self> {
        // SAFETY: The pointer is that of a module, or null, which `try_module_get()` allows.
        if !unsafe { bindings::try_module_get(module.as_ptr()) } {
            return Err(ENODEV);
        }
        // INVARIANT: `try_module_get()` has taken a reference.
        Ok(Self(module.as_ptr()))
    }
}

impl Drop for ModuleRef {
    fn drop(&mut self) {
        // SAFETY: By the type invariants; this gives the reference up.
        unsafe { bindings::module_put(self.0) };
    }
}

/// What a [`Mirror`] owns. Apart from it so that no driver instantiates the destructors.
#[pin_data]
struct Inner {
    /// The regions, by address >> (order + page shift). They go before the mm does.
    #[pin]
    regions: MapleTree<Arc<Region>>,
    mm: ARef<Mm>,
    ops: Arc<dyn MirrorOps>,
    /// The memory of the device, if it has any.
    pool: Option<Arc<Pool>>,
    /// The code of `ops`. Last: it may go as soon as this does.
    _module: ModuleRef,
}

/// The mirror of one process's address space for one device.
///
/// It may outlive the process, and it does not keep its memory: once the process is gone there is
/// nothing to read and nothing to fault.
///
/// It keeps the module of its driver, whose code the notifiers call. So a driver that leaks a
/// mirror (by a cycle of references, say) cannot be unloaded, and nothing else happens.
///
/// Dropping it waits for running callbacks. Never drop it with a lock held that
/// [`MirrorOps::invalidate`] takes, and never in it.
pub struct Mirror {
    inner: ManuallyDrop<Pin<KBox<Inner>>>,
}

/// The page is not there for the device, or not for this access: fault it.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Miss {
    /// The first byte that was not copied.
    pub va: usize,
    /// The access that missed.
    pub access: Access,
}

impl Mirror {
    /// Mirrors the address space of the current task. `module` is the one that has the code of
    /// `ops`: `this_module::<crate::LocalModule>()`.
    ///
    /// # Context
    ///
    /// Takes `mmap_lock` for write if nothing has subscribed to this mm before.
    ///
    /// # Errors
    ///
    /// [`EINVAL`] if the current task has no address space, [`ENODEV`] if the module is being
    /// unloaded, [`ENOMEM`]; [`EINTR`] if a signal is pending and nothing has subscribed to this mm
    /// before.
    #[inline(never)]
    #[export_name = "hmm_mirror_new"]
    pub fn new(module: &'static ThisModule, ops: Arc<dyn MirrorOps>) -> Result<Self> {
        Self::with(module, ops, None)
    }

    /// Mirrors the address space of the current task, for a device that has memory of its own.
    ///
    /// Pages that are in there are entries like others. The rest is as for [`Mirror::new`].
    ///
    /// # Errors
    ///
    /// Those of [`Mirror::new`].
    #[cfg(CONFIG_RUST_HMM_DEVICE)]
    #[inline]
    pub fn new_with_pool<T: PoolOps>(
        module: &'static ThisModule,
        ops: Arc<dyn MirrorOps>,
        pool: &DevicePool<T>,
    ) -> Result<Self> {
        mirror_new_with_pool(module, ops, pool.pool())
    }

    fn with(
        module: &'static ThisModule,
        ops: Arc<dyn MirrorOps>,
        pool: Option<Arc<Pool>>,
    ) -> Result<Self> {
        let current = kernel::current!();
        let mm = current.mm().ok_or(EINVAL)?;

        let init = try_pin_init!(Inner {
            regions <- MapleTree::new(),
            mm: ARef::from(&**mm),
            ops,
            pool,
            _module: ModuleRef::new(module)?,
        });
        let this = Self {
            inner: ManuallyDrop::new(KBox::pin_init(init, GFP_KERNEL_ACCOUNT)?),
        };
        // Later regions need not take mmap_lock, once there is one. This is where mmap() begins in
        // the usual layout.
        //
        // SAFETY: The mm is alive; only exec changes this, of an mm that nobody else has yet.
        let mmap_base = unsafe { (*mm.as_raw()).__bindgen_anon_1.mmap_base };
        this.region_or_insert(mm, mmap_base.saturating_sub(1))?;
        Ok(this)
    }

    /// Whether the current task runs on the mirrored address space.
    #[inline(never)]
    #[export_name = "hmm_mirror_is_current"]
    pub fn is_current(&self) -> bool {
        self.current_mm(kernel::current!().mm()).is_ok()
    }

    /// The end of the user part of the mirrored address space.
    ///
    /// Whatever the process does, no address from there on is its own.
    #[inline(never)]
    #[export_name = "hmm_mirror_task_size"]
    pub fn task_size(&self) -> usize {
        // SAFETY: The mm is not freed while there is a reference to it; only exec changes this, of
        // an mm that nobody else has yet.
        unsafe { (*self.inner.mm.as_raw()).__bindgen_anon_1.task_size }
    }

    /// Copies from the process's memory at `va`, as the device sees it, to `buf`.
    ///
    /// # Context
    ///
    /// Any task; sleeps for the region's lock, and releases it after every 16 pages: invalidations
    /// wait for that. The copy is not atomic: the process may write meanwhile, as it may with any
    /// other thread.
    ///
    /// # Errors
    ///
    /// A [`Miss`] at the first byte whose page has no entry for the device. The bytes before it
    /// were copied.
    #[inline(never)]
    #[export_name = "hmm_mirror_read"]
    pub fn read(&self, va: usize, buf: &mut [u8]) -> Result<(), Miss> {
        self.access(va, buf.len(), Access::Read, |entries, at, part| {
            entries.read(at, &mut buf[part])
        })
    }

    /// Copies `buf` to the process's memory at `va`, as the device sees it.
    ///
    /// # Context
    ///
    /// As for [`Mirror::read`].
    ///
    /// # Errors
    ///
    /// A [`Miss`] at the first byte whose page has no entry that the device may write. The bytes
    /// before it were copied.
    #[inline(never)]
    #[export_name = "hmm_mirror_write"]
    pub fn write(&self, va: usize, buf: &[u8]) -> Result<(), Miss> {
        self.access(va, buf.len(), Access::Write, |entries, at, part| {
            entries.write(at, &buf[part])
        })
    }

    /// Calls `copy` for the part of each page of the `len` bytes at `va`, with the lock of its
    /// region held for read.
    fn access(
        &self,
        va: usize,
        len: usize,
        access: Access,
        mut copy: impl FnMut(&Entries, usize, Range<usize>) -> bool,
    ) -> Result<(), Miss> {
        let mut done = 0;
        while done < len {
            let mut at = va.wrapping_add(done);
            let region = self.region(at).ok_or(Miss { va: at, access })?;
            let batch = len.min(done + ACCESS_BATCH);
            let entries = region.entries.read();
            while done < batch && region.range.contains(at) {
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

    /// `mm`, if it is the mirrored one; else [`EPERM`].
    pub(crate) fn current_mm<'a>(&self, mm: Option<&'a MmWithUser>) -> Result<&'a MmWithUser> {
        mm.filter(|mm| mm.as_raw() == self.inner.mm.as_raw())
            .ok_or(EPERM)
    }

    pub(crate) fn pool(&self) -> Option<&Arc<Pool>> {
        self.inner.pool.as_ref()
    }

    /// The region of `va`, if there is one yet.
    pub(crate) fn region(&self, va: usize) -> Option<Arc<Region>> {
        self.inner
            .regions
            .lock()
            .load(region_index(va))
            .map(Arc::from)
    }

    /// The region of `va`. Holds no lock while it inserts.
    pub(crate) fn region_or_insert(&self, mm: &MmWithUser, va: usize) -> Result<Arc<Region>> {
        match self.region(va) {
            Some(region) => Ok(region),
            None => self.publish(self.new_region(mm, va)?, va),
        }
    }

    /// A region for `va` that nobody else sees yet.
    pub(crate) fn new_region(&self, mm: &MmWithUser, va: usize) -> Result<Arc<Region>> {
        let range = PageRange::aligned_block(va, REGION_ORDER)?;
        Region::new(mm, range, self.inner.ops.clone())
    }

    /// Publishes `region` as that of `va`. Where another task was first, its region is returned and
    /// `region` is dropped.
    pub(crate) fn publish(&self, region: Arc<Region>, va: usize) -> Result<Arc<Region>> {
        let index = region_index(va);
        let inserted = (self.inner.regions).insert(index, region.clone(), GFP_KERNEL_ACCOUNT);
        match inserted {
            Ok(()) => Ok(region),
            Err(err) => match err.cause {
                // It is still there: no region goes before the mirror does.
                InsertErrorKind::Occupied => self.region(va).ok_or(EIO),
                InsertErrorKind::AllocError(_) => Err(ENOMEM),
                InsertErrorKind::InvalidRequest => Err(EINVAL),
            },
        }
    }
}

#[cfg(CONFIG_RUST_HMM_DEVICE)]
#[inline(never)]
#[export_name = "hmm_mirror_new_with_pool"]
fn mirror_new_with_pool(
    module: &'static ThisModule,
    ops: Arc<dyn MirrorOps>,
    pool: &Arc<Pool>,
) -> Result<Mirror> {
    Mirror::with(module, ops, Some(pool.clone()))
}

impl Drop for Mirror {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: This is the destructor: it runs once, and nothing uses `self` after it.
        unsafe { mirror_drop(self) };
    }
}

/// # Safety
///
/// Called once, and `mirror` is not used after it.
#[inline(never)]
#[export_name = "hmm_mirror_drop"]
unsafe fn mirror_drop(mirror: &mut Mirror) {
    // SAFETY: By the caller's promise.
    unsafe { ManuallyDrop::drop(&mut mirror.inner) };
}

fn region_index(va: usize) -> usize {
    va >> (REGION_ORDER as usize + PAGE_SHIFT)
}
