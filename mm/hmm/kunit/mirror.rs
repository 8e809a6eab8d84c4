// SPDX-License-Identifier: GPL-2.0

//! Tests of `mirror.rs`.

use super::{
    super::{
        fault::FaultRequest,
        hmm_range::FaultBuf,
        mirror::Mirror,
        pfn::Access,
        range::PageRange,
        region::{
            Region,
            REGION_ORDER, //
        }, //
    },
    event_of,
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
    page::PAGE_SIZE,
    prelude::*,
    sync::Arc,
    uaccess::{
        UserPtr,
        UserSlice, //
    }, //
};

const REGION_BYTES: usize = PAGE_SIZE << REGION_ORDER;

/// Faults all of `range`, a window at a time.
fn fault(mirror: &Mirror, range: PageRange, access: Access) -> Result {
    let mut buf = FaultBuf::new(FaultBuf::MAX_ORDER)?;
    let mut start = range.start();
    while start < range.end() {
        let req = FaultRequest::new(PageRange::new(start, range.end())?, access);
        let needed = mirror
            .mm()?
            .fault(req, &mut buf, |commit| commit.needed())?;
        start = needed.ok_or(EIO)?.end();
    }
    Ok(())
}

/// Maps `pages` pages that hold `byte` at their start.
fn map(mm: &UserMm, pages: usize, byte: u8) -> Result<PageRange> {
    let len = pages * PAGE_SIZE;
    let range = PageRange::from_len(mm.mmap_anonymous(len, Prot::ReadWrite)?, len)?;
    for va in range.page_addrs() {
        user_write(va, byte)?;
    }
    Ok(range)
}

