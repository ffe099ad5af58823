/*
 * test_reuse.c - compressed blocks that go from a source to the target as they are
 */
#include <zlib.h>

#include "tests/engine_util.h"

#define BLOCK (64u * KIB)

static const struct imgc_codec_params as_deflate = {IMGC_CODEC_DEFLATE, IMGC_DEFLATE_LIBDEFLATE, 6,
						    15};
static const struct imgc_codec_params as_zlib = {IMGC_CODEC_ZLIB, IMGC_DEFLATE_LIBDEFLATE, 9, 15};
static const struct imgc_codec_params as_zstd = {.codec = IMGC_CODEC_ZSTD, .level = 1};

/* --------------------------------------------------------------- the wrapper */

static size_t compress_with(const struct imgc_codec_params *params, const void *in, size_t nbytes,
			    uint8_t *out, size_t capacity)
{
	struct imgc_compressor *c;
	size_t out_nbytes = 0;

	CHECK_EQ(imgc_compressor_create(params, &c), IMGC_OK);
	CHECK_EQ(imgc_compress(c, in, nbytes, out, capacity, &out_nbytes), IMGC_OK);
	CHECK(out_nbytes > 0);
	imgc_compressor_destroy(c);
	return out_nbytes;
}

static void check_judge(const uint8_t *stream, size_t nbytes, const uint8_t *plain,
			size_t plain_nbytes)
{
	static uint8_t out[BLOCK];
	uLongf out_nbytes = sizeof(out);

	CHECK_EQ(uncompress(out, &out_nbytes, stream, (uLong)nbytes), Z_OK);
	CHECK_EQ(out_nbytes, plain_nbytes);
	CHECK(memcmp(out, plain, plain_nbytes) == 0);
}

static void test_rewrap(void)
{
	static uint8_t plain[BLOCK + IMGC_COMPRESS_SLACK_NBYTES], in[2 * BLOCK], back[2 * BLOCK];
	struct guarded out = guarded_alloc(2 * BLOCK);

	fill_text(plain, BLOCK, 3);
	size_t nbytes = compress_with(&as_deflate, plain, BLOCK, in, sizeof(in));
	uint8_t *end = out.end - (nbytes + 6); /* a byte too many would touch the guard */

	/* DEFLATE to zlib, which zlib reads, and back. */
	CHECK_EQ(imgc_rewrap(IMGC_CODEC_DEFLATE, IMGC_CODEC_ZLIB, in, nbytes, plain, BLOCK, end,
			     nbytes + 6),
		 nbytes + 6);
	check_judge(end, nbytes + 6, plain, BLOCK);
	CHECK_EQ(imgc_rewrap(IMGC_CODEC_ZLIB, IMGC_CODEC_DEFLATE, end, nbytes + 6, NULL, BLOCK,
			     back, nbytes),
		 nbytes);
	CHECK(memcmp(in, back, nbytes) == 0);
	/* The result must fit, and the checksum needs the content. */
	CHECK_EQ(imgc_rewrap(IMGC_CODEC_DEFLATE, IMGC_CODEC_ZLIB, in, nbytes, plain, BLOCK,
			     out.start, nbytes + 5),
		 0);
	CHECK_EQ(imgc_rewrap(IMGC_CODEC_DEFLATE, IMGC_CODEC_ZLIB, in, nbytes, NULL, BLOCK,
			     out.start, nbytes + 6),
		 0);
	CHECK_EQ(imgc_rewrap(IMGC_CODEC_ZLIB, IMGC_CODEC_DEFLATE, end, nbytes + 6, NULL, BLOCK,
			     out.start, nbytes - 1),
		 0);
	CHECK_EQ(imgc_rewrap(IMGC_CODEC_DEFLATE, IMGC_CODEC_ZLIB, in, nbytes, plain, BLOCK,
			     out.start, 3),
		 0);
	/* The same codec: the same bytes. */
	CHECK_EQ(imgc_rewrap(IMGC_CODEC_ZSTD, IMGC_CODEC_ZSTD, in, nbytes, NULL, BLOCK, out.start,
			     nbytes),
		 nbytes);
	CHECK(memcmp(in, out.start, nbytes) == 0);
	/* No wrapper makes one codec of another. */
	CHECK_EQ(imgc_rewrap(IMGC_CODEC_ZSTD, IMGC_CODEC_ZLIB, in, nbytes, plain, BLOCK, out.start,
			     BLOCK),
		 0);
	CHECK_EQ(imgc_rewrap(IMGC_CODEC_ZLIB, IMGC_CODEC_ZSTD, in, nbytes, plain, BLOCK, out.start,
			     BLOCK),
		 0);
	CHECK_EQ(imgc_rewrap(IMGC_CODEC_DEFLATE, IMGC_CODEC_DEFLATE, in, 0, plain, BLOCK, out.start,
			     BLOCK),
		 0);
	guarded_free(&out);
}

