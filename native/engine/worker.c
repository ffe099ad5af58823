/*
 * worker.c - the ring: which window is next, and which worker does what
 */
#include "engine/engine.h"

#include <time.h>

#include "common/checked.h"
#include "common/error.h"

#define MAX_ZERO_SPAN_NBYTES (128u * 1024 * 1024) /* so that a cancelled job ends soon */

#define MAX_UNREAD_SPAN_NBYTES (1024u * 1024 * 1024) /* for the same reason */
#define MAX_MOVED_SPAN_NBYTES (8u * 1024 * 1024)     /* takes time, and counts when it ends */

enum claim { CLAIM_NOTHING, CLAIM_WINDOW, CLAIM_ZERO_SPAN, CLAIM_UNREAD_SPAN };

/*
 * The end of the range without data that starts at the cursor: the cursor itself if
 * there is data.  *at is the row where the search goes on.
 */
static uint64_t empty_until(struct rows rows, size_t *at, uint64_t cursor)
{
	while (*at < rows.n && rows.rows[*at].guest_offset + rows.rows[*at].length <= cursor)
		++*at;
	uint64_t end = cursor;

	for (size_t i = *at; i < rows.n && rows.rows[i].kind <= IMGC_ZERO; i++) {
		end = rows.rows[i].guest_offset + rows.rows[i].length;
		if (end - cursor >= MAX_ZERO_SPAN_NBYTES)
			break;
	}
	return end;
}

/*
 * The end of the unread rows that start at the cursor, but at most `most` bytes further:
 * the cursor itself if none does.
 */
static uint64_t unread_until(struct rows rows, uint64_t cursor, uint64_t most)
{
	uint64_t end = cursor;

	for (size_t i = imgc_rows_find(rows, cursor); i < rows.n; i++) {
		if (!imgc_row_is_unread(&rows.rows[i]))
			break;
		end = rows.rows[i].guest_offset + rows.rows[i].length;
		if (end - cursor >= most)
			return cursor + most;
	}
	return end;
}

/*
 * Takes the next part of the batch: a window, or a longer span that is not read, since
 * it has no data on either side or unread rows only.  Windows start at multiples of their size, so
 * that they do not depend on what came before.
 */
static enum claim claim_next(struct imgc_job *job, uint64_t *start, uint64_t *end)
{
	uint64_t cursor = job->cursor, batch_end = job->batch.guest_end;
	uint64_t limit = atomic_load(&job->first_difference);

	if (cursor >= batch_end || cursor >= limit)
		return CLAIM_NOTHING;
	uint64_t window_end = imgc_min_u64((cursor | (job->window_nbytes - 1)) + 1, batch_end);

	*start = cursor;
	if (job->leaves_unread) {
		uint64_t most = job->moves ? MAX_MOVED_SPAN_NBYTES : MAX_UNREAD_SPAN_NBYTES;
		uint64_t span = unread_until(job->rows, cursor, most);

		if (span != batch_end)
			span &= ~(job->window_nbytes - 1);
		if (span >= window_end) {
			*end = job->cursor = span;
			return CLAIM_UNREAD_SPAN;
		}
	}
	/* With a base, zeros on both sides stay ABSENT, even if zeros are stored. */
	if (job->geometry.zero_policy != IMGC_ZERO_STORE || job->base.n) {
		uint64_t span = empty_until(job->rows, &job->claim_row, cursor);

		if (job->base.n && span >= window_end)
			span = imgc_min_u64(span, empty_until(job->base, &job->claim_base, cursor));
		span = imgc_min_u64(span, batch_end);
		if (span != batch_end)
			span &= ~(job->window_nbytes - 1);
		if (span >= window_end) {
			if (job->geometry.zero_policy == IMGC_ZERO_EXPLICIT)
				span = imgc_min_u64(span, cursor + MAX_ZERO_SPAN_NBYTES);
			*end = job->cursor = span;
			return CLAIM_ZERO_SPAN;
		}
	}
	*end = job->cursor = window_end;
	return CLAIM_WINDOW;
}

static void count(struct worker *worker, uint64_t guest_nbytes, uint64_t data_nbytes)
{
	struct counters *c = worker->counters;

	atomic_fetch_add_explicit(&c->data, data_nbytes, memory_order_relaxed);
	atomic_fetch_add_explicit(&c->zero, guest_nbytes - data_nbytes, memory_order_relaxed);
	atomic_fetch_add_explicit(&c->read, worker->reader.bytes_read, memory_order_relaxed);
	atomic_fetch_add_explicit(&c->done, guest_nbytes, memory_order_relaxed);
	worker->reader.bytes_read = 0;
}

