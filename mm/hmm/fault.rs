// SPDX-License-Identifier: GPL-2.0

//! Faults on behalf of the device: the collision-retry loop.
//!
//! One attempt looks at a window of pages with `hmm_range_fault()`, which faults nothing. If a page
//! that the device needs is missing, `hmm_range_fault_unlocked_timeout()` faults it, and the window
//! is looked at again. A report is valid only while no invalidation has collided with it: a
//! [`Commit`] is the proof, under the region's lock.
//!
//! Each look checks the VMAs as `check_vma_flags()` in `mm/gup.c` does, under the `mmap_lock` that
//! it holds for the report. The device gets what GUP would get for the current task, and no more.
//!
//! C header: [`include/linux/hmm.h`](srctree/include/linux/hmm.h)

use super::{
    entries::{
        Leaf,
        LEAF_ORDER, //
    },
    mirror::{
        Mirror,
        Region, //
    },
    pfn::{
        request,
        Access,
        Pfn,
        State, //
    },
    pool::Pool,
    range::PageRange,
};
use core::marker::PhantomData;
use kernel::{
    bindings,
    error::to_result,
    mm::{
        virt::{
            flags,
            VmaRef, //
        },
        MmWithUser,
        MmapReadGuard, //
    },
    page::PAGE_SIZE,
    prelude::*,
    time::{
        msecs_to_jiffies,
        Delta,
        Instant,
        Jiffies,
        Monotonic, //
    },
};

kernel::declare_trace! {
    /// # Safety
    ///
    /// Always safe to call.
    unsafe fn hmm_fault_busy(va: c_ulong, retries: c_uint);
}

/// A request to fault pages for the device, or to look at them.
#[derive(Copy, Clone, Debug)]
pub struct FaultRequest {
    need: PageRange,
    access: Option<Access>,
    timeout_ms: u32,
}

/// The time for retries where a driver does not say, in milliseconds.
pub(crate) const DEFAULT_TIMEOUT_MS: u32 = bindings::HMM_RANGE_DEFAULT_TIMEOUT;

impl FaultRequest {
    /// Asks for `access` to the pages of `need`.
    ///
    /// One call serves one window: the pages of `need` from its start to the end of the aligned
    /// block that a [`FaultBuf`] spans, and no further than the VMA and the region go.
    /// [`Commit::needed`] tells what was served.
    #[inline]
    pub fn new(need: PageRange, access: Access) -> Self {
        Self {
            need,
            access: Some(access),
            timeout_ms: DEFAULT_TIMEOUT_MS,
        }
    }

    /// Asks for what is there of `range`, without a fault.
    ///
    /// One call serves one window: the pages of `range` from its start to the end of the aligned
    /// block that a [`FaultBuf`] spans, and no further than the region goes. Holes between VMAs are
    /// reported as [`Entry::Error`].
    #[inline]
    pub fn snapshot(range: PageRange) -> Self {
        Self {
            need: range,
            access: None,
            timeout_ms: DEFAULT_TIMEOUT_MS,
        }
    }

    /// Bounds the time for retries, in milliseconds, instead of `HMM_RANGE_DEFAULT_TIMEOUT`.
    ///
    /// Neither a fault handler (it may wait for a disk, or for a userfaultfd) nor an invalidation
    /// that runs is cut short by it. A fatal signal ends the former.
    #[cfg(CONFIG_RUST_HMM_KUNIT_TEST)]
    pub(crate) fn timeout_ms(self, timeout_ms: u32) -> Self {
        Self { timeout_ms, ..self }
    }
}

/// The array that `hmm_range_fault()` reads its input from and writes its output to.
///
/// It belongs to the core: what one attempt left in it is never the input of the next.
pub struct FaultBuf {
    order: u32,
    pub(crate) pfns: KVec<usize>,
    /// The leaf to install entries in, should the region have none yet.
    pub(crate) spare: Option<KBox<Leaf>>,
    pub(crate) retries: u32,
}

