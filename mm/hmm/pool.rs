// SPDX-License-Identifier: GPL-2.0

//! The memory of a device as `struct page`s: of type `MEMORY_DEVICE_PRIVATE` if the CPU cannot
//! access it, and of type `MEMORY_DEVICE_COHERENT` if it can.
//!
//! A pool consists of chunks, each with one `dev_pagemap`. It adds a chunk when it has no free page
//! left, and keeps all chunks until it ends. Coherent memory is one chunk, from the start. This
//! file owns the chunks, the page allocator and the data that the driver keeps for each page. The
//! migration of pages is built on it, in other files.
//!
//! Lock order: folio locks, the locks of a page table and of an LRU list, then `page_data`, then
//! `slots`. The latter two disable interrupts, since interrupt handlers take the lock of an LRU
//! list. `chunks` is taken with no folio lock held, since adding a chunk allocates memory and
//! hot-plugs it.
//!
//! C header: [`include/linux/memremap.h`](srctree/include/linux/memremap.h)

use super::{
    callback::Callback,
    coherent::CoherentMemory,
    copy::CopyBatch,
    dma::Dma,
    folio::NewFolio,
    pool_ops::{
        CpuAccess,
        MigrateReason,
        Ops,
        RawData, //
    },
    rwsem::{
        ReadGuard,
        RwSem, //
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
    new_spinlock_irq,
    page::PAGE_SHIFT,
    prelude::*,
    revocable::Revocable,
    str::CString,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        static_lock_class,
        Arc,
        Mutex,
        SpinLockIrq, //
    },
    types::Opaque,
    workqueue::{
        self,
        impl_has_work,
        new_work,
        Work,
        WorkItem, //
    }, //
};

/// The state that the chunks, the mirrors and the [`DevicePool`](super::DevicePool) of a pool
/// share.
#[pin_data]
pub(crate) struct Pool {
    /// What the driver implements. Revoked when the device is lost.
    #[pin]
    ops: Revocable<DriverOps>,
    /// Held for read during calls of the driver that may sleep, and while the data of new pages is
    /// set, so that [`Pool::give_up`] waits for them.
    #[pin]
    calls: RwSem<()>,
    /// The driver, as long as it has data of pages. Locked while data is given back, and while a
    /// folio is split, which copies its data.
    #[pin]
    page_data: SpinLockIrq<Option<Arc<dyn Ops>>>,
    /// Whether the device is lost. The driver is not asked for copies any more.
    lost: Atomic<bool>,
    /// A copy, since the driver may go before the chunks.
    name: CString,
    chunk_pages: usize,
    /// The physical address of coherent memory, in bytes.
    coherent: Option<usize>,
    /// The coherent memory, until the [`DevicePool`](super::DevicePool) has ended and there is no
    /// chunk.
    #[pin]
    memory: Mutex<Option<CoherentMemory>>,
    /// Held while the driver is given up.
    #[pin]
    giving_up: Mutex<()>,
    /// Whether the `DevicePool` has ended, and nobody will ask for the memory.
    ended: Atomic<bool>,
    /// The chunks. They are removed only when the pool ends.
    #[pin]
    chunks: Mutex<KVec<Pin<KBox<Chunk>>>>,
    #[pin]
    slots: SpinLockIrq<Slots>,
    pagemap_ops: &'static bindings::dev_pagemap_ops,
    /// The device, if it copies by DMA.
    dma: Option<Arc<Dma>>,
    /// The module that has the code of `ops`, or null if that is built into the kernel.
    module: *mut bindings::module,
    /// Removes the chunks of a lost device when its last page is free.
    #[pin]
    work: Work<Self>,
}

impl_has_work! {
    impl HasWork<Self> for Pool { self.work }
}

impl WorkItem for Pool {
    type Pointer = Arc<Self>;

    fn run(this: Arc<Self>) {
        this.free_chunks();
        if this.ended.load(Relaxed) {
            drop(this.memory.lock().take());
        }
    }
}

/// What the driver of a pool implements.
#[derive(Clone)]
pub(crate) struct DriverOps {
    pub(crate) ops: Arc<dyn Ops>,
    /// Only if the device is made of software.
    pub(crate) cpu: Option<Arc<dyn CpuAccess>>,
}

/// The driver of a pool, for calls that may sleep.
pub(crate) struct Driver<'a> {
    pool: &'a Pool,
    _calls: ReadGuard<'a, ()>,
}

impl Driver<'_> {
    fn ops(&self) -> &DriverOps {
        // SAFETY: `Pool::driver()` has seen that the ops are not revoked, with `calls` held.
        // `Pool::give_up()` revokes them with `calls` held for write.
        unsafe { self.pool.ops.access() }
    }

    /// Calls [`PoolOps::copy`](super::PoolOps::copy). The caller has a [`Callback`].
    ///
    /// # Errors
    ///
    /// Those of the driver. [`ENODEV`] means that the device is lost.
    pub(crate) fn copy(&self, batch: &mut CopyBatch<'_>) -> Result {
        if self.pool.is_lost() {
            return Err(ENODEV);
        }
        let result = self.ops().ops.copy(batch);
        if result == Err(ENODEV) {
            self.pool.set_lost();
        }
        result
    }
}

