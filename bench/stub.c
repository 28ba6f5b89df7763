// A chat completions server that is never the bottleneck: every answer is the same but for its id, given at
// once or after a fixed latency. What is measured is who asks.
//
//   cc -O2 -o stub bench/stub.c && ./stub [--port 0] [--latency-ms 0] [--chunks 50] [--chunk-ms 0]
//
// One thread, epoll, Linux. It prints its port and serves on 127.0.0.1 until its standard input ends.
//   POST /...        an answer; of pipelined requests one is served at a time, in order. With "stream":true in
//                    its body: server-sent events, so many chunks, each sent by itself, so far apart
//   GET /stats       counts as JSON        GET /health, GET /v1/models        as an engine answers them
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/queue.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { EVENTS = 1024, FIRST_INPUT = 4 << 10, MAX_REQUEST = 16 << 20 };  // bytes, but for EVENTS

struct connection {
    int fd;
    char *input;  // what has been received and not yet been served
    size_t filled, room;
    char *rest;  // of an answer that the socket did not take whole
    size_t rest_length, rest_sent;
    bool waiting, last;  // its answer is due later; it closes after the answer
    uint64_t due;        // nanoseconds
    unsigned chunks_left;  // of the stream it is sent; it is in the queue of streams
    TAILQ_ENTRY(connection) queue;
};

// The latency is fixed: first in, first out.
static TAILQ_HEAD(, connection) waiting = TAILQ_HEAD_INITIALIZER(waiting);
static TAILQ_HEAD(stream_queue, connection) streams = TAILQ_HEAD_INITIALIZER(streams);
static struct {
    uint64_t requests, answered, chunks, in_flight, peak_in_flight, open, peak_open;
} counts;
static int epoll;
static uint64_t latency, chunk_interval;  // nanoseconds
static unsigned chunks = 50;
static const char stream_head[] =
    "HTTP/1.1 200 OK\r\ndate: Thu, 01 Jan 2026 00:00:00 GMT\r\nserver: stub\r\n"
    "content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n";
static char chunk[1100], last_chunk[64];
static char answer[2048], *answer_id;
static size_t answer_length;

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static uint64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static void prepare_answer(void) {
    char text[512] = "", body[1024];
    for (int i = 0; i < 10; i++) strcat(text, "Seven times eight is fifty-six. ");
    int length = snprintf(body, sizeof body,
        "{\"id\":\"chatcmpl-0000000000000000\",\"object\":\"chat.completion\",\"created\":1700000000,"
        "\"model\":\"stub\",\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":\"%s\","
        "\"reasoning\":null,\"tool_calls\":[]},\"logprobs\":null,\"finish_reason\":\"stop\",\"stop_reason\":null}],"
        "\"usage\":{\"prompt_tokens\":210,\"completion_tokens\":80,\"total_tokens\":290}}", text);
    answer_length = (size_t)snprintf(answer, sizeof answer,
        "HTTP/1.1 200 OK\r\ndate: Thu, 01 Jan 2026 00:00:00 GMT\r\nserver: stub\r\ncontent-length: %d\r\n"
        "content-type: application/json\r\n\r\n%s", length, body);
    answer_id = strstr(answer, "chatcmpl-") + strlen("chatcmpl-");
    length = snprintf(body, sizeof body,
        "data: {\"id\":\"chatcmpl-0000000000000000\",\"object\":\"chat.completion.chunk\",\"created\":1700000000,"
        "\"model\":\"stub\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\" fifty-six\"},\"logprobs\":null,"
        "\"finish_reason\":null}]}\n\n");
    snprintf(chunk, sizeof chunk, "%x\r\n%s\r\n", (unsigned)length, body);
    snprintf(last_chunk, sizeof last_chunk, "e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n");
}

// The functions below that return a bool return false once the connection is closed and freed.

static bool hang_up(struct connection *c) {
    if (c->waiting) {
        TAILQ_REMOVE(&waiting, c, queue);
        counts.in_flight--;
    }
    if (c->chunks_left) {
        TAILQ_REMOVE(&streams, c, queue);
        counts.in_flight--;
    }
    counts.open--;
    close(c->fd);
    free(c->input);
    free(c->rest);
    free(c);
    return false;
}

static void watch(struct connection *c, uint32_t events) {
    struct epoll_event event = {.events = events, .data.ptr = c};
    if (epoll_ctl(epoll, EPOLL_CTL_MOD, c->fd, &event)) fail("epoll_ctl");
}

static bool reply(struct connection *c, const char *data, size_t length) {
    ssize_t sent = send(c->fd, data, length, MSG_NOSIGNAL);
    if (sent < 0 && errno != EAGAIN) return hang_up(c);
    if (sent < 0) sent = 0;
    if ((size_t)sent == length) return c->last ? hang_up(c) : true;
    c->rest_sent = 0;
    c->rest_length = length - (size_t)sent;
    if (!(c->rest = malloc(c->rest_length))) fail("malloc");
    memcpy(c->rest, data + sent, c->rest_length);
    watch(c, EPOLLOUT);  // and read no more requests until it is sent
    return true;
}

