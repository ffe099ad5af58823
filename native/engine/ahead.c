/*
 * ahead.c - reads ahead of a batch, in physical order where its rows are not
 */
#include "engine/ahead.h"

#include <stdlib.h>

#include "common/checked.h"

#define MAX_RANGES 8192u
/* With a jump more often than this, rows are read in physical order. */
#define JUMP_NBYTES (4u * 1024 * 1024)
/* To read a gap of so many bytes takes less time than another request. */
#define GAP_NBYTES (32u * 1024)
/* So that signals and a cancelled job are seen soon, though the device is slow. */
#define STEP_NBYTES (1024u * 1024)

int imgc_ahead_create(struct ahead *ahead, const struct imgc_source_file *files)
{
	ahead->files = files;
	ahead->span_nbytes = AHEAD_FIRST_SPAN_NBYTES;
	ahead->ranges = malloc(MAX_RANGES * sizeof(*ahead->ranges));
	return ahead->ranges ? IMGC_OK : IMGC_NO_MEMORY;
}

void imgc_ahead_destroy(struct ahead *ahead)
{
	free(ahead->ranges);
}

void imgc_ahead_start(struct ahead *ahead, uint64_t guest_start, struct rows rows, struct rows base,
		      bool leaves_unread)
{
	ahead->sides[0] = rows;
	ahead->sides[1] = base;
	ahead->leaves_unread = leaves_unread;
	ahead->span_start = guest_start;
	ahead->n_ranges = ahead->n_announced = 0;
	for (size_t i = 0; i < AHEAD_SIDES; i++) {
		ahead->row[i] = 0;
		ahead->offset[i] = ahead->sides[i].n ? guest_start : UINT64_MAX;
	}
}

/* Where the next span starts; UINT64_MAX at the end. */
static uint64_t next_start(const struct ahead *ahead)
{
	return imgc_min_u64(ahead->offset[0], ahead->offset[1]);
}

bool imgc_ahead_is_due(const struct ahead *ahead, uint64_t cursor)
{
	if (!ahead->ranges)
		return false;
	return ahead->n_announced < ahead->n_ranges ||
	       (cursor >= ahead->span_start && next_start(ahead) != UINT64_MAX);
}

/* ------------------------------------------------------------------ looking */

static bool row_is_read(const struct ahead *ahead, const struct imgc_extent *row)
{
	return row->kind >= IMGC_DATA && !(ahead->leaves_unread && imgc_row_is_unread(row));
}

/* The host range of the row from guest offset `start` on, of at most max_nbytes. */
static struct host_range range_of(const struct imgc_extent *row, uint64_t start,
				  uint64_t max_nbytes)
{
	if (row->kind != IMGC_DATA)
		return (struct host_range){row->host_offset, row->host_offset + row->host_length,
					   row->file};
	uint64_t within = start - row->guest_offset;
	uint64_t nbytes = imgc_min_u64(row->length - within, max_nbytes);

	return (struct host_range){row->host_offset + within, row->host_offset + within + nbytes,
				   row->file};
}

/* Whether both become one range.  Gaps at most double what is read. */
static bool follows(const struct host_range *range, const struct host_range *last)
{
	uint64_t gap = imgc_min_u64(last->end - last->start, GAP_NBYTES);

	return range->file == last->file && range->start >= last->start &&
	       range->start <= last->end + gap;
}

static void join(struct host_range *last, const struct host_range *range)
{
	last->end = imgc_max_u64(last->end, range->end);
}

/*
 * Takes the next row of a side, or a part of it, and gives its host bytes.  A range that
 * follows the side's last one, last[side], becomes a part of it.
 */
