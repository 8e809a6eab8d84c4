// SPDX-License-Identifier: GPL-2.0
//! Error: E0451
//! Hazard: 1
//! A driver makes the proof of a writable page by itself.

#![forbid(unsafe_code)]

use core::marker::PhantomData;
use hmm::WritePage;

pub fn forge(va: usize) -> WritePage<'static> {
    WritePage {
        va,
        order: 0,
        is_remote: false,
        _commit: PhantomData,
    }
}
