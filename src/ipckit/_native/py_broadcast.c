/* py_broadcast.c — CastOut and CastIn: broadcast.[ch] as Python objects.
 *
 * They never wait, and who uses them serialises the calls; large copies let go of the GIL. Their contract is in __init__.pyi. */
#include "module.h"

#include <errno.h>
#include <string.h>

#include "broadcast.h"

enum { FOUND_BROKEN = 4 }; /* added to what put() returns */
enum { LARGE = 64 << 10 }; /* copying more than this is worth letting go of the GIL */

typedef struct {
    PyObject_HEAD
    struct cast cast;
    bool open;
} CastOut;

typedef struct {
    PyObject_HEAD
    struct cast_in in;
    bool open, adaptive;
    int64_t spin_ns;
    unsigned skip, penalty; /* of spin_take: calls that go by without a spin */
} CastIn;

static PyObject *closed(void)
{
    PyErr_SetString(PyExc_ValueError, "it is closed");
    return NULL;
}

static void *allocate(PyTypeObject *type)
{
    return ((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
}

static void release(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF(type);
}

/* -- publishing ---------------------------------------------------------------------------------------------------- */

static PyObject *out_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"size", "backlog", "policy", NULL};
    long long size, backlog;
    int policy;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "LLi:CastOut", names, &size, &backlog, &policy))
        return NULL;
    if (backlog < 1 || policy < CAST_BLOCK || policy > CAST_ERROR) {
        PyErr_SetString(PyExc_ValueError, "backlog >= 1, policy 0 to 3");
        return NULL;
    }
    CastOut *self = allocate(type);
    if (!self)
        return NULL;
    if (cast_open(&self->cast, (uint64_t)size, (uint64_t)backlog, policy) < 0) {
        PyErr_SetFromErrno(PyExc_OSError);
        Py_DECREF(self);
        return NULL;
    }
    self->open = true;
    return (PyObject *)self;
}

static PyObject *out_memory(PyObject *object, PyObject *unused)
{
    (void)unused;
    return ((CastOut *)object)->open ? PyLong_FromLong(((CastOut *)object)->cast.arena.memory) : closed();
}

static PyObject *out_admit(PyObject *object, PyObject *args)
{
    CastOut *self = (CastOut *)object;
    long long slots;
    int bell, memory;
    uint32_t slot;
    if (!PyArg_ParseTuple(args, "Li:admit", &slots, &bell))
        return NULL;
    if (!self->open)
        return closed();
    if (cast_admit(&self->cast, (uint64_t)slots, bell, &slot, &memory) < 0)
        return PyErr_SetFromErrno(PyExc_OSError);
    return Py_BuildValue("Ii", (unsigned)slot, memory);
}

static struct cast_out *out_at(CastOut *self, PyObject *number, uint32_t *slot)
{
    unsigned long value = PyLong_AsUnsignedLong(number);
    if (PyErr_Occurred())
        return NULL;
    if (!self->open || value >= self->cast.room || !self->cast.outs[value]) {
        PyErr_SetString(PyExc_ValueError, "no such slot");
        return NULL;
    }
    *slot = (uint32_t)value;
    return self->cast.outs[value];
}

static PyObject *out_remove(PyObject *object, PyObject *number)
{
    CastOut *self = (CastOut *)object;
    uint32_t slot;
    if (!out_at(self, number, &slot))
        return NULL;
    cast_remove(&self->cast, slot);
    Py_RETURN_NONE;
}

