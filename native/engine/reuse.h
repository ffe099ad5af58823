/*
 * reuse.h - compressed blocks that go from a source to the target as they are
 */
#ifndef IMGC_ENGINE_REUSE_H
#define IMGC_ENGINE_REUSE_H

#include <stdbool.h>

#include "imgc.h"

/* A block of the window, ready for the target; nbytes 0: it must be compressed. */
struct reused {
	uint32_t nbytes;
	bool is_trusted; /* it was not decompressed */
};

/* A worker's: the blocks of the window that it has read last. */
struct reuse {
	uint32_t codec; /* of the target */
	bool trusts;
	uint64_t block_nbytes;
	uint64_t capacity; /* the most bytes of a compressed block */
	size_t n_blocks;
	struct reused *blocks;
	uint8_t *bytes; /* `capacity` for each block */
};

/* A job without compression has no blocks to reuse. */
int imgc_reuse_create(struct reuse *reuse, const struct imgc_job_options *options,
		      uint64_t window_nbytes, uint64_t capacity);
void imgc_reuse_destroy(struct reuse *reuse);

/* Forgets the blocks of the last window. */
void imgc_reuse_reset(struct reuse *reuse);

/*
 * Takes a compressed block, which starts at `at` of the window and has the target's
 * size.  `plain` is its content, or NULL if it has not been decompressed.  Returns
 * whether the target can have it.
 */
bool imgc_reuse_take(struct reuse *reuse, uint64_t at, uint32_t codec, const uint8_t *in,
		     uint64_t in_nbytes, const uint8_t *plain);

/* The block at `at` of the window, in *bytes; NULL if none was taken. */
const struct reused *imgc_reuse_find(const struct reuse *reuse, uint64_t at, const uint8_t **bytes);

#endif /* IMGC_ENGINE_REUSE_H */
