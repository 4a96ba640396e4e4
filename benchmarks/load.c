/* load: drives HTTP/1.1 at one address and prints what came back as one JSON object.
 *
 * One thread, one epoll set, no allocation per request, so that the program under test is what is measured and not
 * this one.  Three ways to load:
 *
 *   closed loop (default)   --connections N: each sends its next request when the last one is answered, for --seconds.
 *   --arrivals-per-s R      requests arrive at R a second whatever the server does; a request takes an idle
 *                           connection or opens one.  The arrivals are jittered (same seed each run): evenly spaced
 *                           they would keep step with the upstream's token interval.
 *   --idle                  opens N connections, one GET on each, holds them for --seconds, counts those that the
 *                           server closed meanwhile, then sends another GET on --sample of them.
 *
 * A response must end as HTTP says it does (length, last chunk, or close); one that stops earlier is an error "cut".
 * Times are microseconds inside and milliseconds in the output.  "First byte" is the first byte of the body, "gap" is
 * the time between two reads of one streaming body.  What happens before --warmup-s is left out of everything but
 * total_requests and total_events.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <getopt.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { HEAD_LIMIT = 16384, READ_SIZE = 262144, BATCH = 512, RETRY_US = 50000 };

enum framing { UNTIL_CLOSE, LENGTH, CHUNKED };
enum chunk_state { CHUNK_SIZE, CHUNK_EXTENSION, CHUNK_DATA, CHUNK_END, TRAILER };
enum failure { REFUSED, CUT, BAD_STATUS, BAD_FRAMING, UNFINISHED, FAILURES };
static const char *const failure_names[FAILURES] = {"refused", "cut", "status", "framing", "unfinished"};

struct connection {
    int fd;                 /* -1 while there is none */
    bool busy;              /* a request is under way */
    bool reused;            /* this socket has answered before, so it may have gone stale */
    uint64_t started_us, first_us, last_us, retry_us;
    size_t sent;            /* bytes of the request that are out */
    size_t head_length;
    bool head_done, close_after, event_open;
    int status;
    enum framing framing;
    enum chunk_state chunk;
    uint64_t left;          /* bytes to come of the body (LENGTH) or the chunk (CHUNKED) */
    size_t line_length;     /* of the line of the event stream, or of the trailer, that is being read */
    char last_byte;
    struct connection *next_idle;
    char head[HEAD_LIMIT];
};

struct samples { uint32_t *us; size_t count, room; };

static struct {
    const char *host, *model, *path, *header;
    int port, connections, tokens, sample;
    double seconds, warmup_s, ramp_s, arrivals_per_s;
    long body_bytes, max_errors;
    bool stream, idle;
} set = {.host = "127.0.0.1", .model = "bench", .path = "/v1/chat/completions", .header = "", .connections = 1,
         .tokens = 64, .sample = 100, .seconds = 5, .warmup_s = -1, .body_bytes = 1024};

static struct {
    uint64_t requests, events, received, sent;                   /* since measuring began */
    uint64_t total_requests, total_events, stale, idle_closed;   /* since the start */
    uint64_t failures[FAILURES], total_failures;
    struct samples first, whole, gap;
} seen;

static struct sockaddr_in address;
static int epoll_fd;
static char *request, read_buffer[READ_SIZE];
static size_t request_length;
static struct connection *connections, *idle_list;
static int missing;                /* connections that failed and are to be opened again */
static int open_requests;
static bool measuring, stopping;

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

static void add_sample(struct samples *s, uint64_t us)
{
    if (!measuring) return;
    if (s->count == s->room) {
        s->room = s->room ? s->room * 2 : 65536;
        s->us = checked(realloc(s->us, s->room * sizeof *s->us));
    }
    s->us[s->count++] = us > UINT32_MAX ? UINT32_MAX : (uint32_t)us;
}

/* --- reading a response ------------------------------------------------------------------------------------------ */

