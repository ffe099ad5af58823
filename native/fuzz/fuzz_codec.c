/*
 * fuzz_codec.c - compressed blocks of all codecs: damaged blocks, and round trips
 *
 * The inflate variants agree on which blocks are valid, and on their content.  A block
 * that was compressed decompresses to the same bytes, and so does one in another wrapper.
 */
#include "fuzz/fuzz_util.h"

#define MAX_OUT 65536

static const uint32_t codecs[] = {IMGC_CODEC_DEFLATE, IMGC_CODEC_ZLIB, IMGC_CODEC_ZSTD};

static int unpack(uint32_t variant, uint32_t codec, const uint8_t *in, size_t in_nbytes,
		  uint8_t *out, size_t out_nbytes, size_t *used)
{
	struct imgc_decompressor *d = NULL;
	int status = imgc_decompressor_create(variant, &d);

	REQUIRE(status == IMGC_OK);
	status = imgc_decompress(d, codec, in, in_nbytes, out, out_nbytes, used);
	REQUIRE(status == IMGC_OK || status == IMGC_CORRUPT || status == IMGC_NO_MEMORY);
	REQUIRE(status != IMGC_OK || *used <= in_nbytes);
	imgc_decompressor_destroy(d);
	return status;
}

/* A valid block of in_nbytes is one of the codec `to` after a change of its wrapper. */
static void rewrapped(uint32_t from, uint32_t to, const uint8_t *in, size_t in_nbytes,
		      const uint8_t *plain, size_t plain_nbytes)
{
	size_t capacity = in_nbytes + 6, used = 0;
	uint8_t *out = malloc(capacity), *back = malloc(plain_nbytes);
	uint32_t id;

	REQUIRE(out != NULL && back != NULL);
	REQUIRE(imgc_variant_select(IMGC_OP_INFLATE, NULL, &id) == IMGC_SELECT_OK);
	size_t nbytes = imgc_rewrap(from, to, in, in_nbytes, plain, plain_nbytes, out, capacity);

	REQUIRE((nbytes == 0) == ((from == IMGC_CODEC_ZSTD) != (to == IMGC_CODEC_ZSTD)));
	if (nbytes > 0) {
		REQUIRE(unpack(id, to, out, nbytes, back, plain_nbytes, &used) == IMGC_OK);
		REQUIRE(used == nbytes);
		REQUIRE(memcmp(plain, back, plain_nbytes) == 0);
	}
	free(back);
	free(out);
}

static void damaged(uint32_t codec, size_t out_nbytes, struct input *in)
{
	size_t nbytes;
	uint8_t *packed = take_rest(in, &nbytes);
	uint8_t *first = malloc(out_nbytes), *other = malloc(out_nbytes);
	unsigned i, n = codec == IMGC_CODEC_ZSTD ? 1 : imgc_variant_count(IMGC_OP_INFLATE);
	int status = 0;
	size_t used = 0, others_used = 0;

	REQUIRE(first != NULL && other != NULL);
	for (i = 0; i < n; i++) {
		struct imgc_variant_info info;
		uint32_t id;

		REQUIRE(imgc_variant_describe(IMGC_OP_INFLATE, i, &info) == IMGC_OK);
		if (imgc_variant_select(IMGC_OP_INFLATE, info.name, &id) != IMGC_SELECT_OK)
			continue;
		int answer = unpack(id, codec, packed, nbytes, i == 0 ? first : other, out_nbytes,
				    i == 0 ? &used : &others_used);
		if (i == 0)
			status = answer;
		else if (status == IMGC_OK && answer == IMGC_OK)
			REQUIRE(used == others_used && memcmp(first, other, out_nbytes) == 0);
	}
	for (i = 0; i < 3 && status == IMGC_OK; i++)
		rewrapped(codec, codecs[i], packed, used, first, out_nbytes);
	free(other);
	free(first);
	free(packed);
}

static void round_trip(uint32_t codec, uint8_t how, struct input *in)
{
	struct imgc_codec_params params = {.codec = codec,
					   .engine = how % 3,
					   .level = take_u8(in) % 13,
					   .window_bits = 12 + take_u8(in) % 4};
	struct imgc_compressor *c = NULL;
	size_t nbytes, packed_nbytes = 0, used;
	uint32_t id;

	if (imgc_compressor_create(&params, &c) != IMGC_OK)
		return; /* not a supported combination */
	uint8_t *plain = take_rest(in, &nbytes);
	plain = realloc(plain, nbytes + IMGC_COMPRESS_SLACK_NBYTES);
	REQUIRE(plain != NULL);
	size_t bound = imgc_compressor_bound(c, nbytes);
	uint8_t *packed = malloc(bound ? bound : 1);
	uint8_t *back = malloc(nbytes ? nbytes : 1);
	REQUIRE(packed != NULL && back != NULL);
	if (nbytes > 0) {
		REQUIRE(imgc_compress(c, plain, nbytes, packed, bound, &packed_nbytes) == IMGC_OK);
		REQUIRE(packed_nbytes > 0 && packed_nbytes <= bound);
		REQUIRE(imgc_variant_select(IMGC_OP_INFLATE, NULL, &id) == IMGC_SELECT_OK);
		REQUIRE(unpack(id, codec, packed, packed_nbytes, back, nbytes, &used) == IMGC_OK);
		REQUIRE(memcmp(plain, back, nbytes) == 0);
	}
	free(back);
	free(packed);
	free(plain);
	imgc_compressor_destroy(c);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t nbytes)
{
	struct input in = {data, nbytes};
	uint8_t how = take_u8(&in);
	uint32_t codec = codecs[how % 3];
	size_t out_nbytes = 1 + (size_t)take_uint(&in, 2) % MAX_OUT;

	if (how & 0x80)
		round_trip(codec, how >> 2 & 15, &in);
	else
		damaged(codec, how & 0x40 ? 4096 : out_nbytes, &in);
	return 0;
}
