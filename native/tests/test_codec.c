/*
 * test_codec.c - codecs: round trips with zlib as judge, windows, damage, sizes
 */
#include <stdbool.h>
#include <zlib.h>
#include <zstd.h>

#include "codec/isal_stream.h"
#include "tests/test_util.h"

#define BLOCK 65536
#define MAX_OUT (2 * BLOCK + 1024)
#define SLACK IMGC_COMPRESS_SLACK_NBYTES

/* Places for a compressor.  TSan leaves programs little address space. */
#ifdef __SANITIZE_THREAD__
#define N_PLACES 100
#else
#define N_PLACES 1000
#endif

static uint8_t packed[MAX_OUT], unpacked[MAX_OUT];

static const struct imgc_codec_params all_params[] = {
	{IMGC_CODEC_DEFLATE, IMGC_DEFLATE_ISAL, 0, 12},
	{IMGC_CODEC_DEFLATE, IMGC_DEFLATE_ISAL, 1, 12},
	{IMGC_CODEC_DEFLATE, IMGC_DEFLATE_ISAL, 2, 12},
	{IMGC_CODEC_DEFLATE, IMGC_DEFLATE_ISAL, 3, 12},
	{IMGC_CODEC_DEFLATE, IMGC_DEFLATE_ISAL, 2, 13},
	{IMGC_CODEC_DEFLATE, IMGC_DEFLATE_ISAL, 0, 15},
	{IMGC_CODEC_DEFLATE, IMGC_DEFLATE_ISAL, 3, 15},
	{IMGC_CODEC_DEFLATE, IMGC_DEFLATE_LIBDEFLATE, 1, 15},
	{IMGC_CODEC_DEFLATE, IMGC_DEFLATE_LIBDEFLATE, 6, 15},
	{IMGC_CODEC_DEFLATE, IMGC_DEFLATE_LIBDEFLATE, 12, 15},
	{IMGC_CODEC_DEFLATE, IMGC_DEFLATE_SAMPLED, 1, 15},
	{IMGC_CODEC_ZLIB, IMGC_DEFLATE_SAMPLED, 6, 15},
	{IMGC_CODEC_ZLIB, IMGC_DEFLATE_ISAL, 0, 15},
	{IMGC_CODEC_ZLIB, IMGC_DEFLATE_ISAL, 1, 15},
	{IMGC_CODEC_ZLIB, IMGC_DEFLATE_ISAL, 2, 14},
	{IMGC_CODEC_ZLIB, IMGC_DEFLATE_ISAL, 2, 12},
	{IMGC_CODEC_ZLIB, IMGC_DEFLATE_ISAL, 3, 15},
	{IMGC_CODEC_ZLIB, IMGC_DEFLATE_LIBDEFLATE, 6, 15},
	{IMGC_CODEC_ZSTD, 0, -1, 0},
	{IMGC_CODEC_ZSTD, 0, 1, 0},
	{IMGC_CODEC_ZSTD, 0, 2, 0},
	{IMGC_CODEC_ZSTD, 0, 3, 0},
	{IMGC_CODEC_ZSTD, 0, 12, 0},
};

#define N_PARAMS (sizeof(all_params) / sizeof(all_params[0]))

static const size_t sizes[] = {1, 2, 16, 511, 512, 4096, 4097, 65535, BLOCK, 2 * BLOCK};

#define N_SIZES (sizeof(sizes) / sizeof(sizes[0]))

/* Zeros, text with matches at every distance, noise, and a step far back. */
static void fill(uint8_t *p, size_t nbytes, unsigned pattern)
{
	memset(p, 0, nbytes);
	if (pattern == 1)
		fill_text(p, nbytes, nbytes);
	else if (pattern == 2)
		fill_random(p, nbytes, nbytes);
	else if (pattern == 3 && nbytes > 20000) {
		fill_random(p, 5000, 1);
		memcpy(p + 6000, p, 4900);
		memcpy(p + nbytes - 5000, p, 5000);
	}
}

#define N_PATTERNS 4

/*
 * Whether zlib accepts the stream.  window_bits is that of inflateInit2().  Takes the
 * output in pieces: otherwise zlib would look back further than its window.
 */
