// SPDX-License-Identifier: GPL-2.0
//! Error: E0478
//! Hazard: 2
//! What is kept for a page points into what a process's file owns.

#![forbid(unsafe_code)]

use hmm::{CopyBatch, MigrateReason, Mirror, PoolOps};
use kernel::{
    prelude::*,
    sync::{Arc, ArcBorrow},
};

pub struct Vram<'a>(&'a Mirror);

impl<'a> PoolOps for Vram<'a> {
    type PageData = Arc<&'static Mirror>;

    fn copy(&self, batch: &mut CopyBatch<'_>) -> Result {
        batch.for_each(drop);
        Ok(())
    }

    fn read(&self, _address: usize, _buf: &mut [u8]) {}

    fn write(&self, _address: usize, _buf: &[u8]) {}

    fn migrated_to_ram(&self, _data: ArcBorrow<'_, &'static Mirror>, _reason: MigrateReason) {}

    fn page_freed(&self, _data: Arc<&'static Mirror>) {}
}
