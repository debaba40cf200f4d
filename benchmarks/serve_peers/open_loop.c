/* Open-loop load: requests leave when they are due, whatever became of those before them. One thread on epoll.
 *
 * usage: open_loop PORT REQUESTS DUE OUTCOMES SAMPLES CONNECTIONS SAMPLE_EVERY WAIT
 * REQUESTS: whole HTTP requests, each behind its length (4 bytes, the highest first), sent in turn. DUE: a double for
 * each request, seconds from the start, ascending. CONNECTIONS: at most so many; further requests wait, and that counts.
 * WAIT: seconds for which answers are still awaited after the last request was due.
 * Writes to OUTCOMES a struct outcome for each request, and to SAMPLES, of every SAMPLE_EVERY-th answer with 200, the
 * number of its request, the length of its body (4 bytes each, native) and the body. Says on stderr how many seconds of
 * a core it took.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { UNANSWERED = 0, BROKEN = -1, UNSENT = -2, EVENTS = 256, ROOM = 1 << 18 };

/* sent, done: seconds from the start. status: of HTTP, or one of the above. */
struct outcome { double sent, done; int32_t status, number; };
struct request { const char *bytes; uint32_t size; };
/* due: the place of its request, -1 where it is idle. unsent: bytes of it that did not fit into the socket. */
struct connection { int socket; long due; size_t unsent, received, room; char *buffer; struct connection *next; };

static struct request *requests;
static struct outcome *outcomes;
static struct connection *idle;
static long request_count, backlog_first, backlog_end, waiting, opened, most, answered_well, sample_every;
static int epoll, port;
static double start;
static FILE *samples;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + t.tv_nsec * 1e-9 - start;
}

static void fail(const char *what) { perror(what); exit(1); }

static char *mapped(const char *path, size_t *size) {
  int file = open(path, O_RDONLY);
  struct stat found;
  if (file < 0 || fstat(file, &found)) fail(path);
  *size = found.st_size;
  char *bytes = *size ? mmap(NULL, *size, PROT_READ, MAP_PRIVATE, file, 0) : "";
  if (bytes == MAP_FAILED) fail(path);
  close(file);
  return bytes;
}

static void watch(struct connection *c, int operation) {
  struct epoll_event event = {.events = EPOLLIN | (c->unsent ? EPOLLOUT : 0), .data.ptr = c};
  if (epoll_ctl(epoll, operation, c->socket, &event)) fail("epoll_ctl");
}

/* The connection is over; so is its request, if one was under way. */
static void drop(struct connection *c) {
  if (c->due >= 0) {
    outcomes[c->due].status = BROKEN;
    outcomes[c->due].done = now();
    waiting--;
  } else {
    struct connection **place = &idle;
    while (*place && *place != c) place = &(*place)->next;
    if (*place) *place = c->next;
  }
  close(c->socket);
  free(c->buffer);
  c->socket = -1; /* freed with the process: an event of this turn may still point here */
  opened--;
}

static void push(struct connection *c) {
  struct request *r = &requests[outcomes[c->due].number];
  size_t left = c->unsent;
  ssize_t written = send(c->socket, r->bytes + r->size - left, left, MSG_NOSIGNAL | MSG_DONTWAIT);
  if (written < 0) {
    if (errno != EAGAIN && errno != ENOTCONN) { drop(c); return; }
    written = 0;
  }
  int watched = left < r->size;
  c->unsent = left - written;
  if (watched != (c->unsent > 0)) watch(c, EPOLL_CTL_MOD);
}

static struct connection *connected(void) {
  struct connection *c = calloc(1, sizeof *c);
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr = {htonl(INADDR_LOOPBACK)}};
  int one = 1;
  c->socket = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
  if (c->socket < 0) fail("socket");
  setsockopt(c->socket, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  /* Not blocking even here: where a server does not accept, a connection waits a second, and others would with it. */
  connect(c->socket, (struct sockaddr *)&address, sizeof address);
  c->due = -1;
  opened++;
  watch(c, EPOLL_CTL_ADD);
  return c;
}

static void send_due(void) {
  while (backlog_first < backlog_end) {
    struct connection *c = idle;
    if (c) idle = c->next;
    else if (opened < most) c = connected();
    else return;
    c->due = backlog_first++;
    c->received = 0;
    c->unsent = requests[outcomes[c->due].number].size;
    outcomes[c->due].sent = now();
    outcomes[c->due].status = UNANSWERED;
    waiting++;
    push(c);
  }
}

