/* links: lock.c sync_object.c crowd.c crowd_settle.c crowd_verbs.c
 *
 * What a kill at each numbered step of the native code leaves behind. A child runs a scenario on memory that it shares with us and dies
 * at the n-th step it comes by. Then the parent and one more child that waited must be told, or let in, and everything must work
 * afterwards. */
#include "blocking.h"

#include <sched.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

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
    _Atomic int inside; /* the survivors that hold the mutex */
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
        CHECK(mutex_mine(&o->mutex) && atomic_fetch_add(&journal->inside, 1) == 0);
        usleep(50);
        atomic_fetch_sub(&journal->inside, 1);
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

/* The last to come lets the others go. */
static void let_go(struct sync_object *o, int32_t slot)
{
    struct attempt attempt = {.slot = slot};
    struct naps naps;
    while (slot && barrier_open(o, &attempt, &naps) == WAIT)
        attempt.slept = nap(self_here(), &naps, INT64_MAX, NULL) == 0;
}

static void barrier_victim(struct sync_object *o)
{
    for (int i = 0; i < 2; i++) {
        struct attempt attempt = {0};
        if (enter_for(o, ROLE_PARTY, &attempt, PATIENCE) != DONE)
            _exit(0);
        let_go(o, attempt.slot);
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
        let_go(o, attempt.slot);
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
    RUN(kills_at_every_step);
    return 0;
}
