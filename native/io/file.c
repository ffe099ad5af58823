/*
 * file.c - regular files and block devices
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "common/checked.h"
#include "common/error.h"
#include "io/direct.h"
#include "io/drop.h"
#include "io/fd.h"
#include "io/uring.h"

/* Ways to zero, the cheapest first.  A way that the file refuses is not tried again. */
enum zero_method {
	ZERO_BY_PUNCH,	/* regular files: frees the blocks */
	ZERO_BY_RANGE,	/* regular files: keeps them, marked unwritten */
	ZERO_BY_UNMAP,	/* block devices that read as zeros what they free */
	ZERO_BY_DEVICE, /* block devices */
	ZERO_BY_WRITE,
};

struct fd_file {
	struct imgc_file base;
	int fd;
	bool is_block_device;
	uint64_t device_nbytes; /* of a block device, */
	uint64_t sector_nbytes; /* and of its logical sectors */
	_Atomic int zero_method;
	_Atomic bool always_waits;    /* the file system refuses RWF_NOWAIT */
	struct imgc_dropper *dropper; /* NULL: the page cache keeps everything */
	struct imgc_direct *direct;   /* NULL: all goes through the page cache */
};

static const uint8_t zero_page[4096];

/* Linux moves at most 0x7ffff000 bytes a call; this is a round number below that. */
#define NOW_MAX_NBYTES ((uint64_t)1 << 30)

/* Linux cuts a longer piece to what it reads ahead of the file: 128 KiB by default. */
#define WILL_NEED_MAX_PIECE ((uint64_t)128 * 1024)

/* The most pages of zeros that one write covers. */
#define ZERO_MAX_PAGES 64

static int file_nbytes(const struct fd_file *file, uint64_t *nbytes, struct imgc_error *err)
{
	struct stat st;

	if (file->is_block_device) {
		*nbytes = file->device_nbytes;
		return IMGC_OK;
	}
	if (fstat(file->fd, &st))
		return imgc_fail_system(err, errno, 0, "fstat");
	*nbytes = (uint64_t)st.st_size;
	return IMGC_OK;
}

static int read_requests(struct fd_file *file, struct imgc_io_context *ctx,
			 const struct imgc_io_request *requests, size_t n, struct imgc_error *err)
{
	if (file->direct)
		return imgc_direct_read(file->direct, ctx, requests, n, err);
#ifdef IMGC_HAVE_URING
	/* A single read gains nothing from a ring. */
	if (ctx && n > 1)
		return imgc_uring_read(ctx, file->fd, requests, n, err);
#endif
	(void)ctx;
	return imgc_fd_read(file->fd, requests, n, err);
}

static int file_read(struct imgc_file *base, struct imgc_io_context *ctx,
		     const struct imgc_io_request *requests, size_t n, struct imgc_error *err)
{
	struct fd_file *file = (struct fd_file *)base;
	int status = read_requests(file, ctx, requests, n, err);

	for (size_t i = 0; file->dropper && i < n; i++)
		imgc_dropper_add_read(file->dropper, requests[i].offset, requests[i].length);
	return status;
}

static bool is_refusal(int os_errno)
{
	return os_errno == EOPNOTSUPP || os_errno == ENOSYS || os_errno == ENOTTY ||
	       os_errno == EINVAL || os_errno == ENODEV;
}

static uint64_t file_read_now(struct imgc_file *base, uint64_t offset, void *buffer,
			      uint64_t length)
{
	struct fd_file *file = (struct fd_file *)base;

	/* What is not there would be read ahead, into the page cache. */
	if (file->direct || atomic_load_explicit(&file->always_waits, memory_order_relaxed) ||
	    !imgc_range_inside(offset, length, INT64_MAX))
		return 0;
	struct iovec iov = {buffer, (size_t)imgc_min_u64(length, NOW_MAX_NBYTES)};
	ssize_t got = preadv2(file->fd, &iov, 1, (off_t)offset, RWF_NOWAIT);

	if (got < 0 && is_refusal(errno))
		atomic_store_explicit(&file->always_waits, true, memory_order_relaxed);
	return got > 0 ? (uint64_t)got : 0;
}

static void file_will_need(struct imgc_file *base, uint64_t offset, uint64_t length)
{
	struct fd_file *file = (struct fd_file *)base;
	uint64_t nbytes = 0;

	if (!imgc_range_inside(offset, length, INT64_MAX))
		return;
	if (file->direct && (file_nbytes(file, &nbytes, NULL) ||
			     !imgc_direct_note_fetched(file->direct, offset, length, nbytes)))
		return;
	for (uint64_t done = 0; done < length; done += WILL_NEED_MAX_PIECE) {
		uint64_t piece = imgc_min_u64(length - done, WILL_NEED_MAX_PIECE);

		posix_fadvise(file->fd, (off_t)(offset + done), (off_t)piece, POSIX_FADV_WILLNEED);
	}
}

