// SPDX-License-Identifier: GPL-2.0

//! The engine: runs commands on virtual addresses, a page at a time.
//!
//! It reaches memory through the [`Memory`] trait only and does not know whose memory it is. When
//! an access misses it stops and says where; run again, it goes on with the same bytes. It can stop
//! before every page for other reasons too, so that nothing ever waits for more than a page of
//! work. Pure: all that it calls is allocation.

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

fn xor(bytes: &mut [u8], other: &[u8]) {
    for (byte, other) in bytes.iter_mut().zip(other) {
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

#[cfg(CONFIG_DUMMY_GPU_KUNIT_TEST)]
#[kunit_tests(dummy_gpu_engine)]
mod tests {
    use super::*;
    use crate::command::RawCommand;
    use kernel::uapi;

    const FILL: u32 = uapi::dummy_gpu_opcode_DUMMY_GPU_OP_FILL;
    const COPY: u32 = uapi::dummy_gpu_opcode_DUMMY_GPU_OP_COPY;
    const ADD: u32 = uapi::dummy_gpu_opcode_DUMMY_GPU_OP_ADD;
    const XOR: u32 = uapi::dummy_gpu_opcode_DUMMY_GPU_OP_XOR;
    const SUM: u32 = uapi::dummy_gpu_opcode_DUMMY_GPU_OP_SUM;
    const CRC32: u32 = uapi::dummy_gpu_opcode_DUMMY_GPU_OP_CRC32;
    const HISTOGRAM: u32 = uapi::dummy_gpu_opcode_DUMMY_GPU_OP_HISTOGRAM;

    /// Where the fake memory starts.
    const BASE: usize = 16 * PAGE_SIZE;
    const PAGES: usize = 8;

    /// Some pages of memory, each with the access that does not miss.
    struct Fake {
        bytes: KVec<u8>,
        pages: [Option<Access>; PAGES],
        /// Whether an access touched more than one page.
        crossed: bool,
    }

    impl Fake {
        /// All pages are writable. The bytes are different in each page.
        fn new() -> Result<Self> {
            let mut bytes = KVec::zeroed(PAGES * PAGE_SIZE, GFP_KERNEL)?;
            for (index, byte) in bytes.iter_mut().enumerate() {
                *byte = (index * 7 + index / PAGE_SIZE) as u8;
            }
            Ok(Self {
                bytes,
                pages: [Some(Access::Write); PAGES],
                crossed: false,
            })
        }

        /// The same, but nothing is mapped.
        fn unmapped() -> Result<Self> {
            let mut fake = Self::new()?;
            fake.pages = [None; PAGES];
            Ok(fake)
        }

        fn range(
            &mut self,
            va: usize,
            len: usize,
            access: Access,
        ) -> Result<core::ops::Range<usize>, Miss> {
            let miss = Miss { va, access };
            let first = va.checked_sub(BASE).ok_or(miss)?;

            self.crossed |= first / PAGE_SIZE != (first + len - 1) / PAGE_SIZE;
            match (self.pages.get(first / PAGE_SIZE), access) {
                (Some(Some(Access::Write)), _) | (Some(Some(Access::Read)), Access::Read) => {
                    Ok(first..first + len)
                }
                _ => Err(miss),
            }
        }

        /// Maps the page that a fault names, in the way that it names.
        fn serve(&mut self, fault: Fault) {
            if let Some(page) = self.pages.get_mut((fault.va - BASE) / PAGE_SIZE) {
                *page = Some(fault.access);
            }
        }

        fn at(&self, va: usize, len: usize) -> &[u8] {
            self.bytes.get(va - BASE..va - BASE + len).unwrap_or(&[])
        }

        fn word(&self, va: usize) -> u64 {
            words(self.at(va, 8)).sum()
        }

        fn put(&mut self, va: usize, bytes: &[u8]) {
            for (to, from) in self.bytes.iter_mut().skip(va - BASE).zip(bytes) {
                *to = *from;
            }
        }
    }

    impl Memory for Fake {
        fn read(&mut self, va: usize, buf: &mut [u8]) -> Result<(), Miss> {
            let range = self.range(va, buf.len(), Access::Read)?;
            buf.copy_from_slice(&self.bytes[range]);
            Ok(())
        }

        fn write(&mut self, va: usize, buf: &[u8]) -> Result<(), Miss> {
            let range = self.range(va, buf.len(), Access::Write)?;
            self.bytes[range].copy_from_slice(buf);
            Ok(())
        }
    }

    fn command(opcode: u32, dst: usize, src: usize, src2: usize, length: usize) -> RawCommand {
        RawCommand {
            opcode: opcode.into(),
            dst: dst as u64,
            src: src as u64,
            src2: src2 as u64,
            length: length as u64,
            ..Default::default()
        }
    }

    fn engine(raw: &[RawCommand]) -> Result<Engine> {
        let mut commands = KVVec::new();
        for raw in raw {
            commands.push(Command::new(raw)?, GFP_KERNEL)?;
        }
        Engine::new(commands)
    }

    /// Runs one command to its end and serves its faults. Returns their number.
    fn run(memory: &mut Fake, raw: RawCommand) -> Result<usize> {
        let mut engine = engine(&[raw])?;

        // No command here touches a page more than twice, with three operands of up to all pages.
        for faults in 0..6 * PAGES {
            match engine.run(memory, || true) {
                Stop::Done if engine.completed() == 1 => return Ok(faults),
                Stop::Fault(fault) => memory.serve(fault),
                _ => return Err(EIO),
            }
        }
        Err(EBUSY)
    }

    #[test]
    fn crc32_is_that_of_zlib() -> Result {
        let result = BASE + PAGE_SIZE;
        let vectors: [(&[u8], u64); 4] = [
            (b"123456789", 0xcbf4_3926),
            (b"a", 0xe8b7_be43),
            (&[0; 32], 0x190a_55ad),
            (b"The quick brown fox jumps over the lazy dog", 0x414f_a339),
        ];

        for (bytes, crc) in vectors {
            let mut memory = Fake::new()?;
            memory.put(BASE + 3, bytes);
            run(
                &mut memory,
                command(CRC32, result, BASE + 3, 0, bytes.len()),
            )?;
            assert_eq!(memory.word(result), crc);
        }
        Ok(())
    }

    #[test]
    fn crc32_goes_on_across_pages() -> Result {
        let mut memory = Fake::new()?;
        let start = BASE + PAGE_SIZE - 4;

        memory.put(start, b"123456789");
        run(&mut memory, command(CRC32, BASE, start, 0, 9))?;
        assert_eq!(memory.word(BASE), 0xcbf4_3926);
        assert!(!memory.crossed);
        Ok(())
    }

    #[test]
    fn fill_sets_its_bytes_and_no_others() -> Result {
        let mut memory = Fake::new()?;
        let before = Fake::new()?;
        let start = BASE + PAGE_SIZE - 5;
        let len = 2 * PAGE_SIZE + 11;
        let end = start + len;

        let raw = RawCommand {
            value: 0xa5,
            ..command(FILL, start, 0, 0, len)
        };
        run(&mut memory, raw)?;
        assert!(memory.at(start, len).iter().all(|byte| *byte == 0xa5));
        assert!(memory.at(BASE, start - BASE) == before.at(BASE, start - BASE));
        assert!(memory.at(end, PAGE_SIZE) == before.at(end, PAGE_SIZE));
        assert!(!memory.crossed);
        Ok(())
    }

    #[test]
    fn copy_takes_any_alignment() -> Result {
        let before = Fake::new()?;
        let len = 2 * PAGE_SIZE + 11;

        for (src_offset, dst_offset) in [(0, 0), (1, 0), (0, 1), (5, PAGE_SIZE - 1), (4095, 17)] {
            let mut memory = Fake::new()?;
            let src = BASE + src_offset;
            let dst = BASE + 4 * PAGE_SIZE + dst_offset;

            run(&mut memory, command(COPY, dst, src, 0, len))?;
            assert!(memory.at(dst, len) == before.at(src, len));
            assert!(memory.at(src, len) == before.at(src, len));
            assert!(!memory.crossed);
        }
        Ok(())
    }

    #[test]
    fn add_wraps_and_takes_pages_apart() -> Result {
        let mut memory = Fake::new()?;
        let (src, src2) = (BASE + PAGE_SIZE - 8, BASE + 3 * PAGE_SIZE - 16);
        let dst = BASE + 5 * PAGE_SIZE;

        memory.put(src, &u64::MAX.to_ne_bytes());
        memory.put(src2, &2u64.to_ne_bytes());
        let before = Fake::new()?;
        run(&mut memory, command(ADD, dst, src, src2, 4 * 8))?;
        assert_eq!(memory.word(dst), 1);
        for index in 1..4 {
            let sum = before
                .word(src + index * 8)
                .wrapping_add(before.word(src2 + index * 8));
            assert_eq!(memory.word(dst + index * 8), sum);
        }
        assert!(!memory.crossed);
        Ok(())
    }

    #[test]
    fn combine_works_in_place() -> Result {
        let before = Fake::new()?;
        let (src, src2) = (BASE + 40, BASE + 4 * PAGE_SIZE + 8);
        let len = PAGE_SIZE + 64;

        for (opcode, dst) in [(ADD, src), (ADD, src2), (XOR, src), (XOR, src2)] {
            let mut memory = Fake::new()?;

            run(&mut memory, command(opcode, dst, src, src2, len))?;
            for at in (0..len).step_by(8) {
                let (a, b) = (before.word(src + at), before.word(src2 + at));
                let expected = if opcode == ADD {
                    a.wrapping_add(b)
                } else {
                    a ^ b
                };
                assert_eq!(memory.word(dst + at), expected);
            }
        }

        let mut memory = Fake::new()?;
        run(&mut memory, command(XOR, src, src, src, len))?;
        assert!(memory.at(src, len).iter().all(|byte| *byte == 0));
        Ok(())
    }

    #[test]
    fn xor_takes_any_alignment() -> Result {
        let before = Fake::new()?;
        let mut memory = Fake::new()?;
        let (dst, src, src2) = (BASE + 4096 * 5 + 1, BASE + 2, BASE + 4096 * 2 + 3);
        let len = PAGE_SIZE + 5;

        run(&mut memory, command(XOR, dst, src, src2, len))?;
        for at in 0..len {
            let (a, b) = (before.at(src + at, 1), before.at(src2 + at, 1));
            let expected = a.iter().zip(b).map(|(a, b)| a ^ b);
            assert!(memory.at(dst + at, 1).iter().copied().eq(expected));
        }
        Ok(())
    }

    #[test]
    fn sum_wraps_and_may_replace_its_source() -> Result {
        let mut memory = Fake::new()?;
        let src = BASE + PAGE_SIZE - 16;

        for (index, word) in [u64::MAX, 1, 40, 2].iter().enumerate() {
            memory.put(src + index * 8, &word.to_ne_bytes());
        }
        run(&mut memory, command(SUM, src + 8, src, 0, 32))?;
        assert_eq!(memory.word(src + 8), 42);
        assert_eq!(memory.word(src), u64::MAX);
        Ok(())
    }

    #[test]
    fn histogram_counts_each_byte_across_pages() -> Result {
        let mut memory = Fake::new()?;
        let (src, len) = (BASE + 100, 3 * PAGE_SIZE + 1);
        // The result crosses a page too.
        let dst = BASE + 6 * PAGE_SIZE - 8;

        let before = Fake::new()?;
        run(&mut memory, command(HISTOGRAM, dst, src, 0, len))?;
        for value in 0..HISTOGRAM_BINS {
            let count = before
                .at(src, len)
                .iter()
                .filter(|byte| usize::from(**byte) == value)
                .count();
            assert_eq!(memory.word(dst + value * 8), count as u64);
        }
        assert!(!memory.crossed);
        Ok(())
    }

    #[test]
    fn each_result_starts_afresh() -> Result {
        let mut memory = Fake::new()?;
        let (first, second) = (BASE + PAGE_SIZE, BASE + 2 * PAGE_SIZE);

        for opcode in [SUM, CRC32, HISTOGRAM] {
            let mut engine = engine(&[
                command(opcode, first, BASE, 0, 64),
                command(opcode, second, BASE, 0, 64),
            ])?;
            assert!(engine.run(&mut memory, || true) == Stop::Done);
            assert_eq!(engine.completed(), 2);
            assert!(memory.at(first, 2048) == memory.at(second, 2048) || opcode != HISTOGRAM);
            assert_eq!(memory.word(first), memory.word(second));
        }
        Ok(())
    }

    #[test]
    fn a_fault_names_the_byte_the_access_and_the_rest() -> Result {
        let mut memory = Fake::new()?;
        let (dst, src) = (BASE + 5 * PAGE_SIZE + 8, BASE + 8);
        let len = 2 * PAGE_SIZE;
        let mut engine = engine(&[command(COPY, dst, src, 0, len)])?;

        // The second page of the source is missing, and the second of the destination read-only.
        memory.pages[1] = None;
        memory.pages[6] = Some(Access::Read);
        let fault = Fault {
            va: BASE + PAGE_SIZE,
            access: Access::Read,
            len: PAGE_SIZE + 8,
        };
        assert!(engine.run(&mut memory, || true) == Stop::Fault(fault));
        // Nothing changes for as long as it is not served.
        assert!(engine.run(&mut memory, || true) == Stop::Fault(fault));
        assert_eq!(engine.steps(), 1);
        memory.serve(fault);

        let fault = Fault {
            va: BASE + 6 * PAGE_SIZE,
            access: Access::Write,
            len: PAGE_SIZE + 8,
        };
        assert!(engine.run(&mut memory, || true) == Stop::Fault(fault));
        memory.serve(fault);
        assert!(engine.run(&mut memory, || true) == Stop::Done);
        assert_eq!(engine.completed(), 1);
        Ok(())
    }

    #[test]
    fn a_fault_in_a_later_command_keeps_the_earlier_ones() -> Result {
        let mut memory = Fake::new()?;
        let mut engine = engine(&[
            command(COPY, BASE, BASE + PAGE_SIZE, 0, 16),
            command(COPY, BASE + 16, BASE + 7 * PAGE_SIZE, 0, 16),
            command(COPY, BASE + 32, BASE + PAGE_SIZE, 0, 16),
        ])?;

        memory.pages[7] = None;
        let stop = engine.run(&mut memory, || true);
        assert!(matches!(stop, Stop::Fault(fault) if fault.va == BASE + 7 * PAGE_SIZE));
        assert_eq!(engine.completed(), 1);

        let before = Fake::new()?;
        assert!(memory.at(BASE, 16) == before.at(BASE + PAGE_SIZE, 16));
        assert!(memory.at(BASE + 16, 32) == before.at(BASE + 16, 32));
        Ok(())
    }

    #[test]
    fn a_result_is_the_same_when_every_page_faults_first() -> Result {
        let (dst, src, src2) = (BASE + 6 * PAGE_SIZE - 8, BASE + 8, BASE + 3 * PAGE_SIZE);
        let len = 2 * PAGE_SIZE - 8;

        for opcode in [ADD, XOR, SUM, CRC32, HISTOGRAM] {
            let binary = matches!(opcode, ADD | XOR);
            let raw = command(opcode, dst, src, if binary { src2 } else { 0 }, len);
            let mut warm = Fake::new()?;
            let mut cold = Fake::unmapped()?;

            assert_eq!(run(&mut warm, raw)?, 0);
            assert!(run(&mut cold, raw)? >= 2);
            assert!(warm.bytes[..] == cold.bytes[..]);
        }
        Ok(())
    }

    #[test]
    fn the_engine_can_be_paused_before_every_page() -> Result {
        let mut memory = Fake::new()?;
        let (dst, src, len) = (BASE + 4 * PAGE_SIZE, BASE, 3 * PAGE_SIZE);
        let mut engine = engine(&[command(COPY, dst, src, 0, len)])?;

        for steps in 0..3 {
            assert!(engine.run(&mut memory, || false) == Stop::Paused);
            assert_eq!(engine.steps(), steps);
            let mut once = true;
            let stop = engine.run(&mut memory, || core::mem::take(&mut once));
            assert!(stop == if steps == 2 { Stop::Done } else { Stop::Paused });
        }
        assert!(memory.at(dst, len) == memory.at(src, len));
        Ok(())
    }

    #[test]
    fn an_operand_at_the_end_of_the_address_space_does_not_wrap() -> Result {
        let mut memory = Fake::new()?;
        let start = usize::MAX - 15;
        let mut engine = engine(&[command(FILL, start, 0, 0, 15)])?;

        let fault = Fault {
            va: start,
            access: Access::Write,
            len: 15,
        };
        assert!(engine.run(&mut memory, || true) == Stop::Fault(fault));
        Ok(())
    }
}
