// SPDX-License-Identifier: GPL-2.0
/*
 * Threads race for the same few pages: the devices of two nodes read, write and
 * migrate them, while CPUs access, unmap, protect, drop, merge and fork them.
 * dmirror_race.h checks the bytes that each of them reads. The kernel must not
 * warn.
 *
 * DMIRROR_SECONDS in the environment is the time for all tests together, 5 by
 * default.
 */
#include <sys/prctl.h>

#include "dmirror_race.h"

#define KSM	"/sys/kernel/mm/ksm/"

/* A write by the only writer of a page. Retries while the page is protected. */
static bool writes_own(struct thread *t, size_t i, bool device)
{
	uint64_t oldest;
	bool done = false;

	fill(t->bytes, i, begin(t, i, &oldest, false));
	while (!done && !stopped()) {
		if (device)
			done = !command(t, HMM_DMIRROR_WRITE, i, 1);
		else
			done = cpu_writes_page(t, i, 0, page);
		if (!done)
			sched_yield();
	}
	end(t, i, oldest, done);
	return done;
}

static void moves_own(struct thread *t, size_t i)
{
	size_t where = below(t, 4);

	if (where == 0)
		command_reads(t, HMM_DMIRROR_MIGRATE_TO_DEV, i, 1);
	else if (where == 1)
		command(t, HMM_DMIRROR_MIGRATE_TO_SYS, i, 1);
	else if (where == 2)
		command_reads(t, HMM_DMIRROR_EXCLUSIVE, i, 1);
}

/*
 * CPU and device must see the last write, since the page has no other writer.
 */
static bool reads_own(struct thread *t, size_t i, bool device)
{
	return device ? command_reads(t, HMM_DMIRROR_READ, i, 1) : cpu_reads_page(t, i);
}

/* Writes to pages that only it writes to, moves them, and checks each write. */
static bool ledger(struct thread *t)
{
	const size_t n = (SHARED - SINGLE) / NODES;
	size_t i = SINGLE + t->node * n + below(t, n), how = below(t, 4);

	if (!writes_own(t, i, how & 1))
		return false;
	moves_own(t, i);
	if (!reads_own(t, i, how & 2))
		return false;
	moves_own(t, i);
	return reads_own(t, i, !(how & 2));
}

static bool device_writes(struct thread *t)
{
	size_t n = 1 + below(t, MOST / 2);
	size_t i = SHARED + below(t, PAGES - SHARED - n + 1);
	uint64_t oldest[MOST];
	int err;

	for (size_t j = 0; j < n; j++)
		fill(t->bytes + j * page, i + j, begin(t, i + j, &oldest[j], false));
	err = command(t, HMM_DMIRROR_WRITE, i, n);
	for (size_t j = 0; j < n; j++)
		end(t, i + j, oldest[j], !err);
	return !err;
}

static bool device_reads(struct thread *t)
{
	size_t n = 1 + below(t, MOST), i = below(t, PAGES - n + 1);

	return command_reads(t, t->node ? HMM_DMIRROR_READ_UNLOCKED : HMM_DMIRROR_READ, i, n);
}

static bool cpu_writes(struct thread *t)
{
	size_t i = SHARED + below(t, PAGES - SHARED), offset = 0, length = page;
	uint64_t oldest;
	bool done;

	if (below(t, 2)) {
		offset = below(t, page / 8) * 8;
		length = 8;
	}
	fill(t->bytes, i, begin(t, i, &oldest, false));
	done = cpu_writes_page(t, i, offset, length);
	end(t, i, oldest, done && length == page);
	return done;
}

static bool cpu_reads(struct thread *t)
{
	return cpu_reads_page(t, below(t, PAGES));
}

/*
 * Usually skips the pages for KSM, which merges only pages that do not change.
 */
static size_t first_to_move(struct thread *t, size_t n)
{
	size_t first = below(t, 16) ? SINGLE : 0;

	return first + below(t, PAGES - first - n + 1);
}

