// SPDX-License-Identifier: GPL-2.0

//! Counters of an instance and of each of its open files.
//!
//! They have the names and the order of `struct dummy_gpu_stats`. With `CONFIG_DUMMY_GPU_DMIRROR`,
//! [`FileStats`] also has a switch that lets an allocation of GPU memory fail, for tests. This file
//! uses no other file of the driver.

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
    /// Commands that completed.
    Commands,
    /// Bytes that commands have read.
    BytesRead,
    /// Bytes that commands have written.
    BytesWritten,
    /// GPU page faults that were serviced, successfully or not.
    Faults,
    /// GPU page faults that were serviced successfully, each of which mapped a window of up to 2
    /// MiB.
    FaultBatches,
    /// Invalidations of ranges in which the GPU could access a page.
    Invalidations,
    /// Those of them for each cause.
    Unmaps,
    Protections,
    Clears,
    OwnMigrations,
    OtherMigrations,
    Exclusives,
    Releases,
    /// Pages that invalidations removed from the GPU's page table.
    InvalidatedPages,
    /// Times that a window was faulted again because an invalidation collided with the fault.
    Retries,
    /// Pages that are in the GPU's page table now.
    PagesMapped,
    /// Pages that migrated to the GPU's memory.
    PagesToDevice,
    /// Those of them that migrated as a part of a large folio.
    LargeToDevice,
    /// Pages that migrated back to system memory because of a fault by the CPU or another device,
    /// on the page or near it.
    PagesCpuFaulted,
    /// Pages that were evicted to system memory.
    PagesEvicted,
    /// Pages that the driver migrated back to system memory for a prefetch or a policy.
    PagesToSystem,
    /// Those of the pages that came back, in one of these ways, as a part of a large folio.
    LargeToSystem,
    /// Pages of the GPU's memory that are in use now.
    DevicePages,
}

/// The number of counters.
pub(crate) const COUNTERS: usize = NAMES.len();

/// The names of the counters, in the order of [`Counter`].
pub(crate) const NAMES: [&str; 23] = [
    "commands",
    "bytes_read",
    "bytes_written",
    "faults",
    "fault_batches",
    "invalidations",
    "unmaps",
    "protections",
    "clears",
    "own_migrations",
    "other_migrations",
    "exclusives",
    "releases",
    "invalidated_pages",
    "retries",
    "pages_mapped",
    "pages_to_device",
    "large_to_device",
    "pages_cpu_faulted",
    "pages_evicted",
    "pages_to_system",
    "large_to_system",
    "device_pages",
];

static_assert!(Counter::DevicePages as usize + 1 == COUNTERS);

/// A set of counters.
///
/// Each counter is exact. The counters are read one after the other, so while they change, the
/// values need not agree with each other.
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

/// The counters of an open file. Each event is also counted for the instance.
///
/// The `zone_device_data` of a page in the GPU's memory holds a reference to the `FileStats` of the
/// file that migrated the page, so this can outlive the file.
pub(crate) struct FileStats {
    file: Counters,
    instance: Arc<Counters>,
    /// Whether the next allocation of GPU memory for this file fails. Set by tests.
    #[cfg(CONFIG_DUMMY_GPU_DMIRROR)]
    fails: Atomic<bool>,
}

impl FileStats {
    /// Creates counters at zero, for a new file of the instance that has the counters `instance`.
    pub(crate) fn new(instance: Arc<Counters>) -> Self {
        Self {
            file: Counters::new(),
            instance,
            #[cfg(CONFIG_DUMMY_GPU_DMIRROR)]
            fails: Atomic::new(false),
        }
    }

    /// Lets the next allocation of GPU memory for this file fail.
    #[cfg(CONFIG_DUMMY_GPU_DMIRROR)]
    pub(crate) fn fail_next(&self) {
        self.fails.store(true, Relaxed);
    }

    /// Whether this allocation of GPU memory must fail. Clears the request of
    /// [`FileStats::fail_next`], so that only one allocation fails.
    #[cfg(CONFIG_DUMMY_GPU_DMIRROR)]
    pub(crate) fn fails(&self) -> bool {
        self.fails.load(Relaxed) && self.fails.xchg(false, Relaxed)
    }

    /// Only the nodes of the HMM test driver let an allocation fail.
    #[cfg(all(CONFIG_RUST_HMM_DEVICE, not(CONFIG_DUMMY_GPU_DMIRROR)))]
    pub(crate) fn fails(&self) -> bool {
        false
    }

    /// The counters of the file.
    pub(crate) fn counters(&self) -> &Counters {
        &self.file
    }

    /// Adds `count` to `counter`.
    pub(crate) fn add(&self, counter: Counter, count: usize) {
        self.file.add(counter, count as u64);
        self.instance.add(counter, count as u64);
    }

    /// Subtracts the mapped pages of the file, whose page table is being dropped.
    ///
    /// The instance keeps the other counts of the file. This includes [`Counter::DevicePages`],
    /// since the pages stay in the GPU's memory until they are freed.
    pub(crate) fn close(&self) {
        let pages = self.file.get(Counter::PagesMapped);
        self.sub(Counter::PagesMapped, pages as usize);
    }

    /// Subtracts `count` from `counter`, which tells how many pages there are now.
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
        let first = FileStats::new(instance.clone());
        let second = FileStats::new(instance.clone());

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
        let file = FileStats::new(instance.clone());
        let other = FileStats::new(instance.clone());

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
