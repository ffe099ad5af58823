/*
 * error.h - filling the caller's struct imgc_error
 */
#ifndef IMGC_COMMON_ERROR_H
#define IMGC_COMMON_ERROR_H

#include "imgc.h"

/*
 * Each of these fills *err, which may be NULL, and returns the status, so that a
 * failing function ends in `return imgc_fail...(...)`.  `op` is a static string.
 */
int imgc_fail(struct imgc_error *err, int status, int os_errno, uint64_t offset, uint32_t source,
	      const char *op);

/* The call as a whole fails: there is no offset and no file. */
int imgc_fail_call(struct imgc_error *err, int status, const char *op);

/* `offset` is a row of a table, or a byte of a file that the caller names. */
int imgc_fail_at(struct imgc_error *err, int status, uint64_t offset, const char *op);

/* The operating system refused: IMGC_IO with its errno. */
int imgc_fail_system(struct imgc_error *err, int os_errno, uint64_t offset, const char *op);

/*
 * Adds the file to an error of a call that does not know its index in the job.  Leaves
 * *err alone if the status is IMGC_OK, or IMGC_CANCELLED, for which no file is to
 * blame.
 */
int imgc_fail_in(struct imgc_error *err, int status, uint32_t source);

#endif /* IMGC_COMMON_ERROR_H */
