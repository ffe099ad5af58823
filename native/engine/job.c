/*
 * job.c - the life of a job: create; start, wait and finish for each batch; destroy
 */
#include "engine/engine.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "common/checked.h"
#include "common/error.h"

#define WINDOW_NBYTES (512u * 1024)
/*
 * Of files that are read or written directly, as much as this is under way at once in all
 * workers together, or waits for the writer.
 */
#define DIRECT_NBYTES (8u * 1024 * 1024)
#define MAX_DIRECT_WINDOW_NBYTES (4u * 1024 * 1024)
#define MAX_WINDOW_NBYTES (256u * 1024 * 1024)
#define COMPRESSED_BUFFER_NBYTES (1024u * 1024)
#define MIN_BLOCK_NBYTES 512u
#define MAX_BLOCK_NBYTES (256u * 1024 * 1024)
#define MAX_COMPRESSED_BLOCK_NBYTES (2u * 1024 * 1024)
#define MAX_SPARSE_NBYTES (1024u * 1024)
#define PAGE_NBYTES 4096u

static int invalid(struct imgc_error *err, const char *what)
{
	return imgc_fail_call(err, IMGC_INVALID_ARGUMENT, what);
}

/* ----------------------------------------------------------------- arguments */

static bool geometry_is_valid(const struct imgc_geometry *g)
{
	bool compresses = g->codec.codec != IMGC_CODEC_NONE;

	return imgc_is_power_of_two(g->block_nbytes) && g->block_nbytes >= MIN_BLOCK_NBYTES &&
	       g->block_nbytes <= MAX_BLOCK_NBYTES && imgc_is_power_of_two(g->stored_alignment) &&
	       imgc_is_power_of_two(g->compressed_alignment) && g->guest_nbytes <= INT64_MAX &&
	       g->host_base <= INT64_MAX - g->guest_nbytes && g->guest_base <= g->guest_nbytes &&
	       g->placing <= IMGC_PLACE_APPEND && g->zero_policy <= IMGC_ZERO_STORE &&
	       g->prefix <= IMGC_PREFIX_GRAIN_MARKER && g->sparse_nbytes <= MAX_SPARSE_NBYTES &&
	       g->sparse_nbytes % SECTOR_NBYTES == 0 &&
	       (!compresses || (g->placing == IMGC_PLACE_APPEND &&
				g->block_nbytes <= MAX_COMPRESSED_BLOCK_NBYTES)) &&
	       (!g->store_incompressible || g->compressed_alignment == 1) &&
	       g->group_nblocks <= INT64_MAX / g->block_nbytes &&
	       g->stored_prefix_nbytes <= IMGC_MAX_STORED_PREFIX_NBYTES &&
	       g->stored_prefix_byte <= UINT8_MAX && (!g->clears_blocks || g->sparse_nbytes == 0) &&
	       g->reuse <= IMGC_REUSE_ONLY && (!g->reuse || compresses) &&
	       (g->stored_prefix_nbytes == 0 || (g->placing == IMGC_PLACE_APPEND && !compresses));
}

static bool granule_is_valid(uint64_t nbytes)
{
	return imgc_is_power_of_two(nbytes) && nbytes >= IMGC_MIN_GRANULE_NBYTES &&
	       nbytes <= IMGC_MAX_GRANULE_NBYTES;
}

