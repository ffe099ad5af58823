/*
 * imgc.h - the contract of imgcore's native core
 *
 * The core moves guest bytes between files in parallel.  It knows nothing about disk
 * image formats.  It is C11, does not include Python.h, and never prints, aborts or
 * keeps global state.  Different threads may call any function on different objects.
 * Where they may use one object at the same time, the function's comment says so.
 *
 * Units: all offsets and lengths are bytes in unsigned 64-bit integers.  "guest" is a
 * place in the virtual disk, "host" a place in a file.
 *
 * Status: functions return 0 (IMGC_OK) or a negative enum imgc_status.  A struct
 * imgc_error is filled on failure and left alone on success; the pointer may be NULL.
 * Outputs are untouched on failure unless stated.
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
	IMGC_OUT_OF_RANGE = -3,	    /* an offset or length exceeds its file or disk */
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
	const char *op;	 /* static string, for messages: "pread", "extent_check" */
};

/* ---------------------------------------------------- operations, variants */

/* Each of these has several implementations (variants) with the same result. */
enum imgc_operation {
	IMGC_OP_ZERO,	 /* whether a buffer is all zeros */
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

/* The static name ("zero", "crc32c", "inflate", "io"), or NULL past the last one. */
const char *imgc_operation_name(unsigned op);

/* Number of variants, which are in order of preference.  The last one always runs. */
unsigned imgc_variant_count(unsigned op);

/* Describes variant `index`; IMGC_INVALID_ARGUMENT if there is none. */
int imgc_variant_describe(unsigned op, unsigned index, struct imgc_variant_info *info);

/*
 * Finds a variant by name.  NULL means the measured default, or the first variant that
 * runs here if the default does not.  A variant that is named is never replaced by
 * another.  Returns an enum imgc_select.  On IMGC_SELECT_OK, *id is the id that other
 * functions take.
 */
int imgc_variant_select(unsigned op, const char *name, uint32_t *id);

/* 1 if all bytes are zero, also if nbytes is 0; else 0.  `data` needs no alignment. */
int imgc_is_zero(uint32_t variant, const void *data, size_t nbytes);

/* CRC-32C of `data`, continued from `crc`, which is 0 for the first part. */
uint32_t imgc_crc32c(uint32_t variant, uint32_t crc, const void *data, size_t nbytes);

#define IMGC_XXH64_STRIPE_NBYTES 32u

/*
 * XXH64 of bytes that come in order, with seed 0.  After whole stripes, `lanes` and
 * `nbytes` are all that there is to know.
 */
struct imgc_xxh64 {
	uint64_t lanes[4];
	uint64_t nbytes;			   /* so far */
	uint8_t pending[IMGC_XXH64_STRIPE_NBYTES]; /* of the last stripe */
};

void imgc_xxh64_begin(struct imgc_xxh64 *hash);
void imgc_xxh64_add(struct imgc_xxh64 *hash, const void *data, size_t nbytes);

/* The hash of what was added so far; more can be added. */
uint64_t imgc_xxh64_end(const struct imgc_xxh64 *hash);

/* --------------------------------------------------------------- checksums */

/*
 * The checksum of a disk (blkhash).  A leaf is the hash of one block; the checksum is the
 * hash of all leaves in order, followed by the disk's length in bytes as a little-endian
 * 64-bit number.  The last block may be short.  The leaf of a whole block of zeros is a
 * constant, which is known without hashing.
 */
enum imgc_checksum {
	IMGC_CHECKSUM_NONE = 0,
	IMGC_CHECKSUM_SHA256 = 1,
	IMGC_CHECKSUM_BLAKE3 = 2, /* with 32 bytes of output */
	IMGC_CHECKSUM_CRC32C = 3, /* little-endian, then zeros: finds accidents only */
	IMGC_N_CHECKSUMS,
};

#define IMGC_CHECKSUM_NBYTES 32u		/* of a leaf, and of the checksum */
#define IMGC_CHECKSUM_BLOCK_NBYTES (64u * 1024) /* in jobs */

/* The static name ("sha256"), or NULL for NONE and past the last one. */
const char *imgc_checksum_name(unsigned checksum);

/* 1 if the algorithm is in this build; else 0. */
int imgc_checksum_is_built(unsigned checksum);

/* Makes the checksum of bytes that come in order. */
struct imgc_hasher;

/*
 * `block_nbytes` is a power of two, 512 B to 16 MiB.  `zero_variant` is an id of
 * IMGC_OP_ZERO.  IMGC_UNSUPPORTED if the algorithm is not built in.
 */
int imgc_hasher_create(uint32_t checksum, uint64_t block_nbytes, uint32_t zero_variant,
		       struct imgc_hasher **out);

/* NULL is allowed. */
void imgc_hasher_destroy(struct imgc_hasher *hasher);

/*
 * Each of these three adds the next `nbytes` bytes of the disk: its content, zeros, or
 * leaves of blocks.  IMGC_INVALID_ARGUMENT if the disk gets longer than INT64_MAX bytes,
 * or if leaves do not start with a block, or if anything follows the leaf of a short
 * block; nothing has been added then.  After another failure the hasher can only be
 * destroyed.
 */
int imgc_hasher_update(struct imgc_hasher *hasher, const void *data, size_t nbytes);
int imgc_hasher_zeros(struct imgc_hasher *hasher, uint64_t nbytes);
int imgc_hasher_leaves(struct imgc_hasher *hasher, const void *leaves, uint64_t nbytes);

/* The leaf of one block, which is not added. */
int imgc_hasher_leaf(struct imgc_hasher *hasher, const void *block, size_t nbytes,
		     uint8_t out[IMGC_CHECKSUM_NBYTES]);

/* The checksum of what has been added so far.  More may be added afterwards. */
int imgc_hasher_digest(struct imgc_hasher *hasher, uint8_t out[IMGC_CHECKSUM_NBYTES]);

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
	 * Chosen for each block: libdeflate at this level (1..12) if a sample of the
	 * block compresses well, so that its better matches pay; else ISA-L at level 3.
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

/* Each thread needs its own.  destroy(NULL) is allowed. */
int imgc_compressor_create(const struct imgc_codec_params *params, struct imgc_compressor **out);
void imgc_compressor_destroy(struct imgc_compressor *c);

/* Upper bound of the compressed size of `nbytes` bytes with these parameters. */
size_t imgc_compressor_bound(const struct imgc_compressor *c, size_t nbytes);

/*
 * So many bytes after a block must be readable while it is compressed.  Their values
 * make no difference: on aarch64 ISA-L compares eight bytes at a time, up to seven past
 * the end.
 */
#define IMGC_COMPRESS_SLACK_NBYTES 8

/*
 * Compresses one independent block.  *out_nbytes receives the size; 0 with IMGC_OK
 * means that the result does not fit out_capacity.  IMGC_COMPRESS_SLACK_NBYTES bytes
 * after the block must be readable.
 *
 * Deterministic: the same input, parameters and library version give the same bytes.
 */
int imgc_compress(struct imgc_compressor *c, const void *in, size_t in_nbytes, void *out,
		  size_t out_capacity, size_t *out_nbytes);

/* `inflate_variant` is an id of IMGC_OP_INFLATE.  Each thread needs its own. */
int imgc_decompressor_create(uint32_t inflate_variant, struct imgc_decompressor **out);
void imgc_decompressor_destroy(struct imgc_decompressor *d);

/*
 * Decompresses one block that must yield exactly out_nbytes.  `codec` is an enum
 * imgc_codec other than NONE.  in_nbytes is an upper bound: bytes after the end of the
 * compressed stream are ignored.  A stream that is broken, or yields fewer or more
 * bytes, is IMGC_CORRUPT, and `out` is then undefined.  Any DEFLATE window is accepted.
 * *in_used, if not NULL, receives the number of bytes that the stream took.
 */
int imgc_decompress(struct imgc_decompressor *d, uint32_t codec, const void *in, size_t in_nbytes,
		    void *out, size_t out_nbytes, size_t *in_used);

/*
 * Makes a compressed block of codec `to` from one of codec `from` without compressing
 * it again: of the same codec, or of the other one of DEFLATE and ZLIB.  `plain` is its
 * content, or NULL if it has not been decompressed; the Adler-32 of a new ZLIB wrapper
 * needs it.  Returns the size; 0 means that this cannot be done, or that the result does
 * not fit out_capacity.
 *
 * The DEFLATE or zstd stream itself is not looked at, and in_nbytes is taken for its
 * end, save that the two bytes of a ZLIB header are checked.
 */
size_t imgc_rewrap(uint32_t from, uint32_t to, const void *in, size_t in_nbytes, const void *plain,
		   size_t plain_nbytes, void *out, size_t out_capacity);

/* ----------------------------------------------------------- extents, tables */

enum imgc_extent_kind {
	IMGC_HOLE = 0, /* never allocated here: zeros, or the parent's data */
	IMGC_ZERO = 1, /* explicit zeros */
	IMGC_DATA = 2, /* plain bytes at host_offset, host_length == length */
	/* One compressed block each; see imgc_source_file.block_nbytes. */
	IMGC_DEFLATE = 3,
	IMGC_ZLIB = 4,
	IMGC_ZSTD = 5,
	IMGC_N_KINDS,
	/*
	 * Not known where, from imgc_table_decode with `salvage` only: the engine
	 * rejects such a row.  The parent's data does not show through.
	 */
	IMGC_LOST = IMGC_N_KINDS,
};

/* A VMDK grain marker (12 bytes: LBA, data size) precedes the compressed block. */
#define IMGC_EXTENT_GRAIN_MARKER 1u
/*
 * DATA in a job without a codec, base or salvage that reflinks, or whose target is a pipe
 * (imgc_file_open_ordered): it is stored without being read or tested for zeros.  A pipe
 * gets pages of the page cache.  What can be neither reflinked nor moved is read and
 * copied.
 */
#define IMGC_EXTENT_UNREAD 2u

/*
 * One row of a reader's answer.  HOLE and ZERO have no host place: host_offset,
 * host_length and file are 0.  For a compressed kind host_length is an upper bound of
 * the stored bytes, and the row covers one block at most.
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

/* One row of the engine's answer: where it put block i of the batch. */
struct imgc_placement {
	uint64_t host_offset; /* 0 unless STORED or COMPRESSED */
	uint32_t length;      /* bytes there, with the grain marker; 0 unless it has a place */
	uint32_t state;	      /* enum imgc_block_state */
};

/* The kind of an entry with (entry & mask) == value.  The first match wins. */
struct imgc_table_rule {
	uint64_t mask;
	uint64_t value;
	uint32_t kind; /* enum imgc_extent_kind */
};

#define IMGC_TABLE_MAX_RULES 8

/*
 * The layout of the entries of a grain table, BAT, block map or L2 table.  An entry
 * that no rule matches is `default_kind`.  The place of a plain entry is
 *
 *     host_base + ((entry & offset_mask) >> offset_rshift << offset_lshift)
 *
 * The place of a compressed entry depends on compressed_mask.  If it is 0, the place is
 * that of a plain entry, and compressed_bound is the host_length.  Otherwise (QCOW2)
 * the place and the number of units of 512 bytes, counted from the start of the sector
 * that holds the first byte, are
 *
 *     entry & compressed_mask
 *     ((entry >> length_shift) & length_mask) + 1
 */
struct imgc_table_format {
	uint32_t entry_nbytes; /* 4 or 8 */
	uint32_t big_endian;
	uint64_t block_nbytes; /* guest bytes per entry, power of two */
	uint64_t offset_mask;
	uint32_t offset_rshift;
	uint32_t offset_lshift;
	uint64_t host_base;
	uint64_t reserved_mask; /* DATA: any of these bits set is IMGC_CORRUPT */
	uint32_t default_kind;
	uint32_t flags; /* of compressed extents: IMGC_EXTENT_... */
	uint64_t compressed_mask;
	uint32_t length_shift;
	uint64_t length_mask;
	uint64_t compressed_bound;
	uint32_t n_rules;
	struct imgc_table_rule rules[IMGC_TABLE_MAX_RULES];
	/* For encoding. */
	uint64_t absent_entry;
	uint64_t zero_entry;
	uint64_t stored_bits;	  /* or-ed into STORED entries */
	uint64_t compressed_bits; /* or-ed into COMPRESSED entries */
};

/* The place of one decode call's entries in the disk and in the file. */
struct imgc_table_span {
	uint64_t guest_offset; /* of the first entry's block */
	uint64_t guest_end;    /* the disk's end, where the last extent is cut */
	uint64_t file_nbytes;  /* DATA must lie inside; compressed bounds are cut there */
	uint32_t file;
	uint32_t salvage; /* an impossible entry becomes a LOST row, not an error */
};

/*
 * Decodes `n_entries` table entries into ascending extents without gaps.  Neighbours of
 * one kind become one extent if they are neighbours on the host too.  `out` has room
 * for `capacity` rows; n_entries rows always suffice.  *n_out receives the number of
 * rows.  Entries at or past span.guest_end are ignored.
 *
 * With span.salvage, the part of a block that the file does not have is LOST: whole
 * sectors of a DATA block that starts inside the file stay DATA.  Holes and zeros with
 * a reserved bit are LOST too, and 2 * n_entries rows suffice.
 *
 * Failures without it: IMGC_CORRUPT for a reserved bit, IMGC_OUT_OF_RANGE for a place past the end
 * of the file, IMGC_LIMIT if `capacity` is too small.  err->offset is then the index of
 * the entry, and the rows of `out` are undefined.
 */
int imgc_table_decode(const struct imgc_table_format *format, const void *entries, size_t n_entries,
		      const struct imgc_table_span *span, struct imgc_extent *out, size_t capacity,
		      size_t *n_out, struct imgc_error *err);

/*
 * Encodes placements into table entries, one for one.  IMGC_LIMIT if a place does not
 * fit its entry.  err->offset is then the row, and `entries` is undefined.
 */
int imgc_table_encode(const struct imgc_table_format *format,
		      const struct imgc_placement *placements, size_t n, void *entries,
		      struct imgc_error *err);

/* A compressed grain of a stream: where its marker starts, and where its data ends. */
struct imgc_grain {
	uint64_t number, offset, end;
};

struct imgc_grain_limits {
	uint64_t n_grains; /* of the disk */
	uint32_t grain_nsectors;
	uint32_t max_nbytes; /* of compressed data */
};

/*
 * Follows the markers of grains in `bytes`, which start with a marker at `offset` in the
 * stream, and returns how many grains it found.  The marker after one is at the next
 * sector's start.  It stops before a marker that is not there as a whole, and before one
 * that is not that of a grain within the limits, which the caller looks at; when `out` is
 * full; and once the grains have most_nbytes together, with their markers.  The data of
 * the last one may end behind `bytes`.
 */
size_t imgc_grains_walk(const struct imgc_grain_limits *limits, const void *bytes, size_t nbytes,
			uint64_t offset, uint64_t most_nbytes, struct imgc_grain *out,
			size_t capacity);

/* ------------------------------------------------------------------- files */

/*
 * A file with its table of operations (io/io.h), so that a memory buffer, a null sink
 * or, later, a network export is one more table and needs no special case.  Several
 * threads may use one file at the same time.
 */
struct imgc_file;

/* A regular file or a block device.  The caller closes `fd`, after the file. */
int imgc_file_open_fd(int fd, struct imgc_file **out, struct imgc_error *err);

/* A buffer of the caller, of fixed size: a write past its end is IMGC_OUT_OF_RANGE. */
int imgc_file_open_memory(void *data, uint64_t nbytes, struct imgc_file **out);

/* Forgets every write, and reads as zeros.  For benchmarks. */
int imgc_file_open_null(struct imgc_file **out);

/*
 * A pipe, a socket or any other descriptor, whose bytes are written from the first to the
 * last: the offsets of writes ascend, and what lies between two of them becomes zeros.  A
 * write before the end of the last one is IMGC_OUT_OF_RANGE.  One thread at a time writes.
 * The caller closes `fd`, after the file.
 *
 * No write waits for a reader, if the descriptor is a socket or a pipe.  It is IMGC_IO with
 * EAGAIN instead, also after a while in a long gap; the same write again goes on where it
 * stopped.  A job repeats it until it is cancelled.
 */
int imgc_file_open_ordered(int fd, struct imgc_file **out, struct imgc_error *err);

/* Bytes at the end of a stream that may be held back. */
#define IMGC_MAX_TAIL_NBYTES 4096u

struct imgc_stream_options {
	int fd;		  /* stays open; the caller closes it, after the file */
	const void *head; /* bytes that were taken from it before; copied */
	uint64_t head_nbytes;
	/* The stream ends where it ends.  Otherwise a read past its end is IMGC_PAST_END. */
	uint32_t open_ended;
	uint32_t tail_nbytes; /* its last bytes are not read; IMGC_MAX_TAIL_NBYTES at most */
};

/*
 * A pipe, a socket or any other descriptor, whose bytes are read from the first to the
 * last, each once.  Reads take turns: that at offset n waits until those before it have
 * ended.  A read of what has gone is IMGC_OUT_OF_RANGE.  What follows the end of an open
 * stream reads as zeros; see imgc_job_found_end().
 *
 * A read waits only for a moment for its turn, or for bytes.  It is IMGC_IO with EAGAIN
 * then, and the same read again goes on where it stopped.  A job repeats it until it is
 * cancelled.
 */
int imgc_file_open_stream(const struct imgc_stream_options *options, struct imgc_file **out,
			  struct imgc_error *err);

/* 1 if it is a stream that was opened with open_ended, else 0. */
int imgc_file_is_open_ended(const struct imgc_file *file);

/* 1 if a read has met the end of a stream, else 0.  *disk_end is where its tail begins. */
int imgc_file_stream_end(struct imgc_file *file, uint64_t *disk_end);

/* While nothing reads: how many bytes of the disk were read, 0 for other kinds of files. */
uint64_t imgc_file_stream_position(struct imgc_file *file);

/*
 * While nothing reads: copies what was taken from the descriptor and not read, if it fits:
 * what is held back, and the rest of the head.  Returns its number of bytes.
 */
uint64_t imgc_file_stream_rest(struct imgc_file *file, void *out, uint64_t capacity);

/* Writes `nbytes` bytes at `offset`. */
int imgc_file_put(struct imgc_file *file, const void *data, uint64_t nbytes, uint64_t offset,
		  struct imgc_error *err);

/* 1 if writes may be IMGC_IO with EAGAIN because a reader takes nothing, else 0. */
int imgc_file_has_reader(const struct imgc_file *file);

/* Waits, but not longer than the timeout, until such a write is worth another attempt. */
void imgc_file_await_room(struct imgc_file *file, int timeout_ms);

/* Frees the object, but does not close its file descriptor.  NULL is allowed. */
void imgc_file_close(struct imgc_file *file);

/*
 * 1 if the core has written to the file since the last call, else 0.  Any thread may
 * call it.  A write that ends later counts for the next call: whoever syncs asks before.
 */
int imgc_file_take_written(struct imgc_file *file);

/*
 * From now on writes to the file are IMGC_IO with EIO.  For a file that could not be
 * synced: the kernel may have dropped what was written.
 */
void imgc_file_refuse_writes(struct imgc_file *file);

/*
 * From now on, what is read from the file or written to it is dropped from the page
 * cache, but for pages that are there now.  Called before any other thread uses the
 * file.  Files of other kinds than imgc_file_open_fd() have no page cache: IMGC_OK.
 *
 * Written data is on the medium before it is dropped.  If that fails, a later write is
 * IMGC_IO; the caller asks once more before it syncs, by imgc_file_note_written() with
 * a length of 0.
 */
int imgc_file_drop_behind(struct imgc_file *file, struct imgc_error *err);

/* How many bytes were in the page cache at imgc_file_drop_behind(), as far as is known. */
uint64_t imgc_file_kept_nbytes(const struct imgc_file *file);

/*
 * From now on, whole pages are read and written past the page cache, by a second
 * descriptor of the same file, which is open with O_DIRECT in the same mode and stays the
 * caller's.  Called before any other thread uses the file.  What is shorter still goes
 * through the page cache, and so does everything that the file system refuses later.
 *
 * IMGC_UNSUPPORTED: the file system takes no such requests, the file is of another kind,
 * or goes that way already.
 */
int imgc_file_go_direct(struct imgc_file *file, int direct_fd, struct imgc_error *err);

/* The job ends: drops what is left of the file, while its descriptor is still open. */
void imgc_file_drop_rest(struct imgc_file *file);

/* The caller has read from the file, or written to it, by its descriptor. */
void imgc_file_note_read(struct imgc_file *file, uint64_t offset, uint64_t length);
int imgc_file_note_written(struct imgc_file *file, uint64_t offset, uint64_t length,
			   struct imgc_error *err);

/* Makes [offset, offset + length) read as zeros, by the cheapest way that works. */
int imgc_file_zero(struct imgc_file *file, uint64_t offset, uint64_t length,
		   struct imgc_error *err);

/*
 * Finds the next range of data, [*start, *end), at or after `offset`.  If there is
 * none, both are the file's end.  A file that cannot tell where its holes are is all
 * data.
 */
int imgc_file_next_data(struct imgc_file *file, uint64_t offset, uint64_t *start, uint64_t *end,
			struct imgc_error *err);

/* ------------------------------------------------------------------ engine */

/* A file that extents refer to by index. */
struct imgc_source_file {
	struct imgc_file *file;
	uint64_t nbytes;       /* host ranges of extents must lie inside */
	uint64_t guest_base;   /* compressed blocks start at guest_base + k * block_nbytes */
	uint32_t block_nbytes; /* size of a decompressed block; 0 if it has none */
};

/*
 * Verifies rows from outside: they ascend without gaps over exactly [guest_start,
 * guest_end), and have non-zero lengths, known kinds and known files.  Rows with data
 * start at sectors; the zeros that fill up an incomplete last sector do not.
 * Host ranges lie inside their file, compressed rows inside one block, and no sum
 * wraps.  Otherwise IMGC_OUT_OF_RANGE; err->offset is the row.
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
	IMGC_ZERO_SKIP = 0,	/* leave absent: the target already reads as zeros there */
	IMGC_ZERO_EXPLICIT = 1, /* APPEND: state ZERO; IDENTITY: imgc_file_zero() */
	IMGC_ZERO_STORE = 2,	/* write them like data */
};

