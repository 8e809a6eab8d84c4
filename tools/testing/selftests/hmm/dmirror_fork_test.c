// SPDX-License-Identifier: GPL-2.0
/*
 * fork() with pages on the device, and device writes after it. Copy-on-write
 * has to keep the bytes of each process apart, whether a CPU or a device
 * writes, and wherever the pages are.
 *
 * The test process sends orders to the other processes, and knows the bytes
 * that the memory of each must have. After each step all bytes of all processes
 * are checked through the device; at the end also by the CPU, which migrates
 * the pages back to system memory.
 */
#include <sys/prctl.h>

#include "dmirror_user.h"

/* Two and a half of the blocks of 16 pages that a CPU fault migrates, or a huge page. */
static size_t most_pages = 40;
#define PROCESSES	4

enum { PARENT, CHILD, GRANDCHILD, SECOND = GRANDCHILD, THIRD };

enum order {
	/* CPU_TOUCH writes one byte of a page. */
	CPU_READ, CPU_WRITE, CPU_TOUCH,
	DEVICE_READ, DEVICE_WRITE,
	TO_DEVICE, TO_SYSTEM, LOOK,
	UNMAP, CLOSE,
	FORK, REAP, EXIT,
};

/*
 * An order for every step-th page from first on, or (FORK, REAP) for process
 * who.
 */
struct message {
	enum order order;
	size_t first, step;
	int who;
};

enum touch { NOT, READS, WRITES };

/* How a CPU touches every step-th page. */
struct toucher {
	enum touch how;
	size_t step;
};

FIXTURE_VARIANT(dmirror_fork)
{
	size_t pages;				/* 0: most_pages */
	unsigned int childs_node;
	struct toucher before, parent, child;	/* before and after fork() */
	bool cpus, back;			/* after a step: CPUs read; pages go back */
};

struct process {
	uint8_t *image;		/* expected contents; source of device writes */
	uint8_t *seen;		/* what the process or its device has read */
	unsigned int node;
	bool lives;		/* and has the memory mapped */
	int order[2], reply[2];	/* pipes */
};

FIXTURE(dmirror_fork)
{
	uint8_t *p;
	size_t pages, length;
	struct process processes[PROCESSES];
	uint64_t serial;	/* makes the bytes of each write different */
	unsigned long trouble;

	/* These differ between the processes. */
	int me, fd;
	pid_t pid[PROCESSES];
};

FIXTURE_VARIANT_ADD(dmirror_fork, untouched)
{
	.before = { NOT, 1 },
};

FIXTURE_VARIANT_ADD(dmirror_fork, cpus_look_after_each_step)
{
	.cpus = true,
	.back = true,
};

FIXTURE_VARIANT_ADD(dmirror_fork, pages_go_back_after_each_step)
{
	.back = true,
};

FIXTURE_VARIANT_ADD(dmirror_fork, child_on_the_other_node)
{
	.childs_node = 1,
};

FIXTURE_VARIANT_ADD(dmirror_fork, parent_read)
{
	.parent = { READS, 1 },
};

FIXTURE_VARIANT_ADD(dmirror_fork, parent_wrote)
{
	.parent = { WRITES, 1 },
};

FIXTURE_VARIANT_ADD(dmirror_fork, child_read)
{
	.child = { READS, 1 },
};

FIXTURE_VARIANT_ADD(dmirror_fork, child_wrote)
{
	.child = { WRITES, 1 },
};

FIXTURE_VARIANT_ADD(dmirror_fork, both_wrote_some)
{
	.parent = { WRITES, 2 },
	.child = { WRITES, 3 },
};

FIXTURE_VARIANT_ADD(dmirror_fork, read_some_before_fork)
{
	.before = { READS, 3 },
};

FIXTURE_VARIANT_ADD(dmirror_fork, wrote_some_before_fork)
{
	.before = { WRITES, 3 },
	.child = { READS, 2 },
};

FIXTURE_VARIANT_ADD(dmirror_fork, two_pages)
{
	.pages = 2,
};

FIXTURE_VARIANT_ADD(dmirror_fork, two_pages_one_read)
{
	.pages = 2,
	.parent = { READS, 2 },
};

#define FORKED	FIXTURE_DATA(dmirror_fork)
#define VARIANT	FIXTURE_VARIANT(dmirror_fork)

