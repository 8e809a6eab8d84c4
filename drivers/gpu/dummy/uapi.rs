// SPDX-License-Identifier: GPL-2.0

//! The ioctls: check the arguments from user space, call the layers below, and write back the
//! results.
//!
//! Only this file and `dmirror.rs` access user memory through the mapping of the process. Only this
//! file knows the layout of the structures in the uAPI header. All fields of these structures are
//! `__u64`. So the structures are read and written as arrays of words, and the index of a word
//! comes from the offset of the field.
//!
//! C header: [`include/uapi/linux/dummy_gpu.h`](srctree/include/uapi/linux/dummy_gpu.h)

use super::{
    command::{
        Command,
        RawCommand,
        MAX_LENGTH, //
    },
    counters::COUNTERS,
    job::{
        self,
        Outcome, //
    },
    mmu::TABLE_SIZE,
    policy::Policy,
    queue::{
        FileQueue,
        NoOutcome, //
    },
    svm::{
        Location,
        Svm, //
    }, //
};
use core::mem::offset_of;
use hmm::PageRange;
use kernel::{
    ioctl::_IO,
    page::PAGE_SIZE,
    prelude::*,
    sync::Arc,
    time::Delta,
    uaccess::UserSlice,
    uapi, //
};

const INFO: u32 = _IO(uapi::DUMMY_GPU_IOC_TYPE, uapi::DUMMY_GPU_CMD_INFO);
const SUBMIT: u32 = _IO(uapi::DUMMY_GPU_IOC_TYPE, uapi::DUMMY_GPU_CMD_SUBMIT);
const STATS: u32 = _IO(uapi::DUMMY_GPU_IOC_TYPE, uapi::DUMMY_GPU_CMD_STATS);
const PREFETCH: u32 = _IO(uapi::DUMMY_GPU_IOC_TYPE, uapi::DUMMY_GPU_CMD_PREFETCH);
const WAIT: u32 = _IO(uapi::DUMMY_GPU_IOC_TYPE, uapi::DUMMY_GPU_CMD_WAIT);
const ADVISE: u32 = _IO(uapi::DUMMY_GPU_IOC_TYPE, uapi::DUMMY_GPU_CMD_ADVISE);

const LOCATION_SYSTEM: u64 = uapi::dummy_gpu_location_DUMMY_GPU_LOCATION_SYSTEM as u64;
const LOCATION_DEVICE: u64 = uapi::dummy_gpu_location_DUMMY_GPU_LOCATION_DEVICE as u64;

const POLICY_DEVICE: u64 = uapi::dummy_gpu_policy_DUMMY_GPU_POLICY_DEVICE as u64;
const POLICY_SYSTEM: u64 = uapi::dummy_gpu_policy_DUMMY_GPU_POLICY_SYSTEM as u64;
const POLICY_NONE: u64 = uapi::dummy_gpu_policy_DUMMY_GPU_POLICY_NONE as u64;

const SUBMIT_ASYNC: u64 = uapi::DUMMY_GPU_SUBMIT_ASYNC as u64;

/// The maximum number of commands in one submission.
const MAX_COMMANDS: u64 = 1024;

/// The maximum size of a structure of any version, in bytes.
const MAX_SIZE: u64 = 4096;

const WORD: usize = size_of::<u64>();

/// The number of words in a structure.
macro_rules! words {
    ($type:ident) => {
        size_of::<uapi::$type>() / WORD
    };
}

/// The index of the word of a field in its structure.
macro_rules! word {
    ($type:ident . $field:ident) => {{
        static_assert!(offset_of!(uapi::$type, $field) % WORD == 0);
        offset_of!(uapi::$type, $field) / WORD
    }};
}

/// The index of the first counter. The counters are the last fields, in the order of `Counter`.
const FIRST_COUNTER: usize = word!(dummy_gpu_stats.commands);
static_assert!(FIRST_COUNTER + COUNTERS == words!(dummy_gpu_stats));
static_assert!(word!(dummy_gpu_stats.device_pages) + 1 == words!(dummy_gpu_stats));

