// SPDX-License-Identifier: GPL-2.0

//! What a fault gives to a driver: proof of what the device may access.

use super::{
    pfn::{
        Access,
        HmmPfn,
        State, //
    },
    range::PageRange, //
};
use core::marker::PhantomData;
use kernel::dma::DmaAddress;

/// Proof that the report of a window is valid.
///
/// A commit exists only while the region's lock is held for write, after the check that no
/// invalidation has collided with the report. The core has already installed its entries. The
/// driver makes its own translations from the commit.
///
/// A page of the window may have become exclusive to this device after it was reported, by
/// [`make_exclusive`](super::MirroredMm::make_exclusive). The commit does not show that, and does
/// not end the exclusive access.
pub struct Commit<'c> {
    window: PageRange,
    needed: Option<PageRange>,
    pfns: &'c [usize],
    addresses: &'c [DmaAddress],
}

/// What the device may access at the address of a page.
#[derive(Debug)]
#[non_exhaustive]
pub enum Entry<'c> {
    /// No page is mapped for the device. A fault may map one or fail. Swapped-out pages, poisoned
    /// pages, guard pages, private pages of other devices and pages that are exclusive to a device
    /// are reported like this, too. So a hole is no reason to remove a translation: only
    /// [`MirrorOps::invalidate`](super::MirrorOps::invalidate) is.
    Hole,
    /// Nothing is accessible, and a fault would fail: there is no VMA, no read permission, or no
    /// memory that the kernel can reach.
    Error,
    /// A page of system memory, or of memory of another device that the CPU and this device reach
    /// like system memory.
    Ram(RamPage<'c>),
    /// A page in the memory of the device.
    Device(DevicePage<'c>),
}

/// A page of system memory, by what the device may do with it.
#[derive(Debug)]
pub enum RamPage<'c> {
    /// Read it.
    Read(ReadPage<'c>),
    /// Read and write it.
    Write(WritePage<'c>),
}

/// A page in the memory of the device, by what the device may do with it.
#[derive(Debug)]
pub enum DevicePage<'c> {
    /// Read it.
    Read(ReadPage<'c>),
    /// Read and write it.
    Write(WritePage<'c>),
}

/// Proof that the page at [`ReadPage::va`] may be mapped read-only for the device.
#[derive(Debug)]
pub struct ReadPage<'c> {
    va: usize,
    order: u32,
    is_zero: bool,
    is_remote: bool,
    _commit: PhantomData<&'c ()>,
}

/// Proof that the page at [`WritePage::va`] may be mapped writable for the device.
#[derive(Debug)]
pub struct WritePage<'c> {
    va: usize,
    order: u32,
    is_remote: bool,
    _commit: PhantomData<&'c ()>,
}

impl ReadPage<'_> {
    /// The address of the page.
    #[inline]
    pub fn va(&self) -> usize {
        self.va
    }

    /// The order of the naturally aligned block around the page that the CPU maps as one, clamped
    /// to the window. All pages of the block are present, physically contiguous, and allow the same
    /// access. A later invalidation may be for a part of the block.
    #[inline]
    pub fn order(&self) -> u32 {
        self.order
    }

    /// Whether this is the kernel's shared zero page: all bytes are zero.
    #[inline]
    pub fn is_zero(&self) -> bool {
        self.is_zero
    }

    /// Whether the page is in coherent memory of another device, where it stays until the driver of
    /// that device, or mm for a copy, moves it.
    #[inline]
    pub fn is_remote(&self) -> bool {
        self.is_remote
    }
}

impl WritePage<'_> {
    /// The address of the page.
    #[inline]
    pub fn va(&self) -> usize {
        self.va
    }

    /// The order of the block around the page, as for [`ReadPage::order`].
    #[inline]
    pub fn order(&self) -> u32 {
        self.order
    }

    /// As for [`ReadPage::is_remote`].
    #[inline]
    pub fn is_remote(&self) -> bool {
        self.is_remote
    }
}

impl<'c> Commit<'c> {
    /// Creates the commit of `window`. `pfns` has an element for each page of it, with what is
    /// installed as its entry. The region's lock is held for write while the commit exists.
    /// `addresses` says where the device finds each page, or is empty.
    pub(crate) fn new(
        window: PageRange,
        needed: Option<PageRange>,
        pfns: &'c [usize],
        addresses: &'c [DmaAddress],
    ) -> Self {
        Self {
            window,
            needed,
            pfns,
            addresses,
        }
    }

    #[inline]
    pub(crate) fn pfns(&self) -> &[usize] {
        self.pfns
    }

    #[inline]
    pub(crate) fn addresses(&self) -> &[DmaAddress] {
        self.addresses
    }

    /// The window, in which every page has an [`Entry`].
    #[inline]
    pub fn range(&self) -> PageRange {
        self.window
    }

    /// The part of the window that was requested. All pages of it are present and allow the
    /// requested access. `None` for a snapshot, which requests no access.
    #[inline]
    pub fn needed(&self) -> Option<PageRange> {
        self.needed
    }

    /// The address and the entry of each page of the window.
    #[inline]
    pub fn entries(&self) -> impl Iterator<Item = (usize, Entry<'_>)> {
        self.window
            .page_addrs()
            .zip(self.pfns)
            .map(|(va, &raw)| (va, Entry::new(self.window, va, HmmPfn::from_raw(raw))))
    }
}

impl Entry<'_> {
    #[inline]
    fn new(window: PageRange, va: usize, pfn: HmmPfn) -> Self {
        let _commit = PhantomData;
        let order = clamp_order(window, va, pfn.order());
        let is_remote = pfn.is_remote();
        let read = ReadPage {
            va,
            order,
            is_zero: pfn.is_zero(),
            is_remote,
            _commit,
        };
        let write = WritePage {
            va,
            order,
            is_remote,
            _commit,
        };
        match (pfn.state(), pfn.is_device()) {
            (State::Hole, _) => Self::Hole,
            (State::Error, _) => Self::Error,
            (State::Present(Access::Read), false) => Self::Ram(RamPage::Read(read)),
            (State::Present(Access::Write), false) => Self::Ram(RamPage::Write(write)),
            (State::Present(Access::Read), true) => Self::Device(DevicePage::Read(read)),
            (State::Present(Access::Write), true) => Self::Device(DevicePage::Write(write)),
        }
    }
}

/// The order of the largest naturally aligned block around `va` that lies inside `window`, but at
/// most `order`. Pages outside of the window may have changed since the report.
#[inline]
pub(crate) fn clamp_order(window: PageRange, va: usize, order: u32) -> u32 {
    let is_inside = |order: &u32| {
        PageRange::aligned_block(va, *order)
            .is_ok_and(|block| window.intersect(&block) == Some(block))
    };
    (0..=order).rev().find(is_inside).unwrap_or(0)
}
