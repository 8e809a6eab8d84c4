// SPDX-License-Identifier: GPL-2.0
/*
 * Tests of the ioctls of the HMM test driver that hmm-tests does not have: bad
 * input, and allocation failures.
 */
#include "dmirror_user.h"

#define PAGES	8

static const unsigned long commands[] = {
	HMM_DMIRROR_READ,
	HMM_DMIRROR_WRITE,
	HMM_DMIRROR_MIGRATE_TO_DEV,
	HMM_DMIRROR_MIGRATE_TO_SYS,
	HMM_DMIRROR_SNAPSHOT,
	HMM_DMIRROR_EXCLUSIVE,
	HMM_DMIRROR_CHECK_EXCLUSIVE,
	HMM_DMIRROR_RELEASE,
	HMM_DMIRROR_FLAGS,
	HMM_DMIRROR_READ_UNLOCKED,
};

FIXTURE(dmirror)
{
	int nodes[NODES], fd;
	size_t length;
	uint8_t *p, *bytes;
};

FIXTURE_SETUP(dmirror)
{
	if (!setup_nodes(_metadata, self->nodes))
		return;
	self->fd = self->nodes[0];
	self->length = PAGES * page;
	self->p = map(self->length, PROT_READ | PROT_WRITE);
	self->bytes = map(self->length, PROT_READ | PROT_WRITE);
	ASSERT_NE(MAP_FAILED, self->p);
	ASSERT_NE(MAP_FAILED, self->bytes);
	memset(self->p, 0x11, self->length);
}

FIXTURE_TEARDOWN(dmirror)
{
	for (int i = 0; i < NODES; i++)
		close(self->nodes[i]);
}

/* How many pages are in the memory of the node. */
static size_t local(int fd, const void *p)
{
	uint8_t seen[PAGES];
	size_t count = 0;

	if (dmirror(fd, HMM_DMIRROR_SNAPSHOT, p, PAGES, seen))
		return ~0;
	for (size_t i = 0; i < PAGES; i++)
		count += dmirror_is_local(seen[i]);
	return count;
}

static bool has_memory(int fd, void *p, void *bytes)
{
	return dmirror(fd, HMM_DMIRROR_MIGRATE_TO_DEV, p, PAGES, bytes) != -ENODEV;
}

TEST_F(dmirror, a_range_that_is_none_is_einval)
{
	const uint64_t start = gpu_addr(self->p);
	const struct hmm_dmirror_cmd bad[] = {
		{ .addr = start + 1, .npages = 1 },
		{ .addr = start + page - 1, .npages = 1 },
		{ .addr = start, .npages = 0 },
		{ .addr = start, .npages = -1 },
		{ .addr = start, .npages = 1ULL << 52 },
		{ .addr = -page, .npages = 1 },
		{ .addr = -page, .npages = 2 },
	};

	for (size_t i = 0; i < ARRAY_SIZE(commands); i++) {
		for (size_t j = 0; j < ARRAY_SIZE(bad); j++) {
			struct hmm_dmirror_cmd cmd = bad[j];

			cmd.ptr = gpu_addr(self->bytes);
			EXPECT_EQ(-EINVAL, gpu_ioctl(self->fd, commands[i], &cmd))
				TH_LOG("command %zu, range %zu", i, j);
			EXPECT_EQ(0, cmd.cpages);
			EXPECT_EQ(bad[j].npages, cmd.npages);
		}
	}
	EXPECT_EQ(self->length, cpu_unlike(self->p, 0x11, self->length));
}

TEST_F(dmirror, a_command_or_a_flag_that_is_not_known_is_einval)
{
	const unsigned long unknown[] = {
		_IOWR('H', 0x0a, struct hmm_dmirror_cmd),
		_IOWR('H', 0xff, struct hmm_dmirror_cmd),
		_IOWR('I', 0x00, struct hmm_dmirror_cmd),
		_IO('H', 0x00),
		0,
	};

	for (size_t i = 0; i < ARRAY_SIZE(unknown); i++)
		EXPECT_EQ(-EINVAL, dmirror(self->fd, unknown[i], self->p, PAGES, self->bytes));
	EXPECT_EQ(-EINVAL, dmirror(self->fd, HMM_DMIRROR_FLAGS, self->p, 2, NULL));
	EXPECT_EQ(-EINVAL, dmirror(self->fd, HMM_DMIRROR_FLAGS, self->p, 3, NULL));
}

