/* Open-loop load over HTTP/1.1: requests at random moments (Poisson), latency from the moment each was due.
 *
 *   paced PORT MESSAGE_FILE RATE CONNECTIONS SECONDS      prints one JSON line
 *
 * MESSAGE_FILE holds one whole request, head and body. A request that is due while every connection is busy waits
 * for one, and that wait counts. The moments come from a fixed seed: every server sees the same arrivals.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <math.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#define ANSWER_BYTES 65536
#define GRACE_SECONDS 5.0 /* how long answers may come after the last request was due */

struct connection {
    int socket;
    double due;
    size_t have;
    char answer[ANSWER_BYTES + 1];
};

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static int connected(int port) {
    int fd = socket(AF_INET, SOCK_STREAM, 0), one = 1, room = 1 << 21;
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &room, sizeof room);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (connect(fd, (struct sockaddr *)&address, sizeof address)) err(1, "connect");
    return fd;
}

/* 0 while incomplete, else the status. */
static int status(struct connection *c) {
    c->answer[c->have] = 0;
    char *end = strstr(c->answer, "\r\n\r\n"), *length = end ? strcasestr(c->answer, "\r\ncontent-length:") : NULL;
    if (!end) return 0;
    if (!length || length > end) errx(1, "an answer without content-length");
    size_t size = end + 4 - c->answer + strtoul(length + 17, NULL, 10);
    if (size > ANSWER_BYTES) errx(1, "an answer of more than %d bytes", ANSWER_BYTES);
    return c->have < size ? 0 : atoi(c->answer + 9);
}

int main(int argc, char **argv) {
    if (argc != 6) errx(2, "usage: paced PORT MESSAGE_FILE RATE CONNECTIONS SECONDS");
    double rate = atof(argv[3]), seconds = atof(argv[5]);
    long width = atol(argv[4]), total = rate * seconds, sent = 0, done = 0, errors = 0;
    if (total < 1 || width < 1) errx(2, "nothing to send");
    static char message[1 << 21];
    FILE *file = fopen(argv[2], "rb");
    if (!file) err(1, "%s", argv[2]);
    size_t size = fread(message, 1, sizeof message, file);

    double *due = malloc(total * sizeof *due), *latency = malloc(total * sizeof *latency), at = 0;
    srand48(1);
    for (long i = 0; i < total; i++) due[i] = at -= log(1 - drand48()) / rate;

    struct connection *all = calloc(width, sizeof *all), **idle = malloc(width * sizeof *idle);
    int queue = epoll_create1(0), timer = timerfd_create(CLOCK_MONOTONIC, 0);
    long num_idle = width;
    for (long i = 0; i < width; i++) {
        all[i].socket = connected(atoi(argv[1]));
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = idle[i] = &all[i]};
        epoll_ctl(queue, EPOLL_CTL_ADD, all[i].socket, &event);
    }
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL};
    epoll_ctl(queue, EPOLL_CTL_ADD, timer, &event);

    double started = now() + 0.01, deadline = started + due[total - 1] + GRACE_SECONDS;
    while (done < total && now() < deadline) {
        while (sent < total && num_idle && started + due[sent] <= now()) {
            struct connection *c = idle[--num_idle];
            c->due = started + due[sent++];
            c->have = 0;
            if (send(c->socket, message, size, 0) != (ssize_t)size) err(1, "send");
        }
        double next = sent < total && num_idle ? started + due[sent] : deadline;
        struct itimerspec alarm = {.it_value = {.tv_sec = next, .tv_nsec = (next - floor(next)) * 1e9 + 1}};
        timerfd_settime(timer, TFD_TIMER_ABSTIME, &alarm, NULL);
        struct epoll_event events[64];
        int count = epoll_wait(queue, events, 64, -1);
        for (int i = 0; i < count; i++) {
            struct connection *c = events[i].data.ptr;
            if (!c) continue;
            ssize_t got = recv(c->socket, c->answer + c->have, ANSWER_BYTES - c->have, 0);
            if (got <= 0) errx(1, "the server closed a connection");
            c->have += got;
            int code = status(c);
            if (!code) continue;
            latency[done++] = now() - c->due;
            errors += code != 200;
            idle[num_idle++] = c;
        }
    }
    double took = now() - started;
    if (!done) errx(1, "no answer");
    qsort(latency, done, sizeof *latency, ascending);
    printf("{\"requests\":%ld,\"seconds\":%.6f,\"rps\":%.1f,\"p50_ms\":%.4f,\"p99_ms\":%.4f,\"errors\":%ld}\n", total, took, done / took,
           latency[done / 2] * 1e3, latency[(long)(done * 0.99)] * 1e3, errors + total - done);
    return 0;
}
