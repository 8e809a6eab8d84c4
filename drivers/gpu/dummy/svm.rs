// SPDX-License-Identifier: GPL-2.0

//! Shared virtual memory: a process's address space, as the GPU sees it.
//!
//! The one file of the driver that has `hmm` fault memory. The GPU's page table ([`Mmu`]) says what
//! the GPU may access. What it does not allow is a GPU page fault, which [`Svm::service`]
//! turns into entries, in windows of up to one of the GPU's tables; what mm takes back leaves the
//! page table in [`Translations::invalidate`]. The bytes themselves are copied by the core, which
//! looks up its own entry for each access: should the page table ever allow too much, the access
//! misses there. Before that pages are moved to where their policy says, as far as they can be.
//!
//! Lock order: the region's lock (taken by the core, around the calls that it makes here), then the
//! lock of the page table.

use super::{
    counters::{
        Account,
        Counter, //
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
    vram::{
        Holes,
        MoveBuf,
        Vram, //
    }, //
};
use hmm::{
    Access,
    Commit,
    Device,
    Entry,
    FaultBuf,
    FaultRequest,
    Invalidate,
    Invalidated,
    Mirror,
    MirrorOps,
    Miss,
    PageRange,
    Ram, //
};
use kernel::{
    module::this_module,
    new_mutex,
    new_spinlock,
    prelude::*,
    sync::{
        Arc,
        Mutex,
        SpinLock, //
    },
    time::{
        Delta,
        Instant,
        Monotonic, //
    }, //
};

// A window that is faulted is one table.
static_assert!(TABLE_ORDER <= FaultBuf::MAX_ORDER);

/// The GPU's translations for one process, and what it counts.
#[pin_data]
struct Translations {
    #[pin]
    mmu: SpinLock<Mmu>,
    account: TableAccount,
}

/// The account that a page table's pages count for. It goes with the table; pages of the GPU's
/// memory may keep the account itself for longer.
struct TableAccount(Arc<Account>);

impl Drop for TableAccount {
    fn drop(&mut self) {
        self.0.close();
    }
}

impl Translations {
    /// Whether the GPU may access the page that contains `va`; else the miss.
    fn check(&self, va: usize, access: Access) -> Result<(), Miss> {
        if self.mmu.lock().lookup(va, access) {
            Ok(())
        } else {
            Err(Miss { va, access })
        }
    }

    /// Maps the pages that `commit` proves to be there; those that were not needed only if they are
    /// where the policy of `like` has them: else they are to move first, when they are needed.
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
                Entry::Ram(Ram::Read(page)) | Entry::Device(Device::Read(page)) => table.map(&page),
                Entry::Ram(Ram::Write(page)) | Entry::Device(Device::Write(page)) => {
                    table.map_writable(&page)
                }
                _ => false,
            });
        }
        // Under the lock, so that an invalidation cannot take them back first.
        self.account.0.add(Counter::PagesMapped, new);
    }
}

impl MirrorOps for Translations {
    fn invalidate<'op>(&self, event: Invalidate<'op>) -> Invalidated<'op> {
        let mut mmu = self.mmu.lock();
        let pages = mmu.unmap(event.range());
        self.account.0.sub(Counter::PagesMapped, pages);
        drop(mmu);

        self.account.0.add(Counter::Invalidations, 1);
        self.account.0.add(Counter::InvalidatedPages, pages);
        event.done()
    }
}

/// Where memory is to be.
#[derive(Copy, Clone, PartialEq, Eq)]
pub(crate) enum Place {
    /// In RAM.
    System,
    /// In the GPU's memory.
    Device,
}

/// How far a prefetch went.
pub(crate) struct Prefetched {
    /// Whether it is complete, or why not.
    pub(crate) result: Result,
    /// The bytes that were looked at.
    pub(crate) done: usize,
    /// The pages that moved.
    pub(crate) pages: usize,
}

/// The address space of one process, for the GPU.
#[pin_data]
pub(crate) struct Svm {
    mirror: Mirror,
    translations: Arc<Translations>,
    vram: Option<Arc<Vram>>,
    #[pin]
    policies: Mutex<Policies>,
}

