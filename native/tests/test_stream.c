/*
 * test_stream.c - a descriptor that is read in order: pipes, sockets, turns, ends and jobs
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "digest/digest.h"
#include "io/io.h"
#include "tests/engine_util.h"

static struct imgc_error error;

enum kind { PIPE, NONBLOCKING_PIPE, SOCKET, N_KINDS };

static void make_pair(enum kind kind, int ends[2])
{
	if (kind == SOCKET) {
		CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0);
		return;
	}
	CHECK(pipe(ends) == 0);
	if (kind == NONBLOCKING_PIPE)
		CHECK(fcntl(ends[0], F_SETFL, O_NONBLOCK) == 0);
}

/* The other end: writes everything, in pieces of random sizes. */
struct sender {
	int fd;
	const uint8_t *bytes;
	size_t nbytes, piece;
	long pause_ns;
	pthread_t thread;
};

static void *send_all(void *argument)
{
	struct sender *sender = argument;
	uint64_t state = 9;
	size_t done = 0;

	while (done < sender->nbytes) {
		size_t want = 1 + (size_t)(test_random(&state) % sender->piece);
		struct timespec pause = {0, sender->pause_ns};

		if (want > sender->nbytes - done)
			want = sender->nbytes - done;
		ssize_t put = write(sender->fd, sender->bytes + done, want);

		CHECK(put > 0);
		done += (size_t)put;
		if (sender->pause_ns)
			nanosleep(&pause, NULL);
	}
	close(sender->fd);
	return NULL;
}

static void sender_start(struct sender *sender)
{
	if (sender->piece == 0)
		sender->piece = 100000;
	CHECK(pthread_create(&sender->thread, NULL, send_all, sender) == 0);
}

static void sender_join(struct sender *sender)
{
	CHECK(pthread_join(sender->thread, NULL) == 0);
}

static struct imgc_file *open_stream(const struct imgc_stream_options *options)
{
	struct imgc_file *file = NULL;

	CHECK_EQ(imgc_file_open_stream(options, &file, &error), IMGC_OK);
	CHECK(file->reads_wait);
	CHECK_EQ(imgc_file_is_open_ended(file), options->open_ended);
	return file;
}

static int read_at(struct imgc_file *file, void *out, uint64_t offset, uint64_t length)
{
	struct imgc_io_request request = {offset, out, length};

	return imgc_file_read(file, NULL, &request, 1, &error);
}

/* A read that waits, as the engine does it. */
static int read_waiting(struct imgc_file *file, void *out, uint64_t offset, uint64_t length)
{
	for (;;) {
		struct imgc_error err = {0};
		struct imgc_io_request request = {offset, out, length};
		int status = imgc_file_read(file, NULL, &request, 1, &err);

		if (status != IMGC_IO || err.os_errno != EAGAIN)
			return status;
	}
}

/* ------------------------------------------------------------------- turns */

struct turns {
	struct imgc_file *file;
	uint8_t *out;
	size_t piece, n_pieces;
	_Atomic size_t next;
};

static void *take_turns(void *argument)
{
	struct turns *turns = argument;

	for (;;) {
		size_t i = atomic_fetch_add(&turns->next, 1);

		if (i >= turns->n_pieces)
			return NULL;
		CHECK_EQ(read_waiting(turns->file, turns->out + i * turns->piece, i * turns->piece,
				      turns->piece),
			 IMGC_OK);
	}
}

