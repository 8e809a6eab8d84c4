// SPDX-License-Identifier: GPL-2.0
//! Error: E0521
//! Hazard: 6
//! The proof of a page that is exclusive is kept, for when it is exclusive no more.

#![forbid(unsafe_code)]

use hmm::{ExclusivePage, FaultBuf, Mirror};
use kernel::prelude::*;

pub fn keep<'a>(
    mirror: &Mirror,
    va: usize,
    buf: &mut FaultBuf,
    kept: &mut Option<&'a ExclusivePage<'a>>,
) -> Result {
    mirror.mm()?.make_exclusive(va, buf, |page| *kept = Some(page))
}
