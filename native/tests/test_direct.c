/*
 * test_direct.c - reads and writes past the page cache, with any alignment, and faults
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "common/checked.h"
#include "io/direct.h"
#include "io/io.h"
#include "tests/test_util.h"

#define FILE_NBYTES ((uint64_t)(6 << 20) + 777)
#define N_THREADS 3
#define N_ROUNDS 300

static struct imgc_error error;
static uint8_t model[FILE_NBYTES], found[FILE_NBYTES];

/* ------------------------------------------------------------------- faults */

/* What becomes of calls on `faulty_fd`, once `n_good` more of them have gone well. */
static struct {
	int fd;
	int n_good;
	int os_errno;	     /* 0: a short count instead */
	size_t short_by;     /* bytes that are not moved */
	_Atomic int n_calls; /* on the descriptor */
} faulty = {.fd = -1};

static bool is_faulty(int fd)
{
	return fd == faulty.fd && atomic_fetch_add(&faulty.n_calls, 1) >= faulty.n_good;
}

/* These take the place of the C library's functions. */
ssize_t pread(int fd, void *buffer, size_t nbytes, off_t offset)
{
	if (is_faulty(fd)) {
		if (faulty.os_errno) {
			errno = faulty.os_errno;
			return -1;
		}
		nbytes -= nbytes > faulty.short_by ? faulty.short_by : 0;
	}
	return syscall(SYS_pread64, fd, buffer, nbytes, offset);
}

ssize_t pwritev(int fd, const struct iovec *iov, int n, off_t offset)
{
	struct iovec first = iov[0];

	if (is_faulty(fd)) {
		if (faulty.os_errno) {
			errno = faulty.os_errno;
			return -1;
		}
		/* Not by O_DIRECT, which would refuse it. */
		first.iov_len -= first.iov_len > faulty.short_by ? faulty.short_by : 0;
		faulty.fd = -1;
		int flags = fcntl(fd, F_GETFL);

		CHECK(fcntl(fd, F_SETFL, flags & ~O_DIRECT) == 0);
		ssize_t put = syscall(SYS_pwritev, fd, &first, 1, (long)offset, 0L);

		CHECK(fcntl(fd, F_SETFL, flags) == 0);
		return put;
	}
	return syscall(SYS_pwritev, fd, iov, n, (long)offset, 0L);
}

static void fail_from(int fd, int n_good, int os_errno, size_t short_by)
{
	faulty.fd = fd;
	faulty.n_good = n_good;
	faulty.os_errno = os_errno;
	faulty.short_by = short_by;
	atomic_store(&faulty.n_calls, 0);
}

/* -------------------------------------------------------------------- files */

struct pair {
	int fd, direct_fd;
	struct imgc_file *file;
};

static bool open_pair(struct pair *pair)
{
	const char *folder = getenv("TMPDIR");
	char path[4096];

	snprintf(path, sizeof(path), "%s/imgc-test-XXXXXX", folder ? folder : "/tmp");
	pair->fd = mkstemp(path);
	CHECK(pair->fd >= 0);
	pair->direct_fd = open(path, O_RDWR | O_DIRECT | O_CLOEXEC);
	CHECK(unlink(path) == 0);
	if (pair->direct_fd < 0)
		return false;
	CHECK_EQ(imgc_file_open_fd(pair->fd, &pair->file, &error), IMGC_OK);
	return true;
}

static void close_pair(struct pair *pair)
{
	imgc_file_close(pair->file);
	close(pair->fd);
	close(pair->direct_fd);
}

static void go_direct(struct pair *pair)
{
	CHECK_EQ(imgc_file_go_direct(pair->file, pair->direct_fd, &error), IMGC_OK);
	CHECK(pair->file->is_direct);
}

static void put_model(const struct pair *pair)
{
	for (uint64_t done = 0; done < FILE_NBYTES;) {
		ssize_t put = pwrite(pair->fd, model + done, FILE_NBYTES - done, (off_t)done);

		CHECK(put > 0);
		done += (uint64_t)put;
	}
	CHECK(fsync(pair->fd) == 0);
	CHECK(posix_fadvise(pair->fd, 0, 0, POSIX_FADV_DONTNEED) == 0);
}

static void check_model(const struct pair *pair)
{
	struct imgc_io_request all = {0, found, FILE_NBYTES};

	CHECK(lseek(pair->fd, 0, SEEK_END) == (off_t)FILE_NBYTES);
	CHECK_EQ(imgc_file_read(pair->file, NULL, &all, 1, &error), IMGC_OK);
	CHECK(memcmp(found, model, FILE_NBYTES) == 0);
	/* The page cache has the same as the medium. */
	memset(found, 0, sizeof(found));
	for (uint64_t done = 0; done < FILE_NBYTES;) {
		ssize_t got = syscall(SYS_pread64, pair->fd, found + done, FILE_NBYTES - done,
				      (off_t)done);

		CHECK(got > 0);
		done += (uint64_t)got;
	}
	CHECK(memcmp(found, model, FILE_NBYTES) == 0);
}

