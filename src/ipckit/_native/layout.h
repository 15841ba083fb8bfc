/* layout.h — the bytes that two processes share, and nothing else.
 *
 *   offset 0         one page            header: what this is, and four lines of counters
 *   offset P         capacity bytes      ring 0: side 0 writes, side 1 reads
 *   offset P + C     capacity bytes      ring 1: side 1 writes, side 0 reads          (P: page size, C: capacity)
 *
 *   header           0        8       12       16       24
 *                    | magic  |version | header |capacity| ...                         (native byte order: one machine)
 *                    |"ipcring"|  u32  |  bytes |  u64   |
 *
 *     256            ring 0   | tail u64 | reader_sleeps u64 | closed u64 | ... 128      the sender's line
 *     384                     | head u64 | writer_sleeps u64 | ...        | ... 128      the receiver's line
 *     512            ring 1   as ring 0
 *
 *   tail and head count bytes since the beginning and never wrap (2^64 bytes are 58 years at 10 GB/s); the place of a byte is
 *   its count modulo C. Every process maps each ring's data twice in a row, so what begins before the end of the ring goes
 *   on behind it, and no record is ever split.
 *
 *   record           0        4        8                    8 + length, rounded up to 8
 *                    | length | kind   | payload ...        |
 *                    | u32    | u32    |                    |
 *
 *   A frame is one WHOLE record, or FIRST, MORE..., LAST. The payload of FIRST begins with the length of the frame (u64).
 *
 * Two lines of 64 bytes make one of ours: processors fetch them in pairs. */
#ifndef IPCKIT_LAYOUT_H
#define IPCKIT_LAYOUT_H

#include <stdalign.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#define RING_MAGIC UINT64_C(0x00676e6972637069) /* "ipcring\0" in little-endian memory */
#define RING_VERSION 1
#define RING_LINE 128
#define RING_MAX_CAPACITY (UINT64_C(1) << 30) /* a record's length is a u32 */

struct ring_lines {
    /* Written by the sender, save that the receiver sets reader_sleeps. */
    alignas(RING_LINE) _Atomic uint64_t tail; /* bytes committed */
    _Atomic uint64_t reader_sleeps;           /* 1: ring the data bell at the next commit */
    _Atomic uint64_t closed;                  /* 1: the sender closed in order; nothing follows the tail */
    /* Written by the receiver, save that the sender sets writer_sleeps. */
    alignas(RING_LINE) _Atomic uint64_t head; /* bytes given back */
    _Atomic uint64_t writer_sleeps;           /* not 0: ring the space bell once so many bytes are free */
};

struct ring_header {
    uint64_t magic;
    uint32_t version;
    uint32_t header_bytes; /* P */
    uint64_t capacity;     /* C: a power of two, and a multiple of P */
    alignas(256) struct ring_lines ring[2];
};

/* The tag makes random bytes unlikely to pass for a record. */
#define RECORD_TAG UINT32_C(0x69706300)
enum record_kind {
    RECORD_WHOLE = RECORD_TAG | 1,
    RECORD_FIRST = RECORD_TAG | 2,
    RECORD_MORE = RECORD_TAG | 3,
    RECORD_LAST = RECORD_TAG | 4,
};

struct record_header {
    uint32_t length;
    uint32_t kind;
};

/* -- topics: one arena of payloads for all, one queue of references for each subscriber ------------------------------
 *
 *   arena            0        8       12       16       24            P
 *                    | magic  |version | header |  size  | ...         | size bytes: messages, each in one piece
 *                    |"ipccast"|  u32  |  bytes |  u64   |
 *
 *   queue            0        8       12       16       24
 *                    | magic  |version | header | slots  | ...
 *                    |"ipcqueu"|  u32  |  bytes |  u64   |
 *     128            | tail u64 | offered u64 | closed u64 | room_wanted u64 |   the publisher's line
 *     256            | head u64 |                                            both of them move it, each by compare and swap
 *     384            | reader_sleeps u64 |                                   the subscriber's line
 *       P            slots entries of 32 bytes
 *
 *   entry            | serial u64 | offset u64 | length u64 | prefix u64 |
 *
 *   tail and head count entries since the beginning; the place of an entry is its count modulo slots. A message is `length` bytes
 *   of the arena: `prefix` bytes that say what it is, and the body. `serial` counts what was meant for this subscriber, dropped or
 *   not, so that the step from one entry to the next says how many are missing between them. */

#define ARENA_MAGIC UINT64_C(0x0074736163637069) /* "ipccast\0" */
#define QUEUE_MAGIC UINT64_C(0x0075657571637069) /* "ipcqueu\0" */
#define CAST_VERSION 1
#define ARENA_MIN (UINT64_C(1) << 16)
#define ARENA_MAX (UINT64_C(1) << 30)
#define QUEUE_MAX_SLOTS (UINT64_C(1) << 26)

struct arena_header {
    uint64_t magic;
    uint32_t version;
    uint32_t header_bytes; /* P */
    uint64_t size;         /* a power of two */
};

struct queue_header {
    uint64_t magic;
    uint32_t version;
    uint32_t header_bytes; /* P */
    uint64_t slots;        /* a power of two */
    alignas(RING_LINE) _Atomic uint64_t tail; /* entries offered */
    _Atomic uint64_t offered;                 /* messages meant for this subscriber, those that were dropped included */
    _Atomic uint64_t closed;                  /* 1: the publisher closed in order; nothing follows the tail */
    _Atomic uint64_t room_wanted;             /* 1: ring the room bell when an entry is taken */
    alignas(RING_LINE) _Atomic uint64_t head; /* entries taken by the subscriber, or taken back by the publisher */
    alignas(RING_LINE) _Atomic uint64_t reader_sleeps; /* 1: ring the data bell at the next entry */
};

/* Words, because the publisher may fill an entry again while a subscriber that has lost it still looks. */
struct queue_entry {
    _Atomic uint64_t serial, offset, length, prefix;
};

static_assert(offsetof(struct arena_header, size) == 16, "layout");
static_assert(offsetof(struct queue_header, tail) == 128, "layout");
static_assert(offsetof(struct queue_header, room_wanted) == 152, "layout");
static_assert(offsetof(struct queue_header, head) == 256, "layout");
static_assert(offsetof(struct queue_header, reader_sleeps) == 384, "layout");
static_assert(sizeof(struct queue_header) == 512, "layout");
static_assert(sizeof(struct queue_entry) == 32, "layout");

static_assert(sizeof(_Atomic uint64_t) == 8 && ATOMIC_LLONG_LOCK_FREE == 2, "counters need lock-free 64-bit atomics");
static_assert(offsetof(struct ring_header, capacity) == 16, "layout");
static_assert(offsetof(struct ring_header, ring) == 256, "layout");
static_assert(offsetof(struct ring_lines, head) == RING_LINE, "layout");
static_assert(sizeof(struct ring_lines) == 2 * RING_LINE, "layout");
static_assert(sizeof(struct ring_header) == 768, "layout");
static_assert(sizeof(struct record_header) == 8, "layout");

static inline uint64_t record_bytes(uint64_t length)
{
    return (sizeof(struct record_header) + length + 7) & ~UINT64_C(7);
}

#endif
