/*
 * crc32c.c - CRC-32C (Castagnoli)
 *
 * Source: RFC 3720, section 12.1 and appendix B.4: polynomial 0x11edc6f41, here in its
 * reflected form 0x82f63b78; the register starts as all ones and is inverted at the
 * end.
 *
 * The variants take and return the register itself.  imgc_crc32c() inverts it before
 * and after.
 */
#include <isa-l/crc.h>

#include "common/endian.h"
#include "common/variant.h"
#include "imgc.h"

typedef uint32_t (*crc32c_fn)(uint32_t state, const uint8_t *p, size_t nbytes);

/*
 * Eight tables, for eight bytes at a time (slicing by 8).  Entry b of table k is the
 * register after byte b and then k bytes of zeros:
 *
 *     state = b; repeat 8 * (k + 1) times:
 *             state = state >> 1 ^ (state & 1 ? 0x82f63b78 : 0)
 *
 * A CRC is linear: the entry of a byte is the xor of the entries of its bits.  So only
 * the entries of 1, 2, 4, ... 128 are written down, eight for each table, and the
 * compiler derives the other 248.  test_crc32c.c computes all 64 of them again.
 */
#define BIT(i, n, v) (((i) >> (n)) & 1 ? (v) : 0)
#define ENTRY(i, a, b, c, d, e, f, g, h)                                                           \
	(BIT(i, 0, a) ^ BIT(i, 1, b) ^ BIT(i, 2, c) ^ BIT(i, 3, d) ^ BIT(i, 4, e) ^ BIT(i, 5, f) ^ \
	 BIT(i, 6, g) ^ BIT(i, 7, h))
#define ROW4(i, ...)                                                                               \
	ENTRY((i), __VA_ARGS__), ENTRY((i) + 1, __VA_ARGS__), ENTRY((i) + 2, __VA_ARGS__),         \
		ENTRY((i) + 3, __VA_ARGS__)
#define ROW16(i, ...)                                                                              \
	ROW4((i), __VA_ARGS__), ROW4((i) + 4, __VA_ARGS__), ROW4((i) + 8, __VA_ARGS__),            \
		ROW4((i) + 12, __VA_ARGS__)
#define ROW64(i, ...)                                                                              \
	ROW16((i), __VA_ARGS__), ROW16((i) + 16, __VA_ARGS__), ROW16((i) + 32, __VA_ARGS__),       \
		ROW16((i) + 48, __VA_ARGS__)
#define TABLE(...)                                                                                 \
	{                                                                                          \
		ROW64(0, __VA_ARGS__), ROW64(64, __VA_ARGS__), ROW64(128, __VA_ARGS__),            \
			ROW64(192, __VA_ARGS__)                                                    \
	}

/* TABLE(entry of 1, of 2, of 4, ... of 128), for k = 0 to 7. */
static const uint32_t crc32c_table[8][256] = {
	TABLE(0xf26b8303, 0xe13b70f7, 0xc79a971f, 0x8ad958cf, 0x105ec76f, 0x20bd8ede, 0x417b1dbc,
	      0x82f63b78),
	TABLE(0x13a29877, 0x274530ee, 0x4e8a61dc, 0x9d14c3b8, 0x3fc5f181, 0x7f8be302, 0xff17c604,
	      0xfbc3faf9),
	TABLE(0xa541927e, 0x4f6f520d, 0x9edea41a, 0x38513ec5, 0x70a27d8a, 0xe144fb14, 0xc76580d9,
	      0x8b277743),
	TABLE(0xdd45aab8, 0xbf672381, 0x7b2231f3, 0xf64463e6, 0xe964b13d, 0xd725148b, 0xaba65fe7,
	      0x52a0c93f),
	TABLE(0x38116fac, 0x7022df58, 0xe045beb0, 0xc5670b91, 0x8f2261d3, 0x1ba8b557, 0x37516aae,
	      0x6ea2d55c),
	TABLE(0xef306b19, 0xdb8ca0c3, 0xb2f53777, 0x6006181f, 0xc00c303e, 0x85f4168d, 0x0e045beb,
	      0x1c08b7d6),
	TABLE(0x68032cc8, 0xd0065990, 0xa5e0c5d1, 0x4e2dfd53, 0x9c5bfaa6, 0x3d5b83bd, 0x7ab7077a,
	      0xf56e0ef4),
	TABLE(0x493c7d27, 0x9278fa4e, 0x211d826d, 0x423b04da, 0x847609b4, 0x0d006599, 0x1a00cb32,
	      0x34019664),
};

