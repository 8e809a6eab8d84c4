// SPDX-License-Identifier: GPL-2.0

//! Tests of `dma.rs`, by way of the store of entries.

use super::super::{
    dma::Dma,
    entries::{
        Entries,
        Leaf,
        LEAF_ORDER, //
    },
    pfn::HmmPfn,
    range::PageRange, //
};
use kernel::{
    bindings,
    device::{
        Bound,
        Device, //
    },
    dma::DmaAddress,
    error::to_result,
    faux,
    page::{
        Page,
        PAGE_SHIFT,
        PAGE_SIZE, //
    },
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc, //
    }, //
};

const LEAF_BYTES: usize = PAGE_SIZE << LEAF_ORDER;
const VALID: usize = bindings::hmm_pfn_flags_HMM_PFN_VALID;
const WRITE: usize = bindings::hmm_pfn_flags_HMM_PFN_WRITE;

/// The device, whose driver is bound.
pub(super) fn bound(faux: &faux::Registration) -> &Device<Bound> {
    faux.as_ref().as_ref()
}

/// A device on a bus that reaches the addresses up to `limit`, or all if this is zero.
pub(super) fn device(limit: u64) -> Result<faux::Registration> {
    let faux = faux::Registration::new(c"hmm_dma_kunit", None)?;
    let dev = bound(&faux);
    // SAFETY: Nobody maps memory for the new device yet.
    unsafe {
        let raw = dev.as_raw();
        (*raw).dma_mask = &raw mut (*raw).coherent_dma_mask;
        (*raw).bus_dma_limit = limit;
        to_result(bindings::dma_set_mask(raw, u64::MAX))?;
    }
    Ok(faux)
}

/// The page at a DMA address. The devices of these tests have no IOMMU.
pub(super) fn page_at(address: DmaAddress) -> *mut bindings::page {
    // SAFETY: The address is that of a page of system memory.
    unsafe { bindings::pfn_to_page(address as usize >> PAGE_SHIFT) }
}

/// Whether the page at a DMA address, which is a folio by itself, is dirty.
pub(super) fn is_dirty(address: DmaAddress) -> bool {
    // SAFETY: The page is in use.
    let flags = unsafe { (&raw const (*page_at(address)).flags.f).read_volatile() };
    flags & 1 << bindings::pageflags_PG_dirty != 0
}

/// Entries for two leaves, a device, and pages that stand in for those of a process.
struct Setup {
    // Dropped first: what is mapped must be unmapped while the driver is bound.
    entries: Entries,
    dma: Arc<Dma>,
    pages: KVec<Page>,
    _faux: faux::Registration,
}

const PAGES: usize = 4;
const RANGE: Result<PageRange> = PageRange::from_len(LEAF_BYTES, 2 * LEAF_BYTES);

impl Setup {
    fn new() -> Result<Self> {
        let faux = device(0)?;
        let mut pages = KVec::with_capacity(PAGES, GFP_KERNEL)?;
        for _ in 0..PAGES {
            pages.push(Page::alloc_page(GFP_KERNEL)?, GFP_KERNEL)?;
        }
        Ok(Self {
            entries: Entries::new(RANGE?)?.with_maps()?,
            dma: Dma::new(bound(&faux))?,
            pages,
            _faux: faux,
        })
    }

    /// Maps the pages from `first` on with `flags`, and installs their entries if `install` says
    /// so.
    fn map(&mut self, first: usize, flags: usize, install: bool) -> Result<PageRange> {
        let pages = &self.pages[first..];
        // SAFETY: The pages are valid.
        let pfn = |page: &Page| unsafe { bindings::page_to_pfn(page.as_ptr()) } | flags;
        let pfns = pages.iter().map(|page| HmmPfn::from_output(pfn(page)));
        let start = RANGE?.start() + first * PAGE_SIZE;
        let range = PageRange::from_len(start, pages.len() * PAGE_SIZE)?;

        let bound = Dma::stay_bound(&self.dma)?;
        let mut map = match self.entries.has_map(range.start()) {
            true => None,
            false => Some(Entries::new_map(&bound)?),
        };
        // SAFETY: The setup keeps the pages, and there is no notifier.
        unsafe { self.entries.map(range, pfns.clone(), &mut map) }?;
        if install {
            // SAFETY: The same, and the pages are in the direct map.
            unsafe { self.entries.install(range, pfns, &mut Some(Leaf::new()?)) }?;
        }
        Ok(range)
    }

    /// Where the device finds a page.
    fn address(&self, page: usize) -> Option<DmaAddress> {
        self.entries.address(RANGE.ok()?.start() + page * PAGE_SIZE)
    }

    /// Erases the entries of `range`, and ends the mappings.
    fn unmap(&mut self, range: PageRange) {
        self.entries.erase(range);
        // SAFETY: The setup keeps the pages.
        unsafe { self.entries.unmap(range) };
    }
}

