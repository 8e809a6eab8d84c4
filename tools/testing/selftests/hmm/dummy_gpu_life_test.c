// SPDX-License-Identifier: GPL-2.0
/*
 * Tests of the dummy GPU when other things change under it: processes that
 * exit, fork or change their memory, files that are closed, the module that is
 * removed, and other parts of the kernel that access pages on the device.
 *
 * Each scenario runs many times with different timing. Each time the CPU and
 * the device must see the right bytes, and at the end no page may be left on
 * the device.
 */
#include <linux/elf.h>
#include <linux/io_uring.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/uio.h>

#include "dummy_gpu_harness.h"

#define ROUNDS	rounds()

/*
 * The size of most memory: two and a half of the blocks of 16 pages that a CPU
 * fault migrates, or two huge pages.
 */
static size_t npages = 40;
static size_t huge;	/* the bytes of a huge page, if the tests are to use them */

/* The pages on both devices now, or less than 0. */
static int64_t device_pages(void)
{
	int64_t first = instance_pages_of(0), second = instance_pages_of(1);

	return first < 0 || second < 0 ? -1 : first + second;
}

static bool device_pages_become(int64_t pages)
{
	struct timespec tick = { .tv_nsec = 1000 * 1000 };

	for (int i = 0; i < 3000 && device_pages() != pages; i++)
		nanosleep(&tick, NULL);
	return device_pages() == pages;
}

/* The number at the start of a sysfs, procfs or cgroup file. */
static long long number_in(const char *path)
{
	FILE *f = fopen(path, "re");
	long long value = -1;

	if (f) {
		if (fscanf(f, "%lld", &value) != 1)
			value = -1;
		fclose(f);
	}
	return value;
}

/* A system-wide setting that a test changes and the teardown restores. */
struct setting {
	const char *path;
	char old[200];
};

static bool set(struct setting *setting, const char *path, const char *text)
{
	FILE *f = fopen(path, "re");
	bool ok = f && fgets(setting->old, sizeof(setting->old), f) && write_to(path, text);

	if (f)
		fclose(f);
	if (ok)
		setting->path = path;
	return ok;
}

FIXTURE(life)
{
	int fd;
	size_t size;
	uint64_t *result;
	size_t length;
	uint8_t *expect;	/* expected contents of the memory */
	uint8_t *copy;
	uint64_t seed;
	int64_t pages;		/* on the devices at the start */
	struct setting settings[3];
	const char *module;	/* its file, if it was unloaded */
	struct cgroups cgroups;
	pid_t grouped;		/* a child that is in a cgroup there */
};

#define LIFE	FIXTURE_DATA(life)

/*
 * A test that is killed on timeout does not restore its settings: give it more
 * time.
 */
#define TEST_F_SETS(name)	TEST_F_TIMEOUT(life, name, 30 + 5 * ROUNDS)

static int module_remove(void)
{
	return syscall(__NR_delete_module, "dummy_gpu", O_NONBLOCK) ? -errno : 0;
}

static int module_insert_with(const char *path, const char *options)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC), err;
	char all[200], *c;

	snprintf(all, sizeof(all), "%s %s", coherent() ?: "", options);
	while ((c = strchr(all, ';')))
		*c = ' ';
	err = syscall(__NR_finit_module, fd, all, 0) ? -errno : 0;
	close(fd);
	return err;
}

static int module_insert(const char *path, size_t size)
{
	char options[60];

	/* Of either kind of memory. */
	snprintf(options, sizeof(options), "vram_mb=%zu coherent_mb=%zu", size >> 20, size >> 20);
	return module_insert_with(path, options);
}

FIXTURE_SETUP(life)
{
	setup_vram(_metadata, &self->fd, &self->size, &self->result);
	if (self->fd < 0 || !self->size)
		return;
	if (wants_huge()) {
		if (!setup_huge(_metadata, &huge))
			return;
		npages = 2 * huge / page;
	}
	signal(SIGPIPE, SIG_IGN);
	self->length = npages * page;
	self->expect = malloc(self->length);
	self->copy = malloc(self->length);
	ASSERT_NE(NULL, self->expect);
	ASSERT_NE(NULL, self->copy);
	self->pages = device_pages();
}

static void cgroups_end(LIFE *self)
{
	char path[100];

	snprintf(path, sizeof(path), "%s/dummy_gpu_test/freezer.state", self->cgroups.dir);
	if (!access(path, W_OK))
		write_to(path, "THAWED");
	if (self->grouped) {
		kill(self->grouped, SIGKILL);
		waitpid(self->grouped, NULL, 0);
	}
	snprintf(path, sizeof(path), "%s/dummy_gpu_test", self->cgroups.dir);
	rmdir(path);
	cgroups_unmount(&self->cgroups);
}

/* Moves a child into a group. The teardown kills it if it is still there. */
static bool group_child(LIFE *self, const char *group, pid_t pid)
{
	char path[120], number[20];

	self->grouped = pid;
	snprintf(path, sizeof(path), "%s/cgroup.procs", group);
	snprintf(number, sizeof(number), "%d", pid);
	return write_to(path, number);
}

FIXTURE_TEARDOWN(life)
{
	if (self->cgroups.dir[0])
		cgroups_end(self);
	EXPECT_TRUE(device_pages_become(self->pages))
		TH_LOG("%lld pages on the devices, %lld at the start",
		       (long long)device_pages(), (long long)self->pages);
	munmap(self->result, page);
	free(self->expect);
	free(self->copy);
	close(self->fd);
	for (size_t i = 0; i < ARRAY_SIZE(self->settings); i++) {
		if (self->settings[i].path)
			EXPECT_TRUE(write_to(self->settings[i].path, self->settings[i].old));
	}
	if (self->module) {
		module_remove();
		EXPECT_EQ(0, module_insert(self->module, self->size));
	}
}

/* The ends of the two pipes to another process. */
struct other {
	pid_t pid;
	int in, out;
};

/* fork(), with pipes between the two. The child ends with its parent at the latest. */
static pid_t spawn(struct other *other)
{
	int down[2], up[2];
	pid_t pid;

	if (pipe2(down, O_CLOEXEC) || pipe2(up, O_CLOEXEC))
		return -errno;
	pid = fork();
	other->pid = pid;
	other->in = pid ? up[0] : down[0];
	other->out = pid ? down[1] : up[1];
	close(pid ? down[0] : up[0]);
	close(pid ? up[1] : down[1]);
	if (!pid)
		prctl(PR_SET_PDEATHSIG, SIGKILL);
	return pid;
}

static int tell(struct other *other)
{
	return token_send(other->out);
}

static int hear(struct other *other)
{
	return token_wait(other->in);
}

/* Waits for the end of a child, no longer than the harness lets the test run. */
static int ended(struct other *other)
{
	int status = -1;

	close(other->in);
	close(other->out);
	return waitpid(other->pid, &status, 0) == other->pid ? status : -1;
}

static bool was_killed(int status, int sig)
{
	return WIFSIGNALED(status) && WTERMSIG(status) == sig;
}

static void nap(uint64_t *seed, unsigned int most)
{
	usleep(cpu_random(seed) % most);
}

/* New memory with random contents, in device memory if a file is given. */
static uint8_t *map_random(int fd, uint8_t *expect, size_t length, uint64_t seed)
{
	const size_t pages = length / page;
	bool whole = huge && !(length % huge);
	uint8_t *p = whole ? map_huge(length, huge) : map(length, PROT_READ | PROT_WRITE);
	struct dummy_gpu_stats before, after;

	if (p == MAP_FAILED)
		return NULL;
	cpu_randomize(expect, length, seed);
	memcpy(p, expect, length);
	if (fd < 0)
		return p;
	if (gpu_stats(fd, &before) ||
	    prefetch_all(fd, p, length, DUMMY_GPU_LOCATION_DEVICE) != pages ||
	    gpu_stats(fd, &after))
		return NULL;
	/* They are large folios on the device as well. */
	return whole && after.large_to_device - before.large_to_device != pages ? NULL : p;
}

static int check_by_device(int fd, uint64_t *result, const void *p, const void *expect,
			   size_t length)
{
	int err = run(fd, gpu_unary(DUMMY_GPU_OP_CRC32, result, p, length));

	if (!err && *result != cpu_crc32(expect, length))
		err = -EILSEQ;
	return err;
}

/*
 * Whether the CPU and the device, in either order, see the expected contents.
 */
static int check(int fd, uint64_t *result, const void *p, const void *expect, size_t length,
		 bool device_first)
{
	int err = device_first ? check_by_device(fd, result, p, expect, length) : 0;

	if (!err && cpu_differs(p, expect, length) != length)
		err = -EBADMSG;
	if (!err && !device_first)
		err = check_by_device(fd, result, p, expect, length);
	return err;
}

#define EXPECT_SEEN(p, round)						\
	do {								\
		int __r = (round);					\
									\
		EXPECT_EQ(0, check(self->fd, self->result, p,		\
				   self->expect, self->length, __r & 1))	\
			TH_LOG("round %d", __r);			\
	} while (0)

/*
 * A process is killed at any time during its commands. The parent shares its
 * memory.
 */
