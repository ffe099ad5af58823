/*
 * io.h - files as a table of operations
 *
 * The engine and the binding reach every file through the functions below.  Each calls
 * the file's own row of the table.  Errors carry IMGC_NO_SOURCE: only the caller knows
 * the file's index in its job.
 */
#ifndef IMGC_IO_IO_H
#define IMGC_IO_IO_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

#include "imgc.h"

/* One read of `length` bytes at `offset` into `buffer`. */
struct imgc_io_request {
	uint64_t offset;
	void *buffer;
	uint64_t length;
};

/* A thread's own way to the kernel: a ring, or NULL for plain system calls. */
struct imgc_io_context;

/*
 * The operations of one kind of file.
 *
 * Threads: any number of threads may call any of these at once on one file, but for
 * close.  Two calls on ranges that overlap have no defined order, as with pread() and
 * pwrite().  A context belongs to one thread.
 *
 * Errors: an operation that returns int gives IMGC_OK or a negative status, and on
 * failure fills *err, which may be NULL.  It gives IMGC_IO with the errno if the system
 * refused.  It does not retry, except after EINTR and short counts: engine/retry.c
 * decides what is worth another attempt.
 *
 * NULL: a member may be NULL only where its comment says so.
 */
struct imgc_file_ops {
	/*
	 * Reads all bytes of all `n` requests.  No count is returned: a short count of
	 * the system is continued until the request is complete.  If the file ends
	 * before that, the status is IMGC_PAST_END and err->offset is the first missing
	 * byte.  On failure the buffers are undefined, and no read is still under way
	 * when the call returns.
	 *
	 * The requests may lie anywhere in the file and in any order, and may be empty.
	 * `ctx` is the calling thread's context.  NULL, or a context that this kind of
	 * file has no use for, means plain reads.
	 */
	int (*read)(struct imgc_file *file, struct imgc_io_context *ctx,
		    const struct imgc_io_request *requests, size_t n, struct imgc_error *err);

	/*
	 * Reads from the front of [offset, offset + length) what the system has in memory,
	 * and does not wait for the device.  Returns the number of bytes; fewer than
	 * `length` for any reason.  What follows them in the buffer is undefined.
	 *
	 * NULL: files of this kind cannot tell.
	 */
	uint64_t (*read_now)(struct imgc_file *file, uint64_t offset, void *buffer,
			     uint64_t length);

	/*
	 * The bytes of [offset, offset + length) where they are, which stay as long as the
	 * file; NULL if that is beyond its end.
	 *
	 * NULL: files of this kind have no bytes in memory.
	 */
	const void *(*borrow)(const struct imgc_file *file, uint64_t offset, uint64_t length);

	/*
	 * [offset, offset + length) will be read soon: the system may start to fetch it.
	 * Does not wait for the bytes, but maybe until the device takes more requests.
	 * There is no error to report.
	 *
	 * NULL: it makes no difference.
	 */
	void (*will_need)(struct imgc_file *file, uint64_t offset, uint64_t length);

	/*
	 * Writes all bytes of `iov`, one after the other from `offset` on.  Short
	 * counts are continued.  The file grows as needed.  A range past the end of a
	 * file in memory is IMGC_OUT_OF_RANGE; past the end of a device it is IMGC_IO
	 * with ENOSPC.  On failure the range is undefined.  Success does not mean that
	 * the bytes survive a power cut: see `sync`.
	 *
	 * Called for targets only.  `iov` and its entries are left as they are.
	 */
	int (*write)(struct imgc_file *file, const struct iovec *iov, int n_iov, uint64_t offset,
		     struct imgc_error *err);

	/*
	 * Makes [offset, offset + length) read as zeros, by the cheapest way that the
	 * file supports: the blocks may be freed, or kept and marked, or written.  The
	 * file grows to offset + length if it is shorter, and otherwise keeps its size.
	 * A range past the end of a file that cannot grow is IMGC_OUT_OF_RANGE.  A
	 * length of 0 is allowed.
	 *
	 * Called for targets only.
	 */
	int (*zero)(struct imgc_file *file, uint64_t offset, uint64_t length,
		    struct imgc_error *err);

	/*
	 * Returns once all bytes of completed writes, and the size of the file, are
	 * durable.  After a failure the state of the file is unknown.  The caller must
	 * not try again: the kernel may have dropped the data and report success.
	 *
	 * The engine does not call this: the owner of the target decides when to sync.
	 */
	int (*sync)(struct imgc_file *file, struct imgc_error *err);

	/*
	 * Finds the next range of data, [*start, *end), at or after `offset`.  If there
	 * is none, both are the file's end.  Bytes before *start read as zeros.  A
	 * range may hold zeros too: a file that cannot tell where its holes are is all
	 * data.  On failure *start and *end are untouched.
	 */
	int (*next_data)(struct imgc_file *file, uint64_t offset, uint64_t *start, uint64_t *end,
			 struct imgc_error *err);

