// SPDX-License-Identifier: GPL-2.0

//! A device's memory as `struct page`s: chunks of it, and who owns a page of them.
//!
//! The memory is private: the CPU cannot reach it. A chunk is one `dev_pagemap`, made when memory
//! runs out and kept until the pool ends. Owns the free lists, the data that a driver keeps for a
//! page, and the order of the end. How pages get in and out is `migrate.rs`.
//!
//! Lock order: the locks of pages, then `slots`. `chunks` is a lock of its own: to add one, memory
//! is allocated and hot-plugged.
//!
//! C header: [`include/linux/memremap.h`](srctree/include/linux/memremap.h)

use super::{
    copy::CopyBatch,
    migrate::{
        self,
        MigrateReason,
        NewFolio, //
    },
    slots::{
        ChunkSlots,
        Order,
        Slots, //
    },
};
use core::{
    marker::PhantomData,
    mem::ManuallyDrop,
    ptr::{
        null_mut,
        NonNull, //
    }, //
};
use kernel::{
    bindings,
    error::from_err_ptr,
    new_mutex,
    new_spinlock,
    page::PAGE_SHIFT,
    prelude::*,
    sync::{
        Arc,
        Mutex,
        SpinLock, //
    },
    time::{
        delay::fsleep,
        Delta,
        Instant,
        Monotonic, //
    },
    types::{
        ForeignOwnable,
        Opaque, //
    }, //
};

kernel::declare_trace! {
    /// # Safety
    ///
    /// Always safe to call.
    unsafe fn hmm_pool_full(wanted: c_ulong);
}

/// What a driver keeps for each page of its memory that is in use.
///
/// The page owns it, from [`Mirror::migrate_to_device`](super::Mirror::migrate_to_device) to
/// [`PoolOps::page_freed`]. It outlives the mapping it was made for, since the page may: a child of
/// the process may be left with it. So nothing in it should lead to an address or an mm.
///
/// # Safety
///
/// [`PageData::borrow`] and [`PageData::from_raw`] give back what [`PageData::into_raw`] took.
pub unsafe trait PageData: Send + 'static {
    /// The data, while the page owns it.
    type Borrowed<'a>;

    /// Hands the data over.
    fn into_raw(self) -> *mut c_void;

    /// Looks at the data.
    ///
    /// # Safety
    ///
    /// `raw` is from [`PageData::into_raw`], and [`PageData::from_raw`] is not called in `'a`.
    unsafe fn borrow<'a>(raw: *mut c_void) -> Self::Borrowed<'a>;

    /// Takes the data back.
    ///
    /// # Safety
    ///
    /// `raw` is from [`PageData::into_raw`], and this is not called twice for it.
    unsafe fn from_raw(raw: *mut c_void) -> Self;
}

// SAFETY: As `ForeignOwnable` promises.
unsafe impl<T: Send + Sync + 'static> PageData for Arc<T> {
    type Borrowed<'a> = <Self as ForeignOwnable>::Borrowed<'a>;

    fn into_raw(self) -> *mut c_void {
        self.into_foreign()
    }

    unsafe fn borrow<'a>(raw: *mut c_void) -> Self::Borrowed<'a> {
        // SAFETY: By the caller's promise.
        unsafe { <Self as ForeignOwnable>::borrow(raw) }
    }

    unsafe fn from_raw(raw: *mut c_void) -> Self {
        // SAFETY: By the caller's promise.
        unsafe { <Self as ForeignOwnable>::from_foreign(raw) }
    }
}

// SAFETY: The pointer is the value; it has as many bits, since `RUST_HMM_DEVICE` is 64-bit only.
unsafe impl PageData for u64 {
    type Borrowed<'a> = u64;

    fn into_raw(self) -> *mut c_void {
        core::ptr::without_provenance_mut(self as usize)
    }

    unsafe fn borrow<'a>(raw: *mut c_void) -> Self::Borrowed<'a> {
        raw.addr() as u64
    }