/* Takes one line's bytes up to and including '\n', or all there are.  True when the line is complete and blank. */
static bool blank_line(struct connection *c, const char **p, const char *end, bool *line_done)
{
    const char *newline = memchr(*p, '\n', (size_t)(end - *p));
    const char *stop = newline ? newline : end;
    if (stop > *p) { c->line_length += (size_t)(stop - *p); c->last_byte = stop[-1]; }
    bool blank = c->line_length == 0 || (c->line_length == 1 && c->last_byte == '\r');
    *line_done = newline != NULL;
    *p = newline ? newline + 1 : end;
    if (newline) c->line_length = 0;
    return newline && blank;
}

/* An event of a stream is one or more lines followed by a blank one, wherever the reads were cut. */
static void count_events(struct connection *c, const char *p, size_t n)
{
    const char *end = p + n;
    if (!set.stream) return;
    while (p < end) {
        bool line_done;
        if (blank_line(c, &p, end, &line_done)) {
            if (!c->event_open) continue;
            c->event_open = false;
            seen.total_events++;
            if (measuring) seen.events++;
        } else if (line_done) {
            c->event_open = true;
        }
    }
}

static int hex_digit(char b)
{
    if (b >= '0' && b <= '9') return b - '0';
    b |= 0x20;
    return b >= 'a' && b <= 'f' ? b - 'a' + 10 : -1;
}

/* 1: the body is complete; 0: more is to come; -1: these bytes cannot be. */
static int feed_chunks(struct connection *c, const char *p, size_t n)
{
    const char *end = p + n;
    while (p < end) {
        switch (c->chunk) {
        case CHUNK_SIZE: {
            int digit = hex_digit(*p);
            if (digit >= 0) { c->left = c->left * 16 + (uint64_t)digit; p++; }
            else if (*p == '\r' || *p == ';' || *p == '\n' || *p == ' ') c->chunk = CHUNK_EXTENSION;
            else return -1;
            break;
        }
        case CHUNK_EXTENSION:
            if (*p++ == '\n') c->chunk = c->left ? CHUNK_DATA : TRAILER;
            if (c->chunk == TRAILER) c->line_length = 0;
            break;
        case CHUNK_DATA: {
            size_t take = c->left < (uint64_t)(end - p) ? (size_t)c->left : (size_t)(end - p);
            count_events(c, p, take);
            p += take;
            c->left -= take;
            if (!c->left) c->chunk = CHUNK_END;
            break;
        }
        case CHUNK_END:
            if (*p == '\n') c->chunk = CHUNK_SIZE;
            else if (*p != '\r') return -1;
            p++;
            break;
        case TRAILER: {
            bool line_done;
            if (blank_line(c, &p, end, &line_done)) return p == end ? 1 : -1;
            break;
        }
        }
    }
    return 0;
}

static int feed_body(struct connection *c, const char *p, size_t n)
{
    if (c->framing == CHUNKED) return feed_chunks(c, p, n);
    if (c->framing == LENGTH && n > c->left) return -1;
    count_events(c, p, n);
    if (c->framing == UNTIL_CLOSE) return 0;
    c->left -= n;
    return c->left == 0;
}

/* The value of a header in c->head (lines end with \r\n, the head with an empty one), or NULL. */
static const char *header_value(const struct connection *c, const char *name)
{
    size_t length = strlen(name);
    for (const char *line = strstr(c->head, "\r\n"); line; line = strstr(line + 2, "\r\n")) {
        if (strncasecmp(line + 2, name, length) || line[2 + length] != ':') continue;
        const char *value = line + 3 + length;
        return value + strspn(value, " \t");
    }
    return NULL;
}

