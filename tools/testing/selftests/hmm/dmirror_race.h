/* SPDX-License-Identifier: GPL-2.0 */
/*
 * How dmirror_race_test checks the bytes that its threads write and read.
 *
 * Each page counts its writes. A write takes the next number, its ticket, and
 * writes bytes that depend on the page, the offset and the ticket. So each byte
 * that is read tells which write it comes from. That must be a write which was
 * in progress at some time during the read, or the last one before it. Any
 * other byte is stale, lost, or from another page.
 */
#ifndef DMIRROR_RACE_H
#define DMIRROR_RACE_H

#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>

#include "dmirror_user.h"

#define PAGES	64
#define MOST	16		/* pages of one command */
#define THREADS	32

/*
 * The pages below SINGLE form pairs with the same bytes, which KSM merges. They
 * and the pages below SHARED have one writer each.
 */
#define SINGLE	4
#define SHARED	16		/* and above: many writers, MADV_DONTNEED */
#define WILD	48		/* and above: unmapped or PROT_NONE at times */

/* The optional parts of a test. */
enum {
	DROP = 1,
	UNMAP = 2,
	PROTECT = 4,
	MERGE = 8,
	FORK = 16,
	HUGE = 32,
};

struct thread {
	const struct role *role;
	size_t index;
	unsigned int node;
	pthread_t thread;
	uint64_t seed, turns, count, busy, vague;
	uint8_t *bytes;		/* the buffer of a command */
};

/* turn() returns whether it has done what the role is for. */
struct role {
	const char *name;
	bool (*turn)(struct thread *t);
	unsigned int node, part, rest;
};

/* The writes to a page. */
struct book {
	pthread_mutex_t lock;
	uint64_t last;		/* ticket */
	uint64_t floor;		/* writes with older tickets were overwritten */
	uint64_t dropped;	/* ticket of last MADV_DONTNEED or munmap() */
	uint64_t pending[THREADS];
	const char *writer[256];	/* for failure messages */
};

/*
 * The tickets that a read may see; also zeroes if the page was dropped since.
 */
struct window {
	uint64_t from, to, dropped;
};

/* Shared with forked processes. */
static struct shared {
	struct book books[PAGES];
	bool stop, failed;
	char failure[400];
} *shared;

static uint8_t *region, *pattern, *frozen;
static size_t huge;	/* the bytes of a huge page, if the region begins one */
static int nodes[NODES];
static unsigned int parts;

static inline uint8_t *at(size_t i)
{
	return region + i * page;
}

static inline bool is_wild(size_t i)
{
	return parts & UNMAP && i >= WILD;
}

static inline bool stopped(void)
{
	return __atomic_load_n(&shared->stop, __ATOMIC_RELAXED);
}

static inline void stop(void)
{
	__atomic_store_n(&shared->stop, true, __ATOMIC_RELEASE);
}

/* Records the first failure and ends the test. */
static bool __printf(2, 3) fail(struct thread *t, const char *format, ...)
{
	const size_t size = sizeof(shared->failure);
	va_list args;
	int n;

	if (__atomic_exchange_n(&shared->failed, true, __ATOMIC_ACQ_REL))
		return false;
	n = snprintf(shared->failure, size, "%s: ", t->role->name);
	va_start(args, format);
	vsnprintf(shared->failure + n, size - n, format, args);
	va_end(args);
	stop();
	return false;
}

static inline size_t below(struct thread *t, size_t n)
{
	return cpu_random(&t->seed) % n;
}

/*
 * Begins a write. Returns its ticket, and the oldest ticket of a write in
 * progress.
 */
