// SPDX-License-Identifier: GPL-2.0

//! The engine: runs commands on virtual addresses, one page at a time.
//!
//! The engine accesses memory only through the [`Memory`] trait and does not know whose memory it
//! is. When an access misses, the engine stops and returns the address. The next call of
//! [`Engine::run`] repeats the same access. The engine can also be stopped before each page, so
//! that a caller never waits for more than a page of work. It takes no locks; [`Engine::new`]
//! allocates.

#[cfg(CONFIG_DUMMY_GPU_KUNIT_TEST)]
mod kunit;

use super::command::{
    AtomicOp,
    Combine,
    Command,
    Operand,
    Reduce,
    HISTOGRAM_BINS, //
};
use hmm::{
    Access,
    Miss, //
};
use kernel::{
    page::{
        PAGE_MASK,
        PAGE_SIZE, //
    },
    prelude::*, //
};

/// How the engine accesses memory.
pub(crate) trait Memory {
    /// Copies from memory at `va` to `buf`. The bytes lie in one page.
    fn read(&mut self, va: usize, buf: &mut [u8]) -> Result<(), Miss>;

    /// Copies `buf` to memory at `va`. The bytes lie in one page. On a miss none of them is
    /// written.
    fn write(&mut self, va: usize, buf: &[u8]) -> Result<(), Miss>;

    /// Replaces the `u64` at `va` by what `f` returns for it, atomically. Returns the old value.
    /// `va` is a multiple of 8. On a miss nothing is written.
    fn update(&mut self, va: usize, f: impl FnOnce(u64) -> u64) -> Result<u64, Miss>;
}

/// An access that missed.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    /// The first byte that could not be accessed.
    pub(crate) va: usize,
    /// The access that missed.
    pub(crate) access: Access,
    /// The number of bytes from `va` on that the command will access in this way. Not zero.
    pub(crate) len: usize,
    /// Whether the access is an atomic operation, for which the GPU needs the page exclusively.
    pub(crate) atomic: bool,
}

impl Fault {
    pub(crate) fn new(va: usize, access: Access, len: usize) -> Self {
        Self {
            va,
            access,
            len,
            atomic: false,
        }
    }
}

/// Why the engine stopped.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// All commands ran.
    Done,
    /// An access missed. It will miss again until the fault is serviced.
    Fault(Fault),
    /// The `go_on` callback returned `false`.
    Paused,
}

/// A list of commands, and how far they have run.
pub(crate) struct Engine {
    commands: KVVec<Command>,
    /// The number of commands that completed.
    completed: usize,
    /// The number of bytes of each source, or of the destination of a fill, that are done.
    offset: usize,
    /// The number of bytes of the result that were written.
    written: usize,
    /// The sum, or what an atomic command found.
    sum: u64,
    crc: Crc32,
    histogram: KVec<u64>,
    /// The number of steps done. A step handles up to one page of each operand.
    steps: u64,
    /// A buffer of one page for the first source, for the result, or for the bytes to write.
    page: KVec<u8>,
    /// A buffer of one page for the second source.
    page2: KVec<u8>,
}

impl Engine {
    /// Creates an engine to run `commands`.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`].
    pub(crate) fn new(commands: KVVec<Command>) -> Result<Self> {
        Ok(Self {
            commands,
            completed: 0,
            offset: 0,
            written: 0,
            sum: 0,
            crc: Crc32::new(),
            histogram: KVec::zeroed(HISTOGRAM_BINS, GFP_KERNEL_ACCOUNT)?,
            steps: 0,
            page: KVec::zeroed(PAGE_SIZE, GFP_KERNEL_ACCOUNT)?,
            page2: KVec::zeroed(PAGE_SIZE, GFP_KERNEL_ACCOUNT)?,
        })
    }

    /// The number of commands that completed.
    pub(crate) fn completed(&self) -> usize {
        self.completed
    }

    /// The number of steps done, of up to one page each.
    pub(crate) fn steps(&self) -> u64 {
        self.steps
    }

