/*
 * shim.c - faults between a process and its C library, by LD_PRELOAD
 *
 * The shim counts calls on files below one folder, by class.  The n-th call of a mask of
 * classes, or every call from then on, can fail, end the process, or fail for one range of
 * a file.  The shim can also record writes, syncs and renames in their order, with their
 * bytes, and make allocations of named libraries fail.
 *
 * A test drives it from inside the process by fault_...(), or from outside by $FAULT_SPEC.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <link.h>
#include <linux/fs.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/xattr.h>
#include <time.h>
#include <unistd.h>

enum fault_class {
	CLASS_READ = 1 << 0,
	CLASS_WRITE = 1 << 1,
	CLASS_SYNC = 1 << 2,
	CLASS_RENAME = 1 << 3,
	CLASS_ALLOCATE = 1 << 4, /* of file space: fallocate */
	CLASS_TRUNCATE = 1 << 5,
	CLASS_CREATE = 1 << 6,
	CLASS_CLOSE = 1 << 7, /* of a file opened for writing */
	CLASS_UNLINK = 1 << 8,
	CLASS_COPY = 1 << 9,	   /* copy_file_range */
	CLASS_REFLINK = 1 << 10,   /* FICLONERANGE */
	CLASS_ATTRIBUTE = 1 << 11, /* mode, owner, times, extended attributes, project */
	CLASS_STATUS = 1 << 12,	   /* fstat, lseek */
	CLASS_OPEN = 1 << 13,	   /* of an existing file */
};

enum fault_mode { FAIL_ONCE, FAIL_ON, KILL_BEFORE, KILL_HALFWAY };

enum record_kind {
	REC_CREATE = 1,
	REC_WRITE,
	REC_ZERO,
	REC_TRUNCATE,
	REC_SYNC,
	REC_RENAME,
	REC_UNLINK,
	REC_MARK /* of a test; the number is in `offset` */
};

/* One row of the log; two names of the given lengths and the data follow. */
struct record {
	uint32_t kind;
	uint32_t name_nbytes, new_name_nbytes;
	uint32_t is_folder;
	uint64_t inode;
	uint64_t offset;
	uint64_t length; /* of the data, or of the range */
};

static char folder[PATH_MAX];
static size_t folder_nbytes;
static _Atomic unsigned armed_mask;
static _Atomic long armed_nth, n_seen, n_hit;
static int armed_errno, armed_mode;

static ino_t bad_inode;
static uint64_t bad_start, bad_end;

static pthread_mutex_t log_lock = PTHREAD_MUTEX_INITIALIZER;
static int log_fd = -1;

#define REAL(name)                                                                                 \
	static __typeof__(&name) real;                                                             \
	if (!real)                                                                                 \
	real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

/* ---------------------------------------------------------------- the control */

void fault_watch(const char *path)
{
	snprintf(folder, sizeof(folder), "%s", path);
	folder_nbytes = strlen(folder);
}

void fault_arm(unsigned mask, long nth, int os_errno, int mode)
{
	armed_errno = os_errno;
	armed_mode = mode;
	atomic_store(&armed_nth, nth);
	atomic_store(&n_seen, 0);
	atomic_store(&n_hit, 0);
	atomic_store(&armed_mask, mask);
}

/* Ends the faults, and returns the number of calls of the mask since fault_arm(). */
long fault_disarm(void)
{
	atomic_store(&armed_mask, 0);
	return atomic_load(&n_seen);
}

long fault_hits(void)
{
	return atomic_load(&n_hit);
}

void fault_bad_range(uint64_t inode, uint64_t start, uint64_t end)
{
	bad_inode = (ino_t)inode;
	bad_start = start;
	bad_end = end;
}

int fault_log(const char *path)
{
	if (log_fd >= 0)
		close(log_fd);
	log_fd = path ? open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600) : -1;
	return log_fd;
}

