/*
 * test_base.c - conversions over a backing file: blocks equal to it are left out
 */
#include "tests/engine_util.h"

static void test_base(void)
{
	struct disk source = example_disk(), target = disk_create(2 * source.nbytes);
	struct imgc_source_file file;
	struct imgc_job_options o = convert_options(&source, &target, &file, 2);
	size_t n = (source.nbytes + 64 * KIB - 1) / (64 * KIB);
	struct imgc_placement *placements = calloc(n, sizeof(*placements));
	struct imgc_extent row = data_row(0, source.nbytes, 0);
	/*
	 * The base is the source, but for a hole in front and data where the source is
	 * zero.
	 */
	struct imgc_extent base[3] = {empty_row(0, 128 * KIB, IMGC_HOLE),
				      data_row(128 * KIB, 4 * MIB - 128 * KIB, 128 * KIB),
				      data_row(4 * MIB, source.nbytes - 4 * MIB, 0)};
	struct imgc_batch batch = {.guest_end = source.nbytes,
				   .extents = &row,
				   .n_extents = 1,
				   .base_extents = base,
				   .n_base_extents = 3,
				   .placements = placements,
				   .n_placements = n};
	struct imgc_error err = {0};
	struct imgc_job *job;

	CHECK(placements);
	o.geometry.placing = IMGC_PLACE_APPEND;
	CHECK_EQ(imgc_job_create(&o, &job, &err), IMGC_OK);
	CHECK_EQ(imgc_job_start(job, &batch, &err), IMGC_INVALID_ARGUMENT); /* unannounced */
	imgc_job_destroy(job);
	o.has_base = 1;
	CHECK_EQ(imgc_job_create(&o, &job, &err), IMGC_OK);
	CHECK_EQ(run_batch(job, &batch, &err), IMGC_OK);
	CHECK_EQ(placements[0].state, IMGC_BLOCK_STORED);
	CHECK_EQ(placements[1].state, IMGC_BLOCK_STORED);
	for (size_t i = 2; i < 64; i++)
		CHECK_EQ(placements[i].state, IMGC_BLOCK_ABSENT);
	for (size_t i = 64; i < 79; i++)
		CHECK_EQ(placements[i].state, IMGC_BLOCK_ZERO);
	CHECK_EQ(placements[79].state, IMGC_BLOCK_STORED);
	CHECK_EQ(imgc_job_next_offset(job), 4 * 64 * KIB);
	imgc_job_destroy(job);
	free(placements);
	disk_destroy(&source);
	disk_destroy(&target);
}

/* One byte of a block differs: this block is stored as a whole, and no other. */
static void test_base_of_large_blocks(unsigned n_threads)
{
	const uint64_t block = IMGC_MAX_BASE_BLOCK_NBYTES, nbytes = 5 * block + 512;
	struct disk source = disk_create(nbytes), target = disk_create(4 * block);
	struct imgc_source_file file;
	struct imgc_job_options o = convert_options(&source, &target, &file, n_threads);
	struct imgc_placement placements[6] = {{0}};
	/*
	 * Blocks 0 and 4 are holes on both sides, block 2 is a hole only in the base.
	 */
	struct imgc_extent rows[3] = {empty_row(0, block, IMGC_ZERO),
				      data_row(block, 3 * block, block),
				      empty_row(4 * block, block + 512, IMGC_HOLE)};
	struct imgc_extent base[4] = {empty_row(0, block, IMGC_HOLE), data_row(block, block, block),
				      empty_row(2 * block, block, IMGC_HOLE),
				      empty_row(3 * block, 2 * block + 512, IMGC_HOLE)};
	struct imgc_batch batch = {.guest_end = nbytes,
				   .extents = rows,
				   .n_extents = 3,
				   .base_extents = base,
				   .n_base_extents = 4,
				   .placements = placements,
				   .n_placements = 6};
	struct imgc_error err = {0};
	struct imgc_job *job;

	fill_random(source.bytes + block, block, 1);
	source.bytes[3 * block - 1] = 1;
	memset(target.bytes, 0xEE, target.nbytes);
	o.window_nbytes = 0;
	o.has_base = 1;
	o.next_offset = 4096;
	o.geometry.placing = IMGC_PLACE_APPEND;
	o.geometry.zero_policy = IMGC_ZERO_STORE;
	o.geometry.block_nbytes = block;
	o.geometry.stored_alignment = 512;
	o.geometry.stored_prefix_nbytes = 1024;
	o.geometry.stored_prefix_byte = 0xFF;
	CHECK_EQ(imgc_job_create(&o, &job, &err), IMGC_OK);
	CHECK_EQ(run_batch(job, &batch, &err), IMGC_OK);
	for (size_t i = 0; i < 6; i++)
		CHECK_EQ(placements[i].state, i == 2 ? IMGC_BLOCK_STORED : IMGC_BLOCK_ABSENT);
	CHECK_EQ(placements[2].host_offset, 4096 + 1024);
	CHECK_EQ(imgc_job_next_offset(job), 4096 + 1024 + block);
	CHECK(memcmp(target.bytes + 4096 + 1024, source.bytes + 2 * block, block) == 0);
	CHECK_EQ(target.bytes[4095], 0xEE);
	CHECK_EQ(target.bytes[4096 + 1024 + block], 0xEE);
	imgc_job_destroy(job);
	o.geometry.block_nbytes = 2 * block;
	CHECK_EQ(imgc_job_create(&o, &job, &err), IMGC_INVALID_ARGUMENT);
	o.geometry.block_nbytes = block;
	o.geometry.stored_prefix_nbytes = 0;
	o.geometry.placing = IMGC_PLACE_IDENTITY;
	CHECK_EQ(imgc_job_create(&o, &job, &err), IMGC_INVALID_ARGUMENT);
	disk_destroy(&source);
	disk_destroy(&target);
}

int main(void)
{
	test_base();
	test_base_of_large_blocks(1);
	test_base_of_large_blocks(4);
	return 0;
}