static int file_write(struct imgc_file *base, const struct iovec *iov, int n_iov, uint64_t offset,
		      struct imgc_error *err)
{
	struct fd_file *file = (struct fd_file *)base;
	uint64_t nbytes = 0;
	int status = file->direct ? imgc_direct_write(file->direct, iov, n_iov, offset, err)
				  : imgc_fd_write(file->fd, iov, n_iov, offset, err);

	if (status || !file->dropper)
		return status;
	for (int i = 0; i < n_iov; i++)
		nbytes += iov[i].iov_len;
	return imgc_dropper_add_written(file->dropper, offset, nbytes, err);
}

static int write_zeros(struct fd_file *file, uint64_t offset, uint64_t length,
		       struct imgc_error *err)
{
	while (length != 0) {
		struct iovec iov[ZERO_MAX_PAGES];
		uint64_t piece = 0;
		int n = 0;

		while (n < ZERO_MAX_PAGES && piece < length) {
			iov[n].iov_base = (void *)(uintptr_t)zero_page;
			iov[n].iov_len = (size_t)imgc_min_u64(length - piece, sizeof(zero_page));
			piece += iov[n++].iov_len;
		}
		int status = imgc_fd_write(file->fd, iov, n, offset, err);

		if (status)
			return status;
		offset += piece;
		length -= piece;
	}
	return IMGC_OK;
}

static int retry_fallocate(int fd, int mode, uint64_t offset, uint64_t length)
{
	while (fallocate(fd, mode, (off_t)offset, (off_t)length)) {
		if (errno != EINTR)
			return errno;
	}
	return 0;
}

/*
 * Extends the file to `end` if it is shorter, by a byte inside the range that is
 * zeroed.  ftruncate() is no choice: it could cut off bytes that another thread
 * appends.
 */
static int extend_to(struct fd_file *file, uint64_t end, struct imgc_error *err)
{
	uint64_t nbytes = 0;
	int status = file_nbytes(file, &nbytes, err);

	if (status || nbytes >= end)
		return status;
	return write_zeros(file, end - 1, 1, err);
}

/* *refused: the file does not support this way; the status is IMGC_OK then. */
static int zero_by_fallocate(struct fd_file *file, int mode, uint64_t offset, uint64_t length,
			     bool *refused, struct imgc_error *err)
{
	int os_errno = retry_fallocate(file->fd, mode | FALLOC_FL_KEEP_SIZE, offset, length);

	*refused = os_errno != 0 && is_refusal(os_errno);
	if (*refused)
		return IMGC_OK;
	if (os_errno)
		return imgc_fail_system(err, os_errno, offset, "fallocate");
	return extend_to(file, offset + length, err);
}

/* Zeros whole sectors; gives 0 or an errno. */
static int zero_sectors(struct fd_file *file, int method, uint64_t offset, uint64_t length)
{
	uint64_t range[2] = {offset, length};

	if (method == ZERO_BY_UNMAP)
		return retry_fallocate(file->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset,
				       length);
	while (ioctl(file->fd, BLKZEROOUT, range)) {
		if (errno != EINTR)
			return errno;
	}
	return 0;
}

/* The kernel zeros whole logical sectors only; the rest is written. */
static int zero_by_device(struct fd_file *file, int method, uint64_t offset, uint64_t length,
			  bool *refused, struct imgc_error *err)
{
	uint64_t end = offset + length, unit = file->sector_nbytes;
	uint64_t start = imgc_align_down(offset + unit - 1, unit);
	uint64_t stop = imgc_align_down(end, unit);

	if (stop <= start)
		return write_zeros(file, offset, length, err);
	int os_errno = zero_sectors(file, method, start, stop - start);

	*refused = os_errno != 0 && is_refusal(os_errno);
	if (*refused)
		return IMGC_OK;
	if (os_errno)
		return imgc_fail_system(err, os_errno, offset, "zero");
	int status = write_zeros(file, offset, start - offset, err);

	return status ? status : write_zeros(file, stop, end - stop, err);
}

/* The method to try after one that the file refuses. */
static int next_method(int method)
{
	if (method == ZERO_BY_PUNCH)
		return ZERO_BY_RANGE;
	return method == ZERO_BY_UNMAP ? ZERO_BY_DEVICE : ZERO_BY_WRITE;
}

