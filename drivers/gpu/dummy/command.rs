// SPDX-License-Identifier: GPL-2.0

//! The commands of the engine, and the rules that they must obey.
//!
//! [`Command::new`] is the only way to make a [`Command`], and checks it. So the code that runs a
//! command need not check it again. The functions have no side effects. Of the layers above, this
//! file uses only the opcodes of the uAPI.

use kernel::{
    prelude::*,
    uapi, //
};

/// The maximum length of a command, in bytes.
///
/// A command can be interrupted before every page, so its length does not matter to other work. The
/// limit only keeps sums of lengths far below the limits of the integer types.
pub(crate) const MAX_LENGTH: u64 = 1 << 40;

const WORD: usize = size_of::<u64>();

/// The number of counters in a histogram of bytes.
pub(crate) const HISTOGRAM_BINS: usize = 1 << u8::BITS;

const FILL: u64 = uapi::dummy_gpu_opcode_DUMMY_GPU_OP_FILL as u64;
const COPY: u64 = uapi::dummy_gpu_opcode_DUMMY_GPU_OP_COPY as u64;
const ADD: u64 = uapi::dummy_gpu_opcode_DUMMY_GPU_OP_ADD as u64;
const XOR: u64 = uapi::dummy_gpu_opcode_DUMMY_GPU_OP_XOR as u64;
const SUM: u64 = uapi::dummy_gpu_opcode_DUMMY_GPU_OP_SUM as u64;
const CRC32: u64 = uapi::dummy_gpu_opcode_DUMMY_GPU_OP_CRC32 as u64;
const HISTOGRAM: u64 = uapi::dummy_gpu_opcode_DUMMY_GPU_OP_HISTOGRAM as u64;
const FETCH_ADD: u64 = uapi::dummy_gpu_opcode_DUMMY_GPU_OP_FETCH_ADD as u64;
const COMPARE_EXCHANGE: u64 = uapi::dummy_gpu_opcode_DUMMY_GPU_OP_COMPARE_EXCHANGE as u64;

/// `struct dummy_gpu_command`, as user space filled it in.
#[derive(Copy, Clone, Debug, Default)]
pub(crate) struct RawCommand {
    pub(crate) opcode: u64,
    pub(crate) flags: u64,
    pub(crate) dst: u64,
    pub(crate) src: u64,
    pub(crate) src2: u64,
    pub(crate) length: u64,
    pub(crate) value: u64,
    pub(crate) reserved: u64,
}

/// A range of bytes in the process's memory that a command reads or writes.
///
/// # Invariants
///
/// `len` is not zero, and `start + len` does not wrap.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) struct Operand {
    start: usize,
    len: usize,
}

impl Operand {
    fn new(start: u64, len: usize) -> Result<Self> {
        let start = usize::try_from(start).map_err(|_| EFAULT)?;

        if len == 0 || start.checked_add(len).is_none() {
            return Err(EINVAL);
        }
        // INVARIANT: The check above has returned an error if `len` is zero or `start + len` wraps.
        Ok(Self { start, len })
    }

    /// An operand whose address and length are multiples of the size of a `u64`.
    fn new_words(start: u64, len: usize) -> Result<Self> {
        let operand = Self::new(start, len)?;

        if operand.start % WORD != 0 || operand.len % WORD != 0 {
            return Err(EINVAL);
        }
        Ok(operand)
    }

    /// The first address.
    pub(crate) fn start(&self) -> usize {
        self.start
    }

    /// The length in bytes. Never zero.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The first address after the operand.
    pub(crate) fn end(&self) -> usize {
        self.start + self.len
    }

    fn overlaps(&self, other: &Self) -> bool {
        self.start < other.end() && other.start < self.end()
    }

    fn overlaps_in_part(&self, other: &Self) -> bool {
        self != other && self.overlaps(other)
    }
}

/// How [`Command::Combine`] combines its sources.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Combine {
    /// The sums of `u64`s, modulo 2^64.
    Add,
    /// The exclusive or of bytes.
    Xor,
}

