/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Shared by the tests of the dmirror nodes. Two drivers provide these nodes:
 * lib/test_hmm.c, which defines the ioctls, and dummy_gpu.
 */
#ifndef DMIRROR_USER_H
#define DMIRROR_USER_H

#include <lib/test_hmm_uapi.h>

#include "dummy_gpu_harness.h"

#define NODES	2

static inline int dmirror_open(unsigned int node)
{
	char path[40];

	/* The nodes of coherent memory come after the others. */
	snprintf(path, sizeof(path), "/dev/hmm_dmirror%u", node + (coherent() ? NODES : 0));
	return gpu_open(path);
}

/*
 * Runs a command on pages from p on, with ptr as its buffer. 0 or a negative
 * errno.
 */
static inline int dmirror(int fd, unsigned long request, const void *p, size_t pages, void *ptr)
{
	struct hmm_dmirror_cmd cmd = { .addr = gpu_addr(p), .ptr = gpu_addr(ptr), .npages = pages };
	int err;

	do {
		err = gpu_ioctl(fd, request, &cmd);
	} while (err == -EINTR);
	if (err)
		return err;

	switch (request) {
	case HMM_DMIRROR_READ:
	case HMM_DMIRROR_READ_UNLOCKED:
	case HMM_DMIRROR_WRITE:
	case HMM_DMIRROR_MIGRATE_TO_DEV:
	case HMM_DMIRROR_EXCLUSIVE:
	case HMM_DMIRROR_SNAPSHOT:
		return cmd.cpages == pages ? 0 : -EPROTO;
	}
	return 0;
}

/* Whether a snapshot reports the page in the memory of the same node. */
static inline bool dmirror_is_local(uint8_t seen)
{
	return (seen & 0xf0) == (coherent() ? HMM_DMIRROR_PROT_DEV_COHERENT_LOCAL :
					      HMM_DMIRROR_PROT_DEV_PRIVATE_LOCAL);
}

/* Whether the kernel has warned (W), oopsed (D), seen a bad page (B) or a lockup (L). */
static inline unsigned long kernel_trouble(void)
{
	const unsigned long trouble = 1UL << 9 | 1UL << 7 | 1UL << 5 | 1UL << 14;
	FILE *f = fopen("/proc/sys/kernel/tainted", "re");
	unsigned long tainted = 0;

	if (f) {
		if (fscanf(f, "%lu", &tainted) != 1)
			tainted = 0;
		fclose(f);
	}
	return tainted & trouble;
}

/* Opens the nodes in a setup. Without them, the test is skipped. */
static inline bool setup_nodes(struct __test_metadata *_metadata, int fd[NODES])
{
	page = sysconf(_SC_PAGESIZE);
	for (int i = 0; i < NODES; i++)
		fd[i] = -1;
	for (int i = 0; i < NODES; i++) {
		fd[i] = dmirror_open(i);
		if (fd[i] == -ENOENT || fd[i] == -ENODEV || fd[i] == -ENXIO)
			SKIP(return false, "no /dev/hmm_dmirror%d", i);
		ASSERT_LE(0, fd[i])
			TH_LOG("open /dev/hmm_dmirror%d: %s", i, strerror(-fd[i]));
	}
	return true;
}

#endif /* DMIRROR_USER_H */
