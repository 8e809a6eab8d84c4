// SPDX-License-Identifier: GPL-2.0

//! The page allocator of a pool: a buddy allocator for device memory, and a list of the blocks in
//! use by processes, in the order in which they migrated to the device.
//!
//! Pages are numbered from the start of the device memory, chunk after chunk. A block never spans
//! two chunks. A chunk also has the pfn of its first page, to convert page numbers to pfns. This
//! file calls no C code but to allocate memory, and allocates only in the constructors, which need
//! no lock.

use core::num::NonZeroUsize;
use kernel::prelude::*;

/// The size of a block as a power of two of pages.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Order(u8);

impl Order {
    /// One page.
    pub(crate) const PAGE: Self = Self(0);
    /// The largest block: 2 MiB with 4 KiB pages. Where a PMD does not map as many pages, large
    /// folios are split.
    pub(crate) const MAX: Self = Self(9);

    /// The order as a number.
    pub(crate) const fn get(self) -> u32 {
        self.0 as u32
    }

    /// Whether a block of this order has more than one page.
    pub(crate) const fn is_large(self) -> bool {
        self.0 != 0
    }

    /// The number of pages in a block of this order.
    pub(crate) const fn pages(self) -> usize {
        1 << self.0
    }

    /// The order of half a block, or `None` for [`Order::PAGE`].
    const fn half(self) -> Option<Self> {
        match self.0.checked_sub(1) {
            Some(order) => Some(Self(order)),
            None => None,
        }
    }

    const fn double(self) -> Self {
        Self(self.0 + 1)
    }
}

/// The link at the end of a list.
const NONE: u32 = u32::MAX;

/// A NUMA node of system memory.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) struct Node(i16);

impl Node {
    /// Creates the node with the number `nid`.
    ///
    /// # Errors
    ///
    /// [`EINVAL`] if `nid` does not fit into 16 bits.
    pub(crate) fn new(nid: c_int) -> Result<Self> {
        Ok(Self(i16::try_from(nid).map_err(|_| EINVAL)?))
    }

    /// The number of the node in mm.
    pub(crate) fn nid(self) -> c_int {
        self.0.into()
    }
}

#[derive(Copy, Clone, Debug, PartialEq, Eq)]
enum SlotState {
    /// Not the first page of a block.
    Tail,
    Free(Order),
    /// Allocated, but not mapped by a process: it is migrating, or was migrated away.
    Taken(Order),
    /// In use by a process. An eviction allocates system memory on this node.
    Used(Order, Node),
}

/// The state of one page. If it is the first page of a block, `prev` and `next` link the block into
/// its list.
#[derive(Copy, Clone)]
struct Slot {
    state: SlotState,
    prev: u32,
    next: u32,
}

/// A doubly linked list of blocks.
#[derive(Copy, Clone)]
struct List {
    first: u32,
    last: u32,
}

impl List {
    const EMPTY: Self = Self {
        first: NONE,
        last: NONE,
    };
}

/// The slots of a chunk. Allocated before the caller takes the lock that protects [`Slots`].
pub(crate) struct ChunkSlots {
    /// The pfn of the first page of the chunk.
    pfn: usize,
    slots: KVVec<Slot>,
}

impl ChunkSlots {
    /// Creates the slots of a chunk of `pages` pages that starts at `pfn`.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`].
    pub(crate) fn new(pages: usize, pfn: usize) -> Result<Self> {
        let slot = Slot {
            state: SlotState::Tail,
            prev: NONE,
            next: NONE,
        };
        Ok(Self {
            pfn,
            slots: KVVec::from_elem(slot, pages, GFP_KERNEL)?,
        })
    }
}

