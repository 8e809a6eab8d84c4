// SPDX-License-Identifier: GPL-2.0

//! What an instance and each of its open files count.
//!
//! The names and their order are those of `struct dummy_gpu_stats`. Knows of nothing else, but for
//! a switch of the tests.

use kernel::{
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc, //
    }, //
};

/// A counter of `struct dummy_gpu_stats`.
#[derive(Copy, Clone)]
#[cfg_attr(not(CONFIG_RUST_HMM_DEVICE), expect(dead_code))]
pub(crate) enum Counter {
    /// Commands that ran to their end.
    Commands,
    /// Bytes that commands have read.
    BytesRead,
    /// Bytes that commands have written.
    BytesWritten,
    /// GPU page faults.
    Faults,
    /// Windows that were mapped to service one.
    Windows,
    /// Invalidations of ranges that the GPU mirrors.
    Invalidations,
    /// Pages that they removed from the GPU's page table.
    InvalidatedPages,
    /// Windows that had to be faulted again because an invalidation collided.
    Retries,
    /// Pages in the GPU's page table now.
    PagesMapped,
    /// Pages that moved to the GPU's memory.
    PagesToDevice,
    /// Pages that moved back for the CPU.
    PagesTouched,
    /// Pages that moved back for others.
    PagesEvicted,
    /// Pages that moved back on request.
    PagesToSystem,
    /// Pages in the GPU's memory now.
    DevicePages,
}

/// The number of counters.
pub(crate) const COUNTERS: usize = NAMES.len();

/// Their names, in order.
pub(crate) const NAMES: [&str; 14] = [
    "commands",
    "bytes_read",
    "bytes_written",
    "faults",
    "windows",
    "invalidations",
    "invalidated_pages",
    "retries",
    "pages_mapped",
    "pages_to_device",
    "pages_touched",
    "pages_evicted",
    "pages_to_system",
    "device_pages",
];

static_assert!(Counter::DevicePages as usize + 1 == COUNTERS);

/// A set of counters.
///
/// Each is exact; to read them while they change gives values of slightly different times.
pub(crate) struct Counters([Atomic<u64>; COUNTERS]);

impl Counters {
    /// Creates counters at zero.
    pub(crate) fn new() -> Self {
        Self([const { Atomic::new(0) }; COUNTERS])
    }

    /// Reads all counters.
    pub(crate) fn read(&self) -> impl Iterator<Item = u64> + '_ {
        self.0.iter().map(|counter| counter.load(Relaxed))
    }

    fn add(&self, counter: Counter, count: u64) {
        self.0[counter as usize].add(count, Relaxed);
    }

    fn get(&self, counter: Counter) -> u64 {
        self.0[counter as usize].load(Relaxed)
    }

    fn sub(&self, counter: Counter, count: u64) {
        self.0[counter as usize].fetch_sub(count, Relaxed);
    }
}

/// Counts for an open file and for its instance.
pub(crate) struct Account {
    file: Counters,
    instance: Arc<Counters>,
    /// Whether the next page that is to move to the GPU for this file is to find no memory there: a
    /// test asks so.
    #[cfg(CONFIG_DUMMY_GPU_DMIRROR)]
    fails: Atomic<bool>,
}

impl Account {
    /// Opens an account whose counts are part of those of `instance`.
    pub(crate) fn new(instance: Arc<Counters>) -> Self {
        Self {
            file: Counters::new(),
            instance,
            #[cfg(CONFIG_DUMMY_GPU_DMIRROR)]
            fails: Atomic::new(false),
        }
    }

    /// Lets the next page that is to move to the GPU find no memory there.
    #[cfg(CONFIG_DUMMY_GPU_DMIRROR)]
    pub(crate) fn fail_next(&self) {
        self.fails.store(true, Relaxed);
    }

    /// Whether this page is to find no memory. The next one then does.
    #[cfg(CONFIG_DUMMY_GPU_DMIRROR)]
    pub(crate) fn fails(&self) -> bool {
        self.fails.load(Relaxed) && self.fails.xchg(false, Relaxed)
    }

    /// Nobody asks so.
    #[cfg(all(CONFIG_RUST_HMM_DEVICE, not(CONFIG_DUMMY_GPU_DMIRROR)))]
    pub(crate) fn fails(&self) -> bool {
        false
    }

    /// The counters of the file.
    pub(crate) fn counters(&self) -> &Counters {
        &self.file
    }

    /// Adds `count` events, or a thing that there is now.
    pub(crate) fn add(&self, counter: Counter, count: usize) {
        self.file.add(counter, count as u64);
        self.instance.add(counter, count as u64);
    }

    /// The page table of the file is gone. What happened stays in the counters of the instance,
    /// and so do the pages in its memory for as long as they are there.
    pub(crate) fn close(&self) {
        let pages = self.file.get(Counter::PagesMapped);
        self.sub(Counter::PagesMapped, pages as usize);
    }

    /// Takes back `count` things that there are no longer.
    pub(crate) fn sub(&self, counter: Counter, count: usize) {
        self.file.sub(counter, count as u64);
        self.instance.sub(counter, count as u64);
    }
}

#[cfg(CONFIG_DUMMY_GPU_KUNIT_TEST)]
#[kunit_tests(dummy_gpu_counters)]
mod tests {
    use super::*;

    #[test]
    fn names_and_counters_have_one_order() {
        let counters = Counters::new();

        counters.add(Counter::Commands, 1);
        counters.add(Counter::Faults, 2);
        counters.add(Counter::PagesMapped, 3);
        counters.add(Counter::DevicePages, 4);
        for (name, value) in NAMES.iter().zip(counters.read()) {
            let expected = match *name {
                "commands" => 1,
                "faults" => 2,
                "pages_mapped" => 3,
                "device_pages" => 4,
                _ => 0,
            };
            assert_eq!(value, expected);
        }
    }

    #[test]
    fn an_instance_counts_for_all_its_files() -> Result {
        let instance = Arc::new(Counters::new(), GFP_KERNEL)?;
        let first = Account::new(instance.clone());
        let second = Account::new(instance.clone());

        first.add(Counter::BytesRead, 3);
        second.add(Counter::BytesRead, 4);
        assert_eq!(first.counters().get(Counter::BytesRead), 3);
        assert_eq!(second.counters().get(Counter::BytesRead), 4);
        assert_eq!(instance.get(Counter::BytesRead), 7);
        Ok(())
    }

    #[test]
    fn a_closed_file_leaves_its_events_and_takes_its_pages() -> Result {
        let instance = Arc::new(Counters::new(), GFP_KERNEL)?;
        let file = Account::new(instance.clone());
        let other = Account::new(instance.clone());

        file.add(Counter::Faults, 2);
        file.add(Counter::PagesMapped, 10);
        file.sub(Counter::PagesMapped, 4);
        other.add(Counter::PagesMapped, 1);
        file.close();
        assert_eq!(instance.get(Counter::Faults), 2);
        assert_eq!(instance.get(Counter::PagesMapped), 1);
        Ok(())
    }
}
