// SPDX-License-Identifier: GPL-2.0

//! `hmm_range_fault()` and its arguments: have mm fault a range for the device, or report what is
//! mapped in it.
//!
//! Each report is limited to what the VMAs allow, with the `mmap_lock` still held under which the
//! page tables were walked: see `vma.rs`.
//!
//! C header: [`include/linux/hmm.h`](srctree/include/linux/hmm.h)

use super::{
    entries::{
        Leaf,
        LEAF_ORDER, //
    },
    mirrored_mm::MirroredMm,
    pfn::{
        request,
        Access,
        HmmPfn, //
    },
    pool::Pool,
    range::PageRange,
    region::Region,
    vma::{
        next_vma,
        vma_for, //
    }, //
};
use kernel::{
    bindings,
    dma::DmaAddress,
    error::to_result,
    page::PAGE_SIZE,
    prelude::*,
    time::{
        msecs_to_jiffies,
        Delta,
        Instant,
        Jiffies,
        Monotonic, //
    }, //
};

/// The default time limit for the retries of a fault, in milliseconds.
pub(crate) const DEFAULT_TIMEOUT_MS: u32 = bindings::HMM_RANGE_DEFAULT_TIMEOUT;

/// The array with the input and the output of `hmm_range_fault()`.
///
/// Only the core accesses the array. It is cleared for each attempt, so that the output of one
/// attempt is never the input of the next.
pub struct FaultBuf {
    pub(crate) order: u32,
    pub(crate) pfns: KVec<usize>,
    /// A leaf for the entries to install, in case the region has no leaf for them yet.
    pub(crate) spare: Option<KBox<Leaf>>,
    /// Where a device that does DMA finds the pages. Empty for other devices.
    pub(crate) addresses: KVec<DmaAddress>,
    pub(crate) retries: u32,
}

impl FaultBuf {
    /// The largest window, as an order of pages: 2 MiB with 4 KiB pages.
    pub const MAX_ORDER: u32 = LEAF_ORDER;

    /// Creates a buffer for naturally aligned windows of up to `2^order` pages.
    ///
    /// # Errors
    ///
    /// [`EINVAL`] if `order` is above [`FaultBuf::MAX_ORDER`], [`ENOMEM`].
    #[inline]
    pub fn new(order: u32) -> Result<Self> {
        if order > Self::MAX_ORDER {
            return Err(EINVAL);
        }
        Ok(Self {
            order,
            pfns: KVec::from_elem(0, 1 << order, GFP_KERNEL_ACCOUNT)?,
            spare: None,
            addresses: KVec::new(),
            retries: 0,
        })
    }

    /// Makes sure that there is a spare leaf, since nothing can be allocated when the entries are
    /// installed.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`].
    pub(crate) fn bring_leaf(&mut self) -> Result {
        if self.spare.is_none() {
            self.spare = Some(Leaf::new()?);
        }
        Ok(())
    }

    /// Makes sure that there are `addresses` if, and only if, the fault is for a device that does
    /// DMA.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`].
    pub(crate) fn bring_addresses(&mut self, does_dma: bool) -> Result {
        if !does_dma {
            self.addresses.clear();
        } else if self.addresses.is_empty() {
            self.addresses
                .resize(1 << self.order, 0, GFP_KERNEL_ACCOUNT)?;
        }
        Ok(())
    }

    /// How often the last fault discarded its report and started again, in most cases because an
    /// invalidation collided with it.
    #[inline]
    pub fn retries(&self) -> u32 {
        self.retries
    }
}

/// The time limit for the retries of one fault.
///
/// The clock starts after the first attempt to fault or to report, so the time that the fault
/// handlers take in this attempt does not count.
pub(crate) struct Deadline {
    timeout: Delta,
    begin: Option<Instant<Monotonic>>,
}

impl Deadline {
    pub(crate) fn new(timeout_ms: u32) -> Self {
        Self {
            timeout: Delta::from_millis(timeout_ms.into()),
            begin: None,
        }
    }

    /// Starts the clock, unless it runs already.
    pub(crate) fn start(&mut self) {
        self.begin.get_or_insert_with(Instant::now);
    }

    fn left(&self) -> Delta {
        match self.begin {
            Some(begin) => self.timeout - begin.elapsed(),
            None => self.timeout,
        }
    }