static PyObject *out_put(PyObject *object, PyObject *const *args, Py_ssize_t count)
{
    CastOut *self = (CastOut *)object;
    char *slots, *prefix;
    Py_ssize_t slots_bytes, prefix_bytes;
    if (count < 3 || count > 4) {
        PyErr_SetString(PyExc_TypeError, "put(slots, prefix, body, force=False)");
        return NULL;
    }
    if (PyBytes_AsStringAndSize(args[0], &slots, &slots_bytes) < 0 ||
        PyBytes_AsStringAndSize(args[1], &prefix, &prefix_bytes) < 0)
        return NULL;
    bool force = count == 4 && PyObject_IsTrue(args[3]) == 1;
    const uint32_t *chosen = (const uint32_t *)slots;
    uint32_t many = (uint32_t)(slots_bytes / (Py_ssize_t)sizeof *chosen);
    if (!self->open)
        return closed();
    for (uint32_t i = 0; i < many; i++)
        if (chosen[i] >= self->cast.room || !self->cast.outs[chosen[i]]) {
            PyErr_SetString(PyExc_ValueError, "no such slot");
            return NULL;
        }
    Py_buffer body;
    if (PyObject_GetBuffer(args[2], &body, PyBUF_SIMPLE) < 0)
        return NULL;
    uint64_t bytes = (uint64_t)(prefix_bytes + body.len);
    uint32_t block;
    enum cast_status status = cast_reserve(&self->cast, chosen, many, bytes, force, &block);
    if (status == CAST_OK) {
        if (block != NO_BLOCK) {
            uint8_t *to = arena_at(&self->cast.arena, block);
            cast_copy(to, prefix, (uint64_t)prefix_bytes);
            if (body.len > LARGE) {
                Py_BEGIN_ALLOW_THREADS
                cast_copy(to + prefix_bytes, body.buf, (uint64_t)body.len);
                Py_END_ALLOW_THREADS
            } else
                cast_copy(to + prefix_bytes, body.buf, (uint64_t)body.len);
        }
        cast_commit(&self->cast, chosen, many, block, bytes, (uint64_t)prefix_bytes, force);
    }
    int failed = errno;
    PyBuffer_Release(&body);
    if (status == CAST_SCARCE) {
        errno = failed ? failed : ENOMEM;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    return PyLong_FromLong(status + (self->cast.broken ? FOUND_BROKEN : 0));
}

static PyObject *out_skip(PyObject *object, PyObject *number)
{
    CastOut *self = (CastOut *)object;
    uint32_t slot;
    if (!out_at(self, number, &slot))
        return NULL;
    cast_commit(&self->cast, &slot, 1, NO_BLOCK, 0, 0, true);
    Py_RETURN_NONE;
}

static PyObject *out_want_room(PyObject *object, PyObject *unused)
{
    (void)unused;
    if (((CastOut *)object)->open)
        cast_want_room(&((CastOut *)object)->cast);
    Py_RETURN_NONE;
}

static PyObject *out_keeps_up(PyObject *object, PyObject *number)
{
    CastOut *self = (CastOut *)object;
    uint32_t slot;
    return out_at(self, number, &slot) ? PyBool_FromLong(cast_keeps_up(&self->cast, slot)) : NULL;
}

static PyObject *out_counts(PyObject *object, PyObject *unused)
{
    CastOut *self = (CastOut *)object;
    (void)unused;
    if (!self->open)
        return closed();
    unsigned long long queued = cast_queued(&self->cast);
    return Py_BuildValue("KK", queued, (unsigned long long)self->cast.dropped);
}

static PyObject *out_broken(PyObject *object, PyObject *unused)
{
    CastOut *self = (CastOut *)object;
    (void)unused;
    PyObject *found = PyList_New(0);
    for (uint32_t slot = 0; found && self->cast.broken && slot < self->cast.room; slot++) {
        if (!self->cast.outs[slot] || !self->cast.outs[slot]->broken)
            continue;
        PyObject *number = PyLong_FromUnsignedLong(slot);
        if (!number || PyList_Append(found, number) < 0)
            Py_CLEAR(found);
        Py_XDECREF(number);
    }
    return found;
}

static PyObject *out_close(PyObject *object, PyObject *args)
{
    CastOut *self = (CastOut *)object;
    int goodbye = 1;
    if (!PyArg_ParseTuple(args, "|p:close", &goodbye))
        return NULL;
    if (self->open) {
        self->open = false;
        cast_close(&self->cast, goodbye);
    }
    Py_RETURN_NONE;
}

static void out_dealloc(PyObject *object)
{
    if (((CastOut *)object)->open)
        cast_close(&((CastOut *)object)->cast, false);
    release(object);
}

static PyMethodDef out_methods[] = {
    {"memory", out_memory, METH_NOARGS, NULL},
    {"admit", out_admit, METH_VARARGS, NULL},
    {"remove", out_remove, METH_O, NULL},
    {"put", (PyCFunction)(void (*)(void))out_put, METH_FASTCALL, NULL},
    {"skip", out_skip, METH_O, NULL},
    {"want_room", out_want_room, METH_NOARGS, NULL},
    {"keeps_up", out_keeps_up, METH_O, NULL},
    {"counts", out_counts, METH_NOARGS, NULL},
    {"broken", out_broken, METH_NOARGS, NULL},
    {"close", out_close, METH_VARARGS, NULL},
    {NULL},
};

static PyType_Slot out_slots[] = {
    {Py_tp_doc, "The publishing side of topics in shared memory."},
    {Py_tp_new, out_new},
    {Py_tp_dealloc, out_dealloc},
    {Py_tp_methods, out_methods},
    {0, NULL},
};

static PyType_Spec out_spec = {
    .name = "ipckit._native.CastOut",
    .basicsize = sizeof(CastOut),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = out_slots,
};

/* -- subscribing --------------------------------------------------------------------------------------------------- */

static PyObject *in_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"arena", "queue", "control", "data_bell", "room_bell", "limit", "spin_ns", "peer", NULL};
    int arena, queue, control, data_bell, room_bell;
    long long limit, spin_ns;
    PyObject *peer;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "iiiiiLLO:CastIn", names, &arena, &queue, &control, &data_bell, &room_bell,
                                     &limit, &spin_ns, &peer))
        return NULL;
    CastIn *self = allocate(type);
    const char *why;
    if (!self)
        return NULL;
    if (cast_in_open(&self->in, arena, queue, (uint64_t)limit, &why) < 0) {
        if (errno == EPROTO)
            PyErr_SetString(PyExc_ValueError, why);
        else
            PyErr_SetFromErrno(PyExc_OSError);
        Py_DECREF(self);
        return NULL;
    }
    self->in.control = control;
    self->in.data_bell = data_bell;
    self->in.room_bell = room_bell;
    self->adaptive = spin_ns < 0;
    self->spin_ns = spin_budget(spin_ns, peer);
    self->open = true;
    return (PyObject *)self;
}

