// SPDX-License-Identifier: GPL-2.0

//! Device nodes with the ioctls of the HMM test driver, `lib/test_hmm.c`.
//!
//! `tools/testing/selftests/mm/hmm-tests` is written for that driver. With these nodes its tests
//! run on the Rust crate `hmm`.
//!
//! `/dev/hmm_dmirror0` and 1 are second nodes of the first two instances, `/dev/hmm_dmirror2` and 3
//! of those with coherent memory. Like `uapi.rs` for the GPU's own node, this
//! file checks what user space passes, and accesses and migrates the memory of the process only
//! through [`Svm`]. It differs from the test driver as follows:
//!
//! - Only the process that opened a node may use it.
//! - Migrated pages stay in the GPU's memory when the node is closed.
//! - A migration moves nothing if a snapshot shows that a part of the range cannot be read.
//! - The flag to fail an allocation has no effect on a huge page that migrates to coherent memory,
//!   where there are no huge pages: its pages always migrate one by one.
//!
//! As in the test driver, READ and WRITE do not migrate pages to or from the GPU's memory.
//!
//! C header: [`lib/test_hmm_uapi.h`](srctree/lib/test_hmm_uapi.h)

use super::{
    engine::Memory,
    gpu::{
        Gpu,
        OpenFile, //
    },
    mmu::{
        table_range,
        TABLE_SIZE, //
    },
    policy::Policy,
    retry_limit::RetryLimit,
    svm::{
        FaultBuffers,
        Location,
        Svm, //
    }, //
};
use core::mem::offset_of;
use hmm::{
    Access,
    DevicePage,
    Entry,
    Miss,
    PageRange,
    RamPage,
    ReadPage,
    WritePage, //
};
use kernel::{
    fs::File,
    ioctl::_IOWR,
    miscdevice::{
        MiscDevice,
        MiscDeviceOptions,
        MiscDeviceRegistration, //
    },
    mm::virt::VmaNew,
    page::{
        Page,
        PAGE_SHIFT,
        PAGE_SIZE, //
    },
    prelude::*,
    sizes::{
        SZ_1G,
        SZ_2M, //
    },
    sync::Arc,
    time::Instant,
    uaccess::UserSlice,
    uapi, //
};

const fn command(number: u32) -> u32 {
    _IOWR::<uapi::hmm_dmirror_cmd>(b'H' as u32, number)
}

const READ: u32 = command(0);
const WRITE: u32 = command(1);
const MIGRATE_TO_DEV: u32 = command(2);
const MIGRATE_TO_SYS: u32 = command(3);
const SNAPSHOT: u32 = command(4);
const EXCLUSIVE: u32 = command(5);
const CHECK_EXCLUSIVE: u32 = command(6);
const RELEASE: u32 = command(7);
const FLAGS: u32 = command(8);
const READ_UNLOCKED: u32 = command(9);

/// `HMM_DMIRROR_FLAG_FAIL_ALLOC`, for which bindgen generates no constant.
const FLAG_FAIL_ALLOC: u64 = 1 << 0;

const PROT_ERROR: u8 = uapi::HMM_DMIRROR_PROT_ERROR as u8;
const PROT_NONE: u8 = uapi::HMM_DMIRROR_PROT_NONE as u8;
const PROT_READ: u8 = uapi::HMM_DMIRROR_PROT_READ as u8;
const PROT_WRITE: u8 = uapi::HMM_DMIRROR_PROT_WRITE as u8;
const PROT_PMD: u8 = uapi::HMM_DMIRROR_PROT_PMD as u8;
const PROT_ZERO: u8 = uapi::HMM_DMIRROR_PROT_ZERO as u8;
const PROT_LOCAL: u8 = uapi::HMM_DMIRROR_PROT_DEV_PRIVATE_LOCAL as u8;
const PROT_COHERENT_LOCAL: u8 = uapi::HMM_DMIRROR_PROT_DEV_COHERENT_LOCAL as u8;
const PROT_COHERENT_REMOTE: u8 = uapi::HMM_DMIRROR_PROT_DEV_COHERENT_REMOTE as u8;

