// SPDX-License-Identifier: GPL-2.0

//! Prevents deadlocks while the core calls a driver.
//!
//! The methods and closures of a driver run with locks of mm or of the core held. A page fault, or
//! a call of the core for any mirror or pool, might take one of these locks again and deadlock. So
//! the core disables page faults for the task while it calls the driver, as `gfs2` and `btrfs` do
//! for direct I/O under their locks. An access to user memory that is not present fails then. Each
//! function of the core that takes such a lock first checks whether page faults are disabled. If
//! so, it fails with [`EDEADLK`] or a [`Miss`](super::Miss), or leaves the work to another task.

use kernel::{
    bindings,
    prelude::*,
    types::NotThreadSafe, //
};

/// Marks a call of a driver by the core, from [`Callback::begin`] until the value is dropped.
pub(crate) struct Callback(NotThreadSafe);

impl Callback {
    pub(crate) fn begin() -> Self {
        // SAFETY: Always safe to call; `drop()` calls `pagefault_enable()`, in the same task.
        unsafe { bindings::pagefault_disable() };
        Self(NotThreadSafe)
    }

    /// Whether the core is calling a driver in the current task. Also true if other code has
    /// disabled page faults for the task.
    pub(crate) fn is_running() -> bool {
        // SAFETY: Always safe to call.
        unsafe { bindings::pagefault_disabled() }
    }

    /// Functions that a driver may not call from its callbacks call this first.
    ///
    /// # Errors
    ///
    /// [`EDEADLK`] while the core calls a driver.
    pub(crate) fn refuse() -> Result {
        match Self::is_running() {
            true => Err(EDEADLK),
            false => Ok(()),
        }
    }
}

impl Drop for Callback {
    fn drop(&mut self) {
        // SAFETY: `pagefault_disable()` was called in `begin()`, by this task.
        unsafe { bindings::pagefault_enable() };
    }
}
