// SPDX-License-Identifier: GPL-2.0

//! Ranges of virtual addresses.
//!
//! [`PageRange`] is the only type of the crate for such ranges. This file calls no C code.

use kernel::{
    page::{
        PAGE_MASK,
        PAGE_SHIFT,
        PAGE_SIZE, //
    },
    prelude::*, //
};

/// A range of virtual addresses made of whole pages.
///
/// # Invariants
///
/// `start` and `end` are addresses in bytes and multiples of [`PAGE_SIZE`], and `start < end`.
/// Hence the range is not empty and does not wrap.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct PageRange {
    start: usize,
    end: usize,
}

impl PageRange {
    /// Creates the range from `start` to `end`, which is exclusive. Both are addresses in bytes.
    ///
    /// # Errors
    ///
    /// [`EINVAL`] if one of them is not page-aligned or if `start >= end`.
    #[inline]
    pub const fn new(start: usize, end: usize) -> Result<Self> {
        if start & !PAGE_MASK != 0 || end & !PAGE_MASK != 0 || start >= end {
            return Err(EINVAL);
        }
        // INVARIANT: The check above has rejected unaligned addresses and `start >= end`.
        Ok(Self { start, end })
    }

    /// Creates the range of `len` bytes from `start`.
    ///
    /// # Errors
    ///
    /// [`EINVAL`] if `start` or `len` is not page-aligned, if `len` is zero or if the end wraps.
    #[inline]
    pub const fn from_len(start: usize, len: usize) -> Result<Self> {
        match start.checked_add(len) {
            Some(end) => Self::new(start, end),
            None => Err(EINVAL),
        }
    }

    /// Creates the smallest range that contains the `len` bytes from `va`. Neither `va` nor `len`
    /// has to be page-aligned.
    ///
    /// # Errors
    ///
    /// [`EINVAL`] if `len` is zero or if the end, rounded up to a page, wraps.
    #[inline]
    pub const fn containing(va: usize, len: usize) -> Result<Self> {
        let Some(end) = va.checked_add(len) else {
            return Err(EINVAL);
        };
        let Some(end) = kernel::page::page_align(end) else {
            return Err(EINVAL);
        };
        if len == 0 {
            return Err(EINVAL);
        }
        Self::new(va & PAGE_MASK, end)
    }

    /// Returns the naturally aligned block of `2^order` pages that contains `va`.
    ///
    /// # Errors
    ///
    /// [`EINVAL`] if such a block is half the address space or more, or if its end wraps.
    #[inline]
    pub(crate) const fn aligned_block(va: usize, order: u32) -> Result<Self> {
        if order >= usize::BITS - 1 - PAGE_SHIFT as u32 {
            return Err(EINVAL);
        }
        let len = PAGE_SIZE << order;
        Self::from_len(va & !(len - 1), len)
    }

    /// The address of the first byte.
    #[inline]
    pub const fn start(&self) -> usize {
        self.start
    }

    /// The address after the last byte.
    #[inline]
    pub const fn end(&self) -> usize {
        self.end
    }

    /// The length in bytes. Never zero.
    #[inline]
    #[expect(clippy::len_without_is_empty)]
    pub const fn len(&self) -> usize {
        self.end - self.start
    }

    /// The length in pages. Never zero.
    #[inline]
    pub(crate) const fn pages(&self) -> usize {
        self.len() >> PAGE_SHIFT
    }

    /// Whether the byte at `va` lies in the range.
    #[inline]
    pub const fn contains(&self, va: usize) -> bool {
        self.start <= va && va < self.end
    }

    /// The range that is in both `self` and `other`, or `None` if they do not overlap.
    #[inline]
    pub fn intersect(&self, other: &PageRange) -> Option<PageRange> {
        Self::new(self.start.max(other.start), self.end.min(other.end)).ok()
    }

    /// The start address of each page, in ascending order.
    #[inline]
    pub(crate) fn page_addrs(&self) -> impl Iterator<Item = usize> + use<> {
        (self.start..self.end).step_by(PAGE_SIZE)
    }

    /// The index, in pages from the start of the range, of the page that contains `va`, or `None`
    /// if `va` is not in the range.
    #[inline]
    pub(crate) const fn index_of(&self, va: usize) -> Option<usize> {
        if self.contains(va) {
            Some((va - self.start) >> PAGE_SHIFT)
        } else {
            None
        }
    }
}
