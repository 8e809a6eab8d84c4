// SPDX-License-Identifier: GPL-2.0

//! Tests of `fault.rs`.

use super::{
    super::{
        commit::{
            clamp_order,
            Commit,
            DevicePage,
            Entry,
            RamPage, //
        },
        fault::FaultRequest,
        hmm_range::FaultBuf,
        mirror::Mirror,
        pfn::{
            Access,
            HmmPfn, //
        },
        range::PageRange,
        region::REGION_ORDER, //
    },
    map_aligned,
    page,
    user_read,
    user_write,
    zap,
    Recorder,
    MODULE, //
};
#[cfg(CONFIG_X86_USER_SHADOW_STACK)]
use kernel::bindings;
use kernel::{
    kunit::user_mm::{
        with_user_mm,
        Prot,
        UserMm, //
    },
    page::PAGE_SIZE,
    prelude::*, //
};

/// Faults `range` for `access` and returns a letter for each entry of the window: `r`ead,
/// `w`rite, `h`ole, `e`rror; a capital letter for a page in device memory.
fn fault(mirror: &Mirror, range: PageRange, access: Access) -> Result<KVec<u8>> {
    let mut buf = FaultBuf::new(3)?;
    let mut letters = KVec::with_capacity(8, GFP_KERNEL)?;
    let mm = mirror.mm()?;
    mm.fault(FaultRequest::new(range, access), &mut buf, |commit| {
        for (_, entry) in commit.entries() {
            let letter = match entry {
                Entry::Hole => b'h',
                Entry::Error => b'e',
                Entry::Ram(RamPage::Read(_)) => b'r',
                Entry::Ram(RamPage::Write(_)) => b'w',
                Entry::Device(DevicePage::Read(_)) => b'R',
                Entry::Device(DevicePage::Write(_)) => b'W',
            };
            let _ = letters.push_within_capacity(letter);
        }
    })?;
    Ok(letters)
}

/// Takes a snapshot of `range`. Returns letters as [`fault`] does, and `z` for the zero page.
fn snapshot(mirror: &Mirror, range: PageRange) -> Result<KVec<u8>> {
    let mut buf = FaultBuf::new(3)?;
    let mut letters = KVec::with_capacity(8, GFP_KERNEL)?;
    let mm = mirror.mm()?;
    mm.fault(FaultRequest::snapshot(range), &mut buf, |commit| {
        assert!(commit.needed().is_none());
        for (_, entry) in commit.entries() {
            let letter = match entry {
                Entry::Hole => b'h',
                Entry::Error => b'e',
                Entry::Ram(RamPage::Read(page)) if page.is_zero() => b'z',
                Entry::Ram(RamPage::Read(_)) => b'r',
                Entry::Ram(RamPage::Write(_)) => b'w',
                Entry::Device(_) => b'd',
            };
            let _ = letters.push_within_capacity(letter);
        }
    })?;
    Ok(letters)
}

/// Maps 8 pages, aligned to a window of 8.
fn map_window(mm: &UserMm, prot: Prot) -> Result<PageRange> {
    map_aligned(mm, 8, prot)
}