/// The pages of a device's memory.
///
/// # Invariants
///
/// - All chunks have `chunk_pages` pages, a multiple of the largest block.
/// - Every page belongs to exactly one block, which is naturally aligned. The state of the first
///   page of a block has the order of the block. A free block is on the list `free[order]`, a block
///   in use is on the list `used`.
/// - The two halves of a block are never both on a free list: [`Slots::free`] merges them.
/// - Each link is the number of a page that exists, or [`NONE`].
pub(crate) struct Slots {
    chunk_pages: NonZeroUsize,
    max_chunks: usize,
    chunks: KVec<ChunkSlots>,
    free: [List; Order::MAX.0 as usize + 1],
    used: List,
    free_pages: usize,
    closed: bool,
    orphan: bool,
}

impl Slots {
    /// Creates an allocator without memory, with room for `max_chunks` chunks of `chunk_pages`
    /// pages each.
    ///
    /// # Errors
    ///
    /// [`EINVAL`] if either is zero, if a chunk is not a multiple of the largest block, or if the
    /// pages of all chunks cannot be numbered with 32 bits; [`ENOMEM`].
    pub(crate) fn new(chunk_pages: usize, max_chunks: usize) -> Result<Self> {
        let pages = chunk_pages.checked_mul(max_chunks).ok_or(EINVAL)?;
        if pages == 0 || chunk_pages % Order::MAX.pages() != 0 || pages >= NONE as usize {
            return Err(EINVAL);
        }
        Ok(Self {
            chunk_pages: NonZeroUsize::new(chunk_pages).ok_or(EINVAL)?,
            max_chunks,
            chunks: KVec::with_capacity(max_chunks, GFP_KERNEL)?,
            free: [List::EMPTY; Order::MAX.0 as usize + 1],
            used: List::EMPTY,
            free_pages: 0,
            closed: false,
            orphan: false,
        })
    }

    /// The number of pages of all chunks.
    pub(crate) fn pages(&self) -> usize {
        self.chunks.len() * self.chunk_pages.get()
    }

    /// The number of free pages.
    pub(crate) fn free_pages(&self) -> usize {
        self.free_pages
    }

    /// The number that the first page of the next chunk gets, or `None` if no chunk can be added.
    pub(crate) fn next_chunk(&self) -> Option<usize> {
        let room = self.chunks.len() < self.max_chunks;
        (room && !self.closed).then_some(self.pages())
    }

    /// Makes [`Slots::alloc`] and [`Slots::add_chunk`] fail from now on. Blocks can still be freed.
    pub(crate) fn close(&mut self) {
        self.closed = true;
    }

    /// Records that only the pages in use keep the memory. It is closed.
    pub(crate) fn orphan(&mut self) {
        self.closed = true;
        self.orphan = true;
    }

    /// Whether [`Slots::orphan`] was called.
    pub(crate) fn is_orphan(&self) -> bool {
        self.orphan
    }

    /// Whether all pages are free.
    pub(crate) fn is_idle(&self) -> bool {
        self.free_pages == self.pages()
    }

    /// Whether a block of this order can be allocated.
    pub(crate) fn can_alloc(&self, order: Order) -> bool {
        let is_free = |list: &List| list.first != NONE;
        !self.closed && self.free.iter().skip(order.0.into()).any(is_free)
    }

    /// Adds the pages of a chunk.
    ///
    /// # Errors
    ///
    /// [`ENOSPC`] if the limit of chunks is reached or the allocator is closed, [`EINVAL`] if the
    /// chunk does not have `chunk_pages` pages.
    pub(crate) fn add_chunk(&mut self, chunk: ChunkSlots) -> Result {
        let first = self.next_chunk().ok_or(ENOSPC)?;
        if chunk.slots.len() != self.chunk_pages.get() {
            return Err(EINVAL);
        }
        self.chunks
            .push_within_capacity(chunk)
            .map_err(|_| ENOSPC)?;
        // alloc() takes the block that was put last, so put the lowest block last.
        for page in (first..self.pages()).rev().step_by(Order::MAX.pages()) {
            self.put(page + 1 - Order::MAX.pages(), Order::MAX);
        }
        self.free_pages += self.chunk_pages.get();
        Ok(())
    }

