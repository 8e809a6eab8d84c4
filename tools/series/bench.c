// SPDX-License-Identifier: GPL-2.0
/*
 * What the ioctls of the HMM test driver cost, in instructions per page.
 *
 *   bench NODE [DUMMY_GPU]
 *
 * With a node of the dummy GPU, also what a page fault costs whose commands one task submits and waits for:
 * serviced by that task, and by a worker, with the wake-ups of both.
 *
 * Runs on a machine whose time stamp counter counts instructions (QEMU: -icount shift=0, one CPU),
 * and fails on any other. Prints a line for each row:
 *   figure INSTRUCTIONS ROW
 */
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <linux/dummy_gpu.h>
#include "test_hmm_uapi.h"

#define PAGE		4096UL
#define SIZE		(64UL << 20)
#define PAGES		(SIZE / PAGE)
/* Aligned to huge pages, each in a table of its own. */
#define MEMORY		(1UL << 32)
#define COPIED		(2UL << 32)

enum { COLD_READ, WARM_READ, TO_DEVICE, TO_RAM, CPU_READ, ROWS };

static const char * const names[ROWS] = {
	[COLD_READ] = "cold device read",
	[WARM_READ] = "warm device read",
	[TO_DEVICE] = "to device",
	[TO_RAM]    = "to RAM",
	[CPU_READ]  = "CPU read-back",
};

static int node;
static unsigned char *copied;	/* What the device has read. */

static void __attribute__((noreturn, format(printf, 1, 2))) fail(const char *format, ...)
{
	va_list args;

	va_start(args, format);
	vfprintf(stderr, format, args);
	va_end(args);
	fputc('\n', stderr);
	exit(1);
}

/* Loads and stores of before and after do not move: an emulator has no order but that of the program. */
static uint64_t now(void)
{
	uint32_t low, high;

	asm volatile("rdtsc" : "=a" (low), "=d" (high) :: "memory");
	return (uint64_t)high << 32 | low;
}

/* Two thousand instructions, which an interrupt hardly ever hits, must be two thousand. */
static void check_clock(void)
{
	uint64_t start = now(), count = 1000;

	asm volatile("1: dec %0\n\tjnz 1b" : "+r" (count));
	count = now() - start;
	if (count < 2000 || count > 2020)
		fail("2000 instructions are %llu by the time stamp counter", (unsigned long long)count);
}

/* The number of the page is in its first and its last word. */
static volatile uint64_t *word(void *memory, size_t page, size_t offset)
{
	return (void *)((char *)memory + page * PAGE + offset);
}

static void check_bytes(void *memory)
{
	size_t i;

	for (i = 0; i < PAGES; i++)
		if (*word(memory, i, 0) != i || *word(memory, i, PAGE - 8) != i)
			fail("the bytes of page %zu have changed", i);
}

static void *map(uintptr_t address, bool huge)
{
	void *memory = mmap((void *)address, SIZE, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);

	if (memory == MAP_FAILED)
		fail("mmap: %s", strerror(errno));
	if (madvise(memory, SIZE, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE))
		fail("madvise: %s", strerror(errno));
	return memory;
}

static void unmap(void *memory)
{
	if (munmap(memory, SIZE))
		fail("munmap: %s", strerror(errno));
}

/* Whether all of it is made of huge pages, by what the kernel says of the mapping. */
static bool is_huge(void *memory)
{
	FILE *file = fopen("/proc/self/smaps", "r");
	unsigned long start, kilobytes = 0;
	char line[512], dash;
	bool here = false;

	if (!file)
		fail("smaps: %s", strerror(errno));
	while (fgets(line, sizeof(line), file)) {
		if (sscanf(line, "%lx%c%*x", &start, &dash) == 2 && dash == '-')
			here = start == (uintptr_t)memory;
		else if (here && sscanf(line, "AnonHugePages: %lu", &kilobytes) == 1)
			break;
	}
	fclose(file);
	if (kilobytes && kilobytes != SIZE / 1024)
		fail("%lu kB of huge pages", kilobytes);
	return kilobytes;
}

/* Memory in RAM that the process has written. */
static void *populated(bool huge)
{
	void *memory = map(MEMORY, huge);
	size_t i;

	for (i = 0; i < PAGES; i++) {
		*word(memory, i, 0) = i;
		*word(memory, i, PAGE - 8) = i;
	}
	if (is_huge(memory) != huge)
		fail("the kernel gives %s pages", huge ? "small" : "huge");
	return memory;
}

static void command(unsigned long request, const char *name, void *memory)
{
	struct hmm_dmirror_cmd cmd = {
		.addr = (uintptr_t)memory,
		.ptr = (uintptr_t)copied,
		.npages = PAGES,
	};

	if (ioctl(node, request, &cmd))
		fail("%s: %s", name, strerror(errno));
}

/* That many instructions has the ioctl taken, for each page. */
#define TIMED(request, memory) ({				\
	uint64_t start = now();					\
								\
	command(request, #request, memory);			\
	(double)(now() - start) / PAGES;			\
})

