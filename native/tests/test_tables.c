/*
 * test_tables.c - the formats' real table entries: decoded, refused, encoded and back
 */
#include "common/endian.h"
#include "tests/test_util.h"

#define KIB ((uint64_t)1024)
#define MIB (1024 * KIB)
#define TIB (1024 * 1024 * MIB)

/* VMDK hosted sparse: sectors in 4 bytes, 0 absent, 1 zeros. */
static const struct imgc_table_format vmdk = {
	.entry_nbytes = 4,
	.block_nbytes = 64 * KIB,
	.offset_mask = UINT32_MAX,
	.offset_lshift = 9,
	.default_kind = IMGC_DATA,
	.n_rules = 2,
	.rules = {{UINT32_MAX, 0, IMGC_HOLE}, {UINT32_MAX, 1, IMGC_ZERO}},
	.zero_entry = 1,
};

/* VMDK streamOptimized: the same, with zlib streams after grain markers. */
static const struct imgc_table_format vmdk_stream = {
	.entry_nbytes = 4,
	.block_nbytes = 64 * KIB,
	.offset_mask = UINT32_MAX,
	.offset_lshift = 9,
	.default_kind = IMGC_ZLIB,
	.flags = IMGC_EXTENT_GRAIN_MARKER,
	.compressed_bound = 128 * KIB,
	.n_rules = 2,
	.rules = {{UINT32_MAX, 0, IMGC_HOLE}, {UINT32_MAX, 1, IMGC_ZERO}},
	.zero_entry = 1,
};

#define QCOW2_OFFSET UINT64_C(0x00fffffffffffe00)
#define QCOW2_COPIED (UINT64_C(1) << 63)
#define QCOW2_COMPRESSED (UINT64_C(1) << 62)

/* QCOW2 version 3, 64 KiB clusters: the size of compressed data starts at bit 54. */
static const struct imgc_table_format qcow2 = {
	.entry_nbytes = 8,
	.big_endian = 1,
	.block_nbytes = 64 * KIB,
	.offset_mask = QCOW2_OFFSET,
	.reserved_mask = UINT64_C(0x3f000000000001fe) | (64 * KIB - 512),
	.default_kind = IMGC_DATA,
	.compressed_mask = (UINT64_C(1) << 54) - 1,
	.length_shift = 54,
	.length_mask = 255,
	.n_rules = 3,
	.rules = {{QCOW2_COMPRESSED, QCOW2_COMPRESSED, IMGC_DEFLATE},
		  {1, 1, IMGC_ZERO},
		  {QCOW2_OFFSET, 0, IMGC_HOLE}},
	.zero_entry = 1,
	.stored_bits = QCOW2_COPIED,
	.compressed_bits = QCOW2_COMPRESSED,
};

/*
 * VHD: sectors, big-endian, all ones absent; a bitmap of 512 bytes before each block.
 */
static const struct imgc_table_format vhd = {
	.entry_nbytes = 4,
	.big_endian = 1,
	.block_nbytes = 2 * MIB,
	.offset_mask = UINT32_MAX,
	.offset_lshift = 9,
	.host_base = 512,
	.default_kind = IMGC_DATA,
	.n_rules = 1,
	.rules = {{UINT32_MAX, UINT32_MAX, IMGC_HOLE}},
	.absent_entry = UINT32_MAX,
	.zero_entry = UINT32_MAX,
};

/* VHDX: MiB from bit 20, the state in bits 0 to 2. */
static const struct imgc_table_format vhdx = {
	.entry_nbytes = 8,
	.block_nbytes = 32 * MIB,
	.offset_mask = ~(uint64_t)(MIB - 1),
	.reserved_mask = MIB - 1 - 7,
	.default_kind = IMGC_HOLE,
	.n_rules = 3,
	.rules = {{7, 6, IMGC_DATA}, {7, 7, IMGC_DATA}, {7, 2, IMGC_ZERO}},
	.zero_entry = 2,
	.stored_bits = 6,
};

