/* stream.c — see stream.h. */
#include "stream.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#ifndef RWF_NOSIGNAL
#define RWF_NOSIGNAL 0x00000100 /* Linux 6.18: a broken pipe is EPIPE and nothing else */
#endif

static int64_t clock_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static bool is_socket(int fd)
{
    int type;
    socklen_t length = sizeof type;
    return getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &length) == 0;
}

static void set_nonblocking(int fd, bool on)
{
    int flags = fcntl(fd, F_GETFL);
    if (flags >= 0 && !(flags & O_NONBLOCK) == on)
        fcntl(fd, F_SETFL, flags ^ O_NONBLOCK);
}

void stream_open(struct stream_reader *reader, struct stream_writer *writer, int rfd, int wfd, uint64_t limit, bool goodbye)
{
    uint64_t largest = goodbye ? STREAM_GOODBYE_WORD - 1 : STREAM_GOODBYE_WORD;
    *reader = (struct stream_reader){
        .fd = rfd, .socket = is_socket(rfd), .goodbye = goodbye, .limit = limit < largest ? limit : largest};
    *writer = (struct stream_writer){.fd = wfd, .socket = is_socket(wfd)};
    set_nonblocking(rfd, !reader->socket);
    set_nonblocking(wfd, !writer->socket);
}

void stream_hand_back(struct stream_reader *reader, struct stream_writer *writer)
{
    set_nonblocking(reader->fd, true);
    set_nonblocking(writer->fd, true);
    if (reader->patience)
        setsockopt(reader->fd, SOL_SOCKET, SO_RCVTIMEO, &(struct timeval){0, 0}, sizeof(struct timeval));
}

void stream_release(struct stream_reader *reader, struct stream_writer *writer)
{
    free(reader->buffer);
    free(writer->rest);
    reader->buffer = writer->rest = NULL;
    reader->capacity = reader->begin = reader->end = 0;
    writer->capacity = writer->begin = writer->end = 0;
}

/* -- reading --------------------------------------------------------------------------------------------------- */

static uint32_t prefix_at(const unsigned char *at)
{
    return (uint32_t)at[0] << 24 | (uint32_t)at[1] << 16 | (uint32_t)at[2] << 8 | at[3];
}

/* Over, seen from inside a frame or between two. */
static enum stream_status ending(const struct stream_reader *reader, bool inside)
{
    if (reader->over == STREAM_OK)
        return STREAM_AGAIN;
    return reader->over == STREAM_ENDED && inside ? STREAM_TORN : reader->over;
}

/* The size of the frame whose prefix stands at `begin`. */
static size_t size_at_begin(const struct stream_reader *reader)
{
    return prefix_at(reader->buffer + reader->begin) + reader->uncounted;
}

const unsigned char *stream_glance(const struct stream_reader *reader, size_t count)
{
    return reader->target || reader->end - reader->begin < count ? NULL : reader->buffer + reader->begin;
}

enum stream_status stream_peek(struct stream_reader *reader, struct stream_view *view)
{
    if (reader->target) {
        if (reader->have < reader->size)
            return ending(reader, true);
        *view = (struct stream_view){reader->target, reader->size};
        return STREAM_FRAME;
    }
    size_t here = reader->end - reader->begin;
    if (here < STREAM_HEADER)
        return ending(reader, here != 0);
    uint32_t counted = prefix_at(reader->buffer + reader->begin);
    if (counted > reader->limit) {
        reader->size = counted;
        return reader->over = counted == STREAM_GOODBYE_WORD && reader->goodbye ? STREAM_GOODBYE : STREAM_OVERSIZE;
    }
    size_t size = counted + reader->uncounted;
    if (here - STREAM_HEADER >= size) {
        *view = (struct stream_view){reader->buffer + reader->begin + STREAM_HEADER, size};
        return STREAM_FRAME;
    }
    if (reader->over != STREAM_OK)
        return ending(reader, true);
    return STREAM_HEADER + size > STREAM_BUFFER ? STREAM_LARGE : STREAM_AGAIN;
}

