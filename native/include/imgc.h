/*
 * imgc.h - the contract of imgcore's native core
 *
 * The core moves guest bytes between files in parallel and knows no disk image
 * format.  Everything here is C11, never includes Python.h, never prints,
 * aborts or keeps global state; every function is thread-safe on distinct
 * objects unless it says otherwise.
 *
 * Units: all offsets and lengths are bytes in unsigned 64-bit integers.
 * "guest" is a place in the virtual disk, "host" a place in a file.
 *
 * Status: functions return 0 (IMGC_OK) or a negative enum imgc_status.  Those
 * that take a struct imgc_error fill it on failure and leave it alone on
 * success; it may be NULL.  Outputs are untouched on failure unless stated.
 */
#ifndef IMGC_H
#define IMGC_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ------------------------------------------------------------------ errors */

enum imgc_status {
	IMGC_OK = 0,
	IMGC_IO = -1,		    /* the operating system refused; see os_errno */
	IMGC_INVALID_ARGUMENT = -2, /* the caller broke this contract */
	IMGC_OUT_OF_RANGE = -3,	    /* an offset or length leaves its file or disk */
	IMGC_CORRUPT = -4,	    /* untrusted data contradicts itself */
	IMGC_UNSUPPORTED = -5,	    /* not built in, or this CPU or kernel lacks it */
	IMGC_LIMIT = -6,	    /* a result does not fit its field */
	IMGC_NO_MEMORY = -7,
	IMGC_CANCELLED = -8,
	IMGC_BAD_GRAIN_MARKER = -9,	/* a grain marker contradicts its extent */
	IMGC_PAST_END = -10,		/* a read reaches past the end of the file */
	IMGC_TOO_MANY_BAD_RANGES = -11, /* see IMGC_MAX_BAD_RANGES */
};

#define IMGC_NO_SOURCE UINT32_MAX    /* imgc_error.source: no source file involved */
#define IMGC_TARGET (UINT32_MAX - 1) /* imgc_error.source: the target file */

struct imgc_error {
	int status;	 /* enum imgc_status */
	int os_errno;	 /* 0 unless status == IMGC_IO */
	uint64_t offset; /* byte offset in `source`, or a row index for tables */
	uint32_t source; /* index of the file in the job, or one of the above */
	const char *op;	 /* static string: "pread", "inflate", "extent_check" */
};

/* ---------------------------------------------------- operations, variants */

/* Things that exist in several implementations with the same result. */
enum imgc_operation {
	IMGC_OP_ZERO,	 /* is a buffer all zeros */
	IMGC_OP_CRC32C,	 /* CRC-32C (Castagnoli) */
	IMGC_OP_INFLATE, /* raw DEFLATE and zlib decompression */
	IMGC_OP_IO,	 /* how scattered reads reach the kernel */
	IMGC_N_OPERATIONS,
};

enum imgc_select {
	IMGC_SELECT_OK = 0,
	IMGC_SELECT_UNKNOWN,   /* no variant of that name */
	IMGC_SELECT_NOT_BUILT, /* known, but not in this build */
	IMGC_SELECT_NO_CPU,    /* built, but this CPU or kernel lacks it */
};

struct imgc_variant_info {
	const char *name; /* static */
	int built;
	int runnable;
	int is_default;
};

/* Static name of an operation ("zero", "crc32c", "inflate", "io"), NULL past the end. */
const char *imgc_operation_name(unsigned op);

/* Number of variants of an operation, in order of preference; the last one always runs. */
unsigned imgc_variant_count(unsigned op);

/* Describes variant `index`; IMGC_INVALID_ARGUMENT if there is none. */
int imgc_variant_describe(unsigned op, unsigned index, struct imgc_variant_info *info);

/*
 * Resolves a variant by name; NULL means the measured default, or the first
 * runnable one if the default cannot run here.  A named demand never falls
 * back.  On IMGC_SELECT_OK, *id is what the functions below take.
 */
int imgc_variant_select(unsigned op, const char *name, uint32_t *id);

/* 1 if all `nbytes` bytes are zero (also when nbytes is 0), else 0.  No alignment needed. */
int imgc_is_zero(uint32_t variant, const void *data, size_t nbytes);

/* CRC-32C of `data`, continuing from `crc` (0 to start), final inversion included. */
uint32_t imgc_crc32c(uint32_t variant, uint32_t crc, const void *data, size_t nbytes);

/* ------------------------------------------------------------------ codecs */

