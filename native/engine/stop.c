/*
 * stop.c - the flags that tell a job to stop
 */
#include "engine/stop.h"

#include "common/error.h"

bool imgc_stop_is_set(const struct stop *stop)
{
	return atomic_load_explicit(&stop->cancelled, memory_order_relaxed) ||
	       atomic_load_explicit(&stop->failed, memory_order_relaxed);
}

int imgc_check_stopped(const struct stop *stop, struct imgc_error *err)
{
	return imgc_stop_is_set(stop) ? imgc_fail_call(err, IMGC_CANCELLED, "cancel") : IMGC_OK;
}
