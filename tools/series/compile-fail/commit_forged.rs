// SPDX-License-Identifier: GPL-2.0
//! Error: E0451
//! Hazard: 6
//! A driver commits without a check of the sequence.

#![forbid(unsafe_code)]

use hmm::{Commit, PageRange};

pub fn forge(window: PageRange) -> Commit<'static> {
    Commit {
        window,
        needed: Some(window),
        pfns: &[],
        addresses: &[],
    }
}
