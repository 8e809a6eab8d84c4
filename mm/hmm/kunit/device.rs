// SPDX-License-Identifier: GPL-2.0

//! A device with memory, for the tests that migrate pages.

use super::{
    super::{
        coherent::CoherentMemory,
        copy::{
            CopyBatch,
            CopyOp, //
        },
        device_pool::{
            DevicePool,
            Engine, //
        },
        evict,
        migrate::MigrateBuf,
        migrate_vma::Holes,
        mirror::Mirror,
        pool::{
            Pool,
            Reservation, //
        },
        pool_ops::{
            CpuAccess,
            MigrateReason,
            PageData,
            PoolOps, //
        },
        range::PageRange,
        slots::Order, //
    },
    MODULE, //
};
use core::marker::PhantomData;
use kernel::{
    new_spinlock,
    page::PAGE_SIZE,
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc,
        SpinLock, //
    }, //
};

/// The pages of a chunk.
pub(super) const CHUNK: usize = Order::MAX.pages();

/// The contents of device memory that was not written yet.
pub(super) const OLD: u8 = 0xa5;

/// Takes as many pages of the pool as there are elements.
pub(super) fn reserve<'a>(pool: &'a Arc<Pool>, pfns: &'a mut [usize]) -> Result<Reservation<'a>> {
    let wanted = pfns.len();
    evict::reserve(pool, pfns, wanted)
}

/// Migrates the pages of `range` to the device, and returns how many have moved. Populates holes.
pub(super) fn migrate(
    mirror: &Mirror,
    pool: &DevicePool<TestDevice<u64>>,
    range: PageRange,
) -> Result<usize> {
    let mut buf = MigrateBuf::new(range.pages().next_power_of_two().ilog2())?;
    mirror
        .mm()?
        .migrate_to_device(pool, range, Holes::Populate, &mut buf, |_| Ok(1))
        .map(|migrated| migrated.pages())
}

/// The number that a test adds up for page data.
pub(super) trait Tally: PageData {
    fn value(this: &Self::Borrowed<'_>) -> u64;
    fn own(this: Self) -> u64;
}

impl Tally for u64 {
    fn value(this: &u64) -> u64 {
        *this
    }

    fn own(this: Self) -> u64 {
        this
    }
}

/// Page data that is an object, and counts how often it is dropped.
pub(super) struct Counted {
    pub(super) value: u64,
    pub(super) dropped: Arc<Atomic<u64>>,
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.dropped.add(1, Relaxed);
    }
}

impl Tally for Arc<Counted> {
    fn value(this: &Self::Borrowed<'_>) -> u64 {
        this.value
    }

    fn own(this: Self) -> u64 {
        this.value
    }
}

#[pin_data]
pub(super) struct TestDevice<D> {
    #[pin]
    memory: SpinLock<KVVec<u8>>,
    /// Whether the memory is coherent, and the CPU copies.
    pub(super) by_cpu: Atomic<bool>,
    /// The number of operations.
    pub(super) ops: Atomic<usize>,
    /// The largest batch that is copied, in pages. A larger batch fails after that many pages.
    pub(super) most: Atomic<usize>,
    /// The error that such a copy returns.
    pub(super) says: Atomic<i32>,
    /// The address and the number of pages that cannot be copied.
    pub(super) bad: Atomic<usize>,
    pub(super) bad_pages: Atomic<usize>,
    /// Whether a failed copy returns the error. If not, it returns success.
    pub(super) honest: Atomic<bool>,
    /// The number of bytes at the end of each run that a copy to system memory does not write.
    pub(super) short: Atomic<usize>,
    /// The pages with nonzero data that returned to system memory, by reason.
    home: [Atomic<u64>; 3],
    /// The number of pages that were freed, and the sum of their data.
    pub(super) freed: Atomic<u64>,
    pub(super) sum: Atomic<u64>,
    _data: PhantomData<fn(D)>,
}

impl<D: Tally> TestDevice<D> {
    /// A device with room for `chunks` chunks, and its pool.
    pub(super) fn new(chunks: usize) -> Result<(Arc<Self>, DevicePool<Self>)> {
        Self::of_module(&MODULE, chunks)
    }