    unsafe fn from_raw(raw: *mut c_void) -> u64 {
        raw.addr() as u64
    }
}

/// What a page has of its driver, without its type.
///
/// # Invariants
///
/// From [`PageData::into_raw`] of the page data of the driver whose pool the page is of.
pub(crate) struct RawData(*mut c_void);

impl RawData {
    /// # Safety
    ///
    /// It is for pages of a pool whose driver has this page data.
    #[inline]
    pub(crate) unsafe fn new(data: impl PageData) -> Self {
        // INVARIANT: By the safety requirements.
        Self(data.into_raw())
    }
}

/// What a driver implements to have memory of its own.
///
/// Addresses are in bytes from the start of the device's memory.
pub trait PoolOps: Send + Sync + 'static {
    /// What the driver keeps for each page.
    type PageData: PageData;

    /// Copies what `batch` says, all of it, before this returns.
    ///
    /// # Context
    ///
    /// May sleep, and allocate. The pages are locked, and `mmap_lock` may be held: it may not
    /// access user memory, nor call the core, and a lock that it takes may not be held where that
    /// is done.
    ///
    /// # Errors
    ///
    /// On any, and if `batch` is not at its end, all pages stay where they were and what was copied
    /// is thrown away. Pages that were to move to system memory are then asked for one by one. What
    /// happens to a CPU that waits for one of them depends on the error:
    ///
    /// - [`EAGAIN`], [`EBUSY`] and [`EINTR`] ask to be called again: the CPU waits, killably, and
    ///   faults once more.
    /// - On all others the CPU gets SIGBUS.
    fn copy(&self, batch: &mut CopyBatch<'_>) -> Result;

    /// Reads the device's memory at `address`, for [`Mirror::read`](super::Mirror::read).
    ///
    /// The bytes lie in one page, which is in use. Others may read and write it meanwhile.
    ///
    /// # Context
    ///
    /// The region's lock is held for read: what [`MirrorOps::invalidate`](super::MirrorOps) may not
    /// do, this may not either, but sleep. A lock that it takes may not be held elsewhere over an
    /// allocation that waits.
    fn read(&self, address: usize, buf: &mut [u8]);

    /// Writes it, for [`Mirror::write`](super::Mirror::write); as [`PoolOps::read`] for the rest.
    fn write(&self, address: usize, buf: &[u8]);

    /// A page has moved to RAM; it will be freed soon. May not sleep.
    fn migrated_to_ram(
        &self,
        data: <Self::PageData as PageData>::Borrowed<'_>,
        reason: MigrateReason,
    );

    /// A page was freed: here is the data that it had. Called once for each.
    ///
    /// # Context
    ///
    /// Atomic, below a page table's lock or with pages locked. It may take spinlocks that nobody
    /// holds while memory is allocated or a user's page touched. What the data leads to may not
    /// sleep in its destructor, an mm least of all.
    fn page_freed(&self, data: Self::PageData);
}

/// [`PoolOps`] without their type: what the core calls.
pub(crate) trait Ops: Send + Sync {
    fn copy(&self, batch: &mut CopyBatch<'_>) -> Result;
    fn read(&self, address: usize, buf: &mut [u8]);
    fn write(&self, address: usize, buf: &[u8]);

    /// # Safety
    ///
    /// `data` is that of a page of a pool with these ops, which is not freed meanwhile.
    unsafe fn migrated_to_ram(&self, data: *mut c_void, reason: MigrateReason);

    /// # Safety
    ///
    /// `data` was that of a page of a pool with these ops; the page does not have it any more.
    unsafe fn page_freed(&self, data: *mut c_void);
}

impl<T: PoolOps> Ops for T {
    fn copy(&self, batch: &mut CopyBatch<'_>) -> Result {
        PoolOps::copy(self, batch)
    }

    fn read(&self, address: usize, buf: &mut [u8]) {
        PoolOps::read(self, address, buf)
    }

    fn write(&self, address: usize, buf: &[u8]) {
        PoolOps::write(self, address, buf)
    }