static int check_options(const struct imgc_job_options *o, struct imgc_error *err)
{
	if (o->n_threads < 1 || o->n_threads > IMGC_MAX_THREADS)
		return invalid(err, "threads");
	if (o->kind > IMGC_JOB_DIGEST)
		return invalid(err, "kind");
	if (o->checksum == IMGC_CHECKSUM_NONE ? o->kind == IMGC_JOB_DIGEST
					      : o->kind == IMGC_JOB_COMPARE)
		return invalid(err, "checksum");
	if (o->window_nbytes != 0 &&
	    (!imgc_is_power_of_two(o->window_nbytes) || o->window_nbytes > MAX_WINDOW_NBYTES ||
	     o->window_nbytes < PAGE_NBYTES))
		return invalid(err, "window");
	if (o->kind == IMGC_JOB_CONVERT && (!geometry_is_valid(&o->geometry) || !o->target))
		return invalid(err, "geometry");
	if (o->kind == IMGC_JOB_CONVERT && o->has_base &&
	    (o->geometry.placing != IMGC_PLACE_APPEND ||
	     o->geometry.block_nbytes > IMGC_MAX_BASE_BLOCK_NBYTES))
		return invalid(err, "base");
	if (o->salvage && (o->kind != IMGC_JOB_CONVERT || o->has_base))
		return invalid(err, "salvage");
	if (o->reflink && (o->kind != IMGC_JOB_CONVERT || o->salvage))
		return invalid(err, "reflink");
	if (o->trust_blocks && (o->kind != IMGC_JOB_CONVERT || o->salvage || o->has_base))
		return invalid(err, "trust_blocks");
	if (o->stores_data && (o->kind != IMGC_JOB_CONVERT || o->has_base || o->salvage ||
			       o->reflink || o->geometry.placing != IMGC_PLACE_APPEND ||
			       o->geometry.codec.codec != IMGC_CODEC_NONE))
		return invalid(err, "stores_data");
	if (o->granule_nbytes != 0 &&
	    (o->kind != IMGC_JOB_COMPARE || !granule_is_valid(o->granule_nbytes)))
		return invalid(err, "granule");
	for (size_t i = 0; i < o->n_sources; i++)
		if (!o->sources[i].file || o->sources[i].block_nbytes > MAX_SOURCE_BLOCK_NBYTES)
			return invalid(err, "sources");
	return IMGC_OK;
}

static bool reads_directly(const struct imgc_job_options *o)
{
	for (size_t i = 0; i < o->n_sources; i++)
		if (o->sources[i].file->is_direct)
			return true;
	return false;
}

static uint64_t least_window(const struct imgc_job_options *o)
{
	if (o->window_nbytes)
		return o->window_nbytes;
	if (!reads_directly(o) && !(o->target && o->target->is_direct))
		return WINDOW_NBYTES;
	return imgc_max_u64(WINDOW_NBYTES,
			    imgc_min_u64(MAX_DIRECT_WINDOW_NBYTES, DIRECT_NBYTES / o->n_threads));
}

/*
 * A window holds any block that is compressed, or compared with the base, as a whole.
 * So that a block need not be zeroed before it is written in parts, it also holds one
 * that replaces old bytes, if it is not too large.  Otherwise it is small enough for the
 * CPU's cache, or large where files are direct.
 */
static uint64_t choose_window(const struct imgc_job_options *o)
{
	uint64_t least = least_window(o);
	uint64_t window = PAGE_NBYTES;

	for (size_t i = 0; i < o->n_sources; i++)
		least = imgc_max_u64(least, o->sources[i].block_nbytes);
	if (o->checksum)
		least = imgc_max_u64(least, IMGC_CHECKSUM_BLOCK_NBYTES);
	if (o->kind == IMGC_JOB_CONVERT) {
		least = imgc_max_u64(least, o->geometry.sparse_nbytes);
		bool clears = o->geometry.clears_blocks &&
			      o->geometry.block_nbytes <= IMGC_MAX_BASE_BLOCK_NBYTES;

		if (o->geometry.codec.codec != IMGC_CODEC_NONE || o->has_base || clears)
			least = imgc_max_u64(least, o->geometry.block_nbytes);
	}
	while (window < least)
		window *= 2;
	return window;
}

/* -------------------------------------------------------------------- memory */

static void view_destroy(struct view *view)
{
	free(view->data);
	free(view->ranges);
	*view = (struct view){0};
}

