// SPDX-License-Identifier: GPL-2.0
/*
 * Tests of large folios in the memory of the dummy GPU: a transparent huge page
 * moves as one, and a part of it that goes does not take the rest along.
 *
 * Results are written to shared memory, which never migrates. So all pages that
 * the counters count are those of the test.
 */
#include <pthread.h>
#include <sys/stat.h>

#include "dummy_gpu_harness.h"

#define THP		"/sys/kernel/mm/transparent_hugepage/"
#define FOLIOS		4	/* of a storm */
#define WORD		8
#define STORM_TIMEOUT	600	/* seconds, for those who let a storm take a minute */

static size_t huge;		/* the bytes of a large folio */
static size_t pages;		/* and its pages */

static char *read_from(const char *path, char *text, size_t size)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t length = fd < 0 ? -1 : read(fd, text, size - 1);

	if (fd >= 0)
		close(fd);
	if (length < 0)
		return NULL;
	text[length] = 0;
	return text;
}

/* The memory of the mapping of p that consists of huge pages of system memory, in bytes. */
static size_t huge_bytes(const void *p)
{
	unsigned long start, end, kib = 0;
	FILE *f = fopen("/proc/self/smaps", "re");
	bool inside = false;
	char line[300];

	while (f && fgets(line, sizeof(line), f)) {
		if (sscanf(line, "%lx-%lx ", &start, &end) == 2)
			inside = start <= (unsigned long)p && (unsigned long)p < end;
		else if (inside && sscanf(line, "AnonHugePages: %lu", &kib) == 1)
			break;
	}
	if (f)
		fclose(f);
	return kib * 1024;
}

FIXTURE(large)
{
	int fd;
	size_t size;
	uint64_t *result;
	uint8_t *p, *copy;	/* a large folio, and what it contains */
};

FIXTURE_SETUP(large)
{
	if (!setup_huge(_metadata, &huge))
		return;
	setup_vram(_metadata, &self->fd, &self->size, &self->result);
	if (self->fd < 0)
		return;
	pages = huge / page;
	self->p = map_huge(huge, huge);
	self->copy = malloc(huge);
	ASSERT_NE(MAP_FAILED, self->p);
	ASSERT_NE(NULL, self->copy);
	cpu_randomize(self->copy, huge, 1);
	memcpy(self->p, self->copy, huge);
	ASSERT_EQ(huge, huge_bytes(self->p));
}

FIXTURE_TEARDOWN(large)
{
	free(self->copy);
	if (self->p)
		munmap(self->p, huge);
	munmap(self->result, page);
	close(self->fd);
}

#define LARGE	FIXTURE_DATA(large)

/* The sum of a part of the folio as the device sees it at p, and as it should be. */
static uint64_t device_sum(const LARGE *self, const void *p, size_t length)
{
	return vram_sum(self->fd, self->result, p, length);
}

static uint64_t sum_of(const LARGE *self, size_t first, size_t length)
{
	return cpu_sum((uint64_t *)(self->copy + first), length);
}

static void to_device(struct __test_metadata *_metadata, const LARGE *self)
{
	ASSERT_EQ(pages, prefetch_all(self->fd, self->p, huge, DUMMY_GPU_LOCATION_DEVICE));
	ASSERT_EQ(pages, stats_of(_metadata, self->fd).large_to_device);
	ASSERT_EQ(huge, (size_t)(stats_of(_metadata, self->fd).device_pages * page));
}

TEST_F(large, moves_as_one_and_comes_back_as_one)
{
	to_device(_metadata, self);
	EXPECT_EQ(sum_of(self, 0, huge), device_sum(self, self->p, huge));
	EXPECT_EQ(pages, prefetch_all(self->fd, self->p, huge, DUMMY_GPU_LOCATION_SYSTEM));
	EXPECT_EQ(pages, stats_of(_metadata, self->fd).large_to_system);
	EXPECT_EQ(huge, huge_bytes(self->p));
	EXPECT_EQ(huge, cpu_differs(self->p, self->copy, huge));
}

TEST_F(large, a_cpu_that_reads_all_of_it_faults_once)
{
	struct dummy_gpu_stats stats;

	to_device(_metadata, self);
	EXPECT_EQ(huge, cpu_differs(self->p, self->copy, huge));
	stats = stats_of(_metadata, self->fd);
	EXPECT_EQ(pages, stats.pages_cpu_faulted);
	EXPECT_EQ(pages, stats.large_to_system);
	EXPECT_EQ(huge, huge_bytes(self->p));
}

