/*
 * drop.c - drops from the page cache what a job has read or written
 *
 * Ranges are collected until they are BATCH_NBYTES, since a call for each read would
 * drain the queues of all processors each time.  Of a batch of written ranges the
 * writing back is only started; it is waited for, and dropped, when the next batch is
 * complete.  So at most three batches of a file are dirty.
 */
#include "io/drop.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "common/checked.h"
#include "common/error.h"

#define BATCH_NBYTES ((uint64_t)8 << 20)
#define BATCH_MAX_RANGES 256
/* So much of the file is mapped at a time to see what is cached. */
#define LOOK_NBYTES ((uint64_t)64 << 20)
#define PAGE_NBYTES ((uint64_t)4096)
/* cachestat() is Linux 6.5; its number is the same on all machines. */
#ifndef SYS_cachestat
#define SYS_cachestat 451
#endif
#define LOOK_MAX_PAGES (LOOK_NBYTES / PAGE_NBYTES)
/* Runs of cached pages that are remembered; what is between further ones stays too. */
#define MAX_KEPT ((size_t)1 << 20)

struct byte_range {
	uint64_t start, end;
};

struct drop_batch {
	struct byte_range ranges[BATCH_MAX_RANGES];
	size_t n;
	uint64_t nbytes;
};

struct imgc_dropper {
	int fd;
	uint64_t page_nbytes;
	struct byte_range *kept; /* ascending */
	size_t n_kept, kept_room;
	_Atomic int os_errno; /* of writing back */

	pthread_mutex_t lock; /* all below */
	struct drop_batch read, written;
	struct drop_batch read_before; /* see imgc_dropper_add_read() */
	struct drop_batch started;     /* is being written back */
};

/* ------------------------------------------------------- what is cached before */

static int keep(struct imgc_dropper *dropper, uint64_t start, uint64_t end)
{
	if (dropper->n_kept > 0 &&
	    (dropper->kept[dropper->n_kept - 1].end == start || dropper->n_kept == MAX_KEPT)) {
		dropper->kept[dropper->n_kept - 1].end = end;
		return IMGC_OK;
	}
	if (dropper->n_kept == dropper->kept_room) {
		size_t room = dropper->kept_room ? 2 * dropper->kept_room : 64;
		struct byte_range *kept = realloc(dropper->kept, room * sizeof(*kept));

		if (!kept)
			return IMGC_NO_MEMORY;
		dropper->kept = kept;
		dropper->kept_room = room;
	}
	dropper->kept[dropper->n_kept++] = (struct byte_range){start, end};
	return IMGC_OK;
}

/* Whether any page is cached; true as well if the system cannot tell so fast. */
static bool may_be_cached(int fd, uint64_t offset, uint64_t length)
{
	struct {
		uint64_t offset, length;
	} range = {offset, length};
	struct {
		uint64_t cached, dirty, writeback, evicted, recently_evicted;
	} found;

	if (syscall(SYS_cachestat, fd, &range, &found, 0) == 0)
		return found.cached != 0;
	return true;
}

static int look_at(struct imgc_dropper *dropper, uint64_t offset, uint64_t length, uint8_t *pages)
{
	uint64_t unit = dropper->page_nbytes;
	void *map = mmap(NULL, (size_t)length, PROT_READ, MAP_SHARED, dropper->fd, (off_t)offset);
	int status = IMGC_OK;

	if (map == MAP_FAILED)
		return IMGC_OK;
	if (mincore(map, (size_t)length, pages) == 0) {
		for (uint64_t at = 0; at < length && status == IMGC_OK; at += unit) {
			if (pages[at / unit] & 1)
				status = keep(dropper, offset + at, offset + at + unit);
		}
	}
	munmap(map, (size_t)length);
	return status;
}

/* mincore() calls every page cached if the caller has no right to know. */
static bool may_know(int fd)
{
	struct stat st;
	char path[64];

	if (fstat(fd, &st))
		return false;
	if (geteuid() == 0 || st.st_uid == geteuid())
		return true;
	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	return faccessat(AT_FDCWD, path, W_OK, AT_EACCESS) == 0;
}

