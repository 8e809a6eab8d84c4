// SPDX-License-Identifier: GPL-2.0

//! Tests of `entries.rs`.

use super::super::{
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
    page::{
        Page,
        PAGE_SIZE, //
    },
    prelude::*, //
};

const LEAF_BYTES: usize = PAGE_SIZE << LEAF_ORDER;
const VALID: usize = bindings::hmm_pfn_flags_HMM_PFN_VALID;
const WRITE: usize = bindings::hmm_pfn_flags_HMM_PFN_WRITE;

/// A kernel page that stands in for a page of a process.
fn page_with(byte: u8) -> Result<Page> {
    let page = Page::alloc_page(GFP_KERNEL | kernel::alloc::flags::__GFP_ZERO)?;
    // SAFETY: Nobody else uses the page, and the source has 8 bytes.
    unsafe { page.write_raw([byte; 8].as_ptr(), 0, 8) }?;
    Ok(page)
}

/// Installs `page` with `flags` at each page of `range`.
fn install(entries: &mut Entries, range: PageRange, page: &Page, flags: usize) -> Result {
    // SAFETY: The page is valid.
    let pfn = HmmPfn::from_output(unsafe { bindings::page_to_pfn(page.as_ptr()) } | flags);
    let mut spare = Some(Leaf::new()?);
    // SAFETY: The test keeps the pages until it has dropped the entries, and no invalidation can
    // collide because there is no notifier.
    unsafe { entries.install(range, core::iter::repeat(pfn), &mut spare) }
}

fn first_byte(entries: &Entries, va: usize) -> Option<u8> {
    let mut byte = [0; 1];
    entries.read(va, &mut byte).then_some(byte[0])
}

#[kunit_tests(hmm_entries)]
mod tests {
    use super::*;

    #[test]
    fn a_new_store_is_empty() -> Result {
        let range = PageRange::from_len(LEAF_BYTES, 4 * LEAF_BYTES)?;
        let entries = Entries::new(range)?;
        for va in range.page_addrs() {
            assert!(first_byte(&entries, va).is_none());
            assert!(!entries.write(va, &[1]));
        }
        Ok(())
    }

    #[test]
    fn reads_and_writes_reach_the_page() -> Result {
        let page = page_with(7)?;
        let range = PageRange::from_len(LEAF_BYTES, 2 * LEAF_BYTES)?;
        let mut entries = Entries::new(range)?;
        let va = range.start() + 5 * PAGE_SIZE;
        let one = PageRange::from_len(va, PAGE_SIZE)?;
        install(&mut entries, one, &page, VALID | WRITE)?;
        assert_eq!(first_byte(&entries, va), Some(7));
        assert!(entries.write(va, &[9]));
        assert_eq!(first_byte(&entries, va), Some(9));
        assert!(first_byte(&entries, va - 1).is_none());
        assert!(first_byte(&entries, va + PAGE_SIZE).is_none());
        Ok(())
    }

    #[test]
    fn a_read_only_entry_is_not_written() -> Result {
        let page = page_with(7)?;
        let range = PageRange::from_len(0, LEAF_BYTES)?;
        let mut entries = Entries::new(range)?;
        install(&mut entries, range, &page, VALID)?;
        assert!(!entries.write(PAGE_SIZE, &[9]));
        assert_eq!(first_byte(&entries, PAGE_SIZE), Some(7));
        Ok(())
    }

    #[test]
    fn erase_takes_exactly_the_range() -> Result {
        let page = page_with(7)?;
        let range = PageRange::from_len(0, 3 * LEAF_BYTES)?;
        let mut entries = Entries::new(range)?;
        for leaf in 0..3 {
            let leaf = PageRange::from_len(leaf * LEAF_BYTES, LEAF_BYTES)?;
            install(&mut entries, leaf, &page, VALID)?;
        }
        // From the last page of the first leaf to the first page of the last leaf: the middle leaf
        // is erased entirely.
        let gone = PageRange::new(LEAF_BYTES - PAGE_SIZE, 2 * LEAF_BYTES + PAGE_SIZE)?;
        assert_eq!(entries.erase(gone), gone.pages());
        assert_eq!(entries.erase(gone), 0);
        for va in range.page_addrs() {
            assert_eq!(first_byte(&entries, va).is_none(), gone.contains(va));
        }
        Ok(())
    }

