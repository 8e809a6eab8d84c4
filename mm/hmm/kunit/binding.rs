// SPDX-License-Identifier: GPL-2.0

//! Tests of `binding.rs`, and of regions and faults for devices that do DMA.

use super::{
    super::{
        binding::DmaBinding,
        dma::DmaDevice,
        fault::FaultRequest,
        hmm_range::FaultBuf,
        mirror::Mirror,
        pfn::Access,
        range::PageRange,
        region::{
            Cause,
            Flush,
            Invalidate,
            Invalidated,
            MirrorOps,
            Region, //
        }, //
    },
    dma::{
        bound,
        device,
        is_dirty,
        page_at, //
    },
    event_of,
    map_aligned,
    page,
    span::{
        bus,
        parts, //
    },
    user_read,
    user_write,
    zap,
    Recorder,
    MODULE, //
};
#[cfg(CONFIG_RUST_HMM_DEVICE)]
use super::{
    super::{
        copy::DeviceRange,
        migrate::MigrateBuf,
        migrate_vma::Holes,
        span::Location, //
    },
    device::TestDevice, //
};
use core::ptr::null_mut;
use kernel::{
    bindings,
    dma::DmaAddress,
    faux,
    kunit::user_mm::{
        with_user_mm,
        Prot,
        UserMm, //
    },
    page::PAGE_MASK,
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc, //
    }, //
};

const PAGES: usize = 4;
const BLOCKABLE: u32 = bindings::MMU_NOTIFIER_RANGE_BLOCKABLE;

/// A device, and what its driver has.
struct Setup {
    /// Dropped first, as the data of a driver.
    binding: DmaBinding,
    _faux: faux::Registration,
}

impl Setup {
    fn new() -> Result<Self> {
        let faux = device(0)?;
        Ok(Self {
            binding: DmaBinding::new(bound(&faux))?,
            _faux: faux,
        })
    }

    fn device(&self) -> DmaDevice {
        self.binding.device()
    }

    fn mirror(&self, ops: Arc<dyn MirrorOps>) -> Result<Mirror> {
        Mirror::for_device(&MODULE, ops, &self.device())
    }
}

#[cfg(CONFIG_RUST_HMM_DEVICE)]
fn is_at(location: Location, pages: DeviceRange) -> bool {
    location == Location::Device(pages)
}

/// What the device gets for a page: the address of its translation, and whether it may write.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
enum Found {
    Read(DmaAddress),
    Write(DmaAddress),
}

impl Found {
    fn address(self) -> DmaAddress {
        match self {
            Self::Read(address) | Self::Write(address) => address,
        }
    }
}

/// Faults `range` and returns what the device gets for each page of the window.
fn fault(mirror: &Mirror, range: PageRange, access: Access) -> Result<KVec<Option<Found>>> {
    let mut found = KVec::from_elem(None, range.pages(), GFP_KERNEL)?;
    let mut buf = FaultBuf::new(range.pages().ilog2())?;
    let mm = mirror.mm()?;
    mm.fault(FaultRequest::new(range, access), &mut buf, |commit| {
        for span in commit.spans() {
            let (range, location, writable) = parts(&span);
            let Some(address) = bus(location) else {
                continue;
            };
            for va in range.page_addrs() {
                let at = address + (va - range.start()) as DmaAddress;
                let place = commit.range().index_of(va).and_then(|i| found.get_mut(i));
                if let Some(place) = place {
                    *place = Some(match writable {
                        false => Found::Read(at),
                        true => Found::Write(at),
                    });
                }
            }
        }
    })?;
    Ok(found)
}

/// Faults one page, and returns what the device gets.
fn fault_page(mirror: &Mirror, page: PageRange, access: Access) -> Result<Found> {
    fault(mirror, page, access)?[0].ok_or(ENOENT)
}

