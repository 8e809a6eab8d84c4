// SPDX-License-Identifier: GPL-2.0

//! The DMA addresses of pages: how a device reaches what its entries allow.
//!
//! A page is mapped for DMA when its entry is installed, and the mapping outlives the entry. An
//! invalidation erases the entry, so that nobody gets the address any more. When the device has
//! stopped using the page, the core unmaps the page and marks it dirty, and only then mm goes on.
//! So a mapping without an entry is one that the device may still use.
//!
//! `hmm_dma_map_pfn()` and `hmm_dma_unmap_pfn()` serve one page at a time and flush the IOTLB for
//! each. Here a window is synchronised once, and a run of pages is unmapped with one flush, like in
//! `drm_gpusvm.c`. The conditions for a device are those of `hmm_dma_map_alloc()`.
//!
//! C header: [`include/linux/dma-mapping.h`](srctree/include/linux/dma-mapping.h)

#[cfg(CONFIG_RUST_HMM_DEVICE)]
use super::copy::PageCopy;
use super::{
    pfn::{
        Access,
        HmmPfn, //
    },
    rwsem::{
        ReadGuard,
        RwSem, //
    }, //
};
use core::{
    mem::ManuallyDrop,
    ops::Range, //
};
use kernel::{
    bindings,
    device::{
        Bound,
        Device, //
    },
    dma::DmaAddress,
    error::to_result,
    new_mutex,
    page::{
        PAGE_SHIFT,
        PAGE_SIZE, //
    },
    prelude::*,
    rbtree::RBTree,
    sync::{
        aref::ARef,
        static_lock_class,
        Arc,
        Mutex, //
    }, //
};

/// The process may write to the page at any time, so there is no direction that a device could be
/// restricted to without a fault of the IOMMU when a read-only page becomes writable.
const DIRECTION: bindings::dma_data_direction = bindings::dma_data_direction::DMA_BIDIRECTIONAL;

/// No bounce buffer: the device and the process use the same page at the same time.
const ATTRS: usize = bindings::DMA_ATTR_REQUIRE_COHERENT as usize;

/// A device that does DMA, from the probe of its driver until the driver is unbound.
#[pin_data]
pub(crate) struct Dma {
    dev: ARef<Device>,
    /// Held for read where the device is used and no mapping under a region's lock holds up
    /// [`Dma::close`].
    #[pin]
    state: RwSem<State>,
    /// The addresses of the regions that map pages for the device.
    #[pin]
    regions: Mutex<RBTree<usize, ()>>,
}

#[derive(Copy, Clone, PartialEq, Eq)]
enum State {
    /// The driver is bound.
    Bound,
    /// The driver is bound, but its use of the device ends: only what leaves the device's memory is
    /// mapped.
    Ending,
    /// The driver was unbound.
    Unbound,
}

/// Keeps the driver of a device bound.
pub(crate) struct StaysBound<'a> {
    dma: &'a Arc<Dma>,
    _state: ReadGuard<'a, State>,
}

impl Dma {
    /// Checks that `dev` can access the memory of processes.
    ///
    /// # Errors
    ///
    /// - [`EOPNOTSUPP`] if pages would have to be copied to bounce buffers, or if the CPU's caches
    ///   are not coherent with the device: the same cases as in `hmm_dma_map_alloc()`.
    /// - [`ENOMEM`].
    pub(crate) fn new(dev: &Device<Bound>) -> Result<Arc<Self>> {
        // SAFETY: `dev` is valid.
        let limited = unsafe { bindings::dma_addressing_limited(dev.as_raw()) };
        // SAFETY: `dev` is valid.
        let synced =
            cfg!(CONFIG_DMA_NEED_SYNC) && !unsafe { bindings::dev_dma_skip_sync(dev.as_raw()) };
        if limited || synced {
            return Err(EOPNOTSUPP);
        }
        let init = pin_init!(Self {
            dev: dev.into(),
            state <- RwSem::new(State::Bound, c"hmm_dma::state", static_lock_class!()),
            regions <- new_mutex!(RBTree::new(), "hmm_dma::regions"),
        });
        Arc::pin_init(init, GFP_KERNEL)
    }