TEST_F(life, killed_in_command)
{
	uint8_t *shared = mmap(NULL, self->length, PROT_READ | PROT_WRITE,
			       MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	struct other other;
	size_t n;

	ASSERT_NE(MAP_FAILED, shared);
	for (int round = 0; round < ROUNDS; round++) {
		uint8_t *p = map_random(self->fd, self->expect, self->length, round);
		pid_t pid;

		ASSERT_NE(NULL, p);
		memset(shared, 0xff, self->length);
		pid = spawn(&other);
		ASSERT_LE(0, pid);
		if (!pid) {
			int fd = gpu_open(GPU_DEVICE), err = fd < 0 ? fd : tell(&other);

			for (uint8_t value = 0; !err; value++) {
				err = run(fd, gpu_fill(shared, value, self->length));
				if (!err)
					err = run(fd, gpu_binary(DUMMY_GPU_OP_XOR, p, p, shared,
								 self->length));
			}
			_exit(1);
		}
		EXPECT_EQ(0, hear(&other));
		nap(&self->seed, 5000);
		ASSERT_EQ(0, kill(pid, SIGKILL));
		EXPECT_TRUE(was_killed(ended(&other), SIGKILL));

		/*
		 * The last command was cut short, and must not write any more.
		 */
		memcpy(self->copy, shared, self->length);
		n = cpu_unlike(self->copy, self->copy[0], self->length);
		EXPECT_EQ(self->length - n, cpu_unlike(self->copy + n, self->copy[0] - 1,
						       self->length - n));
		EXPECT_SEEN(p, round);
		EXPECT_EQ(self->length, cpu_differs(shared, self->copy, self->length));
		munmap(p, self->length);
		EXPECT_TRUE(device_pages_become(self->pages));
	}
	munmap(shared, self->length);
}

/* A child whose command waits forever for its last page. */
static int stuck_child(struct other *other, uint8_t *p, size_t length)
{
	struct server server = { .uffd = uffd_open(), .pipe = other->out };
	int fd = gpu_open(GPU_DEVICE);
	pthread_t thread;

	if (fd < 0 || server.uffd < 0 || uffd_register(server.uffd, p + length, page))
		return 1;
	if (pthread_create(&thread, NULL, serve_thread, &server))
		return 2;
	run(fd, gpu_fill(p, 1, length + page));
	return 3;
}

TEST_F(life, killed_in_fault)
{
	int uffd = uffd_open();
	struct other other;

	if (uffd < 0)
		SKIP(return, "no userfaultfd: %s", strerror(-uffd));
	close(uffd);
	for (int round = 0; round < ROUNDS; round++) {
		/* The page after it is one that nobody has touched. */
		uint8_t *space = map(self->length + page, PROT_READ | PROT_WRITE), *p;
		pid_t pid;

		p = map_random(-1, self->expect, self->length, round);
		ASSERT_NE(NULL, p);
		ASSERT_EQ(space, mremap(p, self->length, self->length,
					MREMAP_MAYMOVE | MREMAP_FIXED, space));
		p = space;
		ASSERT_EQ(npages, prefetch_all(self->fd, p, self->length,
					       DUMMY_GPU_LOCATION_DEVICE));
		pid = spawn(&other);
		ASSERT_LE(0, pid);
		if (!pid)
			_exit(stuck_child(&other, p, self->length));
		EXPECT_EQ(0, hear(&other));
		nap(&self->seed, 1000);
		ASSERT_EQ(0, kill(pid, SIGKILL));
		EXPECT_TRUE(was_killed(ended(&other), SIGKILL));
		EXPECT_SEEN(p, round);
		munmap(p, self->length + page);
		EXPECT_TRUE(device_pages_become(self->pages));
	}
}

/* A thread that runs the same command again and again. */
struct worker {
	int fd;
	struct dummy_gpu_command command;
	int allowed[2];			/* errors */
	pthread_t thread;
	bool stop;
	unsigned long attempts, failed;
	int err;
};

static void *worker_thread(void *arg)
{
	struct worker *w = arg;

	while (!w->err && !__atomic_load_n(&w->stop, __ATOMIC_ACQUIRE)) {
		int err = run(w->fd, w->command);

		if (err && (err == w->allowed[0] || err == w->allowed[1]))
			w->failed++;
		else if (err)
			w->err = err;
		if (w->command.opcode == DUMMY_GPU_OP_FILL)
			w->command.value = (w->command.value + 1) & 0xff;
		__atomic_add_fetch(&w->attempts, 1, __ATOMIC_RELEASE);
		sched_yield();
	}
	return NULL;
}

static unsigned long worker_attempts(struct worker *w)
{
	return __atomic_load_n(&w->attempts, __ATOMIC_ACQUIRE);
}

/* Waits until a command that starts after this call has ended. */
static bool worker_goes_on(struct worker *w)
{
	unsigned long start = worker_attempts(w);

	for (int i = 0; i < 20000 && worker_attempts(w) < start + 2; i++)
		usleep(i ? 100 : 0);
	return worker_attempts(w) >= start + 2;
}

static int worker_start(struct worker *w)
{
	return pthread_create(&w->thread, NULL, worker_thread, w);
}

static int worker_stop(struct worker *w)
{
	__atomic_store_n(&w->stop, true, __ATOMIC_RELEASE);
	return pthread_join(w->thread, NULL) ? -EIO : w->err;
}

TEST_F(life, exit)
{
	struct other other;
	int status;

	for (int round = 0; round < ROUNDS; round++) {
		uint8_t *p = map_random(self->fd, self->expect, self->length, round);
		pid_t pid;

		ASSERT_NE(NULL, p);
		pid = spawn(&other);
		ASSERT_LE(0, pid);
		if (!pid) {
			struct worker w = {
				.fd = gpu_open(GPU_DEVICE),
				.command = gpu_fill(p, 1, self->length / 2),
			};
			uint8_t *q = map_random(w.fd, self->copy, self->length, ~round);

			/*
			 * Some pages are shared with the parent; some rounds
			 * have a thread.
			 */
			if (!q || (round % 3 && run(w.fd, w.command)))
				_exit(1);
			if (round % 2 && worker_start(&w))
				_exit(2);
			nap(&self->seed, 100);
			if (round % 5)
				_exit(cpu_differs(q, self->copy, page) == page ? 0 : 3);
			raise(SIGTERM);
		}
		status = ended(&other);
		EXPECT_TRUE(round % 5 ? !status : was_killed(status, SIGTERM))
			TH_LOG("round %d: status %x", round, status);
		EXPECT_SEEN(p, round);
		munmap(p, self->length);
		EXPECT_TRUE(device_pages_become(self->pages));
	}
}

/*
 * Two processes with copies of the same memory, or with shared memory. They do
 * random actions, in turns or at the same time. Both derive the actions of each
 * other from the same seed, and so know the expected contents.
 */
#define SIDE_PAGES	24
#define SIDE_ACTIONS	24

struct side {
	int me;
	int fd[2];
	uint64_t *result;
	bool shared;
	uint8_t *p, *model;
	struct other other;
};

/*
 * Does the action of this seed in the model and, if it is this side's action,
 * in the memory.
 */
static int act(struct side *s, bool mine, size_t start, size_t length, uint64_t seed)
{
	uint64_t what = cpu_random(&seed), value = cpu_random(&seed) & 0xff;
	size_t at = cpu_random(&seed) % length, half = length / 2, first, pages;
	size_t n = 1 + cpu_random(&seed) % (length - at), from;
	uint8_t *p = s->p + start, *model = s->model + start;
	int fd = s->fd[what >> 32 & 1];
	int64_t moved;

	first = at & -page;
	pages = (at + n + page - 1 - first) & -page;
	switch (what % 8) {
	case 0:
		memset(model + at, value, n);
		if (mine)
			memset(p + at, value, n);
		return 0;
	case 1:
		memset(model + at, value, n);
		return mine ? run(fd, gpu_fill(p + at, value, n)) : 0;
	case 2:
		/* Copy from one half to the other. */
		at %= half;
		n = 1 + n % (half - at);
		from = value & 1 ? at + half : at;
		at = value & 1 ? at : at + half;
		memcpy(model + at, model + from, n);
		return mine ? run(fd, gpu_unary(DUMMY_GPU_OP_COPY, p + at, p + from, n)) : 0;
	case 3:
		return mine && cpu_differs(p + at, model + at, n) != n ? -EBADMSG : 0;
	case 4:
		return mine ? check_by_device(fd, s->result, p + at, model + at, n) : 0;
	case 5:
		if (!s->shared)
			memset(model + first, 0, pages);
		return mine && madvise(p + first, pages, MADV_DONTNEED) ? -errno : 0;
	default:
		if (!mine)
			return 0;
		moved = prefetch_all(fd, p + first, pages, what % 8 == 6 ?
				     DUMMY_GPU_LOCATION_DEVICE : DUMMY_GPU_LOCATION_SYSTEM);
		return moved < 0 ? moved : 0;
	}
}

static int play(struct side *s, unsigned int round)
{
	const size_t length = SIDE_PAGES * page;
	bool turns = round & 1, parts = s->shared && !turns;
	int err = 0;

	for (unsigned int i = 0; i < SIDE_ACTIONS && !err; i++) {
		uint64_t seed = (uint64_t)round << 32 | i;
		int who = turns ? cpu_random(&seed) & 1 : i & 1;

		/*
		 * If they run at the same time, each writes to its half of
		 * shared memory.
		 */
		if (who == s->me || s->shared)
			err = act(s, who == s->me, parts ? who * length / 2 : 0,
				  parts ? length / 2 : length, seed);
		if (!err && turns)
			err = who == s->me ? tell(&s->other) : hear(&s->other);
	}
	if (!err)
		err = tell(&s->other);
	if (!err)
		err = hear(&s->other);
	if (!err)
		err = check(s->fd[round >> 2 & 1], s->result, s->p, s->model, length, round & 2);
	return err;
}

static void any_order(struct __test_metadata *_metadata, LIFE *self,
		      bool shared, bool two_devices)
{
	const size_t length = SIDE_PAGES * page;
	int second = two_devices ? gpu_open(GPU_DEVICE_2) : self->fd;

	if (second == -ENOENT)
		SKIP(return, "no " GPU_DEVICE_2);
	ASSERT_LE(0, second);
	for (int round = 0; round < ROUNDS; round++) {
		struct side s = {
			.fd = { self->fd, second },
			.result = self->result,
			.shared = shared,
			.model = malloc(length),
		};
		int err;
		pid_t pid;

		ASSERT_NE(NULL, s.model);
		s.p = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_ANONYMOUS |
			   (s.shared ? MAP_SHARED : MAP_PRIVATE), -1, 0);
		ASSERT_NE(MAP_FAILED, s.p);
		cpu_randomize(s.model, length, ~round);
		memcpy(s.p, s.model, length);
		ASSERT_LE(0, prefetch_all(self->fd, s.p, length, DUMMY_GPU_LOCATION_DEVICE));
		if (!s.shared)
			ASSERT_EQ(SIDE_PAGES, stats_of(_metadata, self->fd).device_pages);
		pid = spawn(&s.other);
		ASSERT_LE(0, pid);
		if (!pid) {
			s.me = 1;
			s.result++;
			s.fd[0] = gpu_open(two_devices ? GPU_DEVICE_2 : GPU_DEVICE);
			s.fd[1] = two_devices ? gpu_open(GPU_DEVICE) : s.fd[0];
			_exit(s.fd[0] < 0 || s.fd[1] < 0 ? 255 : -play(&s, round));
		}
		err = play(&s, round);
		ASSERT_EQ(0, ended(&s.other)) TH_LOG("round %d, and here %d", round, err);
		ASSERT_EQ(0, err) TH_LOG("round %d", round);
		munmap(s.p, length);
		free(s.model);
	}
	if (two_devices)
		close(second);
}

TEST_F(life, fork)
{
	any_order(_metadata, self, false, false);
}

TEST_F(life, fork_two_devices)
{
	any_order(_metadata, self, false, true);
}

TEST_F(life, shared_two_devices)
{
	any_order(_metadata, self, true, true);
}

/*
 * The offset of the first byte that is in neither of the two arrays, or length.
 */
static size_t neither(const uint8_t *p, const uint8_t *a, const uint8_t *b, size_t length)
{
	size_t i;

	for (i = 0; i < length; i++) {
		uint8_t value = cpu_load(p + i);

		if (value != a[i] && value != b[i])
			break;
	}
	return i;
}

/* Starts a worker that copies to new memory, which holds zeroes at first. */
static uint8_t *start_copying(struct __test_metadata *_metadata, LIFE *self,
			      struct worker *w, uint8_t **src)
{
	uint8_t *p = map(self->length, PROT_READ | PROT_WRITE);

	*src = map_random(self->fd, self->expect, self->length, 4711);
	ASSERT_NE(NULL, *src);
	ASSERT_NE(MAP_FAILED, p);
	w->fd = self->fd;
	w->command = gpu_unary(DUMMY_GPU_OP_COPY, p, *src, self->length);
	memset(self->copy, 0, self->length);
	ASSERT_EQ(0, worker_start(w));
	return p;
}

