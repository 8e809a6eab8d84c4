// SPDX-License-Identifier: GPL-2.0
/*
 * Tests of the memory of the dummy GPU and, through it, of migration in the
 * Rust HMM core: which pages migrate, and that no byte is lost.
 *
 * Results are written to shared memory, which never migrates. So all pages that
 * the counters count are those of the test.
 */
#include <linux/mempolicy.h>
#include <pthread.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>

#include "dummy_gpu_harness.h"

FIXTURE(vram)
{
	int fd;
	size_t size;
	uint64_t *result;
};

FIXTURE_SETUP(vram)
{
	setup_vram(_metadata, &self->fd, &self->size, &self->result);
}

FIXTURE_TEARDOWN(vram)
{
	munmap(self->result, page);
	close(self->fd);
}

/* A vector whose bytes are all the same has this sum. */
static uint64_t sum_of(uint8_t value, size_t length)
{
	return length / 8 * (value * 0x0101010101010101ULL);
}

/* New memory that the device has filled, so that it is in device memory. */
static uint8_t *map_filled(struct __test_metadata *_metadata, int fd, size_t length,
			   uint8_t value)
{
	uint64_t before = stats_of(_metadata, fd).device_pages;
	uint8_t *p = map(length, PROT_READ | PROT_WRITE);

	ASSERT_NE(MAP_FAILED, p);
	ASSERT_EQ(0, run(fd, gpu_fill(p, value, length)));
	ASSERT_EQ(before + length / page, stats_of(_metadata, fd).device_pages);
	return p;
}

/* Binds the memory that this task allocates to one node. */
static int bind_to_node(unsigned int node)
{
	const unsigned long nodes = 1UL << node;

	return syscall(SYS_set_mempolicy, MPOL_BIND, &nodes, 8 * sizeof(nodes));
}

/* The number of pages on a node. Pages on the device are on no node. */
static size_t pages_on_node(uint8_t *p, size_t length, int node)
{
	size_t found = 0;

	for (size_t i = 0; i < length; i += page) {
		void *at = p + i;
		int on;

		if (!syscall(SYS_move_pages, 0, 1UL, &at, NULL, &on, 0) && on == node)
			found++;
	}
	return found;
}

TEST_F(vram, first_touch)
{
	const size_t pages = 1000, length = pages * page;
	uint8_t *p = map(length, PROT_READ | PROT_WRITE);
	struct dummy_gpu_stats stats;

	ASSERT_NE(MAP_FAILED, p);
	ASSERT_EQ(0, run(self->fd, gpu_fill(p, 0x3c, length)));
	stats = stats_of(_metadata, self->fd);
	EXPECT_EQ(pages, stats.pages_to_device);
	EXPECT_EQ(pages, stats.device_pages);
	EXPECT_EQ(0, stats.pages_cpu_faulted);

	/* The CPU gets the page that it reads and at most 15 others. */
	EXPECT_EQ(0x3c, p[length / 2]);
	stats = stats_of(_metadata, self->fd);
	EXPECT_LE(1, stats.pages_cpu_faulted);
	EXPECT_GE(16, stats.pages_cpu_faulted);
	EXPECT_EQ(pages, stats.device_pages + stats.pages_cpu_faulted);

	EXPECT_EQ(length, cpu_unlike(p, 0x3c, length));
	stats = stats_of(_metadata, self->fd);
	EXPECT_EQ(pages, stats.pages_to_device);
	EXPECT_EQ(pages, stats.pages_cpu_faulted);
	EXPECT_EQ(0, stats.device_pages);
	EXPECT_EQ(0, stats.pages_evicted);
	EXPECT_EQ(0, stats.pages_to_system);
	munmap(p, length);
}

/* Pages that the CPU has written before migrate with their contents. */
TEST_F(vram, touched_before)
{
	const size_t pages = 256, length = pages * page;
	uint8_t *p = map(length, PROT_READ | PROT_WRITE), *copy = malloc(length);

	ASSERT_NE(MAP_FAILED, p);
	ASSERT_NE(NULL, copy);
	/*
	 * One third of the pages is not populated, one third is the zero page.
	 */
	for (size_t i = 0; i < pages; i += 3)
		cpu_randomize(p + i * page, page, i);
	for (size_t i = 1; i < pages; i += 3)
		ASSERT_EQ(0, cpu_load(p + i * page));
	memset(copy, 0, length);
	for (size_t i = 0; i < pages; i += 3)
		cpu_randomize(copy + i * page, page, i);

	/* A read moves the pages that exist, a prefetch populates the others too. */
	EXPECT_EQ(cpu_sum((uint64_t *)copy, length), vram_sum(self->fd, self->result, p, length));
	EXPECT_EQ((pages + 2) / 3, stats_of(_metadata, self->fd).device_pages);
	EXPECT_EQ(pages - (pages + 2) / 3,
		  prefetch_all(self->fd, p, length, DUMMY_GPU_LOCATION_DEVICE));
	EXPECT_EQ(cpu_sum((uint64_t *)copy, length), vram_sum(self->fd, self->result, p, length));
	EXPECT_EQ(pages, stats_of(_metadata, self->fd).device_pages);
	EXPECT_EQ(length, cpu_differs(p, copy, length));
	EXPECT_EQ(0, stats_of(_metadata, self->fd).device_pages);
	munmap(p, length);
	free(copy);
}

/* Migrates back and forth; the CPU writes to a part of the memory each time. */
TEST_F(vram, moved_data)
{
	const size_t length = 64 * page + 0x123;
	uint8_t *p = map(65 * page, PROT_READ | PROT_WRITE);
	uint8_t *q = map(65 * page, PROT_READ | PROT_WRITE);
	uint8_t *x = malloc(length), *y = malloc(length);
	uint64_t seed = 1;

	ASSERT_NE(MAP_FAILED, p);
	ASSERT_NE(MAP_FAILED, q);
	ASSERT_NE(NULL, x);
	ASSERT_NE(NULL, y);
	cpu_randomize(x, length, 11);
	cpu_randomize(y, length, 12);
	memcpy(p, x, length);
	memcpy(q, y, length);
	for (int round = 0; round < 30; round++) {
		size_t at = cpu_random(&seed) % length;
		size_t n = cpu_random(&seed) % (length - at) % (round & 1 ? 3 * page : 9) + 1;

		ASSERT_EQ(0, run(self->fd, gpu_binary(DUMMY_GPU_OP_XOR, p, p, q, length)));
		for (size_t i = 0; i < length; i++)
			x[i] ^= y[i];
		cpu_randomize(p + at, n, round);
		cpu_randomize(x + at, n, round);
		cpu_randomize(q + length - at - n, n, ~round);
		cpu_randomize(y + length - at - n, n, ~round);
		if (round % 3 == 2) {
			ASSERT_EQ(length, cpu_differs(p, x, length));
			ASSERT_EQ(length, cpu_differs(q, y, length));
		}
	}
	EXPECT_EQ(length, cpu_differs(p, x, length));
	EXPECT_EQ(length, cpu_differs(q, y, length));
	EXPECT_EQ(65 * page - length, cpu_unlike(p + length, 0, 65 * page - length));
	EXPECT_LT(0, stats_of(_metadata, self->fd).pages_cpu_faulted);
	munmap(p, 65 * page);
	munmap(q, 65 * page);
	free(x);
	free(y);
}

/* Old contents of device memory must not be visible. */
TEST_F(vram, zeroes)
{
	uint8_t *p = map_filled(_metadata, self->fd, self->size, 0xff);

	ASSERT_EQ(0, munmap(p, self->size));
	EXPECT_EQ(0, stats_of(_metadata, self->fd).device_pages);

	p = map(self->size, PROT_READ | PROT_WRITE);
	ASSERT_NE(MAP_FAILED, p);
	EXPECT_EQ(self->size / page,
		  prefetch_all(self->fd, p, self->size, DUMMY_GPU_LOCATION_DEVICE));
	EXPECT_EQ(0, vram_sum(self->fd, self->result, p, self->size));
	EXPECT_EQ(self->size / page, stats_of(_metadata, self->fd).device_pages);
	EXPECT_EQ(BUFFER, cpu_unlike(p, 0, BUFFER));

	/* Not in the rest of a page that the device writes, either. */
	ASSERT_EQ(0, madvise(p, self->size, MADV_DONTNEED));
	ASSERT_EQ(0, run(self->fd, gpu_fill(p + page + 5, 1, 1)));
	EXPECT_EQ(page + 5, cpu_unlike(p, 0, page + 5));
	EXPECT_EQ(1, p[page + 5]);
	EXPECT_EQ(page, cpu_unlike(p + page + 6, 0, page));
	munmap(p, self->size);
}

/* The resident memory of this process, in pages. */
static long resident(struct __test_metadata *_metadata)
{
	FILE *statm = fopen("/proc/self/statm", "re");
	long pages = -1;

	ASSERT_NE(NULL, statm);
	ASSERT_EQ(1, fscanf(statm, "%*d %ld", &pages));
	fclose(statm);
	return pages;
}

/* A read by the device allocates no more than one by the CPU does, whatever the policy. */
TEST_F(vram, a_read_populates_nothing)
{
	static const int policies[] = {
		DUMMY_GPU_POLICY_DEVICE, DUMMY_GPU_POLICY_SYSTEM, DUMMY_GPU_POLICY_NONE,
	};
	const size_t length = self->size / 4;

	for (size_t i = 0; i < ARRAY_SIZE(policies); i++) {
		uint8_t *p = map(length, PROT_READ | PROT_WRITE);
		struct dummy_gpu_stats stats;
		long before;

		ASSERT_NE(MAP_FAILED, p);
		ASSERT_EQ(0, madvise(p, length, MADV_NOHUGEPAGE) && errno != EINVAL);
		ASSERT_EQ(0, gpu_advise(self->fd, p, length, policies[i]));
		/* Populate two pages, far from each other. */
		p[0] = 1;
		p[length - 1] = 1;
		before = resident(_metadata);
		EXPECT_EQ(1 + (1ULL << 56), vram_sum(self->fd, self->result, p, length));
		/* The counter may lag behind by some pages for each CPU. */
		EXPECT_GE(before + 256, resident(_metadata));
		stats = stats_of(_metadata, self->fd);
		EXPECT_EQ(i ? 0 : 2, stats.device_pages);
		EXPECT_EQ(2, stats.pages_to_device);
		EXPECT_EQ(0, stats.pages_evicted);
		EXPECT_EQ(1, p[0]);
		EXPECT_EQ(1, p[length - 1]);
		EXPECT_EQ(0, stats_of(_metadata, self->fd).device_pages);
		ASSERT_EQ(0, munmap(p, length));
	}
}

/*
 * Evicted pages are not subject to the memory policy of the task that evicts
 * them.
 */
TEST_F(vram, eviction_to_the_node_that_pages_came_from)
{
	uint8_t *victim = map(self->size, PROT_READ | PROT_WRITE);
	size_t stayed;
	uint8_t *p;

	ASSERT_NE(MAP_FAILED, victim);
	if (bind_to_node(1))
		SKIP(return, "there is one NUMA node only");
	memset(victim, 0x5a, self->size);
	ASSERT_EQ(self->size / page, pages_on_node(victim, self->size, 1));
	ASSERT_EQ(sum_of(0x5a, self->size), vram_sum(self->fd, self->result, victim, self->size));
	stayed = pages_on_node(victim, self->size, 1);
	ASSERT_GT(self->size / page / 4, stayed);

	ASSERT_EQ(0, bind_to_node(0));
	p = map(self->size / 2, PROT_READ | PROT_WRITE);
	ASSERT_NE(MAP_FAILED, p);
	ASSERT_EQ(0, run(self->fd, gpu_fill(p, 0x5b, self->size / 2)));
	ASSERT_LE(self->size / page / 4, stats_of(_metadata, self->fd).pages_evicted);
	EXPECT_EQ(stayed + stats_of(_metadata, self->fd).pages_evicted,
		  pages_on_node(victim, self->size, 1));
	EXPECT_EQ(0, pages_on_node(victim, self->size, 0));
	EXPECT_EQ(self->size, cpu_unlike(victim, 0x5a, self->size));
	munmap(p, self->size / 2);
	munmap(victim, self->size);
}

