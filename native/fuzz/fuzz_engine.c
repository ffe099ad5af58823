/*
 * fuzz_engine.c - jobs over files in memory, with rows and geometries of a hostile
 * caller
 *
 * The engine refuses the rows or stays inside its buffers.  A plain copy holds exactly
 * the bytes that the rows describe.
 */
#include "fuzz/fuzz_util.h"

#define SECTOR 512
#define MAX_GUEST_NSECTORS 512
#define MAX_BLOCK_BITS 17
#define MAX_ROWS 64
#define MAX_SOURCES 3
#define TARGET_NBYTES (512u << 10)

struct job_case {
	struct imgc_job_options options;
	struct imgc_source_file sources[MAX_SOURCES];
	struct imgc_extent rows[MAX_ROWS], base[MAX_ROWS];
	size_t n_rows, n_base;
	uint64_t guest_nbytes;
};

/* Mostly rows that follow each other: the engine accepts only those. */
static size_t take_rows(struct input *in, struct imgc_extent *rows, uint64_t guest_nbytes)
{
	size_t i, n = take_u8(in) % MAX_ROWS;
	uint64_t at = 0;

	for (i = 0; i < n && at < guest_nbytes; i++) {
		uint8_t how = take_u8(in);
		struct imgc_extent *row = &rows[i];

		memset(row, 0, sizeof(*row));
		row->guest_offset = at;
		row->length = (1 + (uint64_t)take_u8(in)) * (how & 0x40 ? SECTOR : 4096);
		if (i == n - 1 || row->length > guest_nbytes - at)
			row->length = guest_nbytes - at;
		row->kind = how % (IMGC_N_KINDS + 1);
		if (row->kind > IMGC_ZERO) {
			row->host_offset = take_place(in);
			row->host_length = row->kind == IMGC_DATA ? row->length : take_uint(in, 2);
			row->file = how & 0x20 ? take_u8(in) : 0;
			row->flags = how & 0x10 ? IMGC_EXTENT_GRAIN_MARKER | IMGC_EXTENT_UNREAD : 0;
		}
		if (how == 0xff) { /* a row that does not follow the last one */
			row->guest_offset = take_u64(in);
			row->length = take_u64(in);
			row->host_length = take_u64(in);
		}
		at += row->length;
	}
	return i;
}

static void take_geometry(struct input *in, struct imgc_geometry *g, uint64_t guest_nbytes)
{
	*g = (struct imgc_geometry){
		.block_nbytes = UINT64_C(1) << (take_u8(in) % (MAX_BLOCK_BITS + 1)),
		.placing = take_u8(in) % 3,
		.zero_policy = take_u8(in) % 4,
		.stored_alignment = 1u << (take_u8(in) % 18),
		.compressed_alignment = 1u << (take_u8(in) % 12),
		.prefix = take_u8(in) % 3,
		.store_incompressible = take_u8(in) & 1,
		.codec = {take_u8(in) % 5, take_u8(in) % 4, (int32_t)(take_u8(in) % 14) - 1,
			  12 + take_u8(in) % 5},
		.sparse_nbytes = take_u8(in) % 9 * SECTOR,
		.guest_nbytes = guest_nbytes,
	};
	uint8_t how = take_u8(in);

	if (g->placing == IMGC_PLACE_IDENTITY)
		g->host_base = how & 1 ? take_place(in) : 0;
	g->reuse = how >> 3 & 3;
	if (how & 2) {
		g->group_nblocks = take_u8(in);
		g->group_gap_nbytes = take_uint(in, 2);
	}
	if (how & 4) {
		g->stored_prefix_nbytes = (uint32_t)take_uint(in, 2);
		g->stored_prefix_byte = take_u8(in);
	}
}

/* The expected content of a plain copy; false if this model does not cover the job. */
static bool model(const struct job_case *c, const uint8_t *content, uint8_t *out)
{
	const struct imgc_geometry *g = &c->options.geometry;

	if (c->options.kind != IMGC_JOB_CONVERT || g->placing != IMGC_PLACE_IDENTITY ||
	    g->host_base != 0 || g->codec.codec != IMGC_CODEC_NONE)
		return false;
	for (size_t i = 0; i < c->n_rows; i++) {
		const struct imgc_extent *row = &c->rows[i];

		if (row->kind > IMGC_DATA)
			return false;
		if (row->kind == IMGC_DATA)
			memcpy(out + row->guest_offset, content + row->host_offset, row->length);
		else
			memset(out + row->guest_offset, 0, row->length);
	}
	return true;
}

