// SPDX-License-Identifier: GPL-2.0

//! KUnit suites, named after the source files of the crate.

mod binding;
mod callback;
#[cfg(CONFIG_RUST_HMM_DEVICE)]
mod coherent;
#[cfg(CONFIG_RUST_HMM_DEVICE)]
mod copy;
#[cfg(CONFIG_RUST_HMM_DEVICE)]
mod device;
#[cfg(CONFIG_RUST_HMM_DEVICE)]
mod device_pool;
mod dma;
mod entries;
#[cfg(CONFIG_RUST_HMM_DEVICE)]
mod exclusive;
mod fault;
#[cfg(all(CONFIG_RUST_HMM_DEVICE, CONFIG_TRANSPARENT_HUGEPAGE))]
mod large;
#[cfg(CONFIG_RUST_HMM_DEVICE)]
mod migrate;
mod mirror;
mod mirrored_mm;
mod pfn;
#[cfg(CONFIG_RUST_HMM_DEVICE)]
mod pool;
mod range;
mod region;
#[cfg(CONFIG_RUST_HMM_DEVICE)]
mod slots;
mod span;

use super::{
    range::PageRange,
    region::{
        Cause,
        Invalidate,
        Invalidated,
        MirrorOps, //
    }, //
};
use kernel::{
    bindings,
    kunit::user_mm::{
        Prot,
        UserMm, //
    },
    mm::MmWithUser,
    new_spinlock,
    page::PAGE_SIZE,
    prelude::*,
    sync::{
        Arc,
        SpinLock, //
    },
    uaccess::{
        UserPtr,
        UserSlice, //
    }, //
};

/// The null module: the suites are built into the kernel.
// SAFETY: `try_module_get()` and `module_put()` allow a null pointer.
static MODULE: ThisModule = unsafe { ThisModule::from_ptr(core::ptr::null_mut()) };

/// Maps `pages` pages, aligned to their total size. `pages` is a power of two.
fn map_aligned(mm: &UserMm, pages: usize, prot: Prot) -> Result<PageRange> {
    let len = pages * PAGE_SIZE;
    let addr = mm.mmap_anonymous(2 * len, prot)?.next_multiple_of(len);
    PageRange::from_len(addr, len)
}

/// Page `index` of `range`.
fn page(range: PageRange, index: usize) -> Result<PageRange> {
    PageRange::from_len(range.start() + index * PAGE_SIZE, PAGE_SIZE)
}

/// Unmaps the pages of `range`, but keeps the VMA.
fn zap(mm: &MmWithUser, range: PageRange) {
    let guard = mm.mmap_read_lock();
    if let Some(vma) = guard.vma_lookup(range.start()) {
        vma.zap_vma_range(range.start(), range.len());
    }
}

/// An event as for pages of `range` that are replaced.
fn event_of(mm: &UserMm, range: PageRange, flags: u32) -> bindings::mmu_notifier_range {
    bindings::mmu_notifier_range {
        mm: mm.mm().as_raw(),
        start: range.start(),
        end: range.end(),
        flags,
        event: bindings::mmu_notifier_event_MMU_NOTIFY_CLEAR,
        owner: core::ptr::null_mut(),
    }
}

/// Writes the byte at `va`, as the process does.
fn user_write(va: usize, byte: u8) -> Result {
    UserSlice::new(UserPtr::from_addr(va), 1)
        .writer()
        .write(&byte)
}

/// Reads the byte at `va`, as the process does.
fn user_read(va: usize) -> Result<u8> {
    UserSlice::new(UserPtr::from_addr(va), 1).reader().read()
}

/// A driver that records invalidations.
#[pin_data]
struct Recorder {
    #[pin]
    seen: SpinLock<Seen>,
}

#[derive(Default)]
struct Seen {
    count: usize,
    last: Option<PageRange>,
    cause: Option<Cause>,
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

    /// Why the last of them came.
    fn cause(&self) -> Option<Cause> {
        self.seen.lock().cause
    }

    /// The range of the last of them.
    fn last(&self) -> Option<PageRange> {
        self.seen.lock().last
    }
}

impl MirrorOps for Recorder {
    fn invalidate<'op>(&self, event: Invalidate<'op>) -> Invalidated<'op> {
        let mut seen = self.seen.lock();
        seen.count += 1;
        seen.last = Some(event.range());
        seen.cause = Some(event.cause());
        event.done()
    }
}
