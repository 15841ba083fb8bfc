/* links: stream.c
 *
 * Frames on byte streams, without Python: what any split of the bytes yields, what ends a stream, what is kept, what wakes.
 */
#include "../../src/ipckit/_native/stream.h"

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "check.h"

enum { LIMIT = 1 << 20 };

struct end {
    struct stream_reader in;
    struct stream_writer out;
    int rfd, wfd;
};

static int64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

static void open_end(struct end *end, int rfd, int wfd)
{
    end->rfd = rfd;
    end->wfd = wfd;
    stream_open(&end->in, &end->out, rfd, wfd, LIMIT, true);
}

static void close_end(struct end *end)
{
    stream_release(&end->in, &end->out);
    close(end->rfd);
    if (end->wfd != end->rfd)
        close(end->wfd);
}

static void open_sockets(struct end ends[2])
{
    int fds[2];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) == 0);
    for (int i = 0; i < 2; i++)
        open_end(&ends[i], fds[i], fds[i]);
}

static void open_pipes(struct end ends[2])
{
    int there[2], back[2];
    CHECK(pipe2(there, O_CLOEXEC) == 0 && pipe2(back, O_CLOEXEC) == 0);
    open_end(&ends[0], back[0], there[1]);
    open_end(&ends[1], there[0], back[1]);
}

/* A raw socket with bytes to feed, and the end that reads them. */
static int open_raw(struct end *end)
{
    int fds[2];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) == 0);
    open_end(end, fds[0], fds[0]);
    return fds[1];
}

static void feed(int raw, const void *bytes, size_t size)
{
    CHECK(send(raw, bytes, size, MSG_NOSIGNAL) == (ssize_t)size);
}

static unsigned char pattern(size_t frame, size_t i)
{
    return (unsigned char)(frame * 31 + i * 7 + (i >> 8));
}

static size_t size_of(size_t frame)
{
    static const size_t sizes[] = {0, 1, 64, 3, 4096, 65531, 65532, 65533, 100, 70000, 0, 300000, 2, LIMIT, 9};
    return sizes[frame % (sizeof sizes / sizeof *sizes)];
}

static void check_frame(const struct stream_view *view, size_t frame)
{
    CHECK(view->size == size_of(frame));
    for (size_t i = 0; i < view->size; i++)
        CHECK(view->data[i] == pattern(frame, i));
}

/* As the link does it: peek, give memory, fill, wait. STREAM_FRAME, or why not. */
static enum stream_status receive(struct stream_reader *in, int bell, int64_t deadline, struct stream_view *view, void **memory)
{
    for (;;) {
        enum stream_status status = stream_peek(in, view);
        if (status == STREAM_LARGE) {
            size_t size;
            CHECK(stream_announced(in, &size));
            stream_target(in, *memory = malloc(size));
        } else if (status != STREAM_AGAIN)
            return status;
        if (stream_fill(in) != STREAM_AGAIN)
            continue;
        status = stream_await(in, NULL, bell, deadline);
        if (status != STREAM_OK && status != STREAM_SIGNAL)
            return status;
    }
}

static void take(struct stream_reader *in, const struct stream_view *view, void **memory)
{
    stream_take(in, view);
    free(*memory);
    *memory = NULL;
}

static enum stream_status send_frame(struct stream_writer *out, size_t frame, int bell)
{
    size_t size = size_of(frame), sent = 0;
    unsigned char header[STREAM_HEADER], *payload = malloc(size + 1);
    for (size_t i = 0; i < size; i++)
        payload[i] = pattern(frame, i);
    stream_header(header, size);
    struct iovec vectors[2] = {{header, STREAM_HEADER}, {payload, size}};
    enum stream_status status = stream_push(out, vectors, 2, &sent, bell, STREAM_FOREVER);
    CHECK(status != STREAM_OK || sent == STREAM_HEADER + size);
    free(payload);
    return status;
}

/* -- frames ---------------------------------------------------------------------------------------------------- */

struct traffic {
    struct end *end;
    size_t frames;
};

static void *send_all(void *argument)
{
    struct traffic *traffic = argument;
    for (size_t i = 0; i < traffic->frames; i++)
        CHECK(send_frame(&traffic->end->out, i, -1) == STREAM_OK);
    return NULL;
}

