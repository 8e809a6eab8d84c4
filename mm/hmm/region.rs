// SPDX-License-Identifier: GPL-2.0

//! A region: an aligned part of a mirrored address space, with one `mmu_interval_notifier`, one
//! lock and the entries that this lock protects.
//!
//! This file has the notifier and its callback, which is the invalidating side of the
//! collision-retry scheme of Documentation/mm/hmm.rst. The faulting side is in `fault.rs`.
//!
//! C header: [`include/linux/mmu_notifier.h`](srctree/include/linux/mmu_notifier.h)

use super::{
    callback::Callback,
    dma::{
        Dma,
        LeafMap,
        StaysBound, //
    },
    entries::{
        Entries,
        Leaf,
        LEAF_ORDER, //
    },
    pfn::HmmPfn,
    range::PageRange,
    rwsem::{
        RwSem,
        WriteGuard, //
    }, //
};
use core::marker::PhantomData;
use kernel::{
    bindings,
    error::to_result,
    mm::MmWithUser,
    new_spinlock,
    prelude::*,
    sync::{
        static_lock_class,
        Arc,
        SpinLock, //
    },
    types::Opaque, //
};

/// The size of a region as an order of pages: 512 MiB with 4 KiB pages. A multiple of a leaf.
///
/// Smaller regions need more notifiers, and each invalidation of the mm searches their interval
/// tree. Larger regions make more faults retry, since an invalidation collides with all concurrent
/// faults in the same region.
pub(crate) const REGION_ORDER: u32 = 29 - 12;

kernel::static_assert!(REGION_ORDER >= LEAF_ORDER);

/// The callbacks with which a driver follows changes of the address space.
pub trait MirrorOps: Send + Sync {
    /// Stops the use of `event.range()` by the device. When this returns [`Invalidate::done`], the
    /// device must no longer use any translation that the driver has made for the range, TLB
    /// entries included.
    ///
    /// The core has already erased its entries of the range, so that nothing in it can be read,
    /// written or committed until the driver faults it again. The core does not call this if the
    /// range had no entry, since the driver cannot have a translation then. The exception is
    /// [`Cause::Release`], for which the core calls this once for each region that has been used.
    ///
    /// A driver that has to wait for its device starts the work and returns
    /// [`Invalidate::flushing`]. Then the device may use the old translations until
    /// [`Flush::wait`] returns, and mm does not go on before. The core calls it after all devices
    /// that mirror the range have started, so the work of several devices takes the time of one.
    /// This is called for each region, one after the other: a large event has as many waits.
    ///
    /// # Context
    ///
    /// Called with the region's lock held for write. The caller in mm may hold `mmap_lock` or locks
    /// of the reverse map, or may be in reclaim. So this must not allocate memory in a way that
    /// waits, take `mmap_lock` or drop a reference to an mm. It must not sleep, unless
    /// [`MirrorOps::may_sleep`] says that it may. Page faults are disabled: an access to user
    /// memory that is not present fails. Calls of this crate fail, too. Lock order: the region's
    /// lock, then the driver's own locks.
    fn invalidate<'op>(&self, event: Invalidate<'op>) -> Invalidated<'op>;

    /// Whether [`MirrorOps::invalidate`], or the [`Flush::wait`] that follows it, may sleep. By
    /// default it may not. The answer is always the same.
    ///
    /// If so, the core refuses events that must not block, before anything has changed, when it
    /// would have to call the driver. Such events come from the OOM reaper and from
    /// `process_mrelease()`, which leave the range alone then. So the memory of a process that is
    /// killed is freed later, when its last user has gone.
    fn may_sleep(&self) -> bool {
        false
    }
}

/// Work of a device that [`MirrorOps::invalidate`] has started: a flush of a TLB, for example.
///
/// The core drops its references at the end of the event, in the context of [`Flush::wait`].
pub trait Flush: Send + Sync {
    /// Waits until the work that `fence` stands for has ended. `fence` is what the driver has
    /// passed to [`Invalidate::flushing`].
    ///
    /// # Context
    ///
    /// As for [`MirrorOps::invalidate`], but without the region's lock, unless another flush in the
    /// region is waited for already. Several tasks may wait for the same fence. mm waits for this,
    /// with locks held and also in reclaim. So the time must be bounded even if the device hangs,
    /// and what signals the fence must need neither memory nor a lock that is held during an
    /// allocation.
    fn wait(&self, fence: u64);
}