/* A zlib header that is none: CM is not 8, the window too large, FDICT, a wrong check. */
static void test_rewrap_of_bad_headers(void)
{
	static const uint8_t headers[][2] = {
		{0x79, 0x9b}, {0x88, 0x1c}, {0x78, 0xbb}, {0x78, 0x9d}};
	uint8_t in[64] = {0}, out[64];

	for (size_t i = 0; i < sizeof(headers) / sizeof(headers[0]); i++) {
		memcpy(in, headers[i], 2);
		for (unsigned to = IMGC_CODEC_DEFLATE; to <= IMGC_CODEC_ZLIB; to++)
			CHECK_EQ(imgc_rewrap(IMGC_CODEC_ZLIB, to, in, sizeof(in), NULL, BLOCK, out,
					     sizeof(out)),
				 0);
	}
	memcpy(in, "\x78\x9c", 2);
	CHECK_EQ(imgc_rewrap(IMGC_CODEC_ZLIB, IMGC_CODEC_DEFLATE, in, 7, NULL, BLOCK, out, 64), 1);
	for (size_t nbytes = 0; nbytes <= 6; nbytes++) /* a header and a checksum alone */
		for (unsigned to = IMGC_CODEC_DEFLATE; to <= IMGC_CODEC_ZLIB; to++)
			CHECK_EQ(imgc_rewrap(IMGC_CODEC_ZLIB, to, in, nbytes, NULL, BLOCK, out,
					     sizeof(out)),
				 0);
}

/* ------------------------------------------------------------------- images */

/* A disk with compressed blocks, as the engine writes one. */
struct image {
	struct disk disk;
	struct imgc_geometry geometry;
	struct imgc_placement *placements;
	struct imgc_extent *rows;
	size_t n;
	struct imgc_progress progress; /* of writing it */
};

static struct imgc_geometry geometry_of(const struct imgc_codec_params *codec,
					uint64_t guest_nbytes)
{
	struct imgc_geometry g = {
		.block_nbytes = BLOCK,
		.placing = IMGC_PLACE_APPEND,
		.stored_alignment = BLOCK,
		.compressed_alignment = 1,
		.store_incompressible = 1,
		.codec = *codec,
		.sparse_nbytes = 4096,
		.guest_nbytes = guest_nbytes,
	};

	if (codec->codec == IMGC_CODEC_ZLIB) {
		g.prefix = IMGC_PREFIX_GRAIN_MARKER;
		g.compressed_alignment = 512;
		g.store_incompressible = 0;
	}
	return g;
}

static void image_destroy(struct image *image)
{
	disk_destroy(&image->disk);
	free(image->placements);
	free(image->rows);
}

/* One conversion: from a disk, by rows, to an image. */
struct conversion {
	const struct disk *from;
	const struct imgc_extent *rows, *base;
	size_t n_rows, n_base;
	uint32_t block_nbytes;	      /* of the source */
	uint32_t target_block_nbytes; /* 0: BLOCK */
	unsigned n_threads;
	uint32_t reuse, trust, salvage;
	const struct imgc_codec_params *codec;
	uint64_t guest_nbytes;
};

