// SPDX-License-Identifier: GPL-2.0

//! CPU faults on pages in a device's memory: the callback `migrate_to_ram()` of `dev_pagemap_ops`.
//!
//! C header: [`include/linux/memremap.h`](srctree/include/linux/memremap.h)

use super::{
    copy::PageCopy,
    folio::Effort,
    migrate_vma::{
        drain,
        Arrays,
        Collected,
        LargeArrays,
        ToRam,
        BATCH, //
    },
    pool::pool_of,
    pool_ops::MigrateReason,
    range::PageRange,
    slots::Order, //
};
use kernel::{
    bindings,
    mm::virt::VmaRef,
    page::PAGE_SHIFT,
    prelude::*,
    time::{
        delay::fsleep,
        Delta, //
    }, //
};

/// A CPU fault on a page also migrates the other pages of the aligned block of this order around
/// it.
const CPU_FAULT_ORDER: u32 = 4;

kernel::static_assert!(1 << CPU_FAULT_ORDER <= BATCH);

/// The result of a CPU fault.
enum Touched {
    /// The page has moved to system memory, or the process does not have it there any more. The CPU
    /// can try again.
    Done,
    /// Somebody has a reference to the page, so it could not move.
    Held,
}

/// Called by mm when the CPU faults on a page of a device.
///
/// # Safety
///
/// `vmf` is valid. Its page is of a chunk, locked and referenced, and mapped at its address.
/// `mmap_lock` is held for read.
pub(crate) unsafe extern "C" fn migrate_to_ram(
    vmf: *mut bindings::vm_fault,
) -> bindings::vm_fault_t {
    // SAFETY: The caller passes a valid `vmf` (see the # Safety section). Its VMA is valid since
    // the caller holds mmap_lock.
    let (page, vma, va, has_pte) = unsafe {
        let at = (*vmf).__bindgen_anon_1;
        let has_pte = !(*vmf).pte.is_null();
        ((*vmf).page, VmaRef::from_raw(at.vma), at.address, has_pte)
    };
    // SAFETY: The caller holds mmap_lock, and a lock and a reference on the page, which is of a
    // chunk (see the # Safety section).
    let touched = unsafe {
        match has_pte {
            true => cpu_fault(vma, va, page, page),
            false => large_cpu_fault(vma, va, page),
        }
    };
    match touched {
        Ok(Touched::Done) => 0,
        // SAFETY: The caller passes a valid `vmf` and holds mmap_lock (see the # Safety section).
        // Neither is used here after this.
        Ok(Touched::Held) => unsafe { retry_after(vmf, drain) },
        // mm handles the OOM condition, and the CPU faults again.
        Err(err) if err == ENOMEM => bindings::vm_fault_reason_VM_FAULT_OOM,
        // SAFETY: The caller passes a valid `vmf` and holds mmap_lock (see the # Safety section).
        // Neither is used here after this.
        Err(err) if err == EAGAIN => unsafe { retry_after(vmf, || fsleep(PAUSE)) },
        Err(_) => bindings::vm_fault_reason_VM_FAULT_SIGBUS,
    }
}

/// The pause before the CPU faults again on a page whose copy failed with an error that asks to try
/// again.
const PAUSE: Delta = Delta::from_millis(1);

/// Lets the CPU fault again. If the fault may release `mmap_lock` to wait, releases it and calls
/// `wait` before that.
///
/// # Safety
///
/// `vmf` is valid and `mmap_lock` is held for read. The caller does not rely on either after this.
unsafe fn retry_after(vmf: *mut bindings::vm_fault, wait: impl FnOnce()) -> bindings::vm_fault_t {
    // SAFETY: The caller passes a valid `vmf` (see the # Safety section). Its VMA is valid since
    // the caller holds mmap_lock.
    let (flags, mm) = unsafe { ((*vmf).flags, (*(*vmf).__bindgen_anon_1.vma).vm_mm) };
    let no_wait = bindings::fault_flag_FAULT_FLAG_RETRY_NOWAIT;
    if flags & bindings::fault_flag_FAULT_FLAG_ALLOW_RETRY == 0 {
        return 0;
    }
    // The lock stays held in this case, as in __folio_lock_or_retry().
    if flags & no_wait != 0 {
        return bindings::vm_fault_reason_VM_FAULT_RETRY;
    }
    // SAFETY: The caller holds mmap_lock for read (see the # Safety section).
    // FAULT_FLAG_ALLOW_RETRY allows releasing it, and VM_FAULT_RETRY tells mm so, as in
    // release_fault_lock().
    unsafe { bindings::mmap_read_unlock(mm) };
    wait();
    bindings::vm_fault_reason_VM_FAULT_RETRY
}

