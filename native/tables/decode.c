/*
 * decode.c - from table entries to extents
 */
#include "tables/format.h"

#include "common/endian.h"
#include "common/error.h"

#define OP "table_decode"
#define SECTOR_NBYTES 512u

/* Receives the rows.  The last row is held back as long as the next one may join it. */
struct row_sink {
	struct imgc_extent *rows;
	size_t capacity;
	size_t n; /* rows written, without the open one */
	bool is_open;
	struct imgc_extent open;
};

static inline uint32_t entry_kind(const struct imgc_table_format *f, uint64_t entry)
{
	for (uint32_t i = 0; i < f->n_rules; i++) {
		if ((entry & f->rules[i].mask) == f->rules[i].value)
			return f->rules[i].kind;
	}
	return f->default_kind;
}

/* The place that a plain entry states; false if it does not fit 64 bits. */
static inline bool entry_place(const struct imgc_table_format *f, uint64_t entry, uint64_t *place)
{
	uint64_t value = (entry & f->offset_mask) >> f->offset_rshift;

	return imgc_shl_checked(value, f->offset_lshift, &value) &&
	       imgc_add_checked(value, f->host_base, place);
}

/* Sets a compressed row's host place; false if that is past the end of the file. */
static bool compressed_place(const struct imgc_table_format *f, uint64_t entry,
			     uint64_t file_nbytes, struct imgc_extent *row)
{
	uint64_t bound = f->compressed_bound;

	if (f->compressed_mask != 0) {
		uint64_t n_units = (entry >> f->length_shift) & f->length_mask;

		row->host_offset = entry & f->compressed_mask;
		/* Counted from the sector's start; a huge number ends with the file. */
		if (n_units >= UINT64_MAX / 512)
			bound = UINT64_MAX;
		else
			bound = (n_units + 1) * 512 - row->host_offset % 512;
	} else if (!entry_place(f, entry, &row->host_offset)) {
		return false;
	}
	if (row->host_offset >= file_nbytes)
		return false;
	row->host_length = imgc_min_u64(bound, file_nbytes - row->host_offset);
	return row->host_length != 0;
}

static inline bool joins(const struct imgc_extent *last, const struct imgc_extent *row)
{
	if (last->kind != row->kind)
		return false;
	if (row->kind == IMGC_LOST)
		return true;
	if (row->kind > IMGC_DATA)
		return false;
	return row->kind != IMGC_DATA || last->host_offset + last->host_length == row->host_offset;
}

/* Joins the row to the open row, or opens it; false if there is no room for it. */
static inline bool put_row(struct row_sink *sink, const struct imgc_extent *row)
{
	if (sink->is_open) {
		if (joins(&sink->open, row)) {
			sink->open.length += row->length;
			sink->open.host_length += row->host_length;
			return true;
		}
		sink->rows[sink->n++] = sink->open;
		sink->is_open = false;
	}
	if (sink->n == sink->capacity)
		return false;
	sink->open = *row;
	sink->is_open = true;
	return true;
}

static inline int decode_entry(const struct imgc_table_format *f,
			       const struct imgc_table_span *span, uint64_t entry,
			       struct imgc_extent *row)
{
	switch (row->kind) {
	case IMGC_HOLE:
	case IMGC_ZERO:
		return span->salvage && entry & f->reserved_mask ? IMGC_CORRUPT : IMGC_OK;
	case IMGC_DATA:
		if (entry & f->reserved_mask)
			return IMGC_CORRUPT;
		if (!entry_place(f, entry, &row->host_offset) ||
		    !imgc_range_inside(row->host_offset, row->length, span->file_nbytes))
			return IMGC_OUT_OF_RANGE;
		row->host_length = row->length;
		row->file = span->file;
		return IMGC_OK;
	default:
		if (!compressed_place(f, entry, span->file_nbytes, row))
			return IMGC_OUT_OF_RANGE;
		row->flags = (uint16_t)f->flags;
		row->file = span->file;
		return IMGC_OK;
	}
}

/*
 * Cuts the row of an impossible entry to the whole sectors that the file has, often
 * none, and returns the row of what is lost.
 */
static struct imgc_extent cut_lost(const struct imgc_table_format *f,
				   const struct imgc_table_span *span, uint64_t entry, int status,
				   struct imgc_extent *row)
{
	uint64_t place, inside = 0;

