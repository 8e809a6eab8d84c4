// SPDX-License-Identifier: GPL-2.0

//! The instances of the device, and their open files.
//!
//! An instance is a faux device, a node in `/dev`, GPU memory and counters. While a file of the
//! node is open, the GPU can access the address space of the process that opened it. This file owns
//! the objects of the layers below and passes the ioctls to [`uapi`].

use super::{
    counters::{
        Counters,
        FileStats, //
    },
    debugfs::InstanceDir,
    policy::Policy,
    power::Power,
    queue::{
        FileQueue,
        Workers, //
    },
    svm::Svm,
    tlb::Tlb,
    uapi::{
        self,
        Client, //
    },
    vram::Vram, //
};
use kernel::{
    debugfs,
    faux,
    fs::File,
    miscdevice::{
        MiscDevice,
        MiscDeviceOptions,
        MiscDeviceRegistration, //
    },
    mm::Mm,
    new_mutex,
    pm::{
        SleepNotifier,
        SleepOps, //
    },
    prelude::*,
    sync::{
        aref::ARef,
        poll::PollTable,
        Arc,
        Mutex, //
    }, //
};

/// The state of an instance that its open files share.
pub(crate) struct Gpu {
    workers: Arc<Workers>,
    counters: Arc<Counters>,
    dir: InstanceDir,
    vram: Option<Arc<Vram>>,
    tlb: Option<Arc<Tlb>>,
    power: Arc<Power>,
}

impl Gpu {
    /// Creates a GPU with `vram`, if any, and a directory for it in the debugfs directory `root`.
    ///
    /// `tlb` is for a GPU whose flushes take some time.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`].
    pub(crate) fn new(
        name: &'static CStr,
        root: &debugfs::Dir,
        vram: Option<Vram>,
        tlb: Option<Tlb>,
    ) -> Result<Arc<Self>> {
        let gpu = Self {
            workers: Arc::new(Workers::new()?, GFP_KERNEL)?,
            counters: Arc::new(Counters::new(), GFP_KERNEL)?,
            dir: InstanceDir::new(root, name),
            vram: vram.map(|vram| Arc::new(vram, GFP_KERNEL)).transpose()?,
            tlb: tlb.map(|tlb| Arc::new(tlb, GFP_KERNEL)).transpose()?,
            power: Power::new()?,
        };

        Ok(Arc::new(gpu, GFP_KERNEL)?)
    }
}

impl SleepOps for Gpu {
    /// Stops the GPU, and evicts all pages to system memory, where they keep their contents.
    fn prepare(&self) -> Result {
        self.power.switch_off();
        match self.vram.as_ref().map(|vram| vram.evict()) {
            // A memory that is lost already has nothing to lose.
            None | Some(Ok(()) | Err(ENODEV)) => Ok(()),
            Some(Err(err)) => {
                self.power.switch_on();
                Err(err)
            }
        }
    }

    fn awake(&self) {
        self.power.switch_on();
    }
}

/// An instance of the device.
#[pin_data]
pub(crate) struct Instance {
    // Dropped first, so that no file can be opened any more.
    #[pin]
    _node: MiscDeviceRegistration<OpenFile>,
    #[pin]
    _sleep: SleepNotifier<Gpu>,
    #[pin]
    _stats: debugfs::File<Arc<Counters>>,
    _lose: Option<Pin<KBox<debugfs::File<Arc<Vram>>>>>,
    _device: faux::Registration,
}

impl Instance {
    /// Registers an instance.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`], [`ENODEV`], and those of `misc_register()`.
    pub(crate) fn new(name: &'static CStr, gpu: Arc<Gpu>) -> impl PinInit<Self, Error> {
        pin_init::pin_init_scope(move || {
            let device = faux::Registration::new(name, None)?;
            let lose = |vram: &Arc<Vram>| KBox::pin_init(gpu.dir.lose(vram.clone()), GFP_KERNEL);
            let lose = gpu.vram.as_ref().map(lose).transpose()?;

            Ok(try_pin_init!(Self {
                _sleep <- SleepNotifier::register(gpu.clone()),
                _stats <- gpu.dir.instance(gpu.counters.clone()),
                _node <- MiscDeviceRegistration::register(MiscDeviceOptions { name }, gpu.clone()),
                _lose: lose,
                _device: device,
            }? Error))
        })
    }
}

