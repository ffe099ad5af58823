/*
 * test_disk.c - random access: tables, blocks, many threads, and what is refused
 */
#include <pthread.h>
#include <stdatomic.h>
#include <unistd.h>

#include "common/checked.h"
#include "engine/disk.h"
#include "tests/engine_util.h"

#define BLOCK (64u * KIB)
#define SPAN (256u * KIB)
#define N_THREADS 6

/* A disk, an image of it in memory, and all its rows. */
struct image {
	struct disk plain, stored;
	struct imgc_source_file file;
	struct imgc_extent *rows;
	size_t n_rows;
};

static struct image image_create(unsigned codec, unsigned prefix)
{
	struct image image = {.plain = example_disk(), .stored = disk_create(8 * MIB)};
	struct imgc_source_file source;
	struct imgc_job_options o = convert_options(&image.plain, &image.stored, &source, 2);

	o.geometry.placing = IMGC_PLACE_APPEND;
	o.geometry.prefix = prefix;
	o.geometry.codec = (struct imgc_codec_params){
		.codec = codec,
		.engine = IMGC_DEFLATE_LIBDEFLATE,
		.level = codec == IMGC_CODEC_NONE ? 0 : 1,
		.window_bits = 15,
	};
	/* As for VMDK: all blocks are compressed. */
	o.geometry.store_incompressible = prefix == IMGC_PREFIX_NONE;
	image.n_rows = (image.plain.nbytes + BLOCK - 1) / BLOCK;
	struct imgc_placement *placements = calloc(image.n_rows, sizeof(*placements));
	struct imgc_extent all = data_row(0, image.plain.nbytes, 0);

	CHECK(placements);
	convert(&o, &all, 1, placements, image.n_rows);
	image.rows = placed_rows(image.plain.nbytes, &o.geometry, placements, image.n_rows);
	/* A bound that is far from exact, as in a VMDK. */
	for (size_t i = 0; prefix != IMGC_PREFIX_NONE && i < image.n_rows; i++) {
		struct imgc_extent *row = &image.rows[i];

		if (row->kind > IMGC_DATA)
			row->host_length = imgc_min_u64(2 * BLOCK + SECTOR_NBYTES,
							image.stored.nbytes - row->host_offset);
	}
	free(placements);
	image.file = (struct imgc_source_file){
		.file = image.stored.file, .nbytes = image.stored.nbytes, .block_nbytes = BLOCK};
	return image;
}

static void image_destroy(struct image *image)
{
	free(image->rows);
	disk_destroy(&image->plain);
	disk_destroy(&image->stored);
}

static struct imgc_disk *open_image(const struct image *image, uint64_t cache_nbytes)
{
	struct imgc_disk_options options = {.sources = &image->file,
					    .n_sources = 1,
					    .guest_nbytes = image->plain.nbytes,
					    .span_nbytes = SPAN,
					    .cache_nbytes = cache_nbytes};
	struct imgc_disk *disk = NULL;
	struct imgc_error err = {0};

	CHECK_EQ(imgc_variant_select(IMGC_OP_INFLATE, NULL, &options.inflate_variant),
		 IMGC_SELECT_OK);
	CHECK_EQ(imgc_variant_select(IMGC_OP_IO, NULL, &options.io_variant), IMGC_SELECT_OK);
	CHECK_EQ(imgc_disk_create(&options, &disk, &err), IMGC_OK);
	return disk;
}

/* The rows of [start, end); returns their number. */
static size_t clip_rows(const struct image *image, uint64_t start, uint64_t end,
			struct imgc_extent *out)
{
	size_t n = 0;

	for (size_t i = 0; i < image->n_rows; i++) {
		struct imgc_extent row = image->rows[i];
		uint64_t row_end = row.guest_offset + row.length;
		uint64_t before = row.guest_offset < start ? start - row.guest_offset : 0;

		if (row_end <= start || row.guest_offset >= end)
			continue;
		row.guest_offset += before;
		row.length = imgc_min_u64(row_end, end) - row.guest_offset;
		if (row.kind == IMGC_DATA) {
			row.host_offset += before;
			row.host_length = row.length;
		}
		out[n++] = row;
	}
	return n;
}

static struct imgc_table *add_table(const struct image *image, struct imgc_disk *disk,
				    const struct imgc_disk_rest *rest)
{
	struct imgc_extent rows[SPAN / BLOCK];
	struct imgc_table *table = NULL;
	struct imgc_error err = {0};
	uint64_t start, end;

	imgc_disk_span(disk, rest->offset, &start, &end);
	size_t n = clip_rows(image, start, end, rows);

	CHECK_EQ(imgc_disk_add(disk, start, end, rest->generation, rows, n, &table, &err), IMGC_OK);
	return table;
}

