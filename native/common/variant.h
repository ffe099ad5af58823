/*
 * variant.h - the table of an operation's variants
 *
 * Each operation has one table, beside its implementations.  kernels/variants.c finds
 * variants in them by name and by index.  The index of a row is the variant's id.
 */
#ifndef IMGC_COMMON_VARIANT_H
#define IMGC_COMMON_VARIANT_H

#include <stdbool.h>

struct imgc_variant {
	const char *name;
	bool built;
	bool (*runnable)(void); /* NULL: it runs wherever it is built */
};

struct imgc_variant_table {
	const char *operation;
	const struct imgc_variant *rows; /* by preference; the last one always runs */
	unsigned n_rows;
	unsigned default_row; /* measured, see docs/kernels.md */
};

extern const struct imgc_variant_table imgc_zero_variants;
extern const struct imgc_variant_table imgc_crc32c_variants;
extern const struct imgc_variant_table imgc_inflate_variants;
extern const struct imgc_variant_table imgc_io_variants;

#endif /* IMGC_COMMON_VARIANT_H */
