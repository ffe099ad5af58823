/*
 * write.c - one window to the target: written, or reflinked or moved from a source
 */
#include "engine/engine.h"

#include <sys/uio.h>

#include "common/checked.h"
#include "common/error.h"
#include "engine/retry.h"
#include "engine/stop.h"

#define MAX_SEGMENTS 64
#define MIN_REFLINK_NBYTES (64u * 1024) /* less is written as fast, and fragments less */

/* A range of the target that can be reflinked, or moved, from a source. */
struct part {
	uint64_t guest_offset, length;
	uint64_t host_offset; /* in the target */
	uint64_t source_offset;
	uint32_t file;
};

/* Bytes that are neighbours in the target, and go to the kernel in one call. */
struct gather {
	struct iovec iov[MAX_SEGMENTS];
	int n;
	uint64_t offset, nbytes;
	struct part part; /* waits for neighbours that join it; length 0: no part */
};

static int gather_flush(struct worker *worker, struct gather *gather, struct imgc_error *err)
{
	if (gather->n == 0)
		return IMGC_OK;
	struct imgc_job *job = worker->job;
	int status = imgc_write_retrying(job->options.target, gather->iov, gather->n,
					 gather->offset, &job->stop, err);

	if (status)
		return imgc_fail_in(err, status, IMGC_TARGET);
	atomic_fetch_add_explicit(&worker->counters->written, gather->nbytes, memory_order_relaxed);
	gather->n = 0;
	gather->nbytes = 0;
	return IMGC_OK;
}

static int gather_add(struct worker *worker, struct gather *gather, uint64_t offset, uint8_t *data,
		      uint64_t nbytes, struct imgc_error *err)
{
	if (gather->n > 0 &&
	    (offset != gather->offset + gather->nbytes || gather->n == MAX_SEGMENTS)) {
		int status = gather_flush(worker, gather, err);

		if (status)
			return status;
	}
	struct iovec *last = gather->n > 0 ? &gather->iov[gather->n - 1] : NULL;

	if (last && (uint8_t *)last->iov_base + last->iov_len == data) {
		last->iov_len += nbytes;
	} else {
		if (gather->n == 0)
			gather->offset = offset;
		gather->iov[gather->n++] = (struct iovec){data, nbytes};
	}
	gather->nbytes += nbytes;
	return IMGC_OK;
}

/* ------------------------------------------------------- reflinks and moves */

/*
 * The unit of what a row can give without a copy; 0: nothing.  What was read is not moved:
 * the source may have changed since.
 */
static uint64_t part_unit(const struct imgc_job *job, const struct imgc_extent *row)
{
	if (row->kind != IMGC_DATA || !atomic_load(&job->may_reflink[row->file]))
		return 0;
	if (job->may_move)
		return job->moves && imgc_row_is_unread(row) ? 1 : 0;
	return imgc_max_u64(job->sources[row->file].file->reflink_block_nbytes,
			    job->options.target->reflink_block_nbytes);
}

/*
 * Finds the first part of guest range [start, end) that can be reflinked or moved: a
 * source stores it plain, at a place that differs from its place in the target by whole
 * units.  host_offset is where `start` goes in the target.
 */
static bool find_part(const struct imgc_job *job, uint64_t start, uint64_t end,
		      uint64_t host_offset, struct part *part)
{
	for (size_t i = imgc_rows_find(job->rows, start); i < job->rows.n; i++) {
		const struct imgc_extent *row = &job->rows.rows[i];
		uint64_t from = imgc_max_u64(row->guest_offset, start);
		uint64_t to = imgc_min_u64(row->guest_offset + row->length, end);

		if (from >= to)
			return false;
		uint64_t unit = part_unit(job, row);

		if (unit == 0)
			continue;
		uint64_t source_offset = row->host_offset + (from - row->guest_offset);
		uint64_t offset = host_offset + (from - start);
		uint64_t before = (0 - offset) & (unit - 1);

		if (to - from < before + unit || (source_offset - offset) & (unit - 1))
			continue;
		*part = (struct part){
			.guest_offset = from + before,
			.length = imgc_align_down(to - from - before, unit),
			.host_offset = offset + before,
			.source_offset = source_offset + before,
			.file = row->file,
		};
		return true;
	}
	return false;
}

