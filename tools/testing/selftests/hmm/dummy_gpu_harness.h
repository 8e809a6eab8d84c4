/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What the tests of the dummy GPU share, beside what all its programs do.
 */
#ifndef DUMMY_GPU_HARNESS_H
#define DUMMY_GPU_HARNESS_H

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "kselftest_harness.h"
#include "dummy_gpu_user.h"

#define KERNEL_ADDRESS	(~0ULL << 40)

/* Enough pages to need more than one window, with one window unaligned. */
#define BUFFER		(5UL << 20)

static size_t page;

static inline int gpu_open(const char *path)
{
	int fd = open(path, O_RDWR | O_CLOEXEC);

	return fd < 0 ? -errno : fd;
}

/* Runs one command: 0 or a negative errno. */
static inline int run(int fd, struct dummy_gpu_command command)
{
	struct dummy_gpu_submit submit = gpu_submission(&command, 1);
	int err = gpu_submit(fd, &submit);

	if (!err && (submit.completed != 1 || submit.fault_address))
		return -EPROTO;
	return err;
}

/* The sum of a vector as the device sees it, or GPU_UNTOUCHED on any error. */
static inline uint64_t gpu_sum(int fd, const void *p, size_t length)
{
	uint64_t sum;

	return run(fd, gpu_unary(DUMMY_GPU_OP_SUM, &sum, p, length)) ? GPU_UNTOUCHED : sum;
}

static inline void *map(size_t length, int prot)
{
	return mmap(NULL, length, prot, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}

static inline void *map_at(void *where, size_t length)
{
	return mmap(where, length, PROT_READ | PROT_WRITE,
		    MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
}

/* A file of the given length that is gone when it is closed. */
static inline int temporary_file(size_t length)
{
	char path[] = "/tmp/dummy_gpu_test.XXXXXX";
	int fd = mkstemp(path);

	if (fd < 0)
		return -errno;
	unlink(path);
	return ftruncate(fd, length) ? -errno : fd;
}

/* Waits for a child that must end by itself: its status, or -1 on timeout. */
static inline int wait_child(pid_t pid, int seconds)
{
	struct timespec tick = { .tv_nsec = 10 * 1000 * 1000 };
	int status;

	for (int i = 0; i < seconds * 100; i++) {
		if (waitpid(pid, &status, WNOHANG) == pid)
			return status;
		nanosleep(&tick, NULL);
	}
	return -1;
}

/* A token from one process or thread to another. */
static inline int token_send(int fd)
{
	return write(fd, "", 1) == 1 ? 0 : -EPIPE;
}

static inline int token_wait(int fd)
{
	char token;

	return read(fd, &token, 1) == 1 ? 0 : -EPIPE;
}

/* Opens the device in a setup. Without a device, the test is skipped. */
static inline int setup_device(struct __test_metadata *_metadata)
{
	int fd = gpu_open(GPU_DEVICE);

	page = sysconf(_SC_PAGESIZE);
	if (fd == -ENOENT || fd == -ENODEV || fd == -ENXIO)
		SKIP(return fd, "no " GPU_DEVICE);
	ASSERT_LE(0, fd)
		TH_LOG("open " GPU_DEVICE ": %s", strerror(-fd));
	return fd;
}

static inline int uffd_open(void)
{
	int fd = syscall(__NR_userfaultfd, O_CLOEXEC);

	return fd < 0 ? -errno : fd;
}

static inline int uffd_register(int fd, void *p, size_t length)
{
	struct uffdio_api api = { .api = UFFD_API };
	struct uffdio_register reg = {
		.range = { .start = gpu_addr(p), .len = length },
		.mode = UFFDIO_REGISTER_MODE_MISSING,
	};

	if (ioctl(fd, UFFDIO_API, &api) || ioctl(fd, UFFDIO_REGISTER, &reg))
		return -errno;
	return 0;
}

#endif /* DUMMY_GPU_HARNESS_H */
