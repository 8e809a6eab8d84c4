// SPDX-License-Identifier: GPL-2.0
//! Error: E0624
//! Hazard: 9
//! A driver reaches a region, and with it the notifier's registration.

#![forbid(unsafe_code)]

use hmm::Mirror;

pub fn remove(mirror: &Mirror, va: usize) {
    drop(mirror.region(va));
}