impl Svm {
    /// Opens the address space of the current task to the GPU. All addresses have `policy` at
    /// first.
    ///
    /// # Errors
    ///
    /// [`EINVAL`] if the task has none, [`EINTR`] if a signal is pending, [`ENOMEM`].
    pub(crate) fn new(
        account: Arc<Account>,
        vram: Option<Arc<Vram>>,
        policy: Policy,
    ) -> Result<Arc<Self>> {
        let translations = Arc::pin_init(
            pin_init!(Translations {
                mmu <- new_spinlock!(Mmu::new(), "dummy_gpu::mmu"),
                account: TableAccount(account),
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
                policies <- new_mutex!(policies, "dummy_gpu::policies"),
            }),
            GFP_KERNEL_ACCOUNT,
        )
    }

    /// Whether the current task runs in this address space.
    pub(crate) fn is_current(&self) -> bool {
        self.mirror.is_current()
    }

    /// The first address that cannot be the process's.
    pub(crate) fn end(&self) -> usize {
        self.mirror.task_size()
    }

    /// What is counted for this address space.
    pub(crate) fn account(&self) -> &Arc<Account> {
        &self.translations.account.0
    }

    /// The size of the GPU's memory in bytes, or zero.
    pub(crate) fn vram_size(&self) -> usize {
        self.vram.as_ref().map_or(0, |vram| vram.size())
    }

    /// Sets the policy of `range` for faults to come.
    ///
    /// # Errors
    ///
    /// [`ENOSPC`] if there are too many ranges that have one, [`ENOMEM`].
    pub(crate) fn advise(&self, range: PageRange, policy: Policy) -> Result {
        self.policies.lock().set(range, policy)
    }

