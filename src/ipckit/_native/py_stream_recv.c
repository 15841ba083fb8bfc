/* py_stream_recv.c — StreamLink: waiting for frames and receiving them. */
#include "py_stream.h"

#include <errno.h>
#include <string.h>

#define SPIN_SLICE_NS 10000000 /* how long a spin may keep a signal handler waiting */

/* `auto`: a spin that found nothing lets 1, 2, 4 ... 64 waits go by without one, and a spin that found something lets none. So an
 * idle link burns one spin in 65 waits, and one that has become busy spins again 64 messages later at the latest. */
static int64_t spin_time(StreamLink *self)
{
    if (self->skip == 0)
        return self->end.spin_ns;
    self->skip--;
    return 0;
}

static void learn(StreamLink *self, bool found)
{
    self->penalty = found ? 0 : self->penalty == 0 ? 1 : self->penalty < 64 ? 2 * self->penalty : 64;
    self->skip = self->penalty;
}

/* Spin as long as it pays: 1 if something came, 0 if not, -1. */
static int spin_for_input(StreamLink *self, int64_t deadline, const char *operation)
{
    bool found = false;
    int64_t spin = stream_pending(&self->out) ? 0 : spin_time(self); /* the rest goes out while we sleep */
    if (spin == 0)
        return 0;
    int64_t now = now_ns(), until = deadline - now < spin ? deadline : now + spin;
    while (!found && now < until) {
        int64_t slice = until - now < SPIN_SLICE_NS ? until : now + SPIN_SLICE_NS;
        Py_BEGIN_ALLOW_THREADS
        found = stream_spin(&self->in, slice);
        Py_END_ALLOW_THREADS
        /* A signal of this slice would not end the sleep that follows. */
        if (stream_link_may_go_on(self, STREAM_SIGNAL, operation) < 0)
            return -1;
        now = slice;
    }
    if (self->adaptive)
        learn(self, found);
    return found;
}

static int wait_for_input(StreamLink *self, int64_t deadline, const char *operation)
{
    int found = spin_for_input(self, deadline, operation);
    if (found)
        return found < 0 ? -1 : 0;
    struct stream_writer *rest = NULL;
    if (stream_pending(&self->out) && !self->end.send.busy) {
        self->end.send.busy = true;
        rest = &self->out;
    }
    enum stream_status status;
    Py_BEGIN_ALLOW_THREADS
    status = stream_await(&self->in, rest, self->end.bell, deadline);
    Py_END_ALLOW_THREADS
    if (rest)
        lane_leave(&self->end.send);
    return stream_link_may_go_on(self, status, operation);
}

/* Memory for the large frame that has begun: the caller's, if it was given, else a bytes object. Its pages are touched only as data
 * come, so a prefix alone costs address space and nothing else. */
static int give_memory(StreamLink *self, const Py_buffer *into)
{
    size_t size;
    stream_announced(&self->in, &size);
    if (into) {
        stream_target(&self->in, into->buf);
        return 0;
    }
    self->body = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)size);
    if (self->body == NULL)
        return -1;
    stream_target(&self->in, PyBytes_AsString(self->body));
    return 0;
}

/* The caller's memory goes; what it holds of an unfinished frame stays. */
static void rescue(StreamLink *self)
{
    if (self->in.target == NULL || self->body)
        return;
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    self->body = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)self->in.size);
    if (self->body)
        stream_retarget(&self->in, PyBytes_AsString(self->body));
    else {
        PyErr_Clear();
        self->in.target = NULL;
        self->in.over = STREAM_FAILED;
        self->in.error = ENOMEM;
    }
    PyErr_Restore(type, value, traceback);
}

static enum stream_status fill(StreamLink *self)
{
    enum stream_status status;
    if (self->in.target == NULL || self->in.size - self->in.have <= LARGE)
        return stream_fill(&self->in);
    Py_BEGIN_ALLOW_THREADS
    status = stream_fill(&self->in);
    Py_END_ALLOW_THREADS
    return status;
}

/* Nothing more comes; and nothing more goes, unless the peer is a stranger who is to be told what was wrong. */
static void hear_the_end(StreamLink *self, enum stream_status status)
{
    if (status == STREAM_OVERSIZE && self->reframed)
        return;
    self->ended = status;
    self->ended_errno = self->in.error;
}

