/* links: latest.c lock.c
 *
 * The newest value: no torn copy, no step back, no lost wake-up, and what a writer killed at each numbered step leaves behind.
 *
 * The litmus loops list which outcomes are legal, count them, and fail at any other. What the memory model forbids may show on one machine
 * in a million; ThreadSanitizer, under which this runs as well, finds what is not ordered without seeing it go wrong. */
#include "../../src/ipckit/_native/latest.h"
#include "../../src/ipckit/_native/steps.h"

#include "check.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static struct latest_view made(uint64_t capacity)
{
    struct latest *at = mmap(NULL, latest_bytes(capacity), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(at != MAP_FAILED);
    latest_format(at, capacity);
    struct latest_view view;
    CHECK(latest_check(at, latest_bytes(capacity), &view) == NULL);
    return view;
}

static void unmade(struct latest_view *view)
{
    munmap(view->at, latest_bytes(view->capacity));
}

static int64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* As the Python glue does it. */
static uint64_t read_newest(const struct latest_view *view, void *out, uint64_t *length)
{
    uint64_t number;
    do
        CHECK(latest_newest(view, &number, length));
    while (number && !latest_copy(view, number, out, *length));
    return number;
}

static uint64_t write_number(const struct latest_view *view, uint64_t n)
{
    uint64_t words[8];
    for (int i = 0; i < 8; i++)
        words[i] = n * 8 + (uint64_t)i;
    return latest_write(view, words, sizeof words);
}

static uint64_t read_number(const struct latest_view *view)
{
    uint64_t words[8], length, number = read_newest(view, words, &length);
    if (number == 0)
        return 0;
    CHECK(length == sizeof words);
    for (int i = 0; i < 8; i++)
        CHECK(words[i] == words[0] + (uint64_t)i); /* not torn */
    CHECK(words[0] / 8 == number);
    return number;
}

/* -- one thread ----------------------------------------------------------------------------------------------------- */

static void any_length(void)
{
    struct latest_view view = made(100);
    char in[100], out[100];
    uint64_t length;
    CHECK(read_newest(&view, out, &length) == 0);
    for (uint64_t n = 1; n <= 300; n++) {
        uint64_t size = n * 37 % 101;
        memset(in, (int)n, sizeof in);
        CHECK(latest_write(&view, in, size) == n);
        memset(out, 0, sizeof out);
        CHECK(read_newest(&view, out, &length) == n && length == size && memcmp(in, out, size) == 0);
        CHECK(size == 100 || out[size] == 0);
    }
    unmade(&view);
}

static void damaged(void)
{
    struct latest_view view = made(64), other;
    uint64_t bytes = latest_bytes(64), number, length;
    CHECK(latest_bytes(UINT64_MAX) == 0);
    CHECK(latest_check(view.at, 100, &other) && latest_check(view.at, bytes - 1, &other));
    struct latest good = {.magic = view.at->magic, .version = 1, .slots = 4, .capacity = 64, .size = bytes};
    view.at->capacity = UINT64_MAX - 100;
    CHECK(latest_check(view.at, bytes, &other));
    view.at->capacity = good.capacity;
    view.at->slots = 0;
    CHECK(latest_check(view.at, bytes, &other));
    view.at->slots = good.slots;
    view.at->magic++;
    CHECK(latest_check(view.at, bytes, &other));
    view.at->magic--;
    CHECK(latest_check(view.at, bytes, &other) == NULL);
    write_number(&view, 1);
    struct latest_slot *slot = (struct latest_slot *)((char *)(view.at + 1) + view.stride);
    atomic_store(&slot->length, 65); /* more than there is room for */
    CHECK(!latest_newest(&view, &number, &length));
    atomic_store(&slot->length, 64);
    atomic_store(&view.at->current, 7); /* whose slot says otherwise: told after a while, not waited for */
    CHECK(!latest_newest(&view, &number, &length));
    unmade(&view);
}

/* -- litmus --------------------------------------------------------------------------------------------------------- */

#define READS 100000
#define ROUNDS 8000

struct pair {
    struct latest_view a, b;
    _Atomic unsigned readers;
    _Atomic uint64_t outcomes[3];
};

/* As long as anybody reads, so that reads and writes do overlap. */
static void *pair_writer(void *argument)
{
    struct pair *p = argument;
    for (uint64_t n = 1; atomic_load(&p->readers); n++) {
        write_number(&p->a, n);
        write_number(&p->b, n);
    }
    return NULL;
}

static void *pair_reader(void *argument)
{
    struct pair *p = argument;
    uint64_t last_a = 0, last_b = 0, seen[3] = {0};
    for (unsigned i = 0; i < READS; i++) {
        uint64_t b = read_number(&p->b), a = read_number(&p->a);
        CHECK(a >= last_a && b >= last_b); /* coherence: a reader never steps back */
        last_a = a;
        last_b = b;
        /* message passing: A n, then B n are written; B, then A are read. Legal: both, A further. Illegal: B without its A. */
        CHECK(a >= b);
        seen[a == b ? 0 : a == b + 1 ? 1 : 2]++;
    }
    for (int i = 0; i < 3; i++)
        atomic_fetch_add(&p->outcomes[i], seen[i]);
    atomic_fetch_sub(&p->readers, 1);
    return NULL;
}

static void litmus_message_passing(void)
{
    struct pair p = {.a = made(64), .b = made(64), .readers = 2};
    pthread_t threads[3];
    for (int i = 0; i < 3; i++)
        CHECK(pthread_create(&threads[i], NULL, i ? pair_reader : pair_writer, &p) == 0);
    for (int i = 0; i < 3; i++)
        pthread_join(threads[i], NULL);
    fprintf(stderr, "   both %lu, a one further %lu, a more %lu, b without a 0\n", (unsigned long)p.outcomes[0],
            (unsigned long)p.outcomes[1], (unsigned long)p.outcomes[2]);
    unmade(&p.a);
    unmade(&p.b);
}

/* Store buffering: the writer publishes, then looks who waits; the waiter announces, then looks what is published. Legal: the writer sees
 * the waiter, the waiter sees the value, or both. Illegal: neither, which is a lost wake-up. Here nobody sleeps: a word says what was seen. */
struct buffering {
    struct latest_view v;
    _Atomic uint64_t round[2];
    uint64_t outcomes[4];
};

static void meet(struct buffering *s, int who, uint64_t round)
{
    atomic_store(&s->round[who], round);
    for (unsigned spins = 0; atomic_load(&s->round[!who]) < round; spins++)
        if (spins % 256 == 255)
            sched_yield();
}

/* Each comes first now and then. */
static void dawdle(uint64_t chance)
{
    for (uint64_t i = chance % 128; i > 0; i--)
        atomic_signal_fence(memory_order_seq_cst);
}

static void *buffering_writer(void *argument)
{
    struct buffering *s = argument;
    for (uint64_t n = 1; n <= ROUNDS; n++) {
        meet(s, 0, n * 2 - 1);
        dawdle(n * 2654435761 >> 8);
        write_number(&s->v, n); /* its wake() takes the announcement away if it sees it */
        meet(s, 0, n * 2);
    }
    return NULL;
}

static void litmus_store_buffering(void)
{
    struct buffering s = {.v = made(64)};
    pthread_t writer;
    CHECK(pthread_create(&writer, NULL, buffering_writer, &s) == 0);
    for (uint64_t n = 1; n <= ROUNDS; n++) {
        meet(&s, 1, n * 2 - 1);
        dawdle(n * 2654435761 >> 16);
        uint32_t word;
        bool sleeps = latest_announce(&s.v, n - 1, &word);
        meet(&s, 1, n * 2);
        /* Whoever would sleep was seen, and woken: the announcement is gone. */
        bool pending = atomic_load(&s.v.at->waiting) != 0;
        CHECK(!(sleeps && pending)); /* illegal: asleep, and nobody looked */
        s.outcomes[sleeps * 2 + pending]++;
        atomic_store(&s.v.at->waiting, 0);
    }
    pthread_join(writer, NULL);
    fprintf(stderr, "   asleep and woken %lu, saw the value %lu, both %lu, neither 0\n", (unsigned long)s.outcomes[2],
            (unsigned long)s.outcomes[1], (unsigned long)s.outcomes[0]);
    unmade(&s.v);
}

/* -- waiting -------------------------------------------------------------------------------------------------------- */

struct lag {
    struct latest_view there, back;
};

static void wait_for(const struct latest_view *view, uint64_t number)
{
    int64_t deadline = now_ns() + INT64_C(60000000000);
    while (read_number(view) < number)
        CHECK(latest_sleep(view, number - 1, deadline) != ETIMEDOUT);
}

static void *answering(void *argument)
{
    struct lag *l = argument;
    for (uint64_t n = 1; n <= 2000; n++) {
        wait_for(&l->there, n);
        write_number(&l->back, n);
    }
    return NULL;
}

/* A lost wake-up costs a second, so some of them would end in the alarm. */
static void nobody_sleeps_through(void)
{
    struct lag l = {made(64), made(64)};
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, answering, &l) == 0);
    int64_t began = now_ns();
    for (uint64_t n = 1; n <= 2000; n++) {
        write_number(&l.there, n);
        wait_for(&l.back, n);
    }
    pthread_join(thread, NULL);
    CHECK(now_ns() - began < INT64_C(60000000000));
    CHECK(latest_sleep(&l.there, 2000, now_ns()) == ETIMEDOUT);
    CHECK(latest_sleep(&l.there, 1999, now_ns()) == 0);
    CHECK(latest_sleep(&l.there, 9000, now_ns() + 1000000) == ETIMEDOUT); /* far away: asleep until then, not spinning */
    unmade(&l.there);
    unmade(&l.back);
}