static int look(struct imgc_dropper *dropper, uint64_t nbytes)
{
	uint8_t *pages;
	int status = IMGC_OK;

	if (!may_know(dropper->fd) || !may_be_cached(dropper->fd, 0, nbytes))
		return IMGC_OK;
	pages = malloc(LOOK_MAX_PAGES);
	if (!pages)
		return IMGC_NO_MEMORY;
	for (uint64_t at = 0; at < nbytes && status == IMGC_OK; at += LOOK_NBYTES) {
		uint64_t length = imgc_min_u64(LOOK_NBYTES, nbytes - at);

		if (may_be_cached(dropper->fd, at, length))
			status = look_at(dropper, at, length, pages);
	}
	free(pages);
	return status;
}

int imgc_dropper_create(int fd, uint64_t nbytes, struct imgc_dropper **out, struct imgc_error *err)
{
	struct imgc_dropper *dropper = calloc(1, sizeof(*dropper));
	long page_nbytes = sysconf(_SC_PAGESIZE);

	if (!dropper || pthread_mutex_init(&dropper->lock, NULL)) {
		free(dropper);
		return imgc_fail_call(err, IMGC_NO_MEMORY, "drop");
	}
	dropper->fd = fd;
	dropper->page_nbytes = imgc_max_u64((uint64_t)page_nbytes, PAGE_NBYTES);
	atomic_init(&dropper->os_errno, 0);
	int status = look(dropper, nbytes);

	if (status) {
		imgc_dropper_destroy(dropper);
		return imgc_fail_call(err, status, "drop");
	}
	*out = dropper;
	return IMGC_OK;
}

uint64_t imgc_dropper_kept_nbytes(const struct imgc_dropper *dropper)
{
	uint64_t nbytes = 0;

	for (size_t i = 0; i < dropper->n_kept; i++)
		nbytes += dropper->kept[i].end - dropper->kept[i].start;
	return nbytes;
}

/* ------------------------------------------------------------------- dropping */

