/* What cannot be read becomes zeros, and a row of a list: only where the caller asked for it. */
#include "engine/engine.h"

#include <stdlib.h>
#include <string.h>

#include "common/checked.h"
#include "common/error.h"

/* A disk's physical sector, and what the page cache reads at once. */
#define SALVAGE_PIECE_NBYTES 4096u
#define FIRST_CAPACITY 64u

int imgc_salvage_note(struct salvage *salvage, struct imgc_bad_range range, struct imgc_error *err)
{
	int status = IMGC_OK;

	pthread_mutex_lock(&salvage->lock);
	struct imgc_bad_range *last = salvage->n > 0 ? &salvage->ranges[salvage->n - 1] : NULL;

	if (last && last->guest_offset + last->length == range.guest_offset &&
	    last->source == range.source && last->os_errno == range.os_errno) {
		last->length += range.length;
	} else if (salvage->n == IMGC_MAX_BAD_RANGES) {
		status = IMGC_LIMIT;
	} else {
		if (salvage->n == salvage->capacity) {
			size_t capacity = salvage->n ? 2 * salvage->n : FIRST_CAPACITY;
			void *grown = realloc(salvage->ranges, capacity * sizeof(*last));

			if (grown) {
				salvage->ranges = grown;
				salvage->capacity = capacity;
			} else {
				status = IMGC_NO_MEMORY;
			}
		}
		if (status == IMGC_OK)
			salvage->ranges[salvage->n++] = range;
	}
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
		int status = imgc_file_read(reader->files[file].file, reader->io, &piece, 1, err);

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
