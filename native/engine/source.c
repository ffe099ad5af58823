/*
 * source.c - from extents to bytes in memory
 */
#include "engine/source.h"

#include <errno.h>
#include <string.h>

#include "common/checked.h"
#include "common/endian.h"
#include "common/error.h"
#include "engine/retry.h"

#define MAX_READ_REQUESTS 64
#define MAX_COMPRESSED_GAP_NBYTES (64u * 1024)
/* The usual physical sector of a disk, and a page: the least that can be bad. */
#define SALVAGE_PIECE_NBYTES 4096u

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

void imgc_view_drop(struct view *view, uint64_t start, uint64_t end)
{
	size_t first = view_find(view, start), last = first, n_kept = 0;
	struct range kept[2];

	while (last < view->n_ranges && view->ranges[last].start < end)
		last++;
	if (first == last)
		return;
	if (view->ranges[first].start < start)
		kept[n_kept++] = (struct range){view->ranges[first].start, start};
	if (view->ranges[last - 1].end > end)
		kept[n_kept++] = (struct range){end, view->ranges[last - 1].end};
	memmove(&view->ranges[first + n_kept], &view->ranges[last],
		(view->n_ranges - last) * sizeof(*view->ranges));
	memcpy(&view->ranges[first], kept, n_kept * sizeof(*kept));
	view->n_ranges += n_kept;
	view->n_ranges -= last - first;
}

/* ------------------------------------------------------------------- reads */

/* One call of imgc_reader_fill(). */
struct fill {
	struct reader *reader;
	uint64_t start, end; /* the guest range that is wanted */
	struct view *view;   /* receives its bytes */
	struct reuse *reuse; /* receives compressed blocks; NULL: none are wanted */
	/* Plain reads of one file that go to the kernel together. */
	struct imgc_io_request requests[MAX_READ_REQUESTS];
	size_t n_requests;
	uint32_t file;
};

static uint64_t wanted_start(const struct fill *fill, const struct imgc_extent *row)
{
	return imgc_max_u64(row->guest_offset, fill->start);
}

static uint64_t wanted_end(const struct fill *fill, const struct imgc_extent *row)
{
	return imgc_min_u64(row->guest_offset + row->length, fill->end);
}

static uint8_t *bytes_at(const struct fill *fill, uint64_t guest_offset)
{
	return fill->view->data + (guest_offset - fill->start);
}

static int read_once(struct reader *reader, uint32_t file, const struct imgc_io_request *request,
		     struct imgc_error *err)
{
	int status = imgc_file_read(reader->files[file].file, reader->io, request, 1, err);

	return imgc_fail_in(err, status, file);
}

static int read_retrying(struct reader *reader, uint32_t file,
			 const struct imgc_io_request *requests, size_t n, struct imgc_error *err)
{
	struct imgc_file *from = reader->files[file].file;

	if (from->reads_wait && reader->in_caller) {
		int status = imgc_file_read(from, reader->io, requests, n, err);

		if (status == IMGC_IO && err->os_errno == EAGAIN)
			return IMGC_READ_WAITS;
		return imgc_fail_in(err, status, file);
	}
	int status = imgc_read_retrying(from, reader->io, requests, n, reader->stop, err);

	return imgc_fail_in(err, status, file);
}

/* ------------------------------------------------------------ plain extents */

/* Reads in small pieces.  A piece that cannot be read becomes zeros and a bad range. */
static int salvage_request(struct fill *fill, const struct imgc_io_request *request,
			   struct imgc_error *err)
{
	struct reader *reader = fill->reader;
	uint8_t *buffer = request->buffer;
	uint64_t guest_offset = fill->start + (uint64_t)(buffer - fill->view->data);
	uint64_t done = 0;

