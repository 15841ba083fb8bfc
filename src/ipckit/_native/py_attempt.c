/* py_attempt.c — one way in for a task: it tries on the event loop's thread, and a thread of the core sleeps for it.
 *
 * poll() tries; where it must wait, arm(fd) has a sleeper watch the words and write to the eventfd once it is worth trying again.
 * The sleeper stays responsible for the wake-up it got (lock.h: pending) until the next poll() has tried or the attempt is over, so a kill
 * in between passes it on. Sleepers are plain threads without Python, kept for the next who needs one. */
#include "py_sync.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#define IDLE_SLEEPERS 8
#define STACK_BYTES (128 * 1024)

struct sleeper {
    struct sleeper *next_idle;
    struct naps naps;
    struct mapping *kept[2];  /* where the naps' words are */
    int bell;                 /* eventfd; a copy of ours, so the caller may close its own */
    _Atomic uint32_t over;    /* 0: sleep; 1: nobody waits for it any more */
    _Atomic uint32_t work;    /* counts what it was given */
    uint32_t done;
};

static pthread_mutex_t idle_lock = PTHREAD_MUTEX_INITIALIZER;
static struct sleeper *idle;
static unsigned idle_count, idle_forks;

static void own_wait(_Atomic uint32_t *word, uint32_t seen)
{
    while (atomic_load_explicit(word, memory_order_acquire) == seen)
        syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
}

static void own_set(_Atomic uint32_t *word, uint32_t value)
{
    atomic_store_explicit(word, value, memory_order_release); /* SYNC POINT: sleeper */
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}

static bool park(struct sleeper *s)
{
    pthread_mutex_lock(&idle_lock);
    bool keep = idle_count < IDLE_SLEEPERS;
    if (keep) {
        s->next_idle = idle;
        idle = s;
        idle_count++;
    }
    pthread_mutex_unlock(&idle_lock);
    return keep;
}

static void *sleeper_main(void *argument)
{
    struct sleeper *s = argument;
    struct self *me = self_here();
    do {
        own_wait(&s->work, s->done); /* SYNC POINT: sleeper */
        s->done = atomic_load_explicit(&s->work, memory_order_acquire);
        int error = EINTR;
        while (error == EINTR && !atomic_load_explicit(&s->over, memory_order_acquire))
            error = nap(me, &s->naps, INT64_MAX, &s->over);
        uint64_t one = 1;
        if (!atomic_load_explicit(&s->over, memory_order_acquire))
            while (write(s->bell, &one, sizeof one) < 0 && errno == EINTR)
                ;
        own_wait(&s->over, 0);
        nap_forget(me);
        mapping_drop(s->kept[0]);
        mapping_drop(s->kept[1]);
        close(s->bell);
    } while (park(s));
    free(s);
    return NULL;
}

static struct sleeper *sleeper_get(void)
{
    struct sleeper *s = NULL;
    if (idle_forks != fork_generation) { /* the threads are the parent's; so may be the lock */
        idle_lock = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
        idle = NULL;
        idle_count = 0;
        idle_forks = fork_generation;
    }
    pthread_mutex_lock(&idle_lock);
    if (idle) {
        s = idle;
        idle = s->next_idle;
        idle_count--;
    }
    pthread_mutex_unlock(&idle_lock);
    if (s)
        return s;
    s = calloc(1, sizeof *s);
    if (!s)
        return NULL;
    sigset_t all, before;
    sigfillset(&all);
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are for threads that run Python */
    pthread_t thread;
    int error = pthread_create(&thread, &attributes, sleeper_main, s);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    if (error) {
        free(s);
        errno = error;
        return NULL;
    }
    return s;
}

struct sleeper *sleeper_watch(const struct naps *naps, int bell, struct mapping *first, struct mapping *second)
{
    int own = fcntl(bell, F_DUPFD_CLOEXEC, 0);
    struct sleeper *s = own < 0 ? NULL : sleeper_get();
    if (!s) {
        if (own >= 0)
            close(own);
        return NULL;
    }
    s->naps = *naps;
    s->kept[0] = mapping_keep(first);
    s->kept[1] = mapping_keep(second);
    s->bell = own;
    atomic_store_explicit(&s->over, 0, memory_order_relaxed);
    own_set(&s->work, s->done + 1);
    return s;
}

void sleeper_dismiss(struct sleeper *s, unsigned forks)
{
    if (forks == fork_generation)
        own_set(&s->over, 1);
}

