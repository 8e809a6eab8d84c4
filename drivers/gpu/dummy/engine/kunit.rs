// SPDX-License-Identifier: GPL-2.0

//! The KUnit suite of the engine, over a fake memory.

use super::*;

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
    const FETCH_ADD: u32 = uapi::dummy_gpu_opcode_DUMMY_GPU_OP_FETCH_ADD;
    const COMPARE_EXCHANGE: u32 = uapi::dummy_gpu_opcode_DUMMY_GPU_OP_COMPARE_EXCHANGE;

    /// Where the fake memory starts.
    const BASE: usize = 16 * PAGE_SIZE;
    const PAGES: usize = 8;

    /// Some pages of memory, each with the access that it allows.
    struct Fake {
        bytes: KVec<u8>,
        pages: [Option<Access>; PAGES],
        /// The pages that atomic operations may use.
        exclusive: [bool; PAGES],
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
                exclusive: [false; PAGES],
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

        /// Maps the page of `fault` for the access of `fault`.
        fn serve(&mut self, fault: Fault) {
            if let Some(page) = self.pages.get_mut((fault.va - BASE) / PAGE_SIZE) {
                *page = Some(fault.access);
            }
            if let Some(page) = self.exclusive.get_mut((fault.va - BASE) / PAGE_SIZE) {
                *page |= fault.atomic;
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

        fn update(&mut self, va: usize, f: impl FnOnce(u64) -> u64) -> Result<u64, Miss> {
            let access = Access::Write;
            let range = self.range(va, 8, access)?;
            if !self.exclusive[range.start / PAGE_SIZE] {
                return Err(Miss { va, access });
            }
            let old = self.word(va);
            self.bytes[range].copy_from_slice(&f(old).to_ne_bytes());
            Ok(old)
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
            atomic: false,
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
            atomic: false,
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

    fn atomic(opcode: u32, dst: usize, src: usize, src2: usize, value: u64) -> RawCommand {
        RawCommand {
            value,
            ..command(opcode, dst, src, src2, 8)
        }
    }

    #[test]
    fn fetch_add_wraps_and_returns_what_was_there() -> Result {
        let mut memory = Fake::new()?;
        let (dst, target) = (BASE + PAGE_SIZE, BASE + 3 * PAGE_SIZE - 8);

        memory.put(target, &(u64::MAX - 1).to_ne_bytes());
        // The page of the target is made exclusive once.
        let raw = atomic(FETCH_ADD, dst, target, 0, 3);
        for (faults, old, new) in [(1, u64::MAX - 1, 1), (0, 1, 4)] {
            assert_eq!(run(&mut memory, raw)?, faults);
            assert_eq!((memory.word(dst), memory.word(target)), (old, new));
        }
        Ok(())
    }

    #[test]
    fn compare_exchange_replaces_only_what_is_expected() -> Result {
        let mut memory = Fake::new()?;
        let (dst, target) = (BASE + PAGE_SIZE, BASE + 2 * PAGE_SIZE);
        let expected = BASE + 4 * PAGE_SIZE;
        let raw = atomic(COMPARE_EXCHANGE, dst, target, expected, 7);

        memory.put(target, &5u64.to_ne_bytes());
        memory.put(expected, &4u64.to_ne_bytes());
        run(&mut memory, raw)?;
        assert_eq!((memory.word(dst), memory.word(target)), (5, 5));
        assert_eq!(memory.word(expected), 4);
        // It fails once more, and puts there what it should have expected.
        run(
            &mut memory,
            RawCommand {
                dst: raw.src2,
                ..raw
            },
        )?;
        assert_eq!((memory.word(expected), memory.word(target)), (5, 5));
        run(&mut memory, raw)?;
        assert_eq!((memory.word(dst), memory.word(target)), (5, 7));
        Ok(())
    }

    #[test]
    fn an_atomic_command_operates_once_however_often_it_faults() -> Result {
        let (dst, target, expected) = (BASE, BASE + 2 * PAGE_SIZE, BASE + 4 * PAGE_SIZE);

        for (opcode, src2, faults) in [(FETCH_ADD, 0, 2), (COMPARE_EXCHANGE, expected, 3)] {
            let mut memory = Fake::unmapped()?;
            let old = memory.word(target);
            memory.put(expected, &old.to_ne_bytes());
            let raw = atomic(opcode, dst, target, src2, 1);
            assert_eq!(run(&mut memory, raw)?, faults);
            assert_eq!(memory.word(dst), old);
            let new = if opcode == FETCH_ADD { old + 1 } else { 1 };
            assert_eq!(memory.word(target), new);
        }
        Ok(())
    }

    #[test]
    fn an_atomic_fault_is_of_the_target_and_says_so() -> Result {
        let mut memory = Fake::new()?;
        let (dst, target) = (BASE, BASE + 2 * PAGE_SIZE + 8);
        let mut engine = engine(&[atomic(FETCH_ADD, dst, target, 0, 1)])?;
        let before = memory.word(target);

        let fault = Fault {
            va: target,
            access: Access::Write,
            len: 8,
            atomic: true,
        };
        assert!(engine.run(&mut memory, || true) == Stop::Fault(fault));
        assert_eq!(memory.word(target), before);
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
            atomic: false,
        };
        assert!(engine.run(&mut memory, || true) == Stop::Fault(fault));
        Ok(())
    }
}
