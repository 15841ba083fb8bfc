/* crowd.c — coming into a crowd, waiting to be let in, leaving; see crowd.h. */
#include "crowd_words.h"

#define MANY_NS INT64_C(25000000) /* between two looks of a witness who has more to watch than the kernel takes */

/* -- coming in ------------------------------------------------------------------------------------------------------ */

/* The monitor is held; a slot of our own, and everybody who has to watch it told. */
static enum verdict sit_down(struct sync_object *o, struct self *me, enum role role, uint32_t gate, struct attempt *attempt)
{
    uint32_t i = free_slot(o);
    if (i == SYNC_SLOTS) {
        sweep(o, me);
        i = free_slot(o);
    }
    if (i == SYNC_SLOTS || self_full(me))
        return FULL;
    struct slot *s = &o->slots[i];
    if (eldest(o)) {
        /* First: if we are killed further on, the eldest will find the monitor dead, and us. */
        atomic_fetch_add_explicit(&o->crowd.bell, 1, memory_order_release); /* SYNC POINT: bell */
        futex_wake(&o->crowd.bell, 1);
    }
    STORE(s->role, role);
    STORE(s->own.more, gate);
    uint64_t order = LOAD(o->crowd.arrivals);
    STORE(o->crowd.arrivals, order + 1);
    STORE(s->order, order);
    if (i >= high(o))
        STORE(o->crowd.high, i + 1);
    word_own(me, &s->own);
    attempt->slot = (int32_t)i + 1;
    return DONE;
}

static void watch(struct naps *naps, struct slot *s)
{
    uint32_t word = atomic_fetch_or_explicit(&s->own.word, WAITERS, memory_order_acquire) | WAITERS; /* SYNC POINT: life */
    if (!(word & OWNER_MASK))
        word = NOBODY; /* died or left this moment: do not sleep */
    naps->at[naps->count++] = (struct nap){&s->own.word, word, LIFE};
}

/* Of its mutex: a listener hears of the death of whoever holds it. */
static void watch_witness(struct naps *naps, struct mutex *lock)
{
    _Atomic uint32_t *word = &witness_of(lock)->word;
    uint32_t seen = atomic_load_explicit(word, memory_order_acquire);
    if (mutex_abandoned(lock))
        seen = NOBODY; /* this moment: do not sleep */
    naps->at[naps->count++] = (struct nap){word, seen, WITNESS};
}

static void where_to_sleep(struct sync_object *o, struct attempt *attempt, struct naps *naps)
{
    struct slot *mine = &o->slots[attempt->slot - 1];
    naps->bits = 0;
    naps->at_most = 0;
    naps->forward = NULL;
    naps->count = 1;
    naps->at[0] = (struct nap){&mine->own.more, NOBODY, QUIET};
    if (attempt->lock)
        watch_witness(naps, attempt->lock);
    struct slot *first = eldest(o);
    if (first && first != mine) {
        watch(naps, first);
        naps->forward = &first->own.word;
        return;
    }
    naps->at[naps->count++] = (struct nap){&o->crowd.bell, LOAD(o->crowd.bell), QUIET};
    for (uint32_t i = 0; i < high(o); i++) {
        struct slot *s = &o->slots[i];
        if (s == mine || life(s) == 0)
            continue;
        if (naps->count == MOST_NAPS) {
            naps->at_most = MANY_NS;
            return;
        }
        watch(naps, s);
    }
}

/* We waited, and are in. Whoever waited behind us watches only us, and a semaphore can have others inside whose death would make
 * room: so the next one is told that it is the eldest now. Killed before that, we are what it watches. */
static void succeed(struct sync_object *o, struct self *me)
{
    struct slot *next = o->header.kind == SYNC_LEASED ? eldest(o) : NULL;
    if (next) {
        pending(me, &next->own.more);
        futex_wake(&next->own.more, 1);
        STEP(57);
        pending(me, NULL);
    }
}

/* Without waiting: as if somebody had let us in. */
static bool open_door(struct sync_object *o, enum role role, bool task)
{
    if (role == ROLE_LISTENER)
        return false;
    /* Nobody overtakes those who wait, but a reader who reads already: it would wait for a writer that waits for it. */
    if (role != ROLE_PARTY && eldest(o) && (role != ROLE_READ || task || !crowd_mine(o, ROLE_READ)))
        return false;
    switch (o->header.kind) {
    case SYNC_SEMAPHORE:
    case SYNC_BOUNDED:
        return LOAD(o->crowd.value) > 0;
    case SYNC_LEASED:
        return crowd_count(o, ROLE_UNIT, false) < LOAD(o->crowd.limit);
    case SYNC_RWLOCK:
        return crowd_count(o, ROLE_WRITE, false) + crowd_count(o, ROLE_RECOVER, false) == 0 &&
               (role == ROLE_READ || crowd_count(o, ROLE_READ, false) == 0);
    case SYNC_BARRIER:
        return crowd_count(o, ROLE_PARTY, true) + 1 >= LOAD(o->crowd.limit);
    default:
        return false;
    }
}

static enum verdict closed_to(struct sync_object *o, enum role role)
{
    uint32_t flags = LOAD(o->crowd.flags);
    if ((flags & CROWD_ABANDONED) && role != ROLE_RECOVER)
        return DIED;
    return flags & CROWD_BROKEN ? BROKEN : DONE;
}