/* $FAULT_SPEC is "folder|mask|nth|errno|mode", then optionally "|inode|start|end". */
__attribute__((constructor)) static void read_spec(void)
{
	const char *spec = getenv("FAULT_SPEC");
	unsigned mask = 0;
	long nth = 0;
	int code = 0, mode = 0;
	unsigned long inode = 0, start = 0, end = 0;
	char path[PATH_MAX];

	if (!spec || sscanf(spec, "%4095[^|]|%u|%ld|%d|%d|%lu|%lu|%lu", path, &mask, &nth, &code,
			    &mode, &inode, &start, &end) < 5)
		return;
	fault_watch(path);
	fault_bad_range(inode, start, end);
	fault_arm(mask, nth, code, mode);
}

/* ---------------------------------------------------------------- what is watched */

static bool path_is_watched(const char *path)
{
	return folder_nbytes && strncmp(path, folder, folder_nbytes) == 0 &&
	       (path[folder_nbytes] == '/' || path[folder_nbytes] == 0);
}

static bool fd_path(int fd, char *out, size_t capacity)
{
	char link[64];
	ssize_t n;
	int saved = errno;

	snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
	n = readlink(link, out, capacity - 1);
	errno = saved;
	if (n <= 0)
		return false;
	out[n] = 0;
	return true;
}

static bool fd_is_watched(int fd)
{
	char path[PATH_MAX];

	return folder_nbytes && fd_path(fd, path, sizeof(path)) && path_is_watched(path);
}

static bool at_is_watched(int dir_fd, const char *name)
{
	char path[PATH_MAX];

	if (!folder_nbytes || !name)
		return false;
	if (name[0] == '/')
		return path_is_watched(name);
	if (dir_fd == AT_FDCWD)
		return getcwd(path, sizeof(path)) && path_is_watched(path);
	return fd_is_watched(dir_fd);
}

/* Returns whether this call of the class fails now, with errno set.  *half: do half of it,
 * then die. */
static bool is_hit(unsigned class, bool *half)
{
	long number;

	*half = false;
	if (!(atomic_load(&armed_mask) & class))
		return false;
	number = atomic_fetch_add(&n_seen, 1) + 1;
	if (number != armed_nth && !(armed_mode == FAIL_ON && armed_nth && number > armed_nth))
		return false;
	atomic_fetch_add(&n_hit, 1);
	if (armed_mode == KILL_BEFORE)
		raise(SIGKILL);
	if (armed_mode == KILL_HALFWAY) {
		*half = true;
		return false;
	}
	errno = armed_errno;
	return true;
}

static bool fails(unsigned class)
{
	bool half;

	if (is_hit(class, &half))
		return true;
	if (half)
		raise(SIGKILL);
	return false;
}

static bool is_bad_range(int fd, uint64_t offset, uint64_t length)
{
	struct stat st;

	if (!bad_inode || offset >= bad_end || offset + length <= bad_start || fstat(fd, &st) ||
	    st.st_ino != bad_inode)
		return false;
	errno = EIO;
	return true;
}

/* ---------------------------------------------------------------- the log */

static ssize_t put_all(const void *data, size_t nbytes)
{
	REAL(write);
	return real(log_fd, data, nbytes);
}

static void put_record(const struct record *head, const char *name, const char *new_name,
		       const struct iovec *iov, int n)
{
	uint64_t left = head->length;

	put_all(head, sizeof(*head));
	if (head->name_nbytes)
		put_all(name, head->name_nbytes);
	if (head->new_name_nbytes)
		put_all(new_name, head->new_name_nbytes);
	for (int i = 0; i < n && left; i++) {
		size_t piece = iov[i].iov_len < left ? iov[i].iov_len : (size_t)left;

		put_all(iov[i].iov_base, piece);
		left -= piece;
	}
}

