// SPDX-License-Identifier: GPL-2.0-only
/*
 * Tests of samples/rust/rust_driver_hmm.rs: a PCI device accesses memory by
 * DMA while the process changes it.
 *
 * Each page takes two transfers of 100 ms, so few pages are copied. A transfer
 * that has begun cannot be stopped: what takes its page away has to wait.
 */
#include <dirent.h>
#include <glob.h>
#include <pthread.h>

#include "dummy_gpu_harness.h"

#define NODE		"/dev/rust_hmm"
#define DRIVER		"/sys/bus/pci/drivers/rust_driver_hmm"
#define COPY		_IOW('|', 0x90, __u64[3])
#define MAX_PAGES	64
#define TRANSFER_US	100000

/* Copies on the device: 0 or a negative errno. */
static int copy(int fd, void *to, const void *from, size_t length)
{
	__u64 arguments[3] = { gpu_addr(from), gpu_addr(to), length };

	return gpu_ioctl(fd, COPY, arguments);
}

struct copier {
	int fd;
	void *to;
	const void *from;
	size_t length;
	int err;
	pthread_t thread;
};

static struct copier copier_of(int fd, void *to, const void *from, size_t length)
{
	return (struct copier){ .fd = fd, .to = to, .from = from, .length = length };
}

static void *copy_thread(void *arg)
{
	struct copier *copier = arg;

	copier->err = copy(copier->fd, copier->to, copier->from, copier->length);
	return NULL;
}

static int copy_begins(struct copier *copier)
{
	return -pthread_create(&copier->thread, NULL, copy_thread, copier);
}

static int copy_ended(struct copier *copier)
{
	return -pthread_join(copier->thread, NULL) ?: copier->err;
}

static void sleep_us(unsigned int us)
{
	struct timespec time = { us / 1000000, us % 1000000 * 1000 };

	nanosleep(&time, NULL);
}

/* The name of the device that the driver is bound to. */
static bool bound_device(char name[32])
{
	DIR *dir = opendir(DRIVER);
	struct dirent *entry;
	bool found = false;

	while (dir && !found && (entry = readdir(dir))) {
		found = strchr(entry->d_name, ':');
		if (found)
			snprintf(name, 32, "%.31s", entry->d_name);
	}
	if (dir)
		closedir(dir);
	return found;
}

FIXTURE(edu)
{
	int fd;
	uint8_t *from;
	uint8_t *to;
};

#define EDU	FIXTURE_DATA(edu)

FIXTURE_SETUP(edu)
{
	page = sysconf(_SC_PAGESIZE);
	self->fd = gpu_open(NODE);
	if (self->fd == -ENOENT)
		SKIP(return, "no " NODE);
	ASSERT_LE(0, self->fd);
	self->from = map(4 * page, PROT_READ | PROT_WRITE);
	self->to = map(4 * page, PROT_READ | PROT_WRITE);
	ASSERT_NE(MAP_FAILED, self->from);
	ASSERT_NE(MAP_FAILED, self->to);
	cpu_randomize(self->from, 4 * page, 1);
}

FIXTURE_TEARDOWN(edu)
{
	if (self->fd < 0)
		return;
	munmap(self->from, 4 * page);
	munmap(self->to, 4 * page);
	close(self->fd);
}

TEST_F(edu, copies_any_bytes)
{
	memset(self->to, 7, 4 * page);
	ASSERT_EQ(0, copy(self->fd, self->to + 100, self->from + 3, 2 * page));
	EXPECT_EQ(2 * page, cpu_differs(self->to + 100, self->from + 3, 2 * page));
	EXPECT_EQ(100, cpu_unlike(self->to, 7, 100));
	EXPECT_EQ(2 * page - 100, cpu_unlike(self->to + 2 * page + 100, 7, 2 * page - 100));
	/* Within one page. */
	ASSERT_EQ(0, copy(self->fd, self->from, self->from + 64, 64));
	EXPECT_EQ(64, cpu_differs(self->from, self->from + 64, 64));
	EXPECT_EQ(0, copy(self->fd, self->to, self->from, 0));
}