/* Collects the head; sets *used to what it took of the data.  -1: not HTTP, or too long. */
static int feed_head(struct connection *c, const char *p, size_t n, size_t *used)
{
    size_t before = c->head_length, room = HEAD_LIMIT - 1 - before, take = n < room ? n : room;
    memcpy(c->head + before, p, take);
    c->head[before + take] = 0;
    size_t from = before < 3 ? 0 : before - 3;
    char *end = memmem(c->head + from, before + take - from, "\r\n\r\n", 4);
    c->head_length = end ? (size_t)(end - c->head) + 4 : before + take;
    *used = c->head_length - before;
    if (!end) return n > room ? -1 : 0;
    c->head[c->head_length] = 0;
    if (strncmp(c->head, "HTTP/1.", 7)) return -1;
    c->status = atoi(c->head + 9);
    if (c->status == 100) { c->head_length = 0; return 0; }
    const char *length = header_value(c, "content-length"), *coding = header_value(c, "transfer-encoding");
    const char *persistence = header_value(c, "connection");
    c->framing = coding && !strncasecmp(coding, "chunked", 7) ? CHUNKED : length ? LENGTH : UNTIL_CLOSE;
    c->left = c->framing == LENGTH ? strtoull(length, NULL, 10) : 0;
    c->close_after = c->framing == UNTIL_CLOSE || (persistence && !strncasecmp(persistence, "close", 5));
    c->head_done = true;
    return 0;
}

/* --- connections and requests ------------------------------------------------------------------------------------ */

static void drop(struct connection *c)
{
    if (c->fd >= 0) close(c->fd);
    c->fd = -1;
    if (c->busy) open_requests--;
    c->busy = false;
}

static void fail(struct connection *c, enum failure why)
{
    seen.failures[why]++;
    seen.total_failures++;
    drop(c);
    if (set.arrivals_per_s > 0) { c->next_idle = idle_list; idle_list = c; return; }
    c->retry_us = now_us() + RETRY_US;   /* a server that refuses is not asked a million times a second */
    missing++;
}

static void push_request(struct connection *c)
{
    while (c->busy && c->sent < request_length) {
        ssize_t n = send(c->fd, request + c->sent, request_length - c->sent, MSG_NOSIGNAL);
        if (n <= 0) return;              /* a broken connection is found by the read */
        c->sent += (size_t)n;
        if (measuring) seen.sent += (uint64_t)n;
    }
}

static void open_socket(struct connection *c)
{
    int one = 1;
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, .data.ptr = c};
    c->reused = false;
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (c->fd < 0) { perror("socket"); exit(1); }
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (connect(c->fd, (struct sockaddr *)&address, sizeof address) && errno != EINPROGRESS) fail(c, REFUSED);
    else epoll_ctl(epoll_fd, EPOLL_CTL_ADD, c->fd, &event);
}

/* Readies the state of one exchange; a request that is sent again keeps the time when it was due. */
static void reset_exchange(struct connection *c)
{
    c->sent = c->head_length = c->line_length = 0;
    c->head_done = c->close_after = c->event_open = false;
    c->first_us = c->last_us = c->left = 0;
    c->chunk = CHUNK_SIZE;
}

static void start_request(struct connection *c)
{
    c->started_us = now_us();
    reset_exchange(c);
    c->busy = true;
    open_requests++;
    if (c->fd < 0) open_socket(c);
    else push_request(c);
}

static void resend_on_new_socket(struct connection *c)
{
    seen.stale++;
    close(c->fd);
    reset_exchange(c);
    open_socket(c);
}

static void finish(struct connection *c)
{
    uint64_t now = now_us();
    if (c->status != 200) { fail(c, BAD_STATUS); return; }
    seen.total_requests++;
    if (measuring) seen.requests++;
    add_sample(&seen.whole, now - c->started_us);
    c->busy = false;
    open_requests--;
    c->reused = true;
    if (c->close_after) drop(c);
    if (set.idle) return;
    if (set.arrivals_per_s > 0) { c->next_idle = idle_list; idle_list = c; }
    else if (!stopping) start_request(c);
}

static void on_end_of_file(struct connection *c)
{
    if (!c->busy) {
        seen.idle_closed += set.idle;
        drop(c);
    }
    else if (c->head_done && c->framing == UNTIL_CLOSE) finish(c);
    else if (c->reused && c->head_length == 0) resend_on_new_socket(c);
    else fail(c, c->sent == 0 ? REFUSED : CUT);
}