static void *receive_all(void *argument)
{
    struct traffic *traffic = argument;
    void *memory = NULL;
    for (size_t i = 0; i < traffic->frames; i++) {
        struct stream_view view;
        CHECK(receive(&traffic->end->in, -1, STREAM_FOREVER, &view, &memory) == STREAM_FRAME);
        check_frame(&view, i);
        take(&traffic->end->in, &view, &memory);
    }
    return NULL;
}

/* Each end has one thread that sends and one that receives. */
static void both_ways(struct end ends[2])
{
    struct traffic traffic[2] = {{&ends[0], 60}, {&ends[1], 60}};
    pthread_t threads[4];
    for (int i = 0; i < 4; i++)
        CHECK(pthread_create(&threads[i], NULL, i % 2 ? send_all : receive_all, &traffic[i / 2]) == 0);
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
    close_end(&ends[0]);
    close_end(&ends[1]);
}

static void frames_go_both_ways_on_sockets(void)
{
    struct end ends[2];
    open_sockets(ends);
    both_ways(ends);
}

static void frames_go_both_ways_on_pipes(void)
{
    struct end ends[2];
    open_pipes(ends);
    both_ways(ends);
}

static void any_split_yields_the_same_frames(void)
{
    for (unsigned seed = 1; seed < 60; seed++) {
        unsigned dice = seed;
        struct end end;
        int raw = open_raw(&end);
        size_t frames = 9, total = 0, fed = 0, seen = 0;
        unsigned char *bytes = malloc(1 << 20);
        for (size_t frame = 0; frame < frames; frame++) {
            size_t size = size_of(frame);
            stream_header(bytes + total, size);
            for (size_t i = 0; i < size; i++)
                bytes[total + STREAM_HEADER + i] = pattern(frame, i);
            total += STREAM_HEADER + size;
        }
        void *memory = NULL;
        while (seen < frames) {
            if (fed < total) {
                size_t piece = (size_t)rand_r(&dice) % (seed % 3 ? 40000 : 7) + 1;
                piece = piece < total - fed ? piece : total - fed;
                feed(raw, bytes + fed, piece);
                fed += piece;
            }
            struct stream_view view;
            enum stream_status status = receive(&end.in, -1, 0, &view, &memory);
            CHECK(status == STREAM_FRAME || (status == STREAM_AGAIN && fed < total));
            if (status == STREAM_FRAME) {
                check_frame(&view, seen++);
                take(&end.in, &view, &memory);
            }
        }
        free(bytes);
        close(raw);
        close_end(&end);
    }
}

/* -- ends ------------------------------------------------------------------------------------------------------ */

static enum stream_status ending_of(const char *bytes, size_t size, size_t frames_before)
{
    struct end end;
    struct stream_view view;
    void *memory = NULL;
    int raw = open_raw(&end);
    feed(raw, bytes, size);
    close(raw);
    enum stream_status status;
    for (size_t seen = 0; (status = receive(&end.in, -1, STREAM_FOREVER, &view, &memory)) == STREAM_FRAME; seen++) {
        CHECK(seen < frames_before);
        take(&end.in, &view, &memory);
    }
    CHECK(receive(&end.in, -1, STREAM_FOREVER, &view, &memory) == status); /* and says the same again */
    CHECK(stream_fill(&end.in) != STREAM_OK);
    free(memory);
    close_end(&end);
    return status;
}

static void every_end_is_told_apart(void)
{
#define ENDING(text, frames) ending_of(text, sizeof text - 1, frames)
    CHECK(ENDING("\0\0\0\1x", 1) == STREAM_ENDED);
    CHECK(ENDING("\0\0\0\1x\0\0", 1) == STREAM_TORN);
    CHECK(ENDING("\0\0\0\5abc", 0) == STREAM_TORN);
    CHECK(ENDING("\0\1\0\0abc", 0) == STREAM_TORN); /* of a large frame */
    CHECK(ENDING("\0\0\0\1x\xff\xff\xff\xff", 1) == STREAM_GOODBYE);
    CHECK(ENDING("\0\0\0\1x\xff\xff\xff", 1) == STREAM_TORN);
    CHECK(ENDING("\xff\xff\xff\xff\0\0\0\1x", 0) == STREAM_GOODBYE); /* nothing comes after it */
    CHECK(ENDING("\0\0\0\1x\0\x10\0\1", 1) == STREAM_OVERSIZE);
    CHECK(ENDING("\xff\xff\xff\xfe", 0) == STREAM_OVERSIZE);
}

