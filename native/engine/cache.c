/*
 * cache.c - what an open disk keeps in memory: tables and decompressed blocks
 */
#include "engine/cache.h"

#include <stdlib.h>
#include <string.h>

#include "imgc.h"

#define FIRST_N_BUCKETS 64

/* ---------------------------------------------- under the lock: buckets, order */

static uint64_t hash_of(const struct cache_key *key)
{
	return ((key->offset ^ (uint64_t)key->file << 40) * UINT64_C(0x9e3779b97f4a7c15)) >> 32;
}

static struct cache_entry **bucket_of(const struct cache *cache, const struct cache_key *key)
{
	return &cache->buckets[hash_of(key) & (cache->n_buckets - 1)];
}

static uint64_t *generation_of(struct cache *cache, const struct cache_key *key)
{
	return &cache->generations[hash_of(key) & (CACHE_N_GENERATIONS - 1)];
}

/* The place of the pointer to the key's entry, or to the end of its bucket. */
static struct cache_entry **place_of(const struct cache *cache, const struct cache_key *key)
{
	struct cache_entry **place = bucket_of(cache, key);

	while (*place && memcmp(&(*place)->key, key, sizeof(*key)) != 0)
		place = &(*place)->next;
	return place;
}

static void unlink_entry(struct cache_entry *entry)
{
	entry->older->newer = entry->newer;
	entry->newer->older = entry->older;
}

static void link_newest(struct cache *cache, struct cache_entry *entry)
{
	entry->newer = &cache->ends;
	entry->older = cache->ends.older;
	entry->older->newer = entry;
	cache->ends.older = entry;
}

static uint64_t cost_of(size_t nbytes)
{
	return nbytes + sizeof(struct cache_entry);
}

/* Twice as many buckets, if there is memory for them. */
static void grow_buckets(struct cache *cache)
{
	struct cache wider = {.n_buckets = 2 * cache->n_buckets};

	wider.buckets = calloc(wider.n_buckets, sizeof(*wider.buckets));
	if (!wider.buckets)
		return;
	for (struct cache_entry *e = cache->ends.newer; e != &cache->ends; e = e->newer) {
		struct cache_entry **bucket = bucket_of(&wider, &e->key);

		e->next = *bucket;
		*bucket = e;
	}
	free(cache->buckets);
	cache->buckets = wider.buckets;
	cache->n_buckets = wider.n_buckets;
}

/* Takes the entry out; the caller gets the cache's use of it. */
static void take_out(struct cache *cache, struct cache_entry *entry)
{
	*place_of(cache, &entry->key) = entry->next;
	unlink_entry(entry);
	cache->n_entries--;
	atomic_fetch_sub_explicit(&cache->nbytes, cost_of(entry->nbytes), memory_order_relaxed);
}

/* The oldest entry that only the cache uses, or NULL.  Nobody else can find it meanwhile. */
static struct cache_entry *oldest_idle(const struct cache *cache)
{
	for (struct cache_entry *e = cache->ends.newer; e != &cache->ends; e = e->newer)
		if (atomic_load_explicit(&e->n_users, memory_order_acquire) == 1)
			return e;
	return NULL;
}

static bool is_over(const struct cache *cache)
{
	return atomic_load_explicit(&cache->nbytes, memory_order_relaxed) > cache->max_nbytes;
}

static void trim(struct cache *cache)
{
	while (is_over(cache)) {
		struct cache_entry *entry = oldest_idle(cache);

		if (!entry)
			return;
		take_out(cache, entry);
		free(entry);
	}
}

/* ------------------------------------------------------------------- calls */

int imgc_cache_create(struct cache *cache, uint64_t max_nbytes)
{
	memset(cache, 0, sizeof(*cache));
	cache->max_nbytes = max_nbytes;
	cache->n_buckets = FIRST_N_BUCKETS;
	cache->ends.older = cache->ends.newer = &cache->ends;
	cache->buckets = calloc(cache->n_buckets, sizeof(*cache->buckets));
	if (!cache->buckets)
		return IMGC_NO_MEMORY;
	if (pthread_mutex_init(&cache->lock, NULL)) {
		free(cache->buckets);
		return IMGC_NO_MEMORY;
	}
	return IMGC_OK;
}

