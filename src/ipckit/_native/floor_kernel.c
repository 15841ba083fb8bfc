/* floor_kernel.c — the floors of what the kernel carries: byte streams, datagrams, message queues. See floor.h. */
#include "floor.h"
#include "floor_party.h"

#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { SMALL = 4096 }; /* copied behind its header, as StreamLink does */

/* -- byte streams ---------------------------------------------------------------------------------------------- */

static int stream_send(struct party *self)
{
    unsigned char small[FLOOR_HEADER + SMALL];
    struct iovec vectors[2] = {{small, FLOOR_HEADER}, {self->payload, self->size}};
    size_t size = self->size, total = FLOOR_HEADER + size, sent = 0;
    small[0] = (unsigned char)(size >> 24), small[1] = (unsigned char)(size >> 16);
    small[2] = (unsigned char)(size >> 8), small[3] = (unsigned char)size;
    if (size <= SMALL) {
        memcpy(small + FLOOR_HEADER, self->payload, size);
        return write(self->wfd, small, total) == (ssize_t)total ? 0 : -1;
    }
    ssize_t put = writev(self->wfd, vectors, 2);
    for (sent = put < 0 ? 0 : (size_t)put; put >= 0 && sent < total; sent += (size_t)put) {
        if (sent < FLOOR_HEADER)
            return -1;
        put = write(self->wfd, self->payload + sent - FLOOR_HEADER, total - sent);
        if (put < 0)
            break;
    }
    return put < 0 ? -1 : 0;
}

/* The payload is left where it was read: the floor does not copy it once more. */
static int stream_receive_with(struct party *self, int flags)
{
    for (;;) {
        size_t here = self->end - self->begin, want = FLOOR_READ_SIZE;
        if (here >= FLOOR_HEADER) {
            const unsigned char *at = self->buffer + self->begin;
            size_t total = FLOOR_HEADER + ((size_t)at[0] << 24 | (size_t)at[1] << 16 | (size_t)at[2] << 8 | at[3]);
            if (total != FLOOR_HEADER + self->size)
                return errno = EPROTO, -1;
            if (here >= total) {
                self->begin += total;
                if (self->begin == self->end)
                    self->begin = self->end = 0;
                return 0;
            }
            if (total > FLOOR_READ_SIZE)
                want = total - here;
        }
        if (self->capacity - self->end < want) {
            memmove(self->buffer, self->buffer + self->begin, here);
            self->begin = 0;
            self->end = here;
        }
        ssize_t got = flags ? recv(self->rfd, self->buffer + self->end, want, flags) : read(self->rfd, self->buffer + self->end, want);
        if (got < 0 && (errno == EINTR || (flags && errno == EAGAIN)))
            continue;
        if (got <= 0)
            return got == 0 ? errno = EPIPE, -1 : -1;
        self->end += (size_t)got;
    }
}

static int stream_receive(struct party *self)
{
    return stream_receive_with(self, 0);
}

static int stream_receive_spinning(struct party *self)
{
    return stream_receive_with(self, MSG_DONTWAIT);
}

static int open_pipe(struct party parties[2], struct shared *shared)
{
    (void)shared;
    int there[2], back[2];
    if (pipe2(there, O_CLOEXEC) < 0)
        return -1;
    parties[0].wfd = there[1];
    parties[1].rfd = there[0];
    if (pipe2(back, O_CLOEXEC) < 0)
        return -1;
    parties[1].wfd = back[1];
    parties[0].rfd = back[0];
    return 0;
}

static int open_fifo(struct party parties[2], struct shared *shared)
{
    (void)shared;
    char folder[] = "/tmp/ipckit-floor-XXXXXX", path[sizeof folder + 8];
    if (!mkdtemp(folder))
        return -1;
    int failed = 0;
    for (int i = 0; i < 2 && !failed; i++) {
        snprintf(path, sizeof path, "%s/%d", folder, i);
        failed = mkfifo(path, 0600) < 0;
        if (failed)
            break;
        /* A reader that does not wait for the writer, so that one process can open both; then it waits for data. */
        parties[1 - i].rfd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
        parties[i].wfd = open(path, O_WRONLY | O_NONBLOCK | O_CLOEXEC);
        failed = parties[1 - i].rfd < 0 || parties[i].wfd < 0 || fcntl(parties[1 - i].rfd, F_SETFL, 0) < 0 ||
                 fcntl(parties[i].wfd, F_SETFL, 0) < 0;
        int saved = errno;
        unlink(path);
        errno = saved;
    }
    int saved = errno;
    rmdir(folder);
    errno = saved;
    return failed ? -1 : 0;
}