/*
 * What becomes of a block that a source stores compressed, alone and whole: it can be
 * taken over if imgc_rewrap() can do that, and the result is no larger than compressing
 * may make it.
 */
enum imgc_reuse {
	IMGC_REUSE_NONE = 0, /* it is compressed again */
	IMGC_REUSE = 1,	     /* it is taken over, others are compressed */
	IMGC_REUSE_ONLY = 2, /* it is taken over, others are STORED */
};

#define IMGC_MAX_STORED_PREFIX_NBYTES (1024u * 1024)

/* How a writer wants its target laid out. */
struct imgc_geometry {
	uint64_t block_nbytes;	       /* power of two, 512 B to 256 MiB */
	uint32_t placing;	       /* enum imgc_placing */
	uint32_t zero_policy;	       /* enum imgc_zero_policy */
	uint64_t guest_base;	       /* IDENTITY: first guest byte of the target, */
	uint64_t host_base;	       /* and its host offset */
	uint32_t stored_alignment;     /* APPEND, STORED: power of two */
	uint32_t compressed_alignment; /* APPEND, COMPRESSED: power of two, 1 = packed */
	uint32_t prefix;	       /* enum imgc_prefix, before COMPRESSED blocks */
	uint32_t store_incompressible; /* 1: a block that does not get smaller is STORED */
	struct imgc_codec_params codec;
	uint64_t sparse_nbytes; /* runs of zeros of this size inside STORED data are not
				   written: the target reads as zeros there; 0: write all */
	/*
	 * APPEND: group_gap_nbytes are left free for the format's table after each
	 * group of `group_nblocks` blocks that has a block with a place.  The gap
	 * starts at a multiple of 512.  0: no groups.
	 */
	uint64_t group_nblocks;
	uint64_t group_gap_nbytes;
	uint64_t guest_nbytes; /* the disk's end; a block that crosses it is padded with
				  zeros if compressed, and cut there if stored */
	/*
	 * APPEND without a codec: so many bytes of one value precede the data of each
	 * STORED block (VHD sector bitmaps).  stored_alignment and the placement's
	 * host_offset refer to the data.
	 */
	uint32_t stored_prefix_nbytes; /* up to IMGC_MAX_STORED_PREFIX_NBYTES */
	uint32_t stored_prefix_byte;   /* 0..255 */
	/*
	 * APPEND, with sparse_nbytes 0: the target has bytes of its own where it is free.
	 * What of a STORED block is not written is zeroed, up to the block's full size.
	 */
	uint32_t clears_blocks;
	uint32_t reuse; /* enum imgc_reuse; with a codec */
	/*
	 * With store_incompressible: 1: the offsets of blocks ascend, for a target that is
	 * written in order.  0: a compressed block may fill up an allocation unit that is
	 * before the STORED block before it.
	 */
	uint32_t packs_in_order;
};

