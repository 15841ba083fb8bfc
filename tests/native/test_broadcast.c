/* links: cast_arena.c broadcast.c broadcast_in.c
 *
 * broadcast.c as a publisher and its subscribers see it. The threaded tests share one mapping (see test_ring.c for why). */
#include "../../src/ipckit/_native/broadcast.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "check.h"

struct pair { /* one subscriber, both of its ends */
    struct cast_in in;
    uint32_t slot;
    int bell, room, control[2];
};

/* Both sides on one mapping: the subscriber's own would hide every race from ThreadSanitizer. */
static void join_pair(struct cast *c, struct pair *p, bool one_mapping, uint64_t slots)
{
    const char *why;
    int queue;
    CHECK((p->bell = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) >= 0);
    CHECK((p->room = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) >= 0);
    CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, p->control) == 0);
    CHECK(cast_admit(c, slots, p->bell, &p->slot, &queue) == 0);
    CHECK(cast_in_open(&p->in, c->arena.memory, queue, 1 << 20, &why) == 0);
    close(queue);
    if (one_mapping) {
        cast_in_close(&p->in);
        p->in.queue = c->outs[p->slot]->queue;
        p->in.entries = c->outs[p->slot]->entries;
        p->in.data = c->arena.data;
    }
    p->in.control = p->control[1];
    p->in.data_bell = p->bell;
    p->in.room_bell = p->room;
}

static void leave_pair(struct pair *p, bool one_mapping)
{
    if (!one_mapping)
        cast_in_close(&p->in);
    close(p->bell);
    close(p->room);
    close(p->control[1]);
    if (p->control[0] >= 0)
        close(p->control[0]);
}

/* -- messages that show when they are torn ------------------------------------------------------------------------- */

static uint64_t size_of(uint64_t number, uint64_t largest)
{
    return 8 + (number * 2654435761u >> 7) % (largest - 7);
}

static void fill(uint8_t *at, uint64_t number, uint64_t size)
{
    memcpy(at, &number, 8);
    for (uint64_t i = 8; i < size; i++)
        at[i] = (uint8_t)(number * 31 + i);
}

static bool is_filled(const uint8_t *at, uint64_t number, uint64_t size)
{
    uint64_t seen;
    memcpy(&seen, at, 8);
    bool good = seen == number;
    for (uint64_t i = 8; i < size && good; i++)
        good = at[i] == (uint8_t)(number * 31 + i);
    return good;
}

/* Where nothing is ever taken back, a plain copy is right, and ThreadSanitizer judges who synchronises with whom. */
static void (*copy)(void *to, const void *from, uint64_t bytes);

static void plain_copy(void *to, const void *from, uint64_t bytes)
{
    memcpy(to, from, bytes);
}

static enum cast_status put(struct cast *c, const uint32_t *slots, uint32_t count, uint64_t number, uint64_t size)
{
    static uint8_t body[1 << 17];
    uint32_t block;
    enum cast_status status = cast_reserve(c, slots, count, size, false, &block);
    if (status != CAST_OK)
        return status;
    if (block != NO_BLOCK) {
        fill(body, number, size);
        copy(arena_at(&c->arena, block), body, size);
    }
    cast_commit(c, slots, count, block, size, 0, false);
    return CAST_OK;
}

/* The next message, copied and taken: its number; -1: none. */
static int64_t take(struct cast_in *in, uint64_t *gap, enum cast_status *status)
{
    static _Thread_local uint8_t body[1 << 20];
    struct cast_item item;
    while ((*status = cast_next(in, &item)) == CAST_OK) {
        *gap = cast_gap(in, &item);
        copy(body, item.at, item.length);
        if (!cast_take(in, &item))
            continue;
        uint64_t number;
        memcpy(&number, body, 8);
        CHECK(is_filled(body, number, item.length));
        return (int64_t)number;
    }
    return -1;
}

/* -- the arena ----------------------------------------------------------------------------------------------------- */

