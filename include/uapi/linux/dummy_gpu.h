/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
/*
 * Dummy GPU: commands on the virtual addresses of a process.
 */
#ifndef _UAPI_LINUX_DUMMY_GPU_H
#define _UAPI_LINUX_DUMMY_GPU_H

#include <linux/ioctl.h>
#include <linux/types.h>

/**
 * DOC: Overview
 *
 * Each instance of the device is a node, /dev/dummy_gpu0 and so on. open()
 * binds the file to the memory of the task that calls it. Commands take plain
 * pointers into that memory, wherever it comes from: nothing is registered,
 * pinned or copied. The file can be inherited or passed on, but not used: an
 * ioctl from a task with another mm fails with EPERM. open() fails with ENOMEM.
 *
 * All fields are __u64. Addresses, lengths and sizes are in bytes.
 */

/**
 * DOC: General ioctl format
 *
 * Each ioctl takes a pointer to a structure that starts with its own size, set
 * by the caller, and can grow at its end. @size must be a multiple of 8. If it
 * is larger than the structure that the kernel knows, the rest must be zero.
 * On success the kernel writes back the size that it knows; it never writes
 * beyond the caller's @size.
 *
 * These errors have the same meaning for every ioctl. Nothing is written back
 * and nothing runs:
 *
 *  - ENOTTY: The ioctl is not known.
 *  - EPERM: The file was opened by a task with another mm.
 *  - EFAULT: The structure cannot be read or written.
 *  - EINVAL: @size is smaller than the first version of the structure or no
 *    multiple of 8, or @flags has an unknown bit.
 *  - E2BIG: The structure is larger than the kernel knows and the rest is not
 *    zero, or @size exceeds 4096.
 *  - ENOMEM: The first ioctl of a file has found no memory for the page table of
 *    the device.
 *
 * Where only a part of the structure can be written, that part may have been.
 * Where the structure becomes unwritable while an ioctl is at work, EFAULT says
 * so at its end: the work is done.
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
};

/**
 * struct dummy_gpu_info - ioctl(DUMMY_GPU_IOC_INFO)
 * @size: sizeof(struct dummy_gpu_info)
 * @flags: Must be 0
 * @page_size: Output size of a page of the device's page table
 * @window_size: Output largest range that the service of one GPU page fault
 *               maps
 * @max_commands: Output largest @count of DUMMY_GPU_IOC_SUBMIT
 * @max_length: Output largest @length of a command
 * @vram_size: Output size of the device's own memory, or 0 if it has none. All
 *             processes that use the instance share it.
 *
 * The limits of the device. They do not change while it exists.
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
 * @DUMMY_GPU_OP_CRC32: Write the CRC-32 (IEEE 802.3, as zlib's crc32()) of
 *                      @length bytes at @src to the u64 at @dst, which must be
 *                      a multiple of 8. The upper half is zero.
 * @DUMMY_GPU_OP_HISTOGRAM: Count the values of the @length bytes at @src and
 *                          write the 256 counts to the u64 array at @dst,
 *                          which must be a multiple of 8. What the array held
 *                          before is lost.
 *
 * For ADD and XOR, @dst may be equal to @src, to @src2 or to both, but must
 * not overlap either of them in part. SUM, CRC32 and HISTOGRAM write their
 * result after they have read all of @src, so it may lie inside @src.
 *
 * 0 is no opcode.
 */
enum dummy_gpu_opcode {
	DUMMY_GPU_OP_FILL = 1,
	DUMMY_GPU_OP_COPY = 2,
	DUMMY_GPU_OP_ADD = 3,
	DUMMY_GPU_OP_XOR = 4,
	DUMMY_GPU_OP_SUM = 5,
	DUMMY_GPU_OP_CRC32 = 6,
	DUMMY_GPU_OP_HISTOGRAM = 7,
};

