// SPDX-License-Identifier: GPL-2.0
/*
 * Tests of submissions that nobody waits for in SUBMIT: a worker of the kernel
 * runs them, for a process that waits later, sleeps, is frozen, or is gone.
 */
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/time.h>

#include "dummy_gpu_harness.h"

/* The number of submissions of a file that need not be waited for. */
#define DEPTH		64

#define MS		1000000ULL
#define SECOND		(1000 * MS)

/* Submits one command: 0 or a negative errno. */
static int submit(int fd, struct dummy_gpu_command command, uint64_t *sequence)
{
	struct dummy_gpu_submit submit = gpu_submission(&command, 1);
	int err = gpu_submit_async(fd, &submit);

	*sequence = submit.sequence;
	return err;
}

/* Waits for one command: 0 or a negative errno. */
static int finish(int fd, uint64_t sequence)
{
	struct dummy_gpu_wait wait;
	int err = gpu_wait(fd, sequence, 20 * SECOND, &wait);

	return !err && (wait.completed != 1 || wait.fault_address) ? -EPROTO : err;
}

static short ready(int fd, int milliseconds)
{
	struct pollfd p = { .fd = fd, .events = POLLIN | POLLOUT };

	return poll(&p, 1, milliseconds) < 0 ? POLLNVAL : p.revents;
}

/* Memory that a userfaultfd does not give to anybody, until somebody serves it. */
struct parking {
	int uffd;
	uint8_t *p;
	uint64_t sequence;
};

/* Parks the worker of a file: 0 or a negative errno. */
static int park(int fd, struct parking *parking, uint64_t *result)
{
	parking->p = map(page, PROT_READ | PROT_WRITE);
	parking->uffd = uffd_open();
	if (parking->uffd < 0)
		return parking->uffd;
	return uffd_register(parking->uffd, parking->p, page) ?:
	       submit(fd, gpu_unary(DUMMY_GPU_OP_SUM, result, parking->p, page),
		      &parking->sequence);
}

/* Waits until the worker is parked. */
static int parked(struct parking *parking)
{
	struct uffd_msg msg;

	return read(parking->uffd, &msg, sizeof(msg)) == sizeof(msg) ? 0 : -EIO;
}

static int let_go(struct parking *parking)
{
	struct uffdio_zeropage zero = {
		.range = { .start = gpu_addr(parking->p), .len = page },
	};

	return ioctl(parking->uffd, UFFDIO_ZEROPAGE, &zero) ? -errno : 0;
}

static void end_parking(struct parking *parking)
{
	close(parking->uffd);
	munmap(parking->p, page);
}

FIXTURE(async)
{
	int fd;
	uint64_t *result;
	int64_t mapped;		/* pages that the device could access at the start */
	int64_t pages;		/* pages on the device at the start */
};

#define ASYNC	FIXTURE_DATA(async)

FIXTURE_SETUP(async)
{
	self->fd = setup_device(_metadata);
	if (self->fd < 0)
		return;
	self->result = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	ASSERT_NE(MAP_FAILED, self->result);
	self->mapped = instance_counter(0, "pages_mapped");
	self->pages = instance_pages();
}

FIXTURE_TEARDOWN(async)
{
	if (self->fd < 0)
		return;
	munmap(self->result, page);
	close(self->fd);
	/* Nothing is left of the files and processes that are gone. */
	EXPECT_TRUE(instance_counter_becomes(0, "pages_mapped", self->mapped));
	EXPECT_TRUE(instance_counter_becomes(0, "device_pages", self->pages));
}

