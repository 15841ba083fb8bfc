/* py_crowd.c — semaphores, readers and writers, conditions, barriers and events for Python; see py_sync.h. */
#include "py_sync.h"

static enum verdict try_enter(SyncObject *self, void *role, struct attempt *attempt, struct naps *naps)
{
    return crowd_enter(self->o, *(enum role *)role, attempt, naps);
}

static enum verdict try_give_up(SyncObject *self, void *role, struct attempt *attempt, struct naps *naps)
{
    return crowd_give_up(self->o, *(enum role *)role, attempt, naps);
}

struct leaving {
    enum role role;
    int32_t slot;
    bool abandon;
};

static enum verdict try_leave(SyncObject *self, void *context, struct attempt *attempt, struct naps *naps)
{
    struct leaving *l = context;
    return crowd_leave(self->o, l->role, l->slot, l->abandon, attempt, naps);
}

struct order {
    enum { POST, NOTIFY, OPEN, BREAK, RESET } what;
    uint32_t count;
};

static enum verdict try_order(SyncObject *self, void *context, struct attempt *attempt, struct naps *naps)
{
    struct order *order = context;
    switch (order->what) {
    case POST:
        return semaphore_post(self->o, order->count, attempt, naps);
    case NOTIFY:
        return condition_notify(self->o, order->count, attempt, naps);
    case OPEN:
        return barrier_open(self->o, attempt, naps);
    default:
        return barrier_break(self->o, order->what == RESET, attempt, naps);
    }
}

/* A tuple (verdict, slot + 1, how many were there before); NULL with an exception set. */
static PyObject *came_in(SyncObject *self, int verdict, struct attempt *attempt, const char *operation)
{
    if (verdict == DONE || verdict == INHERITED || verdict == WAIT)
        return Py_BuildValue("iiI", verdict, attempt->slot, attempt->seen);
    return sync_fail(self, verdict, operation);
}

/* Patience is over, or a signal handler raised: out, unless we were let in this moment. */
static PyObject *back_out(SyncObject *self, enum role role, struct attempt *attempt, int verdict, const char *operation)
{
    int end = insist(self, try_give_up, &role, attempt);
    if (verdict == WAIT)
        return came_in(self, end == DONE ? DONE : WAIT, attempt, operation);
    if (end == DONE && attempt->slot > 0) {
        struct leaving leaving = {role, attempt->slot - 1, false};
        insist(self, try_leave, &leaving, attempt);
    } else if (end == DONE && role == ROLE_UNIT)
        insist(self, try_order, &(struct order){POST, 1}, &(struct attempt){0});
    return NULL;
}

PyDoc_STRVAR(enter_doc, "enter(role, operation, block=True, timeout=None)\n--\n\n(verdict, slot + 1, how many were there before)");

static PyObject *crowd_enter_(PyObject *object, PyObject *args)
{
    SyncObject *self = (SyncObject *)object;
    int which;
    const char *operation;
    PyObject *block = NULL, *timeout = NULL;
    if (!PyArg_ParseTuple(args, "is|OO", &which, &operation, &block, &timeout))
        return NULL;
    int64_t deadline = deadline_for(block, timeout);
    if (deadline == -1)
        return NULL;
    enum role role = (enum role)which;
    struct attempt attempt = {0};
    int verdict = drive(self, try_enter, &role, &attempt, deadline, false);
    return verdict == WAIT || verdict == -1 ? back_out(self, role, &attempt, verdict, operation)
                                            : came_in(self, verdict, &attempt, operation);
}

PyDoc_STRVAR(leave_doc, "leave(role, operation, slot=0, abandon=False)\n--\n\nSlot 0: any of this thread's.");

static PyObject *crowd_leave_(PyObject *object, PyObject *args)
{
    SyncObject *self = (SyncObject *)object;
    int role, slot = 0, abandon = 0;
    const char *operation;
    if (!PyArg_ParseTuple(args, "is|ip", &role, &operation, &slot, &abandon))
        return NULL;
    struct leaving leaving = {(enum role)role, slot - 1, abandon};
    struct attempt attempt = {0};
    int verdict = insist(self, try_leave, &leaving, &attempt);
    if (verdict == DONE)
        Py_RETURN_NONE;
    return sync_fail(self, verdict, operation);
}

