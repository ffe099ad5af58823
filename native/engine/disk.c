/*
 * disk.c - random access: one range of a disk, on the calling thread
 */
#include "engine/disk.h"

#include <stdlib.h>
#include <string.h>

#include "common/checked.h"
#include "common/error.h"
#include "engine/retry.h"
#include "engine/source.h"

/* The least room for compressed bytes: neighbouring blocks are read together. */
#define MIN_STORED_NBYTES (256u * 1024)

/* More threads than this at once make and drop the means that they need. */
#define MAX_IDLE_SCRATCHES 8

/* It takes longer to look for so many tables than to read some of them again. */
#define MANY_SPANS 4096u

/* A file that no source has, in the keys of tables. */
#define FILE_OF_TABLES UINT32_MAX

/* ---------------------------------------------------------- create, destroy */

/* The most bytes of a compressed block of any source, and no less than the minimum. */
static uint64_t stored_room(const struct imgc_source_file *sources, size_t n)
{
	uint64_t nbytes = MIN_STORED_NBYTES;

	for (size_t i = 0; i < n; i++)
		nbytes = imgc_max_u64(nbytes, max_compressed_nbytes(sources[i].block_nbytes));
	return nbytes;
}

static bool options_are_valid(const struct imgc_disk_options *o)
{
	for (size_t i = 0; i < o->n_sources; i++)
		if (!o->sources[i].file || o->sources[i].block_nbytes > MAX_SOURCE_BLOCK_NBYTES)
			return false;
	/* So the end of the last span has no overflow. */
	return imgc_is_power_of_two(o->span_nbytes) && o->span_nbytes >= SECTOR_NBYTES &&
	       o->guest_nbytes <= INT64_MAX && o->n_sources < FILE_OF_TABLES;
}

int imgc_disk_create(const struct imgc_disk_options *options, struct imgc_disk **out,
		     struct imgc_error *err)
{
	if (!options_are_valid(options))
		return imgc_fail_call(err, IMGC_INVALID_ARGUMENT, "disk");
	struct imgc_disk *disk = calloc(1, sizeof(*disk));

	if (!disk)
		return imgc_fail_call(err, IMGC_NO_MEMORY, "disk");
	disk->n_sources = options->n_sources;
	disk->guest_nbytes = options->guest_nbytes;
	disk->span_nbytes = options->span_nbytes;
	disk->inflate_variant = options->inflate_variant;
	disk->io_variant = options->io_variant;
	disk->stored_nbytes = stored_room(options->sources, options->n_sources);
	disk->sources = calloc(options->n_sources + 1, sizeof(*disk->sources));
	if (!disk->sources || pthread_mutex_init(&disk->scratch_lock, NULL))
		goto no_sources;
	if (options->n_sources > 0)
		memcpy(disk->sources, options->sources,
		       options->n_sources * sizeof(*disk->sources));
	if (imgc_gate_create(&disk->writes))
		goto no_gate;
	if (imgc_cache_create(&disk->cache, options->cache_nbytes))
		goto no_cache;
	imgc_ahead_init(&disk->ahead);
	*out = disk;
	return IMGC_OK;
no_cache:
	imgc_gate_destroy(&disk->writes);
no_gate:
	pthread_mutex_destroy(&disk->scratch_lock);
no_sources:
	free(disk->sources);
	free(disk);
	return imgc_fail_call(err, IMGC_NO_MEMORY, "disk");
}

static void scratch_destroy(struct scratch *scratch)
{
	imgc_decompressor_destroy(scratch->decompressor);
	imgc_io_context_destroy(scratch->io);
	free(scratch->stored);
	free(scratch);
}

void imgc_disk_destroy(struct imgc_disk *disk)
{
	if (!disk)
		return;
	while (disk->scratches) {
		struct scratch *scratch = disk->scratches;

		disk->scratches = scratch->next;
		scratch_destroy(scratch);
	}
	imgc_cache_destroy(&disk->cache);
	imgc_gate_destroy(&disk->writes);
	pthread_mutex_destroy(&disk->scratch_lock);
	free(disk->sources);
	free(disk);
}