/*
 * How many guest bytes a second the jobs that share this limit may handle together.  Any
 * thread may call these functions at any time.
 */
struct imgc_rate_limit;

int imgc_rate_limit_create(struct imgc_rate_limit **out);

/* No job may use it any more.  NULL is allowed. */
void imgc_rate_limit_destroy(struct imgc_rate_limit *limit);

/* Takes effect at once, also for those who wait.  0, as at first: no limit. */
void imgc_rate_limit_set(struct imgc_rate_limit *limit, uint64_t bytes_per_second);

/* The bytes per second; 0: no limit. */
uint64_t imgc_rate_limit_get(struct imgc_rate_limit *limit);

/*
 * Pauses (1) or goes on (0).  While it is paused, nothing may be handled, at any rate, and
 * nothing is saved up for later.
 */
void imgc_rate_limit_pause(struct imgc_rate_limit *limit, int paused);

/*
 * Waits until nbytes may be handled, but not longer than the timeout.  Returns 1 if they
 * may, else 0.  No second admits more than the rate and one request, or a quarter of the
 * rate if that is more.  0 bytes only wait for the end of a pause.
 */
int imgc_rate_limit_take(struct imgc_rate_limit *limit, uint64_t nbytes, unsigned timeout_ms);

enum imgc_job_kind {
	IMGC_JOB_CONVERT = 0, /* read, zero-test, compress, write */
	IMGC_JOB_COMPARE = 1, /* read two, find the first difference, or all of them */
	IMGC_JOB_DIGEST = 2,  /* read and make the leaves of a checksum */
};

