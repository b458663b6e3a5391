// A twin of NCCL for tests: the functions of nccl.h that the engine calls, over loopback TCP between the processes or threads
// of one machine, on host memory. Streams are ignored: an operation is done once it has left the state "in progress".
//
// All data goes through rank 0, which checks that the ranks ask for the same and computes in their order. Where NCCL would
// hang or compute nonsense, such as with different lengths, this is an error. Communicators are non-blocking only.
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define API extern "C" __attribute__((visibility("default")))

enum Status { Success, UnhandledCudaError, SystemError, InternalError, InvalidArgument, InvalidUsage, RemoteError, InProgress };
enum { FLOAT32 = 7, SUM = 0 };
static const int MOST = 64; // Ranks.

struct UniqueId { char internal[128]; };
// What is in one.
struct Place { uint64_t magic, token; int port, listener, process; };
static const uint64_t MAGIC = 0x4c43434e74666f73;

struct Config { size_t size; unsigned magic, version; int blocking; };

enum Kind { CONNECT, SEND, RECEIVE, SENDS, ALL_GATHER, REDUCE_SCATTER, BROADCAST, FINALIZE };
static const char* const NAMES[] = {"connect", "send", "receive", "sends and receives", "all-gather", "reduce-scatter", "broadcast", "finalize"};

struct Comm;
struct Operation { Kind kind; const char* from; char* to; size_t count; int peer; Comm* comm; };
// Operations of one group.
struct Job { Operation* operations; int count; Job* next; };

struct Comm {
  int rank, size;
  Place place;
  int sockets[MOST]; // At rank 0 those of the others, elsewhere [0] alone.
  pthread_t thread;
  pthread_mutex_t lock;
  pthread_cond_t changed;
  Job *first, *last;
  bool busy, abort, finalized;
  Status status;
  char why[256];
};

// As sent before the data of an operation. Bytes for and from each rank of sends and receives, else the first alone.
struct Header { uint64_t magic; int kind, root, rank, size; uint64_t count, sends[MOST], receives[MOST]; };
struct Reply { int status, unused; uint64_t bytes; char why[128]; };

static thread_local char last_error[256];
static thread_local int depth;
static thread_local Operation* open_operations;
static thread_local int open_count;

static Status fail(Comm* comm, Status status, const char* format, ...) {
  char text[256];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  pthread_mutex_lock(&comm->lock);
  if (comm->status == Success) {
    comm->status = status;
    memcpy(comm->why, text, sizeof text);
  }
  pthread_mutex_unlock(&comm->lock);
  return status;
}

static bool aborted(Comm* comm) {
  pthread_mutex_lock(&comm->lock);
  bool abort = comm->abort;
  pthread_mutex_unlock(&comm->lock);
  return abort;
}

// Waits until a socket can be read or written; false where the communicator is aborted.
static bool ready(Comm* comm, int socket, short events) {
  for (;;) {
    pollfd poller = {socket, events, 0};
    int found = poll(&poller, 1, 20);
    if (found > 0) return true;
    if (found < 0 && errno != EINTR) return false;
    if (aborted(comm)) return false;
  }
}

static Status put(Comm* comm, int socket, const void* from, size_t bytes) {
  for (size_t done = 0; done < bytes;) {
    if (!ready(comm, socket, POLLOUT)) return RemoteError;
    ssize_t sent = send(socket, (const char*)from + done, bytes - done, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent < 0 && (errno == EAGAIN || errno == EINTR)) continue;
    if (sent <= 0) return RemoteError;
    done += sent;
  }
  return Success;
}

static Status get(Comm* comm, int socket, void* to, size_t bytes) {
  for (size_t done = 0; done < bytes;) {
    if (!ready(comm, socket, POLLIN)) return RemoteError;
    ssize_t received = recv(socket, (char*)to + done, bytes - done, MSG_DONTWAIT);
    if (received < 0 && (errno == EAGAIN || errno == EINTR)) continue;
    if (received <= 0) return RemoteError;
    done += received;
  }
  return Success;
}

static void pause_briefly() {
  timespec time = {0, 5000000};
  nanosleep(&time, nullptr);
}

