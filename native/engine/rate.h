/*
 * rate.h - how many guest bytes a second jobs may handle
 */
#ifndef IMGC_ENGINE_RATE_H
#define IMGC_ENGINE_RATE_H

#include <stdbool.h>

#include "imgc.h"

/*
 * A token bucket.  It starts empty and holds one request at most, or a quarter of a
 * second, so that no second admits more than its rate and that.
 */
struct bucket {
	uint64_t rate; /* bytes a second; 0: no limit */
	double level, capacity;
	uint64_t filled_ns; /* time of the last filling */
	bool paused;	    /* nothing is given out, and nothing filled in */
};

/* Changes the rate.  What was filled at the former rate stays. */
void imgc_bucket_set_rate(struct bucket *bucket, uint64_t rate, uint64_t now_ns);

/* Stops or goes on.  Nothing is saved up meanwhile. */
void imgc_bucket_pause(struct bucket *bucket, bool paused, uint64_t now_ns);

/*
 * Takes nbytes out and returns 0, or takes nothing and returns how many nanoseconds are
 * missing.  `now_ns` is a monotonic time.  A paused bucket refuses even 0 bytes.
 */
uint64_t imgc_bucket_take(struct bucket *bucket, uint64_t nbytes, uint64_t now_ns);

#endif /* IMGC_ENGINE_RATE_H */
