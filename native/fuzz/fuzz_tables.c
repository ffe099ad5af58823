/*
 * fuzz_tables.c - table entries of any format to extents and back
 *
 * The engine's own check accepts every row that decode produces.  The two are
 * independent: a row that only one of them accepts shows a fault in one of them.
 */
#include "fuzz/fuzz_util.h"

#define MAX_ENTRIES 4096

/* The five real formats, so that a fuzzer need not find them. */
static const struct imgc_table_format formats[] = {
	{/* QCOW2, 64 KiB clusters */
	 .entry_nbytes = 8,
	 .big_endian = 1,
	 .block_nbytes = 65536,
	 .offset_mask = 0x00fffffffffffe00,
	 .reserved_mask = 0x3f000000000001fe | 0xfe00,
	 .default_kind = IMGC_DATA,
	 .compressed_mask = (UINT64_C(1) << 54) - 1,
	 .length_shift = 54,
	 .length_mask = 255,
	 .n_rules = 3,
	 .rules = {{UINT64_C(1) << 62, UINT64_C(1) << 62, IMGC_DEFLATE},
		   {1, 1, IMGC_ZERO},
		   {0x00fffffffffffe00, 0, IMGC_HOLE}},
	 .zero_entry = 1,
	 .stored_bits = UINT64_C(1) << 63,
	 .compressed_bits = UINT64_C(1) << 62},
	{/* VMDK, streamOptimized */
	 .entry_nbytes = 4,
	 .block_nbytes = 65536,
	 .offset_mask = UINT32_MAX,
	 .offset_lshift = 9,
	 .default_kind = IMGC_ZLIB,
	 .flags = IMGC_EXTENT_GRAIN_MARKER,
	 .compressed_bound = 12 + 2 * 65536,
	 .n_rules = 2,
	 .rules = {{UINT32_MAX, 0, IMGC_HOLE}, {UINT32_MAX, 1, IMGC_ZERO}},
	 .zero_entry = 1},
	{/* VHD, blocks of 4 KiB after their bitmap */
	 .entry_nbytes = 4,
	 .big_endian = 1,
	 .block_nbytes = 4096,
	 .offset_mask = UINT32_MAX,
	 .offset_lshift = 9,
	 .host_base = 512,
	 .default_kind = IMGC_DATA,
	 .n_rules = 1,
	 .rules = {{UINT32_MAX, UINT32_MAX, IMGC_HOLE}},
	 .absent_entry = UINT32_MAX,
	 .zero_entry = UINT32_MAX},
	{/* VDI */
	 .entry_nbytes = 4,
	 .block_nbytes = 1 << 20,
	 .offset_mask = UINT32_MAX,
	 .offset_lshift = 20,
	 .host_base = 1 << 20,
	 .default_kind = IMGC_DATA,
	 .n_rules = 2,
	 .rules = {{UINT32_MAX, UINT32_MAX, IMGC_HOLE}, {UINT32_MAX, UINT32_MAX - 1, IMGC_ZERO}},
	 .absent_entry = UINT32_MAX,
	 .zero_entry = UINT32_MAX - 1},
	{/* VHDX, blocks of 1 MiB */
	 .entry_nbytes = 8,
	 .block_nbytes = 1 << 20,
	 .offset_mask = 0xfffffffffff00000,
	 .reserved_mask = 0xffff8,
	 .default_kind = IMGC_DATA,
	 .n_rules = 3,
	 .rules = {{7, 0, IMGC_HOLE}, {7, 2, IMGC_ZERO}, {7, 3, IMGC_ZERO}},
	 .zero_entry = 2,
	 .stored_bits = 6},
};

#define N_FORMATS (sizeof(formats) / sizeof(formats[0]))

/* Any format that a caller may pass, valid or not. */
static struct imgc_table_format any_format(struct input *in)
{
	struct imgc_table_format f = {
		.entry_nbytes = take_u8(in) & 1 ? 4 : 8,
		.big_endian = take_u8(in) & 1,
		.block_nbytes = UINT64_C(1) << (take_u8(in) & 63),
		.offset_mask = take_u64(in),
		.offset_rshift = take_u8(in),
		.offset_lshift = take_u8(in),
		.host_base = take_place(in),
		.reserved_mask = take_place(in),
		.default_kind = take_u8(in) % (IMGC_N_KINDS + 1),
		.flags = take_u8(in) & IMGC_EXTENT_GRAIN_MARKER,
		.compressed_mask = take_u64(in),
		.length_shift = take_u8(in) & 127,
		.length_mask = take_u64(in),
		.compressed_bound = take_place(in),
		.n_rules = take_u8(in) % (IMGC_TABLE_MAX_RULES + 2),
	};

	for (uint32_t i = 0; i < f.n_rules && i < IMGC_TABLE_MAX_RULES; i++)
		f.rules[i] = (struct imgc_table_rule){take_u64(in), take_u64(in),
						      take_u8(in) % (IMGC_N_KINDS + 1)};
	f.absent_entry = take_u64(in);
	f.zero_entry = take_u64(in);
	f.stored_bits = take_u64(in);
	f.compressed_bits = take_u64(in);
	return f;
}