    unsafe fn migrated_to_ram(&self, data: *mut c_void, reason: MigrateReason) {
        // SAFETY: The data of a page is a `RawData`, so from `into_raw()` of this type; it is given
        // up when the page is freed.
        PoolOps::migrated_to_ram(self, unsafe { T::PageData::borrow(data) }, reason)
    }

    unsafe fn page_freed(&self, data: *mut c_void) {
        // SAFETY: As above; the caller gives it up.
        PoolOps::page_freed(self, unsafe { T::PageData::from_raw(data) })
    }
}

/// What the chunks, the mirrors and the [`DevicePool`] share.
#[pin_data]
pub(crate) struct Pool {
    ops: Arc<dyn Ops>,
    name: &'static CStr,
    chunk_pages: usize,
    /// They go when the pool ends, and not before.
    #[pin]
    chunks: Mutex<KVec<Pin<KBox<Chunk>>>>,
    #[pin]
    slots: SpinLock<Slots>,
}

/// A range of physical addresses that nothing else uses.
struct MemRegion {
    start: usize,
    len: usize,
}

impl MemRegion {
    fn new(len: usize, name: &'static CStr) -> Result<Self> {
        // SAFETY: `name` is static, and the root of the resources is.
        let resource = from_err_ptr(unsafe {
            bindings::request_free_mem_region(
                &raw mut bindings::iomem_resource,
                len,
                name.as_char_ptr(),
            )
        })?;
        Ok(Self {
            // SAFETY: The resource is ours until it is released.
            start: unsafe { (*resource).start } as usize,
            // SAFETY: As above. The length may have been rounded up.
            len: unsafe { (*resource).end + 1 - (*resource).start } as usize,
        })
    }
}

impl Drop for MemRegion {
    fn drop(&mut self) {
        // SAFETY: Requested with this start and length.
        unsafe {
            bindings::__release_region(
                &raw mut bindings::iomem_resource,
                self.start as u64,
                self.len as u64,
            )
        };
    }
}

/// A part of the device's memory that has `struct page`s.
///
/// # Invariants
///
/// `pagemap` is mapped, at `region`, from the end of [`Chunk::new`] until the chunk is dropped.
#[pin_data(PinnedDrop)]
struct Chunk {
    #[pin]
    pagemap: Opaque<bindings::dev_pagemap>,
    region: MemRegion,
    /// The number of the first page in the device's memory.
    first: usize,
    pool: Arc<Pool>,
}

// SAFETY: A pagemap may be used and unmapped by any task.
unsafe impl Send for Chunk {}
// SAFETY: What mm changes in the pagemap it changes atomically.
unsafe impl Sync for Chunk {}

static PAGEMAP_OPS: bindings::dev_pagemap_ops = bindings::dev_pagemap_ops {
    folio_free: Some(folio_free),
    migrate_to_ram: Some(migrate::migrate_to_ram),
    memory_failure: None,
    folio_split: None,
};

impl Chunk {
    /// Makes struct pages for the pages from `first` on.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`], [`ERANGE`] if there are no physical addresses left, and what mm says where it
    /// has no ZONE_DEVICE.
    fn new(pool: Arc<Pool>, first: usize) -> Result<Pin<KBox<Self>>> {
        let len = pool.chunk_pages << PAGE_SHIFT;
        let region = MemRegion::new(len, pool.name)?;
        let start = region.start as u64;
        let owner = pool.as_owner();
        KBox::pin_init(
            try_pin_init!(Self {
                region,
                first,
                pool,
                // Last, since a pagemap that is mapped has to be unmapped.
                //
                // INVARIANT: It is unmapped in `PinnedDrop`.
                pagemap <- Opaque::try_ffi_init(|slot: *mut bindings::dev_pagemap| {
                    // SAFETY: `slot` is valid for writes; all fields may be zero.
                    unsafe { slot.write_bytes(0, 1) };
                    // SAFETY: As above.
                    unsafe {
                        (*slot).type_ = bindings::memory_type_MEMORY_DEVICE_PRIVATE;
                        (*slot).ops = &PAGEMAP_OPS;
                        (*slot).owner = owner;
                        (*slot).nr_range = 1;
                        *(*slot).__bindgen_anon_1.range.as_mut() = bindings::range {
                            start,
                            end: start + len as u64 - 1,
                        };
                    }
                    // SAFETY: `slot` stays where it is until it is unmapped, and what mm asks for
                    // is set. The range was requested, and nothing else uses it.
                    from_err_ptr(unsafe {
                        bindings::memremap_pages(slot, bindings::NUMA_NO_NODE)
                    })?;
                    Ok::<_, Error>(())
                }),
            }? Error),
            GFP_KERNEL,
        )
    }

