/* upstream: stands in for a vLLM server that costs nothing, so that what is measured is the proxy before it.
 *
 *   upstream --port P [--interval-us N] [--model NAME]
 *   upstream [--interval-us N] serve MODEL --host 127.0.0.1 --port P …     as the daemon starts an engine; flags of
 *                                                                          vLLM that it does not know are ignored
 *
 * A POST with "stream": true is answered with "max_tokens" server-sent events of about 230 bytes, one each interval
 * (default 20 ms, the first at once), and [DONE]; any other POST with a JSON body of about 1 kB.  Bodies of any size
 * are read and dropped.  GET: /health, /v1/models, /metrics.  HTTP/1.1 only, no chunked request bodies (411);
 * "Connection: close" is honoured.
 *
 * One thread, one epoll set.  Streams that are due stand in a heap by time; a stream keeps its schedule when it is
 * late, and leaves the heap while its client has 64 KiB unread.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { HEAD_LIMIT = 16384, FRONT = 2048, TAIL = 512, READ_SIZE = 262144, BATCH = 512, UNREAD_LIMIT = 65536 };

struct connection {
    int fd;
    size_t head_length;
    bool in_body, is_get, wants_close, stream;
    uint64_t body_left;
    size_t front_length, tail_length;   /* of the body only its first and last bytes are kept: enough to read fields */
    long tokens_left;
    uint64_t due_us;
    int heap_place;                     /* -1: not in the heap */
    char *out;
    size_t out_length, out_room;
    char head[HEAD_LIMIT], front[FRONT + 1], tail[TAIL + 1];
};

static const char event_text[] =
    "data: {\"id\":\"chatcmpl-9869581fc32531f1\",\"object\":\"chat.completion.chunk\",\"created\":1795175000,"
    "\"model\":\"bench\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\" world\"},\"logprobs\":null,"
    "\"finish_reason\":null,\"token_ids\":null}]}\n\n";
static const char last_text[] = "e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n";

static int epoll_fd, heap_count, heap_room;
static struct connection **heap;
static uint64_t interval_us = 20000;
static const char *model = "bench";
static char event_chunk[512], json_answer[2048], read_buffer[READ_SIZE];
static size_t event_chunk_length;
static long running;

static uint64_t now_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000u + (uint64_t)t.tv_nsec / 1000u;
}

static void *checked(void *memory)
{
    if (!memory) { perror("memory"); exit(1); }
    return memory;
}

/* --- the heap of streams that wait for their next event ----------------------------------------------------------- */

static void place(struct connection *c, int at) { heap[at] = c; c->heap_place = at; }

static void sift_up(int at)
{
    struct connection *c = heap[at];
    for (int parent; at > 0 && heap[parent = (at - 1) / 2]->due_us > c->due_us; at = parent) place(heap[parent], at);
    place(c, at);
}

static void sift_down(int at)
{
    struct connection *c = heap[at];
    for (int child; (child = 2 * at + 1) < heap_count; at = child) {
        if (child + 1 < heap_count && heap[child + 1]->due_us < heap[child]->due_us) child++;
        if (heap[child]->due_us >= c->due_us) break;
        place(heap[child], at);
    }
    place(c, at);
}

static void heap_add(struct connection *c)
{
    if (heap_count == heap_room) {
        heap_room = heap_room ? heap_room * 2 : 1024;
        heap = checked(realloc(heap, (size_t)heap_room * sizeof(struct connection *)));
    }
    place(c, heap_count++);
    sift_up(c->heap_place);
}

static void heap_remove(struct connection *c)
{
    int at = c->heap_place;
    if (at < 0) return;
    c->heap_place = -1;
    struct connection *last = heap[--heap_count];
    if (last == c) return;
    place(last, at);
    sift_up(at);
    sift_down(last->heap_place);
}

/* --- writing ----------------------------------------------------------------------------------------------------- */