/* -- the Python object ---------------------------------------------------------------------------------------------- */

typedef struct {
    PyObject_HEAD
    SyncObject *sync;
    PyObject *lock; /* whose mutex attempt.lock is */
    int role; /* 0: the mutex; -1: the event */
    struct attempt attempt;
    struct naps naps;
    struct sleeper *sleeper;
    int verdict; /* of the last poll */
    unsigned forks;
    uint32_t tid; /* of the thread that made it */
} Attempt;

static PyObject *the_type; /* abi3 modules have no state that a function without a module could reach */

PyObject *attempt_new(SyncObject *sync, enum claim claim, int role, PyObject *lock)
{
    bool wrong;
    struct mutex *watched = mutex_to_watch(lock, &wrong);
    if (wrong)
        return NULL;
    allocfunc allocate = (allocfunc)PyType_GetSlot((PyTypeObject *)the_type, Py_tp_alloc);
    Attempt *self = (Attempt *)allocate((PyTypeObject *)the_type, 0);
    if (!self)
        return NULL;
    self->sync = (SyncObject *)Py_NewRef((PyObject *)sync);
    self->role = role;
    self->lock = Py_XNewRef(watched ? lock : NULL);
    self->attempt = (struct attempt){.claim = claim, .task = true, .lock = watched};
    self->verdict = WAIT;
    self->forks = fork_generation;
    struct self *me = self_here();
    self->tid = me ? me->tid : 0;
    return (PyObject *)self;
}

static void dismiss(Attempt *self)
{
    struct sleeper *s = self->sleeper;
    self->sleeper = NULL;
    if (s)
        sleeper_dismiss(s, self->forks);
}

static int try_once(Attempt *self, struct naps *naps)
{
    struct sync_object *o = self->sync->o;
    if (self->role == 0) {
        enum verdict verdict = mutex_try(&o->mutex, &self->attempt, self->attempt.once ? NULL : naps);
        if (verdict == DONE || verdict == INHERITED)
            o->mutex.depth = 0;
        return verdict;
    }
    if (self->role < 0)
        return event_try(o, &self->attempt, naps);
    return crowd_enter(o, (enum role)self->role, &self->attempt, naps);
}

PyDoc_STRVAR(poll_doc, "poll()\n--\n\nTry: the verdict if it is over (DONE or INHERITED), else None: arm, and poll again. Raises what fail() makes.");

static PyObject *polled(Attempt *self)
{
    nap_forget(self_here()); /* other tasks run on this thread now: the sleeper answers for the wake-up */
    dismiss(self);
    if (self->verdict == WAIT)
        Py_RETURN_NONE;
    if (self->verdict == DONE || self->verdict == INHERITED)
        return PyLong_FromLong(self->verdict);
    bool waits = self->role == ROLE_PARTY || self->role == ROLE_LISTENER || self->role < 0;
    /* A listener that hears of a death hears of its lock's owner. */
    SyncObject *whose = self->verdict == DIED && self->lock ? (SyncObject *)self->lock : self->sync;
    return sync_fail(whose, self->verdict, waits ? "wait" : "acquire");
}

static PyObject *attempt_arm(PyObject *object, PyObject *fd)
{
    Attempt *self = (Attempt *)object;
    long bell = PyLong_AsLong(fd);
    if (bell == -1 && PyErr_Occurred())
        return NULL;
    if (self->sleeper || self->verdict != WAIT) {
        PyErr_SetString(PyExc_RuntimeError, "arm() follows a poll() that has to wait");
        return NULL;
    }
    struct mapping *lock = self->lock ? ((SyncObject *)self->lock)->map : NULL;
    self->sleeper = sleeper_watch(&self->naps, (int)bell, self->sync->map, lock);
    if (!self->sleeper)
        return PyErr_SetFromErrno(PyExc_OSError);
    Py_RETURN_NONE;
}

static PyObject *attempt_poll(PyObject *object, PyObject *unused)
{
    (void)unused;
    Attempt *self = (Attempt *)object;
    self->attempt.slept = self->sleeper != NULL;
    self->verdict = try_once(self, &self->naps);
    return polled(self);
}

PyDoc_STRVAR(give_up_doc, "give_up()\n--\n\nTrue if it got in at the last moment; False: out; None: the monitor is taken, call again.");

