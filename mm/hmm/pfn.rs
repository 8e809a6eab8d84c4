// SPDX-License-Identifier: GPL-2.0

//! Encodes the input of `hmm_range_fault()` and decodes its output.
//!
//! This is the only file that uses the bits of `enum hmm_pfn_flags`. It calls no C code.
//!
//! C header: [`include/linux/hmm.h`](srctree/include/linux/hmm.h)

use kernel::{
    bindings,
    page::PAGE_SIZE,
    prelude::*, //
};

const VALID: usize = bindings::hmm_pfn_flags_HMM_PFN_VALID;
const WRITE: usize = bindings::hmm_pfn_flags_HMM_PFN_WRITE;
const ERROR: usize = bindings::hmm_pfn_flags_HMM_PFN_ERROR;
const FLAGS: usize = bindings::hmm_pfn_flags_HMM_PFN_FLAGS;
const REQ_FAULT: usize = bindings::hmm_pfn_flags_HMM_PFN_REQ_FAULT;
const REQ_WRITE: usize = bindings::hmm_pfn_flags_HMM_PFN_REQ_WRITE;

// An output without these flags is a page that is not present but could be faulted. `HmmPfn::NONE`,
// which is zero, relies on this.
static_assert!(VALID & FLAGS == VALID && WRITE & FLAGS == WRITE && ERROR & FLAGS == ERROR);
static_assert!(VALID != 0 && WRITE != 0 && ERROR != 0);
static_assert!(VALID & WRITE == 0 && VALID & ERROR == 0 && WRITE & ERROR == 0);

/// The field that `hmm_pfn_to_map_order()` decodes: the order of the CPU mapping.
const ORDER_SHIFT: usize = bindings::hmm_pfn_flags_HMM_PFN_ORDER_SHIFT;
const ORDER: usize = 0x1f << ORDER_SHIFT;

/// The page is in the memory of the device.
///
/// mm uses this bit and those of `ZERO` and `REMOTE` for pages that are mapped for DMA.
/// `hmm_range_fault()` only copies them from its input, where this crate does not set them, so the
/// bits are free for use.
const DEVICE: usize = bindings::hmm_pfn_flags_HMM_PFN_P2PDMA;
/// The page is the shared zero page.
const ZERO: usize = bindings::hmm_pfn_flags_HMM_PFN_P2PDMA_BUS;
/// The page is in coherent memory of another device.
const REMOTE: usize = bindings::hmm_pfn_flags_HMM_PFN_DMA_MAPPED;
static_assert!((DEVICE | ZERO | REMOTE | ORDER) & FLAGS == DEVICE | ZERO | REMOTE | ORDER);
static_assert!((DEVICE | ZERO | REMOTE) & (VALID | WRITE | ERROR | ORDER) == 0);
static_assert!(DEVICE & ZERO == 0 && (DEVICE | ZERO) & REMOTE == 0);

/// What the device wants to do with a page.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read the page. The device may map it read-only.
    Read,
    /// Read and write the page.
    Write,
}

/// The flags that request `hmm_range_fault()` to fault pages for `access`, or not to fault any.
#[inline]
pub(crate) const fn request(access: Option<Access>) -> usize {
    match access {
        None => 0,
        Some(Access::Read) => REQ_FAULT,
        Some(Access::Write) => REQ_FAULT | REQ_WRITE,
    }
}

/// The state of a page in the output of `hmm_range_fault()`.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// Not present. A fault may make the page present, or fail.
    Hole,
    /// Not accessible: there is no VMA, the VMA permits no read, or the page is not in the kernel's
    /// direct map.
    Error,
    /// Present, with the access that is allowed.
    Present(Access),
}

/// The output of `hmm_range_fault()` for one page: the pfn, the order, and the flags that this file
/// defines. [`HmmPfn::from_output`] drops all other flags.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Zeroable)]
#[repr(transparent)]
pub(crate) struct HmmPfn(usize);

impl HmmPfn {
    /// A page that is not present.
    pub(crate) const NONE: Self = Self(0);

