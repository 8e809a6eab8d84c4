// SPDX-License-Identifier: GPL-2.0

//! Stands in for `pool.rs` in a kernel without device memory: there is no pool, and so no page of
//! one.

use kernel::{
    bindings,
    prelude::*,
    sync::Arc, //
};

/// There is none.
pub(crate) enum Pool {}

impl Pool {
    pub(crate) fn owner(_this: Option<&Arc<Self>>) -> *mut c_void {
        core::ptr::null_mut()
    }

    /// # Safety
    ///
    /// None.
    pub(crate) unsafe fn owns(_owner: *mut c_void, _page: *mut bindings::page) -> bool {
        false
    }

    /// # Safety
    ///
    /// Never to be called: there is no page of a pool.
    pub(crate) unsafe fn read(_page: *mut bindings::page, _offset: usize, _buf: &mut [u8]) {}

    /// # Safety
    ///
    /// As for [`Pool::read`].
    pub(crate) unsafe fn write(_page: *mut bindings::page, _offset: usize, _buf: &[u8]) {}
}
