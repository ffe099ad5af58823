/*
 * test_in_place.c - writing where bytes are: what is refused, and many threads
 */
#include <pthread.h>
#include <stdatomic.h>
#include <time.h>
#include <unistd.h>

#include "io/io.h"
#include "tests/engine_util.h"

#define SPAN (64u * KIB)
#define DISK_NBYTES (256u * KIB)

static struct imgc_disk *open_disk(struct imgc_file *file, uint64_t file_nbytes,
				   uint64_t guest_nbytes, uint64_t span_nbytes)
{
	struct imgc_source_file source = {.file = file, .nbytes = file_nbytes};
	struct imgc_disk_options options = {.sources = &source,
					    .n_sources = 1,
					    .guest_nbytes = guest_nbytes,
					    .span_nbytes = span_nbytes,
					    .cache_nbytes = MIB};
	struct imgc_disk *disk = NULL;
	struct imgc_error err = {0};

	CHECK_EQ(imgc_disk_create(&options, &disk, &err), IMGC_OK);
	return disk;
}

static int add_rows(struct imgc_disk *disk, const struct imgc_extent *rows, size_t n,
		    const struct imgc_disk_rest *rest)
{
	struct imgc_table *table = NULL;
	struct imgc_error err = {0};
	uint64_t start, end;

	imgc_disk_span(disk, rest->offset, &start, &end);
	int status = imgc_disk_add(disk, start, end, rest->generation, rows, n, &table, &err);

	if (!status)
		imgc_disk_drop(disk, table);
	return status;
}

static struct imgc_extent row_of(unsigned kind, uint64_t start, uint64_t length, uint64_t place)
{
	bool has_place = kind >= IMGC_DATA;

	return (struct imgc_extent){.guest_offset = start,
				    .length = length,
				    .host_offset = has_place ? place : 0,
				    .host_length = has_place ? length : 0,
				    .kind = (uint16_t)kind};
}

static void test_rows(void)
{
	uint8_t file_bytes[DISK_NBYTES], bytes[DISK_NBYTES];
	struct imgc_file *file = NULL;
	struct imgc_disk_rest rest = {0};
	struct imgc_error err = {0};

	memset(file_bytes, 0, sizeof(file_bytes));
	for (size_t i = 0; i < sizeof(bytes); i++)
		bytes[i] = (uint8_t)(1 + i % 251);
	CHECK_EQ(imgc_file_open_memory(file_bytes, sizeof(file_bytes), &file), IMGC_OK);
	struct imgc_disk *disk = open_disk(file, sizeof(file_bytes), DISK_NBYTES, SPAN);
	/* In the first span 4 KiB are somewhere else, and 8 KiB have no place. */
	struct imgc_extent first[] = {
		row_of(IMGC_DATA, 0, 4 * KIB, 100 * KIB),
		row_of(IMGC_DATA, 4 * KIB, 44 * KIB, 8 * KIB),
		row_of(IMGC_HOLE, 48 * KIB, 4 * KIB, 0),
		row_of(IMGC_ZERO, 52 * KIB, 4 * KIB, 0),
		row_of(IMGC_DATA, 56 * KIB, 8 * KIB, 150 * KIB),
	};
	struct imgc_extent second = row_of(IMGC_DATA, SPAN, SPAN, 160 * KIB);

	CHECK_EQ(imgc_disk_write(disk, 1000, bytes, 6 * KIB, &rest, &err), IMGC_MISSING);
	CHECK(rest.offset == 1000 && rest.length == 6 * KIB);
	CHECK_EQ(add_rows(disk, first, 5, &rest), IMGC_OK);
	CHECK_EQ(imgc_file_take_written(file), 0);
	CHECK_EQ(imgc_disk_write(disk, 1000, bytes, 6 * KIB, &rest, &err), IMGC_OK);
	CHECK_EQ(rest.length, 0);
	CHECK_EQ(imgc_file_take_written(file), 1);
	CHECK_EQ(imgc_file_take_written(file), 0);
	CHECK(memcmp(file_bytes + 100 * KIB + 1000, bytes, 4 * KIB - 1000) == 0);
	CHECK(memcmp(file_bytes + 8 * KIB, bytes + 4 * KIB - 1000, 2 * KIB + 1000) == 0);
	CHECK(file_bytes[100 * KIB + 999] == 0 && file_bytes[10 * KIB + 1000] == 0);
	/* Up to what has no place. */
	CHECK_EQ(imgc_disk_write(disk, 47 * KIB, bytes, 12 * KIB, &rest, &err), IMGC_NOT_IN_PLACE);
	CHECK(rest.offset == 48 * KIB && rest.length == 11 * KIB);
	CHECK_EQ(imgc_disk_write(disk, 53 * KIB, bytes, 1, &rest, &err), IMGC_NOT_IN_PLACE);
	CHECK(file_bytes[150 * KIB] == 0);
	/* Across tables. */
	CHECK_EQ(imgc_disk_write(disk, 60 * KIB, bytes, 8 * KIB, &rest, &err), IMGC_MISSING);
	CHECK(rest.offset == SPAN && rest.length == 4 * KIB);
	CHECK_EQ(add_rows(disk, &second, 1, &rest), IMGC_OK);
	CHECK_EQ(imgc_disk_write(disk, 60 * KIB, bytes, 8 * KIB, &rest, &err), IMGC_OK);
	CHECK(memcmp(file_bytes + 154 * KIB, bytes, 4 * KIB) == 0);
	CHECK(memcmp(file_bytes + 160 * KIB, bytes + 4 * KIB, 4 * KIB) == 0);
	CHECK_EQ(imgc_disk_write(disk, 60 * KIB, bytes, 0, &rest, &err), IMGC_OK);
	/* What is forgotten is not written to. */
	imgc_disk_forget(disk, SPAN, SPAN + 1);
	CHECK_EQ(imgc_disk_write(disk, SPAN, bytes, 1, &rest, &err), IMGC_MISSING);
	CHECK_EQ(imgc_disk_write(disk, 0, bytes, 1, &rest, &err), IMGC_OK);
	/* Outside. */
	CHECK_EQ(imgc_disk_write(disk, DISK_NBYTES, bytes, 1, &rest, &err), IMGC_OUT_OF_RANGE);
	CHECK_EQ(imgc_disk_write(disk, 1, bytes, UINT64_MAX, &rest, &err), IMGC_OUT_OF_RANGE);
	second.host_offset = DISK_NBYTES - SPAN + 512;
	CHECK_EQ(add_rows(disk, &second, 1, &rest), IMGC_OUT_OF_RANGE);
	imgc_disk_destroy(disk);
	imgc_file_close(file);
}

