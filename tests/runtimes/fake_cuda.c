/* A stand-in for libcuda.so.1: malloc is the device memory, up to a limit, and every allocation is counted.

   It is as strict as the real one where that finds bugs: a call fails unless the primary context is current in its
   thread, freeing what is not allocated fails, and copies happen when the stream is synchronized (or fake_flush runs),
   not before. */
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define API __attribute__((visibility("default")))
#define MOST 1024
#define DEPTH 8
enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NO_DEVICE = 100, INVALID_CONTEXT = 201, CAPTURED = 900, ILLEGAL_ADDRESS = 700 };

typedef struct { void *address; size_t size; int kind; } Block;
typedef struct { void *target; const void *source; size_t size; void *stream; } Copy;
enum { DEVICE, HOST, STREAM, GRAPH, KINDS };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Block blocks[MOST];
static Copy copies[MOST];
static void *captured; /* the stream whose work is recorded */
static int copy_count, init_result, sync_result, device_count = 1, major = 8, minor = 6, contexts;
static int allocations[KINDS];
static size_t total = 1 << 30, used;
static __thread void *stack[DEPTH]; /* of this thread's contexts */
static __thread int depth;

/* What the tests set and read. */
API void fake_set_total(size_t bytes) { total = bytes; }
API void fake_set_sm(int a, int b) { major = a, minor = b; }
API void fake_set_device_count(int n) { device_count = n; }
API void fake_set_init_result(int code) { init_result = code; }
API void fake_set_sync_result(int code) { sync_result = code; }
API int fake_contexts(void) { return contexts; }
API int fake_allocations(int kind) { return allocations[kind]; } /* ever made */
API size_t fake_used(void) { return used; }
API int fake_depth(void) { return depth; } /* contexts that this thread has pushed */
API int fake_ready(void) { return depth > 0 && stack[depth - 1] == &contexts; } /* the primary context is current */

API int fake_live(int kind) {
  int n = 0;
  pthread_mutex_lock(&lock);
  for (int i = 0; i < MOST; i++) n += blocks[i].address && blocks[i].kind == kind;
  pthread_mutex_unlock(&lock);
  return n;
}

/* Bytes of the live device allocation at this address; 0 for none. */
API size_t fake_size(uint64_t address) {
  size_t size = 0;
  pthread_mutex_lock(&lock);
  for (int i = 0; i < MOST; i++)
    if (blocks[i].address == (void *)address && blocks[i].kind == DEVICE) size = blocks[i].size;
  pthread_mutex_unlock(&lock);
  return size;
}

/* The copies queued so far, in order: what a kernel queued on the stream would find done. */
API void fake_flush(void *stream) {
  pthread_mutex_lock(&lock);
  int kept = 0;
  for (int i = 0; i < copy_count; i++) {
    if (copies[i].stream == stream) memcpy(copies[i].target, copies[i].source, copies[i].size);
    else copies[kept++] = copies[i];
  }
  copy_count = kept;
  pthread_mutex_unlock(&lock);
}

static int take(int kind, size_t size, void **address) {
  int result = OUT_OF_MEMORY;
  if (!fake_ready()) return INVALID_CONTEXT;
  if (captured && kind != GRAPH) return CAPTURED;
  if (size == 0) return INVALID_VALUE;
  pthread_mutex_lock(&lock);
  if (size <= (kind == DEVICE ? total - used : total)) {
    for (int i = 0; i < MOST && result; i++) {
      if (blocks[i].address) continue;
      blocks[i] = (Block){aligned_alloc(256, (size + 255) / 256 * 256), size, kind};
      if (!blocks[i].address) break;
      memset(blocks[i].address, 0xA5, size); /* never zero by luck */
      *address = blocks[i].address;
      used += kind == DEVICE ? size : 0;
      allocations[kind]++;
      result = SUCCESS;
    }
  }
  pthread_mutex_unlock(&lock);
  return result;
}

static int give_back(int kind, void *address) {
  int result = INVALID_VALUE;
  if (!fake_ready()) return INVALID_CONTEXT;
  pthread_mutex_lock(&lock);
  for (int i = 0; i < MOST && result; i++) {
    if (!address || blocks[i].address != address || blocks[i].kind != kind) continue;
    used -= kind == DEVICE ? blocks[i].size : 0;
    free(address);
    blocks[i].address = NULL;
    result = SUCCESS;
  }
  pthread_mutex_unlock(&lock);
  return result;
}

static int queue(void *target, const void *source, size_t size, void *stream) {
  if (!fake_ready()) return INVALID_CONTEXT;
  pthread_mutex_lock(&lock);
  int full = copy_count == MOST;
  if (!full) copies[copy_count++] = (Copy){target, source, size, stream};
  pthread_mutex_unlock(&lock);
  return full ? OUT_OF_MEMORY : SUCCESS;
}

