// SPDX-License-Identifier: GPL-2.0

//! The GPU's own memory, and its copy engine.
//!
//! A plain array, which takes RAM of the machine from the start: as that of a real device it is
//! there whether it is used or not. It is made of words that anyone may read and write at any time;
//! who may access which page, and when, is for `hmm` to say. What is kept with each page that is in
//! use is the account that it counts for.

use super::counters::{
    Account,
    Counter, //
};
use core::ops::Range;
use hmm::{
    CopyBatch,
    CopyOp,
    DevicePool,
    DeviceRange,
    MigrateBuf,
    MigrateReason,
    Migrated,
    Mirror,
    MirrorOps,
    PageRange,
    PoolOps, //
};
use kernel::{
    page::PAGE_SIZE,
    prelude::*,
    sizes::SZ_1G,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc,
        ArcBorrow, //
    }, //
};

const WORD: usize = size_of::<u64>();

/// The steps in which the GPU's memory gets struct pages: 4 MiB where pages have 4 KiB.
const CHUNK_PAGES: usize = 1024;
const CHUNK: usize = CHUNK_PAGES * PAGE_SIZE;

/// The array is one allocation.
const MAX_SIZE: usize = SZ_1G;

/// What it takes to move pages, one window after the other.
pub(crate) type MoveBuf = MigrateBuf;

/// The memory of an instance: a place for pages. When it is dropped they are brought home.
pub(crate) struct Vram {
    pool: DevicePool<Words>,
    size: usize,
}

impl Vram {
    /// Makes a memory of `size` bytes, rounded up to a chunk.
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
        let words = Arc::new(Words::new(size)?, GFP_KERNEL)?;

        Ok(Self {
            pool: DevicePool::new(name, words, CHUNK_PAGES, chunks)?,
            size,
        })
    }

    /// The size in bytes.
    pub(crate) fn size(&self) -> usize {
        self.size
    }

    /// Mirrors the address space of the current task.
    pub(crate) fn mirror(&self, ops: Arc<dyn MirrorOps>) -> Result<Mirror> {
        Mirror::new_with_pool(ops, &self.pool)
    }

    /// The start of `range`, as much of it as should be moved here at once: more than one operand
    /// has to find room.
    pub(crate) fn share(&self, range: PageRange) -> Result<PageRange> {
        PageRange::from_len(range.start(), range.len().min(self.size / 8))
    }

    /// Moves the pages of `range` that can be moved here, on `account`.
    ///
    /// # Errors
    ///
    /// Those of [`Mirror::migrate_to_device`].
    pub(crate) fn take(
        &self,
        mirror: &Mirror,
        range: PageRange,
        buf: &mut MoveBuf,
        account: &Arc<Account>,
    ) -> Result<Migrated> {
        let moved = mirror.migrate_to_device(&self.pool, range, buf, || {
            if account.fails() {
                return Err(ENOMEM);
            }
            // Taken back when the page is freed, wherever it went.
            account.add(Counter::DevicePages, 1);
            Ok(account.clone())
        })?;

        account.add(Counter::PagesToDevice, moved.pages());
        Ok(moved)
    }

    /// Moves the pages of `range` that are here to RAM.
    ///
    /// # Errors
    ///
    /// Those of [`Mirror::migrate_to_ram`].
    pub(crate) fn give(
        &self,
        mirror: &Mirror,
        range: PageRange,
        buf: &mut MoveBuf,
    ) -> Result<Migrated> {
        mirror.migrate_to_ram(range, buf)
    }

    /// Moves all that is here to RAM, whosever it is.
    ///
    /// # Errors
    ///
    /// Those of [`DevicePool::evict`].
    #[cfg(CONFIG_DUMMY_GPU_DMIRROR)]
    pub(crate) fn evict(&self) -> Result {
        self.pool.evict()
    }
}

/// The array that the memory is made of.
struct Words(KVVec<Atomic<u64>>);

impl Words {
    fn new(size: usize) -> Result<Self> {
        let mut words = KVVec::with_capacity(size / WORD, GFP_KERNEL)?;

        for _ in 0..size / WORD {
            words.push(Atomic::new(0), GFP_KERNEL)?;
        }
        Ok(Self(words))
    }

    /// The words of `range`.
    fn words(&self, range: DeviceRange) -> Result<&[Atomic<u64>]> {
        let first = range.start() / WORD;

        self.0.get(first..first + range.len() / WORD).ok_or(EIO)
    }

