/*
 * cache.h - what an open disk keeps in memory: tables and decompressed blocks
 *
 * Entries of any size are found by their key.  While all of them together take more
 * bytes than allowed, the least recently used of those that nobody uses goes first.  So
 * a caller always gets to use what it has added, even if nothing may be kept.
 */
#ifndef IMGC_ENGINE_CACHE_H
#define IMGC_ENGINE_CACHE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Without padding: keys are compared as bytes. */
struct cache_key {
	uint64_t offset, length, guest_offset;
	uint32_t file;
	uint16_t kind, flags;
};

struct cache_entry {
	_Alignas(16) struct cache_key key;
	struct cache_entry *next; /* in its bucket */
	struct cache_entry *older, *newer;
	size_t nbytes;		  /* of the data */
	_Atomic unsigned n_users; /* the cache itself is one, while it has the entry */
};

/* The data of an entry, after it in memory; aligned for any type. */
static inline void *imgc_cache_data(const struct cache_entry *entry)
{
	return (void *)(uintptr_t)(entry + 1);
}

/*
 * What was forgotten is noted for so many groups of keys, a power of two: an entry that is
 * being made stays out only if its own group was concerned.
 */
#define CACHE_N_GENERATIONS 64u

struct cache {
	uint64_t max_nbytes;
	_Atomic uint64_t nbytes; /* changes under the lock */
	pthread_mutex_t lock;	 /* all below */
	struct cache_entry **buckets;
	size_t n_buckets, n_entries; /* n_buckets is a power of two */
	struct cache_entry ends;     /* ends.newer is the oldest entry */
	uint64_t generations[CACHE_N_GENERATIONS];
	uint64_t n_hits, n_misses;
};

int imgc_cache_create(struct cache *cache, uint64_t max_nbytes);

/* No entry may be in use.  After a successful create only. */
void imgc_cache_destroy(struct cache *cache);

/*
 * Returns the entry of a key, for use until imgc_cache_release(), or NULL.  *generation
 * is what to give to imgc_cache_add().
 */
struct cache_entry *imgc_cache_find(struct cache *cache, const struct cache_key *key,
				    uint64_t *generation);

/* An entry that only the caller knows, for use until imgc_cache_release(); NULL: no memory. */
struct cache_entry *imgc_cache_new(struct cache *cache, size_t nbytes);

/*
 * Adds an entry, for which others go once it is released, and returns it; or, if the key has one by
 * now, releases it and returns that one.  If the key was forgotten since `generation`, the entry
 * stays the caller's alone.
 */
struct cache_entry *imgc_cache_add(struct cache *cache, const struct cache_key *key,
				   uint64_t generation, struct cache_entry *entry);

/* One more use of an entry that the caller uses. */
void imgc_cache_hold(struct cache_entry *entry);

void imgc_cache_release(struct cache *cache, struct cache_entry *entry);

/* Removes all entries.  Those in use stay valid for their users. */
void imgc_cache_forget(struct cache *cache);

/* Removes the entry of a key, if there is one. */
void imgc_cache_forget_one(struct cache *cache, const struct cache_key *key);

#endif /* IMGC_ENGINE_CACHE_H */
