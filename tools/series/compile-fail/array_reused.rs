// SPDX-License-Identifier: GPL-2.0
//! Error: E0616
//! Hazard: 7
//! A driver looks at, or keeps, what an attempt left in the array.

#![forbid(unsafe_code)]

use hmm::FaultBuf;

pub fn first(buf: &FaultBuf) -> usize {
    buf.pfns[0]
}
