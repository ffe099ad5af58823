/*
 * engine.h - the inside of a job
 *
 * A job owns a ring of slots and a set of workers.  A worker claims the next window of
 * the batch, fills a slot from the sources, tests it for zeros and compresses it, all
 * without a lock.  The worker that completes the window at the front of the ring gives
 * host offsets to every window that is ready, in guest order.  Any worker then writes
 * them.  So offsets do not depend on the number of threads, and no worker waits for a
 * slower one.
 *
 * The files of jobs.  Each calls only files below it; disk.h has those of open disks:
 *
 *     job.c      create, start, wait, finish, destroy
 *     worker.c   the ring: which window is next, and which worker does what
 *     window.c   one window: read, test for zeros, compress, compare, place
 *     open_end.c the end of a disk whose size is not known before
 *     leaves.c   the checksums of a window's blocks
 *     write.c    one window to the target: written, reflinked, or moved into a pipe
 *     source.c   from extents to bytes in memory
 *     reuse.c    compressed blocks that the target can have as they are
 *     announce.c what is read next, in physical order where rows are not
 *     retry.c    reads and writes that are repeated where that can help
 *     salvage.c  the list of ranges that could not be read
 *     placer.c   host offsets of an appending target; places.c has them in advance
 *     extents.c  the check of rows, and the search among them
 *     rate.c     how many guest bytes a second jobs may handle
 *     stop.c     the flags that tell a job to stop
 */
#ifndef IMGC_ENGINE_ENGINE_H
#define IMGC_ENGINE_ENGINE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <time.h>

#include "digest/digest.h"
#include "engine/announce.h"
#include "engine/placer.h"
#include "engine/source.h"
#include "imgc.h"

/* -------------------------------------------------------------------- ring */

/* A slot goes through these states in order, and is then free again. */
enum slot_state { SLOT_FREE, SLOT_FILLING, SLOT_READY, SLOT_PLACED, SLOT_WRITING };

/* One block of the target, or one window's part of a larger block. */
struct piece {
	uint64_t block;		  /* number of the block in the disk */
	uint32_t start, nbytes;	  /* in the window */
	uint32_t state;		  /* enum imgc_block_state */
	uint64_t packed_start;	  /* COMPRESSED: in `packed`, prefix first */
	uint32_t packed_nbytes;	  /* without the padding that follows */
	size_t first_run, n_runs; /* STORED: the runs that are written */
	bool opens_block;	  /* STORED: the block's prefix is written with it */
	uint64_t host_offset;
};

struct slot {
	enum slot_state state;
	uint64_t start, end; /* guest range; the end of the disk may turn out to be before */
	bool is_span;	     /* unread rows only, maybe longer than a window; no pieces */
	bool opens_block;    /* a span: no window before it has its first block */
	bool is_admitted;    /* the rate has allowed it */
	bool is_read;	     /* its bytes are in the view */
	int status;	     /* of filling it; `error` says more */
	struct imgc_error error;
	struct view view;
	uint8_t *packed; /* compressed blocks, one after the other */
	uint64_t packed_nbytes;
	struct piece *pieces;
	size_t n_pieces;
	struct range *runs; /* bytes that are written as they are, relative to the window */
	size_t n_runs;
	uint64_t data_nbytes;
	uint8_t granule; /* of a comparison: the bits of the granule that the window is in */
};

/* ----------------------------------------------------------- workers and job */

/* Each worker has its own, in cache lines that no other worker writes. */
struct counters {
	_Alignas(64) _Atomic uint64_t done;
	_Atomic uint64_t data, zero, read, written, reflinked, reused, trusted;
};

struct worker {
	struct imgc_job *job;
	pthread_t thread;
	bool is_called, must_end; /* what the thread waits for */
	struct reader reader;
	struct imgc_compressor *compressor;
	struct imgc_digest *digest; /* NULL: the job makes no checksum */
	struct reuse reuse;	    /* without blocks if the job reuses none */
	struct view other;	    /* the other side of a comparison, or the base */
	struct counters *counters;
	struct slot *waiting; /* IMGC_WINDOW_WAITS; NULL: none */
};

struct imgc_job {
	struct imgc_job_options options;
	struct imgc_source_file *sources;
	struct imgc_geometry geometry;
	uint64_t window_nbytes;
	uint64_t piece_nbytes;	/* a block, or a window of a larger block */
	bool appends;		/* offsets are given out in guest order */
	uint8_t *stored_prefix; /* the bytes before each stored block; NULL: none */
	uint8_t zero_leaf[IMGC_CHECKSUM_NBYTES]; /* of a whole block */