/* Reads a range as the binding does. */
static int read_range(const struct image *image, struct imgc_disk *disk, uint64_t offset,
		      uint8_t *out, uint64_t length, struct imgc_error *err)
{
	struct imgc_disk_rest rest = {offset, length, 0};
	struct imgc_table *table = NULL;
	unsigned flags = length <= 64 * KIB ? IMGC_DISK_NO_WAIT : 0;
	int status;

	for (;;) {
		uint8_t *at = out + (rest.offset - offset);

		status = imgc_disk_read(disk, table, rest.offset, at, rest.length, flags, &rest,
					err);
		flags |= IMGC_DISK_GOES_ON;
		if (status == IMGC_WOULD_WAIT)
			flags = IMGC_DISK_GOES_ON;
		if (status != IMGC_MISSING && status != IMGC_WOULD_WAIT)
			break;
		if (status == IMGC_MISSING) {
			if (table)
				imgc_disk_drop(disk, table);
			table = add_table(image, disk, &rest);
		}
	}
	if (table)
		imgc_disk_drop(disk, table);
	return status;
}

static int gather_ranges(const struct image *image, struct imgc_disk *disk,
			 const struct imgc_disk_request *requests, size_t n, unsigned n_threads,
			 struct imgc_error *err)
{
	struct imgc_disk_rest rest;
	struct imgc_table *table = NULL;
	struct imgc_gather *gather = NULL;
	int status = imgc_gather_create(disk, requests, n, &gather, err);

	while (!status || status == IMGC_MISSING || status == IMGC_UNFINISHED) {
		status = imgc_gather_run(gather, table, n_threads, &rest, err);
		if (status <= 0)
			break;
		if (status == IMGC_MISSING) {
			if (table)
				imgc_disk_drop(disk, table);
			table = add_table(image, disk, &rest);
		}
	}
	if (table)
		imgc_disk_drop(disk, table);
	imgc_gather_destroy(gather);
	return status;
}

/* -------------------------------------------------------------------- reads */

static void check_range(const struct image *image, struct imgc_disk *disk, uint64_t offset,
			uint64_t length)
{
	struct imgc_error err = {0};
	uint8_t *out = malloc(length + 2);

	CHECK(out);
	memset(out, 0xee, length + 2);
	CHECK_EQ(read_range(image, disk, offset, out + 1, length, &err), IMGC_OK);
	CHECK(memcmp(out + 1, image->plain.bytes + offset, length) == 0);
	CHECK(out[0] == 0xee && out[length + 1] == 0xee);
	free(out);
}

static void test_ranges(const struct image *image, uint64_t cache_nbytes)
{
	struct imgc_disk *disk = open_image(image, cache_nbytes);
	uint64_t state = 7, nbytes = image->plain.nbytes;
	struct imgc_cache_stats stats;

	check_range(image, disk, 0, nbytes);
	for (int i = 0; i < 300; i++) {
		uint64_t offset = test_random(&state) % nbytes;
		uint64_t most = i % 3 ? 5000 : 600 * KIB;

		check_range(image, disk, offset,
			    imgc_min_u64(nbytes - offset, test_random(&state) % most));
	}
	check_range(image, disk, nbytes, 0);
	imgc_disk_stats(disk, &stats);
	CHECK(stats.nbytes <= cache_nbytes);
	CHECK(cache_nbytes < MIB || stats.n_hits > stats.n_misses);
	imgc_disk_destroy(disk);
}

static void test_gather(const struct image *image, uint64_t cache_nbytes, unsigned n_threads)
{
	enum { N = 400 };
	struct imgc_disk *disk = open_image(image, cache_nbytes);
	struct imgc_disk_request requests[N];
	struct imgc_error err = {0};
	uint64_t state = 11, nbytes = image->plain.nbytes;
	uint8_t *out = malloc(N * 5000 + nbytes), *at = out;

	CHECK(out);
	for (size_t i = 0; i < N; i++) {
		uint64_t offset = test_random(&state) % nbytes;
		uint64_t length = imgc_min_u64(nbytes - offset, test_random(&state) % 5000);

		if (i == N / 2) {
			offset = 0;
			length = nbytes;
		}
		requests[i] = (struct imgc_disk_request){offset, at, length};
		at += length;
	}
	CHECK_EQ(gather_ranges(image, disk, requests, N, n_threads, &err), IMGC_OK);
	for (size_t i = 0; i < N; i++)
		CHECK(memcmp(requests[i].buffer, image->plain.bytes + requests[i].offset,
			     requests[i].length) == 0);
	CHECK_EQ(gather_ranges(image, disk, NULL, 0, n_threads, &err), IMGC_OK);
	free(out);
	imgc_disk_destroy(disk);
}