static int zero_by(struct fd_file *file, int method, uint64_t offset, uint64_t length,
		   bool *refused, struct imgc_error *err)
{
	*refused = false;
	switch (method) {
	case ZERO_BY_PUNCH:
		return zero_by_fallocate(file, FALLOC_FL_PUNCH_HOLE, offset, length, refused, err);
	case ZERO_BY_RANGE:
		return zero_by_fallocate(file, FALLOC_FL_ZERO_RANGE, offset, length, refused, err);
	case ZERO_BY_UNMAP:
	case ZERO_BY_DEVICE:
		return zero_by_device(file, method, offset, length, refused, err);
	default:
		return write_zeros(file, offset, length, err);
	}
}

static int file_zero(struct imgc_file *base, uint64_t offset, uint64_t length,
		     struct imgc_error *err)
{
	struct fd_file *file = (struct fd_file *)base;
	int method = atomic_load_explicit(&file->zero_method, memory_order_relaxed);

	if (!imgc_range_inside(offset, length, INT64_MAX))
		return imgc_fail_at(err, IMGC_OUT_OF_RANGE, offset, "zero");
	/* As for a write. */
	if (file->is_block_device && !imgc_range_inside(offset, length, file->device_nbytes))
		return imgc_fail_system(err, ENOSPC, offset, "zero");
	if (length == 0)
		return IMGC_OK;
	for (;;) {
		bool refused;
		int status = zero_by(file, method, offset, length, &refused, err);

		if (!refused)
			return status;
		method = next_method(method);
		atomic_store_explicit(&file->zero_method, method, memory_order_relaxed);
	}
}

static int file_sync(struct imgc_file *base, struct imgc_error *err)
{
	struct fd_file *file = (struct fd_file *)base;

	while (fdatasync(file->fd)) {
		if (errno != EINTR)
			return imgc_fail_system(err, errno, 0, "fdatasync");
	}
	return IMGC_OK;
}

static int file_next_data(struct imgc_file *base, uint64_t offset, uint64_t *start, uint64_t *end,
			  struct imgc_error *err)
{
	struct fd_file *file = (struct fd_file *)base;
	uint64_t nbytes = 0;
	int status = file_nbytes(file, &nbytes, err);

	if (status)
		return status;
	if (offset >= nbytes) {
		*start = *end = nbytes;
		return IMGC_OK;
	}
	off_t data = lseek(file->fd, (off_t)offset, SEEK_DATA);

	if (data < 0 && errno == ENXIO) {
		*start = *end = nbytes;
		return IMGC_OK;
	}
	if (data < 0 && !is_refusal(errno))
		return imgc_fail_system(err, errno, offset, "lseek");
	off_t hole = data < 0 ? -1 : lseek(file->fd, data, SEEK_HOLE);

	/* The file system cannot tell, or the file is changing: all of it is data. */
	if (hole <= data || (uint64_t)data < offset) {
		*start = offset;
		*end = nbytes;
		return IMGC_OK;
	}
	*start = imgc_min_u64((uint64_t)data, nbytes);
	*end = imgc_min_u64((uint64_t)hole, nbytes);
	return IMGC_OK;
}

static bool file_reflink(struct imgc_file *base, uint64_t offset, struct imgc_file *source_base,
			 uint64_t source_offset, uint64_t length)
{
	struct fd_file *file = (struct fd_file *)base;
	struct fd_file *source = (struct fd_file *)source_base;
	struct file_clone_range range = {
		.src_fd = source->fd,
		.src_offset = source_offset,
		.src_length = length,
		.dest_offset = offset,
	};

	while (ioctl(file->fd, FICLONERANGE, &range)) {
		if (errno != EINTR)
			return false;
	}
	return true;
}

/* What is in a pipe cannot be dropped from the page cache. */
static ssize_t file_splice(struct imgc_file *base, uint64_t offset, int pipe, uint64_t length)
{
	struct fd_file *file = (struct fd_file *)base;
	loff_t from = (loff_t)offset;

	if (file->dropper || !imgc_range_inside(offset, length, INT64_MAX)) {
		errno = EINVAL;
		return -1;
	}
	return splice(file->fd, &from, pipe, NULL, (size_t)imgc_min_u64(length, NOW_MAX_NBYTES),
		      SPLICE_F_NONBLOCK);
}