    /// A page that the device must not access.
    pub(crate) const ERROR: Self = Self(ERROR);

    /// Converts one element of the output array. A page that is not valid becomes
    /// [`HmmPfn::NONE`] or [`HmmPfn::ERROR`].
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

    /// The page with this number, which may be read.
    #[cfg(CONFIG_RUST_HMM_DEVICE)]
    #[inline]
    pub(crate) const fn from_pfn(pfn: usize) -> Self {
        Self(pfn | VALID)
    }

    /// Reduces the access to `allowed`, the most that the VMA allows. If it allows no access, the
    /// result is [`HmmPfn::ERROR`].
    #[inline]
    pub(crate) const fn limit(self, allowed: Option<Access>) -> Self {
        match allowed {
            None => Self::ERROR,
            Some(Access::Read) => Self(self.0 & !WRITE),
            Some(Access::Write) => self,
        }
    }

    /// Marks the page as one in the memory of the device.
    #[inline]
    pub(crate) const fn with_device(self) -> Self {
        Self(self.0 | DEVICE)
    }

    /// Whether the page is marked as one in the memory of the device.
    #[inline]
    pub(crate) const fn is_device(self) -> bool {
        self.0 & DEVICE != 0
    }

    /// Marks the page as the shared zero page.
    #[inline]
    pub(crate) const fn with_zero(self) -> Self {
        Self(self.0 | ZERO)
    }

    /// Whether the page is marked as the shared zero page.
    #[inline]
    pub(crate) const fn is_zero(self) -> bool {
        self.0 & ZERO != 0
    }

    /// Marks the page as one in coherent memory of another device.
    #[inline]
    pub(crate) const fn with_remote(self) -> Self {
        Self(self.0 | REMOTE)
    }

    /// Whether the page is marked as one in coherent memory of another device.
    #[inline]
    pub(crate) const fn is_remote(self) -> bool {
        self.0 & REMOTE != 0
    }

    /// The order, in pages, of the CPU mapping that this page is a part of. The mapping may reach
    /// past the range that was passed to `hmm_range_fault()`.
    #[inline]
    pub(crate) const fn order(self) -> u32 {
        ((self.0 & ORDER) >> ORDER_SHIFT) as u32
    }

    /// Whether this page, at `va`, is the next one after `last` in the same large mapping, and so
    /// in the same folio.
    #[inline]
    pub(crate) const fn is_next_of(self, last: Self, va: usize) -> bool {
        let block = PAGE_SIZE << self.order();
        self.order() != 0 && self.0 == last.0 + 1 && va & (block - 1) != 0
    }

    /// The next page of the same folio. An error stays one.
    #[inline]
    pub(crate) const fn next(self) -> Self {
        match self.state() {
            State::Present(_) => Self(self.0 + 1),
            State::Hole | State::Error => self,
        }
    }

    /// Converts to an integer, for [`HmmPfn::from_raw`].
    #[inline]
    pub(crate) const fn into_raw(self) -> usize {
        self.0
    }

    /// Converts from an integer that [`HmmPfn::into_raw`] returned.
    #[inline]
    pub(crate) const fn from_raw(raw: usize) -> Self {
        Self(raw)
    }

    /// The state of the page.
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

    /// Whether the page is present and `access` to it is allowed.
    #[inline]
    pub(crate) const fn allows(self, access: Access) -> bool {
        matches!(
            (self.state(), access),
            (State::Present(Access::Write), _) | (State::Present(Access::Read), Access::Read)
        )
    }

    /// The value that `hmm_pfn_to_page()` takes, if the page is present.
    #[inline]
    pub(crate) const fn present(self) -> Option<usize> {
        match self.state() {
            State::Present(_) => Some(self.0),
            State::Hole | State::Error => None,
        }
    }

    /// The pfn, if the page is present.
    #[inline]
    pub(crate) const fn pfn(self) -> Option<usize> {
        match self.present() {
            Some(raw) => Some(raw & !FLAGS),
            None => None,
        }
    }
}
