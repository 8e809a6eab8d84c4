// SPDX-License-Identifier: GPL-2.0

//! The counters in debugfs, and what makes the device fail.
//!
//! - `dummy_gpu/dummy_gpuN/stats` has the counters of instance N.
//! - `dummy_gpu/dummy_gpuN/files/TGID-ID` has those of an open file. TGID is the process that
//!   opened it; ID tells apart the files of one process.
//!
//! - `dummy_gpu/dummy_gpuN/lose` makes the memory of instance N fail for good when anything is
//!   written to it.
//!
//! Each line of the others is the name that the counter has in `struct dummy_gpu_stats`, and its
//! value.

use super::counters::{
    Counters,
    FileStats,
    NAMES, //
};
use super::vram::Vram;
use kernel::{
    debugfs::{
        Dir,
        File, //
    },
    fmt,
    prelude::*,
    str::CString,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc, //
    },
    uaccess::UserSliceReader, //
};

fn show(counters: &Counters, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    for (name, value) in NAMES.iter().zip(counters.read()) {
        writeln!(f, "{name} {value}")?;
    }
    Ok(())
}

/// The debugfs directory of an instance.
pub(crate) struct InstanceDir {
    dir: Dir,
    files: Dir,
    next_id: Atomic<u64>,
}

impl InstanceDir {
    /// Creates the directory `name` in `root`.
    pub(crate) fn new(root: &Dir, name: &CStr) -> Self {
        let dir = root.subdir(name);

        Self {
            files: dir.subdir(c"files"),
            dir,
            next_id: Atomic::new(0),
        }
    }

    /// Creates the file that shows the counters of the instance. Dropping it removes it from
    /// debugfs.
    pub(crate) fn instance(
        &self,
        counters: Arc<Counters>,
    ) -> impl PinInit<File<Arc<Counters>>> + '_ {
        self.dir
            .read_callback_file(c"stats", counters, &|counters, f| show(counters, f))
    }

    /// Creates the file that makes the memory of the instance fail.
    pub(crate) fn lose(&self, vram: Arc<Vram>) -> impl PinInit<File<Arc<Vram>>> + '_ {
        self.dir
            .write_callback_file(c"lose", vram, &|vram, _: &mut UserSliceReader| vram.lose())
    }

    /// Returns a new name, TGID-ID, for a file that the current process opens.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`].
    pub(crate) fn name_file(&self) -> Result<CString> {
        let id = self.next_id.fetch_add(1, Relaxed);

        CString::try_from_fmt(fmt!("{}-{}", current!().tgid(), id))
    }

    /// Creates the file that shows the counters of an open file. Dropping it removes it from
    /// debugfs.
    pub(crate) fn file<'a>(
        &'a self,
        name: &'a CStr,
        stats: Arc<FileStats>,
    ) -> impl PinInit<File<Arc<FileStats>>> + 'a {
        self.files
            .read_callback_file(name, stats, &|stats, f| show(stats.counters(), f))
    }
}
