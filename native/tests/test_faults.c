/*
 * test_faults.c - the engine over files that fail: for a moment, for good, in one place
 */
#include "tests/test_util.h"

#include <errno.h>
#include <stdatomic.h>

#include "common/error.h"
#include "engine/engine.h"

#define KIB 1024u
#define MIB (1024u * 1024)
#define DISK_NBYTES (2u * MIB)
#define MAX_ROWS 17

/* A file in memory whose next calls fail, or all calls on one range. */
struct flaky_file {
	struct imgc_file base;
	struct imgc_file *inner;
	_Atomic int n_failing;
	_Atomic int n_calls;
	int os_errno;
	uint64_t bad_start, bad_end;
	int cancel_at; /* the number of the call that cancels the job */
	struct imgc_job *job;
};

static int flaky_fail(struct flaky_file *file, uint64_t offset, uint64_t length,
		      struct imgc_error *err)
{
	if (atomic_fetch_add(&file->n_calls, 1) + 1 == file->cancel_at)
		imgc_job_cancel(file->job);
	if (atomic_load(&file->n_failing) > 0) {
		atomic_fetch_sub(&file->n_failing, 1);
		return imgc_fail_system(err, file->os_errno, offset, "flaky");
	}
	if (offset < file->bad_end && offset + length > file->bad_start)
		return imgc_fail_system(err, EIO, offset, "flaky");
	return IMGC_OK;
}

static int flaky_read(struct imgc_file *base, struct imgc_io_context *ctx,
		      const struct imgc_io_request *requests, size_t n, struct imgc_error *err)
{
	struct flaky_file *file = (struct flaky_file *)base;

	for (size_t i = 0; i < n; i++) {
		int status = flaky_fail(file, requests[i].offset, requests[i].length, err);

		if (status)
			return status;
	}
	return imgc_file_read(file->inner, ctx, requests, n, err);
}

static int flaky_write(struct imgc_file *base, const struct iovec *iov, int n_iov, uint64_t offset,
		       struct imgc_error *err)
{
	struct flaky_file *file = (struct flaky_file *)base;
	int status = flaky_fail(file, offset, 1, err);

	return status ? status : imgc_file_write(file->inner, iov, n_iov, offset, err);
}

static const struct imgc_file_ops flaky_ops = {.read = flaky_read, .write = flaky_write};

struct bench {
	uint8_t *source_bytes, *target_bytes;
	struct flaky_file source, target;
	struct imgc_source_file file;
	struct imgc_job_options options;
	struct imgc_extent rows[MAX_ROWS];
	size_t n_rows;
};

static struct imgc_file *memory(uint8_t **bytes)
{
	struct imgc_file *file = NULL;

	*bytes = calloc(1, DISK_NBYTES);
	CHECK(*bytes);
	CHECK_EQ(imgc_file_open_memory(*bytes, DISK_NBYTES, &file), IMGC_OK);
	return file;
}

static void bench_create(struct bench *b, unsigned n_threads)
{
	memset(b, 0, sizeof(*b));
	b->source.base.ops = b->target.base.ops = &flaky_ops;
	b->source.inner = memory(&b->source_bytes);
	b->target.inner = memory(&b->target_bytes);
	fill_random(b->source_bytes, DISK_NBYTES, 3);
	b->file = (struct imgc_source_file){.file = &b->source.base, .nbytes = DISK_NBYTES};
	b->rows[0] = (struct imgc_extent){0, DISK_NBYTES, 0, DISK_NBYTES, 0, IMGC_DATA, 0};
	b->n_rows = 1;
	b->options = (struct imgc_job_options){
		.kind = IMGC_JOB_CONVERT,
		.n_threads = n_threads,
		.window_nbytes = 256 * KIB,
		.sources = &b->file,
		.n_sources = 1,
		.target = &b->target.base,
		.geometry = {.block_nbytes = 64 * KIB,
			     .stored_alignment = 512,
			     .compressed_alignment = 512,
			     .guest_nbytes = DISK_NBYTES},
	};
	use_default_variants(&b->options);
}

static void bench_destroy(struct bench *b)
{
	imgc_file_close(b->source.inner);
	imgc_file_close(b->target.inner);
	free(b->source_bytes);
	free(b->target_bytes);
}

/* Runs the job.  Copies up to `capacity` bad ranges to `ranges`, if not NULL. */
static int run(struct bench *b, struct imgc_bad_range *ranges, size_t capacity, size_t *n,
	       struct imgc_error *err)
{
	struct imgc_batch batch = {
		.guest_end = DISK_NBYTES, .extents = b->rows, .n_extents = b->n_rows};
	const struct imgc_bad_range *rows = NULL;
	struct imgc_job *job;

