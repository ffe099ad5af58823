/*
 * test_xxh64.c - XXH64 against known answers, and in parts
 */
#include "tests/test_util.h"

static uint64_t hash_of(const void *data, size_t nbytes)
{
	struct imgc_xxh64 hash;

	imgc_xxh64_begin(&hash);
	imgc_xxh64_add(&hash, data, nbytes);
	return imgc_xxh64_end(&hash);
}

/* What xxhsum -H1 prints. */
static void test_known_answers(void)
{
	CHECK_EQ(hash_of("", 0), 0xef46db3751d8e999u);
	CHECK_EQ(hash_of("a", 1), 0xd24ec4f1a98c6e5bu);
	CHECK_EQ(hash_of("abc", 3), 0x44bc2cf5ad770999u);
	CHECK_EQ(hash_of("Nobody inspects the spammish repetition", 39), 0xfbcea83c8a378bf1u);
}

/* Every length in two and more parts, flush against a guard page. */
static void test_parts(void)
{
	struct guarded g = guarded_alloc(GUARD_PAGE);

	fill_random(g.start, GUARD_PAGE, 9);
	for (size_t nbytes = 0; nbytes <= 200; nbytes++) {
		const uint8_t *p = g.end - nbytes;

		for (size_t step = 1; step <= nbytes; step += 1 + step / 3) {
			struct imgc_xxh64 hash;

			imgc_xxh64_begin(&hash);
			for (size_t at = 0; at < nbytes; at += step)
				imgc_xxh64_add(&hash, p + at,
					       nbytes - at < step ? nbytes - at : step);
			CHECK_EQ(imgc_xxh64_end(&hash), hash_of(p, nbytes));
		}
	}
	guarded_free(&g);
}

int main(void)
{
	test_known_answers();
	test_parts();
	return 0;
}
