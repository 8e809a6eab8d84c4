// SPDX-License-Identifier: GPL-2.0

//! Tests of `coherent.rs`: a pool of memory that the CPU reaches. They want 4 MiB of such memory,
//! which the boot parameter `hmm_kunit.memory` names by its physical address.

use super::{
    super::{
        coherent::CoherentMemory,
        commit::{
            DevicePage,
            Entry,
            RamPage, //
        },
        device_pool::DevicePool,
        fault::FaultRequest,
        hmm_range::FaultBuf,
        migrate::MigrateBuf,
        migrate_vma::Holes,
        mirror::Mirror,
        pfn::Access,
        pool_ops::MigrateReason,
        range::PageRange, //
    },
    device::{
        migrate,
        TestDevice,
        CHUNK,
        OLD, //
    },
    map_aligned,
    page,
    user_read,
    user_write,
    Recorder,
    MODULE, //
};
use kernel::{
    bindings,
    io::resource::{
        iomem,
        Flags,
        Region, //
    },
    kunit::user_mm::{
        with_user_mm,
        Prot,
        UserMm, //
    },
    page::{
        PAGE_SHIFT,
        PAGE_SIZE, //
    },
    prelude::*,
    str::CString,
    sync::{
        atomic::Relaxed,
        Arc, //
    },
    time::{
        delay::fsleep,
        Delta, //
    }, //
};

const PAGES: usize = 16;
const SIZE: usize = CHUNK * PAGE_SIZE;

unsafe extern "C" {
    static rust_hmm_kunit_memory: c_ulong;
}

/// The address of the memory for these tests, or `None`: they have nothing to do then.
fn memory() -> Option<u64> {
    // SAFETY: The variable is set before the initcalls and never changes.
    match unsafe { rust_hmm_kunit_memory } {
        0 => None,
        start => Some(start as u64),
    }
}

fn region(start: u64, size: usize) -> Result<Region> {
    let name = CString::try_from(c"hmm_kunit")?;
    iomem()
        .request_region(start, size as u64, name, Flags::IORESOURCE_MEM)
        .ok_or(EBUSY)
}

/// A device with a chunk of coherent memory, and a process with a byte in each of some pages.
struct Setup {
    device: Arc<TestDevice<u64>>,
    pool: DevicePool<TestDevice<u64>>,
    mirror: Mirror,
    range: PageRange,
}

impl Setup {
    fn new(mm: &UserMm, start: u64, pages: usize) -> Result<Self> {
        let memory = CoherentMemory::assume_coherent(region(start, SIZE)?);
        let (device, pool) = TestDevice::coherent(memory)?;
        let setup = Self {
            device,
            mirror: Mirror::new_with_pool(&MODULE, Recorder::new()?, &pool)?,
            pool,
            range: map_aligned(mm, pages, Prot::ReadWrite)?,
        };
        for (index, va) in setup.range.page_addrs().enumerate() {
            user_write(va, byte(index))?;
        }
        Ok(setup)
    }

    fn migrate(&self, range: PageRange) -> Result<usize> {
        migrate(&self.mirror, &self.pool, range)
    }

    /// Checks the bytes of the process, without a fault.
    fn expect_bytes(&self) {
        for (index, va) in self.range.page_addrs().enumerate() {
            assert_eq!(user_read(va), Ok(byte(index)));
        }
    }
}

fn byte(index: usize) -> u8 {
    (index % 251) as u8 + 1
}

/// What a fault of `mirror` finds at `va`, for a write.
fn look(mirror: &Mirror, va: usize) -> Result<Option<(bool, bool)>> {
    let (mut buf, mut seen) = (FaultBuf::new(0)?, None);
    let request = FaultRequest::new(PageRange::containing(va, 1)?, Access::Write);
    mirror.mm()?.fault(request, &mut buf, |commit| {
        seen = match commit.entries().next() {
            Some((_, Entry::Device(DevicePage::Write(page)))) => Some((true, page.is_remote())),
            Some((_, Entry::Ram(RamPage::Write(page)))) => Some((false, page.is_remote())),
            _ => None,
        };
    })?;
    Ok(seen)
}

/// A reference to a page, as direct I/O has one.
struct Held(*mut bindings::folio);

impl Drop for Held {
    fn drop(&mut self) {
        // SAFETY: `hold_one()` has taken the reference.
        unsafe { bindings::folio_put(self.0) };
    }
}

