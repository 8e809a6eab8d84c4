// SPDX-License-Identifier: GPL-2.0

//! Tests of `region.rs`.

use super::{
    super::{
        fault::FaultRequest,
        hmm_range::FaultBuf,
        mirror::Mirror,
        pfn::Access,
        range::PageRange,
        region::{
            Cause,
            Flush,
            Invalidate,
            Invalidated,
            MirrorOps,
            Region, //
        },
    },
    event_of,
    map_aligned,
    page,
    user_write,
    zap,
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
    new_spinlock,
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc,
        SpinLock, //
    }, //
};

const PAGES: usize = 4;

/// What several devices do, in the order in which they do it: a letter for each device, upper case
/// when it starts to flush, lower case when it has been waited for.
#[pin_data]
struct Journal {
    #[pin]
    letters: SpinLock<[u8; 8]>,
    used: Atomic<usize>,
}

impl Journal {
    fn new() -> Result<Arc<Self>> {
        let init = pin_init!(Self {
            letters <- new_spinlock!([0; 8]),
            used: Atomic::new(0),
        });
        Arc::pin_init(init, GFP_KERNEL)
    }

    fn add(&self, letter: u8) {
        let at = self.used.fetch_add(1, Relaxed);
        if let Some(place) = self.letters.lock().get_mut(at) {
            *place = letter;
        }
    }
}

impl Flush for Journal {
    fn wait(&self, fence: u64) {
        self.add(fence as u8);
    }
}

/// A driver that starts to flush.
struct Flusher {
    letter: u8,
    journal: Arc<Journal>,
    may_sleep: bool,
}

impl MirrorOps for Flusher {
    fn invalidate<'op>(&self, event: Invalidate<'op>) -> Invalidated<'op> {
        if event.cause() == Cause::Release {
            return event.done();
        }
        self.journal.add(self.letter.to_ascii_uppercase());
        event.flushing(self.journal.clone(), self.letter.into())
    }

    fn may_sleep(&self) -> bool {
        self.may_sleep
    }
}

/// A mirror with entries for `range`.
fn flusher(
    letter: u8,
    journal: &Arc<Journal>,
    range: PageRange,
    may_sleep: bool,
) -> Result<Mirror> {
    let journal = journal.clone();
    let ops = Flusher {
        letter,
        journal,
        may_sleep,
    };
    let mirror = Mirror::new(&MODULE, Arc::new(ops, GFP_KERNEL)?)?;
    fault(&mirror, range)?;
    Ok(mirror)
}

/// Makes entries for `range`, which is aligned, and for no other page.
fn fault(mirror: &Mirror, range: PageRange) -> Result {
    let req = FaultRequest::new(range, Access::Read);
    mirror
        .mm()?
        .fault(req, &mut FaultBuf::new(range.pages().ilog2())?, |_| ())
}

/// Pages with a byte in each.
fn map(mm: &UserMm) -> Result<PageRange> {
    let range = map_aligned(mm, PAGES, Prot::ReadWrite)?;
    for index in 0..PAGES {
        user_write(page(range, index)?.start(), 1)?;
    }
    Ok(range)
}

/// Lets all notifiers of `mm` see an event, as mm does. Returns whether none refused it.
fn notify(mm: &UserMm, range: PageRange, flags: u32) -> bool {
    let mut event = event_of(mm, range, flags);
    // SAFETY: The event is valid, and that of an mm with users, which has had a notifier.
    let accepted = unsafe { bindings::__mmu_notifier_invalidate_range_start(&mut event) } == 0;
    if accepted {
        // SAFETY: The event is the one above, and no notifier has refused it.
        unsafe { bindings::__mmu_notifier_invalidate_range_end(&mut event) };
    }
    accepted
}

