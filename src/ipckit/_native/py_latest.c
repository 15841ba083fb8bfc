/* py_latest.c — the newest value for Python: see latest.h. A class in Python says what the bytes are, and who may write. */
#include "py_sync.h"

#include <errno.h>

#include "latest.h"

#define ON_STACK 4096

typedef struct {
    PyObject_HEAD
    Py_buffer memory;
    struct latest_view view; /* .at is NULL once it is closed */
    uint64_t seen;           /* number of the value that was read last */
    unsigned writes;         /* fork_generation + 1 in the process that may write; 0 */
    unsigned inside;         /* calls that have let go of the GIL */
} Latest;

static void release_object(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(object);
    Py_DECREF(type);
}

/* Raises what its method makes of it. */
static PyObject *trouble(Latest *self, const char *what, Py_ssize_t detail)
{
    return PyObject_CallMethod((PyObject *)self, "_trouble", "sn", what, detail);
}

static int latest_ready(Latest *self)
{
    if (__builtin_expect(self->view.at != NULL, 1))
        return 0;
    Py_XDECREF(trouble(self, "closed", 0));
    return -1;
}

static PyObject *latest_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *memory;
    (void)kwargs;
    if (!PyArg_ParseTuple(args, "O:Latest", &memory))
        return NULL;
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    Latest *self = (Latest *)allocate(type, 0);
    if (!self)
        return NULL;
    if (PyObject_GetBuffer(memory, &self->memory, PyBUF_WRITABLE) < 0) {
        Py_DECREF(self);
        return NULL;
    }
    const char *wrong = latest_check(self->memory.buf, (uint64_t)self->memory.len, &self->view);
    if (wrong) {
        PyErr_SetString(PyExc_ValueError, wrong);
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

static void let_go(Latest *self)
{
    if (self->inside && self->view.at)
        futex_wake(latest_word(&self->view), INT32_MAX); /* ours find it closed; the others sleep on */
    self->view.at = NULL;
    if (self->memory.obj && !self->inside)
        PyBuffer_Release(&self->memory);
}

static PyObject *latest_let_go(PyObject *object, PyObject *unused)
{
    (void)unused;
    let_go((Latest *)object);
    Py_RETURN_NONE;
}

static int latest_traverse(PyObject *object, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(((Latest *)object)->memory.obj);
    return 0;
}

static void latest_dealloc(PyObject *object)
{
    PyObject_GC_UnTrack(object);
    let_go((Latest *)object);
    release_object(object);
}

static PyObject *latest_read_bytes(PyObject *object, PyObject *unused)
{
    (void)unused;
    Latest *self = (Latest *)object;
    if (latest_ready(self) < 0)
        return NULL;
    char small[ON_STACK] __attribute__((aligned(8)));
    for (;;) {
        uint64_t number, length;
        if (!latest_newest(&self->view, &number, &length))
            return trouble(self, "damaged", 0);
        if (number == 0)
            Py_RETURN_NONE;
        PyObject *large = NULL;
        if (length > ON_STACK && !(large = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)length)))
            return NULL;
        if (latest_copy(&self->view, number, large ? PyBytes_AsString(large) : small, length)) {
            self->seen = number;
            return large ? large : PyBytes_FromStringAndSize(small, (Py_ssize_t)length);
        }
        Py_XDECREF(large);
    }
}

static PyObject *latest_read_into(PyObject *object, PyObject *target)
{
    Latest *self = (Latest *)object;
    if (latest_ready(self) < 0)
        return NULL;
    Py_buffer out;
    if (PyObject_GetBuffer(target, &out, PyBUF_WRITABLE) < 0)
        return NULL;
    PyObject *result = NULL;
    for (;;) {
        uint64_t number, length;
        if (!latest_newest(&self->view, &number, &length)) {
            result = trouble(self, "damaged", 0);
            break;
        }
        if ((uint64_t)out.len < length) {
            PyErr_Format(PyExc_ValueError, "the value has %llu bytes, the buffer %zd", (unsigned long long)length, out.len);
            break;
        }
        if (number == 0) {
            result = Py_NewRef(Py_None);
            break;
        }
        if (latest_copy(&self->view, number, out.buf, length)) {
            self->seen = number;
            result = PyLong_FromUnsignedLongLong(length);
            break;
        }
    }
    PyBuffer_Release(&out);
    return result;
}

