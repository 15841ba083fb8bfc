/* floor_party.h — one side of a floor, and what a mechanism is: how a party is opened, sends and receives. */
#ifndef IPCKIT_FLOOR_PARTY_H
#define IPCKIT_FLOOR_PARTY_H

#include <mqueue.h>
#include <semaphore.h>
#include <stdalign.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>

enum {
    FLOOR_HEADER = 4,
    FLOOR_READ_SIZE = 64 << 10,   /* what StreamLink reads at once */
    FLOOR_SHARED_RING = 4 << 20,  /* bytes of slots in one direction of shared memory */
};

/* One direction through shared memory: fixed slots, two counters. */
struct direction {
    alignas(64) atomic_uint tail; /* slots filled; the futex of the reader */
    atomic_uint reader_sleeps;
    alignas(64) atomic_uint head; /* slots emptied; the futex of the writer */
    atomic_uint writer_sleeps;
    alignas(64) sem_t filled;
    sem_t empty;
    alignas(64) unsigned char slots[FLOOR_SHARED_RING];
};

struct shared {
    struct direction directions[2];
};

struct party {
    size_t size;
    int rfd, wfd;
    mqd_t rqueue, wqueue;
    struct direction *in, *out;
    unsigned slots, stride;
    unsigned char *payload; /* what is sent, and where it arrives where the mechanism copies it out */
    unsigned char *buffer;  /* what a byte stream has read and not used: begin to end */
    size_t capacity, begin, end;
};

struct mechanism {
    const char *name;
    size_t largest;   /* bytes in a message */
    int (*open)(struct party parties[2], struct shared *shared);
    int (*send)(struct party *self);
    int (*receive)(struct party *self);
    bool spins;       /* needs two cores */
    bool drops;       /* what is not acknowledged by the window may be lost */
};

extern const struct mechanism floor_kernel_mechanisms[], floor_shared_mechanisms[]; /* each ends with a NULL name */

#endif
