/* py_mapping.c — the memory of locks in this process: each object is mapped once, however many Python objects are made over it.
 *
 * A robust word is on its owner's list by its *address*. Were there two addresses for it, one who takes it at the first and releases it
 * at the second would leave the first on the list, and the list leads through the word itself: the kernel would lose its way there, and
 * with it every other lock of that thread. So whoever opens what this process has mapped already gets that mapping. */
#include "py_sync.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* Not the GIL: sleepers drop mappings too. */
static pthread_mutex_t guard = PTHREAD_MUTEX_INITIALIZER;
static struct mapping *all;
static unsigned guard_forks;

static void enter(void)
{
    if (guard_forks != fork_generation) { /* a thread of the parent's may have held it; each change of the list is one store */
        guard = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
        guard_forks = fork_generation;
    }
    pthread_mutex_lock(&guard);
}

static void leave(void)
{
    pthread_mutex_unlock(&guard);
}

/* Of this file, or NULL. An inode's number tells one file from another only where the file system never gives it to two; memfds come
 * from a counter of 32 bits, so the object's own number counts as well. */
static struct mapping *mapped(int fd, const struct stat *found)
{
    uint64_t id;
    if (pread(fd, &id, sizeof id, offsetof(struct sync_object, header.id)) != sizeof id)
        return NULL;
    struct mapping *map = all;
    while (map && (map->device != found->st_dev || map->inode != found->st_ino || map->size != (size_t)found->st_size ||
                   map->o->header.id != id))
        map = map->next;
    return map;
}

static struct mapping *fresh(int fd, const struct stat *found)
{
    size_t size = (size_t)found->st_size;
    struct mapping *map = malloc(sizeof *map);
    if (!map)
        return NULL;
    void *o = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (o == MAP_FAILED) {
        int error = errno;
        free(map);
        errno = error;
        return NULL;
    }
    *map = (struct mapping){.o = o, .size = size, .device = found->st_dev, .inode = found->st_ino, .next = all};
    all = map;
    return map;
}

struct mapping *mapping_of(int fd, const char **wrong)
{
    struct stat found;
    if (fstat(fd, &found) != 0)
        return NULL;
    if (found.st_size < SYNC_SMALL || found.st_size > SYNC_LARGE) {
        *wrong = "this is no synchronisation object";
        return NULL;
    }
    enter();
    struct mapping *map = mapped(fd, &found);
    if (!map)
        map = fresh(fd, &found);
    if (map)
        map->users++;
    leave();
    return map;
}

struct mapping *mapping_keep(struct mapping *map)
{
    if (map) {
        enter();
        map->users++;
        leave();
    }
    return map;
}

/* The guard is held: one user less; whether it was the last, and the mapping is out of the list. */
static bool unused(struct mapping *map)
{
    if (--map->users > 0)
        return false;
    struct mapping **at = &all;
    while (*at != map)
        at = &(*at)->next;
    *at = map->next;
    return true;
}

static void unmap(struct mapping *map)
{
    munmap(map->o, map->size);
    free(map);
}

void mapping_drop(struct mapping *map)
{
    if (!map)
        return;
    enter();
    bool last = unused(map);
    leave();
    if (last)
        unmap(map);
}

static bool ours(struct robust_word *word)
{
    return (atomic_load_explicit(&word->word, memory_order_relaxed) & OWNER_MASK) &&
           atomic_load_explicit(&word->pid, memory_order_relaxed) == (uint32_t)getpid();
}

/* A thread of this process owns a word in it, so the kernel will come to read it when the thread ends. */
static bool owned(const struct mapping *map)
{
    if (ours(&map->o->mutex.own)) /* a witness has the same owner, and monitors are free between calls */
        return true;
    uint32_t slots = map->size == SYNC_LARGE ? atomic_load_explicit(&map->o->crowd.high, memory_order_relaxed) : 0;
    for (uint32_t i = 0; i < slots && i < SYNC_SLOTS; i++)
        if (ours(&map->o->slots[i].own))
            return true;
    return false;
}

void mapping_part(struct mapping *map, int fd)
{
    enter();
    bool held = owned(map), last = false;
    if (held && !map->stays)
        map->stays = true; /* our use of it becomes that of who holds it */
    else {
        if (!held && map->stays) {
            map->stays = false;
            map->users--; /* ours is left */
        }
        last = unused(map);
    }
    leave();
    close(fd); /* the flock goes with the mapping, which keeps the open file */
    if (last)
        unmap(map);
}
