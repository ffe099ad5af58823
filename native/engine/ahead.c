/*
 * ahead.c - notices reads that follow a pattern, and says which come next
 */
#include "engine/ahead.h"

#define MIN_REPEATS 3u

/* How far ahead: bytes of reads in sequence, or else reads. */
#define SEQUENCE_NBYTES (1024u * 1024)
#define MAX_READS 32u

static uint64_t get(const _Atomic uint64_t *value)
{
	return atomic_load_explicit(value, memory_order_relaxed);
}

static void set(_Atomic uint64_t *value, uint64_t to)
{
	atomic_store_explicit(value, to, memory_order_relaxed);
}

void imgc_ahead_init(struct ahead *ahead)
{
	atomic_init(&ahead->last, 0);
	atomic_init(&ahead->stride, 0);
	atomic_init(&ahead->n_repeats, 0);
	atomic_init(&ahead->told, AHEAD_NONE);
}

void imgc_ahead_note(struct ahead *ahead, uint64_t offset)
{
	uint64_t stride = offset - get(&ahead->last);
	unsigned n = atomic_load_explicit(&ahead->n_repeats, memory_order_relaxed);

	set(&ahead->last, offset);
	if (stride == get(&ahead->stride)) {
		if (n < MIN_REPEATS)
			atomic_store_explicit(&ahead->n_repeats, n + 1, memory_order_relaxed);
		return;
	}
	set(&ahead->stride, stride);
	if (n != 0)
		atomic_store_explicit(&ahead->n_repeats, 0, memory_order_relaxed);
	if (get(&ahead->told) != AHEAD_NONE)
		set(&ahead->told, AHEAD_NONE);
}

static uint64_t most_reads(uint64_t stride, uint64_t length)
{
	return stride == length ? SEQUENCE_NBYTES / length + 1 : MAX_READS;
}

/* How many of the reads that were told are still to come. */
static uint64_t count_told(uint64_t told, uint64_t offset, uint64_t stride, uint64_t most)
{
	/* A stride backward is a large number. */
	uint64_t n = stride >> 63 ? (offset - told) / (0 - stride) : (told - offset) / stride;

	return n > most ? 0 : n;
}

bool imgc_ahead_is_due(const struct ahead *ahead, uint64_t offset, uint64_t length)
{
	uint64_t told = get(&ahead->told), stride = get(&ahead->stride);

	if (told == AHEAD_NONE || stride == 0 || length == 0)
		return false;
	uint64_t most = most_reads(stride, length);

	return count_told(told, offset, stride, most) <= most / 2;
}

bool imgc_ahead_next(struct ahead *ahead, uint64_t offset, uint64_t length, struct ahead_reads *out)
{
	uint64_t told = get(&ahead->told), stride = get(&ahead->stride);

	if (atomic_load_explicit(&ahead->n_repeats, memory_order_relaxed) < MIN_REPEATS ||
	    stride == 0 || length == 0)
		return false;
	uint64_t most = most_reads(stride, length);
	uint64_t n = told == AHEAD_NONE ? 0 : count_told(told, offset, stride, most);

	if (n > most / 2)
		return false;
	*out = (struct ahead_reads){offset + (n + 1) * stride, stride, length, most - n};
	set(&ahead->told, offset + most * stride);
	return true;
}