    /// Like [`TestDevice::new`], for a driver in `module`.
    pub(super) fn of_module(
        module: &'static ThisModule,
        chunks: usize,
    ) -> Result<(Arc<Self>, DevicePool<Self>)> {
        let memory = KVVec::from_elem(OLD, chunks * CHUNK * PAGE_SIZE, GFP_KERNEL)?;
        let device = Self::with(memory, false)?;
        let (ops, cpu) = (device.clone(), device.clone());
        let pool = DevicePool::new(
            module,
            c"hmm_kunit",
            ops,
            Engine::Software(cpu),
            CHUNK,
            chunks,
        )?;
        Ok((device, pool))
    }

    /// A device with this memory, which the CPU reaches, and its pool.
    pub(super) fn coherent(memory: CoherentMemory) -> Result<(Arc<Self>, DevicePool<Self>)> {
        let device = Self::with(KVVec::new(), true)?;
        let (ops, engine) = (device.clone(), Engine::Cpu);
        let pool = DevicePool::new_coherent(&MODULE, c"hmm_kunit", ops, engine, memory)?;
        Ok((device, pool))
    }

    fn with(memory: KVVec<u8>, by_cpu: bool) -> Result<Arc<Self>> {
        Arc::pin_init(
            pin_init!(Self {
                memory <- new_spinlock!(memory),
                by_cpu: Atomic::new(by_cpu),
                ops: Atomic::new(0),
                most: Atomic::new(usize::MAX),
                says: Atomic::new(EIO.to_errno()),
                bad: Atomic::new(usize::MAX),
                bad_pages: Atomic::new(1),
                honest: Atomic::new(true),
                short: Atomic::new(0),
                home: [const { Atomic::new(0) }; 3],
                freed: Atomic::new(0),
                sum: Atomic::new(0),
                _data: PhantomData,
            }),
            GFP_KERNEL,
        )
    }

    pub(super) fn home(&self, reason: MigrateReason) -> u64 {
        self.home[reason as usize].load(Relaxed)
    }
}

impl<D: Tally> PoolOps for TestDevice<D> {
    type PageData = D;

    fn copy(&self, batch: &mut CopyBatch<'_>) -> Result {
        let mut left = self.most.load(Relaxed);
        if self.by_cpu.load(Relaxed) {
            return match left {
                0 => Err(Error::from_errno(self.says.load(Relaxed))),
                _ => batch.copy_by_cpu(),
            };
        }
        let mut memory = self.memory.lock();
        for op in batch {
            self.ops.add(1, Relaxed);
            let range = match &op {
                CopyOp::ToDevice { to, .. } | CopyOp::Zero { to } => *to,
                CopyOp::ToRam { from, .. } => *from,
            };
            let (bad, bad_len) = (
                self.bad.load(Relaxed),
                self.bad_pages.load(Relaxed) * PAGE_SIZE,
            );
            let bad =
                range.start() < bad.saturating_add(bad_len) && bad < range.start() + range.len();
            left = match left.checked_sub(range.len() / PAGE_SIZE) {
                Some(left) if !bad => left,
                _ if self.honest.load(Relaxed) => {
                    return Err(Error::from_errno(self.says.load(Relaxed)));
                }
                _ => return Ok(()),
            };
            match op {
                CopyOp::ToDevice { from, to } => {
                    memory[to.start()..to.start() + to.len()].copy_from_slice(from.bytes());
                }
                CopyOp::ToRam { from, mut to } => {
                    let end = from.start() + from.len() - self.short.load(Relaxed);
                    to.write(&memory[from.start()..end])?;
                }
                CopyOp::Zero { to } => memory[to.start()..to.start() + to.len()].fill(0),
            }
        }
        Ok(())
    }

    fn migrated_to_ram(&self, data: D::Borrowed<'_>, pages: usize, reason: MigrateReason) {
        if D::value(&data) != 0 {
            self.home[reason as usize].add(pages as u64, Relaxed);
        }
    }

    fn page_freed(&self, data: D, pages: usize) {
        self.freed.add(pages as u64, Relaxed);
        self.sum.add(D::own(data), Relaxed);
    }
}

impl<D: Tally> CpuAccess for TestDevice<D> {
    fn read(&self, address: usize, buf: &mut [u8]) {
        buf.copy_from_slice(&self.memory.lock()[address..address + buf.len()]);
    }

    fn write(&self, address: usize, buf: &[u8]) {
        self.memory.lock()[address..address + buf.len()].copy_from_slice(buf);
    }
}
