// SPDX-License-Identifier: GPL-2.0
/*
 * Link this object into any static program, and the private memory of the
 * program moves to the dummy GPU and back all the time that it runs:
 *
 *   make -C tools/testing/selftests/mm OUTPUT=/tmp/mm \
 *	LDFLAGS="-static /path/to/dummy_gpu_mover.o" /tmp/mm/cow
 *
 * The program must behave as it does without the object, so the thread that
 * moves the memory leaves no trace in what a program can look at:
 *
 *  - It starts before main(), on a stack in .bss, and allocates nothing later.
 *  - Its files have high descriptors, which exec() closes.
 *  - It blocks all signals but the two that glibc keeps for itself.
 *  - It moves only pages that are populated. A prefetch of a hole would
 *    populate it, which mincore() or /proc/self/pagemap show. A range that is
 *    unmapped and mapped again between the look and the prefetch is populated
 *    all the same: a program that must not have that is out of reach.
 *  - Its own memory stays where it is.
 *
 * A file of the GPU is bound to the mm that opened it, and a thread does not
 * survive fork(). So a child of fork() opens files of its own and starts a
 * thread of its own before fork() returns; a child that cannot (for want of
 * descriptors, say) runs without. Children of vfork(), posix_spawn() and clone()
 * run without, and a program that is executed does what it is linked to do.
 *
 * DUMMY_GPU_MOVER="A,B" names two descriptors of eventfd(). The pages that have
 * moved to the GPU are added to A, those that have moved back on request to B,
 * by all processes that inherit them. A page that the CPU brings back with a
 * fault is not in B.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <time.h>
#include <unistd.h>

#include <linux/fs.h>

#include "dummy_gpu_user.h"
#include "kselftest.h"

/* Where the descriptors are: the soft limit is 1024 by default. */
enum { GPU = 1000, MAPS, PAGEMAP };

static struct {
	char stack[128 * 1024];
	struct page_region regions[64];
	uint64_t max_length;
	uint64_t moved[2];	/* by enum dummy_gpu_location */
	int report[2];
} mover;

static uint64_t now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * 1000000000ULL + ts.tv_nsec;
}

static void sleep_ns(uint64_t ns)
{
	struct timespec ts = {
		.tv_sec = ns / 1000000000,
		.tv_nsec = ns % 1000000000,
	};

	nanosleep(&ts, NULL);
}

/*
 * Moves the pages of a range that can move. Whether the file is still usable.
 */
static bool move(uint64_t start, uint64_t end, enum dummy_gpu_location location)
{
	while (start < end) {
		uint64_t length = end - start < mover.max_length ? end - start : mover.max_length;
		struct dummy_gpu_prefetch prefetch =
			gpu_prefetching((void *)start, length, location);
		int ret = gpu_prefetch(GPU, &prefetch);

		/* The program has closed the file. */
		if (ret == -EBADF || ret == -ENOTTY || ret == -EPERM)
			return false;
		if (prefetch.pages != GPU_UNTOUCHED)
			mover.moved[location] += prefetch.pages;
		/* Pages that cannot move now may move in the next round. */
		start += length;
	}
	return true;
}

/* Moves the populated anonymous pages of a range. */
static bool move_populated(uint64_t start, uint64_t end, enum dummy_gpu_location location)
{
	const uint64_t populated = PAGE_IS_PRESENT | PAGE_IS_SWAPPED;
	struct pm_scan_arg scan = {
		.size = sizeof(scan),
		.start = start,
		.end = end,
		.vec = gpu_addr(mover.regions),
		.vec_len = ARRAY_SIZE(mover.regions),
		.category_inverted = PAGE_IS_FILE,
		.category_mask = PAGE_IS_FILE,
		.category_anyof_mask = populated,
		.return_mask = populated,
	};
	int i, n;

	while (scan.start < end) {
		n = ioctl(PAGEMAP, PAGEMAP_SCAN, &scan);
		if (n < 0)
			break;
		for (i = 0; i < n; i++) {
			if (!move(mover.regions[i].start, mover.regions[i].end, location))
				return false;
		}
		scan.start = scan.walk_end;
	}
	return true;
}