TEST_F(async, wait_returns_what_submit_would_have)
{
	uint64_t *p = map(BUFFER, PROT_READ | PROT_WRITE), first, second;
	struct dummy_gpu_command commands[] = {
		gpu_fill(p, 1, BUFFER),
		gpu_unary(DUMMY_GPU_OP_SUM, self->result, p, BUFFER),
	};
	struct dummy_gpu_submit both = gpu_submission(commands, ARRAY_SIZE(commands));
	struct dummy_gpu_wait wait;

	ASSERT_NE(MAP_FAILED, p);
	ASSERT_EQ(0, gpu_submit_async(self->fd, &both));
	EXPECT_EQ(sizeof(both), both.size);
	EXPECT_EQ(0, both.completed);
	EXPECT_EQ(0, both.fault_address);
	first = both.sequence;
	EXPECT_NE(0, first);
	ASSERT_EQ(0, gpu_wait(self->fd, first, 20 * SECOND, &wait));
	EXPECT_EQ(sizeof(wait), wait.size);
	EXPECT_EQ(1, wait.ended);
	EXPECT_EQ(2, wait.completed);
	EXPECT_EQ(0, wait.fault_address);
	EXPECT_EQ(BUFFER / 8 * 0x0101010101010101ULL, *self->result);
	EXPECT_EQ(2, stats_of(_metadata, self->fd).commands);

	/* Another number each time, and each outcome once. */
	ASSERT_EQ(0, submit(self->fd, commands[0], &second));
	EXPECT_EQ(first + 1, second);
	EXPECT_EQ(-EINVAL, gpu_wait(self->fd, first, 20 * SECOND, &wait));
	EXPECT_EQ(-EINVAL, gpu_wait(self->fd, 0, 20 * SECOND, &wait));
	EXPECT_EQ(-EINVAL, gpu_wait(self->fd, second + 1, 20 * SECOND, &wait));
	EXPECT_EQ(0, finish(self->fd, second));
	EXPECT_EQ(-EINVAL, finish(self->fd, second));

	/* Without the flag there is no number. */
	both.flags = 0;
	ASSERT_EQ(0, gpu_submit(self->fd, &both));
	EXPECT_EQ(0, both.sequence);
	EXPECT_EQ(2, both.completed);
	munmap(p, BUFFER);
}

TEST_F(async, errors_reach_wait)
{
	uint8_t *p = map(4 * page, PROT_READ | PROT_WRITE);
	struct dummy_gpu_command commands[3] = {
		gpu_fill(p, 1, page),
		gpu_fill(p + page, 1, 2 * page),
		gpu_fill(p, 2, page),
	};
	struct dummy_gpu_submit submit = gpu_submission(commands, ARRAY_SIZE(commands));
	struct dummy_gpu_wait wait;

	ASSERT_NE(MAP_FAILED, p);
	ASSERT_EQ(0, munmap(p + 2 * page, page));
	ASSERT_EQ(0, gpu_submit_async(self->fd, &submit));
	EXPECT_EQ(-EFAULT, gpu_wait(self->fd, submit.sequence, 20 * SECOND, &wait));
	EXPECT_EQ(1, wait.ended);
	EXPECT_EQ(1, wait.completed);
	EXPECT_EQ(gpu_addr(p + 2 * page), wait.fault_address);
	EXPECT_EQ(1, p[0]);

	ASSERT_EQ(0, mprotect(p + page, page, PROT_READ));
	ASSERT_EQ(0, gpu_submit_async(self->fd, &submit));
	EXPECT_EQ(-EPERM, gpu_wait(self->fd, submit.sequence, 20 * SECOND, &wait));
	EXPECT_EQ(1, wait.ended);
	EXPECT_EQ(1, wait.completed);
	EXPECT_EQ(gpu_addr(p + page), wait.fault_address);

	/* An outcome of nothing is no outcome. */
	EXPECT_EQ(-EINVAL, gpu_wait(self->fd, submit.sequence, 20 * SECOND, &wait));
	EXPECT_EQ(0, wait.ended);
	EXPECT_EQ(0, wait.completed);
	munmap(p, 4 * page);
}

