/* py_sync.c — what locks and crowds have in common for Python: waiting, the object over a mapping, making a new one; see py_sync.h. */
#include "py_sync.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

/* -- what all have -------------------------------------------------------------------------------------------------- */

PyObject *sync_fail(SyncObject *self, int verdict, const char *operation)
{
    unsigned pid = atomic_load_explicit(&self->o->mutex.own.pid, memory_order_relaxed);
    PyObject *exception = PyObject_CallFunction(self->fail, "isI", verdict, operation, pid);
    if (exception == NULL)
        return NULL;
    if (PyExceptionInstance_Check(exception))
        PyErr_SetObject(PyExceptionInstance_Class(exception), exception);
    else
        PyErr_SetString(PyExc_TypeError, "fail() must return an exception");
    Py_DECREF(exception);
    return NULL;
}

int64_t deadline_for(PyObject *block, PyObject *timeout)
{
    int blocks = block ? PyObject_IsTrue(block) : 1;
    if (blocks < 0)
        return -1;
    if (!blocks)
        return 0;
    if (timeout && timeout != Py_None) {
        double seconds = PyFloat_AsDouble(timeout);
        if (seconds == -1.0 && PyErr_Occurred())
            return -1;
        if (seconds < 0)
            return 0;
    }
    return deadline_of(timeout);
}

int drive(SyncObject *self, trying try, void *context, struct attempt *attempt, int64_t deadline, bool stubborn)
{
    struct naps naps;
    int64_t give_in = 0;
    for (;;) {
        attempt->once = deadline == 0;
        enum verdict verdict = try(self, context, attempt, &naps);
        attempt->slept = false;
        if (verdict != WAIT || (deadline == 0 && !attempt->at_monitor))
            return verdict;
        if (deadline == 0 && give_in == 0)
            give_in = clock_ns() + MONITOR_NS;
        int error;
        Py_BEGIN_ALLOW_THREADS
        error = nap(self_here(), &naps, deadline ? deadline : give_in, NULL);
        Py_END_ALLOW_THREADS
        attempt->slept = error == 0;
        if (error == EINTR && !stubborn && PyErr_CheckSignals() < 0)
            return -1;
        if (error == ETIMEDOUT && deadline == 0)
            return WAIT;
        if (error == ETIMEDOUT)
            deadline = 0; /* what came at the last moment still counts */
    }
}

int insist(SyncObject *self, trying try, void *context, struct attempt *attempt)
{
    attempt->slept = false;
    return drive(self, try, context, attempt, NO_DEADLINE, true);
}

PyObject *sync_owner(struct robust_word *word)
{
    for (int tries = 0; tries < 1000; tries++) {
        uint32_t tid = atomic_load_explicit(&word->word, memory_order_acquire) & OWNER_MASK;
        if (tid == 0)
            Py_RETURN_NONE;
        uint32_t noted = atomic_load_explicit(&word->tid, memory_order_acquire); /* SYNC POINT: owner record */
        uint32_t pid = atomic_load_explicit(&word->pid, memory_order_relaxed);
        uint64_t since = atomic_load_explicit(&word->since, memory_order_relaxed);
        if (noted == tid && (atomic_load_explicit(&word->word, memory_order_acquire) & OWNER_MASK) == tid)
            return Py_BuildValue("IdI", pid, (double)since * 1e-9, tid);
        usleep(tries < 100 ? 0 : 50); /* it has taken the word this moment */
    }
    Py_RETURN_NONE;
}

PyObject *sync_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"fd", "kind", "fail", "take", NULL};
    int fd, kind, take = 0;
    PyObject *fail;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "iiO|p", names, &fd, &kind, &fail, &take))
        return NULL;
    const char *wrong = NULL;
    struct mapping *map = mapping_of(fd, &wrong);
    if (map && (wrong = sync_check(map->o, map->size, (uint32_t)kind)) != NULL)
        mapping_drop(map);
    if (wrong) {
        PyErr_SetString(PyExc_ValueError, wrong);
        return NULL;
    }
    if (!map)
        return PyErr_SetFromErrno(PyExc_OSError);
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    SyncObject *self = (SyncObject *)allocate(type, 0);
    if (!self) {
        mapping_drop(map);
        return NULL;
    }
    self->o = map->o;
    self->map = map;
    self->fd = fd;
    self->fail = Py_NewRef(fail);
    self->take = take;
    self->recursive = map->o->header.kind == SYNC_RLOCK || map->o->header.kind == SYNC_CONDITION;
    return (PyObject *)self;
}

int sync_traverse(PyObject *object, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(((SyncObject *)object)->fail);
    return 0;
}

int sync_clear(PyObject *object)
{
    Py_CLEAR(((SyncObject *)object)->fail);
    return 0;
}

void sync_dealloc(PyObject *object)
{
    SyncObject *self = (SyncObject *)object;
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    if (self->map)
        mapping_part(self->map, self->fd);
    sync_clear(object);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(object);
    Py_DECREF(type);
}

PyMemberDef sync_members[] = {
    {"_fd", T_INT, offsetof(SyncObject, fd), READONLY, NULL},
    {"_inherited", T_BOOL, offsetof(SyncObject, inherited), READONLY, NULL},
    {NULL},
};

/* -- making one ----------------------------------------------------------------------------------------------------- */

static PyObject *core_sync_format(PyObject *module, PyObject *args)
{
    (void)module;
    int fd, kind;
    unsigned value, limit;
    if (!PyArg_ParseTuple(args, "iiII:sync_format", &fd, &kind, &value, &limit))
        return NULL;
    size_t size = sync_bytes((uint32_t)kind);
    if (!size) {
        PyErr_SetString(PyExc_ValueError, "no such kind");
        return NULL;
    }
    /* Allocated now: a page that is missing later would be a SIGBUS in the middle of a lock. */
    int error = posix_fallocate(fd, 0, (off_t)size);
    struct sync_object *o = error ? MAP_FAILED : mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (o == MAP_FAILED) {
        errno = error ? error : errno;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    sync_format(o, (uint32_t)kind, value, limit);
    if (getrandom(&o->header.id, sizeof o->header.id, 0) != sizeof o->header.id)
        o->header.id = 0; /* then only its inode tells it from others */
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    o->header.made = (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
    munmap(o, size);
    Py_RETURN_NONE;
}

static PyObject *core_sync_supported(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    return PyBool_FromLong(self_here() != NULL);
}

static PyMethodDef functions[] = {
    {"sync_format", core_sync_format, METH_VARARGS, NULL},
    {"sync_supported", core_sync_supported, METH_NOARGS, NULL},
    {NULL},
};

int add_sync_types(PyObject *module)
{
    if (add_mutex_type(module) < 0 || add_crowd_type(module) < 0 || add_attempt_type(module) < 0)
        return -1;
    return PyModule_AddFunctions(module, functions);
}