static PyObject *copy_out(const uint8_t *from, uint64_t bytes)
{
    PyObject *copy = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)bytes);
    if (!copy)
        return NULL;
    char *to = PyBytes_AsString(copy);
    if (bytes > LARGE) {
        Py_BEGIN_ALLOW_THREADS
        cast_copy(to, from, bytes);
        Py_END_ALLOW_THREADS
    } else
        cast_copy(to, from, bytes);
    return copy;
}

static PyObject *in_try_take(PyObject *object, PyObject *unused)
{
    CastIn *self = (CastIn *)object;
    (void)unused;
    while (self->open) {
        struct cast_item item;
        enum cast_status status = cast_next(&self->in, &item);
        if (status == CAST_WAIT)
            Py_RETURN_NONE;
        if (status == CAST_GOODBYE || status == CAST_ENDED)
            return PyLong_FromLong(status == CAST_GOODBYE ? REASON_GOODBYE : REASON_ENDED);
        if (status == CAST_BROKEN) {
            PyErr_SetString(PyExc_ValueError, self->in.broken);
            return NULL;
        }
        PyObject *found = PyTuple_New(3), *gap = PyLong_FromUnsignedLongLong(cast_gap(&self->in, &item));
        PyObject *prefix = copy_out(item.at, item.prefix), *body = copy_out(item.at + item.prefix, item.length - item.prefix);
        if (!found || !gap || !prefix || !body) {
            Py_XDECREF(found);
            Py_XDECREF(gap);
            Py_XDECREF(prefix);
            Py_XDECREF(body);
            return NULL;
        }
        PyTuple_SetItem(found, 0, gap);
        PyTuple_SetItem(found, 1, prefix);
        PyTuple_SetItem(found, 2, body);
        if (self->open && cast_take(&self->in, &item)) /* last, when nothing can fail any more */
            return found;
        Py_DECREF(found);
    }
    return closed();
}

