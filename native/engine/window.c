/*
 * window.c - one window: read, test for zeros, compress, compare, place
 */
#include "engine/engine.h"

#include <string.h>

#include "common/checked.h"
#include "common/endian.h"
#include "common/error.h"
#include "io/io.h"

#define RATE_POLL_MS 20 /* so that a cancelled job ends soon */

static bool is_zero(const struct imgc_job *job, const struct view *view, uint64_t start,
		    uint64_t end)
{
	return imgc_is_zero(job->options.zero_variant, view->data + start, end - start);
}

/* -------------------------------------------------------------- stored data */

/* Bytes of [start, end) that rows state as data; without those that are left unread. */
static uint64_t data_nbytes(struct rows rows, uint64_t start, uint64_t end, bool leaves_unread)
{
	uint64_t nbytes = 0;

	for (size_t i = imgc_rows_find(rows, start); i < rows.n; i++) {
		const struct imgc_extent *row = &rows.rows[i];

		if (row->guest_offset >= end)
			break;
		if (row->kind >= IMGC_DATA && !(leaves_unread && imgc_row_is_unread(row)))
			nbytes += imgc_min_u64(row->guest_offset + row->length, end) -
				  imgc_max_u64(row->guest_offset, start);
	}
	return nbytes;
}

static void add_run(struct slot *slot, size_t first_run, uint64_t start, uint64_t end)
{
	if (slot->n_runs > first_run && slot->runs[slot->n_runs - 1].end == start)
		slot->runs[slot->n_runs - 1].end = end;
	else
		slot->runs[slot->n_runs++] = (struct range){start, end};
}

/* The first part of [start, end) that was not read; at `end` if all of it was. */
static struct range find_unread(const struct imgc_job *job, const struct slot *slot, uint64_t start,
				uint64_t end)
{
	uint64_t guest_start = slot->start + start, guest_end = slot->start + end;

	if (!job->leaves_unread)
		return (struct range){end, end};
	for (size_t i = imgc_rows_find(job->rows, guest_start); i < job->rows.n; i++) {
		const struct imgc_extent *row = &job->rows.rows[i];

		if (row->guest_offset >= guest_end)
			break;
		if (imgc_row_is_unread(row))
			return (struct range){
				imgc_max_u64(row->guest_offset, guest_start) - slot->start,
				imgc_min_u64(row->guest_offset + row->length, guest_end) -
					slot->start,
			};
	}
	return (struct range){end, end};
}

/* Adds the runs of [start, end), which was read, that are not zeros. */
static void test_runs(const struct imgc_job *job, struct slot *slot, size_t first_run,
		      uint64_t start, uint64_t end)
{
	uint64_t step = job->geometry.sparse_nbytes ? job->geometry.sparse_nbytes : end - start;

	for (uint64_t at = start; at < end; at += step) {
		uint64_t stop = at + imgc_min_u64(step, end - at);

		if (!imgc_view_has_data(&slot->view, at, stop))
			continue;
		imgc_view_materialise(&slot->view, at, stop);
		if (!is_zero(job, &slot->view, at, stop))
			add_run(slot, first_run, at, stop);
	}
}

/*
 * Adds the runs of [start, end) that must be written: all of it, or all but runs of
 * zeros.  Returns whether there are any.
 */
static bool find_runs(const struct imgc_job *job, struct slot *slot, uint64_t start, uint64_t end)
{
	bool store_all = job->geometry.zero_policy == IMGC_ZERO_STORE;
	size_t first_run = slot->n_runs;

	if (job->options.stores_data && !store_all) {
		store_all =
			data_nbytes(job->rows, slot->start + start, slot->start + end, false) > 0;
		if (!store_all)
			return false;
	}
	if (store_all) {
		imgc_view_materialise(&slot->view, start, end);
		add_run(slot, first_run, start, end);
		return true;
	}
	while (start < end) {
		struct range unread = find_unread(job, slot, start, end);

		test_runs(job, slot, first_run, start, unread.start);
		if (unread.start < unread.end)
			add_run(slot, first_run, unread.start, unread.end);
		start = unread.end;
	}
	return slot->n_runs > first_run;
}

/* --------------------------------------------------------- compressed blocks */

uint64_t imgc_packed_room(const struct worker *worker)
{
	const struct imgc_geometry *g = &worker->job->geometry;

	/* A block that does not get smaller is stored, if the format allows it. */
	return g->store_incompressible ? g->block_nbytes - 1
				       : imgc_compressor_bound(worker->compressor, g->block_nbytes);
}

