// SPDX-License-Identifier: GPL-2.0

//! Pages that only the device may access, until the CPU wants them back: what atomic operations of
//! a device need that the CPU's do not see.
//!
//! mm takes the page out of the process's page table and leaves an entry there that traps the CPU.
//! Whatever ends it is an invalidation like any other: the CPU's touch, `mprotect()`, `fork()`.
//! The one event that must not count as one is that with which it begins.
//!
//! C source: `make_device_exclusive()` in [`mm/rmap.c`](srctree/mm/rmap.c)

use super::{
    fault::{
        populate,
        vma_at,
        vma_for,
        Deadline,
        FaultBuf,
        DEFAULT_TIMEOUT_MS, //
    },
    mirror::{
        Mirror,
        Region, //
    },
    pfn::{
        Access,
        Pfn, //
    },
    range::PageRange,
};
use core::{
    marker::PhantomData,
    ptr::{
        null_mut,
        NonNull, //
    }, //
};
use kernel::{
    bindings,
    error::from_err_ptr,
    mm::MmWithUser,
    prelude::*, //
};

/// Proof that the page at [`ExclusivePage::va`] may be mapped for the device to read, write and
/// operate on atomically: no CPU has it mapped.
#[derive(Debug)]
pub struct ExclusivePage<'c> {
    va: usize,
    _commit: PhantomData<&'c ()>,
}

impl ExclusivePage<'_> {
    /// The address of the page.
    #[inline]
    pub fn va(&self) -> usize {
        self.va
    }
}

/// A folio with a page that was made exclusive. While it is locked the CPU does not get it back.
///
/// # Invariants
///
/// The folio is locked, and there is a reference to it.
struct LockedFolio(NonNull<bindings::folio>);

impl Drop for LockedFolio {
    fn drop(&mut self) {
        // SAFETY: By the type invariants.
        unsafe { bindings::folio_unlock(self.0.as_ptr()) };
        // SAFETY: By the type invariants; this gives the reference up.
        unsafe { bindings::folio_put(self.0.as_ptr()) };
    }
}

impl Mirror {
    /// Makes the page of `va` exclusive to the device and calls `f` with the proof, once; returns
    /// what it returns.
    ///
    /// From then on the CPU waits when it touches the page, until
    /// [`MirrorOps::invalidate`](super::MirrorOps::invalidate) has been called for it. Who had a
    /// reference to the page before (O_DIRECT, say) still has it.
    ///
    /// # Context
    ///
    /// As for [`Mirror::fault`], but `f` runs with `mmap_lock` and the page's lock held too.
    ///
    /// # Errors
    ///
    /// - [`EPERM`] if the current task's address space is another, or if the process may not write
    ///   the page.
    /// - [`EFAULT`] if there is no memory that the process may read.
    /// - [`EOPNOTSUPP`] if the page is one of a file, of shared memory or of hugetlbfs.
    /// - [`EINTR`] if the task received a fatal signal.
    /// - [`EBUSY`] if invalidations kept colliding.
    /// - [`ENOMEM`] if memory for the page, or for the region, is not to be had.
    #[inline]
    pub fn make_exclusive<R>(
        &self,
        va: usize,
        buf: &mut FaultBuf,
        f: impl FnOnce(&ExclusivePage<'_>) -> R,
    ) -> Result<R> {
        let mut f = Some(f);
        let mut result = None;
        mirror_make_exclusive(self, va, buf, &mut |page| {
            result = f.take().map(|f| f(page));
        })?;
        // It succeeds only after it has called the closure.
        result.ok_or(EIO)
    }
}

#[inline(never)]
#[export_name = "hmm_mirror_make_exclusive"]
fn mirror_make_exclusive(
    mirror: &Mirror,
    va: usize,
    buf: &mut FaultBuf,
    f: &mut dyn FnMut(&ExclusivePage<'_>),
) -> Result {
    // Only the last page of all can make this fail, which is not the process's.
    let page = PageRange::containing(va, 1).map_err(|_| EFAULT)?;
    let current = kernel::current!();
    let mm = mirror.current_mm(current.mm())?;
    // Before a region is made: an address where nothing is mapped leaves nothing behind.
    vma_at(mm, page.start(), Access::Write)?;
    let region = mirror.region_or_insert(mm, page.start())?;

    let mut deadline = Deadline::new(DEFAULT_TIMEOUT_MS);
    buf.retries = 0;
    loop {
        buf.bring_leaf()?;
        // Make the page writable first, migrate it to system memory if it is a device's, and end
        // the exclusive access of others: all of this would collide with the sequence later.
        let populated = populate(
            mm,
            &region,
            page,
            Access::Write,
            null_mut(),
            &mut deadline,
            &mut buf.pfns,
        );
        match populated {
            Ok(seq) => {
                if make_exclusive(mm, &region, page, seq, buf, f)? {
                    return Ok(());
                }
            }
            // One long invalidation may have taken all of the time: `retry()` decides.
            Err(err) if err == EBUSY => {}
            Err(err) => return Err(err),
        }
        deadline.retry(buf)?;
    }
}

/// Makes `page` exclusive, of which `buf` has a report with the sequence `seq`, and calls `f`. Does
/// not, and returns `false`, if an invalidation has collided.
fn make_exclusive(
    mm: &MmWithUser,
    region: &Region,
    page: PageRange,
    seq: usize,
    buf: &mut FaultBuf,
    f: &mut dyn FnMut(&ExclusivePage<'_>),
) -> Result<bool> {
    let guard = mm.mmap_read_lock_killable()?;
    vma_for(&guard, page.start(), Access::Write)?;
    let mut folio = null_mut();
    // SAFETY: The mm has users, and mmap_lock is held.
    let made = from_err_ptr(unsafe {
        bindings::make_device_exclusive(mm.as_raw(), page.start(), region.as_owner(), &mut folio)
    });
    // INVARIANT: It was locked and given a reference, unless there is an error.
    let locked = made.map(|_| NonNull::new(folio).map(LockedFolio));

    // The page is locked: no CPU has taken it back. What else may have taken it away has collided.
    let Some(mut entries) = region.lock_unless_stale(seq)? else {
        return Ok(false);
    };
    let locked = locked?;
    let pfn = buf.pfns.first().map(|&raw| Pfn::from_output(raw));
    // SAFETY: The page was reported with `seq`, and nothing but what made it exclusive has happened
    // to it since: the region's lock is held for write. It is anonymous, so none of a pool (these
    // came home), and in the direct map.
    unsafe { entries.install(page, pfn.into_iter(), &mut buf.spare) }?;
    f(&ExclusivePage {
        va: page.start(),
        _commit: PhantomData,
    });
    drop(entries);
    drop(locked);
    drop(guard);
    Ok(true)
}
