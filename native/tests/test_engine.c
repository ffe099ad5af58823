/*
 * test_engine.c - the engine: extent check, conversions and comparisons in memory
 */
#include <dirent.h>

#include "tests/engine_util.h"

static const struct imgc_extent NO_ROW;

/* ------------------------------------------------------------ extent check */

static void check_refused(struct imgc_extent second, size_t n, uint64_t start, uint64_t end,
			  uint64_t row)
{
	struct imgc_extent rows[3] = {data_row(0, 4096, 0), second, data_row(8192, 4096, 4096)};
	struct imgc_source_file file = {.nbytes = 65536, .block_nbytes = 4096};
	struct imgc_error err = {0};

	CHECK_EQ(imgc_extents_check(rows, n, &file, 1, start, end, &err), IMGC_OUT_OF_RANGE);
	CHECK_EQ(err.offset, row);
	CHECK(strcmp(err.op, "extent_check") == 0);
}

/* Zeros fill up an incomplete last sector; data starts at sectors. */
static void test_extents_last_sector(void)
{
	struct imgc_extent rows[2] = {data_row(0, 4000, 0), empty_row(4000, 96, IMGC_ZERO)};
	struct imgc_source_file file = {.nbytes = 4000};

	CHECK_EQ(imgc_extents_check(rows, 2, &file, 1, 0, 4096, NULL), IMGC_OK);
	rows[1] = data_row(4000, 96, 0);
	CHECK_EQ(imgc_extents_check(rows, 2, &file, 1, 0, 4096, NULL), IMGC_OUT_OF_RANGE);
}

static void test_extents_check(void)
{
	struct imgc_extent good = empty_row(4096, 4096, IMGC_HOLE), row;
	struct imgc_extent rows[3] = {data_row(0, 4096, 0), good, data_row(8192, 4096, 4096)};
	struct imgc_source_file file = {.nbytes = 65536, .block_nbytes = 4096};

	CHECK_EQ(imgc_extents_check(rows, 3, &file, 1, 0, 12288, NULL), IMGC_OK);
	rows[1] = (struct imgc_extent){4096, 4096, 100, 4000, 0, IMGC_ZLIB, 0};
	CHECK_EQ(imgc_extents_check(rows, 3, &file, 1, 0, 12288, NULL), IMGC_OK);

	check_refused(good, 3, 0, 12287, 2);   /* past the end */
	check_refused(good, 3, 0, 12289, 3);   /* ends early */
	check_refused(good, 3, 512, 12288, 0); /* starts elsewhere */
	check_refused(good, 2, 0, 12288, 2);
	check_refused(empty_row(4096, 0, IMGC_HOLE), 3, 0, 12288, 1);
	check_refused(empty_row(4096, 3584, IMGC_HOLE), 3, 0, 12288, 2);	     /* gap */
	check_refused(empty_row(4096, 8192, IMGC_HOLE), 3, 0, 12288, 2);	     /* overlap */
	check_refused(empty_row(3584, 4608, IMGC_HOLE), 3, 0, 12288, 1);	     /* backwards */
	check_refused(empty_row(4096, UINT64_MAX - 100, IMGC_HOLE), 3, 0, 12288, 1); /* wraps */
	check_refused(empty_row(4096, 4096, IMGC_N_KINDS), 3, 0, 12288, 1);
	row = data_row(4096, 4096, 61441);
	check_refused(row, 3, 0, 12288, 1); /* past the end of the file */
	row = data_row(4096, 4096, UINT64_MAX - 10);
	check_refused(row, 3, 0, 12288, 1);
	row = data_row(4096, 4096, 0);
	row.file = 1;
	check_refused(row, 3, 0, 12288, 1);
	row.file = 0;
	row.host_length = 4095;
	check_refused(row, 3, 0, 12288, 1);
	row.kind = IMGC_DEFLATE;
	row.host_length = 0;
	check_refused(row, 3, 0, 12288, 1);
	row.host_length = 3 * 4096;
	check_refused(row, 3, 0, 12288, 1); /* larger than any compressed block */
	row.host_length = 12;
	row.flags = IMGC_EXTENT_GRAIN_MARKER;
	check_refused(row, 3, 0, 12288, 1); /* nothing after the marker */

	/* A compressed row that crosses its block. */
	struct imgc_extent crossing = {2048, 4096, 0, 4096, 0, IMGC_ZSTD, 0};

	file.block_nbytes = 4096;
	CHECK_EQ(imgc_extents_check(&crossing, 1, &file, 1, 2048, 6144, NULL), IMGC_OUT_OF_RANGE);
	file.guest_base = 2048;
	CHECK_EQ(imgc_extents_check(&crossing, 1, &file, 1, 2048, 6144, NULL), IMGC_OK);
	file.block_nbytes = 0;
	CHECK_EQ(imgc_extents_check(&crossing, 1, &file, 1, 2048, 6144, NULL), IMGC_OUT_OF_RANGE);
	CHECK_EQ(imgc_extents_check(&NO_ROW, 0, &file, 1, 0, 0, NULL), IMGC_OK);
}