static int run_conversion(const struct conversion *c, struct image *image, struct imgc_error *err)
{
	struct imgc_source_file file = {
		.file = c->from->file, .nbytes = c->from->nbytes, .block_nbytes = c->block_nbytes};
	uint32_t block = c->target_block_nbytes ? c->target_block_nbytes : BLOCK;
	size_t n = (c->guest_nbytes + block - 1) / block;
	struct imgc_job *job;

	*image = (struct image){
		.disk = disk_create(2 * c->guest_nbytes + MIB),
		.geometry = geometry_of(c->codec, c->guest_nbytes),
		.placements = calloc(n, sizeof(*image->placements)),
		.n = n,
	};
	CHECK(image->placements);
	image->geometry.reuse = c->reuse;
	image->geometry.block_nbytes = image->geometry.stored_alignment = block;
	struct imgc_job_options o = {
		.kind = IMGC_JOB_CONVERT,
		.n_threads = c->n_threads ? c->n_threads : 1,
		.window_nbytes = 256 * KIB,
		.sources = &file,
		.n_sources = 1,
		.target = image->disk.file,
		.geometry = image->geometry,
		.next_offset = BLOCK,
		.has_base = c->base != NULL,
		.salvage = c->salvage,
		.trust_blocks = c->trust,
	};
	struct imgc_batch batch = {
		.guest_end = c->guest_nbytes,
		.extents = c->rows,
		.n_extents = c->n_rows,
		.base_extents = c->base,
		.n_base_extents = c->n_base,
		.placements = image->placements,
		.n_placements = n,
	};

	use_default_variants(&o);
	int status = imgc_job_create(&o, &job, err);

	if (status)
		return status;
	status = run_batch(job, &batch, err);
	imgc_job_progress(job, &image->progress);
	imgc_job_destroy(job);
	image->rows = placed_rows(c->guest_nbytes, &image->geometry, image->placements, n);
	return status;
}

static struct image convert_image(const struct conversion *c)
{
	struct image image;
	struct imgc_error err = {0};

	CHECK_EQ(run_conversion(c, &image, &err), IMGC_OK);
	CHECK_EQ(image.progress.bytes_data + image.progress.bytes_zero, c->guest_nbytes);
	return image;
}

static struct image compress_image(const struct disk *plain, const struct imgc_codec_params *codec)
{
	struct imgc_extent row = data_row(0, plain->nbytes, 0);
	struct conversion c = {.from = plain,
			       .rows = &row,
			       .n_rows = 1,
			       .codec = codec,
			       .guest_nbytes = plain->nbytes};

	return convert_image(&c);
}

static struct conversion reusing(const struct image *source, const struct imgc_codec_params *codec)
{
	return (struct conversion){
		.from = &source->disk,
		.rows = source->rows,
		.n_rows = source->n,
		.block_nbytes = BLOCK,
		.reuse = 1,
		.codec = codec,
		.guest_nbytes = source->geometry.guest_nbytes,
	};
}

/* As QCOW2 states sizes: in sectors, so that a part of the next block may follow. */
static void round_up_rows(struct image *image)
{
	for (size_t i = 0; i < image->n; i++) {
		struct imgc_extent *row = &image->rows[i];
		uint64_t end = (row->host_offset + row->host_length + 511) / 512 * 512;

		if (row->kind > IMGC_DATA)
			row->host_length = end - row->host_offset;
	}
}

static uint64_t compressed_nbytes(const struct image *image)
{
	uint64_t nbytes = 0;

	for (size_t i = 0; i < image->n; i++)
		if (image->rows[i].kind > IMGC_DATA && image->rows[i].length == BLOCK)
			nbytes += BLOCK;
	return nbytes;
}

/* The compressed bytes of a row, without marker and zlib's wrapper. */
static const uint8_t *stream_of(const struct image *image, size_t i, size_t *nbytes)
{
	const struct imgc_extent *row = &image->rows[i];
	const uint8_t *bytes = image->disk.bytes + row->host_offset;

	*nbytes = image->placements[i].length;
	if (row->kind != IMGC_ZLIB)
		return bytes;
	*nbytes -= 12 + 6;
	return bytes + 12 + 2;
}

/* ------------------------------------------------------------- conversions */

