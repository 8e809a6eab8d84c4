// SPDX-License-Identifier: GPL-2.0

//! Shared virtual memory: a process's address space, as the GPU sees it.
//!
//! This is the only file of the driver that faults memory through `hmm`. The GPU's page table
//! ([`Mmu`]) says which pages the GPU may access. An access that it does not allow is a GPU page
//! fault. [`Svm::service`] handles the fault: it migrates the faulted pages to where their policy
//! says, as far as possible, and then maps them for the GPU. One call handles one window, of at
//! most one table of the GPU (2 MiB). When mm invalidates a range, [`Translations::invalidate`]
//! unmaps it.
//!
//! The core copies the bytes of an access, and looks up its own entry of the page each time. If the
//! page table ever allowed too much, the access would miss in the core.
//!
//! Lock order: the region's lock, which the core holds when it calls the driver, then the lock of
//! the page table.

use super::{
    counters::{
        Counter,
        FileStats, //
    },
    engine::{
        Fault,
        Memory, //
    },
    mmu::{
        Mmu,
        SpareTable,
        TABLE_ORDER, //
    },
    policy::{
        Policies,
        Policy, //
    },
    power::Power,
    tlb::Tlb,
    vram::{
        MoveBuf,
        Vram, //
    }, //
};
use hmm::{
    Access,
    Cause,
    Commit,
    DevicePage,
    Entry,
    FaultBuf,
    FaultRequest,
    Invalidate,
    Invalidated,
    Mirror,
    MirrorOps,
    MirroredMm,
    Miss,
    PageRange,
    RamPage, //
};
use kernel::{
    module::this_module,
    new_mutex,
    new_spinlock,
    page::PAGE_SIZE,
    prelude::*,
    sync::{
        Arc,
        Mutex,
        SpinLock, //
    }, //
};

// The buffer of a fault must be large enough for one table.
static_assert!(TABLE_ORDER <= FaultBuf::MAX_ORDER);

/// The GPU's page table for one process, and the statistics for it.
#[pin_data]
struct Translations {
    #[pin]
    mmu: SpinLock<Mmu>,
    tlb: Option<Arc<Tlb>>,
    stats: TableStats,
}

/// The statistics for the pages of a page table.
///
/// When the page table is dropped, this subtracts its pages from the counters. Pages in the GPU's
/// memory may keep their reference to the [`FileStats`] for longer.
struct TableStats(Arc<FileStats>);

impl Drop for TableStats {
    fn drop(&mut self) {
        self.0.close();
    }
}

impl Translations {
    /// Checks whether the GPU may access the `len` bytes at `va` with `access`. Returns the
    /// [`Miss`] at the first page if not.
    fn check(&self, va: usize, len: usize, access: Access) -> Result<(), Miss> {
        let mmu = self.mmu.lock();

        for page in (va / PAGE_SIZE * PAGE_SIZE..va + len).step_by(PAGE_SIZE) {
            if !mmu.lookup(page, access) {
                let va = page.max(va);
                return Err(Miss { va, access });
            }
        }
        Ok(())
    }

    /// Maps pages of `commit` for the GPU: the pages that the fault needed, and those around them
    /// that are in `like` and are already where `policy` puts them. The others are not mapped, so
    /// that they fault when the GPU needs them and can migrate first.
    fn map(&self, commit: &Commit<'_>, spare: SpareTable, (like, policy): (PageRange, Policy)) {
        let mut new = 0;
        let mut mmu = self.mmu.lock();
        let mut table = mmu.table(commit.range().start(), spare);

        for (va, entry) in commit.entries() {
            let at_home = match entry {
                Entry::Ram(_) => policy != Policy::Device,
                Entry::Device(_) => policy != Policy::System,
                _ => false,
            };
            let stays = at_home && like.contains(va);
            let is_needed = commit.needed().is_some_and(|needed| needed.contains(va));
            if !stays && !is_needed {
                continue;
            }
            new += usize::from(match entry {
                Entry::Ram(RamPage::Read(page)) | Entry::Device(DevicePage::Read(page)) => {
                    table.map(&page)
                }
                Entry::Ram(RamPage::Write(page)) | Entry::Device(DevicePage::Write(page)) => {
                    table.map_writable(&page)
                }
                _ => false,
            });
        }
        // Count while the lock is held, so that an invalidation cannot subtract these pages before
        // they are added.
        self.stats.0.add(Counter::PagesMapped, new);
    }
}

