/* The engine over files that fail: for a moment, for good, in one place. */
#include "test_util.h"

#include <errno.h>
#include <stdatomic.h>

#include "common/error.h"
#include "engine/engine.h"

#define KIB 1024u
#define MIB (1024u * 1024)
#define DISK_NBYTES (2u * MIB)

/* A file in memory that fails the next calls, or wherever a range is touched. */
struct flaky_file {
	struct imgc_file base;
	struct imgc_file *inner;
	_Atomic int n_failing;
	_Atomic int n_calls;
	int os_errno;
	uint64_t bad_start, bad_end;
};

static int flaky_fail(struct flaky_file *file, uint64_t offset, uint64_t length,
		      struct imgc_error *err)
{
	atomic_fetch_add(&file->n_calls, 1);
	if (atomic_load(&file->n_failing) > 0) {
		atomic_fetch_sub(&file->n_failing, 1);
		return imgc_fail(err, IMGC_IO, file->os_errno, offset, IMGC_NO_SOURCE, "flaky");
	}
	if (offset < file->bad_end && offset + length > file->bad_start)
		return imgc_fail(err, IMGC_IO, EIO, offset, IMGC_NO_SOURCE, "flaky");
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
	struct imgc_extent row;
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
	b->row = (struct imgc_extent){0, DISK_NBYTES, 0, DISK_NBYTES, 0, IMGC_DATA, 0};
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

/* Runs the job; with `ranges`, copies up to `capacity` of what was lost. */
static int run(struct bench *b, struct imgc_bad_range *ranges, size_t capacity, size_t *n,
	       struct imgc_error *err)
{
	struct imgc_batch batch = {.guest_end = DISK_NBYTES, .extents = &b->row, .n_extents = 1};
	const struct imgc_bad_range *rows = NULL;
	struct imgc_job *job;
	int status;

	CHECK_EQ(imgc_job_create(&b->options, &job, err), IMGC_OK);
	CHECK_EQ(imgc_job_start(job, &batch, err), IMGC_OK);
	while (!imgc_job_wait(job, 50))
		;
	status = imgc_job_finish(job, err);
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

	/* Five times in all, and then it is an error. */
	bench_create(&b, 1);
	b.source.os_errno = EIO;
	b.source.n_failing = 1000;
	CHECK_EQ(run(&b, NULL, 0, &n, &err), IMGC_IO);
	CHECK_EQ(err.os_errno, EIO);
	CHECK_EQ(err.source, 0);
	CHECK_EQ(b.source.n_calls, 5);
	bench_destroy(&b);

	/* What was written in vain is not written again. */
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

static void test_salvage_of_a_broken_block(void)
{
	struct imgc_bad_range lost[8];
	struct imgc_error err = {0};
	struct bench b;
	size_t n;

	bench_create(&b, 2);
	b.row = (struct imgc_extent){0, 64 * KIB, 512, 9000, 0, IMGC_ZLIB, 0};
	struct imgc_extent rows[2] = {b.row,
				      {64 * KIB, DISK_NBYTES - 64 * KIB, 64 * KIB,
				       DISK_NBYTES - 64 * KIB, 0, IMGC_DATA, 0}};
	struct imgc_batch batch = {.guest_end = DISK_NBYTES, .extents = rows, .n_extents = 2};
	const struct imgc_bad_range *found = NULL;
	struct imgc_job *job;

	b.file.block_nbytes = 64 * KIB;
	b.options.salvage = 1;
	CHECK_EQ(imgc_job_create(&b.options, &job, &err), IMGC_OK);
	CHECK_EQ(imgc_job_start(job, &batch, &err), IMGC_OK);
	while (!imgc_job_wait(job, 50))
		;
	CHECK_EQ(imgc_job_finish(job, &err), IMGC_OK);
	n = imgc_job_bad_ranges(job, &found);
	CHECK_EQ(n, 1);
	lost[0] = found[0];
	CHECK_EQ(lost[0].guest_offset, 0);
	CHECK_EQ(lost[0].length, 64 * KIB);
	CHECK_EQ(lost[0].os_errno, 0);
	imgc_job_destroy(job);
	memset(b.source_bytes, 0, 64 * KIB);
	CHECK(memcmp(b.source_bytes, b.target_bytes, DISK_NBYTES) == 0);
	bench_destroy(&b);
}

static void test_list_is_bounded(void)
{
	struct salvage salvage = {.is_wanted = true};
	struct imgc_error err = {0};

	CHECK(pthread_mutex_init(&salvage.lock, NULL) == 0);
	salvage.lock_exists = true;
	for (uint64_t i = 0; i < IMGC_MAX_BAD_RANGES; i++) {
		struct imgc_bad_range range = {i * 8192, 4096, 0, EIO};

		CHECK_EQ(imgc_salvage_note(&salvage, range, &err), IMGC_OK);
	}
	struct imgc_bad_range next = {(IMGC_MAX_BAD_RANGES - 1) * 8192ull + 4096, 512, 0, EIO};
	struct imgc_bad_range more = {IMGC_MAX_BAD_RANGES * 8192ull, 512, 0, EIO};

	CHECK_EQ(imgc_salvage_note(&salvage, next, &err), IMGC_OK); /* joins the last one */
	CHECK_EQ(imgc_salvage_note(&salvage, more, &err), IMGC_LIMIT);
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
	test_salvage_of_a_broken_block();
	test_list_is_bounded();
	return 0;
}
