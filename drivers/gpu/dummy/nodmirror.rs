// SPDX-License-Identifier: GPL-2.0

//! Replaces `dmirror.rs` if `CONFIG_DUMMY_GPU_DMIRROR` is not set.

use super::gpu::Gpu;
use kernel::{
    prelude::*,
    sync::Arc, //
};

/// Registers no node.
pub(crate) struct Node;

impl Node {
    pub(crate) fn new(_name: &'static CStr, _gpu: Arc<Gpu>) -> Self {
        Self
    }
}

/// Registers no nodes.
pub(crate) struct Nodes;

impl Nodes {
    pub(crate) fn new(_gpu0: Arc<Gpu>, _gpu1: Arc<Gpu>) -> Self {
        Self
    }
}