static int view_create(struct view *view, uint64_t window_nbytes)
{
	/* One more page, for the IMGC_COMPRESS_SLACK_NBYTES after the last block. */
	view->data = aligned_alloc(PAGE_NBYTES, window_nbytes + PAGE_NBYTES);
	view->ranges = malloc((window_nbytes / SECTOR_NBYTES + 1) * sizeof(*view->ranges));
	if (!view->data || !view->ranges) {
		view_destroy(view);
		return IMGC_NO_MEMORY;
	}
	memset(view->data + window_nbytes, 0, IMGC_COMPRESS_SLACK_NBYTES);
	return IMGC_OK;
}

static int slot_create(struct imgc_job *job, struct slot *slot)
{
	uint64_t window = job->window_nbytes, n_pieces = window / job->piece_nbytes;
	const struct imgc_geometry *g = &job->geometry;

	if (view_create(&slot->view, window))
		return IMGC_NO_MEMORY;
	if (job->options.kind != IMGC_JOB_CONVERT)
		return IMGC_OK;
	slot->pieces = malloc(n_pieces * sizeof(*slot->pieces));
	slot->runs = malloc((window / SECTOR_NBYTES + 1) * sizeof(*slot->runs));
	if (!slot->pieces || !slot->runs)
		return IMGC_NO_MEMORY;
	if (g->codec.codec == IMGC_CODEC_NONE)
		return IMGC_OK;
	uint64_t bound = imgc_compressor_bound(job->workers[0].compressor, g->block_nbytes) +
			 GRAIN_MARKER_NBYTES + g->compressed_alignment;

	slot->packed = malloc(n_pieces * bound);
	return slot->packed ? IMGC_OK : IMGC_NO_MEMORY;
}

static void slot_destroy(struct slot *slot)
{
	view_destroy(&slot->view);
	free(slot->packed);
	free(slot->pieces);
	free(slot->runs);
}

static uint64_t largest_source_block(const struct imgc_job *job)
{
	uint64_t largest = 0;

	for (size_t i = 0; i < job->options.n_sources; i++)
		largest = imgc_max_u64(largest, job->sources[i].block_nbytes);
	return largest;
}

static int worker_create(struct imgc_job *job, struct worker *worker, struct counters *counters)
{
	const struct imgc_job_options *o = &job->options;
	struct reader *reader = &worker->reader;
	uint64_t block = largest_source_block(job);

	worker->job = job;
	worker->counters = counters;
	reader->stop = &job->stop;
	reader->files = job->sources;
	reader->salvage = o->salvage ? &job->salvage : NULL;
	int status = imgc_io_context_create(o->io_variant, reads_directly(o), &reader->io);

	if (status == IMGC_OK && o->checksum)
		status = imgc_digest_create(o->checksum, &worker->digest);
	if (status == IMGC_OK && o->kind == IMGC_JOB_CONVERT &&
	    job->geometry.codec.codec != IMGC_CODEC_NONE)
		status = imgc_compressor_create(&job->geometry.codec, &worker->compressor);
	if (status || block == 0)
		return status;
	if (o->kind == IMGC_JOB_CONVERT && job->geometry.reuse &&
	    imgc_reuse_create(&worker->reuse, o, job->window_nbytes, imgc_packed_room(worker)))
		return IMGC_NO_MEMORY;
	status = imgc_decompressor_create(o->inflate_variant, &reader->decompressor);
	reader->compressed_capacity =
		imgc_max_u64(COMPRESSED_BUFFER_NBYTES, max_compressed_nbytes(block));
	reader->compressed = malloc(reader->compressed_capacity);
	reader->block = malloc(block);
	if (status == IMGC_OK && (!reader->compressed || !reader->block))
		status = IMGC_NO_MEMORY;
	return status;
}

static void worker_destroy(struct worker *worker)
{
	imgc_io_context_destroy(worker->reader.io);
	imgc_decompressor_destroy(worker->reader.decompressor);
	imgc_compressor_destroy(worker->compressor);
	imgc_digest_destroy(worker->digest);
	imgc_reuse_destroy(&worker->reuse);
	free(worker->reader.compressed);
	free(worker->reader.block);
	view_destroy(&worker->other);
}

