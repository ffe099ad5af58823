/*
 * digest.h - the algorithms of checksums, each from its library
 */
#ifndef IMGC_DIGEST_DIGEST_H
#define IMGC_DIGEST_DIGEST_H

#include "imgc.h"

/* One thread's state of one algorithm. */
struct imgc_digest;

/* `checksum` is an enum imgc_checksum.  IMGC_UNSUPPORTED if it is not built in. */
int imgc_digest_create(uint32_t checksum, struct imgc_digest **out);
void imgc_digest_destroy(struct imgc_digest *digest);

/* Between begin and end, bytes are added in order.  A new begin drops what was added. */
int imgc_digest_begin(struct imgc_digest *digest);
int imgc_digest_add(struct imgc_digest *digest, const void *data, size_t nbytes);
int imgc_digest_end(struct imgc_digest *digest, uint8_t out[IMGC_CHECKSUM_NBYTES]);

/* Makes `to` continue as `from` would.  Both are of one algorithm. */
int imgc_digest_copy(struct imgc_digest *to, const struct imgc_digest *from);

/* Begin, add and end. */
int imgc_digest_of(struct imgc_digest *digest, const void *data, size_t nbytes,
		   uint8_t out[IMGC_CHECKSUM_NBYTES]);

/* The same for `nbytes` zeros. */
int imgc_digest_of_zeros(struct imgc_digest *digest, size_t nbytes,
			 uint8_t out[IMGC_CHECKSUM_NBYTES]);

/* Fills an array with `n` times the same leaf, which may be its first. */
void imgc_leaves_fill(uint8_t *leaves, size_t n, const uint8_t leaf[IMGC_CHECKSUM_NBYTES]);

#endif /* IMGC_DIGEST_DIGEST_H */
