/* lock.c — the robust mutex; see lock.h for what it promises and sync_layout.h for its bytes.
 *
 * WAITERS is sticky: a release keeps it, and whoever takes the word keeps it, until a release finds that nobody was asleep. So it
 * does no harm when a woken waiter is killed, or loses the word to another: the new owner's release wakes the next.
 *
 * Fairness. Whoever comes by may take a free word, which keeps it moving. But a waiter that was woken and found it taken reserves it
 * (`more` holds its thread id): the next release wakes it and nobody else, and others stand back. They do so for COURTESY_NS at most,
 * so a reservation whose maker was killed or stopped costs that much once. */
#include "lock.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "steps.h"

#define COURTESY_NS INT64_C(10000000)
/* A wake-up that is lost for a reason that we did not think of costs a second, not a hang. The tests do without. */
#ifdef IPCKIT_STEPS
#define SLEEP_NS INT64_C(1000000000000)
void (*step_hook)(int number);
#else
#define SLEEP_NS INT64_C(1000000000)
#endif

_Thread_local struct self *self_;
unsigned self_forks = 1;

/* -- this thread ---------------------------------------------------------------------------------------------------- */

static void count_fork(void)
{
    self_forks++;
}

static pthread_key_t ends; /* of a thread that was looked up */

static void forget(void *me)
{
    self_ = NULL;
    free(me);
}

static void at_first(void)
{
    pthread_atfork(NULL, NULL, count_fork);
    pthread_key_create(&ends, forget);
}

struct self *self_look(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, at_first);
    struct robust_list_head *head = NULL;
    size_t size = 0;
    /* The head is the C library's: one for each thread, and no thread can have two. So we join its list, whose form is the kernel's. */
    if (syscall(SYS_get_robust_list, 0, &head, &size) != 0 || head == NULL || size != sizeof *head ||
        head->futex_offset != -(long)offsetof(struct robust_word, next))
        return NULL;
    if (!self_) {
        struct self *fresh = calloc(1, sizeof *fresh);
        if (!fresh || pthread_setspecific(ends, fresh) != 0) {
            free(fresh);
            return NULL;
        }
        self_ = fresh;
    }
    self_->head = head;
    self_->tid = (uint32_t)syscall(SYS_gettid);
    self_->pid = (uint32_t)getpid();
    self_->count = 0;
    self_->forks = self_forks;
    return self_;
}

int64_t clock_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

void word_record(struct self *me, struct robust_word *word)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME_COARSE, &now);
    atomic_store_explicit(&word->tid, 0, memory_order_relaxed);
    atomic_store_explicit(&word->pid, me->pid, memory_order_relaxed);
    atomic_store_explicit(&word->since, (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec, memory_order_relaxed);
    atomic_store_explicit(&word->tid, me->tid, memory_order_release); /* SYNC POINT: owner record */
}

/* -- the robust list ------------------------------------------------------------------------------------------------ */

static volatile uint64_t *at(uint64_t address)
{
    return (volatile uint64_t *)(uintptr_t)(address & ~UINT64_C(1));
}

/* Off the list. Links in shared memory may have been scribbled over, so between words of ours only our own copies count;
 * beside a robust mutex of the C library's, which changes its neighbours' links in place, those in memory do. */
static void word_unlink(struct self *me, struct robust_word *word)
{
    unsigned i = me->count;
    while (i-- > 0 && me->held[i].word != word)
        ;
    if (i > me->count)
        return; /* the memory says that it is ours, and it is not */
    uint64_t head = (uint64_t)(uintptr_t)me->head, mine = entry_of(word), next = me->held[i].next;
    bool known = next == head || (i > 0 && next == entry_of(me->held[i - 1].word));
    if (!known)
        next = word->next;
    uint64_t before = word->previous;
    if (i + 1 == me->count) {
        if ((uint64_t)(uintptr_t)me->head->list.next == mine)
            before = head;
    } else if (me->held[i + 1].next == mine) {
        before = entry_of(me->held[i + 1].word);
        me->held[i + 1].next = next;
    }
    BARRIER();
    *at(before) = next; /* for the head as well: its first member is the link */
    at(next)[-1] = before;
    BARRIER();
    for (me->count--; i < me->count; i++)
        me->held[i] = me->held[i + 1];
}