static void without_goodbyes_the_word_is_a_length(void)
{
    struct end end;
    struct stream_view view;
    int raw = open_raw(&end);
    end.in.goodbye = false;
    feed(raw, "\xff\xff\xff\xff", 4);
    CHECK(stream_fill(&end.in) == STREAM_OK);
    CHECK(stream_peek(&end.in, &view) == STREAM_OVERSIZE && end.in.size == 0xffffffff);
    close(raw);
    close_end(&end);
}

static void the_end_is_foreseen_behind_frames(void)
{
    struct end ends[2];
    struct stream_view view;
    void *memory = NULL;
    open_sockets(ends);
    size_t frames = 5;
    for (size_t i = 0; i < frames; i++)
        CHECK(send_frame(&ends[0].out, i, -1) == STREAM_OK);
    CHECK(stream_fill(&ends[1].in) == STREAM_OK);
    CHECK(stream_foresee(&ends[1].in, 16 << 20) == STREAM_AGAIN);
    CHECK(stream_farewell(&ends[0].out, true));
    close_end(&ends[0]);
    CHECK(stream_foresee(&ends[1].in, 16 << 20) == STREAM_GOODBYE);
    for (size_t i = 0; i < frames; i++) {
        CHECK(receive(&ends[1].in, -1, 0, &view, &memory) == STREAM_FRAME);
        check_frame(&view, i);
        take(&ends[1].in, &view, &memory);
    }
    CHECK(receive(&ends[1].in, -1, 0, &view, &memory) == STREAM_GOODBYE);
    close_end(&ends[1]);
}

static void memory_can_change_in_mid_frame(void)
{
    struct end end;
    struct stream_view view;
    int raw = open_raw(&end);
    size_t size = 100000;
    unsigned char *bytes = malloc(STREAM_HEADER + size), *first = malloc(size), *second = malloc(size);
    stream_header(bytes, size);
    for (size_t i = 0; i < size; i++)
        bytes[STREAM_HEADER + i] = pattern(1, i);
    feed(raw, bytes, 30000);
    CHECK(stream_fill(&end.in) == STREAM_OK && stream_peek(&end.in, &view) == STREAM_LARGE);
    stream_target(&end.in, first);
    feed(raw, bytes + 30000, 20000);
    CHECK(stream_fill(&end.in) == STREAM_OK && stream_peek(&end.in, &view) == STREAM_AGAIN);
    stream_retarget(&end.in, second);
    free(first);
    feed(raw, bytes + 50000, STREAM_HEADER + size - 50000);
    while (stream_peek(&end.in, &view) == STREAM_AGAIN)
        CHECK(stream_fill(&end.in) == STREAM_OK);
    CHECK(view.data == second && memcmp(second, bytes + STREAM_HEADER, size) == 0);
    stream_take(&end.in, &view);
    free(bytes);
    free(second);
    close(raw);
    close_end(&end);
}

/* -- sending --------------------------------------------------------------------------------------------------- */

static void a_rest_is_kept_and_goes_out_with_the_goodbye(struct end ends[2])
{
    unsigned char header[STREAM_HEADER], *payload = malloc(LIMIT);
    struct stream_view view;
    void *memory = NULL;
    /* Fill the kernel's buffer with whole frames and a part of one, whose rest is small enough for the farewell. */
    size_t frame = 3, size = size_of(frame), total = STREAM_HEADER + size, sent = 0, whole = 0;
    for (size_t i = 0; i < size; i++)
        payload[i] = pattern(frame, i);
    stream_header(header, size);
    struct iovec vectors[2] = {{header, STREAM_HEADER}, {payload, size}};
    while (stream_put(&ends[0].out, vectors, 2, &sent) == STREAM_OK) {
        sent = 0;
        whole++;
    }
    CHECK(whole > 100);
    CHECK(stream_keep(&ends[0].out, vectors, 2, sent, total));
    memset(payload, 0, size); /* it is a copy */
    CHECK(stream_pending(&ends[0].out) && stream_flush(&ends[0].out) == STREAM_AGAIN);
    int64_t start = now();
    CHECK(stream_flush_wait(&ends[0].out, -1, start + 20000000) == STREAM_AGAIN && now() >= start + 20000000);
    CHECK(stream_farewell(&ends[0].out, true));
    close_end(&ends[0]);
    for (size_t i = 0; i <= whole; i++) {
        CHECK(receive(&ends[1].in, -1, STREAM_FOREVER, &view, &memory) == STREAM_FRAME);
        check_frame(&view, frame);
        take(&ends[1].in, &view, &memory);
    }
    CHECK(receive(&ends[1].in, -1, STREAM_FOREVER, &view, &memory) == STREAM_GOODBYE);
    close_end(&ends[1]);
    free(payload);
}

