// SPDX-License-Identifier: GPL-2.0
/*
 * Tests of the dummy GPU on files of a DAX filesystem, which are mapped without
 * a copy in memory: the GPU works in the storage itself.
 *
 * The test makes filesystems on the block device that DUMMY_GPU_PMEM in the
 * environment names, and so destroys what is there. It needs mkfs.ext4 and
 * mkfs.xfs.
 */
#include <pthread.h>
#include <sys/stat.h>

#include <linux/fs.h>

#include "dmirror_user.h"

#define LENGTH		(4UL << 20)

#ifndef STATX_ATTR_DAX
#define STATX_ATTR_DAX	0x00200000
#endif

FIXTURE(dax)
{
	int fd;			/* the GPU */
	uint64_t *result;	/* anonymous shared memory */
	uint8_t *copy;		/* what the file should contain */
	char dir[40], path[60];
	int file;
	uint8_t *p;		/* the file, mapped shared */
	bool mounted;
};

#define DAX	FIXTURE_DATA(dax)

FIXTURE_VARIANT(dax)
{
	const char *type, *mkfs[8];
	bool reflink;
};

FIXTURE_VARIANT_ADD(dax, ext4)
{
	.type = "ext4",
	/* Large extents begin where a PMD can map them. */
	.mkfs = { "mkfs.ext4", "-q", "-F", "-b4096", "-Estride=512,stripe_width=512" },
};

FIXTURE_VARIANT_ADD(dax, xfs)
{
	.type = "xfs",
	.mkfs = { "mkfs.xfs", "-q", "-f", "-mreflink=1", "-dsu=2m,sw=1,agcount=2",
		  "-lsu=32k" },
	.reflink = true,
};

/* 0, or a negative errno. */
static int make_filesystem(const char *const *words, const char *device)
{
	const char *argv[10];
	int n = 0, status;
	pid_t pid;

	while (words[n]) {
		argv[n] = words[n];
		n++;
	}
	argv[n++] = device;
	argv[n] = NULL;
	pid = fork();
	if (!pid) {
		dup2(2, 1);
		execvp(argv[0], (char **)argv);
		_exit(errno == ENOENT ? 127 : 126);
	}
	if (pid < 0 || waitpid(pid, &status, 0) != pid)
		return -errno;
	if (WIFEXITED(status) && WEXITSTATUS(status) == 127)
		return -ENOENT;
	return status ? -EIO : 0;
}