/* VDI: block numbers after header and map; all ones absent, all ones less one zeros. */
static const struct imgc_table_format vdi = {
	.entry_nbytes = 4,
	.block_nbytes = MIB,
	.offset_mask = UINT32_MAX,
	.offset_lshift = 20,
	.host_base = 2 * MIB,
	.default_kind = IMGC_DATA,
	.n_rules = 2,
	.rules = {{UINT32_MAX, UINT32_MAX, IMGC_HOLE}, {UINT32_MAX, UINT32_MAX - 1, IMGC_ZERO}},
	.absent_entry = UINT32_MAX,
	.zero_entry = UINT32_MAX - 1,
};

static const struct imgc_table_format *const formats[] = {&vmdk, &qcow2, &vhd, &vhdx, &vdi};
static const char *const format_names[] = {"vmdk", "qcow2", "vhd", "vhdx", "vdi"};

#define N_FORMATS (sizeof(formats) / sizeof(formats[0]))
#define MAX_ENTRIES 64

static uint8_t wire[MAX_ENTRIES * 8];
static struct imgc_extent rows[2 * MAX_ENTRIES];
static struct imgc_error error;

static void put_entries(const struct imgc_table_format *f, const uint64_t *values, size_t n)
{
	for (size_t i = 0; i < n; i++) {
		void *p = wire + i * f->entry_nbytes;

		if (f->entry_nbytes == 4 && f->big_endian)
			imgc_store_be32(p, (uint32_t)values[i]);
		else if (f->entry_nbytes == 4)
			imgc_store_le32(p, (uint32_t)values[i]);
		else if (f->big_endian)
			imgc_store_be64(p, values[i]);
		else
			imgc_store_le64(p, values[i]);
	}
}

/* Decodes the `values` of a disk of guest_nbytes into rows and *n_out. */
static int decode(const struct imgc_table_format *f, const uint64_t *values, size_t n,
		  uint64_t guest_nbytes, uint64_t file_nbytes, size_t *n_out)
{
	struct imgc_table_span span = {
		.guest_end = guest_nbytes, .file_nbytes = file_nbytes, .file = 3};

	put_entries(f, values, n);
	memset(&error, 0, sizeof(error));
	return imgc_table_decode(f, wire, n, &span, rows, MAX_ENTRIES, n_out, &error);
}

static void check_row(size_t i, uint64_t guest_offset, uint64_t length, uint64_t host_offset,
		      uint64_t host_length, unsigned kind)
{
	CHECK_EQ(rows[i].guest_offset, guest_offset);
	CHECK_EQ(rows[i].length, length);
	CHECK_EQ(rows[i].host_offset, host_offset);
	CHECK_EQ(rows[i].host_length, host_length);
	CHECK_EQ(rows[i].kind, kind);
	CHECK_EQ(rows[i].file, kind >= IMGC_DATA ? 3 : 0);
}

static void test_vmdk(void)
{
	/* Two grains in a row on the host, two absent, zeros, one back at the front. */
	const uint64_t values[] = {128, 256, 0, 0, 1, 512, 128, 2};
	const uint64_t grain = 64 * KIB;
	size_t n = 0;

	CHECK_EQ(decode(&vmdk, values, 8, 8 * grain, 10 * MIB, &n), IMGC_OK);
	CHECK_EQ(n, 6);
	check_row(0, 0, 2 * grain, 128 * 512, 2 * grain, IMGC_DATA);
	check_row(1, 2 * grain, 2 * grain, 0, 0, IMGC_HOLE);
	check_row(2, 4 * grain, grain, 0, 0, IMGC_ZERO);
	check_row(3, 5 * grain, grain, 512 * 512, grain, IMGC_DATA);
	check_row(4, 6 * grain, grain, 128 * 512, grain, IMGC_DATA);
	check_row(5, 7 * grain, grain, 2 * 512, grain, IMGC_DATA);
}

