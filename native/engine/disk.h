/*
 * disk.h - the inside of a disk that is open for random access
 *
 *     gather.c   many ranges in the order of their places, on several threads
 *     in_place.c one range that is written where it is
 *     disk.c     one range, on the calling thread
 *     ahead.c    reads that follow a pattern
 *     cache.c    tables and decompressed blocks in memory
 *     gate.c     what can be shut while nobody is inside
 *
 * Each calls only files below it.
 */
#ifndef IMGC_ENGINE_DISK_H
#define IMGC_ENGINE_DISK_H

#include <pthread.h>
#include <stdatomic.h>

#include "engine/ahead.h"
#include "engine/cache.h"
#include "engine/extents.h"
#include "engine/gate.h"
#include "engine/stop.h"
#include "io/io.h"

/* What one thread needs to read; kept for the next one. */
struct scratch {
	struct scratch *next;
	struct imgc_decompressor *decompressor;
	struct imgc_io_context *io;
	uint8_t *stored;    /* of disk->stored_nbytes: compressed bytes, */
	uint64_t base, end; /* and their place in the file */
};

struct imgc_disk {
	struct imgc_source_file *sources;
	size_t n_sources;
	uint64_t guest_nbytes, span_nbytes;
	uint32_t inflate_variant, io_variant;
	uint64_t stored_nbytes; /* room for any compressed block */
	struct stop stop;	/* never set */
	struct cache cache;
	struct ahead ahead;
	struct gate writes;
	pthread_mutex_t scratch_lock; /* all below */
	struct scratch *scratches;
	unsigned n_scratches;
};

/* IMGC_NO_MEMORY, or IMGC_UNSUPPORTED if the kernel refuses a ring. */
int imgc_scratch_take(struct imgc_disk *disk, struct scratch **out, struct imgc_error *err);
void imgc_scratch_give(struct imgc_disk *disk, struct scratch *scratch);

static inline struct rows imgc_table_rows(const struct cache_entry *table)
{
	return (struct rows){imgc_cache_data(table), table->nbytes / sizeof(struct imgc_extent)};
}

static inline bool imgc_table_covers(const struct cache_entry *table, uint64_t guest_offset)
{
	struct rows rows = imgc_table_rows(table);

	return guest_offset >= rows.rows[0].guest_offset &&
	       imgc_rows_find(rows, guest_offset) < rows.n;
}

/*
 * The table that has guest_offset, for use until released: `given`, if it is that one,
 * or one that is kept.  NULL if there is none; *generation is set then.
 */
struct cache_entry *imgc_disk_table(struct imgc_disk *disk, const struct imgc_table *given,
				    uint64_t guest_offset, uint64_t *generation);

/*
 * Reads [start, end) of the disk, part of a compressed row, from the cache, which
 * gets the block if it does not have it.  With IMGC_DISK_NO_WAIT, IMGC_WOULD_WAIT then.
 */
int imgc_disk_read_block(struct imgc_disk *disk, const struct imgc_extent *row, uint64_t start,
			 uint64_t end, uint8_t *out, unsigned flags, struct imgc_error *err);

/* Copies [start, end) of a compressed row, if the cache has its block. */
bool imgc_disk_copy_cached(struct imgc_disk *disk, const struct imgc_extent *row, uint64_t start,
			   uint64_t end, uint8_t *out);

/*
 * Reads what is stored for neighbouring compressed rows, for imgc_disk_load().  From
 * the start of the first to the end of the last they fit disk->stored_nbytes.
 */
int imgc_disk_read_stored(struct imgc_disk *disk, struct scratch *scratch,
			  const struct imgc_extent *first, const struct imgc_extent *last,
			  struct imgc_error *err);

/* Decompresses the whole block of one of these rows; in the order of their places. */
int imgc_disk_load(struct imgc_disk *disk, struct scratch *scratch, const struct imgc_extent *row,
		   uint8_t *out, struct imgc_error *err);

#endif /* IMGC_ENGINE_DISK_H */