impl MirrorOps for Translations {
    fn invalidate<'op>(&self, event: Invalidate<'op>) -> Invalidated<'op> {
        let cause = event.cause();
        let mut mmu = self.mmu.lock();
        let pages = mmu.unmap(event.range());
        self.stats.0.sub(Counter::PagesMapped, pages);
        drop(mmu);

        // The core tells of the end of the process even if the GPU had no page.
        if pages > 0 || cause != Cause::Release {
            self.stats.0.add(Counter::Invalidations, 1);
            self.stats.0.add(counter(cause), 1);
            self.stats.0.add(Counter::InvalidatedPages, pages);
        }
        match &self.tlb {
            Some(tlb) if pages > 0 => event.flushing(tlb.clone(), tlb.start_flush()),
            _ => event.done(),
        }
    }

    fn may_sleep(&self) -> bool {
        self.tlb.is_some()
    }
}

/// The counter of the invalidations with `cause`.
fn counter(cause: Cause) -> Counter {
    match cause {
        Cause::Unmap => Counter::Unmaps,
        Cause::Protect => Counter::Protections,
        // No driver is bound to the device that this would be about.
        Cause::Clear | Cause::Unbind => Counter::Clears,
        Cause::OwnMigration => Counter::OwnMigrations,
        Cause::OtherMigration => Counter::OtherMigrations,
        Cause::Exclusive => Counter::Exclusives,
        Cause::Release => Counter::Releases,
    }
}

/// The kind of memory that pages are in, or should migrate to.
#[derive(Copy, Clone, PartialEq, Eq)]
pub(crate) enum Location {
    /// System memory.
    System,
    /// The GPU's memory.
    Device,
}

/// The outcome of a prefetch.
pub(crate) struct Prefetched {
    /// Success if all of the range was handled, or else the error that ended the prefetch.
    pub(crate) result: Result,
    /// The number of bytes, from the start of the range on, that were handled.
    pub(crate) done: usize,
    /// The number of pages that migrated.
    pub(crate) pages: usize,
}

/// The address space of one process, as the GPU sees it.
#[pin_data]
pub(crate) struct Svm {
    mirror: Mirror,
    translations: Arc<Translations>,
    vram: Option<Arc<Vram>>,
    power: Arc<Power>,
    #[pin]
    policies: Mutex<Policies>,
}

impl Svm {
    /// Gives the GPU access to the address space of the current task. All addresses have `policy`
    /// at first.
    ///
    /// # Errors
    ///
    /// [`EINVAL`] if the task has no address space, [`EINTR`] if a signal is pending, [`ENOMEM`].
    pub(crate) fn new(
        stats: Arc<FileStats>,
        vram: Option<Arc<Vram>>,
        tlb: Option<Arc<Tlb>>,
        power: Arc<Power>,
        policy: Policy,
    ) -> Result<Arc<Self>> {
        let translations = Arc::pin_init(
            pin_init!(Translations {
                mmu <- new_spinlock!(Mmu::new(), "dummy_gpu::mmu"),
                tlb,
                stats: TableStats(stats),
            }),
            GFP_KERNEL_ACCOUNT,
        )?;

        let mirror = match &vram {
            Some(vram) => vram.mirror(translations.clone())?,
            None => Mirror::new(this_module::<crate::LocalModule>(), translations.clone())?,
        };
        let mut policies = Policies::new();
        policies.set(PageRange::new(0, mirror.task_size())?, policy)?;
        Arc::pin_init(
            pin_init!(Self {
                mirror,
                translations,
                vram,
                power,
                policies <- new_mutex!(policies, "dummy_gpu::policies"),
            }),
            GFP_KERNEL_ACCOUNT,
        )
    }

    /// Whether the current task runs in this address space.
    pub(crate) fn is_current(&self) -> bool {
        self.mirror.is_current()
    }

    /// The end of the user part of the address space.
    pub(crate) fn end(&self) -> usize {
        self.mirror.task_size()
    }

    /// Whether the GPU has power.
    pub(crate) fn power(&self) -> &Power {
        &self.power
    }

