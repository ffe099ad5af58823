/*
 * test_reflink.c - data of a source that is reflinked instead of written
 */
#include <limits.h>
#include <stdatomic.h>

#include "io/io.h"
#include "tests/engine_util.h"

static atomic_uint n_reflink_calls, n_reflinks_allowed;

/* Has the effect of a reflink on the bytes. */
static bool reflink_by_copying(struct imgc_file *file, uint64_t offset, struct imgc_file *source,
			       uint64_t source_offset, uint64_t length)
{
	struct iovec iov = {malloc(length), length};
	struct imgc_io_request request = {source_offset, iov.iov_base, length};

	CHECK_EQ((offset | source_offset | length) % 4096, 0);
	CHECK(length > 0);
	bool allowed = atomic_fetch_add(&n_reflink_calls, 1) < atomic_load(&n_reflinks_allowed);

	if (allowed) {
		CHECK_EQ(imgc_file_read(source, NULL, &request, 1, NULL), IMGC_OK);
		CHECK_EQ(imgc_file_write(file, &iov, 1, offset, NULL), IMGC_OK);
	}
	free(iov.iov_base);
	return allowed;
}

/*
 * Compares a row's data with its place in the target, which blocks of zeros do not have;
 * no placements: its identity place.
 */
static void check_row(const struct disk *source, const struct disk *target,
		      const struct imgc_extent *row, const struct imgc_placement *placements)
{
	for (uint64_t at = 0; row->kind == IMGC_DATA && at < row->length; at += KIB) {
		uint64_t guest = row->guest_offset + at, place = 4096 + guest;

		if (placements && placements[guest / (64 * KIB)].state == IMGC_BLOCK_ABSENT) {
			CHECK(imgc_is_zero(0, source->bytes + row->host_offset + at, KIB));
			continue;
		}
		if (placements)
			place = placements[guest / (64 * KIB)].host_offset + guest % (64 * KIB);
		CHECK(memcmp(target->bytes + place, source->bytes + row->host_offset + at, KIB) ==
		      0);
	}
}

/*
 * Converts 4 MiB with a hole and a range of zeros inside, stored from source_shift on,
 * and checks the target's content.  `flags` are those of all data.
 */
static struct imgc_progress convert_by_reflinks(uint64_t source_shift, uint32_t placing,
						unsigned n_allowed, unsigned n_threads,
						uint16_t flags)
{
	struct disk source = disk_create(5 * MIB), target = disk_create(6 * MIB);
	struct imgc_file_ops ops = *source.file->ops;
	struct imgc_placement placements[64] = {0};
	struct imgc_progress progress;
	struct imgc_error err = {0};
	struct imgc_job *job;

	fill_random(source.bytes, source.nbytes, 5);
	memset(target.bytes, 0, target.nbytes);
	ops.reflink = reflink_by_copying;
	source.file->ops = target.file->ops = &ops;
	source.file->reflink_block_nbytes = 512;
	target.file->reflink_block_nbytes = 4096; /* the larger one counts */
	atomic_store(&n_reflink_calls, 0);
	atomic_store(&n_reflinks_allowed, n_allowed);

	struct imgc_extent rows[] = {
		data_row(0, MIB + 1024, source_shift),
		empty_row(MIB + 1024, 63 * KIB, IMGC_HOLE),
		data_row(MIB + 64 * KIB, 2 * MIB, source_shift + 2 * MIB),
		empty_row(3 * MIB + 64 * KIB, 64 * KIB, IMGC_ZERO),
		data_row(3 * MIB + 128 * KIB, 896 * KIB, source_shift + 3 * MIB),
	};
	size_t n_rows = sizeof(rows) / sizeof(rows[0]);

	for (size_t i = 0; i < n_rows; i++)
		rows[i].flags = rows[i].kind == IMGC_DATA ? flags : 0;
	/* Zeros inside data: only what is read is tested for them. */
	memset(source.bytes + source_shift + 2 * MIB, 0, MIB);

	struct imgc_source_file file;
	struct imgc_job_options options = convert_options(&source, &target, &file, n_threads);
	struct imgc_batch batch = {.guest_end = 4 * MIB, .extents = rows, .n_extents = n_rows};

	options.reflink = 1;
	options.geometry.guest_nbytes = 4 * MIB;
	options.geometry.placing = placing;
	options.geometry.block_nbytes = 64 * KIB;
	options.geometry.stored_alignment = 4096;
	options.geometry.sparse_nbytes = 4096;
	options.geometry.host_base = placing == IMGC_PLACE_IDENTITY ? 4096 : 0;
	options.next_offset = 4096;
	if (placing == IMGC_PLACE_APPEND) {
		batch.placements = placements;
		batch.n_placements = 64;
	}
	CHECK_EQ(imgc_job_create(&options, &job, &err), IMGC_OK);
	CHECK_EQ(run_batch(job, &batch, &err), IMGC_OK);
	imgc_job_progress(job, &progress);
	for (size_t i = 0; i < n_rows; i++)
		check_row(&source, &target, &rows[i], batch.placements);
	imgc_job_destroy(job);
	disk_destroy(&source);
	disk_destroy(&target);
	return progress;
}