/// Writes a byte as the device does: behind the back of the core and of mm.
fn device_write(address: DmaAddress, byte: u8) {
    let offset = address as usize & !PAGE_MASK;
    // SAFETY: The page is mapped for the device, so it is not freed.
    unsafe { bindings::memcpy_to_page(page_at(address), offset, (&raw const byte).cast(), 1) };
}

/// Reads a byte as the device does.
fn device_read(address: DmaAddress) -> u8 {
    let mut byte = 0;
    let offset = address as usize & !PAGE_MASK;
    // SAFETY: The page is mapped for the device, so it is not freed.
    unsafe { bindings::memcpy_from_page((&raw mut byte).cast(), page_at(address), offset, 1) };
    byte
}

/// The number of pages that are mapped for the device.
fn mapped(mirror: &Mirror, range: PageRange) -> usize {
    mirror
        .region(range.start())
        .map_or(0, |region| region.entries().read().mapped())
}

/// Pages with a byte in each.
fn map(mm: &UserMm) -> Result<PageRange> {
    let range = map_aligned(mm, PAGES, Prot::ReadWrite)?;
    for (byte, va) in (1..).zip(range.page_addrs()) {
        user_write(va, byte)?;
    }
    Ok(range)
}

/// Lets the region see the start of an event. Returns what it gives for the second pass.
fn start(
    mm: &UserMm,
    region: &Region,
    range: PageRange,
    flags: u32,
) -> (bool, *mut bindings::mmu_interval_notifier_finish) {
    let event = event_of(mm, range, flags);
    let mut finish = null_mut();
    // SAFETY: The notifier is the region's, the event is valid, and the sequence is odd, as in an
    // invalidation.
    let done = unsafe { Region::invalidate_start(region.notifier(), &event, 1, &mut finish) };
    (done, finish)
}

/// A driver whose flush counts how many pages are still mapped when it is waited for.
struct Flusher {
    flush: Arc<Counting>,
}

struct Counting {
    waits: Atomic<usize>,
}

impl Flusher {
    fn new() -> Result<(Arc<Self>, Arc<Counting>)> {
        let waits = Atomic::new(0);
        let flush = Arc::new(Counting { waits }, GFP_KERNEL)?;
        let ops = Self {
            flush: flush.clone(),
        };
        Ok((Arc::new(ops, GFP_KERNEL)?, flush))
    }
}

impl MirrorOps for Flusher {
    fn invalidate<'op>(&self, event: Invalidate<'op>) -> Invalidated<'op> {
        event.flushing(self.flush.clone(), 0)
    }
}

impl Flush for Counting {
    fn wait(&self, _fence: u64) {
        self.waits.add(1, Relaxed);
    }
}

#[kunit_tests(hmm_binding)]
mod tests {
    use super::*;

    #[test]
    fn the_device_uses_the_pages_of_the_process() -> Result {
        let setup = Setup::new()?;
        with_user_mm(|mm| {
            let range = map(mm)?;
            let mirror = setup.mirror(Recorder::new()?)?;
            let found = fault(&mirror, range, Access::Write)?;
            for (byte, (va, found)) in (1..).zip(range.page_addrs().zip(&found)) {
                let Some(Found::Write(address)) = *found else {
                    return Err(ENOENT);
                };
                assert_eq!(device_read(address), byte);
                device_write(address, byte + 100);
                assert_eq!(user_read(va)?, byte + 100);
            }
            assert_eq!(mapped(&mirror, range), PAGES);
            Ok(())
        })
    }

    #[test]
    fn a_page_keeps_its_address_when_it_is_faulted_again() -> Result {
        let setup = Setup::new()?;
        with_user_mm(|mm| {
            let range = map(mm)?;
            let first = page(range, 0)?;
            let mirror = setup.mirror(Recorder::new()?)?;
            let read = fault_page(&mirror, first, Access::Read)?;
            assert_eq!(mapped(&mirror, range), 1);
            let write = fault_page(&mirror, first, Access::Write)?;
            assert_eq!(read.address(), write.address());
            assert_eq!(mapped(&mirror, range), 1);
            fault(&mirror, range, Access::Read)?;
            assert_eq!(mapped(&mirror, range), PAGES);
            Ok(())
        })
    }

