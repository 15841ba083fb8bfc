/* py_claim.c — loan and borrow: a frame in place, as a context manager over a memoryview.
 *
 * The claim exports the memory, so the view, its slices and the arrays made of them all count as buffers of the claim. Leaving the
 * block ends it when none of them is left; otherwise the block's end raises BufferError, and the claim ends with the last one.
 *
 *     a loan     holds the sending lane until it ends;  ended well: the frame is committed; otherwise it never was
 *     a borrow   holds back what we give back (`held`); ended: the memory goes back to the sender
 */
#include "py_ring.h"

#include <structmember.h>

typedef struct {
    PyObject_HEAD
    RingLink *link;
    PyObject *assembled; /* a borrowed frame that streamed: bytes of our own */
    PyObject *view;
    uint8_t *data;
    uint64_t size;
    uint64_t begin;      /* borrow: where the record stands */
    bool lends, has_lane;
    enum { UNUSED, OPEN, OUTLIVED, ENDED } state;
    unsigned exports;
} Claim;

static const char *operation_of(const Claim *self)
{
    return self->lends ? "loan" : "borrow";
}

static void drop_lane(Claim *self)
{
    if (!self->has_lane)
        return;
    self->has_lane = false;
    self->link->loan = NULL;
    link_hand_on(self->link, &self->link->end.send);
}

void claim_lose_lane(PyObject *claim)
{
    drop_lane((Claim *)claim);
}

static bool usable(const RingLink *link)
{
    return !link->end.closed && link->end.generation == fork_generation;
}

static int end_loan(Claim *self, bool commit)
{
    RingLink *link = self->link;
    int failed = 0;
    if (commit) {
        failed = endpoint_check(&link->end, "loan");
        if (!failed)
            failed = link_may_send(link, 0, 0, "loan");
        if (!failed) {
            ring_append(link->ring, self->size, RECORD_WHOLE);
            ring_publish(link->ring);
            ring_wake_reader(link->ring);
            link->end.counters[0]++;
            link->end.counters[1] += self->size;
        }
    }
    if (usable(link))
        drop_lane(self);
    return failed;
}

static void end_borrow(Claim *self)
{
    struct ring *ring = self->link->ring;
    if (self->assembled) {
        Py_CLEAR(self->assembled);
        return;
    }
    atomic_fetch_sub(&ring->held, 1); /* SYNC POINT: release due */
    if (!usable(self->link))
        return;
    if (self->link->end.recv.busy) /* two threads that give back at once could move the head back */
        ring_release_soon(ring);
    else
        ring_release(ring);
}

static int end_claim(Claim *self, bool commit)
{
    self->state = ENDED;
    if (self->lends)
        return end_loan(self, commit);
    end_borrow(self);
    return 0;
}

/* A borrow whose block was never entered: the frame goes back to where it came from, unless later ones were taken since. */
static void put_back(Claim *self)
{
    RingLink *link = self->link;
    struct ring *ring = link->ring;
    if (!self->lends && usable(link) && !link->end.recv.busy) {
        if (self->assembled && !ring->into) {
            link->partial = self->assembled;
            self->assembled = NULL;
            ring->into = self->data;
            ring->total = ring->done = self->size;
            link->end.counters[2]--;
            link->end.counters[3] -= self->size;
        } else if (!self->assembled && !ring->into && ring->read == self->begin + record_bytes(self->size)) {
            ring->read = self->begin;
            link->end.counters[2]--;
            link->end.counters[3] -= self->size;
        }
    }
    end_claim(self, false);
}

/* -- the object ---------------------------------------------------------------------------------------------------- */

static int claim_getbuffer(PyObject *object, Py_buffer *view, int flags)
{
    Claim *self = (Claim *)object;
    if (self->state != OPEN) {
        PyErr_SetString(PyExc_BufferError, "the memory of a loan or borrow is there inside its `with` block");
        view->obj = NULL;
        return -1;
    }
    if (PyBuffer_FillInfo(view, object, self->data, (Py_ssize_t)self->size, !self->lends, flags) < 0)
        return -1;
    self->exports++;
    if (!self->assembled)
        self->link->exports++;
    return 0;
}

static void claim_releasebuffer(PyObject *object, Py_buffer *view)
{
    Claim *self = (Claim *)object;
    (void)view;
    if (!self->assembled)
        self->link->exports--;
    if (--self->exports == 0 && self->state == OUTLIVED)
        end_claim(self, false);
    link_release(self->link);
}

static PyObject *claim_enter(PyObject *object, PyObject *unused)
{
    Claim *self = (Claim *)object;
    (void)unused;
    if (self->state != UNUSED) {
        PyErr_Format(PyExc_ValueError, "a %s is good for one `with` block", operation_of(self));
        return NULL;
    }
    if (endpoint_check(&self->link->end, operation_of(self)) < 0)
        return NULL;
    self->state = OPEN;
    self->view = PyMemoryView_FromObject(object);
    if (!self->view) {
        self->state = UNUSED;
        return NULL;
    }
    return Py_NewRef(self->view);
}