void word_own(struct self *me, struct robust_word *word)
{
    pending(me, word);
    atomic_store_explicit(&word->word, me->tid, memory_order_relaxed);
    STEP(20);
    word_link(me, word);
    STEP(21);
    pending(me, NULL);
    word_record(me, word);
}

void word_disown(struct self *me, struct robust_word *word)
{
    pending(me, word);
    STEP(22);
    word_unlink(me, word);
    STEP(23);
    uint32_t was = atomic_exchange_explicit(&word->word, 0, memory_order_release); /* SYNC POINT: life */
    STEP(24);
    if (was & WAITERS)
        futex_wake(&word->word, INT32_MAX);
    STEP(25);
    pending(me, NULL);
}

void word_open(struct self *me, _Atomic uint32_t *word, uint32_t value, int count)
{
    pending(me, word);
    uint32_t was = atomic_exchange_explicit(word, value, memory_order_acq_rel); /* SYNC POINT: gate */
    STEP(30);
    if (was != value)
        futex_wake(word, count);
    STEP(31);
    pending(me, NULL);
}

/* -- sleeping ------------------------------------------------------------------------------------------------------- */

int futex_wake(_Atomic uint32_t *word, int count)
{
    return (int)syscall(SYS_futex, word, FUTEX_WAKE, count, NULL, NULL, 0);
}

static int wake_bits(_Atomic uint32_t *word, int count, uint32_t bits)
{
    return (int)syscall(SYS_futex, word, FUTEX_WAKE_BITSET, count, NULL, NULL, bits);
}

static int sleep_on(struct naps *naps, int64_t until, _Atomic uint32_t *control)
{
    struct timespec limit = {until / 1000000000, until % 1000000000};
    if (naps->count == 1 && !control) {
        uint32_t bits = naps->bits ? naps->bits : FUTEX_BITSET_MATCH_ANY;
        return syscall(SYS_futex, naps->at[0].word, FUTEX_WAIT_BITSET, naps->at[0].seen, &limit, NULL, bits) < 0 ? errno : 0;
    }
    struct futex_waitv waits[MOST_NAPS + 1];
    unsigned count = 0;
    for (; count < naps->count; count++)
        waits[count] = (struct futex_waitv){naps->at[count].seen, (uintptr_t)naps->at[count].word, FUTEX_32, 0};
    if (control)
        waits[count++] = (struct futex_waitv){0, (uintptr_t)control, FUTEX_32 | FUTEX_PRIVATE_FLAG, 0};
    if (syscall(SYS_futex_waitv, waits, count, 0, &limit, CLOCK_MONOTONIC) >= 0)
        return 0;
    if (errno != ENOSYS && errno != EPERM)
        return errno;
    /* Before Linux 5.16, and where a sandbox forbids it: look every 10 ms. */
    for (unsigned i = 0; i < naps->count; i++)
        if (atomic_load_explicit(naps->at[i].word, memory_order_acquire) != naps->at[i].seen)
            return 0;
    int64_t soon = clock_ns() + 10000000;
    if (soon > until)
        soon = until;
    limit = (struct timespec){soon / 1000000000, soon % 1000000000};
    if (syscall(SYS_futex, naps->at[0].word, FUTEX_WAIT_BITSET, naps->at[0].seen, &limit, NULL, FUTEX_BITSET_MATCH_ANY) >= 0)
        return 0;
    return errno == ETIMEDOUT && soon < until ? EINTR : errno; /* its patience is not over, only this sleep */
}

int nap(struct self *me, struct naps *naps, int64_t deadline, _Atomic uint32_t *control)
{
    int64_t now = clock_ns();
    if (now >= deadline)
        return ETIMEDOUT;
    int64_t until = now + (naps->at_most ? naps->at_most : SLEEP_NS);
    if (until > deadline)
        until = deadline;
    pending(me, naps->forward);
    STEP(40);
    int error = sleep_on(naps, until, control);
    STEP(41);
    for (unsigned i = 0; i < naps->count; i++) {
        struct nap *one = &naps->at[i];
        uint32_t word = one->watch ? atomic_load_explicit(one->word, memory_order_acquire) : one->seen; /* SYNC POINT: life */
        if (word != one->seen && (one->watch == LIFE || (word & OWNER_DIED)))
            futex_wake(one->word, INT32_MAX);
    }
    STEP(42);
    if (error != EINTR && error != ETIMEDOUT)
        return 0;
    pending(me, NULL); /* not woken, so there is nothing to pass on; and signal handlers may take locks */
    return error == ETIMEDOUT && until == deadline ? ETIMEDOUT : EINTR;
}

