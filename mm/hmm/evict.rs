// SPDX-License-Identifier: GPL-2.0

//! Eviction: migrates pages of a device's memory back to system memory, to make room, on request,
//! and at the end of a pool.

use super::{
    copy::PageCopy,
    folio::Effort,
    migrate_vma::{
        drain,
        Arrays,
        Collected,
        LargeArrays,
        BATCH, //
    },
    pool::{
        Pool,
        Reservation, //
    },
    pool_ops::MigrateReason,
    slots::Order, //
};
use kernel::{
    bindings,
    prelude::*,
    sync::Arc,
    time::{
        delay::fsleep,
        Delta,
        Instant,
        Monotonic, //
    }, //
};

kernel::declare_trace! {
    /// # Safety
    ///
    /// Always safe to call.
    unsafe fn hmm_pool_full(wanted: c_ulong);
}

/// Migrates those of the device's pages `pfns` that can move to system memory, allocated with
/// `effort`. Returns the number of pages that moved.
///
/// # Errors
///
/// [`ENOMEM`] and those of the driver, if no page moved for this reason.
///
/// # Safety
///
/// The pfns are of chunks of `pool`, which are not freed meanwhile. There are at most [`BATCH`].
pub(crate) unsafe fn evict_pfns(pool: &Pool, pfns: &mut [usize], effort: Effort) -> Result<usize> {
    let pages = pfns.len();
    let (mut dst, mut copies) = ([0; BATCH], [PageCopy::NONE; BATCH]);
    let arrays = Arrays {
        src: pfns,
        dst: &mut dst,
        copies: &mut copies,
    };
    // SAFETY: The pfns are of chunks of `pool`, which are not freed meanwhile (see the # Safety
    // section).
    let collected = unsafe { Collected::pfns(pool, arrays, pages) };
    let committed = collected.copy(effort, None)?.commit(MigrateReason::Evict);
    Ok(committed.pages())
}

/// Migrates the large folio that starts at `pfn` to system memory. If there is no large folio for
/// it, or the device cannot copy all of it, splits it and migrates its first pages, allocated with
/// `effort`. Returns the number of pages that moved.
///
/// A folio that no PMD maps is split at once: the process may have given up a part of it.
///
/// # Errors
///
/// As for [`evict_pfns`].
///
/// # Safety
///
/// The pages are of a chunk of `pool`, which is not freed meanwhile.
unsafe fn evict_large(pool: &Pool, pfn: usize, order: Order, effort: Effort) -> Result<usize> {
    // SAFETY: The chunk has a `struct page` for the pfn.
    let folio = unsafe { bindings::page_folio(bindings::pfn_to_page(pfn)) };
    // SAFETY: The folio has a `struct page`, since the chunk is not freed.
    if !unsafe { split(folio, true) } {
        // SAFETY: The caller ensures the conditions (see the # Safety section).
        match unsafe { evict_whole(pool, pfn, order) } {
            Err(err) if err != ENODEV => {}
            moved => return moved,
        }
        // SAFETY: The folio has a `struct page`, since the chunk is not freed.
        unsafe { split(folio, false) };
    }
    let mut pfns = [0; BATCH];
    for (page, first) in pfns.iter_mut().zip(pfn..) {
        *page = first;
    }
    // SAFETY: The caller ensures the conditions (see the # Safety section).
    unsafe { evict_pfns(pool, &mut pfns, effort) }
}

/// Migrates the large folio that starts at `pfn` to a large folio of system memory. Returns the
/// number of pages that moved.
///
/// # Safety
///
/// As for [`evict_large`].
unsafe fn evict_whole(pool: &Pool, pfn: usize, order: Order) -> Result<usize> {
    let mut arrays = LargeArrays::new(order)?;
    let arrays = arrays.get();
    for (src, pfn) in arrays.src.iter_mut().zip(pfn..) {
        *src = pfn;
    }
    // SAFETY: The pfns are of a chunk of `pool`, which is not freed meanwhile (see the # Safety
    // section).
    let collected = unsafe { Collected::pfns(pool, arrays, order.pages()) };
    let committed = collected
        .copy(Effort::Try, None)?
        .commit(MigrateReason::Evict);
    Ok(committed.pages())
}