/// A structure in user space, which may be larger than the `N` words that this kernel knows.
struct Extensible<const N: usize> {
    at: UserPtr,
    size: usize,
}

impl<const N: usize> Extensible<N> {
    /// Checks `size`, in bytes.
    ///
    /// # Errors
    ///
    /// [`EINVAL`] if it is smaller than the first version of the structure or not a multiple of 8,
    /// [`E2BIG`] if it is larger than [`MAX_SIZE`].
    fn check_size(size: u64) -> Result<usize> {
        if size > MAX_SIZE {
            return Err(E2BIG);
        }
        let size = size as usize;
        if size < N * WORD || size % WORD != 0 {
            return Err(EINVAL);
        }
        Ok(size)
    }

    /// Reads the size of the structure at `at` from its first word.
    ///
    /// # Errors
    ///
    /// As for [`Extensible::check_size`], and [`EFAULT`].
    fn new(at: UserPtr) -> Result<Self> {
        let size = Self::check_size(UserSlice::new(at, WORD).reader().read()?)?;

        Ok(Self { at, size })
    }

    /// Reads the words that this kernel knows.
    ///
    /// # Errors
    ///
    /// [`EFAULT`], or [`E2BIG`] if any of the other words is not zero.
    fn read(&self) -> Result<[u64; N]> {
        let mut reader = UserSlice::new(self.at, self.size).reader();
        let known = reader.read()?;

        while !reader.is_empty() {
            if reader.read::<u64>()? != 0 {
                return Err(E2BIG);
            }
        }
        Ok(known)
    }

    /// Writes `words` to the structure, starting at the word with index `first`.
    ///
    /// # Errors
    ///
    /// [`EFAULT`].
    fn write<const M: usize>(&self, first: usize, words: &[u64; M]) -> Result {
        let at = self.at.wrapping_byte_add(first * WORD);

        UserSlice::new(at, M * WORD).writer().write(words)
    }
}

/// What an ioctl is for: an open file, and the address space that it is bound to.
pub(crate) struct Client {
    pub(crate) svm: Arc<Svm>,
    pub(crate) queue: Arc<FileQueue>,
}

/// Handles an ioctl. The second argument is the address of the structure.
///
/// # Context
///
/// The current task runs in the address space of the client.
///
/// # Errors
///
/// Those that the uAPI header lists for the ioctl.
pub(crate) type Handler = fn(&Client, UserPtr) -> Result;

/// Returns the handler of an ioctl.
///
/// # Errors
///
/// [`ENOTTY`] if the ioctl is unknown.
pub(crate) fn handler(cmd: u32) -> Result<Handler> {
    match cmd {
        INFO => Ok(info),
        SUBMIT => Ok(submit),
        STATS => Ok(stats),
        PREFETCH => Ok(prefetch),
        ADVISE => Ok(advise),
        WAIT => Ok(wait),
        _ => Err(ENOTTY),
    }
}

fn info(client: &Client, arg: UserPtr) -> Result {
    const WORDS: usize = words!(dummy_gpu_info);

    let user = Extensible::<WORDS>::new(arg)?;
    if user.read()?[word!(dummy_gpu_info.flags)] != 0 {
        return Err(EINVAL);
    }

    let mut info = [0; WORDS];
    info[word!(dummy_gpu_info.size)] = (WORDS * WORD) as u64;
    info[word!(dummy_gpu_info.page_size)] = PAGE_SIZE as u64;
    info[word!(dummy_gpu_info.window_size)] = TABLE_SIZE as u64;
    info[word!(dummy_gpu_info.max_commands)] = MAX_COMMANDS;
    info[word!(dummy_gpu_info.max_length)] = MAX_LENGTH;
    info[word!(dummy_gpu_info.vram_size)] = client.svm.vram_size() as u64;
    user.write(0, &info)
}

