// SPDX-License-Identifier: GPL-2.0
//! Error: lifetime may not live long enough
//! Hazard: 6
//! A page is used after the lock is released under which its sequence was checked.

#![forbid(unsafe_code)]

use hmm::{Access, Entry, FaultBuf, FaultRequest, Mirror, PageRange, RamPage, WritePage};
use kernel::prelude::*;

pub fn fault<'a>(
    mirror: &Mirror,
    buf: &'a mut FaultBuf,
    range: PageRange,
) -> Result<Option<WritePage<'a>>> {
    mirror.mm()?.fault(FaultRequest::new(range, Access::Write), buf, |commit| {
        commit.entries().find_map(|(_, entry)| match entry {
            Entry::Ram(RamPage::Write(page)) => Some(page),
            _ => None,
        })
    })
}