static size_t slots_for(size_t n_workers)
{
	return 2 * n_workers + 2;
}

/*
 * Makes what the first workers need, for those of them that have not worked before.  A
 * job that never gets all of its threads does not take all of its memory.
 */
static int require_workers(struct imgc_job *job, size_t n)
{
	for (; job->n_workers_made < n; job->n_workers_made++) {
		size_t i = job->n_workers_made;
		int status = worker_create(job, &job->workers[i], &job->counters[i]);

		if (status) {
			worker_destroy(&job->workers[i]);
			job->workers[i] = (struct worker){0};
			return status;
		}
	}
	for (; job->n_slots_made < slots_for(n); job->n_slots_made++)
		if (slot_create(job, &job->slots[job->n_slots_made])) {
			slot_destroy(&job->slots[job->n_slots_made]);
			job->slots[job->n_slots_made] = (struct slot){0};
			return IMGC_NO_MEMORY;
		}
	return IMGC_OK;
}

/* Between batches, while the ring is empty, which then has its size for these workers. */
static int set_workers(struct imgc_job *job, size_t n)
{
	int status = require_workers(job, n);

	if (status)
		return status;
	job->n_workers = n;
	job->n_slots = slots_for(n);
	job->claimed = job->placed = job->written = 0;
	return IMGC_OK;
}

static int create_workers(struct imgc_job *job)
{
	size_t n = job->options.n_threads;

	job->workers = calloc(n, sizeof(*job->workers));
	job->counters = aligned_alloc(_Alignof(struct counters), n * sizeof(*job->counters));
	job->slots = calloc(slots_for(n), sizeof(*job->slots));
	if (!job->workers || !job->counters || !job->slots)
		return IMGC_NO_MEMORY;
	memset(job->counters, 0, n * sizeof(*job->counters));
	int status = set_workers(job, 1);

	if (status)
		return status;
	if (!job->options.checksum)
		return IMGC_OK;
	return imgc_digest_of_zeros(job->workers[0].digest, IMGC_CHECKSUM_BLOCK_NBYTES,
				    job->zero_leaf);
}

static int create_stored_prefix(struct imgc_job *job)
{
	size_t nbytes = job->appends ? job->geometry.stored_prefix_nbytes : 0;

	if (nbytes == 0)
		return IMGC_OK;
	job->stored_prefix = malloc(nbytes);
	if (!job->stored_prefix)
		return IMGC_NO_MEMORY;
	memset(job->stored_prefix, (int)job->geometry.stored_prefix_byte, nbytes);
	return IMGC_OK;
}

/* Whether a source can give blocks, or pages of the page cache, instead of a copy. */
static bool can_share(const struct imgc_job *job, const struct imgc_file *source)
{
	return job->may_move ? imgc_file_can_move(job->options.target, source)
			     : source->reflink_block_nbytes != 0;
}

static int create_may_reflink(struct imgc_job *job)
{
	const struct imgc_job_options *o = &job->options;

	if (!job->may_move && (!o->reflink || o->target->reflink_block_nbytes == 0))
		return IMGC_OK;
	job->may_reflink = calloc(o->n_sources + 1, sizeof(*job->may_reflink));
	if (!job->may_reflink)
		return IMGC_NO_MEMORY;
	for (size_t i = 0; i < o->n_sources; i++)
		atomic_init(&job->may_reflink[i], can_share(job, job->sources[i].file));
	return IMGC_OK;
}

static int create_locks(struct imgc_job *job)
{
	pthread_condattr_t attributes;

	if (pthread_condattr_init(&attributes))
		return IMGC_NO_MEMORY;
	pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
	bool failed =
		pthread_mutex_init(&job->lock, NULL) || pthread_cond_init(&job->called, NULL) ||
		pthread_cond_init(&job->changed, NULL) || pthread_cond_init(&job->told, NULL) ||
		pthread_cond_init(&job->ended, &attributes);

	pthread_condattr_destroy(&attributes);
	job->locks_exist = !failed;
	return failed ? IMGC_NO_MEMORY : imgc_salvage_create(&job->salvage);
}