    fn raw(&self) -> *mut bindings::device {
        self.dev.as_raw()
    }

    /// Keeps the driver bound until the result is dropped. Do not hold it while anything is faulted
    /// or a callback waits for user space.
    ///
    /// # Errors
    ///
    /// [`ENODEV`] if the driver was unbound.
    pub(crate) fn stay_bound(this: &Arc<Self>) -> Result<StaysBound<'_>> {
        let state = this.state.read();
        match *state {
            State::Bound => Ok(StaysBound {
                dma: this,
                _state: state,
            }),
            _ => Err(ENODEV),
        }
    }

    /// Keeps the driver bound for a copy. Does not wait, since the caller holds folio locks.
    ///
    /// # Errors
    ///
    /// [`EAGAIN`] if the driver is being unbound, [`ENODEV`] if it was.
    #[cfg(CONFIG_RUST_HMM_DEVICE)]
    fn stay_bound_for_copy(this: &Arc<Self>) -> Result<StaysBound<'_>> {
        let state = this.state.try_read().ok_or(EAGAIN)?;
        match *state {
            State::Unbound => Err(ENODEV),
            _ => Ok(StaysBound {
                dma: this,
                _state: state,
            }),
        }
    }

    /// Adds a region that [`Dma::close`] has to detach.
    ///
    /// # Errors
    ///
    /// [`ENODEV`] if the driver was unbound, [`ENOMEM`].
    pub(crate) fn add_region(&self, address: usize) -> Result {
        let mut regions = self.regions.lock();
        if *self.state.read() != State::Bound {
            return Err(ENODEV);
        }
        regions.try_create_and_insert(address, (), GFP_KERNEL_ACCOUNT)?;
        Ok(())
    }

    /// Removes a region. Calls `unmap`, which ends its mappings, if the driver is still bound.
    ///
    /// When this returns, [`Dma::close`] does not use the region any more.
    pub(crate) fn remove_region(&self, address: usize, unmap: impl FnOnce()) {
        let mut regions = self.regions.lock();
        if regions.remove(&address).is_some() && *self.state.read() != State::Unbound {
            unmap();
        }
    }

    /// Begins the end of the use of the device. From here on nothing new is mapped for it.
    pub(crate) fn begin_close(&self) {
        let mut state = self.state.write();
        if *state == State::Bound {
            *state = State::Ending;
        }
    }

    /// Ends the use of the device: calls `detach` with the address of each region. From here on
    /// nothing is mapped.
    pub(crate) fn close(&self, detach: impl Fn(usize)) {
        // A region that is dropped meanwhile waits for this lock.
        let regions = self.regions.lock();
        *self.state.write() = State::Unbound;
        for address in regions.keys() {
            detach(*address);
        }
    }
}

/// A device that mirrors map memory for, see
/// [`Mirror::for_device`](super::Mirror::for_device).
///
/// The files of a driver own this, for example, and create mirrors with it. It may outlive the
/// binding of the driver; creating a mirror fails then.
pub struct DmaDevice {
    /// Dropped by [`dma_device_drop`] only.
    dma: ManuallyDrop<Arc<Dma>>,
}

impl DmaDevice {
    #[inline]
    pub(crate) fn new(dma: &Arc<Dma>) -> Self {
        Self {
            dma: ManuallyDrop::new(dma.clone()),
        }
    }

    #[inline]
    pub(crate) fn dma(&self) -> &Arc<Dma> {
        &self.dma
    }
}

impl Clone for DmaDevice {
    #[inline]
    fn clone(&self) -> Self {
        Self::new(&self.dma)
    }
}

impl Drop for DmaDevice {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: This is the destructor: nothing uses the field after this.
        dma_device_drop(unsafe { ManuallyDrop::take(&mut self.dma) });
    }
}

#[inline(never)]
#[export_name = "rust_hmm_device_drop"]
fn dma_device_drop(dma: Arc<Dma>) {
    drop(dma);
}