#[kunit_tests(hmm_region)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_is_told_why() -> Result {
        let ops = Recorder::new()?;
        let recorder = ops.clone();
        let _mirror = with_user_mm(move |mm| {
            let range = map(mm)?;
            let mirror = Mirror::new(&MODULE, recorder.clone())?;

            fault(&mirror, range)?;
            zap(mm.mm(), range);
            assert_eq!(recorder.cause(), Some(Cause::Clear));

            fault(&mirror, range)?;
            mm.munmap(range.start(), range.len())?;
            assert_eq!(recorder.cause(), Some(Cause::Unmap));
            Ok(mirror)
        })?;
        assert_eq!(ops.cause(), Some(Cause::Release));
        Ok(())
    }

    #[test]
    fn only_the_end_of_the_process_is_told_without_an_entry() -> Result {
        let ops = Recorder::new()?;
        let recorder = ops.clone();
        let _mirror = with_user_mm(move |mm| {
            let range = map(mm)?;
            let mirror = Mirror::new(&MODULE, recorder.clone())?;
            fault(&mirror, page(range, 0)?)?;
            let rest = PageRange::new(page(range, 1)?.start(), range.end())?;
            mm.munmap(rest.start(), rest.len())?;
            assert_eq!(recorder.count(), 0);
            mm.munmap(range.start(), page(range, 0)?.len())?;
            assert_eq!(recorder.count(), 1);
            Ok(mirror)
        })?;
        assert!(ops.count() > 1);
        assert_eq!(ops.cause(), Some(Cause::Release));
        Ok(())
    }

    #[test]
    fn a_driver_that_may_sleep_gets_no_event_that_may_not_block() -> Result {
        with_user_mm(|mm| {
            let range = map(mm)?;
            let first = page(range, 0)?;
            let journal = Journal::new()?;
            let mirror = flusher(b'a', &journal, first, true)?;
            let region = mirror.region(range.start()).ok_or(ENOENT)?;
            let event = event_of(mm, first, 0);
            let mut finish = null_mut();
            // SAFETY: The notifier is the region's, and nobody writes it concurrently.
            let sequence = || unsafe { (*region.notifier()).invalidate_seq };
            let before = sequence();

            // SAFETY: The notifier is the region's, the event is valid, and the sequence is odd, as
            // in an invalidation.
            let done =
                unsafe { Region::invalidate_start(region.notifier(), &event, 1, &mut finish) };
            assert!(!done);
            assert!(finish.is_null());
            assert_eq!(sequence(), before);
            assert_eq!(journal.used.load(Relaxed), 0);
            assert!(mirror.read(first.start(), &mut [0]).is_ok());

            // The driver need not be called for the other pages.
            assert!(notify(mm, page(range, 1)?, 0));
            assert!(!notify(mm, range, 0));
            assert!(notify(mm, range, bindings::MMU_NOTIFIER_RANGE_BLOCKABLE));
            assert_eq!(*journal.letters.lock(), *b"Aa\0\0\0\0\0\0");
            assert!(mirror.read(first.start(), &mut [0]).is_err());
            Ok(())
        })
    }

    #[test]
    fn all_devices_start_before_any_is_waited_for() -> Result {
        with_user_mm(|mm| {
            let range = map(mm)?;
            let journal = Journal::new()?;
            let _mirrors = [
                flusher(b'a', &journal, range, true)?,
                flusher(b'b', &journal, range, true)?,
                flusher(b'c', &journal, range, true)?,
            ];
            mm.munmap(range.start(), range.len())?;
            let letters = *journal.letters.lock();
            assert!(letters[..3]
                .iter()
                .all(|letter| letter.is_ascii_uppercase()));
            for (start, end) in letters[..3].iter().zip(&letters[3..6]) {
                assert_eq!(start.to_ascii_lowercase(), *end);
            }
            assert_eq!(journal.used.load(Relaxed), 6);
            Ok(())
        })
    }

    #[test]
    fn an_event_waits_for_a_flush_that_another_one_has_started() -> Result {
        with_user_mm(|mm| {
            let range = map(mm)?;
            let first = page(range, 0)?;
            let journal = Journal::new()?;
            let mirror = flusher(b'a', &journal, range, true)?;
            let region = mirror.region(range.start()).ok_or(ENOENT)?;
            let start = |range, flags, finish: &mut _| {
                let event = event_of(mm, range, flags);
                // SAFETY: The notifier is the region's, the event is valid, and the sequence is
                // odd, as in an invalidation.
                unsafe { Region::invalidate_start(region.notifier(), &event, 1, finish) }
            };
            let blockable = bindings::MMU_NOTIFIER_RANGE_BLOCKABLE;
            let (mut finish, mut other) = (null_mut(), null_mut());

            assert!(start(first, blockable, &mut finish));
            assert!(!finish.is_null());
            assert_eq!(*journal.letters.lock(), *b"A\0\0\0\0\0\0\0");
            // There is no entry any more, but the device may still access the page.
            assert!(!start(first, 0, &mut other));
            assert_eq!(*journal.letters.lock(), *b"A\0\0\0\0\0\0\0");
            assert!(start(first, blockable, &mut other));
            assert!(other.is_null());
            assert_eq!(*journal.letters.lock(), *b"Aa\0\0\0\0\0\0");
            // Another page is another flush, for which there is no second pass.
            assert!(start(page(range, 1)?, blockable, &mut other));
            assert!(other.is_null());
            assert_eq!(*journal.letters.lock(), *b"AaAa\0\0\0\0");

            // SAFETY: The first event has stored it.
            unsafe { Region::invalidate_finish(finish) };
            assert_eq!(*journal.letters.lock(), *b"AaAaa\0\0\0");
            assert!(start(first, 0, &mut other));
            assert!(start(page(range, 2)?, blockable, &mut other));
            assert!(!other.is_null());
            // SAFETY: The last event has stored it.
            unsafe { Region::invalidate_finish(other) };
            assert_eq!(*journal.letters.lock(), *b"AaAaaAa\0");
            Ok(())
        })
    }

    #[test]
    fn what_was_started_is_waited_for_though_another_device_refuses() -> Result {
        with_user_mm(|mm| {
            let range = map(mm)?;
            let mut started = 0;
            // In one of the two orders, mm calls the device that refuses last.
            for order in [[false, true], [true, false]] {
                let journal = Journal::new()?;
                let _mirrors = [
                    flusher(b'a', &journal, range, order[0])?,
                    flusher(b'b', &journal, range, order[1])?,
                ];
                assert!(!notify(mm, range, 0));
                let letters = *journal.letters.lock();
                assert_eq!(letters[0].to_ascii_lowercase(), letters[1]);
                assert_eq!(letters[2], 0);
                started += journal.used.load(Relaxed) / 2;
            }
            assert_eq!(started, 1);
            Ok(())
        })
    }
}