int imgc_job_create(const struct imgc_job_options *options, struct imgc_job **out,
		    struct imgc_error *err)
{
	int status = check_options(options, err);

	if (status)
		return status;
	struct imgc_job *job = calloc(1, sizeof(*job));

	if (!job)
		return imgc_fail_call(err, IMGC_NO_MEMORY, "job_create");
	job->options = *options;
	job->geometry = options->geometry;
	job->window_nbytes = choose_window(options);
	job->appends =
		options->kind == IMGC_JOB_CONVERT && options->geometry.placing == IMGC_PLACE_APPEND;
	job->max_writers = options->n_threads;
	if (options->kind == IMGC_JOB_CONVERT && options->target->writes_are_serial)
		job->max_writers = 1;
	job->may_move = options->kind == IMGC_JOB_CONVERT && options->target->takes_pages;
	job->piece_nbytes = job->window_nbytes;
	if (options->kind == IMGC_JOB_CONVERT && job->geometry.block_nbytes < job->window_nbytes)
		job->piece_nbytes = job->geometry.block_nbytes;
	atomic_store(&job->first_difference, IMGC_NO_DIFFERENCE);
	job->sources = calloc(options->n_sources + 1, sizeof(*job->sources));
	if (!job->sources) {
		status = IMGC_NO_MEMORY;
		goto out;
	}
	if (options->n_sources > 0)
		memcpy(job->sources, options->sources, options->n_sources * sizeof(*job->sources));
	job->options.sources = job->sources;
	for (size_t i = 0; i < options->n_sources && options->kind == IMGC_JOB_CONVERT; i++)
		if (imgc_file_is_open_ended(job->sources[i].file))
			job->open_end = job->sources[i].file;
	imgc_placer_init(&job->placer, &job->geometry, options->next_offset);
	status = create_locks(job);
	if (status == IMGC_OK)
		status = create_stored_prefix(job);
	if (status == IMGC_OK)
		status = create_may_reflink(job);
	if (status == IMGC_OK)
		status = create_workers(job);
	if (status == IMGC_OK && !options->salvage)
		status = imgc_announcer_create(&job->announcer, job->sources);
out:
	if (status) {
		imgc_job_destroy(job);
		return imgc_fail_call(err, status, "job_create");
	}
	*out = job;
	return IMGC_OK;
}

/* Between batches: ends the threads of all but the first workers. */
static void end_threads(struct imgc_job *job, unsigned n_kept)
{
	if (job->n_threads <= n_kept)
		return;
	pthread_mutex_lock(&job->lock);
	for (unsigned i = n_kept; i < job->n_threads; i++)
		job->workers[i].must_end = true;
	pthread_cond_broadcast(&job->called);
	pthread_mutex_unlock(&job->lock);
	for (; job->n_threads > n_kept; job->n_threads--)
		pthread_join(job->workers[job->n_threads - 1].thread, NULL);
}

void imgc_job_destroy(struct imgc_job *job)
{
	if (!job)
		return;
	if (job->in_batch) {
		imgc_job_cancel(job);
		imgc_job_finish(job, NULL);
	}
	end_threads(job, 0);
	for (size_t i = 0; i < job->n_workers_made; i++)
		worker_destroy(&job->workers[i]);
	for (size_t i = 0; i < job->n_slots_made; i++)
		slot_destroy(&job->slots[i]);
	if (job->locks_exist) {
		pthread_mutex_destroy(&job->lock);
		pthread_cond_destroy(&job->called);
		pthread_cond_destroy(&job->changed);
		pthread_cond_destroy(&job->told);
		pthread_cond_destroy(&job->ended);
	}
	imgc_announcer_destroy(&job->announcer);
	imgc_salvage_destroy(&job->salvage);
	free(job->workers);
	free(job->counters);
	free(job->slots);
	free(job->sources);
	free(job->stored_prefix);
	free(job->may_reflink);
	free(job);
}

