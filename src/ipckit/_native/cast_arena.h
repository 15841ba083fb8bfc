/* cast_arena.h — where the payloads of topics live: a sealed memfd that subscribers can only read, cut into blocks by a buddy
 * allocator whose books are private to the publisher.
 *
 * Blocks are powers of two of ARENA_LEAF bytes, counted by references: one for each queue that holds the message. Memory is asked
 * for when a block first needs it, and never touched before it was granted: full memory is an answer here, not a SIGBUS. */
#ifndef IPCKIT_CAST_ARENA_H
#define IPCKIT_CAST_ARENA_H

#include <assert.h>
#include <stdbool.h>

#include "layout.h"

#define ARENA_LEAF 128
#define ARENA_ORDERS 24
#define NO_BLOCK UINT32_MAX

struct arena_leaf {
    uint32_t next, prev; /* while it is free */
    uint32_t refs;
    uint8_t order;
    bool free;
};

struct arena {
    int memory;
    struct arena_header *header; /* and the data behind it, in one mapping */
    uint8_t *data;
    uint64_t size, page;
    unsigned top; /* the order of the whole */
    struct arena_leaf *leaves;
    uint32_t heads[ARENA_ORDERS];
    uint32_t quick[ARENA_ORDERS], quick_count[ARENA_ORDERS]; /* freed lately: taken first, and not yet joined with their buddies */
    uint8_t *granted; /* units of memory that the kernel has given */
};

/* 0, or -1 with errno. EINVAL: size is no power of two from ARENA_MIN to ARENA_MAX. */
int arena_open(struct arena *a, uint64_t size);
void arena_close(struct arena *a);

/* A block for so many bytes, without a reference; NO_BLOCK: none is free, or (errno not 0) the system has no memory. */
uint32_t arena_take(struct arena *a, uint64_t bytes);
void arena_give(struct arena *a, uint32_t block);
static inline uint8_t *arena_at(const struct arena *a, uint32_t block)
{
    return a->data + (uint64_t)block * ARENA_LEAF;
}
static inline uint64_t arena_bytes(const struct arena *a, uint32_t block)
{
    return (uint64_t)ARENA_LEAF << a->leaves[block].order;
}

/* A memfd of so many bytes, whose size cannot change; -1 with errno. For queues as well. */
int sealed_memory(const char *name, uint64_t bytes, int more_seals);
/* Is it one? */
bool is_sealed(int fd, uint64_t least, int more_seals, uint64_t *bytes);

#endif
