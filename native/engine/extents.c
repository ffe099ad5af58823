/*
 * extents.c - the second, independent check of every row, and the search among rows
 */
#include "engine/extents.h"

#include "common/checked.h"
#include "common/error.h"

static bool kind_is_compressed(unsigned kind)
{
	return kind == IMGC_DEFLATE || kind == IMGC_ZLIB || kind == IMGC_ZSTD;
}

/* Whether a compressed row lies inside one block of its file, with a possible bound. */
static bool compressed_row_is_valid(const struct imgc_extent *row,
				    const struct imgc_source_file *file)
{
	uint64_t block = file->block_nbytes;

	if (block == 0 || block > MAX_SOURCE_BLOCK_NBYTES || row->guest_offset < file->guest_base)
		return false;
	uint64_t within = (row->guest_offset - file->guest_base) % block;
	uint64_t least = row->flags & IMGC_EXTENT_GRAIN_MARKER ? GRAIN_MARKER_NBYTES + 1 : 1;

	return row->length <= block - within && row->host_length >= least &&
	       row->host_length <= max_compressed_nbytes(block);
}

static bool row_is_valid(const struct imgc_extent *row, const struct imgc_source_file *files,
			 size_t n_files)
{
	if (row->kind == IMGC_HOLE || row->kind == IMGC_ZERO)
		return true;
	if (row->kind >= IMGC_N_KINDS || row->file >= n_files)
		return false;
	const struct imgc_source_file *file = &files[row->file];

	if (row->host_offset > file->nbytes || row->host_length > file->nbytes - row->host_offset)
		return false;
	if (kind_is_compressed(row->kind))
		return compressed_row_is_valid(row, file);
	return row->host_length == row->length;
}

int imgc_extents_check(const struct imgc_extent *extents, size_t n,
		       const struct imgc_source_file *files, size_t n_files, uint64_t guest_start,
		       uint64_t guest_end, struct imgc_error *err)
{
	uint64_t expected = guest_start;

	for (size_t i = 0; i < n; i++) {
		const struct imgc_extent *row = &extents[i];

		if (row->guest_offset != expected ||
		    (row->kind > IMGC_ZERO && expected % SECTOR_NBYTES != 0) || row->length == 0 ||
		    expected > guest_end || row->length > guest_end - expected ||
		    !row_is_valid(row, files, n_files))
			return imgc_fail_at(err, IMGC_OUT_OF_RANGE, i, "extent_check");
		expected += row->length;
	}
	if (expected != guest_end)
		return imgc_fail_at(err, IMGC_OUT_OF_RANGE, n, "extent_check");
	return IMGC_OK;
}

bool imgc_rows_have_unread(struct rows rows)
{
	for (size_t i = 0; i < rows.n; i++)
		if (imgc_row_is_unread(&rows.rows[i]))
			return true;
	return false;
}

size_t imgc_rows_find(struct rows rows, uint64_t guest_offset)
{
	size_t low = 0, high = rows.n;

	while (low < high) {
		size_t middle = low + (high - low) / 2;
		const struct imgc_extent *row = &rows.rows[middle];

		if (row->guest_offset + row->length <= guest_offset)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}
