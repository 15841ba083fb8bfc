/* ring.c — two single-producer single-consumer rings in shared memory. See ring.h for the contract, layout.h for the bytes.
 *
 * Who synchronises with whom; each name stands at both of its ends:
 *
 *   commit         the sender's store of tail (release)       the receiver's load of tail (acquire): payloads
 *   give back      the receiver's store of head (release)     the sender's load of head (acquire): memory to write again
 *   reader sleeps  the receiver: flag, full fence, tail       the sender: tail, full fence, flag
 *   writer sleeps  the sender: flag, full fence, head         the receiver: head, full fence, flag
 *   release due    another thread: held less one, due         the receiver: due taken, then held (all sequentially consistent)
 *   goodbye        the closer's store of closed (release)     the receiver's load of closed (acquire), then tail again
 *   ended          the store after the kernel said so         the receiver's load, then tail again
 *
 * The two "sleeps" are the store-load race: each side writes its own word and then reads the other's, and without a full fence
 * between the two, both may read the old value: the sender does not ring and the receiver sleeps for ever. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "ring_words.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 8U
#endif

/* -- memory -------------------------------------------------------------------------------------------------------- */

#define SEALS (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)

static bool good_capacity(uint64_t capacity)
{
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    return capacity >= page && capacity <= RING_MAX_CAPACITY && (capacity & (capacity - 1)) == 0;
}

int ring_create(uint64_t capacity)
{
    if (!good_capacity(capacity)) {
        errno = EINVAL;
        return -1;
    }
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    off_t size = (off_t)(page + 2 * capacity);
    int fd = memfd_create("ipckit-ring", MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_NOEXEC_SEAL);
    if (fd < 0 && errno == EINVAL) /* before Linux 6.3 */
        fd = memfd_create("ipckit-ring", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0)
        return -1;
    int failed = ftruncate(fd, size) < 0 ? errno : 0;
    /* Full memory must be an error here, and not a SIGBUS at some later store. */
    while (!failed && (failed = posix_fallocate(fd, 0, size)) == EINTR)
        failed = 0;
    if (!failed) {
        struct ring_header *header = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (header == MAP_FAILED)
            failed = errno;
        else { /* the counters begin as the zeros that fresh memory is made of */
            header->magic = RING_MAGIC;
            header->version = RING_VERSION;
            header->header_bytes = (uint32_t)page;
            header->capacity = capacity;
            munmap(header, page);
            if (fcntl(fd, F_ADD_SEALS, SEALS) < 0)
                failed = errno;
        }
    }
    if (failed) {
        close(fd);
        errno = failed;
        return -1;
    }
    return fd;
}

static uint8_t *map_twice(int memory, uint64_t capacity, off_t offset, int protection)
{
    uint8_t *base = mmap(NULL, 2 * capacity, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED)
        return NULL;
    for (int half = 0; half < 2; half++)
        if (mmap(base + (uint64_t)half * capacity, capacity, protection, MAP_SHARED | MAP_FIXED | MAP_POPULATE, memory,
                 offset) == MAP_FAILED) {
            int failed = errno;
            munmap(base, 2 * capacity);
            errno = failed;
            return NULL;
        }
    return base;
}

int ring_map(struct ring_map *map, int memory, int side, const char **why)
{
    *map = (struct ring_map){0};
    *why = NULL;
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    struct stat found;
    if (fstat(memory, &found) < 0)
        return -1;
    int seals = fcntl(memory, F_GET_SEALS);
    if (!S_ISREG(found.st_mode) || seals < 0 || (seals & SEALS) != SEALS)
        *why = "the shared memory is not sealed";
    else if (found.st_size < (off_t)(page + 2 * page))
        *why = "the shared memory is too small";
    if (*why) {
        errno = EPROTO;
        return -1;
    }
    struct ring_header *header = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, memory, 0);
    if (header == MAP_FAILED)
        return -1;
    map->header = header;
    /* Copied out once: from here on the peer may write what it likes. */
    struct ring_header seen;
    memcpy(&seen, header, offsetof(struct ring_header, ring));
    if (seen.magic != RING_MAGIC)
        *why = "the shared memory is not a ring (its magic is wrong)";
    else if (seen.version != RING_VERSION)
        *why = "the ring has another version";
    else if (seen.header_bytes != page || !good_capacity(seen.capacity) ||
             found.st_size != (off_t)(page + 2 * seen.capacity))
        *why = "the ring's capacity does not fit its memory";
    if (*why) {
        ring_unmap(map);
        errno = EPROTO;
        return -1;
    }
    map->capacity = seen.capacity;
    for (int i = 0; i < 2; i++) {
        int protection = side < 0 || side == i ? PROT_READ | PROT_WRITE : PROT_READ;
        map->data[i] = map_twice(memory, seen.capacity, (off_t)(page + (uint64_t)i * seen.capacity), protection);
        if (!map->data[i]) {
            int failed = errno;
            ring_unmap(map);
            errno = failed;
            return -1;
        }
    }
    return 0;
}

