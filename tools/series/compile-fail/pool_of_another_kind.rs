// SPDX-License-Identifier: GPL-2.0
//! Error: E0308
//! Hazard: 2
//! A pool of one driver is taken for that of another, whose pages keep other data.

#![forbid(unsafe_code)]

use hmm::{DevicePool, PoolOps};

pub fn convert<T, U>(pool: DevicePool<T>) -> DevicePool<U>
where
    T: PoolOps<PageData = u64>,
    U: PoolOps<PageData = kernel::sync::Arc<u64>>,
{
    pool
}
