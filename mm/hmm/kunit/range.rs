// SPDX-License-Identifier: GPL-2.0

//! Tests of `range.rs`.

use super::super::{
    range::PageRange, //
};
use kernel::{
    page::{
        PAGE_SHIFT,
        PAGE_SIZE, //
    },
    prelude::*, //
};

const LAST_PAGE: usize = usize::MAX - (PAGE_SIZE - 1);

#[kunit_tests(hmm_range)]
mod tests {
    use super::*;

    #[test]
    fn unaligned_empty_or_reversed_is_einval() {
        assert!(PageRange::new(1, PAGE_SIZE) == Err(EINVAL));
        assert!(PageRange::new(0, PAGE_SIZE + 1) == Err(EINVAL));
        assert!(PageRange::new(PAGE_SIZE, PAGE_SIZE) == Err(EINVAL));
        assert!(PageRange::new(2 * PAGE_SIZE, PAGE_SIZE) == Err(EINVAL));
        assert!(PageRange::new(0, 0) == Err(EINVAL));
        assert!(PageRange::from_len(PAGE_SIZE, 0) == Err(EINVAL));
        assert!(PageRange::from_len(1, PAGE_SIZE) == Err(EINVAL));
        assert!(PageRange::from_len(0, 1) == Err(EINVAL));
        assert!(PageRange::containing(0, 0) == Err(EINVAL));
        assert!(PageRange::containing(usize::MAX, 0) == Err(EINVAL));
    }

    #[test]
    fn a_range_that_wraps_is_einval() {
        assert!(PageRange::from_len(LAST_PAGE, PAGE_SIZE) == Err(EINVAL));
        assert!(PageRange::from_len(LAST_PAGE, 2 * PAGE_SIZE) == Err(EINVAL));
        assert!(PageRange::containing(usize::MAX, 1) == Err(EINVAL));
        assert!(PageRange::containing(usize::MAX, usize::MAX) == Err(EINVAL));
        assert!(PageRange::containing(LAST_PAGE - 1, 2) == Err(EINVAL));
        assert!(PageRange::containing(LAST_PAGE - 1, 1).is_ok());
    }

    #[test]
    fn containing_rounds_outwards() -> Result {
        let range = PageRange::containing(PAGE_SIZE - 1, 2)?;
        assert_eq!(range.start(), 0);
        assert_eq!(range.end(), 2 * PAGE_SIZE);
        assert_eq!(range.pages(), 2);
        assert_eq!(PageRange::containing(PAGE_SIZE, PAGE_SIZE)?.pages(), 1);
        assert!(PageRange::containing(PAGE_SIZE, 0) == Err(EINVAL));
        Ok(())
    }

    #[test]
    fn a_block_is_aligned_to_its_order() -> Result {
        let block = PageRange::aligned_block(5 * PAGE_SIZE + 7, 2)?;
        assert_eq!(block.start(), 4 * PAGE_SIZE);
        assert_eq!(block.pages(), 4);
        let largest = usize::BITS - 2 - PAGE_SHIFT as u32;
        assert!(PageRange::aligned_block(0, largest).is_ok());
        assert!(PageRange::aligned_block(0, largest + 1) == Err(EINVAL));
        assert!(PageRange::aligned_block(0, usize::BITS) == Err(EINVAL));
        assert!(PageRange::aligned_block(0, u32::MAX) == Err(EINVAL));
        assert!(PageRange::aligned_block(LAST_PAGE, 2) == Err(EINVAL));
        Ok(())
    }

    #[test]
    fn intersections_stay_inside_both() -> Result {
        let a = PageRange::from_len(PAGE_SIZE, 4 * PAGE_SIZE)?;
        let b = PageRange::from_len(3 * PAGE_SIZE, 8 * PAGE_SIZE)?;
        let both = PageRange::new(3 * PAGE_SIZE, 5 * PAGE_SIZE)?;
        assert!(a.intersect(&b) == Some(both));
        assert!(b.intersect(&a) == Some(both));
        let next = PageRange::from_len(a.end(), PAGE_SIZE)?;
        assert!(a.intersect(&next).is_none());
        Ok(())
    }

    #[test]
    fn the_end_is_not_contained() -> Result {
        let range = PageRange::from_len(PAGE_SIZE, 2 * PAGE_SIZE)?;
        assert!(!range.contains(PAGE_SIZE - 1));
        assert!(range.contains(PAGE_SIZE));
        assert!(range.contains(range.end() - 1));
        assert!(!range.contains(range.end()));
        assert_eq!(range.index_of(range.end() - 1), Some(1));
        assert_eq!(range.index_of(range.end()), None);
        assert_eq!(range.page_addrs().count(), 2);
        Ok(())
    }
}