/// An open file, bound to the address space of the process that opened it.
#[pin_data]
pub(crate) struct OpenFile {
    gpu: Arc<Gpu>,
    stats: Arc<FileStats>,
    /// The initial policy of all addresses.
    policy: Policy,
    /// The address space of the task that opened the file.
    mm: ARef<Mm>,
    /// The GPU's view of `mm`. The first ioctl creates it.
    #[pin]
    svm: Mutex<Option<Arc<Svm>>>,
    queue: Arc<FileQueue>,
    #[pin]
    _stats: debugfs::File<Arc<FileStats>>,
}

impl OpenFile {
    /// Binds a new file to the address space of the current task. All addresses have `policy` at
    /// first.
    ///
    /// # Errors
    ///
    /// [`EINVAL`] if the task has no address space, [`ENOMEM`].
    pub(crate) fn new(gpu: &Arc<Gpu>, policy: Policy) -> Result<Pin<KBox<Self>>> {
        let mm = ARef::from(&**current!().mm().ok_or(EINVAL)?);
        let stats = Arc::new(FileStats::new(gpu.counters.clone()), GFP_KERNEL_ACCOUNT)?;
        let name = gpu.dir.name_file()?;

        KBox::try_pin_init(
            try_pin_init!(Self {
                _stats <- gpu.dir.file(&name, stats.clone()),
                gpu: gpu.clone(),
                stats,
                policy,
                mm,
                svm <- new_mutex!(None, "dummy_gpu::svm"),
                queue: FileQueue::new(gpu.workers.clone())?,
            }),
            GFP_KERNEL_ACCOUNT,
        )
    }

    /// Returns the address space that the file is bound to, if the current task runs in it.
    ///
    /// The first call creates the mirror of the address space. It is not created in open(), because
    /// `misc_open()` holds `misc_mtx`, which every open() of a misc device takes, and creating a
    /// mirror may wait for `mmap_lock`. A process that keeps its `mmap_lock` busy would block all
    /// of these open() calls.
    ///
    /// # Errors
    ///
    /// - [`EPERM`] if the task runs in another address space.
    /// - [`ERESTARTNOINTR`] if a signal is pending during the first call.
    /// - [`ENOMEM`].
    pub(crate) fn svm(&self) -> Result<Arc<Svm>> {
        let mut svm = self.svm.lock();

        if let Some(svm) = &*svm {
            return svm.is_current().then(|| svm.clone()).ok_or(EPERM);
        }
        let current = current!();
        let mm = current.mm().ok_or(EPERM)?;
        if !core::ptr::eq::<Mm>(&**mm, &*self.mm) {
            return Err(EPERM);
        }
        let new = match Svm::new(
            self.stats.clone(),
            self.gpu.vram.clone(),
            self.gpu.tlb.clone(),
            self.gpu.power.clone(),
            self.policy,
        ) {
            // Nothing was done yet: let the task handle the signal and start the ioctl again.
            Err(EINTR) => return Err(ERESTARTNOINTR),
            result => result?,
        };
        Ok(svm.insert(new).clone())
    }
}

#[vtable]
impl MiscDevice for OpenFile {
    type Ptr = Pin<KBox<Self>>;
    type RegistrationData = Arc<Gpu>;

    fn open(_file: &File, misc: &MiscDeviceRegistration<Self>) -> Result<Self::Ptr> {
        Self::new(&misc.data(), Policy::Device)
    }

    fn ioctl(this: Pin<&Self>, _file: &File, cmd: u32, arg: usize) -> Result<isize> {
        let handler = uapi::handler(cmd)?;

        // `svm()` fails unless the current task runs in the address space of the file. So `arg` and
        // the addresses in the structure refer to that address space.
        let client = Client {
            svm: this.svm()?,
            queue: this.queue.clone(),
        };
        handler(&client, UserPtr::from_addr(arg)).map(|()| 0)
    }

    fn poll(this: Pin<&Self>, file: &File, table: PollTable<'_>) -> u32 {
        this.queue.poll(file, table)
    }
}