TEST_F(edu, bad_arguments_have_an_error)
{
	uint8_t *hole = map(page, PROT_READ | PROT_WRITE);
	pid_t pid;

	ASSERT_NE(MAP_FAILED, hole);
	EXPECT_EQ(-ENOTTY, gpu_ioctl(self->fd, COPY + 1, NULL));
	EXPECT_EQ(-EFAULT, gpu_ioctl(self->fd, COPY, NULL));
	EXPECT_EQ(-EINVAL, copy(self->fd, self->to, self->from, MAX_PAGES * page + 1));
	EXPECT_EQ(-EFAULT, copy(self->fd, (void *)-1UL, self->from, 2));
	EXPECT_EQ(-EFAULT, copy(self->fd, (void *)KERNEL_ADDRESS, self->from, 1));
	munmap(hole, page);
	EXPECT_EQ(-EFAULT, copy(self->fd, hole, self->from, 1));
	EXPECT_EQ(-EFAULT, copy(self->fd, self->to, hole, 1));
	ASSERT_EQ(0, mprotect(self->to, page, PROT_READ));
	EXPECT_EQ(-EPERM, copy(self->fd, self->to, self->from, 1));
	EXPECT_EQ(0, self->to[0]);
	ASSERT_EQ(0, mprotect(self->to, page, PROT_NONE));
	EXPECT_EQ(-EFAULT, copy(self->fd, self->from, self->to, 1));

	pid = fork();
	ASSERT_LE(0, pid);
	if (!pid)
		_exit(copy(self->fd, self->to, self->from, 1) == -EPERM ? 0 : 1);
	EXPECT_EQ(0, wait_child(pid, 20));
}