static bool complete(struct connection *c) {
    counts.answered++;
    uint64_t id = counts.answered;
    for (int digit = 15; digit >= 0; digit--, id /= 10) answer_id[digit] = (char)('0' + id % 10);
    return reply(c, answer, answer_length);
}

static bool get(struct connection *c, const char *path) {
    char body[512] = "", message[1024];
    int status = 200;
    if (!strncmp(path, "/stats ", 7)) {
        struct rusage used;
        getrusage(RUSAGE_SELF, &used);
        snprintf(body, sizeof body,
            "{\"requests\":%ju,\"answered\":%ju,\"in_flight\":%ju,\"peak_in_flight\":%ju,\"open\":%ju,"
            "\"peak_open\":%ju,\"chunks\":%ju,\"cpu_us\":%ju}", (uintmax_t)counts.requests, (uintmax_t)counts.answered,
            (uintmax_t)counts.in_flight, (uintmax_t)counts.peak_in_flight, (uintmax_t)counts.open,
            (uintmax_t)counts.peak_open, (uintmax_t)counts.chunks, (uintmax_t)(used.ru_utime.tv_sec + used.ru_stime.tv_sec) * 1000000u
                + (uintmax_t)(used.ru_utime.tv_usec + used.ru_stime.tv_usec));
    } else if (!strncmp(path, "/v1/models ", 11)) {
        strcpy(body, "{\"object\":\"list\",\"data\":[{\"id\":\"stub\",\"object\":\"model\"}]}");
    } else if (strncmp(path, "/health ", 8)) {
        status = 404;
    }
    int length = snprintf(message, sizeof message,
        "HTTP/1.1 %s\r\ncontent-length: %zu\r\ncontent-type: application/json\r\n\r\n%s",
        status == 200 ? "200 OK" : "404 Not Found", strlen(body), body);
    return reply(c, message, (size_t)length);
}

// The value of a header in a head that ends at `end`, or NULL. `name` is in lower case, with its colon.
static const char *header(const char *head, const char *end, const char *name) {
    size_t length = strlen(name);
    for (const char *line = head; (line = memchr(line, '\n', (size_t)(end - line)));) {
        line++;
        if ((size_t)(end - line) > length && !strncasecmp(line, name, length))
            return line + length + strspn(line + length, " \t");
    }
    return NULL;
}

// Serves what has been received, up to a request that is not complete or one whose answer is due later.
static bool serve(struct connection *c) {
    size_t used = 0;
    while (!c->waiting && !c->chunks_left && !c->rest && used < c->filled) {
        char *head = c->input + used, *blank = memmem(head, c->filled - used, "\r\n\r\n", 4);
        if (!blank) break;
        char *end = blank + 4;
        const char *value = header(head, end, "content-length:");
        unsigned long long body = value ? strtoull(value, NULL, 10) : 0;
        if (body > MAX_REQUEST || header(head, end, "transfer-encoding:")) return hang_up(c);
        if ((size_t)(c->input + c->filled - end) < body) break;
        used = (size_t)(end - c->input) + body;
        value = header(head, end, "connection:");
        c->last = value && !strncasecmp(value, "close", 5);
        if (!strncmp(head, "GET ", 4)) {
            if (!get(c, head + 4)) return false;
            continue;
        }
        if (strncmp(head, "POST ", 5)) return hang_up(c);
        counts.requests++;
        uint64_t in_flight = counts.in_flight + 1;
        if (in_flight > counts.peak_in_flight) counts.peak_in_flight = in_flight;
        if (body && memmem(end, body, "\"stream\":true", 13)) {
            counts.in_flight++;
            c->chunks_left = chunks + 1;
            c->due = now() + latency;
            TAILQ_INSERT_TAIL(&streams, c, queue);
            if (!reply(c, stream_head, sizeof stream_head - 1)) return false;
        } else if (latency) {
            counts.in_flight++;
            c->waiting = true;
            c->due = now() + latency;
            TAILQ_INSERT_TAIL(&waiting, c, queue);
        } else if (!complete(c)) {
            return false;
        }
    }
    c->filled -= used;
    memmove(c->input, c->input + used, c->filled);
    return c->filled < MAX_REQUEST ? true : hang_up(c);
}

static bool receive(struct connection *c) {
    if (c->filled == c->room && !(c->input = realloc(c->input, c->room *= 2))) fail("realloc");
    ssize_t got = recv(c->fd, c->input + c->filled, c->room - c->filled, 0);
    if (got < 0 && (errno == EAGAIN || errno == EINTR)) return true;
    if (got <= 0) return hang_up(c);
    c->filled += (size_t)got;
    return serve(c);
}

