// SPDX-License-Identifier: GPL-2.0

//! Pages on their way between RAM and a device's memory.
//!
//! A migration is mm's: it unmaps and locks pages, and maps them again at one of two places. In
//! between the device copies. The states are types: [`Collected`] pages are locked, [`Copied`] ones
//! have a destination that holds what they held, and [`Copied::commit`] says how many moved.
//! Whatever happens the pages are mapped again, once, when the state is dropped; those that were
//! not copied stay where they were.
//!
//! Nothing here tells a device where a page is: the notifiers have erased what it knew, and it is
//! to fault the pages again.
//!
//! C header: [`include/linux/migrate.h`](srctree/include/linux/migrate.h)

use super::{
    copy::{
        CopyBatch,
        PageCopy, //
    },
    fault::{
        report,
        FaultBuf, //
    },
    mirror::Mirror,
    pfn::{
        Pfn,
        State, //
    },
    pool::{
        address_of,
        data_of,
        pool_of,
        DevicePool,
        Pool,
        PoolOps,
        RawData,
        Reservation, //
    },
    range::PageRange,
};
use core::{
    cell::Cell,
    marker::PhantomData,
    ops::Range,
    ptr::{
        null_mut,
        NonNull, //
    }, //
};
use kernel::{
    bindings,
    error::to_result,
    mm::{
        virt::{
            flags,
            VmaRef, //
        },
        MmWithUser, //
    },
    page::PAGE_SHIFT,
    prelude::*,
    sync::Arc,
    time::{
        delay::fsleep,
        Delta, //
    }, //
};

/// The pages that are evicted, or come home together, without an array of somebody's.
pub(crate) const BATCH: usize = 1 << CPU_FAULT_ORDER;

/// A page that the CPU touches brings home those of the aligned block of this order around it.
const CPU_FAULT_ORDER: u32 = 4;

/// For any page of RAM. It need not be zeroed: it is mapped only if all of it was written.
const GFP: bindings::gfp_t = bindings::GFP_HIGHUSER_MOVABLE;
/// For a page of RAM that would be good to have.
pub(crate) const GFP_TRY: bindings::gfp_t = GFP | bindings::__GFP_NORETRY | bindings::__GFP_NOWARN;
/// For a page of RAM that was asked for, but not at the price of a process.
pub(crate) const GFP_REQUEST: bindings::gfp_t =
    GFP | bindings::__GFP_RETRY_MAYFAIL | bindings::__GFP_NOWARN;
/// For a page of RAM that a CPU waits for.
const GFP_NEED: bindings::gfp_t = GFP;
/// For a page of RAM without which data would be lost.
pub(crate) const GFP_MUST: bindings::gfp_t = GFP | bindings::__GFP_NOFAIL;

/// What made a page move to RAM.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum MigrateReason {
    /// It was faulted, or a page near it: the CPU touched it, another device wants it, or its own
    /// device is to write a page that it may only read, of which the CPU makes a copy.
    CpuFault,
    /// Its place was needed, or the pool was emptied or ended.
    Evict,
    /// [`Mirror::migrate_to_ram`].
    Request,
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

    /// A folio of RAM, for `vma` at `va` if there is one.
    fn alloc(gfp: bindings::gfp_t, vma: Option<(&VmaRef, usize)>) -> Option<Self> {
        #[cfg(CONFIG_RUST_HMM_KUNIT_TEST)]
        if kernel::kunit::in_kunit_test() && super::kunit::migrate::fail_alloc() {
            return None;
        }

        let folio = match vma {
            // SAFETY: The VMA is valid, and `va` lies in it.
            Some((vma, va)) => unsafe { bindings::vma_alloc_folio(gfp, 0, vma.as_ptr(), va) },
            // SAFETY: Always safe to call.
            //
            // Whose page it will be is not known, so the current task's policy has to do.
            None => unsafe { bindings::folio_alloc(gfp, 0) },
        };
        let folio = NonNull::new(folio)?;
        // SAFETY: The folio is valid and nobody else's: this does not wait.
        unsafe { bindings::folio_lock(folio.as_ptr()) };
        // INVARIANT: Just allocated and locked.
        Some(Self(folio))
    }

    /// Its page.
    fn page(&self) -> *mut bindings::page {
        // The first page of a folio is at its address.
        self.0.as_ptr().cast()
    }

    /// Gives the folio to an array of destinations.
    fn into_mpfn(self) -> usize {
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
    unsafe fn from_mpfn(mpfn: usize) -> Option<Self> {
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

/// The arrays that a migration needs, an element for each page.
pub(crate) struct Arrays<'a> {
    pub(crate) src: &'a mut [usize],
    pub(crate) dst: &'a mut [usize],
    pub(crate) copies: &'a mut [PageCopy],
}

impl Arrays<'_> {
    /// How many pages they are for.
    fn len(&self) -> usize {
        self.src.len().min(self.dst.len()).min(self.copies.len())
    }
}

/// How the pages were found, and so how they are mapped again.
enum Found<'a> {
    /// By address, with `mmap_lock` held.
    Vma(&'a VmaRef, bindings::migrate_vma),
    /// By pfn.
    Pfns,
}