/* The length of the body that a header of `size` bytes tells, -1 where it tells none; whether the connection ends. */
static long told(const char *header, size_t size, int *ends) {
  long length = -1;
  *ends = 0;
  for (const char *line = header, *end = header + size; line && line < end;) {
    if (!strncasecmp(line, "content-length:", 15)) length = atol(line + 15);
    if (!strncasecmp(line, "connection:", 11)) {
      line += 11;
      line += strspn(line, " ");
      *ends = !strncasecmp(line, "close", 5);
    }
    line = memchr(line, '\n', end - line);
    if (line) line++;
  }
  return length;
}

static void answered(struct connection *c, const char *body, long length, int ends) {
  struct outcome *o = &outcomes[c->due];
  o->done = now();
  o->status = atoi(c->buffer + 9);
  if (o->status == 200 && ++answered_well % sample_every == 0) {
    uint32_t head[2] = {o->number, length};
    fwrite(head, sizeof head, 1, samples);
    fwrite(body, length, 1, samples);
  }
  waiting--;
  c->due = -1;
  c->next = idle;
  idle = c;
  if (ends) drop(c);
}

static void ready(struct connection *c, uint32_t events) {
  if (events & EPOLLOUT && c->due >= 0 && c->unsent) push(c);
  if (c->socket < 0 || !(events & ~EPOLLOUT)) return;
  if (c->room - c->received < ROOM / 2) {
    c->room += ROOM;
    c->buffer = realloc(c->buffer, c->room + 1);
  }
  ssize_t count = recv(c->socket, c->buffer + c->received, c->room - c->received, MSG_DONTWAIT);
  if (count < 0 && errno == EAGAIN) return;
  if (count <= 0 || c->due < 0) { drop(c); return; }
  c->received += count;
  c->buffer[c->received] = 0;
  char *end = memmem(c->buffer, c->received, "\r\n\r\n", 4);
  if (!end) return;
  int ends;
  size_t head = end + 4 - c->buffer;
  long length = told(c->buffer, head, &ends);
  if (length < 0) drop(c); /* an answer that does not tell its length is none here */
  else if (c->received >= head + length) answered(c, c->buffer + head, length, ends);
}

static void run(const double *due, long count, double wait) {
  struct epoll_event events[EVENTS];
  double last = count ? due[count - 1] + wait : 0.0;
  while (backlog_end < count || backlog_first < backlog_end || waiting) {
    double time = now();
    if (time > last) return;
    while (backlog_end < count && due[backlog_end] <= time) backlog_end++;
    send_due();
    double left = (backlog_end < count ? due[backlog_end] : last) - now();
    struct timespec timeout = {0, 0};
    if (left > 0) {
      timeout.tv_sec = (time_t)left;
      timeout.tv_nsec = (long)((left - (time_t)left) * 1e9);
    }
    int found = epoll_pwait2(epoll, events, EVENTS, &timeout, NULL);
    for (int index = 0; index < found; index++) {
      struct connection *c = events[index].data.ptr;
      if (c->socket >= 0) ready(c, events[index].events);
    }
  }
}

int main(int argc, char **argv) {
  if (argc != 9) { fputs("usage: open_loop PORT REQUESTS DUE OUTCOMES SAMPLES CONNECTIONS SAMPLE_EVERY WAIT\n", stderr); return 2; }
  size_t size, due_size;
  port = atoi(argv[1]);
  const unsigned char *content = (unsigned char *)mapped(argv[2], &size);
  const double *due = (const double *)mapped(argv[3], &due_size);
  long count = due_size / sizeof *due;
  requests = calloc(size / 4 + 1, sizeof *requests);
  outcomes = calloc(count + 1, sizeof *outcomes);
  for (size_t at = 0; at + 4 <= size; request_count++) {
    uint32_t length = (uint32_t)content[at] << 24 | content[at + 1] << 16 | content[at + 2] << 8 | content[at + 3];
    requests[request_count] = (struct request){(const char *)content + at + 4, length};
    at += 4 + length;
  }
  for (long index = 0; index < count; index++) {
    outcomes[index].status = UNSENT;
    outcomes[index].number = index % request_count;
  }
  most = atol(argv[6]);
  sample_every = atol(argv[7]);
  samples = fopen(argv[5], "wb");
  epoll = epoll_create1(0);
  if (!samples || epoll < 0) fail(argv[5]);
  start = now() + 0.01;
  run(due, count, atof(argv[8]));
  FILE *file = fopen(argv[4], "wb");
  if (!file || fwrite(outcomes, sizeof *outcomes, count, file) != (size_t)count || fclose(file) || fclose(samples)) fail(argv[4]);
  struct rusage used;
  getrusage(RUSAGE_SELF, &used);
  fprintf(stderr, "%.6f\n", used.ru_utime.tv_sec + used.ru_stime.tv_sec + (used.ru_utime.tv_usec + used.ru_stime.tv_usec) * 1e-6);
  return 0;
}
