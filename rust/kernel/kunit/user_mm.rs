// SPDX-License-Identifier: GPL-2.0

//! User memory for KUnit tests.
//!
//! `kunit_attach_mm()` keeps the address space until the thread of the test ends. [`with_user_mm`]
//! destroys it when a closure returns, so that a test can check what happens then.
//!
//! C header: [`include/kunit/test.h`](srctree/include/kunit/test.h)

use crate::{
    bindings,
    error::{
        from_err_ptr,
        to_result, //
    },
    mm::MmWithUser,
    prelude::*,
    types::NotThreadSafe, //
};
use core::ptr::{
    null_mut,
    NonNull, //
};

/// The address space of a test.
///
/// # Invariants
///
/// `mm` has users, and it is the address space of the current task, which runs a KUnit test.
pub struct UserMm {
    mm: NonNull<bindings::mm_struct>,
    // The methods act on the address space of the current task, so this must stay in that task.
    _nts: NotThreadSafe,
}

/// The protection of a mapping.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Prot {
    /// No access: `PROT_NONE`.
    None,
    /// Read access: `PROT_READ`.
    Read,
    /// Read and write access: `PROT_READ | PROT_WRITE`.
    ReadWrite,
}

impl Prot {
    fn as_raw(self) -> usize {
        let prot = match self {
            Prot::None => bindings::PROT_NONE,
            Prot::Read => bindings::PROT_READ,
            Prot::ReadWrite => bindings::PROT_READ | bindings::PROT_WRITE,
        };
        prot as usize
    }
}

/// Calls `f` while the current task uses a new and empty address space, as a kernel thread does
/// after `kthread_use_mm()`.
///
/// The address space is destroyed when `f` returns, unless something else holds a reference to its
/// `mm_users`. If a KUnit assertion fails in `f`, the thread ends, which drops the reference as
/// well.
///
/// # Errors
///
/// [`EINVAL`] if the current task does not run a KUnit test, [`EBUSY`] if it has an address space
/// already, [`ENOMEM`], and the errors of `f`.
///
/// # Examples
///
/// ```
/// use kernel::{
///     kunit::user_mm::{with_user_mm, Prot},
///     page::PAGE_SIZE,
///     uaccess::{UserPtr, UserSlice},
/// };
///
/// let value = with_user_mm(|mm| {
///     let addr = mm.mmap_anonymous(PAGE_SIZE, Prot::ReadWrite)?;
///     UserSlice::new(UserPtr::from_addr(addr), 8).writer().write(&42u64)?;
///     UserSlice::new(UserPtr::from_addr(addr), 8).reader().read::<u64>()
/// });
/// assert_eq!(value?, 42);
/// # Ok::<(), Error>(())
/// ```
pub fn with_user_mm<R: Send>(f: impl FnOnce(&UserMm) -> Result<R> + Send) -> Result<R> {
    if !super::in_kunit_test() {
        return Err(EINVAL);
    }
    if current!().mm().is_some() {
        return Err(EBUSY);
    }

    // SAFETY: The current task is the kernel thread of a KUnit test, and has no address space.
    to_result(unsafe { bindings::kunit_attach_mm() })?;
    let mm = NonNull::new(current!().mm().map_or(null_mut(), |mm| mm.as_raw())).ok_or(EINVAL)?;

    // INVARIANT: The current task runs a KUnit test. `kunit_attach_mm()` has created the mm with
    // one reference to `mm_users`, which is dropped below, after `f` has returned.
    let result = f(&UserMm {
        mm,
        _nts: NotThreadSafe,
    });

    // SAFETY: The current task uses `mm`. No `CurrentTask` that was obtained in `f`, and could give
    // access to `mm`, is left: it is not `Send`, so neither `f` nor its result can hold one.
    unsafe { bindings::kthread_unuse_mm(mm.as_ptr()) };
    // SAFETY: `kunit_attach_mm()` has taken the reference to `mm_users` that is dropped here.
    unsafe { bindings::mmput(mm.as_ptr()) };

    result
}

impl UserMm {
    /// The address space.
    pub fn mm(&self) -> &MmWithUser {
        // SAFETY: By the type invariants, `mm_users` is not zero while `self` exists.
        unsafe { MmWithUser::from_raw(self.mm.as_ptr()) }
    }

    /// Maps `len` bytes of private anonymous memory and returns the address.
    pub fn mmap_anonymous(&self, len: usize, prot: Prot) -> Result<usize> {
        // SAFETY: The file is null.
        unsafe { self.mmap(null_mut(), len, prot, bindings::MAP_PRIVATE) }
    }

