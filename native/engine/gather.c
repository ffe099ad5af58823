/*
 * gather.c - random access: many ranges in the order of their places, on several threads
 *
 * The ranges become pieces, each in one row.  As many as memory allows are sorted by
 * file and offset, and neighbours are joined into groups.  Each thread takes the next
 * group until none is left, or so much time has passed that the caller must see to
 * signals.
 */
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "common/checked.h"
#include "common/error.h"
#include "engine/disk.h"
#include "engine/retry.h"
#include "engine/source.h"

/* The most pieces of a round, and the first room for them. */
#define MAX_PIECES 16384u
#define FIRST_PIECES 64u

/* Longer rows are cut, so that several threads can read one. */
#define MAX_PIECE_NBYTES (512u * 1024)

/* A group: the bytes that one thread reads at a time, and the most requests. */
#define MAX_GROUP_NBYTES (512u * 1024)
#define MAX_GROUP_PIECES 64u
/* Of compressed pieces there are several for each thread, so that all end together. */
#define MIN_GROUPS 8u
#define MIN_GROUP_NBYTES (64u * 1024)
#define MAX_GAP_NBYTES (64u * 1024)

/* The cost of a byte that is copied is 1, of one that is decompressed, and of a piece: */
#define DECOMPRESSION_COST 8u
#define PIECE_COST 4096u
#define MAX_COST (64u * 1024 * 1024)

/* After this time a call returns, once the groups that were begun are read. */
#define MAX_CALL_NS (50u * 1000 * 1000)

/* So much work is worth a thread: to copy a mebibyte takes as long as to start one. */
#define THREAD_COST (2u * 1024 * 1024)

#define NO_FILE UINT32_MAX

struct piece {
	uint64_t place; /* in the file; of zeros, in the disk */
	uint32_t file;	/* NO_FILE: zeros */
	bool is_compressed;
	struct imgc_extent row;
	uint64_t start, end; /* in the disk */
	uint8_t *out;
};

struct imgc_gather {
	struct imgc_disk *disk;
	struct imgc_disk_request *requests; /* by offset */
	size_t n_requests, next;
	uint64_t next_done; /* of requests[next] */
	struct piece *pieces;
	size_t n_pieces, capacity;
	uint64_t cost;
	size_t *groups; /* the first piece of each, and n_pieces */
	size_t n_groups, groups_capacity;
	_Atomic size_t claimed, failed; /* groups; failed: the first that failed */
	uint64_t until_ns;		/* no more are claimed then */
	pthread_mutex_t lock;		/* `failed` with `status` and `error` */
	int status;
	struct imgc_error error;
};

/* ---------------------------------------------------------- create, destroy */

static int compare_requests(const void *a, const void *b)
{
	uint64_t x = ((const struct imgc_disk_request *)a)->offset;
	uint64_t y = ((const struct imgc_disk_request *)b)->offset;

	return (x > y) - (x < y);
}

int imgc_gather_create(struct imgc_disk *disk, const struct imgc_disk_request *requests, size_t n,
		       struct imgc_gather **out, struct imgc_error *err)
{
	for (size_t i = 0; i < n; i++)
		if (!imgc_range_inside(requests[i].offset, requests[i].length, disk->guest_nbytes))
			return imgc_fail_at(err, IMGC_OUT_OF_RANGE, requests[i].offset, "disk");
	struct imgc_gather *g = calloc(1, sizeof(*g));

	if (!g)
		return imgc_fail_call(err, IMGC_NO_MEMORY, "disk");
	g->disk = disk;
	g->n_requests = n;
	g->requests = malloc((n + 1) * sizeof(*g->requests));
	if (!g->requests || pthread_mutex_init(&g->lock, NULL)) {
		free(g->requests);
		free(g);
		return imgc_fail_call(err, IMGC_NO_MEMORY, "disk");
	}
	if (n > 0)
		memcpy(g->requests, requests, n * sizeof(*g->requests));
	qsort(g->requests, n, sizeof(*g->requests), compare_requests);
	*out = g;
	return IMGC_OK;
}

void imgc_gather_destroy(struct imgc_gather *g)
{
	if (!g)
		return;
	pthread_mutex_destroy(&g->lock);
	free(g->groups);
	free(g->pieces);
	free(g->requests);
	free(g);
}

/* ------------------------------------------------------------------ pieces */

static bool is_full(const struct imgc_gather *g)
{
	return g->n_pieces == MAX_PIECES || g->cost >= MAX_COST;
}

static int grow_pieces(struct imgc_gather *g, struct imgc_error *err)
{
	size_t capacity = g->capacity ? 2 * g->capacity : FIRST_PIECES;
	struct piece *pieces = realloc(g->pieces, capacity * sizeof(*pieces));

	if (!pieces)
		return imgc_fail_call(err, IMGC_NO_MEMORY, "disk");
	g->pieces = pieces;
	g->capacity = capacity;
	return IMGC_OK;
}