/*
 * Ends the worker, and copies once more: the memory must have the bytes of the
 * source.
 */
static void end_copying(struct __test_metadata *_metadata, LIFE *self,
			struct worker *w, uint8_t *p, uint8_t *src)
{
	EXPECT_EQ(0, worker_stop(w));
	EXPECT_EQ(0, run(w->fd, w->command));
	EXPECT_SEEN(p, 0);
	EXPECT_SEEN(src, 1);
	EXPECT_LT(w->failed, w->attempts);
	munmap(p, self->length);
	munmap(src, self->length);
}

/* A random range of pages of the test's memory. */
static size_t any_pages(uint64_t *seed, size_t *first)
{
	*first = cpu_random(seed) % npages * page;
	return (1 + cpu_random(seed) % (npages - *first / page)) * page;
}

TEST_F(life, munmap_under_command)
{
	struct worker w = { .allowed = { -EFAULT } };
	uint8_t *src, *p = start_copying(_metadata, self, &w, &src);
	size_t first, n;

	for (int round = 0; round < ROUNDS; round++) {
		n = any_pages(&self->seed, &first);
		nap(&self->seed, 3000);
		ASSERT_EQ(0, munmap(p + first, n));
		if (round & 1)
			EXPECT_TRUE(worker_goes_on(&w));
		ASSERT_EQ(p + first, map_at(p + first, n));
		EXPECT_EQ(n, neither(p + first, self->copy, self->expect + first, n));
		nap(&self->seed, 2000);
		EXPECT_EQ(self->length, neither(p, self->copy, self->expect, self->length));
	}
	EXPECT_LT(0, w.failed);
	end_copying(_metadata, self, &w, p, src);
}

TEST_F(life, discard_under_command)
{
	struct worker w = { };
	uint8_t *src, *p = start_copying(_metadata, self, &w, &src);
	size_t first, n;

	for (int round = 0; round < ROUNDS; round++) {
		n = any_pages(&self->seed, &first);
		nap(&self->seed, 3000);
		ASSERT_EQ(0, madvise(p + first, n, MADV_DONTNEED));
		EXPECT_EQ(n, neither(p + first, self->copy, self->expect + first, n));
		if (round & 1)
			EXPECT_EQ(self->length, cpu_differs(src, self->expect, self->length));
		nap(&self->seed, 2000);
		EXPECT_EQ(self->length, neither(p, self->copy, self->expect, self->length));
	}
	end_copying(_metadata, self, &w, p, src);
}

/* A command must not reach memory that mremap() has moved away. */
TEST_F(life, mremap_under_command)
{
	struct worker w = { .allowed = { -EFAULT } };
	uint8_t *src, *p = start_copying(_metadata, self, &w, &src);
	uint8_t *q = map(self->length, PROT_NONE), *now = malloc(self->length);

	ASSERT_NE(MAP_FAILED, q);
	ASSERT_NE(NULL, now);
	for (int round = 0; round < ROUNDS; round++) {
		nap(&self->seed, 3000);
		ASSERT_EQ(q, mremap(p, self->length, self->length,
				    MREMAP_MAYMOVE | MREMAP_FIXED, q));
		memcpy(now, q, self->length);
		EXPECT_EQ(self->length, neither(now, self->copy, self->expect, self->length));
		EXPECT_TRUE(worker_goes_on(&w));
		EXPECT_EQ(0, check(self->fd, self->result, q, now, self->length, round & 1));

		/* The memory comes back with other contents. */
		cpu_randomize(self->copy, self->length, round);
		memcpy(q, self->copy, self->length);
		if (round & 2) {
			ssize_t moved = prefetch_all(self->fd, q, self->length,
						     DUMMY_GPU_LOCATION_DEVICE);

			/* If the CPU could write there, all may be there still. */
			EXPECT_LE(coherent() ? 0 : 1, moved);
		}
		ASSERT_EQ(p, mremap(q, self->length, self->length,
				    MREMAP_MAYMOVE | MREMAP_FIXED, p));
	}
	EXPECT_LT(0, w.failed);
	end_copying(_metadata, self, &w, p, src);
	munmap(q, self->length);
	free(now);
}

/* A command must not change read-only memory. */
TEST_F(life, mprotect_under_command)
{
	struct worker w = { .allowed = { -EPERM, -EFAULT } };
	uint8_t *src, *p = start_copying(_metadata, self, &w, &src), *now = malloc(self->length);
	size_t first, n;

	ASSERT_NE(NULL, now);
	for (int round = 0; round < ROUNDS; round++) {
		n = any_pages(&self->seed, &first);
		nap(&self->seed, 3000);
		ASSERT_EQ(0, mprotect(p + first, n, PROT_READ));
		memcpy(now, p + first, n);
		EXPECT_EQ(n, neither(now, self->copy + first, self->expect + first, n));
		if (round & 1)
			EXPECT_EQ(0, mprotect(p + first, n, PROT_NONE));
		EXPECT_TRUE(worker_goes_on(&w));
		if (round & 1)
			EXPECT_EQ(0, mprotect(p + first, n, PROT_READ));
		EXPECT_EQ(0, check(self->fd, self->result, p + first, now, n, round & 2));

		ASSERT_EQ(0, mprotect(p + first, n, PROT_READ | PROT_WRITE));
		cpu_randomize(now, n, round);
		memcpy(self->copy + first, now, n);
		memcpy(p + first, now, n);
	}
	EXPECT_LT(0, w.failed);
	end_copying(_metadata, self, &w, p, src);
	free(now);
}

/*
 * A child has the contents at the time of fork(). The command does not change
 * them.
 */
TEST_F(life, fork_under_command)
{
	uint8_t *p = map_random(self->fd, self->expect, self->length, 1);
	struct worker w = { .fd = self->fd, .command = gpu_fill(p, 0, self->length) };
	struct other other;

	ASSERT_NE(NULL, p);
	ASSERT_EQ(0, worker_start(&w));
	for (int round = 0; round < ROUNDS; round++) {
		pid_t pid;

		nap(&self->seed, 3000);
		pid = spawn(&other);
		ASSERT_LE(0, pid);
		if (!pid) {
			int fd = gpu_open(GPU_DEVICE);

			memcpy(self->copy, p, self->length);
			if (fd < 0 || tell(&other) || hear(&other))
				_exit(255);
			_exit(-check(fd, self->result, p, self->copy, self->length, round & 1));
		}
		EXPECT_EQ(0, hear(&other));
		EXPECT_TRUE(worker_goes_on(&w));
		EXPECT_EQ(0, tell(&other));
		ASSERT_EQ(0, ended(&other)) TH_LOG("round %d", round);
	}
	EXPECT_EQ(0, worker_stop(&w));
	EXPECT_EQ(self->length, cpu_unlike(p, w.command.value - 1, self->length));
	munmap(p, self->length);
}

/*
 * Pages stay on the device when the file is closed, by this process or by a
 * child.
 */
TEST_F(life, file_closed)
{
	struct other other;
	int err;

	close(self->fd);
	for (int round = 0; round < ROUNDS; round++) {
		pid_t pid = spawn(&other);
		uint8_t *p;

		ASSERT_LE(0, pid);
		self->fd = gpu_open(GPU_DEVICE);
		p = map_random(self->fd, self->expect, self->length, pid ? round : ~round);
		if (!pid) {
			if (!p || tell(&other) || hear(&other))
				_exit(1);
			/*
			 * The child keeps its file, opens another, or checks by
			 * the CPU only.
			 */
			if (round & 1)
				close(self->fd);
			if (round & 2)
				self->fd = gpu_open(GPU_DEVICE);
			err = tell(&other) || hear(&other) ? -EPIPE : 0;
			if (!err && (round & 3) == 1)
				err = cpu_differs(p, self->expect, self->length) != self->length;
			else if (!err)
				err = check(self->fd, self->result, p, self->expect, self->length,
					    round & 4);
			_exit(err ? 2 : 0);
		}
		ASSERT_NE(NULL, p);
		EXPECT_EQ(0, hear(&other));
		EXPECT_EQ(0, close(self->fd));
		EXPECT_EQ(0, tell(&other));
		EXPECT_EQ(0, hear(&other));
		if (self->pages >= 0)
			EXPECT_EQ(self->pages + 2 * npages, device_pages());
		if (round & 8)
			EXPECT_EQ(self->length, cpu_differs(p, self->expect, self->length));
		EXPECT_EQ(0, tell(&other));
		EXPECT_EQ(0, ended(&other)) TH_LOG("round %d", round);
		self->fd = gpu_open(GPU_DEVICE);
		EXPECT_SEEN(p, round);
		close(self->fd);
		munmap(p, self->length);
		EXPECT_TRUE(device_pages_become(self->pages));
	}
	self->fd = -1;
}

/* A process that has p mapped, but did not open the file, cannot use it. */
static int refused(int fd, uint8_t *p)
{
	struct dummy_gpu_prefetch prefetch = gpu_prefetching(p, page, DUMMY_GPU_LOCATION_SYSTEM);

	if (run(fd, gpu_fill(p, 0x77, page)) != -EPERM)
		return 1;
	return gpu_prefetch(fd, &prefetch) == -EPERM ? 0 : 2;
}

TEST_F(life, file_passed_on)
{
	int *passed = (int *)(self->result + 8);
	struct other other;

	for (int round = 0; round < ROUNDS; round++) {
		uint8_t *p = map_random(self->fd, self->expect, self->length, round);
		int fd, pidfd;
		pid_t pid;

		ASSERT_NE(NULL, p);
		pid = spawn(&other);
		ASSERT_LE(0, pid);
		if (!pid) {
			uint8_t *q = map_random(-1, self->copy, self->length, ~round);
			struct other third;

			fd = gpu_open(GPU_DEVICE);
			*passed = fd;
			if (fd < 0 || !q || run(fd, gpu_binary(DUMMY_GPU_OP_XOR, q, q, p, page)))
				_exit(1);
			for (size_t i = 0; i < page; i++)
				self->copy[i] ^= self->expect[i];
			/*
			 * A grandchild inherits the file and copies of the
			 * pages.
			 */
			if (!spawn(&third))
				_exit(refused(fd, q) ||
				      cpu_differs(q, self->copy, self->length) != self->length);
			if (tell(&other) || hear(&other) || ended(&third))
				_exit(2);
			_exit(-check(fd, self->result, q, self->copy, self->length, round & 1));
		}
		EXPECT_EQ(0, hear(&other));
		pidfd = syscall(__NR_pidfd_open, pid, 0);
		fd = pidfd < 0 ? -1 : syscall(__NR_pidfd_getfd, pidfd, *passed, 0);
		if (fd < 0) {
			kill(pid, SIGKILL);
			ended(&other);
			munmap(p, self->length);
			SKIP(return, "no pidfd_getfd: %s", strerror(errno));
		}
		EXPECT_EQ(0, refused(fd, p));
		EXPECT_EQ(0, tell(&other));
		EXPECT_EQ(0, ended(&other)) TH_LOG("round %d", round);
		/*
		 * The opener has exited. Its pages are freed although the file
		 * is still open.
		 */
		if (self->pages >= 0)
			EXPECT_GE(self->pages + npages, device_pages());
		EXPECT_EQ(0, refused(fd, p));
		EXPECT_SEEN(p, round);
		munmap(p, self->length);
		EXPECT_TRUE(device_pages_become(self->pages));
		close(fd);
		close(pidfd);
	}
}

