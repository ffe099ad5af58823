/*
 * test_drop.c - what the page cache has of a file that is dropped behind a job
 */
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "io/drop.h"
#include "io/io.h"
#include "tests/test_util.h"

#define FILE_NBYTES ((uint64_t)48 << 20)
#define PIECE_NBYTES ((uint64_t)64 << 10)
#define N_THREADS 3
#define TMPFS_MAGIC 0x01021994

static struct imgc_error error;
static uint8_t piece[PIECE_NBYTES];
static uint8_t pages[FILE_NBYTES / 4096 + 1];

/* A file whose pages are in memory because they were read, not because it is there. */
static int temporary_fd(void)
{
	const char *folder = getenv("TMPDIR");
	char path[4096];
	struct statfs system;

	snprintf(path, sizeof(path), "%s/imgc-test-XXXXXX", folder ? folder : "/tmp");
	int fd = mkstemp(path);

	CHECK(fd >= 0);
	CHECK(unlink(path) == 0);
	CHECK(fstatfs(fd, &system) == 0);
	if (system.f_type == TMPFS_MAGIC) {
		printf("test_drop: skipped: %s is in memory only\n", path);
		exit(0);
	}
	return fd;
}

static size_t count_cached(int fd, uint64_t start, uint64_t end)
{
	uint64_t unit = (uint64_t)sysconf(_SC_PAGESIZE);
	void *map = mmap(NULL, (size_t)(end - start), PROT_READ, MAP_SHARED, fd, (off_t)start);
	size_t n = 0;

	CHECK(map != MAP_FAILED);
	CHECK(mincore(map, (size_t)(end - start), pages) == 0);
	for (uint64_t i = 0; i < (end - start + unit - 1) / unit; i++)
		n += pages[i] & 1;
	munmap(map, (size_t)(end - start));
	return n;
}

static void write_at(struct imgc_file *file, uint64_t offset)
{
	struct iovec iov[2] = {{piece, 1000}, {piece + 1000, PIECE_NBYTES - 1000}};

	CHECK_EQ(imgc_file_write(file, iov, 2, offset, &error), IMGC_OK);
}

static void read_at(struct imgc_file *file, uint64_t offset, uint64_t length)
{
	uint8_t back[PIECE_NBYTES];
	struct imgc_io_request request = {offset, back, length};

	CHECK_EQ(imgc_file_read(file, NULL, &request, 1, &error), IMGC_OK);
	CHECK(memcmp(back, piece + offset % PIECE_NBYTES, length) == 0);
}

static struct imgc_file *open_dropping(int fd)
{
	struct imgc_file *file = NULL;

	CHECK_EQ(imgc_file_open_fd(fd, &file, &error), IMGC_OK);
	CHECK_EQ(imgc_file_drop_behind(file, &error), IMGC_OK);
	return file;
}

static void *write_part(void *argument)
{
	static _Atomic uint64_t next;
	uint64_t offset;

	while ((offset = atomic_fetch_add(&next, PIECE_NBYTES)) < FILE_NBYTES)
		write_at(argument, offset);
	return NULL;
}

static void *read_part(void *argument)
{
	static _Atomic uint64_t next;
	uint64_t offset;

	while ((offset = atomic_fetch_add(&next, PIECE_NBYTES)) < FILE_NBYTES)
		read_at(argument, offset + 100, 3000);
	return NULL;
}

static void on_threads(void *(*work)(void *), struct imgc_file *file)
{
	pthread_t threads[N_THREADS];

	for (size_t i = 0; i < N_THREADS; i++)
		CHECK(pthread_create(&threads[i], NULL, work, file) == 0);
	for (size_t i = 0; i < N_THREADS; i++)
		CHECK(pthread_join(threads[i], NULL) == 0);
}

