/*
 * isal_stream.c - ISA-L's compressor state, at an address that does not change the output
 *
 * ISA-L for x86-64 (2.30 and 2.31.1) has a fault at levels 1 and 2.  At the start of a
 * block, the label .write_first_byte of igzip_icf_body_h1_gr_bt.asm hashes a register
 * that should hold the block's bytes, but holds the address of the stream: its bits 16
 * to 47.  The third byte is then looked up and entered under that hash.  The output is
 * always valid, but which matches are found depends on where the stream is in memory.
 *
 * The hash is the only way in which the address has an effect, and hash tables have at
 * most 2^15 entries.  So every stream is put at an address whose hash ends in 15 zeros:
 * the output is then the same in every thread and process.
 *
 * Each range of 2 GiB has exactly one such place on a multiple of 64 KiB, because the
 * hash maps bits 16 to 30 of the address to its last 15 bits one to one.
 */
#include "codec/isal_stream.h"

#include <stdlib.h>

uint32_t imgc_isal_hash(uint32_t word)
{
	const uint32_t crc32c_polynomial = 0x82f63b78;

	for (int bit = 0; bit < 32; bit++)
		word = word >> 1 ^ (word & 1 ? crc32c_polynomial : 0);
	return word;
}

#ifdef __x86_64__

#include <stdbool.h>
#include <sys/mman.h>

#ifndef MAP_FIXED_NOREPLACE
#define MAP_FIXED_NOREPLACE 0x100000 /* Linux include/uapi/asm-generic/mman-common.h */
#endif

#define HASH_BITS 15
#define UNIT_BITS 16
#define RANGE_BITS (UNIT_BITS + HASH_BITS)
/* More than streams can be needed at once: one for each thread of each job. */
#define MAX_RANGES 16384
/* User space has 2^47 bytes. */
#define LAST_RANGE ((uintptr_t)1 << (47 - RANGE_BITS))

/* The inverse of the hash: the unit, in a range, that changes only bit k of the hash. */
static const uint16_t unit_of_hash_bit[HASH_BITS] = {
	0x1ec2, 0x5ddc, 0x6d73, 0x6c75, 0x6e79, 0x0a39, 0x1472, 0x48bc,
	0x47b3, 0x39f5, 0x73ea, 0x5147, 0x141d, 0x283a, 0x302c,
};

static bool address_matters(uint32_t level)
{
	return level == 1 || level == 2;
}

/* The address in a range of 2 GiB whose hash ends in zeros. */
static uintptr_t neutral_address(uintptr_t range)
{
	uint32_t hash = imgc_isal_hash((uint32_t)(range << HASH_BITS));
	uintptr_t unit = 0;

	for (unsigned bit = 0; bit < HASH_BITS; bit++)
		if (hash >> bit & 1)
			unit ^= unit_of_hash_bit[bit];
	return range << RANGE_BITS | unit << UNIT_BITS;
}

static void *map(uintptr_t address, int flags)
{
	return mmap((void *)address, sizeof(struct isal_zstream), PROT_READ | PROT_WRITE,
		    MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
}

static void unmap(void *place)
{
	munmap(place, sizeof(struct isal_zstream));
}

/* Maps the stream in a range; NULL if its address there is taken. */
static struct isal_zstream *map_in_range(uintptr_t range)
{
	uintptr_t address = neutral_address(range);
	void *place = map(address, MAP_FIXED_NOREPLACE);

	if (place == (void *)address)
		return place;
	/* Kernels before 4.17 ignore the flag, and choose another address. */
	if (place != MAP_FAILED)
		unmap(place);
	return NULL;
}

/* Searches from where the system maps memory, so that addresses stay random. */
static struct isal_zstream *map_neutral(void)
{
	struct isal_zstream *stream = NULL;
	void *near = map(0, 0);

	if (near == MAP_FAILED)
		return NULL;
	uintptr_t range = (uintptr_t)near >> RANGE_BITS;

	unmap(near);
	/* Downwards, away from the stack; upwards where a tool maps memory at the bottom. */
	for (uintptr_t i = 0; !stream && i < MAX_RANGES && range > i; i++)
		stream = map_in_range(range - i);
	for (uintptr_t i = 1; !stream && i < MAX_RANGES && range + i < LAST_RANGE; i++)
		stream = map_in_range(range + i);
	return stream;
}

struct isal_zstream *imgc_isal_stream_create(uint32_t level)
{
	return address_matters(level) ? map_neutral() : calloc(1, sizeof(struct isal_zstream));
}

void imgc_isal_stream_destroy(struct isal_zstream *stream, uint32_t level)
{
	if (stream && address_matters(level))
		unmap(stream);
	else
		free(stream);
}

#else

struct isal_zstream *imgc_isal_stream_create(uint32_t level)
{
	(void)level;
	return calloc(1, sizeof(struct isal_zstream));
}

void imgc_isal_stream_destroy(struct isal_zstream *stream, uint32_t level)
{
	(void)level;
	free(stream);
}

#endif
