/* py_ring.c — RingLink: ring.[ch] as a Python object.
 *
 * Every call goes the same way: check, take the lane, try with the GIL held. What must wait spins a moment with the GIL (letting
 * go of it costs as much as an answer that is already on its way), then without it, then sleeps. A link closes its descriptors
 * when nobody is inside, and gives up its memory when no view of it is left. */
#include "py_ring.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <structmember.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

/* -- coming and going ---------------------------------------------------------------------------------------------- */

static void close_descriptors(RingLink *self)
{
    ring_finish(self->ring);
    int *all[] = {&self->bells[0], &self->bells[1], &self->bells[2], &self->bells[3], &self->control, &self->end.bell};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        if (*all[i] >= 0)
            close(*all[i]);
        *all[i] = -1;
    }
}

void link_release(RingLink *self)
{
    if (!self->end.closed || self->end.inside)
        return;
    if (self->control >= 0)
        close_descriptors(self);
    if (self->exports == 0)
        ring_unmap(&self->map);
    Py_CLEAR(self->partial);
    Py_CLEAR(self->rest_owner);
}

int link_check_slow(RingLink *self, const char *operation)
{
    if (self->end.generation != fork_generation) {
        if (endpoint_forked(&self->end, operation) < 0)
            return -1;
        /* Two processes on one side of a ring would overwrite each other's records. */
        self->end.generation = fork_generation - 1;
        give_up(&self->end, REASON_UNSUPPORTED, operation, PyUnicode_FromString("a ring belongs to the process that opened it"));
        return -1;
    }
    return endpoint_check(&self->end, operation);
}

int link_enter(RingLink *self, struct lane *lane, int64_t deadline, const char *operation)
{
    if (link_check(self, operation) < 0)
        return -1;
    self->end.inside++;
    if (lane_enter(&self->end, lane, deadline, operation) == 0)
        return 0;
    self->end.inside--;
    link_release(self);
    return -1;
}

int link_try_enter(RingLink *self, struct lane *lane, const char *operation)
{
    if (link_check(self, operation) < 0)
        return -1;
    if (__builtin_expect(lane->busy, 0)) {
        self->turned_away |= lane == &self->end.send ? RING_SEND : RING_RECV;
        return 0;
    }
    lane->busy = true;
    self->end.inside++;
    return 1;
}

void link_hand_on(RingLink *self, struct lane *lane)
{
    bool sending = lane == &self->end.send;
    if (!sending) {
        if (__builtin_expect(RING_HINT(self->ring->release_due), 0))
            ring_release(self->ring);
        if (__builtin_expect(self->ring->watched, 0))
            ring_watch_on(self->ring);
    }
    lane_leave(lane);
    if (__builtin_expect(self->turned_away != 0, 0)) {
        int want = sending ? RING_SEND : RING_RECV;
        if (self->turned_away & want) {
            self->turned_away &= ~want;
            ring_nudge(self->ring, want);
        }
    }
}

void link_leave(RingLink *self, struct lane *lane)
{
    link_hand_on(self, lane);
    if (--self->end.inside == 0 && __builtin_expect(self->end.closed, 0))
        link_release(self);
}

static PyObject *link_close(PyObject *object, PyObject *unused)
{
    RingLink *self = (RingLink *)object;
    (void)unused;
    if (self->end.closed)
        Py_RETURN_NONE;
    self->end.closed = true;
    if (self->end.generation != fork_generation) { /* the parent's link, and the parent's threads */
        self->end.inside = 0;
        link_release(self);
        Py_RETURN_NONE;
    }
    if (self->rest_owner && !self->end.send.busy)
        ring_stream(self->ring, &self->rest);
    atomic_store(&self->ring->closing, true);
    ring_goodbye(self->ring);
    shutdown(self->control, SHUT_RDWR); /* a forked child may still have it open */
    uint64_t one = 1;
    while (write(self->end.bell, &one, sizeof one) < 0 && errno == EINTR)
        ;
    if (self->loan) /* its block may go on for long; who waits for the lane must hear now */
        claim_lose_lane(self->loan);
    link_release(self);
    Py_RETURN_NONE;
}

