// SPDX-License-Identifier: GPL-2.0
//! Error: E0277
//! Hazard: 18
//! What a callback uses is not safe to use from the task that reclaims memory.

#![forbid(unsafe_code)]

use core::cell::Cell;
use hmm::{Invalidate, Invalidated, MirrorOps};

pub struct Ops(Cell<usize>);

impl MirrorOps for Ops {
    fn invalidate<'op>(&self, event: Invalidate<'op>) -> Invalidated<'op> {
        self.0.set(self.0.get() + 1);
        event.done()
    }
}
