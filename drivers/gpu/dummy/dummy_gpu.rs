// SPDX-License-Identifier: GPL-2.0

//! A GPU made of software that computes on the memory of processes, by plain pointers.
//!
//! It tests the Rust HMM core and shows how a driver uses it. Each layer is a file and calls only
//! those below it:
//!
//! - `gpu`: the instances and their open files.
//! - `uapi`, `debugfs`: ioctls, and counters to read.
//! - `job`: one submission; the engine's turns and the submitting task's.
//! - `engine`, `command`: what the GPU computes. Pure.
//! - `svm`: the address space of a process for the GPU; services GPU page faults through `hmm`.
//! - `mmu`: the GPU's page table. Pure.
//! - `counters`: what all of them count.
//!
//! There is no unsafe code: what a driver must not do with a process's memory, it cannot express.
//!
//! Reference: <https://docs.kernel.org/gpu/dummy-gpu.html>

#![forbid(unsafe_code)]

mod command;
mod counters;
mod debugfs;
mod engine;
mod gpu;
mod job;
mod mmu;
mod svm;
mod uapi;

use gpu::Instance;
use kernel::prelude::*;

module! {
    type: DummyGpu,
    name: "dummy_gpu",
    description: "Dummy GPU to test Rust HMM",
    license: "GPL",
}

#[pin_data]
struct DummyGpu {
    #[pin]
    _gpu0: Instance,
    #[pin]
    _gpu1: Instance,
}

impl kernel::InPlaceModule for DummyGpu {
    fn init(_module: &'static ThisModule) -> impl PinInit<Self, Error> {
        let root = kernel::debugfs::Dir::new(c"dummy_gpu");

        try_pin_init!(Self {
            _gpu0 <- Instance::new(c"dummy_gpu0", &root),
            _gpu1 <- Instance::new(c"dummy_gpu1", &root),
        })
    }
}