/* ----------------------------------------------------------------- scratch */

int imgc_scratch_take(struct imgc_disk *disk, struct scratch **out, struct imgc_error *err)
{
	pthread_mutex_lock(&disk->scratch_lock);
	struct scratch *scratch = disk->scratches;

	if (scratch) {
		disk->scratches = scratch->next;
		disk->n_scratches--;
	}
	pthread_mutex_unlock(&disk->scratch_lock);
	if (!scratch) {
		scratch = calloc(1, sizeof(*scratch));
		if (!scratch)
			return imgc_fail_call(err, IMGC_NO_MEMORY, "disk");
		scratch->stored = malloc(disk->stored_nbytes);
		int status = scratch->stored ? IMGC_OK : IMGC_NO_MEMORY;

		if (!status)
			status = imgc_decompressor_create(disk->inflate_variant,
							  &scratch->decompressor);
		if (!status)
			status = imgc_io_context_create(disk->io_variant, false, &scratch->io);
		if (status) {
			scratch_destroy(scratch);
			return imgc_fail_call(err, status, "disk");
		}
	}
	*out = scratch;
	return IMGC_OK;
}

void imgc_scratch_give(struct imgc_disk *disk, struct scratch *scratch)
{
	pthread_mutex_lock(&disk->scratch_lock);
	bool keep = disk->n_scratches < MAX_IDLE_SCRATCHES;

	if (keep) {
		scratch->next = disk->scratches;
		disk->scratches = scratch;
		disk->n_scratches++;
	}
	pthread_mutex_unlock(&disk->scratch_lock);
	if (!keep)
		scratch_destroy(scratch);
}

/* ------------------------------------------------------------------ tables */

void imgc_disk_span(const struct imgc_disk *disk, uint64_t offset, uint64_t *start, uint64_t *end)
{
	*start = imgc_align_down(offset, disk->span_nbytes);
	*end = *start + imgc_min_u64(disk->span_nbytes, disk->guest_nbytes - *start);
}

static struct cache_key table_key(const struct imgc_disk *disk, uint64_t offset)
{
	return (struct cache_key){.offset = imgc_align_down(offset, disk->span_nbytes),
				  .file = FILE_OF_TABLES};
}

struct cache_entry *imgc_disk_table(struct imgc_disk *disk, const struct imgc_table *given,
				    uint64_t guest_offset, uint64_t *generation)
{
	struct cache_entry *table = (struct cache_entry *)(uintptr_t)given;
	struct cache_key key = table_key(disk, guest_offset);

	if (!table || !imgc_table_covers(table, guest_offset))
		return imgc_cache_find(&disk->cache, &key, generation);
	imgc_cache_hold(table);
	return table;
}

struct imgc_table *imgc_disk_find(struct imgc_disk *disk, uint64_t offset, uint64_t *generation)
{
	return (struct imgc_table *)imgc_disk_table(disk, NULL, offset, generation);
}

void imgc_disk_drop(struct imgc_disk *disk, struct imgc_table *table)
{
	imgc_cache_release(&disk->cache, (struct cache_entry *)table);
}

int imgc_disk_add(struct imgc_disk *disk, uint64_t start, uint64_t end, uint64_t generation,
		  const struct imgc_extent *rows, size_t n, struct imgc_table **out,
		  struct imgc_error *err)
{
	uint64_t span_start, span_end;

	if (start >= end || end > disk->guest_nbytes)
		return imgc_fail_at(err, IMGC_OUT_OF_RANGE, start, "disk");
	int status = imgc_extents_check(rows, n, disk->sources, disk->n_sources, start, end, err);

	if (status)
		return status;
	struct cache_key key = table_key(disk, start);
	struct cache_entry *table = imgc_cache_new(&disk->cache, n * sizeof(*rows));

	if (!table)
		return imgc_fail_call(err, IMGC_NO_MEMORY, "disk");
	memcpy(imgc_cache_data(table), rows, n * sizeof(*rows));
	imgc_disk_span(disk, start, &span_start, &span_end);
	if (start == span_start && end == span_end)
		table = imgc_cache_add(&disk->cache, &key, generation, table);
	*out = (struct imgc_table *)table;
	return IMGC_OK;
}