/* Threads read pieces that alternate; the head, the rest and the tail are one stream. */
static void test_turns(enum kind kind, size_t n_head, uint32_t n_tail, size_t nbytes)
{
	uint8_t *content = malloc(nbytes + 1);
	struct turns turns = {.piece = 70001, .n_pieces = nbytes / 70001 + 3};
	struct sender sender = {.nbytes = nbytes, .pause_ns = 20000};
	uint8_t rest[IMGC_MAX_TAIL_NBYTES];
	uint64_t end = 1, disk = nbytes > n_tail ? nbytes - n_tail : 0;
	pthread_t threads[3];
	int ends[2];

	n_head = n_head < nbytes ? n_head : nbytes;
	turns.out = malloc(turns.piece * turns.n_pieces);
	CHECK(content && turns.out);
	fill_random(content, nbytes, 4);
	make_pair(kind, ends);
	sender.fd = ends[1];
	sender.bytes = content + n_head;
	sender.nbytes = nbytes - n_head;
	turns.file = open_stream(&(struct imgc_stream_options){
		.fd = ends[0],
		.head = content,
		.head_nbytes = n_head,
		.open_ended = 1,
		.tail_nbytes = n_tail,
	});
	CHECK_EQ(imgc_file_stream_end(turns.file, &end), 0);
	sender_start(&sender);
	for (int i = 0; i < 3; i++)
		CHECK(pthread_create(&threads[i], NULL, take_turns, &turns) == 0);
	for (int i = 0; i < 3; i++)
		CHECK(pthread_join(threads[i], NULL) == 0);
	sender_join(&sender);
	CHECK_EQ(imgc_file_stream_end(turns.file, &end), 1);
	CHECK_EQ(end, disk);
	CHECK_EQ(imgc_file_stream_position(turns.file), disk);
	CHECK(memcmp(turns.out, content, disk) == 0);
	for (size_t i = disk; i < turns.piece * turns.n_pieces; i++)
		CHECK_EQ(turns.out[i], 0);
	CHECK_EQ(imgc_file_stream_rest(turns.file, rest, sizeof(rest)), nbytes - disk);
	CHECK(memcmp(rest, content + disk, nbytes - disk) == 0);
	imgc_file_close(turns.file);
	close(ends[0]);
	free(turns.out);
	free(content);
}

static void test_waiting(enum kind kind)
{
	uint8_t out[10], rest[3];
	int ends[2];

	make_pair(kind, ends);
	struct imgc_file *file = open_stream(
		&(struct imgc_stream_options){.fd = ends[0], .head = "abc", .head_nbytes = 3});

	/* What was taken before and not read can be had back. */
	CHECK_EQ(imgc_file_stream_rest(file, rest, 2), 3);
	CHECK_EQ(imgc_file_stream_rest(file, rest, 3), 3);
	CHECK(memcmp(rest, "abc", 3) == 0);
	CHECK_EQ(read_at(file, out, 0, 0), IMGC_OK);
	CHECK_EQ(read_at(file, out, 0, 5), IMGC_IO);
	CHECK_EQ(error.os_errno, EAGAIN);
	/* It is not the turn of another read, not even of one at the position. */
	CHECK_EQ(read_at(file, out, 5, 2), IMGC_IO);
	CHECK_EQ(error.os_errno, EAGAIN);
	CHECK_EQ(read_at(file, out, 3, 1), IMGC_IO);
	CHECK(write(ends[1], "defgh", 5) == 5);
	CHECK_EQ(read_at(file, out, 0, 5), IMGC_OK);
	CHECK(memcmp(out, "abcde", 5) == 0);
	CHECK_EQ(read_at(file, out, 0, 5), IMGC_OUT_OF_RANGE);
	CHECK_EQ(read_at(file, out, 4, 1), IMGC_OUT_OF_RANGE);
	CHECK_EQ(read_at(file, out, UINT64_MAX, 2), IMGC_OUT_OF_RANGE);
	close(ends[1]);
	/* The disk is longer. */
	CHECK_EQ(read_at(file, out, 5, 4), IMGC_PAST_END);
	CHECK_EQ(error.offset, 8);
	CHECK_EQ(imgc_file_stream_position(file), 8);
	CHECK_EQ(imgc_file_stream_rest(file, rest, 3), 0);
	imgc_file_close(file);
	close(ends[0]);
}