static int judge_inflate(const uint8_t *in, size_t in_nbytes, int window_bits, const uint8_t *data,
			 size_t nbytes)
{
	const size_t piece = nbytes == BLOCK ? 1 : 300;
	z_stream s;
	int rc;

	memset(&s, 0, sizeof(s));
	CHECK_EQ(inflateInit2(&s, window_bits), Z_OK);
	memset(unpacked, 0xcc, nbytes);
	s.next_in = (uint8_t *)(uintptr_t)in;
	s.avail_in = (unsigned)in_nbytes;
	s.next_out = unpacked;
	do {
		size_t room = nbytes + 1 - s.total_out;

		s.avail_out = (unsigned)(room < piece ? room : piece);
		rc = inflate(&s, Z_NO_FLUSH);
	} while (rc == Z_OK);
	inflateEnd(&s);
	return rc == Z_STREAM_END && s.total_out == nbytes && s.total_in == in_nbytes &&
	       memcmp(unpacked, data, nbytes) == 0;
}

static int judge(const struct imgc_codec_params *params, size_t in_nbytes, const uint8_t *data,
		 size_t nbytes)
{
	int bits = (int)params->window_bits;

	if (params->codec == IMGC_CODEC_ZLIB)
		return judge_inflate(packed, in_nbytes, bits, data, nbytes);
	if (params->codec == IMGC_CODEC_DEFLATE)
		return judge_inflate(packed, in_nbytes, -bits, data, nbytes);
	memset(unpacked, 0xcc, nbytes);
	return ZSTD_decompress(unpacked, MAX_OUT, packed, in_nbytes) == nbytes &&
	       memcmp(unpacked, data, nbytes) == 0;
}

static void check_block(struct imgc_compressor *c, const struct imgc_codec_params *params,
			const uint8_t *content, size_t nbytes)
{
	static struct guarded from, g;
	size_t bound = imgc_compressor_bound(c, nbytes);
	size_t n = 0, again = 0;

	if (!g.start) {
		from = guarded_alloc(MAX_OUT);
		g = guarded_alloc(MAX_OUT);
	}
	const uint8_t *data = memcpy(from.end - SLACK - nbytes, content, nbytes);
	CHECK(bound <= MAX_OUT);
	memset(packed, 0xee, sizeof(packed));
	CHECK_EQ(imgc_compress(c, data, nbytes, packed, bound, &n), IMGC_OK);
	CHECK(n > 0 && n <= bound);
	/* The bytes after the block may be read, but make no difference. */
	memset(from.end - SLACK, from.end[-1] ^ 0xff, SLACK);
	CHECK_EQ(imgc_compress(c, data, nbytes, unpacked, bound, &again), IMGC_OK);
	CHECK(again == n && memcmp(packed, unpacked, n) == 0);
	CHECK(judge(params, n, data, nbytes));
	/*
	 * Too little room: a size of 0, or a stream that fits.  No byte past the end.
	 */
	for (again = n / 2; again <= n; again += again < n ? n - again : 1) {
		size_t small = 77;

		CHECK_EQ(imgc_compress(c, data, nbytes, g.end - again, again, &small), IMGC_OK);
		CHECK(small <= again);
		if (again < n / 2 + 1 && n > 40)
			CHECK_EQ(small, 0);
	}
}

static void test_compressors(void)
{
	static uint8_t data[2 * BLOCK + SLACK];

	for (size_t i = 0; i < N_PARAMS; i++) {
		struct imgc_compressor *c;

		CHECK_EQ(imgc_compressor_create(&all_params[i], &c), IMGC_OK);
		for (size_t k = 0; k < N_SIZES; k++) {
			for (unsigned pattern = 0; pattern < N_PATTERNS; pattern++) {
				fill(data, sizes[k], pattern);
				check_block(c, &all_params[i], data, sizes[k]);
			}
		}
		imgc_compressor_destroy(c);
	}
}

/* The output does not depend on the blocks before. */
static void test_deterministic(void)
{
	static uint8_t data[BLOCK + SLACK], other[BLOCK + SLACK], first[MAX_OUT];

	fill_text(data, BLOCK, 3);
	for (size_t i = 0; i < N_PARAMS; i++) {
		size_t n_first = 0, n = 0;

		for (size_t round = 0; round < 6; round++) {
			struct imgc_compressor *c;

			CHECK_EQ(imgc_compressor_create(&all_params[i], &c), IMGC_OK);
			for (size_t k = 0; k < round; k++) {
				size_t nbytes = BLOCK >> (k & 1);

				fill(other, nbytes, (unsigned)(k + 1) % N_PATTERNS);
				if (k >= 3)
					fill_text(other, nbytes, k);
				CHECK_EQ(imgc_compress(c, other, nbytes, packed, MAX_OUT, &n),
					 IMGC_OK);
			}
			CHECK_EQ(imgc_compress(c, data, BLOCK, packed, MAX_OUT, &n), IMGC_OK);
			imgc_compressor_destroy(c);
			if (round == 0) {
				memcpy(first, packed, n);
				n_first = n;
			}
			CHECK_EQ(n, n_first);
			CHECK(memcmp(first, packed, n) == 0);
		}
	}
}