/* -------------------------------------------------------------- conversions */

static void test_identity(unsigned n_threads)
{
	struct disk source = example_disk(), target = disk_create(source.nbytes + 4096);
	struct imgc_source_file file;
	struct imgc_job_options o = convert_options(&source, &target, &file, n_threads);
	struct imgc_extent row = data_row(0, source.nbytes, 0);

	o.geometry.placing = IMGC_PLACE_IDENTITY;
	o.geometry.host_base = 4096;
	convert(&o, &row, 1, NULL, 0);
	CHECK(memcmp(source.bytes, target.bytes + 4096, source.nbytes) == 0);

	/* Over old content, zeros must be written. */
	memset(target.bytes, 0xee, target.nbytes);
	o.geometry.zero_policy = IMGC_ZERO_EXPLICIT;
	convert(&o, &row, 1, NULL, 0);
	CHECK(memcmp(source.bytes, target.bytes + 4096, source.nbytes) == 0);
	CHECK_EQ(target.bytes[4095], 0xee);

	/* So must holes, and zeros between two rows. */
	struct imgc_extent rows[3] = {
		empty_row(0, 3 * MIB, IMGC_HOLE), data_row(3 * MIB, 1536, 3 * MIB),
		empty_row(3 * MIB + 1536, source.nbytes - 3 * MIB - 1536, IMGC_ZERO)};

	for (unsigned policy = IMGC_ZERO_EXPLICIT; policy <= IMGC_ZERO_STORE; policy++) {
		memset(target.bytes, 0xee, target.nbytes);
		o.geometry.zero_policy = policy;
		convert(&o, rows, 3, NULL, 0);
		for (uint64_t i = 0; i < source.nbytes; i++) {
			bool data = i >= 3 * MIB && i < 3 * MIB + 1536;

			CHECK_EQ(target.bytes[4096 + i], data ? source.bytes[i] : 0);
		}
	}
	disk_destroy(&source);
	disk_destroy(&target);
}

static void test_append(struct imgc_codec_params codec, uint64_t block, uint64_t window,
			unsigned store_incompressible)
{
	struct disk source = example_disk();
	struct disk targets[3];
	struct imgc_extent row = data_row(0, source.nbytes, 0);
	size_t n = (source.nbytes + block - 1) / block;
	struct imgc_placement *placements[3];
	static const unsigned threads[3] = {1, 2, 8};

	for (int i = 0; i < 3; i++) {
		struct imgc_source_file file;

		targets[i] = disk_create(2 * source.nbytes + 4 * MIB);
		struct imgc_job_options o =
			convert_options(&source, &targets[i], &file, threads[i]);

		placements[i] = calloc(n, sizeof(**placements));
		CHECK(placements[i]);
		o.window_nbytes = window;
		o.geometry.placing = IMGC_PLACE_APPEND;
		o.geometry.block_nbytes = block;
		o.geometry.stored_alignment = (uint32_t)block;
		o.geometry.codec = codec;
		o.geometry.store_incompressible = store_incompressible;
		if (codec.codec == IMGC_CODEC_ZLIB) {
			o.geometry.prefix = IMGC_PREFIX_GRAIN_MARKER;
			o.geometry.compressed_alignment = 512;
			o.geometry.group_nblocks = 4;
			o.geometry.group_gap_nbytes = 2560;
		}
		o.next_offset = block;
		convert(&o, &row, 1, placements[i], n);
		check_readback(&source, &targets[i], &o.geometry, placements[i], n);
		CHECK(memcmp(placements[0], placements[i], n * sizeof(**placements)) == 0);
		CHECK(memcmp(targets[0].bytes, targets[i].bytes, targets[0].nbytes) == 0);
	}
	for (int i = 0; i < 3; i++) {
		free(placements[i]);
		disk_destroy(&targets[i]);
	}
	disk_destroy(&source);
}