/* Nothing is evicted to make room for memory that cannot move. */
TEST_F(vram, no_eviction_for_what_does_not_move)
{
	/* Of huge pages one would be evicted whole. */
	const int no_thp = prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0);
	uint8_t *victim = map_filled(_metadata, self->fd, self->size, 0x5a);
	const size_t length = self->size / 16;
	int file = temporary_file(length);
	uint8_t *p = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
	int fd = gpu_open(GPU_DEVICE);
	struct dummy_gpu_stats stats;

	ASSERT_EQ(0, no_thp);
	ASSERT_LE(0, fd);
	ASSERT_NE(MAP_FAILED, p);
	/* One page is a private copy, the others are page cache. */
	p[0] = 1;
	EXPECT_EQ(1, vram_sum(fd, self->result, p, length));
	stats = stats_of(_metadata, fd);
	EXPECT_EQ(1, stats.pages_to_device);
	EXPECT_EQ(1, stats_of(_metadata, self->fd).pages_evicted);
	munmap(p, length);

	/* Untouched memory, and memory that KSM may merge, where there is KSM. */
	p = map(length, PROT_READ | PROT_WRITE);
	ASSERT_NE(MAP_FAILED, p);
	EXPECT_EQ(0, vram_sum(fd, self->result, p, length));
	memset(p, 2, length);
	if (!madvise(p, length, MADV_MERGEABLE))
		EXPECT_EQ(sum_of(2, length), vram_sum(fd, self->result, p, length));
	stats = stats_of(_metadata, fd);
	EXPECT_EQ(1, stats.pages_to_device);
	EXPECT_EQ(1, stats_of(_metadata, self->fd).pages_evicted);
	EXPECT_EQ(self->size, cpu_unlike(victim, 0x5a, self->size));
	munmap(p, length);
	munmap(victim, self->size);
	close(fd);
	close(file);
}

/* Nothing is evicted to make room for memory that is swapped out. */
TEST_F(vram, no_eviction_for_what_is_swapped_out)
{
	const char *disk = "/dev/ram0";
	const size_t length = 64 * page;
	uint8_t *victim = map_filled(_metadata, self->fd, self->size, 0x5a);
	uint8_t *p = map(length, PROT_READ | PROT_WRITE);
	struct dummy_gpu_stats before, after;
	int fd = gpu_open(GPU_DEVICE), err;
	size_t swapped;

	ASSERT_LE(0, fd);
	ASSERT_NE(MAP_FAILED, p);
	err = swap_on(disk);
	if (err)
		SKIP(return, "no swap on %s: %s", disk, strerror(-err));
	memset(p, 3, length);
	swapped = swap_out(p, length);
	before = stats_of(_metadata, self->fd);
	err = run(fd, gpu_unary(DUMMY_GPU_OP_SUM, self->result, p, length));
	after = stats_of(_metadata, self->fd);
	EXPECT_EQ(0, swapoff(disk));

	EXPECT_EQ(length / page, swapped);
	EXPECT_EQ(0, err);
	EXPECT_EQ(sum_of(3, length), *self->result);
	EXPECT_EQ(before.pages_evicted, after.pages_evicted);
	EXPECT_EQ(0, stats_of(_metadata, fd).pages_to_device);
	EXPECT_EQ(self->size, cpu_unlike(victim, 0x5a, self->size));
	munmap(p, length);
	munmap(victim, self->size);
	close(fd);
}

TEST_F(vram, policy_system)
{
	const size_t pages = 600, length = pages * page;
	uint8_t *p = map(length, PROT_READ | PROT_WRITE);
	struct dummy_gpu_stats stats;

	ASSERT_NE(MAP_FAILED, p);
	memset(p, 1, length / 2);
	ASSERT_EQ(0, gpu_advise(self->fd, p, length, DUMMY_GPU_POLICY_SYSTEM));
	EXPECT_EQ(sum_of(1, length / 2), vram_sum(self->fd, self->result, p, length));
	ASSERT_EQ(0, run(self->fd, gpu_fill(p, 2, length)));
	stats = stats_of(_metadata, self->fd);
	EXPECT_EQ(0, stats.pages_to_device);
	EXPECT_EQ(0, stats.device_pages);
	EXPECT_EQ(length, cpu_unlike(p, 2, length));

	/*
	 * The policy moves pages back to system memory when the device faults,
	 * not before.
	 */
	ASSERT_EQ(pages, prefetch_all(self->fd, p, length, DUMMY_GPU_LOCATION_DEVICE));
	ASSERT_EQ(0, gpu_advise(self->fd, p, length, DUMMY_GPU_POLICY_SYSTEM));
	EXPECT_EQ(pages, stats_of(_metadata, self->fd).device_pages);
	EXPECT_EQ(sum_of(2, length), vram_sum(self->fd, self->result, p, length));
	stats = stats_of(_metadata, self->fd);
	EXPECT_EQ(pages, stats.pages_to_system);
	EXPECT_EQ(0, stats.device_pages);
	EXPECT_EQ(0, stats.pages_cpu_faulted);
	EXPECT_EQ(length, cpu_unlike(p, 2, length));
	EXPECT_EQ(0, stats_of(_metadata, self->fd).pages_cpu_faulted);
	munmap(p, length);
}

TEST_F(vram, policy_none)
{
	const size_t pages = 32, length = pages * page;
	uint8_t *p = map(2 * length, PROT_READ | PROT_WRITE), *q = p + length;
	struct dummy_gpu_stats stats;

	/* p is in RAM, q on the device. */
	ASSERT_NE(MAP_FAILED, p);
	memset(p, 1, length);
	ASSERT_EQ(0, run(self->fd, gpu_fill(q, 2, length)));
	ASSERT_EQ(0, gpu_advise(self->fd, p, 2 * length, DUMMY_GPU_POLICY_NONE));

	/* New entries in the page table of the device, for both. */
	ASSERT_EQ(0, mprotect(p, 2 * length, PROT_READ));
	EXPECT_EQ(sum_of(3, length), vram_sum(self->fd, self->result, p, 2 * length));
	ASSERT_EQ(0, mprotect(p, 2 * length, PROT_READ | PROT_WRITE));
	EXPECT_EQ(sum_of(3, length), vram_sum(self->fd, self->result, p, 2 * length));
	stats = stats_of(_metadata, self->fd);
	EXPECT_EQ(pages, stats.pages_to_device);
	EXPECT_EQ(pages, stats.device_pages);
	EXPECT_EQ(0, stats.pages_to_system);
	EXPECT_EQ(0, stats.pages_cpu_faulted);

	ASSERT_EQ(0, run(self->fd, gpu_fill(p, 4, length)));
	EXPECT_EQ(length, cpu_unlike(p, 4, length));
	EXPECT_EQ(0, stats_of(_metadata, self->fd).pages_cpu_faulted);
	EXPECT_EQ(length, cpu_unlike(q, 2, length));
	EXPECT_EQ(pages, stats_of(_metadata, self->fd).pages_cpu_faulted);

	/*
	 * Pages that the CPU touched stay in system memory, and so do new
	 * pages.
	 */
	ASSERT_EQ(0, madvise(p, length, MADV_DONTNEED));
	ASSERT_EQ(0, run(self->fd, gpu_fill(p, 5, 2 * length)));
	EXPECT_EQ(2 * length, cpu_unlike(p, 5, 2 * length));
	stats = stats_of(_metadata, self->fd);
	EXPECT_EQ(pages, stats.pages_to_device);
	EXPECT_EQ(0, stats.device_pages);
	munmap(p, 2 * length);
}

/* Each page has the policy of its address; the default can be set again. */
TEST_F(vram, policy_ranges)
{
	const size_t pages = 64, length = pages * page;
	uint8_t *p = map(length, PROT_READ | PROT_WRITE);
	struct dummy_gpu_stats stats;

	ASSERT_NE(MAP_FAILED, p);
	ASSERT_EQ(0, gpu_advise(self->fd, p + 10 * page, 10 * page, DUMMY_GPU_POLICY_NONE));
	ASSERT_EQ(0, gpu_advise(self->fd, p + 20 * page, 10 * page, DUMMY_GPU_POLICY_SYSTEM));
	ASSERT_EQ(0, gpu_advise(self->fd, p + 63 * page, page, DUMMY_GPU_POLICY_SYSTEM));
	ASSERT_EQ(0, run(self->fd, gpu_fill(p, 7, length)));
	stats = stats_of(_metadata, self->fd);
	EXPECT_EQ(43, stats.pages_to_device);
	EXPECT_EQ(43, stats.device_pages);

	/*
	 * A CPU access to pages that are not on the device causes no CPU fault
	 * there.
	 */
	EXPECT_EQ(20 * page, cpu_unlike(p + 10 * page, 7, 20 * page));
	EXPECT_EQ(page, cpu_unlike(p + 63 * page, 7, page));
	EXPECT_EQ(0, stats_of(_metadata, self->fd).pages_cpu_faulted);
	EXPECT_EQ(length, cpu_unlike(p, 7, length));
	EXPECT_EQ(43, stats_of(_metadata, self->fd).pages_cpu_faulted);

	/*
	 * A third policy for the last page of one range and the first page of
	 * the next.
	 */
	ASSERT_EQ(0, madvise(p, length, MADV_DONTNEED));
	ASSERT_EQ(0, gpu_advise(self->fd, p + 29 * page, 35 * page, DUMMY_GPU_POLICY_DEVICE));
	ASSERT_EQ(0, gpu_advise(self->fd, p + 9 * page, 2 * page, DUMMY_GPU_POLICY_DEVICE));
	ASSERT_EQ(0, run(self->fd, gpu_fill(p, 8, length)));
	EXPECT_EQ(43 + 46, stats_of(_metadata, self->fd).pages_to_device);
	EXPECT_EQ(length, cpu_unlike(p, 8, length));

	ASSERT_EQ(0, madvise(p, length, MADV_DONTNEED));
	ASSERT_EQ(0, gpu_advise(self->fd, p, length, DUMMY_GPU_POLICY_DEVICE));
	ASSERT_EQ(0, run(self->fd, gpu_fill(p, 9, length)));
	EXPECT_EQ(43 + 46 + 64, stats_of(_metadata, self->fd).pages_to_device);
	EXPECT_EQ(length, cpu_unlike(p, 9, length));
	munmap(p, length);
}

/* Memory that shares a window with other memory keeps its own policy. */
TEST_F(vram, policy_of_neighbours)
{
	const size_t length = 16 * page, window = 2UL << 20;
	uint8_t *space = map(2 * window, PROT_READ | PROT_WRITE);
	uint8_t *p = (uint8_t *)((gpu_addr(space) + window - 1) & -window), *q = p + length;

	/* In one window: p is to be in RAM, q in the memory of the device. Both are in RAM. */
	ASSERT_NE(MAP_FAILED, space);
	memset(p, 1, 2 * length);
	ASSERT_EQ(0, gpu_advise(self->fd, p, length, DUMMY_GPU_POLICY_SYSTEM));
	EXPECT_EQ(sum_of(1, length), vram_sum(self->fd, self->result, p, length));
	EXPECT_EQ(sum_of(1, length), vram_sum(self->fd, self->result, q, length));
	EXPECT_EQ(length / page, stats_of(_metadata, self->fd).device_pages);

	/* And the other way round: both are on the device, as if they had just come there. */
	ASSERT_EQ(length / page, prefetch_all(self->fd, p, length, DUMMY_GPU_LOCATION_DEVICE));
	ASSERT_EQ(0, mprotect(p, 2 * length, PROT_READ));
	EXPECT_EQ(sum_of(1, length), vram_sum(self->fd, self->result, q, length));
	EXPECT_EQ(sum_of(1, length), vram_sum(self->fd, self->result, p, length));
	EXPECT_EQ(length / page, stats_of(_metadata, self->fd).pages_to_system);
	EXPECT_EQ(length / page, stats_of(_metadata, self->fd).device_pages);
	munmap(space, 2 * window);
}

