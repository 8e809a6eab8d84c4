// SPDX-License-Identifier: GPL-2.0

//! What a device is asked to copy: batches of runs of pages, between RAM and its own memory.
//!
//! The one view that a driver gets of pages that migrate. It sees bytes of RAM and addresses in its
//! memory, for as long as a batch lasts; the core has the pages locked and unmapped meanwhile.

use core::{
    cell::Cell,
    marker::PhantomData,
    slice, //
};
use kernel::{
    page::PAGE_SIZE,
    prelude::*, //
};

/// A range of a device's memory made of whole pages, in bytes from its start.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct DeviceRange {
    start: usize,
    len: usize,
}

impl DeviceRange {
    /// The first byte.
    #[inline]
    pub fn start(&self) -> usize {
        self.start
    }

    /// The length in bytes.
    #[inline]
    #[expect(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.len
    }
}

/// One of the things to be done for a [`CopyBatch`].
pub enum CopyOp<'a> {
    /// Copy from RAM to the device. Both have the same length.
    ToDevice {
        /// Where from.
        from: &'a [u8],
        /// Where to.
        to: DeviceRange,
    },
    /// Copy from the device to RAM. Both have the same length.
    ToRam {
        /// Where from.
        from: DeviceRange,
        /// Where to.
        to: NewMemory<'a>,
    },
    /// Fill the device's memory with zeroes: what was never written reads as zero.
    Zero {
        /// What to fill.
        to: DeviceRange,
    },
}

/// System memory that the pages of a run are to move to, of the same length as the run.
///
/// It can be written from its start to its end, once, and not be read: it may hold old data of
/// others. A batch of which a byte is left has failed.
pub struct NewMemory<'a> {
    start: *mut u8,
    left: usize,
    written: &'a Cell<usize>,
}

impl NewMemory<'_> {
    /// Writes the next of its bytes.
    ///
    /// # Errors
    ///
    /// [`EINVAL`] if `bytes` are more than are left; nothing is written then.
    #[inline]
    pub fn write(&mut self, bytes: &[u8]) -> Result {
        self.left = self.left.checked_sub(bytes.len()).ok_or(EINVAL)?;
        // SAFETY: By the invariants of `CopyBatch`, from which this is, the memory is valid for
        // writes by nobody else; as checked above there is room for `bytes`, which cannot overlap
        // it.
        unsafe {
            self.start
                .copy_from_nonoverlapping(bytes.as_ptr(), bytes.len())
        };
        self.start = self.start.wrapping_add(bytes.len());
        self.written.set(self.written.get() + bytes.len());
        Ok(())
    }
}

/// A page to be copied.
#[derive(Copy, Clone)]
pub(crate) struct PageCopy {
    /// The page's place in the device's memory, in bytes.
    pub(crate) device: usize,
    /// The page of RAM, or null where there is none.
    pub(crate) ram: *mut u8,
    /// Which of the pages that migrate it is, for whoever made the batch.
    pub(crate) index: usize,
}

// SAFETY: It is an address, not used but while the page at it is a batch's.
unsafe impl Send for PageCopy {}

impl PageCopy {
    pub(crate) const NONE: Self = Self {
        device: 0,
        ram: core::ptr::null_mut(),
        index: 0,
    };

    /// Whether the page `n` after this one would be `other`, on both sides.
    #[inline]
    fn continues(&self, n: usize, other: &Self) -> bool {
        other.device == self.device + n * PAGE_SIZE
            && match self.ram.is_null() {
                true => other.ram.is_null(),
                false => other.ram == self.ram.wrapping_add(n * PAGE_SIZE),
            }
    }
}

/// Pages to be copied one way, as an iterator over runs that are contiguous on both sides.
///
/// The batch is done when the iterator is at its end, all [`NewMemory`] was written and the driver
/// says so: else it has failed.
///
/// # Invariants
///
/// Where `ram` of a page is not null it is the address of a page that is valid for reads, or where
/// the pages go to RAM for writes, by nobody else, for `'a`; where they go to RAM none is null. No
/// page of RAM is in it twice.
pub struct CopyBatch<'a> {
    pages: &'a [PageCopy],
    to_device: bool,
    /// The bytes of new memory that were written.
    written: &'a Cell<usize>,
    _ram: PhantomData<&'a mut [u8]>,
}

impl<'a> CopyBatch<'a> {
    /// # Safety
    ///
    /// `pages` are as the type invariants ask for.
    pub(crate) unsafe fn new(
        pages: &'a [PageCopy],
        to_device: bool,
        written: &'a Cell<usize>,
    ) -> Self {
        // INVARIANT: By the safety requirements.
        Self {
            pages,
            to_device,
            written,
            _ram: PhantomData,
        }
    }
}

impl<'a> Iterator for CopyBatch<'a> {
    type Item = CopyOp<'a>;

    #[inline]
    fn next(&mut self) -> Option<CopyOp<'a>> {
        let first = *self.pages.first()?;
        let run = self
            .pages
            .iter()
            .enumerate()
            .take_while(|(n, page)| first.continues(*n, page))
            .count();
        // INVARIANT: The pages that are left are some of those there were; each is taken once.
        self.pages = self.pages.get(run..)?;

        let device = DeviceRange {
            start: first.device,
            len: run * PAGE_SIZE,
        };
        Some(match (self.to_device, first.ram.is_null()) {
            (true, true) => CopyOp::Zero { to: device },
            (true, false) => CopyOp::ToDevice {
                // SAFETY: By the type invariants the pages are valid for reads and nobody writes
                // them; they are adjacent.
                from: unsafe { slice::from_raw_parts(first.ram, device.len) },
                to: device,
            },
            (false, _) => CopyOp::ToRam {
                from: device,
                // The pages are adjacent, and not handed out again.
                to: NewMemory {
                    start: first.ram,
                    left: device.len,
                    written: self.written,
                },
            },
        })
    }
}