static void test_other_calls(void)
{
	struct imgc_stream_options o = {.fd = -1};
	uint64_t start = 1, end = 2;
	struct imgc_file *file;
	uint8_t byte = 0;
	int ends[2];

	CHECK_EQ(imgc_file_open_stream(&o, &file, &error), IMGC_IO);
	CHECK_EQ(error.os_errno, EBADF);
	make_pair(PIPE, ends);
	o.fd = ends[0];
	o.tail_nbytes = IMGC_MAX_TAIL_NBYTES + 1;
	CHECK_EQ(imgc_file_open_stream(&o, &file, &error), IMGC_INVALID_ARGUMENT);
	o.tail_nbytes = 0;
	file = open_stream(&o);
	CHECK_EQ(imgc_file_put(file, &byte, 1, 0, &error), IMGC_UNSUPPORTED);
	CHECK_EQ(imgc_file_zero(file, 0, 1, &error), IMGC_UNSUPPORTED);
	CHECK_EQ(imgc_file_next_data(file, 0, &start, &end, &error), IMGC_UNSUPPORTED);
	CHECK_EQ(imgc_file_sync(file, &error), IMGC_OK);
	close(ends[0]);
	CHECK_EQ(read_at(file, &byte, 0, 1), IMGC_IO);
	CHECK_EQ(error.os_errno, EBADF);
	imgc_file_close(file);
	close(ends[1]);
	CHECK_EQ(imgc_file_open_null(&file), IMGC_OK);
	CHECK_EQ(imgc_file_is_open_ended(file), 0);
	CHECK_EQ(imgc_file_stream_end(file, &end), 0);
	CHECK_EQ(imgc_file_stream_position(file), 0);
	CHECK_EQ(imgc_file_stream_rest(file, &byte, 1), 0);
	imgc_file_close(file);
}

/* ---------------------------------------------------------------------- jobs */

struct outcome {
	uint8_t *bytes;
	struct imgc_placement *placements;
	uint8_t *leaves;
	size_t n_placements, n_leaves;
	uint64_t next;
};

static struct imgc_job_options options_for(const struct disk *target, struct imgc_file *source,
					   struct imgc_source_file *file, uint64_t guest_nbytes)
{
	struct disk from = {.file = source, .nbytes = guest_nbytes};
	struct disk to = *target;
	struct imgc_job_options o = convert_options(&from, &to, file, 1);

	o.checksum = IMGC_CHECKSUM_SHA256;
	o.next_offset = 4096;
	return o;
}

static void tell(struct imgc_job *job, uint64_t disk_nbytes, uint64_t size, bool *is_told)
{
	uint64_t found;

	if (*is_told || !imgc_job_found_end(job, &found))
		return;
	CHECK_EQ(found, disk_nbytes);
	if (found > 0)
		CHECK_EQ(imgc_job_set_guest_nbytes(job, found - 1), IMGC_INVALID_ARGUMENT);
	CHECK_EQ(imgc_job_set_guest_nbytes(job, size), IMGC_OK);
	CHECK_EQ(imgc_job_set_guest_nbytes(job, size), IMGC_INVALID_ARGUMENT);
	*is_told = true;
}

