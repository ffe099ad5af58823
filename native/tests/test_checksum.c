/*
 * test_checksum.c - the checksum of a disk, and the leaves that jobs make
 */
#include <errno.h>

#include "common/error.h"
#include "io/io.h"
#include "tests/engine_util.h"

#define BLOCK IMGC_CHECKSUM_BLOCK_NBYTES
#define LEAF IMGC_CHECKSUM_NBYTES

static struct imgc_hasher *hasher_create(uint32_t checksum, uint64_t block_nbytes)
{
	struct imgc_hasher *hasher;

	CHECK_EQ(imgc_hasher_create(checksum, block_nbytes, 0, &hasher), IMGC_OK);
	return hasher;
}

static void check_digest(struct imgc_hasher *hasher, const char *expected)
{
	uint8_t digest[LEAF];
	char text[2 * LEAF + 1];

	CHECK_EQ(imgc_hasher_digest(hasher, digest), IMGC_OK);
	for (size_t i = 0; i < LEAF; i++)
		snprintf(text + 2 * i, 3, "%02x", digest[i]);
	CHECK(strcmp(text, expected) == 0);
}

/* ------------------------------------------------------------------ hasher */

struct vector {
	uint64_t n_before, n_zeros, n_after; /* bytes "A", zeros, bytes "B" */
	const char *sha256, *blake3;
};

/*
 * SHA-256: those that blksum and nbdcopy print.  BLAKE3: by the definition, with the
 * hashes of the reference implementation.
 */
static const struct vector vectors[] = {
	{0, 0, 0, "af5570f5a1810b7af78caf4bc70a660f0df51e42baf91d4de5b2328de0e83dfc",
	 "71e0a99173564931c0b8acc52d2685a8e39c64dc52e3d02390fdac2a12b155cb"},
	{1, 0, 0, "60fb4e2bdf7dfc32f8230836f7453a77e665e4a1d3cc117944e0296d40b7800c",
	 "e545980b0c7bf3de8127683bbf1d7eeeacd0c4c9a08246d9a4635b5cf2e186aa"},
	{0, BLOCK, 0, "8ab067ab7939a3d4f40cbb118956c07c06aeae2d075d6e0a2ebbb94bd42832af",
	 "4e3224cc37d31ec9900a2a0fd7c63de16804c12c4a81e2bd0b6443d139df976f"},
	{0, BLOCK + 1, 0, "43702a4ffbe4bdb5c0cf900dd2a899fdd2536b78559f8b55cf0ed7fe1e8195b5",
	 "bdf825590125efe97d176cd7862f2fa96877cc1a3119775d4c58993aa8c5ffcf"},
	{0, MIB, 0, "3dd455346755274ce76f1c555df5e05c1cdd8da4b1c70ab7c2a6b09f51bb5ce0",
	 "d03e86e18cee8417648bc1d04244f720b027fadde75bb523597dde510e486333"},
	{BLOCK, BLOCK, BLOCK / 2,
	 "c36703dbf20c51247b8af34524a6aa4218450b3db44c9a08bddfce190e28ce93",
	 "0293775d9e5e77821520a1bfaca2317bb05b12b340a67688e3ae22f2f5111206"},
};

/* The content as bytes, `step` at a time, or with its zeros as a length. */
static void check_vector(uint32_t checksum, const struct vector *v, size_t step)
{
	const char *expected = checksum == IMGC_CHECKSUM_SHA256 ? v->sha256 : v->blake3;
	uint64_t nbytes = v->n_before + v->n_zeros + v->n_after;
	struct imgc_hasher *hasher = hasher_create(checksum, BLOCK);
	uint8_t *bytes = calloc(1, nbytes + 1);

	CHECK(bytes);
	memset(bytes, 'A', v->n_before);
	memset(bytes + v->n_before + v->n_zeros, 'B', v->n_after);
	if (step == 0) {
		CHECK_EQ(imgc_hasher_update(hasher, bytes, v->n_before), IMGC_OK);
		CHECK_EQ(imgc_hasher_zeros(hasher, v->n_zeros), IMGC_OK);
		CHECK_EQ(imgc_hasher_update(hasher, bytes + v->n_before + v->n_zeros, v->n_after),
			 IMGC_OK);
	}
	for (uint64_t at = 0; step > 0 && at < nbytes; at += step) {
		size_t n = step < nbytes - at ? step : (size_t)(nbytes - at);

		CHECK_EQ(imgc_hasher_update(hasher, bytes + at, n), IMGC_OK);
	}
	check_digest(hasher, expected);
	free(bytes);
	imgc_hasher_destroy(hasher);
}

