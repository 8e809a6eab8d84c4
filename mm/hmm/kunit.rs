// SPDX-License-Identifier: GPL-2.0

//! KUnit suites, one a source file of the crate.

#[cfg(CONFIG_RUST_HMM_DEVICE)]
mod device;
mod entries;
mod fault;
#[cfg(CONFIG_RUST_HMM_DEVICE)]
pub(crate) mod migrate;
mod mirror;
mod pfn;
#[cfg(CONFIG_RUST_HMM_DEVICE)]
mod pool;
mod range;
#[cfg(CONFIG_RUST_HMM_DEVICE)]
mod slots;

use super::{
    mirror::{
        Invalidate,
        InvalidateKind,
        Invalidated,
        MirrorOps, //
    },
    range::PageRange,
};
use kernel::{
    new_spinlock,
    prelude::*,
    sync::{
        Arc,
        SpinLock, //
    },
};

/// A driver that notes what it is told.
#[pin_data]
struct Recorder {
    #[pin]
    seen: SpinLock<Seen>,
}

#[derive(Default)]
struct Seen {
    count: usize,
    released: bool,
    last: Option<(PageRange, InvalidateKind)>,
}

impl Recorder {
    fn new() -> Result<Arc<Self>> {
        let init = pin_init!(Self {
            seen <- new_spinlock!(Seen::default()),
        });
        Arc::pin_init(init, GFP_KERNEL)
    }

    /// How many invalidations there were.
    fn count(&self) -> usize {
        self.seen.lock().count
    }

    /// Whether one of them was the exit of the process.
    fn released(&self) -> bool {
        self.seen.lock().released
    }

    /// The last of them.
    fn last(&self) -> Option<(PageRange, InvalidateKind)> {
        self.seen.lock().last
    }
}

impl MirrorOps for Recorder {
    fn invalidate<'op>(&self, event: Invalidate<'op>) -> Invalidated<'op> {
        let mut seen = self.seen.lock();
        seen.count += 1;
        seen.released |= event.kind() == InvalidateKind::Release;
        seen.last = Some((event.range(), event.kind()));
        event.done()
    }
}
