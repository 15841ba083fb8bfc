/* py_stream_send.c — StreamLink: sending frames, one or many. */
#include "py_stream.h"

#include <errno.h>
#include <string.h>

enum {
    SMALL = 4096,         /* copied behind its header: one vector is cheaper than two */
    SCRATCH = 64 << 10,   /* where send_many lines up small frames */
    FORESIGHT = 16 << 20, /* unread input to keep when a send finds the peer gone */
};
#define CLASSIFY_PATIENCE_NS 100000000 /* how long a failed send waits for the receiving thread to hear why */

/* The system refused to send. A peer that closed in order has said so in the input that nobody read yet, so read it (its frames
 * are kept) before calling the peer dead. */
static int send_failed(StreamLink *self, bool wait, const char *operation)
{
    int error = self->out.error;
    enum stream_status why = STREAM_FAILED;
    if (error == EPIPE || error == ECONNRESET) {
        struct lane *lane = &self->end.recv;
        bool taken = !lane->busy;
        if (taken)
            lane->busy = true;
        else if (wait) {
            /* Another thread is receiving: it hears the same end now, and leaves. */
            int64_t until = now_ns() + CLASSIFY_PATIENCE_NS;
            taken = lane_wait(&self->end, lane, until, operation) == 0;
            if (!taken && now_ns() < until)
                return -1; /* closed, or a signal handler raised */
            if (!taken)
                PyErr_Clear();
        }
        if (taken) {
            Py_BEGIN_ALLOW_THREADS
            why = stream_foresee(&self->in, FORESIGHT);
            Py_END_ALLOW_THREADS
            lane_leave(lane);
        }
    }
    if (why < STREAM_ENDED)
        why = STREAM_FAILED;
    self->ended = why;
    self->ended_errno = why == STREAM_FAILED && self->in.over == STREAM_FAILED ? self->in.error : error;
    return stream_link_over(self, self->ended, self->ended_errno, operation);
}

/* What is left of an accepted frame stays with the link. */
static int keep(StreamLink *self, const struct iovec *vectors, int count, size_t sent, size_t until, const char *operation)
{
    if (sent == until || stream_keep(&self->out, vectors, count, sent, until))
        return 0;
    self->ended = STREAM_FAILED; /* half a frame is out, and nobody has the other half */
    self->ended_errno = ENOMEM;
    PyErr_Clear();
    return stream_link_over(self, self->ended, ENOMEM, operation);
}

/* The rest of an earlier frame goes first. 1 when it is gone, 0 if it must wait and may not or no longer, -1. */
static int send_rest(StreamLink *self, int64_t deadline, bool wait, const char *operation)
{
    enum stream_status status = stream_flush(&self->out);
    while (status != STREAM_OK) {
        if (status == STREAM_FAILED)
            return send_failed(self, wait, operation);
        if (!wait)
            return 0;
        Py_BEGIN_ALLOW_THREADS
        status = stream_flush_wait(&self->out, self->end.bell, deadline);
        Py_END_ALLOW_THREADS
        if (status == STREAM_AGAIN)
            return 0;
        if ((status == STREAM_BELL || status == STREAM_SIGNAL) && stream_link_may_go_on(self, status, operation) < 0)
            return -1;
    }
    return 1;
}

/* All of these vectors, `total` bytes. 1 when they are gone, 0 if they must wait and may not or no longer, -1. What was sent is in
 * `*sent`; the caller keeps the rest. */
static int send_vectors(StreamLink *self, const struct iovec *vectors, int count, size_t total, size_t *sent, int64_t deadline,
                        bool wait, const char *operation)
{
    enum stream_status status;
    if (total <= LARGE)
        status = stream_put(&self->out, vectors, count, sent);
    else {
        Py_BEGIN_ALLOW_THREADS
        status = stream_put(&self->out, vectors, count, sent);
        Py_END_ALLOW_THREADS
    }
    while (status != STREAM_OK) {
        if (status == STREAM_FAILED)
            return send_failed(self, wait, operation);
        if (!wait)
            return 0;
        Py_BEGIN_ALLOW_THREADS
        status = stream_push(&self->out, vectors, count, sent, self->end.bell, deadline);
        Py_END_ALLOW_THREADS
        if (status == STREAM_AGAIN)
            return 0;
        if ((status == STREAM_BELL || status == STREAM_SIGNAL) && stream_link_may_go_on(self, status, operation) < 0)
            return -1;
    }
    return 1;
}

