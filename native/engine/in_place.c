/*
 * in_place.c - random access: one range that is written where it is
 */
#include <time.h>

#include "common/checked.h"
#include "common/error.h"
#include "engine/disk.h"
#include "engine/retry.h"

/* A long range is written in pieces, and time is looked at in between. */
#define MAX_PIECE_NBYTES (UINT64_C(8) * 1024 * 1024)

/* After this time a call returns, so that the caller can see to signals. */
#define MAX_CALL_NS (UINT64_C(50) * 1000 * 1000)

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

/* Writes `length` bytes of a row, from guest offset `start` on. */
static int write_row(struct imgc_disk *disk, const struct imgc_extent *row, uint64_t start,
		     const uint8_t *bytes, uint64_t length, struct imgc_error *err)
{
	struct imgc_file *file = disk->sources[row->file].file;
	struct iovec iov = {(void *)(uintptr_t)bytes, length};

	if (row->kind != IMGC_DATA || atomic_load(&file->refuses_writes))
		return IMGC_NOT_IN_PLACE;
	int status = imgc_write_retrying(
		file, &iov, 1, row->host_offset + (start - row->guest_offset), &disk->stop, err);

	return imgc_fail_in(err, status, row->file);
}

/* Writes what the table has of [start, end), and adds the number of bytes to *done. */
static int write_rows(struct imgc_disk *disk, struct rows rows, uint64_t start, uint64_t end,
		      const uint8_t *bytes, uint64_t until_ns, uint64_t *done,
		      struct imgc_error *err)
{
	uint64_t at = start;

	for (size_t i = imgc_rows_find(rows, start); i < rows.n && at < end;) {
		uint64_t row_end = rows.rows[i].guest_offset + rows.rows[i].length;
		uint64_t length = imgc_min_u64(imgc_min_u64(row_end, end) - at, MAX_PIECE_NBYTES);
		int status = write_row(disk, &rows.rows[i], at, bytes + (at - start), length, err);

		if (status)
			return status;
		*done += length;
		at += length;
		i += at == row_end;
		if (at < end && now_ns() >= until_ns)
			return IMGC_UNFINISHED;
	}
	return IMGC_OK;
}

static int write_range(struct imgc_disk *disk, uint64_t offset, const uint8_t *bytes,
		       uint64_t length, uint64_t *done, uint64_t *generation,
		       struct imgc_error *err)
{
	uint64_t until_ns = length > MAX_PIECE_NBYTES ? now_ns() + MAX_CALL_NS : UINT64_MAX;
	int status = IMGC_OK;

	while (!status && *done < length) {
		struct cache_entry *table = imgc_disk_table(disk, NULL, offset + *done, generation);

		if (!table)
			return IMGC_MISSING;
		status = write_rows(disk, imgc_table_rows(table), offset + *done, offset + length,
				    bytes + *done, until_ns, done, err);
		imgc_cache_release(&disk->cache, table);
	}
	return status;
}

int imgc_disk_write(struct imgc_disk *disk, uint64_t offset, const void *buffer, uint64_t length,
		    struct imgc_disk_rest *rest, struct imgc_error *err)
{
	uint64_t done = 0;
	int status = IMGC_NOT_IN_PLACE;

	if (!imgc_range_inside(offset, length, disk->guest_nbytes))
		return imgc_fail_at(err, IMGC_OUT_OF_RANGE, offset, "disk");
	if (imgc_gate_enter(&disk->writes)) {
		status = write_range(disk, offset, buffer, length, &done, &rest->generation, err);
		imgc_gate_leave(&disk->writes);
	}
	rest->offset = offset + done;
	rest->length = length - done;
	return status;
}

void imgc_disk_stop_writing(struct imgc_disk *disk)
{
	imgc_gate_shut(&disk->writes);
}

int imgc_disk_await_writes(struct imgc_disk *disk, unsigned timeout_ms)
{
	return imgc_gate_await_empty(&disk->writes, timeout_ms);
}

void imgc_disk_resume_writing(struct imgc_disk *disk)
{
	imgc_gate_open(&disk->writes);
}
