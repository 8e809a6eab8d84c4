// SPDX-License-Identifier: GPL-2.0
//! Error: E0382
//! Hazard: 14, 16
//! Pages are moved to a pool that has ended.

#![forbid(unsafe_code)]

use hmm::{DevicePool, Holes, MigrateBuf, Migrated, Mirror, PageRange, PoolOps};
use kernel::prelude::*;

pub fn go_on<T: PoolOps<PageData = u64>>(
    pool: DevicePool<T>,
    mirror: &Mirror,
    range: PageRange,
    buf: &mut MigrateBuf,
) -> Result<Migrated> {
    drop(pool);
    mirror.mm()?.migrate_to_device(&pool, range, Holes::Keep, buf, |_| Ok(0))
}
