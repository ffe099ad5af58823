#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <unistd.h>

#include "common/checked.h"
#include "common/error.h"
#include "io/fd.h"

/* Entries of one pwritev() call; well under IOV_MAX, and small enough for the stack. */
#define FD_MAX_IOV 128

/* Linux moves at most 0x7ffff000 bytes a call; a round number below that. */
#define FD_MAX_PIECE ((uint64_t)1 << 30)

int imgc_fd_read(int fd, const struct imgc_io_request *request, struct imgc_error *err)
{
	uint64_t done = 0;

	if (request->length == 0)
		return IMGC_OK;
	if (!imgc_range_inside(request->offset, request->length, INT64_MAX))
		return imgc_fail_at(err, IMGC_PAST_END, request->offset, "pread");
	while (done < request->length) {
		uint64_t offset = request->offset + done;
		size_t piece = (size_t)imgc_min_u64(request->length - done, FD_MAX_PIECE);
		ssize_t got = pread(fd, (char *)request->buffer + done, piece, (off_t)offset);

		if (got > 0)
			done += (uint64_t)got;
		else if (got == 0)
			return imgc_fail_at(err, IMGC_PAST_END, offset, "pread");
		else if (errno != EINTR)
			return imgc_fail_system(err, errno, offset, "pread");
	}
	return IMGC_OK;
}

/* Writes the `n` entries, changing them on the way. */
static int write_entries(int fd, struct iovec *entries, int n, uint64_t *offset,
			 struct imgc_error *err)
{
	int first = 0;

	for (;;) {
		ssize_t put;

		while (first < n && entries[first].iov_len == 0)
			first++;
		if (first == n)
			return IMGC_OK;
		put = pwritev(fd, entries + first, n - first, (off_t)*offset);
		if (put < 0 && errno == EINTR)
			continue;
		if (put <= 0)
			return imgc_fail_system(err, put < 0 ? errno : EIO, *offset, "pwritev");
		*offset += (uint64_t)put;
		while (put > 0) {
			size_t step = entries[first].iov_len;

			if (step > (size_t)put)
				step = (size_t)put;
			entries[first].iov_base = (char *)entries[first].iov_base + step;
			entries[first].iov_len -= step;
			put -= (ssize_t)step;
			if (entries[first].iov_len == 0)
				first++;
		}
	}
}

int imgc_fd_write(int fd, const struct iovec *iov, int n_iov, uint64_t offset,
		  struct imgc_error *err)
{
	uint64_t length = 0;
	int i;

	for (i = 0; i < n_iov; i++) {
		if (!imgc_add_checked(length, iov[i].iov_len, &length))
			length = UINT64_MAX;
	}
	if (!imgc_range_inside(offset, length, INT64_MAX))
		return imgc_fail_at(err, IMGC_OUT_OF_RANGE, offset, "pwritev");
	for (i = 0; i < n_iov;) {
		struct iovec entries[FD_MAX_IOV];
		int n = 0;
		int status;

		while (i < n_iov && n < FD_MAX_IOV)
			entries[n++] = iov[i++];
		status = write_entries(fd, entries, n, &offset, err);
		if (status)
			return status;
	}
	return IMGC_OK;
}