static size_t count_cached(int fd)
{
	static uint8_t pages[FILE_NBYTES / 4096 + 1];
	void *map = mmap(NULL, FILE_NBYTES, PROT_READ, MAP_SHARED, fd, 0);
	size_t n = 0;

	CHECK(map != MAP_FAILED);
	CHECK(mincore(map, FILE_NBYTES, pages) == 0);
	for (size_t i = 0; i < sizeof(pages); i++)
		n += pages[i] & 1;
	munmap(map, FILE_NBYTES);
	return n;
}

static uint64_t below(unsigned *seed, uint64_t limit)
{
	return ((uint64_t)rand_r(seed) << 16 ^ (uint64_t)rand_r(seed)) % limit;
}

/* A range of any kind: aligned or not, long or short, at the file's end or before. */
static void choose_range(unsigned *seed, uint64_t *offset, uint64_t *length)
{
	uint64_t unit = below(seed, 3) ? 4096 : 1;
	uint64_t longest = below(seed, 2) ? FILE_NBYTES : 200000;

	*offset = below(seed, FILE_NBYTES) / unit * unit;
	*length = (below(seed, longest) / unit + 1) * unit;
	if (*length > FILE_NBYTES - *offset)
		*length = FILE_NBYTES - *offset;
}

/* ------------------------------------------------------------------ reading */

static void read_ranges(struct pair *pair, struct imgc_io_context *ctx, unsigned seed)
{
	/* Longer than what one round takes at once. */
	static uint8_t buffers[4][FILE_NBYTES + 4096] __attribute__((aligned(4096)));
	struct imgc_io_request requests[150];

	for (int round = 0; round < N_ROUNDS; round++) {
		size_t n = below(&seed, 8) ? 1 + below(&seed, 4) : 150;

		for (size_t i = 0; i < n; i++) {
			uint64_t offset, length;

			choose_range(&seed, &offset, &length);
			if (n > 4)
				length = imgc_min_u64(length, 20000);
			/* As aligned as the file, or not. */
			uint64_t shift = below(&seed, 3) ? offset % 4096 : below(&seed, 4096);
			uint64_t place = n > 4 ? i / 4 * 24 * 1024 : 0;

			requests[i] = (struct imgc_io_request){
				offset, buffers[i % 4] + place + shift, length};
			memset(requests[i].buffer, 0xee, length);
		}
		CHECK_EQ(imgc_file_read(pair->file, ctx, requests, n, &error), IMGC_OK);
		for (size_t i = 0; i < n; i++)
			CHECK(memcmp(requests[i].buffer, model + requests[i].offset,
				     requests[i].length) == 0);
	}
}

static void test_reads(void)
{
	struct imgc_io_context *ctx = NULL;
	struct pair pair;
	uint8_t byte;

	CHECK(open_pair(&pair));
	put_model(&pair);
	size_t n_before = count_cached(pair.fd);

	go_direct(&pair);
	CHECK_EQ(imgc_file_go_direct(pair.file, pair.direct_fd, &error), IMGC_UNSUPPORTED);
	CHECK_EQ(imgc_io_context_create(IMGC_IO_BY_FILES, true, &ctx), IMGC_OK);
	if (ctx)
		read_ranges(&pair, ctx, 5);
	CHECK_EQ(imgc_file_read_now(pair.file, 0, &byte, 1), 0);
	/* Btrfs reads a few pages in its own way. */
	CHECK(count_cached(pair.fd) <= n_before + 16);
	read_ranges(&pair, NULL, 6);

	/* What the kernel was told of is read as it says, and the rest as before. */
	imgc_file_will_need(pair.file, 100000, 500000);
	imgc_file_will_need(pair.file, FILE_NBYTES - 10, 10);
	imgc_file_will_need(pair.file, INT64_MAX - 100, 100);
	imgc_file_will_need(pair.file, 5, 0);
	read_ranges(&pair, ctx, 8);
	struct imgc_io_request there = {123456, found, 100000};

	fail_from(pair.direct_fd, 0, EIO, 0);
	CHECK_EQ(imgc_file_read(pair.file, NULL, &there, 1, &error), IMGC_OK);
	fail_from(-1, 0, 0, 0);
	struct imgc_io_request past[] = {{FILE_NBYTES - 10, found, 11},
					 {FILE_NBYTES - 100000, found, 200000},
					 {FILE_NBYTES + 100000, found, 1},
					 {UINT64_MAX - 10, found, 100}};

	for (size_t i = 0; i < 4; i++) {
		CHECK_EQ(imgc_file_read(pair.file, ctx, &past[i], 1, &error), IMGC_PAST_END);
		CHECK(i > 1 || error.offset == FILE_NBYTES);
	}
	CHECK_EQ(imgc_file_read(pair.file, NULL, NULL, 0, &error), IMGC_OK);
	imgc_io_context_destroy(ctx);
	close_pair(&pair);
}

