/*
 * hasher.c - the checksum of a disk: the hash of its blocks' hashes, and its length
 *
 * Source: the blkhash library.  Its blksum(1), and nbdcopy(1) with --blkhash, print the
 * same checksum.
 */
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "common/checked.h"
#include "common/endian.h"
#include "digest/digest.h"
#include "imgc.h"

#define MIN_BLOCK_NBYTES 512u
#define MAX_BLOCK_NBYTES (16u * 1024 * 1024)
#define N_ZERO_LEAVES 2048u /* that are hashed in one call: 64 KiB, half of an L1 or less */

struct imgc_hasher {
	struct imgc_digest *outer; /* of the leaves so far */
	struct imgc_digest *inner; /* makes one leaf at a time */
	uint32_t zero_variant;
	uint64_t block_nbytes;
	uint64_t nbytes;      /* of the disk so far */
	uint8_t *block;	      /* the last block, while it is incomplete */
	uint64_t n_pending;   /* bytes in it */
	bool is_complete;     /* the leaf of a short block has been added: nothing follows */
	uint8_t *zero_leaves; /* N_ZERO_LEAVES times the leaf of a block of zeros */
};

int imgc_hasher_create(uint32_t checksum, uint64_t block_nbytes, uint32_t zero_variant,
		       struct imgc_hasher **out)
{
	if (!imgc_is_power_of_two(block_nbytes) || block_nbytes < MIN_BLOCK_NBYTES ||
	    block_nbytes > MAX_BLOCK_NBYTES)
		return IMGC_INVALID_ARGUMENT;
	struct imgc_hasher *h = calloc(1, sizeof(*h));

	if (!h)
		return IMGC_NO_MEMORY;
	h->zero_variant = zero_variant;
	h->block_nbytes = block_nbytes;
	h->block = malloc(block_nbytes);
	h->zero_leaves = malloc(N_ZERO_LEAVES * IMGC_CHECKSUM_NBYTES);
	int status = h->block && h->zero_leaves ? IMGC_OK : IMGC_NO_MEMORY;

	if (status == IMGC_OK)
		status = imgc_digest_create(checksum, &h->outer);
	if (status == IMGC_OK)
		status = imgc_digest_create(checksum, &h->inner);
	if (status == IMGC_OK)
		status = imgc_digest_of_zeros(h->inner, block_nbytes, h->zero_leaves);
	if (status == IMGC_OK)
		status = imgc_digest_begin(h->outer);
	if (status) {
		imgc_hasher_destroy(h);
		return status;
	}
	imgc_leaves_fill(h->zero_leaves, N_ZERO_LEAVES, h->zero_leaves);
	*out = h;
	return IMGC_OK;
}

void imgc_hasher_destroy(struct imgc_hasher *hasher)
{
	if (!hasher)
		return;
	imgc_digest_destroy(hasher->outer);
	imgc_digest_destroy(hasher->inner);
	free(hasher->block);
	free(hasher->zero_leaves);
	free(hasher);
}

/* ------------------------------------------------------------------- blocks */

static int add_leaves(struct imgc_hasher *h, const uint8_t *leaves, size_t n)
{
	return imgc_digest_add(h->outer, leaves, n * IMGC_CHECKSUM_NBYTES);
}

static int add_zero_leaves(struct imgc_hasher *h, uint64_t n)
{
	int status = IMGC_OK;

	while (n > 0 && status == IMGC_OK) {
		size_t more = imgc_min_u64(n, N_ZERO_LEAVES);

		status = add_leaves(h, h->zero_leaves, more);
		n -= more;
	}
	return status;
}

/* Adds the leaf of one whole block. */
static int add_block(struct imgc_hasher *h, const uint8_t *block)
{
	uint8_t leaf[IMGC_CHECKSUM_NBYTES];

	if (imgc_is_zero(h->zero_variant, block, h->block_nbytes))
		return add_zero_leaves(h, 1);
	int status = imgc_digest_of(h->inner, block, h->block_nbytes, leaf);

	return status ? status : add_leaves(h, leaf, 1);
}

