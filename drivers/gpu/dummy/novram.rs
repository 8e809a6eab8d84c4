// SPDX-License-Identifier: GPL-2.0

//! Replaces `vram.rs` if `CONFIG_RUST_HMM_DEVICE` is not set. The GPU has no memory of its own
//! then.

use super::counters::FileStats;
use hmm::{
    Access,
    Mirror,
    MirrorOps,
    MirroredMm,
    PageRange, //
};
use kernel::{
    prelude::*,
    sync::Arc, //
};

/// An empty buffer, since nothing migrates.
pub(crate) struct MoveBuf;

impl MoveBuf {
    pub(crate) fn new(_order: u32) -> Result<Self> {
        Ok(Self)
    }
}

/// The memory of a GPU. It has no values, as [`Vram::new`] always fails.
pub(crate) enum Vram {}

/// The outcome of a migration. It has no values, as nothing migrates.
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

    pub(crate) fn coherent(_name: &'static CStr, _start: u64, _size: usize) -> Result<Self> {
        Err(ENODEV)
    }

    pub(crate) fn size(&self) -> usize {
        match *self {}
    }

    pub(crate) fn mirror(&self, _ops: Arc<dyn MirrorOps>) -> Result<Mirror> {
        match *self {}
    }

    pub(crate) fn lose(&self) -> Result {
        match *self {}
    }

    pub(crate) fn evict(&self) -> Result {
        match *self {}
    }

    pub(crate) fn fault_limit(&self, _range: PageRange) -> Result<PageRange> {
        match *self {}
    }

    pub(crate) fn migrate_in(
        &self,
        _mm: &MirroredMm<'_>,
        _range: PageRange,
        _buf: &mut MoveBuf,
        _account: &Arc<FileStats>,
    ) -> Result<Migrated> {
        match *self {}
    }

    pub(crate) fn migrate_for(
        &self,
        _mm: &MirroredMm<'_>,
        _need: PageRange,
        _access: Access,
        _like: PageRange,
        _buf: &mut MoveBuf,
        _account: &Arc<FileStats>,
    ) -> Result<Migrated> {
        match *self {}
    }

    pub(crate) fn migrate_out(
        &self,
        _mm: &MirroredMm<'_>,
        _range: PageRange,
        _buf: &mut MoveBuf,
    ) -> Result<Migrated> {
        match *self {}
    }
}
