/* broadcast.c — see broadcast.h for the contract, layout.h for the bytes.
 *
 * Who synchronises with whom; each name stands at both of its ends:
 *
 *   offer          the publisher's store of tail (release)      the subscriber's load of tail (acquire): entries and payloads
 *   taken          the subscriber's swap of head (release)      the publisher's load or swap of head (acquire): memory to write again
 *   taken back     the publisher's swap of head, full fence     the subscriber's swap, which fails: what it copied is not believed
 *   cast sleeps    the subscriber: flag, full fence, tail       the publisher: tail, full fence, flag
 *   room wanted    the publisher: flag, full fence, head        the subscriber: head, full fence, flag
 *   over           the publisher's store of closed (release)    the subscriber's load (acquire), then tail again
 *
 * A subscriber that reads while the publisher takes the entry back may copy bytes of two messages. It finds out by its swap,
 * and throws the copy away: what is read from an entry or a payload counts only when the head is still where it was. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "broadcast.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "ring_words.h"

#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif

/* A queue is looked through for what was taken after so many entries, or bytes: seldom, because its head is in another processor's
 * cache, and often enough that a fast subscriber is served from the same few blocks of memory. */
enum { REAP_ENTRIES = 64, REAP_BYTES = 1 << 18 };

void cast_copy(void *to, const void *from, uint64_t bytes)
{
#ifdef __SANITIZE_THREAD__
    for (uint64_t i = 0; i < bytes; i++) /* the race is meant, see above; TSan shall find the others */
        __atomic_store_n((uint8_t *)to + i, __atomic_load_n((const uint8_t *)from + i, __ATOMIC_RELAXED), __ATOMIC_RELAXED);
#else
    memcpy(to, from, bytes);
#endif
}

/* -- publishing ---------------------------------------------------------------------------------------------------- */

int cast_open(struct cast *c, uint64_t size, uint64_t backlog, enum cast_policy policy)
{
    *c = (struct cast){.policy = policy, .backlog = backlog};
    return arena_open(&c->arena, size);
}

static void let_go(struct cast *c, uint32_t block)
{
    if (--c->arena.leaves[block].refs == 0)
        arena_give(&c->arena, block);
}

static void forget_entry(struct cast *c, struct cast_out *out)
{
    uint32_t block = out->blocks[out->reaped++ & (out->slots - 1)];
    out->held -= arena_bytes(&c->arena, block);
    let_go(c, block);
}

/* What its subscriber has taken is free. Returns its head. */
static uint64_t reap(struct cast *c, struct cast_out *out)
{
    uint64_t head = atomic_load_explicit(&out->queue->head, memory_order_acquire); /* SYNC POINT: taken */
    out->fresh = 0;
    if (head - out->reaped > out->tail - out->reaped) {
        if (!out->broken)
            c->broken++;
        out->broken = true;
        return out->reaped;
    }
    while (out->reaped != head)
        forget_entry(c, out);
    return head;
}

/* Drop its oldest entry. False: there is none any more. */
static bool take_back(struct cast *c, struct cast_out *out)
{
    for (;;) {
        uint64_t head = reap(c, out);
        if (out->broken || head == out->tail)
            return false;
        if (atomic_compare_exchange_strong_explicit(&out->queue->head, &head, head + 1, memory_order_acq_rel,
                                                    memory_order_relaxed)) { /* SYNC POINT: taken, taken back */
            full_fence(); /* SYNC POINT: taken back. The swap is seen before anything that is written over the message. */
            forget_entry(c, out);
            c->dropped++;
            return true;
        }
    }
}

static bool is_full(struct cast *c, struct cast_out *out, uint64_t bytes)
{
    uint64_t most = out->slots < c->backlog ? out->slots : c->backlog;
    /* Only who drops the new needs a share: what it holds stays held, and must leave room for what the others are sent. */
    uint64_t share = c->policy == CAST_DROP_NEW ? c->arena.size / (2 * (uint64_t)c->count) : UINT64_MAX;
    if (out->tail - out->reaped < most && (out->held == 0 || out->held + bytes <= share))
        return false;
    reap(c, out);
    return out->tail - out->reaped >= most || (out->held && out->held + bytes > share);
}

static void reap_all(struct cast *c)
{
    for (uint32_t slot = 0; slot < c->room; slot++)
        if (c->outs[slot] && !c->outs[slot]->broken)
            reap(c, c->outs[slot]);
}