    /// The pfn of its first page.
    fn first_pfn(&self) -> usize {
        self.region.start >> PAGE_SHIFT
    }
}

#[pinned_drop]
impl PinnedDrop for Chunk {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: By the type invariants it is mapped. This waits for the last page to be freed;
        // `Pool::close` has seen to that, if any was ever taken.
        unsafe { bindings::memunmap_pages(self.pagemap.get()) };
    }
}

/// The chunk that `page` is of.
///
/// # Safety
///
/// `page` is of a chunk, of any pool of this crate, and it or the chunk is not freed in `'a`.
unsafe fn chunk_of<'a>(page: *mut bindings::page) -> &'a Chunk {
    // SAFETY: The page is valid.
    let pagemap = unsafe { bindings::page_pgmap(page) };
    // SAFETY: The pagemap is the field of a chunk, by the caller's promise; the chunk waits for its
    // pages.
    unsafe { &*kernel::container_of!(Opaque::cast_from(pagemap), Chunk, pagemap) }
}

/// The pool that `page` is of.
///
/// # Safety
///
/// As for [`chunk_of`].
pub(crate) unsafe fn pool_of<'a>(page: *mut bindings::page) -> &'a Arc<Pool> {
    // SAFETY: By the caller's promise.
    &unsafe { chunk_of(page) }.pool
}

/// The address of `page` in the device's memory.
///
/// # Safety
///
/// As for [`chunk_of`].
pub(crate) unsafe fn address_of(page: *mut bindings::page) -> usize {
    // SAFETY: By the caller's promise.
    let chunk = unsafe { chunk_of(page) };
    // SAFETY: The page is valid.
    let pfn = unsafe { bindings::page_to_pfn(page) };
    (chunk.first + (pfn - chunk.first_pfn())) << PAGE_SHIFT
}

/// The data of `page`.
///
/// # Safety
///
/// `page` is of a chunk, and there is a reference to it.
pub(crate) unsafe fn data_of(page: *mut bindings::page) -> *mut c_void {
    // SAFETY: The page is the head of its folio, since there are no larger ones.
    unsafe { bindings::folio_zone_device_data(page.cast()) }
}

/// Called by mm when the last reference to a page is gone.
///
/// # Safety
///
/// `folio` is a page of a chunk.
unsafe extern "C" fn folio_free(folio: *mut bindings::folio) {
    let page: *mut bindings::page = folio.cast();
    // SAFETY: The chunk waits for the page, which mm has not given back yet.
    let (pool, address) = unsafe { (pool_of(page), address_of(page)) };
    // SAFETY: Nobody else has the page.
    let data = unsafe { data_of(page) };
    // SAFETY: As above.
    unsafe { bindings::folio_set_zone_device_data(folio, null_mut()) };
    // SAFETY: It was set when the page was taken, and the page does not have it any more.
    unsafe { pool.ops.page_freed(data) };
    pool.give_back(core::iter::once(address));
}