static void flush(struct connection *c)
{
    size_t done = 0;
    while (done < c->out_length) {
        ssize_t n = send(c->fd, c->out + done, c->out_length - done, MSG_NOSIGNAL);
        if (n <= 0) break;
        done += (size_t)n;
    }
    if (done) memmove(c->out, c->out + done, c->out_length - done);
    c->out_length -= done;
}

static void put(struct connection *c, const char *text, size_t length)
{
    if (!c->out_length) {               /* nothing waits before it: straight to the socket */
        ssize_t n = send(c->fd, text, length, MSG_NOSIGNAL);
        if (n > 0) { text += n; length -= (size_t)n; }
    }
    if (!length) return;
    if (c->out_length + length > c->out_room) {
        c->out_room = (c->out_length + length) * 2;
        c->out = checked(realloc(c->out, c->out_room));
    }
    memcpy(c->out + c->out_length, text, length);
    c->out_length += length;
}

static void put_answer(struct connection *c, const char *status, const char *type, const char *body)
{
    char answer[4096];
    int n = snprintf(answer, sizeof answer, "HTTP/1.1 %s\r\nserver: null\r\ncontent-type: %s\r\ncontent-length: %zu\r\n"
                     "%s\r\n%s", status, type, strlen(body), c->wants_close ? "connection: close\r\n" : "", body);
    put(c, answer, (size_t)n);
}

/* --- answering --------------------------------------------------------------------------------------------------- */

static void drop(struct connection *c)
{
    if (c->stream) running--;
    heap_remove(c);
    close(c->fd);
    free(c->out);
    free(c);
}

/* Sends the next event of a stream.  False when the connection is gone (its stream ended and it was to be closed). */
static bool send_event(struct connection *c)
{
    if (c->tokens_left-- > 0) {
        put(c, event_chunk, event_chunk_length);
        c->due_us += interval_us;
    }
    if (c->tokens_left > 0) {
        if (c->out_length > UNREAD_LIMIT) heap_remove(c);       /* until the client reads: on_writable */
        else if (c->heap_place < 0) heap_add(c);
        else sift_down(c->heap_place);
        return true;
    }
    put(c, last_text, sizeof last_text - 1);
    heap_remove(c);
    c->stream = false;
    running--;
    if (c->wants_close && !c->out_length) { drop(c); return false; }
    return true;
}

static const char *field(const struct connection *c, const char *name)
{
    const char *found = strstr(c->front, name);
    if (!found) found = strstr(c->tail, name);
    if (!found) return NULL;
    found += strlen(name);
    return found + strspn(found, " \t:");
}

static bool begin_stream(struct connection *c)
{
    const char *tokens = field(c, "\"max_tokens\"");
    char head[256];
    if (!tokens) tokens = field(c, "\"max_completion_tokens\"");
    int n = snprintf(head, sizeof head, "HTTP/1.1 200 OK\r\nserver: null\r\n"
                     "content-type: text/event-stream; charset=utf-8\r\n%stransfer-encoding: chunked\r\n\r\n",
                     c->wants_close ? "connection: close\r\n" : "");
    put(c, head, (size_t)n);
    c->stream = true;
    running++;
    c->tokens_left = tokens ? atol(tokens) : 64;
    c->due_us = now_us();
    return send_event(c);
}

static void answer_get(struct connection *c)
{
    char body[1024];
    const char *path = c->head + 4;
    if (!strncmp(path, "/metrics", 8)) {
        snprintf(body, sizeof body, "# TYPE vllm:num_requests_running gauge\n"
                 "vllm:num_requests_running{engine=\"0\",model_name=\"%s\"} %ld\n"
                 "vllm:num_requests_waiting{engine=\"0\",model_name=\"%s\"} 0\n"
                 "vllm:kv_cache_usage_perc{engine=\"0\",model_name=\"%s\"} 0\n", model, running, model, model);
        put_answer(c, "200 OK", "text/plain; version=0.0.4", body);
    } else if (!strncmp(path, "/v1/models", 10)) {
        snprintf(body, sizeof body, "{\"object\":\"list\",\"data\":[{\"id\":\"%s\",\"object\":\"model\","
                 "\"created\":1,\"owned_by\":\"vllm\",\"root\":\"%s\",\"max_model_len\":8192}]}", model, model);
        put_answer(c, "200 OK", "application/json", body);
    } else {
        put_answer(c, "200 OK", "application/json", "{}");
    }
}

