// SPDX-License-Identifier: GPL-2.0

//! Tests of `pool.rs`.

use super::{
    super::{
        copy::{
            CopyBatch,
            CopyOp, //
        },
        device_pool::{
            rust_hmm_module_going,
            DevicePool,
            Engine, //
        },
        fault::FaultRequest,
        hmm_range::FaultBuf,
        migrate::MigrateBuf,
        migrate_vma::Holes,
        mirror::Mirror,
        pfn::Access,
        pool_ops::{
            MigrateReason,
            PoolOps,
            RawData, //
        },
        range::PageRange,
        slots::Order, //
    },
    device::{
        reserve,
        Counted,
        TestDevice,
        CHUNK, //
    },
    map_aligned,
    user_read,
    user_write,
    Recorder,
    MODULE, //
};
use kernel::{
    kunit::user_mm::{
        with_user_mm,
        Prot, //
    },
    new_mutex,
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc,
        ArcBorrow,
        Mutex, //
    }, //
};

/// A stand-in for a module. It is never loaded, but has an address.
// SAFETY: The pointer is only compared, because no mirror is created with this module.
static LEAKY: ThisModule = unsafe { ThisModule::from_ptr((&raw const ADDRESS).cast_mut().cast()) };
static ADDRESS: u64 = 0;

/// A driver that calls the core in its callback. It fills each page that returns with ones.
#[pin_data]
struct Inward {
    #[pin]
    inside: Mutex<Option<Inside>>,
    other: Arc<TestDevice<u64>>,
    ops: Arc<Recorder>,
}

struct Inside {
    mirror: Arc<Mirror>,
    page: PageRange,
    buf: FaultBuf,
    moves: MigrateBuf,
    results: Option<[Result; 5]>,
}

impl PoolOps for Inward {
    type PageData = Arc<Unused>;

    fn copy(&self, batch: &mut CopyBatch<'_>) -> Result {
        for op in batch {
            if let CopyOp::ToRam { from, mut to } = op {
                for _ in 0..from.len() {
                    to.write(&[1])?;
                }
            }
        }
        let mut inside = self.inside.lock();
        if let Some(inside) = &mut *inside {
            let req = FaultRequest::new(inside.page, Access::Read);
            let missed = inside.mirror.read(inside.page.start(), &mut [0]).is_err();
            inside.results = Some([
                inside
                    .mirror
                    .mm()
                    .and_then(|mm| mm.fault(req, &mut inside.buf, |_| ())),
                inside
                    .mirror
                    .mm()
                    .and_then(|mm| mm.migrate_to_ram(inside.page, &mut inside.moves))
                    .map(drop),
                Mirror::new(&MODULE, self.ops.clone()).map(drop),
                DevicePool::new(
                    &MODULE,
                    c"hmm_inner",
                    self.other.clone(),
                    Engine::Cpu,
                    CHUNK,
                    1,
                )
                .map(drop),
                if missed { Err(EDEADLK) } else { Ok(()) },
            ]);
        }
        Ok(())
    }

