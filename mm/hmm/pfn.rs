// SPDX-License-Identifier: GPL-2.0

//! Typed decoding of what `hmm_range_fault()` reports of a page.
//!
//! The only place that knows the bits of `enum hmm_pfn_flags`. Pure: no C code is called.
//!
//! C header: [`include/linux/hmm.h`](srctree/include/linux/hmm.h)

use kernel::{
    bindings,
    prelude::*, //
};

const VALID: usize = bindings::hmm_pfn_flags_HMM_PFN_VALID;
const WRITE: usize = bindings::hmm_pfn_flags_HMM_PFN_WRITE;
const ERROR: usize = bindings::hmm_pfn_flags_HMM_PFN_ERROR;
const FLAGS: usize = bindings::hmm_pfn_flags_HMM_PFN_FLAGS;
const REQ_FAULT: usize = bindings::hmm_pfn_flags_HMM_PFN_REQ_FAULT;
const REQ_WRITE: usize = bindings::hmm_pfn_flags_HMM_PFN_REQ_WRITE;

// An all-zero output is a page that is not there but could be faulted: `Pfn::NONE` relies on it.
static_assert!(VALID & FLAGS == VALID && WRITE & FLAGS == WRITE && ERROR & FLAGS == ERROR);
static_assert!(VALID != 0 && WRITE != 0 && ERROR != 0);
static_assert!(VALID & WRITE == 0 && VALID & ERROR == 0 && WRITE & ERROR == 0);

/// The order of the mapping, as `hmm_pfn_to_map_order()` has it.
const ORDER_SHIFT: usize = bindings::hmm_pfn_flags_HMM_PFN_ORDER_SHIFT;
const ORDER: usize = 0x1f << ORDER_SHIFT;

/// Says of a page that it is in the memory of the device. mm has this flag and the next for pages
/// that are mapped for DMA, and does not set them: they would be kept from the input.
const DEVICE: usize = bindings::hmm_pfn_flags_HMM_PFN_P2PDMA;
/// Says of a page that it is the one of zeroes that all share.
const ZERO: usize = bindings::hmm_pfn_flags_HMM_PFN_P2PDMA_BUS;
static_assert!((DEVICE | ZERO | ORDER) & FLAGS == DEVICE | ZERO | ORDER);
static_assert!((DEVICE | ZERO) & (VALID | WRITE | ERROR | ORDER) == 0 && DEVICE & ZERO == 0);

/// What the device wants to do with a page.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read it. Enough to map the page read-only.
    Read,
    /// Read and write it.
    Write,
}

/// The input of `hmm_range_fault()`: what it is to fault in, if anything.
#[inline]
pub(crate) const fn request(access: Option<Access>) -> usize {
    match access {
        None => 0,
        Some(Access::Read) => REQ_FAULT,
        Some(Access::Write) => REQ_FAULT | REQ_WRITE,
    }
}

/// What is known of a page.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// Nothing that is mapped; a fault may bring it, or fail.
    Hole,
    /// Not accessible: no VMA, no read permission, or out of the kernel's reach.
    Error,
    /// There, and at least readable.
    Present(Access),
}

/// The output of `hmm_range_fault()` for a page.
///
/// Of the other flags of the C value none survives.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Zeroable)]
#[repr(transparent)]
pub(crate) struct Pfn(usize);

impl Pfn {
    /// A page that is not there.
    pub(crate) const NONE: Self = Self(0);

    /// A page that is there and that no device is to see.
    pub(crate) const ERROR: Self = Self(ERROR);

    /// Takes over one element of the output array.
    #[inline]
    pub(crate) const fn from_output(raw: usize) -> Self {
        if raw & ERROR != 0 {
            Self(ERROR)
        } else if raw & VALID != 0 {
            Self(raw & (VALID | WRITE | ORDER | !FLAGS))
        } else {
            Self::NONE
        }
    }

    /// What a device may see of the page where the VMA allows it no more than `allowed`.
    #[inline]
    pub(crate) const fn limit(self, allowed: Option<Access>) -> Self {
        match allowed {
            None => Self::ERROR,
            Some(Access::Read) => Self(self.0 & !WRITE),
            Some(Access::Write) => self,
        }
    }

    /// The same page, known to be in the memory of the device.
    #[inline]
    pub(crate) const fn with_device(self) -> Self {
        Self(self.0 | DEVICE)
    }

    /// Whether the page is in the memory of the device.
    #[inline]
    pub(crate) const fn is_device(self) -> bool {
        self.0 & DEVICE != 0
    }

    /// The same page, known to be the shared one of zeroes.
    #[inline]
    pub(crate) const fn with_zero(self) -> Self {
        Self(self.0 | ZERO)
    }

    /// Whether the page is the shared one of zeroes.
    #[inline]
    pub(crate) const fn is_zero(self) -> bool {
        self.0 & ZERO != 0
    }

    /// The order of the block that the CPU maps as one with this page. It may reach past the range
    /// that was asked for.
    #[inline]
    pub(crate) const fn order(self) -> u32 {
        ((self.0 & ORDER) >> ORDER_SHIFT) as u32
    }

    /// The value, for [`Pfn::from_raw`].
    #[inline]
    pub(crate) const fn into_raw(self) -> usize {
        self.0
    }

    /// What [`Pfn::into_raw`] returned.
    #[inline]
    pub(crate) const fn from_raw(raw: usize) -> Self {
        Self(raw)
    }

    /// Decodes the state.
    #[inline]
    pub(crate) const fn state(self) -> State {
        if self.0 & ERROR != 0 {
            State::Error
        } else if self.0 & VALID == 0 {
            State::Hole
        } else if self.0 & WRITE == 0 {
            State::Present(Access::Read)
        } else {
            State::Present(Access::Write)
        }
    }

    /// Whether the page is there and `access` to it is allowed.
    #[inline]
    pub(crate) const fn allows(self, access: Access) -> bool {
        matches!(
            (self.state(), access),
            (State::Present(Access::Write), _) | (State::Present(Access::Read), Access::Read)
        )
    }

    /// The value in the form that `hmm_pfn_to_page()` takes, if the page is there.
    #[inline]
    pub(crate) const fn present(self) -> Option<usize> {
        match self.state() {
            State::Present(_) => Some(self.0),
            State::Hole | State::Error => None,
        }
    }

    /// The pfn, if the page is there.
    #[cfg(CONFIG_RUST_HMM_KUNIT_TEST)]
    #[inline]
    pub(crate) const fn pfn(self) -> Option<usize> {
        match self.present() {
            Some(raw) => Some(raw & !FLAGS),
            None => None,
        }
    }
}