static int may_send(StreamLink *self, size_t size, const char *operation)
{
    if (size > self->in.limit + self->out.uncounted)
        return stream_link_too_large(self, size, self->in.limit, operation);
    if (__builtin_expect(size < self->out.uncounted, 0)) {
        PyErr_SetString(PyExc_ValueError, "the frame is shorter than its header");
        return -1;
    }
    if (__builtin_expect(self->ended != STREAM_OK, 0))
        return stream_link_over(self, self->ended, self->ended_errno, operation);
    return 0;
}

/* One frame: 1 when it was accepted, 0 if it would wait and may not, -1. */
static int send_frame(StreamLink *self, const void *data, size_t size, int64_t deadline, bool wait, const char *operation)
{
    if (may_send(self, size, operation) < 0)
        return -1;
    if (__builtin_expect(stream_pending(&self->out), 0)) {
        int gone = send_rest(self, deadline, wait, operation);
        if (gone <= 0)
            return gone == 0 && wait ? stream_link_give_up(self, REASON_TIMED_OUT, operation) : gone;
    }
    unsigned char small[STREAM_HEADER + SMALL];
    struct iovec vectors[2] = {{small, STREAM_HEADER}, {(void *)data, size}};
    int count = 2;
    stream_header(small, size - self->out.uncounted);
    if (size <= SMALL) {
        memcpy(small + STREAM_HEADER, data, size);
        vectors[0].iov_len += size;
        count = 1;
    }
    size_t sent = 0, total = STREAM_HEADER + size;
    int done = send_vectors(self, vectors, count, total, &sent, deadline, wait, operation);
    if (done <= 0 && sent && self->ended == STREAM_OK && keep(self, vectors, count, sent, total, operation) < 0)
        return -1;
    if (sent) { /* whole, or with its rest kept: accepted */
        self->end.counters[0]++;
        self->end.counters[1] += size;
    }
    if (done == 0 && wait)
        return stream_link_give_up(self, sent ? REASON_UNKNOWN : REASON_TIMED_OUT, operation);
    return done == 0 && sent ? 1 : done;
}

/* The memory of a frame. A view needs a release; bytes do not, and are what nearly everyone sends. */
struct loan {
    const void *data;
    size_t size;
    Py_buffer view; /* view.obj is NULL for bytes */
};

static int borrow(PyObject *frame, struct loan *loan)
{
    loan->view.obj = NULL;
    if (PyBytes_CheckExact(frame)) {
        loan->data = PyBytes_AsString(frame);
        loan->size = (size_t)PyBytes_Size(frame);
        return 0;
    }
    if (PyObject_GetBuffer(frame, &loan->view, PyBUF_SIMPLE) < 0)
        return -1;
    loan->data = loan->view.buf;
    loan->size = (size_t)loan->view.len;
    return 0;
}

static void give_back(struct loan *loan)
{
    if (loan->view.obj)
        PyBuffer_Release(&loan->view);
}

int stream_link_transmit(StreamLink *self, PyObject *frame, int64_t deadline, bool wait, const char *operation)
{
    struct loan loan;
    if (borrow(frame, &loan) < 0)
        return -1;
    int done = -1;
    if (stream_link_enter(self, &self->end.send, deadline, operation) == 0) {
        done = send_frame(self, loan.data, loan.size, deadline, wait, operation);
        stream_link_leave(self, &self->end.send);
    }
    give_back(&loan);
    return done;
}

/* A batch of send_many: small frames are lined up in `scratch`, large ones stay where they are. */
struct batch {
    unsigned char *scratch;
    size_t used, total;
    int vectors, frames, loans;
    struct iovec vector[STREAM_VECTORS];
    struct loan loan[STREAM_VECTORS];
    size_t ends[SCRATCH / 64]; /* where each frame ends in the stream of this batch */
};

static bool batch_has_room(const struct batch *batch, size_t size)
{
    return batch->used + STREAM_HEADER + (size <= SMALL ? size : 0) <= SCRATCH && batch->vectors + 2 <= STREAM_VECTORS &&
           batch->frames < (int)(sizeof batch->ends / sizeof *batch->ends);
}

