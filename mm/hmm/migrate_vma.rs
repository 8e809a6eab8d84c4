// SPDX-License-Identifier: GPL-2.0

//! The states of a migration between system memory and a device's memory.
//!
//! mm does the migration: it locks and unmaps pages, and later maps either the destinations or the
//! original pages. Between these steps the driver copies the data. The states are types:
//!
//! ```text
//!                  migrate_vma_setup() or migrate_device_pfns()
//!                         |
//!                         v
//!                     Collected    locked and unmapped            --drop--> mapped where they were
//!                         | copy()    PoolOps::copy()
//!                         v
//!                      Copied      the destinations hold the data --drop--> mapped where they were
//!                         | commit()  migrate_vma_pages()
//!                         v
//!                     Committed    says how many moved            --drop--> mapped where they are
//! ```
//!
//! Dropping a state always maps the pages again, once, with `migrate_vma_finalize()` or
//! `migrate_device_finalize()`. Pages that were not copied stay where they were.
//!
//! C header: [`include/linux/migrate.h`](srctree/include/linux/migrate.h)

use super::{
    callback::Callback,
    copy::{
        CopyBatch,
        PageCopy, //
    },
    dma::MappedCopies,
    folio::{
        Effort,
        NewFolio, //
    },
    pfn::Access,
    pool::{
        address_of,
        Driver,
        Pool,
        Reservation, //
    },
    pool_ops::{
        MigrateReason,
        RawData, //
    },
    range::PageRange,
    slots::{
        Node,
        Order, //
    }, //
};
use core::{
    cell::Cell,
    marker::PhantomData,
    ops::Range,
    ptr::null_mut, //
};
use kernel::{
    bindings,
    error::to_result,
    mm::virt::VmaRef,
    page::PAGE_SHIFT,
    prelude::*, //
};

/// What a migration to the device does with holes: addresses in anonymous memory where no page is
/// mapped or swapped out.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Holes {
    /// Leaves holes as they are, and mappings of the shared zero page too. This suits a read by the
    /// device, since a read by the CPU does not allocate a page either.
    Keep,
    /// Populates holes with zeroed pages in the memory of the device.
    Populate,
}

impl Holes {
    /// What suits an access by the device: only a write populates, as for an access by the CPU.
    #[inline]
    pub fn for_access(access: Access) -> Self {
        match access {
            Access::Read => Self::Keep,
            Access::Write => Self::Populate,
        }
    }
}

/// The most pages that migrate together if the arrays are on the stack.
pub(crate) const BATCH: usize = 16;

/// The arrays that a migration needs, with one element for each page, and in `copies` for each
/// folio.
pub(crate) struct Arrays<'a> {
    pub(crate) src: &'a mut [usize],
    pub(crate) dst: &'a mut [usize],
    pub(crate) copies: &'a mut [PageCopy],
}

impl Arrays<'_> {
    /// The same arrays, for a migration that may have to start again.
    pub(crate) fn again(&mut self) -> Arrays<'_> {
        Arrays {
            src: self.src,
            dst: self.dst,
            copies: self.copies,
        }
    }

    /// The number of pages that the arrays have room for.
    fn len(&self) -> usize {
        self.src.len().min(self.dst.len())
    }
}

/// The arrays for one large folio, which are too large for the stack.
pub(crate) struct LargeArrays {
    src: KVVec<usize>,
    dst: KVVec<usize>,
    copies: [PageCopy; 1],
}

impl LargeArrays {
    /// # Errors
    ///
    /// [`ENOMEM`].
    pub(crate) fn new(order: Order) -> Result<Self> {
        let zeroes = || KVVec::from_elem(0, order.pages(), GFP_KERNEL | __GFP_NOWARN);
        Ok(Self {
            src: zeroes()?,
            dst: zeroes()?,
            copies: [PageCopy::NONE],
        })
    }

    pub(crate) fn get(&mut self) -> Arrays<'_> {
        Arrays {
            src: &mut self.src,
            dst: &mut self.dst,
            copies: &mut self.copies,
        }
    }
}

/// How the pages were found. This decides which functions of mm map them again.
enum Found<'a> {
    /// By address, with `mmap_lock` held: `migrate_vma_*()`.
    Vma(&'a VmaRef, bindings::migrate_vma),
    /// By pfn: `migrate_device_*()`.
    Pfns,
}

