/* broadcast.h — topics in shared memory: one publisher, many subscribers, each payload written once.
 *
 * The payload lies in an arena that subscribers map read-only. Each subscriber has a queue of its own: a ring of references to
 * payloads. The publisher keeps its own record of what every queue holds; from a subscriber it believes one number, how many
 * entries are gone, and checks it. So a subscriber that is slow, dead or hostile spoils its own queue and nothing else.
 *
 * An entry leaves a queue by one compare-and-swap of the queue's head: the subscriber's, after it has copied the message out, or the
 * publisher's, to drop it. Exactly one of them succeeds, so each message is either received or dropped, and both know.
 *
 * Plain C, no Python. Threads: one at a time in each `struct cast`, and in each `struct cast_in`. */
#ifndef IPCKIT_BROADCAST_H
#define IPCKIT_BROADCAST_H

#include "cast_arena.h"

enum cast_status {
    CAST_OK,
    CAST_WAIT,    /* on_full=block: no room now. Subscribing: nothing there */
    CAST_FULL,    /* on_full=error: somebody does not keep up */
    CAST_SCARCE,  /* the system has no memory: errno */
    CAST_GOODBYE, /* the publisher closed in order */
    CAST_ENDED,   /* the publisher's process ended */
    CAST_BROKEN,  /* what is in the shared memory cannot be */
};

enum cast_policy { CAST_BLOCK, CAST_DROP_OLD, CAST_DROP_NEW, CAST_ERROR };

/* -- publishing ---------------------------------------------------------------------------------------------------- */

struct cast_out { /* one subscriber, as the publisher sees it */
    struct queue_header *queue;
    struct queue_entry *entries;
    uint64_t bytes, slots; /* of the mapping; of the ring */
    int bell;              /* borrowed: rung when the subscriber sleeps */
    uint64_t tail, reaped, offered;
    uint64_t held;         /* bytes of the arena that its entries keep */
    uint64_t fresh;        /* bytes since it was reaped last */
    uint32_t *blocks;      /* of each entry, by its place */
    uint64_t *numbers;     /* which message it is, by its place */
    bool broken;
};

struct cast {
    struct arena arena;
    struct cast_out **outs; /* by slot; NULL: free */
    uint32_t room, count;   /* of outs; of those that are there */
    enum cast_policy policy;
    uint64_t backlog, number, dropped;
    uint32_t broken; /* how many were found broken and not removed yet */
};

int cast_open(struct cast *c, uint64_t size, uint64_t backlog, enum cast_policy policy); /* 0, or -1 and errno */
void cast_close(struct cast *c, bool goodbye); /* goodbye: whoever has read everything hears that it is over */

/* A queue for one more, of at least so many slots: its slot here and the memfd to pass on. 0, or -1 and errno. */
int cast_admit(struct cast *c, uint64_t slots, int bell, uint32_t *slot, int *memory);
void cast_remove(struct cast *c, uint32_t slot);

/* Room for a message of so many bytes to these subscribers: OK with *block (NO_BLOCK: nobody will get it), WAIT, FULL, SCARCE.
 * `force`: past the backlog, and dropped where there is no memory. After OK, fill the block and call cast_commit. */
enum cast_status cast_reserve(struct cast *c, const uint32_t *slots, uint32_t count, uint64_t bytes, bool force, uint32_t *block);
void cast_commit(struct cast *c, const uint32_t *slots, uint32_t count, uint32_t block, uint64_t bytes, uint64_t prefix, bool force);
void cast_copy(void *to, const void *from, uint64_t bytes); /* into shared memory that a reader may look at */

/* Announce that we wait for room. Reserve once more before sleeping on the room bells. */
void cast_want_room(struct cast *c);
/* Does it hold fewer than the backlog? */
bool cast_keeps_up(struct cast *c, uint32_t slot);
uint64_t cast_queued(struct cast *c); /* entries in all queues */

/* -- subscribing --------------------------------------------------------------------------------------------------- */

struct cast_in {
    struct queue_header *queue;
    const struct queue_entry *entries;
    const struct arena_header *arena;
    const uint8_t *data;
    uint64_t queue_bytes, arena_bytes, slots, size, limit;
    int control, data_bell, room_bell; /* borrowed */
    uint64_t head, serial; /* the last entry seen at the head; the last serial number taken */
    bool ended, rung;      /* rung: our bell may hold a count */
    const char *broken;
    int64_t tick;
};

/* Check and map what a publisher sent. 0, or -1 with errno; EPROTO: *why says what is wrong. */
int cast_in_open(struct cast_in *in, int arena, int queue, uint64_t limit, const char **why);
void cast_in_close(struct cast_in *in);

struct cast_item {
    uint64_t head, serial, length, prefix;
    const uint8_t *at; /* may be written over until cast_take has said that it was not */
};
enum cast_status cast_next(struct cast_in *in, struct cast_item *item);
/* How many messages are missing right before it. */
static inline uint64_t cast_gap(const struct cast_in *in, const struct cast_item *item)
{
    return item->serial - in->serial - 1;
}
/* The item was copied: is the copy good, and ours? Else the publisher took it back, and nothing of it counts. */
bool cast_take(struct cast_in *in, const struct cast_item *item);
uint64_t cast_trailing(struct cast_in *in); /* after GOODBYE: how many are missing at the end */
/* Look again and again until something may be there; false: not within so many ns. */
bool cast_spin(struct cast_in *in, int64_t ns);
void cast_announce(struct cast_in *in);     /* we are about to sleep on data_bell and control; look once more */
void cast_look(struct cast_in *in);         /* ask the control socket whether the publisher is there */

#endif
