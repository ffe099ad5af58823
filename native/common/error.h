/*
 * error.h - filling the caller's struct imgc_error
 */
#ifndef IMGC_COMMON_ERROR_H
#define IMGC_COMMON_ERROR_H

#include "imgc.h"

/*
 * Fills *err, which may be NULL, and returns `status`, so that a failing
 * function ends in `return imgc_fail(...)`.  `op` is a static string.
 */
int imgc_fail(struct imgc_error *err, int status, int os_errno, uint64_t offset, uint32_t source,
	      const char *op);

#endif /* IMGC_COMMON_ERROR_H */