static void check_place(void *memory, bool device)
{
	size_t i;

	command(HMM_DMIRROR_SNAPSHOT, "HMM_DMIRROR_SNAPSHOT", memory);
	for (i = 0; i < PAGES; i++)
		if (!(copied[i] & HMM_DMIRROR_PROT_DEV_PRIVATE_LOCAL) == device)
			fail("page %zu is not %s", i, device ? "on the device" : "in RAM");
}

static void device_reads(bool huge, double *figures)
{
	void *memory = populated(huge);

	figures[COLD_READ] = TIMED(HMM_DMIRROR_READ, memory);
	check_bytes(copied);
	memset(copied, 0, SIZE);
	figures[WARM_READ] = TIMED(HMM_DMIRROR_READ, memory);
	check_bytes(copied);
	unmap(memory);
}

static void migrations(bool huge, double *figures)
{
	void *memory = populated(huge);

	memset(copied, 0, SIZE);
	figures[TO_DEVICE] = TIMED(HMM_DMIRROR_MIGRATE_TO_DEV, memory);
	check_bytes(copied);
	check_place(memory, true);
	figures[TO_RAM] = TIMED(HMM_DMIRROR_MIGRATE_TO_SYS, memory);
	check_place(memory, false);
	check_bytes(memory);
	unmap(memory);
}

static void cpu_reads(bool huge, double *figures)
{
	void *memory = populated(huge);
	uint64_t start;
	size_t i;

	command(HMM_DMIRROR_MIGRATE_TO_DEV, "HMM_DMIRROR_MIGRATE_TO_DEV", memory);
	check_place(memory, true);
	start = now();
	for (i = 0; i < PAGES; i++)
		*word(memory, i, 0);
	figures[CPU_READ] = (double)(now() - start) / PAGES;
	check_place(memory, false);
	check_bytes(memory);
	unmap(memory);
}

static void bench(bool huge)
{
	double figures[ROWS];
	int row;

	/* Drivers keep what they allocate the first time, such as struct pages; that is not measured. */
	migrations(huge, figures);
	device_reads(huge, figures);
	migrations(huge, figures);
	cpu_reads(huge, figures);
	for (row = 0; row < ROWS; row++)
		printf("figure %.0f %s%s\n", figures[row], names[row], huge ? ", THP" : "");
	fflush(stdout);
}

/* One command for each page, which reads a word of it. */
static void faults(int gpu, bool by_worker)
{
	struct dummy_gpu_command command = { .opcode = DUMMY_GPU_OP_SUM, .length = 8 };
	struct dummy_gpu_submit submit = {
		.size = sizeof(submit), .flags = by_worker ? DUMMY_GPU_SUBMIT_ASYNC : 0,
		.commands = (uintptr_t)&command, .count = 1, .command_size = sizeof(command),
	};
	struct dummy_gpu_advise stay = {
		.size = sizeof(stay), .start = MEMORY, .length = SIZE, .policy = DUMMY_GPU_POLICY_NONE,
	};
	/* One in each table of the GPU, or the first fault would map the others too. */
	const size_t step = 2UL << 20, count = SIZE / step;
	void *memory = populated(false);
	uint64_t start, sum, taken = 0;
	size_t i;

	if (ioctl(gpu, DUMMY_GPU_IOC_ADVISE, &stay))
		fail("DUMMY_GPU_IOC_ADVISE: %s", strerror(errno));
	command.dst = (uintptr_t)&sum;
	for (i = 0; i < count; i++) {
		struct dummy_gpu_wait wait = { .size = sizeof(wait), .timeout = ~0ULL };

		command.src = MEMORY + i * step;
		start = now();
		if (ioctl(gpu, DUMMY_GPU_IOC_SUBMIT, &submit))
			fail("DUMMY_GPU_IOC_SUBMIT: %s", strerror(errno));
		wait.sequence = submit.sequence;
		if (by_worker && ioctl(gpu, DUMMY_GPU_IOC_WAIT, &wait))
			fail("DUMMY_GPU_IOC_WAIT: %s", strerror(errno));
		/* The first makes what all of them use. */
		taken += i ? now() - start : 0;
		if (sum != i * step / PAGE)
			fail("the sum of page %zu is %llu", i, (unsigned long long)sum);
	}
	printf("figure %.0f fault serviced by %s\n", (double)taken / (count - 1),
	       by_worker ? "a worker" : "the task");
	unmap(memory);
}

int main(int argc, char **argv)
{
	int gpu = argc == 3 ? open(argv[2], O_RDWR | O_CLOEXEC) : -1;

	if (argc != 2 && argc != 3)
		fail("bench NODE [DUMMY_GPU]");
	if (argc == 3 && gpu < 0)
		fail("%s: %s", argv[2], strerror(errno));
	node = open(argv[1], O_RDWR | O_CLOEXEC);
	if (node < 0)
		fail("%s: %s", argv[1], strerror(errno));
	check_clock();
	copied = map(COPIED, false);
	memset(copied, 0, SIZE);
	bench(false);
	bench(true);
	if (gpu >= 0) {
		faults(gpu, false);
		faults(gpu, true);
	}
	return 0;
}
