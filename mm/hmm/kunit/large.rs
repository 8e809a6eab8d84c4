// SPDX-License-Identifier: GPL-2.0

//! Tests of large folios: how they migrate as a whole, and how they are split.

use super::{
    super::{
        commit::{
            DevicePage,
            Entry, //
        },
        fault::FaultRequest,
        hmm_range::FaultBuf,
        migrate::MigrateBuf,
        migrate_vma::Holes,
        mirror::Mirror,
        pfn::Access,
        pool_ops::MigrateReason,
        range::PageRange,
        slots::Order, //
    },
    device::{
        reserve,
        Counted,
        Tally,
        CHUNK, //
    },
    map_aligned,
    migrate::Setup,
    page,
    user_read,
    user_write, //
};
use kernel::{
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
    }, //
};

/// The pages of a large folio.
const LARGE: usize = Order::MAX.pages();

/// With memory for `chunks` large folios.
fn setup<D: Tally>(chunks: usize) -> Result<Setup<D>> {
    Setup::with(chunks, MigrateBuf::MAX_ORDER)
}

impl<D: Tally> Setup<D> {
    fn migrate_as(&mut self, range: PageRange, holes: Holes, data: D) -> Result<usize> {
        let Self {
            mirror, pool, buf, ..
        } = self;
        let mm = mirror.mm()?;
        let moved = mm.migrate_to_device(pool, range, holes, buf, |_| Ok(data.clone()))?;
        Ok(moved.pages())
    }

    /// The order of the oldest folio of the pool.
    fn order(&self) -> Option<Order> {
        let (folios, order) = self.pool.pool().rotate_oldest(&mut [0]);
        (folios != 0).then_some(order)
    }

    /// How many operations the device was asked for since the last time.
    fn ops(&self) -> usize {
        self.device.ops.xchg(0, Relaxed)
    }
}

impl Setup {
    /// Migrates as before an access by the device.
    fn access(&mut self, range: PageRange, access: Access) -> Result<usize> {
        let Self {
            mirror, pool, buf, ..
        } = self;
        let mm = mirror.mm()?;
        let moved = mm.migrate_for_access(pool, range, access, buf, |_| Ok(1))?;
        Ok(moved.pages())
    }
}

fn value(page: usize) -> u8 {
    (page % 251) as u8 + 1
}

/// Maps the place of a large folio, which the CPU then fills with different pages.
fn map_large(mm: &UserMm) -> Result<PageRange> {
    let range = map_aligned(mm, LARGE, Prot::ReadWrite)?;
    for (n, va) in range.page_addrs().enumerate() {
        user_write(va, value(n))?;
    }
    Ok(range)
}

