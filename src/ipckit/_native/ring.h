/* ring.h — one side of a shared-memory link: two single-producer single-consumer rings, their bells, and the control socket.
 *
 * Plain C, no Python. Ownership: `struct ring` borrows its map and its descriptors; who made them lets go of them.
 * Threads: one may be in the sending functions and one in the receiving ones at a time; the rest says what it allows.
 * Trust: whatever comes out of shared memory is copied once and checked before it is used. What fails the check ends this link
 * (RING_BROKEN, for ever) and nothing else. */
#ifndef IPCKIT_RING_H
#define IPCKIT_RING_H

#include <assert.h>
#include <stdbool.h>

#include "layout.h"

/* -- memory -------------------------------------------------------------------------------------------------------- */

/* A sealed memfd with two formatted, allocated rings. -1 and errno. EINVAL: capacity is no power of two, or below a page. */
int ring_create(uint64_t capacity);

struct ring_map {
    struct ring_header *header;
    uint8_t *data[2]; /* each 2 * capacity bytes of addresses over capacity bytes of memory */
    uint64_t capacity;
};

/* Check a memfd that a peer made, and map it: ring `side` writable, the other one readable only (side -1: both writable).
 * 0, or -1 with errno; EPROTO: it is not a ring, and *why says what is wrong with it. The descriptor may be closed afterwards. */
int ring_map(struct ring_map *map, int memory, int side, const char **why);
void ring_unmap(struct ring_map *map);

/* -- one side ------------------------------------------------------------------------------------------------------ */

enum ring_status {
    RING_OK,
    RING_WAIT,    /* empty, or full */
    RING_LARGE,   /* receiving: a streamed frame begins; provide memory by ring_assemble and ask again */
    RING_GOODBYE, /* the peer closed in order */
    RING_ENDED,   /* the peer's process ended */
    RING_BROKEN,  /* the peer broke the protocol; see `broken` */
};

enum ring_want { RING_RECV = 1, RING_SEND = 2 }; /* the values of ipckit._spi.Want */

struct ring {
    /* fixed */
    struct ring_lines *out, *in;
    uint8_t *out_data;
    const uint8_t *in_data;
    uint64_t capacity, mask, limit;
    uint64_t chunk; /* frames up to this many bytes are one record; longer ones are streamed in records of this size */
    int ring_data, ring_space;         /* eventfds that we ring: of our ring's data, of the peer's ring's space */
    int hear_data, hear_space;         /* eventfds that we hear */
    int control, bell;                 /* the peer's life line; what close() rings in this process */

    /* either thread */
    _Atomic(const char *) broken; /* what the peer did wrong, or NULL */
    atomic_bool ended, closing;
    _Atomic int64_t tick; /* when we last looked at the control socket */

    /* sending thread; a receiver that also waits for room glances at two of them */
    alignas(RING_LINE) _Atomic uint64_t tail; /* ours; the shared one follows at ring_publish */
    _Atomic uint64_t need;                    /* bytes that the last refused reservation wanted free */
    uint64_t seen_head;
    int send_epoll;

    /* receiving thread */
    alignas(RING_LINE) uint64_t read; /* what we have taken */
    uint64_t seen_tail;
    uint64_t head;    /* what we have given back; behind `read` while borrows are out */
    atomic_uint held;        /* borrows; ended by any thread */
    atomic_bool release_due; /* one ended while the receiving thread was at work: that thread gives the memory back */
    uint8_t *into;    /* memory for the frame that is streaming in, or NULL */
    uint64_t total, done;
    bool data_dirty; /* our data bell may hold a count that nobody has read */
    bool watched, rung; /* somebody polls `watch`; our data bell holds a count of ours */
    unsigned idle_arms;
    int recv_epoll, watch;
    bool recv_epoll_space;
};