/*
 * A policy belongs to addresses, not to the memory there, and to one open file.
 */
TEST_F(vram, policy_of_file)
{
	const size_t length = 16 * page;
	uint8_t *p = map(length, PROT_READ | PROT_WRITE);
	int fd = gpu_open(GPU_DEVICE);

	ASSERT_LE(0, fd);
	ASSERT_NE(MAP_FAILED, p);
	ASSERT_EQ(0, gpu_advise(self->fd, NULL, gpu_addr(p) + length, DUMMY_GPU_POLICY_SYSTEM));
	for (int i = 0; i < 2; i++) {
		ASSERT_EQ(0, run(self->fd, gpu_fill(p, 1, length)));
		EXPECT_EQ(0, stats_of(_metadata, self->fd).pages_to_device);
		ASSERT_EQ(0, munmap(p, length));
		ASSERT_EQ(p, map_at(p, length));
	}
	ASSERT_EQ(0, run(fd, gpu_fill(p, 2, length)));
	EXPECT_EQ(length / page, stats_of(_metadata, fd).pages_to_device);
	EXPECT_EQ(0, close(fd));
	EXPECT_EQ(length, cpu_unlike(p, 2, length));
	munmap(p, length);
}

TEST_F(vram, policy_too_many)
{
	const size_t max = 1024, length = (2 * max + 6) * page;
	uint8_t *p = map(length, PROT_READ | PROT_WRITE), *q = p + 4 * page;
	struct {
		struct dummy_gpu_advise advise;
		uint64_t later;
	} larger = {
		.advise = {
			.size = sizeof(larger),
			.start = gpu_addr(p + page),
			.length = page,
			.policy = DUMMY_GPU_POLICY_DEVICE,
		},
	};

	ASSERT_NE(MAP_FAILED, p);
	ASSERT_EQ(0, gpu_advise(self->fd, p, 3 * page, DUMMY_GPU_POLICY_SYSTEM));
	for (size_t i = 1; i < max; i++, q += 2 * page)
		ASSERT_EQ(0, gpu_advise(self->fd, q, page, DUMMY_GPU_POLICY_SYSTEM));

	/* No range can be added or split, and the policies are unchanged. */
	EXPECT_EQ(-ENOSPC, gpu_advise(self->fd, q, page, DUMMY_GPU_POLICY_SYSTEM));
	EXPECT_EQ(-ENOSPC, gpu_ioctl(self->fd, DUMMY_GPU_IOC_ADVISE, &larger));
	EXPECT_EQ(sizeof(larger.advise), larger.advise.size);
	ASSERT_EQ(0, run(self->fd, gpu_fill(p, 1, 3 * page)));
	EXPECT_EQ(0, stats_of(_metadata, self->fd).pages_to_device);
	ASSERT_EQ(0, run(self->fd, gpu_fill(q - 2 * page, 1, 3 * page)));
	EXPECT_EQ(2, stats_of(_metadata, self->fd).pages_to_device);

	/* Joining two ranges makes room. */
	EXPECT_EQ(0, gpu_advise(self->fd, p + 3 * page, page, DUMMY_GPU_POLICY_SYSTEM));
	EXPECT_EQ(0, gpu_advise(self->fd, q, page, DUMMY_GPU_POLICY_SYSTEM));
	EXPECT_EQ(-ENOSPC, gpu_advise(self->fd, p + page, page, DUMMY_GPU_POLICY_NONE));
	EXPECT_EQ(0, gpu_advise(self->fd, p, length, DUMMY_GPU_POLICY_DEVICE));
	EXPECT_EQ(0, gpu_advise(self->fd, p + page, page, DUMMY_GPU_POLICY_NONE));
	munmap(p, length);
}

TEST_F(vram, prefetch)
{
	const size_t pages = 700, length = pages * page;
	uint8_t *p = map(length, PROT_READ | PROT_WRITE), *copy = malloc(length);
	struct dummy_gpu_stats stats;

	ASSERT_NE(MAP_FAILED, p);
	ASSERT_NE(NULL, copy);
	cpu_randomize(copy, length, 21);
	memcpy(p, copy, length);
	for (unsigned int i = 1; i < 4; i++) {
		EXPECT_EQ(0, prefetch_all(self->fd, p, length, DUMMY_GPU_LOCATION_SYSTEM));
		EXPECT_EQ(pages, prefetch_all(self->fd, p, length, DUMMY_GPU_LOCATION_DEVICE));
		EXPECT_EQ(0, prefetch_all(self->fd, p, length, DUMMY_GPU_LOCATION_DEVICE));
		stats = stats_of(_metadata, self->fd);
		EXPECT_EQ(i * pages, stats.pages_to_device);
		EXPECT_EQ(pages, stats.device_pages);

		EXPECT_EQ(pages, prefetch_all(self->fd, p, length, DUMMY_GPU_LOCATION_SYSTEM));
		stats = stats_of(_metadata, self->fd);
		EXPECT_EQ(i * pages, stats.pages_to_system);
		EXPECT_EQ(0, stats.device_pages);
	}
	EXPECT_EQ(length, cpu_differs(p, copy, length));
	stats = stats_of(_metadata, self->fd);
	EXPECT_EQ(0, stats.pages_cpu_faulted);
	EXPECT_EQ(0, stats.pages_evicted);
	EXPECT_EQ(0, stats.faults);

	/* Only those that are elsewhere move. */
	ASSERT_EQ(20, prefetch_all(self->fd, p + 10 * page, 20 * page, DUMMY_GPU_LOCATION_DEVICE));
	EXPECT_EQ(pages - 20, prefetch_all(self->fd, p, length, DUMMY_GPU_LOCATION_DEVICE));
	EXPECT_EQ(20, prefetch_all(self->fd, p + 10 * page, 20 * page, DUMMY_GPU_LOCATION_SYSTEM));
	EXPECT_EQ(pages - 20, prefetch_all(self->fd, p, length, DUMMY_GPU_LOCATION_SYSTEM));
	EXPECT_EQ(length, cpu_differs(p, copy, length));
	munmap(p, length);
	free(copy);
}

/*
 * A prefetch to the device populates untouched memory; one to system memory
 * does not.
 */
TEST_F(vram, prefetch_untouched)
{
	const size_t pages = 40, length = pages * page;
	uint8_t *p = map(length, PROT_READ | PROT_WRITE);

	ASSERT_NE(MAP_FAILED, p);
	EXPECT_EQ(0, prefetch_all(self->fd, p, length, DUMMY_GPU_LOCATION_SYSTEM));
	EXPECT_EQ(pages, prefetch_all(self->fd, p, length, DUMMY_GPU_LOCATION_DEVICE));
	EXPECT_EQ(pages, stats_of(_metadata, self->fd).device_pages);
	EXPECT_EQ(length, cpu_unlike(p, 0, length));
	munmap(p, length);
}

TEST_F(vram, prefetch_hole)
{
	const enum dummy_gpu_location places[] = {
		DUMMY_GPU_LOCATION_DEVICE, DUMMY_GPU_LOCATION_SYSTEM
	};
	const size_t length = 16 * page;
	uint8_t *p = map(length, PROT_READ | PROT_WRITE);
	struct dummy_gpu_prefetch prefetch;

	ASSERT_NE(MAP_FAILED, p);
	memset(p, 0x31, length);
	ASSERT_EQ(0, munmap(p + 10 * page, page));
	for (size_t i = 0; i < ARRAY_SIZE(places); i++) {
		prefetch = gpu_prefetching(p, length, places[i]);
		EXPECT_EQ(-EFAULT, gpu_prefetch(self->fd, &prefetch));
		EXPECT_EQ(10 * page, prefetch.done);
		EXPECT_EQ(10, prefetch.pages);

		prefetch = gpu_prefetching(p + 10 * page, 2 * page, places[i]);
		EXPECT_EQ(-EFAULT, gpu_prefetch(self->fd, &prefetch));
		EXPECT_EQ(0, prefetch.done);
		EXPECT_EQ(0, prefetch.pages);
	}
	EXPECT_EQ(10 * page, cpu_unlike(p, 0x31, 10 * page));
	EXPECT_EQ(5 * page, cpu_unlike(p + 11 * page, 0x31, 5 * page));
	munmap(p, length);
}

/*
 * Memory of files does not move, except for private copies. That is no error,
 * and the memory after it still moves.
 */
TEST_F(vram, prefetch_other_memory)
{
	const size_t pages = 8, length = pages * page;
	uint8_t *space = map(5 * length, PROT_READ | PROT_WRITE);
	int file = temporary_file(length);

	ASSERT_NE(MAP_FAILED, space);
	ASSERT_LE(0, file);
	ASSERT_EQ(space, mmap(space, length, PROT_READ | PROT_WRITE,
			      MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED, -1, 0));
	ASSERT_EQ(space + length, mmap(space + length, length, PROT_READ | PROT_WRITE,
				       MAP_SHARED | MAP_FIXED, file, 0));
	ASSERT_EQ(space + 2 * length, mmap(space + 2 * length, length, PROT_READ | PROT_WRITE,
					   MAP_PRIVATE | MAP_FIXED, file, 0));
	ASSERT_EQ(space + 3 * length, mmap(space + 3 * length, length, PROT_READ,
					   MAP_PRIVATE | MAP_FIXED, file, 0));
	memset(space, 1, 2 * length);
	memset(space + 2 * length, 2, length);
	memset(space + 4 * length, 3, length);

	EXPECT_EQ(pages, prefetch_all(self->fd, space, 4 * length, DUMMY_GPU_LOCATION_DEVICE));
	EXPECT_EQ(pages, prefetch_all(self->fd, space, 4 * length, DUMMY_GPU_LOCATION_SYSTEM));
	EXPECT_EQ(2 * pages, prefetch_all(self->fd, space, 5 * length, DUMMY_GPU_LOCATION_DEVICE));
	EXPECT_EQ(2 * pages, stats_of(_metadata, self->fd).device_pages);
	EXPECT_EQ(2 * length, cpu_unlike(space, 1, 2 * length));
	EXPECT_EQ(length, cpu_unlike(space + 2 * length, 2, length));
	EXPECT_EQ(length, cpu_unlike(space + 3 * length, 1, length));
	EXPECT_EQ(length, cpu_unlike(space + 4 * length, 3, length));
	munmap(space, 5 * length);
	close(file);
}

/*
 * A prefetch of more than fits: the last pages stay on the device, the first
 * are evicted.
 */
TEST_F(vram, prefetch_too_much)
{
	const size_t length = self->size + 4 * (2UL << 20), pages = length / page;
	uint64_t *p = map(length, PROT_READ | PROT_WRITE);
	struct dummy_gpu_stats stats;

	ASSERT_NE(MAP_FAILED, p);
	for (size_t i = 0; i < length / sizeof(*p); i += page / sizeof(*p))
		p[i] = i;
	EXPECT_EQ(pages, prefetch_all(self->fd, p, length, DUMMY_GPU_LOCATION_DEVICE));
	stats = stats_of(_metadata, self->fd);
	EXPECT_EQ(pages, stats.pages_to_device);
	EXPECT_LE(pages - self->size / page, stats.pages_evicted);
	EXPECT_EQ(pages, stats.device_pages + stats.pages_evicted);
	for (size_t i = 0; i < length / sizeof(*p); i += page / sizeof(*p))
		ASSERT_EQ(i, p[i]);
	munmap(p, length);
}

