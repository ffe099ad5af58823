/*
 * salvage.h - the list of guest ranges that could not be read
 */
#ifndef IMGC_ENGINE_SALVAGE_H
#define IMGC_ENGINE_SALVAGE_H

#include <pthread.h>
#include <stdbool.h>

#include "imgc.h"

/* Used by all workers of a job. */
struct salvage {
	pthread_mutex_t lock; /* all below */
	bool lock_exists;
	struct imgc_bad_range *ranges; /* ascending, neighbours joined */
	size_t n, capacity;
};

int imgc_salvage_create(struct salvage *salvage);

/* Allowed after a failed create, and on zeroed memory. */
void imgc_salvage_destroy(struct salvage *salvage);

/* Adds a range; joins it to its neighbours of the same source and errno. */
int imgc_salvage_add(struct salvage *salvage, struct imgc_bad_range range, struct imgc_error *err);

#endif /* IMGC_ENGINE_SALVAGE_H */
