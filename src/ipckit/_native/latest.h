/* latest.h — the newest value, for any number of readers, by one writer at a time. A seqlock with several slots; see latest_layout.h.
 *
 * Plain C. Nothing here blocks but latest_sleep(). Who may write is the caller's to settle; everything else holds for any number
 * of processes, whichever of them are killed:
 *
 *   no torn value    a copy counts only if its slot bore its number before and after it
 *   no older value   `current` only grows, and a reader follows it
 *   no lost wake-up  who waits says so before it looks again; the writer publishes before it looks who waits. (One that is killed
 *                    between publishing and waking costs those who wait a second: they sleep no longer at a time.) */
#ifndef IPCKIT_LATEST_H
#define IPCKIT_LATEST_H

#include <stdbool.h>

#include "latest_layout.h"

/* What a process knows of one: its own copy, so that nothing scribbled over the header leads it out of the memory. */
struct latest_view {
    struct latest *at;
    uint64_t capacity, stride;
};

/* Bytes for values of up to `capacity` bytes; 0: too large. */
uint64_t latest_bytes(uint64_t capacity);
/* Write a new one into zeros. */
void latest_format(struct latest *at, uint64_t capacity);
/* NULL if `bytes` of memory hold one, and `view` is filled; else what is wrong. */
const char *latest_check(struct latest *at, uint64_t bytes, struct latest_view *view);

/* At most `capacity` bytes become the newest value; returns its number. */
uint64_t latest_write(const struct latest_view *view, const void *data, uint64_t length);

/* The number of the newest value; 0: none yet. */
uint64_t latest_number(const struct latest_view *view);
/* And its length. False: the memory says what cannot be. */
bool latest_newest(const struct latest_view *view, uint64_t *number, uint64_t *length);
/* Copy the value of this number and length. False: it was overtaken; begin anew with latest_newest. */
bool latest_copy(const struct latest_view *view, uint64_t number, void *out, uint64_t length);

/* Say that a number above `seen` is waited for. False: it is there. True: sleep on latest_word() while it is `*word`. */
bool latest_announce(const struct latest_view *view, uint64_t seen, uint32_t *word);
_Atomic uint32_t *latest_word(const struct latest_view *view);
/* Sleep while no number is above `seen`, until `deadline` (CLOCK_MONOTONIC, ns): ETIMEDOUT; 0: there may be; EINTR: a signal, or a second. */
int latest_sleep(const struct latest_view *view, uint64_t seen, int64_t deadline);

#endif
