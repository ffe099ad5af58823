/*
 * zstd.c - Zstandard: one call for each block
 */
#include <stdlib.h>
#include <zstd.h>
#include <zstd_errors.h>

#include "codec/codec.h"
#include "common/endian.h"

/*
 * Levels 1 and 2 look for matches in one hash table.  With as many entries as a usual
 * cluster has bytes, blocks become smaller and take no longer than with libzstd's own
 * table, which has a quarter or half as many.
 */
#define FAST_HASH_BITS 16

struct imgc_zstd_encoder {
	ZSTD_CCtx *ctx;
};

struct imgc_zstd_decoder {
	ZSTD_DCtx *ctx;
};

static int set_level(ZSTD_CCtx *ctx, int32_t level)
{
	size_t n = ZSTD_CCtx_setParameter(ctx, ZSTD_c_compressionLevel, level);

	if (!ZSTD_isError(n) && (level == 1 || level == 2))
		n = ZSTD_CCtx_setParameter(ctx, ZSTD_c_hashLog, FAST_HASH_BITS);
	return ZSTD_isError(n) ? IMGC_INVALID_ARGUMENT : IMGC_OK;
}

int imgc_zstd_encoder_create(int32_t level, struct imgc_zstd_encoder **out)
{
	if (level < ZSTD_minCLevel() || level > ZSTD_maxCLevel())
		return IMGC_INVALID_ARGUMENT;
	struct imgc_zstd_encoder *e = calloc(1, sizeof(*e));

	if (!e)
		return IMGC_NO_MEMORY;
	e->ctx = ZSTD_createCCtx();
	int status = e->ctx ? set_level(e->ctx, level) : IMGC_NO_MEMORY;

	if (status)
		imgc_zstd_encoder_destroy(e);
	else
		*out = e;
	return status;
}

void imgc_zstd_encoder_destroy(struct imgc_zstd_encoder *e)
{
	if (!e)
		return;
	ZSTD_freeCCtx(e->ctx);
	free(e);
}

size_t imgc_zstd_bound(size_t nbytes)
{
	return ZSTD_compressBound(nbytes);
}

int imgc_zstd_encode(struct imgc_zstd_encoder *e, const void *in, size_t in_nbytes, void *out,
		     size_t out_capacity, size_t *out_nbytes)
{
	size_t n = ZSTD_compress2(e->ctx, out, out_capacity, in, in_nbytes);

	if (!ZSTD_isError(n)) {
		*out_nbytes = n;
		return IMGC_OK;
	}
	switch (ZSTD_getErrorCode(n)) {
	case ZSTD_error_dstSize_tooSmall:
		*out_nbytes = 0;
		return IMGC_OK;
	case ZSTD_error_memory_allocation:
		return IMGC_NO_MEMORY;
	default:
		return IMGC_INVALID_ARGUMENT;
	}
}

int imgc_zstd_decoder_create(struct imgc_zstd_decoder **out)
{
	struct imgc_zstd_decoder *d = calloc(1, sizeof(*d));

	if (!d)
		return IMGC_NO_MEMORY;
	d->ctx = ZSTD_createDCtx();
	if (!d->ctx) {
		free(d);
		return IMGC_NO_MEMORY;
	}
	*out = d;
	return IMGC_OK;
}

void imgc_zstd_decoder_destroy(struct imgc_zstd_decoder *d)
{
	if (!d)
		return;
	ZSTD_freeDCtx(d->ctx);
	free(d);
}

/*
 * Takes frames one by one until the block is full, because the bytes after the last
 * frame may be anything.  Decoding straight into `out` needs no window, so a header
 * that claims a huge window costs nothing.
 */
int imgc_zstd_decode(struct imgc_zstd_decoder *d, const void *in, size_t in_nbytes, void *out,
		     size_t out_nbytes, size_t *in_used)
{
	const uint8_t *p = in;
	size_t used = 0, done = 0;

	do {
		/* A block holds no skippable frames, and none of zstd before 0.8. */
		if (in_nbytes - used < 4 || imgc_load_le32(p + used) != ZSTD_MAGICNUMBER)
			return IMGC_CORRUPT;
		size_t frame_nbytes = ZSTD_findFrameCompressedSize(p + used, in_nbytes - used);

		if (ZSTD_isError(frame_nbytes))
			return IMGC_CORRUPT;
		size_t n = ZSTD_decompressDCtx(d->ctx, (uint8_t *)out + done, out_nbytes - done,
					       p + used, frame_nbytes);

		if (ZSTD_isError(n))
			return ZSTD_getErrorCode(n) == ZSTD_error_memory_allocation ? IMGC_NO_MEMORY
										    : IMGC_CORRUPT;
		used += frame_nbytes;
		done += n;
	} while (done < out_nbytes);
	*in_used = used;
	return IMGC_OK;
}