// SAFETY: `module` is only compared and never dereferenced. All other fields are `Send`.
unsafe impl Send for Pool {}
// SAFETY: `module` is only compared and never dereferenced. All other fields are `Sync`.
unsafe impl Sync for Pool {}

/// A reserved range of physical addresses, in bytes. Dropping it releases the range.
struct MemRegion {
    start: usize,
    len: usize,
}

impl MemRegion {
    /// `name` must stay valid for as long as the result.
    fn new(len: usize, name: &CStr) -> Result<Self> {
        // SAFETY: `iomem_resource` is a static resource, and `name` outlives the resource.
        let resource = from_err_ptr(unsafe {
            bindings::request_free_mem_region(
                &raw mut bindings::iomem_resource,
                len,
                name.as_char_ptr(),
            )
        })?;
        Ok(Self {
            // SAFETY: `request_free_mem_region()` has returned a resource, which is valid until
            // `drop()` releases it.
            start: unsafe { (*resource).start } as usize,
            // The length may have been rounded up.
            //
            // SAFETY: `request_free_mem_region()` has returned a resource, which is valid until
            // `drop()` releases it.
            len: unsafe { (*resource).end + 1 - (*resource).start } as usize,
        })
    }
}

impl Drop for MemRegion {
    fn drop(&mut self) {
        // SAFETY: `request_free_mem_region()` has reserved a resource with this start and length,
        // and this is the only release of it.
        unsafe {
            bindings::__release_region(
                &raw mut bindings::iomem_resource,
                self.start as u64,
                self.len as u64,
            )
        };
    }
}

/// The ops of coherent memory, on which no CPU faults, and whose folios are all small.
static COHERENT_OPS: bindings::dev_pagemap_ops = bindings::dev_pagemap_ops {
    folio_free: Some(folio_free),
    migrate_to_ram: None,
    memory_failure: None,
    folio_split: None,
};

/// Where the memory of a pool is for the CPU.
pub(crate) enum Space {
    /// Nowhere: each of up to `max_chunks` chunks reserves a range of free physical addresses.
    Private {
        chunk_pages: usize,
        max_chunks: usize,
    },
    /// At physical addresses that the CPU reaches.
    Coherent(CoherentMemory),
}

/// A part of the device's memory, with its `struct page`s.
///
/// # Invariants
///
/// `memremap_pages()` has mapped `pagemap` at `start`. It stays mapped until the chunk is dropped.
#[pin_data(PinnedDrop)]
struct Chunk {
    #[pin]
    pagemap: Opaque<bindings::dev_pagemap>,
    /// The physical address, in bytes.
    start: usize,
    /// What is reserved for private memory.
    _region: Option<MemRegion>,
    /// The number of the chunk's first page, counted from the start of the device's memory.
    first: usize,
    pool: Arc<Pool>,
}

// SAFETY: Any task may use and unmap a pagemap. All other fields are `Send`.
unsafe impl Send for Chunk {}
// SAFETY: This crate does not change a mapped pagemap, and mm synchronises its own changes (of the
// reference count, for example). All other fields are `Sync`.
unsafe impl Sync for Chunk {}

impl Chunk {
    /// Makes `struct page`s for the `chunk_pages` pages of the device's memory from page number
    /// `first` on. Sleeps.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`] if there is no memory, [`ERANGE`] if no range of physical addresses is free, and
    /// other errors of `memremap_pages()`, if the architecture cannot hot-plug memory, for example.
    fn new(pool: Arc<Pool>, first: usize) -> Result<Pin<KBox<Self>>> {
        let len = pool.chunk_pages << PAGE_SHIFT;
        let (start, region) = match pool.coherent {
            Some(start) => (start, None),
            None => {
                let region = MemRegion::new(len, &pool.name)?;
                (region.start, Some(region))
            }
        };
        let range = bindings::range {
            start: start as u64,
            end: (start + len) as u64 - 1,
        };
        let pfns = (start >> PAGE_SHIFT..).take(pool.chunk_pages);
        let ops = match pool.is_coherent() {
            true => &COHERENT_OPS,
            false => pool.pagemap_ops,
        };
        let (owner, type_) = (pool.as_owner(), pool.memory_type());
        let nid = match pool.is_coherent() {
            // SAFETY: Always safe to call.
            true => unsafe { bindings::phys_to_target_node(range.start) },
            false => bindings::NUMA_NO_NODE,
        };
        KBox::pin_init(
            try_pin_init!(Self {
                start,
                _region: region,
                first,
                pool,
                // Initialise this field last: if a later one failed, nothing would unmap it.
                //
                // INVARIANT: `memremap_pages()` maps the pagemap, and only `PinnedDrop` unmaps it.
                pagemap <- Opaque::try_ffi_init(|slot: *mut bindings::dev_pagemap| {
                    // SAFETY: `slot` is valid for writes (see `try_ffi_init()`), and all fields of
                    // a `dev_pagemap` may be zero.
                    unsafe { slot.write_bytes(0, 1) };
                    // SAFETY: `slot` is valid for writes (see `try_ffi_init()`), and was zeroed
                    // above.
                    unsafe {
                        (*slot).type_ = type_;
                        (*slot).ops = ops;
                        (*slot).owner = owner;
                        (*slot).nr_range = 1;
                        *(*slot).__bindgen_anon_1.range.as_mut() = range;
                    }
                    // SAFETY: `slot` is pinned until `PinnedDrop` has unmapped it. The fields that
                    // `memremap_pages()` needs for this type are set. The range is reserved, by
                    // `region` or the `memory` of the pool, so nothing else uses it.
                    from_err_ptr(unsafe {
                        bindings::memremap_pages(slot, nid)
                    })?;
                    for pfn in pfns {
                        // SAFETY: `memremap_pages()` has made a `struct page` for the pfn, which
                        // nobody else uses yet.
                        unsafe {
                            let page = bindings::pfn_to_page(pfn);
                            set_data(page, no_data());
                        }
                    }
                    Ok::<_, Error>(())
                }),
            }? Error),
            GFP_KERNEL,
        )
    }