static void test_stopping(void)
{
	uint8_t file_bytes[SPAN] = {0};
	struct imgc_file *file = NULL;
	struct imgc_disk_rest rest = {0};
	struct imgc_error err = {0};

	CHECK_EQ(imgc_file_open_memory(file_bytes, sizeof(file_bytes), &file), IMGC_OK);
	/* The file is shorter than it should be. */
	struct imgc_disk *disk = open_disk(file, 2 * SPAN, 2 * SPAN, 2 * SPAN);
	struct imgc_extent all = row_of(IMGC_DATA, 0, 2 * SPAN, 0);

	CHECK_EQ(add_rows(disk, &all, 1, &rest), IMGC_OK);
	CHECK_EQ(imgc_disk_await_writes(disk, 0), 1);
	imgc_disk_stop_writing(disk);
	CHECK_EQ(imgc_disk_write(disk, 5, "abc", 3, &rest, &err), IMGC_NOT_IN_PLACE);
	CHECK(rest.offset == 5 && rest.length == 3);
	CHECK_EQ(imgc_disk_await_writes(disk, 1000), 1);
	imgc_disk_resume_writing(disk);
	CHECK_EQ(imgc_disk_write(disk, 5, "abc", 3, &rest, &err), IMGC_OK);
	CHECK(memcmp(file_bytes + 5, "abc", 3) == 0);
	/* An error has its file and its place. */
	CHECK_EQ(imgc_disk_write(disk, SPAN - 1, "xyz", 3, &rest, &err), IMGC_OUT_OF_RANGE);
	CHECK(err.source == 0 && err.offset == SPAN - 1);
	imgc_file_refuse_writes(file);
	CHECK_EQ(imgc_disk_write(disk, 5, "def", 3, &rest, &err), IMGC_NOT_IN_PLACE);
	CHECK(memcmp(file_bytes + 5, "abc", 3) == 0);
	struct iovec iov = {(void *)(uintptr_t) "def", 3};

	CHECK_EQ(imgc_file_write(file, &iov, 1, 5, &err), IMGC_IO);
	CHECK_EQ(imgc_file_zero(file, 5, 3, &err), IMGC_IO);
	CHECK(memcmp(file_bytes + 5, "abc", 3) == 0);
	imgc_disk_destroy(disk);
	imgc_file_close(file);
}

