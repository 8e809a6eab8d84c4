// SPDX-License-Identifier: GPL-2.0

//! The counters in debugfs: in `dummy_gpu/dummy_gpuN/stats` those of an instance, and in
//! `dummy_gpu/dummy_gpuN/files/TGID-ID` those of each open file of the process TGID, where ID tells
//! apart the files of one process.
//!
//! A line each: the name that the counter has in `struct dummy_gpu_stats`, and its value. Reads
//! counters, and nothing else.

use super::counters::{
    Account,
    Counters,
    NAMES, //
};
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
    }, //
};

fn show(counters: &Counters, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    for (name, value) in NAMES.iter().zip(counters.read()) {
        writeln!(f, "{name} {value}")?;
    }
    Ok(())
}

/// The directory of an instance.
pub(crate) struct InstanceDir {
    dir: Dir,
    files: Dir,
    next_id: Atomic<u64>,
}

impl InstanceDir {
    /// Creates the directory `name`.
    pub(crate) fn new(root: &Dir, name: &CStr) -> Self {
        let dir = root.subdir(name);

        Self {
            files: dir.subdir(c"files"),
            dir,
            next_id: Atomic::new(0),
        }
    }

    /// Shows the counters of the instance, for as long as the file is not dropped.
    pub(crate) fn instance(
        &self,
        counters: Arc<Counters>,
    ) -> impl PinInit<File<Arc<Counters>>> + '_ {
        self.dir
            .read_callback_file(c"stats", counters, &|counters, f| show(counters, f))
    }

    /// Names a file that the current process opens.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`].
    pub(crate) fn name_file(&self) -> Result<CString> {
        let id = self.next_id.fetch_add(1, Relaxed);

        CString::try_from_fmt(fmt!("{}-{}", current!().tgid(), id))
    }

    /// Shows the counters of an open file.
    pub(crate) fn file<'a>(
        &'a self,
        name: &'a CStr,
        account: Arc<Account>,
    ) -> impl PinInit<File<Arc<Account>>> + 'a {
        self.files
            .read_callback_file(name, account, &|account, f| show(account.counters(), f))
    }
}