    /// The pfn of the chunk's first page.
    fn first_pfn(&self) -> usize {
        self.start >> PAGE_SHIFT
    }
}

#[pinned_drop]
impl PinnedDrop for Chunk {
    fn drop(self: Pin<&mut Self>) {
        // This waits until all pages are free. They are, since `close()` in `evict.rs` has evicted
        // all pages before, or the chunk was never used.
        //
        // SAFETY: The pagemap is mapped (see the type invariants), and this is the only place that
        // unmaps it.
        unsafe { bindings::memunmap_pages(self.pagemap.get()) };
    }
}

/// The chunk that `page` belongs to.
///
/// # Safety
///
/// `page` must belong to a chunk of a pool of this crate, and the page or the chunk must not be
/// freed during `'a`.
unsafe fn chunk_of<'a>(page: *mut bindings::page) -> &'a Chunk {
    // SAFETY: The page belongs to a chunk that is not freed (see the # Safety section), so its
    // `struct page` is valid and has a pagemap.
    let pagemap = unsafe { bindings::page_pgmap(page) };
    // SAFETY: The page belongs to a chunk (see the # Safety section), so the pagemap is the field
    // of a `Chunk`. The chunk is not freed during `'a`: the caller ensures that, or that the page
    // is not freed, for which the drop of the chunk waits.
    unsafe { &*kernel::container_of!(Opaque::cast_from(pagemap), Chunk, pagemap) }
}

/// The pool that `page` belongs to.
///
/// # Safety
///
/// The same as for [`chunk_of`].
pub(crate) unsafe fn pool_of<'a>(page: *mut bindings::page) -> &'a Arc<Pool> {
    // SAFETY: The page belongs to a chunk, and the page or the chunk is not freed during `'a` (see
    // the # Safety section).
    &unsafe { chunk_of(page) }.pool
}

/// The address of `page` in the device's memory, in bytes from its start.
///
/// # Safety
///
/// The same as for [`chunk_of`], while this function runs.
pub(crate) unsafe fn address_of(page: *mut bindings::page) -> usize {
    // SAFETY: The page belongs to a chunk, and the page or the chunk is not freed meanwhile (see
    // the # Safety section).
    let chunk = unsafe { chunk_of(page) };
    // SAFETY: The `struct page` is valid, since its chunk is not freed.
    let pfn = unsafe { bindings::page_to_pfn(page) };
    (chunk.first + (pfn - chunk.first_pfn())) << PAGE_SHIFT
}

/// The driver's data of `page`, which is the first page of its folio: the pointer of its
/// [`RawData`].
///
/// Unlike `folio_zone_device_data()`, this may be called for a page that is free and was a tail.
///
/// # Safety
///
/// `page` must belong to a chunk, and must not be the tail of a folio in use. The chunk must not be
/// freed meanwhile.
pub(crate) unsafe fn data_of(page: *mut bindings::page) -> *mut c_void {
    // SAFETY: The page has a `struct page`, since its chunk is not freed. mm does not use the
    // field, except in tails (see the # Safety section).
    unsafe { (*page).__bindgen_anon_1.__bindgen_anon_4.zone_device_data }
}

/// Sets what [`data_of`] returns.
///
/// # Safety
///
/// As for [`data_of`], and nobody else accesses the data of `page` meanwhile.
unsafe fn set_data(page: *mut bindings::page, data: *mut c_void) {
    // SAFETY: As in `data_of()`. Nobody else accesses the field (see the # Safety section).
    unsafe { (*page).__bindgen_anon_1.__bindgen_anon_4.zone_device_data = data };
}

