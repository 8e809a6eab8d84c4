// SPDX-License-Identifier: GPL-2.0
//! Error: lifetime may not live long enough
//! Hazard: 6
//! An invalidation is answered with that of another callback.

#![forbid(unsafe_code)]

use hmm::{Invalidate, Invalidated};

pub fn answer<'a, 'b>(_event: Invalidate<'a>, other: Invalidate<'b>) -> Invalidated<'a> {
    other.done()
}