static void test_all_reads(unsigned codec, unsigned prefix)
{
	static const uint64_t sizes[] = {0, 1, 100 * KIB, 32 * MIB};
	struct image image = image_create(codec, prefix);

	for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
		test_ranges(&image, sizes[i]);
		test_gather(&image, sizes[i], 1);
		test_gather(&image, sizes[i], 4);
	}
	image_destroy(&image);
}

/* A round is bounded, so that signals are handled: long ranges take several calls. */
static void test_rounds(void)
{
	struct imgc_disk_options options = {.guest_nbytes = 200 * MIB, .span_nbytes = 256 * MIB};
	struct imgc_extent hole = empty_row(0, 200 * MIB, IMGC_HOLE);
	struct imgc_disk_rest rest;
	struct imgc_table *table;
	struct imgc_gather *gather;
	struct imgc_error err = {0};
	struct imgc_disk *disk;
	uint8_t *out = malloc(200 * MIB);
	struct imgc_disk_request request = {0, out, 200 * MIB};
	int status, n_calls = 0;

	CHECK(out);
	CHECK_EQ(imgc_disk_create(&options, &disk, &err), IMGC_OK);
	CHECK_EQ(imgc_disk_add(disk, 0, 200 * MIB, 0, &hole, 1, &table, &err), IMGC_OK);
	CHECK_EQ(imgc_gather_create(disk, &request, 1, &gather, &err), IMGC_OK);
	do {
		status = imgc_gather_run(gather, table, 2, &rest, &err);
		n_calls++;
	} while (status == IMGC_UNFINISHED);
	CHECK_EQ(status, IMGC_OK);
	CHECK(n_calls > 2);
	CHECK(out[0] == 0 && imgc_is_zero(0, out, 200 * MIB));
	imgc_gather_destroy(gather);
	imgc_disk_drop(disk, table);
	imgc_disk_destroy(disk);
	free(out);
}

/* ------------------------------------------------------- tables and blocks */

static void test_what_is_refused(void)
{
	struct image image = image_create(IMGC_CODEC_NONE, IMGC_PREFIX_NONE);
	struct imgc_disk *disk = open_image(&image, MIB);
	struct imgc_extent rows[SPAN / BLOCK];
	struct imgc_table *table = NULL;
	struct imgc_error err = {0};
	struct imgc_disk_rest rest;
	struct imgc_gather *gather;
	uint8_t byte;
	uint64_t nbytes = image.plain.nbytes;
	size_t n = clip_rows(&image, 0, SPAN, rows);

	CHECK_EQ(imgc_disk_add(disk, 0, SPAN, 0, rows, n - 1, &table, &err), IMGC_OUT_OF_RANGE);
	rows[0].host_offset = image.stored.nbytes;
	CHECK_EQ(imgc_disk_add(disk, 0, SPAN, 0, rows, n, &table, &err), IMGC_OUT_OF_RANGE);
	CHECK_EQ(imgc_disk_add(disk, nbytes, nbytes, 0, rows, 0, &table, &err), IMGC_OUT_OF_RANGE);
	CHECK_EQ(imgc_disk_add(disk, 0, nbytes + 512, 0, rows, n, &table, &err), IMGC_OUT_OF_RANGE);
	CHECK(!table);
	CHECK_EQ(imgc_disk_read(disk, NULL, nbytes, &byte, 1, 0, &rest, &err), IMGC_OUT_OF_RANGE);
	CHECK_EQ(imgc_disk_read(disk, NULL, UINT64_MAX, &byte, 1, 0, &rest, &err),
		 IMGC_OUT_OF_RANGE);
	struct imgc_disk_request request = {1, &byte, nbytes};

	CHECK_EQ(imgc_gather_create(disk, &request, 1, &gather, &err), IMGC_OUT_OF_RANGE);
	imgc_disk_destroy(disk);
	struct imgc_disk_options options = {.span_nbytes = 3 * 512};

	CHECK_EQ(imgc_disk_create(&options, &disk, &err), IMGC_INVALID_ARGUMENT);
	options = (struct imgc_disk_options){.guest_nbytes = UINT64_C(1) << 63, .span_nbytes = 512};
	CHECK_EQ(imgc_disk_create(&options, &disk, &err), IMGC_INVALID_ARGUMENT);
	image_destroy(&image);
}

