# cython: language_level=3, binding=True, embedsignature=False
"""The binding to the native core: thin, no algorithm (see native/include/imgc.h)."""

from enum import IntEnum

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_CheckSignals
from cpython.long cimport PyLong_AsLongLongAndOverflow, PyLong_CheckExact
from libc.errno cimport EAGAIN
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memset
from posix.types cimport pid_t
from posix.unistd cimport getpid, usleep

from imgcore cimport _native as n

NO_SOURCE = n.IMGC_NO_SOURCE
GRANULE_DIFFERS = n.IMGC_GRANULE_DIFFERS
GRANULE_HAS_DATA = n.IMGC_GRANULE_HAS_DATA
TARGET = n.IMGC_TARGET
MAX_BAD_RANGES = n.IMGC_MAX_BAD_RANGES
MAX_THREADS = n.IMGC_MAX_THREADS
CHECKSUM_BLOCK_NBYTES = n.IMGC_CHECKSUM_BLOCK_NBYTES
CHECKSUM_NBYTES = n.IMGC_CHECKSUM_NBYTES

cdef int POLL_MS = 50
# Hashed in one call, about 50 ms; then signals are looked for.
cdef uint64_t HASH_NBYTES = 64 << 20

ctypedef packed struct extent_row:
    uint64_t guest_offset
    uint64_t length
    uint64_t host_offset
    uint64_t host_length
    uint32_t file
    uint16_t kind
    uint16_t flags

ctypedef packed struct placement_row:
    uint64_t host_offset
    uint32_t length
    uint32_t state

ctypedef packed struct grain_row:
    uint64_t number
    uint64_t offset
    uint64_t end


class Status(IntEnum):
    """The result of a native call: ``enum imgc_status``."""

    OK = n.IMGC_OK
    IO = n.IMGC_IO
    INVALID_ARGUMENT = n.IMGC_INVALID_ARGUMENT
    OUT_OF_RANGE = n.IMGC_OUT_OF_RANGE
    CORRUPT = n.IMGC_CORRUPT
    UNSUPPORTED = n.IMGC_UNSUPPORTED
    LIMIT = n.IMGC_LIMIT
    NO_MEMORY = n.IMGC_NO_MEMORY
    CANCELLED = n.IMGC_CANCELLED
    BAD_GRAIN_MARKER = n.IMGC_BAD_GRAIN_MARKER
    PAST_END = n.IMGC_PAST_END
    TOO_MANY_BAD_RANGES = n.IMGC_TOO_MANY_BAD_RANGES


class CoreError(Exception):
    """A native call failed: the attributes are those of ``struct imgc_error``."""

    def __init__(self, status, os_errno, offset, source, op):
        super().__init__(f"{op}: {status.name}, errno {os_errno}, offset {offset}")
        self.status = status
        self.os_errno = os_errno
        self.offset = offset
        self.source = source
        self.op = op


cdef int check(int status, n.imgc_error *err) except -1:
    if status == n.IMGC_OK:
        return 0
    if status == n.IMGC_NO_MEMORY:
        raise MemoryError()
    op = err.op.decode("ascii") if err.op != NULL else "core"
    raise CoreError(Status(status), err.os_errno, err.offset, err.source, op)


cdef int check_call(int status, op) except -1:
    """Raise for the status of a call that fills no error."""
    if status == n.IMGC_OK:
        return 0
    if status == n.IMGC_NO_MEMORY:
        raise MemoryError()
    raise CoreError(Status(status), 0, 0, n.IMGC_NO_SOURCE, op)


cdef uint32_t select(unsigned op, name) except? 0xFFFFFFFF:
    """Find a variant by name; one that does not exist or run here is an error."""
    cdef uint32_t variant = 0
    cdef bytes encoded
    cdef const char *wanted = NULL
    if name is not None:
        encoded = name.encode()
        wanted = encoded
    cdef int outcome = n.imgc_variant_select(op, wanted, &variant)
    if outcome == n.IMGC_SELECT_OK:
        return variant
    operation = n.imgc_operation_name(op).decode()
    if outcome == n.IMGC_SELECT_UNKNOWN:
        raise ValueError(f"no variant {name!r} of {operation}")
    reason = "not in this build" if outcome == n.IMGC_SELECT_NOT_BUILT else "not runnable here"
    raise RuntimeError(f"variant {name!r} of {operation} is {reason}")


def variants():
    """Return the variants of each operation: name, built, runnable, default."""
    cdef n.imgc_variant_info info
    result = {}
    for op in range(n.IMGC_N_OPERATIONS):
        rows = []
        for index in range(n.imgc_variant_count(op)):
            n.imgc_variant_describe(op, index, &info)
            rows.append(
                {
                    "name": info.name.decode(),
                    "built": bool(info.built),
                    "runnable": bool(info.runnable),
                    "default": bool(info.is_default),
                }
            )
        result[n.imgc_operation_name(op).decode()] = rows
    return result


def is_zero(const uint8_t[::1] data, variant=None):
    """Return whether every byte is zero."""
    cdef uint32_t chosen = select(n.IMGC_OP_ZERO, variant)
    cdef size_t nbytes = data.shape[0]
    cdef int result
    if nbytes == 0:
        return True
    with nogil:
        result = n.imgc_is_zero(chosen, &data[0], nbytes)
    return bool(result)


def crc32c(const uint8_t[::1] data, uint32_t crc=0, variant=None):
    """Return the CRC-32C of a buffer, continued from ``crc``."""
    cdef uint32_t chosen = select(n.IMGC_OP_CRC32C, variant)
    cdef size_t nbytes = data.shape[0]
    if nbytes == 0:
        return crc
    with nogil:
        crc = n.imgc_crc32c(chosen, crc, &data[0], nbytes)
    return crc


cdef class Xxh64:
    """XXH64 of bytes that come in order: ``struct imgc_xxh64``."""

    cdef n.imgc_xxh64 hash

    def __cinit__(self, state=None):
        n.imgc_xxh64_begin(&self.hash)
        if state is not None:
            *lanes, self.hash.nbytes = state
            for i in range(4):
                self.hash.lanes[i] = lanes[i]

    def update(self, const uint8_t[::1] data):
        """Add bytes."""
        cdef size_t nbytes = data.shape[0]
        if nbytes:
            with nogil:
                n.imgc_xxh64_add(&self.hash, &data[0], nbytes)

    @property
    def state(self):
        """What another one can be made with; whole stripes of 32 bytes were added."""
        if self.hash.nbytes % n.IMGC_XXH64_STRIPE_NBYTES:
            raise ValueError("inside a stripe")
        return (*[self.hash.lanes[i] for i in range(4)], self.hash.nbytes)

    def digest(self):
        """Return the hash of what was added so far, as a number."""
        return n.imgc_xxh64_end(&self.hash)


