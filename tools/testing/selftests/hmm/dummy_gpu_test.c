// SPDX-License-Identifier: GPL-2.0
/*
 * Tests of the dummy GPU and, through it, of the Rust HMM core: commands on all
 * kinds of memory, all documented errors, and what must hold while the memory
 * changes under the device.
 */
#include <pthread.h>
#include <signal.h>
#include <sys/time.h>

#include "dummy_gpu_harness.h"

/* The size of a region of the core, which has a lock of its own. */
#define REGION		(512UL << 20)

/*
 * Commands, on each kind of memory.
 */
FIXTURE(memory)
{
	int fd;
	int file;
	uint8_t *p;
};

FIXTURE_VARIANT(memory)
{
	bool file;
	bool memfd;
	int flags;
};

FIXTURE_VARIANT_ADD(memory, anonymous)
{
	.flags = MAP_PRIVATE | MAP_ANONYMOUS,
};

FIXTURE_VARIANT_ADD(memory, anonymous_shared)
{
	.flags = MAP_SHARED | MAP_ANONYMOUS,
};

FIXTURE_VARIANT_ADD(memory, file_private)
{
	.file = true,
	.flags = MAP_PRIVATE,
};

FIXTURE_VARIANT_ADD(memory, file_shared)
{
	.file = true,
	.flags = MAP_SHARED,
};

FIXTURE_VARIANT_ADD(memory, memfd)
{
	.memfd = true,
	.flags = MAP_SHARED,
};

FIXTURE_SETUP(memory)
{
	self->fd = setup_device(_metadata);
	if (self->fd < 0)
		return;

	self->file = -1;
	if (variant->file) {
		self->file = temporary_file(BUFFER);
		ASSERT_LE(0, self->file);
	}
	if (variant->memfd) {
		self->file = memfd_create("dummy_gpu_test", MFD_CLOEXEC);
		ASSERT_LE(0, self->file);
		ASSERT_EQ(0, ftruncate(self->file, BUFFER));
	}
	self->p = mmap(NULL, BUFFER, PROT_READ | PROT_WRITE, variant->flags, self->file, 0);
	ASSERT_NE(MAP_FAILED, self->p);
}

FIXTURE_TEARDOWN(memory)
{
	munmap(self->p, BUFFER);
	close(self->file);
	close(self->fd);
}

TEST_F(memory, fill)
{
	const size_t at = 3 * page - 5, length = 2 * page + 11;

	ASSERT_EQ(0, run(self->fd, gpu_fill(self->p + at, 0xc3, length)));

	EXPECT_EQ(at, cpu_unlike(self->p, 0, at));
	EXPECT_EQ(length, cpu_unlike(self->p + at, 0xc3, length));
	EXPECT_EQ(page, cpu_unlike(self->p + at + length, 0, page));
}

TEST_F(memory, fill_all)
{
	ASSERT_EQ(0, run(self->fd, gpu_fill(self->p, 0x96, BUFFER)));
	EXPECT_EQ(BUFFER, cpu_unlike(self->p, 0x96, BUFFER));
}

TEST_F(memory, copy)
{
	uint8_t *src = self->p + page + 1, *dst = self->p + BUFFER / 2 + 7;
	const size_t length = 3 * page + 13;

	cpu_randomize(src, length, 1);
	ASSERT_EQ(0, run(self->fd, gpu_unary(DUMMY_GPU_OP_COPY, dst, src, length)));

	EXPECT_EQ(length, cpu_differs(dst, src, length));
	EXPECT_EQ(0, dst[-1]);
	EXPECT_EQ(0, dst[length]);
}

TEST_F(memory, add)
{
	const size_t length = 2 * page + 24, n = length / sizeof(uint64_t);
	uint64_t *a = (void *)(self->p + page - 8);
	uint64_t *b = (void *)(self->p + 8 * page - 16);
	uint64_t *c = (void *)(self->p + BUFFER / 2 - 24);
	uint64_t *expect = malloc(length);

	ASSERT_NE(NULL, expect);
	cpu_randomize(a, length, 2);
	cpu_randomize(b, length, 3);
	a[0] = ~0ULL;
	b[0] = 2;
	ASSERT_EQ(0, run(self->fd, gpu_binary(DUMMY_GPU_OP_ADD, c, a, b, length)));

	EXPECT_EQ(1, c[0]);
	for (size_t i = 0; i < n; i++)
		expect[i] = a[i] + b[i];
	EXPECT_EQ(length, cpu_differs(c, expect, length));
	EXPECT_EQ(0, c[-1]);
	EXPECT_EQ(0, c[n]);
	free(expect);
}

TEST_F(memory, xor)
{
	const size_t length = 2 * page + 3;
	uint8_t *a = self->p + page - 1, *b = self->p + 8 * page - 2;
	uint8_t *c = self->p + BUFFER / 2 - 3;
	uint8_t *expect = malloc(length);

	ASSERT_NE(NULL, expect);
	cpu_randomize(a, length, 4);
	cpu_randomize(b, length, 5);
	ASSERT_EQ(0, run(self->fd, gpu_binary(DUMMY_GPU_OP_XOR, c, a, b, length)));

	for (size_t i = 0; i < length; i++)
		expect[i] = a[i] ^ b[i];
	EXPECT_EQ(length, cpu_differs(c, expect, length));
	EXPECT_EQ(0, c[-1]);
	EXPECT_EQ(0, c[length]);
	free(expect);
}

TEST_F(memory, sum)
{
	uint64_t *result = (void *)(self->p + BUFFER - 2 * page);
	uint64_t *src = (void *)(self->p + page - 8);
	const size_t length = 3 * page + 16;

	cpu_randomize(src, length, 6);
	ASSERT_EQ(0, run(self->fd, gpu_unary(DUMMY_GPU_OP_SUM, result, src, length)));
	EXPECT_EQ(cpu_sum(src, length), *result);
	EXPECT_EQ(0, result[1]);
}

TEST_F(memory, crc32)
{
	uint64_t *result = (void *)(self->p + BUFFER - 2 * page);
	const size_t length = 3 * page + 1;
	uint8_t *src = self->p + page - 3;

	memcpy(src, "123456789", 9);
	*result = ~0ULL;
	ASSERT_EQ(0, run(self->fd, gpu_unary(DUMMY_GPU_OP_CRC32, result, src, 9)));
	EXPECT_EQ(0xcbf43926, *result);

	cpu_randomize(src, length, 7);
	ASSERT_EQ(0, run(self->fd, gpu_unary(DUMMY_GPU_OP_CRC32, result, src, length)));
	EXPECT_EQ(cpu_crc32(src, length), *result);
	EXPECT_EQ(0, result[1]);
}

TEST_F(memory, histogram)
{
	/* The result crosses a page boundary, too. */
	uint64_t *result = (void *)(self->p + BUFFER - 2 * page - 1024);
	uint64_t expect[GPU_BUCKETS];
	const size_t length = 3 * page + 5;
	uint8_t *src = self->p + page - 3;

	cpu_randomize(src, length, 8);
	cpu_histogram(expect, src, length);
	memset(result, 0xff, sizeof(expect));
	ASSERT_EQ(0, run(self->fd, gpu_unary(DUMMY_GPU_OP_HISTOGRAM, result, src, length)));
	EXPECT_EQ(sizeof(expect), cpu_differs(result, expect, sizeof(expect)));
	EXPECT_EQ(0, result[GPU_BUCKETS]);
}

/*
 * Files: device writes reach the file if, and only if, the mapping is shared.
 */
FIXTURE(file)
{
	int fd;
	int file;
	uint8_t *p;
	uint8_t *content;
};

FIXTURE_VARIANT(file)
{
	int flags;
};

FIXTURE_VARIANT_ADD(file, private)
{
	.flags = MAP_PRIVATE,
};

FIXTURE_VARIANT_ADD(file, shared)
{
	.flags = MAP_SHARED,
};

FIXTURE_SETUP(file)
{
	self->fd = setup_device(_metadata);
	if (self->fd < 0)
		return;

	self->content = malloc(2 * page);
	ASSERT_NE(NULL, self->content);
	memset(self->content, 0x11, 2 * page);

	self->file = temporary_file(2 * page);
	ASSERT_LE(0, self->file);
	ASSERT_EQ((ssize_t)(2 * page), pwrite(self->file, self->content, 2 * page, 0));

	self->p = mmap(NULL, 2 * page, PROT_READ | PROT_WRITE, variant->flags, self->file, 0);
	ASSERT_NE(MAP_FAILED, self->p);
}

FIXTURE_TEARDOWN(file)
{
	munmap(self->p, 2 * page);
	close(self->file);
	close(self->fd);
	free(self->content);
}

TEST_F(file, device_writes)
{
	const size_t at = page / 2;

	EXPECT_EQ(2 * page / 8 * 0x1111111111111111ULL, gpu_sum(self->fd, self->p, 2 * page));
	ASSERT_EQ(0, run(self->fd, gpu_fill(self->p + at, 0x22, page)));
	EXPECT_EQ(at, cpu_unlike(self->p, 0x11, at));
	EXPECT_EQ(page, cpu_unlike(self->p + at, 0x22, page));

	ASSERT_EQ((ssize_t)(2 * page), pread(self->file, self->content, 2 * page, 0));
	EXPECT_EQ(at, cpu_unlike(self->content, 0x11, at));
	EXPECT_EQ(page, cpu_unlike(self->content + at,
				   variant->flags == MAP_SHARED ? 0x22 : 0x11, page));
}

TEST_F(file, others_write)
{
	EXPECT_EQ(page / 8 * 0x1111111111111111ULL, gpu_sum(self->fd, self->p, page));
	memset(self->content, 0x33, page);
	ASSERT_EQ((ssize_t)page, pwrite(self->file, self->content, page, 0));
	EXPECT_EQ(page / 8 * 0x3333333333333333ULL, gpu_sum(self->fd, self->p, page));
}

/*
 * Beyond the end of the file, where the CPU gets SIGBUS, a command fails with
 * EFAULT.
 */
TEST_F(file, truncate)
{
	uint64_t sum = GPU_UNTOUCHED;
	struct dummy_gpu_command command =
		gpu_unary(DUMMY_GPU_OP_SUM, &sum, self->p, 2 * page);
	struct dummy_gpu_submit submit = gpu_submission(&command, 1);

	EXPECT_EQ(2 * page / 8 * 0x1111111111111111ULL, gpu_sum(self->fd, self->p, 2 * page));
	ASSERT_EQ(0, ftruncate(self->file, page));
	EXPECT_EQ(-EFAULT, gpu_submit(self->fd, &submit));
	EXPECT_EQ(0, submit.completed);
	EXPECT_EQ(gpu_addr(self->p + page), submit.fault_address);
	EXPECT_EQ(GPU_UNTOUCHED, sum);
	EXPECT_EQ(page / 8 * 0x1111111111111111ULL, gpu_sum(self->fd, self->p, page));

	/* The file grows again: its new page is zero. */
	ASSERT_EQ(0, ftruncate(self->file, 2 * page));
	EXPECT_EQ(page / 8 * 0x1111111111111111ULL, gpu_sum(self->fd, self->p, 2 * page));
}

/*
 * The interface: what is checked before anything runs.
 */
FIXTURE(uapi)
{
	int fd;
	struct dummy_gpu_info info;
	uint8_t *p;
};

