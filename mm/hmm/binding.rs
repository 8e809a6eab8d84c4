// SPDX-License-Identifier: GPL-2.0

//! Mirrors for devices that do DMA, and their end when the driver of the device is unbound.

use super::{
    callback::Callback,
    dma::{
        Dma,
        DmaDevice, //
    },
    mirror::{
        mirror_new,
        Mirror, //
    },
    region::{
        MirrorOps,
        Region, //
    }, //
};
#[cfg(CONFIG_RUST_HMM_DEVICE)]
use super::{
    device_pool::{
        end_pools_of,
        mirror_new_with_pool,
        DevicePool, //
    },
    pool_ops::PoolOps, //
};
use kernel::{
    device::{
        Bound,
        Device, //
    },
    devres,
    prelude::*,
    sync::Arc, //
};

/// The use of a device by mirrors, for as long as its driver is bound.
///
/// The driver creates this in its probe, its data owns it, and its `unbind()` calls
/// [`DmaBinding::end`]. That ends the DMA of all mirrors that were made for the device:
///
/// - For each region that has an entry the core calls [`MirrorOps::invalidate`] with
///   [`Cause::Unbind`](super::Cause::Unbind), and waits for the flush.
/// - Then it unmaps all pages, and marks those dirty that the device could write to.
/// - Before all of this, pools with [`Engine::Dma`](super::Engine::Dma) end, as if they were
///   dropped: the device copies the pages that are in its memory.
/// - Faults and new mirrors fail with [`ENODEV`] from then on. A fault that waits for user space
///   does not hold this up, and fails when it goes on.
///
/// The mirrors stay, and their reads and writes miss. If the driver does not call
/// [`DmaBinding::end`], the same happens when this is dropped, or if it is leaked, when the
/// resources of the device are released. That is late: the IOMMU may serve others by then.
///
/// Both sleep. The locks that must not be held are those of [`Mirror`].
pub struct DmaBinding {
    device: DmaDevice,
}

impl DmaBinding {
    /// Lets mirrors map memory for `dev`, whose DMA mask was set.
    ///
    /// # Errors
    ///
    /// - [`EOPNOTSUPP`] if the device cannot reach all memory, so that pages would have to be
    ///   copied to bounce buffers, or if the caches of the CPUs are not coherent with the device.
    ///   The device and the process could not use the same page then.
    /// - [`ENOMEM`].
    #[inline(never)]
    #[export_name = "rust_hmm_binding_new"]
    pub fn new(dev: &Device<Bound>) -> Result<Self> {
        let dma = Dma::new(dev)?;
        // The driver may leak the result.
        devres::register(dev, Closer(dma.clone()), GFP_KERNEL)?;
        Ok(Self {
            device: DmaDevice::new(&dma),
        })
    }

    /// Ends the DMA of all mirrors that were made for the device. Doing this again does nothing.
    ///
    /// # Context
    ///
    /// Sleeps. The locks that must not be held are those of [`Mirror`].
    #[inline]
    pub fn end(&self) {
        binding_end(self.device.dma());
    }

    /// The device, to create mirrors for it.
    #[inline]
    pub fn device(&self) -> DmaDevice {
        self.device.clone()
    }
}

impl Drop for DmaBinding {
    #[inline]
    fn drop(&mut self) {
        binding_end(self.device.dma());
    }
}

/// Ends the use of a device when it is dropped, unless that was done before.
struct Closer(Arc<Dma>);

impl Drop for Closer {
    fn drop(&mut self) {
        close(&self.0);
    }
}

fn close(dma: &Arc<Dma>) {
    dma.begin_close();
    // While pages can still be mapped for the copies.
    #[cfg(CONFIG_RUST_HMM_DEVICE)]
    end_pools_of(dma);
    // SAFETY: `close()` calls this with the list locked, for regions in it.
    dma.close(|key| unsafe { Region::detach(key) });
}

#[inline(never)]
#[export_name = "rust_hmm_binding_end"]
fn binding_end(dma: &Arc<Dma>) {
    // In a callback, this task may hold a lock that the end waits for. The device's resources are
    // released later, which ends it.
    if !Callback::is_running() {
        close(dma);
    }
}

impl Mirror {
    /// Creates a mirror of the current task's address space, for a device that accesses memory by
    /// DMA.
    ///
    /// A commit of this mirror has [spans](super::Commit::spans) with the DMA address of each page.
    /// The core maps a page when it installs the entry. It unmaps the page when
    /// [`MirrorOps::invalidate`] has been answered and the flush has ended, marks it dirty if the
    /// device could write to it, and only then mm goes on.
    ///
    /// An IOMMU maps the pages of 2 MiB to contiguous DMA addresses, as long as it has free
    /// addresses. It allows reads and writes of all pages that are mapped.
    ///
    /// # Errors
    ///
    /// Those of [`Mirror::new`], and [`ENODEV`] if the driver was unbound.
    #[inline]
    pub fn for_device(
        module: &'static ThisModule,
        ops: Arc<dyn MirrorOps>,
        device: &DmaDevice,
    ) -> Result<Self> {
        mirror_new(module, ops, Some(device.dma()))
    }

    /// Creates a mirror of the current task's address space, for a device that accesses memory by
    /// DMA and has memory of its own.
    ///
    /// This is [`Mirror::for_device`] and [`Mirror::new_with_pool`] in one. The spans of pages in
    /// the memory of the device have a [`Location::Device`](super::Location::Device).
    ///
    /// # Errors
    ///
    /// Those of [`Mirror::for_device`].
    #[cfg(CONFIG_RUST_HMM_DEVICE)]
    #[inline]
    pub fn for_device_with_pool<T: PoolOps>(
        module: &'static ThisModule,
        ops: Arc<dyn MirrorOps>,
        device: &DmaDevice,
        pool: &DevicePool<T>,
    ) -> Result<Self> {
        mirror_new_with_pool(module, ops, pool.pool(), Some(device.dma()))
    }
}
