/*
 * Internals of the engine.
 *
 * A job owns a ring of slots and a set of workers.  A worker claims the next
 * window of the batch, fills a slot from the sources, tests for zeros and
 * compresses, all without a lock.  Whoever completes the window at the front of
 * the ring lets the placer give out host offsets to every window that is ready, in
 * guest order; writing them is again anybody's work.  So offsets do not depend on
 * the number of threads, and nobody waits for a slower neighbour.
 */
#ifndef IMGC_ENGINE_ENGINE_H
#define IMGC_ENGINE_ENGINE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <sys/uio.h>

#include "imgc.h"
#include "io/io.h"

#define WINDOW_NBYTES (512u * 1024)
#define MAX_WINDOW_NBYTES (256u * 1024 * 1024)
#define MAX_SOURCE_BLOCK_NBYTES (2u * 1024 * 1024)
#define MAX_THREADS 256u
#define MAX_ZERO_SPAN_NBYTES (128u * 1024 * 1024) /* keeps cancel prompt */
#define COMPRESSED_BUFFER_NBYTES (1024u * 1024)
#define MAX_COMPRESSED_GAP_NBYTES (64u * 1024)
#define MAX_READ_REQUESTS 64
#define MAX_SEGMENTS 64
#define GRAIN_MARKER_NBYTES 12u
#define MIN_REFLINK_NBYTES (64u * 1024) /* less is written as fast, and fragments less */
#define SECTOR_NBYTES 512u

/* The stored bytes of a compressed block never exceed this (VMDK: two grains; QCOW2: two clusters).
 */
static inline uint64_t max_compressed_nbytes(uint64_t block_nbytes)
{
	return 2 * block_nbytes + SECTOR_NBYTES;
}

/* ------------------------------------------------------------------ placer */

/* Gives out host offsets of an appending target; no I/O, no locks. */
struct placer {
	const struct imgc_geometry *geometry;
	uint64_t next;	      /* everything from here on is free */
	uint64_t packed_next; /* packing goes on here ... */
	uint64_t packed_end;  /* ... up to here; both 0: nothing to go on with */
	uint64_t open_block;  /* a block larger than a window that has its place */
	uint64_t open_offset;
	bool block_is_open;
	uint64_t group; /* group of the last placed block */
	bool group_is_open;
};

void imgc_placer_init(struct placer *placer, const struct imgc_geometry *geometry, uint64_t next);
int imgc_placer_stored(struct placer *placer, uint64_t block, uint64_t nbytes,
		       uint64_t *host_offset);
int imgc_placer_compressed(struct placer *placer, uint64_t block, uint64_t nbytes,
			   uint64_t *host_offset);
/* The batch ends at a group's end: leave room for its table. */
int imgc_placer_close_group(struct placer *placer);
void imgc_placer_restart(struct placer *placer, uint64_t next);

/* ------------------------------------------------------------------ source */

struct range {
	uint64_t start, end; /* relative to the window */
};

/* One side of a window: bytes, and which of them are data at all. */
struct view {
	uint8_t *data;
	struct range *ranges; /* ascending, disjoint, not adjacent */
	size_t n_ranges;
};

struct rows {
	const struct imgc_extent *rows;
	size_t n;
};

/* Guest ranges that could not be read; used by all workers. */
struct salvage {
	bool is_wanted, lock_exists;
	pthread_mutex_t lock;
	struct imgc_bad_range *ranges; /* ascending, neighbours joined */
	size_t n, capacity;
};

/* What a worker needs to read.  No other worker uses it, but for `job` and `salvage`. */
struct reader {
	const struct imgc_job *job;
	struct salvage *salvage; /* NULL: what cannot be read is an error */
	const struct imgc_source_file *files;
	struct imgc_io_context *io;
	struct imgc_decompressor *decompressor;
	uint8_t *compressed; /* bytes of several neighbouring blocks */
	uint64_t compressed_capacity;
	uint8_t *block; /* one decompressed block that is wanted in part */
	uint64_t bytes_read;
};

/* Reads every DATA and compressed byte of [start, end); gaps are left as they are. */
int imgc_reader_fill(struct reader *reader, struct rows rows, uint64_t start, uint64_t end,
		     struct view *view, struct imgc_error *err);

/* Makes [start, end) of the view real: what is no data becomes zeros. */
void imgc_view_materialise(const struct view *view, uint64_t start, uint64_t end);
/* Whether any data lies in [start, end). */
bool imgc_view_has_data(const struct view *view, uint64_t start, uint64_t end);

/* The row that holds guest_offset; rows.n if none. */
size_t imgc_rows_find(struct rows rows, uint64_t guest_offset);