static void test_vectors(uint32_t checksum)
{
	static const size_t steps[] = {0, 1000, BLOCK, 3 * BLOCK + 7, 4 * MIB};

	for (size_t i = 0; i < sizeof(vectors) / sizeof(vectors[0]); i++)
		for (size_t k = 0; k < sizeof(steps) / sizeof(steps[0]); k++)
			check_vector(checksum, &vectors[i], steps[k]);
}

static void test_limits(void)
{
	struct imgc_hasher *hasher = NULL;
	uint8_t leaf[LEAF];

	CHECK_EQ(imgc_hasher_create(IMGC_CHECKSUM_SHA256, 256, 0, &hasher), IMGC_INVALID_ARGUMENT);
	CHECK_EQ(imgc_hasher_create(IMGC_CHECKSUM_SHA256, 768, 0, &hasher), IMGC_INVALID_ARGUMENT);
	CHECK_EQ(imgc_hasher_create(IMGC_CHECKSUM_SHA256, 32 * MIB, 0, &hasher),
		 IMGC_INVALID_ARGUMENT);
	CHECK_EQ(imgc_hasher_create(IMGC_CHECKSUM_NONE, BLOCK, 0, &hasher), IMGC_UNSUPPORTED);
	CHECK_EQ(imgc_hasher_create(IMGC_N_CHECKSUMS, BLOCK, 0, &hasher), IMGC_UNSUPPORTED);
	CHECK(!hasher);
	imgc_hasher_destroy(NULL);
	CHECK(!imgc_checksum_name(IMGC_CHECKSUM_NONE) && !imgc_checksum_name(IMGC_N_CHECKSUMS));
	CHECK(!imgc_checksum_is_built(IMGC_CHECKSUM_NONE));
	CHECK(!imgc_checksum_is_built(IMGC_N_CHECKSUMS));

	/* Too long a disk: nothing is added. */
	hasher = hasher_create(IMGC_CHECKSUM_SHA256, BLOCK);
	CHECK_EQ(imgc_hasher_update(hasher, "A", 1), IMGC_OK);
	CHECK_EQ(imgc_hasher_zeros(hasher, INT64_MAX), IMGC_INVALID_ARGUMENT);
	CHECK_EQ(imgc_hasher_zeros(hasher, UINT64_MAX), IMGC_INVALID_ARGUMENT);
	CHECK_EQ(imgc_hasher_leaf(hasher, "A", 1, leaf), IMGC_OK);
	CHECK_EQ(imgc_hasher_leaves(hasher, leaf, BLOCK), IMGC_INVALID_ARGUMENT); /* in a block */
	check_digest(hasher, vectors[1].sha256);
	imgc_hasher_destroy(hasher);

	/* The leaf of a short block ends the disk. */
	hasher = hasher_create(IMGC_CHECKSUM_SHA256, BLOCK);
	CHECK_EQ(imgc_hasher_leaves(hasher, leaf, 1), IMGC_OK);
	check_digest(hasher, vectors[1].sha256);
	CHECK_EQ(imgc_hasher_update(hasher, "A", 1), IMGC_INVALID_ARGUMENT);
	CHECK_EQ(imgc_hasher_zeros(hasher, 1), IMGC_INVALID_ARGUMENT);
	CHECK_EQ(imgc_hasher_leaves(hasher, leaf, 1), IMGC_INVALID_ARGUMENT);
	CHECK_EQ(imgc_hasher_zeros(hasher, 0), IMGC_OK);
	check_digest(hasher, vectors[1].sha256);
	imgc_hasher_destroy(hasher);
}