/* -------------------------------------------------------------------- batches */

static bool ends_at(uint64_t guest_end, uint64_t unit, uint64_t disk_end)
{
	return guest_end % unit == 0 || guest_end == disk_end;
}

static bool batch_fits_geometry(const struct imgc_job *job, const struct imgc_batch *b)
{
	const struct imgc_geometry *g = &job->geometry;
	uint64_t block = g->block_nbytes, nbytes = b->guest_end - b->guest_start;

	if (b->guest_end > g->guest_nbytes || b->guest_start < g->guest_base ||
	    b->guest_start % block != 0 || !ends_at(b->guest_end, block, g->guest_nbytes))
		return false;
	if (b->base_extents && !job->options.has_base)
		return false;
	if (g->placing == IMGC_PLACE_IDENTITY)
		return true;
	if (!b->placements || b->n_placements != nbytes / block + (nbytes % block != 0))
		return false;
	return g->group_nblocks == 0 ||
	       ends_at(b->guest_end, g->group_nblocks * block, g->guest_nbytes);
}

static bool batch_fits_checksum(const struct imgc_job *job, const struct imgc_batch *b)
{
	const uint64_t block = IMGC_CHECKSUM_BLOCK_NBYTES;
	uint64_t nbytes = b->guest_end - b->guest_start;

	if (!job->options.checksum)
		return !b->leaves;
	return b->leaves && b->guest_start % block == 0 &&
	       b->n_leaves == nbytes / block + (nbytes % block != 0);
}

static bool granules_fit(const struct imgc_job *job, const struct imgc_batch *b)
{
	uint64_t granule = job->options.granule_nbytes;

	if (granule == 0)
		return !b->granules;
	return b->granules &&
	       b->n_granules == (b->guest_end - 1) / granule - b->guest_start / granule + 1;
}

static int check_batch(const struct imgc_job *job, const struct imgc_batch *b,
		       struct imgc_error *err)
{
	const struct imgc_job_options *o = &job->options;

	if (b->guest_start >= b->guest_end || b->guest_start % SECTOR_NBYTES != 0)
		return invalid(err, "batch");
	if (b->n_threads > o->n_threads)
		return invalid(err, "threads");
	if (o->kind == IMGC_JOB_CONVERT ? !batch_fits_geometry(job, b)
					: !b->base_extents == (o->kind == IMGC_JOB_COMPARE))
		return invalid(err, "batch");
	if (!batch_fits_checksum(job, b))
		return invalid(err, "leaves");
	if (!granules_fit(job, b))
		return invalid(err, "granules");
	int status = imgc_extents_check(b->extents, b->n_extents, job->sources, o->n_sources,
					b->guest_start, b->guest_end, err);

	if (status == IMGC_OK && b->base_extents)
		status = imgc_extents_check(b->base_extents, b->n_base_extents, job->sources,
					    o->n_sources, b->guest_start, b->guest_end, err);
	return status;
}

/* Made for the first batch with another side; a job without one saves the memory. */
static int create_other_views(struct imgc_job *job)
{
	for (size_t i = 0; i < job->n_workers; i++) {
		struct view *other = &job->workers[i].other;

		if (!other->data && view_create(other, job->window_nbytes))
			return IMGC_NO_MEMORY;
	}
	return IMGC_OK;
}

/* Whether the calling thread can do the work: it must come back to look for signals. */
static bool suits_caller(const struct imgc_job *job)
{
	const struct imgc_file *target = job->options.target;

	return job->n_workers == 1 && !(target && imgc_file_has_reader(target));
}

