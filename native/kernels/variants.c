/*
 * variants.c - finds variants by name and by index
 */
#include <string.h>

#include "common/variant.h"
#include "imgc.h"

static const struct imgc_variant_table *operation_table(unsigned op)
{
	switch (op) {
	case IMGC_OP_ZERO:
		return &imgc_zero_variants;
	case IMGC_OP_CRC32C:
		return &imgc_crc32c_variants;
	case IMGC_OP_INFLATE:
		return &imgc_inflate_variants;
	case IMGC_OP_IO:
		return &imgc_io_variants;
	default:
		return NULL;
	}
}

static bool is_runnable(const struct imgc_variant *row)
{
	return row->built && (!row->runnable || row->runnable());
}

const char *imgc_operation_name(unsigned op)
{
	const struct imgc_variant_table *table = operation_table(op);

	return table ? table->operation : NULL;
}

unsigned imgc_variant_count(unsigned op)
{
	const struct imgc_variant_table *table = operation_table(op);

	return table ? table->n_rows : 0;
}

/* The measured default if it runs here, else the first row that does. */
static unsigned default_row(const struct imgc_variant_table *table)
{
	if (is_runnable(&table->rows[table->default_row]))
		return table->default_row;
	for (unsigned i = 0; i < table->n_rows - 1; i++) {
		if (is_runnable(&table->rows[i]))
			return i;
	}
	return table->n_rows - 1;
}

int imgc_variant_describe(unsigned op, unsigned index, struct imgc_variant_info *info)
{
	const struct imgc_variant_table *table = operation_table(op);

	if (!table || index >= table->n_rows)
		return IMGC_INVALID_ARGUMENT;
	info->name = table->rows[index].name;
	info->built = table->rows[index].built;
	info->runnable = is_runnable(&table->rows[index]);
	info->is_default = default_row(table) == index;
	return IMGC_OK;
}

int imgc_variant_select(unsigned op, const char *name, uint32_t *id)
{
	const struct imgc_variant_table *table = operation_table(op);

	if (!table)
		return IMGC_SELECT_UNKNOWN;
	if (!name) {
		*id = default_row(table);
		return IMGC_SELECT_OK;
	}
	for (unsigned i = 0; i < table->n_rows; i++) {
		if (strcmp(table->rows[i].name, name) != 0)
			continue;
		if (!table->rows[i].built)
			return IMGC_SELECT_NOT_BUILT;
		if (!is_runnable(&table->rows[i]))
			return IMGC_SELECT_NO_CPU;
		*id = i;
		return IMGC_SELECT_OK;
	}
	return IMGC_SELECT_UNKNOWN;
}