TEST_F(async, bad_arguments_change_nothing)
{
	struct dummy_gpu_command command = gpu_fill(self->result, 1, 8);
	struct dummy_gpu_submit submit = gpu_submission(&command, 1);
	struct dummy_gpu_wait wait = { .size = sizeof(wait) };
	struct dummy_gpu_stats before = stats_of(_metadata, self->fd);

	submit.flags = 2;
	EXPECT_EQ(-EINVAL, gpu_submit(self->fd, &submit));
	command.reserved = 1;
	submit.flags = 0;
	EXPECT_EQ(-EINVAL, gpu_submit_async(self->fd, &submit));
	EXPECT_EQ(0, submit.sequence);
	command.reserved = 0;
	command.dst = KERNEL_ADDRESS;
	EXPECT_EQ(-EFAULT, gpu_submit_async(self->fd, &submit));

	wait.flags = 1;
	EXPECT_EQ(-EINVAL, gpu_ioctl(self->fd, DUMMY_GPU_IOC_WAIT, &wait));
	wait.flags = 0;
	wait.size = sizeof(wait) - 8;
	EXPECT_EQ(-EINVAL, gpu_ioctl(self->fd, DUMMY_GPU_IOC_WAIT, &wait));
	EXPECT_EQ(-EFAULT, gpu_ioctl(self->fd, DUMMY_GPU_IOC_WAIT, NULL));
	EXPECT_EQ(POLLOUT, ready(self->fd, 0));
	expect_idle(_metadata, self->fd, &before);
}

TEST_F(async, submissions_run_in_order)
{
	uint64_t *p = map(2 * page, PROT_READ | PROT_WRITE), sequence[DEPTH];
	uint64_t *one = p + page / sizeof(*p);

	ASSERT_NE(MAP_FAILED, p);
	*one = 1;
	/* x += x, x += 1: any other order gives another result. */
	for (size_t i = 0; i < ARRAY_SIZE(sequence); i++) {
		const uint64_t *other = i & 1 ? p : one;

		ASSERT_EQ(0, submit(self->fd, gpu_binary(DUMMY_GPU_OP_ADD, p, p, other, 8),
				    &sequence[i]));
	}
	EXPECT_EQ(0, finish(self->fd, sequence[DEPTH - 1]));
	EXPECT_EQ((2ULL << DEPTH / 2) - 2, *p);
	/* In any order, since they have ended. */
	for (size_t i = DEPTH - 1; i-- > 0;)
		EXPECT_EQ(0, finish(self->fd, sequence[i]));
	munmap(p, 2 * page);
}

TEST_F(async, a_wait_ends_in_time)
{
	struct parking parking;
	struct dummy_gpu_wait wait;
	uint64_t start;

	ASSERT_EQ(0, park(self->fd, &parking, self->result));
	ASSERT_EQ(0, parked(&parking));
	EXPECT_EQ(-ETIME, gpu_wait(self->fd, parking.sequence, 0, &wait));
	start = microseconds();
	EXPECT_EQ(-ETIME, gpu_wait(self->fd, parking.sequence, 50 * MS, &wait));
	EXPECT_LE(50 * 1000, microseconds() - start);
	EXPECT_EQ(0, wait.timeout);
	EXPECT_EQ(0, wait.ended);
	EXPECT_EQ(0, wait.completed);

	ASSERT_EQ(0, let_go(&parking));
	EXPECT_EQ(0, gpu_wait(self->fd, parking.sequence, ~0ULL, &wait));
	EXPECT_EQ(1, wait.completed);
	EXPECT_EQ(0, *self->result);
	end_parking(&parking);
}

static void no_op(int sig)
{
	(void)sig;
}

TEST_F(async, signals_end_or_restart_a_wait)
{
	struct itimerval often = { { 0, 20000 }, { 0, 20000 } }, off = {};
	struct sigaction action = { .sa_handler = no_op };
	struct parking parking;
	struct dummy_gpu_wait wait;
	uint64_t start;

	ASSERT_EQ(0, park(self->fd, &parking, self->result));
	ASSERT_EQ(0, parked(&parking));
	ASSERT_EQ(0, sigaction(SIGALRM, &action, NULL));
	ASSERT_EQ(0, setitimer(ITIMER_REAL, &often, NULL));
	EXPECT_EQ(-EINTR, gpu_wait(self->fd, parking.sequence, 20 * SECOND, &wait));
	EXPECT_GT(20 * SECOND, wait.timeout);
	EXPECT_LT(0, wait.timeout);
	EXPECT_EQ(0, wait.ended);

	/* Started again, it waits for the rest of the time only. */
	ASSERT_EQ(0, setitimer(ITIMER_REAL, &off, NULL));
	action.sa_flags = SA_RESTART;
	ASSERT_EQ(0, sigaction(SIGALRM, &action, NULL));
	ASSERT_EQ(0, setitimer(ITIMER_REAL, &often, NULL));
	start = microseconds();
	EXPECT_EQ(-ETIME, gpu_wait(self->fd, parking.sequence, 200 * MS, &wait));
	EXPECT_LE(200 * 1000, microseconds() - start);
	EXPECT_GT(10 * 1000 * 1000, microseconds() - start);
	ASSERT_EQ(0, setitimer(ITIMER_REAL, &off, NULL));

	ASSERT_EQ(0, let_go(&parking));
	EXPECT_EQ(0, finish(self->fd, parking.sequence));
	end_parking(&parking);
}