TEST_F(dmirror, a_range_that_is_not_the_process_s_is_efault)
{
	void *kernel = (void *)(1UL << 63);

	for (size_t i = 0; i < ARRAY_SIZE(commands); i++) {
		switch (commands[i]) {
		case HMM_DMIRROR_CHECK_EXCLUSIVE:
		case HMM_DMIRROR_RELEASE:
		case HMM_DMIRROR_FLAGS:
			continue;
		}
		EXPECT_EQ(-EFAULT, dmirror(self->fd, commands[i], kernel, PAGES, self->bytes))
			TH_LOG("command %zu", i);
	}
}

TEST_F(dmirror, memory_that_cannot_be_accessed_is_efault)
{
	uint8_t *readable = map(self->length, PROT_READ), *none = map(self->length, PROT_NONE);

	ASSERT_NE(MAP_FAILED, readable);
	ASSERT_NE(MAP_FAILED, none);
	for (size_t i = 0; i < ARRAY_SIZE(commands); i++) {
		EXPECT_EQ(-EFAULT, gpu_ioctl(self->fd, commands[i], none));
		EXPECT_EQ(-EFAULT, gpu_ioctl(self->fd, commands[i], NULL));
	}
	EXPECT_EQ(-EFAULT, dmirror(self->fd, HMM_DMIRROR_READ, self->p, PAGES, readable));
	EXPECT_EQ(-EFAULT, dmirror(self->fd, HMM_DMIRROR_READ, self->p, PAGES, none));
	EXPECT_EQ(-EFAULT, dmirror(self->fd, HMM_DMIRROR_SNAPSHOT, self->p, PAGES, none));
	EXPECT_EQ(-EFAULT, dmirror(self->fd, HMM_DMIRROR_EXCLUSIVE, self->p, PAGES, none));
	EXPECT_EQ(-EFAULT, dmirror(self->fd, HMM_DMIRROR_WRITE, self->p, PAGES, none));
	EXPECT_EQ(-EFAULT, dmirror(self->fd, HMM_DMIRROR_READ, none, PAGES, self->bytes));
	EXPECT_EQ(-EFAULT, dmirror(self->fd, HMM_DMIRROR_WRITE, none, PAGES, self->bytes));
	EXPECT_EQ(-EPERM, dmirror(self->fd, HMM_DMIRROR_WRITE, readable, PAGES, self->bytes));
	EXPECT_EQ(self->length, cpu_unlike(self->p, 0x11, self->length));
	EXPECT_EQ(self->length, cpu_unlike(self->bytes, 0, self->length));
}

TEST_F(dmirror, more_than_can_be_copied_is_enomem)
{
	const size_t pages = (1UL << 30) / page + 1;
	uint8_t *p = map(pages * page, PROT_READ | PROT_WRITE);

	ASSERT_NE(MAP_FAILED, p);
	EXPECT_EQ(-ENOMEM, dmirror(self->fd, HMM_DMIRROR_READ, p, pages, p));
	EXPECT_EQ(-ENOMEM, dmirror(self->fd, HMM_DMIRROR_WRITE, p, pages, p));
	EXPECT_EQ(-ENOMEM, dmirror(self->fd, HMM_DMIRROR_MIGRATE_TO_DEV, p, pages, p));
	EXPECT_EQ(-ENOMEM, dmirror(self->fd, HMM_DMIRROR_EXCLUSIVE, p, pages, p));
	EXPECT_EQ(MAP_FAILED, mmap(NULL, pages * page, PROT_READ, MAP_PRIVATE, self->fd, 0));
	EXPECT_EQ(EINVAL, errno);
}

TEST_F(dmirror, another_process_is_eperm)
{
	int status;
	pid_t pid = fork();

	ASSERT_LE(0, pid);
	if (!pid) {
		int bad = 0;

		for (size_t i = 0; i < ARRAY_SIZE(commands); i++)
			bad += dmirror(self->fd, commands[i], self->p, 1, self->bytes) != -EPERM;
		_exit(bad);
	}
	ASSERT_EQ(pid, waitpid(pid, &status, 0));
	EXPECT_EQ(0, status);
	EXPECT_EQ(self->length, cpu_unlike(self->p, 0x11, self->length));
}