/* Under the GIL from end to end: two threads of the one writer are one writer. */
static PyObject *latest_write_bytes(PyObject *object, PyObject *value)
{
    Latest *self = (Latest *)object;
    if (latest_ready(self) < 0)
        return NULL;
    if (__builtin_expect(self->writes != fork_generation + 1, 0)) {
        PyObject *claimed = PyObject_CallMethod(object, "_claim", NULL);
        if (!claimed)
            return NULL;
        Py_DECREF(claimed);
        if (latest_ready(self) < 0)
            return NULL;
        self->writes = fork_generation + 1;
        atomic_store_explicit(&self->view.at->writer, (uint64_t)getpid(), memory_order_relaxed);
    }
    Py_buffer data;
    if (PyObject_GetBuffer(value, &data, PyBUF_SIMPLE) < 0)
        return NULL;
    PyObject *result = NULL;
    if ((uint64_t)data.len > self->view.capacity)
        result = trouble(self, "large", data.len);
    else
        result = PyLong_FromUnsignedLongLong(latest_write(&self->view, data.buf, (uint64_t)data.len));
    PyBuffer_Release(&data);
    return result;
}

PyDoc_STRVAR(latest_await_doc, "_await(seen, timeout)\n--\n\nWhether a number above `seen` came in time.");

static PyObject *latest_await(PyObject *object, PyObject *args)
{
    Latest *self = (Latest *)object;
    unsigned long long seen;
    PyObject *timeout;
    if (!PyArg_ParseTuple(args, "KO:_await", &seen, &timeout))
        return NULL;
    int64_t deadline = deadline_of(timeout);
    if (deadline == -1)
        return NULL;
    for (;;) {
        if (latest_ready(self) < 0)
            return NULL;
        if (latest_number(&self->view) > seen)
            Py_RETURN_TRUE;
        struct latest_view view = self->view; /* close() by another thread leaves the memory to us until we are out */
        int error;
        self->inside++;
        Py_BEGIN_ALLOW_THREADS
        error = latest_sleep(&view, seen, deadline);
        Py_END_ALLOW_THREADS
        self->inside--;
        if (!self->view.at)
            let_go(self);
        if (error == ETIMEDOUT && self->view.at)
            return PyBool_FromLong(latest_number(&self->view) > seen);
        if (error == EINTR && PyErr_CheckSignals() < 0)
            return NULL;
    }
}

static PyObject *latest_number_(PyObject *object, PyObject *unused)
{
    (void)unused;
    Latest *self = (Latest *)object;
    return latest_ready(self) < 0 ? NULL : PyLong_FromUnsignedLongLong(latest_number(&self->view));
}

static PyObject *latest_writer(PyObject *object, PyObject *unused)
{
    (void)unused;
    Latest *self = (Latest *)object;
    if (latest_ready(self) < 0)
        return NULL;
    return PyLong_FromUnsignedLongLong(atomic_load_explicit(&self->view.at->writer, memory_order_relaxed));
}

/* -- for event loops ------------------------------------------------------------------------------------------------ */

typedef struct {
    PyObject_HEAD
    Latest *latest; /* whose memory the sleeper looks at */
    struct sleeper *sleeper;
    unsigned forks;
} Watch;

static PyObject *watch_type;

PyDoc_STRVAR(latest_watch_doc, "_watch(seen, eventfd)\n--\n\n"
                               "Have the eventfd written to when a number above `seen` is there; None: it is there. Ends with the object.");

static PyObject *latest_watch(PyObject *object, PyObject *args)
{
    Latest *self = (Latest *)object;
    unsigned long long seen;
    int bell;
    if (!PyArg_ParseTuple(args, "Ki:_watch", &seen, &bell) || latest_ready(self) < 0)
        return NULL;
    uint32_t word;
    if (!latest_announce(&self->view, seen, &word))
        Py_RETURN_NONE;
    if (!self_here()) {
        PyErr_SetString(PyExc_NotImplementedError, "event loops wait with the help of robust futexes, which are not to be had here");
        return NULL;
    }
    allocfunc allocate = (allocfunc)PyType_GetSlot((PyTypeObject *)watch_type, Py_tp_alloc);
    Watch *watch = (Watch *)allocate((PyTypeObject *)watch_type, 0);
    if (!watch)
        return NULL;
    struct naps naps = {.count = 1, .at[0] = {.word = latest_word(&self->view), .seen = word}, .at_most = 1000000000};
    watch->forks = fork_generation;
    watch->latest = (Latest *)Py_NewRef(object);
    self->inside++; /* the memory stays while the sleeper may look at it */
    watch->sleeper = sleeper_watch(&naps, bell, NULL, NULL); /* it does not read the word itself, and the kernel may miss it */
    if (!watch->sleeper) {
        PyErr_SetFromErrno(PyExc_OSError);
        Py_DECREF(watch);
        return NULL;
    }
    return (PyObject *)watch;
}

