/*
 * fuzz_util.h - numbers and places from a fuzzer's bytes
 *
 * An input that is too short reads as zeros, so that every input is valid.
 */
#ifndef IMGC_FUZZ_UTIL_H
#define IMGC_FUZZ_UTIL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "imgc.h"

/* Called by libFuzzer, and by replay.c with the files of a corpus. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t nbytes);

/* A broken promise of the library is a finding, like a memory error. */
#define REQUIRE(condition)                                                                         \
	do {                                                                                       \
		if (!(condition)) {                                                                \
			fprintf(stderr, "%s:%d: broken: %s\n", __FILE__, __LINE__, #condition);    \
			abort();                                                                   \
		}                                                                                  \
	} while (0)

struct input {
	const uint8_t *data;
	size_t nbytes;
};

static inline uint64_t take_uint(struct input *in, size_t nbytes)
{
	uint64_t value = 0;

	for (size_t i = 0; i < nbytes && in->nbytes > 0; i++, in->nbytes--)
		value |= (uint64_t)*in->data++ << (8 * i);
	return value;
}

static inline uint8_t take_u8(struct input *in)
{
	return (uint8_t)take_uint(in, 1);
}

static inline uint64_t take_u64(struct input *in)
{
	return take_uint(in, 8);
}

/* Mostly a number as large as places are, sometimes any number. */
static inline uint64_t take_place(struct input *in)
{
	uint8_t how = take_u8(in);

	if (how < 0xf0)
		return take_uint(in, 3) << (how & 15);
	return take_u64(in);
}

/*
 * The rest of the input, in memory of exactly its size so that overreads are detected.
 */
static inline uint8_t *take_rest(struct input *in, size_t *nbytes)
{
	uint8_t *copy = malloc(in->nbytes ? in->nbytes : 1);

	REQUIRE(copy != NULL);
	if (in->nbytes > 0)
		memcpy(copy, in->data, in->nbytes);
	*nbytes = in->nbytes;
	in->nbytes = 0;
	return copy;
}

#endif /* IMGC_FUZZ_UTIL_H */