static PyObject *give_order(PyObject *object, struct order order, int slot, const char *operation)
{
    SyncObject *self = (SyncObject *)object;
    struct attempt attempt = {.slot = slot};
    int verdict = insist(self, try_order, &order, &attempt);
    if (verdict == DONE)
        Py_RETURN_NONE;
    return sync_fail(self, verdict, operation);
}

static PyObject *crowd_post(PyObject *object, PyObject *count)
{
    long many = PyLong_AsLong(count);
    if (many == -1 && PyErr_Occurred())
        return NULL;
    if (many < 1 || many > INT32_MAX)
        return sync_fail((SyncObject *)object, OVER, "release");
    return give_order(object, (struct order){POST, (uint32_t)many}, 0, "release");
}

static PyObject *crowd_notify(PyObject *object, PyObject *count)
{
    long long many = PyLong_AsLongLong(count);
    if (many == -1 && PyErr_Occurred())
        return NULL;
    return give_order(object, (struct order){NOTIFY, many > UINT32_MAX ? UINT32_MAX : (uint32_t)many}, 0, "notify");
}

static PyObject *crowd_open(PyObject *object, PyObject *slot)
{
    long which = PyLong_AsLong(slot);
    if (which < 1 || which > SYNC_SLOTS)
        return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_ValueError, "no slot");
    return give_order(object, (struct order){OPEN, 0}, (int)which, "wait");
}

static PyObject *crowd_break(PyObject *object, PyObject *slot)
{
    long which = PyLong_AsLong(slot);
    return which == -1 && PyErr_Occurred() ? NULL : give_order(object, (struct order){BREAK, 0}, (int)which, "abort");
}

static PyObject *crowd_reset(PyObject *object, PyObject *unused)
{
    (void)unused;
    return give_order(object, (struct order){RESET, 0}, 0, "reset");
}

static PyObject *crowd_count_(PyObject *object, PyObject *args)
{
    int role, waiting;
    if (!PyArg_ParseTuple(args, "ip", &role, &waiting))
        return NULL;
    return PyLong_FromUnsignedLong(crowd_count(((SyncObject *)object)->o, (enum role)role, waiting));
}

static PyObject *crowd_is_mine(PyObject *object, PyObject *role)
{
    long which = PyLong_AsLong(role);
    return which == -1 && PyErr_Occurred() ? NULL : PyBool_FromLong(crowd_mine(((SyncObject *)object)->o, (enum role)which));
}

static PyObject *crowd_value(PyObject *object, PyObject *unused)
{
    (void)unused;
    return PyLong_FromUnsignedLong(semaphore_value(((SyncObject *)object)->o));
}

static PyObject *crowd_flags_(PyObject *object, PyObject *unused)
{
    (void)unused;
    struct sync_object *o = ((SyncObject *)object)->o;
    return Py_BuildValue("II", crowd_flags(o), atomic_load(&o->crowd.limit));
}

/* ((slot + 1, role, waits, (pid, since, tid)), ...) */
static PyObject *crowd_people(PyObject *object, PyObject *unused)
{
    (void)unused;
    struct sync_object *o = ((SyncObject *)object)->o;
    PyObject *list = PyList_New(0);
    uint32_t high = atomic_load(&o->crowd.high);
    for (uint32_t i = 0; list && i < high && i < SYNC_SLOTS; i++) {
        struct slot *s = &o->slots[i];
        bool waits = atomic_load(&s->own.more) == NOBODY;
        PyObject *owner = sync_owner(&s->own);
        PyObject *one = owner && owner != Py_None
                            ? Py_BuildValue("IINO", i + 1, atomic_load(&s->role), PyBool_FromLong(waits), owner)
                            : NULL;
        Py_XDECREF(owner);
        if (PyErr_Occurred() || (one && PyList_Append(list, one) < 0))
            Py_CLEAR(list);
        Py_XDECREF(one);
    }
    return list;
}

