/* py_ring_recv.c — RingLink: waiting, and receiving.
 *
 * What must wait spins a moment with the GIL (letting go of it costs as much as an answer that is already on its way), then
 * without it, then sleeps. */
#include "py_ring.h"

#include <errno.h>
#include <string.h>

#define SPIN_SLICE_NS 10000000 /* how long a spin may keep a signal handler waiting */

/* -- waiting ------------------------------------------------------------------------------------------------------- */

static enum turn after_gil(RingLink *self, const char *operation)
{
    if (self->end.closed) {
        give_up(&self->end, REASON_CLOSED, operation, NULL);
        return FAILED;
    }
    return PyErr_CheckSignals() < 0 ? FAILED : AGAIN;
}

/* `auto` spins as long as spinning would have been enough lately, and halves it each time that it was not: an idle link sleeps
 * after a few waits, a busy one spins again after one short one. */
static void adapt(RingLink *self, int64_t waited)
{
    if (waited <= 2 * self->end.spin_ns) /* the sleep's own cost is in it */
        self->spin_now = self->end.spin_ns;
    else
        self->spin_now = self->spin_now > 2 * BRIEF_NS ? self->spin_now / 2 : 0;
}

static enum turn wait_sleeping(RingLink *self, int want, struct patience *patience, const char *operation)
{
    int woke, error;
    Py_BEGIN_ALLOW_THREADS
    woke = ring_sleep(self->ring, want, patience->deadline);
    error = errno;
    Py_END_ALLOW_THREADS
    if (self->adaptive && woke == RING_WOKE)
        adapt(self, now_ns() - patience->since);
    if (self->end.closed || woke == RING_SIGNAL)
        return after_gil(self, operation);
    if (woke < 0) {
        give_up(&self->end, REASON_SYSTEM, operation, PyLong_FromLong(error));
        return FAILED;
    }
    return woke == RING_LATE ? LATE : AGAIN;
}

/* Nothing there, or no room: wait for a while that grows with each call. LATE comes after the last try. */
enum turn link_wait(RingLink *self, int want, struct patience *patience, const char *operation)
{
    if (patience->stage == FRESH) {
        if ((patience->deadline = deadline_of(patience->timeout)) < 0)
            return FAILED;
        if (patience->deadline == 0)
            return LATE;
        patience->stage = BRIEF;
        if (self->spin_now && ring_spin(self->ring, want, self->brief))
            return AGAIN;
    }
    if (patience->stage == BRIEF) {
        patience->stage = SPUN;
        if (self->adaptive)
            patience->since = now_ns();
        for (int64_t left = self->spin_now - BRIEF_NS; left > 0; left -= SPIN_SLICE_NS) {
            int64_t until = now_ns() + (left < SPIN_SLICE_NS ? left : SPIN_SLICE_NS);
            if (until >= patience->deadline) {
                until = patience->deadline;
                left = 0;
            }
            bool found;
            Py_BEGIN_ALLOW_THREADS
            found = ring_spin_until(self->ring, want, until);
            Py_END_ALLOW_THREADS
            /* A signal of this slice would not end the sleep that follows. */
            if (after_gil(self, operation) == FAILED)
                return FAILED;
            if (found) {
                if (self->adaptive)
                    self->spin_now = self->end.spin_ns;
                return AGAIN;
            }
        }
    }
    if (patience->deadline != NO_DEADLINE && patience->stage == ASLEEP && now_ns() >= patience->deadline)
        return LATE;
    patience->stage = ASLEEP;
    return wait_sleeping(self, want, patience, operation);
}

/* Timeouts are looked at before the first try, so that a wrong one is told whether or not there was need to wait. */
int link_check_timeout(PyObject *timeout)
{
    if (__builtin_expect(timeout == NULL || timeout == Py_None, 1))
        return 0;
    double seconds = PyFloat_AsDouble(timeout);
    return seconds >= 0 ? 0 : deadline_of(timeout) < 0 ? -1 : 0;
}

int link_enter_waiting(RingLink *self, struct lane *lane, PyObject *timeout, const char *operation)
{
    int64_t deadline = NO_DEADLINE;
    if (__builtin_expect(lane->busy, 0) && (deadline = deadline_of(timeout)) < 0)
        return -1;
    return link_enter(self, lane, deadline, operation);
}

PyObject *link_late(RingLink *self, const char *operation)
{
    return give_up(&self->end, REASON_TIMED_OUT, operation, NULL);
}

/* -- receiving ----------------------------------------------------------------------------------------------------- */

