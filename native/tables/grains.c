/*
 * grains.c - compressed grains that follow each other in a stream, found by their markers
 */
#include "common/checked.h"
#include "common/endian.h"
#include "imgc.h"

#define SECTOR_NBYTES 512u
/* An LBA, the number of compressed bytes, and of a marker of something else its type. */
#define MARKER_NBYTES 16u
#define NBYTES_OFFSET 8u
#define DATA_OFFSET 12u

size_t imgc_grains_walk(const struct imgc_grain_limits *limits, const void *bytes, size_t nbytes,
			uint64_t offset, uint64_t most_nbytes, struct imgc_grain *out,
			size_t capacity)
{
	const uint8_t *in = bytes;
	uint64_t at = 0, done = 0;
	size_t n = 0;

	if (limits->grain_nsectors == 0 || offset > INT64_MAX || nbytes > INT64_MAX)
		return 0;
	while (n < capacity && done < most_nbytes && at < nbytes && nbytes - at >= MARKER_NBYTES) {
		uint64_t lba = imgc_load_le64(in + at);
		uint32_t length = imgc_load_le32(in + at + NBYTES_OFFSET);
		uint64_t number = lba / limits->grain_nsectors;

		if (length == 0 || length > limits->max_nbytes ||
		    lba % limits->grain_nsectors != 0 || number >= limits->n_grains)
			break;
		uint64_t end = at + DATA_OFFSET + length;

		out[n++] = (struct imgc_grain){number, offset + at, offset + end};
		done += end - at;
		at = (end + SECTOR_NBYTES - 1) / SECTOR_NBYTES * SECTOR_NBYTES;
	}
	return n;
}
