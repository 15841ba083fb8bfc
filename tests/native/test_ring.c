/* links: ring.c ring_wait.c
 *
 * ring.c as two sides see it. Both sides of the threaded tests share one mapping, because ThreadSanitizer knows memory by its
 * address: with a mapping for each side it would see no race at all. */
#include "../../src/ipckit/_native/ring.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "check.h"

struct both {
    struct ring side[2];
    struct ring_map map;
    int bells[4], control[2], bell[2];
};

static void open_both(struct both *both, uint64_t capacity, uint64_t limit)
{
    const char *why;
    int memory = ring_create(capacity);
    CHECK(memory >= 0);
    CHECK(ring_map(&both->map, memory, -1, &why) == 0);
    close(memory);
    CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, both->control) == 0);
    for (int i = 0; i < 4; i++)
        CHECK((both->bells[i] = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) >= 0);
    for (int i = 0; i < 2; i++) {
        CHECK((both->bell[i] = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) >= 0);
        ring_init(&both->side[i], &both->map, i, both->bells, both->control[i], both->bell[i], limit);
    }
}

static void close_both(struct both *both)
{
    for (int i = 0; i < 2; i++) {
        ring_finish(&both->side[i]);
        close(both->bell[i]);
        if (both->control[i] >= 0)
            close(both->control[i]);
    }
    for (int i = 0; i < 4; i++)
        close(both->bells[i]);
    ring_unmap(&both->map);
}

static int64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

/* -- a frame that shows when it is torn: its number, its length, and bytes that follow from both -------------------- */

static void fill(uint8_t *at, uint64_t number, uint64_t size)
{
    for (uint64_t i = 0; i < size; i++)
        at[i] = (uint8_t)(number * 31 + size * 7 + i);
}

static bool is_filled(const uint8_t *at, uint64_t number, uint64_t size)
{
    for (uint64_t i = 0; i < size; i++)
        if (at[i] != (uint8_t)(number * 31 + size * 7 + i))
            return false;
    return true;
}

static uint64_t size_of(uint64_t number, uint64_t largest)
{
    return (number * 2654435761u >> 7) % (largest + 1);
}

static int64_t forever(void)
{
    return now() + INT64_C(60000000000); /* a lost wake-up shows as a deadline that passes */
}

static void send_frame(struct ring *r, uint64_t number, uint64_t size, bool spin)
{
    uint8_t *payload;
    if (size > r->chunk) {
        uint8_t *frame = malloc(size);
        fill(frame, number, size);
        struct ring_rest rest = {.from = frame, .size = size};
        enum ring_status status;
        while ((status = ring_stream(r, &rest)) != RING_OK) {
            CHECK(status == RING_WAIT);
            if (!spin || !ring_spin_until(r, RING_SEND, now() + 20000))
                CHECK(ring_sleep(r, RING_SEND, forever()) == RING_WOKE);
        }
        free(frame);
        return;
    }
    enum ring_status status;
    while ((status = ring_reserve(r, size, &payload)) != RING_OK) {
        CHECK(status == RING_WAIT);
        if (!spin || !ring_spin_until(r, RING_SEND, now() + 20000))
            CHECK(ring_sleep(r, RING_SEND, forever()) == RING_WOKE);
    }
    fill(payload, number, size);
    ring_append(r, size, RECORD_WHOLE);
    ring_publish(r);
    ring_wake_reader(r);
}

static void recv_frame(struct ring *r, uint64_t number, uint64_t size, bool spin)
{
    struct ring_frame frame;
    uint8_t *into = NULL;
    for (;;) {
        enum ring_status status = ring_next(r, &frame);
        if (status == RING_OK)
            break;
        if (status == RING_LARGE) {
            CHECK(frame.size == size);
            CHECK((into = malloc(size)) != NULL);
            ring_assemble(r, into, size);
            continue;
        }
        CHECK(status == RING_WAIT);
        if (!spin || !ring_spin_until(r, RING_RECV, now() + 20000))
            CHECK(ring_sleep(r, RING_RECV, forever()) == RING_WOKE);
    }
    CHECK(frame.size == size);
    CHECK(is_filled(frame.payload, number, size));
    ring_take(r, &frame);
    ring_release(r);
    free(into);
}