/*
 * A block whose output shows whether ISA-L has entered its third byte under the hash of
 * `word`: the word is 4096 bytes further on, across the end of a match, where ISA-L
 * enters nothing.  When it comes again, a window of 4 KiB finds it only by that entry.
 */
static void fill_for_hash(uint8_t *p, size_t nbytes, uint32_t word, uint64_t seed)
{
	enum { PERIOD = 200, MATCH = 32, AT = 4096 + 2, BEFORE = AT - 1000, AGAIN = AT + 1000 };

	fill_random(p, PERIOD, seed);
	for (size_t at = PERIOD; at < nbytes; at++)
		p[at] = p[at - PERIOD];
	fill_random(p + AT + 2 - MATCH, MATCH, seed + 1);
	memcpy(p + AT, &word, sizeof(word));
	memcpy(p + AGAIN, &word, sizeof(word));
	memcpy(p + BEFORE, p + AT + 2 - MATCH, MATCH);
}

/* Small blocks that repeat their start, where the third byte has other neighbours. */
static void fill_repeating(uint8_t *p, size_t nbytes, uint64_t seed)
{
	size_t start = seed % 3 == 0 ? 64 : 0;

	fill_random(p, nbytes, seed);
	memset(p, seed % 2 ? 0xff : 0, start);
	for (size_t at = start + 40 + seed % 16; at + 12 < nbytes; at += 60 + seed % 8)
		memcpy(p + at, p + start + at % 3, 12);
}

/* The word that ISA-L hashes in place of the third byte. */
static uint32_t address_word(const void *stream)
{
	return (uint32_t)((uintptr_t)stream >> 16);
}

#ifdef __x86_64__

static size_t raw_isal(struct isal_zstream *stream, uint32_t level, uint8_t *in, size_t in_nbytes,
		       uint8_t *out)
{
	static uint8_t level_buffer[ISAL_DEF_LVL2_SMALL];

	isal_deflate_stateless_init(stream);
	stream->level = level;
	stream->level_buf = level_buffer;
	stream->level_buf_size = level == 1 ? ISAL_DEF_LVL1_SMALL : ISAL_DEF_LVL2_SMALL;
	stream->hist_bits = 12;
	stream->end_of_stream = 1;
	stream->next_in = in;
	stream->avail_in = (uint32_t)in_nbytes;
	stream->next_out = out;
	stream->avail_out = MAX_OUT;
	CHECK_EQ(isal_deflate_stateless(stream), COMP_OK);
	return stream->total_out;
}

/*
 * ISA-L alone still depends on the address.  If this fails, the library has been mended:
 * codec/isal_stream.c is then needed for older versions only.
 */
static void test_isal_still_hashes_the_address(void)
{
	enum { UNIT = 1 << 16, N_UNITS = 64 };
	static uint8_t data[BLOCK + SLACK], first[MAX_OUT];
	uint8_t *memory = calloc(N_UNITS, UNIT);

	CHECK(memory != NULL);
	for (uint32_t level = 1; level <= 2; level++) {
		unsigned n_different = 0;

		for (unsigned i = 0; i + 4 < N_UNITS; i++) {
			void *here = memory + (size_t)i * UNIT,
			     *there = memory + (size_t)(i + 1) * UNIT;

			fill_for_hash(data, BLOCK, address_word(here), i);
			size_t n_first = raw_isal(there, level, data, BLOCK, first);
			size_t n = raw_isal(here, level, data, BLOCK, packed);

			if (n != n_first || memcmp(packed, first, n) != 0)
				n_different++;
		}
		CHECK(n_different > N_UNITS / 2);
	}
	free(memory);
}

