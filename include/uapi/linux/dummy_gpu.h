/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
/*
 * Dummy GPU: commands on the virtual addresses of a process.
 *
 * This interface is not stable: it belongs to a driver for tests and may change
 * with the driver.
 */
#ifndef _UAPI_LINUX_DUMMY_GPU_H
#define _UAPI_LINUX_DUMMY_GPU_H

#include <linux/ioctl.h>
#include <linux/types.h>

/**
 * DOC: Overview
 *
 * Each instance of the device has a device node: /dev/dummy_gpu0 and so on.
 * open() binds the file to the address space of the calling task, and may fail
 * with ENOMEM. Commands take plain pointers into that address space. The memory
 * can be of any kind, and need not be registered, pinned or copied before. The
 * file can be inherited or passed to another process, or kept over exec(), but
 * is of little use there: an ioctl from a task with another mm fails with
 * EPERM. Only poll() works.
 *
 * All fields of the structures are __u64. Addresses, lengths and sizes are in
 * bytes.
 */

/**
 * DOC: General ioctl format
 *
 * Each ioctl takes a pointer to a structure. Its first field, @size, is the
 * size of the structure, set by the caller, and must be a multiple of 8. New
 * fields may be added at the end of the structure. If @size is larger than the
 * structure that the kernel knows, the rest must be zero. On success the kernel
 * writes the size that it knows to @size. It never writes beyond the caller's
 * @size.
 *
 * The following errors have the same meaning for every ioctl. The ioctl has no
 * effect then, and nothing is written back:
 *
 *  - ENOTTY: The ioctl is not known.
 *  - EPERM: The file was opened by a task with another mm.
 *  - EFAULT: The structure cannot be read or written.
 *  - EINVAL: @size is smaller than the first version of the structure or not a
 *    multiple of 8, or @flags has an unknown bit.
 *  - E2BIG: @size is larger than the structure that the kernel knows and the
 *    rest is not zero, or @size exceeds 4096.
 *  - ENOMEM: The first ioctl of a file could not allocate the state that the
 *    device needs for the address space.
 *
 * There are two exceptions for EFAULT. If only a part of the structure can be
 * written, that part may have been written. If the structure becomes unwritable
 * while the ioctl runs, the ioctl does its work and then fails with EFAULT.
 */

/* The type of all ioctls. */
#define DUMMY_GPU_IOC_TYPE	0xBB

/* The ioctl numbers. */
enum {
	DUMMY_GPU_CMD_INFO = 0x00,
	DUMMY_GPU_CMD_SUBMIT = 0x01,
	DUMMY_GPU_CMD_STATS = 0x02,
	DUMMY_GPU_CMD_PREFETCH = 0x03,
	DUMMY_GPU_CMD_ADVISE = 0x04,
	DUMMY_GPU_CMD_WAIT = 0x05,
};

/**
 * struct dummy_gpu_info - ioctl(DUMMY_GPU_IOC_INFO)
 * @size: sizeof(struct dummy_gpu_info)
 * @flags: Must be 0
 * @page_size: Output: size of a page in the device's page table
 * @window_size: Output: maximum length of the range that is mapped for one GPU
 *               page fault
 * @max_commands: Output: maximum @count of DUMMY_GPU_IOC_SUBMIT
 * @max_length: Output: maximum @length of a command
 * @vram_size: Output: size of the device's own memory, or 0 if it has none. All
 *             processes that use the instance share it.
 *
 * Get the limits of the device. They do not change while it exists.
 */
struct dummy_gpu_info {
	__u64 size;
	__u64 flags;
	__u64 page_size;
	__u64 window_size;
	__u64 max_commands;
	__u64 max_length;
	__u64 vram_size;
};

#define DUMMY_GPU_IOC_INFO _IO(DUMMY_GPU_IOC_TYPE, DUMMY_GPU_CMD_INFO)