/// Why mm invalidates a range.
///
/// Whatever the cause, the device must stop using its translations of the range. The cause says
/// what is worth keeping: after [`Cause::Unmap`] and [`Cause::Release`] a driver can free what it
/// has stored about the addresses, such as tables and policies. After all others the device is
/// likely to fault the same pages again.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The addresses are unmapped, or their memory is moved to others (`MMU_NOTIFY_UNMAP`).
    Unmap,
    /// The process may access the pages in another way than before, or mm wants to see their next
    /// write (`MMU_NOTIFY_PROTECTION_VMA`, `MMU_NOTIFY_PROTECTION_PAGE`, `MMU_NOTIFY_SOFT_DIRTY`).
    /// Reads must stop too: it is not said which access is left.
    Protect,
    /// Pages are replaced or taken away, for reclaim, `madvise()` or copy-on-write for example
    /// (`MMU_NOTIFY_CLEAR`).
    Clear,
    /// Pages migrate to the memory of this device, or from there for a CPU fault or on request
    /// (`MMU_NOTIFY_MIGRATE`). Eviction is a [`Cause::Clear`].
    OwnMigration,
    /// The same, for the memory of another device (`MMU_NOTIFY_MIGRATE`).
    OtherMigration,
    /// A page is made exclusive to this device or another one (`MMU_NOTIFY_EXCLUSIVE`).
    Exclusive,
    /// No process has the address space any more (`MMU_NOTIFY_RELEASE`). There is no further fault.
    /// A region that has been used is told once, with or without entries. This is not the end of
    /// the mirror, and dropping the mirror while the process lives does not cause it.
    Release,
    /// The driver of the mirror's device is unbound: see [`DmaBinding`](super::DmaBinding). The
    /// process goes on, but there is no further fault for the device. This is no event of mm.
    Unbind,
}

/// An invalidation in progress.
///
/// The lifetime `'op` is invariant and differs from callback to callback, so a driver can neither
/// keep this or an [`Invalidated`] nor use the one of another callback.
pub struct Invalidate<'op> {
    range: PageRange,
    cause: Cause,
    _op: PhantomData<fn(&'op ()) -> &'op ()>,
}

impl<'op> Invalidate<'op> {
    /// The range that is invalidated, clamped to the region.
    #[inline]
    pub fn range(&self) -> PageRange {
        self.range
    }

    /// Why the range is invalidated.
    #[inline]
    pub fn cause(&self) -> Cause {
        self.cause
    }

    /// Confirms that the device does not use the range any more.
    #[inline]
    pub fn done(self) -> Invalidated<'op> {
        Invalidated {
            flush: None,
            _op: PhantomData,
        }
    }

    /// Confirms that the device does not use the range any more when `flush.wait(fence)` has
    /// returned.
    ///
    /// [`MirrorOps::may_sleep`] must be true if the wait may sleep.
    #[inline]
    pub fn flushing(self, flush: Arc<dyn Flush>, fence: u64) -> Invalidated<'op> {
        Invalidated {
            flush: Some((flush, fence)),
            _op: PhantomData,
        }
    }
}

/// Proof that a driver handled the [`Invalidate`] with the same lifetime.
#[must_use]
pub struct Invalidated<'op> {
    flush: Option<(Arc<dyn Flush>, u64)>,
    _op: PhantomData<fn(&'op ()) -> &'op ()>,
}

/// A flush that the second pass of an invalidation waits for.
#[derive(Clone)]
struct Pending {
    range: PageRange,
    flush: Arc<dyn Flush>,
    fence: u64,
}

impl Pending {
    /// Waits for the flush, and drops it. To be called with a [`Callback`].
    fn wait(self) {
        self.flush.wait(self.fence);
    }
}