/*
 * Direct I/O migrates the pages to system memory, and transfers their contents.
 */
TEST_F(life, direct_io)
{
	int disk = open("/dev/ram0", O_RDWR | O_DIRECT | O_EXCL | O_CLOEXEC);
	uint8_t *before = map(self->length, PROT_READ | PROT_WRITE);

	if (disk < 0)
		SKIP(return, "/dev/ram0: %s", strerror(errno));
	ASSERT_NE(MAP_FAILED, before);
	ASSERT_EQ(self->length, pread(disk, before, self->length, 0));
	for (int round = 0; round < ROUNDS; round++) {
		uint8_t *p = map_random(self->fd, self->expect, self->length, round);
		size_t first, n = any_pages(&self->seed, &first), to = self->length - n - first;

		ASSERT_NE(NULL, p);
		EXPECT_EQ(n, pwrite(disk, p + first, n, 0));
		EXPECT_LE(0, prefetch_all(self->fd, p, self->length, DUMMY_GPU_LOCATION_DEVICE));
		/* To another place. */
		EXPECT_EQ(n, pread(disk, p + to, n, 0));
		memmove(self->expect + to, self->expect + first, n);
		EXPECT_SEEN(p, round);
		munmap(p, self->length);
	}
	EXPECT_EQ(self->length, pwrite(disk, before, self->length, 0));
	close(disk);
}

/* Reads or writes a word of another process. */
static bool access_word(pid_t pid, bool by_ptrace, void *there, uint64_t *word, bool write)
{
	struct iovec local = { word, sizeof(*word) }, remote = { there, sizeof(*word) };

	if (!by_ptrace)
		return (write ? process_vm_writev(pid, &local, 1, &remote, 1, 0) :
				process_vm_readv(pid, &local, 1, &remote, 1, 0)) == sizeof(*word);
	if (write)
		return !ptrace(PTRACE_POKEDATA, pid, there, *word);
	errno = 0;
	*word = ptrace(PTRACE_PEEKDATA, pid, there, NULL);
	return !errno;
}

/* The child fills its memory; its parent looks at a word of each page and adds one. */
static int accessed_child(LIFE *self, struct other *other, uint8_t *p)
{
	int fd = gpu_open(GPU_DEVICE), err = fd < 0 ? fd : 0;

	for (int round = 0; round < ROUNDS && !err; round++) {
		cpu_randomize(self->expect, self->length, round);
		memcpy(p, self->expect, self->length);
		/* If the CPU could write there, they are there still. */
		err = prefetch_all(fd, p, self->length, DUMMY_GPU_LOCATION_DEVICE) !=
		      (coherent() && round ? 0 : npages);
		if (!err)
			err = tell(other) || hear(other);
		for (size_t at = round * 8; at < self->length; at += page)
			++*(uint64_t *)(self->expect + at);
		if (!err)
			err = check(fd, self->result, p, self->expect, self->length, round & 1);
	}
	return err ? 1 : 0;
}

static void access_other(struct __test_metadata *_metadata, LIFE *self,
			 bool by_ptrace)
{
	uint8_t *p = map(self->length, PROT_READ | PROT_WRITE);
	struct other other;
	uint64_t word;
	int status;
	pid_t pid;

	ASSERT_NE(MAP_FAILED, p);
	pid = spawn(&other);
	ASSERT_LE(0, pid);
	if (!pid)
		_exit(accessed_child(self, &other, p));
	for (int round = 0; round < ROUNDS; round++) {
		ASSERT_EQ(0, hear(&other)) TH_LOG("round %d", round);
		cpu_randomize(self->expect, self->length, round);
		if (by_ptrace) {
			ASSERT_EQ(0, ptrace(PTRACE_ATTACH, pid, NULL, NULL));
			ASSERT_EQ(pid, waitpid(pid, &status, 0));
		}
		for (size_t at = round * 8; at < self->length; at += page) {
			EXPECT_TRUE(access_word(pid, by_ptrace, p + at, &word, false));
			EXPECT_EQ(*(uint64_t *)(self->expect + at), word);
			word++;
			EXPECT_TRUE(access_word(pid, by_ptrace, p + at, &word, true));
		}
		if (by_ptrace)
			ASSERT_EQ(0, ptrace(PTRACE_DETACH, pid, NULL, NULL));
		ASSERT_EQ(0, tell(&other));
	}
	EXPECT_EQ(0, ended(&other));
	munmap(p, self->length);
}

TEST_F(life, ptrace)
{
	access_other(_metadata, self, true);
}

TEST_F(life, process_vm)
{
	uint64_t word;

	if (!access_word(getpid(), false, self->result, &word, false))
		SKIP(return, "process_vm_readv: %s", strerror(errno));
	access_other(_metadata, self, false);
}

/* An io_uring for one request at a time. */
struct uring {
	int fd;
	struct io_uring_params params;
	uint8_t *ring;
	struct io_uring_sqe *sqe;
};

static int uring_open(struct uring *u)
{
	const int prot = PROT_READ | PROT_WRITE, flags = MAP_SHARED | MAP_POPULATE;

	memset(u, 0, sizeof(*u));
	u->fd = syscall(__NR_io_uring_setup, 1, &u->params);
	if (u->fd < 0)
		return -errno;
	u->ring = mmap(NULL, page, prot, flags, u->fd, IORING_OFF_SQ_RING);
	u->sqe = mmap(NULL, page, prot, flags, u->fd, IORING_OFF_SQES);
	return u->ring == MAP_FAILED || (void *)u->sqe == MAP_FAILED ? -errno : 0;
}

/* Reads or writes a file from its start on, from or to a part of the registered buffer. */
static int uring_transfer(struct uring *u, int opcode, int file, void *p, size_t length)
{
	uint32_t *tail = (uint32_t *)(u->ring + u->params.sq_off.tail);
	uint32_t *head = (uint32_t *)(u->ring + u->params.cq_off.head);
	uint32_t mask = u->params.cq_entries - 1;
	struct io_uring_cqe *cqe;
	int res;

	*u->sqe = (struct io_uring_sqe) {
		.opcode = opcode,
		.fd = file,
		.addr = gpu_addr(p),
		.len = length,
	};
	*(uint32_t *)(u->ring + u->params.sq_off.array) = 0;
	__atomic_store_n(tail, *tail + 1, __ATOMIC_RELEASE);
	if (syscall(__NR_io_uring_enter, u->fd, 1, 1, IORING_ENTER_GETEVENTS, NULL, 0) != 1)
		return -errno;
	cqe = (struct io_uring_cqe *)(u->ring + u->params.cq_off.cqes) + (*head & mask);
	res = cqe->res;
	__atomic_store_n(head, *head + 1, __ATOMIC_RELEASE);
	return res;
}

/*
 * Pages that are pinned migrate to system memory and stay. Device writes reach
 * them.
 */
TEST_F(life, pinned_for_long)
{
	int file = temporary_file(self->length), err;
	struct uring u;

	err = uring_open(&u);
	if (err)
		SKIP(return, "no io_uring: %s", strerror(-err));
	ASSERT_LE(0, file);
	for (int round = 0; round < ROUNDS; round++) {
		uint8_t *p = map_random(self->fd, self->expect, self->length, round);
		size_t first, n = any_pages(&self->seed, &first);
		struct iovec buffer = { p + first, n };

		ASSERT_NE(NULL, p);
		ASSERT_EQ(0, syscall(__NR_io_uring_register, u.fd, IORING_REGISTER_BUFFERS,
				     &buffer, 1)) TH_LOG("%s", strerror(errno));
		EXPECT_EQ(0, prefetch_all(self->fd, p + first, n, DUMMY_GPU_LOCATION_DEVICE));
		EXPECT_LE(0, prefetch_all(self->fd, p, self->length, DUMMY_GPU_LOCATION_DEVICE));
		/* All pages of a folio stay, if one is pinned. */
		EXPECT_GE(npages - n / page, stats_of(_metadata, self->fd).device_pages);
		if (!huge)
			EXPECT_EQ(npages - n / page, stats_of(_metadata, self->fd).device_pages);
		EXPECT_SEEN(p, round);

		/*
		 * What the device writes reaches the file through io_uring, and
		 * vice versa.
		 */
		EXPECT_EQ(0, run(self->fd, gpu_fill(p, round, self->length)));
		EXPECT_EQ(n, uring_transfer(&u, IORING_OP_WRITE_FIXED, file, p + first, n));
		EXPECT_EQ(n, pread(file, self->copy, n, 0));
		EXPECT_EQ(n, cpu_unlike(self->copy, round, n));
		cpu_randomize(self->copy, n, ~round);
		EXPECT_EQ(n, pwrite(file, self->copy, n, 0));
		EXPECT_EQ(n, uring_transfer(&u, IORING_OP_READ_FIXED, file, p + first, n));
		memset(self->expect, round, self->length);
		memcpy(self->expect + first, self->copy, n);
		EXPECT_SEEN(p, round);

		ASSERT_EQ(0, syscall(__NR_io_uring_register, u.fd, IORING_UNREGISTER_BUFFERS,
				     NULL, 0));
		for (int i = 0; i < 1000; i++) {
			if (stats_of(_metadata, self->fd).device_pages == npages)
				break;
			EXPECT_LE(0, prefetch_all(self->fd, p, self->length,
						  DUMMY_GPU_LOCATION_DEVICE));
			usleep(i ? 1000 : 0);
		}
		EXPECT_EQ(npages, stats_of(_metadata, self->fd).device_pages);
		EXPECT_SEEN(p, round);
		munmap(p, self->length);
	}
	close(u.fd);
	munmap(u.ring, page);
	munmap(u.sqe, page);
	close(file);
}

/* Whether the core dump in a file has these bytes at an address. */
static bool core_has(int file, uint64_t address, const void *expect, void *copy, size_t length)
{
	struct elf64_hdr ehdr;
	struct elf64_phdr phdr;

	if (pread(file, &ehdr, sizeof(ehdr), 0) != sizeof(ehdr) ||
	    memcmp(ehdr.e_ident, ELFMAG, SELFMAG) || ehdr.e_type != ET_CORE)
		return false;
	for (size_t i = 0; i < ehdr.e_phnum; i++) {
		if (pread(file, &phdr, sizeof(phdr), ehdr.e_phoff + i * sizeof(phdr)) !=
		    sizeof(phdr))
			return false;
		if (phdr.p_type != PT_LOAD || phdr.p_vaddr > address ||
		    address + length > phdr.p_vaddr + phdr.p_filesz)
			continue;
		return pread(file, copy, length, phdr.p_offset + address - phdr.p_vaddr) ==
			(ssize_t)length && cpu_differs(copy, expect, length) == length;
	}
	return false;
}