TEST_F(dmirror, nothing_moves_if_a_part_cannot_be_read)
{
	if (!has_memory(self->fd, self->p, self->bytes))
		SKIP(return, "no device memory");
	ASSERT_EQ(PAGES, local(self->fd, self->p));
	ASSERT_EQ(0, mprotect(self->p + 6 * page, page, PROT_NONE));
	EXPECT_EQ(-EINVAL, dmirror(self->fd, HMM_DMIRROR_MIGRATE_TO_SYS, self->p, PAGES, NULL));
	EXPECT_EQ(PAGES - 1, local(self->fd, self->p));

	ASSERT_EQ(0, mprotect(self->p + 6 * page, page, PROT_READ | PROT_WRITE));
	ASSERT_EQ(0, dmirror(self->fd, HMM_DMIRROR_MIGRATE_TO_SYS, self->p, PAGES, NULL));
	ASSERT_EQ(0, local(self->fd, self->p));
	ASSERT_EQ(0, munmap(self->p + 6 * page, page));
	EXPECT_EQ(-EINVAL, dmirror(self->fd, HMM_DMIRROR_MIGRATE_TO_DEV, self->p, PAGES,
				   self->bytes));
	EXPECT_EQ(0, local(self->fd, self->p));
	EXPECT_EQ(6 * page, cpu_unlike(self->p, 0x11, 6 * page));
}

TEST_F(dmirror, without_memory_there_migrations_are_enodev)
{
	if (has_memory(self->fd, self->p, self->bytes))
		SKIP(return, "there is device memory");
	EXPECT_EQ(-ENODEV, dmirror(self->fd, HMM_DMIRROR_MIGRATE_TO_SYS, self->p, PAGES, NULL));
	EXPECT_EQ(-ENODEV, dmirror(self->fd, HMM_DMIRROR_RELEASE, self->p, PAGES, NULL));
	EXPECT_EQ(0, dmirror(self->fd, HMM_DMIRROR_EXCLUSIVE, self->p, PAGES, self->bytes));
	EXPECT_EQ(0, local(self->fd, self->p));
	EXPECT_EQ(self->length, cpu_unlike(self->p, 0x11, self->length));
}

/*
 * FLAGS makes one allocation fail, once, and only for the file that asked for
 * it.
 */
TEST_F(dmirror, a_page_that_finds_no_memory_stays_in_ram)
{
	if (!has_memory(self->fd, self->p, self->bytes))
		SKIP(return, "no device memory");
	ASSERT_EQ(0, dmirror(self->fd, HMM_DMIRROR_MIGRATE_TO_SYS, self->p, PAGES, NULL));
	ASSERT_EQ(0, dmirror(self->fd, HMM_DMIRROR_FLAGS, self->p, 1, NULL));

	EXPECT_EQ(0, dmirror(self->nodes[1], HMM_DMIRROR_MIGRATE_TO_DEV, self->p, PAGES,
			     self->bytes));
	EXPECT_EQ(self->length, cpu_unlike(self->p, 0x11, self->length));

	EXPECT_EQ(-ENOENT, dmirror(self->fd, HMM_DMIRROR_MIGRATE_TO_DEV, self->p, PAGES,
				   self->bytes));
	EXPECT_EQ(PAGES - 1, local(self->fd, self->p));
	EXPECT_EQ(0, dmirror(self->fd, HMM_DMIRROR_MIGRATE_TO_DEV, self->p, PAGES, self->bytes));
	EXPECT_EQ(PAGES, local(self->fd, self->p));
	EXPECT_EQ(self->length, cpu_unlike(self->bytes, 0x11, self->length));
	EXPECT_EQ(self->length, cpu_unlike(self->p, 0x11, self->length));
}

/* READ and WRITE are not limited by the size of the device memory. */
TEST_F_TIMEOUT(dmirror, more_than_the_device_has_is_written_and_read, 120)
{
	const size_t length = 66UL << 20, pages = length / page;
	uint8_t *p = map(length, PROT_READ | PROT_WRITE);
	uint8_t *bytes = map(length, PROT_READ | PROT_WRITE);

	ASSERT_NE(MAP_FAILED, p);
	ASSERT_NE(MAP_FAILED, bytes);
	cpu_randomize(bytes, length, 66);
	EXPECT_EQ(0, dmirror(self->fd, HMM_DMIRROR_WRITE, p, pages, bytes));
	memset(bytes, 0, length);
	EXPECT_EQ(0, dmirror(self->fd, HMM_DMIRROR_READ, p, pages, bytes));
	EXPECT_EQ(length, cpu_differs(bytes, p, length));
	cpu_randomize(bytes, length, 66);
	EXPECT_EQ(length, cpu_differs(bytes, p, length));
}

