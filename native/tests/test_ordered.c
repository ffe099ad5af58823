/*
 * test_ordered.c - a descriptor that is written in order: pipes, sockets, jobs and faults
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "engine/placer.h"
#include "io/io.h"
#include "tests/engine_util.h"

#define N_BLOCKS(disk) ((disk).nbytes / (64 * KIB) + 1)

static struct imgc_error error;

/* The other end: reads everything, in pieces of random sizes. */
struct reader {
	int fd;
	uint8_t *bytes;
	size_t nbytes, room;
	size_t limit; /* closes its end after so many bytes */
	long pause_ns;
	pthread_t thread;
};

static void *reader_main(void *argument)
{
	struct reader *reader = argument;
	uint64_t state = 7;

	while (reader->nbytes < reader->limit) {
		size_t want = 1 + (size_t)(test_random(&state) % 70000);
		struct timespec pause = {0, reader->pause_ns};

		if (want > reader->limit - reader->nbytes)
			want = reader->limit - reader->nbytes;
		if (reader->nbytes + want > reader->room) {
			reader->room = 2 * (reader->nbytes + want);
			reader->bytes = realloc(reader->bytes, reader->room);
			CHECK(reader->bytes);
		}
		ssize_t got = read(reader->fd, reader->bytes + reader->nbytes, want);

		CHECK(got >= 0);
		if (got == 0)
			break;
		reader->nbytes += (size_t)got;
		if (reader->pause_ns)
			nanosleep(&pause, NULL);
	}
	close(reader->fd);
	return NULL;
}

enum kind { BLOCKING_PIPE, PIPE, SOCKET, N_KINDS };

static void make_pair(enum kind kind, int ends[2])
{
	if (kind == SOCKET) {
		CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0);
		return;
	}
	CHECK(pipe(ends) == 0);
	if (kind == PIPE)
		CHECK(fcntl(ends[1], F_SETFL, O_NONBLOCK) == 0);
}

static struct imgc_file *open_ordered(int fd)
{
	struct imgc_file *file = NULL;

	CHECK_EQ(imgc_file_open_ordered(fd, &file, &error), IMGC_OK);
	CHECK(file->writes_are_serial);
	CHECK_EQ(imgc_file_has_reader(file), 1);
	return file;
}

static void reader_start(struct reader *reader, int fd)
{
	reader->fd = fd;
	if (reader->limit == 0)
		reader->limit = SIZE_MAX;
	CHECK(pthread_create(&reader->thread, NULL, reader_main, reader) == 0);
}

static void reader_join(struct reader *reader)
{
	CHECK(pthread_join(reader->thread, NULL) == 0);
}

/* A write that waits for its reader, as the engine does it. */
static int write_waiting(struct imgc_file *file, const struct iovec *iov, int n, uint64_t offset)
{
	for (;;) {
		int status = imgc_file_write(file, iov, n, offset, &error);

		if (status != IMGC_IO || error.os_errno != EAGAIN)
			return status;
		imgc_file_await_room(file, 20);
	}
}

static void test_writes(enum kind kind)
{
	static uint8_t content[3 * MIB], expected[8 * MIB];
	struct reader reader = {.pause_ns = 100000};
	uint64_t state = 3, at = 0;
	int ends[2];

	make_pair(kind, ends);
	fill_random(content, sizeof(content), 5);
	struct imgc_file *file = open_ordered(ends[1]);

	reader_start(&reader, ends[0]);
	while (at < 4 * MIB) {
		struct iovec iov[150];
		uint64_t end = at += test_random(&state) % 3 ? 0 : test_random(&state) % 200000;
		int n = 1 + (int)(test_random(&state) % 150);

		for (int i = 0; i < n; i++) {
			size_t length = test_random(&state) % 5 ? test_random(&state) % 9000 : 0;

			iov[i].iov_base = content + test_random(&state) % (2 * MIB);
			iov[i].iov_len = length;
			memcpy(expected + end, iov[i].iov_base, length);
			end += length;
		}
		CHECK_EQ(write_waiting(file, iov, n, at), IMGC_OK);
		at = end;
	}
	/* A gap at the end, longer than one call fills. */
	while (imgc_file_zero(file, at, 40 * MIB, &error)) {
		CHECK_EQ(error.os_errno, EAGAIN);
		imgc_file_await_room(file, 20);
	}
	/* What is written is written. */
	CHECK_EQ(imgc_file_put(file, content, 1, at, &error), IMGC_OUT_OF_RANGE);
	CHECK_EQ(imgc_file_zero(file, at, 1, &error), IMGC_OUT_OF_RANGE);
	CHECK_EQ(imgc_file_put(file, content, 1, INT64_MAX, &error), IMGC_OUT_OF_RANGE);
	CHECK_EQ(imgc_file_put(file, NULL, 0, at + 40 * MIB, NULL), IMGC_OK);
	imgc_file_close(file);
	close(ends[1]);
	reader_join(&reader);
	CHECK_EQ(reader.nbytes, at + 40 * MIB);
	CHECK(memcmp(reader.bytes, expected, at) == 0);
	for (size_t i = at; i < reader.nbytes; i++)
		CHECK_EQ(reader.bytes[i], 0);
	free(reader.bytes);
}