/* A core dump contains the pages that are on the device. */
TEST_F_SETS(core_dump)
{
	const struct rlimit unlimited = { RLIM_INFINITY, RLIM_INFINITY };
	char dir[] = "/tmp/dummy_gpu_core.XXXXXX", path[60];
	struct other other;

	ASSERT_NE(NULL, mkdtemp(dir));
	snprintf(path, sizeof(path), "%s/core", dir);
	if (!set(&self->settings[0], "/proc/sys/kernel/core_pattern", path) ||
	    !set(&self->settings[1], "/proc/sys/kernel/core_uses_pid", "0")) {
		rmdir(dir);
		SKIP(return, "no core dumps, or not root");
	}
	for (int round = 0; round < ROUNDS; round++) {
		uint8_t *p = map_random(self->fd, self->expect, self->length, round);
		int file, status;
		pid_t pid;

		ASSERT_NE(NULL, p);
		pid = spawn(&other);
		ASSERT_LE(0, pid);
		cpu_randomize(self->expect, self->length / 2, ~round);
		if (!pid) {
			int fd = gpu_open(GPU_DEVICE);

			/*
			 * The child writes to one half; the other is shared
			 * with its parent.
			 */
			memcpy(p, self->expect, self->length / 2);
			if (fd < 0 || prefetch_all(fd, p, self->length / 2,
						   DUMMY_GPU_LOCATION_DEVICE) < 0)
				_exit(1);
			if (check_by_device(fd, self->result, p, self->expect, self->length))
				_exit(2);
			setrlimit(RLIMIT_CORE, &unlimited);
			signal(SIGABRT, SIG_DFL);
			abort();
		}
		status = ended(&other);
		EXPECT_TRUE(was_killed(status, SIGABRT)) TH_LOG("status %x", status);
		file = open(path, O_RDONLY | O_CLOEXEC);
		EXPECT_TRUE(core_has(file, gpu_addr(p), self->expect, self->copy, self->length));
		close(file);
		unlink(path);
		cpu_randomize(self->expect, self->length, round);
		EXPECT_SEEN(p, round);
		munmap(p, self->length);
	}
	rmdir(dir);
}

#define KSM	"/sys/kernel/mm/ksm/"

/*
 * Writing 2 to run unmerges all pages. Then wait until KSM shares that many
 * pages.
 */
static bool ksm_shares(long long pages)
{
	long long now = -1, before;

	if (!write_to(KSM "run", "2"))
		return false;
	before = number_in(KSM "pages_sharing");
	if (!write_to(KSM "run", "1"))
		return false;
	for (int i = 0; i < 1000 && now < before + pages; i++) {
		usleep(i ? 5000 : 0);
		now = number_in(KSM "pages_sharing");
	}
	return now >= before + pages;
}

/* KSM merges three equal pages into one until one of them is written. */
TEST_F_SETS(merged_by_ksm)
{
	const size_t pages = 8, part = pages * page, length = 3 * part;

	if (!set(&self->settings[0], KSM "sleep_millisecs", "1") ||
	    !set(&self->settings[1], KSM "pages_to_scan", "5000") ||
	    !set(&self->settings[2], KSM "run", "1"))
		SKIP(return, "no KSM, or not root");
	for (int round = 0; round < ROUNDS; round++) {
		uint8_t *p = map(length, PROT_READ | PROT_WRITE);
		size_t mine = cpu_random(&self->seed) % 3, cpus = (mine + 1) % 3;
		size_t at = cpu_random(&self->seed) % part;
		size_t n = 1 + cpu_random(&self->seed) % (part - at);

		ASSERT_NE(MAP_FAILED, p);
		for (size_t i = 0; i < 3; i++)
			cpu_randomize(self->expect + i * part, part, round);
		memcpy(p, self->expect, length);
		ASSERT_EQ(0, madvise(p, length, MADV_MERGEABLE));
		ASSERT_TRUE(ksm_shares(2 * pages)) TH_LOG("round %d", round);

		if (round & 1)
			EXPECT_EQ(0, check(self->fd, self->result, p, self->expect, length,
					   round & 2));
		if (round & 4)
			EXPECT_LE(0, prefetch_all(self->fd, p + mine * part, part,
						  DUMMY_GPU_LOCATION_DEVICE));
		EXPECT_EQ(0, run(self->fd, gpu_fill(p + mine * part + at, round, n)));
		memset(self->expect + mine * part + at, round, n);
		EXPECT_EQ(0, check(self->fd, self->result, p, self->expect, length, round & 8));
		p[cpus * part + at] ^= 0xff;
		self->expect[cpus * part + at] ^= 0xff;
		EXPECT_EQ(0, check(self->fd, self->result, p, self->expect, length, true));
		ASSERT_EQ(0, munmap(p, length));
	}
}

/*
 * The memory cgroup. A page keeps its charge when it migrates, and a
 * zero-filled page on the device is charged like a page of system memory. Each
 * CPU may hold back charges for 64 pages and as many changes of a statistic, so
 * a difference of two readings may be off by twice that.
 */

/* A value in memory.stat, in bytes. */
static int64_t memory_stat(const char *group, const char *name)
{
	char path[120];

	snprintf(path, sizeof(path), "%s/memory.stat", group);
	return number_of(path, name);
}

/* The pages charged to a group: all of them, and the anonymous ones. */
static void charges(const char *group, int64_t charge[2])
{
	char path[120];

	snprintf(path, sizeof(path), "%s/memory.current", group);
	charge[0] = number_in(path) / (int64_t)page;
	charge[1] = memory_stat(group, "anon") / (int64_t)page;
}

/* Moves its memory and waits for the parent to read the charges. */
static int charged_child(struct other *other, size_t length)
{
	uint8_t *p = map(length, PROT_READ | PROT_WRITE);
	int fd = gpu_open(GPU_DEVICE), err = fd < 0 || hear(other);
	int64_t pages = length / page;

	for (int round = 0; round < ROUNDS + 1 && !err; round++) {
		/*
		 * Every other round allocates the pages in system memory first.
		 */
		if (round & 1)
			memset(p, round, length);
		else
			err = prefetch_all(fd, p, length, DUMMY_GPU_LOCATION_DEVICE) != pages;
		err = err || tell(other) || hear(other);
		err = err || (round & 1 && prefetch_all(fd, p, length, DUMMY_GPU_LOCATION_DEVICE) !=
					   pages);
		err = err || run(fd, gpu_fill(p, round, length)) || tell(other) || hear(other);
		err = err || prefetch_all(fd, p, length, DUMMY_GPU_LOCATION_SYSTEM) != pages;
		err = err || tell(other) || hear(other);
		err = err || cpu_unlike(p, round, length) != length;
		err = err || madvise(p, length, MADV_DONTNEED) || tell(other) || hear(other);
	}
	return err;
}

static void charge_stays(struct __test_metadata *_metadata, LIFE *self,
			 const char *group)
{
	const int64_t noise = 2 * 64 * sysconf(_SC_NPROCESSORS_ONLN), pages = 4 * noise;
	int64_t start[2], now[2];
	struct other other;
	pid_t pid;

	if (pages * page > self->size / 2)
		SKIP(return, "too many CPUs for the device's memory");
	pid = spawn(&other);
	ASSERT_LE(0, pid);
	if (!pid)
		_exit(charged_child(&other, pages * page));
	ASSERT_TRUE(group_child(self, group, pid));
	ASSERT_EQ(0, tell(&other));
	for (int i = 0; i < 4 * (ROUNDS + 1); i++) {
		/*
		 * Allocated, on the device, in system memory, and then freed.
		 */
		int64_t expect = i % 4 == 3 ? 0 : pages;

		ASSERT_EQ(0, hear(&other)) TH_LOG("round %d", i / 4);
		charges(group, now);
		ASSERT_LE(0, now[0]);
		ASSERT_LE(0, now[1]);
		/*
		 * The first round also charges kernel memory, which stays
		 * charged.
		 */
		if (i < 4)
			memcpy(start, now, sizeof(now));
		for (int j = 0; j < 2 && i >= 4; j++) {
			EXPECT_LE(start[j] + expect - noise, now[j]) TH_LOG("step %d", i);
			EXPECT_GE(start[j] + expect + noise, now[j]) TH_LOG("step %d", i);
		}
		ASSERT_EQ(0, tell(&other));
	}
	self->grouped = 0;
	EXPECT_EQ(0, ended(&other));
}

/* Creates a group with the memory controller, or skips the test. */
static bool charge_begin(struct __test_metadata *_metadata, LIFE *self, char group[100])
{
	if (!cgroups_mount(&self->cgroups, "cgroup2", NULL))
		SKIP(return false, "no cgroup2: %s", strerror(errno));
	if (!cgroups_have_memory(&self->cgroups))
		SKIP(return false, "no memory controller in cgroup2");
	snprintf(group, 100, "%s/dummy_gpu_test", self->cgroups.dir);
	ASSERT_EQ(0, mkdir(group, 0700));
	return true;
}

TEST_F_SETS(charge)
{
	char group[100];

	if (!charge_begin(_metadata, self, group))
		return;
	charge_stays(_metadata, self, group);
	EXPECT_EQ(0, rmdir(group)) TH_LOG("%s", strerror(errno));
}

/* A mirror allocates memory for the entries of each block of this size that is used. */
#define BLOCK	(2UL << 20)
#define BLOCKS	128

/*
 * Reads a byte of each block with the device. The pages stay holes. The faults
 * are serviced by the child, or by a worker of the kernel.
 */
static int mirroring_child(struct other *other, int (*submit_all)(int, struct dummy_gpu_submit *))
{
	uint8_t *p = map(BLOCKS * BLOCK, PROT_READ | PROT_WRITE);
	uint64_t *sum = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	int fd = gpu_open(GPU_DEVICE), err = fd < 0 || hear(other);

	/* All that the first command allocates is there before the first count. */
	err = err || run_with(submit_all, fd, gpu_unary(DUMMY_GPU_OP_SUM, sum, p, 8)) ||
	      tell(other) || hear(other);
	for (size_t i = 1; i < BLOCKS && !err; i++)
		err = run_with(submit_all, fd,
			       gpu_unary(DUMMY_GPU_OP_SUM, sum, p + i * BLOCK, 8));
	err = err || tell(other) || hear(other);
	close(fd);
	return err || tell(other) || hear(other);
}

/*
 * The memory for the entries of a mirror is charged to the cgroup of the
 * process, or a process could use as much as it likes.
 */
static void charge_of_entries(struct __test_metadata *_metadata, LIFE *self,
			      int (*submit_all)(int, struct dummy_gpu_submit *))
{
	const int64_t entries = (BLOCKS - 1) * (BLOCK / page * sizeof(long)), noise = entries / 10;
	struct other other;
	char group[100];
	int64_t slab[3];
	pid_t pid;

	if (!charge_begin(_metadata, self, group))
		return;
	pid = spawn(&other);
	ASSERT_LE(0, pid);
	if (!pid)
		_exit(mirroring_child(&other, submit_all));
	ASSERT_TRUE(group_child(self, group, pid));
	for (size_t i = 0; i < ARRAY_SIZE(slab); i++) {
		ASSERT_EQ(0, tell(&other));
		ASSERT_EQ(0, hear(&other));
		slab[i] = memory_stat(group, "slab");
		ASSERT_LE(0, slab[i]);
	}
	/* With KASAN each takes more memory. */
	EXPECT_LE(slab[0] + entries - noise, slab[1]);
	/* Closing the file frees the entries, the first block's too. */
	EXPECT_GE(slab[0] + noise, slab[2]);
	ASSERT_EQ(0, tell(&other));
	self->grouped = 0;
	EXPECT_EQ(0, ended(&other));
	EXPECT_EQ(0, rmdir(group)) TH_LOG("%s", strerror(errno));
}

