// SPDX-License-Identifier: GPL-2.0

//! Tests of `pfn.rs`.

use super::super::{
    pfn::{
        request,
        Access,
        HmmPfn,
        State, //
    }, //
};
use kernel::{
    bindings,
    prelude::*, //
};

const VALID: usize = bindings::hmm_pfn_flags_HMM_PFN_VALID;
const WRITE: usize = bindings::hmm_pfn_flags_HMM_PFN_WRITE;
const ERROR: usize = bindings::hmm_pfn_flags_HMM_PFN_ERROR;
const DMA_MAPPED: usize = bindings::hmm_pfn_flags_HMM_PFN_DMA_MAPPED;
const P2PDMA: usize = bindings::hmm_pfn_flags_HMM_PFN_P2PDMA;
const P2PDMA_BUS: usize = bindings::hmm_pfn_flags_HMM_PFN_P2PDMA_BUS;
const ORDER_SHIFT: usize = bindings::hmm_pfn_flags_HMM_PFN_ORDER_SHIFT;

#[kunit_tests(hmm_pfn)]
mod tests {
    use super::*;

    #[test]
    fn nothing_and_error_allow_nothing() {
        for raw in [0, ERROR, ERROR | VALID, ERROR | VALID | WRITE, WRITE, 42] {
            let pfn = HmmPfn::from_output(raw);
            assert!(!pfn.allows(Access::Read));
            assert!(!pfn.allows(Access::Write));
            assert!(pfn.present().is_none());
        }
        assert_eq!(HmmPfn::from_output(0).state(), State::Hole);
        assert_eq!(HmmPfn::from_output(ERROR).state(), State::Error);
        assert_eq!(HmmPfn::NONE.state(), State::Hole);
    }

    #[test]
    fn write_needs_the_write_flag() {
        let read = HmmPfn::from_output(42 | VALID);
        assert!(read.allows(Access::Read) && !read.allows(Access::Write));
        assert_eq!(read.state(), State::Present(Access::Read));
        let write = HmmPfn::from_output(42 | VALID | WRITE);
        assert!(write.allows(Access::Read) && write.allows(Access::Write));
    }

    #[test]
    fn the_order_survives_and_sticky_flags_do_not() {
        for flag in [DMA_MAPPED, P2PDMA, P2PDMA_BUS] {
            let pfn = HmmPfn::from_output(42 | VALID | flag | (9 << ORDER_SHIFT));
            assert_eq!(pfn.pfn(), Some(42));
            assert_eq!(pfn.order(), 9);
            assert!(!pfn.is_device() && !pfn.is_zero());
            assert_eq!(pfn, HmmPfn::from_output(42 | VALID | (9 << ORDER_SHIFT)));
        }
    }

    #[test]
    fn marks_say_nothing_else() {
        let pfn = HmmPfn::from_output(42 | VALID | WRITE | (31 << ORDER_SHIFT));
        assert!(pfn.with_device().is_device() && !pfn.with_device().is_zero());
        assert!(pfn.with_zero().is_zero() && !pfn.with_zero().is_device());
        for marked in [pfn.with_device(), pfn.with_zero()] {
            assert_eq!(marked.pfn(), pfn.pfn());
            assert_eq!(marked.order(), 31);
            assert_eq!(marked.state(), pfn.state());
        }
    }

    #[test]
    fn a_write_request_is_a_fault_request() {
        assert_eq!(request(None), 0);
        assert_eq!(request(Some(Access::Read)), VALID);
        assert_eq!(request(Some(Access::Write)), VALID | WRITE);
    }
}