/**
 * enum dummy_gpu_opcode - what a command does
 * @DUMMY_GPU_OP_FILL: Set @length bytes at @dst to the byte @value, which must
 *                     be at most 0xff.
 * @DUMMY_GPU_OP_COPY: Copy @length bytes from @src to @dst. The two must not
 *                     overlap.
 * @DUMMY_GPU_OP_ADD: Add two vectors of u64, element by element, modulo 2^64:
 *                    @dst = @src + @src2. The addresses and @length must be
 *                    multiples of 8.
 * @DUMMY_GPU_OP_XOR: Exclusive or of two vectors of bytes:
 *                    @dst = @src ^ @src2.
 * @DUMMY_GPU_OP_SUM: Add up, modulo 2^64, the u64 elements of the vector at
 *                    @src and write the sum to the u64 at @dst. The addresses
 *                    and @length must be multiples of 8.
 * @DUMMY_GPU_OP_CRC32: Write the CRC-32 (IEEE 802.3, as computed by zlib's
 *                      crc32()) of @length bytes at @src to the u64 at @dst,
 *                      which must be a multiple of 8. The upper half is zero.
 * @DUMMY_GPU_OP_HISTOGRAM: Count the values of the @length bytes at @src and
 *                          write the 256 counts to the u64 array at @dst,
 *                          which must be a multiple of 8. The old contents of
 *                          the array are overwritten.
 *
 * @DUMMY_GPU_OP_FETCH_ADD: Add @value, modulo 2^64, to the u64 at @src
 *                          atomically, and then write its old value to the u64
 *                          at @dst.
 * @DUMMY_GPU_OP_COMPARE_EXCHANGE: Replace the u64 at @src atomically by @value
 *                                 if it is equal to the u64 at @src2. In any
 *                                 case write its old value to the u64 at @dst
 *                                 then. @dst may be equal to @src2.
 *
 * FETCH_ADD and COMPARE_EXCHANGE are atomic for accesses by instructions of the
 * process's CPUs and by all devices that mirror the process. An access through
 * a reference to the page that was taken before (direct I/O, ptrace) is not
 * excluded. The page has to be one of private memory. If it is in the memory of
 * a device, it migrates to system memory. The addresses must be multiples of 8,
 * @length must be 8, and @dst must not be @src.
 *
 * For ADD and XOR, @dst may be equal to @src, to @src2 or to both, but must
 * not overlap either of them in part. SUM, CRC32 and HISTOGRAM write their
 * result after they have read all of @src, so it may lie inside @src.
 *
 * There is no opcode 0.
 */
enum dummy_gpu_opcode {
	DUMMY_GPU_OP_FILL = 1,
	DUMMY_GPU_OP_COPY = 2,
	DUMMY_GPU_OP_ADD = 3,
	DUMMY_GPU_OP_XOR = 4,
	DUMMY_GPU_OP_SUM = 5,
	DUMMY_GPU_OP_CRC32 = 6,
	DUMMY_GPU_OP_HISTOGRAM = 7,
	DUMMY_GPU_OP_FETCH_ADD = 8,
	DUMMY_GPU_OP_COMPARE_EXCHANGE = 9,
};

/**
 * struct dummy_gpu_command - one command of DUMMY_GPU_IOC_SUBMIT
 * @opcode: One of enum dummy_gpu_opcode
 * @flags: Must be 0
 * @dst: Address of the destination or of the result
 * @src: Address of the source; must be 0 for FILL
 *       FETCH_ADD and COMPARE_EXCHANGE: of the u64 that they change
 * @src2: Address of the second source of ADD and XOR; otherwise must be 0
 *        but for COMPARE_EXCHANGE: address of the expected value
 * @length: Length of each source, or of the destination of FILL; from 1 to
 *          @max_length of struct dummy_gpu_info
 * @value: The byte that FILL writes; otherwise must be 0
 *         but for FETCH_ADD: the number to add; COMPARE_EXCHANGE: the new value
 * @reserved: Must be 0
 */
struct dummy_gpu_command {
	__u64 opcode;
	__u64 flags;
	__u64 dst;
	__u64 src;
	__u64 src2;
	__u64 length;
	__u64 value;
	__u64 reserved;
};