/* The next frame: 1 and its view (not taken yet), 0 if there is none and we are not to WAIT, -1 with an exception set. */
static int next_frame(StreamLink *self, int64_t deadline, enum effort effort, const char *operation, const Py_buffer *into,
                      struct stream_view *view)
{
    if (stream_pending(&self->out) && !self->end.send.busy)
        stream_flush(&self->out); /* if it fails, the next send will say so */
    for (;;) {
        enum stream_status status = stream_peek(&self->in, view);
        size_t size;
        if (into && status <= STREAM_AGAIN && stream_announced(&self->in, &size) && size > (size_t)into->len)
            return stream_link_too_large(self, size, (uint64_t)into->len, operation);
        if (status == STREAM_FRAME)
            return 1;
        if (status == STREAM_LARGE) {
            if (give_memory(self, into) < 0)
                return -1;
        } else if (status != STREAM_AGAIN) {
            hear_the_end(self, status);
            return stream_link_over(self, status, self->in.error, operation);
        }
        if (fill(self) != STREAM_AGAIN)
            continue;
        if (effort == SPIN) {
            effort = TRY;
            int came = spin_for_input(self, deadline, operation);
            if (came < 0)
                return -1;
            if (came)
                continue;
        }
        if (effort == TRY)
            return 0;
        if (deadline == 0) {
            give_up(&self->end, REASON_TIMED_OUT, operation, NULL);
            return -1;
        }
        if (wait_for_input(self, deadline, operation) < 0)
            return -1;
    }
}

/* The frame as bytes, counted and taken. */
static PyObject *take_bytes(StreamLink *self, const struct stream_view *view)
{
    PyObject *frame = self->body;
    if (frame)
        self->body = NULL;
    else {
        frame = PyBytes_FromStringAndSize((const char *)view->data, (Py_ssize_t)view->size);
        if (frame == NULL)
            return NULL;
    }
    stream_take(&self->in, view);
    self->end.counters[2]++;
    self->end.counters[3] += view->size;
    return frame;
}

PyObject *stream_link_receive(StreamLink *self, int64_t deadline, enum effort effort, const char *operation)
{
    if (stream_link_enter(self, &self->end.recv, deadline, operation) < 0)
        return NULL;
    struct stream_view view;
    PyObject *frame = NULL;
    int found = next_frame(self, deadline, effort, operation, NULL, &view);
    if (found > 0)
        frame = take_bytes(self, &view);
    else if (found == 0)
        frame = Py_NewRef(Py_None);
    stream_link_leave(self, &self->end.recv);
    return frame;
}

/* The next `count` bytes, which are not taken, or None. */
PyObject *stream_link_glance(StreamLink *self, size_t count)
{
    if (stream_link_enter(self, &self->end.recv, 0, "recv") < 0)
        return NULL;
    PyObject *seen = NULL;
    for (;;) {
        struct stream_view view;
        enum stream_status status = stream_peek(&self->in, &view);
        const unsigned char *here = stream_glance(&self->in, count);
        if (status == STREAM_FRAME && !here && self->in.over != STREAM_OK)
            status = self->in.over; /* a frame shorter than what is looked for, and then the end */
        if (here && status != STREAM_GOODBYE) {
            seen = PyBytes_FromStringAndSize((const char *)here, (Py_ssize_t)count);
            break;
        }
        bool begun = status == STREAM_OVERSIZE; /* a prefix above the limit: what is behind it says to whom that is told */
        enum stream_status filled = status;
        if (begun)
            self->in.over = STREAM_OK;
        if (begun || status < STREAM_ENDED)
            filled = fill(self);
        if (filled == STREAM_OK || (!begun && filled != STREAM_AGAIN && status < STREAM_ENDED))
            continue;
        if (filled == STREAM_AGAIN)
            seen = Py_NewRef(Py_None);
        else {
            hear_the_end(self, status);
            stream_link_over(self, status, self->in.error, "recv");
        }
        break;
    }
    stream_link_leave(self, &self->end.recv);
    return seen;
}

PyObject *stream_link_receive_into(StreamLink *self, const Py_buffer *into, int64_t deadline)
{
    if (stream_link_enter(self, &self->end.recv, deadline, "recv_into") < 0)
        return NULL;
    struct stream_view view;
    PyObject *size = NULL;
    if (next_frame(self, deadline, WAIT, "recv_into", into, &view) > 0) {
        size = PyLong_FromSize_t(view.size);
        if (size) {
            if (view.data != into->buf)
                memcpy(into->buf, view.data, view.size);
            stream_take(&self->in, &view);
            Py_CLEAR(self->body);
            self->end.counters[2]++;
            self->end.counters[3] += view.size;
        }
    }
    rescue(self);
    stream_link_leave(self, &self->end.recv);
    return size;
}

/* Waits for the first frame, takes what else is there. Whatever stops it behind the first frame is left to the next call. */
PyObject *stream_link_receive_many(StreamLink *self, Py_ssize_t limit, int64_t deadline)
{
    if (stream_link_enter(self, &self->end.recv, deadline, "recv_many") < 0)
        return NULL;
    struct stream_view view;
    PyObject *frames = PyList_New(0);
    for (Py_ssize_t count = 0; frames && count < limit; count++) {
        int found = next_frame(self, deadline, count == 0 ? WAIT : TRY, "recv_many", NULL, &view);
        PyObject *frame = found > 0 ? take_bytes(self, &view) : NULL;
        if (frame && PyList_Append(frames, frame) == 0) {
            Py_DECREF(frame);
            continue;
        }
        Py_XDECREF(frame);
        if (count == 0)
            Py_CLEAR(frames);
        else
            PyErr_Clear();
        break;
    }
    stream_link_leave(self, &self->end.recv);
    return frames;
}