/* The first error wins; the other workers stop. */
static void fail_job(struct imgc_job *job, const struct imgc_error *err)
{
	pthread_mutex_lock(&job->lock);
	if (!atomic_load(&job->stop.failed)) {
		job->error = *err;
		atomic_store(&job->stop.failed, true);
	}
	pthread_cond_broadcast(&job->changed);
	imgc_open_end_stop(job);
	pthread_mutex_unlock(&job->lock);
}

static void work_on_span(struct worker *worker, uint64_t start, uint64_t end)
{
	struct imgc_error err;

	if (imgc_leaves_make_zeros(worker, start, end, &err) ||
	    imgc_span_write_zeros(worker, start, end, &err))
		fail_job(worker->job, &err);
	else
		count(worker, end - start, 0);
}

static void work_on_writing(struct worker *worker, struct slot *slot)
{
	struct imgc_error err;

	if (imgc_window_write(worker, slot, &err))
		fail_job(worker->job, &err);
	else
		count(worker, slot->end - slot->start, slot->data_nbytes);
}

/* -------------------------------------------------------------------- ring */

static struct slot *slot_of(struct imgc_job *job, uint64_t number)
{
	return &job->slots[number % job->n_slots];
}

/*
 * Places every window at the front of the ring that is ready.  Under the lock.
 *
 * A window that could not be filled becomes the job's error here, in guest order, so
 * that the error does not depend on which worker was faster.  After a difference it is
 * ignored: the comparison has its answer.
 */
static int place_ready(struct imgc_job *job, struct imgc_error *err)
{
	while (job->placed < job->claimed) {
		struct slot *slot = slot_of(job, job->placed);

		if (slot->state != SLOT_READY)
			break;
		if (slot->status == IMGC_OK) {
			int status = imgc_window_place(job, slot, err);

			if (status)
				return status;
		} else if (slot->start < atomic_load(&job->first_difference)) {
			*err = slot->error;
			return slot->status;
		}
		slot->state = SLOT_PLACED;
		job->placed++;
	}
	return IMGC_OK;
}

static bool work_is_left(const struct imgc_job *job)
{
	return job->cursor < job->batch.guest_end &&
	       job->cursor < atomic_load(&job->first_difference);
}

static bool can_write(const struct imgc_job *job)
{
	return job->written < job->placed && job->n_writing < job->max_writers;
}

static bool next_is_free(const struct imgc_job *job)
{
	return job->slots[job->claimed % job->n_slots].state == SLOT_FREE;
}

static bool can_fill(const struct imgc_job *job)
{
	return work_is_left(job) && !job->ring_was_full && next_is_free(job);
}

/*
 * Unlocks the job for a worker that has found work, and wakes another one if there is
 * more.  That one does the same in turn.  A worker that ends its work looks for more
 * itself, so that nothing else needs to wake anyone before the batch ends.
 */
static void unlock_to_work(struct imgc_job *job)
{
	if (job->n_waiting > 0 && (can_write(job) || can_fill(job)))
		pthread_cond_signal(&job->changed);
	pthread_mutex_unlock(&job->lock);
}

/* Called with the lock held, and returns with it held. */
static void write_next_slot(struct worker *worker)
{
	struct imgc_job *job = worker->job;
	struct slot *slot = slot_of(job, job->written++);

	slot->state = SLOT_WRITING;
	job->n_writing++;
	unlock_to_work(job);
	work_on_writing(worker, slot);
	pthread_mutex_lock(&job->lock);
	job->n_writing--;
	job->n_busy--;
	slot->state = SLOT_FREE;
	if (job->claimed - job->written + job->n_writing <= job->n_slots / 2)
		job->ring_was_full = false;
}

/* Called with the lock held, and returns with it held. */
static void fill_slot(struct worker *worker, struct slot *slot)
{
	struct imgc_job *job = worker->job;
	struct imgc_error err;

	unlock_to_work(job);
	slot->status = imgc_window_process(worker, slot, &slot->error);
	pthread_mutex_lock(&job->lock);
	worker->waiting = slot->status == IMGC_WINDOW_WAITS ? slot : NULL;
	if (worker->waiting)
		return;
	slot->state = SLOT_READY;
	if (slot->status)
		job->cursor = job->batch.guest_end; /* later windows need not be read */
	if (place_ready(job, &err)) {
		pthread_mutex_unlock(&job->lock);
		fail_job(job, &err);
		pthread_mutex_lock(&job->lock);
	}
}

