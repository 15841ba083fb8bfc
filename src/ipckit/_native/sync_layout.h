/* sync_layout.h — the bytes of locks, semaphores, conditions and barriers that processes share.
 *
 *   offset 0      header     magic, version, kind, size, parameters                               (native byte order: one machine)
 *   offset 64     mutex      Lock, RLock, and the lock of a Condition that brings its own
 *   offset 128    monitor    the mutex that guards everything behind it, held for some instructions only
 *   offset 192    crowd      what is counted: units, parties, sets
 *   offset 256    witness    a robust word that the mutex's owner owns as well, where a Condition uses the mutex (lock.h)
 *   offset 320    slots      one for everybody who is inside or waits; none where the kind needs none
 *
 *   a robust word      0       4       8         16              24         32
 *                      | word  | pid   | since   | (its user's)  | previous | next     |
 *                      | u32   | u32   | ns u64  | two u32       | address  | address  |
 *
 *   word: 0 free; else the thread id of the owner, and two flags of the kernel's: WAITERS, OWNER_DIED (linux/futex.h).
 *   previous and next link it into its owner's list of robust futexes. The list belongs to the thread, and its links mean something
 *   to that thread only; the kernel walks it when the thread ends, however it ends. `next` lies 32 bytes behind `word` and
 *   `previous` before it because that is where the C library, which owns the list's head, has them in its own robust mutexes. */
#ifndef IPCKIT_SYNC_LAYOUT_H
#define IPCKIT_SYNC_LAYOUT_H

#include <assert.h>
#include <stdalign.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#define SYNC_MAGIC UINT64_C(0x00636e7973637069) /* "ipcsync\0" in little-endian memory */
#define SYNC_VERSION 1

/* The kernel's, from linux/futex.h. */
#define WAITERS UINT32_C(0x80000000)
#define OWNER_DIED UINT32_C(0x40000000)
#define OWNER_MASK UINT32_C(0x3fffffff)
/* A thread id that no thread has: they end at 2^22. */
#define NOBODY OWNER_MASK

enum sync_kind {
    SYNC_LOCK = 1,
    SYNC_RLOCK = 2,
    SYNC_SEMAPHORE = 3,
    SYNC_BOUNDED = 4,
    SYNC_LEASED = 5,
    SYNC_RWLOCK = 6,
    SYNC_CONDITION = 7,
    SYNC_EVENT = 8,
    SYNC_BARRIER = 9,
};

struct robust_word {
    _Atomic uint32_t word;
    _Atomic uint32_t pid;   /* of the owner, or of the last one */
    _Atomic uint64_t since; /* CLOCK_REALTIME in ns, some ms coarse */
    _Atomic uint32_t tid;   /* whose entry pid and since are */
    _Atomic uint32_t more;  /* mutex: who is next, see reserve in lock.c; slot: its gate */
    uint64_t previous, next;
};

struct mutex {
    struct robust_word own;
    uint32_t depth;            /* of an RLock, beyond the first; the owner's */
    _Atomic uint32_t watched;  /* a Condition uses it: its owner owns the witness as well */
    uint32_t unused[4];
};

/* One who is inside, or waits. Free while the word is 0. All but the word and the gate are written under the monitor. */
struct slot {
    struct robust_word own; /* own.more: the gate, NOBODY while its owner waits, else what it was told (enum gate) */
    _Atomic uint32_t role;
    uint32_t unused;
    _Atomic uint64_t order; /* of arrival */
    uint64_t unused2;
};

/* What a gate says. None has a bit of OWNER_MASK: see nap.forward in lock.h. */
enum gate { GATE_OPEN = 0, GATE_REFUSED = (int)OWNER_DIED };

struct crowd {
    _Atomic uint32_t bell;    /* counts what the eldest waiter has to look at */
    _Atomic uint32_t event;   /* Event: 0 set, NOBODY clear */
    _Atomic uint32_t flags;   /* enum crowd_flags */
    _Atomic uint32_t value;   /* Semaphore: units that are free (not where they are leased: there the slots are counted) */
    _Atomic uint32_t limit;   /* BoundedSemaphore, leased: units; Barrier: parties */
    _Atomic uint32_t turn;    /* Event: how often it was set */
    _Atomic uint32_t high;    /* no slot from this one on was ever used */
    _Atomic uint32_t running; /* Barrier: the slot + 1 of the party that runs the action */
    _Atomic uint64_t arrivals;
    uint64_t unused[3];
};

enum crowd_flags { CROWD_ABANDONED = 1, CROWD_BROKEN = 2 };

struct sync_header {
    uint64_t magic;
    uint32_t version;
    uint32_t kind;
    uint64_t size;  /* bytes of all of it */
    uint32_t slots; /* how many there are */
    uint32_t unused;
    uint64_t id;            /* random: no other object has it */
    uint64_t pid_namespace; /* inode of the one whose thread ids the words hold; 0: not known. See sync/_home.py */
    uint64_t made;          /* when: CLOCK_REALTIME in ns */
    uint64_t unused2;
};

struct sync_object {
    struct sync_header header;
    struct mutex mutex;
    struct mutex monitor;
    struct crowd crowd;
    struct robust_word witness;
    uint64_t unused[3];
    struct slot slots[];
};

#define SYNC_SMALL 4096
#define SYNC_SLOTS 1019 /* with the lines before them 64 KiB */
#define SYNC_LARGE (320 + SYNC_SLOTS * 64)

static_assert(sizeof(void *) == 8, "links are 64-bit addresses");
static_assert(ATOMIC_INT_LOCK_FREE == 2 && ATOMIC_LLONG_LOCK_FREE == 2, "words need lock-free atomics");
static_assert(offsetof(struct robust_word, previous) == 24 && offsetof(struct robust_word, next) == 32, "layout");
static_assert(sizeof(struct robust_word) == 40, "layout");
static_assert(sizeof(struct mutex) == 64 && sizeof(struct slot) == 64 && sizeof(struct crowd) == 64, "layout");
static_assert(sizeof(struct sync_header) == 64 && offsetof(struct sync_header, id) == 32, "layout");
static_assert(offsetof(struct sync_object, mutex) == 64 && offsetof(struct sync_object, monitor) == 128, "layout");
static_assert(offsetof(struct sync_object, crowd) == 192 && offsetof(struct sync_object, witness) == 256, "layout");
static_assert(offsetof(struct sync_object, slots) == 320, "layout");

#endif