static int open_unix(struct party parties[2], struct shared *shared)
{
    (void)shared;
    int ends[2];
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) < 0)
        return -1;
    for (int i = 0; i < 2; i++)
        parties[i].rfd = parties[i].wfd = ends[i];
    return 0;
}

static int loopback(int type, struct sockaddr_in *address)
{
    int fd = socket(AF_INET, type | SOCK_CLOEXEC, 0);
    socklen_t length = sizeof *address;
    *address = (struct sockaddr_in){.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    if (fd < 0 || bind(fd, (struct sockaddr *)address, length) < 0 || getsockname(fd, (struct sockaddr *)address, &length) < 0) {
        int saved = errno;
        if (fd >= 0)
            close(fd);
        errno = saved;
        return -1;
    }
    return fd;
}

static int open_tcp(struct party parties[2], struct shared *shared)
{
    (void)shared;
    struct sockaddr_in address, mine, theirs;
    socklen_t length = sizeof mine;
    int listener = loopback(SOCK_STREAM, &address), one = 1, failed = -1;
    if (listener < 0)
        return -1;
    if (listen(listener, 1) < 0)
        goto out;
    parties[0].rfd = parties[0].wfd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (parties[0].rfd < 0 || connect(parties[0].rfd, (struct sockaddr *)&address, sizeof address) < 0 ||
        getsockname(parties[0].rfd, (struct sockaddr *)&mine, &length) < 0)
        goto out;
    length = sizeof theirs;
    parties[1].rfd = parties[1].wfd = accept4(listener, (struct sockaddr *)&theirs, &length, SOCK_CLOEXEC);
    if (parties[1].rfd < 0)
        goto out;
    if (mine.sin_port != theirs.sin_port) { /* somebody else was quicker */
        errno = ECONNREFUSED;
        goto out;
    }
    for (int i = 0; i < 2; i++)
        setsockopt(parties[i].rfd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    failed = 0;
out:;
    int saved = errno;
    close(listener);
    errno = saved;
    return failed;
}

/* -- messages of the kernel ------------------------------------------------------------------------------------ */

static int open_udp(struct party parties[2], struct shared *shared)
{
    (void)shared;
    struct sockaddr_in addresses[2];
    for (int i = 0; i < 2; i++) {
        parties[i].rfd = parties[i].wfd = loopback(SOCK_DGRAM, &addresses[i]);
        if (parties[i].rfd < 0)
            return -1;
    }
    for (int i = 0; i < 2; i++)
        if (connect(parties[i].rfd, (struct sockaddr *)&addresses[1 - i], sizeof addresses[0]) < 0)
            return -1;
    return 0;
}

static int udp_send(struct party *self)
{
    return send(self->wfd, self->payload, self->size, 0) == (ssize_t)self->size ? 0 : -1;
}

static int udp_receive(struct party *self)
{
    return recv(self->rfd, self->buffer, self->size, 0) == (ssize_t)self->size ? 0 : -1;
}

static int open_mq(struct party parties[2], struct shared *shared)
{
    (void)shared;
    static atomic_uint serial;
    struct mq_attr attributes = {.mq_maxmsg = 10, .mq_msgsize = (long)parties[0].size};
    for (int i = 0; i < 2; i++) {
        char name[64];
        snprintf(name, sizeof name, "/ipckit-floor-%d-%u", (int)getpid(), atomic_fetch_add(&serial, 1));
        mqd_t queue = mq_open(name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600, &attributes);
        if (queue < 0) {
            if (errno == EINVAL)
                errno = EMSGSIZE; /* the kernel's limits are below the usual ones */
            return -1;
        }
        mq_unlink(name);
        parties[i].wqueue = queue;
        parties[1 - i].rqueue = queue;
    }
    return 0;
}

static int mq_send_one(struct party *self)
{
    return mq_send(self->wqueue, (const char *)self->payload, self->size, 0);
}

static int mq_receive_one(struct party *self)
{
    return mq_receive(self->rqueue, (char *)self->buffer, self->size, NULL) == (ssize_t)self->size ? 0 : -1;
}

const struct mechanism floor_kernel_mechanisms[] = {
    {"pipe", FLOOR_LARGEST, open_pipe, stream_send, stream_receive, false, false},
    {"fifo", FLOOR_LARGEST, open_fifo, stream_send, stream_receive, false, false},
    {"unix", FLOOR_LARGEST, open_unix, stream_send, stream_receive, false, false},
    {"unix-spin", FLOOR_LARGEST, open_unix, stream_send, stream_receive_spinning, true, false},
    {"tcp", FLOOR_LARGEST, open_tcp, stream_send, stream_receive, false, false},
    {"udp", 65507, open_udp, udp_send, udp_receive, false, true},
    {"mq", 8192, open_mq, mq_send_one, mq_receive_one, false, false},
    {NULL},
};
