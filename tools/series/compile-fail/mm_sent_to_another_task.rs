// SPDX-License-Identifier: GPL-2.0
//! Error: E0277
//! Hazard: 8
//! The address space that one task holds is used by another one.

#![forbid(unsafe_code)]

use hmm::{Access, FaultBuf, FaultRequest, MirroredMm, PageRange};
use kernel::{prelude::*, workqueue::system_dfl};

pub fn fault_later(mm: MirroredMm<'static>, mut buf: FaultBuf, range: PageRange) -> Result {
    system_dfl().try_spawn(GFP_KERNEL, move || {
        let _ = mm.fault(FaultRequest::new(range, Access::Read), &mut buf, |_| ());
    })?;
    Ok(())
}
