// SPDX-License-Identifier: GPL-2.0
/*
 * Tests of the atomic operations of the dummy GPU: counters and locks that CPUs
 * and devices share.
 *
 * Old values are written to shared memory, which never migrates and cannot be
 * exclusive to a device.
 */
#include <pthread.h>

#include "dummy_gpu_harness.h"

#define CPUS		4
#define DEVICES		2
#define BATCH		16	/* commands of a submission */

FIXTURE(atomic)
{
	int fd[DEVICES];
	uint64_t *old;		/* a page */
	uint64_t *target;	/* in the middle of three pages */
	uint8_t *p;
};

#define ATOMIC	FIXTURE_DATA(atomic)

FIXTURE_SETUP(atomic)
{
	self->fd[0] = setup_device(_metadata);
	if (self->fd[0] < 0)
		return;
	self->fd[1] = gpu_open(GPU_DEVICE_2);
	ASSERT_LE(0, self->fd[1]);
	self->old = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	ASSERT_NE(MAP_FAILED, self->old);
	self->p = map(3 * page, PROT_READ | PROT_WRITE);
	ASSERT_NE(MAP_FAILED, self->p);
	self->target = (uint64_t *)(self->p + page + 24);
}

FIXTURE_TEARDOWN(atomic)
{
	munmap(self->p, 3 * page);
	munmap(self->old, page);
	close(self->fd[0]);
	close(self->fd[1]);
}

static uint64_t cpu_load_word(const uint64_t *p)
{
	return __atomic_load_n(p, __ATOMIC_SEQ_CST);
}

static int fetch_add(ATOMIC *self, int device, uint64_t number)
{
	return run(self->fd[device], gpu_fetch_add(self->old, self->target, number));
}

TEST_F(atomic, fetch_add_adds_and_returns_the_old_value)
{
	/* A hole at first. */
	ASSERT_EQ(0, fetch_add(self, 0, 5));
	EXPECT_EQ(0, self->old[0]);
	/* The other device takes the page, and so does the CPU. */
	ASSERT_EQ(0, fetch_add(self, 1, -6ULL));
	EXPECT_EQ(5, self->old[0]);
	EXPECT_EQ(-1ULL, cpu_load_word(self->target));
	ASSERT_EQ(0, fetch_add(self, 0, 2));
	EXPECT_EQ(-1ULL, self->old[0]);
	EXPECT_EQ(1, cpu_load_word(self->target));

	/* Nothing else of the three pages has changed. */
	*self->target = 0;
	EXPECT_EQ(3 * page, cpu_unlike(self->p, 0, 3 * page));
}

TEST_F(atomic, compare_exchange_replaces_only_what_is_expected)
{
	uint64_t *expected = self->old + 1;
	struct dummy_gpu_command command =
		gpu_compare_exchange(self->old, self->target, expected, 7);

	*self->target = 5;
	*expected = 4;
	ASSERT_EQ(0, run(self->fd[0], command));
	EXPECT_EQ(5, self->old[0]);
	EXPECT_EQ(5, cpu_load_word(self->target));
	/* As C's atomic_compare_exchange() does: what is there becomes what is expected. */
	command.dst = command.src2;
	ASSERT_EQ(0, run(self->fd[0], command));
	EXPECT_EQ(5, *expected);
	EXPECT_EQ(5, cpu_load_word(self->target));
	ASSERT_EQ(0, run(self->fd[0], command));
	EXPECT_EQ(5, *expected);
	EXPECT_EQ(7, cpu_load_word(self->target));
}