static bool migrates(struct thread *t)
{
	size_t n = 1 + below(t, below(t, 4) ? 2 : MOST);

	return command_reads(t, HMM_DMIRROR_MIGRATE_TO_DEV, first_to_move(t, n), n);
}

static bool goes_home(struct thread *t)
{
	size_t n = 1 + below(t, MOST);

	return !command(t, HMM_DMIRROR_MIGRATE_TO_SYS, below(t, PAGES - n + 1), n);
}

/* Makes a huge page of the region and what follows it, and migrates it, or most of it. */
static bool migrates_huge(struct thread *t)
{
	int err;

	command(t, HMM_DMIRROR_MIGRATE_TO_SYS, 0, huge / page);
	madvise(region, huge, MADV_COLLAPSE);
	err = command(t, HMM_DMIRROR_MIGRATE_TO_DEV, 0, huge / page);
	return !err || err == -ENOENT;
}

static bool exclusive(struct thread *t)
{
	size_t n = 1 + below(t, 3), i = first_to_move(t, n);
	bool done = command_reads(t, HMM_DMIRROR_EXCLUSIVE, i, n);

	command(t, HMM_DMIRROR_CHECK_EXCLUSIVE, i, n);
	return done;
}

static bool snapshot(struct thread *t)
{
	const uint8_t device = coherent() ? HMM_DMIRROR_PROT_DEV_COHERENT_LOCAL |
					    HMM_DMIRROR_PROT_DEV_COHERENT_REMOTE :
					    HMM_DMIRROR_PROT_DEV_PRIVATE_LOCAL;
	const uint8_t known = HMM_DMIRROR_PROT_READ | HMM_DMIRROR_PROT_WRITE |
			      HMM_DMIRROR_PROT_PMD | HMM_DMIRROR_PROT_ZERO | device;

	if (command(t, HMM_DMIRROR_SNAPSHOT, 0, PAGES))
		return false;
	for (size_t i = 0; i < PAGES; i++) {
		if (t->bytes[i] == HMM_DMIRROR_PROT_ERROR ? !is_wild(i) : t->bytes[i] & ~known)
			return fail(t, "SNAPSHOT of page %zu: %#x", i, t->bytes[i]);
	}
	return true;
}

static bool releases(struct thread *t)
{
	t->node = below(t, NODES);
	return !command(t, HMM_DMIRROR_RELEASE, 0, 1);
}

static bool reopens(struct thread *t)
{
	size_t i = below(t, WILD);
	int fd = dmirror_open(below(t, NODES)), err;

	if (fd < 0)
		return fail(t, "%s", strerror(-fd));
	err = dmirror(fd, HMM_DMIRROR_READ, at(i), 1, t->bytes);
	if (err && !is_expected(HMM_DMIRROR_READ, err, false))
		fail(t, "READ of page %zu: %s", i, strerror(-err));
	close(fd);
	return !err;
}

static bool drops(struct thread *t)
{
	size_t n = 1 + below(t, 4), i = SHARED + below(t, PAGES - SHARED - n + 1);
	uint64_t oldest[MOST];
	int err;

	for (size_t j = 0; j < n; j++)
		begin(t, i + j, &oldest[j], true);
	err = madvise(at(i), n * page, MADV_DONTNEED) ? errno : 0;
	for (size_t j = 0; j < n; j++)
		end(t, i + j, oldest[j], !err);
	/*
	 * On ENOMEM, the pages of the range that are mapped were dropped
	 * nevertheless.
	 */
	if (err && (err != ENOMEM || !is_wild(i + n - 1)))
		fail(t, "madvise of page %zu: %s", i, strerror(err));
	return !err;
}