    /// The statistics of the file that this address space belongs to.
    pub(crate) fn stats(&self) -> &Arc<FileStats> {
        &self.translations.stats.0
    }

    /// The size of the GPU's memory in bytes. Zero if it has none.
    pub(crate) fn vram_size(&self) -> usize {
        self.vram.as_ref().map_or(0, |vram| vram.size())
    }

    /// Sets the policy of `range` for future faults. No page migrates now.
    ///
    /// # Errors
    ///
    /// [`ENOSPC`] if too many ranges have a policy of their own, [`ENOMEM`].
    pub(crate) fn advise(&self, range: PageRange, policy: Policy) -> Result {
        self.policies.lock().set(range, policy)
    }

    /// Migrates the pages of `range` to `location`. Pages that cannot migrate stay where they are.
    ///
    /// # Context
    ///
    /// As for [`Svm::service`], but any signal ends the prefetch.
    ///
    /// # Errors
    ///
    /// [`ENODEV`] if the GPU has no memory; [`ENOMEM`]. Errors after the start end the prefetch and
    /// are returned in [`Prefetched::result`]:
    ///
    /// - [`EFAULT`] if nothing is mapped at the address that the prefetch has reached.
    /// - [`EINTR`] on a signal.
    /// - [`ENOMEM`] if the memory that the pages should migrate to has no room.
    pub(crate) fn prefetch(&self, range: PageRange, location: Location) -> Result<Prefetched> {
        let vram = self.vram.as_ref().ok_or(ENODEV)?;
        let mm = self.mirror.mm()?;
        let mut buf = MoveBuf::new(TABLE_ORDER)?;
        let mut so_far = Prefetched {
            result: Ok(()),
            done: 0,
            pages: 0,
        };

        while let Ok(rest) = PageRange::new(range.start() + so_far.done, range.end()) {
            let busy = self.power.busy();
            let moved = match location {
                _ if current!().signal_pending() || busy.is_err() => Err(EINTR),
                Location::Device => vram.migrate_in(&mm, rest, &mut buf, self.stats()),
                Location::System => vram.migrate_out(&mm, rest, &mut buf),
            };
            match moved {
                Ok(moved) => {
                    so_far.done += moved.range().len();
                    so_far.pages += moved.pages();
                }
                Err(err) => {
                    so_far.result = Err(err);
                    break;
                }
            }
        }
        Ok(so_far)
    }

    /// Migrates pages at the start of `need` to where their policy says, as far as possible.
    /// Returns the part of `need` that should be faulted now, which has one policy; and that
    /// policy, with the largest range around the part that has it.
    ///
    /// Only a write populates pages that the process has not touched yet. A read gets the shared
    /// zero page, as a read by the CPU does.
    ///
    /// # Errors
    ///
    /// [`EINTR`] on a fatal signal; [`EFAULT`] for the last page of the address space, which is
    /// never user memory.
    fn place(
        &self,
        mm: &MirroredMm<'_>,
        need: PageRange,
        access: Access,
        buf: &mut MoveBuf,
    ) -> Result<(PageRange, (PageRange, Policy))> {
        let (like, policy) = self.policies.lock().at(need.start()).map_err(|_| EFAULT)?;
        let Some(vram) = &self.vram else {
            return Ok((need, (like, Policy::None)));
        };
        let need = PageRange::new(need.start(), need.end().min(like.end()))?;

        let (need, moved) = match policy {
            Policy::None => return Ok((need, (like, policy))),
            Policy::System => (need, vram.migrate_out(mm, need, buf)),
            Policy::Device => {
                let need = vram.fault_limit(need)?;
                let moved = vram.migrate_for(mm, need, access, like, buf, self.stats());
                (need, moved)
            }
        };
        match moved {
            Err(err) if err == EINTR => Err(err),
            // If there is no room or the copy failed, the GPU uses the pages where they are.
            _ => Ok((need, (like, policy))),
        }
    }

    /// Without support for device memory, mm makes no page exclusive to a device.
    #[cfg(not(CONFIG_RUST_HMM_DEVICE))]
    fn make_exclusive_in(
        &self,
        _mm: &MirroredMm<'_>,
        _va: usize,
        _bufs: &mut FaultBuffers,
    ) -> Result {
        Err(EOPNOTSUPP)
    }

