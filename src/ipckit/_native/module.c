/* module.c — the module `ipckit._native._core`: constants, types, and the functions that belong to no type. */
#include "module.h"

#include <errno.h>
#include <pthread.h>

#include "floor.h"
#include "py_sync.h"

unsigned fork_generation;

static void count_fork(void)
{
    fork_generation++;
}

static PyObject *floor_error(const char *mechanism, Py_ssize_t size)
{
    if (errno == EINVAL)
        return PyErr_Format(PyExc_ValueError, "no floor for '%s' at %zd bytes", mechanism, size);
    return PyErr_SetFromErrno(PyExc_OSError);
}

PyDoc_STRVAR(floor_doc, "floor(mechanism, size, rounds, cpus)\n--\n\n"
                        "Round-trip times in ns of the bare mechanism in C, between two pinned processes.");

static PyObject *core_floor(PyObject *module, PyObject *args)
{
    const char *mechanism;
    Py_ssize_t size, rounds;
    int cpus[2];
    (void)module;
    if (!PyArg_ParseTuple(args, "snn(ii):floor", &mechanism, &size, &rounds, &cpus[0], &cpus[1]))
        return NULL;
    if (size < 1 || size > FLOOR_LARGEST || rounds < 1 || rounds > 10000000) {
        PyErr_SetString(PyExc_ValueError, "size must be 1 byte to 1 MiB, rounds 1 to 10,000,000");
        return NULL;
    }
    int64_t *times = PyMem_Malloc((size_t)rounds * sizeof *times);
    if (!times)
        return PyErr_NoMemory();
    int failed;
    Py_BEGIN_ALLOW_THREADS
    failed = floor_round_trips(mechanism, (size_t)size, (size_t)rounds, cpus, times);
    Py_END_ALLOW_THREADS
    PyObject *list = failed ? floor_error(mechanism, size) : PyList_New(rounds);
    for (Py_ssize_t i = 0; list && i < rounds; i++) {
        PyObject *time = PyLong_FromLongLong(times[i]);
        if (!time || PyList_SetItem(list, i, time) < 0)
            Py_CLEAR(list);
    }
    PyMem_Free(times);
    return list;
}

PyDoc_STRVAR(floor_throughput_doc, "floor_throughput(mechanism, size, count, cpus)\n--\n\n"
                                   "Nanoseconds in which `count` messages of `size` bytes went one way.");

static PyObject *core_floor_throughput(PyObject *module, PyObject *args)
{
    const char *mechanism;
    Py_ssize_t size, count;
    int cpus[2];
    (void)module;
    if (!PyArg_ParseTuple(args, "snn(ii):floor_throughput", &mechanism, &size, &count, &cpus[0], &cpus[1]))
        return NULL;
    if (size < 1 || size > FLOOR_LARGEST || count < 1) {
        PyErr_SetString(PyExc_ValueError, "size must be 1 byte to 1 MiB, count at least 1");
        return NULL;
    }
    int64_t took;
    int failed;
    Py_BEGIN_ALLOW_THREADS
    failed = floor_one_way(mechanism, (size_t)size, (size_t)count, cpus, &took);
    Py_END_ALLOW_THREADS
    return failed ? floor_error(mechanism, size) : PyLong_FromLongLong(took);
}

PyDoc_STRVAR(floor_mechanisms_doc, "floor_mechanisms()\n--\n\nWhat `floor` knows.");

static PyObject *core_floor_mechanisms(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    Py_ssize_t count = 0;
    while (floor_name(count))
        count++;
    PyObject *names = PyTuple_New(count);
    for (Py_ssize_t i = 0; names && i < count; i++) {
        PyObject *name = PyUnicode_FromString(floor_name(i));
        if (!name || PyTuple_SetItem(names, i, name) < 0)
            Py_CLEAR(names);
    }
    return names;
}

static PyMethodDef functions[] = {
    {"floor", core_floor, METH_VARARGS, floor_doc},
    {"floor_throughput", core_floor_throughput, METH_VARARGS, floor_throughput_doc},
    {"floor_mechanisms", core_floor_mechanisms, METH_NOARGS, floor_mechanisms_doc},
    {NULL},
};

static const struct {
    const char *name;
    int value;
} constants[] = {
    {"CLOSED", REASON_CLOSED},       {"ENDED", REASON_ENDED},         {"GOODBYE", REASON_GOODBYE},
    {"TIMED_OUT", REASON_TIMED_OUT}, {"UNKNOWN", REASON_UNKNOWN},     {"TOO_LARGE", REASON_TOO_LARGE},
    {"PROTOCOL", REASON_PROTOCOL},   {"SYSTEM", REASON_SYSTEM},       {"UNSUPPORTED", REASON_UNSUPPORTED},
};

static int core_exec(PyObject *module)
{
    static bool counting; /* a second interpreter shares the count */
    if (!counting) {
        if (pthread_atfork(NULL, NULL, count_fork) != 0) {
            PyErr_NoMemory();
            return -1;
        }
        counting = true;
    }
    for (size_t i = 0; i < sizeof constants / sizeof *constants; i++)
        if (PyModule_AddIntConstant(module, constants[i].name, constants[i].value) < 0)
            return -1;
    if (add_stream_type(module) < 0 || add_ring_type(module) < 0 || add_kernel_calls(module) < 0 ||
        add_broadcast_types(module) < 0)
        return -1;
    if (add_sync_types(module) < 0 || add_exporter_type(module) < 0 || add_latest_types(module) < 0)
        return -1;
    return 0;
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, core_exec},
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "ipckit._native._core",
    .m_doc = "The compiled core; its contract is in ipckit/_native/__init__.pyi.",
    .m_methods = functions,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__core(void)
{
    return PyModuleDef_Init(&definition);
}
