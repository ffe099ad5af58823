/*
 * codec.h - the wrappers of the compression libraries, for codec.c
 *
 * Compression gives IMGC_OK and 0 bytes if the result does not fit.  Decompression
 * demands exactly out_nbytes (see imgc.h).
 */
#ifndef IMGC_CODEC_CODEC_H
#define IMGC_CODEC_CODEC_H

#include "imgc.h"

/* ISA-L and libdeflate, raw or with the zlib wrapper. */
struct imgc_deflate;

int imgc_deflate_create(const struct imgc_codec_params *params, struct imgc_deflate **out);
void imgc_deflate_destroy(struct imgc_deflate *d);
size_t imgc_deflate_bound(const struct imgc_deflate *d, size_t nbytes);
int imgc_deflate_run(struct imgc_deflate *d, const void *in, size_t in_nbytes, void *out,
		     size_t out_capacity, size_t *out_nbytes);

struct imgc_inflate;

int imgc_inflate_create(uint32_t variant, struct imgc_inflate **out);
void imgc_inflate_destroy(struct imgc_inflate *d);
int imgc_inflate_run(struct imgc_inflate *d, uint32_t codec, const void *in, size_t in_nbytes,
		     void *out, size_t out_nbytes, size_t *in_used);

struct imgc_zstd_encoder;

int imgc_zstd_encoder_create(int32_t level, struct imgc_zstd_encoder **out);
void imgc_zstd_encoder_destroy(struct imgc_zstd_encoder *e);
size_t imgc_zstd_bound(size_t nbytes);
int imgc_zstd_encode(struct imgc_zstd_encoder *e, const void *in, size_t in_nbytes, void *out,
		     size_t out_capacity, size_t *out_nbytes);

struct imgc_zstd_decoder;

int imgc_zstd_decoder_create(struct imgc_zstd_decoder **out);
void imgc_zstd_decoder_destroy(struct imgc_zstd_decoder *d);
int imgc_zstd_decode(struct imgc_zstd_decoder *d, const void *in, size_t in_nbytes, void *out,
		     size_t out_nbytes, size_t *in_used);

#endif /* IMGC_CODEC_CODEC_H */