/* -------------------------------------------------------------------- jobs */

/* Leaves as they are defined; also of blocks of zeros, which are hashed here. */
static uint8_t *leaves_of(uint32_t checksum, const struct disk *disk, size_t *n)
{
	struct imgc_hasher *hasher = hasher_create(checksum, BLOCK);

	*n = (size_t)((disk->nbytes + BLOCK - 1) / BLOCK);
	uint8_t *leaves = malloc(*n * LEAF);

	CHECK(leaves);
	for (size_t i = 0; i < *n; i++) {
		uint64_t rest = disk->nbytes - i * BLOCK;

		CHECK_EQ(imgc_hasher_leaf(hasher, disk->bytes + i * BLOCK,
					  rest < BLOCK ? rest : BLOCK, leaves + i * LEAF),
			 IMGC_OK);
	}
	imgc_hasher_destroy(hasher);
	return leaves;
}

/* Runs the job over the whole disk, which reads as `disk`, and checks the leaves. */
static struct imgc_progress check_leaves(const struct imgc_job_options *options,
					 struct imgc_batch *batch, const struct disk *disk)
{
	struct imgc_error err = {0};
	struct imgc_progress progress;
	struct imgc_job *job;
	size_t n;
	uint8_t *expected = leaves_of(options->checksum, disk, &n), *leaves = malloc(n * LEAF);

	CHECK(leaves);
	memset(leaves, 0xee, n * LEAF);
	batch->guest_end = disk->nbytes;
	batch->leaves = leaves;
	batch->n_leaves = n;
	CHECK_EQ(imgc_job_create(options, &job, &err), IMGC_OK);
	CHECK_EQ(run_batch(job, batch, &err), IMGC_OK);
	imgc_job_progress(job, &progress);
	imgc_job_destroy(job);
	for (size_t i = 0; i < n; i++)
		CHECK(memcmp(leaves + i * LEAF, expected + i * LEAF, LEAF) == 0);
	free(leaves);
	free(expected);
	return progress;
}

/* Data, holes and zeros that start and end within blocks; a short last block. */
static struct disk checksum_disk(uint64_t last_nbytes)
{
	struct disk disk = disk_create(40 * BLOCK + last_nbytes);

	fill_random(disk.bytes, 20 * BLOCK, 1);
	memset(disk.bytes + 3 * BLOCK, 0, 2 * BLOCK);
	memset(disk.bytes + 6 * BLOCK + 8192, 0, BLOCK - 8192);
	disk.bytes[41 * BLOCK - BLOCK - 1] = 1;
	return disk;
}

#define MAX_ROWS 5

static size_t checksum_rows(const struct disk *disk, struct imgc_extent *rows)
{
	uint64_t at[] = {0, 3 * BLOCK, 4 * BLOCK, 6 * BLOCK + 8192, 7 * BLOCK, disk->nbytes};

	for (size_t i = 0; i < MAX_ROWS; i++)
		rows[i] =
			i % 2 ? empty_row(at[i], at[i + 1] - at[i], i == 1 ? IMGC_HOLE : IMGC_ZERO)
			      : data_row(at[i], at[i + 1] - at[i], at[i]);
	return MAX_ROWS;
}

static void test_digest_job(uint32_t checksum, unsigned n_threads)
{
	static const uint64_t last[] = {0, 1, 512, BLOCK - 1}, windows[] = {4096, BLOCK, MIB};

	for (size_t i = 0; i < 4 * 3; i++) {
		struct disk disk = checksum_disk(last[i % 4]);
		struct imgc_extent rows[MAX_ROWS];
		struct imgc_batch batch = {.extents = rows,
					   .n_extents = checksum_rows(&disk, rows)};
		struct imgc_source_file file = {.file = disk.file, .nbytes = disk.nbytes};
		struct imgc_job_options o = {.kind = IMGC_JOB_DIGEST,
					     .n_threads = n_threads,
					     .window_nbytes = windows[i % 3],
					     .sources = &file,
					     .n_sources = 1,
					     .checksum = checksum};

		use_default_variants(&o);
		struct imgc_progress progress = check_leaves(&o, &batch, &disk);

		/* Whole blocks of data count as such, and no other. */
		CHECK_EQ(progress.bytes_done, disk.nbytes);
		CHECK_EQ(progress.bytes_data + progress.bytes_zero, disk.nbytes);
		CHECK_EQ(progress.bytes_data, 19 * BLOCK);
		disk_destroy(&disk);
	}
}

