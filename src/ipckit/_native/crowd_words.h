/* crowd_words.h — what the parts of a crowd share. Nobody else includes it.
 *
 *   crowd_settle.c   who is there, who died, who is let in; the monitor
 *   crowd.c          coming in, waiting, leaving
 *   crowd_verbs.c    what each kind can do besides: post, notify, open, break, set
 *   sync_object.c    the bytes of a new one
 *
 * All but the predicates wants the monitor. */
#ifndef IPCKIT_CROWD_WORDS_H
#define IPCKIT_CROWD_WORDS_H

#include "crowd.h"
#include "steps.h"

#define LOAD(word) atomic_load_explicit(&(word), memory_order_relaxed) /* the monitor orders them */
#define STORE(word, value) atomic_store_explicit(&(word), value, memory_order_relaxed)

static inline uint32_t high(struct sync_object *o)
{
    uint32_t count = LOAD(o->crowd.high);
    return count < SYNC_SLOTS ? count : SYNC_SLOTS;
}

static inline uint32_t life(struct slot *s)
{
    return atomic_load_explicit(&s->own.word, memory_order_acquire); /* SYNC POINT: life */
}

static inline bool alive(struct slot *s)
{
    return (life(s) & OWNER_MASK) != 0;
}

static inline bool dead(struct slot *s)
{
    return (life(s) & (OWNER_DIED | OWNER_MASK)) == OWNER_DIED;
}

static inline bool waits(struct slot *s)
{
    return LOAD(s->own.more) == NOBODY;
}

static inline bool inside(struct slot *s)
{
    return LOAD(s->own.more) == GATE_OPEN;
}

/* Who has waited longest; NULL. */
struct slot *eldest(struct sync_object *o);
/* SYNC_SLOTS: none is free. */
uint32_t free_slot(struct sync_object *o);
void let_in(struct self *me, struct slot *s);
void refuse_waiters(struct sync_object *o, struct self *me);
/* Let in as many of those who wait as there is room for. */
void settle(struct sync_object *o, struct self *me);
/* Bury the dead, and settle. */
void sweep(struct sync_object *o, struct self *me);
/* Let in `count` of those who wait, the eldest first. */
void notify(struct sync_object *o, struct self *me, uint32_t count);

/* The monitor: DONE, and then this thread has a `self`; or WAIT (`naps` says what to sleep on), or why not. Leaving hands `verdict` through. */
enum verdict monitor_enter(struct sync_object *o, struct attempt *attempt, struct naps *naps);
enum verdict monitor_leave(struct sync_object *o, enum verdict verdict);

#endif
