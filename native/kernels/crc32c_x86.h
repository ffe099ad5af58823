/*
 * crc32c_x86.h - the variant of crc32c.c for the crc32 instruction of SSE 4.2
 */
#include <nmmintrin.h>
#include <string.h>

static bool cpu_has_sse42(void)
{
	return __builtin_cpu_supports("sse4.2");
}

__attribute__((target("sse4.2"))) static uint32_t crc32c_sse42(uint32_t state, const uint8_t *p,
							       size_t nbytes)
{
	uint64_t wide = state;

	for (; nbytes >= 8; p += 8, nbytes -= 8) {
		uint64_t word;

		memcpy(&word, p, sizeof(word));
		wide = _mm_crc32_u64(wide, word);
	}
	state = (uint32_t)wide;
	for (; nbytes != 0; p++, nbytes--)
		state = _mm_crc32_u8(state, *p);
	return state;
}