/* Every pair: the target reads the same, whole blocks are reused byte for byte. */
static void test_pair(const struct imgc_codec_params *from, const struct imgc_codec_params *to,
		      bool trusts)
{
	struct disk plain = example_disk();
	struct image source = compress_image(&plain, from), first = {0};
	bool fits = (from->codec == IMGC_CODEC_ZSTD) == (to->codec == IMGC_CODEC_ZSTD);
	bool must_inflate = from->codec == IMGC_CODEC_DEFLATE && to->codec == IMGC_CODEC_ZLIB;
	static const unsigned threads[3] = {1, 2, 8};

	round_up_rows(&source);
	for (int i = 0; i < 3; i++) {
		struct conversion c = reusing(&source, to);

		c.n_threads = threads[i];
		c.trust = trusts;
		struct image target = convert_image(&c);
		uint64_t reused = target.progress.bytes_reused;

		check_readback(&plain, &target.disk, &target.geometry, target.placements, target.n);
		CHECK_EQ(target.progress.bytes_data, source.progress.bytes_data);
		CHECK_EQ(target.progress.bytes_trusted, trusts && !must_inflate ? reused : 0);
		if (!fits)
			CHECK_EQ(reused, 0);
		else if (from->codec != to->codec && to->codec == IMGC_CODEC_DEFLATE)
			CHECK(reused > 0); /* the noise does not fit a cluster */
		else
			CHECK_EQ(reused, compressed_nbytes(&source));
		for (size_t k = 0; k < target.n && fits && !trusts; k++) {
			size_t n = 0, expected = 0;

			if (target.rows[k].kind <= IMGC_DATA || source.rows[k].kind <= IMGC_DATA ||
			    source.rows[k].length != BLOCK)
				continue;
			const uint8_t *a = stream_of(&target, k, &n);
			const uint8_t *b = stream_of(&source, k, &expected);

			CHECK_EQ(n, expected);
			CHECK(memcmp(a, b, n) == 0);
		}
		if (i == 0) {
			first = target;
			continue;
		}
		CHECK(memcmp(first.placements, target.placements,
			     target.n * sizeof(*target.placements)) == 0);
		CHECK(memcmp(first.disk.bytes, target.disk.bytes, target.disk.nbytes) == 0);
		image_destroy(&target);
	}
	image_destroy(&first);
	image_destroy(&source);
	disk_destroy(&plain);
}

/* Nothing is reused unless the target asks for it, nor blocks of another size. */
static void test_not_reused(void)
{
	struct disk plain = example_disk();
	struct image source = compress_image(&plain, &as_zlib);
	struct conversion c = reusing(&source, &as_zlib);

	c.reuse = 0;
	struct image target = convert_image(&c);

	CHECK_EQ(target.progress.bytes_reused, 0);
	image_destroy(&target);
	c.reuse = 1;
	for (uint32_t block = BLOCK / 2; block <= BLOCK * 2; block *= 4) {
		c.target_block_nbytes = block;
		target = convert_image(&c);
		check_readback(&plain, &target.disk, &target.geometry, target.placements, target.n);
		CHECK_EQ(target.progress.bytes_reused, 0);
		image_destroy(&target);
	}

	/* A second source's blocks need not start where the target's do. */
	struct imgc_extent *rows = calloc(source.n + 1, sizeof(*rows));

	CHECK(rows);
	rows[0] = empty_row(0, 4096, IMGC_HOLE);
	for (size_t i = 0; i < source.n; i++) {
		rows[i + 1] = source.rows[i];
		rows[i + 1].guest_offset += 4096;
		rows[i + 1].flags = 0;
		if (rows[i + 1].kind > IMGC_DATA) {
			rows[i + 1].host_offset += 12;
			rows[i + 1].host_length -= 12;
		}
	}
	struct imgc_source_file file = {.file = source.disk.file,
					.nbytes = source.disk.nbytes,
					.guest_base = 4096,
					.block_nbytes = BLOCK};
	uint64_t guest_nbytes = plain.nbytes + 4096;
	size_t n = (guest_nbytes + BLOCK - 1) / BLOCK;
	struct imgc_placement *placements = calloc(n, sizeof(*placements));
	struct disk out = disk_create(3 * plain.nbytes), shifted = disk_create(guest_nbytes);
	struct imgc_job_options o = {
		.kind = IMGC_JOB_CONVERT,
		.n_threads = 2,
		.sources = &file,
		.n_sources = 1,
		.target = out.file,
		.geometry = geometry_of(&as_zlib, guest_nbytes),
	};

	CHECK(placements);
	use_default_variants(&o);
	o.geometry.reuse = 1;
	convert(&o, rows, source.n + 1, placements, n);
	memcpy(shifted.bytes + 4096, plain.bytes, plain.nbytes);
	check_readback(&shifted, &out, &o.geometry, placements, n);
	disk_destroy(&shifted);
	disk_destroy(&out);
	free(placements);
	free(rows);
	image_destroy(&source);
	disk_destroy(&plain);
}