/// Pages that are locked and unmapped, and the pages that are to replace them.
///
/// # Invariants
///
/// `src` is as `migrate_vma_setup()` or `migrate_device_pfns()` left it, for `pages` pages, but for
/// what `migrate_*_pages()` changed. Every element of `dst` is zero or a [`NewFolio`]; if `moved`,
/// one that holds what the page in `src` held.
struct Locked<'a> {
    /// The pool that the pages come from, or go to.
    pool: &'a Pool,
    found: Found<'a>,
    arrays: Arrays<'a>,
    pages: usize,
    /// `migrate_*_pages()` was called.
    moved: bool,
}

impl Locked<'_> {
    /// Whether page `i` may migrate; once the pages have moved, whether it has if it was to.
    fn migrates(&self, i: usize) -> bool {
        self.arrays.src[i] & bindings::MIGRATE_PFN_MIGRATE as usize != 0
    }

    /// The page that was mapped at place `i`, if it was one.
    fn src_page(&self, i: usize) -> *mut bindings::page {
        // SAFETY: Without MIGRATE_PFN_VALID (a hole has MIGRATE_PFN_MIGRATE alone) it is no page,
        // and with it mm has made it of a pfn.
        unsafe { bindings::migrate_pfn_to_page(self.arrays.src[i]) }
    }

    /// The page that is to replace the one at place `i`, if there is one.
    fn dst_page(&self, i: usize) -> *mut bindings::page {
        // SAFETY: The element is zero or what was made of a pfn.
        unsafe { bindings::migrate_pfn_to_page(self.arrays.dst[i]) }
    }

    /// Frees the destination of page `i`, if it has one.
    fn forget_dst(&mut self, i: usize) {
        let mpfn = core::mem::take(&mut self.arrays.dst[i]);
        // SAFETY: By the type invariants, and it is not there any more.
        drop(unsafe { NewFolio::from_mpfn(mpfn) });
    }

    /// Has the device copy some of `copies`.
    ///
    /// # Errors
    ///
    /// Those of the driver; [`EIO`] if it did not look at all of them, or has not written all of
    /// the new memory.
    fn copy(&mut self, which: Range<usize>, to_device: bool) -> Result {
        let copies = self.arrays.copies.get(which).ok_or(EINVAL)?;
        let written = Cell::new(0);
        // SAFETY: The pages of RAM are locked, unmapped and referenced by mm alone, or new: nobody
        // else accesses them, and they stay for as long as `self` does. Each is there once. Pages
        // go to RAM only with a page of RAM.
        let mut batch = unsafe { CopyBatch::new(copies, to_device, &written) };
        if !copies.is_empty() {
            self.pool.ops().copy(&mut batch)?;
        }
        let all = if to_device {
            0
        } else {
            copies.len() << PAGE_SHIFT
        };
        match batch.next() {
            None if written.get() == all => Ok(()),
            _ => Err(EIO),
        }
    }

    /// The address of page `i`, if that is how it was found.
    fn address(&self, i: usize) -> Option<(&VmaRef, usize)> {
        match &self.found {
            Found::Vma(vma, args) => Some((vma, args.start + (i << PAGE_SHIFT))),
            Found::Pfns => None,
        }
    }

    /// Calls the `_vma` form or the `_device` form of a function of mm.
    fn call(
        &mut self,
        vma: unsafe extern "C" fn(*mut bindings::migrate_vma),
        device: unsafe extern "C" fn(*mut usize, *mut usize, usize),
    ) {
        let (src, dst) = (self.arrays.src.as_mut_ptr(), self.arrays.dst.as_mut_ptr());
        match &mut self.found {
            Found::Vma(_, args) => {
                (args.src, args.dst) = (src, dst);
                // SAFETY: The arguments are as the functions before it left them, by the type
                // invariants, and mmap_lock has been held since.
                unsafe { vma(args) }
            }
            // SAFETY: The arrays are as the functions before it left them, by the type invariants.
            Found::Pfns => unsafe { device(src, dst, self.pages) },
        }
    }
}

impl Drop for Locked<'_> {
    /// Maps the pages again: at their destination if they moved, else where they were.
    fn drop(&mut self) {
        if !self.moved {
            // A destination that mm sees is mapped, whatever is in it.
            for i in 0..self.pages {
                self.forget_dst(i);
            }
        }
        self.call(
            bindings::migrate_vma_finalize,
            bindings::migrate_device_finalize,
        );
    }
}

/// The way from RAM to the device.
pub(crate) enum ToDevice {}

/// The way from the device to RAM.
pub(crate) enum ToRam {}

/// Pages that are locked and unmapped. Dropped, they are mapped where they were.
///
/// # Invariants
///
/// Those that migrate are of RAM, or nothing yet, on the way [`ToDevice`]; on the way [`ToRam`]
/// they are of chunks of the pool, or nothing.
pub(crate) struct Collected<'a, Way>(Locked<'a>, PhantomData<Way>);

