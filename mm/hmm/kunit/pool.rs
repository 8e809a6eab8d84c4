// SPDX-License-Identifier: GPL-2.0

//! Tests of `pool.rs`.

use super::{
    super::pool::{
        DevicePool,
        RawData, //
    },
    device::{
        reserve,
        Counted,
        TestDevice,
        CHUNK, //
    }, //
};
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
            let pool = DevicePool::new(c"hmm_kunit", device.clone(), pages, chunks);
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
            // SAFETY: The page data is a `u64`.
            unsafe { RawData::new(value) }
        };
        let first = reservation.folio(data());
        let second = reservation.folio(data());
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
        // SAFETY: The page data is an `Arc<Counted>`.
        let data = unsafe { RawData::new(counted.clone()) };
        let page = reservation.folio(data);
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
