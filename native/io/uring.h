/*
 * uring.h - scattered reads through io_uring
 *
 * Built without liburing (IMGC_HAVE_URING), only the probe exists, and answers false.
 */
#ifndef IMGC_IO_URING_H
#define IMGC_IO_URING_H

#include <stdbool.h>

#include "io/io.h"

/* Whether the kernel gives this process a ring now. */
bool imgc_uring_runnable(void);

#ifdef IMGC_HAVE_URING

int imgc_uring_context_create(struct imgc_io_context **out);
void imgc_uring_context_destroy(struct imgc_io_context *ctx);

/* Does what imgc_file_ops.read asks for, on a file descriptor. */
int imgc_uring_read(struct imgc_io_context *ctx, int fd, const struct imgc_io_request *requests,
		    size_t n, struct imgc_error *err);

#endif

#endif /* IMGC_IO_URING_H */
