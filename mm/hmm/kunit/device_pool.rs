// SPDX-License-Identifier: GPL-2.0

//! Tests of `device_pool.rs`: a device that is lost.

use super::{
    super::{
        device_pool::DevicePool,
        fault::FaultRequest,
        hmm_range::FaultBuf,
        migrate::MigrateBuf,
        migrate_vma::Holes,
        mirror::Mirror,
        pfn::Access,
        pool::Pool,
        range::PageRange, //
    },
    device::{
        migrate,
        Counted,
        TestDevice, //
    },
    map_aligned,
    page,
    user_read,
    user_write,
    Recorder,
    MODULE, //
};
use kernel::{
    kunit::user_mm::{
        with_user_mm,
        Prot,
        UserMm, //
    },
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
    }, //
};

const PAGES: usize = 8;

/// A process with a byte in each of its pages, the last of which are on the device.
struct Setup {
    device: Arc<TestDevice<u64>>,
    pool: DevicePool<TestDevice<u64>>,
    mirror: Mirror,
    all: PageRange,
    here: PageRange,
    there: PageRange,
}

impl Setup {
    fn new(mm: &UserMm) -> Result<Self> {
        let (device, pool) = TestDevice::new(1)?;
        let mirror = Mirror::new_with_pool(&MODULE, Recorder::new()?, &pool)?;
        let all = map_aligned(mm, PAGES, Prot::ReadWrite)?;
        for (byte, va) in (1..).zip(all.page_addrs()) {
            user_write(va, byte)?;
        }
        let half = page(all, PAGES / 2)?.start();
        let setup = Self {
            device,
            pool,
            mirror,
            all,
            here: PageRange::new(all.start(), half)?,
            there: PageRange::new(half, all.end())?,
        };
        assert_eq!(setup.migrate(setup.there), Ok(PAGES / 2));
        Ok(setup)
    }

    fn migrate(&self, range: PageRange) -> Result<usize> {
        migrate(&self.mirror, &self.pool, range)
    }

    fn fault(&self, range: PageRange) -> Result {
        let mut buf = FaultBuf::new(0)?;
        let request = FaultRequest::new(range, Access::Read);
        self.mirror.mm()?.fault(request, &mut buf, |_| ())
    }

    /// Checks that nothing but the contents of `there` is gone.
    fn expect_lost(&self) -> Result {
        for va in self.there.page_addrs() {
            assert_eq!(user_read(va).err(), Some(EFAULT));
            assert_eq!(user_write(va, 0).err(), Some(EFAULT));
            let page = PageRange::containing(va, 1)?;
            assert_eq!(self.fault(page).err(), Some(EFAULT));
            assert!(self.mirror.read(va, &mut [0]).is_err());
            assert!(self.mirror.write(va, &[0]).is_err());
        }
        for (byte, va) in (1..).zip(self.here.page_addrs()) {
            assert_eq!(user_read(va), Ok(byte));
            self.fault(PageRange::containing(va, 1)?)?;
            assert!(self.mirror.read(va, &mut [0]).is_ok());
        }
        assert_eq!(self.migrate(self.here), Err(ENODEV));
        let mut buf = MigrateBuf::new(PAGES.ilog2())?;
        let back = self.mirror.mm()?.migrate_to_ram(self.there, &mut buf);
        assert_eq!(back.err(), Some(ENODEV));
        assert_eq!(self.pool.evict(), Err(ENODEV));
        Ok(())
    }
}

/// Waits until the pool has no chunk any more.
fn ends(pool: &Pool) -> bool {
    for _ in 0..100 {
        if pool.chunks() == 0 {
            return true;
        }
        fsleep(Delta::from_millis(10));
    }
    false
}

#[kunit_tests(hmm_device_pool)]
mod tests {
    use super::*;

    #[test]
    fn only_the_contents_of_a_lost_device_are_lost() -> Result {
        with_user_mm(|mm| {
            let setup = Setup::new(mm)?;
            setup.fault(setup.there)?;
            assert!(setup.mirror.read(setup.there.start(), &mut [0]).is_ok());
            setup.pool.lost()?;
            setup.expect_lost()?;
            // Once more does nothing.
            setup.pool.lost()?;
            setup.expect_lost()
        })
    }

    #[test]
    fn the_driver_gets_all_back_and_the_memory_goes_with_the_last_page() -> Result {
        with_user_mm(|mm| {
            let Setup {
                device,
                pool,
                mirror,
                there,
                ..
            } = Setup::new(mm)?;
            let core = pool.pool().clone();
            pool.lost()?;
            let pages = (PAGES / 2) as u64;
            assert_eq!(device.freed.load(Relaxed), pages);
            assert_eq!(device.sum.load(Relaxed), pages);
            // This does not wait for the pages.
            drop(pool);
            drop(mirror);
            assert!(Arc::into_unique_or_drop(device).is_some());

            assert_eq!(core.chunks(), 1);
            let first = page(there, 0)?;
            mm.munmap(first.start(), first.len())?;
            assert_eq!(core.chunks(), 1);
            assert_eq!(user_read(page(there, 1)?.start()).err(), Some(EFAULT));
            mm.munmap(there.start(), there.len())?;
            assert!(ends(&core));
            Ok(())
        })
    }

