/*
 * fuzz_in_place.c - writes to a disk whose tables come from a hostile caller
 *
 * The disk refuses the tables, or writes exactly the bytes that their rows of DATA have,
 * up to the first byte that no row has, and nothing else of the file.
 */
#include "fuzz/fuzz_util.h"

#define GUEST_NBYTES (256u << 10)
#define FILE_NBYTES (300u << 10)
#define SPAN_NBYTES (64u << 10)
#define N_SPANS (GUEST_NBYTES / SPAN_NBYTES)
#define MAX_ROWS 24
#define MAX_STEPS 64
#define MAX_WRITE_NBYTES (128u << 10)
#define NO_PLACE UINT64_MAX

struct model {
	struct imgc_disk *disk;
	struct imgc_file *file;
	uint8_t bytes[FILE_NBYTES], expected[FILE_NBYTES], data[MAX_WRITE_NBYTES];
	bool is_known[N_SPANS], is_stopped;
	struct imgc_extent rows[N_SPANS][MAX_ROWS];
	size_t n_rows[N_SPANS];
};

/* Mostly rows that follow each other: others are refused. */
static size_t take_rows(struct input *in, struct imgc_extent *rows, uint64_t start, uint64_t end)
{
	size_t n = 1 + take_u8(in) % MAX_ROWS, i;

	for (i = 0; i < n && start < end; i++) {
		uint8_t how = take_u8(in);
		struct imgc_extent *row = &rows[i];

		*row = (struct imgc_extent){.guest_offset = start,
					    .length = 512 * (UINT64_C(1) + take_u8(in))};
		if (i == n - 1 || row->length > end - start)
			row->length = end - start;
		row->kind = how < 0xc0 ? IMGC_DATA : how % (IMGC_N_KINDS + 1);
		if (row->kind > IMGC_ZERO) {
			row->host_offset = how & 1 ? take_place(in) : 512 * take_uint(in, 2);
			row->host_length = how == 0xbf ? take_u64(in) : row->length;
			row->file = how == 0xbe ? take_u8(in) : 0;
		}
		start += row->length;
	}
	return i;
}

static void add_table(struct model *m, struct input *in)
{
	uint64_t start, end, generation = 0;
	size_t span = take_u8(in) % N_SPANS;
	struct imgc_extent rows[MAX_ROWS];
	struct imgc_error err = {0};

	imgc_disk_span(m->disk, span * SPAN_NBYTES, &start, &end);
	size_t n = take_rows(in, rows, start, end);
	struct imgc_table *table = imgc_disk_find(m->disk, start, &generation);

	REQUIRE(m->is_known[span] == (table != NULL));
	if (table) {
		imgc_disk_drop(m->disk, table);
		return;
	}
	if (imgc_disk_add(m->disk, start, end, generation, rows, n, &table, &err))
		return;
	imgc_disk_drop(m->disk, table);
	memcpy(m->rows[span], rows, sizeof(rows));
	m->n_rows[span] = n;
	m->is_known[span] = true;
}

/* Where a byte of the disk may be overwritten. */
static uint64_t place_of(const struct model *m, uint64_t offset)
{
	size_t span = offset / SPAN_NBYTES;

	for (size_t i = 0; m->is_known[span] && i < m->n_rows[span]; i++) {
		const struct imgc_extent *row = &m->rows[span][i];

		if (offset - row->guest_offset < row->length)
			return row->kind == IMGC_DATA
				       ? row->host_offset + (offset - row->guest_offset)
				       : NO_PLACE;
	}
	return NO_PLACE;
}

static void write_some(struct model *m, struct input *in)
{
	struct imgc_disk_rest rest = {0};
	struct imgc_error err = {0};
	uint64_t offset = take_u8(in) < 0xf8 ? take_uint(in, 3) % GUEST_NBYTES : take_u64(in);
	uint64_t length = take_uint(in, 3) % MAX_WRITE_NBYTES, done = 0;
	int status;

	memset(m->data, take_u8(in), length);
	status = imgc_disk_write(m->disk, offset, m->data, length, &rest, &err);
	if (offset > GUEST_NBYTES || length > GUEST_NBYTES - offset) {
		REQUIRE(status == IMGC_OUT_OF_RANGE);
		return;
	}
	for (; !m->is_stopped && done < length; done++) {
		uint64_t place = place_of(m, offset + done);

		if (place == NO_PLACE)
			break;
		REQUIRE(place < FILE_NBYTES);
		m->expected[place] = m->data[done];
	}
	REQUIRE(rest.offset == offset + done && rest.length == length - done);
	if (done == length && !m->is_stopped)
		REQUIRE(status == IMGC_OK);
	else
		REQUIRE(status == IMGC_MISSING || status == IMGC_NOT_IN_PLACE);
	REQUIRE(status != IMGC_MISSING || !m->is_known[rest.offset / SPAN_NBYTES]);
}

static void forget_some(struct model *m, struct input *in)
{
	uint64_t start = take_uint(in, 3) % GUEST_NBYTES, end = start + take_uint(in, 2);

	imgc_disk_forget(m->disk, start, end);
	for (size_t span = 0; span < N_SPANS; span++)
		if (span * SPAN_NBYTES < end && (span + 1) * SPAN_NBYTES > start && start < end)
			m->is_known[span] = false;
}

static void change_gate(struct model *m)
{
	m->is_stopped = !m->is_stopped;
	if (m->is_stopped)
		imgc_disk_stop_writing(m->disk);
	else
		imgc_disk_resume_writing(m->disk);
	REQUIRE(imgc_disk_await_writes(m->disk, 0));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t nbytes)
{
	struct input in = {data, nbytes};
	struct model *m = calloc(1, sizeof(*m));
	struct imgc_error err = {0};

	REQUIRE(m != NULL);
	REQUIRE(!imgc_file_open_memory(m->bytes, FILE_NBYTES, &m->file));
	struct imgc_source_file source = {.file = m->file, .nbytes = FILE_NBYTES};
	struct imgc_disk_options options = {
		.sources = &source,
		.n_sources = 1,
		.guest_nbytes = GUEST_NBYTES,
		.span_nbytes = SPAN_NBYTES,
		.cache_nbytes = 1 << 20,
	};

	REQUIRE(!imgc_disk_create(&options, &m->disk, &err));
	for (int step = 0; step < MAX_STEPS && in.nbytes > 0; step++) {
		switch (take_u8(&in) % 8) {
		case 0:
		case 1:
		case 2:
			add_table(m, &in);
			break;
		case 3:
			forget_some(m, &in);
			break;
		case 4:
			change_gate(m);
			break;
		default:
			write_some(m, &in);
		}
		REQUIRE(memcmp(m->bytes, m->expected, FILE_NBYTES) == 0);
	}
	imgc_disk_destroy(m->disk);
	imgc_file_close(m->file);
	free(m);
	return 0;
}