/* Many places, each with a hash that ends in 15 zeros, and no two at one place. */
static void test_the_address_of_a_stream(void)
{
	static struct isal_zstream *streams[N_PLACES];

	for (unsigned i = 0; i < N_PLACES; i++) {
		streams[i] = imgc_isal_stream_create(1 + i % 2);
		CHECK(streams[i] != NULL);
		CHECK_EQ(imgc_isal_hash(address_word(streams[i])) & 0x7fff, 0);
		CHECK(i == 0 || streams[i] != streams[i - 1]);
	}
	for (unsigned i = 0; i < N_PLACES; i++)
		imgc_isal_stream_destroy(streams[i], 1 + i % 2);
}

#else

static void test_isal_still_hashes_the_address(void)
{
}

static void test_the_address_of_a_stream(void)
{
}

#endif

static void check_same_output(struct imgc_compressor *a, struct imgc_compressor *b,
			      const uint8_t *data, size_t nbytes)
{
	static uint8_t expected[MAX_OUT];
	size_t n_expected = 0, n = 0;

	CHECK_EQ(imgc_compress(a, data, nbytes, expected, MAX_OUT, &n_expected), IMGC_OK);
	CHECK_EQ(imgc_compress(b, data, nbytes, packed, MAX_OUT, &n), IMGC_OK);
	CHECK_EQ(n, n_expected);
	CHECK(memcmp(packed, expected, n) == 0);
}

/* The state at thousands of addresses gives the output of one reference. */
static void check_places(const struct imgc_codec_params *params, unsigned n_places)
{
	enum { SMALL = 512, LARGE = 8192 };
	static uint8_t data[LARGE + SLACK];
	static struct isal_zstream *held[N_PLACES];
	uint32_t level = (uint32_t)params->level;
	struct imgc_compressor *reference, *c;

	CHECK_EQ(imgc_compressor_create(params, &reference), IMGC_OK);
	for (unsigned k = 0; k < n_places; k++) {
		/* What is held back keeps the next compressor from the same place. */
		held[k] = imgc_isal_stream_create(level);
		CHECK_EQ(imgc_compressor_create(params, &c), IMGC_OK);
		fill_for_hash(data, LARGE, address_word(held[k]), k);
		check_same_output(reference, c, data, LARGE);
		fill_for_hash(data, LARGE, 0, k);
		check_same_output(reference, c, data, LARGE);
		fill_repeating(data, SMALL, k);
		check_same_output(reference, c, data, SMALL);
		imgc_compressor_destroy(c);
	}
	for (unsigned k = 0; k < n_places; k++)
		imgc_isal_stream_destroy(held[k], level);
	imgc_compressor_destroy(reference);
}

static void test_the_same_wherever_the_memory_is(void)
{
	for (unsigned i = 0; i < N_PARAMS; i++) {
		const struct imgc_codec_params *params = &all_params[i];
		bool is_zstd = params->codec == IMGC_CODEC_ZSTD;
		bool address_matters = !is_zstd && params->engine == IMGC_DEFLATE_ISAL &&
				       (params->level == 1 || params->level == 2);

		check_places(params, address_matters ? N_PLACES : 20);
	}
}

static size_t compress_once(struct imgc_codec_params params, const uint8_t *data, size_t nbytes,
			    uint8_t *out)
{
	struct imgc_compressor *c;
	size_t n = 0;

	CHECK_EQ(imgc_compressor_create(&params, &c), IMGC_OK);
	CHECK_EQ(imgc_compress(c, data, nbytes, out, MAX_OUT, &n), IMGC_OK);
	imgc_compressor_destroy(c);
	return n;
}

/* A sample that compresses well decides.  Small blocks are not sampled. */
static void test_sampled(void)
{
	static const struct {
		unsigned pattern;
		size_t nbytes;
		uint32_t engine;
		int32_t level;
	} rows[] = {
		{0, BLOCK, IMGC_DEFLATE_LIBDEFLATE, 6},
		{1, BLOCK, IMGC_DEFLATE_ISAL, 3},
		{2, BLOCK, IMGC_DEFLATE_ISAL, 3},
		{2, BLOCK / 2, IMGC_DEFLATE_ISAL, 3},
		{2, BLOCK / 2 - 512, IMGC_DEFLATE_LIBDEFLATE, 6},
	};
	static uint8_t data[BLOCK + SLACK], expected[MAX_OUT];

	for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
		struct imgc_codec_params params = {IMGC_CODEC_DEFLATE, rows[i].engine,
						   rows[i].level, 15};
		struct imgc_codec_params sampled = {IMGC_CODEC_DEFLATE, IMGC_DEFLATE_SAMPLED, 6,
						    15};

		fill(data, rows[i].nbytes, rows[i].pattern);
		size_t n = compress_once(params, data, rows[i].nbytes, expected);

		CHECK_EQ(compress_once(sampled, data, rows[i].nbytes, packed), n);
		CHECK(memcmp(packed, expected, n) == 0);
	}
}