/* Takes the n bytes in read_buffer as the next of c's response. */
static void on_bytes(struct connection *c, size_t n)
{
    uint64_t now = now_us();
    size_t used = 0;
    if (measuring) seen.received += n;
    if (!c->busy) { fail(c, BAD_FRAMING); return; }
    while (!c->head_done) {
        size_t took = 0;
        if (feed_head(c, read_buffer + used, n - used, &took)) { fail(c, BAD_FRAMING); return; }
        used += took;
        if (!c->head_done && used == n) return;
    }
    bool empty = c->framing == LENGTH && c->left == 0;
    if (used == n && !empty) return;
    if (!c->first_us) { c->first_us = now; add_sample(&seen.first, now - c->started_us); }
    else if (set.stream) add_sample(&seen.gap, now - c->last_us);
    c->last_us = now;
    int state = empty ? 1 : feed_body(c, read_buffer + used, n - used);
    if (state < 0) fail(c, BAD_FRAMING);
    else if (state > 0) finish(c);
}

static void on_event(struct connection *c, uint32_t events)
{
    int fd = c->fd;
    if (fd < 0) return;
    if (events & EPOLLOUT) push_request(c);
    if (!(events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR))) return;
    while (c->fd == fd) {
        ssize_t n = recv(fd, read_buffer, sizeof read_buffer, 0);
        if (n < 0 && errno == EAGAIN) return;
        if (n <= 0) { on_end_of_file(c); return; }
        on_bytes(c, (size_t)n);
        if ((size_t)n < sizeof read_buffer && !(events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR))) return;
    }
}

static void poll_once(int timeout_ms)
{
    struct epoll_event events[BATCH];
    int n = epoll_wait(epoll_fd, events, BATCH, timeout_ms);
    for (int i = 0; i < n; i++) on_event(events[i].data.ptr, events[i].events);
}

/* --- the three loads --------------------------------------------------------------------------------------------- */

static void begin_measuring(uint64_t now, uint64_t from)
{
    if (!measuring && now >= from) measuring = true;
}

static bool gave_up(void) { return (long)seen.total_failures >= set.max_errors; }

static void reopen_missing(int opened, uint64_t now)
{
    for (int i = 0; missing > 0 && i < opened; i++) {
        struct connection *c = &connections[i];
        if (c->fd >= 0 || c->busy || !c->retry_us || c->retry_us > now) continue;
        c->retry_us = 0;
        missing--;
        start_request(c);
    }
}

static void closed_loop(uint64_t start, uint64_t end)
{
    uint64_t measure_from = start + (uint64_t)(set.warmup_s * 1e6), now;
    int opened = 0;
    while ((now = now_us()) < end && !gave_up()) {
        double due = set.ramp_s > 0 ? (double)(now - start) / 1e6 / set.ramp_s * set.connections : set.connections;
        begin_measuring(now, measure_from);
        while (opened < set.connections && opened < due) start_request(&connections[opened++]);
        if (missing) reopen_missing(opened, now);
        poll_once(opened < set.connections || missing ? 1 : 20);
    }
}

static double jitter(void)   /* in [0, 1), the same sequence each run */
{
    static uint64_t x = 88172645463325252u;
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    return (double)(x >> 11) / 9007199254740992.0;
}

static struct connection *idle_connection(int *opened)
{
    struct connection *c = idle_list;
    if (c) { idle_list = c->next_idle; return c; }
    return *opened < set.connections ? &connections[(*opened)++] : NULL;
}

static void arrivals(uint64_t start, uint64_t end)
{
    uint64_t measure_from = start + (uint64_t)(set.warmup_s * 1e6), now, number = 0;
    double interval_us = 1e6 / set.arrivals_per_s;
    uint64_t due = start + (uint64_t)(jitter() * interval_us);
    int opened = 0;
    while ((now = now_us()) < end + 30000000u && !gave_up() && (due < end || open_requests)) {
        begin_measuring(now, measure_from);
        while (due <= now && due < end) {
            struct connection *c = idle_connection(&opened);
            if (c) start_request(c);    /* timed from now: that we are late is no fault of the server */
            else { seen.failures[UNFINISHED]++; seen.total_failures++; }
            due = start + (uint64_t)(((double)++number + jitter()) * interval_us);
        }
        poll_once(1);
    }
    seen.failures[UNFINISHED] += (uint64_t)open_requests;
    seen.total_failures += (uint64_t)open_requests;
}