impl Pool {
    fn new(
        name: &'static CStr,
        ops: Arc<dyn Ops>,
        chunk_pages: usize,
        max_chunks: usize,
    ) -> Result<Arc<Self>> {
        let slots = Slots::new(chunk_pages, max_chunks)?;
        let init = pin_init!(Self {
            ops,
            name,
            chunk_pages,
            chunks <- new_mutex!(KVec::new(), "hmm_chunks"),
            slots <- new_spinlock!(slots, "hmm_slots"),
        });
        Arc::pin_init(init, GFP_KERNEL)
    }

    /// Makes the pages at `addresses` free.
    fn give_back(&self, addresses: impl Iterator<Item = usize>) {
        let mut slots = self.slots.lock();
        let mut freed = Ok(());
        for address in addresses {
            freed = freed.and(slots.free(address >> PAGE_SHIFT));
        }
        drop(slots);
        kernel::warn_on!(freed.is_err());
    }

    pub(crate) fn ops(&self) -> &dyn Ops {
        &*self.ops
    }

    /// What tells the pages of this pool from those of others, to mm.
    pub(crate) fn as_owner(&self) -> *mut c_void {
        (&raw const *self).cast_mut().cast()
    }

    /// The owner of the pages of a pool, or null, which no device-private page has as its owner:
    /// `memremap_pages()` refuses that.
    pub(crate) fn owner(this: Option<&Arc<Self>>) -> *mut c_void {
        this.map_or(null_mut(), |this| this.as_owner())
    }

    /// Whether `page` is one of the pool that has this `owner`.
    ///
    /// # Safety
    ///
    /// `page` is valid, and not freed meanwhile.
    pub(crate) unsafe fn owns(owner: *mut c_void, page: *mut bindings::page) -> bool {
        // SAFETY: By the caller's promise.
        if owner.is_null() || !unsafe { bindings::is_device_private_page(page) } {
            return false;
        }
        // SAFETY: Every device-private page has a pagemap for as long as it is in use.
        unsafe { (*bindings::page_pgmap(page)).owner == owner }
    }

    /// Copies from `page` at `offset` to `buf`.
    ///
    /// # Safety
    ///
    /// `page` is of a chunk and not freed meanwhile; the bytes lie in it.
    pub(crate) unsafe fn read(page: *mut bindings::page, offset: usize, buf: &mut [u8]) {
        // SAFETY: By the caller's promise.
        let (pool, address) = unsafe { (pool_of(page), address_of(page)) };
        pool.ops.read(address + offset, buf);
    }

    /// Copies `buf` to `page` at `offset`.
    ///
    /// # Safety
    ///
    /// As for [`Pool::read`].
    pub(crate) unsafe fn write(page: *mut bindings::page, offset: usize, buf: &[u8]) {
        // SAFETY: By the caller's promise.
        let (pool, address) = unsafe { (pool_of(page), address_of(page)) };
        pool.ops.write(address + offset, buf);
    }

