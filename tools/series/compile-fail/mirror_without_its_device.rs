// SPDX-License-Identifier: GPL-2.0
//! Error: E0308
//! Hazard: 25
//! A mirror maps memory for a device that nobody unbinds: its driver has no binding.

#![forbid(unsafe_code)]

use hmm::{Mirror, MirrorOps};
use kernel::{
    device::{Bound, Device},
    prelude::*,
    sync::Arc,
};

pub fn open(
    module: &'static ThisModule,
    ops: Arc<dyn MirrorOps>,
    dev: &Device<Bound>,
) -> Result<Mirror> {
    Mirror::for_device(module, ops, dev)
}
