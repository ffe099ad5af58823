/*
 * stream_shim.c - lets the Nth write into a pipe fail
 *
 * $STREAM_FAULT is "N ERRNO", or "N ERRNO all" for that write and all later ones.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>

static atomic_int n_calls;

ssize_t writev(int fd, const struct iovec *iov, int n)
{
	static ssize_t (*real)(int, const struct iovec *, int);
	const char *fault = getenv("STREAM_FAULT");
	int nth = 0, code = 0;
	char all[4] = "";
	struct stat st;

	if (!real)
		*(void **)&real = dlsym(RTLD_NEXT, "writev");
	if (!fault || fstat(fd, &st) || !S_ISFIFO(st.st_mode) ||
	    sscanf(fault, "%d %d %3s", &nth, &code, all) < 2)
		return real(fd, iov, n);
	int call = atomic_fetch_add(&n_calls, 1) + 1;

	if (call == nth || (call > nth && strcmp(all, "all") == 0)) {
		errno = code;
		return -1;
	}
	return real(fd, iov, n);
}