    fn migrated_to_ram(&self, _: ArcBorrow<'_, Unused>, _: usize, _: MigrateReason) {}

    fn page_freed(&self, _data: Arc<Unused>, _pages: usize) {}
}

/// Page data that owns the pool of another device.
struct Unused(#[expect(dead_code)] DevicePool<TestDevice<u64>>);

fn numbers(pages: usize) -> Result<KVec<usize>> {
    Ok(KVec::from_elem(0, pages, GFP_KERNEL)?)
}

#[kunit_tests(hmm_pool)]
mod tests {
    use super::*;

    #[test]
    fn sizes_that_make_no_chunks_are_einval() -> Result {
        let (device, _pool) = TestDevice::<u64>::new(1)?;
        for (pages, chunks) in [(0, 1), (CHUNK, 0), (CHUNK + 1, 1), (CHUNK, usize::MAX)] {
            let ops = device.clone();
            let pool = DevicePool::new(&MODULE, c"hmm_kunit", ops, Engine::Cpu, pages, chunks);
            assert_eq!(pool.err(), Some(EINVAL));
        }
        Ok(())
    }

    #[test]
    fn it_grows_when_pages_are_taken_and_what_is_not_used_goes_back() -> Result {
        let (_device, pool) = TestDevice::<u64>::new(2)?;
        assert_eq!(pool.pool().chunks(), 0);
        let mut few = numbers(10)?;
        let reservation = reserve(pool.pool(), &mut few)?;
        assert_eq!(pool.pool().used_pages(), 10);
        assert_eq!(pool.pool().chunks(), 1);
        let mut many = numbers(CHUNK)?;
        let other = reserve(pool.pool(), &mut many)?;
        assert_eq!(pool.pool().used_pages(), CHUNK + 10);
        assert_eq!(pool.pool().chunks(), 2);
        drop(reservation);
        drop(other);
        assert_eq!(pool.pool().used_pages(), 0);
        Ok(())
    }

    #[test]
    fn what_cannot_grow_gives_what_there_is_and_then_enomem() -> Result {
        let (_device, pool) = TestDevice::<u64>::new(1)?;
        let (mut most, mut more) = (numbers(CHUNK - 1)?, numbers(2)?);
        let _most = reserve(pool.pool(), &mut most)?;
        let last = reserve(pool.pool(), &mut more)?;
        assert_eq!(pool.pool().used_pages(), CHUNK);
        let mut none = numbers(1)?;
        assert_eq!(reserve(pool.pool(), &mut none).err(), Some(ENOMEM));
        drop(last);
        assert!(reserve(pool.pool(), &mut none).is_ok());
        Ok(())
    }

    #[test]
    fn page_data_that_is_a_number_comes_back_once() -> Result {
        let (device, pool) = TestDevice::<u64>::new(1)?;
        let mut pfns = numbers(3)?;
        let mut reservation = reserve(pool.pool(), &mut pfns)?;
        let mut value = u64::MAX - 2;
        let mut data = || {
            value += 1;
            // SAFETY: The page data of `TestDevice<u64>` is a `u64`.
            unsafe { RawData::new(value) }
        };
        let first = reservation.folio(Order::PAGE, || Ok(data()))?;
        let second = reservation.folio(Order::PAGE, || Ok(data()))?;
        assert!(first.is_some() && second.is_some());
        drop(reservation);
        assert_eq!(device.freed.load(Relaxed), 0);
        assert_eq!(pool.pool().used_pages(), 2);
        drop(first);
        assert_eq!(device.freed.load(Relaxed), 1);
        assert_eq!(device.sum.load(Relaxed), u64::MAX - 1);
        drop(second);
        assert_eq!(device.freed.load(Relaxed), 2);
        assert_eq!(pool.pool().used_pages(), 0);
        Ok(())
    }

    #[test]
    fn page_data_that_is_an_object_is_dropped_once() -> Result {
        let (device, pool) = TestDevice::<Arc<Counted>>::new(1)?;
        let dropped = Arc::new(Atomic::new(0), GFP_KERNEL)?;
        let counted = Arc::new(
            Counted {
                value: 7,
                dropped: dropped.clone(),
            },
            GFP_KERNEL,
        )?;
        let mut pfns = numbers(2)?;
        let mut reservation = reserve(pool.pool(), &mut pfns)?;
        // SAFETY: The page data of this pool's driver is an `Arc<Counted>`.
        let data = unsafe { RawData::new(counted.clone()) };
        let page = reservation.folio(Order::PAGE, || Ok(data))?;
        drop(counted);
        assert!(page.is_some());
        assert_eq!(dropped.load(Relaxed), 0);
        drop(page);
        assert_eq!(dropped.load(Relaxed), 1);
        assert_eq!(device.sum.load(Relaxed), 7);
        drop(reservation);
        assert_eq!(device.freed.load(Relaxed), 1);
        Ok(())
    }

    #[test]
    fn what_a_module_has_leaked_ends_with_it() -> Result {
        with_user_mm(|mm| {
            let (device, pool) = TestDevice::<u64>::of_module(&LEAKY, 1)?;
            let mirror = Mirror::new_with_pool(&MODULE, Recorder::new()?, &pool)?;
            let page = map_aligned(mm, 1, Prot::ReadWrite)?;
            user_write(page.start(), 7)?;
            let mut buf = MigrateBuf::new(0)?;
            let moved =
                mirror
                    .mm()?
                    .migrate_to_device(&pool, page, Holes::Keep, &mut buf, |_| Ok(1))?;
            assert_eq!(moved.pages(), 1);
            let inner = pool.pool().clone();
            drop(mirror);
            let pool = core::mem::ManuallyDrop::new(pool);

            // The end of another module does not end the pool.
            // SAFETY: The pointer is not null.
            unsafe { rust_hmm_module_going(core::ptr::without_provenance_mut(1)) };
            assert_eq!(inner.chunks(), 1);
            assert_eq!(inner.used_pages(), 1);
            // SAFETY: The pointer is not null.
            unsafe { rust_hmm_module_going(LEAKY.as_ptr()) };
            assert_eq!(inner.chunks(), 0);
            // kmemleak does not know that the leak is meant.
            drop(core::mem::ManuallyDrop::into_inner(pool));
            assert_eq!(device.home(MigrateReason::Evict), 1);
            assert_eq!(device.freed.load(Relaxed), 1);
            assert_eq!(user_read(page.start()), Ok(7));
            Ok(())
        })
    }

    #[test]
    fn a_driver_that_copies_is_refused_all_that_could_wait_for_it() -> Result {
        with_user_mm(|mm| {
            let (other, dropped) = TestDevice::<u64>::of_module(&LEAKY, 1)?;
            let left = dropped.pool().clone();
            let init = pin_init!(Inward {
                inside <- new_mutex!(None),
                other,
                ops: Recorder::new()?,
            }? Error);
            let device = Arc::pin_init(init, GFP_KERNEL)?;
            let pool =
                DevicePool::new(&MODULE, c"hmm_kunit", device.clone(), Engine::Cpu, CHUNK, 1)?;
            let mirror = Mirror::new_with_pool(&MODULE, Recorder::new()?, &pool)?;
            let mirror = Arc::new(mirror, GFP_KERNEL)?;
            let page = map_aligned(mm, 1, Prot::ReadWrite)?;
            user_write(page.start(), 1)?;
            *device.inside.lock() = Some(Inside {
                mirror: mirror.clone(),
                page,
                buf: FaultBuf::new(0)?,
                moves: MigrateBuf::new(0)?,
                results: None,
            });
            let results = || {
                let mut inside = device.inside.lock();
                (*inside).as_mut().and_then(|inside| inside.results.take())
            };

            let mut buf = MigrateBuf::new(0)?;
            let mut data = Some(Arc::new(Unused(dropped), GFP_KERNEL)?);
            let mut evicted = Ok(());
            let mm = mirror.mm()?;
            let moved = mm.migrate_to_device(&pool, page, Holes::Keep, &mut buf, |_| {
                evicted = pool.evict();
                data.take().ok_or(EIO)
            })?;
            assert_eq!(moved.pages(), 1);
            assert_eq!(evicted, Err(EDEADLK));
            assert_eq!(results(), Some([Err(EDEADLK); 5]));

            // Eviction frees the page, which drops its data, which drops a pool in a callback.
            pool.evict()?;
            assert_eq!(results(), Some([Err(EDEADLK); 5]));
            assert_eq!(user_read(page.start()), Ok(1));
            drop(device.inside.lock().take());
            // That pool exists until its module is unloaded.
            let mut pfns = numbers(1)?;
            drop(reserve(&left, &mut pfns)?);
            assert_eq!(left.chunks(), 1);
            // SAFETY: The pointer is not null.
            unsafe { rust_hmm_module_going(LEAKY.as_ptr()) };
            assert_eq!(left.chunks(), 0);
            Ok(())
        })
    }

    #[test]
    fn a_pool_that_ended_has_nothing_to_give_and_another_can_be_made() -> Result {
        for _ in 0..3 {
            let (_device, pool) = TestDevice::<u64>::new(1)?;
            let inner = pool.pool().clone();
            let mut pfns = numbers(1)?;
            drop(reserve(&inner, &mut pfns)?);
            drop(pool);
            assert_eq!(inner.chunks(), 0);
            assert_eq!(reserve(&inner, &mut pfns).err(), Some(ENOMEM));
        }
        Ok(())
    }
}
