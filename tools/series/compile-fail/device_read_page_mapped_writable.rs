// SPDX-License-Identifier: GPL-2.0
//! Error: E0308
//! Hazard: 1
//! A page of the device that may only be read, after a fork, is mapped for writing.

#![forbid(unsafe_code)]

use hmm::{Commit, DevicePage, Entry, WritePage};

fn map_writable(_page: &WritePage<'_>) {}

pub fn map(commit: &Commit<'_>) {
    for (_, entry) in commit.entries() {
        if let Entry::Device(DevicePage::Read(page)) = entry {
            map_writable(&page);
        }
    }
}
