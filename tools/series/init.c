// SPDX-License-Identifier: GPL-2.0
/*
 * PID 1 of a boot: mounts, loads the module, runs one program, and says how it ended.
 *
 * The root is a directory of the host (hostfs in UML, 9p in QEMU). In it the harness leaves
 *   argv      the program and its arguments, the working directory first, each ended by a NUL
 *   modules/  the modules to load, with what is in MODULE_PARAMETERS, which has semicolons for
 *             spaces: the kernel hands that on from its command line
 * and reads afterwards
 *   status    "exit N" or "signal N", or "init ..." when this program itself failed
 *   kmemleak, lockdep_stats
 *             what these say at the end, of a kernel that has them
 *
 * Output is byte for byte: the first two consoles of the machine are files of the host and are put
 * into raw mode. The kernel's log goes elsewhere.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

static bool qemu;	/* Not UML. */

static void finish(const char *format, ...)
{
	FILE *f = fopen("/status.new", "w");
	va_list args;

	if (f) {
		va_start(args, format);
		vfprintf(f, format, args);
		va_end(args);
		if (!fclose(f))
			rename("/status.new", "/status");
	}
	tcdrain(1);
	tcdrain(2);
	sync();
	/* QEMU is told to end instead, and has nothing to switch off. */
	reboot(qemu ? RB_AUTOBOOT : RB_POWER_OFF);
	for (;;)
		pause();
}

static void mounted(const char *type, const char *where, unsigned long flags, const char *data)
{
	/* Only 9p has use for the name: it is that of the directory. */
	if (mount("host", where, type, flags, data) && errno != EBUSY)
		finish("init mount %s on %s: %s\n", type, where, strerror(errno));
}

static void console(const char *path, int fd)
{
	struct termios t;
	int c = open(path, O_RDWR | O_NOCTTY);

	if (c < 0 || dup2(c, fd) < 0)
		finish("init open %s: %s\n", path, strerror(errno));
	if (c != fd)
		close(c);
	tcgetattr(fd, &t);
	cfmakeraw(&t);
	tcsetattr(fd, TCSANOW, &t);
}

static void load_modules(void)
{
	char *parameters = strdup(getenv("MODULE_PARAMETERS") ?: ""), *c;
	struct dirent **names;
	char path[512];
	int i, fd, n = scandir("/modules", &names, NULL, alphasort);

	while ((c = strchr(parameters, ';')))
		*c = ' ';
	for (i = 0; i < n; i++) {
		if (names[i]->d_name[0] == '.')
			continue;
		snprintf(path, sizeof(path), "/modules/%s", names[i]->d_name);
		fd = open(path, O_RDONLY | O_CLOEXEC);
		if (fd < 0 || syscall(SYS_finit_module, fd, parameters, 0))
			finish("init load %s: %s\n", path, strerror(errno));
		close(fd);
	}
}

static void copy(const char *from, const char *to)
{
	char buf[4096];
	ssize_t n;
	int in = open(from, O_RDONLY), out = open(to, O_WRONLY | O_CREAT | O_TRUNC, 0644);

	while (in >= 0 && out >= 0 && (n = read(in, buf, sizeof(buf))) > 0)
		if (write(out, buf, n) != n)
			break;
	close(in);
	close(out);
}

/*
 * Objects younger than five seconds are not reported, nor those that have changed since the scan
 * before; modules are gone by then, so that what they have left behind is found too. The third
 * scan is for what the first two have found to be changing.
 */
static void look_for_leaks(void)
{
	const char *kmemleak = "/sys/kernel/debug/kmemleak";
	int i, fd = open(kmemleak, O_WRONLY | O_CLOEXEC);

	if (fd < 0)
		return;
	for (i = 0; i < 3; i++) {
		if (write(fd, "scan", 4) != 4) {
			/* kmemleak=off on the command line. */
			if (errno == EPERM)
				return;
			finish("init kmemleak: %s\n", strerror(errno));
		}
		sleep(i ? 0 : 6);
	}
	close(fd);
	copy(kmemleak, "/kmemleak");
}