/// The order of the 2 MiB that a PMD maps, where there are PMD mappings.
const PMD_ORDER: u32 = SZ_2M.trailing_zeros() - PAGE_SHIFT as u32;

const WORD: usize = size_of::<u64>();
const WORDS: usize = size_of::<uapi::hmm_dmirror_cmd>() / WORD;

/// The index of a field in `struct hmm_dmirror_cmd`, whose fields are all 64-bit words.
macro_rules! word {
    ($field:ident) => {
        offset_of!(uapi::hmm_dmirror_cmd, $field) / WORD
    };
}

/// The maximum number of bytes that one command copies, and of one mapping of a node.
const MAX_BYTES: usize = SZ_1G;

/// The `hmm_dmirror` node of an instance.
#[pin_data]
pub(crate) struct Node {
    #[pin]
    _node: MiscDeviceRegistration<Dmirror>,
}

impl Node {
    /// Registers the node.
    ///
    /// # Errors
    ///
    /// Those of `misc_register()`.
    pub(crate) fn new(name: &'static CStr, gpu: Arc<Gpu>) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            _node <- MiscDeviceRegistration::register(MiscDeviceOptions { name }, gpu),
        })
    }
}

/// The `hmm_dmirror` nodes of the first two instances.
#[pin_data]
pub(crate) struct Nodes {
    #[pin]
    _node0: Node,
    #[pin]
    _node1: Node,
}

impl Nodes {
    /// Registers the nodes.
    ///
    /// # Errors
    ///
    /// Those of `misc_register()`.
    pub(crate) fn new(gpu0: Arc<Gpu>, gpu1: Arc<Gpu>) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            _node0 <- Node::new(c"hmm_dmirror0", gpu0),
            _node1 <- Node::new(c"hmm_dmirror1", gpu1),
        })
    }
}

/// An open file of a node.
struct Dmirror(Pin<KBox<OpenFile>>);

#[vtable]
impl MiscDevice for Dmirror {
    type Ptr = KBox<Self>;
    type RegistrationData = Arc<Gpu>;

    fn open(_file: &File, misc: &MiscDeviceRegistration<Self>) -> Result<Self::Ptr> {
        let file = OpenFile::new(&misc.data(), Policy::None)?;

        Ok(KBox::new(Self(file), GFP_KERNEL_ACCOUNT)?)
    }

    fn ioctl(this: &Self, _file: &File, cmd: u32, arg: usize) -> Result<isize> {
        ioctl(&*this.0.svm()?, cmd, arg)
    }

    fn mmap(_this: &Self, _file: &File, vma: &VmaNew) -> Result {
        if vma.end() - vma.start() > MAX_BYTES {
            return Err(EINVAL);
        }
        let mixed = vma.set_mixedmap();
        for va in (vma.start()..vma.end()).step_by(PAGE_SIZE) {
            if current!().fatal_signal_pending() {
                return Err(EINTR);
            }
            mixed.vm_insert_page(va, &Page::alloc_page(GFP_KERNEL_ACCOUNT | __GFP_ZERO)?)?;
        }
        Ok(())
    }
}

/// The outcome of a command, for its output fields.
#[derive(Default)]
struct Done {
    /// `cpages`: the number of pages that were accessed, migrated or looked at.
    pages: usize,
    /// `faults`: how often the command stopped to fault pages.
    faults: u64,
}