/**
 * struct dummy_gpu_command - one command of DUMMY_GPU_IOC_SUBMIT
 * @opcode: One of enum dummy_gpu_opcode
 * @flags: Must be 0
 * @dst: Address of the destination or of the result
 * @src: Address of the source; 0 for FILL
 * @src2: Address of the second source of ADD and XOR; else 0
 * @length: Bytes of each source, or of the destination of FILL; from 1 to
 *          @max_length of struct dummy_gpu_info
 * @value: The byte that FILL sets; else 0
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
 * @flags: Must be 0
 * @commands: Address of an array of struct dummy_gpu_command
 * @count: Number of commands, from 1 to @max_commands of struct dummy_gpu_info
 * @command_size: sizeof(struct dummy_gpu_command), the distance from one
 *                command of the array to the next. Subject to the rules for
 *                @size: the rest of each command must be zero.
 * @completed: Output number of commands that ran to their end
 * @fault_address: Output address that the device could not access, or 0
 *
 * Run an array of commands in order and wait for the end of the last. There is
 * no order between commands of submissions that run at the same time.
 *
 * The whole array is read and checked first. One bad command fails the ioctl
 * and no command runs:
 *
 *  - EFAULT: The array cannot be read, or an operand reaches beyond the user
 *    address space.
 *  - EINVAL: @count or @command_size is out of range; or, in a command, an
 *    opcode is unknown, a flag, @reserved or a field that the opcode does not
 *    use is not 0, @value is not a byte, @length is out of range, an operand
 *    wraps, is not aligned as the opcode asks, or overlaps another where it
 *    must not.
 *  - E2BIG: A command is larger than the kernel knows and the rest is not
 *    zero, or @command_size exceeds 4096.
 *  - ENOMEM: No memory for the array.
 *
 * Then the commands run. The first that fails ends the submission:
 *
 *  - EFAULT: An operand is not mapped, or not readable.
 *  - EPERM: A destination is not writable.
 *  - EBUSY: The mapping of an operand kept changing until the time for retries
 *    was over.
 *  - ENOMEM: No memory to service a GPU page fault.
 *  - EINTR: The task was killed. Other signals do not interrupt the wait.
 *
 * A command that fails may have written a part of its destination; memory that
 * is not writable is never changed. When the kernel returns, no command of the
 * submission runs any more.
 *
 * @size, @completed and @fault_address are written back unless one of the
 * general errors occurs: on success and also when a check or a command fails.
 * @fault_address is the first byte of the operand that could not be accessed,
 * for EFAULT, EPERM, EBUSY and ENOMEM of a command that ran: the start of the
 * operand or the start of a page in it. Otherwise it is 0.
 */
struct dummy_gpu_submit {
	__u64 size;
	__u64 flags;
	__u64 commands;
	__u64 count;
	__u64 command_size;
	__u64 completed;
	__u64 fault_address;
};

#define DUMMY_GPU_IOC_SUBMIT _IO(DUMMY_GPU_IOC_TYPE, DUMMY_GPU_CMD_SUBMIT)

/**
 * struct dummy_gpu_stats - ioctl(DUMMY_GPU_IOC_STATS)
 * @size: sizeof(struct dummy_gpu_stats)
 * @flags: Must be 0
 * @commands: Output commands that ran to their end
 * @bytes_read: Output bytes that commands have read from memory
 * @bytes_written: Output bytes that commands have written to memory
 * @faults: Output GPU page faults: accesses that found no entry, or none that
 *          permits the access, in the device's page table
 * @windows: Output ranges that were mapped to service a GPU page fault: at
 *           most one for each fault, none for a fault that failed
 * @invalidations: Output invalidations by the kernel, of ranges with a page that
 *                 the device could use
 * @invalidated_pages: Output pages that invalidations removed from the device's
 *                     page table
 * @retries: Output times that a range had to be faulted again because an
 *           invalidation came in between
 * @pages_mapped: Output pages in the device's page table now
 * @pages_to_device: Output pages that moved to the device's memory
 * @pages_touched: Output pages that moved back because a CPU touched them or a
 *                 page near them, or to be copied after a fork()
 * @pages_evicted: Output pages that moved back because their place was needed
 * @pages_to_system: Output pages that moved back because PREFETCH or the policy
 *                   of their range asked for it
 * @device_pages: Output pages in the device's memory now
 *
 * The counters of this open file. All but @pages_mapped and @device_pages start
 * at 0 at open() and only grow. A page that moves back counts for the file
 * through which it had moved to the device. They are read one by one: while
 * commands run, they need not agree with each other.
 */
