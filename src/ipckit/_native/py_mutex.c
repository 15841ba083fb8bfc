/* py_mutex.c — Lock and RLock for Python, and what a Condition needs of them; see py_sync.h. */
#include "py_sync.h"

#include <string.h>

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

/* For a task that waits for a Condition: let go of all levels at once. It counts them itself. */
static PyObject *mutex_release_all(PyObject *object, PyObject *unused)
{
    (void)unused;
    SyncObject *self = (SyncObject *)object;
    int verdict = mutex_release(&self->o->mutex, false);
    return verdict == DONE ? Py_NewRef(Py_None) : sync_fail(self, verdict, "wait");
}

int mutex_take_back(SyncObject *lock, uint32_t depth)
{
    struct attempt attempt = {.claim = lock->take ? CLAIM_TAKE : CLAIM_PLAIN};
    bool endless = true;
    /* Stubborn: the caller's `with` will release it, so it must be held, or an exception say that it is not. */
    int verdict = drive(lock, try_mutex, &endless, &attempt, NO_DEADLINE, true);
    if (verdict != DONE && verdict != INHERITED) {
        sync_fail(lock, verdict, "wait");
        return -1;
    }
    lock->o->mutex.depth = depth;
    lock->inherited = verdict == INHERITED;
    return 0;
}

static PyObject *mutex_attempt(PyObject *object, PyObject *claim)
{
    long which = PyLong_AsLong(claim);
    if (which == -1 && PyErr_Occurred())
        return NULL;
    SyncObject *self = (SyncObject *)object;
    return attempt_new(self, which == CLAIM_PLAIN && self->take ? CLAIM_TAKE : (enum claim)which, 0, NULL);
}

PyDoc_STRVAR(acquire_doc, "acquire($self, /, block=True, timeout=None)\n--\n\n"
                          "Whether it got it within `timeout` seconds. Raises OwnerDied, without it; Deadlock; ResourceLimit.");
PyDoc_STRVAR(release_doc, "release($self, /)\n--\n\nLet go of it. Raises NotOwner unless this thread holds it.");
PyDoc_STRVAR(enter_doc, "__enter__($self, /)\n--\n\nacquire(), and the lock itself.");
PyDoc_STRVAR(exit_doc, "__exit__($self, /, *args)\n--\n\nrelease().");

static PyMethodDef mutex_methods[] = {
    {"acquire", (PyCFunction)(void (*)(void))mutex_acquire, METH_FASTCALL | METH_KEYWORDS, acquire_doc},
    {"release", mutex_unlock, METH_NOARGS, release_doc},
    {"__enter__", mutex_enter, METH_NOARGS, enter_doc},
    {"__exit__", (PyCFunction)(void (*)(void))mutex_exit, METH_FASTCALL, exit_doc},
    {"_recover", mutex_recover, METH_O, NULL},
    {"_abandon", mutex_abandon, METH_NOARGS, NULL},
    {"_owner", mutex_holder, METH_NOARGS, NULL},
    {"_is_owned", mutex_is_mine, METH_NOARGS, NULL},
    {"_word", mutex_state, METH_NOARGS, NULL},
    {"_watch", mutex_watch_, METH_NOARGS, NULL},
    {"_release_all", mutex_release_all, METH_NOARGS, NULL},
    {"_attempt", mutex_attempt, METH_O, NULL},
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
    {NULL},
};

int add_mutex_type(PyObject *module)
{
    Py_CLEAR(mutex_type);
    mutex_type = PyType_FromModuleAndSpec(module, &mutex_spec, NULL);
    if (!mutex_type || PyModule_AddObjectRef(module, "Mutex", mutex_type) < 0)
        return -1;
    return PyModule_AddFunctions(module, functions);
}
