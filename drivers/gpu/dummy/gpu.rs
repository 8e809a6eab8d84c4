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
    /// Registers an instance, with its directory in `root` of debugfs and `vram_size` bytes of
    /// memory.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`], [`ENODEV`], and those of `misc_register()`.
    pub(crate) fn new<'a>(
        name: &'static CStr,
        root: &'a debugfs::Dir,
        vram_size: usize,
    ) -> impl PinInit<Self, Error> + 'a {
        pin_init::pin_init_scope(move || {
            let counters = Arc::new(Counters::new(), GFP_KERNEL)?;
            let dir = InstanceDir::new(root, name);
            let device = faux::Registration::new(name, None)?;
            let vram = match vram_size {
                0 => None,
                size => Some(Arc::new(Vram::new(name, size)?, GFP_KERNEL)?),
            };

            Ok(try_pin_init!(Self {
                _stats <- dir.instance(counters.clone()),
                _node <- MiscDeviceRegistration::register(
                    MiscDeviceOptions { name },
                    Gpu {
                        counters,
                        dir,
                        vram,
                    },
                ),
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

#[vtable]
impl MiscDevice for OpenFile {
    type Ptr = Pin<KBox<Self>>;
    type RegistrationData = Gpu;

    fn open(_file: &File, misc: &MiscDeviceRegistration<Self>) -> Result<Self::Ptr> {
        let gpu = misc.data();
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

    fn ioctl(this: Pin<&Self>, _file: &File, cmd: u32, arg: usize) -> Result<isize> {
        uapi::ioctl(&this.get_ref().svm, cmd, arg)
    }
}
