/* links: lock.c crowd.c
 *
 * Robust words: what a kill at each numbered step of the native code leaves behind, and what threads do to each other.
 *
 * A kill: a child runs a scenario on memory that it shares with us and dies at the n-th step it comes by. Then the parent and one more
 * child that waited must be told, or let in, and everything must work afterwards. */
#include "../../src/ipckit/_native/crowd.h"
#include "../../src/ipckit/_native/steps.h"

#include "check.h"

#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

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

/* -- the blocking forms, as the Python glue has them ------------------------------------------------------------------ */

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

/* -- one thread ------------------------------------------------------------------------------------------------------- */

static void lock_and_release(void)
{
    struct sync_object *o = made(SYNC_LOCK, 0, 0);
    struct attempt attempt = {0};
    CHECK(mutex_try_free(&o->mutex));
    CHECK(mutex_mine(&o->mutex));
    CHECK(mutex_try(&o->mutex, &attempt, NULL) == SELF);
    CHECK(mutex_release(&o->mutex, false) == DONE);
    CHECK(mutex_release(&o->mutex, false) == NOT_MINE);
    CHECK(self_here()->count == 0 && self_here()->head->list_op_pending == NULL);
    unmade(o);
}

/* Our words stand on the C library's list, beside its own robust mutexes. */
static void beside_pthread_mutexes(void)
{
    pthread_mutexattr_t attributes;
    pthread_mutexattr_init(&attributes);
    pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
    pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
    struct sync_object *ours[3];
    pthread_mutex_t theirs[3];
    for (int i = 0; i < 3; i++) {
        ours[i] = made(SYNC_LOCK, 0, 0);
        pthread_mutex_init(&theirs[i], &attributes);
    }
    for (unsigned order = 0; order < 720; order++) { /* every order of letting go */
        for (int i = 0; i < 3; i++) {
            CHECK(mutex_try_free(&ours[i]->mutex));
            CHECK(pthread_mutex_lock(&theirs[i]) == 0);
        }
        unsigned left[6] = {0, 1, 2, 3, 4, 5}, rest = order;
        for (unsigned n = 6; n > 0; n--) {
            unsigned pick = rest % n;
            rest /= n;
            unsigned which = left[pick];
            left[pick] = left[n - 1];
            CHECK((which & 1 ? pthread_mutex_unlock(&theirs[which / 2]) : (int)mutex_release(&ours[which / 2]->mutex, false)) == 0);
        }
        struct self *me = self_here();
        CHECK((void *)me->head->list.next == (void *)&me->head->list && me->count == 0);
    }
    for (int i = 0; i < 3; i++) {
        pthread_mutex_destroy(&theirs[i]);
        unmade(ours[i]);
    }
    pthread_mutexattr_destroy(&attributes);
}

/* Links that were scribbled over in shared memory lead nowhere. */
static void scribbled_links(void)
{
    struct sync_object *a = made(SYNC_LOCK, 0, 0), *b = made(SYNC_LOCK, 0, 0), *c = made(SYNC_LOCK, 0, 0);
    CHECK(mutex_try_free(&a->mutex) && mutex_try_free(&b->mutex) && mutex_try_free(&c->mutex));
    b->mutex.own.next = b->mutex.own.previous = c->mutex.own.next = 0x4141414141414141;
    CHECK(mutex_release(&b->mutex, false) == DONE && mutex_release(&c->mutex, false) == DONE);
    CHECK(mutex_release(&a->mutex, false) == DONE);
    atomic_store(&a->mutex.own.word, self_here()->tid); /* says that it is ours, and is on no list */
    CHECK(mutex_release(&a->mutex, false) == DONE);
    struct self *me = self_here();
    CHECK((void *)me->head->list.next == (void *)&me->head->list);
    unmade(a), unmade(b), unmade(c);
}

static void damaged_objects(void)
{
    struct sync_object *o = made(SYNC_RWLOCK, 0, 0);
    CHECK(sync_check(o, SYNC_SMALL, SYNC_RWLOCK) && sync_check(o, SYNC_LARGE, SYNC_LOCK) && sync_check(o, 64, 0));
    o->header.version++;
    CHECK(sync_check(o, SYNC_LARGE, SYNC_RWLOCK));
    o->header.version--;
    atomic_store(&o->crowd.high, UINT32_MAX);
    atomic_store(&o->crowd.running, UINT32_MAX);
    struct attempt attempt = {0};
    struct naps naps;
    CHECK(crowd_enter(o, ROLE_READ, &attempt, &naps) <= WAIT); /* whatever it says, it stays within the memory */
    unmade(o);
}