static PyObject *link_abandon(PyObject *object, PyObject *unused)
{
    RingLink *self = (RingLink *)object;
    (void)unused;
    if (self->end.generation != fork_generation && !self->end.closed && self->control >= 0) {
        close_descriptors(self);
        if (self->exports == 0)
            ring_unmap(&self->map);
    }
    Py_RETURN_NONE;
}

/* -- giving up ----------------------------------------------------------------------------------------------------- */

int link_ended(RingLink *self, enum ring_status why, const char *operation)
{
    if (why == RING_GOODBYE)
        give_up(&self->end, REASON_GOODBYE, operation, NULL);
    else if (why == RING_ENDED)
        give_up(&self->end, REASON_ENDED, operation, PyBool_FromLong(self->partial != NULL));
    else {
        shutdown(self->control, SHUT_RDWR); /* who breaks the protocol is disconnected */
        give_up(&self->end, REASON_PROTOCOL, operation, PyUnicode_FromString(atomic_load(&self->ring->broken)));
    }
    return -1;
}

void link_too_large(RingLink *self, uint64_t size, uint64_t most, const char *operation)
{
    give_up(&self->end, REASON_TOO_LARGE, operation, Py_BuildValue("KK", (unsigned long long)size, (unsigned long long)most));
}

/* -- arming -------------------------------------------------------------------------------------------------------- */

static PyObject *make_wait(RingLink *self, int want)
{
    struct ring *r = self->ring;
    PyObject *fds = want == RING_RECV   ? Py_BuildValue("((ii)(ii))", r->hear_data, 1, self->control, 1)
                    : want == RING_SEND ? Py_BuildValue("((ii)(ii))", r->hear_space, 1, self->control, 1)
                                        : Py_BuildValue("((ii)(ii)(ii))", r->hear_data, 1, r->hear_space, 1, self->control, 1);
    if (!fds)
        return NULL;
    PyObject *wait = PyObject_CallFunctionObjArgs(self->wait, fds, NULL);
    Py_DECREF(fds);
    return wait;
}

static PyObject *link_arm(PyObject *object, PyObject *wanted)
{
    RingLink *self = (RingLink *)object;
    long want = PyLong_AsLong(wanted);
    if (want == -1 && PyErr_Occurred())
        return NULL;
    if (want < 1 || want > 3) {
        PyErr_SetString(PyExc_ValueError, "want is RECV, SEND, or both");
        return NULL;
    }
    if (link_check(self, want & RING_RECV ? "recv" : "send") < 0)
        return NULL;
    if (self->rest_owner)
        want |= RING_SEND;
    if (!self->end.waits[want] && !(self->end.waits[want] = make_wait(self, (int)want)))
        return NULL;
    ring_arm(self->ring, (int)want);
    return Py_NewRef(self->end.waits[want]);
}

static PyObject *link_fileno(PyObject *object, PyObject *unused)
{
    RingLink *self = (RingLink *)object;
    (void)unused;
    if (link_check(self, "fileno") < 0)
        return NULL;
    int fd = ring_watch(self->ring);
    if (fd < 0)
        return give_up(&self->end, REASON_SYSTEM, "fileno", PyLong_FromLong(errno));
    if (!self->end.recv.busy) /* else whoever receives does it when leaving */
        ring_watch_on(self->ring);
    return PyLong_FromLong(fd);
}

static PyObject *link_counters(PyObject *object, PyObject *unused)
{
    (void)unused;
    return endpoint_counters(&((RingLink *)object)->end);
}

/* -- arguments ----------------------------------------------------------------------------------------------------- */