static int begin_large(RingLink *self, uint64_t size)
{
    /* Within the limit. Its pages are touched as data come, so a false size costs addresses and no memory. */
    self->partial = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)size);
    if (!self->partial)
        return -1;
    ring_assemble(self->ring, (uint8_t *)PyBytes_AsString(self->partial), size);
    return 0;
}

int link_next(RingLink *self, struct ring_frame *frame, const char *operation)
{
    bool glanced = false;
    for (;;) {
        enum ring_status status;
        if (__builtin_expect(self->partial != NULL, 0)) {
            Py_BEGIN_ALLOW_THREADS
            status = ring_next(self->ring, frame);
            Py_END_ALLOW_THREADS
            if (self->end.closed) {
                give_up(&self->end, REASON_CLOSED, operation, NULL);
                return -1;
            }
        } else
            status = ring_next(self->ring, frame);
        if (__builtin_expect(status == RING_OK, 1))
            return 1;
        if (status == RING_LARGE) {
            if (begin_large(self, frame->size) < 0)
                return -1;
        } else if (status != RING_WAIT)
            return link_ended(self, status, operation);
        else if (glanced)
            return 0;
        else { /* who only ever tries must hear of a death, too */
            ring_glance(self->ring);
            glanced = true;
            if (!RING_HINT(self->ring->ended))
                return 0;
        }
    }
}

/* 1 and a frame, 0 when the time was up, -1. */
static int await_frame(RingLink *self, struct ring_frame *frame, struct patience *patience, const char *operation)
{
    for (enum turn turn = AGAIN;;) {
        int found = link_next(self, frame, operation);
        if (found)
            return found;
        if (__builtin_expect(RING_HINT(self->ring->release_due), 0))
            ring_release(self->ring);
        int want = RING_RECV;
        if (__builtin_expect(self->rest_owner != NULL, 0) && !self->end.send.busy) {
            self->end.send.busy = true;
            int pushed = link_push_rest(self, operation);
            link_hand_on(self, &self->end.send);
            if (pushed < 0)
                PyErr_Clear(); /* the next send will say it; what the peer sent is still ours */
            else if (pushed == 0)
                want |= RING_SEND;
        }
        if (turn == LATE)
            return 0;
        if ((turn = link_wait(self, want, patience, operation)) == FAILED)
            return -1;
    }
}

static inline void taken(RingLink *self, const struct ring_frame *frame)
{
    ring_take(self->ring, frame);
    self->end.counters[2]++;
    self->end.counters[3] += frame->size;
}

static PyObject *take_bytes(RingLink *self, const struct ring_frame *frame)
{
    PyObject *bytes;
    if (frame->assembled) {
        bytes = self->partial;
        self->partial = NULL;
    } else {
        bool large = frame->size > LARGE;
        bytes = PyBytes_FromStringAndSize(large ? NULL : (const char *)frame->payload, (Py_ssize_t)frame->size);
        if (!bytes)
            return NULL;
        if (large) {
            char *into = PyBytes_AsString(bytes);
            Py_BEGIN_ALLOW_THREADS
            memcpy(into, frame->payload, frame->size);
            Py_END_ALLOW_THREADS
        }
    }
    taken(self, frame);
    return bytes;
}

PyObject *link_try_recv(PyObject *object, PyObject *unused)
{
    RingLink *self = (RingLink *)object;
    (void)unused;
    int entered = link_try_enter(self, &self->end.recv, "recv");
    if (entered <= 0)
        return entered < 0 ? NULL : Py_NewRef(Py_None);
    struct ring_frame frame;
    PyObject *bytes = NULL;
    int found = link_next(self, &frame, "recv");
    if (found > 0 && (bytes = take_bytes(self, &frame)) != NULL)
        ring_release(self->ring);
    else if (found == 0) {
        bytes = Py_NewRef(Py_None);
        if (self->rest_owner && !self->end.send.busy) {
            self->end.send.busy = true;
            if (link_push_rest(self, "recv") < 0)
                PyErr_Clear();
            link_hand_on(self, &self->end.send);
        }
    }
    link_leave(self, &self->end.recv);
    return bytes;
}

/* An event loop cannot tell us how long it slept, so it learns as a stream does: a spin that found nothing lets 1, 2, 4 ... 64 go
 * by without one. */
