// SPDX-License-Identifier: GPL-2.0

//! Which pages of a device's memory are free, and in what order the others were taken.
//!
//! A buddy allocator whose blocks never span two chunks, and a list of the blocks that hold pages
//! of processes, oldest first. Pages are counted from the start of the device's memory; what a
//! chunk is to others is one number that is kept for them, the pfn of its first page. Pure: no C
//! code is called but allocation, and none is done where a lock may be held.

use core::num::NonZeroUsize;
use kernel::prelude::*;

/// The size of a block as a power of two of pages.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Order(u8);

impl Order {
    /// One page.
    pub(crate) const PAGE: Self = Self(0);
    /// The largest block that is kept together: 2 MiB where pages have 4 KiB.
    pub(crate) const MAX: Self = Self(9);

    /// The number of pages.
    pub(crate) const fn pages(self) -> usize {
        1 << self.0
    }

    /// Half of it. [`Order::PAGE`] has none.
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

/// No page: the end of a list.
const NONE: u32 = u32::MAX;

#[derive(Copy, Clone, Debug, PartialEq, Eq)]
enum State {
    /// Not the first page of a block.
    Tail,
    Free(Order),
    /// On its way: nobody's page yet, or no longer.
    Taken(Order),
    /// A page of a process.
    Used(Order),
}

/// What is kept of a page. The links are those of the list that its block is in.
#[derive(Copy, Clone)]
struct Slot {
    state: State,
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

/// Memory for a chunk's slots, allocated before the lock that [`Slots`] is under is taken.
pub(crate) struct ChunkSlots {
    /// The pfn of the first page.
    pfn: usize,
    slots: KVVec<Slot>,
}

impl ChunkSlots {
    /// For a chunk of `pages` pages, the first of which has the number `pfn` for others.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`].
    pub(crate) fn new(pages: usize, pfn: usize) -> Result<Self> {
        let slot = Slot {
            state: State::Tail,
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
/// - Every page belongs to exactly one block, which is naturally aligned. The state of its first
///   page tells the order. A free one is on the list `free[order]`, one in use on `used`.
/// - Two free halves of a block are one free block.
/// - The links hold numbers of pages that exist, or [`NONE`].
pub(crate) struct Slots {
    chunk_pages: NonZeroUsize,
    max_chunks: usize,
    chunks: KVec<ChunkSlots>,
    free: [List; Order::MAX.0 as usize + 1],
    used: List,
    free_pages: usize,
    closed: bool,
}

impl Slots {
    /// No memory yet; room for `max_chunks` chunks of `chunk_pages` pages each.
    ///
    /// # Errors
    ///
    /// [`EINVAL`] if a chunk is empty or no multiple of the largest block, or if there are more
    /// pages than a slot's number can tell; [`ENOMEM`].
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
        })
    }

    /// The pages that there are.
    pub(crate) fn pages(&self) -> usize {
        self.chunks.len() * self.chunk_pages.get()
    }

    /// The pages of those that are free.
    pub(crate) fn free_pages(&self) -> usize {
        self.free_pages
    }

    /// The number that the next chunk's first page gets, if there may be another chunk.
    pub(crate) fn next_chunk(&self) -> Option<usize> {
        let room = self.chunks.len() < self.max_chunks;
        (room && !self.closed).then_some(self.pages())
    }

    /// From now on there is nothing to take and nothing to add; what is in use can be given back.
    pub(crate) fn close(&mut self) {
        self.closed = true;
    }

    /// Whether there is something to take.
    pub(crate) fn can_alloc(&self) -> bool {
        self.free_pages != 0 && !self.closed
    }

