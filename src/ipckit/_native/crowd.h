/* crowd.h — what several may be in at once, or wait for together: semaphores, readers and writers, conditions, barriers, events.
 *
 * One state and a row of slots, guarded by a robust mutex that is held for some instructions only (the monitor). Whoever is inside,
 * or waits, owns a slot: a robust word of its own, so the kernel tells when it dies. Everything here tries: WAIT comes with
 * words to sleep on, be it for the monitor, and the caller calls again. Release is tried in the same way, until it is not WAIT.
 *
 *   own gate      opened by the one who lets us in
 *   the eldest    of the waiters watches the life of everybody else; the others watch the eldest's. So every death has a witness, and
 *                 a newcomer (who rings the bell first) costs one wake-up, not one for each waiter */
#ifndef IPCKIT_CROWD_H
#define IPCKIT_CROWD_H

#include "lock.h"

enum role { ROLE_UNIT = 1, ROLE_READ, ROLE_WRITE, ROLE_RECOVER, ROLE_PARTY, ROLE_LISTENER };

/* Write a new object into `bytes` of zeros; sync_bytes says how many a kind takes (0: no such kind). */
uint64_t sync_bytes(uint32_t kind);
void sync_format(struct sync_object *o, uint32_t kind, uint32_t value, uint32_t limit);
/* NULL if this is an object of that kind, else what is wrong. */
const char *sync_check(const struct sync_object *o, uint64_t bytes, uint32_t kind);

/* Come in, or wait to be let in. `attempt->slot` is ours from the first WAIT with naps on, until crowd_leave or OUT. A party that is
 * the last to arrive is DONE at once and must call barrier_open; a listener always waits first. */
enum verdict crowd_enter(struct sync_object *o, enum role role, struct attempt *attempt, struct naps *naps);
/* After WAIT: DONE if we were let in at the last moment, else OUT. */
enum verdict crowd_give_up(struct sync_object *o, enum role role, struct attempt *attempt, struct naps *naps);
/* Leave: the slot, or (-1) any that this thread is in with this role. `abandon`: who repairs an RWLock leaves it abandoned. */
enum verdict crowd_leave(struct sync_object *o, enum role role, int32_t slot, bool abandon, struct attempt *attempt,
                         struct naps *naps);

enum verdict semaphore_post(struct sync_object *o, uint32_t count, struct attempt *attempt, struct naps *naps);
enum verdict condition_notify(struct sync_object *o, uint32_t count, struct attempt *attempt, struct naps *naps);
enum verdict barrier_open(struct sync_object *o, struct attempt *attempt, struct naps *naps);
/* Break it; `again`: and make it whole, for those who come after. */
enum verdict barrier_break(struct sync_object *o, bool again, struct attempt *attempt, struct naps *naps);

void event_set(struct sync_object *o);
void event_clear(struct sync_object *o);
enum verdict event_try(struct sync_object *o, struct attempt *attempt, struct naps *naps);

/* enum crowd_flags, as the next to come will find them: the dead whom nobody has buried yet count. A glance. */
uint32_t crowd_flags(struct sync_object *o);
/* How many are in (`waiting` false) or wait in this role; a glance. */
uint32_t crowd_count(struct sync_object *o, enum role role, bool waiting);
/* Units that are free. */
uint32_t semaphore_value(struct sync_object *o);
/* This thread is in. */
bool crowd_mine(struct sync_object *o, enum role role);

#endif