struct dummy_gpu_stats {
	__u64 size;
	__u64 flags;
	__u64 commands;
	__u64 bytes_read;
	__u64 bytes_written;
	__u64 faults;
	__u64 windows;
	__u64 invalidations;
	__u64 invalidated_pages;
	__u64 retries;
	__u64 pages_mapped;
	__u64 pages_to_device;
	__u64 pages_touched;
	__u64 pages_evicted;
	__u64 pages_to_system;
	__u64 device_pages;
};

#define DUMMY_GPU_IOC_STATS _IO(DUMMY_GPU_IOC_TYPE, DUMMY_GPU_CMD_STATS)

/**
 * DOC: Placement
 *
 * Private memory can be in the device's own memory, in RAM or, page by page, in
 * both: anonymous memory, and what a process has written of a file that it has
 * mapped privately. Other memory is always in RAM, and so is what KSM may merge
 * (MADV_MERGEABLE). What a program reads and writes is the same.
 *
 * A page moves to the device's memory when a GPU page fault is serviced and the
 * policy of its address says so, or when PREFETCH does. Memory that was never
 * touched is populated there by a write and by PREFETCH, but not by a read. A
 * page moves back when a CPU touches it, when its place is needed for others,
 * when PREFETCH or the policy says so, and at the latest when the device goes.
 * It stays there when the file is closed.
 *
 * Where a page cannot move (someone has it pinned, or memory is short) it is used
 * where it is.
 */

/**
 * enum dummy_gpu_place - where memory can be
 * @DUMMY_GPU_PLACE_SYSTEM: RAM
 * @DUMMY_GPU_PLACE_DEVICE: The device's own memory
 */
enum dummy_gpu_place {
	DUMMY_GPU_PLACE_SYSTEM = 0,
	DUMMY_GPU_PLACE_DEVICE = 1,
};

/**
 * struct dummy_gpu_prefetch - ioctl(DUMMY_GPU_IOC_PREFETCH)
 * @size: sizeof(struct dummy_gpu_prefetch)
 * @flags: Must be 0
 * @start: First address, a multiple of the page size
 * @length: Bytes, a multiple of the page size, from 1 page to @max_length of
 *          struct dummy_gpu_info
 * @place: One of enum dummy_gpu_place
 * @done: Output bytes from @start on that were looked at
 * @pages: Output pages of those that moved
 *
 * Move memory. Pages that cannot move stay, without an error.
 *
 *  - EINVAL: @length is 0 or above @max_length, @start or @length is not
 *    aligned, the range wraps, or @place is unknown.
 *  - EFAULT: The range reaches beyond the user address space, or nothing is
 *    mapped at @start + @done.
 *  - ENODEV: The device has no memory of its own.
 *  - ENOMEM: The device's memory is full and nothing in it can be moved, there
 *    is no RAM to move to, or no memory to keep account.
 *  - EBUSY: The mapping kept changing until the time for retries was over.
 *  - EINTR: A signal arrived. The rest can be asked for again.
 *
 * @size, @done and @pages are written back unless one of the general errors
 * occurs.
 */
struct dummy_gpu_prefetch {
	__u64 size;
	__u64 flags;
	__u64 start;
	__u64 length;
	__u64 place;
	__u64 done;
	__u64 pages;
};

#define DUMMY_GPU_IOC_PREFETCH \
	_IO(DUMMY_GPU_IOC_TYPE, DUMMY_GPU_CMD_PREFETCH)

/**
 * enum dummy_gpu_policy - what a GPU page fault does to the place of memory
 * @DUMMY_GPU_POLICY_DEVICE: Move it to the device's memory. The default.
 * @DUMMY_GPU_POLICY_SYSTEM: Move it to RAM.
 * @DUMMY_GPU_POLICY_NONE: Leave it where it is.
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
 * @length: Bytes, a multiple of the page size, at least one page
 * @policy: One of enum dummy_gpu_policy
 *
 * Set the policy for a range of addresses, whatever is mapped there, for this
 * open file. It holds for GPU page faults to come; nothing moves now.
 *
 *  - EINVAL: @length is 0, @start or @length is not aligned, the range wraps,
 *    or @policy is unknown.
 *  - EFAULT: The range reaches beyond the user address space.
 *  - ENOSPC: There would be more than 1024 ranges with a policy of their own.
 *  - ENOMEM: No memory for the range.
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
