/*
 * direct.c - reads and writes past the page cache (O_DIRECT)
 *
 * The kernel takes whole sectors from and to aligned memory.  Where memory is not aligned
 * as the file is, bytes are copied by way of a buffer.
 */
#include "io/direct.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "common/checked.h"
#include "common/error.h"
#include "io/fd.h"
#include "io/uring.h"

/* No device needs more of memory than a page's alignment. */
#define MEMORY_UNIT_NBYTES ((uint64_t)4096)
/* A file that needs larger units than this is not for direct requests. */
#define MAX_UNIT_NBYTES ((uint64_t)256 << 10)
#define BUFFER_NBYTES ((uint64_t)1 << 20)
/*
 * A shorter request that waits for the device alone is slower than the page cache, which
 * reads ahead, and gathers writes.
 */
#define MIN_ALONE_NBYTES ((uint64_t)64 << 10)
#define MAX_REQUESTS 64
#define MAX_IOV 128
#define FETCHED_PART_NBYTES ((uint64_t)64 << 10)
/* Linux moves at most 0x7ffff000 bytes a call; this is a round number below that. */
#define MAX_PIECE ((uint64_t)1 << 30)

struct fetched {
	uint64_t n_parts;
	_Atomic uint8_t bits[];
};

struct imgc_direct {
	int direct_fd, fd;
	uint64_t unit;
	_Atomic bool is_refused; /* the file system takes no such requests after all */
	pthread_mutex_t lock;	 /* held while `fetched` is made */
	/*
	 * A bit for each part of the file that the kernel fetches into the page cache; NULL:
	 * none.  Made once, and then never another one.
	 */
	_Atomic(struct fetched *) fetched;
};

/*
 * Memory for a copy of up to `nbytes` bytes, which are whole units.  A file that is not
 * in use has none: there may be many.  The caller frees it; NULL without memory.
 */
static uint8_t *make_buffer(uint64_t nbytes)
{
	return aligned_alloc(MEMORY_UNIT_NBYTES, (size_t)imgc_min_u64(nbytes, BUFFER_NBYTES));
}

/* ---------------------------------------------------------- create, destroy */

/* What the file system says of its alignment; false if it takes no direct requests. */
static bool ask_alignment(int fd, uint64_t *unit)
{
#ifdef STATX_DIOALIGN
	struct statx found;

	if (statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &found) == 0 &&
	    found.stx_mask & STATX_DIOALIGN) {
		*unit = imgc_max_u64(*unit, found.stx_dio_offset_align);
		return found.stx_dio_offset_align != 0 &&
		       found.stx_dio_mem_align <= MEMORY_UNIT_NBYTES;
	}
#endif
	(void)fd;
	(void)unit;
	return true;
}

static bool is_refusal(int os_errno)
{
	return os_errno == EINVAL || os_errno == EOPNOTSUPP;
}

/* Reads the first unit, since some file systems refuse a read that they could open for. */
static int try_reading(struct imgc_direct *direct)
{
	uint8_t *buffer = make_buffer(direct->unit);
	int status = IMGC_OK;

	if (!buffer)
		return IMGC_NO_MEMORY;
	if (pread(direct->direct_fd, buffer, (size_t)direct->unit, 0) < 0 && is_refusal(errno))
		status = IMGC_UNSUPPORTED;
	free(buffer);
	return status;
}

int imgc_direct_create(int direct_fd, int fd, uint64_t sector_nbytes, struct imgc_direct **out,
		       struct imgc_error *err)
{
	uint64_t unit = imgc_max_u64((uint64_t)sysconf(_SC_PAGESIZE), MEMORY_UNIT_NBYTES);

	unit = imgc_max_u64(unit, sector_nbytes);
	if (!ask_alignment(direct_fd, &unit) || !imgc_is_power_of_two(unit) ||
	    unit > MAX_UNIT_NBYTES)
		return imgc_fail_call(err, IMGC_UNSUPPORTED, "direct");
	struct imgc_direct *direct = calloc(1, sizeof(*direct));

