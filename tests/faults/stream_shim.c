/*
 * stream_shim.c - lets the Nth write into a pipe fail, or the Nth read from one
 *
 * $STREAM_FAULT is "N ERRNO", or "N ERRNO all" for that write and all later ones.
 * $STREAM_READ_FAULT is the same for reads.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>

static atomic_int n_writes, n_reads;

/* Whether the fault in $NAME is due at this call, with errno set. */
static int fails(const char *name, int fd, atomic_int *n_calls)
{
	const char *fault = getenv(name);
	int nth = 0, code = 0;
	char all[4] = "";
	struct stat st;

	if (!fault || fstat(fd, &st) || !S_ISFIFO(st.st_mode) ||
	    sscanf(fault, "%d %d %3s", &nth, &code, all) < 2)
		return 0;
	int call = atomic_fetch_add(n_calls, 1) + 1;

	errno = code;
	return call == nth || (call > nth && strcmp(all, "all") == 0);
}

ssize_t writev(int fd, const struct iovec *iov, int n)
{
	static ssize_t (*real)(int, const struct iovec *, int);

	if (!real)
		*(void **)&real = dlsym(RTLD_NEXT, "writev");
	return fails("STREAM_FAULT", fd, &n_writes) ? -1 : real(fd, iov, n);
}

ssize_t splice(int in, off64_t *from, int out, off64_t *to, size_t nbytes, unsigned flags)
{
	static ssize_t (*real)(int, off64_t *, int, off64_t *, size_t, unsigned);

	if (!real)
		*(void **)&real = dlsym(RTLD_NEXT, "splice");
	return fails("STREAM_FAULT", out, &n_writes) ? -1 : real(in, from, out, to, nbytes, flags);
}

ssize_t readv(int fd, const struct iovec *iov, int n)
{
	static ssize_t (*real)(int, const struct iovec *, int);

	if (!real)
		*(void **)&real = dlsym(RTLD_NEXT, "readv");
	return fails("STREAM_READ_FAULT", fd, &n_reads) ? -1 : real(fd, iov, n);
}
