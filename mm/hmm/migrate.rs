// SPDX-License-Identifier: GPL-2.0

//! Migration of a process's pages to the device's memory and back, as requested by the driver.
//!
//! A migration does not tell the driver where the pages are. It erases their entries, like any
//! other invalidation, and the device faults the pages again.

use super::{
    copy::PageCopy,
    device_pool::DevicePool,
    evict::reserve,
    folio::Effort,
    hmm_range::{
        report,
        FaultBuf, //
    },
    migrate_vma::{
        Arrays,
        Collected,
        Holes,
        ToDevice,
        ToRam, //
    },
    mirrored_mm::MirroredMm,
    pfn::{
        HmmPfn,
        State, //
    },
    pool::Pool,
    pool_ops::{
        MigrateReason,
        PoolOps,
        RawData, //
    },
    range::PageRange, //
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
    /// Creates a buffer for naturally aligned windows of up to `2^order` pages.
    ///
    /// # Errors
    ///
    /// [`EINVAL`] if `order` is above [`FaultBuf::MAX_ORDER`], [`ENOMEM`].
    #[inline]
    pub fn new(order: u32) -> Result<Self> {
        if order > FaultBuf::MAX_ORDER {
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
}

impl Migrated {
    /// The part of the requested range that this call has served. Both have the same start.
    #[inline]
    pub fn range(&self) -> PageRange {
        self.range
    }

    /// The number of pages that moved. Pages that somebody has a reference to do not move.
    #[inline]
    pub fn pages(&self) -> usize {
        self.pages
    }
}

impl MirroredMm<'_> {
    /// Migrates the pages of `range` to the memory of the device, as far as `pool` has or can make
    /// room.
    ///
    /// Only readable private memory migrates, unless KSM may merge it: anonymous memory, and the
    /// process's own copies of pages of a file. `holes` says whether addresses without a page get a
    /// zeroed page in device memory. Swapped-out pages stay where they are. Soft-dirty tracking
    /// does not see what a device writes to pages in its memory.
    ///
    /// One call serves one window: from the start of `range` to the end of the aligned block that
    /// `buf` spans, clipped to the VMA and the region. `data` is called for each page that gets a
    /// place in device memory. If it fails, the page stays where it is, which is not an error.
    ///
    /// The driver is not told where a page is now. The entries of the window have been erased, and
    /// the device has to fault the pages again.
    ///
    /// # Context
    ///
    /// Any task. For the locks that it may hold, see [`MirroredMm::fault`]. May evict pages of any
    /// process, but no more than move to the device in exchange. `data` is called with `mmap_lock`
    /// held and pages locked, so it must not allocate memory in a way that waits. Page faults are
    /// disabled in it: an access to user memory that is not present fails. Calls of this crate
    /// fail, too.
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
        mut data: impl FnMut() -> Result<T::PageData>,
    ) -> Result<Migrated> {
        migrate_to_device(self, pool.pool(), range, holes, buf, &mut || {
            // SAFETY: The data is for pages of `pool`, whose driver is `T` and has this type of
            // page data.
            data().map(|data| unsafe { RawData::new(data) })
        })
    }

    /// Migrates the pages of `range` that are in the memory of the device back to system memory.
    ///
    /// Pages in memory that may not be read do not migrate. The CPU migrates them when it accesses
    /// them after the memory has become readable again.
    ///
    /// One call serves one window, as for [`MirroredMm::migrate_to_device`].
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
            return Ok(Migrated { range, pages: 0 });
        };
        if pool.is_lost() {
            return Err(ENODEV);
        }
        let (range, scan) = self.scan(range, Holes::Keep, buf)?;
        if !scan.device {
            return Ok(Migrated { range, pages: 0 });
        }

        let guard = self.as_mm().mmap_read_lock_killable()?;
        let (range, vma) = migratable(guard.vma_lookup(range.start()), range)?;
        let Some(vma) = vma else {
            return Ok(Migrated { range, pages: 0 });
        };
        let arrays = buf.arrays().0;
        // SAFETY: `guard` holds mmap_lock, and `vma` borrows it. There is no faulting page.
        let collected = unsafe { Collected::<ToRam>::at(pool, vma, range, null_mut(), arrays) }?;
        let copied = collected.copy(Effort::Reclaim, None)?;
        let pages = copied.commit(MigrateReason::Request).pages();
        Ok(Migrated { range, pages })
    }

    /// Clips `range` to a window and reports where its pages are, so that a caller does not unmap
    /// pages if none has to move.
    ///
    /// The result may be stale, and pinned pages count as pages that can move. Which pages do move
    /// is only known when they are collected.
    fn scan(
        &self,
        range: PageRange,
        holes: Holes,
        buf: &mut MigrateBuf,
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
        for pfn in pfns.iter().map(|raw| HmmPfn::from_output(*raw)) {
            match (pfn.state(), pfn.present()) {
                // Swapped-out pages look like holes here. They are not collected.
                (State::Hole, _) => scan.system |= holes == Holes::Populate,
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
                            bindings::is_zero_pfn(bindings::page_to_pfn(page)),
                        )
                    };
                    scan.device |= is_own;
                    scan.system |= !is_own && is_anon || is_zero && holes == Holes::Populate;
                }
                _ => {}
            }
        }
        drop(entries);
        Ok((range, scan))
    }
}

