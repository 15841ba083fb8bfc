/* glue.c — what every native link does alike: deadlines, lanes, the fork guard, and giving up. See module.h. */
#include "module.h"

#include <errno.h>
#include <math.h>
#include <sched.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

/* What `spin=auto` may burn in one wait. Two processes on free cores answer each other in a few µs; beyond this, sleeping costs
 * less than the core. The links shorten it further while spinning does not pay. */
#define AUTO_SPIN_NS 50000

int64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

int64_t deadline_of(PyObject *timeout)
{
    if (timeout == NULL || timeout == Py_None)
        return NO_DEADLINE;
    double seconds = PyFloat_AsDouble(timeout);
    if (seconds == -1.0 && PyErr_Occurred())
        return -1;
    if (!(seconds >= 0.0)) { /* NaN as well */
        PyErr_SetString(PyExc_ValueError, "timeout must be None, 0 or positive");
        return -1;
    }
    if (seconds == 0.0)
        return 0; /* always past: whoever tries once needs no clock */
    if (seconds > 9e9)
        return NO_DEADLINE; /* 285 years, where the arithmetic would overflow */
    return now_ns() + (int64_t)ceil(seconds * 1e9);
}

int64_t spin_budget(int64_t spin_ns, PyObject *peer)
{
    if (spin_ns >= 0)
        return spin_ns;
    /* Both ends pinned to the same one core: the peer could not run while we spin. An end that is alone on its own core can spin. */
    cpu_set_t ours, theirs;
    if (sched_getaffinity(0, sizeof ours, &ours) != 0 || CPU_COUNT(&ours) > 1)
        return AUTO_SPIN_NS;
    PyObject *attribute = PyObject_GetAttrString(peer, "pid");
    long pid = attribute && attribute != Py_None ? PyLong_AsLong(attribute) : 0;
    Py_XDECREF(attribute);
    PyErr_Clear(); /* nobody that we could look at */
    if (pid > 0 && pid != (long)getpid() && sched_getaffinity((pid_t)pid, sizeof theirs, &theirs) == 0)
        CPU_OR(&ours, &ours, &theirs);
    else if (sysconf(_SC_NPROCESSORS_ONLN) > 1)
        return AUTO_SPIN_NS; /* it may well be elsewhere; the links notice soon when spinning does not pay */
    return CPU_COUNT(&ours) > 1 ? AUTO_SPIN_NS : 0;
}

PyObject *give_up(struct endpoint *end, enum reason why, const char *operation, PyObject *detail)
{
    if (detail == NULL) {
        if (PyErr_Occurred())
            return NULL; /* the detail could not be made */
        detail = Py_NewRef(Py_None);
    }
    PyObject *exception = PyObject_CallFunction(end->fail, "isN", (int)why, operation, detail);
    if (exception == NULL)
        return NULL;
    if (PyExceptionInstance_Check(exception))
        PyErr_SetObject(PyExceptionInstance_Class(exception), exception);
    else
        PyErr_SetString(PyExc_TypeError, "fail() must return an exception");
    Py_DECREF(exception);
    return NULL;
}

/* Interned names compare by identity nearly always, but this is fast enough for those who write `timeout=`. */
int read_arguments(const char *function, const char *const *names, int required, PyObject *const *args, Py_ssize_t count,
                   PyObject *keywords, PyObject **found)
{
    int known = 0;
    for (; names[known]; known++)
        found[known] = known < count ? args[known] : NULL;
    if (count > known) {
        PyErr_Format(PyExc_TypeError, "%s() takes at most %d arguments (%zd given)", function, known, count);
        return -1;
    }
    Py_ssize_t named = keywords ? PyTuple_Size(keywords) : 0;
    for (Py_ssize_t k = 0; k < named; k++) {
        PyObject *name = PyTuple_GetItem(keywords, k);
        int i = 0;
        while (i < known && PyUnicode_CompareWithASCIIString(name, names[i]) != 0)
            i++;
        if (i == known || found[i]) {
            PyErr_Format(PyExc_TypeError, i == known ? "%s() has no argument '%U'" : "%s() got '%U' twice", function, name);
            return -1;
        }
        found[i] = args[count + k];
    }
    for (int i = 0; i < required; i++)
        if (!found[i]) {
            PyErr_Format(PyExc_TypeError, "%s() needs the argument '%s'", function, names[i]);
            return -1;
        }
    return 0;
}

/* -- fork ------------------------------------------------------------------------------------------------------ */