static void test_vmdk_stream(void)
{
	const uint64_t values[] = {128, 129, 0, 200};
	const uint64_t grain = 64 * KIB;
	size_t n = 0, i;

	CHECK_EQ(decode(&vmdk_stream, values, 4, 4 * grain - 512, 200 * 512 + 700, &n), IMGC_OK);
	CHECK_EQ(n, 4);
	check_row(0, 0, grain, 128 * 512, 72 * 512 + 700, IMGC_ZLIB);
	check_row(1, grain, grain, 129 * 512, 71 * 512 + 700, IMGC_ZLIB);
	check_row(2, 2 * grain, grain, 0, 0, IMGC_HOLE);
	check_row(3, 3 * grain, grain - 512, 200 * 512, 700, IMGC_ZLIB);
	for (i = 0; i < n; i++)
		CHECK_EQ(rows[i].flags, rows[i].kind == IMGC_ZLIB ? IMGC_EXTENT_GRAIN_MARKER : 0);
	/* The bound, if the file does not cut it. */
	CHECK_EQ(decode(&vmdk_stream, values, 4, 4 * grain, 10 * MIB, &n), IMGC_OK);
	check_row(0, 0, grain, 128 * 512, 128 * KIB, IMGC_ZLIB);
	CHECK_EQ(decode(&vmdk_stream, values, 4, 4 * grain, 200 * 512, &n), IMGC_OUT_OF_RANGE);
	CHECK_EQ(error.offset, 3);
}

static void test_qcow2(void)
{
	const uint64_t cluster = 64 * KIB;
	const uint64_t packed_at = 5 * cluster + 100;
	const uint64_t values[] = {
		QCOW2_COPIED | 2 * cluster,
		3 * cluster,
		0,
		QCOW2_COPIED, /* no offset: absent, even with the flag */
		1,
		7 * cluster | 1, /* zeros with a preallocated cluster */
		QCOW2_COMPRESSED | packed_at | UINT64_C(3) << 54,
		QCOW2_COMPRESSED | (packed_at + 1900) | UINT64_C(0) << 54,
	};
	size_t n = 0;

	CHECK_EQ(decode(&qcow2, values, 8, 8 * cluster, 100 * MIB, &n), IMGC_OK);
	CHECK_EQ(n, 5);
	check_row(0, 0, 2 * cluster, 2 * cluster, 2 * cluster, IMGC_DATA);
	check_row(1, 2 * cluster, 2 * cluster, 0, 0, IMGC_HOLE);
	check_row(2, 4 * cluster, 2 * cluster, 0, 0, IMGC_ZERO);
	check_row(3, 6 * cluster, cluster, packed_at, 4 * 512 - 100, IMGC_DEFLATE);
	check_row(4, 7 * cluster, cluster, packed_at + 1900, 512 - 2000 % 512, IMGC_DEFLATE);
	/* The last sectors may lie past the end of the file. */
	CHECK_EQ(decode(&qcow2, values, 8, 8 * cluster, packed_at + 1930, &n), IMGC_OK);
	CHECK_EQ(rows[4].host_length, 30);
	CHECK_EQ(decode(&qcow2, values, 8, 8 * cluster, packed_at + 1900, &n), IMGC_OUT_OF_RANGE);
	CHECK_EQ(error.offset, 7);
	CHECK_EQ(error.source, IMGC_NO_SOURCE);
	CHECK(error.op != NULL && error.os_errno == 0);
}

