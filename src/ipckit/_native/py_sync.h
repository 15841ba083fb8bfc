/* py_sync.h — what the Python types over lock.h and crowd.h share: the mapping, the blocking driver, giving up.
 *
 * A `Mutex` is Lock and RLock; a `Crowd` everything else; an `Attempt` one way in for a task of an event loop, which must not sleep:
 * it tries, and has a thread of the core sleep for it. */
#ifndef IPCKIT_PY_SYNC_H
#define IPCKIT_PY_SYNC_H

#include "module.h"

#include <structmember.h>
#include <sys/types.h>

#include "crowd.h"

/* One object in this process's memory. It stays until the last user is done with it: Python objects, sleepers, and the threads that
 * own a word in it. See py_mapping.c. */
struct mapping {
    unsigned users;
    struct sync_object *o;
    size_t size;
    dev_t device;
    ino_t inode;
    bool stays; /* a user more: it was held when a Python object of it went, the last perhaps */
    struct mapping *next;
};
struct mapping *mapping_of(int fd, const char **wrong); /* NULL with `wrong`, or errno, set */
struct mapping *mapping_keep(struct mapping *map);
void mapping_drop(struct mapping *map);
void mapping_part(struct mapping *map, int fd); /* of a Python object: closes the descriptor, and drops it unless a word in it is held */

typedef struct {
    PyObject_HEAD
    struct sync_object *o;
    struct mapping *map;
    int fd;         /* ours: held open for its flock, and to pass on */
    PyObject *fail; /* (verdict, operation, pid of the last owner) -> exception */
    bool take;      /* Mutex: what a dead owner held is simply taken */
    bool recursive;
    bool inherited; /* Mutex: the last acquire did so */
} SyncObject;

/* One try of something that may have to wait; `context` is the caller's. */
typedef enum verdict (*trying)(SyncObject *self, void *context, struct attempt *attempt, struct naps *naps);

/* Try and sleep until it is not WAIT, or the deadline passed (then WAIT). The GIL is released while asleep only. `stubborn`: go on after a
 * signal; else its handler runs, and what it raises ends the wait: -1. */
#define MONITOR_NS INT64_C(100000000) /* what does not wait waits so long for one who was stopped in the middle of a crowd's work */
int drive(SyncObject *self, trying try, void *context, struct attempt *attempt, int64_t deadline, bool stubborn);
/* What must be done, whatever signals come: short, and only ever for the monitor. */
int insist(SyncObject *self, trying try, void *context, struct attempt *attempt);

/* `block` and `timeout` as multiprocessing has them: a negative timeout is 0. -1 with an exception set. */
int64_t deadline_for(PyObject *block, PyObject *timeout);

PyObject *sync_fail(SyncObject *self, int verdict, const char *operation);
PyObject *sync_new(PyTypeObject *type, PyObject *args, PyObject *kwargs); /* (fd, kind, fail, take=False); takes the descriptor over */
int sync_traverse(PyObject *object, visitproc visit, void *arg);
int sync_clear(PyObject *object);
void sync_dealloc(PyObject *object);
extern PyMemberDef sync_members[];
PyObject *sync_owner(struct robust_word *word); /* (pid, since in s, tid), or None */

/* Of a Condition, in py_condition.c. */
PyObject *condition_wait(PyObject *object, PyObject *args);
extern const char condition_wait_doc[];
/* Take the lock again, `depth` levels beyond the first, whatever signals come. 0, or -1 with an exception set: then it is not held. */
int mutex_take_back(SyncObject *lock, uint32_t depth);

/* Attempts, in py_attempt.c. */
/* role 0: the mutex; -1: the event; `lock`: that of a listener, or NULL. */
PyObject *attempt_new(SyncObject *sync, enum claim claim, int role, PyObject *lock);
/* What a listener watches of this lock: NULL if there is none, or one that is taken whoever died; or `wrong`, with an exception set. */
struct mutex *mutex_to_watch(PyObject *lock, bool *wrong);
/* Somebody who sleeps for a task: a thread of the core that writes to `bell` (an eventfd, of which it takes a copy) once one of the
 * words is not what was seen. NULL with errno set. It is there until it is dismissed; `forks`: fork_generation when it was sent.
 * `first`, `second`: mappings to keep for it, or NULL. */
struct sleeper;
struct sleeper *sleeper_watch(const struct naps *naps, int bell, struct mapping *first, struct mapping *second);
void sleeper_dismiss(struct sleeper *sleeper, unsigned forks);
int add_mutex_type(PyObject *module);
int add_crowd_type(PyObject *module);
int add_attempt_type(PyObject *module);
int add_sync_types(PyObject *module);
int add_exporter_type(PyObject *module);
int add_latest_types(PyObject *module); /* Latest, LatestWatch */

#endif