	CHECK_EQ(imgc_job_create(&b->options, &job, err), IMGC_OK);
	b->source.job = b->target.job = job;
	CHECK_EQ(imgc_job_start(job, &batch, err), IMGC_OK);
	while (!imgc_job_wait(job, 50))
		;
	int status = imgc_job_finish(job, err);
	*n = imgc_job_bad_ranges(job, &rows);
	for (size_t i = 0; ranges && i < *n && i < capacity; i++)
		ranges[i] = rows[i];
	imgc_job_destroy(job);
	return status;
}

static void test_transient(unsigned n_threads)
{
	struct imgc_error err = {0};
	struct bench b;
	size_t n;

	bench_create(&b, n_threads);
	b.source.os_errno = EIO;
	b.source.n_failing = 2;
	b.target.os_errno = EAGAIN;
	b.target.n_failing = 2;
	CHECK_EQ(run(&b, NULL, 0, &n, &err), IMGC_OK);
	CHECK(memcmp(b.source_bytes, b.target_bytes, DISK_NBYTES) == 0);
	CHECK_EQ(n, 0);
	bench_destroy(&b);
}

static void test_lasting(void)
{
	struct imgc_error err = {0};
	struct bench b;
	size_t n;

	/* Five attempts in all, then an error. */
	bench_create(&b, 1);
	b.source.os_errno = EIO;
	b.source.n_failing = 1000;
	CHECK_EQ(run(&b, NULL, 0, &n, &err), IMGC_IO);
	CHECK_EQ(err.os_errno, EIO);
	CHECK_EQ(err.source, 0);
	CHECK_EQ(b.source.n_calls, 5);
	bench_destroy(&b);

	/* A write that failed is not repeated. */
	bench_create(&b, 1);
	b.target.os_errno = EIO;
	b.target.n_failing = 1;
	CHECK_EQ(run(&b, NULL, 0, &n, &err), IMGC_IO);
	CHECK_EQ(err.source, IMGC_TARGET);
	CHECK_EQ(b.target.n_calls, 1);
	bench_destroy(&b);
}

static void test_salvage(unsigned n_threads)
{
	struct imgc_bad_range lost[8];
	struct imgc_error err = {0};
	struct bench b;
	size_t n;

	bench_create(&b, n_threads);
	b.source.bad_start = MIB + 100;
	b.source.bad_end = MIB + 4097;
	b.options.salvage = 1;
	CHECK_EQ(run(&b, lost, 8, &n, &err), IMGC_OK);
	CHECK_EQ(n, 1);
	CHECK_EQ(lost[0].guest_offset, MIB);
	CHECK_EQ(lost[0].length, 8192);
	CHECK_EQ(lost[0].source, 0);
	CHECK_EQ(lost[0].os_errno, EIO);
	memset(b.source_bytes + MIB, 0, 8192);
	CHECK(memcmp(b.source_bytes, b.target_bytes, DISK_NBYTES) == 0);
	b.options.has_base = 1;
	b.options.geometry.placing = IMGC_PLACE_APPEND;
	struct imgc_job *job;

	CHECK_EQ(imgc_job_create(&b.options, &job, &err), IMGC_INVALID_ARGUMENT);
	bench_destroy(&b);
}

static void test_salvage_of_a_broken_block(uint16_t flags)
{
	struct imgc_bad_range lost[8];
	struct imgc_error err = {0};
	struct bench b;
	size_t n;

	bench_create(&b, 2);
	b.n_rows = 2;
	b.rows[0] = (struct imgc_extent){0, 64 * KIB, 512, 9000, 0, IMGC_ZLIB, flags};
	b.rows[1] = (struct imgc_extent){
		64 * KIB, DISK_NBYTES - 64 * KIB, 64 * KIB, DISK_NBYTES - 64 * KIB, 0, IMGC_DATA,
		0};
	b.file.block_nbytes = 64 * KIB;
	b.options.salvage = 1;
	CHECK_EQ(run(&b, lost, 8, &n, &err), IMGC_OK);
	CHECK_EQ(n, 1);
	CHECK_EQ(lost[0].guest_offset, 0);
	CHECK_EQ(lost[0].length, 64 * KIB);
	CHECK_EQ(lost[0].os_errno, 0);
	memset(b.source_bytes, 0, 64 * KIB);
	CHECK(memcmp(b.source_bytes, b.target_bytes, DISK_NBYTES) == 0);
	bench_destroy(&b);
}

