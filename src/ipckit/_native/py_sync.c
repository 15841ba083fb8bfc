/* py_sync.c — locks and crowds for Python; see py_sync.h. */
#include "py_sync.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
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
    struct stat found;
    if (fstat(fd, &found) != 0)
        return PyErr_SetFromErrno(PyExc_OSError);
    size_t size = found.st_size >= SYNC_SMALL && found.st_size <= SYNC_LARGE ? (size_t)found.st_size : 0;
    struct sync_object *o = NULL;
    if (size) {
        o = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (o == MAP_FAILED)
            return PyErr_SetFromErrno(PyExc_OSError);
    }
    const char *wrong = size ? sync_check(o, size, (uint32_t)kind) : "this is no synchronisation object";
    if (wrong) {
        PyErr_SetString(PyExc_ValueError, wrong);
        if (size)
            munmap(o, size);
        return NULL;
    }
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    struct mapping *map = malloc(sizeof *map);
    SyncObject *self = map ? (SyncObject *)allocate(type, 0) : NULL;
    if (!self) {
        free(map);
        munmap(o, size);
        return PyErr_Occurred() ? NULL : PyErr_NoMemory();
    }
    *map = (struct mapping){1, o, size};
    self->o = o;
    self->map = map;
    self->fd = fd;
    self->fail = Py_NewRef(fail);
    self->take = take;
    self->recursive = o->header.kind == SYNC_RLOCK || o->header.kind == SYNC_CONDITION;
    return (PyObject *)self;
}