/* Runs one command if the pages are consecutive, else one for each page. */
static int command(FORKED *self, unsigned long request, const struct message *m, uint8_t *bytes)
{
	size_t pages = m->step == 1 ? self->pages - m->first : 1;
	int err = 0;

	if (self->fd < 0)
		self->fd = dmirror_open(self->processes[self->me].node);
	if (self->fd < 0)
		return self->fd;
	for (size_t i = m->first; i < self->pages && !err; i += m->step == 1 ? pages : m->step) {
		/* A snapshot has one byte a page. */
		size_t at = request == HMM_DMIRROR_SNAPSHOT ? i : i * page;

		err = dmirror(self->fd, request, self->p + i * page, pages, bytes + at);
	}
	return err;
}

/* The byte of page i that CPU_TOUCH writes. */
static size_t touched(size_t i)
{
	return i * page + (i * 97 + 11) % page;
}

static void cpu(FORKED *self, const struct message *m)
{
	struct process *me = &self->processes[self->me];

	for (size_t i = m->first; i < self->pages; i += m->step) {
		if (m->order == CPU_READ)
			memcpy(me->seen + i * page, self->p + i * page, page);
		else if (m->order == CPU_WRITE)
			memcpy(self->p + i * page, me->image + i * page, page);
		else
			cpu_store(self->p + touched(i), me->image[touched(i)]);
	}
}

/* 0 or a negative errno. */
static int obey(FORKED *self, const struct message *m);

/* A new process: takes orders until the last one. */
static void serve(FORKED *self, int who)
{
	struct process *me = &self->processes[who];
	struct message m = { 0 };
	int reply;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	/* The parent's file cannot be used by this process. */
	close(self->fd);
	self->fd = -1;
	self->me = who;
	while (m.order != EXIT && read(me->order[0], &m, sizeof(m)) == sizeof(m)) {
		reply = obey(self, &m);
		if (write(me->reply[1], &reply, sizeof(reply)) != sizeof(reply))
			break;
	}
	_exit(0);
}

/* Carries out an order in the process that it is for. */
static int obey(FORKED *self, const struct message *m)
{
	struct process *me = &self->processes[self->me];
	int status;

	switch (m->order) {
	case CPU_READ:
	case CPU_WRITE:
	case CPU_TOUCH:
		cpu(self, m);
		return 0;
	case DEVICE_READ:
		return command(self, HMM_DMIRROR_READ, m, me->seen);
	case DEVICE_WRITE:
		return command(self, HMM_DMIRROR_WRITE, m, me->image);
	case TO_DEVICE:
		return command(self, HMM_DMIRROR_MIGRATE_TO_DEV, m, me->seen);
	case TO_SYSTEM:
		return command(self, HMM_DMIRROR_MIGRATE_TO_SYS, m, me->seen);
	case LOOK:
		return command(self, HMM_DMIRROR_SNAPSHOT, m, me->seen);
	case UNMAP:
		return munmap(self->p, self->length) ? -errno : 0;
	case CLOSE:
		status = close(self->fd);
		self->fd = -1;
		return status;
	case FORK:
		self->pid[m->who] = fork();
		if (!self->pid[m->who])
			serve(self, m->who);
		return self->pid[m->who] < 0 ? -errno : 0;
	case REAP:
		if (waitpid(self->pid[m->who], &status, 0) != self->pid[m->who])
			return -errno;
		return status ? -ECHILD : 0;
	case EXIT:
		break;
	}
	return 0;
}

/* Has a process carry out an order. */
static int command_to(FORKED *self, int who, struct message m)
{
	struct process *process = &self->processes[who];
	int reply;

	if (who == PARENT)
		return obey(self, &m);
	if (write(process->order[1], &m, sizeof(m)) != sizeof(m) ||
	    read(process->reply[0], &reply, sizeof(reply)) != sizeof(reply))
		return -EPIPE;
	return reply;
}

#define TO(who, ord, ...)	command_to(self, who, (struct message){ .order = ord, __VA_ARGS__ })
#define TO_ALL_OF(who, order)	TO(who, order, 0, 1)

static const char *const name_of[] = { "parent", "child", "second", "third" };

/* Checks all bytes of a process. */
static void expect_bytes(struct __test_metadata *_metadata, FORKED *self, int who,
			 enum order order)
{
	struct process *process = &self->processes[who];
	size_t at;

	memset(process->seen, 0xee, self->length);
	ASSERT_EQ(0, TO_ALL_OF(who, order))
		TH_LOG("the %s's %s", name_of[who], order == CPU_READ ? "CPU" : "device");
	at = cpu_differs(process->seen, process->image, self->length);
	ASSERT_EQ(self->length, at)
		TH_LOG("the %s's %s after write %llu: page %zu, byte %zu is %#x, not %#x",
		       name_of[who], order == CPU_READ ? "CPU" : "device",
		       (unsigned long long)self->serial, at / page, at % page,
		       process->seen[at], process->image[at]);
}