    /// Adds the pages of a chunk.
    ///
    /// # Errors
    ///
    /// [`ENOSPC`] if there are as many chunks as there may be, [`EINVAL`] if this one has another
    /// size.
    pub(crate) fn add_chunk(&mut self, chunk: ChunkSlots) -> Result {
        let first = self.next_chunk().ok_or(ENOSPC)?;
        if chunk.slots.len() != self.chunk_pages.get() {
            return Err(EINVAL);
        }
        self.chunks
            .push_within_capacity(chunk)
            .map_err(|_| ENOSPC)?;
        // The list is a stack: the lowest block comes last, and is taken first.
        for page in (first..self.pages()).rev().step_by(Order::MAX.pages()) {
            self.put(page + 1 - Order::MAX.pages(), Order::MAX);
        }
        self.free_pages += self.chunk_pages.get();
        Ok(())
    }

    /// Takes a block. Returns its first page.
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
        self.slot_mut(page).state = State::Taken(order);
        self.free_pages -= order.pages();
        Some(page)
    }

    /// The block that starts at `page` is a page of a process from now on, the youngest.
    pub(crate) fn settle(&mut self, page: usize) {
        if let State::Taken(order) = self.slot(page).state {
            self.push_used(page, order);
        }
    }

    /// The block that starts at `page` is a process's no longer.
    pub(crate) fn leave(&mut self, page: usize) {
        if let State::Used(order) = self.slot(page).state {
            self.unlink(page);
            self.slot_mut(page).state = State::Taken(order);
        }
    }

    /// Whether the block that starts at `page` is a page of a process.
    pub(crate) fn is_used(&self, page: usize) -> bool {
        matches!(self.slot(page).state, State::Used(_))
    }

    /// Gives back the block that starts at `page`.
    ///
    /// # Errors
    ///
    /// [`EINVAL`] if no block starts there that was taken: it was given back before.
    pub(crate) fn free(&mut self, page: usize) -> Result {
        if page >= self.pages() {
            return Err(EINVAL);
        }
        self.leave(page);
        let State::Taken(mut order) = self.slot(page).state else {
            return Err(EINVAL);
        };
        self.free_pages += order.pages();
        self.slot_mut(page).state = State::Tail;
        let mut page = page;
        while order < Order::MAX {
            let buddy = page ^ order.pages();
            if self.slot(buddy).state != State::Free(order) {
                break;
            }
            self.unlink(buddy);
            page = page.min(buddy);
            order = order.double();
        }
        self.put(page, order);
        Ok(())
    }

    /// Fills `pfns` with the pfns of pages in use, those that came longest ago first, and makes
    /// them the youngest: who asks next gets others. Returns how many there are.
    pub(crate) fn oldest(&mut self, pfns: &mut [usize]) -> usize {
        let last = self.used.last;
        let mut count = 0;
        for pfn in pfns {
            let Some(page) = self.page(self.used.first) else {
                break;
            };
            let State::Used(order) = self.slot(page).state else {
                break;
            };
            *pfn = self.pfn(page);
            count += 1;
            self.unlink(page);
            self.push_used(page, order);
            if page == last as usize {
                break;
            }
        }
        count
    }

    /// The pfn of `page`, which exists.
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

    fn list_mut(&mut self, state: State) -> Option<&mut List> {
        match state {
            State::Tail | State::Taken(_) => None,
            State::Free(order) => self.free.get_mut(usize::from(order.0)),
            State::Used(_) => Some(&mut self.used),
        }
    }

    /// Makes `page` the first of a free block. It is taken next of all of its order.
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
            state: State::Free(order),
            prev: NONE,
            next,
        };
    }

    /// Makes `page` the first of a block in use, the youngest.
    fn push_used(&mut self, page: usize, order: Order) {
        let prev = self.used.last;
        self.used.last = page as u32;
        match self.page(prev) {
            Some(prev) => self.slot_mut(prev).next = page as u32,
            None => self.used.first = page as u32,
        }
        *self.slot_mut(page) = Slot {
            state: State::Used(order),
            prev,
            next: NONE,
        };
    }

    /// Takes the block that starts at `page` off its list.
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
        self.slot_mut(page).state = State::Tail;
    }
}