/* One fault of the device moves and maps all of it. */
TEST_F(large, an_access_to_a_word_takes_all_of_it_along)
{
	struct dummy_gpu_stats before = stats_of(_metadata, self->fd), after;

	EXPECT_EQ(sum_of(self, 100 * page, WORD), device_sum(self, self->p + 100 * page, WORD));
	after = stats_of(_metadata, self->fd);
	EXPECT_EQ(pages, after.pages_to_device);
	EXPECT_EQ(pages, after.large_to_device);
	EXPECT_EQ(sum_of(self, 0, huge), device_sum(self, self->p, huge));
	after = stats_of(_metadata, self->fd);
	/* Of the folio and of the result. */
	EXPECT_GE(before.faults + 2, after.faults);
	EXPECT_EQ(pages, after.pages_to_device);
}

TEST_F(large, without_a_policy_an_access_neither_moves_nor_splits_it)
{
	struct dummy_gpu_stats stats;

	ASSERT_EQ(0, gpu_advise(self->fd, self->p, huge, DUMMY_GPU_POLICY_NONE));
	EXPECT_EQ(sum_of(self, 100 * page, WORD), device_sum(self, self->p + 100 * page, WORD));
	memset(self->copy + 7 * page, 0x77, WORD);
	ASSERT_EQ(0, run(self->fd, gpu_fill(self->p + 7 * page, 0x77, WORD)));
	stats = stats_of(_metadata, self->fd);
	EXPECT_EQ(0, stats.pages_to_device);
	EXPECT_EQ(huge, huge_bytes(self->p));
	EXPECT_EQ(huge, cpu_differs(self->p, self->copy, huge));
}

/* Where the CPU would get a large folio of zeroes, the device does. */
TEST_F(large, the_first_write_to_a_hole_populates_all_of_it)
{
	uint8_t *p = map_huge(huge, huge);

	ASSERT_NE(MAP_FAILED, p);
	ASSERT_EQ(0, run(self->fd, gpu_fill(p + 100 * page, 0x11, WORD)));
	EXPECT_EQ(pages, stats_of(_metadata, self->fd).large_to_device);
	EXPECT_EQ(0x1111111111111111ULL, device_sum(self, p, huge));
	EXPECT_EQ(pages, stats_of(_metadata, self->fd).pages_to_device);
	EXPECT_EQ(0x1111111111111111ULL, cpu_sum((uint64_t *)p, huge));
	munmap(p, huge);
}

/* The huge zero page, which all processes share. */
TEST_F(large, a_huge_page_of_zeroes_moves_for_a_write_only)
{
	uint8_t *p = map_huge(huge, huge);

	ASSERT_NE(MAP_FAILED, p);
	ASSERT_EQ(0, cpu_load(p));
	EXPECT_EQ(0, device_sum(self, p, huge));
	EXPECT_EQ(0, stats_of(_metadata, self->fd).pages_to_device);
	ASSERT_EQ(0, run(self->fd, gpu_fill(p + 100 * page, 0x11, WORD)));
	EXPECT_LE(1, stats_of(_metadata, self->fd).pages_to_device);
	EXPECT_EQ(0x1111111111111111ULL, cpu_sum((uint64_t *)p, huge));
	munmap(p, huge);
}

/* What is done to one page of the folio. Returns where it is now, or NULL if it is gone. */
static uint8_t *unmap(uint8_t *at)
{
	return munmap(at, page) ? MAP_FAILED : NULL;
}

static uint8_t *drop(uint8_t *at)
{
	return madvise(at, page, MADV_DONTNEED) ? MAP_FAILED : NULL;
}

static uint8_t *move(uint8_t *at)
{
	return mremap(at, page, page, MREMAP_MAYMOVE | MREMAP_FIXED, map(page, PROT_NONE));
}

static uint8_t *touch(uint8_t *at)
{
	cpu_load(at);
	return at;
}

static uint8_t *protect(uint8_t *at)
{
	return mprotect(at, page, PROT_READ) ? MAP_FAILED : at;
}

/*
 * The others stay in device memory, all but most of them, and the device goes on
 * without a copy or a migration.
 */