/* All of the disk without data: in spans, and in windows where zeros are stored. */
static void test_empty_disk(unsigned n_threads)
{
	for (unsigned policy = IMGC_ZERO_SKIP; policy <= IMGC_ZERO_STORE; policy++) {
		struct disk disk = disk_create(40 * BLOCK + 1536),
			    target = disk_create(disk.nbytes);
		struct imgc_extent row = empty_row(0, disk.nbytes, IMGC_HOLE);
		struct imgc_batch batch = {.extents = &row, .n_extents = 1};
		struct imgc_source_file file;
		struct imgc_job_options o = convert_options(&disk, &target, &file, n_threads);

		o.geometry.placing = IMGC_PLACE_IDENTITY;
		o.geometry.zero_policy = policy;
		o.checksum = IMGC_CHECKSUM_SHA256;
		check_leaves(&o, &batch, &disk);
		disk_destroy(&disk);
		disk_destroy(&target);
	}
}

static void convert_with_leaves(const struct imgc_job_options *o, const struct disk *disk,
				struct imgc_extent *rows, size_t n_rows)
{
	size_t n = (size_t)(disk->nbytes / o->geometry.block_nbytes + 1);
	struct imgc_placement *placements = calloc(n, sizeof(*placements));
	struct imgc_batch batch = {.extents = rows, .n_extents = n_rows};

	CHECK(placements);
	if (o->geometry.placing == IMGC_PLACE_APPEND) {
		batch.placements = placements;
		batch.n_placements =
			(disk->nbytes + o->geometry.block_nbytes - 1) / o->geometry.block_nbytes;
	}
	check_leaves(o, &batch, disk);
	free(placements);
}

/* The target is the same, and so is the number of bytes in it. */
static void test_conversions(uint32_t checksum, unsigned n_threads)
{
	static const uint64_t blocks[] = {4096, 64 * KIB, 2 * MIB, 64 * MIB};

	for (size_t i = 0; i < 4 * 2; i++) {
		uint64_t block = blocks[i / 2];
		struct disk disk = checksum_disk(777 * 512 - 4 * BLOCK), target;
		struct disk plain = disk_create(disk.nbytes + block + MIB);
		struct imgc_extent rows[MAX_ROWS];
		size_t n_rows = checksum_rows(&disk, rows);
		struct imgc_source_file file;

		target = disk_create(plain.nbytes);
		struct imgc_job_options o = convert_options(&disk, &target, &file, n_threads);

		o.geometry.placing = IMGC_PLACE_APPEND;
		o.geometry.block_nbytes = block;
		o.geometry.stored_alignment = 512;
		if (i % 2 && block <= 2 * MIB)
			o.geometry.codec = (struct imgc_codec_params){
				.codec = IMGC_CODEC_ZLIB, .level = 1, .window_bits = 15};
		else if (i % 2)
			o.geometry.placing = IMGC_PLACE_IDENTITY;
		o.checksum = checksum;
		convert_with_leaves(&o, &disk, rows, n_rows);

		o.checksum = IMGC_CHECKSUM_NONE;
		o.target = plain.file;
		size_t n = (size_t)((disk.nbytes + block - 1) / block);
		struct imgc_placement *placements = calloc(n, sizeof(*placements));

		CHECK(placements);
		convert(&o, rows, n_rows, placements, n);
		CHECK(memcmp(plain.bytes, target.bytes, target.nbytes) == 0);
		free(placements);
		disk_destroy(&disk);
		disk_destroy(&plain);
		disk_destroy(&target);
	}
}