    #[test]
    fn pages_that_are_not_present_have_no_span() -> Result {
        let setup = Setup::new()?;
        with_user_mm(|mm| {
            let range = map_aligned(mm, PAGES, Prot::ReadWrite)?;
            user_write(page(range, 2)?.start(), 1)?;
            let mirror = setup.mirror(Recorder::new()?)?;
            let mut buf = FaultBuf::new(PAGES.ilog2())?;
            let second = page(range, 2)?;
            mirror.mm()?.fault(
                FaultRequest::new(second, Access::Read),
                &mut buf,
                |commit| {
                    let mut spans = commit.spans();
                    assert!(spans.next().is_some_and(|span| parts(&span).0 == second));
                    assert!(spans.next().is_none());
                },
            )?;
            // The spans of a mirror that is not for a device are empty.
            let other = Mirror::new(&MODULE, Recorder::new()?)?;
            other.mm()?.fault(
                FaultRequest::new(second, Access::Read),
                &mut buf,
                |commit| assert!(commit.spans().next().is_none()),
            )?;
            Ok(())
        })
    }

    #[test]
    fn what_the_device_could_write_is_dirty_afterwards() -> Result {
        let setup = Setup::new()?;
        with_user_mm(|mm| {
            let range = map(mm)?;
            let mirror = setup.mirror(Recorder::new()?)?;
            let region = mirror.region_or_insert(mm.mm(), range.start())?;
            let found = fault(&mirror, range, Access::Write)?;
            let [Some(first), Some(second), ..] = found[..] else {
                return Err(ENOENT);
            };
            // A page that is written for the first time since it was swapped in is like this.
            assert!(!is_dirty(first.address()));
            assert_eq!(
                start(mm, &region, page(range, 0)?, BLOCKABLE),
                (true, null_mut())
            );
            assert!(is_dirty(first.address()));
            assert!(!is_dirty(second.address()));
            assert_eq!(mapped(&mirror, range), PAGES - 1);
            Ok(())
        })
    }

    #[test]
    fn what_the_device_could_only_read_stays_clean() -> Result {
        let setup = Setup::new()?;
        with_user_mm(|mm| {
            let range = map_aligned(mm, PAGES, Prot::Read)?;
            let first = page(range, 0)?;
            let mirror = setup.mirror(Recorder::new()?)?;
            let Found::Read(address) = fault_page(&mirror, first, Access::Read)? else {
                return Err(ENOENT);
            };
            zap(mm.mm(), range);
            assert!(!is_dirty(address));
            assert_eq!(mapped(&mirror, range), 0);
            Ok(())
        })
    }

    #[test]
    fn a_page_is_mapped_until_the_flush_has_ended() -> Result {
        let setup = Setup::new()?;
        with_user_mm(|mm| {
            let range = map(mm)?;
            let first = page(range, 0)?;
            let (ops, flush) = Flusher::new()?;
            let mirror = setup.mirror(ops)?;
            let region = mirror.region_or_insert(mm.mm(), range.start())?;
            fault(&mirror, range, Access::Write)?;

            // Nobody can get the address any more, but the device may use it.
            let (done, finish) = start(mm, &region, first, BLOCKABLE);
            assert!(done && !finish.is_null());
            assert!(mirror.read(first.start(), &mut [0]).is_err());
            assert_eq!(mapped(&mirror, range), PAGES);
            assert_eq!(flush.waits.load(Relaxed), 0);

            // Another event of the page waits for the flush, and then mm may go on with it.
            assert_eq!(start(mm, &region, first, BLOCKABLE), (true, null_mut()));
            assert_eq!(flush.waits.load(Relaxed), 1);
            assert_eq!(mapped(&mirror, range), PAGES - 1);

            // An event of another page has no second pass meanwhile.
            assert_eq!(
                start(mm, &region, page(range, 1)?, BLOCKABLE),
                (true, null_mut())
            );
            assert_eq!(flush.waits.load(Relaxed), 2);
            assert_eq!(mapped(&mirror, range), PAGES - 2);

            // SAFETY: The first event has stored it.
            unsafe { Region::invalidate_finish(finish) };
            assert_eq!(flush.waits.load(Relaxed), 3);
            assert_eq!(mapped(&mirror, range), PAGES - 2);

            let (_, finish) = start(mm, &region, page(range, 2)?, BLOCKABLE);
            assert_eq!(mapped(&mirror, range), PAGES - 2);
            // SAFETY: The event has stored it.
            unsafe { Region::invalidate_finish(finish) };
            assert_eq!(mapped(&mirror, range), PAGES - 3);

            // What must not block has no second pass, which would take the region's lock.
            assert_eq!(start(mm, &region, page(range, 3)?, 0), (true, null_mut()));
            assert_eq!(mapped(&mirror, range), 0);
            Ok(())
        })
    }

