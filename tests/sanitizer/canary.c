/*
 * Three deliberate faults, built into sanitizer builds only: a build in which
 * they do not kill the process checks nothing, whatever else passes.
 */
#include <assert.h>
#include <stdint.h>
#include <stdlib.h>

#define EXPORT __attribute__((visibility("default")))

EXPORT int imgc_canary_overread(void)
{
	volatile unsigned char *data = malloc(100);
	int value = data == NULL ? 0 : data[100];

	free((void *)data);
	return value;
}

EXPORT int imgc_canary_overflow(int increment)
{
	return INT32_MAX + increment;
}

EXPORT int imgc_canary_assert(int value)
{
	assert(value == 0);
	return value;
}

/* ctypes loads this file; the symbol keeps setuptools content. */
EXPORT void *PyInit__canary(void)
{
	return NULL;
}
