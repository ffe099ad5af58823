/*
 * places.c - the host offsets that a job would give to blocks that are not written yet
 */
#include <stdlib.h>

#include "common/checked.h"
#include "common/error.h"
#include "engine/placer.h"
#include "imgc.h"

struct imgc_places {
	struct imgc_geometry geometry;
	struct placer placer;
};

int imgc_places_create(const struct imgc_geometry *geometry, uint64_t next_offset,
		       struct imgc_places **out)
{
	if (geometry->placing != IMGC_PLACE_APPEND || geometry->group_nblocks != 0 ||
	    !imgc_is_power_of_two(geometry->block_nbytes) ||
	    !imgc_is_power_of_two(geometry->stored_alignment) ||
	    !imgc_is_power_of_two(geometry->compressed_alignment))
		return IMGC_INVALID_ARGUMENT;
	struct imgc_places *places = calloc(1, sizeof(*places));

	if (!places)
		return IMGC_NO_MEMORY;
	places->geometry = *geometry;
	imgc_placer_init(&places->placer, &places->geometry, next_offset);
	*out = places;
	return IMGC_OK;
}

void imgc_places_destroy(struct imgc_places *places)
{
	free(places);
}

static int give_place(struct imgc_places *places, uint64_t block, struct imgc_placement *row)
{
	const struct imgc_geometry *g = &places->geometry;
	uint64_t start;

	if (row->state == IMGC_BLOCK_COMPRESSED)
		return imgc_placer_compressed(&places->placer, block, row->length,
					      &row->host_offset);
	if (row->state != IMGC_BLOCK_STORED)
		return IMGC_OK;
	if (block > g->guest_nbytes / g->block_nbytes)
		return IMGC_INVALID_ARGUMENT;
	start = block * g->block_nbytes;
	row->length = (uint32_t)imgc_min_u64(g->block_nbytes, g->guest_nbytes - start);
	return imgc_placer_stored(&places->placer, block, row->length, &row->host_offset);
}

int imgc_places_give(struct imgc_places *places, uint64_t first_block, struct imgc_placement *rows,
		     size_t n, struct imgc_error *err)
{
	for (size_t i = 0; i < n; i++) {
		int status = give_place(places, first_block + i, &rows[i]);

		if (status)
			return imgc_fail(err, status, 0, places->placer.next, IMGC_TARGET, "place");
	}
	return IMGC_OK;
}

uint64_t imgc_places_next_offset(const struct imgc_places *places)
{
	return places->placer.next;
}

int imgc_places_set_next_offset(struct imgc_places *places, uint64_t next_offset)
{
	if (next_offset < places->placer.next || next_offset > INT64_MAX)
		return IMGC_INVALID_ARGUMENT;
	if (next_offset != places->placer.next)
		imgc_placer_restart(&places->placer, next_offset);
	return IMGC_OK;
}
