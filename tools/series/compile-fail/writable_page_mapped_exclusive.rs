// SPDX-License-Identifier: GPL-2.0
//! Error: E0308
//! Hazard: 17
//! A page that the CPU may write too is mapped for atomic operations.

#![forbid(unsafe_code)]

use hmm::{Commit, Entry, ExclusivePage, RamPage};

fn map_exclusive(_page: &ExclusivePage<'_>) {}

pub fn map(commit: &Commit<'_>) {
    for (_, entry) in commit.entries() {
        if let Entry::Ram(RamPage::Write(page)) = entry {
            map_exclusive(&page);
        }
    }
}
