/*
 * stream.c - a pipe, a socket or any other descriptor, read from start to end
 *
 * Each byte comes once, so reads take turns: the one that goes on where the last one ended
 * is next.  A read waits for its turn and for bytes, but only for a moment: then it is
 * IMGC_IO with EAGAIN, and the same read again goes on where it stopped.
 */
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "common/checked.h"
#include "common/error.h"
#include "io/io.h"

#define READ_WAIT_MS 20 /* so that a cancelled job ends soon */

/* Linux moves at most 0x7ffff000 bytes a call; this is a round number below that. */
#define STREAM_MAX_PIECE ((uint64_t)1 << 30)

#define MS_NS 1000000

#define NO_PART UINT64_MAX

struct stream_file {
	struct imgc_file base;
	int fd;
	bool is_socket;
	bool is_open_ended;
	size_t tail_nbytes;   /* bytes at the end of the stream that are no part of the disk */
	pthread_mutex_t lock; /* of the next six; only the reader whose turn it is sets them */
	pthread_cond_t turn;
	bool is_busy;
	uint64_t position; /* where the next read begins */
	uint64_t part;	   /* start of a read that EAGAIN has ended in the middle, or NO_PART */
	bool has_ended;
	uint64_t disk_end;   /* once it has ended */
	uint8_t *owned_head; /* bytes that were read before the file was opened */
	const uint8_t *head; /* what is left of them */
	uint64_t head_nbytes;
	uint8_t tail[IMGC_MAX_TAIL_NBYTES]; /* the last bytes so far, which may be the tail */
	size_t tail_held;
};

/* -------------------------------------------------------------------- time */

static struct timespec after_ms(long ms)
{
	struct timespec until;

	clock_gettime(CLOCK_MONOTONIC, &until);
	until.tv_nsec += ms * MS_NS;
	if (until.tv_nsec >= 1000 * MS_NS) {
		until.tv_sec++;
		until.tv_nsec -= 1000 * MS_NS;
	}
	return until;
}

/* Whole milliseconds until then, or a negative number once it has passed. */
static long ms_until(const struct timespec *until)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	long ns = (until->tv_sec - now.tv_sec) * 1000 * MS_NS + (until->tv_nsec - now.tv_nsec);

	return ns < 0 ? -1 : ns / MS_NS;
}

/* ------------------------------------------------------------------- bytes */

static ssize_t take_head(struct stream_file *file, const struct iovec *iov, int n)
{
	size_t done = 0;

	for (int i = 0; i < n; i++) {
		size_t piece = (size_t)imgc_min_u64(iov[i].iov_len, file->head_nbytes);

		if (piece)
			memcpy(iov[i].iov_base, file->head, piece);
		file->head += piece;
		file->head_nbytes -= piece;
		done += piece;
	}
	return (ssize_t)done;
}

static ssize_t receive(const struct stream_file *file, struct iovec *iov, int n)
{
	struct msghdr message = {.msg_iov = iov, .msg_iovlen = (size_t)n};

	if (file->is_socket)
		return recvmsg(file->fd, &message, MSG_DONTWAIT);
	return readv(file->fd, iov, n);
}

/* Waits until a read of the descriptor cannot wait, or until then: IMGC_IO with EAGAIN. */
static int await_bytes(const struct stream_file *file, const struct timespec *until,
		       struct imgc_error *err)
{
	for (;;) {
		struct pollfd wanted = {.fd = file->fd, .events = POLLIN};
		long ms = ms_until(until);
		int ready = ms < 0 ? 0 : poll(&wanted, 1, (int)ms);

		if (ready > 0 && !(wanted.revents & POLLNVAL))
			return IMGC_OK;
		if (ready == 0)
			return imgc_fail_system(err, EAGAIN, file->position, "read");
		if (ready > 0 || errno != EINTR)
			return imgc_fail_system(err, ready > 0 ? EBADF : errno, file->position,
						"read");
	}
}