static void test_forgetting(void)
{
	struct image image = image_create(IMGC_CODEC_ZLIB, IMGC_PREFIX_NONE);
	struct imgc_disk *disk = open_image(&image, 32 * MIB);
	struct imgc_disk_rest rest = {0};
	struct imgc_error err = {0};
	struct imgc_cache_stats stats;
	uint8_t byte;

	check_range(&image, disk, 0, 300);
	imgc_disk_stats(disk, &stats);
	CHECK_EQ(stats.n_entries, 2); /* a table and a block */
	imgc_disk_forget(disk, 0, image.plain.nbytes);
	imgc_disk_stats(disk, &stats);
	CHECK_EQ(stats.n_entries + stats.nbytes, 0);
	CHECK_EQ(imgc_disk_read(disk, NULL, 0, &byte, 1, 0, &rest, &err), IMGC_MISSING);
	/* What was read before is forgotten too, but its reader has it. */
	imgc_disk_forget(disk, 0, image.plain.nbytes);
	struct imgc_table *table = add_table(&image, disk, &rest);

	CHECK(!imgc_disk_find(disk, 0, &rest.generation));
	CHECK_EQ(imgc_disk_read(disk, table, 0, &byte, 1, 0, &rest, &err), IMGC_OK);
	CHECK_EQ(byte, image.plain.bytes[0]);
	imgc_disk_drop(disk, table);
	imgc_disk_destroy(disk);
	image_destroy(&image);
}

/* The rows of a part, when those of the whole table cannot be had, are not kept. */
static void test_a_part_of_a_table(void)
{
	struct image image = image_create(IMGC_CODEC_NONE, IMGC_PREFIX_NONE);
	struct imgc_disk *disk = open_image(&image, MIB);
	struct imgc_extent row = image.rows[0];
	struct imgc_disk_rest rest = {0};
	struct imgc_table *table;
	struct imgc_error err = {0};
	uint8_t out[1024];

	row.length = row.host_length = 512;
	CHECK_EQ(imgc_disk_add(disk, 0, 512, 0, &row, 1, &table, &err), IMGC_OK);
	CHECK(!imgc_disk_find(disk, 0, &rest.generation));
	CHECK_EQ(imgc_disk_read(disk, table, 100, out, 1000, 0, &rest, &err), IMGC_MISSING);
	CHECK_EQ(rest.offset, 512);
	CHECK_EQ(rest.length, 588);
	CHECK(memcmp(out, image.plain.bytes + 100, 412) == 0);
	imgc_disk_drop(disk, table);
	imgc_disk_destroy(disk);
	image_destroy(&image);
}

static void test_what_does_not_wait(void)
{
	struct image image = image_create(IMGC_CODEC_ZLIB, IMGC_PREFIX_NONE);
	struct imgc_disk *disk = open_image(&image, 32 * MIB);
	struct imgc_disk_rest rest = {0};
	struct imgc_error err = {0};
	uint8_t out[100];

	imgc_disk_drop(disk, add_table(&image, disk, &rest));
	CHECK_EQ(imgc_disk_read(disk, NULL, 5, out, 100, IMGC_DISK_NO_WAIT, &rest, &err),
		 IMGC_WOULD_WAIT);
	CHECK_EQ(rest.offset, 5);
	CHECK_EQ(rest.length, 100);
	check_range(&image, disk, 5, 1);
	CHECK_EQ(imgc_disk_read(disk, NULL, 5, out, 100, IMGC_DISK_NO_WAIT, &rest, &err), IMGC_OK);
	CHECK(memcmp(out, image.plain.bytes + 5, 100) == 0);
	imgc_disk_destroy(disk);
	image_destroy(&image);
}

/* A file in memory that counts what it will need, and is slow from some offsets on. */
struct watched_file {
	struct imgc_file base;
	struct imgc_file *inner;
	uint64_t needed_nbytes, lowest, highest;
	uint64_t slow[2]; /* reads that start there take 2 and 20 ms */
};

static int watched_read(struct imgc_file *base, struct imgc_io_context *ctx,
			const struct imgc_io_request *requests, size_t n, struct imgc_error *err)
{
	struct watched_file *file = (struct watched_file *)base;

	if (requests[0].offset == file->slow[0])
		usleep(2000);
	if (requests[0].offset == file->slow[1])
		usleep(20000);
	return imgc_file_read(file->inner, ctx, requests, n, err);
}