/* Pages on the device occupy no system memory. */
TEST_F(vram, prefetch_frees_memory)
{
	const size_t length = self->size / 2;
	uint8_t *p = map(length, PROT_READ | PROT_WRITE), *all;
	uint64_t before, after;

	/* From now on the struct pages of all device memory are allocated. */
	all = map_filled(_metadata, self->fd, self->size, 1);
	ASSERT_EQ(0, munmap(all, self->size));

	ASSERT_NE(MAP_FAILED, p);
	memset(p, 0x5f, length);
	before = cpu_free_memory();
	if (!before)
		SKIP(return, "no MemFree in /proc/meminfo");
	if (!access("/sys/kernel/debug/kmemleak", F_OK))
		SKIP(return, "the kernel keeps freed memory back");
	ASSERT_EQ(length / page, prefetch_all(self->fd, p, length, DUMMY_GPU_LOCATION_DEVICE));
	after = cpu_free_memory();
	EXPECT_LE(before + length / 4 * 3, after);
	EXPECT_GE(before + length / 4 * 5, after);

	ASSERT_EQ(length / page, prefetch_all(self->fd, p, length, DUMMY_GPU_LOCATION_SYSTEM));
	after = cpu_free_memory();
	EXPECT_GE(before + length / 4, after);
	EXPECT_LE(before - length / 4, after);
	EXPECT_EQ(length, cpu_unlike(p, 0x5f, length));
	munmap(p, length);
}

static void on_alarm(int sig)
{
	(void)sig;
}

/* A signal ends a prefetch. Pages that have moved stay there. */
TEST_F(vram, prefetch_signal)
{
	struct sigaction action = { .sa_handler = on_alarm };
	const size_t length = self->size / 2;
	uint8_t *p = map(length, PROT_READ | PROT_WRITE);
	struct itimerval timer = { { 0, 1000 }, { 0, 1000 } }, none = { 0 };
	enum dummy_gpu_location location = DUMMY_GPU_LOCATION_DEVICE;
	struct dummy_gpu_prefetch prefetch;
	int err = 0;

	ASSERT_NE(MAP_FAILED, p);
	memset(p, 0x6f, length);
	ASSERT_EQ(0, sigaction(SIGALRM, &action, NULL));
	ASSERT_EQ(0, setitimer(ITIMER_REAL, &timer, NULL));
	for (int i = 0; i < 20 && !err; i++) {
		location = i & 1 ? DUMMY_GPU_LOCATION_SYSTEM : DUMMY_GPU_LOCATION_DEVICE;
		prefetch = gpu_prefetching(p, length, location);
		err = gpu_prefetch(self->fd, &prefetch);
	}
	ASSERT_EQ(0, setitimer(ITIMER_REAL, &none, NULL));
	EXPECT_EQ(-EINTR, err);
	EXPECT_GT(length, prefetch.done);
	EXPECT_EQ(prefetch.done / page, prefetch.pages);

	/* The rest. */
	EXPECT_EQ(length / page - prefetch.pages,
		  prefetch_all(self->fd, p + prefetch.done, length - prefetch.done, location));
	EXPECT_EQ(0, prefetch_all(self->fd, p, length, location));
	EXPECT_EQ(length, cpu_unlike(p, 0x6f, length));
	munmap(p, length);
}

struct bad_range {
	const char *what;
	uint64_t start, length, which;
	int err;
};

TEST_F(vram, prefetch_bad)
{
	uint8_t *p = map_filled(_metadata, self->fd, 2 * page, 0x3b);
	const uint64_t a = gpu_addr(p), k = KERNEL_ADDRESS;
	const struct dummy_gpu_stats before = stats_of(_metadata, self->fd);
	struct dummy_gpu_info info;

	ASSERT_EQ(0, gpu_info(self->fd, &info));

	const struct bad_range bad[] = {
		{ "length 0", a, 0, 0, -EINVAL },
		{ "length 1", a, 1, 0, -EINVAL },
		{ "length + 8", a, page + 8, 0, -EINVAL },
		{ "length - 1", a, 2 * page - 1, 0, -EINVAL },
		{ "start + 1", a + 1, page, 0, -EINVAL },
		{ "start + 8", a + 8, page, 0, -EINVAL },
		{ "too long", a, info.max_length + page, 0, -EINVAL },
		{ "2^63", a, 1ULL << 63, 0, -EINVAL },
		{ "place 2", a, page, 2, -EINVAL },
		{ "place 2^32", a, page, 1ULL << 32, -EINVAL },
		{ "place 2^64 - 1", a, page, ~0ULL, -EINVAL },
		{ "wraps", -(uint64_t)page, 2 * page, 0, -EINVAL },
		{ "kernel", k, page, 0, -EFAULT },
		{ "kernel, to the device", k, page, 1, -EFAULT },
		{ "far beyond", 1ULL << 62, page, 1, -EFAULT },
		{ "into the kernel", k - page, 2 * page, 1, -EFAULT },
		{ "null", 0, page, 1, -EFAULT },
		{ "null, to RAM", 0, page, 0, -EFAULT },
	};

	for (size_t i = 0; i < ARRAY_SIZE(bad); i++) {
		struct dummy_gpu_prefetch prefetch = gpu_prefetching(NULL, bad[i].length, 0);

		prefetch.start = bad[i].start;
		prefetch.location = bad[i].which;
		EXPECT_EQ(bad[i].err, gpu_prefetch(self->fd, &prefetch)) TH_LOG("%s", bad[i].what);
		EXPECT_EQ(sizeof(prefetch), prefetch.size);
		EXPECT_EQ(0, prefetch.done) TH_LOG("%s", bad[i].what);
		EXPECT_EQ(0, prefetch.pages) TH_LOG("%s", bad[i].what);
	}
	expect_idle(_metadata, self->fd, &before);
	EXPECT_EQ(2 * page, cpu_unlike(p, 0x3b, 2 * page));
	munmap(p, 2 * page);
}

/* Memory that nobody may access stays where it is. */
TEST_F(vram, prefetch_prot_none)
{
	const size_t length = 4 * page;
	uint8_t *p = map_filled(_metadata, self->fd, length, 0x3c);
	uint8_t *q = map(length, PROT_READ | PROT_WRITE);
	struct dummy_gpu_stats before;

	ASSERT_NE(MAP_FAILED, q);
	memset(q, 0x3d, length);
	ASSERT_EQ(0, mprotect(p, length, PROT_NONE));
	ASSERT_EQ(0, mprotect(q, length, PROT_NONE));
	before = stats_of(_metadata, self->fd);
	EXPECT_EQ(0, prefetch_all(self->fd, p, length, DUMMY_GPU_LOCATION_SYSTEM));
	EXPECT_EQ(0, prefetch_all(self->fd, q, length, DUMMY_GPU_LOCATION_DEVICE));
	expect_idle(_metadata, self->fd, &before);

	ASSERT_EQ(0, mprotect(p, length, PROT_READ));
	ASSERT_EQ(0, mprotect(q, length, PROT_READ));
	EXPECT_EQ(length, cpu_unlike(p, 0x3c, length));
	EXPECT_EQ(length, cpu_unlike(q, 0x3d, length));
	munmap(p, length);
	munmap(q, length);
}

/*
 * Invalid structures, for a range of pages in device memory: no page moves and
 * no policy is set. Both structures have their fields in the same order.
 */
TEST_F(vram, struct_bad)
{
	const struct {
		unsigned long request;
		uint64_t size, which;
	} ioctls[] = {
		{ DUMMY_GPU_IOC_PREFETCH, sizeof(struct dummy_gpu_prefetch),
		  DUMMY_GPU_LOCATION_SYSTEM },
		{ DUMMY_GPU_IOC_ADVISE, sizeof(struct dummy_gpu_advise),
		  DUMMY_GPU_POLICY_SYSTEM },
	};
	uint8_t *p = map_filled(_metadata, self->fd, 2 * page, 0x3e);
	const struct dummy_gpu_stats before = stats_of(_metadata, self->fd);
	uint64_t *words = map(page, PROT_READ | PROT_WRITE);

	ASSERT_NE(MAP_FAILED, words);
	for (size_t i = 0; i < ARRAY_SIZE(ioctls); i++) {
		const uint64_t size = ioctls[i].size;
		const struct {
			uint64_t size, flags, rest;
			int err;
		} bad[] = {
			{ 0, 0, 0, -EINVAL },
			{ size - 8, 0, 0, -EINVAL },
			{ size + 4, 0, 0, -EINVAL },
			{ 4096 + 8, 0, 0, -E2BIG },
			{ size, 1, 0, -EINVAL },
			{ size, 1ULL << 63, 0, -EINVAL },
			{ size + 8, 0, 1, -E2BIG },
			{ size, 0, 0, -EFAULT },
		};

		for (size_t j = 0; j < ARRAY_SIZE(bad); j++) {
			memset(words, 0, page);
			words[0] = bad[j].size;
			words[1] = bad[j].flags;
			words[2] = gpu_addr(p);
			words[3] = 2 * page;
			words[4] = ioctls[i].which;
			words[size / 8] = bad[j].rest;
			/* The last structure cannot be written. */
			if (bad[j].err == -EFAULT)
				ASSERT_EQ(0, mprotect(words, page, PROT_READ));
			EXPECT_EQ(bad[j].err, gpu_ioctl(self->fd, ioctls[i].request, words))
				TH_LOG("ioctl %zu, case %zu", i, j);
			EXPECT_EQ(bad[j].size, words[0]);
			ASSERT_EQ(0, mprotect(words, page, PROT_READ | PROT_WRITE));
		}
	}
	expect_idle(_metadata, self->fd, &before);

	/* The CPU takes the pages, and the device gets them back. */
	EXPECT_EQ(2 * page, cpu_unlike(p, 0x3e, 2 * page));
	EXPECT_EQ(sum_of(0x3e, 2 * page), vram_sum(self->fd, self->result, p, 2 * page));
	EXPECT_EQ(2, stats_of(_metadata, self->fd).device_pages);
	munmap(words, page);
	munmap(p, 2 * page);
}

/* A file that was opened by another: the pages stay, and so does the opener's policy. */
TEST_F(vram, inherited_file)
{
	uint8_t *p = map_filled(_metadata, self->fd, 2 * page, 0x3f);
	struct dummy_gpu_stats before;
	pid_t pid;

	before = stats_of(_metadata, self->fd);
	pid = fork();
	ASSERT_LE(0, pid);
	if (!pid) {
		if (prefetch_all(self->fd, p, 2 * page, DUMMY_GPU_LOCATION_SYSTEM) != -EPERM)
			_exit(1);
		if (gpu_advise(self->fd, p, 2 * page, DUMMY_GPU_POLICY_SYSTEM) != -EPERM)
			_exit(2);
		if (run(self->fd, gpu_fill(p, 0, page)) != -EPERM)
			_exit(3);
		_exit(0);
	}
	EXPECT_EQ(0, wait_child(pid, 10));
	expect_idle(_metadata, self->fd, &before);
	EXPECT_EQ(2 * page, cpu_unlike(p, 0x3f, 2 * page));
	EXPECT_EQ(sum_of(0x3f, 2 * page), vram_sum(self->fd, self->result, p, 2 * page));
	EXPECT_EQ(2, stats_of(_metadata, self->fd).device_pages);
	munmap(p, 2 * page);
}