	if (!direct || pthread_mutex_init(&direct->lock, NULL)) {
		free(direct);
		return imgc_fail_call(err, IMGC_NO_MEMORY, "direct");
	}
	direct->direct_fd = direct_fd;
	direct->fd = fd;
	direct->unit = unit;
	atomic_init(&direct->is_refused, false);
	atomic_init(&direct->fetched, NULL);
	int status = try_reading(direct);

	if (status) {
		imgc_direct_destroy(direct);
		return imgc_fail_call(err, status, "direct");
	}
	*out = direct;
	return IMGC_OK;
}

void imgc_direct_destroy(struct imgc_direct *direct)
{
	if (!direct)
		return;
	free(atomic_load(&direct->fetched));
	pthread_mutex_destroy(&direct->lock);
	free(direct);
}

static bool is_refused(const struct imgc_direct *direct)
{
	return atomic_load_explicit(&direct->is_refused, memory_order_relaxed);
}

static bool is_aligned(const void *memory)
{
	return ((uintptr_t)memory & (MEMORY_UNIT_NBYTES - 1)) == 0;
}

/* A multiple of the unit at or after the offset, which is at most INT64_MAX. */
static uint64_t align_up(const struct imgc_direct *direct, uint64_t offset)
{
	return imgc_align_down(offset + direct->unit - 1, direct->unit);
}

/* ------------------------------------------------- what the kernel fetches */

/* NULL if there is no memory.  Pages of it that nobody sets bits in take none. */
static struct fetched *make_fetched(struct imgc_direct *direct, uint64_t file_nbytes)
{
	uint64_t n_parts = file_nbytes / FETCHED_PART_NBYTES + 1;

	pthread_mutex_lock(&direct->lock);
	struct fetched *fetched = atomic_load(&direct->fetched);

	if (!fetched) {
		fetched = calloc(1, sizeof(*fetched) + (size_t)(n_parts / 8 + 1));
		if (fetched)
			fetched->n_parts = n_parts;
		atomic_store(&direct->fetched, fetched);
	}
	pthread_mutex_unlock(&direct->lock);
	return fetched;
}

bool imgc_direct_note_fetched(struct imgc_direct *direct, uint64_t offset, uint64_t length,
			      uint64_t file_nbytes)
{
	struct fetched *fetched = atomic_load(&direct->fetched);

	if (!fetched)
		fetched = make_fetched(direct, file_nbytes);
	if (!fetched || length == 0)
		return false;
	for (uint64_t part = offset / FETCHED_PART_NBYTES;
	     part <= (offset + length - 1) / FETCHED_PART_NBYTES && part < fetched->n_parts; part++)
		atomic_fetch_or(&fetched->bits[part / 8], (uint8_t)(1u << part % 8));
	return true;
}

/* Whether any of the request's bytes may be there. */
static bool is_fetched(const struct imgc_direct *direct, const struct imgc_io_request *request)
{
	const struct fetched *fetched = atomic_load(&direct->fetched);

	if (!fetched || request->length == 0)
		return false;
	for (uint64_t part = request->offset / FETCHED_PART_NBYTES;
	     part <= (request->offset + request->length - 1) / FETCHED_PART_NBYTES &&
	     part < fetched->n_parts;
	     part++)
		if (atomic_load(&fetched->bits[part / 8]) & (1u << part % 8))
			return true;
	return false;
}

/* ------------------------------------------------------------------ reading */

static int read_cached(const struct imgc_direct *direct, struct imgc_io_context *ctx,
		       const struct imgc_io_request *requests, size_t n, struct imgc_error *err)
{
#ifdef IMGC_HAVE_URING
	if (ctx && n > 1)
		return imgc_uring_read(ctx, direct->fd, requests, n, err);
#endif
	(void)ctx;
	return imgc_fd_read(direct->fd, requests, n, err);
}

