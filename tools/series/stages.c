// SPDX-License-Identifier: GPL-2.0
/*
 * One driver after the other in one boot: loads a module, runs a program, unloads the module.
 *
 *   stages SECONDS MODULE[,PARAMETER] NODE PROGRAM [ARGS..] [-- MODULE NODE PROGRAM [ARGS..]]..
 *
 * The program does not run where there is no NODE. From a MODULE on that has a "-" before it the
 * kernel may warn. The beginning and the end of each stage is a line on standard output and one in
 * the kernel's log:
 *   == MODULE
 *   == exit N, == signal N, == timeout, == stuck, or == what went wrong
 * The status is 0 if all stages came to the end of their programs and unloaded their modules.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static void say(const char *format, ...)
{
	int size, fd = open("/dev/kmsg", O_WRONLY | O_CLOEXEC);
	char text[512] = "== ";
	va_list args;

	va_start(args, format);
	vsnprintf(text + 3, sizeof(text) - 4, format, args);
	va_end(args);
	size = strlen(strcat(text, "\n"));
	/* A write is a line of the kernel's log, if it is one write. */
	if (write(1, text, size) != size || write(fd, text, size) != size)
		exit(3);
	close(fd);
}

static void may_warn(void)
{
	int fd = open("/proc/sys/kernel/panic_on_warn", O_WRONLY | O_CLOEXEC);

	if (fd < 0 || write(fd, "0", 1) != 1)
		say("panic_on_warn: %s", strerror(errno));
	close(fd);
}

static bool load(const char *word)
{
	char *parameter, *path = strdup(word);
	bool loaded;
	int fd;

	parameter = path + strcspn(path, ",");
	if (*parameter)
		*parameter++ = 0;
	fd = open(path, O_RDONLY | O_CLOEXEC);
	loaded = fd >= 0 && !syscall(SYS_finit_module, fd, parameter, 0);
	free(path);

	if (!loaded)
		say("load: %s", strerror(errno));
	close(fd);
	return loaded;
}

/* Busy for ten seconds: somebody holds it who is not there. */
static bool unload(const char *name)
{
	int i;

	for (i = 0; i < 100; i++) {
		if (!syscall(SYS_delete_module, name, O_NONBLOCK))
			return true;
		if (errno != EWOULDBLOCK && errno != EBUSY)
			break;
		usleep(100 * 1000);
	}
	say("unload: %s", strerror(errno));
	return false;
}

/* Waits for the child; a signal, or that many seconds, is an end as well. */
static bool ended(pid_t child, int *status, int seconds)
{
	int i;

	for (i = 0; i < seconds * 20; i++) {
		if (waitpid(child, status, WNOHANG) == child)
			return true;
		usleep(50 * 1000);
	}
	return false;
}

/* Whether it came to its end; what cannot be killed is left behind. */
static bool run(char **argv, int seconds)
{
	int status;
	pid_t child = fork();

	if (!child) {
		execv(argv[0], argv);
		_exit(127);
	}
	if (child < 0) {
		say("fork: %s", strerror(errno));
		return false;
	}
	if (!ended(child, &status, seconds)) {
		kill(child, SIGKILL);
		say(ended(child, &status, 10) ? "timeout" : "stuck");
		return false;
	}
	if (WIFSIGNALED(status))
		say("signal %d", WTERMSIG(status));
	else
		say("exit %d", WEXITSTATUS(status));
	return WIFEXITED(status);
}

static bool stage(char **argv, int seconds)
{
	const char *path = argv[0] + (argv[0][0] == '-');
	const char *base = strrchr(path, '/') ? strrchr(path, '/') + 1 : path;
	char name[64];
	bool good;

	snprintf(name, sizeof(name), "%.*s", (int)strcspn(base, "."), base);
	say("%s", name);
	if (path != argv[0])
		may_warn();
	if (!load(path))
		return false;
	good = !access(argv[1], F_OK);
	if (good)
		good = run(argv + 2, seconds);
	else
		say("no %s", argv[1]);
	return unload(name) && good;
}

int main(int argc, char **argv)
{
	int i, start = 2, status = 0;

	for (i = start; i <= argc; i++) {
		if (i < argc && strcmp(argv[i], "--"))
			continue;
		argv[i] = NULL;
		if (i - start < 3) {
			fprintf(stderr, "stages: SECONDS MODULE NODE PROGRAM [ARGS..] [-- ..]\n");
			return 2;
		}
		if (!stage(argv + start, atoi(argv[1])))
			status = 1;
		start = i + 1;
	}
	return status;
}