/* 0 unless it is a power of two: a file system may report any number. */
static uint64_t block_nbytes(const struct stat *st)
{
	uint64_t nbytes = st->st_blksize > 0 ? (uint64_t)st->st_blksize : 0;

	return S_ISREG(st->st_mode) && imgc_is_power_of_two(nbytes) ? nbytes : 0;
}

static void file_close(struct imgc_file *base)
{
	struct fd_file *file = (struct fd_file *)base;

	imgc_dropper_destroy(file->dropper);
	imgc_direct_destroy(file->direct);
	free(file);
}

static const struct imgc_file_ops fd_file_ops = {
	.read = file_read,
	.read_now = file_read_now,
	.will_need = file_will_need,
	.write = file_write,
	.zero = file_zero,
	.sync = file_sync,
	.next_data = file_next_data,
	.reflink = file_reflink,
	.splice = file_splice,
	.close = file_close,
};

int imgc_file_open_fd(int fd, struct imgc_file **out, struct imgc_error *err)
{
	struct stat st;
	uint64_t device_nbytes = 0;
	int sector_nbytes = 0;

	if (fstat(fd, &st))
		return imgc_fail_system(err, errno, 0, "fstat");
	if (!S_ISREG(st.st_mode) && !S_ISBLK(st.st_mode))
		return imgc_fail_call(err, IMGC_UNSUPPORTED, "fstat");
	if (S_ISBLK(st.st_mode) && ioctl(fd, BLKGETSIZE64, &device_nbytes))
		return imgc_fail_system(err, errno, 0, "BLKGETSIZE64");
	if (S_ISBLK(st.st_mode) && ioctl(fd, BLKSSZGET, &sector_nbytes))
		return imgc_fail_system(err, errno, 0, "BLKSSZGET");
	struct fd_file *file = calloc(1, sizeof(*file));

	if (!file)
		return imgc_fail_call(err, IMGC_NO_MEMORY, "open");
	file->base.ops = &fd_file_ops;
	file->base.writes_are_serial = S_ISREG(st.st_mode);
	file->base.reflink_block_nbytes = block_nbytes(&st);
	file->fd = fd;
	file->is_block_device = S_ISBLK(st.st_mode);
	file->device_nbytes = device_nbytes;
	file->sector_nbytes = sector_nbytes > 0 ? (uint64_t)sector_nbytes : 512;
	atomic_init(&file->zero_method, file->is_block_device ? ZERO_BY_UNMAP : ZERO_BY_PUNCH);
	atomic_init(&file->always_waits, false);
	*out = &file->base;
	return IMGC_OK;
}

int imgc_file_drop_behind(struct imgc_file *base, struct imgc_error *err)
{
	struct fd_file *file = (struct fd_file *)base;
	uint64_t nbytes = 0;

	if (base->ops != &fd_file_ops || file->dropper)
		return IMGC_OK;
	int status = file_nbytes(file, &nbytes, err);

	return status ? status : imgc_dropper_create(file->fd, nbytes, &file->dropper, err);
}

uint64_t imgc_file_kept_nbytes(const struct imgc_file *base)
{
	const struct fd_file *file = (const struct fd_file *)base;

	if (base->ops != &fd_file_ops || !file->dropper)
		return 0;
	return imgc_dropper_kept_nbytes(file->dropper);
}

int imgc_file_go_direct(struct imgc_file *base, int direct_fd, struct imgc_error *err)
{
	struct fd_file *file = (struct fd_file *)base;
	int status;

	if (base->ops != &fd_file_ops || file->direct)
		return imgc_fail_call(err, IMGC_UNSUPPORTED, "direct");
	status = imgc_direct_create(direct_fd, file->fd, file->sector_nbytes, &file->direct, err);
	base->is_direct = status == IMGC_OK;
	return status;
}

void imgc_file_note_read(struct imgc_file *base, uint64_t offset, uint64_t length)
{
	struct fd_file *file = (struct fd_file *)base;

	if (base->ops == &fd_file_ops && file->dropper)
		imgc_dropper_add_read(file->dropper, offset, length);
}

void imgc_file_drop_rest(struct imgc_file *base)
{
	struct fd_file *file = (struct fd_file *)base;

	if (base->ops == &fd_file_ops && file->dropper)
		imgc_dropper_drop_rest(file->dropper);
}

int imgc_file_note_written(struct imgc_file *base, uint64_t offset, uint64_t length,
			   struct imgc_error *err)
{
	struct fd_file *file = (struct fd_file *)base;

	if (base->ops != &fd_file_ops || !file->dropper)
		return IMGC_OK;
	return imgc_dropper_add_written(file->dropper, offset, length, err);
}
