/* py_stream.c — StreamLink: stream.[ch] as a Python object. Its beginning, its end, and the arguments of its methods. */
#include "py_stream.h"

#include <structmember.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

enum { DRAIN = 1 << 20 }; /* unread input to discard at close */
enum { GLANCE = 64 }; /* bytes, at most, of a header, and of what a glance is at */
enum { WANT_RECV = 1, WANT_SEND = 2 };

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

int stream_link_enter(StreamLink *self, struct lane *lane, int64_t deadline, const char *operation)
{
    if (__builtin_expect(self->end.generation != fork_generation, 0) && !self->end.closed && adopt(self, operation) < 0)
        return -1;
    if (endpoint_check(&self->end, operation) < 0)
        return -1;
    self->end.inside++; /* the descriptors stay until stream_link_leave() */
    if (lane_enter(&self->end, lane, deadline, operation) < 0) {
        if (--self->end.inside == 0 && self->end.closed)
            release(self, true);
        return -1;
    }
    return 0;
}

void stream_link_leave(StreamLink *self, struct lane *lane)
{
    lane_leave(lane);
    if (--self->end.inside == 0 && self->end.closed)
        release(self, true);
}

int stream_link_over(StreamLink *self, enum stream_status why, int error, const char *operation)
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

int stream_link_give_up(StreamLink *self, enum reason why, const char *operation)
{
    give_up(&self->end, why, operation, NULL);
    return -1;
}

int stream_link_too_large(StreamLink *self, size_t size, uint64_t limit, const char *operation)
{
    give_up(&self->end, REASON_TOO_LARGE, operation, Py_BuildValue("nK", (Py_ssize_t)size, (unsigned long long)limit));
    return -1;
}

/* After a call without the GIL: closed, interrupted, or out of time? 0 if it can go on. */
int stream_link_may_go_on(StreamLink *self, enum stream_status status, const char *operation)
{
    if (status == STREAM_SIGNAL && PyErr_CheckSignals() < 0)
        return -1;
    if (self->end.closed) /* by another thread, or just now by the signal handler */
        return stream_link_give_up(self, REASON_CLOSED, operation);
    return status == STREAM_AGAIN ? stream_link_give_up(self, REASON_TIMED_OUT, operation) : 0;
}

/* -- the methods ----------------------------------------------------------------------------------------------- */

static PyObject *link_try_send(StreamLink *self, PyObject *frame)
{
    if (self->end.send.busy && !self->end.closed)
        return Py_NewRef(Py_False); /* try_ never waits, not for another thread either */
    int done = stream_link_transmit(self, frame, 0, false, "send");
    return done < 0 ? NULL : PyBool_FromLong(done);
}

static PyObject *link_try_flush(StreamLink *self, PyObject *unused)
{
    (void)unused;
    if (self->end.send.busy && !self->end.closed)
        return Py_NewRef(Py_False);
    int done = stream_link_flush(self);
    return done < 0 ? NULL : PyBool_FromLong(done);
}

static PyObject *link_try_recv(StreamLink *self, PyObject *unused)
{
    (void)unused;
    if (self->end.recv.busy && !self->end.closed)
        return Py_NewRef(Py_None);
    return stream_link_receive(self, 0, TRY, "recv");
}

static PyObject *link_spin_recv(StreamLink *self, PyObject *unused)
{
    (void)unused;
    if (self->end.recv.busy && !self->end.closed)
        return Py_NewRef(Py_None);
    return stream_link_receive(self, now_ns() + LOOP_SPIN_NS, SPIN, "recv");
}

static PyObject *link_try_glance(StreamLink *self, PyObject *argument)
{
    Py_ssize_t count = PyLong_AsSsize_t(argument);
    if (count == -1 && PyErr_Occurred())
        return NULL;
    if (count < 1 || count > GLANCE) {
        PyErr_Format(PyExc_ValueError, "a glance is at 1 to %d bytes", GLANCE);
        return NULL;
    }
    if (self->end.recv.busy && !self->end.closed)
        return Py_NewRef(Py_None);
    return stream_link_glance(self, (size_t)count);
}

