/*
 * gate.c - what can be shut while nobody is inside
 */
#include "engine/gate.h"

#include <time.h>

#include "imgc.h"

#define IS_SHUT UINT64_C(1)
#define ONE_INSIDE UINT64_C(2)

int imgc_gate_create(struct gate *gate)
{
	pthread_condattr_t monotonic;

	atomic_init(&gate->word, 0);
	if (pthread_condattr_init(&monotonic))
		return IMGC_NO_MEMORY;
	pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
	int failed = pthread_cond_init(&gate->emptied, &monotonic);

	pthread_condattr_destroy(&monotonic);
	if (failed)
		return IMGC_NO_MEMORY;
	if (pthread_mutex_init(&gate->lock, NULL)) {
		pthread_cond_destroy(&gate->emptied);
		return IMGC_NO_MEMORY;
	}
	return IMGC_OK;
}

void imgc_gate_destroy(struct gate *gate)
{
	pthread_mutex_destroy(&gate->lock);
	pthread_cond_destroy(&gate->emptied);
}

bool imgc_gate_enter(struct gate *gate)
{
	uint64_t now = atomic_load(&gate->word);

	do {
		if (now & IS_SHUT)
			return false;
	} while (!atomic_compare_exchange_weak(&gate->word, &now, now + ONE_INSIDE));
	return true;
}

void imgc_gate_leave(struct gate *gate)
{
	if (atomic_fetch_sub(&gate->word, ONE_INSIDE) != (ONE_INSIDE | IS_SHUT))
		return;
	/* A waiter holds the lock from when it looks until it waits, so none is missed. */
	pthread_mutex_lock(&gate->lock);
	pthread_cond_broadcast(&gate->emptied);
	pthread_mutex_unlock(&gate->lock);
}

void imgc_gate_shut(struct gate *gate)
{
	atomic_fetch_or(&gate->word, IS_SHUT);
}

void imgc_gate_open(struct gate *gate)
{
	atomic_fetch_and(&gate->word, ~IS_SHUT);
}

static bool is_occupied(struct gate *gate)
{
	return atomic_load(&gate->word) >= ONE_INSIDE;
}

bool imgc_gate_await_empty(struct gate *gate, unsigned timeout_ms)
{
	struct timespec end;
	int failed = 0;

	clock_gettime(CLOCK_MONOTONIC, &end);
	end.tv_nsec += (long)(timeout_ms % 1000) * 1000000;
	end.tv_sec += timeout_ms / 1000 + end.tv_nsec / 1000000000;
	end.tv_nsec %= 1000000000;
	pthread_mutex_lock(&gate->lock);
	while (is_occupied(gate) && !failed)
		failed = pthread_cond_timedwait(&gate->emptied, &gate->lock, &end);
	bool is_empty = !is_occupied(gate);

	pthread_mutex_unlock(&gate->lock);
	return is_empty;
}