/// Pages that have a destination which holds what they held. Dropped, they are mapped where they
/// were.
///
/// # Invariants
///
/// The sources are those of [`Collected`]. The destinations are of chunks of the pool on the way
/// [`ToDevice`], and of RAM on the way [`ToRam`].
pub(crate) struct Copied<'a, Way>(Locked<'a>, PhantomData<Way>);

/// Pages that have moved, if they could. Dropped, they are mapped where they are now.
pub(crate) struct Committed<'a> {
    locked: Locked<'a>,
    pages: usize,
}

impl<'a, Way> Collected<'a, Way> {
    /// Locks and unmaps the pages of `range` of `vma` that `select` names.
    ///
    /// Pages that somebody else has locked or has a reference to are left alone. The notifiers run.
    ///
    /// # Safety
    ///
    /// `mmap_lock` is held for `'a`. What `select` names is what the way starts with. `fault_page`
    /// is null, or a page of `pool` that is locked and referenced.
    unsafe fn select(
        pool: &'a Pool,
        vma: &'a VmaRef,
        range: PageRange,
        select: bindings::migrate_vma_direction,
        fault_page: *mut bindings::page,
        arrays: Arrays<'a>,
    ) -> Result<Self> {
        if arrays.len() < range.pages() {
            return Err(EINVAL);
        }
        let mut args = bindings::migrate_vma {
            vma: vma.as_ptr(),
            src: arrays.src.as_mut_ptr(),
            dst: arrays.dst.as_mut_ptr(),
            cpages: 0,
            npages: 0,
            start: range.start(),
            end: range.end(),
            pgmap_owner: pool.as_owner(),
            flags: select as usize,
            fault_page,
        };
        // SAFETY: The arrays have an element for each page; mmap_lock is held and `fault_page` is
        // locked, by the caller's promise.
        to_result(unsafe { bindings::migrate_vma_setup(&mut args) })?;
        // INVARIANT: It has set both arrays, the destinations to zero, and selected by the pages'
        // place and, of device-private pages, by the owner, which no other pool has.
        Ok(Self(
            Locked {
                pool,
                pages: args.npages,
                found: Found::Vma(vma, args),
                arrays,
                moved: false,
            },
            PhantomData,
        ))
    }
}

impl<'a> Collected<'a, ToDevice> {
    /// Locks and unmaps the pages of RAM in `range` of `vma`, and takes the holes.
    ///
    /// Pages that somebody else has locked or has a reference to are left alone. The notifiers run.
    ///
    /// # Safety
    ///
    /// `mmap_lock` is held for `'a`.
    pub(crate) unsafe fn at(
        pool: &'a Pool,
        vma: &'a VmaRef,
        range: PageRange,
        arrays: Arrays<'a>,
    ) -> Result<Self> {
        let select = bindings::migrate_vma_direction_MIGRATE_VMA_SELECT_SYSTEM;
        // SAFETY: By the caller's promise.
        unsafe { Self::select(pool, vma, range, select, null_mut(), arrays) }
    }

    /// Whether page `i` is to move to the device.
    fn moves(&self, i: usize, holes: Holes) -> bool {
        let src = self.0.src_page(i);
        self.0.migrates(i)
            && match src.is_null() {
                true => holes == Holes::Populate,
                // mm moves no page of a file to private memory, but finds that out later.
                //
                // SAFETY: A page that migrates is valid, and locked.
                false => unsafe { bindings::PageAnon(src) },
            }
    }

    /// Copies the pages to those of `reservation`, which takes free pages for them as far as there
    /// are any, and zeroes the device's memory for holes. A page without `data` stays. Returns also
    /// how many pages stay since there was no room for them.
    ///
    /// # Errors
    ///
    /// Those of the driver, and [`EINVAL`] if `reservation` is of another pool. Nothing moves then.
    pub(crate) fn copy(
        mut self,
        reservation: &mut Reservation<'_>,
        holes: Holes,
        data: &mut dyn FnMut() -> Result<RawData>,
    ) -> Result<(Copied<'a, ToDevice>, usize)> {
        if !reservation.is_of(self.0.pool) {
            return Err(EINVAL);
        }
        let wanted = (0..self.0.pages).filter(|i| self.moves(*i, holes)).count();
        reservation.fill(wanted);
        let (mut count, mut short) = (0, 0);
        for i in 0..self.0.pages {
            if !self.moves(i, holes) {
                continue;
            }
            if reservation.is_used_up() {
                short += 1;
                continue;
            }
            let Some(folio) = data().ok().and_then(|data| reservation.folio(data)) else {
                continue;
            };
            let locked = &mut self.0;
            let src = locked.src_page(i);
            let ram = match src.is_null() {
                true => null_mut(),
                // SAFETY: The page is valid, and one of RAM by the type invariants.
                false => unsafe { bindings::page_address(src) }.cast(),
            };
            locked.arrays.copies[count] = PageCopy {
                // SAFETY: A reservation is of pages of chunks.
                device: unsafe { address_of(folio.page()) },
                ram,
                index: i,
            };
            count += 1;
            // INVARIANT: A new folio, of the pool.
            locked.arrays.dst[i] = folio.into_mpfn();
        }
        self.0.copy(0..count, true)?;
        // INVARIANT: The sources are those that were collected; each destination is of the pool.
        Ok((Copied(self.0, PhantomData), short))
    }
}