    /// Allocates a block and returns the number of its first page. Splits a larger block if there
    /// is no free block of this order.
    pub(crate) fn alloc(&mut self, order: Order) -> Option<usize> {
        if self.closed {
            return None;
        }
        let mut size = order;
        let page = loop {
            if let Some(page) = self.page(self.free_list(size)?.first) {
                break page;
            }
            size = size.double();
        };
        self.unlink(page);
        while let Some(half) = size.half().filter(|half| *half >= order) {
            size = half;
            self.put(page + size.pages(), size);
        }
        self.slot_mut(page).state = SlotState::Taken(order);
        self.free_pages -= order.pages();
        Some(page)
    }

    /// Marks the allocated block that starts at `page` as in use by a process, as the youngest
    /// block. An eviction migrates its contents to system memory on `node`.
    pub(crate) fn mark_used(&mut self, page: usize, node: Node) {
        if let SlotState::Taken(order) = self.slot(page).state {
            self.push_used(page, order, node);
        }
    }

    /// Marks the block that starts at `page` as no longer in use by a process. The block stays
    /// allocated.
    pub(crate) fn mark_unused(&mut self, page: usize) {
        if let SlotState::Used(order, _) = self.slot(page).state {
            self.unlink(page);
            self.slot_mut(page).state = SlotState::Taken(order);
        }
    }

    /// The node on which an eviction allocates system memory for the block that starts at `page`,
    /// or `None` if the block is not in use.
    pub(crate) fn node(&self, page: usize) -> Option<Node> {
        match self.slot(page).state {
            SlotState::Used(_, node) => Some(node),
            _ => None,
        }
    }

    /// Frees the block that starts at `page`, and merges it with its free buddies.
    ///
    /// # Errors
    ///
    /// [`EINVAL`] if no allocated block starts at `page`, for example because it was freed before.
    pub(crate) fn free(&mut self, page: usize) -> Result {
        if page >= self.pages() {
            return Err(EINVAL);
        }
        self.mark_unused(page);
        let SlotState::Taken(mut order) = self.slot(page).state else {
            return Err(EINVAL);
        };
        self.free_pages += order.pages();
        self.slot_mut(page).state = SlotState::Tail;
        let mut page = page;
        while order < Order::MAX {
            let buddy = page ^ order.pages();
            if self.slot(buddy).state != SlotState::Free(order) {
                break;
            }
            self.unlink(buddy);
            page = page.min(buddy);
            order = order.double();
        }
        self.put(page, order);
        Ok(())
    }

    /// Splits the allocated block that starts at `page` into single pages. They take its place in
    /// the order of eviction.
    pub(crate) fn split(&mut self, page: usize) {
        let Slot { state, prev, next } = *self.slot(page);
        let (order, state) = match state {
            SlotState::Used(order, node) => (order, SlotState::Used(Order::PAGE, node)),
            SlotState::Taken(order) => (order, SlotState::Taken(Order::PAGE)),
            SlotState::Tail | SlotState::Free(_) => return,
        };
        let last = page + order.pages() - 1;
        for part in page..=last {
            *self.slot_mut(part) = Slot {
                state,
                prev: part.wrapping_sub(1) as u32,
                next: part as u32 + 1,
            };
        }
        self.slot_mut(page).prev = prev;
        self.slot_mut(last).next = next;
        // Only blocks in use are on a list.
        if let SlotState::Used(..) = state {
            match self.page(next) {
                Some(next) => self.slot_mut(next).prev = last as u32,
                None => self.used.last = last as u32,
            }
        }
    }

    /// The order of the allocated block that starts at `page`. In free blocks, and in a chunk that
    /// was not added since the allocator was closed meanwhile, each page counts by itself.
    pub(crate) fn folio_order(&self, page: usize) -> Order {
        if page >= self.pages() {
            return Order::PAGE;
        }
        match self.slot(page).state {
            SlotState::Taken(order) | SlotState::Used(order, _) => order,
            SlotState::Tail | SlotState::Free(_) => Order::PAGE,
        }
    }

