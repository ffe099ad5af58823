/*
 * reuse.c - compressed blocks that go from a source to the target as they are
 */
#include "engine/reuse.h"

#include <stdlib.h>
#include <string.h>

int imgc_reuse_create(struct reuse *reuse, const struct imgc_job_options *options,
		      uint64_t window_nbytes, uint64_t capacity)
{
	uint64_t block = options->geometry.block_nbytes;

	*reuse = (struct reuse){
		.codec = options->geometry.codec.codec,
		.trusts = options->trust_blocks && !options->checksum,
		.block_nbytes = block,
		.capacity = capacity,
		.n_blocks = window_nbytes / block,
	};
	reuse->blocks = calloc(reuse->n_blocks, sizeof(*reuse->blocks));
	reuse->bytes = malloc(reuse->n_blocks * capacity);
	return reuse->blocks && reuse->bytes ? IMGC_OK : IMGC_NO_MEMORY;
}

void imgc_reuse_destroy(struct reuse *reuse)
{
	free(reuse->blocks);
	free(reuse->bytes);
}

void imgc_reuse_reset(struct reuse *reuse)
{
	memset(reuse->blocks, 0, reuse->n_blocks * sizeof(*reuse->blocks));
}

bool imgc_reuse_take(struct reuse *reuse, uint64_t at, uint32_t codec, const uint8_t *in,
		     uint64_t in_nbytes, const uint8_t *plain)
{
	uint64_t index = at / reuse->block_nbytes;
	size_t nbytes = imgc_rewrap(codec, reuse->codec, in, in_nbytes, plain, reuse->block_nbytes,
				    reuse->bytes + index * reuse->capacity, reuse->capacity);

	reuse->blocks[index] = (struct reused){(uint32_t)nbytes, !plain};
	return nbytes > 0;
}

const struct reused *imgc_reuse_find(const struct reuse *reuse, uint64_t at, const uint8_t **bytes)
{
	uint64_t index = at / reuse->block_nbytes;

	*bytes = reuse->bytes + index * reuse->capacity;
	return reuse->blocks[index].nbytes ? &reuse->blocks[index] : NULL;
}