    /// Counts a retry of the fault in `mm` that uses `buf`, and checks whether the fault may go on.
    ///
    /// # Errors
    ///
    /// [`EINTR`] if a fatal signal is pending, [`ESRCH`] if the process has gone meanwhile, and
    /// [`EBUSY`] if the time limit has passed.
    pub(crate) fn retry(&self, mm: &MirroredMm<'_>, buf: &mut FaultBuf) -> Result {
        buf.retries += 1;
        if mm.is_abandoned() {
            return Err(ESRCH);
        }
        if kernel::current!().fatal_signal_pending() {
            return Err(EINTR);
        }
        if self.left().is_negative() {
            return Err(EBUSY);
        }
        Ok(())
    }

    /// The time left, as the timeout of `hmm_range_fault_unlocked_timeout()`. At least one jiffy,
    /// because zero means no timeout there.
    fn jiffies(&self) -> Jiffies {
        let ms = self.left().as_millis().max(0).try_into();
        msecs_to_jiffies(ms.unwrap_or(u32::MAX)).max(1)
    }
}

/// Clears `pfns` and returns the argument of `hmm_range_fault()` for `range` of `region`. Without
/// an `access`, nothing is to be faulted.
///
/// # Errors
///
/// [`EINVAL`] if `region` is not one of `mm`, or if `range` does not lie in it or has more pages
/// than `pfns` has elements.
fn hmm_range(
    mm: &MirroredMm<'_>,
    region: &Region,
    range: PageRange,
    access: Option<Access>,
    owner: *mut c_void,
    pfns: &mut [usize],
) -> Result<bindings::hmm_range> {
    if !region.is_of(mm.as_mm()) || region.range().intersect(&range) != Some(range) {
        return Err(EINVAL);
    }
    let pfns = pfns.get_mut(..range.pages()).ok_or(EINVAL)?;
    pfns.fill(0);
    Ok(bindings::hmm_range {
        notifier: region.notifier(),
        notifier_seq: 0,
        start: range.start(),
        end: range.end(),
        hmm_pfns: pfns.as_mut_ptr(),
        default_flags: request(access),
        pfn_flags_mask: 0,
        dev_private_owner: owner,
    })
}

/// Makes mm fault `range` for `access`, by `hmm_range_fault_unlocked_timeout()`. Fills `pfns`,
/// which has an element for each page, and returns the notifier sequence of the result.
///
/// Pages of the pool that has this `owner` are not faulted if they allow the access. Pages of other
/// devices are migrated to system memory.
///
/// # Context
///
/// Takes `mmap_lock` of `mm` for read.
///
/// # Errors
///
/// Those of `hmm_range_fault_unlocked_timeout()`, and [`EINVAL`] as for [`hmm_range`].
pub(crate) fn populate(
    mm: &MirroredMm<'_>,
    region: &Region,
    range: PageRange,
    access: Access,
    owner: *mut c_void,
    deadline: &mut Deadline,
    pfns: &mut [usize],
) -> Result<usize> {
    let mut range = hmm_range(mm, region, range, Some(access), owner, pfns)?;
    // SAFETY: `hmm_range()` has checked that `region` is one of `mm` and spans the range, and that
    // `hmm_pfns` has an element for each page. The type invariants of `Region` say that its
    // notifier is inserted. The mm has users.
    let result = to_result(unsafe {
        bindings::hmm_range_fault_unlocked_timeout(&mut range, deadline.jiffies())
    });
    deadline.start();
    result.map(|()| range.notifier_seq)
}