static PyObject *attempt_give_up(PyObject *object, PyObject *unused)
{
    (void)unused;
    Attempt *self = (Attempt *)object;
    struct sync_object *o = self->sync->o;
    int verdict = self->verdict;
    self->attempt.slept |= self->sleeper != NULL;
    if (verdict == WAIT && self->role == 0) {
        verdict = try_once(self, NULL);
        if (verdict == WAIT)
            mutex_give_up(&o->mutex, &self->attempt);
    } else if (verdict == WAIT && self->role < 0)
        verdict = event_try(o, &self->attempt, NULL);
    else if (verdict == WAIT) {
        while ((verdict = crowd_give_up(o, (enum role)self->role, &self->attempt, &self->naps)) == WAIT) {
            Py_BEGIN_ALLOW_THREADS /* some instructions of another process */
            self->attempt.slept = nap(self_here(), &self->naps, NO_DEADLINE, NULL) == 0;
            Py_END_ALLOW_THREADS
        }
    }
    self->verdict = verdict == WAIT ? OUT : verdict;
    nap_forget(self_here());
    dismiss(self);
    return PyBool_FromLong(verdict == DONE || verdict == INHERITED);
}

PyDoc_STRVAR(now_doc, "now()\n--\n\nTry, and be done with it: the verdict, or None: not now; out.");

static PyObject *attempt_now(PyObject *object, PyObject *unused)
{
    (void)unused;
    Attempt *self = (Attempt *)object;
    int64_t give_in = 0;
    int error = 0;
    self->attempt.once = true;
    while ((self->verdict = try_once(self, &self->naps)) == WAIT && self->attempt.at_monitor && error != ETIMEDOUT) {
        give_in = give_in ? give_in : clock_ns() + MONITOR_NS;
        Py_BEGIN_ALLOW_THREADS /* some instructions of another process */
        error = nap(self_here(), &self->naps, give_in, NULL);
        Py_END_ALLOW_THREADS
        self->attempt.slept = error == 0;
    }
    if (self->verdict != WAIT)
        return polled(self);
    PyObject *in = attempt_give_up(object, NULL);
    bool got = in == Py_True;
    Py_XDECREF(in);
    if (got)
        return PyLong_FromLong(DONE);
    Py_RETURN_NONE;
}

static void attempt_dealloc(PyObject *object)
{
    Attempt *self = (Attempt *)object;
    PyTypeObject *type = Py_TYPE(object);
    struct self *me = self_here();
    /* A listener has its slot before it is armed. Only its own thread can take it off its list. */
    bool seated = self->verdict == WAIT && self->attempt.slot > 0 && me && me->tid == self->tid;
    if (self->forks == fork_generation && (self->sleeper || seated))
        Py_XDECREF(attempt_give_up(object, NULL));
    Py_CLEAR(self->sync);
    Py_CLEAR(self->lock);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(object);
    Py_DECREF(type);
}

static PyObject *attempt_slot(PyObject *object, void *unused)
{
    (void)unused;
    return PyLong_FromLong(((Attempt *)object)->attempt.slot);
}

static PyObject *attempt_before(PyObject *object, void *unused)
{
    (void)unused;
    return PyLong_FromUnsignedLong(((Attempt *)object)->attempt.seen);
}

static PyMethodDef methods[] = {
    {"poll", attempt_poll, METH_NOARGS, poll_doc},
    {"now", attempt_now, METH_NOARGS, now_doc},
    {"arm", attempt_arm, METH_O, NULL},
    {"give_up", attempt_give_up, METH_NOARGS, give_up_doc},
    {NULL},
};

static PyGetSetDef getters[] = {
    {"slot", attempt_slot, NULL, NULL, NULL},
    {"before", attempt_before, NULL, NULL, NULL},
    {NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, "One way in for a task."},
    {Py_tp_dealloc, attempt_dealloc},
    {Py_tp_methods, methods},
    {Py_tp_getset, getters},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "ipckit._native.Attempt",
    .basicsize = sizeof(Attempt),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = slots,
};

int add_attempt_type(PyObject *module)
{
    PyObject *type = PyType_FromModuleAndSpec(module, &spec, NULL);
    if (!type)
        return -1;
    Py_CLEAR(the_type);
    the_type = Py_NewRef(type);
    int failed = PyModule_AddObjectRef(module, "Attempt", type);
    Py_DECREF(type);
    return failed;
}
