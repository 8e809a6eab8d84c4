// SPDX-License-Identifier: GPL-2.0

//! Migration of a process's pages to the device's memory and back, as requested by the driver.
//!
//! A migration does not tell the driver where the pages are. It erases their entries, like any
//! other invalidation, and the device faults the pages again.

use super::{
    copy::PageCopy,
    device_pool::DevicePool,
    evict::{
        make_block,
        reserve, //
    },
    folio::Effort,
    hmm_range::{
        report,
        FaultBuf, //
    },
    migrate_vma::{
        drain,
        Arrays,
        Collected,
        Committed,
        Holes,
        ToDevice,
        ToRam, //
    },
    mirrored_mm::MirroredMm,
    pfn::{
        Access,
        HmmPfn,
        State, //
    },
    pool::Pool,
    pool_ops::{
        MigrateReason,
        PoolOps,
        RawData, //
    },
    range::PageRange,
    slots::Order, //
};
use core::ptr::null_mut;
use kernel::{
    bindings,
    mm::virt::{
        flags,
        VmaRef, //
    },
    prelude::*,
    sync::Arc, //
};

/// The arrays that [`MirroredMm::migrate_to_device`] and [`MirroredMm::migrate_to_ram`] need for a
/// window of pages.
pub struct MigrateBuf {
    order: u32,
    src: KVVec<usize>,
    dst: KVVec<usize>,
    copies: KVVec<PageCopy>,
    reserved: KVVec<usize>,
}

impl MigrateBuf {
    /// The largest window, as an order of pages: 2 MiB with 4 KiB pages. Only a buffer of this
    /// order lets large folios migrate as a whole.
    pub const MAX_ORDER: u32 = FaultBuf::MAX_ORDER;

    /// Creates a buffer for naturally aligned windows of up to `2^order` pages.
    ///
    /// # Errors
    ///
    /// [`EINVAL`] if `order` is above [`MigrateBuf::MAX_ORDER`], [`ENOMEM`].
    #[inline]
    pub fn new(order: u32) -> Result<Self> {
        if order > Self::MAX_ORDER {
            return Err(EINVAL);
        }
        let pages = 1 << order;
        Ok(Self {
            order,
            src: KVVec::from_elem(0, pages, GFP_KERNEL_ACCOUNT)?,
            dst: KVVec::from_elem(0, pages, GFP_KERNEL_ACCOUNT)?,
            copies: KVVec::from_elem(PageCopy::NONE, pages, GFP_KERNEL_ACCOUNT)?,
            reserved: KVVec::from_elem(0, pages, GFP_KERNEL_ACCOUNT)?,
        })
    }

    pub(crate) fn arrays(&mut self) -> (Arrays<'_>, &mut [usize]) {
        let arrays = Arrays {
            src: &mut self.src,
            dst: &mut self.dst,
            copies: &mut self.copies,
        };
        (arrays, &mut self.reserved)
    }
}

/// The result of a migration.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Migrated {
    range: PageRange,
    pages: usize,
    large: usize,
}

impl Migrated {
    /// The part of the requested range that this call has looked at. Both have the same start. The
    /// next call begins at its end, however many pages have moved.
    #[inline]
    pub fn range(&self) -> PageRange {
        self.range
    }

    /// The number of pages of `PAGE_SIZE` that moved, and of holes that were populated. Pages that
    /// somebody has a reference to do not move. For [`MirroredMm::migrate_for_access`] this counts
    /// pages outside of [`Migrated::range`] too.
    #[inline]
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// The number of those of [`Migrated::pages`] that moved as parts of large folios.
    #[inline]
    pub fn large_pages(&self) -> usize {
        self.large
    }

    fn none(range: PageRange) -> Self {
        Self {
            range,
            pages: 0,
            large: 0,
        }
    }

    /// Counts what has moved, in folios of `order`.
    fn add(&mut self, committed: &Committed<'_>, order: Order) {
        self.pages += committed.pages();
        if order.is_large() {
            self.large += committed.pages();
        }
    }
}