/// Handles an ioctl on a node whose file is bound to `svm`. The current task runs in that address
/// space.
///
/// # Errors
///
/// - [`EPERM`] if the process may not write the memory, or if `CHECK_EXCLUSIVE` finds a page that
///   is still exclusive to the GPU.
/// - [`EFAULT`] if user memory cannot be accessed, or the range has no memory that may be read.
/// - [`EINVAL`] if the command or a flag is unknown; if the range is empty, not aligned or wraps;
///   for a migration, if a part of the range is no memory that may be read.
/// - [`ENOENT`] if a page is not in the GPU's memory after it was to migrate there, or is not
///   exclusive any more after it was made exclusive.
/// - [`EOPNOTSUPP`] if a page cannot be made exclusive.
/// - [`ENODEV`] if the GPU has no memory.
/// - [`EINTR`] on a signal.
/// - [`EBUSY`] if invalidations kept taking the pages away, or if `RELEASE` could not evict all
///   pages.
/// - [`ENOMEM`].
fn ioctl(svm: &Svm, cmd: u32, arg: usize) -> Result<isize> {
    let user = UserSlice::new(UserPtr::from_addr(arg), WORDS * WORD);
    let (mut reader, mut writer) = user.reader_writer();
    let mut words: [u64; WORDS] = reader.read()?;

    let range = range(words[word!(addr)], words[word!(npages)])?;
    let ptr = usize::try_from(words[word!(ptr)]).map_err(|_| EFAULT)?;
    let on_memory = |run: fn(&Svm, PageRange, UserPtr) -> Result<Done>| {
        if range.end() > svm.end() {
            return Err(EFAULT);
        }
        run(svm, range, UserPtr::from_addr(ptr))
    };
    let done = match cmd {
        READ | READ_UNLOCKED => on_memory(read),
        WRITE => on_memory(write),
        MIGRATE_TO_DEV => on_memory(migrate_to_device),
        MIGRATE_TO_SYS => on_memory(migrate_to_system),
        SNAPSHOT => on_memory(snapshot),
        EXCLUSIVE => on_memory(exclusive),
        CHECK_EXCLUSIVE if svm.any_exclusive(range) => Err(EPERM),
        CHECK_EXCLUSIVE => Ok(Done::default()),
        RELEASE => svm.evict().map(|()| Done::default()),
        FLAGS => flags(svm, words[word!(npages)]),
        _ => Err(EINVAL),
    }?;

    words[word!(cpages)] = done.pages as u64;
    words[word!(faults)] = done.faults;
    writer.write(&words)?;
    Ok(0)
}

/// The range of a command.
fn range(addr: u64, npages: u64) -> Result<PageRange> {
    let start = usize::try_from(addr).map_err(|_| EINVAL)?;
    let pages = usize::try_from(npages).map_err(|_| EINVAL)?;

    PageRange::from_len(start, pages.checked_mul(PAGE_SIZE).ok_or(EINVAL)?)
}

/// Fails with [`ENOMEM`] if one command cannot copy the bytes of `range`.
fn check_size(range: PageRange) -> Result {
    match range.len() {
        0..=MAX_BYTES => Ok(()),
        _ => Err(ENOMEM),
    }
}

/// Iterates over the pages of `range` for which there are `bytes`: the address of each, and its
/// part of them.
fn pages(range: PageRange, bytes: &mut [u8]) -> impl Iterator<Item = (usize, &mut [u8])> {
    (range.start()..range.end())
        .step_by(PAGE_SIZE)
        .zip(bytes.chunks_exact_mut(PAGE_SIZE))
}

/// Calls `access_page` for the pages of `range` for which there are `bytes`. If it misses, faults
/// the rest of the range for `access` and calls it again for the same page.
fn access(
    svm: &Svm,
    range: PageRange,
    bytes: &mut [u8],
    access: Access,
    bufs: &mut FaultBuffers,
    access_page: impl Fn(usize, &mut [u8]) -> Result<(), Miss>,
) -> Result<Done> {
    let mut retry_limit = RetryLimit::new(Instant::now());
    let mut done = Done::default();

    for (va, page) in pages(range, bytes) {
        while access_page(va, page).is_err() {
            let next = PageRange::new(va, range.end())?;
            retry_limit.service(done.pages as u64, || svm.fault_in(next, access, bufs))?;
            done.faults += 1;
        }
        done.pages += 1;
    }
    Ok(done)
}

