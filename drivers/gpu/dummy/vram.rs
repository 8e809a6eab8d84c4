// SPDX-License-Identifier: GPL-2.0

//! The GPU's own memory, and its copy engine.
//!
//! The memory is an array of bytes, allocated when the driver is loaded. It takes up system memory
//! whether it is used or not. It is divided into blocks, each with a spinlock. Several device
//! threads may access a page at the same time. An access of up to a page is atomic with respect to
//! other accesses. A real GPU guarantees less: an aligned word is not torn, and a write changes no
//! other byte.
//!
//! Or it is memory that the CPU reaches too, as GPUs have that are attached by a coherent link.
//!
//! `hmm` decides who may access which page, and when. The `zone_device_data` of a page in use
//! points to the statistics of the file that migrated the page.

use super::{
    counters::{
        Counter,
        FileStats, //
    },
    mmu::{
        table_range,
        TABLE_ORDER,
        TABLE_SIZE, //
    }, //
};
use core::ops::Range;
use hmm::{
    Access,
    CoherentMemory,
    CopyBatch,
    CopyOp,
    CpuAccess,
    DevicePool,
    Engine,
    Holes,
    MigrateBuf,
    MigrateReason,
    Migrated,
    Mirror,
    MirrorOps,
    MirroredMm,
    PageRange,
    PoolOps, //
};
use kernel::{
    io::resource::{
        iomem,
        Flags, //
    },
    module::this_module,
    new_spinlock,
    page::PAGE_SIZE,
    prelude::*,
    sizes::{
        SZ_1G,
        SZ_64K, //
    },
    str::CString,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc,
        ArcBorrow,
        SpinLock, //
    },
    time::{
        delay::fsleep,
        Delta, //
    }, //
};

/// The number of pages for which struct pages are added at a time: 4 MiB where a page has 4 KiB.
const CHUNK_PAGES: usize = 1024;
const CHUNK: usize = CHUNK_PAGES * PAGE_SIZE;

/// The maximum size of the memory in bytes, because the array stays allocated until the driver is
/// unloaded.
const MAX_SIZE: usize = SZ_1G;

/// The number of bytes that one lock protects. Larger blocks need fewer locks. A lock is held for a
/// copy of one page at most.
const BLOCK_SIZE: usize = SZ_64K;

// No page crosses the boundary of a block.
static_assert!(BLOCK_SIZE % PAGE_SIZE == 0);

/// How often an eviction of all pages is tried again, with 10 ms in between.
const EVICTION_RETRIES: usize = 50;

/// More than one operand of a command must fit into the memory at the same time: each has this part
/// of it.
const OPERANDS: usize = 8;

/// The buffer for migrating pages, one window at a time.
pub(crate) type MoveBuf = MigrateBuf;

/// The memory of an instance. When it is dropped, all pages are evicted to system memory.
pub(crate) struct Vram {
    pool: DevicePool<VramBuf>,
    size: usize,
    #[cfg(CONFIG_DUMMY_GPU_DMIRROR)]
    is_coherent: bool,
    /// Whether the engine that copies has failed.
    failed: Arc<Atomic<bool>>,
}

impl Vram {
    /// Creates a memory of `size` bytes, rounded up to a multiple of a chunk.
    ///
    /// # Errors
    ///
    /// [`EINVAL`] if `size` is zero or above 1 GiB, [`ENOMEM`].
    pub(crate) fn new(name: &'static CStr, size: usize) -> Result<Self> {
        if size > MAX_SIZE {
            return Err(EINVAL);
        }
        let chunks = size.div_ceil(CHUNK);
        let size = chunks * CHUNK;
        let buf = Arc::new(VramBuf::new(size)?, GFP_KERNEL)?;
        let failed = buf.failed.clone();
        let module = this_module::<crate::LocalModule>();
        let engine = Engine::Software(buf.clone());

        Ok(Self {
            pool: DevicePool::new(module, name, buf, engine, CHUNK_PAGES, chunks)?,
            size,
            #[cfg(CONFIG_DUMMY_GPU_DMIRROR)]
            is_coherent: false,
            failed,
        })
    }