TEST_F(vram, advise_bad)
{
	uint8_t *p = map(2 * page, PROT_READ | PROT_WRITE);
	const uint64_t a = gpu_addr(p), k = KERNEL_ADDRESS, system = DUMMY_GPU_POLICY_SYSTEM;
	const struct dummy_gpu_stats before = stats_of(_metadata, self->fd);
	const struct bad_range bad[] = {
		{ "length 0", a, 0, system, -EINVAL },
		{ "length 1", a, 1, system, -EINVAL },
		{ "length + 8", a, page + 8, system, -EINVAL },
		{ "start + 1", a + 1, page, system, -EINVAL },
		{ "start + 8", a + 8, page, system, -EINVAL },
		{ "policy 3", a, page, 3, -EINVAL },
		{ "policy 2^32", a, page, 1ULL << 32, -EINVAL },
		{ "policy 2^64 - 1", a, page, ~0ULL, -EINVAL },
		{ "wraps", -(uint64_t)page, 2 * page, system, -EINVAL },
		{ "kernel", k, page, system, -EFAULT },
		{ "all to the kernel", 0, k, system, -EFAULT },
		{ "2^63", a, 1ULL << 63, system, -EFAULT },
		{ "far beyond", 1ULL << 62, page, system, -EFAULT },
	};

	ASSERT_NE(MAP_FAILED, p);
	for (size_t i = 0; i < ARRAY_SIZE(bad); i++) {
		struct dummy_gpu_advise advise = {
			.size = sizeof(advise),
			.start = bad[i].start,
			.length = bad[i].length,
			.policy = bad[i].which,
		};

		EXPECT_EQ(bad[i].err, gpu_ioctl(self->fd, DUMMY_GPU_IOC_ADVISE, &advise))
			TH_LOG("%s", bad[i].what);
	}

	/* None of them has moved a page or set a policy. */
	expect_idle(_metadata, self->fd, &before);
	ASSERT_EQ(0, run(self->fd, gpu_fill(p, 1, 2 * page)));
	EXPECT_EQ(2, stats_of(_metadata, self->fd).device_pages);
	munmap(p, 2 * page);
}

/*
 * Doubles all elements of a vector that does not fit on the device, and checks
 * them.
 */
static int oversubscribe(int fd, uint64_t *p, size_t length, unsigned int rounds, uint64_t seed)
{
	const size_t n = length / sizeof(*p);

	for (size_t i = 0; i < n; i++)
		p[i] = seed + i;
	for (unsigned int round = 0; round < rounds; round++) {
		if (run(fd, gpu_binary(DUMMY_GPU_OP_ADD, p, p, p, length)))
			return 1;
	}
	for (size_t i = 0; i < n; i++) {
		if (p[i] != (seed + i) << rounds)
			return 2;
	}
	return 0;
}

TEST_F(vram, oversubscription)
{
	const size_t length = self->size / 2 * 3;
	uint64_t *p = map(length, PROT_READ | PROT_WRITE);
	struct dummy_gpu_stats stats;

	ASSERT_NE(MAP_FAILED, p);
	EXPECT_EQ(0, oversubscribe(self->fd, p, length, 1, 1ULL << 40));
	stats = stats_of(_metadata, self->fd);
	EXPECT_LT(self->size / page, stats.pages_to_device);
	EXPECT_LT(0, stats.pages_evicted);
	EXPECT_EQ(stats.pages_to_device, stats.pages_evicted + stats.pages_cpu_faulted);
	EXPECT_EQ(0, stats.device_pages);
	munmap(p, length);
}

/*
 * Two processes together need more than fits, at the same addresses and time.
 */
TEST_F(vram, oversubscription_by_two)
{
	const size_t length = self->size / 4 * 3;
	uint64_t *p = map(length, PROT_READ | PROT_WRITE);
	int go[2], ready[2];
	pid_t pid;

	ASSERT_NE(MAP_FAILED, p);
	ASSERT_EQ(0, pipe(go));
	ASSERT_EQ(0, pipe(ready));
	pid = fork();
	ASSERT_LE(0, pid);
	if (!pid) {
		int fd = gpu_open(GPU_DEVICE);

		if (fd < 0 || token_send(ready[1]) || token_wait(go[0]))
			_exit(3);
		_exit(oversubscribe(fd, p, length, 2, 2ULL << 40));
	}
	close(ready[1]);
	ASSERT_EQ(0, token_wait(ready[0]));
	ASSERT_EQ(0, token_send(go[1]));
	EXPECT_EQ(0, oversubscribe(self->fd, p, length, 2, 3ULL << 40));
	EXPECT_EQ(0, wait_child(pid, 30));
	munmap(p, length);
}

TEST_F(vram, munmap)
{
	const size_t pages = 64, length = pages * page;
	uint8_t *p = map_filled(_metadata, self->fd, length, 0x41);

	ASSERT_EQ(0, munmap(p + 8 * page, 16 * page));
	EXPECT_EQ(pages - 16, stats_of(_metadata, self->fd).device_pages);
	EXPECT_EQ(-EFAULT, run(self->fd, gpu_fill(p + 8 * page, 0x42, page)));
	EXPECT_EQ(sum_of(0x41, 8 * page), vram_sum(self->fd, self->result, p, 8 * page));
	EXPECT_EQ(8 * page, cpu_unlike(p, 0x41, 8 * page));
	EXPECT_EQ(40 * page, cpu_unlike(p + 24 * page, 0x41, 40 * page));
	ASSERT_EQ(0, run(self->fd, gpu_fill(p + 24 * page, 0x43, 40 * page)));
	ASSERT_EQ(0, munmap(p, length));
	EXPECT_EQ(0, stats_of(_metadata, self->fd).device_pages);
	EXPECT_GE(1, stats_of(_metadata, self->fd).pages_mapped);
}

TEST_F(vram, discard)
{
	const size_t pages = 64, length = pages * page;
	uint8_t *p = map_filled(_metadata, self->fd, length, 0x51);

	ASSERT_EQ(0, madvise(p + 8 * page, 16 * page, MADV_DONTNEED));
	EXPECT_EQ(pages - 16, stats_of(_metadata, self->fd).device_pages);
	EXPECT_EQ(sum_of(0x51, length - 16 * page),
		  vram_sum(self->fd, self->result, p, length));
	EXPECT_EQ(pages - 16, stats_of(_metadata, self->fd).device_pages);
	EXPECT_EQ(8 * page, cpu_unlike(p, 0x51, 8 * page));
	EXPECT_EQ(16 * page, cpu_unlike(p + 8 * page, 0, 16 * page));
	EXPECT_EQ(40 * page, cpu_unlike(p + 24 * page, 0x51, 40 * page));
	ASSERT_EQ(0, munmap(p, length));
	EXPECT_EQ(0, stats_of(_metadata, self->fd).device_pages);
}

TEST_F(vram, mremap)
{
	const size_t pages = 64, length = pages * page;
	uint8_t *p = map_filled(_metadata, self->fd, length, 0x61);
	uint8_t *q = map(length, PROT_NONE);

	ASSERT_NE(MAP_FAILED, q);
	ASSERT_EQ(q, mremap(p, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, q));
	EXPECT_EQ(pages, stats_of(_metadata, self->fd).device_pages);
	EXPECT_EQ(sum_of(0x61, length), vram_sum(self->fd, self->result, q, length));
	EXPECT_EQ(pages, stats_of(_metadata, self->fd).device_pages);
	EXPECT_EQ(0, stats_of(_metadata, self->fd).pages_cpu_faulted);
	EXPECT_EQ(-EFAULT, run(self->fd, gpu_fill(p, 0x62, page)));
	ASSERT_EQ(p, map_at(p, length));
	ASSERT_EQ(0, run(self->fd, gpu_fill(p, 0x63, length)));
	ASSERT_EQ(0, run(self->fd, gpu_fill(q + page, 0x64, page)));
	EXPECT_EQ(length, cpu_unlike(p, 0x63, length));
	EXPECT_EQ(page, cpu_unlike(q, 0x61, page));
	EXPECT_EQ(page, cpu_unlike(q + page, 0x64, page));
	EXPECT_EQ(length - 2 * page, cpu_unlike(q + 2 * page, 0x61, length - 2 * page));

	/* The old range of MREMAP_DONTUNMAP is empty. */
	ASSERT_EQ(pages, prefetch_all(self->fd, q, length, DUMMY_GPU_LOCATION_DEVICE));
	ASSERT_EQ(0, munmap(p, length));
	p = mremap(q, length, length, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, NULL);
	ASSERT_NE(MAP_FAILED, p);
	EXPECT_EQ(0, vram_sum(self->fd, self->result, q, length));
	EXPECT_EQ(page, cpu_unlike(p, 0x61, page));
	EXPECT_EQ(page, cpu_unlike(p + page, 0x64, page));
	ASSERT_EQ(0, munmap(p, length));
	ASSERT_EQ(0, munmap(q, length));
	EXPECT_EQ(0, stats_of(_metadata, self->fd).device_pages);
}

TEST_F(vram, mprotect_none)
{
	const size_t pages = 32, length = pages * page;
	uint8_t *p = map_filled(_metadata, self->fd, length, 0x71);

	ASSERT_EQ(0, mprotect(p, length, PROT_NONE));
	EXPECT_EQ(-EFAULT, run(self->fd, gpu_fill(p, 0x72, page)));
	EXPECT_EQ(GPU_UNTOUCHED, vram_sum(self->fd, self->result, p, length));
	EXPECT_EQ(pages, stats_of(_metadata, self->fd).device_pages);
	ASSERT_EQ(0, mprotect(p, length, PROT_READ | PROT_WRITE));
	EXPECT_EQ(sum_of(0x71, length), vram_sum(self->fd, self->result, p, length));
	ASSERT_EQ(0, run(self->fd, gpu_fill(p, 0x73, page)));
	EXPECT_EQ(page, cpu_unlike(p, 0x73, page));
	EXPECT_EQ(length - page, cpu_unlike(p + page, 0x71, length - page));

	/*
	 * A prefetch of PROT_NONE memory may do nothing, but must do no harm.
	 */
	for (int i = 0; i < 2; i++) {
		ASSERT_EQ(0, mprotect(p, length, PROT_NONE));
		EXPECT_LE(0, prefetch_all(self->fd, p, length, i ? DUMMY_GPU_LOCATION_SYSTEM :
								   DUMMY_GPU_LOCATION_DEVICE));
		EXPECT_EQ(-EFAULT, run(self->fd, gpu_fill(p, 0x74, page)));
		ASSERT_EQ(0, mprotect(p, length, PROT_READ | PROT_WRITE));
		EXPECT_EQ(sum_of(0x71, length - page),
			  vram_sum(self->fd, self->result, p + page, length - page));
	}
	EXPECT_EQ(page, cpu_unlike(p, 0x73, page));
	ASSERT_EQ(0, munmap(p, length));
	EXPECT_EQ(0, stats_of(_metadata, self->fd).device_pages);
}

