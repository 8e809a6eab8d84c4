// SPDX-License-Identifier: GPL-2.0
/*
 * Fails the allocations of an operation, one at a time: the first, then the
 * second, until all were failed. Whichever it is, no byte may be lost, the error
 * must say that there was no memory, and the operation must succeed when it is
 * repeated.
 *
 * Run it on a kernel with KASAN, lockdep and kmemleak, which check the error
 * paths. iommufd_fail_nth.c tests iommufd in the same way.
 */
#include "dmirror_user.h"

#define PAGES		20	/* more than come back with one CPU fault */
#define PATTERN		0x5a
#define MOST		1000	/* allocations of an operation */

/* What an operation works on. It is set up anew for each allocation that fails. */
struct work {
	int gpu;
	int node;
	uint8_t *p;
	size_t length;
	uint64_t *result;	/* in shared memory, which does not migrate */
	int pipe[2];
};

/* Opens one more file, which gets its mirror with the first ioctl. */
static int open_and_close(struct work *work)
{
	int fd = gpu_open(GPU_DEVICE), err;

	if (fd < 0)
		return fd;
	err = gpu_advise(fd, work->p, work->length, DUMMY_GPU_POLICY_SYSTEM);
	close(fd);
	return err;
}

static int device_reads(struct work *work)
{
	return run(work->gpu, gpu_unary(DUMMY_GPU_OP_SUM, work->result, work->p, work->length));
}

static int device_writes(struct work *work)
{
	return run(work->gpu, gpu_fill(work->p, PATTERN, work->length));
}

static int prefetch(struct work *work, enum dummy_gpu_location location)
{
	int64_t moved = prefetch_all(work->gpu, work->p, work->length, location);

	return moved < 0 ? moved : 0;
}

static int to_device(struct work *work)
{
	return prefetch(work, DUMMY_GPU_LOCATION_DEVICE);
}

static int to_system(struct work *work)
{
	return prefetch(work, DUMMY_GPU_LOCATION_SYSTEM);
}

/* mm lets the CPU try again if there was no memory. */
static int cpu_reads(struct work *work)
{
	return cpu_load(work->p) == PATTERN ? 0 : -EIO;
}

/* For a system call some architectures try again, others return EFAULT. */
static int system_call_reads(struct work *work)
{
	uint8_t byte;

	if (write(work->pipe[1], work->p, 1) != 1)
		return -errno;
	return read(work->pipe[0], &byte, 1) == 1 && byte == PATTERN ? 0 : -EIO;
}

static int evict(struct work *work)
{
	return dmirror(work->node, HMM_DMIRROR_RELEASE, work->p, PAGES, NULL);
}

static int make_exclusive(struct work *work)
{
	return dmirror(work->node, HMM_DMIRROR_EXCLUSIVE, work->p, 1, work->result);
}

static int snapshot(struct work *work)
{
	uint8_t seen[PAGES];

	return dmirror(work->node, HMM_DMIRROR_SNAPSHOT, work->p, PAGES, seen);
}

FIXTURE(fail_nth)
{
	struct work work;
	int fail_nth;
};

FIXTURE_VARIANT(fail_nth)
{
	int (*operation)(struct work *work);
	bool touched;		/* the memory has the pattern */
	bool on_device;		/* and is in device memory */
	int error;		/* the errno of a failed allocation, or 0 for none */
};

FIXTURE_VARIANT_ADD(fail_nth, open_and_close) {
	.operation = open_and_close,
	.touched = true,
	.error = ENOMEM,
};

FIXTURE_VARIANT_ADD(fail_nth, device_reads) {
	.operation = device_reads,
	.touched = true,
	.error = ENOMEM,
};

FIXTURE_VARIANT_ADD(fail_nth, device_writes) {
	.operation = device_writes,
	.error = ENOMEM,
};

FIXTURE_VARIANT_ADD(fail_nth, to_device) {
	.operation = to_device,
	.touched = true,
	.error = ENOMEM,
};

FIXTURE_VARIANT_ADD(fail_nth, to_system) {
	.operation = to_system,
	.touched = true,
	.on_device = true,
	.error = ENOMEM,
};

FIXTURE_VARIANT_ADD(fail_nth, cpu_reads) {
	.operation = cpu_reads,
	.touched = true,
	.on_device = true,
};

FIXTURE_VARIANT_ADD(fail_nth, system_call_reads) {
	.operation = system_call_reads,
	.touched = true,
	.on_device = true,
	.error = EFAULT,
};

FIXTURE_VARIANT_ADD(fail_nth, evict) {
	.operation = evict,
	.touched = true,
	.on_device = true,
	.error = ENOMEM,
};

FIXTURE_VARIANT_ADD(fail_nth, make_exclusive) {
	.operation = make_exclusive,
	.touched = true,
	.error = ENOMEM,
};