/// What is mapped in the place of one page.
///
/// # Invariants
///
/// Zero, or a pfn with flags above it. `hmm_range_fault()` reported the page, and no invalidation
/// of it was completed since.
#[derive(Copy, Clone, PartialEq, Eq)]
struct Slot(usize);

impl Slot {
    const EMPTY: Self = Self(0);
    /// Set for every page, so that a pfn of zero is not empty.
    const USED: usize = 1 << (usize::BITS - 1);
    /// The device may have written to the page.
    const WRITABLE: usize = Self::USED >> 1;
    /// The page is in the device's own memory and has no DMA address.
    const DEVICE: usize = Self::USED >> 2;
    /// The page was mapped by the call of [`LeafMap::map`] that is running.
    const FRESH: usize = Self::USED >> 3;
    const FLAGS: usize = Self::USED | Self::WRITABLE | Self::DEVICE | Self::FRESH;

    fn new(pfn: HmmPfn) -> Option<Self> {
        let flags = match pfn.is_device() {
            true => Self::USED | Self::DEVICE,
            false => Self::USED,
        };
        Some(Self(pfn.pfn()? | flags))
    }

    fn has(self, flag: usize) -> bool {
        self.0 & flag != 0
    }

    fn is_mapped(self) -> bool {
        self.0 & (Self::USED | Self::DEVICE) == Self::USED
    }

    fn pfn(self) -> usize {
        self.0 & !Self::FLAGS
    }
}

/// The mappings of a leaf's pages.
///
/// # Invariants
///
/// - The device's driver is bound for as long as this exists.
/// - The page of each slot that [`Slot::is_mapped`] is mapped for DMA by the device: with `iova`,
///   at the offset of the slot; without, at the address in `addresses`.
pub(crate) struct LeafMap {
    dma: Arc<Dma>,
    /// Of size zero if the device has no IOMMU, or there was no room.
    iova: bindings::dma_iova_state,
    /// The address of each page, if there is no `iova`.
    addresses: KVec<DmaAddress>,
    slots: KVec<Slot>,
    used: usize,
}

impl LeafMap {
    /// Makes room for the mappings of `pages` pages. The result must be dropped while the driver is
    /// bound.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`].
    pub(crate) fn new(bound: &StaysBound<'_>, pages: usize) -> Result<KBox<Self>> {
        let dma = bound.dma.clone();
        let slots = KVec::from_elem(Slot::EMPTY, pages, GFP_KERNEL_ACCOUNT)?;
        let mut iova = bindings::dma_iova_state::default();
        // SAFETY: The driver is bound (see `bound`), and `iova` is valid for writes.
        let contiguous =
            unsafe { bindings::dma_iova_try_alloc(dma.raw(), &mut iova, 0, pages * PAGE_SIZE) };
        let addresses = match contiguous {
            true => KVec::new(),
            false => KVec::from_elem(0, pages, GFP_KERNEL_ACCOUNT)?,
        };
        // INVARIANT: The driver is bound. All slots are empty.
        let this = Self {
            dma,
            iova,
            addresses,
            slots,
            used: 0,
        };
        Ok(KBox::new(this, GFP_KERNEL_ACCOUNT)?)
    }

    fn has_iova(&self) -> bool {
        self.addresses.is_empty()
    }

