/*
 * memory.c - a fixed buffer as a file
 */
#include <stdlib.h>
#include <string.h>

#include "common/checked.h"
#include "common/error.h"
#include "io/io.h"

struct memory_file {
	struct imgc_file base;
	uint8_t *data;
	uint64_t nbytes;
};

static int memory_read(struct imgc_file *base, struct imgc_io_context *ctx,
		       const struct imgc_io_request *requests, size_t n, struct imgc_error *err)
{
	struct memory_file *file = (struct memory_file *)base;

	(void)ctx;
	for (size_t i = 0; i < n; i++) {
		const struct imgc_io_request *r = &requests[i];

		if (!imgc_range_inside(r->offset, r->length, file->nbytes))
			return imgc_fail_at(err, IMGC_PAST_END,
					    imgc_max_u64(r->offset, file->nbytes), "pread");
		if (r->length != 0)
			memcpy(r->buffer, file->data + r->offset, (size_t)r->length);
	}
	return IMGC_OK;
}

static const void *memory_borrow(const struct imgc_file *base, uint64_t offset, uint64_t length)
{
	const struct memory_file *file = (const struct memory_file *)base;

	return imgc_range_inside(offset, length, file->nbytes) ? file->data + offset : NULL;
}

static int memory_write(struct imgc_file *base, const struct iovec *iov, int n_iov, uint64_t offset,
			struct imgc_error *err)
{
	struct memory_file *file = (struct memory_file *)base;
	uint64_t room = offset <= file->nbytes ? file->nbytes - offset : 0;

	/* All or nothing: a write that does not fit leaves the buffer as it is. */
	for (int i = 0; i < n_iov; i++) {
		if (offset > file->nbytes || iov[i].iov_len > room)
			return imgc_fail_at(err, IMGC_OUT_OF_RANGE, offset, "pwritev");
		room -= iov[i].iov_len;
	}
	for (int i = 0; i < n_iov; i++) {
		if (iov[i].iov_len != 0)
			memcpy(file->data + offset, iov[i].iov_base, iov[i].iov_len);
		offset += iov[i].iov_len;
	}
	return IMGC_OK;
}

static int memory_zero(struct imgc_file *base, uint64_t offset, uint64_t length,
		       struct imgc_error *err)
{
	struct memory_file *file = (struct memory_file *)base;

	if (!imgc_range_inside(offset, length, file->nbytes))
		return imgc_fail_at(err, IMGC_OUT_OF_RANGE, offset, "zero");
	if (length != 0)
		memset(file->data + offset, 0, (size_t)length);
	return IMGC_OK;
}

static int memory_sync(struct imgc_file *base, struct imgc_error *err)
{
	(void)base;
	(void)err;
	return IMGC_OK;
}

static int memory_next_data(struct imgc_file *base, uint64_t offset, uint64_t *start, uint64_t *end,
			    struct imgc_error *err)
{
	struct memory_file *file = (struct memory_file *)base;

	(void)err;
	*start = imgc_min_u64(offset, file->nbytes);
	*end = file->nbytes;
	return IMGC_OK;
}

static void memory_close(struct imgc_file *base)
{
	free(base);
}

static const struct imgc_file_ops memory_file_ops = {
	.read = memory_read,
	.borrow = memory_borrow,
	.write = memory_write,
	.zero = memory_zero,
	.sync = memory_sync,
	.next_data = memory_next_data,
	.close = memory_close,
};

int imgc_file_open_memory(void *data, uint64_t nbytes, struct imgc_file **out)
{
	if ((!data && nbytes != 0) || nbytes > SIZE_MAX)
		return IMGC_INVALID_ARGUMENT;
	struct memory_file *file = calloc(1, sizeof(*file));

	if (!file)
		return IMGC_NO_MEMORY;
	file->base.ops = &memory_file_ops;
	file->data = data;
	file->nbytes = nbytes;
	*out = &file->base;
	return IMGC_OK;
}