	while (done < request->length) {
		uint64_t offset = request->offset + done;
		uint64_t end = (offset | (SALVAGE_PIECE_NBYTES - 1)) + 1;
		struct imgc_io_request piece = {
			.offset = offset,
			.buffer = buffer + done,
			.length = imgc_min_u64(end - offset, request->length - done),
		};
		int status = imgc_check_stopped(reader->stop, err);

		if (status == IMGC_OK)
			status = read_once(reader, fill->file, &piece, err);
		if (status == IMGC_IO) {
			struct imgc_bad_range range = {guest_offset + done, piece.length,
						       fill->file, err->os_errno};

			memset(piece.buffer, 0, piece.length);
			status = imgc_salvage_add(reader->salvage, range, err);
		}
		if (status)
			return status;
		done += piece.length;
	}
	return IMGC_OK;
}

static int flush_requests(struct fill *fill, struct imgc_error *err)
{
	size_t n = fill->n_requests;

	if (n == 0)
		return IMGC_OK;
	fill->n_requests = 0;
	int status = read_retrying(fill->reader, fill->file, fill->requests, n, err);

	if (status != IMGC_IO || !fill->reader->salvage)
		return status;
	for (size_t i = 0; i < n; i++) {
		status = salvage_request(fill, &fill->requests[i], err);
		if (status)
			return status;
	}
	return IMGC_OK;
}

/* Queues the wanted part of a DATA row. */
static int add_request(struct fill *fill, const struct imgc_extent *row, struct imgc_error *err)
{
	uint64_t start = wanted_start(fill, row), length = wanted_end(fill, row) - start;
	uint64_t offset = row->host_offset + (start - row->guest_offset);
	uint8_t *buffer = bytes_at(fill, start);

	fill->reader->bytes_read += length;
	if (fill->n_requests > 0 && fill->file == row->file) {
		struct imgc_io_request *last = &fill->requests[fill->n_requests - 1];

		if (last->offset + last->length == offset &&
		    (uint8_t *)last->buffer + last->length == buffer) {
			last->length += length;
			return IMGC_OK;
		}
	}
	if (fill->n_requests == MAX_READ_REQUESTS ||
	    (fill->n_requests > 0 && fill->file != row->file)) {
		int status = flush_requests(fill, err);

		if (status)
			return status;
	}
	fill->file = row->file;
	fill->requests[fill->n_requests++] = (struct imgc_io_request){offset, buffer, length};
	return IMGC_OK;
}

/* ------------------------------------------------------- compressed extents */

unsigned imgc_row_codec(const struct imgc_extent *row)
{
	unsigned kind = row->kind;

	if (kind == IMGC_DEFLATE)
		return IMGC_CODEC_DEFLATE;
	return kind == IMGC_ZLIB ? IMGC_CODEC_ZLIB : IMGC_CODEC_ZSTD;
}

static bool row_is_compressed(const struct imgc_extent *row)
{
	return row->kind >= IMGC_DEFLATE;
}

int imgc_row_skip_marker(const struct imgc_extent *row, const struct imgc_source_file *file,
			 const uint8_t **in, uint64_t *nbytes, struct imgc_error *err)
{
	if (!(row->flags & IMGC_EXTENT_GRAIN_MARKER))
		return IMGC_OK;
	uint64_t place = imgc_row_block(row, file) - file->guest_base;
	uint64_t stored = *nbytes > GRAIN_MARKER_NBYTES ? imgc_load_le32(*in + 8) : 0;

	if (stored == 0 || stored > *nbytes - GRAIN_MARKER_NBYTES ||
	    imgc_load_le64(*in) != place / SECTOR_NBYTES)
		return imgc_fail(err, IMGC_BAD_GRAIN_MARKER, 0, row->host_offset, row->file,
				 "grain_marker");
	*in += GRAIN_MARKER_NBYTES;
	*nbytes = stored;
	return IMGC_OK;
}

/* Whether the target has a block of the same size at the same place. */
static bool may_reuse(const struct fill *fill, const struct imgc_extent *row, bool is_whole,
		      uint64_t block)
{
	return fill->reuse && is_whole && fill->reuse->block_nbytes == block &&
	       row->guest_offset % block == 0;
}

/*
 * Takes a block without decompressing it.  Where a zlib stream ends only a grain marker
 * tells; the other codecs find the end of theirs.
 */