/* A disk whose end is told late is written as one whose end was known. */
static void test_late_end(struct imgc_codec_params codec)
{
	struct disk source = example_disk();
	const uint64_t block = 64 * KIB, first = 8 * block;
	uint64_t guest_nbytes = source.nbytes;
	size_t n = (guest_nbytes + block - 1) / block;
	struct disk targets[2];
	struct imgc_placement *placements[2];

	for (int i = 0; i < 2; i++) {
		struct imgc_source_file file;
		struct imgc_job *job;

		targets[i] = disk_create(2 * source.nbytes);
		placements[i] = calloc(n, sizeof(**placements));
		CHECK(placements[i]);
		struct imgc_job_options o = convert_options(&source, &targets[i], &file, 2);

		o.geometry.placing = IMGC_PLACE_APPEND;
		o.geometry.block_nbytes = block;
		o.geometry.codec = codec;
		o.geometry.guest_nbytes = i ? guest_nbytes : (uint64_t)1 << 50;
		CHECK_EQ(imgc_job_create(&o, &job, NULL), IMGC_OK);
		struct imgc_extent rows[2] = {data_row(0, first, 0),
					      data_row(first, guest_nbytes - first, first)};
		struct imgc_batch head = {.guest_end = first,
					  .extents = rows,
					  .n_extents = 1,
					  .placements = placements[i],
					  .n_placements = 8};
		struct imgc_batch tail = {.guest_start = first,
					  .guest_end = guest_nbytes,
					  .extents = rows + 1,
					  .n_extents = 1,
					  .placements = placements[i] + 8,
					  .n_placements = n - 8};

		CHECK_EQ(imgc_job_start(job, &head, NULL), IMGC_OK);
		CHECK_EQ(imgc_job_set_guest_nbytes(job, guest_nbytes), IMGC_INVALID_ARGUMENT);
		CHECK_EQ(imgc_job_finish(job, NULL), IMGC_OK);
		CHECK_EQ(imgc_job_set_guest_nbytes(job, first - 1), IMGC_INVALID_ARGUMENT);
		CHECK_EQ(imgc_job_set_guest_nbytes(job, o.geometry.guest_nbytes + 1),
			 IMGC_INVALID_ARGUMENT);
		CHECK_EQ(imgc_job_set_guest_nbytes(job, guest_nbytes), IMGC_OK);
		CHECK_EQ(imgc_job_start(job, &tail, NULL), IMGC_OK);
		CHECK_EQ(imgc_job_finish(job, NULL), IMGC_OK);
		imgc_job_destroy(job);
	}
	CHECK(memcmp(placements[0], placements[1], n * sizeof(**placements)) == 0);
	CHECK(memcmp(targets[0].bytes, targets[1].bytes, targets[0].nbytes) == 0);
	for (int i = 0; i < 2; i++) {
		free(placements[i]);
		disk_destroy(&targets[i]);
	}
	disk_destroy(&source);
}

/* Each stored block follows its prefix, with any number of threads. */
static void test_stored_prefix(uint64_t block, uint64_t window, uint32_t prefix, uint32_t alignment)
{
	struct disk source = example_disk();
	struct disk targets[3];
	struct imgc_extent row = data_row(0, source.nbytes, 0);
	size_t n = (source.nbytes + block - 1) / block;
	struct imgc_placement *placements = calloc(n, sizeof(*placements));
	static const unsigned threads[3] = {1, 2, 8};

	CHECK(placements);
	for (int i = 0; i < 3; i++) {
		struct imgc_source_file file;

		targets[i] = disk_create(2 * source.nbytes + n * (prefix + (uint64_t)alignment));
		struct imgc_job_options o =
			convert_options(&source, &targets[i], &file, threads[i]);

		o.window_nbytes = window;
		o.geometry.placing = IMGC_PLACE_APPEND;
		o.geometry.block_nbytes = block;
		o.geometry.stored_alignment = alignment;
		o.geometry.stored_prefix_nbytes = prefix;
		o.geometry.stored_prefix_byte = 0xA5;
		o.geometry.group_nblocks = 4;
		o.geometry.group_gap_nbytes = 2560;
		o.next_offset = 1536;
		memset(placements, 0, n * sizeof(*placements));
		uint64_t end = convert(&o, &row, 1, placements, n), next = o.next_offset;
		uint64_t group = UINT64_MAX;

		check_readback(&source, &targets[i], &o.geometry, placements, n);
		for (size_t k = 0; k < n; k++) {
			const struct imgc_placement *p = &placements[k];

			if (p->state != IMGC_BLOCK_STORED)
				continue;
			if (group != UINT64_MAX && group != k / 4)
				next = (next + 511) / 512 * 512 + 2560;
			group = k / 4;
			next = (next + prefix + alignment - 1) / alignment * alignment;
			CHECK_EQ(p->host_offset, next);
			for (uint64_t at = next - prefix; at < next; at++)
				CHECK_EQ(targets[i].bytes[at], 0xA5);
			memset(targets[i].bytes + next - prefix, 0, prefix + p->length);
			next += (p->length + alignment - 1) / alignment * alignment;
		}
		CHECK_EQ(end, (next + 511) / 512 * 512 + 2560);
		/* And nothing was written elsewhere. */
		for (uint64_t at = 0; at < targets[i].nbytes; at++)
			CHECK_EQ(targets[i].bytes[at], 0);
		disk_destroy(&targets[i]);
	}
	free(placements);
	disk_destroy(&source);
}