/* Reads some bytes into the entries, which are not all empty; *got is 0 at the end. */
static int pull(struct stream_file *file, struct iovec *iov, int n, const struct timespec *until,
		size_t *got, struct imgc_error *err)
{
	if (file->head_nbytes > 0) {
		*got = (size_t)take_head(file, iov, n);
		return IMGC_OK;
	}
	for (;;) {
		int status = await_bytes(file, until, err);

		if (status)
			return status;
		ssize_t done = receive(file, iov, n);

		if (done >= 0) {
			*got = (size_t)done;
			return IMGC_OK;
		}
		/* EAGAIN: somebody else has taken what was there. */
		if (errno != EINTR && errno != EAGAIN && errno != EWOULDBLOCK)
			return imgc_fail_system(err, errno, file->position, "read");
	}
}

/* Fills what is held back: the stream's first bytes.  Fewer if it has no more. */
static int hold_tail(struct stream_file *file, const struct timespec *until, struct imgc_error *err)
{
	while (file->tail_held < file->tail_nbytes) {
		struct iovec iov = {file->tail + file->tail_held,
				    file->tail_nbytes - file->tail_held};
		size_t got;
		int status = pull(file, &iov, 1, until, &got, err);

		if (status || got == 0)
			return status;
		file->tail_held += got;
	}
	return IMGC_OK;
}

/*
 * Moves the bytes that are held back to `out`, and reads as many after them as `out` has
 * room for; the last ones of all are then held back instead.  *got is how many of `out`
 * were filled; 0: the stream has ended.
 */
static int pull_before_tail(struct stream_file *file, uint8_t *out, size_t room,
			    const struct timespec *until, size_t *got, struct imgc_error *err)
{
	size_t held = file->tail_nbytes;
	uint8_t both[2 * IMGC_MAX_TAIL_NBYTES], next[IMGC_MAX_TAIL_NBYTES];
	bool is_small = room < held;
	/* A small part is put together elsewhere. */
	uint8_t *place = is_small ? both : out;
	size_t behind = is_small ? room : room - held;
	struct iovec iov[2] = {{place + held, behind}, {next, is_small ? 0 : held}};
	int status = pull(file, iov, 2, until, got, err);

	if (status || *got == 0)
		return status;
	memcpy(place, file->tail, held);
	if (*got <= behind) {
		memcpy(file->tail, place + *got, held);
	} else {
		size_t in_next = *got - behind;

		memcpy(file->tail, place + *got, held - in_next);
		memcpy(file->tail + held - in_next, next, in_next);
	}
	if (is_small)
		memcpy(out, both, *got);
	return IMGC_OK;
}

/* Reads some bytes of the disk; *got is 0 at its end. */
static int pull_disk(struct stream_file *file, uint8_t *out, size_t room,
		     const struct timespec *until, size_t *got, struct imgc_error *err)
{
	struct iovec iov = {out, room};

	*got = 0;
	if (file->tail_nbytes == 0)
		return pull(file, &iov, 1, until, got, err);
	int status = hold_tail(file, until, err);

	if (status || file->tail_held < file->tail_nbytes)
		return status;
	return pull_before_tail(file, out, room, until, got, err);
}

/* ------------------------------------------------------------------- turns */

static bool is_next(const struct stream_file *file, uint64_t offset)
{
	return !file->is_busy && offset == (file->part == NO_PART ? file->position : file->part);
}

static bool is_gone(const struct stream_file *file, uint64_t offset)
{
	return offset < file->position && offset != file->part;
}

/* Waits until nobody else reads, and the byte at `offset` is the next one. */
static int take_turn(struct stream_file *file, uint64_t offset, const struct timespec *until,
		     struct imgc_error *err)
{
	int status = IMGC_OK;

	pthread_mutex_lock(&file->lock);
	while (status == IMGC_OK && !is_next(file, offset)) {
		if (is_gone(file, offset))
			status = imgc_fail_at(err, IMGC_OUT_OF_RANGE, offset, "read");
		else if (pthread_cond_timedwait(&file->turn, &file->lock, until))
			status = imgc_fail_system(err, EAGAIN, offset, "read");
	}
	if (status == IMGC_OK)
		file->is_busy = true;
	pthread_mutex_unlock(&file->lock);
	return status;
}

