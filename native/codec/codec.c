/*
 * codec.c - compressors and decompressors of all codecs
 */
#include <stdlib.h>

#include "codec/codec.h"

struct imgc_compressor {
	struct imgc_deflate *deflate; /* one of the two */
	struct imgc_zstd_encoder *zstd;
};

struct imgc_decompressor {
	struct imgc_inflate *inflate;
	struct imgc_zstd_decoder *zstd; /* made when first needed */
};

int imgc_compressor_create(const struct imgc_codec_params *params, struct imgc_compressor **out)
{
	struct imgc_compressor *c = calloc(1, sizeof(*c));

	if (!c)
		return IMGC_NO_MEMORY;
	int status;

	switch (params->codec) {
	case IMGC_CODEC_DEFLATE:
	case IMGC_CODEC_ZLIB:
		status = imgc_deflate_create(params, &c->deflate);
		break;
	case IMGC_CODEC_ZSTD:
		status = imgc_zstd_encoder_create(params->level, &c->zstd);
		break;
	default:
		status = IMGC_INVALID_ARGUMENT;
	}
	if (status) {
		free(c);
		return status;
	}
	*out = c;
	return IMGC_OK;
}

void imgc_compressor_destroy(struct imgc_compressor *c)
{
	if (!c)
		return;
	imgc_deflate_destroy(c->deflate);
	imgc_zstd_encoder_destroy(c->zstd);
	free(c);
}

size_t imgc_compressor_bound(const struct imgc_compressor *c, size_t nbytes)
{
	return c->deflate ? imgc_deflate_bound(c->deflate, nbytes) : imgc_zstd_bound(nbytes);
}

int imgc_compress(struct imgc_compressor *c, const void *in, size_t in_nbytes, void *out,
		  size_t out_capacity, size_t *out_nbytes)
{
	if (c->deflate)
		return imgc_deflate_run(c->deflate, in, in_nbytes, out, out_capacity, out_nbytes);
	return imgc_zstd_encode(c->zstd, in, in_nbytes, out, out_capacity, out_nbytes);
}

int imgc_decompressor_create(uint32_t inflate_variant, struct imgc_decompressor **out)
{
	struct imgc_decompressor *d = calloc(1, sizeof(*d));

	if (!d)
		return IMGC_NO_MEMORY;
	int status = imgc_inflate_create(inflate_variant, &d->inflate);

	if (status) {
		free(d);
		return status;
	}
	*out = d;
	return IMGC_OK;
}

void imgc_decompressor_destroy(struct imgc_decompressor *d)
{
	if (!d)
		return;
	imgc_inflate_destroy(d->inflate);
	imgc_zstd_decoder_destroy(d->zstd);
	free(d);
}

int imgc_decompress(struct imgc_decompressor *d, uint32_t codec, const void *in, size_t in_nbytes,
		    void *out, size_t out_nbytes, size_t *in_used)
{
	size_t used;
	int status;

	switch (codec) {
	case IMGC_CODEC_DEFLATE:
	case IMGC_CODEC_ZLIB:
		status = imgc_inflate_run(d->inflate, codec, in, in_nbytes, out, out_nbytes, &used);
		break;
	case IMGC_CODEC_ZSTD:
		status = d->zstd ? IMGC_OK : imgc_zstd_decoder_create(&d->zstd);
		if (!status)
			status = imgc_zstd_decode(d->zstd, in, in_nbytes, out, out_nbytes, &used);
		break;
	default:
		status = IMGC_INVALID_ARGUMENT;
	}
	if (!status && in_used)
		*in_used = used;
	return status;
}