static inline uint64_t begin(struct thread *t, size_t i, uint64_t *oldest, bool drop)
{
	struct book *book = &shared->books[i];
	uint64_t ticket;

	pthread_mutex_lock(&book->lock);
	ticket = book->last + 1;
	book->writer[ticket % ARRAY_SIZE(book->writer)] = t->role->name;
	book->pending[t->index] = ticket;
	*oldest = ticket;
	for (size_t j = 0; j < THREADS; j++) {
		if (book->pending[j] && book->pending[j] < *oldest)
			*oldest = book->pending[j];
	}
	if (drop)
		__atomic_store_n(&book->dropped, ticket, __ATOMIC_SEQ_CST);
	__atomic_store_n(&book->last, ticket, __ATOMIC_SEQ_CST);
	pthread_mutex_unlock(&book->lock);
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	return ticket;
}

/*
 * Ends a write. A write to the whole page replaces all that ended before it
 * began.
 */
static inline void end(struct thread *t, size_t i, uint64_t oldest, bool whole)
{
	struct book *book = &shared->books[i];

	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	pthread_mutex_lock(&book->lock);
	book->pending[t->index] = 0;
	if (whole && book->floor < oldest)
		__atomic_store_n(&book->floor, oldest, __ATOMIC_SEQ_CST);
	pthread_mutex_unlock(&book->lock);
}

/* Call opened() before a read and closed() after it. */
static inline void opened(struct window *window, size_t i)
{
	window->from = __atomic_load_n(&shared->books[i].floor, __ATOMIC_SEQ_CST);
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
}

static inline void closed(struct window *window, size_t i)
{
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	window->to = __atomic_load_n(&shared->books[i].last, __ATOMIC_SEQ_CST);
	window->dropped = __atomic_load_n(&shared->books[i].dropped, __ATOMIC_SEQ_CST);
}

static inline void fill(uint8_t *bytes, size_t i, uint64_t ticket)
{
	for (size_t j = 0; j < page; j++)
		bytes[j] = pattern[i * page + j] + ticket;
}

/* The page that wrote these eight bytes at offset j, with any ticket, or -1. */
static inline int page_of(const uint8_t *bytes, size_t j)
{
	for (size_t i = 0; i < PAGES; i++) {
		const uint8_t *p = pattern + i * page + j;
		size_t n = 1;

		while (n < 8 && (uint8_t)(bytes[n] - p[n]) == (uint8_t)(bytes[0] - p[0]))
			n++;
		if (n == 8)
			return i;
	}
	return -1;
}

/* Whether all bytes of a page come from writes in the window. */
static inline bool check(struct thread *t, size_t i, const uint8_t *bytes,
			 const struct window *window, const char *how)
{
	const uint8_t *mine = pattern + i * page;
	const long long from = window->from, to = window->to, dropped = window->dropped;
	size_t first = page, bad = 0, word;
	uint8_t expected;
	char hint[160];
	int8_t age;

	/*
	 * A byte holds the ticket modulo 256: a larger window cannot be
	 * checked.
	 */
	if (to - from > 200) {
		t->vague++;
		return true;
	}
	for (size_t j = page; j--;) {
		uint8_t since = bytes[j] - mine[j] - (uint8_t)from;

		if (since > to - from && (bytes[j] || dropped < from)) {
			first = j;
			bad++;
		}
	}
	if (!bad)
		return true;

	expected = mine[first] + from;
	age = bytes[first] - expected;
	word = first & ~7UL;
	snprintf(hint, sizeof(hint), "ticket %lld (%s) of page %d, not %lld to %lld or zero (%lld)",
		 from + age, shared->books[i].writer[(from + age) & 0xff] ?: "nobody",
		 page_of(bytes + word, word), from, to, dropped);
	return fail(t, "%s, page %zu: byte %zu and %zu others: %#x, not %#x: %s", how, i, first,
		    bad - 1, bytes[first], expected, hint);
}

