/* From extents to bytes in a window. */
#include "engine/engine.h"

#include <string.h>

#include "common/checked.h"
#include "common/endian.h"
#include "common/error.h"

/* ------------------------------------------------------------------- views */

static void view_add(struct view *view, uint64_t start, uint64_t end)
{
	if (view->n_ranges > 0 && view->ranges[view->n_ranges - 1].end == start)
		view->ranges[view->n_ranges - 1].end = end;
	else
		view->ranges[view->n_ranges++] = (struct range){start, end};
}

/* The first range that ends after `offset`. */
static size_t view_find(const struct view *view, uint64_t offset)
{
	size_t low = 0, high = view->n_ranges;

	while (low < high) {
		size_t middle = low + (high - low) / 2;

		if (view->ranges[middle].end <= offset)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

bool imgc_view_has_data(const struct view *view, uint64_t start, uint64_t end)
{
	size_t i = view_find(view, start);

	return i < view->n_ranges && view->ranges[i].start < end;
}

void imgc_view_materialise(const struct view *view, uint64_t start, uint64_t end)
{
	for (size_t i = view_find(view, start); start < end; i++) {
		uint64_t data = i < view->n_ranges ? imgc_min_u64(view->ranges[i].start, end) : end;

		if (data > start)
			memset(view->data + start, 0, data - start);
		if (i >= view->n_ranges)
			break;
		start = imgc_max_u64(start, view->ranges[i].end);
	}
}

/* ------------------------------------------------------------ plain extents */

/* Reads of one file that go to the kernel together. */
struct pending {
	struct imgc_io_request requests[MAX_READ_REQUESTS];
	size_t n;
	uint32_t file;
	const uint8_t *window; /* where the buffers lie, */
	uint64_t start;	       /* and which guest byte that is */
};

/* Some of these could not be read: takes what can be had. */
static int pending_salvage(struct reader *reader, const struct pending *pending,
			   struct imgc_error *err)
{
	for (size_t i = 0; i < pending->n; i++) {
		const struct imgc_io_request *request = &pending->requests[i];
		uint64_t within = (uint64_t)((const uint8_t *)request->buffer - pending->window);
		int status = imgc_salvage_read(reader, pending->file, request,
					       pending->start + within, err);

		if (status)
			return status;
	}
	return IMGC_OK;
}

static int pending_flush(struct reader *reader, struct pending *pending, struct imgc_error *err)
{
	if (pending->n == 0)
		return IMGC_OK;
	int status = imgc_read_patiently(reader, pending->file, pending->requests, pending->n, err);
	if (status == IMGC_IO && reader->salvage)
		status = pending_salvage(reader, pending, err);
	pending->n = 0;
	return status;
}

static int pending_add(struct reader *reader, struct pending *pending, uint32_t file,
		       uint64_t offset, uint8_t *buffer, uint64_t length, struct imgc_error *err)
{
	reader->bytes_read += length;
	if (pending->n > 0 && pending->file == file) {
		struct imgc_io_request *last = &pending->requests[pending->n - 1];

		if (last->offset + last->length == offset &&
		    (uint8_t *)last->buffer + last->length == buffer) {
			last->length += length;
			return IMGC_OK;
		}
	}
	if (pending->n == MAX_READ_REQUESTS || (pending->n > 0 && pending->file != file)) {
		int status = pending_flush(reader, pending, err);
		if (status)
			return status;
	}
	pending->file = file;
	pending->requests[pending->n++] = (struct imgc_io_request){offset, buffer, length};
	return IMGC_OK;
}

/* ------------------------------------------------------- compressed extents */

static unsigned codec_of(unsigned kind)
{
	if (kind == IMGC_DEFLATE)
		return IMGC_CODEC_DEFLATE;
	return kind == IMGC_ZLIB ? IMGC_CODEC_ZLIB : IMGC_CODEC_ZSTD;
}

/* Steps over a grain marker that says what the row says. */
static bool skip_grain_marker(const uint8_t **in, uint64_t *nbytes, uint64_t block_start)
{
	if (*nbytes <= GRAIN_MARKER_NBYTES || imgc_load_le64(*in) != block_start / SECTOR_NBYTES)
		return false;
	uint64_t stored = imgc_load_le32(*in + 8);

	if (stored == 0 || stored > *nbytes - GRAIN_MARKER_NBYTES)
		return false;
	*in += GRAIN_MARKER_NBYTES;
	*nbytes = stored;
	return true;
}

/*
 * Decompresses the block of one row into its place in the window.  `in` holds the
 * row's host_length bytes.  A whole block goes straight to its place; of others the
 * wanted part is copied.
 */
static int decompress_row(struct reader *reader, const struct imgc_extent *row, const uint8_t *in,
			  uint64_t start, uint64_t end, struct view *view, struct imgc_error *err)
{
	const struct imgc_source_file *file = &reader->files[row->file];
	uint64_t block = file->block_nbytes, in_nbytes = row->host_length;
	uint64_t within = (row->guest_offset - file->guest_base) % block;
	unsigned codec = codec_of(row->kind);
	int status;

	if (row->flags & IMGC_EXTENT_GRAIN_MARKER &&
	    !skip_grain_marker(&in, &in_nbytes, row->guest_offset - within - file->guest_base))
		return imgc_fail(err, IMGC_CORRUPT, 0, row->host_offset, row->file, "grain_marker");
	if (row->length == block && row->guest_offset >= start &&
	    end - row->guest_offset >= block) {
		status = imgc_decompress(reader->decompressor, codec, in, in_nbytes,
					 view->data + (row->guest_offset - start), block, NULL);
		if (status)
			goto failed;
		return IMGC_OK;
	}
	status = imgc_decompress(reader->decompressor, codec, in, in_nbytes, reader->block, block,
				 NULL);
	if (status)
		goto failed;
	uint64_t from = imgc_max_u64(row->guest_offset, start);
	uint64_t to = imgc_min_u64(row->guest_offset + row->length, end);

	memcpy(view->data + (from - start), reader->block + within + (from - row->guest_offset),
	       to - from);
	return IMGC_OK;
failed:
	return imgc_fail(err, status, 0, row->host_offset, row->file, "decompress");
}

static bool row_is_compressed(const struct imgc_extent *row)
{
	return row->kind >= IMGC_DEFLATE;
}

/* The row's block is lost: zeros, if that is wanted. */
static int lose_row(struct reader *reader, const struct imgc_extent *row, uint64_t start,
		    uint64_t end, struct view *view, int os_errno, struct imgc_error *err)
{
	uint64_t from = imgc_max_u64(row->guest_offset, start);
	uint64_t to = imgc_min_u64(row->guest_offset + row->length, end);
	struct imgc_bad_range range = {from, to - from, row->file, os_errno};

	memset(view->data + (from - start), 0, to - from);
	return imgc_salvage_note(reader->salvage, range, err);
}

/* decompress_row(), or gives the row up if that is wanted. */
static int take_row(struct reader *reader, const struct imgc_extent *row, const uint8_t *in,
		    uint64_t start, uint64_t end, struct view *view, struct imgc_error *err)
{
	int status = decompress_row(reader, row, in, start, end, view, err);

	return status == IMGC_CORRUPT && reader->salvage
		       ? lose_row(reader, row, start, end, view, 0, err)
		       : status;
}

/* The rows could not be read at once: takes each that can be read alone. */
static int salvage_rows(struct reader *reader, const struct imgc_extent *rows, size_t n,
			uint64_t start, uint64_t end, struct view *view, struct imgc_error *err)
{
	int status = IMGC_OK;

	for (size_t i = 0; i < n && status == IMGC_OK; i++) {
		struct imgc_io_request request = {rows[i].host_offset, reader->compressed,
						  rows[i].host_length};

		status = imgc_job_go_on(reader->job, err);
		if (status)
			break;
		status = imgc_reader_read(reader, rows[i].file, &request, 1, err);
		if (status == IMGC_OK) {
			reader->bytes_read += request.length;
			status = take_row(reader, &rows[i], reader->compressed, start, end, view,
					  err);
		} else if (status == IMGC_IO) {
			status = lose_row(reader, &rows[i], start, end, view, err->os_errno, err);
		}
	}
	return status;
}

/*
 * Reads the bytes of neighbouring compressed rows at once and decompresses them.
 * host_length is often only an upper bound, so that the rows' ranges overlap.
 * Returns how many rows it took.
 */
static int fill_compressed(struct reader *reader, const struct imgc_extent *rows, size_t n,
			   uint64_t start, uint64_t end, struct view *view, size_t *n_taken,
			   struct imgc_error *err)
{
	uint64_t span_start = rows[0].host_offset;
	uint64_t span_end = span_start + rows[0].host_length;
	size_t count = 1;

	for (; count < n; count++) {
		const struct imgc_extent *row = &rows[count];

		if (row->guest_offset >= end || !row_is_compressed(row) ||
		    row->file != rows[0].file || row->host_offset < rows[count - 1].host_offset ||
		    (row->host_offset > span_end &&
		     row->host_offset - span_end > MAX_COMPRESSED_GAP_NBYTES))
			break;
		uint64_t row_end = imgc_max_u64(span_end, row->host_offset + row->host_length);

		if (row_end - span_start > reader->compressed_capacity)
			break;
		span_end = row_end;
	}

	struct imgc_io_request request = {span_start, reader->compressed, span_end - span_start};
	int status = imgc_read_patiently(reader, rows[0].file, &request, 1, err);

	*n_taken = count;
	if (status == IMGC_IO && reader->salvage)
		return salvage_rows(reader, rows, count, start, end, view, err);
	if (status)
		return status;
	reader->bytes_read += request.length;
	for (size_t i = 0; i < count; i++) {
		status = take_row(reader, &rows[i],
				  reader->compressed + (rows[i].host_offset - span_start), start,
				  end, view, err);
		if (status)
			return status;
	}
	return IMGC_OK;
}

/* -------------------------------------------------------------------- fill */

int imgc_reader_fill(struct reader *reader, struct rows rows, uint64_t start, uint64_t end,
		     struct view *view, struct imgc_error *err)
{
	struct pending pending = {.n = 0, .window = view->data, .start = start};
	size_t first = imgc_rows_find(rows, start), compressed_until = first;
	int status;

	view->n_ranges = 0;
	for (size_t i = first; i < rows.n && rows.rows[i].guest_offset < end; i++) {
		const struct imgc_extent *row = &rows.rows[i];
		uint64_t from = imgc_max_u64(row->guest_offset, start);
		uint64_t to = imgc_min_u64(row->guest_offset + row->length, end);

		if (row->kind == IMGC_HOLE || row->kind == IMGC_ZERO)
			continue;
		view_add(view, from - start, to - start);
		if (row->kind == IMGC_DATA) {
			status = pending_add(reader, &pending, row->file,
					     row->host_offset + (from - row->guest_offset),
					     view->data + (from - start), to - from, err);
			if (status)
				return status;
		} else if (i >= compressed_until) {
			size_t n_taken;

			status = fill_compressed(reader, row, rows.n - i, start, end, view,
						 &n_taken, err);
			if (status)
				return status;
			compressed_until = i + n_taken;
		}
	}
	return pending_flush(reader, &pending, err);
}