impl FaultBuf {
    /// The largest window, as an order of pages: 2 MiB where pages have 4 KiB.
    pub const MAX_ORDER: u32 = LEAF_ORDER;

    /// Makes a buffer for windows of up to `2^order` pages, naturally aligned.
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
            retries: 0,
        })
    }

    /// Brings along what is needed to install entries.
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

    /// How often the last fault threw away what it had and started again, since an invalidation
    /// had collided with it.
    #[inline]
    pub fn retries(&self) -> u32 {
        self.retries
    }
}

/// The time for retries of one fault.
///
/// It begins to run after the first report: what the fault handlers took for that does not count.
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

    /// The time begins to run, if it has not yet.
    fn start(&mut self) {
        self.begin.get_or_insert_with(Instant::now);
    }

    fn left(&self) -> Delta {
        match self.begin {
            Some(begin) => self.timeout - begin.elapsed(),
            None => self.timeout,
        }
    }

    /// Counts one more collision of `buf`'s fault, which is to start again then.
    ///
    /// # Errors
    ///
    /// [`EINTR`] on a fatal signal, [`EBUSY`] if the time is over.
    pub(crate) fn retry(&self, buf: &mut FaultBuf) -> Result {
        buf.retries += 1;
        if kernel::current!().fatal_signal_pending() {
            return Err(EINTR);
        }
        if self.left().is_negative() {
            return Err(EBUSY);
        }
        Ok(())
    }

    /// What is left, for the next report: one jiffy at least, since none is no bound there.
    fn jiffies(&self) -> Jiffies {
        let ms = self.left().as_millis().max(0).try_into();
        msecs_to_jiffies(ms.unwrap_or(u32::MAX)).max(1)
    }
}

/// The arguments of `hmm_range_fault()` for `range` of `region`.
///
/// # Errors
///
/// [`EINVAL`] if `region` is not one of `mm`, or if `range` does not lie in it or has more pages
/// than `pfns` has elements.
fn hmm_range(
    mm: &MmWithUser,
    region: &Region,
    range: PageRange,
    access: Option<Access>,
    owner: *mut c_void,
    pfns: &mut [usize],
) -> Result<bindings::hmm_range> {
    if !region.is_of(mm) || region.range().intersect(&range) != Some(range) {
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

/// Makes mm fault `range` for `access`. Returns the sequence with which `pfns`, one element a page,
/// was filled.
///
/// Pages of the pool that has this `owner` are not faulted if they allow the access; those of other
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
    mm: &MmWithUser,
    region: &Region,
    range: PageRange,
    access: Access,
    owner: *mut c_void,
    deadline: &mut Deadline,
    pfns: &mut [usize],
) -> Result<usize> {
    let mut range = hmm_range(mm, region, range, Some(access), owner, pfns)?;
    // SAFETY: `hmm_range()` has checked that the region, whose notifier is inserted by its type
    // invariants, is one of `mm` and spans the range, and that `hmm_pfns` has an element for each
    // page. The mm has users.
    let result = to_result(unsafe {
        bindings::hmm_range_fault_unlocked_timeout(&mut range, deadline.jiffies())
    });
    deadline.start();
    result.map(|()| range.notifier_seq)
}

/// Reports what is mapped in `range`, without a fault, to the first elements of `pfns`. Returns the
/// range that was looked at, and the sequence of the report.
///
/// If an access `at` an address is given, the VMA there has to allow it, and what is looked at is
/// the part of the range that lies in this VMA. Else the range may have holes between VMAs, which
/// are reported as errors.
///
/// # Context
///
/// Takes `mmap_lock` of `mm` for read; waits for invalidations that run.
///
/// # Errors
///
/// - [`EFAULT`] if nothing is mapped at the address (or else in all of the range), or if it may not
///   be read.
/// - [`EPERM`] if the access is a write and the memory may not be written.
/// - [`EBUSY`] if an invalidation collided, [`EINTR`], and [`EINVAL`] as for [`hmm_range`].
pub(crate) fn report(
    mm: &MmWithUser,
    region: &Region,
    range: PageRange,
    at: Option<(usize, Access)>,
    owner: *mut c_void,
    pfns: &mut [usize],
) -> Result<(PageRange, usize)> {
    // Before mmap_lock is taken: an invalidation that runs may hold it.
    let seq = region.read_begin();
    let guard = mm.mmap_read_lock_killable()?;
    let range = match at {
        Some((va, access)) => vma_for(&guard, va, access)?
            .intersect(&range)
            .ok_or(EFAULT)?,
        None if next_vma(&guard, mm, range).is_none() => return Err(EFAULT),
        None => range,
    };
    let mut args = hmm_range(mm, region, range, None, owner, pfns)?;
    args.notifier_seq = seq;
    // SAFETY: As in `populate()`; `guard` holds mmap_lock.
    to_result(unsafe { bindings::hmm_range_fault(&mut args) })?;

    // The page tables may allow more than the VMA does: a PTE of a shadow stack is writable, and
    // protection keys are no part of it.
    let mut rest = Some(range);
    while let Some(part) = rest {
        let Some((bounds, allowed)) = next_vma(&guard, mm, part) else {
            break;
        };
        if let Some(part) = bounds.intersect(&part) {
            let first = (part.start() - range.start()) / PAGE_SIZE;
            for raw in pfns.iter_mut().skip(first).take(part.pages()) {
                *raw = Pfn::from_output(*raw).limit(allowed).into_raw();
            }
        }
        rest = PageRange::new(bounds.end().max(part.start()), part.end()).ok();
    }
    Ok((range, seq))
}

/// Proof that what was reported of a window still holds.
///
/// It exists only while the region's lock is held for write and no invalidation has collided. The
/// entries are in the core's store already; what remains is the driver's own translations.
///
/// A page may have become exclusive to this device since, by
/// [`make_exclusive`](Mirror::make_exclusive): that is not what a commit takes back.
pub struct Commit<'c> {
    window: PageRange,
    needed: Option<PageRange>,
    pfns: &'c [usize],
}