static int mount_file(DAX *self, const char *type)
{
	if (mount(getenv("DUMMY_GPU_PMEM"), self->dir, type, 0, "dax"))
		return -errno;
	self->mounted = true;
	self->file = open(self->path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	if (self->file < 0)
		return -errno;
	self->p = mmap(NULL, LENGTH, PROT_READ | PROT_WRITE, MAP_SHARED, self->file, 0);
	return self->p == MAP_FAILED ? -errno : 0;
}

/* The file and its mapping go, and the filesystem with them. 0 or a negative errno. */
static int unmount_file(DAX *self)
{
	munmap(self->p, LENGTH);
	close(self->file);
	self->mounted = umount(self->dir);
	return self->mounted ? -errno : 0;
}

static bool is_dax(int file)
{
	struct statx stx;

	return !statx(file, "", AT_EMPTY_PATH, 0, &stx) && stx.stx_attributes & STATX_ATTR_DAX;
}

FIXTURE_SETUP(dax)
{
	const char *device = getenv("DUMMY_GPU_PMEM");
	int err;

	if (!device)
		SKIP(return, "no DUMMY_GPU_PMEM");
	self->fd = setup_device(_metadata);
	if (self->fd < 0)
		return;
	self->result = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	ASSERT_NE(MAP_FAILED, self->result);
	self->copy = malloc(LENGTH);
	ASSERT_NE(NULL, self->copy);
	strcpy(self->dir, "/tmp/dummy_gpu_dax.XXXXXX");
	ASSERT_NE(NULL, mkdtemp(self->dir));
	snprintf(self->path, sizeof(self->path), "%s/file", self->dir);

	err = make_filesystem(variant->mkfs, device);
	if (err == -ENOENT)
		SKIP(return, "no %s", variant->mkfs[0]);
	ASSERT_EQ(0, err);
	ASSERT_EQ(0, mount_file(self, variant->type));
	cpu_randomize(self->copy, LENGTH, 1);
	ASSERT_EQ(LENGTH, pwrite(self->file, self->copy, LENGTH, 0));
	ASSERT_TRUE(is_dax(self->file));
}

FIXTURE_TEARDOWN(dax)
{
	if (self->mounted)
		EXPECT_EQ(0, unmount_file(self));
	rmdir(self->dir);
	free(self->copy);
	munmap(self->result, page);
	close(self->fd);
}

/* The device sees the same bytes as read(). */
static void expect_file(struct __test_metadata *_metadata, DAX *self)
{
	uint8_t *seen = malloc(LENGTH);

	ASSERT_NE(NULL, seen);
	EXPECT_EQ(0, run(self->fd, gpu_unary(DUMMY_GPU_OP_CRC32, self->result, self->p, LENGTH)));
	EXPECT_EQ(cpu_crc32(self->copy, LENGTH), *self->result);
	EXPECT_EQ(LENGTH, pread(self->file, seen, LENGTH, 0));
	EXPECT_EQ(LENGTH, cpu_differs(seen, self->copy, LENGTH));
	free(seen);
}

/* The device and the copy get the same bytes. */
static void fill(struct __test_metadata *_metadata, DAX *self, size_t first, uint8_t value,
		 size_t length)
{
	ASSERT_EQ(0, run(self->fd, gpu_fill(self->p + first, value, length)));
	memset(self->copy + first, value, length);
}

TEST_F(dax, the_device_works_in_the_file)
{
	expect_file(_metadata, self);
	fill(_metadata, self, 12345, 0x11, 2 * page);
	fill(_metadata, self, LENGTH / 2 + 7, 0x22, LENGTH / 4);
	expect_file(_metadata, self);
	/* What another writes is there at once. */
	cpu_randomize(self->copy, page, 2);
	EXPECT_EQ(page, pwrite(self->file, self->copy, page, 0));
	expect_file(_metadata, self);
	EXPECT_EQ(0, stats_of(_metadata, self->fd).pages_to_device);
}

TEST_F(dax, the_pages_of_the_file_cannot_be_exclusive)
{
	uint64_t *word = (uint64_t *)self->p;

	EXPECT_EQ(-EOPNOTSUPP, run(self->fd, gpu_fetch_add(self->result, word, 1)));
	expect_file(_metadata, self);
}

TEST_F(dax, the_pages_of_the_file_do_not_migrate)
{
	struct dummy_gpu_info info;

	ASSERT_EQ(0, gpu_info(self->fd, &info));
	if (!info.vram_size)
		SKIP(return, "no device memory");
	EXPECT_EQ(0, prefetch_all(self->fd, self->p, LENGTH, DUMMY_GPU_LOCATION_DEVICE));
	fill(_metadata, self, 0, 0x33, LENGTH);
	EXPECT_EQ(0, prefetch_all(self->fd, self->p, LENGTH, DUMMY_GPU_LOCATION_DEVICE));
	EXPECT_EQ(0, stats_of(_metadata, self->fd).pages_to_device);
	expect_file(_metadata, self);
}

/* Only the pages that were written to are copies, and these migrate. */
TEST_F(dax, private_copies_migrate)
{
	uint8_t *p = mmap(NULL, LENGTH, PROT_READ | PROT_WRITE, MAP_PRIVATE, self->file, 0);
	uint8_t *seen = malloc(LENGTH);
	struct dummy_gpu_info info;

	ASSERT_NE(MAP_FAILED, p);
	ASSERT_NE(NULL, seen);
	memcpy(seen, self->copy, LENGTH);
	ASSERT_EQ(0, run(self->fd, gpu_unary(DUMMY_GPU_OP_CRC32, self->result, p, LENGTH)));
	EXPECT_EQ(cpu_crc32(self->copy, LENGTH), *self->result);

	/* The device writes to three pages, and the CPU to one. */
	ASSERT_EQ(0, run(self->fd, gpu_fill(p + 5 * page, 0x44, 3 * page)));
	memset(seen + 5 * page, 0x44, 3 * page);
	cpu_store(p + LENGTH - 1, seen[LENGTH - 1] ^= 1);
	/* A hole of the file, which is mapped here as zeroes, is no copy either. */
	ASSERT_EQ(0, fallocate(self->file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
			       LENGTH / 2, LENGTH / 4));
	memset(self->copy + LENGTH / 2, 0, LENGTH / 4);
	memset(seen + LENGTH / 2, 0, LENGTH / 4);
	EXPECT_EQ(0, cpu_load(p + LENGTH / 2 + page));
	ASSERT_EQ(0, gpu_info(self->fd, &info));
	if (info.vram_size) {
		EXPECT_LE(0, prefetch_all(self->fd, p, LENGTH, DUMMY_GPU_LOCATION_DEVICE));
		EXPECT_EQ(4, stats_of(_metadata, self->fd).device_pages);
	}
	ASSERT_EQ(0, run(self->fd, gpu_unary(DUMMY_GPU_OP_CRC32, self->result, p, LENGTH)));
	EXPECT_EQ(cpu_crc32(seen, LENGTH), *self->result);
	EXPECT_EQ(LENGTH, cpu_differs(p, seen, LENGTH));
	EXPECT_EQ(0, stats_of(_metadata, self->fd).device_pages);
	expect_file(_metadata, self);
	free(seen);
	munmap(p, LENGTH);
}

TEST_F(dax, what_the_cpu_may_not_write_is_refused)
{
	int file = open(self->path, O_RDONLY | O_CLOEXEC);
	uint8_t *p = mmap(NULL, LENGTH, PROT_READ, MAP_SHARED, file, 0);

	ASSERT_NE(MAP_FAILED, p);
	EXPECT_EQ(-EPERM, run(self->fd, gpu_fill(p, 0, page)));
	EXPECT_EQ(0, run(self->fd, gpu_unary(DUMMY_GPU_OP_CRC32, self->result, p, LENGTH)));
	EXPECT_EQ(cpu_crc32(self->copy, LENGTH), *self->result);
	munmap(p, LENGTH);
	close(file);

	/* The device could write to these pages until now. */
	fill(_metadata, self, 0, 0x55, LENGTH);
	ASSERT_EQ(0, mprotect(self->p, LENGTH, PROT_READ));
	EXPECT_EQ(-EPERM, run(self->fd, gpu_fill(self->p, 0, page)));
	ASSERT_EQ(0, mprotect(self->p, LENGTH, PROT_READ | PROT_WRITE));
	expect_file(_metadata, self);
}

/*
 * msync() makes what was written durable. It writes back the pages that are
 * dirty in the file's tree, and takes the right to write to them away until they
 * are dirty again. So if it does, they were.
 */
TEST_F(dax, msync_writes_back_what_the_device_wrote)
{
	struct dummy_gpu_stats before, after;

	ASSERT_EQ(0, msync(self->p, LENGTH, MS_SYNC));
	for (int round = 0; round < 3; round++) {
		before = stats_of(_metadata, self->fd);
		fill(_metadata, self, LENGTH / 2, round, 8 * page);
		after = stats_of(_metadata, self->fd);
		/* The first write after msync() faults. */
		EXPECT_LT(before.faults, after.faults) TH_LOG("round %d", round);
		fill(_metadata, self, LENGTH / 2, round + 10, 8 * page);
		EXPECT_EQ(after.faults, stats_of(_metadata, self->fd).faults);

		ASSERT_EQ(0, msync(self->p, LENGTH, MS_SYNC));
		before = stats_of(_metadata, self->fd);
		EXPECT_LT(after.protections, before.protections) TH_LOG("round %d", round);
		/* There is nothing to write back. */
		ASSERT_EQ(0, msync(self->p, LENGTH, MS_SYNC));
		EXPECT_EQ(before.protections, stats_of(_metadata, self->fd).protections);
	}
	expect_file(_metadata, self);
}

TEST_F(dax, a_hole_reads_as_zeroes_and_gets_blocks_when_it_is_written)
{
	struct stat before, after;

	ASSERT_EQ(0, ftruncate(self->file, 0));
	ASSERT_EQ(0, ftruncate(self->file, LENGTH));
	memset(self->copy, 0, LENGTH);
	expect_file(_metadata, self);
	ASSERT_EQ(0, fstat(self->file, &before));
	EXPECT_EQ(0, before.st_blocks);
	/* The device has the zeroes mapped, in place of which a CPU maps a block. */
	cpu_store(self->p + page, self->copy[page] = 1);
	fill(_metadata, self, LENGTH - page, 0x66, page);
	expect_file(_metadata, self);
	ASSERT_EQ(0, fstat(self->file, &after));
	EXPECT_LT(before.st_blocks, after.st_blocks);
}

/* A thread that lets the device write to all of the file again and again. */
struct writer {
	DAX *self;
	pthread_t thread;
	uint64_t done, refused;
	int err;
	bool stop;
};

static void *writer_thread(void *arg)
{
	struct writer *writer = arg;

	while (!__atomic_load_n(&writer->stop, __ATOMIC_RELAXED) && !writer->err) {
		int err = run(writer->self->fd, gpu_fill(writer->self->p, 0x77, LENGTH));

		if (!err)
			__atomic_add_fetch(&writer->done, 1, __ATOMIC_RELAXED);
		else if (err == -EFAULT)
			__atomic_add_fetch(&writer->refused, 1, __ATOMIC_RELAXED);
		else
			writer->err = err;
	}
	return NULL;
}

static void writer_starts(struct __test_metadata *_metadata, struct writer *writer)
{
	ASSERT_EQ(0, pthread_create(&writer->thread, NULL, writer_thread, writer));
	while (!__atomic_load_n(&writer->done, __ATOMIC_RELAXED) && !writer->err)
		sched_yield();
}

static void writer_ends(struct __test_metadata *_metadata, struct writer *writer)
{
	__atomic_store_n(&writer->stop, true, __ATOMIC_RELAXED);
	ASSERT_EQ(0, pthread_join(writer->thread, NULL));
	EXPECT_EQ(0, writer->err);
}

/* The offset of the first byte that is neither zero nor the writer's, or length. */
static size_t foreign(const uint8_t *bytes, size_t length)
{
	size_t i;

	for (i = 0; i < length && (!bytes[i] || bytes[i] == 0x77); i++)
		;
	return i;
}

/*
 * A block that the file gives up may be part of another file at once. The
 * device must not write to it any more.
 */
static void taken_away(struct __test_metadata *_metadata, DAX *self,
		       int (*take)(int file, int round))
{
	struct writer writer = { .self = self };
	uint64_t before;
	char path[80];
	int other;

	snprintf(path, sizeof(path), "%s-other", self->path);
	other = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	ASSERT_LE(0, other);
	writer_starts(_metadata, &writer);
	before = __atomic_load_n(&writer.done, __ATOMIC_RELAXED);
	for (int round = 0; round < rounds(); round++) {
		ASSERT_EQ(0, take(self->file, round)) TH_LOG("%s", strerror(errno));
		/* This file is likely to get the blocks. */
		ASSERT_EQ(LENGTH / 2, pwrite(other, self->copy, LENGTH / 2, 0));
		usleep(2000);
		ASSERT_EQ(LENGTH / 2, pread(other, self->copy + LENGTH / 2, LENGTH / 2, 0));
		EXPECT_EQ(LENGTH / 2, cpu_differs(self->copy, self->copy + LENGTH / 2, LENGTH / 2));
		ASSERT_EQ(0, ftruncate(other, 0));
		ASSERT_EQ(0, ftruncate(self->file, LENGTH));
	}
	writer_ends(_metadata, &writer);
	EXPECT_LT(before, writer.done + writer.refused);
	ASSERT_EQ(LENGTH, pread(self->file, self->copy, LENGTH, 0));
	EXPECT_EQ(LENGTH, foreign(self->copy, LENGTH));
	expect_file(_metadata, self);
	close(other);
}

static int truncate_half(int file, int round)
{
	return ftruncate(file, LENGTH / 2 - round % 7 * page);
}

static int punch_hole(int file, int round)
{
	return fallocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, round % 5 * page,
			 LENGTH / 2);
}

