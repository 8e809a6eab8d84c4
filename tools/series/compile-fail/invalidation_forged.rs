// SPDX-License-Identifier: GPL-2.0
//! Error: E0451
//! Hazard: 6
//! A driver makes the answer to an invalidation by itself.

#![forbid(unsafe_code)]

use core::marker::PhantomData;
use hmm::{Invalidate, Invalidated, MirrorOps};

pub struct Ops;

impl MirrorOps for Ops {
    fn invalidate<'op>(&self, _event: Invalidate<'op>) -> Invalidated<'op> {
        Invalidated {
            flush: None,
            _op: PhantomData,
        }
    }
}
