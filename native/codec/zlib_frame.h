/*
 * zlib_frame.h - the header and trailer of RFC 1950 around a DEFLATE stream of ISA-L
 *
 * ISA-L's own zlib mode is not used.  Up to release 2.30 its Adler-32 reads past the
 * end of the data on aarch64, and its header states a window of 32 KiB even if the
 * window is smaller.
 */
#ifndef IMGC_CODEC_ZLIB_FRAME_H
#define IMGC_CODEC_ZLIB_FRAME_H

#include <libdeflate.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/endian.h"

#define ZLIB_HEADER_NBYTES 2
#define ZLIB_TRAILER_NBYTES 4
#define ZLIB_OVERHEAD (ZLIB_HEADER_NBYTES + ZLIB_TRAILER_NBYTES)

/* Source: RFC 1950, 2.2: CM in CMF bits 0-3, CINFO in bits 4-7; FDICT in FLG bit 5. */
#define ZLIB_CM_DEFLATE 8
#define ZLIB_MAX_WINDOW_BITS 15
#define ZLIB_FDICT 0x20

static inline void zlib_put_header(uint8_t *header, uint32_t window_bits)
{
	uint32_t cmf = (window_bits - 8) << 4 | ZLIB_CM_DEFLATE;

	header[0] = (uint8_t)cmf;
	header[1] = (uint8_t)((31 - cmf * 256 % 31) % 31);
}

static inline bool zlib_header_valid(const uint8_t *header)
{
	return (header[0] & 15) == ZLIB_CM_DEFLATE &&
	       (header[0] >> 4) + 8 <= ZLIB_MAX_WINDOW_BITS && !(header[1] & ZLIB_FDICT) &&
	       (header[0] * 256 + header[1]) % 31 == 0;
}

static inline void zlib_put_trailer(uint8_t *trailer, const void *data, size_t nbytes)
{
	imgc_store_be32(trailer, libdeflate_adler32(1, data, nbytes));
}

static inline bool zlib_trailer_valid(const uint8_t *trailer, const void *data, size_t nbytes)
{
	return imgc_load_be32(trailer) == libdeflate_adler32(1, data, nbytes);
}

#endif /* IMGC_CODEC_ZLIB_FRAME_H */