TEST_F(async, poll_says_when_there_is_an_outcome)
{
	struct epoll_event event = { .events = EPOLLIN | EPOLLET };
	int epoll = epoll_create1(EPOLL_CLOEXEC);
	struct parking parking;

	ASSERT_LE(0, epoll);
	ASSERT_EQ(0, epoll_ctl(epoll, EPOLL_CTL_ADD, self->fd, &event));
	EXPECT_EQ(POLLOUT, ready(self->fd, 0));
	ASSERT_EQ(0, park(self->fd, &parking, self->result));
	ASSERT_EQ(0, parked(&parking));
	EXPECT_EQ(POLLOUT, ready(self->fd, 0));
	EXPECT_EQ(0, epoll_wait(epoll, &event, 1, 20));

	ASSERT_EQ(0, let_go(&parking));
	EXPECT_EQ(1, epoll_wait(epoll, &event, 1, 20000));
	EXPECT_EQ(EPOLLIN, event.events);
	EXPECT_EQ(POLLIN | POLLOUT, ready(self->fd, 0));
	EXPECT_EQ(0, finish(self->fd, parking.sequence));
	EXPECT_EQ(POLLOUT, ready(self->fd, 0));
	end_parking(&parking);
	close(epoll);
}

TEST_F(async, a_full_queue_refuses)
{
	uint64_t sequence[DEPTH], more;
	struct dummy_gpu_command command = gpu_fill(self->result, 1, 8);
	struct parking parking;

	ASSERT_EQ(0, park(self->fd, &parking, self->result + 1));
	sequence[0] = parking.sequence;
	for (size_t i = 1; i < DEPTH; i++)
		ASSERT_EQ(0, submit(self->fd, command, &sequence[i]));
	EXPECT_EQ(-EAGAIN, submit(self->fd, command, &more));
	EXPECT_EQ(0, ready(self->fd, 0));

	/* An outcome that nobody asked for takes room as well. */
	ASSERT_EQ(0, parked(&parking));
	ASSERT_EQ(0, let_go(&parking));
	EXPECT_EQ(POLLIN, ready(self->fd, 20000));
	EXPECT_EQ(-EAGAIN, submit(self->fd, command, &more));
	EXPECT_EQ(0, finish(self->fd, sequence[7]));
	EXPECT_EQ(POLLIN | POLLOUT, ready(self->fd, 0));
	EXPECT_EQ(0, submit(self->fd, command, &sequence[7]));
	for (size_t i = 0; i < DEPTH; i++) {
		EXPECT_EQ(0, finish(self->fd, sequence[i]))
			TH_LOG("%zu", i);
	}
	end_parking(&parking);
}

/* More than the kernel runs at a time of work items that wait, if they share a queue. */
#define FILES	40

TEST_F(async, a_parked_worker_holds_up_its_own_file_only)
{
	struct parking parking[FILES];
	int fd[FILES];
	uint64_t sequence, *p = map(page, PROT_READ | PROT_WRITE);

	ASSERT_NE(MAP_FAILED, p);
	for (size_t i = 0; i < FILES; i++) {
		fd[i] = gpu_open(GPU_DEVICE);
		ASSERT_LE(0, fd[i]);
		ASSERT_EQ(0, park(fd[i], &parking[i], self->result));
	}
	for (size_t i = 0; i < FILES; i++)
		ASSERT_EQ(0, parked(&parking[i]));

	ASSERT_EQ(0, submit(self->fd, gpu_fill(p, 3, page), &sequence));
	EXPECT_EQ(0, finish(self->fd, sequence));
	EXPECT_EQ(page, cpu_unlike(p, 3, page));
	/* And in its own file, commands of the synchronous kind go on. */
	EXPECT_EQ(0, run(fd[0], gpu_fill(p, 4, page)));

	for (size_t i = 0; i < FILES; i++) {
		ASSERT_EQ(0, let_go(&parking[i]));
		EXPECT_EQ(0, finish(fd[i], parking[i].sequence));
		end_parking(&parking[i]);
		close(fd[i]);
	}
	munmap(p, page);
}