static bool unmaps(struct thread *t)
{
	size_t n = 1 + below(t, 4), i = WILD + below(t, PAGES - WILD - n + 1);
	int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;
	uint64_t oldest[MOST];
	bool ok = true;

	for (size_t j = 0; j < n; j++)
		begin(t, i + j, &oldest[j], true);
	if (below(t, 2)) {
		ok = !munmap(at(i), n * page);
		sched_yield();
		/* No other thread maps memory there. */
		flags |= MAP_FIXED_NOREPLACE;
	}
	ok = ok && mmap(at(i), n * page, PROT_READ | PROT_WRITE, flags, -1, 0) == at(i);
	for (size_t j = 0; j < n; j++)
		end(t, i + j, oldest[j], ok);
	return ok || fail(t, "page %zu: %s", i, strerror(errno));
}

static bool protects(struct thread *t)
{
	size_t n = 1 + below(t, 8), i = below(t, PAGES - n + 1);
	bool wild = is_wild(i + n - 1);
	int prot = is_wild(i) && below(t, 2) ? PROT_NONE : PROT_READ;

	if (mprotect(at(i), n * page, prot) && (errno != ENOMEM || !wild))
		fail(t, "page %zu: %s", i, strerror(errno));
	usleep(below(t, 100));
	/* Page by page, since there may be holes. */
	for (size_t j = i; j < i + n; j++) {
		if (mprotect(at(j), page, PROT_READ | PROT_WRITE) && (errno != ENOMEM || !wild))
			fail(t, "page %zu: %s", j, strerror(errno));
	}
	return true;
}

static int pagemap = -1;

/* The frame of a page in system memory, or 0. */
static uint64_t frame(size_t i)
{
	uint64_t entry;

	if (pread(pagemap, &entry, sizeof(entry), gpu_addr(at(i)) / page * 8) != sizeof(entry))
		return 0;
	return entry >> 63 ? entry & ((1ULL << 55) - 1) : 0;
}

/* Two pages with the same bytes become one, until somebody writes to one of them. */
static bool merges(struct thread *t)
{
	size_t i = below(t, SINGLE / 2) * 2, how = below(t, 8);
	bool merged = false;

	if (!writes_own(t, i, how & 1) || !writes_own(t, i + 1, how & 1) ||
	    !cpu_reads_page(t, i) || !cpu_reads_page(t, i + 1))
		return false;
	for (int j = 0; j < 200 && !merged && !stopped(); j++) {
		usleep(1000);
		merged = frame(i) && frame(i) == frame(i + 1);
	}
	for (size_t j = 0; j < 2; j++) {
		if (!writes_own(t, i + j, how & 2) || !reads_own(t, i, how & 4) ||
		    !reads_own(t, i + 1, how & 4) || !reads_own(t, i, !(how & 4)) ||
		    !reads_own(t, i + 1, !(how & 4)))
			return false;
	}
	return merged;
}

/*
 * Whether a page of a forked process still has the bytes that it had at first.
 */
static bool is_frozen(struct thread *t, size_t i, bool device)
{
	int err = device ? dmirror(nodes[t->node], HMM_DMIRROR_READ, at(i), 1, t->bytes) : 0;
	size_t differs;

	if (err)
		return err == -EBUSY || fail(t, "READ of page %zu: %s", i, strerror(-err));
	differs = cpu_differs(device ? t->bytes : at(i), frozen + i * page, page);
	return differs == page || fail(t, "page %zu has changed at byte %zu for the %s", i, differs,
				       device ? "device" : "CPU");
}

static bool writes_frozen(struct thread *t, size_t i, bool device)
{
	uint8_t *bytes = frozen + i * page;
	int err = 0;

	for (size_t j = 0; j < page; j++)
		bytes[j] ^= 0xff;
	if (device) {
		do {
			err = dmirror(nodes[t->node], HMM_DMIRROR_WRITE, at(i), 1, bytes);
		} while (err == -EBUSY);
	} else {
		memcpy(at(i), bytes, page);
	}
	return !err || fail(t, "WRITE of page %zu: %s", i, strerror(-err));
}

/*
 * A forked process keeps the bytes of the time of fork(), until it writes
 * itself.
 */
