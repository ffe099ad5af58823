/*
 * null.c - an endless file that forgets every write and reads as zeros, for benchmarks
 */
#include <stdlib.h>
#include <string.h>

#include "io/io.h"

static int null_read(struct imgc_file *file, struct imgc_io_context *ctx,
		     const struct imgc_io_request *requests, size_t n, struct imgc_error *err)
{
	(void)file;
	(void)ctx;
	(void)err;
	for (size_t i = 0; i < n; i++) {
		if (requests[i].length != 0)
			memset(requests[i].buffer, 0, (size_t)requests[i].length);
	}
	return IMGC_OK;
}

static int null_write(struct imgc_file *file, const struct iovec *iov, int n_iov, uint64_t offset,
		      struct imgc_error *err)
{
	(void)file;
	(void)iov;
	(void)n_iov;
	(void)offset;
	(void)err;
	return IMGC_OK;
}

static int null_zero(struct imgc_file *file, uint64_t offset, uint64_t length,
		     struct imgc_error *err)
{
	(void)file;
	(void)offset;
	(void)length;
	(void)err;
	return IMGC_OK;
}

static int null_sync(struct imgc_file *file, struct imgc_error *err)
{
	(void)file;
	(void)err;
	return IMGC_OK;
}

static int null_next_data(struct imgc_file *file, uint64_t offset, uint64_t *start, uint64_t *end,
			  struct imgc_error *err)
{
	(void)file;
	(void)offset;
	(void)err;
	*start = *end = UINT64_MAX;
	return IMGC_OK;
}

static void null_close(struct imgc_file *file)
{
	free(file);
}

static const struct imgc_file_ops null_file_ops = {
	.read = null_read,
	.write = null_write,
	.zero = null_zero,
	.sync = null_sync,
	.next_data = null_next_data,
	.close = null_close,
};

int imgc_file_open_null(struct imgc_file **out)
{
	struct imgc_file *file = calloc(1, sizeof(*file));

	if (!file)
		return IMGC_NO_MEMORY;
	file->ops = &null_file_ops;
	*out = file;
	return IMGC_OK;
}
