// SPDX-License-Identifier: GPL-2.0

//! Tests of `migrate.rs`, and of faults of pages in device memory.

use super::{
    super::{
        commit::{
            DevicePage,
            Entry,
            RamPage, //
        },
        copy::PageCopy,
        device_pool::DevicePool,
        evict::{
            evict_pfns,
            reserve as reserve_pages, //
        },
        fault::FaultRequest,
        folio::Effort,
        hmm_range::FaultBuf,
        migrate::MigrateBuf,
        migrate_vma::{
            Arrays,
            Collected,
            Holes,
            ToDevice,
            ToRam, //
        },
        mirror::Mirror,
        pfn::Access,
        pool_ops::{
            MigrateReason,
            RawData, //
        },
        range::PageRange,
        region::Cause,
        slots::{
            Node,
            Order, //
        }, //
    },
    device::{
        reserve,
        Counted,
        Tally,
        TestDevice,
        CHUNK, //
    },
    map_aligned,
    page,
    Recorder,
    MODULE, //
};
use core::ptr::null_mut;
use kernel::{
    bindings,
    kunit::user_mm::{
        with_user_mm,
        Prot,
        UserMm, //
    },
    page::PAGE_SIZE,
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc, //
    },
    time::{
        delay::fsleep,
        Delta, //
    },
    uaccess::{
        UserPtr,
        UserSlice, //
    },
    workqueue::system_dfl, //
};

/// Windows of 16 pages.
const ORDER: u32 = 4;
const WINDOW: usize = 1 << ORDER;

/// A process that is mirrored for a device with memory.
pub(super) struct Setup<D: Tally = u64> {
    pub(super) device: Arc<TestDevice<D>>,
    pub(super) pool: DevicePool<TestDevice<D>>,
    pub(super) mirror: Mirror,
    pub(super) ops: Arc<Recorder>,
    pub(super) buf: MigrateBuf,
}

impl<D: Tally> Setup<D> {
    /// The device has memory for `chunks` chunks. Up to 2^`order` pages migrate at a time.
    pub(super) fn with(chunks: usize, order: u32) -> Result<Self> {
        let (device, pool) = TestDevice::new(chunks)?;
        let ops = Recorder::new()?;
        Ok(Self {
            mirror: Mirror::new_with_pool(&MODULE, ops.clone(), &pool)?,
            ops,
            buf: MigrateBuf::new(order)?,
            device,
            pool,
        })
    }

    pub(super) fn migrate_out(&mut self, range: PageRange) -> Result<usize> {
        let migrated = self.mirror.mm()?.migrate_to_ram(range, &mut self.buf)?;
        Ok(migrated.pages())
    }

    pub(super) fn used(&self) -> usize {
        self.pool.pool().used_pages()
    }
}

impl Setup {
    fn new() -> Result<Self> {
        Self::with(1, ORDER)
    }

    pub(super) fn migrate_in(&mut self, range: PageRange) -> Result<usize> {
        self.migrate(range, Holes::Populate)
    }

    /// Migrates as a driver does before a read by the device: holes are not populated.
    fn migrate_for_read(&mut self, range: PageRange) -> Result<usize> {
        self.migrate(range, Holes::Keep)
    }

    fn migrate(&mut self, range: PageRange, holes: Holes) -> Result<usize> {
        let Self {
            mirror, pool, buf, ..
        } = self;
        let migrated = mirror
            .mm()?
            .migrate_to_device(pool, range, holes, buf, |_| Ok(1));
        migrated.map(|migrated| migrated.pages())
    }

    fn home(&self, reason: MigrateReason) -> u64 {
        self.device.home(reason)
    }

    fn freed(&self) -> u64 {
        self.device.freed.load(Relaxed)
    }
}

/// Faults `range` for `access`. Returns how many of its pages are in device memory and permit the
/// access.
fn fault(mirror: &Mirror, range: PageRange, access: Access) -> Result<usize> {
    let mut buf = FaultBuf::new(ORDER)?;
    let mm = mirror.mm()?;
    mm.fault(FaultRequest::new(range, access), &mut buf, |commit| {
        let needed = commit.needed();
        let device = commit.entries().filter(|(va, entry)| {
            let allowed = match entry {
                Entry::Device(DevicePage::Read(_)) => access == Access::Read,
                Entry::Device(DevicePage::Write(_)) => true,
                _ => false,
            };
            allowed && needed.is_some_and(|needed| needed.contains(*va))
        });
        device.count()
    })
}

/// Maps a window and fills its pages with `first`, `first + 1` and so on.
fn map_window(mm: &UserMm, first: Option<u8>) -> Result<PageRange> {
    let window = map_aligned(mm, WINDOW, Prot::ReadWrite)?;
    if let Some(first) = first {
        for (n, va) in window.page_addrs().enumerate() {
            user_write(va, first + n as u8)?;
        }
    }
    Ok(window)
}

/// Fills the page at `va`.
fn user_write(va: usize, byte: u8) -> Result {
    let bytes = [byte; 64];
    let mut writer = UserSlice::new(UserPtr::from_addr(va), PAGE_SIZE).writer();
    for _ in 0..PAGE_SIZE / bytes.len() {
        writer.write_slice(&bytes)?;
    }
    Ok(())
}

