/*
 * test_ring.c - the ring of windows between files that are faster or slower than it
 */
#include <stdatomic.h>
#include <time.h>

#include "common/checked.h"
#include "io/io.h"
#include "tests/engine_util.h"

/* A disk in memory whose calls take their time. */
struct slow_file {
	struct imgc_file base;
	struct imgc_file *inner;
	long read_ns, write_ns;
	_Atomic unsigned n_writing, most_writing;
};

static void pass_time(long ns)
{
	struct timespec time = {0, ns};

	if (ns > 0)
		nanosleep(&time, NULL);
}

static int slow_read(struct imgc_file *base, struct imgc_io_context *ctx,
		     const struct imgc_io_request *requests, size_t n, struct imgc_error *err)
{
	struct slow_file *file = (struct slow_file *)base;

	pass_time(file->read_ns);
	return imgc_file_read(file->inner, ctx, requests, n, err);
}

static int slow_write(struct imgc_file *base, const struct iovec *iov, int n_iov, uint64_t offset,
		      struct imgc_error *err)
{
	struct slow_file *file = (struct slow_file *)base;
	unsigned now = atomic_fetch_add(&file->n_writing, 1) + 1;
	unsigned most = atomic_load(&file->most_writing);

	while (now > most && !atomic_compare_exchange_weak(&file->most_writing, &most, now))
		;
	pass_time(file->write_ns);
	int status = imgc_file_write(file->inner, iov, n_iov, offset, err);

	atomic_fetch_sub(&file->n_writing, 1);
	return status;
}

static const struct imgc_file_ops slow_ops = {.read = slow_read, .write = slow_write};

/* Converts a disk; `serial` targets must see one write at a time. */
static void test_paces(unsigned n_threads, bool serial, long read_ns, long write_ns)
{
	struct disk source = example_disk(), target = disk_create(source.nbytes + MIB);
	struct slow_file slow[2] = {
		{.base.ops = &slow_ops, .inner = source.file, .read_ns = read_ns},
		{.base = {.ops = &slow_ops, .writes_are_serial = serial},
		 .inner = target.file,
		 .write_ns = write_ns},
	};
	struct imgc_source_file file;
	struct imgc_job_options o = convert_options(&source, &target, &file, n_threads);
	struct imgc_extent row = data_row(0, source.nbytes, 0);
	size_t n = (source.nbytes + o.geometry.block_nbytes - 1) / o.geometry.block_nbytes;
	struct imgc_placement *placements = calloc(n, sizeof(*placements));

	CHECK(placements);
	file.file = &slow[0].base;
	o.target = &slow[1].base;
	o.window_nbytes = 64 * KIB;
	o.geometry.placing = IMGC_PLACE_APPEND;
	convert(&o, &row, 1, placements, n);
	CHECK_EQ(atomic_load(&slow[1].n_writing), 0);
	CHECK(atomic_load(&slow[1].most_writing) <= (serial ? 1 : n_threads));
	check_readback(&source, &target, &o.geometry, placements, n);
	free(placements);
	disk_destroy(&source);
	disk_destroy(&target);
}

/* Batches that have more and fewer workers than those before write the same. */
static void test_workers_come_and_go(void)
{
	static const uint32_t n_threads[] = {1, 4, 2, 0, 1, 8, 3};
	struct disk source = example_disk(), target = disk_create(source.nbytes + MIB);
	struct imgc_source_file file;
	struct imgc_job_options o = convert_options(&source, &target, &file, 8);
	uint64_t block = o.geometry.block_nbytes, n = source.nbytes / block;
	struct imgc_placement *placements = calloc(n + 1, sizeof(*placements));
	struct imgc_job *job;
	struct imgc_error err;
	uint64_t start = 0;

	CHECK(placements);
	o.window_nbytes = 64 * KIB;
	o.geometry.placing = IMGC_PLACE_APPEND;
	CHECK_EQ(imgc_job_create(&o, &job, &err), IMGC_OK);
	for (unsigned i = 0; start < source.nbytes; i++) {
		uint64_t end = imgc_min_u64(start + (1 + i % 5) * 4 * block, source.nbytes);
		struct imgc_extent row = data_row(start, end - start, start);
		struct imgc_batch batch = {.guest_start = start,
					   .guest_end = end,
					   .extents = &row,
					   .n_extents = 1,
					   .placements = placements + start / block,
					   .n_placements = (end - start + block - 1) / block,
					   .n_threads = n_threads[i % 7]};

		CHECK_EQ(run_batch(job, &batch, &err), IMGC_OK);
		start = end;
	}
	struct imgc_batch many = {.guest_end = block, .n_threads = 9};

	CHECK_EQ(imgc_job_start(job, &many, &err), IMGC_INVALID_ARGUMENT);
	imgc_job_destroy(job);
	check_readback(&source, &target, &o.geometry, placements,
		       (source.nbytes + block - 1) / block);
	free(placements);
	disk_destroy(&source);
	disk_destroy(&target);
}

int main(void)
{
	static const unsigned threads[4] = {1, 2, 3, 8};

	for (int i = 0; i < 4; i++) {
		for (int serial = 0; serial < 2; serial++) {
			test_paces(threads[i], serial, 0, 0);
			test_paces(threads[i], serial, 0, 200000);
			test_paces(threads[i], serial, 200000, 0);
			test_paces(threads[i], serial, 100000, 100000);
		}
	}
	test_workers_come_and_go();
	return 0;
}
