// SPDX-License-Identifier: GPL-2.0

//! Tests of `copy.rs` and of `MappedCopies`: a device that copies by DMA.

use super::{
    super::{
        binding::DmaBinding,
        copy::{
            CopyBatch,
            CopyOp,
            PageCopy, //
        },
        device_pool::{
            DevicePool,
            Engine, //
        },
        dma::MappedCopies,
        folio::{
            Effort,
            NewFolio, //
        },
        migrate::MigrateBuf,
        migrate_vma::Holes,
        mirror::Mirror,
        pool_ops::{
            MigrateReason,
            PoolOps, //
        },
        range::PageRange,
        slots::{
            Node,
            Order, //
        }, //
    },
    device::CHUNK,
    dma::{
        bound,
        device,
        page_at, //
    },
    map_aligned,
    user_read,
    user_write,
    Recorder,
    MODULE, //
};
use kernel::{
    bindings,
    dma::DmaAddress,
    faux,
    kunit::user_mm::{
        with_user_mm,
        Prot, //
    },
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

const PAGES: usize = 8;

/// A device that copies behind the back of the core, as a DMA engine does.
#[pin_data]
struct Copier {
    #[pin]
    memory: SpinLock<KVVec<u8>>,
    /// Whether it says that it has filled the memory of pages that return.
    fills: Atomic<bool>,
    /// The number of operations, and of pages that they copied.
    ops: Atomic<usize>,
    pages: Atomic<usize>,
}

/// Where the CPU finds what the device accesses at this address.
fn cpu_address(bus: DmaAddress) -> *mut u8 {
    // SAFETY: The page is mapped for the device, so it is in use.
    unsafe { bindings::page_address(page_at(bus)) }.cast()
}

impl PoolOps for Copier {
    type PageData = u64;

    fn copy(&self, batch: &mut CopyBatch<'_>) -> Result {
        let mut memory = self.memory.lock();
        for op in batch {
            let device = match &op {
                CopyOp::ToDevice { to, .. } | CopyOp::Zero { to } => *to,
                CopyOp::ToRam { from, .. } => *from,
            };
            let part = &mut memory[device.start()..device.start() + device.len()];
            self.ops.add(1, Relaxed);
            self.pages.add(device.len() / PAGE_SIZE, Relaxed);
            match op {
                CopyOp::ToDevice { from, .. } => {
                    let from = cpu_address(from.bus().ok_or(EOPNOTSUPP)?);
                    // SAFETY: The memory of the operation is mapped at this address.
                    unsafe { from.copy_to_nonoverlapping(part.as_mut_ptr(), part.len()) };
                }
                CopyOp::ToRam { to, .. } => {
                    let ram = cpu_address(to.bus().ok_or(EOPNOTSUPP)?);
                    // SAFETY: The memory of the operation is mapped at this address.
                    unsafe { ram.copy_from_nonoverlapping(part.as_ptr(), part.len()) };
                    if self.fills.load(Relaxed) {
                        to.filled();
                    }
                }
                CopyOp::Zero { .. } => part.fill(0),
            }
        }
        Ok(())
    }

    fn migrated_to_ram(&self, _data: u64, _pages: usize, _reason: MigrateReason) {}

    fn page_freed(&self, _data: u64, _pages: usize) {}
}

struct Setup {
    copier: Arc<Copier>,
    pool: DevicePool<Copier>,
    binding: DmaBinding,
    _faux: faux::Registration,
}

impl Setup {
    fn new(engine: impl FnOnce(&DmaBinding) -> Engine) -> Result<Self> {
        let faux = device(0)?;
        let binding = DmaBinding::new(bound(&faux))?;
        let memory = KVVec::from_elem(0xa5, CHUNK * PAGE_SIZE, GFP_KERNEL)?;
        let init = pin_init!(Copier {
            memory <- new_spinlock!(memory),
            fills: Atomic::new(true),
            ops: Atomic::new(0),
            pages: Atomic::new(0),
        });
        let copier = Arc::pin_init(init, GFP_KERNEL)?;
        Ok(Self {
            pool: new_pool(copier.clone(), engine(&binding))?,
            copier,
            binding,
            _faux: faux,
        })
    }

    fn migrate(&self, mirror: &Mirror, range: PageRange) -> Result<usize> {
        let mut buf = MigrateBuf::new(PAGES.ilog2())?;
        let moved =
            mirror
                .mm()?
                .migrate_to_device(&self.pool, range, Holes::Populate, &mut buf, |_| Ok(1))?;
        Ok(moved.pages())
    }

    /// The number of pages that were copied, and the number of operations.
    fn copied(&self) -> (usize, usize) {
        (
            self.copier.pages.load(Relaxed),
            self.copier.ops.load(Relaxed),
        )
    }
}

fn by_dma(binding: &DmaBinding) -> Engine {
    Engine::Dma(binding.device())
}

fn new_pool(copier: Arc<Copier>, engine: Engine) -> Result<DevicePool<Copier>> {
    DevicePool::new(&MODULE, c"hmm_kunit", copier, engine, CHUNK, 1)
}

#[kunit_tests(hmm_copy)]
mod tests {
    use super::*;

    #[test]
    fn a_device_copies_at_the_addresses_of_pages() -> Result {
        let setup = Setup::new(by_dma)?;
        with_user_mm(|mm| {
            let range = map_aligned(mm, PAGES, Prot::ReadWrite)?;
            for (va, byte) in range.page_addrs().zip(1..) {
                // The last one stays a hole.
                if usize::from(byte) < PAGES {
                    user_write(va + 7, byte)?;
                }
            }
            let mirror = Mirror::new_with_pool(&MODULE, Recorder::new()?, &setup.pool)?;
            assert_eq!(setup.migrate(&mirror, range)?, PAGES);
            let (pages, ops) = setup.copied();
            assert_eq!(pages, PAGES);
            assert!((2..=PAGES).contains(&ops));
            for (page, byte) in (1..PAGES).enumerate() {
                let memory = setup.copier.memory.lock();
                assert_eq!(usize::from(memory[page * PAGE_SIZE + 7]), byte);
                assert_eq!(memory[page * PAGE_SIZE], 0);
            }
            for (va, byte) in range.page_addrs().zip(1..) {
                let byte = if usize::from(byte) < PAGES { byte } else { 0 };
                assert_eq!(user_read(va + 7)?, byte);
                assert_eq!(user_read(va)?, 0);
            }
            assert_eq!(setup.copied().0, 2 * PAGES);
            assert_eq!(setup.pool.pool().used_pages(), 0);
            Ok(())
        })
    }

    #[test]
    fn pages_stay_on_a_device_that_has_not_filled_their_copies() -> Result {
        let setup = Setup::new(by_dma)?;
        with_user_mm(|mm| {
            let range = map_aligned(mm, 1, Prot::ReadWrite)?;
            user_write(range.start(), 5)?;
            let mirror = Mirror::new_with_pool(&MODULE, Recorder::new()?, &setup.pool)?;
            assert_eq!(setup.migrate(&mirror, range)?, 1);
            setup.copier.fills.store(false, Relaxed);
            assert_eq!(setup.pool.evict(), Err(EIO));
            assert_eq!(setup.pool.pool().used_pages(), 1);
            setup.copier.fills.store(true, Relaxed);
            assert_eq!(user_read(range.start())?, 5);
            Ok(())
        })
    }

    #[test]
    fn a_driver_that_stages_its_copies_gets_no_addresses() -> Result {
        let setup = Setup::new(|_| Engine::Cpu)?;
        with_user_mm(|mm| {
            let range = map_aligned(mm, 1, Prot::ReadWrite)?;
            user_write(range.start(), 5)?;
            let mirror = Mirror::new_with_pool(&MODULE, Recorder::new()?, &setup.pool)?;
            let moved = setup.migrate(&mirror, range);
            assert_eq!(moved.err(), Some(EOPNOTSUPP));
            assert_eq!(user_read(range.start())?, 5);
            Ok(())
        })
    }

    #[test]
    fn unbinding_brings_the_pages_of_the_device_home() -> Result {
        let setup = Setup::new(by_dma)?;
        with_user_mm(|mm| {
            let range = map_aligned(mm, PAGES, Prot::ReadWrite)?;
            for (va, byte) in range.page_addrs().zip(1..) {
                user_write(va, byte)?;
            }
            let mirror = Mirror::new_with_pool(&MODULE, Recorder::new()?, &setup.pool)?;
            assert_eq!(setup.migrate(&mirror, range)?, PAGES);
            setup.binding.end();
            assert_eq!(setup.pool.pool().used_pages(), 0);
            assert_eq!(setup.pool.pool().chunks(), 0);
            let copied = setup.copied();
            for (va, byte) in range.page_addrs().zip(1..) {
                assert_eq!(user_read(va)?, byte);
            }
            // Nothing goes there again.
            assert_eq!(setup.migrate(&mirror, range).err(), Some(ENOMEM));
            assert_eq!(setup.copied(), copied);
            let other = new_pool(setup.copier.clone(), by_dma(&setup.binding));
            assert_eq!(other.err(), Some(ENODEV));
            Ok(())
        })
    }

    #[test]
    fn all_pages_of_a_large_folio_are_mapped() -> Result {
        let faux = device(0)?;
        let binding = DmaBinding::new(bound(&faux))?;
        let dma = binding.device().dma().clone();
        let folio = |order| NewFolio::alloc(Effort::Reclaim, order, None, Node::new(0).ok()?);
        let large = folio(Order::MAX).ok_or(ENOMEM)?;
        let small = folio(Order::PAGE).ok_or(ENOMEM)?;
        let copy = |folio: &NewFolio, order: Order| PageCopy {
            // SAFETY: The folio is allocated.
            ram: unsafe { bindings::page_address(folio.page()) }.cast(),
            pages: order.pages(),
            ..PageCopy::NONE
        };
        let hole = PageCopy {
            pages: Order::MAX.pages(),
            ..PageCopy::NONE
        };
        let mut copies = [hole, copy(&large, Order::MAX), copy(&small, Order::PAGE)];
        // SAFETY: The folio is allocated.
        let pfn = |folio: &NewFolio| unsafe { bindings::page_to_pfn(folio.page()) };
        let pfns = |copy: &PageCopy| match copy.pages {
            1 => pfn(&small),
            _ => pfn(&large),
        };
        // SAFETY: The folios are in use until the end of this function.
        let mapped = unsafe { MappedCopies::new(&dma, &mut copies, pfns) }?;
        assert_eq!(mapped.mapped(), Order::MAX.pages() + 1);
        drop(mapped);
        let [hole, large_copy, small_copy] = copies;
        assert!(hole.bus.is_none());
        assert_eq!(large_copy.bus.map(page_at), Some(large.page()));
        assert_eq!(small_copy.bus.map(page_at), Some(small.page()));
        Ok(())
    }
}