/* Records an event of a file; `iov` may be NULL. */
static void record_file(uint32_t kind, int fd, uint64_t offset, uint64_t length,
			const struct iovec *iov, int n)
{
	struct stat st;
	struct record head = {.kind = kind, .offset = offset, .length = length};
	int saved = errno;

	if (!fstat(fd, &st)) {
		head.inode = st.st_ino;
		head.is_folder = S_ISDIR(st.st_mode);
		put_record(&head, NULL, NULL, iov, n);
	}
	errno = saved;
}

static const char *last_part(const char *path)
{
	const char *slash = strrchr(path, '/');

	return slash ? slash + 1 : path;
}

static void record_names(uint32_t kind, const char *name, const char *new_name, uint64_t inode)
{
	struct record head = {.kind = kind, .inode = inode};
	int saved = errno;

	name = last_part(name);
	head.name_nbytes = (uint32_t)strlen(name);
	if (new_name) {
		new_name = last_part(new_name);
		head.new_name_nbytes = (uint32_t)strlen(new_name);
	}
	put_record(&head, name, new_name, NULL, 0);
	errno = saved;
}

static void begin_logging(void)
{
	pthread_mutex_lock(&log_lock);
}

static void end_logging(void)
{
	pthread_mutex_unlock(&log_lock);
}

/* Records a number, so that a test finds in the log what it was doing. */
void fault_mark(uint64_t number)
{
	struct record head = {.kind = REC_MARK, .offset = number};

	if (log_fd < 0)
		return;
	begin_logging();
	put_record(&head, NULL, NULL, NULL, 0);
	end_logging();
}

/* ---------------------------------------------------------------- reading */

static bool read_fails(int fd, uint64_t offset, uint64_t length)
{
	if (!fd_is_watched(fd))
		return false;
	return fails(CLASS_READ) || is_bad_range(fd, offset, length);
}

ssize_t pread(int fd, void *buffer, size_t nbytes, off_t offset)
{
	REAL(pread);
	return read_fails(fd, (uint64_t)offset, nbytes) ? -1 : real(fd, buffer, nbytes, offset);
}

ssize_t pread64(int fd, void *buffer, size_t nbytes, off64_t offset)
{
	return pread(fd, buffer, nbytes, offset);
}

ssize_t __pread64_chk(int fd, void *buffer, size_t nbytes, off64_t offset, size_t capacity);
ssize_t __pread64_chk(int fd, void *buffer, size_t nbytes, off64_t offset, size_t capacity)
{
	(void)capacity;
	return pread(fd, buffer, nbytes, offset);
}

ssize_t preadv(int fd, const struct iovec *iov, int n, off_t offset)
{
	uint64_t length = 0;

	REAL(preadv);
	for (int i = 0; i < n; i++)
		length += iov[i].iov_len;
	return read_fails(fd, (uint64_t)offset, length) ? -1 : real(fd, iov, n, offset);
}

ssize_t preadv64(int fd, const struct iovec *iov, int n, off64_t offset)
{
	return preadv(fd, iov, n, offset);
}

ssize_t preadv2(int fd, const struct iovec *iov, int n, off_t offset, int flags)
{
	uint64_t length = 0;

	REAL(preadv2);
	for (int i = 0; i < n; i++)
		length += iov[i].iov_len;
	return read_fails(fd, (uint64_t)offset, length) ? -1 : real(fd, iov, n, offset, flags);
}

ssize_t preadv64v2(int fd, const struct iovec *iov, int n, off64_t offset, int flags)
{
	return preadv2(fd, iov, n, offset, flags);
}

/* ---------------------------------------------------------------- writing */

/* Makes a torn write: writes a part, which ends with a sector if it can, then dies. */
static void write_half(int fd, const struct iovec *iov, uint64_t offset)
{
	uint64_t end = (offset + iov[0].iov_len / 2) & ~UINT64_C(511);

	REAL(pwrite);
	if (end > offset)
		(void)!real(fd, iov[0].iov_base, (size_t)(end - offset), (off_t)offset);
	raise(SIGKILL);
}