void ring_unmap(struct ring_map *map)
{
    for (int i = 0; i < 2; i++)
        if (map->data[i])
            munmap(map->data[i], 2 * map->capacity);
    if (map->header)
        munmap(map->header, (size_t)sysconf(_SC_PAGESIZE));
    *map = (struct ring_map){0};
}

/* -- one side ------------------------------------------------------------------------------------------------------ */

/* Frames above this are streamed. Many chunks to a ring let both processors copy at once, out of one another's cache; few make a
 * frame cheaper. The ADR has the figures. */
static uint64_t chunk_of(uint64_t capacity)
{
    uint64_t chunk = capacity / 16, least = capacity / 4 < 1 << 14 ? capacity / 4 : 1 << 14;
    return chunk < least ? least : chunk < 1 << 18 ? chunk : 1 << 18;
}

void ring_init(struct ring *r, const struct ring_map *map, int side, const int bells[4], int control, int bell, uint64_t limit)
{
    memset(r, 0, sizeof *r);
    r->out = &map->header->ring[side];
    r->in = &map->header->ring[!side];
    r->out_data = map->data[side];
    r->in_data = map->data[!side];
    r->capacity = map->capacity;
    r->mask = map->capacity - 1;
    r->limit = limit;
    r->chunk = chunk_of(map->capacity);
    r->ring_data = bells[2 * side];
    r->hear_space = bells[2 * side + 1];
    r->hear_data = bells[2 * !side];
    r->ring_space = bells[2 * !side + 1];
    r->control = control;
    r->bell = bell;
    r->send_epoll = r->recv_epoll = r->watch = -1;
}

void ring_finish(struct ring *r)
{
    int *epolls[] = {&r->send_epoll, &r->recv_epoll, &r->watch};
    for (int i = 0; i < 3; i++) {
        if (*epolls[i] >= 0)
            close(*epolls[i]);
        *epolls[i] = -1;
    }
}

static enum ring_status broken(struct ring *r, const char *why)
{
    const char *nobody = NULL;
    atomic_compare_exchange_strong(&r->broken, &nobody, why);
    return RING_BROKEN;
}

void ring_look(struct ring *r)
{
    char byte;
    ssize_t got = recv(r->control, &byte, 1, MSG_DONTWAIT);
    if (got > 0)
        broken(r, "the peer wrote to the control socket");
    else if (got == 0 || (errno != EAGAIN && errno != EINTR))
        atomic_store_explicit(&r->ended, true, memory_order_release); /* SYNC POINT: ended */
}

void ring_goodbye(struct ring *r)
{
    atomic_store_explicit(&r->out->closed, 1, memory_order_release); /* SYNC POINT: goodbye */
}

/* -- sending ------------------------------------------------------------------------------------------------------- */

static int64_t coarse_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

void ring_glance(struct ring *r)
{
    int64_t now = coarse_ns();
    if (now != GLANCE(r->tick)) {
        SET(r->tick, now);
        ring_look(r);
    }
}

enum ring_status ring_sendable(struct ring *r)
{
    ring_glance(r);
    if (GLANCE(r->broken))
        return RING_BROKEN;
    if (GLANCE(r->in->closed))
        return RING_GOODBYE;
    return GLANCE(r->ended) ? RING_ENDED : RING_OK;
}