void ring_init(struct ring *r, const struct ring_map *map, int side, const int bells[4], int control, int bell, uint64_t limit);
void ring_finish(struct ring *r); /* closes the epolls, which are all that ring_init's ring opens by itself */

/* -- sending ------------------------------------------------------------------------------------------------------- */

/* Is there anybody to send to? RING_OK, GOODBYE, ENDED, BROKEN. Looks at the control socket once in a tick of the coarse clock
 * (1 to 10 ms), so a sender that never waits hears of a death within that time, for 7 ns a call. */
enum ring_status ring_sendable(struct ring *r);

/* Room for one record with a payload of `length`: OK with *payload, WAIT (and r->need is set), BROKEN. */
enum ring_status ring_reserve(struct ring *r, uint64_t length, uint8_t **payload);
void ring_append(struct ring *r, uint64_t length, enum record_kind kind); /* the payload is in place; not yet visible */
void ring_publish(struct ring *r);                                         /* all that was appended becomes visible */
void ring_wake_reader(struct ring *r);                                     /* after ring_publish */

/* What is left of a frame that streams. */
struct ring_rest {
    const uint8_t *from;
    uint64_t size, done;
    bool begun;
};
/* Send as many records of it as fit. OK: that was all of it. WAIT: room for r->need bytes is wanted. */
enum ring_status ring_stream(struct ring *r, struct ring_rest *rest);

/* -- receiving ----------------------------------------------------------------------------------------------------- */

struct ring_frame {
    const uint8_t *payload; /* in the ring, or what was given to ring_assemble */
    uint64_t size;
    bool assembled; /* the memory given to ring_assemble; nothing is left to ring_take */
};

/* The next frame, which stays until ring_take. LARGE: frame->size is the size of a frame that streams. Everything committed
 * comes before GOODBYE, ENDED or BROKEN. */
enum ring_status ring_next(struct ring *r, struct ring_frame *frame);
void ring_assemble(struct ring *r, uint8_t *into, uint64_t size); /* after LARGE */
void ring_take(struct ring *r, const struct ring_frame *frame);
/* Give back what was taken and is not held, and wake the peer if it waits for that much. */
void ring_release(struct ring *r);
/* Any thread: the receiving thread shall call ring_release, and is woken for it. */
void ring_release_soon(struct ring *r);

/* -- waiting ------------------------------------------------------------------------------------------------------- */

bool ring_ready(struct ring *r, int want);
/* Look for `rounds` times. */
bool ring_spin(struct ring *r, int want, unsigned rounds);
unsigned ring_rounds(int64_t ns); /* how many rounds that time is */

enum ring_woke { RING_WOKE, RING_LATE, RING_SIGNAL };
/* Spin until `until`, a time of CLOCK_MONOTONIC in ns; also ends when ring_look finds the peer gone or `closing` is set. */
bool ring_spin_until(struct ring *r, int want, int64_t until);
/* Announce, look again, and sleep until something may have changed, the deadline (INT64_MAX: none), or a signal. `want` with
 * RING_RECV is the receiving thread's sleep (with RING_SEND too, it waits for either). -1: errno. */
int ring_sleep(struct ring *r, int want, int64_t deadline);

/* For somebody else's sleep on hear_data, hear_space and control: announce. Look again before sleeping. */
void ring_arm(struct ring *r, int want);
/* Let the armed sleeper look again, from this process. */
void ring_nudge(struct ring *r, int want);

/* A descriptor for selectors that never arm: readable when a frame or the peer's end may be there. Made at the first call; then
 * (`watched`) every receiving call must end with ring_watch_on. -1: errno. */
int ring_watch(struct ring *r);
void ring_watch_on(struct ring *r);

/* Ask the control socket whether the peer is there; sets `ended` or `broken`. ring_glance: once in a tick. */
void ring_look(struct ring *r);
void ring_glance(struct ring *r);

/* Tell the peer that nothing follows. Any thread; after it, nothing may be published. */
void ring_goodbye(struct ring *r);

#endif