/* ---------------------------------------------------------------- a slow file */

struct slow_file {
	struct imgc_file base;
	_Atomic int n_writing, n_written;
};

static int write_slowly(struct imgc_file *base, const struct iovec *iov, int n_iov, uint64_t offset,
			struct imgc_error *err)
{
	struct slow_file *file = (struct slow_file *)base;

	(void)iov, (void)n_iov, (void)offset, (void)err;
	atomic_fetch_add(&file->n_writing, 1);
	usleep(30000);
	atomic_fetch_add(&file->n_written, 1);
	return IMGC_OK;
}

static const struct imgc_file_ops slow_ops = {.write = write_slowly};

struct slow_write {
	struct imgc_disk *disk;
	int status;
	struct imgc_disk_rest rest;
};

static void *write_long(void *argument)
{
	struct slow_write *one = argument;
	struct imgc_error err = {0};
	uint8_t *bytes = calloc(1, 32 * MIB);

	CHECK(bytes);
	one->status = imgc_disk_write(one->disk, 0, bytes, 32 * MIB, &one->rest, &err);
	free(bytes);
	return NULL;
}

/* A call is bounded, so that signals are handled; and it is waited for. */
static void test_slow_writes(void)
{
	struct slow_file file = {.base.ops = &slow_ops};
	struct imgc_disk *disk = open_disk(&file.base, 64 * MIB, 64 * MIB, 64 * MIB);
	struct imgc_extent all = row_of(IMGC_DATA, 0, 64 * MIB, 0);
	struct imgc_disk_rest rest = {0};
	struct slow_write one = {.disk = disk};
	pthread_t thread;

	CHECK_EQ(add_rows(disk, &all, 1, &rest), IMGC_OK);
	CHECK_EQ(pthread_create(&thread, NULL, write_long, &one), 0);
	while (!atomic_load(&file.n_writing))
		usleep(100);
	imgc_disk_stop_writing(disk);
	CHECK_EQ(imgc_disk_await_writes(disk, 0), 0);
	while (!imgc_disk_await_writes(disk, 10000))
		;
	int n_written = atomic_load(&file.n_written);

	CHECK_EQ(pthread_join(thread, NULL), 0);
	CHECK_EQ(atomic_load(&file.n_written), n_written);
	CHECK_EQ(one.status, IMGC_UNFINISHED);
	CHECK(one.rest.offset > 0 && one.rest.offset + one.rest.length == 32 * MIB);
	imgc_disk_destroy(disk);
}

/* ------------------------------------------------------------------- threads */

/*
 * Several writers, each with blocks of its own, and one thread that takes places away
 * from blocks at random.  A place is used again when nobody who found it before can be
 * writing to it.  Now and then the thread stops all writers, and moves a block.
 */
#define BLOCK 4096u
#define N_BLOCKS 96u
#define N_PLACES 112u
#define N_WRITERS 4u
#define NO_PLACE UINT32_MAX

/* Memory; some writes pause in the middle, so that others must wait for them. */
struct pausing_file {
	struct imgc_file base;
	uint8_t *bytes;
	_Atomic unsigned n_written;
};

static int write_pausing(struct imgc_file *base, const struct iovec *iov, int n_iov,
			 uint64_t offset, struct imgc_error *err)
{
	struct pausing_file *file = (struct pausing_file *)base;
	size_t half = iov->iov_len / 2;

	(void)n_iov, (void)err;
	memcpy(file->bytes + offset, iov->iov_base, half);
	/* Relaxed: TSan must not take it for order between writers. */
	if (atomic_fetch_add_explicit(&file->n_written, 1, memory_order_relaxed) % 4 == 0)
		usleep(300);
	memcpy(file->bytes + offset + half, (const uint8_t *)iov->iov_base + half,
	       iov->iov_len - half);
	return IMGC_OK;
}

static const struct imgc_file_ops pausing_ops = {.write = write_pausing};