static void a_rest_is_kept_on_sockets(void)
{
    struct end ends[2];
    open_sockets(ends);
    a_rest_is_kept_and_goes_out_with_the_goodbye(ends);
}

static void a_rest_is_kept_on_pipes(void)
{
    struct end ends[2];
    open_pipes(ends);
    a_rest_is_kept_and_goes_out_with_the_goodbye(ends);
}

static void a_broken_stream_is_an_error_and_no_signal(void)
{
    for (int pipes = 0; pipes < 2; pipes++) {
        struct end ends[2];
        if (pipes)
            open_pipes(ends);
        else
            open_sockets(ends);
        close_end(&ends[1]);
        CHECK(send_frame(&ends[0].out, 2, -1) == STREAM_FAILED && ends[0].out.error == EPIPE);
        close_end(&ends[0]);
    }
}

/* -- waking ---------------------------------------------------------------------------------------------------- */

struct sleeper {
    struct end *end;
    int bell;
    enum stream_status status;
};

static void *sleep_there(void *argument)
{
    struct sleeper *sleeper = argument;
    sleeper->status = stream_await(&sleeper->end->in, NULL, sleeper->bell, STREAM_FOREVER);
    return NULL;
}

static void close_wakes_a_receiver(void)
{
    for (int pipes = 0; pipes < 2; pipes++) {
        struct end ends[2];
        if (pipes)
            open_pipes(ends);
        else
            open_sockets(ends);
        struct sleeper sleeper = {&ends[0], eventfd(0, EFD_CLOEXEC), STREAM_FAILED};
        pthread_t thread;
        CHECK(pthread_create(&thread, NULL, sleep_there, &sleeper) == 0);
        nanosleep(&(struct timespec){0, 20000000}, NULL);
        CHECK(eventfd_write(sleeper.bell, 1) == 0);
        if (!pipes)
            shutdown(ends[0].rfd, SHUT_RD);
        pthread_join(thread, NULL);
        CHECK(sleeper.status == (pipes ? STREAM_BELL : STREAM_OK));
        close(sleeper.bell);
        close_end(&ends[0]);
        close_end(&ends[1]);
    }
}

static void deadlines_are_never_early(void)
{
    struct end ends[2];
    open_sockets(ends);
    static const int64_t waits[] = {1000000, 15000000, 17000000, 40000000, 5000000};
    for (size_t i = 0; i < sizeof waits / sizeof *waits; i++) {
        int64_t start = now();
        CHECK(stream_await(&ends[0].in, NULL, -1, start + waits[i]) == STREAM_AGAIN);
        CHECK(now() >= start + waits[i]);
        CHECK(!stream_spin(&ends[0].in, now() + 1000000));
    }
    close_end(&ends[0]);
    close_end(&ends[1]);
}

static void nothing(int signal)
{
    (void)signal;
}

static void *interrupt(void *argument)
{
    nanosleep(&(struct timespec){0, 30000000}, NULL);
    pthread_kill(*(pthread_t *)argument, SIGUSR1);
    return NULL;
}

static void a_signal_interrupts(void)
{
    struct sigaction action = {.sa_handler = nothing, .sa_flags = SA_RESTART}; /* even where it would restart a recv */
    sigaction(SIGUSR1, &action, NULL);
    for (int pipes = 0; pipes < 2; pipes++) {
        struct end ends[2];
        pthread_t self = pthread_self(), thread;
        if (pipes)
            open_pipes(ends);
        else
            open_sockets(ends);
        CHECK(pthread_create(&thread, NULL, interrupt, &self) == 0);
        CHECK(stream_await(&ends[0].in, NULL, -1, STREAM_FOREVER) == STREAM_SIGNAL);
        pthread_join(thread, NULL);
        close_end(&ends[0]);
        close_end(&ends[1]);
    }
}