    /// Maps the first `len` bytes of a new shmem file of `size` bytes, with `MAP_SHARED` if
    /// `shared` and else with `MAP_PRIVATE`, and returns the address.
    pub fn mmap_shmem(&self, len: usize, size: usize, prot: Prot, shared: bool) -> Result<usize> {
        let size = size.try_into()?;
        // SAFETY: The name is a C string.
        let file = from_err_ptr(unsafe {
            bindings::shmem_kernel_file_setup(c"kunit".as_char_ptr(), size, pin_init::zeroed())
        })?;
        let flags = if shared {
            bindings::MAP_SHARED
        } else {
            bindings::MAP_PRIVATE
        };
        // SAFETY: `file` is valid: `shmem_kernel_file_setup()` has returned no error.
        let addr = unsafe { self.mmap(file, len, prot, flags) };
        // SAFETY: `shmem_kernel_file_setup()` has taken the reference that is dropped here.
        unsafe { bindings::fput(file) };
        addr
    }

    /// # Safety
    ///
    /// `file` is null or valid.
    unsafe fn mmap(
        &self,
        file: *mut bindings::file,
        len: usize,
        prot: Prot,
        flags: u32,
    ) -> Result<usize> {
        let flags = match file.is_null() {
            true => flags | bindings::MAP_ANONYMOUS,
            false => flags,
        };
        // SAFETY: Any task may call `kunit_get_current_test()`.
        let test = unsafe { bindings::kunit_get_current_test() };
        let (prot, flags) = (prot.as_raw(), flags as usize);
        // SAFETY: `kunit_vm_mmap()` requires the test that the current task runs, which is `test`
        // because the task runs a KUnit test by the type invariants, and a file that is valid or
        // null, which the caller guarantees (see the `# Safety` section).
        match unsafe { bindings::kunit_vm_mmap(test, file, 0, len, prot, flags, 0) } {
            0 => Err(ENOMEM),
            addr => Ok(addr),
        }
    }

    /// Unmaps `len` bytes at `addr`.
    pub fn munmap(&self, addr: usize, len: usize) -> Result {
        // SAFETY: By the type invariants, the current task has an address space.
        to_result(unsafe { bindings::vm_munmap(addr, len) })
    }
}

#[cfg(CONFIG_RUST_KUNIT_SELFTEST)]
#[kunit_tests(rust_kunit_user_mm)]
mod tests {
    use super::*;
    use crate::{
        page::PAGE_SIZE,
        uaccess::{
            UserPtr,
            UserSlice, //
        },
    };

    fn write(addr: usize, value: u64) -> Result {
        UserSlice::new(UserPtr::from_addr(addr), 8)
            .writer()
            .write(&value)
    }

    fn read(addr: usize) -> Result<u64> {
        UserSlice::new(UserPtr::from_addr(addr), 8).reader().read()
    }

    #[test]
    fn memory_reads_back_what_was_written() -> Result {
        with_user_mm(|mm| {
            let anonymous = mm.mmap_anonymous(PAGE_SIZE, Prot::ReadWrite)?;
            let shared = mm.mmap_shmem(PAGE_SIZE, PAGE_SIZE, Prot::ReadWrite, true)?;
            for addr in [anonymous, shared] {
                assert_eq!(read(addr)?, 0);
                write(addr, 42)?;
                assert_eq!(read(addr)?, 42);
            }
            Ok(())
        })
    }

    #[test]
    fn memory_that_is_unmapped_or_protected_is_efault() -> Result {
        with_user_mm(|mm| {
            let addr = mm.mmap_anonymous(PAGE_SIZE, Prot::Read)?;
            assert_eq!(write(addr, 42), Err(EFAULT));
            mm.munmap(addr, PAGE_SIZE)?;
            assert_eq!(read(addr), Err(EFAULT));
            Ok(())
        })
    }

    #[test]
    fn an_error_of_mmap_is_no_address() -> Result {
        with_user_mm(|mm| {
            let len = usize::MAX & !(PAGE_SIZE - 1);
            assert_eq!(mm.mmap_anonymous(len, Prot::Read), Err(ENOMEM));
            assert_eq!(mm.mmap_anonymous(0, Prot::Read), Err(ENOMEM));
            Ok(())
        })
    }

    #[test]
    fn a_task_has_one_at_a_time_and_none_after_it() -> Result {
        with_user_mm(|mm| {
            assert!(current!()
                .mm()
                .is_some_and(|own| own.as_raw() == mm.mm().as_raw()));
            assert_eq!(with_user_mm(|_| Ok(())), Err(EBUSY));
            Ok(())
        })?;
        assert!(current!().mm().is_none());
        Ok(())
    }
}