/* Makes threads for the first workers, as far as the system has any. */
static void require_threads(struct imgc_job *job, unsigned n)
{
	for (; job->n_threads < n; job->n_threads++) {
		struct worker *worker = &job->workers[job->n_threads];

		worker->is_called = worker->must_end = false;
		if (pthread_create(&worker->thread, NULL, imgc_worker_main, worker))
			break;
	}
}

/*
 * The calling thread works alone where one worker is enough, or where no thread can be
 * made.  With fewer threads than asked for, the batch only takes longer.
 *
 * Threads stay from batch to batch: new ones often share a core for a while.
 */
static void start_threads(struct imgc_job *job)
{
	unsigned n_wanted = suits_caller(job) ? 0 : (unsigned)job->n_workers;

	end_threads(job, n_wanted);
	require_threads(job, n_wanted);
	pthread_mutex_lock(&job->lock);
	job->in_caller = job->n_threads == 0;
	job->workers[0].reader.in_caller = job->in_caller;
	job->n_running = job->in_caller ? 1 : job->n_threads;
	for (unsigned i = 0; i < job->n_threads; i++)
		job->workers[i].is_called = true;
	pthread_cond_broadcast(&job->called);
	pthread_mutex_unlock(&job->lock);
}

/* Whether data can be stored that was not read; see IMGC_EXTENT_UNREAD. */
static bool may_leave_unread(const struct imgc_job *job)
{
	const struct imgc_job_options *o = &job->options;

	return (o->reflink || job->may_move) && !o->has_base && !o->salvage &&
	       job->geometry.codec.codec == IMGC_CODEC_NONE && !job->geometry.clears_blocks;
}

int imgc_job_start(struct imgc_job *job, const struct imgc_batch *batch, struct imgc_error *err)
{
	if (job->in_batch)
		return invalid(err, "start");
	int status = imgc_check_stopped(&job->stop, err);

	if (status == IMGC_OK)
		status = check_batch(job, batch, err);
	if (status)
		return status;
	status = set_workers(job, batch->n_threads ? batch->n_threads : job->options.n_threads);
	if (status)
		return imgc_fail_call(err, status, "start");
	if (batch->base_extents && create_other_views(job))
		return imgc_fail_call(err, IMGC_NO_MEMORY, "start");
	job->batch = *batch;
	job->rows = (struct rows){batch->extents, batch->n_extents};
	job->base = (struct rows){batch->base_extents, batch->n_base_extents};
	job->has_unread = may_leave_unread(job) && imgc_rows_have_unread(job->rows);
	job->leaves_unread = job->has_unread && !job->options.checksum;
	job->moves = job->leaves_unread && job->may_move;
	for (size_t i = 0; i < job->n_workers; i++)
		job->workers[i].reader.leaves_unread = job->leaves_unread;
	job->claim_row = job->claim_base = 0;
	job->cursor = batch->guest_start;
	imgc_announcer_start(&job->announcer, batch->guest_start, job->rows, job->base,
			     job->leaves_unread);
	start_threads(job);
	job->in_batch = true;
	return IMGC_OK;
}

int imgc_job_wait(struct imgc_job *job, int timeout_ms)
{
	struct timespec until;

	clock_gettime(CLOCK_MONOTONIC, &until);
	until.tv_sec += timeout_ms / 1000;
	until.tv_nsec += (long)(timeout_ms % 1000) * 1000000;
	if (until.tv_nsec >= 1000000000) {
		until.tv_sec++;
		until.tv_nsec -= 1000000000;
	}
	int outcome = 0;

	if (job->in_caller && job->n_running > 0)
		imgc_worker_work(&job->workers[0], &until);
	pthread_mutex_lock(&job->lock);
	while (job->n_running > 0 && outcome == 0 && !job->reports_end)
		outcome = pthread_cond_timedwait(&job->ended, &job->lock, &until);
	job->reports_end = false;
	int ended = job->n_running == 0;

	pthread_mutex_unlock(&job->lock);
	return ended;
}

