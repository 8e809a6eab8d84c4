// SPDX-License-Identifier: GPL-2.0

//! The GPU's TLB, of which only the time for a flush is there.
//!
//! A GPU of hardware caches translations, and goes on using them until a flush has ended. This GPU
//! caches none. But the module parameter `flush_us` can let a flush take some time, to test that mm
//! waits for it. This file uses no other file of the driver.

use hmm::Flush;
use kernel::{
    prelude::*,
    time::{
        delay::fsleep,
        Delta,
        Instant,
        Monotonic, //
    }, //
};

/// A TLB whose flushes take some time.
pub(crate) struct Tlb {
    flush_time: Delta,
    since: Instant<Monotonic>,
}

impl Tlb {
    /// The maximum time of a flush in microseconds. mm waits for it.
    const MAX_FLUSH_US: u32 = 1_000_000;

    /// Creates a TLB whose flushes take `flush_us` microseconds, or none if that is zero.
    ///
    /// # Errors
    ///
    /// [`EINVAL`] if the time is too long.
    pub(crate) fn new(flush_us: u32) -> Result<Option<Self>> {
        if flush_us > Self::MAX_FLUSH_US {
            return Err(EINVAL);
        }
        Ok((flush_us > 0).then(|| Self {
            flush_time: Delta::from_micros(flush_us.into()),
            since: Instant::now(),
        }))
    }

    /// Starts a flush. Returns the fence to wait for: the time when it ends, in nanoseconds since
    /// the TLB was created.
    pub(crate) fn start_flush(&self) -> u64 {
        (self.since.elapsed() + self.flush_time).as_nanos() as u64
    }
}

impl Flush for Tlb {
    fn wait(&self, fence: u64) {
        loop {
            let left = Delta::from_nanos(fence as i64) - self.since.elapsed();
            if left.is_zero() || left.is_negative() {
                break;
            }
            fsleep(left);
        }
    }
}
