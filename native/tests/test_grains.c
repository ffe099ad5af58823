/*
 * test_grains.c - grains of a stream by their markers
 */
#include "tests/test_util.h"

static const struct imgc_grain_limits limits = {
	.n_grains = 100, .grain_nsectors = 128, .max_nbytes = 1000};

static void put_marker(uint8_t *out, uint64_t lba, uint32_t nbytes)
{
	for (int i = 0; i < 8; i++)
		out[i] = (uint8_t)(lba >> (8 * i));
	for (int i = 0; i < 4; i++)
		out[8 + i] = (uint8_t)(nbytes >> (8 * i));
}

static size_t walk(const uint8_t *bytes, size_t nbytes, uint64_t most, struct imgc_grain *out,
		   size_t capacity)
{
	return imgc_grains_walk(&limits, bytes, nbytes, 4096, most, out, capacity);
}

int main(void)
{
	struct guarded g = guarded_alloc(4096);
	struct imgc_grain out[8];
	uint8_t *bytes = g.end - 3 * 512 - 16;

	memset(bytes, 0xff, 3 * 512 + 16);
	put_marker(bytes, 128 * 7, 500);      /* 512 bytes with its marker */
	put_marker(bytes + 512, 0, 501);      /* one more, so two sectors */
	put_marker(bytes + 3 * 512, 128, 10); /* the data is not there yet */
	CHECK_EQ(walk(bytes, 3 * 512 + 16, UINT64_MAX, out, 8), 3);
	CHECK_EQ(out[0].number, 7);
	CHECK_EQ(out[0].offset, 4096);
	CHECK_EQ(out[0].end, 4096 + 512);
	CHECK_EQ(out[1].number, 0);
	CHECK_EQ(out[1].end, 4096 + 512 + 513);
	CHECK_EQ(out[2].number, 1);
	CHECK_EQ(out[2].offset, 4096 + 3 * 512);
	CHECK_EQ(out[2].end, 4096 + 3 * 512 + 22);
	/* Where a marker is not whole, and where enough was found. */
	CHECK_EQ(walk(bytes, 3 * 512 + 15, UINT64_MAX, out, 8), 2);
	CHECK_EQ(walk(bytes, 15, UINT64_MAX, out, 8), 0);
	CHECK_EQ(walk(bytes, 0, UINT64_MAX, out, 8), 0);
	CHECK_EQ(walk(bytes, 3 * 512 + 16, UINT64_MAX, out, 2), 2);
	CHECK_EQ(walk(bytes, 3 * 512 + 16, 512, out, 8), 1);
	CHECK_EQ(walk(bytes, 3 * 512 + 16, 513, out, 8), 2);
	CHECK_EQ(walk(bytes, 3 * 512 + 16, 0, out, 8), 0);
	/* What is no grain: another marker, an odd sector, one outside, too many bytes. */
	put_marker(bytes + 512, 128, 0);
	CHECK_EQ(walk(bytes, 3 * 512 + 16, UINT64_MAX, out, 8), 1);
	put_marker(bytes + 512, 129, 10);
	CHECK_EQ(walk(bytes, 3 * 512 + 16, UINT64_MAX, out, 8), 1);
	put_marker(bytes + 512, 128 * 100, 10);
	CHECK_EQ(walk(bytes, 3 * 512 + 16, UINT64_MAX, out, 8), 1);
	put_marker(bytes + 512, UINT64_MAX / 128 * 128, 10);
	CHECK_EQ(walk(bytes, 3 * 512 + 16, UINT64_MAX, out, 8), 1);
	put_marker(bytes + 512, 128 * 99, 1001);
	CHECK_EQ(walk(bytes, 3 * 512 + 16, UINT64_MAX, out, 8), 1);
	put_marker(bytes + 512, 128 * 99, 1000);
	CHECK_EQ(walk(bytes, 3 * 512 + 16, UINT64_MAX, out, 8), 3);
	/* Limits that no image has. */
	struct imgc_grain_limits none = {.n_grains = 1, .max_nbytes = 1000};

	CHECK_EQ(imgc_grains_walk(&none, bytes, 16, 0, UINT64_MAX, out, 8), 0);
	CHECK_EQ(imgc_grains_walk(&limits, bytes, 16, UINT64_MAX, UINT64_MAX, out, 8), 0);
	guarded_free(&g);
	return 0;
}
