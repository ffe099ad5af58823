/*
 * source.h - from extents to bytes in memory
 */
#ifndef IMGC_ENGINE_SOURCE_H
#define IMGC_ENGINE_SOURCE_H

#include <stdbool.h>

#include "engine/extents.h"
#include "engine/reuse.h"
#include "engine/salvage.h"
#include "engine/stop.h"
#include "io/io.h"

struct range {
	uint64_t start, end; /* relative to the window */
};

/* One side of a window: its bytes, and which of them are data. */
struct view {
	uint8_t *data;
	struct range *ranges; /* ascending, disjoint, not adjacent */
	size_t n_ranges;
};

#define IMGC_READ_WAITS 1

/* A worker's means of reading.  All but `stop`, `salvage` and `files` are its own. */
struct reader {
	const struct stop *stop;
	struct salvage *salvage; /* NULL: a range that cannot be read is an error */
	const struct imgc_source_file *files;
	struct imgc_io_context *io;
	struct imgc_decompressor *decompressor;
	uint8_t *compressed; /* bytes of several neighbouring blocks */
	uint64_t compressed_capacity;
	uint8_t *block; /* one decompressed block of which a part is wanted */
	uint64_t bytes_read;
	bool leaves_unread; /* imgc_reader_fill() leaves out unread rows */
	bool in_caller;	    /* imgc_reader_fill() may be IMGC_READ_WAITS */
};

/* Where the block of a compressed row starts in the disk. */
static inline uint64_t imgc_row_block(const struct imgc_extent *row,
				      const struct imgc_source_file *file)
{
	return row->guest_offset - (row->guest_offset - file->guest_base) % file->block_nbytes;
}

/* The codec of a compressed row. */
unsigned imgc_row_codec(const struct imgc_extent *row);

/*
 * `in` holds what is stored for a compressed row, at least GRAIN_MARKER_NBYTES.  Steps
 * over its grain marker, if it has one, after which *nbytes is exact.
 */
int imgc_row_skip_marker(const struct imgc_extent *row, const struct imgc_source_file *file,
			 const uint8_t **in, uint64_t *nbytes, struct imgc_error *err);

/*
 * Reads every DATA and compressed byte of guest range [start, end) into the view.
 * Bytes that are no data are left as they are; imgc_view_materialise() makes them
 * zeros.  `reuse`, if not NULL, receives the compressed blocks that the target can have
 * as they are; the view has no bytes of those that are trusted.
 *
 * IMGC_READ_WAITS: the calling thread works, and a stream has no bytes yet.  The same call
 * again goes on.
 */
int imgc_reader_fill(struct reader *reader, struct rows rows, uint64_t start, uint64_t end,
		     struct view *view, struct reuse *reuse, struct imgc_error *err);

/* Reads the unread rows of guest range [start, end) to `data`, and nothing else of it. */
int imgc_reader_fetch(struct reader *reader, struct rows rows, uint64_t start, uint64_t end,
		      uint8_t *data, struct imgc_error *err);

/* Writes zeros into [start, end) of the view wherever it holds no data. */
void imgc_view_materialise(const struct view *view, uint64_t start, uint64_t end);

/* Whether any data lies in [start, end). */
bool imgc_view_has_data(const struct view *view, uint64_t start, uint64_t end);

/* Says that [start, end) of the view, whose bytes are zeros, is no data. */
void imgc_view_drop(struct view *view, uint64_t start, uint64_t end);

#endif /* IMGC_ENGINE_SOURCE_H */
