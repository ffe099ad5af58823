/*
 * uses.c - the uses of what can be closed at any time
 */
#include <stdatomic.h>
#include <stdlib.h>

#include "imgc.h"

#define IS_CLOSED 1u
#define ONE_USE 2u

struct imgc_uses {
	_Atomic uint64_t uses; /* ONE_USE for each, and IS_CLOSED */
};

int imgc_uses_create(struct imgc_uses **out)
{
	struct imgc_uses *uses = malloc(sizeof(*uses));

	if (!uses)
		return IMGC_NO_MEMORY;
	atomic_init(&uses->uses, 0);
	*out = uses;
	return IMGC_OK;
}

void imgc_uses_destroy(struct imgc_uses *uses)
{
	free(uses);
}

int imgc_uses_enter(struct imgc_uses *uses)
{
	uint64_t now = atomic_load(&uses->uses);

	do {
		if (now & IS_CLOSED)
			return 0;
	} while (!atomic_compare_exchange_weak(&uses->uses, &now, now + ONE_USE));
	return 1;
}

int imgc_uses_leave(struct imgc_uses *uses)
{
	return atomic_fetch_sub(&uses->uses, ONE_USE) == (ONE_USE | IS_CLOSED);
}

int imgc_uses_close(struct imgc_uses *uses)
{
	return atomic_fetch_or(&uses->uses, IS_CLOSED) == 0;
}

int imgc_uses_none(const struct imgc_uses *uses)
{
	return atomic_load(&uses->uses) < ONE_USE;
}