static void poll_while_open(uint64_t until)
{
    while (open_requests && now_us() < until && !gave_up()) poll_once(5);
}

static void idle_hold(uint64_t start, uint64_t *opened_us, int *sampled)
{
    uint64_t limit = start + 120000000u, now;
    int opened = 0, step = set.connections / (set.sample < set.connections ? set.sample : set.connections);
    measuring = true;
    while (opened < set.connections && (now = now_us()) < limit && !gave_up()) {
        double due = set.ramp_s > 0 ? (double)(now - start) / 1e6 / set.ramp_s * set.connections : set.connections;
        while (opened < set.connections && opened < due && open_requests < 256) start_request(&connections[opened++]);
        poll_once(1);
    }
    poll_while_open(limit);
    *opened_us = now_us() - start;
    for (uint64_t until = now_us() + (uint64_t)(set.seconds * 1e6); now_us() < until;) poll_once(20);
    for (int i = 0; i < opened; i += step) {
        if (connections[i].fd < 0 || connections[i].busy) continue;
        start_request(&connections[i]);
        ++*sampled;
    }
    poll_while_open(now_us() + 30000000u);
    seen.failures[UNFINISHED] += (uint64_t)open_requests;
    seen.total_failures += (uint64_t)open_requests;
}

/* --- settings and the report ------------------------------------------------------------------------------------- */

