/*
 * engine_util.h - disks in memory, rows and jobs for the tests of the engine
 */
#ifndef IMGC_ENGINE_UTIL_H
#define IMGC_ENGINE_UTIL_H

#include <stdbool.h>

#include "tests/test_util.h"

#define KIB 1024u
#define MIB (1024u * 1024)

static inline struct imgc_extent data_row(uint64_t guest, uint64_t length, uint64_t host)
{
	return (struct imgc_extent){guest, length, host, length, 0, IMGC_DATA, 0};
}

static inline struct imgc_extent empty_row(uint64_t guest, uint64_t length, uint16_t kind)
{
	return (struct imgc_extent){.guest_offset = guest, .length = length, .kind = kind};
}

struct disk {
	uint8_t *bytes;
	uint64_t nbytes;
	struct imgc_file *file;
};

static inline struct disk disk_create(uint64_t nbytes)
{
	struct disk disk = {calloc(1, nbytes), nbytes, NULL};

	CHECK(disk.bytes);
	CHECK_EQ(imgc_file_open_memory(disk.bytes, nbytes, &disk.file), IMGC_OK);
	return disk;
}

static inline void disk_destroy(struct disk *disk)
{
	imgc_file_close(disk->file);
	free(disk->bytes);
}

/* Text, zeros and incompressible bytes, with an odd end. */
static inline struct disk example_disk(void)
{
	struct disk disk = disk_create(5 * MIB + 3 * 512);

	fill_text(disk.bytes, 2 * MIB, 1);
	fill_random(disk.bytes + 3 * MIB, MIB, 2);
	fill_text(disk.bytes + 5 * MIB - 100, 700, 3);
	disk.bytes[2 * MIB + 300 * KIB] = 1;
	return disk;
}

static inline struct imgc_job_options convert_options(const struct disk *source,
						      struct disk *target,
						      struct imgc_source_file *file,
						      unsigned n_threads)
{
	*file = (struct imgc_source_file){.file = source->file, .nbytes = source->nbytes};
	struct imgc_job_options options = {
		.kind = IMGC_JOB_CONVERT,
		.n_threads = n_threads,
		.window_nbytes = 256 * KIB,
		.sources = file,
		.n_sources = 1,
		.target = target->file,
		.geometry = {.block_nbytes = 64 * KIB,
			     .stored_alignment = 64 * KIB,
			     .compressed_alignment = 1,
			     .sparse_nbytes = 4096,
			     .guest_nbytes = source->nbytes},
	};

	use_default_variants(&options);
	return options;
}

static inline int run_batch(struct imgc_job *job, const struct imgc_batch *batch,
			    struct imgc_error *err)
{
	int status = imgc_job_start(job, batch, err);

	if (status)
		return status;
	while (!imgc_job_wait(job, 50))
		;
	return imgc_job_finish(job, err);
}

/* Runs one batch over the whole disk; returns the first free offset. */
static inline uint64_t convert(const struct imgc_job_options *options,
			       const struct imgc_extent *rows, size_t n_rows,
			       struct imgc_placement *placements, size_t n_placements)
{
	struct imgc_batch batch = {.guest_end = options->geometry.guest_nbytes,
				   .extents = rows,
				   .n_extents = n_rows,
				   .placements = placements,
				   .n_placements = n_placements};
	struct imgc_progress progress;
	struct imgc_error err = {0};
	struct imgc_job *job;

	CHECK_EQ(imgc_job_create(options, &job, &err), IMGC_OK);
	CHECK_EQ(run_batch(job, &batch, &err), IMGC_OK);
	imgc_job_progress(job, &progress);
	CHECK_EQ(progress.bytes_done, batch.guest_end);
	CHECK_EQ(progress.bytes_data + progress.bytes_zero, batch.guest_end);
	uint64_t next = imgc_job_next_offset(job);

	imgc_job_destroy(job);
	return next;
}

/* The rows that a reader would make of a target's placements; the caller frees them. */
static inline struct imgc_extent *placed_rows(uint64_t guest_nbytes, const struct imgc_geometry *g,
					      const struct imgc_placement *placements, size_t n)
{
	struct imgc_extent *rows = calloc(n, sizeof(*rows));
	unsigned kind = g->codec.codec == IMGC_CODEC_ZSTD   ? IMGC_ZSTD
			: g->codec.codec == IMGC_CODEC_ZLIB ? IMGC_ZLIB
							    : IMGC_DEFLATE;

	CHECK(rows);
	for (size_t i = 0; i < n; i++) {
		uint64_t start = i * g->block_nbytes;
		uint64_t length = guest_nbytes - start;

		if (length > g->block_nbytes)
			length = g->block_nbytes;
		if (placements[i].state == IMGC_BLOCK_STORED) {
			CHECK_EQ(placements[i].length, length);
			rows[i] = data_row(start, length, placements[i].host_offset);
		} else if (placements[i].state == IMGC_BLOCK_COMPRESSED) {
			rows[i] = data_row(start, length, placements[i].host_offset);
			rows[i].host_length = placements[i].length;
			rows[i].kind = (uint16_t)kind;
			if (g->prefix == IMGC_PREFIX_GRAIN_MARKER)
				rows[i].flags = IMGC_EXTENT_GRAIN_MARKER;
		} else {
			rows[i] = empty_row(start, length, IMGC_HOLE);
		}
	}
	return rows;
}

/* Reads a target back by its placements. */
static inline void check_readback(const struct disk *source, const struct disk *target,
				  const struct imgc_geometry *g,
				  const struct imgc_placement *placements, size_t n)
{
	struct imgc_extent *rows = placed_rows(source->nbytes, g, placements, n);
	struct disk back = disk_create(source->nbytes);
	struct imgc_source_file file;
	struct imgc_job_options o = convert_options(target, &back, &file, 2);

	file.block_nbytes = (uint32_t)g->block_nbytes;
	o.geometry.guest_nbytes = source->nbytes;
	o.geometry.placing = IMGC_PLACE_IDENTITY;
	convert(&o, rows, n, NULL, 0);
	CHECK(memcmp(source->bytes, back.bytes, source->nbytes) == 0);
	free(rows);
	disk_destroy(&back);
}

#endif /* IMGC_ENGINE_UTIL_H */
