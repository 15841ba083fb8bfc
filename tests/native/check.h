/* check.h — the least that a C test needs: CHECK, and a deadline for the whole program. */
#ifndef IPCKIT_CHECK_H
#define IPCKIT_CHECK_H

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECK(condition)                                                                                        \
    do {                                                                                                        \
        if (!(condition)) {                                                                                     \
            fprintf(stderr, "%s:%d: %s: not so: %s (errno %s)\n", __FILE__, __LINE__, __func__, #condition,      \
                    strerror(errno));                                                                           \
            abort();                                                                                            \
        }                                                                                                       \
    } while (0)

#define RUN(test)                        \
    do {                                 \
        test();                          \
        fprintf(stderr, "ok " #test "\n"); \
    } while (0)

#endif
