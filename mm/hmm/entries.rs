// SPDX-License-Identifier: GPL-2.0

//! The entries of a region: the access that the device has to each page.
//!
//! The region's lock protects the entries. An entry holds no reference to its page: the notifier
//! callback takes the lock for write and erases the entry before mm unmaps the page, so an entry is
//! valid for as long as the lock is held. Nothing here allocates memory with the lock held; the
//! caller of [`Entries::install`] allocates a leaf beforehand.

use super::{
    dma::{
        LeafMap,
        Maps,
        StaysBound, //
    },
    pfn::{
        Access,
        HmmPfn, //
    },
    pool::Pool,
    range::PageRange, //
};
use core::ops::Range;
use kernel::{
    bindings,
    dma::DmaAddress,
    page::{
        PAGE_MASK,
        PAGE_SIZE, //
    },
    prelude::*, //
};
use pin_init::init_zeroed;

/// A leaf has the entries of `2^LEAF_ORDER` pages, as many as fit into one page: those of 2 MiB
/// with 4 KiB pages.
pub(crate) const LEAF_ORDER: u32 = (PAGE_SIZE / size_of::<HmmPfn>()).ilog2();

const LEAF_PAGES: usize = 1 << LEAF_ORDER;
const LEAF_BYTES: usize = PAGE_SIZE << LEAF_ORDER;

/// The entries of an aligned block of [`LEAF_PAGES`] pages.
#[derive(Zeroable)]
pub(crate) struct Leaf([HmmPfn; LEAF_PAGES]);

impl Leaf {
    /// Creates a leaf without entries.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`].
    pub(crate) fn new() -> Result<KBox<Self>> {
        // `HmmPfn::NONE` is zero. Initialise in place, since a leaf is too large for the stack.
        KBox::init(init_zeroed(), GFP_KERNEL_ACCOUNT)
    }

    fn is_empty(&self) -> bool {
        self.0.iter().all(|pfn| *pfn == HmmPfn::NONE)
    }
}

/// The memory that a page belongs to.
#[derive(Copy, Clone, PartialEq, Eq)]
enum Place {
    Ram,
    Device,
}

/// The entries of a region.
///
/// # Invariants
///
/// For every entry but [`HmmPfn::NONE`]: `hmm_range_fault()` reported it, and it has not been
/// invalidated since. It is marked as a device page ([`HmmPfn::is_device`]) if and only if the page
/// belongs to the pool of the mirror. All other pages are in the kernel's direct map.
pub(crate) struct Entries {
    range: PageRange,
    leaves: KVec<Option<KBox<Leaf>>>,
    /// The DMA mappings of the pages, if the mirror is for a device that does DMA.
    maps: Option<Maps>,
}

impl Entries {
    /// Creates the store for `range`, without entries. `range` must start and end at the boundary
    /// of a leaf.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`].
    pub(crate) fn new(range: PageRange) -> Result<Self> {
        let leaves = range.len() / LEAF_BYTES;
        let mut this = Self {
            range,
            leaves: KVec::with_capacity(leaves, GFP_KERNEL_ACCOUNT)?,
            maps: None,
        };
        for _ in 0..leaves {
            this.leaves.push(None, GFP_KERNEL_ACCOUNT)?;
        }
        Ok(this)
    }

    /// Adds a store for the DMA mappings of the pages.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`].
    pub(crate) fn with_maps(mut self) -> Result<Self> {
        self.maps = Some(Maps::new(self.leaves.len())?);
        Ok(self)
    }

    /// The number of leaves that are allocated.
    #[cfg(CONFIG_RUST_HMM_KUNIT_TEST)]
    pub(crate) fn leaves(&self) -> usize {
        self.leaves.iter().flatten().count()
    }

    /// The index of the leaf that has the entry of `va`, and the index of the entry in the leaf.
    fn position(&self, va: usize) -> Option<(usize, usize)> {
        let page = self.range.index_of(va)?;
        Some((page / LEAF_PAGES, page % LEAF_PAGES))
    }