/* A spin that found nothing lets 1, 2, 4 ... 64 go by without one, as those of a RingLink in an event loop. */
static PyObject *in_spin_take(PyObject *object, PyObject *unused)
{
    CastIn *self = (CastIn *)object;
    PyObject *found = in_try_take(object, unused);
    if (found != Py_None || self->spin_ns == 0)
        return found;
    if (self->skip) {
        self->skip--;
        return found;
    }
    bool there;
    Py_BEGIN_ALLOW_THREADS
    there = cast_spin(&self->in, self->spin_ns < LOOP_SPIN_NS ? self->spin_ns : LOOP_SPIN_NS);
    Py_END_ALLOW_THREADS
    if (self->adaptive) {
        self->penalty = there ? 0 : self->penalty == 0 ? 1 : self->penalty < 64 ? 2 * self->penalty : 64;
        self->skip = self->penalty;
    }
    if (!there)
        return found;
    Py_DECREF(found);
    return in_try_take(object, unused);
}

static PyObject *in_arm(PyObject *object, PyObject *unused)
{
    (void)unused;
    if (((CastIn *)object)->open)
        cast_announce(&((CastIn *)object)->in);
    Py_RETURN_NONE;
}

static PyObject *in_trailing(PyObject *object, PyObject *unused)
{
    (void)unused;
    return ((CastIn *)object)->open ? PyLong_FromUnsignedLongLong(cast_trailing(&((CastIn *)object)->in)) : closed();
}

static PyObject *in_close(PyObject *object, PyObject *unused)
{
    CastIn *self = (CastIn *)object;
    (void)unused;
    if (self->open) {
        self->open = false;
        cast_in_close(&self->in);
    }
    Py_RETURN_NONE;
}

static void in_dealloc(PyObject *object)
{
    if (((CastIn *)object)->open)
        cast_in_close(&((CastIn *)object)->in);
    release(object);
}

static PyMethodDef in_methods[] = {
    {"try_take", in_try_take, METH_NOARGS, NULL},
    {"spin_take", in_spin_take, METH_NOARGS, NULL},
    {"arm", in_arm, METH_NOARGS, NULL},
    {"trailing", in_trailing, METH_NOARGS, NULL},
    {"close", in_close, METH_NOARGS, NULL},
    {NULL},
};

static PyType_Slot in_slots[] = {
    {Py_tp_doc, "The subscribing side of topics in shared memory."},
    {Py_tp_new, in_new},
    {Py_tp_dealloc, in_dealloc},
    {Py_tp_methods, in_methods},
    {0, NULL},
};

static PyType_Spec in_spec = {
    .name = "ipckit._native.CastIn",
    .basicsize = sizeof(CastIn),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = in_slots,
};

int add_broadcast_types(PyObject *module)
{
    PyType_Spec *specs[] = {&out_spec, &in_spec};
    const char *names[] = {"CastOut", "CastIn"};
    for (int i = 0; i < 2; i++) {
        PyObject *type = PyType_FromModuleAndSpec(module, specs[i], NULL);
        if (!type)
            return -1;
        int failed = PyModule_AddObjectRef(module, names[i], type);
        Py_DECREF(type);
        if (failed < 0)
            return -1;
    }
    return 0;
}
