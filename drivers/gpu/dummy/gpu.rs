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
    prelude::*,
    sync::Arc, //
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
    svm: Arc<Svm>,
    #[pin]
    _stats: debugfs::File<Arc<Svm>>,
}

impl OpenFile {
    /// Opens the address space of the current task to `gpu`.
    ///
    /// # Errors
    ///
    /// As for [`Svm::new`].
    pub(crate) fn new(gpu: &Gpu) -> Result<Pin<KBox<Self>>> {
        let account = Arc::new(Account::new(gpu.counters.clone()), GFP_KERNEL_ACCOUNT)?;
        let svm = Svm::new(account, gpu.vram.clone())?;
        let name = gpu.dir.name_file()?;

        KBox::try_pin_init(
            try_pin_init!(Self {
                _stats <- gpu.dir.file(&name, svm.clone()),
                svm,
            }),
            GFP_KERNEL_ACCOUNT,
        )
    }

    /// The address space.
    pub(crate) fn svm(&self) -> &Arc<Svm> {
        &self.svm
    }
}

#[vtable]
impl MiscDevice for OpenFile {
    type Ptr = Pin<KBox<Self>>;
    type RegistrationData = Arc<Gpu>;

    fn open(_file: &File, misc: &MiscDeviceRegistration<Self>) -> Result<Self::Ptr> {
        Self::new(&misc.data())
    }

    fn ioctl(this: Pin<&Self>, _file: &File, cmd: u32, arg: usize) -> Result<isize> {
        uapi::ioctl(this.get_ref().svm(), cmd, arg)
    }
}
