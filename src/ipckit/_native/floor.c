/* floor.c — the two processes of a floor: the caller and its forked child, each pinned. See floor.h. */
#include "floor.h"
#include "floor_party.h"

#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { WINDOW = 64 << 10 }; /* bytes in flight one way, below any receive buffer: nothing else keeps datagrams from being dropped */

static int64_t clock_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static const struct mechanism *mechanism_at(size_t index)
{
    for (const struct mechanism *how = floor_kernel_mechanisms; how->name; how++)
        if (index-- == 0)
            return how;
    for (const struct mechanism *how = floor_shared_mechanisms; how->name; how++)
        if (index-- == 0)
            return how;
    return NULL;
}

const char *floor_name(size_t index)
{
    const struct mechanism *how = mechanism_at(index);
    return how ? how->name : NULL;
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
    const struct mechanism *how;
    cpu_set_t before;
    for (size_t i = 0; (how = mechanism_at(i)) && strcmp(how->name, name) != 0; i++)
        ;
    if (!how || size > how->largest)
        return errno = EINVAL, -1;
    if (sched_getaffinity(0, sizeof before, &before) < 0)
        return -1;
    for (int i = 0; i < 2; i++)
        if (cpus[i] < 0 || cpus[i] >= CPU_SETSIZE || !CPU_ISSET(cpus[i], &before) || (how->spins && cpus[0] == cpus[1]))
            return errno = ERANGE, -1; /* not ours; or the two would spin each other out of the one core */

    /* One mapping for all that either side needs: what is shared, and per party a payload and a buffer of its own. */
    size_t capacity = FLOOR_HEADER + size + 2 * FLOOR_READ_SIZE, each = size + capacity;
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
    size_t window = how->drops ? WINDOW / (self->size + 1024) + 1 : count;
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
