/* ring_wait.c — spinning, sleeping, and being polled by somebody else. See ring.h, and ring.c for the synchronisation points. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "ring_words.h"

#include <errno.h>
#include <limits.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

/* -- waiting ------------------------------------------------------------------------------------------------------- */

static int64_t clock_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

unsigned ring_rounds(int64_t ns)
{
    static _Atomic int64_t thousand; /* of rounds, in ns; 10 to 140 µs */
    int64_t known = GLANCE(thousand);
    if (!known) {
        int64_t begin = clock_ns();
        for (int i = 0; i < 1000; i++)
            rest_a_moment();
        known = clock_ns() - begin;
        SET(thousand, known = known > 1000 ? known : 1000);
    }
    int64_t rounds = ns * 1000 / known;
    return rounds < 1 ? 1 : rounds > UINT_MAX ? UINT_MAX : (unsigned)rounds;
}

bool ring_ready(struct ring *r, int want)
{
    /* Only a look: what is found is loaded again, with acquire, by whoever uses it. */
    if ((want & RING_RECV) && GLANCE(r->in->tail) != r->read)
        return true;
    if ((want & RING_SEND) && r->capacity - (GLANCE(r->tail) - GLANCE(r->out->head)) >= GLANCE(r->need))
        return true;
    return GLANCE(r->in->closed) || GLANCE(r->ended) || GLANCE(r->broken) || ((want & RING_RECV) && GLANCE(r->release_due));
}

bool ring_spin(struct ring *r, int want, unsigned rounds)
{
    while (rounds--) {
        if (ring_ready(r, want))
            return true;
        rest_a_moment();
    }
    return false;
}

bool ring_spin_until(struct ring *r, int want, int64_t until)
{
    unsigned rounds = ring_rounds(2000);
    do {
        if (ring_spin(r, want, rounds))
            return true;
        ring_glance(r);
        if (GLANCE(r->closing))
            return true;
    } while (clock_ns() < until);
    return ring_ready(r, want);
}

static void announce(struct ring *r, int want)
{
    if (want & RING_RECV)
        SET(r->in->reader_sleeps, 1);
    if (want & RING_SEND)
        SET(r->out->writer_sleeps, GLANCE(r->need) | 1); /* records are multiples of 8: the 1 says that somebody waits */
    full_fence(); /* SYNC POINT: reader sleeps, writer sleeps */
}

/* An announcement that is gone was taken by the peer, which then rang, or is about to. */
static void retract(struct ring *r, int want)
{
    if ((want & RING_RECV) && !atomic_exchange_explicit(&r->in->reader_sleeps, 0, memory_order_relaxed))
        r->data_dirty = true;
    if (want & RING_SEND)
        SET(r->out->writer_sleeps, 0);
}

static int add(int epoll, int fd, uint32_t events)
{
    struct epoll_event event = {.events = events, .data.fd = fd};
    return epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event);
}

/* The peer's bell is heard by its edge and never read: that is one system call for a sleep where poll and read are two. */
static int make_epoll(struct ring *r, int hear, uint32_t edge, int bell)
{
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    if (epoll < 0)
        return -1;
    if (add(epoll, hear, EPOLLIN | edge) < 0 || add(epoll, r->control, EPOLLIN | EPOLLRDHUP) < 0 ||
        (bell >= 0 && add(epoll, bell, EPOLLIN) < 0)) {
        int failed = errno;
        close(epoll);
        errno = failed;
        return -1;
    }
    return epoll;
}

int ring_sleep(struct ring *r, int want, int64_t deadline)
{
    int *epoll = want & RING_RECV ? &r->recv_epoll : &r->send_epoll;
    if (*epoll < 0 &&
        (*epoll = make_epoll(r, want & RING_RECV ? r->hear_data : r->hear_space, EPOLLET, r->bell)) < 0)
        return -1;
    if (want == (RING_RECV | RING_SEND) && !r->recv_epoll_space) {
        if (add(*epoll, r->hear_space, EPOLLIN | EPOLLET) < 0)
            return -1;
        r->recv_epoll_space = true; /* it stays: a bell for our sending thread will wake us for nothing, which is rare */
    }
    announce(r, want);
    int woke = RING_WOKE;
    if (!ring_ready(r, want)) {
        int patience = -1;
        if (deadline != INT64_MAX) { /* rounded up: to wake before the deadline would be to sleep twice */
            int64_t left = deadline - clock_ns();
            patience = left <= 0 ? 0 : left > INT64_C(1000000) * INT_MAX ? INT_MAX : (int)((left + 999999) / 1000000);
        }
        struct epoll_event events[4];
        int count = epoll_wait(*epoll, events, 4, patience);
        if (count < 0 && errno != EINTR)
            woke = -1;
        else if (count < 0)
            woke = RING_SIGNAL;
        else if (count == 0 && patience >= 0)
            woke = RING_LATE;
        for (int i = 0; i < count; i++)
            if (events[i].data.fd == r->control)
                ring_look(r);
    }
    int failed = errno;
    retract(r, want);
    errno = failed;
    return woke;
}

static void rearm(struct ring *r)
{
    /* Pollers see the bell's level, so a count in it must be read, but reading costs a system call: only when the peer took our
     * last announcement, or when we were woken for nothing (a count that came late, or a peer that rings for fun). */
    if (!GLANCE(r->in->reader_sleeps))
        r->data_dirty = true;
    if (r->data_dirty || ++r->idle_arms > 1) {
        r->data_dirty = r->rung = false;
        drain_bell(r->hear_data);
    }
}

void ring_arm(struct ring *r, int want)
{
    if (want & RING_RECV)
        rearm(r);
    if (want & RING_SEND)
        drain_bell(r->hear_space); /* rare: no count is worth keeping here */
    announce(r, want);
}

void ring_nudge(struct ring *r, int want)
{
    if (want & RING_RECV)
        ring_bell(r->hear_data);
    if (want & RING_SEND)
        ring_bell(r->hear_space);
}

int ring_watch(struct ring *r)
{
    if (r->watch < 0)
        r->watch = make_epoll(r, r->hear_data, 0, -1);
    r->watched = r->watch >= 0;
    return r->watch;
}

void ring_watch_on(struct ring *r)
{
    if (!ring_ready(r, RING_RECV)) {
        r->rung = r->data_dirty = false;
        drain_bell(r->hear_data);
        announce(r, RING_RECV);
        if (!ring_ready(r, RING_RECV))
            return;
    }
    if (!r->rung) {
        r->rung = true;
        ring_bell(r->hear_data);
    }
}