/* A broken block that is only taken over breaks the checksum: it must be decompressed. */
static void test_trusted_blocks_are_read(void)
{
	static const struct imgc_codec_params zstd = {.codec = IMGC_CODEC_ZSTD, .level = 1};
	struct disk plain = disk_create(4 * BLOCK), target = disk_create(8 * BLOCK);
	struct disk packed = disk_create(8 * BLOCK);
	struct imgc_placement placements[4] = {0};
	struct imgc_source_file file;
	struct imgc_job_options o = convert_options(&plain, &packed, &file, 1);
	struct imgc_extent row = data_row(0, plain.nbytes, 0);

	fill_text(plain.bytes, plain.nbytes, 4);
	o.geometry.placing = IMGC_PLACE_APPEND;
	o.geometry.codec = zstd;
	convert(&o, &row, 1, placements, 4);
	struct imgc_extent *rows = placed_rows(plain.nbytes, &o.geometry, placements, 4);

	o = convert_options(&packed, &target, &file, 2);
	file.block_nbytes = BLOCK;
	o.geometry.guest_nbytes = plain.nbytes;
	o.geometry.placing = IMGC_PLACE_APPEND;
	o.geometry.codec = zstd;
	o.geometry.reuse = IMGC_REUSE;
	o.trust_blocks = 1;
	o.checksum = IMGC_CHECKSUM_SHA256;
	struct imgc_placement again[4] = {0};
	struct imgc_batch batch = {
		.extents = rows, .n_extents = 4, .placements = again, .n_placements = 4};
	struct imgc_progress progress = check_leaves(&o, &batch, &plain);

	CHECK_EQ(progress.bytes_reused, plain.nbytes);
	CHECK_EQ(progress.bytes_trusted, 0);
	CHECK(memcmp(packed.bytes, target.bytes, packed.nbytes) == 0);
	free(rows);
	disk_destroy(&plain);
	disk_destroy(&packed);
	disk_destroy(&target);
}

/* Reflinks without a copy, as the file system makes them. */
static bool reflink(struct imgc_file *file, uint64_t offset, struct imgc_file *source,
		    uint64_t source_offset, uint64_t length)
{
	struct iovec iov = {malloc(length), length};
	struct imgc_io_request request = {source_offset, iov.iov_base, length};
	bool done = imgc_file_read(source, NULL, &request, 1, NULL) == IMGC_OK &&
		    imgc_file_write(file, &iov, 1, offset, NULL) == IMGC_OK;

	free(iov.iov_base);
	return done;
}

/* Unread rows are read, and reflinked all the same, small ones as well. */
static void test_unread_rows_are_read(unsigned n_threads)
{
	struct disk disk = disk_create(8 * MIB), target = disk_create(8 * MIB);
	struct imgc_file_ops ops = *disk.file->ops;
	struct imgc_extent rows[] = {data_row(0, 5 * MIB, 0), data_row(5 * MIB, 4096, 5 * MIB),
				     empty_row(5 * MIB + 4096, 60 * KIB, IMGC_HOLE),
				     data_row(5 * MIB + BLOCK, 3 * MIB - BLOCK, 5 * MIB + BLOCK)};
	struct imgc_source_file file;
	struct imgc_job_options o = convert_options(&disk, &target, &file, n_threads);
	struct imgc_batch batch = {.extents = rows, .n_extents = 4};

	fill_random(disk.bytes, 5 * MIB + 4096, 2);
	fill_random(disk.bytes + 5 * MIB + BLOCK, 3 * MIB - BLOCK, 3);
	rows[0].flags = rows[1].flags = rows[3].flags = IMGC_EXTENT_UNREAD;
	ops.reflink = reflink;
	disk.file->ops = target.file->ops = &ops;
	disk.file->reflink_block_nbytes = target.file->reflink_block_nbytes = 4096;
	o.geometry.placing = IMGC_PLACE_IDENTITY;
	o.reflink = 1;
	o.checksum = IMGC_CHECKSUM_SHA256;
	struct imgc_progress progress = check_leaves(&o, &batch, &disk);

	CHECK_EQ(progress.bytes_read, 8 * MIB - 60 * KIB);
	CHECK_EQ(progress.bytes_reflinked, 8 * MIB - 60 * KIB);
	CHECK(memcmp(disk.bytes, target.bytes, disk.nbytes) == 0);
	disk_destroy(&disk);
	disk_destroy(&target);
}