TEST_F_SETS(charge_of_entries)
{
	charge_of_entries(_metadata, self, gpu_submit);
}

/* What a worker of the kernel allocates is charged to the process, not to the worker. */
TEST_F_SETS(charge_of_entries_by_a_worker)
{
	charge_of_entries(_metadata, self, submit_and_wait);
}

/*
 * Whether the cgroup reaches the state. The freezer checks the tasks once per
 * write.
 */
static bool freezes(const char *state)
{
	for (int i = 0; i < 300; i++) {
		if (!write_to(state, "FROZEN"))
			return false;
		usleep(10 * 1000);
		if (lists(state, "FROZEN"))
			return true;
	}
	return false;
}

/*
 * Whether the GPU reads memory within some time. Without debugfs, returns
 * expect.
 */
static bool gpu_reads(bool expect)
{
	int64_t before = instance_counter(0, "bytes_read");

	for (int i = 0; i < 20; i++) {
		usleep(10 * 1000);
		if (instance_counter(0, "bytes_read") != before)
			return true;
	}
	return before < 0 ? expect : false;
}

static void frozen(struct __test_metadata *_metadata, LIFE *self,
		   int (*submit_all)(int, struct dummy_gpu_submit *), bool gpu_goes_on)
{
	const size_t length = self->size / 4;
	struct dummy_gpu_command commands[1024];
	struct dummy_gpu_submit submit = gpu_submission(commands, ARRAY_SIZE(commands));
	uint8_t *p = map(length, PROT_READ | PROT_WRITE);
	char group[60], path[100];
	struct other other;
	bool reads = true;
	pid_t pid;

	ASSERT_NE(MAP_FAILED, p);
	if (!cgroups_mount(&self->cgroups, "cgroup", "freezer"))
		SKIP(return, "no freezer of cgroups: %s", strerror(errno));
	snprintf(group, sizeof(group), "%s/dummy_gpu_test", self->cgroups.dir);
	ASSERT_EQ(0, mkdir(group, 0700));

	/* More work than can be done during the test. */
	for (size_t i = 0; i < ARRAY_SIZE(commands); i++)
		commands[i] = gpu_unary(DUMMY_GPU_OP_CRC32, &self->result[i % 8], p, length);
	pid = spawn(&other);
	ASSERT_LE(0, pid);
	if (!pid) {
		int fd = gpu_open(GPU_DEVICE);

		if (fd < 0 || run(fd, gpu_fill(p, 1, length)) || tell(&other))
			_exit(1);
		submit_all(fd, &submit);
		_exit(2);
	}
	self->grouped = pid;
	ASSERT_EQ(0, hear(&other));
	ASSERT_TRUE(group_child(self, group, pid));
	EXPECT_TRUE(gpu_reads(true));

	snprintf(path, sizeof(path), "%s/freezer.state", group);
	EXPECT_TRUE(freezes(path));
	/* Wait for the work item to end its slice. */
	for (int i = 0; i < 20 && reads && !gpu_goes_on; i++)
		reads = gpu_reads(false);
	EXPECT_EQ(gpu_goes_on, gpu_goes_on ? gpu_reads(true) : reads);
	EXPECT_TRUE(write_to(path, "THAWED"));
	EXPECT_TRUE(gpu_reads(true));

	self->grouped = 0;
	EXPECT_EQ(0, kill(pid, SIGKILL));
	EXPECT_TRUE(was_killed(ended(&other), SIGKILL));
	EXPECT_EQ(0, rmdir(group)) TH_LOG("%s", strerror(errno));
	munmap(p, length);
}

/*
 * A task that waits for its commands can be frozen, as all tasks are for system
 * suspend. The GPU does nothing for it then, and goes on when it is thawed.
 */
TEST_F(life, frozen_in_command)
{
	frozen(_metadata, self, gpu_submit, false);
}

/* A worker of the kernel is not a task of the process: it goes on. */
TEST_F(life, frozen_while_a_worker_runs_its_commands)
{
	frozen(_metadata, self, submit_and_wait, true);
}

/*
 * More memory in use than the device has: two processes with two threads each
 * work on small parts of memory that together does not fit on the device.
 */
struct filler {
	int fd;
	uint64_t *p, seed;
	size_t length;
	uint8_t *doubled;	/* for each piece, how often it was doubled */
	pthread_t thread;
	int err;
};

#define PIECE	(32 * page)

static int pieces_differ(struct filler *f, size_t piece)
{
	const size_t n = PIECE / sizeof(*f->p);

	for (size_t i = piece * n; i < (piece + 1) * n; i++) {
		if (f->p[i] != (f->seed + i) << f->doubled[piece])
			return -EBADMSG;
	}
	return 0;
}

static void *fill_thread(void *arg)
{
	const size_t n = PIECE / sizeof(uint64_t);
	struct filler *f = arg;
	uint64_t seed = f->seed;

	for (int round = 0; round < ROUNDS && !f->err; round++) {
		size_t piece = cpu_random(&seed) % (f->length / PIECE);
		uint64_t *p = f->p + piece * n;

		f->err = run(f->fd, gpu_binary(DUMMY_GPU_OP_ADD, p, p, p, PIECE));
		f->doubled[piece]++;
		if (!f->err && round % 4 == 0)
			f->err = pieces_differ(f, cpu_random(&seed) % (f->length / PIECE));
	}
	for (size_t i = 0; i < f->length / PIECE && !f->err; i++)
		f->err = pieces_differ(f, i);
	return NULL;
}

/*
 * One process: fills its share of memory, waits for the other process, and
 * works.
 */
static int fill_share(struct other *other, int fd, size_t share, int64_t *most,
		      uint64_t *evicted)
{
	struct filler fillers[2] = { 0 };
	struct dummy_gpu_stats stats;
	int err = 0;

	for (size_t i = 0; i < 2 && !err; i++) {
		struct filler *f = &fillers[i];

		f->fd = fd;
		f->length = share / 2 / PIECE * PIECE;
		f->seed = (uint64_t)getpid() << 8 | i;
		f->doubled = calloc(f->length / PIECE, 1);
		f->p = map(f->length, PROT_READ | PROT_WRITE);
		if (!f->doubled || f->p == MAP_FAILED)
			return -ENOMEM;
		for (size_t j = 0; j < f->length / sizeof(*f->p); j++)
			f->p[j] = f->seed + j;
		if (prefetch_all(fd, f->p, f->length, DUMMY_GPU_LOCATION_DEVICE) < 0)
			return -EIO;
	}
	if (tell(other) || hear(other))
		return -EPIPE;
	if (most)
		*most = instance_pages();
	/* Nobody moves pages before they are counted. */
	if (tell(other) || hear(other))
		return -EPIPE;
	for (size_t i = 0; i < 2; i++)
		err = pthread_create(&fillers[i].thread, NULL, fill_thread, &fillers[i]) ?: err;
	for (size_t i = 0; i < 2; i++) {
		err = pthread_join(fillers[i].thread, NULL) ?: err;
		err = err ?: fillers[i].err;
		munmap(fillers[i].p, fillers[i].length);
		free(fillers[i].doubled);
	}
	err = err ?: gpu_stats(fd, &stats);
	*evicted = stats.pages_evicted;
	return err;
}

TEST_F(life, all_of_it_in_use)
{
	const size_t share = self->size / 8 * 5;
	struct other other;
	int64_t most;
	pid_t pid = spawn(&other);

	ASSERT_LE(0, pid);
	if (!pid)
		_exit(-fill_share(&other, gpu_open(GPU_DEVICE), share, NULL, &self->result[9]));
	EXPECT_EQ(0, fill_share(&other, self->fd, share, &most, &self->result[8]));
	EXPECT_EQ(0, ended(&other));
	if (self->pages >= 0)
		EXPECT_LE(self->size / page / 8 * 7, most);
	EXPECT_LT(0, self->result[8] + self->result[9]);
}

/* The node may appear some time after the module was loaded. */
static int open_new(void)
{
	int fd = gpu_open(GPU_DEVICE);

	for (int i = 0; i < 500 && fd < 0; i++) {
		usleep(10 * 1000);
		fd = gpu_open(GPU_DEVICE);
	}
	return fd;
}

/*
 * A thread that reads memory with the CPU all the time. The bytes must not
 * change.
 */
struct looker {
	const uint8_t *p, *expect;
	size_t length;
	bool stop;
	int err;
};

static void *look_thread(void *arg)
{
	struct looker *l = arg;
	uint64_t seed = 1;

	while (!l->err && !__atomic_load_n(&l->stop, __ATOMIC_ACQUIRE)) {
		size_t at = cpu_random(&seed) % l->length;

		if (cpu_load(l->p + at) != l->expect[at])
			l->err = -EBADMSG;
		usleep(10);
	}
	return NULL;
}

/* The file of the module, or skips the test. */
static const char *module_file(struct __test_metadata *_metadata)
{
	const char *path = getenv("DUMMY_GPU_KO") ?: "/modules/dummy_gpu.ko";

	if (access(path, R_OK))
		SKIP(return NULL, "no %s: DUMMY_GPU_KO=path says where the module is", path);
	return path;
}

/* Removes the module until the teardown, or skips the test. No file may be open. */
static bool module_begin(struct __test_metadata *_metadata, LIFE *self, const char *path)
{
	int err = module_remove();

	if (err)
		SKIP(return false, "the module cannot be removed: %s", strerror(-err));
	self->module = path;
	self->pages = 0;
	return true;
}

/* The same for a test that begins with it. Returns the module's file. */
static const char *without_module(struct __test_metadata *_metadata, LIFE *self)
{
	const char *path = module_file(_metadata);

	if (!path)
		return NULL;
	close(self->fd);
	self->fd = -1;
	return module_begin(_metadata, self, path) ? path : NULL;
}

/*
 * The module is removed while processes have pages on the device, which is
 * small here.
 */
