// SPDX-License-Identifier: GPL-2.0

//! When to give up a GPU page fault that has to be serviced again and again.
//!
//! This file uses no other file of the driver.

use kernel::{
    prelude::*,
    time::{
        Delta,
        Instant,
        Monotonic, //
    }, //
};

/// Limits how often faults are serviced while no progress is made.
///
/// A page may be taken away again before the engine accesses it, so that its access faults again
/// and again. The core limits the time for the collisions of one fault; this limits the repetition
/// of faults.
pub(crate) struct RetryLimit {
    steps: u64,
    faults: u32,
    since: Instant<Monotonic>,
}

impl RetryLimit {
    /// A step of the engine takes at most six faults if each of three operands is faulted twice.
    /// The time limit applies only to further faults, since each of the first ones may wait for a
    /// fault handler as long as it takes.
    const FAULTS: u32 = 8;
    const LIMIT: Delta = Delta::from_secs(10);

    /// Creates a limit that starts at `now`, before the first step.
    pub(crate) fn new(now: Instant<Monotonic>) -> Self {
        Self {
            steps: 0,
            faults: 0,
            since: now,
        }
    }

    /// Counts a fault, when `steps` steps of work are done, and services it with `service`.
    ///
    /// # Errors
    ///
    /// Those of [`RetryLimit::fault`], and those of `service`. But if the core has given up for
    /// now, with [`EBUSY`], the next fault of the same step decides whether this goes on.
    pub(crate) fn service(&mut self, steps: u64, service: impl FnOnce() -> Result) -> Result {
        self.fault(steps, Instant::now())?;
        match service() {
            Err(EBUSY) => Ok(()),
            result => result,
        }
    }

    /// Counts a fault at `now`, when `steps` steps of work are done.
    ///
    /// # Errors
    ///
    /// [`EBUSY`] if more than [`RetryLimit::FAULTS`] faults have come since the last step, and the
    /// ones above that number have taken more than [`RetryLimit::LIMIT`].
    fn fault(&mut self, steps: u64, now: Instant<Monotonic>) -> Result {
        if steps != self.steps {
            self.steps = steps;
            self.faults = 0;
        }
        self.faults = self.faults.saturating_add(1);
        if self.faults <= Self::FAULTS {
            self.since = now;
        } else if now - self.since > Self::LIMIT {
            return Err(EBUSY);
        }
        Ok(())
    }
}

#[cfg(CONFIG_DUMMY_GPU_KUNIT_TEST)]
#[kunit_tests(dummy_gpu_retry_limit)]
mod tests {
    use super::*;

    const SECOND: Delta = Delta::from_secs(1);
    const HOUR: Delta = Delta::from_secs(3600);

    #[test]
    fn the_first_faults_of_a_page_may_take_any_time() -> Result {
        let mut now = Instant::now();
        let mut retry_limit = RetryLimit::new(now);

        for _ in 0..RetryLimit::FAULTS {
            now = now + HOUR;
            retry_limit.fault(0, now)?;
        }
        Ok(())
    }

    #[test]
    fn any_number_of_faults_may_take_a_short_time() -> Result {
        let mut now = Instant::now();
        let mut retry_limit = RetryLimit::new(now);

        for _ in 0..9000 {
            now = now + Delta::from_millis(1);
            retry_limit.fault(0, now)?;
        }
        Ok(())
    }

    #[test]
    fn many_faults_for_a_long_time_are_too_much() -> Result {
        let mut now = Instant::now();
        let mut retry_limit = RetryLimit::new(now);

        for _ in 0..RetryLimit::FAULTS + 10 {
            now = now + SECOND;
            retry_limit.fault(0, now)?;
        }
        assert!(retry_limit.fault(0, now + SECOND) == Err(EBUSY));
        Ok(())
    }

    #[test]
    fn a_page_of_work_starts_the_bound_afresh() -> Result {
        let mut now = Instant::now();
        let mut retry_limit = RetryLimit::new(now);

        for step in 0..100 {
            for _ in 0..RetryLimit::FAULTS + 10 {
                now = now + SECOND;
                retry_limit.fault(step, now)?;
            }
        }
        Ok(())
    }
}
