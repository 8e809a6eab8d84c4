// SPDX-License-Identifier: GPL-2.0
//! Error: E0608
//! Hazard: 11
//! System memory that a page is to move to is read: it may hold old data of others.

#![forbid(unsafe_code)]

use hmm::{CopyBatch, CopyOp};

pub fn first_byte(batch: &mut CopyBatch<'_>) -> Option<u8> {
    match batch.next() {
        Some(CopyOp::ToRam { to, .. }) => Some(to[0]),
        _ => None,
    }
}