static void set_options(int socket) {
  int yes = 1;
  setsockopt(socket, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
}

// Connects all ranks to the first.
static Status join(Comm* comm) {
  Header hello = {comm->place.token, CONNECT, 0, comm->rank, comm->size, 0, {}, {}};
  if (comm->rank != 0) {
    sockaddr_in address = {};
    address.sin_family = AF_INET;
    address.sin_port = htons(comm->place.port);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    for (;;) {
      comm->sockets[0] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
      if (connect(comm->sockets[0], (sockaddr*)&address, sizeof address) == 0) break;
      close(comm->sockets[0]);
      comm->sockets[0] = -1;
      if (aborted(comm)) return fail(comm, RemoteError, "aborted");
      pause_briefly();
    }
    set_options(comm->sockets[0]);
    if (put(comm, comm->sockets[0], &hello, sizeof hello) != Success) return fail(comm, RemoteError, "rank 0 is gone");
    Reply reply;
    if (get(comm, comm->sockets[0], &reply, sizeof reply) != Success) return fail(comm, RemoteError, "rank 0 is gone");
    return reply.status == Success ? Success : fail(comm, (Status)reply.status, "%s", reply.why);
  }
  if (comm->place.process != getpid()) return fail(comm, InvalidUsage, "rank 0 did not make the id");
  Reply reply = {};
  for (int joined = 1; joined < comm->size;) {
    if (!ready(comm, comm->place.listener, POLLIN)) return fail(comm, RemoteError, "aborted");
    int socket = accept4(comm->place.listener, nullptr, nullptr, SOCK_CLOEXEC);
    if (socket < 0) continue;
    set_options(socket);
    Header other;
    if (get(comm, socket, &other, sizeof other) != Success || other.magic != comm->place.token) {
      close(socket);
      continue;
    }
    if (other.size != comm->size || other.rank <= 0 || other.rank >= comm->size || comm->sockets[other.rank] >= 0) {
      reply.status = InvalidUsage;
      snprintf(reply.why, sizeof reply.why, "rank %d of %d does not fit rank 0 of %d", other.rank, other.size, comm->size);
      put(comm, socket, &reply, sizeof reply);
      close(socket);
      break;
    }
    comm->sockets[other.rank] = socket;
    ++joined;
  }
  for (int rank = 1; rank < comm->size; ++rank)
    if (comm->sockets[rank] >= 0) put(comm, comm->sockets[rank], &reply, sizeof reply);
  return reply.status == Success ? Success : fail(comm, (Status)reply.status, "%s", reply.why);
}

// Bytes that a rank sends and receives.
static size_t sent(const Header& h) {
  size_t bytes = 0;
  for (int i = 0; i < h.size; ++i) bytes += h.sends[i];
  return bytes;
}
static size_t received(const Header& h) {
  size_t bytes = 0;
  for (int i = 0; i < h.size; ++i) bytes += h.receives[i];
  return bytes;
}

// At rank 0: whether the ranks ask for the same.
static bool fit(const Header* all, int size, char* why, size_t room) {
  for (int rank = 1; rank < size; ++rank) {
    const Header &a = all[0], &b = all[rank];
    if (a.kind != b.kind) {
      snprintf(why, room, "rank 0 calls %s, rank %d %s", NAMES[a.kind], rank, NAMES[b.kind]);
      return false;
    }
    if (a.count != b.count || a.root != b.root) {
      snprintf(why, room, "%s of %llu numbers at rank 0, of %llu at rank %d", NAMES[a.kind], (unsigned long long)a.count,
        (unsigned long long)b.count, rank);
      return false;
    }
  }
  if (all[0].kind != SENDS) return true;
  for (int i = 0; i < size; ++i)
    for (int j = 0; j < size; ++j)
      if (all[i].sends[j] != all[j].receives[i]) {
        snprintf(why, room, "rank %d sends %llu bytes to rank %d, which receives %llu", i, (unsigned long long)all[i].sends[j], j,
          (unsigned long long)all[j].receives[i]);
        return false;
      }
  return true;
}

// At rank 0: what rank `to` gets.
static void answer(const Header* all, char** data, int size, int to, char* out) {
  const Header& h = all[to];
  if (h.kind == ALL_GATHER)
    for (int from = 0; from < size; ++from) memcpy(out + from * h.count * 4, data[from], h.count * 4);
  if (h.kind == BROADCAST) memcpy(out, data[h.root], h.count * 4);
  if (h.kind == REDUCE_SCATTER)
    for (size_t i = 0; i < h.count; ++i) {
      float sum = ((const float*)data[0])[to * h.count + i];
      for (int from = 1; from < size; ++from) sum += ((const float*)data[from])[to * h.count + i];
      ((float*)out)[i] = sum;
    }
  if (h.kind == SENDS)
    for (int from = 0; from < size; ++from) {
      const char* begin = data[from];
      for (int rank = 0; rank < to; ++rank) begin += all[from].sends[rank];
      memcpy(out, begin, h.receives[from]);
      out += h.receives[from];
    }
}

// One exchange of all ranks: `data` is what this one sends, `out` has room for what it receives.
static Status exchange(Comm* comm, const Header& own, const char* data, char* out) {
  const int size = comm->size;
  Reply reply = {};
  if (comm->rank != 0) {
    int socket = comm->sockets[0];
    if (put(comm, socket, &own, sizeof own) != Success || put(comm, socket, data, sent(own)) != Success ||
        get(comm, socket, &reply, sizeof reply) != Success)
      return fail(comm, RemoteError, "rank 0 is gone");
    if (reply.status != Success) return fail(comm, (Status)reply.status, "%s", reply.why);
    if (get(comm, socket, out, received(own)) != Success) return fail(comm, RemoteError, "rank 0 is gone");
    return Success;
  }
  Header* all = (Header*)calloc(size, sizeof(Header));
  char** parts = (char**)calloc(size, sizeof(char*));
  all[0] = own;
  parts[0] = (char*)data;
  for (int rank = 1; rank < size && reply.status == Success; ++rank) {
    bool here = get(comm, comm->sockets[rank], &all[rank], sizeof(Header)) == Success;
    if (here) {
      parts[rank] = (char*)malloc(sent(all[rank]) + 1);
      here = get(comm, comm->sockets[rank], parts[rank], sent(all[rank])) == Success;
    }
    if (!here) {
      reply.status = RemoteError;
      snprintf(reply.why, sizeof reply.why, "rank %d is gone", rank);
    }
  }
  if (reply.status == Success && !fit(all, size, reply.why, sizeof reply.why)) reply.status = InvalidUsage;
  for (int rank = 1; rank < size; ++rank) {
    if (put(comm, comm->sockets[rank], &reply, sizeof reply) != Success || reply.status != Success) continue;
    size_t bytes = received(all[rank]);
    char* back = (char*)malloc(bytes + 1);
    answer(all, parts, size, rank, back);
    put(comm, comm->sockets[rank], back, bytes); // If it is gone, the next exchange notices.
    free(back);
  }
  if (reply.status == Success) answer(all, parts, size, 0, out);
  for (int rank = 1; rank < size; ++rank) free(parts[rank]);
  free(parts);
  free(all);
  return reply.status == Success ? Success : fail(comm, (Status)reply.status, "%s", reply.why);
}

static Header header(Comm* comm, Kind kind, size_t count, int root) {
  return {comm->place.token, kind, root, comm->rank, comm->size, count, {}, {}};
}

static Status perform(Comm* comm, const Job* job) {
  // All sends and receives of a group at once.
  Header sends = header(comm, SENDS, 0, 0);
  bool any = false;
  for (int i = 0; i < job->count; ++i) {
    const Operation& o = job->operations[i];
    if (o.kind == SEND) sends.sends[o.peer] += o.count * 4;
    if (o.kind == RECEIVE) sends.receives[o.peer] += o.count * 4;
    any |= o.kind == SEND || o.kind == RECEIVE;
  }
  if (any) {
    char *data = (char*)malloc(sent(sends) + 1), *out = (char*)malloc(received(sends) + 1), *at = data;
    for (int peer = 0; peer < comm->size; ++peer)
      for (int i = 0; i < job->count; ++i) {
        const Operation& o = job->operations[i];
        if (o.kind != SEND || o.peer != peer) continue;
        memcpy(at, o.from, o.count * 4);
        at += o.count * 4;
      }
    Status status = exchange(comm, sends, data, out);
    at = out;
    for (int peer = 0; peer < comm->size && status == Success; ++peer)
      for (int i = 0; i < job->count; ++i) {
        const Operation& o = job->operations[i];
        if (o.kind != RECEIVE || o.peer != peer) continue;
        memcpy(o.to, at, o.count * 4);
        at += o.count * 4;
      }
    free(data);
    free(out);
    if (status != Success) return status;
  }
  for (int i = 0; i < job->count; ++i) {
    const Operation& o = job->operations[i];
    if (o.kind == SEND || o.kind == RECEIVE) continue;
    Header h = header(comm, o.kind, o.count, o.peer);
    const size_t bytes = o.count * 4, size = comm->size;
    h.sends[0] = o.kind == REDUCE_SCATTER ? bytes * size : o.kind == BROADCAST && o.peer != comm->rank ? 0 : bytes;
    h.receives[0] = o.kind == ALL_GATHER ? bytes * size : bytes;
    Status status = exchange(comm, h, o.from, o.to);
    if (status != Success) return status;
    if (o.kind == FINALIZE) comm->finalized = true;
  }
  return Success;
}

// While there is nothing to do: whether a rank has closed its connection.
static void look_for_lost(Comm* comm) {
  for (int rank = 0; rank < comm->size; ++rank) {
    char byte;
    if (comm->sockets[rank] >= 0 && recv(comm->sockets[rank], &byte, 1, MSG_PEEK | MSG_DONTWAIT) == 0)
      fail(comm, RemoteError, "rank %d is gone", comm->rank == 0 ? rank : 0);
  }
}

static void* serve(void* argument) {
  Comm* comm = (Comm*)argument;
  pthread_mutex_lock(&comm->lock);
  while (!comm->abort) {
    if (Job* job = comm->first) {
      comm->first = job->next;
      Status before = comm->status;
      pthread_mutex_unlock(&comm->lock);
      if (before == Success) {
        if (job->count == 1 && job->operations[0].kind == CONNECT) join(comm);
        else perform(comm, job);
      }
      free(job->operations);
      free(job);
      pthread_mutex_lock(&comm->lock);
      comm->busy = comm->first != nullptr;
      continue;
    }
    timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_nsec += 20000000;
    if (until.tv_nsec >= 1000000000) {
      until.tv_nsec -= 1000000000;
      ++until.tv_sec;
    }
    if (pthread_cond_timedwait(&comm->changed, &comm->lock, &until) == ETIMEDOUT && !comm->finalized && comm->status == Success) {
      pthread_mutex_unlock(&comm->lock);
      look_for_lost(comm);
      pthread_mutex_lock(&comm->lock);
    }
  }
  pthread_mutex_unlock(&comm->lock);
  return nullptr;
}

static Status submit(Comm* comm, Operation* operations, int count) {
  Job* job = (Job*)calloc(1, sizeof(Job));
  job->operations = operations;
  job->count = count;
  pthread_mutex_lock(&comm->lock);
  if (comm->first == nullptr) comm->first = job;
  else comm->last->next = job;
  comm->last = job;
  comm->busy = true;
  pthread_cond_signal(&comm->changed);
  pthread_mutex_unlock(&comm->lock);
  return InProgress;
}

// Puts an operation into the open group, or does it alone.
static Status enqueue(Operation operation) {
  Comm* comm = operation.comm;
  if (comm == nullptr || operation.peer < 0 || operation.peer >= comm->size) return InvalidArgument;
  pthread_mutex_lock(&comm->lock);
  Status status = comm->status != Success ? comm->status : comm->busy ? InvalidUsage : Success;
  pthread_mutex_unlock(&comm->lock);
  if (status != Success) {
    snprintf(last_error, sizeof last_error, "%s", status == InvalidUsage ? "the communicator is busy" : comm->why);
    return status;
  }
  if (depth == 0) {
    Operation* alone = (Operation*)malloc(sizeof(Operation));
    *alone = operation;
    return submit(comm, alone, 1);
  }
  if (open_count > 0 && open_operations[0].comm != comm) return InvalidUsage; // One communicator a group is enough here.
  open_operations = (Operation*)realloc(open_operations, sizeof(Operation) * (open_count + 1));
  open_operations[open_count++] = operation;
  return Success;
}

API int ncclGetVersion(int* version) {
  *version = 23203;
  return Success;
}

API const char* ncclGetErrorString(int status) {
  static const char* const texts[] = {"no error", "unhandled cuda error", "unhandled system error", "internal error",
    "invalid argument", "invalid usage", "remote process exited or there was a network error", "NCCL operation in progress"};
  return status >= 0 && status <= InProgress ? texts[status] : "unknown result code";
}

API const char* ncclGetLastError(Comm* comm) {
  return comm != nullptr && comm->status != Success ? comm->why : last_error;
}

API int ncclGetUniqueId(UniqueId* id) {
  Place place = {MAGIC, 0, 0, socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), getpid()};
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t length = sizeof address;
  if (place.listener < 0 || bind(place.listener, (sockaddr*)&address, length) != 0 || listen(place.listener, MOST) != 0 ||
      getsockname(place.listener, (sockaddr*)&address, &length) != 0 || getrandom(&place.token, sizeof place.token, 0) < 0)
    return SystemError;
  place.port = ntohs(address.sin_port);
  memset(id, 0, sizeof *id);
  memcpy(id, &place, sizeof place);
  return Success;
}

