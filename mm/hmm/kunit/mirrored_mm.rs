// SPDX-License-Identifier: GPL-2.0

//! Tests of `mirrored_mm.rs`.
//!
//! Work items act for a process here. They cannot use KUnit's assertions, since they do not run in
//! the task of the test: they return errors.

use super::{
    super::{
        commit::Commit,
        fault::FaultRequest,
        hmm_range::FaultBuf,
        mirror::Mirror,
        mirrored_mm::MirroredMm,
        pfn::Access,
        range::PageRange, //
    },
    map_aligned,
    page,
    user_read,
    user_write,
    zap,
    Recorder,
    MODULE, //
};
use kernel::{
    kunit::user_mm::{
        with_user_mm,
        Prot, //
    },
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc,
        Completion, //
    },
    time::{
        delay::fsleep,
        Delta, //
    },
    workqueue::system_dfl, //
};

const PAGES: usize = 4;

/// A failed expectation in a work item.
fn expect(holds: bool) -> Result {
    holds.then_some(()).ok_or(EILSEQ)
}

/// How far a work item is.
#[pin_data]
struct Progress {
    #[pin]
    holds: Completion,
    #[pin]
    go_on: Completion,
    #[pin]
    done: Completion,
    errno: Atomic<i32>,
}

impl Progress {
    fn new() -> Result<Arc<Self>> {
        let init = pin_init!(Self {
            holds <- Completion::new(),
            go_on <- Completion::new(),
            done <- Completion::new(),
            errno: Atomic::new(0),
        });
        Arc::pin_init(init, GFP_KERNEL)
    }

    /// Waits for the end of the work item and returns its result.
    fn result(&self) -> Result {
        self.done.wait_for_completion();
        match self.errno.load(Relaxed) {
            0 => Ok(()),
            errno => Err(Error::from_errno(errno)),
        }
    }
}

/// Lets a work item call `f` with the address space of `mirror`.
fn spawn<F>(mirror: &Arc<Mirror>, f: F) -> Result<Arc<Progress>>
where
    F: FnOnce(&MirroredMm<'_>, &Progress) -> Result + Send + 'static,
{
    let progress = Progress::new()?;
    let (theirs, mirror) = (progress.clone(), mirror.clone());
    system_dfl().try_spawn(GFP_KERNEL, move || {
        let result = mirror.mm().and_then(|mm| f(&mm, &theirs));
        theirs
            .errno
            .store(result.err().map_or(0, |err| err.to_errno()), Relaxed);
        // Whatever has failed, nobody waits for it.
        theirs.holds.complete_all();
        theirs.done.complete_all();
    })?;
    Ok(progress)
}

/// A process with `PAGES` pages ends while a work item holds its address space, twice. The work
/// item calls `f` then.
fn after_exit<F>(f: F) -> Result<(Arc<Mirror>, Arc<Recorder>)>
where
    F: FnOnce(&MirroredMm<'_>, PageRange) -> Result + Send + 'static,
{
    let ops = Recorder::new()?;
    let recorder = ops.clone();
    let (mirror, progress) = with_user_mm(move |mm| {
        let range = map_aligned(mm, PAGES, Prot::ReadWrite)?;
        user_write(range.start(), 7)?;
        let mirror = Arc::new(Mirror::new(&MODULE, recorder)?, GFP_KERNEL)?;
        let progress = spawn(&mirror, move |mm, progress| {
            let _again = mm.mirror().mm()?;
            expect(!mm.is_abandoned())?;
            progress.holds.complete_all();
            progress.go_on.wait_for_completion();
            f(mm, range)
        })?;
        progress.holds.wait_for_completion();
        Ok((mirror, progress))
    })?;
    progress.go_on.complete_all();
    progress.result()?;
    Ok((mirror, ops))
}

#[kunit_tests(hmm_mirrored_mm)]
mod tests {
    use super::*;

    #[test]
    fn a_work_item_faults_for_the_process() -> Result {
        with_user_mm(|mm| {
            let range = map_aligned(mm, PAGES, Prot::ReadWrite)?;
            user_write(page(range, 1)?.start(), 41)?;
            let mirror = Arc::new(Mirror::new(&MODULE, Recorder::new()?)?, GFP_KERNEL)?;
            assert!(!mirror.mm()?.is_foreign());
            let progress = spawn(&mirror, move |mm, _| {
                expect(mm.is_foreign() && !mm.is_abandoned())?;
                let req = FaultRequest::new(range, Access::Write);
                mm.fault(req, &mut FaultBuf::new(2)?, |_| ())
            })?;
            progress.result()?;
            let mut byte = [0];
            assert!(mirror.read(page(range, 1)?.start(), &mut byte).is_ok());
            assert!(mirror.write(range.start(), &[byte[0] + 1]).is_ok());
            assert_eq!(user_read(range.start()), Ok(42));
            Ok(())
        })
    }

    #[test]
    fn two_work_items_fault_the_same_pages() -> Result {
        with_user_mm(|mm| {
            let range = map_aligned(mm, PAGES, Prot::ReadWrite)?;
            let mirror = Arc::new(Mirror::new(&MODULE, Recorder::new()?)?, GFP_KERNEL)?;
            let fault = move |mm: &MirroredMm<'_>, _: &Progress| {
                let mut buf = FaultBuf::new(2)?;
                for _ in 0..100 {
                    mm.fault(FaultRequest::new(range, Access::Write), &mut buf, |_| ())?;
                }
                Ok(())
            };
            let both = [spawn(&mirror, fault)?, spawn(&mirror, fault)?];
            for progress in both {
                progress.result()?;
            }
            assert!(mirror.write(range.start(), &[1]).is_ok());
            Ok(())
        })
    }

    #[test]
    fn the_address_space_stays_while_it_is_held() -> Result {
        let (mirror, ops) = after_exit(|mm, range| {
            expect(mm.is_abandoned())?;
            let req = FaultRequest::new(range, Access::Write);
            mm.fault(req, &mut FaultBuf::new(2)?, |_| ())?;
            let mut byte = [0];
            let read = mm.mirror().read(range.start(), &mut byte);
            expect(read.is_ok() && byte[0] == 7)
        })?;
        // The last user has it torn down by a work item.
        for _ in 0..1000 {
            if ops.count() > 0 {
                break;
            }
            fsleep(Delta::from_millis(1));
        }
        assert!(ops.count() > 0);
        assert_eq!(mirror.mm().err(), Some(ESRCH));
        Ok(())
    }

    #[test]
    fn retries_end_with_the_process() -> Result {
        after_exit(|mm, range| {
            let req = FaultRequest::new(range, Access::Write);
            let mut buf = FaultBuf::new(2)?;
            let result = mm.fault_loop(&req, &mut buf, &mut |_: &Commit<'_>| (), |_| {
                zap(mm.as_mm(), range)
            });
            expect(result == Err(ESRCH) && buf.retries() == 1)
        })
        .map(drop)
    }

    #[test]
    fn no_other_task_gets_hold_of_it_then() -> Result {
        after_exit(|mm, _| {
            expect(mm.is_abandoned())?;
            expect(mm.mirror().mm().err() == Some(ESRCH))?;
            // The task that has failed holds it no more.
            expect(mm.is_abandoned())
        })
        .map(drop)
    }
}