impl MirroredMm<'_> {
    /// Migrates the pages of `range` to the memory of the device, as far as `pool` has or can make
    /// room: for a prefetch, or a policy. For an access of the device there is
    /// [`MirroredMm::migrate_for_access`], which does not split huge pages.
    ///
    /// Only readable private memory migrates, unless KSM may merge it: anonymous memory, and the
    /// process's own copies of pages of a file. `holes` says whether addresses without a page get a
    /// zeroed page in device memory. Swapped-out pages stay where they are. Soft-dirty tracking
    /// does not see what a device writes to pages in its memory.
    ///
    /// One call serves one window: from the start of `range` to the end of the aligned block that
    /// `buf` spans, clipped to the VMA and the region. `data` is called for each folio that has
    /// found a place in device memory, with the number of its pages, and possibly several times for
    /// the same pages. If it fails for a page, the page stays where it is, which is not an error.
    /// If it fails for a large folio, the folio of the process is split, and `data` is called for
    /// its pages. So check a quota before the call.
    ///
    /// A large folio of 2 MiB that the window contains moves as one, if the pool has a block for
    /// it. So does a hole of this size, where the process may have a large folio. A large folio of
    /// which `range` has only a part is split.
    ///
    /// The driver is not told where a page is now. The entries of the window have been erased, and
    /// the device has to fault the pages again.
    ///
    /// # Context
    ///
    /// Any task. For the locks that it may hold, see [`MirroredMm::fault`]. May evict pages of any
    /// process: as many as move to the device in exchange, or up to a large folio more. `data` is
    /// called with `mmap_lock` held and pages locked, so it must not allocate memory in a way that
    /// waits. Page faults are disabled in it: an access to user memory that is not present fails.
    /// Calls of this crate fail, too.
    ///
    /// # Errors
    ///
    /// - [`EINVAL`] if the mirror was not made with `pool`.
    /// - [`ENODEV`] if the device is lost.
    /// - [`EFAULT`] if there is no VMA at the start of `range`.
    /// - [`EINTR`] if the task received a fatal signal.
    /// - [`ESRCH`] if the process has gone while invalidations collided.
    /// - [`EDEADLK`] if called from a callback or closure that this crate runs.
    /// - [`ENOMEM`] if the pool is full and nothing can be evicted, or if there is no memory for
    ///   the region.
    /// - [`EIO`] if [`PoolOps::copy`] returned before the end of its batch, and the errors of
    ///   [`PoolOps::copy`].
    ///
    /// An error means that no page has moved. If some pages have moved, the call succeeds, even if
    /// it could not go on because of an error or a fatal signal. It is no error if invalidations
    /// collide: pages that they take away do not migrate.
    #[inline]
    pub fn migrate_to_device<T: PoolOps>(
        &self,
        pool: &DevicePool<T>,
        range: PageRange,
        holes: Holes,
        buf: &mut MigrateBuf,
        data: impl FnMut(usize) -> Result<T::PageData>,
    ) -> Result<Migrated> {
        self.to_device(pool, range, holes, false, buf, data)
    }

    #[inline]
    fn to_device<T: PoolOps>(
        &self,
        pool: &DevicePool<T>,
        range: PageRange,
        holes: Holes,
        whole: bool,
        buf: &mut MigrateBuf,
        mut data: impl FnMut(usize) -> Result<T::PageData>,
    ) -> Result<Migrated> {
        migrate_to_device(self, pool.pool(), range, holes, whole, buf, &mut |pages| {
            // SAFETY: The data is for pages of `pool`, whose driver is `T` and has this type of
            // page data.
            data(pages).map(|data| unsafe { RawData::new(data) })
        })
    }

    /// Migrates the pages of `need` to the memory of the device, before the device accesses them.
    ///
    /// This is like [`MirroredMm::migrate_to_device`], but goes beyond `need` to keep folios large,
    /// as a page fault of a CPU does:
    ///
    /// - A large folio that the process has mapped whole is not split. All of it migrates, if it
    ///   contains the start of `need`.
    /// - For a write, holes are populated: with a large folio where the process may have one, and
    ///   all around it is a hole. For a read, holes stay.
    ///
    /// So pages outside of `need` may migrate or be populated, in the aligned 2 MiB around it. A
    /// driver with a policy for each range makes sure that the range contains these 2 MiB. The
    /// result does not say which other pages have migrated, but counts them.
    ///
    /// If `buf` is smaller than [`MigrateBuf::MAX_ORDER`], or the pool has coherent memory, only
    /// `need` migrates, and a large folio is split for it. A folio is also split if the pool can
    /// make no block for it, or if an invalidation collides while the core looks at the pages.
    ///
    /// # Context and errors
    ///
    /// Those of [`MirroredMm::migrate_to_device`].
    #[inline]
    pub fn migrate_for_access<T: PoolOps>(
        &self,
        pool: &DevicePool<T>,
        need: PageRange,
        access: Access,
        buf: &mut MigrateBuf,
        data: impl FnMut(usize) -> Result<T::PageData>,
    ) -> Result<Migrated> {
        self.to_device(pool, need, Holes::for_access(access), true, buf, data)
    }

    /// Migrates the pages of `range` that are in the memory of the device back to system memory.
    ///
    /// Pages in memory that may not be read do not migrate. The CPU migrates them, if they are
    /// private, when it accesses them after the memory has become readable again.
    ///
    /// One call serves one window, as for [`MirroredMm::migrate_to_device`]. A large folio moves as
    /// one, if it can be allocated in system memory.
    ///
    /// # Context
    ///
    /// As for [`MirroredMm::migrate_to_device`], but nothing is evicted.
    ///
    /// # Errors
    ///
    /// As for [`MirroredMm::migrate_to_device`], except [`EINVAL`]. [`ENOMEM`] means that there is
    /// no system memory. If only some pages cannot be allocated or copied, fewer pages move; it is
    /// an error if none moves for this reason. For a mirror without a pool, no page moves.
    #[inline(never)]
    #[export_name = "rust_hmm_mm_migrate_to_ram"]
    pub fn migrate_to_ram(&self, range: PageRange, buf: &mut MigrateBuf) -> Result<Migrated> {
        let _charge = self.enter()?;
        let Some(pool) = self.mirror().pool() else {
            return Ok(Migrated::none(range));
        };
        if pool.is_lost() {
            return Err(ENODEV);
        }
        let (range, scan) = self.scan(range, Holes::Keep, buf, |scan| scan.device)?;
        if !scan.device {
            return Ok(Migrated::none(range));
        }

        let guard = self.as_mm().mmap_read_lock_killable()?;
        let (range, vma) = migratable(guard.vma_lookup(range.start()), range)?;
        let Some(vma) = vma else {
            return Ok(Migrated::none(range));
        };
        let mut most = pool.max_order();
        loop {
            let arrays = buf.arrays().0;
            // SAFETY: `guard` holds mmap_lock, and `vma` borrows it. There is no faulting page.
            let collected =
                unsafe { Collected::<ToRam>::at(pool, vma, range, most, null_mut(), arrays) }?;
            let order = collected.order();
            match collected.copy(Effort::Reclaim, None) {
                // Without a large folio, or if the device cannot copy all of it.
                Err(err) if order.is_large() && err != ENODEV => most = Order::PAGE,
                copied => {
                    let mut migrated = Migrated::none(range);
                    migrated.add(&copied?.commit(MigrateReason::Request), order);
                    return Ok(migrated);
                }
            }
        }
    }

    /// Clips `range` to a window and reports where its pages are, so that a caller does not unmap
    /// pages if none has to move. Looks at the pages until `is_enough`.
    ///
    /// The result may be stale, and pinned pages count as pages that can move. Which pages do move
    /// is only known when they are collected.
    fn scan(
        &self,
        range: PageRange,
        holes: Holes,
        buf: &mut MigrateBuf,
        is_enough: fn(&Scan) -> bool,
    ) -> Result<(PageRange, Scan)> {
        let guard = self.as_mm().mmap_read_lock_killable()?;
        let (range, vma) = migratable(guard.vma_lookup(range.start()), range)?;
        let can_migrate = vma.is_some();
        drop(guard);
        let range = PageRange::aligned_block(range.start(), buf.order)?
            .intersect(&range)
            .ok_or(EFAULT)?;
        if !can_migrate {
            return Ok((range, Scan::NOTHING));
        }

        let mirror = self.mirror();
        // The window is aligned and smaller than a region, so it lies in one region.
        let region = mirror.region_or_insert(self.as_mm(), range.start())?;
        let pfns = buf.src.get_mut(..range.pages()).ok_or(EINVAL)?;
        let owner = Pool::owner(mirror.pool());
        let seq = match report(self, &region, range, None, owner, pfns) {
            Ok((_, seq)) => seq,
            // An invalidation collided: assume that there are pages in both places.
            Err(err) if err == EBUSY => return Ok((range, Scan::UNKNOWN)),
            Err(err) => return Err(err),
        };
        let Some(entries) = region.lock_unless_stale(seq)? else {
            return Ok((range, Scan::UNKNOWN));
        };
        let mut scan = Scan::NOTHING;
        for (index, raw) in pfns.iter().enumerate() {
            let pfn = HmmPfn::from_output(*raw);
            scan.pages |= pfn.state() != State::Hole;
            match (pfn.state(), pfn.present()) {
                // Swapped-out pages look like holes here. They are not collected.
                (State::Hole, _) => {
                    let populates = holes == Holes::Populate;
                    scan.system |= populates;
                    if index == 0 && populates {
                        scan.first = First::Hole;
                    }
                }
                (State::Present(_), Some(raw)) => {
                    // SAFETY: The page was reported, no invalidation has collided, and the region's
                    // lock is held, so the page cannot be freed.
                    let page = unsafe { bindings::hmm_pfn_to_page(raw) };
                    // SAFETY: The page is valid, and cannot be freed while the region's lock is
                    // held.
                    let (is_own, is_anon, is_zero) = unsafe {
                        (
                            Pool::owns(owner, page),
                            bindings::PageAnon(page),
                            bindings::is_zero_pfn(bindings::page_to_pfn(page))
                                || bindings::is_huge_zero_pfn(bindings::page_to_pfn(page)),
                        )
                    };
                    scan.device |= is_own;
                    scan.system |= !is_own && is_anon || is_zero && holes == Holes::Populate;
                    if index == 0 && !is_own && pfn.order() == Order::MAX.get() {
                        scan.first = First::Large;
                    }
                }
                _ => {}
            }
            if is_enough(&scan) {
                break;
            }
        }
        drop(entries);
        Ok((range, scan))
    }

    /// Whether nothing is mapped in `range`. Swapped-out pages look like holes.
    fn has_only_holes(&self, range: PageRange, buf: &mut MigrateBuf) -> Result<bool> {
        match self.scan(range, Holes::Keep, buf, |scan| scan.pages) {
            Ok((scanned, scan)) => Ok(scanned == range && !scan.pages),
            Err(err) if err == EFAULT => Ok(false),
            Err(err) => Err(err),
        }
    }
}

