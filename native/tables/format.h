/*
 * format.h - the check of a struct imgc_table_format, for both table kernels
 */
#ifndef IMGC_TABLES_FORMAT_H
#define IMGC_TABLES_FORMAT_H

#include <stdbool.h>

#include "common/checked.h"
#include "imgc.h"

static inline bool imgc_table_format_valid(const struct imgc_table_format *f)
{
	if ((f->entry_nbytes != 4 && f->entry_nbytes != 8) || f->n_rules > IMGC_TABLE_MAX_RULES)
		return false;
	if (!imgc_is_power_of_two(f->block_nbytes) || f->default_kind >= IMGC_N_KINDS)
		return false;
	if (f->offset_rshift > 63 || f->offset_lshift > 63 || f->length_shift > 63)
		return false;
	for (uint32_t i = 0; i < f->n_rules; i++) {
		if (f->rules[i].kind >= IMGC_N_KINDS)
			return false;
	}
	return true;
}

#endif /* IMGC_TABLES_FORMAT_H */