/// Pages that are locked and unmapped, and the pages that will replace them.
///
/// # Invariants
///
/// - The first `pages` elements of `src` are as `migrate_vma_setup()` or `migrate_device_pfns()`
///   left them, apart from the changes of `migrate_*_pages()`.
/// - If `order` is large, these are the pages of one folio or of one hole, and only the first
///   element of `src` stands for it.
/// - Each of these elements of `dst` is zero or a [`NewFolio`] of this order. If `moved` is set,
///   the folio holds the data of the page in `src`.
struct Locked<'a> {
    /// The pool that the pages come from, or go to.
    pool: &'a Pool,
    found: Found<'a>,
    arrays: Arrays<'a>,
    pages: usize,
    order: Order,
    /// Whether `migrate_*_pages()` was called.
    moved: bool,
}

impl Locked<'_> {
    /// The order of what `migrate_vma_setup()` or `migrate_device_pfns()` has stored in `src`.
    fn order_of(src: &[usize], pages: usize) -> Order {
        let is_compound = |src: &usize| src & bindings::MIGRATE_PFN_COMPOUND as usize != 0;
        match src.first().is_some_and(is_compound) && pages == Order::MAX.pages() {
            true => Order::MAX,
            false => Order::PAGE,
        }
    }

    /// The indices of the folios and holes.
    fn folios(&self) -> impl Iterator<Item = usize> {
        (0..self.pages).step_by(self.order.pages())
    }

    /// The index of the folio or hole that page `i` is a part of.
    fn folio_of(&self, i: usize) -> usize {
        i - i % self.order.pages()
    }

    /// Whether page `i` is to migrate. After `migrate_*_pages()`, a page that has a destination and
    /// still migrates has moved.
    fn migrates(&self, i: usize) -> bool {
        self.arrays.src[i] & bindings::MIGRATE_PFN_MIGRATE as usize != 0
    }

    /// The source page `i`, or null for a hole and for a page that was not collected.
    fn src_page(&self, i: usize) -> *mut bindings::page {
        // SAFETY: migrate_pfn_to_page() returns null for an element without MIGRATE_PFN_VALID,
        // which a hole does not have. With this flag, the element is a valid pfn from mm.
        unsafe { bindings::migrate_pfn_to_page(self.arrays.src[i]) }
    }

    /// The destination page of page `i`, or null.
    fn dst_page(&self, i: usize) -> *mut bindings::page {
        // SAFETY: The type invariants say that the element is zero or a `NewFolio`, whose pfn is
        // valid.
        unsafe { bindings::migrate_pfn_to_page(self.arrays.dst[i]) }
    }

    /// Frees the destination of page `i`, if it has one.
    fn forget_dst(&mut self, i: usize) {
        let mpfn = core::mem::take(&mut self.arrays.dst[i]);
        // SAFETY: The type invariants say that the element is zero or a `NewFolio`. It has just
        // been removed from the array, so nobody else uses it.
        drop(unsafe { NewFolio::from_mpfn(mpfn) });
    }

    /// Calls the driver to copy the pages `which` of `copies` in one batch, if there are any.
    ///
    /// # Errors
    ///
    /// Those of the driver; [`EIO`] if it has not taken the whole batch, or has not written all of
    /// the new memory.
    fn copy(&mut self, driver: &Driver<'_>, which: Range<usize>, to_device: bool) -> Result {
        let ram = match to_device {
            true => &*self.arrays.src,
            false => &*self.arrays.dst,
        };
        let copies = self.arrays.copies.get_mut(which).ok_or(EINVAL)?;
        let dma = self.pool.dma().filter(|_| !copies.is_empty());
        let pfn = |copy: &PageCopy| ram[copy.index] >> bindings::MIGRATE_PFN_SHIFT;
        // SAFETY: The pages are referenced by mm or new, until `self` is dropped.
        let _mapped = dma
            .map(|dma| unsafe { MappedCopies::new(dma, copies, pfn) })
            .transpose()?;
        let copies = &*copies;
        // If there are pages to copy, they are locked, so the pool has not ended.
        let memory = match copies.is_empty() {
            true => null_mut(),
            false => self.pool.cpu_address(),
        };
        let written = Cell::new(0);
        // SAFETY: The pages of system memory are either locked, unmapped and referenced by mm
        // alone, or new. So nobody else accesses them, and they are not freed before `self` is
        // dropped. Each page is in `copies` once. Each copy from the device has a page of system
        // memory. `memory` is the address of the pool's memory, whose pages of `copies` are locked
        // and unmapped, or new, as well.
        let mut batch = unsafe { CopyBatch::new(copies, to_device, &written, memory) };
        if !copies.is_empty() {
            let _callback = Callback::begin();
            driver.copy(&mut batch)?;
        }
        let all = if to_device {
            0
        } else {
            copies.iter().map(|copy| copy.pages << PAGE_SHIFT).sum()
        };
        match batch.next() {
            None if written.get() == all => Ok(()),
            _ => Err(EIO),
        }
    }

    /// The VMA and the address of page `i`, if it was found by address.
    fn address(&self, i: usize) -> Option<(&VmaRef, usize)> {
        match &self.found {
            Found::Vma(vma, args) => Some((vma, args.start + (i << PAGE_SHIFT))),
            Found::Pfns => None,
        }
    }

    /// Calls a function of mm: `vma` if the pages were found by address, else `device`.
    fn call(
        &mut self,
        vma: unsafe extern "C" fn(*mut bindings::migrate_vma),
        device: unsafe extern "C" fn(*mut usize, *mut usize, usize),
    ) {
        let (src, dst) = (self.arrays.src.as_mut_ptr(), self.arrays.dst.as_mut_ptr());
        match &mut self.found {
            Found::Vma(_, args) => {
                (args.src, args.dst) = (src, dst);
                // SAFETY: The type invariants say that the arrays are as the previous functions of
                // the migration left them. mmap_lock has been held since `Collected::select()`,
                // whose callers hold it for `'a`.
                unsafe { vma(args) }
            }
            // SAFETY: The type invariants say that the arrays are as the previous functions of the
            // migration left them.
            Found::Pfns => unsafe { device(src, dst, self.pages) },
        }
    }
}