	struct worker *workers;
	struct counters *counters;
	struct salvage salvage;
	struct slot *slots;
	size_t n_workers, n_slots;	     /* of this batch */
	size_t n_workers_made, n_slots_made; /* those that have their memory */

	struct stop stop;
	struct imgc_file *open_end; /* the stream whose end is that of the disk, or NULL */
	_Atomic uint64_t first_difference;
	_Atomic bool *may_reflink; /* per source, until a reflink fails; NULL: no reflinks */
	bool may_move;		   /* the target is a pipe, which takes pages of sources */

	pthread_mutex_t lock; /* all below */
	pthread_cond_t called, changed, ended, told;
	bool locks_exist;
	struct imgc_batch batch;
	struct rows rows, base;
	bool has_unread;    /* some of the rows are to be reflinked whole */
	bool leaves_unread; /* these are stored without being read */
	bool moves;	    /* namely moved into a pipe, instead of reflinked */
	size_t claim_row, claim_base;
	uint64_t cursor;
	struct announcer announcer;
	bool announces; /* a worker has `announcer`, and the lock does not guard it */
	uint64_t claimed, placed, written; /* windows so far; slot = number % n_slots */
	size_t n_busy;			   /* slots that are not free, spans under way */
	unsigned n_writing, max_writers;
	unsigned n_waiting; /* workers that found nothing to do */
	/*
	 * The ring is filled again once half of it is free.  Where the target is slower
	 * than the sources, workers would otherwise wait and wake for each window.
	 */
	bool ring_was_full;
	unsigned n_threads; /* that exist: those of the first workers; they wait for batches */
	unsigned n_running;
	bool in_batch;
	bool in_caller; /* no thread was started: `wait` and `finish` do the work */
	bool has_found_end, reports_end, end_is_told; /* see open_end.c */
	uint64_t found_end;
	struct placer placer;
	struct imgc_error error;
};

/*
 * worker.c: works on the batch until it ends.  A worker without others beside it stops
 * after the first window that ends later than `until`, if that is not NULL, and when the
 * caller must be told that a stream has ended.
 */
void imgc_worker_work(struct worker *worker, const struct timespec *until);

/* worker.c: the main function of a worker's thread; `argument` is its struct worker. */
void *imgc_worker_main(void *argument);

/* The calling thread must come back to the window, which has to wait for something. */
#define IMGC_WINDOW_WAITS IMGC_READ_WAITS

/* window.c: waits until the job's rate allows so many bytes, or is IMGC_WINDOW_WAITS. */
int imgc_window_await_rate(const struct imgc_job *job, uint64_t nbytes, struct imgc_error *err);

/* window.c: the most bytes of a compressed block, without its prefix. */
uint64_t imgc_packed_room(const struct worker *worker);

/* window.c: reads one window and tests, compresses or compares it.  Writes nothing. */
int imgc_window_process(struct worker *worker, struct slot *slot, struct imgc_error *err);

/*
 * window.c: gives the slot's pieces host offsets, in guest order, under the lock.  Of a
 * comparison, it completes a granule that is larger than the window.
 */
int imgc_window_place(struct imgc_job *job, struct slot *slot, struct imgc_error *err);

/*
 * open_end.c: cuts a window that was read at the end of the disk, if that has been met.
 * Waits until the caller has told the size of the disk, or is IMGC_WINDOW_WAITS.
 */
int imgc_window_meet_end(struct imgc_job *job, struct slot *slot, struct imgc_error *err);

/* open_end.c: lets those go on that wait in a job that is to stop.  Under the lock. */
void imgc_open_end_stop(struct imgc_job *job);

/*
 * leaves.c: makes the leaves of the slot's blocks.  Blocks of zeros are dropped from the
 * slot's view, so that nothing tests their bytes again.
 */
int imgc_leaves_make(struct worker *worker, struct slot *slot, struct imgc_error *err);

/* leaves.c: the same for a guest range without data. */
int imgc_leaves_make_zeros(struct worker *worker, uint64_t start, uint64_t end,
			   struct imgc_error *err);

/* write.c: brings the slot's bytes to the target. */
int imgc_window_write(struct worker *worker, struct slot *slot, struct imgc_error *err);

/* write.c: makes a guest range without data zeros, if the geometry asks for it. */
int imgc_span_write_zeros(struct worker *worker, uint64_t start, uint64_t end,
			  struct imgc_error *err);

#endif /* IMGC_ENGINE_ENGINE_H */
