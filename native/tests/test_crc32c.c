/*
 * test_crc32c.c - every variant of CRC-32C against known answers and a bit loop
 */
#include "tests/test_util.h"

#define MAX_NBYTES 600

static uint32_t naive_crc32c(uint32_t crc, const uint8_t *p, size_t nbytes)
{
	crc = ~crc;
	for (size_t i = 0; i < nbytes; i++) {
		crc ^= p[i];
		for (int bit = 0; bit < 8; bit++)
			crc = (crc >> 1) ^ (crc & 1 ? 0x82f63b78u : 0);
	}
	return ~crc;
}

/* RFC 3720, appendix B.4. */
static void test_known_answers(uint32_t variant)
{
	uint8_t data[32];

	CHECK_EQ(imgc_crc32c(variant, 0, "123456789", 9), 0xe3069283u);
	CHECK_EQ(imgc_crc32c(variant, 0, "", 0), 0);
	memset(data, 0, sizeof(data));
	CHECK_EQ(imgc_crc32c(variant, 0, data, sizeof(data)), 0x8a9136aau);
	memset(data, 0xff, sizeof(data));
	CHECK_EQ(imgc_crc32c(variant, 0, data, sizeof(data)), 0x62a8ab43u);
	for (unsigned i = 0; i < sizeof(data); i++)
		data[i] = (uint8_t)i;
	CHECK_EQ(imgc_crc32c(variant, 0, data, sizeof(data)), 0x46dd794eu);
	for (unsigned i = 0; i < sizeof(data); i++)
		data[i] = (uint8_t)(31 - i);
	CHECK_EQ(imgc_crc32c(variant, 0, data, sizeof(data)), 0x113fdb5cu);
}

/* Every length, flush against a guard page, whole and in two parts. */
static void test_lengths(uint32_t variant)
{
	struct guarded g = guarded_alloc(GUARD_PAGE);

	fill_random(g.start, GUARD_PAGE, 5);
	for (size_t nbytes = 0; nbytes <= MAX_NBYTES; nbytes++) {
		const uint8_t *p = g.end - nbytes;
		uint32_t expected = naive_crc32c(0, p, nbytes);
		uint32_t part = imgc_crc32c(variant, 0, p, nbytes / 3);

		CHECK_EQ(imgc_crc32c(variant, 0, p, nbytes), expected);
		CHECK_EQ(imgc_crc32c(variant, part, p + nbytes / 3, nbytes - nbytes / 3), expected);
		CHECK_EQ(imgc_crc32c(variant, 0, g.start + nbytes % 16, nbytes),
			 naive_crc32c(0, g.start + nbytes % 16, nbytes));
	}
	guarded_free(&g);
}

/*
 * The entries written down in crc32c.c, each computed again.  Entry 1 << bit of table k
 * is the register after a word that holds this bit in byte 7 - k, and zeros elsewhere.
 */
static void test_basis_rows(void)
{
	uint32_t portable;

	CHECK_EQ(imgc_variant_select(IMGC_OP_CRC32C, "portable", &portable), IMGC_SELECT_OK);
	for (unsigned k = 0; k < 8; k++) {
		for (unsigned bit = 0; bit < 8; bit++) {
			uint32_t state = 1u << bit;
			uint8_t word[8] = {0};

			for (unsigned step = 0; step < 8 * (k + 1); step++)
				state = state >> 1 ^ (state & 1 ? 0x82f63b78u : 0);
			word[7 - k] = (uint8_t)(1u << bit);
			CHECK_EQ(~imgc_crc32c(portable, UINT32_MAX, word, 8), state);
		}
	}
}

int main(void)
{
	static uint8_t large[1 << 20];

	test_basis_rows();
	fill_random(large, sizeof(large), 9);
	uint32_t expected = naive_crc32c(0, large, sizeof(large));
	for (unsigned i = 0; i < imgc_variant_count(IMGC_OP_CRC32C); i++) {
		uint32_t variant;

		if (!variant_usable(IMGC_OP_CRC32C, i, &variant))
			continue;
		test_known_answers(variant);
		test_lengths(variant);
		CHECK_EQ(imgc_crc32c(variant, 0, large, sizeof(large)), expected);
	}
	return 0;
}