/* The page is in the memory of one device or the other. */
TEST_F(atomic, wherever_the_page_is)
{
	uint64_t value = 0x1111111111111111ULL, faults;
	struct dummy_gpu_info info;

	ASSERT_EQ(0, gpu_info(self->fd[0], &info));
	if (!info.vram_size)
		SKIP(return, "no device memory");
	for (int where = 0; where < DEVICES; where++) {
		/* What the other device reaches stays there. */
		int there = self->fd[coherent() ? 0 : where];

		for (int device = 0; device < DEVICES; device++) {
			ASSERT_EQ(0, run(self->fd[where], gpu_fill(self->p, 0x11, 3 * page)));
			EXPECT_EQ(3, stats_of(_metadata, there).device_pages);
			ASSERT_EQ(0, fetch_add(self, device, 3));
			EXPECT_EQ(value, self->old[0]);
			EXPECT_EQ(value + 3, cpu_load_word(self->target));
		}
	}
	/* While nobody takes the page, the device needs no fault for it. */
	ASSERT_EQ(0, fetch_add(self, 0, 1));
	faults = stats_of(_metadata, self->fd[0]).faults;
	ASSERT_EQ(0, run(self->fd[0], gpu_fill(self->target + 1, 0x22, 8)));
	ASSERT_EQ(0, fetch_add(self, 0, 1));
	EXPECT_EQ(value + 4, self->old[0]);
	EXPECT_EQ(faults, stats_of(_metadata, self->fd[0]).faults);
	EXPECT_EQ(0x2222222222222222ULL, cpu_load_word(self->target + 1));
}

/* Only private memory can be exclusive. */
TEST_F(atomic, shared_memory_is_not_supported)
{
	uint64_t *shared = self->old + 1, *private;
	int file = temporary_file(page);
	struct dummy_gpu_command commands[] = {
		gpu_fetch_add(self->old, shared, 1),
		gpu_compare_exchange(self->old, shared, self->old + 2, 1),
	};

	ASSERT_LE(0, file);
	self->old[0] = 3;
	for (size_t i = 0; i < ARRAY_SIZE(commands); i++) {
		struct dummy_gpu_submit submit = gpu_submission(&commands[i], 1);

		EXPECT_EQ(-EOPNOTSUPP, gpu_submit(self->fd[0], &submit));
		EXPECT_EQ(gpu_addr(shared), submit.fault_address);
		EXPECT_EQ(0, submit.completed);
	}
	EXPECT_EQ(3, self->old[0]);
	EXPECT_EQ(0, *shared);

	private = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
	ASSERT_NE(MAP_FAILED, private);
	EXPECT_EQ(0, run(self->fd[0], gpu_fetch_add(self->old, private, 9)));
	EXPECT_EQ(9, cpu_load_word(private));
	/* The file has not changed. */
	EXPECT_EQ(sizeof(*shared), pread(file, shared, sizeof(*shared), 0));
	EXPECT_EQ(0, *shared);
	munmap(private, page);
	close(file);
}

TEST_F(atomic, what_the_cpu_may_not_write_is_refused)
{
	struct dummy_gpu_command command = gpu_fetch_add(self->old, self->target, 1);
	struct dummy_gpu_submit submit = gpu_submission(&command, 1);

	*self->target = 3;
	ASSERT_EQ(0, mprotect(self->p, 3 * page, PROT_READ));
	EXPECT_EQ(-EPERM, gpu_submit(self->fd[0], &submit));
	EXPECT_EQ(gpu_addr(self->target), submit.fault_address);
	EXPECT_EQ(3, *self->target);
	ASSERT_EQ(0, mprotect(self->p, 3 * page, PROT_READ | PROT_WRITE));

	/* The operation is done once, even if its result cannot be written. */
	submit = gpu_submission(&command, 1);
	ASSERT_EQ(0, mprotect(self->old, page, PROT_READ));
	EXPECT_EQ(-EPERM, gpu_submit(self->fd[0], &submit));
	EXPECT_EQ(gpu_addr(self->old), submit.fault_address);
	EXPECT_EQ(4, cpu_load_word(self->target));
	ASSERT_EQ(0, mprotect(self->old, page, PROT_READ | PROT_WRITE));

	submit = gpu_submission(&command, 1);
	ASSERT_EQ(0, munmap(self->p + page, page));
	EXPECT_EQ(-EFAULT, gpu_submit(self->fd[0], &submit));
	EXPECT_EQ(gpu_addr(self->target), submit.fault_address);
}

/* Each process has its own counter after fork(). */
TEST_F(atomic, fork_keeps_the_counters_apart)
{
	pid_t pid;

	ASSERT_EQ(0, fetch_add(self, 0, 5));
	pid = fork();
	ASSERT_LE(0, pid);
	if (!pid) {
		int fd = gpu_open(GPU_DEVICE);

		_exit(cpu_load_word(self->target) != 5 ||
		      run(fd, gpu_fetch_add(self->old + 1, self->target, 7)) ||
		      self->old[1] != 5 || cpu_load_word(self->target) != 12);
	}
	ASSERT_EQ(0, fetch_add(self, 0, 1));
	EXPECT_EQ(5, self->old[0]);
	EXPECT_EQ(0, wait_child(pid, 20));
	EXPECT_EQ(6, cpu_load_word(self->target));
}