static void batch_add(struct batch *batch, struct loan *loan, size_t uncounted)
{
    unsigned char *at = batch->scratch + batch->used;
    size_t here = STREAM_HEADER;
    stream_header(at, loan->size - uncounted);
    if (loan->size <= SMALL) {
        memcpy(at + STREAM_HEADER, loan->data, loan->size);
        here += loan->size;
    }
    struct iovec *last = batch->vectors ? &batch->vector[batch->vectors - 1] : NULL;
    if (last && (unsigned char *)last->iov_base + last->iov_len == at)
        last->iov_len += here;
    else
        batch->vector[batch->vectors++] = (struct iovec){at, here};
    batch->used += here;
    if (loan->size > SMALL) {
        batch->vector[batch->vectors++] = (struct iovec){(void *)loan->data, loan->size};
        batch->loan[batch->loans++] = *loan;
    } else
        give_back(loan);
    batch->total += STREAM_HEADER + loan->size;
    batch->ends[batch->frames++] = batch->total;
}

/* As send_vectors; counts the frames that were accepted into `*accepted`. */
static int batch_send(StreamLink *self, struct batch *batch, int64_t deadline, Py_ssize_t *accepted)
{
    size_t sent = 0;
    int frames = 0;
    int done = send_vectors(self, batch->vector, batch->vectors, batch->total, &sent, deadline, true, "send_many");
    while (frames < batch->frames && batch->ends[frames] <= sent)
        frames++;
    size_t whole = frames ? batch->ends[frames - 1] : 0;
    if (done <= 0 && sent > whole && self->ended == STREAM_OK) {
        if (keep(self, batch->vector, batch->vectors, sent, batch->ends[frames], "send_many") == 0)
            frames++;
        else
            done = -1;
    }
    if (frames)
        self->end.counters[1] += batch->ends[frames - 1] - (size_t)frames * STREAM_HEADER;
    self->end.counters[0] += (uint64_t)frames;
    while (batch->loans)
        give_back(&batch->loan[--batch->loans]);
    batch->used = batch->total = 0;
    batch->vectors = batch->frames = 0;
    *accepted += frames;
    return done;
}

/* Nothing is sent if any of the frames cannot be. */
static int look_through(StreamLink *self, PyObject *frames, Py_ssize_t count)
{
    for (Py_ssize_t i = 0; i < count; i++) {
        struct loan loan;
        if (borrow(PyTuple_GetItem(frames, i), &loan) < 0)
            return -1;
        give_back(&loan);
        if (may_send(self, loan.size, "send_many") < 0)
            return -1;
    }
    return 0;
}

static PyObject *transmit_batches(StreamLink *self, PyObject *frames, int64_t deadline)
{
    Py_ssize_t count = PyTuple_Size(frames), accepted = 0;
    struct batch *batch = PyMem_Malloc(sizeof *batch + SCRATCH);
    if (batch == NULL)
        return PyErr_NoMemory();
    batch->scratch = (unsigned char *)(batch + 1);
    batch->used = batch->total = 0;
    batch->vectors = batch->frames = batch->loans = 0;
    int done = look_through(self, frames, count) < 0 ? -1 : stream_pending(&self->out) ? send_rest(self, deadline, true, "send_many") : 1;
    for (Py_ssize_t i = 0; i < count && done > 0; i++) {
        struct loan loan;
        if (borrow(PyTuple_GetItem(frames, i), &loan) < 0)
            done = -1;
        else if (may_send(self, loan.size, "send_many") < 0) /* its size has changed since */
            done = -1;
        else if (batch_has_room(batch, loan.size) || (done = batch_send(self, batch, deadline, &accepted)) > 0) {
            batch_add(batch, &loan, self->out.uncounted);
            continue;
        } else
            give_back(&loan);
    }
    if (done > 0 && batch->frames)
        done = batch_send(self, batch, deadline, &accepted);
    while (batch->loans)
        give_back(&batch->loan[--batch->loans]);
    PyMem_Free(batch);
    if (done == 0 && accepted == 0 && count)
        done = stream_link_give_up(self, REASON_TIMED_OUT, "send_many");
    return done < 0 ? NULL : PyLong_FromSsize_t(accepted);
}

PyObject *stream_link_transmit_many(StreamLink *self, PyObject *frames, int64_t deadline)
{
    if (stream_link_enter(self, &self->end.send, deadline, "send_many") < 0)
        return NULL;
    PyObject *accepted = transmit_batches(self, frames, deadline);
    stream_link_leave(self, &self->end.send);
    return accepted;
}

int stream_link_flush(StreamLink *self)
{
    if (stream_link_enter(self, &self->end.send, 0, "flush") < 0)
        return -1;
    int done = stream_pending(&self->out) ? send_rest(self, 0, false, "flush") : 1;
    stream_link_leave(self, &self->end.send);
    return done;
}