static void watched_need(struct imgc_file *base, uint64_t offset, uint64_t length)
{
	struct watched_file *file = (struct watched_file *)base;

	file->needed_nbytes += length;
	file->lowest = imgc_min_u64(file->lowest, offset);
	file->highest = imgc_max_u64(file->highest, offset + length);
}

static const struct imgc_file_ops watched_ops = {.read = watched_read, .will_need = watched_need};

/* Another thread's later error, which is found before or after, does not count. */
static void test_the_first_error(void)
{
	for (int order = 0; order < 2; order++) {
		struct image image = image_create(IMGC_CODEC_ZLIB, IMGC_PREFIX_NONE);
		struct watched_file file = {.base.ops = &watched_ops, .inner = image.stored.file};
		struct imgc_disk_request request = {0, malloc(image.plain.nbytes),
						    image.plain.nbytes};
		struct imgc_error err = {0};

		/* The first rows of two groups. */
		file.slow[order] = image.rows[0].host_offset;
		file.slow[!order] = image.rows[8].host_offset;
		image.file.file = &file.base;
		struct imgc_disk *disk = open_image(&image, 32 * MIB);

		CHECK(request.buffer && image.rows[8].kind == IMGC_ZLIB);
		memset(image.stored.bytes + image.rows[0].host_offset, 0xff, 32);
		memset(image.stored.bytes + image.rows[8].host_offset, 0xff, 32);
		CHECK_EQ(gather_ranges(&image, disk, &request, 1, 2, &err), IMGC_CORRUPT);
		CHECK_EQ(err.offset, image.rows[0].host_offset);
		free(request.buffer);
		imgc_disk_destroy(disk);
		image_destroy(&image);
	}
}

/* A broken block is an error each time, and leaves nothing behind. */
static void test_broken_blocks(unsigned codec, unsigned prefix)
{
	struct image image = image_create(codec, prefix);
	struct imgc_disk *disk = open_image(&image, 32 * MIB);
	struct imgc_extent *row = &image.rows[2];
	struct imgc_disk_request request = {0, malloc(image.plain.nbytes), image.plain.nbytes};
	uint8_t *stored = image.stored.bytes + row->host_offset, kept[32], out[10];
	struct imgc_cache_stats before, after;

	CHECK(request.buffer && row->kind > IMGC_DATA);
	check_range(&image, disk, 0, 10);
	imgc_disk_stats(disk, &before);
	memcpy(kept, stored, sizeof(kept));
	memset(stored, 0xff, sizeof(kept));
	for (int i = 0; i < 3; i++) {
		struct imgc_error err = {0};
		int status = read_range(&image, disk, 2 * BLOCK + 3, out, 10, &err);

		CHECK_EQ(status, prefix ? IMGC_BAD_GRAIN_MARKER : IMGC_CORRUPT);
		CHECK_EQ(err.offset, row->host_offset);
		CHECK_EQ(err.source, 0);
		for (unsigned n_threads = 1; n_threads < 4; n_threads++)
			CHECK_EQ(gather_ranges(&image, disk, &request, 1, n_threads, &err), status);
		CHECK_EQ(err.offset, row->host_offset);
	}
	memcpy(stored, kept, sizeof(kept));
	imgc_disk_stats(disk, &after);
	/* The gather has added the tables of the disk, and no block that it read whole. */
	CHECK(after.n_entries <= before.n_entries + image.plain.nbytes / SPAN + 2);
	check_range(&image, disk, 2 * BLOCK + 3, 10);
	free(request.buffer);
	imgc_disk_destroy(disk);
	image_destroy(&image);
}

/* A block that is kept does not hide that another place refers to it wrongly. */
static void test_a_marker_of_another_grain(void)
{
	struct image image = image_create(IMGC_CODEC_ZLIB, IMGC_PREFIX_GRAIN_MARKER);
	struct imgc_disk *disk = open_image(&image, 32 * MIB);
	struct imgc_error err = {0};
	uint8_t out[10];

	image.rows[1].host_offset = image.rows[0].host_offset;
	image.rows[1].host_length = image.rows[0].host_length;
	check_range(&image, disk, 0, 10);
	CHECK_EQ(read_range(&image, disk, BLOCK, out, 10, &err), IMGC_BAD_GRAIN_MARKER);
	imgc_disk_destroy(disk);
	image_destroy(&image);
}

