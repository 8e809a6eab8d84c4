// SPDX-License-Identifier: GPL-2.0
/*
 * A demonstration of the dummy GPU: it computes on a mapped file and on arrays
 * of this process, through the pointers that the CPU uses, while the CPU keeps
 * using them. The CPU computes everything too, and compares.
 *
 * Exit status: 0 if all results are equal, 1 if one differs, 2 if the
 * demonstration cannot be run.
 */
#include <err.h>
#include <fcntl.h>
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

static int gpu;
static int differences;

/* The costs of one side of a step. */
struct cost {
	uint64_t faults;
	uint64_t windows;
	uint64_t invalidations;
	uint64_t retries;
	double ms;
};

static struct cost total_gpu, total_cpu;
static uint64_t total_bytes;

/* Says what differs: a result, or the first element of one. */
static void compare(const char *what, uint64_t result, uint64_t expect)
{
	if (result == expect)
		return;
	printf("  DIFFERS: %s: GPU %#llx, CPU %#llx\n", what, (unsigned long long)result,
	       (unsigned long long)expect);
	differences++;
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

/* The counters at the end of the step before: what the CPU does, counts too. */
static struct dummy_gpu_stats before;

static struct cost gpu_run(const char *step, struct dummy_gpu_command command)
{
	struct dummy_gpu_submit submit = gpu_submission(&command, 1);
	double start = now_ms();
	int ret = gpu_submit(gpu, &submit);
	double end = now_ms();
	struct dummy_gpu_stats after = stats_now();
	struct cost cost = {
		.faults = after.faults - before.faults,
		.windows = after.windows - before.windows,
		.invalidations = after.invalidations - before.invalidations,
		.retries = after.retries - before.retries,
		.ms = end - start,
	};

	if (ret == -EPERM && submit.fault_address == GPU_UNTOUCHED)
		errx(2, "%s: SUBMIT: the file was opened by another process", step);
	if (ret)
		errx(2, "%s: SUBMIT: %s (%llu commands completed, fault address %#llx)",
		     step, strerror(-ret), (unsigned long long)submit.completed,
		     (unsigned long long)submit.fault_address);
	if (submit.completed != 1)
		errx(2, "%s: SUBMIT: %llu commands completed instead of 1", step,
		     (unsigned long long)submit.completed);
	before = after;
	return cost;
}

static void print_head(void)
{
	printf("%-28s %8s %7s %7s %7s %7s %9s %7s %9s %7s\n", "", "", "GPU", "", "invali-",
	       "", "GPU", "GPU", "CPU", "CPU");
	printf("%-28s %8s %7s %7s %7s %7s %9s %7s %9s %7s\n", "step", "MiB", "faults",
	       "windows", "dations", "retries", "ms", "MiB/s", "ms", "MiB/s");
}

static void print_row(const char *step, uint64_t bytes, const struct cost *g,
		      const struct cost *c)
{
	double mib = (double)bytes / MIB;

	printf("%-28s %8.1f %7llu %7llu %7llu %7llu %9.1f %7.0f %9.1f %7.0f\n", step, mib,
	       (unsigned long long)g->faults, (unsigned long long)g->windows,
	       (unsigned long long)g->invalidations, (unsigned long long)g->retries,
	       g->ms, mib / (g->ms / 1e3), c->ms, mib / (c->ms / 1e3));
	fflush(stdout);
}

static void row(const char *step, uint64_t bytes, struct cost g, double cpu_start)
{
	struct cost c = { .ms = now_ms() - cpu_start };

	print_row(step, bytes, &g, &c);
	total_bytes += bytes;
	total_gpu.faults += g.faults;
	total_gpu.windows += g.windows;
	total_gpu.invalidations += g.invalidations;
	total_gpu.retries += g.retries;
	total_gpu.ms += g.ms;
	total_cpu.ms += c.ms;
}

static void crc32_step(const char *step, const void *p, size_t length)
{
	static uint64_t result;
	struct cost cost;
	uint64_t expect;
	double start;

	cost = gpu_run(step, gpu_unary(DUMMY_GPU_OP_CRC32, &result, p, length));
	start = now_ms();
	expect = cpu_crc32(p, length);
	row(step, length, cost, start);
	compare("crc32", result, expect);
}

static void histogram_step(const char *step, const void *p, size_t length)
{
	static uint64_t result[GPU_BUCKETS], expect[GPU_BUCKETS];
	struct cost cost;
	char what[40];
	double start;
	size_t first;

	cost = gpu_run(step, gpu_unary(DUMMY_GPU_OP_HISTOGRAM, result, p, length));
	start = now_ms();
	cpu_histogram(expect, p, length);
	row(step, length, cost, start);
	first = cpu_differs(result, expect, sizeof(result)) / sizeof(*result);
	if (first < GPU_BUCKETS) {
		snprintf(what, sizeof(what), "count of byte value %zu", first);
		compare(what, result[first], expect[first]);
	}
}

static void add_step(const char *step, uint64_t *dst, const uint64_t *src,
		     const uint64_t *src2)
{
	struct cost cost;
	char what[40];
	double start;
	size_t first;

	cost = gpu_run(step, gpu_binary(DUMMY_GPU_OP_ADD, dst, src, src2, ARRAY_LENGTH));
	start = now_ms();
	for (first = 0; first < ELEMENTS; first++) {
		if (dst[first] != src[first] + src2[first])
			break;
	}
	row(step, 3 * ARRAY_LENGTH, cost, start);
	if (first < ELEMENTS) {
		snprintf(what, sizeof(what), "element %zu", first);
		compare(what, dst[first], src[first] + src2[first]);
	}
}

static void sum_step(const char *step, const uint64_t *p)
{
	static uint64_t result;
	struct cost cost;
	uint64_t expect;
	double start;

	cost = gpu_run(step, gpu_unary(DUMMY_GPU_OP_SUM, &result, p, ARRAY_LENGTH));
	start = now_ms();
	expect = cpu_sum(p, ARRAY_LENGTH);
	row(step, ARRAY_LENGTH, cost, start);
	compare("sum", result, expect);
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

	/* Nobody has touched c: its pages come into being for the GPU. */
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
}

static int usage(int status)
{
	fprintf(status ? stderr : stdout,
		"Usage: dummy_gpu_demo [-d DEVICE] FILE\n"
		"\n"
		"Lets the dummy GPU compute on the mapped FILE and on arrays of %lu MiB,\n"
		"through plain pointers, and compares with what the CPU computes.\n"
		"\n"
		"  -d DEVICE  the device, by default " GPU_DEVICE "\n"
		"  -h         this help\n"
		"\n"
		"Exit status: 0 if all results are equal, 1 if one differs, 2 if it cannot\n"
		"be run.\n", ARRAY_LENGTH / MIB);
	return status;
}

int main(int argc, char **argv)
{
	const char *device = GPU_DEVICE;
	struct dummy_gpu_info info;
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
	printf("%s: pages of %llu bytes, windows of up to %llu bytes; file %s\n\n", device,
	       (unsigned long long)info.page_size, (unsigned long long)info.window_size,
	       argv[optind]);

	before = stats_now();
	print_head();
	crc32_step("crc32 of the file", file, length);
	histogram_step("histogram of the file", file, length);
	array_steps();
	print_row("all", total_bytes, &total_gpu, &total_cpu);

	close(gpu);
	if (differences) {
		printf("\n%d differences.\n", differences);
		return 1;
	}
	printf("\nAll results of the GPU are those of the CPU.\n");
	return 0;
}