static void test_arena(void)
{
    struct arena a;
    CHECK(arena_open(&a, 100000) < 0 && errno == EINVAL);
    CHECK(arena_open(&a, 1 << 16) == 0);
    CHECK(mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, a.memory, 0) == MAP_FAILED); /* nobody else writes */
    CHECK(arena_take(&a, (1 << 16) + 1) == NO_BLOCK);
    enum { MOST = 512 };
    uint32_t held[MOST];
    uint64_t sizes[MOST];
    unsigned seed = 7;
    int count = 0;
    for (int round = 0; round < 20000; round++) {
        uint64_t size = (uint64_t)rand_r(&seed) % 3000;
        if (count < MOST && rand_r(&seed) % 2) {
            uint32_t block = arena_take(&a, size);
            if (block == NO_BLOCK)
                continue;
            for (int i = 0; i < count; i++) /* no two overlap */
                CHECK((uint64_t)block * ARENA_LEAF + size <= (uint64_t)held[i] * ARENA_LEAF ||
                      (uint64_t)held[i] * ARENA_LEAF + sizes[i] <= (uint64_t)block * ARENA_LEAF);
            held[count] = block;
            sizes[count++] = size ? size : 1;
            memset(arena_at(&a, block), 1, size);
        } else if (count) {
            int which = rand_r(&seed) % count;
            arena_give(&a, held[which]);
            held[which] = held[--count];
            sizes[which] = sizes[count];
        }
    }
    while (count)
        arena_give(&a, held[--count]);
    uint32_t whole = arena_take(&a, 1 << 16); /* everything was joined again */
    CHECK(whole == 0);
    arena_give(&a, whole);
    arena_close(&a);
}

/* -- one thread: each policy ---------------------------------------------------------------------------------------- */

static void test_policies(void)
{
    for (enum cast_policy policy = CAST_BLOCK; policy <= CAST_ERROR; policy++) {
        struct cast c;
        struct pair slow, fast;
        CHECK(cast_open(&c, 1 << 20, 10, policy) == 0);
        join_pair(&c, &slow, false, 10);
        join_pair(&c, &fast, false, 10);
        uint32_t both[] = {slow.slot, fast.slot};
        uint64_t gap, sent = 0;
        enum cast_status status;
        for (uint64_t number = 0; number < 100; number++) {
            enum cast_status done = put(&c, both, 2, number, 100);
            if (done != CAST_OK) {
                CHECK(done == (policy == CAST_BLOCK ? CAST_WAIT : CAST_FULL) && number == 10);
                break;
            }
            sent++;
            CHECK(take(&fast.in, &gap, &status) == (int64_t)number && gap == 0); /* the slow one costs it nothing */
        }
        CHECK(sent == (policy == CAST_BLOCK || policy == CAST_ERROR ? 10 : 100));
        uint64_t received = 0, missing = 0;
        for (int64_t number, next = 0; (number = take(&slow.in, &gap, &status)) >= 0; next = number + 1) {
            CHECK(number == next + (int64_t)gap);
            received++;
            missing += gap;
        }
        CHECK(status == CAST_WAIT && received == 10);
        missing += cast_trailing(&slow.in);
        CHECK(received + missing == sent && missing == c.dropped);
        CHECK(cast_queued(&c) == 0);
        cast_close(&c, true);
        CHECK(take(&slow.in, &gap, &status) < 0 && status == CAST_GOODBYE);
        leave_pair(&slow, false);
        leave_pair(&fast, false);
    }
}

/* The memory is full before the queue is: the oldest of all makes room; who drops the new has a share that leaves room. */
static void test_full_memory(void)
{
    for (enum cast_policy policy = CAST_DROP_OLD; policy <= CAST_DROP_NEW; policy++) {
        struct cast c;
        struct pair slow, fast;
        CHECK(cast_open(&c, 1 << 16, 1000, policy) == 0);
        join_pair(&c, &slow, false, 1000);
        join_pair(&c, &fast, false, 1000);
        uint32_t both[] = {slow.slot, fast.slot};
        uint64_t gap, received = 0, missing = 0;
        enum cast_status status;
        for (uint64_t number = 0; number < 500; number++) {
            CHECK(put(&c, both, 2, number, size_of(number, 8000)) == CAST_OK);
            CHECK(take(&fast.in, &gap, &status) == (int64_t)number && gap == 0);
        }
        for (int64_t next = 0, number; (number = take(&slow.in, &gap, &status)) >= 0; next = number + 1, received++) {
            CHECK(number == next + (int64_t)gap);
            missing += gap;
        }
        missing += cast_trailing(&slow.in);
        CHECK(received && missing && received + missing == 500 && c.dropped == missing);
        cast_remove(&c, slow.slot);
        CHECK(put(&c, &fast.slot, 1, 7, 8) == CAST_OK);
        cast_close(&c, false);
        leave_pair(&slow, false);
        leave_pair(&fast, false);
    }
}