enum imgc_codec {
	IMGC_CODEC_NONE = 0,
	IMGC_CODEC_DEFLATE = 1, /* raw, RFC 1951 */
	IMGC_CODEC_ZLIB = 2,	/* RFC 1950 header and Adler-32 around it */
	IMGC_CODEC_ZSTD = 3,
};

enum imgc_deflate_engine {
	IMGC_DEFLATE_ISAL = 0,	     /* levels 0..3, window_bits 12..15 */
	IMGC_DEFLATE_LIBDEFLATE = 1, /* levels 1..12, window_bits 15 only */
	/*
	 * Block by block one of the two: libdeflate at this level (1..12) where a sample of
	 * the block shrinks well, so that its better matches pay, else ISA-L's level 3.
	 * window_bits 15 only.
	 */
	IMGC_DEFLATE_SAMPLED = 2,
};

struct imgc_codec_params {
	uint32_t codec;	 /* enum imgc_codec */
	uint32_t engine; /* enum imgc_deflate_engine; unused for zstd */
	int32_t level;
	uint32_t window_bits; /* deflate: 12..15; unused for zstd */
};

struct imgc_compressor;
struct imgc_decompressor;

/* One of each per thread; not thread-safe.  destroy(NULL) is allowed. */
int imgc_compressor_create(const struct imgc_codec_params *params, struct imgc_compressor **out);
void imgc_compressor_destroy(struct imgc_compressor *c);

/* Upper bound of the compressed size of `nbytes` bytes with these parameters. */
size_t imgc_compressor_bound(const struct imgc_compressor *c, size_t nbytes);

/*
 * What has to be readable behind a block that is compressed, whatever it holds:
 * ISA-L compares eight bytes at a time on aarch64, up to seven past the end.
 */
#define IMGC_COMPRESS_SLACK_NBYTES 8

/*
 * Compresses one independent block.  *out_nbytes receives the size; 0 with
 * IMGC_OK means that the result would not fit into out_capacity.  After the
 * block, IMGC_COMPRESS_SLACK_NBYTES bytes can be read.
 * Deterministic: same input, parameters and library version, same bytes.
 */
int imgc_compress(struct imgc_compressor *c, const void *in, size_t in_nbytes, void *out,
		  size_t out_capacity, size_t *out_nbytes);

/* `inflate_variant` is an id of IMGC_OP_INFLATE. */
int imgc_decompressor_create(uint32_t inflate_variant, struct imgc_decompressor **out);
void imgc_decompressor_destroy(struct imgc_decompressor *d);

/*
 * Decompresses one block that must yield exactly out_nbytes.  `codec` is one of
 * enum imgc_codec but NONE.  in_nbytes is an upper bound: bytes after the end
 * of the compressed stream are ignored.  Anything else (short, long, broken) is
 * IMGC_CORRUPT, and `out` is then undefined.  Any DEFLATE window is read.
 * *in_used (may be NULL) receives the bytes that the stream took.
 */
int imgc_decompress(struct imgc_decompressor *d, uint32_t codec, const void *in, size_t in_nbytes,
		    void *out, size_t out_nbytes, size_t *in_used);

/* ----------------------------------------------------------- extents, tables */

enum imgc_extent_kind {
	IMGC_HOLE = 0, /* never allocated here: zeros unless a parent has it */
	IMGC_ZERO = 1, /* explicit zeros */
	IMGC_DATA = 2, /* plain bytes at host_offset, host_length == length */
	/* One compressed block each; see imgc_source_file.block_nbytes. */
	IMGC_DEFLATE = 3,
	IMGC_ZLIB = 4,
	IMGC_ZSTD = 5,
	IMGC_N_KINDS,
};

/* The compressed block is preceded by a VMDK grain marker (12 bytes: LBA, data size). */
#define IMGC_EXTENT_GRAIN_MARKER 1u

/*
 * One row of a reader's answer.  HOLE and ZERO carry no host place (host_offset,
 * host_length and file are 0).  For a compressed kind host_length is an upper
 * bound of the stored bytes, and the row covers no more than one block.
 */
struct imgc_extent {
	uint64_t guest_offset;
	uint64_t length;
	uint64_t host_offset;
	uint64_t host_length;
	uint32_t file; /* index into the job's sources */
	uint16_t kind; /* enum imgc_extent_kind */
	uint16_t flags;
};

enum imgc_block_state {
	IMGC_BLOCK_ABSENT = 0,
	IMGC_BLOCK_ZERO = 1,
	IMGC_BLOCK_STORED = 2,
	IMGC_BLOCK_COMPRESSED = 3,
};

