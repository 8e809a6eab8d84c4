// SPDX-License-Identifier: GPL-2.0

//! The mirrored address space in use: what a task holds while it faults and migrates pages of it.
//!
//! A GPU reports a page fault by an interrupt, and often no task of the process waits for it. So
//! any task may act for the process, a work item above all. It takes a reference to `mm_users`, so
//! that the address space stays, as mm does for a remote access such as `access_remote_vm()`. And
//! it charges memory to the process, not to itself.

use super::{
    callback::Callback,
    mirror::Mirror, //
};
use core::mem::ManuallyDrop;
use kernel::{
    bindings,
    mm::{
        MmWithUser,
        MmWithUserAsync, //
    },
    prelude::*,
    sync::aref::ARef,
    types::NotThreadSafe, //
};

/// The address space of a [`Mirror`], for a task that faults or migrates pages of it.
///
/// While this exists, the address space is not torn down, even if the process exits. So hold it for
/// one fault or migration only, and never wait for the process with it.
///
/// Any task may hold it, a work item or a kthread too. The work is done for the process:
///
/// - Memory is charged to the memory cgroup of the process.
/// - A task that does not run in the address space gets what GUP gives for `FOLL_REMOTE`: the
///   protection keys of the process do not apply, since they belong to its threads.
/// - The memory policy of the process applies to VMAs that have one. Elsewhere the policy of the
///   current task applies.
/// - A fault handler may take as long as it likes. A page that a userfaultfd handles keeps the task
///   until the handler answers or goes. A task of user space can be killed then, a kernel thread
///   cannot. So use one work item for each process.
///
/// Dropping this never sleeps: if the process has gone meanwhile, a work item tears the address
/// space down.
pub struct MirroredMm<'a> {
    mirror: &'a Mirror,
    /// Dropped by [`mirrored_mm_drop`] only.
    mm: ManuallyDrop<ARef<MmWithUserAsync>>,
    _not_send: NotThreadSafe,
}

impl Mirror {
    /// Gets hold of the address space, to fault or migrate pages of it.
    ///
    /// # Context
    ///
    /// Any task. Does not sleep.
    ///
    /// # Errors
    ///
    /// - [`ESRCH`] if no process has the address space any more, because it has ended or called
    ///   exec().
    /// - [`EDEADLK`] if called from a callback or closure that this crate runs.
    #[inline(never)]
    #[export_name = "rust_hmm_mirror_mm"]
    pub fn mm(&self) -> Result<MirroredMm<'_>> {
        Callback::refuse()?;
        let mut users = self.users().lock();
        let mm = self.raw_mm().mmget_not_zero().ok_or(ESRCH)?;
        *users += 1;
        drop(users);
        let this = MirroredMm {
            mirror: self,
            mm: ManuallyDrop::new(MmWithUser::into_mmput_async(mm)),
            _not_send: NotThreadSafe,
        };
        // Otherwise tasks that take turns could keep an abandoned address space for ever.
        if this.is_abandoned() {
            return Err(ESRCH);
        }
        Ok(this)
    }
}

impl Drop for MirroredMm<'_> {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: This is the destructor: it runs once, and nothing uses `self` after it.
        unsafe { mirrored_mm_drop(self) };
    }
}

/// Drops the contents of `this`.
///
/// # Safety
///
/// This must be called only once, and `this` must not be used afterwards.
#[inline(never)]
#[export_name = "rust_hmm_mm_drop"]
unsafe fn mirrored_mm_drop(this: &mut MirroredMm<'_>) {
    let mut users = this.mirror.users().lock();
    *users -= 1;
    // This does not sleep.
    //
    // SAFETY: The caller calls this once and does not use `this` afterwards (see the # Safety
    // section).
    unsafe { ManuallyDrop::drop(&mut this.mm) };
}