/* Two workers access the same pages, which other threads take away. */
struct taker {
	uint8_t *p;
	size_t length;
	bool stop;
};

static void *take_thread(void *arg)
{
	struct taker *taker = arg;

	while (!__atomic_load_n(&taker->stop, __ATOMIC_ACQUIRE)) {
		madvise(taker->p, taker->length, MADV_DONTNEED);
		usleep(100);
	}
	return NULL;
}

TEST_F(async, two_workers_fault_the_same_window)
{
	static const char *const path[] = { GPU_DEVICE, GPU_DEVICE, GPU_DEVICE_2 };
	struct taker taker = { .length = 64 * page };
	uint64_t sequence[3][8];
	pthread_t thread;
	int fd[3];

	taker.p = map(taker.length, PROT_READ | PROT_WRITE);
	ASSERT_NE(MAP_FAILED, taker.p);
	for (size_t i = 0; i < ARRAY_SIZE(fd); i++) {
		fd[i] = gpu_open(path[i]);
		ASSERT_LE(0, fd[i]);
	}
	share_cpu_of_uml();
	ASSERT_EQ(0, pthread_create(&thread, NULL, take_thread, &taker));
	for (int round = 0; round < rounds(); round++) {
		for (size_t i = 0; i < 3 * 8; i++)
			ASSERT_EQ(0, submit(fd[i / 8], gpu_fill(taker.p, 5, taker.length),
					    &sequence[i / 8][i % 8]));
		for (size_t i = 0; i < 3 * 8; i++)
			ASSERT_EQ(0, finish(fd[i / 8], sequence[i / 8][i % 8]));
	}
	__atomic_store_n(&taker.stop, true, __ATOMIC_RELEASE);
	ASSERT_EQ(0, pthread_join(thread, NULL));
	ASSERT_EQ(0, submit(fd[0], gpu_fill(taker.p, 6, taker.length), &sequence[0][0]));
	EXPECT_EQ(0, finish(fd[0], sequence[0][0]));
	EXPECT_EQ(taker.length, cpu_unlike(taker.p, 6, taker.length));
	for (size_t i = 0; i < ARRAY_SIZE(fd); i++)
		close(fd[i]);
	munmap(taker.p, taker.length);
}

/* How a process leaves the work that it has submitted behind. */
enum leave {
	LEAVE_EXIT,
	LEAVE_KILLED,
	LEAVE_EXEC,
	LEAVE_CLOSE,
	LEAVES,
};

/* Submits more work than gets done, and leaves it after some time. */
static void leaving_child(enum leave leave, unsigned int after)
{
	const size_t length = 256 * page;
	uint8_t *p = map(length, PROT_READ | PROT_WRITE);
	/* exec() does not close the file here. */
	int fd = open(GPU_DEVICE, O_RDWR), null;
	uint64_t sequence;

	if (fd < 0)
		_exit(1);
	for (int i = 0; i < DEPTH; i++) {
		if (submit(fd, gpu_fill(p, i, length), &sequence))
			_exit(2);
	}
	usleep(after);
	switch (leave) {
	case LEAVE_KILLED:
		kill(getpid(), SIGKILL);
		break;
	case LEAVE_EXEC:
		/* The harness lists its tests and ends. */
		null = open("/dev/null", O_WRONLY);
		if (null < 0 || dup2(null, 1) < 0 || dup2(null, 2) < 0)
			_exit(3);
		execl("/proc/self/exe", "list", "-l", NULL);
		_exit(5);
	case LEAVE_CLOSE:
		close(fd);
		break;
	default:
		break;
	}
	_exit(0);
}

