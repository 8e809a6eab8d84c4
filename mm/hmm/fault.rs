// SPDX-License-Identifier: GPL-2.0

//! Faults on behalf of the device: the collision-retry loop.
//!
//! An attempt first walks a window of pages with `hmm_range_fault()`, without faulting. If a page
//! that the device needs is missing, `hmm_range_fault_unlocked_timeout()` faults it, and the window
//! is walked again. The resulting report is valid only if no invalidation has collided with it.
//! This is checked under the region's lock, and the driver gets a [`Commit`] as the proof.
//!
//! The device gets what GUP would get for the current task, with `FOLL_REMOTE` if this is not a
//! task of the process, and no more.
//!
//! C header: [`include/linux/hmm.h`](srctree/include/linux/hmm.h)

use super::{
    callback::Callback,
    commit::Commit,
    dma::Dma,
    hmm_range::{
        identify,
        populate,
        report,
        Deadline,
        FaultBuf,
        DEFAULT_TIMEOUT_MS, //
    },
    mirrored_mm::MirroredMm,
    pfn::{
        Access,
        HmmPfn,
        State, //
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
    page::PAGE_SIZE,
    prelude::*, //
};

kernel::declare_trace! {
    /// # Safety
    ///
    /// Always safe to call.
    unsafe fn hmm_fault_busy(va: c_ulong, retries: c_uint);
}

/// A request to fault pages for the device, or to report them without a fault.
#[derive(Copy, Clone, Debug)]
pub struct FaultRequest {
    need: PageRange,
    access: Option<Access>,
    timeout_ms: u32,
}

impl FaultRequest {
    /// Requests `access` to the pages of `need`.
    ///
    /// One call of [`MirroredMm::fault`] serves one window: the aligned block of pages of the
    /// [`FaultBuf`]'s order that contains the start of `need`, clipped to the VMA and the region.
    /// The window may begin before `need`, and is smaller after collisions. [`Commit::needed`]
    /// returns the part of `need` in it, which was served.
    #[inline]
    pub fn new(need: PageRange, access: Access) -> Self {
        Self {
            need,
            access: Some(access),
            timeout_ms: DEFAULT_TIMEOUT_MS,
        }
    }

    /// Requests a report of `range`, without a fault.
    ///
    /// One call of [`MirroredMm::fault`] serves one window: the pages from the start of `range` to
    /// the end of the aligned block that the [`FaultBuf`] spans, clipped to the region. Addresses
    /// without a VMA are reported as [`Entry::Error`](super::Entry::Error).
    #[inline]
    pub fn snapshot(range: PageRange) -> Self {
        Self {
            need: range,
            access: None,
            timeout_ms: DEFAULT_TIMEOUT_MS,
        }
    }

    /// Sets the time limit for retries, in milliseconds, instead of `HMM_RANGE_DEFAULT_TIMEOUT`.
    ///
    /// The limit interrupts neither a fault handler, which may wait for a disk or a userfaultfd,
    /// nor the wait for a running invalidation. A fatal signal interrupts the fault handler.
    #[cfg(CONFIG_RUST_HMM_KUNIT_TEST)]
    pub(crate) fn timeout_ms(self, timeout_ms: u32) -> Self {
        Self { timeout_ms, ..self }
    }
}

/// The part of a request that one attempt serves.
///
/// # Invariants
///
/// `range` lies in `region` and in one leaf, has at most as many pages as the buffer, and contains
/// `needed`.
#[derive(Copy, Clone)]
struct Window<'r> {
    region: &'r Region,
    range: PageRange,
    needed: PageRange,
    /// The access to fault for, or `None` for a snapshot.
    access: Option<Access>,
}

impl<'r> Window<'r> {
    /// Clips the request to a window of `2^order` pages and to the region.
    fn new(region: &'r Region, req: &FaultRequest, order: u32) -> Result<Self> {
        let window = region.window(req.need.start(), order)?;
        let needed = window.intersect(&req.need).ok_or(EFAULT)?;
        // INVARIANT: `window` is an aligned block of at most a leaf's order, clipped to the region,
        // so it lies in one leaf. `needed` is the part of the request in it. `range` is one of the
        // two.
        Ok(Self {
            region,
            range: if req.access.is_some() { window } else { needed },
            needed,
            access: req.access,
        })
    }