/// Takes a reference to the first page in use of the memory at `start`.
fn hold_one(start: u64) -> Result<Held> {
    (start as usize >> PAGE_SHIFT..)
        .take(CHUNK)
        .map(|pfn| {
            // SAFETY: A pool has made a `struct page` for each page of the memory.
            unsafe { bindings::pfn_to_page(pfn) }.cast()
        })
        // SAFETY: The folio is in the memory of the pool, so it has a `struct page`.
        .find(|folio| unsafe { bindings::folio_try_get(*folio) })
        .map(Held)
        .ok_or(ENOENT)
}

const OWN: Option<(bool, bool)> = Some((true, false));
const REMOTE: Option<(bool, bool)> = Some((false, true));
const RAM: Option<(bool, bool)> = Some((false, false));

#[kunit_tests(hmm_coherent)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_and_the_device_use_the_same_page() -> Result {
        let Some(start) = memory() else { return Ok(()) };
        with_user_mm(|mm| {
            let setup = Setup::new(mm, start, PAGES)?;
            assert_eq!(setup.migrate(setup.range), Ok(PAGES));
            setup.expect_bytes();
            for va in setup.range.page_addrs() {
                assert!(look(&setup.mirror, va)? == OWN);
            }
            let va = setup.range.start();
            let mut seen = [0];
            user_write(va, 77)?;
            assert!(setup.mirror.read(va, &mut seen).is_ok() && seen == [77]);
            assert!(setup.mirror.write(va, &[78]).is_ok());
            assert_eq!(user_read(va), Ok(78));
            // Nothing has come back for it.
            assert_eq!(setup.device.home(MigrateReason::CpuFault), 0);
            assert_eq!(setup.pool.pool().used_pages(), PAGES);
            Ok(())
        })
    }

    #[test]
    fn pages_migrate_both_ways() -> Result {
        let Some(start) = memory() else { return Ok(()) };
        with_user_mm(|mm| {
            let setup = Setup::new(mm, start, PAGES)?;
            for _ in 0..3 {
                assert_eq!(setup.migrate(setup.range), Ok(PAGES));
                // Those that are there already stay.
                assert_eq!(setup.migrate(setup.range), Ok(0));
                setup.expect_bytes();
                let mut buf = MigrateBuf::new(PAGES.ilog2())?;
                let back = setup.mirror.mm()?.migrate_to_ram(setup.range, &mut buf)?;
                assert_eq!(back.pages(), PAGES);
                setup.expect_bytes();
                assert!(look(&setup.mirror, setup.range.start())? == RAM);
                assert_eq!(setup.pool.pool().used_pages(), 0);
            }
            assert_eq!(setup.device.home(MigrateReason::Request), 3 * PAGES as u64);
            assert_eq!(setup.device.freed.load(Relaxed), 3 * PAGES as u64);
            Ok(())
        })
    }

    #[test]
    fn holes_are_zeroed() -> Result {
        let Some(start) = memory() else { return Ok(()) };
        with_user_mm(|mm| {
            let setup = Setup::new(mm, start, PAGES)?;
            // What others have left in the memory.
            for va in setup.range.page_addrs() {
                user_write(va + PAGE_SIZE - 1, OLD)?;
            }
            setup.migrate(setup.range)?;
            let len = setup.range.len();
            mm.munmap(setup.range.start(), len)?;
            let holes = map_aligned(mm, PAGES, Prot::ReadWrite)?;
            assert_eq!(setup.migrate(holes), Ok(PAGES));
            for va in holes.page_addrs() {
                assert_eq!(
                    (user_read(va), user_read(va + PAGE_SIZE - 1)),
                    (Ok(0), Ok(0))
                );
            }
            Ok(())
        })
    }

    #[test]
    fn a_full_pool_evicts_its_oldest_pages() -> Result {
        let Some(start) = memory() else { return Ok(()) };
        with_user_mm(|mm| {
            let setup = Setup::new(mm, start, 2 * CHUNK)?;
            let mut moved = 0;
            for first in (0..2 * CHUNK).step_by(PAGES) {
                let begin = page(setup.range, first)?.start();
                moved += setup.migrate(PageRange::from_len(begin, PAGES * PAGE_SIZE)?)?;
            }
            assert_eq!(moved, 2 * CHUNK);
            assert_eq!(setup.device.home(MigrateReason::Evict), CHUNK as u64);
            setup.expect_bytes();
            assert!(look(&setup.mirror, setup.range.start())? == RAM);
            assert!(look(&setup.mirror, setup.range.end() - PAGE_SIZE)? == OWN);
            setup.pool.evict()?;
            setup.expect_bytes();
            assert_eq!(setup.pool.pool().used_pages(), 0);
            Ok(())
        })
    }

    #[test]
    fn the_end_of_a_pool_returns_the_memory() -> Result {
        let Some(start) = memory() else { return Ok(()) };
        with_user_mm(|mm| {
            for _ in 0..2 {
                let Setup {
                    pool,
                    range,
                    mirror,
                    ..
                } = {
                    let setup = Setup::new(mm, start, PAGES)?;
                    setup.migrate(setup.range)?;
                    setup
                };
                // While the pool has it, nobody else gets it.
                assert_eq!(region(start, PAGE_SIZE).err(), Some(EBUSY));
                let memory = pool.end().ok_or(EBUSY)?.into_region();
                assert_eq!((memory.start(), memory.size()), (start, SIZE as u64));
                assert_eq!(region(start, PAGE_SIZE).err(), Some(EBUSY));
                for (index, va) in range.page_addrs().enumerate() {
                    assert_eq!(user_read(va), Ok(byte(index)));
                }
                drop((memory, mirror));
            }
            Ok(())
        })
    }

    #[test]
    fn other_devices_use_the_pages_where_they_are() -> Result {
        let Some(start) = memory() else { return Ok(()) };
        with_user_mm(|mm| {
            let setup = Setup::new(mm, start, PAGES)?;
            let other = Setup::new(mm, start + SIZE as u64, PAGES)?;
            let plain = Mirror::new(&MODULE, Recorder::new()?)?;
            setup.migrate(setup.range)?;
            let va = setup.range.start();
            for mirror in [&other.mirror, &plain] {
                assert!(look(mirror, va)? == REMOTE);
                let mut seen = [0];
                assert!(mirror.read(va, &mut seen).is_ok() && seen == [byte(0)]);
                assert!(mirror.write(va, &[byte(0)]).is_ok());
            }
            // Neither device takes pages of the other one's memory.
            assert_eq!(other.migrate(setup.range), Ok(0));
            let mut buf = MigrateBuf::new(PAGES.ilog2())?;
            let back = other.mirror.mm()?.migrate_to_ram(setup.range, &mut buf)?;
            assert_eq!(back.pages(), 0);
            assert!(look(&setup.mirror, va)? == OWN);
            setup.expect_bytes();
            Ok(())
        })
    }

    #[test]
    fn a_page_may_be_exclusive_where_it_is() -> Result {
        let Some(start) = memory() else { return Ok(()) };
        with_user_mm(|mm| {
            let setup = Setup::new(mm, start, PAGES)?;
            setup.migrate(setup.range)?;
            let va = setup.range.start();
            let mut buf = FaultBuf::new(0)?;
            setup.mirror.mm()?.make_exclusive(va, &mut buf, |_| ())?;
            let old = u64::from_ne_bytes([1, 0, 0, 0, 0, 0, 0, 0]);
            assert_eq!(setup.mirror.update(va, |word| Some(!word)).ok(), Some(old));
            assert_eq!((user_read(va), user_read(va + 1)), (Ok(0xfe), Ok(0xff)));
            // The CPU has ended the exclusive access.
            assert!(setup.mirror.update(va, Some).is_err());
            assert!(look(&setup.mirror, va)? == OWN);
            assert_eq!(setup.pool.pool().used_pages(), PAGES);
            Ok(())
        })
    }

    #[test]
    fn a_page_that_cannot_be_copied_stays() -> Result {
        let Some(start) = memory() else { return Ok(()) };
        with_user_mm(|mm| {
            let setup = Setup::new(mm, start, PAGES)?;
            setup.device.most.store(0, Relaxed);
            assert_eq!(setup.migrate(setup.range), Err(EIO));
            setup.expect_bytes();
            setup.device.most.store(usize::MAX, Relaxed);
            assert_eq!(setup.migrate(setup.range), Ok(PAGES));
            setup.device.most.store(0, Relaxed);
            assert_eq!(setup.pool.evict(), Err(EIO));
            setup.expect_bytes();
            assert_eq!(setup.pool.pool().used_pages(), PAGES);
            setup.device.most.store(usize::MAX, Relaxed);
            Ok(())
        })
    }

    #[test]
    fn lost_memory_is_taken_away_from_everybody() -> Result {
        let Some(start) = memory() else { return Ok(()) };
        with_user_mm(|mm| {
            let setup = Setup::new(mm, start, PAGES)?;
            let half = page(setup.range, PAGES / 2)?.start();
            let there = PageRange::new(half, setup.range.end())?;
            assert_eq!(setup.migrate(there), Ok(PAGES / 2));
            let plain = Mirror::new(&MODULE, Recorder::new()?)?;
            assert!(look(&plain, half)? == REMOTE);

            setup.pool.lost()?;
            for va in there.page_addrs() {
                assert_eq!(user_read(va), Err(EFAULT));
                assert_eq!(user_write(va, 1), Err(EFAULT));
                assert!(plain.read(va, &mut [0]).is_err());
                assert_eq!(look(&setup.mirror, va).err(), Some(EFAULT));
                assert_eq!(look(&plain, va).err(), Some(EFAULT));
            }
            // Everything else is there.
            for (index, va) in (setup.range.start()..half).step_by(PAGE_SIZE).enumerate() {
                assert_eq!(user_read(va), Ok(byte(index)));
            }
            assert_eq!(setup.device.freed.load(Relaxed), PAGES as u64 / 2);
            assert_eq!(setup.migrate(setup.range), Err(ENODEV));
            // Nobody has the memory any more, but the driver.
            assert_eq!(setup.pool.pool().chunks(), 0);
            assert_eq!(region(start, PAGE_SIZE).err(), Some(EBUSY));
            assert!(setup.pool.end().is_some());
            drop(region(start, SIZE)?);
            // The addresses can be used again.
            mm.munmap(there.start(), there.len())?;
            Ok(())
        })
    }

    #[test]
    fn a_page_that_somebody_holds_stays() -> Result {
        let Some(start) = memory() else { return Ok(()) };
        with_user_mm(|mm| {
            let setup = Setup::new(mm, start, PAGES)?;
            assert_eq!(setup.migrate(setup.range), Ok(PAGES));
            let held = hold_one(start)?;
            assert_eq!(setup.pool.evict(), Err(EBUSY));
            assert_eq!(setup.pool.pool().used_pages(), 1);
            setup.expect_bytes();

            // When the memory is lost, the device and others do not get the page any more.
            setup.pool.lost()?;
            assert_eq!(setup.pool.pool().used_pages(), 1);
            setup.expect_bytes();
            let plain = Mirror::new(&MODULE, Recorder::new()?)?;
            for va in setup.range.page_addrs() {
                let is_there = look(&plain, va) != Ok(RAM);
                assert_eq!(is_there, look(&plain, va).err() == Some(EFAULT));
                assert_eq!(is_there, look(&setup.mirror, va).err() == Some(EFAULT));
            }
            assert!(setup.pool.end().is_none());
            assert_eq!(region(start, PAGE_SIZE).err(), Some(EBUSY));
            drop(held);
            mm.munmap(setup.range.start(), setup.range.len())?;
            // The memory is released with its last page.
            for _ in 0..100 {
                if region(start, SIZE).is_ok() {
                    return Ok(());
                }
                fsleep(Delta::from_millis(10));
            }
            Err(ETIMEDOUT)
        })
    }

    #[test]
    fn what_is_no_such_memory_is_refused() -> Result {
        let Some(start) = memory() else { return Ok(()) };
        let refused = |start, size| -> Result<Option<Error>> {
            let memory = CoherentMemory::assume_coherent(region(start, size)?);
            Ok(TestDevice::<u64>::coherent(memory).err())
        };
        for (offset, size) in [(PAGE_SIZE, SIZE), (0, SIZE / 2), (0, SIZE + PAGE_SIZE)] {
            assert_eq!(refused(start + offset as u64, size)?, Some(EINVAL));
        }
        // It was released each time.
        drop(region(start, 2 * SIZE)?);
        Ok(())
    }

    #[test]
    fn only_coherent_memory_is_copied_by_the_cpu() -> Result {
        with_user_mm(|mm| {
            let (device, pool) = TestDevice::<u64>::new(1)?;
            let mirror = Mirror::new_with_pool(&MODULE, Recorder::new()?, &pool)?;
            let range = map_aligned(mm, 1, Prot::ReadWrite)?;
            user_write(range.start(), OLD)?;
            device.by_cpu.store(true, Relaxed);
            let mut buf = MigrateBuf::new(0)?;
            let moved = mirror
                .mm()?
                .migrate_to_device(&pool, range, Holes::Keep, &mut buf, |_| Ok(1));
            assert_eq!(moved.err(), Some(EOPNOTSUPP));
            assert_eq!(user_read(range.start()), Ok(OLD));
            Ok(())
        })
    }
}