    #[test]
    fn a_leaf_goes_with_its_last_entry() -> Result {
        let page = page_with(7)?;
        let range = PageRange::from_len(0, 2 * LEAF_BYTES)?;
        let mut entries = Entries::new(range)?;
        let two = PageRange::from_len(LEAF_BYTES, 2 * PAGE_SIZE)?;
        install(&mut entries, two, &page, VALID)?;
        assert_eq!(entries.leaves(), 1);
        entries.erase(PageRange::from_len(LEAF_BYTES, PAGE_SIZE)?);
        assert_eq!(entries.leaves(), 1);
        entries.erase(PageRange::from_len(LEAF_BYTES + PAGE_SIZE, PAGE_SIZE)?);
        assert_eq!(entries.leaves(), 0);
        Ok(())
    }

    #[test]
    fn install_replaces_and_needs_a_leaf() -> Result {
        let (old, new) = (page_with(1)?, page_with(2)?);
        let range = PageRange::from_len(0, LEAF_BYTES)?;
        let mut entries = Entries::new(range)?;
        let none = core::iter::empty();
        // SAFETY: The iterator is empty, so no pfn is installed.
        assert!(unsafe { entries.install(range, none, &mut None) } == Err(ENOMEM));
        install(&mut entries, range, &old, VALID)?;
        let one = PageRange::from_len(PAGE_SIZE, PAGE_SIZE)?;
        install(&mut entries, one, &new, VALID)?;
        assert_eq!(first_byte(&entries, 0), Some(1));
        assert_eq!(first_byte(&entries, PAGE_SIZE), Some(2));
        Ok(())
    }

    #[test]
    fn what_is_no_page_costs_no_leaf() -> Result {
        let range = PageRange::from_len(0, LEAF_BYTES)?;
        let mut entries = Entries::new(range)?;
        let pfns = (0..LEAF_BYTES / PAGE_SIZE).map(|n| match n % 2 {
            0 => HmmPfn::NONE,
            _ => HmmPfn::ERROR,
        });
        let mut spare = Some(Leaf::new()?);
        // SAFETY: None of the entries has a page, and there is no notifier.
        unsafe { entries.install(range, pfns, &mut spare) }?;
        assert_eq!(entries.leaves(), 0);
        assert!(spare.is_some());
        Ok(())
    }

    #[test]
    fn bytes_past_the_page_are_refused() -> Result {
        let page = page_with(7)?;
        let range = PageRange::from_len(0, LEAF_BYTES)?;
        let mut entries = Entries::new(range)?;
        install(&mut entries, range, &page, VALID | WRITE)?;
        let mut two = [0; 2];
        assert!(!entries.read(PAGE_SIZE - 1, &mut two));
        assert!(!entries.write(PAGE_SIZE - 1, &two));
        assert!(entries.read(PAGE_SIZE - 2, &mut two));
        Ok(())
    }

    #[test]
    fn a_write_marks_the_page_dirty() -> Result {
        // The page belongs to no file, so marking it dirty only sets the flag.
        let page = page_with(7)?;
        let range = PageRange::from_len(0, LEAF_BYTES)?;
        let mut entries = Entries::new(range)?;
        install(&mut entries, range, &page, VALID | WRITE)?;
        let dirty = |page: &Page| {
            // SAFETY: The page is valid; nobody changes its flags meanwhile.
            let flags = unsafe { (*page.as_ptr()).flags.f };
            flags & (1 << bindings::pageflags_PG_dirty) != 0
        };
        assert_eq!(first_byte(&entries, 0), Some(7));
        assert!(!dirty(&page));
        assert!(entries.write(0, &[9]));
        assert!(dirty(&page));
        Ok(())
    }
}
