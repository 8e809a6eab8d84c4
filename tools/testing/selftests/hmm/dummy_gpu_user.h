/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Shared by the programs for the dummy GPU: functions for the ioctls, and CPU
 * versions of the commands.
 */
#ifndef DUMMY_GPU_USER_H
#define DUMMY_GPU_USER_H

#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>

#include <linux/dummy_gpu.h>

#define GPU_DEVICE	"/dev/dummy_gpu0"
#define GPU_DEVICE_2	"/dev/dummy_gpu1"

/* The value of output fields before an ioctl, to see which ones it writes. */
#define GPU_UNTOUCHED	0xa5a5a5a5a5a5a5a5ULL

#define GPU_BUCKETS	256

static inline uint64_t gpu_addr(const void *p)
{
	return (uintptr_t)p;
}

/* An ioctl that returns 0 or a negative errno. */
static inline int gpu_ioctl(int fd, unsigned long request, void *arg)
{
	return ioctl(fd, request, arg) ? -errno : 0;
}

static inline int gpu_info(int fd, struct dummy_gpu_info *info)
{
	memset(info, 0, sizeof(*info));
	info->size = sizeof(*info);
	return gpu_ioctl(fd, DUMMY_GPU_IOC_INFO, info);
}

static inline int gpu_stats(int fd, struct dummy_gpu_stats *stats)
{
	memset(stats, 0, sizeof(*stats));
	stats->size = sizeof(*stats);
	return gpu_ioctl(fd, DUMMY_GPU_IOC_STATS, stats);
}

static inline struct dummy_gpu_submit
gpu_submission(const struct dummy_gpu_command *commands, uint64_t count)
{
	struct dummy_gpu_submit submit = {
		.size = sizeof(submit),
		.commands = gpu_addr(commands),
		.count = count,
		.command_size = sizeof(*commands),
		.completed = GPU_UNTOUCHED,
		.fault_address = GPU_UNTOUCHED,
		.sequence = GPU_UNTOUCHED,
	};

	return submit;
}

static inline int gpu_submit(int fd, struct dummy_gpu_submit *submit)
{
	return gpu_ioctl(fd, DUMMY_GPU_IOC_SUBMIT, submit);
}

/* Does not wait for the commands. */
static inline int gpu_submit_async(int fd, struct dummy_gpu_submit *submit)
{
	submit->flags |= DUMMY_GPU_SUBMIT_ASYNC;
	return gpu_submit(fd, submit);
}

/* The outcome of a submission: 0 or a negative errno. The timeout is in nanoseconds. */
static inline int gpu_wait(int fd, uint64_t sequence, uint64_t timeout, struct dummy_gpu_wait *wait)
{
	*wait = (struct dummy_gpu_wait){
		.size = sizeof(*wait),
		.sequence = sequence,
		.timeout = timeout,
		.completed = GPU_UNTOUCHED,
		.fault_address = GPU_UNTOUCHED,
		.ended = GPU_UNTOUCHED,
	};
	return gpu_ioctl(fd, DUMMY_GPU_IOC_WAIT, wait);
}

static inline struct dummy_gpu_command
gpu_fill(void *dst, uint8_t value, size_t length)
{
	struct dummy_gpu_command command = {
		.opcode = DUMMY_GPU_OP_FILL,
		.dst = gpu_addr(dst),
		.value = value,
		.length = length,
	};

	return command;
}

/* COPY, SUM, CRC32 and HISTOGRAM. */
static inline struct dummy_gpu_command
gpu_unary(enum dummy_gpu_opcode opcode, void *dst, const void *src, size_t length)
{
	struct dummy_gpu_command command = {
		.opcode = opcode,
		.dst = gpu_addr(dst),
		.src = gpu_addr(src),
		.length = length,
	};

	return command;
}

/* ADD and XOR. */
static inline struct dummy_gpu_command
gpu_binary(enum dummy_gpu_opcode opcode, void *dst, const void *src,
	   const void *src2, size_t length)
{
	struct dummy_gpu_command command = {
		.opcode = opcode,
		.dst = gpu_addr(dst),
		.src = gpu_addr(src),
		.src2 = gpu_addr(src2),
		.length = length,
	};

	return command;
}

/* Adds to the u64 at target atomically. */
static inline struct dummy_gpu_command
gpu_fetch_add(uint64_t *old, uint64_t *target, uint64_t number)
{
	struct dummy_gpu_command command = {
		.opcode = DUMMY_GPU_OP_FETCH_ADD,
		.dst = gpu_addr(old),
		.src = gpu_addr(target),
		.value = number,
		.length = sizeof(*target),
	};

	return command;
}

