/*
 * stop.h - the flags that tell a job to stop
 */
#ifndef IMGC_ENGINE_STOP_H
#define IMGC_ENGINE_STOP_H

#include <stdatomic.h>
#include <stdbool.h>

#include "imgc.h"

/* Any thread may set and read these at any time. */
struct stop {
	_Atomic bool cancelled; /* by the caller */
	_Atomic bool failed;	/* by an error of a worker */
};

bool imgc_stop_is_set(const struct stop *stop);

/*
 * IMGC_CANCELLED if the job is to stop.  Asked between blocks and between attempts, so
 * that a cancelled job ends soon.
 */
int imgc_check_stopped(const struct stop *stop, struct imgc_error *err);

#endif /* IMGC_ENGINE_STOP_H */