ssize_t pwritev(int fd, const struct iovec *iov, int n, off_t offset)
{
	bool half = false;
	ssize_t done;

	REAL(pwritev);
	if (!fd_is_watched(fd))
		return real(fd, iov, n, offset);
	if (is_hit(CLASS_WRITE, &half))
		return -1;
	if (half)
		write_half(fd, iov, (uint64_t)offset);
	if (log_fd < 0)
		return real(fd, iov, n, offset);
	begin_logging();
	done = real(fd, iov, n, offset);
	if (done > 0)
		record_file(REC_WRITE, fd, (uint64_t)offset, (uint64_t)done, iov, n);
	end_logging();
	return done;
}

ssize_t pwritev64(int fd, const struct iovec *iov, int n, off64_t offset)
{
	return pwritev(fd, iov, n, offset);
}

ssize_t pwrite(int fd, const void *data, size_t nbytes, off_t offset)
{
	struct iovec iov = {(void *)(uintptr_t)data, nbytes};

	return pwritev(fd, &iov, 1, offset);
}

ssize_t pwrite64(int fd, const void *data, size_t nbytes, off64_t offset)
{
	return pwrite(fd, data, nbytes, offset);
}

/* Copies at most so much as is read back into a buffer, to be recorded as a write. */
static ssize_t copy_and_record(__typeof__(copy_file_range) *copy, int in, off64_t *in_at, int out,
			       off64_t *out_at, size_t nbytes)
{
	static char content[1 << 16];
	struct iovec iov = {content, 0};
	off64_t offset = *out_at;
	ssize_t done;

	REAL(pread);
	begin_logging();
	done = copy(in, in_at, out, out_at, nbytes < sizeof(content) ? nbytes : sizeof(content), 0);
	if (done > 0 && real(out, content, (size_t)done, offset) == done) {
		iov.iov_len = (size_t)done;
		record_file(REC_WRITE, out, (uint64_t)offset, (uint64_t)done, &iov, 1);
	}
	end_logging();
	return done;
}

ssize_t copy_file_range(int in, off64_t *in_at, int out, off64_t *out_at, size_t nbytes,
			unsigned flags)
{
	REAL(copy_file_range);
	if (!fd_is_watched(out))
		return real(in, in_at, out, out_at, nbytes, flags);
	if (fails(CLASS_COPY))
		return -1;
	if (log_fd < 0 || !out_at)
		return real(in, in_at, out, out_at, nbytes, flags);
	return copy_and_record(real, in, in_at, out, out_at, nbytes);
}

int ioctl(int fd, unsigned long request, ...)
{
	va_list arguments;
	va_start(arguments, request);
	void *argument = va_arg(arguments, void *);
	va_end(arguments);
	REAL(ioctl);

	if (request == FS_IOC_FSSETXATTR && fd_is_watched(fd) && fails(CLASS_ATTRIBUTE))
		return -1;
	if (request != FICLONERANGE || !fd_is_watched(fd))
		return real(fd, request, argument);
	if (fails(CLASS_REFLINK))
		return -1;
	if (log_fd >= 0) { /* the caller then writes the bytes, which are recorded */
		errno = EOPNOTSUPP;
		return -1;
	}
	return real(fd, request, argument);
}

/* ---------------------------------------------------------------- attributes */

int fchmod(int fd, mode_t mode)
{
	REAL(fchmod);
	return fd_is_watched(fd) && fails(CLASS_ATTRIBUTE) ? -1 : real(fd, mode);
}

int fchown(int fd, uid_t user, gid_t group)
{
	REAL(fchown);
	return fd_is_watched(fd) && fails(CLASS_ATTRIBUTE) ? -1 : real(fd, user, group);
}

int futimens(int fd, const struct timespec times[2])
{
	REAL(futimens);
	return fd_is_watched(fd) && fails(CLASS_ATTRIBUTE) ? -1 : real(fd, times);
}