static void put_grain_marker(uint8_t *marker, uint64_t guest_offset, size_t nbytes)
{
	imgc_store_le64(marker, guest_offset / SECTOR_NBYTES);
	imgc_store_le32(marker + 8, (uint32_t)nbytes);
}

static uint64_t prefix_nbytes(const struct imgc_geometry *g)
{
	return g->prefix == IMGC_PREFIX_GRAIN_MARKER ? GRAIN_MARKER_NBYTES : 0;
}

/* Where the next compressed block goes in the slot's packed bytes, after its prefix. */
static uint8_t *packed_place(const struct imgc_job *job, const struct slot *slot)
{
	return slot->packed + slot->packed_nbytes + prefix_nbytes(&job->geometry);
}

/* Adds the piece, whose `nbytes` compressed bytes are at packed_place(). */
static void finish_packing(const struct imgc_job *job, struct slot *slot, struct piece *piece,
			   size_t nbytes)
{
	const struct imgc_geometry *g = &job->geometry;
	uint64_t length = prefix_nbytes(g) + nbytes;
	uint64_t padding = (0 - length) & (g->compressed_alignment - 1);
	uint8_t *out = slot->packed + slot->packed_nbytes;

	if (g->prefix == IMGC_PREFIX_GRAIN_MARKER)
		put_grain_marker(out, slot->start + piece->start, nbytes);
	memset(out + length, 0, padding);
	piece->state = IMGC_BLOCK_COMPRESSED;
	piece->packed_start = slot->packed_nbytes;
	piece->packed_nbytes = (uint32_t)length;
	slot->packed_nbytes += length + padding;
}

/*
 * Compresses the piece to the end of the slot's packed bytes.  *fits is false if the
 * result is not smaller than the block and the format can store it plain.
 */
static int pack(struct worker *worker, struct slot *slot, struct piece *piece, bool *fits,
		struct imgc_error *err)
{
	const struct imgc_job *job = worker->job;
	uint64_t block = job->geometry.block_nbytes;
	size_t nbytes = 0;

	/* The whole block: the disk's last one may reach past its end. */
	imgc_view_materialise(&slot->view, piece->start, piece->start + block);
	int status = imgc_compress(worker->compressor, slot->view.data + piece->start, block,
				   packed_place(job, slot), imgc_packed_room(worker), &nbytes);
	if (status)
		return imgc_fail(err, status, 0, slot->start + piece->start, IMGC_TARGET,
				 "compress");
	*fits = nbytes > 0;
	if (*fits)
		finish_packing(job, slot, piece, nbytes);
	return IMGC_OK;
}

/* The piece as a source has compressed it; NULL if it must be compressed. */
static const struct reused *find_reused(const struct worker *worker, const struct piece *piece,
					const uint8_t **bytes)
{
	if (!worker->reuse.blocks)
		return NULL;
	return imgc_reuse_find(&worker->reuse, piece->start, bytes);
}

static void pack_reused(struct worker *worker, struct slot *slot, struct piece *piece,
			const struct reused *block, const uint8_t *bytes)
{
	struct counters *c = worker->counters;

	memcpy(packed_place(worker->job, slot), bytes, block->nbytes);
	finish_packing(worker->job, slot, piece, block->nbytes);
	atomic_fetch_add_explicit(&c->reused, piece->nbytes, memory_order_relaxed);
	if (block->is_trusted)
		atomic_fetch_add_explicit(&c->trusted, piece->nbytes, memory_order_relaxed);
}

/* ------------------------------------------------------------------- pieces */

/* Whether both sides are equal.  The target leaves such a block to its backing file. */
static bool equals_base(const struct worker *worker, const struct slot *slot, uint64_t start,
			uint64_t end)
{
	bool here = imgc_view_has_data(&slot->view, start, end);

	if (!here && !imgc_view_has_data(&worker->other, start, end))
		return true;
	imgc_view_materialise(&slot->view, start, end);
	imgc_view_materialise(&worker->other, start, end);
	return memcmp(slot->view.data + start, worker->other.data + start, end - start) == 0;
}

static bool piece_is_zero(const struct imgc_job *job, const struct slot *slot, uint64_t start,
			  uint64_t end)
{
	if (!imgc_view_has_data(&slot->view, start, end))
		return true;
	imgc_view_materialise(&slot->view, start, end);
	return is_zero(job, &slot->view, start, end);
}