/* The system has in memory what was just written, unless its file system cannot tell. */
static void test_a_file_of_the_host(void)
{
	struct image image = image_create(IMGC_CODEC_ZLIB, IMGC_PREFIX_NONE);
	char name[] = "/tmp/imgc_test_disk_XXXXXX";
	int fd = mkstemp(name);
	struct imgc_error err = {0};

	CHECK(fd >= 0 && unlink(name) == 0);
	CHECK_EQ(write(fd, image.stored.bytes, image.stored.nbytes), image.stored.nbytes);
	CHECK_EQ(imgc_file_open_fd(fd, &image.file.file, &err), IMGC_OK);
	test_ranges(&image, 32 * MIB);
	test_gather(&image, 32 * MIB, 3);
	uint8_t out[100];
	uint64_t got = imgc_file_read_now(image.file.file, 10, out, sizeof(out));

	CHECK(got == 0 || (got == 100 && memcmp(out, image.stored.bytes + 10, 100) == 0));
	CHECK_EQ(imgc_file_read_now(image.file.file, UINT64_MAX, out, 1), 0);
	CHECK_EQ(imgc_file_read_now(image.file.file, image.stored.nbytes, out, 1), 0);
	imgc_file_will_need(image.file.file, UINT64_MAX, 1);
	/* The file has become shorter. */
	struct imgc_disk *disk = open_image(&image, 0);

	CHECK_EQ(ftruncate(fd, 100), 0);
	CHECK_EQ(read_range(&image, disk, 2 * BLOCK, out, 100, &err), IMGC_PAST_END);
	imgc_disk_destroy(disk);
	imgc_file_close(image.file.file);
	close(fd);
	image_destroy(&image);
}

/* -------------------------------------------------------------- read ahead */

static void read_pattern(const struct image *image, struct watched_file *file, uint64_t first,
			 uint64_t stride, int n)
{
	struct imgc_disk *disk = open_image(image, 32 * MIB);

	check_range(image, disk, 0, image->plain.nbytes); /* the tables */
	file->needed_nbytes = file->highest = 0;
	file->lowest = UINT64_MAX;
	for (int i = 0; i < n; i++)
		check_range(image, disk, first + (uint64_t)i * stride, 4096);
	imgc_disk_destroy(disk);
}

static void test_reading_ahead(void)
{
	struct image image = image_create(IMGC_CODEC_NONE, IMGC_PREFIX_NONE);
	struct watched_file file = {.base.ops = &watched_ops, .inner = image.stored.file};
	uint64_t host = image.rows[0].host_offset;

	image.file.file = &file.base;
	/* In order: what follows, once, and at most a mebibyte of it. */
	read_pattern(&image, &file, 0, 4096, 200);
	CHECK_EQ(file.lowest, host + 5 * 4096);
	CHECK(file.needed_nbytes == file.highest - file.lowest);
	CHECK(file.needed_nbytes > MIB / 2 && file.highest <= host + 200 * 4096 + MIB + 4096);
	/* In steps, forward and backward. */
	read_pattern(&image, &file, 0, 20000, 20);
	CHECK_EQ(file.lowest, host + 5 * 20000);
	CHECK(file.needed_nbytes >= 20 * 4096 && file.needed_nbytes <= 60 * 4096);
	read_pattern(&image, &file, MIB, (uint64_t)-20000, 20);
	CHECK_EQ(file.highest, host + MIB - 5 * 20000 + 4096);
	CHECK(file.needed_nbytes >= 20 * 4096 && file.needed_nbytes <= 60 * 4096);
	/* The same place, and no pattern. */
	read_pattern(&image, &file, 4096, 0, 20);
	CHECK_EQ(file.needed_nbytes, 0);
	for (uint64_t i = 0; i < 20; i++)
		read_pattern(&image, &file, (i * 7919 + i * i * 131) % MIB, 1 + i * 977, 3);
	CHECK_EQ(file.needed_nbytes, 0);
	image_destroy(&image);
}

static bool has_table(struct imgc_disk *disk, uint64_t offset)
{
	uint64_t generation;
	struct imgc_table *table = imgc_disk_find(disk, offset, &generation);

	if (table)
		imgc_disk_drop(disk, table);
	return table;
}

