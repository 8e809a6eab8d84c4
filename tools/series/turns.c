// SPDX-License-Identifier: GPL-2.0
/*
 * Runs programs one after the other in one boot, each with a time limit.
 *
 *   turns SECONDS REPEAT TIMES NAME PROGRAM [ARGS..] [-- ..]..
 *
 * A program may take that many seconds. It runs again until it has had REPEAT seconds in all, at most TIMES. If
 * it is to be repeated (REPEAT is not 0) and fails, it runs three times.
 * The working directory is /tmp, there is some swap, and standard error is standard output. Before and after
 * each program there is a line on standard output:
 *   == NAME
 *   == exit N, == signal N or == timeout, and then how many pages dummy_gpu_mover has moved to the GPU and
 *   back, if the program is linked with it
 * The beginning is a line in the kernel's log too. What a program leaves behind is killed.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/swap.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define SWAP "/dev/ram0"
#define SWAP_PAGE 4096

static void note(const char *format, ...)
{
	int fd = open("/dev/kmsg", O_WRONLY | O_CLOEXEC);
	va_list args;

	va_start(args, format);
	if (fd >= 0)
		vdprintf(fd, format, args);
	va_end(args);
	close(fd);
}

/* What mkswap writes: version and last page after 1024 bytes, the signature at the end of the page. */
static void add_swap(void)
{
	static char page[SWAP_PAGE];
	uint32_t *header = (uint32_t *)(page + 1024);
	int fd = open(SWAP, O_WRONLY | O_CLOEXEC);
	off_t size = lseek(fd, 0, SEEK_END);

	header[0] = 1;
	header[1] = size / SWAP_PAGE - 1;
	memcpy(page + SWAP_PAGE - 10, "SWAPSPACE2", 10);
	if (fd < 0 || size < 2 * SWAP_PAGE || pwrite(fd, page, SWAP_PAGE, 0) != SWAP_PAGE || swapon(SWAP, 0)) {
		dprintf(2, "swap on %s: %s\n", SWAP, strerror(errno));
		exit(3);
	}
	close(fd);
}

static bool ended(pid_t child, int *status, double seconds)
{
	int i;

	for (i = 0; i < seconds * 100; i++) {
		if (waitpid(child, status, WNOHANG) == child)
			return true;
		usleep(10 * 1000);
	}
	return false;
}

/* Returns how long the program ran, and whether it failed. */
static double turn(char **argv, int seconds, bool *failed)
{
	int status = 0, to = eventfd(0, EFD_NONBLOCK), back = eventfd(0, EFD_NONBLOCK);
	const char *name = strrchr(argv[1], '/') ? strrchr(argv[1], '/') + 1 : argv[1];
	uint64_t pages[2] = { 0, 0 };
	char counters[32], end[32];
	struct timespec a, b;
	double took;
	pid_t child;

	dprintf(1, "== %s\n", argv[0]);
	note("== %s\n", argv[0]);
	snprintf(counters, sizeof(counters), "%d,%d", to, back);
	clock_gettime(CLOCK_MONOTONIC, &a);
	child = fork();
	if (!child) {
		setsid();
		setenv("DUMMY_GPU_MOVER", counters, 1);
		dup2(1, 2);
		/* A program that executes itself looks for it in the working directory. */
		unlink(name);
		if (!symlink(argv[1], name))
			execv(name, argv + 1);
		_exit(127);
	}
	if (child < 0) {
		snprintf(end, sizeof(end), "fork: %s", strerror(errno));
	} else if (!ended(child, &status, seconds)) {
		snprintf(end, sizeof(end), "timeout");
	} else if (WIFSIGNALED(status)) {
		snprintf(end, sizeof(end), "signal %d", WTERMSIG(status));
	} else {
		snprintf(end, sizeof(end), "exit %d", WEXITSTATUS(status));
	}
	clock_gettime(CLOCK_MONOTONIC, &b);
	/* Orphans come here, whatever group they have made. */
	if (child > 0)
		kill(-child, SIGKILL);
	while (waitpid(-1, NULL, WNOHANG) > 0)
		;
	ended(-1, &status, 0.05);
	if (read(to, &pages[0], sizeof(pages[0])) < 0 || read(back, &pages[1], sizeof(pages[1])) < 0)
		;
	took = b.tv_sec - a.tv_sec + (b.tv_nsec - a.tv_nsec) / 1e9;
	*failed = strcmp(end, "exit 0");
	dprintf(1, "\n== %s, %llu %llu pages, %.1f s\n", end, (unsigned long long)pages[0],
		(unsigned long long)pages[1], took);
	close(to);
	close(back);
	return took;
}

int main(int argc, char **argv)
{
	int i, n, repeat, start = 1;
	bool failed;
	double took;

	prctl(PR_SET_CHILD_SUBREAPER, 1);
	if (chdir("/tmp"))
		return 3;
	add_swap();
	for (i = start; i <= argc; i++) {
		if (i < argc && strcmp(argv[i], "--"))
			continue;
		argv[i] = NULL;
		if (i - start < 5) {
			dprintf(2, "turns: SECONDS REPEAT TIMES NAME PROGRAM [ARGS..] [-- ..]..\n");
			return 2;
		}
		took = 0;
		n = 0;
		repeat = atoi(argv[start + 1]);
		do
			took += turn(argv + start + 3, atoi(argv[start]), &failed);
		while (++n < atoi(argv[start + 2]) && (took < repeat || (repeat && failed && n < 3)));
		start = i + 1;
	}
	return 0;
}