/* ------------------------------------------------------------------ writing */

/* Writes [offset, offset + length) of new bytes in entries of any length. */
static int write_range(struct imgc_file *file, unsigned *seed, uint8_t *bytes, uint64_t offset,
		       uint64_t length)
{
	struct iovec iov[64];
	uint64_t done = 0;
	int n = 0;

	while (n < 63 && done < length) {
		uint64_t step = below(seed, 4) ? length - done : below(seed, length - done + 1);

		step = below(seed, 2) ? step / 4096 * 4096 : step;
		iov[n++] = (struct iovec){bytes + done, step};
		done += step;
	}
	iov[n++] = (struct iovec){bytes + done, length - done};
	return imgc_file_write(file, iov, n, offset, &error);
}

static void test_writes(void)
{
	static uint8_t bytes[FILE_NBYTES + 8192] __attribute__((aligned(4096)));
	unsigned seed = 7;
	struct pair pair;

	CHECK(open_pair(&pair));
	go_direct(&pair);
	/* An empty file first, which grows. */
	for (uint64_t at = 0; at < FILE_NBYTES;) {
		uint64_t length = imgc_min_u64(1 + below(&seed, 300000), FILE_NBYTES - at);

		CHECK_EQ(write_range(pair.file, &seed, model + at, at, length), IMGC_OK);
		at += length;
	}
	check_model(&pair);
	for (int round = 0; round < N_ROUNDS; round++) {
		uint64_t offset, length;

		choose_range(&seed, &offset, &length);
		uint64_t shift = below(&seed, 2) ? offset % 4096 : below(&seed, 4096);

		fill_random(bytes + shift, length, seed);
		CHECK_EQ(write_range(pair.file, &seed, bytes + shift, offset, length), IMGC_OK);
		memcpy(model + offset, bytes + shift, length);
		if (round % 8 == 0)
			check_model(&pair);
	}
	check_model(&pair);
	CHECK(fsync(pair.fd) == 0);
	struct iovec iov = {bytes, 100000};

	CHECK_EQ(imgc_file_write(pair.file, &iov, 1, INT64_MAX - 10, &error), IMGC_OUT_OF_RANGE);
	close_pair(&pair);
}

static struct imgc_file *shared;
static _Atomic uint64_t next_offset;

/* Ranges that no page boundary separates, so that pages are written from both sides. */
static void *write_part(void *argument)
{
	const uint64_t nbytes = 123457;
	uint64_t offset;

	while ((offset = atomic_fetch_add(&next_offset, nbytes)) < FILE_NBYTES) {
		struct iovec iov = {model + offset, imgc_min_u64(nbytes, FILE_NBYTES - offset)};

		CHECK_EQ(imgc_file_write(shared, &iov, 1, offset, argument), IMGC_OK);
	}
	return NULL;
}

static void test_threads(void)
{
	struct pair pair;

	CHECK(open_pair(&pair));
	go_direct(&pair);
	shared = pair.file;
	for (unsigned round = 0; round < 20; round++) {
		struct imgc_error errors[N_THREADS];
		pthread_t threads[N_THREADS];

		fill_random(model, sizeof(model), 100 + round);
		atomic_store(&next_offset, 0);
		for (size_t i = 0; i < N_THREADS; i++)
			CHECK(pthread_create(&threads[i], NULL, write_part, &errors[i]) == 0);
		for (size_t i = 0; i < N_THREADS; i++)
			CHECK(pthread_join(threads[i], NULL) == 0);
		check_model(&pair);
		CHECK(fsync(pair.fd) == 0);
	}
	close_pair(&pair);
}

/* ----------------------------------------------------------- when it fails */