static void expect_all(struct __test_metadata *_metadata, FORKED *self, enum order order)
{
	for (int who = 0; who < PROCESSES; who++) {
		if (self->processes[who].lives)
			expect_bytes(_metadata, self, who, order);
	}
}

/* The checks after each step. */
static void expect_step(struct __test_metadata *_metadata, FORKED *self, const VARIANT *variant)
{
	expect_all(_metadata, self, DEVICE_READ);
	if (variant->cpus)
		expect_all(_metadata, self, CPU_READ);
	for (int who = 0; who < PROCESSES && variant->back; who++) {
		if (self->processes[who].lives)
			ASSERT_EQ(0, TO_ALL_OF(who, TO_DEVICE)) TH_LOG("the %s", name_of[who]);
	}
}

/* A step: writes bytes that no other write and no other page has. */
static void writes(struct __test_metadata *_metadata, FORKED *self, const VARIANT *variant,
		   int who, enum order order, size_t first, size_t step)
{
	uint8_t *image = self->processes[who].image;

	self->serial++;
	for (size_t i = first; i < self->pages; i += step)
		cpu_randomize(image + i * page, page, self->serial << 32 | i);
	ASSERT_EQ(0, TO(who, order, first, step)) TH_LOG("the %s", name_of[who]);
	expect_step(_metadata, self, variant);
}

static void touch(struct __test_metadata *_metadata, FORKED *self, int who,
		  const struct toucher *toucher)
{
	struct process *process = &self->processes[who];

	switch (toucher->how) {
	case NOT:
		break;
	case READS:
		ASSERT_EQ(0, TO(who, CPU_READ, 0, toucher->step));
		for (size_t i = 0; i < self->length; i += toucher->step * page)
			ASSERT_EQ(page, cpu_differs(process->seen + i, process->image + i, page));
		break;
	case WRITES:
		for (size_t i = 0; i < self->pages; i += toucher->step)
			process->image[touched(i)] ^= 0xff;
		ASSERT_EQ(0, TO(who, CPU_TOUCH, 0, toucher->step));
		break;
	}
}

/* How many of a process's pages its node has. */
static size_t pages_on_device(struct __test_metadata *_metadata, FORKED *self, int who)
{
	size_t count = 0;

	ASSERT_EQ(0, TO_ALL_OF(who, LOOK));
	for (size_t i = 0; i < self->pages; i++)
		count += dmirror_is_local(self->processes[who].seen[i]);
	return count;
}

/* A process forks. The child must have the same bytes. */
static void forks(struct __test_metadata *_metadata, FORKED *self, int who, int child)
{
	memcpy(self->processes[child].image, self->processes[who].image, self->length);
	ASSERT_EQ(0, TO(who, FORK, .who = child));
	self->processes[child].lives = true;
}

static void ends(struct __test_metadata *_metadata, FORKED *self, int parent, int child)
{
	self->processes[child].lives = false;
	ASSERT_EQ(0, TO(child, EXIT));
	ASSERT_EQ(0, TO(parent, REAP, .who = child));
}

/* The first fork of a test: the device has the pages, and the CPUs touch them. */
static void forks_first(struct __test_metadata *_metadata, FORKED *self, const VARIANT *variant)
{
	forks(_metadata, self, PARENT, CHILD);
	touch(_metadata, self, PARENT, &variant->parent);
	touch(_metadata, self, CHILD, &variant->child);
}

#define WRITES_SOME(who, ...)	writes(_metadata, self, variant, who, __VA_ARGS__)
#define DEVICE_WRITES(who)	WRITES_SOME(who, DEVICE_WRITE, 0, 1)
#define CPU_WRITES(who)		WRITES_SOME(who, CPU_WRITE, 0, 1)
#define EXPECT_STEP()		expect_step(_metadata, self, variant)
#define FORKS_FIRST()		forks_first(_metadata, self, variant)
#define FORKS(who, child)	forks(_metadata, self, who, child)
#define ENDS(who, child)	ends(_metadata, self, who, child)