struct shop {
	struct imgc_disk *disk;
	struct imgc_uses *uses;
	uint8_t *file_bytes;
	pthread_mutex_t lock; /* all below */
	uint32_t places[N_BLOCKS];
	uint32_t free_places[N_PLACES], n_free;
	struct {
		uint32_t place;
		uint64_t epoch;
	} released[N_PLACES];
	uint32_t n_released;
	uint8_t versions[N_BLOCKS]; /* what the block's writer has written last */
	uint64_t n_in_place, n_placed, n_moved;
	uint64_t state; /* of random numbers */
	_Atomic bool is_over;
};

static void fill(uint8_t *bytes, uint32_t block, uint8_t version)
{
	memset(bytes, (int)(version ^ (block * 37)), BLOCK);
}

/* Under the lock: gives the table of a block's span to the disk. */
static void give_table(struct shop *shop, const struct imgc_disk_rest *rest)
{
	struct imgc_extent rows[SPAN / BLOCK];
	uint64_t start, end;
	size_t n = 0;

	imgc_disk_span(shop->disk, rest->offset, &start, &end);
	for (uint64_t at = start; at < end; at += BLOCK) {
		uint32_t place = shop->places[at / BLOCK];

		rows[n++] = row_of(place == NO_PLACE ? IMGC_HOLE : IMGC_DATA, at, BLOCK,
				   (uint64_t)place * BLOCK);
	}
	CHECK_EQ(add_rows(shop->disk, rows, n, rest), IMGC_OK);
}

static void reuse_places(struct shop *shop)
{
	uint32_t n_left = 0;

	for (uint32_t i = 0; i < shop->n_released; i++) {
		if (imgc_uses_is_over(shop->uses, shop->released[i].epoch))
			shop->free_places[shop->n_free++] = shop->released[i].place;
		else
			shop->released[n_left++] = shop->released[i];
	}
	shop->n_released = n_left;
}

/* Any of them, so that one that was released last is soon used again. */
static uint32_t take_free(struct shop *shop)
{
	uint32_t i = (uint32_t)(test_random(&shop->state) % shop->n_free);
	uint32_t place = shop->free_places[i];

	shop->free_places[i] = shop->free_places[--shop->n_free];
	return place;
}

static void place_block(struct shop *shop, uint32_t block, const uint8_t *bytes)
{
	pthread_mutex_lock(&shop->lock);
	if (shop->places[block] == NO_PLACE) {
		reuse_places(shop);
		if (shop->n_free > 0) {
			uint32_t place = take_free(shop);

			memcpy(shop->file_bytes + (size_t)place * BLOCK, bytes, BLOCK);
			shop->places[block] = place;
			imgc_disk_forget(shop->disk, (uint64_t)block * BLOCK,
					 (uint64_t)(block + 1) * BLOCK);
			shop->n_placed++;
		}
	}
	pthread_mutex_unlock(&shop->lock);
}

struct writer {
	struct shop *shop;
	uint32_t number;
};

static void write_block(struct shop *shop, uint32_t block, uint8_t version)
{
	uint8_t bytes[BLOCK];
	struct imgc_disk_rest rest;
	struct imgc_error err = {0};
	int ticket = imgc_uses_enter(shop->uses), status;

	fill(bytes, block, version);
	CHECK(ticket);
	do {
		status = imgc_disk_write(shop->disk, (uint64_t)block * BLOCK, bytes, BLOCK, &rest,
					 &err);
		if (status == IMGC_MISSING) {
			pthread_mutex_lock(&shop->lock);
			give_table(shop, &rest);
			pthread_mutex_unlock(&shop->lock);
		}
	} while (status == IMGC_MISSING);
	imgc_uses_leave(shop->uses, ticket);
	CHECK(status == IMGC_OK || status == IMGC_NOT_IN_PLACE);
	if (status == IMGC_NOT_IN_PLACE)
		place_block(shop, block, bytes);
	pthread_mutex_lock(&shop->lock);
	shop->versions[block] = version;
	shop->n_in_place += status == IMGC_OK;
	pthread_mutex_unlock(&shop->lock);
}

static void *write_blocks(void *argument)
{
	struct writer *me = argument;
	uint64_t state = me->number + 1;

	for (unsigned i = 0; !atomic_load(&me->shop->is_over); i++) {
		uint32_t block =
			(uint32_t)(test_random(&state) % (N_BLOCKS / N_WRITERS)) * N_WRITERS +
			me->number;

		write_block(me->shop, block, (uint8_t)i);
	}
	return NULL;
}

/* Under the lock: forgets the table of a block's span. */
static void forget_block(struct shop *shop, uint32_t block)
{
	imgc_disk_forget(shop->disk, (uint64_t)block * BLOCK, (uint64_t)block * BLOCK + 1);
}