impl Drop for Locked<'_> {
    /// Maps the pages again: those that have moved at their destination, the others where they
    /// were.
    fn drop(&mut self) {
        if !self.moved {
            // migrate_*_finalize() would map any destination that it finds, even without the data.
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

/// The direction from system memory to the device.
pub(crate) enum ToDevice {}

/// The direction from the device to system memory.
pub(crate) enum ToRam {}

/// Pages that are locked and unmapped. If dropped, they are mapped where they were.
///
/// # Invariants
///
/// With [`ToDevice`], the pages that migrate are in system memory, or are holes. With [`ToRam`],
/// they are of chunks of the pool, or are holes.
pub(crate) struct Collected<'a, Way>(Locked<'a>, PhantomData<Way>);

/// Pages whose destinations hold a copy of their data. If dropped, they are mapped where they were.
///
/// # Invariants
///
/// The sources are those of [`Collected`]. With [`ToDevice`], the destinations are of chunks of the
/// pool. With [`ToRam`], they are in system memory.
pub(crate) struct Copied<'a, Way> {
    locked: Locked<'a>,
    /// Keeps the device from being given up until the pages are there.
    driver: Option<Driver<'a>>,
    _way: PhantomData<Way>,
}

impl<'a, Way> Copied<'a, Way> {
    fn new(locked: Locked<'a>, driver: Option<Driver<'a>>) -> Self {
        Self {
            locked,
            driver,
            _way: PhantomData,
        }
    }
}

/// Pages that have moved, as far as mm could move them. If dropped, they are mapped where they are
/// now.
pub(crate) struct Committed<'a> {
    locked: Locked<'a>,
    pages: usize,
}

impl<'a, Way> Collected<'a, Way> {
    /// Whether page `i` was collected, or is a hole.
    pub(crate) fn migrates(&self, i: usize) -> bool {
        self.0.migrates(self.0.folio_of(i))
    }

    /// Whether the first page was collected, and is not a hole.
    pub(crate) fn has_folio(&self) -> bool {
        self.0.migrates(0) && !self.0.src_page(0).is_null()
    }