/// Copies the bytes of `range` to user memory, up to 2 MiB at a time. Calls `read` with what is
/// left of the range, and a buffer for its first bytes.
fn copy_out(
    range: PageRange,
    ptr: UserPtr,
    mut read: impl FnMut(PageRange, &mut [u8]) -> Result<Done>,
) -> Result<Done> {
    let mut bytes = KVVec::from_elem(0, range.len().min(TABLE_SIZE), GFP_KERNEL_ACCOUNT)?;
    let mut writer = UserSlice::new(ptr, range.len()).writer();
    let mut total = Done::default();
    let mut va = range.start();

    while va < range.end() {
        let end = range.end().min(table_range(va)?.end());
        let bytes = &mut bytes[..end - va];
        let done = read(PageRange::new(va, range.end())?, bytes)?;
        writer.write_slice(bytes)?;
        total.pages += done.pages;
        total.faults += done.faults;
        va = end;
    }
    Ok(total)
}

fn read(svm: &Svm, range: PageRange, ptr: UserPtr) -> Result<Done> {
    check_size(range)?;
    let mut bufs = FaultBuffers::new()?;

    copy_out(range, ptr, |rest, bytes| {
        access(svm, rest, bytes, Access::Read, &mut bufs, |va, page| {
            (&mut &*svm).read(va, page)
        })
    })
}

fn write(svm: &Svm, range: PageRange, ptr: UserPtr) -> Result<Done> {
    check_size(range)?;
    let mut bytes = KVVec::with_capacity(range.len(), GFP_KERNEL_ACCOUNT)?;
    let mut bufs = FaultBuffers::new()?;
    UserSlice::new(ptr, range.len()).read_all(&mut bytes, GFP_KERNEL_ACCOUNT)?;

    access(
        svm,
        range,
        &mut bytes,
        Access::Write,
        &mut bufs,
        |va, page| (&mut &*svm).write(va, page),
    )
}

/// Reads `range` through the GPU's page table, without faulting, and copies the bytes to user
/// memory. Fails with [`ENOENT`] if the GPU may not access a page of it.
fn read_back(svm: &Svm, range: PageRange, ptr: UserPtr) -> Result<Done> {
    copy_out(range, ptr, |rest, bytes| {
        svm.read_mapped(rest.start(), bytes)?;
        Ok(Done {
            pages: bytes.len() / PAGE_SIZE,
            faults: 0,
        })
    })
}

/// Takes snapshots of `range`, one window of up to 2 MiB at a time. Calls `f` for each window with
/// the `HMM_DMIRROR_PROT_*` value of each of its pages.
fn look(
    svm: &Svm,
    range: PageRange,
    bufs: &mut FaultBuffers,
    mut f: impl FnMut(&[u8]) -> Result,
) -> Result {
    const PAGES: usize = TABLE_SIZE / PAGE_SIZE;

    let local = match svm.has_coherent_memory() {
        true => PROT_COHERENT_LOCAL,
        false => PROT_LOCAL,
    };
    let mut seen = KVec::from_elem(PROT_ERROR, PAGES, GFP_KERNEL)?;
    let mut va = range.start();
    while va < range.end() {
        if current!().signal_pending() {
            return Err(EINTR);
        }
        // All of the block, so that a page of it can be part of a large one.
        let block = table_range(va)?;
        let end = range.end().min(block.end());
        let seen = &mut seen[..(end - va) / PAGE_SIZE];
        let result = svm.snapshot(block, bufs, |commit| {
            let entries = commit.entries().filter(|(at, _)| *at >= va);
            for ((_, entry), seen) in entries.zip(&mut *seen) {
                *seen = protection(&entry, local);
            }
        });
        match result {
            // Nothing is mapped in the window.
            Err(err) if err == EFAULT => seen.fill(PROT_ERROR),
            result => result?,
        }
        f(seen)?;
        va = end;
    }
    Ok(())
}