static void test_written_and_read(int fd)
{
	struct imgc_file *file = open_dropping(fd);

	on_threads(write_part, file);
	/* Three batches of 8 MiB wait at most, and what threads have just written. */
	CHECK(count_cached(fd, 0, FILE_NBYTES) * 4096 <= ((uint64_t)25 << 20));
	CHECK_EQ(imgc_file_note_written(file, 0, 0, &error), IMGC_OK);
	CHECK(fsync(fd) == 0);
	imgc_file_drop_rest(file);
	CHECK_EQ(count_cached(fd, 0, FILE_NBYTES), 0);
	on_threads(read_part, file);
	imgc_file_note_read(file, 0, FILE_NBYTES);
	CHECK(count_cached(fd, 0, FILE_NBYTES) * 4096 <= ((uint64_t)9 << 20));
	/* Two batches stay until there are more. */
	for (uint64_t at = 0; at < FILE_NBYTES; at += PIECE_NBYTES)
		read_at(file, at, PIECE_NBYTES);
	CHECK(count_cached(fd, 0, FILE_NBYTES) * 4096 <= ((uint64_t)17 << 20));
	imgc_file_drop_rest(file);
	CHECK_EQ(count_cached(fd, 0, FILE_NBYTES), 0);
	imgc_file_close(file);
}

/* Single pages that were cached before stay, among others that are read and dropped. */
static void test_kept(int fd)
{
	uint8_t byte;
	size_t n_before;

	CHECK(posix_fadvise(fd, 0, 0, POSIX_FADV_RANDOM) == 0);
	for (uint64_t at = 0; at < FILE_NBYTES; at += (uint64_t)3 << 20)
		CHECK(pread(fd, &byte, 1, (off_t)at) == 1);
	CHECK(pread(fd, &byte, 1, (off_t)(FILE_NBYTES - 1)) == 1);
	n_before = count_cached(fd, 0, FILE_NBYTES);
	CHECK(n_before >= 17);
	struct imgc_file *file = open_dropping(fd);

	for (uint64_t at = 0; at < FILE_NBYTES; at += PIECE_NBYTES)
		read_at(file, at, PIECE_NBYTES);
	imgc_file_drop_rest(file);
	CHECK_EQ(count_cached(fd, 0, FILE_NBYTES), n_before);
	for (uint64_t at = 0; at < FILE_NBYTES; at += (uint64_t)3 << 20)
		CHECK_EQ(count_cached(fd, at, at + 1), 1);
	imgc_file_close(file);
}

static void test_ranges_that_cannot_be(int fd)
{
	struct imgc_dropper *dropper = NULL;

	CHECK_EQ(imgc_dropper_create(fd, 0, &dropper, &error), IMGC_OK);
	for (size_t i = 0; i < 1000; i++)
		imgc_dropper_add_read(dropper, UINT64_MAX - i, UINT64_MAX);
	imgc_dropper_add_read(dropper, INT64_MAX - 1, 1);
	imgc_dropper_add_read(dropper, 0, INT64_MAX);
	CHECK_EQ(imgc_dropper_add_written(dropper, UINT64_MAX, 2, &error), IMGC_OK);
	CHECK_EQ(imgc_dropper_status(dropper, &error), IMGC_OK);
	imgc_dropper_destroy(dropper);
	imgc_dropper_destroy(NULL);
}

static void test_other_files(void)
{
	struct imgc_file *file = NULL;

	CHECK_EQ(imgc_file_open_null(&file), IMGC_OK);
	CHECK_EQ(imgc_file_drop_behind(file, &error), IMGC_OK);
	imgc_file_note_read(file, 0, 10);
	CHECK_EQ(imgc_file_note_written(file, 0, 10, &error), IMGC_OK);
	imgc_file_drop_rest(file);
	imgc_file_close(file);
}

int main(void)
{
	int fd = temporary_fd();

	fill_random(piece, sizeof(piece), 3);
	test_written_and_read(fd);
	test_kept(fd);
	test_ranges_that_cannot_be(fd);
	test_other_files();
	close(fd);
	return 0;
}