/**
 * struct dummy_gpu_submit - ioctl(DUMMY_GPU_IOC_SUBMIT)
 * @size: sizeof(struct dummy_gpu_submit)
 * @flags: 0 or DUMMY_GPU_SUBMIT_ASYNC
 * @commands: Address of an array of struct dummy_gpu_command
 * @count: Number of commands, from 1 to @max_commands of struct dummy_gpu_info
 * @command_size: sizeof(struct dummy_gpu_command), which is the distance from
 *                one command of the array to the next. It follows the rules for
 *                @size: if it is larger than the kernel knows, the rest of each
 *                command must be zero.
 * @completed: Output: number of commands that completed
 * @fault_address: Output: address that the device could not access, or 0
 * @sequence: Output: the number of the submission, with DUMMY_GPU_SUBMIT_ASYNC;
 *            otherwise, and on any error, 0
 *
 * Run an array of commands in order and wait for the end of the last one.
 * Commands of submissions that run at the same time are not ordered.
 *
 * The whole array is read and checked first. If a check fails, no command runs:
 *
 *  - EFAULT: The array cannot be read, or an operand reaches beyond the user
 *    address space.
 *  - EINVAL: @count or @command_size is out of range. Or, in a command, the
 *    opcode is unknown; @flags, @reserved or a field that the opcode does not
 *    use is not 0; @value is not a byte; @length is out of range; or an operand
 *    wraps, is not aligned as the opcode requires, or overlaps another operand
 *    in a way that the opcode does not allow.
 *  - E2BIG: @command_size is larger than the kernel knows and the rest of a
 *    command is not zero, or @command_size exceeds 4096.
 *  - ENOMEM: There is no memory for the array or for the state of the device.
 *
 * Then the commands run. The first command that fails ends the submission:
 *
 *  - EFAULT: An operand is not mapped or not readable.
 *  - EPERM: A destination is not writable.
 *  - EBUSY: The mapping of an operand kept changing until the time for retries
 *    was over.
 *    Or CPUs and other devices kept taking the page of an atomic operation.
 *  - EOPNOTSUPP: An atomic operation on shared memory, a page of a file or
 *    hugetlbfs, or with a kernel without CONFIG_RUST_HMM_DEVICE.
 *  - ENOMEM: There is no memory to service a GPU page fault.
 *  - EINTR: The task was killed. Other signals do not interrupt the wait.
 *
 * A command that fails may have written a part of its destination. It never
 * changes memory that is not writable. When the ioctl returns, no command of
 * the submission is running any more.
 *
 * Unless one of the general errors occurs, @size, @completed and @fault_address
 * are written back, also if a check or a command fails. If a command fails with
 * EFAULT, EPERM, EBUSY or ENOMEM, @fault_address is the first byte of an
 * operand that could not be accessed: the start of the operand or the start of
 * a page in it. Otherwise @fault_address is 0.
 * (EOPNOTSUPP is such an error too: @fault_address is that of the u64.)
 *
 * With DUMMY_GPU_SUBMIT_ASYNC the ioctl returns after the checks, and the
 * commands run later. DUMMY_GPU_IOC_WAIT returns their outcome. The submissions
 * that were made to a file in this way run one after the other, in the order of
 * their numbers, which start at 1. If one fails, the next one runs all the
 * same. They are not ordered with commands that are submitted without the flag.
 *
 * The process may use its memory, unmap it or exit meanwhile. The memory is
 * accessed as it is mapped when a command needs it, and the protection keys of
 * the submitting thread do not apply. When the last reference to the file is
 * closed, the command that runs ends after the page that it works on, no other
 * one starts, and all outcomes are lost. The two additional errors are:
 *
 *  - EAGAIN: 64 submissions of this file were not waited for yet.
 *  - ENFILE: 512 open files of this instance have submitted commands in this
 *    way.
 */
struct dummy_gpu_submit {
	__u64 size;
	__u64 flags;
	__u64 commands;
	__u64 count;
	__u64 command_size;
	__u64 completed;
	__u64 fault_address;
	__u64 sequence;
};

#define DUMMY_GPU_IOC_SUBMIT _IO(DUMMY_GPU_IOC_TYPE, DUMMY_GPU_CMD_SUBMIT)

/* A flag of DUMMY_GPU_IOC_SUBMIT: do not wait for the commands. */
#define DUMMY_GPU_SUBMIT_ASYNC	0x1

/**
 * struct dummy_gpu_wait - ioctl(DUMMY_GPU_IOC_WAIT)
 * @size: sizeof(struct dummy_gpu_wait)
 * @flags: Must be 0
 * @sequence: The number of a submission, from DUMMY_GPU_IOC_SUBMIT
 * @timeout: How long to wait at most, in nanoseconds of CLOCK_MONOTONIC. 0 does
 *           not wait, and values above 2^63 - 1, which are 292 years, count as
 *           this value. After ETIME and EINTR it is what is left of the time,
 *           so that the ioctl can be called again.
 * @completed: Output: number of commands that completed
 * @fault_address: Output: address that the device could not access, or 0
 * @ended: Output: 1 if the submission has ended, otherwise 0
 *
 * Wait for a submission that was made with DUMMY_GPU_SUBMIT_ASYNC, and get its
 * outcome: the ioctl returns, and writes to @completed and @fault_address, what
 * DUMMY_GPU_IOC_SUBMIT would have returned and written, and sets @ended to 1.
 * Each outcome can be got once. No command of the submission is running then.
 *
 * If @ended is 0, the error is not one of the submission:
 *
 *  - EINVAL: This file has no such submission, or its outcome was got before.
 *  - ETIME: The submission did not end in time.
 *  - EINTR: A signal arrived, and its handler does not restart system calls.
 *
 * The general errors do not change @ended: set it to 0 before the call.
 *
 * poll() reports POLLIN if there is an outcome to get, and POLLOUT if another
 * submission can be made.
 */