TEST_F_TIMEOUT(dax, truncated_under_a_command, 120)
{
	taken_away(_metadata, self, truncate_half);
}

TEST_F_TIMEOUT(dax, hole_punched_under_a_command, 120)
{
	taken_away(_metadata, self, punch_hole);
}

TEST_F(dax, beyond_the_end_of_the_file_is_efault)
{
	fill(_metadata, self, 0, 0x77, LENGTH);
	ASSERT_EQ(0, ftruncate(self->file, LENGTH / 2));
	EXPECT_EQ(-EFAULT, run(self->fd, gpu_fill(self->p + LENGTH / 2, 1, page)));
	EXPECT_EQ(0, run(self->fd, gpu_fill(self->p + LENGTH / 2 - page, 1, page)));
	ASSERT_EQ(0, ftruncate(self->file, LENGTH));
	memset(self->copy + LENGTH / 2 - page, 1, page);
	memset(self->copy + LENGTH / 2, 0, LENGTH / 2);
	expect_file(_metadata, self);
}

/* The clone keeps the bytes of its time, though the device could write to the blocks. */
TEST_F(dax, a_clone_is_copied_when_the_device_writes)
{
	char path[80];
	uint8_t *seen;
	int clone;

	if (!variant->reflink)
		SKIP(return, "%s has no reflink", variant->type);
	snprintf(path, sizeof(path), "%s-clone", self->path);
	clone = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	seen = malloc(LENGTH);
	ASSERT_LE(0, clone);
	ASSERT_NE(NULL, seen);
	fill(_metadata, self, 0, 0x11, LENGTH / 2);
	ASSERT_EQ(0, ioctl(clone, FICLONE, self->file)) TH_LOG("%s", strerror(errno));
	memcpy(seen, self->copy, LENGTH);
	fill(_metadata, self, page, 0x22, LENGTH / 2);
	expect_file(_metadata, self);
	EXPECT_EQ(LENGTH, pread(clone, self->copy, LENGTH, 0));
	EXPECT_EQ(LENGTH, cpu_differs(self->copy, seen, LENGTH));
	close(clone);
	free(seen);
}