    /// Takes `wanted` pages for what is to come: free ones, those of a new chunk, or those that the
    /// oldest in use leave when they are evicted. `pfns` has an element for each, and for those
    /// that [`Reservation::fill`] takes later. If none is wanted now, a chunk is added where there
    /// is no free page.
    ///
    /// # Context
    ///
    /// Sleeps; no page is locked, and `mmap_lock` is not held.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`] if pages are wanted and there is not one to be had, [`EINTR`] on a fatal signal.
    pub(crate) fn reserve<'a>(
        this: &'a Arc<Self>,
        pfns: &'a mut [usize],
        wanted: usize,
    ) -> Result<Reservation<'a>> {
        /// What one task makes free another may take: this is how often that is put up with.
        const ROUNDS: usize = 16;

        let mut reservation = Reservation {
            pool: this,
            pfns,
            taken: 0,
            used: 0,
        };
        if wanted == 0 {
            if !this.slots.lock().can_alloc() {
                Self::grow(this);
            }
            return Ok(reservation);
        }
        for _ in 0..ROUNDS {
            if kernel::current!().fatal_signal_pending() {
                return Err(EINTR);
            }
            reservation.fill(wanted);
            let missing = wanted - reservation.taken;
            if missing == 0 || !(Self::grow(this) || this.make_room(missing)) {
                break;
            }
        }
        if reservation.taken == 0 {
            // SAFETY: Always safe to call.
            unsafe { hmm_pool_full(wanted) };
            return Err(ENOMEM);
        }
        Ok(reservation)
    }

    /// Adds a chunk, if there may be one more. Whether it is worth while to look for pages again.
    fn grow(this: &Arc<Self>) -> bool {
        if this.slots.lock().next_chunk().is_none() {
            return false;
        }
        let mut chunks = this.chunks.lock();
        let slots = this.slots.lock();
        if slots.can_alloc() {
            // Another task was here first.
            return true;
        }
        let next = slots.next_chunk();
        drop(slots);
        let Some(first) = next else {
            return false;
        };
        let mut add_chunk = || {
            let chunk = Chunk::new(this.clone(), first)?;
            let slots = ChunkSlots::new(this.chunk_pages, chunk.first_pfn())?;
            chunks.push(chunk, GFP_KERNEL)?;
            this.slots.lock().add_chunk(slots)
        };
        add_chunk().is_ok()
    }

    /// Evicts pages until there is room for `wanted`. Whether there is room for one.
    fn make_room(&self, wanted: usize) -> bool {
        let mut made = 0;
        // Where many pages are somebody's who does not let go, it is not worth to ask for all.
        let mut tries = wanted / migrate::BATCH + 8;
        while made < wanted && tries > 0 && !kernel::current!().fatal_signal_pending() {
            match self.evict(migrate::GFP_TRY, wanted - made) {
                Ok(Some(0)) => migrate::drain(),
                Ok(Some(evicted)) => made += evicted,
                // All are on their way, or there is no RAM.
                Ok(None) | Err(ENOMEM) => break,
                // The device does not copy these.
                Err(_) => {}
            }
            tries -= 1;
        }
        made != 0
    }

    /// Evicts those of the oldest pages that can be moved, `most` of them and no more than a batch,
    /// to pages that are allocated with `gfp`. Returns how many have moved, or `None` if there are
    /// none in use.
    ///
    /// The caller sees to it that the pool does not end.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`], and those of the driver, if it was that why none came.
    fn evict(&self, gfp: bindings::gfp_t, most: usize) -> Result<Option<usize>> {
        let mut pfns = [0; migrate::BATCH];
        let pfns = &mut pfns[..most.min(migrate::BATCH)];
        let count = self.slots.lock().oldest(pfns);
        if count == 0 {
            return Ok(None);
        }
        // SAFETY: The pages are of chunks of this pool, which does not end.
        unsafe { migrate::evict(self, &mut pfns[..count], gfp) }.map(Some)
    }

    /// Brings home all pages in use, with as many tries as there are batches and some more.
    fn evict_all(&self) -> Result {
        let mut result = Ok(());
        for _ in 0..self.used_pages() / migrate::BATCH + 8 {
            if kernel::current!().fatal_signal_pending() {
                return Err(EINTR);
            }
            match self.evict(migrate::GFP_REQUEST, migrate::BATCH) {
                Ok(None) => break,
                Ok(Some(0)) => migrate::drain(),
                Ok(Some(_)) => {}
                // What reclaim has not found now it does not find for the next batch.
                Err(ENOMEM) => return Err(ENOMEM),
                Err(err) => result = Err(err),
            }
        }
        match self.used_pages() {
            0 => Ok(()),
            _ => result.and(Err(EBUSY)),
        }
    }

    /// The pages at `addresses` are those of a process from now on. They are locked.
    pub(crate) fn settle(&self, addresses: impl Iterator<Item = usize>) {
        let mut slots = self.slots.lock();
        addresses.for_each(|address| slots.settle(address >> PAGE_SHIFT));
    }

    /// The pages at `addresses` are a process's no longer. They are locked.
    pub(crate) fn leave(&self, addresses: impl Iterator<Item = usize>) {
        let mut slots = self.slots.lock();
        addresses.for_each(|address| slots.leave(address >> PAGE_SHIFT));
    }

    /// Whether the page at `address`, which is locked, is that of a process.
    pub(crate) fn is_used(&self, address: usize) -> bool {
        self.slots.lock().is_used(address >> PAGE_SHIFT)
    }

    /// The pfns of the oldest pages.
    #[cfg(CONFIG_RUST_HMM_KUNIT_TEST)]
    pub(crate) fn oldest(&self, pfns: &mut [usize]) -> usize {
        self.slots.lock().oldest(pfns)
    }

    /// The number of chunks.
    #[cfg(CONFIG_RUST_HMM_KUNIT_TEST)]
    pub(crate) fn chunks(&self) -> usize {
        self.chunks.lock().len()
    }

    /// The pages that are not free.
    pub(crate) fn used_pages(&self) -> usize {
        let slots = self.slots.lock();
        slots.pages() - slots.free_pages()
    }

    /// Ends the pool: no page is taken any more, those in use come home, and the chunks go.
    ///
    /// Waits for as long as it takes: the data of processes is in there.
    fn close(&self) {
        const REPORT: Delta = Delta::from_secs(10);
        const MAX_PAUSE: Delta = Delta::from_secs(1);

        self.slots.lock().close();
        let mut since = Instant::<Monotonic>::now();
        let mut pause = Delta::from_millis(1);
        loop {
            let mut result = Ok(());
            for _ in 0..=self.used_pages() / migrate::BATCH {
                let evicted = self.evict(migrate::GFP_MUST, migrate::BATCH);
                result = result.and(evicted.map(drop));
            }
            let used = self.used_pages();
            if used == 0 {
                break;
            }
            if result.is_ok() {
                migrate::drain();
            }
            if since.elapsed() > REPORT {
                match result {
                    Ok(()) => pr_warn!("{}: {} pages are still in use\n", self.name, used),
                    Err(err) => pr_warn!("{}: {} pages left: {:?}\n", self.name, used, err),
                }
                since = Instant::now();
            }
            // A device that has failed is asked again, but need not cost a CPU.
            fsleep(pause);
            pause = (pause * 2).min(MAX_PAUSE);
        }
        let chunks = core::mem::take(&mut *self.chunks.lock());
        drop(chunks);
    }
}