/* A thread of a test in which all count on the same word. */
struct counter {
	ATOMIC *self;
	pthread_t thread;
	int device;		/* or -1: a CPU */
	uint64_t rounds;	/* of a device; a CPU goes on until it is stopped */
	uint64_t count;		/* what it has added */
	int err;
	uint64_t *old;		/* what a device has found: BATCH words */
	bool disordered;	/* a device has found less than before */
	bool *stop;
};

/*
 * Between its atomic operations the device writes to another word of the page,
 * for which the page need not be exclusive.
 */
static void *device_counts(void *arg)
{
	struct counter *counter = arg;
	uint64_t *target = counter->self->target;
	struct dummy_gpu_command commands[2 * BATCH];
	int64_t before = -1;

	for (size_t i = 0; i < BATCH; i++) {
		commands[2 * i] = gpu_fetch_add(counter->old + i, target, 1);
		commands[2 * i + 1] = gpu_fill(target + 1 + counter->device, i, sizeof(*target));
	}
	while (counter->rounds-- && !counter->err) {
		struct dummy_gpu_submit submit = gpu_submission(commands, 2 * BATCH);
		size_t done;

		counter->err = gpu_submit(counter->self->fd[counter->device], &submit);
		done = (submit.completed + 1) / 2;
		counter->count += done;
		for (size_t i = 0; i < done; i++) {
			counter->disordered |= (int64_t)counter->old[i] <= before;
			before = counter->old[i];
		}
	}
	return NULL;
}

static void *cpu_counts(void *arg)
{
	struct counter *counter = arg;

	while (!__atomic_load_n(counter->stop, __ATOMIC_RELAXED)) {
		__atomic_fetch_add(counter->self->target, 1, __ATOMIC_SEQ_CST);
		counter->count++;
	}
	return NULL;
}

/* Takes the page away in other ways than by an access. */
static void *others_disturb(void *arg)
{
	struct counter *counter = arg;
	uint8_t *p = counter->self->p;

	while (!__atomic_load_n(counter->stop, __ATOMIC_RELAXED)) {
		pid_t pid;

		prefetch_all(counter->self->fd[counter->count % 2], p, 3 * page,
			     DUMMY_GPU_LOCATION_DEVICE);
		madvise(p, 3 * page, MADV_PAGEOUT);
		pid = fork();
		if (!pid)
			_exit(0);
		/* mm cannot copy an exclusive page that somebody has locked: ENOMEM. */
		if (pid < 0)
			continue;
		waitpid(pid, NULL, 0);
		counter->count++;
		usleep(1000);
	}
	return NULL;
}

static void count(struct __test_metadata *_metadata, ATOMIC *self, bool disturbed)
{
	struct counter counters[DEVICES + CPUS + 1] = {};
	const size_t n = DEVICES + CPUS + disturbed;
	uint64_t sum = 0;
	bool stop = false;

	share_cpu_of_uml();
	for (size_t i = 0; i < n; i++) {
		struct counter *counter = &counters[i];

		*counter = (struct counter) {
			.self = self,
			.device = i < DEVICES ? i : -1,
			.rounds = 20 * rounds(),
			.old = self->old + i * BATCH,
			.stop = &stop,
		};
		ASSERT_EQ(0, pthread_create(&counter->thread, NULL, i < DEVICES ? device_counts :
					    i < DEVICES + CPUS ? cpu_counts : others_disturb,
					    counter));
	}
	for (size_t i = 0; i < n; i++) {
		if (i == DEVICES)
			__atomic_store_n(&stop, true, __ATOMIC_RELAXED);
		ASSERT_EQ(0, pthread_join(counters[i].thread, NULL));
		EXPECT_EQ(0, counters[i].err);
		EXPECT_LT(0, counters[i].count) TH_LOG("thread %zu", i);
		EXPECT_FALSE(counters[i].disordered);
		if (i < DEVICES)
			EXPECT_EQ(20 * BATCH * rounds(), counters[i].count);
		if (i < DEVICES + CPUS)
			sum += counters[i].count;
	}
	EXPECT_EQ(sum, cpu_load_word(self->target));
	for (int i = 0; i < DEVICES; i++)
		TH_LOG("device %d: %llu faults for %llu operations", i,
		       (unsigned long long)stats_of(_metadata, self->fd[i]).faults,
		       (unsigned long long)counters[i].count);
}