static void test_reader_takes_nothing(enum kind kind)
{
	static uint8_t content[4 * MIB];
	struct iovec iov = {content, sizeof(content)};
	int ends[2], n_refused = 0;

	make_pair(kind, ends);
	struct imgc_file *file = open_ordered(ends[1]);

	if (kind == BLOCKING_PIPE) {
		/* As much as surely fits. */
		iov.iov_len = 4096;
		CHECK_EQ(imgc_file_write(file, &iov, 1, 0, &error), IMGC_OK);
	} else {
		for (; n_refused < 3; n_refused++) {
			CHECK_EQ(imgc_file_write(file, &iov, 1, 0, &error), IMGC_IO);
			CHECK_EQ(error.os_errno, EAGAIN);
			imgc_file_await_room(file, 1);
		}
		/* Another write in its place breaks the contract. */
		CHECK_EQ(imgc_file_write(file, &iov, 1, 1, &error), IMGC_OUT_OF_RANGE);
	}
	close(ends[0]);
	imgc_file_await_room(file, 1000);
	CHECK_EQ(imgc_file_write(file, &iov, 1, sizeof(content), &error), IMGC_IO);
	CHECK(error.os_errno == EPIPE || error.os_errno == ECONNRESET);
	imgc_file_close(file);
	close(ends[1]);
}

static void test_not_read(void)
{
	struct imgc_io_request request = {0, NULL, 0};
	uint64_t start = 1, end = 2;
	int ends[2];

	make_pair(PIPE, ends);
	struct imgc_file *file = open_ordered(ends[1]);

	CHECK_EQ(imgc_file_read(file, NULL, &request, 1, &error), IMGC_UNSUPPORTED);
	CHECK_EQ(imgc_file_next_data(file, 0, &start, &end, &error), IMGC_UNSUPPORTED);
	CHECK_EQ(imgc_file_sync(file, &error), IMGC_OK);
	imgc_file_close(file);
	close(ends[0]);
	close(ends[1]);
	CHECK_EQ(imgc_file_open_ordered(ends[1], &file, &error), IMGC_IO);
	CHECK_EQ(error.os_errno, EBADF);
}

/* ---------------------------------------------------------------------- jobs */

static void test_identity_job(enum kind kind, unsigned n_threads)
{
	struct disk source = example_disk();
	struct imgc_extent row = data_row(0, source.nbytes, 0);
	struct reader reader = {.pause_ns = 50000};
	struct imgc_source_file file;
	struct disk target = {0};
	int ends[2];

	make_pair(kind, ends);
	target.file = open_ordered(ends[1]);
	reader_start(&reader, ends[0]);
	struct imgc_job_options o = convert_options(&source, &target, &file, n_threads);

	o.geometry.placing = IMGC_PLACE_IDENTITY;
	convert(&o, &row, 1, NULL, 0);
	imgc_file_close(target.file);
	close(ends[1]);
	reader_join(&reader);
	CHECK(reader.nbytes <= source.nbytes);
	CHECK(memcmp(reader.bytes, source.bytes, reader.nbytes) == 0);
	free(reader.bytes);
	disk_destroy(&source);
}

