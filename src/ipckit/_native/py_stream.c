/* py_stream.c — StreamLink: stream.[ch] as a Python object.
 *
 * Every call goes the same way: check, take the lane, try with the GIL (a non-blocking system call on a small frame costs less
 * than letting go of it), and only when that was not enough let go of it and wait in C. The lanes keep the reader and the writer
 * to one thread each; the GIL keeps everything else.
 */
#include "module.h"

#include <errno.h>
#include <string.h>
#include <structmember.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "stream.h"

enum {
    SMALL = 4096,         /* copied behind its header: one vector is cheaper than two */
    LARGE = 64 << 10,     /* copying more than this is worth letting go of the GIL */
    SCRATCH = 64 << 10,   /* where send_many lines up small frames */
    FORESIGHT = 16 << 20, /* unread input to keep when a send finds the peer gone */
    DRAIN = 1 << 20,      /* unread input to discard at close */
};
#define SPIN_SLICE_NS 10000000       /* how long a spin may keep a signal handler waiting */
#define CLASSIFY_PATIENCE_NS 100000000 /* how long a failed send waits for the receiving thread to hear why */
enum { WANT_RECV = 1, WANT_SEND = 2 };

typedef struct {
    PyObject_HEAD
    struct endpoint end;
    struct stream_reader in;
    struct stream_writer out;
    PyObject *wait;      /* the Wait class */
    PyObject *body;      /* bytes: the large frame in progress; NULL if there is none, or it is in the memory of recv_into */
    PyObject *weakrefs;
    bool goodbye;        /* the flag of the constructor */
    bool letting_go;     /* close(goodbye=False): another process goes on with the stream */
    bool parted;         /* the farewell has been tried */
    bool adaptive;       /* spin=auto */
    unsigned skip, penalty; /* waits that go by without a spin: still, and after the last failure */
    enum stream_status ended; /* why sending is refused; STREAM_OK while it is not */
    int ended_errno;
} StreamLink;

/* -- coming and going ------------------------------------------------------------------------------------------ */

static void part(StreamLink *self)
{
    if (self->parted || self->end.send.busy)
        return;
    self->parted = true;
    stream_farewell(&self->out, self->goodbye && !self->letting_go);
}

/* Unread input makes the kernel reset a TCP connection at close, and the reset may overtake what we have just sent. */
static void discard_input(int fd)
{
    char waste[16 << 10];
    for (size_t seen = 0; seen < DRAIN;) {
        ssize_t got = recv(fd, waste, sizeof waste, MSG_DONTWAIT);
        if (got <= 0)
            return;
        seen += (size_t)got;
    }
}

/* Nobody is inside. `ours`: this process has the stream; a forked child that never adopted it only closes its copies. */
static void release(StreamLink *self, bool ours)
{
    if (self->in.fd >= 0) {
        if (ours) {
            part(self);
            if (self->in.socket && !self->letting_go)
                discard_input(self->in.fd);
        }
        close(self->in.fd);
        if (self->out.fd != self->in.fd)
            close(self->out.fd);
        self->in.fd = self->out.fd = -1;
    }
    if (self->end.bell >= 0)
        close(self->end.bell);
    self->end.bell = -1;
    self->in.target = NULL;
    stream_release(&self->in, &self->out);
    Py_CLEAR(self->body);
}

/* An adopted link starts between two frames, or both processes would deliver, or finish, the same one. */
static int adopt(StreamLink *self, const char *operation)
{
    if (endpoint_forked(&self->end, operation) < 0)
        return -1;
    if (stream_pending(&self->out) || self->in.begin != self->in.end || self->in.target) {
        self->end.generation = fork_generation - 1;
        give_up(&self->end, REASON_UNSUPPORTED, operation, PyUnicode_FromString("the fork came in the middle of a message"));
        return -1;
    }
    return 0;
}