/// Serves a CPU fault on a large folio that is mapped by a PMD.
///
/// A process that begins at the start of the folio is likely to go on to its end, so all of it
/// migrates, if there is a large folio of system memory. Otherwise the folio is split, and only the
/// pages around the touched one migrate.
///
/// # Safety
///
/// As for [`cpu_fault`], and `page` is the first one of the folio.
unsafe fn large_cpu_fault(vma: &VmaRef, va: usize, page: *mut bindings::page) -> Result<Touched> {
    let block = PageRange::aligned_block(va, Order::MAX.get())?;
    if block.start() == va {
        // SAFETY: The caller ensures the conditions (see the # Safety section).
        let touched = unsafe { whole_cpu_fault(vma, block, page) };
        if touched.is_ok() {
            return touched;
        }
    }
    // The collection may have split it already, if the process has given up a part meanwhile.
    //
    // SAFETY: The folio is locked, and the caller has a reference to it (see the # Safety section).
    let is_held = unsafe {
        let folio = page.cast();
        bindings::folio_test_large(folio) && bindings::split_folio(folio) != 0
    };
    if is_held {
        return Ok(Touched::Held);
    }
    let touched = page.wrapping_add((va - block.start()) >> PAGE_SHIFT);
    // SAFETY: The caller ensures the conditions (see the # Safety section). The PMD has mapped the
    // folio at `block`.
    unsafe { cpu_fault(vma, va, page, touched) }
}

/// Migrates the large folio at `block` to a large folio of system memory.
///
/// # Safety
///
/// As for [`large_cpu_fault`].
unsafe fn whole_cpu_fault(
    vma: &VmaRef,
    block: PageRange,
    page: *mut bindings::page,
) -> Result<Touched> {
    // SAFETY: The page is of a chunk and the caller holds a reference to it (see the # Safety
    // section).
    let pool = unsafe { pool_of(page) };
    let mut arrays = LargeArrays::new(Order::MAX)?;
    let arrays = arrays.get();
    // SAFETY: The caller holds mmap_lock and a lock and a reference on the page, which is of `pool`
    // (see the # Safety section).
    let collected = unsafe { Collected::<ToRam>::at(pool, vma, block, Order::MAX, page, arrays) }?;
    let committed = collected
        .copy(Effort::Try, Some(0))?
        .commit(MigrateReason::CpuFault);
    Ok(match committed.has_moved(0) {
        true => Touched::Done,
        false => Touched::Held,
    })
}

/// Migrates the page at `va` to system memory, and the pages around it as far as they can move.
///
/// # Safety
///
/// `page` is of a chunk, locked and referenced; `mmap_lock` is held. `touched` is the page that was
/// mapped at `va`, of the same chunk.
unsafe fn cpu_fault(
    vma: &VmaRef,
    va: usize,
    page: *mut bindings::page,
    touched: *mut bindings::page,
) -> Result<Touched> {
    // SAFETY: The page is of a chunk and the caller holds a reference to it (see the # Safety
    // section).
    let pool = unsafe { pool_of(page) };
    let range = PageRange::aligned_block(va, CPU_FAULT_ORDER)?
        .intersect(&PageRange::new(vma.start(), vma.end())?)
        .ok_or(EFAULT)?;
    let (mut src, mut dst) = ([0; BATCH], [0; BATCH]);
    let mut copies = [PageCopy::NONE; BATCH];
    let arrays = Arrays {
        src: &mut src,
        dst: &mut dst,
        copies: &mut copies,
    };
    let need = range.index_of(va);
    // SAFETY: The caller holds mmap_lock and a lock and a reference on the page, which is of `pool`
    // (see the # Safety section).
    let collected = unsafe { Collected::<ToRam>::at(pool, vma, range, Order::PAGE, page, arrays) }?;
    // This is also true for a hole, where the process has dropped the page meanwhile. For a page
    // that could not be collected, mm has cleared the flag.
    let gone = need.is_some_and(|need| collected.migrates(need));
    let committed = collected
        .copy(Effort::Try, need)?
        .commit(MigrateReason::CpuFault);
    let came = need.is_some_and(|need| committed.has_moved(need));
    drop(committed);
    // SAFETY: The page has a `struct page`, since the caller holds a reference to a page of its
    // chunk (see the # Safety section).
    let mapped = unsafe { bindings::folio_mapped(bindings::page_folio(touched)) };
    Ok(match came || gone || !mapped {
        true => Touched::Done,
        false => Touched::Held,
    })
}