/* Blocks that a row states as data are stored, zeros included, and no others. */
static void test_appending_job(unsigned n_threads, uint64_t block_nbytes)
{
	struct disk source = example_disk();
	struct imgc_extent rows[] = {
		data_row(0, 512, 0),
		empty_row(512, 4 * MIB - 512, IMGC_HOLE),
		data_row(4 * MIB, MIB / 2, 2 * MIB + 512 * 1000),
		empty_row(4 * MIB + MIB / 2, MIB / 2 + 3 * 512, IMGC_ZERO),
	};
	size_t n = (size_t)((source.nbytes + block_nbytes - 1) / block_nbytes);
	struct imgc_placement *placements = calloc(n, sizeof(*placements));
	struct imgc_placement *expected = calloc(n, sizeof(*expected));
	struct imgc_places *places;
	struct imgc_source_file file;
	struct reader reader = {0};
	struct disk target = {0};
	int ends[2];

	CHECK(placements && expected);
	make_pair(PIPE, ends);
	target.file = open_ordered(ends[1]);
	reader_start(&reader, ends[0]);
	struct imgc_job_options o = convert_options(&source, &target, &file, n_threads);

	o.geometry.placing = IMGC_PLACE_APPEND;
	o.geometry.block_nbytes = block_nbytes;
	o.next_offset = 12345;
	o.stores_data = 1;
	uint64_t next = convert(&o, rows, 4, placements, n);

	for (size_t i = 0; i < n; i++) {
		uint64_t start = i * block_nbytes, end = start + block_nbytes;
		int has_data = start < 512 || (start < 4 * MIB + MIB / 2 && end > 4 * MIB);

		expected[i].state = has_data ? IMGC_BLOCK_STORED : IMGC_BLOCK_ABSENT;
		CHECK_EQ(placements[i].state, expected[i].state);
	}
	CHECK_EQ(imgc_places_create(&o.geometry, 12345, &places), IMGC_OK);
	CHECK_EQ(imgc_places_give(places, 0, expected, n, &error), IMGC_OK);
	CHECK(memcmp(placements, expected, n * sizeof(*expected)) == 0);
	CHECK_EQ(imgc_places_next_offset(places), next);
	CHECK_EQ(imgc_places_set_next_offset(places, next - 1), IMGC_INVALID_ARGUMENT);
	CHECK_EQ(imgc_places_set_next_offset(places, next + 5), IMGC_OK);
	CHECK_EQ(imgc_places_next_offset(places), next + 5);
	imgc_places_destroy(places);
	imgc_file_close(target.file);
	close(ends[1]);
	reader_join(&reader);
	for (size_t i = 0; i < n; i++) {
		uint64_t start = i * block_nbytes;

		if (placements[i].state == IMGC_BLOCK_STORED && start == 0)
			CHECK(memcmp(reader.bytes + placements[i].host_offset, source.bytes, 512) ==
			      0);
		if (placements[i].state == IMGC_BLOCK_STORED && start == 4 * MIB)
			CHECK(memcmp(reader.bytes + placements[i].host_offset,
				     source.bytes + 2 * MIB + 512 * 1000, 64 * KIB) == 0);
	}
	free(reader.bytes);
	free(placements);
	free(expected);
	disk_destroy(&source);
}

/* A source that is a file, with the bytes of another one. */
static struct disk file_disk(const struct disk *source, FILE **out)
{
	struct disk disk = {.bytes = source->bytes, .nbytes = source->nbytes};

	*out = tmpfile();
	CHECK(*out);
	CHECK_EQ(fwrite(source->bytes, 1, source->nbytes, *out), source->nbytes);
	CHECK_EQ(fflush(*out), 0);
	CHECK_EQ(imgc_file_open_fd(fileno(*out), &disk.file, &error), IMGC_OK);
	return disk;
}

/*
 * Unread rows are moved into a pipe: as spans, beside rows that are read, at odd places,
 * behind prefixes of blocks, and in blocks that are larger than windows.  A source without
 * pages, and one that ends early, are read.
 */