    fn get(&self, va: usize) -> HmmPfn {
        let Some((leaf, page)) = self.position(va) else {
            return HmmPfn::NONE;
        };
        match self.leaves.get(leaf) {
            Some(Some(leaf)) => leaf.0[page],
            _ => HmmPfn::NONE,
        }
    }

    /// Replaces the entries of `range`, which lies in one leaf. `pfns` has one element for each
    /// page.
    ///
    /// A hole or an error in `pfns` does not replace an entry. mm reports a page that is exclusive
    /// to the device as a hole; if the page were really gone, the notifier callback would have
    /// erased the entry already.
    ///
    /// Uses `spare` if the leaf does not exist yet. Puts the leaf back into `spare` if it has no
    /// entry.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`] if the leaf does not exist and there is no spare leaf, [`EINVAL`] if `range` does
    /// not start in the region or reaches past the leaf. No entry has changed then.
    ///
    /// # Safety
    ///
    /// - `hmm_range_fault()` reported `pfns` for `range`, and no invalidation has collided with the
    ///   report: the region's lock is held for write, and `mmu_interval_read_retry()` returned
    ///   false with the lock held.
    /// - The pages of the mirror's pool, as told by [`Pool::owns`], are marked as device pages, and
    ///   no others. All others are in the kernel's direct map.
    pub(crate) unsafe fn install(
        &mut self,
        range: PageRange,
        pfns: impl Iterator<Item = HmmPfn>,
        spare: &mut Option<KBox<Leaf>>,
    ) -> Result {
        let (leaf, page) = self.position(range.start()).ok_or(EINVAL)?;
        let place = self.leaves.get_mut(leaf).ok_or(EINVAL)?;
        if range.pages() > LEAF_PAGES - page {
            return Err(EINVAL);
        }
        if place.is_none() {
            *place = spare.take();
        }
        let leaf = place.as_mut().ok_or(ENOMEM)?;
        let slots = leaf.0.get_mut(page..page + range.pages()).ok_or(EINVAL)?;
        for (slot, pfn) in slots
            .iter_mut()
            .zip(pfns)
            .filter(|(_, pfn)| pfn.present().is_some())
        {
            // INVARIANT: hmm_range_fault() reported `pfn` and no invalidation has collided. Pages
            // of the pool are marked, and the others are in the direct map (see the # Safety
            // section).
            *slot = pfn;
        }
        if leaf.is_empty() {
            *spare = place.take();
        }
        Ok(())
    }

    /// The parts of leaves that `range` consists of: the index of a leaf, and the entries in it.
    fn parts(&self, range: PageRange) -> impl Iterator<Item = (usize, Range<usize>)> {
        let (first, end) = match self.range.intersect(&range) {
            Some(range) => {
                let first = (range.start() - self.range.start()) / PAGE_SIZE;
                (first, first + range.pages())
            }
            None => (0, 0),
        };
        (first / LEAF_PAGES..end.div_ceil(LEAF_PAGES)).map(move |leaf| {
            let start = leaf * LEAF_PAGES;
            let part = first.max(start) - start..end.min(start + LEAF_PAGES) - start;
            (leaf, part)
        })
    }

    /// Whether there is an entry in `range`.
    pub(crate) fn any(&self, range: PageRange) -> bool {
        self.parts(range)
            .any(|(leaf, part)| match self.leaves.get(leaf) {
                Some(Some(leaf)) => leaf.0[part].iter().any(|pfn| *pfn != HmmPfn::NONE),
                _ => false,
            })
    }

    /// Erases the entries of `range`. Frees leaves without entries, so that a process cannot keep
    /// memory allocated for pages that it has unmapped. Returns the number of entries erased.
    pub(crate) fn erase(&mut self, range: PageRange) -> usize {
        let mut erased = 0;
        for (leaf, part) in self.parts(range) {
            let Some(slot) = self.leaves.get_mut(leaf) else {
                break;
            };
            if let Some(leaf) = slot {
                let pfns = &mut leaf.0[part];
                erased += pfns.iter().filter(|pfn| **pfn != HmmPfn::NONE).count();
                pfns.fill(HmmPfn::NONE);
            }
            slot.take_if(|leaf| leaf.is_empty());
        }
        erased
    }