static void test_refused_entries(void)
{
	static const struct {
		const struct imgc_table_format *format;
		uint64_t entry;
		int status;
	} cases[] = {
		{&qcow2, 2 * 64 * KIB | 2, IMGC_CORRUPT},		  /* reserved low bit */
		{&qcow2, 2 * 64 * KIB | UINT64_C(1) << 56, IMGC_CORRUPT}, /* reserved high bit */
		{&qcow2, 2 * 64 * KIB + 512, IMGC_CORRUPT},		  /* inside a cluster */
		{&qcow2, QCOW2_OFFSET & ~(64 * KIB - 1), IMGC_OUT_OF_RANGE},
		{&qcow2, 10 * MIB, IMGC_OUT_OF_RANGE},
		{&qcow2, 10 * MIB - 64 * KIB, IMGC_OK},
		{&qcow2, ~UINT64_C(0), IMGC_OUT_OF_RANGE}, /* compressed, far away */
		{&vmdk, UINT32_MAX, IMGC_OUT_OF_RANGE},
		{&vmdk, 10 * MIB / 512 - 127, IMGC_OUT_OF_RANGE},
		{&vmdk, 10 * MIB / 512 - 128, IMGC_OK},
		{&vhd, UINT32_MAX - 1, IMGC_OUT_OF_RANGE},
		{&vhd, 8 * MIB / 512, IMGC_OUT_OF_RANGE}, /* the bitmap is in the way */
		{&vhd, 8 * MIB / 512 - 1, IMGC_OK},
		{&vhdx, 6 | 8, IMGC_CORRUPT},
		{&vhdx, 6 | UINT64_C(0xfffffffffff) << 20, IMGC_OUT_OF_RANGE},
		{&vhdx, 5, IMGC_OK}, /* a state without data */
		{&vdi, 7, IMGC_OK},
		{&vdi, 8, IMGC_OUT_OF_RANGE},
		{&vdi, UINT32_MAX - 2, IMGC_OUT_OF_RANGE},
	};
	size_t n;

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		const uint64_t absent = cases[i].format->absent_entry;
		const uint64_t values[] = {absent, cases[i].entry};

		n = 77;
		CHECK_EQ(decode(cases[i].format, values, 2, TIB, 10 * MIB, &n), cases[i].status);
		if (cases[i].status) {
			CHECK_EQ(n, 77);
			CHECK_EQ(error.status, cases[i].status);
			CHECK_EQ(error.offset, 1);
		}
	}
}

/* Numbers that do not fit 64 bits. */
static void test_wrap(void)
{
	struct imgc_table_format f = vhdx;
	const uint64_t values[] = {6 | UINT64_C(0xfffffffffff) << 20};
	size_t n = 0;

	f.offset_lshift = 20;
	CHECK_EQ(decode(&f, values, 1, TIB, UINT64_MAX, &n), IMGC_OUT_OF_RANGE);
	f.offset_lshift = 0;
	f.host_base = UINT64_MAX - 5;
	CHECK_EQ(decode(&f, values, 1, TIB, UINT64_MAX, &n), IMGC_OUT_OF_RANGE);
	f = qcow2;
	f.length_mask = UINT64_MAX;
	f.length_shift = 0;
	f.rules[0].mask = 0;
	f.rules[0].value = 0;
	f.compressed_mask = 4095;
	CHECK_EQ(decode(&f, (const uint64_t[]){UINT64_MAX}, 1, TIB, 10 * MIB, &n), IMGC_OK);
	CHECK_EQ(rows[0].host_offset, 4095);
	CHECK_EQ(rows[0].host_length, 10 * MIB - 4095);
}

static void test_clipping(void)
{
	const uint64_t cluster = 64 * KIB;
	const uint64_t values[] = {2 * cluster, 3 * cluster, 4 * cluster, ~UINT64_C(0)};
	struct imgc_table_span span = {.guest_offset = 40 * cluster,
				       .guest_end = 42 * cluster + 512,
				       .file_nbytes = 4 * cluster + 512,
				       .file = 3};
	size_t n = 0;

	/* The third block ends with the disk and the file.  The fourth is ignored. */
	put_entries(&qcow2, values, 4);
	CHECK_EQ(imgc_table_decode(&qcow2, wire, 4, &span, rows, 1, &n, &error), IMGC_OK);
	CHECK_EQ(n, 1);
	check_row(0, 40 * cluster, 2 * cluster + 512, 2 * cluster, 2 * cluster + 512, IMGC_DATA);
	span.guest_end = 40 * cluster;
	CHECK_EQ(imgc_table_decode(&qcow2, wire, 4, &span, rows, 1, &n, &error), IMGC_OK);
	CHECK_EQ(n, 0);
	/* At the end of the address space. */
	span.guest_offset = UINT64_MAX - cluster + 1;
	span.guest_end = UINT64_MAX;
	CHECK_EQ(imgc_table_decode(&qcow2, wire, 4, &span, rows, 1, &n, &error), IMGC_OK);
	CHECK_EQ(n, 1);
	CHECK_EQ(rows[0].length, cluster - 1);
}

