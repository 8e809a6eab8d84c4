// SPDX-License-Identifier: GPL-2.0

//! A device's memory as `struct page`s: chunks of it, and who owns a page of them.
//!
//! The memory is private: the CPU cannot reach it. A chunk is one `dev_pagemap`, made when memory
//! runs out and kept until the pool ends. Owns the chunks, the free lists and the data that a driver
//! keeps for a page. How pages get in and out is above this.
//!
//! Lock order: the locks of pages, then `slots`. `chunks` is a lock of its own: to add one, memory
//! is allocated and hot-plugged.
//!
//! C header: [`include/linux/memremap.h`](srctree/include/linux/memremap.h)

use super::{
    callback::Callback,
    folio::NewFolio,
    pool_ops::{
        Ops,
        RawData, //
    },
    slots::{
        ChunkSlots,
        Node,
        Order,
        Slots, //
    }, //
};
use core::ptr::{
    null_mut,
    NonNull, //
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
    types::Opaque, //
};

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
    pagemap_ops: &'static bindings::dev_pagemap_ops,
    /// The code of `ops`; null, if that is built into the kernel.
    module: *mut bindings::module,
}

// SAFETY: `module` is only ever compared; the rest is `Send`.
unsafe impl Send for Pool {}
// SAFETY: As above; the rest is `Sync`.
unsafe impl Sync for Pool {}

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
        let (owner, ops) = (pool.as_owner(), pool.pagemap_ops);
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
                        (*slot).ops = ops;
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
        // `close()` in `evict.rs` has seen to that, if any was ever taken.
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
pub(crate) unsafe extern "C" fn folio_free(folio: *mut bindings::folio) {
    let page: *mut bindings::page = folio.cast();
    // SAFETY: The chunk waits for the page, which mm has not given back yet.
    let (pool, address) = unsafe { (pool_of(page), address_of(page)) };
    // SAFETY: Nobody else has the page.
    let data = unsafe { data_of(page) };
    // SAFETY: As above.
    unsafe { bindings::folio_set_zone_device_data(folio, null_mut()) };
    let callback = Callback::begin();
    // SAFETY: It was set when the page was taken, and the page does not have it any more.
    unsafe { pool.ops.page_freed(data) };
    drop(callback);
    pool.give_back(core::iter::once(address));
}

impl Pool {
    /// `pagemap_ops` are those of [`folio_free`] and of the CPU's faults. `module` has the code of
    /// `ops`.
    pub(crate) fn new(
        pagemap_ops: &'static bindings::dev_pagemap_ops,
        module: *mut bindings::module,
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
            pagemap_ops,
            module,
        });
        Arc::pin_init(init, GFP_KERNEL)
    }

    /// The name that the driver gave it.
    pub(crate) fn name(&self) -> &'static CStr {
        self.name
    }

    /// The module that has the code of its driver, or null.
    pub(crate) fn module(&self) -> *mut bindings::module {
        self.module
    }

    /// Whether there is something to take.
    pub(crate) fn can_alloc(&self) -> bool {
        self.slots.lock().can_alloc()
    }

    /// From now on nothing is taken and no chunk added.
    pub(crate) fn stop(&self) {
        self.slots.lock().close();
    }

    /// Gives the chunks back, once no page is in use.
    pub(crate) fn free_chunks(&self) {
        // With the lock held: who comes second finds that they are gone, and not on their way.
        let mut chunks = self.chunks.lock();
        *chunks = KVec::new();
    }

    /// The pfns of the oldest pages in use. Each is the youngest then.
    pub(crate) fn rotate_oldest(&self, pfns: &mut [usize]) -> usize {
        self.slots.lock().rotate_oldest(pfns)
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

    /// Adds a chunk, if there may be one more. Whether it is worth while to look for pages again.
    pub(crate) fn grow(this: &Arc<Self>) -> bool {
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

    /// The pages at these addresses are those of a process from now on, and are to return to these
    /// nodes. They are locked.
    pub(crate) fn mark_used(&self, pages: impl Iterator<Item = (usize, Node)>) {
        let mut slots = self.slots.lock();
        pages.for_each(|(address, node)| slots.mark_used(address >> PAGE_SHIFT, node));
    }

    /// The pages at `addresses` are a process's no longer. They are locked.
    pub(crate) fn mark_unused(&self, addresses: impl Iterator<Item = usize>) {
        let mut slots = self.slots.lock();
        addresses.for_each(|address| slots.mark_unused(address >> PAGE_SHIFT));
    }

    /// The node that the page at `address`, which is locked, is to return to; `None` if it is not
    /// that of a process.
    pub(crate) fn node(&self, address: usize) -> Option<Node> {
        self.slots.lock().node(address >> PAGE_SHIFT)
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

impl<'a> Reservation<'a> {
    /// No page yet. `pfns` has an element for each that [`Reservation::fill`] may take.
    pub(crate) fn new(pool: &'a Arc<Pool>, pfns: &'a mut [usize]) -> Self {
        // INVARIANT: None are taken.
        Self {
            pool,
            pfns,
            taken: 0,
            used: 0,
        }
    }

    /// How many pages were taken.
    pub(crate) fn taken(&self) -> usize {
        self.taken
    }

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
        unsafe { bindings::folio_set_zone_device_data(page.cast(), data.into_raw()) };
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