    /// Makes room for the DMA mappings of a leaf's pages.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`].
    pub(crate) fn new_map(bound: &StaysBound<'_>) -> Result<KBox<LeafMap>> {
        LeafMap::new(bound, LEAF_PAGES)
    }

    /// Whether there is room for the DMA mappings of the leaf of `va`.
    pub(crate) fn has_map(&self, va: usize) -> bool {
        match (&self.maps, self.position(va)) {
            (Some(maps), Some((leaf, _))) => maps.has_leaf(leaf),
            _ => false,
        }
    }

    /// Maps the pages of `range`, which lies in one leaf, for DMA. `pfns` has one element for each
    /// page. Uses `spare` if there is no room yet. To be called before [`Entries::install`].
    ///
    /// # Errors
    ///
    /// Those of [`Maps::map`].
    ///
    /// # Safety
    ///
    /// As for [`Entries::install`].
    pub(crate) unsafe fn map(
        &mut self,
        range: PageRange,
        pfns: impl Iterator<Item = HmmPfn>,
        spare: &mut Option<KBox<LeafMap>>,
    ) -> Result {
        let (leaf, page) = self.position(range.start()).ok_or(EINVAL)?;
        match &mut self.maps {
            // SAFETY: The caller ensures the conditions (see the # Safety section).
            Some(maps) => unsafe { maps.map(leaf, page, pfns, spare) },
            None => Ok(()),
        }
    }

    /// Ends the DMA mappings of those pages in `range` that have no entry any more, and marks those
    /// of them dirty that the device could write to. The device must have stopped using them.
    ///
    /// # Safety
    ///
    /// These pages were not freed: their entries were erased in an invalidation that is not over,
    /// or none has begun.
    pub(crate) unsafe fn unmap(&mut self, range: PageRange) {
        let Some(mut maps) = self.maps.take() else {
            return;
        };
        for (leaf, part) in self.parts(range) {
            let entries = self.leaves.get(leaf).and_then(Option::as_ref);
            let is_stale = |page| entries.is_none_or(|leaf| leaf.0[page] == HmmPfn::NONE);
            // SAFETY: A page without an entry was not freed (see the # Safety section).
            unsafe { maps.unmap(leaf, part, is_stale) };
        }
        self.maps = Some(maps);
    }

    /// Where the device finds the page at `va`, which has an entry: the DMA address, or for a page
    /// of the device's own memory the offset in it.
    pub(crate) fn address(&self, va: usize) -> Option<DmaAddress> {
        let (leaf, index) = self.position(va)?;
        match self.page(va, 0, Access::Read)? {
            // SAFETY: The page belongs to the pool, and is not freed while the region's lock is
            // held.
            (page, Place::Device) => Some(unsafe { Pool::address(page) } as DmaAddress),
            (_, Place::Ram) => self.maps.as_ref()?.address(leaf, index),
        }
    }

    /// The number of pages that are mapped for the device, with or without an entry.
    #[cfg(CONFIG_RUST_HMM_KUNIT_TEST)]
    pub(crate) fn mapped(&self) -> usize {
        self.maps.as_ref().map_or(0, Maps::used)
    }