/// Where a window may have pages that could move.
#[derive(Copy, Clone)]
struct Scan {
    /// In the device's memory.
    device: bool,
    /// In system memory, or in holes that will be populated.
    system: bool,
}

impl Scan {
    const NOTHING: Self = Self {
        device: false,
        system: false,
    };
    const UNKNOWN: Self = Self {
        device: true,
        system: true,
    };
}

#[inline(never)]
#[export_name = "rust_hmm_mm_migrate_to_device"]
fn migrate_to_device(
    mm: &MirroredMm<'_>,
    pool: &Arc<Pool>,
    range: PageRange,
    holes: Holes,
    buf: &mut MigrateBuf,
    data: &mut dyn FnMut() -> Result<RawData>,
) -> Result<Migrated> {
    let _charge = mm.enter()?;
    if !mm.mirror().pool().is_some_and(|own| Arc::ptr_eq(own, pool)) {
        return Err(EINVAL);
    }
    if pool.is_lost() {
        return Err(ENODEV);
    }
    let (range, scan) = mm.scan(range, holes, buf)?;
    let mut migrated = Migrated { range, pages: 0 };
    if !scan.system {
        return Ok(migrated);
    }

    // The first round uses free pages of the pool, and adds a chunk only if there are none. If it
    // collects more pages than it has free ones, a second round first makes room for the others.
    // Making room evicts pages and adds chunks, which is not possible with a lock of mm held. And
    // nothing should be evicted before it is known which pages can move.
    let mut short = 0;
    for _ in 0..2 {
        match migrate_round(mm, pool, holes, buf, data, short, &mut migrated) {
            Ok(left) => short = left,
            // Pages have moved in the first round: the caller has to hear of them.
            Err(_) if migrated.pages != 0 => break,
            Err(err) => return Err(err),
        }
        if short == 0 {
            break;
        }
    }
    Ok(migrated)
}

/// Makes room for `room` pages and migrates the pages of `migrated.range` that free pages of `pool`
/// are found for. Adds to `migrated` what has moved, and returns how many pages found no room.
fn migrate_round(
    mm: &MirroredMm<'_>,
    pool: &Arc<Pool>,
    holes: Holes,
    buf: &mut MigrateBuf,
    data: &mut dyn FnMut() -> Result<RawData>,
    room: usize,
    migrated: &mut Migrated,
) -> Result<usize> {
    let (arrays, reserved) = buf.arrays();
    let mut reservation = reserve(pool, reserved, room)?;

    let guard = mm.as_mm().mmap_read_lock_killable()?;
    let vma = guard.vma_lookup(migrated.range.start());
    let (range, vma) = migratable(vma, migrated.range)?;
    migrated.range = range;
    let Some(vma) = vma else {
        return Ok(0);
    };
    // SAFETY: `guard` holds mmap_lock, and `vma` borrows it.
    let collected = unsafe { Collected::<ToDevice>::at(pool, vma, range, arrays) }?;
    let (copied, left) = collected.copy(&mut reservation, holes, data)?;
    migrated.pages += copied.commit().pages();
    Ok(left)
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

/// Whether mm can migrate pages of `vma` to device-private memory, and a device can use them there.
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
    let is_private = unsafe {
        bindings::vma_is_anonymous(vma.as_ptr())
            || !anon_vma.is_null() && !bindings::vma_is_dax(vma.as_ptr())
    };
    readable && !trapped && is_private
}
