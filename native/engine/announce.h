/*
 * announce.h - announces what a batch reads, in physical order where its rows are not
 */
#ifndef IMGC_ENGINE_ANNOUNCE_H
#define IMGC_ENGINE_ANNOUNCE_H

#include <stdbool.h>

#include "engine/extents.h"
#include "io/io.h"

/* The rows of both sides, which the batch reads in guest order. */
#define ANNOUNCER_SIDES 2

/*
 * Host bytes.  Up to twice as many wait in the page cache.  A disk that seeks gains by
 * each MiB.
 */
#define ANNOUNCER_MAX_SPAN_NBYTES (64u * 1024 * 1024)
#define ANNOUNCER_FIRST_SPAN_NBYTES (4u * 1024 * 1024)

struct host_range {
	uint64_t start, end;
	uint32_t file;
};

/*
 * The kernel reads ahead where a file is read in order.  Of a fragmented image it would
 * read one small piece after the other.  So the rows that come next are looked at, one
 * span before they are needed.  If they jump in their files, their ranges are announced
 * in physical order.  The first span is small, so that the first window need not wait
 * for many others, and each has twice the bytes of the one before, up to
 * ANNOUNCER_MAX_SPAN_NBYTES.
 *
 * Nothing depends on it: a file may ignore what is announced, and a range that cannot
 * be read fails when its window is read.
 */
struct announcer {
	const struct imgc_source_file *files;
	struct rows sides[ANNOUNCER_SIDES];
	size_t row[ANNOUNCER_SIDES];	  /* the first row that was not looked at */
	uint64_t offset[ANNOUNCER_SIDES]; /* and where in the disk the search goes on */
	bool leaves_unread;		  /* unread rows are not read */
	uint64_t span_start;		  /* of the span that was looked at last */
	uint64_t span_nbytes;		  /* of the next one */
	struct host_range *ranges;	  /* what of it is announced; NULL: nothing ever is */
	size_t n_ranges, n_announced;
};

/* Gives IMGC_OK or IMGC_NO_MEMORY.  All zeros is an object that never has anything to do. */
int imgc_announcer_create(struct announcer *announcer, const struct imgc_source_file *files);
void imgc_announcer_destroy(struct announcer *announcer);

/* Starts with a batch's rows at guest_start.  A side without rows is left out. */
void imgc_announcer_start(struct announcer *announcer, uint64_t guest_start, struct rows rows,
			  struct rows base, bool leaves_unread);

/* Whether there is something to do before the window at guest offset `cursor` is read. */
bool imgc_announcer_is_due(const struct announcer *announcer, uint64_t cursor);

/*
 * Does a part of it: looks at the next span, or announces some of the ranges that were
 * found.  A span has `rate` bytes at most, or ANNOUNCER_FIRST_SPAN_NBYTES if that is more;
 * 0: no limit.  May wait for the device, but not long.
 */
void imgc_announcer_step(struct announcer *announcer, uint64_t rate);

#endif /* IMGC_ENGINE_ANNOUNCE_H */
