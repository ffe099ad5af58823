/*
 * test_zero.c - every variant of the zero test against a byte loop; choosing variants
 */
#include "tests/test_util.h"

#define MAX_NBYTES 1024
#define MAX_ALIGNMENT 64

static int naive_is_zero(const uint8_t *p, size_t nbytes)
{
	for (size_t i = 0; i < nbytes; i++) {
		if (p[i] != 0)
			return 0;
	}
	return 1;
}

/* Lengths and alignments, with noise all around the buffer. */
static void test_lengths(uint32_t variant)
{
	static uint8_t area[MAX_NBYTES + 2 * MAX_ALIGNMENT];

	for (size_t shift = 0; shift < MAX_ALIGNMENT; shift++) {
		for (size_t nbytes = 0; nbytes <= MAX_NBYTES; nbytes++) {
			uint8_t *p = area + MAX_ALIGNMENT / 2 + shift;

			memset(area, 0xff, sizeof(area));
			if (p + nbytes > area + sizeof(area))
				continue;
			memset(p, 0, nbytes);
			CHECK(imgc_is_zero(variant, p, nbytes));
			if (nbytes < MAX_NBYTES && p + nbytes < area + sizeof(area))
				CHECK(!imgc_is_zero(variant, p, nbytes + 1));
			CHECK(!imgc_is_zero(variant, p - 1, nbytes + 1));
		}
	}
}

/* One bit set, at every place of every length. */
static void test_single_bits(uint32_t variant)
{
	static uint8_t area[MAX_NBYTES];

	for (size_t nbytes = 1; nbytes <= MAX_NBYTES; nbytes += nbytes < 300 ? 1 : 31) {
		for (size_t at = 0; at < nbytes; at++) {
			area[at] = (uint8_t)(1u << (at & 7));
			CHECK(!imgc_is_zero(variant, area, nbytes));
			CHECK_EQ(imgc_is_zero(variant, area, at), naive_is_zero(area, at));
			area[at] = 0;
		}
	}
}

/* Flush against pages that must not be read, at both ends. */
static void test_guards(uint32_t variant)
{
	struct guarded g = guarded_alloc(2 * GUARD_PAGE);

	for (size_t nbytes = 0; nbytes <= MAX_NBYTES; nbytes++) {
		CHECK(imgc_is_zero(variant, g.end - nbytes, nbytes));
		CHECK(imgc_is_zero(variant, g.start, nbytes));
		if (nbytes == 0)
			continue;
		g.end[-1] = 1;
		CHECK(!imgc_is_zero(variant, g.end - nbytes, nbytes));
		g.end[-1] = 0;
	}
	CHECK(imgc_is_zero(variant, g.start, 2 * GUARD_PAGE));
	guarded_free(&g);
}

/* Data at the front ends the search: the pages after it must not be read. */
static void test_early_exit(uint32_t variant)
{
	struct guarded g = guarded_alloc(GUARD_PAGE);

	g.start[0] = 1;
	CHECK(!imgc_is_zero(variant, g.start, 64 * GUARD_PAGE));
	guarded_free(&g);
}

static void test_selection(void)
{
	struct imgc_variant_info info;
	uint32_t id = 0;
	unsigned op, i;

	for (op = 0; op < IMGC_N_OPERATIONS; op++) {
		unsigned n_defaults = 0;

		CHECK(imgc_operation_name(op) != NULL);
		CHECK(imgc_variant_count(op) > 0);
		for (i = 0; i < imgc_variant_count(op); i++) {
			CHECK_EQ(imgc_variant_describe(op, i, &info), IMGC_OK);
			n_defaults += (unsigned)info.is_default;
			CHECK(info.built || !info.runnable);
		}
		CHECK(info.runnable); /* the last one always */
		CHECK_EQ(n_defaults, 1);
		CHECK_EQ(imgc_variant_describe(op, i, &info), IMGC_INVALID_ARGUMENT);
		CHECK_EQ(imgc_variant_select(op, NULL, &id), IMGC_SELECT_OK);
		CHECK_EQ(imgc_variant_describe(op, id, &info), IMGC_OK);
		CHECK(info.is_default && info.runnable);
		CHECK_EQ(imgc_variant_select(op, "abacus", &id), IMGC_SELECT_UNKNOWN);
	}
	CHECK(imgc_operation_name(op) == NULL);
	CHECK_EQ(imgc_variant_count(op), 0);
	CHECK_EQ(imgc_variant_select(op, NULL, &id), IMGC_SELECT_UNKNOWN);
}

int main(void)
{
	test_selection();
	for (unsigned i = 0; i < imgc_variant_count(IMGC_OP_ZERO); i++) {
		uint32_t variant;

		if (!variant_usable(IMGC_OP_ZERO, i, &variant))
			continue;
		test_lengths(variant);
		test_single_bits(variant);
		test_guards(variant);
		test_early_exit(variant);
	}
	return 0;
}