static uint64_t take_row(struct ahead *ahead, size_t side, size_t *last, uint64_t max_nbytes)
{
	struct rows rows = ahead->sides[side];
	const struct imgc_extent *row = &rows.rows[ahead->row[side]];
	uint64_t row_end = row->guest_offset + row->length, nbytes = 0;

	if (row_is_read(ahead, row)) {
		struct host_range range = range_of(row, ahead->offset[side], max_nbytes);

		nbytes = range.end - range.start;
		if (row->kind == IMGC_DATA)
			row_end = ahead->offset[side] + nbytes;
		if (last[side] < ahead->n_ranges && follows(&range, &ahead->ranges[last[side]])) {
			join(&ahead->ranges[last[side]], &range);
		} else {
			last[side] = ahead->n_ranges;
			ahead->ranges[ahead->n_ranges++] = range;
		}
	}
	ahead->offset[side] = row_end;
	if (row_end == row->guest_offset + row->length && ++ahead->row[side] == rows.n)
		ahead->offset[side] = UINT64_MAX;
	return nbytes;
}

static int compare_ranges(const void *left, const void *right)
{
	const struct host_range *a = left, *b = right;

	if (a->file != b->file)
		return a->file < b->file ? -1 : 1;
	return (a->start > b->start) - (a->start < b->start);
}

static void sort_ranges(struct ahead *ahead)
{
	size_t last = 0;

	qsort(ahead->ranges, ahead->n_ranges, sizeof(*ahead->ranges), compare_ranges);
	for (size_t i = 1; i < ahead->n_ranges; i++) {
		if (follows(&ahead->ranges[i], &ahead->ranges[last]))
			join(&ahead->ranges[last], &ahead->ranges[i]);
		else
			ahead->ranges[++last] = ahead->ranges[i];
	}
	ahead->n_ranges = last + 1;
}

static uint64_t choose_span(struct ahead *ahead, uint64_t rate)
{
	uint64_t nbytes = ahead->span_nbytes;

	ahead->span_nbytes = imgc_min_u64(2 * nbytes, AHEAD_SPAN_NBYTES);
	if (rate == 0)
		return nbytes;
	return imgc_min_u64(nbytes, imgc_max_u64(rate, AHEAD_FIRST_SPAN_NBYTES));
}

/* Finds the ranges of the next span; none if they are in order. */
static void look(struct ahead *ahead, uint64_t max_nbytes)
{
	size_t last[AHEAD_SIDES] = {SIZE_MAX, SIZE_MAX};
	uint64_t nbytes = 0;

	ahead->span_start = next_start(ahead);
	ahead->n_ranges = ahead->n_announced = 0;
	while (nbytes < max_nbytes && ahead->n_ranges < MAX_RANGES &&
	       next_start(ahead) != UINT64_MAX) {
		size_t side = ahead->offset[0] <= ahead->offset[1] ? 0 : 1;

		nbytes += take_row(ahead, side, last, max_nbytes - nbytes);
	}
	/* Each range is a jump, but for a side's first. */
	size_t n_jumps = ahead->n_ranges - (last[0] != SIZE_MAX) - (last[1] != SIZE_MAX);

	if (n_jumps == 0 || n_jumps < nbytes / JUMP_NBYTES)
		ahead->n_ranges = 0;
	else
		sort_ranges(ahead);
}

/* --------------------------------------------------------------- announcing */

static void announce(struct ahead *ahead)
{
	uint64_t left = STEP_NBYTES;

	while (left > 0 && ahead->n_announced < ahead->n_ranges) {
		struct host_range *range = &ahead->ranges[ahead->n_announced];
		uint64_t nbytes = imgc_min_u64(range->end - range->start, left);

		imgc_file_will_need(ahead->files[range->file].file, range->start, nbytes);
		range->start += nbytes;
		if (range->start == range->end)
			ahead->n_announced++;
		left -= nbytes;
	}
}

void imgc_ahead_step(struct ahead *ahead, uint64_t rate)
{
	if (ahead->n_announced < ahead->n_ranges)
		announce(ahead);
	else
		look(ahead, choose_span(ahead, rate));
}
