/*
 * test_announce.c - what is announced of a batch, and in which order
 */
#include "tests/engine_util.h"

#include <pthread.h>
#include <stdatomic.h>

#include "engine/announce.h"

#define DISK_NBYTES (512ull * MIB)
#define BLOCK_NBYTES (64u * KIB)
#define N_BLOCKS (DISK_NBYTES / BLOCK_NBYTES)

/* Bytes that no memory holds: each block is full of its number's lowest byte. */
struct traced_file {
	struct imgc_file base;
	pthread_mutex_t lock; /* all below */
	uint8_t is_announced[N_BLOCKS];
	uint64_t last_offset; /* of what was announced */
	uint64_t announced_nbytes, read_nbytes, most_ahead_nbytes;
	unsigned n_announced, n_turns; /* turns: announced before what came last */
	uint64_t unannounced_nbytes;   /* read, but not announced before */
};

static int traced_read(struct imgc_file *base, struct imgc_io_context *ctx,
		       const struct imgc_io_request *requests, size_t n, struct imgc_error *err)
{
	struct traced_file *file = (struct traced_file *)base;

	(void)ctx;
	(void)err;
	pthread_mutex_lock(&file->lock);
	for (size_t i = 0; i < n; i++) {
		CHECK(requests[i].offset + requests[i].length <= DISK_NBYTES);
		for (uint64_t at = 0; at < requests[i].length; at++) {
			uint64_t block = (requests[i].offset + at) / BLOCK_NBYTES;
			uint64_t step = (block + 1) * BLOCK_NBYTES - requests[i].offset - at;

			if (step > requests[i].length - at)
				step = requests[i].length - at;
			memset((uint8_t *)requests[i].buffer + at, (int)(block & 0xff), step);
			if (!file->is_announced[block])
				file->unannounced_nbytes += step;
			at += step - 1;
		}
		file->read_nbytes += requests[i].length;
	}
	pthread_mutex_unlock(&file->lock);
	return IMGC_OK;
}

static void traced_will_need(struct imgc_file *base, uint64_t offset, uint64_t length)
{
	struct traced_file *file = (struct traced_file *)base;

	CHECK(length > 0 && length <= MIB);
	CHECK(offset < DISK_NBYTES && length <= DISK_NBYTES - offset);
	pthread_mutex_lock(&file->lock);
	file->n_announced++;
	file->n_turns += offset < file->last_offset;
	file->last_offset = offset;
	file->announced_nbytes += length;
	memset(file->is_announced + offset / BLOCK_NBYTES, 1,
	       (offset + length - 1) / BLOCK_NBYTES - offset / BLOCK_NBYTES + 1);
	if (file->announced_nbytes > file->read_nbytes &&
	    file->announced_nbytes - file->read_nbytes > file->most_ahead_nbytes)
		file->most_ahead_nbytes = file->announced_nbytes - file->read_nbytes;
	pthread_mutex_unlock(&file->lock);
}

static const struct imgc_file_ops traced_ops = {.read = traced_read, .will_need = traced_will_need};

static void traced_create(struct traced_file *file)
{
	*file = (struct traced_file){.base = {.ops = &traced_ops}};
	CHECK_EQ(pthread_mutex_init(&file->lock, NULL), 0);
}

/* ------------------------------------------------------------------- layouts */

/* Block i of the disk is block (i * factor) % N_BLOCKS of the file; the factor is odd. */
static struct imgc_extent *scattered_rows(uint64_t factor)
{
	struct imgc_extent *rows = calloc(N_BLOCKS, sizeof(*rows));

	CHECK(rows);
	for (uint64_t i = 0; i < N_BLOCKS; i++)
		rows[i] = data_row(i * BLOCK_NBYTES, BLOCK_NBYTES,
				   i * factor % N_BLOCKS * BLOCK_NBYTES);
	return rows;
}

static struct announcer announcer_create(struct traced_file *file, struct imgc_source_file *source)
{
	struct announcer announcer = {0};

	traced_create(file);
	*source = (struct imgc_source_file){.file = &file->base, .nbytes = DISK_NBYTES};
	CHECK_EQ(imgc_announcer_create(&announcer, source), IMGC_OK);
	return announcer;
}

/* Goes over the disk as a job does, and tells the file that windows are read. */
static void walk(struct announcer *announcer, struct traced_file *file, uint64_t end, uint64_t rate)
{
	for (uint64_t cursor = 0; cursor < end; cursor += 512 * KIB) {
		while (imgc_announcer_is_due(announcer, cursor))
			imgc_announcer_step(announcer, rate);
		file->read_nbytes += 512 * KIB;
	}
}