    /// Copies the bytes at `va` to `buf`.
    ///
    /// Returns `false`, and copies nothing, if the entry of the page does not allow a read or the
    /// bytes reach past the page.
    #[must_use]
    pub(crate) fn read(&self, va: usize, buf: &mut [u8]) -> bool {
        let Some((page, place)) = self.page(va, buf.len(), Access::Read) else {
            return false;
        };
        if place == Place::Device {
            // SAFETY: `page()` checked that the bytes lie in one page. The type invariants say that
            // a page marked as a device page belongs to the pool. It is not freed while the
            // region's lock is held, since the notifier callback takes the lock for write before
            // mm unmaps the page.
            return unsafe { Pool::read(page, va & !PAGE_MASK, buf) };
        }
        // SAFETY:
        // - `page()` checked that the bytes lie in one page, and that the page may be read. It is
        //   not freed while the region's lock is held, since the notifier callback takes the lock
        //   for write before mm unmaps the page.
        // - The type invariants say that a page that is not a device page is in the direct map.
        // - `buf` is valid for writes of its length.
        // - The process and other devices may write to the page at the same time. C code copies
        //   the bytes, and any byte value is valid in `buf`, so such a race can only mix old and
        //   new bytes.
        unsafe {
            bindings::memcpy_from_page(buf.as_mut_ptr().cast(), page, va & !PAGE_MASK, buf.len())
        };
        true
    }

    /// Copies `buf` to the bytes at `va`, and marks the folio dirty.
    ///
    /// Returns `false`, and copies nothing, if the entry of the page does not allow a write or the
    /// bytes reach past the page.
    #[must_use]
    pub(crate) fn write(&self, va: usize, buf: &[u8]) -> bool {
        let Some((page, place)) = self.page(va, buf.len(), Access::Write) else {
            return false;
        };
        let offset = va & !PAGE_MASK;
        let written = match place {
            // SAFETY: `page()` checked that the bytes lie in one page. The type invariants say that
            // a page marked as a device page belongs to the pool. It is not freed while the
            // region's lock is held.
            Place::Device => unsafe { Pool::write(page, offset, buf) },
            // SAFETY: `page()` checked that the bytes lie in one page, and that the page may be
            // written. It is not freed while the region's lock is held. The type invariants say
            // that it is in the direct map. `buf` is valid for reads of its length. C code copies
            // the bytes, so a concurrent access by the process can only mix old and new bytes.
            Place::Ram => unsafe {
                bindings::memcpy_to_page(page, offset, buf.as_ptr().cast(), buf.len());
                true
            },
        };
        if !written {
            return false;
        }
        // A writable PTE may be clean, for example after a swap-in. If the folio were not marked
        // dirty, reclaim would then drop what the device wrote. The page cannot be truncated while
        // the region's lock is held, so the folio lock is not needed, just as it is not needed
        // under a page table lock.
        //
        // SAFETY: The page is not freed while the region's lock is held.
        unsafe { bindings::folio_mark_dirty(bindings::page_folio(page)) };
        true
    }

    /// Replaces the `u64` at `va` by what `f` returns for it, and marks the folio dirty. Returns
    /// the old value.
    ///
    /// Returns `None`, and changes nothing, if the entry of the page does not allow a write or the
    /// `u64` reaches past the page. `f` is not called then. The same if `f` returns `None`.
    pub(crate) fn update(&mut self, va: usize, f: impl FnOnce(u64) -> Option<u64>) -> Option<u64> {
        let mut old = [0; size_of::<u64>()];
        self.page(va, old.len(), Access::Write)?;
        if !self.read(va, &mut old) {
            return None;
        }
        let old = u64::from_ne_bytes(old);
        let new = f(old)?;
        self.write(va, &new.to_ne_bytes()).then_some(old)
    }

    /// The page at `va`, if its entry allows `access` and the `len` bytes at `va` lie in it.
    fn page(&self, va: usize, len: usize, access: Access) -> Option<(*mut bindings::page, Place)> {
        let pfn = self.get(va);
        if (va & !PAGE_MASK) + len > PAGE_SIZE || !pfn.allows(access) {
            return None;
        }
        // SAFETY: The type invariants say that hmm_range_fault() reported the entry. `present()`
        // returns only entries with HMM_PFN_VALID, so the pfn is that of a page.
        let page = unsafe { bindings::hmm_pfn_to_page(pfn.present()?) };
        let place = match pfn.is_device() {
            true => Place::Device,
            false => Place::Ram,
        };
        Some((page, place))
    }
}
