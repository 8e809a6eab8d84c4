// SPDX-License-Identifier: GPL-2.0

//! New folios: the destinations of a migration, until it gives them to mm.

use super::slots::Node;
use core::ptr::NonNull;
use kernel::{
    bindings,
    mm::virt::VmaRef, //
};

/// What the allocation of a folio of system memory may cost.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Effort {
    /// Not much: the caller has an alternative.
    Try,
    /// Reclaim, but no OOM kill: a driver asked for the migration.
    Reclaim,
    /// What a page fault may cost, an OOM kill included: a CPU waits for the page.
    Fault,
    /// Anything. The allocation does not fail, since data would be lost.
    NoFail,
}

impl Effort {
    fn gfp(self) -> bindings::gfp_t {
        // No __GFP_ZERO: the folio is mapped only if all of it was written.
        bindings::GFP_HIGHUSER_MOVABLE
            | match self {
                Self::Try => bindings::__GFP_NORETRY | bindings::__GFP_NOWARN,
                Self::Reclaim => bindings::__GFP_RETRY_MAYFAIL | bindings::__GFP_NOWARN,
                Self::Fault => 0,
                Self::NoFail => bindings::__GFP_NOFAIL,
            }
    }
}

/// A new folio of one page: locked, with one reference. Freed if it is dropped.
///
/// # Invariants
///
/// As above, and it is mapped nowhere. Somebody who looks for pages to evict may have a reference
/// for a moment.
pub(crate) struct NewFolio(NonNull<bindings::folio>);

impl NewFolio {
    /// # Safety
    ///
    /// `folio` is as the type invariants say.
    pub(crate) unsafe fn new(folio: NonNull<bindings::folio>) -> Self {
        // INVARIANT: By the safety requirements.
        Self(folio)
    }

    /// A folio of RAM, for `vma` at `va` if there is one, else from `node` if there is room.
    pub(crate) fn alloc(effort: Effort, vma: Option<(&VmaRef, usize)>, node: Node) -> Option<Self> {
        #[cfg(CONFIG_RUST_HMM_KUNIT_TEST)]
        if kernel::kunit::in_kunit_test() && !tests::allowed() {
            return None;
        }

        let gfp = effort.gfp();
        let folio = match vma {
            // SAFETY: The VMA is valid, and `va` lies in it.
            Some((vma, va)) => unsafe { bindings::vma_alloc_folio(gfp, 0, vma.as_ptr(), va) },
            // It was there before, by the policy of its process. The current task may be another's.
            //
            // SAFETY: Safe to call with a node that memory came from.
            None => unsafe { bindings::__folio_alloc_node(gfp, 0, node.nid()) },
        };
        let folio = NonNull::new(folio)?;
        // SAFETY: The folio is valid and nobody else's: this does not wait.
        unsafe { bindings::folio_lock(folio.as_ptr()) };
        // INVARIANT: Just allocated and locked.
        Some(Self(folio))
    }

    /// Its page.
    pub(crate) fn page(&self) -> *mut bindings::page {
        // The first page of a folio is at its address.
        self.0.as_ptr().cast()
    }

    /// Gives the folio to an array of destinations.
    pub(crate) fn into_mpfn(self) -> usize {
        // SAFETY: The page is valid.
        let mpfn = unsafe { bindings::migrate_pfn(bindings::page_to_pfn(self.page())) };
        core::mem::forget(self);
        mpfn
    }

    /// Takes the folio back from an array of destinations, if there is one.
    ///
    /// # Safety
    ///
    /// `mpfn` is zero, or from [`NewFolio::into_mpfn`] and used no more.
    pub(crate) unsafe fn from_mpfn(mpfn: usize) -> Option<Self> {
        // SAFETY: By the caller's promise.
        let page = unsafe { bindings::migrate_pfn_to_page(mpfn) };
        // INVARIANT: By the caller's promise.
        NonNull::new(page.cast()).map(Self)
    }
}

impl Drop for NewFolio {
    fn drop(&mut self) {
        // SAFETY: By the type invariants the folio is locked.
        unsafe { bindings::folio_unlock(self.0.as_ptr()) };
        // SAFETY: By the type invariants there is a reference, which is given up.
        unsafe { bindings::folio_put(self.0.as_ptr()) };
    }
}

/// Lets the KUnit suites fail allocations.
#[cfg(CONFIG_RUST_HMM_KUNIT_TEST)]
pub(crate) mod tests {
    use kernel::sync::atomic::{
        Atomic,
        Relaxed, //
    };

    /// How many allocations succeed before all fail.
    pub(crate) static ALLOWED: Atomic<usize> = Atomic::new(usize::MAX);

    /// Whether an allocation may succeed, which is counted.
    pub(super) fn allowed() -> bool {
        let left = ALLOWED.load(Relaxed);
        if left != usize::MAX && left != 0 {
            ALLOWED.store(left - 1, Relaxed);
        }
        left != 0
    }
}
