// SPDX-License-Identifier: GPL-2.0

//! Heterogeneous memory management (HMM) for drivers written in Rust.
//!
//! A device that shares the address space of a process needs to fault the pages of the process, to
//! know which of them it may read or write, and to be told when mm takes a page away. If the device
//! has memory of its own, pages of the process also migrate to that memory and back. This crate
//! does these things for a driver, so that the driver needs no `unsafe` code for them and calls no
//! function of mm. It is built on `hmm_range_fault()`, `mmu_interval_notifier`, `migrate_vma_*()`,
//! `memremap_pages()` and `make_device_exclusive()`.
//!
//! # Terms
//!
//! - The **core** is this crate, as opposed to the driver that uses it.
//! - A **mirror** ([`Mirror`]) represents the address space of one process for one device.
//! - A **region** is an aligned part of a mirrored address space: 2^17 pages, which is 512 MiB
//!   where pages have 4 KiB. The core makes a region when a page in it is first needed. Each region
//!   has one `mmu_interval_notifier`, one lock and the entries of its pages. An invalidation makes
//!   concurrent faults in the same region retry; other regions are not affected.
//! - An **entry** says what the device may do with one page: nothing, read it, or read and write
//!   it. The driver sees it as an [`Entry`]. An entry holds no reference to its page. The notifier
//!   takes the region's lock for write and erases the entry before mm takes the page away, so an
//!   entry is valid while the region's lock is held.
//! - A **window** is what one call serves: an aligned block of pages, 2 MiB at most where pages
//!   have 4 KiB, clipped to the region and the VMA. The driver calls again for the rest.
//! - A **commit** ([`Commit`]) is what a successful fault passes to the driver: the entries of a
//!   window, and the proof that no invalidation has collided with the fault.
//! - A **pool** ([`DevicePool`]) is the memory of a device as `struct page`s. Private memory, which
//!   the CPU cannot access, starts empty and grows by **chunks**, each of which is one
//!   `dev_pagemap`. [`CoherentMemory`], which the CPU can access, is one chunk.
//!
//! # The contract
//!
//! - A task of the process makes the [`Mirror`]. The mirror does not keep the process alive. It
//!   owns the notifiers, the locks under which they run and the sequence numbers that they bump.
//!   The driver sees none of these.
//! - When mm invalidates a range, the core erases the entries of the range and then calls
//!   [`MirrorOps::invalidate`]. [`Mirror::read`] and [`Mirror::write`] look the entries up under
//!   the region's lock. So they never access a stale page, even if the driver ignores the
//!   invalidation.
//! - [`MirroredMm::fault`] faults pages and installs their entries. If an invalidation collides
//!   with the fault, it retries, for a bounded time. The [`Commit`] that it passes to the driver
//!   exists only while the region's lock is held, after `mmu_interval_read_retry()` has found no
//!   collision.
//! - A [`Commit`] gives one [`Entry`] for each page of the window. Only a page for which there is a
//!   [`WritePage`] may be mapped writable for the device. [`MirroredMm::make_exclusive`] gives an
//!   [`ExclusivePage`] for a page that no CPU can access meanwhile. The core hands out neither
//!   `struct page`s nor pfns.
//! - A device that does DMA has a [`DmaBinding`], while its driver is bound, and mirrors that are
//!   made with [`Mirror::for_device`]. The core maps pages for it and unmaps them after the device
//!   has stopped using them. [`Commit::spans`] gives the addresses.
//! - The core tracks where each page is. [`MirroredMm::migrate_to_device`] migrates pages to the
//!   memory of a [`DevicePool`]. They migrate back to system memory when the CPU touches them in
//!   private memory, or when the pool is full and evicts them. A fault maps a page of the pool
//!   where it is. The driver copies when the core asks for it ([`PoolOps::copy`]). If anything
//!   fails, the page stays where it was, with its contents.
//! - Units are bytes for addresses and lengths, and pages for counts; an `order` stands for
//!   2^`order` pages. A [`PageRange`] is page-aligned, not empty and does not wrap.
//!
//! # Locks
//!
//! The order, from the outside to the inside: `mmap_lock`; the locks of the reverse map, and
//! reclaim; the region's lock; the driver's own locks. While a region's lock is held, nobody may
//! allocate memory in a way that waits, drop a reference to an mm or fault in user memory.
//! [`CpuAccess::read`] and [`CpuAccess::write`] run with a region's lock held.
//!
//! [`PoolOps::copy`] runs with folio locks held, which nest inside `mmap_lock`. A pool makes room,
//! by adding a chunk or by evicting pages, only while no lock of mm is held.
//!
//! # Leaks and nested calls
//!
//! A driver in safe Rust may leak the objects of this crate, and may call the crate from within its
//! callbacks. That does not cause undefined behavior, and the core never waits for a lock that it
//! already holds for the same task. While the core calls a driver (a method of [`MirrorOps`] or
//! [`PoolOps`], or a closure), page faults are disabled for the task, so an access to user memory
//! that is not present fails. Methods that take a lock of mm or of the core fail with
//! [`EDEADLK`](kernel::error::code::EDEADLK) then, whichever mirror or pool they are called for. By
//! type:
//!
//! - [`Mirror`]: it holds a reference to the module of its driver. If it is leaked, the module
//!   cannot be unloaded, and that is the only effect. If it is dropped while the core calls a
//!   driver, a work item ends it. While the core calls a driver, [`Mirror::read`] and
//!   [`Mirror::write`] return a [`Miss`] instead of [`EDEADLK`](kernel::error::code::EDEADLK).
//! - [`MirroredMm`]: if it is leaked, the address space is never torn down, and keeps its memory
//!   after the process has exited. It borrows the [`Mirror`], so it ends first, and it stays in its
//!   task. It may be dropped anywhere.
//! - [`DmaBinding`]: if it is leaked, or dropped while the core calls a driver, the core ends it
//!   when the resources of the device are released.
//! - [`DevicePool`]: if it is leaked, or dropped while the core calls a driver, the core ends it
//!   when its module is unloaded: after the module's exit function, before the module's code is
//!   freed.
//! - [`CoherentMemory`]: if it is leaked, the range of physical addresses stays reserved.
//! - [`Commit`], [`Entry`], [`ReadPage`], [`WritePage`] and [`ExclusivePage`] are only lent to a
//!   closure and have no destructor. A closure cannot fault again, so a task never has those of two
//!   mirrors at a time and cannot confuse their pages.
//! - [`Span`], [`ReadSpan`] and [`WriteSpan`]: the same.
//! - [`Invalidate`] and [`Invalidated`] have a lifetime that is unique to each call of
//!   [`MirrorOps::invalidate`]. So the callback can only return the [`Invalidated`] that was made
//!   from its own [`Invalidate`]. What [`Invalidate::flushing`] was given, the core drops after it
//!   has waited.
//! - [`CopyBatch`], [`CopyOp`], [`DeviceRange`], [`RamPages`] and [`NewMemory`] are passed to
//!   [`PoolOps::copy`] and have no destructor. A batch fails if the driver has not taken all of its
//!   items, or has not written every byte of a [`NewMemory`]. The core cannot see what the device
//!   does: it relies on the driver for [`CopyOp::ToDevice`] and [`CopyOp::Zero`], and for
//!   [`NewMemory::filled`].
//! - [`PageData`] is owned by a page in use. The driver gets it back when the page is freed, so
//!   what the driver does with it then cannot affect the page.
//! - [`FaultBuf`] and [`MigrateBuf`] are scratch memory. No call uses what an earlier one left
//!   there.
//! - All others are plain values.
//!
//! # Layers
//!
//! A driver uses this crate and `kernel`; this crate uses mm. The unsafe code is in this crate, a
//! driver needs none. `exports.c` lists the functions that a driver can link to. All of them are
//! GPL-only and have a user in the tree.
//!
//! C headers: [`include/linux/hmm.h`](srctree/include/linux/hmm.h),
//! [`include/linux/memremap.h`](srctree/include/linux/memremap.h),
//! [`include/linux/migrate.h`](srctree/include/linux/migrate.h),
//! [`include/linux/mmu_notifier.h`](srctree/include/linux/mmu_notifier.h)
//!
//! Reference: <https://docs.kernel.org/mm/hmm-rust.html>