/* -- threads ---------------------------------------------------------------------------------------------------------- */

#define THREADS 4
#define ROUNDS 3000

static struct sync_object *shared;
static long guarded;

static void *add_under_mutex(void *unused)
{
    (void)unused;
    for (int i = 0; i < ROUNDS; i++) {
        CHECK(lock_for(&shared->mutex, CLAIM_PLAIN, PATIENCE) == DONE);
        guarded++;
        CHECK(mutex_release(&shared->mutex, false) == DONE);
    }
    return NULL;
}

static void *add_under_writer(void *unused)
{
    (void)unused;
    for (int i = 0; i < ROUNDS / 10; i++) {
        struct attempt write = {0}, read = {0};
        CHECK(enter_for(shared, ROLE_WRITE, &write, PATIENCE) == DONE);
        guarded++;
        CHECK(leave(shared, ROLE_WRITE) == DONE);
        CHECK(enter_for(shared, ROLE_READ, &read, PATIENCE) == DONE);
        CHECK(guarded > 0);
        CHECK(leave(shared, ROLE_READ) == DONE);
    }
    return NULL;
}

static void *add_under_unit(void *unused)
{
    (void)unused;
    for (int i = 0; i < ROUNDS / 10; i++) {
        struct attempt attempt = {0};
        CHECK(enter_for(shared, ROLE_UNIT, &attempt, PATIENCE) == DONE);
        guarded++;
        if (shared->header.kind == SYNC_LEASED)
            CHECK(leave(shared, ROLE_UNIT) == DONE);
        else
            INSIST(semaphore_post(shared, 1, attempt, &naps));
    }
    return NULL;
}