/// Pages of a pool that are nobody's yet. What is left of them goes back.
///
/// # Invariants
///
/// The pages `pfns[used..taken]` are taken from the pool, and nobody has a reference to them.
pub(crate) struct Reservation<'a> {
    pool: &'a Arc<Pool>,
    pfns: &'a mut [usize],
    taken: usize,
    used: usize,
}

impl Reservation<'_> {
    /// Takes free pages until there are `wanted` that are left, as far as there are any.
    pub(crate) fn fill(&mut self, wanted: usize) {
        let end = self.used + wanted;
        let mut slots = self.pool.slots.lock();
        for pfn in self.pfns.iter_mut().take(end).skip(self.taken) {
            let Some(page) = slots.alloc(Order::PAGE) else {
                break;
            };
            // INVARIANT: Taken just now.
            *pfn = slots.pfn(page);
            self.taken += 1;
        }
    }

    /// The pages that are left.
    fn left(&self) -> &[usize] {
        self.pfns.get(self.used..self.taken).unwrap_or(&[])
    }

    /// Whether the pages are of `pool`.
    pub(crate) fn is_of(&self, pool: &Pool) -> bool {
        core::ptr::eq(&**self.pool, pool)
    }

    /// Whether no page is left.
    pub(crate) fn is_used_up(&self) -> bool {
        self.left().is_empty()
    }

    /// Makes the next of the pages one that has `data`, if one is left.
    pub(crate) fn folio(&mut self, data: RawData) -> Option<NewFolio> {
        let pfn = *self.left().first()?;
        // INVARIANT: The page is not among those that are left any more.
        self.used += 1;
        // SAFETY: The chunk has a struct page for each of its pages, and cannot go while one of
        // them is in use.
        let page = unsafe { bindings::pfn_to_page(pfn) };
        // SAFETY: As above; nobody has a reference to the page, and its chunk's pagemap is alive.
        unsafe {
            bindings::zone_device_folio_init(page.cast(), bindings::page_pgmap(page), 0);
        };
        // SAFETY: The page is device-private, and ours alone.
        unsafe { bindings::folio_set_zone_device_data(page.cast(), data.0) };
        // SAFETY: mm has locked it and given it one reference.
        Some(unsafe { NewFolio::new(NonNull::new(page.cast())?) })
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        // SAFETY: As in `folio()`.
        let address = |pfn: &usize| unsafe { address_of(bindings::pfn_to_page(*pfn)) };
        self.pool.give_back(self.left().iter().map(address));
    }
}