TEST_F(dmirror, exclusive_access_ends_with_the_cpu_s_touch)
{
	ASSERT_EQ(0, dmirror(self->fd, HMM_DMIRROR_EXCLUSIVE, self->p, PAGES, self->bytes));
	EXPECT_EQ(self->length, cpu_unlike(self->bytes, 0x11, self->length));
	EXPECT_EQ(-EPERM, dmirror(self->fd, HMM_DMIRROR_CHECK_EXCLUSIVE, self->p, PAGES, NULL));
	EXPECT_EQ(0, dmirror(self->nodes[1], HMM_DMIRROR_CHECK_EXCLUSIVE, self->p, PAGES, NULL));
	for (size_t i = 0; i < PAGES; i++) {
		uint8_t *p = self->p + i * page;

		EXPECT_EQ(-EPERM, dmirror(self->fd, HMM_DMIRROR_CHECK_EXCLUSIVE, p, 1, NULL));
		EXPECT_EQ(page, cpu_unlike(p, 0x11, page));
		EXPECT_EQ(0, dmirror(self->fd, HMM_DMIRROR_CHECK_EXCLUSIVE, p, 1, NULL));
	}
	EXPECT_EQ(0, dmirror(self->fd, HMM_DMIRROR_CHECK_EXCLUSIVE, self->p, PAGES, NULL));

	/* What the device writes to the pages in system memory stays there. */
	memset(self->bytes, 0x22, self->length);
	ASSERT_EQ(0, dmirror(self->fd, HMM_DMIRROR_EXCLUSIVE, self->p, PAGES, self->bytes));
	memset(self->bytes, 0x22, self->length);
	ASSERT_EQ(0, dmirror(self->fd, HMM_DMIRROR_WRITE, self->p, PAGES, self->bytes));
	EXPECT_EQ(-EPERM, dmirror(self->fd, HMM_DMIRROR_CHECK_EXCLUSIVE, self->p, PAGES, NULL));
	EXPECT_EQ(self->length, cpu_unlike(self->p, 0x22, self->length));
}

TEST_F(dmirror, what_cannot_be_exclusive_has_its_errno)
{
	uint8_t *readable = map(self->length, PROT_READ);
	uint8_t *shared = mmap(NULL, self->length, PROT_READ | PROT_WRITE,
			       MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	ASSERT_NE(MAP_FAILED, readable);
	ASSERT_NE(MAP_FAILED, shared);
	EXPECT_EQ(-EPERM, dmirror(self->fd, HMM_DMIRROR_EXCLUSIVE, readable, 1, self->bytes));
	EXPECT_EQ(-EOPNOTSUPP, dmirror(self->fd, HMM_DMIRROR_EXCLUSIVE, shared, 1, self->bytes));
	ASSERT_EQ(0, munmap(self->p, self->length));
	EXPECT_EQ(-EFAULT, dmirror(self->fd, HMM_DMIRROR_EXCLUSIVE, self->p, 1, self->bytes));
}

TEST_F(dmirror, a_snapshot_goes_over_what_is_not_there)
{
	const size_t blocks = 4, pages = blocks * (2UL << 20) / page;
	uint8_t *p = map(pages * page, PROT_READ | PROT_WRITE);
	uint8_t *seen = map(pages, PROT_READ | PROT_WRITE);

	ASSERT_NE(MAP_FAILED, p);
	ASSERT_NE(MAP_FAILED, seen);
	p[0] = 1;
	p[(pages - 1) * page] = 1;
	ASSERT_EQ(0, munmap(p + page, (pages - 2) * page));
	ASSERT_EQ(0, dmirror(self->fd, HMM_DMIRROR_SNAPSHOT, p, pages, seen));
	EXPECT_TRUE(seen[0] & HMM_DMIRROR_PROT_WRITE);
	EXPECT_TRUE(seen[pages - 1] & HMM_DMIRROR_PROT_WRITE);
	EXPECT_EQ(pages - 2, cpu_unlike(seen + 1, HMM_DMIRROR_PROT_ERROR, pages - 2));
}

/* The kernel cannot reach it, so neither can a device. */
TEST_F(dmirror, a_snapshot_reports_secret_memory_as_an_error)
{
	uint8_t *secret, seen = 0;
	int fd = syscall(SYS_memfd_secret, 0);

	if (fd < 0)
		SKIP(return, "memfd_secret: %s", strerror(errno));
	ASSERT_EQ(0, ftruncate(fd, page));
	secret = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	ASSERT_NE(MAP_FAILED, secret);
	*secret = 1;
	ASSERT_EQ(0, dmirror(self->fd, HMM_DMIRROR_SNAPSHOT, secret, 1, &seen));
	EXPECT_EQ(HMM_DMIRROR_PROT_ERROR, seen);
	EXPECT_EQ(1, *secret);
	munmap(secret, page);
	close(fd);
}

TEST_HARNESS_MAIN