static void test_forgetting_a_range(void)
{
	struct image image = image_create(IMGC_CODEC_ZLIB, IMGC_PREFIX_NONE);
	struct imgc_disk *disk = open_image(&image, 32 * MIB);
	struct imgc_disk_rest inside = {0}, outside = {0};
	struct imgc_error err = {0};
	uint8_t byte;

	check_range(&image, disk, 0, 4 * SPAN);
	imgc_disk_forget(disk, 2 * SPAN, 2 * SPAN);
	CHECK(has_table(disk, 2 * SPAN));
	imgc_disk_forget(disk, 2 * SPAN - 1, 2 * SPAN + 1);
	CHECK(has_table(disk, 0) && has_table(disk, 3 * SPAN));
	CHECK(!has_table(disk, SPAN) && !has_table(disk, 2 * SPAN));
	/* A table that was being read meanwhile is kept only if it is another one. */
	CHECK_EQ(imgc_disk_read(disk, NULL, SPAN, &byte, 1, 0, &inside, &err), IMGC_MISSING);
	CHECK_EQ(imgc_disk_read(disk, NULL, 2 * SPAN, &byte, 1, 0, &outside, &err), IMGC_MISSING);
	imgc_disk_forget(disk, SPAN, SPAN + 1);
	imgc_disk_drop(disk, add_table(&image, disk, &inside));
	imgc_disk_drop(disk, add_table(&image, disk, &outside));
	CHECK(!has_table(disk, SPAN) && has_table(disk, 2 * SPAN));
	check_range(&image, disk, 0, image.plain.nbytes);
	imgc_disk_forget(disk, 0, UINT64_MAX);
	CHECK(!has_table(disk, 0) && !has_table(disk, image.plain.nbytes - 1));
	imgc_disk_destroy(disk);
	image_destroy(&image);
}

/* ------------------------------------------------------------------ threads */

struct crowd {
	struct image image;
	struct imgc_disk *disk;
	struct imgc_uses *uses;
	_Atomic int n_idle;
	_Atomic uint64_t seed;
};

static void *read_in_crowd(void *argument)
{
	struct crowd *crowd = argument;
	uint64_t state = atomic_fetch_add(&crowd->seed, 1), nbytes = crowd->image.plain.nbytes;
	static const uint64_t lengths[] = {10, 5000, 200 * KIB};
	struct imgc_error err = {0};
	uint8_t *out = malloc(200 * KIB);

	CHECK(out);
	for (int i = 0; i < 120; i++) {
		int ticket = imgc_uses_enter(crowd->uses);

		if (!ticket)
			break;
		uint64_t length = lengths[test_random(&state) % 3];
		uint64_t offset = test_random(&state) % (nbytes - length);
		struct imgc_disk_request request = {offset, out, length};

		if (i % 40 == 7)
			imgc_disk_forget(crowd->disk, i % 2 ? 0 : offset, nbytes);
		if (i % 5 == 3)
			CHECK_EQ(gather_ranges(&crowd->image, crowd->disk, &request, 1, 2, &err),
				 IMGC_OK);
		else
			CHECK_EQ(read_range(&crowd->image, crowd->disk, offset, out, length, &err),
				 IMGC_OK);
		CHECK(memcmp(out, crowd->image.plain.bytes + offset, length) == 0);
		if (imgc_uses_leave(crowd->uses, ticket))
			atomic_fetch_add(&crowd->n_idle, 1);
	}
	free(out);
	return NULL;
}

static void test_threads(uint64_t cache_nbytes, bool closes)
{
	struct crowd crowd = {.image = image_create(IMGC_CODEC_ZLIB, IMGC_PREFIX_NONE), .seed = 5};
	pthread_t threads[N_THREADS];

	crowd.disk = open_image(&crowd.image, cache_nbytes);
	CHECK_EQ(imgc_uses_create(&crowd.uses), IMGC_OK);
	for (int i = 0; i < N_THREADS; i++)
		CHECK_EQ(pthread_create(&threads[i], NULL, read_in_crowd, &crowd), 0);
	if (closes) {
		usleep(2000);
		atomic_fetch_add(&crowd.n_idle, imgc_uses_close(crowd.uses));
	}
	for (int i = 0; i < N_THREADS; i++)
		CHECK_EQ(pthread_join(threads[i], NULL), 0);
	CHECK_EQ(atomic_load(&crowd.n_idle), closes);
	struct imgc_cache_stats stats;

	imgc_disk_stats(crowd.disk, &stats);
	CHECK(stats.nbytes <= cache_nbytes);
	imgc_uses_destroy(crowd.uses);
	imgc_disk_destroy(crowd.disk);
	image_destroy(&crowd.image);
}

