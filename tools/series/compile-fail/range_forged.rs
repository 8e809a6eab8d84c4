// SPDX-License-Identifier: GPL-2.0
//! Error: E0451
//! Hazard: 4
//! A range that is not aligned, or whose units are mixed up.

#![forbid(unsafe_code)]

use hmm::PageRange;

pub fn pages(first: usize, count: usize) -> PageRange {
    PageRange {
        start: first,
        end: first + count,
    }
}
