/* Scratch memory of a thread, handed out in whole cache lines. */
#ifndef FEDPERFIX_SCRATCH_H
#define FEDPERFIX_SCRATCH_H

#include "lanes.h"
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

INLINE long least(long x, long y) { return x < y ? x : y; }
INLINE long rounded_up(long x, long to) { return (x + to - 1) / to * to; }

/* `start` is NULL where only the size is asked for. Under AddressSanitizer a gap that must not be touched follows
   each part. */
struct memory {
    char *start;
    int64_t used;
};

static real *take(struct memory *memory, long count) {
    real *taken = (real *)(memory->start ? memory->start + memory->used : 0);
    memory->used += rounded_up(count * (long)sizeof(real), 64);
#ifdef __SANITIZE_ADDRESS__
    if (taken) __asan_poison_memory_region(memory->start + memory->used, 64);
    memory->used += 64;
#endif
    return taken;
}

#endif