/* Adds to the incomplete block; `data` NULL stands for zeros.  Returns how many bytes. */
static size_t fill_block(struct imgc_hasher *h, const uint8_t *data, uint64_t nbytes)
{
	size_t n = imgc_min_u64(nbytes, h->block_nbytes - h->n_pending);

	if (data)
		memcpy(h->block + h->n_pending, data, n);
	else
		memset(h->block + h->n_pending, 0, n);
	h->n_pending += n;
	return n;
}

static int add_block_if_complete(struct imgc_hasher *h)
{
	if (h->n_pending < h->block_nbytes)
		return IMGC_OK;
	h->n_pending = 0;
	return add_block(h, h->block);
}

/* Counts the bytes that come next; IMGC_INVALID_ARGUMENT if nothing may follow. */
static int extend(struct imgc_hasher *h, uint64_t nbytes)
{
	if (nbytes > INT64_MAX - h->nbytes || (h->is_complete && nbytes > 0))
		return IMGC_INVALID_ARGUMENT;
	h->nbytes += nbytes;
	return IMGC_OK;
}

int imgc_hasher_update(struct imgc_hasher *hasher, const void *data, size_t nbytes)
{
	const uint8_t *next = data;
	int status = extend(hasher, nbytes);

	while (nbytes > 0 && status == IMGC_OK) {
		size_t n = hasher->block_nbytes;

		if (hasher->n_pending > 0 || nbytes < n) {
			n = fill_block(hasher, next, nbytes);
			status = add_block_if_complete(hasher);
		} else {
			status = add_block(hasher, next);
		}
		next += n;
		nbytes -= n;
	}
	return status;
}

int imgc_hasher_zeros(struct imgc_hasher *hasher, uint64_t nbytes)
{
	int status = extend(hasher, nbytes);

	if (status == IMGC_OK && hasher->n_pending > 0) {
		nbytes -= fill_block(hasher, NULL, nbytes);
		status = add_block_if_complete(hasher);
	}
	if (status == IMGC_OK)
		status = add_zero_leaves(hasher, nbytes / hasher->block_nbytes);
	nbytes %= hasher->block_nbytes;
	if (status == IMGC_OK && nbytes > 0)
		fill_block(hasher, NULL, nbytes);
	return status;
}

int imgc_hasher_leaves(struct imgc_hasher *hasher, const void *leaves, uint64_t nbytes)
{
	uint64_t rest = nbytes % hasher->block_nbytes;

	if (hasher->n_pending > 0)
		return IMGC_INVALID_ARGUMENT;
	int status = extend(hasher, nbytes);

	if (status)
		return status;
	hasher->is_complete = rest > 0;
	return add_leaves(hasher, leaves, (size_t)(nbytes / hasher->block_nbytes + (rest > 0)));
}

int imgc_hasher_leaf(struct imgc_hasher *hasher, const void *block, size_t nbytes,
		     uint8_t out[IMGC_CHECKSUM_NBYTES])
{
	return imgc_digest_of(hasher->inner, block, nbytes, out);
}

int imgc_hasher_digest(struct imgc_hasher *hasher, uint8_t out[IMGC_CHECKSUM_NBYTES])
{
	uint8_t leaf[IMGC_CHECKSUM_NBYTES], length[8];
	struct imgc_digest *digest = hasher->inner;
	int status = IMGC_OK;

	if (hasher->n_pending > 0)
		status = imgc_digest_of(digest, hasher->block, hasher->n_pending, leaf);
	if (status == IMGC_OK)
		status = imgc_digest_copy(digest, hasher->outer);
	if (status == IMGC_OK && hasher->n_pending > 0)
		status = imgc_digest_add(digest, leaf, sizeof(leaf));
	imgc_store_le64(length, hasher->nbytes);
	if (status == IMGC_OK)
		status = imgc_digest_add(digest, length, sizeof(length));
	return status ? status : imgc_digest_end(digest, out);
}