/* ------------------------------------------------------------- which is announced */

static void test_nothing_of_what_is_in_order(void)
{
	static struct traced_file file;
	struct imgc_source_file source;
	struct announcer announcer = announcer_create(&file, &source);
	struct imgc_extent *rows = scattered_rows(1);
	struct imgc_extent one = data_row(0, DISK_NBYTES, 0), large[64];

	imgc_announcer_start(&announcer, 0, (struct rows){&one, 1}, (struct rows){NULL, 0}, false);
	walk(&announcer, &file, DISK_NBYTES, 0);
	imgc_announcer_start(&announcer, 0, (struct rows){rows, N_BLOCKS}, (struct rows){NULL, 0},
			     false);
	walk(&announcer, &file, DISK_NBYTES, 0);
	/* Two images that are in order, each in its file's own way. */
	imgc_announcer_start(&announcer, 0, (struct rows){rows, N_BLOCKS}, (struct rows){&one, 1},
			     false);
	walk(&announcer, &file, DISK_NBYTES, 0);
	/* A table of 16 KiB every 2 MiB. */
	for (uint64_t i = 0; i < N_BLOCKS / 2; i++)
		rows[i].host_offset += i / 32 * 16 * KIB;
	imgc_announcer_start(&announcer, 0, (struct rows){rows, N_BLOCKS / 2},
			     (struct rows){NULL, 0}, false);
	walk(&announcer, &file, DISK_NBYTES / 2, 0);
	/* Jumps, but none for 8 MiB after each. */
	for (uint64_t i = 0; i < 64; i++)
		large[i] = data_row(i * 8 * MIB, 8 * MIB, (63 - i) * 8 * MIB);
	imgc_announcer_start(&announcer, 0, (struct rows){large, 64}, (struct rows){NULL, 0},
			     false);
	walk(&announcer, &file, DISK_NBYTES, 0);
	CHECK_EQ(file.n_announced, 0);
	imgc_announcer_destroy(&announcer);
	free(rows);
}

static void check_walk(uint64_t factor)
{
	static struct traced_file file;
	struct imgc_source_file source;
	struct announcer announcer = announcer_create(&file, &source);
	struct imgc_extent *rows = scattered_rows(factor);

	imgc_announcer_start(&announcer, 0, (struct rows){rows, N_BLOCKS}, (struct rows){NULL, 0},
			     false);
	walk(&announcer, &file, DISK_NBYTES, 0);
	for (uint64_t i = 0; i < N_BLOCKS; i++)
		CHECK(file.is_announced[i]);
	/* Spans of 4, 8, 16, 32 and then 64 MiB: each goes through the file once. */
	CHECK(file.n_turns <= 11);
	CHECK(file.most_ahead_nbytes <= 2 * ANNOUNCER_MAX_SPAN_NBYTES);
	imgc_announcer_destroy(&announcer);
	free(rows);
}

static void test_what_is_out_of_order(void)
{
	check_walk(N_BLOCKS - 1); /* backwards */
	check_walk(4097);	  /* two streams */
	check_walk(3571);
}

static void test_announced_once(void)
{
	static struct traced_file file;
	struct imgc_source_file source;
	struct announcer announcer = announcer_create(&file, &source);
	struct imgc_extent *rows = scattered_rows(N_BLOCKS - 1);

	imgc_announcer_start(&announcer, 0, (struct rows){rows, N_BLOCKS}, (struct rows){NULL, 0},
			     false);
	walk(&announcer, &file, DISK_NBYTES, 0);
	CHECK_EQ(file.announced_nbytes, DISK_NBYTES);
	/* Backwards, neighbours become one: each call is a step of 1 MiB. */
	CHECK(file.n_announced <= DISK_NBYTES / MIB + 16);
	imgc_announcer_destroy(&announcer);
	free(rows);
}

static void test_holes_and_unread_rows_are_left_out(void)
{
	static struct traced_file file;
	struct imgc_source_file source;
	struct announcer announcer = announcer_create(&file, &source);
	struct imgc_extent *rows = scattered_rows(3571);

	for (uint64_t i = 0; i < N_BLOCKS; i += 4) {
		rows[i] = empty_row(i * BLOCK_NBYTES, BLOCK_NBYTES, IMGC_HOLE);
		rows[i + 1].flags = IMGC_EXTENT_UNREAD;
	}
	imgc_announcer_start(&announcer, 0, (struct rows){rows, N_BLOCKS}, (struct rows){NULL, 0},
			     true);
	walk(&announcer, &file, DISK_NBYTES, 0);
	CHECK_EQ(file.announced_nbytes, DISK_NBYTES / 2);
	imgc_announcer_destroy(&announcer);
	free(rows);
}