    /// Takes the `size` bytes at the physical address `start`, which CPUs can use like system
    /// memory.
    ///
    /// # Errors
    ///
    /// [`EBUSY`] if somebody else has them, and those of [`DevicePool::new_coherent`].
    pub(crate) fn coherent(name: &'static CStr, start: u64, size: usize) -> Result<Self> {
        let region = iomem()
            .request_region(
                start,
                size as u64,
                CString::try_from(name)?,
                Flags::IORESOURCE_MEM,
            )
            .ok_or(EBUSY)?;
        // Whoever has given the address to the module has set memory aside there.
        let memory = CoherentMemory::assume_coherent(region);
        let buf = Arc::new(VramBuf::new(0)?, GFP_KERNEL)?;
        let failed = buf.failed.clone();
        let module = this_module::<crate::LocalModule>();

        Ok(Self {
            pool: DevicePool::new_coherent(module, name, buf, Engine::Cpu, memory)?,
            size,
            #[cfg(CONFIG_DUMMY_GPU_DMIRROR)]
            is_coherent: true,
            failed,
        })
    }

    /// Whether the CPU reaches the memory.
    #[cfg(CONFIG_DUMMY_GPU_DMIRROR)]
    pub(crate) fn is_coherent(&self) -> bool {
        self.is_coherent
    }

    /// The size in bytes.
    pub(crate) fn size(&self) -> usize {
        self.size
    }

    /// Mirrors the address space of the current task, for a device with this memory.
    pub(crate) fn mirror(&self, ops: Arc<dyn MirrorOps>) -> Result<Mirror> {
        Mirror::new_with_pool(this_module::<crate::LocalModule>(), ops, &self.pool)
    }

    /// Limits `range`, from its start, to the share of an operand.
    pub(crate) fn fault_limit(&self, range: PageRange) -> Result<PageRange> {
        PageRange::from_len(range.start(), range.len().min(self.size / OPERANDS))
    }

    /// Migrates those pages of `range` that can migrate to this memory, and counts them in `stats`.
    /// Populates pages that the process has not touched yet.
    ///
    /// # Errors
    ///
    /// Those of [`MirroredMm::migrate_to_device`].
    pub(crate) fn migrate_in(
        &self,
        mm: &MirroredMm<'_>,
        range: PageRange,
        buf: &mut MoveBuf,
        stats: &Arc<FileStats>,
    ) -> Result<Migrated> {
        let data = |pages| page_data(stats, pages);
        let moved = mm.migrate_to_device(&self.pool, range, Holes::Populate, buf, data)?;

        Ok(count(moved, stats))
    }

    /// Migrates the pages of `need` to this memory before an access by the GPU, and counts them in
    /// `stats`. Large folios migrate whole, if they lie in `like`, the range with the same policy,
    /// and are not too large for this memory.
    ///
    /// # Errors
    ///
    /// Those of [`MirroredMm::migrate_for_access`].
    pub(crate) fn migrate_for(
        &self,
        mm: &MirroredMm<'_>,
        need: PageRange,
        access: Access,
        like: PageRange,
        buf: &mut MoveBuf,
        stats: &Arc<FileStats>,
    ) -> Result<Migrated> {
        let table = table_range(need.start())?;
        // A buffer has room for the pages of a table.
        let has_room = TABLE_ORDER >= MigrateBuf::MAX_ORDER && TABLE_SIZE <= self.size / OPERANDS;
        let data = |pages| page_data(stats, pages);
        let moved = if has_room && like.intersect(&table) == Some(table) {
            mm.migrate_for_access(&self.pool, need, access, buf, data)
        } else {
            mm.migrate_to_device(&self.pool, need, Holes::for_access(access), buf, data)
        };

        Ok(count(moved?, stats))
    }