static void test_stored_prefix_limits(void)
{
	struct disk source = example_disk(), target = disk_create(2 * source.nbytes);
	struct imgc_source_file file;
	struct imgc_job_options good = convert_options(&source, &target, &file, 1);
	struct imgc_job *job;

	good.geometry.placing = IMGC_PLACE_APPEND;
	good.geometry.stored_prefix_nbytes = IMGC_MAX_STORED_PREFIX_NBYTES;
	good.geometry.stored_prefix_byte = 255;
	CHECK_EQ(imgc_job_create(&good, &job, NULL), IMGC_OK);
	imgc_job_destroy(job);
	struct imgc_job_options o = good;
	o.geometry.stored_prefix_nbytes++;
	CHECK_EQ(imgc_job_create(&o, &job, NULL), IMGC_INVALID_ARGUMENT);
	o = good;
	o.geometry.stored_prefix_byte++;
	CHECK_EQ(imgc_job_create(&o, &job, NULL), IMGC_INVALID_ARGUMENT);
	o = good;
	o.geometry.placing = IMGC_PLACE_IDENTITY;
	CHECK_EQ(imgc_job_create(&o, &job, NULL), IMGC_INVALID_ARGUMENT);
	o = good;
	o.geometry.codec.codec = IMGC_CODEC_ZSTD;
	CHECK_EQ(imgc_job_create(&o, &job, NULL), IMGC_INVALID_ARGUMENT);
	disk_destroy(&source);
	disk_destroy(&target);
}

/* --------------------------------------------------------------- comparison */

static uint64_t compare(const struct disk *disk, const struct imgc_extent *a, size_t n_a,
			const struct imgc_extent *b, size_t n_b)
{
	struct imgc_source_file file = {.file = disk->file, .nbytes = disk->nbytes};
	struct imgc_job_options o = {.kind = IMGC_JOB_COMPARE,
				     .n_threads = 2,
				     .window_nbytes = 64 * KIB,
				     .sources = &file,
				     .n_sources = 1};
	struct imgc_batch batch = {.guest_end = 4 * MIB,
				   .extents = a,
				   .n_extents = n_a,
				   .base_extents = b,
				   .n_base_extents = n_b};
	struct imgc_error err = {0};
	struct imgc_job *job;

	use_default_variants(&o);
	CHECK_EQ(imgc_job_create(&o, &job, &err), IMGC_OK);
	CHECK_EQ(run_batch(job, &batch, &err), IMGC_OK);
	uint64_t difference = imgc_job_first_difference(job);

	imgc_job_destroy(job);
	return difference;
}

static void test_compare(void)
{
	struct disk disk = disk_create(12 * MIB);
	struct imgc_extent a = data_row(0, 4 * MIB, 0), b = data_row(0, 4 * MIB, 4 * MIB);
	struct imgc_extent zero = empty_row(0, 4 * MIB, IMGC_ZERO);
	struct imgc_extent zeros = data_row(0, 4 * MIB, 8 * MIB);

	fill_text(disk.bytes, 4 * MIB, 5);
	memcpy(disk.bytes + 4 * MIB, disk.bytes, 4 * MIB);
	CHECK(compare(&disk, &a, 1, &b, 1) == IMGC_NO_DIFFERENCE);
	CHECK(compare(&disk, &zero, 1, &zeros, 1) == IMGC_NO_DIFFERENCE);
	disk.bytes[8 * MIB + 3 * MIB + 77] = 1;
	CHECK_EQ(compare(&disk, &zero, 1, &zeros, 1), 3 * MIB + 77);
	disk.bytes[4 * MIB + 3 * MIB] ^= 1;
	disk.bytes[4 * MIB + 70001] ^= 1;
	CHECK_EQ(compare(&disk, &a, 1, &b, 1), 70001);
	disk_destroy(&disk);
}

/* Whether a byte of [start, end) differs from the other disk, and whether one is data. */
static uint8_t bits_of(const uint8_t *own, const uint8_t *other, uint64_t start, uint64_t end)
{
	uint8_t bits = 0;

	for (uint64_t at = start; at < end; at++) {
		if (own[at] != other[at])
			bits |= IMGC_GRANULE_DIFFERS;
		if (own[at] != 0)
			bits |= IMGC_GRANULE_HAS_DATA;
	}
	return bits;
}

#define PAIR_NBYTES (3u * MIB + 512)

