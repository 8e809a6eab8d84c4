// SPDX-License-Identifier: GPL-2.0

//! What a device may access of a VMA. Mirrors `check_vma_flags()` in `mm/gup.c`.

use super::{
    mirrored_mm::MirroredMm,
    pfn::Access,
    range::PageRange, //
};
use kernel::{
    bindings,
    mm::{
        virt::{
            flags,
            VmaRef, //
        },
        MmapReadGuard, //
    },
    prelude::*, //
};

/// Returns how a device may access the memory of `vma`, or `None` if it may not. `foreign` says
/// whether the current task does not run in the address space.
///
/// Mirrors `check_vma_flags()` in `mm/gup.c` with no flag but possibly `FOLL_WRITE`, and
/// `FOLL_REMOTE` if `foreign`. Documentation/mm/hmm-rust.rst compares the two line by line.
fn allowed_access(vma: &VmaRef, foreign: bool) -> Option<Access> {
    // SAFETY: `vma` is a reference to a valid VMA.
    let is_secret = unsafe { bindings::vma_is_secretmem(vma.as_ptr()) };
    // SAFETY: `vma` is a reference to a valid VMA. The arguments say that the access is not an
    // instruction fetch, and whether it is one of the current task to its own memory.
    let permits =
        |write| unsafe { bindings::arch_vma_access_permitted(vma.as_ptr(), write, false, foreign) };
    let has = |flag| vma.flags() & flag != 0;

    if has(flags::IO | flags::PFNMAP) || is_secret || !has(flags::READ) || !permits(false) {
        return None;
    }
    match has(flags::WRITE) && !has(bindings::VM_SHADOW_STACK) && permits(true) {
        true => Some(Access::Write),
        false => Some(Access::Read),
    }
}

/// Looks up the VMA that contains `va`, checks that it allows `access`, and returns its bounds.
///
/// The guard must hold the `mmap_lock` of `mm`.
///
/// # Errors
///
/// [`EFAULT`] if there is no such VMA, or if it may not be read; [`EPERM`] if it may not be
/// written.
pub(crate) fn vma_for(
    guard: &MmapReadGuard<'_>,
    mm: &MirroredMm<'_>,
    va: usize,
    access: Access,
) -> Result<PageRange> {
    let vma = guard.vma_lookup(va).ok_or(EFAULT)?;
    match (allowed_access(vma, mm.is_foreign()).ok_or(EFAULT)?, access) {
        (Access::Read, Access::Write) => Err(EPERM),
        _ => PageRange::new(vma.start(), vma.end()),
    }
}

/// Finds the first VMA that overlaps `range`. Returns its bounds, and how a device may access it.
///
/// The guard must hold the `mmap_lock` of `mm`.
pub(crate) fn next_vma(
    _guard: &MmapReadGuard<'_>,
    mm: &MirroredMm<'_>,
    range: PageRange,
) -> Option<(PageRange, Option<Access>)> {
    // SAFETY: `mm` is valid, and the guard holds its mmap_lock.
    let vma = unsafe { bindings::find_vma(mm.as_mm().as_raw(), range.start()) };
    if vma.is_null() {
        return None;
    }
    // SAFETY: find_vma() has returned a VMA, which stays valid while mmap_lock is held.
    let vma = unsafe { VmaRef::from_raw(vma) };
    let bounds = PageRange::new(vma.start(), vma.end()).ok()?;
    bounds.intersect(&range)?;
    Some((bounds, allowed_access(vma, mm.is_foreign())))
}
