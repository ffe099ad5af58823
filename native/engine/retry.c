/*
 * retry.c - reads and writes that are repeated where that can help
 *
 * Reads: the kernel has retried already, but a path or a server may come back.  A read
 * is therefore repeated a few times, with growing pauses.  A stream has each byte once:
 * a read of one is repeated only while it waits.
 *
 * Writes: repeated only after EAGAIN, by which the kernel says that it has written
 * nothing.  After any other failure the state of the range is unknown.  Where a reader
 * takes the bytes, a write waits for it as long as the job is not cancelled.
 *
 * A failed sync is never repeated: the kernel may have dropped the data.
 */
#include "engine/retry.h"

#include <errno.h>
#include <time.h>

/* 0.85 s in all, so that a cancelled job still ends soon. */
static const long pauses_ms[] = {10, 40, 160, 640};

#define READER_POLL_MS 20 /* so that a cancelled job ends soon */

#define N_PAUSES (sizeof(pauses_ms) / sizeof(pauses_ms[0]))

static void pause_before(unsigned attempt)
{
	long ms = pauses_ms[attempt];
	struct timespec left = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000};

	while (nanosleep(&left, &left) && errno == EINTR)
		;
}

static bool read_may_succeed_later(int os_errno)
{
	return os_errno == EIO || os_errno == EAGAIN || os_errno == ETIMEDOUT;
}

int imgc_read_retrying(struct imgc_file *file, struct imgc_io_context *io,
		       const struct imgc_io_request *requests, size_t n, const struct stop *stop,
		       struct imgc_error *err)
{
	for (unsigned attempt = 0;; attempt += !file->reads_wait) {
		int status = imgc_file_read(file, io, requests, n, err);

		if (status != IMGC_IO)
			return status;
		if (file->reads_wait) {
			if (err->os_errno != EAGAIN)
				return status;
		} else if (attempt == N_PAUSES || !read_may_succeed_later(err->os_errno)) {
			return status;
		} else {
			pause_before(attempt);
		}
		status = imgc_check_stopped(stop, err);
		if (status)
			return status;
	}
}

int imgc_write_retrying(struct imgc_file *file, const struct iovec *iov, int n_iov, uint64_t offset,
			const struct stop *stop, struct imgc_error *err)
{
	for (unsigned attempt = 0;;) {
		int status = imgc_file_write(file, iov, n_iov, offset, err);

		if (status != IMGC_IO || err->os_errno != EAGAIN)
			return status;
		if (imgc_file_has_reader(file))
			imgc_file_await_room(file, READER_POLL_MS);
		else if (attempt == N_PAUSES)
			return status;
		else
			pause_before(attempt++);
		status = imgc_check_stopped(stop, err);
		if (status)
			return status;
	}
}

int imgc_move_retrying(struct imgc_file *file, uint64_t offset, struct imgc_file *source,
		       uint64_t source_offset, uint64_t length, const struct stop *stop,
		       struct imgc_error *err)
{
	for (;;) {
		int status = imgc_file_move(file, offset, source, source_offset, length, err);

		if (status != IMGC_IO || err->os_errno != EAGAIN)
			return status;
		imgc_file_await_room(file, READER_POLL_MS);
		status = imgc_check_stopped(stop, err);
		if (status)
			return status;
	}
}