static void test_zlib_header(void)
{
	static uint8_t data[4096 + SLACK];
	size_t n = 0;

	fill_text(data, 4096, 1);
	for (size_t i = 0; i < N_PARAMS; i++) {
		struct imgc_compressor *c;

		if (all_params[i].codec != IMGC_CODEC_ZLIB)
			continue;
		CHECK_EQ(imgc_compressor_create(&all_params[i], &c), IMGC_OK);
		CHECK_EQ(imgc_compress(c, data, 4096, packed, MAX_OUT, &n), IMGC_OK);
		CHECK_EQ(packed[0] & 15, 8);
		CHECK_EQ((packed[0] >> 4) + 8, all_params[i].window_bits);
		CHECK_EQ((packed[0] * 256 + packed[1]) % 31, 0);
		CHECK_EQ(packed[1] & 32, 0);
		imgc_compressor_destroy(c);
	}
}

static void test_refused_params(void)
{
	static const struct imgc_codec_params refused[] = {
		{IMGC_CODEC_NONE, 0, 0, 15},
		{99, 0, 0, 15},
		{IMGC_CODEC_DEFLATE, 3, 1, 15},
		{IMGC_CODEC_DEFLATE, IMGC_DEFLATE_SAMPLED, 0, 15},
		{IMGC_CODEC_DEFLATE, IMGC_DEFLATE_SAMPLED, 1, 12},
		{IMGC_CODEC_DEFLATE, IMGC_DEFLATE_ISAL, -1, 15},
		{IMGC_CODEC_DEFLATE, IMGC_DEFLATE_ISAL, 4, 15},
		{IMGC_CODEC_DEFLATE, IMGC_DEFLATE_ISAL, 1, 11},
		{IMGC_CODEC_DEFLATE, IMGC_DEFLATE_ISAL, 1, 16},
		{IMGC_CODEC_ZLIB, IMGC_DEFLATE_LIBDEFLATE, 0, 15},
		{IMGC_CODEC_ZLIB, IMGC_DEFLATE_LIBDEFLATE, 13, 15},
		{IMGC_CODEC_ZLIB, IMGC_DEFLATE_LIBDEFLATE, 6, 12},
		{IMGC_CODEC_ZSTD, 0, 23, 0},
	};
	struct imgc_compressor *c = NULL;
	struct imgc_decompressor *d = NULL;

	for (size_t i = 0; i < sizeof(refused) / sizeof(refused[0]); i++)
		CHECK_EQ(imgc_compressor_create(&refused[i], &c), IMGC_INVALID_ARGUMENT);
	CHECK(c == NULL);
	CHECK_EQ(imgc_decompressor_create(99, &d), IMGC_INVALID_ARGUMENT);
	CHECK(d == NULL);
	imgc_compressor_destroy(NULL);
	imgc_decompressor_destroy(NULL);
}

/* Decompresses from and to buffers that end at guard pages. */
static int guarded_decompress(struct imgc_decompressor *d, uint32_t codec, const uint8_t *in,
			      size_t in_nbytes, size_t out_nbytes, const uint8_t *expected,
			      size_t *used)
{
	static struct guarded from, to;

	if (!from.start) {
		from = guarded_alloc(MAX_OUT);
		to = guarded_alloc(MAX_OUT);
	}
	if (in_nbytes != 0)
		memcpy(from.end - in_nbytes, in, in_nbytes);
	int status = imgc_decompress(d, codec, from.end - in_nbytes, in_nbytes, to.end - out_nbytes,
				     out_nbytes, used);
	if (!status && expected)
		CHECK(memcmp(to.end - out_nbytes, expected, out_nbytes) == 0);
	return status;
}