/* -- what a bad neighbour can write ---------------------------------------------------------------------------------- */

static void test_hostile_subscriber(void)
{
    struct cast c;
    struct pair bad, good;
    CHECK(cast_open(&c, 1 << 16, 10, CAST_BLOCK) == 0);
    join_pair(&c, &bad, false, 10);
    join_pair(&c, &good, false, 10);
    uint32_t both[] = {bad.slot, good.slot};
    uint64_t gap;
    enum cast_status status;
    memset((void *)bad.in.entries, 0xff, 10 * sizeof(struct queue_entry));
    atomic_store(&bad.in.queue->head, UINT64_MAX / 2);
    for (uint64_t number = 0; number < 300; number++) {
        CHECK(put(&c, both, 2, number, 100) == CAST_OK);
        CHECK(take(&good.in, &gap, &status) == (int64_t)number);
    }
    CHECK(c.broken == 1 && c.outs[bad.slot]->broken);
    cast_remove(&c, bad.slot);
    CHECK(c.broken == 0 && cast_queued(&c) == 0);
    cast_close(&c, false);
    leave_pair(&bad, false);
    leave_pair(&good, false);
}

static void test_hostile_publisher(void)
{
    unsigned seed = 3;
    for (int round = 0; round < 2000; round++) {
        struct cast c;
        struct pair p;
        CHECK(cast_open(&c, 1 << 16, 8, CAST_BLOCK) == 0);
        join_pair(&c, &p, false, 8);
        uint64_t gap;
        enum cast_status status;
        for (uint64_t number = 0; number < 4; number++)
            CHECK(put(&c, &p.slot, 1, number, 64) == CAST_OK);
        struct queue_header *queue = c.outs[p.slot]->queue;
        uint64_t word = rand_r(&seed) % 3 ? (uint64_t)rand_r(&seed) << rand_r(&seed) % 40 : UINT64_MAX - rand_r(&seed) % 64;
        _Atomic uint64_t *words[] = {&queue->tail, &queue->head, &c.outs[p.slot]->entries[0].serial,
                                     &c.outs[p.slot]->entries[0].offset, &c.outs[p.slot]->entries[0].length,
                                     &c.outs[p.slot]->entries[0].prefix};
        atomic_store(words[rand_r(&seed) % 6], word);
        struct cast_item item;
        for (int i = 0; i < 20 && (status = cast_next(&p.in, &item)) == CAST_OK; i++) {
            volatile uint8_t sum = 0; /* all that is said to be ours can be read */
            for (uint64_t at = 0; at < item.length; at++)
                sum += item.at[at];
            cast_take(&p.in, &item);
        }
        (void)gap;
        cast_close(&c, false);
        leave_pair(&p, false);
    }
}

/* -- threads ------------------------------------------------------------------------------------------------------- */

struct reader {
    struct pair pair;
    uint64_t received, missing;
    unsigned laze;
};

static void *read_all(void *argument)
{
    struct reader *r = argument;
    unsigned seed = r->laze;
    int64_t next = 0;
    for (;;) {
        uint64_t gap;
        enum cast_status status;
        int64_t number = take(&r->pair.in, &gap, &status);
        if (number >= 0) {
            CHECK(number == next + (int64_t)gap);
            next = number + 1;
            r->received++;
            r->missing += gap;
            if (r->laze && rand_r(&seed) % 64 == 0)
                usleep(r->laze);
            continue;
        }
        if (status == CAST_GOODBYE)
            break;
        CHECK(status == CAST_WAIT);
        cast_announce(&r->pair.in);
        if ((number = take(&r->pair.in, &gap, &status)) >= 0) {
            CHECK(number == next + (int64_t)gap);
            next = number + 1;
            r->received++;
            r->missing += gap;
        } else if (status == CAST_WAIT) {
            struct pollfd fd = {r->pair.bell, POLLIN, 0};
            CHECK(poll(&fd, 1, 20000) == 1); /* a wake-up that is lost fails here */
        }
    }
    r->missing += cast_trailing(&r->pair.in);
    return NULL;
}