/* Reads [offset, offset + length) by way of a buffer, in whole units. */
static int copy_out(struct imgc_direct *direct, uint8_t *out, uint64_t offset, uint64_t length,
		    struct imgc_error *err)
{
	int status = IMGC_OK;

	if (length == 0)
		return IMGC_OK;
	uint8_t *buffer = make_buffer(align_up(direct, offset + length) -
				      imgc_align_down(offset, direct->unit));

	if (!buffer)
		return imgc_fail_call(err, IMGC_NO_MEMORY, "pread");
	while (length != 0 && status == IMGC_OK) {
		uint64_t from = imgc_align_down(offset, direct->unit);
		uint64_t until = align_up(direct, offset + length);
		uint64_t wanted = imgc_min_u64(until - from, BUFFER_NBYTES);
		ssize_t got = pread(direct->direct_fd, buffer, (size_t)wanted, (off_t)from);

		if (got < 0 && errno == EINTR)
			continue;
		if (got < 0 && is_refusal(errno))
			atomic_store(&direct->is_refused, true);
		else if (got < 0)
			status = imgc_fail_system(err, errno, offset, "pread");
		if (status == IMGC_OK && (got < 0 || (uint64_t)got <= offset - from)) {
			/* Refused, or the file ends here, which this read says better. */
			struct imgc_io_request rest = {offset, out, length};

			status = read_cached(direct, NULL, &rest, 1, err);
			break;
		}
		if (status)
			break;
		uint64_t within = offset - from;
		uint64_t taken = imgc_min_u64((uint64_t)got - within, length);

		memcpy(out, buffer + within, taken);
		out += taken;
		offset += taken;
		length -= taken;
	}
	free(buffer);
	return status;
}

/*
 * The part of the request that needs no copy: whole units to aligned memory.  Its length
 * is 0 if there is none.
 */
static struct imgc_io_request straight_part(const struct imgc_direct *direct,
					    const struct imgc_io_request *request)
{
	uint64_t start = align_up(direct, request->offset);
	uint64_t end = imgc_align_down(request->offset + request->length, direct->unit);
	struct imgc_io_request part = {.offset = start};

	if (start >= end)
		return part;
	part.buffer = (uint8_t *)request->buffer + (start - request->offset);
	if (is_aligned(part.buffer))
		part.length = end - start;
	return part;
}

static int read_straight(struct imgc_direct *direct, struct imgc_io_context *ctx,
			 const struct imgc_io_request *parts, size_t n, struct imgc_error *err)
{
	struct imgc_error found;
	int status;

	if (n == 0)
		return IMGC_OK;
#ifdef IMGC_HAVE_URING
	if (ctx && n > 1)
		status = imgc_uring_read(ctx, direct->direct_fd, parts, n, &found);
	else
#endif
		status = imgc_fd_read(direct->direct_fd, parts, n, &found);
	if (status == IMGC_IO && is_refusal(found.os_errno))
		atomic_store(&direct->is_refused, true);
	else if (status != IMGC_PAST_END) {
		if (status && err)
			*err = found;
		return status;
	}
	return read_cached(direct, ctx, parts, n, err);
}

/* Reads at most MAX_REQUESTS requests. */
static int read_some(struct imgc_direct *direct, struct imgc_io_context *ctx,
		     const struct imgc_io_request *requests, size_t n, struct imgc_error *err)
{
	struct imgc_io_request straight[MAX_REQUESTS], rest[MAX_REQUESTS];
	size_t n_straight = 0, n_rest = 0;
	int status = IMGC_OK;

	for (size_t i = 0; i < n && status == IMGC_OK; i++) {
		const struct imgc_io_request *request = &requests[i];
		struct imgc_io_request part = straight_part(direct, request);

		if ((!ctx && n > 1 && request->length < MIN_ALONE_NBYTES) ||
		    is_fetched(direct, request)) {
			rest[n_rest++] = *request;
			continue;
		}
		if (part.length == 0) {
			status = copy_out(direct, request->buffer, request->offset, request->length,
					  err);
			continue;
		}
		uint64_t before = part.offset - request->offset;
		uint64_t until = before + part.length;

		straight[n_straight++] = part;
		status = copy_out(direct, request->buffer, request->offset, before, err);
		if (status == IMGC_OK)
			status = copy_out(direct, (uint8_t *)request->buffer + until,
					  request->offset + until, request->length - until, err);
	}
	if (status == IMGC_OK)
		status = read_straight(direct, ctx, straight, n_straight, err);
	return status ? status : read_cached(direct, ctx, rest, n_rest, err);
}

