/* lock.h — locks that their owner's death does not lose: robust words, the mutex over one, and the sleep of those who wait.
 *
 * Plain C, Linux with glibc. Nothing here blocks but nap(): what cannot go on returns WAIT and says in a `struct naps` which words
 * to sleep on; the caller tries again afterwards. Attempts may be given up at any time, with mutex_give_up.
 *
 * Death. While a thread owns a word, the word is on the thread's robust list; while it takes, releases or waits for one, the word is
 * its list's "pending" entry. When the thread ends, however it ends, the kernel (exit_robust_list) marks every owned word OWNER_DIED
 * and wakes one who waits there; and where the pending word has no owner it wakes one as well, so that a wake-up which a
 * thread took with it to its death is passed on. Whoever it wakes tells the others.
 *
 * A word that says OWNER_DIED is abandoned: it stays so, and refuses everybody, until someone repairs (CLAIM_RECOVER).
 *
 * The witness. Those who wait for a Condition do not want its mutex, but they want to hear of its owner's death. They cannot sleep on
 * the mutex's word: every release would wake them. So its owner owns a second robust word, which says WAITERS all the time: taking it and
 * letting go of it are plain stores that wake nobody, and the kernel, which finds it on the list of a dead owner, wakes one of them.
 * Between the mutex and its witness a kill can come; then they hear of it when their sleep ends, a second later. */
#ifndef IPCKIT_LOCK_H
#define IPCKIT_LOCK_H

#include <linux/futex.h>
#include <stdbool.h>

#include "sync_layout.h"

enum verdict {
    DONE = 0,
    WAIT = 1,       /* not now; `naps`, if given, says what to sleep on */
    DIED = 2,       /* abandoned; not taken */
    BROKEN = 3,     /* of a barrier */
    NOT_MINE = 4,   /* released by one who does not own it */
    SELF = 5,       /* the caller owns it: waiting would be for ever */
    FULL = 6,       /* no slot is free, or this thread holds as many as the kernel looks after */
    OVER = 7,       /* released more often than acquired */
    NO_KERNEL = 8,  /* robust futexes do not work here */
    CORRUPT = 9,    /* the shared memory says what cannot be */
    INHERITED = 10, /* done, and the last owner had died */
    OUT = 11,       /* given up */
};

enum claim { CLAIM_PLAIN, CLAIM_TAKE, CLAIM_RECOVER };

struct nap {
    _Atomic uint32_t *word;
    uint32_t seen; /* sleep only while it is this */
    enum watch { QUIET, LIFE, WITNESS } watch; /* others may watch the same word: whoever hears of its end tells them */
};

#define MOST_NAPS 120 /* the kernel takes 128 */
struct naps {
    unsigned count;
    struct nap at[MOST_NAPS];
    uint32_t bits;             /* of FUTEX_WAIT_BITSET, for one nap */
    int64_t at_most;           /* ns; 0: no bound of its own */
    _Atomic uint32_t *forward; /* pending while asleep: its wake-up is passed on if we are killed with it */
};

/* One thread's (or task's) way to one lock, from its first try to its last. Begin with zeros and `claim`. */
struct attempt {
    enum claim claim;
    bool task;          /* one of several tasks of this thread: what the thread owns, another task may give back */
    bool slept;         /* between two tries */
    bool once;          /* a crowd's: do not sit down to wait; WAIT is the answer, unless at_monitor */
    uint32_t gave_way;  /* to whom the word was reserved when we last stood back */
    int64_t since;      /* when we began to */
    int32_t slot;       /* in a crowd: index + 1 */
    bool at_monitor;    /* a crowd's: it slept for the monitor */
    bool looked;        /* Event: `seen` is known */
    uint32_t seen;      /* Event: how often it had been set; Barrier: how many were there before */
    struct mutex *lock; /* of a listener: DIED when this is abandoned; NULL: it does not care */
};

/* What this thread is to the kernel. */
struct self {
    unsigned forks; /* of the process, when this was looked up */
    uint32_t tid, pid;
    struct robust_list_head *head;
    unsigned count;
    struct held {
        struct robust_word *word;
        uint64_t next; /* the truth; the copy in shared memory is for the kernel */
    } held[256];
};

/* A pointer, because there is little room for thread-local data that a loaded library reaches without a function call. It is freed
 * when the thread ends, after the last code that could take a lock. */
