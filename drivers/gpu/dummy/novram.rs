// SPDX-License-Identifier: GPL-2.0

//! Stands in for `vram.rs` where the kernel has no struct pages for the memory of devices: the GPU
//! has none then.

use super::counters::Account;
use hmm::{
    Mirror,
    MirrorOps,
    PageRange, //
};
use kernel::{
    prelude::*,
    sync::Arc, //
};

/// Stands in for `hmm::Holes`.
pub(crate) enum Holes {
    Keep,
    Populate,
}

/// Nothing is moved.
pub(crate) struct MoveBuf;

impl MoveBuf {
    pub(crate) fn new(_order: u32) -> Result<Self> {
        Ok(Self)
    }
}

/// There is none.
pub(crate) enum Vram {}

/// Nor did anything move.
pub(crate) enum Migrated {}

impl Migrated {
    pub(crate) fn range(&self) -> PageRange {
        match *self {}
    }

    pub(crate) fn pages(&self) -> usize {
        match *self {}
    }
}

impl Vram {
    pub(crate) fn new(_name: &'static CStr, _size: usize) -> Result<Self> {
        Err(ENODEV)
    }

    pub(crate) fn size(&self) -> usize {
        match *self {}
    }

    pub(crate) fn mirror(&self, _ops: Arc<dyn MirrorOps>) -> Result<Mirror> {
        match *self {}
    }

    pub(crate) fn share(&self, _range: PageRange) -> Result<PageRange> {
        match *self {}
    }

    pub(crate) fn take(
        &self,
        _mirror: &Mirror,
        _range: PageRange,
        _holes: Holes,
        _buf: &mut MoveBuf,
        _account: &Arc<Account>,
    ) -> Result<Migrated> {
        match *self {}
    }

    pub(crate) fn give(
        &self,
        _mirror: &Mirror,
        _range: PageRange,
        _buf: &mut MoveBuf,
    ) -> Result<Migrated> {
        match *self {}
    }
}