static void test_capacity(void)
{
	const uint64_t values[] = {128, 0, 0, 128};
	struct imgc_table_span span = {.guest_end = MIB, .file_nbytes = MIB};
	size_t n = 77;

	put_entries(&vmdk, values, 4);
	CHECK_EQ(imgc_table_decode(&vmdk, wire, 4, &span, rows, 2, &n, &error), IMGC_LIMIT);
	CHECK_EQ(error.offset, 3);
	CHECK_EQ(n, 77);
	CHECK_EQ(imgc_table_decode(&vmdk, wire, 4, &span, rows, 3, &n, NULL), IMGC_OK);
	CHECK_EQ(n, 3);
	CHECK_EQ(imgc_table_decode(&vmdk, wire, 4, &span, rows, 0, &n, NULL), IMGC_LIMIT);
}

static void test_refused_formats(void)
{
	struct imgc_table_format f;
	size_t n = 0;

	for (int i = 0; i < 8; i++) {
		struct imgc_placement place = {0, 0, 0};

		f = vmdk;
		switch (i) {
		case 0:
			f.entry_nbytes = 2;
			break;
		case 1:
			f.block_nbytes = 0;
			break;
		case 2:
			f.block_nbytes = 3 * KIB;
			break;
		case 3:
			f.n_rules = IMGC_TABLE_MAX_RULES + 1;
			break;
		case 4:
			f.default_kind = IMGC_N_KINDS;
			break;
		case 5:
			f.rules[1].kind = IMGC_N_KINDS;
			break;
		case 6:
			f.offset_lshift = 64;
			break;
		default:
			f.length_shift = 64;
		}
		CHECK_EQ(decode(&f, (const uint64_t[]){0}, f.entry_nbytes == 2 ? 0 : 1, MIB, MIB,
				&n),
			 IMGC_INVALID_ARGUMENT);
		CHECK_EQ(imgc_table_encode(&f, &place, 1, wire, &error), IMGC_INVALID_ARGUMENT);
	}
}