/// `folio_free` of the `dev_pagemap_ops`. `free_zone_device_folio()` calls it when the last
/// reference to a folio is gone. May be called in atomic context.
///
/// # Safety
///
/// `folio` must be a folio of a chunk, and nobody may have a reference to it.
pub(crate) unsafe extern "C" fn folio_free(folio: *mut bindings::folio) {
    let page: *mut bindings::page = folio.cast();
    // SAFETY: The page belongs to a chunk (see the # Safety section). The chunk is not freed
    // meanwhile: `free_zone_device_folio()` gives up the page's reference to the pagemap, for which
    // the chunk's drop waits, after this returns.
    let (pool, address) = unsafe { (pool_of(page), address_of(page)) };
    let page_data = pool.page_data.lock();
    let order = pool.slots.lock().folio_order(address >> PAGE_SHIFT);
    for tail in 1..order.pages() {
        // SAFETY: These are the other pages of the folio. mm has no use for what it keeps in them
        // any more: `free_zone_device_folio()` has read what it needs.
        unsafe { set_data(page.add(tail), no_data()) };
    }
    if let Some(ops) = &*page_data {
        // SAFETY: The page belongs to a chunk, and nobody has a reference to it (see the # Safety
        // section). `page_data` is locked.
        unsafe { free_data(page, order, &**ops) };
    }
    drop(page_data);
    Pool::give_back(pool, core::iter::once(address));
}

/// `folio_split` of the `dev_pagemap_ops`: `tail` was a part of the folio `head`, and is a folio of
/// one page now. Called for each tail, and then once with null, with spinlocks held.
///
/// # Safety
///
/// `head` is a folio of a chunk, which is locked. Nobody can free `tail` before the last call.
pub(crate) unsafe extern "C" fn folio_split(
    head: *mut bindings::folio,
    tail: *mut bindings::folio,
) {
    let page: *mut bindings::page = head.cast();
    if !tail.is_null() {
        // SAFETY: `tail` is a folio of the same chunk, and mm waits for this function before it
        // uses it. `clear_compound_head()` has cleared the field.
        unsafe {
            let tail = &mut (*tail).__bindgen_anon_1.__bindgen_anon_1;
            tail.__bindgen_anon_1.pgmap = bindings::page_pgmap(page);
        }
        return;
    }
    // SAFETY: The page belongs to a chunk, and is not freed meanwhile (see the # Safety section).
    let (pool, address) = unsafe { (pool_of(page), address_of(page)) };
    let page_data = pool.page_data.lock();
    let mut slots = pool.slots.lock();
    let order = slots.folio_order(address >> PAGE_SHIFT);
    slots.split(address >> PAGE_SHIFT);
    drop(slots);
    // SAFETY: The page belongs to a chunk, and is not freed meanwhile.
    let data = unsafe { data_of(page) };
    // Otherwise `Pool::give_up()` has given the data back already.
    let ops = page_data.as_ref().filter(|_| data != no_data());
    let _callback = Callback::begin();
    for tail in 1..order.pages() {
        let data = match ops {
            // SAFETY: The head has this data and is not freed meanwhile.
            Some(ops) => unsafe { ops.clone_data(data) },
            None => no_data(),
        };
        // SAFETY: The page was a tail, and is not freed meanwhile. `page_data` is locked.
        unsafe { set_data(page.add(tail), data) };
    }
}

/// What a page has in the place of data, if it has none. Null may be the number 0.
fn no_data() -> *mut c_void {
    static NO_DATA: u8 = 0;
    (&raw const NO_DATA).cast_mut().cast()
}

/// Gives the data of `page`, the first one of a folio of `order`, back to the driver, unless it has
/// none.
///
/// # Safety
///
/// `page` belongs to a chunk of the pool with these `ops`, whose `page_data` is locked.
unsafe fn free_data(page: *mut bindings::page, order: Order, ops: &dyn Ops) {
    // SAFETY: The page belongs to a chunk (see the # Safety section).
    let data = unsafe { data_of(page) };
    if data == no_data() {
        return;
    }
    // SAFETY: Nobody else accesses the data (see the # Safety section).
    unsafe { set_data(page, no_data()) };
    let _callback = Callback::begin();
    // SAFETY: `Reservation::folio()` has set the data, from a `RawData` for a page of this pool.
    // The page does not use the data any more, since the pointer was cleared above.
    unsafe { ops.page_freed(data, order.pages()) };
}

impl Pool {
    /// Creates a pool without chunks in `space`.
    ///
    /// `pagemap_ops` has [`folio_free`] and the handler of CPU faults. `module` is the module that
    /// has the code of `ops`, or null.
    ///
    /// # Errors
    ///
    /// Those of [`Slots::new`] and [`CoherentMemory::bounds`], and [`ENOMEM`].
    pub(crate) fn new(
        pagemap_ops: &'static bindings::dev_pagemap_ops,
        module: *mut bindings::module,
        name: &CStr,
        ops: DriverOps,
        dma: Option<Arc<Dma>>,
        space: Space,
    ) -> Result<Arc<Self>> {
        let (chunk_pages, max_chunks, coherent, memory) = match space {
            Space::Private {
                chunk_pages,
                max_chunks,
            } => (chunk_pages, max_chunks, None, None),
            Space::Coherent(memory) => {
                let (start, pages) = memory.bounds()?;
                (pages, 1, Some(start), Some(memory))
            }
        };
        let slots = Slots::new(chunk_pages, max_chunks)?;
        let name = CString::try_from(name)?;
        let init = try_pin_init!(Self {
            page_data <- new_spinlock_irq!(Some(ops.ops.clone()), "hmm_page_data"),
            ops <- Revocable::new(ops),
            calls <- RwSem::new((), c"hmm_pool::calls", static_lock_class!()),
            lost: Atomic::new(false),
            name,
            chunk_pages,
            coherent,
            memory <- new_mutex!(memory, "hmm_memory"),
            giving_up <- new_mutex!((), "hmm_giving_up"),
            ended: Atomic::new(false),
            chunks <- new_mutex!(KVec::new(), "hmm_chunks"),
            slots <- new_spinlock_irq!(slots, "hmm_slots"),
            pagemap_ops,
            dma,
            module,
            work <- new_work!("hmm_pool"),
        }? Error);
        Arc::pin_init(init, GFP_KERNEL)
    }