struct dummy_gpu_wait {
	__u64 size;
	__u64 flags;
	__u64 sequence;
	__u64 timeout;
	__u64 completed;
	__u64 fault_address;
	__u64 ended;
};

#define DUMMY_GPU_IOC_WAIT _IO(DUMMY_GPU_IOC_TYPE, DUMMY_GPU_CMD_WAIT)

/**
 * struct dummy_gpu_stats - ioctl(DUMMY_GPU_IOC_STATS)
 * @size: sizeof(struct dummy_gpu_stats)
 * @flags: Must be 0
 * @commands: Output: commands that completed
 * @bytes_read: Output: bytes that commands have read from memory
 * @bytes_written: Output: bytes that commands have written to memory
 * @faults: Output: GPU page faults, which are accesses that the entry in the
 *          device's page table does not permit, or that find no entry
 * @fault_batches: Output: ranges that were mapped to service GPU page faults,
 *                 one for each fault that was serviced successfully
 * @invalidations: Output: invalidations by the kernel of ranges that had a page
 *                 that the device could access
 * @unmaps: Output: invalidations because addresses were unmapped or moved
 * @protections: Output: invalidations because the access to pages changed
 * @clears: Output: invalidations because pages were replaced or taken away
 * @own_migrations: Output: invalidations because of migrations to or from the
 *                  device's own memory
 * @other_migrations: Output: the same, for the memory of another device
 * @exclusives: Output: invalidations because a page was made exclusive to this
 *              device or another one
 * @releases: Output: invalidations because the address space was torn down
 * @invalidated_pages: Output: pages that invalidations removed from the
 *                     device's page table
 * @retries: Output: times that a range was faulted again because an
 *           invalidation collided with the fault
 * @pages_mapped: Output: pages that are in the device's page table now
 * @pages_to_device: Output: pages that migrated to the device's memory
 * @large_to_device: Output: those of them that migrated as a part of a large
 *                   folio (a transparent huge page)
 * @pages_cpu_faulted: Output: pages that migrated back to system memory because
 *                     a CPU or another device touched them or a page near them,
 *                     or because the device must write to a page that is
 *                     copied on write, after fork() for example
 * @pages_evicted: Output: pages that were evicted to system memory, to make
 *                 room or because the device's memory was to be emptied
 * @pages_to_system: Output: pages that migrated back to system memory because
 *                   of PREFETCH or of the policy of their range
 * @large_to_system: Output: those of the pages that migrated back, in one of
 *                   these ways, as a part of a large folio
 * @device_pages: Output: pages that are in the device's memory now
 *
 * Get the counters of this open file. All of them are 0 at open().
 * @pages_mapped and @device_pages grow and shrink, the others only grow. A page
 * that migrates back counts for the file through which it had migrated to the
 * device. The counters are read one after the other, so they need not agree
 * with each other while commands run.
 */
struct dummy_gpu_stats {
	__u64 size;
	__u64 flags;
	__u64 commands;
	__u64 bytes_read;
	__u64 bytes_written;
	__u64 faults;
	__u64 fault_batches;
	__u64 invalidations;
	__u64 unmaps;
	__u64 protections;
	__u64 clears;
	__u64 own_migrations;
	__u64 other_migrations;
	__u64 exclusives;
	__u64 releases;
	__u64 invalidated_pages;
	__u64 retries;
	__u64 pages_mapped;
	__u64 pages_to_device;
	__u64 large_to_device;
	__u64 pages_cpu_faulted;
	__u64 pages_evicted;
	__u64 pages_to_system;
	__u64 large_to_system;
	__u64 device_pages;
};

#define DUMMY_GPU_IOC_STATS _IO(DUMMY_GPU_IOC_TYPE, DUMMY_GPU_CMD_STATS)