#define IMGC_MAX_THREADS 256u

/* A block is compared with the base as a whole, so it must fit a window in memory. */
#define IMGC_MAX_BASE_BLOCK_NBYTES (4u * 1024 * 1024)

#define IMGC_MIN_GRANULE_NBYTES 512u
#define IMGC_MAX_GRANULE_NBYTES (256u * 1024 * 1024)

/* The bits of a granule in imgc_batch.granules. */
#define IMGC_GRANULE_DIFFERS 1u	 /* the two sides are not the same */
#define IMGC_GRANULE_HAS_DATA 2u /* a byte of batch.extents is not zero there */

/* As io_variant of a job: a ring for files that are read directly, else the default. */
#define IMGC_IO_BY_FILES UINT32_MAX

struct imgc_job_options {
	uint32_t kind;	    /* enum imgc_job_kind */
	uint32_t n_threads; /* 1..IMGC_MAX_THREADS */
	uint32_t zero_variant, inflate_variant, io_variant;
	uint64_t window_nbytes;			/* 0: follows from the geometry */
	const struct imgc_source_file *sources; /* copied */
	size_t n_sources;
	struct imgc_file *target;      /* CONVERT; not owned */
	struct imgc_geometry geometry; /* CONVERT */
	uint64_t next_offset;	       /* APPEND: first free host offset */
	uint32_t has_base;	       /* APPEND: batches may have base_extents; blocks then
					  have IMGC_MAX_BASE_BLOCK_NBYTES at most */
	/*
	 * CONVERT without a base: pieces of 4 KiB that the system cannot read, and
	 * compressed blocks that are broken, become zeros in the target and rows of
	 * imgc_job_bad_ranges().  Otherwise the first of them is an error.
	 */
	uint32_t salvage;
	/*
	 * CONVERT without salvage: data that is stored plain in a source, at an offset
	 * that differs from its place in the target by whole blocks of the file system,
	 * is reflinked instead of written, where the file system can do that.  The
	 * target reads the same either way.  Rows with IMGC_EXTENT_UNREAD are not even
	 * read for that.
	 */
	uint32_t reflink;
	/*
	 * CONVERT without a base and salvage: blocks that are reused are not decompressed
	 * where that is not needed.  So a broken block stays broken, and one
	 * of zeros stays stored.
	 */
	uint32_t trust_blocks;
	/*
	 * APPEND without a codec, base, salvage and reflink: a block of which the extents
	 * state a part as data is STORED whole, zeros included, and other blocks are not,
	 * unless the geometry stores zeros.  So its extents alone say which blocks have a
	 * place.
	 */
	uint32_t stores_data;
	/*
	 * A window waits here before it is read.  What counts is data: holes and zeros
	 * that the extents state are free, unless the target stores them, and so is
	 * what is reflinked without being read.  Not owned; NULL: no limit.
	 */
	struct imgc_rate_limit *rate_limit;
	uint32_t ignores_rate; /* only the pauses of the limit count, not its rate */
	/*
	 * CONVERT and DIGEST: an enum imgc_checksum, whose leaves each batch then receives.
	 * All data is read for that: IMGC_EXTENT_UNREAD and trust_blocks have no effect.
	 * Batches start at multiples of IMGC_CHECKSUM_BLOCK_NBYTES, and end at one or at
	 * the disk's end.
	 */
	uint32_t checksum;
	/*
	 * COMPARE: a power of two.  Every difference is found, and told by the granules
	 * of so many bytes that it is in; there is no first difference then.  0: the job
	 * ends at the first difference.
	 */
	uint64_t granule_nbytes;
};

