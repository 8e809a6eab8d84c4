// SPDX-License-Identifier: GPL-2.0
//! Error: E0308
//! Hazard: 1
//! Pages that may only be read are mapped for the device to write.

#![forbid(unsafe_code)]

use hmm::{Location, ReadSpan, WriteSpan};

pub fn map_writable(span: &WriteSpan<'_>) -> Location {
    span.location()
}

pub fn map(span: &ReadSpan<'_>) -> Location {
    map_writable(span)
}