    #[test]
    fn the_end_of_the_mirror_unmaps() -> Result {
        let setup = Setup::new()?;
        with_user_mm(|mm| {
            let range = map(mm)?;
            let ops = Recorder::new()?;
            let mirror = setup.mirror(ops.clone())?;
            let first = fault_page(&mirror, page(range, 0)?, Access::Write)?.address();
            device_write(first, 99);
            drop(mirror);
            assert_eq!(ops.count(), 0);
            assert!(is_dirty(first));
            assert_eq!(user_read(range.start())?, 99);
            Ok(())
        })
    }

    #[test]
    fn the_end_of_the_process_unmaps() -> Result {
        let setup = Setup::new()?;
        let device = setup.device();
        let (mirror, range) = with_user_mm(move |mm| {
            let range = map(mm)?;
            let mirror = Mirror::for_device(&MODULE, Recorder::new()?, &device)?;
            fault(&mirror, range, Access::Write)?;
            Ok((mirror, range))
        })?;
        assert_eq!(mapped(&mirror, range), 0);
        Ok(())
    }

    #[test]
    fn unbinding_ends_the_use_of_all_pages() -> Result {
        let Setup { binding, _faux } = Setup::new()?;
        with_user_mm(|mm| {
            let range = map(mm)?;
            let device = binding.device();
            let ops = Recorder::new()?;
            let mirror = Mirror::for_device(&MODULE, ops.clone(), &device)?;
            let first = fault_page(&mirror, page(range, 0)?, Access::Write)?.address();
            device_write(first, 99);

            drop(binding);
            assert_eq!((ops.count(), ops.cause()), (1, Some(Cause::Unbind)));
            assert_eq!(mapped(&mirror, range), 0);
            assert!(is_dirty(first));
            assert!(mirror.read(range.start(), &mut [0]).is_err());
            assert_eq!(fault(&mirror, range, Access::Read).err(), Some(ENODEV));
            assert!(Mirror::for_device(&MODULE, ops, &device).err() == Some(ENODEV));
            assert_eq!(user_read(range.start())?, 99);
            // The process is served as before, by others.
            let other = Mirror::new(&MODULE, Recorder::new()?)?;
            other.mm()?.fault(
                FaultRequest::new(page(range, 1)?, Access::Write),
                &mut FaultBuf::new(0)?,
                |_| (),
            )?;
            Ok(())
        })
    }