static bool forked(struct thread *t, struct window *windows)
{
	bool here[PAGES];

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	t->node = below(t, NODES);
	nodes[t->node] = dmirror_open(t->node);
	if (nodes[t->node] < 0)
		return fail(t, "%s", strerror(-nodes[t->node]));
	for (size_t i = 0; i < PAGES; i++) {
		closed(&windows[i], i);
		/*
		 * Undo the protection. This fails for pages that are not
		 * mapped.
		 */
		here[i] = !mprotect(at(i), page, PROT_READ | PROT_WRITE);
		if (!here[i] && !is_wild(i))
			return fail(t, "page %zu: %s", i, strerror(errno));
		if (!here[i])
			continue;
		memcpy(frozen + i * page, at(i), page);
		if (!check(t, i, frozen + i * page, &windows[i], "read"))
			return false;
	}
	for (size_t round = 0; round < 4; round++) {
		for (size_t i = 0; i < PAGES; i++) {
			if (here[i] && !is_frozen(t, i, (i + round) & 1))
				return false;
		}
		usleep(500);
	}
	for (size_t i = 0; i < PAGES; i++) {
		if (here[i] && (!writes_frozen(t, i, i & 1) || !is_frozen(t, i, i & 2) ||
				!is_frozen(t, i, !(i & 2))))
			return false;
	}
	return true;
}

static bool forks(struct thread *t)
{
	struct window windows[PAGES];
	int status = -1;
	pid_t pid;

	for (size_t i = 0; i < PAGES; i++)
		opened(&windows[i], i);
	pid = fork();
	if (!pid)
		_exit(!forked(t, windows));
	if (pid < 0 || waitpid(pid, &status, 0) != pid || status)
		return fail(t, "process %d: status %#x", pid, status);
	return true;
}

/* One thread for each. It rests between turns: up to this many microseconds. */
static const struct role roles[] = {
	{ "ledger, node 0", ledger, 0, 0, 0 },
	{ "ledger, node 1", ledger, 1, 0, 0 },
	{ "device writes, node 0", device_writes, 0, 0, 0 },
	{ "device writes, node 1", device_writes, 1, 0, 50 },
	{ "device reads, node 0", device_reads, 0, 0, 50 },
	{ "device reads unlocked, node 1", device_reads, 1, 0, 50 },
	{ "CPU writes", cpu_writes, 0, 0, 0 },
	{ "CPU reads", cpu_reads, 0, 0, 10 },
	{ "migrates, node 0", migrates, 0, 0, 20 },
	{ "migrates, node 1", migrates, 1, 0, 50 },
	{ "takes home, node 0", goes_home, 0, 0, 100 },
	{ "takes home, node 1", goes_home, 1, 0, 200 },
	{ "exclusive, node 0", exclusive, 0, 0, 100 },
	{ "exclusive, node 1", exclusive, 1, 0, 200 },
	{ "snapshot", snapshot, 0, 0, 100 },
	{ "releases", releases, 0, 0, 200000 },
	{ "opens and closes", reopens, 0, 0, 20000 },
	{ "drops", drops, 0, DROP, 100 },
	{ "unmaps", unmaps, 0, UNMAP, 100 },
	{ "protects", protects, 0, PROTECT, 200 },
	{ "merges", merges, 0, MERGE, 0 },
	{ "forks", forks, 0, FORK, 2000 },
	{ "migrates a huge page, node 0", migrates_huge, 0, HUGE, 100 },
};

#define ROLES	ARRAY_SIZE(roles)

static void *role_thread(void *arg)
{
	struct thread *t = arg;

	while (!stopped()) {
		uint64_t rest = 2 * t->role->rest, until;

		t->turns++;
		if (t->role->turn(t))
			__atomic_add_fetch(&t->count, 1, __ATOMIC_RELAXED);
		rest = rest ? below(t, rest) : 0;
		until = microseconds() + rest;
		/*
		 * The kernel may have no high-resolution timer: spin for a
		 * short rest.
		 */
		if (rest > 10000)
			usleep(rest);
		do {
			sched_yield();
		} while (microseconds() < until && !stopped());
	}
	return NULL;
}