/// A part of an address space: an interval notifier, and the entries with their lock.
///
/// # Invariants
///
/// `notifier` is subscribed to `range` from the end of [`Region::new`] until the region is dropped.
/// Only the notifier callback writes `invalidate_seq`. It does so with `entries` locked for write,
/// and for all events but the `MMU_NOTIFY_EXCLUSIVE` event that makes a page exclusive to this
/// device.
#[pin_data(PinnedDrop)]
pub(crate) struct Region {
    #[pin]
    notifier: Opaque<bindings::mmu_interval_notifier>,
    #[pin]
    entries: RwSem<Entries>,
    /// The flush that an invalidation has started and not waited for yet. Set with `entries` locked
    /// for write. Another event in its range must wait for it too, though it finds no entry.
    #[pin]
    pending: SpinLock<Option<Pending>>,
    /// What mm keeps in its list of second passes, as long as there is a pending flush.
    finish: Opaque<bindings::mmu_interval_notifier_finish>,
    range: PageRange,
    ops: Arc<dyn MirrorOps>,
    /// The owner of the device's own memory, as mm reports it in `MMU_NOTIFY_MIGRATE` events, or
    /// null. It is only compared.
    owner: *mut c_void,
    /// The device that the pages are mapped for, if it does DMA.
    dma: Option<Arc<Dma>>,
}

/// What makes sure that entries can be installed for a device that does DMA.
pub(crate) struct Preparation<'a> {
    /// Dropped before `bound`.
    map: Option<KBox<LeafMap>>,
    bound: Option<StaysBound<'a>>,
}

impl Preparation<'_> {
    /// Maps the pages of `range` for DMA, if the device does DMA, and installs their entries.
    /// Returns `false`, and does nothing, if the room for the mappings is gone that was there when
    /// this was prepared.
    ///
    /// # Errors
    ///
    /// Those of [`Entries::map`] and [`Entries::install`].
    ///
    /// # Safety
    ///
    /// As for [`Entries::install`].
    pub(crate) unsafe fn install(
        &mut self,
        entries: &mut Entries,
        range: PageRange,
        pfns: impl Iterator<Item = HmmPfn> + Clone,
        spare: &mut Option<KBox<Leaf>>,
    ) -> Result<bool> {
        if self.bound.is_some() {
            if self.map.is_none() && !entries.has_map(range.start()) {
                return Ok(false);
            }
            // SAFETY: The caller ensures the conditions (see the # Safety section).
            unsafe { entries.map(range, pfns.clone(), &mut self.map) }?;
        }
        // SAFETY: The caller ensures the conditions (see the # Safety section).
        unsafe { entries.install(range, pfns, spare) }?;
        Ok(true)
    }
}

// SAFETY: mmu_interval_notifier_remove() may be called by another task than the one that inserted
// the notifier. The other fields are `Send`.
unsafe impl Send for Region {}
// SAFETY: mm accesses the notifier under the lock of the mm's subscriptions, and its sequence is
// written with `entries` locked for write. The other fields are `Sync`.
unsafe impl Sync for Region {}

static NOTIFIER_OPS: bindings::mmu_interval_notifier_ops = bindings::mmu_interval_notifier_ops {
    invalidate: None,
    invalidate_start: Some(Region::invalidate_start),
    invalidate_finish: Some(Region::invalidate_finish),
};

