// SPDX-License-Identifier: GPL-2.0

//! Whether the GPU has power.
//!
//! When the system goes to sleep, the GPU stops, and its memory loses its contents. Whoever lets it
//! work, or migrates pages to its memory, does so with a [`Busy`], and waits here until the system
//! is awake. This file uses no other file of the driver.

use kernel::{
    new_condvar,
    new_mutex,
    prelude::*,
    sync::{
        Arc,
        CondVar,
        Mutex, //
    }, //
};

#[derive(Default)]
struct State {
    is_off: bool,
    /// How many [`Busy`] there are.
    busy: usize,
}

#[pin_data]
pub(crate) struct Power {
    #[pin]
    state: Mutex<State>,
    #[pin]
    changed: CondVar,
}

/// The GPU has power until this is dropped. To be held for a bounded time: the system waits for it
/// before it goes to sleep.
pub(crate) struct Busy<'a>(&'a Power);

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.busy -= 1;
        if state.is_off {
            self.0.changed.notify_all();
        }
    }
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
                state <- new_mutex!(State::default(), "dummy_gpu::power"),
                changed <- new_condvar!("dummy_gpu::power_changed"),
            }),
            GFP_KERNEL,
        )
    }

    /// Waits until the GPU is on. It may be off again when this returns.
    ///
    /// # Context
    ///
    /// The wait is killable and freezable.
    ///
    /// # Errors
    ///
    /// [`EINTR`] on a fatal signal.
    pub(crate) fn wait(&self) -> Result {
        let mut state = self.state.lock();
        while state.is_off {
            if self.changed.wait_killable_freezable(&mut state) {
                return Err(EINTR);
            }
        }
        Ok(())
    }

    /// Waits until the GPU is on, and keeps it on.
    ///
    /// # Context and errors
    ///
    /// As for [`Power::wait`].
    pub(crate) fn busy(&self) -> Result<Busy<'_>> {
        loop {
            match self.try_busy() {
                Some(busy) => return Ok(busy),
                None => self.wait()?,
            }
        }
    }

    /// Keeps the GPU on, if it is on. Does not wait.
    pub(crate) fn try_busy(&self) -> Option<Busy<'_>> {
        let mut state = self.state.lock();
        if state.is_off {
            return None;
        }
        state.busy += 1;
        Some(Busy(self))
    }

    /// Switches the GPU off, and waits until nobody keeps it on.
    pub(crate) fn switch_off(&self) {
        let mut state = self.state.lock();
        state.is_off = true;
        while state.busy > 0 {
            self.changed.wait(&mut state);
        }
    }

    /// Switches the GPU on again.
    pub(crate) fn switch_on(&self) {
        self.state.lock().is_off = false;
        self.changed.notify_all();
    }
}