    /// The part of the window that lies in `range`, which must contain a part of `needed`.
    fn clip(&self, range: PageRange) -> Result<Self> {
        // INVARIANT: Both are intersected with the same range. So they do not grow, and `range`
        // still contains `needed`.
        Ok(Self {
            range: self.range.intersect(&range).ok_or(EFAULT)?,
            needed: self.needed.intersect(&range).ok_or(EFAULT)?,
            ..*self
        })
    }

    /// Whether `pfn` allows the requested access. Anything will do for a snapshot.
    fn is_served(&self, pfn: HmmPfn) -> bool {
        self.access.is_none_or(|access| pfn.allows(access))
    }

    /// The window with only the first needed page. `None` if this is the window already, and for a
    /// snapshot, which needs no page in particular.
    fn first_page(&self) -> Option<Self> {
        self.access?;
        let page = PageRange::from_len(self.needed.start(), PAGE_SIZE).ok()?;
        (self.range != page).then(|| self.clip(page).ok())?
    }

    /// A smaller window to try after a collision: first without the pages that are not needed, then
    /// with the first needed page only.
    ///
    /// A smaller window takes less time, in which fewer invalidations collide.
    fn narrow(&self) -> Option<Self> {
        if self.range != self.needed {
            return self.clip(self.needed).ok();
        }
        self.first_page()
    }

    /// Reports the window, faults the missing pages, and calls `f` with the commit. Returns
    /// `false`, without calling `f`, if an invalidation has collided.
    fn attempt(
        &self,
        mm: &MirroredMm<'_>,
        owner: *mut c_void,
        deadline: &mut Deadline,
        buf: &mut FaultBuf,
        raced: &mut dyn FnMut(&mut [usize]),
        f: &mut dyn FnMut(&Commit<'_>),
    ) -> Result<bool> {
        buf.bring_leaf()?;
        let mut snapshot = Snapshot::take(mm, *self, owner, buf)?;
        if let (Some(access), Some(missing)) = (self.access, snapshot.missing()) {
            let Snapshot { window, buf, .. } = snapshot;
            let pfns = &mut buf.pfns;
            populate(mm, window.region, missing, access, owner, deadline, pfns)?;
            snapshot = Snapshot::take(mm, window, owner, buf)?;
        }
        deadline.start();
        raced(&mut snapshot.buf.pfns);
        snapshot.commit(f)
    }
}

/// A report of `hmm_range_fault()`, which may be stale.
///
/// # Invariants
///
/// The first elements of `buf.pfns` are what was reported, for `owner` and with the notifier
/// sequence `seq`, for the pages of the window's range.
struct Snapshot<'a> {
    window: Window<'a>,
    seq: usize,
    owner: *mut c_void,
    buf: &'a mut FaultBuf,
}

impl<'a> Snapshot<'a> {
    /// Reports the window. If pages are needed, clips the window to the VMA of the first of them.
    ///
    /// # Errors
    ///
    /// Those of [`report`].
    fn take(
        mm: &MirroredMm<'_>,
        window: Window<'a>,
        owner: *mut c_void,
        buf: &'a mut FaultBuf,
    ) -> Result<Self> {
        let at = window.access.map(|access| (window.needed.start(), access));
        let (range, seq) = report(mm, window.region, window.range, at, owner, &mut buf.pfns)?;
        // INVARIANT: `report()` has filled the array for `range` and returned the sequence.
        Ok(Self {
            window: window.clip(range)?,
            seq,
            owner,
            buf,
        })
    }

    /// The smallest range that contains all needed pages that are missing, if there are any.
    fn missing(&self) -> Option<PageRange> {
        let Window { range, needed, .. } = self.window;
        let mut missing = range.page_addrs().zip(&self.buf.pfns).filter(|(va, raw)| {
            needed.contains(*va) && !self.window.is_served(HmmPfn::from_output(**raw))
        });
        let (first, _) = missing.next()?;
        let last = missing.last().map_or(first, |(va, _)| va);
        PageRange::new(first, last + PAGE_SIZE).ok()
    }