    /// Maps `pfns`, the first of them in slot `first`. A page that is mapped already keeps its
    /// address.
    ///
    /// # Errors
    ///
    /// - [`ENOMEM`] if the IOMMU has no memory for its page table.
    /// - [`EIO`] if a page cannot be mapped for the device.
    ///
    /// No page is mapped then that was not mapped before.
    ///
    /// # Safety
    ///
    /// `hmm_range_fault()` reported the pages that are present, and no invalidation has collided.
    unsafe fn map(&mut self, first: usize, pfns: impl Iterator<Item = HmmPfn>) -> Result {
        let mut end = first;
        let mut result = Ok(());
        for (index, pfn) in (first..).zip(pfns) {
            let Some(slot) = Slot::new(pfn) else { continue };
            let Some(&old) = self.slots.get(index) else {
                result = Err(EINVAL);
                break;
            };
            let mut flags = old.0 & (Slot::WRITABLE | Slot::FRESH);
            if old == Slot::EMPTY {
                if slot.is_mapped() {
                    result = self.map_page(index, slot);
                    if result.is_err() {
                        break;
                    }
                }
                self.used += 1;
                flags = Slot::FRESH;
            } else if old.pfn() != slot.pfn() {
                // An invalidation would have ended the old mapping.
                kernel::warn_on!(true);
                result = Err(EIO);
                break;
            }
            if pfn.allows(Access::Write) {
                flags |= Slot::WRITABLE;
            }
            // INVARIANT: The page was mapped just now, or before, or needs no mapping. The caller
            // says that it was reported (see the # Safety section).
            self.slots[index] = Slot(slot.0 | flags);
            end = index + 1;
        }
        if result.is_ok() && self.has_iova() && end > first {
            let (start, len) = (first * PAGE_SIZE, (end - first) * PAGE_SIZE);
            // SAFETY: The driver is bound (see the type invariants), and the range lies in `iova`.
            result = to_result(unsafe {
                bindings::dma_iova_sync(self.dma.raw(), &mut self.iova, start, len)
            });
        }
        for index in first..end {
            let slot = self.slots[index];
            if !slot.has(Slot::FRESH) {
                continue;
            }
            self.slots[index] = Slot(slot.0 & !Slot::FRESH);
            if result.is_err() {
                self.slots[index] = Slot::EMPTY;
                self.used -= 1;
                if slot.is_mapped() {
                    self.unmap_run(index..index + 1);
                }
            }
        }
        // The device cannot have the page, whatever the reason.
        result.map_err(|err| if err == ENOMEM { ENOMEM } else { EIO })
    }

    /// Maps the page of `slot` at `index`. With an `iova`, the caller must synchronise it.
    ///
    /// Maps each page by itself: if the IOMMU mapped several pages as one, a part of them could not
    /// be unmapped.
    fn map_page(&mut self, index: usize, slot: Slot) -> Result {
        let dev = self.dma.raw();
        let phys = (slot.pfn() as bindings::phys_addr_t) << PAGE_SHIFT;
        if self.has_iova() {
            let offset = index * PAGE_SIZE;
            // SAFETY: The driver is bound (see the type invariants). The slot is empty, so nothing
            // is linked at this offset, which lies in `iova`.
            return to_result(unsafe {
                bindings::dma_iova_link(
                    dev,
                    &mut self.iova,
                    phys,
                    offset,
                    PAGE_SIZE,
                    DIRECTION,
                    ATTRS,
                )
            });
        }
        // SAFETY: The driver is bound (see the type invariants). The page is one of memory.
        let address = unsafe { bindings::dma_map_phys(dev, phys, PAGE_SIZE, DIRECTION, ATTRS) };
        // SAFETY: The driver is bound (see the type invariants).
        if unsafe { bindings::dma_mapping_error(dev, address) } != 0 {
            return Err(EIO);
        }
        self.addresses[index] = address;
        Ok(())
    }

    /// The DMA address of the page at `index`, which is mapped.
    fn address(&self, index: usize) -> DmaAddress {
        match self.addresses.get(index) {
            Some(address) => *address,
            None => self.iova.addr + (index * PAGE_SIZE) as DmaAddress,
        }
    }