impl Region {
    /// Creates a region for `range` of `mm` and inserts its notifier.
    ///
    /// The caller must not hold any lock: this takes `mmap_lock` for write if this is the first
    /// interval notifier of the mm.
    pub(crate) fn new(
        mm: &MmWithUser,
        range: PageRange,
        ops: Arc<dyn MirrorOps>,
        owner: *mut c_void,
        dma: Option<Arc<Dma>>,
    ) -> Result<Arc<Self>> {
        let mm = mm.as_raw();
        let entries = match dma {
            Some(_) => Entries::new(range)?.with_maps()?,
            None => Entries::new(range)?,
        };
        let init = try_pin_init!(Self {
            entries <- RwSem::new(entries, c"hmm_region", static_lock_class!()),
            pending <- new_spinlock!(None, "hmm_region::pending"),
            finish: Opaque::zeroed(),
            range,
            ops,
            owner,
            dma,
            // Insert the notifier last: its callback may run at once and uses the other fields.
            //
            // INVARIANT: The notifier is inserted here, or the region is not created. `PinnedDrop`
            // removes it.
            notifier <- Opaque::try_ffi_init(|slot| {
                // SAFETY: `slot` is valid, and pinned until `PinnedDrop` has removed the notifier.
                // `mm` has users, since it comes from a `MmWithUser`. `NOTIFIER_OPS` is static, and
                // the other fields, which the callback uses, are initialised above.
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
        if let Some(dma) = &region.dma {
            dma.add_region(region.key())?;
        }
        Ok(region)
    }

    /// The key of the region in the list of its [`Dma`].
    fn key(&self) -> usize {
        (&raw const *self).expose_provenance()
    }

    /// Ends the use of the region by its device, whose driver is being unbound.
    ///
    /// # Safety
    ///
    /// `key` is the [`Region::key`] of a region in the list of its [`Dma`], whose lock is held.
    pub(crate) unsafe fn detach(key: usize) {
        // SAFETY: A region removes itself from the list, with the lock, before it is dropped.
        let region = unsafe { &*core::ptr::with_exposed_provenance::<Self>(key) };
        let mut entries = region.entries.write();
        let callback = Callback::begin();
        if entries.erase(region.range) != 0 {
            let invalidated = region.ops.invalidate(Invalidate {
                range: region.range,
                cause: Cause::Unbind,
                _op: PhantomData,
            });
            if let Some((flush, fence)) = invalidated.flush {
                flush.wait(fence);
            }
        }
        let pending = region.pending_in(region.range);
        if let Some(pending) = pending {
            pending.wait();
        }
        drop(callback);
        // SAFETY: All flushes have ended. Where an invalidation has erased the entry, it waits for
        // the lock before it is over. For all other pages none has begun.
        unsafe { entries.unmap(region.range) };
    }

    /// Makes sure that entries can be installed for pages of the leaf of `va`. To be called without
    /// the region's lock, and after the pages were faulted.
    ///
    /// # Errors
    ///
    /// [`ENODEV`] if the driver of the device was unbound, [`ENOMEM`].
    pub(crate) fn prepare(&self, va: usize) -> Result<Preparation<'_>> {
        let bound = self.dma.as_ref().map(Dma::stay_bound).transpose()?;
        let map = match &bound {
            Some(bound) if !self.entries.read().has_map(va) => Some(Entries::new_map(bound)?),
            _ => None,
        };
        Ok(Preparation { map, bound })
    }

    /// Tells lockdep that reclaim and `mmap_lock` come before the region's lock. Otherwise lockdep
    /// would only learn this when a rare event happens.
    fn prime_lockdep(&self) {
        #[cfg(CONFIG_PROVE_LOCKING)]
        {
            let mm = self.notifier_mm();

            // SAFETY: The mm is alive: the only caller, `Region::new()`, has a `MmWithUser` of it.
            unsafe { bindings::mmap_read_lock(mm) };
            // SAFETY: Always safe to call; released below.
            unsafe { bindings::fs_reclaim_acquire(bindings::GFP_KERNEL) };
            drop(self.entries.write());
            // SAFETY: This task called fs_reclaim_acquire() with the same flags above.
            unsafe { bindings::fs_reclaim_release(bindings::GFP_KERNEL) };
            // SAFETY: This task took `mmap_lock` for read above.
            unsafe { bindings::mmap_read_unlock(mm) };
        }
    }

    fn notifier_mm(&self) -> *mut bindings::mm_struct {
        // SAFETY: The type invariants say that the notifier is inserted. The insertion has set
        // `mm`, which does not change any more.
        unsafe { (*self.notifier.get()).mm }
    }

    /// Whether this is a region of `mm`.
    pub(crate) fn is_of(&self, mm: &MmWithUser) -> bool {
        self.notifier_mm() == mm.as_raw()
    }

    pub(crate) fn range(&self) -> PageRange {
        self.range
    }

    pub(crate) fn entries(&self) -> &RwSem<Entries> {
        &self.entries
    }

    /// The notifier, for `struct hmm_range`.
    pub(crate) fn notifier(&self) -> *mut bindings::mmu_interval_notifier {
        self.notifier.get()
    }

    /// The owner to pass to make_device_exclusive(). mm reports it in `MMU_NOTIFY_EXCLUSIVE`
    /// events, where the callback tells the region's own events from those of other devices by it.
    #[cfg(CONFIG_RUST_HMM_DEVICE)]
    pub(crate) fn as_owner(&self) -> *mut c_void {
        (&raw const *self).cast_mut().cast()
    }

    /// The aligned block of `2^order` pages around `va`, clipped to the region.
    pub(crate) fn window(&self, va: usize, order: u32) -> Result<PageRange> {
        let block = PageRange::aligned_block(va, order)?;
        block.intersect(&self.range).ok_or(EFAULT)
    }

    /// Waits until no invalidation of the region is running. Returns the sequence, which
    /// [`Region::lock_unless_stale`] checks for later invalidations.
    pub(crate) fn read_begin(&self) -> usize {
        // SAFETY: The type invariants say that the notifier is inserted.
        unsafe { bindings::mmu_interval_read_begin(self.notifier.get()) }
    }

    /// Locks the entries for write. Returns `None`, without the lock, if an invalidation has
    /// collided since [`Region::read_begin`] returned `seq`.
    ///
    /// # Errors
    ///
    /// [`EINTR`] if a fatal signal ends the wait.
    pub(crate) fn lock_unless_stale(&self, seq: usize) -> Result<Option<WriteGuard<'_, Entries>>> {
        let entries = self.entries.write_killable()?;
        // SAFETY: The type invariants say that the notifier is inserted. `entries` is locked, and
        // the callback writes the sequence with this lock held.
        let stale = unsafe { bindings::mmu_interval_read_retry(self.notifier.get(), seq) };
        Ok((!stale).then_some(entries))
    }

    /// The `invalidate_start` callback of the notifier. mm calls it before it changes page tables
    /// in the range. It does all that is to be done, but for what it stores in `finish`.
    ///
    /// # Safety
    ///
    /// `notifier` is the field of a [`Region`], `event` is valid, and `finish` is valid for writes.
    pub(crate) unsafe extern "C" fn invalidate_start(
        notifier: *mut bindings::mmu_interval_notifier,
        event: *const bindings::mmu_notifier_range,
        cur_seq: usize,
        finish: *mut *mut bindings::mmu_interval_notifier_finish,
    ) -> bool {
        // SAFETY: `notifier` is the field of a region (see the # Safety section). The region's
        // other fields are initialised, since it inserts the notifier last. The region is alive,
        // since its drop waits for running callbacks.
        let region =
            unsafe { &*kernel::container_of!(Opaque::cast_from(notifier), Region, notifier) };
        // SAFETY: The caller passes a valid `event` (see the # Safety section).
        let event = unsafe { &*event };
        // SAFETY: `event` is valid.
        let blockable = unsafe { bindings::mmu_notifier_range_blockable(event) };
        let cause = region.cause(event);
        // The end of an event may be ULONG_MAX: clamp it to the region before it is rounded up.
        let start = event.start.max(region.range.start());
        let end = event.end.min(region.range.end());
        let range = PageRange::containing(start, end.saturating_sub(start)).ok();

        let mut entries = if blockable {
            region.entries.write()
        } else {
            match region.entries.try_write() {
                Some(entries) => entries,
                // Nothing has changed yet. On `false`, mm leaves the range alone.
                None => return false,
            }
        };
        // This lasts longer than the references to what the driver has made.
        let _callback = Callback::begin();
        let pending = range.and_then(|range| region.pending_in(range));
        let must_call = || range.is_some_and(|range| entries.any(range));
        if !blockable && (pending.is_some() || region.ops.may_sleep() && must_call()) {
            // The same.
            return false;
        }

        // Do not bump the sequence for our own `MMU_NOTIFY_EXCLUSIVE` event: the retry check after
        // make_device_exclusive() would always fail. A concurrent report of the page stays correct,
        // since the page stays where it is.
        if cause != Cause::Exclusive || !core::ptr::eq(event.owner.cast(), region) {
            // SAFETY: The notifier is inserted, since this is its callback, and `entries` is locked
            // for write.
            unsafe { bindings::mmu_interval_set_seq(notifier, cur_seq) };
        }

        let Some(range) = range else { return true };
        let mut has_second_pass = false;
        if entries.erase(range) != 0 || cause == Cause::Release {
            let invalidated = region.ops.invalidate(Invalidate {
                range,
                cause,
                _op: PhantomData,
            });
            if let Some((flush, fence)) = invalidated.flush {
                let started = Pending {
                    range,
                    flush,
                    fence,
                };
                match region.set_pending(started, blockable) {
                    Ok(()) => {
                        has_second_pass = true;
                        // SAFETY: `finish` is valid for a write (see the # Safety section).
                        unsafe { *finish = region.finish.get() };
                    }
                    // There is one second pass for each region.
                    Err(started) => started.wait(),
                }
            }
        }
        if !has_second_pass && pending.is_none() {
            // SAFETY: This invalidation has erased the entries and is not over.
            unsafe { entries.unmap(range) };
        }
        drop(entries);
        if let Some(pending) = pending {
            pending.wait();
            // Otherwise the flush of this event has not ended.
            if !has_second_pass {
                region.unmap(range);
            }
        }
        true
    }

    /// Unmaps the pages of `range` without entries for the device, which has stopped using them.
    fn unmap(&self, range: PageRange) {
        if self.dma.is_some() {
            // SAFETY: The caller is an invalidation that has erased the entries and is not over.
            unsafe { self.entries.write().unmap(range) };
        }
    }

    /// The pending flush, if it is one of pages in `range`.
    fn pending_in(&self, range: PageRange) -> Option<Pending> {
        let overlaps = |pending: &&Pending| pending.range.intersect(&range).is_some();
        self.pending.lock().as_ref().filter(overlaps).cloned()
    }

    /// Makes `started` the pending flush. Gives it back if there is one already, or if the second
    /// pass may not take the region's lock because the event is not `blockable`.
    fn set_pending(&self, started: Pending, blockable: bool) -> Result<(), Pending> {
        let mut pending = self.pending.lock();
        if pending.is_some() || !blockable {
            return Err(started);
        }
        *pending = Some(started);
        Ok(())
    }

    /// The `invalidate_finish` callback of the notifier. mm calls it after all notifiers of the
    /// range were called, also if one of them has refused the event.
    ///
    /// # Safety
    ///
    /// `finish` was stored by [`Region::invalidate_start`], and this is called once for it.
    pub(crate) unsafe extern "C" fn invalidate_finish(
        finish: *mut bindings::mmu_interval_notifier_finish,
    ) {
        // SAFETY: invalidate_start() has stored the field of a region (see the # Safety section).
        // The region is alive, since its drop waits for the end of the invalidation.
        let region = unsafe { &*kernel::container_of!(Opaque::cast_from(finish), Region, finish) };
        // This lasts longer than the references to what the driver has made.
        let _callback = Callback::begin();
        let pending = region.pending.lock().clone();
        if let Some(pending) = pending {
            let range = pending.range;
            pending.wait();
            region.unmap(range);
        }
        // Not before the flush has ended. From here on `finish` may be used again: mm has taken it
        // from its list.
        let ended = region.pending.lock().take();
        drop(ended);
    }

    fn cause(&self, event: &bindings::mmu_notifier_range) -> Cause {
        match event.event {
            bindings::mmu_notifier_event_MMU_NOTIFY_UNMAP => Cause::Unmap,
            bindings::mmu_notifier_event_MMU_NOTIFY_PROTECTION_VMA
            | bindings::mmu_notifier_event_MMU_NOTIFY_PROTECTION_PAGE
            | bindings::mmu_notifier_event_MMU_NOTIFY_SOFT_DIRTY => Cause::Protect,
            bindings::mmu_notifier_event_MMU_NOTIFY_MIGRATE => {
                match !self.owner.is_null() && event.owner == self.owner {
                    true => Cause::OwnMigration,
                    false => Cause::OtherMigration,
                }
            }
            bindings::mmu_notifier_event_MMU_NOTIFY_EXCLUSIVE => Cause::Exclusive,
            bindings::mmu_notifier_event_MMU_NOTIFY_RELEASE => Cause::Release,
            // MMU_NOTIFY_CLEAR, and what mm may add.
            _ => Cause::Clear,
        }
    }
}

#[pinned_drop]
impl PinnedDrop for Region {
    fn drop(self: Pin<&mut Self>) {
        if let Some(dma) = &self.dma {
            dma.remove_region(self.key(), || {
                let mut entries = self.entries.write();
                entries.erase(self.range);
                // SAFETY: An invalidation that erases entries waits for the lock before it is over.
                unsafe { entries.unmap(self.range) };
            });
        }
        // SAFETY: The type invariants say that the notifier is inserted. This does not run in a
        // callback of the notifier: a callback has no reference to the region, and a mirror that is
        // dropped in one is freed by a work item. The region's lock is not held, since a guard
        // would borrow the region.
        unsafe { bindings::mmu_interval_notifier_remove(self.notifier.get()) };
    }
}
