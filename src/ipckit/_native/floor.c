/* floor.c — see floor.h. Two parties, the caller and its forked child; a mechanism is how a party sends and receives. */
#include "floor.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <mqueue.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <semaphore.h>
#include <signal.h>
#include <stdalign.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum {
    HEADER = 4,
    SMALL = 4096,            /* copied behind its header, as StreamLink does */
    READ_SIZE = 64 << 10,    /* likewise */
    SHARED_RING = 4 << 20,   /* bytes of slots in one direction of shared memory */
    UDP_WINDOW = 64 << 10,   /* bytes in flight one way, below any receive buffer; nothing else keeps datagrams from being dropped */
};

/* One direction through shared memory: fixed slots, two counters. */
struct lane {
    alignas(64) atomic_uint tail; /* slots filled; the futex of the reader */
    atomic_uint reader_sleeps;
    alignas(64) atomic_uint head; /* slots emptied; the futex of the writer */
    atomic_uint writer_sleeps;
    alignas(64) sem_t filled;
    sem_t empty;
    alignas(64) unsigned char slots[SHARED_RING];
};

struct shared {
    struct lane lanes[2];
};

struct party {
    size_t size;
    int rfd, wfd;
    mqd_t rqueue, wqueue;
    struct lane *in, *out;
    unsigned slots, stride;
    unsigned char *payload; /* what is sent, and where it arrives where the mechanism copies it out */
    unsigned char *buffer;  /* what a byte stream has read and not used: begin to end */
    size_t capacity, begin, end;
    unsigned unacknowledged; /* datagrams */
};

struct mechanism {
    const char *name;
    size_t largest;
    int (*open)(struct party parties[2], struct shared *shared);
    int (*send)(struct party *self);
    int (*receive)(struct party *self);
    bool spins;
};

static int64_t clock_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* -- byte streams ---------------------------------------------------------------------------------------------- */

static int stream_send(struct party *self)
{
    unsigned char small[HEADER + SMALL];
    struct iovec vectors[2] = {{small, HEADER}, {self->payload, self->size}};
    size_t size = self->size, total = HEADER + size, sent = 0;
    small[0] = (unsigned char)(size >> 24), small[1] = (unsigned char)(size >> 16);
    small[2] = (unsigned char)(size >> 8), small[3] = (unsigned char)size;
    if (size <= SMALL) {
        memcpy(small + HEADER, self->payload, size);
        return write(self->wfd, small, total) == (ssize_t)total ? 0 : -1;
    }
    ssize_t put = writev(self->wfd, vectors, 2);
    for (sent = put < 0 ? 0 : (size_t)put; put >= 0 && sent < total; sent += (size_t)put) {
        if (sent < HEADER)
            return -1;
        put = write(self->wfd, self->payload + sent - HEADER, total - sent);
        if (put < 0)
            break;
    }
    return put < 0 ? -1 : 0;
}

