/*
 * zero.c - tests whether a buffer is all zeros
 *
 * Every variant tests the first bytes before it loops: most blocks of data differ from
 * zero there.
 */
#include <string.h>

#include "common/variant.h"
#include "imgc.h"

typedef int (*zero_fn)(const uint8_t *p, size_t nbytes);

/* All zeros: the first 16 bytes are, and each byte equals the one 16 before it. */
static int zero_portable(const uint8_t *p, size_t nbytes)
{
	for (size_t i = 0; i < 16; i++) {
		if (i == nbytes)
			return 1;
		if (p[i] != 0)
			return 0;
	}
	return memcmp(p, p + 16, nbytes - 16) == 0;
}

#if defined(__x86_64__)
#include "kernels/zero_x86.h"
#elif defined(__aarch64__)
#include "kernels/zero_arm.h"
#endif

enum { ZERO_AVX512, ZERO_AVX2, ZERO_NEON, ZERO_PORTABLE, N_ZERO_VARIANTS };

static const struct imgc_variant zero_rows[N_ZERO_VARIANTS] = {
#if defined(__x86_64__)
	[ZERO_AVX512] = {"avx512", true, cpu_has_avx512},
	[ZERO_AVX2] = {"avx2", true, cpu_has_avx2},
#else
	[ZERO_AVX512] = {"avx512", false, NULL},
	[ZERO_AVX2] = {"avx2", false, NULL},
#endif
#if defined(__aarch64__)
	[ZERO_NEON] = {"neon", true, NULL},
#else
	[ZERO_NEON] = {"neon", false, NULL},
#endif
	[ZERO_PORTABLE] = {"portable", true, NULL},
};

static const zero_fn zero_functions[N_ZERO_VARIANTS] = {
#if defined(__x86_64__)
	[ZERO_AVX512] = zero_avx512,
	[ZERO_AVX2] = zero_avx2,
#elif defined(__aarch64__)
	[ZERO_NEON] = zero_neon,
#endif
	[ZERO_PORTABLE] = zero_portable,
};

const struct imgc_variant_table imgc_zero_variants = {
	.operation = "zero",
	.rows = zero_rows,
	.n_rows = N_ZERO_VARIANTS,
#if defined(__aarch64__)
	.default_row = ZERO_NEON,
#else
	.default_row = ZERO_AVX2,
#endif
};

int imgc_is_zero(uint32_t variant, const void *data, size_t nbytes)
{
	return zero_functions[variant](data, nbytes);
}