static PyObject *link_reframe(StreamLink *self, PyObject *args)
{
    int in, out;
    if (!PyArg_ParseTuple(args, "ii:reframe", &in, &out) || endpoint_check(&self->end, "reframe") < 0)
        return NULL;
    if (in < 0 || in > GLANCE || out < 0 || out > GLANCE) {
        PyErr_Format(PyExc_ValueError, "a header is of 0 to %d bytes", GLANCE);
        return NULL;
    }
    if (self->end.inside || stream_pending(&self->out) || self->in.target) {
        PyErr_SetString(PyExc_ValueError, "the link is in use");
        return NULL;
    }
    self->in.uncounted = (size_t)in;
    self->out.uncounted = (size_t)out;
    self->in.goodbye = self->goodbye = false;
    self->reframed = true;
    return Py_NewRef(Py_None);
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
    static const char *const names[] = {"frame", "timeout", "priority", NULL};
    PyObject *values[3] = {count ? args[0] : NULL};
    int64_t deadline = NO_DEADLINE;
    if (count != 1 || keywords) {
        if (read_arguments("send", names, 1, args, count, keywords, values) < 0)
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
    return stream_link_transmit(self, values[0], deadline, true, "send") < 0 ? NULL : Py_NewRef(Py_None);
}

static PyObject *link_recv(StreamLink *self, PyObject *const *args, Py_ssize_t count, PyObject *keywords)
{
    static const char *const names[] = {"timeout", NULL};
    int64_t deadline = NO_DEADLINE;
    if (count || keywords) {
        PyObject *timeout;
        if (read_arguments("recv", names, 0, args, count, keywords, &timeout) < 0 || (deadline = deadline_of(timeout)) < 0)
            return NULL;
    }
    return stream_link_receive(self, deadline, WAIT, "recv");
}

static PyObject *link_recv_into(StreamLink *self, PyObject *const *args, Py_ssize_t count, PyObject *keywords)
{
    static const char *const names[] = {"buffer", "timeout", NULL};
    PyObject *values[2];
    int64_t deadline;
    if (read_arguments("recv_into", names, 1, args, count, keywords, values) < 0 || (deadline = deadline_of(values[1])) < 0)
        return NULL;
    Py_buffer into;
    if (PyObject_GetBuffer(values[0], &into, PyBUF_WRITABLE) < 0)
        return NULL;
    PyObject *size = stream_link_receive_into(self, &into, deadline);
    PyBuffer_Release(&into);
    return size;
}

static PyObject *link_send_many(StreamLink *self, PyObject *const *args, Py_ssize_t count, PyObject *keywords)
{
    static const char *const names[] = {"frames", "timeout", NULL};
    PyObject *values[2];
    int64_t deadline;
    if (read_arguments("send_many", names, 1, args, count, keywords, values) < 0 || (deadline = deadline_of(values[1])) < 0)
        return NULL;
    PyObject *frames = PySequence_Tuple(values[0]); /* the list may change while the GIL is away */
    if (frames == NULL)
        return NULL;
    PyObject *accepted = stream_link_transmit_many(self, frames, deadline);
    Py_DECREF(frames);
    return accepted;
}

static PyObject *link_recv_many(StreamLink *self, PyObject *const *args, Py_ssize_t count, PyObject *keywords)
{
    static const char *const names[] = {"limit", "timeout", NULL};
    PyObject *values[2];
    int64_t deadline;
    if (read_arguments("recv_many", names, 1, args, count, keywords, values) < 0 || (deadline = deadline_of(values[1])) < 0)
        return NULL;
    Py_ssize_t limit = PyLong_AsSsize_t(values[0]);
    if (limit == -1 && PyErr_Occurred())
        return NULL;
    if (limit < 1) {
        PyErr_SetString(PyExc_ValueError, "limit must be at least 1");
        return NULL;
    }
    return stream_link_receive_many(self, limit, deadline);
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
    static const char *const names[] = {"goodbye", NULL};
    PyObject *goodbye;
    if (read_arguments("close", names, 0, args, count, keywords, &goodbye) < 0)
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
    {"spin_recv", (PyCFunction)link_spin_recv, METH_NOARGS, "spin_recv()\n--\n\nThe next frame, or None after spinning for one."},
    {"try_glance", (PyCFunction)link_try_glance, METH_O, "try_glance(count, /)\n--\n\nThe next bytes, which stay, or None."},
    {"reframe", (PyCFunction)link_reframe, METH_VARARGS,
     "reframe(uncounted_in, uncounted_out, /)\n--\n\nFrames have a header that their length does not count; no goodbyes."},
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