/*
 * Every answer has rows in order without gaps, and data inside the file.  The engine
 * accepts the rows of the real formats.
 */
static void check_rows(const struct imgc_table_format *f, const struct imgc_table_span *span,
		       const struct imgc_extent *rows, size_t n, size_t n_entries, bool is_real)
{
	uint64_t expected = span->guest_offset;

	REQUIRE(n <= n_entries * (span->salvage ? 2 : 1));
	for (size_t i = 0; i < n; i++) {
		REQUIRE(rows[i].guest_offset == expected && rows[i].length > 0);
		REQUIRE(rows[i].length <= span->guest_end - expected);
		expected += rows[i].length;
		if (rows[i].kind <= IMGC_ZERO)
			continue;
		REQUIRE(rows[i].file == span->file);
		if (rows[i].kind == IMGC_LOST) {
			REQUIRE(span->salvage && rows[i].host_length == 0);
			is_real = false; /* the engine rejects it */
			continue;
		}
		REQUIRE(rows[i].host_offset <= span->file_nbytes);
		REQUIRE(rows[i].host_length <= span->file_nbytes - rows[i].host_offset);
	}
	if (is_real && n > 0) {
		struct imgc_source_file file = {.nbytes = span->file_nbytes,
						.block_nbytes = (uint32_t)f->block_nbytes};
		struct imgc_error err = {0};
		int status =
			imgc_extents_check(rows, n, &file, 1, span->guest_offset, expected, &err);

		/* The engine refuses a grain whose marker is cut off. */
		REQUIRE(status == IMGC_OK ||
			(rows[err.offset].kind == IMGC_ZLIB && rows[err.offset].host_length <= 12));
	}
}

static void decode(const struct imgc_table_format *f, struct input *in, bool is_real)
{
	struct imgc_table_span span = {.guest_offset = take_place(in),
				       .file_nbytes = take_place(in)};
	uint64_t length = take_place(in);
	struct imgc_error err = {0};
	size_t nbytes, n = 0;
	uint8_t tight = take_u8(in), *entries;

	span.salvage = take_u8(in) & 1;
	if (is_real) { /* as every reader passes them */
		span.guest_offset &= ~(f->block_nbytes - 1);
		length &= ~UINT64_C(511);
	}
	span.guest_end = span.guest_offset + length;
	if (span.guest_end < span.guest_offset)
		span.guest_end = UINT64_MAX;
	entries = take_rest(in, &nbytes);
	size_t n_entries = nbytes / f->entry_nbytes;
	if (n_entries > MAX_ENTRIES)
		n_entries = MAX_ENTRIES;
	size_t most = n_entries * (span.salvage ? 2 : 1);
	size_t capacity = tight < most ? tight : most;
	struct imgc_extent *rows = malloc((capacity ? capacity : 1) * sizeof(*rows));
	REQUIRE(rows != NULL);
	int status = imgc_table_decode(f, entries, n_entries, &span, rows, capacity, &n, &err);
	if (status == IMGC_OK)
		check_rows(f, &span, rows, n, n_entries, is_real);
	else
		REQUIRE(err.status == status && err.offset <= n_entries &&
			(!span.salvage || status == IMGC_LIMIT || status == IMGC_INVALID_ARGUMENT));
	free(rows);
	free(entries);
}

/* Decode reads what encode has written for stored blocks. */
static void encode(const struct imgc_table_format *f, struct input *in, bool is_real)
{
	struct imgc_placement rows[16];
	struct imgc_extent out[16];
	uint8_t entries[16 * 8];
	size_t i, n = take_u8(in) % 17, n_out = 0;
	struct imgc_error err = {0};
	struct imgc_table_span span = {.guest_end = UINT64_MAX, .file_nbytes = UINT64_MAX};

	for (i = 0; i < n; i++)
		rows[i] = (struct imgc_placement){take_place(in), (uint32_t)take_uint(in, 4),
						  take_u8(in) % 5};
	if (imgc_table_encode(f, rows, n, entries, &err) != IMGC_OK || !is_real)
		return;
	if (imgc_table_decode(f, entries, n, &span, out, 16, &n_out, &err) != IMGC_OK || n == 0)
		return;
	if (rows[0].state == IMGC_BLOCK_STORED && out[0].kind == IMGC_DATA)
		REQUIRE(out[0].host_offset == rows[0].host_offset);
	if (rows[0].state == IMGC_BLOCK_ZERO || rows[0].state == IMGC_BLOCK_ABSENT)
		REQUIRE(out[0].kind <= IMGC_ZERO);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t nbytes)
{
	struct input in = {data, nbytes};
	uint8_t which = take_u8(&in);
	bool is_real = which % (N_FORMATS + 1) < N_FORMATS;
	struct imgc_table_format f = is_real ? formats[which % (N_FORMATS + 1)] : any_format(&in);

	if (which & 0x80)
		encode(&f, &in, is_real);
	else
		decode(&f, &in, is_real);
	return 0;
}
