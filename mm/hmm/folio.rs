// SPDX-License-Identifier: GPL-2.0

//! New folios, the destinations of a migration, before the migration passes them to mm.

use super::slots::{
    Node,
    Order, //
};
use core::ptr::NonNull;
use kernel::{
    bindings,
    mm::virt::VmaRef,
    prelude::*, //
};

/// How hard the allocation of a folio of system memory tries.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Effort {
    /// `__GFP_NORETRY`: the caller can do without the folio.
    Try,
    /// `__GFP_RETRY_MAYFAIL`: reclaim, but no OOM kill, since a driver asked for the migration.
    Reclaim,
    /// As a page fault allocates, including an OOM kill: a CPU waits for the page.
    Fault,
    /// `__GFP_NOFAIL`: data of a process would be lost if the allocation failed.
    NoFail,
}

impl Effort {
    fn gfp(self, order: Order) -> bindings::gfp_t {
        if order.is_large() {
            // Without it the caller moves small pages.
            return bindings::GFP_TRANSHUGE_LIGHT;
        }
        // No __GFP_ZERO: the folio is mapped only if the driver has written all of it.
        bindings::GFP_HIGHUSER_MOVABLE
            | match self {
                Self::Try => bindings::__GFP_NORETRY | bindings::__GFP_NOWARN,
                Self::Reclaim => bindings::__GFP_RETRY_MAYFAIL | bindings::__GFP_NOWARN,
                Self::Fault => 0,
                Self::NoFail => bindings::__GFP_NOFAIL,
            }
    }
}

/// A new folio, in system memory or in a pool. Dropping it frees the folio.
///
/// # Invariants
///
/// The folio has the order that this says, is locked and is not mapped. This owns one reference to
/// the folio. `migrate_device_pfns()`, called for an eviction, may briefly hold another.
pub(crate) struct NewFolio(NonNull<bindings::folio>, Order);

impl NewFolio {
    /// Takes over the caller's lock of `folio` and one reference to it.
    ///
    /// # Safety
    ///
    /// `folio` must satisfy the type invariants.
    pub(crate) unsafe fn new(folio: NonNull<bindings::folio>, order: Order) -> Self {
        // INVARIANT: The caller ensures that `folio` satisfies them (see the # Safety section).
        Self(folio, order)
    }

    /// Allocates a folio of system memory. Sleeps.
    ///
    /// `vma` is the VMA that will map the folio and the address in it, if they are known: then the
    /// memory policy of the VMA chooses the NUMA node. Otherwise the folio comes from `node`, or
    /// from another node if `node` has no free memory.
    pub(crate) fn alloc(
        effort: Effort,
        order: Order,
        vma: Option<(&VmaRef, usize)>,
        node: Node,
    ) -> Option<Self> {
        let gfp = effort.gfp(order);
        let folio = match vma {
            // SAFETY: The VMA is valid since `vma` is a reference to it, and `va` is an address in
            // it.
            Some((vma, va)) => unsafe {
                bindings::vma_alloc_folio(gfp, order.get() as c_int, vma.as_ptr(), va)
            },
            // The memory policy of the current task does not apply, since the task may belong to
            // another process. The page was on `node` before, by the policy of its own process.
            //
            // SAFETY: `node` is valid: `page_to_nid()` or `numa_mem_id()` returned it when the page
            // migrated to the device.
            None => unsafe { bindings::__folio_alloc_node(gfp, order.get(), node.nid()) },
        };
        let folio = NonNull::new(folio)?;
        // SAFETY: The folio was allocated just now, so it is valid. Nobody else has locked it, so
        // this does not wait.
        unsafe { bindings::folio_lock(folio.as_ptr()) };
        // INVARIANT: The folio was allocated just now, with this order and one reference, and
        // locked above. Nobody has mapped it.
        Some(Self(folio, order))
    }

    /// The page of the folio.
    pub(crate) fn page(&self) -> *mut bindings::page {
        // `struct folio` begins with its first page.
        self.0.as_ptr().cast()
    }

    /// Turns the folio into an element of the array of destinations of a migration.
    pub(crate) fn into_mpfn(self) -> usize {
        // SAFETY: The page is valid, since this owns a reference to its folio (see the type
        // invariants).
        let mpfn = unsafe { bindings::migrate_pfn(bindings::page_to_pfn(self.page())) };
        let large = match self.1.is_large() {
            true => bindings::MIGRATE_PFN_COMPOUND as usize,
            false => 0,
        };
        core::mem::forget(self);
        mpfn | large
    }

    /// Takes a folio back from the array of destinations of a migration. Returns `None` if the
    /// element is zero.
    ///
    /// # Safety
    ///
    /// `mpfn` must be zero, or come from [`NewFolio::into_mpfn`] and not be used afterwards.
    pub(crate) unsafe fn from_mpfn(mpfn: usize) -> Option<Self> {
        // SAFETY: The caller passes zero, for which this returns null, or what `migrate_pfn()` made
        // of the pfn of a valid page in `into_mpfn()` (see the # Safety section).
        let page = unsafe { bindings::migrate_pfn_to_page(mpfn) };
        // INVARIANT: `into_mpfn()` gave up a folio that satisfied the invariants, and the caller
        // does not use `mpfn` afterwards.
        let order = match mpfn & bindings::MIGRATE_PFN_COMPOUND as usize {
            0 => Order::PAGE,
            _ => Order::MAX,
        };
        NonNull::new(page.cast()).map(|folio| Self(folio, order))
    }
}

impl Drop for NewFolio {
    fn drop(&mut self) {
        // SAFETY: The folio is locked (see the type invariants).
        unsafe { bindings::folio_unlock(self.0.as_ptr()) };
        // SAFETY: This owns a reference to the folio (see the type invariants) and gives it up.
        unsafe { bindings::folio_put(self.0.as_ptr()) };
    }
}