/// What the device may see at a page.
#[derive(Debug)]
#[non_exhaustive]
pub enum Entry<'c> {
    /// Nothing that is mapped. A fault may bring it or fail: poison, guard pages and memory of
    /// other devices look the same.
    Hole,
    /// Nothing, and a fault would fail: no VMA, no read permission, or no memory that the kernel
    /// can reach.
    Error,
    /// A page of RAM.
    Ram(Ram<'c>),
    /// A page in the memory of the device.
    Device(Device<'c>),
}

/// A page of RAM, by what the device may do with it.
#[derive(Debug)]
pub enum Ram<'c> {
    /// Read it.
    Read(ReadPage<'c>),
    /// Read and write it.
    Write(WritePage<'c>),
}

/// A page in the memory of the device, by what the device may do with it.
#[derive(Debug)]
pub enum Device<'c> {
    /// Read it.
    Read(ReadPage<'c>),
    /// Read and write it.
    Write(WritePage<'c>),
}

/// Proof that the page at [`ReadPage::va`] may be mapped read-only for the device.
#[derive(Debug)]
pub struct ReadPage<'c> {
    va: usize,
    order: u32,
    is_zero: bool,
    _commit: PhantomData<&'c ()>,
}

/// Proof that the page at [`WritePage::va`] may be mapped for the device to write.
#[derive(Debug)]
pub struct WritePage<'c> {
    va: usize,
    order: u32,
    _commit: PhantomData<&'c ()>,
}

impl ReadPage<'_> {
    /// The address of the page.
    #[inline]
    pub fn va(&self) -> usize {
        self.va
    }

    /// The order of the naturally aligned block around the page that the CPU maps as one, as far as
    /// the window goes: all of it is there, in one piece, with the same access.
    #[inline]
    pub fn order(&self) -> u32 {
        self.order
    }

    /// Whether it is the page of zeroes that all share: nothing was ever written there.
    #[inline]
    pub fn is_zero(&self) -> bool {
        self.is_zero
    }
}