impl<'a> Collected<'a, ToRam> {
    /// Locks and unmaps the pages of `pool` in `range` of `vma`.
    ///
    /// Pages that somebody else has locked or has a reference to are left alone, but for
    /// `fault_page`, if it is not null. The notifiers run.
    ///
    /// # Safety
    ///
    /// `mmap_lock` is held for `'a`. `fault_page` is null, or a page of `pool` that is locked and
    /// referenced.
    pub(crate) unsafe fn at(
        pool: &'a Pool,
        vma: &'a VmaRef,
        range: PageRange,
        fault_page: *mut bindings::page,
        arrays: Arrays<'a>,
    ) -> Result<Self> {
        let select = bindings::migrate_vma_direction_MIGRATE_VMA_SELECT_DEVICE_PRIVATE;
        // SAFETY: By the caller's promise.
        unsafe { Self::select(pool, vma, range, select, fault_page, arrays) }
    }

    /// Locks and unmaps the pages of `pool` whose pfns are in the first `pages` elements of
    /// `arrays.src`, wherever they are mapped.
    ///
    /// Pages that are free, or that somebody else has locked or has a reference to, are left alone.
    /// The notifiers run.
    ///
    /// # Safety
    ///
    /// The pfns are of chunks of `pool`, which cannot go, and there are as many as that.
    pub(crate) unsafe fn pfns(pool: &'a Pool, arrays: Arrays<'a>, pages: usize) -> Self {
        arrays.dst[..pages].fill(0);
        // SAFETY: The array has the pages, which are valid by the caller's promise. This cannot
        // fail.
        unsafe { bindings::migrate_device_pfns(arrays.src.as_mut_ptr(), pages) };
        // INVARIANT: Both arrays were set above; the pages are of the pool by the caller's promise.
        Self(
            Locked {
                pool,
                found: Found::Pfns,
                arrays,
                pages,
                moved: false,
            },
            PhantomData,
        )
    }

    /// Copies the pages to new pages of RAM, allocated with `gfp`. Those for which there is none,
    /// or which cannot be copied, stay; but if it is page `need`, all do.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`] and those of the driver, if it was that why none comes. If page `need` does not
    /// come, [`ENOMEM`] says that there is no RAM, [`EAGAIN`] that the driver asks to try again,
    /// and [`EIO`] that the page cannot be copied.
    pub(crate) fn copy(
        mut self,
        gfp: bindings::gfp_t,
        need: Option<usize>,
    ) -> Result<Copied<'a, ToRam>> {
        let locked = &mut self.0;
        // It may be gone by now. Then the others have nothing to come for.
        let comes = |i| i < locked.pages && locked.migrates(i) && !locked.src_page(i).is_null();
        if need.is_some_and(|need| !comes(need)) {
            // INVARIANT: There is no destination.
            return Ok(Copied(self.0, PhantomData));
        }
        let mut count = 0;
        let others = (0..locked.pages).filter(|i| Some(*i) != need);
        for i in Iterator::chain(need.into_iter(), others) {
            let src = locked.src_page(i);
            // Holes are collected too, whatever was asked for.
            if !locked.migrates(i) || src.is_null() {
                continue;
            }
            // SAFETY: By the type invariants it is one of the pool; it is locked.
            let device = unsafe { address_of(src) };
            // Of two that found the page to evict it the second may have locked it when the first
            // was done. What it is now is certain, since it is locked.
            if !locked.pool.is_used(device) {
                continue;
            }
            let gfp = if Some(i) == need { GFP_NEED } else { gfp };
            let Some(folio) = NewFolio::alloc(gfp, locked.address(i)) else {
                if count == 0 {
                    return Err(ENOMEM);
                }
                break;
            };
            // SAFETY: The page is valid.
            let ram = unsafe { bindings::page_address(folio.page()) }.cast();
            // INVARIANT: A new folio, of RAM.
            locked.arrays.dst[i] = folio.into_mpfn();
            locked.arrays.copies[count] = PageCopy {
                device,
                ram,
                index: i,
            };
            count += 1;
        }
        if let Err(mut err) = locked.copy(0..count, false) {
            // Perhaps it was one of them.
            let mut copied = 0;
            for n in 0..count {
                let i = locked.arrays.copies[n].index;
                let result = locked.copy(n..n + 1, false);
                err = result.err().unwrap_or(err);
                if result.is_ok() {
                    copied += 1;
                } else if Some(i) == need {
                    return Err(if is_transient(err) { EAGAIN } else { EIO });
                } else {
                    locked.forget_dst(i);
                }
            }
            if copied == 0 {
                return Err(err);
            }
        }
        // INVARIANT: As above.
        Ok(Copied(self.0, PhantomData))
    }
}

impl<'a> Copied<'a, ToDevice> {
    /// Moves the pages to the device: those that do can be evicted from now on.
    pub(crate) fn commit(self) -> Committed<'a> {
        let committed = Committed::new(self.0);
        let moved = committed.moved();
        // SAFETY: By the type invariants the destinations are of chunks; they are locked until
        // `committed` is dropped.
        let addresses = moved.map(|i| unsafe { address_of(committed.locked.dst_page(i)) });
        committed.locked.pool.settle(addresses);
        committed
    }
}

