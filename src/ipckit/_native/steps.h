/* steps.h — the numbered steps of locks, crowds and Latest, for the tests that kill a process at each of them. Nothing in the product. */
#ifndef IPCKIT_STEPS_H
#define IPCKIT_STEPS_H

#ifdef IPCKIT_STEPS
extern void (*step_hook)(int number);
#define STEP(number)           \
    do {                       \
        if (step_hook)         \
            step_hook(number); \
    } while (0)
#else
#define STEP(number) ((void)0)
#endif

#endif
