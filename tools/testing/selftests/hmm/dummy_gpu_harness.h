/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Shared by the tests of the dummy GPU. dummy_gpu_user.h has what the demo
 * needs as well.
 */
#ifndef DUMMY_GPU_HARNESS_H
#define DUMMY_GPU_HARNESS_H

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sched.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/swap.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "kselftest_harness.h"
#include "dummy_gpu_user.h"

#define KERNEL_ADDRESS	(~0ULL << 40)

/* Enough pages to need more than one window, with one window unaligned. */
#define BUFFER		(5UL << 20)

static size_t page;

/*
 * DUMMY_GPU_COHERENT has the tests run on the instances whose memory the CPU
 * reaches: "coherent0=ADDRESS;coherent1=ADDRESS", as the module got it.
 */
static inline const char *coherent(void)
{
	return getenv("DUMMY_GPU_COHERENT");
}

/* What the names of the instances, and of their directories, begin with. */
static inline const char *instance_prefix(void)
{
	return coherent() ? "dummy_gpu_coherent" : "dummy_gpu";
}

static inline int gpu_open(const char *path)
{
	static const char usual[] = "/dev/dummy_gpu";
	char name[40];
	int fd;

	if (!strncmp(path, usual, strlen(usual))) {
		snprintf(name, sizeof(name), "/dev/%s%s", instance_prefix(), path + strlen(usual));
		path = name;
	}
	fd = open(path, O_RDWR | O_CLOEXEC);
	return fd < 0 ? -errno : fd;
}

/* A number that the environment may set. */
static inline int setting_of(const char *name, int otherwise)
{
	const char *said = getenv(name);

	return said && atoi(said) > 0 ? atoi(said) : otherwise;
}

/* How often a scenario is repeated. Fewer on kernels with slow checkers. */
static inline int rounds(void)
{
	return setting_of("DUMMY_GPU_ROUNDS", 100);
}

/* Runs one command, in the way that is given: 0 or a negative errno. */
static inline int run_with(int (*submit_all)(int, struct dummy_gpu_submit *), int fd,
			   struct dummy_gpu_command command)
{
	struct dummy_gpu_submit submit = gpu_submission(&command, 1);
	int err = submit_all(fd, &submit);

	if (!err && (submit.completed != 1 || submit.fault_address))
		return -EPROTO;
	return err;
}

static inline int run(int fd, struct dummy_gpu_command command)
{
	return run_with(gpu_submit, fd, command);
}

/* A worker of the kernel runs the commands: 0 or a negative errno. */
static inline int submit_and_wait(int fd, struct dummy_gpu_submit *submit)
{
	struct dummy_gpu_wait wait;
	int err = gpu_submit_async(fd, submit);

	if (err)
		return err;
	err = gpu_wait(fd, submit->sequence, ~0ULL, &wait);
	submit->completed = wait.completed;
	submit->fault_address = wait.fault_address;
	return err;
}

/* The sum of a vector as the device sees it, or GPU_UNTOUCHED on any error. */
static inline uint64_t gpu_sum(int fd, const void *p, size_t length)
{
	uint64_t sum;

	return run(fd, gpu_unary(DUMMY_GPU_OP_SUM, &sum, p, length)) ? GPU_UNTOUCHED : sum;
}

/*
 * The sum as the device sees it. The result is not on the stack, which might
 * move.
 */
static inline uint64_t vram_sum(int fd, uint64_t *result, const void *p, size_t length)
{
	*result = 0;
	return run(fd, gpu_unary(DUMMY_GPU_OP_SUM, result, p, length)) ? GPU_UNTOUCHED : *result;
}

static inline struct dummy_gpu_stats stats_of(struct __test_metadata *_metadata, int fd)
{
	struct dummy_gpu_stats stats;

	ASSERT_EQ(0, gpu_stats(fd, &stats));
	return stats;
}

