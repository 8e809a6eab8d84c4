// SPDX-License-Identifier: GPL-2.0
//! The control: what a driver does, and what the other cases do wrong. It must compile.

#![forbid(unsafe_code)]

use hmm::{
    Access, Commit, Entry, FaultBuf, FaultRequest, Invalidate, Invalidated, Mirror, MirrorOps,
    PageRange, Ram, WritePage,
};
use kernel::{prelude::*, sync::Arc};

pub struct Ops;

impl MirrorOps for Ops {
    fn invalidate<'op>(&self, event: Invalidate<'op>) -> Invalidated<'op> {
        event.done()
    }
}

pub fn map_writable(page: &WritePage<'_>) -> usize {
    page.va()
}

pub fn fault(mirror: &Mirror, buf: &mut FaultBuf, range: PageRange) -> Result<usize> {
    mirror.fault(
        FaultRequest::new(range, Access::Write),
        buf,
        |commit: &Commit<'_>| {
            commit
                .entries()
                .filter_map(|(_, entry)| match entry {
                    Entry::Ram(Ram::Write(page)) => Some(map_writable(&page)),
                    _ => None,
                })
                .count()
        },
    )
}

pub fn open() -> Result<Mirror> {
    Mirror::new(Arc::new(Ops, GFP_KERNEL)?)
}