/* -- kills ---------------------------------------------------------------------------------------------------------- */

static int die_at;

static void die(int step)
{
    if (step == die_at)
        kill(getpid(), SIGKILL);
}

static void killed_at(int step, uint64_t before)
{
    struct latest_view view = made(64);
    for (uint64_t n = 1; n <= before; n++)
        write_number(&view, n);
    uint32_t word;
    CHECK(latest_announce(&view, before, &word)); /* or it would not come by all steps */
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        die_at = step;
        step_hook = die;
        write_number(&view, before + 1);
        _exit(0);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child && WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
    uint64_t found = read_number(&view);
    CHECK(found == before || found == before + 1);
    CHECK(found == (step > 73 ? before + 1 : before));
    /* The next writer goes on from there. */
    for (uint64_t n = found + 1; n <= found + 10; n++) {
        CHECK(write_number(&view, n) == n);
        CHECK(read_number(&view) == n);
    }
    unmade(&view);
}

static void kills_at_every_step(void)
{
    for (int step = 70; step <= 76; step++)
        for (uint64_t before = 0; before <= 5; before++)
            killed_at(step, before);
}

int main(void)
{
    alarm(100);
    RUN(any_length);
    RUN(damaged);
    RUN(litmus_message_passing);
    RUN(litmus_store_buffering);
    RUN(nobody_sleeps_through);
    RUN(kills_at_every_step);
    return 0;
}