    /// The order of the folios. If it is large, there is one folio, or one hole.
    pub(crate) fn order(&self) -> Order {
        self.0.order
    }

    /// Locks and unmaps the pages of `range` of `vma` that `select` names, by
    /// `migrate_vma_setup()`. A folio that is larger than `most` is split, and so is one that a PMD
    /// maps if PMDs map more or fewer pages than [`Order::MAX`].
    ///
    /// Pages that somebody else has locked or has a reference to are left alone. The notifiers run.
    ///
    /// # Safety
    ///
    /// - `mmap_lock` is held for `'a`.
    /// - `select` names system memory if `Way` is [`ToDevice`], and the memory of `pool` if it is
    ///   [`ToRam`].
    /// - `fault_page` is null, or a page of `pool` that is locked and referenced.
    unsafe fn select(
        pool: &'a Pool,
        vma: &'a VmaRef,
        range: PageRange,
        most: Order,
        select: bindings::migrate_vma_direction,
        fault_page: *mut bindings::page,
        arrays: Arrays<'a>,
    ) -> Result<Self> {
        if arrays.len() < range.pages() {
            return Err(EINVAL);
        }
        // SAFETY: Always safe to call.
        let is_pmd = unsafe { bindings::pmd_order() } == Order::MAX.get();
        let compound = match most.is_large() && is_pmd {
            true => bindings::migrate_vma_direction_MIGRATE_VMA_SELECT_COMPOUND,
            false => 0,
        };
        let mut args = bindings::migrate_vma {
            vma: vma.as_ptr(),
            src: arrays.src.as_mut_ptr(),
            dst: arrays.dst.as_mut_ptr(),
            cpages: 0,
            npages: 0,
            start: range.start(),
            end: range.end(),
            pgmap_owner: pool.as_owner(),
            flags: (select | compound) as usize,
            fault_page,
        };
        // SAFETY: The arrays have an element for each page. The caller holds mmap_lock, and
        // `fault_page` is null or locked (see the # Safety section).
        to_result(unsafe { bindings::migrate_vma_setup(&mut args) })?;
        // INVARIANT: migrate_vma_setup() has set both arrays, all destinations to zero. It has
        // selected pages by where they are (see the # Safety section), and pages of devices also
        // by the owner, which is a different one for each pool.
        Ok(Self(
            Locked {
                pool,
                pages: args.npages,
                order: Locked::order_of(arrays.src, args.npages),
                found: Found::Vma(vma, args),
                arrays,
                moved: false,
            },
            PhantomData,
        ))
    }
}

