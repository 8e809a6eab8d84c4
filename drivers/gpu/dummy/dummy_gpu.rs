// SPDX-License-Identifier: GPL-2.0

//! A GPU made of software that computes on the memory of processes, by plain pointers.
//!
//! It tests the Rust HMM core, the crate `hmm`, and shows how a driver uses it. Each layer is a
//! file and calls only layers that are listed below it:
//!
//! - `dmirror`: device nodes with the ioctls of the HMM test driver.
//! - `gpu`: the instances and their open files.
//! - `uapi`, `debugfs`: the ioctls, and the counters in debugfs.
//! - `queue`: the submissions of a file that a work item processes, without the submitting task.
//! - `job`: one submission, which a work item and the submitting task process in turns.
//! - `retry_limit`: when to give up a page fault that has to be serviced again and again.
//! - `engine`, `command`: the computations of the GPU. They do no I/O and take no locks.
//! - `svm`: the address space of a process as the GPU sees it. Gives the engine access to memory,
//!   and services GPU page faults through `hmm`.
//! - `policy`: which ranges of addresses belong in which memory.
//! - `vram`: the GPU's memory and its copy engine.
//! - `mmu`: the GPU's page table.
//! - `tlb`: how long a flush of its TLB takes.
//! - `power`: whether the GPU has power.
//! - `counters`: the statistics.
//!
//! The driver has no unsafe code. The types of `hmm` do not let it access memory of a process that
//! the process itself could not access, or that mm has taken away.
//!
//! Reference: <https://docs.kernel.org/gpu/dummy-gpu.html>

#![forbid(unsafe_code)]

mod command;
mod counters;
mod debugfs;
#[cfg_attr(not(CONFIG_DUMMY_GPU_DMIRROR), path = "nodmirror.rs")]
mod dmirror;
mod engine;
mod gpu;
mod job;
mod mmu;
mod policy;
mod power;
mod queue;
mod retry_limit;
mod svm;
mod tlb;
mod uapi;
#[cfg_attr(not(CONFIG_RUST_HMM_DEVICE), path = "novram.rs")]
mod vram;

use gpu::{
    Gpu,
    Instance, //
};
use kernel::{
    prelude::*,
    sizes::SZ_1M, //
};
use tlb::Tlb;
use vram::Vram;

module! {
    type: DummyGpu,
    name: "dummy_gpu",
    description: "Dummy GPU to test Rust HMM",
    license: "GPL",
    params: {
        vram_mb: u32 {
            default: 64,
            description: "Memory of each instance in MiB, up to 1024, or 0 for none (default 64)",
        },
        coherent0: u64 {
            default: 0,
            description: "Physical address of memory that CPUs can use, for an instance of its own",
        },
        coherent1: u64 {
            default: 0,
            description: "The same, for another instance",
        },
        coherent_mb: u32 {
            default: 256,
            description: "Size of the memory at each of these addresses in MiB (default 256)",
        },
        devices: u32 {
            default: 2,
            description: "Number of instances, from 2 to 4 (default 2)",
        },
        flush_us: u32 {
            default: 0,
            description: "Time of a TLB flush in microseconds, up to 1000000 (default 0)",
        },
    },
}

/// The names of the instances after the first two.
const OTHERS: [&CStr; 2] = [c"dummy_gpu2", c"dummy_gpu3"];

/// The names of the instances with coherent memory, and of their nodes for hmm-tests.
const COHERENT: [(&CStr, &CStr); 2] = [
    (c"dummy_gpu_coherent0", c"hmm_dmirror2"),
    (c"dummy_gpu_coherent1", c"hmm_dmirror3"),
];

#[pin_data]
struct DummyGpu {
    #[pin]
    _dmirror: dmirror::Nodes,
    _coherent_dmirror: KVec<Pin<KBox<dmirror::Node>>>,
    #[pin]
    _gpu0: Instance,
    #[pin]
    _gpu1: Instance,
    _others: KVec<Pin<KBox<Instance>>>,
}

impl kernel::InPlaceModule for DummyGpu {
    fn init(_module: &'static ThisModule) -> impl PinInit<Self, Error> {
        pin_init::pin_init_scope(|| {
            let root = kernel::debugfs::Dir::new(c"dummy_gpu");
            let vram_size = if cfg!(CONFIG_RUST_HMM_DEVICE) {
                module_parameters::vram_mb.value() as usize * SZ_1M
            } else {
                0
            };
            let flush_us = module_parameters::flush_us.value();
            let gpu = |name| {
                let vram = match vram_size {
                    0 => None,
                    size => Some(Vram::new(name, size)?),
                };
                Gpu::new(name, &root, vram, Tlb::new(flush_us)?)
            };
            let gpu0 = gpu(c"dummy_gpu0")?;
            let gpu1 = gpu(c"dummy_gpu1")?;
            let others = (module_parameters::devices.value() as usize)
                .checked_sub(2)
                .and_then(|count| OTHERS.get(..count))
                .ok_or(EINVAL)?;
            let mut instances = KVec::new();
            for name in others {
                let instance = KBox::pin_init(Instance::new(name, gpu(name)?), GFP_KERNEL)?;
                instances.push(instance, GFP_KERNEL)?;
            }
            let starts = [
                module_parameters::coherent0.value(),
                module_parameters::coherent1.value(),
            ];
            let size = module_parameters::coherent_mb.value() as usize * SZ_1M;
            let mut nodes = KVec::new();
            for ((name, node), &start) in COHERENT.into_iter().zip(&starts) {
                if start == 0 {
                    continue;
                }
                let vram = Vram::coherent(name, start, size)?;
                let gpu = Gpu::new(name, &root, Some(vram), Tlb::new(flush_us)?)?;
                nodes.push(
                    KBox::pin_init(dmirror::Node::new(node, gpu.clone()), GFP_KERNEL)?,
                    GFP_KERNEL,
                )?;
                let instance = KBox::pin_init(Instance::new(name, gpu), GFP_KERNEL)?;
                instances.push(instance, GFP_KERNEL)?;
            }

            Ok(try_pin_init!(Self {
                _gpu0 <- Instance::new(c"dummy_gpu0", gpu0.clone()),
                _gpu1 <- Instance::new(c"dummy_gpu1", gpu1.clone()),
                _others: instances,
                _dmirror <- dmirror::Nodes::new(gpu0, gpu1),
                _coherent_dmirror: nodes,
            }? Error))
        })
    }
}
