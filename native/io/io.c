/*
 * io.c - calls an operation of a file, and chooses how reads reach the kernel
 */
#include "io/io.h"

#include <errno.h>

#include "common/error.h"
#include "common/variant.h"
#include "io/uring.h"

enum { IO_URING, IO_PREAD, N_IO_VARIANTS };

#ifdef IMGC_HAVE_URING
#define URING_BUILT true
#else
#define URING_BUILT false
#endif

static const struct imgc_variant io_rows[N_IO_VARIANTS] = {
	[IO_URING] = {"uring", URING_BUILT, imgc_uring_runnable},
	[IO_PREAD] = {"pread", true, NULL},
};

const struct imgc_variant_table imgc_io_variants = {
	.operation = "io",
	.rows = io_rows,
	.n_rows = N_IO_VARIANTS,
	.default_row = IO_PREAD,
};

/* A ring if there is one: of requests that nothing reads ahead, many must be under way. */
static int create_by_files(bool is_direct, struct imgc_io_context **out)
{
	int status = IMGC_UNSUPPORTED;

	if (!is_direct)
		return imgc_io_context_create((uint32_t)imgc_io_variants.default_row, false, out);
	if (URING_BUILT)
		status = imgc_io_context_create(IO_URING, true, out);
	if (status != IMGC_UNSUPPORTED)
		return status;
	return imgc_io_context_create(IO_PREAD, true, out);
}

int imgc_io_context_create(uint32_t io_variant, bool is_direct, struct imgc_io_context **out)
{
	switch (io_variant) {
	case IMGC_IO_BY_FILES:
		return create_by_files(is_direct, out);
	case IO_URING:
#ifdef IMGC_HAVE_URING
		return imgc_uring_context_create(out);
#else
		return IMGC_UNSUPPORTED;
#endif
	case IO_PREAD:
		*out = NULL;
		return IMGC_OK;
	default:
		return IMGC_INVALID_ARGUMENT;
	}
}

void imgc_io_context_destroy(struct imgc_io_context *ctx)
{
#ifdef IMGC_HAVE_URING
	imgc_uring_context_destroy(ctx);
#else
	(void)ctx;
#endif
}

int imgc_file_read(struct imgc_file *file, struct imgc_io_context *ctx,
		   const struct imgc_io_request *requests, size_t n, struct imgc_error *err)
{
	return file->ops->read(file, ctx, requests, n, err);
}

uint64_t imgc_file_read_now(struct imgc_file *file, uint64_t offset, void *buffer, uint64_t length)
{
	return file->ops->read_now ? file->ops->read_now(file, offset, buffer, length) : 0;
}

const void *imgc_file_borrow(const struct imgc_file *file, uint64_t offset, uint64_t length)
{
	return file->ops->borrow ? file->ops->borrow(file, offset, length) : NULL;
}

void imgc_file_will_need(struct imgc_file *file, uint64_t offset, uint64_t length)
{
	if (file->ops->will_need)
		file->ops->will_need(file, offset, length);
}

/* After the write: a sync that has begun before may not have seen it. */
static void note_written(struct imgc_file *file)
{
	atomic_store(&file->is_written, true);
}

static int check_writable(const struct imgc_file *file, uint64_t offset, struct imgc_error *err)
{
	return atomic_load(&file->refuses_writes) ? imgc_fail_system(err, EIO, offset, "pwritev")
						  : IMGC_OK;
}

int imgc_file_write(struct imgc_file *file, const struct iovec *iov, int n_iov, uint64_t offset,
		    struct imgc_error *err)
{
	int status = check_writable(file, offset, err);

	if (status)
		return status;
	status = file->ops->write(file, iov, n_iov, offset, err);
	note_written(file);
	return status;
}

int imgc_file_put(struct imgc_file *file, const void *data, uint64_t nbytes, uint64_t offset,
		  struct imgc_error *err)
{
	struct iovec iov = {(void *)(uintptr_t)data, (size_t)nbytes};

	return imgc_file_write(file, &iov, 1, offset, err);
}

int imgc_file_has_reader(const struct imgc_file *file)
{
	return file->ops->await_room != NULL;
}

void imgc_file_await_room(struct imgc_file *file, int timeout_ms)
{
	if (file->ops->await_room)
		file->ops->await_room(file, timeout_ms);
}

int imgc_file_zero(struct imgc_file *file, uint64_t offset, uint64_t length, struct imgc_error *err)
{
	int status = check_writable(file, offset, err);

	if (status)
		return status;
	status = file->ops->zero(file, offset, length, err);
	note_written(file);
	return status;
}

bool imgc_file_reflink(struct imgc_file *file, uint64_t offset, struct imgc_file *source,
		       uint64_t source_offset, uint64_t length)
{
	if (!file->ops->reflink || file->ops != source->ops || atomic_load(&file->refuses_writes))
		return false;
	bool is_done = file->ops->reflink(file, offset, source, source_offset, length);

	note_written(file);
	return is_done;
}

bool imgc_file_can_move(const struct imgc_file *file, const struct imgc_file *source)
{
	return file->takes_pages && source->ops->splice;
}

int imgc_file_move(struct imgc_file *file, uint64_t offset, struct imgc_file *source,
		   uint64_t source_offset, uint64_t length, struct imgc_error *err)
{
	int status = check_writable(file, offset, err);

	if (status)
		return status;
	status = file->ops->move(file, offset, source, source_offset, length, err);
	note_written(file);
	return status;
}

int imgc_file_take_written(struct imgc_file *file)
{
	return atomic_exchange(&file->is_written, false);
}

void imgc_file_refuse_writes(struct imgc_file *file)
{
	atomic_store(&file->refuses_writes, true);
}

int imgc_file_sync(struct imgc_file *file, struct imgc_error *err)
{
	return file->ops->sync(file, err);
}

int imgc_file_next_data(struct imgc_file *file, uint64_t offset, uint64_t *start, uint64_t *end,
			struct imgc_error *err)
{
	return file->ops->next_data(file, offset, start, end, err);
}

void imgc_file_close(struct imgc_file *file)
{
	if (file)
		file->ops->close(file);
}