impl<'a> Collected<'a, ToDevice> {
    /// Locks and unmaps the pages of system memory in `range` of `vma`, and collects the holes. A
    /// folio that is larger than `most` is split.
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
        most: Order,
        arrays: Arrays<'a>,
    ) -> Result<Self> {
        let select = bindings::migrate_vma_direction_MIGRATE_VMA_SELECT_SYSTEM;
        // SAFETY: The caller holds mmap_lock for `'a` (see the # Safety section). `select` names
        // system memory, and `fault_page` is null.
        unsafe { Self::select(pool, vma, range, most, select, null_mut(), arrays) }
    }

    /// Whether page `i` should move to the device.
    fn moves(&self, i: usize, holes: Holes) -> bool {
        let src = self.0.src_page(i);
        self.0.migrates(i)
            && match src.is_null() {
                true => holes == Holes::Populate,
                // mm does not migrate file pages to device-private memory, but only finds that out
                // after the copy, in migrate_vma_pages().
                //
                // SAFETY: A page that migrates is valid, and locked.
                false => unsafe { bindings::PageAnon(src) },
            }
    }

    /// Copies the pages to device pages of `reservation`, which takes free pages of the pool as far
    /// as there are any. Zeroes the device memory for holes. A page stays where it is if `data`
    /// fails for it. Also returns the number of pages that stay because no device page was left for
    /// them: all of them, if this is a large folio and the pool has no free block of this size,
    /// `data` fails for the folio, or the device cannot copy it.
    ///
    /// # Errors
    ///
    /// Those of the driver, [`ENODEV`] if the device is lost, and [`EINVAL`] if `reservation` is of
    /// another pool. No page moves then.
    pub(crate) fn copy(
        mut self,
        reservation: &mut Reservation<'_>,
        holes: Holes,
        data: &mut dyn FnMut(usize) -> Result<RawData>,
    ) -> Result<(Copied<'a, ToDevice>, usize)> {
        if !reservation.is_of(self.0.pool) {
            return Err(EINVAL);
        }
        // From here on the data of pages is set, until they are copied.
        let driver = self.0.pool.driver()?;
        let order = self.0.order;
        if !order.is_large() {
            let wanted = self.0.folios().filter(|i| self.moves(*i, holes)).count();
            reservation.fill(wanted);
        }
        let (mut count, mut short) = (0, 0);
        for i in self.0.folios() {
            if !self.moves(i, holes) {
                continue;
            }
            let data = || {
                let _callback = Callback::begin();
                data(order.pages())
            };
            let folio = match reservation.folio(order, data) {
                Ok(Some(folio)) => folio,
                Err(_) if !order.is_large() => continue,
                // The pages of a large folio may migrate one by one.
                _ => {
                    short += order.pages();
                    continue;
                }
            };
            let locked = &mut self.0;
            let src = locked.src_page(i);
            let ram = match src.is_null() {
                true => null_mut(),
                // SAFETY: The page is valid. The type invariants say that it is in system memory.
                false => unsafe { bindings::page_address(src) }.cast(),
            };
            locked.arrays.copies[count] = PageCopy {
                // SAFETY: The page is of a chunk of the pool, since it comes from a reservation.
                // `folio` has a reference to it.
                device: unsafe { address_of(folio.page()) },
                ram,
                pages: order.pages(),
                index: i,
                bus: None,
            };
            count += 1;
            // INVARIANT: The element is a `NewFolio` of the pool.
            locked.arrays.dst[i] = folio.into_mpfn();
        }
        match self.0.copy(&driver, 0..count, true) {
            // The device may be able to copy the pages one by one.
            Err(err) if order.is_large() && err != ENODEV => {
                self.0.forget_dst(0);
                short = order.pages();
            }
            copied => copied?,
        }
        // INVARIANT: The sources are unchanged, and `dst` got only folios of `reservation`, which
        // is of the same pool. The device has copied all that are left.
        Ok((Copied::new(self.0, Some(driver)), short))
    }
}

impl<'a> Collected<'a, ToRam> {
    /// Locks and unmaps the pages of `pool` in `range` of `vma`. A folio that is larger than `most`
    /// is split.
    ///
    /// Pages that somebody else has locked or has a reference to are left alone, except
    /// `fault_page` if it is not null. The notifiers run.
    ///
    /// # Safety
    ///
    /// `mmap_lock` is held for `'a`. `fault_page` is null, or a page of `pool` that is locked and
    /// referenced.
    pub(crate) unsafe fn at(
        pool: &'a Pool,
        vma: &'a VmaRef,
        range: PageRange,
        most: Order,
        fault_page: *mut bindings::page,
        arrays: Arrays<'a>,
    ) -> Result<Self> {
        // SAFETY: The caller holds mmap_lock for `'a`, and `fault_page` is null or a locked and
        // referenced page of `pool` (see the # Safety section). `Pool::select()` names the memory
        // of the pool.
        unsafe { Self::select(pool, vma, range, most, pool.select(), fault_page, arrays) }
    }

    /// Locks and unmaps the pages of `pool` whose pfns are in the first `pages` elements of
    /// `arrays.src`, wherever they are mapped. There are either pages of small folios, or all pages
    /// of one large folio.
    ///
    /// Pages that are free, or that somebody else has locked or has a reference to, are left alone.
    /// The notifiers run.
    ///
    /// # Safety
    ///
    /// The first `pages` elements of `arrays.src` are pfns of chunks of `pool`, which are not freed
    /// for `'a`.
    pub(crate) unsafe fn pfns(pool: &'a Pool, arrays: Arrays<'a>, pages: usize) -> Self {
        arrays.dst[..pages].fill(0);
        // SAFETY: The array has `pages` elements, which are pfns with a struct page, since they are
        // of chunks of the pool (see the # Safety section). migrate_device_pfns() never fails.
        unsafe { bindings::migrate_device_pfns(arrays.src.as_mut_ptr(), pages) };
        // INVARIANT: `dst` was cleared and migrate_device_pfns() has set `src`. The pages are of
        // chunks of `pool` (see the # Safety section).
        Self(
            Locked {
                pool,
                order: Locked::order_of(arrays.src, pages),
                found: Found::Pfns,
                arrays,
                pages,
                moved: false,
            },
            PhantomData,
        )
    }