/// Whether the page at `va` is full of `byte`.
fn user_has(va: usize, byte: u8) -> Result<bool> {
    let mut bytes = [0; 64];
    let mut reader = UserSlice::new(UserPtr::from_addr(va), PAGE_SIZE).reader();
    for _ in 0..PAGE_SIZE / bytes.len() {
        reader.read_slice(&mut bytes)?;
        if bytes != [byte; 64] {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether the pages of `window` hold what `map_window(_, Some(first))` writes to them.
fn holds(window: PageRange, first: u8) -> Result<bool> {
    for (n, va) in window.page_addrs().enumerate() {
        if !user_has(va, first + n as u8)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Fills the pool with pages that hold 7, and returns their range.
fn fill(mm: &UserMm, setup: &mut Setup) -> Result<PageRange> {
    let all = map_aligned(mm, CHUNK, Prot::ReadWrite)?;
    for va in all.page_addrs() {
        user_write(va, 7)?;
    }
    for start in all.page_addrs().step_by(WINDOW) {
        let window = PageRange::from_len(start, WINDOW * PAGE_SIZE)?;
        if setup.migrate_in(window)? != WINDOW {
            return Err(EIO);
        }
    }
    Ok(all)
}

/// Page data for the pool of a [`Setup`].
fn number(_pages: usize) -> Result<RawData> {
    // SAFETY: The page data of `TestDevice<u64>` is a `u64`.
    Ok(unsafe { RawData::new(5u64) })
}

fn first_byte(mirror: &Mirror, va: usize) -> Option<u8> {
    let mut byte = [0];
    mirror.read(va, &mut byte).ok().map(|()| byte[0])
}

#[kunit_tests(hmm_migrate)]
mod tests {
    use super::*;

    #[test]
    fn pages_go_to_the_device_are_written_there_and_come_home_when_touched() -> Result {
        with_user_mm(|mm| {
            let mut setup = Setup::new()?;
            let window = map_window(mm, Some(1))?;
            assert_eq!(setup.migrate_in(window)?, WINDOW);
            assert_eq!(setup.used(), WINDOW);
            assert_eq!(fault(&setup.mirror, window, Access::Write)?, WINDOW);
            for (n, va) in window.page_addrs().enumerate() {
                assert_eq!(first_byte(&setup.mirror, va), Some(1 + n as u8));
                assert!(setup.mirror.write(va, &[101 + n as u8; PAGE_SIZE]).is_ok());
            }
            assert!(holds(window, 101)?);
            // One CPU fault migrated the whole aligned block; no device page is in use any more.
            assert_eq!(setup.home(MigrateReason::CpuFault), WINDOW as u64);
            assert_eq!(setup.freed(), WINDOW as u64);
            assert_eq!(setup.used(), 0);
            Ok(())
        })
    }

    #[test]
    fn an_entry_does_not_outlive_a_migration_either_way() -> Result {
        with_user_mm(|mm| {
            let mut setup = Setup::new()?;
            let window = map_window(mm, Some(1))?;
            let va = window.start();
            assert_eq!(fault(&setup.mirror, window, Access::Write)?, 0);
            assert_eq!(first_byte(&setup.mirror, va), Some(1));
            setup.migrate_in(window)?;
            assert_eq!(first_byte(&setup.mirror, va), None);
            assert!(setup.mirror.write(va, &[9]).is_err());
            assert_eq!(fault(&setup.mirror, window, Access::Write)?, WINDOW);
            assert_eq!(first_byte(&setup.mirror, va), Some(1));
            assert!(user_has(va, 1)?);
            assert_eq!(first_byte(&setup.mirror, va), None);
            Ok(())
        })
    }

    #[test]
    fn holes_and_the_zero_page_are_zeroes_on_the_device() -> Result {
        with_user_mm(|mm| {
            let mut setup = Setup::new()?;
            let window = map_window(mm, None)?;
            assert!(user_has(page(window, 1)?.start(), 0)?);
            user_write(page(window, 2)?.start(), 2)?;
            assert_eq!(setup.migrate_in(window)?, WINDOW);
            assert_eq!(fault(&setup.mirror, window, Access::Read)?, WINDOW);
            let mut bytes = KVec::from_elem(0xff, PAGE_SIZE, GFP_KERNEL)?;
            for (n, va) in window.page_addrs().enumerate() {
                let byte = if n == 2 { 2 } else { 0 };
                assert!(setup.mirror.read(va, &mut bytes).is_ok());
                assert!(bytes.iter().all(|b| *b == byte));
            }
            for (n, va) in window.page_addrs().enumerate() {
                assert!(user_has(va, if n == 2 { 2 } else { 0 })?);
            }
            Ok(())
        })
    }

    #[test]
    fn a_copy_that_fails_leaves_the_pages_in_ram() -> Result {
        with_user_mm(|mm| {
            let mut setup = Setup::new()?;
            let window = map_window(mm, Some(1))?;
            let hole = map_window(mm, None)?;
            // The copy fails after the first half of the window: no page moves.
            setup.device.most.store(WINDOW / 2, Relaxed);
            assert_eq!(setup.migrate_in(window), Err(EIO));
            assert_eq!(setup.migrate_in(hole), Err(EIO));
            assert_eq!(setup.used(), 0);
            assert_eq!(setup.freed(), 2 * WINDOW as u64);
            assert_eq!(fault(&setup.mirror, window, Access::Write)?, 0);
            for (n, va) in window.page_addrs().enumerate() {
                assert_eq!(first_byte(&setup.mirror, va), Some(1 + n as u8));
                assert!(user_has(va, 1 + n as u8)?);
            }
            for va in hole.page_addrs() {
                assert!(user_has(va, 0)?);
            }
            Ok(())
        })
    }

    #[test]
    fn a_batch_that_is_not_taken_to_its_end_moves_nothing() -> Result {
        with_user_mm(|mm| {
            let mut setup = Setup::new()?;
            let window = map_window(mm, None)?;
            // Pages alternate with holes, so each is a run of its own.
            for va in window.page_addrs().step_by(2) {
                user_write(va, 1)?;
            }
            setup.device.most.store(WINDOW / 2, Relaxed);
            setup.device.honest.store(false, Relaxed);
            assert_eq!(setup.migrate_in(window), Err(EIO));
            assert_eq!(setup.used(), 0);
            for (n, va) in window.page_addrs().enumerate() {
                assert!(user_has(va, 1 - n as u8 % 2)?);
            }
            Ok(())
        })
    }

    #[test]
    fn memory_that_was_not_written_is_never_mapped() -> Result {
        with_user_mm(|mm| {
            let mut setup = Setup::new()?;
            let window = map_window(mm, Some(1))?;
            setup.migrate_in(window)?;
            for short in [1, PAGE_SIZE] {
                setup.device.short.store(short, Relaxed);
                assert_eq!(setup.migrate_out(window), Err(EIO));
                assert_eq!(user_has(window.start(), 1), Err(EFAULT));
            }
            assert_eq!(setup.used(), WINDOW);
            setup.device.short.store(0, Relaxed);
            assert!(holds(window, 1)?);
            Ok(())
        })
    }

    #[test]
    fn a_copy_home_that_fails_leaves_the_pages_on_the_device() -> Result {
        with_user_mm(|mm| {
            let mut setup = Setup::new()?;
            let window = map_window(mm, Some(1))?;
            setup.migrate_in(window)?;
            setup.device.most.store(0, Relaxed);
            assert_eq!(user_has(window.start(), 1), Err(EFAULT));
            assert_eq!(setup.migrate_out(window), Err(EIO));
            assert_eq!(setup.used(), WINDOW);
            assert_eq!(fault(&setup.mirror, window, Access::Write)?, WINDOW);
            setup.device.most.store(usize::MAX, Relaxed);
            assert!(holds(window, 1)?);
            assert_eq!(setup.used(), 0);
            Ok(())
        })
    }

    #[test]
    fn a_device_without_memory_to_copy_is_sigbus_and_no_endless_fault() -> Result {
        with_user_mm(|mm| {
            let mut setup = Setup::new()?;
            let window = map_window(mm, Some(1))?;
            setup.migrate_in(window)?;
            setup.device.says.store(ENOMEM.to_errno(), Relaxed);
            setup.device.most.store(0, Relaxed);
            assert_eq!(user_has(window.start(), 1), Err(EFAULT));
            assert_eq!(setup.migrate_out(window), Err(ENOMEM));
            setup.device.most.store(usize::MAX, Relaxed);
            assert_eq!(user_has(window.start(), 1), Ok(true));
            Ok(())
        })
    }

    #[test]
    fn a_pool_whose_device_fails_ends_when_that_works_again() -> Result {
        with_user_mm(|mm| {
            let Setup {
                device,
                pool,
                mirror,
                mut buf,
                ..
            } = Setup::new()?;
            let window = map_window(mm, Some(1))?;
            mirror
                .mm()?
                .migrate_to_device(&pool, window, Holes::Populate, &mut buf, |_| Ok(1))?;
            device.most.store(0, Relaxed);
            let repaired = device.clone();
            system_dfl().try_spawn(GFP_KERNEL, move || {
                fsleep(Delta::from_millis(50));
                repaired.most.store(usize::MAX, Relaxed);
            })?;
            drop(pool);
            assert_eq!(device.home(MigrateReason::Evict), WINDOW as u64);
            assert!(holds(window, 1)?);
            Ok(())
        })
    }

    #[test]
    fn a_neighbour_that_fails_does_not_fail_the_page() -> Result {
        with_user_mm(|mm| {
            let mut setup = Setup::new()?;
            let window = map_window(mm, Some(1))?;
            setup.migrate_in(window)?;
            // One page cannot be copied. Only this page stays, for each way of migrating back.
            setup.device.bad.store(9 * PAGE_SIZE, Relaxed);
            assert!(user_has(page(window, 5)?.start(), 6)?);
            assert_eq!(setup.used(), 1);
            assert_eq!(setup.migrate_out(window), Err(EIO));
            let touched = user_has(page(window, 9)?.start(), 10);
            assert_eq!(touched, Err(EFAULT));
            assert_eq!(fault(&setup.mirror, page(window, 9)?, Access::Write)?, 1);
            setup.device.bad.store(usize::MAX, Relaxed);
            assert!(holds(window, 1)?);
            Ok(())
        })
    }

    #[test]
    fn holes_around_a_page_do_not_come_home_with_it() -> Result {
        with_user_mm(|mm| {
            let mut setup = Setup::new()?;
            let window = map_window(mm, None)?;
            for n in [3, 9] {
                assert_eq!(setup.migrate_in(page(window, n)?)?, 1);
            }
            assert!(user_has(page(window, 3)?.start(), 0)?);
            assert_eq!(setup.home(MigrateReason::CpuFault), 2);
            assert_eq!(setup.migrate_in(page(window, 3)?)?, 1);
            assert_eq!(setup.migrate_out(window)?, 1);
            // The other pages are still holes.
            assert_eq!(fault(&setup.mirror, window, Access::Read)?, 0);
            assert_eq!(setup.used(), 0);
            Ok(())
        })
    }

    #[test]
    fn a_full_pool_evicts_those_that_came_first() -> Result {
        with_user_mm(|mm| {
            let mut setup = Setup::new()?;
            let windows = CHUNK / WINDOW + 2;
            let len = windows * WINDOW * PAGE_SIZE;
            let align = WINDOW * PAGE_SIZE;
            let addr = mm.mmap_anonymous(len + align, Prot::ReadWrite)?;
            let all = PageRange::from_len(addr.next_multiple_of(align), len)?;
            for (n, va) in all.page_addrs().enumerate() {
                user_write(va, n as u8)?;
            }
            for n in 0..windows {
                let window = PageRange::from_len(all.start() + n * align, align)?;
                assert_eq!(setup.migrate_in(window)?, WINDOW);
            }
            assert_eq!(setup.used(), CHUNK);
            assert_eq!(setup.home(MigrateReason::Evict), 2 * WINDOW as u64);
            let first = PageRange::from_len(all.start(), align)?;
            let last = PageRange::new(all.end() - align, all.end())?;
            assert_eq!(fault(&setup.mirror, first, Access::Read)?, 0);
            assert_eq!(fault(&setup.mirror, last, Access::Read)?, WINDOW);
            // Pages that are already on the device need no room.
            assert_eq!(setup.migrate_in(last)?, 0);
            assert_eq!(setup.home(MigrateReason::Evict), 2 * WINDOW as u64);
            for (n, va) in all.page_addrs().enumerate() {
                assert!(user_has(va, n as u8)?);
            }
            assert_eq!(setup.used(), 0);
            Ok(())
        })
    }

    #[test]
    fn a_read_by_the_device_populates_nothing() -> Result {
        with_user_mm(|mm| {
            let mut setup = Setup::new()?;
            let window = map_window(mm, None)?;
            // If no page moves, the pool does not grow.
            assert_eq!(setup.migrate_for_read(window)?, 0);
            assert_eq!(setup.pool.pool().chunks(), 0);
            assert!(user_has(page(window, 1)?.start(), 0)?);
            user_write(page(window, 2)?.start(), 2)?;
            assert_eq!(setup.migrate_for_read(window)?, 1);
            assert_eq!(setup.used(), 1);
            assert_eq!(setup.migrate_for_read(window)?, 0);
            assert_eq!(fault(&setup.mirror, window, Access::Read)?, 1);
            assert_eq!(setup.used(), 1);
            for (n, va) in window.page_addrs().enumerate() {
                let byte = if n == 2 { 2 } else { 0 };
                assert_eq!(first_byte(&setup.mirror, va), Some(byte));
            }
            // All pages except one are the zero page.
            let mut buf = FaultBuf::new(ORDER)?;
            let zero =
                setup
                    .mirror
                    .mm()?
                    .fault(FaultRequest::snapshot(window), &mut buf, |commit| {
                        let zero = commit.entries().filter(|(_, entry)| match entry {
                            Entry::Ram(RamPage::Read(page)) => page.is_zero(),
                            _ => false,
                        });
                        zero.count()
                    })?;
            assert_eq!(zero, WINDOW - 1);
            assert_eq!(setup.migrate_in(window)?, WINDOW - 1);
            Ok(())
        })
    }

    #[test]
    fn nothing_is_evicted_for_what_does_not_move() -> Result {
        with_user_mm(|mm| {
            let mut setup = Setup::new()?;
            let full = fill(mm, &mut setup)?;
            assert_eq!(setup.used(), CHUNK);

            // Nothing is evicted for pinned pages.
            let window = map_window(mm, Some(1))?;
            let mut pages = [null_mut(); WINDOW];
            // SAFETY: The array has an element for each page; the current task uses the mm.
            let pinned = unsafe {
                bindings::pin_user_pages_fast(
                    window.start(),
                    WINDOW as c_int,
                    bindings::FOLL_WRITE,
                    pages.as_mut_ptr(),
                )
            };
            assert_eq!(pinned, WINDOW as c_int);
            let moved = setup.migrate_in(window);
            // SAFETY: The pages were pinned just now.
            unsafe { bindings::unpin_user_pages(pages.as_mut_ptr(), WINDOW) };
            assert_eq!(moved, Ok(0));
            assert_eq!(setup.home(MigrateReason::Evict), 0);

            // Page cache does not move, except for one private copy.
            let len = WINDOW * PAGE_SIZE;
            let file = mm.mmap_shmem(len, len, Prot::ReadWrite, false)?;
            let file = PageRange::from_len(file, len)?;
            user_write(file.start(), 1)?;
            assert!(user_has(page(file, 1)?.start(), 0)?);
            let mut moved = 0;
            for index in 0..WINDOW {
                moved += setup.migrate_in(page(file, index)?)?;
            }
            assert_eq!(moved, 1);
            assert_eq!(setup.home(MigrateReason::Evict), 1);

            // Nothing is evicted for PROT_NONE memory, nor for holes that are only read.
            let none = map_aligned(mm, WINDOW, Prot::None)?;
            assert_eq!(setup.migrate_in(none)?, 0);
            let hole = map_window(mm, None)?;
            assert_eq!(setup.migrate_for_read(hole)?, 0);
            assert_eq!(setup.home(MigrateReason::Evict), 1);

            // As many pages are evicted as move to the device.
            assert_eq!(setup.migrate_in(page(window, 0)?)?, 1);
            assert_eq!(setup.home(MigrateReason::Evict), 2);
            assert_eq!(setup.migrate_in(window)?, WINDOW - 1);
            assert_eq!(setup.home(MigrateReason::Evict), WINDOW as u64 + 1);
            assert!(holds(window, 1)?);
            for va in full.page_addrs() {
                assert!(user_has(va, 7)?);
            }
            Ok(())
        })
    }

    #[test]
    fn pages_that_the_device_cannot_copy_do_not_keep_others_from_being_evicted() -> Result {
        with_user_mm(|mm| {
            let mut setup = Setup::new()?;
            fill(mm, &mut setup)?;
            let window = map_window(mm, Some(1))?;
            // The oldest two batches cannot be copied back.
            setup.device.bad.store(0, Relaxed);
            setup.device.bad_pages.store(2 * WINDOW, Relaxed);
            assert_eq!(setup.migrate_in(window)?, WINDOW);
            assert_eq!(setup.home(MigrateReason::Evict), WINDOW as u64);
            setup.device.bad.store(usize::MAX, Relaxed);
            assert!(holds(window, 1)?);
            Ok(())
        })
    }

    #[test]
    fn no_data_is_asked_for_where_there_is_no_room() -> Result {
        with_user_mm(|mm| {
            let setup = Setup::new()?;
            let window = map_window(mm, Some(1))?;
            let pool = setup.pool.pool();
            let (mut few, mut rest) = ([0; WINDOW], KVec::from_elem(0, CHUNK - 4, GFP_KERNEL)?);
            let rest = reserve(pool, &mut rest)?;
            let mut reservation = reserve_pages(pool, &mut few, 2)?;
            let mut buf = MigrateBuf::new(ORDER)?;
            let mut asked = 0;
            let mut data = |_| {
                asked += 1;
                number(1)
            };

            let guard = mm.mm().mmap_read_lock();
            let vma = guard.vma_lookup(window.start()).ok_or(EFAULT)?;
            let arrays = buf.arrays().0;
            // SAFETY: `guard` holds mmap_lock.
            let collected =
                unsafe { Collected::<ToDevice>::at(pool, vma, window, Order::PAGE, arrays) }?;
            // The reservation has two pages, and two more are free in the pool.
            let (copied, short) = collected.copy(&mut reservation, Holes::Keep, &mut data)?;
            let moved = copied.commit().pages();
            drop(guard);
            assert_eq!((moved, short, asked), (4, WINDOW - 4, 4));
            drop(rest);
            assert_eq!(setup.used(), 4);
            assert!(holds(window, 1)?);
            assert_eq!(setup.freed(), 4);
            Ok(())
        })
    }

    #[test]
    fn pages_stay_if_the_device_is_lost_after_the_copy() -> Result {
        with_user_mm(|mm| {
            let setup = Setup::new()?;
            let window = map_window(mm, Some(1))?;
            let pool = setup.pool.pool();
            let mut pfns = [0; WINDOW];
            let mut reservation = reserve_pages(pool, &mut pfns, WINDOW)?;
            let mut buf = MigrateBuf::new(ORDER)?;

            let guard = mm.mm().mmap_read_lock();
            let vma = guard.vma_lookup(window.start()).ok_or(EFAULT)?;
            let arrays = buf.arrays().0;
            // SAFETY: `guard` holds mmap_lock.
            let collected =
                unsafe { Collected::<ToDevice>::at(pool, vma, window, Order::PAGE, arrays) }?;
            let (copied, _) = collected.copy(&mut reservation, Holes::Keep, &mut number)?;
            pool.set_lost();
            assert_eq!(copied.commit().pages(), 0);
            drop(guard);
            assert!(holds(window, 1)?);
            assert_eq!(setup.freed(), WINDOW as u64);
            Ok(())
        })
    }

    #[test]
    fn a_device_that_asks_to_be_called_again_is_waited_for() -> Result {
        with_user_mm(|mm| {
            let mut setup = Setup::new()?;
            for err in [EAGAIN, EBUSY, EINTR] {
                let window = map_window(mm, Some(1))?;
                setup.migrate_in(window)?;
                setup.device.says.store(err.to_errno(), Relaxed);
                setup.device.most.store(0, Relaxed);
                let repaired = setup.device.clone();
                system_dfl().try_spawn(GFP_KERNEL, move || {
                    fsleep(Delta::from_millis(20));
                    repaired.most.store(usize::MAX, Relaxed);
                })?;
                assert!(user_has(window.start(), 1)?);
                assert!(holds(window, 1)?);
            }
            Ok(())
        })
    }

    #[test]
    fn a_page_that_somebody_has_is_waited_for() -> Result {
        with_user_mm(|mm| {
            let mut setup = Setup::new()?;
            let window = map_window(mm, Some(1))?;
            setup.migrate_in(window)?;
            let mut pfns = [0];
            assert_eq!(setup.pool.pool().rotate_oldest(&mut pfns), (1, Order::PAGE));
            // The device page of the first page of the window.
            // SAFETY: The pfn is of a page of the pool, which has a struct page.
            let page = unsafe { bindings::pfn_to_page(pfns[0]) } as usize;
            // SAFETY: The mapping holds a reference, since the process has not touched the page.
            unsafe { bindings::folio_get((page as *mut bindings::page).cast()) };
            system_dfl().try_spawn(GFP_KERNEL, move || {
                fsleep(Delta::from_millis(20));
                // SAFETY: The reference was taken by folio_get() above.
                unsafe { bindings::folio_put((page as *mut bindings::page).cast()) };
            })?;
            assert!(user_has(window.start(), 1)?);
            assert!(holds(window, 1)?);
            Ok(())
        })
    }

    #[test]
    fn a_pool_without_room_is_enomem_and_the_range_works_on_in_ram() -> Result {
        with_user_mm(|mm| {
            let mut setup = Setup::new()?;
            let window = map_window(mm, Some(1))?;
            let mut pfns = KVec::from_elem(0, CHUNK, GFP_KERNEL)?;
            let inner = setup.pool.pool().clone();
            let all = reserve(&inner, &mut pfns)?;
            assert_eq!(setup.migrate_in(window), Err(ENOMEM));
            assert_eq!(fault(&setup.mirror, window, Access::Write)?, 0);
            assert!(setup.mirror.write(window.start(), &[9; PAGE_SIZE]).is_ok());
            assert!(user_has(window.start(), 9)?);
            drop(all);
            assert_eq!(setup.migrate_in(window)?, WINDOW);
            Ok(())
        })
    }

    #[test]
    fn page_data_that_is_an_object_goes_with_the_page() -> Result {
        with_user_mm(|mm| {
            let (device, pool) = TestDevice::<Arc<Counted>>::new(1)?;
            let mirror = Mirror::new_with_pool(&MODULE, Recorder::new()?, &pool)?;
            let mut buf = MigrateBuf::new(ORDER)?;
            let dropped = Arc::new(Atomic::new(0), GFP_KERNEL)?;
            let window = map_window(mm, Some(1))?;
            let data = || {
                Arc::new(
                    Counted {
                        value: 3,
                        dropped: dropped.clone(),
                    },
                    GFP_KERNEL,
                )
            };
            let mut made = KVec::with_capacity(WINDOW, GFP_KERNEL)?;
            for _ in 0..WINDOW {
                made.push_within_capacity(data()?)?;
            }
            let spare = data()?;
            mirror
                .mm()?
                .migrate_to_device(&pool, window, Holes::Populate, &mut buf, |_| {
                    Ok(made.pop().unwrap_or(spare.clone()))
                })?;
            assert!(made.is_empty());
            assert_eq!(dropped.load(Relaxed), 0);
            assert!(user_has(window.start(), 1)?);
            assert_eq!(dropped.load(Relaxed), WINDOW as u64);
            assert_eq!(device.freed.load(Relaxed), WINDOW as u64);
            assert_eq!(device.sum.load(Relaxed), 3 * WINDOW as u64);
            Ok(())
        })
    }

    #[test]
    fn unmapping_frees_the_pages_of_the_device() -> Result {
        with_user_mm(|mm| {
            let mut setup = Setup::new()?;
            let window = map_window(mm, Some(1))?;
            setup.migrate_in(window)?;
            mm.munmap(window.start(), window.len())?;
            assert_eq!(setup.freed(), WINDOW as u64);
            assert_eq!(setup.device.sum.load(Relaxed), WINDOW as u64);
            assert_eq!(setup.used(), 0);
            Ok(())
        })
    }

    #[test]
    fn a_process_that_ends_frees_the_pages_of_the_device() -> Result {
        let setup = with_user_mm(|mm| {
            let mut setup = Setup::new()?;
            let window = map_window(mm, Some(1))?;
            setup.migrate_in(window)?;
            assert_eq!(setup.used(), WINDOW);
            Ok(setup)
        })?;
        assert_eq!(setup.used(), 0);
        assert_eq!(setup.freed(), WINDOW as u64);
        Ok(())
    }

    #[test]
    fn what_is_dropped_between_the_move_and_its_end_is_freed_once() -> Result {
        with_user_mm(|mm| {
            let setup = Setup::new()?;
            let window = map_window(mm, Some(1))?;
            let pool = setup.pool.pool();
            let mut pfns = [0; WINDOW];
            let mut reservation = reserve(pool, &mut pfns)?;
            let mut buf = MigrateBuf::new(ORDER)?;

            let guard = mm.mm().mmap_read_lock();
            let vma = guard.vma_lookup(window.start()).ok_or(EFAULT)?;
            let arrays = buf.arrays().0;
            // SAFETY: `guard` holds mmap_lock.
            let collected =
                unsafe { Collected::<ToDevice>::at(pool, vma, window, Order::PAGE, arrays) }?;
            let (copied, _) = collected.copy(&mut reservation, Holes::Keep, &mut number)?;
            let committed = copied.commit();
            // Unmap some of the pages between commit and finalize, as MADV_DONTNEED would.
            vma.zap_vma_range(window.start(), 4 * PAGE_SIZE);
            let moved = committed.pages();
            drop(committed);
            drop(guard);
            assert_eq!(moved, WINDOW);

            assert_eq!(setup.used(), WINDOW - 4);
            assert_eq!(setup.freed(), 4);
            for (n, va) in window.page_addrs().enumerate() {
                assert!(user_has(va, if n < 4 { 0 } else { 1 + n as u8 })?);
            }
            assert_eq!(setup.freed(), WINDOW as u64);
            Ok(())
        })
    }

    #[test]
    fn what_was_copied_but_not_committed_stays_where_it_was() -> Result {
        with_user_mm(|mm| {
            let setup = Setup::new()?;
            let window = map_window(mm, Some(1))?;
            let pool = setup.pool.pool();
            let mut pfns = [0; WINDOW];
            let mut reservation = reserve(pool, &mut pfns)?;
            let mut buf = MigrateBuf::new(ORDER)?;

            let guard = mm.mm().mmap_read_lock();
            let vma = guard.vma_lookup(window.start()).ok_or(EFAULT)?;
            let arrays = buf.arrays().0;
            // SAFETY: `guard` holds mmap_lock.
            let collected =
                unsafe { Collected::<ToDevice>::at(pool, vma, window, Order::PAGE, arrays) }?;
            drop(collected.copy(&mut reservation, Holes::Keep, &mut number)?);
            drop(guard);
            drop(reservation);

            assert_eq!(setup.used(), 0);
            assert_eq!(setup.freed(), WINDOW as u64);
            assert!(holds(window, 1)?);
            Ok(())
        })
    }

    #[test]
    fn a_pool_that_ends_brings_its_pages_home() -> Result {
        with_user_mm(|mm| {
            let Setup {
                device,
                pool,
                mirror,
                mut buf,
                ..
            } = Setup::new()?;
            let window = map_window(mm, Some(1))?;
            mirror
                .mm()?
                .migrate_to_device(&pool, window, Holes::Populate, &mut buf, |_| Ok(1))?;
            assert_eq!(fault(&mirror, window, Access::Write)?, WINDOW);
            assert!(mirror.write(window.start(), &[77; PAGE_SIZE]).is_ok());
            drop(pool);
            assert_eq!(device.home(MigrateReason::Evict), WINDOW as u64);
            assert_eq!(device.freed.load(Relaxed), WINDOW as u64);
            assert_eq!(fault(&mirror, window, Access::Write)?, 0);
            for (n, va) in window.page_addrs().enumerate() {
                assert!(user_has(va, if n == 0 { 77 } else { 1 + n as u8 })?);
            }
            Ok(())
        })
    }

    #[test]
    fn a_page_that_left_is_not_evicted_again() -> Result {
        with_user_mm(|mm| {
            let mut setup = Setup::new()?;
            let window = map_window(mm, Some(1))?;
            setup.migrate_in(window)?;
            // One of the pages leaves the device after another task has picked it for eviction.
            let mut pfns = [0; WINDOW];
            assert_eq!(
                setup.pool.pool().rotate_oldest(&mut pfns),
                (WINDOW, Order::PAGE)
            );
            setup.pool.pool().mark_unused([0].into_iter());
            let pool = setup.pool.pool();
            // SAFETY: The pfns are of chunks of this pool, which `setup` keeps alive.
            let evicted = unsafe { evict_pfns(pool, &mut pfns, Effort::Try) };
            assert_eq!(evicted, Ok(WINDOW - 1));
            assert_eq!(setup.home(MigrateReason::Evict), WINDOW as u64 - 1);
            setup
                .pool
                .pool()
                .mark_used([(0, Node::new(0)?)].into_iter());
            assert!(holds(window, 1)?);
            assert_eq!(setup.used(), 0);
            Ok(())
        })
    }

    #[test]
    fn pages_that_are_unmapped_while_they_are_evicted_are_freed() -> Result {
        with_user_mm(|mm| {
            let mut setup = Setup::new()?;
            // The process has no other mapping.
            let va = mm.mmap_anonymous(PAGE_SIZE, Prot::ReadWrite)?;
            let page = PageRange::from_len(va, PAGE_SIZE)?;
            user_write(va, 1)?;
            assert_eq!(setup.migrate_in(page)?, 1);
            let (mut pfns, mut dst, mut copies) = ([0], [0], [PageCopy::NONE]);
            assert_eq!(setup.pool.pool().rotate_oldest(&mut pfns), (1, Order::PAGE));
            let arrays = Arrays {
                src: &mut pfns,
                dst: &mut dst,
                copies: &mut copies,
            };
            // SAFETY: The pfns are of chunks of this pool, which `setup` keeps alive.
            let collected = unsafe { Collected::<ToRam>::pfns(setup.pool.pool(), arrays, 1) };
            // munmap() frees the VMA and with it the anon_vma, after an RCU grace period.
            let unmapped = mm.munmap(va, PAGE_SIZE);
            fsleep(Delta::from_millis(100));
            drop(
                collected
                    .copy(Effort::Try, None)?
                    .commit(MigrateReason::Evict),
            );
            unmapped?;
            assert_eq!(setup.used(), 0);
            assert_eq!(setup.freed(), 1);
            Ok(())
        })
    }

    #[test]
    fn a_fault_whose_page_has_gone_asks_nothing_of_its_neighbours() -> Result {
        with_user_mm(|mm| {
            let mut setup = Setup::new()?;
            let window = map_window(mm, Some(1))?;
            setup.migrate_in(window)?;
            let guard = mm.mm().mmap_read_lock();
            let vma = guard.vma_lookup(window.start()).ok_or(EFAULT)?;
            vma.zap_vma_range(window.start(), PAGE_SIZE);
            let (mut src, mut dst) = ([0; WINDOW], [0; WINDOW]);
            let mut copies = [PageCopy::NONE; WINDOW];
            let arrays = Arrays {
                src: &mut src,
                dst: &mut dst,
                copies: &mut copies,
            };
            let pool = setup.pool.pool();
            // SAFETY: mmap_lock is held, and the fault page is null.
            let collected = unsafe {
                Collected::<ToRam>::at(pool, vma, window, Order::PAGE, null_mut(), arrays)
            }?;
            let copied = collected.copy(Effort::Try, Some(0))?;
            drop(copied.commit(MigrateReason::CpuFault));
            drop(guard);
            assert_eq!(setup.used(), WINDOW - 1);
            assert_eq!(setup.home(MigrateReason::CpuFault), 0);
            Ok(())
        })
    }

    #[test]
    fn memory_that_may_not_be_read_gets_no_place() -> Result {
        with_user_mm(|mm| {
            let mut setup = Setup::new()?;
            let len = WINDOW * PAGE_SIZE;
            let none = PageRange::from_len(mm.mmap_anonymous(len, Prot::None)?, len)?;
            assert_eq!(setup.migrate_in(none)?, 0);
            assert_eq!(setup.freed(), 0);
            assert_eq!(setup.used(), 0);
            let read = PageRange::from_len(mm.mmap_anonymous(len, Prot::Read)?, len)?;
            assert!(setup.migrate_in(read)? > 0);
            Ok(())
        })
    }

    #[test]
    fn a_driver_is_told_whose_memory_pages_migrate_to() -> Result {
        with_user_mm(|mm| {
            let mut setup = Setup::new()?;
            let window = map_window(mm, Some(1))?;
            let others = Recorder::new()?;
            let other = Mirror::new(&MODULE, others.clone())?;
            fault(&setup.mirror, window, Access::Read)?;
            fault(&other, window, Access::Read)?;
            assert_eq!(setup.migrate_in(window)?, WINDOW);
            assert_eq!(setup.ops.cause(), Some(Cause::OwnMigration));
            assert_eq!(others.cause(), Some(Cause::OtherMigration));

            fault(&setup.mirror, window, Access::Read)?;
            assert_eq!(setup.migrate_out(window)?, WINDOW);
            assert_eq!(setup.ops.cause(), Some(Cause::OwnMigration));
            Ok(())
        })
    }

    #[test]
    fn pages_come_home_on_request() -> Result {
        with_user_mm(|mm| {
            let mut setup = Setup::new()?;
            let window = map_window(mm, Some(1))?;
            assert_eq!(setup.migrate_out(window)?, 0);
            setup.migrate_in(window)?;
            let part = PageRange::from_len(page(window, 2)?.start(), 3 * PAGE_SIZE)?;
            assert_eq!(setup.migrate_out(part)?, 3);
            assert_eq!(setup.migrate_out(window)?, WINDOW - 3);
            assert_eq!(setup.home(MigrateReason::Request), WINDOW as u64);
            assert_eq!(setup.home(MigrateReason::CpuFault), 0);
            assert!(holds(window, 1)?);
            Ok(())
        })
    }

    #[test]
    fn a_page_of_another_device_comes_home_before_it_is_faulted() -> Result {
        with_user_mm(|mm| {
            let mut setup = Setup::new()?;
            let other = Setup::new()?;
            let window = map_window(mm, Some(1))?;
            setup.migrate_in(window)?;
            assert_eq!(fault(&other.mirror, window, Access::Read)?, 0);
            assert_eq!(first_byte(&other.mirror, window.start()), Some(1));
            assert_eq!(setup.used(), 0);
            // A mirror cannot migrate to the pool of another device.
            let migrated = setup.mirror.mm()?.migrate_to_device(
                &other.pool,
                window,
                Holes::Keep,
                &mut setup.buf,
                |_| Ok(1),
            );
            assert_eq!(migrated.err(), Some(EINVAL));
            Ok(())
        })
    }

    #[test]
    fn a_write_to_a_read_only_page_of_the_device_is_eperm_and_moves_nothing() -> Result {
        with_user_mm(|mm| {
            let mut setup = Setup::new()?;
            let window = map_aligned(mm, WINDOW, Prot::Read)?;
            assert_eq!(setup.migrate_in(window)?, WINDOW);
            let result = fault(&setup.mirror, window, Access::Write);
            assert_eq!(result, Err(EPERM));
            assert_eq!(fault(&setup.mirror, window, Access::Read)?, WINDOW);
            assert!(setup.mirror.write(window.start(), &[1]).is_err());
            assert_eq!(setup.used(), WINDOW);
            Ok(())
        })
    }

    #[test]
    fn shared_memory_stays_in_ram() -> Result {
        with_user_mm(|mm| {
            let mut setup = Setup::new()?;
            let va = mm.mmap_shmem(PAGE_SIZE, PAGE_SIZE, Prot::ReadWrite, true)?;
            let range = PageRange::from_len(va, PAGE_SIZE)?;
            user_write(va, 1)?;
            assert_eq!(setup.migrate_in(range)?, 0);
            assert_eq!(fault(&setup.mirror, range, Access::Write)?, 0);
            assert_eq!(first_byte(&setup.mirror, va), Some(1));
            assert_eq!(setup.freed(), 0);
            Ok(())
        })
    }

    #[test]
    fn the_process_s_own_copies_of_a_file_s_pages_migrate() -> Result {
        with_user_mm(|mm| {
            let mut setup = Setup::new()?;
            let len = 4 * PAGE_SIZE;
            let range = PageRange::from_len(mm.mmap_shmem(len, len, Prot::ReadWrite, false)?, len)?;
            let (copy, file) = (page(range, 1)?.start(), page(range, 2)?.start());
            assert!(user_has(file, 0)?);
            assert_eq!(setup.migrate_in(range)?, 0);
            user_write(copy, 5)?;
            let mut pages = 0;
            for index in 0..4 {
                pages += setup.migrate_in(page(range, index)?)?;
            }
            assert_eq!(pages, 1);
            assert_eq!(setup.used(), 1);
            assert_eq!(fault(&setup.mirror, page(range, 1)?, Access::Write)?, 1);
            assert_eq!(fault(&setup.mirror, page(range, 2)?, Access::Read)?, 0);
            assert!(setup.mirror.write(copy, &[6; PAGE_SIZE]).is_ok());
            assert!(user_has(copy, 6)?);
            assert!(user_has(file, 0)?);
            assert_eq!(setup.used(), 0);
            Ok(())
        })
    }

    #[test]
    fn a_page_that_gets_no_data_stays_in_ram() -> Result {
        with_user_mm(|mm| {
            let mut setup = Setup::new()?;
            let window = map_window(mm, Some(1))?;
            let mut asked = 0;
            let migrated = setup.mirror.mm()?.migrate_to_device(
                &setup.pool,
                window,
                Holes::Keep,
                &mut setup.buf,
                |_| {
                    asked += 1;
                    (asked != 3).then_some(1).ok_or(ENOMEM)
                },
            )?;
            assert_eq!(migrated.pages(), WINDOW - 1);
            assert_eq!(asked, WINDOW);
            assert_eq!(setup.used(), WINDOW - 1);
            assert_eq!(fault(&setup.mirror, window, Access::Write)?, WINDOW - 1);
            assert_eq!(fault(&setup.mirror, page(window, 2)?, Access::Write)?, 0);
            assert!(holds(window, 1)?);
            Ok(())
        })
    }

    #[test]
    fn a_pool_can_be_emptied_and_used_again() -> Result {
        with_user_mm(|mm| {
            let mut setup = Setup::new()?;
            let window = map_window(mm, Some(1))?;
            for _ in 0..2 {
                assert_eq!(setup.migrate_in(window)?, WINDOW);
                setup.pool.evict()?;
                assert_eq!(setup.used(), 0);
            }
            assert_eq!(setup.home(MigrateReason::Evict), 2 * WINDOW as u64);
            assert_eq!(setup.migrate_in(window)?, WINDOW);
            setup.device.most.store(0, Relaxed);
            assert_eq!(setup.pool.evict().err(), Some(EIO));
            assert_eq!(setup.used(), WINDOW);
            setup.device.most.store(usize::MAX, Relaxed);
            assert!(holds(window, 1)?);
            Ok(())
        })
    }

    #[test]
    fn a_page_of_the_device_comes_home_before_it_is_exclusive() -> Result {
        with_user_mm(|mm| {
            let mut setup = Setup::new()?;
            let window = map_window(mm, Some(1))?;
            setup.migrate_in(window)?;
            let mut buf = FaultBuf::new(0)?;
            let va = window.start();
            setup.mirror.mm()?.make_exclusive(va, &mut buf, |_| ())?;
            assert_eq!(buf.retries(), 0);
            assert_eq!(setup.used(), 0);
            assert_eq!(first_byte(&setup.mirror, va), Some(1));
            assert!(setup.mirror.write(va, &[2; PAGE_SIZE]).is_ok());
            assert!(user_has(va, 2)?);
            // Migration to the device ends exclusive access.
            setup.mirror.mm()?.make_exclusive(va, &mut buf, |_| ())?;
            setup.migrate_in(page(window, 0)?)?;
            assert_eq!(first_byte(&setup.mirror, va), None);
            assert!(user_has(va, 2)?);
            Ok(())
        })
    }

    #[test]
    fn a_buffer_larger_than_a_leaf_is_einval() {
        let order = FaultBuf::MAX_ORDER;
        assert_eq!(MigrateBuf::new(order + 1).err(), Some(EINVAL));
        assert!(MigrateBuf::new(order).is_ok());
    }

    #[test]
    fn a_process_that_has_ended_is_esrch_and_nothing_moves() -> Result {
        let mut setup = with_user_mm(|_| Setup::new())?;
        with_user_mm(|mm| {
            let window = map_window(mm, Some(1))?;
            assert_eq!(setup.migrate_in(window), Err(ESRCH));
            assert_eq!(setup.migrate_out(window), Err(ESRCH));
            assert_eq!(setup.used(), 0);
            assert_eq!(setup.freed(), 0);
            assert!(holds(window, 1)?);
            Ok(())
        })
    }

    #[test]
    fn a_mirror_without_memory_has_nothing_to_migrate() -> Result {
        with_user_mm(|mm| {
            let mut setup = Setup::new()?;
            let mirror = Mirror::new(&MODULE, Recorder::new()?)?;
            let window = map_window(mm, Some(1))?;
            setup.migrate_in(window)?;
            let mm = mirror.mm()?;
            let migrated =
                mm.migrate_to_device(&setup.pool, window, Holes::Keep, &mut setup.buf, |_| Ok(1));
            assert_eq!(migrated.err(), Some(EINVAL));
            let migrated = mm.migrate_to_ram(window, &mut setup.buf)?;
            assert_eq!(migrated.pages(), 0);
            assert_eq!(setup.used(), WINDOW);
            Ok(())
        })
    }

    #[test]
    fn an_address_that_is_not_the_process_s_is_efault_both_ways() -> Result {
        with_user_mm(|_| {
            let mut setup = Setup::new()?;
            let end = setup.mirror.task_size();
            let last = usize::MAX - (2 * PAGE_SIZE - 1);
            for (start, pages) in [(0, 1), (end - PAGE_SIZE, 2), (end, 1), (last, 1)] {
                let range = PageRange::from_len(start, pages * PAGE_SIZE)?;
                assert_eq!(setup.migrate_in(range), Err(EFAULT));
                assert_eq!(setup.migrate_out(range), Err(EFAULT));
            }
            assert!(setup.mirror.region(0).is_none());
            assert_eq!(setup.pool.pool().chunks(), 0);
            Ok(())
        })
    }

    #[test]
    fn what_is_not_mapped_is_efault() -> Result {
        with_user_mm(|mm| {
            let mut setup = Setup::new()?;
            let window = map_window(mm, Some(1))?;
            let hole = page(window, 2)?;
            mm.munmap(hole.start(), hole.len())?;
            assert_eq!(setup.migrate_in(hole), Err(EFAULT));
            assert_eq!(setup.migrate_out(hole), Err(EFAULT));
            // A migration ends at the hole.
            assert_eq!(setup.migrate_in(window), Ok(2));
            let last = usize::MAX - (2 * PAGE_SIZE - 1);
            let last = PageRange::from_len(last, PAGE_SIZE)?;
            assert_eq!(setup.migrate_in(last), Err(EFAULT));
            Ok(())
        })
    }
}