/* The request is whole.  False when the connection is gone. */
static bool answer(struct connection *c)
{
    const char *stream = c->is_get ? NULL : field(c, "\"stream\"");
    c->front_length = c->tail_length = c->head_length = 0;
    c->in_body = false;
    if (stream && !strncmp(stream, "true", 4)) return begin_stream(c);
    if (c->is_get) answer_get(c);
    else put_answer(c, "200 OK", "application/json", json_answer);
    if (!c->wants_close || c->out_length) return true;
    drop(c);
    return false;
}

/* --- reading ----------------------------------------------------------------------------------------------------- */

static const char *header_value(const struct connection *c, const char *name)
{
    size_t length = strlen(name);
    for (const char *line = strstr(c->head, "\r\n"); line; line = strstr(line + 2, "\r\n")) {
        if (strncasecmp(line + 2, name, length) || line[2 + length] != ':') continue;
        return line + 3 + length + strspn(line + 3 + length, " \t");
    }
    return NULL;
}

/* Keeps the first FRONT and the last TAIL bytes of the body. */
static void keep(struct connection *c, const char *p, size_t n)
{
    size_t front = FRONT - c->front_length < n ? FRONT - c->front_length : n;
    memcpy(c->front + c->front_length, p, front);
    c->front_length += front;
    c->front[c->front_length] = 0;
    p += front;
    n -= front;
    if (n > TAIL) { p += n - TAIL; n = TAIL; }
    size_t old = c->tail_length + n > TAIL ? TAIL - n : c->tail_length;
    memmove(c->tail, c->tail + c->tail_length - old, old);
    memcpy(c->tail + old, p, n);
    c->tail_length = old + n;
    c->tail[c->tail_length] = 0;
}

/* Takes bytes into the head; sets *used.  False when this is no request that we answer; then c is gone. */
static bool feed_head(struct connection *c, const char *p, size_t n, size_t *used)
{
    size_t before = c->head_length, room = HEAD_LIMIT - 1 - before, take = n < room ? n : room;
    memcpy(c->head + before, p, take);
    c->head[before + take] = 0;
    size_t from = before < 3 ? 0 : before - 3;
    char *end = memmem(c->head + from, before + take - from, "\r\n\r\n", 4);
    c->head_length = end ? (size_t)(end - c->head) + 4 : before + take;
    *used = c->head_length - before;
    if (!end) {
        if (take == n) return true;
        drop(c);
        return false;
    }
    c->head[c->head_length] = 0;
    const char *length = header_value(c, "content-length"), *persistence = header_value(c, "connection");
    c->is_get = !strncmp(c->head, "GET ", 4);
    c->wants_close = persistence && !strncasecmp(persistence, "close", 5);
    c->body_left = length ? strtoull(length, NULL, 10) : 0;
    c->in_body = true;
    c->front[0] = c->tail[0] = 0;
    if (header_value(c, "transfer-encoding")) {
        put_answer(c, "411 Length Required", "application/json", "{}");
        drop(c);
        return false;
    }
    const char *expects = header_value(c, "expect");
    if (expects && !strncasecmp(expects, "100-", 4)) put(c, "HTTP/1.1 100 Continue\r\n\r\n", 25);
    return true;
}

/* False when the connection is gone. */
static bool on_bytes(struct connection *c, const char *p, size_t n)
{
    while (n || (c->in_body && !c->body_left)) {
        if (c->stream) return true;     /* pipelining is not supported: what follows a stream's request is dropped */
        size_t used = 0;
        if (!c->in_body) {
            if (!feed_head(c, p, n, &used)) return false;
        } else {
            used = c->body_left < n ? (size_t)c->body_left : n;
            keep(c, p, used);
            c->body_left -= used;
        }
        p += used;
        n -= used;
        if (c->in_body && !c->body_left && !answer(c)) return false;
    }
    return true;
}