static int enter(StreamLink *self, struct lane *lane, int64_t deadline, const char *operation)
{
    if (__builtin_expect(self->end.generation != fork_generation, 0) && !self->end.closed && adopt(self, operation) < 0)
        return -1;
    if (endpoint_check(&self->end, operation) < 0)
        return -1;
    self->end.inside++; /* the descriptors stay until leave() */
    if (lane_enter(&self->end, lane, deadline, operation) < 0) {
        if (--self->end.inside == 0 && self->end.closed)
            release(self, true);
        return -1;
    }
    return 0;
}

static void leave(StreamLink *self, struct lane *lane)
{
    lane_leave(lane);
    if (--self->end.inside == 0 && self->end.closed)
        release(self, true);
}

static int say_why(StreamLink *self, enum stream_status why, int error, const char *operation)
{
    struct endpoint *end = &self->end;
    switch (why) {
    case STREAM_ENDED:
    case STREAM_TORN:
        give_up(end, REASON_ENDED, operation, PyBool_FromLong(why == STREAM_TORN));
        break;
    case STREAM_GOODBYE:
        give_up(end, REASON_GOODBYE, operation, NULL);
        break;
    case STREAM_OVERSIZE:
        give_up(end, REASON_PROTOCOL, operation,
                PyUnicode_FromFormat("length prefix %zu is above the limit of %llu", self->in.size,
                                     (unsigned long long)self->in.limit));
        break;
    default:
        give_up(end, REASON_SYSTEM, operation, PyLong_FromLong(error));
    }
    return -1;
}

static int too_large(StreamLink *self, size_t size, uint64_t limit, const char *operation)
{
    give_up(&self->end, REASON_TOO_LARGE, operation, Py_BuildValue("nK", (Py_ssize_t)size, (unsigned long long)limit));
    return -1;
}

/* After a call without the GIL: closed, interrupted, or out of time? 0 if it can go on. */
static int may_go_on(StreamLink *self, enum stream_status status, const char *operation)
{
    if (self->end.closed) {
        give_up(&self->end, REASON_CLOSED, operation, NULL);
        return -1;
    }
    if (status == STREAM_SIGNAL)
        return PyErr_CheckSignals();
    if (status == STREAM_AGAIN) {
        give_up(&self->end, REASON_TIMED_OUT, operation, NULL);
        return -1;
    }
    return 0;
}

/* -- receiving ------------------------------------------------------------------------------------------------- */

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