void mapping_drop(struct mapping *map)
{
    if (map && atomic_fetch_sub_explicit(&map->users, 1, memory_order_acq_rel) == 1) {
        munmap(map->o, map->size);
        free(map);
    }
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

static bool ours(struct robust_word *word)
{
    return (atomic_load_explicit(&word->word, memory_order_relaxed) & OWNER_MASK) &&
           atomic_load_explicit(&word->pid, memory_order_relaxed) == (uint32_t)getpid();
}

/* A thread of this process owns a word in it, so the kernel will come to read it when the thread ends. */
static bool in_use(struct sync_object *o, size_t size)
{
    if (ours(&o->mutex.own)) /* a witness has the same owner, and monitors are free between calls */
        return true;
    uint32_t slots = size == SYNC_LARGE ? atomic_load_explicit(&o->crowd.high, memory_order_relaxed) : 0;
    for (uint32_t i = 0; i < slots && i < SYNC_SLOTS; i++)
        if (ours(&o->slots[i].own))
            return true;
    return false;
}

void sync_dealloc(PyObject *object)
{
    SyncObject *self = (SyncObject *)object;
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    if (self->o && !in_use(self->o, self->map->size))
        mapping_drop(self->map);
    if (self->o)
        close(self->fd);
    sync_clear(object);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(object);
    Py_DECREF(type);
}

/* -- the mutex ------------------------------------------------------------------------------------------------------ */

static PyObject *mutex_type; /* abi3 modules have no state that a function without a module could reach */

static enum verdict try_mutex(SyncObject *self, void *endless, struct attempt *attempt, struct naps *naps)
{
    struct mutex *m = &self->o->mutex;
    if (attempt->once)
        naps = NULL;
    enum verdict verdict = mutex_try(m, attempt, naps);
    if (verdict != SELF || (naps && *(bool *)endless))
        return verdict;
    if (naps) { /* to the end of its patience, as it asked for */
        uint32_t word = atomic_load_explicit(&m->own.word, memory_order_relaxed);
        *naps = (struct naps){.count = 1, .at[0] = {&m->own.word, word, QUIET}};
    }
    return WAIT;
}

/* True: got. False: not in time. -1: exception. */
static int acquire(SyncObject *self, enum claim claim, int64_t deadline, const char *operation)
{
    struct mutex *m = &self->o->mutex;
    if (self->recursive && mutex_mine(m)) {
        m->depth++;
        return true;
    }
    struct attempt attempt = {.claim = claim == CLAIM_PLAIN && self->take ? CLAIM_TAKE : claim};
    bool endless = deadline == NO_DEADLINE;
    int verdict = drive(self, try_mutex, &endless, &attempt, deadline, false);
    if (verdict == DONE || verdict == INHERITED) {
        m->depth = 0;
        self->inherited = verdict == INHERITED;
        return true;
    }
    if (verdict == WAIT || verdict == -1)
        mutex_give_up(m, &attempt);
    if (verdict == WAIT)
        return false;
    if (verdict != -1)
        sync_fail(self, verdict, operation);
    return -1;
}

static inline bool acquired_free(SyncObject *self)
{
    if (!mutex_try_free(&self->o->mutex))
        return false;
    self->o->mutex.depth = 0;
    self->inherited = false;
    return true;
}

static PyObject *mutex_acquire(PyObject *object, PyObject *const *args, Py_ssize_t count, PyObject *keywords)
{
    static const char *const names[] = {"block", "timeout", NULL};
    SyncObject *self = (SyncObject *)object;
    int64_t deadline = NO_DEADLINE;
    if (count || keywords) {
        PyObject *found[2];
        if (read_arguments("acquire", names, 0, args, count, keywords, found) < 0 ||
            (deadline = deadline_for(found[0], found[1])) == -1)
            return NULL;
    }
    if (acquired_free(self))
        Py_RETURN_TRUE;
    int got = acquire(self, CLAIM_PLAIN, deadline, "acquire");
    return got < 0 ? NULL : PyBool_FromLong(got);
}

static PyObject *mutex_enter(PyObject *object, PyObject *unused)
{
    (void)unused;
    SyncObject *self = (SyncObject *)object;
    if (!acquired_free(self) && acquire(self, CLAIM_PLAIN, NO_DEADLINE, "acquire") < 0)
        return NULL;
    return Py_NewRef(object);
}

static int release(SyncObject *self, bool abandon)
{
    struct mutex *m = &self->o->mutex;
    if (self->recursive && m->depth && mutex_mine(m)) {
        m->depth--;
        return DONE;
    }
    return mutex_release(m, abandon);
}

static PyObject *released(SyncObject *self, int verdict)
{
    if (verdict == DONE)
        Py_RETURN_NONE;
    return sync_fail(self, verdict, "release");
}

static PyObject *mutex_unlock(PyObject *object, PyObject *unused)
{
    (void)unused;
    return released((SyncObject *)object, release((SyncObject *)object, false));
}

/* An exception that leaves the block when the lock is not held any more (wait() lost it to a dead owner) says more than NotOwner. */
static PyObject *mutex_exit(PyObject *object, PyObject *const *args, Py_ssize_t count)
{
    SyncObject *self = (SyncObject *)object;
    int verdict = release(self, false);
    if (verdict == NOT_MINE && count > 0 && args[0] != Py_None)
        Py_RETURN_NONE;
    return released(self, verdict);
}

static PyObject *mutex_recover(PyObject *object, PyObject *timeout)
{
    SyncObject *self = (SyncObject *)object;
    int64_t deadline = deadline_for(NULL, timeout);
    if (deadline == -1)
        return NULL;
    int got = acquire(self, CLAIM_RECOVER, deadline, "recover");
    return got < 0 ? NULL : PyBool_FromLong(got);
}

static PyObject *mutex_abandon(PyObject *object, PyObject *unused)
{
    (void)unused;
    SyncObject *self = (SyncObject *)object;
    return released(self, mutex_release(&self->o->mutex, true));
}

static PyObject *mutex_holder(PyObject *object, PyObject *unused)
{
    (void)unused;
    return sync_owner(&((SyncObject *)object)->o->mutex.own);
}

static PyObject *mutex_watch_(PyObject *object, PyObject *unused)
{
    (void)unused;
    mutex_watch(&((SyncObject *)object)->o->mutex);
    Py_RETURN_NONE;
}

static PyObject *mutex_is_mine(PyObject *object, PyObject *unused)
{
    (void)unused;
    return PyBool_FromLong(mutex_mine(&((SyncObject *)object)->o->mutex));
}

static PyObject *mutex_state(PyObject *object, PyObject *unused)
{
    (void)unused;
    return PyLong_FromUnsignedLong(atomic_load_explicit(&((SyncObject *)object)->o->mutex.own.word, memory_order_acquire));
}

/* For Condition.wait: let go of all levels at once, and come back to as many. */
static PyObject *mutex_release_save(PyObject *object, PyObject *unused)
{
    (void)unused;
    SyncObject *self = (SyncObject *)object;
    unsigned long depth = mutex_mine(&self->o->mutex) ? self->o->mutex.depth : 0;
    int verdict = mutex_release(&self->o->mutex, false);
    return verdict == DONE ? PyLong_FromUnsignedLong(depth) : sync_fail(self, verdict, "wait");
}

static PyObject *mutex_acquire_restore(PyObject *object, PyObject *saved)
{
    SyncObject *self = (SyncObject *)object;
    unsigned long depth = PyLong_AsUnsignedLong(saved);
    if (depth == (unsigned long)-1 && PyErr_Occurred())
        return NULL;
    struct attempt attempt = {.claim = self->take ? CLAIM_TAKE : CLAIM_PLAIN};
    bool endless = true;
    /* Stubborn: the caller's `with` will release it, so it must be held, or an exception say that it is not. */
    int verdict = drive(self, try_mutex, &endless, &attempt, NO_DEADLINE, true);
    if (verdict != DONE && verdict != INHERITED)
        return sync_fail(self, verdict, "wait");
    self->o->mutex.depth = (uint32_t)depth;
    self->inherited = verdict == INHERITED;
    Py_RETURN_NONE;
}

static PyObject *mutex_attempt(PyObject *object, PyObject *claim)
{
    long which = PyLong_AsLong(claim);
    if (which == -1 && PyErr_Occurred())
        return NULL;
    SyncObject *self = (SyncObject *)object;
    return attempt_new(self, which == CLAIM_PLAIN && self->take ? CLAIM_TAKE : (enum claim)which, 0, NULL);
}

static PyMethodDef mutex_methods[] = {
    {"acquire", (PyCFunction)(void (*)(void))mutex_acquire, METH_FASTCALL | METH_KEYWORDS, NULL},
    {"release", mutex_unlock, METH_NOARGS, NULL},
    {"__enter__", mutex_enter, METH_NOARGS, NULL},
    {"__exit__", (PyCFunction)(void (*)(void))mutex_exit, METH_FASTCALL, NULL},
    {"_recover", mutex_recover, METH_O, NULL},
    {"_abandon", mutex_abandon, METH_NOARGS, NULL},
    {"_owner", mutex_holder, METH_NOARGS, NULL},
    {"_is_owned", mutex_is_mine, METH_NOARGS, NULL},
    {"_word", mutex_state, METH_NOARGS, NULL},
    {"_watch", mutex_watch_, METH_NOARGS, NULL},
    {"_release_save", mutex_release_save, METH_NOARGS, NULL},
    {"_acquire_restore", mutex_acquire_restore, METH_O, NULL},
    {"_attempt", mutex_attempt, METH_O, NULL},
    {NULL},
};

PyMemberDef sync_members[] = {
    {"_fd", T_INT, offsetof(SyncObject, fd), READONLY, NULL},
    {"_inherited", T_BOOL, offsetof(SyncObject, inherited), READONLY, NULL},
    {NULL},
};

struct mutex *mutex_to_watch(PyObject *object, bool *wrong)
{
    *wrong = false;
    if (object == NULL || object == Py_None)
        return NULL;
    PyTypeObject *type = (PyTypeObject *)mutex_type;
    *wrong = !PyObject_TypeCheck(object, type);
    if (*wrong)
        PyErr_SetString(PyExc_TypeError, "a Lock or RLock of ipckit, please");
    return *wrong || ((SyncObject *)object)->take ? NULL : &((SyncObject *)object)->o->mutex;
}

static PyType_Slot mutex_slots[] = {
    {Py_tp_doc, "A robust mutex in memory that processes share."},
    {Py_tp_new, sync_new},
    {Py_tp_dealloc, sync_dealloc},
    {Py_tp_traverse, sync_traverse},
    {Py_tp_clear, sync_clear},
    {Py_tp_methods, mutex_methods},
    {Py_tp_members, sync_members},
    {0, NULL},
};

static PyType_Spec mutex_spec = {
    .name = "ipckit._native.Mutex",
    .basicsize = sizeof(SyncObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_BASETYPE,
    .slots = mutex_slots,
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
    munmap(o, size);
    Py_RETURN_NONE;
}

static PyObject *core_sync_supported(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    return PyBool_FromLong(self_here() != NULL);
}

/* CPython's interpreter calls a C method without detours only where the object is exactly of the type that the method was made for: a
 * subclass pays 20 ns a call. So each class has methods of its own; what a subclass of its own overrides, it has put there itself. */
static PyObject *core_own_methods(PyObject *module, PyObject *type)
{
    (void)module;
    static const char *const hot[] = {"acquire", "release", "__enter__", "__exit__", NULL};
    if (!PyType_Check(type))
        return PyErr_Format(PyExc_TypeError, "a class, please");
    for (const char *const *name = hot; *name; name++) {
        PyObject *found = PyObject_GetAttrString(type, *name);
        bool native = found && Py_TYPE(found) == &PyMethodDescr_Type;
        Py_XDECREF(found);
        if (!found)
            return NULL;
        PyMethodDef *method = mutex_methods;
        while (strcmp(method->ml_name, *name) != 0)
            method++;
        PyObject *own = native ? PyDescr_NewMethod((PyTypeObject *)type, method) : NULL;
        if (native && (!own || PyObject_SetAttrString(type, *name, own) < 0)) {
            Py_XDECREF(own);
            return NULL;
        }
        Py_XDECREF(own);
    }
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"own_methods", core_own_methods, METH_O, NULL},
    {"sync_format", core_sync_format, METH_VARARGS, NULL},
    {"sync_supported", core_sync_supported, METH_NOARGS, NULL},
    {NULL},
};

int add_sync_types(PyObject *module)
{
    Py_CLEAR(mutex_type);
    mutex_type = PyType_FromModuleAndSpec(module, &mutex_spec, NULL);
    if (!mutex_type || PyModule_AddObjectRef(module, "Mutex", mutex_type) < 0)
        return -1;
    return add_crowd_type(module) < 0 || add_attempt_type(module) < 0 ? -1 : PyModule_AddFunctions(module, functions);
}