/* A guest range that could not be read. */
struct imgc_bad_range {
	uint64_t guest_offset, length;
	uint32_t source; /* index of the file in the job */
	int os_errno;	 /* 0: the compressed data is broken */
};

/* One more is IMGC_TOO_MANY_BAD_RANGES. */
#define IMGC_MAX_BAD_RANGES 65536u

/* One part of the virtual disk.  The arrays must stay valid until finish. */
struct imgc_batch {
	uint64_t guest_start, guest_end; /* start is a multiple of block_nbytes */
	const struct imgc_extent *extents;
	size_t n_extents;
	/*
	 * COMPARE: the other side.  CONVERT: the content of the target's backing file.
	 * Blocks equal to it become ABSENT; blocks of zeros that differ from it become
	 * ZERO.  NULL: there is none.  CONVERT accepts it only with options.has_base.
	 */
	const struct imgc_extent *base_extents;
	size_t n_base_extents;
	/* APPEND: zeroed by the caller, ceil((end - start) / block_nbytes) rows. */
	struct imgc_placement *placements;
	size_t n_placements;
	/*
	 * With options.checksum: receives the leaf of each block, IMGC_CHECKSUM_NBYTES
	 * each, ceil((end - start) / IMGC_CHECKSUM_BLOCK_NBYTES) of them.  The last one is
	 * of the bytes up to guest_end.  Else NULL.
	 */
	uint8_t *leaves;
	size_t n_leaves;
	/*
	 * COMPARE with granule_nbytes: zeroed by the caller, one byte for each granule of
	 * which the batch has a part.  Receives IMGC_GRANULE_* of that part, which does
	 * not depend on the number of threads.  After a failure it is undefined.
	 */
	uint8_t *granules;
	size_t n_granules;
	uint32_t n_threads; /* that work on it, at most those of the job; 0: all of them */
};