impl<'a> MirroredMm<'a> {
    /// The mirror of the address space.
    pub(crate) fn mirror(&self) -> &'a Mirror {
        self.mirror
    }

    pub(crate) fn as_mm(&self) -> &MmWithUser {
        &self.mm
    }

    /// Whether the current task does not run in the address space.
    pub(crate) fn is_foreign(&self) -> bool {
        !self.mirror.is_current()
    }

    /// Whether nobody uses the address space any more but those who hold a [`MirroredMm`] of this
    /// mirror. Work for it is of no use then.
    pub(crate) fn is_abandoned(&self) -> bool {
        let ours = self.mirror.users().lock();
        // SAFETY: `mm` holds a reference to the mm. `mm_users` is only accessed atomically.
        let users = unsafe {
            bindings::atomic_read(&raw const (*self.mm.as_raw()).__bindgen_anon_1.mm_users)
        };
        users <= *ours
    }

    /// Calls `f` and returns what it returns. What `f` allocates with `__GFP_ACCOUNT`, as in
    /// [`GFP_KERNEL_ACCOUNT`], is charged to the process: a page table of the device, for example.
    ///
    /// # Context
    ///
    /// That of `f`, which may sleep and call any method of this type.
    ///
    /// # Errors
    ///
    /// Those of `f`.
    #[inline]
    pub fn charge<R>(&self, f: impl FnOnce() -> Result<R>) -> Result<R> {
        let mut f = Some(f);
        let mut result = None;
        mirrored_mm_charge(self, &mut || result = f.take().map(|f| f()));
        // `mirrored_mm_charge()` has called the closure.
        result.ok_or(EIO)?
    }

    /// Begins a call for the address space. Until the result is dropped, the kernel memory that
    /// this task allocates is charged to the process.
    ///
    /// # Errors
    ///
    /// [`EDEADLK`] while the core calls a driver.
    pub(crate) fn enter(&self) -> Result<Charge> {
        Callback::refuse()?;
        Ok(Charge::begin(self))
    }
}

#[inline(never)]
#[export_name = "rust_hmm_mm_charge"]
fn mirrored_mm_charge(mm: &MirroredMm<'_>, f: &mut dyn FnMut()) {
    let _charge = Charge::begin(mm);
    f();
}

/// The kernel memory that the current task allocates is charged to the memory cgroup of a mirrored
/// process, from [`Charge::begin`] until the value is dropped.
///
/// A task that runs in the address space charges its memory there anyway. This is a local variable
/// of the core, not a part of [`MirroredMm`], which a driver could forget.
///
/// # Invariants
///
/// The memory cgroup, if any, is the active one of the task, and this holds a reference to it.
pub(crate) struct Charge {
    /// The cgroup, and the one that was active before.
    memcgs: Option<(*mut bindings::mem_cgroup, *mut bindings::mem_cgroup)>,
    _not_send: NotThreadSafe,
}

impl Charge {
    fn begin(mm: &MirroredMm<'_>) -> Self {
        let memcgs = mm.is_foreign().then(|| {
            // SAFETY: The mm has users. It returns a reference to a memory cgroup, or null if there
            // are none in this kernel.
            let memcg = unsafe { bindings::get_mem_cgroup_from_mm(mm.as_mm().as_raw()) };
            // SAFETY: The reference keeps the cgroup until `drop()` has ended its use.
            (memcg, unsafe { bindings::set_active_memcg(memcg) })
        });
        // INVARIANT: The cgroup was made the active one just now.
        Self {
            memcgs,
            _not_send: NotThreadSafe,
        }
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        if let Some((memcg, before)) = self.memcgs {
            // SAFETY: `before` was active when this began, so somebody else keeps it.
            unsafe { bindings::set_active_memcg(before) };
            // SAFETY: The type invariants say that this holds a reference, which is not used
            // afterwards. mem_cgroup_put() allows null.
            unsafe { bindings::mem_cgroup_put(memcg) };
        }
    }
}