/* Adds [start, end) of a row, or as much of it as a piece may have; returns its end. */
static int add_piece(struct imgc_gather *g, const struct imgc_extent *row, uint64_t start,
		     uint64_t *end, uint8_t *out, struct imgc_error *err)
{
	int status = g->n_pieces == g->capacity ? grow_pieces(g, err) : IMGC_OK;

	if (status)
		return status;
	struct piece *piece = &g->pieces[g->n_pieces++];

	g->cost += PIECE_COST;
	*piece = (struct piece){.place = start, .file = NO_FILE, .row = *row, .start = start};
	if (row->kind > IMGC_DATA) {
		piece->file = row->file;
		piece->place = row->host_offset;
		piece->is_compressed = true;
		g->cost += (uint64_t)g->disk->sources[row->file].block_nbytes * DECOMPRESSION_COST;
	} else {
		*end = imgc_min_u64(*end, start + MAX_PIECE_NBYTES);
		g->cost += *end - start;
	}
	if (row->kind == IMGC_DATA) {
		piece->file = row->file;
		piece->place = row->host_offset + (start - row->guest_offset);
	}
	piece->end = *end;
	piece->out = out;
	return IMGC_OK;
}

/* Adds the pieces of the next request that the table has, until the round is full. */
static int add_from_table(struct imgc_gather *g, struct rows rows, struct imgc_error *err)
{
	struct imgc_disk_request *request = &g->requests[g->next];
	uint64_t at = request->offset + g->next_done, end = request->offset + request->length;

	for (size_t i = imgc_rows_find(rows, at); i < rows.n && at < end && !is_full(g);) {
		uint64_t row_end = rows.rows[i].guest_offset + rows.rows[i].length;
		uint64_t until = imgc_min_u64(row_end, end);
		int status = add_piece(g, &rows.rows[i], at, &until,
				       (uint8_t *)request->buffer + g->next_done, err);

		if (status)
			return status;
		g->next_done += until - at;
		at = until;
		i += at == row_end;
	}
	return IMGC_OK;
}

/* Makes requests pieces until the round is full, all are done, or a table is missing. */
static int add_pieces(struct imgc_gather *g, const struct imgc_table *given,
		      struct imgc_disk_rest *rest, struct imgc_error *err)
{
	struct cache *cache = &g->disk->cache;
	struct cache_entry *table = NULL;
	int status = IMGC_OK;

	while (!status && g->next < g->n_requests && !is_full(g)) {
		const struct imgc_disk_request *request = &g->requests[g->next];
		uint64_t at = request->offset + g->next_done;

		if (g->next_done == request->length) {
			g->next++;
			g->next_done = 0;
			continue;
		}
		if (table && !imgc_table_covers(table, at)) {
			imgc_cache_release(cache, table);
			table = NULL;
		}
		if (!table)
			table = imgc_disk_table(g->disk, given, at, &rest->generation);
		if (!table) {
			rest->offset = at;
			rest->length = request->length - g->next_done;
			return IMGC_MISSING;
		}
		status = add_from_table(g, imgc_table_rows(table), err);
	}
	if (table)
		imgc_cache_release(cache, table);
	return status;
}

/* ------------------------------------------------------------------ groups */

static int compare_pieces(const void *a, const void *b)
{
	const struct piece *x = a, *y = b;

	if (x->file != y->file)
		return (x->file > y->file) - (x->file < y->file);
	if (x->place != y->place)
		return (x->place > y->place) - (x->place < y->place);
	return (x->start > y->start) - (x->start < y->start);
}

/* Most often the pieces are in order already. */
static void sort_pieces(struct imgc_gather *g)
{
	for (size_t i = 1; i < g->n_pieces; i++) {
		if (compare_pieces(&g->pieces[i - 1], &g->pieces[i]) > 0) {
			qsort(g->pieces, g->n_pieces, sizeof(*g->pieces), compare_pieces);
			return;
		}
	}
}

/* The most bytes of a group of compressed pieces. */
static uint64_t compressed_group_nbytes(const struct imgc_gather *g)
{
	uint64_t nbytes = 0;

	for (size_t i = 0; i < g->n_pieces; i++)
		if (g->pieces[i].is_compressed)
			nbytes += g->pieces[i].end - g->pieces[i].start;
	nbytes = imgc_max_u64(nbytes / MIN_GROUPS, MIN_GROUP_NBYTES);
	return imgc_min_u64(nbytes, MAX_GROUP_NBYTES);
}

/*
 * Whether piece `i` belongs to the group of the pieces before it, of which `nbytes` are
 * in the group; parts of one block do.
 */