int imgc_direct_read(struct imgc_direct *direct, struct imgc_io_context *ctx,
		     const struct imgc_io_request *requests, size_t n, struct imgc_error *err)
{
	for (size_t i = 0; i < n; i++)
		if (!imgc_range_inside(requests[i].offset, requests[i].length, INT64_MAX))
			return imgc_fail_at(err, IMGC_PAST_END, requests[i].offset, "pread");
	for (size_t i = 0; i < n; i += MAX_REQUESTS) {
		size_t count = (size_t)imgc_min_u64(n - i, MAX_REQUESTS);
		int status = is_refused(direct) ? read_cached(direct, ctx, requests + i, count, err)
						: read_some(direct, ctx, requests + i, count, err);

		if (status)
			return status;
	}
	return IMGC_OK;
}

/* ------------------------------------------------------------------ writing */

/* Where a write has got to. */
struct cursor {
	const struct iovec *iov;
	size_t within; /* the first entry */
	uint64_t offset;
};

/*
 * Gives the next bytes, at most `length` of them and MAX_IOV entries, and moves on;
 * *nbytes says how many.
 */
static int take_entries(struct cursor *at, uint64_t length, struct iovec *entries, uint64_t *nbytes)
{
	int n = 0;

	*nbytes = 0;
	while (n < MAX_IOV && *nbytes < length) {
		size_t left = at->iov->iov_len - at->within;
		size_t step = (size_t)imgc_min_u64(left, length - *nbytes);

		if (step != 0)
			entries[n++] = (struct iovec){(char *)at->iov->iov_base + at->within, step};
		*nbytes += step;
		at->within += step;
		if (at->within == at->iov->iov_len) {
			at->iov++;
			at->within = 0;
		}
	}
	at->offset += *nbytes;
	return n;
}

static int write_cached(const struct imgc_direct *direct, struct cursor *at, uint64_t length,
			struct imgc_error *err)
{
	while (length != 0) {
		struct iovec entries[MAX_IOV];
		uint64_t offset = at->offset, nbytes;
		int n = take_entries(at, length, entries, &nbytes);
		int status = imgc_fd_write(direct->fd, entries, n, offset, err);

		if (status)
			return status;
		length -= nbytes;
	}
	return IMGC_OK;
}

static bool entries_are_aligned(const struct imgc_direct *direct, struct cursor at, uint64_t length)
{
	while (length != 0) {
		size_t step = (size_t)imgc_min_u64(at.iov->iov_len - at.within, length);

		if (!is_aligned((char *)at.iov->iov_base + at.within) || step % direct->unit != 0)
			return false;
		length -= step;
		at.within = 0;
		at.iov++;
	}
	return true;
}

/*
 * Writes entries of whole units.  *put has the bytes that are written, fewer than all of
 * them if the device stops inside a unit or the file system refuses; the caller writes
 * the rest in the other way.
 */
static int write_entries(struct imgc_direct *direct, struct iovec *entries, int n, uint64_t offset,
			 uint64_t *put, struct imgc_error *err)
{
	int first = 0;

	*put = 0;
	while (first < n) {
		ssize_t done = pwritev(direct->direct_fd, entries + first, n - first,
				       (off_t)(offset + *put));

		if (done < 0 && errno == EINTR)
			continue;
		if (done < 0 && is_refusal(errno)) {
			atomic_store(&direct->is_refused, true);
			return IMGC_OK;
		}
		if (done <= 0)
			return imgc_fail_system(err, done < 0 ? errno : EIO, offset + *put,
						"pwritev");
		*put += (uint64_t)done;
		if ((uint64_t)done % direct->unit != 0)
			return IMGC_OK;
		for (size_t left = (size_t)done; left != 0;) {
			size_t step = (size_t)imgc_min_u64(entries[first].iov_len, left);

			entries[first].iov_base = (char *)entries[first].iov_base + step;
			entries[first].iov_len -= step;
			left -= step;
			first += entries[first].iov_len == 0;
		}
	}
	return IMGC_OK;
}