/// Whether the process finds in `pages` of `range` what [`map_large`] has written there.
fn holds(range: PageRange, pages: core::ops::Range<usize>) -> Result<bool> {
    for (n, va) in range.page_addrs().enumerate() {
        if pages.contains(&n) && user_read(va)? != value(n) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Faults `range` for a read. Returns how many of its pages are in device memory.
fn on_device(mirror: &Mirror, range: PageRange) -> Result<usize> {
    let mut buf = FaultBuf::new(FaultBuf::MAX_ORDER)?;
    let request = FaultRequest::new(range, Access::Read);
    mirror.mm()?.fault(request, &mut buf, |commit| {
        let is_read = |entry: &Entry<'_>| {
            matches!(
                entry,
                Entry::Device(DevicePage::Read(_) | DevicePage::Write(_))
            )
        };
        commit.entries().filter(|(_, entry)| is_read(entry)).count()
    })
}

#[kunit_tests(hmm_large)]
mod tests {
    use super::*;

    #[test]
    fn a_large_folio_migrates_as_one_and_returns_as_one() -> Result {
        with_user_mm(|mm| {
            let mut setup = setup::<u64>(1)?;
            let range = map_large(mm)?;
            assert_eq!(setup.migrate_in(range)?, LARGE);
            assert_eq!(setup.ops(), 1);
            assert_eq!(setup.order(), Some(Order::MAX));
            assert_eq!(on_device(&setup.mirror, range)?, LARGE);

            assert_eq!(setup.migrate_out(range)?, LARGE);
            assert_eq!((setup.ops(), setup.used()), (1, 0));
            assert_eq!(setup.device.home(MigrateReason::Request), LARGE as u64);
            assert!(holds(range, 0..LARGE)?);
            // It is a large folio still.
            assert_eq!(setup.migrate_in(range)?, LARGE);
            assert_eq!(setup.order(), Some(Order::MAX));
            setup.pool.evict()?;
            assert_eq!((setup.ops(), setup.used()), (2, 0));
            assert_eq!(setup.device.home(MigrateReason::Evict), LARGE as u64);
            assert!(holds(range, 0..LARGE)?);
            assert_eq!(setup.device.freed.load(Relaxed), 2 * LARGE as u64);
            Ok(())
        })
    }

    #[test]
    fn a_cpu_that_begins_at_the_start_gets_all_of_the_folio() -> Result {
        with_user_mm(|mm| {
            let mut setup = setup::<u64>(1)?;
            let range = map_large(mm)?;
            assert_eq!(setup.migrate_in(range)?, LARGE);
            setup.ops();
            assert!(holds(range, 0..LARGE)?);
            assert_eq!((setup.ops(), setup.used()), (1, 0));
            assert_eq!(setup.device.home(MigrateReason::CpuFault), LARGE as u64);
            assert_eq!(setup.migrate_in(range)?, LARGE);
            assert_eq!(setup.order(), Some(Order::MAX));
            Ok(())
        })
    }

    #[test]
    fn a_page_that_a_cpu_touches_does_not_take_the_others_along() -> Result {
        with_user_mm(|mm| {
            let mut setup = setup::<u64>(1)?;
            let range = map_large(mm)?;
            assert_eq!(setup.migrate_in(range)?, LARGE);
            assert!(holds(range, 100..101)?);
            let left = setup.used();
            assert!((LARGE - 16..LARGE).contains(&left));
            setup.ops();
            // The device uses the others where they are.
            assert_eq!(on_device(&setup.mirror, range)?, left);
            assert_eq!(setup.ops(), 0);
            assert_eq!(setup.order(), Some(Order::PAGE));
            assert!(holds(range, 0..LARGE)?);
            assert_eq!(setup.used(), 0);
            assert_eq!(setup.device.freed.load(Relaxed), LARGE as u64);
            Ok(())
        })
    }

    #[test]
    fn a_part_that_is_unmapped_does_not_take_the_others_along() -> Result {
        with_user_mm(|mm| {
            let mut setup = setup::<u64>(1)?;
            let range = map_large(mm)?;
            assert_eq!(setup.migrate_in(range)?, LARGE);
            setup.ops();
            super::super::zap(mm.mm(), page(range, 100)?);
            let rest = PageRange::new(page(range, 101)?.start(), range.end())?;
            assert_eq!(on_device(&setup.mirror, rest)?, LARGE - 1);
            assert_eq!(setup.ops(), 0);
            assert_eq!(user_read(page(range, 100)?.start())?, 0);
            assert!(holds(range, 0..100)? && holds(range, 101..LARGE)?);
            assert_eq!(setup.used(), 0);
            Ok(())
        })
    }

    #[test]
    fn a_cpu_may_touch_any_page_of_a_folio_of_which_a_part_is_gone() -> Result {
        for touched in [5, 0, 17, LARGE - 1] {
            with_user_mm(|mm| {
                let mut setup = setup::<u64>(1)?;
                let range = map_large(mm)?;
                assert_eq!(setup.migrate_in(range)?, LARGE);
                super::super::zap(mm.mm(), page(range, 100)?);
                assert!(holds(range, touched..touched + 1)?);
                assert!((LARGE - 17..LARGE).contains(&setup.used()));
                assert!(holds(range, 0..100)? && holds(range, 101..LARGE)?);
                assert_eq!(setup.used(), 0);
                Ok(())
            })?;
        }
        Ok(())
    }

    #[test]
    fn what_a_process_has_given_up_is_not_evicted() -> Result {
        with_user_mm(|mm| {
            let mut setup = setup::<u64>(1)?;
            let range = map_large(mm)?;
            assert_eq!(setup.migrate_in(range)?, LARGE);
            let gone = PageRange::from_len(range.start(), (LARGE - 1) * PAGE_SIZE)?;
            super::super::zap(mm.mm(), gone);
            setup.pool.evict()?;
            assert_eq!(setup.device.home(MigrateReason::Evict), 1);
            assert_eq!(setup.used(), 0);
            assert!(holds(range, LARGE - 1..LARGE)?);
            Ok(())
        })
    }

    #[test]
    fn a_folio_that_the_device_cannot_copy_whole_goes_page_by_page() -> Result {
        with_user_mm(|mm| {
            let mut setup = setup::<u64>(1)?;
            let range = map_large(mm)?;
            let device = setup.device.clone();
            device.bad.store(7 * PAGE_SIZE, Relaxed);
            let Setup {
                mirror, pool, buf, ..
            } = &mut setup;
            let data = |pages| {
                if pages == 1 {
                    device.bad.store(usize::MAX, Relaxed);
                }
                Ok(1)
            };
            let moved = mirror
                .mm()?
                .migrate_to_device(pool, range, Holes::Keep, buf, data)?;
            assert_eq!((moved.pages(), moved.large_pages()), (LARGE, 0));
            assert_eq!(setup.order(), Some(Order::PAGE));
            assert!(holds(range, 0..LARGE)?);
            assert_eq!(setup.used(), 0);
            Ok(())
        })
    }

    #[test]
    fn a_hole_becomes_a_large_folio_of_zeroes() -> Result {
        with_user_mm(|mm| {
            let mut setup = setup::<u64>(1)?;
            let range = map_aligned(mm, LARGE, Prot::ReadWrite)?;
            assert_eq!(setup.migrate_as(range, Holes::Keep, 1)?, 0);
            assert_eq!(setup.access(page(range, 100)?, Access::Read)?, 0);
            // As a CPU that writes to one page of it would.
            assert_eq!(setup.access(page(range, 100)?, Access::Write)?, LARGE);
            assert_eq!(setup.ops(), 1);
            assert_eq!(setup.order(), Some(Order::MAX));
            let mut bytes = [1];
            assert_eq!(on_device(&setup.mirror, range)?, LARGE);
            assert!(setup
                .mirror
                .read(page(range, 7)?.start(), &mut bytes)
                .is_ok());
            assert_eq!(bytes, [0]);
            for va in range.page_addrs() {
                assert_eq!(user_read(va)?, 0);
            }
            Ok(())
        })
    }

    #[test]
    fn a_hole_among_pages_does_not_populate_the_others() -> Result {
        with_user_mm(|mm| {
            let mut setup = setup::<u64>(1)?;
            let range = map_large(mm)?;
            super::super::zap(mm.mm(), page(range, 100)?);
            super::super::zap(mm.mm(), page(range, 200)?);
            assert_eq!(setup.access(page(range, 100)?, Access::Write)?, 1);
            assert_eq!(setup.used(), 1);
            Ok(())
        })
    }

    #[test]
    fn an_access_takes_all_of_the_folio_along_and_a_request_only_its_part() -> Result {
        with_user_mm(|mm| {
            let mut setup = setup::<u64>(1)?;
            let range = map_large(mm)?;
            assert_eq!(setup.access(page(range, 100)?, Access::Read)?, LARGE);
            assert_eq!((setup.ops(), setup.order()), (1, Some(Order::MAX)));
            assert_eq!(setup.migrate_out(page(range, 100)?)?, 1);
            assert_eq!(
                (setup.used(), setup.order()),
                (LARGE - 1, Some(Order::PAGE))
            );
            assert!(holds(range, 0..LARGE)?);
            assert_eq!(setup.migrate_in(page(range, 100)?)?, 1);
            assert_eq!(setup.used(), 1);
            Ok(())
        })
    }

    #[test]
    fn without_a_block_on_the_device_the_pages_migrate_one_by_one() -> Result {
        with_user_mm(|mm| {
            let mut setup = setup::<u64>(2)?;
            let range = map_large(mm)?;
            let pool = setup.pool.pool().clone();
            let mut pfns = KVec::from_elem(0, CHUNK + 1, GFP_KERNEL)?;
            let taken = reserve(&pool, &mut pfns)?;
            assert_eq!(taken.taken(), CHUNK + 1);
            // The last one takes the place of another.
            assert_eq!(setup.migrate_in(range)?, LARGE);
            assert_eq!(setup.device.home(MigrateReason::Evict), 1);
            assert_eq!(setup.order(), Some(Order::PAGE));
            drop(taken);
            assert!(holds(range, 0..LARGE)?);
            assert_eq!(setup.used(), 0);
            Ok(())
        })
    }

    #[test]
    fn a_full_pool_evicts_a_large_folio_for_another() -> Result {
        with_user_mm(|mm| {
            let mut setup = setup::<u64>(1)?;
            let (first, second) = (map_large(mm)?, map_large(mm)?);
            assert_eq!(setup.migrate_in(first)?, LARGE);
            assert_eq!(setup.migrate_in(second)?, LARGE);
            assert_eq!((setup.ops(), setup.order()), (3, Some(Order::MAX)));
            assert_eq!(setup.device.home(MigrateReason::Evict), LARGE as u64);
            assert!(holds(first, 0..LARGE)? && holds(second, 0..LARGE)?);
            Ok(())
        })
    }

    #[test]
    fn one_page_that_the_device_cannot_copy_does_not_keep_the_others() -> Result {
        for way in 0..3 {
            with_user_mm(|mm| {
                let mut setup = setup::<u64>(1)?;
                let range = map_large(mm)?;
                assert_eq!(setup.migrate_in(range)?, LARGE);
                setup.device.bad.store(7 * PAGE_SIZE, Relaxed);
                match way {
                    0 => assert_eq!(setup.pool.evict(), Err(EIO)),
                    1 => assert_eq!(setup.migrate_out(range)?, LARGE - 1),
                    _ => assert!(holds(range, 0..7)? && holds(range, 8..LARGE)?),
                }
                assert_eq!(setup.used(), 1);
                setup.device.bad.store(usize::MAX, Relaxed);
                assert!(holds(range, 0..LARGE)?);
                assert_eq!(setup.used(), 0);
                Ok(())
            })?;
        }
        Ok(())
    }

    #[test]
    fn each_page_of_a_split_folio_has_the_data() -> Result {
        let dropped = Arc::new(Atomic::new(0), GFP_KERNEL)?;
        let data = Counted {
            value: 3,
            dropped: dropped.clone(),
        };
        let data = Arc::new(data, GFP_KERNEL)?;
        with_user_mm(|mm| {
            let mut setup = setup::<Arc<Counted>>(1)?;
            let range = map_large(mm)?;
            assert_eq!(setup.migrate_as(range, Holes::Keep, data)?, LARGE);
            assert!(holds(range, 100..101)?);
            assert!(setup.used() != 0);
            assert_eq!(dropped.load(Relaxed), 0);
            assert!(holds(range, 0..LARGE)?);
            // One for each page.
            assert_eq!(setup.device.sum.load(Relaxed), 3 * LARGE as u64);
            assert_eq!(dropped.load(Relaxed), 1);
            Ok(())
        })
    }

    #[test]
    fn a_lost_device_gives_the_data_of_large_and_of_split_folios_back() -> Result {
        let dropped = Arc::new(Atomic::new(0), GFP_KERNEL)?;
        let value = 3;
        with_user_mm(|mm| {
            let mut setup = setup::<Arc<Counted>>(3)?;
            let ranges = [map_large(mm)?, map_large(mm)?, map_large(mm)?];
            for range in ranges {
                let dropped = dropped.clone();
                let data = Arc::new(Counted { value, dropped }, GFP_KERNEL)?;
                assert_eq!(setup.migrate_as(range, Holes::Keep, data)?, LARGE);
            }
            // One is split, one was split and is gone.
            assert!(holds(ranges[1], 100..101)?);
            assert!(holds(ranges[2], 100..101)? && holds(ranges[2], 0..LARGE)?);
            setup.pool.lost()?;
            assert_eq!(dropped.load(Relaxed), 3);
            Ok(())
        })
    }

    #[test]
    fn the_notifier_runs_once_for_a_folio() -> Result {
        with_user_mm(|mm| {
            let mut setup = setup::<u64>(1)?;
            let range = map_large(mm)?;
            assert_eq!(on_device(&setup.mirror, range)?, 0);
            let before = setup.ops.count();
            assert_eq!(setup.migrate_in(range)?, LARGE);
            assert_eq!(setup.ops.count(), before + 1);
            assert_eq!(setup.ops.last(), Some(range));
            Ok(())
        })
    }
}
