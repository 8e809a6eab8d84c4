// SPDX-License-Identifier: GPL-2.0

//! Whether the GPU has power.
//!
//! When the system goes to sleep, the GPU stops, and its memory loses its contents: see
//! [`Gpu`](super::gpu::Gpu). Whoever would let it work waits here until the system is awake. This
//! file uses no other file of the driver.

use kernel::{
    new_condvar,
    new_mutex,
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc,
        CondVar,
        Mutex, //
    }, //
};

#[pin_data]
pub(crate) struct Power {
    /// Written with the lock held.
    is_off: Atomic<bool>,
    #[pin]
    lock: Mutex<()>,
    #[pin]
    changed: CondVar,
}

impl Power {
    /// Creates the power of a GPU that is on.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`].
    pub(crate) fn new() -> Result<Arc<Self>> {
        Arc::pin_init(
            pin_init!(Self {
                is_off: Atomic::new(false),
                lock <- new_mutex!((), "dummy_gpu::power"),
                changed <- new_condvar!("dummy_gpu::power_changed"),
            }),
            GFP_KERNEL,
        )
    }

    /// Switches the GPU off, or on again. What began before may still be running afterwards.
    pub(crate) fn set_off(&self, is_off: bool) {
        let _guard = self.lock.lock();
        self.is_off.store(is_off, Relaxed);
        self.changed.notify_all();
    }

    /// Waits until the GPU is on.
    ///
    /// # Context
    ///
    /// The wait is killable and freezable.
    ///
    /// # Errors
    ///
    /// [`EINTR`] on a fatal signal.
    pub(crate) fn wait(&self) -> Result {
        if !self.is_off.load(Relaxed) {
            return Ok(());
        }
        let mut guard = self.lock.lock();
        while self.is_off.load(Relaxed) {
            if self.changed.wait_killable_freezable(&mut guard) {
                return Err(EINTR);
            }
        }
        Ok(())
    }
}
