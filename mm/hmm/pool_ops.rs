// SPDX-License-Identifier: GPL-2.0

//! The traits that a driver with device memory implements: [`PoolOps`] has its callbacks,
//! [`PageData`] is what it keeps for each page.
//!
//! The core calls the driver by way of [`Ops`], in which the type of the page data is erased.

use super::copy::CopyBatch;
use core::mem::ManuallyDrop;
use kernel::{
    prelude::*,
    sync::Arc,
    types::ForeignOwnable, //
};

/// The data that a driver keeps for each page of its memory that is in use. The core stores it in
/// the `zone_device_data` of the folio.
///
/// The page owns the data from
/// [`MirroredMm::migrate_to_device`](super::MirroredMm::migrate_to_device) until
/// [`PoolOps::page_freed`]. The page may outlive the mapping that it was made for: after a
/// `fork()`, the child may still map the page when the parent does not. So the data should not
/// refer to an address or an mm.
///
/// A large folio has one value for all its pages. If mm splits it, each page gets a clone. The
/// clone is made with spinlocks held and interrupts disabled, so it must neither sleep nor allocate
/// memory.
///
/// # Safety
///
/// [`PageData::borrow`] and [`PageData::from_raw`] must return the value from which
/// [`PageData::into_raw`] made the pointer.
pub unsafe trait PageData: Clone + Send + 'static {
    /// The data as the driver sees it while the page owns it.
    type Borrowed<'a>;

    /// Turns the data into the pointer that the page stores.
    fn into_raw(self) -> *mut c_void;

    /// Borrows the data from the page.
    ///
    /// # Safety
    ///
    /// `raw` must come from [`PageData::into_raw`], and [`PageData::from_raw`] must not be called
    /// for it during `'a`.
    unsafe fn borrow<'a>(raw: *mut c_void) -> Self::Borrowed<'a>;

    /// Takes the data back from the page.
    ///
    /// # Safety
    ///
    /// `raw` must come from [`PageData::into_raw`], and this must not be called twice for it,
    /// unless the value that it returns is not dropped.
    unsafe fn from_raw(raw: *mut c_void) -> Self;
}

// SAFETY: The methods are those of `ForeignOwnable`, which guarantees that `borrow()` and
// `from_foreign()` return the value that `into_foreign()` took.
unsafe impl<T: Send + Sync + 'static> PageData for Arc<T> {
    type Borrowed<'a> = <Self as ForeignOwnable>::Borrowed<'a>;

    fn into_raw(self) -> *mut c_void {
        self.into_foreign()
    }

    unsafe fn borrow<'a>(raw: *mut c_void) -> Self::Borrowed<'a> {
        // SAFETY: `raw` comes from `into_foreign()`, and the caller does not take the value back
        // during `'a` (see the # Safety section of `PageData::borrow`).
        unsafe { <Self as ForeignOwnable>::borrow(raw) }
    }

    unsafe fn from_raw(raw: *mut c_void) -> Self {
        // SAFETY: `raw` comes from `into_foreign()`, and the caller takes the value back only once
        // (see the # Safety section of `PageData::from_raw`).
        unsafe { <Self as ForeignOwnable>::from_foreign(raw) }
    }
}

// SAFETY: The address of the pointer is the value. A pointer has 64 bits, since `RUST_HMM_DEVICE`
// depends on `64BIT`.
unsafe impl PageData for u64 {
    type Borrowed<'a> = u64;

    fn into_raw(self) -> *mut c_void {
        core::ptr::without_provenance_mut(self as usize)
    }

    unsafe fn borrow<'a>(raw: *mut c_void) -> Self::Borrowed<'a> {
        raw.addr() as u64
    }

    unsafe fn from_raw(raw: *mut c_void) -> u64 {
        raw.addr() as u64
    }
}

/// The [`PageData`] of a page, with its type erased.
///
/// # Invariants
///
/// The pointer comes from [`PageData::into_raw`] of the type [`PoolOps::PageData`] of the pool for
/// whose page it is used.
pub(crate) struct RawData(*mut c_void);

