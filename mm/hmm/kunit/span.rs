// SPDX-License-Identifier: GPL-2.0

//! Tests of `span.rs`.

use super::super::{
    commit::Commit,
    range::PageRange,
    span::{
        Location,
        Span, //
    }, //
};
use kernel::{
    bindings,
    dma::DmaAddress,
    page::PAGE_SIZE,
    prelude::*, //
};

/// The addresses of the process, where the device finds the pages, and whether it may write.
pub(super) fn parts(span: &Span<'_>) -> (PageRange, Location, bool) {
    match span {
        Span::Read(span) => (span.range(), span.location(), false),
        Span::Write(span) => (span.range(), span.location(), true),
    }
}

/// The DMA address, if it is one.
pub(super) fn bus(location: Location) -> Option<DmaAddress> {
    match location {
        Location::Bus(address) => Some(address),
        #[cfg(CONFIG_RUST_HMM_DEVICE)]
        Location::Device(_) => None,
    }
}

#[kunit_tests(hmm_span)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_as_long_as_possible() -> Result {
        const VALID: usize = bindings::hmm_pfn_flags_HMM_PFN_VALID;
        const WRITE: usize = VALID | bindings::hmm_pfn_flags_HMM_PFN_WRITE;
        let pages = PAGE_SIZE as DmaAddress;
        let window = PageRange::from_len(8 * PAGE_SIZE, 8 * PAGE_SIZE)?;
        let pfns = [VALID, VALID, WRITE, WRITE, WRITE, 0, WRITE, VALID];
        let addresses = [7, 8, 9, 10, 3, 4, 5, 6].map(|page| page * pages);
        let commit = Commit::new(window, None, &pfns, &addresses);
        let mut spans = commit.spans();
        for (first, len, is_write, at) in [
            (0, 2, false, 7),
            (2, 2, true, 9),
            (4, 1, true, 3),
            (6, 1, true, 5),
            (7, 1, false, 6),
        ] {
            let (range, location, writable) = parts(&spans.next().ok_or(ENOENT)?);
            let start = window.start() + first * PAGE_SIZE;
            assert!(range == PageRange::from_len(start, len * PAGE_SIZE)?);
            assert_eq!(bus(location), Some(at * pages));
            assert_eq!(writable, is_write);
        }
        assert!(spans.next().is_none());
        Ok(())
    }
}
