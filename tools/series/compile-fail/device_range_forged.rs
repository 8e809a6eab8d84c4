// SPDX-License-Identifier: GPL-2.0
//! Error: E0451
//! Hazard: 4
//! A range of the device's memory is made by the driver.

#![forbid(unsafe_code)]

use hmm::DeviceRange;

pub fn forge() -> DeviceRange {
    DeviceRange { start: 1, len: 1 }
}
