/*
 * isal_stream.h - ISA-L's compressor state, at an address that does not change the output
 */
#ifndef IMGC_CODEC_ISAL_STREAM_H
#define IMGC_CODEC_ISAL_STREAM_H

#include <isa-l/igzip_lib.h>
#include <stdint.h>

/* Zeroed, or NULL without memory.  Destroy it with imgc_isal_stream_destroy. */
struct isal_zstream *imgc_isal_stream_create(uint32_t level);

void imgc_isal_stream_destroy(struct isal_zstream *stream, uint32_t level);

/* ISA-L's hash of four bytes (the crc32 instruction), before it is cut to a table. */
uint32_t imgc_isal_hash(uint32_t word);

#endif
