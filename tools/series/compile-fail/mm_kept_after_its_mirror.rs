// SPDX-License-Identifier: GPL-2.0
//! Error: E0505
//! Hazard: 8
//! The address space of a mirror that has ended is used.

#![forbid(unsafe_code)]

use hmm::{Access, FaultBuf, FaultRequest, Mirror, PageRange};
use kernel::prelude::*;

pub fn go_on(mirror: Mirror, mut buf: FaultBuf, range: PageRange) -> Result {
    let mm = mirror.mm()?;
    drop(mirror);
    mm.fault(FaultRequest::new(range, Access::Read), &mut buf, |_| ())
}
