/* links: lock.c sync_object.c crowd.c crowd_settle.c crowd_verbs.c
 *
 * Robust words between threads, and what one death does to those who wait. Kills at each step: test_lock_kills.c. */
#include "blocking.h"

#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

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

/* -- where futex_waitv is not to be had: before Linux 5.16, and in some sandboxes ---------------------------------------- */

static void forbid_futex_waitv(void)
{
    struct sock_filter rules[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_futex_waitv, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | ENOSYS),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {sizeof rules / sizeof *rules, rules};
    CHECK(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 && prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0);
}

static pid_t waiter_without_futex_waitv(struct sync_object *o, int64_t patience, enum verdict expected)
{
    pid_t pid = fork();
    if (pid == 0) {
        alarm(30);
        forbid_futex_waitv();
        struct attempt attempt = {0};
        int64_t begin = clock_ns();
        CHECK(enter_for(o, ROLE_UNIT, &attempt, patience) == expected);
        CHECK(expected == DONE || clock_ns() - begin >= patience); /* to the end of its patience, and not of one sleep */
        _exit(0);
    }
    return pid;
}

static void reap(pid_t pid)
{
    int status;
    CHECK(waitpid(pid, &status, 0) == pid && WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

static void waits_without_futex_waitv(void)
{
    struct sync_object *o = made(SYNC_LEASED, 1, 1);
    pid_t inside = holder(o);
    await_count(o, false, 1);
    reap(waiter_without_futex_waitv(o, INT64_C(50000000), WAIT));
    pid_t waiter = waiter_without_futex_waitv(o, PATIENCE, DONE);
    await_count(o, true, 1);
    end(inside);
    reap(waiter);
    unmade(o);
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
    RUN(waits_without_futex_waitv);
    return 0;
}