static int by_value(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

static void print_times(const char *name, struct samples *s)
{
    if (!s->count) { printf(", \"%s_p50_ms\": null, \"%s_p99_ms\": null", name, name); return; }
    qsort(s->us, s->count, sizeof *s->us, by_value);
    printf(", \"%s_p50_ms\": %.3f, \"%s_p99_ms\": %.3f", name, s->us[(size_t)((double)(s->count - 1) * .5)] / 1e3,
           name, s->us[(size_t)((double)(s->count - 1) * .99)] / 1e3);
}

static void print_report(double measured_s)
{
    printf("{\"measured_s\": %.3f, \"requests\": %lu, \"requests_per_s\": %.1f", measured_s, seen.requests,
           (double)seen.requests / measured_s);
    printf(", \"events_per_s\": %.1f, \"sent_bytes_per_s\": %.0f, \"received_bytes_per_s\": %.0f",
           (double)seen.events / measured_s, (double)seen.sent / measured_s, (double)seen.received / measured_s);
    print_times("first", &seen.first);
    print_times("whole", &seen.whole);
    print_times("gap", &seen.gap);
    printf(", \"total_requests\": %lu, \"total_events\": %lu, \"stale\": %lu", seen.total_requests, seen.total_events,
           seen.stale);
    printf(", \"errors\": %lu, \"gave_up\": %s, \"error_kinds\": {", seen.total_failures, gave_up() ? "true" : "false");
    for (int i = 0; i < FAILURES; i++) printf("%s\"%s\": %lu", i ? ", " : "", failure_names[i], seen.failures[i]);
    printf("}");
}

static void make_request(void)
{
    char *padding = checked(malloc((size_t)set.body_bytes + 1)), *body = NULL;
    const char *line_end = *set.header ? "\r\n" : "";
    int length;
    memset(padding, 'x', (size_t)set.body_bytes);
    padding[set.body_bytes] = 0;
    if (set.idle) {
        length = asprintf(&request, "GET %s HTTP/1.1\r\nHost: %s:%d\r\n%s%s\r\n", set.path, set.host, set.port,
                          set.header, line_end);
    } else {
        length = asprintf(&body, "{\"model\":\"%s\",\"stream\":%s,\"max_tokens\":%d,\"messages\":[{\"role\":\"user\","
                          "\"content\":\"%s\"}]}", set.model, set.stream ? "true" : "false", set.tokens, padding);
        length = asprintf(&request, "POST %s HTTP/1.1\r\nHost: %s:%d\r\nContent-Type: application/json\r\n%s%s"
                          "Content-Length: %d\r\n\r\n%s", set.path, set.host, set.port, set.header, line_end, length,
                          body);
        free(body);
    }
    checked(request);
    request_length = (size_t)length;
    free(padding);
}

static void read_settings(int count, char **words)
{
    enum { HOST = 256, PORT, CONNECTIONS, SECONDS, WARMUP, RAMP, ARRIVALS, IDLE, SAMPLE, STREAM, TOKENS, BODY, MODEL,
           PATH, HEADER, MAX_ERRORS };
    static const struct option options[] = {
        {"host", 1, NULL, HOST}, {"port", 1, NULL, PORT}, {"connections", 1, NULL, CONNECTIONS},
        {"seconds", 1, NULL, SECONDS}, {"warmup-s", 1, NULL, WARMUP}, {"ramp-s", 1, NULL, RAMP},
        {"arrivals-per-s", 1, NULL, ARRIVALS}, {"idle", 0, NULL, IDLE}, {"sample", 1, NULL, SAMPLE},
        {"stream", 0, NULL, STREAM}, {"tokens", 1, NULL, TOKENS}, {"body-bytes", 1, NULL, BODY},
        {"model", 1, NULL, MODEL}, {"path", 1, NULL, PATH}, {"header", 1, NULL, HEADER},
        {"max-errors", 1, NULL, MAX_ERRORS}, {0}};
    for (int option; (option = getopt_long(count, words, "", options, NULL)) != -1;) {
        switch (option) {
        case HOST: set.host = optarg; break;
        case PORT: set.port = atoi(optarg); break;
        case CONNECTIONS: set.connections = atoi(optarg); break;
        case SECONDS: set.seconds = atof(optarg); break;
        case WARMUP: set.warmup_s = atof(optarg); break;
        case RAMP: set.ramp_s = atof(optarg); break;
        case ARRIVALS: set.arrivals_per_s = atof(optarg); break;
        case IDLE: set.idle = true; break;
        case SAMPLE: set.sample = atoi(optarg); break;
        case STREAM: set.stream = true; break;
        case TOKENS: set.tokens = atoi(optarg); break;
        case BODY: set.body_bytes = atol(optarg); break;
        case MODEL: set.model = optarg; break;
        case PATH: set.path = optarg; break;
        case HEADER: set.header = optarg; break;
        case MAX_ERRORS: set.max_errors = atol(optarg); break;
        default: exit(2);
        }
    }
    if (!set.port || set.connections < 1 || set.seconds <= 0 || set.body_bytes < 0 || set.sample < 1) {
        fprintf(stderr, "load: --port N, --connections, --seconds and --sample above 0 are needed\n");
        exit(2);
    }
    if (set.warmup_s < 0) set.warmup_s = set.seconds * 0.1;
    if (!set.max_errors) set.max_errors = 1000 + 10L * set.connections;
}

int main(int count, char **words)
{
    read_settings(count, words);
    make_request();
    address.sin_family = AF_INET;
    address.sin_port = htons((uint16_t)set.port);
    if (!inet_aton(set.host, &address.sin_addr)) { fprintf(stderr, "load: --host takes an IPv4 address\n"); return 2; }
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    connections = checked(calloc((size_t)set.connections, sizeof *connections));
    for (int i = 0; i < set.connections; i++) connections[i].fd = -1;

    uint64_t start = now_us(), end = start + (uint64_t)(set.seconds * 1e6), opened_us = 0;
    int sampled = 0;
    if (set.idle) idle_hold(start, &opened_us, &sampled);
    else if (set.arrivals_per_s > 0) arrivals(start, end);
    else closed_loop(start, end);
    stopping = true;

    uint64_t stop = now_us();
    double measured_s = (double)(stop - start) / 1e6 - (set.idle ? 0 : set.warmup_s);
    print_report(measured_s > 0.001 ? measured_s : 0.001);
    if (set.idle) {
        int held = 0;
        for (int i = 0; i < set.connections; i++) held += connections[i].fd >= 0;
        printf(", \"held\": %d, \"idle_closed\": %lu, \"sampled\": %d, \"opened_s\": %.3f", held, seen.idle_closed,
               sampled, (double)opened_us / 1e6);
    }
    printf("}\n");
    return 0;
}