/* Runs batches of batch_nbytes until the disk ends, which has `size` bytes then. */
static void run(const struct imgc_job_options *o, uint64_t batch_nbytes, uint64_t disk_nbytes,
		uint64_t size, bool is_told, struct outcome *out)
{
	uint64_t block = o->geometry.block_nbytes, leaf = IMGC_CHECKSUM_BLOCK_NBYTES;
	uint64_t end = o->geometry.guest_nbytes;
	struct imgc_progress progress;
	struct imgc_job *job;

	out->n_placements = (size_t)(end / block + 1);
	out->n_leaves = (size_t)(end / leaf + 1);
	out->placements = calloc(out->n_placements, sizeof(*out->placements));
	out->leaves = calloc(out->n_leaves, IMGC_CHECKSUM_NBYTES);
	CHECK(out->placements && out->leaves);
	CHECK_EQ(imgc_job_create(o, &job, &error), IMGC_OK);
	for (uint64_t at = 0; at < end; at += batch_nbytes) {
		uint64_t stop = at + batch_nbytes < end ? at + batch_nbytes : end;
		struct imgc_extent row = data_row(at, stop - at, at);
		struct imgc_batch batch = {
			.guest_start = at,
			.guest_end = stop,
			.extents = &row,
			.n_extents = 1,
			.placements = out->placements + at / block,
			.n_placements = (size_t)((stop - at + block - 1) / block),
			.leaves = out->leaves + at / leaf * IMGC_CHECKSUM_NBYTES,
			.n_leaves = (size_t)((stop - at + leaf - 1) / leaf),
		};

		CHECK_EQ(imgc_job_start(job, &batch, &error), IMGC_OK);
		while (!imgc_job_wait(job, 10))
			tell(job, disk_nbytes, size, &is_told);
		CHECK_EQ(imgc_job_finish(job, &error), IMGC_OK);
		if (is_told)
			end = size;
	}
	CHECK(is_told);
	imgc_job_progress(job, &progress);
	CHECK_EQ(progress.bytes_done, size);
	CHECK_EQ(progress.bytes_read, o->sources->nbytes == size ? size : disk_nbytes);
	out->next = imgc_job_next_offset(job);
	imgc_job_destroy(job);
}

static void outcome_free(struct outcome *outcome)
{
	free(outcome->placements);
	free(outcome->leaves);
}

struct ending {
	uint64_t disk, size; /* bytes in the stream, and of the disk that it becomes */
	uint64_t block, batch;
	unsigned placing, codec, zero_policy;
};

static void set_geometry(struct imgc_job_options *o, const struct ending *c, unsigned n_threads)
{
	o->n_threads = n_threads;
	o->geometry.block_nbytes = c->block;
	o->geometry.stored_alignment = 512;
	o->geometry.placing = c->placing;
	o->geometry.zero_policy = c->zero_policy;
	o->geometry.sparse_nbytes = 4096;
	if (c->codec)
		o->geometry.codec = (struct imgc_codec_params){.codec = c->codec, .level = 1};
}

/*
 * A stream whose end is met gives what a disk of known size gives: the same bytes in the
 * target, the same places, leaves and next offset.
 */
static void test_ending(const struct ending *c, enum kind kind, unsigned n_threads)
{
	struct disk source = disk_create(c->size + 1);
	struct disk expected = disk_create(16 * MIB), target = disk_create(16 * MIB);
	struct outcome known = {0}, streamed = {0};
	struct imgc_source_file file;
	struct sender sender = {.bytes = source.bytes, .nbytes = c->disk};
	int ends[2];

	fill_random(source.bytes, c->disk / 3, 5);
	fill_text(source.bytes + c->disk / 2, c->disk - c->disk / 2, 6);
	memset(expected.bytes, 0xee, expected.nbytes);
	memset(target.bytes, 0xee, target.nbytes);
	if (c->size > 0) {
		struct imgc_job_options o = options_for(&expected, source.file, &file, c->size);

		set_geometry(&o, c, 1);
		run(&o, c->size, c->disk, c->size, true, &known);
	}
	make_pair(kind, ends);
	sender.fd = ends[1];
	struct imgc_file *stream =
		open_stream(&(struct imgc_stream_options){.fd = ends[0], .open_ended = 1});
	struct imgc_job_options o = options_for(&target, stream, &file, 64 * MIB);

	set_geometry(&o, c, n_threads);
	sender_start(&sender);
	run(&o, c->batch, c->disk, c->size, false, &streamed);
	sender_join(&sender);
	CHECK(memcmp(expected.bytes, target.bytes, target.nbytes) == 0);
	if (c->size > 0) {
		size_t n_leaves = (size_t)((c->size - 1) / IMGC_CHECKSUM_BLOCK_NBYTES + 1);

		CHECK_EQ(known.next, streamed.next);
		CHECK(memcmp(known.leaves, streamed.leaves, n_leaves * IMGC_CHECKSUM_NBYTES) == 0);
	}
	if (c->size > 0 && c->placing == IMGC_PLACE_APPEND)
		CHECK(memcmp(known.placements, streamed.placements,
			     ((c->size - 1) / c->block + 1) * sizeof(*known.placements)) == 0);
	imgc_file_close(stream);
	close(ends[0]);
	outcome_free(&known);
	outcome_free(&streamed);
	disk_destroy(&source);
	disk_destroy(&expected);
	disk_destroy(&target);
}

