/*
 * rewrap.c - another wrapper around a compressed block
 */
#include <stdbool.h>
#include <string.h>

#include "codec/zlib_frame.h"
#include "imgc.h"

/* What zlib writes for a window of 32 KiB, which any stream fits, and its level 6. */
static const uint8_t zlib_header[ZLIB_HEADER_NBYTES] = {0x78, 0x9c};

static bool wraps_deflate(uint32_t codec)
{
	return codec == IMGC_CODEC_DEFLATE || codec == IMGC_CODEC_ZLIB;
}

size_t imgc_rewrap(uint32_t from, uint32_t to, const void *in, size_t in_nbytes, const void *plain,
		   size_t plain_nbytes, void *out, size_t out_capacity)
{
	const uint8_t *stream = in;
	uint8_t *p = out;
	bool strips = from == IMGC_CODEC_ZLIB && to == IMGC_CODEC_DEFLATE;
	bool wraps = from == IMGC_CODEC_DEFLATE && to == IMGC_CODEC_ZLIB;

	if (from != to && !(wraps_deflate(from) && wraps_deflate(to)))
		return 0;
	if (from == IMGC_CODEC_ZLIB && (in_nbytes <= ZLIB_OVERHEAD || !zlib_header_valid(stream)))
		return 0;
	if (strips) {
		stream += ZLIB_HEADER_NBYTES;
		in_nbytes -= ZLIB_OVERHEAD;
	}
	size_t around = wraps ? ZLIB_OVERHEAD : 0;

	if (in_nbytes == 0 || out_capacity < around || in_nbytes > out_capacity - around ||
	    (wraps && !plain))
		return 0;
	if (wraps) {
		memcpy(p, zlib_header, sizeof(zlib_header));
		zlib_put_trailer(p + ZLIB_HEADER_NBYTES + in_nbytes, plain, plain_nbytes);
		p += ZLIB_HEADER_NBYTES;
	}
	memcpy(p, stream, in_nbytes);
	return in_nbytes + around;
}