/* Where nothing may be compressed, what cannot be reused is stored. */
static void test_reuse_only(void)
{
	struct disk plain = example_disk();

	for (int k = 0; k < 2; k++) {
		struct image source = compress_image(&plain, &as_zlib);
		struct conversion c = reusing(&source, k ? &as_zstd : &as_deflate);

		c.reuse = IMGC_REUSE_ONLY;
		struct image target = convert_image(&c);

		check_readback(&plain, &target.disk, &target.geometry, target.placements, target.n);
		for (size_t i = 0; i < target.n; i++) {
			bool fits = !k && source.rows[i].length == BLOCK &&
				    source.placements[i].length < BLOCK;

			if (source.placements[i].state == IMGC_BLOCK_COMPRESSED)
				CHECK_EQ(target.placements[i].state,
					 fits ? IMGC_BLOCK_COMPRESSED : IMGC_BLOCK_STORED);
		}
		image_destroy(&target);
		image_destroy(&source);
	}
	disk_destroy(&plain);
}

/* A part of a source's block, under another layer's data, is no block. */
static void test_parts(void)
{
	struct disk plain = disk_create(2 * BLOCK);

	fill_text(plain.bytes, plain.nbytes, 4);
	struct image source = compress_image(&plain, &as_deflate);
	struct imgc_extent rows[3] = {source.rows[0], source.rows[0], source.rows[1]};
	struct conversion c = reusing(&source, &as_deflate);

	rows[0].length = 4096;
	rows[1] = empty_row(4096, BLOCK - 4096, IMGC_ZERO);
	memset(plain.bytes + 4096, 0, BLOCK - 4096);
	c.rows = rows;
	c.n_rows = 3;
	for (c.trust = 0; c.trust < 2; c.trust++) {
		struct image target = convert_image(&c);

		check_readback(&plain, &target.disk, &target.geometry, target.placements, target.n);
		CHECK_EQ(target.progress.bytes_reused, BLOCK);
		image_destroy(&target);
	}
	image_destroy(&source);
	disk_destroy(&plain);
}

/* Zeros in a compressed block are found, unless blocks are trusted. */
static void test_zeros(void)
{
	struct disk plain = disk_create(2 * BLOCK);
	struct image source = {0};
	struct imgc_extent row = data_row(0, plain.nbytes, 0);
	struct imgc_job_options o;
	struct imgc_source_file file;

	fill_text(plain.bytes, BLOCK, 5);
	source.disk = disk_create(MIB);
	source.n = 2;
	source.placements = calloc(2, sizeof(*source.placements));
	CHECK(source.placements);
	o = convert_options(&plain, &source.disk, &file, 1);
	o.geometry = source.geometry = geometry_of(&as_deflate, plain.nbytes);
	o.geometry.zero_policy = IMGC_ZERO_STORE;
	convert(&o, &row, 1, source.placements, 2);
	source.rows = placed_rows(plain.nbytes, &source.geometry, source.placements, 2);
	CHECK_EQ(source.rows[1].kind, IMGC_DEFLATE);
	struct conversion c = reusing(&source, &as_deflate);

	for (c.trust = 0; c.trust < 2; c.trust++) {
		struct image target = convert_image(&c);

		check_readback(&plain, &target.disk, &target.geometry, target.placements, target.n);
		CHECK_EQ(target.placements[1].state,
			 c.trust ? IMGC_BLOCK_COMPRESSED : IMGC_BLOCK_ABSENT);
		CHECK_EQ(target.progress.bytes_reused, (c.trust + 1) * BLOCK);
		image_destroy(&target);
	}
	image_destroy(&source);
	disk_destroy(&plain);
}

/* Blocks of the base are left out, and the others reused. */
static void test_base(void)
{
	struct disk plain = disk_create(2 * BLOCK);

	fill_text(plain.bytes, plain.nbytes, 6);
	struct image source = compress_image(&plain, &as_zlib);
	struct imgc_extent base[2] = {source.rows[0], empty_row(BLOCK, BLOCK, IMGC_HOLE)};
	struct conversion c = reusing(&source, &as_deflate);
	struct imgc_error err = {0};

	c.base = base;
	c.n_base = 2;
	struct image target = convert_image(&c);

	CHECK_EQ(target.placements[0].state, IMGC_BLOCK_ABSENT);
	CHECK_EQ(target.placements[1].state, IMGC_BLOCK_COMPRESSED);
	CHECK_EQ(target.progress.bytes_reused, BLOCK);
	image_destroy(&target);
	/* To be compared, a block must be decompressed. */
	c.trust = 1;
	CHECK_EQ(run_conversion(&c, &target, &err), IMGC_INVALID_ARGUMENT);
	CHECK(strcmp(err.op, "trust_blocks") == 0);
	image_destroy(&target);
	image_destroy(&source);
	disk_destroy(&plain);
}

