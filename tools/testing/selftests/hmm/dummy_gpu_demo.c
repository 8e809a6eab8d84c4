// SPDX-License-Identifier: GPL-2.0
/*
 * A demonstration of the dummy GPU: it computes on a mapped file and on arrays
 * of this process, through the pointers that the CPU uses, while the CPU keeps
 * using them. The CPU computes the same and compares the results. The arrays
 * together are larger than device memory, so pages are evicted all the time.
 *
 * Exit status: 0 if all results are equal and pages moved as they should, 1 if
 * not, 2 if the demonstration cannot be run.
 */
#include <err.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "dummy_gpu_user.h"

#define MIB		(1024UL * 1024)
#define ARRAY_LENGTH	(48 * MIB)
#define ELEMENTS	(ARRAY_LENGTH / sizeof(uint64_t))
#define PREFETCH_LENGTH	(32 * MIB)

static int gpu;
static struct dummy_gpu_info info;
static int differences;
static int misplacements;

/* The cost of one step, or of all steps. */
struct cost {
	uint64_t bytes;
	uint64_t faults;
	uint64_t to_device;
	uint64_t large;
	uint64_t evicted;
	uint64_t touched;
	double gpu_ms;
	double cpu_ms;
};

static struct cost total;

/* Prints a result, or the first element of a result, that differs. */
static void compare(const char *what, uint64_t result, uint64_t expect)
{
	if (result == expect)
		return;
	printf("  DIFFERS: %s: GPU %#llx, CPU %#llx\n", what, (unsigned long long)result,
	       (unsigned long long)expect);
	differences++;
}

/* Prints what is not where it should be. */
static void expect_placed(bool placed, const char *what)
{
	if (placed)
		return;
	printf("  MISPLACED: %s\n", what);
	misplacements++;
}

static double now_ms(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * 1e3 + ts.tv_nsec / 1e6;
}

static struct dummy_gpu_stats stats_now(void)
{
	struct dummy_gpu_stats stats;
	int ret = gpu_stats(gpu, &stats);

	if (ret)
		errx(2, "STATS: %s", strerror(-ret));
	return stats;
}

/*
 * The counters at the end of the previous step. CPU faults of a step count too.
 */
static struct dummy_gpu_stats before;

/* Runs the command of a step. Returns how long it took. */
static double gpu_run(const char *step, struct dummy_gpu_command command)
{
	struct dummy_gpu_submit submit = gpu_submission(&command, 1);
	double start = now_ms();
	int ret = gpu_submit(gpu, &submit);
	double end = now_ms();

	if (ret == -EPERM && submit.fault_address == GPU_UNTOUCHED)
		errx(2, "%s: SUBMIT: the file was opened by another process", step);
	if (ret)
		errx(2, "%s: SUBMIT: %s (%llu commands completed, fault address %#llx)",
		     step, strerror(-ret), (unsigned long long)submit.completed,
		     (unsigned long long)submit.fault_address);
	if (submit.completed != 1)
		errx(2, "%s: SUBMIT: %llu commands completed instead of 1", step,
		     (unsigned long long)submit.completed);
	return end - start;
}

static void print_head(void)
{
	printf("%-28s %8s %7s %8s %8s %8s %8s %9s %7s %9s %7s\n", "", "", "GPU", "pages to",
	       "in large", "pages", "pages", "GPU", "GPU", "CPU", "CPU");
	printf("%-28s %8s %7s %8s %8s %8s %8s %9s %7s %9s %7s\n", "step", "MiB", "faults",
	       "device", "folios", "evicted", "touched", "ms", "MiB/s", "ms", "MiB/s");
}

static void print_row(const char *step, const struct cost *c)
{
	double mib = (double)c->bytes / MIB;

	printf("%-28s %8.1f %7llu %8llu %8llu %8llu %8llu %9.1f %7.0f %9.1f %7.0f\n", step, mib,
	       (unsigned long long)c->faults, (unsigned long long)c->to_device,
	       (unsigned long long)c->large, (unsigned long long)c->evicted,
	       (unsigned long long)c->touched, c->gpu_ms, mib / (c->gpu_ms / 1e3), c->cpu_ms,
	       mib / (c->cpu_ms / 1e3));
	fflush(stdout);
}