/* Whoever holds the oldest message of all loses it. */
static bool drop_oldest(struct cast *c)
{
    struct cast_out *oldest = NULL;
    for (uint32_t slot = 0; slot < c->room; slot++) {
        struct cast_out *out = c->outs[slot];
        if (out && !out->broken && out->reaped != out->tail &&
            (!oldest || out->numbers[out->reaped & (out->slots - 1)] < oldest->numbers[oldest->reaped & (oldest->slots - 1)]))
            oldest = out;
    }
    return oldest && (take_back(c, oldest) || oldest->reaped == oldest->tail || oldest->broken);
}

static uint32_t find_room(struct cast *c, uint64_t bytes)
{
    uint32_t block = arena_take(&c->arena, bytes);
    if (block == NO_BLOCK) {
        reap_all(c);
        block = arena_take(&c->arena, bytes);
    }
    while (block == NO_BLOCK && c->policy == CAST_DROP_OLD && drop_oldest(c))
        block = arena_take(&c->arena, bytes);
    return block;
}

enum cast_status cast_reserve(struct cast *c, const uint32_t *slots, uint32_t count, uint64_t bytes, bool force, uint32_t *block)
{
    uint32_t takers = 0;
    *block = NO_BLOCK;
    for (uint32_t i = 0; i < count; i++) {
        struct cast_out *out = c->outs[slots[i]];
        if (out->tail - out->reaped >= REAP_ENTRIES && (out->tail % REAP_ENTRIES == 0 || out->fresh >= REAP_BYTES))
            reap(c, out);
        if (force || out->broken || !is_full(c, out, bytes)) {
            takers += !out->broken;
            continue;
        }
        if (out->broken) /* just found */
            continue;
        if (c->policy == CAST_BLOCK)
            return CAST_WAIT;
        if (c->policy == CAST_ERROR)
            return CAST_FULL;
        takers += c->policy == CAST_DROP_OLD;
    }
    if (!takers)
        return CAST_OK;
    if ((*block = find_room(c, bytes)) != NO_BLOCK || force || c->policy == CAST_DROP_NEW)
        return CAST_OK;
    /* Does anybody still hold what could be given back? If all have just given it back, there is room now, or never. */
    if (c->policy == CAST_DROP_OLD || cast_queued(c) == 0)
        return (*block = arena_take(&c->arena, bytes)) != NO_BLOCK ? CAST_OK : CAST_SCARCE;
    return c->policy == CAST_BLOCK ? CAST_WAIT : CAST_FULL;
}

static bool offer(struct cast *c, struct cast_out *out, uint32_t block, uint64_t bytes, uint64_t prefix, bool force)
{
    if (block != NO_BLOCK && !force && c->policy == CAST_DROP_OLD)
        while (is_full(c, out, bytes) && take_back(c, out))
            ;
    bool full = block == NO_BLOCK || (force ? out->tail - out->reaped >= out->slots : is_full(c, out, bytes));
    if (out->broken)
        return false;
    SET(out->queue->offered, ++out->offered);
    if (full) {
        c->dropped++;
        return false;
    }
    struct queue_entry *entry = &out->entries[out->tail & (out->slots - 1)];
    SET(entry->serial, out->offered);
    SET(entry->offset, (uint64_t)block * ARENA_LEAF);
    SET(entry->length, bytes);
    SET(entry->prefix, prefix);
    out->blocks[out->tail & (out->slots - 1)] = block;
    out->numbers[out->tail & (out->slots - 1)] = c->number;
    c->arena.leaves[block].refs++;
    out->held += arena_bytes(&c->arena, block);
    out->fresh += bytes;
    atomic_store_explicit(&out->queue->tail, ++out->tail, memory_order_release); /* SYNC POINT: offer */
    return true;
}

static void wake(struct cast_out *out)
{
    /* Who takes the announcement rings the bell; the exchange orders nothing. */
    if (GLANCE(out->queue->reader_sleeps) && atomic_exchange_explicit(&out->queue->reader_sleeps, 0, memory_order_relaxed))
        ring_bell(out->bell);
}

void cast_commit(struct cast *c, const uint32_t *slots, uint32_t count, uint32_t block, uint64_t bytes, uint64_t prefix, bool force)
{
    c->number++;
    bool any = false;
    if (block != NO_BLOCK)
        c->arena.leaves[block].refs = 1; /* ours, while the queues are given theirs */
    for (uint32_t i = 0; i < count; i++)
        any |= offer(c, c->outs[slots[i]], block, bytes, prefix, force);
    if (block != NO_BLOCK)
        let_go(c, block);
    if (!any)
        return;
    full_fence(); /* SYNC POINT: cast sleeps */
    for (uint32_t i = 0; i < count; i++)
        wake(c->outs[slots[i]]);
}