/// What is at the start of a window.
#[derive(Copy, Clone, PartialEq, Eq)]
enum First {
    /// A part of a large folio that the process has mapped whole.
    Large,
    /// A hole that will be populated.
    Hole,
    Other,
}

/// Where a window may have pages that could move.
#[derive(Copy, Clone)]
struct Scan {
    first: First,
    /// In the device's memory.
    device: bool,
    /// In system memory, or in holes that will be populated.
    system: bool,
    /// Anywhere.
    pages: bool,
}

impl Scan {
    const NOTHING: Self = Self {
        first: First::Other,
        device: false,
        system: false,
        pages: false,
    };
    const UNKNOWN: Self = Self {
        first: First::Other,
        device: true,
        system: true,
        pages: true,
    };
}

#[inline(never)]
#[export_name = "rust_hmm_mm_migrate_to_device"]
fn migrate_to_device(
    mm: &MirroredMm<'_>,
    pool: &Arc<Pool>,
    range: PageRange,
    holes: Holes,
    whole: bool,
    buf: &mut MigrateBuf,
    data: &mut dyn FnMut(usize) -> Result<RawData>,
) -> Result<Migrated> {
    let _charge = mm.enter()?;
    if !mm.mirror().pool().is_some_and(|own| Arc::ptr_eq(own, pool)) {
        return Err(EINVAL);
    }
    if pool.is_lost() {
        return Err(ENODEV);
    }
    let (range, scan) = mm.scan(range, holes, buf, |scan| scan.system)?;
    let mut migrated = Migrated::none(range);
    if !scan.system {
        return Ok(migrated);
    }
    let block = PageRange::aligned_block(range.start(), Order::MAX.get())?;
    let window = match scan.first {
        _ if !whole
            || !pool.max_order().is_large()
            || block.pages() > buf.src.len()
            || block == range =>
        {
            range
        }
        First::Large => block,
        First::Hole if mm.has_only_holes(block, buf)? => block,
        _ => range,
    };

    // The first round uses free pages of the pool, and adds a chunk only if there are none. If it
    // collects more pages than it has free ones, a second round first makes room for the others.
    // Making room evicts pages and adds chunks, which is not possible with a lock of mm held. And
    // nothing should be evicted before it is known which pages can move.
    //
    // A large folio needs a block of its size. If none can be made, it is split.
    let mut round = Round {
        window,
        most: pool.max_order(),
        room: 0,
    };
    let mut tried = false;
    loop {
        let (short, order) = match round.run(mm, pool, holes, buf, data, &mut migrated) {
            Ok(left) => left,
            // Pages have moved in the first round: the caller has to hear of them.
            Err(_) if migrated.pages != 0 => break,
            Err(err) => return Err(err),
        };
        if short == 0 || round.room != 0 {
            break;
        }
        if !order.is_large() {
            round.room = short;
        } else if tried || !make_block(pool, order) {
            round.most = Order::PAGE;
            // The first round has put the folio back into a per-CPU batch, whose reference keeps it
            // from being split.
            drain();
        }
        tried = true;
    }
    Ok(migrated)
}

