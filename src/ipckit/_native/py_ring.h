/* py_ring.h — what the four files of RingLink share: py_ring.c (the object), py_ring_recv.c (waiting, receiving), py_ring_send.c
 * (sending), py_claim.c (frames in place). */
#ifndef IPCKIT_PY_RING_H
#define IPCKIT_PY_RING_H

#include "module.h"

#include "ring.h"

typedef struct {
    PyObject_HEAD
    struct endpoint end;
    struct ring *ring;      /* of its own: it wants the alignment of cache lines */
    struct ring_map map;
    int bells[4], control;  /* -1 once they are closed */
    PyObject *wait;         /* the Wait class */
    PyObject *partial;      /* bytes: the frame that is streaming in */
    PyObject *rest_owner;   /* keeps rest.from alive; NULL: no rest */
    struct ring_rest rest;
    PyObject *loan;         /* the open loan, borrowed: it holds the sending lane */
    unsigned exports;       /* buffers of claims that point into the map */
    int turned_away;        /* Wants that found their lane busy, and may have armed since */
    bool adaptive;          /* spin=auto: spin_now varies between 0 and end.spin_ns */
    int64_t spin_now;
    unsigned loop_skip, loop_penalty; /* of spin_recv: calls that go by without a spin */
    unsigned brief;         /* rounds of spinning that are not worth letting go of the GIL */
    PyObject *weakrefs;
} RingLink;

/* A glance that orders nothing: what is seen is looked at again, in order, by ring.c. */
#define RING_HINT(word) atomic_load_explicit(&(word), memory_order_relaxed)

#define BRIEF_NS 1500
enum { LARGE = 64 << 10 }; /* copying more than this is worth letting go of the GIL */

int link_check_slow(RingLink *self, const char *operation);
static inline int link_check(RingLink *self, const char *operation)
{
    if (__builtin_expect(self->end.closed || self->end.generation != fork_generation, 0))
        return link_check_slow(self, operation);
    return 0;
}

/* Refuse a closed or forked link, take the lane, and keep the descriptors until leave. */
int link_enter(RingLink *self, struct lane *lane, int64_t deadline, const char *operation);
void link_leave(RingLink *self, struct lane *lane);
/* The same without waiting: 1, 0 if the lane is busy (the end of whoever has it will ring our own bell), -1. */
int link_try_enter(RingLink *self, struct lane *lane, const char *operation);
void link_hand_on(RingLink *self, struct lane *lane); /* the lane alone */

/* Raise what has ended the link. Always -1. */
int link_ended(RingLink *self, enum ring_status why, const char *operation);
int link_may_send(RingLink *self, uint64_t size, uint64_t most, const char *operation);
/* Push the rest of an earlier frame: 1 when it is gone, 0 if it would wait, -1. The sending lane is ours. */
int link_push_rest(RingLink *self, const char *operation);
/* The next frame without waiting: 1, 0, -1. The receiving lane is ours. */
int link_next(RingLink *self, struct ring_frame *frame, const char *operation);

/* One wait of one call: how far it has come. */
struct patience {
    PyObject *timeout; /* NULL and None: for ever */
    int64_t deadline;  /* read from the timeout when it is first needed: the hot path needs no clock */
    int64_t since;
    enum { FRESH, BRIEF, SPUN, ASLEEP } stage;
};

enum turn { AGAIN, LATE, FAILED }; /* FAILED: an exception is set */

/* Nothing there, or no room: wait for a while that grows with each call. LATE says that one last try is left. */
enum turn link_wait(RingLink *self, int want, struct patience *patience, const char *operation);
/* A wrong timeout is told whether or not there is need to wait. */
int link_check_timeout(PyObject *timeout);
int link_enter_waiting(RingLink *self, struct lane *lane, PyObject *timeout, const char *operation);
PyObject *link_late(RingLink *self, const char *operation);
void link_too_large(RingLink *self, uint64_t size, uint64_t most, const char *operation);

/* The methods; arguments are read in py_ring.c. */
PyObject *link_receive(RingLink *self, PyObject *timeout);
PyObject *link_receive_into(RingLink *self, PyObject *buffer, PyObject *timeout);
PyObject *link_receive_many(RingLink *self, PyObject *most, PyObject *timeout);
PyObject *link_transmit(RingLink *self, PyObject *frame, PyObject *timeout, PyObject *priority);
PyObject *link_transmit_many(RingLink *self, PyObject *sequence, PyObject *timeout);
PyObject *link_try_recv(PyObject *self, PyObject *unused);
PyObject *link_spin_recv(PyObject *self, PyObject *unused);
PyObject *link_try_send(PyObject *self, PyObject *frame);
PyObject *link_try_flush(PyObject *self, PyObject *unused);

/* Unmap and close what nobody uses any more, if the link is closed. */
void link_release(RingLink *self);

int add_claim_type(PyObject *module);
PyObject *link_try_loan(PyObject *self, PyObject *size);
PyObject *link_try_borrow(PyObject *self, PyObject *unused);
void claim_lose_lane(PyObject *claim); /* the link closes under an open loan */

#endif