static bool reflink_part(struct worker *worker, const struct part *part)
{
	struct imgc_job *job = worker->job;

	if (!imgc_file_reflink(job->options.target, part->host_offset,
			       job->sources[part->file].file, part->source_offset, part->length)) {
		atomic_store(&job->may_reflink[part->file], false);
		return false;
	}
	atomic_fetch_add_explicit(&worker->counters->reflinked, part->length, memory_order_relaxed);
	return true;
}

/* Waits until the job's rate allows so many bytes, which are read or moved. */
static int await_rate(const struct imgc_job *job, uint64_t nbytes, struct imgc_error *err)
{
	int status = imgc_check_stopped(&job->stop, err);

	while (status == IMGC_OK && nbytes > 0) {
		status = imgc_window_await_rate(job, nbytes, err);
		if (status != IMGC_WINDOW_WAITS)
			break;
		status = imgc_check_stopped(&job->stop, err);
	}
	return status;
}

/* Reads the unread rows of guest range [start, end), as fast as the job's rate allows. */
static int fetch(struct worker *worker, uint64_t start, uint64_t end, uint8_t *data,
		 struct imgc_error *err)
{
	const struct imgc_job *job = worker->job;
	uint64_t before = worker->reader.bytes_read;
	int status = imgc_reader_fetch(&worker->reader, job->rows, start, end, data, err);

	return status ? status : await_rate(job, worker->reader.bytes_read - before, err);
}

/*
 * Writes a part of a span, which has no bytes in memory: reads it to the slot, as much
 * as a window at a time.
 */
static int copy_unread(struct worker *worker, const struct slot *slot, struct gather *gather,
		       uint64_t host_offset, uint64_t start, uint64_t end, struct imgc_error *err)
{
	uint8_t *data = slot->view.data;
	int status = gather_flush(worker, gather, err);

	for (uint64_t at = start; at < end && status == IMGC_OK;) {
		uint64_t next = imgc_min_u64(at + worker->job->window_nbytes, end);

		status = imgc_check_stopped(&worker->job->stop, err);
		if (status == IMGC_OK)
			status = fetch(worker, at, next, data, err);
		if (status == IMGC_OK)
			status = gather_add(worker, gather, host_offset + (at - start), data,
					    next - at, err);
		if (status == IMGC_OK)
			status = gather_flush(worker, gather, err);
		at = next;
	}
	return status;
}

/* Writes guest range [start, end) of the slot, and first reads what of it is unread. */
static int put_guest_bytes(struct worker *worker, const struct slot *slot, struct gather *gather,
			   uint64_t host_offset, uint64_t start, uint64_t end,
			   struct imgc_error *err)
{
	uint8_t *data = slot->view.data + (start - slot->start);
	int status = IMGC_OK;

	if (slot->is_span)
		return copy_unread(worker, slot, gather, host_offset, start, end, err);
	if (worker->job->leaves_unread)
		status = fetch(worker, start, end, data, err);
	return status ? status : gather_add(worker, gather, host_offset, data, end - start, err);
}

/*
 * Moves a part into the pipe that the target is, as much as a window at a time.  What does
 * not work that way is written.
 */
static int move_part(struct worker *worker, const struct slot *slot, struct gather *gather,
		     const struct part *part, struct imgc_error *err)
{
	struct imgc_job *job = worker->job;
	struct imgc_file *source = job->sources[part->file].file;
	int status = gather_flush(worker, gather, err);

	for (uint64_t done = 0; done < part->length && status == IMGC_OK;) {
		uint64_t nbytes = imgc_min_u64(part->length - done, job->window_nbytes);

		status = await_rate(job, nbytes, err);
		if (status)
			break;
		status = imgc_move_retrying(job->options.target, part->host_offset + done, source,
					    part->source_offset + done, nbytes, &job->stop, err);
		if (status == IMGC_UNSUPPORTED) {
			atomic_store(&job->may_reflink[part->file], false);
			return put_guest_bytes(worker, slot, gather, part->host_offset + done,
					       part->guest_offset + done,
					       part->guest_offset + part->length, err);
		}
		if (status)
			return imgc_fail_in(err, status, IMGC_TARGET);
		worker->reader.bytes_read += nbytes;
		atomic_fetch_add_explicit(&worker->counters->written, nbytes, memory_order_relaxed);
		done += nbytes;
	}
	return status;
}