/// One attempt of a migration to the device.
struct Round {
    /// What migrates if it is a large folio: else only the range that the caller asked for.
    window: PageRange,
    /// A folio that is larger is split.
    most: Order,
    /// The number of pages to make room for.
    room: usize,
}

impl Round {
    /// Migrates the pages that free pages of `pool` are found for. Adds to `migrated` what has
    /// moved, and returns how many pages found no room, and the order of their folios.
    fn run(
        &self,
        mm: &MirroredMm<'_>,
        pool: &Arc<Pool>,
        holes: Holes,
        buf: &mut MigrateBuf,
        data: &mut dyn FnMut(usize) -> Result<RawData>,
        migrated: &mut Migrated,
    ) -> Result<(usize, Order)> {
        let (mut arrays, reserved) = buf.arrays();
        let mut reservation = reserve(pool, reserved, self.room)?;

        let guard = mm.as_mm().mmap_read_lock_killable()?;
        let vma = guard.vma_lookup(migrated.range.start());
        let (range, vma) = migratable(vma, migrated.range)?;
        migrated.range = range;
        let Some(vma) = vma else {
            return Ok((0, Order::PAGE));
        };
        let is_inside = vma.start() <= self.window.start() && self.window.end() <= vma.end();
        let first = match self.most.is_large() && is_inside {
            true => self.window,
            false => range,
        };
        // SAFETY: `guard` holds mmap_lock, and `vma` borrows it.
        let mut collected =
            unsafe { Collected::<ToDevice>::at(pool, vma, first, self.most, arrays.again()) }?;
        let fits = match collected.order().is_large() {
            true => collected.has_folio() || may_be_large(vma),
            false => first == range,
        };
        if !fits {
            drop(collected);
            let most = Order::PAGE;
            // SAFETY: `guard` holds mmap_lock, and `vma` borrows it.
            collected = unsafe { Collected::<ToDevice>::at(pool, vma, range, most, arrays) }?;
        }
        let order = collected.order();
        let populates = !collected.has_folio() && holes == Holes::Populate;
        let (copied, mut short) = collected.copy(&mut reservation, holes, data)?;
        let committed = copied.commit();
        migrated.add(&committed, order);
        // There may be a charge for one page, though not for a large folio.
        if order.is_large() && populates && committed.pages() == 0 {
            short = order.pages();
        }
        Ok((short, order))
    }
}