/* The first kept range that ends after `offset`. */
static size_t find_kept(const struct imgc_dropper *dropper, uint64_t offset)
{
	size_t low = 0, high = dropper->n_kept;

	while (low < high) {
		size_t middle = low + (high - low) / 2;

		if (dropper->kept[middle].end <= offset)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

/* Drops whole pages, but for those that stay.  An end of UINT64_MAX is that of the file. */
static void drop_range(const struct imgc_dropper *dropper, struct byte_range range)
{
	uint64_t start = imgc_align_down(range.start, dropper->page_nbytes);
	uint64_t end = range.end;

	if (end != UINT64_MAX && !imgc_align_up_checked(end, dropper->page_nbytes, &end))
		end = UINT64_MAX;
	for (size_t i = find_kept(dropper, start); start < end; i++) {
		bool is_last = i == dropper->n_kept || dropper->kept[i].start >= end;
		uint64_t until = is_last ? end : dropper->kept[i].start;

		/* A length of 0 is the rest of the file. */
		if (until > start)
			posix_fadvise(dropper->fd, (off_t)start,
				      until == UINT64_MAX ? 0 : (off_t)(until - start),
				      POSIX_FADV_DONTNEED);
		if (is_last)
			return;
		start = dropper->kept[i].end;
	}
}

static int compare_ranges(const void *left, const void *right)
{
	const struct byte_range *a = left, *b = right;

	return (a->start > b->start) - (a->start < b->start);
}

/* Sorts the ranges, and joins those that touch. */
static void join(struct drop_batch *batch)
{
	size_t n = 0;

	qsort(batch->ranges, batch->n, sizeof(*batch->ranges), compare_ranges);
	for (size_t i = 0; i < batch->n; i++) {
		struct byte_range *last = n ? &batch->ranges[n - 1] : NULL;

		if (last && batch->ranges[i].start <= last->end)
			last->end = imgc_max_u64(last->end, batch->ranges[i].end);
		else
			batch->ranges[n++] = batch->ranges[i];
	}
	batch->n = n;
}

static void drop(const struct imgc_dropper *dropper, struct drop_batch *batch)
{
	for (size_t i = 0; i < batch->n; i++)
		drop_range(dropper, batch->ranges[i]);
}

/* Whether the batch is complete; then *taken has it, and the batch is empty. */
static bool add(struct drop_batch *batch, uint64_t offset, uint64_t length,
		struct drop_batch *taken)
{
	struct byte_range *last = batch->n ? &batch->ranges[batch->n - 1] : NULL;

	if (last && last->end == offset)
		last->end += length;
	else
		batch->ranges[batch->n++] = (struct byte_range){offset, offset + length};
	batch->nbytes += length;
	if (batch->n < BATCH_MAX_RANGES && batch->nbytes < BATCH_NBYTES)
		return false;
	*taken = *batch;
	batch->n = 0;
	batch->nbytes = 0;
	return true;
}

/*
 * A batch is dropped when the next one is complete: where several threads read, the kernel
 * tells by the pages before a read that it is in order, and reads ahead.
 */
void imgc_dropper_add_read(struct imgc_dropper *dropper, uint64_t offset, uint64_t length)
{
	struct drop_batch taken, before;

	if (length == 0 || !imgc_range_inside(offset, length, INT64_MAX))
		return;
	pthread_mutex_lock(&dropper->lock);
	bool is_complete = add(&dropper->read, offset, length, &taken);

	if (is_complete) {
		join(&taken);
		before = dropper->read_before;
		dropper->read_before = taken;
	}
	pthread_mutex_unlock(&dropper->lock);
	if (!is_complete)
		return;
	drop(dropper, &before);
	if (taken.nbytes > 2 * BATCH_NBYTES)
		drop(dropper, &taken); /* too much to stay */
}

/* ----------------------------------------------------------------- writing back */

static void sync_ranges(struct imgc_dropper *dropper, const struct drop_batch *batch,
			unsigned flags)
{
	for (size_t i = 0; i < batch->n; i++) {
		const struct byte_range *range = &batch->ranges[i];

		while (sync_file_range(dropper->fd, (off_t)range->start,
				       (off_t)(range->end - range->start), flags)) {
			if (errno == EINTR)
				continue;
			/* Files that cannot be asked for it are written back by the kernel. */
			if (errno != ENOSYS && errno != EINVAL && errno != ESPIPE)
				atomic_store(&dropper->os_errno, errno);
			break;
		}
	}
}

int imgc_dropper_status(const struct imgc_dropper *dropper, struct imgc_error *err)
{
	int os_errno = atomic_load(&dropper->os_errno);

	return os_errno ? imgc_fail_system(err, os_errno, 0, "sync_file_range") : IMGC_OK;
}

int imgc_dropper_add_written(struct imgc_dropper *dropper, uint64_t offset, uint64_t length,
			     struct imgc_error *err)
{
	struct drop_batch taken, before;

	if (length == 0 || !imgc_range_inside(offset, length, INT64_MAX))
		return imgc_dropper_status(dropper, err);
	pthread_mutex_lock(&dropper->lock);
	bool is_complete = add(&dropper->written, offset, length, &taken);

	if (is_complete) {
		join(&taken);
		before = dropper->started;
		dropper->started = taken;
	}
	pthread_mutex_unlock(&dropper->lock);
	if (is_complete) {
		sync_ranges(dropper, &taken, SYNC_FILE_RANGE_WRITE);
		sync_ranges(dropper, &before,
			    SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE |
				    SYNC_FILE_RANGE_WAIT_AFTER);
		drop(dropper, &before);
	}
	return imgc_dropper_status(dropper, err);
}

void imgc_dropper_drop_rest(const struct imgc_dropper *dropper)
{
	drop_range(dropper, (struct byte_range){0, UINT64_MAX});
}

void imgc_dropper_destroy(struct imgc_dropper *dropper)
{
	if (!dropper)
		return;
	pthread_mutex_destroy(&dropper->lock);
	free(dropper->kept);
	free(dropper);
}