static int fresh_lane(struct lane *lane)
{
    lane->busy = false;
    lane->waiting = 0;
    lane->lock = PyThread_allocate_lock();
    if (lane->lock == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    PyThread_acquire_lock(lane->lock, WAIT_LOCK); /* held from the start: to acquire it is to be handed the lane */
    return 0;
}

int endpoint_forked(struct endpoint *end, const char *operation)
{
    (void)operation;
    PyObject *answer = PyObject_CallNoArgs(end->on_fork);
    if (answer == NULL)
        return -1;
    Py_DECREF(answer);
    /* Adopted. The threads that were inside live in the parent only, so their lanes are free here; a lock that the fork caught
     * in use cannot be freed safely, so it is left to leak. The bell is the parent's: ours must not wake its threads. */
    int bell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (bell < 0) {
        PyErr_SetFromErrno(PyExc_OSError);
        return -1;
    }
    if (fresh_lane(&end->send) < 0 || fresh_lane(&end->recv) < 0) {
        close(bell);
        return -1;
    }
    if (end->bell >= 0)
        close(end->bell);
    end->bell = bell;
    end->inside = 0;
    end->generation = fork_generation;
    return 0;
}

/* -- lanes ----------------------------------------------------------------------------------------------------- */

/* A lane is handed over, never dropped and raced for: lane_leave leaves `busy` set and releases the lock once, and whichever
 * waiter acquires it owns the lane. Hence at most one release is ever outstanding, and a waiter that gave up can tell, with the
 * GIL held, whether the lane was handed to it after all. */
int lane_wait(struct endpoint *end, struct lane *lane, int64_t deadline, const char *operation)
{
    lane->waiting++;
    for (;;) {
        PyLockStatus status;
        PY_TIMEOUT_T patience = -1;
        if (deadline != NO_DEADLINE) {
            int64_t left = deadline - now_ns();
            patience = left > 0 ? (left + 999) / 1000 : 0;
        }
        Py_BEGIN_ALLOW_THREADS
        status = PyThread_acquire_lock_timed(lane->lock, patience, 1);
        Py_END_ALLOW_THREADS
        int interrupted = status == PY_LOCK_INTR ? PyErr_CheckSignals() : 0;
        if (status != PY_LOCK_ACQUIRED && PyThread_acquire_lock_timed(lane->lock, 0, 0) == PY_LOCK_ACQUIRED)
            status = PY_LOCK_ACQUIRED;
        if (status == PY_LOCK_ACQUIRED) {
            if (interrupted < 0 || end->closed) {
                lane_leave(lane);
                if (interrupted == 0)
                    give_up(end, REASON_CLOSED, operation, NULL);
                return -1;
            }
            return 0;
        }
        if (interrupted < 0 || (status == PY_LOCK_FAILURE && now_ns() >= deadline)) {
            lane->waiting--;
            if (interrupted == 0)
                give_up(end, REASON_TIMED_OUT, operation, NULL);
            return -1;
        }
    }
}

void lane_leave(struct lane *lane)
{
    if (lane->waiting) {
        lane->waiting--;
        PyThread_release_lock(lane->lock);
    } else
        lane->busy = false;
}

/* -- the endpoint ---------------------------------------------------------------------------------------------- */

int endpoint_init(struct endpoint *end, PyObject *fail, PyObject *on_fork, uint64_t limit, int64_t spin_ns,
                  PyObject *native, PyObject *peer)
{
    if (!PyCallable_Check(fail) || !PyCallable_Check(on_fork)) {
        PyErr_SetString(PyExc_TypeError, "fail and on_fork must be callable");
        return -1;
    }
    end->fail = Py_NewRef(fail);
    end->on_fork = Py_NewRef(on_fork);
    end->native = Py_NewRef(native);
    end->peer = Py_NewRef(peer);
    end->limit = limit;
    end->spin_ns = spin_budget(spin_ns, peer);
    end->generation = fork_generation;
    if (fresh_lane(&end->send) < 0 || fresh_lane(&end->recv) < 0)
        return -1;
    end->bell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (end->bell < 0) {
        PyErr_SetFromErrno(PyExc_OSError);
        return -1;
    }
    return 0;
}

void endpoint_clear(struct endpoint *end)
{
    Py_CLEAR(end->fail);
    Py_CLEAR(end->on_fork);
    Py_CLEAR(end->native);
    Py_CLEAR(end->peer);
    for (int want = 0; want < 4; want++)
        Py_CLEAR(end->waits[want]);
}

void endpoint_free(struct endpoint *end)
{
    /* endpoint_init makes the locks before the bell, so without them `bell` is only a zero. */
    if (end->send.lock && end->recv.lock && end->bell >= 0)
        close(end->bell);
    end->bell = -1;
    if (end->send.lock)
        PyThread_free_lock(end->send.lock);
    if (end->recv.lock)
        PyThread_free_lock(end->recv.lock);
    end->send.lock = end->recv.lock = NULL;
}

int endpoint_traverse(struct endpoint *end, visitproc visit, void *arg)
{
    Py_VISIT(end->fail);
    Py_VISIT(end->on_fork);
    Py_VISIT(end->native);
    Py_VISIT(end->peer);
    for (int want = 0; want < 4; want++)
        Py_VISIT(end->waits[want]);
    return 0;
}

PyObject *endpoint_counters(struct endpoint *end)
{
    return Py_BuildValue("KKKK", (unsigned long long)end->counters[0], (unsigned long long)end->counters[1],
                         (unsigned long long)end->counters[2], (unsigned long long)end->counters[3]);
}