/* imgc_file_read(), without a second try; `file` is an index, and stated in *err. */
int imgc_reader_read(struct reader *reader, uint32_t file, const struct imgc_io_request *requests,
		     size_t n, struct imgc_error *err);

/*
 * Reading and writing, repeated where that can help, unless the job is told to stop;
 * `err` is not NULL.
 */
int imgc_read_patiently(struct reader *reader, uint32_t file,
			const struct imgc_io_request *requests, size_t n, struct imgc_error *err);
int imgc_write_patiently(const struct imgc_job *job, const struct iovec *iov, int n_iov,
			 uint64_t offset, struct imgc_error *err);

int imgc_salvage_note(struct salvage *salvage, struct imgc_bad_range range, struct imgc_error *err);
/* Reads in small pieces; those that cannot be read become zeros and are noted. */
int imgc_salvage_read(struct reader *reader, uint32_t file, const struct imgc_io_request *request,
		      uint64_t guest_offset, struct imgc_error *err);
void imgc_salvage_destroy(struct salvage *salvage);

/* -------------------------------------------------------------------- ring */

enum slot_state { SLOT_FREE, SLOT_FILLING, SLOT_READY, SLOT_PLACED, SLOT_WRITING };

/* What is known of one block (or, if blocks are larger, of one window's piece of it). */
struct piece {
	uint64_t block;		  /* number of the block in the disk */
	uint32_t start, nbytes;	  /* in the window */
	uint32_t state;		  /* enum imgc_block_state */
	uint64_t packed_start;	  /* COMPRESSED: in `packed`, prefix first */
	uint32_t packed_nbytes;	  /* without the padding that follows */
	size_t first_run, n_runs; /* STORED: what of it is written */
	bool opens_block;	  /* STORED: the block's prefix is written with it */
	uint64_t host_offset;
};

struct slot {
	enum slot_state state;
	uint64_t start, end; /* guest range */
	int status;	     /* of filling it; `error` tells why */
	struct imgc_error error;
	struct view view;
	uint8_t *packed; /* compressed blocks, one behind the other */
	uint64_t packed_nbytes;
	struct piece *pieces;
	size_t n_pieces;
	struct range *runs; /* what is written as it is, relative to the window */
	size_t n_runs;
	uint64_t data_nbytes;
};

struct counters {
	_Alignas(64) _Atomic uint64_t done;
	_Atomic uint64_t data, zero, read, written, reflinked;
};

struct worker {
	struct imgc_job *job;
	pthread_t thread;
	struct reader reader;
	struct imgc_compressor *compressor;
	struct view other; /* the other side of a comparison, or the base */
	struct counters *counters;
};

struct imgc_job {
	struct imgc_job_options options;
	struct imgc_source_file *sources;
	struct imgc_geometry geometry;
	uint64_t window_nbytes;
	uint64_t piece_nbytes;	/* a block, or a window of a larger one */
	bool appends;		/* offsets are given out in guest order */
	uint8_t *stored_prefix; /* what stands before each stored block */

	struct worker *workers;
	struct counters *counters;
	struct salvage salvage;
	struct slot *slots;
	size_t n_slots;

	_Atomic bool cancelled, failed;
	_Atomic uint64_t first_difference;
	_Atomic bool *may_reflink; /* per source, until a reflink fails; NULL: no reflinks */

	pthread_mutex_t lock; /* all below */
	pthread_cond_t changed, ended;
	bool locks_exist;
	struct imgc_batch batch;
	struct rows rows, base;
	size_t claim_row, claim_base;
	uint64_t cursor;
	uint64_t claimed, placed, written; /* windows so far; slot = number % n_slots */
	size_t n_busy;			   /* slots that are not free, spans under way */
	unsigned n_writing, max_writers;
	unsigned n_started, n_running;
	bool in_batch;
	struct placer placer;
	struct imgc_error error;
};

void *imgc_worker_main(void *argument);

/* The first error wins and stops the others. */
void imgc_job_fail(struct imgc_job *job, const struct imgc_error *err);
bool imgc_job_is_stopped(const struct imgc_job *job);
/* IMGC_CANCELLED if the job is stopped: between blocks, and between reads that fail. */
int imgc_job_go_on(const struct imgc_job *job, struct imgc_error *err);

/* Fills and digests one window; writes nothing. */
int imgc_window_process(struct worker *worker, struct slot *slot, struct imgc_error *err);
/* Gives host offsets to the slot's pieces; called in guest order, under the lock. */
int imgc_window_place(struct imgc_job *job, struct slot *slot, struct imgc_error *err);
int imgc_window_write(struct worker *worker, struct slot *slot, struct imgc_error *err);
/* A range without any data: nothing is read. */
int imgc_span_write_zeros(struct worker *worker, uint64_t start, uint64_t end,
			  struct imgc_error *err);

#endif