/// What [`Command::Reduce`] computes from its source.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Reduce {
    /// The sum of `u64`s, modulo 2^64.
    Sum,
    /// The CRC-32 of bytes.
    Crc32,
    /// How often each byte occurs.
    Histogram,
}

impl Reduce {
    /// The size of the result in bytes.
    fn result_len(self) -> usize {
        match self {
            Reduce::Sum | Reduce::Crc32 => WORD,
            Reduce::Histogram => HISTOGRAM_BINS * WORD,
        }
    }
}

/// What [`Command::Atomic`] does to the `u64`.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum AtomicOp {
    /// Adds a number, modulo 2^64.
    FetchAdd(u64),
    /// Replaces it by `new` if it is equal to the `u64` at `expected`.
    CompareExchange { expected: Operand, new: u64 },
}

/// A command with valid operands.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    /// Sets each byte of `dst` to `byte`.
    Fill { dst: Operand, byte: u8 },
    /// Copies `src` to `dst`. They have the same length and do not overlap.
    Copy { dst: Operand, src: Operand },
    /// Combines `src` and `src2` into `dst`. All three have the same length. `dst` may be the same
    /// range as a source, but does not overlap a source in part.
    Combine {
        how: Combine,
        dst: Operand,
        src: Operand,
        src2: Operand,
    },
    /// Computes a result from `src` and writes it to `dst`, after all of `src` was read. `dst` has
    /// the length of the result.
    Reduce {
        how: Reduce,
        dst: Operand,
        src: Operand,
    },
    /// Operates atomically on the `u64` at `target`, and then writes its old value to `dst`, which
    /// does not overlap it.
    Atomic {
        op: AtomicOp,
        dst: Operand,
        target: Operand,
    },
}

impl Command {
    /// Checks `raw`.
    ///
    /// # Errors
    ///
    /// - [`EINVAL`] if a field has a value that the opcode does not allow.
    /// - [`EFAULT`] if an address does not fit into a pointer.
    ///
    /// Whether memory is mapped at the addresses is not checked: the engine finds out when it
    /// accesses them.
    pub(crate) fn new(raw: &RawCommand) -> Result<Self> {
        if raw.flags != 0 || raw.reserved != 0 || raw.length > MAX_LENGTH {
            return Err(EINVAL);
        }
        let len = usize::try_from(raw.length).map_err(|_| EINVAL)?;

        // Fields that the opcode does not use must be zero.
        let unused: &[u64] = match raw.opcode {
            FILL => &[raw.src, raw.src2],
            ADD | XOR => &[raw.value],
            FETCH_ADD => &[raw.src2],
            COMPARE_EXCHANGE => &[],
            _ => &[raw.src2, raw.value],
        };
        if unused.iter().any(|field| *field != 0) {
            return Err(EINVAL);
        }

        match raw.opcode {
            FILL => Ok(Self::Fill {
                dst: Operand::new(raw.dst, len)?,
                byte: u8::try_from(raw.value).map_err(|_| EINVAL)?,
            }),
            COPY => {
                let dst = Operand::new(raw.dst, len)?;
                let src = Operand::new(raw.src, len)?;

                if dst.overlaps(&src) {
                    return Err(EINVAL);
                }
                Ok(Self::Copy { dst, src })
            }
            ADD => Self::combine(Combine::Add, raw, |start| Operand::new_words(start, len)),
            XOR => Self::combine(Combine::Xor, raw, |start| Operand::new(start, len)),
            SUM => Self::reduce(Reduce::Sum, raw.dst, Operand::new_words(raw.src, len)?),
            CRC32 => Self::reduce(Reduce::Crc32, raw.dst, Operand::new(raw.src, len)?),
            HISTOGRAM => Self::reduce(Reduce::Histogram, raw.dst, Operand::new(raw.src, len)?),
            FETCH_ADD => Self::atomic(AtomicOp::FetchAdd(raw.value), raw),
            COMPARE_EXCHANGE => {
                let expected = Operand::new_words(raw.src2, len)?;
                let new = raw.value;

                Self::atomic(AtomicOp::CompareExchange { expected, new }, raw)
            }
            _ => Err(EINVAL),
        }
    }