    /// Poisons the pages, whose contents are lost, in all processes, and frees them.
    pub(crate) fn poison(self) {
        let Locked { arrays, pages, .. } = &self.0;
        // SAFETY: The type invariants say that migrate_device_pfns() or migrate_vma_setup() has set
        // `src`, both of which leave migration entries in the place of the pages.
        unsafe { bindings::migrate_device_poison(arrays.src.as_ptr().cast_mut(), *pages) };
    }

    /// Copies the pages to new pages of system memory, allocated with `effort`. Pages that cannot
    /// be allocated or copied stay where they are. But if this happens to page `need`, all pages
    /// stay. A large folio needs a large one: without it the caller tries again with small ones.
    ///
    /// Page `need` is allocated first, with [`Effort::Fault`].
    ///
    /// # Errors
    ///
    /// - [`ENODEV`] if the device is lost.
    /// - Without `need`, only if no page can move: [`ENOMEM`] or the error of the driver.
    /// - If page `need` cannot move: [`ENOMEM`] if there is no system memory for it, [`EAGAIN`] if
    ///   the driver asks to try again, and [`EIO`] if it cannot copy the page.
    pub(crate) fn copy(mut self, effort: Effort, need: Option<usize>) -> Result<Copied<'a, ToRam>> {
        let locked = &mut self.0;
        // If page `need` is gone meanwhile, there is no reason to migrate the others.
        let comes = |i| i < locked.pages && locked.migrates(i) && !locked.src_page(i).is_null();
        let need = need.map(|need| locked.folio_of(need));
        if need.is_some_and(|need| !comes(need)) {
            // INVARIANT: All destinations are zero.
            return Ok(Copied::new(self.0, None));
        }
        let driver = locked.pool.driver()?;
        let mut count = 0;
        let others = locked.folios().filter(|i| Some(*i) != need);
        for i in Iterator::chain(need.into_iter(), others) {
            let src = locked.src_page(i);
            // migrate_vma_setup() collects holes, whatever it was asked for.
            if !locked.migrates(i) || src.is_null() {
                continue;
            }
            // A large folio has been split before it could be locked.
            if count == locked.arrays.copies.len() {
                break;
            }
            // SAFETY: The type invariants say that the page is of a chunk of the pool. mm holds a
            // lock and a reference on it.
            let device = unsafe { address_of(src) };
            // Two tasks may find the same page to evict, and the second may lock it when the first
            // has migrated it already. The page has no node then, and does not get one while it is
            // locked.
            let Some(node) = locked.pool.node(device) else {
                continue;
            };
            let effort = if Some(i) == need {
                Effort::Fault
            } else {
                effort
            };
            let order = locked.order;
            let Some(folio) = NewFolio::alloc(effort, order, locked.address(i), node) else {
                if count == 0 {
                    return Err(ENOMEM);
                }
                break;
            };
            // SAFETY: The page of the new folio is valid.
            let ram = unsafe { bindings::page_address(folio.page()) }.cast();
            // INVARIANT: The element is a `NewFolio` in system memory.
            locked.arrays.dst[i] = folio.into_mpfn();
            locked.arrays.copies[count] = PageCopy {
                device,
                ram,
                pages: order.pages(),
                index: i,
                bus: None,
            };
            count += 1;
        }
        if let Err(mut err) = locked.copy(&driver, 0..count, false) {
            // A single page may have made the batch fail: copy the pages one by one.
            let mut copied = 0;
            for n in 0..count {
                let i = locked.arrays.copies[n].index;
                let result = match count {
                    // It was tried just now.
                    1 => Err(err),
                    _ => locked.copy(&driver, n..n + 1, false),
                };
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
        // INVARIANT: The sources are unchanged. `dst` got only new folios in system memory, and
        // those that were not copied are removed.
        Ok(Copied::new(self.0, None))
    }
}

impl<'a> Copied<'a, ToDevice> {
    /// Moves the pages to the device. Those that have moved can be evicted from now on. If the
    /// device was lost after the copy, no page moves.
    pub(crate) fn commit(self) -> Committed<'a> {
        let Self {
            mut locked,
            driver: _driver,
            ..
        } = self;
        if locked.pool.is_lost() {
            for i in 0..locked.pages {
                locked.forget_dst(i);
            }
        }
        let committed = Committed::new(locked);
        let moved = committed.moved();
        let pages = moved.filter_map(|i| {
            // SAFETY: The type invariants of `Copied` say that the destinations are of chunks. They
            // are locked and referenced until `committed` is dropped.
            let address = unsafe { address_of(committed.locked.dst_page(i)) };
            let src = committed.locked.src_page(i);
            let nid = match src.is_null() {
                // SAFETY: Always safe to call.
                true => unsafe { bindings::numa_mem_id() },
                // SAFETY: The source is locked and referenced until `committed` is dropped.
                false => unsafe { bindings::page_to_nid(src) },
            };
            Some((address, Node::new(nid).ok()?))
        });
        committed.locked.pool.mark_used(pages);
        committed
    }
}

