/*
 * retry.h - reads and writes that are repeated where that can help
 */
#ifndef IMGC_ENGINE_RETRY_H
#define IMGC_ENGINE_RETRY_H

#include "engine/stop.h"
#include "io/io.h"

/*
 * imgc_file_read() and imgc_file_write(), a few times if need be.  Both give
 * IMGC_CANCELLED once the job is to stop.  `err` must not be NULL: it holds the errno
 * that decides whether another attempt can help.
 */
int imgc_read_retrying(struct imgc_file *file, struct imgc_io_context *io,
		       const struct imgc_io_request *requests, size_t n, const struct stop *stop,
		       struct imgc_error *err);
int imgc_write_retrying(struct imgc_file *file, const struct iovec *iov, int n_iov, uint64_t offset,
			const struct stop *stop, struct imgc_error *err);

/* imgc_file_move(), which waits for a reader in the same way. */
int imgc_move_retrying(struct imgc_file *file, uint64_t offset, struct imgc_file *source,
		       uint64_t source_offset, uint64_t length, const struct stop *stop,
		       struct imgc_error *err);

#endif /* IMGC_ENGINE_RETRY_H */