void imgc_disk_forget(struct imgc_disk *disk, uint64_t start, uint64_t end)
{
	uint64_t first = imgc_align_down(start, disk->span_nbytes);

	end = imgc_min_u64(end, disk->guest_nbytes);
	if (start >= end)
		return;
	bool is_all = start == 0 && end == disk->guest_nbytes;

	if (is_all || (end - first) / disk->span_nbytes >= MANY_SPANS) {
		imgc_cache_forget(&disk->cache);
		return;
	}
	for (uint64_t at = first; at < end; at += disk->span_nbytes) {
		struct cache_key key = table_key(disk, at);

		imgc_cache_forget_one(&disk->cache, &key);
	}
}

void imgc_disk_stats(struct imgc_disk *disk, struct imgc_cache_stats *out)
{
	struct cache *cache = &disk->cache;

	pthread_mutex_lock(&cache->lock);
	*out = (struct imgc_cache_stats){cache->n_entries, atomic_load(&cache->nbytes),
					 cache->n_hits, cache->n_misses};
	pthread_mutex_unlock(&cache->lock);
}

/* ------------------------------------------------------- compressed blocks */

/* What a block's content depends on: the grain marker names its place in the disk. */
static struct cache_key block_key(const struct imgc_disk *disk, const struct imgc_extent *row)
{
	bool is_marked = row->flags & IMGC_EXTENT_GRAIN_MARKER;
	uint64_t start = is_marked ? imgc_row_block(row, &disk->sources[row->file]) : 0;

	return (struct cache_key){row->host_offset, row->host_length, start,
				  row->file,	    row->kind,	      row->flags};
}

/* What scratch->stored has of a file: [base, end). */
static int read_stored_until(struct imgc_disk *disk, struct scratch *scratch, uint32_t file,
			     uint64_t until, struct imgc_error *err)
{
	struct imgc_io_request request = {scratch->end,
					  scratch->stored + (scratch->end - scratch->base),
					  until - scratch->end};

	if (until <= scratch->end)
		return IMGC_OK;
	int status = imgc_read_retrying(disk->sources[file].file, scratch->io, &request, 1,
					&disk->stop, err);

	if (status)
		return imgc_fail_in(err, status, file);
	scratch->end = until;
	return IMGC_OK;
}

/*
 * Where the stored bytes of a row end, as far as is known before they are read.  Behind
 * a grain marker the row's length is far from exact, and half a block often suffices.
 */
static uint64_t likely_end(const struct imgc_disk *disk, const struct imgc_extent *row)
{
	uint64_t nbytes = row->host_length;

	if (row->flags & IMGC_EXTENT_GRAIN_MARKER)
		nbytes = imgc_min_u64(nbytes, GRAIN_MARKER_NBYTES +
						      disk->sources[row->file].block_nbytes / 2);
	return row->host_offset + nbytes;
}

int imgc_disk_read_stored(struct imgc_disk *disk, struct scratch *scratch,
			  const struct imgc_extent *first, const struct imgc_extent *last,
			  struct imgc_error *err)
{
	scratch->base = scratch->end = first->host_offset;
	return read_stored_until(disk, scratch, first->file, likely_end(disk, last), err);
}

int imgc_disk_load(struct imgc_disk *disk, struct scratch *scratch, const struct imgc_extent *row,
		   uint8_t *out, struct imgc_error *err)
{
	const struct imgc_source_file *file = &disk->sources[row->file];
	const uint8_t *start = scratch->stored + (row->host_offset - scratch->base), *in = start;
	uint64_t nbytes = row->host_length;
	int status = read_stored_until(disk, scratch, row->file, likely_end(disk, row), err);

	if (!status)
		status = imgc_row_skip_marker(row, file, &in, &nbytes, err);
	if (!status)
		status = read_stored_until(disk, scratch, row->file,
					   row->host_offset + (uint64_t)(in - start) + nbytes, err);
	if (status)
		return status;
	status = imgc_decompress(scratch->decompressor, imgc_row_codec(row), in, nbytes, out,
				 file->block_nbytes, NULL);
	return status ? imgc_fail(err, status, 0, row->host_offset, row->file, "decompress")
		      : IMGC_OK;
}