static long everybody(void *(*work)(void *), struct sync_object *o)
{
    pthread_t threads[THREADS];
    shared = o;
    guarded = 0;
    for (int i = 0; i < THREADS; i++)
        CHECK(pthread_create(&threads[i], NULL, work, NULL) == 0);
    for (int i = 0; i < THREADS; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
    unmade(o);
    return guarded;
}

static void threads_exclude_each_other(void)
{
    CHECK(everybody(add_under_mutex, made(SYNC_LOCK, 0, 0)) == THREADS * ROUNDS);
    CHECK(everybody(add_under_writer, made(SYNC_RWLOCK, 0, 0)) == THREADS * (ROUNDS / 10));
    CHECK(everybody(add_under_unit, made(SYNC_SEMAPHORE, 1, 1)) == THREADS * (ROUNDS / 10));
    CHECK(everybody(add_under_unit, made(SYNC_LEASED, 1, 1)) == THREADS * (ROUNDS / 10));
}

/* -- litmus ----------------------------------------------------------------------------------------------------------- */

/* Message passing through a handover: x and y are plain; whoever sees y sees x. And store buffering: of two that each
 * write their own and then read the other's, each in its own critical section, at least one sees the other. */
static struct {
    int x, y, seen_x, seen_y;
} litmus;
static _Atomic int turn;

static void in_mutex(void (*act)(void))
{
    CHECK(lock_for(&shared->mutex, CLAIM_PLAIN, PATIENCE) == DONE);
    act();
    CHECK(mutex_release(&shared->mutex, false) == DONE);
}

static void write_x(void) { litmus.x = 1; }
static void write_y(void) { litmus.y = 1; }
static void read_y(void) { litmus.seen_y = litmus.y; }
static void read_x(void) { litmus.seen_x = litmus.x; }

static void wait_turn(int round)
{
    while (atomic_load(&turn) < round)
        sched_yield();
}

static void *litmus_other(void *store_buffering)
{
    for (int round = 1; round <= 1000; round++) {
        wait_turn(2 * round - 1);
        if (store_buffering) {
            in_mutex(write_y);
            in_mutex(read_x);
        } else { /* both reads may come between the writes */
            in_mutex(read_y);
            in_mutex(read_x);
        }
        atomic_fetch_add(&turn, 1);
        wait_turn(2 * round + 1);
    }
    return NULL;
}

static void litmus_loops(void)
{
    for (int store_buffering = 0; store_buffering < 2; store_buffering++) {
        pthread_t other;
        shared = made(SYNC_LOCK, 0, 0);
        int seen[2][2] = {{0}};
        atomic_store(&turn, 0);
        CHECK(pthread_create(&other, NULL, litmus_other, store_buffering ? &turn : NULL) == 0);
        for (int round = 1; round <= 1000; round++) {
            memset(&litmus, 0, sizeof litmus);
            atomic_fetch_add(&turn, 1);
            in_mutex(write_x);
            in_mutex(store_buffering ? read_y : write_y);
            wait_turn(2 * round);
            seen[litmus.seen_x][litmus.seen_y]++;
        }
        atomic_fetch_add(&turn, 1);
        CHECK(pthread_join(other, NULL) == 0);
        /* legal: (x, y) = 00 10 11 when passing a message; 10 01 11 when each stores first */
        CHECK(store_buffering ? seen[0][0] == 0 : seen[0][1] == 0);
        unmade(shared);
    }
}

/* -- a kill at a chosen moment ---------------------------------------------------------------------------------------- */

static pid_t holder(struct sync_object *o)
{
    pid_t pid = fork();
    if (pid == 0) {
        struct attempt attempt = {0};
        alarm(30);
        CHECK(enter_for(o, ROLE_UNIT, &attempt, PATIENCE) == DONE);
        pause();
    }
    return pid;
}

static void await_count(struct sync_object *o, bool waiting, uint32_t count)
{
    while (crowd_count(o, ROLE_UNIT, waiting) != count)
        sched_yield();
}

static void end(pid_t pid)
{
    CHECK(kill(pid, SIGKILL) == 0 && waitpid(pid, NULL, 0) == pid);
}

/* Of two units one is passed on while two wait: the second of them, which had only the first to watch, hears of any death. */
static void the_next_in_line_watches_everybody(void)
{
    struct sync_object *o = made(SYNC_LEASED, 2, 2);
    struct attempt attempt = {0};
    int64_t begin = clock_ns();
    CHECK(enter_for(o, ROLE_UNIT, &attempt, PATIENCE) == DONE);
    pid_t inside = holder(o);
    await_count(o, false, 2);
    pid_t first = holder(o);
    await_count(o, true, 1);
    pid_t second = holder(o);
    await_count(o, true, 2);
    usleep(20000); /* both asleep, else this shows less */
    CHECK(leave(o, ROLE_UNIT) == DONE);
    await_count(o, true, 1);
    usleep(20000);
    end(inside);
    await_count(o, true, 0);
    CHECK(clock_ns() - begin < PATIENCE); /* it did not give up */
    end(first), end(second);
    unmade(o);
}

/* -- kills at every step ---------------------------------------------------------------------------------------------- */

static int kill_at, steps_taken;
static struct sync_object *killed_at; /* what the victim works on */
static _Thread_local bool told;

/* Shared by those of one scenario. */
static struct journal {
    _Atomic int64_t died_at;
    _Atomic int died_in; /* the number of the step */
    _Atomic int64_t worst;
    _Atomic int late, untold;
    _Atomic bool came; /* the one that died was a party to a barrier, and not let go yet */
} *journal;

#define SOON INT64_C(50000000)

static void maybe_die(int number)
{
    if (steps_taken++ == kill_at) {
        bool came = false;
        for (uint32_t i = 0; i < SYNC_SLOTS; i++)
            came |= (atomic_load(&killed_at->slots[i].own.word) & OWNER_MASK) == self_here()->tid &&
                    (atomic_load(&killed_at->slots[i].own.more) == NOBODY || atomic_load(&killed_at->crowd.running) == i + 1);
        atomic_store(&journal->came, came);
        atomic_store(&journal->died_in, number);
        atomic_store(&journal->died_at, clock_ns());
        raise(SIGKILL);
    }
}

/* A survivor knows, or is in: the first time after the death it is looked how long that took. */
static void tell(void)
{
    int64_t died_at = atomic_load(&journal->died_at);
    if (told || !died_at)
        return;
    told = true;
    int64_t took = clock_ns() - died_at, worst = atomic_load(&journal->worst);
    atomic_fetch_add(&journal->late, took > SOON);
    while (took > worst && !atomic_compare_exchange_weak(&journal->worst, &worst, took))
        ;
}

/* In the victim: the scenario. In the parent and in a bystander that waits meanwhile: what must be so afterwards. */
struct scenario {
    const char *name;
    uint32_t kind, value, limit;
    void (*victim)(struct sync_object *o);
    void (*survivor)(struct sync_object *o);
    void (*after)(struct sync_object *o);
};

static void mutex_victim(struct sync_object *o)
{
    for (int i = 0; i < 3; i++) {
        CHECK(lock_for(&o->mutex, CLAIM_TAKE, PATIENCE) <= INHERITED);
        usleep(200); /* so that the bystander waits */
        CHECK(mutex_release(&o->mutex, false) == DONE);
    }
}

static void mutex_survivor(struct sync_object *o)
{
    for (int i = 0; i < 4; i++) {
        enum verdict verdict = lock_for(&o->mutex, CLAIM_PLAIN, PATIENCE);
        if (verdict == DIED) {
            verdict = lock_for(&o->mutex, CLAIM_RECOVER, PATIENCE);
            CHECK(verdict == DONE || verdict == INHERITED);
        }
        CHECK(verdict == DONE || verdict == INHERITED);
        tell();
        guarded++; /* TSan and the next line would see a second one inside */
        CHECK(mutex_mine(&o->mutex));
        usleep(50);
        CHECK(mutex_release(&o->mutex, false) == DONE);
    }
}

static void mutex_after(struct sync_object *o)
{
    CHECK(!(atomic_load(&o->mutex.own.word) & (OWNER_MASK | OWNER_DIED)));
}

static void rw_turns(struct sync_object *o, int rounds)
{
    for (int i = 0; i < rounds; i++) {
        enum role role = i % 2 ? ROLE_READ : ROLE_WRITE;
        struct attempt attempt = {0};
        enum verdict verdict = enter_for(o, role, &attempt, PATIENCE);
        if (verdict == DIED) {
            role = ROLE_RECOVER;
            attempt = (struct attempt){0};
            verdict = enter_for(o, role, &attempt, PATIENCE);
        }
        CHECK(verdict == DONE || verdict == INHERITED);
        if (step_hook == NULL)
            tell();
        if (role != ROLE_READ)
            CHECK(crowd_count(o, ROLE_READ, false) == 0 &&
                  crowd_count(o, ROLE_WRITE, false) + crowd_count(o, ROLE_RECOVER, false) == 1);
        usleep(100);
        CHECK(leave(o, role) == DONE);
    }
}

static void rw_victim(struct sync_object *o) { rw_turns(o, 4); }
static void rw_survivor(struct sync_object *o) { rw_turns(o, 5); }

static void empty_after(struct sync_object *o)
{
    struct attempt attempt = {0};
    if (o->header.kind == SYNC_RWLOCK) {
        enum verdict verdict = enter_for(o, ROLE_RECOVER, &attempt, PATIENCE);
        CHECK(verdict == DONE || verdict == INHERITED);
        CHECK(leave(o, ROLE_RECOVER) == DONE);
    }
    for (uint32_t i = 0; i < SYNC_SLOTS; i++)
        CHECK((atomic_load(&o->slots[i].own.word) & OWNER_MASK) == 0); /* the dead go when they stand in somebody's way */
    CHECK((atomic_load(&o->monitor.own.word) & (OWNER_MASK | OWNER_DIED)) == 0);
}

static void leased_turns(struct sync_object *o, int rounds)
{
    for (int i = 0; i < rounds; i++) {
        struct attempt attempt = {0};
        CHECK(enter_for(o, ROLE_UNIT, &attempt, PATIENCE) == DONE);
        CHECK(crowd_count(o, ROLE_UNIT, false) <= 1);
        if (step_hook == NULL)
            tell();
        usleep(100);
        CHECK(leave(o, ROLE_UNIT) == DONE);
    }
}

static void leased_victim(struct sync_object *o) { leased_turns(o, 3); }
static void leased_survivor(struct sync_object *o) { leased_turns(o, 4); }

static void leased_after(struct sync_object *o)
{
    leased_turns(o, 1); /* the dead have been swept */
    CHECK(semaphore_value(o) == 1);
    empty_after(o);
}

static void barrier_victim(struct sync_object *o)
{
    for (int i = 0; i < 2; i++) {
        struct attempt attempt = {0};
        if (enter_for(o, ROLE_PARTY, &attempt, PATIENCE) != DONE)
            _exit(0);
        if (attempt.slot) {
            int32_t slot = attempt.slot;
            attempt = (struct attempt){.slot = slot};
            struct naps naps;
            while (barrier_open(o, &attempt, &naps) == WAIT)
                attempt.slept = nap(self_here(), &naps, INT64_MAX, NULL) == 0;
        }
    }
}

/* Three parties: the victim, and two of these. They pass together, or the barrier is broken; nobody waits for the dead. */
static void barrier_survivor(struct sync_object *o)
{
    for (int i = 0; i < 2; i++) {
        struct attempt attempt = {0};
        enum verdict verdict = enter_for(o, ROLE_PARTY, &attempt, INT64_C(300000000)); /* a victim that died before it came */
        if (verdict != WAIT && atomic_load(&journal->came))
            tell();
        if (verdict != DONE)
            return;
        if (attempt.slot) {
            int32_t slot = attempt.slot;
            attempt = (struct attempt){.slot = slot};
            struct naps naps;
            while (barrier_open(o, &attempt, &naps) == WAIT)
                attempt.slept = nap(self_here(), &naps, INT64_MAX, NULL) == 0;
        }
    }
}

static void barrier_after(struct sync_object *o)
{
    INSIST(barrier_break(o, true, attempt, &naps));
    CHECK(!(atomic_load(&o->crowd.flags) & CROWD_BROKEN));
    empty_after(o);
}

/* A plain semaphore: units go from hand to hand; only one that a killed process had is gone. */
static void unit_turns(struct sync_object *o, int rounds)
{
    for (int i = 0; i < rounds; i++) {
        struct attempt attempt = {0};
        enum verdict verdict = enter_for(o, ROLE_UNIT, &attempt, step_hook ? PATIENCE : INT64_C(300000000));
        if (verdict == WAIT)
            return; /* gone */
        CHECK(verdict == DONE);
        if (step_hook == NULL)
            tell();
        usleep(100);
        INSIST(semaphore_post(o, 1, attempt, &naps));
        CHECK(last == DONE);
    }
}

static void unit_victim(struct sync_object *o) { unit_turns(o, 3); }
static void unit_survivor(struct sync_object *o) { unit_turns(o, 4); }

static void unit_after(struct sync_object *o)
{
    struct attempt attempt = {0};
    struct naps naps;
    (void)crowd_give_up(o, ROLE_UNIT, &attempt, &naps); /* a sweep */
    INSIST(semaphore_post(o, 1, attempt, &naps));
    CHECK(semaphore_value(o) >= 1 && semaphore_value(o) <= 2);
    unit_turns(o, 1);
}

/* Two wait; the third comes, wakes them and goes. Whoever dies holding the mutex tells them as well. */
static enum verdict await_notice(struct sync_object *o, struct attempt *attempt)
{
    enum verdict verdict;
    while ((verdict = enter_for(o, ROLE_LISTENER, attempt, INT64_C(200000000))) == WAIT) {
        if (!atomic_load(&journal->died_at))
            continue;
        /* It died before it held the mutex, or between that and the witness; else we would know. */
        int in = atomic_load(&journal->died_in);
        if (mutex_abandoned(&o->mutex)) {
            atomic_fetch_add(&journal->untold, 1);
            if (clock_ns() - atomic_load(&journal->died_at) > 2 * SOON) /* else our patience ended at that moment */
                CHECK(in == 1 || in == 2 || in == 11 || in == 12);
            return DIED;
        }
        return WAIT;
    }
    tell();
    return verdict;
}

static void condition_survivor(struct sync_object *o)
{
    struct attempt attempt = {.lock = &o->mutex};
    struct naps naps = {0};
    enum verdict verdict = lock_for(&o->mutex, CLAIM_PLAIN, PATIENCE);
    if (verdict == DONE) {
        while ((verdict = crowd_enter(o, ROLE_LISTENER, &attempt, &naps)) == WAIT && attempt.slot == 0)
            attempt.slept = nap(self_here(), &naps, INT64_MAX, NULL) == 0;
        CHECK(verdict == WAIT && mutex_release(&o->mutex, false) == DONE);
        verdict = await_notice(o, &attempt);
        if (verdict != DIED)
            verdict = lock_for(&o->mutex, CLAIM_PLAIN, PATIENCE);
        if (attempt.slot) {
            int32_t slot = attempt.slot;
            INSIST(crowd_leave(o, ROLE_LISTENER, slot - 1, false, attempt, &naps));
            CHECK(last == DONE);
        }
    }
    if (verdict == DIED) {
        verdict = lock_for(&o->mutex, CLAIM_RECOVER, PATIENCE);
        CHECK(verdict == DONE || verdict == INHERITED);
    }
    CHECK(mutex_release(&o->mutex, false) == DONE);
}

static void condition_victim(struct sync_object *o)
{
    while (crowd_count(o, ROLE_LISTENER, true) < 2)
        sched_yield();
    CHECK(lock_for(&o->mutex, CLAIM_PLAIN, PATIENCE) == DONE);
    INSIST(condition_notify(o, UINT32_MAX, attempt, &naps));
    CHECK(last == DONE && mutex_release(&o->mutex, false) == DONE);
}

static void condition_after(struct sync_object *o)
{
    mutex_after(o);
    INSIST(condition_notify(o, 1, attempt, &naps));
    empty_after(o);
}

static void event_victim(struct sync_object *o) { event_set(o); }

static void event_survivor(struct sync_object *o)
{
    struct attempt attempt = {0};
    struct naps naps = {0};
    int64_t deadline = clock_ns() + INT64_C(300000000); /* a victim that died before it set it */
    while (event_try(o, &attempt, &naps) == WAIT) {
        int error = nap(self_here(), &naps, deadline, NULL);
        attempt.slept = error == 0;
        if (error == ETIMEDOUT) {
            CHECK(atomic_load(&o->crowd.event) != 0);
            return;
        }
    }
}

static void event_after(struct sync_object *o)
{
    event_set(o);
    CHECK(atomic_load(&o->crowd.event) == 0);
}

static const struct scenario scenarios[] = {
    {"mutex", SYNC_LOCK, 0, 0, mutex_victim, mutex_survivor, mutex_after},
    {"rwlock", SYNC_RWLOCK, 0, 0, rw_victim, rw_survivor, empty_after},
    {"leased", SYNC_LEASED, 1, 1, leased_victim, leased_survivor, leased_after},
    {"barrier", SYNC_BARRIER, 0, 3, barrier_victim, barrier_survivor, barrier_after},
    {"semaphore", SYNC_SEMAPHORE, 1, 0, unit_victim, unit_survivor, unit_after},
    {"condition", SYNC_CONDITION, 0, 0, condition_victim, condition_survivor, condition_after},
    {"event", SYNC_EVENT, 0, 0, event_victim, event_survivor, event_after},
};

/* 0: the victim came to its end before that step. */
static int kill_once(const struct scenario *s, int step)
{
    struct sync_object *o = made(s->kind, s->value, s->limit);
    atomic_store(&journal->died_at, 0);
    told = false;
    pid_t bystander = fork();
    if (bystander == 0) {
        alarm(30);
        s->survivor(o);
        _exit(0);
    }
    pid_t victim = fork();
    if (victim == 0) {
        alarm(30);
        kill_at = step;
        steps_taken = 0;
        killed_at = o;
        step_hook = maybe_die;
        s->victim(o);
        _exit(0);
    }
    s->survivor(o);
    int status;
    CHECK(waitpid(victim, &status, 0) == victim);
    int killed = WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL;
    CHECK(killed || (WIFEXITED(status) && WEXITSTATUS(status) == 0));
    CHECK(waitpid(bystander, &status, 0) == bystander);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    int64_t begin = clock_ns();
    if (s->kind == SYNC_LOCK && (atomic_load(&o->mutex.own.word) & OWNER_DIED))
        s->survivor(o); /* it died after the survivors had gone */
    told = true;
    s->after(o);
    CHECK(clock_ns() - begin < PATIENCE);
    unmade(o);
    return killed;
}

/* Processes hide their races from ThreadSanitizer, which makes each fork slow. */
#ifdef __SANITIZE_THREAD__
#define STRIDE 5
#else
#define STRIDE 1
#endif

static void kills_at_every_step(void)
{
    for (size_t i = 0; i < sizeof scenarios / sizeof *scenarios; i++) {
        int step = 0, quiet = 0;
        journal = mmap(NULL, sizeof *journal, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        CHECK(journal != MAP_FAILED);
        while (quiet < 3 && step < 400) { /* what it comes by depends on the others */
            quiet = kill_once(&scenarios[i], step) ? 0 : quiet + 1;
            step += STRIDE;
        }
        fprintf(stderr, "  %s: %d steps; survivors told after %.1f ms at worst, %d times after more than 50, %d times not\n",
                scenarios[i].name, step, (double)atomic_load(&journal->worst) / 1e6, atomic_load(&journal->late),
                atomic_load(&journal->untold));
        CHECK(step > 5);
        munmap(journal, sizeof *journal);
    }
}

int main(void)
{
    alarm(100);
    if (!self_look()) {
        fprintf(stderr, "no robust futexes here\n");
        return 0;
    }
    RUN(lock_and_release);
    RUN(beside_pthread_mutexes);
    RUN(scribbled_links);
    RUN(damaged_objects);
    RUN(threads_exclude_each_other);
    RUN(litmus_loops);
    RUN(the_next_in_line_watches_everybody);
    RUN(kills_at_every_step);
    return 0;
}
