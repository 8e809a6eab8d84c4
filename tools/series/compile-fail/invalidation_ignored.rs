// SPDX-License-Identifier: GPL-2.0
//! Error: E0308
//! Hazard: 6
//! A driver returns from the callback without saying that it is done.

#![forbid(unsafe_code)]

use hmm::{Invalidate, Invalidated, MirrorOps};

pub struct Ops;

impl MirrorOps for Ops {
    fn invalidate<'op>(&self, _event: Invalidate<'op>) -> Invalidated<'op> {}
}