static PyObject *crowd_attempt(PyObject *object, PyObject *args)
{
    int role;
    PyObject *lock = NULL;
    return PyArg_ParseTuple(args, "i|O", &role, &lock) ? attempt_new((SyncObject *)object, CLAIM_PLAIN, role, lock) : NULL;
}

/* -- events --------------------------------------------------------------------------------------------------------- */

static enum verdict try_event(SyncObject *self, void *context, struct attempt *attempt, struct naps *naps)
{
    (void)context;
    return event_try(self->o, attempt, naps);
}

static PyObject *sync_event_wait(PyObject *object, PyObject *timeout)
{
    SyncObject *self = (SyncObject *)object;
    int64_t deadline = deadline_for(NULL, timeout);
    if (deadline == -1)
        return NULL;
    struct attempt attempt = {0};
    int verdict = drive(self, try_event, NULL, &attempt, deadline, false);
    nap_forget(self_here());
    if (verdict == -1)
        return NULL;
    return verdict == DONE || verdict == WAIT ? PyBool_FromLong(verdict == DONE) : sync_fail(self, verdict, "wait");
}

static PyObject *sync_event_set(PyObject *object, PyObject *unused)
{
    (void)unused;
    SyncObject *self = (SyncObject *)object;
    if (!self_here())
        return sync_fail(self, NO_KERNEL, "set");
    event_set(self->o);
    Py_RETURN_NONE;
}

static PyObject *sync_event_clear(PyObject *object, PyObject *unused)
{
    (void)unused;
    event_clear(((SyncObject *)object)->o);
    Py_RETURN_NONE;
}

static PyObject *sync_event_is_set(PyObject *object, PyObject *unused)
{
    (void)unused;
    return PyBool_FromLong(atomic_load_explicit(&((SyncObject *)object)->o->crowd.event, memory_order_acquire) == 0);
}

static PyMethodDef crowd_methods[] = {
    {"_enter", crowd_enter_, METH_VARARGS, enter_doc},
    {"_wait", condition_wait, METH_VARARGS, condition_wait_doc},
    {"_leave", crowd_leave_, METH_VARARGS, leave_doc},
    {"_post", crowd_post, METH_O, NULL},
    {"_notify", crowd_notify, METH_O, NULL},
    {"_open", crowd_open, METH_O, NULL},
    {"_break", crowd_break, METH_O, NULL},
    {"_reset", crowd_reset, METH_NOARGS, NULL},
    {"_count", crowd_count_, METH_VARARGS, NULL},
    {"_is_mine", crowd_is_mine, METH_O, NULL},
    {"_value", crowd_value, METH_NOARGS, NULL},
    {"_flags", crowd_flags_, METH_NOARGS, NULL},
    {"_people", crowd_people, METH_NOARGS, NULL},
    {"_attempt", crowd_attempt, METH_VARARGS, NULL},
    {"_event_wait", sync_event_wait, METH_O, NULL},
    {"_event_set", sync_event_set, METH_NOARGS, NULL},
    {"_event_clear", sync_event_clear, METH_NOARGS, NULL},
    {"_event_is_set", sync_event_is_set, METH_NOARGS, NULL},
    {NULL},
};

static PyType_Slot crowd_slots[] = {
    {Py_tp_doc, "What several may be in at once, or wait for together, in memory that processes share."},
    {Py_tp_new, sync_new},
    {Py_tp_dealloc, sync_dealloc},
    {Py_tp_traverse, sync_traverse},
    {Py_tp_clear, sync_clear},
    {Py_tp_methods, crowd_methods},
    {Py_tp_members, sync_members},
    {0, NULL},
};

static PyType_Spec crowd_spec = {
    .name = "ipckit._native.Crowd",
    .basicsize = sizeof(SyncObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_BASETYPE,
    .slots = crowd_slots,
};

int add_crowd_type(PyObject *module)
{
    PyObject *type = PyType_FromModuleAndSpec(module, &crowd_spec, NULL);
    int failed = type ? PyModule_AddObjectRef(module, "Crowd", type) : -1;
    Py_XDECREF(type);
    return failed;
}