static bool continues_group(const struct imgc_gather *g, size_t first, size_t i, uint64_t nbytes,
			    uint64_t compressed_max)
{
	const struct piece *piece = &g->pieces[i], *before = &g->pieces[i - 1];
	uint64_t max = piece->is_compressed ? compressed_max : MAX_GROUP_NBYTES;

	if (piece->file != before->file || piece->is_compressed != before->is_compressed)
		return false;
	if (piece->is_compressed && piece->place == before->place)
		return true;
	return i - first < MAX_GROUP_PIECES && nbytes + piece->end - piece->start <= max;
}

static int make_groups(struct imgc_gather *g, struct imgc_error *err)
{
	if (g->groups_capacity < g->n_pieces + 1) {
		size_t *groups = realloc(g->groups, (g->n_pieces + 1) * sizeof(*groups));

		if (!groups)
			return imgc_fail_call(err, IMGC_NO_MEMORY, "disk");
		g->groups = groups;
		g->groups_capacity = g->n_pieces + 1;
	}
	uint64_t nbytes = 0, compressed_max = compressed_group_nbytes(g);

	sort_pieces(g);
	g->n_groups = 0;
	atomic_store(&g->claimed, 0);
	for (size_t i = 0; i < g->n_pieces; i++) {
		if (i == 0 ||
		    !continues_group(g, g->groups[g->n_groups - 1], i, nbytes, compressed_max)) {
			g->groups[g->n_groups++] = i;
			nbytes = 0;
		}
		nbytes += g->pieces[i].end - g->pieces[i].start;
	}
	g->groups[g->n_groups] = g->n_pieces;
	return IMGC_OK;
}

/* ----------------------------------------------------------------- reading */

static void fill_zeros(const struct piece *pieces, size_t n)
{
	for (size_t i = 0; i < n; i++)
		memset(pieces[i].out, 0, pieces[i].end - pieces[i].start);
}

/* Joins pieces that continue each other in the file and in memory. */
static size_t join_plain(const struct piece *pieces, size_t n, struct imgc_io_request *requests)
{
	size_t count = 0;

	for (size_t i = 0; i < n; i++) {
		const struct piece *piece = &pieces[i];
		struct imgc_io_request *last = count ? &requests[count - 1] : NULL;

		if (last && last->offset + last->length == piece->place &&
		    (uint8_t *)last->buffer + last->length == piece->out)
			last->length += piece->end - piece->start;
		else
			requests[count++] = (struct imgc_io_request){piece->place, piece->out,
								     piece->end - piece->start};
	}
	return count;
}

/* What is in memory is read first, so that the device has all the rest to do at once. */
static int read_plain(const struct imgc_gather *g, struct scratch *scratch,
		      const struct piece *pieces, size_t n, struct imgc_error *err)
{
	struct imgc_io_request requests[MAX_GROUP_PIECES];
	struct imgc_file *file = g->disk->sources[pieces[0].file].file;
	size_t count = join_plain(pieces, n, requests), n_left = 0;

	for (size_t i = 0; i < count; i++) {
		struct imgc_io_request left = requests[i];
		uint64_t done = imgc_file_read_now(file, left.offset, left.buffer, left.length);

		left.offset += done;
		left.buffer = (uint8_t *)left.buffer + done;
		left.length -= done;
		if (left.length > 0)
			requests[n_left++] = left;
	}
	for (size_t i = 0; n_left > 1 && !scratch->io && i < n_left; i++)
		imgc_file_will_need(file, requests[i].offset, requests[i].length);
	int status = imgc_read_retrying(file, scratch->io, requests, n_left, &g->disk->stop, err);

	return imgc_fail_in(err, status, pieces[0].file);
}

static bool is_whole(const struct imgc_gather *g, const struct piece *piece)
{
	return piece->end - piece->start == g->disk->sources[piece->file].block_nbytes;
}

/* Counts the whole blocks from the first on whose stored bytes are read together. */
static size_t count_neighbours(const struct imgc_gather *g, const struct piece *pieces, size_t n)
{
	uint64_t end = pieces[0].place + pieces[0].row.host_length;
	size_t count = 1;

	for (; count < n && is_whole(g, &pieces[count]); count++) {
		const struct piece *piece = &pieces[count];

		if (piece->place > end && piece->place - end > MAX_GAP_NBYTES)
			break;
		end = imgc_max_u64(end, piece->place + piece->row.host_length);
		if (end - pieces[0].place > g->disk->stored_nbytes)
			break;
	}
	return count;
}

/* Whole blocks are decompressed to their place, and not kept. */
static int read_whole_blocks(const struct imgc_gather *g, struct scratch *scratch,
			     const struct piece *pieces, size_t n, struct imgc_error *err)
{
	int status =
		imgc_disk_read_stored(g->disk, scratch, &pieces[0].row, &pieces[n - 1].row, err);

	for (size_t i = 0; i < n && !status; i++)
		status = imgc_disk_load(g->disk, scratch, &pieces[i].row, pieces[i].out, err);
	return status;
}