/* -- one thread ---------------------------------------------------------------------------------------------------- */

static void test_capacity(void)
{
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), bad[] = {0, 1, page - 1, page + 1, 3 * page, RING_MAX_CAPACITY * 2};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        CHECK(ring_create(bad[i]) == -1 && errno == EINVAL);
}

static void test_memory_shows_twice(void)
{
    struct both both;
    open_both(&both, 1 << 16, 1 << 20);
    for (int i = 0; i < 2; i++) {
        both.map.data[i][5] = (uint8_t)(7 + i);
        CHECK(both.map.data[i][(1 << 16) + 5] == 7 + i);
    }
    CHECK(both.map.data[0][5] == 7);
    close_both(&both);
}

static void test_alternating(void)
{
    struct both both;
    open_both(&both, (uint64_t)sysconf(_SC_PAGESIZE), 1 << 20);
    for (uint64_t n = 0; n < 20000; n++) {
        uint64_t size = size_of(n, both.side[0].chunk);
        send_frame(&both.side[n % 2], n, size, false);
        recv_frame(&both.side[1 - n % 2], n, size, false);
    }
    close_both(&both);
}

static void test_full_and_empty(void)
{
    struct both both;
    struct ring_frame frame;
    uint8_t *payload;
    open_both(&both, 4096, 1 << 20);
    struct ring *tx = &both.side[0], *rx = &both.side[1];
    CHECK(ring_next(rx, &frame) == RING_WAIT);
    CHECK(ring_reserve(tx, 4096 - 8, &payload) == RING_OK); /* the whole ring in one record */
    CHECK(ring_reserve(tx, 4096 - 7, &payload) == RING_WAIT);
    uint64_t sent = 0;
    while (ring_reserve(tx, 100, &payload) == RING_OK) {
        fill(payload, sent++, 100);
        ring_append(tx, 100, RECORD_WHOLE);
    }
    CHECK(sent == 4096 / 112);
    CHECK(ring_next(rx, &frame) == RING_WAIT); /* appended is not published */
    ring_publish(tx);
    for (uint64_t n = 0; n < sent; n++)
        recv_frame(rx, n, 100, false);
    CHECK(ring_next(rx, &frame) == RING_WAIT);
    CHECK(ring_reserve(tx, 4096 - 8, &payload) == RING_OK);
    close_both(&both);
}

static void test_held_memory_is_not_given_back(void)
{
    struct both both;
    struct ring_frame frame;
    uint8_t *payload;
    open_both(&both, 4096, 1 << 20);
    struct ring *tx = &both.side[0], *rx = &both.side[1];
    send_frame(tx, 1, 1000, false);
    send_frame(tx, 2, 1000, false);
    CHECK(ring_next(rx, &frame) == RING_OK);
    atomic_fetch_add(&rx->held, 1);
    ring_take(rx, &frame);
    ring_release(rx);
    recv_frame(rx, 2, 1000, false);
    CHECK(ring_reserve(tx, 3000, &payload) == RING_WAIT);
    CHECK(is_filled(frame.payload, 1, 1000));
    atomic_fetch_sub(&rx->held, 1);
    ring_release(rx);
    CHECK(ring_reserve(tx, 3000, &payload) == RING_OK);
    close_both(&both);
}