static enum verdict arrive(struct sync_object *o, struct self *me, enum role role, struct attempt *attempt, struct naps *naps)
{
    bool open = open_door(o, role, attempt->task);
    if (!open || role == ROLE_PARTY) {
        sweep(o, me); /* the dead may be what stands in the way */
        enum verdict closed = closed_to(o, role);
        if (closed != DONE)
            return closed;
        open = open_door(o, role, attempt->task);
    }
    if (!open && !attempt->task && o->header.kind == SYNC_RWLOCK &&
        (crowd_mine(o, ROLE_WRITE) || crowd_mine(o, ROLE_RECOVER) || (role != ROLE_READ && crowd_mine(o, ROLE_READ))))
        return SELF;
    uint32_t running = LOAD(o->crowd.running);
    if (running) { /* those who were let go are not out yet; we are of the next generation */
        if (naps && running <= SYNC_SLOTS) {
            naps->count = 0;
            naps->bits = 0;
            naps->at_most = 0;
            watch(naps, &o->slots[running - 1]);
            naps->forward = naps->at[0].word;
        }
        return WAIT;
    }
    if (!open && !naps && role == ROLE_PARTY) { /* it came, and gives up: the others wait for one who will not be back */
        atomic_fetch_or_explicit(&o->crowd.flags, CROWD_BROKEN, memory_order_relaxed);
        settle(o, me);
        return BROKEN;
    }
    if (!open && !naps)
        return WAIT;
    attempt->seen = crowd_count(o, ROLE_PARTY, true);
    if (open && (o->header.kind == SYNC_SEMAPHORE || o->header.kind == SYNC_BOUNDED)) {
        STORE(o->crowd.value, LOAD(o->crowd.value) - 1); /* nobody's: these have no owner */
        return DONE;
    }
    enum verdict verdict = sit_down(o, me, role, open ? GATE_OPEN : NOBODY, attempt);
    if (verdict != DONE)
        return verdict;
    STEP(52);
    if (open) {
        if (role == ROLE_PARTY)
            STORE(o->crowd.running, (uint32_t)attempt->slot);
        return role == ROLE_RECOVER && (LOAD(o->crowd.flags) & CROWD_ABANDONED) ? INHERITED : DONE;
    }
    where_to_sleep(o, attempt, naps);
    return WAIT;
}

enum verdict crowd_enter(struct sync_object *o, enum role role, struct attempt *attempt, struct naps *naps)
{
    struct self *me = self_here();
    enum verdict verdict = monitor_enter(o, attempt, naps);
    if (verdict != DONE)
        return verdict;
    if (attempt->once)
        naps = NULL;
    if (attempt->slot == 0) {
        verdict = closed_to(o, role);
        return monitor_leave(o, verdict == DONE ? arrive(o, me, role, attempt, naps) : verdict);
    }
    struct slot *mine = &o->slots[attempt->slot - 1];
    sweep(o, me);
    if (waits(mine) && attempt->lock && mutex_abandoned(attempt->lock)) {
        word_disown(me, &mine->own);
        attempt->slot = 0;
        return monitor_leave(o, DIED);
    }
    if (waits(mine)) {
        if (naps)
            where_to_sleep(o, attempt, naps);
        return monitor_leave(o, WAIT);
    }
    bool open = inside(mine);
    if (open)
        verdict = role == ROLE_RECOVER && (LOAD(o->crowd.flags) & CROWD_ABANDONED) ? INHERITED : DONE;
    else
        verdict = o->header.kind == SYNC_BARRIER ? BROKEN : DIED;
    /* Who needs no slot inside: a unit has no owner here, and a party is through. */
    if (!open || role == ROLE_PARTY || (role == ROLE_UNIT && o->header.kind != SYNC_LEASED)) {
        word_disown(me, &mine->own);
        attempt->slot = 0;
        settle(o, me);
    } else
        succeed(o, me);
    return monitor_leave(o, verdict);
}

enum verdict crowd_give_up(struct sync_object *o, enum role role, struct attempt *attempt, struct naps *naps)
{
    struct self *me = self_here();
    if (attempt->slot == 0) {
        if (attempt->at_monitor)
            mutex_give_up(&o->monitor, &(struct attempt){.slept = attempt->slept});
        nap_forget(me);
        return OUT;
    }
    enum verdict verdict = monitor_enter(o, attempt, naps);
    if (verdict != DONE)
        return verdict;
    struct slot *mine = &o->slots[attempt->slot - 1];
    bool open = inside(mine);
    if (role == ROLE_PARTY && !open)
        atomic_fetch_or_explicit(&o->crowd.flags, CROWD_BROKEN, memory_order_relaxed);
    if (!open || role == ROLE_PARTY || (role == ROLE_UNIT && o->header.kind != SYNC_LEASED)) {
        word_disown(me, &mine->own);
        attempt->slot = 0;
        settle(o, me);
    } else
        succeed(o, me);
    return monitor_leave(o, open ? DONE : OUT);
}

/* -- leaving -------------------------------------------------------------------------------------------------------- */


enum verdict crowd_leave(struct sync_object *o, enum role role, int32_t slot, bool abandon, struct attempt *attempt,
                         struct naps *naps)
{
    struct self *me = self_here();
    enum verdict verdict = monitor_enter(o, attempt, naps);
    if (verdict != DONE)
        return verdict;
    struct slot *mine = NULL;
    for (uint32_t i = 0; i < high(o) && !mine; i++) {
        struct slot *s = &o->slots[i];
        if ((slot < 0 || slot == (int32_t)i) && (life(s) & OWNER_MASK) == me->tid && LOAD(s->role) == (uint32_t)role && inside(s))
            mine = s;
    }
    if (!mine)
        return monitor_leave(o, NOT_MINE);
    if (role == ROLE_RECOVER && !abandon)
        atomic_fetch_and_explicit(&o->crowd.flags, ~(uint32_t)CROWD_ABANDONED, memory_order_relaxed);
    word_disown(me, &mine->own);
    STEP(53);
    settle(o, me);
    return monitor_leave(o, DONE);
}
