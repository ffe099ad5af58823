/*
 * test_placer.c - host offsets of an appending target: packing, groups, limits
 */
#include "engine/placer.h"
#include "tests/test_util.h"

#define KIB 1024u

static void test_placer_packs_around_stored_blocks(void)
{
	struct imgc_geometry g = {.block_nbytes = 64 * KIB,
				  .stored_alignment = 64 * KIB,
				  .compressed_alignment = 1,
				  .store_incompressible = 1};
	struct placer p;
	uint64_t at;

	imgc_placer_init(&p, &g, 3 * 64 * KIB);
	CHECK_EQ(imgc_placer_compressed(&p, 0, 40000, &at), IMGC_OK);
	CHECK_EQ(at, 3 * 64 * KIB);
	CHECK_EQ(imgc_placer_stored(&p, 1, 64 * KIB, &at), IMGC_OK);
	CHECK_EQ(at, 4 * 64 * KIB);
	/* Still fits into the rest of the first cluster. */
	CHECK_EQ(imgc_placer_compressed(&p, 2, 20000, &at), IMGC_OK);
	CHECK_EQ(at, 3 * 64 * KIB + 40000);
	/* Does not fit, and the next cluster is taken: starts a new one. */
	CHECK_EQ(imgc_placer_compressed(&p, 3, 60000, &at), IMGC_OK);
	CHECK_EQ(at, 5 * 64 * KIB);
	/* Crosses into the next cluster, which is free. */
	CHECK_EQ(imgc_placer_compressed(&p, 4, 60000, &at), IMGC_OK);
	CHECK_EQ(at, 5 * 64 * KIB + 60000);
	CHECK_EQ(p.next, 7 * 64 * KIB);
	/* The writer's tables end the packing. */
	imgc_placer_restart(&p, 9 * 64 * KIB);
	CHECK_EQ(imgc_placer_compressed(&p, 5, 10, &at), IMGC_OK);
	CHECK_EQ(at, 9 * 64 * KIB);
}

static void test_placer_leaves_gaps_for_tables(void)
{
	struct imgc_geometry g = {.block_nbytes = 64 * KIB,
				  .stored_alignment = 512,
				  .compressed_alignment = 512,
				  .group_nblocks = 4,
				  .group_gap_nbytes = 2560};
	struct placer p;
	uint64_t at;

	imgc_placer_init(&p, &g, 65536);
	CHECK_EQ(imgc_placer_close_group(&p), IMGC_OK);
	CHECK_EQ(p.next, 65536); /* nothing placed, no gap */
	CHECK_EQ(imgc_placer_compressed(&p, 1, 700, &at), IMGC_OK);
	CHECK_EQ(at, 65536);
	CHECK_EQ(imgc_placer_compressed(&p, 2, 100, &at), IMGC_OK);
	CHECK_EQ(at, 65536 + 1024);
	/* Group 1 stays empty: one gap only. */
	CHECK_EQ(imgc_placer_compressed(&p, 9, 100, &at), IMGC_OK);
	CHECK_EQ(at, 65536 + 1536 + 2560);
	CHECK_EQ(imgc_placer_close_group(&p), IMGC_OK);
	CHECK_EQ(p.next, 65536 + 1536 + 2560 + 512 + 2560);
	CHECK_EQ(imgc_placer_stored(&p, 12, UINT64_MAX - 600, &at), IMGC_LIMIT);
}

int main(void)
{
	test_placer_packs_around_stored_blocks();
	test_placer_leaves_gaps_for_tables();
	return 0;
}
