// SPDX-License-Identifier: GPL-2.0
//! Error: lifetime may not live long enough
//! Hazard: 6
//! A DMA address is kept as proven, after the lock is released under which it is valid.

#![forbid(unsafe_code)]

use hmm::{Access, FaultBuf, FaultRequest, Mirror, PageRange, Span, WriteSpan};
use kernel::prelude::*;

pub fn fault<'a>(
    mirror: &Mirror,
    buf: &'a mut FaultBuf,
    range: PageRange,
) -> Result<Option<WriteSpan<'a>>> {
    mirror.mm()?.fault(FaultRequest::new(range, Access::Write), buf, |commit| {
        commit.spans().find_map(|span| match span {
            Span::Write(span) => Some(span),
            Span::Read(_) => None,
        })
    })
}