/*
 * Ends a step and returns its cost, including the CPU faults of preparing and
 * comparing.
 */
static struct cost row(const char *step, uint64_t bytes, double gpu_ms, double cpu_start)
{
	double cpu_ms = now_ms() - cpu_start;
	struct dummy_gpu_stats after = stats_now();
	struct cost cost = {
		.bytes = bytes,
		.faults = after.faults - before.faults,
		.to_device = after.pages_to_device - before.pages_to_device,
		.large = after.large_to_device - before.large_to_device,
		.evicted = after.pages_evicted - before.pages_evicted,
		.touched = after.pages_cpu_faulted - before.pages_cpu_faulted,
		.gpu_ms = gpu_ms,
		.cpu_ms = cpu_ms,
	};

	before = after;
	print_row(step, &cost);
	total.bytes += cost.bytes;
	total.faults += cost.faults;
	total.to_device += cost.to_device;
	total.large += cost.large;
	total.evicted += cost.evicted;
	total.touched += cost.touched;
	total.gpu_ms += cost.gpu_ms;
	total.cpu_ms += cost.cpu_ms;
	return cost;
}

static void crc32_step(const char *step, const void *p, size_t length)
{
	static uint64_t result;
	uint64_t expect;
	double start, ms;

	ms = gpu_run(step, gpu_unary(DUMMY_GPU_OP_CRC32, &result, p, length));
	start = now_ms();
	expect = cpu_crc32(p, length);
	row(step, length, ms, start);
	compare("crc32", result, expect);
}

static void histogram_step(const char *step, const void *p, size_t length)
{
	static uint64_t result[GPU_BUCKETS], expect[GPU_BUCKETS];
	double start, ms;
	char what[40];
	size_t first;

	ms = gpu_run(step, gpu_unary(DUMMY_GPU_OP_HISTOGRAM, result, p, length));
	start = now_ms();
	cpu_histogram(expect, p, length);
	row(step, length, ms, start);
	first = cpu_differs(result, expect, sizeof(result)) / sizeof(*result);
	if (first < GPU_BUCKETS) {
		snprintf(what, sizeof(what), "count of byte value %zu", first);
		compare(what, result[first], expect[first]);
	}
}

static void add_step(const char *step, uint64_t *dst, const uint64_t *src,
		     const uint64_t *src2)
{
	double start, ms;
	char what[40];
	size_t first;

	ms = gpu_run(step, gpu_binary(DUMMY_GPU_OP_ADD, dst, src, src2, ARRAY_LENGTH));
	start = now_ms();
	for (first = 0; first < ELEMENTS; first++) {
		if (dst[first] != src[first] + src2[first])
			break;
	}
	row(step, 3 * ARRAY_LENGTH, ms, start);
	if (first < ELEMENTS) {
		snprintf(what, sizeof(what), "element %zu", first);
		compare(what, dst[first], src[first] + src2[first]);
	}
}

static void sum_step(const char *step, const uint64_t *p)
{
	static uint64_t result;
	uint64_t expect;
	double start, ms;

	ms = gpu_run(step, gpu_unary(DUMMY_GPU_OP_SUM, &result, p, ARRAY_LENGTH));
	start = now_ms();
	expect = cpu_sum(p, ARRAY_LENGTH);
	row(step, ARRAY_LENGTH, ms, start);
	compare("sum", result, expect);
}

static struct cost fill_step(const char *step, uint8_t *p, uint8_t value)
{
	struct cost cost;
	double start, ms;
	size_t first;

	ms = gpu_run(step, gpu_fill(p, value, ARRAY_LENGTH));
	start = now_ms();
	first = cpu_unlike(p, value, ARRAY_LENGTH);
	cost = row(step, ARRAY_LENGTH, ms, start);
	if (first < ARRAY_LENGTH)
		compare("a byte", p[first], value);
	return cost;
}

static void *map_array(void *where)
{
	void *p = mmap(where, ARRAY_LENGTH, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS | (where ? MAP_FIXED : 0), -1, 0);

	if (p == MAP_FAILED)
		err(2, "mmap of an array of %lu MiB", ARRAY_LENGTH / MIB);
	return p;
}