    #[test]
    fn a_process_may_end_with_pages_of_a_lost_device() -> Result {
        let (core, device) = with_user_mm(|mm| {
            let setup = Setup::new(mm)?;
            setup.pool.lost()?;
            Ok((setup.pool.pool().clone(), setup.device))
        })?;
        assert!(ends(&core));
        assert!(Arc::into_unique_or_drop(device).is_some());
        Ok(())
    }

    #[test]
    fn a_lost_device_without_pages_has_no_memory() -> Result {
        with_user_mm(|mm| {
            let setup = Setup::new(mm)?;
            mm.munmap(setup.all.start(), setup.all.len())?;
            let core = setup.pool.pool().clone();
            assert_eq!(core.chunks(), 1);
            setup.pool.lost()?;
            assert_eq!(core.chunks(), 0);
            Ok(())
        })
    }

    #[test]
    fn a_copy_that_says_so_loses_the_device() -> Result {
        with_user_mm(|mm| {
            let setup = Setup::new(mm)?;
            setup.device.says.store(ENODEV.to_errno(), Relaxed);
            setup.device.most.store(0, Relaxed);
            assert_eq!(user_read(setup.there.start()).err(), Some(EFAULT));
            // The driver is not asked again.
            setup.device.most.store(usize::MAX, Relaxed);
            setup.expect_lost()?;
            // Nobody waits for the pages at the end of the pool.
            let Setup { pool, device, .. } = setup;
            let core = pool.pool().clone();
            drop(pool);
            assert_eq!(device.freed.load(Relaxed), (PAGES / 2) as u64);
            assert_eq!(core.chunks(), 1);
            Ok(())
        })
    }

    #[test]
    fn any_other_error_keeps_the_device() -> Result {
        with_user_mm(|mm| {
            let setup = Setup::new(mm)?;
            setup.device.most.store(0, Relaxed);
            for err in [EIO, ENOMEM, ENXIO] {
                setup.device.says.store(err.to_errno(), Relaxed);
                assert_eq!(user_read(setup.there.start()).err(), Some(EFAULT));
            }
            setup.device.most.store(usize::MAX, Relaxed);
            for (byte, va) in (1..).zip(setup.all.page_addrs()) {
                assert_eq!(user_read(va), Ok(byte));
            }
            Ok(())
        })
    }

    #[test]
    fn data_of_zero_comes_back_too() -> Result {
        with_user_mm(|mm| {
            let (device, pool) = TestDevice::<u64>::new(1)?;
            let mirror = Mirror::new_with_pool(&MODULE, Recorder::new()?, &pool)?;
            let all = map_aligned(mm, PAGES, Prot::ReadWrite)?;
            let mut buf = MigrateBuf::new(PAGES.ilog2())?;
            mirror
                .mm()?
                .migrate_to_device(&pool, all, Holes::Populate, &mut buf, |_| Ok(0))?;
            let first = page(all, 0)?;
            mm.munmap(first.start(), first.len())?;
            assert_eq!(device.freed.load(Relaxed), 1);
            pool.lost()?;
            assert_eq!(device.freed.load(Relaxed), PAGES as u64);
            Ok(())
        })
    }

    #[test]
    fn the_data_of_pages_is_dropped_once() -> Result {
        with_user_mm(|mm| {
            let dropped = Arc::new(Atomic::new(0), GFP_KERNEL)?;
            let (_, pool) = TestDevice::<Arc<Counted>>::new(1)?;
            let mirror = Mirror::new_with_pool(&MODULE, Recorder::new()?, &pool)?;
            let all = map_aligned(mm, PAGES, Prot::ReadWrite)?;
            let mut buf = MigrateBuf::new(PAGES.ilog2())?;
            let data = |_| {
                let dropped = dropped.clone();
                Ok(Arc::new(Counted { value: 1, dropped }, GFP_NOWAIT)?)
            };
            mirror
                .mm()?
                .migrate_to_device(&pool, all, Holes::Populate, &mut buf, data)?;
            let first = page(all, 0)?;
            mm.munmap(first.start(), first.len())?;
            assert_eq!(dropped.load(Relaxed), 1);
            pool.lost()?;
            assert_eq!(dropped.load(Relaxed), PAGES as u64);
            mm.munmap(all.start(), all.len())?;
            assert_eq!(dropped.load(Relaxed), PAGES as u64);
            Ok(())
        })
    }
}