/* Reflinks or moves the part that waits.  If that does not work, writes it. */
static int part_flush(struct worker *worker, const struct slot *slot, struct gather *gather,
		      struct imgc_error *err)
{
	const struct imgc_job *job = worker->job;
	struct part part = gather->part;
	uint64_t least = job->has_unread ? 1 : MIN_REFLINK_NBYTES;
	int status = imgc_check_stopped(&job->stop, err);

	gather->part.length = 0;
	if (status)
		return status;
	if (part.length > 0 && job->moves)
		return move_part(worker, slot, gather, &part, err);
	if (part.length == 0 || (part.length >= least && reflink_part(worker, &part)))
		return IMGC_OK;
	return put_guest_bytes(worker, slot, gather, part.host_offset, part.guest_offset,
			       part.guest_offset + part.length, err);
}

static bool part_continues(const struct part *part, const struct part *next)
{
	return part->file == next->file &&
	       part->guest_offset + part->length == next->guest_offset &&
	       part->host_offset + part->length == next->host_offset &&
	       part->source_offset + part->length == next->source_offset;
}

static int part_add(struct worker *worker, const struct slot *slot, struct gather *gather,
		    const struct part *next, struct imgc_error *err)
{
	if (part_continues(&gather->part, next)) {
		gather->part.length += next->length;
		return IMGC_OK;
	}
	int status = part_flush(worker, slot, gather, err);

	gather->part = *next;
	return status;
}

/* Adds bytes that are neither reflinked nor moved.  The part that waits comes first. */
static int put_bytes(struct worker *worker, const struct slot *slot, struct gather *gather,
		     uint64_t host_offset, uint64_t start, uint64_t end, struct imgc_error *err)
{
	if (start == end)
		return IMGC_OK;
	int status = part_flush(worker, slot, gather, err);

	return status ? status
		      : put_guest_bytes(worker, slot, gather, host_offset, start, end, err);
}

/* Brings a run of the slot to host_offset, by reflinks or moves where they are possible. */
static int put_run(struct worker *worker, const struct slot *slot, struct gather *gather,
		   uint64_t host_offset, struct range run, struct imgc_error *err)
{
	const struct imgc_job *job = worker->job;
	uint64_t start = slot->start + run.start, end = slot->start + run.end;
	uint64_t shift = host_offset - start;
	struct part part;

	while (job->may_reflink && find_part(job, start, end, start + shift, &part)) {
		int status = put_bytes(worker, slot, gather, start + shift, start,
				       part.guest_offset, err);

		if (status == IMGC_OK)
			status = part_add(worker, slot, gather, &part, err);
		if (status)
			return status;
		start = part.guest_offset + part.length;
	}
	return put_bytes(worker, slot, gather, start + shift, start, end, err);
}

/* ------------------------------------------------------------------ windows */

/* Before the block that is stored at host_offset, if blocks have a prefix. */
static int write_stored_prefix(struct worker *worker, const struct slot *slot,
			       struct gather *gather, uint64_t host_offset, struct imgc_error *err)
{
	const struct imgc_job *job = worker->job;
	uint64_t nbytes = job->geometry.stored_prefix_nbytes;

	if (!job->stored_prefix)
		return IMGC_OK;
	int status = part_flush(worker, slot, gather, err);

	return status ? status
		      : gather_add(worker, gather, host_offset - nbytes, job->stored_prefix, nbytes,
				   err);
}

static int write_piece(struct worker *worker, struct slot *slot, const struct piece *piece,
		       struct gather *gather, struct imgc_error *err)
{
	uint64_t alignment = worker->job->geometry.compressed_alignment;