/// Memory of a device, as `struct page`s that anonymous memory can migrate to.
///
/// It starts empty and grows by chunks, as pages are migrated to it. When it is full the pages that
/// came first are evicted.
///
/// Dropping it is the orderly end: no page comes any more, all that are in use are brought home,
/// with their processes none the wiser, and the struct pages go. That waits for whoever has a page
/// locked, for memory, and for [`PoolOps::copy`] to succeed: what processes have in there is not
/// lost. Drop it where sleeping is fine, with no lock held that [`PoolOps`] takes, and not in a
/// callback. As with other registrations, a module that leaks it cannot be removed safely.
pub struct DevicePool<T: PoolOps> {
    pool: ManuallyDrop<Arc<Pool>>,
    // Invariant: a pool of one driver is not that of another with other page data.
    _ops: PhantomData<fn(T) -> T>,
}

impl<T: PoolOps> DevicePool<T> {
    /// Makes a pool that grows up to `max_chunks` chunks of `chunk_pages` pages each.
    ///
    /// Nothing of the device's memory may be used by anyone else: all of it is the pool's.
    ///
    /// # Errors
    ///
    /// [`EINVAL`] if there are no chunks, if `chunk_pages` is no multiple of 512, or if there are
    /// `u32::MAX` pages or more in all; [`ENOMEM`].
    #[inline]
    pub fn new(
        name: &'static CStr,
        ops: Arc<T>,
        chunk_pages: usize,
        max_chunks: usize,
    ) -> Result<Self> {
        Ok(Self {
            pool: ManuallyDrop::new(pool_new(name, ops, chunk_pages, max_chunks)?),
            _ops: PhantomData,
        })
    }

    /// Brings home all pages that are in use, as before the device loses power.
    ///
    /// Others may come meanwhile: it is for the driver to see that none does.
    ///
    /// # Context
    ///
    /// Sleeps; holds no lock that [`PoolOps`] takes, and is no callback.
    ///
    /// # Errors
    ///
    /// [`EBUSY`] if some are still there, since somebody has references to them; [`ENOMEM`], and
    /// those of [`PoolOps::copy`], if it was that why; [`EINTR`] on a fatal signal.
    #[inline]
    pub fn evict(&self) -> Result {
        pool_evict(&self.pool)
    }

    #[inline]
    pub(crate) fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }
}

impl<T: PoolOps> Drop for DevicePool<T> {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: Nothing uses the field after this.
        pool_drop(unsafe { ManuallyDrop::take(&mut self.pool) });
    }
}

#[inline(never)]
#[export_name = "hmm_pool_new"]
fn pool_new(
    name: &'static CStr,
    ops: Arc<dyn Ops>,
    chunk_pages: usize,
    max_chunks: usize,
) -> Result<Arc<Pool>> {
    Pool::new(name, ops, chunk_pages, max_chunks)
}

#[inline(never)]
#[export_name = "hmm_pool_evict"]
fn pool_evict(pool: &Arc<Pool>) -> Result {
    pool.evict_all()
}

#[inline(never)]
#[export_name = "hmm_pool_drop"]
fn pool_drop(pool: Arc<Pool>) {
    pool.close();
}