static void others_stay(struct __test_metadata *_metadata, LARGE *self,
			uint8_t *(*change)(uint8_t *at), size_t most)
{
	uint8_t *at = self->p + 100 * page, *after = at + 16 * page, *now;
	const size_t left = 100 * page, right = huge - 116 * page;
	struct dummy_gpu_stats before, stats;

	to_device(_metadata, self);
	before = stats_of(_metadata, self->fd);
	now = change(at);
	ASSERT_NE(MAP_FAILED, now);
	stats = stats_of(_metadata, self->fd);
	EXPECT_LE(pages - most, stats.device_pages);

	/* Not on the device: pages near the one that the CPU has touched. */
	EXPECT_EQ(sum_of(self, 0, 96 * page), device_sum(self, self->p, 96 * page));
	EXPECT_EQ(sum_of(self, left + 16 * page, right), device_sum(self, after, right));
	if (now && now != at)
		EXPECT_EQ(sum_of(self, left, page), device_sum(self, now, page));
	EXPECT_EQ(before.pages_to_device, stats_of(_metadata, self->fd).pages_to_device);
	EXPECT_EQ(stats.device_pages, stats_of(_metadata, self->fd).device_pages);
	EXPECT_EQ(stats.pages_cpu_faulted, stats_of(_metadata, self->fd).pages_cpu_faulted);

	EXPECT_EQ(left, cpu_differs(self->p, self->copy, left));
	EXPECT_EQ(huge - left - page,
		  cpu_differs(at + page, self->copy + left + page, huge - left - page));
	if (now)
		EXPECT_EQ(page, cpu_differs(now, self->copy + left, page));
	EXPECT_EQ(0, stats_of(_metadata, self->fd).device_pages);
	if (now && now != at)
		munmap(now, page);
}

TEST_F(large, a_page_that_is_unmapped_goes_alone)
{
	others_stay(_metadata, self, unmap, 1);
}

TEST_F(large, a_page_that_is_dropped_goes_alone)
{
	others_stay(_metadata, self, drop, 1);
}

TEST_F(large, a_page_that_is_moved_stays_on_the_device_too)
{
	others_stay(_metadata, self, move, 0);
}

TEST_F(large, a_page_that_the_cpu_touches_takes_few_along)
{
	others_stay(_metadata, self, touch, 16);
}

TEST_F(large, a_page_that_is_protected_stays_on_the_device_too)
{
	others_stay(_metadata, self, protect, 0);
}

/* Both processes have the folio, and each its own bytes afterwards. */
TEST_F(large, after_fork_each_process_has_its_own)
{
	int status;
	pid_t child;

	to_device(_metadata, self);
	child = fork();
	ASSERT_LE(0, child);
	if (!child) {
		bool same = cpu_differs(self->p, self->copy, huge) == huge;

		memset(self->p, 0xcc, huge);
		_exit(!same || cpu_unlike(self->p, 0xcc, huge) != huge);
	}
	memset(self->copy + 50 * page, 0x11, 200 * page);
	EXPECT_EQ(0, run(self->fd, gpu_fill(self->p + 50 * page, 0x11, 200 * page)));
	status = wait_child(child, 60);
	EXPECT_EQ(0, status);
	EXPECT_EQ(sum_of(self, 0, huge), device_sum(self, self->p, huge));
	EXPECT_EQ(huge, cpu_differs(self->p, self->copy, huge));
}

/* There is no room for all of them at once. */
TEST_F(large, folios_that_are_evicted_stay_large)
{
	const size_t count = self->size / huge + 2;
	uint8_t *p = map_huge(count * huge, huge);
	struct dummy_gpu_stats stats;

	ASSERT_NE(MAP_FAILED, p);
	for (size_t i = 0; i < count; i++)
		memset(p + i * huge, i + 1, huge);
	for (size_t i = 0; i < count; i++)
		ASSERT_LE(0, prefetch_all(self->fd, p + i * huge, huge, DUMMY_GPU_LOCATION_DEVICE));
	stats = stats_of(_metadata, self->fd);
	EXPECT_LE(2 * pages, stats.pages_evicted);
	EXPECT_EQ(stats.pages_evicted, stats.large_to_system);
	EXPECT_LE(2 * huge, huge_bytes(p));
	for (size_t i = 0; i < count; i++)
		EXPECT_EQ(huge, cpu_unlike(p + i * huge, i + 1, huge));
	munmap(p, count * huge);
}