static void test_endings(void)
{
	static const uint64_t disks[] = {0,	      1,       511,	    256 * KIB,
					 MIB - 1,     MIB,     MIB + 1,	    2 * MIB + 700,
					 3 * MIB - 1, 4 * MIB, 4 * MIB + 5, 5 * MIB + 300000};
	static const struct ending kinds[] = {
		{.block = 64 * KIB, .batch = MIB, .placing = IMGC_PLACE_IDENTITY},
		{.block = 64 * KIB,
		 .batch = 2 * MIB,
		 .placing = IMGC_PLACE_IDENTITY,
		 .zero_policy = IMGC_ZERO_EXPLICIT},
		{.block = 64 * KIB,
		 .batch = 2 * MIB,
		 .placing = IMGC_PLACE_IDENTITY,
		 .zero_policy = IMGC_ZERO_STORE},
		{.block = 64 * KIB, .batch = MIB, .placing = IMGC_PLACE_APPEND},
		{.block = 64 * KIB,
		 .batch = MIB,
		 .placing = IMGC_PLACE_APPEND,
		 .codec = IMGC_CODEC_ZSTD},
		{.block = 2 * MIB, .batch = 2 * MIB, .placing = IMGC_PLACE_APPEND},
		{.block = 4 * MIB,
		 .batch = 8 * MIB,
		 .placing = IMGC_PLACE_APPEND,
		 .zero_policy = IMGC_ZERO_EXPLICIT},
	};
	unsigned n = 0;

	for (size_t i = 0; i < sizeof(kinds) / sizeof(kinds[0]); i++) {
		for (size_t j = 0; j < sizeof(disks) / sizeof(disks[0]); j++) {
			static const uint64_t units[] = {1, 512, MIB};
			struct ending c = kinds[i];
			uint64_t unit = units[n % 3];

			c.disk = disks[j];
			c.size = (c.disk + unit - 1) / unit * unit;
			test_ending(&c, n % N_KINDS, n % 4 + 1);
			n++;
		}
	}
}

struct waiting_job {
	struct disk target;
	struct imgc_source_file file;
	struct imgc_file *stream;
	struct imgc_job *job;
	struct imgc_extent row;
	struct imgc_batch batch;
	int ends[2];
};

static void waiting_start(struct waiting_job *w, enum kind kind, unsigned n_threads, bool is_open,
			  const void *bytes, size_t nbytes)
{
	struct disk from = {.nbytes = 8 * MIB};

	*w = (struct waiting_job){.target = disk_create(8 * MIB)};
	make_pair(kind, w->ends);
	CHECK(nbytes == 0 || write(w->ends[1], bytes, nbytes) == (ssize_t)nbytes);
	from.file = w->stream =
		open_stream(&(struct imgc_stream_options){.fd = w->ends[0], .open_ended = is_open});
	struct imgc_job_options o = convert_options(&from, &w->target, &w->file, n_threads);

	o.geometry.placing = IMGC_PLACE_IDENTITY;
	w->row = data_row(0, 8 * MIB, 0);
	w->batch = (struct imgc_batch){.guest_end = 8 * MIB, .extents = &w->row, .n_extents = 1};
	CHECK_EQ(imgc_job_create(&o, &w->job, &error), IMGC_OK);
	CHECK_EQ(imgc_job_start(w->job, &w->batch, &error), IMGC_OK);
}