FIXTURE_SETUP(dmirror_fork)
{
	int64_t large = instance_counter(0, "large_to_device");
	size_t huge = 0;
	int fd[NODES];

	if (!setup_nodes(_metadata, fd))
		return;
	self->fd = fd[0];
	close(fd[1]);
	self->trouble = kernel_trouble();
	if (wants_huge()) {
		if (!setup_huge(_metadata, &huge))
			return;
		most_pages = huge / page;
	}
	self->pages = variant->pages ?: most_pages;
	self->length = self->pages * page;
	self->processes[PARENT].lives = true;
	self->processes[CHILD].node = variant->childs_node;
	for (int i = 0; i < PROCESSES; i++) {
		struct process *process = &self->processes[i];

		/*
		 * Shared memory is not copied by fork() and does not migrate.
		 */
		process->image = mmap(NULL, 2 * self->length, PROT_READ | PROT_WRITE,
				      MAP_SHARED | MAP_ANONYMOUS, -1, 0);
		ASSERT_NE(MAP_FAILED, process->image);
		process->seen = process->image + self->length;
		ASSERT_EQ(0, pipe2(process->order, O_CLOEXEC));
		ASSERT_EQ(0, pipe2(process->reply, O_CLOEXEC));
	}
	signal(SIGPIPE, SIG_IGN);

	/*
	 * The current bytes are only in device memory. System memory had other
	 * ones.
	 */
	self->p = huge ? map_huge(huge, huge) : map(self->length, PROT_READ | PROT_WRITE);
	ASSERT_NE(MAP_FAILED, self->p);
	CPU_WRITES(PARENT);
	ASSERT_EQ(0, TO_ALL_OF(PARENT, TO_DEVICE));
	DEVICE_WRITES(PARENT);
	ASSERT_EQ(self->pages, pages_on_device(_metadata, self, PARENT));
	/* The huge page is one on the device, too. Another driver has no such counter. */
	if (huge && huge == self->length && large >= 0)
		ASSERT_LE(large + self->pages, instance_counter(0, "large_to_device"));
	touch(_metadata, self, PARENT, &variant->before);
}

/* Final checks: by the device, by the CPUs, and by the device after that. */
FIXTURE_TEARDOWN(dmirror_fork)
{
	if (!_metadata->exit_code) {
		expect_all(_metadata, self, DEVICE_READ);
		expect_all(_metadata, self, CPU_READ);
		expect_all(_metadata, self, DEVICE_READ);
	}
	EXPECT_EQ(self->trouble, kernel_trouble());
	for (int i = 0; i < PROCESSES; i++) {
		if (self->pid[i] > 0 && self->processes[i].lives)
			kill(self->pid[i], SIGKILL);
	}
	close(self->fd);
}

TEST_F(dmirror_fork, pages_stay_on_the_device)
{
	const bool touched = variant->before.how || variant->parent.how || variant->child.how;

	FORKS_FIRST();
	/*
	 * Make sure that both processes share the device pages, to test their
	 * copy-on-write.
	 */
	for (int who = PARENT; who <= CHILD && !touched; who++) {
		/*
		 * A fault by the other node would migrate them to system
		 * memory.
		 */
		if (self->processes[who].node)
			continue;
		EXPECT_EQ(self->pages, pages_on_device(_metadata, self, who));
		expect_bytes(_metadata, self, who, DEVICE_READ);
		EXPECT_EQ(self->pages, pages_on_device(_metadata, self, who));
	}
	EXPECT_STEP();
}

TEST_F(dmirror_fork, device_write_in_the_parent)
{
	FORKS_FIRST();
	DEVICE_WRITES(PARENT);
	DEVICE_WRITES(PARENT);
}

TEST_F(dmirror_fork, device_write_in_the_child)
{
	FORKS_FIRST();
	DEVICE_WRITES(CHILD);
	DEVICE_WRITES(CHILD);
}

TEST_F(dmirror_fork, device_writes_in_both_in_turn)
{
	FORKS_FIRST();
	for (int i = 0; i < 3; i++) {
		DEVICE_WRITES(PARENT);
		DEVICE_WRITES(CHILD);
	}
}

/* Pages that the device may write to are next to such that it may not. */
TEST_F(dmirror_fork, device_writes_to_some_pages)
{
	FORKS_FIRST();
	WRITES_SOME(CHILD, DEVICE_WRITE, 0, 2);
	WRITES_SOME(PARENT, DEVICE_WRITE, 1, 3);
	DEVICE_WRITES(CHILD);
	DEVICE_WRITES(PARENT);
}

