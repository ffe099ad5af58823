# The declarations of imgc.h that the binding uses, in its order.

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "imgc.h" nogil:
    enum:
        IMGC_OK
        IMGC_IO
        IMGC_INVALID_ARGUMENT
        IMGC_OUT_OF_RANGE
        IMGC_CORRUPT
        IMGC_UNSUPPORTED
        IMGC_LIMIT
        IMGC_NO_MEMORY
        IMGC_CANCELLED
        IMGC_BAD_GRAIN_MARKER
        IMGC_PAST_END
        IMGC_TOO_MANY_BAD_RANGES

        IMGC_OP_ZERO
        IMGC_OP_CRC32C
        IMGC_OP_INFLATE
        IMGC_OP_IO
        IMGC_N_OPERATIONS

        IMGC_SELECT_OK
        IMGC_SELECT_UNKNOWN
        IMGC_SELECT_NOT_BUILT
        IMGC_SELECT_NO_CPU

        IMGC_CHECKSUM_NONE
        IMGC_CHECKSUM_CRC32C
        IMGC_N_CHECKSUMS
        IMGC_CHECKSUM_NBYTES
        IMGC_CHECKSUM_BLOCK_NBYTES

        IMGC_TABLE_MAX_RULES
        IMGC_JOB_CONVERT
        IMGC_JOB_COMPARE
        IMGC_JOB_DIGEST

    const uint32_t IMGC_NO_SOURCE
    const uint32_t IMGC_GRANULE_DIFFERS
    const uint32_t IMGC_GRANULE_HAS_DATA
    const uint32_t IMGC_TARGET
    const uint32_t IMGC_MAX_BAD_RANGES
    const uint32_t IMGC_MAX_THREADS
    const uint32_t IMGC_IO_BY_FILES
    const uint64_t IMGC_NO_DIFFERENCE

    struct imgc_error:
        int status
        int os_errno
        uint64_t offset
        uint32_t source
        const char *op

    struct imgc_variant_info:
        const char *name
        int built
        int runnable
        int is_default

    const char *imgc_operation_name(unsigned op)
    unsigned imgc_variant_count(unsigned op)
    int imgc_variant_describe(unsigned op, unsigned index, imgc_variant_info *info)
    int imgc_variant_select(unsigned op, const char *name, uint32_t *id)
    int imgc_is_zero(uint32_t variant, const void *data, size_t nbytes)
    uint32_t imgc_crc32c(uint32_t variant, uint32_t crc, const void *data, size_t nbytes)

    int IMGC_XXH64_STRIPE_NBYTES

    struct imgc_xxh64:
        uint64_t lanes[4]
        uint64_t nbytes

    void imgc_xxh64_begin(imgc_xxh64 *hash)
    void imgc_xxh64_add(imgc_xxh64 *hash, const void *data, size_t nbytes)
    uint64_t imgc_xxh64_end(const imgc_xxh64 *hash)

    const char *imgc_checksum_name(unsigned checksum)
    int imgc_checksum_is_built(unsigned checksum)

    struct imgc_hasher:
        pass

    int imgc_hasher_create(uint32_t checksum, uint64_t block_nbytes, uint32_t zero_variant,
                           imgc_hasher **out)
    void imgc_hasher_destroy(imgc_hasher *hasher)
    int imgc_hasher_update(imgc_hasher *hasher, const void *data, size_t nbytes)
    int imgc_hasher_zeros(imgc_hasher *hasher, uint64_t nbytes)
    int imgc_hasher_leaves(imgc_hasher *hasher, const void *leaves, uint64_t nbytes)
    int imgc_hasher_leaf(imgc_hasher *hasher, const void *block, size_t nbytes, uint8_t *out)
    int imgc_hasher_digest(imgc_hasher *hasher, uint8_t *out)

    struct imgc_codec_params:
        uint32_t codec
        uint32_t engine
        int32_t level
        uint32_t window_bits

    struct imgc_extent:
        uint64_t guest_offset
        uint64_t length
        uint64_t host_offset
        uint64_t host_length
        uint32_t file
        uint16_t kind
        uint16_t flags

    struct imgc_placement:
        uint64_t host_offset
        uint32_t length
        uint32_t state

    struct imgc_table_rule:
        uint64_t mask
        uint64_t value
        uint32_t kind

    struct imgc_table_format:
        uint32_t entry_nbytes
        uint32_t big_endian
        uint64_t block_nbytes
        uint64_t offset_mask
        uint32_t offset_rshift
        uint32_t offset_lshift
        uint64_t host_base
        uint64_t reserved_mask
        uint32_t default_kind
        uint32_t flags
        uint64_t compressed_mask
        uint32_t length_shift
        uint64_t length_mask
        uint64_t compressed_bound
        uint32_t n_rules
        imgc_table_rule rules[8]
        uint64_t absent_entry
        uint64_t zero_entry
        uint64_t stored_bits
        uint64_t compressed_bits

    struct imgc_table_span:
        uint64_t guest_offset
        uint64_t guest_end
        uint64_t file_nbytes
        uint32_t file
        uint32_t salvage

    int imgc_table_decode(const imgc_table_format *format, const void *entries, size_t n_entries,
                          const imgc_table_span *span, imgc_extent *out, size_t capacity,
                          size_t *n_out, imgc_error *err)
    int imgc_table_encode(const imgc_table_format *format, const imgc_placement *placements,
                          size_t n, void *entries, imgc_error *err)

    struct imgc_grain:
        uint64_t number, offset, end

    struct imgc_grain_limits:
        uint64_t n_grains
        uint32_t grain_nsectors, max_nbytes

    size_t imgc_grains_walk(const imgc_grain_limits *limits, const void *bytes, size_t nbytes,
                            uint64_t offset, uint64_t most_nbytes, imgc_grain *out,
                            size_t capacity)

    struct imgc_file:
        pass

    int imgc_file_open_fd(int fd, imgc_file **out, imgc_error *err)
    int imgc_file_open_memory(void *data, uint64_t nbytes, imgc_file **out)
    int imgc_file_open_null(imgc_file **out)
    int imgc_file_open_ordered(int fd, imgc_file **out, imgc_error *err)

    struct imgc_stream_options:
        int fd
        const void *head
        uint64_t head_nbytes
        uint32_t open_ended, tail_nbytes

    int imgc_file_open_stream(const imgc_stream_options *options, imgc_file **out,
                              imgc_error *err)
    int imgc_file_stream_end(imgc_file *file, uint64_t *disk_end)
    uint64_t imgc_file_stream_position(imgc_file *file)
    uint64_t imgc_file_stream_rest(imgc_file *file, void *out, uint64_t capacity)
    int imgc_file_put(imgc_file *file, const void *data, uint64_t nbytes, uint64_t offset,
                      imgc_error *err)
    void imgc_file_await_room(imgc_file *file, int timeout_ms)
    void imgc_file_close(imgc_file *file)
    int imgc_file_take_written(imgc_file *file)
    void imgc_file_refuse_writes(imgc_file *file)
    int imgc_file_drop_behind(imgc_file *file, imgc_error *err)
    uint64_t imgc_file_kept_nbytes(const imgc_file *file)
    int imgc_file_go_direct(imgc_file *file, int direct_fd, imgc_error *err)
    void imgc_file_drop_rest(imgc_file *file)
    void imgc_file_note_read(imgc_file *file, uint64_t offset, uint64_t length)
    int imgc_file_note_written(imgc_file *file, uint64_t offset, uint64_t length,
                               imgc_error *err)
    int imgc_file_zero(imgc_file *file, uint64_t offset, uint64_t length, imgc_error *err)
    int imgc_file_next_data(imgc_file *file, uint64_t offset, uint64_t *start, uint64_t *end,
                          imgc_error *err)

    struct imgc_source_file:
        imgc_file *file
        uint64_t nbytes
        uint64_t guest_base
        uint32_t block_nbytes

    struct imgc_geometry:
        uint64_t block_nbytes
        uint32_t placing
        uint32_t zero_policy
        uint64_t guest_base
        uint64_t host_base
        uint32_t stored_alignment
        uint32_t compressed_alignment
        uint32_t prefix
        uint32_t store_incompressible
        imgc_codec_params codec
        uint64_t sparse_nbytes
        uint64_t group_nblocks
        uint64_t group_gap_nbytes
        uint64_t guest_nbytes
        uint32_t stored_prefix_nbytes
        uint32_t stored_prefix_byte
        uint32_t clears_blocks
        uint32_t reuse
        uint32_t packs_in_order

    struct imgc_rate_limit:
        pass

    int imgc_rate_limit_create(imgc_rate_limit **out)
    void imgc_rate_limit_destroy(imgc_rate_limit *limit)
    void imgc_rate_limit_set(imgc_rate_limit *limit, uint64_t bytes_per_second)
    void imgc_rate_limit_pause(imgc_rate_limit *limit, int paused)
    int imgc_rate_limit_take(imgc_rate_limit *limit, uint64_t nbytes, unsigned timeout_ms)

    struct imgc_job_options:
        uint32_t kind
        uint32_t n_threads
        uint32_t zero_variant
        uint32_t inflate_variant
        uint32_t io_variant
        uint64_t window_nbytes
        const imgc_source_file *sources
        size_t n_sources
        imgc_file *target
        imgc_geometry geometry
        uint64_t next_offset
        uint32_t has_base
        uint32_t salvage
        uint32_t reflink
        uint32_t trust_blocks
        uint32_t stores_data
        imgc_rate_limit *rate_limit
        uint32_t ignores_rate
        uint32_t checksum
        uint64_t granule_nbytes

    struct imgc_bad_range:
        uint64_t guest_offset
        uint64_t length
        uint32_t source
        int os_errno

    struct imgc_batch:
        uint64_t guest_start
        uint64_t guest_end
        const imgc_extent *extents
        size_t n_extents
        const imgc_extent *base_extents
        size_t n_base_extents
        imgc_placement *placements
        size_t n_placements
        uint8_t *leaves
        size_t n_leaves
        uint8_t *granules
        size_t n_granules
        uint32_t n_threads

    struct imgc_progress:
        uint64_t bytes_done
        uint64_t bytes_data
        uint64_t bytes_zero
        uint64_t bytes_read
        uint64_t bytes_written
        uint64_t bytes_reflinked
        uint64_t bytes_reused
        uint64_t bytes_trusted

    struct imgc_job:
        pass

    int imgc_job_create(const imgc_job_options *options, imgc_job **out, imgc_error *err)
    int imgc_job_start(imgc_job *job, const imgc_batch *batch, imgc_error *err)
    int imgc_job_wait(imgc_job *job, int timeout_ms)
    int imgc_job_finish(imgc_job *job, imgc_error *err)
    void imgc_job_progress(const imgc_job *job, imgc_progress *out)
    void imgc_job_cancel(imgc_job *job)
    uint64_t imgc_job_next_offset(const imgc_job *job)
    int imgc_job_set_next_offset(imgc_job *job, uint64_t next_offset)
    void imgc_job_packing(const imgc_job *job, uint64_t *start, uint64_t *end)
    int imgc_job_set_packing(imgc_job *job, uint64_t start, uint64_t end)
    int imgc_job_set_guest_nbytes(imgc_job *job, uint64_t guest_nbytes)
    int imgc_job_found_end(imgc_job *job, uint64_t *disk_end)
    uint64_t imgc_job_first_difference(const imgc_job *job)
    size_t imgc_job_bad_ranges(const imgc_job *job, const imgc_bad_range **out)
    void imgc_job_destroy(imgc_job *job)

    struct imgc_places:
        pass

    int imgc_places_create(const imgc_geometry *geometry, uint64_t next_offset,
                           imgc_places **out)
    void imgc_places_destroy(imgc_places *places)
    int imgc_places_give(imgc_places *places, uint64_t first_block, imgc_placement *rows,
                         size_t n, imgc_error *err)
    uint64_t imgc_places_next_offset(const imgc_places *places)
    int imgc_places_set_next_offset(imgc_places *places, uint64_t next_offset)

    struct imgc_disk:
        pass
    struct imgc_uses:
        pass
    struct imgc_table:
        pass
    struct imgc_gather:
        pass

    enum:
        IMGC_MISSING
        IMGC_WOULD_WAIT
        IMGC_UNFINISHED
        IMGC_NOT_IN_PLACE
        IMGC_DISK_NO_WAIT
        IMGC_DISK_GOES_ON

    struct imgc_disk_options:
        const imgc_source_file *sources
        size_t n_sources
        uint64_t guest_nbytes, span_nbytes, cache_nbytes
        uint32_t inflate_variant, io_variant

    struct imgc_disk_rest:
        uint64_t offset, length, generation

    struct imgc_cache_stats:
        uint64_t n_entries, nbytes, n_hits, n_misses

    struct imgc_disk_request:
        uint64_t offset
        void *buffer
        uint64_t length

    int imgc_disk_create(const imgc_disk_options *options, imgc_disk **out, imgc_error *err)
    void imgc_disk_destroy(imgc_disk *disk)
    int imgc_uses_create(imgc_uses **out)
    void imgc_uses_destroy(imgc_uses *uses)
    int imgc_uses_enter(imgc_uses *uses)
    int imgc_uses_leave(imgc_uses *uses, int ticket)
    int imgc_uses_close(imgc_uses *uses)
    int imgc_uses_none(const imgc_uses *uses)
    uint64_t imgc_uses_epoch(imgc_uses *uses)
    int imgc_uses_is_over(imgc_uses *uses, uint64_t epoch)
    int imgc_uses_renew(imgc_uses *uses, int ticket)
    int imgc_disk_read(imgc_disk *disk, const imgc_table *table, uint64_t offset, void *buffer,
                       uint64_t length, unsigned flags, imgc_disk_rest *rest, imgc_error *err)
    void imgc_disk_span(const imgc_disk *disk, uint64_t offset, uint64_t *start, uint64_t *end)
    int imgc_disk_add(imgc_disk *disk, uint64_t start, uint64_t end, uint64_t generation,
                      const imgc_extent *rows, size_t n, imgc_table **out, imgc_error *err)
    imgc_table *imgc_disk_find(imgc_disk *disk, uint64_t offset, uint64_t *generation)
    void imgc_disk_drop(imgc_disk *disk, imgc_table *table)
    void imgc_disk_forget(imgc_disk *disk, uint64_t start, uint64_t end)
    int imgc_disk_write(imgc_disk *disk, uint64_t offset, const void *buffer, uint64_t length,
                        imgc_disk_rest *rest, imgc_error *err)
    void imgc_disk_stop_writing(imgc_disk *disk)
    int imgc_disk_await_writes(imgc_disk *disk, unsigned timeout_ms)
    void imgc_disk_resume_writing(imgc_disk *disk)
    void imgc_disk_stats(imgc_disk *disk, imgc_cache_stats *out)
    int imgc_gather_create(imgc_disk *disk, const imgc_disk_request *requests, size_t n,
                           imgc_gather **out, imgc_error *err)
    int imgc_gather_run(imgc_gather *gather, const imgc_table *table, unsigned n_threads,
                        imgc_disk_rest *rest, imgc_error *err)
    int imgc_gather_is_between_rounds(const imgc_gather *gather)
    void imgc_gather_destroy(imgc_gather *gather)
