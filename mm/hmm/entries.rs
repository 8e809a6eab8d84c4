// SPDX-License-Identifier: GPL-2.0

//! The entry store of a region: what the device may see at each page.
//!
//! Lives under the region's lock. It holds no page references: an entry is good for as long as the
//! lock is held, since the notifier erases it before mm lets the page go. Nothing here allocates
//! under the lock; a leaf is brought along by whoever installs entries.

use super::{
    pfn::{
        Access,
        Pfn, //
    },
    pool::Pool,
    range::PageRange,
};
use kernel::{
    bindings,
    page::{
        PAGE_MASK,
        PAGE_SIZE, //
    },
    prelude::*, //
};
use pin_init::init_zeroed;

/// The number of pages of a leaf is `2^LEAF_ORDER`: a leaf takes a page, and its pages are 2 MiB
/// where pages have 4 KiB.
pub(crate) const LEAF_ORDER: u32 = (PAGE_SIZE / size_of::<Pfn>()).ilog2();

const LEAF_PAGES: usize = 1 << LEAF_ORDER;
const LEAF_BYTES: usize = PAGE_SIZE << LEAF_ORDER;

/// The entries of an aligned block of [`LEAF_PAGES`] pages.
#[derive(Zeroable)]
pub(crate) struct Leaf([Pfn; LEAF_PAGES]);

impl Leaf {
    /// A leaf without an entry: [`Pfn::NONE`] is zero.
    pub(crate) fn new() -> Result<KBox<Self>> {
        // In place: it is too large for a stack.
        KBox::init(init_zeroed(), GFP_KERNEL_ACCOUNT)
    }

    fn is_empty(&self) -> bool {
        self.0.iter().all(|pfn| *pfn == Pfn::NONE)
    }
}

/// Where a page is.
#[derive(Copy, Clone, PartialEq, Eq)]
enum Place {
    Ram,
    Device,
}

/// The entries of a region.
///
/// # Invariants
///
/// Every entry of a leaf but [`Pfn::NONE`] was reported by `hmm_range_fault()`, and was not
/// invalidated since. It says that the page is the device's where it is one of a pool, and nowhere
/// else; any other page is in the kernel's direct map.
pub(crate) struct Entries {
    range: PageRange,
    leaves: KVec<Option<KBox<Leaf>>>,
}

impl Entries {
    /// Creates an empty store. `range` is a multiple of a leaf.
    pub(crate) fn new(range: PageRange) -> Result<Self> {
        let leaves = range.len() / LEAF_BYTES;
        let mut this = Self {
            range,
            leaves: KVec::with_capacity(leaves, GFP_KERNEL_ACCOUNT)?,
        };
        for _ in 0..leaves {
            this.leaves.push(None, GFP_KERNEL_ACCOUNT)?;
        }
        Ok(this)
    }

    /// How many leaves there are.
    #[cfg(CONFIG_RUST_HMM_KUNIT_TEST)]
    pub(crate) fn leaves(&self) -> usize {
        self.leaves.iter().flatten().count()
    }

    /// The position of `va`: its leaf, and the page in it.
    fn position(&self, va: usize) -> Option<(usize, usize)> {
        let page = self.range.index_of(va)?;
        Some((page / LEAF_PAGES, page % LEAF_PAGES))
    }

    fn get(&self, va: usize) -> Pfn {
        let Some((leaf, page)) = self.position(va) else {
            return Pfn::NONE;
        };
        match self.leaves.get(leaf) {
            Some(Some(leaf)) => leaf.0[page],
            _ => Pfn::NONE,
        }
    }