    /// Migrates the pages of `range` that are in this memory to system memory.
    ///
    /// # Errors
    ///
    /// Those of [`MirroredMm::migrate_to_ram`].
    pub(crate) fn migrate_out(
        &self,
        mm: &MirroredMm<'_>,
        range: PageRange,
        buf: &mut MoveBuf,
    ) -> Result<Migrated> {
        mm.migrate_to_ram(range, buf)
    }

    /// Loses the memory for good: the engine that copies has failed. A copy that is running fails
    /// as soon as it can.
    ///
    /// # Errors
    ///
    /// None: this is not called by the core.
    pub(crate) fn lose(&self) -> Result {
        self.failed.store(true, Relaxed);
        self.pool.lost()
    }

    /// Evicts all pages, also those of other processes, to system memory. Tries for a while, since
    /// others may have references to some pages for a moment.
    ///
    /// # Errors
    ///
    /// Those of [`DevicePool::evict`].
    pub(crate) fn evict(&self) -> Result {
        let mut result = self.pool.evict();

        for _ in 0..EVICTION_RETRIES {
            if result != Err(EBUSY) {
                break;
            }
            fsleep(Delta::from_millis(10));
            result = self.pool.evict();
        }
        result
    }
}

/// Counts the pages that have migrated to GPU memory.
fn count(moved: Migrated, stats: &FileStats) -> Migrated {
    stats.add(Counter::PagesToDevice, moved.pages());
    stats.add(Counter::LargeToDevice, moved.large_pages());
    moved
}

/// What a page of a process is given for its place in GPU memory: the statistics of the file.
fn page_data(stats: &Arc<FileStats>, pages: usize) -> Result<Arc<FileStats>> {
    if stats.fails() {
        return Err(ENOMEM);
    }
    // `page_freed()` subtracts the pages, also if they do not migrate in the end.
    stats.add(Counter::DevicePages, pages);
    Ok(stats.clone())
}

/// The bytes of the memory, in blocks. There are none if it is coherent.
///
/// Lock order: the lock of a block is the innermost lock. No other lock is taken and nothing is
/// allocated while it is held.
struct VramBuf {
    blocks: KVVec<Pin<KBox<SpinLock<KVVec<u8>>>>>,
    failed: Arc<Atomic<bool>>,
}

impl VramBuf {
    /// Allocates `size` bytes of zeroes. The last block may be smaller than the others.
    fn new(size: usize) -> Result<Self> {
        let mut blocks = KVVec::with_capacity(size.div_ceil(BLOCK_SIZE), GFP_KERNEL)?;

        for start in (0..size).step_by(BLOCK_SIZE) {
            let bytes = KVVec::zeroed(BLOCK_SIZE.min(size - start), GFP_KERNEL)?;
            let block = KBox::pin_init(new_spinlock!(bytes, "dummy_gpu::vram"), GFP_KERNEL)?;
            blocks.push(block, GFP_KERNEL)?;
        }
        Ok(Self {
            blocks,
            failed: Arc::new(Atomic::new(false), GFP_KERNEL)?,
        })
    }

    /// Splits the `len` bytes at `address` at page boundaries and calls `access` for each part,
    /// with the bytes and their offsets in the `len` bytes. A spinlock is held during the call, so
    /// `access` must only copy bytes.
    ///
    /// # Errors
    ///
    /// [`EIO`] if the `len` bytes reach beyond the end of the memory, after `access` was called for
    /// those before the end; and those of `access`, which is not called again then.
    fn for_each_page(
        &self,
        address: usize,
        len: usize,
        mut access: impl FnMut(&mut [u8], Range<usize>) -> Result,
    ) -> Result {
        let mut done = 0;

        while done < len {
            let at = address + done;
            let mut block = self.blocks.get(at / BLOCK_SIZE).ok_or(EIO)?.lock();
            let rest = block.get_mut(at % BLOCK_SIZE..).ok_or(EIO)?;
            let page_rest = PAGE_SIZE - at % PAGE_SIZE;
            let count = (len - done).min(page_rest).min(rest.len());
            if count == 0 {
                return Err(EIO);
            }
            access(&mut rest[..count], done..done + count)?;
            done += count;
        }
        Ok(())
    }
}