/* Expects the first `n` bytes of packed to be a stream of `nbytes` bytes of data. */
static void check_stream(struct imgc_decompressor *d, uint32_t codec, size_t n, const uint8_t *data,
			 size_t nbytes)
{
	size_t used = 0, cut;

	CHECK_EQ(guarded_decompress(d, codec, packed, n, nbytes, data, &used), IMGC_OK);
	CHECK_EQ(used, n);
	CHECK_EQ(guarded_decompress(d, codec, packed, n, nbytes, data, NULL), IMGC_OK);
	/* Any bytes after the stream are ignored. */
	memset(packed + n, 0xa5, 700);
	CHECK_EQ(guarded_decompress(d, codec, packed, n + 700, nbytes, data, &used), IMGC_OK);
	CHECK_EQ(used, n);
	CHECK_EQ(guarded_decompress(d, codec, packed, n + 1, nbytes, data, &used), IMGC_OK);
	CHECK_EQ(used, n);
	/* The size must be exact. */
	used = 77;
	CHECK_EQ(guarded_decompress(d, codec, packed, n, nbytes + 1, NULL, &used), IMGC_CORRUPT);
	CHECK_EQ(guarded_decompress(d, codec, packed, n, nbytes - 1, NULL, &used), IMGC_CORRUPT);
	CHECK_EQ(guarded_decompress(d, codec, packed, n, nbytes + 512, NULL, &used), IMGC_CORRUPT);
	for (cut = 0; cut < n; cut += 1 + n / 37)
		CHECK_EQ(guarded_decompress(d, codec, packed, cut, nbytes, NULL, &used),
			 IMGC_CORRUPT);
	CHECK_EQ(guarded_decompress(d, codec, packed, n - 1, nbytes, NULL, &used), IMGC_CORRUPT);
	CHECK_EQ(used, 77);
}

/*
 * Without a checksum damage may go unnoticed, but nothing outside the buffers is used.
 */
static void check_damage(struct imgc_decompressor *d, uint32_t codec, size_t n, size_t nbytes)
{
	uint64_t state = n;

	for (unsigned round = 0; round < 200; round++) {
		size_t at = (size_t)(test_random(&state) % n);
		uint8_t bit = (uint8_t)(1u << (test_random(&state) >> 61));

		packed[at] ^= bit;
		int status = guarded_decompress(d, codec, packed, n, nbytes, NULL, NULL);
		CHECK(status == IMGC_OK || status == IMGC_CORRUPT);
		if (codec == IMGC_CODEC_ZLIB && at >= n - 4)
			CHECK_EQ(status, IMGC_CORRUPT);
		packed[at] ^= bit;
	}
	for (unsigned round = 0; round < 100; round++) {
		fill_random(packed, 512, round);
		CHECK(guarded_decompress(d, codec, packed, 512, nbytes, NULL, NULL) ==
		      IMGC_CORRUPT);
	}
}

static void test_decompressor(uint32_t variant)
{
	static uint8_t data[2 * BLOCK + SLACK];
	struct imgc_decompressor *d;
	size_t n = 0;

	CHECK_EQ(imgc_decompressor_create(variant, &d), IMGC_OK);
	CHECK_EQ(imgc_decompress(d, IMGC_CODEC_NONE, packed, 1, data, 1, NULL),
		 IMGC_INVALID_ARGUMENT);
	for (size_t i = 0; i < N_PARAMS; i++) {
		struct imgc_compressor *c;

		CHECK_EQ(imgc_compressor_create(&all_params[i], &c), IMGC_OK);
		for (size_t k = 3; k < N_SIZES; k++) {
			for (unsigned pattern = 0; pattern < N_PATTERNS; pattern++) {
				fill(data, sizes[k], pattern);
				CHECK_EQ(imgc_compress(c, data, sizes[k], packed, MAX_OUT, &n),
					 IMGC_OK);
				check_stream(d, all_params[i].codec, n, data, sizes[k]);
			}
		}
		fill_text(data, 4096, i);
		CHECK_EQ(imgc_compress(c, data, 4096, packed, MAX_OUT, &n), IMGC_OK);
		check_damage(d, all_params[i].codec, n, 4096);
		imgc_compressor_destroy(c);
	}
	imgc_decompressor_destroy(d);
}