    /// Fills `pfns` with the pfns of the first pages of the oldest blocks in use, the oldest first.
    /// Rotates these blocks to the end of the list, so that a concurrent caller gets others.
    /// Returns the number of pfns, and the order of their blocks, which is the same for all.
    pub(crate) fn rotate_oldest(&mut self, pfns: &mut [usize]) -> (usize, Order) {
        let last = self.used.last;
        let mut count = 0;
        let mut like = Order::PAGE;
        for pfn in pfns {
            let Some(page) = self.page(self.used.first) else {
                break;
            };
            let SlotState::Used(order, node) = self.slot(page).state else {
                break;
            };
            if count == 0 {
                like = order;
            } else if order != like || order != Order::PAGE {
                break;
            }
            *pfn = self.pfn(page);
            count += 1;
            self.unlink(page);
            self.push_used(page, order, node);
            if page == last as usize {
                break;
            }
        }
        (count, like)
    }

    /// The pfn of `page`. Panics if there is no such page.
    pub(crate) fn pfn(&self, page: usize) -> usize {
        self.chunks[page / self.chunk_pages].pfn + page % self.chunk_pages
    }

    fn page(&self, link: u32) -> Option<usize> {
        (link != NONE).then_some(link as usize)
    }

    fn slot(&self, page: usize) -> &Slot {
        &self.chunks[page / self.chunk_pages].slots[page % self.chunk_pages]
    }

    fn slot_mut(&mut self, page: usize) -> &mut Slot {
        &mut self.chunks[page / self.chunk_pages].slots[page % self.chunk_pages]
    }

    fn free_list(&self, order: Order) -> Option<&List> {
        self.free.get(usize::from(order.0))
    }

    fn list_mut(&mut self, state: SlotState) -> Option<&mut List> {
        match state {
            SlotState::Tail | SlotState::Taken(_) => None,
            SlotState::Free(order) => self.free.get_mut(usize::from(order.0)),
            SlotState::Used(..) => Some(&mut self.used),
        }
    }

    /// Adds the block that starts at `page` to the head of the free list of `order`, from where
    /// [`Slots::alloc`] takes blocks.
    fn put(&mut self, page: usize, order: Order) {
        let Some(list) = self.free.get_mut(usize::from(order.0)) else {
            return;
        };
        let next = list.first;
        list.first = page as u32;
        match self.page(next) {
            Some(next) => self.slot_mut(next).prev = page as u32,
            None => self.free[usize::from(order.0)].last = page as u32,
        }
        *self.slot_mut(page) = Slot {
            state: SlotState::Free(order),
            prev: NONE,
            next,
        };
    }

    /// Adds the block that starts at `page` to the tail of the list of blocks in use.
    fn push_used(&mut self, page: usize, order: Order, node: Node) {
        let prev = self.used.last;
        self.used.last = page as u32;
        match self.page(prev) {
            Some(prev) => self.slot_mut(prev).next = page as u32,
            None => self.used.first = page as u32,
        }
        *self.slot_mut(page) = Slot {
            state: SlotState::Used(order, node),
            prev,
            next: NONE,
        };
    }

    /// Removes the block that starts at `page` from its list.
    fn unlink(&mut self, page: usize) {
        let Slot { state, prev, next } = *self.slot(page);
        match self.page(prev) {
            Some(prev) => self.slot_mut(prev).next = next,
            None => {
                if let Some(list) = self.list_mut(state) {
                    list.first = next;
                }
            }
        }
        match self.page(next) {
            Some(next) => self.slot_mut(next).prev = prev,
            None => {
                if let Some(list) = self.list_mut(state) {
                    list.last = prev;
                }
            }
        }
        self.slot_mut(page).state = SlotState::Tail;
    }
}