TEST_F(async, a_process_leaves_its_work_behind)
{
	uint64_t seed = 1;

	for (int round = 0; round < rounds(); round++) {
		enum leave leave = round % LEAVES;
		uint64_t start;
		int status;
		pid_t pid;

		pid = fork();
		ASSERT_LE(0, pid);
		if (!pid)
			leaving_child(leave, cpu_random(&seed) % 20000);
		cpu_random(&seed);
		start = microseconds();
		status = wait_child(pid, 20);
		/* Within a second after it leaves. */
		EXPECT_GT(2 * 1000 * 1000, microseconds() - start);
		ASSERT_NE(-1, status);
		if (leave == LEAVE_KILLED) {
			EXPECT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
		} else {
			EXPECT_EQ(leave == LEAVE_EXEC ? KSFT_SKIP : 0, WEXITSTATUS(status))
				TH_LOG("leave %d", leave);
		}
	}
}

/* A process is killed while its worker waits for a userfaultfd of somebody else. */
TEST_F(async, a_parked_worker_does_not_hold_up_the_end_of_its_process)
{
	int pipes[2], theirs, ours, pidfd;
	char token[20] = "";
	uint64_t start;
	pid_t pid;

	ASSERT_EQ(0, pipe(pipes));
	pid = fork();
	ASSERT_LE(0, pid);
	if (!pid) {
		int fd = gpu_open(GPU_DEVICE);
		struct parking parking;

		if (fd < 0 || park(fd, &parking, self->result))
			_exit(1);
		snprintf(token, sizeof(token), "%d", parking.uffd);
		if (write(pipes[1], token, sizeof(token)) != sizeof(token))
			_exit(2);
		for (;;)
			pause();
	}
	ASSERT_EQ(sizeof(token), read(pipes[0], token, sizeof(token)));
	theirs = atoi(token);
	pidfd = syscall(__NR_pidfd_open, pid, 0);
	ASSERT_LE(0, pidfd);
	ours = syscall(__NR_pidfd_getfd, pidfd, theirs, 0);
	ASSERT_LE(0, ours) TH_LOG("%s", strerror(errno));
	ASSERT_EQ(0, parked(&(struct parking){ .uffd = ours }));

	start = microseconds();
	ASSERT_EQ(0, kill(pid, SIGKILL));
	EXPECT_NE(-1, wait_child(pid, 20));
	EXPECT_GT(1000 * 1000, microseconds() - start);

	/* The address space goes when the worker is let go. The teardown sees it. */
	close(ours);
	close(pidfd);
	close(pipes[0]);
	close(pipes[1]);
}

TEST_F(async, a_closed_file_starts_no_command)
{
	uint64_t *p = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	const size_t length = 16 << 20;
	uint8_t *q = map(length, PROT_READ | PROT_WRITE);
	uint64_t sequence, closed;
	int fd = gpu_open(GPU_DEVICE);

	ASSERT_NE(MAP_FAILED, p);
	ASSERT_NE(MAP_FAILED, q);
	ASSERT_LE(0, fd);
	p[1] = 1;
	for (int i = 0; i < DEPTH / 2; i++) {
		ASSERT_EQ(0, submit(fd, gpu_fill(q, i, length), &sequence));
		ASSERT_EQ(0, submit(fd, gpu_binary(DUMMY_GPU_OP_ADD, p, p, p + 1, 8), &sequence));
	}
	while (!__atomic_load_n(p, __ATOMIC_RELAXED))
		usleep(100);
	close(fd);
	closed = __atomic_load_n(p, __ATOMIC_RELAXED);
	usleep(500 * 1000);
	/* No step begins afterwards; one may have been running. */
	EXPECT_GE(closed + 1, __atomic_load_n(p, __ATOMIC_RELAXED));
	munmap(p, page);
	munmap(q, length);
}