/// Reports what is mapped in `range` to the first elements of `pfns`, by `hmm_range_fault()`
/// without faulting. Returns the range that was walked, and the notifier sequence of the report.
///
/// With an access `at` an address, the VMA at this address must allow the access, and only the part
/// of the range in this VMA is walked. Otherwise the whole range is walked, and holes between VMAs
/// are reported as errors.
///
/// # Context
///
/// Takes `mmap_lock` of `mm` for read. Waits for running invalidations.
///
/// # Errors
///
/// - [`EFAULT`] if there is no VMA at the address, or if it may not be read. Without an address: if
///   there is no VMA in the range.
/// - [`EPERM`] if the access is a write and the memory may not be written.
/// - [`EBUSY`] if an invalidation collided.
/// - [`EINTR`] if a fatal signal ends the wait for `mmap_lock`.
/// - [`EINVAL`] as for [`hmm_range`].
pub(crate) fn report(
    mm: &MirroredMm<'_>,
    region: &Region,
    range: PageRange,
    at: Option<(usize, Access)>,
    owner: *mut c_void,
    pfns: &mut [usize],
) -> Result<(PageRange, usize)> {
    // Call this before taking mmap_lock: it waits for invalidations, which may hold mmap_lock.
    let seq = region.read_begin();
    let guard = mm.as_mm().mmap_read_lock_killable()?;
    let range = match at {
        Some((va, access)) => vma_for(&guard, mm, va, access)?
            .intersect(&range)
            .ok_or(EFAULT)?,
        None if next_vma(&guard, mm, range).is_none() => return Err(EFAULT),
        None => range,
    };
    let mut args = hmm_range(mm, region, range, None, owner, pfns)?;
    args.notifier_seq = seq;
    // SAFETY: `hmm_range()` has checked that `region` is one of `mm` and spans the range, and that
    // `hmm_pfns` has an element for each page. The type invariants of `Region` say that its
    // notifier is inserted. `guard` holds mmap_lock.
    to_result(unsafe { bindings::hmm_range_fault(&mut args) })?;

    // Limit the report to what the VMAs allow. The page tables may allow more: PTEs of a shadow
    // stack are writable, and the walk does not check protection keys.
    let mut rest = Some(range);
    while let Some(part) = rest {
        let Some((bounds, allowed)) = next_vma(&guard, mm, part) else {
            break;
        };
        if let Some(part) = bounds.intersect(&part) {
            let first = (part.start() - range.start()) / PAGE_SIZE;
            for raw in pfns.iter_mut().skip(first).take(part.pages()) {
                *raw = HmmPfn::from_output(*raw).limit(allowed).into_raw();
            }
        }
        rest = PageRange::new(bounds.end().max(part.start()), part.end()).ok();
    }
    Ok((range, seq))
}

/// Completes the report of one page. Marks a page of the pool that has this `owner` as a page of
/// the device, and the shared zero page and coherent memory of other devices as such. Returns an
/// error instead of a page that the kernel cannot reach through the direct map, or whose memory is
/// lost.
///
/// # Safety
///
/// `hmm_range_fault()` has reported `pfn`. The page cannot be freed, since the region's lock is
/// held and no invalidation has collided with the report.
pub(crate) unsafe fn identify(pfn: HmmPfn, owner: *mut c_void) -> HmmPfn {
    let Some(raw) = pfn.present() else {
        return pfn;
    };
    // SAFETY: The page was reported and cannot be freed (see the # Safety section).
    let page = unsafe { bindings::hmm_pfn_to_page(raw) };
    // SAFETY: The page was reported and cannot be freed (see the # Safety section).
    if unsafe { bindings::is_zone_device_page(page) } {
        // SAFETY: The page is in ZONE_DEVICE. It was reported as `pfn` and cannot be freed (see the
        // # Safety section).
        return unsafe { identify_device(pfn, page, owner) };
    }
    // SAFETY: The page was reported and cannot be freed (see the # Safety section). It is mapped,
    // so its mapping cannot go away either.
    let reachable = unsafe {
        let mapping = bindings::folio_mapping(bindings::page_folio(page));
        mapping.is_null() || !bindings::secretmem_mapping(mapping)
    };
    // SAFETY: is_zero_pfn() is safe to call for any number, and page_to_pfn() for a valid page.
    let is_zero = unsafe { bindings::is_zero_pfn(bindings::page_to_pfn(page)) };
    match reachable {
        true if is_zero => pfn.with_zero(),
        true => pfn,
        false => HmmPfn::ERROR,
    }
}

/// Completes the report of a page of a device, or of a file on a DAX filesystem.
///
/// # Safety
///
/// `page` is in ZONE_DEVICE, is that of `pfn`, and cannot be freed.
unsafe fn identify_device(pfn: HmmPfn, page: *mut bindings::page, owner: *mut c_void) -> HmmPfn {
    // SAFETY: The page is valid and cannot be freed (see the # Safety section).
    let (is_own, is_coherent, is_p2pdma) = unsafe {
        (
            Pool::owns(owner, page),
            bindings::is_device_coherent_page(page),
            bindings::is_pci_p2pdma_page(page),
        )
    };
    if is_own {
        return pfn.with_device();
    }
    // SAFETY: The page is valid and cannot be freed (see the # Safety section).
    if is_p2pdma || is_coherent && unsafe { Pool::is_lost_page(page) } {
        return HmmPfn::ERROR;
    }
    match is_coherent {
        true => pfn.with_remote(),
        false => pfn,
    }
}