/* Without a base ABSENT reads as zeros; see mark_zero_blocks() in job.c. */
static uint32_t zero_state(const struct imgc_job *job)
{
	return job->base.n ? IMGC_BLOCK_ZERO : IMGC_BLOCK_ABSENT;
}

static int process_piece(struct worker *worker, struct slot *slot, struct piece *piece,
			 struct imgc_error *err)
{
	const struct imgc_job *job = worker->job;
	const struct imgc_geometry *g = &job->geometry;
	uint64_t start = piece->start, end = start + piece->nbytes;
	const uint8_t *bytes = NULL;
	const struct reused *reused = find_reused(worker, piece, &bytes);
	bool fits = reused != NULL;

	piece->state = IMGC_BLOCK_ABSENT;
	if (job->base.n && equals_base(worker, slot, start, end))
		return IMGC_OK;
	if (g->codec.codec != IMGC_CODEC_NONE) {
		/* A trusted block has no bytes here to look at. */
		bool zero = !(reused && reused->is_trusted) && piece_is_zero(job, slot, start, end);
		int status = IMGC_OK;

		if (zero && g->zero_policy != IMGC_ZERO_STORE) {
			piece->state = zero_state(job);
			return IMGC_OK;
		}
		slot->data_nbytes += zero ? 0 : piece->nbytes;
		if (reused)
			pack_reused(worker, slot, piece, reused, bytes);
		else if (g->reuse != IMGC_REUSE_ONLY)
			status = pack(worker, slot, piece, &fits, err);
		if (status || fits)
			return status;
	}
	piece->first_run = slot->n_runs;
	if (!find_runs(job, slot, start, end)) {
		piece->state = zero_state(job);
		return IMGC_OK;
	}
	piece->state = IMGC_BLOCK_STORED;
	piece->n_runs = slot->n_runs - piece->first_run;
	if (g->codec.codec == IMGC_CODEC_NONE)
		slot->data_nbytes += piece->nbytes;
	return IMGC_OK;
}

static int process_pieces(struct worker *worker, struct slot *slot, struct imgc_error *err)
{
	const struct imgc_job *job = worker->job;
	uint64_t at = slot->start;

	while (at < slot->end) {
		uint64_t next = (at | (job->piece_nbytes - 1)) + 1;
		struct piece *piece = &slot->pieces[slot->n_pieces++];

		*piece = (struct piece){
			.block = at / job->geometry.block_nbytes,
			.start = (uint32_t)(at - slot->start),
			.nbytes = (uint32_t)(imgc_min_u64(next, slot->end) - at),
		};
		int status = imgc_check_stopped(&job->stop, err);

		if (status == IMGC_OK)
			status = process_piece(worker, slot, piece, err);
		if (status)
			return status;
		at = next;
	}
	return IMGC_OK;
}

/* --------------------------------------------------------------- comparison */

static void note_difference(struct imgc_job *job, uint64_t guest_offset)
{
	uint64_t seen = atomic_load(&job->first_difference);

	while (guest_offset < seen &&
	       !atomic_compare_exchange_weak(&job->first_difference, &seen, guest_offset))
		;
}

static void compare_window(struct worker *worker, struct slot *slot)
{
	const uint64_t step = 4096;
	uint64_t nbytes = slot->end - slot->start;

	for (uint64_t at = 0; at < nbytes; at += step) {
		uint64_t stop = imgc_min_u64(at + step, nbytes);

		if (equals_base(worker, slot, at, stop))
			continue;
		while (slot->view.data[at] == worker->other.data[at])
			at++;
		note_difference(worker->job, slot->start + at);
		return;
	}
}

static uint8_t compare_part(const struct worker *worker, const struct slot *slot, uint64_t start,
			    uint64_t end)
{
	uint8_t bits = 0;

	if (!equals_base(worker, slot, start, end))
		bits |= IMGC_GRANULE_DIFFERS;
	if (!piece_is_zero(worker->job, slot, start, end))
		bits |= IMGC_GRANULE_HAS_DATA;
	return bits;
}

static uint8_t *granule_at(const struct imgc_job *job, uint64_t guest_offset)
{
	uint64_t granule = job->options.granule_nbytes;

	return &job->batch.granules[guest_offset / granule - job->batch.guest_start / granule];
}

/*
 * Granules that are not larger than a window are in this one only, so their bytes are
 * set here.  A larger one is completed window by window; see imgc_window_place().
 */