API int ncclCommInitRankConfig(Comm** to, int size, UniqueId id, int rank, const Config* config) {
  Place place;
  memcpy(&place, &id, sizeof place);
  if (config == nullptr || config->size < 24 || config->magic != 0xcafebeef || config->version < 21400 || config->blocking != 0) {
    snprintf(last_error, sizeof last_error, "only non-blocking communicators");
    return InvalidArgument;
  }
  if (place.magic != MAGIC || size < 1 || size > MOST || rank < 0 || rank >= size) {
    snprintf(last_error, sizeof last_error, "no id, or rank %d of %d", rank, size);
    return InvalidArgument;
  }
  Comm* comm = (Comm*)calloc(1, sizeof(Comm));
  comm->rank = rank;
  comm->size = size;
  comm->place = place;
  for (int& socket : comm->sockets) socket = -1;
  pthread_mutex_init(&comm->lock, nullptr);
  pthread_cond_init(&comm->changed, nullptr);
  Operation* connect = (Operation*)calloc(1, sizeof(Operation));
  connect->kind = CONNECT;
  connect->comm = comm;
  submit(comm, connect, 1);
  if (pthread_create(&comm->thread, nullptr, serve, comm) != 0) return SystemError;
  *to = comm;
  return InProgress;
}

API int ncclCommGetAsyncError(Comm* comm, int* status) {
  pthread_mutex_lock(&comm->lock);
  *status = comm->status != Success ? comm->status : comm->busy ? InProgress : Success;
  pthread_mutex_unlock(&comm->lock);
  return Success;
}