static void test_moving_job(unsigned n_threads, uint64_t block_nbytes, bool has_pages)
{
	struct disk content = example_disk();
	FILE *opened = NULL;
	struct disk source = has_pages ? file_disk(&content, &opened) : content;
	struct imgc_extent rows[] = {
		data_row(0, 512 * 3, 512),
		data_row(512 * 3, 2 * MIB, 512 * 7),
		empty_row(2 * MIB + 512 * 3, MIB, IMGC_HOLE),
		data_row(3 * MIB + 512 * 3, 512, 0),
		data_row(3 * MIB + 512 * 4, MIB + 512 * 1000, 3 * MIB - 512 * 1000),
		empty_row(4 * MIB + 512 * 1004, source.nbytes - 4 * MIB - 512 * 1004, IMGC_ZERO),
	};
	size_t n_rows = sizeof(rows) / sizeof(rows[0]);
	size_t n = (size_t)((source.nbytes + block_nbytes - 1) / block_nbytes);
	struct imgc_placement *placements = calloc(n, sizeof(*placements));
	uint8_t *guest = calloc(n, block_nbytes);
	struct imgc_source_file file;
	struct reader reader = {.pause_ns = 30000};
	struct disk target = {0};
	int ends[2];

	CHECK(placements && guest);
	for (size_t i = 0; i < n_rows; i++) {
		if (rows[i].kind != IMGC_DATA)
			continue;
		memcpy(guest + rows[i].guest_offset, content.bytes + rows[i].host_offset,
		       rows[i].length);
		if (i != 3) /* which is read */
			rows[i].flags = IMGC_EXTENT_UNREAD;
	}
	make_pair(PIPE, ends);
	target.file = open_ordered(ends[1]);
	reader_start(&reader, ends[0]);
	struct imgc_job_options o = convert_options(&source, &target, &file, n_threads);

	o.geometry.placing = IMGC_PLACE_APPEND;
	o.geometry.block_nbytes = block_nbytes;
	o.geometry.stored_alignment = 512;
	o.geometry.stored_prefix_nbytes = 512;
	o.geometry.stored_prefix_byte = 0xA5;
	o.next_offset = 1234567;
	o.stores_data = 1;
	convert(&o, rows, n_rows, placements, n);
	imgc_file_close(target.file);
	close(ends[1]);
	reader_join(&reader);
	for (size_t i = 0; i < n; i++) {
		uint64_t start = i * block_nbytes, nbytes = block_nbytes;
		const uint8_t *stored = reader.bytes + placements[i].host_offset;

		if (placements[i].state != IMGC_BLOCK_STORED) {
			for (uint64_t at = start; at < start + nbytes; at++)
				CHECK_EQ(guest[at], 0);
			continue;
		}
		/* Zeros at the end of the last block are not written. */
		if (placements[i].host_offset + nbytes > reader.nbytes)
			nbytes = reader.nbytes - placements[i].host_offset;
		CHECK(memcmp(stored, guest + start, nbytes) == 0);
		for (size_t at = 1; at <= 512; at++)
			CHECK_EQ(stored[-(ptrdiff_t)at], 0xA5);
	}
	free(reader.bytes);
	free(placements);
	free(guest);
	if (opened) {
		imgc_file_close(source.file);
		fclose(opened);
	}
	disk_destroy(&content);
}

/* A job that moves all of a source file into a pipe, and the batch for it. */
struct moving {
	struct disk content, source, target;
	FILE *opened;
	struct imgc_source_file file;
	struct imgc_extent row;
	struct imgc_batch batch;
	struct imgc_job_options options;
	struct reader reader;
	int ends[2];
};

static void moving_start(struct moving *m, uint64_t nbytes, unsigned n_threads)
{
	*m = (struct moving){.content = disk_create(nbytes)};
	m->source = file_disk(&m->content, &m->opened);
	m->row = data_row(0, nbytes, 0);
	m->row.flags = IMGC_EXTENT_UNREAD;
	m->batch = (struct imgc_batch){.guest_end = nbytes, .extents = &m->row, .n_extents = 1};
	make_pair(PIPE, m->ends);
	m->target.file = open_ordered(m->ends[1]);
	reader_start(&m->reader, m->ends[0]);
	m->options = convert_options(&m->source, &m->target, &m->file, n_threads);
	m->options.geometry.placing = IMGC_PLACE_IDENTITY;
}

static void moving_end_stream(struct moving *m)
{
	imgc_file_close(m->target.file);
	close(m->ends[1]);
	reader_join(&m->reader);
}

/* After moving_end_stream(): what the reader has got stays until then. */
static void moving_end(struct moving *m)
{
	free(m->reader.bytes);
	imgc_file_close(m->source.file);
	fclose(m->opened);
	disk_destroy(&m->content);
}

