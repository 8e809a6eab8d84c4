// SPDX-License-Identifier: GPL-2.0

//! Memory of a device that the CPU reaches too, as `struct page`s of type `MEMORY_DEVICE_COHERENT`.
//!
//! A CPU accesses such pages as it does pages of system memory, so nothing faults. Otherwise they
//! are like device-private pages: they hold anonymous memory, which the driver migrates to them,
//! and the pool evicts.
//!
//! C header: [`include/linux/memremap.h`](srctree/include/linux/memremap.h)

use super::slots::Order;
use kernel::{
    bindings,
    io::resource::{
        Flags,
        Region, //
    },
    page::{
        PAGE_SHIFT,
        PAGE_SIZE, //
    },
    prelude::*, //
};

/// A range of physical addresses, for
/// [`DevicePool::new_coherent`](super::DevicePool::new_coherent): memory of a device that CPUs and
/// the device see alike.
///
/// Dropping it releases the range.
pub struct CoherentMemory(Region);

impl CoherentMemory {
    /// States that CPUs may use the memory of `region` like system memory: it keeps what is
    /// written, with caches, at any size and alignment, and the device and the CPUs see each
    /// other's writes without a flush. The core cannot see whether that is so.
    ///
    /// For the registers of a device, and for a BAR of PCI, it is not so.
    #[inline]
    pub fn assume_coherent(region: Region) -> Self {
        Self(region)
    }

    /// The range, for other uses.
    #[inline]
    pub fn into_region(self) -> Region {
        self.0
    }

    /// The physical address of the first byte, and the number of pages.
    ///
    /// # Errors
    ///
    /// [`EINVAL`] if the range is no range of memory, or does not begin and end at a multiple of
    /// [`Order::MAX`]; [`EBUSY`] if a part of it is system memory.
    pub(crate) fn bounds(&self) -> Result<(usize, usize)> {
        let (start, size) = (self.0.start(), self.0.size());
        let block = (Order::MAX.pages() * PAGE_SIZE) as u64;
        if !self.0.flags().contains(Flags::IORESOURCE_MEM) || (start | size) % block != 0 {
            return Err(EINVAL);
        }
        let ram = bindings::IORESOURCE_SYSTEM_RAM as usize;
        let any = bindings::IORES_DESC_NONE as c_ulong;
        // SAFETY: Always safe to call.
        let overlap = unsafe { bindings::region_intersects(start, size as usize, ram, any) };
        match overlap as u32 {
            bindings::REGION_DISJOINT => Ok((start as usize, size as usize >> PAGE_SHIFT)),
            _ => Err(EBUSY),
        }
    }
}
