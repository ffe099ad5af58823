/*
 * drop.h - drops from the page cache what a job has read or written
 */
#ifndef IMGC_IO_DROP_H
#define IMGC_IO_DROP_H

#include <stdbool.h>
#include <stdint.h>

#include "imgc.h"

/* Any number of threads may add ranges to one dropper. */
struct imgc_dropper;

/*
 * What the page cache has of the file now stays there.  Without the right to know that
 * (mincore() tells owners and writers only), nothing is said to be cached.
 */
int imgc_dropper_create(int fd, uint64_t nbytes, struct imgc_dropper **out, struct imgc_error *err);

/* How many bytes were in the page cache when it was created, as far as is known. */
uint64_t imgc_dropper_kept_nbytes(const struct imgc_dropper *dropper);

/* [offset, offset + length) has been read, and is dropped soon. */
void imgc_dropper_add_read(struct imgc_dropper *dropper, uint64_t offset, uint64_t length);

/*
 * [offset, offset + length) has been written, and is dropped when it is on the medium.
 * May wait until something that was added before is there.  IMGC_IO if that failed: the
 * system then reports the failure nowhere else.
 */
int imgc_dropper_add_written(struct imgc_dropper *dropper, uint64_t offset, uint64_t length,
			     struct imgc_error *err);

/* IMGC_IO if writing back has failed at any time. */
int imgc_dropper_status(const struct imgc_dropper *dropper, struct imgc_error *err);

/* Drops what is left of the file, but not what is not written back. */
void imgc_dropper_drop_rest(const struct imgc_dropper *dropper);

/* Does not use the descriptor.  NULL is allowed. */
void imgc_dropper_destroy(struct imgc_dropper *dropper);

#endif /* IMGC_IO_DROP_H */