    /// Installs the report as the region's entries and calls `f`. Returns `false`, without calling
    /// `f`, if the report is stale or a needed page is missing.
    ///
    /// # Errors
    ///
    /// [`EINTR`] if a fatal signal ends the wait for the lock; [`EFAULT`] if a device cannot have
    /// access to a needed page.
    fn commit(self, f: &mut dyn FnMut(&Commit<'_>)) -> Result<bool> {
        let Self {
            window,
            seq,
            owner,
            buf,
        } = self;
        let pfns = buf.pfns.get_mut(..window.range.pages()).ok_or(EINVAL)?;

        let mut preparation = window.region.prepare(window.range.start())?;
        let Some(mut entries) = window.region.lock_unless_stale(seq)? else {
            return Ok(false);
        };
        let (mut last, mut known) = (HmmPfn::NONE, HmmPfn::NONE);
        for (va, raw) in window.range.page_addrs().zip(pfns.iter_mut()) {
            let reported = HmmPfn::from_output(*raw);
            let pfn = match reported.is_next_of(last, va) {
                true => known.next(),
                // SAFETY: The type invariants say that `hmm_range_fault()` has reported the page.
                // The region's lock is held and `seq` is not stale, so the page cannot be freed.
                false => unsafe { identify(reported, owner) },
            };
            (last, known) = (reported, pfn);
            if window.needed.contains(va) && !window.is_served(pfn) {
                // A needed page may have been unmapped or write-protected after it was faulted: try
                // again. An error is permanent.
                return match pfn.state() {
                    State::Error => Err(EFAULT),
                    State::Hole | State::Present(_) => Ok(false),
                };
            }
            *raw = pfn.into_raw();
        }
        let pfns = &*pfns;
        // SAFETY: The type invariants say that the array is the report of this window of the
        // region. The region's lock is held for write, and lock_unless_stale() has checked that no
        // invalidation has collided. `identify()` has marked the pages of the device, and has
        // replaced the pages that are not in the direct map by errors.
        let installed = unsafe {
            preparation.install(
                &mut entries,
                window.range,
                pfns.iter().map(|&raw| HmmPfn::from_raw(raw)),
                &mut buf.spare,
            )
        }?;
        if !installed {
            return Ok(false);
        }
        let mut addresses = window.range.page_addrs().zip(&mut buf.addresses);
        addresses.by_ref().for_each(|(va, address)| {
            *address = entries.address(va).unwrap_or(0);
        });
        let end = window.range.pages().min(buf.addresses.len());
        let _callback = Callback::begin();
        f(&Commit::new(
            window.range,
            window.access.map(|_| window.needed),
            pfns,
            &buf.addresses[..end],
        ));
        Ok(true)
    }
}

impl MirroredMm<'_> {
    /// Faults pages for the device and calls `f` once with the [`Commit`]. Returns what `f`
    /// returns.
    ///
    /// The other pages of the window, around the requested ones, are reported as they are, without
    /// a fault. If the window as a whole cannot be faulted, only its first needed page is tried.
    /// For a [`FaultRequest::snapshot`], nothing is faulted.
    ///
    /// # Context
    ///
    /// Any task. It holds neither `mmap_lock` nor a VMA lock, no lock that is taken under one of
    /// them, and no lock that the driver's callbacks and closures take. Sleeps in the page fault
    /// handlers, for as long as user space likes if it handles a fault; a fatal signal ends the
    /// wait, but a kernel thread receives none. `f` runs with the region's lock held for write,
    /// and invalidations wait for this lock. `f` may sleep; apart from that the rules of
    /// [`MirrorOps::invalidate`](super::MirrorOps::invalidate) apply to it.
    ///
    /// # Errors
    ///
    /// - [`EPERM`] for a write to memory that the process may not write.
    /// - [`EFAULT`] if there is no memory that the process may read, or if it is that of
    ///   `memfd_secret()`; for a snapshot, if there is no VMA in the window.
    /// - [`EINTR`] if the task received a fatal signal.
    /// - [`ESRCH`] if the process has gone while invalidations collided.
    /// - [`EBUSY`] if invalidations kept colliding until the time limit for retries had passed.
    /// - [`EDEADLK`] if called from a callback or closure that this crate runs, or while page
    ///   faults are disabled for the task.
    /// - [`ENODEV`] if the mirror is for a device whose driver was unbound.
    /// - [`EIO`] if a page cannot be mapped for the device.
    /// - [`ENOMEM`] if there is no memory for the page or for the region.
    #[inline]
    pub fn fault<R>(
        &self,
        req: FaultRequest,
        buf: &mut FaultBuf,
        f: impl FnOnce(&Commit<'_>) -> R,
    ) -> Result<R> {
        let mut f = Some(f);
        let mut result = None;
        mirror_fault(self, &req, buf, &mut |commit| {
            result = f.take().map(|f| f(commit));
        })?;
        // `mirror_fault()` succeeds only after it has called the closure.
        result.ok_or(EIO)
    }

    /// The loop of [`MirroredMm::fault`]. `raced` runs between each report and its commit. The
    /// tests use it to make invalidations collide, or to change the report.
    pub(crate) fn fault_loop(
        &self,
        req: &FaultRequest,
        buf: &mut FaultBuf,
        f: &mut dyn FnMut(&Commit<'_>),
        mut raced: impl FnMut(&mut [usize]),
    ) -> Result {
        buf.retries = 0;
        let _charge = self.enter()?;
        let mirror = self.mirror();
        if let Some(dma) = mirror.dma() {
            // Do not wait for a page that the device cannot use.
            drop(Dma::stay_bound(dma)?);
        }
        buf.bring_addresses(mirror.dma().is_some())?;
        let start = req.need.start();
        let region = match mirror.region(start) {
            Some(region) => region,
            None => {
                // Do not create a region for an address where nothing is mapped.
                check_mapped(self, req, buf.order)?;
                mirror.region_or_insert(self.as_mm(), start)?
            }
        };
        let mut window = Window::new(&region, req, buf.order)?;
        let owner = Pool::owner(mirror.pool());

        let mut deadline = Deadline::new(req.timeout_ms);
        loop {
            match window.attempt(self, owner, &mut deadline, buf, &mut raced, f) {
                Ok(true) => return Ok(()),
                // Another page than the first may have failed.
                Err(err) if err == EFAULT || err == EPERM || err == EIO => {
                    window = window.first_page().ok_or(err)?;
                    continue;
                }
                // mm may have spent all of its time waiting for one long invalidation. `retry()`
                // decides whether to give up.
                Err(err) if err != EBUSY => return Err(err),
                _ => window = window.narrow().unwrap_or(window),
            }
            deadline.retry(self, buf)?;
        }
    }
}

/// Checks that there is a VMA for the request before a region is created.
///
/// # Errors
///
/// As for [`report`].
fn check_mapped(mm: &MirroredMm<'_>, req: &FaultRequest, order: u32) -> Result {
    let start = req.need.start();
    let guard = mm.as_mm().mmap_read_lock_killable()?;
    if let Some(access) = req.access {
        return vma_for(&guard, mm, start, access).map(drop);
    }
    let block = PageRange::aligned_block(start, order)?;
    let range = block.intersect(&req.need).ok_or(EFAULT)?;
    next_vma(&guard, mm, range).map(drop).ok_or(EFAULT)
}

#[inline(never)]
#[export_name = "rust_hmm_mm_fault"]
fn mirror_fault(
    mm: &MirroredMm<'_>,
    req: &FaultRequest,
    buf: &mut FaultBuf,
    f: &mut dyn FnMut(&Commit<'_>),
) -> Result {
    let result = mm.fault_loop(req, buf, f, |_| ());
    if result == Err(EBUSY) {
        // SAFETY: Always safe to call.
        unsafe { hmm_fault_busy(req.need.start(), buf.retries) };
    }
    result
}
