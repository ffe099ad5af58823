/*
 * endian.h - integers in a given byte order, at any alignment
 */
#ifndef IMGC_COMMON_ENDIAN_H
#define IMGC_COMMON_ENDIAN_H

#include <stdint.h>
#include <string.h>

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define IMGC_LE32(v) (v)
#define IMGC_LE64(v) (v)
#define IMGC_BE32(v) __builtin_bswap32(v)
#define IMGC_BE64(v) __builtin_bswap64(v)
#else
#define IMGC_LE32(v) __builtin_bswap32(v)
#define IMGC_LE64(v) __builtin_bswap64(v)
#define IMGC_BE32(v) (v)
#define IMGC_BE64(v) (v)
#endif

static inline uint32_t imgc_load_le32(const void *p)
{
	uint32_t v;

	memcpy(&v, p, sizeof(v));
	return IMGC_LE32(v);
}

static inline uint64_t imgc_load_le64(const void *p)
{
	uint64_t v;

	memcpy(&v, p, sizeof(v));
	return IMGC_LE64(v);
}

static inline uint32_t imgc_load_be32(const void *p)
{
	uint32_t v;

	memcpy(&v, p, sizeof(v));
	return IMGC_BE32(v);
}

static inline uint64_t imgc_load_be64(const void *p)
{
	uint64_t v;

	memcpy(&v, p, sizeof(v));
	return IMGC_BE64(v);
}

static inline void imgc_store_le32(void *p, uint32_t value)
{
	uint32_t v = IMGC_LE32(value);

	memcpy(p, &v, sizeof(v));
}

static inline void imgc_store_le64(void *p, uint64_t value)
{
	uint64_t v = IMGC_LE64(value);

	memcpy(p, &v, sizeof(v));
}

static inline void imgc_store_be32(void *p, uint32_t value)
{
	uint32_t v = IMGC_BE32(value);

	memcpy(p, &v, sizeof(v));
}

static inline void imgc_store_be64(void *p, uint64_t value)
{
	uint64_t v = IMGC_BE64(value);

	memcpy(p, &v, sizeof(v));
}

#endif /* IMGC_COMMON_ENDIAN_H */
