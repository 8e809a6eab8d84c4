// SPDX-License-Identifier: GPL-2.0

//! Replaces `pool.rs` if `CONFIG_RUST_HMM_DEVICE` is not set. There are no pools then, and no page
//! belongs to one.

use kernel::{
    bindings,
    prelude::*,
    sync::Arc, //
};

/// A pool. The type has no values.
pub(crate) enum Pool {}

impl Pool {
    /// The `owner` of the pages of a pool. Null, since there is no pool.
    pub(crate) fn owner(_this: Option<&Arc<Self>>) -> *mut c_void {
        core::ptr::null_mut()
    }

    /// Whether `page` belongs to the pool that has this `owner`. Always false.
    ///
    /// # Safety
    ///
    /// Always safe to call. It is unsafe only because its counterpart in `pool.rs` is.
    pub(crate) unsafe fn owns(_owner: *mut c_void, _page: *mut bindings::page) -> bool {
        false
    }

    /// Whether `page` belongs to a pool whose device is lost. Always false.
    ///
    /// # Safety
    ///
    /// Always safe to call. It is unsafe only because its counterpart in `pool.rs` is.
    pub(crate) unsafe fn is_lost_page(_page: *mut bindings::page) -> bool {
        false
    }

    /// Never called, since no page belongs to a pool.
    ///
    /// # Safety
    ///
    /// `_page` must belong to a pool.
    pub(crate) unsafe fn address(_page: *mut bindings::page) -> usize {
        0
    }

    /// Never called, since no page belongs to a pool.
    ///
    /// # Safety
    ///
    /// The page must belong to a pool.
    pub(crate) unsafe fn read(_: *mut bindings::page, _offset: usize, _buf: &mut [u8]) -> bool {
        false
    }

    /// Never called, since no page belongs to a pool.
    ///
    /// # Safety
    ///
    /// The same as for [`Pool::read`].
    pub(crate) unsafe fn write(_: *mut bindings::page, _offset: usize, _buf: &[u8]) -> bool {
        false
    }
}
