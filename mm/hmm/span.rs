// SPDX-License-Identifier: GPL-2.0

//! Spans: where a device that does DMA finds the pages of a commit.

#[cfg(CONFIG_RUST_HMM_DEVICE)]
use super::copy::DeviceRange;
use super::{
    commit::Commit,
    pfn::{
        Access,
        HmmPfn,
        State, //
    },
    range::PageRange, //
};
use core::marker::PhantomData;
use kernel::{
    dma::DmaAddress,
    page::PAGE_SIZE, //
};

/// Where a device finds the pages of a span.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Location {
    /// In system memory, at this DMA address and the addresses that follow it.
    Bus(DmaAddress),
    /// In the device's own memory.
    #[cfg(CONFIG_RUST_HMM_DEVICE)]
    Device(DeviceRange),
}

/// Pages with the same access that are contiguous, both for the process and for the device.
///
/// A span is as long as possible within the window of the commit: it ends where the access or the
/// addresses change, not where a folio does. It says nothing about the size of the pages that the
/// CPU maps. A device that maps it with a large entry checks that both addresses are aligned.
#[derive(Debug)]
pub enum Span<'c> {
    /// The device may read the pages.
    Read(ReadSpan<'c>),
    /// The device may read and write the pages.
    Write(WriteSpan<'c>),
}

/// Proof that the pages of [`ReadSpan::range`] may be mapped read-only for the device.
#[derive(Debug)]
pub struct ReadSpan<'c> {
    range: PageRange,
    location: Location,
    _commit: PhantomData<&'c ()>,
}

/// Proof that the pages of [`WriteSpan::range`] may be mapped writable for the device.
#[derive(Debug)]
pub struct WriteSpan<'c> {
    range: PageRange,
    location: Location,
    _commit: PhantomData<&'c ()>,
}

impl ReadSpan<'_> {
    /// The addresses of the process.
    #[inline]
    pub fn range(&self) -> PageRange {
        self.range
    }

    /// Where the device finds the pages. It must not write to them: an IOMMU does not prevent that.
    #[inline]
    pub fn location(&self) -> Location {
        self.location
    }
}

impl WriteSpan<'_> {
    /// The addresses of the process.
    #[inline]
    pub fn range(&self) -> PageRange {
        self.range
    }

    /// Where the device finds the pages.
    #[inline]
    pub fn location(&self) -> Location {
        self.location
    }
}

/// The spans of a [`Commit`], in the order of the addresses of the process.
pub struct Spans<'c> {
    start: usize,
    next: usize,
    pfns: &'c [usize],
    addresses: &'c [DmaAddress],
}

impl<'c> Spans<'c> {
    /// What is at page `index`, and the address of the device that the page before it would have.
    #[inline]
    fn at(&self, index: usize) -> Option<(Access, bool, DmaAddress)> {
        let pfn = HmmPfn::from_raw(*self.pfns.get(index)?);
        let address = *self.addresses.get(index)?;
        match pfn.state() {
            State::Present(access) => Some((access, pfn.is_device(), address)),
            State::Hole | State::Error => None,
        }
    }
}

impl<'c> Iterator for Spans<'c> {
    type Item = Span<'c>;

    #[inline]
    fn next(&mut self) -> Option<Span<'c>> {
        let end = self.addresses.len();
        let first = (self.next..end).find(|index| self.at(*index).is_some())?;
        let (access, is_device, address) = self.at(first)?;
        let follows = |n: usize| address.wrapping_add((n * PAGE_SIZE) as DmaAddress);
        let pages = (1..end - first)
            .find(|n| self.at(first + n) != Some((access, is_device, follows(*n))))
            .unwrap_or(end - first);
        self.next = first + pages;

        let start = self.start + first * PAGE_SIZE;
        let range = PageRange::from_len(start, pages * PAGE_SIZE).ok()?;
        let location = match is_device {
            #[cfg(CONFIG_RUST_HMM_DEVICE)]
            true => Location::Device(DeviceRange::new(address as usize, range.len())),
            _ => Location::Bus(address),
        };
        let _commit = PhantomData;
        Some(match access {
            Access::Read => Span::Read(ReadSpan {
                range,
                location,
                _commit,
            }),
            Access::Write => Span::Write(WriteSpan {
                range,
                location,
                _commit,
            }),
        })
    }
}

impl Commit<'_> {
    /// The pages of the window that are present, as the device finds them. Empty unless the mirror
    /// was made with [`Mirror::for_device`](super::Mirror::for_device) or
    /// `Mirror::for_device_with_pool()`.
    ///
    /// The addresses are valid until the driver has answered
    /// [`MirrorOps::invalidate`](super::MirrorOps::invalidate) for them. Whatever the device writes
    /// to a [`Span::Write`] until then is not lost.
    #[inline]
    pub fn spans(&self) -> Spans<'_> {
        Spans {
            start: self.range().start(),
            next: 0,
            pfns: self.pfns(),
            addresses: self.addresses(),
        }
    }
}