TEST_F(vram, mprotect_read)
{
	const size_t pages = 32, length = pages * page;
	uint8_t *p = map_filled(_metadata, self->fd, length, 0x81);

	ASSERT_EQ(0, mprotect(p, length, PROT_READ));
	EXPECT_EQ(sum_of(0x81, length), vram_sum(self->fd, self->result, p, length));
	EXPECT_EQ(pages, stats_of(_metadata, self->fd).device_pages);
	EXPECT_EQ(-EPERM, run(self->fd, gpu_fill(p, 0x82, length)));
	EXPECT_EQ(sum_of(0x81, length), vram_sum(self->fd, self->result, p, length));

	ASSERT_EQ(0, mprotect(p, length, PROT_READ | PROT_WRITE));
	ASSERT_EQ(0, run(self->fd, gpu_fill(p, 0x83, length / 2)));
	p[length - 1] = 0x84;
	EXPECT_EQ(length / 2, cpu_unlike(p, 0x83, length / 2));
	EXPECT_EQ(length - 1, length / 2 + cpu_unlike(p + length / 2, 0x81, length / 2));
	EXPECT_EQ(0x84, p[length - 1]);

	/* Read-only pages can be in device memory as well. */
	ASSERT_EQ(0, mprotect(p, length, PROT_READ));
	ASSERT_LE(0, prefetch_all(self->fd, p, length, DUMMY_GPU_LOCATION_DEVICE));
	EXPECT_EQ(pages, stats_of(_metadata, self->fd).device_pages);
	EXPECT_EQ(-EPERM, run(self->fd, gpu_fill(p, 0x85, length)));
	EXPECT_EQ(length / 2, cpu_unlike(p, 0x83, length / 2));
	EXPECT_EQ(length - 1, length / 2 + cpu_unlike(p + length / 2, 0x81, length / 2));
	ASSERT_EQ(0, munmap(p, length));
	EXPECT_EQ(0, stats_of(_metadata, self->fd).device_pages);
}

/* Pages with additional references stay in system memory and are used there. */
TEST_F(vram, pinned)
{
	const size_t pages = 8, length = pages * page;
	uint8_t *p = map(length, PROT_READ | PROT_WRITE), *copy = malloc(length);
	struct iovec held = { p + 2 * page, 4 * page };
	int pipes[2];

	ASSERT_NE(MAP_FAILED, p);
	ASSERT_NE(NULL, copy);
	ASSERT_EQ(0, pipe(pipes));
	memset(p, 0xc1, length);
	ASSERT_EQ((ssize_t)held.iov_len, vmsplice(pipes[1], &held, 1, 0));

	EXPECT_EQ(pages - 4, prefetch_all(self->fd, p, length, DUMMY_GPU_LOCATION_DEVICE));
	ASSERT_EQ(0, run(self->fd, gpu_fill(p, 0xc2, length)));
	EXPECT_EQ(pages - 4, stats_of(_metadata, self->fd).device_pages);
	EXPECT_EQ(4 * page, cpu_unlike(held.iov_base, 0xc2, 4 * page));

	/* The pipe has the pages, not copies of them. */
	ASSERT_EQ((ssize_t)held.iov_len, read(pipes[0], copy, held.iov_len));
	EXPECT_EQ(4 * page, cpu_unlike(copy, 0xc2, 4 * page));
	EXPECT_LE(4, prefetch_all(self->fd, p, length, DUMMY_GPU_LOCATION_DEVICE));
	EXPECT_EQ(pages, stats_of(_metadata, self->fd).device_pages);
	EXPECT_EQ(length, cpu_unlike(p, 0xc2, length));
	munmap(p, length);
	free(copy);
	close(pipes[0]);
	close(pipes[1]);
}

/* Memory that is locked with mlock() can be in device memory as well. */
TEST_F(vram, mlock)
{
	const size_t length = 8 * page;
	uint8_t *p = map(length, PROT_READ | PROT_WRITE);
	cpu_set_t cpu;

	ASSERT_NE(MAP_FAILED, p);
	CPU_ZERO(&cpu);
	CPU_SET(sched_getcpu(), &cpu);
	ASSERT_EQ(0, sched_setaffinity(0, sizeof(cpu), &cpu));
	if (mlock(p, length))
		SKIP(return, "mlock: %s", strerror(errno));
	ASSERT_EQ(0, run(self->fd, gpu_fill(p, 0xd1, length)));
	EXPECT_EQ(4 * page, cpu_unlike(p, 0xd1, 4 * page));
	ASSERT_EQ(0, munlock(p, length));
	EXPECT_EQ(sum_of(0xd1, length), vram_sum(self->fd, self->result, p, length));
	ASSERT_EQ(0, mlock(p, length));
	EXPECT_EQ(length, cpu_unlike(p, 0xd1, length));
	ASSERT_EQ(0, run(self->fd, gpu_fill(p, 0xd2, length)));
	ASSERT_EQ(0, munmap(p, length));

	/*
	 * The per-CPU batches of mlock() hold references to a few pages until
	 * they are drained.
	 */
	ASSERT_EQ(0, mlock(self->result, page));
	EXPECT_EQ(0, stats_of(_metadata, self->fd).device_pages);
}

/*
 * Kinds of madvise() that must not change the contents of memory on the device.
 */
TEST_F(vram, madvise)
{
	const int advice[] = { MADV_COLD, MADV_PAGEOUT, MADV_WILLNEED, MADV_RANDOM, MADV_NORMAL };
	const size_t length = 8 * page;
	uint8_t *p = map(length, PROT_READ | PROT_WRITE);

	ASSERT_NE(MAP_FAILED, p);
	for (size_t i = 0; i < ARRAY_SIZE(advice); i++) {
		ASSERT_EQ(0, run(self->fd, gpu_fill(p, i + 1, length)));
		madvise(p, length, advice[i]);
		EXPECT_EQ(sum_of(i + 1, length), vram_sum(self->fd, self->result, p, length))
			TH_LOG("advice %d", advice[i]);
		madvise(p, length, advice[i]);
		EXPECT_EQ(length, cpu_unlike(p, i + 1, length)) TH_LOG("advice %d", advice[i]);
	}

	/*
	 * After MADV_FREE, a device write must keep the page from being
	 * discarded.
	 */
	ASSERT_EQ(0, run(self->fd, gpu_fill(p, 0xe1, length)));
	ASSERT_EQ(0, madvise(p, length, MADV_FREE));
	ASSERT_EQ(0, run(self->fd, gpu_fill(p, 0xe2, length)));
	EXPECT_EQ(length, cpu_unlike(p, 0xe2, length));
	ASSERT_EQ(0, munmap(p, length));
	EXPECT_EQ(0, stats_of(_metadata, self->fd).device_pages);
}

/*
 * A prefetch does not fault: it neither calls a userfaultfd handler nor
 * bypasses it.
 */
TEST_F(vram, prefetch_userfault)
{
	const size_t length = 4 * page;
	uint8_t *p = map(length, PROT_READ | PROT_WRITE);
	int uffd = uffd_open();

	if (uffd < 0)
		SKIP(return, "no userfaultfd: %s", strerror(-uffd));
	ASSERT_NE(MAP_FAILED, p);
	memset(p, 0x21, page);
	ASSERT_EQ(0, uffd_register(uffd, p, length));
	EXPECT_EQ(1, prefetch_all(self->fd, p, length, DUMMY_GPU_LOCATION_DEVICE));
	EXPECT_EQ(1, prefetch_all(self->fd, p, length, DUMMY_GPU_LOCATION_SYSTEM));
	EXPECT_EQ(page, cpu_unlike(p, 0x21, page));
	close(uffd);
	munmap(p, length);
}

/*
 * Memory of which each access is to be reported (userfaultfd RWP) does not
 * migrate: a migration asks no handler.
 */
TEST_F(vram, memory_with_reported_accesses_stays)
{
	const size_t length = 4 * page;
	uint8_t *p = map(length, PROT_READ | PROT_WRITE);
	struct uffdio_range range = { .start = gpu_addr(p), .len = length };
	int uffd = uffd_open();

	ASSERT_NE(MAP_FAILED, p);
	if (uffd < 0 || uffd_enable(uffd, UFFD_FEATURE_RWP))
		SKIP(return, "no userfaultfd with RWP");
	memset(p, 0x22, length);
	ASSERT_EQ(0, uffd_register_mode(uffd, p, length, UFFDIO_REGISTER_MODE_RWP));
	EXPECT_EQ(0, prefetch_all(self->fd, p, length, DUMMY_GPU_LOCATION_DEVICE));
	ASSERT_EQ(0, ioctl(uffd, UFFDIO_UNREGISTER, &range));
	EXPECT_EQ(4, prefetch_all(self->fd, p, length, DUMMY_GPU_LOCATION_DEVICE));
	EXPECT_EQ(length, cpu_unlike(p, 0x22, length));
	close(uffd);
	munmap(p, length);
}

/* A child exits, or is killed, with pages on the device. */
static void expect_pages_gone(struct __test_metadata *_metadata, size_t length, bool busy,
			      bool killed)
{
	int64_t before = instance_pages();
	int ready[2], status;
	pid_t pid;

	if (before < 0)
		SKIP(return, "no debugfs");
	ASSERT_EQ(0, pipe(ready));
	pid = fork();
	ASSERT_LE(0, pid);
	if (!pid) {
		uint8_t *p = map(length, PROT_READ | PROT_WRITE);
		int fd = gpu_open(GPU_DEVICE);

		if (fd < 0 || p == MAP_FAILED || run(fd, gpu_fill(p, 1, length)))
			_exit(1);
		if (token_send(ready[1]))
			_exit(2);
		while (busy && !run(fd, gpu_fill(p, 2, length)))
			;
		while (killed)
			pause();
		_exit(0);
	}
	close(ready[1]);
	ASSERT_EQ(0, token_wait(ready[0]));
	close(ready[0]);
	if (killed) {
		usleep(busy ? 30 * 1000 : 0);
		EXPECT_LE(before + 16, instance_pages());
		ASSERT_EQ(0, kill(pid, SIGKILL));
		status = wait_child(pid, 10);
		EXPECT_TRUE(WIFSIGNALED(status));
	} else {
		EXPECT_EQ(0, wait_child(pid, 10));
	}
	EXPECT_TRUE(instance_pages_become(before))
		TH_LOG("%lld pages before, %lld after", (long long)before,
		       (long long)instance_pages());
}

TEST_F(vram, exit)
{
	expect_pages_gone(_metadata, 64 * page, false, false);
}

TEST_F(vram, killed)
{
	expect_pages_gone(_metadata, 64 * page, false, true);
}

/* A child is killed during commands that migrate and evict all the time. */
TEST_F(vram, killed_in_command)
{
	expect_pages_gone(_metadata, self->size + BUFFER, true, true);
}

/* When the file is closed, pages stay on the device with their contents. */
TEST_F(vram, file_closed)
{
	const size_t pages = 64, length = pages * page;
	int64_t before = instance_pages(), mapped = instance_counter(0, "pages_mapped");
	int fd = gpu_open(GPU_DEVICE);
	uint8_t *p;

	ASSERT_LE(0, fd);
	p = map_filled(_metadata, fd, length, 0x91);
	ASSERT_EQ(0, close(fd));
	if (before >= 0)
		EXPECT_EQ(before + (int64_t)pages, instance_pages());
	/* The entries in the page table of the file are gone. */
	EXPECT_EQ(mapped, instance_counter(0, "pages_mapped"));
	EXPECT_EQ(4 * page, cpu_unlike(p, 0x91, 4 * page));

	/* Another file finds it there. */
	EXPECT_EQ(sum_of(0x91, length), vram_sum(self->fd, self->result, p, length));
	EXPECT_GE(32, stats_of(_metadata, self->fd).pages_to_device);
	ASSERT_EQ(0, run(self->fd, gpu_fill(p, 0x92, length / 2)));
	EXPECT_EQ(length / 2, cpu_unlike(p, 0x92, length / 2));
	EXPECT_EQ(length / 2, cpu_unlike(p + length / 2, 0x91, length / 2));
	if (before >= 0)
		EXPECT_EQ(before, instance_pages());
	munmap(p, length);
}

