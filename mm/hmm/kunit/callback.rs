// SPDX-License-Identifier: GPL-2.0

//! Tests of `callback.rs`: what a driver must not do while the core calls it.

use super::{
    super::{
        fault::FaultRequest,
        hmm_range::FaultBuf,
        mirror::Mirror,
        pfn::Access,
        region::{
            Invalidate,
            Invalidated,
            MirrorOps, //
        }, //
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
        Prot,
        UserMm, //
    },
    new_spinlock,
    page::PAGE_SIZE,
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc,
        SpinLock, //
    },
    time::{
        delay::fsleep,
        Delta, //
    }, //
};

/// A flag that is set when this is dropped.
struct Gone(Arc<Atomic<u32>>);

impl Drop for Gone {
    fn drop(&mut self) {
        self.0.store(1, Relaxed);
    }
}

/// A driver that uses its mirror in its callback, or drops it there.
#[pin_data]
struct Inward {
    #[pin]
    inside: SpinLock<Inside>,
    /// The ops for a mirror that the driver tries to create in its callback.
    other: Arc<Recorder>,
    /// If this is set, the driver drops its mirror.
    gone: Option<Gone>,
}

struct Inside {
    mirror: Option<Mirror>,
    buf: FaultBuf,
    results: Option<[Result; 3]>,
}

impl Inward {
    fn new(gone: Option<Gone>) -> Result<Arc<Self>> {
        let inside = Inside {
            mirror: None,
            buf: FaultBuf::new(0)?,
            results: None,
        };
        let init = pin_init!(Self {
            inside <- new_spinlock!(inside),
            other: Recorder::new()?,
            gone,
        }? Error);
        Arc::pin_init(init, GFP_KERNEL)
    }
}

impl MirrorOps for Inward {
    fn invalidate<'op>(&self, event: Invalidate<'op>) -> Invalidated<'op> {
        let mut inside = self.inside.lock();
        let inside = &mut *inside;
        if self.gone.is_some() {
            inside.mirror = None;
        } else if let Some(mirror) = &inside.mirror {
            let req = FaultRequest::new(event.range(), Access::Read);
            let missed = mirror.read(event.range().start(), &mut [0]).is_err();
            inside.results = Some([
                mirror
                    .mm()
                    .and_then(|mm| mm.fault(req, &mut inside.buf, |_| ())),
                Mirror::new(&MODULE, self.other.clone()).map(drop),
                if missed { Err(EDEADLK) } else { Ok(()) },
            ]);
        }
        event.done()
    }
}

/// Unmaps a page that is mapped for the device of a driver which has its own mirror.
fn unmap_for(mm: &UserMm, ops: Arc<Inward>) -> Result {
    let page = map_aligned(mm, 1, Prot::ReadWrite)?;
    user_write(page.start(), 7)?;
    let mirror = Mirror::new(&MODULE, ops.clone())?;
    let mut buf = FaultBuf::new(0)?;
    mirror
        .mm()?
        .fault(FaultRequest::new(page, Access::Read), &mut buf, |_| ())?;
    ops.inside.lock().mirror = Some(mirror);
    // Only the mirror has the driver now, unless the caller has.
    drop(ops);
    mm.munmap(page.start(), page.len())
}

#[kunit_tests(hmm_callback)]
mod tests {
    use super::*;

    #[test]
    fn in_the_closure_of_a_fault_every_mirror_is_edeadlk() -> Result {
        with_user_mm(|mm| {
            let pages = map_aligned(mm, 2, Prot::ReadWrite)?;
            let untouched = pages.start() + PAGE_SIZE;
            user_write(pages.start(), 7)?;
            let (own, other) = (
                Mirror::new(&MODULE, Recorder::new()?)?,
                Mirror::new(&MODULE, Recorder::new()?)?,
            );
            let (mut buf, mut inner) = (FaultBuf::new(0)?, FaultBuf::new(0)?);
            let ops = Recorder::new()?;
            let page = super::super::page(pages, 0)?;
            let req = FaultRequest::new(page, Access::Write);
            other.mm()?.fault(req, &mut inner, |_| ())?;
            let held = other.mm()?;
            let results = own.mm()?.fault(req, &mut buf, |_| {
                [
                    held.fault(req, &mut inner, |_| ()),
                    own.mm().map(drop),
                    other.mm().map(drop),
                    Mirror::new(&MODULE, ops.clone()).map(drop),
                ]
            })?;
            assert_eq!(results, [Err(EDEADLK); 4]);
            let missed = own.mm()?.fault(req, &mut buf, |_| {
                other.read(page.start(), &mut [0]).is_err()
                    && other.write(page.start(), &[8]).is_err()
            });
            assert_eq!(missed, Ok(true));
            // Page faults are disabled in the closure: they may need locks that the core holds.
            let touched = own.mm()?.fault(req, &mut buf, |_| user_read(untouched))?;
            assert_eq!(touched, Err(EFAULT));

            // After the call everything works again.
            assert!(other.read(page.start(), &mut [0]).is_ok());
            assert_eq!(other.mm()?.fault(req, &mut inner, |_| ()), Ok(()));
            assert_eq!(user_read(untouched), Ok(0));
            assert_eq!(user_read(page.start()), Ok(7));
            Ok(())
        })
    }

    #[test]
    fn in_an_invalidation_every_mirror_is_edeadlk() -> Result {
        with_user_mm(|mm| {
            let ops = Inward::new(None)?;
            unmap_for(mm, ops.clone())?;
            let results = ops.inside.lock().results.take();
            assert_eq!(results, Some([Err(EDEADLK); 3]));
            let mirror = ops.inside.lock().mirror.take();
            drop(mirror);
            Ok(())
        })
    }

    #[test]
    fn a_mirror_that_is_dropped_in_its_own_invalidation_ends() -> Result {
        with_user_mm(|mm| {
            let gone = Arc::new(Atomic::new(0), GFP_KERNEL)?;
            unmap_for(mm, Inward::new(Some(Gone(gone.clone())))?)?;
            for _ in 0..5000 {
                if gone.load(Relaxed) != 0 {
                    break;
                }
                fsleep(Delta::from_millis(1));
            }
            assert_eq!(gone.load(Relaxed), 1);
            Ok(())
        })
    }
}