static void compare_granules(struct worker *worker, struct slot *slot)
{
	const struct imgc_job *job = worker->job;
	uint64_t granule = job->options.granule_nbytes, nbytes = slot->end - slot->start;

	if (granule > job->window_nbytes) {
		slot->granule = compare_part(worker, slot, 0, nbytes);
		return;
	}
	for (uint64_t at = slot->start; at < slot->end;) {
		uint64_t next = imgc_min_u64((at | (granule - 1)) + 1, slot->end);

		*granule_at(job, at) =
			compare_part(worker, slot, at - slot->start, next - slot->start);
		at = next;
	}
}

/* --------------------------------------------------------------- rate limit */

/*
 * The calling thread waits only for a moment, and comes back to the window: it also looks
 * for signals.
 */
int imgc_window_await_rate(const struct imgc_job *job, uint64_t nbytes, struct imgc_error *err)
{
	if (!job->options.rate_limit)
		return IMGC_OK;
	if (job->options.ignores_rate)
		nbytes = 0;
	while (!imgc_rate_limit_take(job->options.rate_limit, nbytes, RATE_POLL_MS)) {
		int status = imgc_check_stopped(&job->stop, err);

		if (status)
			return status;
		if (job->in_caller)
			return IMGC_WINDOW_WAITS;
	}
	return IMGC_OK;
}

static uint64_t limited_nbytes(const struct imgc_job *job, const struct slot *slot)
{
	uint64_t nbytes = slot->end - slot->start;

	if (job->geometry.zero_policy == IMGC_ZERO_STORE)
		return nbytes;
	return imgc_min_u64(nbytes,
			    data_nbytes(job->rows, slot->start, slot->end, job->leaves_unread) +
				    data_nbytes(job->base, slot->start, slot->end, false));
}

/* ------------------------------------------------------------------ process */

/* Bytes of the window that a stream did not have, since it has ended. */
static uint64_t nbytes_behind_end(const struct imgc_job *job, const struct slot *slot)
{
	uint64_t end;

	if (!job->open_end || !imgc_file_stream_end(job->open_end, &end) || slot->end <= end)
		return 0;
	return data_nbytes(job->rows, imgc_max_u64(slot->start, end), slot->end, false);
}

/* A window that has waited in the calling thread goes on with what is left to do. */
static int read_window(struct worker *worker, struct slot *slot, struct reuse *reuse,
		       struct imgc_error *err)
{
	struct imgc_job *job = worker->job;
	struct reader *reader = &worker->reader;
	uint64_t before = reader->bytes_read;
	int status = IMGC_OK;

	if (!slot->is_admitted)
		status = imgc_window_await_rate(job, limited_nbytes(job, slot), err);
	if (status)
		return status;
	slot->is_admitted = true;
	if (slot->is_read)
		return IMGC_OK;
	status = imgc_reader_fill(reader, job->rows, slot->start, slot->end, &slot->view, reuse,
				  err);
	slot->is_read = status == IMGC_OK;
	if (slot->is_read)
		reader->bytes_read -= nbytes_behind_end(job, slot);
	else
		reader->bytes_read = before; /* what has to be waited for counts when it comes */
	return status;
}

int imgc_window_process(struct worker *worker, struct slot *slot, struct imgc_error *err)
{
	struct imgc_job *job = worker->job;
	struct reuse *reuse = worker->reuse.blocks ? &worker->reuse : NULL;

	slot->n_pieces = slot->n_runs = 0;
	slot->packed_nbytes = slot->data_nbytes = 0;
	slot->granule = 0;
	if (slot->is_span) {
		slot->data_nbytes = slot->end - slot->start;
		return IMGC_OK;
	}
	int status = read_window(worker, slot, reuse, err);

	if (status == IMGC_OK && job->open_end)
		status = imgc_window_meet_end(job, slot, err);
	if (status == IMGC_OK)
		status = imgc_leaves_make(worker, slot, err);
	if (status == IMGC_OK && job->base.n)
		status = imgc_reader_fill(&worker->reader, job->base, slot->start, slot->end,
					  &worker->other, NULL, err);
	if (status)
		return status;
	if (job->options.kind == IMGC_JOB_DIGEST)
		return IMGC_OK;
	if (job->options.kind == IMGC_JOB_COMPARE) {
		if (job->options.granule_nbytes)
			compare_granules(worker, slot);
		else
			compare_window(worker, slot);
		return IMGC_OK;
	}
	if (job->geometry.placing == IMGC_PLACE_APPEND)
		return process_pieces(worker, slot, err);

	find_runs(job, slot, 0, slot->end - slot->start);
	for (size_t i = 0; i < slot->n_runs; i++)
		slot->data_nbytes += slot->runs[i].end - slot->runs[i].start;
	return IMGC_OK;
}

