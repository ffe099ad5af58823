#include "io/uring.h"

#ifndef IMGC_HAVE_URING

bool imgc_uring_runnable(void)
{
	return false;
}

#else

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <liburing.h>
#include <stdlib.h>

#include "common/checked.h"
#include "common/error.h"
#include "io/fd.h"

#define RING_DEPTH 64

/* An entry's length is 32 bits wide; longer reads continue like short ones. */
#define RING_MAX_PIECE ((uint64_t)1 << 30)

struct ring_slot {
	const struct imgc_io_request *request;
	uint64_t done;
};

struct imgc_io_context {
	struct io_uring ring;
	bool broken; /* the ring failed and is gone: plain reads from now on */
	unsigned n_free;
	uint8_t free_slots[RING_DEPTH];
	struct ring_slot slots[RING_DEPTH];
};

bool imgc_uring_runnable(void)
{
	struct io_uring ring;

	if (io_uring_queue_init(2, &ring, 0))
		return false;
	io_uring_queue_exit(&ring);
	return true;
}

static void reset_slots(struct imgc_io_context *ctx)
{
	unsigned i;

	ctx->n_free = RING_DEPTH;
	for (i = 0; i < RING_DEPTH; i++)
		ctx->free_slots[i] = (uint8_t)i;
}

int imgc_uring_context_create(struct imgc_io_context **out)
{
	struct imgc_io_context *ctx = calloc(1, sizeof(*ctx));
	int rc;

	if (!ctx)
		return IMGC_NO_MEMORY;
	rc = io_uring_queue_init(RING_DEPTH, &ctx->ring, 0);
	if (rc) {
		free(ctx);
		return rc == -ENOMEM ? IMGC_NO_MEMORY : IMGC_UNSUPPORTED;
	}
	reset_slots(ctx);
	*out = ctx;
	return IMGC_OK;
}

void imgc_uring_context_destroy(struct imgc_io_context *ctx)
{
	if (!ctx)
		return;
	if (!ctx->broken)
		io_uring_queue_exit(&ctx->ring);
	free(ctx);
}

/* Puts what is left of the slot's request into the ring. */
static bool queue_slot(struct imgc_io_context *ctx, int fd, unsigned index)
{
	struct ring_slot *slot = &ctx->slots[index];
	struct io_uring_sqe *sqe = io_uring_get_sqe(&ctx->ring);
	uint64_t piece = imgc_min_u64(slot->request->length - slot->done, RING_MAX_PIECE);

	if (!sqe)
		return false;
	io_uring_prep_read(sqe, fd, (char *)slot->request->buffer + slot->done, (unsigned)piece,
			   slot->request->offset + slot->done);
	io_uring_sqe_set_data64(sqe, index);
	return true;
}

/* *again tells whether the slot has to go round once more. */
static int complete_slot(struct ring_slot *slot, int result, bool *again, struct imgc_error *err)
{
	uint64_t offset = slot->request->offset + slot->done;

	*again = false;
	if (result == 0)
		return imgc_fail_at(err, IMGC_PAST_END, offset, "pread");
	/* EAGAIN is repeated with patience and an end, by the caller. */
	if (result < 0 && result != -EINTR)
		return imgc_fail_system(err, -result, offset, "pread");
	if (result > 0)
		slot->done += (uint64_t)result;
	*again = slot->done < slot->request->length;
	return IMGC_OK;
}

/*
 * The ring refused to go on: waits until the kernel has let go of the caller's
 * buffers (the end of a ring cancels or finishes what it holds).
 */
static void break_ring(struct imgc_io_context *ctx, unsigned n_under_way)
{
	struct io_uring_cqe *cqe;

	while (n_under_way != 0) {
		int rc = io_uring_wait_cqe(&ctx->ring, &cqe);

		if (rc == -EINTR)
			continue;
		if (rc)
			break;
		io_uring_cqe_seen(&ctx->ring, cqe);
		n_under_way--;
	}
	io_uring_queue_exit(&ctx->ring);
	ctx->broken = true;
}

/* Takes every finished read off the ring; the first failure stays in *status. */
static void reap(struct imgc_io_context *ctx, int fd, unsigned *n_under_way, int *status,
		 struct imgc_error *err)
{
	struct io_uring_cqe *cqe;

	while (io_uring_peek_cqe(&ctx->ring, &cqe) == 0) {
		unsigned index = (unsigned)io_uring_cqe_get_data64(cqe);
		bool again;
		int rc = complete_slot(&ctx->slots[index], cqe->res, &again, *status ? NULL : err);

		io_uring_cqe_seen(&ctx->ring, cqe);
		if (rc && !*status)
			*status = rc;
		if (again && !*status) {
			if (queue_slot(ctx, fd, index))
				continue;
			*status = imgc_fail_system(err, EBUSY, ctx->slots[index].request->offset,
						   "pread");
		}
		ctx->free_slots[ctx->n_free++] = (uint8_t)index;
		(*n_under_way)--;
	}
}

static int read_by_pread(int fd, const struct imgc_io_request *requests, size_t n,
			 struct imgc_error *err)
{
	size_t i;

	for (i = 0; i < n; i++) {
		int status = imgc_fd_read(fd, &requests[i], err);

		if (status)
			return status;
	}
	return IMGC_OK;
}

int imgc_uring_read(struct imgc_io_context *ctx, int fd, const struct imgc_io_request *requests,
		    size_t n, struct imgc_error *err)
{
	unsigned n_under_way = 0; /* slots in use */
	size_t next = 0;
	int status = IMGC_OK;

	if (ctx->broken)
		return read_by_pread(fd, requests, n, err);
	while (n_under_way != 0 || (next < n && !status)) {
		int rc;

		while (next < n && !status && ctx->n_free != 0) {
			const struct imgc_io_request *r = &requests[next++];
			unsigned index;

			if (r->length == 0)
				continue;
			if (!imgc_range_inside(r->offset, r->length, INT64_MAX)) {
				status = imgc_fail_at(err, IMGC_PAST_END, r->offset, "pread");
				break;
			}
			index = ctx->free_slots[--ctx->n_free];
			ctx->slots[index] = (struct ring_slot){.request = r, .done = 0};
			if (!queue_slot(ctx, fd, index)) {
				ctx->free_slots[ctx->n_free++] = (uint8_t)index;
				next--;
				break;
			}
			n_under_way++;
		}
		if (n_under_way == 0)
			continue;
		rc = io_uring_submit_and_wait(&ctx->ring, 1);
		if (rc < 0 && rc != -EINTR) {
			unsigned n_queued = io_uring_sq_ready(&ctx->ring);
			unsigned n_taken = n_under_way > n_queued ? n_under_way - n_queued : 0;

			/* A busy ring has room again when something of what it has taken ends. */
			if ((rc != -EAGAIN && rc != -EBUSY) || n_taken == 0) {
				break_ring(ctx, n_taken);
				return read_by_pread(fd, requests, n, err);
			}
		}
		reap(ctx, fd, &n_under_way, &status, err);
	}
	return status;
}

#endif /* IMGC_HAVE_URING */