impl<'a> Copied<'a, ToRam> {
    /// Moves the pages to RAM, and tells the driver.
    pub(crate) fn commit(self, reason: MigrateReason) -> Committed<'a> {
        let committed = Committed::new(self.0);
        let (locked, moved) = (&committed.locked, || committed.moved());
        // SAFETY: By the type invariants the sources are of chunks; they are locked and referenced
        // until `committed` is dropped.
        locked
            .pool
            .leave(moved().map(|i| unsafe { address_of(locked.src_page(i)) }));
        for i in moved() {
            // SAFETY: As above. The data is that of the page, which is not freed meanwhile.
            unsafe {
                let data = data_of(locked.src_page(i));
                locked.pool.ops().migrated_to_ram(data, reason);
            }
        }
        committed
    }
}

impl<'a> Committed<'a> {
    /// Moves the pages, as far as mm can. Each destination holds what its page held.
    fn new(mut locked: Locked<'a>) -> Self {
        locked.call(bindings::migrate_vma_pages, bindings::migrate_device_pages);
        // INVARIANT: Copied.
        locked.moved = true;
        let mut this = Self { locked, pages: 0 };
        this.pages = this.moved().count();
        this
    }

    /// How many pages have moved.
    ///
    /// It says no more: the process may have dropped one meanwhile, and may drop any as soon as
    /// they are mapped.
    pub(crate) fn pages(&self) -> usize {
        self.pages
    }

    /// Whether page `i` has moved.
    fn has_moved(&self, i: usize) -> bool {
        i < self.locked.pages && self.locked.migrates(i) && self.locked.arrays.dst[i] != 0
    }

    fn moved(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.locked.pages).filter(|i| self.has_moved(*i))
    }
}

/// Brings home those of the device's pages `pfns` that come, with `gfp` for the pages of RAM.
/// Returns how many came.
///
/// # Errors
///
/// [`ENOMEM`], and those of the driver, if it was that why none came.
///
/// # Safety
///
/// The pfns are of chunks of `pool`, which cannot go. There are at most [`BATCH`].
pub(crate) unsafe fn evict(pool: &Pool, pfns: &mut [usize], gfp: bindings::gfp_t) -> Result<usize> {
    let pages = pfns.len();
    let (mut dst, mut copies) = ([0; BATCH], [PageCopy::NONE; BATCH]);
    let arrays = Arrays {
        src: pfns,
        dst: &mut dst,
        copies: &mut copies,
    };
    // SAFETY: By the caller's promise.
    let collected = unsafe { Collected::pfns(pool, arrays, pages) };
    let committed = collected.copy(gfp, None)?.commit(MigrateReason::Evict);
    Ok(committed.pages())
}

/// Whether a driver whose copy has failed with `err` asks to be called again: see
/// [`PoolOps::copy`].
fn is_transient(err: Error) -> bool {
    [EAGAIN, EBUSY, EINTR].contains(&err)
}

/// What has become of a page that the CPU touched.
enum Touched {
    /// It has moved to system memory, or the process has it there no more: the CPU tries again.
    Done,
    /// Somebody has a reference to it.
    Held,
}

/// Called by mm when the CPU touches a page of a device.
///
/// # Safety
///
/// `vmf` is valid, its page is of a chunk, locked and referenced, and mapped at its address;
/// `mmap_lock` is held.
pub(crate) unsafe extern "C" fn migrate_to_ram(
    vmf: *mut bindings::vm_fault,
) -> bindings::vm_fault_t {
    // SAFETY: The caller passes a valid `vmf`, whose VMA is valid since mmap_lock is held.
    let (page, vma, va) = unsafe {
        let at = (*vmf).__bindgen_anon_1;
        ((*vmf).page, VmaRef::from_raw(at.vma), at.address)
    };
    // SAFETY: The caller holds mmap_lock, a reference to the page, which is of a chunk, and its
    // lock (see the `# Safety` section).
    match unsafe { cpu_fault(vma, va, page) } {
        Ok(Touched::Done) => 0,
        // SAFETY: The caller holds mmap_lock, and `vmf` is not used after this.
        Ok(Touched::Held) => unsafe { retry_after(vmf, drain) },
        // The CPU tries again when there is memory.
        Err(err) if err == ENOMEM => bindings::vm_fault_reason_VM_FAULT_OOM,
        // SAFETY: The caller holds mmap_lock, and `vmf` is not used after this.
        Err(err) if err == EAGAIN => unsafe { retry_after(vmf, || fsleep(PAUSE)) },
        Err(_) => bindings::vm_fault_reason_VM_FAULT_SIGBUS,
    }
}

/// The time between two calls of a driver that asks to be called again for a page that the CPU
/// waits for.
const PAUSE: Delta = Delta::from_millis(1);

