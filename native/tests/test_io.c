/*
 * test_io.c - files: reads and writes of every variant, ends, zeroing, data ranges
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sys/stat.h>
#include <unistd.h>

#include "io/io.h"
#include "tests/test_util.h"

#define FILE_NBYTES ((size_t)3 << 20)
#define N_REQUESTS 300

static uint8_t content[FILE_NBYTES];
static struct imgc_error error;

/* An unnamed file. */
static int temporary_fd(void)
{
	const char *folder = getenv("TMPDIR");
	char path[4096];

	snprintf(path, sizeof(path), "%s/imgc-test-XXXXXX", folder ? folder : "/tmp");
	int fd = mkstemp(path);
	CHECK(fd >= 0);
	CHECK(unlink(path) == 0);
	return fd;
}

static struct imgc_file *open_temporary(int *fd)
{
	struct imgc_file *file = NULL;

	*fd = temporary_fd();
	CHECK_EQ(imgc_file_open_fd(*fd, &file, &error), IMGC_OK);
	return file;
}

static void write_all(struct imgc_file *file, const void *data, size_t nbytes, uint64_t offset)
{
	struct iovec iov = {(void *)(uintptr_t)data, nbytes};

	CHECK_EQ(imgc_file_write(file, &iov, 1, offset, &error), IMGC_OK);
}

static int read_one(struct imgc_file *file, struct imgc_io_context *ctx, void *buffer,
		    size_t nbytes, uint64_t offset)
{
	struct imgc_io_request request = {offset, buffer, nbytes};

	memset(&error, 0, sizeof(error));
	return imgc_file_read(file, ctx, &request, 1, &error);
}

/* A non-blocking file whose data is not in memory.  Older kernels answer EAGAIN. */
static void test_non_blocking(struct imgc_io_context *ctx)
{
	uint8_t back[8192];
	int fd;
	struct imgc_file *file = open_temporary(&fd);

	write_all(file, content, sizeof(content), 0);
	CHECK(fsync(fd) == 0);
	CHECK(posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED) == 0);
	CHECK(fcntl(fd, F_SETFL, O_NONBLOCK) == 0);
	for (uint64_t offset = 0; offset < sizeof(content); offset += 20 * sizeof(back)) {
		CHECK_EQ(read_one(file, ctx, back, sizeof(back), offset), IMGC_OK);
		CHECK(memcmp(back, content + offset, sizeof(back)) == 0);
	}
	imgc_file_close(file);
	close(fd);
}

static int is_all_zero(const uint8_t *p, size_t nbytes)
{
	while (nbytes != 0 && p[nbytes - 1] == 0)
		nbytes--;
	return nbytes == 0;
}

static uint64_t fd_nbytes(int fd)
{
	struct stat st;

	CHECK(fstat(fd, &st) == 0);
	return (uint64_t)st.st_size;
}

/* Many scattered reads at once, some of them empty. */
static void test_reads(struct imgc_io_context *ctx)
{
	static struct imgc_io_request requests[N_REQUESTS];
	static uint8_t buffers[N_REQUESTS][9000];
	uint64_t state = 99;
	int fd;
	struct imgc_file *file = open_temporary(&fd);

	write_all(file, content, FILE_NBYTES, 0);
	for (int round = 0; round < 3; round++) {
		size_t n = round == 0 ? 1 : round == 1 ? 64 : N_REQUESTS;

		for (size_t i = 0; i < n; i++) {
			requests[i].length = i % 50 == 7 ? 0 : test_random(&state) % 9000;
			requests[i].offset =
				test_random(&state) % (FILE_NBYTES - requests[i].length);
			requests[i].buffer = buffers[i];
		}
		memset(buffers, 0, sizeof(buffers));
		CHECK_EQ(imgc_file_read(file, ctx, requests, n, &error), IMGC_OK);
		for (size_t i = 0; i < n; i++)
			CHECK(memcmp(buffers[i], content + requests[i].offset,
				     requests[i].length) == 0);
	}
	CHECK_EQ(imgc_file_read(file, ctx, requests, 0, &error), IMGC_OK);
	/* One read across the end fails the call; the context stays usable. */
	requests[17].offset = FILE_NBYTES - 100;
	requests[17].length = 101;
	CHECK_EQ(imgc_file_read(file, ctx, requests, N_REQUESTS, &error), IMGC_PAST_END);
	CHECK_EQ(error.status, IMGC_PAST_END);
	CHECK_EQ(error.offset, FILE_NBYTES);
	CHECK_EQ(error.source, IMGC_NO_SOURCE);
	CHECK(strcmp(error.op, "pread") == 0);
	requests[17].length = 100;
	CHECK_EQ(imgc_file_read(file, ctx, requests, N_REQUESTS, &error), IMGC_OK);
	requests[200].offset = UINT64_MAX - 5;
	requests[200].length = 100;
	CHECK_EQ(imgc_file_read(file, ctx, requests, N_REQUESTS, &error), IMGC_PAST_END);
	requests[200].length = 0;
	CHECK_EQ(imgc_file_read(file, ctx, requests, N_REQUESTS, &error), IMGC_OK);
	imgc_file_close(file);
	CHECK_EQ(fd_nbytes(fd), FILE_NBYTES); /* still open */
	close(fd);
}

