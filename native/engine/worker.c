/* Which window is next, and who does what with it. */
#include "engine/engine.h"

#include "common/checked.h"
#include "common/error.h"

enum claim { CLAIM_NOTHING, CLAIM_WINDOW, CLAIM_ZERO_SPAN };

/* Guest offset up to which the rows hold no data from the cursor on; the cursor itself if they do.
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
 * Takes the next piece of the batch: a window, or a longer span that holds no data on
 * either side and so needs no reading.  Windows start at multiples of their size, so that
 * they do not depend on what came before.
 */
static enum claim claim_next(struct imgc_job *job, uint64_t *start, uint64_t *end)
{
	uint64_t cursor = job->cursor, batch_end = job->batch.guest_end;
	uint64_t limit = atomic_load(&job->first_difference);

	if (cursor >= batch_end || cursor >= limit)
		return CLAIM_NOTHING;
	uint64_t window_end = imgc_min_u64((cursor | (job->window_nbytes - 1)) + 1, batch_end);

	*start = cursor;
	if (job->geometry.zero_policy != IMGC_ZERO_STORE) {
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

static bool work_on_span(struct worker *worker, uint64_t start, uint64_t end)
{
	struct imgc_error err;

	if (imgc_span_write_zeros(worker, start, end, &err)) {
		imgc_job_fail(worker->job, &err);
		return false;
	}
	count(worker, end - start, 0);
	return true;
}

static bool work_on_writing(struct worker *worker, struct slot *slot)
{
	struct imgc_error err;

	if (imgc_window_write(worker, slot, &err)) {
		imgc_job_fail(worker->job, &err);
		return false;
	}
	count(worker, slot->end - slot->start, slot->data_nbytes);
	return true;
}

/* ------------------------------------------------- windows in whatever order */

static void run_unordered(struct worker *worker)
{
	struct imgc_job *job = worker->job;
	struct slot *slot = worker->own_slot;
	struct imgc_error err;

	while (!imgc_job_is_stopped(job)) {
		uint64_t start, end;

		pthread_mutex_lock(&job->lock);
		enum claim claim = claim_next(job, &start, &end);
		pthread_mutex_unlock(&job->lock);
		if (claim == CLAIM_NOTHING)
			return;
		if (claim == CLAIM_ZERO_SPAN) {
			work_on_span(worker, start, end);
			continue;
		}
		slot->start = start;
		slot->end = end;
		if (imgc_window_process(worker, slot, &err))
			imgc_job_fail(job, &err);
		else
			work_on_writing(worker, slot);
	}
}

/* ----------------------------------------------- windows placed in guest order */

static struct slot *slot_of(struct imgc_job *job, uint64_t number)
{
	return &job->slots[number % job->n_slots];
}

/* Places every window at the front of the ring that is ready.  Under the lock. */
static int place_ready(struct imgc_job *job, struct imgc_error *err)
{
	while (job->placed < job->claimed) {
		struct slot *slot = slot_of(job, job->placed);

		if (slot->state != SLOT_READY)
			break;
		int status = imgc_window_place(job, slot, err);
		if (status)
			return status;
		slot->state = SLOT_PLACED;
		job->placed++;
	}
	return IMGC_OK;
}

static struct slot *find_placed(struct imgc_job *job)
{
	for (size_t i = 0; i < job->n_slots; i++)
		if (job->slots[i].state == SLOT_PLACED)
			return &job->slots[i];
	return NULL;
}

/* Called and returns with the lock held. */
static void write_slot(struct worker *worker, struct slot *slot)
{
	struct imgc_job *job = worker->job;

	slot->state = SLOT_WRITING;
	pthread_mutex_unlock(&job->lock);
	work_on_writing(worker, slot);
	pthread_mutex_lock(&job->lock);
	slot->state = SLOT_FREE;
	job->n_busy--;
	pthread_cond_broadcast(&job->changed);
}

/* Called and returns with the lock held. */
static void fill_next_slot(struct worker *worker, struct slot *slot)
{
	struct imgc_job *job = worker->job;
	struct imgc_error err;
	uint64_t start, end;
	enum claim claim = claim_next(job, &start, &end);

	if (claim == CLAIM_ZERO_SPAN) {
		pthread_mutex_unlock(&job->lock);
		work_on_span(worker, start, end);
		pthread_mutex_lock(&job->lock);
		return;
	}
	slot->state = SLOT_FILLING;
	slot->start = start;
	slot->end = end;
	job->claimed++;
	job->n_busy++;
	pthread_mutex_unlock(&job->lock);
	int status = imgc_window_process(worker, slot, &err);
	pthread_mutex_lock(&job->lock);
	slot->state = SLOT_READY;
	if (status == IMGC_OK)
		status = place_ready(job, &err);
	if (status) {
		pthread_mutex_unlock(&job->lock);
		imgc_job_fail(job, &err);
		pthread_mutex_lock(&job->lock);
	}
	pthread_cond_broadcast(&job->changed);
}

static void run_ordered(struct worker *worker)
{
	struct imgc_job *job = worker->job;

	pthread_mutex_lock(&job->lock);
	while (!imgc_job_is_stopped(job)) {
		struct slot *slot = find_placed(job);

		if (slot) {
			write_slot(worker, slot);
			continue;
		}
		bool more = job->cursor < job->batch.guest_end;

		slot = slot_of(job, job->claimed);
		if (more && slot->state == SLOT_FREE)
			fill_next_slot(worker, slot);
		else if (!more && job->n_busy == 0)
			break;
		else
			pthread_cond_wait(&job->changed, &job->lock);
	}
	pthread_mutex_unlock(&job->lock);
}

void *imgc_worker_main(void *argument)
{
	struct worker *worker = argument;
	struct imgc_job *job = worker->job;

	if (job->ordered)
		run_ordered(worker);
	else
		run_unordered(worker);
	pthread_mutex_lock(&job->lock);
	if (--job->n_running == 0)
		pthread_cond_broadcast(&job->ended);
	pthread_mutex_unlock(&job->lock);
	return NULL;
}