/// Has the CPU fault again, after `wait` where the fault allows it: `mmap_lock` is released for it.
///
/// # Safety
///
/// `vmf` is valid and `mmap_lock` is held; neither is used by the caller after this.
unsafe fn retry_after(vmf: *mut bindings::vm_fault, wait: impl FnOnce()) -> bindings::vm_fault_t {
    // SAFETY: The caller passes a valid `vmf`, whose VMA is valid since mmap_lock is held.
    let (flags, mm) = unsafe { ((*vmf).flags, (*(*vmf).__bindgen_anon_1.vma).vm_mm) };
    let no_wait = bindings::fault_flag_FAULT_FLAG_RETRY_NOWAIT;
    if flags & bindings::fault_flag_FAULT_FLAG_ALLOW_RETRY == 0 || flags & no_wait != 0 {
        return 0;
    }
    // SAFETY: The caller holds mmap_lock for read, by its contract; a fault that may be retried is
    // told so by VM_FAULT_RETRY, as `release_fault_lock()` does it.
    unsafe { bindings::mmap_read_unlock(mm) };
    wait();
    bindings::vm_fault_reason_VM_FAULT_RETRY
}

/// Makes the CPUs give up their references to pages that they are about to unlock (mlock()). They
/// keep them until they have enough of them, and a page with such a reference does not migrate.
///
/// Every CPU works for this, and it waits for all of them: never with `mmap_lock` held.
pub(crate) fn drain() {
    // SAFETY: The callers may sleep.
    unsafe { bindings::lru_add_drain_all() };
}

/// Migrates the page at `va` to system memory, and those around it if they come.
///
/// # Safety
///
/// `page` is of a chunk, locked and referenced; `mmap_lock` is held.
unsafe fn cpu_fault(vma: &VmaRef, va: usize, page: *mut bindings::page) -> Result<Touched> {
    // SAFETY: The caller holds a reference to the page, which is of a chunk.
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
    // SAFETY: The caller holds mmap_lock, and the page is of `pool`, locked and referenced.
    let collected = unsafe { Collected::<ToRam>::at(pool, vma, range, page, arrays) }?;
    // A hole may be collected, but a page that could not be has no flag left.
    let gone = need.is_some_and(|need| collected.0.migrates(need));
    let committed = collected
        .copy(GFP_TRY, need)?
        .commit(MigrateReason::CpuFault);
    let came = need.is_some_and(|need| committed.has_moved(need));
    drop(committed);
    // SAFETY: The caller holds a reference to the page.
    let mapped = unsafe { bindings::folio_mapped(page.cast()) };
    Ok(match came || gone || !mapped {
        true => Touched::Done,
        false => Touched::Held,
    })
}

/// What a migration to the device does about pages that the process has not touched yet.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Holes {
    /// Leaves them as they are, and the shared page of zeroes too: what a read by the device may
    /// do, since a read by the CPU allocates nothing.
    Keep,
    /// Populates them with zeroes in the memory of the device.
    Populate,
}

/// What [`Mirror::migrate_to_device`] and [`Mirror::migrate_to_ram`] need for a window of pages.
pub struct MigrateBuf {
    order: u32,
    src: KVVec<usize>,
    dst: KVVec<usize>,
    copies: KVVec<PageCopy>,
    reserved: KVVec<usize>,
}

impl MigrateBuf {
    /// Makes a buffer for windows of up to `2^order` pages, naturally aligned.
    ///
    /// # Errors
    ///
    /// [`EINVAL`] if `order` is above [`FaultBuf::MAX_ORDER`], [`ENOMEM`].
    #[inline]
    pub fn new(order: u32) -> Result<Self> {
        if order > FaultBuf::MAX_ORDER {
            return Err(EINVAL);
        }
        let pages = 1 << order;
        Ok(Self {
            order,
            src: KVVec::from_elem(0, pages, GFP_KERNEL_ACCOUNT)?,
            dst: KVVec::from_elem(0, pages, GFP_KERNEL_ACCOUNT)?,
            copies: KVVec::from_elem(PageCopy::NONE, pages, GFP_KERNEL_ACCOUNT)?,
            reserved: KVVec::from_elem(0, pages, GFP_KERNEL_ACCOUNT)?,
        })
    }

    pub(crate) fn arrays(&mut self) -> (Arrays<'_>, &mut [usize]) {
        let arrays = Arrays {
            src: &mut self.src,
            dst: &mut self.dst,
            copies: &mut self.copies,
        };
        (arrays, &mut self.reserved)
    }
}

/// How far a migration went.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Migrated {
    range: PageRange,
    pages: usize,
}

impl Migrated {
    /// The part of the range that was looked at: it starts where the range does.
    #[inline]
    pub fn range(&self) -> PageRange {
        self.range
    }

    /// How many pages of it moved. Those that somebody has a reference to do not.
    #[inline]
    pub fn pages(&self) -> usize {
        self.pages
    }
}