/// Splits a large folio into single pages, unless somebody else has a reference to it or its lock.
/// Keeps it if `keeps_mapped` is true and a PMD maps it. Returns whether it was split.
///
/// # Safety
///
/// The folio has a `struct page`. It may have been freed and be in use again, with any size.
unsafe fn split(folio: *mut bindings::folio, keeps_mapped: bool) -> bool {
    let mut is_split = false;
    // SAFETY: The folio has a `struct page` (see the # Safety section).
    if !unsafe { bindings::folio_try_get(folio) } {
        return false;
    }
    // SAFETY: This function has a reference to the folio.
    if unsafe { bindings::folio_trylock(folio) } {
        // SAFETY: The folio is locked and referenced, so its size does not change.
        is_split = unsafe {
            bindings::folio_test_large(folio)
                && !(keeps_mapped && bindings::folio_entire_mapcount(folio) != 0)
                && bindings::split_folio(folio) == 0
        };
        // SAFETY: The folio was locked above. After a split, the lock is that of its first page.
        unsafe { bindings::folio_unlock(folio) };
    }
    // SAFETY: This function has a reference to the folio.
    unsafe { bindings::folio_put(folio) };
    is_split
}

/// Takes the pages of coherent memory that is lost away from all processes, which get SIGBUS when
/// they access them, and frees the pages. Sleeps.
///
/// Tries for a while, since others may have references to some pages for a moment. Pages that stay
/// can still be accessed, at worst until their processes end.
///
/// The caller makes sure that the pool does not end meanwhile.
pub(crate) fn poison_all(pool: &Pool) {
    const ROUNDS: usize = 50;
    const PAUSE: Delta = Delta::from_millis(10);

    for round in 0..ROUNDS {
        if round != 0 {
            drain();
            fsleep(PAUSE);
        }
        for _ in 0..=pool.used_pages() / BATCH {
            let mut pfns = [0; BATCH];
            let (count, _) = pool.rotate_oldest(&mut pfns);
            if count == 0 {
                return;
            }
            let (mut dst, mut copies) = ([0; BATCH], [PageCopy::NONE; BATCH]);
            let arrays = Arrays {
                src: &mut pfns,
                dst: &mut dst,
                copies: &mut copies,
            };
            // SAFETY: The pfns are of pages in use, so of chunks of `pool`. The caller makes sure
            // that the pool does not end, so the chunks are not freed.
            unsafe { Collected::pfns(pool, arrays, count) }.poison();
        }
    }
    pr_warn!(
        "{}: {} pages are lost, but still in use\n",
        pool.name(),
        pool.used_pages()
    );
}

/// Makes room for a block of `order`: in a new chunk, or by evicting as many pages as it has. The
/// pages that are evicted need not be a block. Returns whether there is one.
pub(crate) fn make_block(pool: &Arc<Pool>, order: Order) -> bool {
    pool.can_alloc(order)
        || Pool::grow(pool, order)
        || make_room(pool, order.pages()) && pool.can_alloc(order)
}

/// Evicts up to `most` pages, and at most a batch or a large folio, of those that migrated to the
/// device first. The new pages are allocated with `effort`. Returns the number of pages that moved,
/// or `None` if no page is in use.
///
/// The caller makes sure that the pool does not end meanwhile.
///
/// # Errors
///
/// [`ENOMEM`] and those of the driver, if no page moved for this reason.
fn evict(pool: &Pool, effort: Effort, most: usize) -> Result<Option<usize>> {
    let mut pfns = [0; BATCH];
    let pfns = &mut pfns[..most.min(BATCH)];
    let (count, order) = pool.rotate_oldest(pfns);
    if count == 0 {
        return Ok(None);
    }
    if order.is_large() {
        // SAFETY: The pfn is of a folio in use, so of a chunk of `pool`. The caller makes sure that
        // the pool does not end, so the chunk is not freed.
        return unsafe { evict_large(pool, pfns[0], order, effort) }.map(Some);
    }
    // SAFETY: The pfns are of pages in use, so of chunks of `pool`, and there are at most `BATCH`.
    // The caller makes sure that the pool does not end, so the chunks are not freed.
    unsafe { evict_pfns(pool, &mut pfns[..count], effort) }.map(Some)
}

/// Evicts pages to make room for `wanted` pages. Returns whether there is room for at least one.
fn make_room(pool: &Pool, wanted: usize) -> bool {
    let mut made = 0;
    // Bound the tries: if somebody has references to many of the pages, do not try all pages.
    let mut tries = wanted / BATCH + 8;
    while made < wanted && tries > 0 && !kernel::current!().fatal_signal_pending() {
        match evict(pool, Effort::Try, wanted - made) {
            Ok(Some(0)) => drain(),
            Ok(Some(evicted)) => made += evicted,
            // All pages are migrating already, there is no system memory, or the device is lost.
            Ok(None) | Err(ENOMEM | ENODEV) => break,
            // The device cannot copy these pages: try others.
            Err(_) => {}
        }
        tries -= 1;
    }
    made != 0
}

