// SPDX-License-Identifier: GPL-2.0
//! Error: E0599
//! Hazard: 3
//! What a migration says is taken for pages to map.

#![forbid(unsafe_code)]

use hmm::{MigrateBuf, Mirror, PageRange};
use kernel::prelude::*;

pub fn map(mirror: &Mirror, range: PageRange, buf: &mut MigrateBuf) -> Result<usize> {
    Ok(mirror.migrate_to_ram(range, buf)?.entries().count())
}
