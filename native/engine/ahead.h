/*
 * ahead.h - notices reads that follow a pattern, and says which come next
 */
#ifndef IMGC_ENGINE_AHEAD_H
#define IMGC_ENGINE_AHEAD_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

/*
 * The latest reads of all threads.  Threads that overtake each other may spoil a
 * pattern; nothing but speed depends on it.
 */
struct ahead {
	_Atomic uint64_t last, stride; /* offset of the last read, and from the one before */
	_Atomic unsigned n_repeats;    /* of the stride */
	_Atomic uint64_t told;	       /* the last offset that was told; AHEAD_NONE: none */
};

#define AHEAD_NONE UINT64_MAX

/* Reads of `length` bytes each: at `first`, first + stride, ...; offsets may wrap. */
struct ahead_reads {
	uint64_t first, stride, length;
	uint64_t n;
};

void imgc_ahead_init(struct ahead *ahead);

/* Notes a read. */
void imgc_ahead_note(struct ahead *ahead, uint64_t offset);

/* Whether half of the reads that imgc_ahead_next() told are used up. */
bool imgc_ahead_is_due(const struct ahead *ahead, uint64_t offset, uint64_t length);

/*
 * For a read that waits for the device, and has been noted: whether reads that follow
 * should be fetched now, and which.  No read is told twice.
 */
bool imgc_ahead_next(struct ahead *ahead, uint64_t offset, uint64_t length,
		     struct ahead_reads *out);

#endif /* IMGC_ENGINE_AHEAD_H */