	/*
	 * Makes [offset, offset + length) of `file` refer to the blocks of `source` at
	 * source_offset, without copying (a reflink).  All three numbers are multiples
	 * of both files' reflink_block_nbytes, and `source` has the same table as
	 * `file`.  Returns false if it did not work, for whatever reason; the caller
	 * then writes the range, which is undefined until then.  There is no error to
	 * report.
	 *
	 * NULL: files of this kind have no blocks that can be reflinked.
	 */
	bool (*reflink)(struct imgc_file *file, uint64_t offset, struct imgc_file *source,
			uint64_t source_offset, uint64_t length);

	/*
	 * Puts pages of [offset, offset + length) into a pipe instead of a copy of their
	 * bytes: as many as it takes without waiting for a reader.  Returns what splice()
	 * returns, and sets errno.  Until a reader has taken them, later changes of the
	 * file change what is in the pipe.
	 *
	 * NULL: files of this kind have no pages.
	 */
	ssize_t (*splice)(struct imgc_file *file, uint64_t offset, int pipe, uint64_t length);

	/*
	 * Writes [source_offset, source_offset + length) of `source` at `offset` by its
	 * `splice`.  IMGC_IO with EAGAIN is as for `write`.  IMGC_UNSUPPORTED, for whatever
	 * reason, says that a write of the whole range must follow, which goes on where
	 * this stopped, and reports what is wrong.
	 *
	 * NULL: files of this kind are never pipes; see `takes_pages`.
	 */
	int (*move)(struct imgc_file *file, uint64_t offset, struct imgc_file *source,
		    uint64_t source_offset, uint64_t length, struct imgc_error *err);

	/*
	 * Waits, but not longer than the timeout, until a write that gave EAGAIN is worth
	 * another attempt.  The same write then goes on where it stopped.
	 *
	 * NULL: files of this kind have no readers that a write could wait for.
	 */
	void (*await_room)(struct imgc_file *file, int timeout_ms);

	/*
	 * Frees the object.  A descriptor or a buffer that it was opened with stays the
	 * caller's.  Does not sync and cannot fail.  Called once, by the owner, when no
	 * other call on the file is under way.
	 */
	void (*close)(struct imgc_file *file);
};

/* The first member of each implementation's own struct. */
struct imgc_file {
	const struct imgc_file_ops *ops;
	/*
	 * The kernel lets one write in at a time (the inode's lock).  More than one
	 * writer would only wait.
	 */
	bool writes_are_serial;
	/*
	 * Each byte comes once, in order.  A read waits only for a moment, and is then IMGC_IO
	 * with EAGAIN; the same read again goes on where it stopped.
	 */
	bool reads_wait;
	/*
	 * Nothing is read ahead and no writes are gathered: requests are better long, or
	 * many at once.
	 */
	bool is_direct;
	bool takes_pages; /* it is a pipe, and `move` may be called */
	/* Reflinks consist of whole blocks of this size, a power of two; 0: none. */
	uint64_t reflink_block_nbytes;
	_Atomic bool is_written;     /* see imgc_file_take_written() */
	_Atomic bool refuses_writes; /* see imgc_file_refuse_writes() */
};

/*
 * One context per worker thread.  `io_variant` is an id of IMGC_OP_IO, or
 * IMGC_IO_BY_FILES, where `is_direct` says whether a file is read directly.  The plain
 * variant needs no context and gives *out = NULL.  IMGC_UNSUPPORTED if the kernel
 * refuses a ring that was asked for by its id.  destroy(NULL) is allowed.
 */
int imgc_io_context_create(uint32_t io_variant, bool is_direct, struct imgc_io_context **out);
void imgc_io_context_destroy(struct imgc_io_context *ctx);

/*
 * The operations above, of any file.  imgc.h declares those that the binding calls too:
 * imgc_file_zero(), imgc_file_next_data() and imgc_file_close().
 */
int imgc_file_read(struct imgc_file *file, struct imgc_io_context *ctx,
		   const struct imgc_io_request *requests, size_t n, struct imgc_error *err);
uint64_t imgc_file_read_now(struct imgc_file *file, uint64_t offset, void *buffer, uint64_t length);
const void *imgc_file_borrow(const struct imgc_file *file, uint64_t offset, uint64_t length);
void imgc_file_will_need(struct imgc_file *file, uint64_t offset, uint64_t length);
int imgc_file_write(struct imgc_file *file, const struct iovec *iov, int n_iov, uint64_t offset,
		    struct imgc_error *err);
int imgc_file_sync(struct imgc_file *file, struct imgc_error *err);

/* Also false if the files are of different kinds, or of a kind without reflinks. */
bool imgc_file_reflink(struct imgc_file *file, uint64_t offset, struct imgc_file *source,
		       uint64_t source_offset, uint64_t length);

/* Whether pages of `source` can be moved to `file`; see the operation `move`. */
bool imgc_file_can_move(const struct imgc_file *file, const struct imgc_file *source);

/* Only where imgc_file_can_move() says so. */
int imgc_file_move(struct imgc_file *file, uint64_t offset, struct imgc_file *source,
		   uint64_t source_offset, uint64_t length, struct imgc_error *err);

#endif /* IMGC_IO_IO_H */