    #[test]
    fn unbinding_waits_for_a_flush_that_has_begun() -> Result {
        let Setup { binding, _faux } = Setup::new()?;
        with_user_mm(|mm| {
            let range = map(mm)?;
            let (ops, flush) = Flusher::new()?;
            let mirror = Mirror::for_device(&MODULE, ops, &binding.device())?;
            let region = mirror.region_or_insert(mm.mm(), range.start())?;
            fault(&mirror, range, Access::Write)?;
            let (_, finish) = start(mm, &region, page(range, 0)?, BLOCKABLE);
            drop(binding);
            // One for the other pages, and one for the event.
            assert_eq!(flush.waits.load(Relaxed), 2);
            assert_eq!(mapped(&mirror, range), 0);
            // SAFETY: The event has stored it.
            unsafe { Region::invalidate_finish(finish) };
            Ok(())
        })
    }

    #[test]
    fn a_binding_that_is_leaked_ends_with_the_resources_of_the_device() -> Result {
        let Setup {
            binding,
            _faux: faux,
        } = Setup::new()?;
        with_user_mm(|mm| {
            let range = map(mm)?;
            let ops = Recorder::new()?;
            let mirror = Mirror::for_device(&MODULE, ops.clone(), &binding.device())?;
            fault(&mirror, range, Access::Write)?;
            let binding = core::mem::ManuallyDrop::new(binding);
            assert_eq!(mapped(&mirror, range), PAGES);
            drop(faux);
            assert_eq!((ops.count(), ops.cause()), (1, Some(Cause::Unbind)));
            assert_eq!(mapped(&mirror, range), 0);
            // kmemleak does not know that the leak is meant.
            drop(core::mem::ManuallyDrop::into_inner(binding));
            Ok(())
        })
    }

    #[test]
    #[cfg(CONFIG_RUST_HMM_DEVICE)]
    fn a_page_that_is_exclusive_has_an_address() -> Result {
        let setup = Setup::new()?;
        with_user_mm(|mm| {
            let range = map(mm)?;
            let first = page(range, 0)?;
            let mirror = setup.mirror(Recorder::new()?)?;
            let mut buf = FaultBuf::new(0)?;
            for byte in [50, 51] {
                let at = mirror
                    .mm()?
                    .make_exclusive(first.start(), &mut buf, |page| page.location())?;
                let address = at.and_then(bus).ok_or(ENOENT)?;
                assert_eq!(mapped(&mirror, range), 1);
                device_write(address, byte);
            }
            assert_eq!(user_read(first.start())?, 51);
            assert_eq!(mapped(&mirror, range), 0);
            Ok(())
        })
    }

    #[test]
    #[cfg(CONFIG_RUST_HMM_DEVICE)]
    fn spans_say_where_in_its_own_memory_a_device_finds_pages() -> Result {
        let setup = Setup::new()?;
        let (_device, pool) = TestDevice::<u64>::new(1)?;
        with_user_mm(|mm| {
            let range = map(mm)?;
            let dma = setup.device();
            let ops = Recorder::new()?;
            let mirror = Mirror::for_device_with_pool(&MODULE, ops, &dma, &pool)?;
            let mm = mirror.mm()?;
            let last = PageRange::new(page(range, 1)?.start(), range.end())?;
            let mut buf = MigrateBuf::new(PAGES.ilog2())?;
            let moved = mm.migrate_to_device(&pool, last, Holes::Keep, &mut buf, |_| Ok(1))?;
            assert_eq!(moved.pages(), PAGES - 1);

            let mut buf = FaultBuf::new(PAGES.ilog2())?;
            mm.fault(
                FaultRequest::new(range, Access::Write),
                &mut buf,
                |commit| {
                    let mut spans = commit.spans();
                    let first = spans.next().map(|span| parts(&span).1);
                    assert!(first.and_then(bus).is_some());
                    let rest = spans.next().map(|span| parts(&span));
                    let pages = DeviceRange::new(0, last.len());
                    assert!(rest.is_some_and(|(range, at, _)| range == last && is_at(at, pages)));
                    assert!(spans.next().is_none());
                },
            )?;
            assert_eq!(mapped(&mirror, range), PAGES);
            // The CPU takes one back, which is dirty then: see hmm_migrate.
            assert_eq!(user_read(last.start())?, 2);
            Ok(())
        })
    }
}
