/*
 * xxh64.c - XXH64, the checksum of zstd frames, with a state that can be saved
 *
 * Libraries hash as fast, but do not let their state be written down and taken up later.
 *
 * Source: xxHash, doc/xxhash_spec.md, "XXH64 Algorithm Description"; the seed is 0.
 */
#include <string.h>

#include "common/checked.h"
#include "common/endian.h"
#include "imgc.h"

#define PRIME_1 0x9e3779b185ebca87u
#define PRIME_2 0xc2b2ae3d27d4eb4fu
#define PRIME_3 0x165667b19e3779f9u
#define PRIME_4 0x85ebca77c2b2ae63u
#define PRIME_5 0x27d4eb2f165667c5u

static inline uint64_t rotate(uint64_t value, unsigned n_bits)
{
	return value << n_bits | value >> (64 - n_bits);
}

static inline uint64_t round_of(uint64_t lane, uint64_t word)
{
	return rotate(lane + word * PRIME_2, 31) * PRIME_1;
}

void imgc_xxh64_begin(struct imgc_xxh64 *hash)
{
	*hash = (struct imgc_xxh64){
		.lanes = {PRIME_1 + PRIME_2, PRIME_2, 0, (uint64_t)0 - PRIME_1},
	};
}

/* Adds whole stripes, and returns how many bytes these are. */
static size_t add_stripes(struct imgc_xxh64 *hash, const uint8_t *p, size_t nbytes)
{
	uint64_t a = hash->lanes[0], b = hash->lanes[1], c = hash->lanes[2], d = hash->lanes[3];
	size_t done;

	for (done = 0; nbytes - done >= IMGC_XXH64_STRIPE_NBYTES;
	     done += IMGC_XXH64_STRIPE_NBYTES) {
		a = round_of(a, imgc_load_le64(p + done));
		b = round_of(b, imgc_load_le64(p + done + 8));
		c = round_of(c, imgc_load_le64(p + done + 16));
		d = round_of(d, imgc_load_le64(p + done + 24));
	}
	hash->lanes[0] = a;
	hash->lanes[1] = b;
	hash->lanes[2] = c;
	hash->lanes[3] = d;
	return done;
}

void imgc_xxh64_add(struct imgc_xxh64 *hash, const void *data, size_t nbytes)
{
	const uint8_t *p = data;
	size_t n_pending = hash->nbytes % IMGC_XXH64_STRIPE_NBYTES;

	hash->nbytes += nbytes;
	if (n_pending > 0) {
		size_t n = imgc_min_u64(IMGC_XXH64_STRIPE_NBYTES - n_pending, nbytes);

		memcpy(hash->pending + n_pending, p, n);
		if (n_pending + n < IMGC_XXH64_STRIPE_NBYTES)
			return;
		add_stripes(hash, hash->pending, IMGC_XXH64_STRIPE_NBYTES);
		p += n;
		nbytes -= n;
	}
	size_t done = add_stripes(hash, p, nbytes);

	memcpy(hash->pending, p + done, nbytes - done);
}

uint64_t imgc_xxh64_end(const struct imgc_xxh64 *hash)
{
	static const unsigned bits[] = {1, 7, 12, 18};
	const uint8_t *p = hash->pending, *end = p + hash->nbytes % IMGC_XXH64_STRIPE_NBYTES;
	uint64_t sum = PRIME_5;

	if (hash->nbytes >= IMGC_XXH64_STRIPE_NBYTES) {
		sum = 0;
		for (unsigned i = 0; i < 4; i++)
			sum += rotate(hash->lanes[i], bits[i]);
		for (unsigned i = 0; i < 4; i++)
			sum = (sum ^ round_of(0, hash->lanes[i])) * PRIME_1 + PRIME_4;
	}
	sum += hash->nbytes;
	for (; end - p >= 8; p += 8)
		sum = rotate(sum ^ round_of(0, imgc_load_le64(p)), 27) * PRIME_1 + PRIME_4;
	for (; end - p >= 4; p += 4)
		sum = rotate(sum ^ imgc_load_le32(p) * PRIME_1, 23) * PRIME_2 + PRIME_3;
	for (; p < end; p++)
		sum = rotate(sum ^ *p * PRIME_5, 11) * PRIME_1;
	sum = (sum ^ sum >> 33) * PRIME_2;
	sum = (sum ^ sum >> 29) * PRIME_3;
	return sum ^ sum >> 32;
}