int fsetxattr(int fd, const char *name, const void *value, size_t nbytes, int flags)
{
	REAL(fsetxattr);
	return fd_is_watched(fd) && fails(CLASS_ATTRIBUTE) ? -1
							   : real(fd, name, value, nbytes, flags);
}

/* ---------------------------------------------------------------- status */

int fstat(int fd, struct stat *st)
{
	REAL(fstat);
	if (atomic_load(&armed_mask) & CLASS_STATUS && fd_is_watched(fd) && fails(CLASS_STATUS))
		return -1;
	return real(fd, st);
}

int fstat64(int fd, struct stat64 *st)
{
	return fstat(fd, (struct stat *)st);
}

off_t lseek(int fd, off_t offset, int whence)
{
	REAL(lseek);
	if (atomic_load(&armed_mask) & CLASS_STATUS && fd_is_watched(fd) && fails(CLASS_STATUS))
		return -1;
	return real(fd, offset, whence);
}

off64_t lseek64(int fd, off64_t offset, int whence)
{
	return lseek(fd, offset, whence);
}

/* ---------------------------------------------------------------- syncing */

static int sync_by(int (*real)(int), int fd)
{
	int rc;

	if (!fd_is_watched(fd))
		return real(fd);
	if (fails(CLASS_SYNC))
		return -1;
	if (log_fd < 0)
		return real(fd);
	begin_logging();
	rc = real(fd);
	if (!rc)
		record_file(REC_SYNC, fd, 0, 0, NULL, 0);
	end_logging();
	return rc;
}

int fsync(int fd)
{
	REAL(fsync);
	return sync_by(real, fd);
}

int fdatasync(int fd)
{
	REAL(fdatasync);
	return sync_by(real, fd);
}

int ftruncate(int fd, off_t nbytes)
{
	int rc;

	REAL(ftruncate);
	if (!fd_is_watched(fd))
		return real(fd, nbytes);
	if (fails(CLASS_TRUNCATE))
		return -1;
	if (log_fd < 0)
		return real(fd, nbytes);
	begin_logging();
	rc = real(fd, nbytes);
	if (!rc)
		record_file(REC_TRUNCATE, fd, (uint64_t)nbytes, 0, NULL, 0);
	end_logging();
	return rc;
}

int ftruncate64(int fd, off64_t nbytes)
{
	return ftruncate(fd, nbytes);
}

int fallocate(int fd, int mode, off_t offset, off_t nbytes)
{
	int rc;

	REAL(fallocate);
	if (!fd_is_watched(fd))
		return real(fd, mode, offset, nbytes);
	if (fails(CLASS_ALLOCATE))
		return -1;
	if (log_fd < 0)
		return real(fd, mode, offset, nbytes);
	begin_logging();
	rc = real(fd, mode, offset, nbytes);
	if (!rc && mode & (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE)) {
		struct record head = {.kind = REC_ZERO, .offset = (uint64_t)offset};
		struct stat st;

		if (!fstat(fd, &st)) {
			/* A row without data has the range's length as a name of eight bytes. */
			uint64_t length = (uint64_t)nbytes;

			head.inode = st.st_ino;
			head.name_nbytes = sizeof(length);
			put_record(&head, (const char *)&length, NULL, NULL, 0);
		}
	}
	end_logging();
	return rc;
}

int fallocate64(int fd, int mode, off64_t offset, off64_t nbytes)
{
	return fallocate(fd, mode, offset, nbytes);
}

int posix_fallocate(int fd, off_t offset, off_t nbytes)
{
	struct stat st;

	if (fallocate(fd, 0, offset, nbytes))
		return errno;
	if (log_fd >= 0 && fd_is_watched(fd) && !fstat(fd, &st)) {
		begin_logging();
		record_file(REC_TRUNCATE, fd, (uint64_t)st.st_size, 0, NULL, 0);
		end_logging();
	}
	return 0;
}

int posix_fallocate64(int fd, off64_t offset, off64_t nbytes)
{
	return posix_fallocate(fd, offset, nbytes);
}

