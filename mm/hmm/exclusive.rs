// SPDX-License-Identifier: GPL-2.0

//! Exclusive access of a device to pages, until a CPU accesses them. A device needs this for atomic
//! operations that would not be atomic with respect to a CPU.
//!
//! mm replaces the page table entry of the page by one that makes a CPU access fault. The exclusive
//! access ends with any invalidation: by a CPU access, `mprotect()` or `fork()`, for example. Only
//! the event with which the exclusive access begins must not count as an invalidation.
//!
//! C source: `make_device_exclusive()` in [`mm/rmap.c`](srctree/mm/rmap.c)

use super::{
    callback::Callback,
    copy::DeviceRange,
    hmm_range::{
        identify,
        populate,
        Deadline,
        FaultBuf,
        DEFAULT_TIMEOUT_MS, //
    },
    mirrored_mm::MirroredMm,
    pfn::{
        Access,
        HmmPfn, //
    },
    pool::Pool,
    range::PageRange,
    region::Region,
    span::Location,
    vma::vma_for, //
};
use core::{
    marker::PhantomData,
    ptr::{
        null_mut,
        NonNull, //
    }, //
};
use kernel::{
    bindings,
    dma::DmaAddress,
    error::from_err_ptr,
    mm::virt::flags,
    page::PAGE_SIZE,
    prelude::*, //
};

/// Proof that the page at [`ExclusivePage::va`] may be mapped for the device to read, write and
/// operate on atomically: no CPU has it mapped. It is one page of `PAGE_SIZE`. The translation is
/// valid until [`MirrorOps::invalidate`](super::MirrorOps::invalidate) is called for it.
#[derive(Debug)]
pub struct ExclusivePage<'c> {
    va: usize,
    address: Option<DmaAddress>,
    is_device: bool,
    _commit: PhantomData<&'c ()>,
}

impl ExclusivePage<'_> {
    /// The address of the page.
    #[inline]
    pub fn va(&self) -> usize {
        self.va
    }

    /// Where the device finds the page, if the mirror was made with
    /// [`Mirror::for_device`](super::Mirror::for_device) or with a pool for it. The page is in
    /// system memory, or in coherent memory of this device or another.
    #[inline]
    pub fn location(&self) -> Option<Location> {
        let address = self.address?;
        Some(match self.is_device {
            true => Location::Device(DeviceRange::new(address as usize, PAGE_SIZE)),
            false => Location::Bus(address),
        })
    }
}

/// The folio of a page that was made exclusive. A CPU cannot get the page back while it is locked.
///
/// # Invariants
///
/// The folio is locked, and this holds a reference to it.
struct LockedFolio(NonNull<bindings::folio>);

impl Drop for LockedFolio {
    fn drop(&mut self) {
        // SAFETY: The type invariants say that the folio is locked.
        unsafe { bindings::folio_unlock(self.0.as_ptr()) };
        // SAFETY: The type invariants say that this holds a reference, which is not used
        // afterwards.
        unsafe { bindings::folio_put(self.0.as_ptr()) };
    }
}

impl MirroredMm<'_> {
    /// Makes the page that contains `va` exclusive to the device, and calls `f` once with the
    /// [`ExclusivePage`]. Returns what `f` returns.
    ///
    /// A CPU that accesses the page then waits until
    /// [`MirrorOps::invalidate`](super::MirrorOps::invalidate) has been called for it. This does
    /// not stop accesses through references that somebody had taken before, for O_DIRECT for
    /// example.
    ///
    /// # Context
    ///
    /// As for [`MirroredMm::fault`], but `f` also runs with `mmap_lock` held and the folio of the
    /// page locked.
    ///
    /// # Errors
    ///
    /// - [`EPERM`] if the process may not write to the page.
    /// - [`EFAULT`] if there is no memory that the process may read.
    /// - [`EOPNOTSUPP`] if the page is one of a file, of shared memory or of hugetlbfs.
    /// - [`EINTR`] if the task received a fatal signal.
    /// - [`ESRCH`] if the process has gone while invalidations collided.
    /// - [`EBUSY`] if invalidations kept colliding until the default time limit for retries had
    ///   passed.
    /// - [`EDEADLK`] if called from a callback or closure that this crate runs.
    /// - [`ENOMEM`] if there is no memory for the page or for the region.
    /// - [`ENODEV`] and [`EIO`] as for [`MirroredMm::fault`].
    #[inline]
    pub fn make_exclusive<R>(
        &self,
        va: usize,
        buf: &mut FaultBuf,
        f: impl FnOnce(&ExclusivePage<'_>) -> R,
    ) -> Result<R> {
        let mut f = Some(f);
        let mut result = None;
        mirror_make_exclusive(self, va, buf, &mut |page| {
            result = f.take().map(|f| f(page));
        })?;
        // `mirror_make_exclusive()` succeeds only after it has called the closure.
        result.ok_or(EIO)
    }
}