/* Blocks of 4 KiB, all but the third readable, and then a hole. */
static void compressed_rows(struct bench *b)
{
	struct imgc_codec_params codec = {IMGC_CODEC_ZLIB, IMGC_DEFLATE_LIBDEFLATE, 1, 15};
	struct imgc_compressor *compressor;
	uint8_t text[4096 + IMGC_COMPRESS_SLACK_NBYTES] = {0};

	CHECK_EQ(imgc_compressor_create(&codec, &compressor), IMGC_OK);
	b->n_rows = MAX_ROWS;
	for (size_t i = 0; i < MAX_ROWS - 1; i++) {
		size_t nbytes;

		fill_text(text, 4096, (unsigned)i);
		CHECK_EQ(imgc_compress(compressor, text, 4096, b->source_bytes + i * 8192, 8192,
				       &nbytes),
			 IMGC_OK);
		b->rows[i] =
			(struct imgc_extent){i * 4096, 4096, i * 8192, nbytes, 0, IMGC_ZLIB, 0};
	}
	uint64_t start = (MAX_ROWS - 1) * 4096;

	b->rows[MAX_ROWS - 1] = (struct imgc_extent){
		.guest_offset = start, .length = DISK_NBYTES - start, .kind = IMGC_HOLE};
	b->file.block_nbytes = 4096;
	b->source.bad_start = 2 * 8192;
	b->source.bad_end = 2 * 8192 + 1;
	b->options.salvage = 1;
	imgc_compressor_destroy(compressor);
}

/* For a bad sector among compressed blocks one read is repeated, not one per block. */
static void test_salvage_around_a_bad_sector(void)
{
	struct imgc_bad_range lost[8];
	struct imgc_error err = {0};
	uint8_t text[4096];
	struct bench b;
	size_t n;

	bench_create(&b, 1);
	compressed_rows(&b);
	CHECK_EQ(run(&b, lost, 8, &n, &err), IMGC_OK);
	CHECK_EQ(n, 1);
	CHECK_EQ(lost[0].guest_offset, 2 * 4096);
	CHECK_EQ(lost[0].length, 4096);
	CHECK_EQ(lost[0].os_errno, EIO);
	CHECK_EQ(b.source.n_calls, 5 + MAX_ROWS - 1);
	for (size_t i = 0; i < MAX_ROWS - 1; i++) {
		fill_text(text, sizeof(text), (unsigned)i);
		if (i == 2)
			memset(text, 0, sizeof(text));
		CHECK(memcmp(b.target_bytes + i * 4096, text, sizeof(text)) == 0);
	}
	bench_destroy(&b);
}

/* A cancelled job stops reading, even if attempts are left. */
static void test_cancel(unsigned salvage, bool compressed, int at)
{
	struct imgc_error err = {0};
	struct bench b;
	size_t n;

	bench_create(&b, 1);
	if (compressed)
		compressed_rows(&b);
	b.options.salvage = salvage;
	b.source.bad_start = 0;
	b.source.bad_end = DISK_NBYTES;
	b.source.cancel_at = at;
	CHECK_EQ(run(&b, NULL, 0, &n, &err), IMGC_CANCELLED);
	CHECK_EQ(b.source.n_calls, at);
	bench_destroy(&b);

	bench_create(&b, 1);
	b.target.os_errno = EAGAIN;
	b.target.n_failing = 1000;
	b.target.cancel_at = 2;
	CHECK_EQ(run(&b, NULL, 0, &n, &err), IMGC_CANCELLED);
	CHECK_EQ(b.target.n_calls, 2);
	bench_destroy(&b);
}

/* Compares the source with the target, whose first reads are repeated. */
static int compare(struct bench *b, uint64_t difference, uint64_t *found, struct imgc_error *err)
{
	struct imgc_extent other = {0, DISK_NBYTES, 0, DISK_NBYTES, 1, IMGC_DATA, 0};
	struct imgc_batch batch = {.guest_end = DISK_NBYTES,
				   .extents = b->rows,
				   .n_extents = b->n_rows,
				   .base_extents = &other,
				   .n_base_extents = 1};
	struct imgc_source_file files[2] = {b->file, {&b->target.base, DISK_NBYTES, 0, 0}};
	struct imgc_job_options o = b->options;
	struct imgc_job *job;

	o.kind = IMGC_JOB_COMPARE;
	o.sources = files;
	o.n_sources = 2;
	memcpy(b->target_bytes, b->source_bytes, DISK_NBYTES);
	b->target_bytes[difference] ^= 1;
	b->target.os_errno = EIO;
	b->target.n_failing = 3;
	CHECK_EQ(imgc_job_create(&o, &job, err), IMGC_OK);
	CHECK_EQ(imgc_job_start(job, &batch, err), IMGC_OK);
	while (!imgc_job_wait(job, 50))
		;
	int status = imgc_job_finish(job, err);
	*found = imgc_job_first_difference(job);
	imgc_job_destroy(job);
	return status;
}

