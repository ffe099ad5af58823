/*
 * deflate.c - DEFLATE compression by ISA-L (fast, any window) and libdeflate (small, 32 KiB window)
 */
#include <isa-l/igzip_lib.h>
#include <libdeflate.h>
#include <stdbool.h>
#include <stdlib.h>

#include "codec/codec.h"

/* RFC 1950: 2 bytes of header, 4 of Adler-32. */
#define ZLIB_OVERHEAD 6

/* A stored block holds at most 65535 bytes and costs 5; ISA-L may also start one early. */
#define STORED_BLOCK_NBYTES 65535
#define STORED_BLOCK_OVERHEAD 5

struct imgc_deflate {
	struct libdeflate_compressor *libdeflate; /* NULL: ISA-L */
	struct isal_zstream *stream;
	uint8_t *level_buffer;
	uint32_t level_buffer_nbytes;
	uint32_t level;
	uint16_t window_bits;
	bool is_zlib;
};

/*
 * The small buffers close a DEFLATE block after 16 Ki tokens, so that the Huffman
 * codes follow the data: a little smaller than the default, and as fast.
 */
static uint32_t isal_level_nbytes(uint32_t level)
{
	switch (level) {
	case 1:
		return ISAL_DEF_LVL1_SMALL;
	case 2:
		return ISAL_DEF_LVL2_SMALL;
	case 3:
		return ISAL_DEF_LVL3_SMALL;
	default:
		return 0;
	}
}

static int create_isal(const struct imgc_codec_params *params, struct imgc_deflate *d)
{
	if (params->level < ISAL_DEF_MIN_LEVEL || params->level > ISAL_DEF_MAX_LEVEL ||
	    params->window_bits < 12 || params->window_bits > 15)
		return IMGC_INVALID_ARGUMENT;
	d->level = (uint32_t)params->level;
	d->window_bits = (uint16_t)params->window_bits;
	d->level_buffer_nbytes = isal_level_nbytes(d->level);
	d->stream = calloc(1, sizeof(*d->stream));
	if (!d->stream)
		return IMGC_NO_MEMORY;
	if (d->level_buffer_nbytes != 0) {
		d->level_buffer = calloc(1, d->level_buffer_nbytes);
		if (!d->level_buffer)
			return IMGC_NO_MEMORY;
	}
	return IMGC_OK;
}

static int create_libdeflate(const struct imgc_codec_params *params, struct imgc_deflate *d)
{
	if (params->level < 1 || params->level > 12 || params->window_bits != 15)
		return IMGC_INVALID_ARGUMENT;
	d->libdeflate = libdeflate_alloc_compressor(params->level);
	return d->libdeflate ? IMGC_OK : IMGC_NO_MEMORY;
}

int imgc_deflate_create(const struct imgc_codec_params *params, struct imgc_deflate **out)
{
	struct imgc_deflate *d = calloc(1, sizeof(*d));
	int status;

	if (!d)
		return IMGC_NO_MEMORY;
	d->is_zlib = params->codec == IMGC_CODEC_ZLIB;
	switch (params->engine) {
	case IMGC_DEFLATE_ISAL:
		status = create_isal(params, d);
		break;
	case IMGC_DEFLATE_LIBDEFLATE:
		status = create_libdeflate(params, d);
		break;
	default:
		status = IMGC_INVALID_ARGUMENT;
	}
	if (status) {
		imgc_deflate_destroy(d);
		return status;
	}
	*out = d;
	return IMGC_OK;
}

void imgc_deflate_destroy(struct imgc_deflate *d)
{
	if (!d)
		return;
	if (d->libdeflate)
		libdeflate_free_compressor(d->libdeflate);
	free(d->stream);
	free(d->level_buffer);
	free(d);
}

size_t imgc_deflate_bound(const struct imgc_deflate *d, size_t nbytes)
{
	size_t n_blocks = nbytes / STORED_BLOCK_NBYTES + 2;

	if (d->libdeflate)
		return d->is_zlib ? libdeflate_zlib_compress_bound(d->libdeflate, nbytes)
				  : libdeflate_deflate_compress_bound(d->libdeflate, nbytes);
	return nbytes + n_blocks * STORED_BLOCK_OVERHEAD + ZLIB_OVERHEAD;
}

/* ISA-L claims a 32 KiB window whatever it used; RFC 1950, 2.2: CINFO, and FCHECK after it. */
static void state_window(uint8_t *header, uint32_t window_bits)
{
	uint32_t cmf = (window_bits - 8) << 4 | (header[0] & 15u);
	uint32_t flg = header[1] & 0xe0u;

	flg += (31 - (cmf * 256 + flg) % 31) % 31;
	header[0] = (uint8_t)cmf;
	header[1] = (uint8_t)flg;
}

static int run_isal(struct imgc_deflate *d, const void *in, size_t in_nbytes, void *out,
		    size_t out_capacity, size_t *out_nbytes)
{
	struct isal_zstream *s = d->stream;
	int rc;

	if (in_nbytes > UINT32_MAX)
		return IMGC_INVALID_ARGUMENT;
	isal_deflate_stateless_init(s);
	s->level = d->level;
	s->level_buf = d->level_buffer;
	s->level_buf_size = d->level_buffer_nbytes;
	s->hist_bits = d->window_bits;
	s->gzip_flag = d->is_zlib ? IGZIP_ZLIB : IGZIP_DEFLATE;
	s->end_of_stream = 1;
	s->flush = NO_FLUSH;
	s->next_in = (uint8_t *)(uintptr_t)in;
	s->avail_in = (uint32_t)in_nbytes;
	s->next_out = out;
	s->avail_out = out_capacity > UINT32_MAX ? UINT32_MAX : (uint32_t)out_capacity;
	rc = isal_deflate_stateless(s);
	if (rc == STATELESS_OVERFLOW) {
		*out_nbytes = 0;
		return IMGC_OK;
	}
	if (rc != COMP_OK || s->avail_in != 0)
		return IMGC_INVALID_ARGUMENT;
	if (d->is_zlib)
		state_window(out, d->window_bits);
	*out_nbytes = s->total_out;
	return IMGC_OK;
}

int imgc_deflate_run(struct imgc_deflate *d, const void *in, size_t in_nbytes, void *out,
		     size_t out_capacity, size_t *out_nbytes)
{
	if (!d->libdeflate)
		return run_isal(d, in, in_nbytes, out, out_capacity, out_nbytes);
	if (d->is_zlib)
		*out_nbytes =
			libdeflate_zlib_compress(d->libdeflate, in, in_nbytes, out, out_capacity);
	else
		*out_nbytes = libdeflate_deflate_compress(d->libdeflate, in, in_nbytes, out,
							  out_capacity);
	return IMGC_OK;
}