/* Called with the lock held, and returns with it held. */
static void fill_next_slot(struct worker *worker)
{
	struct imgc_job *job = worker->job;
	struct slot *slot = slot_of(job, job->claimed);
	uint64_t start = 0, end = 0;
	enum claim claim = claim_next(job, &start, &end);

	if (claim == CLAIM_NOTHING)
		return; /* another worker has found a difference */
	if (claim == CLAIM_ZERO_SPAN) {
		job->n_busy++;
		unlock_to_work(job);
		work_on_span(worker, start, end);
		pthread_mutex_lock(&job->lock);
		job->n_busy--;
		return;
	}
	slot->state = SLOT_FILLING;
	slot->start = start;
	slot->end = end;
	slot->is_span = claim == CLAIM_UNREAD_SPAN;
	slot->is_admitted = slot->is_read = false;
	job->claimed++;
	job->n_busy++;
	if (!next_is_free(job))
		job->ring_was_full = true;
	fill_slot(worker, slot);
}

static bool must_announce(const struct imgc_job *job)
{
	return work_is_left(job) && !job->announces &&
	       imgc_announcer_is_due(&job->announcer, job->cursor);
}

/* Called with the lock held, and returns with it held. */
static void announce(struct imgc_job *job)
{
	bool is_limited = job->options.rate_limit && !job->options.ignores_rate;
	uint64_t rate = is_limited ? imgc_rate_limit_get(job->options.rate_limit) : 0;

	job->announces = true;
	unlock_to_work(job);
	imgc_announcer_step(&job->announcer, rate);
	pthread_mutex_lock(&job->lock);
	job->announces = false;
}

/* Called with the lock held, and returns with it held. */
static void await_work(struct imgc_job *job)
{
	job->n_waiting++;
	pthread_cond_wait(&job->changed, &job->lock);
	job->n_waiting--;
}

static bool is_past(const struct timespec *until)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec > until->tv_sec ||
	       (now.tv_sec == until->tv_sec && now.tv_nsec >= until->tv_nsec);
}

/*
 * Writing comes first, so that slots become free.  Where the kernel lets one writer in
 * at a time, the other workers fill the ring instead of waiting for it.
 *
 * Only the calling thread, which has no workers beside it, may stop before the batch
 * ends: at the first window after `until`, or to report the end of a stream, with false.
 */
static bool run(struct worker *worker, const struct timespec *until)
{
	struct imgc_job *job = worker->job;
	bool ended = true;

	pthread_mutex_lock(&job->lock);
	while (!imgc_stop_is_set(&job->stop)) {
		if (can_write(job))
			write_next_slot(worker);
		else if (worker->waiting)
			fill_slot(worker, worker->waiting);
		else if (must_announce(job))
			announce(job);
		else if (can_fill(job))
			fill_next_slot(worker);
		else if (!work_is_left(job) && job->n_busy == 0)
			break;
		else
			await_work(job);
		if (until && (job->reports_end || is_past(until))) {
			ended = false;
			break;
		}
	}
	/* Wakes the workers that still wait for work: there is none left. */
	pthread_cond_broadcast(&job->changed);
	pthread_mutex_unlock(&job->lock);
	return ended;
}

void imgc_worker_work(struct worker *worker, const struct timespec *until)
{
	struct imgc_job *job = worker->job;

	if (!run(worker, until))
		return;
	/* Reads of windows that another worker wrote. */
	count(worker, 0, 0);
	pthread_mutex_lock(&job->lock);
	if (--job->n_running == 0)
		pthread_cond_broadcast(&job->ended);
	pthread_mutex_unlock(&job->lock);
}

void *imgc_worker_main(void *argument)
{
	struct worker *worker = argument;
	struct imgc_job *job = worker->job;

	pthread_mutex_lock(&job->lock);
	while (!worker->must_end) {
		if (!worker->is_called) {
			pthread_cond_wait(&job->called, &job->lock);
			continue;
		}
		worker->is_called = false;
		pthread_mutex_unlock(&job->lock);
		imgc_worker_work(worker, NULL);
		pthread_mutex_lock(&job->lock);
	}
	pthread_mutex_unlock(&job->lock);
	return NULL;
}