/* -------------------------------------------------------------- bad blocks */

/* What becomes of a source whose second block has been tampered with. */
static int convert_damaged(const struct image *source, const struct imgc_codec_params *to,
			   uint32_t trust, uint32_t salvage, struct imgc_progress *progress)
{
	struct conversion c = reusing(source, to);
	struct imgc_error err = {0};
	struct image target;

	c.trust = trust;
	c.salvage = salvage;
	int status = run_conversion(&c, &target, &err);

	*progress = target.progress;
	if (status)
		CHECK_EQ(err.offset, source->rows[1].host_offset);
	image_destroy(&target);
	return status;
}

static void test_damaged(void)
{
	struct disk plain = disk_create(4 * BLOCK);
	struct imgc_progress progress;

	fill_text(plain.bytes, plain.nbytes, 7);
	struct image source = compress_image(&plain, &as_zlib);
	uint8_t *grain = source.disk.bytes + source.rows[1].host_offset;
	uint32_t nbytes = source.placements[1].length;
	/* Header: CM, FDICT; the middle of the stream; Adler-32. */
	const struct {
		uint32_t at;
		uint8_t value;
		bool is_header;
	} flips[] = {
		{12, 0x01, true},
		{13, 0x20, true},
		{nbytes / 2, 0x10, false},
		{nbytes - 1, 0x01, false},
	};

	for (size_t i = 0; i < sizeof(flips) / sizeof(flips[0]); i++) {
		grain[flips[i].at] ^= flips[i].value;
		for (int k = 0; k < 2; k++) {
			const struct imgc_codec_params *to = k ? &as_zlib : &as_deflate;

			CHECK_EQ(convert_damaged(&source, to, 0, 0, &progress), IMGC_CORRUPT);
			/* Only a header is looked at without decompressing. */
			CHECK_EQ(convert_damaged(&source, to, 1, 0, &progress),
				 flips[i].is_header ? IMGC_CORRUPT : IMGC_OK);
			/* The others are saved, and still reused. */
			CHECK_EQ(convert_damaged(&source, to, 0, 1, &progress), IMGC_OK);
			CHECK_EQ(progress.bytes_reused, 3 * BLOCK);
		}
		grain[flips[i].at] ^= flips[i].value;
	}
	/* A marker of another place, or that claims more than there is. */
	grain[0] ^= 1;
	CHECK_EQ(convert_damaged(&source, &as_zlib, 1, 0, &progress), IMGC_BAD_GRAIN_MARKER);
	grain[0] ^= 1;
	grain[10] = 0x7f;
	CHECK_EQ(convert_damaged(&source, &as_zlib, 1, 0, &progress), IMGC_BAD_GRAIN_MARKER);
	image_destroy(&source);
	disk_destroy(&plain);
}

/* Bytes after the stream do not go to the target, where the stream's end is known. */
static void test_bytes_after_the_stream(void)
{
	struct disk plain = disk_create(2 * BLOCK);

	fill_text(plain.bytes, plain.nbytes, 8);
	struct image source = compress_image(&plain, &as_zlib);
	uint32_t nbytes = source.placements[1].length;
	uint8_t *grain = source.disk.bytes + source.rows[1].host_offset;

	memset(grain + nbytes, 0xee, 100);
	grain[8] = (uint8_t)(nbytes - 12 + 100);
	grain[9] = (uint8_t)((nbytes - 12 + 100) >> 8);
	grain[10] = (uint8_t)((nbytes - 12 + 100) >> 16);
	source.rows[1].host_length = nbytes + 100;
	for (int k = 0; k < 2; k++) {
		struct conversion c = reusing(&source, k ? &as_zlib : &as_deflate);

		for (c.trust = 0; c.trust < 2; c.trust++) {
			struct image target = convert_image(&c);
			uint32_t expected = nbytes - (k ? 0 : 12 + 6) + (c.trust ? 100 : 0);

			check_readback(&plain, &target.disk, &target.geometry, target.placements,
				       target.n);
			CHECK_EQ(target.placements[1].length, expected);
			image_destroy(&target);
		}
	}
	/* Without a marker a zlib stream's end is found by decompressing it. */
	for (size_t i = 0; i < 2; i++) {
		source.rows[i].flags = 0;
		source.rows[i].host_offset += 12;
		source.rows[i].host_length -= 12;
	}
	struct conversion c = reusing(&source, &as_zlib);

	c.trust = 1;
	struct image target = convert_image(&c);

	CHECK_EQ(target.progress.bytes_reused, 2 * BLOCK);
	CHECK_EQ(target.progress.bytes_trusted, 0);
	CHECK_EQ(target.placements[1].length, nbytes);
	image_destroy(&target);
	image_destroy(&source);
	disk_destroy(&plain);
}