/* Moves all private memory. */
static bool move_all(enum dummy_gpu_location location)
{
	const uint64_t page = sysconf(_SC_PAGESIZE);
	const uint64_t from = gpu_addr(&mover) & -page;
	const uint64_t to = (gpu_addr(&mover + 1) + page - 1) & -page;
	struct procmap_query vma = {
		.size = sizeof(vma),
		.query_flags = PROCMAP_QUERY_COVERING_OR_NEXT_VMA,
	};
	bool moves = true;

	while (moves && !ioctl(MAPS, PROCMAP_QUERY, &vma)) {
		vma.query_addr = vma.vma_end;
		if (vma.vma_flags & PROCMAP_QUERY_VMA_SHARED)
			continue;
		if (vma.vma_start <= from && to <= vma.vma_end)
			moves = move_populated(vma.vma_start, from, location) &&
				move_populated(to, vma.vma_end, location);
		else
			moves = move_populated(vma.vma_start, vma.vma_end, location);
	}
	if (mover.moved[location] && mover.report[location] >= 0 &&
	    write(mover.report[location], &mover.moved[location], sizeof(uint64_t)) > 0)
		mover.moved[location] = 0;
	return moves;
}

static void *run(void *arg)
{
	uint64_t start;

	/* Once each way at least, however soon the program ends. */
	if (!move_all(DUMMY_GPU_LOCATION_DEVICE) || !move_all(DUMMY_GPU_LOCATION_SYSTEM))
		return arg;
	do {
		start = now_ns();
		if (!move_all(DUMMY_GPU_LOCATION_DEVICE))
			break;
		/* If there is one CPU, most of the time is the program's. */
		sleep_ns(2 * (now_ns() - start) + 100 * 1000);
	} while (move_all(DUMMY_GPU_LOCATION_SYSTEM));
	return arg;
}

static bool open_as(int fd, const char *path, int flags)
{
	int low = open(path, flags | O_CLOEXEC);
	bool opened = low >= 0 && dup3(low, fd, O_CLOEXEC) == fd;

	if (low >= 0)
		close(low);
	return opened;
}

static bool start(void)
{
	struct sched_param param = { .sched_priority = 1 };
	struct dummy_gpu_info info;
	pthread_attr_t attr;
	sigset_t all, old;
	pthread_t thread;
	bool started;

	if (!open_as(GPU, GPU_DEVICE, O_RDWR) || gpu_info(GPU, &info) ||
	    !open_as(MAPS, "/proc/self/maps", O_RDONLY) ||
	    !open_as(PAGEMAP, "/proc/self/pagemap", O_RDONLY))
		return false;
	mover.max_length = info.max_length;
	memset(mover.moved, 0, sizeof(mover.moved));

	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	pthread_attr_init(&attr);
	pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
	pthread_attr_setstack(&attr, mover.stack, sizeof(mover.stack));
	/*
	 * Real-time priority: run when a pause is over, not when the program
	 * next sleeps.
	 */
	pthread_attr_setinheritsched(&attr, PTHREAD_EXPLICIT_SCHED);
	pthread_attr_setschedpolicy(&attr, SCHED_FIFO);
	pthread_attr_setschedparam(&attr, &param);
	started = !pthread_create(&thread, &attr, run, NULL);
	if (!started) {
		pthread_attr_setinheritsched(&attr, PTHREAD_INHERIT_SCHED);
		started = !pthread_create(&thread, &attr, run, NULL);
	}
	pthread_attr_destroy(&attr);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	return started;
}

static void start_in_child(void)
{
	int err = errno;

	start();
	errno = err;
}

static void __attribute__((constructor)) start_before_main(void)
{
	const char *report = getenv("DUMMY_GPU_MOVER");

	if (!report || sscanf(report, "%d,%d", &mover.report[DUMMY_GPU_LOCATION_DEVICE],
			      &mover.report[DUMMY_GPU_LOCATION_SYSTEM]) != 2)
		memset(mover.report, -1, sizeof(mover.report));
	if (!start() || pthread_atfork(NULL, NULL, start_in_child)) {
		perror("dummy_gpu_mover");
		_exit(KSFT_SKIP);
	}
}