static void waiting_end(struct waiting_job *w)
{
	imgc_job_destroy(w->job);
	imgc_file_close(w->stream);
	close(w->ends[0]);
	disk_destroy(&w->target);
}

/* Nobody writes: the calling thread comes back, and cancels. */
static void test_cancel(enum kind kind, unsigned n_threads, size_t nbytes)
{
	static const uint8_t bytes[4096];
	struct waiting_job w;

	waiting_start(&w, kind, n_threads, true, bytes, nbytes);
	for (int i = 0; i < 3; i++)
		CHECK_EQ(imgc_job_wait(w.job, 30), 0);
	imgc_job_cancel(w.job);
	CHECK_EQ(imgc_job_finish(w.job, &error), IMGC_CANCELLED);
	close(w.ends[1]);
	waiting_end(&w);
}

/* The size is never told. */
static void test_cancel_at_the_end(unsigned n_threads)
{
	struct waiting_job w;
	uint64_t found = 0;

	waiting_start(&w, PIPE, n_threads, true, "1234", 4);
	close(w.ends[1]);
	while (!imgc_job_found_end(w.job, &found))
		CHECK_EQ(imgc_job_wait(w.job, 30), 0);
	CHECK_EQ(found, 4);
	CHECK_EQ(imgc_job_wait(w.job, 30), 0);
	CHECK_EQ(imgc_job_wait(w.job, 30), 0);
	imgc_job_cancel(w.job);
	CHECK_EQ(imgc_job_finish(w.job, &error), IMGC_CANCELLED);
	waiting_end(&w);
}

/* A stream that is too short, and one that cannot be read on, are errors of the source. */
static void test_failures(unsigned n_threads)
{
	static const uint8_t bytes[4096];
	struct waiting_job w;

	waiting_start(&w, PIPE, n_threads, false, bytes, sizeof(bytes));
	close(w.ends[1]);
	while (!imgc_job_wait(w.job, 30))
		;
	CHECK_EQ(imgc_job_finish(w.job, &error), IMGC_PAST_END);
	CHECK_EQ(error.source, 0);
	CHECK_EQ(error.offset, sizeof(bytes));
	waiting_end(&w);

	waiting_start(&w, SOCKET, n_threads, true, bytes, sizeof(bytes));
	/* What was sent to the other end and not read resets the connection. */
	CHECK(write(w.ends[0], bytes, 10) == 10);
	close(w.ends[1]);
	while (!imgc_job_wait(w.job, 30))
		;
	CHECK_EQ(imgc_job_finish(w.job, &error), IMGC_IO);
	CHECK_EQ(error.os_errno, ECONNRESET);
	CHECK_EQ(error.source, 0);
	waiting_end(&w);
}

int main(void)
{
	for (enum kind kind = PIPE; kind < N_KINDS; kind++) {
		test_waiting(kind);
		test_turns(kind, 0, 0, 3 * MIB + 17);
		test_turns(kind, 300000, 0, MIB);
		test_turns(kind, 300000, 512, MIB + 1);
		test_turns(kind, 100, 512, 140002);
		test_turns(kind, 700, 512, 140002 + 512);
		test_turns(kind, 0, 4096, 140002 + 100);
		for (size_t n = 0; n < 5; n++)
			test_turns(kind, n * 300, 512, n * 300);
		for (unsigned n_threads = 1; n_threads < 5; n_threads += 2) {
			test_cancel(kind, n_threads, 0);
			test_cancel(kind, n_threads, 4096);
		}
	}
	test_other_calls();
	test_endings();
	for (unsigned n_threads = 1; n_threads < 5; n_threads++) {
		test_cancel_at_the_end(n_threads);
		test_failures(n_threads);
	}
	return 0;
}