    /// The first address after all operands.
    pub(crate) fn end(&self) -> usize {
        match self {
            Self::Fill { dst, .. } => dst.end(),
            Self::Copy { dst, src } | Self::Reduce { dst, src, .. } => dst.end().max(src.end()),
            Self::Combine { dst, src, src2, .. } => dst.end().max(src.end()).max(src2.end()),
            Self::Atomic { op, dst, target } => {
                let end = dst.end().max(target.end());
                match op {
                    AtomicOp::FetchAdd(_) => end,
                    AtomicOp::CompareExchange { expected, .. } => end.max(expected.end()),
                }
            }
        }
    }

    fn combine(
        how: Combine,
        raw: &RawCommand,
        operand: impl Fn(u64) -> Result<Operand>,
    ) -> Result<Self> {
        let dst = operand(raw.dst)?;
        let src = operand(raw.src)?;
        let src2 = operand(raw.src2)?;

        if dst.overlaps_in_part(&src) || dst.overlaps_in_part(&src2) {
            return Err(EINVAL);
        }
        Ok(Self::Combine {
            how,
            dst,
            src,
            src2,
        })
    }

    fn reduce(how: Reduce, dst: u64, src: Operand) -> Result<Self> {
        let dst = Operand::new_words(dst, how.result_len())?;

        Ok(Self::Reduce { how, dst, src })
    }

    fn atomic(op: AtomicOp, raw: &RawCommand) -> Result<Self> {
        let dst = Operand::new_words(raw.dst, WORD)?;
        let target = Operand::new_words(raw.src, WORD)?;

        if raw.length != WORD as u64 || dst.overlaps(&target) {
            return Err(EINVAL);
        }
        Ok(Self::Atomic { op, dst, target })
    }
}

#[cfg(CONFIG_DUMMY_GPU_KUNIT_TEST)]
#[kunit_tests(dummy_gpu_command)]
mod tests {
    use super::*;

    /// The operands of a good command, far from each other.
    const DST: u64 = 0x10000;
    const SRC: u64 = 0x20000;
    const SRC2: u64 = 0x30000;
    const LEN: u64 = 0x1008;

    /// A good command for each opcode.
    fn good(opcode: u64) -> RawCommand {
        RawCommand {
            opcode,
            dst: DST,
            src: if opcode == FILL { 0 } else { SRC },
            src2: if matches!(opcode, ADD | XOR) { SRC2 } else { 0 },
            length: LEN,
            ..Default::default()
        }
    }

    const ALL: [u64; 7] = [FILL, COPY, ADD, XOR, SUM, CRC32, HISTOGRAM];

    /// Whether the good command for `opcode` is rejected after `change`.
    fn rejected(opcode: u64, change: impl FnOnce(&mut RawCommand)) -> bool {
        let mut raw = good(opcode);
        change(&mut raw);
        Command::new(&raw) == Err(EINVAL)
    }

    #[test]
    fn each_opcode_has_its_operands() -> Result {
        let dst = Operand::new(DST, LEN as usize)?;
        let src = Operand::new(SRC, LEN as usize)?;
        let src2 = Operand::new(SRC2, LEN as usize)?;
        let word = Operand::new(DST, 8)?;
        let bins = Operand::new(DST, 2048)?;

        assert!(Command::new(&good(FILL)) == Ok(Command::Fill { dst, byte: 0 }));
        assert!(Command::new(&good(COPY)) == Ok(Command::Copy { dst, src }));
        for (opcode, how) in [(ADD, Combine::Add), (XOR, Combine::Xor)] {
            let command = Command::Combine {
                how,
                dst,
                src,
                src2,
            };
            assert!(Command::new(&good(opcode)) == Ok(command));
        }
        for (opcode, how, dst) in [
            (SUM, Reduce::Sum, word),
            (CRC32, Reduce::Crc32, word),
            (HISTOGRAM, Reduce::Histogram, bins),
        ] {
            assert!(Command::new(&good(opcode)) == Ok(Command::Reduce { how, dst, src }));
        }
        Ok(())
    }

