/* ring_words.h — how ring.c and ring_wait.c touch shared words and bells. */
#ifndef IPCKIT_RING_WORDS_H
#define IPCKIT_RING_WORDS_H

#include <errno.h>
#include <unistd.h>

#include "ring.h"

/* A load that orders nothing: a hint that somebody checks again, our own word, or one that a fence beside it orders. */
#define GLANCE(word) atomic_load_explicit(&(word), memory_order_relaxed)
#define SET(word, value) atomic_store_explicit(&(word), value, memory_order_relaxed)

static inline void full_fence(void)
{
#ifdef __SANITIZE_THREAD__
    /* TSan does not know fences. A locked operation on a word of our own is one to the processor, and hides no race from TSan. */
    atomic_uint own = 0;
    atomic_fetch_add(&own, 1);
#else
    atomic_thread_fence(memory_order_seq_cst); /* SYNC POINT: reader sleeps, writer sleeps */
#endif
}

static inline void rest_a_moment(void)
{
#if defined __x86_64__ || defined __i386__
    __builtin_ia32_pause();
#elif defined __aarch64__
    __asm__ volatile("isb"); /* `yield` does nothing on most cores; this takes about as long as an x86 pause */
#endif
}

/* Rung bells are counts in an eventfd. A count that does not fit (EAGAIN) rings as well as one that does. */
static inline void ring_bell(int fd)
{
    uint64_t one = 1;
    while (write(fd, &one, sizeof one) < 0 && errno == EINTR)
        ;
}

static inline void drain_bell(int fd)
{
    uint64_t count;
    while (read(fd, &count, sizeof count) < 0 && errno == EINTR)
        ;
}

#endif
