/*
 * What is done about reads and writes that fail.
 *
 * Reads: the kernel has retried already, but a path or a server may come back, so a read is
 * repeated a few times with growing pauses.  Writes: repeated only where the kernel says that
 * nothing has been tried (EAGAIN); after any other failure the state of the range is unknown.
 * A failed sync is never repeated: the kernel may have dropped the data.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "engine/engine.h"

#include <errno.h>
#include <time.h>

/* 0.85 s in all: cancelling stays prompt. */
static const long pauses_ms[] = {10, 40, 160, 640};

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

int imgc_reader_read(struct reader *reader, uint32_t file, const struct imgc_io_request *requests,
		     size_t n, struct imgc_error *err)
{
	int status = imgc_file_read(reader->files[file].file, reader->io, requests, n, err);

	if (status)
		err->source = file;
	return status;
}

int imgc_read_patiently(struct reader *reader, uint32_t file,
			const struct imgc_io_request *requests, size_t n, struct imgc_error *err)
{
	for (unsigned attempt = 0;; attempt++) {
		int status = imgc_reader_read(reader, file, requests, n, err);

		if (status != IMGC_IO || attempt == N_PAUSES ||
		    !read_may_succeed_later(err->os_errno))
			return status;
		pause_before(attempt);
		status = imgc_job_go_on(reader->job, err);
		if (status)
			return status;
	}
}

int imgc_write_patiently(const struct imgc_job *job, const struct iovec *iov, int n_iov,
			 uint64_t offset, struct imgc_error *err)
{
	for (unsigned attempt = 0;; attempt++) {
		int status = imgc_file_write(job->options.target, iov, n_iov, offset, err);

		if (status)
			err->source = IMGC_TARGET;
		if (status != IMGC_IO || attempt == N_PAUSES || err->os_errno != EAGAIN)
			return status;
		pause_before(attempt);
		status = imgc_job_go_on(job, err);
		if (status)
			return status;
	}
}
