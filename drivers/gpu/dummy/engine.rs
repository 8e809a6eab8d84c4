// SPDX-License-Identifier: GPL-2.0

//! The engine: runs commands on virtual addresses, a page at a time.
//!
//! It reaches memory through the [`Memory`] trait only and does not know whose memory it is. When
//! an access misses it stops and says where; run again, it goes on with the same bytes. It can stop
//! before every page for other reasons too, so that nothing ever waits for more than a page of
//! work. Pure: all that it calls is allocation.

#[cfg(CONFIG_DUMMY_GPU_KUNIT_TEST)]
mod kunit;

use super::command::{
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
    /// Copies from memory at `va`. The bytes lie in one page.
    fn read(&mut self, va: usize, buf: &mut [u8]) -> Result<(), Miss>;

    /// Copies to memory at `va`. The bytes lie in one page, and none is written on a miss.
    fn write(&mut self, va: usize, buf: &[u8]) -> Result<(), Miss>;
}

/// An access that missed.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    /// The first byte that could not be accessed.
    pub(crate) va: usize,
    /// How it was to be accessed.
    pub(crate) access: Access,
    /// The bytes from `va` on that the command will access in this way. Not zero.
    pub(crate) len: usize,
}

/// Why the engine stopped.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// All commands ran.
    Done,
    /// An access missed. To run again makes sense once it is served.
    Fault(Fault),
    /// It was told not to go on.
    Paused,
}

/// Commands, and how far they ran.
pub(crate) struct Engine {
    commands: KVVec<Command>,
    /// The commands that ran to their end.
    completed: usize,
    /// The bytes of the sources, or of the destination of a fill, that are done.
    offset: usize,
    /// The bytes of the result that are written.
    written: usize,
    sum: u64,
    crc: Crc32,
    histogram: KVec<u64>,
    /// The pages of work that were done.
    steps: u64,
    /// A page of the first source, of the result, or to be written.
    page: KVec<u8>,
    /// A page of the second source.
    page2: KVec<u8>,
}

impl Engine {
    /// Creates an engine that is to run `commands`.
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

    /// The number of commands that ran to their end.
    pub(crate) fn completed(&self) -> usize {
        self.completed
    }

    /// Grows whenever a page of work was done.
    pub(crate) fn steps(&self) -> u64 {
        self.steps
    }

    /// Runs until the last command ends, an access misses or `go_on`, which is asked before each
    /// page of work, says no.
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

    /// Forgets all about the command that ran to its end.
    fn end_command(&mut self) {
        self.completed += 1;
        self.offset = 0;
        self.written = 0;
        self.sum = 0;
        self.crc = Crc32::new();
        self.histogram.fill(0);
    }

    /// Does a page of work and returns whether the command ended. Nothing changes on a fault.
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
        }
    }

    /// Reduces a page of `src`.
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

    /// Writes a page of the result.
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

// A result is made in one page.
static_assert!(HISTOGRAM_BINS * size_of::<u64>() <= PAGE_SIZE);

/// The bytes from `offset` on that cross a page boundary in none of the operands.
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

fn fault(operand: Operand, miss: Miss) -> Fault {
    Fault {
        va: miss.va,
        access: miss.access,
        len: operand.end() - miss.va,
    }
}

/// The `u64`s that make up `bytes`.
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

/// Xors `other` to `bytes`: the `u64`s that they have, and the bytes that are left.
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

/// The CRC-32 of IEEE 802.3, the same as zlib's.
///
/// lib/crc has it too, but no Rust abstraction: these few lines are less than one would be.
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