/* The rate counts what is moved, and a job that waits for it can be cancelled. */
static void test_moves_at_a_rate(void)
{
	struct moving m;
	struct imgc_rate_limit *limit;
	struct imgc_job *job;

	moving_start(&m, 4 * MIB, 1);
	CHECK_EQ(imgc_rate_limit_create(&limit), IMGC_OK);
	imgc_rate_limit_set(limit, 1);
	m.options.rate_limit = limit;
	CHECK_EQ(imgc_job_create(&m.options, &job, &error), IMGC_OK);
	CHECK_EQ(imgc_job_start(job, &m.batch, &error), IMGC_OK);
	CHECK_EQ(imgc_job_wait(job, 50), 0);
	imgc_job_cancel(job);
	CHECK_EQ(imgc_job_finish(job, &error), IMGC_CANCELLED);
	imgc_job_destroy(job);
	imgc_rate_limit_destroy(limit);
	moving_end_stream(&m);
	CHECK(m.reader.nbytes < m.source.nbytes);
	moving_end(&m);
}

/* A source that has become shorter is an error, as if it had been read. */
static void test_moves_past_the_end(void)
{
	struct moving m;
	struct imgc_job *job;

	moving_start(&m, 2 * MIB, 2);
	CHECK_EQ(ftruncate(fileno(m.opened), MIB + 5), 0);
	CHECK_EQ(imgc_job_create(&m.options, &job, &error), IMGC_OK);
	CHECK_EQ(run_batch(job, &m.batch, &error), IMGC_PAST_END);
	CHECK_EQ(error.offset, MIB + 5);
	CHECK_EQ(error.source, 0);
	imgc_job_destroy(job);
	moving_end_stream(&m);
	moving_end(&m);
}

/* Compressed and stored blocks mix, and go into a pipe in order. */
static void test_packing_job(unsigned n_threads)
{
	struct disk source = example_disk();
	struct imgc_extent row = data_row(0, source.nbytes, 0);
	struct imgc_placement *placements = calloc(N_BLOCKS(source), sizeof(*placements));
	size_t n = (size_t)N_BLOCKS(source), n_stored = 0, n_packed = 0;
	struct imgc_source_file file;
	struct reader reader = {0};
	struct disk target = {0};
	int ends[2];

	CHECK(placements);
	make_pair(PIPE, ends);
	target.file = open_ordered(ends[1]);
	reader_start(&reader, ends[0]);
	struct imgc_job_options o = convert_options(&source, &target, &file, n_threads);

	o.geometry.placing = IMGC_PLACE_APPEND;
	o.geometry.codec = (struct imgc_codec_params){.codec = IMGC_CODEC_ZSTD, .level = 1};
	o.geometry.store_incompressible = 1;
	o.geometry.packs_in_order = 1;
	o.next_offset = 64 * KIB;
	convert(&o, &row, 1, placements, n);
	imgc_file_close(target.file);
	close(ends[1]);
	reader_join(&reader);
	for (size_t i = 0; i < n; i++) {
		n_stored += placements[i].state == IMGC_BLOCK_STORED;
		n_packed += placements[i].state == IMGC_BLOCK_COMPRESSED;
	}
	CHECK(n_stored > 0 && n_packed > 0);
	struct disk written = disk_create(8 * MIB);

	memcpy(written.bytes, reader.bytes, reader.nbytes);
	check_readback(&source, &written, &o.geometry, placements, n);
	disk_destroy(&written);
	free(reader.bytes);
	free(placements);
	disk_destroy(&source);
}

/* The reader goes after `limit` bytes: the job fails with EPIPE, whatever the number. */
static void test_broken_pipe(unsigned n_threads, size_t limit)
{
	struct disk source = disk_create(5 * MIB);
	struct imgc_extent row = data_row(0, source.nbytes, 0);
	struct imgc_batch batch = {.guest_end = source.nbytes, .extents = &row, .n_extents = 1};
	struct imgc_source_file file;
	struct reader reader = {.limit = limit};
	struct disk target = {0};
	struct imgc_job *job;
	int ends[2];

	fill_random(source.bytes, source.nbytes, 1);
	make_pair(PIPE, ends);
	target.file = open_ordered(ends[1]);
	reader_start(&reader, ends[0]);
	struct imgc_job_options o = convert_options(&source, &target, &file, n_threads);

	o.geometry.placing = IMGC_PLACE_IDENTITY;
	CHECK_EQ(imgc_job_create(&o, &job, &error), IMGC_OK);
	CHECK_EQ(run_batch(job, &batch, &error), IMGC_IO);
	CHECK_EQ(error.os_errno, EPIPE);
	CHECK_EQ(error.source, IMGC_TARGET);
	imgc_job_destroy(job);
	imgc_file_close(target.file);
	close(ends[1]);
	reader_join(&reader);
	free(reader.bytes);
	disk_destroy(&source);
}