void stream_take(struct stream_reader *reader, const struct stream_view *view)
{
    if (reader->target) {
        reader->target = NULL;
        return;
    }
    reader->begin += STREAM_HEADER + view->size;
    if (reader->begin == reader->end)
        reader->begin = reader->end = 0;
}

bool stream_announced(const struct stream_reader *reader, size_t *size)
{
    if (reader->target) {
        *size = reader->size;
        return true;
    }
    if (reader->end - reader->begin < STREAM_HEADER)
        return false;
    *size = size_at_begin(reader);
    return true;
}

void stream_target(struct stream_reader *reader, void *memory)
{
    reader->size = size_at_begin(reader);
    reader->have = reader->end - reader->begin - STREAM_HEADER;
    reader->target = memory;
    memcpy(memory, reader->buffer + reader->begin + STREAM_HEADER, reader->have);
    reader->begin = reader->end = 0; /* an unfinished frame is the last thing in the buffer */
}

void stream_retarget(struct stream_reader *reader, void *memory)
{
    memcpy(memory, reader->target, reader->have);
    reader->target = memory;
}

static ssize_t read_some(const struct stream_reader *reader, struct iovec *vectors, int count, int flags)
{
    if (!reader->socket)
        return count == 1 ? read(reader->fd, vectors->iov_base, vectors->iov_len) : readv(reader->fd, vectors, count);
    if (count == 1)
        return recv(reader->fd, vectors->iov_base, vectors->iov_len, flags);
    return recvmsg(reader->fd, &(struct msghdr){.msg_iov = vectors, .msg_iovlen = (size_t)count}, flags);
}

static enum stream_status read_failed(struct stream_reader *reader, ssize_t got)
{
    if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
        return STREAM_AGAIN;
    if (got < 0 && errno == EINTR)
        return STREAM_SIGNAL;
    if (got < 0)
        reader->error = errno;
    return reader->over = got < 0 ? STREAM_FAILED : STREAM_ENDED;
}

/* Make room for `capacity` bytes behind `begin`. */
static bool make_room(struct stream_reader *reader, size_t capacity)
{
    size_t here = reader->end - reader->begin;
    if (reader->capacity < capacity) {
        unsigned char *larger = malloc(capacity);
        if (!larger) {
            reader->error = ENOMEM;
            reader->over = STREAM_FAILED;
            return false;
        }
        if (here)
            memcpy(larger, reader->buffer + reader->begin, here);
        free(reader->buffer);
        reader->buffer = larger;
        reader->capacity = capacity;
    } else
        memmove(reader->buffer, reader->buffer + reader->begin, here);
    reader->begin = 0;
    reader->end = here;
    return true;
}

static enum stream_status fill(struct stream_reader *reader, int flags)
{
    if (reader->over != STREAM_OK)
        return reader->over;
    /* The memmove is of one unfinished frame at most: every whole one was taken before more is read. */
    if ((reader->begin || !reader->buffer) && !make_room(reader, STREAM_BUFFER))
        return reader->over;
    struct iovec vectors[2] = {{reader->buffer + reader->end, reader->capacity - reader->end}};
    if (!reader->target || reader->have == reader->size) {
        ssize_t got = read_some(reader, vectors, 1, flags);
        if (got <= 0)
            return read_failed(reader, got);
        reader->end += (size_t)got;
        return STREAM_OK;
    }
    vectors[1] = vectors[0];
    size_t lacking = reader->size - reader->have;
    vectors[0] = (struct iovec){reader->target + reader->have, lacking};
    ssize_t got = read_some(reader, vectors, 2, flags);
    if (got <= 0)
        return read_failed(reader, got);
    if ((size_t)got <= lacking)
        reader->have += (size_t)got;
    else {
        reader->have = reader->size;
        reader->end += (size_t)got - lacking;
    }
    return STREAM_OK;
}