    /// The name that the driver gave the pool.
    pub(crate) fn name(&self) -> &CStr {
        &self.name
    }

    /// Whether the CPU reaches the memory.
    pub(crate) fn is_coherent(&self) -> bool {
        self.coherent.is_some()
    }

    /// The type of the pages.
    fn memory_type(&self) -> bindings::memory_type {
        match self.is_coherent() {
            true => bindings::memory_type_MEMORY_DEVICE_COHERENT,
            false => bindings::memory_type_MEMORY_DEVICE_PRIVATE,
        }
    }

    /// What `migrate_vma_setup()` is to collect for a migration to system memory.
    pub(crate) fn select(&self) -> bindings::migrate_vma_direction {
        match self.is_coherent() {
            true => bindings::migrate_vma_direction_MIGRATE_VMA_SELECT_DEVICE_COHERENT,
            false => bindings::migrate_vma_direction_MIGRATE_VMA_SELECT_DEVICE_PRIVATE,
        }
    }

    /// The largest folio of the pool. mm is not ready for large folios of coherent memory:
    /// `migrate_vma_collect_huge_pmd()` takes them for system memory, and
    /// `migrate_device_coherent_folio()`, which GUP calls, warns about them.
    pub(crate) fn max_order(&self) -> Order {
        match self.is_coherent() {
            true => Order::PAGE,
            false => Order::MAX,
        }
    }

    /// The address at which the CPU finds the start of the memory, or null if it does not.
    pub(crate) fn cpu_address(&self) -> *mut u8 {
        match self.coherent {
            // SAFETY: The memory has a `struct page` for this pfn while there is a chunk, and the
            // address is only computed here.
            Some(start) => unsafe {
                bindings::page_address(bindings::pfn_to_page(start >> PAGE_SHIFT)).cast()
            },
            None => null_mut(),
        }
    }

