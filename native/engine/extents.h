/*
 * extents.h - the rows of a batch, and what a compressed row may hold
 */
#ifndef IMGC_ENGINE_EXTENTS_H
#define IMGC_ENGINE_EXTENTS_H

#include <stdbool.h>

#include "imgc.h"

#define SECTOR_NBYTES 512u
#define GRAIN_MARKER_NBYTES 12u
#define MAX_SOURCE_BLOCK_NBYTES (2u * 1024 * 1024)

/*
 * Upper bound of a compressed block's stored bytes: two grains in a VMDK, two clusters
 * in a QCOW2.
 */
static inline uint64_t max_compressed_nbytes(uint64_t block_nbytes)
{
	return 2 * block_nbytes + SECTOR_NBYTES;
}

struct rows {
	const struct imgc_extent *rows;
	size_t n;
};

static inline bool imgc_row_is_unread(const struct imgc_extent *row)
{
	return row->kind == IMGC_DATA && row->flags & IMGC_EXTENT_UNREAD;
}

bool imgc_rows_have_unread(struct rows rows);

/* Index of the row that holds guest_offset; rows.n if there is none. */
size_t imgc_rows_find(struct rows rows, uint64_t guest_offset);

#endif /* IMGC_ENGINE_EXTENTS_H */