enum stream_status stream_fill(struct stream_reader *reader)
{
    return fill(reader, MSG_DONTWAIT);
}

enum stream_status stream_foresee(struct stream_reader *reader, size_t most)
{
    enum stream_status filled = STREAM_OK;
    while (filled == STREAM_OK && reader->end - reader->begin < most) {
        if (reader->end - reader->begin + STREAM_BUFFER / 2 > reader->capacity &&
            !make_room(reader, 2 * (reader->capacity + STREAM_BUFFER)))
            break;
        filled = stream_fill(reader);
    }
    if (reader->target && reader->have < reader->size)
        return ending(reader, true);
    /* Walk over the frames without taking them. */
    struct stream_reader scout = *reader;
    struct stream_view view = {NULL, 0};
    enum stream_status seen;
    scout.target = NULL;
    while ((seen = stream_peek(&scout, &view)) == STREAM_FRAME)
        scout.begin += STREAM_HEADER + view.size;
    return seen == STREAM_LARGE ? STREAM_AGAIN : seen;
}

/* -- waiting --------------------------------------------------------------------------------------------------- */

/* 1 if something is ready, 0 at the deadline, -1 for a signal. */
static int sleep_on(struct pollfd *fds, nfds_t count, int64_t deadline)
{
    struct timespec left, *patience = NULL;
    if (deadline != STREAM_FOREVER) {
        int64_t ns = deadline - clock_ns();
        if (ns <= 0)
            return 0;
        left = (struct timespec){ns / 1000000000, ns % 1000000000};
        patience = &left;
    }
    int ready = ppoll(fds, count, patience, NULL);
    if (ready < 0 && errno != EINTR)
        return 1; /* let the system call that follows say what is wrong */
    return ready;
}

bool stream_spin(struct stream_reader *reader, int64_t until)
{
    struct stream_view view;
    do {
        /* A clock costs as much as a try; look at it after every fourth. */
        for (int tries = 0; tries < 4; tries++)
            if (stream_fill(reader) != STREAM_AGAIN && stream_peek(reader, &view) != STREAM_AGAIN)
                return true;
    } while (clock_ns() < until);
    return false;
}

/* A blocking recv for `left` ns at most: powers of two of ms, so that the option is set once and not for every call. An hour stands for
 * ever: with a timeout set, every signal interrupts, as it does poll. False if so short a time is better kept by poll. */
static bool be_patient(struct stream_reader *reader, int64_t left)
{
    int64_t patience = left == STREAM_FOREVER ? 3600 * INT64_C(1000000000) : 16000000;
    if (patience > left || (left == STREAM_FOREVER && reader->patience > 200000000))
        return patience <= left;
    while (left != STREAM_FOREVER && 2 * patience <= left && patience < 3600 * INT64_C(1000000000))
        patience *= 2;
    if (patience != reader->patience) {
        struct timeval value = {patience / 1000000000, patience % 1000000000 / 1000};
        if (setsockopt(reader->fd, SOL_SOCKET, SO_RCVTIMEO, &value, sizeof value) < 0)
            return false;
        reader->patience = patience;
    }
    return true;
}

enum stream_status stream_await(struct stream_reader *reader, struct stream_writer *rest, int bell, int64_t deadline)
{
    struct stream_view view;
    bool block = reader->socket && !rest;
    for (;;) {
        int64_t left = deadline == STREAM_FOREVER ? STREAM_FOREVER : deadline - clock_ns();
        if (left <= 0)
            return STREAM_AGAIN;
        enum stream_status filled = STREAM_AGAIN;
        if (block && be_patient(reader, left)) {
            filled = fill(reader, 0);
            block = filled != STREAM_AGAIN; /* out of patience; or somebody made the socket non-blocking through another descriptor */
        } else {
            struct pollfd fds[3] = {{reader->fd, POLLIN, 0}, {bell, POLLIN, 0}, {rest ? rest->fd : -1, POLLOUT, 0}};
            int ready = sleep_on(fds, rest ? 3 : 2, deadline);
            if (ready <= 0)
                return ready < 0 ? STREAM_SIGNAL : STREAM_AGAIN;
            if (fds[1].revents)
                return STREAM_BELL;
            if (fds[0].revents)
                filled = stream_fill(reader);
            if (fds[2].revents && stream_flush(rest) != STREAM_AGAIN)
                return STREAM_FLUSHED; /* or failed: the next send will hear it again */
        }
        if (filled == STREAM_SIGNAL)
            return filled;
        if (filled != STREAM_AGAIN && stream_peek(reader, &view) != STREAM_AGAIN)
            return STREAM_OK;
    }
}