    /// Ends the mappings of the slots in `part` for which `is_stale` is true. Marks the pages that
    /// the device may have written as dirty and accessed, each folio once.
    ///
    /// # Safety
    ///
    /// The pages of these slots were not freed.
    unsafe fn unmap(&mut self, part: Range<usize>, is_stale: impl Fn(usize) -> bool) {
        let mut run = 0..0;
        let mut dirty = core::ptr::null_mut();
        for index in part {
            let slot = self.slots[index];
            if slot == Slot::EMPTY || !is_stale(index) {
                continue;
            }
            self.slots[index] = Slot::EMPTY;
            self.used -= 1;
            if slot.is_mapped() {
                if run.end != index {
                    self.unmap_run(run);
                    run = index..index;
                }
                run.end = index + 1;
            }
            if slot.has(Slot::WRITABLE) {
                // SAFETY: The page was reported, so it has a `struct page`, and it was not freed
                // (see the # Safety section).
                let folio = unsafe { bindings::page_folio(bindings::pfn_to_page(slot.pfn())) };
                if folio != dirty {
                    // SAFETY: The folio was not freed, nor truncated: mm does either only after
                    // the invalidation. So its lock is not needed, as under a page table lock.
                    unsafe {
                        bindings::folio_mark_dirty(folio);
                        bindings::folio_mark_accessed(folio);
                    }
                    dirty = folio;
                }
            }
        }
        self.unmap_run(run);
    }

    /// Ends the mappings of a run of pages, whose slots the caller has emptied.
    fn unmap_run(&mut self, run: Range<usize>) {
        let dev = self.dma.raw();
        if run.is_empty() {
            return;
        }
        if self.has_iova() {
            let (start, len) = (run.start * PAGE_SIZE, run.len() * PAGE_SIZE);
            // SAFETY: The driver is bound (see the type invariants). All pages of the run were
            // linked with the same direction and attributes.
            unsafe { bindings::dma_iova_unlink(dev, &mut self.iova, start, len, DIRECTION, ATTRS) };
            return;
        }
        for address in &self.addresses[run] {
            // SAFETY: The driver is bound (see the type invariants). The page was mapped at this
            // address, with the same length, direction and attributes.
            unsafe { bindings::dma_unmap_phys(dev, *address, PAGE_SIZE, DIRECTION, ATTRS) };
        }
    }
}

impl Drop for LeafMap {
    fn drop(&mut self) {
        kernel::warn_on!(self.used != 0);
        if self.has_iova() {
            // SAFETY: The driver is bound (see the type invariants). `iova` was allocated, since
            // there are no addresses, and nothing is linked.
            unsafe { bindings::dma_iova_free(self.dma.raw(), &mut self.iova) };
        }
    }
}

/// The mappings of a region's pages, under the region's lock.
pub(crate) struct Maps(KVec<Option<KBox<LeafMap>>>);

impl Maps {
    /// Makes room for the mappings of `leaves` leaves.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`].
    pub(crate) fn new(leaves: usize) -> Result<Self> {
        let mut maps = KVec::with_capacity(leaves, GFP_KERNEL_ACCOUNT)?;
        for _ in 0..leaves {
            maps.push(None, GFP_KERNEL_ACCOUNT)?;
        }
        Ok(Self(maps))
    }

    /// Whether there is room for the mappings of a leaf.
    pub(crate) fn has_leaf(&self, leaf: usize) -> bool {
        matches!(self.0.get(leaf), Some(Some(_)))
    }

    /// Maps `pfns`, the first of them for page `first` of `leaf`. Uses `spare` if there is no room
    /// yet.
    ///
    /// # Errors
    ///
    /// Those of [`LeafMap::map`], and [`ENOMEM`] if there is no room and no `spare`.
    ///
    /// # Safety
    ///
    /// As for [`LeafMap::map`].
    pub(crate) unsafe fn map(
        &mut self,
        leaf: usize,
        first: usize,
        pfns: impl Iterator<Item = HmmPfn>,
        spare: &mut Option<KBox<LeafMap>>,
    ) -> Result {
        let place = self.0.get_mut(leaf).ok_or(EINVAL)?;
        if place.is_none() {
            *place = spare.take();
        }
        let map = place.as_mut().ok_or(ENOMEM)?;
        // SAFETY: The caller ensures the conditions (see the # Safety section).
        let result = unsafe { map.map(first, pfns) };
        if map.used == 0 {
            *spare = place.take();
        }
        result
    }