/* Two disks that differ in some sectors; the second half MiB of both is not stored. */
struct pair {
	struct disk own, other;
	struct imgc_extent own_rows[3], other_rows[3];
};

static void pair_create(struct pair *pair)
{
	uint64_t rest = PAIR_NBYTES - MIB;

	pair->own = disk_create(PAIR_NBYTES);
	pair->other = disk_create(PAIR_NBYTES);
	fill_random(pair->other.bytes, 512 * KIB, 1);
	fill_text(pair->other.bytes + MIB, 700 * KIB, 2);
	memcpy(pair->own.bytes, pair->other.bytes, PAIR_NBYTES);
	pair->own.bytes[0] ^= 1;
	pair->own.bytes[3 * 512 - 1] ^= 1;
	memset(pair->own.bytes + 64 * KIB, 0, 64 * KIB);
	memset(pair->own.bytes + MIB + 300 * KIB + 512, 0, 512);
	pair->own.bytes[2 * MIB + 128 * KIB] = 1;
	memset(pair->other.bytes + 2 * MIB + 256 * KIB, 1, 128 * KIB);
	pair->own.bytes[PAIR_NBYTES - 1] = 1;
	for (int side = 0; side < 2; side++) {
		struct imgc_extent *rows = side ? pair->other_rows : pair->own_rows;

		rows[0] = data_row(0, 512 * KIB, 0);
		rows[1] = empty_row(512 * KIB, 512 * KIB, side ? IMGC_ZERO : IMGC_HOLE);
		rows[2] = data_row(MIB, rest, MIB);
		rows[0].file = rows[2].file = (uint32_t)side;
	}
}

static void check_granules(struct pair *pair, uint64_t granule, unsigned n_threads, uint64_t start,
			   uint64_t end)
{
	struct imgc_source_file files[2] = {{.file = pair->own.file, .nbytes = PAIR_NBYTES},
					    {.file = pair->other.file, .nbytes = PAIR_NBYTES}};
	struct imgc_job_options o = {.kind = IMGC_JOB_COMPARE,
				     .n_threads = n_threads,
				     .window_nbytes = 64 * KIB,
				     .sources = files,
				     .n_sources = 2,
				     .granule_nbytes = granule};
	struct imgc_extent own[3], other[3];
	uint64_t first = start / granule, n = (end - 1) / granule - first + 1;
	uint8_t *granules = calloc(n, 1);
	struct imgc_batch batch = {.guest_start = start,
				   .guest_end = end,
				   .extents = own,
				   .n_extents = 3,
				   .base_extents = other,
				   .n_base_extents = 3,
				   .granules = granules,
				   .n_granules = n};
	struct imgc_error err = {0};
	struct imgc_job *job;

	CHECK(granules);
	memcpy(own, pair->own_rows, sizeof(own));
	memcpy(other, pair->other_rows, sizeof(other));
	for (int side = 0; side < 2; side++) {
		struct imgc_extent *rows = side ? other : own;

		rows[0] = data_row(start, 512 * KIB - start, start);
		rows[2] = data_row(MIB, end - MIB, MIB);
		rows[0].file = rows[2].file = (uint32_t)side;
	}
	use_default_variants(&o);
	CHECK_EQ(imgc_job_create(&o, &job, &err), IMGC_OK);
	CHECK_EQ(run_batch(job, &batch, &err), IMGC_OK);
	CHECK(imgc_job_first_difference(job) == IMGC_NO_DIFFERENCE);
	for (uint64_t i = 0; i < n; i++) {
		uint64_t from = (first + i) * granule, to = from + granule;

		from = from < start ? start : from;
		to = to > end ? end : to;
		CHECK_EQ(granules[i], bits_of(pair->own.bytes, pair->other.bytes, from, to));
	}
	batch.n_granules++;
	CHECK_EQ(imgc_job_start(job, &batch, &err), IMGC_INVALID_ARGUMENT);
	batch.n_granules--;
	batch.granules = NULL;
	CHECK_EQ(imgc_job_start(job, &batch, &err), IMGC_INVALID_ARGUMENT);
	imgc_job_destroy(job);
	free(granules);
}

/* Granules smaller and larger than a window, and than the disk; cut by the batch. */
static void test_granules(void)
{
	static const uint64_t sizes[] = {512,	    4096,    64 * KIB,
					 128 * KIB, 2 * MIB, IMGC_MAX_GRANULE_NBYTES};
	struct pair pair;

	pair_create(&pair);
	for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
		for (unsigned n_threads = 1; n_threads <= 4; n_threads += 3) {
			check_granules(&pair, sizes[i], n_threads, 0, PAIR_NBYTES);
			check_granules(&pair, sizes[i], n_threads, 512, 2 * MIB + 129 * KIB);
			check_granules(&pair, sizes[i], n_threads, 70 * KIB, 2 * MIB - 512);
		}
	}
	disk_destroy(&pair.own);
	disk_destroy(&pair.other);
}