static void test_ends(void)
{
    struct both both;
    struct ring_frame frame;
    open_both(&both, 4096, 1 << 20);
    send_frame(&both.side[0], 1, 10, false);
    ring_goodbye(&both.side[0]);
    CHECK(ring_sendable(&both.side[1]) == RING_GOODBYE);
    recv_frame(&both.side[1], 1, 10, false);
    CHECK(ring_next(&both.side[1], &frame) == RING_GOODBYE);
    close_both(&both);

    open_both(&both, 4096, 1 << 20);
    send_frame(&both.side[0], 1, 10, false);
    close(both.control[0]);
    both.control[0] = -1;
    CHECK(ring_sleep(&both.side[1], RING_SEND, forever()) == RING_WOKE); /* there is room: no sleep */
    ring_look(&both.side[1]);
    CHECK(ring_sendable(&both.side[1]) == RING_ENDED);
    recv_frame(&both.side[1], 1, 10, false);
    CHECK(ring_next(&both.side[1], &frame) == RING_ENDED);
    close_both(&both);

    open_both(&both, 4096, 1 << 20);
    CHECK(send(both.control[0], "x", 1, 0) == 1);
    CHECK(ring_sleep(&both.side[1], RING_RECV, forever()) == RING_WOKE);
    CHECK(ring_next(&both.side[1], &frame) == RING_BROKEN);
    close_both(&both);
}

static void test_deadline(void)
{
    struct both both;
    open_both(&both, 4096, 1 << 20);
    int64_t begin = now();
    CHECK(ring_sleep(&both.side[0], RING_RECV, begin + 20000000) == RING_LATE);
    CHECK(now() - begin >= 20000000);
    CHECK(ring_sleep(&both.side[0], RING_RECV, begin) == RING_LATE);
    close_both(&both);
}

/* What a hostile peer may write, one word at a time. */
static void test_impossible_words(void)
{
    const uint64_t page = 4096;
    struct {
        uint64_t tail;
        uint32_t length, kind;
        uint64_t total;
    } cases[] = {
        {page + 8, 0, RECORD_WHOLE, 0},         /* more than the ring holds */
        {12, 0, RECORD_WHOLE, 0},               /* not a multiple of 8 */
        {UINT64_MAX - 7, 0, RECORD_WHOLE, 0},   /* before the head */
        {64, 57, RECORD_WHOLE, 0},              /* longer than what is committed */
        {64, UINT32_MAX, RECORD_WHOLE, 0},
        {64, 8, 0, 0},                          /* no kind */
        {64, 8, RECORD_TAG | 9, 0},
        {64, 8, RECORD_MORE, 0},                /* the middle of nothing */
        {64, 8, RECORD_LAST, 0},
        {64, 8, RECORD_FIRST, 100},             /* a first part without a byte */
        {64, 16, RECORD_FIRST, 8},              /* that is all of it already */
        {64, 16, RECORD_FIRST, 5000},           /* above the limit */
        {64, 16, RECORD_FIRST, UINT64_MAX},
        {2048, 2000, RECORD_WHOLE, 0},          /* above the limit */
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct both both;
        struct ring_frame frame;
        open_both(&both, page, 1000);
        struct record_header header = {cases[i].length, cases[i].kind};
        memcpy(both.map.data[0], &header, sizeof header);
        memcpy(both.map.data[0] + 8, &cases[i].total, 8);
        atomic_store(&both.map.header->ring[0].tail, cases[i].tail);
        CHECK(ring_next(&both.side[1], &frame) == RING_BROKEN);
        CHECK(atomic_load(&both.side[1].broken) != NULL);
        atomic_store(&both.map.header->ring[0].tail, 0);
        CHECK(ring_next(&both.side[1], &frame) == RING_BROKEN); /* for ever */
        CHECK(ring_sendable(&both.side[1]) == RING_BROKEN);
        close_both(&both);
    }
    uint64_t heads[] = {8, 4096, UINT64_MAX, 1};
    for (size_t i = 0; i < sizeof heads / sizeof *heads; i++) {
        struct both both;
        uint8_t *payload;
        open_both(&both, page, 1000);
        atomic_store(&both.map.header->ring[0].head, heads[i]);
        CHECK(ring_reserve(&both.side[0], page, &payload) == RING_BROKEN);
        close_both(&both);
    }
}

