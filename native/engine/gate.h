/*
 * gate.h - what can be shut while nobody is inside
 */
#ifndef IMGC_ENGINE_GATE_H
#define IMGC_ENGINE_GATE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

/* Any number of threads may use it.  It is open at first. */
struct gate {
	_Atomic uint64_t word; /* IS_SHUT, and how many are inside */
	pthread_mutex_t lock;  /* only of those that wait until it is empty */
	pthread_cond_t emptied;
};

/* IMGC_NO_MEMORY if the system has no lock left. */
int imgc_gate_create(struct gate *gate);

/*
 * After a successful create only, and after every other call has returned: that nobody
 * is inside is not enough.
 */
void imgc_gate_destroy(struct gate *gate);

/* False if it is shut; else imgc_gate_leave() follows. */
bool imgc_gate_enter(struct gate *gate);
void imgc_gate_leave(struct gate *gate);

void imgc_gate_shut(struct gate *gate);
void imgc_gate_open(struct gate *gate);

/* Waits up to timeout_ms until nobody is inside a gate that is shut; whether it is so. */
bool imgc_gate_await_empty(struct gate *gate, unsigned timeout_ms);

#endif /* IMGC_ENGINE_GATE_H */
