/* blocking.h — the blocking forms of what lock.h and crowd.h try, as the Python glue has them. */
#ifndef IPCKIT_TEST_BLOCKING_H
#define IPCKIT_TEST_BLOCKING_H

#include "../../src/ipckit/_native/crowd.h"
#include "../../src/ipckit/_native/steps.h"

#include "check.h"

#include <errno.h>
#include <sys/mman.h>

static struct sync_object *made(uint32_t kind, uint32_t value, uint32_t limit)
{
    struct sync_object *o = mmap(NULL, SYNC_LARGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(o != MAP_FAILED);
    sync_format(o, kind, value, limit);
    CHECK(sync_check(o, sync_bytes(kind), kind) == NULL);
    return o;
}

static void unmade(struct sync_object *o)
{
    munmap(o, SYNC_LARGE);
}

#define PATIENCE INT64_C(20000000000)

static enum verdict lock_for(struct mutex *m, enum claim claim, int64_t ns)
{
    struct attempt attempt = {.claim = claim};
    struct naps naps = {0};
    int64_t deadline = clock_ns() + ns;
    enum verdict verdict;
    while ((verdict = mutex_try(m, &attempt, &naps)) == WAIT) {
        int error = nap(self_here(), &naps, deadline, NULL);
        attempt.slept = error == 0;
        if (error == ETIMEDOUT) {
            mutex_give_up(m, &attempt);
            return WAIT;
        }
    }
    return verdict;
}

static enum verdict enter_for(struct sync_object *o, enum role role, struct attempt *attempt, int64_t ns)
{
    struct naps naps = {0};
    int64_t deadline = clock_ns() + ns;
    enum verdict verdict;
    while ((verdict = crowd_enter(o, role, attempt, &naps)) == WAIT) {
        int error = nap(self_here(), &naps, deadline, NULL);
        attempt->slept = error == 0;
        if (error == ETIMEDOUT) {
            while ((verdict = crowd_give_up(o, role, attempt, &naps)) == WAIT)
                attempt->slept = nap(self_here(), &naps, INT64_MAX, NULL) == 0;
            return verdict == OUT ? WAIT : verdict;
        }
    }
    return verdict;
}

#define INSIST(call)                                                       \
    do {                                                                   \
        struct attempt attempt_ = {0};                                     \
        struct attempt *attempt = &attempt_;                               \
        struct naps naps = {0};                                            \
        enum verdict verdict_;                                             \
        while ((verdict_ = (call)) == WAIT)                                \
            attempt->slept = nap(self_here(), &naps, INT64_MAX, NULL) == 0; \
        last = verdict_;                                                   \
    } while (0)
static _Thread_local enum verdict last;

static enum verdict leave(struct sync_object *o, enum role role)
{
    INSIST(crowd_leave(o, role, -1, false, attempt, &naps));
    return last;
}

#endif