static void unload_modules(void)
{
	struct dirent **names;
	int i, n = scandir("/modules", &names, NULL, alphasort);

	while (n-- > 0) {
		char *end = strstr(names[n]->d_name, ".ko");

		if (!end)
			continue;
		*end = 0;
		/* Busy: the program has left others behind that use it. */
		for (i = 0; i < 10; i++) {
			if (!syscall(SYS_delete_module, names[n]->d_name, O_NONBLOCK) || errno == ENOENT)
				break;
			if (errno != EWOULDBLOCK && errno != EBUSY)
				finish("init unload %s: %s\n", names[n]->d_name, strerror(errno));
			usleep(100 * 1000);
		}
	}
}

/* Lets the program call those of the host, which are linked dynamically. */
static void link_programs(void)
{
	static const char *const names[] = { "bin", "etc", "lib", "lib64", "sbin", "usr" };
	char from[20], to[20];
	unsigned int i;

	for (i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
		snprintf(from, sizeof(from), "/host/%s", names[i]);
		snprintf(to, sizeof(to), "/%s", names[i]);
		if (!access(from, F_OK) && symlink(from, to) && errno != EEXIST)
			finish("init link %s: %s\n", to, strerror(errno));
	}
}

int main(void)
{
	static char buf[65536], *argv[4096];
	int fd, n = 0, status;
	ssize_t size;
	char *p;
	pid_t child, pid;

	mounted("proc", "/proc", 0, NULL);
	mounted("sysfs", "/sys", 0, NULL);
	mounted("devtmpfs", "/dev", 0, NULL);
	mounted("tmpfs", "/tmp", 0, NULL);
	mounted("debugfs", "/sys/kernel/debug", 0, NULL);
	qemu = !access("/dev/hvc0", F_OK);
	if (qemu)
		mounted("9p", "/host", MS_RDONLY, "trans=virtio,version=9p2000.L,msize=512000,cache=loose");
	else
		mounted("hostfs", "/host", MS_RDONLY, "/");
	mkdir("/dev/shm", 0755);
	mounted("tmpfs", "/dev/shm", 0, NULL);

	fd = open("/dev/null", O_RDONLY);
	if (fd < 0 || dup2(fd, 0) < 0)
		finish("init open /dev/null: %s\n", strerror(errno));
	if (fd > 2)
		close(fd);
	console(qemu ? "/dev/hvc0" : "/dev/tty0", 1);
	console(qemu ? "/dev/hvc1" : "/dev/tty1", 2);

	fd = open("/argv", O_RDONLY | O_CLOEXEC);
	size = fd < 0 ? -1 : read(fd, buf, sizeof(buf) - 1);
	if (size <= 0)
		finish("init no argv\n");
	close(fd);
	for (p = buf; p < buf + size && n < 4095; p += strlen(p) + 1)
		argv[n++] = p;
	if (n < 2)
		finish("init no program\n");

	load_modules();
	if (getenv("HOST_PROGRAMS"))
		link_programs();

	child = fork();
	if (child < 0)
		finish("init fork: %s\n", strerror(errno));
	if (!child) {
		setsid();
		setenv("PATH", "/bin:/usr/bin:/sbin:/usr/sbin", 1);
		setenv("HOME", "/tmp", 1);
		setenv("TMPDIR", "/tmp", 1);
		if (chdir(argv[0]) && chdir("/"))
			_exit(127);
		execv(argv[1], argv + 1);
		dprintf(2, "%s: %s\n", argv[1], strerror(errno));
		_exit(errno == ENOENT ? 127 : 126);
	}
	do {
		pid = wait(&status);
	} while (pid != child);
	unload_modules();
	look_for_leaks();
	if (!access("/proc/lockdep_stats", R_OK))
		copy("/proc/lockdep_stats", "/lockdep_stats");

	if (WIFSIGNALED(status))
		finish("signal %d\n", WTERMSIG(status));
	finish("exit %d\n", WEXITSTATUS(status));
	return 0;
}