static void test_faults(void)
{
	static uint8_t bytes[1 << 20] __attribute__((aligned(4096)));
	struct imgc_io_request request = {100, found, 1 << 20};
	struct imgc_io_request aligned = {8192, bytes, 1 << 20};
	struct iovec iov = {bytes, sizeof(bytes)};
	struct pair pair;

	/* It is refused at once, */
	CHECK(open_pair(&pair));
	put_model(&pair);
	fail_from(pair.direct_fd, 0, EINVAL, 0);
	CHECK_EQ(imgc_file_go_direct(pair.file, pair.direct_fd, &error), IMGC_UNSUPPORTED);
	CHECK(!pair.file->is_direct);
	fail_from(-1, 0, 0, 0);
	go_direct(&pair);

	/* or fails for once, which is an error, */
	fail_from(pair.direct_fd, 1, EIO, 0);
	CHECK_EQ(imgc_file_read(pair.file, NULL, &aligned, 1, &error), IMGC_OK);
	CHECK_EQ(imgc_file_read(pair.file, NULL, &aligned, 1, &error), IMGC_IO);
	CHECK_EQ(error.os_errno, EIO);
	CHECK_EQ(imgc_file_read(pair.file, NULL, &request, 1, &error), IMGC_IO);
	fail_from(pair.direct_fd, 0, ENOSPC, 0);
	CHECK_EQ(imgc_file_write(pair.file, &iov, 1, 1000, &error), IMGC_IO);
	CHECK_EQ(error.os_errno, ENOSPC);
	CHECK_EQ(error.offset, 4096);
	CHECK_EQ(imgc_file_write(pair.file, &iov, 1, 4096, &error), IMGC_IO);

	/* or moves less than it was asked for: whole units, or not, */
	for (size_t short_by = 100; short_by < 20000; short_by += 3996) {
		for (uint64_t offset = 0; offset < 5000; offset += 4096 + 100) {
			fill_random(bytes, sizeof(bytes), (unsigned)short_by);
			memcpy(model + offset, bytes, sizeof(bytes));
			fail_from(pair.direct_fd, 0, 0, short_by);
			CHECK_EQ(imgc_file_write(pair.file, &iov, 1, offset, &error), IMGC_OK);
			fail_from(-1, 0, 0, 0);
			check_model(&pair);
		}
		if (short_by % 4096 == 0) {
			fail_from(pair.direct_fd, 0, 0, short_by);
			CHECK_EQ(imgc_file_read(pair.file, NULL, &request, 1, &error), IMGC_OK);
			CHECK(memcmp(found, model + 100, 1 << 20) == 0);
		}
	}

	/* or is refused from some time on: then all goes through the page cache. */
	fill_random(bytes, sizeof(bytes), 77);
	memcpy(model + 12288, bytes, sizeof(bytes));
	fail_from(pair.direct_fd, 0, EINVAL, 0);
	CHECK_EQ(imgc_file_write(pair.file, &iov, 1, 12288, &error), IMGC_OK);
	CHECK_EQ(imgc_file_read(pair.file, NULL, &request, 1, &error), IMGC_OK);
	CHECK_EQ(imgc_file_read(pair.file, NULL, &aligned, 1, &error), IMGC_OK);
	CHECK(memcmp(bytes, model + 8192, sizeof(bytes)) == 0);
	CHECK_EQ(atomic_load(&faulty.n_calls), 1);
	fail_from(-1, 0, 0, 0);
	check_model(&pair);
	close_pair(&pair);
}

/* A refusal in the middle of reads of each kind. */
static void test_refused_reads(void)
{
	static uint8_t bytes[2][1 << 20] __attribute__((aligned(4096)));

	for (uint64_t shift = 0; shift < 200; shift += 100) {
		struct imgc_io_request requests[2] = {{8192 + shift, bytes[0], 1 << 20},
						      {3 << 20, bytes[1], 1 << 20}};
		struct pair pair;

		CHECK(open_pair(&pair));
		put_model(&pair);
		go_direct(&pair);
		fail_from(pair.direct_fd, 0, EINVAL, 0);
		CHECK_EQ(imgc_file_read(pair.file, NULL, requests, 2, &error), IMGC_OK);
		fail_from(-1, 0, 0, 0);
		CHECK(memcmp(bytes[0], model + 8192 + shift, 1 << 20) == 0);
		CHECK(memcmp(bytes[1], model + (3 << 20), 1 << 20) == 0);
		close_pair(&pair);
	}
}

static void test_other_files(void)
{
	struct imgc_file *file = NULL;

	CHECK_EQ(imgc_file_open_null(&file), IMGC_OK);
	CHECK_EQ(imgc_file_go_direct(file, -1, &error), IMGC_UNSUPPORTED);
	CHECK(!file->is_direct);
	imgc_file_close(file);
	imgc_direct_destroy(NULL);
}

int main(void)
{
	struct pair pair;

	test_other_files();
	if (!open_pair(&pair)) {
		printf("test_direct: skipped: the file system has no direct requests\n");
		close(pair.fd);
		return 0;
	}
	close_pair(&pair);
	fill_random(model, sizeof(model), 3);
	test_reads();
	test_writes();
	test_threads();
	test_faults();
	test_refused_reads();
	return 0;
}
