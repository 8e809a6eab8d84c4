// SPDX-License-Identifier: GPL-2.0

//! Faults on behalf of the device: the collision-retry loop.
//!
//! `hmm_range_fault()` reports what the process's page tables say of a window of pages, and makes
//! mm fault those that the device needs. Its report is worth something only while no invalidation
//! has collided with it: a [`Commit`] is the proof, under the region's lock.
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
use core::{
    marker::PhantomData,
    ptr::null_mut, //
};
use kernel::{
    bindings,
    error::to_result,
    mm::{
        virt::{
            flags,
            VmaRef, //
        },
        MmWithUser, //
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

/// Fills `pfns`, one element a page, with what is known of `range`, after a fault for `access` to
/// all of it, if any. Returns the sequence.
///
/// `owner` is that of the pool whose pages are reported; those of other devices come home when they
/// are faulted.
///
/// # Context
///
/// Takes `mmap_lock` of `mm` for read.
///
/// # Errors
///
/// Those of `hmm_range_fault_unlocked_timeout()`; [`EINVAL`] if `region` is not one of `mm`, or if
/// `range` does not lie in it or has more pages than `pfns` has elements.
pub(crate) fn range_fault(
    mm: &MmWithUser,
    region: &Region,
    range: PageRange,
    access: Option<Access>,
    owner: *mut c_void,
    deadline: &mut Deadline,
    pfns: &mut [usize],
) -> Result<usize> {
    if !region.is_of(mm) || region.range().intersect(&range) != Some(range) {
        return Err(EINVAL);
    }
    let pfns = pfns.get_mut(..range.pages()).ok_or(EINVAL)?;
    pfns.fill(0);
    // The C loop starts again with its own output as the input, where HMM_PFN_VALID and
    // HMM_PFN_WRITE would ask for a fault: the mask makes it look at the default flags only.
    let mut range = bindings::hmm_range {
        notifier: region.notifier(),
        notifier_seq: 0,
        start: range.start(),
        end: range.end(),
        hmm_pfns: pfns.as_mut_ptr(),
        default_flags: request(access),
        pfn_flags_mask: 0,
        dev_private_owner: owner,
    };
    // SAFETY: The notifier is inserted, by the type invariants of `Region`; as checked above it
    // spans the range, `hmm_pfns` has an element for each page, and its mm is `mm`, which has
    // users.
    let result = to_result(unsafe {
        bindings::hmm_range_fault_unlocked_timeout(&mut range, deadline.jiffies())
    });
    deadline.begin.get_or_insert_with(Instant::now);
    result.map(|()| range.notifier_seq)
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

/// The VMA at `va`.
///
/// # Errors
///
/// [`EFAULT`] if there is none, or if it is one that GUP refuses too: memory of devices, or that is
/// secret even to the kernel, and shadow stacks, to which no store of the process goes; [`EINTR`].
pub(crate) fn vma_at(mm: &MmWithUser, va: usize) -> Result<PageRange> {
    let guard = mm.mmap_read_lock_killable()?;
    let vma = guard.vma_lookup(va).ok_or(EFAULT)?;
    // SAFETY: The VMA is valid.
    let is_secret = unsafe { bindings::vma_is_secretmem(vma.as_ptr()) };
    let special = flags::IO | flags::PFNMAP | bindings::VM_SHADOW_STACK;
    if is_secret || vma.flags() & special != 0 {
        return Err(EFAULT);
    }
    PageRange::new(vma.start(), vma.end())
}

/// Whether any VMA has a part of `range`.
///
/// # Errors
///
/// [`EINTR`].
fn is_mapped(mm: &MmWithUser, range: PageRange) -> Result<bool> {
    let _guard = mm.mmap_read_lock_killable()?;
    // SAFETY: The mm is valid, and mmap_lock is held.
    let vma = unsafe { bindings::find_vma(mm.as_raw(), range.start()) };
    // SAFETY: As above: a VMA that is found is valid.
    Ok(!vma.is_null() && unsafe { VmaRef::from_raw(vma) }.start() < range.end())
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
    /// Clips the request to a window of `2^order` pages, the region and `bounds`: those of the VMA
    /// if pages are to be faulted.
    ///
    /// The VMA may change before the fault; then the fault finds out. It is looked at so that a
    /// hole after the VMA does not make what is needed fail each time.
    fn new(region: &'r Region, bounds: PageRange, req: &FaultRequest, order: u32) -> Result<Self> {
        // INVARIANT: An aligned block of at most a leaf's order lies in one leaf; the intersections
        // only shrink it. All contain the start of what is needed.
        let range = region
            .window(req.need.start(), order)?
            .intersect(&bounds)
            .ok_or(EFAULT)?;
        Ok(Self {
            region,
            range,
            needed: range.intersect(&req.need).ok_or(EFAULT)?,
            access: req.access,
        })
    }

    /// Whether `pfn` is what is needed.
    fn is_served(&self, pfn: Pfn) -> bool {
        self.access.is_none_or(|access| pfn.allows(access))
    }

    /// The same, for the first page that is needed only. `None` if it is that already.
    fn narrow(&self) -> Option<Self> {
        let page = PageRange::from_len(self.needed.start(), PAGE_SIZE).ok()?;
        // INVARIANT: The page is one of the window's.
        (self.range != page).then_some(Self {
            range: page,
            needed: page,
            ..*self
        })
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
    /// Faults what is needed, if anything, and reports the window.
    ///
    /// # Errors
    ///
    /// Those of [`range_fault`], and [`ENOMEM`].
    fn take(
        mm: &MmWithUser,
        window: Window<'a>,
        owner: *mut c_void,
        deadline: &mut Deadline,
        buf: &'a mut FaultBuf,
    ) -> Result<Self> {
        buf.bring_leaf()?;

        // What is needed comes first and alone: asked for one page of a range that has no page
        // table yet, mm faults the range. The rest of the window is then only looked at.
        let mut look = |range, access, owner, pfns: &mut [usize]| {
            range_fault(mm, window.region, range, access, owner, deadline, pfns)
        };
        let mut seq = look(window.needed, window.access, owner, &mut buf.pfns)?;
        let mut stale = window.range != window.needed;

        // A page of the device that it may only read, after a fork, is reported as it is, whatever
        // was asked for. To write, a copy is needed, and that is the CPU's to make: such a page is
        // faulted as one that nobody knows, which brings it home.
        for (va, raw) in window.needed.page_addrs().zip(&mut buf.pfns) {
            if !window.is_served(Pfn::from_output(*raw)) {
                let page = PageRange::from_len(va, PAGE_SIZE)?;
                look(page, window.access, null_mut(), core::slice::from_mut(raw))?;
                stale = true;
            }
        }
        if stale {
            seq = look(window.range, None, owner, &mut buf.pfns)?;
        }
        // INVARIANT: Reported just now.
        Ok(Self {
            window,
            seq,
            owner,
            buf,
        })
    }

    /// Makes the report the region's entries and calls `f`, unless it is stale.
    ///
    /// # Errors
    ///
    /// [`EINTR`] if a fatal signal ends the wait for the lock.
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
            // What was needed may have gone before the window was looked at.
            if window.needed.contains(va) && !window.is_served(pfn) {
                return Ok(false);
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

    /// The loop of [`Mirror::fault`]. `raced` runs between a snapshot and its commit: the tests let
    /// invalidations collide there.
    pub(crate) fn fault_loop(
        &self,
        req: &FaultRequest,
        buf: &mut FaultBuf,
        f: &mut dyn FnMut(&Commit<'_>),
        mut raced: impl FnMut(),
    ) -> Result {
        buf.retries = 0;
        let current = kernel::current!();
        let mm = self.current_mm(current.mm())?;
        // Before a region is made: an address where nothing is mapped leaves nothing behind.
        let start = req.need.start();
        let bounds = match req.access {
            Some(_) => vma_at(mm, start)?,
            None => {
                let block = PageRange::aligned_block(start, buf.order)?;
                let range = block.intersect(&req.need).ok_or(EFAULT)?;
                is_mapped(mm, range)?.then_some(range).ok_or(EFAULT)?
            }
        };
        let region = self.region_or_insert(mm, start)?;
        let mut window = Window::new(&region, bounds, req, buf.order)?;
        let owner = Pool::owner(self.pool());

        let mut deadline = Deadline::new(req.timeout_ms);
        loop {
            match Snapshot::take(mm, window, owner, &mut deadline, buf) {
                Ok(snapshot) => {
                    raced();
                    if snapshot.commit(f)? {
                        return Ok(());
                    }
                }
                Err(err) => match window.narrow() {
                    // All of the time may have gone for one invalidation: `retry()` decides.
                    _ if err == EBUSY => {}
                    Some(page) if err == EFAULT || err == EPERM => {
                        window = page;
                        continue;
                    }
                    _ => return Err(err),
                },
            }
            deadline.retry(buf)?;
        }
    }
}

#[inline(never)]
#[export_name = "hmm_mirror_fault"]
fn mirror_fault(
    mirror: &Mirror,
    req: &FaultRequest,
    buf: &mut FaultBuf,
    f: &mut dyn FnMut(&Commit<'_>),
) -> Result {
    let result = mirror.fault_loop(req, buf, f, || ());
    if result == Err(EBUSY) {
        // SAFETY: Always safe to call.
        unsafe { hmm_fault_busy(req.need.start(), buf.retries) };
    }
    result
}