/* Whether the error is explained by what another thread does to the pages. */
static inline bool is_expected(unsigned long request, int err, bool wild)
{
	const bool protect = parts & PROTECT;

	if (err == -EBUSY)
		return true;
	switch (request) {
	case HMM_DMIRROR_READ:
	case HMM_DMIRROR_READ_UNLOCKED:
		return wild && err == -EFAULT;
	case HMM_DMIRROR_WRITE:
		return (wild && err == -EFAULT) || (protect && err == -EPERM);
	case HMM_DMIRROR_MIGRATE_TO_DEV:
		return err == -ENOENT || (wild && (err == -EINVAL || err == -EFAULT));
	case HMM_DMIRROR_MIGRATE_TO_SYS:
		return wild && (err == -EINVAL || err == -EFAULT);
	case HMM_DMIRROR_EXCLUSIVE:
		return err == -ENOENT || (wild && err == -EFAULT) ||
		       (protect && (err == -EFAULT || err == -EPERM));
	case HMM_DMIRROR_CHECK_EXCLUSIVE:
		return err == -EPERM;
	}
	return false;
}

static inline const char *name_of(unsigned long request)
{
	static const char *const name[] = {
		"READ", "WRITE", "MIGRATE_TO_DEV", "MIGRATE_TO_SYS", "SNAPSHOT", "EXCLUSIVE",
		"CHECK_EXCLUSIVE", "RELEASE", "FLAGS", "READ_UNLOCKED",
	};

	return name[_IOC_NR(request)];
}

/* A command of the thread's node: 0 or a negative errno. */
static inline int command(struct thread *t, unsigned long request, size_t i, size_t n)
{
	int err = dmirror(nodes[t->node], request, at(i), n, t->bytes);

	t->busy += err == -EBUSY;
	if (err && !is_expected(request, err, is_wild(i + n - 1)))
		fail(t, "%s of pages %zu to %zu: %s", name_of(request), i, i + n - 1,
		     strerror(-err));
	return err;
}

/* A command that returns the bytes, which are checked. */
static inline bool command_reads(struct thread *t, unsigned long request, size_t i, size_t n)
{
	struct window windows[MOST];
	bool ok;

	for (size_t j = 0; j < n; j++)
		opened(&windows[j], i + j);
	ok = !command(t, request, i, n);
	for (size_t j = 0; j < n && ok; j++) {
		closed(&windows[j], i + j);
		ok = check(t, i + j, t->bytes + j * page, &windows[j], name_of(request));
	}
	return ok;
}

/* CPU accesses, which may raise SIGSEGV or SIGBUS. */
static __thread sigjmp_buf escape;
static __thread bool guarded;

static inline void on_fault(int sig)
{
	if (guarded)
		siglongjmp(escape, 1);
	/* Not one of these accesses: let the signal kill the process. */
	signal(sig, SIG_DFL);
}

static inline bool cpu_copy(void *to, const void *from, size_t length)
{
	const uint64_t *source = from;
	uint64_t *target = to;

	if (sigsetjmp(escape, 0)) {
		guarded = false;
		return false;
	}
	guarded = true;
	__atomic_signal_fence(__ATOMIC_SEQ_CST);
	for (size_t i = 0; i < length / sizeof(*target); i++)
		__atomic_store_n(target + i, __atomic_load_n(source + i, __ATOMIC_RELAXED),
				 __ATOMIC_RELAXED);
	__atomic_signal_fence(__ATOMIC_SEQ_CST);
	guarded = false;
	return true;
}

static inline bool cpu_reads_page(struct thread *t, size_t i)
{
	struct window window;

	opened(&window, i);
	if (!cpu_copy(t->bytes, at(i), page))
		return is_wild(i) ? false : fail(t, "read of page %zu: SIGSEGV", i);
	closed(&window, i);
	return check(t, i, t->bytes, &window, "read");
}

static inline bool cpu_writes_page(struct thread *t, size_t i, size_t offset, size_t length)
{
	if (cpu_copy(at(i) + offset, t->bytes + offset, length))
		return true;
	return parts & PROTECT || is_wild(i) ? false : fail(t, "write to page %zu: SIGSEGV", i);
}

#endif /* DMIRROR_RACE_H */