#![no_std]
// Stable since Rust 1.89.0. The KUnit macros need it.
#![feature(used_with_arg)]
// The documentation above links to items that exist only with CONFIG_RUST_HMM_DEVICE.
#![cfg_attr(not(CONFIG_RUST_HMM_DEVICE), allow(rustdoc::broken_intra_doc_links))]

mod binding;
mod callback;
#[cfg(CONFIG_RUST_HMM_DEVICE)]
mod coherent;
mod commit;
#[cfg(CONFIG_RUST_HMM_DEVICE)]
mod copy;
#[cfg(CONFIG_RUST_HMM_DEVICE)]
mod cpu_fault;
#[cfg(CONFIG_RUST_HMM_DEVICE)]
mod device_pool;
mod dma;
mod entries;
#[cfg(CONFIG_RUST_HMM_DEVICE)]
mod evict;
#[cfg(CONFIG_RUST_HMM_DEVICE)]
mod exclusive;
mod fault;
#[cfg(CONFIG_RUST_HMM_DEVICE)]
mod folio;
mod hmm_range;
#[cfg(CONFIG_RUST_HMM_KUNIT_TEST)]
mod kunit;
#[cfg(CONFIG_RUST_HMM_DEVICE)]
mod migrate;
#[cfg(CONFIG_RUST_HMM_DEVICE)]
mod migrate_vma;
mod mirror;
mod mirrored_mm;
mod pfn;
#[cfg_attr(not(CONFIG_RUST_HMM_DEVICE), path = "nopool.rs")]
mod pool;
#[cfg(CONFIG_RUST_HMM_DEVICE)]
mod pool_ops;
mod range;
mod region;
mod rwsem;
#[cfg(CONFIG_RUST_HMM_DEVICE)]
mod slots;
mod span;
mod vma;

