/* py_condition.c — Condition.wait: let go of the lock, listen, take the lock back.
 *
 * One call, so that no signal handler comes between its parts: one that raised there would leave a listener whom nobody wakes, and who
 * swallows a notification. Handlers run while it sleeps, and what they raise leaves this call with the lock held, as any other end does
 * but one: the lock's owner died. */
#include "py_sync.h"

const char condition_wait_doc[] = "_wait(timeout, lock)\n--\n\nWhether it was notified in time. Raises OwnerDied, without the lock.";

static enum verdict try_listen(SyncObject *self, void *unused, struct attempt *attempt, struct naps *naps)
{
    (void)unused;
    return crowd_enter(self->o, ROLE_LISTENER, attempt, naps);
}

static enum verdict try_give_up(SyncObject *self, void *unused, struct attempt *attempt, struct naps *naps)
{
    (void)unused;
    return crowd_give_up(self->o, ROLE_LISTENER, attempt, naps);
}

static enum verdict try_leave(SyncObject *self, void *slot, struct attempt *attempt, struct naps *naps)
{
    return crowd_leave(self->o, ROLE_LISTENER, *(int32_t *)slot - 1, false, attempt, naps);
}

static enum verdict try_pass_on(SyncObject *self, void *unused, struct attempt *attempt, struct naps *naps)
{
    (void)unused;
    return condition_notify(self->o, 1, attempt, naps);
}

/* From WAIT on we hear what is notified, and `attempt->slot` is ours. */
static enum verdict join(SyncObject *self, struct attempt *attempt)
{
    struct naps naps;
    enum verdict verdict;
    while ((verdict = try_listen(self, NULL, attempt, &naps)) == WAIT && attempt->slot == 0) {
        Py_BEGIN_ALLOW_THREADS
        attempt->slept = nap(self_here(), &naps, NO_DEADLINE, NULL) == 0;
        Py_END_ALLOW_THREADS
    }
    return verdict;
}

/* DONE: notified, and the slot is still ours: should we be killed before we have the lock, the notification goes to the next. OUT: not in
 * time. -1: a handler raised. Else why not. */
static int listen(SyncObject *self, struct attempt *attempt, int64_t deadline)
{
    int verdict = drive(self, try_listen, NULL, attempt, deadline, false);
    if (verdict != WAIT && verdict != -1)
        return verdict;
    int end = insist(self, try_give_up, NULL, attempt);
    if (verdict == WAIT || end != DONE)
        return verdict == WAIT ? end : verdict;
    int32_t slot = attempt->slot; /* interrupted, and notified: somebody else shall have it */
    insist(self, try_leave, &slot, &(struct attempt){0});
    insist(self, try_pass_on, NULL, &(struct attempt){0});
    return -1;
}

/* With an exception set or not: take the lock back. -1: it is not held, and one is set, with the other as its context. */
static int take_back(SyncObject *lock, uint32_t depth)
{
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    if (mutex_take_back(lock, depth) == 0) {
        PyErr_Restore(type, value, trace);
        return 0;
    }
    if (type) {
        PyObject *now_type, *now, *now_trace;
        PyErr_Fetch(&now_type, &now, &now_trace);
        PyErr_NormalizeException(&type, &value, &trace);
        PyErr_NormalizeException(&now_type, &now, &now_trace);
        PyException_SetContext(now, value);
        PyErr_Restore(now_type, now, now_trace);
        Py_DECREF(type);
        Py_XDECREF(trace);
    }
    return -1;
}

PyObject *condition_wait(PyObject *object, PyObject *args)
{
    SyncObject *self = (SyncObject *)object;
    PyObject *timeout, *held;
    if (!PyArg_ParseTuple(args, "OO:_wait", &timeout, &held))
        return NULL;
    bool wrong;
    struct mutex *watched = mutex_to_watch(held, &wrong);
    int64_t deadline = wrong ? -1 : deadline_for(NULL, timeout);
    if (deadline == -1)
        return NULL;
    SyncObject *lock = (SyncObject *)held;
    struct attempt attempt = {0};
    int verdict = join(self, &attempt);
    if (verdict != WAIT)
        return sync_fail(self, verdict, "wait");
    uint32_t depth = lock->o->mutex.depth;
    verdict = mutex_release(&lock->o->mutex, false);
    attempt = (struct attempt){.slot = attempt.slot, .lock = watched};
    if (verdict != DONE) {
        insist(self, try_give_up, NULL, &attempt);
        return sync_fail(lock, verdict, "wait");
    }
    verdict = listen(self, &attempt, deadline);
    if (verdict == DIED)
        return sync_fail(lock, DIED, "wait");
    int back = take_back(lock, depth);
    if (verdict == DONE)
        insist(self, try_leave, &attempt.slot, &(struct attempt){0});
    if (back < 0 || verdict == -1)
        return NULL;
    return verdict == DONE || verdict == OUT ? PyBool_FromLong(verdict == DONE) : sync_fail(self, verdict, "wait");
}