static void run_threads(enum cast_policy policy, uint64_t count)
{
    enum { READERS = 3 };
    struct cast c;
    struct reader readers[READERS];
    pthread_t threads[READERS];
    uint32_t slots[READERS];
    CHECK(cast_open(&c, 1 << 16, 50, policy) == 0);
    for (unsigned i = 0; i < READERS; i++) {
        readers[i] = (struct reader){.laze = 50 * i};
        join_pair(&c, &readers[i].pair, true, 50);
        slots[i] = readers[i].pair.slot;
        CHECK(pthread_create(&threads[i], NULL, read_all, &readers[i]) == 0);
    }
    for (uint64_t number = 0; number < count; number++) {
        enum cast_status status;
        while ((status = put(&c, slots, READERS, number, size_of(number, 1500))) == CAST_WAIT) {
            cast_want_room(&c);
            if ((status = put(&c, slots, READERS, number, size_of(number, 1500))) == CAST_OK)
                break;
            CHECK(status == CAST_WAIT);
            struct pollfd fds[READERS];
            for (int i = 0; i < READERS; i++)
                fds[i] = (struct pollfd){readers[i].pair.room, POLLIN, 0};
            CHECK(poll(fds, READERS, 20000) > 0);
            for (int i = 0; i < READERS; i++) {
                uint64_t rung;
                CHECK(read(fds[i].fd, &rung, 8) == 8 || errno == EAGAIN);
            }
        }
        CHECK(status == CAST_OK);
    }
    uint64_t dropped = c.dropped, missing = 0;
    for (int i = 0; i < READERS; i++) { /* closing unmaps, and this mapping is theirs too */
        atomic_store_explicit(&c.outs[slots[i]]->queue->closed, 1, memory_order_release);
        atomic_thread_fence(memory_order_seq_cst);
        uint64_t one = 1;
        CHECK(write(readers[i].pair.bell, &one, 8) == 8);
    }
    for (int i = 0; i < READERS; i++) {
        CHECK(pthread_join(threads[i], NULL) == 0);
        CHECK(readers[i].received + readers[i].missing == count);
        missing += readers[i].missing;
    }
    CHECK(missing == dropped && (policy != CAST_BLOCK || !missing));
    cast_close(&c, false);
    for (int i = 0; i < READERS; i++)
        leave_pair(&readers[i].pair, true);
}

static void test_threads(void)
{
    for (enum cast_policy policy = CAST_BLOCK; policy <= CAST_DROP_NEW; policy++) {
        copy = policy == CAST_DROP_OLD ? cast_copy : plain_copy;
        run_threads(policy, 20000);
    }
    copy = plain_copy;
}

/* Both sides sleep at every turn: a wake-up that is lost ends in a poll that finds nothing. */
static void test_wake_ups(void)
{
    enum { TURNS = 60000 };
    struct cast c;
    struct reader reader = {0};
    pthread_t thread;
    CHECK(cast_open(&c, 1 << 16, 1, CAST_BLOCK) == 0);
    join_pair(&c, &reader.pair, true, 1);
    CHECK(pthread_create(&thread, NULL, read_all, &reader) == 0);
    for (uint64_t number = 0; number < TURNS; number++)
        while (put(&c, &reader.pair.slot, 1, number, 8) == CAST_WAIT) {
            cast_want_room(&c);
            if (put(&c, &reader.pair.slot, 1, number, 8) == CAST_OK)
                break;
            struct pollfd fd = {reader.pair.room, POLLIN, 0};
            CHECK(poll(&fd, 1, 20000) == 1);
            uint64_t rung;
            CHECK(read(fd.fd, &rung, 8) == 8);
        }
    atomic_store(&c.outs[reader.pair.slot]->queue->closed, 1);
    uint64_t one = 1;
    CHECK(write(reader.pair.bell, &one, 8) == 8);
    CHECK(pthread_join(thread, NULL) == 0 && reader.received == TURNS);
    cast_close(&c, false);
    leave_pair(&reader.pair, true);
}

int main(void)
{
    copy = plain_copy;
    RUN(test_arena);
    RUN(test_policies);
    RUN(test_full_memory);
    RUN(test_hostile_subscriber);
    RUN(test_hostile_publisher);
    RUN(test_threads);
    RUN(test_wake_ups);
    return 0;
}
