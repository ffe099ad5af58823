/*
 * rate.c - how many guest bytes a second jobs may handle
 */
#include "engine/rate.h"

#include <pthread.h>
#include <stdlib.h>
#include <time.h>

#include "common/checked.h"

#define SECOND_NS 1000000000u

/*
 * What a busy machine is late with must not be lost: so much of a second is saved up, and
 * ten seconds exceed the rate by a fortieth at most.
 */
#define LATE_PARTS 4

/* -------------------------------------------------------------------- bucket */

static void fill(struct bucket *b, uint64_t now_ns)
{
	double seconds = (double)(now_ns - b->filled_ns) / SECOND_NS;

	if (!b->paused)
		b->level += seconds * (double)b->rate;
	double most = (double)b->rate / LATE_PARTS;

	if (most < b->capacity || b->capacity == 0)
		most = b->capacity; /* none before the first request */
	if (b->level > most)
		b->level = most;
	b->filled_ns = now_ns;
}

void imgc_bucket_set_rate(struct bucket *bucket, uint64_t rate, uint64_t now_ns)
{
	fill(bucket, now_ns);
	bucket->rate = rate;
}

void imgc_bucket_pause(struct bucket *bucket, bool paused, uint64_t now_ns)
{
	fill(bucket, now_ns);
	bucket->paused = paused;
}

/* The caller asks again long before this has passed. */
#define LONGEST_NS (UINT64_C(1000000) * SECOND_NS)

uint64_t imgc_bucket_take(struct bucket *bucket, uint64_t nbytes, uint64_t now_ns)
{
	if (bucket->paused)
		return LONGEST_NS;
	if (bucket->rate == 0 || nbytes == 0)
		return 0;
	fill(bucket, now_ns);
	if (bucket->capacity < (double)nbytes)
		bucket->capacity = (double)nbytes;
	double missing = (double)nbytes - bucket->level;

	if (missing <= 0) {
		bucket->level -= (double)nbytes;
		return 0;
	}
	double seconds = missing / (double)bucket->rate;

	return seconds * SECOND_NS < LONGEST_NS ? (uint64_t)(seconds * SECOND_NS) + 1 : LONGEST_NS;
}

/* --------------------------------------------------------------------- limit */

struct imgc_rate_limit {
	pthread_mutex_t lock; /* all below */
	pthread_cond_t changed;
	struct bucket bucket;
};

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * SECOND_NS + (uint64_t)t.tv_nsec;
}

int imgc_rate_limit_create(struct imgc_rate_limit **out)
{
	struct imgc_rate_limit *limit = calloc(1, sizeof(*limit));
	pthread_condattr_t attributes;

	if (!limit)
		return IMGC_NO_MEMORY;
	if (pthread_condattr_init(&attributes)) {
		free(limit);
		return IMGC_NO_MEMORY;
	}
	pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
	int failed = pthread_cond_init(&limit->changed, &attributes);

	pthread_condattr_destroy(&attributes);
	if (failed) {
		free(limit);
		return IMGC_NO_MEMORY;
	}
	if (pthread_mutex_init(&limit->lock, NULL)) {
		pthread_cond_destroy(&limit->changed);
		free(limit);
		return IMGC_NO_MEMORY;
	}
	limit->bucket.filled_ns = now();
	*out = limit;
	return IMGC_OK;
}

void imgc_rate_limit_destroy(struct imgc_rate_limit *limit)
{
	if (!limit)
		return;
	pthread_mutex_destroy(&limit->lock);
	pthread_cond_destroy(&limit->changed);
	free(limit);
}

void imgc_rate_limit_set(struct imgc_rate_limit *limit, uint64_t bytes_per_second)
{
	pthread_mutex_lock(&limit->lock);
	imgc_bucket_set_rate(&limit->bucket, bytes_per_second, now());
	pthread_cond_broadcast(&limit->changed);
	pthread_mutex_unlock(&limit->lock);
}

void imgc_rate_limit_pause(struct imgc_rate_limit *limit, int paused)
{
	pthread_mutex_lock(&limit->lock);
	imgc_bucket_pause(&limit->bucket, paused != 0, now());
	pthread_cond_broadcast(&limit->changed);
	pthread_mutex_unlock(&limit->lock);
}

uint64_t imgc_rate_limit_get(struct imgc_rate_limit *limit)
{
	pthread_mutex_lock(&limit->lock);
	uint64_t rate = limit->bucket.rate;

	pthread_mutex_unlock(&limit->lock);
	return rate;
}

int imgc_rate_limit_take(struct imgc_rate_limit *limit, uint64_t nbytes, unsigned timeout_ms)
{
	uint64_t deadline = now() + (uint64_t)timeout_ms * 1000000;
	int taken = 0;

	pthread_mutex_lock(&limit->lock);
	for (;;) {
		uint64_t at = now(), wait_ns = imgc_bucket_take(&limit->bucket, nbytes, at);

		taken = wait_ns == 0;
		if (taken || at >= deadline)
			break;
		uint64_t until_ns = imgc_min_u64(at + wait_ns, deadline);
		struct timespec until = {.tv_sec = (time_t)(until_ns / SECOND_NS),
					 .tv_nsec = (long)(until_ns % SECOND_NS)};

		pthread_cond_timedwait(&limit->changed, &limit->lock, &until);
	}
	pthread_mutex_unlock(&limit->lock);
	return taken;
}