static void take_place(struct shop *shop, uint32_t block)
{
	uint32_t place = shop->places[block];

	shop->places[block] = NO_PLACE;
	forget_block(shop, block);
	shop->released[shop->n_released].place = place;
	shop->released[shop->n_released++].epoch = imgc_uses_epoch(shop->uses);
}

/* Without locks for the bytes: nobody writes, so the old place is free at once. */
static void move_block(struct shop *shop, uint32_t block)
{
	uint32_t from = shop->places[block];

	if (shop->n_free == 0)
		return;
	imgc_disk_stop_writing(shop->disk);
	while (!imgc_disk_await_writes(shop->disk, 1000))
		;
	uint32_t to = shop->free_places[shop->n_free - 1];

	memcpy(shop->file_bytes + (size_t)to * BLOCK, shop->file_bytes + (size_t)from * BLOCK,
	       BLOCK);
	memset(shop->file_bytes + (size_t)from * BLOCK, 0, BLOCK);
	shop->places[block] = to;
	shop->free_places[shop->n_free - 1] = from;
	forget_block(shop, block);
	imgc_disk_resume_writing(shop->disk);
	shop->n_moved++;
}

static void *take_places(void *argument)
{
	struct shop *shop = argument;
	uint64_t state = 99;

	while (!atomic_load(&shop->is_over)) {
		uint32_t block = (uint32_t)(test_random(&state) % N_BLOCKS);

		pthread_mutex_lock(&shop->lock);
		if (shop->places[block] != NO_PLACE) {
			if (test_random(&state) % 4 == 0)
				move_block(shop, block);
			else
				take_place(shop, block);
		}
		pthread_mutex_unlock(&shop->lock);
	}
	return NULL;
}

/* Whether places were used again, many bytes overwritten, and many blocks moved. */
static bool has_seen_all(struct shop *shop)
{
	pthread_mutex_lock(&shop->lock);
	bool result =
		shop->n_in_place > 20000 && shop->n_placed > 8 * N_PLACES && shop->n_moved > 200;

	pthread_mutex_unlock(&shop->lock);
	return result;
}

static void test_threads(void)
{
	struct shop shop = {.file_bytes = calloc(N_PLACES, BLOCK), .n_free = N_PLACES};
	struct writer writers[N_WRITERS];
	pthread_t threads[N_WRITERS], taker;

	CHECK(shop.file_bytes);
	struct pausing_file file = {.base.ops = &pausing_ops, .bytes = shop.file_bytes};

	shop.disk = open_disk(&file.base, N_PLACES * BLOCK, N_BLOCKS * BLOCK, SPAN);
	CHECK_EQ(imgc_uses_create(&shop.uses), IMGC_OK);
	CHECK_EQ(pthread_mutex_init(&shop.lock, NULL), 0);
	for (uint32_t i = 0; i < N_PLACES; i++)
		shop.free_places[i] = i;
	for (uint32_t i = 0; i < N_BLOCKS; i++)
		shop.places[i] = NO_PLACE;
	CHECK_EQ(pthread_create(&taker, NULL, take_places, &shop), 0);
	for (uint32_t i = 0; i < N_WRITERS; i++) {
		writers[i] = (struct writer){&shop, i};
		CHECK_EQ(pthread_create(&threads[i], NULL, write_blocks, &writers[i]), 0);
	}
	while (!has_seen_all(&shop))
		usleep(1000);
	atomic_store(&shop.is_over, true);
	for (uint32_t i = 0; i < N_WRITERS; i++)
		CHECK_EQ(pthread_join(threads[i], NULL), 0);
	CHECK_EQ(pthread_join(taker, NULL), 0);
	for (uint32_t block = 0; block < N_BLOCKS; block++) {
		uint8_t expected[BLOCK];

		fill(expected, block, shop.versions[block]);
		if (shop.places[block] != NO_PLACE)
			CHECK(memcmp(shop.file_bytes + (size_t)shop.places[block] * BLOCK, expected,
				     BLOCK) == 0);
	}
	pthread_mutex_destroy(&shop.lock);
	imgc_uses_destroy(shop.uses);
	imgc_disk_destroy(shop.disk);
	free(shop.file_bytes);
}

int main(void)
{
	test_rows();
	test_stopping();
	test_slow_writes();
	test_threads();
	return 0;
}
