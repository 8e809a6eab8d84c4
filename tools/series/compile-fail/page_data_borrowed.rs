// SPDX-License-Identifier: GPL-2.0
//! Error: E0521
//! Hazard: 2
//! What is kept for a page points into what a process's file owns.

#![forbid(unsafe_code)]

use hmm::{Mirror, PageData};
use kernel::sync::Arc;

fn kept(data: impl PageData) {
    drop(data);
}

pub fn keep(mirror: Arc<&Mirror>) {
    kept(mirror);
}