/* One device can access pages in the memory of the other; they migrate. */
TEST_F(vram, two_devices)
{
	const size_t length = 300 * page, n = length / sizeof(uint64_t);
	uint64_t *p = map(length, PROT_READ | PROT_WRITE);
	int fd = gpu_open(GPU_DEVICE_2);

	if (fd == -ENOENT)
		SKIP(return, "no " GPU_DEVICE_2);
	ASSERT_LE(0, fd);
	ASSERT_NE(MAP_FAILED, p);
	ASSERT_EQ(0, run(self->fd, gpu_fill(p, 1, length)));
	ASSERT_EQ(length / page, stats_of(_metadata, self->fd).device_pages);
	for (unsigned int i = 1; i < 6; i++) {
		ASSERT_EQ(0, run(fd, gpu_binary(DUMMY_GPU_OP_ADD, p, p, p, length)));
		ASSERT_EQ(n * (0x0101010101010101ULL << i),
			  vram_sum(self->fd, self->result, p, length));
		EXPECT_LE(0, prefetch_all(i & 1 ? fd : self->fd, p, length,
					  DUMMY_GPU_LOCATION_DEVICE));
	}
	for (size_t i = 0; i < n; i++)
		ASSERT_EQ(0x2020202020202020ULL, p[i]);

	/*
	 * A prefetch to system memory on one device does not move pages of the
	 * other.
	 */
	ASSERT_EQ(length / page, prefetch_all(fd, p, length, DUMMY_GPU_LOCATION_DEVICE));
	EXPECT_EQ(0, prefetch_all(self->fd, p, length, DUMMY_GPU_LOCATION_SYSTEM));
	EXPECT_EQ(length / page, prefetch_all(fd, p, length, DUMMY_GPU_LOCATION_SYSTEM));
	EXPECT_EQ(n * 0x2020202020202020ULL, cpu_sum(p, length));
	munmap(p, length);
	close(fd);
}

/* System calls on memory that is on the device. */
TEST_F(vram, system_calls)
{
	const size_t length = 15 * page;
	int file = temporary_file(2 * length), pipes[2];
	uint8_t *p = map_filled(_metadata, self->fd, length, 0xa1);
	uint8_t *content = malloc(length);

	ASSERT_LE(0, file);
	ASSERT_NE(NULL, content);
	ASSERT_EQ(0, pipe(pipes));

	/* write() */
	ASSERT_EQ((ssize_t)length, pwrite(file, p, length, 0));
	ASSERT_EQ((ssize_t)length, pread(file, content, length, 0));
	EXPECT_EQ(length, cpu_unlike(content, 0xa1, length));

	/* read(), from a file and from a pipe, into the middle */
	ASSERT_EQ(0, run(self->fd, gpu_fill(p, 0xa2, length)));
	ASSERT_LT(0, stats_of(_metadata, self->fd).device_pages);
	ASSERT_EQ((ssize_t)(3 * page), pread(file, p + 2 * page + 7, 3 * page, 5));
	memset(content, 0xa3, page);
	ASSERT_EQ((ssize_t)page, write(pipes[1], content, page));
	ASSERT_EQ((ssize_t)page, read(pipes[0], p + 9 * page - 1, page));
	EXPECT_EQ(2 * page + 7, cpu_unlike(p, 0xa2, length));
	EXPECT_EQ(3 * page, cpu_unlike(p + 2 * page + 7, 0xa1, 3 * page));
	EXPECT_EQ(4 * page - 8, cpu_unlike(p + 5 * page + 7, 0xa2, length - 5 * page - 7));
	EXPECT_EQ(page, cpu_unlike(p + 9 * page - 1, 0xa3, page));
	EXPECT_EQ(5 * page + 1, cpu_unlike(p + 10 * page - 1, 0xa2, 5 * page + 1));

	/* The device sees the same bytes. */
	EXPECT_EQ(cpu_sum((uint64_t *)p, length), vram_sum(self->fd, self->result, p, length));

	/* Through a pipe, from one range in device memory to another. */
	ASSERT_EQ(0, run(self->fd, gpu_fill(p, 0xa4, length)));
	ASSERT_EQ((ssize_t)page, write(pipes[1], p + 11, page));
	ASSERT_EQ(0, run(self->fd, gpu_fill(p, 0xa5, length)));
	ASSERT_EQ((ssize_t)page, read(pipes[0], p + 3, page));
	EXPECT_EQ(3, cpu_unlike(p, 0xa5, length));
	EXPECT_EQ(page, cpu_unlike(p + 3, 0xa4, page));
	EXPECT_EQ(length - page - 3, cpu_unlike(p + page + 3, 0xa5, length - page - 3));
	munmap(p, length);
	free(content);
	close(pipes[0]);
	close(pipes[1]);
	close(file);
}

/* Another process reads and writes memory that is on the device. */
TEST_F(vram, access_by_parent)
{
	const size_t length = 20 * page;
	uint8_t *p = map(length, PROT_READ | PROT_WRITE), *copy = malloc(length);
	struct iovec local = { copy, length }, remote = { p, length };
	int ready[2], go[2], mem;
	char path[40];
	pid_t pid;

	ASSERT_NE(MAP_FAILED, p);
	ASSERT_NE(NULL, copy);
	ASSERT_EQ(0, pipe(ready));
	ASSERT_EQ(0, pipe(go));
	pid = fork();
	ASSERT_LE(0, pid);
	if (!pid) {
		int fd = gpu_open(GPU_DEVICE);

		if (fd < 0 || run(fd, gpu_fill(p, 0xb1, length)) || token_send(ready[1]))
			_exit(1);
		if (token_wait(go[0]) || run(fd, gpu_fill(p, 0xb2, length)))
			_exit(2);
		if (token_send(ready[1]) || token_wait(go[0]))
			_exit(3);
		/* The parent has written to one page of those that the device had. */
		if (vram_sum(fd, self->result, p + page, page) != sum_of(0xb3, page))
			_exit(4);
		if (cpu_unlike(p + page, 0xb3, page) != page)
			_exit(5);
		memset(p + page, 0xb2, page);
		_exit(cpu_unlike(p, 0xb2, length) == length ? 0 : 6);
	}
	close(ready[1]);
	ASSERT_EQ(0, token_wait(ready[0]));
	/*
	 * Not every kernel has process_vm_readv(). Try it on this process
	 * first.
	 */
	if (process_vm_readv(getpid(), &local, 1, &remote, 1, 0) == (ssize_t)length) {
		EXPECT_EQ((ssize_t)length, process_vm_readv(pid, &local, 1, &remote, 1, 0));
		EXPECT_EQ(length, cpu_unlike(copy, 0xb1, length));
	}
	ASSERT_EQ(0, token_send(go[1]));
	ASSERT_EQ(0, token_wait(ready[0]));
	snprintf(path, sizeof(path), "/proc/%d/mem", pid);
	mem = open(path, O_RDWR | O_CLOEXEC);
	ASSERT_LE(0, mem);
	EXPECT_EQ((ssize_t)length, pread(mem, copy, length, gpu_addr(p)));
	EXPECT_EQ(length, cpu_unlike(copy, 0xb2, length));
	memset(copy, 0xb3, page);
	EXPECT_EQ((ssize_t)page, pwrite(mem, copy, page, gpu_addr(p + page)));
	ASSERT_EQ(0, token_send(go[1]));
	EXPECT_EQ(0, wait_child(pid, 10));
	EXPECT_EQ(length, cpu_unlike(p, 0, length));
	munmap(p, length);
	free(copy);
	close(mem);
}

/*
 * fork() shares pages on the device as it shares pages in system memory. The
 * device must not write to a page that another process shares.
 */
FIXTURE(vram_fork)
{
	int fd;
	size_t size;
	uint64_t *result;
	uint8_t *p;
	size_t length;
	int go[2];	/* from the parent to the child */
	int done[2];	/* and the other way round */
};

FIXTURE_VARIANT(vram_fork)
{
	bool touched;
};

FIXTURE_VARIANT_ADD(vram_fork, on_device)
{
	.touched = false,
};

FIXTURE_VARIANT_ADD(vram_fork, touched_before)
{
	.touched = true,
};

FIXTURE_SETUP(vram_fork)
{
	setup_vram(_metadata, &self->fd, &self->size, &self->result);
	if (self->fd < 0 || !self->size)
		return;
	ASSERT_EQ(0, pipe(self->go));
	ASSERT_EQ(0, pipe(self->done));
	self->length = 64 * page;
	self->p = map_filled(_metadata, self->fd, self->length, 1);
	if (!variant->touched)
		return;

	/* The CPU takes one block back to read it and one to write to it. */
	EXPECT_EQ(1, cpu_load(self->p + 20 * page));
	cpu_store(self->p + 40 * page, 1);
}

FIXTURE_TEARDOWN(vram_fork)
{
	munmap(self->p, self->length);
	munmap(self->result, page);
	close(self->fd);
}

/*
 * Checks the bytes of one side, by its device (if any) and its CPU. 0, or code
 * if they differ.
 */
static int expect_side(int fd, const uint8_t *p, uint8_t value, size_t length, int code)
{
	uint64_t sum;

	/* The device first, since a CPU access would migrate the pages. */
	if (fd >= 0 && (run(fd, gpu_unary(DUMMY_GPU_OP_SUM, &sum, p, length)) ||
			sum != sum_of(value, length)))
		return code;
	return cpu_unlike(p, value, length) == length ? 0 : code + 1;
}

#define CHILD_EXPECT(code)				\
	do {						\
		int __code = (code);			\
							\
		if (__code)				\
			_exit(__code);			\
	} while (0)

TEST_F(vram_fork, parent_device_writes)
{
	pid_t pid = fork();

	ASSERT_LE(0, pid);
	if (!pid) {
		CHILD_EXPECT(token_wait(self->go[0]) ? 1 : 0);
		CHILD_EXPECT(expect_side(-1, self->p, 1, self->length, 2));
		CHILD_EXPECT(expect_side(gpu_open(GPU_DEVICE), self->p, 1, self->length, 4));
		_exit(0);
	}
	EXPECT_EQ(0, run(self->fd, gpu_fill(self->p, 2, self->length)));
	ASSERT_EQ(0, token_send(self->go[1]));
	EXPECT_EQ(0, expect_side(self->fd, self->p, 2, self->length, 1));
	EXPECT_EQ(0, wait_child(pid, 10));
	EXPECT_EQ(0, expect_side(self->fd, self->p, 2, self->length, 1));
}

TEST_F(vram_fork, child_device_writes)
{
	pid_t pid = fork();

	ASSERT_LE(0, pid);
	if (!pid) {
		int fd = gpu_open(GPU_DEVICE);

		if (fd < 0 || run(fd, gpu_fill(self->p, 3, self->length)))
			_exit(1);
		CHILD_EXPECT(token_send(self->done[1]) || token_wait(self->go[0]) ? 2 : 0);
		CHILD_EXPECT(expect_side(fd, self->p, 3, self->length, 3));
		_exit(0);
	}
	close(self->done[1]);
	ASSERT_EQ(0, token_wait(self->done[0]));
	EXPECT_EQ(0, expect_side(self->fd, self->p, 1, self->length, 1));
	EXPECT_EQ(0, run(self->fd, gpu_fill(self->p, 4, self->length)));
	ASSERT_EQ(0, token_send(self->go[1]));
	EXPECT_EQ(0, wait_child(pid, 10));
	EXPECT_EQ(0, expect_side(self->fd, self->p, 4, self->length, 1));
}

TEST_F(vram_fork, parent_cpu_writes)
{
	pid_t pid = fork();

	ASSERT_LE(0, pid);
	if (!pid) {
		CHILD_EXPECT(token_wait(self->go[0]) ? 1 : 0);
		CHILD_EXPECT(expect_side(gpu_open(GPU_DEVICE), self->p, 1, self->length, 2));
		memset(self->p, 5, self->length);
		_exit(0);
	}
	memset(self->p, 4, self->length);
	ASSERT_EQ(0, token_send(self->go[1]));
	EXPECT_EQ(0, expect_side(self->fd, self->p, 4, self->length, 1));
	EXPECT_EQ(0, wait_child(pid, 10));
	EXPECT_EQ(0, expect_side(self->fd, self->p, 4, self->length, 1));
}