static void test_refused_placements(void)
{
	static const struct {
		const struct imgc_table_format *format;
		struct imgc_placement placement;
		int status;
	} cases[] = {
		{&vmdk, {UINT64_C(512) * UINT32_MAX, 65536, IMGC_BLOCK_STORED}, IMGC_OK},
		{&vmdk, {UINT64_C(512) << 32, 65536, IMGC_BLOCK_STORED}, IMGC_LIMIT},
		{&vmdk, {65536 + 1, 65536, IMGC_BLOCK_STORED}, IMGC_LIMIT},
		{&vmdk, {0, 65536, IMGC_BLOCK_STORED}, IMGC_LIMIT}, /* reads as absent */
		{&vmdk_stream, {65536, 100, IMGC_BLOCK_COMPRESSED}, IMGC_OK},
		{&vmdk_stream, {65536 + 256, 100, IMGC_BLOCK_COMPRESSED}, IMGC_LIMIT},
		{&vdi, {MIB, 65536, IMGC_BLOCK_STORED}, IMGC_LIMIT}, /* before the base */
		{&vdi, {2 * MIB, 65536, IMGC_BLOCK_STORED}, IMGC_OK},
		{&qcow2, {UINT64_C(1) << 56, 65536, IMGC_BLOCK_STORED}, IMGC_LIMIT},
		{&qcow2, {(UINT64_C(1) << 56) - 65536, 65536, IMGC_BLOCK_STORED}, IMGC_OK},
		{&qcow2, {(UINT64_C(1) << 54) - 1, 1, IMGC_BLOCK_COMPRESSED}, IMGC_OK},
		{&qcow2, {UINT64_C(1) << 54, 1, IMGC_BLOCK_COMPRESSED}, IMGC_LIMIT},
		{&qcow2, {0, 256 * 512, IMGC_BLOCK_COMPRESSED}, IMGC_OK},
		{&qcow2, {0, 256 * 512 + 1, IMGC_BLOCK_COMPRESSED}, IMGC_LIMIT},
		{&qcow2, {1, 256 * 512, IMGC_BLOCK_COMPRESSED}, IMGC_LIMIT},
		{&qcow2, {512, 0, IMGC_BLOCK_COMPRESSED}, IMGC_LIMIT},
		{&vmdk, {0, 0, 4}, IMGC_INVALID_ARGUMENT},
	};

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		struct imgc_placement two[2] = {{0, 0, IMGC_BLOCK_ABSENT}, cases[i].placement};

		error.offset = 99;
		CHECK_EQ(imgc_table_encode(cases[i].format, two, 2, wire, &error), cases[i].status);
		CHECK_EQ(error.offset, cases[i].status ? 1 : 99);
	}
}

/* Random placements, encoded and decoded again. */
static void test_round_trip(const struct imgc_table_format *f, uint64_t seed)
{
	struct imgc_placement places[MAX_ENTRIES];
	struct imgc_table_span span = {.guest_end = MAX_ENTRIES * f->block_nbytes,
				       .file_nbytes = UINT64_C(1) << 40,
				       .file = 3};
	uint64_t state = seed * 2 + 1;
	uint64_t next = f->host_base + f->block_nbytes;
	size_t row = 0, n = 0;

	for (size_t i = 0; i < MAX_ENTRIES; i++) {
		uint32_t n_states = f == &qcow2 ? 4 : 3;
		uint32_t state_now = (uint32_t)(test_random(&state) >> 40) % n_states;

		places[i] = (struct imgc_placement){0, 0, state_now};
		if (state_now < IMGC_BLOCK_STORED)
			continue;
		places[i].length = (uint32_t)f->block_nbytes;
		if (state_now == IMGC_BLOCK_COMPRESSED)
			places[i].length = 1 + (uint32_t)(test_random(&state) >> 48);
		else
			next = f->host_base + (next - f->host_base + f->block_nbytes - 1) /
						      f->block_nbytes * f->block_nbytes;
		if (f == &vhd) /* the bitmap */
			next += 512;
		places[i].host_offset = next;
		next += places[i].length;
	}
	CHECK_EQ(imgc_table_encode(f, places, MAX_ENTRIES, wire, &error), IMGC_OK);
	CHECK_EQ(imgc_table_decode(f, wire, MAX_ENTRIES, &span, rows, MAX_ENTRIES, &n, &error),
		 IMGC_OK);
	for (size_t i = 0; i < MAX_ENTRIES; i++) {
		uint64_t guest_offset = i * f->block_nbytes, inside;

		while (rows[row].guest_offset + rows[row].length <= guest_offset)
			row++;
		CHECK(row < n);
		inside = guest_offset - rows[row].guest_offset;
		switch (places[i].state) {
		case IMGC_BLOCK_ZERO:
			CHECK_EQ(rows[row].kind, f == &vhd ? IMGC_HOLE : IMGC_ZERO);
			break;
		case IMGC_BLOCK_STORED:
			CHECK_EQ(rows[row].kind, IMGC_DATA);
			CHECK_EQ(rows[row].host_offset + inside, places[i].host_offset);
			break;
		case IMGC_BLOCK_COMPRESSED:
			CHECK_EQ(rows[row].kind, IMGC_DEFLATE);
			CHECK_EQ(rows[row].host_offset, places[i].host_offset);
			CHECK(rows[row].host_length >= places[i].length);
			CHECK(rows[row].host_length < places[i].length + 512);
			break;
		default:
			CHECK_EQ(rows[row].kind, IMGC_HOLE);
		}
	}
	CHECK_EQ(rows[n - 1].guest_offset + rows[n - 1].length, span.guest_end);
}

