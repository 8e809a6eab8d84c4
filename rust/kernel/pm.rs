// SPDX-License-Identifier: GPL-2.0

//! Sleep of the whole system: suspend and hibernation.
//!
//! C header: [`include/linux/suspend.h`](srctree/include/linux/suspend.h)

use crate::{
    bindings,
    container_of,
    error::to_result,
    prelude::*,
    sync::Arc,
    types::Opaque, //
};

/// What a driver does before the system sleeps, and after that.
pub trait SleepOps: Send + Sync {
    /// Called before the system suspends or hibernates, or restores an image. No task is frozen
    /// yet, and all memory and devices can be used.
    ///
    /// On an error the system stays awake, and [`SleepOps::awake`] is not called.
    fn prepare(&self) -> Result;

    /// Called when the system is awake again, with all devices and tasks. Also called if it has not
    /// slept after all.
    fn awake(&self);
}

/// A registration for the notifications of system sleep, from when it is initialised until it is
/// dropped. A module must drop it before it is unloaded.
///
/// # Invariants
///
/// `block` is registered by `register_pm_notifier()`, and its callback is that for `T`.
#[pin_data(PinnedDrop)]
pub struct SleepNotifier<T: SleepOps> {
    ops: Arc<T>,
    #[pin]
    block: Opaque<bindings::notifier_block>,
}

// SAFETY: Any task may unregister a notifier. The other field is `Send`.
unsafe impl<T: SleepOps> Send for SleepNotifier<T> {}
// SAFETY: A shared reference gives access to nothing.
unsafe impl<T: SleepOps> Sync for SleepNotifier<T> {}

impl<T: SleepOps + 'static> SleepNotifier<T> {
    /// Registers `ops`.
    ///
    /// # Errors
    ///
    /// Those of `register_pm_notifier()`.
    pub fn register(ops: Arc<T>) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            ops,
            // INVARIANT: The notifier is registered here, or this is not created.
            block <- Opaque::try_ffi_init(|slot: *mut bindings::notifier_block| {
                let block = bindings::notifier_block {
                    notifier_call: Some(Self::notify),
                    ..pin_init::zeroed()
                };
                // SAFETY: `slot` is valid for a write.
                unsafe { slot.write(block) };
                // SAFETY: `slot` is pinned until `PinnedDrop` has unregistered it. The callback may
                // run at once: the other field is initialised above.
                to_result(unsafe { bindings::register_pm_notifier(slot) })
            }),
        }? Error)
    }

    /// # Safety
    ///
    /// `block` is the field of a `SleepNotifier<T>`.
    unsafe extern "C" fn notify(
        block: *mut bindings::notifier_block,
        event: usize,
        _data: *mut c_void,
    ) -> c_int {
        // SAFETY: `block` is the field of a `SleepNotifier<T>` (see the # Safety section), which is
        // alive, since its drop waits for running callbacks.
        let this = unsafe { &*container_of!(Opaque::cast_from(block), Self, block) };

        match event as u32 {
            bindings::PM_SUSPEND_PREPARE
            | bindings::PM_HIBERNATION_PREPARE
            | bindings::PM_RESTORE_PREPARE => {
                let errno = this.ops.prepare().err().map_or(0, |err| err.to_errno());
                // SAFETY: Always safe to call.
                unsafe { bindings::notifier_from_errno(errno) }
            }
            bindings::PM_POST_SUSPEND
            | bindings::PM_POST_HIBERNATION
            | bindings::PM_POST_RESTORE => {
                this.ops.awake();
                bindings::NOTIFY_OK as c_int
            }
            _ => bindings::NOTIFY_DONE as c_int,
        }
    }
}

#[pinned_drop]
impl<T: SleepOps> PinnedDrop for SleepNotifier<T> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: The type invariants say that the notifier is registered. This waits for running
        // callbacks.
        unsafe { bindings::unregister_pm_notifier(self.block.get()) };
    }
}
