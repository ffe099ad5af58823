/*
 * inflate.c - DEFLATE decompression of a block of known size
 */
#include <isa-l/igzip_lib.h>
#include <libdeflate.h>
#include <stdlib.h>

#include "codec/codec.h"
#include "codec/zlib_frame.h"
#include "common/variant.h"

enum { INFLATE_LIBDEFLATE, INFLATE_ISAL, N_INFLATE_VARIANTS };

static const struct imgc_variant inflate_rows[N_INFLATE_VARIANTS] = {
	[INFLATE_LIBDEFLATE] = {"libdeflate", true, NULL},
	[INFLATE_ISAL] = {"isal", true, NULL},
};

const struct imgc_variant_table imgc_inflate_variants = {
	.operation = "inflate",
	.rows = inflate_rows,
	.n_rows = N_INFLATE_VARIANTS,
	.default_row = INFLATE_LIBDEFLATE,
};

struct imgc_inflate {
	struct libdeflate_decompressor *libdeflate; /* one of the two */
	struct inflate_state *isal;
};

int imgc_inflate_create(uint32_t variant, struct imgc_inflate **out)
{
	if (variant >= N_INFLATE_VARIANTS)
		return IMGC_INVALID_ARGUMENT;
	struct imgc_inflate *d = calloc(1, sizeof(*d));

	if (!d)
		return IMGC_NO_MEMORY;
	if (variant == INFLATE_LIBDEFLATE)
		d->libdeflate = libdeflate_alloc_decompressor();
	else
		d->isal = calloc(1, sizeof(*d->isal));
	if (!d->libdeflate && !d->isal) {
		free(d);
		return IMGC_NO_MEMORY;
	}
	*out = d;
	return IMGC_OK;
}

void imgc_inflate_destroy(struct imgc_inflate *d)
{
	if (!d)
		return;
	if (d->libdeflate)
		libdeflate_free_decompressor(d->libdeflate);
	free(d->isal);
	free(d);
}

static int run_libdeflate(struct libdeflate_decompressor *d, uint32_t codec, const void *in,
			  size_t in_nbytes, void *out, size_t out_nbytes, size_t *in_used)
{
	enum libdeflate_result result;

	if (codec == IMGC_CODEC_ZLIB)
		result = libdeflate_zlib_decompress_ex(d, in, in_nbytes, out, out_nbytes, in_used,
						       NULL);
	else
		result = libdeflate_deflate_decompress_ex(d, in, in_nbytes, out, out_nbytes,
							  in_used, NULL);
	return result == LIBDEFLATE_SUCCESS ? IMGC_OK : IMGC_CORRUPT;
}

static int run_isal_raw(struct inflate_state *s, const uint8_t *in, size_t in_nbytes, void *out,
			size_t out_nbytes, size_t *in_used)
{
	/* in_nbytes includes what follows the stream, and may exceed 32 bits. */
	uint32_t avail_in = in_nbytes > UINT32_MAX ? UINT32_MAX : (uint32_t)in_nbytes;

	if (out_nbytes > UINT32_MAX)
		return IMGC_UNSUPPORTED;
	isal_inflate_init(s);
	s->crc_flag = ISAL_DEFLATE;
	s->next_in = (uint8_t *)(uintptr_t)in;
	s->avail_in = avail_in;
	s->next_out = out;
	s->avail_out = (uint32_t)out_nbytes;
	int rc = isal_inflate_stateless(s);

	if (rc != ISAL_DECOMP_OK || s->block_state != ISAL_BLOCK_FINISH || s->avail_out != 0)
		return IMGC_CORRUPT;
	*in_used = avail_in - s->avail_in;
	return IMGC_OK;
}

static int run_isal(struct inflate_state *s, uint32_t codec, const uint8_t *in, size_t in_nbytes,
		    void *out, size_t out_nbytes, size_t *in_used)
{
	if (codec != IMGC_CODEC_ZLIB)
		return run_isal_raw(s, in, in_nbytes, out, out_nbytes, in_used);
	if (in_nbytes < ZLIB_OVERHEAD || !zlib_header_valid(in))
		return IMGC_CORRUPT;
	size_t used;
	int status = run_isal_raw(s, in + ZLIB_HEADER_NBYTES, in_nbytes - ZLIB_OVERHEAD, out,
				  out_nbytes, &used);

	if (status)
		return status;
	if (!zlib_trailer_valid(in + ZLIB_HEADER_NBYTES + used, out, out_nbytes))
		return IMGC_CORRUPT;
	*in_used = used + ZLIB_OVERHEAD;
	return IMGC_OK;
}

int imgc_inflate_run(struct imgc_inflate *d, uint32_t codec, const void *in, size_t in_nbytes,
		     void *out, size_t out_nbytes, size_t *in_used)
{
	if (d->libdeflate)
		return run_libdeflate(d->libdeflate, codec, in, in_nbytes, out, out_nbytes,
				      in_used);
	return run_isal(d->isal, codec, in, in_nbytes, out, out_nbytes, in_used);
}
