// SPDX-License-Identifier: GPL-2.0

//! The lock of a region: an rw_semaphore and the data that it protects.
//!
//! `kernel::sync` has no rw_semaphore yet. This one is private to the crate. A region needs it
//! because accesses by the device take the lock for read and can run concurrently. The notifier
//! callback also needs a trylock, for invalidations that must not block, and faults need a killable
//! wait.
//!
//! C header: [`include/linux/rwsem.h`](srctree/include/linux/rwsem.h)

use core::{
    cell::UnsafeCell,
    ops::{
        Deref,
        DerefMut, //
    }, //
};
use kernel::{
    bindings,
    error::to_result,
    prelude::*,
    sync::LockClassKey,
    types::{
        NotThreadSafe,
        Opaque, //
    }, //
};

/// A value that an rw_semaphore protects.
///
/// # Invariants
///
/// `sem` is an initialised rw_semaphore. `data` is accessed only while `sem` is held, and written
/// only while `sem` is held for write.
#[pin_data]
pub(crate) struct RwSem<T> {
    #[pin]
    sem: Opaque<bindings::rw_semaphore>,
    data: UnsafeCell<T>,
}

// SAFETY: An rw_semaphore that nobody holds is not tied to a thread and needs no destructor, so any
// thread may own and drop it. `data` is `Send`.
unsafe impl<T: Send> Send for RwSem<T> {}
// SAFETY: The semaphore serialises access to `data`. Several threads can hold it for read and have
// a shared reference, which needs `T: Sync`. Any thread can hold it for write and have a mutable
// reference, which needs `T: Send`.
unsafe impl<T: Send + Sync> Sync for RwSem<T> {}

impl<T> RwSem<T> {
    /// Creates the lock, with the `name` and the class `key` that lockdep uses.
    pub(crate) fn new(
        data: T,
        name: &'static CStr,
        key: Pin<&'static LockClassKey>,
    ) -> impl PinInit<Self> {
        // INVARIANT: __init_rwsem() initialises the semaphore. No guard exists yet, so nobody
        // accesses `data`.
        pin_init!(Self {
            // SAFETY: `slot` is valid for writes and pinned; `name` and `key` are static.
            sem <- Opaque::ffi_init(|slot| unsafe {
                bindings::__init_rwsem(slot, name.as_char_ptr(), key.as_ptr())
            }),
            data: UnsafeCell::new(data),
        })
    }

    /// Locks for read. Sleeps.
    #[inline]
    pub(crate) fn read(&self) -> ReadGuard<'_, T> {
        // SAFETY: The type invariants say that the semaphore is initialised.
        unsafe { bindings::down_read(self.sem.get()) };
        ReadGuard {
            lock: self,
            _nts: NotThreadSafe,
        }
    }

    /// Locks for read if this is possible at once. Does not sleep.
    #[cfg(CONFIG_RUST_HMM_DEVICE)]
    #[inline]
    pub(crate) fn try_read(&self) -> Option<ReadGuard<'_, T>> {
        // SAFETY: The type invariants say that the semaphore is initialised.
        if unsafe { bindings::down_read_trylock(self.sem.get()) } == 0 {
            return None;
        }
        Some(ReadGuard {
            lock: self,
            _nts: NotThreadSafe,
        })
    }

    /// Locks for write. Sleeps.
    #[inline]
    pub(crate) fn write(&self) -> WriteGuard<'_, T> {
        // SAFETY: The type invariants say that the semaphore is initialised.
        unsafe { bindings::down_write(self.sem.get()) };
        WriteGuard {
            lock: self,
            _nts: NotThreadSafe,
        }
    }

    /// Locks for write. Sleeps.
    ///
    /// # Errors
    ///
    /// [`EINTR`] if a fatal signal ends the wait.
    #[inline]
    pub(crate) fn write_killable(&self) -> Result<WriteGuard<'_, T>> {
        // SAFETY: The type invariants say that the semaphore is initialised.
        to_result(unsafe { bindings::down_write_killable(self.sem.get()) })?;
        Ok(WriteGuard {
            lock: self,
            _nts: NotThreadSafe,
        })
    }

    /// Locks for write if this is possible at once. Does not sleep.
    #[inline]
    pub(crate) fn try_write(&self) -> Option<WriteGuard<'_, T>> {
        // SAFETY: The type invariants say that the semaphore is initialised.
        if unsafe { bindings::down_write_trylock(self.sem.get()) } == 0 {
            return None;
        }
        Some(WriteGuard {
            lock: self,
            _nts: NotThreadSafe,
        })
    }
}

/// Holds an [`RwSem`] for read.
#[must_use = "the lock unlocks immediately when the guard is unused"]
pub(crate) struct ReadGuard<'a, T> {
    lock: &'a RwSem<T>,
    // The task that took the semaphore must release it.
    _nts: NotThreadSafe,
}

impl<T> Deref for ReadGuard<'_, T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        // SAFETY: The semaphore is held for read, so nobody writes `data`.
        unsafe { &*self.lock.data.get() }
    }
}

impl<T> Drop for ReadGuard<'_, T> {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: This guard holds the semaphore for read, taken by this task.
        unsafe { bindings::up_read(self.lock.sem.get()) };
    }
}

/// Holds an [`RwSem`] for write.
#[must_use = "the lock unlocks immediately when the guard is unused"]
pub(crate) struct WriteGuard<'a, T> {
    lock: &'a RwSem<T>,
    // The task that took the semaphore must release it.
    _nts: NotThreadSafe,
}

impl<T> Deref for WriteGuard<'_, T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        // SAFETY: The semaphore is held for write, so nobody else accesses `data`.
        unsafe { &*self.lock.data.get() }
    }
}

impl<T> DerefMut for WriteGuard<'_, T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: The semaphore is held for write, so nobody else accesses `data`, and `&mut self`
        // makes this the only reference derived from this guard.
        unsafe { &mut *self.lock.data.get() }
    }
}

impl<T> Drop for WriteGuard<'_, T> {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: This guard holds the semaphore for write, taken by this task.
        unsafe { bindings::up_write(self.lock.sem.get()) };
    }
}