static uint64_t reflink(uint64_t source_shift, uint32_t placing, unsigned n_allowed,
			unsigned n_threads)
{
	struct imgc_progress progress =
		convert_by_reflinks(source_shift, placing, n_allowed, n_threads, 0);

	CHECK(progress.bytes_reflinked + progress.bytes_written >= 3 * MIB - 128 * KIB);
	return progress.bytes_reflinked;
}

static void test_reflink(void)
{
	uint64_t data = 3 * MIB - 128 * KIB;

	for (unsigned n_threads = 1; n_threads <= 4; n_threads += 3) {
		CHECK_EQ(reflink(0, IMGC_PLACE_IDENTITY, UINT_MAX, n_threads), data);
		CHECK_EQ(reflink(8192, IMGC_PLACE_APPEND, UINT_MAX, n_threads), data);
		/* No place differs by whole blocks: no reflink is tried. */
		CHECK_EQ(reflink(512, IMGC_PLACE_IDENTITY, UINT_MAX, n_threads), 0);
		CHECK_EQ(atomic_load(&n_reflink_calls), 0);
		/* Refused at once, or later: the rest is written. */
		CHECK_EQ(reflink(0, IMGC_PLACE_APPEND, 0, n_threads), 0);
		CHECK(atomic_load(&n_reflink_calls) <= n_threads);
		CHECK(reflink(0, IMGC_PLACE_IDENTITY, 2, n_threads) <= MIB);
	}
}

/* 1 KiB after 1 MiB is less than a file system's block. */
static void test_unread(void)
{
	uint64_t data = 4 * MIB - 128 * KIB + 1 * KIB, unaligned = 1 * KIB;

	for (unsigned n_threads = 1; n_threads <= 4; n_threads += 3) {
		for (uint32_t placing = IMGC_PLACE_IDENTITY; placing <= IMGC_PLACE_APPEND;
		     placing++) {
			struct imgc_progress p = convert_by_reflinks(0, placing, UINT_MAX,
								     n_threads, IMGC_EXTENT_UNREAD);

			CHECK_EQ(p.bytes_reflinked, data - unaligned);
			CHECK_EQ(p.bytes_read, unaligned);
			CHECK_EQ(p.bytes_written, unaligned);
			CHECK_EQ(p.bytes_data,
				 4 * MIB - (placing == IMGC_PLACE_APPEND ? 64 * KIB : 127 * KIB));
			/* At most one call for each run and window boundary around it. */
			CHECK(atomic_load(&n_reflink_calls) <= 7);
			/* Refused, or not possible: all of it is read and written. */
			p = convert_by_reflinks(0, placing, 1, n_threads, IMGC_EXTENT_UNREAD);
			CHECK_EQ(p.bytes_read + p.bytes_reflinked, data);
			CHECK_EQ(p.bytes_written, p.bytes_read);
			p = convert_by_reflinks(512, placing, UINT_MAX, n_threads,
						IMGC_EXTENT_UNREAD);
			CHECK_EQ(p.bytes_reflinked, 0);
			CHECK_EQ(p.bytes_read, data);
		}
	}
}

int main(void)
{
	test_reflink();
	test_unread();
	return 0;
}