/* System-wide settings, which the teardown restores. */
static struct setting {
	const char *path, *value;
	char old[24];
} settings[] = {
	{ .path = KSM "sleep_millisecs", .value = "1" },
	{ .path = KSM "pages_to_scan", .value = "1000" },
	{ .path = KSM "smart_scan", .value = "0" },
	{ .path = KSM "run", .value = "1" },
};

/* Writes a number to a file, if there is one, and returns the old contents. */
static bool sets(const char *path, const char *value, char old[24])
{
	int fd = open(path, O_RDWR | O_CLOEXEC);
	bool ok;

	if (fd < 0)
		return false;
	ok = (!old || read(fd, old, 23) > 0) && pwrite(fd, value, strlen(value), 0) > 0;
	close(fd);
	return ok;
}

FIXTURE(dmirror_race)
{
	unsigned long trouble;
	uint64_t time;		/* milliseconds */
	struct thread threads[ROLES];
};

/* The parts of the test, and its share of the time. */
FIXTURE_VARIANT(dmirror_race)
{
	unsigned int parts, percent;
};

FIXTURE_VARIANT_ADD(dmirror_race, migrate)
{
	.percent = 10,
};

FIXTURE_VARIANT_ADD(dmirror_race, migrate_drop_unmap)
{
	.parts = DROP | UNMAP,
	.percent = 10,
};

FIXTURE_VARIANT_ADD(dmirror_race, migrate_protect)
{
	.parts = PROTECT,
	.percent = 10,
};

FIXTURE_VARIANT_ADD(dmirror_race, migrate_merge)
{
	.parts = MERGE,
	.percent = 10,
};

FIXTURE_VARIANT_ADD(dmirror_race, migrate_fork)
{
	.parts = FORK,
	.percent = 10,
};

FIXTURE_VARIANT_ADD(dmirror_race, all)
{
	.parts = DROP | UNMAP | PROTECT | MERGE | FORK,
	.percent = 50,
};

static unsigned int seconds(void)
{
	const char *said = getenv("DMIRROR_SECONDS");

	return said && atoi(said) > 0 ? atoi(said) : 5;
}

/* Seconds until each role must have done something, and to end. */
#define GRACE	60

FIXTURE_SETUP(dmirror_race)
{
	const struct sigaction action = { .sa_handler = on_fault, .sa_flags = SA_NODEFER };

	if (!setup_nodes(_metadata, nodes))
		return;
	self->trouble = kernel_trouble();
	self->time = seconds() * 10UL * variant->percent;
	parts = variant->parts;
	shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS,
		      -1, 0);
	ASSERT_NE(MAP_FAILED, shared);
	pattern = map(2 * PAGES * page, PROT_READ | PROT_WRITE);
	frozen = pattern + PAGES * page;
	if (wants_huge()) {
		if (!setup_huge(_metadata, &huge))
			return;
		region = map_huge(huge, huge);
		parts |= HUGE;
	} else {
		region = map(PAGES * page, PROT_READ | PROT_WRITE);
	}
	ASSERT_NE(MAP_FAILED, pattern);
	ASSERT_NE(MAP_FAILED, region);
	for (size_t i = 0; i < PAGES; i++) {
		cpu_randomize(pattern + i * page, page, i < SINGLE ? i & ~1UL : i);
		pthread_mutex_init(&shared->books[i].lock, NULL);
	}
	ASSERT_GE(THREADS, ROLES);
	for (size_t i = 0; i < ROLES; i++) {
		self->threads[i] = (struct thread) {
			.role = &roles[i],
			.index = i,
			.node = roles[i].node,
			.seed = i,
			.bytes = map(MOST * page + (roles[i].part == HUGE ? huge : 0),
				     PROT_READ | PROT_WRITE),
		};
		ASSERT_NE(MAP_FAILED, self->threads[i].bytes);
	}
	if (huge) {
		int64_t large = instance_counter(0, "large_to_device");

		memset(region, 0, huge);
		ASSERT_EQ(0, dmirror(nodes[0], HMM_DMIRROR_MIGRATE_TO_DEV, region, huge / page,
				     self->threads[ROLES - 1].bytes));
		/* The huge page is one on the device, too. Another driver has no such counter. */
		if (large >= 0)
			ASSERT_EQ(large + huge / page, instance_counter(0, "large_to_device"));
	}
	ASSERT_EQ(0, sigaction(SIGSEGV, &action, NULL));
	share_cpu_of_uml();
	if (!(parts & MERGE))
		return;

	pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	if (pagemap < 0 || access(KSM "run", W_OK) ||
	    madvise(region, SINGLE * page, MADV_MERGEABLE)) {
		if (parts == MERGE)
			SKIP(return, "no KSM, or not root");
		ksft_print_msg("nothing is merged: no KSM, or not root\n");
		parts &= ~MERGE;
		return;
	}
	for (size_t i = 0; i < ARRAY_SIZE(settings); i++)
		sets(settings[i].path, settings[i].value, settings[i].old);
}