void nap_forget(struct self *me)
{
    pending(me, NULL);
}

/* -- the mutex ------------------------------------------------------------------------------------------------------ */

bool mutex_mine(struct mutex *m)
{
    struct self *me = self_here();
    return me && (atomic_load_explicit(&m->own.word, memory_order_relaxed) & OWNER_MASK) == me->tid;
}

bool mutex_abandoned(struct mutex *m)
{
    /* The witness as well: the kernel marks it first, and wakes who sleeps there before it has come to the mutex. */
    return (atomic_load_explicit(&m->own.word, memory_order_acquire) |
            atomic_load_explicit(&witness_of(m)->word, memory_order_acquire)) & OWNER_DIED;
}

void mutex_watch(struct mutex *m)
{
    atomic_store_explicit(&m->watched, 1, memory_order_relaxed);
}

/* We own the mutex, and so nobody else comes near its witness but to sleep. */
void witness_take(struct self *me, struct mutex *m)
{
    struct robust_word *witness = witness_of(m);
    pending(me, witness);
    atomic_store_explicit(&witness->word, me->tid | WAITERS, memory_order_relaxed);
    STEP(16);
    word_link(me, witness);
    STEP(17);
    pending(me, NULL);
}

static void witness_drop(struct self *me, struct mutex *m, bool abandon)
{
    struct robust_word *witness = witness_of(m);
    if ((atomic_load_explicit(&witness->word, memory_order_relaxed) & OWNER_MASK) != me->tid)
        return; /* we took the mutex before it was watched */
    pending(me, witness);
    atomic_store_explicit(&witness->word, abandon ? WAITERS | OWNER_DIED : WAITERS, memory_order_release);
    STEP(18);
    word_unlink(me, witness);
    STEP(19);
    if (abandon)
        futex_wake(&witness->word, INT32_MAX);
}

/* Others have waited longer: may we take the free word? */
static bool courteous(struct mutex *m, struct self *me, struct attempt *attempt)
{
    uint32_t reserved = atomic_load_explicit(&m->own.more, memory_order_relaxed);
    if (reserved == 0 || reserved == me->tid)
        return true;
    int64_t now = clock_ns();
    if (attempt->gave_way != reserved) {
        attempt->gave_way = reserved;
        attempt->since = now;
    }
    if (now - attempt->since < COURTESY_NS)
        return false;
    atomic_compare_exchange_strong_explicit(&m->own.more, &reserved, 0, memory_order_relaxed, memory_order_relaxed);
    return true;
}

/* A reservation that outlived its need would keep others from making theirs. */
static bool unreserve(struct mutex *m, struct self *me)
{
    uint32_t mine = me->tid;
    return atomic_load_explicit(&m->own.more, memory_order_relaxed) == mine &&
           atomic_compare_exchange_strong_explicit(&m->own.more, &mine, 0, memory_order_relaxed, memory_order_relaxed);
}

static enum verdict taken(struct mutex *m, struct self *me, uint32_t was)
{
    STEP(1);
    word_link(me, &m->own);
    STEP(2);
    if (atomic_load_explicit(&m->watched, memory_order_relaxed))
        witness_take(me, m);
    unreserve(m, me);
    pending(me, NULL);
    STEP(3);
    word_record(me, &m->own);
    return was & OWNER_DIED ? INHERITED : DONE;
}

static enum verdict busy(struct mutex *m, struct self *me, struct attempt *attempt, struct naps *naps, uint32_t word)
{
    if (attempt->slept && naps && (word & OWNER_MASK) != 0) {
        uint32_t whose = 0;
        bool ours = atomic_compare_exchange_strong_explicit(&m->own.more, &whose, me->tid, memory_order_relaxed,
                                                            memory_order_relaxed);
        if (!ours && whose == (word & OWNER_MASK)) /* it has what it was reserved for, and took it without a look */
            atomic_compare_exchange_strong_explicit(&m->own.more, &whose, me->tid, memory_order_relaxed, memory_order_relaxed);
    }
    STEP(5);
    if (naps) {
        naps->count = 1;
        naps->at[0] = (struct nap){&m->own.word, word, QUIET};
        naps->bits = UINT32_C(1) << me->tid % 31;
        naps->at_most = (word & OWNER_MASK) ? 0 : COURTESY_NS;
        naps->forward = &m->own.word;
    } else
        pending(me, NULL);
    return WAIT;
}

