/* module.h — what the glue between C and Python shares.
 *
 * Three layers, and the includes show them:
 *   layout.h ring.[ch] broadcast.[ch] stream.[ch] floor.[ch]   plain C11, no Python; tests/native builds them under the sanitizers
 *   glue.c py_ring.c py_stream.c                Python objects over them; the only files, with module.c, that include this header
 *   module.c                                    the module: constants, types, functions
 *
 * Everything here is called with the GIL held unless it says otherwise.
 */
#ifndef IPCKIT_MODULE_H
#define IPCKIT_MODULE_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#define PY_SSIZE_T_CLEAN
#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030B0000
#endif
#include <Python.h>

#include <stdbool.h>
#include <stdint.h>

/* Why a link gives up. The same numbers are module constants; ipckit.transports._native turns them into exceptions. */
enum reason {
    REASON_CLOSED = 1,
    REASON_ENDED = 2,
    REASON_GOODBYE = 3,
    REASON_TIMED_OUT = 4,
    REASON_UNKNOWN = 5,
    REASON_TOO_LARGE = 6,
    REASON_PROTOCOL = 7,
    REASON_SYSTEM = 8,
    REASON_UNSUPPORTED = 9,
};

#define NO_DEADLINE INT64_MAX
/* The longest spin_recv(): its caller is an event loop, which has others to look after. */
#define LOOP_SPIN_NS 50000

/* One direction of one link. `busy` is only read and written with the GIL, so an uncontended call costs a branch; a second
 * thread sleeps on the lock. */
struct lane {
    bool busy;
    unsigned waiting;
    PyThread_type_lock lock;
};

/* What every native link has; the first member of its object after PyObject_HEAD. */
struct endpoint {
    PyObject *fail;      /* (reason, operation, detail) -> exception */
    PyObject *on_fork;   /* called at the first use in a forked child: raises, or returns to adopt the link */
    PyObject *waits[4];  /* prebuilt Wait objects, by Want; made at the first arm */
    PyObject *native;
    PyObject *peer;
    struct lane send, recv;
    uint64_t counters[4]; /* frames sent, bytes sent, frames received, bytes received */
    int64_t spin_ns;      /* resolved: never -1 */
    uint64_t limit;
    int bell;             /* eventfd that close() rings; in every poll of a blocking call. Closed with the descriptors (then -1) */
    unsigned inside;      /* calls that have let go of the GIL */
    unsigned generation;  /* of forks, when the link was made or adopted */
    bool closed;          /* close() was called; the descriptors go when inside is 0 */
};

extern unsigned fork_generation; /* counted by pthread_atfork */

int64_t now_ns(void); /* CLOCK_MONOTONIC; needs no GIL */

/* `timeout` in seconds as Python gives it (NULL and None: NO_DEADLINE). -1 with an exception set if it is no number or negative. */
int64_t deadline_of(PyObject *timeout);

/* The arguments of a METH_FASTCALL | METH_KEYWORDS call, by position or name, into `found` (NULL where absent). `names` ends with NULL;
 * the first `required` must be there. 0, or -1 with a TypeError set. */
int read_arguments(const char *function, const char *const *names, int required, PyObject *const *args, Py_ssize_t count,
                   PyObject *keywords, PyObject **found);

/* Raise what `fail` makes of it. Steals `detail` (NULL for None). Always returns NULL. */
PyObject *give_up(struct endpoint *end, enum reason why, const char *operation, PyObject *detail);

/* Refuse a closed link, and a link that another process opened. 0, or -1 with an exception set. Inline, for the hot path. */
int endpoint_forked(struct endpoint *end, const char *operation);
static inline int endpoint_check(struct endpoint *end, const char *operation)
{
    if (__builtin_expect(end->closed, 0)) {
        give_up(end, REASON_CLOSED, operation, NULL);
        return -1;
    }
    if (__builtin_expect(end->generation != fork_generation, 0))
        return endpoint_forked(end, operation);
    return 0;
}

/* Wait for the lane. 0, or -1 with an exception set (timed out, closed, interrupted). */
int lane_wait(struct endpoint *end, struct lane *lane, int64_t deadline, const char *operation);
static inline int lane_enter(struct endpoint *end, struct lane *lane, int64_t deadline, const char *operation)
{
    if (__builtin_expect(lane->busy, 0))
        return lane_wait(end, lane, deadline, operation);
    lane->busy = true;
    return 0;
}
void lane_leave(struct lane *lane);

/* Nanoseconds of spinning that `auto` (-1) means here: 0 where we and the peer (a Peer) may run on one and the same core only. */
int64_t spin_budget(int64_t spin_ns, PyObject *peer);

int endpoint_init(struct endpoint *end, PyObject *fail, PyObject *on_fork, uint64_t limit, int64_t spin_ns,
                  PyObject *native, PyObject *peer);
void endpoint_clear(struct endpoint *end); /* the references; may run twice (tp_clear, then dealloc) */
void endpoint_free(struct endpoint *end);  /* the locks and the bell; in dealloc only */
int endpoint_traverse(struct endpoint *end, visitproc visit, void *arg);
PyObject *endpoint_counters(struct endpoint *end);

/* Adding the types; 0 or -1. */
int add_stream_type(PyObject *module);
int add_ring_type(PyObject *module); /* and ring_create */
int add_kernel_calls(PyObject *module);
int add_broadcast_types(PyObject *module);

#endif