/* Expects that no command ran and no page moved. Invalidations do not count. */
static inline void expect_idle(struct __test_metadata *_metadata, int fd,
			       const struct dummy_gpu_stats *before)
{
	struct dummy_gpu_stats now = stats_of(_metadata, fd);

	EXPECT_EQ(before->commands, now.commands);
	EXPECT_EQ(before->bytes_read, now.bytes_read);
	EXPECT_EQ(before->bytes_written, now.bytes_written);
	EXPECT_EQ(before->faults, now.faults);
	EXPECT_EQ(before->fault_batches, now.fault_batches);
	EXPECT_EQ(before->retries, now.retries);
	EXPECT_EQ(before->pages_to_device, now.pages_to_device);
	EXPECT_EQ(before->pages_cpu_faulted, now.pages_cpu_faulted);
	EXPECT_EQ(before->pages_evicted, now.pages_evicted);
	EXPECT_EQ(before->pages_to_system, now.pages_to_system);
	EXPECT_EQ(before->device_pages, now.device_pages);
}

static inline void *map(size_t length, int prot)
{
	return mmap(NULL, length, prot, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}

static inline void *map_at(void *where, size_t length)
{
	return mmap(where, length, PROT_READ | PROT_WRITE,
		    MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
}

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE	25
#endif

/* Sets *size to the bytes of a transparent huge page. Without them, the test is skipped. */
static inline bool setup_huge(struct __test_metadata *_metadata, size_t *size)
{
	FILE *f = fopen("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size", "re");

	*size = 0;
	if (f) {
		if (fscanf(f, "%zu", size) != 1)
			*size = 0;
		fclose(f);
	}
	if (!*size)
		SKIP(return false, "no transparent huge pages");
	return true;
}

/* Whether the tests are to use whole huge pages: DUMMY_GPU_HUGE=1 asks for it. */
static inline bool wants_huge(void)
{
	return setting_of("DUMMY_GPU_HUGE", 0);
}

/* Maps huge pages. Nothing is accessible around them, so no other mapping joins this one. */
static inline uint8_t *map_huge(size_t length, size_t huge)
{
	uint8_t *p = map(length + huge, PROT_NONE);

	if (p == MAP_FAILED)
		return p;
	p += huge - (uintptr_t)p % huge;
	return mprotect(p, length, PROT_READ | PROT_WRITE) || madvise(p, length, MADV_HUGEPAGE) ?
	       MAP_FAILED : p;
}

/* A file of the given length that is deleted when it is closed. */
static inline int temporary_file(size_t length)
{
	char path[] = "/tmp/dummy_gpu_test.XXXXXX";
	int fd = mkstemp(path);

	if (fd < 0)
		return -errno;
	unlink(path);
	return ftruncate(fd, length) ? -errno : fd;
}

static inline uint64_t microseconds(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000ULL + now.tv_nsec / 1000;
}

/* Waits for a child that must end by itself: its status, or -1 on timeout. */
static inline int wait_child(pid_t pid, int seconds)
{
	struct timespec tick = { .tv_nsec = 10 * 1000 * 1000 };
	int status;

	for (int i = 0; i < seconds * 100; i++) {
		if (waitpid(pid, &status, WNOHANG) == pid)
			return status;
		nanosleep(&tick, NULL);
	}
	return -1;
}

/* A token from one process or thread to another. */
static inline int token_send(int fd)
{
	return write(fd, "", 1) == 1 ? 0 : -EPIPE;
}

static inline int token_wait(int fd)
{
	char token;

	return read(fd, &token, 1) == 1 ? 0 : -EPIPE;
}

/* Opens the device in a setup. Without a device, the test is skipped. */
static inline int setup_device(struct __test_metadata *_metadata)
{
	int fd = gpu_open(GPU_DEVICE);

	page = sysconf(_SC_PAGESIZE);
	if (fd == -ENOENT || fd == -ENODEV || fd == -ENXIO)
		SKIP(return fd, "no " GPU_DEVICE);
	ASSERT_LE(0, fd)
		TH_LOG("open " GPU_DEVICE ": %s", strerror(-fd));
	return fd;
}

static inline void setup_vram(struct __test_metadata *_metadata, int *fd, size_t *size,
			      uint64_t **result)
{
	struct dummy_gpu_info info;

	*fd = setup_device(_metadata);
	if (*fd < 0)
		return;
	*result = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	ASSERT_NE(MAP_FAILED, *result);
	ASSERT_EQ(0, gpu_info(*fd, &info));
	*size = info.vram_size;
	if (!info.vram_size)
		SKIP(return, GPU_DEVICE " has no memory of its own");
	/* With less memory, the tests would only test eviction. */
	ASSERT_LE(8UL << 20, *size);
}

/* CPU accesses that the compiler does not optimize away. */
static inline uint8_t cpu_load(const uint8_t *p)
{
	return __atomic_load_n(p, __ATOMIC_RELAXED);
}

static inline void cpu_store(uint8_t *p, uint8_t value)
{
	__atomic_store_n(p, value, __ATOMIC_RELAXED);
}

/* Prefetches all of a range: the pages that moved, or a negative errno. */
static inline int64_t prefetch_all(int fd, const void *p, size_t length,
				   enum dummy_gpu_location location)
{
	struct dummy_gpu_prefetch prefetch = gpu_prefetching(p, length, location);
	int err = gpu_prefetch(fd, &prefetch);

	if (err)
		return err;
	return prefetch.done == length ? (int64_t)prefetch.pages : -EPROTO;
}

static inline bool write_to(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	bool ok = fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text);

	if (fd >= 0)
		close(fd);
	return ok;
}

/* Makes a block device a swap device, as mkswap and swapon do. */
static inline int swap_on(const char *path)
{
	struct {
		uint8_t boot[1024];
		uint32_t version;
		uint32_t last_page;
	} header = { .version = 1 };
	int fd = open(path, O_RDWR | O_EXCL | O_CLOEXEC);
	off_t size = fd < 0 ? -1 : lseek(fd, 0, SEEK_END);
	bool written;

	if (size <= 0)
		return -ENODEV;
	header.last_page = size / page - 1;
	written = pwrite(fd, &header, sizeof(header), 0) == sizeof(header) &&
		  pwrite(fd, "SWAPSPACE2", 10, page - 10) == 10;
	close(fd);
	if (!written)
		return -EIO;
	return swapon(path, 0) ? -errno : 0;
}

/* The pages of a range that are swapped out. Pages on the device seem to be, too. */
static inline size_t pages_swapped(uint8_t *p, size_t length)
{
	int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	size_t count = 0;
	uint64_t entry;

	for (size_t i = 0; i < length; i += page) {
		if (pread(fd, &entry, sizeof(entry), gpu_addr(p + i) / page * 8) == sizeof(entry))
			count += entry >> 62 & 1;
	}
	close(fd);
	return count;
}

/*
 * Swaps out memory and returns how many of its pages are. A page that was
 * faulted in on another CPU may wait there for its place in an LRU list, and
 * cannot be reclaimed until then.
 */
static inline size_t swap_out(uint8_t *p, size_t length)
{
	size_t swapped = 0;

	for (int i = 0; i < 100 && swapped != length / page; i++) {
		madvise(p, length, MADV_PAGEOUT);
		swapped = pages_swapped(p, length);
	}
	return swapped;
}

/* The number after a name in a file with a name and a number in each line, or -1. */
static inline int64_t number_of(const char *path, const char *name)
{
	const size_t length = strlen(name);
	long long value = -1;
	char line[100];
	FILE *f = fopen(path, "re");

	while (f && fgets(line, sizeof(line), f)) {
		if (!strncmp(line, name, length) && sscanf(line + length, " %lld", &value) == 1)
			break;
	}
	if (f)
		fclose(f);
	return value;
}

/* Whether a file of names has one. */
static inline bool lists(const char *path, const char *name)
{
	char line[200] = "";
	FILE *f = fopen(path, "re");

	if (f) {
		if (!fgets(line, sizeof(line), f))
			line[0] = 0;
		fclose(f);
	}
	return strstr(line, name);
}

/* A hierarchy of cgroups that a test has mounted. */
struct cgroups {
	char dir[40];
	bool controller;	/* the test has enabled "memory" there */
};

static inline bool cgroups_mount(struct cgroups *cgroups, const char *type, const char *options)
{
	char dir[] = "/tmp/dummy_gpu_cgroup.XXXXXX";

	if (!mkdtemp(dir))
		return false;
	if (mount("none", dir, type, 0, options)) {
		rmdir(dir);
		return false;
	}
	strcpy(cgroups->dir, dir);
	return true;
}

/* Enables the memory controller, if it is not. */
static inline bool cgroups_have_memory(struct cgroups *cgroups)
{
	char path[80];

	snprintf(path, sizeof(path), "%s/cgroup.subtree_control", cgroups->dir);
	if (!lists(path, "memory"))
		cgroups->controller = write_to(path, "+memory");
	return lists(path, "memory");
}

/* There are no groups of the test any more. */
static inline void cgroups_unmount(struct cgroups *cgroups)
{
	char path[80];

	snprintf(path, sizeof(path), "%s/cgroup.subtree_control", cgroups->dir);
	if (cgroups->controller)
		write_to(path, "-memory");
	umount(cgroups->dir);
	rmdir(cgroups->dir);
}

/* A counter of instance n, or -1 without debugfs. */
static inline int64_t instance_counter(unsigned int n, const char *name)
{
	char path[60];

	snprintf(path, sizeof(path), "/sys/kernel/debug/dummy_gpu/%s%u/stats",
		 instance_prefix(), n);
	return number_of(path, name);
}

/* The pages in the memory of instance n now, of all processes, or -1 without debugfs. */
static inline int64_t instance_pages_of(unsigned int n)
{
	return instance_counter(n, "device_pages");
}

static inline int64_t instance_pages(void)
{
	return instance_pages_of(0);
}

/* Waits for ended processes to be gone. Whether the counter then has that value. */
static inline bool instance_counter_becomes(unsigned int n, const char *name, int64_t value)
{
	struct timespec tick = { .tv_nsec = 10 * 1000 * 1000 };

	for (int i = 0; i < 500 && instance_counter(n, name) != value; i++)
		nanosleep(&tick, NULL);
	return instance_counter(n, name) == value;
}

static inline bool instance_pages_become(int64_t pages)
{
	return instance_counter_becomes(0, "device_pages", pages);
}

static inline int uffd_open(void)
{
	int fd = syscall(__NR_userfaultfd, O_CLOEXEC);

	return fd < 0 ? -errno : fd;
}

static inline int uffd_enable(int fd, uint64_t features)
{
	struct uffdio_api api = { .api = UFFD_API, .features = features };

	return ioctl(fd, UFFDIO_API, &api) ? -errno : 0;
}

static inline int uffd_register_mode(int fd, void *p, size_t length, uint64_t mode)
{
	struct uffdio_register reg = {
		.range = { .start = gpu_addr(p), .len = length },
		.mode = mode,
	};

	return ioctl(fd, UFFDIO_REGISTER, &reg) ? -errno : 0;
}

static inline int uffd_register(int fd, void *p, size_t length)
{
	return uffd_enable(fd, 0) ?:
	       uffd_register_mode(fd, p, length, UFFDIO_REGISTER_MODE_MISSING);
}

/* A thread that serves one fault of a userfaultfd. */
struct server {
	int uffd;
	uint8_t *page;		/* for the first fault, or NULL: never answer */
	int pipe;		/* told about the fault */
	uint64_t address;
	int err;
};

static inline void *serve_thread(void *arg)
{
	struct server *server = arg;
	struct uffd_msg msg;

	server->err = -EIO;
	if (read(server->uffd, &msg, sizeof(msg)) != sizeof(msg))
		return NULL;
	server->address = msg.arg.pagefault.address & -page;
	if (token_send(server->pipe))
		return NULL;
	if (server->page) {
		struct uffdio_copy copy = {
			.dst = server->address,
			.src = gpu_addr(server->page),
			.len = page,
		};

		if (ioctl(server->uffd, UFFDIO_COPY, &copy))
			return NULL;
	}
	server->err = 0;
	return NULL;
}

/*
 * User-Mode Linux updates the mappings of a thread on another CPU only when
 * that CPU next enters the kernel. Until then the thread may write to a page
 * that has moved. So bind all threads to one CPU there; the device may use the
 * other one.
 */
static inline void share_cpu_of_uml(void)
{
	FILE *f = fopen("/proc/cpuinfo", "re");
	char line[100];
	cpu_set_t one;

	CPU_ZERO(&one);
	CPU_SET(0, &one);
	while (f && fgets(line, sizeof(line), f)) {
		if (strstr(line, "User Mode Linux"))
			sched_setaffinity(0, sizeof(one), &one);
	}
	if (f)
		fclose(f);
}

#endif /* DUMMY_GPU_HARNESS_H */