/* Puts the row's block into the cache, for use until released. */
static int cache_block(struct imgc_disk *disk, const struct imgc_extent *row,
		       const struct cache_key *key, uint64_t generation, struct cache_entry **out,
		       struct imgc_error *err)
{
	struct scratch *scratch;
	int status = imgc_scratch_take(disk, &scratch, err);

	if (status)
		return status;
	struct cache_entry *block =
		imgc_cache_new(&disk->cache, disk->sources[row->file].block_nbytes);

	status = block ? imgc_disk_read_stored(disk, scratch, row, row, err)
		       : imgc_fail_call(err, IMGC_NO_MEMORY, "disk");
	if (!status)
		status = imgc_disk_load(disk, scratch, row, imgc_cache_data(block), err);
	imgc_scratch_give(disk, scratch);
	if (!status)
		*out = imgc_cache_add(&disk->cache, key, generation, block);
	else if (block)
		imgc_cache_release(&disk->cache, block);
	return status;
}

static void copy_from(struct imgc_disk *disk, struct cache_entry *block,
		      const struct imgc_extent *row, uint64_t start, uint64_t end, uint8_t *out)
{
	uint64_t block_start = imgc_row_block(row, &disk->sources[row->file]);

	memcpy(out, (const uint8_t *)imgc_cache_data(block) + (start - block_start), end - start);
	imgc_cache_release(&disk->cache, block);
}

bool imgc_disk_copy_cached(struct imgc_disk *disk, const struct imgc_extent *row, uint64_t start,
			   uint64_t end, uint8_t *out)
{
	struct cache_key key = block_key(disk, row);
	uint64_t generation;
	struct cache_entry *block = imgc_cache_find(&disk->cache, &key, &generation);

	if (block)
		copy_from(disk, block, row, start, end, out);
	return block;
}

int imgc_disk_read_block(struct imgc_disk *disk, const struct imgc_extent *row, uint64_t start,
			 uint64_t end, uint8_t *out, unsigned flags, struct imgc_error *err)
{
	struct cache_key key = block_key(disk, row);
	uint64_t generation;
	struct cache_entry *block = imgc_cache_find(&disk->cache, &key, &generation);

	if (!block) {
		if (flags & IMGC_DISK_NO_WAIT)
			return IMGC_WOULD_WAIT;
		int status = cache_block(disk, row, &key, generation, &block, err);

		if (status)
			return status;
	}
	copy_from(disk, block, row, start, end, out);
	return IMGC_OK;
}

/* -------------------------------------------------------------- read ahead */

/* The system may start to fetch what the rows have of [start, end). */
static void will_need(struct imgc_disk *disk, struct rows rows, uint64_t start, uint64_t end)
{
	for (size_t i = imgc_rows_find(rows, start); i < rows.n; i++) {
		const struct imgc_extent *row = &rows.rows[i];
		uint64_t from = imgc_max_u64(row->guest_offset, start);
		uint64_t to = imgc_min_u64(row->guest_offset + row->length, end);

		if (row->guest_offset >= end)
			return;
		if (row->kind == IMGC_DATA)
			imgc_file_will_need(disk->sources[row->file].file,
					    row->host_offset + (from - row->guest_offset),
					    to - from);
		else if (row->kind > IMGC_DATA)
			imgc_file_will_need(disk->sources[row->file].file, row->host_offset,
					    row->host_length);
	}
}

/* will_need(), as far as tables are kept: a guess is not worth a miss.  False: no further. */
static bool range_will_be_needed(struct imgc_disk *disk, uint64_t start, uint64_t end)
{
	while (start < end) {
		uint64_t generation, span_start, span_end;
		struct cache_entry *table = imgc_disk_table(disk, NULL, start, &generation);

		if (!table)
			return false;
		will_need(disk, imgc_table_rows(table), start, end);
		imgc_cache_release(&disk->cache, table);
		imgc_disk_span(disk, start, &span_start, &span_end);
		start = span_end;
	}
	return true;
}