    /// The driver, for calls that may sleep.
    ///
    /// # Errors
    ///
    /// [`ENODEV`] if the device is lost.
    pub(crate) fn driver(&self) -> Result<Driver<'_>> {
        self.driver_with(self.calls.read())
    }

    fn driver_with<'a>(&'a self, calls: ReadGuard<'a, ()>) -> Result<Driver<'a>> {
        if self.is_lost() || self.ops.try_access().is_none() {
            return Err(ENODEV);
        }
        Ok(Driver {
            pool: self,
            _calls: calls,
        })
    }

    /// Tells the driver that the folios with these first pages, of `pages` pages each, have
    /// migrated to system memory.
    ///
    /// # Safety
    ///
    /// The folios belong to chunks of this pool, and are referenced.
    pub(crate) unsafe fn migrated_to_ram(
        &self,
        heads: impl Iterator<Item = *mut bindings::page>,
        pages: usize,
        reason: MigrateReason,
    ) {
        // Otherwise the driver has got the data of the pages back.
        let Some(driver) = self.ops.try_access() else {
            return;
        };
        let _callback = Callback::begin();
        for head in heads {
            // SAFETY: The folio is of this pool and is referenced (see the # Safety section), so
            // its data is still there: `Pool::give_up()` waits for the guard.
            unsafe { driver.ops.migrated_to_ram(data_of(head), pages, reason) };
        }
    }

    /// Whether the device is lost.
    pub(crate) fn is_lost(&self) -> bool {
        self.lost.load(Relaxed)
    }

    /// Marks the device as lost. Does not sleep.
    pub(crate) fn set_lost(&self) {
        self.lost.store(true, Relaxed);
        self.stop();
    }

    /// Gives up the driver of a lost device: waits for its callbacks, and gives the data of all
    /// pages back. The chunks stay until the last page is free. Sleeps.
    ///
    /// `poison` takes the pages of coherent memory away from the processes.
    pub(crate) fn give_up(this: &Arc<Self>, poison: fn(&Self)) {
        this.set_lost();
        let _giving_up = this.giving_up.lock();
        let calls = this.calls.write();
        let driver = this.ops.try_access().map(|driver| (*driver).clone());
        // Another task may have done it.
        let Some(driver) = driver else { return };
        // This waits for the callbacks that do not sleep.
        this.ops.revoke();
        // Nobody sets data of new pages any more.
        drop(calls);
        if this.is_coherent() {
            poison(this);
        }
        let chunks = this.chunks.lock();
        for chunk in chunks.iter() {
            let mut offset = 0;
            while offset < this.chunk_pages {
                let page_data = this.page_data.lock();
                let order = this.slots.lock().folio_order(chunk.first + offset);
                if let Some(ops) = &*page_data {
                    // SAFETY: The chunk has a `struct page` for this pfn, which is not a tail.
                    // `page_data` is locked.
                    unsafe {
                        let page = bindings::pfn_to_page(chunk.first_pfn() + offset);
                        free_data(page, order, &**ops);
                    }
                }
                offset += order.pages();
            }
        }
        drop(chunks);
        let ops = this.page_data.lock().take();
        // Not under a lock: these may be the last references to what the driver implements.
        drop((ops, driver));
        let mut slots = this.slots.lock();
        slots.orphan();
        let idle = slots.is_idle();
        drop(slots);
        if idle {
            this.free_chunks();
        }
    }

    /// The module that has the driver's code, or null if that is built into the kernel. The pool
    /// holds no reference to the module.
    pub(crate) fn module(&self) -> *mut bindings::module {
        self.module
    }

    /// The device, if it copies by DMA.
    pub(crate) fn dma(&self) -> Option<&Arc<Dma>> {
        self.dma.as_ref()
    }

    /// Whether a block of this order can be allocated.
    pub(crate) fn can_alloc(&self, order: Order) -> bool {
        self.slots.lock().can_alloc(order)
    }

    /// Allocates a block, and returns the pfn of its first page.
    fn alloc(&self, order: Order) -> Option<usize> {
        let mut slots = self.slots.lock();
        let page = slots.alloc(order)?;
        Some(slots.pfn(page))
    }

    /// Stops the allocation of pages and the addition of chunks.
    pub(crate) fn stop(&self) {
        self.slots.lock().close();
    }

    /// Removes all chunks. No page may be in use. Sleeps.
    pub(crate) fn free_chunks(&self) {
        // Drop the chunks with the lock held, so that another task that ends the pool at the same
        // time (when its module is unloaded, for example) does not return before the chunks are
        // gone.
        let mut chunks = self.chunks.lock();
        *chunks = KVec::new();
    }

    /// Ends the [`DevicePool`](super::DevicePool). Returns coherent memory, or has it released when
    /// the last chunk goes, if there is one.
    pub(crate) fn end(&self) -> Option<CoherentMemory> {
        self.ended.store(true, Relaxed);
        // With the lock held, so that `run()` does not remove the chunks after they were seen, and
        // before it could see that the pool has ended.
        let chunks = self.chunks.lock();
        match chunks.is_empty() {
            true => self.memory.lock().take(),
            false => None,
        }
    }

    /// Fills `pfns` with the pfns of the oldest folios in use, makes these the youngest, and
    /// returns how many there are, and their order, which is the same for all.
    pub(crate) fn rotate_oldest(&self, pfns: &mut [usize]) -> (usize, Order) {
        self.slots.lock().rotate_oldest(pfns)
    }

    /// Frees the pages at `addresses`.
    fn give_back(this: &Arc<Self>, addresses: impl Iterator<Item = usize>) {
        let mut slots = this.slots.lock();
        let mut freed = Ok(());
        for address in addresses {
            freed = freed.and(slots.free(address >> PAGE_SHIFT));
        }
        let was_last = slots.is_orphan() && slots.is_idle();
        drop(slots);
        kernel::warn_on!(freed.is_err());
        if was_last {
            // If it is enqueued already, it has not begun.
            let _ = workqueue::system_dfl().enqueue(this.clone());
        }
    }

    /// The `owner` of the pool's pagemaps, by which mm tells the pages of this pool from those of
    /// others.
    pub(crate) fn as_owner(&self) -> *mut c_void {
        (&raw const *self).cast_mut().cast()
    }

    /// The `owner` of the pages of `this`, or null if there is no pool or the device is lost. No
    /// device-private page has a null owner, since `memremap_pages()` refuses that.
    pub(crate) fn owner(this: Option<&Arc<Self>>) -> *mut c_void {
        match this {
            Some(this) if !this.is_lost() => this.as_owner(),
            _ => null_mut(),
        }
    }

    /// Whether `page` belongs to the pool that has this `owner`.
    ///
    /// # Safety
    ///
    /// `page` must be valid and must not be freed meanwhile.
    pub(crate) unsafe fn owns(owner: *mut c_void, page: *mut bindings::page) -> bool {
        // SAFETY: The page is valid (see the # Safety section).
        if owner.is_null() || !unsafe { bindings::is_zone_device_page(page) } {
            return false;
        }
        // SAFETY: The page is in ZONE_DEVICE and is not freed meanwhile (see the # Safety section),
        // so its pagemap is valid.
        unsafe { (*bindings::page_pgmap(page)).owner == owner }
    }

    /// Whether `page`, which is coherent memory, belongs to a pool whose device is lost.
    ///
    /// # Safety
    ///
    /// `page` must be valid and must not be freed meanwhile.
    pub(crate) unsafe fn is_lost_page(page: *mut bindings::page) -> bool {
        // SAFETY: The page is one of a device and is not freed meanwhile (see the # Safety
        // section), so its pagemap is valid.
        let is_own = unsafe { core::ptr::eq((*bindings::page_pgmap(page)).ops, &COHERENT_OPS) };
        // SAFETY: These ops are those of chunks of coherent pools.
        is_own && unsafe { pool_of(page) }.is_lost()
    }

    /// The address of `page` in the device's memory, in bytes from its start.
    ///
    /// # Safety
    ///
    /// `page` must belong to a chunk and must not be freed meanwhile.
    pub(crate) unsafe fn address(page: *mut bindings::page) -> usize {
        // SAFETY: The page belongs to a chunk and is not freed meanwhile (see the # Safety
        // section).
        unsafe { address_of(page) }
    }

    /// Copies from `page` to `buf`, starting at `offset` bytes in the page. Returns `false` if the
    /// device is lost, or is not made of software.
    ///
    /// # Safety
    ///
    /// `page` must belong to a chunk and must not be freed meanwhile. The bytes must lie in the
    /// page.
    pub(crate) unsafe fn read(page: *mut bindings::page, offset: usize, buf: &mut [u8]) -> bool {
        // SAFETY: The page belongs to a chunk and is not freed meanwhile (see the # Safety
        // section).
        let (pool, address) = unsafe { (pool_of(page), address_of(page)) };
        if pool.is_coherent() {
            if pool.is_lost() {
                return false;
            }
            // SAFETY: The CPU reaches the page, which is not freed meanwhile, and the bytes lie in
            // it (see the # Safety section). C code copies them, so a concurrent access by the
            // process can only mix old and new bytes.
            unsafe { bindings::memcpy_from_page(buf.as_mut_ptr().cast(), page, offset, buf.len()) };
            return true;
        }
        pool.access(|cpu| cpu.read(address + offset, buf))
    }

    /// Copies `buf` to `page`, starting at `offset` bytes in the page. Returns `false` as
    /// [`Pool::read`] does.
    ///
    /// # Safety
    ///
    /// The same as for [`Pool::read`].
    pub(crate) unsafe fn write(page: *mut bindings::page, offset: usize, buf: &[u8]) -> bool {
        // SAFETY: The page belongs to a chunk and is not freed meanwhile (see the # Safety
        // section).
        let (pool, address) = unsafe { (pool_of(page), address_of(page)) };
        if pool.is_coherent() {
            if pool.is_lost() {
                return false;
            }
            // SAFETY: The CPU reaches the page, which is not freed meanwhile, and the bytes lie in
            // it (see the # Safety section). C code copies them, so a concurrent access by the
            // process can only mix old and new bytes.
            unsafe { bindings::memcpy_to_page(page, offset, buf.as_ptr().cast(), buf.len()) };
            return true;
        }
        pool.access(|cpu| cpu.write(address + offset, buf))
    }

    /// Does not wait for [`Pool::give_up`], since the caller holds a region's lock: calls that
    /// `give_up()` waits for may be in reclaim, and wait for that lock.
    fn access(&self, f: impl FnOnce(&dyn CpuAccess)) -> bool {
        let calls = self.calls.try_read().ok_or(EBUSY);
        let driver = calls.and_then(|calls| self.driver_with(calls));
        let cpu = driver
            .as_ref()
            .ok()
            .and_then(|driver| driver.ops().cpu.as_ref());
        cpu.map(|cpu| f(&**cpu)).is_some()
    }

    /// Adds a chunk, unless the pool has all its chunks or is closed. Returns whether the caller
    /// should try again to allocate a block of this order. Sleeps.
    pub(crate) fn grow(this: &Arc<Self>, order: Order) -> bool {
        if this.slots.lock().next_chunk().is_none() {
            return false;
        }
        let mut chunks = this.chunks.lock();
        let slots = this.slots.lock();
        if slots.can_alloc(order) {
            // Another task has added a chunk or freed pages.
            return true;
        }
        let next = slots.next_chunk();
        drop(slots);
        let Some(first) = next else {
            return false;
        };
        Self::add_chunk(this, &mut chunks, first).is_ok()
    }

    fn add_chunk(this: &Arc<Self>, chunks: &mut KVec<Pin<KBox<Chunk>>>, first: usize) -> Result {
        let chunk = Chunk::new(this.clone(), first)?;
        let slots = ChunkSlots::new(this.chunk_pages, chunk.first_pfn())?;
        chunks.push(chunk, GFP_KERNEL)?;
        this.slots.lock().add_chunk(slots)
    }

    /// Adds the only chunk of coherent memory. Sleeps.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`], and those of `memremap_pages()`.
    pub(crate) fn add_coherent(this: &Arc<Self>) -> Result {
        let added = Self::add_chunk(this, &mut this.chunks.lock(), 0);
        if added.is_err() {
            this.free_chunks();
        }
        added
    }

    /// Records that the pages at these addresses hold pages of processes now, and to which NUMA
    /// node each should return. The pages must be locked.
    pub(crate) fn mark_used(&self, pages: impl Iterator<Item = (usize, Node)>) {
        let mut slots = self.slots.lock();
        pages.for_each(|(address, node)| slots.mark_used(address >> PAGE_SHIFT, node));
    }

    /// Records that the pages at `addresses` no longer hold pages of processes. The pages must be
    /// locked.
    pub(crate) fn mark_unused(&self, addresses: impl Iterator<Item = usize>) {
        let mut slots = self.slots.lock();
        addresses.for_each(|address| slots.mark_unused(address >> PAGE_SHIFT));
    }

    /// The NUMA node that the page at `address` should return to, or `None` if it holds no page of
    /// a process. The page must be locked.
    pub(crate) fn node(&self, address: usize) -> Option<Node> {
        self.slots.lock().node(address >> PAGE_SHIFT)
    }

    /// The number of chunks.
    #[cfg(CONFIG_RUST_HMM_KUNIT_TEST)]
    pub(crate) fn chunks(&self) -> usize {
        self.chunks.lock().len()
    }

    /// The number of pages that are not free.
    pub(crate) fn used_pages(&self) -> usize {
        let slots = self.slots.lock();
        slots.pages() - slots.free_pages()
    }
}

