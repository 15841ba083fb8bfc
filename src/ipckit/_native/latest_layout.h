/* latest_layout.h — the bytes of a Latest: the newest of a series of values, and room to write the next.
 *
 *   offset 0      header     magic, version, slots, capacity, size                             (native byte order: one machine)
 *   offset 64     current    number of the newest value; 0: none yet. Its low half is the futex of those who wait
 *   offset 128    waiting    0, or the highest number that somebody waits for
 *   offset 192    slots      value n lies in slot n % SLOTS
 *
 *   a slot        0        8        16
 *                 | number | length | the bytes, in whole words ...
 *
 * A slot's number is that of the value that lies in it; 0 while it is written. The value that `current` names is never touched:
 * the next one goes into another slot, so a writer that is killed in the middle leaves what was newest as it was. */
#ifndef IPCKIT_LATEST_LAYOUT_H
#define IPCKIT_LATEST_LAYOUT_H

#include <assert.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#define LATEST_MAGIC UINT64_C(0x0074736574616c69) /* "ilatest\0" in little-endian memory */
#define LATEST_VERSION 1
/* With two, a reader that is overtaken once begins anew; with four the writer has to lap it. */
#define LATEST_SLOTS 4

struct latest_slot {
    _Atomic uint64_t number;
    _Atomic uint64_t length;
    _Atomic uint64_t words[];
};

struct latest {
    uint64_t magic;
    uint32_t version;
    uint32_t slots;
    uint64_t capacity; /* bytes of the largest value */
    uint64_t size;     /* bytes of all of it */
    uint64_t unused[4];
    _Atomic uint64_t current;
    _Atomic uint64_t writer; /* process id of the one who writes, or wrote last: for those who look */
    uint64_t unused2[6];
    _Atomic uint64_t waiting;
    uint64_t unused3[7];
};

static_assert(ATOMIC_LLONG_LOCK_FREE == 2, "words need lock-free atomics");
static_assert(offsetof(struct latest, current) == 64 && offsetof(struct latest, waiting) == 128, "layout");
static_assert(sizeof(struct latest) == 192 && sizeof(struct latest_slot) == 16, "layout");

#endif