/* For a target that states its zeros: ABSENT blocks become ZERO. */
static void mark_zero_blocks(struct imgc_job *job)
{
	for (size_t i = 0; i < job->batch.n_placements; i++)
		if (job->batch.placements[i].state == IMGC_BLOCK_ABSENT)
			job->batch.placements[i].state = IMGC_BLOCK_ZERO;
}

int imgc_job_finish(struct imgc_job *job, struct imgc_error *err)
{
	if (!job->in_batch)
		return invalid(err, "finish");
	if (job->in_caller && job->n_running > 0)
		imgc_worker_work(&job->workers[0], NULL);
	pthread_mutex_lock(&job->lock);
	while (job->n_running > 0)
		pthread_cond_wait(&job->ended, &job->lock);
	pthread_mutex_unlock(&job->lock);
	job->in_batch = false;
	if (atomic_load(&job->stop.failed)) {
		if (err)
			*err = job->error;
		return job->error.status;
	}
	if (atomic_load(&job->stop.cancelled))
		return imgc_fail_call(err, IMGC_CANCELLED, "cancel");
	if (job->appends && job->geometry.zero_policy == IMGC_ZERO_EXPLICIT && !job->base.n)
		mark_zero_blocks(job);
	if (job->appends && imgc_placer_close_group(&job->placer))
		return imgc_fail(err, IMGC_LIMIT, 0, job->placer.next, IMGC_TARGET, "place");
	return IMGC_OK;
}

/* --------------------------------------------------------- from other threads */

void imgc_job_cancel(struct imgc_job *job)
{
	atomic_store(&job->stop.cancelled, true);
	pthread_mutex_lock(&job->lock);
	pthread_cond_broadcast(&job->changed);
	imgc_open_end_stop(job);
	pthread_mutex_unlock(&job->lock);
}

void imgc_job_progress(const struct imgc_job *job, struct imgc_progress *out)
{
	*out = (struct imgc_progress){0};
	for (size_t i = 0; i < job->options.n_threads; i++) {
		struct counters *c = &job->counters[i];

		out->bytes_done += atomic_load_explicit(&c->done, memory_order_relaxed);
		out->bytes_data += atomic_load_explicit(&c->data, memory_order_relaxed);
		out->bytes_zero += atomic_load_explicit(&c->zero, memory_order_relaxed);
		out->bytes_read += atomic_load_explicit(&c->read, memory_order_relaxed);
		out->bytes_written += atomic_load_explicit(&c->written, memory_order_relaxed);
		out->bytes_reflinked += atomic_load_explicit(&c->reflinked, memory_order_relaxed);
		out->bytes_reused += atomic_load_explicit(&c->reused, memory_order_relaxed);
		out->bytes_trusted += atomic_load_explicit(&c->trusted, memory_order_relaxed);
	}
}

uint64_t imgc_job_next_offset(const struct imgc_job *job)
{
	return job->placer.next;
}

int imgc_job_set_next_offset(struct imgc_job *job, uint64_t next_offset)
{
	if (job->in_batch || next_offset < job->placer.next || next_offset > INT64_MAX)
		return IMGC_INVALID_ARGUMENT;
	if (next_offset != job->placer.next)
		imgc_placer_restart(&job->placer, next_offset);
	return IMGC_OK;
}

void imgc_job_packing(const struct imgc_job *job, uint64_t *start, uint64_t *end)
{
	*start = job->placer.packed_next;
	*end = job->placer.packed_end;
}

int imgc_job_set_packing(struct imgc_job *job, uint64_t start, uint64_t end)
{
	if (job->in_batch || start > end || end > job->placer.next)
		return IMGC_INVALID_ARGUMENT;
	job->placer.packed_next = start;
	job->placer.packed_end = end;
	return IMGC_OK;
}

size_t imgc_job_bad_ranges(const struct imgc_job *job, const struct imgc_bad_range **out)
{
	*out = job->salvage.ranges;
	return job->salvage.n;
}

uint64_t imgc_job_first_difference(const struct imgc_job *job)
{
	return atomic_load(&job->first_difference);
}