extern _Thread_local struct self *self_ __attribute__((tls_model("initial-exec")));
extern unsigned self_forks;
struct self *self_look(void); /* NULL: no robust futexes here */
static inline struct self *self_here(void)
{
    struct self *me = self_;
    return __builtin_expect(me && me->forks == self_forks, 1) ? me : self_look();
}

/* Take the word: WAIT if it is owned. Fills `naps` if given. */
enum verdict mutex_try(struct mutex *m, struct attempt *attempt, struct naps *naps);
/* The common case in one instruction: it was free. False says nothing but "ask mutex_try". */
static inline bool mutex_try_free(struct mutex *m);
/* Give up after WAIT. */
void mutex_give_up(struct mutex *m, struct attempt *attempt);
/* Release; `abandon`: leave it abandoned. NOT_MINE unless this thread owns it. */
enum verdict mutex_release(struct mutex *m, bool abandon);
bool mutex_mine(struct mutex *m);
/* For one who waits for a Condition over it. */
bool mutex_abandoned(struct mutex *m);
/* Somebody is about to wait for a Condition over it. */
void mutex_watch(struct mutex *m);
static inline struct robust_word *witness_of(struct mutex *m)
{
    return (struct robust_word *)((char *)m + offsetof(struct sync_object, witness) - offsetof(struct sync_object, mutex));
}
void witness_take(struct self *me, struct mutex *m);

/* Robust words by themselves, for crowds: own one that is 0 and nobody else looks for (the monitor is held); let go of it. */
void word_own(struct self *me, struct robust_word *word);
void word_disown(struct self *me, struct robust_word *word);

/* Set a word to a value without owner, and wake `count` of those who sleep on it; if we are killed in between, the kernel wakes one. */
void word_open(struct self *me, _Atomic uint32_t *word, uint32_t value, int count);

/* Sleep until one of the words is not what was seen, or woken (0); or until `deadline` (CLOCK_MONOTONIC, ns): ETIMEDOUT; or a signal, or a
 * second passed: EINTR. `control`: another word, of this process, 0 while the sleep goes on; or NULL. */
int nap(struct self *me, struct naps *naps, int64_t deadline, _Atomic uint32_t *control);
/* After a nap that is not followed by a try of the same word. */
void nap_forget(struct self *me);

int futex_wake(_Atomic uint32_t *word, int count);
int64_t clock_ns(void);

/* -- the fast path, inline ------------------------------------------------------------------------------------------ */

/* Some places are kept for monitors and witnesses, or one who holds too many locks could not leave a crowd. */
static inline bool self_full(const struct self *me)
{
    return me->count + 6 >= sizeof me->held / sizeof *me->held;
}

#define BARRIER() atomic_signal_fence(memory_order_seq_cst) /* the kernel looks at this thread's memory from this thread */

void word_record(struct self *me, struct robust_word *word);

static inline uint64_t entry_of(void *word)
{
    return (uint64_t)(uintptr_t)word + offsetof(struct robust_word, next);
}

static inline void pending(struct self *me, void *word)
{
    BARRIER();
    *(struct robust_list *volatile *)&me->head->list_op_pending = word ? (struct robust_list *)(uintptr_t)entry_of(word) : NULL;
    BARRIER();
}

/* Onto the front of the list, as the C library does it. */
static inline void word_link(struct self *me, struct robust_word *word)
{
    uint64_t first = (uint64_t)(uintptr_t)me->head->list.next;
    word->next = first;
    word->previous = (uint64_t)(uintptr_t)me->head;
    me->held[me->count++] = (struct held){word, first};
    BARRIER();
    *(volatile uint64_t *)(uintptr_t)((first & ~UINT64_C(1)) - 8) = entry_of(word);
    *(struct robust_list *volatile *)&me->head->list.next = (struct robust_list *)(uintptr_t)entry_of(word);
    BARRIER();
}

static inline bool mutex_try_free(struct mutex *m)
{
    struct self *me = self_here();
    if (!me || self_full(me))
        return false;
    pending(me, m);
    uint32_t free = 0;
    /* SYNC POINT: mutex handover. Acquire: what the last owner wrote before its release is here. */
    bool got = atomic_compare_exchange_strong_explicit(&m->own.word, &free, me->tid, memory_order_acquire,
                                                       memory_order_relaxed);
    if (got) {
        word_link(me, &m->own);
        if (__builtin_expect(atomic_load_explicit(&m->watched, memory_order_relaxed) != 0, 0))
            witness_take(me, m);
        word_record(me, &m->own);
    }
    pending(me, NULL);
    return got;
}

#endif