/* One row of the engine's answer: where target block i of the batch landed. */
struct imgc_placement {
	uint64_t host_offset; /* 0 unless STORED or COMPRESSED */
	uint32_t length;      /* bytes there, a grain marker included; 0 unless it has a place */
	uint32_t state;	      /* enum imgc_block_state */
};

/* First match wins: an entry with (entry & mask) == value is of `kind`. */
struct imgc_table_rule {
	uint64_t mask;
	uint64_t value;
	uint32_t kind; /* enum imgc_extent_kind */
};

#define IMGC_TABLE_MAX_RULES 8

/*
 * What a grain table, BAT, block map or L2 table is made of.  An entry that no
 * rule matches is `default_kind`.  Its place is
 *     host_base + ((entry & offset_mask) >> offset_rshift << offset_lshift)
 * and for compressed kinds, if compressed_mask is not 0, it is
 *     (entry & compressed_mask), with
 *     ((entry >> length_shift) & length_mask) + 1 units of 512 bytes, counted
 *     from the 512-byte sector that holds the first byte (QCOW2);
 * otherwise the same place as a plain entry, with compressed_bound as host_length.
 */
struct imgc_table_format {
	uint32_t entry_nbytes; /* 4 or 8 */
	uint32_t big_endian;
	uint64_t block_nbytes; /* guest bytes per entry, power of two */
	uint64_t offset_mask;
	uint32_t offset_rshift;
	uint32_t offset_lshift;
	uint64_t host_base;
	uint64_t reserved_mask; /* DATA: a bit of these set is IMGC_CORRUPT */
	uint32_t default_kind;
	uint32_t flags; /* of compressed extents: IMGC_EXTENT_... */
	uint64_t compressed_mask;
	uint32_t length_shift;
	uint64_t length_mask;
	uint64_t compressed_bound;
	uint32_t n_rules;
	struct imgc_table_rule rules[IMGC_TABLE_MAX_RULES];
	/* For writing. */
	uint64_t absent_entry;
	uint64_t zero_entry;
	uint64_t stored_bits;	  /* or-ed into STORED entries */
	uint64_t compressed_bits; /* or-ed into COMPRESSED entries */
};

/* Where the entries of one decode call lie. */
struct imgc_table_span {
	uint64_t guest_offset; /* of the first entry's block */
	uint64_t guest_end;    /* the disk's end: the last extent is clipped to it */
	uint64_t file_nbytes;  /* DATA must lie inside; compressed bounds are clipped to it */
	uint32_t file;
};

/*
 * Decodes `n_entries` wire entries into ascending, gap-free extents, joining
 * neighbours of one kind that also join on the host.  `out` holds `capacity`
 * rows (n_entries always suffice); *n_out receives the count.  Entries at or past
 * span.guest_end are ignored.  Failures: IMGC_CORRUPT (reserved bit),
 * IMGC_OUT_OF_RANGE (a place past the end of the file), with err->offset = the
 * index of the entry; IMGC_LIMIT if `capacity` is too small.  The rows of `out`
 * are then undefined.
 */
int imgc_table_decode(const struct imgc_table_format *format, const void *entries, size_t n_entries,
		      const struct imgc_table_span *span, struct imgc_extent *out, size_t capacity,
		      size_t *n_out, struct imgc_error *err);

/*
 * Encodes placements into wire entries, one for one.  IMGC_LIMIT with
 * err->offset = the row if a place does not fit the entry (mask, or shift with
 * bits lost); `entries` is then undefined.
 */
int imgc_table_encode(const struct imgc_table_format *format,
		      const struct imgc_placement *placements, size_t n, void *entries,
		      struct imgc_error *err);

/* ------------------------------------------------------------------- files */

/*
 * A file is a small table of operations (read, write, zero, sync, extents,
 * close) so that a memory buffer, a null sink or, later, a network export is
 * one more row and no special case.  Reading and writing through one file from
 * several threads at once is allowed.
 */
struct imgc_file;

/* `fd` stays the caller's and must outlive the file.  A block device is recognised. */
int imgc_file_open_fd(int fd, struct imgc_file **out, struct imgc_error *err);

/* A fixed buffer, owned by the caller; writes past its end are IMGC_OUT_OF_RANGE. */
int imgc_file_open_memory(void *data, uint64_t nbytes, struct imgc_file **out);

/* Accepts and forgets every write; reads give zeros. For benchmarks. */
int imgc_file_open_null(struct imgc_file **out);

/* Frees the object; a file descriptor behind it stays open.  NULL is allowed. */
void imgc_file_close(struct imgc_file *file);

