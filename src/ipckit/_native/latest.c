/* latest.c — see latest.h for what it promises and latest_layout.h for its bytes.
 *
 * The words of a value are stored with release and loaded with acquire, one by one, instead of plain copies between fences: so it is
 * free of data races by the letter of C11 (and ThreadSanitizer, which knows no fences, can watch what is shipped), and on x86 the
 * instructions are the same. If a reader's load sees a word of a later value, it sees that this slot was marked before that. */
#include "latest.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "steps.h"

#define LARGEST (UINT64_C(1) << 40)
#define SLEEP_NS INT64_C(1000000000)
/* A writer that laps a reader so often in a row is no writer: the memory is damaged. */
#define MOST_LAPS 1000000

static uint64_t stride_of(uint64_t capacity)
{
    return (sizeof(struct latest_slot) + capacity + 63) / 64 * 64;
}

uint64_t latest_bytes(uint64_t capacity)
{
    return capacity > LARGEST ? 0 : sizeof(struct latest) + LATEST_SLOTS * stride_of(capacity);
}

void latest_format(struct latest *at, uint64_t capacity)
{
    at->version = LATEST_VERSION;
    at->slots = LATEST_SLOTS;
    at->capacity = capacity;
    at->size = latest_bytes(capacity);
    at->magic = LATEST_MAGIC;
}

const char *latest_check(struct latest *at, uint64_t bytes, struct latest_view *view)
{
    if (bytes < sizeof *at || at->magic != LATEST_MAGIC)
        return "this is no Latest";
    if (at->version != LATEST_VERSION || at->slots != LATEST_SLOTS)
        return "it was made by another version";
    uint64_t capacity = at->capacity;
    if (latest_bytes(capacity) == 0 || latest_bytes(capacity) > bytes || at->size != latest_bytes(capacity))
        return "its header contradicts itself";
    *view = (struct latest_view){at, capacity, stride_of(capacity)};
    return NULL;
}

static struct latest_slot *slot_of(const struct latest_view *view, uint64_t number)
{
    return (struct latest_slot *)((char *)(view->at + 1) + number % LATEST_SLOTS * view->stride);
}

/* -- writing -------------------------------------------------------------------------------------------------------- */