static PyObject *claim_exit(PyObject *object, PyObject *args)
{
    Claim *self = (Claim *)object;
    PyObject *type, *value, *trace;
    if (!PyArg_ParseTuple(args, "OOO:__exit__", &type, &value, &trace))
        return NULL;
    if (self->state != OPEN)
        Py_RETURN_NONE;
    PyObject *released = PyObject_CallMethod(self->view, "release", NULL);
    if (!released) /* something made of the view is alive: it counts below */
        PyErr_Clear();
    Py_XDECREF(released);
    Py_CLEAR(self->view);
    if (self->exports) {
        self->state = OUTLIVED;
        if (type != Py_None) /* the block's own exception matters more, and its traceback may be what keeps the view */
            Py_RETURN_NONE;
        PyErr_Format(PyExc_BufferError, self->lends ? "a view of the loan outlives its block: the frame was not sent"
                                                    : "a view of the borrowed frame outlives its block");
        return NULL;
    }
    if (end_claim(self, type == Py_None) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static void claim_dealloc(PyObject *object)
{
    Claim *self = (Claim *)object;
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    Py_CLEAR(self->view);
    if (self->link) {
        if (self->state == UNUSED)
            put_back(self);
        else if (self->state != ENDED)
            end_claim(self, false);
    }
    Py_CLEAR(self->assembled);
    Py_CLEAR(self->link);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(object);
    Py_DECREF(type);
}

static int claim_traverse(PyObject *object, visitproc visit, void *arg)
{
    Claim *self = (Claim *)object;
    Py_VISIT(Py_TYPE(object));
    Py_VISIT((PyObject *)self->link);
    Py_VISIT(self->view);
    return 0;
}

static int claim_clear(PyObject *object)
{
    Claim *self = (Claim *)object;
    Py_CLEAR(self->view); /* the link stays: our end needs it */
    return 0;
}

static PyMethodDef claim_methods[] = {
    {"__enter__", claim_enter, METH_NOARGS, NULL},
    {"__exit__", claim_exit, METH_VARARGS, NULL},
    {NULL},
};

static PyType_Slot claim_slots[] = {
    {Py_tp_doc, "A frame in place: a context manager over a memoryview."},
    {Py_tp_dealloc, claim_dealloc},
    {Py_tp_traverse, claim_traverse},
    {Py_tp_clear, claim_clear},
    {Py_tp_methods, claim_methods},
    {Py_bf_getbuffer, claim_getbuffer},
    {Py_bf_releasebuffer, claim_releasebuffer},
    {0, NULL},
};

static PyType_Spec claim_spec = {
    .name = "ipckit._native.Claim",
    .basicsize = sizeof(Claim),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = claim_slots,
};

static PyTypeObject *claim_type;

int add_claim_type(PyObject *module)
{
    if (!claim_type)
        claim_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &claim_spec, NULL);
    return claim_type ? 0 : -1;
}

static Claim *new_claim(RingLink *link, uint8_t *data, uint64_t size)
{
    allocfunc allocate = (allocfunc)PyType_GetSlot(claim_type, Py_tp_alloc);
    Claim *self = (Claim *)allocate(claim_type, 0);
    if (self) {
        self->link = (RingLink *)Py_NewRef((PyObject *)link);
        self->data = data;
        self->size = size;
    }
    return self;
}

/* -- claiming ------------------------------------------------------------------------------------------------------ */

PyObject *link_try_loan(PyObject *object, PyObject *wanted)
{
    RingLink *link = (RingLink *)object;
    Py_ssize_t size = PyLong_AsSsize_t(wanted);
    if (size == -1 && PyErr_Occurred())
        return NULL;
    if (size < 0) {
        PyErr_SetString(PyExc_ValueError, "a size is not negative");
        return NULL;
    }
    int entered = link_try_enter(link, &link->end.send, "loan");
    if (entered <= 0)
        return entered < 0 ? NULL : Py_NewRef(Py_None);
    /* One record, so it must fit into the ring. */
    uint64_t most = link->ring->capacity - sizeof(struct record_header);
    if (most > link->end.limit)
        most = link->end.limit;
    int done = link_may_send(link, (uint64_t)size, most, "loan");
    if (done == 0)
        done = link_push_rest(link, "loan");
    uint8_t *payload;
    if (done > 0) {
        enum ring_status status = ring_reserve(link->ring, (uint64_t)size, &payload);
        done = status == RING_OK ? 1 : status == RING_WAIT ? 0 : link_ended(link, status, "loan");
    }
    Claim *claim = done > 0 ? new_claim(link, payload, (uint64_t)size) : NULL;
    if (!claim) {
        link_leave(link, &link->end.send);
        return done ? NULL : Py_NewRef(Py_None);
    }
    claim->lends = claim->has_lane = true;
    link->loan = (PyObject *)claim;
    link->end.inside--; /* the lane is kept; the descriptors need not be */
    return (PyObject *)claim;
}

PyObject *link_try_borrow(PyObject *object, PyObject *unused)
{
    RingLink *link = (RingLink *)object;
    (void)unused;
    int entered = link_try_enter(link, &link->end.recv, "borrow");
    if (entered <= 0)
        return entered < 0 ? NULL : Py_NewRef(Py_None);
    struct ring_frame frame;
    int found = link_next(link, &frame, "borrow");
    Claim *claim = found > 0 ? new_claim(link, (uint8_t *)frame.payload, frame.size) : NULL;
    if (claim) {
        claim->begin = link->ring->read;
        ring_take(link->ring, &frame);
        if (frame.assembled) {
            claim->assembled = link->partial;
            link->partial = NULL;
        } else
            atomic_fetch_add(&link->ring->held, 1);
        link->end.counters[2]++;
        link->end.counters[3] += frame.size;
    }
    link_leave(link, &link->end.recv);
    return claim || found ? (PyObject *)claim : Py_NewRef(Py_None);
}