/* Makes [offset, offset + length) read as zeros, by the cheapest way that works. */
int imgc_file_zero(struct imgc_file *file, uint64_t offset, uint64_t length,
		   struct imgc_error *err);

/*
 * Finds the next range of data at or after `offset`: [*start, *end).  *start ==
 * *end == the file's end if there is none.  A file that cannot tell is all data.
 */
int imgc_file_next_data(struct imgc_file *file, uint64_t offset, uint64_t *start, uint64_t *end,
			struct imgc_error *err);

/* ------------------------------------------------------------------ engine */

/* A file that extents refer to by index. */
struct imgc_source_file {
	struct imgc_file *file;
	uint64_t nbytes;       /* host rows must lie inside */
	uint64_t guest_base;   /* compressed blocks start at guest_base + k * block_nbytes */
	uint32_t block_nbytes; /* size of a decompressed block; 0 if it has none */
};

/*
 * Verifies rows from outside: ascending from sector to sector, gap-free over exactly
 * [guest_start, guest_end), non-zero lengths, known kinds and files, host ranges
 * inside their file, compressed rows inside one block, nothing wraps.
 * err->offset is the row.
 */
int imgc_extents_check(const struct imgc_extent *extents, size_t n,
		       const struct imgc_source_file *files, size_t n_files, uint64_t guest_start,
		       uint64_t guest_end, struct imgc_error *err);

enum imgc_placing {
	IMGC_PLACE_IDENTITY = 0, /* host = host_base + guest - guest_base */
	IMGC_PLACE_APPEND = 1,	 /* next free offset, in guest order */
};

enum imgc_prefix {
	IMGC_PREFIX_NONE = 0,
	IMGC_PREFIX_GRAIN_MARKER = 1, /* VMDK: LBA and size, 12 bytes, before the data */
};

enum imgc_zero_policy {
	IMGC_ZERO_SKIP = 0,	/* leave absent: the target reads as zeros there */
	IMGC_ZERO_EXPLICIT = 1, /* state ZERO; identity: imgc_file_zero */
	IMGC_ZERO_STORE = 2,	/* written like any data */
};

#define IMGC_MAX_STORED_PREFIX_NBYTES (1024u * 1024)

/* What a writer asks of the engine. */
struct imgc_geometry {
	uint64_t block_nbytes;	       /* power of two, 512 B to 256 MiB */
	uint32_t placing;	       /* enum imgc_placing */
	uint32_t zero_policy;	       /* enum imgc_zero_policy */
	uint64_t guest_base;	       /* IDENTITY: first guest byte of the target, */
	uint64_t host_base;	       /* and where it lies */
	uint32_t stored_alignment;     /* APPEND, STORED: power of two */
	uint32_t compressed_alignment; /* APPEND, COMPRESSED: power of two, 1 = packed */
	uint32_t prefix;	       /* enum imgc_prefix, before COMPRESSED blocks */
	uint32_t store_incompressible; /* 1: a block that does not shrink is STORED */
	struct imgc_codec_params codec;
	uint64_t sparse_nbytes; /* zero runs of this size inside STORED data are not
				   written (the target reads as zeros there); 0 = write all */
	/*
	 * APPEND: after the last block of each group of `group_nblocks` blocks that
	 * has a place, group_gap_nbytes are left free for the format's table
	 * (0 = no groups).  The gap starts at the next multiple of 512.
	 */
	uint64_t group_nblocks;
	uint64_t group_gap_nbytes;
	uint64_t guest_nbytes; /* the disk's end; a block that crosses it is
				  padded with zeros if compressed, or stored to its end */
	/*
	 * APPEND without a codec: this many bytes of one value stand directly before the
	 * data of each STORED block (VHD sector bitmaps).  stored_alignment and the
	 * placement's host_offset are about the data.
	 */
	uint32_t stored_prefix_nbytes; /* up to IMGC_MAX_STORED_PREFIX_NBYTES */
	uint32_t stored_prefix_byte;   /* 0..255 */
};

enum imgc_job_kind {
	IMGC_JOB_CONVERT = 0, /* read, zero-test, compress, write */
	IMGC_JOB_COMPARE = 1, /* read two, find the first difference */
};

#define IMGC_MAX_THREADS 256u

/* A block is compared with the base as a whole, in memory. */
#define IMGC_MAX_BASE_BLOCK_NBYTES (4u * 1024 * 1024)

