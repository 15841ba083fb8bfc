/* client PATH goodbye|end|kill: sends each line of its input as a message, prints each answer as a line, and ends like that.
 * Written from docs/wire/stream.md: what a C program needs to talk to ipckit. */
#include <arpa/inet.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

static void put(int fd, const void *data, size_t size)
{
    for (ssize_t sent; size; data = (const char *)data + sent, size -= (size_t)sent)
        if ((sent = send(fd, data, size, MSG_NOSIGNAL)) < 0)
            exit(1);
}

static void get(int fd, void *data, size_t size)
{
    if (size && recv(fd, data, size, MSG_WAITALL) != (ssize_t)size)
        exit(1);
}

int main(int count, char **args)
{
    static char body[1 << 16];
    struct sockaddr_un name = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (count != 3 || strlen(args[1]) >= sizeof name.sun_path)
        return 2;
    strcpy(name.sun_path, args[1]);
    if (connect(fd, (struct sockaddr *)&name, sizeof name) < 0)
        return perror(args[1]), 1;
    setvbuf(stdout, NULL, _IOLBF, 0);
    while (fgets(body, sizeof body, stdin)) {
        uint32_t length = (uint32_t)strcspn(body, "\n"), prefix = htonl(length);
        put(fd, &prefix, 4);
        put(fd, body, length);
        get(fd, &prefix, 4);
        length = ntohl(prefix);
        if (length > sizeof body)
            return puts(length == UINT32_MAX ? "goodbye" : "too large"), 0;
        get(fd, body, length);
        printf("%.*s\n", (int)length, body);
    }
    if (!strcmp(args[2], "goodbye"))
        put(fd, "\xff\xff\xff\xff", 4);
    if (!strcmp(args[2], "kill"))
        kill(getpid(), SIGKILL);
    return close(fd);
}
