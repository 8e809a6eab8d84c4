// SPDX-License-Identifier: GPL-2.0
//! Error: E0308
//! Hazard: 1
//! A page that may only be read is mapped for the device to write.

#![forbid(unsafe_code)]

use hmm::{ReadPage, WritePage};

pub fn map_writable(page: &WritePage<'_>) -> usize {
    page.va()
}

pub fn map(page: &ReadPage<'_>) -> usize {
    map_writable(page)
}