static void test_uses(void)
{
	struct imgc_uses *uses;

	CHECK_EQ(imgc_uses_create(&uses), IMGC_OK);
	int first = imgc_uses_enter(uses), second = imgc_uses_enter(uses);

	CHECK(first && second);
	CHECK(!imgc_uses_leave(uses, first));
	CHECK(!imgc_uses_none(uses));
	CHECK(!imgc_uses_close(uses));
	CHECK(!imgc_uses_enter(uses));
	CHECK(!imgc_uses_close(uses));
	CHECK(imgc_uses_leave(uses, second));
	CHECK(imgc_uses_none(uses));
	CHECK(!imgc_uses_close(uses));
	imgc_uses_destroy(uses);
	CHECK_EQ(imgc_uses_create(&uses), IMGC_OK);
	CHECK(imgc_uses_close(uses));
	CHECK(!imgc_uses_close(uses));
	imgc_uses_destroy(uses);
	imgc_uses_destroy(NULL);
}

/* Uses that overlap without an end do not hide that the first ones have ended. */
static void test_epochs(void)
{
	struct imgc_uses *uses;

	CHECK_EQ(imgc_uses_create(&uses), IMGC_OK);
	CHECK(imgc_uses_is_over(uses, imgc_uses_epoch(uses))); /* there was none */
	for (int i = 0; i < 100000; i++) {		       /* the number wraps */
		int first = imgc_uses_enter(uses);
		uint64_t epoch = imgc_uses_epoch(uses);

		CHECK(!imgc_uses_is_over(uses, epoch));
		int second = imgc_uses_enter(uses);

		CHECK(!imgc_uses_is_over(uses, epoch));
		CHECK(!imgc_uses_leave(uses, first));
		CHECK(imgc_uses_is_over(uses, epoch));
		CHECK(!imgc_uses_is_over(uses, imgc_uses_epoch(uses)));
		CHECK(!imgc_uses_leave(uses, second));
	}
	/* A long use that is renewed does not last. */
	int long_use = imgc_uses_enter(uses);
	uint64_t before = imgc_uses_epoch(uses);

	CHECK(!imgc_uses_is_over(uses, before));
	long_use = imgc_uses_renew(uses, long_use);
	CHECK(imgc_uses_is_over(uses, before));
	CHECK(!imgc_uses_is_over(uses, imgc_uses_epoch(uses)));
	CHECK(!imgc_uses_leave(uses, long_use));
	CHECK(imgc_uses_none(uses));
	/* Each use ends only after the next one has begun. */
	int use = imgc_uses_enter(uses), n_uses = 0;
	uint64_t start = imgc_uses_epoch(uses);

	while (!imgc_uses_is_over(uses, start)) {
		int next = imgc_uses_enter(uses);

		CHECK(!imgc_uses_leave(uses, use));
		use = next;
		CHECK(n_uses++ < 4);
	}
	CHECK(!imgc_uses_leave(uses, use));
	int last = imgc_uses_enter(uses);
	uint64_t epoch = imgc_uses_epoch(uses);

	CHECK(!imgc_uses_close(uses));
	CHECK(!imgc_uses_is_over(uses, epoch));
	last = imgc_uses_renew(uses, last);
	CHECK(imgc_uses_leave(uses, last));
	CHECK(imgc_uses_is_over(uses, epoch));
	imgc_uses_destroy(uses);
}

int main(void)
{
	test_all_reads(IMGC_CODEC_NONE, IMGC_PREFIX_NONE);
	test_all_reads(IMGC_CODEC_ZLIB, IMGC_PREFIX_NONE);
	test_all_reads(IMGC_CODEC_ZSTD, IMGC_PREFIX_NONE);
	test_all_reads(IMGC_CODEC_ZLIB, IMGC_PREFIX_GRAIN_MARKER);
	test_rounds();
	test_what_is_refused();
	test_forgetting();
	test_forgetting_a_range();
	test_a_part_of_a_table();
	test_what_does_not_wait();
	test_broken_blocks(IMGC_CODEC_ZLIB, IMGC_PREFIX_NONE);
	test_broken_blocks(IMGC_CODEC_ZLIB, IMGC_PREFIX_GRAIN_MARKER);
	test_a_marker_of_another_grain();
	test_the_first_error();
	test_a_file_of_the_host();
	test_reading_ahead();
	test_uses();
	test_epochs();
	for (int closes = 0; closes < 2; closes++) {
		test_threads(0, closes);
		test_threads(200 * KIB, closes);
		test_threads(32 * MIB, closes);
	}
	return 0;
}
