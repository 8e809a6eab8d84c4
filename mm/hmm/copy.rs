// SPDX-License-Identifier: GPL-2.0

//! Batches of pages that a device copies between system memory and its own memory.
//!
//! A driver sees migrating pages only in this form: as bytes of system memory, which have a DMA
//! address if the device copies by DMA, and as addresses in the device's memory. It has access to
//! them until [`PoolOps::copy`](super::PoolOps::copy) returns. The core keeps the pages locked and
//! unmapped meanwhile.

use core::{
    cell::Cell,
    marker::PhantomData,
    slice, //
};
use kernel::{
    bindings,
    dma::DmaAddress,
    page::PAGE_SIZE,
    prelude::*, //
};

/// A page-aligned range of a device's memory.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct DeviceRange {
    start: usize,
    len: usize,
}

impl DeviceRange {
    #[inline]
    pub(crate) fn new(start: usize, len: usize) -> Self {
        Self { start, len }
    }

    /// The offset of the range from the start of the pool's part of the device's memory, in bytes.
    /// The driver adds the address of that part.
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

/// One operation of a [`CopyBatch`], for a run of pages.
pub enum CopyOp<'a> {
    /// Copy from system memory to the device. Both sides have the same length.
    ToDevice {
        /// The source.
        from: RamPages<'a>,
        /// The destination.
        to: DeviceRange,
    },
    /// Copy from the device to system memory. Both sides have the same length.
    ToRam {
        /// The source.
        from: DeviceRange,
        /// The destination.
        to: NewMemory<'a>,
    },
    /// Fill the device's memory with zeroes. The pages have no source, since the process has not
    /// written to them yet. The memory may hold data of other processes, so this must not be
    /// skipped.
    Zero {
        /// The destination.
        to: DeviceRange,
    },
}

/// Pages of system memory, the source of a run of pages.
#[derive(Copy, Clone)]
pub struct RamPages<'a> {
    bytes: &'a [u8],
    bus: Option<DmaAddress>,
}

impl<'a> RamPages<'a> {
    /// What is in the pages.
    #[inline]
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Copies to `to` what is in the pages from `offset` on, in bytes.
    ///
    /// # Errors
    ///
    /// [`EINVAL`] if there are not so many bytes.
    #[inline(never)]
    #[export_name = "rust_hmm_ram_read"]
    pub fn read(&self, offset: usize, to: &mut [u8]) -> Result {
        let rest = self.bytes.get(offset..).ok_or(EINVAL)?;
        let from = rest.get(..to.len()).ok_or(EINVAL)?;
        // SAFETY: Both have `to.len()` bytes, and `to` is borrowed mutably, so they do not overlap.
        unsafe { copy_bytes(to.as_mut_ptr(), from.as_ptr(), to.len()) };
        Ok(())
    }

    /// The DMA address of the first byte, if the pool was made with
    /// [`Engine::Dma`](super::Engine::Dma). All bytes of the operation follow it. It is valid until
    /// [`PoolOps::copy`](super::PoolOps::copy) returns.
    #[inline]
    pub fn bus(&self) -> Option<DmaAddress> {
        self.bus
    }
}

/// Copies `len` bytes; whole pages as mm does it, with `copy_page()`.
///
/// # Safety
///
/// `from` is valid for reads and `to` for writes of `len` bytes, and they do not overlap.
unsafe fn copy_bytes(to: *mut u8, from: *const u8, len: usize) {
    if (to.addr() | from.addr() | len) % PAGE_SIZE != 0 {
        // SAFETY: The caller ensures the conditions (see the # Safety section).
        return unsafe { to.copy_from_nonoverlapping(from, len) };
    }
    for offset in (0..len).step_by(PAGE_SIZE) {
        let (to, from) = (to.wrapping_add(offset), from.wrapping_add(offset));
        // SAFETY: Both are pages of what the caller passes (see the # Safety section).
        unsafe { bindings::copy_page(to.cast(), from.cast_mut().cast()) };
    }
}