    /// Replaces the entries of `range`, which lies in one leaf; `pfns` has one element a page.
    ///
    /// What is no page replaces nothing. Where there is an entry it was not invalidated, so the
    /// page is exclusive to the device, which mm reports as a hole.
    ///
    /// Takes `spare` if that leaf does not exist yet, and gives it back if it stays empty.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`] if the leaf does not exist and there is no spare one, [`EINVAL`] if `range` is
    /// not of this region or reaches past its leaf. Nothing is changed then.
    ///
    /// # Safety
    ///
    /// `hmm_range_fault()` reported `pfns` for `range`, and no invalidation collided with it since:
    /// the region's lock is held for write and `mmu_interval_read_retry()` returned false under it.
    /// Those that [`Pool::owns`] says are of a pool are marked so, and the others are in the direct
    /// map.
    pub(crate) unsafe fn install(
        &mut self,
        range: PageRange,
        pfns: impl Iterator<Item = Pfn>,
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
            // INVARIANT: By the safety requirements.
            *slot = pfn;
        }
        if leaf.is_empty() {
            *spare = place.take();
        }
        Ok(())
    }

    /// Erases the entries of `range`, and frees the leaves that have none any more, so that memory
    /// which a process has unmapped costs no more than its region. Returns how many there were.
    pub(crate) fn erase(&mut self, range: PageRange) -> usize {
        let mut erased = 0;
        let mut va = range.start();
        while va < range.end() {
            let Some((leaf, page)) = self.position(va) else {
                break;
            };
            let pages = (LEAF_PAGES - page).min((range.end() - va) / PAGE_SIZE);
            if let Some(slot) = self.leaves.get_mut(leaf) {
                if let Some(leaf) = slot {
                    let pfns = &mut leaf.0[page..page + pages];
                    erased += pfns.iter().filter(|pfn| **pfn != Pfn::NONE).count();
                    pfns.fill(Pfn::NONE);
                }
                slot.take_if(|leaf| leaf.is_empty());
            }
            va += pages * PAGE_SIZE;
        }
        erased
    }

    /// Copies from the page of `va` to `buf`, which does not reach past that page.
    ///
    /// Returns `false`, and copies nothing, if there is no entry to read.
    #[must_use]
    pub(crate) fn read(&self, va: usize, buf: &mut [u8]) -> bool {
        let Some((page, place)) = self.page(va, buf.len(), Access::Read) else {
            return false;
        };
        if place == Place::Device {
            // SAFETY: The page is one of the device, by the type invariants, and as below.
            unsafe { Pool::read(page, va & !PAGE_MASK, buf) };
            return true;
        }
        // SAFETY:
        // - `page()` checked that the bytes lie in one page, and that the page may be read: it is
        //   mapped by the process and stays so while the lock is held, since the notifier takes the
        //   lock for write before mm unmaps it.
        // - The kernel can reach it, by the type invariants.
        // - `buf` is valid for writes of its length.
        // - The process and other devices may write the page meanwhile. C copies the bytes, and
        //   they are only bytes: whatever is torn is torn by the program's own race.
        unsafe {
            bindings::memcpy_from_page(buf.as_mut_ptr().cast(), page, va & !PAGE_MASK, buf.len())
        };
        true
    }

    /// Copies `buf` to the page of `va`, past which it does not reach.
    ///
    /// Returns `false`, and copies nothing, if there is no entry to write.
    #[must_use]
    pub(crate) fn write(&self, va: usize, buf: &[u8]) -> bool {
        let Some((page, place)) = self.page(va, buf.len(), Access::Write) else {
            return false;
        };
        let offset = va & !PAGE_MASK;
        match place {
            // SAFETY: As in `read()`, with `Access::Write`.
            Place::Device => unsafe { Pool::write(page, offset, buf) },
            // SAFETY: As in `read()`, with `Access::Write`; `buf` is valid for reads of its length.
            Place::Ram => unsafe {
                bindings::memcpy_to_page(page, offset, buf.as_ptr().cast(), buf.len())
            },
        }
        // A writable PTE may be clean (a page read from swap, say): without this, reclaim would
        // drop what the device wrote. The page cannot be truncated while the lock is held, so the
        // page lock is not needed, as under a page table's lock.
        //
        // SAFETY: The page is valid, as above.
        unsafe { bindings::folio_mark_dirty(bindings::page_folio(page)) };
        true
    }

    /// The page at `va`, if `len` bytes from there lie in it and there is an entry for `access`.
    fn page(&self, va: usize, len: usize, access: Access) -> Option<(*mut bindings::page, Place)> {
        let pfn = self.get(va);
        if (va & !PAGE_MASK) + len > PAGE_SIZE || !pfn.allows(access) {
            return None;
        }
        // SAFETY: By the type invariants, the entry was reported by `hmm_range_fault()`, with
        // HMM_PFN_VALID since access is allowed.
        let page = unsafe { bindings::hmm_pfn_to_page(pfn.present()?) };
        let place = match pfn.is_device() {
            true => Place::Device,
            false => Place::Ram,
        };
        Some((page, place))
    }
}
