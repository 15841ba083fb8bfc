/* py_stream.h — what the files of StreamLink share: py_stream.c (the object, its beginning and end), py_stream_recv.c (waiting,
 * receiving), py_stream_send.c (sending).
 *
 * Every call goes the same way: check, take the lane, try with the GIL (a non-blocking system call on a small frame costs less
 * than letting go of it), and only when that was not enough let go of it and wait in C. The lanes keep the reader and the writer
 * to one thread each; the GIL keeps everything else.
 */
#ifndef IPCKIT_PY_STREAM_H
#define IPCKIT_PY_STREAM_H

#include "module.h"

#include "stream.h"

enum { LARGE = 64 << 10 }; /* copying more than this is worth letting go of the GIL */

typedef struct {
    PyObject_HEAD
    struct endpoint end;
    struct stream_reader in;
    struct stream_writer out;
    PyObject *wait;      /* the Wait class */
    PyObject *body;      /* bytes: the large frame in progress; NULL if there is none, or it is in the memory of recv_into */
    PyObject *weakrefs;
    bool goodbye;        /* the flag of the constructor */
    bool reframed;       /* the peer is of another make: what it said wrong, it is to be told */
    bool letting_go;     /* close(goodbye=False): another process goes on with the stream */
    bool parted;         /* the farewell has been tried */
    bool adaptive;       /* spin=auto */
    unsigned skip, penalty; /* waits that go by without a spin: still, and after the last failure */
    enum stream_status ended; /* why sending is refused; STREAM_OK while it is not */
    int ended_errno;
} StreamLink;

/* Refuse a closed or forked link, take the lane, and keep the descriptors until leave. */
int stream_link_enter(StreamLink *self, struct lane *lane, int64_t deadline, const char *operation);
void stream_link_leave(StreamLink *self, struct lane *lane);

/* These raise, and answer -1. */
int stream_link_over(StreamLink *self, enum stream_status why, int error, const char *operation);
int stream_link_too_large(StreamLink *self, size_t size, uint64_t limit, const char *operation);
int stream_link_give_up(StreamLink *self, enum reason why, const char *operation);
/* After a call without the GIL: closed, interrupted, or (AGAIN) out of time? 0 if it can go on. */
int stream_link_may_go_on(StreamLink *self, enum stream_status status, const char *operation);

/* How hard to try. TRY and SPIN answer None, or 0, instead of going to sleep. */
enum effort { TRY, SPIN, WAIT };

/* The methods. */
PyObject *stream_link_receive(StreamLink *self, int64_t deadline, enum effort effort, const char *operation);
PyObject *stream_link_receive_into(StreamLink *self, const Py_buffer *into, int64_t deadline);
PyObject *stream_link_receive_many(StreamLink *self, Py_ssize_t limit, int64_t deadline);
int stream_link_transmit(StreamLink *self, PyObject *frame, int64_t deadline, bool wait, const char *operation);
PyObject *stream_link_transmit_many(StreamLink *self, PyObject *frames, int64_t deadline); /* frames: a tuple */
int stream_link_flush(StreamLink *self);
PyObject *stream_link_glance(StreamLink *self, size_t count);

#endif