/// Reserves `wanted` pages of the pool: free ones, else those of a new chunk, else those that are
/// freed by evicting the pages that migrated to the device first. May reserve fewer, but not none.
/// If `wanted` is zero, reserves nothing, but adds a chunk if there is no free page.
///
/// `pfns` has an element for each page, and for those that [`Reservation::fill`] takes later.
///
/// # Context
///
/// Sleeps. The caller holds neither `mmap_lock` nor the lock of a page.
///
/// # Errors
///
/// [`ENOMEM`] if pages are wanted and none can be reserved, [`EINTR`] on a fatal signal, [`ENODEV`]
/// if the device is lost.
pub(crate) fn reserve<'a>(
    pool: &'a Arc<Pool>,
    pfns: &'a mut [usize],
    wanted: usize,
) -> Result<Reservation<'a>> {
    /// Another task may take the pages that this task has freed. Give up after so many rounds.
    const ROUNDS: usize = 16;

    if pool.is_lost() {
        return Err(ENODEV);
    }
    let mut reservation = Reservation::new(pool, pfns);
    if wanted == 0 {
        if !pool.can_alloc(Order::PAGE) {
            Pool::grow(pool, Order::PAGE);
        }
        return Ok(reservation);
    }
    for _ in 0..ROUNDS {
        if kernel::current!().fatal_signal_pending() {
            return Err(EINTR);
        }
        reservation.fill(wanted);
        let missing = wanted - reservation.taken();
        if missing == 0 || !(Pool::grow(pool, Order::PAGE) || make_room(pool, missing)) {
            break;
        }
    }
    if reservation.taken() == 0 {
        // SAFETY: Always safe to call.
        unsafe { hmm_pool_full(wanted) };
        return Err(ENOMEM);
    }
    Ok(reservation)
}

/// Migrates all pages in use back to system memory. The number of tries is bounded.
///
/// # Errors
///
/// [`EBUSY`] if some pages are still in use, [`ENOMEM`], [`EINTR`] on a fatal signal, and those of
/// the driver, of which [`ENODEV`] means that the device is lost.
pub(crate) fn evict_all(pool: &Pool) -> Result {
    let mut result = Ok(());
    for _ in 0..pool.used_pages() / BATCH + 8 {
        if pool.is_lost() {
            return Err(ENODEV);
        }
        if kernel::current!().fatal_signal_pending() {
            return Err(EINTR);
        }
        match evict(pool, Effort::Reclaim, BATCH) {
            Ok(None) => break,
            Ok(Some(0)) => drain(),
            Ok(Some(_)) => {}
            // Reclaim has failed and would also fail for the next batch.
            Err(ENOMEM) => return Err(ENOMEM),
            Err(err) => result = Err(err),
        }
    }
    match pool.used_pages() {
        0 => Ok(()),
        _ => result.and(Err(EBUSY)),
    }
}

/// Ends the pool: stops the allocation of pages, migrates those in use back to system memory, and
/// frees the chunks.
///
/// This waits for as long as it takes, because the pages contain data of processes. If the device
/// is lost, so is the data, and the chunks stay until the processes have freed the pages.
pub(crate) fn close(pool: &Arc<Pool>) {
    const REPORT: Delta = Delta::from_secs(10);
    const MAX_PAUSE: Delta = Delta::from_secs(1);

    pool.stop();
    let mut since = Instant::<Monotonic>::now();
    let mut pause = Delta::from_millis(1);
    loop {
        if pool.is_lost() {
            return Pool::give_up(pool, poison_all);
        }
        let mut result = Ok(());
        for _ in 0..=pool.used_pages() / BATCH {
            let evicted = evict(pool, Effort::NoFail, BATCH);
            result = result.and(evicted.map(drop));
        }
        let used = pool.used_pages();
        if used == 0 {
            break;
        }
        if result.is_ok() {
            drain();
        }
        if since.elapsed() > REPORT {
            match result {
                Ok(()) => pr_warn!("{}: {} pages are still in use\n", pool.name(), used),
                Err(err) => pr_warn!("{}: {} pages left: {:?}\n", pool.name(), used, err),
            }
            since = Instant::now();
        }
        // Back off, so that a dead device does not keep a CPU busy.
        fsleep(pause);
        pause = (pause * 2).min(MAX_PAUSE);
    }
    pool.free_chunks();
}