static uint32_t crc32c_portable(uint32_t state, const uint8_t *p, size_t nbytes)
{
	for (; nbytes >= 8; p += 8, nbytes -= 8) {
		uint64_t word = imgc_load_le64(p) ^ state;

		state = crc32c_table[7][word & 0xff] ^ crc32c_table[6][(word >> 8) & 0xff] ^
			crc32c_table[5][(word >> 16) & 0xff] ^
			crc32c_table[4][(word >> 24) & 0xff] ^
			crc32c_table[3][(word >> 32) & 0xff] ^
			crc32c_table[2][(word >> 40) & 0xff] ^
			crc32c_table[1][(word >> 48) & 0xff] ^ crc32c_table[0][word >> 56];
	}
	for (; nbytes != 0; p++, nbytes--)
		state = (state >> 8) ^ crc32c_table[0][(state ^ *p) & 0xff];
	return state;
}

/* ISA-L takes the length as an int. */
#define ISAL_PIECE ((size_t)1 << 30)

static uint32_t crc32c_isal(uint32_t state, const uint8_t *p, size_t nbytes)
{
	while (nbytes != 0) {
		size_t piece = nbytes < ISAL_PIECE ? nbytes : ISAL_PIECE;

		state = crc32_iscsi((unsigned char *)(uintptr_t)p, (int)piece, state);
		p += piece;
		nbytes -= piece;
	}
	return state;
}

#if defined(__x86_64__)
#include "kernels/crc32c_x86.h"
#elif defined(__aarch64__)
#include "kernels/crc32c_arm.h"
#endif

enum { CRC32C_ISAL, CRC32C_SSE42, CRC32C_ARMV8, CRC32C_PORTABLE, N_CRC32C_VARIANTS };

static const struct imgc_variant crc32c_rows[N_CRC32C_VARIANTS] = {
	[CRC32C_ISAL] = {"isal", true, NULL},
#if defined(__x86_64__)
	[CRC32C_SSE42] = {"sse42", true, cpu_has_sse42},
#else
	[CRC32C_SSE42] = {"sse42", false, NULL},
#endif
#if defined(__aarch64__)
	[CRC32C_ARMV8] = {"armv8", true, cpu_has_crc32},
#else
	[CRC32C_ARMV8] = {"armv8", false, NULL},
#endif
	[CRC32C_PORTABLE] = {"portable", true, NULL},
};

static const crc32c_fn crc32c_functions[N_CRC32C_VARIANTS] = {
	[CRC32C_ISAL] = crc32c_isal,
#if defined(__x86_64__)
	[CRC32C_SSE42] = crc32c_sse42,
#elif defined(__aarch64__)
	[CRC32C_ARMV8] = crc32c_armv8,
#endif
	[CRC32C_PORTABLE] = crc32c_portable,
};

const struct imgc_variant_table imgc_crc32c_variants = {
	.operation = "crc32c",
	.rows = crc32c_rows,
	.n_rows = N_CRC32C_VARIANTS,
	.default_row = CRC32C_ISAL,
};

uint32_t imgc_crc32c(uint32_t variant, uint32_t crc, const void *data, size_t nbytes)
{
	return ~crc32c_functions[variant](~crc, data, nbytes);
}