static void test_streamed_parts_must_add_up(void)
{
    struct {
        uint32_t length, kind;
    } second[] = {{0, RECORD_MORE}, {92, RECORD_MORE}, {93, RECORD_MORE}, {91, RECORD_LAST}, {93, RECORD_LAST}, {8, RECORD_WHOLE}, {16, RECORD_FIRST}};
    for (size_t i = 0; i < sizeof second / sizeof *second; i++) {
        struct both both;
        struct ring_frame frame;
        uint8_t into[100], *payload;
        uint64_t total = 100;
        open_both(&both, 4096, 1000);
        CHECK(ring_reserve(&both.side[0], 16, &payload) == RING_OK);
        memcpy(payload, &total, 8);
        ring_append(&both.side[0], 16, RECORD_FIRST);
        CHECK(ring_reserve(&both.side[0], 100, &payload) == RING_OK);
        ring_append(&both.side[0], second[i].length, (enum record_kind)second[i].kind);
        ring_publish(&both.side[0]);
        CHECK(ring_next(&both.side[1], &frame) == RING_LARGE && frame.size == 100);
        ring_assemble(&both.side[1], into, 100);
        CHECK(ring_next(&both.side[1], &frame) == RING_BROKEN);
        close_both(&both);
    }
}

/* -- two threads --------------------------------------------------------------------------------------------------- */

struct job {
    struct ring *ring;
    uint64_t frames, largest;
    bool spin, sends;
};

static void *run_job(void *given)
{
    struct job *job = given;
    for (uint64_t n = 0; n < job->frames; n++) {
        uint64_t size = size_of(n, job->largest);
        (job->sends ? send_frame : recv_frame)(job->ring, n, size, job->spin && n % 64);
    }
    return NULL;
}

/* Two sides, each with a sending and a receiving thread. */
static void test_traffic(uint64_t capacity, uint64_t largest, uint64_t frames, bool spin)
{
    struct both both;
    open_both(&both, capacity, 1 << 24);
    pthread_t threads[4];
    struct job jobs[4];
    for (int i = 0; i < 4; i++) {
        jobs[i] = (struct job){&both.side[i / 2], frames, largest, spin, i % 2};
        CHECK(pthread_create(&threads[i], NULL, run_job, &jobs[i]) == 0);
    }
    for (int i = 0; i < 4; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
    close_both(&both);
}

/* Ping-pong with every wait a sleep: the store-load race at its densest. */
static void *run_echo(void *given)
{
    struct job *job = given;
    for (uint64_t n = 0; n < job->frames; n++) {
        recv_frame(job->ring, n, 8, false);
        send_frame(job->ring, n, 8, false);
    }
    return NULL;
}

static void test_sleeping_ping_pong(void)
{
    struct both both;
    open_both(&both, 4096, 1 << 20);
    struct job echo = {.ring = &both.side[1], .frames = 20000};
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, run_echo, &echo) == 0);
    for (uint64_t n = 0; n < echo.frames; n++) {
        send_frame(&both.side[0], n, 8, false);
        recv_frame(&both.side[0], n, 8, false);
    }
    CHECK(pthread_join(thread, NULL) == 0);
    close_both(&both);
}

/* Frames that follow each other without an answer, the receiver asleep between bursts of random length. */
static void *run_bursts(void *given)
{
    struct job *job = given;
    struct timespec pause = {0, 20000};
    for (uint64_t n = 0; n < job->frames; n++) {
        send_frame(job->ring, n, 8, false);
        if (size_of(n, 15) == 0)
            nanosleep(&pause, NULL);
    }
    ring_goodbye(job->ring);
    shutdown(job->ring->control, SHUT_RDWR);
    return NULL;
}

