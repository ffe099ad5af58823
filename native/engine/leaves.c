/*
 * leaves.c - the checksums of a window's blocks
 *
 * Windows start at multiples of a checksum's block, so that no block is in two of them.
 */
#include "engine/engine.h"

#include <string.h>

#include "common/checked.h"
#include "common/error.h"

#define BLOCK_NBYTES IMGC_CHECKSUM_BLOCK_NBYTES

static uint8_t *leaf_at(const struct imgc_job *job, uint64_t guest_offset)
{
	return job->batch.leaves +
	       (guest_offset - job->batch.guest_start) / BLOCK_NBYTES * IMGC_CHECKSUM_NBYTES;
}

/* Whether [start, end) of the window is zeros. */
static bool reads_as_zeros(const struct imgc_job *job, const struct view *view, uint64_t start,
			   uint64_t end)
{
	if (!imgc_view_has_data(view, start, end))
		return true;
	imgc_view_materialise(view, start, end);
	return imgc_is_zero(job->options.zero_variant, view->data + start, end - start);
}

static int make_leaf(struct worker *worker, struct slot *slot, uint64_t start, uint64_t end)
{
	const struct imgc_job *job = worker->job;
	uint8_t *leaf = leaf_at(job, slot->start + start);
	bool is_zero = reads_as_zeros(job, &slot->view, start, end);

	if (is_zero)
		imgc_view_drop(&slot->view, start, end);
	else if (job->options.kind == IMGC_JOB_DIGEST)
		slot->data_nbytes += end - start;
	if (is_zero && end - start == BLOCK_NBYTES) {
		memcpy(leaf, job->zero_leaf, sizeof(job->zero_leaf));
		return IMGC_OK;
	}
	if (is_zero)
		return imgc_digest_of_zeros(worker->digest, end - start, leaf);
	return imgc_digest_of(worker->digest, slot->view.data + start, end - start, leaf);
}

int imgc_leaves_make(struct worker *worker, struct slot *slot, struct imgc_error *err)
{
	uint64_t nbytes = slot->end - slot->start;
	int status = IMGC_OK;

	if (!worker->digest)
		return IMGC_OK;
	for (uint64_t at = 0; at < nbytes && status == IMGC_OK; at += BLOCK_NBYTES)
		status = make_leaf(worker, slot, at, imgc_min_u64(at + BLOCK_NBYTES, nbytes));
	return status ? imgc_fail_call(err, status, "checksum") : IMGC_OK;
}

int imgc_leaves_make_zeros(struct worker *worker, uint64_t start, uint64_t end,
			   struct imgc_error *err)
{
	const struct imgc_job *job = worker->job;
	uint64_t rest = (end - start) % BLOCK_NBYTES;
	int status = IMGC_OK;

	if (!worker->digest)
		return IMGC_OK;
	imgc_leaves_fill(leaf_at(job, start), (size_t)((end - start) / BLOCK_NBYTES),
			 job->zero_leaf);
	if (rest > 0)
		status = imgc_digest_of_zeros(worker->digest, rest, leaf_at(job, end - rest));
	return status ? imgc_fail_call(err, status, "checksum") : IMGC_OK;
}