impl WritePage<'_> {
    /// The address of the page.
    #[inline]
    pub fn va(&self) -> usize {
        self.va
    }

    /// As [`ReadPage::order`].
    #[inline]
    pub fn order(&self) -> u32 {
        self.order
    }
}

impl<'c> Commit<'c> {
    /// The window.
    #[inline]
    pub fn range(&self) -> PageRange {
        self.window
    }

    /// The pages that were asked for and are there now, with the access that was asked for; `None`
    /// in a snapshot.
    #[inline]
    pub fn needed(&self) -> Option<PageRange> {
        self.needed
    }

    /// The entry of each page of the window, with the page's address.
    #[inline]
    pub fn entries(&self) -> impl Iterator<Item = (usize, Entry<'_>)> {
        self.window
            .page_addrs()
            .zip(self.pfns)
            .map(|(va, &raw)| (va, Entry::new(self.window, va, Pfn::from_raw(raw))))
    }
}

impl Entry<'_> {
    #[inline]
    fn new(window: PageRange, va: usize, pfn: Pfn) -> Self {
        let _commit = PhantomData;
        let order = clamp_order(window, va, pfn.order());
        let read = ReadPage {
            va,
            order,
            is_zero: pfn.is_zero(),
            _commit,
        };
        let write = WritePage { va, order, _commit };
        match (pfn.state(), pfn.is_device()) {
            (State::Hole, _) => Self::Hole,
            (State::Error, _) => Self::Error,
            (State::Present(Access::Read), false) => Self::Ram(Ram::Read(read)),
            (State::Present(Access::Write), false) => Self::Ram(Ram::Write(write)),
            (State::Present(Access::Read), true) => Self::Device(Device::Read(read)),
            (State::Present(Access::Write), true) => Self::Device(Device::Write(write)),
        }
    }
}

/// The order of the largest aligned block around `va` that has no page outside of `window`, where
/// what was reported may be stale; `order` at most.
#[inline]
pub(crate) fn clamp_order(window: PageRange, va: usize, order: u32) -> u32 {
    let is_inside = |order: &u32| {
        PageRange::aligned_block(va, *order)
            .is_ok_and(|block| window.intersect(&block) == Some(block))
    };
    (0..=order).rev().find(is_inside).unwrap_or(0)
}

/// How a device may access the memory of `vma` for the current task, if at all.
///
/// Mirrors `check_vma_flags()` in `mm/gup.c`, for a GUP of the task's own memory without flags but
/// `FOLL_WRITE`: Documentation/mm/hmm-rust.rst compares the two line by line.
fn allowed_access(vma: &VmaRef) -> Option<Access> {
    // SAFETY: The VMA is valid, since there is a reference to it.
    let is_secret = unsafe { bindings::vma_is_secretmem(vma.as_ptr()) };
    // SAFETY: The VMA is valid, since there is a reference to it. The access is no instruction
    // fetch, and is made for the current task.
    let permits =
        |write| unsafe { bindings::arch_vma_access_permitted(vma.as_ptr(), write, false, false) };
    let has = |flag| vma.flags() & flag != 0;

    if has(flags::IO | flags::PFNMAP) || is_secret || !has(flags::READ) || !permits(false) {
        return None;
    }
    match has(flags::WRITE) && !has(bindings::VM_SHADOW_STACK) && permits(true) {
        true => Some(Access::Write),
        false => Some(Access::Read),
    }
}

/// The bounds of the VMA at `va`, which allows `access`.
///
/// # Errors
///
/// [`EFAULT`] if there is none, or if it may not be read; [`EPERM`] if it may not be written.
pub(crate) fn vma_for(guard: &MmapReadGuard<'_>, va: usize, access: Access) -> Result<PageRange> {
    let vma = guard.vma_lookup(va).ok_or(EFAULT)?;
    match (allowed_access(vma).ok_or(EFAULT)?, access) {
        (Access::Read, Access::Write) => Err(EPERM),
        _ => PageRange::new(vma.start(), vma.end()),
    }
}