enum ring_status ring_reserve(struct ring *r, uint64_t length, uint8_t **payload)
{
    uint64_t bytes = record_bytes(length), tail = GLANCE(r->tail);
    *payload = r->out_data + (tail & r->mask) + sizeof(struct record_header);
    if (r->capacity - (tail - r->seen_head) >= bytes)
        return RING_OK;
    uint64_t head = atomic_load_explicit(&r->out->head, memory_order_acquire); /* SYNC POINT: give back */
    if (tail - head > tail - r->seen_head)
        return broken(r, "the head of our ring went back, or beyond its tail");
    r->seen_head = head;
    if (r->capacity - (tail - head) >= bytes)
        return RING_OK;
    SET(r->need, bytes);
    return RING_WAIT;
}

void ring_append(struct ring *r, uint64_t length, enum record_kind kind)
{
    struct record_header header = {(uint32_t)length, kind};
    uint64_t tail = GLANCE(r->tail);
    memcpy(r->out_data + (tail & r->mask), &header, sizeof header);
    SET(r->tail, tail + record_bytes(length));
}

void ring_publish(struct ring *r)
{
    atomic_store_explicit(&r->out->tail, GLANCE(r->tail), memory_order_release); /* SYNC POINT: commit */
}

void ring_wake_reader(struct ring *r)
{
    full_fence(); /* SYNC POINT: reader sleeps */
    /* Who takes the announcement rings the bell; the exchange orders nothing. */
    if (GLANCE(r->out->reader_sleeps) &&
        atomic_exchange_explicit(&r->out->reader_sleeps, 0, memory_order_relaxed))
        ring_bell(r->ring_data);
}

enum ring_status ring_stream(struct ring *r, struct ring_rest *rest)
{
    do {
        uint64_t left = rest->size - rest->done;
        uint64_t prefix = rest->begun ? 0 : sizeof left;
        uint64_t part = left + prefix <= r->chunk ? left : r->chunk - prefix;
        uint8_t *payload;
        enum ring_status status = ring_reserve(r, prefix + part, &payload);
        if (status != RING_OK)
            return status;
        if (prefix)
            memcpy(payload, &rest->size, sizeof rest->size);
        memcpy(payload + prefix, rest->from + rest->done, part);
        ring_append(r, prefix + part, prefix ? RECORD_FIRST : part < left ? RECORD_MORE : RECORD_LAST);
        ring_publish(r);
        ring_wake_reader(r);
        rest->begun = true;
        rest->done += part;
    } while (rest->done < rest->size && !GLANCE(r->closing));
    return rest->done < rest->size ? RING_WAIT : RING_OK;
}

/* -- receiving ----------------------------------------------------------------------------------------------------- */

/* What stands at `read`, checked. Nothing of shared memory is looked at twice. */
static enum ring_status ring_peek(struct ring *r, struct record_header *header)
{
    if (r->read == r->seen_tail) {
        uint64_t tail = atomic_load_explicit(&r->in->tail, memory_order_acquire); /* SYNC POINT: commit */
        if (tail == r->read) {
            /* The peer's last word on the matter precedes its closing and its death, so look once more after seeing either. */
            bool closed = atomic_load_explicit(&r->in->closed, memory_order_acquire); /* SYNC POINT: goodbye */
            bool ended = atomic_load_explicit(&r->ended, memory_order_acquire);       /* SYNC POINT: ended */
            if (!closed && !ended)
                return RING_WAIT;
            tail = atomic_load_explicit(&r->in->tail, memory_order_acquire); /* SYNC POINT: commit */
            if (tail == r->read)
                return closed && !r->into ? RING_GOODBYE : RING_ENDED;
        }
        if (tail - r->read > r->capacity - (r->read - r->head) || tail % 8)
            return broken(r, "the tail of the peer's ring is impossible");
        r->seen_tail = tail;
    }
    uint64_t available = r->seen_tail - r->read;
    memcpy(header, r->in_data + (r->read & r->mask), sizeof *header);
    /* A compiler that read the header again, from memory that the peer can write, would undo the checks. */
    __asm__ volatile("" : : : "memory");
    if (record_bytes(header->length) > available)
        return broken(r, "a record is longer than what was committed");
    return RING_OK;
}