#[kunit_tests(hmm_mirror)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_thread_has_nothing_to_mirror() -> Result {
        assert_eq!(Mirror::new(&MODULE, Recorder::new()?).err(), Some(EINVAL));
        Ok(())
    }

    #[test]
    fn what_was_not_faulted_is_a_miss_at_its_address() -> Result {
        with_user_mm(|mm| {
            let range = map(mm, 1, 7)?;
            let mirror = Mirror::new(&MODULE, Recorder::new()?)?;
            let mut buf = [0; 4];
            let va = range.start() + 3;
            let miss = mirror.read(va, &mut buf).err();
            assert!(miss.is_some_and(|miss| miss.va == va && miss.access == Access::Read));
            let miss = mirror.write(va, &buf).err();
            assert!(miss.is_some_and(|miss| miss.va == va && miss.access == Access::Write));
            Ok(())
        })
    }

    #[test]
    fn reads_and_writes_cross_pages_and_miss_behind_them() -> Result {
        with_user_mm(|mm| {
            // Nothing is mapped above the first mapping of an address space.
            let two = map(mm, 2, 7)?;
            let mirror = Mirror::new(&MODULE, Recorder::new()?)?;
            fault(&mirror, two, Access::Write)?;

            let border = two.start() + PAGE_SIZE - 2;
            assert!(mirror.write(border, b"abcd").is_ok());
            let user = UserSlice::new(UserPtr::from_addr(border), 4)
                .reader()
                .read::<[u8; 4]>()?;
            assert_eq!(&user, b"abcd");
            let mut buf = [0; 4];
            assert!(mirror.read(border, &mut buf).is_ok());
            assert_eq!(&buf, b"abcd");

            let border = two.end() - 2;
            let miss = mirror.write(border, b"efgh").err();
            assert!(miss.is_some_and(|miss| miss.va == two.end()));
            let user = UserSlice::new(UserPtr::from_addr(border), 2)
                .reader()
                .read::<[u8; 2]>()?;
            assert_eq!(&user, b"ef");
            Ok(())
        })
    }

    #[test]
    fn an_address_that_nobody_has_is_a_miss_and_no_byte_is_copied() -> Result {
        with_user_mm(|mm| {
            let range = map(mm, 1, 7)?;
            let mirror = Mirror::new(&MODULE, Recorder::new()?)?;
            fault(&mirror, range, Access::Write)?;
            for va in [0, mirror.task_size(), usize::MAX - 1, usize::MAX] {
                let mut buf = [0x5a; 4];
                let miss = mirror.read(va, &mut buf).err();
                assert!(miss.is_some_and(|miss| miss.va == va));
                assert_eq!(buf, [0x5a; 4]);
                let miss = mirror.write(va, &buf).err();
                assert!(miss.is_some_and(|miss| miss.va == va));
            }
            assert!(mirror.read(usize::MAX, &mut []).is_ok());
            assert!(mirror.write(usize::MAX, &[]).is_ok());
            Ok(())
        })
    }

    #[test]
    fn reads_cross_regions() -> Result {
        with_user_mm(|mm| {
            // A read-only mapping of this size is possible, since it is not accounted.
            let len = 2 * REGION_BYTES;
            let start = mm.mmap_anonymous(len, Prot::Read)?;
            let border = (start + 1).next_multiple_of(REGION_BYTES);
            let mirror = Mirror::new(&MODULE, Recorder::new()?)?;
            let around = PageRange::new(border - PAGE_SIZE, border + PAGE_SIZE)?;
            fault(&mirror, around, Access::Read)?;
            let mut buf = [1; 8];
            assert!(mirror.read(border - 4, &mut buf).is_ok());
            assert_eq!(buf, [0; 8]);
            let below = mirror.region(border - 1).ok_or(ENOENT)?;
            let above = mirror.region(border).ok_or(ENOENT)?;
            assert!(!Arc::ptr_eq(&below, &above));
            assert_eq!(below.range().end(), above.range().start());
            Ok(())
        })
    }

    #[test]
    fn an_invalidation_erases_the_range_and_tells_the_driver() -> Result {
        with_user_mm(|mm| {
            let range = map(mm, 3, 7)?;
            let ops = Recorder::new()?;
            let mirror = Mirror::new(&MODULE, ops.clone())?;
            fault(&mirror, range, Access::Read)?;
            assert_eq!(ops.count(), 0);

            let middle = PageRange::from_len(range.start() + PAGE_SIZE, PAGE_SIZE)?;
            mm.munmap(middle.start(), middle.len())?;
            assert_eq!(ops.count(), 1);
            assert!(ops.last() == Some(middle));

            let mut byte = [0];
            assert!(mirror.read(middle.start(), &mut byte).is_err());
            for va in [range.start(), middle.end()] {
                assert!(mirror.read(va, &mut byte).is_ok());
                assert_eq!(byte[0], 7);
            }
            Ok(())
        })
    }

    #[test]
    fn an_invalidation_of_what_the_device_has_not_is_no_call() -> Result {
        with_user_mm(|mm| {
            let range = map(mm, 3, 7)?;
            let first = PageRange::from_len(range.start(), PAGE_SIZE)?;
            let ops = Recorder::new()?;
            let mirror = Mirror::new(&MODULE, ops.clone())?;
            let mut buf = FaultBuf::new(0)?;
            mirror
                .mm()?
                .fault(FaultRequest::new(first, Access::Write), &mut buf, |_| ())?;

            mm.munmap(first.end(), PAGE_SIZE)?;
            assert_eq!(ops.count(), 0);
            mm.munmap(range.start(), range.len())?;
            assert_eq!(ops.count(), 1);
            Ok(())
        })
    }

    #[test]
    fn an_invalidation_that_may_not_block_changes_nothing_if_it_would() -> Result {
        with_user_mm(|mm| {
            let range = map(mm, 1, 7)?;
            let ops = Recorder::new()?;
            let mirror = Mirror::new(&MODULE, ops.clone())?;
            fault(&mirror, range, Access::Read)?;
            let region = mirror.region(range.start()).ok_or(ENOENT)?;
            let event = event_of(mm, range, 0);
            // SAFETY: The notifier is the region's, the event is valid, and the sequence is odd, as
            // in an invalidation.
            let invalidate = || unsafe {
                Region::invalidate_start(region.notifier(), &event, 1, &mut core::ptr::null_mut())
            };

            // SAFETY: The notifier is the region's, and nobody writes it concurrently.
            let sequence = || unsafe { (*region.notifier()).invalidate_seq };
            let before = sequence();

            let guard = region.entries().read();
            let handled = invalidate();
            drop(guard);
            assert!(!handled);
            assert_eq!(sequence(), before);
            assert_eq!(ops.count(), 0);
            assert!(mirror.read(range.start(), &mut [0]).is_ok());

            assert!(invalidate());
            assert_eq!(ops.count(), 1);
            assert!(mirror.read(range.start(), &mut [0]).is_err());
            Ok(())
        })
    }

    #[test]
    fn of_two_that_insert_a_region_the_second_gets_the_firsts() -> Result {
        with_user_mm(|mm| {
            let range = map(mm, 1, 7)?;
            let ops = Recorder::new()?;
            let mirror = Mirror::new(&MODULE, ops.clone())?;
            // An address where the mirror has no region yet.
            let va = range.start() / 2;
            let first = mirror.new_region(mm.mm(), va)?;
            let second = mirror.new_region(mm.mm(), va)?;
            let first = mirror.publish(first, va)?;
            let second = mirror.publish(second, va)?;
            assert!(Arc::ptr_eq(&first, &second));
            let found = mirror.region_or_insert(mm.mm(), va)?;
            assert!(Arc::ptr_eq(&first, &found));
            // The region that lost the race gets no more invalidations.
            fault(&mirror, range, Access::Read)?;
            let other = mirror.new_region(mm.mm(), range.start())?;
            drop(mirror.publish(other, range.start())?);
            mm.munmap(range.start(), range.len())?;
            assert_eq!(ops.count(), 1);
            Ok(())
        })
    }

    #[test]
    fn the_exit_of_the_process_ends_access_and_not_the_mirror() -> Result {
        let ops = Recorder::new()?;
        let recorder = ops.clone();
        let (mirror, range) = with_user_mm(move |mm| {
            let range = map(mm, 2, 7)?;
            let mirror = Mirror::new(&MODULE, recorder)?;
            fault(&mirror, range, Access::Write)?;
            assert!(mirror.read(range.start(), &mut [0]).is_ok());
            assert!(mirror.is_current());
            Ok((mirror, range))
        })?;
        assert!(ops.count() > 0);
        assert!(!mirror.is_current());
        assert!(mirror.read(range.start(), &mut [0]).is_err());
        assert!(mirror.write(range.start(), &[0]).is_err());
        assert_eq!(fault(&mirror, range, Access::Read), Err(ESRCH));
        Ok(())
    }

    #[test]
    fn a_process_that_has_ended_is_esrch_for_any_task() -> Result {
        let mirror = with_user_mm(|_| Mirror::new(&MODULE, Recorder::new()?))?;
        with_user_mm(|mm| {
            let range = map(mm, 1, 7)?;
            assert!(!mirror.is_current());
            assert_eq!(fault(&mirror, range, Access::Read), Err(ESRCH));
            Ok(())
        })
    }
}
