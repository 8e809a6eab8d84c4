// SPDX-License-Identifier: GPL-2.0
/*
 * Tests of dummy_gpu_mover.c, with which this program is linked: the memory
 * moves, and the program notices nothing else.
 *
 * kselftest_harness.h runs each test in a child of fork(), so each of them is
 * also a test of a child.
 */
#include <linux/fs.h>

#include "dummy_gpu_harness.h"

#define PAGES	64
#define TURNS	10
#define SECONDS	20
/* Of a test, in seconds: the mover is slow in a kernel with checkers. */
#define TIMEOUT	120

static pid_t handled_by;

/* Before the mover starts. */
static void __attribute__((constructor(101))) before_mover(void)
{
	page = sysconf(_SC_PAGESIZE);
	share_cpu_of_uml();
}

FIXTURE(mover)
{
};

FIXTURE_SETUP(mover)
{
}

FIXTURE_TEARDOWN(mover)
{
}

static uint8_t *map_pages(struct __test_metadata *_metadata)
{
	uint8_t *mem = map(PAGES * page, PROT_READ | PROT_WRITE);

	ASSERT_NE(MAP_FAILED, (void *)mem);
	return mem;
}

/* The number of pages in a buffer of any of these PAGE_IS_* categories. */
static size_t count(const void *start, uint64_t categories)
{
	struct page_region regions[PAGES];
	struct pm_scan_arg scan = {
		.size = sizeof(scan),
		.start = gpu_addr(start),
		.end = gpu_addr(start) + PAGES * page,
		.vec = gpu_addr(regions),
		.vec_len = PAGES,
		.category_anyof_mask = categories,
		.return_mask = categories,
	};
	int n, fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	size_t found = 0;

	n = ioctl(fd, PAGEMAP_SCAN, &scan);
	for (int i = 0; i < n; i++)
		found += (regions[i].end - regions[i].start) / page;
	close(fd);
	return found;
}

/* Waits until pages of a range are on the device. */
static bool wait_for_device(const void *start)
{
	const struct timespec ms = { .tv_nsec = 1000 * 1000 };
	const uint64_t end = microseconds() + SECONDS * 1000000;

	/* pagemap reports a page on the device as swapped out. */
	while (!count(start, PAGE_IS_SWAPPED)) {
		if (microseconds() > end)
			return false;
		nanosleep(&ms, NULL);
	}
	return true;
}

TEST_F_TIMEOUT(mover, the_memory_of_a_program_moves_and_keeps_its_contents, TIMEOUT)
{
	uint8_t *expect = malloc(PAGES * page), *mem = map_pages(_metadata);

	ASSERT_NE(NULL, expect);
	for (int turn = 0; turn < TURNS; turn++) {
		cpu_randomize(mem, PAGES * page, turn);
		cpu_randomize(expect, PAGES * page, turn);
		ASSERT_TRUE(wait_for_device(mem));
		ASSERT_EQ(PAGES * page, cpu_differs(mem, expect, PAGES * page));
	}
}

/* Memory also moves back without a CPU access. */
TEST_F_TIMEOUT(mover, memory_moves_back_on_request, TIMEOUT)
{
	const int64_t before = instance_counter(0, "pages_to_system");
	const uint64_t end = microseconds() + SECONDS * 1000000;
	uint8_t *mem = map_pages(_metadata);

	if (before < 0)
		SKIP(return, "no debugfs");
	memset(mem, 1, PAGES * page);
	while (instance_counter(0, "pages_to_system") < before + 10 * PAGES)
		ASSERT_GT(end, microseconds());
	ASSERT_EQ(PAGES * page, cpu_unlike(mem, 1, PAGES * page));
}

TEST_F_TIMEOUT(mover, a_child_has_a_mover_of_its_own, TIMEOUT)
{
	uint8_t *mem = map_pages(_metadata);
	int status;
	pid_t child;

	memset(mem, 1, PAGES * page);
	for (int turn = 0; turn < TURNS; turn++) {
		child = fork();
		ASSERT_LE(0, child);
		if (!child) {
			bool good = cpu_unlike(mem, 1, PAGES * page) == PAGES * page;

			memset(mem, 2, PAGES * page);
			good = good && wait_for_device(mem) &&
			       cpu_unlike(mem, 2, PAGES * page) == PAGES * page;
			_exit(!good);
		}
		ASSERT_TRUE(wait_for_device(mem));
		ASSERT_EQ(child, waitpid(child, &status, 0));
		ASSERT_EQ(0, status);
		ASSERT_EQ(PAGES * page, cpu_unlike(mem, 1, PAGES * page));
	}
}

TEST_F_TIMEOUT(mover, holes_stay_holes, TIMEOUT)
{
	uint8_t *other = map_pages(_metadata), *mem = map_pages(_metadata);

	for (int turn = 0; turn < TURNS; turn++) {
		memset(other, 1, PAGES * page);
		mem[page * 2 * turn] = 1;
		ASSERT_TRUE(wait_for_device(other));
		ASSERT_EQ(turn + 1, count(mem, PAGE_IS_PRESENT | PAGE_IS_SWAPPED));
	}
}

TEST_F_TIMEOUT(mover, file_descriptors_are_those_that_a_program_expects, TIMEOUT)
{
	int fd[2];

	ASSERT_EQ(0, pipe(fd));
	EXPECT_EQ(fd[0] + 1, fd[1]);
	EXPECT_GT(16, fd[1]);
}

static void handler(int sig)
{
	(void)sig;
	__atomic_store_n(&handled_by, syscall(SYS_gettid), __ATOMIC_RELAXED);
}

TEST_F_TIMEOUT(mover, signals_are_for_the_program, TIMEOUT)
{
	struct sigaction sa = { .sa_handler = handler };

	ASSERT_EQ(0, sigaction(SIGUSR1, &sa, NULL));
	for (int turn = 0; turn < 1000; turn++) {
		__atomic_store_n(&handled_by, 0, __ATOMIC_RELAXED);
		ASSERT_EQ(0, kill(getpid(), SIGUSR1));
		ASSERT_EQ(getpid(), __atomic_load_n(&handled_by, __ATOMIC_RELAXED));
	}
}

TEST_HARNESS_MAIN