FIXTURE_SETUP(uapi)
{
	self->fd = setup_device(_metadata);
	if (self->fd < 0)
		return;
	ASSERT_EQ(0, gpu_info(self->fd, &self->info));
	self->p = map(16 * page, PROT_READ | PROT_WRITE);
	ASSERT_NE(MAP_FAILED, self->p);
}

FIXTURE_TEARDOWN(uapi)
{
	munmap(self->p, 16 * page);
	close(self->fd);
}

TEST_F(uapi, info)
{
	EXPECT_EQ(sizeof(self->info), self->info.size);
	EXPECT_EQ(0, self->info.flags);
	EXPECT_EQ(page, self->info.page_size);
	EXPECT_LE(page, self->info.window_size);
	EXPECT_EQ(0, self->info.window_size % page);
	EXPECT_LE(2, self->info.max_commands);
	EXPECT_LE(BUFFER, self->info.max_length);
	EXPECT_EQ(0, self->info.vram_size % page);
}

/* The rules for all structures that start with size and flags. */
struct extensible {
	unsigned long request;
	uint64_t known;
};

static const struct extensible extensible[] = {
	{ DUMMY_GPU_IOC_INFO, sizeof(struct dummy_gpu_info) },
	{ DUMMY_GPU_IOC_SUBMIT, sizeof(struct dummy_gpu_submit) },
	{ DUMMY_GPU_IOC_STATS, sizeof(struct dummy_gpu_stats) },
	{ DUMMY_GPU_IOC_PREFETCH, sizeof(struct dummy_gpu_prefetch) },
	{ DUMMY_GPU_IOC_ADVISE, sizeof(struct dummy_gpu_advise) },
};

#define MAX_SIZE	4096

TEST_F(uapi, unknown_ioctl)
{
	uint64_t words[MAX_SIZE / 8] = { 0 };

	for (unsigned int nr = DUMMY_GPU_CMD_WAIT + 1; nr < 0x100; nr++) {
		EXPECT_EQ(-ENOTTY, gpu_ioctl(self->fd, _IO(DUMMY_GPU_IOC_TYPE, nr), words))
			TH_LOG("number %#x", nr);
	}
	for (size_t i = 0; i < ARRAY_SIZE(extensible); i++) {
		unsigned int nr = _IOC_NR(extensible[i].request), size = extensible[i].known;

		words[0] = size;
		EXPECT_EQ(-ENOTTY,
			  gpu_ioctl(self->fd, _IO(DUMMY_GPU_IOC_TYPE + 1, nr), words));
		EXPECT_EQ(-ENOTTY, gpu_ioctl(self->fd, _IOC(_IOC_READ, DUMMY_GPU_IOC_TYPE,
							    nr, size), words));
		EXPECT_EQ(-ENOTTY, gpu_ioctl(self->fd, _IOC(_IOC_READ | _IOC_WRITE,
							    DUMMY_GPU_IOC_TYPE, nr, size),
					     words));
		EXPECT_EQ(size, words[0]);
		EXPECT_EQ(sizeof(words) - 8, cpu_unlike(words + 1, 0, sizeof(words) - 8));
	}
}

/* Prepares a structure of this size with valid fields. */
static void prepare(uint64_t *words, const struct extensible *e,
		    const struct dummy_gpu_command *command, uint64_t size)
{
	struct dummy_gpu_submit submit = gpu_submission(command, 1);
	struct dummy_gpu_prefetch prefetch = { .start = command->dst, .length = page };
	struct dummy_gpu_advise advise = { .start = command->dst, .length = page };

	memset(words, 0, 2 * MAX_SIZE);
	if (e->request == DUMMY_GPU_IOC_SUBMIT)
		memcpy(words, &submit, sizeof(submit));
	if (e->request == DUMMY_GPU_IOC_PREFETCH)
		memcpy(words, &prefetch, sizeof(prefetch));
	if (e->request == DUMMY_GPU_IOC_ADVISE)
		memcpy(words, &advise, sizeof(advise));
	words[0] = size;
}

TEST_F(uapi, struct_size)
{
	struct dummy_gpu_command command = gpu_fill(self->p, 0xee, page);
	uint64_t words[2 * MAX_SIZE / 8], before[2 * MAX_SIZE / 8];

	for (size_t i = 0; i < ARRAY_SIZE(extensible); i++) {
		const struct extensible *e = &extensible[i];
		const struct {
			uint64_t size;
			int err;
		} bad[] = {
			{ 0, -EINVAL },
			{ 8, -EINVAL },
			{ e->known - 8, -EINVAL },
			{ e->known - 1, -EINVAL },
			{ e->known + 1, -EINVAL },
			{ e->known + 4, -EINVAL },
			{ MAX_SIZE + 8, -E2BIG },
			{ 1ULL << 32, -E2BIG },
			{ ~7ULL, -E2BIG },
		};

		for (size_t j = 0; j < ARRAY_SIZE(bad); j++) {
			prepare(words, e, &command, bad[j].size);
			memcpy(before, words, sizeof(words));
			EXPECT_EQ(bad[j].err, gpu_ioctl(self->fd, e->request, words))
				TH_LOG("ioctl %zu, size %llu", i,
				       (unsigned long long)bad[j].size);
			EXPECT_EQ(sizeof(words), cpu_differs(words, before, sizeof(words)));
		}
	}
	EXPECT_EQ(page, cpu_unlike(self->p, 0, page));
}

TEST_F(uapi, struct_larger)
{
	struct dummy_gpu_command command = gpu_fill(self->p, 0xee, page);
	uint64_t words[2 * MAX_SIZE / 8], before[2 * MAX_SIZE / 8];

	for (size_t i = 0; i < ARRAY_SIZE(extensible); i++) {
		const struct extensible *e = &extensible[i];
		const bool moves = e->request == DUMMY_GPU_IOC_PREFETCH;
		const int good = moves && !self->info.vram_size ? -ENODEV : 0;

		for (uint64_t size = e->known + 8; size <= MAX_SIZE;
		     size += size == e->known + 8 ? MAX_SIZE - size : 8) {
			/*
			 * A nonzero word at the start and at the end of the
			 * rest.
			 */
			for (int last = 0; last < 2; last++) {
				prepare(words, e, &command, size);
				words[last ? size / 8 - 1 : e->known / 8] = 1ULL << 63;
				memcpy(before, words, sizeof(words));
				EXPECT_EQ(-E2BIG, gpu_ioctl(self->fd, e->request, words))
					TH_LOG("ioctl %zu, size %llu", i,
					       (unsigned long long)size);
				EXPECT_EQ(sizeof(words),
					  cpu_differs(words, before, sizeof(words)));
			}
			EXPECT_EQ(page, cpu_unlike(self->p, 0, page));

			/*
			 * The rest is zero. Words after the structure do not
			 * matter.
			 */
			prepare(words, e, &command, size);
			words[size / 8] = 1;
			EXPECT_EQ(good, gpu_ioctl(self->fd, e->request, words));
			EXPECT_EQ(e->known, words[0]);
			EXPECT_EQ(size - e->known,
				  cpu_unlike((uint8_t *)words + e->known, 0, size - e->known));
			EXPECT_EQ(1, words[size / 8]);
			if (e->request == DUMMY_GPU_IOC_SUBMIT) {
				EXPECT_EQ(page, cpu_unlike(self->p, 0xee, page));
				memset(self->p, 0, page);
			}
		}
	}
}

TEST_F(uapi, struct_flags)
{
	struct dummy_gpu_command command = gpu_fill(self->p, 0xee, page);
	uint64_t words[2 * MAX_SIZE / 8], before[2 * MAX_SIZE / 8];

	for (size_t i = 0; i < ARRAY_SIZE(extensible); i++) {
		const struct extensible *e = &extensible[i];

		for (int bit = 0; bit < 64; bit++) {
			/* The only flag that there is. */
			if (e->request == DUMMY_GPU_IOC_SUBMIT &&
			    1ULL << bit == DUMMY_GPU_SUBMIT_ASYNC)
				continue;
			prepare(words, e, &command, e->known);
			words[1] = 1ULL << bit;
			memcpy(before, words, sizeof(words));
			EXPECT_EQ(-EINVAL, gpu_ioctl(self->fd, e->request, words))
				TH_LOG("ioctl %zu, bit %d", i, bit);
			EXPECT_EQ(sizeof(words), cpu_differs(words, before, sizeof(words)));
		}
	}
	EXPECT_EQ(page, cpu_unlike(self->p, 0, page));
}

TEST_F(uapi, struct_address)
{
	const struct dummy_gpu_stats before = stats_of(_metadata, self->fd);
	struct dummy_gpu_command command = gpu_fill(self->p, 0xee, page);
	uint64_t words[2 * MAX_SIZE / 8];

	ASSERT_EQ(0, munmap(self->p + 2 * page, page));
	for (size_t i = 0; i < ARRAY_SIZE(extensible); i++) {
		const struct extensible *e = &extensible[i];
		uint8_t *edge = self->p + 2 * page - e->known + 8;

		EXPECT_EQ(-EFAULT, gpu_ioctl(self->fd, e->request, NULL));
		EXPECT_EQ(-EFAULT, gpu_ioctl(self->fd, e->request, (void *)KERNEL_ADDRESS));
		EXPECT_EQ(-EFAULT, gpu_ioctl(self->fd, e->request, (void *)-8UL));

		/* All words except the last one can be read. */
		prepare(words, e, &command, e->known);
		memcpy(edge, words, e->known - 8);
		EXPECT_EQ(-EFAULT, gpu_ioctl(self->fd, e->request, edge));
		EXPECT_EQ(e->known - 8, cpu_differs(edge, words, e->known - 8));
	}
	EXPECT_EQ(page, cpu_unlike(self->p, 0, page));
	expect_idle(_metadata, self->fd, &before);
}

/* If the results cannot be written, nothing is done. */
TEST_F(uapi, struct_read_only)
{
	const struct dummy_gpu_stats before = stats_of(_metadata, self->fd);
	struct dummy_gpu_command command = gpu_fill(self->p, 0xee, page);
	uint8_t *last = self->p + 15 * page, *edge;
	uint64_t words[2 * MAX_SIZE / 8];

	for (size_t i = 0; i < ARRAY_SIZE(extensible); i++) {
		const struct extensible *e = &extensible[i];

		prepare(words, e, &command, e->known);
		ASSERT_EQ(0, mprotect(last, page, PROT_READ | PROT_WRITE));
		memcpy(last, words, e->known);
		ASSERT_EQ(0, mprotect(last, page, PROT_READ));
		EXPECT_EQ(-EFAULT, gpu_ioctl(self->fd, e->request, last)) TH_LOG("ioctl %zu", i);
		EXPECT_EQ(e->known, cpu_differs(last, words, e->known));

		/*
		 * The same if only the last word is read-only. ADVISE writes
		 * only the first word.
		 */
		if (e->request == DUMMY_GPU_IOC_ADVISE)
			continue;
		edge = last - e->known + 8;
		ASSERT_EQ(0, mprotect(last, page, PROT_READ | PROT_WRITE));
		memcpy(edge, words, e->known);
		ASSERT_EQ(0, mprotect(last, page, PROT_READ));
		EXPECT_EQ(-EFAULT, gpu_ioctl(self->fd, e->request, edge)) TH_LOG("ioctl %zu", i);
		EXPECT_EQ(words[e->known / 8 - 1], *(uint64_t *)last);
	}
	EXPECT_EQ(page, cpu_unlike(self->p, 0, page));
	expect_idle(_metadata, self->fd, &before);
}

