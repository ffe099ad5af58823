/*
 * announce.c - announces what a batch reads, in physical order where its rows are not
 */
#include "engine/announce.h"

#include <stdlib.h>

#include "common/checked.h"

#define MAX_RANGES 8192u
/* With a jump more often than this, rows are read in physical order. */
#define JUMP_NBYTES (4u * 1024 * 1024)
/* To read a gap of so many bytes takes less time than another request. */
#define GAP_NBYTES (32u * 1024)
/* So that signals and a cancelled job are seen soon, though the device is slow. */
#define STEP_NBYTES (1024u * 1024)

int imgc_announcer_create(struct announcer *announcer, const struct imgc_source_file *files)
{
	announcer->files = files;
	announcer->span_nbytes = ANNOUNCER_FIRST_SPAN_NBYTES;
	announcer->ranges = malloc(MAX_RANGES * sizeof(*announcer->ranges));
	return announcer->ranges ? IMGC_OK : IMGC_NO_MEMORY;
}

void imgc_announcer_destroy(struct announcer *announcer)
{
	free(announcer->ranges);
}

void imgc_announcer_start(struct announcer *announcer, uint64_t guest_start, struct rows rows,
			  struct rows base, bool leaves_unread)
{
	announcer->sides[0] = rows;
	announcer->sides[1] = base;
	announcer->leaves_unread = leaves_unread;
	announcer->span_start = guest_start;
	announcer->n_ranges = announcer->n_announced = 0;
	for (size_t i = 0; i < ANNOUNCER_SIDES; i++) {
		announcer->row[i] = 0;
		announcer->offset[i] = announcer->sides[i].n ? guest_start : UINT64_MAX;
	}
}

/* Where the next span starts; UINT64_MAX at the end. */
static uint64_t next_start(const struct announcer *announcer)
{
	return imgc_min_u64(announcer->offset[0], announcer->offset[1]);
}

bool imgc_announcer_is_due(const struct announcer *announcer, uint64_t cursor)
{
	if (!announcer->ranges)
		return false;
	return announcer->n_announced < announcer->n_ranges ||
	       (cursor >= announcer->span_start && next_start(announcer) != UINT64_MAX);
}

/* ------------------------------------------------------------------ looking */

static bool row_is_read(const struct announcer *announcer, const struct imgc_extent *row)
{
	return row->kind >= IMGC_DATA && !(announcer->leaves_unread && imgc_row_is_unread(row));
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
static uint64_t take_row(struct announcer *announcer, size_t side, size_t *last,
			 uint64_t max_nbytes)
{
	struct rows rows = announcer->sides[side];
	const struct imgc_extent *row = &rows.rows[announcer->row[side]];
	uint64_t row_end = row->guest_offset + row->length, nbytes = 0;

	if (row_is_read(announcer, row)) {
		struct host_range range = range_of(row, announcer->offset[side], max_nbytes);

		nbytes = range.end - range.start;
		if (row->kind == IMGC_DATA)
			row_end = announcer->offset[side] + nbytes;
		if (last[side] < announcer->n_ranges &&
		    follows(&range, &announcer->ranges[last[side]])) {
			join(&announcer->ranges[last[side]], &range);
		} else {
			last[side] = announcer->n_ranges;
			announcer->ranges[announcer->n_ranges++] = range;
		}
	}
	announcer->offset[side] = row_end;
	if (row_end == row->guest_offset + row->length && ++announcer->row[side] == rows.n)
		announcer->offset[side] = UINT64_MAX;
	return nbytes;
}

static int compare_ranges(const void *left, const void *right)
{
	const struct host_range *a = left, *b = right;

	if (a->file != b->file)
		return a->file < b->file ? -1 : 1;
	return (a->start > b->start) - (a->start < b->start);
}

static void sort_ranges(struct announcer *announcer)
{
	size_t last = 0;

	qsort(announcer->ranges, announcer->n_ranges, sizeof(*announcer->ranges), compare_ranges);
	for (size_t i = 1; i < announcer->n_ranges; i++) {
		if (follows(&announcer->ranges[i], &announcer->ranges[last]))
			join(&announcer->ranges[last], &announcer->ranges[i]);
		else
			announcer->ranges[++last] = announcer->ranges[i];
	}
	announcer->n_ranges = last + 1;
}

static uint64_t choose_span(struct announcer *announcer, uint64_t rate)
{
	uint64_t nbytes = announcer->span_nbytes;

	announcer->span_nbytes = imgc_min_u64(2 * nbytes, ANNOUNCER_MAX_SPAN_NBYTES);
	if (rate == 0)
		return nbytes;
	return imgc_min_u64(nbytes, imgc_max_u64(rate, ANNOUNCER_FIRST_SPAN_NBYTES));
}

/* Finds the ranges of the next span; none if they are in order. */
static void look(struct announcer *announcer, uint64_t max_nbytes)
{
	size_t last[ANNOUNCER_SIDES] = {SIZE_MAX, SIZE_MAX};
	uint64_t nbytes = 0;

	announcer->span_start = next_start(announcer);
	announcer->n_ranges = announcer->n_announced = 0;
	while (nbytes < max_nbytes && announcer->n_ranges < MAX_RANGES &&
	       next_start(announcer) != UINT64_MAX) {
		size_t side = announcer->offset[0] <= announcer->offset[1] ? 0 : 1;

		nbytes += take_row(announcer, side, last, max_nbytes - nbytes);
	}
	/* Each range is a jump, but for a side's first. */
	size_t n_jumps = announcer->n_ranges - (last[0] != SIZE_MAX) - (last[1] != SIZE_MAX);

	if (n_jumps == 0 || n_jumps < nbytes / JUMP_NBYTES)
		announcer->n_ranges = 0;
	else
		sort_ranges(announcer);
}

/* --------------------------------------------------------------- announcing */

static void announce(struct announcer *announcer)
{
	uint64_t left = STEP_NBYTES;

	while (left > 0 && announcer->n_announced < announcer->n_ranges) {
		struct host_range *range = &announcer->ranges[announcer->n_announced];
		uint64_t nbytes = imgc_min_u64(range->end - range->start, left);

		imgc_file_will_need(announcer->files[range->file].file, range->start, nbytes);
		range->start += nbytes;
		if (range->start == range->end)
			announcer->n_announced++;
		left -= nbytes;
	}
}

void imgc_announcer_step(struct announcer *announcer, uint64_t rate)
{
	if (announcer->n_announced < announcer->n_ranges)
		announce(announcer);
	else
		look(announcer, choose_span(announcer, rate));
}