static bool send_rest(struct connection *c) {
    ssize_t sent = send(c->fd, c->rest + c->rest_sent, c->rest_length - c->rest_sent, MSG_NOSIGNAL);
    if (sent < 0 && errno != EAGAIN) return hang_up(c);
    if (sent > 0) c->rest_sent += (size_t)sent;
    if (c->rest_sent < c->rest_length) return true;
    free(c->rest);
    c->rest = NULL;
    if (c->last) return hang_up(c);
    watch(c, EPOLLIN);
    return serve(c);
}

static void welcome(int listener) {
    int fd, one = 1;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
        struct connection *c = calloc(1, sizeof *c);
        if (!c || !(c->input = malloc(c->room = FIRST_INPUT))) fail("malloc");
        c->fd = fd;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
        if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event)) fail("epoll_ctl");
        if (++counts.open > counts.peak_open) counts.peak_open = counts.open;
    }
    if (errno != EAGAIN && errno != ECONNABORTED && errno != EINTR) fail("accept");
}

static void answer_due(void) {
    struct connection *c;
    for (uint64_t moment = now(); (c = TAILQ_FIRST(&waiting)) && c->due <= moment;) {
        TAILQ_REMOVE(&waiting, c, queue);
        c->waiting = false;
        counts.in_flight--;
        if (complete(c)) serve(c);
    }
}

// One chunk of each stream whose next one is due, the one that waited longest first.
static void stream_due(void) {
    struct connection *c, *last = TAILQ_LAST(&streams, stream_queue);
    uint64_t moment = now();
    for (bool more = last; more && (c = TAILQ_FIRST(&streams)) && c->due <= moment;) {
        more = c != last;
        TAILQ_REMOVE(&streams, c, queue);
        if (c->rest) {  // its socket is full
            TAILQ_INSERT_TAIL(&streams, c, queue);
        } else if (--c->chunks_left) {
            counts.chunks++;
            c->due += chunk_interval;
            TAILQ_INSERT_TAIL(&streams, c, queue);
            reply(c, chunk, strlen(chunk));
        } else {
            counts.in_flight--;
            counts.answered++;
            if (reply(c, last_chunk, strlen(last_chunk))) serve(c);
        }
    }
}

// Milliseconds, rounded up; -1 while nothing is waiting.
static int until_due(void) {
    uint64_t first = UINT64_MAX;
    if (!TAILQ_EMPTY(&waiting)) first = TAILQ_FIRST(&waiting)->due;
    if (!TAILQ_EMPTY(&streams) && TAILQ_FIRST(&streams)->due < first) first = TAILQ_FIRST(&streams)->due;
    if (first == UINT64_MAX) return -1;
    int64_t left = (int64_t)(first - now());
    return left > 0 ? (int)((left + 999999) / 1000000) : 0;
}

static int listen_on(int port) {
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), one = 1;
    struct sockaddr_in address = {
        .sin_family = AF_INET, .sin_port = htons((uint16_t)port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof address;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(listener, (struct sockaddr *)&address, length) || listen(listener, 65535)) fail("listen");
    getsockname(listener, (struct sockaddr *)&address, &length);
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
    return listener;
}

int main(int count, char **arguments) {
    int port = 0;
    for (int i = 1; i < count; i += 2) {
        const char *value = i + 1 < count ? arguments[i + 1] : NULL;
        if (value && !strcmp(arguments[i], "--port")) port = atoi(value);
        else if (value && !strcmp(arguments[i], "--latency-ms")) latency = (uint64_t)(atof(value) * 1e6);
        else if (value && !strcmp(arguments[i], "--chunks")) chunks = (unsigned)atoi(value);
        else if (value && !strcmp(arguments[i], "--chunk-ms")) chunk_interval = (uint64_t)(atof(value) * 1e6);
        else return fprintf(stderr, "usage: stub [--port N] [--latency-ms N] [--chunks N] [--chunk-ms N]\n"), 2;
    }
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    prepare_answer();
    epoll = epoll_create1(EPOLL_CLOEXEC);
    int listener = listen_on(port);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = &listener}, events[EVENTS];
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, listener, &event)) fail("epoll_ctl");
    event.data.ptr = NULL;  // standard input; a plain file cannot be watched
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, STDIN_FILENO, &event) && errno != EPERM) fail("epoll_ctl");
    for (;;) {
        int ready = epoll_wait(epoll, events, EVENTS, until_due());
        for (int i = 0; i < ready; i++) {
            struct connection *c = events[i].data.ptr;
            char ignored[256];
            if (c == NULL && read(STDIN_FILENO, ignored, sizeof ignored) <= 0) return 0;
            if (c == NULL) continue;
            if ((void *)c == (void *)&listener) welcome(listener);
            else if (!(events[i].events & EPOLLOUT) || send_rest(c))
                if (events[i].events & ~(uint32_t)EPOLLOUT) receive(c);
        }
        answer_due();
        stream_due();
    }
}
