/* A stand-in for libnvidia-ml.so.1 that lists the processes it is told, as strictly as nvidia-ml-py calls it. */
#include <stddef.h>
#include <string.h>

#define API __attribute__((visibility("default")))
enum { SUCCESS = 0, UNINITIALIZED = 1, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7, DRIVER_NOT_LOADED = 9 };

typedef struct { unsigned pid; unsigned long long bytes; unsigned gpu_instance, compute_instance; } Process;

static Process processes[8];
static unsigned count, open_count;
static int init_result;
static char known[64];

API void fake_reset(const char *uuid, int result) { strncpy(known, uuid, 63), count = 0, init_result = result; }
API void fake_add(unsigned pid, unsigned long long bytes) { processes[count++] = (Process){pid, bytes, ~0u, ~0u}; }
API void fake_hold(unsigned pid, unsigned long long bytes) {
  for (unsigned i = 0; i < count; i++) if (processes[i].pid == pid) processes[i].bytes = bytes;
}
API unsigned fake_open(void) { return open_count; } /* initialized and not shut down */

API int nvmlInitWithFlags(unsigned flags) { open_count += init_result == 0; return init_result; }
API int nvmlShutdown(void) { if (!open_count) return UNINITIALIZED; open_count--; return SUCCESS; }
API const char *nvmlErrorString(int code) { return code == DRIVER_NOT_LOADED ? "Driver Not Loaded" : "an NVML error"; }
API int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
  if (!open_count) return UNINITIALIZED;
  *device = &count;
  return strcmp(uuid, known) ? NOT_FOUND : SUCCESS;
}
API int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *room, Process *out) {
  if (!open_count || device != &count) return UNINITIALIZED;
  if (*room < count) { *room = count; return INSUFFICIENT_SIZE; }
  if (out) memcpy(out, processes, count * sizeof *out);
  *room = count;
  return SUCCESS;
}
