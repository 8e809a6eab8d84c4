// SPDX-License-Identifier: GPL-2.0
//! Error: E0308
//! Hazard: 25
//! Memory is mapped for a device whose driver may be unbound already.

#![forbid(unsafe_code)]

use hmm::DmaBinding;
use kernel::{device::Device, prelude::*};

pub fn bind(dev: &Device) -> Result<DmaBinding> {
    DmaBinding::new(dev)
}