/* Leaves are of the content, also of blocks that the target leaves to its base. */
static void test_base(unsigned n_threads)
{
	struct disk disk = checksum_disk(512), target = disk_create(2 * disk.nbytes);
	struct imgc_placement placements[41] = {0};
	struct imgc_extent rows[MAX_ROWS], base = data_row(0, disk.nbytes, 0);
	struct imgc_batch batch = {.extents = rows,
				   .n_extents = checksum_rows(&disk, rows),
				   .base_extents = &base,
				   .n_base_extents = 1,
				   .placements = placements,
				   .n_placements = 41};
	struct imgc_source_file file;
	struct imgc_job_options o = convert_options(&disk, &target, &file, n_threads);

	o.geometry.placing = IMGC_PLACE_APPEND;
	o.has_base = 1;
	o.checksum = IMGC_CHECKSUM_SHA256;
	check_leaves(&o, &batch, &disk);
	for (size_t i = 0; i < 41; i++)
		CHECK_EQ(placements[i].state, IMGC_BLOCK_ABSENT);
	disk_destroy(&disk);
	disk_destroy(&target);
}

static int read_but_one(struct imgc_file *file, struct imgc_io_context *ctx,
			const struct imgc_io_request *requests, size_t n, struct imgc_error *err)
{
	(void)file, (void)ctx;
	for (size_t i = 0; i < n; i++) {
		if (requests[i].offset <= 9 * BLOCK &&
		    requests[i].offset + requests[i].length > 9 * BLOCK)
			return imgc_fail_system(err, EIO, requests[i].offset, "pread");
		memset(requests[i].buffer, 0x55, requests[i].length);
	}
	return IMGC_OK;
}

/* What is lost is zeros in the leaves, as in the target. */
static void test_salvage(unsigned n_threads)
{
	struct disk disk = disk_create(20 * BLOCK), target = disk_create(disk.nbytes);
	struct imgc_file_ops ops = *disk.file->ops;
	struct imgc_extent row = data_row(0, disk.nbytes, 0);
	struct imgc_batch batch = {.extents = &row, .n_extents = 1};
	struct imgc_source_file file;
	struct imgc_job_options o = convert_options(&disk, &target, &file, n_threads);

	memset(disk.bytes, 0x55, disk.nbytes);
	memset(disk.bytes + 9 * BLOCK, 0, 4096);
	ops.read = read_but_one;
	disk.file->ops = &ops;
	o.geometry.placing = IMGC_PLACE_IDENTITY;
	o.salvage = 1;
	o.checksum = IMGC_CHECKSUM_SHA256;
	check_leaves(&o, &batch, &disk);
	CHECK(memcmp(disk.bytes, target.bytes, disk.nbytes) == 0);
	disk_destroy(&disk);
	disk_destroy(&target);
}

/* ------------------------------------------------------------------ refused */

static void check_refused(const struct imgc_job_options *o, const char *op)
{
	struct imgc_error err = {0};
	struct imgc_job *job = NULL;

	CHECK_EQ(imgc_job_create(o, &job, &err), IMGC_INVALID_ARGUMENT);
	CHECK(strcmp(err.op, op) == 0);
}

static void check_batch_refused(struct imgc_job *job, struct imgc_batch batch, const char *op)
{
	struct imgc_error err = {0};

	CHECK_EQ(imgc_job_start(job, &batch, &err), IMGC_INVALID_ARGUMENT);
	CHECK(strcmp(err.op, op) == 0);
}