impl Mirror {
    /// Migrates the pages of `range` to the memory of the device, where `pool` has or makes room.
    ///
    /// Only private memory that may be read migrates, and none that KSM may merge: anonymous
    /// memory, and the process's own copies of pages of a file. What was never touched gets a page
    /// of zeroes there if `holes` says so; what is swapped out stays so. Soft-dirty tracking does
    /// not see what a device writes there. One call serves one window: from the start of `range` to
    /// the end of the aligned block that `buf` spans, and no further than the VMA and the region
    /// go. `data` is called for each page that gets a place; where that fails the page stays, which
    /// is no error.
    ///
    /// The device is told nothing of where a page is now: it has lost what it knew of the window,
    /// and faults it again.
    ///
    /// # Context
    ///
    /// A task of the mirrored process, which holds no lock. May evict pages, of any process, but no
    /// more than move in their place. `data`
    /// is called with `mmap_lock` held and pages locked: it may not allocate memory in a way that
    /// waits, access user memory, nor call the core.
    ///
    /// # Errors
    ///
    /// - [`EINVAL`] if the mirror was made without `pool`.
    /// - [`EPERM`] if the current task's address space is another.
    /// - [`EFAULT`] if nothing is mapped at the start of `range`.
    /// - [`EINTR`] if the task received a fatal signal.
    /// - [`EBUSY`] if invalidations kept colliding.
    /// - [`ENOMEM`] if the pool is full and nothing can be evicted.
    /// - [`EIO`] if [`PoolOps::copy`] has left a part of its batch, and what that returns.
    ///
    /// The pages stay where they were then.
    #[inline]
    pub fn migrate_to_device<T: PoolOps>(
        &self,
        pool: &DevicePool<T>,
        range: PageRange,
        holes: Holes,
        buf: &mut MigrateBuf,
        mut data: impl FnMut() -> Result<T::PageData>,
    ) -> Result<Migrated> {
        migrate_to_device(self, pool.pool(), range, holes, buf, &mut || {
            // SAFETY: It is for pages of `pool`, whose driver is `T`.
            data().map(|data| unsafe { RawData::new(data) })
        })
    }

    /// Migrates those pages of `range` that are in the memory of the device to RAM. Of memory that
    /// may not be read none does; a CPU that may read it again brings it home.
    ///
    /// One call serves one window, as for [`Mirror::migrate_to_device`].
    ///
    /// # Context
    ///
    /// As for [`Mirror::migrate_to_device`]; no page of others is touched.
    ///
    /// # Errors
    ///
    /// As for [`Mirror::migrate_to_device`], without [`EINVAL`]. Where memory is short or some
    /// pages cannot be copied fewer come; it is an error if none does. A mirror without a pool has
    /// nothing to migrate.
    #[inline(never)]
    #[export_name = "hmm_mirror_migrate_to_ram"]
    pub fn migrate_to_ram(&self, range: PageRange, buf: &mut MigrateBuf) -> Result<Migrated> {
        let current = kernel::current!();
        let mm = self.current_mm(current.mm())?;
        let Some(pool) = self.pool() else {
            return Ok(Migrated { range, pages: 0 });
        };
        let (range, scan) = self.scan(mm, range, Holes::Keep, buf)?;
        if !scan.device {
            return Ok(Migrated { range, pages: 0 });
        }

        let guard = mm.mmap_read_lock_killable()?;
        let (range, vma) = migratable(guard.vma_lookup(range.start()), range)?;
        let Some(vma) = vma else {
            return Ok(Migrated { range, pages: 0 });
        };
        let arrays = buf.arrays().0;
        // SAFETY: `guard` holds mmap_lock, and `vma` borrows it. There is no page that the CPU
        // waits for.
        let collected = unsafe { Collected::<ToRam>::at(pool, vma, range, null_mut(), arrays) }?;
        let copied = collected.copy(GFP_REQUEST, None)?;
        let pages = copied.commit(MigrateReason::Request).pages();
        Ok(Migrated { range, pages })
    }

    /// Clips `range` to a window and looks where its pages are, so that nothing is unmapped for
    /// pages that are where they are to be.
    ///
    /// The answer may be stale, and pages that somebody has pinned look as if they could move: what
    /// does move turns out when the pages are collected.
    fn scan(
        &self,
        mm: &MmWithUser,
        range: PageRange,
        holes: Holes,
        buf: &mut MigrateBuf,
    ) -> Result<(PageRange, Scan)> {
        let guard = mm.mmap_read_lock_killable()?;
        let (range, vma) = migratable(guard.vma_lookup(range.start()), range)?;
        let can_migrate = vma.is_some();
        drop(guard);
        let range = PageRange::aligned_block(range.start(), buf.order)?
            .intersect(&range)
            .ok_or(EFAULT)?;
        if !can_migrate {
            return Ok((range, Scan::NOTHING));
        }

        // A window is smaller than a region, and like it aligned.
        let region = self.region_or_insert(mm, range.start())?;
        let pfns = buf.src.get_mut(..range.pages()).ok_or(EINVAL)?;
        let owner = Pool::owner(self.pool());
        let seq = match report(mm, &region, range, None, owner, pfns) {
            Ok((_, seq)) => seq,
            // An invalidation collided, so that nothing is known.
            Err(err) if err == EBUSY => return Ok((range, Scan::UNKNOWN)),
            Err(err) => return Err(err),
        };
        let Some(entries) = region.lock_unless_stale(seq)? else {
            return Ok((range, Scan::UNKNOWN));
        };
        let mut scan = Scan::NOTHING;
        for pfn in pfns.iter().map(|raw| Pfn::from_output(*raw)) {
            match (pfn.state(), pfn.present()) {
                // What is swapped out looks like a hole here. It is not collected.
                (State::Hole, _) => scan.system |= holes == Holes::Populate,
                (State::Present(_), Some(raw)) => {
                    // SAFETY: The page is there, and cannot go while the region's lock is held.
                    let page = unsafe { bindings::hmm_pfn_to_page(raw) };
                    // SAFETY: The page is valid, and stays so while the region's lock is held.
                    let (is_own, is_anon, is_zero) = unsafe {
                        (
                            Pool::owns(owner, page),
                            bindings::PageAnon(page),
                            bindings::is_zero_pfn(bindings::page_to_pfn(page)),
                        )
                    };
                    scan.device |= is_own;
                    scan.system |= !is_own && is_anon || is_zero && holes == Holes::Populate;
                }
                _ => {}
            }
        }
        drop(entries);
        Ok((range, scan))
    }
}

