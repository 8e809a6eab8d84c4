// SPDX-License-Identifier: GPL-2.0
//! Error: E0308
//! Hazard: 2
//! A pool is taken for that of another driver, by a subtype, whose pages keep other data.

#![forbid(unsafe_code)]
#![allow(coherence_leak_check)]

use hmm::{CopyBatch, DevicePool, MigrateReason, PoolOps};
use kernel::{
    prelude::*,
    sync::{Arc, ArcBorrow},
};

pub struct Kind<F>(F);

type General = for<'a> fn(&'a ());
type Special = fn(&'static ());

impl PoolOps for Kind<General> {
    type PageData = u64;

    fn copy(&self, batch: &mut CopyBatch<'_>) -> Result {
        batch.for_each(drop);
        Ok(())
    }

    fn migrated_to_ram(&self, _data: u64, _pages: usize, _reason: MigrateReason) {}

    fn page_freed(&self, _data: u64, _pages: usize) {}
}

impl PoolOps for Kind<Special> {
    type PageData = Arc<u64>;

    fn copy(&self, batch: &mut CopyBatch<'_>) -> Result {
        batch.for_each(drop);
        Ok(())
    }

    fn migrated_to_ram(&self, _data: ArcBorrow<'_, u64>, _pages: usize, _reason: MigrateReason) {}

    fn page_freed(&self, _data: Arc<u64>, _pages: usize) {}
}

pub fn convert(pool: DevicePool<Kind<Special>>) -> DevicePool<Kind<General>> {
    pool
}