#define METHOD(name, required, names, call)                                                                            \
    static PyObject *link_##name(PyObject *object, PyObject *const *args, Py_ssize_t count, PyObject *keywords)        \
    {                                                                                                                  \
        static const char *const known[] = names;                                                                      \
        RingLink *self = (RingLink *)object;                                                                           \
        PyObject *given[3] = {NULL, NULL, NULL};                                                                       \
        if (read_arguments(#name, known, required, args, count, keywords, given) < 0)                                  \
            return NULL;                                                                                               \
        return call;                                                                                                   \
    }
#define NAMES(...) {__VA_ARGS__, NULL}

METHOD(send, 1, NAMES("frame", "timeout", "priority"), link_transmit(self, given[0], given[1], given[2]))
METHOD(recv, 0, NAMES("timeout"), link_receive(self, given[0]))
METHOD(recv_into, 1, NAMES("buffer", "timeout"), link_receive_into(self, given[0], given[1]))
METHOD(send_many, 1, NAMES("frames", "timeout"), link_transmit_many(self, given[0], given[1]))
METHOD(recv_many, 1, NAMES("limit", "timeout"), link_receive_many(self, given[0], given[1]))

/* -- the type ------------------------------------------------------------------------------------------------------ */

static int open_link(RingLink *self, int memory, const int bells[4], int control, int side)
{
    const char *why;
    if (ring_map(&self->map, memory, side, &why) < 0) {
        if (errno == EPROTO)
            give_up(&self->end, REASON_PROTOCOL, "connect", PyUnicode_FromString(why));
        else
            give_up(&self->end, REASON_SYSTEM, "connect", PyLong_FromLong(errno));
        return -1;
    }
    for (int i = 0; i < 4; i++) {
        int flags = fcntl(bells[i], F_GETFL);
        if (flags < 0 || fcntl(bells[i], F_SETFL, flags | O_NONBLOCK) < 0) {
            give_up(&self->end, REASON_SYSTEM, "connect", PyLong_FromLong(errno));
            return -1;
        }
    }
    ring_init(self->ring, &self->map, side, bells, control, self->end.bell, self->end.limit);
    close(memory); /* from here on everything is ours, and nothing can fail */
    memcpy(self->bells, bells, sizeof self->bells);
    self->control = control;
    return 0;
}

static PyObject *link_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"memory", "bells", "control", "side", "fail", "on_fork", "limit",
                            "spin_ns", "wait", "native", "peer", NULL};
    int memory, bells[4], control, side;
    long long limit, spin_ns;
    PyObject *fail, *on_fork, *wait, *native, *peer;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "i(iiii)iiOOLLOOO:RingLink", names, &memory, &bells[0], &bells[1],
                                     &bells[2], &bells[3], &control, &side, &fail, &on_fork, &limit, &spin_ns, &wait, &native,
                                     &peer))
        return NULL;
    if (limit < 0 || side < 0 || side > 1 || spin_ns < -1 || !PyCallable_Check(wait)) {
        PyErr_SetString(PyExc_ValueError, "limit >= 0, side 0 or 1, spin_ns >= -1, wait callable");
        return NULL;
    }
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    RingLink *self = (RingLink *)allocate(type, 0);
    if (!self)
        return NULL;
    self->control = self->end.bell = -1;
    for (int i = 0; i < 4; i++)
        self->bells[i] = -1;
    self->ring = aligned_alloc(RING_LINE, sizeof *self->ring);
    if (!self->ring) {
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    memset(self->ring, 0, sizeof *self->ring);
    self->ring->send_epoll = self->ring->recv_epoll = self->ring->watch = -1;
    self->wait = Py_NewRef(wait);
    if (endpoint_init(&self->end, fail, on_fork, (uint64_t)limit, spin_ns, native, peer) < 0 ||
        open_link(self, memory, bells, control, side) < 0) {
        Py_DECREF(self);
        return NULL;
    }
    self->adaptive = spin_ns < 0;
    self->spin_now = self->end.spin_ns;
    self->brief = ring_rounds(self->end.spin_ns < BRIEF_NS ? self->end.spin_ns : BRIEF_NS);
    return (PyObject *)self;
}

static int link_traverse(PyObject *object, visitproc visit, void *arg)
{
    RingLink *self = (RingLink *)object;
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(self->wait);
    return endpoint_traverse(&self->end, visit, arg);
}