pub use binding::DmaBinding;
#[cfg(CONFIG_RUST_HMM_DEVICE)]
pub use coherent::CoherentMemory;
pub use commit::{
    Commit,
    DevicePage,
    Entry,
    RamPage,
    ReadPage,
    WritePage, //
};
#[cfg(CONFIG_RUST_HMM_DEVICE)]
pub use copy::{
    CopyBatch,
    CopyOp,
    DeviceRange,
    NewMemory,
    RamPages, //
};
#[cfg(CONFIG_RUST_HMM_DEVICE)]
pub use device_pool::{
    DevicePool,
    Engine, //
};
pub use dma::DmaDevice;
#[cfg(CONFIG_RUST_HMM_DEVICE)]
pub use exclusive::ExclusivePage;
pub use fault::FaultRequest;
pub use hmm_range::FaultBuf;
#[cfg(CONFIG_RUST_HMM_DEVICE)]
pub use migrate::{
    MigrateBuf,
    Migrated, //
};
#[cfg(CONFIG_RUST_HMM_DEVICE)]
pub use migrate_vma::Holes;
pub use mirror::{
    Mirror,
    Miss, //
};
pub use mirrored_mm::MirroredMm;
pub use pfn::Access;
#[cfg(CONFIG_RUST_HMM_DEVICE)]
pub use pool_ops::{
    CpuAccess,
    MigrateReason,
    PageData,
    PoolOps, //
};
pub use range::PageRange;
pub use region::{
    Cause,
    Flush,
    Invalidate,
    Invalidated,
    MirrorOps, //
};
pub use span::{
    Location,
    ReadSpan,
    Span,
    Spans,
    WriteSpan, //
};

/// Prefix to appear before log messages printed from within the crate.
const __LOG_PREFIX: &[u8] = b"hmm\0";