/**
 * DOC: Placement
 *
 * Each page of private memory can be either in system memory or in the device's
 * own memory. Private memory is anonymous memory, and those pages of a private
 * file mapping that the process has written to. Pages of other memory never
 * migrate to the device, and neither do pages of memory that KSM may merge
 * (MADV_MERGEABLE). Programs do not notice where a page is, other than by the
 * time that an access takes.
 *
 * A page migrates to the device's memory when a GPU page fault on it is
 * serviced and the policy of its address says so, or when PREFETCH asks for it.
 * Pages that were never touched are populated in the device's memory by a GPU
 * write and by PREFETCH, but not by a GPU read. A page migrates back to system
 * memory when a CPU touches it, when it is evicted to make room, when PREFETCH
 * or the policy says so, and at the latest when the device is removed. It does
 * not migrate back when the file is closed.
 *
 * A page that cannot migrate, because it is pinned or memory is short, is used
 * where it is.
 */

/**
 * enum dummy_gpu_location - where a page can be
 * @DUMMY_GPU_LOCATION_SYSTEM: System memory
 * @DUMMY_GPU_LOCATION_DEVICE: The device's own memory
 */
enum dummy_gpu_location {
	DUMMY_GPU_LOCATION_SYSTEM = 0,
	DUMMY_GPU_LOCATION_DEVICE = 1,
};

/**
 * struct dummy_gpu_prefetch - ioctl(DUMMY_GPU_IOC_PREFETCH)
 * @size: sizeof(struct dummy_gpu_prefetch)
 * @flags: Must be 0
 * @start: First address, a multiple of the page size
 * @length: Length of the range, a multiple of the page size, from one page to
 *          @max_length of struct dummy_gpu_info
 * @location: One of enum dummy_gpu_location
 * @done: Output: number of bytes, from @start on, that were handled
 * @pages: Output: number of pages in these bytes that migrated
 *
 * Migrate the pages of a range to @location. Pages that cannot migrate stay
 * where they are, which is not an error.
 *
 *  - EINVAL: @length is 0 or above @max_length, @start or @length is not
 *    aligned, the range wraps, or @location is unknown.
 *  - EFAULT: The range reaches beyond the user address space, or nothing is
 *    mapped at @start + @done.
 *  - ENODEV: The device has no memory of its own, or has lost it.
 *  - ENOMEM: The device's memory is full and nothing in it can be evicted,
 *    there is no free system memory, or the ioctl could not allocate its
 *    buffers.
 *  - EINTR: A signal arrived. Call the ioctl again for the rest of the range.
 *
 * @size, @done and @pages are written back unless one of the general errors
 * occurs.
 */
struct dummy_gpu_prefetch {
	__u64 size;
	__u64 flags;
	__u64 start;
	__u64 length;
	__u64 location;
	__u64 done;
	__u64 pages;
};

#define DUMMY_GPU_IOC_PREFETCH \
	_IO(DUMMY_GPU_IOC_TYPE, DUMMY_GPU_CMD_PREFETCH)

/**
 * enum dummy_gpu_policy - where a page migrates when the GPU faults it
 * @DUMMY_GPU_POLICY_DEVICE: To the device's memory. This is the default.
 * @DUMMY_GPU_POLICY_SYSTEM: To system memory.
 * @DUMMY_GPU_POLICY_NONE: The page stays where it is.
 */
enum dummy_gpu_policy {
	DUMMY_GPU_POLICY_DEVICE = 0,
	DUMMY_GPU_POLICY_SYSTEM = 1,
	DUMMY_GPU_POLICY_NONE = 2,
};

/**
 * struct dummy_gpu_advise - ioctl(DUMMY_GPU_IOC_ADVISE)
 * @size: sizeof(struct dummy_gpu_advise)
 * @flags: Must be 0
 * @start: First address, a multiple of the page size
 * @length: Length of the range, a multiple of the page size, at least one page
 * @policy: One of enum dummy_gpu_policy
 *
 * Set the policy for a range of addresses, for this open file. It does not
 * matter what is mapped there. The policy applies to future GPU page faults; no
 * page migrates now.
 *
 *  - EINVAL: @length is 0, @start or @length is not aligned, the range wraps,
 *    or @policy is unknown.
 *  - EFAULT: The range reaches beyond the user address space.
 *  - ENOSPC: More than 1024 ranges would have a policy other than the default.
 *  - ENOMEM: There is no memory to store the policy.
 *
 * @size is written back unless one of the first two errors or a general one
 * occurs.
 */
struct dummy_gpu_advise {
	__u64 size;
	__u64 flags;
	__u64 start;
	__u64 length;
	__u64 policy;
};

#define DUMMY_GPU_IOC_ADVISE _IO(DUMMY_GPU_IOC_TYPE, DUMMY_GPU_CMD_ADVISE)

#endif /* _UAPI_LINUX_DUMMY_GPU_H */