#[kunit_tests(hmm_fault)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_larger_than_a_leaf_is_einval() {
        assert_eq!(FaultBuf::new(FaultBuf::MAX_ORDER + 1).err(), Some(EINVAL));
        assert!(FaultBuf::new(FaultBuf::MAX_ORDER).is_ok());
    }

    #[test]
    fn only_the_pages_needed_are_faulted() -> Result {
        with_user_mm(|mm| {
            let window = map_window(mm, Prot::ReadWrite)?;
            let mirror = Mirror::new(&MODULE, Recorder::new()?)?;
            let letters = fault(&mirror, page(window, 3)?, Access::Write)?;
            assert_eq!(&letters[..], b"hhhwhhhh");
            Ok(())
        })
    }

    #[test]
    fn what_is_there_already_is_reported_as_it_is() -> Result {
        with_user_mm(|mm| {
            let window = map_window(mm, Prot::ReadWrite)?;
            let mirror = Mirror::new(&MODULE, Recorder::new()?)?;
            user_write(page(window, 1)?.start(), 1)?;
            // A read maps the zero page.
            user_read(page(window, 2)?.start())?;
            let letters = fault(&mirror, page(window, 0)?, Access::Read)?;
            assert_eq!(&letters[..], b"rwrhhhhh");
            let mut byte = [0];
            assert!(mirror.read(page(window, 1)?.start(), &mut byte).is_ok());
            assert_eq!(byte[0], 1);
            assert!(mirror.write(page(window, 2)?.start(), &byte).is_err());
            Ok(())
        })
    }

    #[test]
    fn device_and_process_see_the_same_anonymous_memory() -> Result {
        with_user_mm(|mm| {
            let window = map_window(mm, Prot::ReadWrite)?;
            let va = window.start();
            let mirror = Mirror::new(&MODULE, Recorder::new()?)?;
            fault(&mirror, window, Access::Read)?;
            assert!(mirror.write(va, &[1]).is_err());
            fault(&mirror, window, Access::Write)?;
            assert!(mirror.write(va, &[2]).is_ok());
            assert_eq!(user_read(va)?, 2);
            user_write(va, 3)?;
            let mut byte = [0];
            assert!(mirror.read(va, &mut byte).is_ok());
            assert_eq!(byte[0], 3);
            Ok(())
        })
    }

    #[test]
    fn device_and_process_see_the_same_file_memory() -> Result {
        with_user_mm(|mm| {
            for shared in [true, false] {
                let va = mm.mmap_shmem(PAGE_SIZE, PAGE_SIZE, Prot::ReadWrite, shared)?;
                let range = PageRange::from_len(va, PAGE_SIZE)?;
                user_write(va, 1)?;
                let mirror = Mirror::new(&MODULE, Recorder::new()?)?;
                fault(&mirror, range, Access::Write)?;
                assert!(mirror.write(va, &[2]).is_ok());
                assert_eq!(user_read(va)?, 2);
            }
            Ok(())
        })
    }

    #[test]
    fn a_private_file_page_is_copied_before_the_device_writes() -> Result {
        with_user_mm(|mm| {
            let va = mm.mmap_shmem(PAGE_SIZE, PAGE_SIZE, Prot::ReadWrite, false)?;
            let range = PageRange::from_len(va, PAGE_SIZE)?;
            let ops = Recorder::new()?;
            let mirror = Mirror::new(&MODULE, ops.clone())?;
            assert_eq!(&fault(&mirror, range, Access::Read)?[..], b"r");
            assert!(mirror.write(va, &[1]).is_err());
            // Copy-on-write replaces the page, so the entry of the old page must be erased.
            assert_eq!(&fault(&mirror, range, Access::Write)?[..], b"w");
            assert!(ops.count() >= 1);
            assert!(mirror.write(va, &[1]).is_ok());
            assert_eq!(user_read(va)?, 1);
            Ok(())
        })
    }

    #[test]
    fn a_hole_and_no_permission_are_efault() -> Result {
        with_user_mm(|mm| {
            let mirror = Mirror::new(&MODULE, Recorder::new()?)?;
            let window = map_window(mm, Prot::ReadWrite)?;
            let hole = page(window, 2)?;
            mm.munmap(hole.start(), hole.len())?;
            assert_eq!(fault(&mirror, hole, Access::Read).err(), Some(EFAULT));
            let none = map_window(mm, Prot::None)?;
            assert_eq!(fault(&mirror, none, Access::Read).err(), Some(EFAULT));
            assert_eq!(fault(&mirror, none, Access::Write).err(), Some(EFAULT));
            Ok(())
        })
    }

    #[test]
    fn kernel_addresses_are_efault() -> Result {
        with_user_mm(|_| {
            let mirror = Mirror::new(&MODULE, Recorder::new()?)?;
            let kernel = (&raw const mirror as usize) & !(PAGE_SIZE - 1);
            let kernel = PageRange::from_len(kernel, PAGE_SIZE)?;
            assert_eq!(fault(&mirror, kernel, Access::Read).err(), Some(EFAULT));
            let last = usize::MAX - (2 * PAGE_SIZE - 1);
            let last = PageRange::from_len(last, PAGE_SIZE)?;
            assert_eq!(fault(&mirror, last, Access::Read).err(), Some(EFAULT));
            Ok(())
        })
    }

    #[test]
    fn an_address_that_is_not_the_process_s_changes_nothing() -> Result {
        with_user_mm(|_| {
            let ops = Recorder::new()?;
            let mirror = Mirror::new(&MODULE, ops.clone())?;
            let mut buf = FaultBuf::new(3)?;
            let end = mirror.task_size();
            let last = usize::MAX - (2 * PAGE_SIZE - 1);
            for (start, pages) in [(0, 1), (end - PAGE_SIZE, 2), (end, 1), (last, 1)] {
                let range = PageRange::from_len(start, pages * PAGE_SIZE)?;
                let mut calls = 0;
                let req = FaultRequest::new(range, Access::Write);
                let result = mirror.mm()?.fault(req, &mut buf, |_| calls += 1);
                assert_eq!(result, Err(EFAULT));
                assert_eq!(calls, 0);
                assert_eq!(buf.retries(), 0);
            }
            // No region is created where nothing is mapped.
            assert!(mirror.region(0).is_none());
            assert_eq!(ops.count(), 0);
            Ok(())
        })
    }

    #[test]
    fn no_time_for_retries_is_not_all_the_time() -> Result {
        with_user_mm(|mm| {
            let window = map_window(mm, Prot::ReadWrite)?;
            let mirror = Mirror::new(&MODULE, Recorder::new()?)?;
            let mut buf = FaultBuf::new(3)?;
            let req = FaultRequest::new(window, Access::Write).timeout_ms(0);
            mirror.mm()?.fault(req, &mut buf, |_| ())?;
            let zap = |_: &mut [usize]| zap(mm.mm(), window);
            let result = mirror
                .mm()?
                .fault_loop(&req, &mut buf, &mut |_: &Commit<'_>| (), zap);
            assert_eq!(result, Err(EBUSY));
            Ok(())
        })
    }

    #[test]
    fn a_write_to_read_only_memory_is_eperm_and_a_read_is_not() -> Result {
        with_user_mm(|mm| {
            let mirror = Mirror::new(&MODULE, Recorder::new()?)?;
            let window = map_window(mm, Prot::Read)?;
            assert_eq!(fault(&mirror, window, Access::Write).err(), Some(EPERM));
            assert!(mirror.write(window.start(), &[1]).is_err());
            assert_eq!(&fault(&mirror, window, Access::Read)?[..], b"rrrrrrrr");
            assert!(mirror.write(window.start(), &[1]).is_err());
            Ok(())
        })
    }

    #[test]
    fn a_hole_beside_a_good_page_does_not_hide_it() -> Result {
        with_user_mm(|mm| {
            let mirror = Mirror::new(&MODULE, Recorder::new()?)?;
            let window = map_window(mm, Prot::ReadWrite)?;
            let hole = page(window, 2)?;
            mm.munmap(hole.start(), hole.len())?;
            // The window ends where the VMA does.
            assert_eq!(&fault(&mirror, window, Access::Write)?[..], b"ww");
            let behind = PageRange::new(hole.end(), window.end())?;
            assert_eq!(&fault(&mirror, behind, Access::Write)?[..], b"wwwww");
            Ok(())
        })
    }

    #[test]
    fn a_page_that_fails_in_the_window_does_not_fail_the_page_before_it() -> Result {
        with_user_mm(|mm| {
            let mirror = Mirror::new(&MODULE, Recorder::new()?)?;
            // The file ends before the mapping: a fault beyond its end is VM_FAULT_SIGBUS.
            let len = 16 * PAGE_SIZE;
            let va = mm.mmap_shmem(len, PAGE_SIZE, Prot::ReadWrite, true)?;
            let range = PageRange::from_len(va, 2 * PAGE_SIZE)?;
            assert_eq!(&fault(&mirror, range, Access::Read)?[..], b"w");
            let behind = page(range, 1)?;
            assert_eq!(fault(&mirror, behind, Access::Read).err(), Some(EFAULT));
            Ok(())
        })
    }

    #[test]
    fn a_snapshot_faults_nothing_and_tells_what_is_there() -> Result {
        with_user_mm(|mm| {
            let window = map_window(mm, Prot::ReadWrite)?;
            let mirror = Mirror::new(&MODULE, Recorder::new()?)?;
            assert_eq!(&snapshot(&mirror, window)?[..], b"hhhhhhhh");
            user_write(page(window, 1)?.start(), 1)?;
            user_read(page(window, 2)?.start())?;
            for _ in 0..2 {
                assert_eq!(&snapshot(&mirror, window)?[..], b"hwzhhhhh");
            }
            // Pages that the snapshot reports are accessible, as after a fault.
            assert!(mirror.write(page(window, 1)?.start(), &[2]).is_ok());
            assert!(mirror.read(page(window, 2)?.start(), &mut [0]).is_ok());
            assert!(mirror.read(page(window, 3)?.start(), &mut [0]).is_err());
            Ok(())
        })
    }

    #[test]
    fn a_snapshot_goes_over_holes_and_memory_that_may_not_be_read() -> Result {
        with_user_mm(|mm| {
            let window = map_window(mm, Prot::ReadWrite)?;
            let mirror = Mirror::new(&MODULE, Recorder::new()?)?;
            user_write(page(window, 7)?.start(), 1)?;
            mm.munmap(window.start(), 3 * PAGE_SIZE)?;
            assert_eq!(&snapshot(&mirror, window)?[..], b"eeehhhhw");
            let none = map_window(mm, Prot::None)?;
            assert_eq!(&snapshot(&mirror, none)?[..], b"eeeeeeee");
            Ok(())
        })
    }

    #[test]
    fn a_snapshot_has_the_range_and_no_more() -> Result {
        with_user_mm(|mm| {
            let window = map_window(mm, Prot::ReadWrite)?;
            let mirror = Mirror::new(&MODULE, Recorder::new()?)?;
            user_write(page(window, 2)?.start(), 1)?;
            let two = PageRange::from_len(page(window, 2)?.start(), 2 * PAGE_SIZE)?;
            assert_eq!(&snapshot(&mirror, two)?[..], b"wh");
            // A snapshot ends at the end of the aligned block.
            let long = PageRange::from_len(two.start(), 2 * window.len())?;
            assert_eq!(&snapshot(&mirror, long)?[..], b"whhhhh");
            Ok(())
        })
    }

    #[test]
    fn a_snapshot_of_nothing_is_efault_and_leaves_no_region() -> Result {
        with_user_mm(|mm| {
            let window = map_window(mm, Prot::ReadWrite)?;
            let mirror = Mirror::new(&MODULE, Recorder::new()?)?;
            let far = window.start() - (PAGE_SIZE << (REGION_ORDER + 1));
            let range = PageRange::from_len(far, window.len())?;
            assert_eq!(snapshot(&mirror, range).err(), Some(EFAULT));
            assert!(mirror.region(far).is_none());
            mm.munmap(window.start(), window.len())?;
            assert_eq!(snapshot(&mirror, window).err(), Some(EFAULT));
            Ok(())
        })
    }

    #[test]
    fn the_order_of_a_page_does_not_reach_past_the_window() -> Result {
        let block = |first: usize, pages: usize| {
            PageRange::from_len((1024 + first) * PAGE_SIZE, pages * PAGE_SIZE)
        };
        let whole = block(0, 8)?;
        for va in whole.page_addrs() {
            for order in 0..=3 {
                assert_eq!(clamp_order(whole, va, order), order);
            }
            assert_eq!(clamp_order(whole, va, 9), 3);
            assert_eq!(clamp_order(whole, va, 31), 3);
        }
        let part = block(1, 6)?;
        for (va, order) in part.page_addrs().zip([0, 1, 1, 1, 1, 0]) {
            assert_eq!(clamp_order(part, va, 9), order);
        }
        Ok(())
    }

    #[test]
    fn an_invalidation_before_the_commit_makes_the_loop_retry() -> Result {
        with_user_mm(|mm| {
            let window = map_window(mm, Prot::ReadWrite)?;
            user_write(window.start(), 7)?;
            let mirror = Mirror::new(&MODULE, Recorder::new()?)?;
            let mut buf = FaultBuf::new(3)?;
            let req = FaultRequest::new(page(window, 0)?, Access::Write);
            let (mut attempts, mut commits) = (0, 0);
            mirror
                .mm()?
                .fault_loop(&req, &mut buf, &mut |_: &Commit<'_>| commits += 1, |_| {
                    attempts += 1;
                    if attempts <= 2 {
                        zap(mm.mm(), window);
                    }
                })?;
            assert_eq!(attempts, 3);
            assert_eq!(commits, 1);
            assert_eq!(buf.retries(), 2);
            // The device has the new page, not the one that was unmapped.
            let mut byte = [7];
            assert!(mirror.read(window.start(), &mut byte).is_ok());
            assert_eq!(byte[0], 0);
            Ok(())
        })
    }

    #[test]
    fn a_stale_snapshot_leaves_no_entry_and_the_deadline_ends_the_loop() -> Result {
        with_user_mm(|mm| {
            let window = map_window(mm, Prot::ReadWrite)?;
            let mirror = Mirror::new(&MODULE, Recorder::new()?)?;
            let mut buf = FaultBuf::new(3)?;
            let req = FaultRequest::new(window, Access::Write).timeout_ms(20);
            let mut commits = 0;
            let result =
                mirror
                    .mm()?
                    .fault_loop(&req, &mut buf, &mut |_: &Commit<'_>| commits += 1, |_| {
                        zap(mm.mm(), window)
                    });
            assert_eq!(result, Err(EBUSY));
            assert_eq!(commits, 0);
            assert!(buf.retries() >= 1);
            for va in window.page_addrs() {
                assert!(mirror.read(va, &mut [0]).is_err());
            }
            Ok(())
        })
    }

    #[test]
    fn after_a_collision_less_is_looked_at() -> Result {
        with_user_mm(|mm| {
            let window = map_window(mm, Prot::ReadWrite)?;
            let mirror = Mirror::new(&MODULE, Recorder::new()?)?;
            let mut buf = FaultBuf::new(3)?;
            let needed = PageRange::new(page(window, 2)?.start(), page(window, 5)?.end())?;
            // Each collision makes the window smaller: all of it, the needed pages, the first page.
            for (collisions, range) in [window, needed, page(window, 2)?, page(window, 2)?]
                .into_iter()
                .enumerate()
            {
                let req = FaultRequest::new(needed, Access::Write);
                let (mut left, mut seen) = (collisions, None);
                let mut f = |commit: &Commit<'_>| seen = Some((commit.range(), commit.needed()));
                mirror.mm()?.fault_loop(&req, &mut buf, &mut f, |_| {
                    if left > 0 {
                        left -= 1;
                        zap(mm.mm(), window);
                    }
                })?;
                assert!(seen == Some((range, range.intersect(&needed))));
                assert_eq!(buf.retries(), collisions as u32);
            }
            Ok(())
        })
    }

    #[test]
    fn a_snapshot_is_of_all_that_was_asked_for_after_a_collision_too() -> Result {
        with_user_mm(|mm| {
            let window = map_window(mm, Prot::ReadWrite)?;
            let mirror = Mirror::new(&MODULE, Recorder::new()?)?;
            let mut buf = FaultBuf::new(3)?;
            // The first page is a hole between mappings.
            mm.munmap(window.start(), PAGE_SIZE)?;
            let req = FaultRequest::snapshot(window);
            let (mut left, mut seen) = (3, None);
            let mut f = |commit: &Commit<'_>| seen = Some(commit.range());
            mirror.mm()?.fault_loop(&req, &mut buf, &mut f, |_| {
                if left > 0 {
                    left -= 1;
                    zap(mm.mm(), page(window, 1).unwrap_or(window));
                }
            })?;
            assert!(seen == Some(window));
            assert_eq!(buf.retries(), 3);
            Ok(())
        })
    }

    #[test]
    fn a_page_that_no_device_can_be_given_is_efault_at_once() -> Result {
        with_user_mm(|mm| {
            let window = map_window(mm, Prot::ReadWrite)?;
            let mirror = Mirror::new(&MODULE, Recorder::new()?)?;
            let mut buf = FaultBuf::new(3)?;
            let req = FaultRequest::new(window, Access::Write);
            // An error at the second page does not make the first page fail.
            let mut served = None;
            let second = |pfns: &mut [usize]| {
                if let Some(pfn) = pfns.get_mut(1) {
                    *pfn = HmmPfn::ERROR.into_raw();
                }
            };
            let mut f = |commit: &Commit<'_>| served = commit.needed();
            // The hook writes element 1 even if the report has one page; that changes nothing.
            mirror.mm()?.fault_loop(&req, &mut buf, &mut f, second)?;
            assert!(served == Some(page(window, 0)?));
            let all = |pfns: &mut [usize]| pfns.fill(HmmPfn::ERROR.into_raw());
            let result = mirror
                .mm()?
                .fault_loop(&req, &mut buf, &mut |_: &Commit<'_>| (), all);
            assert_eq!(result, Err(EFAULT));
            assert_eq!(buf.retries(), 0);
            Ok(())
        })
    }

    #[cfg(CONFIG_X86_USER_SHADOW_STACK)]
    #[test]
    fn a_shadow_stack_may_be_read_and_is_never_writable() -> Result {
        with_user_mm(|mm| {
            let window = map_window(mm, Prot::ReadWrite)?;
            for va in window.page_addrs() {
                user_write(va, 1)?;
            }
            let mirror = Mirror::new(&MODULE, Recorder::new()?)?;
            let guard = mm.mm().mmap_read_lock();
            let vma = guard.vma_lookup(window.start()).ok_or(EFAULT)?;
            // SAFETY: The VMA is valid while mmap_lock is held. No other task has this mm, so
            // nobody reads the flags concurrently.
            unsafe { (*vma.as_ptr()).__bindgen_anon_2.vm_flags |= bindings::VM_SHADOW_STACK };
            drop(guard);

            assert_eq!(fault(&mirror, window, Access::Write).err(), Some(EPERM));
            assert_eq!(&fault(&mirror, window, Access::Read)?[..], b"rrrrrrrr");
            assert_eq!(&snapshot(&mirror, window)?[..], b"rrrrrrrr");
            assert!(mirror.write(window.start(), &[2]).is_err());
            Ok(())
        })
    }

    #[test]
    fn churn_in_another_region_causes_no_retry() -> Result {
        with_user_mm(|mm| {
            let region = PAGE_SIZE << REGION_ORDER;
            let start = mm.mmap_anonymous(2 * region, Prot::Read)?;
            let border = (start + 1).next_multiple_of(region);
            let below = PageRange::new(border - PAGE_SIZE, border)?;
            let above = PageRange::from_len(border, PAGE_SIZE)?;
            let ops = Recorder::new()?;
            let mirror = Mirror::new(&MODULE, ops.clone())?;
            fault(&mirror, below, Access::Read)?;
            fault(&mirror, above, Access::Read)?;

            let mut buf = FaultBuf::new(0)?;
            let req = FaultRequest::new(above, Access::Read);
            mirror
                .mm()?
                .fault_loop(&req, &mut buf, &mut |_: &Commit<'_>| (), |_| {
                    zap(mm.mm(), below)
                })?;
            // There may be more than one event: the huge zero page is split before it is zapped.
            assert!(ops.count() >= 1);
            assert_eq!(buf.retries(), 0);
            assert!(mirror.read(above.start(), &mut [0]).is_ok());
            assert!(mirror.read(below.start(), &mut [0]).is_err());
            Ok(())
        })
    }

    #[test]
    fn a_request_is_served_a_window_at_a_time() -> Result {
        with_user_mm(|mm| {
            let window = map_window(mm, Prot::ReadWrite)?;
            let mirror = Mirror::new(&MODULE, Recorder::new()?)?;
            let mut buf = FaultBuf::new(1)?;
            let need = PageRange::new(page(window, 1)?.start(), window.end())?;
            let req = FaultRequest::new(need, Access::Write);
            let (range, needed) = mirror
                .mm()?
                .fault(req, &mut buf, |commit| (commit.range(), commit.needed()))?;
            assert_eq!(range.pages(), 2);
            assert!(needed == Some(page(window, 1)?));
            Ok(())
        })
    }
}