/* -- writing --------------------------------------------------------------------------------------------------- */

/* writev on a pipe, without the signal. Python ignores SIGPIPE, but `signal.signal(SIGPIPE, SIG_DFL)` is a common line in
 * command-line programs, and their process must not die for a message channel. */
static ssize_t write_pipe(int fd, const struct iovec *vectors, int count)
{
    static atomic_bool old_kernel;
    if (!atomic_load_explicit(&old_kernel, memory_order_relaxed)) { /* no ordering: a stale answer costs one more try */
        ssize_t put = pwritev2(fd, vectors, count, -1, RWF_NOSIGNAL);
        if (put >= 0 || (errno != EOPNOTSUPP && errno != EINVAL && errno != ENOSYS))
            return put;
        atomic_store_explicit(&old_kernel, true, memory_order_relaxed);
    }
    struct sigaction now;
    sigaction(SIGPIPE, NULL, &now);
    if (now.sa_handler == SIG_IGN)
        return writev(fd, vectors, count);
    sigset_t pipe_only, before, pending;
    sigemptyset(&pipe_only);
    sigaddset(&pipe_only, SIGPIPE);
    sigpending(&pending);
    pthread_sigmask(SIG_BLOCK, &pipe_only, &before);
    ssize_t put = writev(fd, vectors, count);
    int failed = errno;
    if (put < 0 && failed == EPIPE && !sigismember(&pending, SIGPIPE))
        sigtimedwait(&pipe_only, NULL, &(struct timespec){0, 0});
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    errno = failed;
    return put;
}

static ssize_t write_some(const struct stream_writer *writer, struct iovec *vectors, int count)
{
    ssize_t put;
    do {
        if (!writer->socket)
            put = write_pipe(writer->fd, vectors, count);
        else if (count == 1)
            put = send(writer->fd, vectors->iov_base, vectors->iov_len, MSG_NOSIGNAL | MSG_DONTWAIT);
        else
            put = sendmsg(writer->fd, &(struct msghdr){.msg_iov = vectors, .msg_iovlen = (size_t)count},
                          MSG_NOSIGNAL | MSG_DONTWAIT);
    } while (put < 0 && errno == EINTR);
    return put;
}

enum stream_status stream_put(struct stream_writer *writer, const struct iovec *vectors, int count, size_t *sent)
{
    struct iovec left[STREAM_VECTORS];
    size_t skip = *sent, total = 0;
    int n = 0;
    for (int i = 0; i < count; i++) {
        if (skip >= vectors[i].iov_len) {
            skip -= vectors[i].iov_len;
            continue;
        }
        left[n] = (struct iovec){(unsigned char *)vectors[i].iov_base + skip, vectors[i].iov_len - skip};
        total += left[n++].iov_len;
        skip = 0;
    }
    if (n == 0)
        return STREAM_OK;
    ssize_t put = write_some(writer, left, n);
    if (put < 0) {
        if (errno == EAGAIN || errno == EWOULDBLOCK)
            return STREAM_AGAIN;
        writer->error = errno;
        return STREAM_FAILED;
    }
    *sent += (size_t)put;
    return (size_t)put == total ? STREAM_OK : STREAM_AGAIN;
}