/*
 * Bad commands. Each comes second, after a good one, and between runs the
 * memory is looked at: nothing must have run.
 */
struct bad_command {
	const char *what;
	struct dummy_gpu_command command;
	int err;
};

static void expect_bad(struct __test_metadata *_metadata, int fd, uint8_t *p,
		       const struct bad_command *bad, size_t count)
{
	const struct dummy_gpu_stats before = stats_of(_metadata, fd);
	const size_t length = 16 * page;

	ASSERT_NE(0, count);
	memset(p, 0x77, length);
	for (size_t i = 0; i < count; i++) {
		struct dummy_gpu_command commands[] = {
			gpu_fill(p, 0xee, 8),
			bad[i].command,
		};
		struct dummy_gpu_submit submit = gpu_submission(commands, 2);

		EXPECT_EQ(bad[i].err, gpu_submit(fd, &submit)) TH_LOG("%s", bad[i].what);
		EXPECT_EQ(0, submit.completed) TH_LOG("%s", bad[i].what);
		EXPECT_EQ(0, submit.fault_address) TH_LOG("%s", bad[i].what);
		EXPECT_EQ(length, cpu_unlike(p, 0x77, length)) {
			TH_LOG("%s: memory has changed", bad[i].what);
			memset(p, 0x77, length);
		}
	}
	expect_idle(_metadata, fd, &before);
}

/* A command that differs from a good one in the given fields. */
#define CMD(_opcode, ...) { .opcode = DUMMY_GPU_OP_##_opcode, __VA_ARGS__ }

TEST_F(uapi, command_fields)
{
	const uint64_t a = gpu_addr(self->p), b = a + page, c = b + page, n = 64;
	const struct bad_command bad[] = {
		{ "opcode 0", { .opcode = 0, .dst = c, .length = n }, -EINVAL },
		{ "opcode 99", { .opcode = 99, .dst = c, .length = n }, -EINVAL },
		{ "opcode 2^32 + FILL", { .opcode = (1ULL << 32) + DUMMY_GPU_OP_FILL,
		  .dst = c, .length = n }, -EINVAL },
		{ "all zero", { 0 }, -EINVAL },
		{ "FILL: flags", CMD(FILL, .flags = 1, .dst = c, .length = n), -EINVAL },
		{ "FILL: high flag",
		  CMD(FILL, .flags = 1ULL << 63, .dst = c, .length = n), -EINVAL },
		{ "FILL: reserved", CMD(FILL, .reserved = 1, .dst = c, .length = n), -EINVAL },
		{ "FILL: value 256", CMD(FILL, .value = 256, .dst = c, .length = n), -EINVAL },
		{ "FILL: value 2^32",
		  CMD(FILL, .value = 1ULL << 32, .dst = c, .length = n), -EINVAL },
		{ "FILL: src", CMD(FILL, .src = a, .dst = c, .length = n), -EINVAL },
		{ "FILL: src2", CMD(FILL, .src2 = a, .dst = c, .length = n), -EINVAL },
		{ "COPY: src2", CMD(COPY, .src2 = b, .dst = c, .src = a, .length = n), -EINVAL },
		{ "COPY: value", CMD(COPY, .value = 1, .dst = c, .src = a, .length = n),
		  -EINVAL },
		{ "COPY: flags", CMD(COPY, .flags = 1, .dst = c, .src = a, .length = n),
		  -EINVAL },
		{ "COPY: reserved", CMD(COPY, .reserved = 1, .dst = c, .src = a, .length = n),
		  -EINVAL },
		{ "ADD: value",
		  CMD(ADD, .value = 1, .dst = c, .src = a, .src2 = b, .length = n), -EINVAL },
		{ "XOR: value",
		  CMD(XOR, .value = 1, .dst = c, .src = a, .src2 = b, .length = n), -EINVAL },
		{ "SUM: src2", CMD(SUM, .src2 = b, .dst = c, .src = a, .length = n), -EINVAL },
		{ "SUM: value", CMD(SUM, .value = 1, .dst = c, .src = a, .length = n), -EINVAL },
		{ "CRC32: src2", CMD(CRC32, .src2 = b, .dst = c, .src = a, .length = n),
		  -EINVAL },
		{ "CRC32: value", CMD(CRC32, .value = 1, .dst = c, .src = a, .length = n),
		  -EINVAL },
		{ "HISTOGRAM: src2", CMD(HISTOGRAM, .src2 = b, .dst = c, .src = a, .length = n),
		  -EINVAL },
		{ "HISTOGRAM: value", CMD(HISTOGRAM, .value = 1, .dst = c, .src = a, .length = n),
		  -EINVAL },
	};

	expect_bad(_metadata, self->fd, self->p, bad, ARRAY_SIZE(bad));
}

TEST_F(uapi, command_length)
{
	const uint64_t a = gpu_addr(self->p), b = a + page, c = b + page;
	const uint64_t longer = self->info.max_length + 8;
	const struct bad_command bad[] = {
		{ "FILL: 0", CMD(FILL, .dst = c), -EINVAL },
		{ "COPY: 0", CMD(COPY, .dst = c, .src = a), -EINVAL },
		{ "ADD: 0", CMD(ADD, .dst = c, .src = a, .src2 = b), -EINVAL },
		{ "XOR: 0", CMD(XOR, .dst = c, .src = a, .src2 = b), -EINVAL },
		{ "SUM: 0", CMD(SUM, .dst = c, .src = a), -EINVAL },
		{ "CRC32: 0", CMD(CRC32, .dst = c, .src = a), -EINVAL },
		{ "HISTOGRAM: 0", CMD(HISTOGRAM, .dst = c, .src = a), -EINVAL },
		{ "FILL: too long", CMD(FILL, .dst = c, .length = longer), -EINVAL },
		{ "SUM: too long", CMD(SUM, .dst = c, .src = a, .length = longer), -EINVAL },
		{ "CRC32: too long", CMD(CRC32, .dst = c, .src = a, .length = longer), -EINVAL },
		{ "CRC32: 2^64 - 1", CMD(CRC32, .dst = c, .src = a, .length = ~0ULL), -EINVAL },
	};

	expect_bad(_metadata, self->fd, self->p, bad, ARRAY_SIZE(bad));
}

TEST_F(uapi, command_alignment)
{
	const uint64_t a = gpu_addr(self->p), b = a + page, c = b + page, n = 64;
	const struct bad_command bad[] = {
		{ "ADD: dst", CMD(ADD, .dst = c + 4, .src = a, .src2 = b, .length = n), -EINVAL },
		{ "ADD: src", CMD(ADD, .dst = c, .src = a + 1, .src2 = b, .length = n), -EINVAL },
		{ "ADD: src2", CMD(ADD, .dst = c, .src = a, .src2 = b + 7, .length = n), -EINVAL },
		{ "ADD: length", CMD(ADD, .dst = c, .src = a, .src2 = b, .length = n + 4),
		  -EINVAL },
		{ "SUM: dst", CMD(SUM, .dst = c + 4, .src = a, .length = n), -EINVAL },
		{ "SUM: src", CMD(SUM, .dst = c, .src = a + 4, .length = n), -EINVAL },
		{ "SUM: length", CMD(SUM, .dst = c, .src = a, .length = n + 1), -EINVAL },
		{ "CRC32: dst", CMD(CRC32, .dst = c + 1, .src = a, .length = n), -EINVAL },
		{ "HISTOGRAM: dst", CMD(HISTOGRAM, .dst = c + 4, .src = a, .length = n), -EINVAL },
	};

	expect_bad(_metadata, self->fd, self->p, bad, ARRAY_SIZE(bad));
}

TEST_F(uapi, command_overlap)
{
	const uint64_t a = gpu_addr(self->p), b = a + page, n = page;
	const struct bad_command bad[] = {
		{ "COPY: same", CMD(COPY, .dst = a, .src = a, .length = n), -EINVAL },
		{ "COPY: behind", CMD(COPY, .dst = a + n - 1, .src = a, .length = n), -EINVAL },
		{ "COPY: before", CMD(COPY, .dst = a, .src = a + n - 1, .length = n), -EINVAL },
		{ "ADD: src", CMD(ADD, .dst = a + 8, .src = a, .src2 = b, .length = n), -EINVAL },
		{ "ADD: src2", CMD(ADD, .dst = b - 8, .src = b + n, .src2 = b, .length = n),
		  -EINVAL },
		{ "XOR: src", CMD(XOR, .dst = a + n - 1, .src = a, .src2 = b + n, .length = n),
		  -EINVAL },
		{ "XOR: src2", CMD(XOR, .dst = b - 1, .src = b + n, .src2 = b, .length = n),
		  -EINVAL },
	};

	expect_bad(_metadata, self->fd, self->p, bad, ARRAY_SIZE(bad));

	/* Neighbours do not overlap. */
	EXPECT_EQ(0, run(self->fd, gpu_fill(self->p + page, 0x12, page)));
	EXPECT_EQ(0, run(self->fd, gpu_unary(DUMMY_GPU_OP_COPY, self->p, self->p + page, page)));
	EXPECT_EQ(page, cpu_unlike(self->p, 0x12, page));
	EXPECT_EQ(0, run(self->fd, gpu_unary(DUMMY_GPU_OP_COPY, self->p + 2 * page,
					     self->p + page, page)));
	EXPECT_EQ(page, cpu_unlike(self->p + 2 * page, 0x12, page));
}

/*
 * An address so close to the end of the address space that a command may reach
 * beyond it.
 */