static void test_bursts_and_goodbye(void)
{
    struct both both;
    struct ring_frame frame;
    open_both(&both, 4096, 1 << 20);
    struct job job = {.ring = &both.side[0], .frames = 20000};
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, run_bursts, &job) == 0);
    for (uint64_t n = 0; n < job.frames; n++)
        recv_frame(&both.side[1], n, 8, false);
    enum ring_status status;
    while ((status = ring_next(&both.side[1], &frame)) == RING_WAIT)
        CHECK(ring_sleep(&both.side[1], RING_RECV, forever()) == RING_WOKE);
    CHECK(status == RING_GOODBYE);
    CHECK(pthread_join(thread, NULL) == 0);
    close_both(&both);
}

static void *run_closing(void *given)
{
    struct ring *ring = given;
    struct timespec pause = {0, 20000000};
    nanosleep(&pause, NULL);
    atomic_store(&ring->closing, true);
    uint64_t one = 1;
    CHECK(write(ring->bell, &one, sizeof one) == sizeof one);
    return NULL;
}

static void test_closing_ends_spinning_and_sleeping(void)
{
    for (int spin = 0; spin < 2; spin++) {
        struct both both;
        open_both(&both, 4096, 1 << 20);
        pthread_t thread;
        CHECK(pthread_create(&thread, NULL, run_closing, &both.side[0]) == 0);
        if (spin)
            CHECK(ring_spin_until(&both.side[0], RING_RECV, forever()));
        else
            CHECK(ring_sleep(&both.side[0], RING_RECV, forever()) == RING_WOKE);
        CHECK(pthread_join(thread, NULL) == 0);
        close_both(&both);
    }
}

/* Litmus: one side commits (or gives back) while the other announces that it will sleep. Legal: the sleeper saw it, or its bell
 * was rung, or both. Neither is a sleep for ever, and what the full fences are for. */
struct litmus {
    struct both both;
    bool room; /* about giving back, not about committing */
    _Atomic uint64_t round, done;
};

#define LITMUS_ROUNDS 100000
#define LITMUS_NS INT64_C(2000000000) /* busy machines take turns with the two threads, and get less far */
#define LITMUS_OVER UINT64_MAX

static void pause_for(uint64_t number)
{
    for (volatile uint64_t i = size_of(number, 40); i; i--)
        ;
}

static void *run_litmus(void *given)
{
    struct litmus *litmus = given;
    struct ring *peer = &litmus->both.side[1];
    for (uint64_t n = 1;; n++) {
        uint64_t round;
        while ((round = atomic_load(&litmus->round)) != n)
            if (round == LITMUS_OVER)
                return NULL;
        pause_for(n);
        if (litmus->room)
            recv_frame(peer, n, 4000, false);
        else
            send_frame(peer, n, 8, false);
        atomic_store(&litmus->done, n);
    }
}

static void test_litmus(bool room)
{
    struct litmus litmus = {.room = room};
    open_both(&litmus.both, 4096, 1 << 20);
    struct ring *sleeper = &litmus.both.side[0];
    sleeper->chunk = 4096;
    int want = room ? RING_SEND : RING_RECV, bell = room ? sleeper->hear_space : sleeper->hear_data;
    uint64_t lost = 0, count;
    uint8_t *payload;
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, run_litmus, &litmus) == 0);
    int64_t until = now() + LITMUS_NS;
    for (uint64_t n = 1; n <= LITMUS_ROUNDS && now() < until; n++) {
        if (room) {
            send_frame(sleeper, n, 4000, false);
            CHECK(ring_reserve(sleeper, 4000, &payload) == RING_WAIT);
        }
        while (read(bell, &count, sizeof count) > 0)
            ;
        atomic_store(&litmus.round, n);
        pause_for(n * 7);
        ring_arm(sleeper, want);
        bool saw = ring_ready(sleeper, want);
        while (atomic_load(&litmus.done) != n)
            ;
        lost += !saw && read(bell, &count, sizeof count) < 0;
        if (!room)
            recv_frame(sleeper, n, 8, false);
    }
    atomic_store(&litmus.round, LITMUS_OVER);
    CHECK(pthread_join(thread, NULL) == 0);
    CHECK(lost == 0);
    close_both(&litmus.both);
}

