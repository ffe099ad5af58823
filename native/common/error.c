/*
 * error.c - filling the caller's struct imgc_error
 */
#include "common/error.h"

int imgc_fail(struct imgc_error *err, int status, int os_errno, uint64_t offset, uint32_t source,
	      const char *op)
{
	if (err) {
		err->status = status;
		err->os_errno = os_errno;
		err->offset = offset;
		err->source = source;
		err->op = op;
	}
	return status;
}

int imgc_fail_call(struct imgc_error *err, int status, const char *op)
{
	return imgc_fail(err, status, 0, 0, IMGC_NO_SOURCE, op);
}

int imgc_fail_at(struct imgc_error *err, int status, uint64_t offset, const char *op)
{
	return imgc_fail(err, status, 0, offset, IMGC_NO_SOURCE, op);
}

int imgc_fail_system(struct imgc_error *err, int os_errno, uint64_t offset, const char *op)
{
	return imgc_fail(err, IMGC_IO, os_errno, offset, IMGC_NO_SOURCE, op);
}

int imgc_fail_in(struct imgc_error *err, int status, uint32_t source)
{
	if (err && status != IMGC_OK && status != IMGC_CANCELLED)
		err->source = source;
	return status;
}
