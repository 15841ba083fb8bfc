/* floor_shared.c — the floors of shared memory: spinning, futexes, semaphores. See floor.h. */
#include "floor.h"
#include "floor_party.h"

#include <errno.h>
#include <linux/futex.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int open_shared(struct party parties[2], struct shared *shared)
{
    for (int i = 0; i < 2; i++) {
        struct direction *direction = &shared->directions[i];
        parties[i].stride = ((unsigned)parties[i].size + 63u) & ~63u;
        parties[i].slots = FLOOR_SHARED_RING / parties[i].stride;
        if (parties[i].slots > 1024)
            parties[i].slots = 1024;
        parties[i].out = direction;
        parties[1 - i].in = direction;
        if (sem_init(&direction->filled, 1, 0) < 0 || sem_init(&direction->empty, 1, parties[i].slots) < 0)
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

const struct mechanism floor_shared_mechanisms[] = {
    {"shm-spin", FLOOR_LARGEST, open_shared, spin_send, spin_receive, true, false},
    {"shm-futex", FLOOR_LARGEST, open_shared, futex_send, futex_receive, false, false},
    {"sem", FLOOR_LARGEST, open_shared, sem_send, sem_receive, false, false},
    {NULL},
};