	if (piece->state == IMGC_BLOCK_COMPRESSED)
		return gather_add(worker, gather, piece->host_offset,
				  slot->packed + piece->packed_start,
				  (piece->packed_nbytes + alignment - 1) & ~(alignment - 1), err);
	if (piece->opens_block) {
		uint64_t within =
			(slot->start + piece->start) & (worker->job->geometry.block_nbytes - 1);
		int status =
			write_stored_prefix(worker, slot, gather, piece->host_offset - within, err);

		if (status)
			return status;
	}
	for (size_t i = 0; i < piece->n_runs; i++) {
		struct range run = slot->runs[piece->first_run + i];
		int status = put_run(worker, slot, gather,
				     piece->host_offset + (run.start - piece->start), run, err);

		if (status)
			return status;
	}
	return IMGC_OK;
}

static int write_identity(struct worker *worker, struct slot *slot, struct gather *gather,
			  struct imgc_error *err)
{
	const struct imgc_geometry *g = &worker->job->geometry;
	uint64_t base = g->host_base + (slot->start - g->guest_base), zero_from = 0;
	int status = IMGC_OK;

	for (size_t i = 0; i <= slot->n_runs && status == IMGC_OK; i++) {
		uint64_t start = i < slot->n_runs ? slot->runs[i].start : slot->end - slot->start;

		if (g->zero_policy == IMGC_ZERO_EXPLICIT && start > zero_from)
			status = imgc_span_write_zeros(worker, slot->start + zero_from,
						       slot->start + start, err);
		if (status || i == slot->n_runs)
			break;
		zero_from = slot->runs[i].end;
		status = put_run(worker, slot, gather, base + start, slot->runs[i], err);
	}
	return status;
}

static int write_span(struct worker *worker, const struct slot *slot, struct gather *gather,
		      struct imgc_error *err)
{
	const struct imgc_job *job = worker->job;
	uint64_t block_nbytes = job->geometry.block_nbytes;
	int status = IMGC_OK;

	for (uint64_t start = slot->start; start < slot->end && status == IMGC_OK;) {
		uint64_t end = imgc_min_u64((start | (block_nbytes - 1)) + 1, slot->end);
		size_t row = (size_t)((start - job->batch.guest_start) / block_nbytes);
		uint64_t host_offset = job->batch.placements[row].host_offset;
		struct range run = {start - slot->start, end - slot->start};

		if (start > slot->start || slot->opens_block)
			status = write_stored_prefix(worker, slot, gather, host_offset, err);
		if (status == IMGC_OK)
			status = put_run(worker, slot, gather,
					 host_offset + (start & (block_nbytes - 1)), run, err);
		start = end;
	}
	return status;
}

static int write_identity_span(struct worker *worker, const struct slot *slot,
			       struct gather *gather, struct imgc_error *err)
{
	const struct imgc_geometry *g = &worker->job->geometry;
	struct range run = {0, slot->end - slot->start};

	return put_run(worker, slot, gather, g->host_base + (slot->start - g->guest_base), run,
		       err);
}

int imgc_window_write(struct worker *worker, struct slot *slot, struct imgc_error *err)
{
	struct gather gather = {.n = 0, .part.length = 0};
	int status = IMGC_OK;

	if (slot->is_span)
		status = worker->job->appends ? write_span(worker, slot, &gather, err)
					      : write_identity_span(worker, slot, &gather, err);
	else if (!worker->job->appends)
		status = write_identity(worker, slot, &gather, err);
	for (size_t i = 0; i < slot->n_pieces && status == IMGC_OK; i++)
		status = write_piece(worker, slot, &slot->pieces[i], &gather, err);
	if (status == IMGC_OK)
		status = part_flush(worker, slot, &gather, err);
	return status ? status : gather_flush(worker, &gather, err);
}

int imgc_span_write_zeros(struct worker *worker, uint64_t start, uint64_t end,
			  struct imgc_error *err)
{
	struct imgc_job *job = worker->job;
	const struct imgc_geometry *g = &job->geometry;

	if (g->zero_policy != IMGC_ZERO_EXPLICIT || g->placing != IMGC_PLACE_IDENTITY)
		return IMGC_OK;
	int status = imgc_file_zero(job->options.target, g->host_base + (start - g->guest_base),
				    end - start, err);
	return imgc_fail_in(err, status, IMGC_TARGET);
}