impl PoolOps for VramBuf {
    type PageData = Arc<FileStats>;

    fn copy(&self, batch: &mut CopyBatch<'_>) -> Result {
        if self.blocks.is_empty() {
            return match self.failed.load(Relaxed) {
                true => Err(ENODEV),
                false => batch.copy_by_cpu(),
            };
        }
        for op in batch {
            if self.failed.load(Relaxed) {
                return Err(ENODEV);
            }
            match op {
                CopyOp::ToDevice { from, to } => {
                    self.for_each_page(to.start(), to.len(), |bytes, part| {
                        from.read(part.start, bytes)
                    })?;
                }
                CopyOp::ToRam { from, mut to } => {
                    self.for_each_page(from.start(), from.len(), |bytes, _| to.write(bytes))?;
                }
                CopyOp::Zero { to } => {
                    self.for_each_page(to.start(), to.len(), |bytes, _| {
                        bytes.fill(0);
                        Ok(())
                    })?;
                }
            }
        }
        Ok(())
    }

    fn migrated_to_ram(
        &self,
        stats: ArcBorrow<'_, FileStats>,
        pages: usize,
        reason: MigrateReason,
    ) {
        let counter = match reason {
            MigrateReason::CpuFault => Counter::PagesCpuFaulted,
            MigrateReason::Evict => Counter::PagesEvicted,
            MigrateReason::Request => Counter::PagesToSystem,
        };
        stats.add(counter, pages);
        if pages > 1 {
            stats.add(Counter::LargeToSystem, pages);
        }
    }

    fn page_freed(&self, stats: Arc<FileStats>, pages: usize) {
        stats.sub(Counter::DevicePages, pages);
    }
}

impl CpuAccess for VramBuf {
    fn read(&self, address: usize, buf: &mut [u8]) {
        // This cannot fail: the core reads only pages of this memory.
        let _ = self.for_each_page(address, buf.len(), |bytes, part| {
            buf[part].copy_from_slice(bytes);
            Ok(())
        });
    }

    fn write(&self, address: usize, buf: &[u8]) {
        // This cannot fail: the core writes only pages of this memory.
        let _ = self.for_each_page(address, buf.len(), |bytes, part| {
            bytes.copy_from_slice(&buf[part]);
            Ok(())
        });
    }
}

#[cfg(CONFIG_DUMMY_GPU_KUNIT_TEST)]
#[kunit_tests(dummy_gpu_vram)]
mod tests {
    use super::*;
    use kernel::workqueue::{
        self,
        impl_has_work,
        new_work,
        Work,
        WorkItem, //
    };

    const WORD: usize = size_of::<u64>();
    const SIZE: usize = 4 * WORD;

    /// All bytes of the memory.
    fn bytes(buf: &VramBuf) -> [u8; SIZE] {
        let mut bytes = [0xff; SIZE];
        buf.read(0, &mut bytes);
        bytes
    }

    #[test]
    fn a_size_that_no_memory_has_is_einval() {
        for size in [0, MAX_SIZE + 1, usize::MAX] {
            assert!(Vram::new(c"dummy_gpu_kunit", size).err() == Some(EINVAL));
        }
    }

    #[test]
    fn new_memory_is_zero() -> Result {
        let buf = VramBuf::new(SIZE)?;

        assert_eq!(bytes(&buf), [0; SIZE]);
        Ok(())
    }

