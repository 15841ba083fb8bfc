/* stream.h — frames on byte streams: 4-byte big-endian length, payload. Plain C, no Python, no threads of its own.
 *
 *      +----+----+----+----+------------------- - - - ---+      ff ff ff ff   goodbye (where both ends agreed on it)
 *      |   length, u32 be  |   payload, `length` bytes   |
 *      +----+----+----+----+------------------- - - - ---+
 *
 * Some protocols have a header behind the length that the length does not count. A reader and a writer can be told so (`uncounted`): the
 * frame is then the header and the payload.
 *
 * A reader and a writer share nothing, so one thread may use the reader while another uses the writer. Each has one user
 * at a time. Nothing here waits, except stream_await and stream_push, which sleep on the stream and on a bell.
 *
 * A socket is set to blocking, and everything else says MSG_DONTWAIT: a receiver that has nothing else to watch sleeps in recv itself,
 * which on a Unix socket is worth a fifth of a round trip against poll and read (pipes and TCP show no difference). The bell does
 * not reach it there; shutdown(SHUT_RD) does.
 */
#ifndef IPCKIT_STREAM_H
#define IPCKIT_STREAM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

enum {
    STREAM_HEADER = 4,
    STREAM_BUFFER = 64 << 10, /* what one read takes; a longer frame is read straight into memory of its own */
    STREAM_VECTORS = 64,      /* what one write takes */
};
#define STREAM_GOODBYE_WORD UINT32_C(0xffffffff)
#define STREAM_FOREVER INT64_MAX

enum stream_status {
    STREAM_OK,    /* it went on: bytes came, or all went */
    STREAM_FRAME, /* a whole frame */
    STREAM_LARGE, /* a frame that the buffer cannot hold has begun: give it memory by stream_target */
    STREAM_AGAIN, /* not without waiting; from the waiting calls: the deadline has passed */
    STREAM_BELL,  /* the bell rang */
    STREAM_SIGNAL, /* a signal handler ran */
    STREAM_FLUSHED, /* stream_await: the other direction's rest has gone, its lane can be let go */
    /* From here on the reader is over, and says so for ever. */
    STREAM_ENDED, /* end of file between frames */
    STREAM_TORN,  /* end of file inside a frame */
    STREAM_GOODBYE,
    STREAM_OVERSIZE, /* a prefix above the limit; it is in `size` */
    STREAM_FAILED,   /* the system call; errno is in `error`. From the writer: this call failed */
};

struct stream_reader {
    int fd;
    bool socket;  /* recv with MSG_DONTWAIT; else read on a non-blocking descriptor */
    int64_t patience; /* how long a blocking recv waits (SO_RCVTIMEO) */
    bool goodbye; /* ff ff ff ff has a meaning */
    enum stream_status over; /* STREAM_OK while it lives. It comes after the frames in the buffer */
    int error;
    uint64_t limit;
    size_t uncounted; /* bytes of a frame that its length does not count: a header of the peer's protocol */
    unsigned char *buffer; /* allocated by the first fill */
    size_t capacity, begin, end;
    unsigned char *target; /* the large frame in progress: `have` of `size` bytes. The buffer holds what follows it */
    size_t size, have;
};

struct stream_writer {
    int fd;
    bool socket;
    int error;
    size_t uncounted; /* as the reader's */
    unsigned char *rest; /* the tail of an accepted frame: bytes begin to end */
    size_t capacity, begin, end;
};

struct stream_view {
    const unsigned char *data;
    size_t size;
};

void stream_open(struct stream_reader *reader, struct stream_writer *writer, int rfd, int wfd, uint64_t limit, bool goodbye);
void stream_release(struct stream_reader *reader, struct stream_writer *writer); /* the memory, not the descriptors */
void stream_hand_back(struct stream_reader *reader, struct stream_writer *writer); /* the descriptors as they came: non-blocking */

/* -- reading */

/* What the bytes at hand amount to: FRAME (view is set), LARGE, AGAIN, or why it is over. Takes nothing. */
enum stream_status stream_peek(struct stream_reader *reader, struct stream_view *view);
/* The next bytes, taking nothing: NULL while there are fewer than `count`. */
const unsigned char *stream_glance(const struct stream_reader *reader, size_t count);
/* Take the frame that stream_peek showed. The view stays valid until the next fill. */
void stream_take(struct stream_reader *reader, const struct stream_view *view);
/* The length of the frame that has begun, if its prefix is here. */
bool stream_announced(const struct stream_reader *reader, size_t *size);
/* Memory for the large frame that has begun: what came of it is copied there, the rest is read there. */
void stream_target(struct stream_reader *reader, void *memory);
/* The same, for a frame whose memory must be given back before it is whole. */
void stream_retarget(struct stream_reader *reader, void *memory);
/* One read that does not wait. OK, AGAIN, or (something is) over: then stream_peek says what, after the frames that are still there. */
enum stream_status stream_fill(struct stream_reader *reader);
/* Read all there is, `most` bytes at most, to learn how the peer ended although frames stand before it: over, or AGAIN. Keeps them. */
enum stream_status stream_foresee(struct stream_reader *reader, size_t most);

/* Read again and again until stream_peek has something other than AGAIN to say (true), or the clock says `until`. */
bool stream_spin(struct stream_reader *reader, int64_t until);
/* The same, asleep. `rest`: drive this writer's rest out meanwhile (NULL: none). OK, AGAIN (deadline), BELL, SIGNAL, FLUSHED.
 * Wake it by the bell and, on a socket, shutdown(SHUT_RD); then it returns BELL or OK. */
enum stream_status stream_await(struct stream_reader *reader, struct stream_writer *rest, int bell, int64_t deadline);

/* -- writing */

static inline bool stream_pending(const struct stream_writer *writer)
{
    return writer->begin != writer->end;
}
static inline void stream_header(unsigned char *at, size_t size)
{
    at[0] = (unsigned char)(size >> 24), at[1] = (unsigned char)(size >> 16);
    at[2] = (unsigned char)(size >> 8), at[3] = (unsigned char)size;
}
/* One write of what follows the first `*sent` bytes of these (at most STREAM_VECTORS) vectors; counts `*sent` up. OK when all is gone, AGAIN, FAILED. */
enum stream_status stream_put(struct stream_writer *writer, const struct iovec *vectors, int count, size_t *sent);
/* stream_put until all is gone, sleeping in between. OK, AGAIN (deadline), BELL, SIGNAL, FAILED. */
enum stream_status stream_push(struct stream_writer *writer, const struct iovec *vectors, int count, size_t *sent, int bell,
                               int64_t deadline);
/* Keep the bytes from `sent` to `until` as the rest. Only while nothing is pending. false: no memory. */
bool stream_keep(struct stream_writer *writer, const struct iovec *vectors, int count, size_t sent, size_t until);
/* One write of the rest: OK when none is left, AGAIN, FAILED. */
enum stream_status stream_flush(struct stream_writer *writer);
enum stream_status stream_flush_wait(struct stream_writer *writer, int bell, int64_t deadline);
/* The rest and a goodbye, now or never: if there is no room, the kernel's buffer is enlarged once. True if they went. */
bool stream_farewell(struct stream_writer *writer, bool goodbye);

#endif
