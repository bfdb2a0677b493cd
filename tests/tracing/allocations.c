/* Loaded before the C library: adds up the bytes of blocks that are alive between trace_start and trace_stop.

   What was there before is not counted, nor what is smaller than SMALLEST: books and frames. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define SLOTS (1u << 18)
#define SMALLEST 2048
#define GONE ((void *)1)

static void *blocks[SLOTS];
static size_t sizes[SLOTS], alive, peak;
static volatile int tracing;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static unsigned slot_of(void *block) { return (unsigned)(((uintptr_t)block >> 4) * 2654435761u) % SLOTS; }

static void taken(void *block, size_t size) {
    if (!tracing || !block || size < SMALLEST) return;
    pthread_mutex_lock(&lock);
    unsigned slot = slot_of(block);
    while (blocks[slot] && blocks[slot] != GONE) slot = (slot + 1) % SLOTS;
    blocks[slot] = block;
    sizes[slot] = size;
    alive += size;
    if (alive > peak) peak = alive;
    pthread_mutex_unlock(&lock);
}

static void given_back(void *block) {
    if (!tracing || !block) return;
    pthread_mutex_lock(&lock);
    for (unsigned slot = slot_of(block); blocks[slot]; slot = (slot + 1) % SLOTS)
        if (blocks[slot] == block) {
            alive -= sizes[slot];
            blocks[slot] = GONE;
            break;
        }
    pthread_mutex_unlock(&lock);
}

void *malloc(size_t size) {
    static void *(*real)(size_t);
    if (!real) real = dlsym(RTLD_NEXT, "malloc");
    void *block = real(size);
    taken(block, size);
    return block;
}

void free(void *block) {
    static void (*real)(void *);
    if (!real) real = dlsym(RTLD_NEXT, "free");
    given_back(block);
    real(block);
}

int posix_memalign(void **block, size_t alignment, size_t size) {
    static int (*real)(void **, size_t, size_t);
    if (!real) real = dlsym(RTLD_NEXT, "posix_memalign");
    int failed = real(block, alignment, size);
    if (!failed) taken(*block, size);
    return failed;
}

void *aligned_alloc(size_t alignment, size_t size) {
    static void *(*real)(size_t, size_t);
    if (!real) real = dlsym(RTLD_NEXT, "aligned_alloc");
    void *block = real(alignment, size);
    taken(block, size);
    return block;
}

void trace_start(void) {
    memset(blocks, 0, sizeof blocks);
    alive = peak = 0;
    tracing = 1;
}

size_t trace_stop(void) {
    tracing = 0;
    return peak;
}
