/* broadcast_in.c — the subscribing side. See broadcast.h, and broadcast.c for the synchronisation points. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "broadcast.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "ring_words.h"

#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif

static const char *map_queue(struct cast_in *in, int queue, uint64_t page)
{
    if (!is_sealed(queue, page + sizeof(struct queue_entry), 0, &in->queue_bytes))
        return "the queue is no sealed memory";
    void *base = mmap(NULL, in->queue_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, queue, 0);
    if (base == MAP_FAILED)
        return "";
    in->queue = base;
    in->entries = (const struct queue_entry *)((uint8_t *)base + page);
    struct queue_header seen;
    memcpy(&seen, base, offsetof(struct queue_header, tail)); /* once: from here on somebody may write what they like */
    in->slots = seen.slots;
    if (seen.magic != QUEUE_MAGIC || seen.version != CAST_VERSION || seen.header_bytes != page)
        return "this is no queue of ours";
    if (!seen.slots || (seen.slots & (seen.slots - 1)) || seen.slots > QUEUE_MAX_SLOTS ||
        in->queue_bytes != page + seen.slots * sizeof(struct queue_entry))
        return "the queue does not fit its memory";
    return NULL;
}

static const char *map_arena(struct cast_in *in, int arena, uint64_t page)
{
    if (!is_sealed(arena, page + ARENA_MIN, F_SEAL_FUTURE_WRITE, &in->arena_bytes))
        return "the payloads are in no sealed memory";
    void *base = mmap(NULL, in->arena_bytes, PROT_READ, MAP_SHARED | MAP_NORESERVE, arena, 0);
    if (base == MAP_FAILED)
        return "";
    in->arena = base;
    in->data = (const uint8_t *)base + page;
    struct arena_header seen;
    memcpy(&seen, base, sizeof seen);
    in->size = seen.size;
    if (seen.magic != ARENA_MAGIC || seen.version != CAST_VERSION || seen.header_bytes != page)
        return "this is no memory of payloads";
    return seen.size > ARENA_MAX || in->arena_bytes != page + seen.size ? "the payloads do not fit their memory" : NULL;
}

int cast_in_open(struct cast_in *in, int arena, int queue, uint64_t limit, const char **why)
{
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    *in = (struct cast_in){.limit = limit, .control = -1, .data_bell = -1, .room_bell = -1, .rung = true};
    *why = map_queue(in, queue, page);
    if (!*why)
        *why = map_arena(in, arena, page);
    if (!*why)
        return 0;
    int failed = **why ? EPROTO : errno;
    cast_in_close(in);
    errno = failed;
    return -1;
}

void cast_in_close(struct cast_in *in)
{
    if (in->queue)
        munmap(in->queue, in->queue_bytes);
    if (in->arena)
        munmap((void *)in->arena, in->arena_bytes);
    in->queue = NULL;
    in->arena = NULL;
}

static enum cast_status broken(struct cast_in *in, const char *why)
{
    in->broken = why;
    return CAST_BROKEN;
}

void cast_look(struct cast_in *in)
{
    char byte;
    ssize_t got = recv(in->control, &byte, 1, MSG_DONTWAIT);
    if (got > 0)
        broken(in, "the publisher wrote to the control socket");
    else if (got == 0 || (errno != EAGAIN && errno != EINTR))
        in->ended = true;
}

static int64_t clock_ns(clockid_t clock)
{
    struct timespec now;
    clock_gettime(clock, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

bool cast_spin(struct cast_in *in, int64_t ns)
{
    int64_t until = clock_ns(CLOCK_MONOTONIC) + ns;
    do
        for (int i = 0; i < 16; i++) {
            /* Only a look: what is found is loaded again, with acquire, by whoever uses it. */
            if (GLANCE(in->queue->tail) != in->head || GLANCE(in->queue->closed))
                return true;
            rest_a_moment();
        }
    while (clock_ns(CLOCK_MONOTONIC) < until);
    return false;
}

/* Nothing is there. The publisher's last word precedes its closing and its death, so look once more after seeing either. */
static enum cast_status nothing(struct cast_in *in, uint64_t head)
{
    if (!in->ended) {
        int64_t tick = clock_ns(CLOCK_MONOTONIC_COARSE); /* who only ever tries must hear of a death, too */
        if (tick != in->tick) {
            in->tick = tick;
            cast_look(in);
        }
    }
    bool closed = atomic_load_explicit(&in->queue->closed, memory_order_acquire); /* SYNC POINT: over */
    if (!closed && !in->ended)
        return in->broken ? CAST_BROKEN : CAST_WAIT;
    if (atomic_load_explicit(&in->queue->tail, memory_order_acquire) != head) /* SYNC POINT: offer */
        return CAST_OK;
    return closed ? CAST_GOODBYE : CAST_ENDED;
}

enum cast_status cast_next(struct cast_in *in, struct cast_item *item)
{
    for (;;) {
        if (in->broken)
            return CAST_BROKEN;
        uint64_t head = GLANCE(in->queue->head);
        uint64_t tail = atomic_load_explicit(&in->queue->tail, memory_order_acquire); /* SYNC POINT: offer */
        if (head == tail) {
            in->head = head;
            enum cast_status status = nothing(in, head);
            if (status == CAST_OK)
                continue;
            return status;
        }
        const struct queue_entry *entry = &in->entries[head & (in->slots - 1)];
        uint64_t offset = GLANCE(entry->offset);
        *item = (struct cast_item){head, GLANCE(entry->serial), GLANCE(entry->length), GLANCE(entry->prefix), NULL};
        const char *wrong = NULL;
        if (head < in->head || tail - head > in->slots)
            wrong = "the queue's counts are impossible";
        else if (item->serial <= in->serial)
            wrong = "messages are not numbered upwards";
        else if (item->length > in->limit)
            wrong = "a message is above the limit";
        else if (item->length > in->size || offset > in->size - item->length || item->prefix > item->length)
            wrong = "a message lies outside its memory";
        if (!wrong) {
            in->head = head;
            item->at = in->data + offset;
            return CAST_OK;
        }
        full_fence();
        if (GLANCE(in->queue->head) == head) /* else it was taken back while we looked: what we saw means nothing */
            return broken(in, wrong);
    }
}

bool cast_take(struct cast_in *in, const struct cast_item *item)
{
    uint64_t head = item->head;
    if (!atomic_compare_exchange_strong_explicit(&in->queue->head, &head, head + 1, memory_order_acq_rel,
                                                 memory_order_relaxed)) /* SYNC POINT: taken, taken back */
        return false;
    in->serial = item->serial;
    in->head = head + 1;
    full_fence(); /* SYNC POINT: room wanted */
    if (GLANCE(in->queue->room_wanted) && atomic_exchange_explicit(&in->queue->room_wanted, 0, memory_order_relaxed))
        ring_bell(in->room_bell);
    return true;
}

uint64_t cast_trailing(struct cast_in *in)
{
    uint64_t offered = GLANCE(in->queue->offered);
    return offered > in->serial ? offered - in->serial : 0;
}

void cast_announce(struct cast_in *in)
{
    cast_look(in);
    /* Pollers see the bell's level: a count in it must be read, but only if somebody took our last announcement, and so rang. */
    if (in->rung || !GLANCE(in->queue->reader_sleeps))
        drain_bell(in->data_bell);
    in->rung = false;
    SET(in->queue->reader_sleeps, 1);
    full_fence(); /* SYNC POINT: cast sleeps */
}
