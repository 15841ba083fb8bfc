/* cast_arena.c — see cast_arena.h. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "cast_arena.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 8U
#endif
#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif

#define SEALS (F_SEAL_SHRINK | F_SEAL_GROW)
#define UNIT (UINT64_C(1) << 16) /* bytes that are asked for together */
enum { QUICK = 64 };

int sealed_memory(const char *name, uint64_t bytes, int more_seals)
{
    int fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_NOEXEC_SEAL);
    if (fd < 0 && errno == EINVAL) /* before Linux 6.3 */
        fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd >= 0 && (ftruncate(fd, (off_t)bytes) < 0 || fcntl(fd, F_ADD_SEALS, SEALS | more_seals) < 0)) {
        int failed = errno;
        close(fd);
        errno = failed;
        return -1;
    }
    return fd;
}

bool is_sealed(int fd, uint64_t least, int more_seals, uint64_t *bytes)
{
    struct stat found;
    int seals = fcntl(fd, F_GET_SEALS), wanted = SEALS | F_SEAL_SEAL | more_seals;
    if (fstat(fd, &found) < 0 || !S_ISREG(found.st_mode) || seals < 0 || (seals & wanted) != wanted)
        return false;
    *bytes = (uint64_t)found.st_size;
    return found.st_size > 0 && *bytes >= least;
}

/* -- the books ----------------------------------------------------------------------------------------------------- */

static void put_free(struct arena *a, uint32_t block, unsigned order)
{
    struct arena_leaf *leaf = &a->leaves[block];
    leaf->order = (uint8_t)order;
    leaf->free = true;
    leaf->prev = NO_BLOCK;
    leaf->next = a->heads[order];
    if (leaf->next != NO_BLOCK)
        a->leaves[leaf->next].prev = block;
    a->heads[order] = block;
}

static void take_free(struct arena *a, uint32_t block)
{
    struct arena_leaf *leaf = &a->leaves[block];
    if (leaf->prev != NO_BLOCK)
        a->leaves[leaf->prev].next = leaf->next;
    else
        a->heads[leaf->order] = leaf->next;
    if (leaf->next != NO_BLOCK)
        a->leaves[leaf->next].prev = leaf->prev;
    leaf->free = false;
}

static void join(struct arena *a, uint32_t block)
{
    unsigned order = a->leaves[block].order;
    for (; order < a->top; order++) {
        uint32_t buddy = block ^ (UINT32_C(1) << order);
        if (!a->leaves[buddy].free || a->leaves[buddy].order != order)
            break;
        take_free(a, buddy);
        block = block < buddy ? block : buddy;
    }
    put_free(a, block, order);
}

static bool join_quick(struct arena *a)
{
    bool any = false;
    for (unsigned order = 0; order <= a->top; order++) {
        for (uint32_t block = a->quick[order], next; block != NO_BLOCK; block = next) {
            next = a->leaves[block].next;
            join(a, block);
            any = true;
        }
        a->quick[order] = NO_BLOCK;
        a->quick_count[order] = 0;
    }
    return any;
}

static unsigned order_of(uint64_t bytes)
{
    unsigned order = 0;
    while (((uint64_t)ARENA_LEAF << order) < bytes)
        order++;
    return order;
}

static uint32_t cut(struct arena *a, unsigned order)
{
    unsigned from = order;
    while (from <= a->top && a->heads[from] == NO_BLOCK)
        from++;
    if (from > a->top)
        return NO_BLOCK;
    uint32_t block = a->heads[from];
    take_free(a, block);
    while (from > order) { /* the lower half: what is used lies together */
        from--;
        put_free(a, block + (UINT32_C(1) << from), from);
    }
    a->leaves[block].order = (uint8_t)order;
    return block;
}

static bool grant(struct arena *a, uint32_t block, uint64_t bytes)
{
    uint64_t begin = (uint64_t)block * ARENA_LEAF, end = begin + (bytes ? bytes : 1);
    for (uint64_t unit = begin / UNIT; unit * UNIT < end; unit++) {
        if (a->granted[unit])
            continue;
        int failed;
        while ((failed = posix_fallocate(a->memory, (off_t)(a->page + unit * UNIT), UNIT)) == EINTR)
            ;
        if (failed) {
            errno = failed;
            return false;
        }
        a->granted[unit] = 1;
    }
    return true;
}

uint32_t arena_take(struct arena *a, uint64_t bytes)
{
    errno = 0;
    if (bytes > a->size)
        return NO_BLOCK;
    unsigned order = order_of(bytes);
    uint32_t block = a->quick[order];
    if (block != NO_BLOCK) {
        a->quick[order] = a->leaves[block].next;
        a->quick_count[order]--;
    } else if ((block = cut(a, order)) == NO_BLOCK && (!join_quick(a) || (block = cut(a, order)) == NO_BLOCK))
        return NO_BLOCK;
    a->leaves[block].refs = 0;
    if (!grant(a, block, bytes)) {
        int failed = errno;
        join(a, block);
        errno = failed;
        return NO_BLOCK;
    }
    return block;
}

void arena_give(struct arena *a, uint32_t block)
{
    unsigned order = a->leaves[block].order;
    if (a->quick_count[order] >= QUICK) {
        join(a, block);
        return;
    }
    a->leaves[block].next = a->quick[order];
    a->quick[order] = block;
    a->quick_count[order]++;
}

/* -- opening ------------------------------------------------------------------------------------------------------- */

int arena_open(struct arena *a, uint64_t size)
{
    *a = (struct arena){.memory = -1};
    if (size < ARENA_MIN || size > ARENA_MAX || (size & (size - 1))) {
        errno = EINVAL;
        return -1;
    }
    a->page = (uint64_t)sysconf(_SC_PAGESIZE);
    a->size = size;
    a->top = order_of(size);
    a->leaves = calloc(size / ARENA_LEAF, sizeof *a->leaves); /* big, and zeros until they are used */
    a->granted = calloc(size / UNIT, 1);
    void *base = MAP_FAILED;
    if (a->leaves && a->granted && (a->memory = sealed_memory("ipckit-topics", a->page + size, 0)) >= 0)
        base = mmap(NULL, a->page + size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, a->memory, 0);
    if (base != MAP_FAILED) {
        a->header = base;
        a->data = (uint8_t *)base + a->page;
        int failed = posix_fallocate(a->memory, 0, (off_t)a->page);
        if (!failed) {
            *a->header = (struct arena_header){ARENA_MAGIC, CAST_VERSION, (uint32_t)a->page, size};
            /* From here on nobody can get a mapping that writes; ours stays. */
            if (fcntl(a->memory, F_ADD_SEALS, F_SEAL_FUTURE_WRITE | F_SEAL_SEAL) == 0) {
                for (unsigned order = 0; order < ARENA_ORDERS; order++)
                    a->heads[order] = a->quick[order] = NO_BLOCK;
                put_free(a, 0, a->top);
                return 0;
            }
            failed = errno;
        }
        errno = failed;
    }
    int failed = errno ? errno : ENOMEM;
    arena_close(a);
    errno = failed;
    return -1;
}

void arena_close(struct arena *a)
{
    if (a->header)
        munmap(a->header, a->page + a->size);
    if (a->memory >= 0)
        close(a->memory);
    free(a->leaves);
    free(a->granted);
    *a = (struct arena){.memory = -1};
}
