/* py_kernel.c — system calls that Python lacks: message queues that are read into memory of ours, and the watch over a directory.
 *
 * mq_receive takes a message out of the kernel in the same instant in which it is stored in `buffer`: if that is a mapped file, a
 * process that is killed right then has it in the file. So the pages are touched before: a fault during the copy could be
 * interrupted by the kill, and the message would be in neither place.
 */
#include "module.h"

#ifdef __linux__
#include <errno.h>
#include <mqueue.h>
#include <sys/inotify.h>
#include <unistd.h>

PyDoc_STRVAR(mq_send_doc, "mq_send(mqd, frame, priority)\n--\n\nFalse when the queue is full. It must not block.");

static PyObject *core_mq_send(PyObject *module, PyObject *args)
{
    int mqd;
    unsigned priority;
    Py_buffer frame;
    (void)module;
    if (!PyArg_ParseTuple(args, "iy*I:mq_send", &mqd, &frame, &priority))
        return NULL;
    int failed = mq_send(mqd, frame.buf, (size_t)frame.len, priority);
    int why = errno;
    PyBuffer_Release(&frame);
    if (failed && why != EAGAIN) {
        errno = why;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    return PyBool_FromLong(!failed);
}

PyDoc_STRVAR(mq_receive_doc, "mq_receive(mqd, buffer)\n--\n\n"
                             "Bytes of the message that is in `buffer` now, or -1 when the queue is empty. It must not block.");

static PyObject *core_mq_receive(PyObject *module, PyObject *args)
{
    int mqd;
    Py_buffer buffer;
    (void)module;
    if (!PyArg_ParseTuple(args, "iw*:mq_receive", &mqd, &buffer))
        return NULL;
    volatile char *bytes = buffer.buf;
    for (Py_ssize_t at = 0; at < buffer.len; at += 4096)
        bytes[at] = 0;
    if (buffer.len)
        bytes[buffer.len - 1] = 0;
    ssize_t size = mq_receive(mqd, buffer.buf, (size_t)buffer.len, NULL);
    int why = errno;
    PyBuffer_Release(&buffer);
    if (size < 0 && why != EAGAIN) {
        errno = why;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    return PyLong_FromSsize_t(size);
}

PyDoc_STRVAR(watch_directory_doc,
             "watch_directory(path)\n--\n\n"
             "A descriptor that tells (inotify) which files there were closed after writing, or got their name.");

static PyObject *core_watch_directory(PyObject *module, PyObject *args)
{
    PyObject *path;
    (void)module;
    if (!PyArg_ParseTuple(args, "O&:watch_directory", PyUnicode_FSConverter, &path))
        return NULL;
    int fd = inotify_init1(IN_NONBLOCK | IN_CLOEXEC);
    char *name = PyBytes_AsString(path);
    if (fd < 0 || !name || inotify_add_watch(fd, name, IN_CLOSE_WRITE | IN_MOVED_TO | IN_ONLYDIR) < 0) {
        if (!PyErr_Occurred())
            PyErr_SetFromErrno(PyExc_OSError);
        if (fd >= 0)
            close(fd);
        Py_DECREF(path);
        return NULL;
    }
    Py_DECREF(path);
    return PyLong_FromLong(fd);
}

static PyMethodDef functions[] = {
    {"mq_send", core_mq_send, METH_VARARGS, mq_send_doc},
    {"mq_receive", core_mq_receive, METH_VARARGS, mq_receive_doc},
    {"watch_directory", core_watch_directory, METH_VARARGS, watch_directory_doc},
    {NULL},
};

int add_kernel_calls(PyObject *module)
{
    return PyModule_AddFunctions(module, functions);
}
#else
int add_kernel_calls(PyObject *module)
{
    (void)module;
    return 0;
}
#endif