static void waiting_to_receive_drives_the_rest_out(void)
{
    struct end ends[2];
    open_sockets(ends);
    unsigned char *payload = calloc(1, LIMIT);
    struct iovec vector = {payload, LIMIT};
    size_t sent = 0;
    CHECK(stream_put(&ends[0].out, &vector, 1, &sent) == STREAM_AGAIN && sent < LIMIT);
    CHECK(stream_keep(&ends[0].out, &vector, 1, sent, LIMIT));
    shutdown(ends[1].wfd, SHUT_WR); /* so that the await below ends in any case */
    char waste[1 << 16];
    for (size_t got = 0; got < LIMIT;) {
        ssize_t n = recv(ends[1].rfd, waste, sizeof waste, MSG_DONTWAIT);
        if (n > 0)
            got += (size_t)n;
        else {
            ends[0].in.over = STREAM_OK;
            enum stream_status status = stream_await(&ends[0].in, &ends[0].out, -1, now() + 1000000000);
            CHECK(status == STREAM_OK || status == STREAM_FLUSHED);
            stream_flush(&ends[0].out);
        }
    }
    CHECK(!stream_pending(&ends[0].out));
    free(payload);
    close_end(&ends[0]);
    close_end(&ends[1]);
}

static void a_header_that_the_length_does_not_count(void)
{
    struct end end;
    struct stream_view view;
    int raw = open_raw(&end);
    CHECK(stream_fill(&end.in) == STREAM_AGAIN && stream_glance(&end.in, 5) == NULL);
    feed(raw, "\0\0\0\0\2\4", 6);
    CHECK(stream_fill(&end.in) == STREAM_OK);
    CHECK(stream_glance(&end.in, 7) == NULL && !memcmp(stream_glance(&end.in, 5), "\0\0\0\0\2", 5));
    end.in.uncounted = 3;
    CHECK(stream_peek(&end.in, &view) == STREAM_AGAIN);
    feed(raw, "\1\0\0\0\2\2\1\1{}", 10);
    CHECK(stream_fill(&end.in) == STREAM_OK);
    CHECK(stream_peek(&end.in, &view) == STREAM_FRAME && view.size == 3 && !memcmp(view.data, "\2\4\1", 3));
    stream_take(&end.in, &view);
    CHECK(stream_peek(&end.in, &view) == STREAM_FRAME && view.size == 5 && !memcmp(view.data, "\2\1\1{}", 5));
    stream_take(&end.in, &view);

    /* A large frame: its memory has to hold the header too. */
    unsigned char *memory = malloc(LIMIT + 3);
    size_t size;
    feed(raw, "\0\x10\0\0\2\1\1", 7);
    CHECK(stream_fill(&end.in) == STREAM_OK && stream_peek(&end.in, &view) == STREAM_LARGE);
    CHECK(stream_announced(&end.in, &size) && size == LIMIT + 3);
    stream_target(&end.in, memory);
    for (size_t sent = 0; sent < LIMIT; sent += 4096) {
        unsigned char page[4096] = {(unsigned char)(sent >> 12)};
        feed(raw, page, sizeof page);
        CHECK(stream_fill(&end.in) == STREAM_OK);
    }
    CHECK(stream_peek(&end.in, &view) == STREAM_FRAME && view.size == LIMIT + 3 && view.data[LIMIT + 3 - 4096] == 255);
    stream_take(&end.in, &view);
    free(memory);
    close_end(&end);
    close(raw);
}

int main(void)
{
    alarm(100);
    RUN(a_header_that_the_length_does_not_count);
    RUN(frames_go_both_ways_on_sockets);
    RUN(frames_go_both_ways_on_pipes);
    RUN(any_split_yields_the_same_frames);
    RUN(every_end_is_told_apart);
    RUN(without_goodbyes_the_word_is_a_length);
    RUN(the_end_is_foreseen_behind_frames);
    RUN(memory_can_change_in_mid_frame);
    RUN(a_rest_is_kept_on_sockets);
    RUN(a_rest_is_kept_on_pipes);
    RUN(a_broken_stream_is_an_error_and_no_signal);
    RUN(close_wakes_a_receiver);
    RUN(deadlines_are_never_early);
    RUN(a_signal_interrupts);
    RUN(waiting_to_receive_drives_the_rest_out);
    return 0;
}