/// Whether a CPU that touches a hole of `vma` gets a large folio, if all around it is a hole too.
fn may_be_large(vma: &VmaRef) -> bool {
    let (flags, order) = (vma.flags(), 1 << Order::MAX.get());
    let fault = bindings::tva_type_TVA_PAGEFAULT;
    // SAFETY: `vma` is a reference to a valid VMA.
    unsafe { bindings::thp_vma_allowable_orders(vma.as_ptr(), flags, fault, order) != 0 }
}

/// Clips `range` to `vma`, which contains its start. Also returns `vma`, if its pages can migrate.
///
/// # Errors
///
/// [`EFAULT`] if there is no VMA.
fn migratable(vma: Option<&VmaRef>, range: PageRange) -> Result<(PageRange, Option<&VmaRef>)> {
    let vma = vma.ok_or(EFAULT)?;
    let bounds = PageRange::new(vma.start(), vma.end())?;
    let range = bounds.intersect(&range).ok_or(EFAULT)?;
    Ok((range, can_migrate(vma).then_some(vma)))
}

/// Whether mm can migrate pages of `vma` to device memory, and a device can use them there.
fn can_migrate(vma: &VmaRef) -> bool {
    // KSM merges no pages in device memory, and the process has asked for merging.
    let special = flags::IO
        | flags::PFNMAP
        | flags::DONTEXPAND
        | flags::MIXEDMAP
        | flags::MERGEABLE
        | flags::HUGETLB
        // A copy would lose the tags. A device does not write to a shadow stack.
        | bindings::VM_MTE
        | bindings::VM_SHADOW_STACK;
    let readable = vma.flags() & (special | flags::READ) == flags::READ;
    // A migration would bypass the userfaultfd handler that waits for accesses.
    //
    // SAFETY: `vma` is a reference to a valid VMA.
    let trapped = unsafe { bindings::userfaultfd_rwp(vma.as_ptr()) };
    // A private file mapping gets its anon_vma with the first write, which makes a private copy of
    // a page.
    //
    // SAFETY: `vma` is a reference to a valid VMA. A concurrent fault may set the field, so use a
    // volatile read.
    let anon_vma = unsafe { (&raw const (*vma.as_ptr()).anon_vma).read_volatile() };
    // SAFETY: `vma` is a reference to a valid VMA.
    let is_anonymous = unsafe { bindings::vma_is_anonymous(vma.as_ptr()) };
    readable && !trapped && (is_anonymous || !anon_vma.is_null())
}
