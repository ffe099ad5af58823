/*
 * checked.h - arithmetic on numbers from untrusted tables
 *
 * Each function with an `out` returns whether the result fits 64 bits, and sets *out
 * only if it does.
 */
#ifndef IMGC_COMMON_CHECKED_H
#define IMGC_COMMON_CHECKED_H

#include <stdbool.h>
#include <stdint.h>

static inline bool imgc_add_checked(uint64_t a, uint64_t b, uint64_t *out)
{
	if (a > UINT64_MAX - b)
		return false;
	*out = a + b;
	return true;
}

/* value << n_bits; false if a bit would be lost. */
static inline bool imgc_shl_checked(uint64_t value, uint32_t n_bits, uint64_t *out)
{
	if (n_bits > 63 || value > UINT64_MAX >> n_bits)
		return false;
	*out = value << n_bits;
	return true;
}

/* Whether [offset, offset + length) lies inside [0, limit). */
static inline bool imgc_range_inside(uint64_t offset, uint64_t length, uint64_t limit)
{
	return offset <= limit && length <= limit - offset;
}

static inline bool imgc_is_power_of_two(uint64_t value)
{
	return value != 0 && (value & (value - 1)) == 0;
}

/* `alignment` is a power of two in the three below. */
static inline bool imgc_is_aligned(uint64_t value, uint64_t alignment)
{
	return (value & (alignment - 1)) == 0;
}

static inline uint64_t imgc_align_down(uint64_t value, uint64_t alignment)
{
	return value & ~(alignment - 1);
}

static inline bool imgc_align_up_checked(uint64_t value, uint64_t alignment, uint64_t *out)
{
	if (value > UINT64_MAX - (alignment - 1))
		return false;
	*out = (value + (alignment - 1)) & ~(alignment - 1);
	return true;
}

static inline uint64_t imgc_min_u64(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

static inline uint64_t imgc_max_u64(uint64_t a, uint64_t b)
{
	return a > b ? a : b;
}

#endif /* IMGC_COMMON_CHECKED_H */
