/* envelope PATH seed|v1|v2: adds two numbers, reads a stream, and in the versioned dialects asks for a heartbeat and fires a note, on a
 * server of ipckit. Written from docs/wire/envelope.md: what a C program needs to call one, with the C library and nothing else. */
#include <arpa/inet.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

enum { REQUEST = 1, RESPONSE = 2, HEARTBEAT = 4, STREAM = 9, JSON = 1, LARGEST = 1 << 16 };

static int fd, version; /* version 0: the seed, no header */
static char body[LARGEST + 1];

static void put(const void *data, size_t size)
{
    for (ssize_t sent; size; data = (const char *)data + sent, size -= (size_t)sent)
        if ((sent = send(fd, data, size, MSG_NOSIGNAL)) < 0)
            exit(1);
}

static void get(void *data, size_t size)
{
    if (size && recv(fd, data, size, MSG_WAITALL) != (ssize_t)size)
        exit(1);
}

/* The length counts the payload only. A version 1 header has no format. */
static void say(int type, const char *payload)
{
    unsigned char header[3] = {(unsigned char)version, (unsigned char)type, JSON};
    uint32_t length = htonl((uint32_t)strlen(payload));
    put(&length, 4);
    put(header, version == 0 ? 0 : version == 1 ? 2 : 3);
    put(payload, strlen(payload));
}

/* The payload is in `body`. The server writes version 2 to versions 1 and 2. */
static void hear(int type)
{
    unsigned char header[3] = {2, (unsigned char)type, JSON};
    uint32_t length;
    get(&length, 4);
    get(header, version ? 3 : 0);
    length = ntohl(length);
    if (length > LARGEST || header[0] != 2 || header[1] != type || header[2] != JSON)
        exit(3);
    get(body, length);
    body[length] = 0;
}

static void ask(const char *type, const char *payload, const char *how)
{
    static char text[LARGEST];
    snprintf(text, sizeof text, "{\"target\":\"calculator\",\"message_type\":\"%s\",\"payload\":%s,\"%s\":\"c-1\",%s}", type, payload,
             version ? "correlation_id" : "request_id", how);
    say(REQUEST, text);
}

static long number(const char *name)
{
    const char *at = strstr(body, name);
    return at ? strtol(at + strlen(name), NULL, 10) : -1;
}

int main(int count, char **args)
{
    struct sockaddr_un name = {.sun_family = AF_UNIX};
    if (count != 3 || strlen(args[1]) >= sizeof name.sun_path)
        return 2;
    version = args[2][0] == 'v' ? args[2][1] - '0' : 0;
    strcpy(name.sun_path, args[1]);
    fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (connect(fd, (struct sockaddr *)&name, sizeof name) < 0)
        return perror(args[1]), 1;

    ask("AddRequest", "{\"a\":5,\"b\":3}", "\"expects_reply\":true");
    hear(RESPONSE);
    printf("sum %ld\n", number("\"sum\":"));

    ask("ListRequest", "{\"count\":5}", "\"expects_stream\":true");
    long frames = 0, sum = 0;
    do {
        hear(STREAM);
        if (number("\"sequence\":") != frames++)
            return 3;
        if (number("\"payload\":") > 0)
            sum += number("\"payload\":");
    } while (!strstr(body, "\"is_final\":true"));
    printf("frames %ld sum %ld\n", frames, sum);

    if (version) {
        say(HEARTBEAT, "");
        hear(HEARTBEAT);
        ask("Note", "{\"text\":\"from C\"}", "\"expects_reply\":false");
        hear(RESPONSE);
        puts(strstr(body, "delivered") ? "delivered" : body);
    }
    return close(fd);
}