TEST_F(async, another_process_cannot_wait)
{
	uint64_t sequence;
	pid_t pid;

	ASSERT_EQ(0, submit(self->fd, gpu_fill(self->result, 1, 8), &sequence));
	pid = fork();
	ASSERT_LE(0, pid);
	if (!pid) {
		struct dummy_gpu_wait wait;
		int err = gpu_wait(self->fd, sequence, 0, &wait);

		_exit(err == -EPERM && wait.ended == GPU_UNTOUCHED &&
		      ready(self->fd, 0) & POLLOUT ? 0 : 1);
	}
	EXPECT_EQ(0, wait_child(pid, 20));
	EXPECT_EQ(0, finish(self->fd, sequence));
}

/* A wait that the sleep of the system interrupts. */
struct sleeper {
	int fd;
	uint64_t sequence;
	int err;
};

static void *sleep_thread(void *arg)
{
	struct sleeper *sleeper = arg;

	sleeper->err = finish(sleeper->fd, sleeper->sequence);
	return NULL;
}

/*
 * The system goes to sleep until all tasks are frozen, and wakes up again. (The
 * device has no part in what follows; not every device of an emulator survives
 * it.) A file with work in flight does not keep the system awake: not the work,
 * nor a task that waits for it, nor a worker that waits for a userfaultfd.
 * Nothing stays on the device, and all goes on afterwards.
 */
TEST_F(async, work_goes_on_after_the_system_has_slept)
{
	const size_t length = 8 << 20;
	uint8_t *p = map(length, PROT_READ | PROT_WRITE);
	int stuck = gpu_open(GPU_DEVICE), tests;
	struct sleeper sleeper = { .fd = self->fd };
	uint64_t sequence[DEPTH], start;
	struct dummy_gpu_stats before, after;
	struct parking parking;
	pthread_t thread;
	pid_t pid;

	tests = open("/sys/power/pm_test", O_RDWR | O_CLOEXEC);
	if (tests < 0)
		SKIP(return, "no pm_test: %s", strerror(errno));
	ASSERT_NE(MAP_FAILED, p);
	ASSERT_LE(0, stuck);
	ASSERT_EQ(0, run(self->fd, gpu_fill(p, 1, length)));
	for (int i = 0; i < DEPTH; i++)
		ASSERT_EQ(0, submit(self->fd, gpu_fill(p, i, length), &sequence[i]));
	sleeper.sequence = sequence[DEPTH - 1];
	ASSERT_EQ(0, pthread_create(&thread, NULL, sleep_thread, &sleeper));
	ASSERT_EQ(0, park(stuck, &parking, self->result));
	ASSERT_EQ(0, parked(&parking));
	pid = fork();
	ASSERT_LE(0, pid);
	if (!pid) {
		int fd = gpu_open(GPU_DEVICE), err = fd < 0;

		prctl(PR_SET_PDEATHSIG, SIGKILL);
		for (int i = 0; i < 20 && !err; i++)
			err = run(fd, gpu_fill(p, i, length)) || cpu_load(p) != i;
		_exit(err);
	}
	before = stats_of(_metadata, self->fd);

	write_to("/sys/module/suspend/parameters/pm_test_delay", "1");
	ASSERT_LT(0, write(tests, "freezer", 7));
	start = microseconds();
	EXPECT_TRUE(write_to("/sys/power/state", "freeze"))
		TH_LOG("%s", strerror(errno));
	EXPECT_LE(1000 * 1000, microseconds() - start);
	ASSERT_LT(0, write(tests, "none", 4));
	write_to("/sys/module/suspend/parameters/pm_test_delay", "5");
	close(tests);

	after = stats_of(_metadata, self->fd);
	if (before.device_pages)
		EXPECT_LT(before.pages_evicted, after.pages_evicted);
	ASSERT_EQ(0, pthread_join(thread, NULL));
	EXPECT_EQ(0, sleeper.err);
	for (int i = 0; i < DEPTH - 1; i++)
		EXPECT_EQ(0, finish(self->fd, sequence[i]));
	EXPECT_EQ(length, cpu_unlike(p, DEPTH - 1, length));
	EXPECT_EQ(0, wait_child(pid, 20));
	ASSERT_EQ(0, let_go(&parking));
	EXPECT_EQ(0, finish(stuck, parking.sequence));
	end_parking(&parking);
	close(stuck);
	munmap(p, length);
}

TEST_HARNESS_MAIN