/* decode() with salvage: it cannot fail. */
static size_t salvage(const struct imgc_table_format *f, const uint64_t *values, size_t n,
		      uint64_t guest_nbytes, uint64_t file_nbytes)
{
	struct imgc_table_span span = {
		.guest_end = guest_nbytes, .file_nbytes = file_nbytes, .file = 3, .salvage = 1};
	size_t n_out = 0;

	put_entries(f, values, n);
	CHECK_EQ(imgc_table_decode(f, wire, n, &span, rows, 2 * n, &n_out, &error), IMGC_OK);
	return n_out;
}

static void test_salvage(void)
{
	const uint64_t cluster = 64 * KIB, end = 3 * cluster + 1700;
	const uint64_t clusters[] = {
		2 * cluster,			      /* whole */
		3 * cluster,			      /* three sectors and a part */
		4 * cluster,			      /* past the end */
		4 * cluster + 512,		      /* not aligned */
		8 | 1,				      /* zeros with a reserved bit */
		0,				      /* a hole */
		QCOW2_COMPRESSED | (end - 1),	      /* its first byte is there */
		QCOW2_COMPRESSED | end,		      /* it is not */
		2 * cluster | UINT64_C(1) << 56 | 16, /* reserved bits */
	};
	const uint64_t grains[] = {128, UINT32_MAX, UINT32_MAX, 256, 0, 1};
	const uint64_t grain = 64 * KIB;

	CHECK_EQ(salvage(&qcow2, clusters, 9, 9 * cluster, end), 5);
	check_row(0, 0, cluster + 1536, 2 * cluster, cluster + 1536, IMGC_DATA);
	check_row(1, cluster + 1536, 4 * cluster - 1536, 0, 0, IMGC_LOST);
	check_row(2, 5 * cluster, cluster, 0, 0, IMGC_HOLE);
	check_row(3, 6 * cluster, cluster, end - 1, 1, IMGC_DEFLATE);
	check_row(4, 7 * cluster, 2 * cluster, 0, 0, IMGC_LOST);
	(void)salvage(&vmdk, grains, 6, 6 * grain, 2 * grain);
	check_row(0, 0, grain, grain, grain, IMGC_DATA);
	check_row(1, grain, 3 * grain, 0, 0, IMGC_LOST);
	check_row(2, 4 * grain, grain, 0, 0, IMGC_HOLE);
	check_row(3, 5 * grain, grain, 0, 0, IMGC_ZERO);
	/* The most rows that a batch of entries can have. */
	const uint64_t cut[] = {129, 129, 129, 129};

	CHECK_EQ(salvage(&vmdk, cut, 4, 4 * grain, 2 * grain), 8);
	check_row(6, 3 * grain, grain - 512, 129 * 512, grain - 512, IMGC_DATA);
	check_row(7, 4 * grain - 512, 512, 0, 0, IMGC_LOST);
}

int main(void)
{
	test_salvage();
	test_vmdk();
	test_vmdk_stream();
	test_qcow2();
	test_refused_entries();
	test_wrap();
	test_clipping();
	test_capacity();
	test_refused_formats();
	test_refused_placements();
	for (size_t i = 0; i < N_FORMATS; i++) {
		printf("  round trips: %s\n", format_names[i]);
		for (uint64_t seed = 1; seed < 50; seed++)
			test_round_trip(formats[i], seed);
	}
	return 0;
}
