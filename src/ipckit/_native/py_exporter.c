/* py_exporter.c — an object that exports the buffer of another: what a Segment is to numpy, ctypes and memoryview.
 *
 * The memory itself is Python's own mmap object. An Exporter hands out *its* buffers, so a view belongs to the mapping that it was made
 * from and keeps that alive, while the Exporter may go on to another one. (Before 3.12 a class in Python cannot export buffers.)
 *
 * But numpy.ndarray(buffer=x) gives the buffer back at once and holds on to x alone. So a mapping whose buffer was handed out lives as
 * long as the Exporter does; only views by _view() are known to hold what they show. */
#include "py_sync.h"

typedef struct {
    PyObject_HEAD
    PyObject *source; /* whose buffer this is; NULL: none any more */
    PyObject *before; /* a list of those whose buffers were handed out; or NULL */
    bool handed;      /* the source's was */
} Exporter;

static int exporter_getbuffer(PyObject *object, Py_buffer *view, int flags)
{
    Exporter *self = (Exporter *)object;
    view->obj = NULL;
    if (!self->source) {
        PyErr_SetString(PyExc_BufferError, "it is closed");
        return -1;
    }
    self->handed = true;
    return PyObject_GetBuffer(self->source, view, flags);
}

/* Never called, as no view is ours; but what has none is taken for memory that nothing can move (numpy.frombuffer). */
static void exporter_releasebuffer(PyObject *object, Py_buffer *view)
{
    (void)object, (void)view;
}

static PyObject *exporter_view(PyObject *object, PyObject *unused)
{
    (void)unused;
    Exporter *self = (Exporter *)object;
    if (self->source)
        return PyMemoryView_FromObject(self->source);
    PyErr_SetString(PyExc_BufferError, "it is closed");
    return NULL;
}

static Py_ssize_t exporter_length(PyObject *object)
{
    Exporter *self = (Exporter *)object;
    return self->source ? PyObject_Length(self->source) : 0;
}

static int exporter_traverse(PyObject *object, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(((Exporter *)object)->source);
    Py_VISIT(((Exporter *)object)->before);
    return 0;
}

static int exporter_clear(PyObject *object)
{
    Py_CLEAR(((Exporter *)object)->source);
    Py_CLEAR(((Exporter *)object)->before);
    return 0;
}

static void exporter_dealloc(PyObject *object)
{
    PyObject_GC_UnTrack(object);
    exporter_clear(object);
    PyTypeObject *type = Py_TYPE(object);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(object);
    Py_DECREF(type);
}

static PyObject *exporter_export(PyObject *object, PyObject *source)
{
    Exporter *self = (Exporter *)object;
    PyObject *last = self->source;
    if (last && self->handed) {
        if (!self->before && !(self->before = PyList_New(0)))
            return NULL;
        if (PyList_Append(self->before, last) < 0)
            return NULL;
    }
    self->source = source == Py_None ? NULL : Py_NewRef(source);
    self->handed = false;
    Py_XDECREF(last);
    Py_RETURN_NONE;
}

static PyMethodDef exporter_methods[] = {
    {"_export", exporter_export, METH_O, NULL},
    {"_view", exporter_view, METH_NOARGS, NULL},
    {NULL},
};

static PyType_Slot exporter_slots[] = {
    {Py_tp_doc, "Exports the buffer of another object, for the time being."},
    {Py_tp_dealloc, exporter_dealloc},
    {Py_tp_traverse, exporter_traverse},
    {Py_tp_clear, exporter_clear},
    {Py_tp_methods, exporter_methods},
    {Py_bf_getbuffer, exporter_getbuffer},
    {Py_bf_releasebuffer, exporter_releasebuffer},
    {Py_mp_length, exporter_length},
    {0, NULL},
};

static PyType_Spec exporter_spec = {
    .name = "ipckit._native.Exporter",
    .basicsize = sizeof(Exporter),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_BASETYPE,
    .slots = exporter_slots,
};

int add_exporter_type(PyObject *module)
{
    PyObject *type = PyType_FromModuleAndSpec(module, &exporter_spec, NULL);
    int failed = type ? PyModule_AddObjectRef(module, "Exporter", type) : -1;
    Py_XDECREF(type);
    return failed;
}