static void end_turn(struct stream_file *file, uint64_t position, uint64_t part)
{
	pthread_mutex_lock(&file->lock);
	file->is_busy = false;
	file->position = position;
	file->part = part;
	pthread_cond_broadcast(&file->turn);
	pthread_mutex_unlock(&file->lock);
}

static void note_end(struct stream_file *file, uint64_t disk_end)
{
	pthread_mutex_lock(&file->lock);
	file->has_ended = true;
	file->disk_end = disk_end;
	pthread_mutex_unlock(&file->lock);
}

/* Reads from the position on, which it moves, up to the end of the request or stream. */
static int read_on(struct stream_file *file, const struct imgc_io_request *request,
		   uint64_t *position, const struct timespec *until, struct imgc_error *err)
{
	uint64_t end = request->offset + request->length;

	while (*position < end && !file->has_ended) {
		uint8_t *out = (uint8_t *)request->buffer + (*position - request->offset);
		size_t room = (size_t)imgc_min_u64(end - *position, STREAM_MAX_PIECE), got;
		int status = pull_disk(file, out, room, until, &got, err);

		if (status)
			return status;
		*position += got;
		if (got == 0)
			note_end(file, *position);
	}
	return IMGC_OK;
}

static int stream_read(struct imgc_file *base, struct imgc_io_context *ctx,
		       const struct imgc_io_request *requests, size_t n, struct imgc_error *err)
{
	struct stream_file *file = (struct stream_file *)base;
	struct timespec until = after_ms(READ_WAIT_MS);
	struct imgc_error unused;

	(void)ctx;
	err = err ? err : &unused;
	if (n == 0 || requests->length == 0)
		return IMGC_OK;
	if (n > 1 || !imgc_range_inside(requests->offset, requests->length, INT64_MAX))
		return imgc_fail_at(err, IMGC_OUT_OF_RANGE, requests->offset, "read");
	int status = take_turn(file, requests->offset, &until, err);

	if (status)
		return status;
	uint64_t end = requests->offset + requests->length, at = file->position;

	status = read_on(file, requests, &at, &until, err);
	if (status) {
		end_turn(file, at, at > requests->offset ? requests->offset : NO_PART);
		return status;
	}
	if (at < end && !file->is_open_ended)
		status = imgc_fail_at(err, IMGC_PAST_END, at, "read");
	else if (at < end)
		memset((uint8_t *)requests->buffer + (at - requests->offset), 0, end - at);
	end_turn(file, end, NO_PART);
	return status;
}

/* ------------------------------------------------------------------- others */

static int stream_write(struct imgc_file *base, const struct iovec *iov, int n_iov, uint64_t offset,
			struct imgc_error *err)
{
	(void)base;
	(void)iov;
	(void)n_iov;
	(void)offset;
	return imgc_fail_call(err, IMGC_UNSUPPORTED, "write");
}

static int stream_zero(struct imgc_file *base, uint64_t offset, uint64_t length,
		       struct imgc_error *err)
{
	(void)base;
	(void)offset;
	(void)length;
	return imgc_fail_call(err, IMGC_UNSUPPORTED, "zero");
}

static int stream_sync(struct imgc_file *base, struct imgc_error *err)
{
	(void)base;
	(void)err;
	return IMGC_OK;
}

static int stream_next_data(struct imgc_file *base, uint64_t offset, uint64_t *start, uint64_t *end,
			    struct imgc_error *err)
{
	(void)base;
	(void)offset;
	(void)start;
	(void)end;
	return imgc_fail_call(err, IMGC_UNSUPPORTED, "next_data");
}

static void stream_close(struct imgc_file *base)
{
	struct stream_file *file = (struct stream_file *)base;

	pthread_cond_destroy(&file->turn);
	pthread_mutex_destroy(&file->lock);
	free(file->owned_head);
	free(file);
}