static void watch_dealloc(PyObject *object)
{
    Watch *self = (Watch *)object;
    if (self->sleeper)
        sleeper_dismiss(self->sleeper, self->forks);
    if (self->latest) {
        self->latest->inside--;
        if (!self->latest->view.at)
            let_go(self->latest);
        Py_DECREF(self->latest);
    }
    release_object(object);
}

static PyType_Slot watch_slots[] = {
    {Py_tp_doc, "A thread of the core that waits for a newer value."},
    {Py_tp_dealloc, watch_dealloc},
    {0, NULL},
};

static PyType_Spec watch_spec = {
    .name = "ipckit._native.LatestWatch",
    .basicsize = sizeof(Watch),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = watch_slots,
};

static PyMethodDef latest_methods[] = {
    {"read", latest_read_bytes, METH_NOARGS, NULL},
    {"read_into", latest_read_into, METH_O, NULL},
    {"write", latest_write_bytes, METH_O, NULL},
    {"_await", latest_await, METH_VARARGS, latest_await_doc},
    {"_watch", latest_watch, METH_VARARGS, latest_watch_doc},
    {"_number", latest_number_, METH_NOARGS, NULL},
    {"_writer", latest_writer, METH_NOARGS, NULL},
    {"_let_go", latest_let_go, METH_NOARGS, NULL},
    {NULL},
};

static PyMemberDef latest_members[] = {
    {"_seen", T_ULONGLONG, offsetof(Latest, seen), 0, NULL},
    {NULL},
};

static PyType_Slot latest_slots[] = {
    {Py_tp_doc, "The newest value, in memory that processes share."},
    {Py_tp_new, latest_new},
    {Py_tp_dealloc, latest_dealloc},
    {Py_tp_traverse, latest_traverse},
    {Py_tp_methods, latest_methods},
    {Py_tp_members, latest_members},
    {0, NULL},
};

static PyType_Spec latest_spec = {
    .name = "ipckit._native.Latest",
    .basicsize = sizeof(Latest),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_BASETYPE,
    .slots = latest_slots,
};

/* -- the module ----------------------------------------------------------------------------------------------------- */

static PyObject *core_latest_bytes(PyObject *module, PyObject *capacity)
{
    (void)module;
    unsigned long long wanted = PyLong_AsUnsignedLongLong(capacity);
    if (wanted == (unsigned long long)-1 && PyErr_Occurred())
        return NULL;
    return PyLong_FromUnsignedLongLong(latest_bytes(wanted));
}

static PyObject *core_latest_format(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *memory;
    unsigned long long capacity;
    if (!PyArg_ParseTuple(args, "OK:latest_format", &memory, &capacity))
        return NULL;
    Py_buffer buffer;
    if (PyObject_GetBuffer(memory, &buffer, PyBUF_WRITABLE) < 0)
        return NULL;
    uint64_t bytes = latest_bytes(capacity);
    bool fits = bytes != 0 && bytes <= (uint64_t)buffer.len;
    if (fits)
        latest_format(buffer.buf, capacity);
    else
        PyErr_SetString(PyExc_ValueError, "it does not fit");
    PyBuffer_Release(&buffer);
    if (!fits)
        return NULL;
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"latest_bytes", core_latest_bytes, METH_O, NULL},
    {"latest_format", core_latest_format, METH_VARARGS, NULL},
    {NULL},
};

static PyObject *add_type(PyObject *module, PyType_Spec *spec, const char *name)
{
    PyObject *type = PyType_FromModuleAndSpec(module, spec, NULL);
    if (type && PyModule_AddObjectRef(module, name, type) < 0)
        Py_CLEAR(type);
    return type;
}

int add_latest_types(PyObject *module)
{
    PyObject *latest = add_type(module, &latest_spec, "Latest");
    PyObject *watch = latest ? add_type(module, &watch_spec, "LatestWatch") : NULL;
    Py_XDECREF(latest);
    if (!watch)
        return -1;
    Py_XDECREF(watch_type);
    watch_type = watch;
    return PyModule_AddFunctions(module, functions);
}