/// New pages of system memory, the destination of a run of pages.
///
/// The driver writes the memory once, from its start to its end, or the device writes all of it by
/// DMA. The driver cannot read the memory, which may hold old data of other processes. If not all
/// bytes are written, the batch fails.
///
/// # Invariants
///
/// The `left` bytes from `start` are valid for writes until the [`CopyBatch`] ends, and nobody else
/// accesses them.
pub struct NewMemory<'a> {
    start: *mut u8,
    left: usize,
    written: &'a Cell<usize>,
    bus: Option<DmaAddress>,
}

impl NewMemory<'_> {
    /// The DMA address of the first byte, if the pool was made with
    /// [`Engine::Dma`](super::Engine::Dma). All bytes of the operation follow it. It is valid until
    /// [`PoolOps::copy`](super::PoolOps::copy) returns.
    #[inline]
    pub fn bus(&self) -> Option<DmaAddress> {
        self.bus
    }

    /// Says that the device has written all of the memory by DMA. The core relies on this: the
    /// process gets the memory as it is.
    #[inline]
    pub fn filled(self) {
        self.written.set(self.written.get() + self.left);
    }

    /// Writes `bytes` after those that were written before.
    ///
    /// # Errors
    ///
    /// [`EINVAL`] if there is no room for all of `bytes`. Nothing is written then.
    #[inline(never)]
    #[export_name = "rust_hmm_new_write"]
    pub fn write(&mut self, bytes: &[u8]) -> Result {
        self.left = self.left.checked_sub(bytes.len()).ok_or(EINVAL)?;
        // SAFETY: The memory is valid for writes and nobody else accesses it (see the type
        // invariants), so `bytes` does not overlap it. The check above ensures that there is room
        // for `bytes`.
        unsafe { copy_bytes(self.start, bytes.as_ptr(), bytes.len()) };
        // INVARIANT: `left` was reduced by the same number of bytes.
        self.start = self.start.wrapping_add(bytes.len());
        self.written.set(self.written.get() + bytes.len());
        Ok(())
    }
}

/// A folio to be copied.
#[derive(Copy, Clone)]
pub(crate) struct PageCopy {
    /// The offset of the page in the device's memory, in bytes.
    pub(crate) device: usize,
    /// The address of the page of system memory, or null if there is no source.
    pub(crate) ram: *mut u8,
    /// The number of pages, which are contiguous on both sides.
    pub(crate) pages: usize,
    /// The index of the page in the arrays of its migration. The batch does not use it.
    pub(crate) index: usize,
    /// The DMA address of the page of system memory, if the device copies by DMA.
    pub(crate) bus: Option<DmaAddress>,
}

// SAFETY: `ram` is only an address. Only a `CopyBatch` dereferences it, whose creator ensures that
// the page is valid.
unsafe impl Send for PageCopy {}

impl PageCopy {
    pub(crate) const NONE: Self = Self {
        device: 0,
        ram: core::ptr::null_mut(),
        pages: 1,
        index: 0,
        bus: None,
    };

    /// Whether `other` is the page `n` pages after this one, on both sides.
    #[inline]
    fn continues(&self, n: usize, other: &Self) -> bool {
        other.device == self.device + n * PAGE_SIZE
            && match self.ram.is_null() {
                true => other.ram.is_null(),
                false => other.ram == self.ram.wrapping_add(n * PAGE_SIZE),
            }
            && match (self.bus, other.bus) {
                (Some(bus), Some(other)) => other == bus + (n * PAGE_SIZE) as DmaAddress,
                (bus, other) => bus == other,
            }
    }
}