static uint64_t user_top(void)
{
	/* With five-level page tables, addresses above 47 bits need a hint. */
	void *high = mmap((void *)(1UL << 55), page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	bool is_high = high != MAP_FAILED && gpu_addr(high) >> 47;

	munmap(high, page);
	/* Otherwise, the stack is at the end of the address space. */
	return is_high ? (1UL << 56) - 2 * page : gpu_addr(__builtin_frame_address(0)) & -8ULL;
}

TEST_F(uapi, command_address)
{
	const uint64_t a = gpu_addr(self->p), b = a + page, c = b + page, n = 64;
	const uint64_t k = KERNEL_ADDRESS, w = -(uint64_t)page;
	const uint64_t top = user_top(), far = self->info.max_length;
	const struct bad_command bad[] = {
		{ "FILL: kernel", CMD(FILL, .dst = k, .length = n), -EFAULT },
		{ "COPY: kernel dst", CMD(COPY, .dst = k, .src = a, .length = n), -EFAULT },
		{ "COPY: kernel src", CMD(COPY, .dst = c, .src = k, .length = n), -EFAULT },
		{ "ADD: kernel src2", CMD(ADD, .dst = c, .src = a, .src2 = k, .length = n),
		  -EFAULT },
		{ "XOR: kernel src", CMD(XOR, .dst = c, .src = k, .src2 = b, .length = n),
		  -EFAULT },
		{ "SUM: kernel dst", CMD(SUM, .dst = k, .src = a, .length = n), -EFAULT },
		{ "CRC32: kernel dst", CMD(CRC32, .dst = k, .src = a, .length = n), -EFAULT },
		{ "HISTOGRAM: kernel dst", CMD(HISTOGRAM, .dst = k, .src = a, .length = n),
		  -EFAULT },
		{ "SUM: into the kernel", CMD(SUM, .dst = c, .src = top, .length = far), -EFAULT },
		{ "CRC32: into the kernel", CMD(CRC32, .dst = c, .src = top, .length = far),
		  -EFAULT },
		{ "FILL: wraps", CMD(FILL, .dst = w, .length = 2 * page), -EINVAL },
		{ "COPY: dst wraps", CMD(COPY, .dst = w, .src = a, .length = 2 * page), -EINVAL },
		{ "COPY: src wraps", CMD(COPY, .dst = c, .src = w, .length = 2 * page), -EINVAL },
		{ "ADD: src2 wraps", CMD(ADD, .dst = c, .src = a, .src2 = w, .length = 2 * page),
		  -EINVAL },
		{ "SUM: src wraps", CMD(SUM, .dst = c, .src = w, .length = 2 * page), -EINVAL },
		{ "HISTOGRAM: dst wraps", CMD(HISTOGRAM, .dst = -1024ULL, .src = a, .length = n),
		  -EINVAL },
	};

	expect_bad(_metadata, self->fd, self->p, bad, ARRAY_SIZE(bad));
}

TEST_F(uapi, submit_count)
{
	const struct dummy_gpu_stats before = stats_of(_metadata, self->fd);
	uint64_t max = self->info.max_commands;
	struct dummy_gpu_command *commands;
	struct dummy_gpu_submit submit;

	commands = calloc(max + 1, sizeof(*commands));
	ASSERT_NE(NULL, commands);
	for (uint64_t i = 0; i <= max; i++)
		commands[i] = gpu_fill(self->p + i % page, 0xee, 1);

	const uint64_t bad[] = { 0, max + 1, 1ULL << 58, ~0ULL };

	for (size_t i = 0; i < ARRAY_SIZE(bad); i++) {
		submit = gpu_submission(commands, bad[i]);
		EXPECT_EQ(-EINVAL, gpu_submit(self->fd, &submit));
		EXPECT_EQ(0, submit.completed);
		EXPECT_EQ(0, submit.fault_address);
	}
	EXPECT_EQ(page, cpu_unlike(self->p, 0, page));
	expect_idle(_metadata, self->fd, &before);

	submit = gpu_submission(commands, max);
	EXPECT_EQ(0, gpu_submit(self->fd, &submit));
	EXPECT_EQ(max, submit.completed);
	EXPECT_EQ(max < page ? max : page, cpu_unlike(self->p, 0xee, page));
	free(commands);
}

TEST_F(uapi, command_size)
{
	const struct {
		uint64_t size;
		int err;
	} bad[] = {
		{ 0, -EINVAL },
		{ sizeof(struct dummy_gpu_command) - 8, -EINVAL },
		{ sizeof(struct dummy_gpu_command) + 1, -EINVAL },
		{ sizeof(struct dummy_gpu_command) + 4, -EINVAL },
		{ MAX_SIZE + 8, -E2BIG },
		{ ~7ULL, -E2BIG },
	};
	struct {
		struct dummy_gpu_command command;
		uint64_t later[2];
	} commands[] = {
		{ .command = gpu_fill(self->p, 0xaa, page) },
		{ .command = gpu_fill(self->p + page, 0xbb, page) },
	};
	const struct dummy_gpu_stats before = stats_of(_metadata, self->fd);
	struct dummy_gpu_submit submit;

	for (size_t i = 0; i < ARRAY_SIZE(bad); i++) {
		submit = gpu_submission(&commands[0].command, 1);
		submit.command_size = bad[i].size;
		EXPECT_EQ(bad[i].err, gpu_submit(self->fd, &submit))
			TH_LOG("command_size %llu", (unsigned long long)bad[i].size);
		EXPECT_EQ(0, submit.completed);
		EXPECT_EQ(0, submit.fault_address);
	}

	/* A field of a later version that is not zero. */
	for (int i = 0; i < 2; i++) {
		commands[1].later[i] = 1;
		submit = gpu_submission(&commands[0].command, 2);
		submit.command_size = sizeof(commands[0]);
		EXPECT_EQ(-E2BIG, gpu_submit(self->fd, &submit));
		EXPECT_EQ(0, submit.completed);
		EXPECT_EQ(0, submit.fault_address);
		commands[1].later[i] = 0;
	}
	EXPECT_EQ(2 * page, cpu_unlike(self->p, 0, 2 * page));
	expect_idle(_metadata, self->fd, &before);

	/* A field of a later version that is zero. */
	submit = gpu_submission(&commands[0].command, 2);
	submit.command_size = sizeof(commands[0]);
	EXPECT_EQ(0, gpu_submit(self->fd, &submit));
	EXPECT_EQ(2, submit.completed);
	EXPECT_EQ(page, cpu_unlike(self->p, 0xaa, page));
	EXPECT_EQ(page, cpu_unlike(self->p + page, 0xbb, page));
}

TEST_F(uapi, commands_address)
{
	struct dummy_gpu_command command = gpu_fill(self->p, 0xee, page), *edge;
	const struct dummy_gpu_stats before = stats_of(_metadata, self->fd);
	struct dummy_gpu_submit submit;

	ASSERT_EQ(0, munmap(self->p + 2 * page, page));
	edge = (void *)(self->p + 2 * page - sizeof(command));
	*edge = command;

	const uint64_t bad[] = {
		0,
		gpu_addr(self->p + 2 * page),
		gpu_addr(edge),		/* the first can be read, the second not */
		gpu_addr(edge) + 8,
		KERNEL_ADDRESS,
		-64ULL,
	};

	for (size_t i = 0; i < ARRAY_SIZE(bad); i++) {
		submit = gpu_submission(NULL, 2);
		submit.commands = bad[i];
		EXPECT_EQ(-EFAULT, gpu_submit(self->fd, &submit))
			TH_LOG("commands %#llx", (unsigned long long)bad[i]);
		EXPECT_EQ(0, submit.completed);
		EXPECT_EQ(0, submit.fault_address);
	}
	EXPECT_EQ(page, cpu_unlike(self->p, 0, page));
	expect_idle(_metadata, self->fd, &before);
}

TEST_F(uapi, size_written_back)
{
	struct {
		struct dummy_gpu_submit submit;
		uint64_t later;
	} larger = { 0 };
	struct dummy_gpu_command command = gpu_fill(self->p, 0xee, page);

	/* The size is written back also if a check fails ... */
	larger.submit = gpu_submission(&command, 0);
	larger.submit.size = sizeof(larger);
	EXPECT_EQ(-EINVAL, gpu_submit(self->fd, &larger.submit));
	EXPECT_EQ(sizeof(larger.submit), larger.submit.size);
	EXPECT_EQ(0, larger.submit.completed);

	/* ... or if a command fails. */
	ASSERT_EQ(0, mprotect(self->p, page, PROT_READ));
	larger.submit = gpu_submission(&command, 1);
	larger.submit.size = sizeof(larger);
	EXPECT_EQ(-EPERM, gpu_submit(self->fd, &larger.submit));
	EXPECT_EQ(sizeof(larger.submit), larger.submit.size);
	EXPECT_EQ(gpu_addr(self->p), larger.submit.fault_address);
}

TEST_F(uapi, size_written_back_for_memory)
{
	struct {
		struct dummy_gpu_prefetch prefetch;
		uint64_t later;
	} larger = { 0 };
	struct {
		struct dummy_gpu_advise advise;
		uint64_t later;
	} advice = {
		.advise = {
			.size = sizeof(advice),
			.start = gpu_addr(self->p),
			.length = page,
			.policy = DUMMY_GPU_POLICY_NONE,
		},
	};

	/*
	 * Outputs are written also if a check fails, or if nothing is mapped.
	 */
	larger.prefetch = gpu_prefetching(self->p, 0, DUMMY_GPU_LOCATION_SYSTEM);
	larger.prefetch.size = sizeof(larger);
	EXPECT_EQ(-EINVAL, gpu_prefetch(self->fd, &larger.prefetch));
	EXPECT_EQ(sizeof(larger.prefetch), larger.prefetch.size);
	EXPECT_EQ(0, larger.prefetch.done);
	EXPECT_EQ(0, larger.prefetch.pages);

	ASSERT_EQ(0, munmap(self->p + page, page));
	larger.prefetch = gpu_prefetching(self->p + page, page, DUMMY_GPU_LOCATION_SYSTEM);
	larger.prefetch.size = sizeof(larger);
	EXPECT_EQ(self->info.vram_size ? -EFAULT : -ENODEV,
		  gpu_prefetch(self->fd, &larger.prefetch));
	EXPECT_EQ(sizeof(larger.prefetch), larger.prefetch.size);
	EXPECT_EQ(0, larger.prefetch.done);
	EXPECT_EQ(0, larger.prefetch.pages);

	/* ADVISE has no other output, so a failed check writes nothing. */
	advice.advise.policy = 3;
	EXPECT_EQ(-EINVAL, gpu_ioctl(self->fd, DUMMY_GPU_IOC_ADVISE, &advice));
	EXPECT_EQ(sizeof(advice), advice.advise.size);
	advice.advise.policy = DUMMY_GPU_POLICY_NONE;
	advice.advise.start = KERNEL_ADDRESS;
	EXPECT_EQ(-EFAULT, gpu_ioctl(self->fd, DUMMY_GPU_IOC_ADVISE, &advice));
	EXPECT_EQ(sizeof(advice), advice.advise.size);
	advice.advise.start = gpu_addr(self->p);

	EXPECT_EQ(0, gpu_ioctl(self->fd, DUMMY_GPU_IOC_ADVISE, &advice));
	EXPECT_EQ(sizeof(advice.advise), advice.advise.size);
	EXPECT_EQ(0, advice.later);
}

TEST_F(uapi, in_place)
{
	const size_t length = 2 * page, n = length / sizeof(uint64_t);
	uint64_t *p = (void *)self->p, *copy = malloc(length), *expect = malloc(length);
	uint64_t histogram[GPU_BUCKETS], sum;

	ASSERT_NE(NULL, copy);
	ASSERT_NE(NULL, expect);

	cpu_randomize(p, length, 1);
	memcpy(copy, p, length);
	EXPECT_EQ(0, run(self->fd, gpu_binary(DUMMY_GPU_OP_ADD, p, p, p, length)));
	for (size_t i = 0; i < n; i++)
		expect[i] = 2 * copy[i];
	EXPECT_EQ(length, cpu_differs(p, expect, length));
	EXPECT_EQ(0, run(self->fd, gpu_binary(DUMMY_GPU_OP_XOR, p, copy, p, length)));
	for (size_t i = 0; i < n; i++)
		expect[i] ^= copy[i];
	EXPECT_EQ(length, cpu_differs(p, expect, length));
	EXPECT_EQ(0, run(self->fd, gpu_binary(DUMMY_GPU_OP_XOR, p, p, p, length)));
	EXPECT_EQ(length, cpu_unlike(self->p, 0, length));

	/* The result is inside the source, which is read completely before. */
	cpu_randomize(p, length, 2);
	sum = cpu_sum(p, length);
	EXPECT_EQ(0, run(self->fd, gpu_unary(DUMMY_GPU_OP_SUM, p + 1, p, length)));
	EXPECT_EQ(sum, p[1]);
	cpu_histogram(histogram, p, length);
	EXPECT_EQ(0, run(self->fd, gpu_unary(DUMMY_GPU_OP_HISTOGRAM, p, p, length)));
	EXPECT_EQ(sizeof(histogram), cpu_differs(p, histogram, sizeof(histogram)));
	free(expect);
	free(copy);
}

TEST_F(uapi, in_order)
{
	uint64_t *p = (void *)self->p;
	struct dummy_gpu_command commands[] = {
		gpu_fill(p, 0x01, page),
		gpu_binary(DUMMY_GPU_OP_ADD, p + 512, p, p, 2048),
		gpu_unary(DUMMY_GPU_OP_COPY, p, p + 512, 2048),
		gpu_unary(DUMMY_GPU_OP_SUM, p + 1024, p, 4096),
	};
	struct dummy_gpu_submit submit = gpu_submission(commands, ARRAY_SIZE(commands));

	ASSERT_EQ(0, gpu_submit(self->fd, &submit));
	EXPECT_EQ(ARRAY_SIZE(commands), submit.completed);
	EXPECT_EQ(0, submit.fault_address);
	EXPECT_EQ(256 * 0x0202020202020202ULL + 256 * 0x0101010101010101ULL, p[1024]);
}

TEST_F(uapi, stats)
{
	const size_t pages = 8;
	struct dummy_gpu_stats stats[4];
	int fd = gpu_open(GPU_DEVICE);
	uint64_t *sum;
	uint8_t *p;

	ASSERT_LE(0, fd);
	p = map(pages * page, PROT_READ | PROT_WRITE);
	ASSERT_NE(MAP_FAILED, p);
	sum = map(page, PROT_READ | PROT_WRITE);
	ASSERT_NE(MAP_FAILED, sum);
	memset(p, 1, pages * page);

	/* A file that has done nothing. */
	ASSERT_EQ(0, gpu_stats(fd, &stats[0]));
	EXPECT_EQ(sizeof(stats[0]), stats[0].size);
	EXPECT_EQ(0, stats[0].commands);
	EXPECT_EQ(0, stats[0].bytes_read);
	EXPECT_EQ(0, stats[0].bytes_written);
	EXPECT_EQ(0, stats[0].faults);
	EXPECT_EQ(0, stats[0].fault_batches);
	EXPECT_EQ(0, stats[0].retries);
	EXPECT_EQ(0, stats[0].pages_mapped);
	EXPECT_EQ(0, stats[0].pages_to_device);
	EXPECT_EQ(0, stats[0].pages_cpu_faulted);
	EXPECT_EQ(0, stats[0].pages_evicted);
	EXPECT_EQ(0, stats[0].pages_to_system);
	EXPECT_EQ(0, stats[0].device_pages);

	/* Its first command. */
	ASSERT_EQ(0, run(fd, gpu_unary(DUMMY_GPU_OP_SUM, sum, p, pages * page)));
	ASSERT_EQ(0, gpu_stats(fd, &stats[1]));
	EXPECT_EQ(1, stats[1].commands);
	EXPECT_EQ(pages * page, stats[1].bytes_read);
	EXPECT_EQ(sizeof(*sum), stats[1].bytes_written);
	EXPECT_LT(0, stats[1].faults);
	EXPECT_LT(0, stats[1].fault_batches);
	EXPECT_LE(stats[1].fault_batches, stats[1].faults);
	/* A fault brings in as much as a window: there are far fewer than pages. */
	EXPECT_GE(4, stats[1].faults);
	EXPECT_LE(pages + 1, stats[1].pages_mapped);

	/* The same again finds all pages. */
	ASSERT_EQ(0, run(fd, gpu_unary(DUMMY_GPU_OP_SUM, sum, p, pages * page)));
	ASSERT_EQ(0, gpu_stats(fd, &stats[2]));
	EXPECT_EQ(2, stats[2].commands);
	EXPECT_EQ(2 * pages * page, stats[2].bytes_read);
	EXPECT_EQ(stats[1].faults, stats[2].faults);
	EXPECT_EQ(stats[1].fault_batches, stats[2].fault_batches);

	/* Unmap the pages. */
	ASSERT_EQ(0, munmap(p, pages * page));
	ASSERT_EQ(0, gpu_stats(fd, &stats[3]));
	EXPECT_LT(stats[2].invalidations, stats[3].invalidations);
	EXPECT_LE(stats[2].invalidated_pages + pages, stats[3].invalidated_pages);
	EXPECT_GE(stats[2].pages_mapped - pages, stats[3].pages_mapped);

	/* A fault that fails is a fault, but no window and no command. */
	EXPECT_EQ(-EFAULT, run(fd, gpu_unary(DUMMY_GPU_OP_SUM, sum, p, pages * page)));
	ASSERT_EQ(0, gpu_stats(fd, &stats[0]));
	EXPECT_LT(stats[3].faults, stats[0].faults);
	EXPECT_EQ(stats[3].fault_batches, stats[0].fault_batches);
	EXPECT_EQ(2, stats[0].commands);

	/* Commands of another file of the same device do not count here. */
	ASSERT_EQ(0, gpu_stats(self->fd, &stats[0]));
	EXPECT_EQ(0, stats[0].commands);
	EXPECT_EQ(0, stats[0].faults);
	munmap(sum, page);
	close(fd);
}

/*
 * Memory: what the device may do, and what it sees when the memory changes.
 */
FIXTURE(svm)
{
	int fd;
};

FIXTURE_SETUP(svm)
{
	self->fd = setup_device(_metadata);
	if (self->fd < 0)
		return;
}

FIXTURE_TEARDOWN(svm)
{
	close(self->fd);
}

/*
 * Commands fail at a page that the device must not read, and report its
 * address.
 */
static void expect_fault(struct __test_metadata *_metadata, int fd, uint8_t *good, uint8_t *bad)
{
	uint64_t *result = (void *)good;
	struct dummy_gpu_command commands[] = {
		gpu_fill(good + page, 0x11, page),
		gpu_unary(DUMMY_GPU_OP_SUM, result, bad - page, 3 * page),
		gpu_fill(good + page, 0x22, page),
	};
	struct dummy_gpu_submit submit = gpu_submission(commands, ARRAY_SIZE(commands));

	*result = GPU_UNTOUCHED;
	EXPECT_EQ(-EFAULT, gpu_submit(fd, &submit));
	EXPECT_EQ(1, submit.completed);
	EXPECT_EQ(gpu_addr(bad), submit.fault_address);
	EXPECT_EQ(GPU_UNTOUCHED, *result);
	EXPECT_EQ(page, cpu_unlike(good + page, 0x11, page));

	/* The operand starts in the middle of the bad page. */
	commands[0] = gpu_unary(DUMMY_GPU_OP_CRC32, result, bad + 5, 3);
	submit = gpu_submission(commands, 1);
	EXPECT_EQ(-EFAULT, gpu_submit(fd, &submit));
	EXPECT_EQ(0, submit.completed);
	EXPECT_EQ(gpu_addr(bad + 5), submit.fault_address);

	/* Write. */
	commands[0] = gpu_fill(bad - 1, 0x33, 2);
	submit = gpu_submission(commands, 1);
	EXPECT_EQ(-EFAULT, gpu_submit(fd, &submit));
	EXPECT_EQ(0, submit.completed);
	EXPECT_EQ(gpu_addr(bad), submit.fault_address);

	/* The pages on both sides are still usable. */
	bad[-1] = 1;
	bad[page] = 2;
	EXPECT_EQ(0, run(fd, gpu_fill(bad - page, 0x44, page)));
	EXPECT_EQ(page, cpu_unlike(bad - page, 0x44, page));
	EXPECT_EQ(0, run(fd, gpu_fill(bad + page, 0x55, page)));
	EXPECT_EQ(page, cpu_unlike(bad + page, 0x55, page));
}

TEST_F(svm, hole)
{
	uint8_t *p = map(8 * page, PROT_READ | PROT_WRITE);

	ASSERT_NE(MAP_FAILED, p);
	ASSERT_EQ(0, munmap(p + 5 * page, page));
	expect_fault(_metadata, self->fd, p, p + 5 * page);
}

TEST_F(svm, hole_made_later)
{
	uint8_t *p = map(8 * page, PROT_READ | PROT_WRITE);

	ASSERT_NE(MAP_FAILED, p);
	ASSERT_EQ(0, run(self->fd, gpu_fill(p, 0x66, 8 * page)));
	ASSERT_EQ(0, munmap(p + 5 * page, page));
	expect_fault(_metadata, self->fd, p, p + 5 * page);
}

TEST_F(svm, prot_none)
{
	uint8_t *p = map(8 * page, PROT_READ | PROT_WRITE);

	ASSERT_NE(MAP_FAILED, p);
	memset(p, 0x66, 8 * page);
	ASSERT_EQ(0, run(self->fd, gpu_fill(p, 0x77, 8 * page)));
	ASSERT_EQ(0, mprotect(p + 5 * page, page, PROT_NONE));
	expect_fault(_metadata, self->fd, p, p + 5 * page);

	ASSERT_EQ(0, mprotect(p + 5 * page, page, PROT_READ));
	EXPECT_EQ(page, cpu_unlike(p + 5 * page, 0x77, page));
	EXPECT_EQ(page / 8 * 0x7777777777777777ULL, gpu_sum(self->fd, p + 5 * page, page));
}

/*
 * A protection key that denies access to a thread also denies it to its GPU
 * commands.
 */
TEST_F(svm, protection_keys)
{
	uint8_t *p = map(2 * page, PROT_READ | PROT_WRITE);
	int key = pkey_alloc(0, 0);

	ASSERT_NE(MAP_FAILED, p);
	if (key < 0)
		SKIP(return, "pkey_alloc: %s", strerror(errno));
	memset(p, 1, 2 * page);
	ASSERT_EQ(0, pkey_mprotect(p, page, PROT_READ | PROT_WRITE, key));

	ASSERT_EQ(0, pkey_set(key, PKEY_DISABLE_ACCESS));
	EXPECT_EQ(GPU_UNTOUCHED, gpu_sum(self->fd, p, page));
	EXPECT_EQ(-EFAULT, run(self->fd, gpu_fill(p, 2, page)));
	/*
	 * The page beside it is usable, and does not make this one accessible.
	 */
	EXPECT_EQ(0, run(self->fd, gpu_fill(p + page, 3, page)));
	EXPECT_EQ(GPU_UNTOUCHED, gpu_sum(self->fd, p, page));

	ASSERT_EQ(0, pkey_set(key, PKEY_DISABLE_WRITE));
	EXPECT_EQ(page / 8 * 0x0101010101010101ULL, gpu_sum(self->fd, p, page));
	EXPECT_EQ(-EPERM, run(self->fd, gpu_fill(p, 2, page)));
	EXPECT_EQ(page, cpu_unlike(p, 1, page));

	ASSERT_EQ(0, pkey_set(key, 0));
	EXPECT_EQ(0, run(self->fd, gpu_fill(p, 2, page)));
	EXPECT_EQ(page, cpu_unlike(p, 2, page));
	EXPECT_EQ(page, cpu_unlike(p + page, 3, page));
	pkey_free(key);
}

/* Memory that is not in the direct map is not accessible to the device. */
TEST_F(svm, secret_memory)
{
	uint8_t *p = map(8 * page, PROT_READ | PROT_WRITE), *secret = p + 5 * page;
	int fd = syscall(SYS_memfd_secret, 0);

	ASSERT_NE(MAP_FAILED, p);
	if (fd < 0)
		SKIP(return, "memfd_secret: %s", strerror(errno));
	ASSERT_EQ(0, ftruncate(fd, page));
	ASSERT_EQ(secret, mmap(secret, page, PROT_READ | PROT_WRITE,
			       MAP_SHARED | MAP_FIXED, fd, 0));
	ASSERT_EQ(0, close(fd));
	memset(secret, 0x5c, page);
	expect_fault(_metadata, self->fd, p, secret);
	EXPECT_EQ(GPU_UNTOUCHED, gpu_sum(self->fd, secret, page));
	EXPECT_EQ(page, cpu_unlike(secret, 0x5c, page));
}

TEST_F(svm, null)
{
	struct dummy_gpu_command command = gpu_fill(NULL, 0, 8);
	struct dummy_gpu_submit submit = gpu_submission(&command, 1);

	EXPECT_EQ(-EFAULT, gpu_submit(self->fd, &submit));
	EXPECT_EQ(0, submit.completed);
	EXPECT_EQ(0, submit.fault_address);
}

/*
 * The device cannot write to read-only memory, whether it has it mapped or not.
 */
static void expect_read_only(struct __test_metadata *_metadata, int fd, uint8_t *p, uint8_t value)
{
	struct dummy_gpu_command command = gpu_fill(p, ~value, page);
	struct dummy_gpu_submit submit = gpu_submission(&command, 1);

	EXPECT_EQ(-EPERM, gpu_submit(fd, &submit));
	EXPECT_EQ(0, submit.completed);
	EXPECT_EQ(gpu_addr(p), submit.fault_address);
	EXPECT_EQ(page, cpu_unlike(p, value, page));

	/* A read succeeds, and does not permit a write afterwards. */
	EXPECT_EQ(page / 8 * (value * 0x0101010101010101ULL), gpu_sum(fd, p, page));
	submit = gpu_submission(&command, 1);
	EXPECT_EQ(-EPERM, gpu_submit(fd, &submit));
	EXPECT_EQ(gpu_addr(p), submit.fault_address);
	EXPECT_EQ(page, cpu_unlike(p, value, page));
}

TEST_F(svm, read_only)
{
	uint8_t *p = map(2 * page, PROT_READ | PROT_WRITE);
	struct dummy_gpu_submit submit;
	struct dummy_gpu_command command = gpu_fill(p, 0x99, 2 * page);

	ASSERT_NE(MAP_FAILED, p);
	memset(p, 0x42, 2 * page);
	ASSERT_EQ(0, mprotect(p + page, page, PROT_READ));
	expect_read_only(_metadata, self->fd, p + page, 0x42);

	/* A destination that is writable only at its start. */
	submit = gpu_submission(&command, 1);
	EXPECT_EQ(-EPERM, gpu_submit(self->fd, &submit));
	EXPECT_EQ(0, submit.completed);
	EXPECT_EQ(gpu_addr(p + page), submit.fault_address);
	EXPECT_EQ(page, cpu_unlike(p + page, 0x42, page));
}

TEST_F(svm, read_only_file)
{
	int file = temporary_file(page);
	uint8_t content[16];
	uint8_t *p;

	ASSERT_LE(0, file);
	memset(content, 0, sizeof(content));
	p = mmap(NULL, page, PROT_READ, MAP_SHARED, file, 0);
	ASSERT_NE(MAP_FAILED, p);
	expect_read_only(_metadata, self->fd, p, 0);
	ASSERT_EQ((ssize_t)sizeof(content), pread(file, content, sizeof(content), 0));
	EXPECT_EQ(sizeof(content), cpu_unlike(content, 0, sizeof(content)));
	close(file);
}

TEST_F(svm, mprotect)
{
	uint8_t *p = map(page, PROT_READ | PROT_WRITE);

	ASSERT_NE(MAP_FAILED, p);
	ASSERT_EQ(0, run(self->fd, gpu_fill(p, 0x24, page)));
	ASSERT_EQ(0, mprotect(p, page, PROT_READ));
	expect_read_only(_metadata, self->fd, p, 0x24);

	ASSERT_EQ(0, mprotect(p, page, PROT_READ | PROT_WRITE));
	EXPECT_EQ(0, run(self->fd, gpu_fill(p, 0x25, page)));
	EXPECT_EQ(page, cpu_unlike(p, 0x25, page));
}

/* This program: pages of a file that are mapped for reading and execution. */
TEST_F(svm, program_text)
{
	int file = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
	size_t length = lseek(file, 0, SEEK_END);
	uint64_t histogram[GPU_BUCKETS], expect[GPU_BUCKETS];
	uint64_t crc = GPU_UNTOUCHED;
	uint8_t *p, *content;

	ASSERT_LE(0, file);
	ASSERT_LT(page, length);
	p = mmap(NULL, length, PROT_READ | PROT_EXEC, MAP_PRIVATE, file, 0);
	ASSERT_NE(MAP_FAILED, p);
	content = malloc(length);
	ASSERT_NE(NULL, content);
	ASSERT_EQ((ssize_t)length, pread(file, content, length, 0));

	EXPECT_EQ(0, run(self->fd, gpu_unary(DUMMY_GPU_OP_CRC32, &crc, p, length)));
	EXPECT_EQ(cpu_crc32(content, length), crc);
	EXPECT_EQ(0, run(self->fd, gpu_unary(DUMMY_GPU_OP_HISTOGRAM, histogram, p, length)));
	cpu_histogram(expect, content, length);
	EXPECT_EQ(sizeof(expect), cpu_differs(histogram, expect, sizeof(expect)));
	EXPECT_EQ(-EPERM, run(self->fd, gpu_fill(p, 0, 1)));
	free(content);
	close(file);
}

/* The device has the zero page; the CPU writes, the device must have the new page. */
TEST_F(svm, zero_page)
{
	uint8_t *p = map(2 * page, PROT_READ | PROT_WRITE);

	ASSERT_NE(MAP_FAILED, p);
	EXPECT_EQ(0, gpu_sum(self->fd, p, 2 * page));
	memset(p, 1, page);
	EXPECT_EQ(page / 8 * 0x0101010101010101ULL, gpu_sum(self->fd, p, 2 * page));

	/* Now the CPU has the zero page, and the device writes. */
	ASSERT_EQ(0, p[page]);
	EXPECT_EQ(0, run(self->fd, gpu_fill(p + page, 2, page)));
	EXPECT_EQ(page, cpu_unlike(p + page, 2, page));
}

/* The same with a page of a file that a private mapping copies on write. */
TEST_F(svm, private_file_page)
{
	int file = temporary_file(page);
	uint8_t *p;

	ASSERT_LE(0, file);
	p = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
	ASSERT_NE(MAP_FAILED, p);
	ASSERT_EQ(1, pwrite(file, "\x01", 1, 0));
	EXPECT_EQ(1, gpu_sum(self->fd, p, page));
	p[0] = 2;
	EXPECT_EQ(2, gpu_sum(self->fd, p, page));
	ASSERT_EQ(1, pwrite(file, "\x03", 1, 0));
	EXPECT_EQ(2, gpu_sum(self->fd, p, page));
	close(file);
}

TEST_F(svm, cpu_writes)
{
	uint64_t *p = map(BUFFER, PROT_READ | PROT_WRITE);

	ASSERT_NE(MAP_FAILED, p);
	cpu_randomize(p, BUFFER, 1);
	EXPECT_EQ(cpu_sum(p, BUFFER), gpu_sum(self->fd, p, BUFFER));
	for (size_t round = 0; round < 8; round++) {
		for (size_t i = round; i < BUFFER / sizeof(*p); i += 1000)
			p[i] = ~p[i];
		EXPECT_EQ(cpu_sum(p, BUFFER), gpu_sum(self->fd, p, BUFFER));
	}
}

TEST_F(svm, unmap_and_map)
{
	uint8_t *p = map(4 * page, PROT_READ | PROT_WRITE);
	uint64_t sum;

	ASSERT_NE(MAP_FAILED, p);
	for (unsigned int round = 1; round < 20; round++) {
		ASSERT_EQ(0, run(self->fd, gpu_fill(p, 0xf0, 4 * page)));
		ASSERT_EQ(0, munmap(p, 4 * page));
		ASSERT_EQ(-EFAULT, run(self->fd, gpu_fill(p, 0xf1, 4 * page)));
		ASSERT_EQ(p, map_at(p, 4 * page));

		/* Every other round reads zeroes before the CPU writes. */
		if (round % 2) {
			sum = gpu_sum(self->fd, p, 4 * page);
			ASSERT_EQ(0, sum);
		}
		memset(p, round, 4 * page);
		ASSERT_EQ(4 * page / 8 * (round * 0x0101010101010101ULL),
			  gpu_sum(self->fd, p, 4 * page));
	}
}

TEST_F(svm, discard)
{
	uint8_t *p = map(8 * page, PROT_READ | PROT_WRITE);

	ASSERT_NE(MAP_FAILED, p);
	ASSERT_EQ(0, run(self->fd, gpu_fill(p, 1, 8 * page)));
	ASSERT_EQ(0, madvise(p + 2 * page, 3 * page, MADV_DONTNEED));
	EXPECT_EQ(5 * page / 8 * 0x0101010101010101ULL, gpu_sum(self->fd, p, 8 * page));
	EXPECT_EQ(3 * page, cpu_unlike(p + 2 * page, 0, 3 * page));

	/* A device write to discarded memory must not reach the old page. */
	ASSERT_EQ(0, run(self->fd, gpu_fill(p + 2 * page, 2, page)));
	EXPECT_EQ(page, cpu_unlike(p + 2 * page, 2, page));
	EXPECT_EQ(2 * page, cpu_unlike(p + 3 * page, 0, 2 * page));
}

TEST_F(svm, mremap)
{
	uint8_t *p = map(4 * page, PROT_READ | PROT_WRITE);
	uint8_t *q = map(4 * page, PROT_NONE);

	ASSERT_NE(MAP_FAILED, p);
	ASSERT_NE(MAP_FAILED, q);
	ASSERT_EQ(0, run(self->fd, gpu_fill(p, 3, 4 * page)));
	ASSERT_EQ(q, mremap(p, 4 * page, 4 * page, MREMAP_MAYMOVE | MREMAP_FIXED, q));

	EXPECT_EQ(4 * page / 8 * 0x0303030303030303ULL, gpu_sum(self->fd, q, 4 * page));
	EXPECT_EQ(-EFAULT, run(self->fd, gpu_fill(p, 4, page)));
	EXPECT_EQ(0, run(self->fd, gpu_fill(q + page, 5, page)));
	EXPECT_EQ(page, cpu_unlike(q, 3, page));
	EXPECT_EQ(page, cpu_unlike(q + page, 5, page));

	ASSERT_EQ(p, map_at(p, page));
	EXPECT_EQ(0, gpu_sum(self->fd, p, page));
	EXPECT_EQ(page, cpu_unlike(q, 3, page));
}

/* Operands that cross the boundary of two regions of the core. */
TEST_F(svm, region_boundary)
{
	uint8_t *space = mmap(NULL, 4 * REGION, PROT_NONE,
			      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	uint8_t *boundary, *p;

	if (space == MAP_FAILED)
		SKIP(return, "no address space for 4 regions");
	boundary = (uint8_t *)((gpu_addr(space) + 2 * REGION - 1) & -REGION);

	for (int i = 0; i < 2; i++, boundary += REGION) {
		p = boundary - 4 * page;
		ASSERT_EQ(0, mprotect(p, 8 * page, PROT_READ | PROT_WRITE));
		EXPECT_EQ(0, run(self->fd, gpu_fill(p + 1, 6, 8 * page - 2)));
		EXPECT_EQ(8 * page - 2, cpu_unlike(p + 1, 6, 8 * page - 2));
		p[0] = 6;
		p[8 * page - 1] = 6;
		EXPECT_EQ(8 * page / 8 * 0x0606060606060606ULL,
			  gpu_sum(self->fd, p, 8 * page));
		ASSERT_EQ(0, madvise(p, 8 * page, MADV_DONTNEED));
		EXPECT_EQ(0, gpu_sum(self->fd, p, 8 * page));
	}
	munmap(space, 4 * REGION);
}

/*
 * Processes and threads.
 */
TEST_F(svm, inherited_file)
{
	uint64_t *p = map(page, PROT_READ | PROT_WRITE);
	pid_t pid;
	int status;

	ASSERT_NE(MAP_FAILED, p);
	ASSERT_EQ(0, run(self->fd, gpu_fill(p, 7, page)));
	pid = fork();
	ASSERT_LE(0, pid);
	if (!pid) {
		struct dummy_gpu_command command = gpu_fill(p, 8, page);
		struct dummy_gpu_submit submit = gpu_submission(&command, 1);
		struct dummy_gpu_prefetch prefetch =
			gpu_prefetching(p, page, DUMMY_GPU_LOCATION_SYSTEM);
		struct dummy_gpu_info info;
		struct dummy_gpu_stats stats;

		if (gpu_submit(self->fd, &submit) != -EPERM)
			_exit(1);
		if (submit.completed != GPU_UNTOUCHED || submit.fault_address != GPU_UNTOUCHED)
			_exit(2);
		if (cpu_unlike(p, 7, page) != page)
			_exit(3);
		if (gpu_info(self->fd, &info) != -EPERM || info.page_size)
			_exit(4);
		if (gpu_stats(self->fd, &stats) != -EPERM || stats.commands)
			_exit(5);
		if (gpu_prefetch(self->fd, &prefetch) != -EPERM)
			_exit(6);
		if (prefetch.done != GPU_UNTOUCHED || prefetch.pages != GPU_UNTOUCHED)
			_exit(7);
		if (gpu_advise(self->fd, p, page, DUMMY_GPU_POLICY_SYSTEM) != -EPERM)
			_exit(8);
		_exit(0);
	}
	ASSERT_EQ(pid, waitpid(pid, &status, 0));
	EXPECT_EQ(0, status);
	EXPECT_EQ(page, cpu_unlike(p, 7, page));
	EXPECT_EQ(0, run(self->fd, gpu_fill(p, 9, page)));
	EXPECT_EQ(page, cpu_unlike(p, 9, page));
}

/* The process that opened the file has exited, the file is still open. */
TEST_F(svm, orphaned_file)
{
	int result[2], gone[2];
	uint8_t *p = map(page, PROT_READ | PROT_WRITE);
	char outcome = -1;
	pid_t pid;
	int status;

	ASSERT_NE(MAP_FAILED, p);
	ASSERT_EQ(0, pipe(result));
	ASSERT_EQ(0, pipe(gone));
	pid = fork();
	ASSERT_LE(0, pid);
	if (!pid) {
		int fd = gpu_open(GPU_DEVICE);

		if (fd < 0 || run(fd, gpu_fill(p, 7, page)))
			_exit(1);
		pid = fork();
		if (pid)
			_exit(pid < 0);
		close(gone[1]);
		/*
		 * read() returns 0 when both processes have closed the other
		 * end.
		 */
		outcome = read(gone[0], &outcome, 1) ? 1 : 0;
		if (run(fd, gpu_fill(p, 8, page)) != -EPERM)
			outcome = 2;
		if (close(fd))
			outcome = 3;
		if (write(result[1], &outcome, 1) != 1)
			_exit(1);
		_exit(0);
	}
	close(result[1]);
	status = wait_child(pid, 10);
	EXPECT_EQ(0, status);
	close(gone[1]);
	ASSERT_EQ(1, read(result[0], &outcome, 1));
	EXPECT_EQ(0, outcome);
	EXPECT_EQ(0, run(self->fd, gpu_fill(p, 9, page)));
	EXPECT_EQ(page, cpu_unlike(p, 9, page));
}

/* After fork(), device writes of one process are not visible to the other. */
TEST_F(svm, copy_on_write)
{
	uint64_t *p = map(4 * page, PROT_READ | PROT_WRITE);
	const size_t length = 4 * page;
	int go[2], done[2];
	pid_t pid;

	ASSERT_NE(MAP_FAILED, p);
	ASSERT_EQ(0, pipe(go));
	ASSERT_EQ(0, pipe(done));
	ASSERT_EQ(0, run(self->fd, gpu_fill(p, 1, length)));

	pid = fork();
	ASSERT_LE(0, pid);
	if (!pid) {
		int fd;

		if (token_wait(go[0]))
			_exit(1);
		/* The parent's device wrote 2. */
		if (cpu_unlike(p, 1, length) != length)
			_exit(2);
		fd = gpu_open(GPU_DEVICE);
		if (fd < 0)
			_exit(3);
		if (gpu_sum(fd, p, length) != length / 8 * 0x0101010101010101ULL)
			_exit(4);
		if (run(fd, gpu_fill(p, 3, length)))
			_exit(5);
		if (cpu_unlike(p, 3, length) != length)
			_exit(6);
		if (token_send(done[1]) || token_wait(go[0]))
			_exit(7);
		/* The parent wrote 4. */
		if (gpu_sum(fd, p, length) != length / 8 * 0x0303030303030303ULL)
			_exit(8);
		_exit(0);
	}

	/* The device had these pages writable; now they are shared with the child. */
	EXPECT_EQ(0, run(self->fd, gpu_fill(p, 2, length)));
	EXPECT_EQ(length, cpu_unlike(p, 2, length));
	ASSERT_EQ(0, token_send(go[1]));
	close(done[1]);
	EXPECT_EQ(0, token_wait(done[0]));
	EXPECT_EQ(length, cpu_unlike(p, 2, length));
	EXPECT_EQ(length / 8 * 0x0202020202020202ULL, gpu_sum(self->fd, p, length));
	memset(p, 4, length);
	ASSERT_EQ(0, token_send(go[1]));
	EXPECT_EQ(0, wait_child(pid, 10));
	EXPECT_EQ(length / 8 * 0x0404040404040404ULL, gpu_sum(self->fd, p, length));
}

/*
 * The child's CPU writes. The parent's device has read-only entries, which are
 * erased.
 */
TEST_F(svm, copy_on_write_by_child)
{
	uint64_t *p = map(4 * page, PROT_READ | PROT_WRITE);
	const size_t length = 4 * page;
	int go[2];
	pid_t pid;

	ASSERT_NE(MAP_FAILED, p);
	ASSERT_EQ(0, pipe(go));
	ASSERT_EQ(0, run(self->fd, gpu_fill(p, 1, length)));
	pid = fork();
	ASSERT_LE(0, pid);
	if (!pid) {
		if (token_wait(go[0]))
			_exit(1);
		memset(p, 5, length);
		_exit(0);
	}
	EXPECT_EQ(length / 8 * 0x0101010101010101ULL, gpu_sum(self->fd, p, length));
	ASSERT_EQ(0, token_send(go[1]));
	EXPECT_EQ(0, wait_child(pid, 10));
	EXPECT_EQ(length / 8 * 0x0101010101010101ULL, gpu_sum(self->fd, p, length));
	EXPECT_EQ(0, run(self->fd, gpu_fill(p, 6, length)));
	EXPECT_EQ(length, cpu_unlike(p, 6, length));
}

/* Memory that is shared between processes, at two addresses. */
TEST_F(svm, shared_memory)
{
	uint64_t *p = mmap(NULL, 2 * page, PROT_READ | PROT_WRITE,
			   MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	pid_t pid;

	ASSERT_NE(MAP_FAILED, p);
	ASSERT_EQ(0, run(self->fd, gpu_fill(p, 1, 2 * page)));
	pid = fork();
	ASSERT_LE(0, pid);
	if (!pid) {
		int fd = gpu_open(GPU_DEVICE);
		uint64_t *q = mremap(p, 2 * page, 2 * page, MREMAP_MAYMOVE | MREMAP_DONTUNMAP,
				     NULL);

		if (fd < 0)
			_exit(1);
		if (q == MAP_FAILED)
			q = p;
		if (gpu_sum(fd, q, 2 * page) != 2 * page / 8 * 0x0101010101010101ULL)
			_exit(2);
		if (run(fd, gpu_fill(q, 2, page)))
			_exit(3);
		_exit(0);
	}
	EXPECT_EQ(0, wait_child(pid, 10));
	EXPECT_EQ(page, cpu_unlike(p, 2, page));
	EXPECT_EQ(page / 8 * 0x0303030303030303ULL, gpu_sum(self->fd, p, 2 * page));
}

static int compare_rounds(int fd, uint64_t *p, size_t length, unsigned int rounds,
			  uint64_t seed)
{
	for (unsigned int i = 0; i < rounds; i++) {
		cpu_randomize(p, length, seed + i);
		if (gpu_sum(fd, p, length) != cpu_sum(p, length))
			return -EIO;
		if (run(fd, gpu_fill(p, i, length)))
			return -EIO;
		if (cpu_unlike(p, i, length) != length)
			return -EIO;
	}
	return 0;
}

/* Two processes, at the same addresses, on two devices at once. */
TEST_F(svm, two_processes)
{
	const size_t length = 64 * page;
	uint64_t *p = map(length, PROT_READ | PROT_WRITE);
	int go[2], ready[2];
	pid_t pid;

	ASSERT_NE(MAP_FAILED, p);
	if (access(GPU_DEVICE_2, F_OK))
		SKIP(return, "no " GPU_DEVICE_2);
	ASSERT_EQ(0, pipe(go));
	ASSERT_EQ(0, pipe(ready));
	pid = fork();
	ASSERT_LE(0, pid);
	if (!pid) {
		int fd = gpu_open(GPU_DEVICE_2);

		if (fd < 0 || token_send(ready[1]) || token_wait(go[0]))
			_exit(1);
		_exit(compare_rounds(fd, p, length, 20, 1000) ? 2 : 0);
	}
	close(ready[1]);
	ASSERT_EQ(0, token_wait(ready[0]));
	ASSERT_EQ(0, token_send(go[1]));
	EXPECT_EQ(0, compare_rounds(self->fd, p, length, 20, 2000));
	EXPECT_EQ(0, wait_child(pid, 20));
}

/* One process with two files of a device, and with a file of each device. */
TEST_F(svm, two_files)
{
	const char *const path[] = { GPU_DEVICE, GPU_DEVICE_2 };
	uint8_t *p = map(4 * page, PROT_READ | PROT_WRITE);

	ASSERT_NE(MAP_FAILED, p);
	for (size_t i = 0; i < ARRAY_SIZE(path); i++) {
		int fd = gpu_open(path[i]);

		if (fd == -ENOENT)
			SKIP(return, "no %s", path[i]);
		ASSERT_LE(0, fd);
		EXPECT_EQ(0, run(self->fd, gpu_fill(p, 1, 4 * page)));
		EXPECT_EQ(4 * page / 8 * 0x0101010101010101ULL, gpu_sum(fd, p, 4 * page));
		EXPECT_EQ(0, run(fd, gpu_fill(p + page, 2, page)));
		EXPECT_EQ(page / 8 * 0x0202020202020202ULL, gpu_sum(self->fd, p + page, page));
		ASSERT_EQ(0, madvise(p, page, MADV_DONTNEED));
		EXPECT_EQ(0, gpu_sum(fd, p, page));
		EXPECT_EQ(0, gpu_sum(self->fd, p, page));
		EXPECT_EQ(0, close(fd));

		/* The one that stays is not affected by the one that is closed. */
		EXPECT_EQ(page / 8 * 0x0202020202020202ULL, gpu_sum(self->fd, p + page, page));
		ASSERT_EQ(0, munmap(p, page));
		EXPECT_EQ(-EFAULT, run(self->fd, gpu_fill(p, 3, page)));
		ASSERT_EQ(p, map_at(p, page));
	}
}

struct churn {
	uint8_t *p;
	size_t length;
	bool remap;
	bool stop;
	uint64_t pause;
	unsigned long rounds;
	int err;
};

/*
 * Pauses between its rounds for a random time of up to @pause microseconds. A
 * thread that discards the memory of a command without a pause may keep the
 * device from making progress. A thread that discards other memory must not.
 */
static void *churn_thread(void *arg)
{
	struct churn *churn = arg;
	uint64_t seed = 1;

	while (!__atomic_load_n(&churn->stop, __ATOMIC_ACQUIRE)) {
		if (!churn->remap) {
			if (madvise(churn->p, churn->length, MADV_DONTNEED))
				churn->err = errno;
		} else {
			memset(churn->p, 0xaa, churn->length);
			if (munmap(churn->p, churn->length) ||
			    map_at(churn->p, churn->length) != churn->p)
				churn->err = errno;
		}
		if (churn->err)
			break;
		__atomic_add_fetch(&churn->rounds, 1, __ATOMIC_RELEASE);
		if (churn->pause)
			usleep(cpu_random(&seed) % (churn->pause + 1));
	}
	return NULL;
}

static unsigned long churn_rounds(struct churn *churn)
{
	return __atomic_load_n(&churn->rounds, __ATOMIC_ACQUIRE);
}

/* Another thread keeps unmapping other memory: the command completes. */
TEST_F(svm, churn_elsewhere)
{
	const size_t length = 64 * page;
	uint64_t *p = map(length, PROT_READ | PROT_WRITE);
	struct churn churn = {
		.p = map(16 * page, PROT_READ | PROT_WRITE),
		.length = 16 * page,
		.remap = true,
	};
	pthread_t thread;

	ASSERT_NE(MAP_FAILED, p);
	ASSERT_NE(MAP_FAILED, churn.p);
	ASSERT_EQ(0, pthread_create(&thread, NULL, churn_thread, &churn));
	for (unsigned int i = 0; i < 200 && (i < 20 || churn_rounds(&churn) < 20); i++) {
		EXPECT_EQ(0, compare_rounds(self->fd, p, length, 1, i));
		sched_yield();
	}
	__atomic_store_n(&churn.stop, true, __ATOMIC_RELEASE);
	ASSERT_EQ(0, pthread_join(thread, NULL));
	EXPECT_EQ(0, churn.err);
	EXPECT_LT(0, churn.rounds);
}

/* Another thread discards the memory of a command: bytes are old or zero. */
TEST_F(svm, churn_here)
{
	const size_t length = 64 * page;
	struct churn churn = {
		.p = map(length, PROT_READ | PROT_WRITE),
		.length = length,
	};
	pthread_t thread;

	ASSERT_NE(MAP_FAILED, churn.p);
	churn.pause = -microseconds();
	ASSERT_EQ(0, run(self->fd, gpu_fill(churn.p, 0x5b, length)));
	churn.pause += microseconds();
	ASSERT_EQ(0, pthread_create(&thread, NULL, churn_thread, &churn));
	for (unsigned int i = 0; i < 200 && (i < 20 || churn_rounds(&churn) < 20); i++) {
		ASSERT_EQ(0, run(self->fd, gpu_fill(churn.p, 0x5b, length)));
		for (size_t j = 0; j < length; j++) {
			uint8_t value = __atomic_load_n(churn.p + j, __ATOMIC_RELAXED);

			ASSERT_TRUE(value == 0x5b || value == 0)
				TH_LOG("byte %zu is %#x", j, value);
		}
		sched_yield();
	}
	__atomic_store_n(&churn.stop, true, __ATOMIC_RELEASE);
	ASSERT_EQ(0, pthread_join(thread, NULL));
	EXPECT_EQ(0, churn.err);
	EXPECT_LT(0, churn.rounds);
	EXPECT_EQ(0, run(self->fd, gpu_fill(churn.p, 0x5c, length)));
	EXPECT_EQ(length, cpu_unlike(churn.p, 0x5c, length));
}

struct submitter {
	int fd;
	uint64_t *p;
	size_t length;
	uint64_t seed;
	int err;
};

static void *submit_thread(void *arg)
{
	struct submitter *s = arg;

	s->err = compare_rounds(s->fd, s->p, s->length, 10, s->seed);
	return NULL;
}

/* Threads share the mm: all of them may use the file, at the same time. */
TEST_F(svm, threads)
{
	struct submitter submitter[4];
	pthread_t thread[ARRAY_SIZE(submitter)];

	for (size_t i = 0; i < ARRAY_SIZE(submitter); i++) {
		submitter[i] = (struct submitter) {
			.fd = self->fd,
			.p = map(32 * page, PROT_READ | PROT_WRITE),
			.length = 32 * page,
			.seed = i * 100,
			.err = -EINPROGRESS,
		};
		ASSERT_NE(MAP_FAILED, submitter[i].p);
		ASSERT_EQ(0, pthread_create(&thread[i], NULL, submit_thread, &submitter[i]));
	}
	for (size_t i = 0; i < ARRAY_SIZE(submitter); i++) {
		ASSERT_EQ(0, pthread_join(thread[i], NULL));
		EXPECT_EQ(0, submitter[i].err);
	}
}

static int alarms;

static void on_alarm(int sig)
{
	(void)sig;
	__atomic_add_fetch(&alarms, 1, __ATOMIC_RELAXED);
}

static int alarm_count(void)
{
	return __atomic_load_n(&alarms, __ATOMIC_RELAXED);
}

/* A signal that does not kill does not interrupt. */
TEST_F(svm, signals)
{
	struct itimerval timer = { { 0, 1000 }, { 0, 1000 } }, none = { 0 };
	struct sigaction action = { .sa_handler = on_alarm };
	uint64_t *p = map(BUFFER, PROT_READ | PROT_WRITE);

	ASSERT_NE(MAP_FAILED, p);
	ASSERT_EQ(0, sigaction(SIGALRM, &action, NULL));
	ASSERT_EQ(0, setitimer(ITIMER_REAL, &timer, NULL));
	for (unsigned int i = 0; i < 100 && (i < 3 || !alarm_count()); i++) {
		ASSERT_EQ(0, run(self->fd, gpu_fill(p, i, BUFFER)));
		ASSERT_EQ(BUFFER, cpu_unlike(p, i, BUFFER));
		ASSERT_EQ(0, madvise(p, BUFFER, MADV_DONTNEED));
	}
	ASSERT_EQ(0, setitimer(ITIMER_REAL, &none, NULL));
	EXPECT_LT(0, alarm_count());
}

/*
 * Memory with a userfaultfd: user space can make such a fault wait forever.
 */
TEST_F(svm, userfault_served)
{
	uint8_t *p = map(page, PROT_READ | PROT_WRITE);
	struct server server = {
		.uffd = uffd_open(),
		.page = map(page, PROT_READ | PROT_WRITE),
	};
	pthread_t thread;
	int fault[2];

	if (server.uffd < 0)
		SKIP(return, "no userfaultfd: %s", strerror(-server.uffd));
	ASSERT_NE(MAP_FAILED, p);
	ASSERT_NE(MAP_FAILED, server.page);
	memset(server.page, 9, page);
	ASSERT_EQ(0, uffd_register(server.uffd, p, page));
	ASSERT_EQ(0, pipe(fault));
	server.pipe = fault[1];
	ASSERT_EQ(0, pthread_create(&thread, NULL, serve_thread, &server));

	EXPECT_EQ(page / 8 * 0x0909090909090909ULL, gpu_sum(self->fd, p, page));
	ASSERT_EQ(0, pthread_join(thread, NULL));
	EXPECT_EQ(0, server.err);
	EXPECT_EQ(gpu_addr(p), server.address);
	close(server.uffd);
}

/*
 * A child whose first command waits for a page that never comes. Returns when
 * the device has faulted, so that only a signal can end the wait. A second
 * command would write to @next.
 */
static pid_t stuck_child(void *p, void *next)
{
	int fault[2];
	pid_t pid;

	if (pipe(fault))
		return -errno;
	pid = fork();
	if (!pid) {
		struct server server = { .uffd = uffd_open(), .pipe = fault[1] };
		struct dummy_gpu_command commands[] = {
			gpu_fill(p, 1, page),
			gpu_fill(next, 1, page),
		};
		struct dummy_gpu_submit submit = gpu_submission(commands, 2);
		int fd = gpu_open(GPU_DEVICE);
		pthread_t thread;

		if (fd < 0 || server.uffd < 0 || uffd_register(server.uffd, p, page))
			_exit(1);
		if (pthread_create(&thread, NULL, serve_thread, &server))
			_exit(2);
		gpu_submit(fd, &submit);
		_exit(3);
	}
	close(fault[1]);
	if (token_wait(fault[0]))
		pid = -EPIPE;
	close(fault[0]);
	return pid;
}

TEST_F(svm, userfault_killed)
{
	uint8_t *shared = mmap(NULL, page, PROT_READ | PROT_WRITE,
			       MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	uint8_t *p = map(page, PROT_READ | PROT_WRITE);
	int uffd = uffd_open(), status;
	pid_t pid;

	if (uffd < 0)
		SKIP(return, "no userfaultfd: %s", strerror(-uffd));
	close(uffd);
	ASSERT_NE(MAP_FAILED, p);
	ASSERT_NE(MAP_FAILED, shared);
	pid = stuck_child(p, shared);
	ASSERT_LT(0, pid);

	usleep(50 * 1000);
	EXPECT_EQ(0, waitpid(pid, &status, WNOHANG));
	ASSERT_EQ(0, kill(pid, SIGKILL));
	status = wait_child(pid, 5);
	ASSERT_NE(-1, status);
	EXPECT_TRUE(WIFSIGNALED(status));
	EXPECT_EQ(SIGKILL, WTERMSIG(status));

	/* The second command of the submission did not run. */
	EXPECT_EQ(page, cpu_unlike(shared, 0, page));

	/* The device still works for other processes. */
	EXPECT_EQ(0, run(self->fd, gpu_fill(p, 2, page)));
	EXPECT_EQ(page, cpu_unlike(p, 2, page));
}

/*
 * While one process waits for a userfaultfd, commands of another process run.
 */
TEST_F(svm, userfault_bystander)
{
	uint8_t *p = map(page, PROT_READ | PROT_WRITE);
	int uffd = uffd_open();
	pid_t pid;

	if (uffd < 0)
		SKIP(return, "no userfaultfd: %s", strerror(-uffd));
	close(uffd);
	ASSERT_NE(MAP_FAILED, p);
	pid = stuck_child(p, p);
	ASSERT_LT(0, pid);

	EXPECT_EQ(0, run(self->fd, gpu_fill(p, 3, page)));
	EXPECT_EQ(page, cpu_unlike(p, 3, page));
	ASSERT_EQ(0, kill(pid, SIGKILL));
	EXPECT_NE(-1, wait_child(pid, 5));
}

TEST_HARNESS_MAIN