/* ------------------------------------------------------------------ failure */

static void test_refused_options(void)
{
	struct disk source = example_disk(), target = disk_create(MIB);
	struct imgc_source_file file;
	struct imgc_job_options o = convert_options(&source, &target, &file, 0);
	struct imgc_error err = {0};
	struct imgc_job *job;

	o.geometry.placing = IMGC_PLACE_APPEND;
	CHECK_EQ(imgc_job_create(&o, &job, &err), IMGC_INVALID_ARGUMENT);
	o.n_threads = IMGC_MAX_THREADS + 1;
	CHECK_EQ(imgc_job_create(&o, &job, &err), IMGC_INVALID_ARGUMENT);
	o.n_threads = 1;
	o.geometry.block_nbytes = 65535;
	CHECK_EQ(imgc_job_create(&o, &job, &err), IMGC_INVALID_ARGUMENT);
	o.geometry.block_nbytes = 64 * KIB;
	o.geometry.group_nblocks = UINT64_C(1) << 48; /* 0 bytes, if the product could wrap */
	CHECK_EQ(imgc_job_create(&o, &job, &err), IMGC_INVALID_ARGUMENT);
	o.geometry.group_nblocks = 0;
	o.granule_nbytes = 4096; /* of a conversion */
	CHECK_EQ(imgc_job_create(&o, &job, &err), IMGC_INVALID_ARGUMENT);
	o.kind = IMGC_JOB_COMPARE;
	o.granule_nbytes = 256;
	CHECK_EQ(imgc_job_create(&o, &job, &err), IMGC_INVALID_ARGUMENT);
	o.granule_nbytes = 3 * 512;
	CHECK_EQ(imgc_job_create(&o, &job, &err), IMGC_INVALID_ARGUMENT);
	o.granule_nbytes = 2 * IMGC_MAX_GRANULE_NBYTES;
	CHECK_EQ(imgc_job_create(&o, &job, &err), IMGC_INVALID_ARGUMENT);
	disk_destroy(&source);
	disk_destroy(&target);
}

static void test_errors(void)
{
	struct disk source = example_disk(), target = disk_create(MIB);
	struct imgc_source_file file;
	struct imgc_job_options o = convert_options(&source, &target, &file, 4);
	size_t n = (source.nbytes + 64 * KIB - 1) / (64 * KIB);
	struct imgc_placement *placements = calloc(n, sizeof(*placements));
	struct imgc_extent row = data_row(0, source.nbytes, 0);
	struct imgc_batch batch = {.guest_end = source.nbytes,
				   .extents = &row,
				   .n_extents = 1,
				   .placements = placements,
				   .n_placements = n};
	struct imgc_error err = {0};
	struct imgc_job *job;

	CHECK(placements);
	/* The target is too small. */
	o.geometry.placing = IMGC_PLACE_APPEND;
	CHECK_EQ(imgc_job_create(&o, &job, &err), IMGC_OK);
	CHECK_EQ(run_batch(job, &batch, &err), IMGC_OUT_OF_RANGE);
	CHECK_EQ(err.source, IMGC_TARGET);
	CHECK_EQ(imgc_job_start(job, &batch, &err), IMGC_CANCELLED);
	imgc_job_destroy(job);

	/* A compressed block that is not one. */
	struct imgc_extent bad[2] = {{0, 64 * KIB, 3 * MIB, 5000, 0, IMGC_ZLIB, 0},
				     empty_row(64 * KIB, source.nbytes - 64 * KIB, IMGC_HOLE)};

	file.block_nbytes = 64 * KIB;
	batch.extents = bad;
	batch.n_extents = 2;
	CHECK_EQ(imgc_job_create(&o, &job, &err), IMGC_OK);
	CHECK_EQ(run_batch(job, &batch, &err), IMGC_CORRUPT);
	CHECK_EQ(err.source, 0);
	CHECK_EQ(err.offset, 3 * MIB);
	imgc_job_destroy(job);
	bad[0].flags = IMGC_EXTENT_GRAIN_MARKER;
	CHECK_EQ(imgc_job_create(&o, &job, &err), IMGC_OK);
	CHECK_EQ(run_batch(job, &batch, &err), IMGC_BAD_GRAIN_MARKER);
	imgc_job_destroy(job);

	/* A batch that breaks the contract. */
	batch.extents = &row;
	batch.n_extents = 1;
	CHECK_EQ(imgc_job_create(&o, &job, &err), IMGC_OK);
	batch.n_placements = n - 1;
	CHECK_EQ(imgc_job_start(job, &batch, &err), IMGC_INVALID_ARGUMENT);
	batch.n_placements = n;
	batch.guest_start = 512;
	CHECK_EQ(imgc_job_start(job, &batch, &err), IMGC_INVALID_ARGUMENT);
	batch.guest_start = 0;
	batch.guest_end -= 512;
	CHECK_EQ(imgc_job_start(job, &batch, &err), IMGC_INVALID_ARGUMENT);
	imgc_job_destroy(job);
	free(placements);
	disk_destroy(&source);
	disk_destroy(&target);
}