void cast_want_room(struct cast *c)
{
    for (uint32_t slot = 0; slot < c->room; slot++)
        if (c->outs[slot])
            SET(c->outs[slot]->queue->room_wanted, 1);
    full_fence(); /* SYNC POINT: room wanted */
    /* What is asked next looks at the heads only where the books say full, and a full arena looks at them all. */
}

bool cast_keeps_up(struct cast *c, uint32_t slot)
{
    return !is_full(c, c->outs[slot], 0);
}

uint64_t cast_queued(struct cast *c)
{
    uint64_t queued = 0;
    reap_all(c);
    for (uint32_t slot = 0; slot < c->room; slot++)
        if (c->outs[slot])
            queued += c->outs[slot]->tail - c->outs[slot]->reaped;
    return queued;
}

/* -- coming and going ---------------------------------------------------------------------------------------------- */

static int free_slot(struct cast *c, uint32_t *slot)
{
    for (*slot = 0; *slot < c->room; ++*slot)
        if (!c->outs[*slot])
            return 0;
    uint32_t room = c->room ? 2 * c->room : 8;
    struct cast_out **outs = realloc(c->outs, room * sizeof *outs);
    if (!outs)
        return -1;
    memset(outs + c->room, 0, (room - c->room) * sizeof *outs);
    c->outs = outs;
    c->room = room;
    return 0;
}

static void free_out(struct cast_out *out)
{
    if (out->queue)
        munmap(out->queue, out->bytes);
    free(out->blocks);
    free(out->numbers);
    free(out);
}

int cast_admit(struct cast *c, uint64_t slots, int bell, uint32_t *slot, int *memory)
{
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), wanted = page / sizeof(struct queue_entry);
    while (wanted < slots)
        wanted *= 2;
    if (wanted > QUEUE_MAX_SLOTS) {
        errno = EINVAL;
        return -1;
    }
    struct cast_out *out = calloc(1, sizeof *out);
    if (!out || free_slot(c, slot) < 0) {
        free(out);
        errno = ENOMEM;
        return -1;
    }
    out->slots = wanted;
    out->bytes = page + wanted * sizeof(struct queue_entry);
    out->bell = bell;
    out->blocks = malloc(wanted * sizeof *out->blocks);
    out->numbers = malloc(wanted * sizeof *out->numbers);
    *memory = out->blocks && out->numbers ? sealed_memory("ipckit-queue", out->bytes, F_SEAL_SEAL) : -1;
    int failed = *memory < 0 ? errno ? errno : ENOMEM : posix_fallocate(*memory, 0, (off_t)out->bytes);
    if (!failed) {
        out->queue = mmap(NULL, out->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, *memory, 0);
        if (out->queue == MAP_FAILED) {
            out->queue = NULL;
            failed = errno;
        }
    }
    if (failed) {
        if (*memory >= 0)
            close(*memory);
        free_out(out);
        errno = failed;
        return -1;
    }
    out->queue->magic = QUEUE_MAGIC;
    out->queue->version = CAST_VERSION;
    out->queue->header_bytes = (uint32_t)page;
    out->queue->slots = wanted;
    out->entries = (struct queue_entry *)((uint8_t *)out->queue + page);
    c->outs[*slot] = out;
    c->count++;
    return 0;
}

void cast_remove(struct cast *c, uint32_t slot)
{
    struct cast_out *out = c->outs[slot];
    while (out->reaped != out->tail)
        forget_entry(c, out);
    c->broken -= out->broken;
    c->outs[slot] = NULL;
    c->count--;
    free_out(out);
}

void cast_close(struct cast *c, bool goodbye)
{
    for (uint32_t slot = 0; slot < c->room; slot++) {
        struct cast_out *out = c->outs[slot];
        if (!out)
            continue;
        if (goodbye) {
            atomic_store_explicit(&out->queue->closed, 1, memory_order_release); /* SYNC POINT: over */
            full_fence(); /* SYNC POINT: cast sleeps */
            wake(out);
        }
        free_out(out);
    }
    free(c->outs);
    arena_close(&c->arena);
    *c = (struct cast){.arena = {.memory = -1}};
}
