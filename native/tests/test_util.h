/*
 * test_util.h - checks, guard pages and a seeded generator for the native tests
 *
 * Tests may print and exit; the library may not.
 */
#ifndef IMGC_TEST_UTIL_H
#define IMGC_TEST_UTIL_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "imgc.h"

#define CHECK(condition)                                                                           \
	do {                                                                                       \
		if (!(condition)) {                                                                \
			fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition);    \
			exit(1);                                                                   \
		}                                                                                  \
	} while (0)

#define CHECK_EQ(a, b)                                                                             \
	do {                                                                                       \
		long long check_a = (long long)(a), check_b = (long long)(b);                      \
		if (check_a != check_b) {                                                          \
			fprintf(stderr, "%s:%d: %s is %lld, expected %s = %lld\n", __FILE__,       \
				__LINE__, #a, check_a, #b, check_b);                               \
			exit(1);                                                                   \
		}                                                                                  \
	} while (0)

#define GUARD_PAGE 4096

/* A buffer of whole pages between two pages that must not be touched. */
struct guarded {
	uint8_t *start; /* first byte after the lower guard */
	uint8_t *end;	/* the upper guard */
	size_t n_pages;
};

static inline struct guarded guarded_alloc(size_t nbytes)
{
	struct guarded g;

	g.n_pages = (nbytes + GUARD_PAGE - 1) / GUARD_PAGE;
	uint8_t *p = mmap(NULL, (g.n_pages + 2) * GUARD_PAGE, PROT_READ | PROT_WRITE,
			  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(p != MAP_FAILED);
	CHECK(mprotect(p, GUARD_PAGE, PROT_NONE) == 0);
	CHECK(mprotect(p + (g.n_pages + 1) * GUARD_PAGE, GUARD_PAGE, PROT_NONE) == 0);
	g.start = p + GUARD_PAGE;
	g.end = g.start + g.n_pages * GUARD_PAGE;
	return g;
}

static inline void guarded_free(struct guarded *g)
{
	CHECK(munmap(g->start - GUARD_PAGE, (g->n_pages + 2) * GUARD_PAGE) == 0);
}

/* xorshift64*: the same numbers in every run. */
static inline uint64_t test_random(uint64_t *state)
{
	*state ^= *state >> 12;
	*state ^= *state << 25;
	*state ^= *state >> 27;
	return *state * UINT64_C(0x2545f4914f6cdd1d);
}

static inline void fill_random(void *out, size_t nbytes, uint64_t seed)
{
	uint8_t *p = out;
	uint64_t state = seed * 2 + 1;

	for (size_t i = 0; i < nbytes; i++)
		p[i] = (uint8_t)(test_random(&state) >> 56);
}

/* Words that repeat near and far, so that compressors find matches at all distances. */
static inline void fill_text(void *out, size_t nbytes, uint64_t seed)
{
	uint8_t *p = out;
	uint64_t state = seed * 2 + 1;
	size_t i = 0;

	while (i < nbytes) {
		uint64_t r = test_random(&state);
		size_t length = 3 + (r >> 8) % 60;
		size_t distance = 1 + (size_t)((r >> 20) % (nbytes < 60000 ? nbytes : 60000));

		if (length > nbytes - i)
			length = nbytes - i;
		if (r % 4 == 0 || distance > i) {
			fill_random(p + i, length, r);
			i += length;
		} else {
			for (; length != 0; length--, i++)
				p[i] = p[i - distance];
		}
	}
}

/*
 * 1 if IMGCORE_EXPECT_VARIANTS ("zero=neon,crc32c=armv8") demands that this one runs.
 */
static inline int variant_expected(const char *operation, const char *name)
{
	const char *list = getenv("IMGCORE_EXPECT_VARIANTS");
	char wanted[64];
	size_t n = (size_t)snprintf(wanted, sizeof(wanted), "%s=%s", operation, name);

	for (; list && *list; list = strchr(list, ',') ? strchr(list, ',') + 1 : NULL) {
		if (strncmp(list, wanted, n) == 0 && (list[n] == ',' || list[n] == '\0'))
			return 1;
	}
	return 0;
}

/*
 * Whether variant `index` runs here, and its id.  Prints a note; the last one must run.
 */
static inline int variant_usable(unsigned op, unsigned index, uint32_t *id)
{
	struct imgc_variant_info info;

	CHECK_EQ(imgc_variant_describe(op, index, &info), IMGC_OK);
	if (!info.runnable) {
		uint32_t untouched = 77;

		CHECK_EQ(imgc_variant_select(op, info.name, &untouched),
			 info.built ? IMGC_SELECT_NO_CPU : IMGC_SELECT_NOT_BUILT);
		CHECK_EQ(untouched, 77);
		CHECK(index + 1 < imgc_variant_count(op));
		CHECK(!variant_expected(imgc_operation_name(op), info.name));
		printf("  %s %s: %s\n", imgc_operation_name(op), info.name,
		       info.built ? "skipped, cannot run here" : "skipped, not built");
		return 0;
	}
	CHECK_EQ(imgc_variant_select(op, info.name, id), IMGC_SELECT_OK);
	printf("  %s %s\n", imgc_operation_name(op), info.name);
	return 1;
}

/* Row 0 of a table is the preferred variant, and may not run here. */
static inline void use_default_variants(struct imgc_job_options *o)
{
	CHECK_EQ(imgc_variant_select(IMGC_OP_ZERO, NULL, &o->zero_variant), IMGC_SELECT_OK);
	CHECK_EQ(imgc_variant_select(IMGC_OP_INFLATE, NULL, &o->inflate_variant), IMGC_SELECT_OK);
	CHECK_EQ(imgc_variant_select(IMGC_OP_IO, NULL, &o->io_variant), IMGC_SELECT_OK);
}

#endif /* IMGC_TEST_UTIL_H */