/// The `HMM_DMIRROR_PROT_*` value for an entry, with that of pages in the GPU's own memory.
fn protection(entry: &Entry<'_>, local: u8) -> u8 {
    let remote = |is_remote| match is_remote {
        true => PROT_COHERENT_REMOTE,
        false => 0,
    };
    let read = |page: &ReadPage<'_>| match page.is_zero() {
        true => PROT_READ | PROT_ZERO | pmd(page.order()),
        false => PROT_READ | pmd(page.order()) | remote(page.is_remote()),
    };
    let write = |page: &WritePage<'_>| PROT_WRITE | pmd(page.order()) | remote(page.is_remote());

    match entry {
        Entry::Hole => PROT_NONE,
        Entry::Ram(RamPage::Read(page)) => read(page),
        Entry::Ram(RamPage::Write(page)) => write(page),
        Entry::Device(DevicePage::Read(page)) => local | read(page),
        Entry::Device(DevicePage::Write(page)) => local | write(page),
        _ => PROT_ERROR,
    }
}

fn pmd(order: u32) -> u8 {
    match order {
        PMD_ORDER => PROT_PMD,
        _ => 0,
    }
}

fn snapshot(svm: &Svm, range: PageRange, ptr: UserPtr) -> Result<Done> {
    let mut bufs = FaultBuffers::new()?;
    let mut done = Done::default();

    look(svm, range, &mut bufs, |seen| {
        let at = ptr.wrapping_byte_add(done.pages);
        UserSlice::new(at, seen.len()).writer().write_slice(seen)?;
        done.pages += seen.len();
        Ok(())
    })?;
    Ok(done)
}

/// Fails with [`EINVAL`] unless the process may read all of `range`. A migration checks this before
/// it moves anything.
fn check_readable(svm: &Svm, range: PageRange, bufs: &mut FaultBuffers) -> Result {
    look(svm, range, bufs, |seen| match seen.contains(&PROT_ERROR) {
        true => Err(EINVAL),
        false => Ok(()),
    })
}

fn migrate_to_device(svm: &Svm, range: PageRange, ptr: UserPtr) -> Result<Done> {
    check_size(range)?;
    let mut bufs = FaultBuffers::new()?;

    check_readable(svm, range, &mut bufs)?;
    if svm.has_coherent_memory() && range.len() >= SZ_2M {
        // A huge page never finds a place in such memory, and its pages move one by one: that is
        // all that a request to fail its allocation is to bring about.
        svm.stats().fails();
    }
    svm.prefetch(range, Location::Device)?.result?;
    let mut va = range.start();
    while va < range.end() {
        va = svm.map_device_pages(PageRange::new(va, range.end())?, &mut bufs)?;
    }
    read_back(svm, range, ptr)
}

fn migrate_to_system(svm: &Svm, range: PageRange, _ptr: UserPtr) -> Result<Done> {
    let mut bufs = FaultBuffers::new()?;

    check_readable(svm, range, &mut bufs)?;
    let moved = svm.prefetch(range, Location::System)?;
    moved.result?;
    Ok(Done {
        pages: moved.pages,
        faults: 0,
    })
}

fn exclusive(svm: &Svm, range: PageRange, ptr: UserPtr) -> Result<Done> {
    check_size(range)?;
    let mut bufs = FaultBuffers::new()?;

    for va in (range.start()..range.end()).step_by(PAGE_SIZE) {
        svm.make_exclusive(va, &mut bufs)?;
    }
    read_back(svm, range, ptr)
}

fn flags(svm: &Svm, flags: u64) -> Result<Done> {
    if flags & !FLAG_FAIL_ALLOC != 0 {
        return Err(EINVAL);
    }
    // The flags are in `npages`, so they are not zero here: `ioctl()` has failed for an empty
    // range. A request cannot be cleared.
    svm.stats().fail_next();
    Ok(Done::default())
}