/* ---------------------------------------------------------------- names */

static int open_by(int dir_fd, const char *name, int flags, mode_t mode)
{
	static int (*real)(int, const char *, int, ...);
	bool is_new = flags & O_CREAT && at_is_watched(dir_fd, name);
	struct stat st;
	int fd;

	if (!real)
		real = (int (*)(int, const char *, int, ...))dlsym(RTLD_NEXT, "openat");
	if (!is_new && atomic_load(&armed_mask) & CLASS_OPEN && at_is_watched(dir_fd, name) &&
	    fails(CLASS_OPEN))
		return -1;
	if (!is_new)
		return real(dir_fd, name, flags, mode);
	if (fails(CLASS_CREATE))
		return -1;
	if (log_fd < 0)
		return real(dir_fd, name, flags, mode);
	begin_logging();
	fd = real(dir_fd, name, flags, mode);
	if (fd >= 0 && !fstat(fd, &st))
		record_names(REC_CREATE, name, NULL, st.st_ino);
	end_logging();
	return fd;
}

#define WITH_MODE(flags, mode)                                                                     \
	mode_t mode = 0;                                                                           \
	if ((flags) & (O_CREAT | O_TMPFILE)) {                                                     \
		va_list list;                                                                      \
		va_start(list, flags);                                                             \
		mode = va_arg(list, mode_t);                                                       \
		va_end(list);                                                                      \
	}

int open(const char *name, int flags, ...)
{
	WITH_MODE(flags, mode)
	return open_by(AT_FDCWD, name, flags, mode);
}

int open64(const char *name, int flags, ...)
{
	WITH_MODE(flags, mode)
	return open_by(AT_FDCWD, name, flags, mode);
}

int openat(int dir_fd, const char *name, int flags, ...)
{
	WITH_MODE(flags, mode)
	return open_by(dir_fd, name, flags, mode);
}

int openat64(int dir_fd, const char *name, int flags, ...)
{
	WITH_MODE(flags, mode)
	return open_by(dir_fd, name, flags, mode);
}

static void record_rename(int rc, const char *old, const char *new)
{
	if (!rc && log_fd >= 0)
		record_names(REC_RENAME, old, new, 0);
}

int renameat2(int old_fd, const char *old, int new_fd, const char *new, unsigned flags)
{
	int rc;

	REAL(renameat2);
	if (!at_is_watched(new_fd, new))
		return real(old_fd, old, new_fd, new, flags);
	if (fails(CLASS_RENAME))
		return -1;
	begin_logging();
	rc = real(old_fd, old, new_fd, new, flags);
	record_rename(rc, old, new);
	end_logging();
	return rc;
}

int renameat(int old_fd, const char *old, int new_fd, const char *new)
{
	return renameat2(old_fd, old, new_fd, new, 0);
}

int rename(const char *old, const char *new)
{
	return renameat2(AT_FDCWD, old, AT_FDCWD, new, 0);
}

int unlinkat(int dir_fd, const char *name, int flags)
{
	int rc;

	REAL(unlinkat);
	if (!at_is_watched(dir_fd, name))
		return real(dir_fd, name, flags);
	if (fails(CLASS_UNLINK))
		return -1;
	begin_logging();
	rc = real(dir_fd, name, flags);
	if (!rc && log_fd >= 0)
		record_names(REC_UNLINK, name, NULL, 0);
	end_logging();
	return rc;
}

int unlink(const char *name)
{
	return unlinkat(AT_FDCWD, name, 0);
}

int close(int fd)
{
	bool counts = false;

	REAL(close);
	if (atomic_load(&armed_mask) & CLASS_CLOSE)
		counts = (fcntl(fd, F_GETFL) & O_ACCMODE) != O_RDONLY && fd_is_watched(fd);
	if (counts && fails(CLASS_CLOSE)) {
		int code = errno;

		real(fd);
		errno = code;
		return -1;
	}
	return real(fd);
}