TEST_F(edu, copies_memory_of_files)
{
	int memfd = memfd_create("edu", MFD_CLOEXEC), fd = temporary_file(2 * page);
	uint8_t *shared, *private, byte;

	ASSERT_LE(0, memfd);
	ASSERT_LE(0, fd);
	ASSERT_EQ(0, ftruncate(memfd, 2 * page));
	shared = mmap(NULL, 2 * page, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0);
	private = mmap(NULL, 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
	ASSERT_NE(MAP_FAILED, shared);
	ASSERT_NE(MAP_FAILED, private);
	/* What the device writes reaches the file, or not. */
	ASSERT_EQ(0, copy(self->fd, shared, self->from, page));
	ASSERT_EQ(0, copy(self->fd, private, shared, page));
	EXPECT_EQ(page, cpu_differs(private, self->from, page));
	EXPECT_EQ(1, pread(memfd, &byte, 1, 5));
	EXPECT_EQ(self->from[5], byte);
	EXPECT_EQ(1, pread(fd, &byte, 1, 5));
	EXPECT_EQ(0, byte);
	/* The end of the file is the end of the memory. */
	ASSERT_EQ(0, ftruncate(memfd, page));
	EXPECT_EQ(-EFAULT, copy(self->fd, shared + page, self->from, 1));
	munmap(shared, 2 * page);
	munmap(private, 2 * page);
	close(memfd);
	close(fd);
}

TEST_F(edu, copies_of_several_threads)
{
	struct copier copiers[3];

	for (size_t i = 0; i < ARRAY_SIZE(copiers); i++) {
		/* Other bytes of the pages than the thread before. */
		uint8_t *to = self->to + i * page + 40 * i;

		copiers[i] = copier_of(self->fd, to, self->from + i * page + 8 * i, 512);
		ASSERT_EQ(0, copy_begins(&copiers[i]));
	}
	for (size_t i = 0; i < ARRAY_SIZE(copiers); i++) {
		struct copier *c = &copiers[i];

		EXPECT_EQ(0, copy_ended(c));
		EXPECT_EQ(c->length, cpu_differs(c->to, c->from, c->length));
	}
}

/* The memory of another PCI device: of an NVMe controller, for example. */
TEST_F(edu, memory_of_another_device_is_refused)
{
	glob_t found = {};
	uint8_t *p;
	int fd;

	if (glob("/sys/bus/pci/devices/*/p2pmem/allocate", 0, NULL, &found))
		SKIP(return, "no peer-to-peer memory");
	fd = open(found.gl_pathv[0], O_RDWR | O_CLOEXEC);
	ASSERT_LE(0, fd);
	p = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	ASSERT_NE(MAP_FAILED, p);
	cpu_store(p, 1);
	EXPECT_EQ(1, cpu_load(p));
	EXPECT_EQ(-EFAULT, copy(self->fd, p, self->from, 1));
	EXPECT_EQ(-EFAULT, copy(self->fd, self->to, p, 1));
	EXPECT_EQ(1, cpu_load(p));
	munmap(p, page);
	close(fd);
	globfree(&found);
}

/* What takes a page away waits for the device, which still writes to it. */
static void taken_away(struct __test_metadata *_metadata, EDU *self, int (*take)(uint8_t *p))
{
	struct copier copier = copier_of(self->fd, self->to, self->from, page);
	uint8_t *others[8];
	uint64_t start;

	self->to[0] = 1;
	ASSERT_EQ(0, copy_begins(&copier));
	/* In the second transfer, which writes. */
	sleep_us(TRANSFER_US * 3 / 2);
	start = microseconds();
	ASSERT_EQ(0, take(self->to));
	TH_LOG("%llu us", (unsigned long long)(microseconds() - start));

	/* Memory that has become free belongs to others now. */
	for (size_t i = 0; i < ARRAY_SIZE(others); i++) {
		others[i] = map(MAX_PAGES * page, PROT_READ | PROT_WRITE);
		ASSERT_NE(MAP_FAILED, others[i]);
		memset(others[i], 0x5a, MAX_PAGES * page);
	}
	copy_ended(&copier);
	sleep_us(2 * TRANSFER_US);
	for (size_t i = 0; i < ARRAY_SIZE(others); i++) {
		EXPECT_EQ(MAX_PAGES * page, cpu_unlike(others[i], 0x5a, MAX_PAGES * page));
		munmap(others[i], MAX_PAGES * page);
	}
}

static int take_by_unmap(uint8_t *p)
{
	return munmap(p, page);
}

static int take_by_discard(uint8_t *p)
{
	return madvise(p, page, MADV_DONTNEED);
}

TEST_F(edu, unmapped_memory_is_never_written)
{
	for (int i = 0; i < 3; i++) {
		taken_away(_metadata, self, take_by_unmap);
		ASSERT_EQ(self->to, map_at(self->to, page));
	}
}

TEST_F(edu, discarded_memory_is_never_written)
{
	for (int i = 0; i < 3; i++)
		taken_away(_metadata, self, take_by_discard);
}

TEST_F(edu, truncated_memory_is_never_written)
{
	int fd = memfd_create("edu", MFD_CLOEXEC);
	struct copier copier = copier_of(self->fd, NULL, self->from, page);
	uint8_t *p, byte;

	ASSERT_LE(0, fd);
	ASSERT_EQ(0, ftruncate(fd, page));
	p = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	ASSERT_NE(MAP_FAILED, p);
	copier.to = p;
	ASSERT_EQ(0, copy_begins(&copier));
	sleep_us(TRANSFER_US * 3 / 2);
	ASSERT_EQ(0, ftruncate(fd, 0));
	ASSERT_EQ(0, ftruncate(fd, page));
	copy_ended(&copier);
	sleep_us(2 * TRANSFER_US);
	EXPECT_EQ(1, pread(fd, &byte, 1, 0));
	EXPECT_EQ(0, byte);
	munmap(p, page);
	close(fd);
}

static int protect_and_back(uint8_t *p)
{
	return mprotect(p, page, PROT_READ) ?: mprotect(p, page, PROT_READ | PROT_WRITE);
}

TEST_F(edu, a_protection_waits_for_the_device)
{
	struct copier copier = copier_of(self->fd, self->to, self->from, page);
	uint8_t last;

	ASSERT_EQ(0, copy_begins(&copier));
	sleep_us(TRANSFER_US * 3 / 2);
	ASSERT_EQ(0, mprotect(self->to, page, PROT_READ));
	last = self->to[page - 1];
	sleep_us(2 * TRANSFER_US);
	EXPECT_EQ(last, self->to[page - 1]);
	copy_ended(&copier);
	ASSERT_EQ(0, protect_and_back(self->to));
	EXPECT_EQ(0, copy(self->fd, self->to, self->from, page));
	EXPECT_EQ(page, cpu_differs(self->to, self->from, page));
}

struct disturber {
	uint8_t *p;
	bool stop;
};

/* Takes pages away, while the CPU writes to others. */
static void *disturb_thread(void *arg)
{
	struct disturber *disturber = arg;

	for (unsigned int i = 0; !__atomic_load_n(&disturber->stop, __ATOMIC_ACQUIRE); i++) {
		pid_t pid;

		switch (i % 4) {
		case 0:
			protect_and_back(disturber->p);
			break;
		case 1:
			madvise(disturber->p, 2 * page, MADV_PAGEOUT);
			break;
		case 2:
			pid = fork();
			if (!pid)
				_exit(0);
			waitpid(pid, NULL, 0);
			break;
		case 3:
			cpu_store(disturber->p + 2 * page, i);
			break;
		}
		/* A copy needs 200 ms in which nobody takes its pages away. */
		sleep_us(230000 + i * 7919 % 50000);
	}
	return NULL;
}

TEST_F_TIMEOUT(edu, the_copy_is_right_whatever_the_process_does, 120)
{
	struct disturber disturber = { .p = self->to };
	pthread_t thread;

	ASSERT_EQ(0, pthread_create(&thread, NULL, disturb_thread, &disturber));
	for (int i = 0; i < 3; i++) {
		int err;

		cpu_randomize(self->from, 2 * page, i);
		/* EPERM: the page is read-only for a moment. */
		do {
			err = copy(self->fd, self->to, self->from, 2 * page);
		} while (err == -EBUSY || err == -EPERM);
		EXPECT_EQ(0, err);
		EXPECT_EQ(2 * page, cpu_differs(self->to, self->from, 2 * page));
	}
	__atomic_store_n(&disturber.stop, true, __ATOMIC_RELEASE);
	pthread_join(thread, NULL);
}

/* What the device writes is not lost, though no CPU has made the page dirty. */
TEST_F(edu, reclaim_keeps_what_the_device_wrote)
{
	int err = swap_on("/dev/ram0");

	if (err && err != -EBUSY)
		SKIP(return, "no swap");

	/* A page that could be dropped, as far as the CPUs know. */
	memset(self->to, 1, 2 * page);
	ASSERT_EQ(0, madvise(self->to, 2 * page, MADV_FREE));
	ASSERT_EQ(0, copy(self->fd, self->to, self->from, page));
	EXPECT_EQ(1, swap_out(self->to, page));
	EXPECT_EQ(page, cpu_differs(self->to, self->from, page));

	/* A page that was swapped in, and is the same as on the disk. */
	memset(self->to, 2, page);
	EXPECT_EQ(1, swap_out(self->to, page));
	EXPECT_EQ(2, cpu_load(self->to));
	ASSERT_EQ(0, copy(self->fd, self->to, self->from + page, page));
	EXPECT_EQ(1, swap_out(self->to, page));
	EXPECT_EQ(page, cpu_differs(self->to, self->from + page, page));
}

TEST_F(edu, a_killed_process_leaves_nothing_behind)
{
	for (int i = 0; i < 4; i++) {
		pid_t pid = fork();

		ASSERT_LE(0, pid);
		if (!pid) {
			int fd = gpu_open(NODE);

			copy(fd, self->to, self->from, 4 * page);
			_exit(1);
		}
		sleep_us(TRANSFER_US / 2 + i * TRANSFER_US);
		kill(pid, SIGKILL);
		EXPECT_EQ(SIGKILL, wait_child(pid, 5));
	}
	EXPECT_EQ(0, copy(self->fd, self->to, self->from, page));
}

/* The memory of a process whose last reference is gone is freed. */
TEST_F(edu, unbound_at_any_moment)
{
	char device[32];
	int uffd = uffd_open();
	struct copier copier = copier_of(self->fd, self->to, self->from, 4 * page);
	uint8_t *served = map(page, PROT_READ | PROT_WRITE);
	/* Another file has another work item. */
	struct copier parked = copier_of(gpu_open(NODE), self->to, served, page);
	struct uffd_msg msg;

	ASSERT_TRUE(bound_device(device));
	ASSERT_LE(0, uffd);
	ASSERT_NE(MAP_FAILED, served);
	ASSERT_LE(0, parked.fd);
	ASSERT_EQ(0, uffd_register(uffd, served, page));
	ASSERT_EQ(0, copy_begins(&parked));
	ASSERT_EQ(sizeof(msg), read(uffd, &msg, sizeof(msg)));

	/* A fault that waits for user space does not hold up the end of the driver. */
	ASSERT_EQ(0, copy_begins(&copier));
	sleep_us(TRANSFER_US / 2);
	ASSERT_TRUE(write_to(DRIVER "/unbind", device));
	EXPECT_EQ(-ENODEV, copy_ended(&copier));
	EXPECT_EQ(-ENODEV, copy(self->fd, self->to, self->from, 1));
	/* It fails when it goes on. */
	close(uffd);
	EXPECT_EQ(-ENODEV, copy_ended(&parked));
	EXPECT_EQ(-ENOENT, gpu_open(NODE));
	ASSERT_TRUE(write_to(DRIVER "/bind", device));
	/* The old file stays without a device. */
	EXPECT_EQ(-ENODEV, copy(self->fd, self->to, self->from, 1));
	close(self->fd);
	self->fd = gpu_open(NODE);
	ASSERT_LE(0, self->fd);
	EXPECT_EQ(0, copy(self->fd, self->to, self->from, page));
	EXPECT_EQ(page, cpu_differs(self->to, self->from, page));
	munmap(served, page);
	close(parked.fd);
}

TEST_F_TIMEOUT(edu, bound_and_unbound_under_load, 120)
{
	char device[32];

	ASSERT_TRUE(bound_device(device));
	for (int i = 0; i < rounds(); i++) {
		struct copier copier = copier_of(gpu_open(NODE), self->to, self->from, page);

		ASSERT_LE(0, copier.fd);
		ASSERT_EQ(0, copy_begins(&copier));
		sleep_us(i % 10 * TRANSFER_US / 20);
		ASSERT_TRUE(write_to(DRIVER "/unbind", device));
		EXPECT_EQ(-ENODEV, copy_ended(&copier));
		ASSERT_TRUE(write_to(DRIVER "/bind", device));
		close(copier.fd);
	}
	close(self->fd);
	self->fd = gpu_open(NODE);
	ASSERT_LE(0, self->fd);
	EXPECT_EQ(0, copy(self->fd, self->to, self->from, page));
}

TEST_HARNESS_MAIN