/// Pages that were allocated from a pool and are not in use yet. Dropping it frees those that are
/// left.
///
/// # Invariants
///
/// `pfns[used..taken]` are the pfns of pages that were allocated from the pool, and nobody has a
/// reference to these pages.
pub(crate) struct Reservation<'a> {
    pool: &'a Arc<Pool>,
    pfns: &'a mut [usize],
    taken: usize,
    used: usize,
}

impl<'a> Reservation<'a> {
    /// Creates an empty reservation. `pfns` must have an element for each page that
    /// [`Reservation::fill`] allocates.
    pub(crate) fn new(pool: &'a Arc<Pool>, pfns: &'a mut [usize]) -> Self {
        // INVARIANT: `pfns[0..0]` is empty.
        Self {
            pool,
            pfns,
            taken: 0,
            used: 0,
        }
    }

    /// How many pages were allocated, including those that are in use by now.
    pub(crate) fn taken(&self) -> usize {
        self.taken
    }

    /// Allocates pages until `wanted` pages are left in the reservation, or until the pool has no
    /// free page.
    pub(crate) fn fill(&mut self, wanted: usize) {
        let end = self.used + wanted;
        let mut slots = self.pool.slots.lock();
        for pfn in self.pfns.iter_mut().take(end).skip(self.taken) {
            let Some(page) = slots.alloc(Order::PAGE) else {
                break;
            };
            // INVARIANT: The page was allocated just now, so nobody has a reference to it.
            *pfn = slots.pfn(page);
            self.taken += 1;
        }
    }