impl RawData {
    /// Erases the type of `data`.
    ///
    /// # Safety
    ///
    /// The result must be used only for a page of a pool whose [`PoolOps::PageData`] is the type of
    /// `data`.
    #[inline]
    pub(crate) unsafe fn new(data: impl PageData) -> Self {
        // INVARIANT: The caller uses it only for a page of a pool with this type of page data (see
        // the # Safety section).
        Self(data.into_raw())
    }

    /// The pointer to store in the page.
    pub(crate) fn into_raw(self) -> *mut c_void {
        self.0
    }
}

/// Why a page has migrated to system memory.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum MigrateReason {
    /// The page, or one near it, was faulted: the CPU touched it, another device faulted it, or its
    /// own device faulted it for write but could only read it, so that mm had to copy it (after a
    /// `fork()`, for example).
    CpuFault,
    /// The pool was full and the page was evicted, or the driver emptied or dropped the pool.
    Evict,
    /// The driver called [`MirroredMm::migrate_to_ram`](super::MirroredMm::migrate_to_ram).
    Request,
}

/// The callbacks of a driver with device memory.
///
/// Addresses are in bytes from the start of the pool's part of the device's memory.
///
/// The core keeps this object until the last mirror with the pool is dropped, which may be after
/// the [`DevicePool`](super::DevicePool). So the object should own nothing that has to go earlier.
/// The exception is a lost device: see [`DevicePool::lost`](super::DevicePool::lost).
pub trait PoolOps: Send + Sync + 'static {
    /// The data that the driver keeps for each page: an [`Arc`](kernel::sync::Arc) of a type of its
    /// own, or a `u64`. Both implement [`PageData`]. A driver that has nothing to keep uses `u64`.
    type PageData: PageData;

    /// Performs all operations of `batch`. The copies must be complete when this returns. If it
    /// fails, too, what was started must have ended: the pages of both sides belong to others then.
    ///
    /// The device does not use the pages of a batch, since their entries were erased. A batch has
    /// at most 2^[`MigrateBuf::MAX_ORDER`](super::MigrateBuf::MAX_ORDER) pages.
    ///
    /// # Context
    ///
    /// Several tasks may call this at the same time. May sleep and allocate memory. The folios are
    /// locked, and `mmap_lock` may be held. An access to user memory that is not present fails, and
    /// calls of this crate are refused (see the [crate documentation](crate)). A lock that this
    /// method takes must not be held elsewhere while user memory is accessed or this crate is
    /// called.
    ///
    /// # Errors
    ///
    /// If this fails, or has not performed all of `batch`, the copies are discarded and all pages
    /// stay where they were. On the way to system memory the core then calls this again for each
    /// folio alone, and splits a large folio if that fails too. If a CPU waits for one of these
    /// pages, the error for this page decides what happens:
    ///
    /// - [`EAGAIN`], [`EBUSY`] and [`EINTR`] are transient: the CPU waits, killably, and faults
    ///   again.
    /// - All other errors end in SIGBUS, [`ENOMEM`] too. So allocate what copies need in advance,
    ///   or return [`EAGAIN`] if an allocation fails.
    ///
    /// - [`ENODEV`] says that the device is lost: this is not called again, and what is said of
    ///   [`DevicePool::lost`](super::DevicePool::lost) holds from then on.
    ///
    /// For coherent memory no CPU waits, and [`ENODEV`] ends only copies and migrations.
    ///
    /// Do not return [`ENOMEM`]: an eviction takes it for a lack of system memory, and ends.
    fn copy(&self, batch: &mut CopyBatch<'_>) -> Result;

    /// A folio of `pages` pages with this `data` has migrated to system memory. Its place in the
    /// device's memory will be freed soon.
    ///
    /// # Context
    ///
    /// Must not sleep.
    fn migrated_to_ram(
        &self,
        data: <Self::PageData as PageData>::Borrowed<'_>,
        pages: usize,
        reason: MigrateReason,
    );

    /// A folio of `pages` pages was freed. Gives its data back to the driver, once for each folio.
    /// If a folio was split, each page gives its clone back, with a `pages` of 1. So the sum of
    /// `pages` is that of the pages for which the driver has given data, but the number of calls is
    /// not.
    ///
    /// This is also called if the folio did not migrate in the end, and without a call of
    /// [`PoolOps::migrated_to_ram`] if the process has unmapped it.
    ///
    /// # Context
    ///
    /// Atomic, with interrupts disabled: a page table lock or folio locks may be held. This method
    /// may take a spinlock only if nobody holds that spinlock while allocating memory or accessing
    /// user memory, since both may free pages. Dropping `data` must not sleep; in particular it
    /// must not drop the last reference to an mm.
    fn page_freed(&self, data: Self::PageData, pages: usize);
}

