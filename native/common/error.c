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