/* A block must decompress to its full size, even if only its front is wanted. */
static void test_a_short_block_is_corrupt(void)
{
	struct imgc_codec_params codec = {IMGC_CODEC_ZLIB, IMGC_DEFLATE_LIBDEFLATE, 6, 15};
	struct disk source = disk_create(64 * KIB), target = disk_create(64 * KIB);
	struct imgc_extent rows[2] = {{0, 4096, 0, 0, 0, IMGC_ZLIB, 0},
				      empty_row(4096, 60 * KIB, IMGC_HOLE)};
	struct imgc_compressor *compressor;
	struct imgc_source_file file;
	struct imgc_job_options o = convert_options(&source, &target, &file, 1);
	struct imgc_batch batch = {.guest_end = 64 * KIB, .extents = rows, .n_extents = 2};
	struct imgc_error err = {0};
	struct imgc_job *job;
	uint8_t text[8192 + IMGC_COMPRESS_SLACK_NBYTES];

	o.geometry.placing = IMGC_PLACE_IDENTITY;
	file.block_nbytes = 8192;
	fill_text(text, sizeof(text), 1);
	CHECK_EQ(imgc_compressor_create(&codec, &compressor), IMGC_OK);
	for (size_t nbytes = 4096; nbytes <= 8192; nbytes += 4096) {
		size_t stored = 0;

		CHECK_EQ(imgc_compress(compressor, text, nbytes, source.bytes, 8192, &stored),
			 IMGC_OK);
		rows[0].host_length = stored;
		CHECK_EQ(imgc_job_create(&o, &job, &err), IMGC_OK);
		CHECK_EQ(run_batch(job, &batch, &err), nbytes == 8192 ? IMGC_OK : IMGC_CORRUPT);
		imgc_job_destroy(job);
	}
	CHECK(memcmp(target.bytes, text, 4096) == 0);
	imgc_compressor_destroy(compressor);
	disk_destroy(&source);
	disk_destroy(&target);
}

static void test_cancel(void)
{
	struct imgc_codec_params slow = {IMGC_CODEC_DEFLATE, IMGC_DEFLATE_LIBDEFLATE, 12, 15};
	struct disk source = disk_create(16 * MIB), target = disk_create(32 * MIB);
	struct imgc_source_file file;
	struct imgc_job_options o = convert_options(&source, &target, &file, 3);
	static struct imgc_placement placements[256];
	struct imgc_extent row = data_row(0, source.nbytes, 0);
	struct imgc_batch batch = {.guest_end = source.nbytes,
				   .extents = &row,
				   .n_extents = 1,
				   .placements = placements,
				   .n_placements = 256};
	struct imgc_progress before, after;
	struct imgc_error err = {0};
	struct imgc_job *job;

	fill_text(source.bytes, source.nbytes, 6);
	o.geometry.placing = IMGC_PLACE_APPEND;
	o.geometry.codec = slow;
	o.geometry.store_incompressible = 1;
	CHECK_EQ(imgc_job_create(&o, &job, &err), IMGC_OK);
	CHECK_EQ(imgc_job_start(job, &batch, &err), IMGC_OK);
	imgc_job_wait(job, 5);
	imgc_job_progress(job, &before);
	imgc_job_cancel(job);
	imgc_job_cancel(job);
	CHECK_EQ(imgc_job_finish(job, &err), IMGC_CANCELLED);
	imgc_job_progress(job, &after);
	CHECK(after.bytes_done >= before.bytes_done && after.bytes_done < source.nbytes);
	imgc_job_destroy(job);

	/* Destroyed while a batch runs. */
	CHECK_EQ(imgc_job_create(&o, &job, &err), IMGC_OK);
	CHECK_EQ(imgc_job_start(job, &batch, &err), IMGC_OK);
	imgc_job_destroy(job);
	imgc_job_destroy(NULL);
	disk_destroy(&source);
	disk_destroy(&target);
}