static void test_refused_by_the_system(struct imgc_io_context *ctx)
{
	struct imgc_io_request requests[2];
	struct imgc_file *file = NULL;
	struct iovec iov = {content, 512};
	int fd = temporary_fd();
	char path[64];

	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	int write_only = open(path, O_WRONLY | O_CLOEXEC);
	int read_only = open(path, O_RDONLY | O_CLOEXEC);
	CHECK(write_only >= 0 && read_only >= 0);
	requests[0] = (struct imgc_io_request){0, content, 512};
	requests[1] = (struct imgc_io_request){512, content, 512};
	CHECK_EQ(imgc_file_open_fd(write_only, &file, &error), IMGC_OK);
	CHECK_EQ(imgc_file_read(file, ctx, requests, 2, &error), IMGC_IO);
	CHECK_EQ(error.os_errno, EBADF);
	imgc_file_close(file);
	CHECK_EQ(imgc_file_open_fd(read_only, &file, &error), IMGC_OK);
	CHECK_EQ(imgc_file_write(file, &iov, 1, 0, &error), IMGC_IO);
	CHECK_EQ(error.os_errno, EBADF);
	CHECK_EQ(imgc_file_zero(file, 0, 512, &error), IMGC_IO);
	imgc_file_close(file);
	close(read_only);
	close(write_only);
	close(fd);
	CHECK_EQ(imgc_file_open_fd(-1, &file, &error), IMGC_IO);
	CHECK_EQ(error.os_errno, EBADF);
	fd = open("/dev/null", O_RDWR | O_CLOEXEC);
	CHECK_EQ(imgc_file_open_fd(fd, &file, &error), IMGC_UNSUPPORTED);
	close(fd);
}

/* More pieces than one system call takes, with empty ones among them. */
static void test_vectored_write(void)
{
	static struct iovec iov[2000];
	static uint8_t back[FILE_NBYTES];
	int fd;
	struct imgc_file *file = open_temporary(&fd);
	size_t at = 0;

	for (int i = 0; i < 2000; i++) {
		iov[i].iov_base = content + at;
		iov[i].iov_len = i % 13 == 5 ? 0 : (size_t)(i % 700 + 1);
		at += iov[i].iov_len;
	}
	CHECK_EQ(imgc_file_write(file, iov, 2000, 12345, &error), IMGC_OK);
	CHECK_EQ(fd_nbytes(fd), 12345 + at);
	CHECK_EQ(read_one(file, NULL, back, at, 12345), IMGC_OK);
	CHECK(memcmp(back, content, at) == 0);
	CHECK_EQ(imgc_file_write(file, iov, 0, 0, &error), IMGC_OK);
	CHECK_EQ(imgc_file_write(file, iov, 2, INT64_MAX, &error), IMGC_OUT_OF_RANGE);
	CHECK_EQ(imgc_file_sync(file, &error), IMGC_OK);
	imgc_file_close(file);
	close(fd);
}