static enum ring_status ring_accept_part(struct ring *r, const struct record_header *header)
{
    uint64_t left = r->total - r->done;
    if (header->kind == RECORD_MORE ? header->length == 0 || header->length >= left
                                    : header->kind != RECORD_LAST || header->length != left)
        return broken(r, "a streamed frame does not add up");
    memcpy(r->into + r->done, r->in_data + (r->read & r->mask) + sizeof *header, header->length);
    r->done += header->length;
    r->read += record_bytes(header->length);
    ring_release(r);
    return RING_OK;
}

enum ring_status ring_next(struct ring *r, struct ring_frame *frame)
{
    for (;;) {
        if (r->into && r->done == r->total) {
            *frame = (struct ring_frame){r->into, r->total, true};
            return RING_OK;
        }
        if (GLANCE(r->broken))
            return RING_BROKEN;
        if (GLANCE(r->closing))
            return RING_WAIT;
        struct record_header header;
        enum ring_status status = ring_peek(r, &header);
        if (status != RING_OK)
            return status;
        const uint8_t *payload = r->in_data + (r->read & r->mask) + sizeof header;
        if (r->into) {
            if ((status = ring_accept_part(r, &header)) != RING_OK)
                return status;
        } else if (header.kind == RECORD_WHOLE) {
            if (header.length > r->limit)
                return broken(r, "a frame is above the limit");
            *frame = (struct ring_frame){payload, header.length, false};
            return RING_OK;
        } else if (header.kind == RECORD_FIRST && header.length > sizeof frame->size) {
            memcpy(&frame->size, payload, sizeof frame->size);
            __asm__ volatile("" : : : "memory");
            if (frame->size > r->limit)
                return broken(r, "a streamed frame is above the limit");
            if (frame->size <= header.length - sizeof frame->size)
                return broken(r, "a streamed frame does not add up");
            return RING_LARGE;
        } else
            return broken(r, "a record has no known kind");
    }
}

void ring_assemble(struct ring *r, uint8_t *into, uint64_t size)
{
    /* The size that was checked is the size that counts; the length is checked again, because it is read again. */
    struct record_header header;
    memcpy(&header, r->in_data + (r->read & r->mask), sizeof header);
    __asm__ volatile("" : : : "memory");
    uint64_t part = header.length - sizeof size;
    if (header.length <= sizeof size || part >= size || record_bytes(header.length) > r->seen_tail - r->read) {
        broken(r, "a record changed after it was committed");
        return;
    }
    memcpy(into, r->in_data + (r->read & r->mask) + sizeof header + sizeof size, part);
    r->into = into;
    r->total = size;
    r->done = part;
    r->read += record_bytes(header.length);
    ring_release(r);
}

void ring_take(struct ring *r, const struct ring_frame *frame)
{
    r->idle_arms = 0;
    if (frame->assembled) {
        r->into = NULL;
        r->total = r->done = 0;
    } else
        r->read += record_bytes(frame->size);
}

void ring_release(struct ring *r)
{
    if (__builtin_expect(GLANCE(r->release_due), 0))
        atomic_exchange(&r->release_due, false); /* SYNC POINT: release due */
    if (atomic_load(&r->held) || r->head == r->read) /* SYNC POINT: release due */
        return;
    r->head = r->read;
    atomic_store_explicit(&r->in->head, r->read, memory_order_release); /* SYNC POINT: give back */
    full_fence();                                                       /* SYNC POINT: writer sleeps */
    uint64_t need = GLANCE(r->in->writer_sleeps);
    if (__builtin_expect(need != 0, 0)) {
        uint64_t used = GLANCE(r->in->tail) - r->read;
        if ((used == 0 || used + (need & ~UINT64_C(7)) <= r->capacity) &&
            atomic_exchange_explicit(&r->in->writer_sleeps, 0, memory_order_relaxed))
            ring_bell(r->ring_space);
    }
}

void ring_release_soon(struct ring *r)
{
    atomic_store(&r->release_due, true); /* SYNC POINT: release due */
    ring_bell(r->hear_data);
}