/// Whether a window may have pages to move, by where they are.
#[derive(Copy, Clone)]
struct Scan {
    /// In the device's memory.
    device: bool,
    /// In system memory, or in a hole that is to be populated.
    system: bool,
}

impl Scan {
    const NOTHING: Self = Self {
        device: false,
        system: false,
    };
    const UNKNOWN: Self = Self {
        device: true,
        system: true,
    };
}

#[inline(never)]
#[export_name = "hmm_mirror_migrate_to_device"]
fn migrate_to_device(
    mirror: &Mirror,
    pool: &Arc<Pool>,
    range: PageRange,
    holes: Holes,
    buf: &mut MigrateBuf,
    data: &mut dyn FnMut() -> Result<RawData>,
) -> Result<Migrated> {
    let current = kernel::current!();
    let mm = mirror.current_mm(current.mm())?;
    if !mirror.pool().is_some_and(|own| Arc::ptr_eq(own, pool)) {
        return Err(EINVAL);
    }
    let (range, scan) = mirror.scan(mm, range, holes, buf)?;
    let mut migrated = Migrated { range, pages: 0 };
    if !scan.system {
        return Ok(migrated);
    }

    // First with the pages that are free. Room is made only for pages that were collected and had
    // none, and only then: to make room pages are evicted, and chunks added, for which no lock of
    // mm may be held.
    let mut short = 0;
    for _ in 0..2 {
        let (arrays, reserved) = buf.arrays();
        let mut reservation = match Pool::reserve(pool, reserved, short) {
            Err(err) if err == ENOMEM && migrated.pages != 0 => break,
            reservation => reservation?,
        };

        let guard = mm.mmap_read_lock_killable()?;
        let (range, vma) = migratable(guard.vma_lookup(range.start()), migrated.range)?;
        migrated.range = range;
        let Some(vma) = vma else {
            break;
        };
        // SAFETY: `guard` holds mmap_lock, and `vma` borrows it.
        let collected = unsafe { Collected::<ToDevice>::at(pool, vma, range, arrays) }?;
        let (copied, left) = collected.copy(&mut reservation, holes, data)?;
        migrated.pages += copied.commit().pages();
        short = left;
        if short == 0 {
            break;
        }
    }
    Ok(migrated)
}

/// The part of `range` that lies in `vma`, in which it starts; and `vma`, if its pages migrate.
///
/// # Errors
///
/// [`EFAULT`] if there is no VMA.
fn migratable(vma: Option<&VmaRef>, range: PageRange) -> Result<(PageRange, Option<&VmaRef>)> {
    let vma = vma.ok_or(EFAULT)?;
    let bounds = PageRange::new(vma.start(), vma.end())?;
    let range = bounds.intersect(&range).ok_or(EFAULT)?;
    Ok((range, can_migrate(vma).then_some(vma)))
}

/// Whether mm migrates pages of `vma` to private memory at all, and a device could use them there.
fn can_migrate(vma: &VmaRef) -> bool {
    // KSM has the pages that it has merged in a tree, where a migration would replace them by the
    // device's; and reads what is in the tree.
    let special = flags::IO
        | flags::PFNMAP
        | flags::DONTEXPAND
        | flags::MIXEDMAP
        | flags::MERGEABLE
        | flags::HUGETLB
        // The bytes would go without their tags. And no device writes a shadow stack.
        | bindings::VM_MTE
        | bindings::VM_SHADOW_STACK;
    let readable = vma.flags() & (special | flags::READ) == flags::READ;
    // A migration would not ask the handler that waits for accesses.
    //
    // SAFETY: The VMA is valid.
    let trapped = unsafe { bindings::userfaultfd_rwp(vma.as_ptr()) };
    // A private mapping of a file has copies of its pages from the first write on.
    //
    // SAFETY: As above. A fault may set it meanwhile.
    let anon_vma = unsafe { (&raw const (*vma.as_ptr()).anon_vma).read_volatile() };
    // SAFETY: As above.
    let is_private = unsafe {
        bindings::vma_is_anonymous(vma.as_ptr())
            || !anon_vma.is_null() && !bindings::vma_is_dax(vma.as_ptr())
    };
    readable && !trapped && is_private
}
