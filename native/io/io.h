/*
 * io.h - files as a table of operations
 *
 * Engine and binding reach files through the functions below, each of which
 * calls the row of the file's own table.  Errors carry IMGC_NO_SOURCE: which
 * source a file is, only the caller knows.
 */
#ifndef IMGC_IO_IO_H
#define IMGC_IO_IO_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#include "imgc.h"

/* One read of `length` bytes at `offset` into `buffer`. */
struct imgc_io_request {
	uint64_t offset;
	void *buffer;
	uint64_t length;
};

/* What a thread needs to reach the kernel: a ring of its own, or nothing (NULL). */
struct imgc_io_context;

struct imgc_file_ops {
	int (*read)(struct imgc_file *file, struct imgc_io_context *ctx,
		    const struct imgc_io_request *requests, size_t n, struct imgc_error *err);
	int (*write)(struct imgc_file *file, const struct iovec *iov, int n_iov, uint64_t offset,
		     struct imgc_error *err);
	int (*zero)(struct imgc_file *file, uint64_t offset, uint64_t length,
		    struct imgc_error *err);
	int (*sync)(struct imgc_file *file, struct imgc_error *err);
	int (*extents)(struct imgc_file *file, uint64_t offset, uint64_t *start, uint64_t *end,
		       struct imgc_error *err);
	/* NULL: files of this kind have no blocks that can be reflinked. */
	bool (*reflink)(struct imgc_file *file, uint64_t offset, struct imgc_file *source,
			uint64_t source_offset, uint64_t length);
	void (*close)(struct imgc_file *file);
};

/* The head of every implementation's own struct. */
struct imgc_file {
	const struct imgc_file_ops *ops;
	/* The kernel lets one write in at a time (a file's inode lock): more would only spin. */
	bool writes_are_serial;
	/* Reflinks consist of whole blocks of this size; 0: none are possible. */
	uint64_t reflink_block_nbytes;
};

/*
 * One per worker thread, not thread-safe.  `io_variant` is an id of IMGC_OP_IO.
 * The plain variant needs no context and gives *out = NULL.  IMGC_UNSUPPORTED
 * if the kernel refuses a ring.  destroy(NULL) is allowed.
 */
int imgc_io_context_create(uint32_t io_variant, struct imgc_io_context **out);
void imgc_io_context_destroy(struct imgc_io_context *ctx);

/*
 * Reads every request fully; with a ring they are under way together.  The
 * file's end before a request's end is IMGC_PAST_END, err->offset the first
 * byte missing.  `ctx` may be NULL.  On failure the buffers are undefined, and
 * nothing is under way any more.
 */
int imgc_file_read(struct imgc_file *file, struct imgc_io_context *ctx,
		   const struct imgc_io_request *requests, size_t n, struct imgc_error *err);

/* Writes all of `iov` at `offset`. */
int imgc_file_write(struct imgc_file *file, const struct iovec *iov, int n_iov, uint64_t offset,
		    struct imgc_error *err);

/*
 * Lets [offset, offset + length) of `file` be the blocks of `source` at source_offset, without
 * copying (a reflink).  All three are multiples of both files' reflink_block_nbytes.  False if that
 * cannot be had, for whatever reason; the range of `file` is undefined then.
 */
bool imgc_file_reflink(struct imgc_file *file, uint64_t offset, struct imgc_file *source,
		       uint64_t source_offset, uint64_t length);

/* Makes what was written durable. */
int imgc_file_sync(struct imgc_file *file, struct imgc_error *err);

#endif /* IMGC_IO_IO_H */