struct imgc_progress {
	uint64_t bytes_done;	  /* guest bytes finished, zeros included */
	uint64_t bytes_data;	  /* of these, found to be data */
	uint64_t bytes_zero;	  /* of these, found to be zeros */
	uint64_t bytes_read;	  /* host bytes read */
	uint64_t bytes_written;	  /* host bytes written */
	uint64_t bytes_reflinked; /* host bytes reflinked from a source */
	uint64_t bytes_reused;	  /* guest bytes whose compressed blocks were reused */
	uint64_t bytes_trusted;	  /* of these, not decompressed */
};

#define IMGC_NO_DIFFERENCE UINT64_MAX

struct imgc_job;

int imgc_job_create(const struct imgc_job_options *options, struct imgc_job **out,
		    struct imgc_error *err);

/*
 * Checks the batch (imgc_extents_check) and starts its workers.  One at a time.  If one
 * worker is enough, or no thread can be made, the calling thread does the work in
 * imgc_job_wait and imgc_job_finish.
 */
int imgc_job_start(struct imgc_job *job, const struct imgc_batch *batch, struct imgc_error *err);

/* Waits up to timeout_ms for the running batch.  Returns 1 if it has ended, else 0. */
int imgc_job_wait(struct imgc_job *job, int timeout_ms);

/*
 * Joins the batch.  The first error wins.  Windows that cannot be read count in guest
 * order, whichever worker is first, and not at all after a difference.  After IMGC_OK
 * the job may start another batch.
 */
int imgc_job_finish(struct imgc_job *job, struct imgc_error *err);

/* Any thread, at any time.  The values never decrease, and are exact after finish. */
void imgc_job_progress(const struct imgc_job *job, struct imgc_progress *out);

