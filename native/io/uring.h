/*
 * uring.h - scattered reads through io_uring
 *
 * Without liburing at build time (IMGC_HAVE_URING) only the probe exists, and
 * says no.
 */
#ifndef IMGC_IO_URING_H
#define IMGC_IO_URING_H

#include <stdbool.h>

#include "io/io.h"

/* Does this kernel, here and now, give us a ring? */
bool imgc_uring_runnable(void);

#ifdef IMGC_HAVE_URING

int imgc_uring_context_create(struct imgc_io_context **out);
void imgc_uring_context_destroy(struct imgc_io_context *ctx);

/* imgc_file_read() on a file descriptor. */
int imgc_uring_read(struct imgc_io_context *ctx, int fd, const struct imgc_io_request *requests,
		    size_t n, struct imgc_error *err);

#endif

#endif /* IMGC_IO_URING_H */