TEST_F_TIMEOUT(atomic, counters_of_cpus_and_devices_add_up, 120)
{
	count(_metadata, self, false);
}

TEST_F_TIMEOUT(atomic, counters_add_up_while_the_page_is_taken_away, 120)
{
	count(_metadata, self, true);
}

/* A lock, and what it protects, which is in another page. */
struct locked {
	ATOMIC *self;
	uint64_t *lock, *guarded;
	uint64_t *zero, *one, *old;	/* shared memory */
	bool stop;
};

static void *cpu_locks(void *arg)
{
	struct locked *l = arg;
	uint64_t count = 0;

	while (!__atomic_load_n(&l->stop, __ATOMIC_RELAXED)) {
		uint64_t free = 0;

		if (!__atomic_compare_exchange_n(l->lock, &free, 1, false, __ATOMIC_ACQUIRE,
						 __ATOMIC_RELAXED)) {
			sched_yield();
			continue;
		}
		/* Not atomic, but what the lock protects. */
		__atomic_store_n(l->guarded, __atomic_load_n(l->guarded, __ATOMIC_RELAXED) + 1,
				 __ATOMIC_RELAXED);
		count++;
		__atomic_store_n(l->lock, 0, __ATOMIC_RELEASE);
		sched_yield();
	}
	return (void *)(uintptr_t)count;
}

TEST_F_TIMEOUT(atomic, a_lock_excludes_cpus_and_the_device, 120)
{
	struct locked l = {
		.self = self,
		.lock = self->target,
		.guarded = (uint64_t *)(self->p + 2 * page),
		.zero = self->old, .one = self->old + 1, .old = self->old + 2,
	};
	struct dummy_gpu_command acquire =
		gpu_compare_exchange(l.old, l.lock, l.zero, 1);
	struct dummy_gpu_command add =
		gpu_binary(DUMMY_GPU_OP_ADD, l.guarded, l.guarded, l.one, 8);
	struct dummy_gpu_command release = gpu_fetch_add(l.old, l.lock, -1ULL);
	uint64_t mine = 0, sum = 0;
	pthread_t threads[2];
	void *count;

	share_cpu_of_uml();
	*l.one = 1;
	for (size_t i = 0; i < ARRAY_SIZE(threads); i++)
		ASSERT_EQ(0, pthread_create(&threads[i], NULL, cpu_locks, &l));
	for (int i = 0; i < 20 * rounds(); i++) {
		ASSERT_EQ(0, run(self->fd[0], acquire));
		if (*l.old)
			continue;
		ASSERT_EQ(0, run(self->fd[0], add));
		ASSERT_EQ(0, run(self->fd[0], release));
		ASSERT_EQ(1, *l.old);
		mine++;
	}
	__atomic_store_n(&l.stop, true, __ATOMIC_RELAXED);
	for (size_t i = 0; i < ARRAY_SIZE(threads); i++) {
		ASSERT_EQ(0, pthread_join(threads[i], &count));
		sum += (uintptr_t)count;
	}
	EXPECT_LT(0, mine);
	EXPECT_LT(0, sum);
	EXPECT_EQ(mine + sum, *l.guarded);
}

/* The work item takes the page itself. */
TEST_F(atomic, in_the_background)
{
	struct dummy_gpu_command command = gpu_fetch_add(self->old, self->target, 1);

	for (int i = 0; i < 50; i++) {
		struct dummy_gpu_submit submit = gpu_submission(&command, 1);
		struct dummy_gpu_wait wait;

		ASSERT_EQ(0, gpu_submit_async(self->fd[0], &submit));
		__atomic_fetch_add(self->target, 1, __ATOMIC_SEQ_CST);
		ASSERT_EQ(0, gpu_wait(self->fd[0], submit.sequence, -1ULL, &wait));
	}
	EXPECT_EQ(100, cpu_load_word(self->target));
}

TEST_HARNESS_MAIN