TEST_F_SETS(module_removed)
{
	const size_t size = 4UL << 20;
	const char *path = without_module(_metadata, self);
	int err;

	if (!path)
		return;
	ASSERT_EQ(0, module_insert(path, size));
	for (int round = 0; round < ROUNDS; round++) {
		uint8_t *p = map_random(-1, self->expect, self->length, round);
		struct looker looker = { p, self->expect, self->length, false, 0 };
		struct other other;
		pthread_t thread;
		pid_t pid;
		int fd;

		/*
		 * The child shares one half with the parent and writes to the
		 * other half.
		 */
		ASSERT_NE(NULL, p);
		fd = open_new();
		ASSERT_LE(0, fd);
		ASSERT_EQ(npages, prefetch_all(fd, p, self->length, DUMMY_GPU_LOCATION_DEVICE));
		pid = spawn(&other);
		ASSERT_LE(0, pid);
		if (!pid) {
			close(fd);
			fd = open_new();
			if (fd < 0 || run(fd, gpu_fill(p, 0x5a, self->length / 2)))
				_exit(1);
			memset(self->expect, 0x5a, self->length / 2);
			close(fd);
			if (tell(&other) || hear(&other))
				_exit(2);
			err = cpu_differs(p, self->expect, self->length) != self->length;
			if (err || tell(&other) || hear(&other))
				_exit(3);
			fd = open_new();
			err = fd < 0 ? fd : check(fd, self->result, p, self->expect,
						  self->length, round & 1);
			_exit(-err);
		}
		ASSERT_EQ(0, hear(&other));
		EXPECT_EQ(-EWOULDBLOCK, module_remove());
		EXPECT_EQ(0, check_by_device(fd, self->result, p, self->expect, self->length));
		EXPECT_EQ(0, close(fd));
		if (instance_pages() >= 0)
			EXPECT_LE(npages, instance_pages());
		if (round & 1)
			ASSERT_EQ(0, pthread_create(&thread, NULL, look_thread, &looker));
		ASSERT_EQ(0, module_remove());
		if (round & 1) {
			__atomic_store_n(&looker.stop, true, __ATOMIC_RELEASE);
			EXPECT_EQ(0, pthread_join(thread, NULL));
			EXPECT_EQ(0, looker.err);
		}
		EXPECT_GT(0, gpu_open(GPU_DEVICE));
		EXPECT_EQ(self->length, cpu_differs(p, self->expect, self->length));
		EXPECT_EQ(0, tell(&other));
		EXPECT_EQ(0, hear(&other));

		ASSERT_EQ(0, module_insert(path, size));
		fd = open_new();
		ASSERT_LE(0, fd);
		EXPECT_EQ(0, check(fd, self->result, p, self->expect, self->length, round & 1));
		EXPECT_EQ(0, tell(&other));
		EXPECT_EQ(0, ended(&other)) TH_LOG("round %d", round);
		munmap(p, self->length);
		close(fd);
		if (instance_pages() >= 0)
			EXPECT_TRUE(device_pages_become(0));
	}
}

/* How many references there are to the module, or -1. */
static int module_references(void)
{
	FILE *file = fopen("/sys/module/dummy_gpu/refcnt", "re");
	int count = -1;

	if (file && fscanf(file, "%d", &count) != 1)
		count = -1;
	if (file)
		fclose(file);
	return count;
}

/*
 * A mirror holds a reference to the module, since its notifiers call the
 * module.
 */
TEST_F(life, mirror_keeps_the_module)
{
	int before = module_references(), fd;

	if (before < 0)
		SKIP(return, "the driver is no module");
	fd = open_new();
	ASSERT_LE(0, fd);
	/* The mirror is made by the first ioctl. */
	stats_of(_metadata, fd);
	EXPECT_EQ(before + 2, module_references());
	ASSERT_EQ(0, close(fd));
	EXPECT_EQ(before, module_references());
}

/* Reading an open debugfs file fails with EIO once the module is removed. */
TEST_F_SETS(module_removed_with_statistics_open)
{
	char stats[80], text[100];
	const char *path = module_file(_metadata);

	if (!path)
		return;
	snprintf(stats, sizeof(stats), "/sys/kernel/debug/dummy_gpu/%s0/stats", instance_prefix());
	if (access(stats, R_OK))
		SKIP(return, "no debugfs");
	close(self->fd);
	self->fd = -1;
	/*
	 * Close the partly read file before, and then after, the module is
	 * loaded again.
	 */
	for (int round = 0; round < 2; round++) {
		int opened = open(stats, O_RDONLY | O_CLOEXEC);
		int half_read = open(stats, O_RDONLY | O_CLOEXEC);

		ASSERT_LE(0, opened);
		ASSERT_LE(0, half_read);
		EXPECT_EQ(10, read(half_read, text, 10));
		if (!module_begin(_metadata, self, path))
			return;

		EXPECT_EQ(-1, read(opened, text, sizeof(text)));
		EXPECT_EQ(EIO, errno);
		EXPECT_EQ(-1, read(half_read, text, sizeof(text)));
		EXPECT_EQ(EIO, errno);
		EXPECT_EQ(0, close(opened));
		if (!round)
			EXPECT_EQ(0, close(half_read));
		ASSERT_EQ(0, module_insert(path, self->size));
		if (round)
			EXPECT_EQ(0, close(half_read));
	}
}

/* The sum of the invalidations for each cause. */
static uint64_t causes(const struct dummy_gpu_stats *stats)
{
	return stats->unmaps + stats->protections + stats->clears + stats->own_migrations +
	       stats->other_migrations + stats->exclusives + stats->releases;
}

static uint64_t counter_at(const struct dummy_gpu_stats *stats, size_t offset)
{
	return *(const uint64_t *)((const char *)stats + offset);
}

/*
 * Expects that the counter at this offset has grown since the last call, and
 * that all invalidations have a cause.
 */
static void expect_cause(struct __test_metadata *_metadata, LIFE *self,
			 struct dummy_gpu_stats *last, size_t offset)
{
	struct dummy_gpu_stats now = stats_of(_metadata, self->fd);

	EXPECT_LT(counter_at(last, offset), counter_at(&now, offset))
		TH_LOG("offset %zu", offset);
	EXPECT_EQ(now.invalidations, causes(&now));
	*last = now;
}

#define CAUSE(name)	expect_cause(_metadata, self, &last, offsetof(struct dummy_gpu_stats, name))

TEST_F(life, invalidations_have_a_cause)
{
	uint8_t *p = map_random(-1, self->expect, self->length, 1);
	struct dummy_gpu_stats last = stats_of(_metadata, self->fd);
	int64_t releases = instance_counter(0, "releases");
	int other = gpu_open(GPU_DEVICE_2);
	pid_t pid;

	ASSERT_NE(NULL, p);
	ASSERT_LE(0, other);
	/* The first access makes entries, and the migration invalidates them. */
	ASSERT_EQ(0, gpu_advise(self->fd, p, self->length, DUMMY_GPU_POLICY_NONE));
	ASSERT_EQ(0, check_by_device(self->fd, self->result, p, self->expect, self->length));
	ASSERT_EQ(npages, prefetch_all(self->fd, p, self->length, DUMMY_GPU_LOCATION_DEVICE));
	CAUSE(own_migrations);
	ASSERT_EQ(0, check_by_device(self->fd, self->result, p, self->expect, self->length));
	EXPECT_EQ(self->length, cpu_differs(p, self->expect, self->length));
	/* What the CPU and other devices reach stays where it is. */
	if (!coherent()) {
		CAUSE(own_migrations);
		ASSERT_EQ(0, check_by_device(self->fd, self->result, p, self->expect,
					     self->length));
		ASSERT_EQ(npages, prefetch_all(other, p, self->length,
					       DUMMY_GPU_LOCATION_DEVICE));
		CAUSE(other_migrations);
	}
	ASSERT_EQ(0, run(self->fd, gpu_fill(p, 1, self->length)));
	ASSERT_EQ(0, mprotect(p, self->length, PROT_READ));
	CAUSE(protections);
	ASSERT_EQ(0, run(self->fd, gpu_unary(DUMMY_GPU_OP_CRC32, self->result, p, self->length)));
	ASSERT_EQ(0, madvise(p, self->length, MADV_DONTNEED));
	CAUSE(clears);
	ASSERT_EQ(0, run(self->fd, gpu_unary(DUMMY_GPU_OP_CRC32, self->result, p, self->length)));
	ASSERT_EQ(0, munmap(p, self->length));
	CAUSE(unmaps);

	pid = fork();
	ASSERT_LE(0, pid);
	if (!pid) {
		/* Not memory of the parent, which would migrate, too, and stay on the device. */
		p = map(self->length, PROT_READ | PROT_WRITE);
		_exit(run(gpu_open(GPU_DEVICE), gpu_fill(p, 1, self->length)) ? 1 : 0);
	}
	EXPECT_EQ(0, wait_child(pid, 20));
	if (releases >= 0)
		EXPECT_LT(releases, instance_counter(0, "releases"));
	close(other);
}

/* Memory that four devices use, and never migrates: its address. */
static uint8_t *map_for_four(const int fd[4])
{
	uint8_t *p = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	for (int i = 0; i < 4 && p != MAP_FAILED; i++) {
		if (run(fd[i], gpu_fill(p, i, page)))
			return MAP_FAILED;
	}
	return p;
}

/* All devices start to flush their TLBs, and then mm waits for all of them. */
TEST_F_SETS(four_devices_flush_at_the_same_time)
{
	const unsigned int flush = 100 * 1000;
	const char *path;
	uint64_t start;
	char device[20];
	uint8_t *p;
	int fd[4];

	if (coherent())
		SKIP(return, "two devices have coherent memory");
	path = without_module(_metadata, self);
	if (!path)
		return;
	EXPECT_EQ(-EINVAL, module_insert_with(path, "devices=5"));
	EXPECT_EQ(-EINVAL, module_insert_with(path, "devices=1"));
	EXPECT_EQ(-EINVAL, module_insert_with(path, "flush_us=1000001"));
	ASSERT_EQ(0, module_insert_with(path, "vram_mb=4 devices=4 flush_us=100000"));
	fd[0] = open_new();
	ASSERT_LE(0, fd[0]);
	for (int i = 1; i < 4; i++) {
		snprintf(device, sizeof(device), "/dev/dummy_gpu%d", i);
		fd[i] = gpu_open(device);
		ASSERT_LE(0, fd[i]);
	}
	p = map_for_four(fd);
	ASSERT_NE(MAP_FAILED, p);
	start = microseconds();
	ASSERT_EQ(0, munmap(p, page));
	EXPECT_LE(flush, microseconds() - start);
	/* Four of them, one after the other, would take 400 ms. */
	EXPECT_GT(3 * flush, microseconds() - start);
	for (int i = 0; i < 4; i++)
		EXPECT_EQ(-EFAULT, run(fd[i], gpu_fill(p, 0, page)));

	/* Nothing to flush, no time. */
	p = map_for_four(fd);
	ASSERT_NE(MAP_FAILED, p);
	ASSERT_EQ(0, madvise(p, page, MADV_DONTNEED));
	start = microseconds();
	ASSERT_EQ(0, munmap(p, page));
	EXPECT_GT(flush, microseconds() - start);

	for (int i = 0; i < 4; i++)
		close(fd[i]);
}

/* Without and with time for a flush. */
static const char *const reaped_options[] = { "vram_mb=4", "vram_mb=4 flush_us=1000" };

/* A child with memory that the device can access. */
struct reaped {
	struct other other;
	int fd;
	int64_t mapped;		/* pages that the device can access */
};

/* Uses the device, and then ends when it is told to, or takes that much memory. */
static int reaped_child(struct other *other, size_t length, size_t more)
{
	uint8_t *p = map(length, PROT_READ | PROT_WRITE);
	uint8_t *q = map(more + 1, PROT_READ | PROT_WRITE);
	int fd = gpu_open(GPU_DEVICE);

	if (fd < 0 || run(fd, gpu_fill(p, 1, length)) || tell(other) || hear(other))
		return 1;
	memset(q, 1, more);
	return 0;
}