def checksum_algorithms():
    """Return the names of the checksum algorithms in this build.

    Without "crc32c", which jobs and hashers take as well: it is no checksum for users.
    """
    return tuple(n.imgc_checksum_name(i).decode()
                 for i in range(n.IMGC_CHECKSUM_NONE + 1, n.IMGC_N_CHECKSUMS)
                 if n.imgc_checksum_is_built(i) and i != n.IMGC_CHECKSUM_CRC32C)


cdef uint32_t checksum_of(algorithm) except 0:
    """Find a checksum algorithm by name."""
    for i in range(n.IMGC_CHECKSUM_NONE + 1, n.IMGC_N_CHECKSUMS):
        if n.imgc_checksum_name(i).decode() == algorithm:
            if not n.imgc_checksum_is_built(i):
                raise RuntimeError(f"checksum algorithm {algorithm!r} is not in this build")
            return i
    raise ValueError(f"no checksum algorithm {algorithm!r}")


cdef class Hasher:
    """The checksum of a disk whose bytes come in order: ``struct imgc_hasher``.

    One thread may use it at a time.
    """

    cdef n.imgc_hasher *handle
    cdef uint64_t block_nbytes

    def __cinit__(self, algorithm="sha256", uint64_t block_nbytes=CHECKSUM_BLOCK_NBYTES):
        self.handle = NULL
        self.block_nbytes = block_nbytes
        cdef uint32_t checksum = checksum_of(algorithm)
        cdef uint32_t variant = select(n.IMGC_OP_ZERO, None)
        cdef int status
        with nogil:
            status = n.imgc_hasher_create(checksum, block_nbytes, variant, &self.handle)
        check_call(status, "hasher")

    def update(self, const uint8_t[::1] data):
        """Add bytes of the disk."""
        cdef size_t nbytes = data.shape[0], done = 0, some
        cdef int status = n.IMGC_OK
        while done < nbytes:
            some = min(nbytes - done, HASH_NBYTES)
            with nogil:
                status = n.imgc_hasher_update(self.handle, &data[done], some)
            check_call(status, "hasher")
            done += some
            PyErr_CheckSignals()

    def zeros(self, uint64_t nbytes):
        """Add zeros, as fast as their leaves can be hashed."""
        cdef uint64_t some
        cdef int status = n.IMGC_OK
        while nbytes:
            some = min(nbytes, HASH_NBYTES // n.IMGC_CHECKSUM_NBYTES * self.block_nbytes)
            with nogil:
                status = n.imgc_hasher_zeros(self.handle, some)
            check_call(status, "hasher")
            nbytes -= some
            PyErr_CheckSignals()

    def add_leaves(self, const uint8_t[::1] leaves, uint64_t nbytes):
        """Add ``nbytes`` of the disk by the leaves of their blocks.

        They start with a block.  After a block that is not whole nothing can follow.
        """
        cdef uint64_t n_blocks = nbytes // self.block_nbytes + (nbytes % self.block_nbytes > 0)
        cdef int status
        if <uint64_t>leaves.shape[0] != n_blocks * n.IMGC_CHECKSUM_NBYTES:
            raise ValueError(f"{leaves.shape[0]} bytes of leaves for {n_blocks} blocks")
        if n_blocks == 0:
            return
        with nogil:
            status = n.imgc_hasher_leaves(self.handle, &leaves[0], nbytes)
        check_call(status, "hasher")

    def leaf(self, const uint8_t[::1] block):
        """Return the leaf of a block, which is not added."""
        cdef size_t nbytes = block.shape[0]
        if nbytes == 0:
            raise ValueError("an empty block has no leaf")
        leaf = PyBytes_FromStringAndSize(NULL, n.IMGC_CHECKSUM_NBYTES)
        check_call(n.imgc_hasher_leaf(self.handle, &block[0], nbytes,
                                      <uint8_t *>PyBytes_AS_STRING(leaf)), "hasher")
        return leaf

    def digest(self):
        """Return the checksum of what was added so far."""
        digest = PyBytes_FromStringAndSize(NULL, n.IMGC_CHECKSUM_NBYTES)
        check_call(n.imgc_hasher_digest(self.handle, <uint8_t *>PyBytes_AS_STRING(digest)),
                   "hasher")
        return digest

    def __dealloc__(self):
        n.imgc_hasher_destroy(self.handle)


def extent_table(rows):
    """Return extents, given as tuples of at least one row, as a table for `Job.start`."""
    cdef size_t count = len(rows)
    cdef extent_row *table = <extent_row *>malloc(count * sizeof(extent_row))
    if table == NULL:
        raise MemoryError()
    cdef cython.view.array result = <extent_row[:count]>table
    result.callback_free_data = free
    for index, (guest_offset, length, host_offset, host_length, file, kind, flags) in enumerate(
            rows):
        table[index].guest_offset = guest_offset
        table[index].length = length
        table[index].host_offset = host_offset
        table[index].host_length = host_length
        table[index].file = file
        table[index].kind = kind
        table[index].flags = flags
    return result


def walk_grains(const uint8_t[::1] view not None, uint64_t offset, grain_row[::1] out not None, *,
                uint64_t n_grains, uint32_t grain_nsectors, uint32_t max_nbytes,
                uint64_t most_nbytes):
    """Return how many grains were found by their markers: ``imgc_grains_walk``."""
    cdef n.imgc_grain_limits limits
    limits.n_grains = n_grains
    limits.grain_nsectors = grain_nsectors
    limits.max_nbytes = max_nbytes
    if not view.shape[0] or not out.shape[0]:
        return 0
    return n.imgc_grains_walk(&limits, &view[0], view.shape[0], offset, most_nbytes,
                              <n.imgc_grain *>&out[0], out.shape[0])


cdef class TableFormat:
    """The layout of a table's entries: ``struct imgc_table_format``."""

    cdef n.imgc_table_format format

    def __init__(self, *, uint32_t entry_nbytes, bint big_endian, uint64_t block_nbytes,
                 uint64_t offset_mask, uint32_t offset_rshift=0, uint32_t offset_lshift=0,
                 uint64_t host_base=0, uint64_t reserved_mask=0, uint32_t default_kind=2,
                 uint32_t flags=0, uint64_t compressed_mask=0, uint32_t length_shift=0,
                 uint64_t length_mask=0, uint64_t compressed_bound=0, rules=(),
                 uint64_t absent_entry=0, uint64_t zero_entry=0, uint64_t stored_bits=0,
                 uint64_t compressed_bits=0):
        memset(&self.format, 0, sizeof(self.format))
        if len(rules) > n.IMGC_TABLE_MAX_RULES:
            raise ValueError(f"{len(rules)} table rules, at most {n.IMGC_TABLE_MAX_RULES}")
        self.format.entry_nbytes = entry_nbytes
        self.format.big_endian = big_endian
        self.format.block_nbytes = block_nbytes
        self.format.offset_mask = offset_mask
        self.format.offset_rshift = offset_rshift
        self.format.offset_lshift = offset_lshift
        self.format.host_base = host_base
        self.format.reserved_mask = reserved_mask
        self.format.default_kind = default_kind
        self.format.flags = flags
        self.format.compressed_mask = compressed_mask
        self.format.length_shift = length_shift
        self.format.length_mask = length_mask
        self.format.compressed_bound = compressed_bound
        self.format.n_rules = <uint32_t>len(rules)
        for index, (mask, value, kind) in enumerate(rules):
            self.format.rules[index].mask = mask
            self.format.rules[index].value = value
            self.format.rules[index].kind = kind
        self.format.absent_entry = absent_entry
        self.format.zero_entry = zero_entry
        self.format.stored_bits = stored_bits
        self.format.compressed_bits = compressed_bits

    def decode(self, const uint8_t[::1] entries, extent_row[::1] out, *, uint64_t guest_offset,
               uint64_t guest_end, uint64_t file_nbytes, uint32_t file, bint salvage=False):
        """Decode table entries into ``out`` and return the number of rows."""
        cdef n.imgc_table_span span
        cdef n.imgc_error err
        cdef size_t n_out = 0
        cdef size_t n_entries = entries.shape[0] // self.format.entry_nbytes
        cdef size_t capacity = out.shape[0]
        cdef int status
        if n_entries == 0 or capacity == 0:
            return 0
        span.guest_offset = guest_offset
        span.guest_end = guest_end
        span.file_nbytes = file_nbytes
        span.file = file
        span.salvage = salvage
        with nogil:
            status = n.imgc_table_decode(&self.format, &entries[0], n_entries, &span,
                                         <n.imgc_extent *>&out[0], capacity, &n_out, &err)
        check(status, &err)
        return n_out

    def encode(self, const placement_row[::1] placements, uint8_t[::1] entries):
        """Encode placements into ``entries``, one for one."""
        cdef n.imgc_error err
        cdef size_t count = placements.shape[0]
        cdef int status
        if <size_t>entries.shape[0] != count * self.format.entry_nbytes:
            raise ValueError("the buffer does not have one entry per placement")
        if count == 0:
            return
        with nogil:
            status = n.imgc_table_encode(&self.format, <const n.imgc_placement *>&placements[0],
                                         count, &entries[0], &err)
        check(status, &err)


cdef class File:
    """A file of the engine.  The caller owns the descriptor behind it."""

    cdef n.imgc_file *handle
    cdef Py_buffer view
    cdef bint has_view, is_closed

    def __cinit__(self):
        self.handle = NULL
        self.has_view = self.is_closed = False

    def __init__(self):
        raise TypeError("use File.from_fd, File.from_memory or File.null")

    @staticmethod
    def from_fd(int fd):
        """Wrap an open descriptor, which the caller closes."""
        cdef File file = File.__new__(File)
        cdef n.imgc_error err
        check(n.imgc_file_open_fd(fd, &file.handle, &err), &err)
        return file

    @staticmethod
    def from_memory(buffer, bint writable=False):
        """Wrap a contiguous buffer, and hold it until close."""
        cdef File file = File.__new__(File)
        cdef n.imgc_error err
        memset(&err, 0, sizeof(err))
        PyObject_GetBuffer(buffer, &file.view, PyBUF_WRITABLE if writable else PyBUF_SIMPLE)
        file.has_view = True
        check(n.imgc_file_open_memory(file.view.buf, file.view.len, &file.handle), &err)
        return file

    @staticmethod
    def null():
        """Return a file that forgets every write and reads as zeros."""
        cdef File file = File.__new__(File)
        cdef n.imgc_error err
        memset(&err, 0, sizeof(err))
        check(n.imgc_file_open_null(&file.handle), &err)
        return file

    @staticmethod
    def from_ordered(int fd):
        """Wrap a descriptor that is written in order; the caller closes it."""
        cdef File file = File.__new__(File)
        cdef n.imgc_error err
        check(n.imgc_file_open_ordered(fd, &file.handle, &err), &err)
        return file

    @staticmethod
    def from_stream(int fd, const uint8_t[::1] head not None, *, bint open_ended,
                    uint32_t tail_nbytes=0):
        """Wrap a descriptor that is read in order, after ``head``; the caller closes it."""
        cdef File file = File.__new__(File)
        cdef n.imgc_stream_options options
        cdef n.imgc_error err
        memset(&options, 0, sizeof(options))
        options.fd = fd
        options.head = &head[0] if head.shape[0] else NULL
        options.head_nbytes = head.shape[0]
        options.open_ended = open_ended
        options.tail_nbytes = tail_nbytes
        check(n.imgc_file_open_stream(&options, &file.handle, &err), &err)
        return file

    @property
    def stream_end(self):
        """Where the disk in a stream ends, or None before a read has met its end."""
        cdef uint64_t end = 0
        return end if n.imgc_file_stream_end(self.require(), &end) else None

    @property
    def stream_position(self):
        """How many bytes of the disk in a stream were read; no job may read it."""
        return n.imgc_file_stream_position(self.require())

    def stream_rest(self):
        """Return what was taken from a stream and not read; no job may read it."""
        cdef n.imgc_file *handle = self.require()
        cdef uint64_t nbytes = n.imgc_file_stream_rest(handle, NULL, 0)
        rest = bytearray(nbytes)
        cdef uint8_t[::1] view
        if nbytes:
            view = rest
            n.imgc_file_stream_rest(handle, &view[0], nbytes)
        return bytes(rest)

    cdef n.imgc_file *require(self) except NULL:
        if self.handle == NULL or self.is_closed:
            raise ValueError("the file is closed")
        return self.handle

    def zero(self, uint64_t offset, uint64_t length):
        """Make a range read as zeros, by the cheapest way that works."""
        cdef n.imgc_file *handle = self.require()
        cdef n.imgc_error err
        cdef int status
        with nogil:
            status = n.imgc_file_zero(handle, offset, length, &err)
        check(status, &err)

    def write(self, uint64_t offset, const uint8_t[::1] data not None, tick=None):
        """Write bytes; call ``tick`` about every 50 ms while no reader takes them.

        An exception of ``tick`` ends the write.
        """
        cdef n.imgc_file *handle = self.require()
        cdef n.imgc_error err
        cdef const uint8_t *start = &data[0] if data.shape[0] else NULL
        cdef uint64_t nbytes = data.shape[0]
        cdef int status
        while True:
            with nogil:
                status = n.imgc_file_put(handle, start, nbytes, offset, &err)
            if status != n.IMGC_IO or err.os_errno != EAGAIN:
                break
            with nogil:
                n.imgc_file_await_room(handle, POLL_MS)
            PyErr_CheckSignals()
            if tick is not None:
                tick()
        check(status, &err)

    def drop_behind(self):
        """From now on, drop from the page cache what is read or written."""
        cdef n.imgc_file *handle = self.require()
        cdef n.imgc_error err
        cdef int status
        with nogil:
            status = n.imgc_file_drop_behind(handle, &err)
        check(status, &err)

    def kept_nbytes(self):
        """Return how much was in the page cache at `drop_behind`, as far as is known."""
        return n.imgc_file_kept_nbytes(self.require())

    def go_direct(self, int direct_fd):
        """Return whether whole pages now go past the page cache, by a second descriptor."""
        cdef n.imgc_file *handle = self.require()
        cdef n.imgc_error err
        cdef int status
        with nogil:
            status = n.imgc_file_go_direct(handle, direct_fd, &err)
        if status == n.IMGC_UNSUPPORTED:
            return False
        check(status, &err)
        return True

    def drop_rest(self):
        """Drop what is left of the file, at the end of the job."""
        cdef n.imgc_file *handle = self.require()
        with nogil:
            n.imgc_file_drop_rest(handle)

    def note_read(self, uint64_t offset, uint64_t length):
        """Note what the caller has read by the descriptor."""
        n.imgc_file_note_read(self.require(), offset, length)

    def note_written(self, uint64_t offset, uint64_t length):
        """Note what the caller has written by the descriptor; nothing before a sync."""
        cdef n.imgc_file *handle = self.require()
        cdef n.imgc_error err
        cdef int status
        with nogil:
            status = n.imgc_file_note_written(handle, offset, length, &err)
        check(status, &err)

    def next_data(self, uint64_t offset):
        """Return (start, end) of the next data from ``offset`` on; equal if none."""
        cdef n.imgc_file *handle = self.require()
        cdef n.imgc_error err
        cdef uint64_t start = 0, end = 0
        cdef int status
        with nogil:
            status = n.imgc_file_next_data(handle, offset, &start, &end, &err)
        check(status, &err)
        return start, end

    def take_written(self):
        """Return whether the core has written to it since the last call."""
        return bool(n.imgc_file_take_written(self.require()))

    def refuse_writes(self):
        """Let all later writes fail: what was written could not be synced."""
        n.imgc_file_refuse_writes(self.require())

    def close(self):
        """Reject further calls and release the buffer; no job may still use it.

        The native file is freed together with this object: a job or another thread
        may still be using it.
        """
        self.is_closed = True
        if self.has_view:
            PyBuffer_Release(&self.view)
            self.has_view = False

    def __dealloc__(self):
        self.close()
        n.imgc_file_close(self.handle)


cdef class RateLimit:
    """How many guest bytes a second jobs may handle: ``struct imgc_rate_limit``."""

    cdef n.imgc_rate_limit *handle
    cdef RateLimit owner
    cdef bint ignores_rate

    def __cinit__(self, RateLimit pauses_of=None):
        self.handle = NULL
        self.owner = pauses_of
        self.ignores_rate = pauses_of is not None
        if pauses_of is not None:
            self.handle = pauses_of.handle
        elif n.imgc_rate_limit_create(&self.handle) != n.IMGC_OK:
            raise MemoryError()

    def __init__(self, pauses_of=None):
        """State the arguments, which are those of __cinit__."""

    def set(self, uint64_t bytes_per_second):
        """Change the rate at once; 0 is no limit."""
        with nogil:
            n.imgc_rate_limit_set(self.handle, bytes_per_second)

    def pause(self, bint paused):
        """Let nothing be handled, or go on; takes effect at once."""
        with nogil:
            n.imgc_rate_limit_pause(self.handle, paused)

    def take(self, uint64_t nbytes, unsigned timeout_ms=POLL_MS):
        """Wait until ``nbytes`` may be handled; return False after the timeout."""
        cdef int taken
        if self.ignores_rate:
            nbytes = 0
        with nogil:
            taken = n.imgc_rate_limit_take(self.handle, nbytes, timeout_ms)
        return bool(taken)

    def __dealloc__(self):
        if self.owner is None:
            n.imgc_rate_limit_destroy(self.handle)


cdef n.imgc_source_file *source_table(sources) except NULL:
    """Return the files that extents refer to; the caller frees the table."""
    cdef File file
    cdef n.imgc_source_file *table = <n.imgc_source_file *>calloc(
        len(sources) + 1, sizeof(n.imgc_source_file))
    if table == NULL:
        raise MemoryError()
    try:
        for index, (source, nbytes, guest_base, block_nbytes) in enumerate(sources):
            file = source
            table[index].file = file.require()
            table[index].nbytes = nbytes
            table[index].guest_base = guest_base
            table[index].block_nbytes = block_nbytes
    except BaseException:
        free(table)
        raise
    return table


@cython.no_gc_clear  # the workers use the files until they are joined
cdef class Job:
    """One conversion, comparison or checksum, run batch by batch."""

    cdef n.imgc_job *handle
    cdef n.imgc_batch batch
    cdef list files
    cdef RateLimit rate_limit
    cdef object batch_threads
    cdef tuple held
    cdef bint running
    cdef int process

    def __cinit__(self):
        self.handle = NULL
        self.running = False
        self.process = getpid()

    def __init__(self, *, sources, geometry=None, File target=None, uint64_t next_offset=0,
                 bint has_base=False, uint32_t threads=1, uint64_t window_nbytes=0, variants=None,
                 bint salvage=False, bint reflink=False, bint trust_blocks=False,
                 bint stores_data=False, RateLimit rate_limit=None, checksum=None,
                 uint64_t granule_nbytes=0, batch_threads=None):
        cdef n.imgc_job_options options
        cdef n.imgc_error err
        cdef int status
        chosen = {} if variants is None else dict(variants)
        memset(&options, 0, sizeof(options))
        if geometry is not None:
            options.kind = n.IMGC_JOB_CONVERT
        else:
            options.kind = n.IMGC_JOB_COMPARE if checksum is None else n.IMGC_JOB_DIGEST
        if checksum is not None:
            options.checksum = checksum_of(checksum)
        options.n_threads = threads
        options.window_nbytes = window_nbytes
        options.zero_variant = select(n.IMGC_OP_ZERO, chosen.pop("zero", None))
        options.inflate_variant = select(n.IMGC_OP_INFLATE, chosen.pop("inflate", None))
        io = chosen.pop("io", None)
        options.io_variant = n.IMGC_IO_BY_FILES if io is None else select(n.IMGC_OP_IO, io)
        chosen.pop("crc32c", None)
        if chosen:
            raise ValueError(f"no operation {next(iter(chosen))!r}")
        options.next_offset = next_offset
        options.has_base = has_base
        options.salvage = salvage
        options.reflink = reflink
        options.trust_blocks = trust_blocks
        options.stores_data = stores_data
        options.granule_nbytes = granule_nbytes
        if rate_limit is not None:
            options.rate_limit = rate_limit.handle
            options.ignores_rate = rate_limit.ignores_rate
        self.rate_limit = rate_limit
        self.batch_threads = batch_threads
        if geometry is not None:
            fill_geometry(&options.geometry, geometry)
            if target is None:
                raise ValueError("a conversion needs a target")
            options.target = target.require()
        self.files = [target, *(source[0] for source in sources)]
        cdef n.imgc_source_file *table = source_table(sources)
        try:
            options.sources = table
            options.n_sources = len(sources)
            status = n.imgc_job_create(&options, &self.handle, &err)
            check(status, &err)
        finally:
            free(table)

    cdef n.imgc_job *require(self) except NULL:
        if self.handle == NULL:
            raise ValueError("the job is closed")
        return self.handle

    def start(self, uint64_t start, uint64_t end, const extent_row[::1] extents,
              const extent_row[::1] base_extents=None, placement_row[::1] placements=None,
              uint8_t[::1] granules=None, uint8_t[::1] leaves=None):
        """Start the workers on one part of the disk; hold the arrays until wait."""
        cdef n.imgc_job *handle = self.require()
        cdef n.imgc_error err
        cdef int status
        if self.running:
            raise RuntimeError("the previous batch has not been waited for")
        memset(&self.batch, 0, sizeof(self.batch))
        self.batch.guest_start = start
        self.batch.guest_end = end
        if extents.shape[0]:
            self.batch.extents = <const n.imgc_extent *>&extents[0]
            self.batch.n_extents = extents.shape[0]
        if base_extents is not None and base_extents.shape[0]:
            self.batch.base_extents = <const n.imgc_extent *>&base_extents[0]
            self.batch.n_base_extents = base_extents.shape[0]
        if placements is not None and placements.shape[0]:
            self.batch.placements = <n.imgc_placement *>&placements[0]
            self.batch.n_placements = placements.shape[0]
        if leaves is not None and leaves.shape[0]:
            if leaves.shape[0] % n.IMGC_CHECKSUM_NBYTES:
                raise ValueError(f"{leaves.shape[0]} bytes are no leaves")
            self.batch.leaves = &leaves[0]
            self.batch.n_leaves = leaves.shape[0] // n.IMGC_CHECKSUM_NBYTES
        if granules is not None and granules.shape[0]:
            self.batch.granules = &granules[0]
            self.batch.n_granules = granules.shape[0]
        if self.batch_threads is not None:
            self.batch.n_threads = self.batch_threads()
        with nogil:
            status = n.imgc_job_start(handle, &self.batch, &err)
        check(status, &err)
        self.held = (extents, base_extents, placements, granules, leaves)
        self.running = True

    def wait(self, tick=None, meanwhile=None):
        """Join the batch, and call ``tick`` on this thread about every 50 ms.

        ``meanwhile`` does a short piece of other work, and returns how many
        milliseconds to wait before it is called again, at most 50.  An exception of
        either cancels the job.
        """
        cdef n.imgc_job *handle = self.require()
        cdef n.imgc_error err
        cdef int status = n.IMGC_OK
        cdef int ended = 0
        cdef int wait_ms = POLL_MS
        cdef int waited_ms
        memset(&err, 0, sizeof(err))
        if not self.running:
            raise RuntimeError("no batch is running")
        try:
            while not ended:
                waited_ms = 0
                while not ended and waited_ms < POLL_MS:
                    if meanwhile is not None:
                        wait_ms = meanwhile()
                    with nogil:
                        ended = n.imgc_job_wait(handle, wait_ms)
                    # A piece of work takes time as well.
                    waited_ms += max(wait_ms, 1)
                PyErr_CheckSignals()
                if tick is not None:
                    tick()
        except BaseException:
            n.imgc_job_cancel(handle)
            raise
        finally:
            with nogil:
                status = n.imgc_job_finish(handle, &err)
            self.running = False
            self.held = None
        check(status, &err)

    def run(self, start, end, extents, base_extents=None, placements=None, leaves=None):
        """Start one batch and join it."""
        self.start(start, end, extents, base_extents, placements, leaves=leaves)
        self.wait()

    def cancel(self):
        """Ask the workers to stop; ``wait`` then raises CoreError (CANCELLED)."""
        n.imgc_job_cancel(self.require())

    def progress(self):
        """Return counts of bytes.

        Guest bytes done, and of these data and zeros; host bytes read, written and
        reflinked; guest bytes of reused blocks, and of these not decompressed.
        """
        cdef n.imgc_progress progress
        n.imgc_job_progress(self.require(), &progress)
        return (progress.bytes_done, progress.bytes_data, progress.bytes_zero,
                progress.bytes_read, progress.bytes_written, progress.bytes_reflinked,
                progress.bytes_reused, progress.bytes_trusted)

    @property
    def next_offset(self):
        """The first free host offset of an appending target."""
        return n.imgc_job_next_offset(self.require())

    @next_offset.setter
    def next_offset(self, uint64_t value):
        cdef n.imgc_error err
        memset(&err, 0, sizeof(err))
        err.op = "next_offset"
        check(n.imgc_job_set_next_offset(self.require(), value), &err)

    def end_disk(self, uint64_t guest_nbytes):
        """Make the target's disk end here: before a batch, or after `found_end`."""
        cdef n.imgc_error err
        memset(&err, 0, sizeof(err))
        err.op = "end_disk"
        check(n.imgc_job_set_guest_nbytes(self.require(), guest_nbytes), &err)

    @property
    def found_end(self):
        """Where a stream has ended while a batch is running, or None.

        The batch then waits for `end_disk`.
        """
        cdef uint64_t end = 0
        return end if n.imgc_job_found_end(self.require(), &end) else None

    @property
    def packing(self):
        """Where packed compressed blocks go on, and where their unit ends; or zeros."""
        cdef uint64_t start, end
        n.imgc_job_packing(self.require(), &start, &end)
        return start, end

    @packing.setter
    def packing(self, value):
        cdef n.imgc_error err
        cdef uint64_t start = value[0], end = value[1]
        memset(&err, 0, sizeof(err))
        err.op = "packing"
        check(n.imgc_job_set_packing(self.require(), start, end), &err)

    @property
    def first_difference(self):
        """The lowest guest offset that differs, or None."""
        cdef uint64_t offset = n.imgc_job_first_difference(self.require())
        return None if offset == n.IMGC_NO_DIFFERENCE else offset

    @property
    def bad_ranges(self):
        """Ranges that could not be read: (guest_offset, length, source, errno or 0)."""
        cdef const n.imgc_bad_range *rows = NULL
        cdef size_t count = n.imgc_job_bad_ranges(self.require(), &rows)
        cdef size_t i
        return [(rows[i].guest_offset, rows[i].length, rows[i].source, rows[i].os_errno)
                for i in range(count)]

    def close(self):
        """Cancel and join a batch that still runs, and free the workers' memory."""
        cdef n.imgc_job *handle = self.handle
        self.handle = NULL
        # A forked child does not have the threads that would be joined.
        if self.process == getpid():
            with nogil:
                n.imgc_job_destroy(handle)
        self.running = False
        self.held = None
        self.files = None
        self.batch_threads = None

    def __dealloc__(self):
        if self.process == getpid():
            n.imgc_job_destroy(self.handle)


cdef class Places:
    """Gives blocks the host offsets that a job gives them: ``struct imgc_places``."""

    cdef n.imgc_places *handle

    def __cinit__(self):
        self.handle = NULL

    def __init__(self, geometry, uint64_t next_offset):
        cdef n.imgc_geometry native
        memset(&native, 0, sizeof(native))
        fill_geometry(&native, geometry)
        check_call(n.imgc_places_create(&native, next_offset, &self.handle), "places")

    def give(self, uint64_t first_block, placement_row[::1] rows):
        """Fill in the offsets of rows with states, and the lengths of STORED ones."""
        cdef n.imgc_error err
        if rows.shape[0]:
            check(n.imgc_places_give(self.handle, first_block, <n.imgc_placement *>&rows[0],
                                     rows.shape[0], &err), &err)

    @property
    def next_offset(self):
        """The first free host offset."""
        return n.imgc_places_next_offset(self.handle)

    @next_offset.setter
    def next_offset(self, uint64_t value):
        check_call(n.imgc_places_set_next_offset(self.handle, value), "next_offset")

    def __dealloc__(self):
        n.imgc_places_destroy(self.handle)


# What all uses have that begin before `is_over` is called.
cdef int FIRST_TICKET = 1
# `Uses.soon_over` waits for as long as the part of a long read takes.
cdef int SOON_POLLS = 100
cdef int SOON_PAUSE_US = 1000


cdef class Uses:
    """The uses of something that any thread may close at any time."""

    cdef n.imgc_uses *handle
    cdef object idle, refuse

    def __cinit__(self):
        self.handle = NULL

    def __init__(self, idle, refuse):
        check_call(n.imgc_uses_create(&self.handle), "uses")
        self.idle = idle
        self.refuse = refuse

    cdef int enter(self) except -1:
        """Begin a use, and return what `leave` needs."""
        cdef int ticket = n.imgc_uses_enter(self.handle)
        if not ticket:
            self.refuse()
            raise RuntimeError("a use that was refused has gone on")
        return ticket

    cdef int leave(self, int ticket) except -1:
        if n.imgc_uses_leave(self.handle, ticket):
            self.idle()
        return 0

    def close(self):
        """Refuse later uses; return whether this ends them: none is in progress."""
        return bool(n.imgc_uses_close(self.handle))

    def __enter__(self):
        cdef int ticket = self.enter()
        if ticket != FIRST_TICKET:
            self.leave(ticket)
            raise RuntimeError("with blocks do not go together with epochs")

    def __exit__(self, *_):
        self.leave(FIRST_TICKET)

    @property
    def is_idle(self):
        """Whether no use is in progress now."""
        return bool(n.imgc_uses_none(self.handle))

    def epoch(self):
        """Return a number for this moment, for `is_over`."""
        return n.imgc_uses_epoch(self.handle)

    def is_over(self, uint64_t epoch):
        """Return whether every use that began before that moment has ended."""
        return bool(n.imgc_uses_is_over(self.handle, epoch))

    def soon_over(self):
        """Wait a little for the uses in progress; return whether they have ended."""
        cdef uint64_t epoch = n.imgc_uses_epoch(self.handle)
        cdef int i
        for i in range(SOON_POLLS):
            if n.imgc_uses_is_over(self.handle, epoch):
                return True
            with nogil:
                usleep(SOON_PAUSE_US)
        return False

    def __dealloc__(self):
        n.imgc_uses_destroy(self.handle)


# A read of up to this many bytes is tried while the GIL is held, which takes microseconds
# if all is in memory.  Others are in parts of 50 ms at most, after which signals are handled.
cdef uint64_t SHORT_NBYTES = 64 * 1024
cdef uint64_t LONG_NBYTES = 128 * 1024
cdef uint64_t SECTOR_NBYTES = 512


cdef int get_writable(buffer, Py_buffer *view) except -1:
    """Get the bytes of a buffer."""
    try:
        PyObject_GetBuffer(buffer, view, PyBUF_WRITABLE)
    except (BufferError, ValueError) as error:
        with memoryview(buffer) as whole:
            if whole.readonly:
                raise BufferError(
                    f"a writable buffer is needed, not {type(buffer).__name__}") from None
        raise TypeError(f"a contiguous buffer is needed: {error}") from None
    return 0


@cython.no_gc_clear  # reads in progress use the files
cdef class Disk:
    """A disk for random access; any number of threads may use it.

    A subclass supplies the rows of tables, and checks ranges and thread counts.
    """

    cdef n.imgc_disk *handle
    cdef uint64_t nbytes
    cdef list files
    cdef Uses uses
    cdef object lock
    cdef pid_t process

    def __cinit__(self):
        self.handle = NULL

    def __init__(self, sources, *, uint64_t virtual_size, uint64_t span, uint64_t cache,
                 Uses uses not None, lock, variants=None):
        cdef n.imgc_disk_options options
        cdef n.imgc_error err
        cdef int status
        chosen = {} if variants is None else variants
        memset(&options, 0, sizeof(options))
        options.guest_nbytes = self.nbytes = virtual_size
        options.span_nbytes = span
        options.cache_nbytes = cache
        options.inflate_variant = select(n.IMGC_OP_INFLATE, chosen.get("inflate"))
        options.io_variant = select(n.IMGC_OP_IO, chosen.get("io"))
        self.uses = uses
        self.lock = lock
        self.process = getpid()
        self.files = [source[0] for source in sources]
        cdef n.imgc_source_file *table = source_table(sources)
        try:
            options.sources = table
            options.n_sources = len(sources)
            status = n.imgc_disk_create(&options, &self.handle, &err)
            check(status, &err)
        finally:
            free(table)

    def rows(self, start, end):
        """Return the rows of the table of ``[start, end)``."""
        raise NotImplementedError

    def is_damage(self, error):
        """Return whether an exception of `rows` is about what the image says."""
        raise NotImplementedError

    def range(self, offset, length):
        """Return a range of the disk as two ints, or raise ValueError."""
        raise NotImplementedError

    def threads(self, threads):
        """Return how many threads a long read may use, if so many are stated."""
        raise NotImplementedError

    def lease(self, threads):
        """Return what `renew` tells how many of these threads may work now."""
        raise NotImplementedError

    cdef int place(self, offset, uint64_t length, uint64_t *start) except -1:
        """Set the start of a range inside the disk."""
        cdef int overflow = 0
        cdef long long number
        if PyLong_CheckExact(offset):
            number = PyLong_AsLongLongAndOverflow(offset, &overflow)
            if (number >= 0 and <uint64_t>number <= self.nbytes
                    and length <= self.nbytes - <uint64_t>number):
                start[0] = number
                return 0
        start[0], _ = self.range(offset, length)
        return 0

    def readinto(self, offset, buffer, threads=None):
        """Fill a buffer with the bytes from ``offset`` on; return their number."""
        cdef Py_buffer view
        cdef uint64_t start = 0
        cdef int ticket = self.uses.enter()
        try:
            get_writable(buffer, &view)
            try:
                self.place(offset, view.len, &start)
                self.fill(start, view.buf, view.len, threads, &ticket)
                return view.len
            finally:
                PyBuffer_Release(&view)
        finally:
            self.uses.leave(ticket)

    def read(self, offset, length):
        """Return ``length`` bytes from ``offset`` on."""
        cdef uint64_t start = 0, nbytes = 0
        cdef int ticket = self.uses.enter()
        try:
            start, nbytes = self.range(offset, length)
            content = PyBytes_FromStringAndSize(NULL, nbytes)
            self.fill(start, PyBytes_AS_STRING(content), nbytes, None, &ticket)
            return content
        finally:
            self.uses.leave(ticket)

    def readv(self, requests, threads=None):
        """Fill the buffers of ``(offset, buffer)`` pairs."""
        cdef Py_ssize_t count, n_views = 0, i
        cdef n.imgc_disk_request *ranges = NULL
        cdef Py_buffer *views = NULL
        cdef uint64_t start = 0
        cdef int ticket = self.uses.enter()
        try:
            requests = tuple(requests)
            count = len(requests)
            ranges = <n.imgc_disk_request *>calloc(count + 1, sizeof(n.imgc_disk_request))
            views = <Py_buffer *>calloc(count + 1, sizeof(Py_buffer))
            if ranges == NULL or views == NULL:
                raise MemoryError()
            for request in requests:
                try:
                    offset, buffer = request
                except (TypeError, ValueError):
                    raise TypeError("a request is a pair of an offset and a buffer, not "
                                    f"{request!r:.99}") from None
                get_writable(buffer, &views[n_views])
                n_views += 1
                self.place(offset, views[n_views - 1].len, &start)
                ranges[n_views - 1].offset = start
                ranges[n_views - 1].buffer = views[n_views - 1].buf
                ranges[n_views - 1].length = views[n_views - 1].len
            self.gather(ranges, count, threads, &ticket)
        finally:
            for i in range(n_views):
                PyBuffer_Release(&views[i])
            free(views)
            free(ranges)
            self.uses.leave(ticket)

    cdef int fill(self, uint64_t offset, void *buffer, uint64_t length, threads,
                  int *ticket) except -1:
        cdef n.imgc_disk_request request
        if threads is not None:
            threads = self.threads(threads)
        if length <= LONG_NBYTES:
            return self.fill_short(offset, <char *>buffer, length)
        request.offset = offset
        request.buffer = buffer
        request.length = length
        return self.gather(&request, 1, threads, ticket)

    cdef int fill_short(self, uint64_t offset, char *buffer, uint64_t length) except -1:
        """Read on this thread; without giving up the GIL if all is in memory."""
        cdef n.imgc_disk_rest rest
        cdef n.imgc_error err
        cdef n.imgc_table *table = NULL
        cdef unsigned flags = n.IMGC_DISK_NO_WAIT if length <= SHORT_NBYTES else 0
        cdef int status
        try:
            while True:
                if flags & n.IMGC_DISK_NO_WAIT:
                    status = n.imgc_disk_read(self.handle, table, offset, buffer, length, flags,
                                              &rest, &err)
                else:
                    with nogil:
                        status = n.imgc_disk_read(self.handle, table, offset, buffer, length,
                                                  flags, &rest, &err)
                if status <= 0:
                    return check(status, &err)
                buffer += rest.offset - offset
                offset, length = rest.offset, rest.length
                flags |= n.IMGC_DISK_GOES_ON
                if status == n.IMGC_MISSING:
                    self.get_table(&rest, &table)
                else:
                    flags = n.IMGC_DISK_GOES_ON
        finally:
            self.drop(&table)

    cdef int gather(self, n.imgc_disk_request *requests, size_t count, threads,
                    int *ticket) except -1:
        """Read on several threads, in the order of the places."""
        cdef n.imgc_gather *gather = NULL
        cdef n.imgc_disk_rest rest
        cdef n.imgc_error err
        cdef n.imgc_table *table = NULL
        cdef unsigned n_threads
        cdef int status
        lease = self.lease(self.threads(threads))
        check(n.imgc_gather_create(self.handle, requests, count, &gather, &err), &err)
        try:
            while True:
                n_threads = lease.renew()
                with nogil:
                    status = n.imgc_gather_run(gather, table, n_threads, &rest, &err)
                if status <= 0:
                    return check(status, &err)
                PyErr_CheckSignals()
                if status == n.IMGC_MISSING:
                    self.get_table(&rest, &table)
                elif n.imgc_gather_is_between_rounds(gather):
                    # What the part before has used may get another use.
                    self.drop(&table)
                    ticket[0] = n.imgc_uses_renew(self.uses.handle, ticket[0])
        finally:
            self.drop(&table)
            n.imgc_gather_destroy(gather)

    cdef int get_table(self, n.imgc_disk_rest *rest, n.imgc_table **table) except -1:
        """Get the table of what is left to read.

        If the image is damaged there, the rows of what is wanted may still be sound.
        """
        cdef uint64_t start, end
        self.drop(table)
        n.imgc_disk_span(self.handle, rest.offset, &start, &end)
        with self.lock:
            table[0] = n.imgc_disk_find(self.handle, rest.offset, &rest.generation)
            if table[0] != NULL:
                return 0
            try:
                return self.add(start, end, rest.generation, table)
            except Exception as error:
                if not self.is_damage(error):
                    raise
            start = rest.offset - rest.offset % SECTOR_NBYTES
            if rest.length < end - rest.offset:
                end = rest.offset + rest.length
                end = min(end + (SECTOR_NBYTES - end % SECTOR_NBYTES) % SECTOR_NBYTES, self.nbytes)
            return self.add(start, end, rest.generation, table)

    cdef int add(self, uint64_t start, uint64_t end, uint64_t generation,
                 n.imgc_table **table) except -1:
        cdef n.imgc_error err
        cdef const extent_row[::1] rows = self.rows(start, end)
        if rows.shape[0] == 0:
            raise ValueError("a table without rows")
        check(n.imgc_disk_add(self.handle, start, end, generation,
                              <const n.imgc_extent *>&rows[0], rows.shape[0], table, &err), &err)
        return 0

    cdef void drop(self, n.imgc_table **table) noexcept:
        if table[0] != NULL:
            n.imgc_disk_drop(self.handle, table[0])
            table[0] = NULL

    def forget(self, uint64_t start=0, end=None):
        """Forget the tables of ``[start, end)``, or all and the blocks."""
        n.imgc_disk_forget(self.handle, start, self.nbytes if end is None else end)

    def write(self, offset, data):
        """Write ``data`` if all of it can be overwritten; return its length, or None.

        What has no place in a table that is kept is not written, nor what follows it.
        """
        cdef Py_buffer view
        cdef uint64_t start = 0
        cdef uint64_t done
        cdef int ticket = self.uses.enter()
        try:
            try:
                PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
            except (BufferError, ValueError):
                return None
            try:
                self.place(offset, view.len, &start)
                done = self.write_front(start, <const char *>view.buf, view.len, &ticket)
                return view.len if done == <uint64_t>view.len else None
            finally:
                PyBuffer_Release(&view)
        finally:
            self.uses.leave(ticket)

    cdef uint64_t write_front(self, uint64_t offset, const char *buffer, uint64_t length,
                              int *ticket) except? 0xFFFFFFFFFFFFFFFF:
        """Write what can be overwritten before the first byte that cannot."""
        cdef n.imgc_disk_rest rest
        cdef n.imgc_error err
        cdef uint64_t done = 0
        cdef int status = n.IMGC_UNFINISHED
        while status == n.IMGC_UNFINISHED:
            with nogil:
                status = n.imgc_disk_write(self.handle, offset + done, buffer + done,
                                           length - done, &rest, &err)
            if status < 0:
                check(status, &err)
            done = rest.offset - offset
            if status == n.IMGC_UNFINISHED:
                PyErr_CheckSignals()
                # Each part starts from the tables.
                ticket[0] = n.imgc_uses_renew(self.uses.handle, ticket[0])
        return done

    def load(self, uint64_t offset):
        """Get the table of an offset, which is kept for later calls, if it is open."""
        cdef n.imgc_disk_rest rest
        cdef n.imgc_table *table = NULL
        cdef int ticket = n.imgc_uses_enter(self.uses.handle)
        if not ticket:
            return
        try:
            self.place(offset, 1, &rest.offset)
            rest.length = 1
            self.get_table(&rest, &table)
        finally:
            self.drop(&table)
            self.uses.leave(ticket)

    def stop_writing(self):
        """Let `write` write nothing; return once no write is in progress."""
        cdef int is_idle = 0
        n.imgc_disk_stop_writing(self.handle)
        while not is_idle:
            with nogil:
                is_idle = n.imgc_disk_await_writes(self.handle, POLL_MS)
            PyErr_CheckSignals()

    def resume_writing(self):
        """Let `write` write again."""
        n.imgc_disk_resume_writing(self.handle)

    @property
    def stats(self):
        """Entries and bytes that are kept; how many were found, and how many not."""
        cdef n.imgc_cache_stats stats
        n.imgc_disk_stats(self.handle, &stats)
        return stats.n_entries, stats.nbytes, stats.n_hits, stats.n_misses

    def __dealloc__(self):
        # In a forked child, another thread may have been changing it at the fork.
        if self.process == getpid():
            n.imgc_disk_destroy(self.handle)


cdef int fill_geometry(n.imgc_geometry *out, geometry) except -1:
    out.block_nbytes = geometry.block_nbytes
    out.guest_nbytes = geometry.guest_nbytes
    out.placing = geometry.placing
    out.zero_policy = geometry.zero_policy
    out.guest_base = geometry.guest_base
    out.host_base = geometry.host_base
    out.stored_alignment = geometry.stored_alignment
    out.compressed_alignment = geometry.compressed_alignment
    out.prefix = geometry.prefix
    out.store_incompressible = geometry.store_incompressible
    out.codec.codec = geometry.codec.codec
    out.codec.engine = geometry.codec.engine
    out.codec.level = geometry.codec.level
    out.codec.window_bits = geometry.codec.window_bits
    out.sparse_nbytes = geometry.sparse_nbytes
    out.group_nblocks = geometry.group_nblocks
    out.group_gap_nbytes = geometry.group_gap_nbytes
    out.stored_prefix_nbytes = geometry.stored_prefix_nbytes
    out.stored_prefix_byte = geometry.stored_prefix_byte
    out.clears_blocks = geometry.clears_blocks
    out.reuse = geometry.reuse
    out.packs_in_order = geometry.packs_in_order
    return 0


def build_info():
    """Return the default variant of each operation."""
    return {
        operation: next(row["name"] for row in rows if row["default"])
        for operation, rows in variants().items()
    }