    #[test]
    fn an_unknown_opcode_is_rejected() {
        for opcode in [0, 99, 1 << 32 | FILL, u64::MAX] {
            assert!(rejected(FILL, |raw| raw.opcode = opcode));
        }
    }

    #[test]
    fn flags_and_reserved_must_be_zero() {
        for opcode in ALL {
            assert!(rejected(opcode, |raw| raw.flags = 1));
            assert!(rejected(opcode, |raw| raw.reserved = 1 << 63));
        }
    }

    #[test]
    fn a_field_that_the_opcode_does_not_use_must_be_zero() {
        for opcode in ALL {
            if opcode != FILL {
                assert!(rejected(opcode, |raw| raw.value = 1));
            }
            if !matches!(opcode, ADD | XOR) {
                assert!(rejected(opcode, |raw| raw.src2 = SRC2));
            }
        }
        assert!(rejected(FILL, |raw| raw.src = SRC));
    }

    #[test]
    fn a_length_must_be_in_range() {
        for opcode in ALL {
            assert!(rejected(opcode, |raw| raw.length = 0));
            assert!(rejected(opcode, |raw| raw.length = MAX_LENGTH + 8));
            assert!(rejected(opcode, |raw| raw.length = u64::MAX - 7));
        }
        #[cfg(CONFIG_64BIT)]
        assert!(!rejected(FILL, |raw| raw.length = MAX_LENGTH));
    }

    #[test]
    fn an_operand_must_not_wrap() {
        let top = usize::MAX as u64 & !7;

        for opcode in ALL {
            assert!(rejected(opcode, |raw| raw.dst = top));
            if opcode != FILL {
                assert!(rejected(opcode, |raw| raw.src = top));
            }
        }
        assert!(rejected(ADD, |raw| raw.src2 = top));
        assert!(rejected(XOR, |raw| raw.src2 = top));
    }

    #[test]
    fn fill_takes_a_byte() {
        assert!(!rejected(FILL, |raw| raw.value = 0xff));
        assert!(rejected(FILL, |raw| raw.value = 0x100));
    }

    #[test]
    fn bytes_need_no_alignment() {
        for opcode in [FILL, COPY, XOR] {
            assert!(!rejected(opcode, |raw| raw.dst += 1));
        }
        for opcode in [COPY, XOR, CRC32, HISTOGRAM] {
            assert!(!rejected(opcode, |raw| raw.src += 1));
        }
        assert!(!rejected(XOR, |raw| raw.src2 += 1));
        for opcode in [FILL, COPY, XOR, CRC32, HISTOGRAM] {
            assert!(!rejected(opcode, |raw| raw.length += 1));
        }
    }

    #[test]
    fn words_and_results_must_be_aligned() {
        for opcode in [ADD, SUM] {
            assert!(rejected(opcode, |raw| raw.src += 4));
            assert!(rejected(opcode, |raw| raw.length += 4));
        }
        assert!(rejected(ADD, |raw| raw.src2 += 1));
        for opcode in [ADD, SUM, CRC32, HISTOGRAM] {
            assert!(rejected(opcode, |raw| raw.dst += 4));
        }
    }

    #[test]
    fn copy_must_not_overlap() {
        assert!(rejected(COPY, |raw| raw.dst = SRC));
        assert!(rejected(COPY, |raw| raw.dst = SRC - LEN + 1));
        assert!(rejected(COPY, |raw| raw.dst = SRC + LEN - 1));
        assert!(!rejected(COPY, |raw| raw.dst = SRC - LEN));
        assert!(!rejected(COPY, |raw| raw.dst = SRC + LEN));
    }