/* mm splits a large folio that PTEs map before it migrates: see Documentation/mm/hmm-rust.rst. */
TEST_F(large, smaller_large_folios_move_as_pages)
{
	const char *enabled = THP "hugepages-64kB/enabled";
	char before[60], *word = read_from(enabled, before, sizeof(before));
	uint8_t *p;

	if (!word)
		SKIP(return, "no folios of 64 KiB");
	word = strchr(word, '[');
	ASSERT_NE(NULL, word);
	*strchr(word, ']') = 0;
	ASSERT_TRUE(write_to(enabled, "always"));
	p = map_huge(huge, huge);
	ASSERT_NE(MAP_FAILED, p);
	/* What is left is too small for a huge page. */
	ASSERT_EQ(0, munmap(p + huge / 2, huge / 2));
	memcpy(p, self->copy, huge / 2);
	ASSERT_TRUE(write_to(enabled, word + 1));
	EXPECT_EQ(pages / 2, prefetch_all(self->fd, p, huge / 2, DUMMY_GPU_LOCATION_DEVICE));
	EXPECT_EQ(sum_of(self, 0, huge / 2), device_sum(self, p, huge / 2));
	EXPECT_EQ(pages / 4, prefetch_all(self->fd, p, huge / 4, DUMMY_GPU_LOCATION_SYSTEM));
	EXPECT_EQ(huge / 2, cpu_differs(p, self->copy, huge / 2));
	EXPECT_EQ(0, stats_of(_metadata, self->fd).large_to_device);
	munmap(p, huge / 2);
}

/*
 * A storm: the CPU and the device count in words of their own in each page,
 * large folios move between the memories, and something makes mm split folios
 * or put them together. No word may ever have another value than it was given.
 */
struct storm {
	const LARGE *self;
	uint8_t *p;
	bool stop;
	size_t turns, wrong;
	void (*disturb)(uint8_t *p);
};

static bool is_over(const struct storm *storm)
{
	return __atomic_load_n(&storm->stop, __ATOMIC_RELAXED);
}

static void *count_by_cpu(void *arg)
{
	static uint64_t expect[FOLIOS * 512];
	struct storm *storm = arg;
	uint64_t state = 1;

	memset(expect, 0, sizeof(expect));
	while (!is_over(storm)) {
		size_t i = cpu_random(&state) % (FOLIOS * pages);
		uint64_t *word = (uint64_t *)(storm->p + i * page);

		if (__atomic_load_n(word, __ATOMIC_RELAXED) != expect[i])
			__atomic_add_fetch(&storm->wrong, 1, __ATOMIC_RELAXED);
		__atomic_store_n(word, ++expect[i], __ATOMIC_RELAXED);
	}
	return NULL;
}

static void *count_by_device(void *arg)
{
	static uint8_t expect[FOLIOS * 512];
	struct storm *storm = arg;
	uint64_t state = 2;

	memset(expect, 0, sizeof(expect));
	while (!is_over(storm)) {
		size_t i = cpu_random(&state) % (FOLIOS * pages);
		uint8_t *word = storm->p + i * page + 64;

		if (device_sum(storm->self, word, WORD) != expect[i] * 0x0101010101010101ULL ||
		    run(storm->self->fd, gpu_fill(word, ++expect[i], WORD)))
			__atomic_add_fetch(&storm->wrong, 1, __ATOMIC_RELAXED);
		__atomic_add_fetch(&storm->turns, 1, __ATOMIC_RELAXED);
	}
	return NULL;
}

static void *move_folios(void *arg)
{
	struct storm *storm = arg;
	uint64_t state = 3;

	while (!is_over(storm)) {
		uint64_t random = cpu_random(&state);

		/* How many of them move does not matter. */
		prefetch_all(storm->self->fd, storm->p + random % FOLIOS * huge, huge,
			     random >> 32 & 1 ? DUMMY_GPU_LOCATION_DEVICE :
						DUMMY_GPU_LOCATION_SYSTEM);
	}
	return NULL;
}

static void *disturb(void *arg)
{
	struct storm *storm = arg;

	while (!is_over(storm))
		storm->disturb(storm->p);
	return NULL;
}

static void storm(struct __test_metadata *_metadata, const LARGE *self,
		  void (*what)(uint8_t *p))
{
	void *(*const roles[])(void *) = { count_by_cpu, count_by_device, move_folios, disturb };
	struct storm storm = { .self = self, .p = map_huge(FOLIOS * huge, huge), .disturb = what };
	pthread_t threads[4];
	struct dummy_gpu_stats stats;

	ASSERT_NE(MAP_FAILED, storm.p);
	for (int i = 0; i < 4; i++)
		ASSERT_EQ(0, pthread_create(&threads[i], NULL, roles[i], &storm));
	sleep(setting_of("DUMMY_GPU_SECONDS", 3));
	__atomic_store_n(&storm.stop, true, __ATOMIC_RELAXED);
	for (int i = 0; i < 4; i++)
		ASSERT_EQ(0, pthread_join(threads[i], NULL));
	EXPECT_EQ(0, storm.wrong);
	EXPECT_LT(0, storm.turns);
	stats = stats_of(_metadata, self->fd);
	EXPECT_LT(0, stats.large_to_device);
	TH_LOG("%zu turns, %llu pages to the device, %llu of them in large folios", storm.turns,
	       (unsigned long long)stats.pages_to_device,
	       (unsigned long long)stats.large_to_device);
	munmap(storm.p, FOLIOS * huge);
}

