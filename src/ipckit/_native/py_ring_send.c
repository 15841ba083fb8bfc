/* py_ring_send.c — RingLink: sending.
 *
 * A frame up to a chunk goes into the ring whole. A longer one streams: what has left is not taken back, so when the time is up
 * half-way, the rest stays with the link and goes out with the next call, sending or receiving. */
#include "py_ring.h"

#include <string.h>
#include <sys/socket.h>

enum { BATCH = 16 }; /* frames of send_many that become visible together: each store of the tail costs the reader a cache miss */

/* -- sending ------------------------------------------------------------------------------------------------------- */

static void show(RingLink *self)
{
    ring_publish(self->ring);
    ring_wake_reader(self->ring);
}

int link_may_send(RingLink *self, uint64_t size, uint64_t most, const char *operation)
{
    if (__builtin_expect(size > most, 0)) {
        link_too_large(self, size, most, operation);
        return -1;
    }
    enum ring_status status = ring_sendable(self->ring);
    return __builtin_expect(status == RING_OK, 1) ? 0 : link_ended(self, status, operation);
}

static int stream(RingLink *self, struct ring_rest *rest, const char *operation)
{
    enum ring_status status;
    Py_BEGIN_ALLOW_THREADS
    status = ring_stream(self->ring, rest);
    Py_END_ALLOW_THREADS
    if (self->end.closed && status != RING_OK) {
        give_up(&self->end, REASON_CLOSED, operation, NULL);
        return -1;
    }
    return status == RING_OK ? 1 : status == RING_WAIT ? 0 : link_ended(self, status, operation);
}

int link_push_rest(RingLink *self, const char *operation)
{
    if (__builtin_expect(self->rest_owner == NULL, 1))
        return 1;
    if (link_may_send(self, 0, 0, operation) < 0)
        return -1;
    int done = stream(self, &self->rest, operation);
    if (done > 0)
        Py_CLEAR(self->rest_owner);
    return done;
}

/* The rest of an earlier frame goes first: 1, 0 when the time was up (or `patience` is NULL and it would wait), -1. */
static int await_rest(RingLink *self, struct patience *patience, const char *operation)
{
    for (enum turn turn = AGAIN;;) {
        int done = link_push_rest(self, operation);
        if (done || !patience || turn == LATE)
            return done;
        if ((turn = link_wait(self, RING_SEND, patience, operation)) == FAILED)
            return -1;
    }
}

/* What has left is not taken back: what has not left stays with the link. `frame`: whose memory it is. */
static int keep_rest(RingLink *self, struct ring_rest *rest, PyObject *frame)
{
    if (PyBytes_CheckExact(frame))
        self->rest_owner = Py_NewRef(frame);
    else {
        PyObject *type, *value, *traceback;
        PyErr_Fetch(&type, &value, &traceback);
        rest->size -= rest->done;
        rest->from += rest->done;
        rest->done = 0;
        self->rest_owner = PyBytes_FromStringAndSize((const char *)rest->from, (Py_ssize_t)rest->size);
        if (!self->rest_owner) {
            Py_XDECREF(type);
            Py_XDECREF(value);
            Py_XDECREF(traceback);
            /* Half a frame is out and the other half is lost; the peer must not take what follows for it. */
            shutdown(self->control, SHUT_RDWR);
            ring_look(self->ring);
            return -1;
        }
        rest->from = (const uint8_t *)PyBytes_AsString(self->rest_owner);
        PyErr_Restore(type, value, traceback);
    }
    self->rest = *rest;
    ring_nudge(self->ring, RING_RECV); /* who sleeps there, thread or task, does not wait for room yet */
    return 0;
}

enum { KEPT = 2 }; /* the frame is accepted, and its rest is with the link */

