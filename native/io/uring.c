/*
 * uring.c - scattered reads through io_uring
 */
#include "io/uring.h"

#ifndef IMGC_HAVE_URING

bool imgc_uring_runnable(void)
{
	return false;
}

#else

#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <stdlib.h>
#include <unistd.h>

#include "common/checked.h"
#include "common/error.h"
#include "io/fd.h"

#define RING_DEPTH 64

/* An entry's length has 32 bits.  Longer reads are continued, like short counts. */
#define RING_MAX_PIECE ((uint64_t)1 << 30)

struct ring_slot {
	const struct imgc_io_request *request;
	uint64_t done;
};

struct imgc_io_context {
	struct io_uring ring;
	bool broken; /* the ring failed and was closed: plain reads from now on */
	unsigned n_free;
	uint8_t free_slots[RING_DEPTH];
	struct ring_slot slots[RING_DEPTH];
};

/* Starts a ring whose number is above those of stdin, stdout and stderr, which others may
 * replace at any time.  Returns 0 or a negative errno. */
static int start_ring(unsigned depth, struct io_uring *ring)
{
	int rc = io_uring_queue_init(depth, ring, 0);

	if (rc || ring->ring_fd > STDERR_FILENO)
		return rc;
	int fd = fcntl(ring->ring_fd, F_DUPFD_CLOEXEC, STDERR_FILENO + 1);

	if (fd < 0) {
		rc = -errno;
		io_uring_queue_exit(ring);
		return rc;
	}
	close(ring->ring_fd);
	ring->ring_fd = ring->enter_ring_fd = fd;
	return 0;
}

bool imgc_uring_runnable(void)
{
	struct io_uring ring;

	if (start_ring(2, &ring))
		return false;
	io_uring_queue_exit(&ring);
	return true;
}

static void reset_slots(struct imgc_io_context *ctx)
{
	ctx->n_free = RING_DEPTH;
	for (unsigned i = 0; i < RING_DEPTH; i++)
		ctx->free_slots[i] = (uint8_t)i;
}

int imgc_uring_context_create(struct imgc_io_context **out)
{
	struct imgc_io_context *ctx = calloc(1, sizeof(*ctx));

	if (!ctx)
		return IMGC_NO_MEMORY;
	int rc = start_ring(RING_DEPTH, &ctx->ring);

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

/* Puts the rest of the slot's request into the ring; false if the ring is full. */
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

/* *again: the request is not complete yet, and goes into the ring again. */
static int complete_slot(struct ring_slot *slot, int fd, int result, bool *again,
			 struct imgc_error *err)
{
	uint64_t offset = slot->request->offset + slot->done;

	*again = false;
	if (result == 0)
		return imgc_fail_at(err, IMGC_PAST_END, offset, "pread");
	if (result == -EAGAIN) {
		/* A file that is open with O_NONBLOCK, and the data is not in memory. */
		struct imgc_io_request rest = {
			.buffer = (char *)slot->request->buffer + slot->done,
			.length = slot->request->length - slot->done,
			.offset = offset,
		};
		return imgc_fd_read(fd, &rest, 1, err);
	}
	if (result < 0 && result != -EINTR)
		return imgc_fail_system(err, -result, offset, "pread");
	if (result > 0)
		slot->done += (uint64_t)result;
	*again = slot->done < slot->request->length;
	return IMGC_OK;
}

/*
 * The ring has failed: waits until the kernel no longer uses the caller's buffers.
 * Closing a ring cancels or completes the reads that it still holds.
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
		int rc = complete_slot(&ctx->slots[index], fd, cqe->res, &again,
				       *status ? NULL : err);

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

/* Puts requests into the ring while it has room; *next is the first that is left. */
static int queue_requests(struct imgc_io_context *ctx, int fd,
			  const struct imgc_io_request *requests, size_t n, size_t *next,
			  unsigned *n_under_way, struct imgc_error *err)
{
	while (*next < n && ctx->n_free != 0) {
		const struct imgc_io_request *r = &requests[*next];

		if (r->length == 0) {
			++*next;
			continue;
		}
		if (!imgc_range_inside(r->offset, r->length, INT64_MAX))
			return imgc_fail_at(err, IMGC_PAST_END, r->offset, "pread");
		unsigned index = ctx->free_slots[ctx->n_free - 1];

		ctx->slots[index] = (struct ring_slot){.request = r, .done = 0};
		if (!queue_slot(ctx, fd, index))
			break;
		ctx->n_free--;
		++*next;
		++*n_under_way;
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
		return imgc_fd_read(fd, requests, n, err);
	while (n_under_way != 0 || (next < n && !status)) {
		if (!status)
			status = queue_requests(ctx, fd, requests, n, &next, &n_under_way, err);
		if (n_under_way == 0)
			continue;
		int rc = io_uring_submit_and_wait(&ctx->ring, 1);

		if (rc < 0 && rc != -EINTR) {
			unsigned n_queued = io_uring_sq_ready(&ctx->ring);
			unsigned n_taken = n_under_way > n_queued ? n_under_way - n_queued : 0;

			/* A busy ring has room again when one of its reads ends. */
			if ((rc != -EAGAIN && rc != -EBUSY) || n_taken == 0) {
				break_ring(ctx, n_taken);
				return imgc_fd_read(fd, requests, n, err);
			}
		}
		reap(ctx, fd, &n_under_way, &status, err);
	}
	return status;
}

#endif /* IMGC_HAVE_URING */
