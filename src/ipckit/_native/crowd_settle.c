/* crowd_settle.c — who is in a crowd, who of them died, and who is let in next; see crowd.h.
 *
 * A kill may come between any two stores. So each change is one store (a gate, a life, a flag), and what follows from it (who is let
 * in) is worked out anew by `settle`, which everybody calls who has the monitor. */
#include "crowd_words.h"

/* -- slots ---------------------------------------------------------------------------------------------------------- */

struct slot *eldest(struct sync_object *o)
{
    struct slot *found = NULL;
    for (uint32_t i = 0; i < high(o); i++) {
        struct slot *s = &o->slots[i];
        if (alive(s) && waits(s) && (!found || LOAD(s->order) < LOAD(found->order)))
            found = s;
    }
    return found;
}

uint32_t crowd_flags(struct sync_object *o)
{
    uint32_t flags = LOAD(o->crowd.flags);
    for (uint32_t i = 0; i < high(o); i++) {
        struct slot *s = &o->slots[i];
        uint32_t role = LOAD(s->role);
        if (!dead(s))
            continue;
        if (inside(s) && (role == ROLE_WRITE || role == ROLE_RECOVER))
            flags |= CROWD_ABANDONED;
        if (role == ROLE_PARTY && (waits(s) || LOAD(o->crowd.running) == i + 1))
            flags |= CROWD_BROKEN;
    }
    return flags;
}

uint32_t crowd_count(struct sync_object *o, enum role role, bool waiting)
{
    uint32_t count = 0;
    for (uint32_t i = 0; i < high(o); i++) {
        struct slot *s = &o->slots[i];
        count += (alive(s) || (dead(s) && !waiting)) && LOAD(s->role) == (uint32_t)role && (waiting ? waits(s) : inside(s));
    }
    return count;
}

bool crowd_mine(struct sync_object *o, enum role role)
{
    struct self *me = self_here();
    for (uint32_t i = 0; me && i < high(o); i++) {
        struct slot *s = &o->slots[i];
        if ((life(s) & OWNER_MASK) == me->tid && LOAD(s->role) == (uint32_t)role && inside(s))
            return true;
    }
    return false;
}

uint32_t free_slot(struct sync_object *o)
{
    uint32_t i = 0;
    while (i < SYNC_SLOTS && life(&o->slots[i]) != 0)
        i++;
    return i;
}

void let_in(struct self *me, struct slot *s)
{
    word_open(me, &s->own.more, GATE_OPEN, 1);
}

/* -- who is let in -------------------------------------------------------------------------------------------------- */

void refuse_waiters(struct sync_object *o, struct self *me)
{
    for (uint32_t i = 0; i < high(o); i++) {
        struct slot *s = &o->slots[i];
        if (waits(s) && LOAD(s->role) != ROLE_RECOVER && life(s) != 0)
            word_open(me, &s->own.more, (uint32_t)GATE_REFUSED, 1);
    }
}

static void settle_rwlock(struct sync_object *o, struct self *me)
{
    bool abandoned = LOAD(o->crowd.flags) & CROWD_ABANDONED;
    if (abandoned)
        refuse_waiters(o, me);
    uint32_t readers = crowd_count(o, ROLE_READ, false);
    uint32_t writers = crowd_count(o, ROLE_WRITE, false) + crowd_count(o, ROLE_RECOVER, false);
    struct slot *next;
    while (writers == 0 && (next = eldest(o))) {
        bool reads = LOAD(next->role) == ROLE_READ;
        if (!reads && readers > 0)
            return;
        let_in(me, next);
        readers += reads;
        writers += !reads;
    }
}

void notify(struct sync_object *o, struct self *me, uint32_t count)
{
    struct slot *next;
    while (count-- > 0 && (next = eldest(o)))
        let_in(me, next);
}

void settle(struct sync_object *o, struct self *me)
{
    struct slot *next;
    switch (o->header.kind) {
    case SYNC_SEMAPHORE:
    case SYNC_BOUNDED:
        while (LOAD(o->crowd.value) > 0 && (next = eldest(o))) {
            STORE(o->crowd.value, LOAD(o->crowd.value) - 1);
            let_in(me, next);
        }
        break;
    case SYNC_LEASED:
        for (uint32_t used = crowd_count(o, ROLE_UNIT, false); used < LOAD(o->crowd.limit) && (next = eldest(o)); used++)
            let_in(me, next);
        break;
    case SYNC_RWLOCK:
        settle_rwlock(o, me);
        break;
    case SYNC_BARRIER:
        if (LOAD(o->crowd.flags) & CROWD_BROKEN)
            refuse_waiters(o, me);
        break;
    default:
        break;
    }
}

/* What the death of the one in this slot means. May be done twice, should we be killed over it; then the slot is free. */
static void bury(struct sync_object *o, struct self *me, uint32_t i)
{
    struct slot *s = &o->slots[i];
    uint32_t role = LOAD(s->role);
    bool was_inside = inside(s);
    bool unit = was_inside && (o->header.kind == SYNC_SEMAPHORE || o->header.kind == SYNC_BOUNDED);
    if (was_inside && (role == ROLE_WRITE || role == ROLE_RECOVER)) {
        STORE(o->mutex.own.pid, LOAD(s->own.pid));
        atomic_fetch_or_explicit(&o->crowd.flags, CROWD_ABANDONED, memory_order_relaxed);
    }
    if (role == ROLE_PARTY && (waits(s) || LOAD(o->crowd.running) == i + 1)) {
        atomic_fetch_or_explicit(&o->crowd.flags, CROWD_BROKEN, memory_order_relaxed);
        STORE(o->crowd.running, 0);
    }
    if (role == ROLE_LISTENER && was_inside)
        notify(o, me, 1); /* it was told, and died before it could act on it */
    STEP(50);
    word_open(me, &s->own.word, 0, INT32_MAX);
    STEP(51);
    if (unit) /* last: a unit may be lost with its owner here, but never be there twice */
        STORE(o->crowd.value, LOAD(o->crowd.value) + 1);
}

void sweep(struct sync_object *o, struct self *me)
{
    for (uint32_t i = 0; i < high(o); i++)
        if (dead(&o->slots[i]))
            bury(o, me, i);
    settle(o, me);
}

/* -- the monitor ---------------------------------------------------------------------------------------------------- */

enum verdict monitor_enter(struct sync_object *o, struct attempt *attempt, struct naps *naps)
{
    struct self *me = self_here();
    if (!me)
        return NO_KERNEL;
    struct attempt own = *attempt; /* with its courtesy so far */
    own.claim = CLAIM_TAKE;
    own.task = false;
    own.slept = attempt->slept && attempt->at_monitor;
    own.at_monitor = true;
    if (!own.slept)
        nap_forget(me);
    enum verdict verdict = mutex_try(&o->monitor, &own, naps);
    attempt->at_monitor = verdict == WAIT;
    attempt->gave_way = own.gave_way;
    attempt->since = own.since;
    if (verdict == INHERITED) {
        uint32_t last = SYNC_SLOTS; /* the one thing that follows from the slots and is not worked out anew each time */
        STORE(o->crowd.high, last);
        sweep(o, me);
        while (last > 0 && life(&o->slots[last - 1]) == 0)
            last--;
        STORE(o->crowd.high, last);
        return DONE;
    }
    return verdict == SELF ? CORRUPT : verdict;
}

enum verdict monitor_leave(struct sync_object *o, enum verdict verdict)
{
    STEP(60);
    mutex_release(&o->monitor, false);
    return verdict;
}