static unsigned n_tasks(void)
{
	DIR *folder = opendir("/proc/self/task");
	unsigned n = 0;

	CHECK(folder != NULL);
	for (struct dirent *entry = readdir(folder); entry; entry = readdir(folder))
		n += entry->d_name[0] != '.';
	closedir(folder);
	return n;
}

/* One worker needs no thread; the caller's waits are short, and each goes on. */
static void test_the_calling_thread(void)
{
	struct disk source = disk_create(4 * MIB), target = disk_create(4 * MIB);
	struct imgc_source_file file;
	struct imgc_job_options o = convert_options(&source, &target, &file, 1);
	struct imgc_extent row = data_row(0, source.nbytes, 0);
	struct imgc_batch batch = {.guest_end = source.nbytes, .extents = &row, .n_extents = 1};
	struct imgc_progress before, after;
	struct imgc_error err = {0};
	struct imgc_job *job;
	unsigned n_before = n_tasks(), n_waits = 0;

	fill_text(source.bytes, source.nbytes, 8);
	o.geometry.placing = IMGC_PLACE_IDENTITY;
	for (int by_finish = 0; by_finish <= 1; by_finish++) {
		memset(target.bytes, 0, target.nbytes);
		CHECK_EQ(imgc_job_create(&o, &job, &err), IMGC_OK);
		CHECK_EQ(imgc_job_start(job, &batch, &err), IMGC_OK);
		CHECK_EQ(n_tasks(), n_before);
		imgc_job_progress(job, &before);
		CHECK_EQ(before.bytes_done, 0);
		while (!by_finish && !imgc_job_wait(job, 0)) {
			imgc_job_progress(job, &after);
			CHECK(after.bytes_done >= before.bytes_done);
			before = after;
			n_waits++;
		}
		CHECK_EQ(imgc_job_finish(job, &err), IMGC_OK);
		imgc_job_progress(job, &after);
		CHECK_EQ(after.bytes_done, source.nbytes);
		CHECK(memcmp(source.bytes, target.bytes, source.nbytes) == 0);
		imgc_job_destroy(job);
	}
	CHECK(n_waits >= source.nbytes / o.window_nbytes - 1);

	/* Cancelled in the middle, and destroyed before it began. */
	CHECK_EQ(imgc_job_create(&o, &job, &err), IMGC_OK);
	CHECK_EQ(imgc_job_start(job, &batch, &err), IMGC_OK);
	CHECK_EQ(imgc_job_wait(job, 0), 0);
	imgc_job_cancel(job);
	CHECK_EQ(imgc_job_finish(job, &err), IMGC_CANCELLED);
	imgc_job_progress(job, &after);
	CHECK(after.bytes_done < source.nbytes);
	imgc_job_destroy(job);
	CHECK_EQ(imgc_job_create(&o, &job, &err), IMGC_OK);
	CHECK_EQ(imgc_job_start(job, &batch, &err), IMGC_OK);
	imgc_job_destroy(job);
	disk_destroy(&source);
	disk_destroy(&target);
}

int main(void)
{
	struct imgc_codec_params none = {0};
	struct imgc_codec_params deflate = {IMGC_CODEC_DEFLATE, IMGC_DEFLATE_ISAL, 1, 12};
	struct imgc_codec_params zlib = {IMGC_CODEC_ZLIB, IMGC_DEFLATE_LIBDEFLATE, 6, 15};
	struct imgc_codec_params zstd = {.codec = IMGC_CODEC_ZSTD, .level = 1};

	test_extents_check();
	test_extents_last_sector();
	test_identity(1);
	test_identity(4);
	test_append(none, 64 * KIB, 256 * KIB, 0);
	test_append(none, 512, 64 * KIB, 0);
	test_append(none, 2 * MIB, 256 * KIB, 0); /* blocks larger than windows */
	test_append(deflate, 64 * KIB, 256 * KIB, 1);
	test_append(deflate, 4 * KIB, 64 * KIB, 1);
	test_append(zstd, MIB, 64 * KIB, 1);
	test_append(zlib, 64 * KIB, 256 * KIB, 0);
	test_late_end(none);
	test_late_end(zstd);
	test_stored_prefix(64 * KIB, 256 * KIB, 512, 512);
	test_stored_prefix(512 * KIB, 512 * KIB, 512, 4096);
	test_stored_prefix(2 * MIB, 256 * KIB, 512, 512); /* blocks larger than windows */
	test_stored_prefix(2 * MIB, 4 * MIB, 1000, 2 * MIB);
	test_stored_prefix(512, 64 * KIB, 7, 1);
	test_stored_prefix_limits();
	test_compare();
	test_granules();
	test_refused_options();
	test_errors();
	test_a_short_block_is_corrupt();
	test_cancel();
	test_the_calling_thread();
	return 0;
}
