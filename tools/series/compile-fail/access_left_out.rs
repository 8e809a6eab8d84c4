// SPDX-License-Identifier: GPL-2.0
//! Error: E0061
//! Hazard: 15
//! The access of a fault is left to what the last one was.

#![forbid(unsafe_code)]

use hmm::{FaultRequest, PageRange};

pub fn again(range: PageRange) -> FaultRequest {
    FaultRequest::new(range)
}
