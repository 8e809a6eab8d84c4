// SPDX-License-Identifier: GPL-2.0

//! The instances of the device, and their open files.
//!
//! An instance is a faux device, a node in /dev, memory and counters. Opening the node gives the
//! GPU the address space of the process that opens it, for as long as the file is open. Owns the
//! layers below, and passes the ioctls to [`uapi`].

use super::{
    counters::{
        Account,
        Counters, //
    },
    debugfs::InstanceDir,
    policy::Policy,
    svm::Svm,
    uapi,
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
    prelude::*,
    sync::{
        aref::ARef,
        Arc,
        Mutex, //
    }, //
};

/// What the open files of an instance share.
pub(crate) struct Gpu {
    counters: Arc<Counters>,
    dir: InstanceDir,
    vram: Option<Arc<Vram>>,
}

impl Gpu {
    /// Makes a GPU with `vram_size` bytes of memory, and a directory in `root` of debugfs.
    ///
    /// # Errors
    ///
    /// [`EINVAL`] if the memory is too large, [`ENOMEM`].
    pub(crate) fn new(
        name: &'static CStr,
        root: &debugfs::Dir,
        vram_size: usize,
    ) -> Result<Arc<Self>> {
        let vram = match vram_size {
            0 => None,
            size => Some(Arc::new(Vram::new(name, size)?, GFP_KERNEL)?),
        };
        let gpu = Self {
            counters: Arc::new(Counters::new(), GFP_KERNEL)?,
            dir: InstanceDir::new(root, name),
            vram,
        };

        Ok(Arc::new(gpu, GFP_KERNEL)?)
    }
}

/// An instance of the device.
#[pin_data]
pub(crate) struct Instance {
    // Goes first: no file is opened any more.
    #[pin]
    _node: MiscDeviceRegistration<OpenFile>,
    #[pin]
    _stats: debugfs::File<Arc<Counters>>,
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

            Ok(try_pin_init!(Self {
                _stats <- gpu.dir.instance(gpu.counters.clone()),
                _node <- MiscDeviceRegistration::register(MiscDeviceOptions { name }, gpu.clone()),
                _device: device,
            }? Error))
        })
    }
}

/// An open file: the address space of the process that opened it, for the GPU.
#[pin_data]
pub(crate) struct OpenFile {
    gpu: Arc<Gpu>,
    account: Arc<Account>,
    /// The policy that all addresses have at first.
    policy: Policy,
    /// The address space of the task that opened the file.
    mm: ARef<Mm>,
    /// The same as the GPU sees it, from the first ioctl on.
    #[pin]
    svm: Mutex<Option<Arc<Svm>>>,
    #[pin]
    _stats: debugfs::File<Arc<Account>>,
}

impl OpenFile {
    /// Binds a file to the address space of the current task, all addresses of which have `policy`.
    ///
    /// # Errors
    ///
    /// [`EINVAL`] if the task has none, [`ENOMEM`].
    pub(crate) fn new(gpu: &Arc<Gpu>, policy: Policy) -> Result<Pin<KBox<Self>>> {
        let mm = ARef::from(&**current!().mm().ok_or(EINVAL)?);
        let account = Arc::new(Account::new(gpu.counters.clone()), GFP_KERNEL_ACCOUNT)?;
        let name = gpu.dir.name_file()?;

        KBox::try_pin_init(
            try_pin_init!(Self {
                _stats <- gpu.dir.file(&name, account.clone()),
                gpu: gpu.clone(),
                account,
                policy,
                mm,
                svm <- new_mutex!(None, "dummy_gpu::svm"),
            }),
            GFP_KERNEL_ACCOUNT,
        )
    }

    /// The address space that the file is bound to, if the current task runs in it.
    ///
    /// The first call mirrors the address space. open() does not, because `misc_open()` calls it
    /// with `misc_mtx` held, which every open() of a misc device takes: a process that keeps its
    /// `mmap_lock` busy would hold up all of them.
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
        let new = match Svm::new(self.account.clone(), self.gpu.vram.clone(), self.policy) {
            // Nothing was done. The signal is handled, and the ioctl starts again.
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

        // The addresses in the structure, and the one that it is at, are of the process that opened
        // the file.
        handler(&this.svm()?, UserPtr::from_addr(arg)).map(|()| 0)
    }
}