TEST_F(dmirror_fork, device_reads_see_what_was_there)
{
	FORKS_FIRST();
	/*
	 * The device has the pages of both processes mapped before a CPU
	 * writes.
	 */
	EXPECT_STEP();
	WRITES_SOME(CHILD, CPU_WRITE, 0, 2);
	WRITES_SOME(PARENT, CPU_WRITE, 1, 2);
}

TEST_F(dmirror_fork, device_and_cpu_write_in_turn)
{
	FORKS_FIRST();
	CPU_WRITES(CHILD);
	DEVICE_WRITES(PARENT);
	DEVICE_WRITES(CHILD);
	WRITES_SOME(PARENT, CPU_WRITE, 0, 3);
	WRITES_SOME(CHILD, CPU_WRITE, 1, 3);
	DEVICE_WRITES(PARENT);
}

/* A page that two processes share migrates. */
TEST_F(dmirror_fork, pages_move_between_writes)
{
	/* What CPUs and all devices reach stays with the device that has it. */
	int stays = coherent() && variant->childs_node ? -ENOENT : 0;

	FORKS_FIRST();
	ASSERT_EQ(0, TO_ALL_OF(CHILD, TO_SYSTEM));
	EXPECT_STEP();
	ASSERT_EQ(0, TO_ALL_OF(PARENT, TO_DEVICE));
	EXPECT_STEP();
	WRITES_SOME(CHILD, DEVICE_WRITE, 0, 2);
	ASSERT_EQ(stays, TO_ALL_OF(CHILD, TO_DEVICE));
	ASSERT_EQ(0, TO_ALL_OF(PARENT, TO_SYSTEM));
	EXPECT_STEP();
	DEVICE_WRITES(PARENT);
}

TEST_F(dmirror_fork, child_ends_before_the_write)
{
	FORKS_FIRST();
	ENDS(PARENT, CHILD);
	EXPECT_STEP();
	DEVICE_WRITES(PARENT);
}

TEST_F(dmirror_fork, child_ends_after_its_write)
{
	FORKS_FIRST();
	WRITES_SOME(CHILD, DEVICE_WRITE, 0, 2);
	ENDS(PARENT, CHILD);
	EXPECT_STEP();
	DEVICE_WRITES(PARENT);
}

TEST_F(dmirror_fork, parent_unmaps_before_the_childs_write)
{
	FORKS_FIRST();
	self->processes[PARENT].lives = false;
	ASSERT_EQ(0, TO_ALL_OF(PARENT, UNMAP));
	EXPECT_STEP();
	DEVICE_WRITES(CHILD);
}

TEST_F(dmirror_fork, parent_unmaps_after_its_write)
{
	FORKS_FIRST();
	DEVICE_WRITES(PARENT);
	self->processes[PARENT].lives = false;
	ASSERT_EQ(0, TO_ALL_OF(PARENT, UNMAP));
	EXPECT_STEP();
	DEVICE_WRITES(CHILD);
}

TEST_F(dmirror_fork, parent_closes_the_node_before_the_childs_write)
{
	FORKS_FIRST();
	ASSERT_EQ(0, TO_ALL_OF(PARENT, CLOSE));
	DEVICE_WRITES(CHILD);
	DEVICE_WRITES(PARENT);
}

TEST_F(dmirror_fork, device_writes_in_a_grandchild)
{
	FORKS_FIRST();
	FORKS(CHILD, GRANDCHILD);
	EXPECT_STEP();
	DEVICE_WRITES(GRANDCHILD);
	DEVICE_WRITES(PARENT);
	DEVICE_WRITES(CHILD);
}

/* Pages are shared by three processes. The last one that has them writes. */
TEST_F(dmirror_fork, device_write_in_the_last_of_three)
{
	FORKS_FIRST();
	FORKS(CHILD, GRANDCHILD);
	WRITES_SOME(CHILD, DEVICE_WRITE, 0, 2);
	ENDS(CHILD, GRANDCHILD);
	ENDS(PARENT, CHILD);
	DEVICE_WRITES(PARENT);
}

TEST_F(dmirror_fork, each_child_keeps_the_bytes_of_its_time)
{
	FORKS_FIRST();
	DEVICE_WRITES(PARENT);
	FORKS(PARENT, SECOND);
	WRITES_SOME(PARENT, DEVICE_WRITE, 0, 2);
	FORKS(PARENT, THIRD);
	WRITES_SOME(PARENT, DEVICE_WRITE, 1, 2);
	DEVICE_WRITES(SECOND);
	DEVICE_WRITES(THIRD);
	DEVICE_WRITES(CHILD);
}

TEST_HARNESS_MAIN