enum stream_status stream_push(struct stream_writer *writer, const struct iovec *vectors, int count, size_t *sent, int bell,
                               int64_t deadline)
{
    for (;;) {
        enum stream_status put = stream_put(writer, vectors, count, sent);
        if (put != STREAM_AGAIN)
            return put;
        struct pollfd fds[2] = {{writer->fd, POLLOUT, 0}, {bell, POLLIN, 0}};
        int ready = sleep_on(fds, 2, deadline);
        if (ready <= 0)
            return ready < 0 ? STREAM_SIGNAL : STREAM_AGAIN;
        if (fds[1].revents)
            return STREAM_BELL;
    }
}

static struct iovec rest_of(const struct stream_writer *writer)
{
    return (struct iovec){writer->rest + writer->begin, writer->end - writer->begin};
}

static void forget(struct stream_writer *writer, size_t sent)
{
    writer->begin += sent;
    if (writer->begin == writer->end) {
        free(writer->rest); /* rests are rare, and may be as large as a frame */
        writer->rest = NULL;
        writer->capacity = writer->begin = writer->end = 0;
    }
}

enum stream_status stream_flush(struct stream_writer *writer)
{
    size_t sent = 0;
    struct iovec rest = rest_of(writer);
    if (rest.iov_len == 0)
        return STREAM_OK;
    enum stream_status put = stream_put(writer, &rest, 1, &sent);
    forget(writer, sent);
    return put;
}

enum stream_status stream_flush_wait(struct stream_writer *writer, int bell, int64_t deadline)
{
    size_t sent = 0;
    struct iovec rest = rest_of(writer);
    enum stream_status put = stream_push(writer, &rest, 1, &sent, bell, deadline);
    forget(writer, sent);
    return put;
}

bool stream_keep(struct stream_writer *writer, const struct iovec *vectors, int count, size_t sent, size_t until)
{
    unsigned char *rest = malloc(until - sent + STREAM_HEADER); /* and a goodbye */
    if (!rest)
        return false;
    size_t at = 0, kept = 0;
    for (int i = 0; i < count && at < until; at += vectors[i++].iov_len) {
        size_t from = sent > at ? sent - at : 0;
        size_t to = until - at < vectors[i].iov_len ? until - at : vectors[i].iov_len;
        if (from >= to)
            continue;
        memcpy(rest + kept, (unsigned char *)vectors[i].iov_base + from, to - from);
        kept += to - from;
    }
    free(writer->rest);
    writer->rest = rest;
    writer->capacity = until - sent + STREAM_HEADER;
    writer->begin = 0;
    writer->end = kept;
    return true;
}

static void enlarge(const struct stream_writer *writer)
{
    size_t lacking = writer->end - writer->begin;
    if (lacking > 64 << 20)
        return;
    if (writer->socket) {
        int size = 0;
        socklen_t length = sizeof size;
        getsockopt(writer->fd, SOL_SOCKET, SO_SNDBUF, &size, &length);
        size += (int)lacking; /* the kernel doubles what it is given, and keeps to its own maximum */
        setsockopt(writer->fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
    } else {
        int size = fcntl(writer->fd, F_GETPIPE_SZ);
        if (size > 0 && fcntl(writer->fd, F_SETPIPE_SZ, 2 * size + (int)lacking) < 0)
            fcntl(writer->fd, F_SETPIPE_SZ, 2 * size);
    }
}

bool stream_farewell(struct stream_writer *writer, bool goodbye)
{
    static const unsigned char word[STREAM_HEADER] = {0xff, 0xff, 0xff, 0xff};
    if (goodbye) {
        if (!writer->rest) {
            struct iovec vector = {(void *)word, sizeof word};
            if (!stream_keep(writer, &vector, 1, 0, sizeof word))
                return false;
        } else {
            memcpy(writer->rest + writer->end, word, sizeof word); /* stream_keep left room for it */
            writer->end += sizeof word;
        }
    }
    enum stream_status put = stream_flush(writer);
    if (put == STREAM_AGAIN) {
        enlarge(writer);
        put = stream_flush(writer);
    }
    return put == STREAM_OK;
}