static void run(struct job_case *c, const uint8_t *content)
{
	const struct imgc_geometry *g = &c->options.geometry;
	uint64_t n_blocks = (c->guest_nbytes + g->block_nbytes - 1) / g->block_nbytes;
	struct imgc_placement *placements = calloc(n_blocks + 1, sizeof(*placements));
	uint8_t *target = calloc(1, TARGET_NBYTES);
	uint64_t granule = c->options.granule_nbytes;
	size_t n_granules = granule ? (size_t)((c->guest_nbytes - 1) / granule + 1) : 0;
	uint8_t *granules = granule ? calloc(n_granules, 1) : NULL;
	struct imgc_job *job = NULL;
	struct imgc_error err = {0};
	struct imgc_batch batch = {
		.guest_end = c->guest_nbytes,
		.extents = c->rows,
		.n_extents = c->n_rows,
		.base_extents = c->n_base ? c->base : NULL,
		.n_base_extents = c->n_base,
		.placements = placements,
		.n_placements = (size_t)n_blocks,
		.granules = granules,
		.n_granules = n_granules,
	};

	REQUIRE(placements != NULL && target != NULL);
	REQUIRE(imgc_file_open_memory(target, TARGET_NBYTES, &c->options.target) == IMGC_OK);
	if (imgc_job_create(&c->options, &job, &err) == IMGC_OK &&
	    imgc_job_start(job, &batch, &err) == IMGC_OK) {
		while (imgc_job_wait(job, 1000) == 0)
			;
		if (imgc_job_finish(job, &err) == IMGC_OK) {
			uint8_t *expected = calloc(1, c->guest_nbytes);

			REQUIRE(expected != NULL);
			if (model(c, content, expected))
				REQUIRE(memcmp(expected, target, c->guest_nbytes) == 0);
			free(expected);
		}
	}
	imgc_job_destroy(job);
	imgc_file_close(c->options.target);
	free(target);
	free(placements);
	free(granules);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t nbytes)
{
	struct input in = {data, nbytes};
	struct job_case c = {.guest_nbytes = SECTOR * (1 + take_uint(&in, 2) % MAX_GUEST_NSECTORS)};
	struct imgc_file *file = NULL;
	uint8_t how = take_u8(&in), *content;
	size_t content_nbytes;

	_Static_assert(SECTOR * MAX_GUEST_NSECTORS <= TARGET_NBYTES, "the guest fits the target");
	c.options.kind = how & 1 ? IMGC_JOB_COMPARE : IMGC_JOB_CONVERT;
	c.options.n_threads = how & 2 ? 2 : 1;
	c.options.has_base = how >> 2 & 1;
	c.options.reflink = how >> 6 & 1;
	c.options.window_nbytes = how & 32 ? 1u << 17 : 1u << (take_u8(&in) % 18);
	c.options.next_offset = how & 8 ? take_place(&in) : 0;
	c.options.trust_blocks = how >> 6 & 1;
	c.options.salvage = how >> 7 & 1;
	/* A comparison has no salvage: the bit says that it finds all differences. */
	if (how & 1 && how >> 7) {
		c.options.salvage = 0;
		c.options.granule_nbytes = UINT64_C(512) << (how >> 3 & 7);
	}
	REQUIRE(imgc_variant_select(IMGC_OP_ZERO, NULL, &c.options.zero_variant) == 0);
	REQUIRE(imgc_variant_select(IMGC_OP_INFLATE, NULL, &c.options.inflate_variant) == 0);
	REQUIRE(imgc_variant_select(IMGC_OP_IO, NULL, &c.options.io_variant) == 0);
	take_geometry(&in, &c.options.geometry, c.guest_nbytes);
	c.n_rows = take_rows(&in, c.rows, c.guest_nbytes);
	if (how & 5)
		c.n_base = take_rows(&in, c.base, c.guest_nbytes);
	c.options.n_sources = 1 + take_u8(&in) % MAX_SOURCES;
	for (size_t i = 0; i < c.options.n_sources; i++) {
		c.sources[i].guest_base = take_u8(&in) * SECTOR;
		c.sources[i].block_nbytes = 1u << (take_u8(&in) % 22);
	}
	content = take_rest(&in, &content_nbytes);
	REQUIRE(imgc_file_open_memory(content, content_nbytes, &file) == IMGC_OK);
	for (size_t i = 0; i < c.options.n_sources; i++) {
		c.sources[i].file = file;
		/* The file may be shorter than the job states. */
		c.sources[i].nbytes = content_nbytes + (how & 16 ? 4096 : 0);
	}
	c.options.sources = c.sources;
	run(&c, content);
	imgc_file_close(file);
	free(content);
	return 0;
}