    /// Makes the page of `va` exclusive to the GPU and maps it for atomic operations.
    ///
    /// # Errors
    ///
    /// Those of [`MirroredMm::make_exclusive`].
    #[cfg(CONFIG_RUST_HMM_DEVICE)]
    fn make_exclusive_in(&self, mm: &MirroredMm<'_>, va: usize, bufs: &mut FaultBuffers) -> Result {
        let spare = mm.charge(SpareTable::new)?;

        let result = mm.make_exclusive(va, &mut bufs.faults, |page| {
            let mut mmu = self.translations.mmu.lock();
            let new = mmu.table(page.va(), spare).map_exclusive(page);
            self.stats().add(Counter::PagesMapped, new.into());
        });
        let retries = bufs.faults.retries() as usize;
        self.stats().add(Counter::Retries, retries);
        result
    }

    /// Services a GPU page fault.
    ///
    /// Migrates pages to where their policy says, as far as possible. Then maps the page of
    /// `fault.va` and the rest of the operand, up to the end of the window. Also maps those other
    /// pages of the window that are present and already where their policy says. Returns the
    /// address up to which the operand is mapped.
    ///
    /// For an atomic operation, makes the page of `fault.va` exclusive instead. If it was in the
    /// GPU's memory, it migrates to system memory.
    ///
    /// # Context
    ///
    /// Any task that holds no locks. Waits for what the process's own page faults wait for; a fatal
    /// signal ends the wait.
    ///
    /// # Errors
    ///
    /// - [`EFAULT`] if the address has no memory that may be read.
    /// - [`EPERM`] if the memory may not be written.
    /// - [`ESRCH`] if the process has gone.
    /// - [`EINTR`] on a fatal signal.
    /// - [`EBUSY`] if invalidations kept colliding.
    /// - [`EOPNOTSUPP`] for an atomic operation, if the page is not one of private memory.
    /// - [`ENOMEM`].
    pub(crate) fn service(&self, fault: Fault, bufs: &mut FaultBuffers) -> Result<usize> {
        let mm = self.mirror.mm()?;
        let stats = self.stats();
        stats.add(Counter::Faults, 1);
        if fault.atomic {
            self.make_exclusive_in(&mm, fault.va, bufs)?;
            stats.add(Counter::FaultBatches, 1);
            return Ok(fault.va + fault.len);
        }

        // This fails only for the last page of the address space, which is never user memory.
        let need = PageRange::containing(fault.va, fault.len).map_err(|_| EFAULT)?;
        let busy = self.power.busy()?;
        let (need, like) = self.place(&mm, need, fault.access, &mut bufs.moves)?;
        // The fault may take long, and only makes a translation.
        drop(busy);
        let request = FaultRequest::new(need, fault.access);
        let spare = mm.charge(SpareTable::new)?;
        let result = mm.fault(request, &mut bufs.faults, |commit| {
            self.translations.map(commit, spare, like);
            commit.needed().map_or(need.end(), |needed| needed.end())
        });

        stats.add(Counter::Retries, bufs.faults.retries() as usize);
        if result.is_ok() {
            stats.add(Counter::FaultBatches, 1);
        }
        result
    }
}

/// Methods for the nodes of the HMM test driver.
#[cfg(CONFIG_DUMMY_GPU_DMIRROR)]
impl Svm {
    /// Whether the CPU reaches the GPU's memory.
    pub(crate) fn has_coherent_memory(&self) -> bool {
        self.vram.as_ref().is_some_and(|vram| vram.is_coherent())
    }

    /// Faults all pages of `range`, one window at a time.
    ///
    /// # Errors
    ///
    /// As for [`Svm::service`].
    pub(crate) fn fault_in(
        &self,
        range: PageRange,
        access: Access,
        bufs: &mut FaultBuffers,
    ) -> Result {
        let mut va = range.start();

        while va < range.end() {
            let len = range.end() - va;
            va = self.service(Fault::new(va, access, len), bufs)?;
        }
        Ok(())
    }