static void wake(const struct latest_view *view, uint64_t number)
{
    /* SYNC POINT: waits or is published. Total order: whoever announced before it saw the old number is seen here. */
    uint64_t waiting = atomic_load_explicit(&view->at->waiting, memory_order_seq_cst);
    if (waiting == 0)
        return;
    STEP(74);
    /* What is waited for beyond this number stays announced: its waiter may not be asleep yet, and will not be woken now. */
    if (waiting <= number)
        atomic_compare_exchange_strong_explicit(&view->at->waiting, &waiting, 0, memory_order_seq_cst, memory_order_seq_cst);
    STEP(75);
    syscall(SYS_futex, latest_word(view), FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

uint64_t latest_write(const struct latest_view *view, const void *data, uint64_t length)
{
    uint64_t number = atomic_load_explicit(&view->at->current, memory_order_relaxed) + 1;
    struct latest_slot *slot = slot_of(view, number);
    STEP(70);
    /* SYNC POINT: slot is rewritten */
    atomic_store_explicit(&slot->number, 0, memory_order_release);
    STEP(71);
    atomic_store_explicit(&slot->length, length, memory_order_release);
    const char *from = data;
    for (uint64_t i = 0; i < length / 8; i++) {
        uint64_t word;
        memcpy(&word, from + i * 8, 8);
        atomic_store_explicit(&slot->words[i], word, memory_order_release);
    }
    if (length % 8) {
        uint64_t word = 0;
        memcpy(&word, from + length / 8 * 8, length % 8);
        atomic_store_explicit(&slot->words[length / 8], word, memory_order_release);
    }
    STEP(72);
    atomic_store_explicit(&slot->number, number, memory_order_release);
    STEP(73);
    /* SYNC POINT: value is published; and waits or is published */
    atomic_exchange_explicit(&view->at->current, number, memory_order_seq_cst);
    wake(view, number);
    STEP(76);
    return number;
}

/* -- reading -------------------------------------------------------------------------------------------------------- */

uint64_t latest_number(const struct latest_view *view)
{
    return atomic_load_explicit(&view->at->current, memory_order_acquire); /* SYNC POINT: value is published */
}

bool latest_newest(const struct latest_view *view, uint64_t *number, uint64_t *length)
{
    for (unsigned laps = 0; laps < MOST_LAPS; laps++) {
        *number = latest_number(view);
        *length = 0;
        if (*number == 0)
            return true;
        struct latest_slot *slot = slot_of(view, *number);
        if (atomic_load_explicit(&slot->number, memory_order_acquire) != *number)
            continue;
        *length = atomic_load_explicit(&slot->length, memory_order_acquire);
        /* SYNC POINT: slot is rewritten */
        if (atomic_load_explicit(&slot->number, memory_order_acquire) == *number)
            return *length <= view->capacity;
    }
    return false;
}

static inline void copy_word(char *to, _Atomic uint64_t *from)
{
    uint64_t word = atomic_load_explicit(from, memory_order_acquire);
    memcpy(to, &word, 8);
}

bool latest_copy(const struct latest_view *view, uint64_t number, void *out, uint64_t length)
{
    struct latest_slot *slot = slot_of(view, number);
    char *to = out;
    uint64_t whole = length / 8, i = 0;
    for (; i + 8 <= whole; i += 8) /* eight at a time: how fast one would be depends on where the compiler happens to put the loop */
        for (unsigned k = 0; k < 8; k++)
            copy_word(to + (i + k) * 8, &slot->words[i + k]);
    for (; i < whole; i++)
        copy_word(to + i * 8, &slot->words[i]);
    if (length % 8) {
        uint64_t word = atomic_load_explicit(&slot->words[length / 8], memory_order_acquire);
        memcpy(to + length / 8 * 8, &word, length % 8);
    }
    /* SYNC POINT: slot is rewritten. Each load above was an acquire, so this one comes after them. */
    return atomic_load_explicit(&slot->number, memory_order_relaxed) == number;
}

/* -- waiting -------------------------------------------------------------------------------------------------------- */

bool latest_announce(const struct latest_view *view, uint64_t seen, uint32_t *word)
{
    uint64_t wanted = seen + 1;
    uint64_t waiting = atomic_load_explicit(&view->at->waiting, memory_order_seq_cst);
    /* Only ever upwards: who waits for a later one must not be overwritten by us, who may be about to find ours there. */
    while (waiting < wanted && !atomic_compare_exchange_weak_explicit(&view->at->waiting, &waiting, wanted, memory_order_seq_cst,
                                                                      memory_order_seq_cst))
        ;
    /* SYNC POINT: waits or is published */
    uint64_t number = atomic_load_explicit(&view->at->current, memory_order_seq_cst);
    *word = (uint32_t)number; /* not of `seen`: who waits for a number that is still far away sleeps from each to the next */
    return number <= seen;
}

_Atomic uint32_t *latest_word(const struct latest_view *view)
{
    const uint16_t one = 1;
    bool little = *(const unsigned char *)&one == 1;
    return (_Atomic uint32_t *)&view->at->current + (little ? 0 : 1);
}

int latest_sleep(const struct latest_view *view, uint64_t seen, int64_t deadline)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    int64_t start = (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
    uint32_t word;
    if (!latest_announce(view, seen, &word))
        return 0;
    if (start >= deadline)
        return ETIMEDOUT;
    int64_t until = deadline - start > SLEEP_NS ? start + SLEEP_NS : deadline;
    struct timespec limit = {until / 1000000000, until % 1000000000};
    if (syscall(SYS_futex, latest_word(view), FUTEX_WAIT_BITSET, word, &limit, NULL, FUTEX_BITSET_MATCH_ANY) == 0 ||
        errno == EAGAIN)
        return 0;
    return errno == ETIMEDOUT && until == deadline ? ETIMEDOUT : EINTR;
}
