/*
 * uses.c - the uses of what can be closed at any time
 *
 * Uses are counted by the parity of the epoch in which they began.  A new epoch begins
 * only when none is left of the one before the current one.  So once two have begun
 * after a moment, every use from before that moment has ended, however many others have
 * begun since.
 */
#include <stdatomic.h>
#include <stdlib.h>

#include "imgc.h"

/* The word: IS_CLOSED, the number of uses of each parity, and the epoch. */
#define IS_CLOSED UINT64_C(1)
#define COUNT_BITS 24u /* Linux has no more than 2^22 threads */
#define EPOCH_SHIFT (1u + 2u * COUNT_BITS)
#define ONE_EPOCH (UINT64_C(1) << EPOCH_SHIFT)
#define COUNT_MASK ((UINT64_C(1) << COUNT_BITS) - 1)

/* The number of an epoch wraps.  Then a use may seem to last, until the next one begins. */
#define EPOCH_MASK (UINT64_MAX >> EPOCH_SHIFT)

struct imgc_uses {
	_Atomic uint64_t word;
};

static unsigned shift_of(unsigned parity)
{
	return 1u + parity * COUNT_BITS;
}

static uint64_t count_of(uint64_t word, unsigned parity)
{
	return (word >> shift_of(parity)) & COUNT_MASK;
}

static unsigned parity_of(uint64_t word)
{
	return (unsigned)(word >> EPOCH_SHIFT) & 1u;
}

static int is_idle(uint64_t word)
{
	return !count_of(word, 0) && !count_of(word, 1);
}

static int is_closed_and_idle(uint64_t word)
{
	return (word & IS_CLOSED) && is_idle(word);
}

int imgc_uses_create(struct imgc_uses **out)
{
	struct imgc_uses *uses = malloc(sizeof(*uses));

	if (!uses)
		return IMGC_NO_MEMORY;
	atomic_init(&uses->word, 0);
	*out = uses;
	return IMGC_OK;
}

void imgc_uses_destroy(struct imgc_uses *uses)
{
	free(uses);
}

int imgc_uses_enter(struct imgc_uses *uses)
{
	uint64_t now = atomic_load(&uses->word);
	unsigned parity;

	do {
		if (now & IS_CLOSED)
			return 0;
		parity = parity_of(now);
	} while (!atomic_compare_exchange_weak(&uses->word, &now,
					       now + (UINT64_C(1) << shift_of(parity))));
	return 1 + (int)parity;
}

int imgc_uses_leave(struct imgc_uses *uses, int ticket)
{
	uint64_t one = UINT64_C(1) << shift_of((unsigned)ticket - 1);

	return is_closed_and_idle(atomic_fetch_sub(&uses->word, one) - one);
}

int imgc_uses_renew(struct imgc_uses *uses, int ticket)
{
	uint64_t now = atomic_load(&uses->word), next;
	unsigned parity;

	do {
		parity = parity_of(now);
		next = now - (UINT64_C(1) << shift_of((unsigned)ticket - 1)) +
		       (UINT64_C(1) << shift_of(parity));
	} while (!atomic_compare_exchange_weak(&uses->word, &now, next));
	return 1 + (int)parity;
}

int imgc_uses_close(struct imgc_uses *uses)
{
	uint64_t before = atomic_fetch_or(&uses->word, IS_CLOSED);

	return !(before & IS_CLOSED) && is_idle(before);
}

int imgc_uses_none(const struct imgc_uses *uses)
{
	return is_idle(atomic_load(&uses->word));
}

uint64_t imgc_uses_epoch(struct imgc_uses *uses)
{
	return atomic_load(&uses->word) >> EPOCH_SHIFT;
}

int imgc_uses_is_over(struct imgc_uses *uses, uint64_t epoch)
{
	uint64_t now = atomic_load(&uses->word);

	while ((((now >> EPOCH_SHIFT) - epoch) & EPOCH_MASK) < 2) {
		if (count_of(now, 1 - parity_of(now)))
			return 0;
		if (atomic_compare_exchange_weak(&uses->word, &now, now + ONE_EPOCH))
			now += ONE_EPOCH;
	}
	return 1;
}