static void test_zero_file(void)
{
	static const struct {
		uint64_t offset, length;
	} ranges[] = {
		{0, 1},		{4096, 4096}, {5000, 100},	  {10000, 300000},
		{65536, 65536}, {1, 0},	      {1 << 20, 1 << 20},
	};
	static uint8_t expected[FILE_NBYTES + 70000], back[FILE_NBYTES + 70000];
	int fd;
	struct imgc_file *file = open_temporary(&fd);

	write_all(file, content, FILE_NBYTES, 0);
	memcpy(expected, content, FILE_NBYTES);
	for (size_t i = 0; i < sizeof(ranges) / sizeof(ranges[0]); i++) {
		CHECK_EQ(imgc_file_zero(file, ranges[i].offset, ranges[i].length, &error), IMGC_OK);
		memset(expected + ranges[i].offset, 0, ranges[i].length);
	}
	CHECK_EQ(fd_nbytes(fd), FILE_NBYTES);
	/* Across the end, and past it: the file grows. */
	CHECK_EQ(imgc_file_zero(file, FILE_NBYTES - 100, 200, &error), IMGC_OK);
	memset(expected + FILE_NBYTES - 100, 0, 200);
	CHECK_EQ(fd_nbytes(fd), FILE_NBYTES + 100);
	CHECK_EQ(imgc_file_zero(file, FILE_NBYTES + 60000, 10000, &error), IMGC_OK);
	CHECK_EQ(fd_nbytes(fd), FILE_NBYTES + 70000);
	CHECK_EQ(read_one(file, NULL, back, sizeof(back), 0), IMGC_OK);
	CHECK(memcmp(back, expected, sizeof(back)) == 0);
	CHECK_EQ(imgc_file_zero(file, UINT64_MAX, 1, &error), IMGC_OUT_OF_RANGE);
	imgc_file_close(file);
	close(fd);
}

/* The data ranges of a file with holes, or all of it if the file cannot tell. */
static void test_next_data(void)
{
	const uint64_t step = 1 << 20;
	int fd;
	struct imgc_file *file = open_temporary(&fd);
	uint64_t at = 0, start = 0, end = 0, n_data = 0;

	CHECK_EQ(imgc_file_next_data(file, 0, &start, &end, &error), IMGC_OK);
	CHECK(start == 0 && end == 0);
	CHECK(ftruncate(fd, (off_t)(8 * step)) == 0);
	write_all(file, content, 65536, 2 * step);
	write_all(file, content, 65536, 5 * step);
	while (at < 8 * step) {
		CHECK_EQ(imgc_file_next_data(file, at, &start, &end, &error), IMGC_OK);
		CHECK(start >= at && start <= end && end <= 8 * step);
		/* Written bytes are never reported as a hole. */
		CHECK(!(at <= 2 * step && start > 2 * step));
		CHECK(!(at <= 5 * step && start > 5 * step));
		n_data += end - start;
		if (start == end) {
			CHECK_EQ(start, 8 * step);
			break;
		}
		at = end;
	}
	CHECK(n_data >= 2 * 65536);
	printf("  next_data: %llu KiB of data seen in 128 KiB\n",
	       (unsigned long long)n_data / 1024);
	CHECK_EQ(imgc_file_next_data(file, 2 * step + 100, &start, &end, &error), IMGC_OK);
	CHECK_EQ(start, 2 * step + 100);
	CHECK_EQ(imgc_file_next_data(file, 9 * step, &start, &end, &error), IMGC_OK);
	CHECK(start == 8 * step && end == 8 * step);
	CHECK_EQ(imgc_file_next_data(file, UINT64_MAX, &start, &end, &error), IMGC_OK);
	CHECK(start == 8 * step && end == 8 * step);
	imgc_file_close(file);
	close(fd);
}

static void test_memory(struct imgc_io_context *ctx)
{
	struct guarded g = guarded_alloc(GUARD_PAGE);
	struct imgc_io_request requests[2];
	struct imgc_file *file = NULL;
	uint8_t back[1000];
	struct iovec iov[2] = {{content, 600}, {content + 600, 400}};
	uint64_t start = 0, end = 0;

	CHECK_EQ(imgc_file_open_memory(NULL, 1, &file), IMGC_INVALID_ARGUMENT);
	CHECK_EQ(imgc_file_open_memory(g.start, GUARD_PAGE, &file), IMGC_OK);
	CHECK_EQ(imgc_file_write(file, iov, 2, GUARD_PAGE - 1000, &error), IMGC_OK);
	CHECK_EQ(imgc_file_write(file, iov, 2, GUARD_PAGE - 999, &error), IMGC_OUT_OF_RANGE);
	CHECK_EQ(imgc_file_write(file, iov, 2, UINT64_MAX - 3, &error), IMGC_OUT_OF_RANGE);
	requests[0] = (struct imgc_io_request){GUARD_PAGE - 1000, back + 500, 500};
	requests[1] = (struct imgc_io_request){GUARD_PAGE - 500, back, 500};
	CHECK_EQ(imgc_file_read(file, ctx, requests, 2, &error), IMGC_OK);
	CHECK(memcmp(back + 500, content, 500) == 0 && memcmp(back, content + 500, 500) == 0);
	requests[1].length = 501;
	CHECK_EQ(imgc_file_read(file, ctx, requests, 2, &error), IMGC_PAST_END);
	CHECK_EQ(error.offset, GUARD_PAGE);
	CHECK_EQ(imgc_file_zero(file, GUARD_PAGE - 10, 10, &error), IMGC_OK);
	CHECK_EQ(imgc_file_zero(file, GUARD_PAGE - 10, 11, &error), IMGC_OUT_OF_RANGE);
	CHECK_EQ(read_one(file, ctx, back, 10, GUARD_PAGE - 10), IMGC_OK);
	CHECK(is_all_zero(back, 10));
	CHECK_EQ(imgc_file_next_data(file, 100, &start, &end, &error), IMGC_OK);
	CHECK(start == 100 && end == GUARD_PAGE);
	CHECK_EQ(imgc_file_next_data(file, GUARD_PAGE + 1, &start, &end, &error), IMGC_OK);
	CHECK(start == GUARD_PAGE && end == GUARD_PAGE);
	CHECK_EQ(imgc_file_sync(file, &error), IMGC_OK);
	imgc_file_close(file);
	guarded_free(&g);
}