fn stats(client: &Client, arg: UserPtr) -> Result {
    const WORDS: usize = words!(dummy_gpu_stats);

    let user = Extensible::<WORDS>::new(arg)?;
    if user.read()?[word!(dummy_gpu_stats.flags)] != 0 {
        return Err(EINVAL);
    }

    let mut stats = [0; WORDS];
    stats[word!(dummy_gpu_stats.size)] = (WORDS * WORD) as u64;
    for (word, counter) in stats
        .iter_mut()
        .skip(FIRST_COUNTER)
        .zip(client.svm.stats().counters().read())
    {
        *word = counter;
    }
    user.write(0, &stats)
}

fn submit(client: &Client, arg: UserPtr) -> Result {
    const WORDS: usize = words!(dummy_gpu_submit);
    const OUTPUT: usize = word!(dummy_gpu_submit.completed);
    static_assert!(word!(dummy_gpu_submit.fault_address) == OUTPUT + 1);
    static_assert!(word!(dummy_gpu_submit.sequence) == OUTPUT + 2);

    let user = Extensible::<WORDS>::new(arg)?;
    let submit = user.read()?;
    let flags = submit[word!(dummy_gpu_submit.flags)];
    if flags & !SUBMIT_ASYNC != 0 {
        return Err(EINVAL);
    }
    // Fail before anything runs if the outcome cannot be written back.
    user.write(word!(dummy_gpu_submit.size), &[(WORDS * WORD) as u64])?;
    user.write(OUTPUT, &[0, 0, 0])?;

    let svm = &client.svm;
    let commands = commands(
        svm,
        submit[word!(dummy_gpu_submit.commands)],
        submit[word!(dummy_gpu_submit.count)],
        submit[word!(dummy_gpu_submit.command_size)],
    )?;
    if flags & SUBMIT_ASYNC != 0 {
        let sequence = client.queue.submit(svm.clone(), commands)?;
        return user.write(word!(dummy_gpu_submit.sequence), &[sequence]);
    }
    report(&user, OUTPUT, job::run(svm.clone(), commands)?)
}

/// Writes `outcome` to the structure, starting at the word with index `first`, and returns the
/// result of the submission.
fn report<const N: usize>(user: &Extensible<N>, first: usize, outcome: Outcome) -> Result {
    let fault_address = outcome.fault_address.unwrap_or(0);
    let told = user.write(first, &[outcome.completed as u64, fault_address as u64]);

    outcome.result.and(told)
}

fn wait(client: &Client, arg: UserPtr) -> Result {
    const WORDS: usize = words!(dummy_gpu_wait);
    const OUTPUT: usize = word!(dummy_gpu_wait.completed);
    static_assert!(word!(dummy_gpu_wait.fault_address) == OUTPUT + 1);
    static_assert!(word!(dummy_gpu_wait.ended) == OUTPUT + 2);

    let user = Extensible::<WORDS>::new(arg)?;
    let wait = user.read()?;
    if wait[word!(dummy_gpu_wait.flags)] != 0 {
        return Err(EINVAL);
    }
    user.write(word!(dummy_gpu_wait.size), &[(WORDS * WORD) as u64])?;
    user.write(OUTPUT, &[0, 0, 0])?;

    let timeout = i64::try_from(wait[word!(dummy_gpu_wait.timeout)]).unwrap_or(i64::MAX);
    let sequence = wait[word!(dummy_gpu_wait.sequence)];
    match client.queue.wait(sequence, Delta::from_nanos(timeout)) {
        Ok(outcome) => {
            let told = user.write(word!(dummy_gpu_wait.ended), &[1]);
            report(&user, OUTPUT, outcome).and(told)
        }
        Err(NoOutcome { error, left }) => {
            // The wait may be started again after a signal.
            let left = left.as_nanos().max(0) as u64;
            user.write(word!(dummy_gpu_wait.timeout), &[left])?;
            Err(error)
        }
    }
}

/// Checks the range of pages of an ioctl. `length` and `max_length` are in bytes.
///
/// # Errors
///
/// [`EINVAL`] if the range is empty, too long, not aligned or wraps; [`EFAULT`] if it reaches
/// beyond the user address space.
fn page_range(svm: &Svm, start: u64, length: u64, max_length: u64) -> Result<PageRange> {
    if length > max_length {
        return Err(EINVAL);
    }
    let start = usize::try_from(start).map_err(|_| EFAULT)?;
    let length = usize::try_from(length).map_err(|_| EFAULT)?;
    let range = PageRange::from_len(start, length)?;
    if range.end() > svm.end() {
        return Err(EFAULT);
    }
    Ok(range)
}