/// As [`vma_for`], for a caller that does not hold `mmap_lock`. [`EINTR`] on a fatal signal.
#[cfg(CONFIG_RUST_HMM_DEVICE)]
pub(crate) fn vma_at(mm: &MmWithUser, va: usize, access: Access) -> Result<PageRange> {
    vma_for(&mm.mmap_read_lock_killable()?, va, access)
}

/// The first VMA that has a part of `range`, if any: its bounds, and how a device may access it.
fn next_vma(
    _guard: &MmapReadGuard<'_>,
    mm: &MmWithUser,
    range: PageRange,
) -> Option<(PageRange, Option<Access>)> {
    // SAFETY: The mm is valid, and the guard holds mmap_lock.
    let vma = unsafe { bindings::find_vma(mm.as_raw(), range.start()) };
    if vma.is_null() {
        return None;
    }
    // SAFETY: `find_vma()` has returned a VMA, which is valid while mmap_lock is held.
    let vma = unsafe { VmaRef::from_raw(vma) };
    let bounds = PageRange::new(vma.start(), vma.end()).ok()?;
    bounds.intersect(&range)?;
    Some((bounds, allowed_access(vma)))
}

/// The part of a request that one attempt is for.
///
/// # Invariants
///
/// `range` lies in `region` and in one leaf, has no more pages than the buffer, and contains
/// `needed`.
#[derive(Copy, Clone)]
struct Window<'r> {
    region: &'r Region,
    range: PageRange,
    needed: PageRange,
    /// `None` if nothing is to be faulted.
    access: Option<Access>,
}

impl<'r> Window<'r> {
    /// Clips the request to a window of `2^order` pages and to the region.
    fn new(region: &'r Region, req: &FaultRequest, order: u32) -> Result<Self> {
        let window = region.window(req.need.start(), order)?;
        let needed = window.intersect(&req.need).ok_or(EFAULT)?;
        // INVARIANT: An aligned block of at most a leaf's order lies in one leaf, and contains the
        // start of what is needed.
        Ok(Self {
            region,
            range: if req.access.is_some() { window } else { needed },
            needed,
            access: req.access,
        })
    }

    /// The part of the window that lies in `range`, in which the needed pages start.
    fn clip(&self, range: PageRange) -> Result<Self> {
        // INVARIANT: An intersection is smaller than the window.
        Ok(Self {
            range: self.range.intersect(&range).ok_or(EFAULT)?,
            needed: self.needed.intersect(&range).ok_or(EFAULT)?,
            ..*self
        })
    }

    /// Whether `pfn` is what is needed.
    fn is_served(&self, pfn: Pfn) -> bool {
        self.access.is_none_or(|access| pfn.allows(access))
    }

    /// The window of the first needed page only. `None` if it is that already, and for a snapshot,
    /// of which no page is needed more than the others.
    fn first_page(&self) -> Option<Self> {
        self.access?;
        let page = PageRange::from_len(self.needed.start(), PAGE_SIZE).ok()?;
        (self.range != page).then(|| self.clip(page).ok())?
    }

    /// A smaller window to try after a collision: the needed pages, then only the first of them.
    ///
    /// The less is looked at, the shorter is the time in which another invalidation can collide.
    fn narrow(&self) -> Option<Self> {
        if self.range != self.needed {
            return self.clip(self.needed).ok();
        }
        self.first_page()
    }

    /// Looks at the window, faults what is missing, and calls `f` with the proof, unless an
    /// invalidation has collided. Returns whether it has called `f`.
    fn attempt(
        &self,
        mm: &MmWithUser,
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

/// A report of `hmm_range_fault()` that may be stale by now.
///
/// # Invariants
///
/// The first elements of `buf.pfns` are what was reported for each page of the window's range, with
/// `seq` and for `owner`.
struct Snapshot<'a> {
    window: Window<'a>,
    seq: usize,
    owner: *mut c_void,
    buf: &'a mut FaultBuf,
}

impl<'a> Snapshot<'a> {
    /// Looks at the window, as far as its VMA goes if a page of it is needed.
    ///
    /// # Errors
    ///
    /// Those of [`report`].
    fn take(
        mm: &MmWithUser,
        window: Window<'a>,
        owner: *mut c_void,
        buf: &'a mut FaultBuf,
    ) -> Result<Self> {
        let at = window.access.map(|access| (window.needed.start(), access));
        let (range, seq) = report(mm, window.region, window.range, at, owner, &mut buf.pfns)?;
        // INVARIANT: Reported just now.
        Ok(Self {
            window: window.clip(range)?,
            seq,
            owner,
            buf,
        })
    }