/* Random bytes written into live memory. AddressSanitizer watches the memory that frames are assembled in; ThreadSanitizer would
 * only tell us that the peer races, which is the point. */
#ifndef __SANITIZE_THREAD__
static void *run_vandal(void *given)
{
    struct both *both = given;
    unsigned seed = 12345;
    while (!atomic_load(&both->side[0].closing)) {
        uint64_t word = (uint64_t)rand_r(&seed) << 33 ^ (uint64_t)rand_r(&seed) << 8 ^ (uint64_t)rand_r(&seed);
        if (word & 1) /* a plausible record header, or a small number */
            word = rand_r(&seed) % 3000 | (uint64_t)(RECORD_TAG | (unsigned)rand_r(&seed) % 6) << 32;
        else if (word & 2)
            word = (uint64_t)rand_r(&seed) % 600 * 8;
        volatile uint64_t *words = (volatile uint64_t *)(word & 4 ? (void *)both->map.header->ring : both->map.data[word >> 4 & 1]);
        words[rand_r(&seed) % (word & 4 ? sizeof both->map.header->ring / 8 : both->map.capacity / 8)] = word;
    }
    return NULL;
}

static void test_live_vandalism(void)
{
    uint8_t *source = calloc(1, 20000);
    unsigned ends = 0, frames = 0;
    int64_t until = now() + INT64_C(3000000000);
    for (unsigned run = 0; run < 3000 && now() < until; run++) {
        struct both both;
        uint8_t *into = NULL;
        open_both(&both, 4096, 5000);
        pthread_t vandal;
        struct ring *tx = &both.side[0], *rx = &both.side[1];
        struct ring_rest rest = {.from = source, .size = 4900};
        enum ring_status status = RING_OK;
        if (run % 8) /* without an honest sender, too */
            CHECK(ring_stream(tx, &rest) == RING_WAIT);
        CHECK(pthread_create(&vandal, NULL, run_vandal, &both) == 0);
        for (unsigned turn = 0; turn < 2000 && status <= RING_LARGE; turn++) {
            struct ring_frame frame;
            if (ring_stream(tx, &rest) == RING_OK)
                rest = (struct ring_rest){.from = source, .size = turn % 5000};
            status = ring_next(rx, &frame);
            if (status == RING_LARGE) {
                CHECK(frame.size <= 5000);
                free(into);
                CHECK((into = malloc(frame.size)) != NULL);
                ring_assemble(rx, into, frame.size);
            } else if (status == RING_OK) {
                frames++;
                CHECK(frame.size <= 5000);
                memcpy(source + 10000, frame.payload, frame.size);
                ring_take(rx, &frame);
                ring_release(rx);
            } else if (status == RING_WAIT && turn % 100 == 0)
                ring_sleep(rx, RING_RECV, now() + 1000);
        }
        ends += status > RING_LARGE;
        atomic_store(&tx->closing, true);
        CHECK(pthread_join(vandal, NULL) == 0);
        close_both(&both);
        free(into);
    }
    CHECK(ends > 0 && frames > 0);
    free(source);
}
#endif

int main(void)
{
#ifndef __SANITIZE_THREAD__
    test_live_vandalism();
#endif
    test_capacity();
    test_memory_shows_twice();
    test_alternating();
    test_full_and_empty();
    test_held_memory_is_not_given_back();
    test_ends();
    test_deadline();
    test_impossible_words();
    test_streamed_parts_must_add_up();
    test_traffic(4096, 600, 20000, false);
    test_traffic(4096, 600, 20000, true);
    test_traffic(4096, 9000, 3000, false);
    test_traffic(1 << 16, 200000, 200, true);
    test_sleeping_ping_pong();
    test_litmus(false);
    test_litmus(true);
    test_bursts_and_goodbye();
    test_closing_ends_spinning_and_sleeping();
    return 0;
}
