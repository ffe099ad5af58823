/*
 * deflate.c - DEFLATE compression
 *
 * ISA-L is fast and supports every window.  libdeflate compresses better; its window is
 * always 32 KiB.
 */
#include <isa-l/igzip_lib.h>
#include <libdeflate.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "codec/codec.h"
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

/*
 * ISA-L for x86-64 (up to 2.31.1) has a fault at levels 1 and 2: it enters the third
 * byte of a block under a hash of bits 16 to 47 of the stream's own address, not under
 * a hash of the bytes there.  Whether it finds a match then depends on where the stream
 * is in memory: one block of 64 KiB in ten thousand comes out differently from run to
 * run, and from thread to thread.
 *
 * The fault has no effect as long as that hash differs from the hashes of the block's
 * first three places.  So each block takes, of several streams, one for which it
 * differs.
 */
#define N_STREAMS 8
#define STREAM_SPACING_NBYTES ((sizeof(struct isal_zstream) + 0xffff) & ~(size_t)0xffff)
/* Every hash table has 256 entries or more: hashes that differ here differ in each. */
#define HASH_MASK 0xffu

struct imgc_deflate {
	struct libdeflate_compressor *libdeflate; /* NULL: ISA-L alone */
	uint8_t *streams;			  /* N_STREAMS of ISA-L; NULL: libdeflate alone */
	struct isal_zstream *stream;		  /* the stream of the last block */
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
	d->streams = calloc(N_STREAMS, STREAM_SPACING_NBYTES);
	if (!d->streams)
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
	free(d->streams);
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
	return d->streams && isal > libdeflate ? isal : libdeflate;
}

/* ISA-L's hash of four bytes (the crc32 instruction), before it is cut to a table. */
static uint32_t isal_hash(uint32_t word)
{
	const uint32_t crc32c_polynomial = 0x82f63b78;

	for (int bit = 0; bit < 32; bit++)
		word = word >> 1 ^ (word & 1 ? crc32c_polynomial : 0);
	return word;
}

/*
 * The run of 0x00 or 0xff at the start of a block.  ISA-L encodes it apart, and looks
 * for matches from its end on.
 */
static size_t repeated_nbytes(const uint8_t *in, size_t in_nbytes)
{
	size_t n = 0;

	if (in_nbytes > 0 && (in[0] == 0x00 || in[0] == 0xff))
		while (n < in_nbytes && in[n] == in[0])
			n++;
	return n;
}

static struct isal_zstream *stream_at(const struct imgc_deflate *d, size_t i)
{
	return (struct isal_zstream *)(d->streams + i * STREAM_SPACING_NBYTES);
}

static bool stream_is_neutral(const struct isal_zstream *stream, const uint32_t *hashes, size_t n)
{
	uint32_t own = isal_hash((uint32_t)((uintptr_t)stream >> 16));

	for (size_t i = 0; i < n; i++)
		if (((own ^ hashes[i]) & HASH_MASK) == 0)
			return false;
	return true;
}

static struct isal_zstream *choose_stream(const struct imgc_deflate *d, const uint8_t *in,
					  size_t in_nbytes)
{
	const size_t starts[] = {0, repeated_nbytes(in, in_nbytes)};
	struct isal_zstream *stream = NULL;
	uint32_t hashes[6];
	size_t n = 0;

	for (size_t i = 0; i < 2; i++) {
		for (size_t at = starts[i]; at < starts[i] + 3; at++) {
			uint32_t word;

			if (at + sizeof(word) > in_nbytes)
				break;
			memcpy(&word, in + at, sizeof(word));
			hashes[n++] = isal_hash(word);
		}
	}
	for (size_t i = 0; i < N_STREAMS; i++) {
		stream = stream_at(d, i);
		if (stream_is_neutral(stream, hashes, n))
			break;
	}
	return stream;
}

/* Writes a raw stream.  Returns ISA-L's own status; d->stream has the sizes. */
static int deflate_once(struct imgc_deflate *d, uint32_t level, const void *in, size_t in_nbytes,
			void *out, size_t out_capacity)
{
	bool depends_on_place = level == 1 || level == 2;
	struct isal_zstream *s =
		depends_on_place ? choose_stream(d, in, in_nbytes) : stream_at(d, 0);

	d->stream = s;
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
	if (!d->libdeflate || (d->streams && !shrinks_well(d, in, in_nbytes, out, out_capacity)))
		return run_isal(d, in, in_nbytes, out, out_capacity, out_nbytes);
	if (d->is_zlib)
		*out_nbytes =
			libdeflate_zlib_compress(d->libdeflate, in, in_nbytes, out, out_capacity);
	else
		*out_nbytes = libdeflate_deflate_compress(d->libdeflate, in, in_nbytes, out,
							  out_capacity);
	return IMGC_OK;
}
