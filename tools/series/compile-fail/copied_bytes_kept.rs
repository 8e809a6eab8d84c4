// SPDX-License-Identifier: GPL-2.0
//! Error: lifetime may not live long enough
//! Hazard: 11
//! Bytes of a page that migrates are kept after the batch.

#![forbid(unsafe_code)]

use hmm::{CopyBatch, CopyOp};

pub fn keep(batch: &mut CopyBatch<'_>) -> Option<&'static [u8]> {
    match batch.next() {
        Some(CopyOp::ToDevice { from, .. }) => Some(from.bytes()),
        _ => None,
    }
}