FIXTURE_TEARDOWN(dmirror_race)
{
	for (size_t i = 0; i < ARRAY_SIZE(settings); i++) {
		if (settings[i].old[0])
			EXPECT_TRUE(sets(settings[i].path, settings[i].old, NULL));
	}
	close(nodes[0]);
	close(nodes[1]);
	EXPECT_EQ(self->trouble, kernel_trouble());
}

/* Whether the test has a thread with this role. */
static bool is_played(const struct role *role)
{
	return !role->part || role->part & parts;
}

static bool all_did_something(const struct thread *threads)
{
	for (size_t i = 0; i < ROLES; i++) {
		if (is_played(&roles[i]) && !__atomic_load_n(&threads[i].count, __ATOMIC_RELAXED))
			return false;
	}
	return true;
}

TEST_F_TIMEOUT(dmirror_race, no_byte_is_torn_lost_late_or_foreign, seconds() + 3 * GRACE)
{
	struct thread *t = self->threads;
	uint64_t start = microseconds(), elapsed;
	struct timespec limit;

	for (size_t i = 0; i < ROLES; i++) {
		if (is_played(&roles[i]))
			ASSERT_EQ(0, pthread_create(&t[i].thread, NULL, role_thread, &t[i]));
	}
	do {
		usleep(10 * 1000);
		elapsed = (microseconds() - start) / 1000;
	} while (!stopped() && (elapsed < self->time ||
				(elapsed < self->time + GRACE * 1000 && !all_did_something(t))));
	stop();

	clock_gettime(CLOCK_REALTIME, &limit);
	limit.tv_sec += GRACE;
	for (size_t i = 0; i < ROLES; i++) {
		if (!is_played(&roles[i]))
			continue;
		ASSERT_EQ(0, pthread_timedjoin_np(t[i].thread, NULL, &limit))
			TH_LOG("%s: stuck", roles[i].name);
		ksft_print_msg("%s: %llu of %llu turns, %llu busy, %llu vague\n", roles[i].name,
			       (unsigned long long)t[i].count, (unsigned long long)t[i].turns,
			       (unsigned long long)t[i].busy, (unsigned long long)t[i].vague);
	}
	ASSERT_FALSE(shared->failed) TH_LOG("%s", shared->failure);
	for (size_t i = 0; i < ROLES; i++) {
		if (is_played(&roles[i]))
			EXPECT_LT(0, t[i].count) TH_LOG("%s: nothing done", roles[i].name);
	}
	/* All other threads have ended: the pages hold the last write. */
	for (size_t i = 0; i < PAGES; i++)
		command_reads(&t[i % 2], HMM_DMIRROR_READ, i, 1);
	for (size_t i = 0; i < PAGES; i++)
		cpu_reads_page(t, i);
	EXPECT_FALSE(shared->failed) TH_LOG("%s", shared->failure);
}

TEST_HARNESS_MAIN