static int read_compressed(const struct imgc_gather *g, struct scratch *scratch,
			   const struct piece *pieces, size_t n, struct imgc_error *err)
{
	int status = IMGC_OK;

	for (size_t i = 0, count; i < n && !status; i += count) {
		const struct piece *piece = &pieces[i];

		count = 1;
		if (!is_whole(g, piece)) {
			status = imgc_disk_read_block(g->disk, &piece->row, piece->start,
						      piece->end, piece->out, 0, err);
		} else if (!imgc_disk_copy_cached(g->disk, &piece->row, piece->start, piece->end,
						  piece->out)) {
			count = count_neighbours(g, piece, n - i);
			status = read_whole_blocks(g, scratch, piece, count, err);
		}
	}
	return status;
}

static int read_group(const struct imgc_gather *g, struct scratch *scratch, size_t group,
		      struct imgc_error *err)
{
	const struct piece *pieces = &g->pieces[g->groups[group]];
	size_t n = g->groups[group + 1] - g->groups[group];

	if (pieces[0].is_compressed)
		return read_compressed(g, scratch, pieces, n, err);
	if (pieces[0].file != NO_FILE)
		return read_plain(g, scratch, pieces, n, err);
	fill_zeros(pieces, n);
	return IMGC_OK;
}

/* ----------------------------------------------------------------- threads */

/* All groups before the first that fails are read, so the error is always the same. */
static void fail_group(struct imgc_gather *g, size_t group, int status,
		       const struct imgc_error *error)
{
	pthread_mutex_lock(&g->lock);
	if (group < atomic_load(&g->failed)) {
		atomic_store(&g->failed, group);
		g->status = status;
		g->error = *error;
	}
	pthread_mutex_unlock(&g->lock);
}

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

static void read_groups(struct imgc_gather *g, struct scratch *scratch)
{
	do {
		size_t group = atomic_fetch_add(&g->claimed, 1);
		struct imgc_error error = {0};

		if (group >= g->n_groups || group > atomic_load(&g->failed))
			return;
		int status = read_group(g, scratch, group, &error);

		if (status)
			fail_group(g, group, status, &error);
	} while (now_ns() < g->until_ns);
}

/* A helper that does not get its means leaves the work to the others. */
static void *help(void *argument)
{
	struct imgc_gather *g = argument;
	struct scratch *scratch;

	if (imgc_scratch_take(g->disk, &scratch, NULL) == IMGC_OK) {
		read_groups(g, scratch);
		imgc_scratch_give(g->disk, scratch);
	}
	return NULL;
}

/* Reads what is left of the groups. */
static int read_some(struct imgc_gather *g, unsigned n_threads, struct imgc_error *err)
{
	pthread_t helpers[IMGC_MAX_THREADS];
	struct scratch *scratch;
	uint64_t n_left = g->n_groups - atomic_load(&g->claimed);
	uint64_t n_useful = imgc_min_u64(1 + g->cost / THREAD_COST, n_left);
	unsigned n_wanted = (unsigned)imgc_min_u64(n_useful, n_threads), n_helpers = 0;
	int status = imgc_scratch_take(g->disk, &scratch, err);

	if (status)
		return status;
	g->status = IMGC_OK;
	g->until_ns = now_ns() + MAX_CALL_NS;
	atomic_store(&g->failed, SIZE_MAX);
	while (n_helpers + 1 < n_wanted && !pthread_create(&helpers[n_helpers], NULL, help, g))
		n_helpers++;
	read_groups(g, scratch);
	while (n_helpers > 0)
		pthread_join(helpers[--n_helpers], NULL);
	imgc_scratch_give(g->disk, scratch);
	if (g->status && err)
		*err = g->error;
	return g->status;
}

int imgc_gather_is_between_rounds(const struct imgc_gather *g)
{
	return g->n_pieces == 0;
}

int imgc_gather_run(struct imgc_gather *g, const struct imgc_table *given, unsigned n_threads,
		    struct imgc_disk_rest *rest, struct imgc_error *err)
{
	if (n_threads == 0 || n_threads > IMGC_MAX_THREADS)
		return imgc_fail_call(err, IMGC_INVALID_ARGUMENT, "disk");
	if (atomic_load(&g->claimed) >= g->n_groups) {
		int status = add_pieces(g, given, rest, err);

		if (!status)
			status = make_groups(g, err);
		if (status)
			return status;
	}
	int status = read_some(g, n_threads, err);

	if (status)
		return status;
	if (atomic_load(&g->claimed) < g->n_groups)
		return IMGC_UNFINISHED;
	g->n_pieces = 0;
	g->cost = 0;
	return g->next < g->n_requests ? IMGC_UNFINISHED : IMGC_OK;
}