static void fetch_ahead(struct imgc_disk *disk, uint64_t offset, uint64_t length)
{
	uint64_t disk_end = disk->guest_nbytes;
	struct ahead_reads reads;

	if (!imgc_ahead_next(&disk->ahead, offset, length, &reads))
		return;
	if (reads.stride == reads.length)
		reads = (struct ahead_reads){reads.first, 0, reads.n * reads.length, 1};
	for (uint64_t at = reads.first; reads.n > 0 && at < disk_end; reads.n--) {
		uint64_t end = at + imgc_min_u64(reads.length, disk_end - at);

		if (!range_will_be_needed(disk, at, end))
			return;
		at += reads.stride;
	}
}

/* -------------------------------------------------------------------- read */

static int read_plain(struct imgc_disk *disk, const struct imgc_extent *row, uint64_t start,
		      uint64_t end, uint8_t *out, unsigned flags, struct imgc_error *err)
{
	struct imgc_file *file = disk->sources[row->file].file;
	uint64_t offset = row->host_offset + (start - row->guest_offset);

	if (flags & IMGC_DISK_NO_WAIT)
		return imgc_file_read_now(file, offset, out, end - start) == end - start
			       ? IMGC_OK
			       : IMGC_WOULD_WAIT;
	struct imgc_io_request request = {offset, out, end - start};
	int status = imgc_read_retrying(file, NULL, &request, 1, &disk->stop, err);

	return imgc_fail_in(err, status, row->file);
}

static int read_row(struct imgc_disk *disk, const struct imgc_extent *row, uint64_t start,
		    uint64_t end, uint8_t *out, unsigned flags, struct imgc_error *err)
{
	if (row->kind == IMGC_DATA)
		return read_plain(disk, row, start, end, out, flags, err);
	if (row->kind > IMGC_DATA)
		return imgc_disk_read_block(disk, row, start, end, out, flags, err);
	memset(out, 0, end - start);
	return IMGC_OK;
}

/* Reads what the table has of [start, end), and adds the number of bytes to *done. */
static int read_rows(struct imgc_disk *disk, struct rows rows, uint64_t start, uint64_t end,
		     uint8_t *out, unsigned flags, uint64_t *done, struct imgc_error *err)
{
	uint64_t at = start;

	for (size_t i = imgc_rows_find(rows, start); i < rows.n && at < end; i++) {
		const struct imgc_extent *row = &rows.rows[i];
		uint64_t until = imgc_min_u64(row->guest_offset + row->length, end);
		int status = read_row(disk, row, at, until, out + (at - start), flags, err);

		if (status)
			return status;
		*done += until - at;
		at = until;
	}
	return IMGC_OK;
}

int imgc_disk_read(struct imgc_disk *disk, const struct imgc_table *given, uint64_t offset,
		   void *buffer, uint64_t length, unsigned flags, struct imgc_disk_rest *rest,
		   struct imgc_error *err)
{
	uint64_t done = 0;
	int status = IMGC_OK;

	if (!imgc_range_inside(offset, length, disk->guest_nbytes))
		return imgc_fail_at(err, IMGC_OUT_OF_RANGE, offset, "disk");
	if (!(flags & IMGC_DISK_GOES_ON))
		imgc_ahead_note(&disk->ahead, offset);
	if (flags & IMGC_DISK_NO_WAIT && imgc_ahead_is_due(&disk->ahead, offset, length))
		status = IMGC_WOULD_WAIT;
	else if (!(flags & IMGC_DISK_NO_WAIT))
		fetch_ahead(disk, offset, length);
	while (!status && done < length) {
		struct cache_entry *table =
			imgc_disk_table(disk, given, offset + done, &rest->generation);

		if (!table) {
			status = IMGC_MISSING;
			break;
		}
		status = read_rows(disk, imgc_table_rows(table), offset + done, offset + length,
				   (uint8_t *)buffer + done, flags, &done, err);
		imgc_cache_release(&disk->cache, table);
	}
	rest->offset = offset + done;
	rest->length = length - done;
	return status;
}
