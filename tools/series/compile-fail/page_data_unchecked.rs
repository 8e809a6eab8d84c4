// SPDX-License-Identifier: GPL-2.0
//! Error: E0200
//! Hazard: 2
//! A driver says itself how what it keeps for a page becomes a pointer.

use hmm::PageData;
use kernel::prelude::*;

pub struct Address(usize);

impl PageData for Address {
    type Borrowed<'a> = usize;

    fn into_raw(self) -> *mut c_void {
        self.0 as *mut c_void
    }

    unsafe fn borrow<'a>(raw: *mut c_void) -> usize {
        raw as usize
    }

    unsafe fn from_raw(raw: *mut c_void) -> Self {
        Self(raw as usize)
    }
}
