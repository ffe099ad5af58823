/*
 * salvage.c - the list of guest ranges that could not be read
 */
#include "engine/salvage.h"

#include <stdlib.h>
#include <string.h>

#include "common/error.h"

#define FIRST_CAPACITY 64u

int imgc_salvage_create(struct salvage *salvage)
{
	*salvage = (struct salvage){0};
	salvage->lock_exists = !pthread_mutex_init(&salvage->lock, NULL);
	return salvage->lock_exists ? IMGC_OK : IMGC_NO_MEMORY;
}

void imgc_salvage_destroy(struct salvage *salvage)
{
	if (salvage->lock_exists)
		pthread_mutex_destroy(&salvage->lock);
	free(salvage->ranges);
}

static bool joins(const struct imgc_bad_range *a, const struct imgc_bad_range *b)
{
	return a->guest_offset + a->length == b->guest_offset && a->source == b->source &&
	       a->os_errno == b->os_errno;
}

/* The number of ranges that start before the offset. */
static size_t n_before(const struct salvage *salvage, uint64_t guest_offset)
{
	size_t low = 0, high = salvage->n;

	while (low < high) {
		size_t middle = low + (high - low) / 2;

		if (salvage->ranges[middle].guest_offset < guest_offset)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

static int insert(struct salvage *salvage, size_t at, struct imgc_bad_range range)
{
	if (salvage->n == IMGC_MAX_BAD_RANGES)
		return IMGC_TOO_MANY_BAD_RANGES;
	if (salvage->n == salvage->capacity) {
		size_t capacity = salvage->n ? 2 * salvage->n : FIRST_CAPACITY;
		void *grown = realloc(salvage->ranges, capacity * sizeof(range));

		if (!grown)
			return IMGC_NO_MEMORY;
		salvage->ranges = grown;
		salvage->capacity = capacity;
	}
	struct imgc_bad_range *place = salvage->ranges + at;

	memmove(place + 1, place, (salvage->n++ - at) * sizeof(range));
	*place = range;
	return IMGC_OK;
}

/*
 * Workers add ranges in any order.  A range is therefore joined to both neighbours: if
 * only the newest range were joined, two workers in one bad region would fill the list.
 */
static int join_or_insert(struct salvage *salvage, struct imgc_bad_range range)
{
	size_t at = n_before(salvage, range.guest_offset);
	struct imgc_bad_range *next = at < salvage->n ? &salvage->ranges[at] : NULL;
	struct imgc_bad_range *last = at > 0 ? &salvage->ranges[at - 1] : NULL;
	bool joins_next = next && joins(&range, next);

	if (!last || !joins(last, &range)) {
		if (!joins_next)
			return insert(salvage, at, range);
		next->guest_offset = range.guest_offset;
		next->length += range.length;
		return IMGC_OK;
	}
	last->length += range.length;
	if (joins_next) {
		last->length += next->length;
		memmove(next, next + 1, (--salvage->n - at) * sizeof(range));
	}
	return IMGC_OK;
}

int imgc_salvage_add(struct salvage *salvage, struct imgc_bad_range range, struct imgc_error *err)
{
	pthread_mutex_lock(&salvage->lock);
	int status = join_or_insert(salvage, range);

	pthread_mutex_unlock(&salvage->lock);
	return status ? imgc_fail(err, status, 0, range.guest_offset, range.source, "salvage")
		      : IMGC_OK;
}