/* Lets the child stop on its way out, with its memory. It is in the group, if there is one. */
static void reaped_begin(struct __test_metadata *_metadata, LIFE *self, struct reaped *r,
			 const char *options, const char *group, size_t more)
{
	int status;
	pid_t pid;

	ASSERT_EQ(0, module_insert_with(self->module, options));
	r->fd = open_new();
	ASSERT_LE(0, r->fd);
	pid = spawn(&r->other);
	ASSERT_LE(0, pid);
	if (!pid)
		_exit(reaped_child(&r->other, self->length, more));
	ASSERT_EQ(0, hear(&r->other));
	if (group)
		ASSERT_TRUE(group_child(self, group, pid));
	r->mapped = instance_counter(0, "pages_mapped");
	ASSERT_EQ(0, ptrace(PTRACE_SEIZE, pid, 0, PTRACE_O_TRACEEXIT));
	ASSERT_EQ(0, tell(&r->other));
	ASSERT_EQ(pid, waitpid(pid, &status, 0));
	ASSERT_EQ(SIGTRAP | PTRACE_EVENT_EXIT << 8, status >> 8);
}

/* Lets the child end. Then its memory is freed. Returns its status. */
static int reaped_end(struct __test_metadata *_metadata, LIFE *self, struct reaped *r)
{
	int status;

	ASSERT_EQ(0, ptrace(PTRACE_DETACH, r->other.pid, 0, 0));
	self->grouped = 0;
	status = ended(&r->other);
	if (r->mapped >= 0)
		EXPECT_TRUE(instance_counter_becomes(0, "pages_mapped", 0));
	close(r->fd);
	return status;
}

/*
 * process_mrelease() and the OOM reaper must not wait for a device. They leave
 * its memory alone, and it is freed when the process has ended.
 */
TEST_F_SETS(memory_that_a_device_must_flush_is_not_reaped)
{
	if (!without_module(_metadata, self))
		return;
	for (size_t i = 0; i < ARRAY_SIZE(reaped_options); i++) {
		struct reaped r;
		int pidfd, err;

		if (i)
			ASSERT_EQ(0, module_remove());
		reaped_begin(_metadata, self, &r, reaped_options[i], NULL, 0);
		pidfd = syscall(__NR_pidfd_open, r.other.pid, 0);
		ASSERT_LE(0, pidfd);
		err = syscall(__NR_process_mrelease, pidfd, 0) ? -errno : 0;
		EXPECT_EQ(i ? -EAGAIN : 0, err);
		if (r.mapped >= 0)
			EXPECT_EQ(i ? r.mapped : 0, instance_counter(0, "pages_mapped"));
		EXPECT_EQ(0, reaped_end(_metadata, self, &r));
		close(pidfd);
	}
}

/* The same for the OOM reaper. It tries for some seconds after the kill. */
TEST_F_SETS(memory_that_a_device_must_flush_is_not_reaped_after_an_oom_kill)
{
	char group[100], file[120];

	if (!charge_begin(_metadata, self, group) || !without_module(_metadata, self))
		return;
	snprintf(file, sizeof(file), "%s/memory.max", group);
	ASSERT_TRUE(write_to(file, "16M"));
	snprintf(file, sizeof(file), "%s/memory.swap.max", group);
	write_to(file, "0");
	for (size_t i = 0; i < ARRAY_SIZE(reaped_options); i++) {
		struct reaped r;

		if (i)
			ASSERT_EQ(0, module_remove());
		reaped_begin(_metadata, self, &r, reaped_options[i], group, 64UL << 20);
		if (i)
			sleep(4);
		if (r.mapped >= 0)
			EXPECT_TRUE(instance_counter_becomes(0, "pages_mapped", i ? r.mapped : 0));
		EXPECT_TRUE(was_killed(reaped_end(_metadata, self, &r), SIGKILL));
	}
	EXPECT_EQ(0, rmdir(group)) TH_LOG("%s", strerror(errno));
}

/* The device fails for good. */
static bool fail_device(void)
{
	char path[80];

	snprintf(path, sizeof(path), "/sys/kernel/debug/dummy_gpu/%s0/lose", instance_prefix());
	return write_to(path, "1");
}

static __thread sigjmp_buf *touching;

static void sigbus(int sig)
{
	if (!touching)
		_exit(100 + sig);
	siglongjmp(*touching, 1);
}

/* A CPU reads a page: 0, -EFAULT if it got SIGBUS, -EBADMSG if it read other bytes. */
static int touch(const uint8_t *p, const uint8_t *expect)
{
	sigjmp_buf here;
	int err = -EFAULT;

	if (!sigsetjmp(here, 1)) {
		touching = &here;
		err = cpu_differs(p, expect, page) == page ? 0 : -EBADMSG;
	}
	touching = NULL;
	return err;
}

/* Expects that only what was on the device is gone. The device may be gone, too (fd < 0). */
static void expect_lost(struct __test_metadata *_metadata, LIFE *self, int fd, uint8_t *p,
			size_t lost)
{
	for (size_t i = 0; i < npages; i++) {
		uint8_t *at = p + i * page;
		int err = i < lost ? -EFAULT : 0;

		EXPECT_EQ(err, touch(at, self->expect + i * page)) TH_LOG("page %zu", i);
		if (fd < 0)
			continue;
		EXPECT_EQ(err, run(fd, gpu_unary(DUMMY_GPU_OP_SUM, self->result, at, page)));
	}
}

/* The device fails while nothing uses it; then its driver goes. */
TEST_F_SETS(only_what_a_lost_device_had_is_lost)
{
	const char *path = without_module(_metadata, self);
	const size_t lost = npages / 2;
	struct other other;
	uint8_t *p;
	uint64_t start;
	pid_t pid;
	int fd;

	if (!path)
		return;
	signal(SIGBUS, sigbus);
	ASSERT_EQ(0, module_insert(path, 4UL << 20));
	p = map_random(-1, self->expect, self->length, 1);
	ASSERT_NE(NULL, p);
	fd = open_new();
	ASSERT_LE(0, fd);
	ASSERT_EQ(lost, prefetch_all(fd, p, lost * page, DUMMY_GPU_LOCATION_DEVICE));
	pid = spawn(&other);
	ASSERT_LE(0, pid);
	if (!pid) {
		close(fd);
		if (hear(&other))
			_exit(1);
		for (size_t i = 0; i < npages; i++) {
			const uint8_t *expect = self->expect + i * page;

			if (touch(p + i * page, expect) != (i < lost ? -EFAULT : 0))
				_exit(2);
		}
		_exit(tell(&other) ? 3 : 0);
	}
	ASSERT_TRUE(fail_device());
	expect_lost(_metadata, self, fd, p, lost);
	EXPECT_EQ(-ENODEV, prefetch_all(fd, p + lost * page, page, DUMMY_GPU_LOCATION_DEVICE));
	EXPECT_EQ(0, tell(&other));
	EXPECT_EQ(0, hear(&other));
	EXPECT_EQ(0, ended(&other));
	/* The statistics have lost the pages, too. */
	EXPECT_EQ(0, instance_pages());

	/* The driver is removed at once, though the process has the pages. */
	close(fd);
	start = microseconds();
	ASSERT_EQ(0, module_remove());
	EXPECT_GT(1000 * 1000, microseconds() - start);
	expect_lost(_metadata, self, -1, p, lost);
	/* The next one has nothing to do with them. */
	ASSERT_EQ(0, module_insert(path, 4UL << 20));
	fd = open_new();
	ASSERT_LE(0, fd);
	expect_lost(_metadata, self, fd, p, lost);
	/* The addresses can be used again. */
	ASSERT_EQ(0, madvise(p, lost * page, MADV_DONTNEED));
	ASSERT_EQ(0, run(fd, gpu_fill(p, 7, page)));
	EXPECT_EQ(page, cpu_unlike(p, 7, page));
	munmap(p, self->length);
	close(fd);
}

struct loser {
	int fd;
	uint8_t *p;
	const uint8_t *expect;
	size_t length;
	bool stop;
	int err;
};

/* Moves pages to the device and back. */
static void *lose_move_thread(void *arg)
{
	struct loser *l = arg;

	while (!__atomic_load_n(&l->stop, __ATOMIC_ACQUIRE)) {
		prefetch_all(l->fd, l->p, l->length, DUMMY_GPU_LOCATION_DEVICE);
		prefetch_all(l->fd, l->p, l->length / 2, DUMMY_GPU_LOCATION_SYSTEM);
	}
	return NULL;
}

/* A CPU touches pages, which are right or lost. */
static void *lose_touch_thread(void *arg)
{
	struct loser *l = arg;
	uint64_t seed = 1;

	while (!__atomic_load_n(&l->stop, __ATOMIC_ACQUIRE)) {
		size_t at = cpu_random(&seed) % (l->length / page) * page;

		if (touch(l->p + at, l->expect + at) == -EBADMSG)
			l->err = -EBADMSG;
	}
	return NULL;
}

/*
 * The device fails while pages migrate there, are evicted, and are touched by
 * CPUs, and sometimes while its driver goes. No page has other bytes than
 * before: it is right, or it is lost.
 */
TEST_F_SETS(lost_at_any_moment)
{
	const char *path = without_module(_metadata, self);
	/* More than the memory of the device. */
	const size_t length = 6UL << 20;
	uint8_t *expect = malloc(length);
	size_t gone = 0;

	ASSERT_NE(NULL, expect);
	if (!path)
		return;
	signal(SIGBUS, sigbus);
	ASSERT_EQ(0, module_insert(path, 4UL << 20));
	for (int round = 0; round < ROUNDS / 5 + 5; round++) {
		uint8_t *p = map_random(-1, expect, length, round);
		struct loser loser = { open_new(), p, expect, length, false, 0 };
		pthread_t mover, toucher;

		ASSERT_NE(NULL, p);
		ASSERT_LE(0, loser.fd);
		ASSERT_EQ(0, pthread_create(&mover, NULL, lose_move_thread, &loser));
		ASSERT_EQ(0, pthread_create(&toucher, NULL, lose_touch_thread, &loser));
		/* The first pages, or any number of them. */
		if (round & 1)
			usleep(round * 7919 % 30000);
		else
			while (!instance_pages())
				usleep(100);
		ASSERT_TRUE(fail_device());
		usleep(1000);
		__atomic_store_n(&loser.stop, true, __ATOMIC_RELEASE);
		EXPECT_EQ(0, pthread_join(mover, NULL));
		EXPECT_EQ(0, pthread_join(toucher, NULL));
		EXPECT_EQ(0, loser.err);
		EXPECT_EQ(0, instance_pages());
		close(loser.fd);
		ASSERT_EQ(0, module_remove());
		for (size_t at = 0; at < length; at += page) {
			int err = touch(p + at, expect + at);

			EXPECT_NE(-EBADMSG, err) TH_LOG("round %d, page %zu", round, at / page);
			gone += err == -EFAULT;
		}
		munmap(p, length);
		ASSERT_EQ(0, module_insert(path, 4UL << 20));
	}
	EXPECT_LT(0, gone);
	free(expect);
}

TEST_HARNESS_MAIN