static int wait_for_input(StreamLink *self, int64_t deadline, const char *operation)
{
    bool found = false;
    int64_t spin = spin_time(self);
    if (spin) {
        int64_t now = now_ns(), until = deadline - now < spin ? deadline : now + spin;
        while (!found && now < until) {
            int64_t slice = until - now < SPIN_SLICE_NS ? until : now + SPIN_SLICE_NS;
            Py_BEGIN_ALLOW_THREADS
            found = stream_spin(&self->in, slice);
            Py_END_ALLOW_THREADS
            /* A signal of this slice would not end the sleep that follows. */
            if (may_go_on(self, STREAM_SIGNAL, operation) < 0)
                return -1;
            now = slice;
        }
        if (self->adaptive)
            learn(self, found);
        if (found)
            return 0;
    }
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
    return may_go_on(self, status, operation);
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

/* The next frame: 1 and its view (not taken yet), 0 if there is none and `wait` is false, -1 with an exception set. */
static int next_frame(StreamLink *self, int64_t deadline, bool wait, const char *operation, const Py_buffer *into,
                      struct stream_view *view)
{
    if (stream_pending(&self->out) && !self->end.send.busy)
        stream_flush(&self->out); /* if it fails, the next send will say so */
    for (;;) {
        enum stream_status status = stream_peek(&self->in, view);
        size_t size;
        if (into && status <= STREAM_AGAIN && stream_announced(&self->in, &size) && size > (size_t)into->len)
            return too_large(self, size, (uint64_t)into->len, operation);
        if (status == STREAM_FRAME)
            return 1;
        if (status == STREAM_LARGE) {
            if (give_memory(self, into) < 0)
                return -1;
        } else if (status != STREAM_AGAIN) {
            self->ended = status;
            self->ended_errno = self->in.error;
            return say_why(self, status, self->in.error, operation);
        }
        if (fill(self) != STREAM_AGAIN)
            continue;
        if (!wait)
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

static PyObject *receive(StreamLink *self, int64_t deadline, bool wait, const char *operation)
{
    if (enter(self, &self->end.recv, deadline, operation) < 0)
        return NULL;
    struct stream_view view;
    PyObject *frame = NULL;
    int found = next_frame(self, deadline, wait, operation, NULL, &view);
    if (found > 0)
        frame = take_bytes(self, &view);
    else if (found == 0)
        frame = Py_NewRef(Py_None);
    leave(self, &self->end.recv);
    return frame;
}

static PyObject *receive_into(StreamLink *self, const Py_buffer *into, int64_t deadline)
{
    if (enter(self, &self->end.recv, deadline, "recv_into") < 0)
        return NULL;
    struct stream_view view;
    PyObject *size = NULL;
    if (next_frame(self, deadline, true, "recv_into", into, &view) > 0) {
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
    leave(self, &self->end.recv);
    return size;
}

/* Waits for the first frame, takes what else is there. Whatever stops it behind the first frame is left to the next call. */
static PyObject *receive_many(StreamLink *self, Py_ssize_t limit, int64_t deadline)
{
    if (enter(self, &self->end.recv, deadline, "recv_many") < 0)
        return NULL;
    struct stream_view view;
    PyObject *frames = PyList_New(0);
    for (Py_ssize_t count = 0; frames && count < limit; count++) {
        int found = next_frame(self, deadline, count == 0, "recv_many", NULL, &view);
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
    leave(self, &self->end.recv);
    return frames;
}

/* -- sending --------------------------------------------------------------------------------------------------- */

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
    return say_why(self, self->ended, self->ended_errno, operation);
}

/* What is left of an accepted frame stays with the link. */
static int keep(StreamLink *self, const struct iovec *vectors, int count, size_t sent, size_t until, const char *operation)
{
    if (sent == until || stream_keep(&self->out, vectors, count, sent, until))
        return 0;
    self->ended = STREAM_FAILED; /* half a frame is out, and nobody has the other half */
    self->ended_errno = ENOMEM;
    PyErr_Clear();
    return say_why(self, self->ended, ENOMEM, operation);
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
        if ((status == STREAM_BELL || status == STREAM_SIGNAL) && may_go_on(self, status, operation) < 0)
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
        if ((status == STREAM_BELL || status == STREAM_SIGNAL) && may_go_on(self, status, operation) < 0)
            return -1;
    }
    return 1;
}

static int timed_out(StreamLink *self, enum reason why, const char *operation)
{
    give_up(&self->end, why, operation, NULL);
    return -1;
}

static int may_send(StreamLink *self, size_t size, const char *operation)
{
    if (size > self->in.limit)
        return too_large(self, size, self->in.limit, operation);
    if (__builtin_expect(self->ended != STREAM_OK, 0))
        return say_why(self, self->ended, self->ended_errno, operation);
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
            return gone == 0 && wait ? timed_out(self, REASON_TIMED_OUT, operation) : gone;
    }
    unsigned char small[STREAM_HEADER + SMALL];
    struct iovec vectors[2] = {{small, STREAM_HEADER}, {(void *)data, size}};
    int count = 2;
    stream_header(small, size);
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
        return timed_out(self, sent ? REASON_UNKNOWN : REASON_TIMED_OUT, operation);
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

static int transmit(StreamLink *self, PyObject *frame, int64_t deadline, bool wait, const char *operation)
{
    struct loan loan;
    if (borrow(frame, &loan) < 0)
        return -1;
    int done = -1;
    if (enter(self, &self->end.send, deadline, operation) == 0) {
        done = send_frame(self, loan.data, loan.size, deadline, wait, operation);
        leave(self, &self->end.send);
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

static void batch_add(struct batch *batch, struct loan *loan)
{
    unsigned char *at = batch->scratch + batch->used;
    size_t here = STREAM_HEADER;
    stream_header(at, loan->size);
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

static PyObject *send_all(StreamLink *self, PyObject *frames, int64_t deadline)
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
        else if (loan.size > self->in.limit) /* it grew since */
            done = too_large(self, loan.size, self->in.limit, "send_many");
        else if (batch_has_room(batch, loan.size) || (done = batch_send(self, batch, deadline, &accepted)) > 0) {
            batch_add(batch, &loan);
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
        done = timed_out(self, REASON_TIMED_OUT, "send_many");
    return done < 0 ? NULL : PyLong_FromSsize_t(accepted);
}

/* -- the methods ----------------------------------------------------------------------------------------------- */

/* Arguments of a METH_FASTCALL | METH_KEYWORDS call, by position or name, into `values` (NULL where absent). */
static int arguments(const char *function, PyObject *const *args, Py_ssize_t count, PyObject *keywords, const char *const *names,
                     int required, int most, PyObject **values)
{
    if (count > most) {
        PyErr_Format(PyExc_TypeError, "%s() takes at most %d arguments (%zd given)", function, most, count);
        return -1;
    }
    for (int i = 0; i < most; i++)
        values[i] = i < count ? args[i] : NULL;
    Py_ssize_t named = keywords ? PyTuple_Size(keywords) : 0;
    for (Py_ssize_t k = 0; k < named; k++) {
        PyObject *keyword = PyTuple_GetItem(keywords, k);
        int i = 0;
        while (i < most && PyUnicode_CompareWithASCIIString(keyword, names[i]) != 0)
            i++;
        if (i == most || values[i]) {
            PyErr_Format(PyExc_TypeError, i == most ? "%s() has no argument '%U'" : "%s() got '%U' twice", function, keyword);
            return -1;
        }
        values[i] = args[count + k];
    }
    for (int i = 0; i < required; i++)
        if (values[i] == NULL) {
            PyErr_Format(PyExc_TypeError, "%s() needs '%s'", function, names[i]);
            return -1;
        }
    return 0;
}

static PyObject *link_try_send(StreamLink *self, PyObject *frame)
{
    if (self->end.send.busy && !self->end.closed)
        return Py_NewRef(Py_False); /* try_ never waits, not for another thread either */
    int done = transmit(self, frame, 0, false, "send");
    return done < 0 ? NULL : PyBool_FromLong(done);
}

static PyObject *link_try_flush(StreamLink *self, PyObject *unused)
{
    (void)unused;
    if (self->end.send.busy && !self->end.closed)
        return Py_NewRef(Py_False);
    if (enter(self, &self->end.send, 0, "flush") < 0)
        return NULL;
    int done = stream_pending(&self->out) ? send_rest(self, 0, false, "flush") : 1;
    leave(self, &self->end.send);
    return done < 0 ? NULL : PyBool_FromLong(done);
}

static PyObject *link_try_recv(StreamLink *self, PyObject *unused)
{
    (void)unused;
    if (self->end.recv.busy && !self->end.closed)
        return Py_NewRef(Py_None);
    return receive(self, 0, false, "recv");
}

static PyObject *make_wait(StreamLink *self, long want)
{
    int rfd = self->in.fd, wfd = self->out.fd;
    PyObject *fds;
    if (want == (WANT_RECV | WANT_SEND) && rfd != wfd)
        fds = Py_BuildValue("((ii)(ii))", rfd, 1, wfd, 4); /* POLLIN, POLLOUT */
    else
        fds = Py_BuildValue("((ii))", want == WANT_SEND ? wfd : rfd, (want & WANT_RECV ? 1 : 0) | (want & WANT_SEND ? 4 : 0));
    if (fds == NULL)
        return NULL;
    PyObject *wait = PyObject_CallFunctionObjArgs(self->wait, fds, Py_None, NULL);
    Py_DECREF(fds);
    return wait;
}

static PyObject *link_arm(StreamLink *self, PyObject *argument)
{
    long want = PyLong_AsLong(argument);
    if (want == -1 && PyErr_Occurred())
        return NULL;
    if (want < WANT_RECV || want > (WANT_RECV | WANT_SEND)) {
        PyErr_SetString(PyExc_ValueError, "arm() needs RECV, SEND or both");
        return NULL;
    }
    if (endpoint_check(&self->end, "arm") < 0)
        return NULL;
    if (stream_pending(&self->out))
        want |= WANT_SEND;
    PyObject **wait = &self->end.waits[want];
    if (*wait == NULL)
        *wait = make_wait(self, want);
    return Py_XNewRef(*wait);
}

static PyObject *link_send(StreamLink *self, PyObject *const *args, Py_ssize_t count, PyObject *keywords)
{
    static const char *const names[] = {"frame", "timeout", "priority"};
    PyObject *values[3] = {count ? args[0] : NULL};
    int64_t deadline = NO_DEADLINE;
    if (count != 1 || keywords) {
        if (arguments("send", args, count, keywords, names, 1, 3, values) < 0)
            return NULL;
        deadline = deadline_of(values[1]);
        if (deadline < 0)
            return NULL;
        long priority = values[2] ? PyLong_AsLong(values[2]) : 0;
        if (priority == -1 && PyErr_Occurred())
            return NULL;
        if (priority)
            return give_up(&self->end, REASON_UNSUPPORTED, "send", PyUnicode_FromString("a byte stream has no priorities"));
    }
    return transmit(self, values[0], deadline, true, "send") < 0 ? NULL : Py_NewRef(Py_None);
}

static PyObject *link_recv(StreamLink *self, PyObject *const *args, Py_ssize_t count, PyObject *keywords)
{
    static const char *const names[] = {"timeout"};
    int64_t deadline = NO_DEADLINE;
    if (count || keywords) {
        PyObject *timeout;
        if (arguments("recv", args, count, keywords, names, 0, 1, &timeout) < 0 || (deadline = deadline_of(timeout)) < 0)
            return NULL;
    }
    return receive(self, deadline, true, "recv");
}

static PyObject *link_recv_into(StreamLink *self, PyObject *const *args, Py_ssize_t count, PyObject *keywords)
{
    static const char *const names[] = {"buffer", "timeout"};
    PyObject *values[2];
    int64_t deadline;
    if (arguments("recv_into", args, count, keywords, names, 1, 2, values) < 0 || (deadline = deadline_of(values[1])) < 0)
        return NULL;
    Py_buffer into;
    if (PyObject_GetBuffer(values[0], &into, PyBUF_WRITABLE) < 0)
        return NULL;
    PyObject *size = receive_into(self, &into, deadline);
    PyBuffer_Release(&into);
    return size;
}

static PyObject *link_send_many(StreamLink *self, PyObject *const *args, Py_ssize_t count, PyObject *keywords)
{
    static const char *const names[] = {"frames", "timeout"};
    PyObject *values[2];
    int64_t deadline;
    if (arguments("send_many", args, count, keywords, names, 1, 2, values) < 0 || (deadline = deadline_of(values[1])) < 0)
        return NULL;
    PyObject *frames = PySequence_Tuple(values[0]); /* the list may change while the GIL is away */
    if (frames == NULL)
        return NULL;
    PyObject *accepted = NULL;
    if (enter(self, &self->end.send, deadline, "send_many") == 0) {
        accepted = send_all(self, frames, deadline);
        leave(self, &self->end.send);
    }
    Py_DECREF(frames);
    return accepted;
}

static PyObject *link_recv_many(StreamLink *self, PyObject *const *args, Py_ssize_t count, PyObject *keywords)
{
    static const char *const names[] = {"limit", "timeout"};
    PyObject *values[2];
    int64_t deadline;
    if (arguments("recv_many", args, count, keywords, names, 1, 2, values) < 0 || (deadline = deadline_of(values[1])) < 0)
        return NULL;
    Py_ssize_t limit = PyLong_AsSsize_t(values[0]);
    if (limit == -1 && PyErr_Occurred())
        return NULL;
    if (limit < 1) {
        PyErr_SetString(PyExc_ValueError, "limit must be at least 1");
        return NULL;
    }
    return receive_many(self, limit, deadline);
}

static PyObject *link_counters(StreamLink *self, PyObject *unused)
{
    (void)unused;
    return endpoint_counters(&self->end);
}

static PyObject *link_fileno(StreamLink *self, PyObject *unused)
{
    (void)unused;
    return endpoint_check(&self->end, "fileno") < 0 ? NULL : PyLong_FromLong(self->in.fd);
}

static void shut(StreamLink *self)
{
    self->end.closed = true;
    if (self->end.generation != fork_generation)
        release(self, false); /* the threads inside are the parent's, and so is the bell */
    else if (self->end.inside == 0)
        release(self, true);
    else { /* whoever leaves last releases; the farewell need not wait for that */
        part(self);
        eventfd_write(self->end.bell, 1);
        if (self->in.socket && self->end.recv.busy && !self->letting_go)
            shutdown(self->in.fd, SHUT_RD);
    }
}

static PyObject *link_close(StreamLink *self, PyObject *const *args, Py_ssize_t count, PyObject *keywords)
{
    static const char *const names[] = {"goodbye"};
    PyObject *goodbye;
    if (arguments("close", args, count, keywords, names, 0, 1, &goodbye) < 0)
        return NULL;
    int say = goodbye ? PyObject_IsTrue(goodbye) : 1;
    if (say < 0)
        return NULL;
    if (!self->end.closed) {
        self->letting_go = !say;
        shut(self);
    }
    return Py_NewRef(Py_None);
}

static PyObject *link_detach(StreamLink *self, PyObject *unused)
{
    (void)unused;
    if (endpoint_check(&self->end, "detach") < 0)
        return NULL;
    if (self->end.inside || stream_pending(&self->out) || self->in.begin != self->in.end || self->in.target) {
        PyErr_SetString(PyExc_ValueError, self->end.inside ? "another thread uses the link" : "part of a message is in the link");
        return NULL;
    }
    PyObject *fds = Py_BuildValue("ii", self->in.fd, self->out.fd);
    if (fds) {
        stream_hand_back(&self->in, &self->out);
        self->in.fd = self->out.fd = -1;
        shut(self);
    }
    return fds;
}

/* -- the type -------------------------------------------------------------------------------------------------- */

static PyObject *link_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"rfd", "wfd", "fail", "on_fork", "limit", "spin_ns", "goodbye", "wait", "native", "peer", NULL};
    int rfd, wfd, goodbye;
    long long limit, spin_ns;
    PyObject *fail, *on_fork, *wait, *native, *peer;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "iiOOLLpOOO:StreamLink", names, &rfd, &wfd, &fail, &on_fork, &limit, &spin_ns,
                                     &goodbye, &wait, &native, &peer))
        return NULL;
    if (rfd < 0 || wfd < 0 || limit < 0 || spin_ns < -1) {
        PyErr_SetString(PyExc_ValueError, "descriptors and limit must not be negative, spin_ns -1 (auto) or more");
        return NULL;
    }
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    StreamLink *self = (StreamLink *)allocate(type, 0);
    if (self == NULL)
        return NULL;
    self->in.fd = self->out.fd = -1; /* until all has gone well the descriptors are the caller's */
    if (endpoint_init(&self->end, fail, on_fork, (uint64_t)limit, spin_ns, native, peer) < 0) {
        Py_DECREF(self);
        return NULL;
    }
    self->wait = Py_NewRef(wait);
    self->goodbye = goodbye;
    self->adaptive = spin_ns == -1;
    stream_open(&self->in, &self->out, rfd, wfd, (uint64_t)limit, goodbye);
    return (PyObject *)self;
}

static int link_traverse(StreamLink *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE((PyObject *)self));
    Py_VISIT(self->wait);
    return endpoint_traverse(&self->end, visit, arg);
}

static int link_clear(StreamLink *self)
{
    Py_CLEAR(self->wait);
    endpoint_clear(&self->end);
    return 0;
}

/* A link that is dropped without a close() says no goodbye: nobody decided that this was the end. What was accepted still goes out. */
static void link_dealloc(StreamLink *self)
{
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    PyObject_GC_UnTrack(self);
    if (self->weakrefs)
        PyObject_ClearWeakRefs((PyObject *)self);
    self->letting_go = true;
    if (self->in.fd >= 0)
        shut(self);
    link_clear(self);
    endpoint_free(&self->end);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

#define FASTCALL(name, doc) {#name, (PyCFunction)(void (*)(void))link_##name, METH_FASTCALL | METH_KEYWORDS, doc}
static PyMethodDef methods[] = {
    {"try_send", (PyCFunction)link_try_send, METH_O, "try_send(frame, /)\n--\n\nTake the frame, or return False."},
    {"try_flush", (PyCFunction)link_try_flush, METH_NOARGS, "try_flush()\n--\n\nTrue when nothing accepted is still held here."},
    {"try_recv", (PyCFunction)link_try_recv, METH_NOARGS, "try_recv()\n--\n\nThe next frame, or None."},
    {"arm", (PyCFunction)link_arm, METH_O, "arm(want, /)\n--\n\nWhat to sleep on."},
    FASTCALL(send, "send(frame, timeout=None, priority=0)\n--\n\nSend, waiting for room."),
    FASTCALL(recv, "recv(timeout=None)\n--\n\nThe next frame."),
    FASTCALL(recv_into, "recv_into(buffer, timeout=None)\n--\n\nThe next frame, into the buffer; its size."),
    FASTCALL(send_many, "send_many(frames, timeout=None)\n--\n\nSend all; how many were accepted in time."),
    FASTCALL(recv_many, "recv_many(limit, timeout=None)\n--\n\nWait for one frame, take up to `limit`."),
    {"counters", (PyCFunction)link_counters, METH_NOARGS, "counters()\n--\n\nFrames and bytes sent, frames and bytes received."},
    {"fileno", (PyCFunction)link_fileno, METH_NOARGS, "fileno()\n--\n\nThe descriptor that is read."},
    FASTCALL(close, "close(goodbye=True)\n--\n\nIdempotent, immediate."),
    {"detach", (PyCFunction)link_detach, METH_NOARGS, "detach()\n--\n\nGive up the descriptors without closing them."},
    {NULL},
};

static PyMemberDef members[] = {
    {"native", T_OBJECT_EX, offsetof(StreamLink, end.native), READONLY, "The object underneath."},
    {"peer", T_OBJECT_EX, offsetof(StreamLink, end.peer), READONLY, "Who is at the other end."},
    {"__weaklistoffset__", T_PYSSIZET, offsetof(StreamLink, weakrefs), READONLY, NULL},
    {NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, "Length-prefixed frames over one or two non-blocking descriptors, which it owns."},
    {Py_tp_new, link_new},
    {Py_tp_dealloc, link_dealloc},
    {Py_tp_traverse, link_traverse},
    {Py_tp_clear, link_clear},
    {Py_tp_methods, methods},
    {Py_tp_members, members},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "ipckit._native.StreamLink",
    .basicsize = sizeof(StreamLink),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_BASETYPE,
    .slots = slots,
};

int add_stream_type(PyObject *module)
{
    PyObject *type = PyType_FromModuleAndSpec(module, &spec, NULL);
    if (type == NULL)
        return -1;
    int added = PyModule_AddObjectRef(module, "StreamLink", type);
    Py_DECREF(type);
    return added;
}