/* Any thread, any number of times.  Returns at once; finish gives IMGC_CANCELLED. */
void imgc_job_cancel(struct imgc_job *job);

/* APPEND: the first free host offset after the finished batches. */
uint64_t imgc_job_next_offset(const struct imgc_job *job);

/*
 * APPEND, between batches: the caller has written tables at the end, up to next_offset.
 * Packing starts again after them.
 */
int imgc_job_set_next_offset(struct imgc_job *job, uint64_t next_offset);

/*
 * APPEND, between batches: compressed blocks that are packed into units go on at `start`,
 * and the unit ends at `end`; both are 0 if none has begun.  A job that is to go on where
 * another one has ended is given that one's.
 */
void imgc_job_packing(const struct imgc_job *job, uint64_t *start, uint64_t *end);

/* IMGC_INVALID_ARGUMENT unless start <= end <= next offset. */
int imgc_job_set_packing(struct imgc_job *job, uint64_t start, uint64_t end);

/*
 * CONVERT, between batches: the disk turns out to have guest_nbytes, no more than the
 * geometry says so far and no less than the batches have, and ends like any other.
 *
 * Also once within a batch, when imgc_job_found_end() is 1: the batch then ends where the
 * disk does.  Placements and leaves behind that mean nothing.
 */
int imgc_job_set_guest_nbytes(struct imgc_job *job, uint64_t guest_nbytes);

/*
 * CONVERT from a stream that was opened with open_ended: 1 if a read has met its end.  The
 * batch waits then, and imgc_job_wait() returns early once, until imgc_job_set_guest_nbytes()
 * has told the size of the disk: at least *disk_end, and zeros fill it up.
 */
int imgc_job_found_end(struct imgc_job *job, uint64_t *disk_end);

/*
 * COMPARE without granules: the lowest guest offset that differs so far, or
 * IMGC_NO_DIFFERENCE.
 */
uint64_t imgc_job_first_difference(const struct imgc_job *job);

/*
 * Between batches, with options.salvage: returns the number of ranges that could not be
 * read so far.  *out receives the rows, ascending, with neighbours of one source and
 * errno joined.  They stay valid until the next start.
 */
size_t imgc_job_bad_ranges(const struct imgc_job *job, const struct imgc_bad_range **out);

/* Cancels and joins a batch that still runs.  NULL is allowed. */
void imgc_job_destroy(struct imgc_job *job);

/* ------------------------------------------------------------------ places */

/* Gives blocks the host offsets that a job gives them, before there is one. */
struct imgc_places;

/* For a geometry that appends, without groups. */
int imgc_places_create(const struct imgc_geometry *geometry, uint64_t next_offset,
		       struct imgc_places **out);

/* NULL is allowed. */
void imgc_places_destroy(struct imgc_places *places);

/*
 * Gives places to the blocks from first_block on, in the order of the disk over all calls.
 * The rows have their states, and COMPRESSED ones their length; host_offset, and the
 * length of STORED ones, are filled in.  IMGC_LIMIT if an offset gets too large; later
 * rows are then as they were.
 */
int imgc_places_give(struct imgc_places *places, uint64_t first_block, struct imgc_placement *rows,
		     size_t n, struct imgc_error *err);

/* As imgc_job_next_offset() and imgc_job_set_next_offset(). */
uint64_t imgc_places_next_offset(const struct imgc_places *places);
int imgc_places_set_next_offset(struct imgc_places *places, uint64_t next_offset);

/* ----------------------------------------------------------- random access */

/*
 * A disk that is open for random access.  It knows extents a table at a time: the rows
 * of one span, which the caller adds when a read needs them.  Tables
 * and decompressed blocks are kept in memory, the least recently used go first.  Any
 * number of threads may call these functions on one disk.
 */
struct imgc_disk;

struct imgc_disk_options {
	const struct imgc_source_file *sources; /* copied; the files are not owned */
	size_t n_sources;
	uint64_t guest_nbytes; /* size of the disk, at most INT64_MAX */
	uint64_t span_nbytes;  /* of a table: power of two, at least 512 */
	uint64_t cache_nbytes; /* of all that is kept; what is in use may exceed it */
	uint32_t inflate_variant, io_variant;
};

int imgc_disk_create(const struct imgc_disk_options *options, struct imgc_disk **out,
		     struct imgc_error *err);

/* No use may be in progress.  NULL is allowed. */
void imgc_disk_destroy(struct imgc_disk *disk);

/*
 * Counts the uses of something that may be closed at any time.  A use lies between
 * enter, which returns 0 after close, and leave, which gets what enter has returned.
 * Exactly one call of close and leave returns 1: when it is closed, and no use is in
 * progress.  Any number of threads may call these functions.
 */
struct imgc_uses;

int imgc_uses_create(struct imgc_uses **out);
void imgc_uses_destroy(struct imgc_uses *uses); /* NULL is allowed */
int imgc_uses_enter(struct imgc_uses *uses);
int imgc_uses_leave(struct imgc_uses *uses, int ticket);
int imgc_uses_close(struct imgc_uses *uses);

/* Whether no use is in progress now. */
int imgc_uses_none(const struct imgc_uses *uses);

/*
 * The epoch now.  imgc_uses_is_over() returns 1 only if every use that began before that
 * call has ended.  Some that began later may count too, but uses that always overlap do
 * not put it off for ever.
 */
uint64_t imgc_uses_epoch(struct imgc_uses *uses);
int imgc_uses_is_over(struct imgc_uses *uses, uint64_t epoch);

/*
 * Ends a use and begins another one at once, also after close; returns its ticket.  For
 * long uses, between parts that have nothing in common.
 */
int imgc_uses_renew(struct imgc_uses *uses, int ticket);

