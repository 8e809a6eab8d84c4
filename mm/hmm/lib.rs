// SPDX-License-Identifier: GPL-2.0

//! Heterogeneous memory management for drivers written in Rust.
//!
//! A device that shares a process's address space needs three things of mm: to fault the process's
//! pages, to know what it may see of them, and to hear when that ends. One that has memory of its
//! own needs a fourth: to have pages there. This crate gives a driver those, and nothing else of
//! mm.
//!
//! # The contract
//!
//! - A [`Mirror`] stands for one address space. It is made by a task of the process and does not
//!   keep the process alive. It owns the notifiers, the lock under which they run and the sequence
//!   that they bump. The driver sees none of these.
//! - The core owns the **entries**: what the device may see at each page. When mm invalidates a
//!   range, the core has erased its entries before the driver hears of it
//!   ([`MirrorOps::invalidate`]); so a driver that forgets to act on an invalidation reads nothing
//!   stale. [`Mirror::read`] and [`Mirror::write`] look entries up under the lock.
//! - [`Mirror::fault`] makes entries. It runs the collision-retry loop, within a bound. The
//!   [`Commit`] that it hands to the driver proves that the entries hold: it exists only under the
//!   lock, after the sequence was checked.
//! - A [`Commit`] gives one [`Entry`] a page, clamped to the window. A page that the device may
//!   write is a [`WritePage`]; nothing else is. One that no CPU may access meanwhile is an
//!   [`ExclusivePage`] ([`Mirror::make_exclusive`]). Neither a `struct page` nor a pfn leaves the
//!   core.
//! - A [`DevicePool`] makes a device's memory a place for pages. What is where is the core's to
//!   know: [`Mirror::migrate_to_device`] moves pages there, the CPU's touch or a full pool moves
//!   them back, and a device that faults a page gets it where it is. The driver copies when it is
//!   told to ([`PoolOps::copy`]). Whatever fails, a page is where it was, with what it held.
//! - Units are bytes for addresses, pages for counts, orders for sizes. A [`PageRange`] is aligned,
//!   not empty and does not wrap.
//!
//! # Locks
//!
//! `mmap_lock`, the locks of the reverse map and reclaim come before a region's lock; the driver's
//! own come after it. Under a region's lock nothing allocates in a way that waits, drops an mm or
//! accesses user memory.
//!
//! A pool makes room, by a chunk or by eviction, while no lock of mm is held; the locks of pages
//! come after `mmap_lock`. While they are held the driver copies, and nothing waits for room.
//! [`PoolOps::read`] and [`PoolOps::write`] run under a region's lock.
//!
//! # Layers
//!
//! A driver uses this crate and `kernel`; this crate uses mm. Unsafe code is here, and not above.
//! What a driver's code links to is listed in `exports.c`, GPL-only; all of it is used in-tree.
//!
//! C headers: [`include/linux/hmm.h`](srctree/include/linux/hmm.h),
//! [`include/linux/memremap.h`](srctree/include/linux/memremap.h),
//! [`include/linux/migrate.h`](srctree/include/linux/migrate.h),
//! [`include/linux/mmu_notifier.h`](srctree/include/linux/mmu_notifier.h)
//!
//! Reference: <https://docs.kernel.org/mm/hmm-rust.html>

#![no_std]
// Stable since Rust 1.89.0, and what the KUnit macros use.
#![feature(used_with_arg)]
// What is said of device memory above names items that are not there.
#![cfg_attr(not(CONFIG_RUST_HMM_DEVICE), allow(rustdoc::broken_intra_doc_links))]

#[cfg(CONFIG_RUST_HMM_DEVICE)]
mod copy;
mod entries;
#[cfg(CONFIG_RUST_HMM_DEVICE)]
mod exclusive;
mod fault;
#[cfg(CONFIG_RUST_HMM_KUNIT_TEST)]
mod kunit;
#[cfg(CONFIG_RUST_HMM_DEVICE)]
mod migrate;
mod mirror;
mod pfn;
#[cfg_attr(not(CONFIG_RUST_HMM_DEVICE), path = "nopool.rs")]
mod pool;
mod range;
mod rwsem;
#[cfg(CONFIG_RUST_HMM_DEVICE)]
mod slots;

#[cfg(CONFIG_RUST_HMM_DEVICE)]
pub use copy::{
    CopyBatch,
    CopyOp,
    DeviceRange,
    NewMemory, //
};
#[cfg(CONFIG_RUST_HMM_DEVICE)]
pub use exclusive::ExclusivePage;
pub use fault::{
    Commit,
    Device,
    Entry,
    FaultBuf,
    FaultRequest,
    Ram,
    ReadPage,
    WritePage, //
};
#[cfg(CONFIG_RUST_HMM_DEVICE)]
pub use migrate::{
    Holes,
    MigrateBuf,
    MigrateReason,
    Migrated, //
};
pub use mirror::{
    Invalidate,
    Invalidated,
    Mirror,
    MirrorOps,
    Miss, //
};
pub use pfn::Access;
#[cfg(CONFIG_RUST_HMM_DEVICE)]
pub use pool::{
    DevicePool,
    PageData,
    PoolOps, //
};
pub use range::PageRange;

/// Prefix to appear before log messages printed from within the crate.
const __LOG_PREFIX: &[u8] = b"hmm\0";