/* Skips waits, which only take time in tests. */
int nanosleep(const struct timespec *wanted, struct timespec *left)
{
	REAL(nanosleep);
	if (!atomic_load(&armed_mask) && !bad_inode)
		return real(wanted, left);
	return 0;
}

int clock_nanosleep(clockid_t clock, int flags, const struct timespec *wanted,
		    struct timespec *left)
{
	REAL(clock_nanosleep);
	if (!atomic_load(&armed_mask) && !bad_inode)
		return real(clock, flags, wanted, left);
	return 0;
}

/* ---------------------------------------------------------------- allocations */

#define MAX_LIBRARIES 8

struct range {
	uintptr_t start, end;
};

static struct range libraries[MAX_LIBRARIES];
static int n_libraries;
static _Atomic long memory_nth, memory_seen;
static _Atomic bool memory_armed;

extern void *__libc_malloc(size_t nbytes);
extern void *__libc_calloc(size_t n, size_t nbytes);
extern void *__libc_realloc(void *old, size_t nbytes);
extern void *__libc_memalign(size_t alignment, size_t nbytes);

static int add_library(struct dl_phdr_info *info, size_t size, void *words)
{
	const char *name = last_part(info->dlpi_name);

	(void)size;
	for (const char *word = words; *word; word += strlen(word) + 1) {
		if (strncmp(name, word, strlen(word)) != 0)
			continue;
		for (int i = 0; i < info->dlpi_phnum && n_libraries < MAX_LIBRARIES; i++) {
			const ElfW(Phdr) *part = &info->dlpi_phdr[i];

			if (part->p_type == PT_LOAD && part->p_flags & PF_X) {
				uintptr_t start = info->dlpi_addr + part->p_vaddr;

				libraries[n_libraries++] =
					(struct range){start, start + part->p_memsz};
			}
		}
	}
	return 0;
}

/* `names` has prefixes of libraries' file names, each ended by NUL, then one more NUL. */
int fault_memory_of(char *names)
{
	n_libraries = 0;
	dl_iterate_phdr(add_library, names);
	return n_libraries;
}

/* 0 only counts; a negative number ends the faults, and keeps the count. */
void fault_arm_memory(long nth)
{
	atomic_store(&memory_armed, false);
	if (nth < 0)
		return;
	atomic_store(&memory_nth, nth);
	atomic_store(&memory_seen, 0);
	atomic_store(&memory_armed, true);
}

long fault_memory_seen(void)
{
	return atomic_load(&memory_seen);
}

static bool memory_fails(void *caller)
{
	uintptr_t at = (uintptr_t)caller;

	if (!atomic_load(&memory_armed))
		return false;
	for (int i = 0; i < n_libraries; i++) {
		if (at < libraries[i].start || at >= libraries[i].end)
			continue;
		if (atomic_fetch_add(&memory_seen, 1) + 1 != atomic_load(&memory_nth))
			return false;
		errno = ENOMEM;
		return true;
	}
	return false;
}

#define CALLER __builtin_return_address(0)

void *malloc(size_t nbytes)
{
	return memory_fails(CALLER) ? NULL : __libc_malloc(nbytes);
}

void *calloc(size_t n, size_t nbytes)
{
	return memory_fails(CALLER) ? NULL : __libc_calloc(n, nbytes);
}

void *realloc(void *old, size_t nbytes)
{
	return memory_fails(CALLER) ? NULL : __libc_realloc(old, nbytes);
}

void *aligned_alloc(size_t alignment, size_t nbytes)
{
	return memory_fails(CALLER) ? NULL : __libc_memalign(alignment, nbytes);
}

int posix_memalign(void **out, size_t alignment, size_t nbytes)
{
	void *got = memory_fails(CALLER) ? NULL : __libc_memalign(alignment, nbytes);

	if (!got)
		return ENOMEM;
	*out = got;
	return 0;
}