/* The payload is left where it was read: the floor does not copy it once more. */
static int stream_receive_with(struct party *self, int flags)
{
    for (;;) {
        size_t here = self->end - self->begin, want = READ_SIZE;
        if (here >= HEADER) {
            const unsigned char *at = self->buffer + self->begin;
            size_t total = HEADER + ((size_t)at[0] << 24 | (size_t)at[1] << 16 | (size_t)at[2] << 8 | at[3]);
            if (total != HEADER + self->size)
                return errno = EPROTO, -1;
            if (here >= total) {
                self->begin += total;
                if (self->begin == self->end)
                    self->begin = self->end = 0;
                return 0;
            }
            if (total > READ_SIZE)
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

/* -- shared memory --------------------------------------------------------------------------------------------- */

static int open_shared(struct party parties[2], struct shared *shared)
{
    for (int i = 0; i < 2; i++) {
        struct lane *lane = &shared->lanes[i];
        parties[i].stride = ((unsigned)parties[i].size + 63u) & ~63u;
        parties[i].slots = SHARED_RING / parties[i].stride;
        if (parties[i].slots > 1024)
            parties[i].slots = 1024;
        parties[i].out = lane;
        parties[1 - i].in = lane;
        if (sem_init(&lane->filled, 1, 0) < 0 || sem_init(&lane->empty, 1, parties[i].slots) < 0)
            return -1;
    }
    return 0;
}

static void fill_slot(struct party *self, unsigned index)
{
    memcpy(self->out->slots + (size_t)(index % self->slots) * self->stride, self->payload, self->size);
}

static void empty_slot(struct party *self, unsigned index)
{
    memcpy(self->buffer, self->in->slots + (size_t)(index % self->slots) * self->stride, self->size);
}

static int spin_send(struct party *self)
{
    unsigned tail = atomic_load_explicit(&self->out->tail, memory_order_relaxed);
    /* SYNC POINT: floor-head (acquire; the release is in spin_receive) */
    while (tail - atomic_load_explicit(&self->out->head, memory_order_acquire) == self->slots)
        relax();
    fill_slot(self, tail);
    /* SYNC POINT: floor-tail (release; the acquire is in spin_receive) */
    atomic_store_explicit(&self->out->tail, tail + 1, memory_order_release);
    return 0;
}

static int spin_receive(struct party *self)
{
    unsigned head = atomic_load_explicit(&self->in->head, memory_order_relaxed);
    /* SYNC POINT: floor-tail (acquire) */
    while (atomic_load_explicit(&self->in->tail, memory_order_acquire) == head)
        relax();
    empty_slot(self, head);
    /* SYNC POINT: floor-head (release) */
    atomic_store_explicit(&self->in->head, head + 1, memory_order_release);
    return 0;
}

/* Sleep while *word is `value`. SYNC POINT: floor-sleep. Announce, look again, sleep; the waker changes the word, then looks for an
 * announcement. All four are sequentially consistent, so one of the two sees the other. */
static void futex_sleep(atomic_uint *word, unsigned value, atomic_uint *sleeps)
{
    while (atomic_load(word) == value) {
        atomic_store(sleeps, 1);
        if (atomic_load(word) == value)
            syscall(SYS_futex, word, FUTEX_WAIT, value, NULL, NULL, 0);
        atomic_store(sleeps, 0);
    }
}

static void futex_set(atomic_uint *word, unsigned value, atomic_uint *sleeps)
{
    atomic_store(word, value); /* SYNC POINT: floor-sleep */
    if (atomic_load(sleeps))
        syscall(SYS_futex, word, FUTEX_WAKE, 1, NULL, NULL, 0);
}

static int futex_send(struct party *self)
{
    unsigned tail = atomic_load_explicit(&self->out->tail, memory_order_relaxed);
    futex_sleep(&self->out->head, tail - self->slots, &self->out->writer_sleeps);
    fill_slot(self, tail);
    futex_set(&self->out->tail, tail + 1, &self->out->reader_sleeps);
    return 0;
}

static int futex_receive(struct party *self)
{
    unsigned head = atomic_load_explicit(&self->in->head, memory_order_relaxed);
    futex_sleep(&self->in->tail, head, &self->in->reader_sleeps);
    empty_slot(self, head);
    futex_set(&self->in->head, head + 1, &self->in->writer_sleeps);
    return 0;
}

static int take(sem_t *semaphore)
{
    int taken;
    do
        taken = sem_wait(semaphore);
    while (taken < 0 && errno == EINTR);
    return taken;
}

/* The counters are private to each side here; the semaphores order the memory. */
static int sem_send(struct party *self)
{
    unsigned tail = atomic_load_explicit(&self->out->tail, memory_order_relaxed);
    if (take(&self->out->empty) < 0)
        return -1;
    fill_slot(self, tail);
    atomic_store_explicit(&self->out->tail, tail + 1, memory_order_relaxed);
    return sem_post(&self->out->filled);
}

static int sem_receive(struct party *self)
{
    unsigned head = atomic_load_explicit(&self->in->head, memory_order_relaxed);
    if (take(&self->in->filled) < 0)
        return -1;
    empty_slot(self, head);
    atomic_store_explicit(&self->in->head, head + 1, memory_order_relaxed);
    return sem_post(&self->in->empty);
}

/* -- the two processes ----------------------------------------------------------------------------------------- */

static const struct mechanism mechanisms[] = {
    {"pipe", FLOOR_LARGEST, open_pipe, stream_send, stream_receive, false},
    {"fifo", FLOOR_LARGEST, open_fifo, stream_send, stream_receive, false},
    {"unix", FLOOR_LARGEST, open_unix, stream_send, stream_receive, false},
    {"unix-spin", FLOOR_LARGEST, open_unix, stream_send, stream_receive_spinning, true},
    {"tcp", FLOOR_LARGEST, open_tcp, stream_send, stream_receive, false},
    {"udp", 65507, open_udp, udp_send, udp_receive, false},
    {"mq", 8192, open_mq, mq_send_one, mq_receive_one, false},
    {"shm-spin", FLOOR_LARGEST, open_shared, spin_send, spin_receive, true},
    {"shm-futex", FLOOR_LARGEST, open_shared, futex_send, futex_receive, false},
    {"sem", FLOOR_LARGEST, open_shared, sem_send, sem_receive, false},
};

const char *floor_name(size_t index)
{
    return index < sizeof mechanisms / sizeof *mechanisms ? mechanisms[index].name : NULL;
}

static void close_party(struct party *self)
{
    if (self->rfd >= 0)
        close(self->rfd);
    if (self->wfd >= 0 && self->wfd != self->rfd)
        close(self->wfd);
    if (self->rqueue != (mqd_t)-1)
        mq_close(self->rqueue);
    self->rfd = self->wfd = -1;
    self->rqueue = (mqd_t)-1; /* the writing queue is the other party's reading one */
}

static int pin(int cpu)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    return sched_setaffinity(0, sizeof set, &set);
}

typedef int activity(const struct mechanism *how, struct party *self, size_t count, bool caller, int64_t *result);

/* Opens the mechanism, forks, and runs `what` in both. 0, or -1 with errno. */
static int run_two(const char *name, size_t size, const int cpus[2], activity *what, size_t count, int64_t *result)
{
    const struct mechanism *how = mechanisms, *beyond = mechanisms + sizeof mechanisms / sizeof *mechanisms;
    cpu_set_t before;
    while (how < beyond && strcmp(how->name, name) != 0)
        how++;
    if (how == beyond || size > how->largest)
        return errno = EINVAL, -1;
    if (sched_getaffinity(0, sizeof before, &before) < 0)
        return -1;
    for (int i = 0; i < 2; i++)
        if (cpus[i] < 0 || cpus[i] >= CPU_SETSIZE || !CPU_ISSET(cpus[i], &before) || (how->spins && cpus[0] == cpus[1]))
            return errno = ERANGE, -1; /* not ours; or the two would spin each other out of the one core */

    /* One mapping for all that either side needs: what is shared, and per party a payload and a buffer of its own. */
    size_t capacity = HEADER + size + 2 * READ_SIZE, each = size + capacity;
    unsigned char *memory = mmap(NULL, sizeof(struct shared) + 2 * each, PROT_READ | PROT_WRITE,
                                 MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (memory == MAP_FAILED)
        return -1;
    struct party parties[2];
    for (int i = 0; i < 2; i++) {
        unsigned char *own = memory + sizeof(struct shared) + (size_t)i * each;
        parties[i] = (struct party){.size = size, .rfd = -1, .wfd = -1, .rqueue = (mqd_t)-1, .wqueue = (mqd_t)-1,
                                    .payload = own, .buffer = own + size, .capacity = capacity};
        memset(parties[i].payload, 'x', size);
    }
    pid_t parent = getpid(), child = -1;
    int failed = how->open(parties, (struct shared *)memory);
    if (!failed)
        failed = (child = fork()) < 0;
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        signal(SIGPIPE, SIG_IGN);
        if (parties[0].rfd >= 0) /* or a peer that ends would not show as the end of the stream; queues are shared */
            close_party(&parties[0]);
        if (getppid() != parent || pin(cpus[1]) < 0 || what(how, &parties[1], count, false, NULL) < 0) {
            if (parties[1].rfd < 0)
                how->send(&parties[1]); /* nothing shows the caller that a process on this mechanism has gone; it looks at the status */
            _exit(1);
        }
        _exit(0);
    }
    if (!failed) {
        if (parties[1].rfd >= 0)
            close_party(&parties[1]);
        failed = pin(cpus[0]) < 0 || what(how, &parties[0], count, true, result) < 0;
        int saved = errno, status = 0;
        if (failed)
            kill(child, SIGKILL);
        pid_t reaped;
        while ((reaped = waitpid(child, &status, 0)) < 0 && errno == EINTR)
            ;
        sched_setaffinity(0, sizeof before, &before);
        errno = saved;
        if (!failed && reaped == child && status != 0) {
            failed = 1;
            errno = ECHILD;
        }
    }
    int saved = errno;
    close_party(&parties[0]);
    close_party(&parties[1]);
    munmap(memory, sizeof(struct shared) + 2 * each);
    errno = saved;
    return failed ? -1 : 0;
}

static int round_trips(const struct mechanism *how, struct party *self, size_t rounds, bool caller, int64_t *times)
{
    size_t warm_up = rounds < 10000 ? rounds / 10 + 10 : 1000;
    for (size_t i = 0; i < warm_up + rounds; i++) {
        int64_t start = caller ? clock_ns() : 0;
        if (caller ? how->send(self) < 0 || how->receive(self) < 0 : how->receive(self) < 0 || how->send(self) < 0)
            return -1;
        if (caller && i >= warm_up)
            times[i - warm_up] = clock_ns() - start;
    }
    return 0;
}

int floor_round_trips(const char *mechanism, size_t size, size_t rounds, const int cpus[2], int64_t *times)
{
    return run_two(mechanism, size, cpus, round_trips, rounds, times);
}

/* `count` there, one back. Datagrams are acknowledged by the window. */
static int one_way_once(const struct mechanism *how, struct party *self, size_t count, bool caller)
{
    size_t window = how->receive == udp_receive ? (UDP_WINDOW / (self->size + 1024)) : 0;
    if (window == 0)
        window = how->receive == udp_receive ? 1 : count;
    for (size_t i = 0; i < count; i++) {
        if ((caller ? how->send(self) : how->receive(self)) < 0)
            return -1;
        if (((i + 1) % window == 0 || i + 1 == count) && (caller ? how->receive(self) : how->send(self)) < 0)
            return -1;
    }
    return 0;
}

static int one_way(const struct mechanism *how, struct party *self, size_t count, bool caller, int64_t *took)
{
    if (one_way_once(how, self, count / 10 + 1, caller) < 0)
        return -1;
    int64_t start = clock_ns();
    if (one_way_once(how, self, count, caller) < 0)
        return -1;
    if (caller)
        *took = clock_ns() - start;
    return 0;
}

int floor_one_way(const char *mechanism, size_t size, size_t count, const int cpus[2], int64_t *took)
{
    return run_two(mechanism, size, cpus, one_way, count, took);
}