/* The driver API. */
API int cuInit(unsigned flags) { return flags ? INVALID_VALUE : init_result; }
API int cuDriverGetVersion(int *version) { *version = 13020; return SUCCESS; }
API int cuDeviceGetCount(int *count) { *count = device_count; return SUCCESS; }
API int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return ordinal < device_count ? SUCCESS : NO_DEVICE; }
API int cuDeviceGetName(char *name, int length, int device) { strncpy(name, "Fake GPU", length); return device; }
API int cuDeviceGetUuid_v2(char *uuid, int device) { memset(uuid, 0xAB, 16); return device; }
API int cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 75 ? major : attribute == 76 ? minor : -1;
  return device;
}
API int cuDevicePrimaryCtxRetain(void **context, int device) {
  usleep(2000); /* the real one takes longer: a second thread comes in */
  *context = &contexts, contexts++;
  return device;
}
API int cuCtxPushCurrent_v2(void *context) {
  if (!context || depth == DEPTH) return INVALID_VALUE;
  stack[depth++] = context;
  return SUCCESS;
}
API int cuCtxPopCurrent_v2(void **context) {
  if (depth == 0) return INVALID_CONTEXT;
  *context = stack[--depth];
  return SUCCESS;
}
API int cuMemGetInfo_v2(size_t *free_bytes, size_t *total_bytes) {
  if (!fake_ready()) return INVALID_CONTEXT;
  *free_bytes = total - used, *total_bytes = total;
  return SUCCESS;
}
API int cuMemAlloc_v2(uint64_t *address, size_t size) { return take(DEVICE, size, (void **)address); }
API int cuMemFree_v2(uint64_t address) { return give_back(DEVICE, (void *)address); }
API int cuMemHostAlloc(void **address, size_t size, unsigned flags) { return flags ? INVALID_VALUE : take(HOST, size, address); }
API int cuMemFreeHost(void *address) { return give_back(HOST, address); }
API int cuStreamCreate(void **stream, unsigned flags) { return flags == 1 ? take(STREAM, 1, stream) : INVALID_VALUE; }
API int cuStreamDestroy_v2(void *stream) { return give_back(STREAM, stream); }
API int cuStreamSynchronize(void *stream) {
  if (!fake_ready()) return INVALID_CONTEXT;
  fake_flush(stream);
  return sync_result;
}
API int cuMemcpyHtoDAsync_v2(uint64_t target, const void *source, size_t size, void *stream) { return queue((void *)target, source, size, stream); }
API int cuMemcpyDtoHAsync_v2(void *target, uint64_t source, size_t size, void *stream) { return queue(target, (void *)source, size, stream); }

/* A stream that is captured; what a graph does when it is launched lies with the test. */
static int launches, capture_result;
static void (*on_launch)(void *);
API void *fake_captured(void) { return captured; }
API int fake_launches(void) { return launches; }
API void fake_set_capture_result(int code) { capture_result = code; }
API void fake_set_on_launch(void (*call)(void *)) { on_launch = call; }
API int cuStreamBeginCapture_v2(void *stream, int mode) {
  if (!fake_ready()) return INVALID_CONTEXT;
  if (captured || mode != 1) return INVALID_VALUE;
  captured = stream;
  return SUCCESS;
}
API int cuStreamEndCapture(void *stream, void **graph) {
  if (captured != stream) return INVALID_VALUE;
  captured = NULL, *graph = NULL;
  return capture_result ? capture_result : take(GRAPH, 1, graph);
}
API int cuGraphInstantiateWithFlags(void **executable, void *graph, uint64_t flags) {
  return graph && !flags ? take(GRAPH, 1, executable) : INVALID_VALUE;
}
API int cuGraphDestroy(void *graph) { return graph ? give_back(GRAPH, graph) : INVALID_VALUE; }
API int cuGraphExecDestroy(void *executable) { return give_back(GRAPH, executable); }
API int cuGraphLaunch(void *executable, void *stream) {
  if (!fake_ready() || captured) return INVALID_CONTEXT;
  launches++;
  fake_flush(stream);
  on_launch(executable);
  return SUCCESS;
}

API int cuGetErrorName(int code, const char **name) {
  *name = code == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : code == NO_DEVICE ? "CUDA_ERROR_NO_DEVICE"
        : code == ILLEGAL_ADDRESS ? "CUDA_ERROR_ILLEGAL_ADDRESS" : NULL;
  return *name ? SUCCESS : INVALID_VALUE;
}
API int cuGetErrorString(int code, const char **text) {
  *text = code == OUT_OF_MEMORY ? "out of memory" : code == NO_DEVICE ? "no CUDA-capable device is detected"
        : code == ILLEGAL_ADDRESS ? "an illegal memory access was encountered" : NULL;
  return *text ? SUCCESS : INVALID_VALUE;
}