    /// Calls `f` with each word that has bytes from `address` on, the first of these bytes in the
    /// word, and the part of the `len` bytes that they are.
    fn each(
        &self,
        address: usize,
        len: usize,
        mut f: impl FnMut(&Atomic<u64>, usize, Range<usize>),
    ) {
        let mut done = 0;

        while done < len {
            let at = address + done;
            let end = len.min(done + WORD - at % WORD);
            if let Some(word) = self.0.get(at / WORD) {
                f(word, at % WORD, done..end);
            }
            done = end;
        }
    }
}

impl PoolOps for Words {
    type PageData = Arc<Account>;

    fn copy(&self, batch: &mut CopyBatch<'_>) -> Result {
        for op in batch {
            match op {
                CopyOp::ToDevice { from, to } => {
                    for (word, bytes) in self.words(to)?.iter().zip(from.chunks_exact(WORD)) {
                        let mut value = [0; WORD];
                        value.copy_from_slice(bytes);
                        word.store(u64::from_ne_bytes(value), Relaxed);
                    }
                }
                CopyOp::ToRam { from, to } => {
                    for (word, bytes) in self.words(from)?.iter().zip(to.chunks_exact_mut(WORD)) {
                        bytes.copy_from_slice(&word.load(Relaxed).to_ne_bytes());
                    }
                }
                CopyOp::Zero { to } => {
                    for word in self.words(to)? {
                        word.store(0, Relaxed);
                    }
                }
            }
        }
        Ok(())
    }

    fn read(&self, address: usize, buf: &mut [u8]) {
        self.each(address, buf.len(), |word, first, part| {
            let value = word.load(Relaxed).to_ne_bytes();
            for (to, from) in buf[part].iter_mut().zip(&value[first..]) {
                *to = *from;
            }
        });
    }

    fn write(&self, address: usize, buf: &[u8]) {
        self.each(address, buf.len(), |word, first, part| {
            let bytes = &buf[part];
            let mut old = word.load(Relaxed);
            loop {
                let mut value = old.to_ne_bytes();
                value[first..first + bytes.len()].copy_from_slice(bytes);
                // The other bytes of the word may be written meanwhile.
                match word.cmpxchg(old, u64::from_ne_bytes(value), Relaxed) {
                    Ok(_) => break,
                    Err(now) => old = now,
                }
            }
        });
    }

    fn migrated_to_ram(&self, account: ArcBorrow<'_, Account>, reason: MigrateReason) {
        let counter = match reason {
            MigrateReason::CpuFault => Counter::PagesTouched,
            MigrateReason::Evict => Counter::PagesEvicted,
            MigrateReason::Request => Counter::PagesToSystem,
        };
        account.add(counter, 1);
    }

    fn page_freed(&self, account: Arc<Account>) {
        account.sub(Counter::DevicePages, 1);
    }
}

#[cfg(CONFIG_DUMMY_GPU_KUNIT_TEST)]
#[kunit_tests(dummy_gpu_vram)]
mod tests {
    use super::*;

    const SIZE: usize = 4 * WORD;

    /// All bytes of the memory.
    fn bytes(words: &Words) -> [u8; SIZE] {
        let mut bytes = [0xff; SIZE];
        words.read(0, &mut bytes);
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
        let words = Words::new(SIZE)?;

        assert_eq!(bytes(&words), [0; SIZE]);
        Ok(())
    }

    #[test]
    fn any_bytes_can_be_written_and_no_others_change() -> Result {
        for first in 0..SIZE {
            for end in first..=SIZE {
                let words = Words::new(SIZE)?;
                let mut expected = [0x11; SIZE];
                words.write(0, &expected);

                let value = [0x22; SIZE];
                words.write(first, &value[first..end]);
                expected[first..end].fill(0x22);
                assert_eq!(bytes(&words), expected);
            }
        }
        Ok(())
    }

    #[test]
    fn any_bytes_can_be_read() -> Result {
        let words = Words::new(SIZE)?;
        let all: [u8; SIZE] = core::array::from_fn(|n| n as u8);
        words.write(0, &all);

        for first in 0..SIZE {
            for end in first..=SIZE {
                let mut some = [0; SIZE];
                words.read(first, &mut some[first..end]);
                assert_eq!(some[first..end], all[first..end]);
            }
        }
        Ok(())
    }

    #[test]
    fn bytes_past_the_end_are_not_written() -> Result {
        let words = Words::new(SIZE)?;

        words.write(SIZE - 2, &[1; 8]);
        words.read(SIZE, &mut [0; 8]);
        assert_eq!(bytes(&words)[SIZE - 2..], [1, 1]);
        Ok(())
    }
}
