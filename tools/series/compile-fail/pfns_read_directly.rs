// SPDX-License-Identifier: GPL-2.0
//! Error: E0616
//! Hazard: 5
//! A driver decodes the raw output, with its map order, by itself.

#![forbid(unsafe_code)]

use hmm::Commit;

pub fn order(commit: &Commit<'_>) -> usize {
    commit.pfns[0] >> 53
}
