/*
 * placer.c - host offsets of an appending target
 */
#include "engine/placer.h"

#include "common/checked.h"
#include "engine/extents.h"

void imgc_placer_init(struct placer *placer, const struct imgc_geometry *geometry, uint64_t next)
{
	*placer = (struct placer){.geometry = geometry, .next = next};
}

void imgc_placer_restart(struct placer *placer, uint64_t next)
{
	placer->next = next;
	placer->packed_next = placer->packed_end = 0;
	placer->block_is_open = false;
}

int imgc_placer_close_group(struct placer *placer)
{
	const struct imgc_geometry *g = placer->geometry;
	uint64_t gap;

	if (g->group_nblocks == 0 || !placer->group_is_open)
		return IMGC_OK;
	placer->group_is_open = false;
	if (!imgc_align_up_checked(placer->next, SECTOR_NBYTES, &gap) ||
	    gap > UINT64_MAX - g->group_gap_nbytes)
		return IMGC_LIMIT;
	placer->next = gap + g->group_gap_nbytes;
	return IMGC_OK;
}

static int enter_group(struct placer *placer, uint64_t block)
{
	if (placer->geometry->group_nblocks == 0)
		return IMGC_OK;
	uint64_t group = block / placer->geometry->group_nblocks;

	if (placer->group_is_open && placer->group != group && imgc_placer_close_group(placer))
		return IMGC_LIMIT;
	placer->group = group;
	placer->group_is_open = true;
	return IMGC_OK;
}

static int take(struct placer *placer, uint64_t alignment, uint64_t nbytes, uint64_t *host_offset)
{
	uint64_t start;

	if (!imgc_align_up_checked(placer->next, alignment, &start) || nbytes > INT64_MAX ||
	    start > (uint64_t)INT64_MAX - nbytes)
		return IMGC_LIMIT;
	placer->next = start + nbytes;
	*host_offset = start;
	return IMGC_OK;
}

int imgc_placer_stored(struct placer *placer, uint64_t block, uint64_t nbytes,
		       uint64_t *host_offset)
{
	uint64_t alignment = placer->geometry->stored_alignment, whole;

	if (enter_group(placer, block) || !imgc_align_up_checked(nbytes, alignment, &whole) ||
	    !imgc_add_checked(placer->next, placer->geometry->stored_prefix_nbytes, &placer->next))
		return IMGC_LIMIT;
	return take(placer, alignment, whole, host_offset);
}

void imgc_placer_shrink(struct placer *placer, uint64_t old_nbytes, uint64_t nbytes)
{
	uint64_t mask = placer->geometry->stored_alignment - 1;

	if (placer->next == placer->open_offset + ((old_nbytes + mask) & ~mask))
		placer->next = placer->open_offset + ((nbytes + mask) & ~mask);
}

/*
 * Stored and compressed blocks mix (QCOW2): takes whole allocation units, and packs
 * blocks into them.  A block may reach into the next unit if that is free.  A stored
 * block between two compressed ones does not waste the rest of a unit, unless offsets
 * must ascend.
 */
static int take_packed(struct placer *placer, uint64_t nbytes, uint64_t *host_offset)
{
	uint64_t unit = placer->geometry->stored_alignment;
	uint64_t start = placer->packed_next, free_nbytes = placer->packed_end - start;
	uint64_t more, ignored;

	bool is_behind = placer->packed_end != placer->next;

	if (start == 0 ||
	    (is_behind && (free_nbytes < nbytes || placer->geometry->packs_in_order))) {
		if (!imgc_align_up_checked(placer->next, unit, &start))
			return IMGC_LIMIT;
		placer->next = placer->packed_end = start;
		free_nbytes = 0;
	}
	if (free_nbytes < nbytes) {
		if (!imgc_align_up_checked(nbytes - free_nbytes, unit, &more) ||
		    take(placer, unit, more, &ignored))
			return IMGC_LIMIT;
		placer->packed_end = placer->next;
	}
	placer->packed_next = start + nbytes;
	*host_offset = start;
	return IMGC_OK;
}

int imgc_placer_compressed(struct placer *placer, uint64_t block, uint64_t nbytes,
			   uint64_t *host_offset)
{
	if (enter_group(placer, block))
		return IMGC_LIMIT;
	if (placer->geometry->store_incompressible)
		return take_packed(placer, nbytes, host_offset);
	return take(placer, placer->geometry->compressed_alignment, nbytes, host_offset);
}
