/*
 * zero_x86.h - the AVX2 and AVX-512 variants of zero.c
 *
 * The tail is read as one full vector that overlaps the vector before it.
 */
#include <immintrin.h>

static bool cpu_has_avx2(void)
{
	return __builtin_cpu_supports("avx2");
}

static bool cpu_has_avx512(void)
{
	return __builtin_cpu_supports("avx512f");
}

__attribute__((target("avx2"))) static inline __m256i load32(const uint8_t *p)
{
	return _mm256_loadu_si256((const __m256i *)(const void *)p);
}

__attribute__((target("avx2"))) static int zero_avx2(const uint8_t *p, size_t nbytes)
{
	if (nbytes < 32)
		return zero_portable(p, nbytes);
	const uint8_t *last = p + nbytes - 32;
	__m256i v = load32(p);

	if (!_mm256_testz_si256(v, v))
		return 0;
	for (; nbytes >= 128; p += 128, nbytes -= 128) {
		v = _mm256_or_si256(_mm256_or_si256(load32(p), load32(p + 32)),
				    _mm256_or_si256(load32(p + 64), load32(p + 96)));
		if (!_mm256_testz_si256(v, v))
			return 0;
	}
	v = load32(last);
	for (; nbytes >= 32; p += 32, nbytes -= 32)
		v = _mm256_or_si256(v, load32(p));
	return _mm256_testz_si256(v, v);
}

__attribute__((target("avx512f"))) static inline __m512i load64(const uint8_t *p)
{
	return _mm512_loadu_si512((const void *)p);
}

__attribute__((target("avx512f"))) static int zero_avx512(const uint8_t *p, size_t nbytes)
{
	if (nbytes < 64)
		return zero_portable(p, nbytes);
	const uint8_t *last = p + nbytes - 64;
	__m512i v = load64(p);

	if (_mm512_test_epi64_mask(v, v))
		return 0;
	for (; nbytes >= 256; p += 256, nbytes -= 256) {
		v = _mm512_or_si512(_mm512_or_si512(load64(p), load64(p + 64)),
				    _mm512_or_si512(load64(p + 128), load64(p + 192)));
		if (_mm512_test_epi64_mask(v, v))
			return 0;
	}
	v = load64(last);
	for (; nbytes >= 64; p += 64, nbytes -= 64)
		v = _mm512_or_si512(v, load64(p));
	return _mm512_test_epi64_mask(v, v) == 0;
}