static bool trust_row(const struct fill *fill, const struct imgc_extent *row, const uint8_t *in,
		      uint64_t in_nbytes)
{
	return fill->reuse->trusts &&
	       (row->kind != IMGC_ZLIB || row->flags & IMGC_EXTENT_GRAIN_MARKER) &&
	       imgc_reuse_take(fill->reuse, row->guest_offset - fill->start, imgc_row_codec(row),
			       in, in_nbytes, NULL);
}

/*
 * Decompresses the block of one row into the view.  `in` holds the row's host_length
 * bytes.  A block that is wanted whole goes straight to its place.  Of any other block
 * the wanted part is copied.
 */
static int decompress_row(struct fill *fill, const struct imgc_extent *row, const uint8_t *in,
			  struct imgc_error *err)
{
	struct reader *reader = fill->reader;
	const struct imgc_source_file *file = &reader->files[row->file];
	uint64_t block = file->block_nbytes, in_nbytes = row->host_length;
	uint64_t within = row->guest_offset - imgc_row_block(row, file);
	uint64_t start = wanted_start(fill, row), end = wanted_end(fill, row);
	bool is_whole = end - start == block;
	bool reuses = may_reuse(fill, row, is_whole, block);
	uint8_t *out = is_whole ? bytes_at(fill, start) : reader->block;
	size_t used;

	int status = imgc_row_skip_marker(row, file, &in, &in_nbytes, err);

	if (status)
		return status;
	if (reuses && trust_row(fill, row, in, in_nbytes))
		return IMGC_OK;
	status = imgc_decompress(reader->decompressor, imgc_row_codec(row), in, in_nbytes, out,
				 block, &used);

	if (status)
		return imgc_fail(err, status, 0, row->host_offset, row->file, "decompress");
	if (reuses)
		imgc_reuse_take(fill->reuse, start - fill->start, imgc_row_codec(row), in, used,
				out);
	if (!is_whole)
		memcpy(bytes_at(fill, start), out + within + (start - row->guest_offset),
		       end - start);
	return IMGC_OK;
}

/* The row's block cannot be had: it becomes zeros and a bad range. */
static int salvage_row(struct fill *fill, const struct imgc_extent *row, int os_errno,
		       struct imgc_error *err)
{
	uint64_t start = wanted_start(fill, row), length = wanted_end(fill, row) - start;
	struct imgc_bad_range range = {start, length, row->file, os_errno};

	memset(bytes_at(fill, start), 0, length);
	return imgc_salvage_add(fill->reader->salvage, range, err);
}

/* decompress_row(), but when salvaging a broken block is a bad range, not an error. */
static int take_row(struct fill *fill, const struct imgc_extent *row, const uint8_t *in,
		    struct imgc_error *err)
{
	int status = decompress_row(fill, row, in, err);
	bool is_broken = status == IMGC_CORRUPT || status == IMGC_BAD_GRAIN_MARKER;

	return is_broken && fill->reader->salvage ? salvage_row(fill, row, 0, err) : status;
}

/* The rows could not be read together: takes each that can be read alone. */
static int salvage_rows(struct fill *fill, const struct imgc_extent *rows, size_t n,
			struct imgc_error *err)
{
	struct reader *reader = fill->reader;

	for (size_t i = 0; i < n; i++) {
		struct imgc_io_request request = {rows[i].host_offset, reader->compressed,
						  rows[i].host_length};
		int status = imgc_check_stopped(reader->stop, err);

		if (status)
			return status;
		status = read_once(reader, rows[i].file, &request, err);
		if (status == IMGC_OK) {
			reader->bytes_read += request.length;
			status = take_row(fill, &rows[i], reader->compressed, err);
		} else if (status == IMGC_IO) {
			status = salvage_row(fill, &rows[i], err->os_errno, err);
		}
		if (status)
			return status;
	}
	return IMGC_OK;
}

/*
 * Counts the rows from the first on that are read together: they lie close to each
 * other and fit the reader's buffer.  host_length is often only an upper bound, so the
 * rows' ranges may overlap.  *span_end is where the last of them ends.
 */