/* Compressed rows are announced whole, also where only a part of the block is wanted. */
static void test_compressed_rows(void)
{
	static struct traced_file file;
	struct imgc_source_file source;
	struct announcer announcer = announcer_create(&file, &source);
	struct imgc_extent *rows = scattered_rows(3571);

	for (uint64_t i = 0; i < N_BLOCKS; i++) {
		rows[i].kind = IMGC_ZLIB;
		rows[i].host_length = 5000;
	}
	imgc_announcer_start(&announcer, 0, (struct rows){rows, N_BLOCKS}, (struct rows){NULL, 0},
			     false);
	walk(&announcer, &file, DISK_NBYTES, 0);
	CHECK_EQ(file.announced_nbytes, N_BLOCKS * 5000);
	imgc_announcer_destroy(&announcer);
	free(rows);
}

static void test_first_and_limited_spans(void)
{
	static struct traced_file file;
	struct imgc_source_file source;
	struct announcer announcer = announcer_create(&file, &source);
	struct imgc_extent *rows = scattered_rows(3571);

	imgc_announcer_start(&announcer, 0, (struct rows){rows, N_BLOCKS}, (struct rows){NULL, 0},
			     false);
	while (imgc_announcer_is_due(&announcer, 0))
		imgc_announcer_step(&announcer, 0);
	CHECK_EQ(file.announced_nbytes, 12 * MIB);
	walk(&announcer, &file, DISK_NBYTES, 20 * MIB);
	CHECK(file.most_ahead_nbytes <= 40 * MIB);
	/* Even a rate of one byte a second leaves spans of some size. */
	traced_create(&file);
	imgc_announcer_start(&announcer, 0, (struct rows){rows, N_BLOCKS}, (struct rows){NULL, 0},
			     false);
	walk(&announcer, &file, DISK_NBYTES, 1);
	CHECK(file.most_ahead_nbytes <= 2 * ANNOUNCER_FIRST_SPAN_NBYTES);
	CHECK_EQ(file.announced_nbytes, DISK_NBYTES);
	imgc_announcer_destroy(&announcer);
	free(rows);
}

/* Rows that a span cuts: what is left of them comes with the next span. */
static void test_long_rows(void)
{
	static struct traced_file file;
	struct imgc_source_file source;
	struct announcer announcer = announcer_create(&file, &source);
	const uint64_t n = 168, length = 3 * MIB;
	struct imgc_extent rows[168];

	for (uint64_t i = 0; i < n; i++)
		rows[i] = data_row(i * length, length, i * 79 % n * length);
	imgc_announcer_start(&announcer, 0, (struct rows){rows, n}, (struct rows){NULL, 0}, false);
	walk(&announcer, &file, n * length, 0);
	CHECK_EQ(file.announced_nbytes, n * length);
	for (uint64_t i = 0; i < n * length / BLOCK_NBYTES; i++)
		CHECK(file.is_announced[i]);
	imgc_announcer_destroy(&announcer);
}

/* The smallest rows: no more than 8192 ranges are kept at a time. */
static void test_many_small_rows(void)
{
	static struct traced_file file;
	struct imgc_source_file source;
	struct announcer announcer = announcer_create(&file, &source);
	size_t n = 1 << 17;
	struct imgc_extent *rows = calloc(n, sizeof(*rows));

	CHECK(rows);
	for (uint64_t i = 0; i < n; i++)
		rows[i] = data_row(i * 512, 512, DISK_NBYTES - (i + 1) * 4096);
	imgc_announcer_start(&announcer, 0, (struct rows){rows, n}, (struct rows){NULL, 0}, false);
	walk(&announcer, &file, n * 512, 0);
	for (uint64_t i = 1; i <= n * 4096 / BLOCK_NBYTES; i++)
		CHECK(file.is_announced[N_BLOCKS - i]);
	CHECK(file.announced_nbytes <= 2 * n * 512);
	imgc_announcer_destroy(&announcer);
	free(rows);
}

/* ---------------------------------------------------------------------- jobs */

static struct imgc_job_options job_options(struct imgc_source_file *source, unsigned n_threads)
{
	struct imgc_job_options options = {
		.kind = IMGC_JOB_CONVERT,
		.n_threads = n_threads,
		.sources = source,
		.n_sources = 1,
		.geometry = {.block_nbytes = BLOCK_NBYTES,
			     .stored_alignment = BLOCK_NBYTES,
			     .compressed_alignment = 1,
			     .guest_nbytes = DISK_NBYTES},
	};

