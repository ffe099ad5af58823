/*
 * ordered.c - a pipe, a socket or any other descriptor, written from start to end
 *
 * Bytes that nobody writes before later ones are zeros.  A write never waits for a reader:
 * it is IMGC_IO with EAGAIN, and the same write again goes on where it stopped.
 */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "common/checked.h"
#include "common/error.h"
#include "io/fd.h"
#include "io/io.h"

/* Entries of one call: well under IOV_MAX, and small enough for the stack. */
#define ORDERED_MAX_IOV 64

/* Linux moves at most 0x7ffff000 bytes a call; this is a round number below that. */
#define ORDERED_MAX_PIECE ((uint64_t)1 << 30)

/* So many zeros at once, so that a job in a long hole can be cancelled. */
#define ORDERED_MAX_ZEROS ((uint64_t)32 << 20)

#define NOT_REPEATED UINT64_MAX

static const uint8_t zeros[64 * 1024];

struct ordered_file {
	struct imgc_file base;
	int fd;
	bool is_socket;
	uint64_t max_piece; /* the most bytes of one call that cannot wait, or may */
	uint64_t position;  /* bytes so far */
	uint64_t repeated;  /* offset of the call that EAGAIN ended, or NOT_REPEATED */
};

static ssize_t put_some(const struct ordered_file *file, struct iovec *iov, int n)
{
	struct msghdr message = {.msg_iov = iov, .msg_iovlen = (size_t)n};

	if (file->is_socket)
		return sendmsg(file->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
	return writev(file->fd, iov, n);
}

/* Cuts the entries to at most `limit` bytes; returns how many are left. */
static int cut_entries(struct iovec *iov, int n, uint64_t limit)
{
	for (int i = 0; i < n; i++) {
		if (iov[i].iov_len >= limit) {
			iov[i].iov_len = (size_t)limit;
			return i + 1;
		}
		limit -= iov[i].iov_len;
	}
	return n;
}

/* Writes some of the entries, which are not all empty and are changed. */
static int put(struct ordered_file *file, struct iovec *iov, int n, struct imgc_error *err)
{
	n = cut_entries(iov, n, file->max_piece);
	for (;;) {
		ssize_t done = put_some(file, iov, n);

		if (done > 0) {
			file->position += (uint64_t)done;
			return IMGC_OK;
		}
		if (done == 0 || errno != EINTR)
			return imgc_fail_system(err, done == 0 ? EIO : errno, file->position,
						"write");
	}
}

static int put_zeros(struct ordered_file *file, uint64_t end, struct imgc_error *err)
{
	uint64_t stop = file->position + ORDERED_MAX_ZEROS;

	while (file->position < end) {
		struct iovec iov[ORDERED_MAX_IOV];
		uint64_t left = end - file->position;
		int n = 0, status;

		if (file->position >= stop)
			return imgc_fail_system(err, EAGAIN, file->position, "write");
		while (n < ORDERED_MAX_IOV && left > 0) {
			iov[n].iov_base = (void *)(uintptr_t)zeros;
			iov[n].iov_len = (size_t)imgc_min_u64(left, sizeof(zeros));
			left -= iov[n++].iov_len;
		}
		status = put(file, iov, n, err);
		if (status)
			return status;
	}
	return IMGC_OK;
}

/* Writes the entries but for those bytes that are before the position already. */
static int put_entries(struct ordered_file *file, const struct iovec *iov, int n_iov,
		       uint64_t offset, struct imgc_error *err)
{
	int first = 0;

	while (first < n_iov) {
		struct iovec rest[ORDERED_MAX_IOV];
		uint64_t skip = file->position - offset;
		int n = 1;

		if (skip >= iov[first].iov_len) {
			offset += iov[first++].iov_len;
			continue;
		}
		rest[0].iov_base = (char *)iov[first].iov_base + skip;
		rest[0].iov_len = iov[first].iov_len - (size_t)skip;
		for (int i = first + 1; i < n_iov && n < ORDERED_MAX_IOV; i++)
			rest[n++] = iov[i];
		int status = put(file, rest, n, err);

		if (status)
			return status;
	}
	return IMGC_OK;
}

/* Whether a call may write at `offset`: in order, or again after EAGAIN. */
static bool is_in_order(struct ordered_file *file, uint64_t offset)
{
	bool again = offset == file->repeated;

	file->repeated = NOT_REPEATED;
	return offset >= file->position || again;
}

static int ended(struct ordered_file *file, uint64_t offset, int status,
		 const struct imgc_error *err)
{
	if (status == IMGC_IO && err->os_errno == EAGAIN)
		file->repeated = offset;
	return status;
}

static int ordered_write(struct imgc_file *base, const struct iovec *iov, int n_iov,
			 uint64_t offset, struct imgc_error *err)
{
	struct ordered_file *file = (struct ordered_file *)base;
	struct imgc_error unused;
	uint64_t end = offset;

	err = err ? err : &unused;
	for (int i = 0; i < n_iov; i++) {
		if (!imgc_add_checked(end, iov[i].iov_len, &end))
			end = UINT64_MAX;
	}
	if (end > INT64_MAX || !is_in_order(file, offset))
		return imgc_fail_at(err, IMGC_OUT_OF_RANGE, offset, "write");
	int status = put_zeros(file, offset, err);

	if (status == IMGC_OK)
		status = put_entries(file, iov, n_iov, offset, err);
	return ended(file, offset, status, err);
}

static int ordered_zero(struct imgc_file *base, uint64_t offset, uint64_t length,
			struct imgc_error *err)
{
	struct ordered_file *file = (struct ordered_file *)base;
	struct imgc_error unused;

	err = err ? err : &unused;
	if (!imgc_range_inside(offset, length, INT64_MAX) || !is_in_order(file, offset))
		return imgc_fail_at(err, IMGC_OUT_OF_RANGE, offset, "zero");
	return ended(file, offset, put_zeros(file, offset + length, err), err);
}

static int ordered_move(struct imgc_file *base, uint64_t offset, struct imgc_file *source,
			uint64_t source_offset, uint64_t length, struct imgc_error *err)
{
	struct ordered_file *file = (struct ordered_file *)base;

	if (!imgc_range_inside(offset, length, INT64_MAX) || !is_in_order(file, offset))
		return imgc_fail_at(err, IMGC_OUT_OF_RANGE, offset, "write");
	int status = put_zeros(file, offset, err);

	while (status == IMGC_OK && file->position < offset + length) {
		uint64_t done = file->position - offset;
		ssize_t n =
			source->ops->splice(source, source_offset + done, file->fd, length - done);

		if (n > 0) {
			file->position += (uint64_t)n;
		} else if (n < 0 && errno == EAGAIN) {
			status = imgc_fail_system(err, EAGAIN, file->position, "write");
		} else if (n == 0 || errno != EINTR) {
			file->repeated = offset;
			return imgc_fail_call(err, IMGC_UNSUPPORTED, "splice");
		}
	}
	return ended(file, offset, status, err);
}

static void ordered_await(struct imgc_file *base, int timeout_ms)
{
	const struct ordered_file *file = (const struct ordered_file *)base;
	struct pollfd wanted = {.fd = file->fd, .events = POLLOUT};

	/* Whatever it says, the next write says more. */
	(void)poll(&wanted, 1, timeout_ms);
}

static int ordered_read(struct imgc_file *base, struct imgc_io_context *ctx,
			const struct imgc_io_request *requests, size_t n, struct imgc_error *err)
{
	(void)base;
	(void)ctx;
	(void)requests;
	(void)n;
	return imgc_fail_call(err, IMGC_UNSUPPORTED, "read");
}

static int ordered_sync(struct imgc_file *base, struct imgc_error *err)
{
	(void)base;
	(void)err;
	return IMGC_OK;
}

static int ordered_next_data(struct imgc_file *base, uint64_t offset, uint64_t *start,
			     uint64_t *end, struct imgc_error *err)
{
	(void)base;
	(void)offset;
	(void)start;
	(void)end;
	return imgc_fail_call(err, IMGC_UNSUPPORTED, "next_data");
}

static void ordered_close(struct imgc_file *base)
{
	free(base);
}

static const struct imgc_file_ops ordered_file_ops = {
	.read = ordered_read,
	.write = ordered_write,
	.zero = ordered_zero,
	.sync = ordered_sync,
	.next_data = ordered_next_data,
	.await_room = ordered_await,
	.move = ordered_move,
	.close = ordered_close,
};

int imgc_file_open_ordered(int fd, struct imgc_file **out, struct imgc_error *err)
{
	struct stat st;
	int flags = fcntl(fd, F_GETFL);

	if (flags < 0 || fstat(fd, &st))
		return imgc_fail_system(err, errno, 0, "open");
	struct ordered_file *file = calloc(1, sizeof(*file));

	if (!file)
		return imgc_fail_call(err, IMGC_NO_MEMORY, "open");
	bool is_pipe = S_ISFIFO(st.st_mode);

	file->base.ops = &ordered_file_ops;
	file->base.writes_are_serial = true;
	file->base.takes_pages = is_pipe;
	file->fd = fd;
	file->is_socket = S_ISSOCK(st.st_mode);
	/* A pipe that poll() calls writable takes so many bytes without waiting. */
	file->max_piece = is_pipe && !(flags & O_NONBLOCK) ? PIPE_BUF : ORDERED_MAX_PIECE;
	file->repeated = NOT_REPEATED;
	*out = &file->base;
	return IMGC_OK;
}
