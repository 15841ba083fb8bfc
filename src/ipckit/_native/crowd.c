/* crowd.c — see crowd.h.
 *
 * A kill may come between any two stores. So each change is one store (a gate, a life, a flag), and what follows from it (who is let
 * in) is worked out anew by `settle`, which everybody calls who has the monitor. */
#include "crowd.h"

#include "steps.h"

#define LOAD(word) atomic_load_explicit(&(word), memory_order_relaxed) /* the monitor orders them */
#define STORE(word, value) atomic_store_explicit(&(word), value, memory_order_relaxed)
#define MANY_NS INT64_C(25000000) /* between two looks of a witness who has more to watch than the kernel takes */

uint64_t sync_bytes(uint32_t kind)
{
    switch (kind) {
    case SYNC_LOCK:
    case SYNC_RLOCK:
    case SYNC_EVENT:
        return SYNC_SMALL;
    case SYNC_SEMAPHORE:
    case SYNC_BOUNDED:
    case SYNC_LEASED:
    case SYNC_RWLOCK:
    case SYNC_CONDITION:
    case SYNC_BARRIER:
        return SYNC_LARGE;
    default:
        return 0;
    }
}

void sync_format(struct sync_object *o, uint32_t kind, uint32_t value, uint32_t limit)
{
    o->header.version = SYNC_VERSION;
    o->header.kind = kind;
    o->header.size = sync_bytes(kind);
    o->header.slots = o->header.size == SYNC_LARGE ? SYNC_SLOTS : 0;
    STORE(o->mutex.watched, kind == SYNC_CONDITION);
    STORE(o->crowd.value, value);
    STORE(o->crowd.limit, limit);
    STORE(o->crowd.event, NOBODY);
    o->header.magic = SYNC_MAGIC;
}

const char *sync_check(const struct sync_object *o, uint64_t bytes, uint32_t kind)
{
    if (bytes < SYNC_SMALL || o->header.magic != SYNC_MAGIC)
        return "this is no synchronisation object";
    if (o->header.version != SYNC_VERSION)
        return "made by another version of ipckit";
    uint32_t found = o->header.kind;
    if (sync_bytes(found) == 0 || o->header.size != sync_bytes(found) || bytes != sync_bytes(found) ||
        o->header.slots != (bytes == SYNC_LARGE ? SYNC_SLOTS : 0))
        return "damaged";
    return kind && found != kind ? "of another kind" : NULL;
}

/* -- slots ---------------------------------------------------------------------------------------------------------- */

static uint32_t high(struct sync_object *o)
{
    uint32_t count = LOAD(o->crowd.high);
    return count < SYNC_SLOTS ? count : SYNC_SLOTS;
}

static uint32_t life(struct slot *s)
{
    return atomic_load_explicit(&s->own.word, memory_order_acquire); /* SYNC POINT: life */
}

static bool alive(struct slot *s)
{
    return (life(s) & OWNER_MASK) != 0;
}

static bool dead(struct slot *s)
{
    return (life(s) & (OWNER_DIED | OWNER_MASK)) == OWNER_DIED;
}

static bool waits(struct slot *s)
{
    return LOAD(s->own.more) == NOBODY;
}

static bool inside(struct slot *s)
{
    return LOAD(s->own.more) == GATE_OPEN;
}

static struct slot *eldest(struct sync_object *o)
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

static uint32_t free_slot(struct sync_object *o)
{
    uint32_t i = 0;
    while (i < SYNC_SLOTS && life(&o->slots[i]) != 0)
        i++;
    return i;
}

static void let_in(struct self *me, struct slot *s)
{
    word_open(me, &s->own.more, GATE_OPEN, 1);
}

/* -- who is let in -------------------------------------------------------------------------------------------------- */

static void refuse_waiters(struct sync_object *o, struct self *me)
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

static void notify(struct sync_object *o, struct self *me, uint32_t count)
{
    struct slot *next;
    while (count-- > 0 && (next = eldest(o)))
        let_in(me, next);
}

static void settle(struct sync_object *o, struct self *me)
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

static void sweep(struct sync_object *o, struct self *me)
{
    for (uint32_t i = 0; i < high(o); i++)
        if (dead(&o->slots[i]))
            bury(o, me, i);
    settle(o, me);
}

/* -- the monitor ---------------------------------------------------------------------------------------------------- */

static enum verdict monitor_enter(struct sync_object *o, struct attempt *attempt, struct naps *naps)
{
    struct attempt own = *attempt; /* with its courtesy so far */
    own.claim = CLAIM_TAKE;
    own.task = false;
    own.slept = attempt->slept && attempt->at_monitor;
    own.at_monitor = true;
    if (!own.slept)
        nap_forget(self_here());
    enum verdict verdict = mutex_try(&o->monitor, &own, naps);
    attempt->at_monitor = verdict == WAIT;
    attempt->gave_way = own.gave_way;
    attempt->since = own.since;
    if (verdict == INHERITED) {
        uint32_t last = SYNC_SLOTS; /* the one thing that follows from the slots and is not worked out anew each time */
        STORE(o->crowd.high, last);
        sweep(o, self_here());
        while (last > 0 && life(&o->slots[last - 1]) == 0)
            last--;
        STORE(o->crowd.high, last);
        return DONE;
    }
    return verdict == SELF ? CORRUPT : verdict;
}

static enum verdict monitor_leave(struct sync_object *o, enum verdict verdict)
{
    STEP(60);
    mutex_release(&o->monitor, false);
    return verdict;
}

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
    STORE(s->generation, LOAD(o->crowd.turn));
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
    if (!me)
        return NO_KERNEL;
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

/* -- leaving, and letting others in --------------------------------------------------------------------------------- */

enum verdict crowd_leave(struct sync_object *o, enum role role, int32_t slot, bool abandon, struct attempt *attempt,
                         struct naps *naps)
{
    struct self *me = self_here();
    if (!me)
        return NO_KERNEL;
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

enum verdict semaphore_post(struct sync_object *o, uint32_t count, struct attempt *attempt, struct naps *naps)
{
    struct self *me = self_here();
    if (!me)
        return NO_KERNEL;
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

enum verdict condition_notify(struct sync_object *o, uint32_t count, struct attempt *attempt, struct naps *naps)
{
    struct self *me = self_here();
    if (!me)
        return NO_KERNEL;
    enum verdict verdict = monitor_enter(o, attempt, naps);
    if (verdict != DONE)
        return verdict;
    sweep(o, me);
    notify(o, me, count);
    return monitor_leave(o, DONE);
}

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
    if (!me)
        return NO_KERNEL;
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
    uint32_t turn = LOAD(o->crowd.turn) + 1;                                     /* never 0: that is "not looked yet" */
    if (attempt->seen == 0)
        attempt->seen = turn;
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