	use_default_variants(&options);
	return options;
}

static void run_job(const struct imgc_job_options *options, const struct imgc_batch *batch)
{
	struct imgc_error err = {0};
	struct imgc_job *job;

	CHECK_EQ(imgc_job_create(options, &job, &err), IMGC_OK);
	CHECK_EQ(run_batch(job, batch, &err), IMGC_OK);
	if (options->kind == IMGC_JOB_COMPARE)
		CHECK_EQ(imgc_job_first_difference(job), IMGC_NO_DIFFERENCE);
	imgc_job_destroy(job);
}

static void test_convert(void)
{
	static struct traced_file file;
	struct imgc_extent *rows = scattered_rows(3571);
	const unsigned n_threads[] = {1, 2, 7};

	for (size_t i = 0; i < 3; i++) {
		struct imgc_source_file source = {.file = &file.base, .nbytes = DISK_NBYTES};
		struct imgc_job_options options = job_options(&source, n_threads[i]);
		struct imgc_batch batch = {
			.guest_end = DISK_NBYTES, .extents = rows, .n_extents = N_BLOCKS};

		traced_create(&file);
		CHECK_EQ(imgc_file_open_null(&options.target), IMGC_OK);
		run_job(&options, &batch);
		CHECK_EQ(file.read_nbytes, DISK_NBYTES);
		/* Several workers may read on while the one that announces is not scheduled. */
		CHECK(file.announced_nbytes > 0);
		if (n_threads[i] == 1) {
			CHECK_EQ(file.announced_nbytes, DISK_NBYTES);
			CHECK_EQ(file.unannounced_nbytes, 0);
		}
		/* When salvaging, a range that may be bad is read when it is needed. */
		traced_create(&file);
		options.salvage = 1;
		run_job(&options, &batch);
		CHECK_EQ(file.n_announced, 0);
		imgc_file_close(options.target);
	}
	free(rows);
}

static void test_digest(void)
{
	static struct traced_file file;
	static uint8_t leaves[N_BLOCKS * IMGC_CHECKSUM_NBYTES];
	struct imgc_extent *rows = scattered_rows(3571);
	struct imgc_source_file source = {.file = &file.base, .nbytes = DISK_NBYTES};
	struct imgc_job_options options = job_options(&source, 1);
	struct imgc_batch batch = {.guest_end = DISK_NBYTES,
				   .extents = rows,
				   .n_extents = N_BLOCKS,
				   .leaves = leaves,
				   .n_leaves = N_BLOCKS};

	traced_create(&file);
	options.kind = IMGC_JOB_DIGEST;
	options.checksum = IMGC_CHECKSUM_SHA256;
	run_job(&options, &batch);
	CHECK_EQ(file.announced_nbytes, DISK_NBYTES);
	CHECK_EQ(file.unannounced_nbytes, 0);
	free(rows);
}

/* Both sides of a comparison are announced, each to its file. */
static void test_compare(void)
{
	static struct traced_file files[2];
	struct imgc_extent *left = scattered_rows(3571), *right = scattered_rows(3571);
	struct imgc_source_file sources[2];
	struct imgc_job_options options = job_options(sources, 1);
	struct imgc_batch batch = {.guest_end = DISK_NBYTES,
				   .extents = left,
				   .n_extents = N_BLOCKS,
				   .base_extents = right,
				   .n_base_extents = N_BLOCKS};

	for (size_t i = 0; i < 2; i++) {
		traced_create(&files[i]);
		sources[i] =
			(struct imgc_source_file){.file = &files[i].base, .nbytes = DISK_NBYTES};
	}
	for (size_t i = 0; i < N_BLOCKS; i++)
		right[i].file = 1;
	options.kind = IMGC_JOB_COMPARE;
	options.n_sources = 2;
	run_job(&options, &batch);
	for (size_t i = 0; i < 2; i++) {
		CHECK_EQ(files[i].announced_nbytes, DISK_NBYTES);
		CHECK_EQ(files[i].unannounced_nbytes, 0);
	}
	free(left);
	free(right);
}

int main(void)
{
	test_nothing_of_what_is_in_order();
	test_what_is_out_of_order();
	test_announced_once();
	test_holes_and_unread_rows_are_left_out();
	test_compressed_rows();
	test_first_and_limited_spans();
	test_long_rows();
	test_many_small_rows();
	test_convert();
	test_digest();
	test_compare();
	return 0;
}
