/*
 * deflate.c - DEFLATE compression
 *
 * ISA-L is fast and supports every window.  libdeflate compresses better; its window is
 * always 32 KiB.
 */
#include <libdeflate.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "codec/codec.h"
#include "codec/isal_stream.h"
#include "codec/zlib_frame.h"

/* A stored block holds up to 65535 bytes and adds 5.  ISA-L may start one early. */
#define STORED_BLOCK_NBYTES 65535
#define STORED_BLOCK_OVERHEAD 5

/*
 * IMGC_DEFLATE_SAMPLED: the middle eighth of a block is compressed at ISA-L's level 0,
 * and stands for the rest (docs/codecs.md).  In small blocks an eighth is too little to
 * tell.
 */
#define SAMPLE_DIVISOR 8
#define MIN_SAMPLE_NBYTES 4096
#define SAMPLE_PERCENT 45
#define SAMPLED_ISAL_LEVEL 3

struct imgc_deflate {
	struct libdeflate_compressor *libdeflate; /* NULL: ISA-L alone */
	struct isal_zstream *stream;		  /* NULL: libdeflate alone */
	uint8_t *level_buffer;
	uint32_t level_buffer_nbytes;
	uint32_t level;
	uint16_t window_bits;
	bool is_zlib;
};

/*
 * The small buffers end a DEFLATE block after 16 Ki tokens, so that the Huffman codes
 * follow the data.  The output is a little smaller than with the default buffers, and
 * the speed is the same.
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

static int create_isal(int32_t level, uint32_t window_bits, struct imgc_deflate *d)
{
	if (level < ISAL_DEF_MIN_LEVEL || level > ISAL_DEF_MAX_LEVEL || window_bits < 12 ||
	    window_bits > 15)
		return IMGC_INVALID_ARGUMENT;
	d->level = (uint32_t)level;
	d->window_bits = (uint16_t)window_bits;
	d->level_buffer_nbytes = isal_level_nbytes(d->level);
	d->stream = imgc_isal_stream_create(d->level);
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

	if (!d)
		return IMGC_NO_MEMORY;
	int status;

	d->is_zlib = params->codec == IMGC_CODEC_ZLIB;
	switch (params->engine) {
	case IMGC_DEFLATE_ISAL:
		status = create_isal(params->level, params->window_bits, d);
		break;
	case IMGC_DEFLATE_LIBDEFLATE:
		status = create_libdeflate(params, d);
		break;
	case IMGC_DEFLATE_SAMPLED:
		status = create_libdeflate(params, d);
		if (!status)
			status = create_isal(SAMPLED_ISAL_LEVEL, params->window_bits, d);
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
	imgc_isal_stream_destroy(d->stream, d->level);
	free(d->level_buffer);
	free(d);
}

size_t imgc_deflate_bound(const struct imgc_deflate *d, size_t nbytes)
{
	size_t n_blocks = nbytes / STORED_BLOCK_NBYTES + 2;
	size_t isal = nbytes + n_blocks * STORED_BLOCK_OVERHEAD + ZLIB_OVERHEAD;
	size_t libdeflate = 0;

	if (d->libdeflate)
		libdeflate = d->is_zlib ? libdeflate_zlib_compress_bound(d->libdeflate, nbytes)
					: libdeflate_deflate_compress_bound(d->libdeflate, nbytes);
	return d->stream && isal > libdeflate ? isal : libdeflate;
}

/* Writes a raw stream.  Returns ISA-L's own status; d->stream has the sizes. */
static int deflate_once(struct imgc_deflate *d, uint32_t level, const void *in, size_t in_nbytes,
			void *out, size_t out_capacity)
{
	struct isal_zstream *s = d->stream;

	isal_deflate_stateless_init(s);
	s->level = level;
	s->level_buf = level == 0 ? NULL : d->level_buffer;
	s->level_buf_size = level == 0 ? 0 : d->level_buffer_nbytes;
	s->hist_bits = d->window_bits;
	s->gzip_flag = IGZIP_DEFLATE;
	s->end_of_stream = 1;
	s->flush = NO_FLUSH;
	s->next_in = (uint8_t *)(uintptr_t)in;
	s->avail_in = (uint32_t)in_nbytes;
	s->next_out = out;
	s->avail_out = out_capacity > UINT32_MAX ? UINT32_MAX : (uint32_t)out_capacity;
	return isal_deflate_stateless(s);
}

static int run_isal(struct imgc_deflate *d, const void *in, size_t in_nbytes, uint8_t *out,
		    size_t out_capacity, size_t *out_nbytes)
{
	size_t header = d->is_zlib ? ZLIB_HEADER_NBYTES : 0;
	size_t overhead = d->is_zlib ? ZLIB_OVERHEAD : 0;
	int rc = STATELESS_OVERFLOW;

	if (in_nbytes > UINT32_MAX)
		return IMGC_INVALID_ARGUMENT;
	if (out_capacity > overhead)
		rc = deflate_once(d, d->level, in, in_nbytes, out + header,
				  out_capacity - overhead);
	if (rc == STATELESS_OVERFLOW) {
		*out_nbytes = 0;
		return IMGC_OK;
	}
	if (rc != COMP_OK || d->stream->avail_in != 0)
		return IMGC_INVALID_ARGUMENT;
	if (d->is_zlib) {
		zlib_put_header(out, d->window_bits);
		zlib_put_trailer(out + header + d->stream->total_out, in, in_nbytes);
	}
	*out_nbytes = d->stream->total_out + overhead;
	return IMGC_OK;
}

/* Whether the sample compresses well.  `out` serves as scratch memory. */
static bool shrinks_well(struct imgc_deflate *d, const void *in, size_t in_nbytes, void *out,
			 size_t out_capacity)
{
	size_t nbytes = in_nbytes / SAMPLE_DIVISOR;
	const uint8_t *sample = (const uint8_t *)in + (in_nbytes - nbytes) / 2;

	if (nbytes < MIN_SAMPLE_NBYTES || in_nbytes > UINT32_MAX)
		return true;
	return deflate_once(d, 0, sample, nbytes, out, out_capacity) == COMP_OK &&
	       (uint64_t)d->stream->total_out * 100 < (uint64_t)nbytes * SAMPLE_PERCENT;
}

int imgc_deflate_run(struct imgc_deflate *d, const void *in, size_t in_nbytes, void *out,
		     size_t out_capacity, size_t *out_nbytes)
{
	if (!d->libdeflate || (d->stream && !shrinks_well(d, in, in_nbytes, out, out_capacity)))
		return run_isal(d, in, in_nbytes, out, out_capacity, out_nbytes);
	if (d->is_zlib)
		*out_nbytes =
			libdeflate_zlib_compress(d->libdeflate, in, in_nbytes, out, out_capacity);
	else
		*out_nbytes = libdeflate_deflate_compress(d->libdeflate, in, in_nbytes, out,
							  out_capacity);
	return IMGC_OK;
}