fn prefetch(client: &Client, arg: UserPtr) -> Result {
    const WORDS: usize = words!(dummy_gpu_prefetch);
    const OUTPUT: usize = word!(dummy_gpu_prefetch.done);
    static_assert!(word!(dummy_gpu_prefetch.pages) == OUTPUT + 1);

    let user = Extensible::<WORDS>::new(arg)?;
    let prefetch = user.read()?;
    if prefetch[word!(dummy_gpu_prefetch.flags)] != 0 {
        return Err(EINVAL);
    }
    user.write(word!(dummy_gpu_prefetch.size), &[(WORDS * WORD) as u64])?;
    user.write(OUTPUT, &[0, 0])?;

    let svm = &client.svm;
    let range = page_range(
        svm,
        prefetch[word!(dummy_gpu_prefetch.start)],
        prefetch[word!(dummy_gpu_prefetch.length)],
        MAX_LENGTH,
    )?;
    let location = match prefetch[word!(dummy_gpu_prefetch.location)] {
        LOCATION_SYSTEM => Location::System,
        LOCATION_DEVICE => Location::Device,
        _ => return Err(EINVAL),
    };
    let prefetched = svm.prefetch(range, location)?;
    let told = user.write(OUTPUT, &[prefetched.done as u64, prefetched.pages as u64]);

    prefetched.result.and(told)
}

fn advise(client: &Client, arg: UserPtr) -> Result {
    const WORDS: usize = words!(dummy_gpu_advise);

    let user = Extensible::<WORDS>::new(arg)?;
    let advise = user.read()?;
    if advise[word!(dummy_gpu_advise.flags)] != 0 {
        return Err(EINVAL);
    }
    let svm = &client.svm;
    let range = page_range(
        svm,
        advise[word!(dummy_gpu_advise.start)],
        advise[word!(dummy_gpu_advise.length)],
        u64::MAX,
    )?;
    let policy = match advise[word!(dummy_gpu_advise.policy)] {
        POLICY_DEVICE => Policy::Device,
        POLICY_SYSTEM => Policy::System,
        POLICY_NONE => Policy::None,
        _ => return Err(EINVAL),
    };

    user.write(word!(dummy_gpu_advise.size), &[(WORDS * WORD) as u64])?;
    svm.advise(range, policy)
}

/// Reads and checks an array of commands to run on `svm`.
fn commands(svm: &Svm, at: u64, count: u64, command_size: u64) -> Result<KVVec<Command>> {
    const WORDS: usize = words!(dummy_gpu_command);

    if count == 0 || count > MAX_COMMANDS {
        return Err(EINVAL);
    }
    let size = Extensible::<WORDS>::check_size(command_size)?;
    let at = usize::try_from(at).map_err(|_| EFAULT)?;
    let mut commands = KVVec::with_capacity(count as usize, GFP_KERNEL_ACCOUNT)?;

    for index in 0..count as usize {
        let at = UserPtr::from_addr(at.wrapping_add(index * size));
        let words = Extensible::<WORDS> { at, size }.read()?;
        let command = Command::new(&RawCommand {
            opcode: words[word!(dummy_gpu_command.opcode)],
            flags: words[word!(dummy_gpu_command.flags)],
            dst: words[word!(dummy_gpu_command.dst)],
            src: words[word!(dummy_gpu_command.src)],
            src2: words[word!(dummy_gpu_command.src2)],
            length: words[word!(dummy_gpu_command.length)],
            value: words[word!(dummy_gpu_command.value)],
            reserved: words[word!(dummy_gpu_command.reserved)],
        })?;
        if command.end() > svm.end() {
            return Err(EFAULT);
        }

        commands.push(command, GFP_KERNEL_ACCOUNT)?;
    }
    Ok(commands)
}