/* The work of khugepaged, at once. It fails for memory that has pages on the device. */
static void collapse(uint8_t *p)
{
	madvise(p, FOLIOS * huge, MADV_COLLAPSE);
}

TEST_F_TIMEOUT(large, nothing_is_lost_while_folios_are_collapsed, STORM_TIMEOUT)
{
	storm(_metadata, self, collapse);
}

static void split(uint8_t *p)
{
	char text[80];

	snprintf(text, sizeof(text), "%d,%#lx,%#lx", getpid(), (unsigned long)p,
		 (unsigned long)p + FOLIOS * huge);
	write_to("/sys/kernel/debug/split_huge_pages", text);
	usleep(1000);
}

TEST_F_TIMEOUT(large, nothing_is_lost_while_folios_are_split, STORM_TIMEOUT)
{
	if (access("/sys/kernel/debug/split_huge_pages", W_OK))
		SKIP(return, "no debugfs");
	storm(_metadata, self, split);
}

/* What is split is put together by khugepaged, which does not rest. */
TEST_F_TIMEOUT(large, nothing_is_lost_while_khugepaged_runs, STORM_TIMEOUT)
{
	static const char *const files[] = {
		THP "khugepaged/scan_sleep_millisecs", THP "khugepaged/alloc_sleep_millisecs",
	};
	char before[ARRAY_SIZE(files)][40];

	if (access("/sys/kernel/debug/split_huge_pages", W_OK))
		SKIP(return, "no debugfs");
	for (size_t i = 0; i < ARRAY_SIZE(files); i++) {
		ASSERT_NE(NULL, read_from(files[i], before[i], sizeof(before[i])));
		ASSERT_TRUE(write_to(files[i], "0"));
	}
	storm(_metadata, self, split);
	for (size_t i = 0; i < ARRAY_SIZE(files); i++)
		EXPECT_TRUE(write_to(files[i], before[i]));
}

static void compact(uint8_t *p)
{
	(void)p;
	write_to("/proc/sys/vm/compact_memory", "1");
	usleep(1000);
}

TEST_F_TIMEOUT(large, nothing_is_lost_while_memory_is_compacted, STORM_TIMEOUT)
{
	if (access("/proc/sys/vm/compact_memory", W_OK))
		SKIP(return, "no compaction");
	storm(_metadata, self, compact);
}

/* Needs more than the cgroup may have, so reclaim takes the folios apart. */
static void press(uint8_t *p)
{
	const size_t length = FOLIOS * huge;
	uint8_t *hog = map_huge(FOLIOS * huge, huge);

	if (hog == MAP_FAILED)
		return;
	for (size_t i = 0; i < length; i += page)
		cpu_store(hog + i, 1);
	munmap(hog, length);
	madvise(p, length, MADV_PAGEOUT);
}

TEST_F_TIMEOUT(large, nothing_is_lost_under_pressure, STORM_TIMEOUT)
{
	struct cgroups cgroups = {};
	char group[60], path[80];

	if (!cgroups_mount(&cgroups, "cgroup2", NULL))
		SKIP(return, "no cgroup2: %s", strerror(errno));
	if (!cgroups_have_memory(&cgroups)) {
		cgroups_unmount(&cgroups);
		SKIP(return, "no memory controller in cgroup2");
	}
	if (swap_on("/dev/ram0")) {
		cgroups_unmount(&cgroups);
		SKIP(return, "no swap on /dev/ram0");
	}
	snprintf(group, sizeof(group), "%s/dummy_gpu_large", cgroups.dir);
	ASSERT_EQ(0, mkdir(group, 0700));
	snprintf(path, sizeof(path), "%s/memory.max", group);
	ASSERT_TRUE(write_to(path, "24M"));
	snprintf(path, sizeof(path), "%s/cgroup.procs", group);
	ASSERT_TRUE(write_to(path, "0"));
	storm(_metadata, self, press);
	snprintf(path, sizeof(path), "%s/cgroup.procs", cgroups.dir);
	EXPECT_TRUE(write_to(path, "0"));
	EXPECT_EQ(0, rmdir(group));
	cgroups_unmount(&cgroups);
	EXPECT_EQ(0, swapoff("/dev/ram0"));
}

TEST_HARNESS_MAIN