    /// The DMA address of page `page` of `leaf`, if it is mapped.
    pub(crate) fn address(&self, leaf: usize, page: usize) -> Option<DmaAddress> {
        let map = self.0.get(leaf)?.as_ref()?;
        map.slots.get(page)?.is_mapped().then(|| map.address(page))
    }

    /// Ends the mappings of those pages in `part` of `leaf` for which `is_stale` is true.
    ///
    /// # Safety
    ///
    /// As for [`LeafMap::unmap`].
    pub(crate) unsafe fn unmap(
        &mut self,
        leaf: usize,
        part: Range<usize>,
        is_stale: impl Fn(usize) -> bool,
    ) {
        let Some(place) = self.0.get_mut(leaf) else {
            return;
        };
        if let Some(map) = place {
            // SAFETY: The caller ensures the conditions (see the # Safety section).
            unsafe { map.unmap(part, is_stale) };
        }
        place.take_if(|map| map.used == 0);
    }

    /// The number of pages that have a mapping, or that the device can use in its own memory.
    #[cfg(CONFIG_RUST_HMM_KUNIT_TEST)]
    pub(crate) fn used(&self) -> usize {
        self.0.iter().flatten().map(|map| map.used).sum()
    }
}

/// The mappings of pages of system memory that a device copies.
#[cfg(CONFIG_RUST_HMM_DEVICE)]
pub(crate) struct MappedCopies<'a> {
    map: KBox<LeafMap>,
    // Dropped after the mappings.
    _bound: StaysBound<'a>,
}

#[cfg(CONFIG_RUST_HMM_DEVICE)]
impl<'a> MappedCopies<'a> {
    /// Maps those of `copies` that have a folio of system memory, of which `pfn` gives the number
    /// of the first page, and stores their addresses.
    ///
    /// # Errors
    ///
    /// [`EAGAIN`] if there is no memory or the driver is being unbound, [`ENODEV`] if it was, and
    /// [`EIO`] if a page cannot be mapped, or the pages of a folio not contiguously.
    ///
    /// # Safety
    ///
    /// The pages of system memory are in use until the result is dropped.
    pub(crate) unsafe fn new(
        dma: &'a Arc<Dma>,
        copies: &mut [PageCopy],
        pfn: impl Fn(&PageCopy) -> usize,
    ) -> Result<Self> {
        let later = |err| if err == ENOMEM { EAGAIN } else { err };
        let bound = Dma::stay_bound_for_copy(dma)?;
        let mut this = Self {
            map: LeafMap::new(&bound, copies.iter().map(|copy| copy.pages).sum()).map_err(later)?,
            _bound: bound,
        };
        let pfns = copies.iter().flat_map(|copy| {
            let first = (!copy.ram.is_null()).then(|| pfn(copy));
            (0..copy.pages).map(move |n| match first {
                Some(first) => HmmPfn::from_pfn(first + n),
                None => HmmPfn::NONE,
            })
        });
        // SAFETY: The pages are in use (see the # Safety section).
        unsafe { this.map.map(0, pfns) }.map_err(later)?;
        let mut next = 0;
        for copy in copies {
            let first = next;
            next += copy.pages;
            if copy.ram.is_null() {
                copy.bus = None;
                continue;
            }
            let bus = this.map.address(first);
            let address = |n: usize| bus + (n * PAGE_SIZE) as DmaAddress;
            if !(0..copy.pages).all(|n| this.map.address(first + n) == address(n)) {
                return Err(EIO);
            }
            copy.bus = Some(bus);
        }
        Ok(this)
    }

    /// The number of pages that are mapped.
    #[cfg(CONFIG_RUST_HMM_KUNIT_TEST)]
    pub(crate) fn mapped(&self) -> usize {
        self.map.used
    }
}

#[cfg(CONFIG_RUST_HMM_DEVICE)]
impl Drop for MappedCopies<'_> {
    fn drop(&mut self) {
        let pages = self.map.slots.len();
        // SAFETY: The pages are in use (see the # Safety section of `new()`).
        unsafe { self.map.unmap(0..pages, |_| true) };
    }
}