enum verdict mutex_try(struct mutex *m, struct attempt *attempt, struct naps *naps)
{
    struct self *me = self_here();
    if (!me)
        return NO_KERNEL;
    if (self_full(me) && !attempt->at_monitor)
        return FULL;
    pending(me, m);
    STEP(0);
    uint32_t word = atomic_load_explicit(&m->own.word, memory_order_relaxed);
    for (;;) {
        uint32_t owner = word & OWNER_MASK;
        if (owner == me->tid && !attempt->task) {
            pending(me, NULL);
            return SELF;
        }
        if ((word & OWNER_DIED) && attempt->claim == CLAIM_PLAIN) {
            if (word & WAITERS)
                futex_wake(&m->own.word, INT32_MAX); /* the kernel told one of us */
            STEP(6);
            unreserve(m, me);
            pending(me, NULL);
            return DIED;
        }
        if (owner == 0) {
            if (!(word & OWNER_DIED) && word && !courteous(m, me, attempt))
                return busy(m, me, attempt, naps, word);
            uint32_t mine = me->tid | (word & WAITERS) | (attempt->slept ? WAITERS : 0);
            if (attempt->claim == CLAIM_RECOVER)
                mine |= word & OWNER_DIED;
            /* SYNC POINT: mutex handover */
            if (atomic_compare_exchange_weak_explicit(&m->own.word, &word, mine, memory_order_acquire, memory_order_relaxed))
                return taken(m, me, word);
            continue;
        }
        if (naps && !(word & WAITERS)) {
            if (!atomic_compare_exchange_weak_explicit(&m->own.word, &word, word | WAITERS, memory_order_relaxed,
                                                       memory_order_relaxed))
                continue;
            word |= WAITERS;
        }
        return busy(m, me, attempt, naps, word);
    }
}

void mutex_give_up(struct mutex *m, struct attempt *attempt)
{
    struct self *me = self_here();
    bool reserved = unreserve(m, me);
    uint32_t word = atomic_load_explicit(&m->own.word, memory_order_relaxed);
    if (attempt->slept || reserved) {
        while ((word & OWNER_MASK) && !(word & WAITERS) &&
               !atomic_compare_exchange_weak_explicit(&m->own.word, &word, word | WAITERS, memory_order_relaxed,
                                                      memory_order_relaxed))
            ;
        if (!(word & OWNER_MASK))
            futex_wake(&m->own.word, 1); /* the wake-up that we got, or that our reservation kept from the others */
    }
    STEP(7);
    pending(me, NULL);
}

static void wake_next(struct mutex *m)
{
    uint32_t reserved = atomic_load_explicit(&m->own.more, memory_order_relaxed);
    int woken = reserved ? wake_bits(&m->own.word, INT32_MAX, UINT32_C(1) << reserved % 31) : 0;
    if (woken <= 0)
        woken = futex_wake(&m->own.word, 1);
    STEP(14);
    uint32_t flag = WAITERS;
    if (woken == 0)
        atomic_compare_exchange_strong_explicit(&m->own.word, &flag, 0, memory_order_relaxed, memory_order_relaxed);
}

enum verdict mutex_release(struct mutex *m, bool abandon)
{
    struct self *me = self_here();
    if (!me)
        return NO_KERNEL;
    uint32_t word = atomic_load_explicit(&m->own.word, memory_order_relaxed);
    if ((word & OWNER_MASK) != me->tid)
        return NOT_MINE;
    uint32_t after = abandon ? OWNER_DIED : 0;
    STEP(10);
    if (atomic_load_explicit(&m->watched, memory_order_relaxed))
        witness_drop(me, m, abandon);
    pending(me, m);
    STEP(11);
    word_unlink(me, &m->own);
    STEP(12);
    /* SYNC POINT: mutex handover. Release: what we wrote before is seen by the next owner. */
    while (!atomic_compare_exchange_weak_explicit(&m->own.word, &word, (word & WAITERS) | after, memory_order_release,
                                                  memory_order_relaxed))
        ;
    STEP(13);
    if (word & WAITERS) {
        if (abandon)
            futex_wake(&m->own.word, INT32_MAX);
        else
            wake_next(m);
    }
    STEP(15);
    pending(me, NULL);
    return DONE;
}