/* A PMD maps an aligned block, and the device sees that. */
TEST_F(dax, a_huge_mapping_is_reported_as_one)
{
	uint8_t *seen = malloc(LENGTH / page), *p;
	size_t huge, count = 0;
	int node = dmirror_open(0);

	if (node < 0)
		SKIP(return, "no /dev/hmm_dmirror0");
	ASSERT_NE(NULL, seen);
	if (!setup_huge(_metadata, &huge))
		return;
	/* One allocation, which is aligned. */
	ASSERT_EQ(0, ftruncate(self->file, 0));
	ASSERT_EQ(0, fallocate(self->file, 0, 0, LENGTH));
	p = map(LENGTH + huge, PROT_NONE);
	ASSERT_NE(MAP_FAILED, p);
	p += huge - (uintptr_t)p % huge;
	ASSERT_EQ(p, mmap(p, LENGTH, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, self->file,
			  0));
	memset(p, 1, LENGTH);
	ASSERT_EQ(0, dmirror(node, HMM_DMIRROR_SNAPSHOT, p, LENGTH / page, seen));
	for (size_t i = 0; i < LENGTH / page; i++) {
		EXPECT_TRUE(seen[i] & HMM_DMIRROR_PROT_WRITE);
		count += !!(seen[i] & HMM_DMIRROR_PROT_PMD);
	}
	EXPECT_EQ(LENGTH / page, count);
	munmap(p, LENGTH);
	close(node);
	free(seen);
}

/* The device keeps nothing of a file that is not mapped any more. */
TEST_F(dax, unmounted_under_a_command_and_right_afterwards)
{
	struct writer writer = { .self = self };

	EXPECT_EQ(-1, umount(self->dir));
	EXPECT_EQ(EBUSY, errno);
	writer_starts(_metadata, &writer);
	/* Another mapping takes the place, so that the writer never has another's memory. */
	ASSERT_EQ(self->p, mmap(self->p, LENGTH, PROT_NONE,
				MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0));
	close(self->file);
	ASSERT_EQ(0, umount(self->dir)) TH_LOG("%s", strerror(errno));
	self->mounted = false;
	writer_ends(_metadata, &writer);
	munmap(self->p, LENGTH);

	ASSERT_EQ(0, mount_file(self, variant->type));
	memset(self->copy, 0x77, LENGTH);
	expect_file(_metadata, self);
	fill(_metadata, self, page, 0x12, 3 * page);
	/* Without msync(): an unmount writes everything back. */
	ASSERT_EQ(0, unmount_file(self));
	ASSERT_EQ(0, mount_file(self, variant->type));
	expect_file(_metadata, self);
}

TEST_HARNESS_MAIN