/* Results besides enum imgc_status: there is more to do. */
#define IMGC_MISSING 1	    /* a table must be added first */
#define IMGC_WOULD_WAIT 2   /* with IMGC_DISK_NO_WAIT only */
#define IMGC_UNFINISHED 3   /* call again */
#define IMGC_NOT_IN_PLACE 4 /* imgc_disk_write(): the caller must find a place */

/* Read only what is in memory, and decompress nothing. */
#define IMGC_DISK_NO_WAIT 1u

/* The read goes on after one of the results above; patterns of reads are noticed. */
#define IMGC_DISK_GOES_ON 2u

/* What is left to read.  After IMGC_MISSING its first byte has no table. */
struct imgc_disk_rest {
	uint64_t offset, length;
	uint64_t generation; /* IMGC_MISSING: for imgc_disk_add() */
};

/* Rows that a caller uses, whether they are kept or not, until it drops them. */
struct imgc_table;

/*
 * Reads [offset, offset + length), at any alignment.  `table` comes before those that
 * are kept; NULL: none.  After IMGC_MISSING and IMGC_WOULD_WAIT, *rest is what is left.
 * Errors are those of a job.
 */
int imgc_disk_read(struct imgc_disk *disk, const struct imgc_table *table, uint64_t offset,
		   void *buffer, uint64_t length, unsigned flags, struct imgc_disk_rest *rest,
		   struct imgc_error *err);

/*
 * Writes the front of [offset, offset + length), at any alignment, where this disk's
 * tables have rows of DATA: such bytes may be overwritten where they are, and whoever
 * changes that makes the disk forget the table first.  The tables of a disk that is
 * written say nothing else, so it is not read.
 *
 * Returns IMGC_OK after all of it.  After IMGC_MISSING, IMGC_UNFINISHED (about 50 ms have
 * passed) and IMGC_NOT_IN_PLACE, *rest is what is left.  IMGC_NOT_IN_PLACE also means that
 * writing was stopped, or that a file refuses writes.  After an error the range has old
 * and new bytes.
 *
 * A write that has begun may end at the place where it found its bytes to be, after the
 * table was forgotten.  So that place is used for nothing else until the caller's use of
 * the disk (struct imgc_uses) has ended, or writing was stopped.
 */
int imgc_disk_write(struct imgc_disk *disk, uint64_t offset, const void *buffer, uint64_t length,
		    struct imgc_disk_rest *rest, struct imgc_error *err);

/*
 * From now on nothing is written, until imgc_disk_resume_writing().  The other one waits
 * up to timeout_ms for writes in progress; it returns 1 if none is, else 0.
 */
void imgc_disk_stop_writing(struct imgc_disk *disk);
int imgc_disk_await_writes(struct imgc_disk *disk, unsigned timeout_ms);
void imgc_disk_resume_writing(struct imgc_disk *disk);

/* The guest range of the table that has `offset`, which is inside the disk. */
void imgc_disk_span(const struct imgc_disk *disk, uint64_t offset, uint64_t *start, uint64_t *end);

/*
 * Checks rows of [start, end) (imgc_extents_check) and copies them.  Those of exactly
 * one span are kept for all reads, unless the table was forgotten since `generation`.
 */
int imgc_disk_add(struct imgc_disk *disk, uint64_t start, uint64_t end, uint64_t generation,
		  const struct imgc_extent *rows, size_t n, struct imgc_table **out,
		  struct imgc_error *err);

/* The table of `offset`, if it is kept, or NULL: *generation is then for imgc_disk_add(). */
struct imgc_table *imgc_disk_find(struct imgc_disk *disk, uint64_t offset, uint64_t *generation);

/* Ends the caller's use of a table. */
void imgc_disk_drop(struct imgc_disk *disk, struct imgc_table *table);

/*
 * Forgets the tables of [start, end), which have changed.  Reads in progress may still use
 * them.  Blocks are known by their place in the file and are kept, unless the range is
 * the whole disk.  A long range may be taken for the whole disk.
 */
void imgc_disk_forget(struct imgc_disk *disk, uint64_t start, uint64_t end);

struct imgc_cache_stats {
	uint64_t n_entries, nbytes; /* tables and blocks that are kept */
	uint64_t n_hits, n_misses;  /* how often one was looked for */
};

void imgc_disk_stats(struct imgc_disk *disk, struct imgc_cache_stats *out);

/* One range of a disk and where it goes. */
struct imgc_disk_request {
	uint64_t offset;
	void *buffer;
	uint64_t length;
};

/* Several ranges that are read together: in the order of their places, in parallel. */
struct imgc_gather;

/* The requests are copied.  They lie inside the disk; buffers do not overlap. */
int imgc_gather_create(struct imgc_disk *disk, const struct imgc_disk_request *requests, size_t n,
		       struct imgc_gather **out, struct imgc_error *err);

/*
 * Reads the next part of the requests, on up to n_threads threads (1..IMGC_MAX_THREADS)
 * which end before it returns.  `table` is as for imgc_disk_read().  IMGC_OK: all has
 * been read.  IMGC_UNFINISHED: call again; a call takes about 50 ms.  IMGC_MISSING:
 * call again with the table of *rest, which is the rest of one request.  Of several
 * errors, the first in the order of places is returned.
 */
int imgc_gather_run(struct imgc_gather *gather, const struct imgc_table *table, unsigned n_threads,
		    struct imgc_disk_rest *rest, struct imgc_error *err);

/* Whether the next call starts from tables alone: no rows are held for it. */
int imgc_gather_is_between_rounds(const struct imgc_gather *gather);

/* NULL is allowed. */
void imgc_gather_destroy(struct imgc_gather *gather);

#ifdef __cplusplus
}
#endif

#endif /* IMGC_H */
