/* floor.h — the C floors: what each mechanism of the kernel costs with nothing of ours above it.
 *
 * Two processes, each pinned to a core of its own; the caller is one, a forked child that never leaves this file the other.
 * Byte streams carry the frames that a StreamLink sends: 4-byte length, payload, one write and as many reads as
 * it takes. Blocking system calls, except where the name says "spin".
 *
 *   pipe fifo unix tcp udp mq          the kernel's byte and message channels
 *   unix-spin                          a Unix stream, both sides polling with non-blocking reads
 *   shm-spin shm-futex                 a mailbox in shared memory, spinning, or sleeping on a futex
 *   sem                                the same mailbox under two process-shared POSIX semaphores
 */
#ifndef IPCKIT_FLOOR_H
#define IPCKIT_FLOOR_H

#include <stddef.h>
#include <stdint.h>

#define FLOOR_LARGEST (1 << 20)

/* The name of the mechanism with this index; NULL beyond the last. */
const char *floor_name(size_t index);

/* `rounds` round trips of `size` bytes after a warm-up, each timed into `times` (ns). 0, or -1 with errno: EINVAL if there is no such
 * mechanism or it does not carry this size, ECHILD if the child failed. Restores the affinity of the calling thread. */
int floor_round_trips(const char *mechanism, size_t size, size_t rounds, const int cpus[2], int64_t *times);

/* `count` messages from the caller to the child; `took` is from the first one sent to the child's word that it has the last. */
int floor_one_way(const char *mechanism, size_t size, size_t count, const int cpus[2], int64_t *took);

#endif
