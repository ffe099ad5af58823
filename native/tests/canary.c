/*
 * canary.c - deliberate faults
 *
 * If they do not kill the process, the build or the checker detects nothing, and its
 * other results mean nothing.  A program for the native tests; a module for sanitized
 * builds of the extension (setup.py).
 */
#include <assert.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

EXPORT int imgc_canary_overread(void);
EXPORT int imgc_canary_overflow(int increment);
EXPORT int imgc_canary_assert(int value);
EXPORT int imgc_canary_race(void);
EXPORT void *PyInit__canary(void);

EXPORT int imgc_canary_overread(void)
{
	/*
	 * Volatile, so that neither the compiler nor UBSan finds the fault before ASan.
	 */
	unsigned char *volatile data = calloc(100, 1);
	int value = data == NULL ? 0 : data[100];

	free(data);
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

static void *count_without_lock(void *counter)
{
	for (int i = 0; i < 1000; i++)
		++*(volatile int *)counter;
	return NULL;
}

EXPORT int imgc_canary_race(void)
{
	pthread_t threads[2];
	int counter = 0;

	for (int i = 0; i < 2; i++) {
		if (pthread_create(&threads[i], NULL, count_without_lock, &counter))
			return 2;
	}
	for (int i = 0; i < 2; i++)
		pthread_join(threads[i], NULL);
	return 0;
}

/* ctypes loads this file; setuptools demands the symbol. */
EXPORT void *PyInit__canary(void)
{
	return NULL;
}

/* Exit code 0: the fault went unnoticed. */
int main(int argc, char **argv)
{
	const char *fault = argc == 2 ? argv[1] : "";
	volatile int unused;

	if (strcmp(fault, "race") == 0)
		return imgc_canary_race();
	if (strcmp(fault, "overread") == 0)
		unused = imgc_canary_overread();
	else if (strcmp(fault, "overflow") == 0)
		unused = imgc_canary_overflow(argc);
	else
		return 2;
	(void)unused;
	return 0;
}