    /// Moves the pages of `range` to `place`, those that can be moved.
    ///
    /// # Context
    ///
    /// As for [`Svm::service`], but any signal ends it.
    ///
    /// # Errors
    ///
    /// [`ENODEV`] if the GPU has no memory; [`ENOMEM`]. Others end it part-way:
    ///
    /// - [`EFAULT`] if nothing is mapped.
    /// - [`EINTR`] on a signal.
    /// - [`EBUSY`] if invalidations kept colliding.
    /// - [`ENOMEM`] if the GPU's memory has no room.
    pub(crate) fn prefetch(&self, range: PageRange, place: Place) -> Result<Prefetched> {
        let vram = self.vram.as_ref().ok_or(ENODEV)?;
        let mut buf = MoveBuf::new(TABLE_ORDER)?;
        let mut so_far = Prefetched {
            result: Ok(()),
            done: 0,
            pages: 0,
        };

        while let Ok(rest) = PageRange::new(range.start() + so_far.done, range.end()) {
            let moved = match place {
                _ if current!().signal_pending() => Err(EINTR),
                Place::Device => vram.take(
                    &self.mirror,
                    rest,
                    Holes::Populate,
                    &mut buf,
                    self.account(),
                ),
                Place::System => vram.give(&self.mirror, rest, &mut buf),
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

    /// Moves the start of `need` to where its policy says, if it can be moved. Returns how far that
    /// goes, and the policy with the range around it that has the same.
    ///
    /// Pages that the process has not touched yet are populated for a write only: a read gets the
    /// shared page of zeroes, as a read by the CPU does.
    ///
    /// # Errors
    ///
    /// [`EINTR`] on a fatal signal.
    fn place(
        &self,
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
            Policy::System => (need, vram.give(&self.mirror, need, buf)),
            Policy::Device => {
                let need = vram.share(need)?;
                let holes = match access {
                    Access::Read => Holes::Keep,
                    Access::Write => Holes::Populate,
                };
                let moved = vram.take(&self.mirror, need, holes, buf, self.account());
                (need, moved)
            }
        };
        match moved {
            Err(err) if err == EINTR => Err(err),
            // Where there is no room, or the copy failed, pages are used where they are.
            _ => Ok((need, (like, policy))),
        }
    }

    /// Services a GPU page fault: maps the page of `fault.va` and, as far as the window around it
    /// goes, the rest of the operand, once they are where they should be. Pages of the window that
    /// the process has already are mapped too, if they are where they should be. Returns the
    /// address up to which the operand is mapped.
    ///
    /// # Context
    ///
    /// A task that runs in this address space and holds no locks. Waits for what the process's own
    /// page faults wait for; a fatal signal ends the wait.
    ///
    /// # Errors
    ///
    /// - [`EFAULT`] if there is no memory that may be read.
    /// - [`EPERM`] if it may not be written, or the task runs in another address space.
    /// - [`EINTR`] on a fatal signal.
    /// - [`EBUSY`] if invalidations kept colliding.
    /// - [`ENOMEM`].
    pub(crate) fn service(&self, fault: Fault, window: &mut Window) -> Result<usize> {
        let account = self.account();
        account.add(Counter::Faults, 1);

        // Only the last page of all can make this fail, which is not the process's.
        let need = PageRange::containing(fault.va, fault.len).map_err(|_| EFAULT)?;
        let (need, like) = self.place(need, fault.access, &mut window.moves)?;
        let request = FaultRequest::new(need, fault.access);
        let spare = SpareTable::new()?;
        let result = self.mirror.fault(request, &mut window.faults, |commit| {
            self.translations.map(commit, spare, like);
            commit.needed().map_or(need.end(), |needed| needed.end())
        });

        account.add(Counter::Retries, window.faults.retries() as usize);
        if result.is_ok() {
            account.add(Counter::Windows, 1);
        }
        result
    }
}

/// What only the nodes of the HMM test driver use.
#[cfg(CONFIG_DUMMY_GPU_DMIRROR)]
impl Svm {
    /// Faults all pages of `range`, a window at a time.
    ///
    /// # Errors
    ///
    /// As for [`Svm::service`].
    pub(crate) fn fault_in(&self, range: PageRange, access: Access, window: &mut Window) -> Result {
        let mut va = range.start();

        while va < range.end() {
            let len = range.end() - va;
            va = self.service(Fault { va, access, len }, window)?;
        }
        Ok(())
    }

    /// Calls `f` with what is there of the start of `range`, as far as one window goes, without a
    /// fault.
    ///
    /// # Context
    ///
    /// As for [`Svm::service`]; for `f`, as for [`Mirror::fault`].
    ///
    /// # Errors
    ///
    /// [`EFAULT`] if nothing at all is mapped in the window, [`EINTR`] on a fatal signal,
    /// [`EBUSY`] if invalidations kept colliding, [`ENOMEM`].
    pub(crate) fn snapshot<R>(
        &self,
        range: PageRange,
        window: &mut Window,
        f: impl FnOnce(&Commit<'_>) -> R,
    ) -> Result<R> {
        let request = FaultRequest::snapshot(range);

        self.mirror.fault(request, &mut window.faults, f)
    }

    /// Maps the pages at the start of `range`, which are in the GPU's memory, as far as one window
    /// goes. Returns where that ends.
    ///
    /// # Errors
    ///
    /// [`ENOENT`] if one of them is not there; for the rest as for [`Svm::snapshot`].
    pub(crate) fn map_device_pages(&self, range: PageRange, window: &mut Window) -> Result<usize> {
        let spare = SpareTable::new()?;

        self.snapshot(range, window, |commit| {
            let mut entries = commit.entries();
            if !entries.all(|(_, entry)| matches!(entry, Entry::Device(_))) {
                return Err(ENOENT);
            }
            self.translations
                .map(commit, spare, (range, Policy::Device));
            Ok(commit.range().end())
        })?
    }

    /// Maps the page of `va` for the GPU alone.
    ///
    /// # Errors
    ///
    /// Those of [`Mirror::make_exclusive`].
    pub(crate) fn make_exclusive(&self, va: usize, window: &mut Window) -> Result {
        let spare = SpareTable::new()?;

        self.mirror.make_exclusive(va, &mut window.faults, |page| {
            let mut mmu = self.translations.mmu.lock();
            let new = mmu.table(page.va(), spare).map_exclusive(page);
            self.account().add(Counter::PagesMapped, new.into());
        })
    }

    /// Whether any page of `range` is mapped for the GPU alone.
    pub(crate) fn any_exclusive(&self, range: PageRange) -> bool {
        self.translations.mmu.lock().any_exclusive(range)
    }

    /// Moves all that is in the GPU's memory to RAM, also what is of other processes.
    ///
    /// # Errors
    ///
    /// [`ENODEV`] if the GPU has no memory; [`EBUSY`] if some pages do not come, [`ENOMEM`].
    pub(crate) fn evict(&self) -> Result {
        self.vram.as_ref().ok_or(ENODEV)?.evict()
    }
}

impl Memory for &Svm {
    fn read(&mut self, va: usize, buf: &mut [u8]) -> Result<(), Miss> {
        self.translations.check(va, Access::Read)?;
        self.mirror.read(va, buf)?;
        self.account().add(Counter::BytesRead, buf.len());
        Ok(())
    }

    fn write(&mut self, va: usize, buf: &[u8]) -> Result<(), Miss> {
        self.translations.check(va, Access::Write)?;
        self.mirror.write(va, buf)?;
        self.account().add(Counter::BytesWritten, buf.len());
        Ok(())
    }
}

/// What it takes to service faults, one after the other.
pub(crate) struct Window {
    faults: FaultBuf,
    moves: MoveBuf,
}

impl Window {
    /// Allocates it for windows of one of the GPU's tables.
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

/// Bounds the faults that are serviced without a page of work in between.
///
/// A page may be taken away again before the GPU gets to use it. The core bounds the collisions
/// with one fault; this bounds how often that may follow.
pub(crate) struct Patience {
    steps: u64,
    faults: u32,
    since: Instant<Monotonic>,
}

impl Patience {
    /// A page of work takes six faults if each of three operands is faulted twice. Beyond these
    /// time counts; up to them it does not, since each may take as long as a fault handler likes.
    const FAULTS: u32 = 8;
    const LIMIT: Delta = Delta::from_secs(10);

    /// Starts at `now`, with nothing done.
    pub(crate) fn new(now: Instant<Monotonic>) -> Self {
        Self {
            steps: 0,
            faults: 0,
            since: now,
        }
    }

    /// Accounts for a fault at `now`, after `steps` pages of work.
    ///
    /// # Errors
    ///
    /// [`EBUSY`] if there were too many for too long since the last page of work.
    pub(crate) fn fault(&mut self, steps: u64, now: Instant<Monotonic>) -> Result {
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
#[kunit_tests(dummy_gpu_svm)]
mod tests {
    use super::*;

    const SECOND: Delta = Delta::from_secs(1);
    const HOUR: Delta = Delta::from_secs(3600);

    #[test]
    fn the_first_faults_of_a_page_may_take_any_time() -> Result {
        let mut now = Instant::now();
        let mut patience = Patience::new(now);

        for _ in 0..Patience::FAULTS {
            now = now + HOUR;
            patience.fault(0, now)?;
        }
        Ok(())
    }

    #[test]
    fn any_number_of_faults_may_take_a_short_time() -> Result {
        let mut now = Instant::now();
        let mut patience = Patience::new(now);

        for _ in 0..9000 {
            now = now + Delta::from_millis(1);
            patience.fault(0, now)?;
        }
        Ok(())
    }

    #[test]
    fn many_faults_for_a_long_time_are_too_much() -> Result {
        let mut now = Instant::now();
        let mut patience = Patience::new(now);

        for _ in 0..Patience::FAULTS + 10 {
            now = now + SECOND;
            patience.fault(0, now)?;
        }
        assert!(patience.fault(0, now + SECOND) == Err(EBUSY));
        Ok(())
    }

    #[test]
    fn a_page_of_work_starts_the_bound_afresh() -> Result {
        let mut now = Instant::now();
        let mut patience = Patience::new(now);

        for step in 0..100 {
            for _ in 0..Patience::FAULTS + 10 {
                now = now + SECOND;
                patience.fault(step, now)?;
            }
        }
        Ok(())
    }
}