static void skip(struct cursor *at, uint64_t length)
{
	struct iovec entries[MAX_IOV];
	uint64_t nbytes;

	for (; length != 0; length -= nbytes)
		take_entries(at, length, entries, &nbytes);
}

/* Fills the buffer with the next bytes, and makes one entry of it. */
static void fill_buffer(uint8_t *buffer, struct cursor at, uint64_t length)
{
	struct iovec entries[MAX_IOV];
	uint8_t *out = buffer;

	while (length != 0) {
		uint64_t nbytes;
		int n = take_entries(&at, length, entries, &nbytes);

		for (int i = 0; i < n; i++) {
			memcpy(out, entries[i].iov_base, entries[i].iov_len);
			out += entries[i].iov_len;
		}
		length -= nbytes;
	}
}

/* Writes whole units, from the caller's memory or, if it is not NULL, from the buffer. */
static int write_units(struct imgc_direct *direct, struct cursor *at, uint64_t length,
		       uint8_t *buffer, struct imgc_error *err)
{
	while (length != 0) {
		struct iovec entries[MAX_IOV];
		uint64_t nbytes = imgc_min_u64(length, buffer ? BUFFER_NBYTES : MAX_PIECE);
		struct cursor start = *at;
		uint64_t put;
		int n = 1;

		if (buffer) {
			fill_buffer(buffer, start, nbytes);
			entries[0] = (struct iovec){buffer, (size_t)nbytes};
		} else {
			struct cursor end = start;

			n = take_entries(&end, nbytes, entries, &nbytes);
		}
		int status = write_entries(direct, entries, n, start.offset, &put, err);

		if (status)
			return status;
		skip(at, put);
		length -= put;
		if (put < nbytes)
			return write_cached(direct, at, length, err);
	}
	return IMGC_OK;
}

static int write_middle(struct imgc_direct *direct, struct cursor *at, uint64_t length,
			struct imgc_error *err)
{
	if (entries_are_aligned(direct, *at, length))
		return write_units(direct, at, length, NULL, err);
	uint8_t *buffer = make_buffer(length);

	if (!buffer)
		return imgc_fail_call(err, IMGC_NO_MEMORY, "pwritev");
	int status = write_units(direct, at, length, buffer, err);

	free(buffer);
	return status;
}

int imgc_direct_write(struct imgc_direct *direct, const struct iovec *iov, int n_iov,
		      uint64_t offset, struct imgc_error *err)
{
	struct cursor at = {.iov = iov, .offset = offset};
	uint64_t length = 0;

	for (int i = 0; i < n_iov; i++) {
		if (!imgc_add_checked(length, iov[i].iov_len, &length))
			length = UINT64_MAX;
	}
	/* Also a range that is no range of a file: it is refused there. */
	if (is_refused(direct) || length < MIN_ALONE_NBYTES ||
	    !imgc_range_inside(offset, length, INT64_MAX - direct->unit))
		return imgc_fd_write(direct->fd, iov, n_iov, offset, err);
	uint64_t start = align_up(direct, offset);
	uint64_t end = imgc_align_down(offset + length, direct->unit);

	if (start >= end)
		return imgc_fd_write(direct->fd, iov, n_iov, offset, err);
	int status = write_cached(direct, &at, start - offset, err);

	if (status == IMGC_OK)
		status = write_middle(direct, &at, end - start, err);
	return status ? status : write_cached(direct, &at, offset + length - end, err);
}