    /// The pfns of the pages that are left.
    fn left(&self) -> &[usize] {
        self.pfns.get(self.used..self.taken).unwrap_or(&[])
    }

    /// Whether the pages belong to `pool`.
    pub(crate) fn is_of(&self, pool: &Pool) -> bool {
        core::ptr::eq(&**self.pool, pool)
    }

    /// Makes a folio with `data` from the next page, if one is left. A large folio is made from a
    /// free block of the pool, if there is one.
    ///
    /// # Errors
    ///
    /// Those of `data`. It is not called if there is no room.
    pub(crate) fn folio(
        &mut self,
        order: Order,
        data: impl FnOnce() -> Result<RawData>,
    ) -> Result<Option<NewFolio>> {
        let pfn = match order.is_large() {
            true => self.pool.alloc(order),
            false => self.left().first().copied(),
        };
        let Some(pfn) = pfn else {
            return Ok(None);
        };
        let data = data().inspect_err(|_| {
            if order.is_large() {
                // SAFETY: The block was allocated just now.
                let address = unsafe { address_of(bindings::pfn_to_page(pfn)) };
                Pool::give_back(self.pool, core::iter::once(address));
            }
        })?;
        if !order.is_large() {
            // INVARIANT: The page is no longer among those that are left.
            self.used += 1;
        }
        // SAFETY: The block was allocated just now, or the page before (see the type invariants).
        Ok(Some(unsafe { new_folio(pfn, order, data) }))
    }
}

/// Makes a folio with `data` of a block that was allocated from a pool.
///
/// # Safety
///
/// The block was allocated, and nobody has a reference to its pages.
unsafe fn new_folio(pfn: usize, order: Order, data: RawData) -> NewFolio {
    // SAFETY: The block was allocated from a pool (see the # Safety section), so its chunk has a
    // `struct page` for it. The pool keeps the chunk while the block is allocated.
    let page = unsafe { bindings::pfn_to_page(pfn) };
    // SAFETY: The page belongs to a chunk, whose pagemap stays mapped while the block is allocated.
    // Nobody has a reference to the pages (see the # Safety section).
    unsafe {
        bindings::zone_device_folio_init(page.cast(), bindings::page_pgmap(page), order.get());
    };
    // SAFETY: The folio is of a chunk, and nobody else uses its data.
    unsafe { set_data(page, data.into_raw()) };
    // SAFETY: `zone_device_folio_init()` has made a locked folio of this order, with one reference,
    // which is not mapped.
    unsafe { NewFolio::new(NonNull::new_unchecked(page.cast()), order) }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        // SAFETY: The pages that are left were allocated from the pool (see the type invariants),
        // which keeps their chunks meanwhile.
        let address = |pfn: &usize| unsafe { address_of(bindings::pfn_to_page(*pfn)) };
        Pool::give_back(self.pool, self.left().iter().map(address));
    }
}