PyObject *link_spin_recv(PyObject *object, PyObject *unused)
{
    RingLink *self = (RingLink *)object;
    PyObject *frame = link_try_recv(object, unused);
    if (frame != Py_None || self->end.spin_ns == 0)
        return frame;
    if (self->loop_skip) {
        self->loop_skip--;
        return frame;
    }
    int entered = link_try_enter(self, &self->end.recv, "recv");
    if (entered <= 0) {
        if (entered < 0)
            Py_CLEAR(frame);
        return frame;
    }
    int64_t until = now_ns() + (self->end.spin_ns < LOOP_SPIN_NS ? self->end.spin_ns : LOOP_SPIN_NS);
    bool found;
    Py_BEGIN_ALLOW_THREADS
    found = ring_spin_until(self->ring, RING_RECV, until);
    Py_END_ALLOW_THREADS
    link_leave(self, &self->end.recv);
    if (self->adaptive) {
        self->loop_penalty = found ? 0 : self->loop_penalty == 0 ? 1 : self->loop_penalty < 64 ? 2 * self->loop_penalty : 64;
        self->loop_skip = self->loop_penalty;
    }
    if (found) {
        Py_DECREF(frame);
        frame = link_try_recv(object, unused);
    }
    return frame;
}

PyObject *link_receive(RingLink *self, PyObject *timeout)
{
    struct patience patience = {.timeout = timeout};
    if (link_check_timeout(timeout) < 0 || link_enter_waiting(self, &self->end.recv, timeout, "recv") < 0)
        return NULL;
    struct ring_frame frame;
    PyObject *bytes = NULL;
    int found = await_frame(self, &frame, &patience, "recv");
    if (found > 0 && (bytes = take_bytes(self, &frame)) != NULL)
        ring_release(self->ring);
    else if (found == 0)
        link_late(self, "recv");
    link_leave(self, &self->end.recv);
    return bytes;
}

PyObject *link_receive_into(RingLink *self, PyObject *buffer, PyObject *timeout)
{
    struct patience patience = {.timeout = timeout};
    Py_buffer into;
    if (link_check_timeout(timeout) < 0 || PyObject_GetBuffer(buffer, &into, PyBUF_WRITABLE) < 0)
        return NULL;
    PyObject *size = NULL;
    if (link_enter_waiting(self, &self->end.recv, timeout, "recv_into") == 0) {
        struct ring_frame frame;
        int found = await_frame(self, &frame, &patience, "recv_into");
        if (found == 0)
            link_late(self, "recv_into");
        else if (found > 0 && frame.size > (uint64_t)into.len)
            link_too_large(self, frame.size, (uint64_t)into.len, "recv_into"); /* the frame stays */
        else if (found > 0 && (size = PyLong_FromUnsignedLongLong(frame.size)) != NULL) {
            if (frame.size > LARGE) {
                Py_BEGIN_ALLOW_THREADS
                memcpy(into.buf, frame.payload, frame.size);
                Py_END_ALLOW_THREADS
            } else
                memcpy(into.buf, frame.payload, frame.size);
            taken(self, &frame);
            if (frame.assembled)
                Py_CLEAR(self->partial);
            ring_release(self->ring);
        }
        link_leave(self, &self->end.recv);
    }
    PyBuffer_Release(&into);
    return size;
}

PyObject *link_receive_many(RingLink *self, PyObject *most, PyObject *timeout)
{
    struct patience patience = {.timeout = timeout};
    Py_ssize_t limit = PyLong_AsSsize_t(most);
    if (limit == -1 && PyErr_Occurred())
        return NULL;
    if (limit < 1) {
        PyErr_SetString(PyExc_ValueError, "limit must be 1 or more");
        return NULL;
    }
    if (link_check_timeout(timeout) < 0 || link_enter_waiting(self, &self->end.recv, timeout, "recv_many") < 0)
        return NULL;
    PyObject *frames = PyList_New(0);
    struct ring_frame frame;
    int found = frames ? await_frame(self, &frame, &patience, "recv_many") : -1;
    if (found == 0)
        link_late(self, "recv_many");
    for (Py_ssize_t count = 0; found > 0;) {
        PyObject *bytes = take_bytes(self, &frame);
        int failed = bytes ? PyList_Append(frames, bytes) : -1;
        Py_XDECREF(bytes);
        if (failed < 0)
            Py_CLEAR(frames);
        if (failed < 0 || ++count == limit)
            break;
        /* A sender that waits for room need not wait for the whole batch. */
        if (self->ring->read - self->ring->head > self->ring->capacity / 2)
            ring_release(self->ring);
        found = link_next(self, &frame, "recv_many");
        if (found < 0 && PyList_Size(frames) > 0)
            PyErr_Clear(); /* what was received comes first; the next call meets it again */
        else if (found < 0)
            break;
    }
    if (frames && PyList_Size(frames) == 0)
        Py_CLEAR(frames);
    ring_release(self->ring);
    link_leave(self, &self->end.recv);
    return frames;
}