    /// Runs until the last command completes, an access misses, or `go_on` returns `false`. `go_on`
    /// is called before each step.
    pub(crate) fn run(
        &mut self,
        memory: &mut impl Memory,
        mut go_on: impl FnMut() -> bool,
    ) -> Stop {
        while let Some(&command) = self.commands.get(self.completed) {
            if !go_on() {
                return Stop::Paused;
            }
            match self.step(command, memory) {
                Ok(ended) => {
                    self.steps += 1;
                    if ended {
                        self.end_command();
                    }
                }
                Err(fault) => return Stop::Fault(fault),
            }
        }
        Stop::Done
    }

    /// Resets the state of the current command, which has completed.
    fn end_command(&mut self) {
        self.completed += 1;
        self.offset = 0;
        self.written = 0;
        self.sum = 0;
        self.crc = Crc32::new();
        self.histogram.fill(0);
    }

    /// Runs one step of `command`. Returns whether the command has completed. On a fault no
    /// progress is recorded, so the step can be repeated.
    fn step(&mut self, command: Command, memory: &mut impl Memory) -> Result<bool, Fault> {
        match command {
            Command::Fill { dst, byte } => {
                let page = &mut self.page[..step_len(self.offset, &[dst])];

                page.fill(byte);
                write(memory, dst, self.offset, page)?;
                self.offset += page.len();
                Ok(self.offset == dst.len())
            }
            Command::Copy { dst, src } => {
                let page = &mut self.page[..step_len(self.offset, &[dst, src])];

                read(memory, src, self.offset, page)?;
                write(memory, dst, self.offset, page)?;
                self.offset += page.len();
                Ok(self.offset == dst.len())
            }
            Command::Combine {
                how,
                dst,
                src,
                src2,
            } => {
                let len = step_len(self.offset, &[dst, src, src2]);
                let page = &mut self.page[..len];
                let page2 = &mut self.page2[..len];

                read(memory, src, self.offset, page)?;
                read(memory, src2, self.offset, page2)?;
                match how {
                    Combine::Add => add(page, page2),
                    Combine::Xor => xor(page, page2),
                }
                write(memory, dst, self.offset, page)?;
                self.offset += len;
                Ok(self.offset == dst.len())
            }
            Command::Reduce { how, dst, src } => {
                if self.offset < src.len() {
                    self.reduce(how, src, memory)?;
                    return Ok(false);
                }
                self.write_result(how, dst, memory)?;
                Ok(self.written == dst.len())
            }
            Command::Atomic { op, dst, target } => {
                if self.offset < target.len() {
                    self.sum = update(memory, op, target)?;
                    self.offset += target.len();
                    return Ok(false);
                }
                write(memory, dst, 0, &self.sum.to_ne_bytes())?;
                Ok(true)
            }
        }
    }

    /// Adds up to one page of `src` to the result.
    fn reduce(&mut self, how: Reduce, src: Operand, memory: &mut impl Memory) -> Result<(), Fault> {
        let page = &mut self.page[..step_len(self.offset, &[src])];

        read(memory, src, self.offset, page)?;
        match how {
            Reduce::Sum => self.sum = words(page).fold(self.sum, u64::wrapping_add),
            Reduce::Crc32 => self.crc.update(page),
            Reduce::Histogram => {
                for byte in page.iter() {
                    if let Some(bin) = self.histogram.get_mut(usize::from(*byte)) {
                        *bin += 1;
                    }
                }
            }
        }
        self.offset += page.len();
        Ok(())
    }

    /// Writes the part of the result that lies in one page.
    fn write_result(
        &mut self,
        how: Reduce,
        dst: Operand,
        memory: &mut impl Memory,
    ) -> Result<(), Fault> {
        let result: &[u64] = match how {
            Reduce::Sum => &[self.sum],
            Reduce::Crc32 => &[u64::from(self.crc.value())],
            Reduce::Histogram => &self.histogram,
        };
        for (bytes, word) in self.page.chunks_exact_mut(size_of::<u64>()).zip(result) {
            bytes.copy_from_slice(&word.to_ne_bytes());
        }

        let len = step_len(self.written, &[dst]);
        write(
            memory,
            dst,
            self.written,
            &self.page[self.written..self.written + len],
        )?;
        self.written += len;
        Ok(())
    }
}

// `write_result()` builds the whole result in the buffer of one page.
static_assert!(HISTOGRAM_BINS * size_of::<u64>() <= PAGE_SIZE);