static int link_clear(PyObject *object)
{
    RingLink *self = (RingLink *)object;
    Py_CLEAR(self->wait);
    endpoint_clear(&self->end);
    return 0;
}

static void link_dealloc(PyObject *object)
{
    RingLink *self = (RingLink *)object;
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    if (self->weakrefs)
        PyObject_ClearWeakRefs(object);
    if (self->control >= 0)
        Py_XDECREF(link_close(object, NULL));
    self->end.closed = true;
    if (self->ring)
        link_release(self);
    link_clear(object);
    endpoint_free(&self->end);
    free(self->ring);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(object);
    Py_DECREF(type);
}

static PyMethodDef link_methods[] = {
    {"try_send", link_try_send, METH_O, NULL},
    {"try_flush", link_try_flush, METH_NOARGS, NULL},
    {"try_recv", link_try_recv, METH_NOARGS, NULL},
    {"spin_recv", link_spin_recv, METH_NOARGS, NULL},
    {"arm", link_arm, METH_O, NULL},
    {"send", (PyCFunction)(void (*)(void))link_send, METH_FASTCALL | METH_KEYWORDS, NULL},
    {"recv", (PyCFunction)(void (*)(void))link_recv, METH_FASTCALL | METH_KEYWORDS, NULL},
    {"recv_into", (PyCFunction)(void (*)(void))link_recv_into, METH_FASTCALL | METH_KEYWORDS, NULL},
    {"send_many", (PyCFunction)(void (*)(void))link_send_many, METH_FASTCALL | METH_KEYWORDS, NULL},
    {"recv_many", (PyCFunction)(void (*)(void))link_recv_many, METH_FASTCALL | METH_KEYWORDS, NULL},
    {"try_loan", link_try_loan, METH_O, NULL},
    {"try_borrow", link_try_borrow, METH_NOARGS, NULL},
    {"counters", link_counters, METH_NOARGS, NULL},
    {"fileno", link_fileno, METH_NOARGS, NULL},
    {"abandon", link_abandon, METH_NOARGS, NULL},
    {"close", link_close, METH_NOARGS, NULL},
    {NULL},
};

static PyMemberDef link_members[] = {
    {"native", T_OBJECT, offsetof(RingLink, end.native), READONLY, NULL},
    {"peer", T_OBJECT, offsetof(RingLink, end.peer), READONLY, NULL},
    {"__weaklistoffset__", T_PYSSIZET, offsetof(RingLink, weakrefs), READONLY, NULL},
    {NULL},
};

static PyType_Slot link_slots[] = {
    {Py_tp_doc, "Two shared-memory rings, one for each direction, and their doorbells."},
    {Py_tp_new, link_new},
    {Py_tp_dealloc, link_dealloc},
    {Py_tp_traverse, link_traverse},
    {Py_tp_clear, link_clear},
    {Py_tp_methods, link_methods},
    {Py_tp_members, link_members},
    {0, NULL},
};

static PyType_Spec link_spec = {
    .name = "ipckit._native.RingLink",
    .basicsize = sizeof(RingLink),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = link_slots,
};

static PyObject *core_ring_create(PyObject *module, PyObject *wanted)
{
    (void)module;
    long long capacity = PyLong_AsLongLong(wanted);
    if (capacity == -1 && PyErr_Occurred())
        return NULL;
    int fd;
    Py_BEGIN_ALLOW_THREADS
    fd = ring_create((uint64_t)capacity);
    Py_END_ALLOW_THREADS
    return fd < 0 ? PyErr_SetFromErrno(PyExc_OSError) : PyLong_FromLong(fd);
}

static PyMethodDef functions[] = {
    {"ring_create", core_ring_create, METH_O, NULL},
    {NULL},
};

int add_ring_type(PyObject *module)
{
    PyObject *type = PyType_FromModuleAndSpec(module, &link_spec, NULL);
    if (!type)
        return -1;
    int failed = PyModule_AddObjectRef(module, "RingLink", type);
    Py_DECREF(type);
    return failed < 0 || add_claim_type(module) < 0 ? -1 : PyModule_AddFunctions(module, functions);
}
