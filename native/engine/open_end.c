/*
 * open_end.c - the end of a disk whose size is not known before
 *
 * A window in which a stream has ended waits, and so do those behind it, until the caller
 * has told how large the disk is.  It then ends there, as if that had been known: windows
 * are placed in guest order, so that none behind the end has a place yet.
 */
#include "engine/engine.h"

#include "common/checked.h"
#include "common/error.h"

/* Under the lock.  The calling thread must tell the size itself. */
static int await_size(struct imgc_job *job, struct imgc_error *err)
{
	while (!job->end_is_told) {
		int status = imgc_check_stopped(&job->stop, err);

		if (status)
			return status;
		if (job->in_caller)
			return IMGC_WINDOW_WAITS;
		pthread_cond_wait(&job->told, &job->lock);
	}
	return IMGC_OK;
}

int imgc_window_meet_end(struct imgc_job *job, struct slot *slot, struct imgc_error *err)
{
	uint64_t found;

	if (!imgc_file_stream_end(job->open_end, &found) || slot->end <= found)
		return IMGC_OK;
	pthread_mutex_lock(&job->lock);
	if (!job->has_found_end) {
		job->has_found_end = job->reports_end = true;
		job->found_end = found;
		pthread_cond_broadcast(&job->ended);
	}
	int status = await_size(job, err);

	if (status == IMGC_OK && slot->end > job->geometry.guest_nbytes)
		slot->end = imgc_max_u64(slot->start, job->geometry.guest_nbytes);
	pthread_mutex_unlock(&job->lock);
	return status;
}

void imgc_open_end_stop(struct imgc_job *job)
{
	pthread_cond_broadcast(&job->told);
}

/* A block that was begun before has no more bytes than any other that the disk ends in. */
static void shrink_open_block(struct imgc_job *job)
{
	struct placer *placer = &job->placer;
	uint64_t block_nbytes = job->geometry.block_nbytes;
	uint64_t start = placer->open_block * block_nbytes;
	uint64_t length = job->geometry.guest_nbytes - start;

	if (!placer->block_is_open || start >= job->geometry.guest_nbytes ||
	    length >= block_nbytes || start < job->batch.guest_start)
		return;
	imgc_placer_shrink(placer, block_nbytes, length);
	job->batch.placements[(start - job->batch.guest_start) / block_nbytes].length =
		(uint32_t)length;
}

int imgc_job_found_end(struct imgc_job *job, uint64_t *disk_end)
{
	pthread_mutex_lock(&job->lock);
	bool found = job->has_found_end;

	if (found)
		*disk_end = job->found_end;
	pthread_mutex_unlock(&job->lock);
	return found;
}

static bool may_have_size(const struct imgc_job *job, uint64_t guest_nbytes)
{
	if (job->options.kind != IMGC_JOB_CONVERT || guest_nbytes > job->geometry.guest_nbytes)
		return false;
	if (!job->in_batch)
		return guest_nbytes >= job->batch.guest_end;
	return job->has_found_end && !job->end_is_told && guest_nbytes >= job->found_end;
}

int imgc_job_set_guest_nbytes(struct imgc_job *job, uint64_t guest_nbytes)
{
	pthread_mutex_lock(&job->lock);
	bool accepted = may_have_size(job, guest_nbytes);

	if (accepted) {
		job->geometry.guest_nbytes = guest_nbytes;
		job->end_is_told = true;
		if (job->in_batch) {
			job->batch.guest_end = imgc_min_u64(job->batch.guest_end, guest_nbytes);
			shrink_open_block(job);
		}
		pthread_cond_broadcast(&job->told);
		pthread_cond_broadcast(&job->changed);
	}
	pthread_mutex_unlock(&job->lock);
	return accepted ? IMGC_OK : IMGC_INVALID_ARGUMENT;
}
