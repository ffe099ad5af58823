/*
 * encode.c - from placements to table entries
 */
#include "tables/format.h"

#include "common/endian.h"
#include "common/error.h"

#define OP "table_encode"

/* The entry of a plain place; false if bits would be lost. */
static inline bool place_bits(const struct imgc_table_format *f, uint64_t host_offset,
			      uint64_t *entry)
{
	if (host_offset < f->host_base)
		return false;
	uint64_t value = host_offset - f->host_base;

	if (!imgc_is_aligned(value, (uint64_t)1 << f->offset_lshift))
		return false;
	value >>= f->offset_lshift;
	return imgc_shl_checked(value, f->offset_rshift, entry) && (*entry & ~f->offset_mask) == 0;
}

/* The entry of a place and a length, which counts units of 512 bytes, less one. */
static inline bool place_and_length_bits(const struct imgc_table_format *f,
					 const struct imgc_placement *row, uint64_t *entry)
{
	if (row->length == 0 || (row->host_offset & ~f->compressed_mask) != 0)
		return false;
	uint64_t n_units = (row->host_offset % 512 + row->length - 1) / 512, bits;

	if (n_units > f->length_mask || !imgc_shl_checked(n_units, f->length_shift, &bits))
		return false;
	*entry = row->host_offset | bits;
	return true;
}

/* IMGC_LIMIT if the placement does not fit an entry. */
static inline int encode_row(const struct imgc_table_format *f, const struct imgc_placement *row,
			     uint64_t *entry)
{
	bool fits;

	switch (row->state) {
	case IMGC_BLOCK_ABSENT:
		*entry = f->absent_entry;
		return IMGC_OK;
	case IMGC_BLOCK_ZERO:
		*entry = f->zero_entry;
		return IMGC_OK;
	case IMGC_BLOCK_STORED:
		fits = place_bits(f, row->host_offset, entry);
		*entry |= f->stored_bits;
		break;
	case IMGC_BLOCK_COMPRESSED:
		fits = f->compressed_mask != 0 ? place_and_length_bits(f, row, entry)
					       : place_bits(f, row->host_offset, entry);
		*entry |= f->compressed_bits;
		break;
	default:
		return IMGC_INVALID_ARGUMENT;
	}
	/* The entry of a block with a place must not mean "no place". */
	if (!fits || *entry == f->absent_entry)
		return IMGC_LIMIT;
	return f->entry_nbytes == 8 || *entry <= UINT32_MAX ? IMGC_OK : IMGC_LIMIT;
}

static inline void store_entry(const struct imgc_table_format *f, void *p, uint64_t entry)
{
	if (f->entry_nbytes == 4) {
		if (f->big_endian)
			imgc_store_be32(p, (uint32_t)entry);
		else
			imgc_store_le32(p, (uint32_t)entry);
	} else {
		if (f->big_endian)
			imgc_store_be64(p, entry);
		else
			imgc_store_le64(p, entry);
	}
}

int imgc_table_encode(const struct imgc_table_format *format,
		      const struct imgc_placement *placements, size_t n, void *entries,
		      struct imgc_error *err)
{
	const uint64_t limit = format->entry_nbytes == 4 ? UINT32_MAX : UINT64_MAX;
	uint8_t *p = entries;

	if (!imgc_table_format_valid(format) || format->absent_entry > limit ||
	    format->zero_entry > limit)
		return imgc_fail_call(err, IMGC_INVALID_ARGUMENT, OP);
	for (size_t i = 0; i < n; i++, p += format->entry_nbytes) {
		uint64_t entry = 0;
		int status = encode_row(format, &placements[i], &entry);

		if (status)
			return imgc_fail_at(err, status, i, OP);
		store_entry(format, p, entry);
	}
	return IMGC_OK;
}
