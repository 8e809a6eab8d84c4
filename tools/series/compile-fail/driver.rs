// SPDX-License-Identifier: GPL-2.0
//! The control: what a driver does, and what the other cases do wrong. It must compile.

#![forbid(unsafe_code)]

use hmm::{
    Access, Commit, CopyBatch, CopyOp, DevicePage, DevicePool, DmaBinding, Engine, Entry,
    ExclusivePage, FaultBuf, FaultRequest, Holes, Invalidate, Invalidated, Location, MigrateBuf, MigrateReason,
    Migrated, Mirror, MirrorOps, PageRange, PoolOps, RamPage, Span, WritePage, WriteSpan,
};
use kernel::{
    device::{Bound, Device},
    dma::DmaAddress,
    prelude::*,
    sync::Arc,
    workqueue::system_dfl,
};

pub struct Ops;

impl MirrorOps for Ops {
    fn invalidate<'op>(&self, event: Invalidate<'op>) -> Invalidated<'op> {
        event.done()
    }
}

pub fn map_writable(page: &WritePage<'_>) -> usize {
    page.va()
}

pub fn fault(mirror: &Mirror, buf: &mut FaultBuf, range: PageRange) -> Result<usize> {
    mirror.mm()?.fault(
        FaultRequest::new(range, Access::Write),
        buf,
        |commit: &Commit<'_>| {
            commit
                .entries()
                .filter_map(|(_, entry)| match entry {
                    Entry::Ram(RamPage::Write(page)) => Some(map_writable(&page)),
                    Entry::Device(DevicePage::Write(page)) => Some(map_writable(&page)),
                    _ => None,
                })
                .count()
        },
    )
}

pub fn open(module: &'static ThisModule) -> Result<Mirror> {
    Mirror::new(module, Arc::new(Ops, GFP_KERNEL)?)
}

pub fn map_span(span: &WriteSpan<'_>) -> Location {
    span.location()
}

pub fn fault_for_dma(mirror: &Mirror, buf: &mut FaultBuf, range: PageRange) -> Result<usize> {
    mirror.mm()?.fault(FaultRequest::new(range, Access::Write), buf, |commit| {
        commit
            .spans()
            .filter_map(|span| match span {
                Span::Write(span) => Some(map_span(&span)),
                Span::Read(_) => None,
            })
            .count()
    })
}

pub fn open_for_dma(
    module: &'static ThisModule,
    dev: &Device<Bound>,
) -> Result<(DmaBinding, Mirror)> {
    let binding = DmaBinding::new(dev)?;
    let mirror = Mirror::for_device(module, Arc::new(Ops, GFP_KERNEL)?, &binding.device())?;
    Ok((binding, mirror))
}

pub struct Vram;

impl Vram {
    fn start_copy(&self, _bus: DmaAddress) {}
}

impl PoolOps for Vram {
    type PageData = u64;

    fn copy(&self, batch: &mut CopyBatch<'_>) -> Result {
        for op in batch {
            match op {
                CopyOp::ToDevice { from, .. } => self.start_copy(from.bus().ok_or(EINVAL)?),
                CopyOp::ToRam { from, mut to } => match to.bus() {
                    Some(bus) => {
                        self.start_copy(bus);
                        to.filled();
                    }
                    None => to.write(&[from.start() as u8])?,
                },
                CopyOp::Zero { .. } => {}
            }
        }
        Ok(())
    }

    fn migrated_to_ram(&self, _data: u64, _pages: usize, _reason: MigrateReason) {}

    fn page_freed(&self, _data: u64, _pages: usize) {}
}

pub fn open_with_memory(module: &'static ThisModule) -> Result<(DevicePool<Vram>, Mirror)> {
    let vram = Arc::new(Vram, GFP_KERNEL)?;
    let pool = DevicePool::new(module, c"vram", vram, Engine::Cpu, 512, 1)?;
    let mirror = Mirror::new_with_pool(module, Arc::new(Ops, GFP_KERNEL)?, &pool)?;
    Ok((pool, mirror))
}

pub fn open_with_memory_for_dma(
    module: &'static ThisModule,
    binding: &DmaBinding,
) -> Result<DevicePool<Vram>> {
    let vram = Arc::new(Vram, GFP_KERNEL)?;
    DevicePool::new(module, c"vram", vram, Engine::Dma(binding.device()), 512, 1)
}

pub fn migrate(
    pool: &DevicePool<Vram>,
    mirror: &Mirror,
    range: PageRange,
    buf: &mut MigrateBuf,
) -> Result<Migrated> {
    mirror.mm()?.migrate_to_device(pool, range, Holes::Keep, buf, |_| Ok(0))
}

pub fn map_exclusive(page: &ExclusivePage<'_>) -> usize {
    page.va()
}

pub fn make_exclusive(mirror: &Mirror, va: usize, buf: &mut FaultBuf) -> Result<usize> {
    mirror.mm()?.make_exclusive(va, buf, map_exclusive)
}

pub fn fault_later(mirror: Arc<Mirror>, range: PageRange) -> Result {
    system_dfl().try_spawn(GFP_KERNEL, move || {
        // The device repeats an access that misses again.
        let _ = FaultBuf::new(0).and_then(|mut buf| fault(&mirror, &mut buf, range));
    })?;
    Ok(())
}
