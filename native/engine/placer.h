/*
 * placer.h - host offsets of an appending target
 */
#ifndef IMGC_ENGINE_PLACER_H
#define IMGC_ENGINE_PLACER_H

#include <stdbool.h>

#include "imgc.h"

/* Gives out host offsets in guest order.  No I/O, no locks. */
struct placer {
	const struct imgc_geometry *geometry;
	uint64_t next;	      /* everything from here on is free */
	uint64_t packed_next; /* compressed blocks are packed from here ... */
	uint64_t packed_end;  /* ... to here; both 0: no room has been taken yet */
	uint64_t open_block;  /* a block larger than a window that has its place */
	uint64_t open_offset;
	bool block_is_open;
	uint64_t group; /* group of the last placed block */
	bool group_is_open;
};

void imgc_placer_init(struct placer *placer, const struct imgc_geometry *geometry, uint64_t next);

/* Both give *host_offset, or IMGC_LIMIT if the file would grow past INT64_MAX. */
int imgc_placer_stored(struct placer *placer, uint64_t block, uint64_t nbytes,
		       uint64_t *host_offset);
int imgc_placer_compressed(struct placer *placer, uint64_t block, uint64_t nbytes,
			   uint64_t *host_offset);

/*
 * The block that is open, of which nothing follows yet, has `nbytes` bytes instead of
 * old_nbytes.
 */
void imgc_placer_shrink(struct placer *placer, uint64_t old_nbytes, uint64_t nbytes);

/* The batch ends with a group: leaves room for the group's table. */
int imgc_placer_close_group(struct placer *placer);

/* The caller has used the space up to `next`; packing starts again there. */
void imgc_placer_restart(struct placer *placer, uint64_t next);

#endif /* IMGC_ENGINE_PLACER_H */