static int send_streamed(RingLink *self, const uint8_t *data, uint64_t size, PyObject *frame, struct patience *patience,
                         const char *operation)
{
    struct ring_rest rest = {.from = data, .size = size};
    enum turn turn = AGAIN;
    int done;
    for (;;) {
        done = stream(self, &rest, operation);
        if (done || !patience || turn == LATE)
            break;
        if ((turn = link_wait(self, RING_SEND, patience, operation)) == FAILED) {
            done = -1;
            break;
        }
        if (link_may_send(self, 0, 0, operation) < 0) {
            done = -1;
            break;
        }
    }
    if (!rest.begun)
        return done;
    self->end.counters[0]++;
    self->end.counters[1] += size;
    if (done > 0)
        return 1;
    if (self->end.closed || ring_sendable(self->ring) != RING_OK)
        return done ? done : link_may_send(self, 0, 0, operation);
    if (keep_rest(self, &rest, frame) < 0)
        return -1;
    return done == 0 ? KEPT : -1;
}

/* Put one frame into the ring, not yet visible unless it streams: 1, KEPT, 0 (no room, and no patience left), -1. */
static int put_frame(RingLink *self, const uint8_t *data, uint64_t size, PyObject *frame, struct patience *patience,
                     bool *visible, const char *operation)
{
    struct ring *r = self->ring;
    if (__builtin_expect(size > r->chunk, 0)) {
        *visible = true;
        return send_streamed(self, data, size, frame, patience, operation);
    }
    enum turn turn = AGAIN;
    uint8_t *payload;
    enum ring_status status;
    while (__builtin_expect((status = ring_reserve(r, size, &payload)) != RING_OK, 0)) {
        if (status == RING_BROKEN)
            return link_ended(self, status, operation);
        if (!patience || turn == LATE)
            return 0;
        if (!*visible) {
            show(self);
            *visible = true;
        }
        if ((turn = link_wait(self, RING_SEND, patience, operation)) == FAILED || link_may_send(self, 0, 0, operation) < 0)
            return -1;
    }
    if (size > LARGE) {
        Py_BEGIN_ALLOW_THREADS
        memcpy(payload, data, size);
        Py_END_ALLOW_THREADS
        if (self->end.closed) {
            give_up(&self->end, REASON_CLOSED, operation, NULL);
            return -1;
        }
    } else
        memcpy(payload, data, size);
    ring_append(r, size, RECORD_WHOLE);
    *visible = false;
    self->end.counters[0]++;
    self->end.counters[1] += size;
    return 1;
}

/* The memory of a frame; bytes need no release, and are what nearly everyone sends. */
static inline int look_into(PyObject *frame, const uint8_t **data, Py_ssize_t *size, Py_buffer *view)
{
    view->obj = NULL;
    if (__builtin_expect(PyBytes_CheckExact(frame), 1))
        return PyBytes_AsStringAndSize(frame, (char **)data, size);
    if (PyObject_GetBuffer(frame, view, PyBUF_SIMPLE) < 0)
        return -1;
    *data = view->buf;
    *size = view->len;
    return 0;
}

/* 1, KEPT, 0, -1; `patience` NULL: do not wait. The lane is ours. */
static int send_one(RingLink *self, PyObject *frame, struct patience *patience, const char *operation)
{
    const uint8_t *data;
    Py_ssize_t size;
    Py_buffer view;
    if (look_into(frame, &data, &size, &view) < 0)
        return -1;
    int done = link_may_send(self, (uint64_t)size, self->end.limit, operation);
    if (done == 0 && (done = self->rest_owner ? await_rest(self, patience, operation) : 1) > 0) {
        bool visible = true;
        done = put_frame(self, data, (uint64_t)size, frame, patience, &visible, operation);
        if (!visible)
            show(self);
    }
    if (view.obj)
        PyBuffer_Release(&view);
    return done;
}

PyObject *link_try_send(PyObject *object, PyObject *frame)
{
    RingLink *self = (RingLink *)object;
    int done = link_try_enter(self, &self->end.send, "send");
    if (done > 0) {
        done = send_one(self, frame, NULL, "send");
        link_leave(self, &self->end.send);
    }
    return done < 0 ? NULL : PyBool_FromLong(done != 0);
}