#[inline(never)]
#[export_name = "rust_hmm_mm_make_exclusive"]
fn mirror_make_exclusive(
    mm: &MirroredMm<'_>,
    va: usize,
    buf: &mut FaultBuf,
    f: &mut dyn FnMut(&ExclusivePage<'_>),
) -> Result {
    // This can only fail for the last page of all addresses, which is never one of a process.
    let page = PageRange::containing(va, 1).map_err(|_| EFAULT)?;
    let _charge = mm.enter()?;
    // Do not create a region for an address where nothing is mapped, and do not populate memory for
    // a page that make_device_exclusive() would refuse.
    let guard = mm.as_mm().mmap_read_lock_killable()?;
    vma_for(&guard, mm, page.start(), Access::Write)?;
    let vma = guard.vma_lookup(page.start()).ok_or(EFAULT)?;
    if vma.flags() & (flags::SHARED | flags::HUGETLB) != 0 {
        return Err(EOPNOTSUPP);
    }
    drop(guard);
    let region = mm.mirror().region_or_insert(mm.as_mm(), page.start())?;

    let mut deadline = Deadline::new(DEFAULT_TIMEOUT_MS);
    buf.retries = 0;
    loop {
        buf.bring_leaf()?;
        // Make the page writable, migrate it to system memory if it is in memory that the CPU does
        // not reach, and end the exclusive access of other devices. If this was left to
        // make_device_exclusive(), its invalidations would collide.
        let populated = populate(
            mm,
            &region,
            page,
            Access::Write,
            null_mut(),
            &mut deadline,
            &mut buf.pfns,
        );
        match populated {
            Ok(seq) => {
                if make_exclusive(mm, &region, page, seq, buf, f)? {
                    return Ok(());
                }
            }
            // mm may have spent all of its time waiting for one long invalidation. `retry()`
            // decides whether to give up.
            Err(err) if err == EBUSY => {}
            Err(err) => return Err(err),
        }
        deadline.retry(mm, buf)?;
    }
}

/// Makes `page` exclusive to the device and calls `f`. `buf` has a report of the page with the
/// notifier sequence `seq`. Returns `false`, without calling `f`, if an invalidation has collided.
fn make_exclusive(
    mm: &MirroredMm<'_>,
    region: &Region,
    page: PageRange,
    seq: usize,
    buf: &mut FaultBuf,
    f: &mut dyn FnMut(&ExclusivePage<'_>),
) -> Result<bool> {
    let guard = mm.as_mm().mmap_read_lock_killable()?;
    vma_for(&guard, mm, page.start(), Access::Write)?;
    let mut folio = null_mut();
    // SAFETY: The mm has users, and `guard` holds its mmap_lock.
    let made = from_err_ptr(unsafe {
        bindings::make_device_exclusive(
            mm.as_mm().as_raw(),
            page.start(),
            region.as_owner(),
            &mut folio,
        )
    });
    // INVARIANT: If make_device_exclusive() succeeds, it has locked the folio and taken a
    // reference.
    let locked = made.map(|_| NonNull::new(folio).map(LockedFolio));

    // Not before make_device_exclusive(), which may fault, nor before mmap_lock is taken: unbinding
    // the driver waits for this.
    let mut preparation = region.prepare(page.start())?;
    // No CPU can have got the page back, since its folio is locked. Any other change of the page
    // has bumped the sequence. Retry in this case, even if make_device_exclusive() has failed.
    let Some(mut entries) = region.lock_unless_stale(seq)? else {
        return Ok(false);
    };
    let locked = locked?;
    let owner = Pool::owner(mm.mirror().pool());
    let pfn = buf.pfns.first().map(|&raw| HmmPfn::from_output(raw));
    // SAFETY: The page was reported with `seq`, and `locked` has a reference to it.
    let pfn = pfn.map(|pfn| unsafe { identify(pfn, owner) });
    let is_device = pfn.is_some_and(HmmPfn::is_device);
    // SAFETY: The page was reported with `seq`. The region's lock is held for write, and the event
    // that made the page exclusive is the only one since then. The page is anonymous, so it is in
    // the direct map. `identify()` has marked a page of the device.
    let installed =
        unsafe { preparation.install(&mut entries, page, pfn.into_iter(), &mut buf.spare) }?;
    if !installed {
        return Ok(false);
    }
    let callback = Callback::begin();
    f(&ExclusivePage {
        va: page.start(),
        address: entries.address(page.start()),
        is_device,
        _commit: PhantomData,
    });
    drop(callback);
    drop(entries);
    drop(locked);
    drop(guard);
    Ok(true)
}