impl<'a> Copied<'a, ToRam> {
    /// Moves the pages to system memory, and calls
    /// [`PoolOps::migrated_to_ram`](super::PoolOps::migrated_to_ram) for those that have moved.
    pub(crate) fn commit(self, reason: MigrateReason) -> Committed<'a> {
        let committed = Committed::new(self.locked);
        let (locked, moved) = (&committed.locked, || committed.moved());
        // SAFETY: The type invariants of `Copied` say that the sources are of chunks. They are
        // locked and referenced until `committed` is dropped.
        locked
            .pool
            .mark_unused(moved().map(|i| unsafe { address_of(locked.src_page(i)) }));
        let heads = moved().map(|i| locked.src_page(i));
        // SAFETY: The type invariants of `Copied` say that the sources are of chunks of the pool.
        // They are referenced until `committed` is dropped.
        unsafe {
            locked
                .pool
                .migrated_to_ram(heads, locked.order.pages(), reason)
        };
        committed
    }
}

impl<'a> Committed<'a> {
    /// Moves the pages, as far as mm can, by `migrate_*_pages()`. Each destination must hold the
    /// data of its page.
    fn new(mut locked: Locked<'a>) -> Self {
        locked.call(bindings::migrate_vma_pages, bindings::migrate_device_pages);
        // INVARIANT: The caller has the pages from a `Copied`, so each destination holds the data.
        locked.moved = true;
        let mut this = Self { locked, pages: 0 };
        this.pages = this.moved().count() * this.locked.order.pages();
        this
    }

    /// The number of pages that have moved.
    ///
    /// The process may have fewer of them: it may have dropped a page during the migration, and may
    /// drop any page once it is mapped again.
    pub(crate) fn pages(&self) -> usize {
        self.pages
    }

    /// Whether page `i` has moved.
    pub(crate) fn has_moved(&self, i: usize) -> bool {
        let i = self.locked.folio_of(i);
        i < self.locked.pages && self.locked.migrates(i) && self.locked.arrays.dst[i] != 0
    }

    /// The indices of the folios that have moved.
    fn moved(&self) -> impl Iterator<Item = usize> + '_ {
        self.locked.folios().filter(|i| self.has_moved(*i))
    }
}

/// Whether `err` means that the driver can copy the page later: see
/// [`PoolOps::copy`](super::PoolOps::copy).
fn is_transient(err: Error) -> bool {
    [EAGAIN, EBUSY, EINTR].contains(&err)
}

/// Drains the per-CPU batches of mm, by `lru_add_drain_all()`. munlock() puts pages into such a
/// batch, which keeps a reference to each until it is full, and a page with such a reference does
/// not migrate.
///
/// This schedules work on all CPUs and waits for it: never call it with `mmap_lock` held.
pub(crate) fn drain() {
    // SAFETY: The callers may sleep, and hold no lock of mm.
    unsafe { bindings::lru_add_drain_all() };
}