static const void *map_file(const char *path, size_t *length)
{
	struct stat st;
	void *p;
	int fd;

	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		err(2, "open %s", path);
	if (fstat(fd, &st))
		err(2, "fstat %s", path);
	if (!S_ISREG(st.st_mode))
		errx(2, "%s is not a regular file", path);
	if (!st.st_size)
		errx(2, "%s is empty", path);
	p = mmap(NULL, st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
	if (p == MAP_FAILED)
		err(2, "mmap %s", path);
	close(fd);
	*length = st.st_size;
	return p;
}

static void array_steps(void)
{
	uint64_t *a = map_array(NULL), *b = map_array(NULL), *c = map_array(NULL);

	cpu_randomize(a, ARRAY_LENGTH, 1);
	cpu_randomize(b, ARRAY_LENGTH, 2);

	/* Nothing has touched c, so the GPU fault populates its pages. */
	add_step("c = a + b, c untouched", c, a, b);
	sum_step("sum of c", c);

	for (size_t i = 0; i < ELEMENTS; i += 4096)
		c[i] = ~c[i];
	sum_step("sum, CPU wrote to c", c);

	if (madvise(c + ELEMENTS / 4, ARRAY_LENGTH / 4, MADV_DONTNEED))
		err(2, "madvise");
	sum_step("sum, a quarter discarded", c);
	compare("length of zeros", cpu_unlike(c + ELEMENTS / 4, 0, ARRAY_LENGTH / 4),
		ARRAY_LENGTH / 4);

	if (munmap(b, ARRAY_LENGTH))
		err(2, "munmap");
	b = map_array(b);
	cpu_randomize(b, ARRAY_LENGTH, 3);
	add_step("c = a + b, b mapped anew", c, a, b);
	sum_step("sum of c", c);

	/*
	 * Free the device memory, or the next steps would have to evict these
	 * pages.
	 */
	munmap(a, ARRAY_LENGTH);
	munmap(b, ARRAY_LENGTH);
	munmap(c, ARRAY_LENGTH);
}

/* An array whose policy keeps it in system memory. */
static void policy_step(void)
{
	uint8_t *p = map_array(NULL);
	struct cost cost;
	int ret;

	ret = gpu_advise(gpu, p, ARRAY_LENGTH, DUMMY_GPU_POLICY_SYSTEM);
	if (ret)
		errx(2, "ADVISE: %s", strerror(-ret));
	cost = fill_step("fill, policy: system", p, 0x5a);
	expect_placed(!cost.to_device, "pages moved to the device against their policy");
	munmap(p, ARRAY_LENGTH);
}

/* Migrates an array and returns the rate in pages per second. */
static double prefetch(const char *to, const void *p, size_t length,
		       enum dummy_gpu_location location)
{
	struct dummy_gpu_prefetch prefetch = gpu_prefetching(p, length, location);
	double start = now_ms();
	int ret = gpu_prefetch(gpu, &prefetch);
	double end = now_ms();

	if (ret)
		errx(2, "PREFETCH to %s: %s (%llu bytes done)", to, strerror(-ret),
		     (unsigned long long)prefetch.done);
	expect_placed(prefetch.pages == length / info.page_size, "pages did not move by PREFETCH");
	return prefetch.pages / ((end - start) / 1e3);
}

/* Pages on the device occupy no system memory, so more of it must be free. */
static void prefetch_step(void)
{
	size_t length = info.vram_size < PREFETCH_LENGTH ? info.vram_size : PREFETCH_LENGTH;
	uint64_t *p = map_array(NULL), crc, free_before, free_after;
	double to_device, to_system, gained;

	cpu_randomize(p, length, 4);
	crc = cpu_crc32(p, length);

	free_before = cpu_free_memory();
	to_device = prefetch("the device", p, length, DUMMY_GPU_LOCATION_DEVICE);
	free_after = cpu_free_memory();
	to_system = prefetch("RAM", p, length, DUMMY_GPU_LOCATION_SYSTEM);
	if (!free_before || !free_after)
		errx(2, "no MemFree in /proc/meminfo");

	gained = ((double)free_after - (double)free_before) / length;
	printf("\nPrefetch of %.1f MiB to the device: MemFree %.1f -> %.1f MiB, %+.1f MiB\n",
	       (double)length / MIB, (double)free_before / MIB, (double)free_after / MIB,
	       gained * length / MIB);
	printf("  to the device  %10.0f pages/s\n", to_device);
	printf("  back to RAM    %10.0f pages/s\n", to_system);
	expect_placed(gained >= 0.75 && gained <= 1.25, "free RAM did not grow by about as much");
	compare("crc32 after the prefetches", cpu_crc32(p, length), crc);
	munmap(p, ARRAY_LENGTH);
}

static void summary(void)
{
	struct dummy_gpu_stats stats = stats_now();

	printf("\n%llu invalidations of %llu pages, %llu retries; pages: %llu to the device,\n"
	       "%llu evicted, %llu touched by the CPU, %llu back to RAM on request\n",
	       (unsigned long long)stats.invalidations,
	       (unsigned long long)stats.invalidated_pages, (unsigned long long)stats.retries,
	       (unsigned long long)stats.pages_to_device,
	       (unsigned long long)stats.pages_evicted, (unsigned long long)stats.pages_cpu_faulted,
	       (unsigned long long)stats.pages_to_system);
	if (!info.vram_size)
		return;
	expect_placed(stats.pages_to_device >= info.vram_size / info.page_size,
		      "fewer pages moved to the device than it has room for");
	expect_placed(stats.pages_evicted, "no page was evicted");
	expect_placed(stats.pages_cpu_faulted, "no page came back when the CPU touched it");
}

static int usage(int status)
{
	fprintf(status ? stderr : stdout,
		"Usage: dummy_gpu_demo [-d DEVICE] FILE\n"
		"\n"
		"Lets the dummy GPU compute on the mapped FILE and on arrays of %lu MiB,\n"
		"through plain pointers, and compares with what the CPU computes. If the\n"
		"device has memory of its own, shows and checks which pages move there and\n"
		"back: when the GPU or the CPU touches them, when room is needed, by a\n"
		"policy, and by a prefetch of %lu MiB, which must free as much RAM.\n"
		"\n"
		"  -d DEVICE  the device, by default " GPU_DEVICE "\n"
		"  -h         this help\n"
		"\n"
		"Exit status: 0 if all results are equal and pages moved as they should, 1\n"
		"if not, 2 if it cannot be run.\n", ARRAY_LENGTH / MIB, PREFETCH_LENGTH / MIB);
	return status;
}

int main(int argc, char **argv)
{
	const char *device = GPU_DEVICE;
	const void *file;
	size_t length;
	int opt, ret;

	while ((opt = getopt(argc, argv, "d:h")) != -1) {
		switch (opt) {
		case 'd':
			device = optarg;
			break;
		case 'h':
			return usage(0);
		default:
			return usage(2);
		}
	}
	if (optind != argc - 1)
		return usage(2);

	gpu = open(device, O_RDWR | O_CLOEXEC);
	if (gpu < 0)
		err(2, "open %s", device);
	ret = gpu_info(gpu, &info);
	if (ret)
		errx(2, "INFO on %s: %s", device, strerror(-ret));
	if (info.max_length < ARRAY_LENGTH)
		errx(2, "a command takes at most %llu bytes, the arrays have %lu",
		     (unsigned long long)info.max_length, ARRAY_LENGTH);
	file = map_file(argv[optind], &length);
	if (length > info.max_length)
		errx(2, "%s has %zu bytes, a command takes at most %llu", argv[optind],
		     length, (unsigned long long)info.max_length);
	printf("%s: pages of %llu bytes, windows of up to %llu bytes; file %s\n", device,
	       (unsigned long long)info.page_size, (unsigned long long)info.window_size,
	       argv[optind]);
	if (info.vram_size)
		printf("The device has %.1f MiB of its own for 3 arrays of %lu MiB.\n\n",
		       (double)info.vram_size / MIB, ARRAY_LENGTH / MIB);
	else
		printf("The device has no memory of its own: the arrays stay in RAM.\n\n");

	before = stats_now();
	print_head();
	crc32_step("crc32 of the file", file, length);
	histogram_step("histogram of the file", file, length);
	array_steps();
	if (info.vram_size)
		policy_step();
	print_row("all", &total);
	if (info.vram_size)
		prefetch_step();
	summary();

	close(gpu);
	if (differences || misplacements) {
		printf("\n%d differences, %d misplacements.\n", differences, misplacements);
		return 1;
	}
	printf("\nAll results of the GPU are those of the CPU.\n");
	return 0;
}
