/* crowd_verbs.c — what semaphores, conditions, barriers and events can do besides coming in and leaving; see crowd.h. */
#include "crowd_words.h"

/* -- semaphores ----------------------------------------------------------------------------------------------------- */

enum verdict semaphore_post(struct sync_object *o, uint32_t count, struct attempt *attempt, struct naps *naps)
{
    struct self *me = self_here();
    enum verdict verdict = monitor_enter(o, attempt, naps);
    if (verdict != DONE)
        return verdict;
    uint32_t value = LOAD(o->crowd.value), most = o->header.kind == SYNC_BOUNDED ? LOAD(o->crowd.limit) : (uint32_t)INT32_MAX;
    if (value > most || count > most - value)
        return monitor_leave(o, OVER);
    struct slot *next;
    sweep(o, me);
    /* From hand to hand: were we killed between a store of the value and opening a gate, nobody would know of the unit. */
    for (; count > 0 && (next = eldest(o)); count--) {
        let_in(me, next);
        STEP(54);
    }
    STORE(o->crowd.value, LOAD(o->crowd.value) + count);
    return monitor_leave(o, DONE);
}

uint32_t semaphore_value(struct sync_object *o)
{
    uint32_t limit = LOAD(o->crowd.limit);
    if (o->header.kind != SYNC_LEASED)
        return LOAD(o->crowd.value);
    uint32_t used = 0;
    for (uint32_t i = 0; i < high(o); i++)
        used += alive(&o->slots[i]) && inside(&o->slots[i]);
    return used < limit ? limit - used : 0;
}

/* -- conditions ----------------------------------------------------------------------------------------------------- */

enum verdict condition_notify(struct sync_object *o, uint32_t count, struct attempt *attempt, struct naps *naps)
{
    struct self *me = self_here();
    enum verdict verdict = monitor_enter(o, attempt, naps);
    if (verdict != DONE)
        return verdict;
    sweep(o, me);
    notify(o, me, count);
    return monitor_leave(o, DONE);
}

/* -- barriers ------------------------------------------------------------------------------------------------------- */

enum verdict barrier_open(struct sync_object *o, struct attempt *attempt, struct naps *naps)
{
    struct self *me = self_here();
    enum verdict verdict = monitor_enter(o, attempt, naps);
    if (verdict != DONE)
        return verdict;
    sweep(o, me);
    struct slot *mine = &o->slots[attempt->slot - 1];
    if (LOAD(o->crowd.flags) & CROWD_BROKEN) /* while the action ran */
        verdict = BROKEN;
    for (uint32_t i = 0; verdict == DONE && i < high(o); i++) {
        struct slot *s = &o->slots[i];
        if (alive(s) && waits(s))
            let_in(me, s);
        STEP(55);
    }
    STORE(o->crowd.running, 0);
    word_disown(me, &mine->own);
    attempt->slot = 0;
    return monitor_leave(o, verdict);
}

enum verdict barrier_break(struct sync_object *o, bool again, struct attempt *attempt, struct naps *naps)
{
    struct self *me = self_here();
    enum verdict verdict = monitor_enter(o, attempt, naps);
    if (verdict != DONE)
        return verdict;
    if (!again)
        atomic_fetch_or_explicit(&o->crowd.flags, CROWD_BROKEN, memory_order_relaxed);
    sweep(o, me); /* before it is made whole: the dead of the last generation break nothing any more */
    if (again) {
        refuse_waiters(o, me);
        atomic_fetch_and_explicit(&o->crowd.flags, ~(uint32_t)CROWD_BROKEN, memory_order_relaxed);
    }
    uint32_t running = LOAD(o->crowd.running);
    if (attempt->slot > 0 && running == (uint32_t)attempt->slot) { /* the action failed: we are out as well */
        STORE(o->crowd.running, 0);
        word_disown(me, &o->slots[attempt->slot - 1].own);
        attempt->slot = 0;
    }
    return monitor_leave(o, DONE);
}

/* -- events --------------------------------------------------------------------------------------------------------- */

void event_set(struct sync_object *o)
{
    struct self *me = self_here();
    atomic_fetch_add_explicit(&o->crowd.turn, 1, memory_order_relaxed);
    STEP(56);
    word_open(me, &o->crowd.event, 0, INT32_MAX); /* SYNC POINT: gate */
}

void event_clear(struct sync_object *o)
{
    uint32_t set = 0;
    atomic_compare_exchange_strong_explicit(&o->crowd.event, &set, NOBODY, memory_order_relaxed, memory_order_relaxed);
}

enum verdict event_try(struct sync_object *o, struct attempt *attempt, struct naps *naps)
{
    if (!self_here())
        return NO_KERNEL;
    uint32_t word = atomic_load_explicit(&o->crowd.event, memory_order_acquire); /* SYNC POINT: gate */
    uint32_t turn = LOAD(o->crowd.turn);
    if (!attempt->looked) {
        attempt->looked = true;
        attempt->seen = turn;
    }
    if (word == 0 || attempt->seen != turn) {
        if (attempt->slept)
            futex_wake(&o->crowd.event, INT32_MAX); /* whoever set it may have been killed before it told more than one */
        nap_forget(self_here());
        return DONE;
    }
    if (naps) {
        naps->count = 1;
        naps->at[0] = (struct nap){&o->crowd.event, word, QUIET};
        naps->bits = 0;
        naps->at_most = 0;
        naps->forward = &o->crowd.event;
    }
    return WAIT;
}