    /// The smallest range with all pages that are needed and not there, if any.
    fn missing(&self) -> Option<PageRange> {
        let Window { range, needed, .. } = self.window;
        let mut missing = range.page_addrs().zip(&self.buf.pfns).filter(|(va, raw)| {
            needed.contains(*va) && !self.window.is_served(Pfn::from_output(**raw))
        });
        let (first, _) = missing.next()?;
        let last = missing.last().map_or(first, |(va, _)| va);
        PageRange::new(first, last + PAGE_SIZE).ok()
    }

    /// Makes the report the region's entries and calls `f`, unless it is stale.
    ///
    /// # Errors
    ///
    /// [`EINTR`] if a fatal signal ends the wait for the lock; [`EFAULT`] if a page that is needed
    /// is none that a device can be given.
    fn commit(self, f: &mut dyn FnMut(&Commit<'_>)) -> Result<bool> {
        let Self {
            window,
            seq,
            owner,
            buf,
        } = self;
        let pfns = buf.pfns.get_mut(..window.range.pages()).ok_or(EINVAL)?;

        let Some(mut entries) = window.region.lock_unless_stale(seq)? else {
            return Ok(false);
        };
        for (va, raw) in window.range.page_addrs().zip(pfns.iter_mut()) {
            // SAFETY: It was reported, by the type invariants, and is not stale under the lock.
            let pfn = unsafe { identify(Pfn::from_output(*raw), owner) };
            if window.needed.contains(va) && !window.is_served(pfn) {
                // A hole may have come since the fault, and another fault fills it. An error stays.
                return match pfn.state() {
                    State::Error => Err(EFAULT),
                    State::Hole | State::Present(_) => Ok(false),
                };
            }
            *raw = pfn.into_raw();
        }
        let pfns = &*pfns;
        // SAFETY: The array was reported for this window of the region, by the type invariants; the
        // region's lock is held for write, and nothing has collided. `identify()` has marked the
        // device's pages and left out those that are not in the direct map.
        unsafe {
            entries.install(
                window.range,
                pfns.iter().map(|&raw| Pfn::from_raw(raw)),
                &mut buf.spare,
            )
        }?;
        f(&Commit {
            window: window.range,
            needed: window.access.map(|_| window.needed),
            pfns,
        });
        Ok(true)
    }
}

/// Marks the page as the device's if it is one of the pool of `owner`, and the page of zeroes as
/// such; if it is none that the kernel can reach by the direct map, makes it an error.
///
/// # Safety
///
/// `hmm_range_fault()` has reported `pfn`, and the page cannot go: the region's lock is held and no
/// invalidation has collided.
unsafe fn identify(pfn: Pfn, owner: *mut c_void) -> Pfn {
    let Some(raw) = pfn.present() else {
        return pfn;
    };
    // SAFETY: The page is there, by the caller's promise.
    let page = unsafe { bindings::hmm_pfn_to_page(raw) };
    // SAFETY: As above.
    if unsafe { Pool::owns(owner, page) } {
        return pfn.with_device();
    }
    // SAFETY: As above. It is mapped, so it stays in the mapping that it is in.
    let reachable = unsafe {
        let mapping = bindings::folio_mapping(bindings::page_folio(page));
        !bindings::is_pci_p2pdma_page(page)
            && (mapping.is_null() || !bindings::secretmem_mapping(mapping))
    };
    // SAFETY: Safe to call for any number.
    let is_zero = unsafe { bindings::is_zero_pfn(bindings::page_to_pfn(page)) };
    match reachable {
        true if is_zero => pfn.with_zero(),
        true => pfn,
        false => Pfn::ERROR,
    }
}

impl Mirror {
    /// Faults pages for the device and calls `f` with the proof, once; returns what it returns.
    ///
    /// The pages around those of the request that lie in the same window are reported as they are,
    /// without a fault. If the window cannot be had, its first needed page alone is tried. Of a
    /// [`FaultRequest::snapshot`] nothing is faulted.
    ///
    /// # Context
    ///
    /// A task of the mirrored process, which holds no lock. Waits for what the fault handlers wait
    /// for, killably. `f` runs with the region's lock held for write, for which invalidations wait:
    /// what [`MirrorOps::invalidate`](super::MirrorOps::invalidate) may not do, it may not either,
    /// but sleep.
    ///
    /// # Errors
    ///
    /// - [`EPERM`] if the current task's address space is another, or for a write to memory that
    ///   the process may not write.
    /// - [`EFAULT`] if there is no memory that the process may read, or if it is that of
    ///   `memfd_secret()`; in a snapshot, if nothing at all is mapped in the window.
    /// - [`EINTR`] if the task received a fatal signal.
    /// - [`EBUSY`] if invalidations kept colliding until the time for retries was over.
    /// - [`ENOMEM`] if memory for the page, or for the region, is not to be had.
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
        // `mirror_fault` succeeds only after it has called the closure.
        result.ok_or(EIO)
    }

