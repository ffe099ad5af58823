/*
 * direct.h - reads and writes past the page cache (O_DIRECT)
 */
#ifndef IMGC_IO_DIRECT_H
#define IMGC_IO_DIRECT_H

#include <stdbool.h>
#include <stdint.h>

#include "io/io.h"

/*
 * Two descriptors of one file.  Whole units of it go by the one that is open with
 * O_DIRECT.  The rest of a write goes by the other, through the page cache.  A unit is no
 * smaller than a page, so that no page is written both ways at a time: the kernel could
 * not keep both apart.
 *
 * Any number of threads may use one.
 */
struct imgc_direct;

/*
 * `direct_fd` is open with O_DIRECT, `fd` is not; both stay the caller's.
 * IMGC_UNSUPPORTED if the file system refuses such reads.
 */
int imgc_direct_create(int direct_fd, int fd, uint64_t sector_nbytes, struct imgc_direct **out,
		       struct imgc_error *err);

/*
 * The kernel is about to fetch [offset, offset + length) into the page cache, in the order
 * that suits the device.  Reads there take it from the page cache.  The file has
 * `file_nbytes` bytes.  False if there is no memory to note it: it is not to be fetched.
 */
bool imgc_direct_note_fetched(struct imgc_direct *direct, uint64_t offset, uint64_t length,
			      uint64_t file_nbytes);

/*
 * What imgc_file_ops.read asks for.  Nothing else comes into the page cache, unless the
 * file system refuses a read; all that follow then go through the page cache.
 */
int imgc_direct_read(struct imgc_direct *direct, struct imgc_io_context *ctx,
		     const struct imgc_io_request *requests, size_t n, struct imgc_error *err);

/* What imgc_file_ops.write asks for.  Short writes go through the page cache. */
int imgc_direct_write(struct imgc_direct *direct, const struct iovec *iov, int n_iov,
		      uint64_t offset, struct imgc_error *err);

/* NULL is allowed.  Does not close the descriptors. */
void imgc_direct_destroy(struct imgc_direct *direct);

#endif /* IMGC_IO_DIRECT_H */
