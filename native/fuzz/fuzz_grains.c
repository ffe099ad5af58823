/*
 * fuzz_grains.c - grains of a stream by their markers
 */
#include "fuzz/fuzz_util.h"

#define MAX_GRAINS 64

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t nbytes)
{
	struct input in = {data, nbytes};
	struct imgc_grain_limits limits = {
		.n_grains = take_uint(&in, 3),
		.grain_nsectors = (uint32_t)take_uint(&in, 1),
		.max_nbytes = (uint32_t)take_uint(&in, 3),
	};
	uint64_t offset = take_uint(&in, 4) * 512, most = take_uint(&in, 3), done = 0;
	size_t capacity = take_u8(&in) % MAX_GRAINS;
	uint64_t next = offset;
	struct imgc_grain *out = malloc((capacity ? capacity : 1) * sizeof(*out));

	REQUIRE(out != NULL);
	size_t n = imgc_grains_walk(&limits, in.data, in.nbytes, offset, most, out, capacity);

	REQUIRE(n <= capacity);
	for (size_t i = 0; i < n; i++) {
		REQUIRE(done < most);
		REQUIRE(out[i].offset == next && out[i].number < limits.n_grains);
		REQUIRE(out[i].offset - offset + 16 <= in.nbytes);
		REQUIRE(out[i].end > out[i].offset + 12);
		REQUIRE(out[i].end - out[i].offset - 12 <= limits.max_nbytes);
		done += out[i].end - out[i].offset;
		next = (out[i].end + 511) / 512 * 512;
	}
	free(out);
	return 0;
}
