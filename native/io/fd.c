/*
 * fd.c - whole reads and writes on a file descriptor
 */
#include "io/fd.h"

#include <errno.h>
#include <unistd.h>

#include "common/checked.h"
#include "common/error.h"

/* Entries of one pwritev() call: well under IOV_MAX, and small enough for the stack. */
#define FD_MAX_IOV 128

/* Linux moves at most 0x7ffff000 bytes a call; this is a round number below that. */
#define FD_MAX_PIECE ((uint64_t)1 << 30)

static int read_request(int fd, const struct imgc_io_request *request, struct imgc_error *err)
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

int imgc_fd_read(int fd, const struct imgc_io_request *requests, size_t n, struct imgc_error *err)
{
	for (size_t i = 0; i < n; i++) {
		int status = read_request(fd, &requests[i], err);

		if (status)
			return status;
	}
	return IMGC_OK;
}

/* Drops `put` bytes from the front of the entries; *first is the first that is left. */
static void drop_front(struct iovec *entries, int *first, size_t put)
{
	while (put > 0) {
		struct iovec *entry = &entries[*first];
		size_t step = put < entry->iov_len ? put : entry->iov_len;

		entry->iov_base = (char *)entry->iov_base + step;
		entry->iov_len -= step;
		put -= step;
		if (entry->iov_len == 0)
			++*first;
	}
}

/* Writes the `n` entries, which it changes. */
static int write_entries(int fd, struct iovec *entries, int n, uint64_t *offset,
			 struct imgc_error *err)
{
	int first = 0;

	for (;;) {
		while (first < n && entries[first].iov_len == 0)
			first++;
		if (first == n)
			return IMGC_OK;
		ssize_t put = pwritev(fd, entries + first, n - first, (off_t)*offset);

		if (put < 0 && errno == EINTR)
			continue;
		if (put <= 0)
			return imgc_fail_system(err, put < 0 ? errno : EIO, *offset, "pwritev");
		*offset += (uint64_t)put;
		drop_front(entries, &first, (size_t)put);
	}
}

int imgc_fd_write(int fd, const struct iovec *iov, int n_iov, uint64_t offset,
		  struct imgc_error *err)
{
	uint64_t length = 0;

	for (int i = 0; i < n_iov; i++) {
		if (!imgc_add_checked(length, iov[i].iov_len, &length))
			length = UINT64_MAX;
	}
	if (!imgc_range_inside(offset, length, INT64_MAX))
		return imgc_fail_at(err, IMGC_OUT_OF_RANGE, offset, "pwritev");
	for (int i = 0; i < n_iov;) {
		struct iovec entries[FD_MAX_IOV];
		int n = 0;

		while (i < n_iov && n < FD_MAX_IOV)
			entries[n++] = iov[i++];
		int status = write_entries(fd, entries, n, &offset, err);

		if (status)
			return status;
	}
	return IMGC_OK;
}