TEST_F(vram_fork, child_cpu_writes)
{
	pid_t pid = fork();

	ASSERT_LE(0, pid);
	if (!pid) {
		memset(self->p, 5, self->length);
		CHILD_EXPECT(token_send(self->done[1]) || token_wait(self->go[0]) ? 1 : 0);
		CHILD_EXPECT(expect_side(-1, self->p, 5, self->length, 2));
		_exit(0);
	}
	close(self->done[1]);
	ASSERT_EQ(0, token_wait(self->done[0]));
	EXPECT_EQ(0, expect_side(self->fd, self->p, 1, self->length, 1));
	EXPECT_EQ(0, run(self->fd, gpu_fill(self->p, 6, self->length)));
	ASSERT_EQ(0, token_send(self->go[1]));
	EXPECT_EQ(0, wait_child(pid, 10));
	EXPECT_EQ(0, expect_side(self->fd, self->p, 6, self->length, 1));
}

/* A page that two processes share migrates. */
TEST_F(vram_fork, shared_page_moves)
{
	pid_t pid = fork();

	ASSERT_LE(0, pid);
	if (!pid) {
		int fd = gpu_open(GPU_DEVICE);

		CHILD_EXPECT(token_wait(self->go[0]) ? 1 : 0);
		if (fd < 0 ||
		    prefetch_all(fd, self->p, self->length, DUMMY_GPU_LOCATION_SYSTEM) < 0)
			_exit(2);
		CHILD_EXPECT(token_send(self->done[1]) || token_wait(self->go[0]) ? 3 : 0);
		CHILD_EXPECT(expect_side(fd, self->p, 1, self->length, 4));
		_exit(0);
	}
	close(self->done[1]);
	EXPECT_LE(0, prefetch_all(self->fd, self->p, self->length, DUMMY_GPU_LOCATION_DEVICE));
	ASSERT_EQ(0, token_send(self->go[1]));
	ASSERT_EQ(0, token_wait(self->done[0]));
	EXPECT_EQ(0, expect_side(self->fd, self->p, 1, self->length, 1));
	EXPECT_LE(0, prefetch_all(self->fd, self->p, self->length, DUMMY_GPU_LOCATION_DEVICE));
	EXPECT_EQ(0, run(self->fd, gpu_fill(self->p, 7, self->length)));
	ASSERT_EQ(0, token_send(self->go[1]));
	EXPECT_EQ(0, wait_child(pid, 10));
	EXPECT_EQ(0, expect_side(self->fd, self->p, 7, self->length, 1));
}

/*
 * The child exits before anybody writes, so the pages belong to the parent
 * alone again.
 */
TEST_F(vram_fork, child_is_gone)
{
	pid_t pid = fork();

	ASSERT_LE(0, pid);
	if (!pid)
		_exit(0);
	EXPECT_EQ(0, wait_child(pid, 10));
	EXPECT_EQ(0, run(self->fd, gpu_fill(self->p, 8, self->length)));
	EXPECT_EQ(0, expect_side(self->fd, self->p, 8, self->length, 1));
	ASSERT_EQ(0, munmap(self->p, self->length));
	if (instance_pages() >= 0)
		EXPECT_TRUE(instance_pages_become(stats_of(_metadata, self->fd).device_pages));
	self->p = map(self->length, PROT_READ);
}

/*
 * Threads. In each page, the device writes to one half and each CPU thread to a
 * word of its own, while another thread moves the pages back and forth.
 */
#define SHARED_PAGES	48

struct sharer {
	uint8_t *p;
	int fd;
	unsigned int index;
	bool *stop;
	unsigned long rounds;
	int err;
};

static void *count_thread(void *arg)
{
	struct sharer *s = arg;
	uint64_t expect[SHARED_PAGES] = { 0 }, seed = s->index;

	while (!s->err && !__atomic_load_n(s->stop, __ATOMIC_ACQUIRE)) {
		size_t i = cpu_random(&seed) % SHARED_PAGES;
		uint64_t *word = (uint64_t *)(s->p + i * page) + s->index;

		if (__atomic_load_n(word, __ATOMIC_RELAXED) != expect[i])
			s->err = -EIO;
		expect[i] += seed;
		__atomic_store_n(word, expect[i], __ATOMIC_RELAXED);
		if (++s->rounds % 64 == 0)
			sched_yield();
	}
	for (size_t i = 0; i < SHARED_PAGES; i++) {
		if (((uint64_t *)(s->p + i * page))[s->index] != expect[i])
			s->err = -EIO;
	}
	return NULL;
}

static void *move_thread(void *arg)
{
	const enum dummy_gpu_location location[] = {
		DUMMY_GPU_LOCATION_DEVICE, DUMMY_GPU_LOCATION_SYSTEM
	};
	struct sharer *s = arg;
	uint64_t seed = s->index;

	while (!s->err && !__atomic_load_n(s->stop, __ATOMIC_ACQUIRE)) {
		size_t first = cpu_random(&seed) % SHARED_PAGES;
		size_t pages = 1 + cpu_random(&seed) % (SHARED_PAGES - first);
		int64_t moved = prefetch_all(s->fd, s->p + first * page, pages * page,
					     location[s->rounds++ % 2]);

		if (moved < 0)
			s->err = moved;
		sched_yield();
	}
	return NULL;
}

/* One round of the device on its halves: it must read what it wrote. */
static int device_round(int fd, uint64_t *result, uint8_t *p, uint8_t value)
{
	struct dummy_gpu_command commands[2 * SHARED_PAGES];
	struct dummy_gpu_submit submit = gpu_submission(commands, ARRAY_SIZE(commands));
	const size_t half = page / 2;

	for (size_t i = 0; i < SHARED_PAGES; i++) {
		uint8_t *mine = p + i * page + half;

		commands[i] = gpu_unary(DUMMY_GPU_OP_SUM, &result[i], mine, half);
		commands[SHARED_PAGES + i] = gpu_fill(mine, value, half);
	}
	if (gpu_submit(fd, &submit))
		return -EIO;
	for (size_t i = 0; i < SHARED_PAGES; i++) {
		if (result[i] != sum_of(value - 1, half))
			return -EILSEQ;
	}
	return 0;
}

TEST_F(vram, threads)
{
	const size_t length = SHARED_PAGES * page;
	uint8_t *p = map(length, PROT_READ | PROT_WRITE);
	struct sharer sharer[4];
	pthread_t thread[ARRAY_SIZE(sharer)];
	struct dummy_gpu_stats stats;
	struct timespec start, now;
	bool stop = false;
	uint8_t value = 0;
	time_t seconds;
	int err = 0;

	ASSERT_NE(MAP_FAILED, p);
	share_cpu_of_uml();
	for (size_t i = 0; i < ARRAY_SIZE(sharer); i++) {
		sharer[i] = (struct sharer) { .p = p, .fd = self->fd, .index = i, .stop = &stop };
		ASSERT_EQ(0, pthread_create(&thread[i], NULL, i ? count_thread : move_thread,
					    &sharer[i]));
	}
	clock_gettime(CLOCK_MONOTONIC, &start);
	do {
		err = device_round(self->fd, self->result, p, ++value);
		/*
		 * The CPU must see the same bytes as the device. One page in
		 * each round.
		 */
		if (!err && cpu_unlike(p + value % SHARED_PAGES * page + page / 2, value,
				       page / 2) != page / 2)
			err = -EILSEQ;
		clock_gettime(CLOCK_MONOTONIC, &now);
		seconds = now.tv_sec - start.tv_sec;
		/*
		 * In a slow kernel it takes a while until pages have moved in
		 * each direction.
		 */
		stats = stats_of(_metadata, self->fd);
	} while (!err && (seconds < 2 || (seconds < 20 && !stats.pages_to_system)));

	__atomic_store_n(&stop, true, __ATOMIC_RELEASE);
	EXPECT_EQ(0, err);
	for (size_t i = 0; i < ARRAY_SIZE(sharer); i++) {
		ASSERT_EQ(0, pthread_join(thread[i], NULL));
		EXPECT_EQ(0, sharer[i].err) TH_LOG("thread %zu", i);
		EXPECT_LT(0, sharer[i].rounds) TH_LOG("thread %zu", i);
	}
	for (size_t i = 0; i < SHARED_PAGES; i++)
		EXPECT_EQ(page / 2, cpu_unlike(p + i * page + page / 2, value, page / 2));
	stats = stats_of(_metadata, self->fd);
	EXPECT_LT(SHARED_PAGES, stats.pages_to_device);
	EXPECT_LT(0, stats.pages_cpu_faulted);
	EXPECT_LT(0, stats.pages_to_system);
	munmap(p, length);
}

/*
 * Two device threads write to one page of device memory, one byte at a time:
 * one thread writes the even bytes upwards, the other the odd bytes downwards,
 * in all of the page or in smaller and smaller parts of it. So at least once in
 * each round the two write different bytes of the same word at about the same
 * time. A round is one submission for each.
 */
#define WRITER_BYTES	1024UL

struct writer {
	uint8_t *p;
	int fd;
	bool odd;
	bool stop;
	pthread_barrier_t *barrier;
	int err;
};

static int write_half(struct writer *w, uint8_t value)
{
	struct dummy_gpu_command commands[WRITER_BYTES];
	struct dummy_gpu_submit submit = gpu_submission(commands, WRITER_BYTES);
	const size_t part = WRITER_BYTES >> value % 6;

	for (size_t i = 0; i < WRITER_BYTES; i++) {
		size_t at = w->odd ? 2 * (i ^ (part - 1)) + 1 : 2 * i;

		commands[i] = gpu_fill(w->p + at, value, 1);
	}
	return gpu_submit(w->fd, &submit);
}

static void *write_thread(void *arg)
{
	struct writer *w = arg;

	for (uint8_t value = 1; ; value++) {
		pthread_barrier_wait(w->barrier);
		if (w->stop)
			return NULL;
		w->err = w->err ?: write_half(w, value);
		pthread_barrier_wait(w->barrier);
	}
}

TEST_F(vram, writers_of_one_word)
{
	uint8_t *p = map_filled(_metadata, self->fd, page, 0);
	struct writer even = { .p = p, .fd = self->fd };
	struct writer odd = { .p = p, .fd = self->fd, .odd = true };
	uint64_t start = microseconds();
	pthread_barrier_t barrier;
	pthread_t thread;
	size_t same = 2 * WRITER_BYTES;

	odd.barrier = &barrier;
	ASSERT_EQ(0, pthread_barrier_init(&barrier, NULL, 2));
	ASSERT_EQ(0, pthread_create(&thread, NULL, write_thread, &odd));
	for (int round = 1; same == 2 * WRITER_BYTES && !even.err && !odd.err; round++) {
		if (round > 10 && microseconds() - start > 2000000)
			break;
		pthread_barrier_wait(&barrier);
		even.err = write_half(&even, round);
		pthread_barrier_wait(&barrier);

		/* The copy is in system memory. The page itself stays where it is. */
		EXPECT_EQ(0, run(self->fd, gpu_unary(DUMMY_GPU_OP_COPY, self->result, p, page)));
		same = cpu_unlike((uint8_t *)self->result, round, 2 * WRITER_BYTES);
		EXPECT_EQ(2 * WRITER_BYTES, same) TH_LOG("round %d", round);
	}
	odd.stop = true;
	pthread_barrier_wait(&barrier);
	ASSERT_EQ(0, pthread_join(thread, NULL));
	EXPECT_EQ(0, even.err);
	EXPECT_EQ(0, odd.err);
	EXPECT_EQ(0, stats_of(_metadata, self->fd).pages_cpu_faulted);
	munmap(p, page);
	pthread_barrier_destroy(&barrier);
}

TEST_HARNESS_MAIN