static size_t count_neighbours(const struct fill *fill, const struct imgc_extent *rows, size_t n,
			       uint64_t *span_end)
{
	uint64_t end = rows[0].host_offset + rows[0].host_length;
	size_t count = 1;

	for (; count < n; count++) {
		const struct imgc_extent *row = &rows[count];

		if (row->guest_offset >= fill->end || !row_is_compressed(row) ||
		    row->file != rows[0].file || row->host_offset < rows[count - 1].host_offset ||
		    (row->host_offset > end && row->host_offset - end > MAX_COMPRESSED_GAP_NBYTES))
			break;
		uint64_t row_end = imgc_max_u64(end, row->host_offset + row->host_length);

		if (row_end - rows[0].host_offset > fill->reader->compressed_capacity)
			break;
		end = row_end;
	}
	*span_end = end;
	return count;
}

/*
 * Reads neighbouring compressed rows and decompresses them.  *n_taken says how many.  What
 * is in memory is used where it is.
 */
static int fill_compressed(struct fill *fill, const struct imgc_extent *rows, size_t n,
			   size_t *n_taken, struct imgc_error *err)
{
	struct reader *reader = fill->reader;
	uint64_t start = rows[0].host_offset, end;
	size_t count = count_neighbours(fill, rows, n, &end);
	struct imgc_io_request request = {start, reader->compressed, end - start};
	const uint8_t *in = imgc_file_borrow(reader->files[rows[0].file].file, start, end - start);
	int status = in ? IMGC_OK : read_retrying(reader, rows[0].file, &request, 1, err);

	*n_taken = count;
	if (status == IMGC_IO && reader->salvage)
		return salvage_rows(fill, rows, count, err);
	if (status)
		return status;
	reader->bytes_read += request.length;
	for (size_t i = 0; i < count; i++) {
		status = take_row(fill, &rows[i],
				  (in ? in : reader->compressed) + (rows[i].host_offset - start),
				  err);
		if (status)
			return status;
	}
	return IMGC_OK;
}

/* -------------------------------------------------------------------- fill */

/* Field by field: the requests need no zeros. */
static void fill_init(struct fill *fill, struct reader *reader, uint64_t start, uint64_t end,
		      struct view *view, struct reuse *reuse)
{
	fill->reader = reader;
	fill->start = start;
	fill->end = end;
	fill->view = view;
	fill->reuse = reuse;
	fill->n_requests = 0;
}

int imgc_reader_fetch(struct reader *reader, struct rows rows, uint64_t start, uint64_t end,
		      uint8_t *data, struct imgc_error *err)
{
	struct view view = {.data = data};
	struct fill fill;

	fill_init(&fill, reader, start, end, &view, NULL);
	for (size_t i = imgc_rows_find(rows, start); i < rows.n && rows.rows[i].guest_offset < end;
	     i++) {
		if (!imgc_row_is_unread(&rows.rows[i]))
			continue;
		int status = add_request(&fill, &rows.rows[i], err);

		if (status)
			return status;
	}
	return flush_requests(&fill, err);
}

int imgc_reader_fill(struct reader *reader, struct rows rows, uint64_t start, uint64_t end,
		     struct view *view, struct reuse *reuse, struct imgc_error *err)
{
	struct fill fill;
	size_t first = imgc_rows_find(rows, start), compressed_until = first;

	fill_init(&fill, reader, start, end, view, reuse);
	view->n_ranges = 0;
	if (reuse)
		imgc_reuse_reset(reuse);
	for (size_t i = first; i < rows.n && rows.rows[i].guest_offset < end; i++) {
		const struct imgc_extent *row = &rows.rows[i];
		int status = IMGC_OK;

		if (row->kind == IMGC_HOLE || row->kind == IMGC_ZERO ||
		    (reader->leaves_unread && imgc_row_is_unread(row)))
			continue;
		view_add(view, wanted_start(&fill, row) - start, wanted_end(&fill, row) - start);
		if (row->kind == IMGC_DATA) {
			status = add_request(&fill, row, err);
		} else if (i >= compressed_until) {
			size_t n_taken;

			status = fill_compressed(&fill, row, rows.n - i, &n_taken, err);
			compressed_until = i + n_taken;
		}
		if (status)
			return status;
	}
	return flush_requests(&fill, err);
}
