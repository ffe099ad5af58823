/* What cannot be read becomes zeros, and a row of a list: only where the caller asked for it. */
#include "engine/engine.h"

#include <stdlib.h>
#include <string.h>

#include "common/checked.h"
#include "common/error.h"

/* A disk's physical sector, and what the page cache reads at once. */
#define SALVAGE_PIECE_NBYTES 4096u
#define FIRST_CAPACITY 64u

static bool joins(const struct imgc_bad_range *a, const struct imgc_bad_range *b)
{
	return a->guest_offset + a->length == b->guest_offset && a->source == b->source &&
	       a->os_errno == b->os_errno;
}

/* How many ranges lie before the offset. */
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
		return IMGC_LIMIT;
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
 * Workers come with their ranges in any order.  Were only the newest joined, two that go
 * through one bad region would fill the list.
 */
static int add(struct salvage *salvage, struct imgc_bad_range range)
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

int imgc_salvage_note(struct salvage *salvage, struct imgc_bad_range range, struct imgc_error *err)
{
	pthread_mutex_lock(&salvage->lock);
	int status = add(salvage, range);

	pthread_mutex_unlock(&salvage->lock);
	return status ? imgc_fail(err, status, 0, range.guest_offset, range.source, "salvage")
		      : IMGC_OK;
}

int imgc_salvage_read(struct reader *reader, uint32_t file, const struct imgc_io_request *request,
		      uint64_t guest_offset, struct imgc_error *err)
{
	uint64_t done = 0;

	while (done < request->length) {
		uint64_t offset = request->offset + done;
		uint64_t end = (offset | (SALVAGE_PIECE_NBYTES - 1)) + 1;
		struct imgc_io_request piece = {
			.offset = offset,
			.buffer = (uint8_t *)request->buffer + done,
			.length = imgc_min_u64(end - offset, request->length - done),
		};
		int status = imgc_job_go_on(reader->job, err);

		if (status == IMGC_OK)
			status = imgc_reader_read(reader, file, &piece, 1, err);
		if (status == IMGC_IO) {
			struct imgc_bad_range range = {guest_offset + done, piece.length, file,
						       err->os_errno};

			memset(piece.buffer, 0, piece.length);
			status = imgc_salvage_note(reader->salvage, range, err);
		}
		if (status)
			return status;
		done += piece.length;
	}
	return IMGC_OK;
}

void imgc_salvage_destroy(struct salvage *salvage)
{
	if (salvage->lock_exists)
		pthread_mutex_destroy(&salvage->lock);
	free(salvage->ranges);
}