/* Streams of zlib itself, at its levels and windows, raw as QEMU writes them. */
static void test_zlib_streams(uint32_t variant)
{
	static uint8_t data[BLOCK];
	struct imgc_decompressor *d;

	CHECK_EQ(imgc_decompressor_create(variant, &d), IMGC_OK);
	fill_text(data, BLOCK, 8);
	for (int level = 0; level <= 9; level += 3) {
		for (int bits = 9; bits <= 15; bits += 3) {
			z_stream s;

			memset(&s, 0, sizeof(s));
			CHECK_EQ(deflateInit2(&s, level, Z_DEFLATED, -bits, 9, 0), Z_OK);
			s.next_in = data;
			s.avail_in = BLOCK;
			s.next_out = packed;
			s.avail_out = MAX_OUT - 1024;
			CHECK_EQ(deflate(&s, Z_FINISH), Z_STREAM_END);
			check_stream(d, IMGC_CODEC_DEFLATE, s.total_out, data, BLOCK);
			deflateEnd(&s);
		}
	}
	imgc_decompressor_destroy(d);
}

static size_t put_frame(size_t at, const uint8_t *data, size_t nbytes)
{
	size_t n = ZSTD_compress(packed + at, MAX_OUT - at, data, nbytes, 3);

	CHECK(!ZSTD_isError(n));
	return at + n;
}

/* A frame whose header claims a window of 1 GiB and no size (RFC 8878, 3.1.1). */
static void test_zstd_claims(struct imgc_decompressor *d)
{
	static const uint8_t raw_frame[] = {0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xa0,
					    0x19, 0x00, 0x00, 'a',  'b',  'c'};
	static const uint8_t skippable[] = {0x50, 0x2a, 0x4d, 0x18, 1, 0, 0, 0, 0};
	static const uint8_t legacy[] = {0x27, 0xb5, 0x2f, 0xfd, 0, 0, 0, 0, 0, 0, 0, 0};
	/* A run of one byte, 128 KiB long: more than the block. */
	static const uint8_t bomb[] = {0x28, 0xb5, 0x2f, 0xfd, 0x00, 0x58, 0x03, 0x00, 0x10, 'x'};

	int status = guarded_decompress(d, IMGC_CODEC_ZSTD, raw_frame, sizeof(raw_frame), 3,
					(const uint8_t *)"abc", NULL);
	CHECK(status == IMGC_OK || status == IMGC_CORRUPT);
	CHECK_EQ(guarded_decompress(d, IMGC_CODEC_ZSTD, skippable, sizeof(skippable), 512, NULL,
				    NULL),
		 IMGC_CORRUPT);
	CHECK_EQ(guarded_decompress(d, IMGC_CODEC_ZSTD, legacy, sizeof(legacy), 512, NULL, NULL),
		 IMGC_CORRUPT);
	CHECK_EQ(guarded_decompress(d, IMGC_CODEC_ZSTD, bomb, sizeof(bomb), 4096, NULL, NULL),
		 IMGC_CORRUPT);
}

static void test_zstd_frames(void)
{
	static uint8_t data[BLOCK];
	struct imgc_decompressor *d;
	size_t used = 0;

	CHECK_EQ(imgc_decompressor_create(0, &d), IMGC_OK);
	fill_text(data, BLOCK, 4);
	/* Two frames.  Anything may follow the second. */
	size_t n = put_frame(put_frame(0, data, 1000), data + 1000, BLOCK - 1000);
	check_stream(d, IMGC_CODEC_ZSTD, n, data, BLOCK);
	/* A skippable frame between two is refused. */
	n = put_frame(0, data, 1000);
	memcpy(packed + n, "\x50\x2a\x4d\x18\x01\x00\x00\x00z", 9);
	n = put_frame(n + 9, data + 1000, BLOCK - 1000);
	CHECK_EQ(guarded_decompress(d, IMGC_CODEC_ZSTD, packed, n, BLOCK, NULL, &used),
		 IMGC_CORRUPT);
	test_zstd_claims(d);
	imgc_decompressor_destroy(d);
}

int main(void)
{
	test_refused_params();
	test_compressors();
	test_deterministic();
	test_isal_still_hashes_the_address();
	test_the_address_of_a_stream();
	test_the_same_wherever_the_memory_is();
	test_sampled();
	test_zlib_header();
	test_zstd_frames();
	for (unsigned i = 0; i < imgc_variant_count(IMGC_OP_INFLATE); i++) {
		uint32_t variant;

		if (!variant_usable(IMGC_OP_INFLATE, i, &variant))
			continue;
		test_decompressor(variant);
		test_zlib_streams(variant);
	}
	return 0;
}
