// SPDX-License-Identifier: GPL-2.0

//! Nodes with the ioctls of the HMM test driver, `lib/test_hmm.c`: so that the tests that are
//! written for it test `hmm`, those that need neither coherent memory nor large folios.
//!
//! `/dev/hmm_dmirrorN` is another node of instance N. Reads and checks what user space passes, and
//! calls [`Svm`], as `uapi` does for the GPU's own node; there is no way into `hmm` but that. What
//! differs from the test driver: only the process that opened a node may use it; pages that have
//! migrated stay in the GPU's memory when the node is closed; nothing migrates of a range of which
//! a part cannot be read, as far as a look without a fault tells. As with the test driver, READ and
//! WRITE leave pages where they are.
//!
//! C header: [`lib/test_hmm_uapi.h`](srctree/lib/test_hmm_uapi.h)

use super::{
    engine::Memory,
    gpu::{
        Gpu,
        OpenFile, //
    },
    mmu::TABLE_SIZE,
    policy::Policy,
    svm::{
        Patience,
        Place,
        Svm,
        Window, //
    }, //
};
use core::mem::offset_of;
use hmm::{
    Access,
    Device,
    Entry,
    Miss,
    PageRange,
    Ram,
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

/// `HMM_DMIRROR_FLAG_FAIL_ALLOC`, which bindgen does not see.
const FLAG_FAIL_ALLOC: u64 = 1 << 0;

const PROT_ERROR: u8 = uapi::HMM_DMIRROR_PROT_ERROR as u8;
const PROT_NONE: u8 = uapi::HMM_DMIRROR_PROT_NONE as u8;
const PROT_READ: u8 = uapi::HMM_DMIRROR_PROT_READ as u8;
const PROT_WRITE: u8 = uapi::HMM_DMIRROR_PROT_WRITE as u8;
const PROT_PMD: u8 = uapi::HMM_DMIRROR_PROT_PMD as u8;
const PROT_ZERO: u8 = uapi::HMM_DMIRROR_PROT_ZERO as u8;
const PROT_LOCAL: u8 = uapi::HMM_DMIRROR_PROT_DEV_PRIVATE_LOCAL as u8;

/// The order of what a PMD maps, where there are such mappings.
const PMD_ORDER: u32 = SZ_2M.trailing_zeros() - PAGE_SHIFT as u32;

const WORD: usize = size_of::<u64>();
const WORDS: usize = size_of::<uapi::hmm_dmirror_cmd>() / WORD;

/// The index of the word that is a field of the structure.
macro_rules! word {
    ($field:ident) => {
        offset_of!(uapi::hmm_dmirror_cmd, $field) / WORD
    };
}

/// The most bytes of one command that copies them, and of a mapping of a node.
const MAX_BYTES: usize = SZ_1G;

/// The nodes of both instances.
#[pin_data]
pub(crate) struct Nodes {
    #[pin]
    _node0: MiscDeviceRegistration<Dmirror>,
    #[pin]
    _node1: MiscDeviceRegistration<Dmirror>,
}

impl Nodes {
    /// Registers them.
    ///
    /// # Errors
    ///
    /// Those of `misc_register()`.
    pub(crate) fn new(gpu0: Arc<Gpu>, gpu1: Arc<Gpu>) -> impl PinInit<Self, Error> {
        let node = |name, gpu| MiscDeviceRegistration::register(MiscDeviceOptions { name }, gpu);

        try_pin_init!(Self {
            _node0 <- node(c"hmm_dmirror0", gpu0),
            _node1 <- node(c"hmm_dmirror1", gpu1),
        })
    }
}

/// An open node.
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

/// What a command says of itself.
#[derive(Default)]
struct Done {
    /// The pages that it is about in the end.
    pages: usize,
    /// The rounds of GPU page faults.
    faults: u64,
}

/// Handles an ioctl on a node whose file is bound to `svm`, in which the current task runs.
///
/// # Errors
///
/// - [`EPERM`] for what the process may not write.
/// - [`EFAULT`] if user memory cannot be accessed, or there is none that may be read.
/// - [`EINVAL`] for a command or a flag that is not known, for a range that is empty, not aligned
///   or wraps, and, for one that migrates, if not all of it is memory that may be read.
/// - [`ENOENT`] if a page that was to migrate is not on the device, or if one that was to be
///   exclusive is not any more.
/// - [`EOPNOTSUPP`] if a page cannot be exclusive.
/// - [`ENODEV`] if the GPU has no memory.
/// - [`EINTR`] on a signal.
/// - [`EBUSY`] if the pages were taken away again and again.
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

/// Room for the bytes of `range`. Nothing is in it yet.
fn bounce(range: PageRange) -> Result<KVVec<u8>> {
    if range.len() > MAX_BYTES {
        return Err(ENOMEM);
    }
    Ok(KVVec::with_capacity(range.len(), GFP_KERNEL_ACCOUNT)?)
}

/// Each page of `range`, with the part of `bytes` that is its.
fn pages(range: PageRange, bytes: &mut [u8]) -> impl Iterator<Item = (usize, &mut [u8])> {
    (range.start()..range.end())
        .step_by(PAGE_SIZE)
        .zip(bytes.chunks_exact_mut(PAGE_SIZE))
}

/// Calls `access_page` for each page of `range` until it does not miss. Where it does, what follows
/// is faulted for `access`, which makes a round.
fn access(
    svm: &Svm,
    range: PageRange,
    bytes: &mut [u8],
    access: Access,
    access_page: impl Fn(usize, &mut [u8]) -> Result<(), Miss>,
) -> Result<Done> {
    let mut window = Window::new()?;
    let mut patience = Patience::new(Instant::now());
    let mut done = Done::default();

    for (va, page) in pages(range, bytes) {
        while access_page(va, page).is_err() {
            patience.fault(done.pages as u64, Instant::now())?;
            let next = PageRange::new(va, range.end())?;
            match svm.fault_in(next, access, &mut window) {
                // When that is final, patience says.
                Err(err) if err == EBUSY => {}
                result => result?,
            }
            done.faults += 1;
        }
        done.pages += 1;
    }
    Ok(done)
}

fn read(svm: &Svm, range: PageRange, ptr: UserPtr) -> Result<Done> {
    let mut bytes = bounce(range)?;
    bytes.resize(range.len(), 0, GFP_KERNEL_ACCOUNT)?;
    let done = access(svm, range, &mut bytes, Access::Read, |va, page| {
        (&mut &*svm).read(va, page)
    })?;

    UserSlice::new(ptr, bytes.len())
        .writer()
        .write_slice(&bytes)?;
    Ok(done)
}

fn write(svm: &Svm, range: PageRange, ptr: UserPtr) -> Result<Done> {
    let mut bytes = bounce(range)?;
    UserSlice::new(ptr, range.len()).read_all(&mut bytes, GFP_KERNEL_ACCOUNT)?;

    access(svm, range, &mut bytes, Access::Write, |va, page| {
        (&mut &*svm).write(va, page)
    })
}

/// Reads `range` as it is mapped for the GPU, and gives `bytes` to the user if all of it is.
fn read_back(svm: &Svm, range: PageRange, mut bytes: KVVec<u8>, ptr: UserPtr) -> Result<Done> {
    bytes.resize(range.len(), 0, GFP_KERNEL_ACCOUNT)?;
    for (va, page) in pages(range, &mut bytes) {
        (&mut &*svm).read(va, page).map_err(|_| ENOENT)?;
    }

    UserSlice::new(ptr, bytes.len())
        .writer()
        .write_slice(&bytes)?;
    Ok(Done {
        pages: range.len() / PAGE_SIZE,
        faults: 0,
    })
}

/// Looks at `range`, a window at a time: `f` gets the part that one is, and what there is at each
/// page of it, as the test driver tells it.
fn look(
    svm: &Svm,
    range: PageRange,
    window: &mut Window,
    mut f: impl FnMut(&[u8]) -> Result,
) -> Result {
    const PAGES: usize = TABLE_SIZE / PAGE_SIZE;

    let mut seen = KVec::from_elem(PROT_ERROR, PAGES, GFP_KERNEL)?;
    let mut va = range.start();
    while va < range.end() {
        if current!().signal_pending() {
            return Err(EINTR);
        }
        let end = range.end().min((va / TABLE_SIZE + 1) * TABLE_SIZE);
        let seen = &mut seen[..(end - va) / PAGE_SIZE];
        let result = svm.snapshot(PageRange::new(va, end)?, window, |commit| {
            for ((_, entry), seen) in commit.entries().zip(&mut *seen) {
                *seen = protection(&entry);
            }
        });
        match result {
            // Nothing is mapped there at all.
            Err(err) if err == EFAULT => seen.fill(PROT_ERROR),
            result => result?,
        }
        f(seen)?;
        va = end;
    }
    Ok(())
}

/// What there is at a page, in the words of the test driver.
fn protection(entry: &Entry<'_>) -> u8 {
    let read = |page: &ReadPage<'_>| match page.is_zero() {
        true => PROT_READ | PROT_ZERO | pmd(page.order()),
        false => PROT_READ | pmd(page.order()),
    };
    let write = |page: &WritePage<'_>| PROT_WRITE | pmd(page.order());

    match entry {
        Entry::Hole => PROT_NONE,
        Entry::Ram(Ram::Read(page)) => read(page),
        Entry::Ram(Ram::Write(page)) => write(page),
        Entry::Device(Device::Read(page)) => PROT_LOCAL | read(page),
        Entry::Device(Device::Write(page)) => PROT_LOCAL | write(page),
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
    let mut window = Window::new()?;
    let mut done = Done::default();

    look(svm, range, &mut window, |seen| {
        let at = ptr.wrapping_byte_add(done.pages);
        UserSlice::new(at, seen.len()).writer().write_slice(seen)?;
        done.pages += seen.len();
        Ok(())
    })?;
    Ok(done)
}

/// Checks that all of `range` is memory that may be read, so that nothing moves if not.
fn check_readable(svm: &Svm, range: PageRange, window: &mut Window) -> Result {
    look(svm, range, window, |seen| {
        match seen.contains(&PROT_ERROR) {
            true => Err(EINVAL),
            false => Ok(()),
        }
    })
}

fn migrate_to_device(svm: &Svm, range: PageRange, ptr: UserPtr) -> Result<Done> {
    let bytes = bounce(range)?;
    let mut window = Window::new()?;

    check_readable(svm, range, &mut window)?;
    svm.prefetch(range, Place::Device)?.result?;
    let mut va = range.start();
    while va < range.end() {
        va = svm.map_device_pages(PageRange::new(va, range.end())?, &mut window)?;
    }
    read_back(svm, range, bytes, ptr)
}

fn migrate_to_system(svm: &Svm, range: PageRange, _ptr: UserPtr) -> Result<Done> {
    let mut window = Window::new()?;

    check_readable(svm, range, &mut window)?;
    let moved = svm.prefetch(range, Place::System)?;
    moved.result?;
    Ok(Done {
        pages: moved.pages,
        faults: 0,
    })
}

fn exclusive(svm: &Svm, range: PageRange, ptr: UserPtr) -> Result<Done> {
    let bytes = bounce(range)?;
    let mut window = Window::new()?;

    for va in (range.start()..range.end()).step_by(PAGE_SIZE) {
        svm.make_exclusive(va, &mut window)?;
    }
    read_back(svm, range, bytes, ptr)
}

fn flags(svm: &Svm, flags: u64) -> Result<Done> {
    if flags & !FLAG_FAIL_ALLOC != 0 {
        return Err(EINVAL);
    }
    // Zero, which would take it back, is no number of pages: see `range()`.
    svm.account().fail_next();
    Ok(Done::default())
}