    /// Takes a snapshot of one window at the start of `range`, without faulting, and calls `f` with
    /// it.
    ///
    /// # Context
    ///
    /// As for [`Svm::service`]. For `f`, as for the closure of [`MirroredMm::fault`].
    ///
    /// # Errors
    ///
    /// [`EFAULT`] if nothing is mapped in the window, [`EINTR`] on a fatal signal, [`EBUSY`] if
    /// invalidations kept colliding, [`ENOMEM`].
    pub(crate) fn snapshot<R>(
        &self,
        range: PageRange,
        bufs: &mut FaultBuffers,
        f: impl FnOnce(&Commit<'_>) -> R,
    ) -> Result<R> {
        let request = FaultRequest::snapshot(range);

        self.mirror.mm()?.fault(request, &mut bufs.faults, f)
    }

    /// Maps those pages of one window at the start of `range` that are in the GPU's memory. Returns
    /// the end of the window.
    ///
    /// # Errors
    ///
    /// Those of [`Svm::snapshot`].
    pub(crate) fn map_device_pages(
        &self,
        range: PageRange,
        bufs: &mut FaultBuffers,
    ) -> Result<usize> {
        let spare = SpareTable::new()?;

        self.snapshot(range, bufs, |commit| {
            self.translations
                .map(commit, spare, (range, Policy::Device));
            commit.range().end()
        })
    }

    /// Copies the bytes at `va` to `bytes`, without faulting.
    ///
    /// # Errors
    ///
    /// [`ENOENT`] if the GPU may not access a page of it.
    pub(crate) fn read_mapped(&self, va: usize, bytes: &mut [u8]) -> Result {
        let copied = self
            .translations
            .check(va, bytes.len(), Access::Read)
            .and_then(|()| self.mirror.read(va, bytes));

        copied.map_err(|_| ENOENT)
    }

    /// Makes the page of `va` exclusive to the GPU and maps it for atomic operations.
    ///
    /// # Errors
    ///
    /// Those of [`MirroredMm::make_exclusive`].
    pub(crate) fn make_exclusive(&self, va: usize, bufs: &mut FaultBuffers) -> Result {
        self.make_exclusive_in(&self.mirror.mm()?, va, bufs)
    }

    /// Whether any page of `range` is exclusive to the GPU.
    pub(crate) fn any_exclusive(&self, range: PageRange) -> bool {
        self.translations.mmu.lock().any_exclusive(range)
    }

    /// Evicts all pages, also those of other processes, from the GPU's memory to system memory.
    ///
    /// # Errors
    ///
    /// [`ENODEV`] if the GPU has no memory, [`EBUSY`] if some pages could not be evicted, [`EINTR`]
    /// on a fatal signal, [`ENOMEM`].
    pub(crate) fn evict(&self) -> Result {
        self.vram.as_ref().ok_or(ENODEV)?.evict()
    }
}

impl Memory for &Svm {
    fn read(&mut self, va: usize, buf: &mut [u8]) -> Result<(), Miss> {
        self.translations.check(va, buf.len(), Access::Read)?;
        self.mirror.read(va, buf)?;
        self.stats().add(Counter::BytesRead, buf.len());
        Ok(())
    }

    fn write(&mut self, va: usize, buf: &[u8]) -> Result<(), Miss> {
        self.translations.check(va, buf.len(), Access::Write)?;
        self.mirror.write(va, buf)?;
        self.stats().add(Counter::BytesWritten, buf.len());
        Ok(())
    }

    fn update(&mut self, va: usize, f: impl FnOnce(u64) -> u64) -> Result<u64, Miss> {
        // An invalidation waits for the core's lock before it takes the page out of the page table.
        let old = self.mirror.update(va, |old| {
            let is_exclusive = self.translations.mmu.lock().is_exclusive(va);
            is_exclusive.then(|| f(old))
        })?;
        self.stats().add(Counter::BytesRead, size_of::<u64>());
        self.stats().add(Counter::BytesWritten, size_of::<u64>());
        Ok(old)
    }
}

/// The buffers for servicing faults, one fault at a time.
pub(crate) struct FaultBuffers {
    faults: FaultBuf,
    moves: MoveBuf,
}

impl FaultBuffers {
    /// Allocates buffers for windows of one table of the GPU.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`].
    pub(crate) fn new() -> Result<Self> {
        Ok(Self {
            faults: FaultBuf::new(TABLE_ORDER)?,
            moves: MoveBuf::new(TABLE_ORDER)?,
        })
    }
}
