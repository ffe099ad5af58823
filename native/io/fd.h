/*
 * fd.h - whole reads and writes on a file descriptor
 */
#ifndef IMGC_IO_FD_H
#define IMGC_IO_FD_H

#include "io/io.h"

/* Reads all requests by pread(), one after the other. */
int imgc_fd_read(int fd, const struct imgc_io_request *requests, size_t n, struct imgc_error *err);

/* Writes all of `iov` by pwritev(). */
int imgc_fd_write(int fd, const struct iovec *iov, int n_iov, uint64_t offset,
		  struct imgc_error *err);

#endif /* IMGC_IO_FD_H */