/* Replaces the u64 at target atomically, if it is equal to the one at expected. */
static inline struct dummy_gpu_command
gpu_compare_exchange(uint64_t *old, uint64_t *target, const uint64_t *expected,
		     uint64_t value)
{
	struct dummy_gpu_command command = {
		.opcode = DUMMY_GPU_OP_COMPARE_EXCHANGE,
		.dst = gpu_addr(old),
		.src = gpu_addr(target),
		.src2 = gpu_addr(expected),
		.value = value,
		.length = sizeof(*target),
	};

	return command;
}

static inline struct dummy_gpu_prefetch
gpu_prefetching(const void *start, size_t length, enum dummy_gpu_location location)
{
	struct dummy_gpu_prefetch prefetch = {
		.size = sizeof(prefetch),
		.start = gpu_addr(start),
		.length = length,
		.location = location,
		.done = GPU_UNTOUCHED,
		.pages = GPU_UNTOUCHED,
	};

	return prefetch;
}

static inline int gpu_prefetch(int fd, struct dummy_gpu_prefetch *prefetch)
{
	return gpu_ioctl(fd, DUMMY_GPU_IOC_PREFETCH, prefetch);
}

static inline int gpu_advise(int fd, const void *start, size_t length,
			     enum dummy_gpu_policy policy)
{
	struct dummy_gpu_advise advise = {
		.size = sizeof(advise),
		.start = gpu_addr(start),
		.length = length,
		.policy = policy,
	};

	return gpu_ioctl(fd, DUMMY_GPU_IOC_ADVISE, &advise);
}

/* Free system memory in bytes, or 0 if it is not known. */
static inline uint64_t cpu_free_memory(void)
{
	unsigned long long kib = 0;
	FILE *f = fopen("/proc/meminfo", "re");
	char line[100];

	while (f && !kib && fgets(line, sizeof(line), f))
		kib = strncmp(line, "MemFree:", 8) ? 0 : strtoull(line + 8, NULL, 10);
	if (f)
		fclose(f);
	return kib * 1024;
}

static inline uint64_t cpu_sum(const uint64_t *p, size_t length)
{
	uint64_t sum = 0;

	for (size_t i = 0; i < length / sizeof(*p); i++)
		sum += p[i];
	return sum;
}

static inline uint64_t cpu_crc32(const void *p, size_t length)
{
	static uint32_t table[256];
	const uint8_t *byte = p;
	uint32_t crc = ~0U;

	if (!table[1]) {
		for (uint32_t i = 0; i < 256; i++) {
			uint32_t c = i;

			for (int bit = 0; bit < 8; bit++)
				c = c & 1 ? c >> 1 ^ 0xedb88320 : c >> 1;
			table[i] = c;
		}
	}
	while (length--)
		crc = crc >> 8 ^ table[(crc ^ *byte++) & 0xff];
	return crc ^ ~0U;
}

static inline void cpu_histogram(uint64_t *count, const void *p, size_t length)
{
	const uint8_t *byte = p;

	memset(count, 0, GPU_BUCKETS * sizeof(*count));
	while (length--)
		count[*byte++]++;
}

/* A reproducible pseudo-random sequence (splitmix64). */
static inline uint64_t cpu_random(uint64_t *state)
{
	uint64_t z = *state += 0x9e3779b97f4a7c15ULL;

	z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ULL;
	z = (z ^ z >> 27) * 0x94d049bb133111ebULL;
	return z ^ z >> 31;
}

static inline void cpu_randomize(void *p, size_t length, uint64_t seed)
{
	uint8_t *byte = p;

	while (length) {
		uint64_t value = cpu_random(&seed);
		size_t n = length < sizeof(value) ? length : sizeof(value);

		memcpy(byte, &value, n);
		byte += n;
		length -= n;
	}
}

/* The offset of the first byte that differs, or length. */
static inline size_t cpu_differs(const void *a, const void *b, size_t length)
{
	const uint8_t *x = a, *y = b;
	size_t i = 0;

	if (!memcmp(a, b, length))
		return length;
	while (x[i] == y[i])
		i++;
	return i;
}

/* The offset of the first byte that is not the value, or length. */
static inline size_t cpu_unlike(const void *p, uint8_t value, size_t length)
{
	const uint8_t *byte = p;
	size_t i;

	for (i = 0; i < length && byte[i] == value; i++)
		;
	return i;
}

#endif /* DUMMY_GPU_USER_H */