struct imgc_job_options {
	uint32_t kind;	    /* enum imgc_job_kind */
	uint32_t n_threads; /* 1..IMGC_MAX_THREADS */
	uint32_t zero_variant, inflate_variant, io_variant;
	uint64_t window_nbytes;			/* 0: chosen by the geometry */
	const struct imgc_source_file *sources; /* copied */
	size_t n_sources;
	struct imgc_file *target;      /* CONVERT; not owned */
	struct imgc_geometry geometry; /* CONVERT */
	uint64_t next_offset;	       /* APPEND: first free host offset */
	uint32_t has_base;	       /* APPEND: batches may come with base_extents; blocks
					  have up to IMGC_MAX_BASE_BLOCK_NBYTES then */
	/*
	 * CONVERT without a base: what the system cannot read, in pieces of 4 KiB, and
	 * compressed blocks that are broken, are zeros in the target, and rows of
	 * imgc_job_bad_ranges().
	 */
	uint32_t salvage;
	/*
	 * CONVERT without salvage: data that is stored plain in a source, at an offset that
	 * differs from its place in the target by whole blocks of the file system, is
	 * reflinked instead of written, where the file system can do that.  The target reads
	 * the same either way.
	 */
	uint32_t reflink;
};

/* A guest range that was not read. */
struct imgc_bad_range {
	uint64_t guest_offset, length;
	uint32_t source; /* index of the file in the job */
	int os_errno;	 /* 0: the compressed data is broken */
};

/* One more is IMGC_TOO_MANY_BAD_RANGES. */
#define IMGC_MAX_BAD_RANGES 65536u

/* One piece of the virtual disk.  All arrays stay the caller's until finish. */
struct imgc_batch {
	uint64_t guest_start, guest_end; /* start is a multiple of block_nbytes */
	const struct imgc_extent *extents;
	size_t n_extents;
	/*
	 * COMPARE: the other side.  CONVERT: what the target's backing file reads
	 * as; blocks equal to it become ABSENT, and zeros that differ from it ZERO.
	 * NULL if there is none; CONVERT takes it only with options.has_base.
	 */
	const struct imgc_extent *base_extents;
	size_t n_base_extents;
	/* APPEND: zeroed by the caller, ceil((end - start) / block_nbytes) rows. */
	struct imgc_placement *placements;
	size_t n_placements;
};

struct imgc_progress {
	uint64_t bytes_done;	  /* guest bytes finished, zeros included */
	uint64_t bytes_data;	  /* of these, found to be data */
	uint64_t bytes_zero;	  /* of these, found to be zeros */
	uint64_t bytes_read;	  /* host bytes read */
	uint64_t bytes_written;	  /* host bytes written */
	uint64_t bytes_reflinked; /* host bytes reflinked from a source */
};

#define IMGC_NO_DIFFERENCE UINT64_MAX

struct imgc_job;

int imgc_job_create(const struct imgc_job_options *options, struct imgc_job **out,
		    struct imgc_error *err);

/* Checks the batch (imgc_extents_check) and starts the workers on it.  One at a time. */
int imgc_job_start(struct imgc_job *job, const struct imgc_batch *batch, struct imgc_error *err);

/* Waits up to timeout_ms for the running batch: 1 = ended, 0 = still running. */
int imgc_job_wait(struct imgc_job *job, int timeout_ms);

/*
 * Joins the batch; the first error wins, those of windows that cannot be read in guest order, and
 * none behind a difference.  The job may start another batch on 0.
 */
int imgc_job_finish(struct imgc_job *job, struct imgc_error *err);

/* Any thread, at any time; values never decrease, and are exact after finish. */
void imgc_job_progress(const struct imgc_job *job, struct imgc_progress *out);

/* Any thread, idempotent, returns at once; finish then gives IMGC_CANCELLED. */
void imgc_job_cancel(struct imgc_job *job);

/* APPEND: the first free host offset after the finished batches. */
uint64_t imgc_job_next_offset(const struct imgc_job *job);

/*
 * APPEND, between batches: the caller has put tables of its own at the end.
 * Packing starts anew behind them.
 */
int imgc_job_set_next_offset(struct imgc_job *job, uint64_t next_offset);

/* COMPARE: the lowest guest offset that differs so far, or IMGC_NO_DIFFERENCE. */
uint64_t imgc_job_first_difference(const struct imgc_job *job);

/*
 * Between batches, with options.salvage: the number of ranges that were not read so
 * far, and *out = their rows, ascending, neighbours of one source and errno joined; they
 * stay valid until the next start.
 */
size_t imgc_job_bad_ranges(const struct imgc_job *job, const struct imgc_bad_range **out);

/* Cancels and joins what still runs; NULL is allowed. */
void imgc_job_destroy(struct imgc_job *job);

#ifdef __cplusplus
}
#endif

#endif /* IMGC_H */