static void test_refused(void)
{
	struct disk disk = disk_create(4 * BLOCK), target = disk_create(disk.nbytes);
	struct imgc_source_file file;
	struct imgc_job_options o = convert_options(&disk, &target, &file, 1);
	struct imgc_error err = {0};
	struct imgc_job *job = NULL;

	o.kind = IMGC_JOB_DIGEST;
	check_refused(&o, "checksum");
	o.checksum = IMGC_CHECKSUM_SHA256;
	o.kind = IMGC_JOB_COMPARE;
	check_refused(&o, "checksum");
	o.kind = IMGC_JOB_DIGEST + 1;
	check_refused(&o, "kind");
	o.kind = IMGC_JOB_DIGEST;
	o.checksum = IMGC_N_CHECKSUMS;
	CHECK_EQ(imgc_job_create(&o, &job, &err), IMGC_UNSUPPORTED);

	o.checksum = IMGC_CHECKSUM_SHA256;
	CHECK_EQ(imgc_job_create(&o, &job, &err), IMGC_OK);
	uint8_t leaves[4 * LEAF];
	struct imgc_extent row = data_row(0, disk.nbytes, 0);
	struct imgc_batch batch = {.guest_end = disk.nbytes, .extents = &row, .n_extents = 1};

	check_batch_refused(job, batch, "leaves");
	batch.leaves = leaves;
	batch.n_leaves = 3;
	check_batch_refused(job, batch, "leaves");
	batch.n_leaves = 4;
	batch.base_extents = &row;
	batch.n_base_extents = 1;
	check_batch_refused(job, batch, "batch");
	batch.base_extents = NULL;
	batch.guest_start = 512; /* within a block */
	row = data_row(512, disk.nbytes - 512, 512);
	check_batch_refused(job, batch, "leaves");
	imgc_job_destroy(job);

	/* A job without a checksum has no leaves. */
	o = convert_options(&disk, &target, &file, 1);
	o.geometry.placing = IMGC_PLACE_IDENTITY;
	CHECK_EQ(imgc_job_create(&o, &job, &err), IMGC_OK);
	batch.guest_start = 0;
	row = data_row(0, disk.nbytes, 0);
	check_batch_refused(job, batch, "leaves");
	imgc_job_destroy(job);
	disk_destroy(&disk);
	disk_destroy(&target);
}

/* The check value of CRC-32C (RFC 3720 has others), in a leaf of 32 bytes. */
static void test_crc32c_leaf(void)
{
	static const uint8_t expected[LEAF] = {0x83, 0x92, 0x06, 0xe3};
	struct imgc_hasher *hasher = hasher_create(IMGC_CHECKSUM_CRC32C, BLOCK);
	uint8_t leaf[LEAF];

	CHECK_EQ(imgc_hasher_leaf(hasher, "123456789", 9, leaf), IMGC_OK);
	CHECK(memcmp(leaf, expected, LEAF) == 0);
	imgc_hasher_destroy(hasher);
}

int main(void)
{
	test_limits();
	for (uint32_t checksum = IMGC_CHECKSUM_SHA256; checksum < IMGC_N_CHECKSUMS; checksum++) {
		bool is_built = imgc_checksum_is_built(checksum);

		printf("  %s%s\n", imgc_checksum_name(checksum), is_built ? "" : ": not built");
		if (!is_built)
			continue;
		if (checksum == IMGC_CHECKSUM_CRC32C)
			test_crc32c_leaf();
		else
			test_vectors(checksum);
		for (unsigned n_threads = 1; n_threads <= 4; n_threads *= 2) {
			test_digest_job(checksum, n_threads);
			test_conversions(checksum, n_threads);
		}
	}
	for (unsigned n_threads = 1; n_threads <= 4; n_threads *= 2) {
		test_empty_disk(n_threads);
		test_unread_rows_are_read(n_threads);
		test_base(n_threads);
		test_salvage(n_threads);
	}
	test_trusted_blocks_are_read();
	test_refused();
	return 0;
}