void imgc_cache_destroy(struct cache *cache)
{
	imgc_cache_forget(cache);
	pthread_mutex_destroy(&cache->lock);
	free(cache->buckets);
}

struct cache_entry *imgc_cache_find(struct cache *cache, const struct cache_key *key,
				    uint64_t *generation)
{
	pthread_mutex_lock(&cache->lock);
	struct cache_entry *entry = *place_of(cache, key);

	*generation = *generation_of(cache, key);
	if (entry) {
		atomic_fetch_add_explicit(&entry->n_users, 1, memory_order_relaxed);
		unlink_entry(entry);
		link_newest(cache, entry);
		cache->n_hits++;
	} else {
		cache->n_misses++;
	}
	pthread_mutex_unlock(&cache->lock);
	return entry;
}

/* The memory of the entry that must go for one of the same size, or NULL. */
static struct cache_entry *take_oldest(struct cache *cache, size_t nbytes)
{
	struct cache_entry *entry = NULL;

	pthread_mutex_lock(&cache->lock);
	if (atomic_load_explicit(&cache->nbytes, memory_order_relaxed) + cost_of(nbytes) >
	    cache->max_nbytes) {
		entry = oldest_idle(cache);
		if (entry && entry->nbytes == nbytes)
			take_out(cache, entry);
		else
			entry = NULL;
	}
	pthread_mutex_unlock(&cache->lock);
	return entry;
}

struct cache_entry *imgc_cache_new(struct cache *cache, size_t nbytes)
{
	struct cache_entry *entry = take_oldest(cache, nbytes);

	if (!entry)
		entry = malloc(sizeof(*entry) + nbytes);
	if (!entry)
		return NULL;
	entry->nbytes = nbytes;
	atomic_init(&entry->n_users, 1);
	return entry;
}

struct cache_entry *imgc_cache_add(struct cache *cache, const struct cache_key *key,
				   uint64_t generation, struct cache_entry *entry)
{
	struct cache_entry *unused = NULL;

	entry->key = *key;
	pthread_mutex_lock(&cache->lock);
	if (*generation_of(cache, key) == generation) {
		struct cache_entry **place = place_of(cache, key);

		if (*place) {
			unused = entry;
			entry = *place;
		} else {
			entry->next = NULL;
			*place = entry;
			link_newest(cache, entry);
			atomic_fetch_add_explicit(&cache->nbytes, cost_of(entry->nbytes),
						  memory_order_relaxed);
			if (++cache->n_entries > cache->n_buckets)
				grow_buckets(cache);
		}
		atomic_fetch_add_explicit(&entry->n_users, 1, memory_order_relaxed);
	}
	pthread_mutex_unlock(&cache->lock);
	if (unused)
		imgc_cache_release(cache, unused);
	return entry;
}

void imgc_cache_hold(struct cache_entry *entry)
{
	atomic_fetch_add_explicit(&entry->n_users, 1, memory_order_relaxed);
}

void imgc_cache_release(struct cache *cache, struct cache_entry *entry)
{
	if (atomic_fetch_sub_explicit(&entry->n_users, 1, memory_order_acq_rel) == 1) {
		free(entry);
	} else if (is_over(cache)) {
		pthread_mutex_lock(&cache->lock);
		trim(cache);
		pthread_mutex_unlock(&cache->lock);
	}
}

/* Takes the entry out and gives up the cache's use of it. */
static void forget_entry(struct cache *cache, struct cache_entry *entry)
{
	take_out(cache, entry);
	if (atomic_fetch_sub_explicit(&entry->n_users, 1, memory_order_acq_rel) == 1)
		free(entry);
}

void imgc_cache_forget(struct cache *cache)
{
	pthread_mutex_lock(&cache->lock);
	for (unsigned i = 0; i < CACHE_N_GENERATIONS; i++)
		cache->generations[i]++;
	while (cache->ends.newer != &cache->ends)
		forget_entry(cache, cache->ends.newer);
	pthread_mutex_unlock(&cache->lock);
}

void imgc_cache_forget_one(struct cache *cache, const struct cache_key *key)
{
	pthread_mutex_lock(&cache->lock);
	struct cache_entry *entry = *place_of(cache, key);

	++*generation_of(cache, key);
	if (entry)
		forget_entry(cache, entry);
	pthread_mutex_unlock(&cache->lock);
}