/* -------------------------------------------------------------------- place */

static int fail_to_place(const struct imgc_job *job, int status, struct imgc_error *err)
{
	return imgc_fail(err, status, 0, job->placer.next, IMGC_TARGET, "place");
}

/*
 * Zeros what `piece`, the first one of its block, leaves of the block: all of it if the
 * block has more pieces, since those that are zeros are not written.
 */
static int clear_block(struct imgc_job *job, const struct piece *piece, struct imgc_error *err)
{
	uint64_t block_nbytes = job->geometry.block_nbytes;
	uint64_t length = imgc_min_u64(block_nbytes,
				       job->geometry.guest_nbytes - piece->block * block_nbytes);
	uint64_t done = piece->nbytes == length ? length : 0;
	int status = IMGC_OK;

	if (job->geometry.clears_blocks)
		status = imgc_file_zero(job->options.target, job->placer.open_offset + done,
					block_nbytes - done, err);
	return imgc_fail_in(err, status, IMGC_TARGET);
}

/* Gives a block its place, unless a window before this one has; *opened says which. */
static int open_block(struct imgc_job *job, uint64_t block, bool *opened, struct imgc_error *err)
{
	uint64_t block_nbytes = job->geometry.block_nbytes;
	uint64_t length =
		imgc_min_u64(block_nbytes, job->geometry.guest_nbytes - block * block_nbytes);
	struct placer *placer = &job->placer;

	*opened = !placer->block_is_open || placer->open_block != block;
	if (!*opened)
		return IMGC_OK;
	int status = imgc_placer_stored(placer, block, length, &placer->open_offset);

	if (status)
		return fail_to_place(job, status, err);
	placer->open_block = block;
	placer->block_is_open = true;
	job->batch.placements[block - job->batch.guest_start / block_nbytes] =
		(struct imgc_placement){placer->open_offset, (uint32_t)length, IMGC_BLOCK_STORED};
	return IMGC_OK;
}

static int place_stored(struct imgc_job *job, const struct slot *slot, struct piece *piece,
			struct imgc_error *err)
{
	uint64_t block_start = piece->block * job->geometry.block_nbytes;
	int status = open_block(job, piece->block, &piece->opens_block, err);

	if (status == IMGC_OK && piece->opens_block)
		status = clear_block(job, piece, err);
	piece->host_offset = job->placer.open_offset + (slot->start + piece->start - block_start);
	return status;
}

static int place_span(struct imgc_job *job, struct slot *slot, struct imgc_error *err)
{
	uint64_t block = slot->start / job->geometry.block_nbytes;
	int status = open_block(job, block++, &slot->opens_block, err);

	for (; block * job->geometry.block_nbytes < slot->end && status == IMGC_OK; block++) {
		bool opened;

		status = open_block(job, block, &opened, err);
	}
	return status;
}

int imgc_window_place(struct imgc_job *job, struct slot *slot, struct imgc_error *err)
{
	if (slot->is_span && job->appends)
		return place_span(job, slot, err);
	if (slot->granule)
		*granule_at(job, slot->start) |= slot->granule;
	for (size_t i = 0; i < slot->n_pieces; i++) {
		struct piece *piece = &slot->pieces[i];
		uint64_t first_block = job->batch.guest_start / job->geometry.block_nbytes;
		int status = IMGC_OK;

		if (piece->state == IMGC_BLOCK_STORED) {
			status = place_stored(job, slot, piece, err);
		} else if (piece->state == IMGC_BLOCK_COMPRESSED) {
			status = imgc_placer_compressed(&job->placer, piece->block,
							piece->packed_nbytes, &piece->host_offset);
			if (status)
				return fail_to_place(job, status, err);
			job->batch.placements[piece->block - first_block] = (struct imgc_placement){
				piece->host_offset, piece->packed_nbytes, IMGC_BLOCK_COMPRESSED};
		} else if (piece->state == IMGC_BLOCK_ZERO) {
			job->batch.placements[piece->block - first_block].state = IMGC_BLOCK_ZERO;
		}
		if (status)
			return status;
	}
	return IMGC_OK;
}