/* Nobody reads: the calling thread comes back, and cancels. */
static void test_cancel(enum kind kind, unsigned n_threads)
{
	struct disk source = disk_create(5 * MIB);
	struct imgc_extent row = data_row(0, source.nbytes, 0);
	struct imgc_batch batch = {.guest_end = source.nbytes, .extents = &row, .n_extents = 1};
	struct imgc_source_file file;
	struct disk target = {0};
	struct imgc_job *job;
	int ends[2];

	fill_random(source.bytes, source.nbytes, 1);
	make_pair(kind, ends);
	target.file = open_ordered(ends[1]);
	struct imgc_job_options o = convert_options(&source, &target, &file, n_threads);

	o.geometry.placing = IMGC_PLACE_IDENTITY;
	CHECK_EQ(imgc_job_create(&o, &job, &error), IMGC_OK);
	CHECK_EQ(imgc_job_start(job, &batch, &error), IMGC_OK);
	if (kind == PIPE)
		CHECK_EQ(imgc_job_wait(job, 100), 0);
	imgc_job_cancel(job);
	CHECK_EQ(imgc_job_finish(job, &error), IMGC_CANCELLED);
	imgc_job_destroy(job);
	imgc_file_close(target.file);
	close(ends[0]);
	close(ends[1]);
	disk_destroy(&source);
}

static void test_places_refuse(void)
{
	struct imgc_geometry g = {.block_nbytes = 64 * KIB,
				  .placing = IMGC_PLACE_APPEND,
				  .stored_alignment = 512,
				  .compressed_alignment = 1,
				  .guest_nbytes = MIB};
	struct imgc_placement row = {.state = IMGC_BLOCK_STORED};
	struct imgc_places *places = NULL;

	CHECK_EQ(imgc_places_create(&g, INT64_MAX - 4096, &places), IMGC_OK);
	CHECK_EQ(imgc_places_give(places, 0, &row, 1, &error), IMGC_LIMIT);
	CHECK_EQ(imgc_places_give(places, 17, &row, 1, &error), IMGC_INVALID_ARGUMENT);
	imgc_places_destroy(places);
	imgc_places_destroy(NULL);
	g.group_nblocks = 4;
	CHECK_EQ(imgc_places_create(&g, 0, &places), IMGC_INVALID_ARGUMENT);
	g.group_nblocks = 0;
	g.placing = IMGC_PLACE_IDENTITY;
	CHECK_EQ(imgc_places_create(&g, 0, &places), IMGC_INVALID_ARGUMENT);
}

int main(void)
{
	signal(SIGPIPE, SIG_IGN);
	for (enum kind kind = 0; kind < N_KINDS; kind++) {
		test_writes(kind);
		test_reader_takes_nothing(kind);
		for (unsigned n_threads = 1; n_threads <= 4; n_threads += 3)
			test_identity_job(kind, n_threads);
	}
	test_not_read();
	test_places_refuse();
	test_moves_at_a_rate();
	test_moves_past_the_end();
	for (unsigned n_threads = 1; n_threads <= 4; n_threads += 3) {
		test_appending_job(n_threads, 64 * KIB);
		test_appending_job(n_threads, 2 * MIB);
		for (uint64_t block = 64 * KIB; block <= 2 * MIB; block *= 32) {
			test_moving_job(n_threads, block, true);
			test_moving_job(n_threads, block, false);
		}
		test_packing_job(n_threads);
		for (size_t limit = 1; limit < 5 * MIB - 1; limit += 700001)
			test_broken_pipe(n_threads, limit);
		test_cancel(PIPE, n_threads);
		test_cancel(SOCKET, n_threads);
	}
	return 0;
}
