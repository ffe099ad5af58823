/*
 * stream_shim.c - lets the Nth write into a pipe fail
 *
 * $STREAM_FAULT is "N ERRNO", or "N ERRNO all" for that write and all later ones.
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

static atomic_int n_calls;

/* The errno of the fault that is due at this write; 0: none is. */
static int due(int fd)
{
	const char *fault = getenv("STREAM_FAULT");
	int nth = 0, code = 0;
	char all[4] = "";
	struct stat st;

	if (!fault || fstat(fd, &st) || !S_ISFIFO(st.st_mode) ||
	    sscanf(fault, "%d %d %3s", &nth, &code, all) < 2)
		return 0;
	int call = atomic_fetch_add(&n_calls, 1) + 1;

	return call == nth || (call > nth && strcmp(all, "all") == 0) ? code : 0;
}

ssize_t writev(int fd, const struct iovec *iov, int n)
{
	static ssize_t (*real)(int, const struct iovec *, int);
	int code = due(fd);

	if (!real)
		*(void **)&real = dlsym(RTLD_NEXT, "writev");
	if (!code)
		return real(fd, iov, n);
	errno = code;
	return -1;
}

ssize_t splice(int in, off64_t *from, int out, off64_t *to, size_t nbytes, unsigned flags)
{
	static ssize_t (*real)(int, off64_t *, int, off64_t *, size_t, unsigned);
	int code = due(out);

	if (!real)
		*(void **)&real = dlsym(RTLD_NEXT, "splice");
	if (!code)
		return real(in, from, out, to, nbytes, flags);
	errno = code;
	return -1;
}