/// What a device that is made of software implements in addition, so that
/// [`Mirror::read`](super::Mirror::read) and [`Mirror::write`](super::Mirror::write) reach its
/// memory. To be passed to [`DevicePool::new`](super::DevicePool::new).
pub trait CpuAccess: Send + Sync + 'static {
    /// Reads the device's memory at `address`.
    ///
    /// The bytes lie in one page, which is in use. Other tasks and the device may read and write
    /// the page meanwhile.
    ///
    /// # Context
    ///
    /// The region's lock is held for read. The restrictions of
    /// [`MirrorOps::invalidate`](super::MirrorOps::invalidate) apply, except that this method may
    /// sleep. A lock that it takes must not be held elsewhere over an allocation that waits.
    fn read(&self, address: usize, buf: &mut [u8]);

    /// Writes the device's memory at `address`.
    ///
    /// # Context
    ///
    /// Like [`CpuAccess::read`].
    fn write(&self, address: usize, buf: &[u8]);
}

/// [`PoolOps`] with the type of the page data erased, so that the core can use `dyn Ops`.
pub(crate) trait Ops: Send + Sync {
    fn copy(&self, batch: &mut CopyBatch<'_>) -> Result;

    /// # Safety
    ///
    /// `data` must be the data of a page of a pool with these ops, and the page must not be freed
    /// meanwhile.
    unsafe fn migrated_to_ram(&self, data: *mut c_void, pages: usize, reason: MigrateReason);

    /// Returns a copy of `data` for another page.
    ///
    /// # Safety
    ///
    /// As for [`Ops::migrated_to_ram`].
    unsafe fn clone_data(&self, data: *mut c_void) -> *mut c_void;

    /// # Safety
    ///
    /// `data` must have been the data of a page of a pool with these ops, and the page must not use
    /// it any more.
    unsafe fn page_freed(&self, data: *mut c_void, pages: usize);
}

impl<T: PoolOps> Ops for T {
    fn copy(&self, batch: &mut CopyBatch<'_>) -> Result {
        PoolOps::copy(self, batch)
    }

    unsafe fn migrated_to_ram(&self, data: *mut c_void, pages: usize, reason: MigrateReason) {
        // SAFETY: The caller passes the data of a page of this pool, which comes from `into_raw()`
        // of this type (see the invariants of `RawData`). `from_raw()` is called only when the page
        // is freed, which does not happen meanwhile.
        PoolOps::migrated_to_ram(self, unsafe { T::PageData::borrow(data) }, pages, reason)
    }

    unsafe fn clone_data(&self, data: *mut c_void) -> *mut c_void {
        // SAFETY: The caller passes the data of a page of this pool, which comes from `into_raw()`
        // of this type (see the invariants of `RawData`). It stays the data of that page: what
        // `from_raw()` returns is not dropped.
        let data = ManuallyDrop::new(unsafe { T::PageData::from_raw(data) });
        T::PageData::clone(&data).into_raw()
    }

    unsafe fn page_freed(&self, data: *mut c_void, pages: usize) {
        // SAFETY: The caller passes the data of a page of this pool, which comes from `into_raw()`
        // of this type (see the invariants of `RawData`). The page does not use the data any more,
        // so this is the only call of `from_raw()` for it.
        PoolOps::page_freed(self, unsafe { T::PageData::from_raw(data) }, pages)
    }
}