FIXTURE_VARIANT_ADD(fail_nth, snapshot) {
	.operation = snapshot,
	.touched = true,
	.error = ENOMEM,
};

/* Lets any allocation fail, without a message for each. */
static bool allow_failures(void)
{
	static const char * const settings[][2] = {
		{ "failslab/ignore-gfp-wait", "N" },
		{ "failslab/verbose", "0" },
		{ "fail_page_alloc/ignore-gfp-wait", "N" },
		{ "fail_page_alloc/ignore-gfp-highmem", "N" },
		{ "fail_page_alloc/min-order", "0" },
		{ "fail_page_alloc/verbose", "0" },
	};
	bool allowed = true;

	for (size_t i = 0; i < ARRAY_SIZE(settings); i++) {
		char path[80];

		snprintf(path, sizeof(path), "/sys/kernel/debug/%s", settings[i][0]);
		allowed = write_to(path, settings[i][1]) && allowed;
	}
	return allowed;
}

FIXTURE_SETUP(fail_nth)
{
	size_t vram;
	int gpu, node;

	setup_vram(_metadata, &gpu, &vram, &self->work.result);
	if (gpu < 0 || !vram)
		return;
	close(gpu);
	node = dmirror_open(0);
	if (node == -ENOENT)
		SKIP(return, "no /dev/hmm_dmirror0");
	ASSERT_LE(0, node);
	close(node);
	if (!allow_failures())
		SKIP(return, "no fault injection in this kernel");
	self->fail_nth = open("/proc/thread-self/fail-nth", O_RDWR | O_CLOEXEC);
	ASSERT_LE(0, self->fail_nth);
	ASSERT_EQ(0, pipe2(self->work.pipe, O_CLOEXEC));
}

FIXTURE_TEARDOWN(fail_nth)
{
}

static void begin(struct __test_metadata *_metadata, struct work *work, bool touched,
		  bool on_device)
{
	work->length = PAGES * page;
	work->p = map(work->length, PROT_READ | PROT_WRITE);
	ASSERT_NE(MAP_FAILED, work->p);
	if (touched)
		memset(work->p, PATTERN, work->length);
	if (on_device) {
		int fd = gpu_open(GPU_DEVICE);

		/* By another file, so that the one of the operation knows nothing yet. */
		ASSERT_LE(0, fd);
		ASSERT_EQ(PAGES, prefetch_all(fd, work->p, work->length,
					      DUMMY_GPU_LOCATION_DEVICE));
		close(fd);
	}
	work->gpu = gpu_open(GPU_DEVICE);
	ASSERT_LE(0, work->gpu);
	work->node = dmirror_open(0);
	ASSERT_LE(0, work->node);
}

static void end(struct work *work)
{
	close(work->gpu);
	close(work->node);
	munmap(work->p, work->length);
}

/* Fails the n-th allocation of this task from now on. 0 fails none. */
static void fail(struct __test_metadata *_metadata, int fd, unsigned int n)
{
	char text[12];
	int length = snprintf(text, sizeof(text), "%u", n);

	ASSERT_EQ(length, pwrite(fd, text, length, 0));
}

/* Whether the allocation was failed. */
static bool has_failed(struct __test_metadata *_metadata, int fd)
{
	char text[12] = "";

	ASSERT_LT(0, pread(fd, text, sizeof(text) - 1, 0));
	return !atoi(text);
}

TEST_F(fail_nth, loses_nothing)
{
	struct work *work = &self->work;
	unsigned int n, errors = 0;
	bool failed = true;

	for (n = 1; failed; n++) {
		int err;

		ASSERT_GT(MOST, n);
		begin(_metadata, work, variant->touched, variant->on_device);
		fail(_metadata, self->fail_nth, n);
		err = variant->operation(work);
		failed = has_failed(_metadata, self->fail_nth);
		fail(_metadata, self->fail_nth, 0);

		if (err) {
			errors++;
			EXPECT_TRUE(failed);
			EXPECT_EQ(-variant->error, err) TH_LOG("allocation %u", n);
		}
		if (variant->touched)
			EXPECT_EQ(work->length, cpu_unlike(work->p, PATTERN, work->length))
				TH_LOG("allocation %u", n);
		EXPECT_EQ(0, variant->operation(work)) TH_LOG("after allocation %u", n);
		EXPECT_EQ(work->length / 8 * (PATTERN * 0x0101010101010101ULL),
			  gpu_sum(work->gpu, work->p, work->length));
		end(work);
		EXPECT_TRUE(instance_pages_become(0));
	}
	TH_LOG("%u allocations, %u errors", n - 2, errors);
	/* Allocations did fail, and each ioctl has some that it cannot do without. */
	EXPECT_LT(2, n);
	if (variant->error == ENOMEM)
		EXPECT_LT(0, errors);
}

TEST_HARNESS_MAIN
