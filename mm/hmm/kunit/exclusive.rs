// SPDX-License-Identifier: GPL-2.0

//! Tests of `exclusive.rs`.

use super::{
    super::{
        commit::Entry,
        fault::FaultRequest,
        hmm_range::FaultBuf,
        mirror::Mirror,
        pfn::Access,
        range::PageRange,
        region::{
            Cause,
            REGION_ORDER, //
        }, //
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
    page::PAGE_SIZE,
    prelude::*,
    sync::Arc, //
};

/// Makes `page` exclusive and returns the number of retries.
fn make_exclusive(mirror: &Mirror, page: PageRange) -> Result<u32> {
    let mut buf = FaultBuf::new(0)?;
    let va = mirror
        .mm()?
        .make_exclusive(page.start(), &mut buf, |page| page.va())?;
    assert_eq!(va, page.start());
    Ok(buf.retries())
}

/// A mirror, a mapped window of 8 pages, and the ops that record invalidations.
fn setup(mm: &UserMm) -> Result<(Mirror, PageRange, Arc<Recorder>)> {
    let ops = Recorder::new()?;
    Ok((
        Mirror::new(&MODULE, ops.clone())?,
        map_aligned(mm, 8, Prot::ReadWrite)?,
        ops,
    ))
}

#[kunit_tests(hmm_exclusive)]
mod tests {
    use super::*;

    #[test]
    fn the_device_has_the_page_until_the_cpu_touches_it() -> Result {
        with_user_mm(|mm| {
            let (mirror, window, ops) = setup(mm)?;
            let first = page(window, 0)?;
            user_write(first.start(), 1)?;
            make_exclusive(&mirror, first)?;
            let mut byte = [0];
            assert!(mirror.read(first.start(), &mut byte).is_ok());
            assert_eq!(byte[0], 1);
            assert!(mirror.write(first.start(), &[2]).is_ok());

            let before = ops.count();
            assert_eq!(user_read(first.start())?, 2);
            assert!(ops.count() > before);
            assert!(ops.last() == Some(first));
            assert!(mirror.read(first.start(), &mut byte).is_err());
            assert!(mirror.write(first.start(), &[3]).is_err());
            assert_eq!(user_read(first.start())?, 2);
            Ok(())
        })
    }

    #[test]
    fn the_event_with_which_it_begins_is_no_collision() -> Result {
        with_user_mm(|mm| {
            let (mirror, window, ops) = setup(mm)?;
            let (cold, warm) = (page(window, 0)?, page(window, 1)?);
            assert_eq!(make_exclusive(&mirror, cold)?, 0);
            // The event erases the entry nevertheless.
            user_write(warm.start(), 1)?;
            let mut buf = FaultBuf::new(0)?;
            mirror
                .mm()?
                .fault(FaultRequest::new(warm, Access::Write), &mut buf, |_| ())?;
            let before = ops.count();
            assert_eq!(make_exclusive(&mirror, warm)?, 0);
            assert_eq!(ops.count(), before + 1);
            assert!(ops.last() == Some(warm));
            assert_eq!(ops.cause(), Some(Cause::Exclusive));
            Ok(())
        })
    }

    #[test]
    fn an_update_replaces_a_word_of_the_page() -> Result {
        with_user_mm(|mm| {
            let (mirror, window, ops) = setup(mm)?;
            let va = page(window, 0)?.start() + 24;
            for byte in [0, 1, 6, 7] {
                user_write(va + byte, byte as u8 + 1)?;
            }
            let old = u64::from_ne_bytes([1, 2, 0, 0, 0, 0, 7, 8]);
            user_write(va - 1, 9)?;
            user_write(va + 8, 9)?;
            make_exclusive(&mirror, page(window, 0)?)?;
            assert_eq!(mirror.update(va, |word| Some(!word)).ok(), Some(old));
            assert_eq!(mirror.update(va, Some).ok(), Some(!old));
            let before = ops.count();
            for (byte, value) in (!old).to_ne_bytes().iter().enumerate() {
                assert_eq!(user_read(va + byte)?, *value);
            }
            assert_eq!((user_read(va - 1)?, user_read(va + 8)?), (9, 9));
            // The CPU has taken the page away.
            assert!(ops.count() > before);
            assert!(mirror.update(va, Some).is_err());
            Ok(())
        })
    }

    #[test]
    fn an_update_that_misses_changes_nothing() -> Result {
        with_user_mm(|mm| {
            let (mirror, window, _) = setup(mm)?;
            let (first, next) = (page(window, 0)?, page(window, 1)?);
            let misses = |va, new| {
                let mut called = false;
                let result = mirror.update(va, |_| {
                    called = true;
                    new
                });
                assert!(result.is_err_and(|miss| miss.va == va && miss.access == Access::Write));
                called
            };
            user_write(first.start(), 1)?;
            assert!(!misses(first.start(), Some(2)));
            // The device may only read this page.
            user_read(next.start())?;
            mirror.mm()?.fault(
                FaultRequest::new(next, Access::Read),
                &mut FaultBuf::new(0)?,
                |_| (),
            )?;
            assert!(!misses(next.start(), Some(2)));

            make_exclusive(&mirror, first)?;
            // No `u64` reaches from one page to the next.
            for va in [first.start() + 4, first.end() - 1] {
                assert!(!misses(va, Some(2)));
            }
            assert!(misses(first.start(), None));
            // An update within an update would wait for the lock of the region.
            let outer = mirror.update(first.start(), |word| {
                assert!(!misses(first.start(), Some(2)));
                Some(word)
            });
            assert_eq!(outer.ok(), Some(1));
            assert_eq!(user_read(first.start())?, 1);
            Ok(())
        })
    }

    #[test]
    fn a_page_that_is_exclusive_can_be_made_so_again() -> Result {
        with_user_mm(|mm| {
            let (mirror, window, _) = setup(mm)?;
            let first = page(window, 0)?;
            make_exclusive(&mirror, first)?;
            assert!(mirror.write(first.start(), &[7]).is_ok());
            assert_eq!(make_exclusive(&mirror, first)?, 0);
            assert!(mirror.write(first.start() + 1, &[8]).is_ok());
            assert_eq!(user_read(first.start())?, 7);
            assert_eq!(user_read(first.start() + 1)?, 8);
            Ok(())
        })
    }

    #[test]
    fn another_device_takes_it_away() -> Result {
        with_user_mm(|mm| {
            let (mirror, window, _) = setup(mm)?;
            let other = Mirror::new(&MODULE, Recorder::new()?)?;
            let first = page(window, 0)?;
            make_exclusive(&mirror, first)?;
            assert!(mirror.write(first.start(), &[7]).is_ok());
            make_exclusive(&other, first)?;
            assert!(mirror.read(first.start(), &mut [0]).is_err());
            let mut byte = [0];
            assert!(other.read(first.start(), &mut byte).is_ok());
            assert_eq!(byte[0], 7);
            Ok(())
        })
    }

    #[test]
    fn what_another_device_begins_is_a_collision() -> Result {
        with_user_mm(|mm| {
            let (mirror, window, _) = setup(mm)?;
            let other = Mirror::new(&MODULE, Recorder::new()?)?;
            let first = page(window, 0)?;
            user_write(first.start(), 1)?;
            let mut buf = FaultBuf::new(0)?;
            let req = FaultRequest::new(first, Access::Write);
            let mut made = Err(EIO);
            mirror.mm()?.fault_loop(&req, &mut buf, &mut |_| (), |_| {
                if made.is_err() {
                    made = make_exclusive(&other, first);
                }
            })?;
            assert_eq!(made?, 0);
            assert_eq!(buf.retries(), 1);
            assert!(mirror.write(first.start(), &[2]).is_ok());
            assert!(other.write(first.start(), &[3]).is_err());
            Ok(())
        })
    }

    #[test]
    fn a_fault_of_its_neighbours_leaves_it_exclusive() -> Result {
        with_user_mm(|mm| {
            let (mirror, window, ops) = setup(mm)?;
            let (first, next) = (page(window, 0)?, page(window, 1)?);
            make_exclusive(&mirror, first)?;
            let before = ops.count();
            let mut buf = FaultBuf::new(3)?;
            mirror
                .mm()?
                .fault(FaultRequest::new(next, Access::Write), &mut buf, |_| ())?;
            assert!(mirror.write(next.start(), &[1]).is_ok());
            assert!(mirror.write(first.start(), &[2]).is_ok());
            assert_eq!(ops.count(), before);
            assert_eq!(user_read(first.start())?, 2);
            Ok(())
        })
    }

    #[test]
    fn what_is_unmapped_is_the_device_s_no_more() -> Result {
        with_user_mm(|mm| {
            let (mirror, window, ops) = setup(mm)?;
            let first = page(window, 0)?;
            make_exclusive(&mirror, first)?;
            let before = ops.count();
            mm.munmap(first.start(), first.len())?;
            assert!(ops.count() > before);
            assert!(mirror.read(first.start(), &mut [0]).is_err());
            Ok(())
        })
    }

    #[test]
    fn memory_that_the_process_may_not_write_is_eperm() -> Result {
        with_user_mm(|mm| {
            let (mirror, _, _) = setup(mm)?;
            let page = map_aligned(mm, 1, Prot::Read)?;
            assert_eq!(make_exclusive(&mirror, page).err(), Some(EPERM));
            assert!(mirror.read(page.start(), &mut [0]).is_err());
            Ok(())
        })
    }

    #[test]
    fn memory_of_a_file_is_eopnotsupp() -> Result {
        with_user_mm(|mm| {
            let (mirror, _, _) = setup(mm)?;
            let va = mm.mmap_shmem(PAGE_SIZE, PAGE_SIZE, Prot::ReadWrite, true)?;
            let page = PageRange::from_len(va, PAGE_SIZE)?;
            user_write(va, 1)?;
            assert_eq!(make_exclusive(&mirror, page).err(), Some(EOPNOTSUPP));
            assert!(mirror.read(va, &mut [0]).is_err());
            Ok(())
        })
    }

    #[test]
    fn what_is_refused_is_not_populated() -> Result {
        with_user_mm(|mm| {
            let (mirror, _, _) = setup(mm)?;
            let va = mm.mmap_shmem(PAGE_SIZE, PAGE_SIZE, Prot::ReadWrite, true)?;
            let page = PageRange::from_len(va, PAGE_SIZE)?;
            assert_eq!(make_exclusive(&mirror, page).err(), Some(EOPNOTSUPP));
            let request = FaultRequest::snapshot(page);
            let is_hole = mirror
                .mm()?
                .fault(request, &mut FaultBuf::new(0)?, |commit| {
                    commit
                        .entries()
                        .all(|(_, entry)| matches!(entry, Entry::Hole))
                })?;
            assert!(is_hole);
            Ok(())
        })
    }

    #[test]
    fn where_nothing_is_mapped_is_efault_and_leaves_no_region() -> Result {
        with_user_mm(|mm| {
            let (mirror, window, _) = setup(mm)?;
            let far = page(window, 0)?.start() - (PAGE_SIZE << (REGION_ORDER + 1));
            let hole = PageRange::from_len(far, PAGE_SIZE)?;
            assert_eq!(make_exclusive(&mirror, hole).err(), Some(EFAULT));
            assert!(mirror.region(far).is_none());
            Ok(())
        })
    }

    #[test]
    fn a_process_that_has_ended_is_esrch() -> Result {
        let mirror = with_user_mm(|mm| Ok(setup(mm)?.0))?;
        with_user_mm(|mm| {
            let page = map_aligned(mm, 1, Prot::ReadWrite)?;
            user_write(page.start(), 1)?;
            assert_eq!(make_exclusive(&mirror, page).err(), Some(ESRCH));
            Ok(())
        })
    }
}