PyObject *link_try_flush(PyObject *object, PyObject *unused)
{
    RingLink *self = (RingLink *)object;
    (void)unused;
    if (!self->rest_owner)
        return link_check(self, "send") < 0 ? NULL : Py_NewRef(Py_True);
    int done = link_try_enter(self, &self->end.send, "send");
    if (done > 0) {
        done = link_push_rest(self, "send");
        link_leave(self, &self->end.send);
    }
    return done < 0 ? NULL : PyBool_FromLong(done != 0);
}

PyObject *link_transmit(RingLink *self, PyObject *frame, PyObject *timeout, PyObject *priority)
{
    struct patience patience = {.timeout = timeout};
    if (__builtin_expect(priority != NULL, 0)) {
        long level = PyLong_AsLong(priority);
        if (level == -1 && PyErr_Occurred())
            return NULL;
        if (level != 0)
            return give_up(&self->end, REASON_UNSUPPORTED, "send", PyUnicode_FromString("this transport has no priorities"));
    }
    if (link_check_timeout(timeout) < 0 || link_enter_waiting(self, &self->end.send, timeout, "send") < 0)
        return NULL;
    int done = send_one(self, frame, &patience, "send");
    if (done == 0)
        link_late(self, "send");
    else if (done == KEPT)
        give_up(&self->end, REASON_UNKNOWN, "send", NULL);
    link_leave(self, &self->end.send);
    return done == 1 ? Py_NewRef(Py_None) : NULL;
}

/* Nothing is sent if any of the frames cannot be. */
static int look_through(RingLink *self, PyObject *frames, Py_ssize_t count)
{
    for (Py_ssize_t i = 0; i < count; i++) {
        const uint8_t *data;
        Py_ssize_t size;
        Py_buffer view;
        if (look_into(PyTuple_GetItem(frames, i), &data, &size, &view) < 0)
            return -1;
        if (view.obj)
            PyBuffer_Release(&view);
        if ((uint64_t)size > self->end.limit) {
            link_too_large(self, (uint64_t)size, self->end.limit, "send_many");
            return -1;
        }
    }
    return 0;
}

PyObject *link_transmit_many(RingLink *self, PyObject *sequence, PyObject *timeout)
{
    struct patience patience = {.timeout = timeout};
    PyObject *frames = PySequence_Tuple(sequence);
    if (!frames)
        return NULL;
    Py_ssize_t count = PyTuple_Size(frames), accepted = 0;
    int done = -1;
    if (look_through(self, frames, count) == 0 && link_check_timeout(timeout) == 0 &&
        link_enter_waiting(self, &self->end.send, timeout, "send_many") == 0) {
        bool visible = true;
        done = link_may_send(self, 0, 0, "send_many");
        if (done == 0)
            done = await_rest(self, &patience, "send_many");
        for (Py_ssize_t i = 0; i < count && done == 1; i++) {
            PyObject *frame = PyTuple_GetItem(frames, i);
            const uint8_t *data;
            Py_ssize_t size;
            Py_buffer view;
            uint64_t before = self->end.counters[0];
            if ((done = look_into(frame, &data, &size, &view)) < 0)
                break;
            if ((uint64_t)size > self->end.limit) { /* it grew since */
                link_too_large(self, (uint64_t)size, self->end.limit, "send_many");
                done = -1;
            } else {
                if ((uint64_t)size > self->ring->chunk && !visible) { /* it streams, so what precedes it goes first */
                    show(self);
                    visible = true;
                }
                done = put_frame(self, data, (uint64_t)size, frame, &patience, &visible, "send_many");
            }
            if (view.obj)
                PyBuffer_Release(&view);
            accepted += self->end.counters[0] != before;
            if (!visible && accepted % BATCH == 0)
                ring_publish(self->ring);
            patience.stage = patience.stage == FRESH ? FRESH : BRIEF;
        }
        if (!self->end.closed && !visible)
            show(self);
        link_leave(self, &self->end.send);
        if (done == 0 && !accepted && count)
            link_late(self, "send_many");
    }
    Py_DECREF(frames);
    return done > 0 || (done == 0 && !PyErr_Occurred()) ? PyLong_FromSsize_t(accepted) : NULL;
}