static void test_null(void)
{
	struct imgc_file *file = NULL;
	uint8_t back[100];
	uint64_t start = 0, end = 0;

	CHECK_EQ(imgc_file_open_null(&file), IMGC_OK);
	write_all(file, content, 1000, UINT64_C(1) << 60);
	memset(back, 1, sizeof(back));
	CHECK_EQ(read_one(file, NULL, back, sizeof(back), 0), IMGC_OK);
	CHECK_EQ(back[0] | back[99], 0);
	CHECK_EQ(imgc_file_zero(file, 0, UINT64_MAX, &error), IMGC_OK);
	CHECK_EQ(imgc_file_next_data(file, 0, &start, &end, &error), IMGC_OK);
	CHECK(start == end && end == UINT64_MAX);
	CHECK_EQ(imgc_file_sync(file, &error), IMGC_OK);
	imgc_file_close(file);
	imgc_file_close(NULL);
}

struct writer {
	struct imgc_file *file;
	unsigned index;
};

/* Each thread appends and zeroes within its own stripes of a growing file. */
static void *run_writer(void *opaque)
{
	struct writer *w = opaque;

	for (unsigned i = 0; i < 64; i++) {
		uint64_t offset = (i * 4 + w->index) * UINT64_C(8192);
		struct iovec iov = {content + w->index, 8192};

		if (i % 3 == 0)
			CHECK_EQ(imgc_file_zero(w->file, offset, 8192, NULL), IMGC_OK);
		else
			CHECK_EQ(imgc_file_write(w->file, &iov, 1, offset, NULL), IMGC_OK);
	}
	return NULL;
}

static void test_threads(void)
{
	struct writer writers[4];
	pthread_t threads[4];
	uint8_t back[8192];
	int fd;
	struct imgc_file *file = open_temporary(&fd);

	for (unsigned i = 0; i < 4; i++) {
		writers[i] = (struct writer){file, i};
		CHECK(pthread_create(&threads[i], NULL, run_writer, &writers[i]) == 0);
	}
	for (unsigned i = 0; i < 4; i++)
		CHECK(pthread_join(threads[i], NULL) == 0);
	CHECK_EQ(fd_nbytes(fd), 256 * 8192);
	for (unsigned i = 0; i < 256; i++) {
		CHECK_EQ(read_one(file, NULL, back, sizeof(back), i * UINT64_C(8192)), IMGC_OK);
		if (i / 4 % 3 == 0)
			CHECK(is_all_zero(back, sizeof(back)));
		else
			CHECK(memcmp(back, content + i % 4, sizeof(back)) == 0);
	}
	imgc_file_close(file);
	close(fd);
}

int main(void)
{
	struct imgc_io_context *ctx = NULL;

	fill_random(content, sizeof(content), 11);
	for (unsigned i = 0; i < imgc_variant_count(IMGC_OP_IO); i++) {
		uint32_t variant;

		if (!variant_usable(IMGC_OP_IO, i, &variant))
			continue;
		CHECK_EQ(imgc_io_context_create(variant, false, &ctx), IMGC_OK);
		test_reads(ctx);
		test_non_blocking(ctx);
		test_refused_by_the_system(ctx);
		test_memory(ctx);
		imgc_io_context_destroy(ctx);
	}
	CHECK_EQ(imgc_io_context_create(99, false, &ctx), IMGC_INVALID_ARGUMENT);
	imgc_io_context_destroy(NULL);
	test_vectored_write();
	test_zero_file();
	test_next_data();
	test_null();
	test_threads();
	return 0;
}