    #[test]
    fn combine_may_be_in_place_but_not_overlap_in_part() {
        for opcode in [ADD, XOR] {
            assert!(!rejected(opcode, |raw| raw.dst = SRC));
            assert!(!rejected(opcode, |raw| raw.dst = SRC2));
            assert!(!rejected(opcode, |raw| raw.src2 = SRC));
            assert!(!rejected(opcode, |raw| raw.src2 = SRC + 8));
            for near in [SRC - 8, SRC + 8, SRC2 - 8, SRC2 + 8] {
                assert!(rejected(opcode, |raw| raw.dst = near));
            }
        }
    }

    #[test]
    fn the_end_is_that_of_the_last_operand() -> Result {
        for opcode in ALL {
            let raw = good(opcode);
            let end = match opcode {
                FILL => DST + LEN,
                ADD | XOR => SRC2 + LEN,
                _ => SRC + LEN,
            };
            assert_eq!(Command::new(&raw)?.end(), end as usize);

            // A result has its own length.
            let dst = SRC2 + LEN;
            let end = match opcode {
                SUM | CRC32 => dst + 8,
                HISTOGRAM => dst + 2048,
                _ => dst + LEN,
            };
            assert_eq!(
                Command::new(&RawCommand { dst, ..raw })?.end(),
                end as usize
            );
        }
        assert_eq!(
            Command::new(&RawCommand {
                src: SRC2 + LEN,
                ..good(ADD)
            })?
            .end(),
            (SRC2 + 2 * LEN) as usize
        );
        Ok(())
    }

    /// A good atomic command.
    fn good_atomic(opcode: u64) -> RawCommand {
        RawCommand {
            opcode,
            dst: DST,
            src: SRC,
            src2: if opcode == FETCH_ADD { 0 } else { SRC2 },
            length: WORD as u64,
            value: 5,
            ..Default::default()
        }
    }

    #[test]
    fn an_atomic_command_has_its_operands() -> Result {
        let (dst, target) = (Operand::new(DST, WORD)?, Operand::new(SRC, WORD)?);
        let expected = Operand::new(SRC2, WORD)?;
        let ops = [
            (FETCH_ADD, AtomicOp::FetchAdd(5), SRC + 8),
            (
                COMPARE_EXCHANGE,
                AtomicOp::CompareExchange { expected, new: 5 },
                SRC2 + 8,
            ),
        ];
        for (opcode, op, end) in ops {
            let command = Command::new(&good_atomic(opcode))?;
            assert!(command == Command::Atomic { op, dst, target });
            assert_eq!(command.end(), end as usize);
        }
        // The expected value may be replaced by the old one, as that of C's function is.
        let in_place = RawCommand {
            dst: SRC2,
            ..good_atomic(COMPARE_EXCHANGE)
        };
        assert!(Command::new(&in_place).is_ok());
        Ok(())
    }

    #[test]
    fn an_atomic_command_is_on_one_aligned_word() {
        let changes: [fn(&mut RawCommand); 10] = [
            |raw| raw.length = 16,
            |raw| raw.length = 4,
            |raw| raw.length = 0,
            |raw| raw.src += 4,
            |raw| raw.dst += 1,
            |raw| raw.dst = SRC,
            |raw| raw.src = usize::MAX as u64 & !7,
            |raw| raw.dst = usize::MAX as u64 & !7,
            |raw| raw.flags = 1,
            // Not a field of FETCH_ADD, and not aligned for COMPARE_EXCHANGE.
            |raw| raw.src2 += 2,
        ];
        for opcode in [FETCH_ADD, COMPARE_EXCHANGE] {
            for change in changes {
                let mut raw = good_atomic(opcode);
                change(&mut raw);
                assert!(Command::new(&raw) == Err(EINVAL));
            }
        }
    }

    #[test]
    fn a_result_may_lie_in_the_source() {
        for opcode in [SUM, CRC32, HISTOGRAM] {
            assert!(!rejected(opcode, |raw| raw.dst = SRC + 8));
        }
    }
}