    #[test]
    fn any_bytes_can_be_written_and_no_others_change() -> Result {
        for first in 0..SIZE {
            for end in first..=SIZE {
                let buf = VramBuf::new(SIZE)?;
                let mut expected = [0x11; SIZE];
                buf.write(0, &expected);

                let value = [0x22; SIZE];
                buf.write(first, &value[first..end]);
                expected[first..end].fill(0x22);
                assert_eq!(bytes(&buf), expected);
            }
        }
        Ok(())
    }

    #[test]
    fn any_bytes_can_be_read() -> Result {
        let buf = VramBuf::new(SIZE)?;
        let all: [u8; SIZE] = core::array::from_fn(|n| n as u8);
        buf.write(0, &all);

        for first in 0..SIZE {
            for end in first..=SIZE {
                let mut some = [0; SIZE];
                buf.read(first, &mut some[first..end]);
                assert_eq!(some[first..end], all[first..end]);
            }
        }
        Ok(())
    }

    #[test]
    fn an_access_may_reach_over_pages_and_blocks() -> Result {
        const LEN: usize = 2 * PAGE_SIZE + 2;

        let buf = VramBuf::new(2 * BLOCK_SIZE)?;
        let value = KVec::from_elem(0x33, LEN, GFP_KERNEL)?;
        let mut seen = KVec::zeroed(LEN + 2, GFP_KERNEL)?;
        let first = BLOCK_SIZE - PAGE_SIZE - 1;

        buf.write(first, &value);
        buf.read(first - 1, &mut seen);
        assert_eq!((seen[0], seen[LEN + 1]), (0, 0));
        assert!(seen[1..=LEN] == value[..]);
        Ok(())
    }

    /// Writes `value` to the odd bytes, from the last to the first.
    #[pin_data]
    struct OddWriter {
        buf: Arc<VramBuf>,
        value: u8,
        #[pin]
        work: Work<OddWriter>,
    }

    impl OddWriter {
        fn new(buf: Arc<VramBuf>, value: u8) -> Result<Arc<Self>> {
            let init = pin_init!(Self {
                buf,
                value,
                work <- new_work!("dummy_gpu::OddWriter"),
            });
            Arc::pin_init(init, GFP_KERNEL)
        }
    }

    impl_has_work! {
        impl HasWork<Self> for OddWriter { self.work }
    }

    impl WorkItem for OddWriter {
        type Pointer = Arc<Self>;

        fn run(this: Arc<Self>) {
            for address in (1..RACE_SIZE).step_by(2).rev() {
                this.buf.write(address, &[this.value]);
            }
        }
    }

    const RACE_SIZE: usize = 4 * PAGE_SIZE;

    /// A work item writes the odd bytes downwards while this thread writes the even ones upwards.
    /// If they run at the same time the two meet in one word in each round.
    #[test]
    fn writers_of_different_bytes_of_a_word_lose_none() -> Result {
        const ROUNDS: u8 = 32;

        let buf = Arc::new(VramBuf::new(RACE_SIZE)?, GFP_KERNEL)?;
        let mut seen = KVec::zeroed(RACE_SIZE, GFP_KERNEL)?;
        for value in 1..=ROUNDS {
            let writer = OddWriter::new(buf.clone(), value)?;
            workqueue::system_dfl()
                .enqueue(writer.clone())
                .map_err(|_| EBUSY)?;
            for address in (0..RACE_SIZE).step_by(2) {
                buf.write(address, &[value]);
            }
            writer.work.flush();

            buf.read(0, &mut seen);
            assert_eq!(seen.iter().position(|byte| *byte != value), None);
        }
        Ok(())
    }

    #[test]
    fn bytes_past_the_end_are_not_written() -> Result {
        let buf = VramBuf::new(SIZE)?;

        buf.write(SIZE - 2, &[1; 8]);
        buf.read(SIZE, &mut [0; 8]);
        assert_eq!(bytes(&buf)[SIZE - 2..], [1, 1]);
        Ok(())
    }
}