/*
 * A comparison ends with the lowest of differences and errors, a conversion with the
 * lowest error, whichever worker is first.  Here the workers in front are the slow
 * ones.
 */
static void test_the_first_in_order_wins(void)
{
	struct imgc_error err = {0};
	struct bench b;
	uint64_t found;
	size_t n;

	/* The second half fails at once. */
	bench_create(&b, 4);
	b.n_rows = 2;
	b.rows[0].length = b.rows[0].host_length = MIB;
	b.rows[1] = (struct imgc_extent){MIB, MIB, DISK_NBYTES, MIB, 0, IMGC_DATA, 0};
	b.file.nbytes = 2 * DISK_NBYTES; /* past the end */
	for (uint64_t at = 5; at < MIB; at += 256 * KIB) {
		CHECK_EQ(compare(&b, at, &found, &err), IMGC_OK);
		CHECK_EQ(found, at);
	}
	CHECK_EQ(compare(&b, MIB + 5, &found, &err), IMGC_PAST_END);

	/* The first half fails too, after a second. */
	b.source.bad_start = MIB - 1;
	b.source.bad_end = MIB;
	b.target.n_failing = 0;
	CHECK_EQ(run(&b, NULL, 0, &n, &err), IMGC_IO);
	CHECK_EQ(err.os_errno, EIO);
	bench_destroy(&b);
}

static void note(struct salvage *salvage, uint64_t piece, int os_errno)
{
	struct imgc_bad_range range = {piece * 4096, 4096, 0, os_errno};

	CHECK_EQ(imgc_salvage_add(salvage, range, NULL), IMGC_OK);
}

/* Two workers in one bad region add one range, in any order. */
static void test_list_is_joined(void)
{
	struct salvage salvage;
	const uint64_t n = 2 * IMGC_MAX_BAD_RANGES;

	CHECK_EQ(imgc_salvage_create(&salvage), IMGC_OK);
	for (uint64_t i = 0; i < n; i++) {
		note(&salvage, i, EIO);
		note(&salvage, 2 * n + 1 + i, EIO);
	}
	CHECK_EQ(salvage.n, 2);
	note(&salvage, 2 * n - 1, EIO);
	note(&salvage, 2 * n, EIO); /* joins two */
	CHECK_EQ(salvage.n, 2);
	note(&salvage, n + 1, 0);
	note(&salvage, n, 0); /* joins the next one only */
	CHECK_EQ(salvage.n, 3);
	CHECK_EQ(salvage.ranges[0].guest_offset, 0);
	CHECK_EQ(salvage.ranges[0].length, n * 4096);
	CHECK_EQ(salvage.ranges[1].guest_offset, n * 4096);
	CHECK_EQ(salvage.ranges[1].length, 2 * 4096);
	CHECK_EQ(salvage.ranges[1].os_errno, 0);
	CHECK_EQ(salvage.ranges[2].guest_offset, (2 * n - 1) * 4096);
	CHECK_EQ(salvage.ranges[2].length, (n + 2) * 4096);
	imgc_salvage_destroy(&salvage);
}

static void test_list_is_bounded(void)
{
	struct salvage salvage;
	struct imgc_error err = {0};

	CHECK_EQ(imgc_salvage_create(&salvage), IMGC_OK);
	for (uint64_t i = 0; i < IMGC_MAX_BAD_RANGES; i++) {
		struct imgc_bad_range range = {i * 8192, 4096, 0, EIO};

		CHECK_EQ(imgc_salvage_add(&salvage, range, &err), IMGC_OK);
	}
	struct imgc_bad_range next = {(IMGC_MAX_BAD_RANGES - 1) * 8192ull + 4096, 512, 0, EIO};
	struct imgc_bad_range more = {IMGC_MAX_BAD_RANGES * 8192ull, 512, 0, EIO};

	CHECK_EQ(imgc_salvage_add(&salvage, next, &err), IMGC_OK); /* joins the last one */
	CHECK_EQ(imgc_salvage_add(&salvage, more, &err), IMGC_TOO_MANY_BAD_RANGES);
	CHECK_EQ(salvage.n, IMGC_MAX_BAD_RANGES);
	imgc_salvage_destroy(&salvage);
}

int main(void)
{
	test_transient(1);
	test_transient(4);
	test_lasting();
	test_salvage(1);
	test_salvage(4);
	test_salvage_of_a_broken_block(0);
	test_salvage_of_a_broken_block(IMGC_EXTENT_GRAIN_MARKER);
	test_salvage_around_a_bad_sector();
	test_cancel(0, false, 2);
	test_cancel(1, false, 2);
	test_cancel(1, false, 7);
	test_cancel(1, true, 7);
	test_the_first_in_order_wins();
	test_list_is_joined();
	test_list_is_bounded();
	return 0;
}