static const struct imgc_file_ops stream_file_ops = {
	.read = stream_read,
	.write = stream_write,
	.zero = stream_zero,
	.sync = stream_sync,
	.next_data = stream_next_data,
	.close = stream_close,
};

/* NULL if it is of another kind. */
static struct stream_file *stream_of(struct imgc_file *base)
{
	return base->ops == &stream_file_ops ? (struct stream_file *)base : NULL;
}

int imgc_file_is_open_ended(const struct imgc_file *base)
{
	return base->ops == &stream_file_ops && ((const struct stream_file *)base)->is_open_ended;
}

int imgc_file_stream_end(struct imgc_file *base, uint64_t *disk_end)
{
	struct stream_file *file = stream_of(base);

	if (!file)
		return 0;
	pthread_mutex_lock(&file->lock);
	bool has_ended = file->has_ended;

	if (has_ended)
		*disk_end = file->disk_end;
	pthread_mutex_unlock(&file->lock);
	return has_ended;
}

uint64_t imgc_file_stream_position(struct imgc_file *base)
{
	struct stream_file *file = stream_of(base);

	if (!file)
		return 0;
	return file->has_ended ? file->disk_end : file->position;
}

uint64_t imgc_file_stream_rest(struct imgc_file *base, void *out, uint64_t capacity)
{
	struct stream_file *file = stream_of(base);

	if (!file)
		return 0;
	uint64_t nbytes = file->tail_held + file->head_nbytes;

	if (nbytes <= capacity && file->tail_held > 0)
		memcpy(out, file->tail, file->tail_held);
	if (nbytes <= capacity && file->head_nbytes > 0)
		memcpy((uint8_t *)out + file->tail_held, file->head, file->head_nbytes);
	return nbytes;
}

/* ------------------------------------------------------------------- open */

static int create_turns(struct stream_file *file)
{
	pthread_condattr_t attributes;

	if (pthread_condattr_init(&attributes))
		return IMGC_NO_MEMORY;
	pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
	int failed = pthread_cond_init(&file->turn, &attributes);

	pthread_condattr_destroy(&attributes);
	if (failed)
		return IMGC_NO_MEMORY;
	if (pthread_mutex_init(&file->lock, NULL)) {
		pthread_cond_destroy(&file->turn);
		return IMGC_NO_MEMORY;
	}
	return IMGC_OK;
}

static int keep_head(struct stream_file *file, const struct imgc_stream_options *options)
{
	if (options->head_nbytes == 0)
		return IMGC_OK;
	file->owned_head = malloc(options->head_nbytes);
	if (!file->owned_head)
		return IMGC_NO_MEMORY;
	memcpy(file->owned_head, options->head, options->head_nbytes);
	file->head = file->owned_head;
	file->head_nbytes = options->head_nbytes;
	return IMGC_OK;
}

int imgc_file_open_stream(const struct imgc_stream_options *options, struct imgc_file **out,
			  struct imgc_error *err)
{
	struct stat st;

	if (options->tail_nbytes > IMGC_MAX_TAIL_NBYTES)
		return imgc_fail_call(err, IMGC_INVALID_ARGUMENT, "open");
	if (fstat(options->fd, &st))
		return imgc_fail_system(err, errno, 0, "open");
	struct stream_file *file = calloc(1, sizeof(*file));

	if (!file)
		return imgc_fail_call(err, IMGC_NO_MEMORY, "open");
	file->base.ops = &stream_file_ops;
	file->base.reads_wait = true;
	file->fd = options->fd;
	file->is_socket = S_ISSOCK(st.st_mode);
	file->is_open_ended = options->open_ended;
	file->tail_nbytes = options->tail_nbytes;
	file->part = NO_PART;
	int status = keep_head(file, options);

	if (status == IMGC_OK)
		status = create_turns(file);
	if (status) {
		free(file->owned_head);
		free(file);
		return imgc_fail_call(err, status, "open");
	}
	*out = &file->base;
	return IMGC_OK;
}