/// The number of bytes from `offset` on that lie in one page of each operand.
fn step_len(offset: usize, operands: &[Operand]) -> usize {
    let mut len = PAGE_SIZE;
    for operand in operands {
        let at = operand.start() + offset;
        len = len
            .min(PAGE_SIZE - (at & !PAGE_MASK))
            .min(operand.end() - at);
    }
    len
}

fn read(
    memory: &mut impl Memory,
    operand: Operand,
    offset: usize,
    buf: &mut [u8],
) -> Result<(), Fault> {
    memory
        .read(operand.start() + offset, buf)
        .map_err(|miss| fault(operand, miss))
}

fn write(
    memory: &mut impl Memory,
    operand: Operand,
    offset: usize,
    buf: &[u8],
) -> Result<(), Fault> {
    memory
        .write(operand.start() + offset, buf)
        .map_err(|miss| fault(operand, miss))
}

/// Operates on the `u64` at `target`. Returns the old value.
fn update(memory: &mut impl Memory, op: AtomicOp, target: Operand) -> Result<u64, Fault> {
    let expected = match op {
        AtomicOp::FetchAdd(_) => 0,
        AtomicOp::CompareExchange { expected, .. } => {
            let mut word = [0; size_of::<u64>()];
            read(memory, expected, 0, &mut word)?;
            u64::from_ne_bytes(word)
        }
    };
    let new = |old: u64| match op {
        AtomicOp::FetchAdd(number) => old.wrapping_add(number),
        AtomicOp::CompareExchange { new, .. } if old == expected => new,
        AtomicOp::CompareExchange { .. } => old,
    };
    memory.update(target.start(), new).map_err(|miss| Fault {
        atomic: true,
        ..fault(target, miss)
    })
}

fn fault(operand: Operand, miss: Miss) -> Fault {
    Fault::new(miss.va, miss.access, operand.end() - miss.va)
}

/// Iterates over the `u64`s in `bytes`.
fn words(bytes: &[u8]) -> impl Iterator<Item = u64> + '_ {
    bytes.chunks_exact(size_of::<u64>()).map(|bytes| {
        let mut word = [0; size_of::<u64>()];
        word.copy_from_slice(bytes);
        u64::from_ne_bytes(word)
    })
}

/// Adds the `u64`s of `other` to those of `bytes`.
fn add(bytes: &mut [u8], other: &[u8]) {
    for (bytes, other) in bytes.chunks_exact_mut(size_of::<u64>()).zip(words(other)) {
        let sum = words(bytes).fold(other, u64::wrapping_add);
        bytes.copy_from_slice(&sum.to_ne_bytes());
    }
}

/// Xors `other` into `bytes`: as `u64`s, then the bytes that are left.
fn xor(bytes: &mut [u8], other: &[u8]) {
    let mut chunks = bytes.chunks_exact_mut(size_of::<u64>());
    let rest = other.chunks_exact(size_of::<u64>()).remainder();

    for (bytes, other) in chunks.by_ref().zip(words(other)) {
        let xor = words(bytes).fold(other, |xor, word| xor ^ word);
        bytes.copy_from_slice(&xor.to_ne_bytes());
    }
    for (byte, other) in chunks.into_remainder().iter_mut().zip(rest) {
        *byte ^= other;
    }
}

/// The CRC-32 of IEEE 802.3, as computed by zlib.
///
/// `lib/crc` has no Rust abstraction, which would be longer than this implementation.
struct Crc32(u32);

impl Crc32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut index = 0;
        while index < table.len() {
            let mut crc = index as u32;
            let mut bit = 0;
            while bit < u8::BITS {
                crc = (crc >> 1) ^ if crc & 1 != 0 { 0xedb8_8320 } else { 0 };
                bit += 1;
            }
            table[index] = crc;
            index += 1;
        }
        table
    };

    const fn new() -> Self {
        Self(!0)
    }

    fn update(&mut self, bytes: &[u8]) {
        static TABLE: [u32; 256] = Crc32::TABLE;

        for byte in bytes {
            self.0 = (self.0 >> 8) ^ TABLE[usize::from(self.0 as u8 ^ byte)];
        }
    }

    fn value(&self) -> u32 {
        !self.0
    }
}