API int ncclCommAbort(Comm* comm) {
  pthread_mutex_lock(&comm->lock);
  comm->abort = true;
  pthread_cond_signal(&comm->changed);
  pthread_mutex_unlock(&comm->lock);
  pthread_join(comm->thread, nullptr);
  for (int socket : comm->sockets)
    if (socket >= 0) close(socket);
  if (comm->rank == 0 && comm->place.process == getpid()) close(comm->place.listener);
  while (Job* job = comm->first) {
    comm->first = job->next;
    free(job->operations);
    free(job);
  }
  free(comm);
  return Success;
}

API int ncclCommFinalize(Comm* comm) { return enqueue({FINALIZE, nullptr, nullptr, 0, 0, comm}); }

API int ncclCommDestroy(Comm* comm) { return comm->finalized ? ncclCommAbort(comm) : InvalidUsage; }

API int ncclGroupStart() {
  ++depth;
  return Success;
}

API int ncclGroupEnd() {
  if (depth == 0) return InvalidUsage;
  if (--depth > 0 || open_count == 0) return Success;
  Operation* operations = open_operations;
  int count = open_count;
  open_operations = nullptr;
  open_count = 0;
  return submit(operations[0].comm, operations, count);
}

API int ncclSend(const char* from, size_t count, int type, int peer, Comm* comm, void*) {
  return type == FLOAT32 ? enqueue({SEND, from, nullptr, count, peer, comm}) : InvalidArgument;
}

API int ncclRecv(char* to, size_t count, int type, int peer, Comm* comm, void*) {
  return type == FLOAT32 ? enqueue({RECEIVE, nullptr, to, count, peer, comm}) : InvalidArgument;
}

API int ncclAllGather(const char* from, char* to, size_t count, int type, Comm* comm, void*) {
  return type == FLOAT32 ? enqueue({ALL_GATHER, from, to, count, 0, comm}) : InvalidArgument;
}

API int ncclReduceScatter(const char* from, char* to, size_t count, int type, int operation, Comm* comm, void*) {
  return type == FLOAT32 && operation == SUM ? enqueue({REDUCE_SCATTER, from, to, count, 0, comm}) : InvalidArgument;
}

API int ncclBroadcast(const char* from, char* to, size_t count, int type, int root, Comm* comm, void*) {
  return type == FLOAT32 ? enqueue({BROADCAST, from, to, count, root, comm}) : InvalidArgument;
}