static void on_readable(struct connection *c, bool ended)
{
    for (;;) {
        ssize_t n = recv(c->fd, read_buffer, sizeof read_buffer, 0);
        if (n < 0 && errno == EAGAIN) return;
        if (n <= 0) { drop(c); return; }
        if (!on_bytes(c, read_buffer, (size_t)n)) return;
        if ((size_t)n < sizeof read_buffer && !ended) return;
    }
}

/* False when the connection is gone. */
static bool on_writable(struct connection *c)
{
    if (!c->out_length) return true;
    flush(c);
    if (c->stream && c->heap_place < 0 && c->out_length <= UNREAD_LIMIT) {
        c->due_us = now_us();
        heap_add(c);
    }
    if (!c->stream && c->wants_close && !c->out_length) { drop(c); return false; }
    return true;
}

static void accept_all(int listener)
{
    int one = 1;
    for (int fd; (fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0;) {
        struct connection *c = checked(calloc(1, sizeof *c));
        struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, .data.ptr = c};
        c->fd = fd;
        c->heap_place = -1;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event);
    }
}

static void serve(int listener)
{
    struct epoll_event events[BATCH];
    for (;;) {
        uint64_t now = now_us();
        int timeout_ms = !heap_count ? -1 : heap[0]->due_us <= now ? 0 : (int)((heap[0]->due_us - now + 999) / 1000);
        int n = epoll_wait(epoll_fd, events, BATCH, timeout_ms);
        for (int i = 0; i < n; i++) {
            struct connection *c = events[i].data.ptr;
            uint32_t what = events[i].events;
            if (!c) { accept_all(listener); continue; }
            if ((what & EPOLLOUT) && !on_writable(c)) continue;
            if (what & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR))
                on_readable(c, what & (EPOLLRDHUP | EPOLLHUP | EPOLLERR));
        }
        now = now_us();
        for (int budget = 256; budget && heap_count && heap[0]->due_us <= now; budget--) send_event(heap[0]);
    }
}

/* --- start ------------------------------------------------------------------------------------------------------- */

static int listen_on(int port)
{
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), one = 1;
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port),
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL};
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, 4096)) { perror("upstream: bind"); exit(1); }
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event);
    return fd;
}

static void raise_file_limit(void)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit)) return;
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
}

static void prepare_answers(void)
{
    char text[801];
    memset(text, 'a', 800);
    text[800] = 0;
    event_chunk_length = (size_t)snprintf(event_chunk, sizeof event_chunk, "%zx\r\n%s\r\n", sizeof event_text - 1,
                                          event_text);
    snprintf(json_answer, sizeof json_answer, "{\"id\":\"chatcmpl-be5171f572f5eb39\",\"object\":\"chat.completion\","
             "\"created\":1795175000,\"model\":\"%.100s\",\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\","
             "\"content\":\"%s\"},\"finish_reason\":\"stop\"}],\"usage\":{\"prompt_tokens\":17,\"total_tokens\":67,"
             "\"completion_tokens\":50}}", model, text);
}

int main(int count, char **words)
{
    int port = 0;
    for (int i = 1; i < count; i++) {
        const char *next = i + 1 < count ? words[i + 1] : "";
        if (!strcmp(words[i], "serve")) { model = next; i++; }
        else if (!strcmp(words[i], "--port")) { port = atoi(next); i++; }
        else if (!strcmp(words[i], "--interval-us")) { interval_us = strtoull(next, NULL, 10); i++; }
        else if (!strcmp(words[i], "--model") || !strcmp(words[i], "--served-model-name")) { model = next; i++; }
    }
    if (!port || !*model) { fprintf(stderr, "upstream: [serve MODEL] --port P [--interval-us N]\n"); return 2; }
    if (!interval_us) interval_us = 1;
    raise_file_limit();
    prepare_answers();
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    int listener = listen_on(port);
    printf("INFO: Application startup complete.\n");
    fflush(stdout);
    serve(listener);
}