    /// The loop of [`Mirror::fault`]. `raced` runs between a report and its commit: the tests let
    /// invalidations collide there, or change the report.
    pub(crate) fn fault_loop(
        &self,
        req: &FaultRequest,
        buf: &mut FaultBuf,
        f: &mut dyn FnMut(&Commit<'_>),
        mut raced: impl FnMut(&mut [usize]),
    ) -> Result {
        buf.retries = 0;
        let current = kernel::current!();
        let mm = self.current_mm(current.mm())?;
        let start = req.need.start();
        let region = match self.region(start) {
            Some(region) => region,
            None => {
                // An address where nothing is mapped leaves no region behind.
                check_mapped(mm, req, buf.order)?;
                self.region_or_insert(mm, start)?
            }
        };
        let mut window = Window::new(&region, req, buf.order)?;
        let owner = Pool::owner(self.pool());

        let mut deadline = Deadline::new(req.timeout_ms);
        loop {
            match window.attempt(mm, owner, &mut deadline, buf, &mut raced, f) {
                Ok(true) => return Ok(()),
                // The page that failed may be another than the first.
                Err(err) if err == EFAULT || err == EPERM => {
                    window = window.first_page().ok_or(err)?;
                    continue;
                }
                // One long invalidation may have taken all of the time: `retry()` decides.
                Err(err) if err != EBUSY => return Err(err),
                _ => window = window.narrow().unwrap_or(window),
            }
            deadline.retry(buf)?;
        }
    }
}

/// Whether the request is for an address where something is mapped.
///
/// # Errors
///
/// As for [`report`].
fn check_mapped(mm: &MmWithUser, req: &FaultRequest, order: u32) -> Result {
    let start = req.need.start();
    let guard = mm.mmap_read_lock_killable()?;
    if let Some(access) = req.access {
        return vma_for(&guard, start, access).map(drop);
    }
    let block = PageRange::aligned_block(start, order)?;
    let range = block.intersect(&req.need).ok_or(EFAULT)?;
    next_vma(&guard, mm, range).map(drop).ok_or(EFAULT)
}

#[inline(never)]
#[export_name = "hmm_mirror_fault"]
fn mirror_fault(
    mirror: &Mirror,
    req: &FaultRequest,
    buf: &mut FaultBuf,
    f: &mut dyn FnMut(&Commit<'_>),
) -> Result {
    let result = mirror.fault_loop(req, buf, f, |_| ());
    if result == Err(EBUSY) {
        // SAFETY: Always safe to call.
        unsafe { hmm_fault_busy(req.need.start(), buf.retries) };
    }
    result
}