	if (row->kind == IMGC_DATA && status == IMGC_OUT_OF_RANGE &&
	    entry_place(f, entry, &place) && place < span->file_nbytes) {
		inside = (span->file_nbytes - place) / SECTOR_NBYTES * SECTOR_NBYTES;
		row->host_offset = place;
		row->host_length = inside;
		row->file = span->file;
	}
	struct imgc_extent lost = {
		.guest_offset = row->guest_offset + inside,
		.length = row->length - inside,
		.file = span->file,
		.kind = IMGC_LOST,
	};

	row->length = inside;
	return lost;
}

/*
 * Specialised by the constants entry_nbytes and big_endian.  The format and the sink
 * are local copies, so that the compiler knows that the loop's writes cannot change
 * them, and keeps them in registers.
 */
static inline __attribute__((always_inline)) int decode_all(const struct imgc_table_format *format,
							    const uint8_t *entries, size_t n,
							    const struct imgc_table_span *span,
							    struct row_sink *out, size_t *failed,
							    uint32_t entry_nbytes, bool big_endian)
{
	const struct imgc_table_format f = *format;
	struct row_sink sink = *out;
	uint64_t guest_offset = span->guest_offset;
	uint64_t previous = 0;
	bool repeats = false; /* the open row is a hole or zeros, from entry `previous` */

	for (size_t i = 0; i < n; i++, guest_offset += f.block_nbytes) {
		const uint8_t *p = entries + i * entry_nbytes;
		struct imgc_extent row = {.guest_offset = guest_offset};
		uint64_t entry;

		if (entry_nbytes == 4)
			entry = big_endian ? imgc_load_be32(p) : imgc_load_le32(p);
		else
			entry = big_endian ? imgc_load_be64(p) : imgc_load_le64(p);
		row.length = imgc_min_u64(f.block_nbytes, span->guest_end - guest_offset);
		if (repeats && entry == previous) {
			sink.open.length += row.length;
			continue;
		}
		row.kind = (uint16_t)entry_kind(&f, entry);
		struct imgc_extent lost = {.length = 0};
		int status = decode_entry(&f, span, entry, &row);

		if (status && span->salvage) {
			lost = cut_lost(&f, span, entry, status, &row);
			status = IMGC_OK;
		}
		if (!status && ((row.length && !put_row(&sink, &row)) ||
				(lost.length && !put_row(&sink, &lost))))
			status = IMGC_LIMIT;
		if (status) {
			*failed = i;
			return status;
		}
		previous = entry;
		repeats = row.kind <= IMGC_ZERO && lost.length == 0;
	}
	if (sink.is_open)
		sink.rows[sink.n++] = sink.open;
	out->n = sink.n;
	return IMGC_OK;
}

/* The number of entries before the disk's end. */
static size_t entries_inside(const struct imgc_table_format *f, const struct imgc_table_span *span,
			     size_t n_entries)
{
	if (span->guest_offset >= span->guest_end)
		return 0;
	uint64_t length = span->guest_end - span->guest_offset;
	uint64_t n = length / f->block_nbytes + (length % f->block_nbytes != 0);

	return n < n_entries ? (size_t)n : n_entries;
}

int imgc_table_decode(const struct imgc_table_format *format, const void *entries, size_t n_entries,
		      const struct imgc_table_span *span, struct imgc_extent *out, size_t capacity,
		      size_t *n_out, struct imgc_error *err)
{
	struct row_sink sink = {.rows = out, .capacity = capacity};
	size_t failed = 0;

	if (!imgc_table_format_valid(format) || format->flags > UINT16_MAX)
		return imgc_fail_call(err, IMGC_INVALID_ARGUMENT, OP);
	size_t n = entries_inside(format, span, n_entries);
	int status;

	if (format->entry_nbytes == 4 && format->big_endian)
		status = decode_all(format, entries, n, span, &sink, &failed, 4, true);
	else if (format->entry_nbytes == 4)
		status = decode_all(format, entries, n, span, &sink, &failed, 4, false);
	else if (format->big_endian)
		status = decode_all(format, entries, n, span, &sink, &failed, 8, true);
	else
		status = decode_all(format, entries, n, span, &sink, &failed, 8, false);
	if (status)
		return imgc_fail_at(err, status, failed, OP);
	*n_out = sink.n;
	return IMGC_OK;
}