impl Drop for Setup {
    fn drop(&mut self) {
        if let Ok(range) = RANGE {
            self.unmap(range);
        }
    }
}

#[kunit_tests(hmm_dma)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_needs_bounce_buffers_is_refused() -> Result {
        let faux = device(1 << 24)?;
        assert_eq!(Dma::new(bound(&faux)).err(), Some(EOPNOTSUPP));
        Ok(())
    }

    #[test]
    fn a_page_keeps_its_address_until_it_is_unmapped() -> Result {
        let mut setup = Setup::new()?;
        let range = setup.map(1, VALID, true)?;
        assert_eq!(setup.entries.mapped(), PAGES - 1);
        assert!(setup.address(0).is_none());
        for (index, page) in setup.pages.iter().enumerate().skip(1) {
            let address = setup.address(index).ok_or(ENOENT)?;
            assert_eq!(page_at(address), page.as_ptr());
        }
        let before = setup.address(2);
        setup.map(0, VALID | WRITE, true)?;
        assert_eq!(setup.entries.mapped(), PAGES);
        assert_eq!(setup.address(2), before);
        setup.unmap(range);
        assert_eq!(setup.entries.mapped(), 1);
        assert!(setup.address(2).is_none());
        Ok(())
    }

    #[test]
    fn only_pages_without_an_entry_are_unmapped() -> Result {
        let mut setup = Setup::new()?;
        let range = setup.map(0, VALID, true)?;
        // SAFETY: The setup keeps the pages.
        unsafe { setup.entries.unmap(range) };
        assert_eq!(setup.entries.mapped(), PAGES);
        let first = PageRange::from_len(range.start(), PAGE_SIZE)?;
        setup.entries.erase(first);
        assert_eq!(setup.entries.mapped(), PAGES);
        // SAFETY: The setup keeps the pages.
        unsafe { setup.entries.unmap(range) };
        assert_eq!(setup.entries.mapped(), PAGES - 1);
        // What a fault that has failed leaves behind.
        setup.map(0, VALID, false)?;
        assert_eq!(setup.entries.mapped(), PAGES);
        // SAFETY: The setup keeps the pages.
        unsafe { setup.entries.unmap(range) };
        assert_eq!(setup.entries.mapped(), PAGES - 1);
        Ok(())
    }

    #[test]
    fn what_was_writable_at_any_time_becomes_dirty() -> Result {
        let mut setup = Setup::new()?;
        let all = setup.map(0, VALID | WRITE, true)?;
        let rest = setup.map(2, VALID, true)?;
        let addresses = [0, 1, 2, 3].map(|page| setup.address(page));
        let dirty = |page: usize| addresses[page].map(is_dirty);
        assert_eq!(dirty(0), Some(false));
        setup.unmap(rest);
        assert_eq!([dirty(0), dirty(1)], [Some(false); 2]);
        assert_eq!([dirty(2), dirty(3)], [Some(true); 2]);
        setup.unmap(all);
        assert_eq!([dirty(0), dirty(1)], [Some(true); 2]);
        Ok(())
    }

    #[test]
    fn what_was_only_read_stays_clean() -> Result {
        let mut setup = Setup::new()?;
        let all = setup.map(0, VALID, true)?;
        let address = setup.address(0).ok_or(ENOENT)?;
        setup.unmap(all);
        assert!(!is_dirty(address));
        Ok(())
    }

    #[test]
    fn without_room_nothing_is_mapped() -> Result {
        let mut setup = Setup::new()?;
        let range = RANGE?;
        // SAFETY: The page is not used.
        let result = unsafe {
            let pfns = core::iter::once(HmmPfn::from_output(VALID | 1));
            let page = PageRange::from_len(range.start(), PAGE_SIZE)?;
            setup.entries.map(page, pfns, &mut None)
        };
        assert_eq!(result.err(), Some(ENOMEM));
        assert_eq!(setup.entries.mapped(), 0);
        Ok(())
    }

    #[test]
    fn when_the_driver_is_unbound_each_region_is_detached_once() -> Result {
        let setup = Setup::new()?;
        let dma = &setup.dma;
        for key in [1, 2, 3] {
            dma.add_region(key)?;
        }
        let unmapped = Atomic::new(0);
        dma.remove_region(2, || unmapped.store(2, Relaxed));
        assert_eq!(unmapped.load(Relaxed), 2);
        drop(Dma::stay_bound(dma)?);

        let detached = Atomic::new(0);
        dma.close(|key| detached.add(key as u64, Relaxed));
        assert_eq!(detached.load(Relaxed), 1 + 3);
        assert!(Dma::stay_bound(dma).err() == Some(ENODEV));
        assert_eq!(dma.add_region(4).err(), Some(ENODEV));
        // It was detached.
        dma.remove_region(1, || unmapped.store(1, Relaxed));
        assert_eq!(unmapped.load(Relaxed), 2);
        Ok(())
    }
}