/* A stream that is longer than one of our own may be is compressed again. */
static void test_long_streams(void)
{
	struct disk plain = disk_create(BLOCK);
	struct image source = {.disk = disk_create(MIB), .n = 1};
	uint8_t *p = source.disk.bytes + 4096 + 12;

	fill_text(plain.bytes, plain.nbytes, 9);
	/* Stored blocks of 256 bytes, each with 5 bytes around. */
	memcpy(p, "\x78\x01", 2);
	p += 2;
	for (size_t at = 0; at < BLOCK; at += 256) {
		static const uint8_t head[5] = {0, 0x00, 0x01, 0xff, 0xfe};

		memcpy(p, head, 5);
		p[0] = at + 256 == BLOCK;
		memcpy(p + 5, plain.bytes + at, 256);
		p += 261;
	}
	uLong adler = adler32(1, plain.bytes, BLOCK);

	for (int i = 0; i < 4; i++)
		*p++ = (uint8_t)(adler >> (24 - 8 * i));
	uint32_t nbytes = (uint32_t)(p - source.disk.bytes - 4096);
	uint32_t size = nbytes - 12;

	memcpy(source.disk.bytes + 4096 + 8, &size, 4);
	source.geometry = geometry_of(&as_zlib, BLOCK);
	source.rows = calloc(1, sizeof(*source.rows));
	CHECK(source.rows);
	source.rows[0] = (struct imgc_extent){
		0, BLOCK, 4096, nbytes, 0, IMGC_ZLIB, IMGC_EXTENT_GRAIN_MARKER};
	for (unsigned k = 0; k < 4; k++) {
		struct conversion c = reusing(&source, k & 1 ? &as_zlib : &as_deflate);

		c.trust = k >> 1;
		struct image target = convert_image(&c);

		check_readback(&plain, &target.disk, &target.geometry, target.placements, target.n);
		CHECK_EQ(target.progress.bytes_reused, 0);
		CHECK(target.placements[0].length < BLOCK);
		image_destroy(&target);
	}
	image_destroy(&source);
	disk_destroy(&plain);
}

static void test_refused_options(void)
{
	struct disk plain = disk_create(BLOCK);
	struct imgc_source_file file;
	struct imgc_job_options o = convert_options(&plain, &plain, &file, 1);
	struct imgc_error err = {0};
	struct imgc_job *job;

	o.geometry.placing = IMGC_PLACE_APPEND;
	o.geometry.reuse = 1; /* without a codec */
	CHECK_EQ(imgc_job_create(&o, &job, &err), IMGC_INVALID_ARGUMENT);
	CHECK(strcmp(err.op, "geometry") == 0);
	o.geometry.codec = as_zstd;
	o.trust_blocks = 1;
	o.salvage = 1;
	CHECK_EQ(imgc_job_create(&o, &job, &err), IMGC_INVALID_ARGUMENT);
	CHECK(strcmp(err.op, "trust_blocks") == 0);
	disk_destroy(&plain);
}

int main(void)
{
	const struct imgc_codec_params *codecs[3] = {&as_deflate, &as_zlib, &as_zstd};

	test_rewrap();
	test_rewrap_of_bad_headers();
	for (int from = 0; from < 3; from++)
		for (int to = 0; to < 3; to++)
			for (int trusts = 0; trusts < 2; trusts++)
				test_pair(codecs[from], codecs[to], trusts);
	test_not_reused();
	test_reuse_only();
	test_parts();
	test_zeros();
	test_base();
	test_damaged();
	test_bytes_after_the_stream();
	test_long_streams();
	test_refused_options();
	return 0;
}