/// Pages to be copied in one direction: an iterator over runs of pages that are contiguous on both
/// sides.
///
/// A batch succeeds if [`PoolOps::copy`](super::PoolOps::copy) returns [`Ok`], has taken all items
/// of the iterator and has written all bytes of each [`NewMemory`]. Otherwise the batch fails.
///
/// # Invariants
///
/// - On the way to the device, `ram` of each page is null or the address of a page that is valid
///   for reads for `'a` and that nobody writes meanwhile.
/// - On the way to system memory, `ram` of each page is the address of a page that is valid for
///   writes for `'a` and that nobody else accesses meanwhile.
/// - No page of system memory occurs twice.
/// - If `memory` is not null, the pages of the device's memory are there, and are as valid and as
///   exclusive as those of system memory.
pub struct CopyBatch<'a> {
    pages: &'a [PageCopy],
    to_device: bool,
    /// The number of bytes that were written to [`NewMemory`].
    written: &'a Cell<usize>,
    /// The address at which the CPU finds the device's memory, or null.
    memory: *mut u8,
    _ram: PhantomData<&'a mut [u8]>,
}

impl<'a> CopyBatch<'a> {
    /// Creates a batch. `written` counts the bytes that are written to [`NewMemory`].
    ///
    /// # Safety
    ///
    /// `pages` must satisfy the type invariants for the direction that `to_device` says.
    pub(crate) unsafe fn new(
        pages: &'a [PageCopy],
        to_device: bool,
        written: &'a Cell<usize>,
        memory: *mut u8,
    ) -> Self {
        // INVARIANT: The caller ensures that `pages` satisfies them (see the # Safety section).
        Self {
            pages,
            to_device,
            written,
            memory,
            _ram: PhantomData,
        }
    }

    /// Performs all operations that are left, with the CPU, for a pool that was made with
    /// [`DevicePool::new_coherent`](super::DevicePool::new_coherent). It does not survive a memory
    /// error of the device: do not call it once the device has reported one.
    ///
    /// # Errors
    ///
    /// [`EOPNOTSUPP`] if the CPU does not reach the device's memory.
    #[inline(never)]
    #[export_name = "rust_hmm_batch_copy_by_cpu"]
    pub fn copy_by_cpu(&mut self) -> Result {
        if self.memory.is_null() {
            return Err(EOPNOTSUPP);
        }
        for folio in core::mem::take(&mut self.pages) {
            let (device, len) = (
                self.memory.wrapping_add(folio.device),
                folio.pages * PAGE_SIZE,
            );
            // SAFETY: The type invariants say that both sides are valid for `len` bytes and that
            // nobody else accesses them, except to read the source. They are in different memory.
            unsafe {
                match (self.to_device, folio.ram.is_null()) {
                    (true, true) => device.write_bytes(0, len),
                    (true, false) => copy_bytes(device, folio.ram, len),
                    (false, _) => copy_bytes(folio.ram, device, len),
                }
            }
            if !self.to_device {
                self.written.set(self.written.get() + len);
            }
        }
        Ok(())
    }
}

impl<'a> Iterator for CopyBatch<'a> {
    type Item = CopyOp<'a>;

    #[inline]
    fn next(&mut self) -> Option<CopyOp<'a>> {
        let first = *self.pages.first()?;
        let mut run = 0;
        let folios = self.pages.iter().take_while(|folio| {
            let continues = first.continues(run, folio);
            run += if continues { folio.pages } else { 0 };
            continues
        });
        let folios = folios.count();
        // INVARIANT: The remaining pages satisfied the invariants before.
        self.pages = self.pages.get(folios..)?;

        let device = DeviceRange {
            start: first.device,
            len: run * PAGE_SIZE,
        };
        Some(match (self.to_device, first.ram.is_null()) {
            (true, true) => CopyOp::Zero { to: device },
            (true, false) => CopyOp::ToDevice {
                to: device,
                from: RamPages {
                    // SAFETY: The pages are valid for reads and nobody writes them (see the type
                    // invariants). `continues()` has checked that they are adjacent.
                    bytes: unsafe { slice::from_raw_parts(first.ram, device.len) },
                    bus: first.bus,
                },
            },
            (false, _) => CopyOp::ToRam {
                from: device,
                // INVARIANT: The pages are valid for writes and nobody else accesses them (see the
                // invariants of `CopyBatch`). `continues()` has checked that they are adjacent. The
                // iterator returns each page once.
                to: NewMemory {
                    start: first.ram,
                    left: device.len,
                    written: self.written,
                    bus: first.bus,
                },
            },
        })
    }
}
