/* Which instruction set runs, on which threads, in which memory.

   The kernels run as a parallel region of the OpenMP runtime that PyTorch has loaded: Python hands over its two
   functions, so that there is one pool of threads, and nothing here depends on a runtime or on PyTorch itself. */
#include "library.h"

#include <stdlib.h>
#include <string.h>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define EXPORT __attribute__((visibility("default")))

enum status { DONE = 0, NO_MEMORY = 1, UNKNOWN = 2 };

/* Instruction sets ------------------------------------------------------------------------------- */

#ifndef BUILT /* the build says which sets it compiled */
#define BUILT(each) each(portable)
#endif
#define DECLARED(set) extern const struct instruction_set kernels_##set;
BUILT(DECLARED)
DECLARED(float64)

#if defined(__x86_64__)
static int bit(unsigned word, int index) { return (word >> index) & 1; }

/* What the operating system saves on a switch of threads: a set whose registers it does not save must not be used. */
static uint64_t saved_state(void) {
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

static int tiles_permitted(void) {
#if defined(__linux__)
    return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
#else
    return 0;
#endif
}

static int runs(const char *name) {
    unsigned a, b, c, d, features, state_b, state_d, more;
    if (!strcmp(name, "portable")) return 1;
    if (!__get_cpuid(1, &a, &b, &features, &d) || !bit(features, 27)) return 0;
    uint64_t saved = saved_state();
    if (!__get_cpuid_count(7, 0, &a, &state_b, &c, &state_d)) return 0;
    if (!__get_cpuid_count(7, 1, &more, &b, &c, &d)) more = 0;
    int avx2 = bit(features, 12) && bit(features, 28) && bit(features, 29) && bit(state_b, 5) && (saved & 6) == 6;
    int avx512 = avx2 && bit(state_b, 16) && bit(state_b, 17) && bit(state_b, 30) && bit(state_b, 31) &&
                 (saved & 0xe6) == 0xe6;
    int bf16 = avx512 && bit(more, 5);
    if (!strcmp(name, "avx2")) return avx2;
    if (!strcmp(name, "avx512")) return avx512;
    if (!strcmp(name, "avx512_bf16")) return bf16;
    return bf16 && bit(state_d, 22) && bit(state_d, 24) && (saved & 0x60000) == 0x60000 && tiles_permitted();
}
#else
static int runs(const char *name) { return !strcmp(name, "portable"); }
#endif

static const struct instruction_set *chosen;

static const struct instruction_set *find(const char *name) {
#define FIND(set) \
    if (!strcmp(name, #set)) return &kernels_##set;
    BUILT(FIND)
    return 0;
}

/* 0: not built, 1: built but not for this processor, 2: runs here */
EXPORT int fedperfix_set_state(const char *name) {
    const struct instruction_set *set = find(name);
    return !set ? 0 : runs(name) ? 2 : 1;
}

EXPORT int fedperfix_use_set(const char *name) {
    if (fedperfix_set_state(name) != 2) return UNKNOWN;
    chosen = find(name);
    return DONE;
}

EXPORT int fedperfix_vector_bytes(void) { return chosen->vector_bytes; }

/* Threads --------------------------------------------------------------------------------------------------------- */

static void (*parallel_region)(void (*)(void *), void *, unsigned, unsigned); /* GOMP_parallel */
static int (*most_threads)(void);                                             /* omp_get_max_threads */

/* NULL for both: everything runs on the calling thread, as after a fork, where the pool is gone. */
EXPORT void fedperfix_use_threads(void *region, void *threads) {
    parallel_region = (void (*)(void (*)(void *), void *, unsigned, unsigned))region;
    most_threads = (int (*)(void))threads;
}

EXPORT int fedperfix_threads(void) { return most_threads ? most_threads() : 1; }

/* Scratch memory: buffers that come back after a call and are used again, one for each thread that computes at a
   time. A buffer fresh from the system would cost a page fault every 4 KiB. */

struct buffer {
    struct buffer *next;
    int64_t bytes;
    char *memory;
};

static struct buffer *idle;
static char lock;

static void acquire(void) {
    while (__atomic_test_and_set(&lock, __ATOMIC_ACQUIRE)) {
    }
}

static void release(void) { __atomic_clear(&lock, __ATOMIC_RELEASE); }

static struct buffer *borrow(int64_t bytes) {
    acquire();
    struct buffer *buffer = idle;
    if (buffer) idle = buffer->next;
    release();
    if (!buffer) buffer = calloc(1, sizeof(struct buffer));
    if (buffer && buffer->bytes < bytes) {
        free(buffer->memory);
        bytes = (bytes + 4095) / 4096 * 4096;
        buffer->memory = aligned_alloc(4096, (size_t)bytes);
        buffer->bytes = buffer->memory ? bytes : 0;
        if (!buffer->memory) {
            free(buffer);
            return 0;
        }
    }
    return buffer;
}

static void give_back(struct buffer *buffer) {
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(buffer->memory, (size_t)buffer->bytes);
#endif
    acquire();
    buffer->next = idle;
    idle = buffer;
    release();
}

/* Items of a call, taken by whichever thread is free: each writes results of its own, so that the bits do not depend
   on the threads. */

struct work {
    const struct kernel *kernel;
    const void *call;
    int64_t items, next, scratch;
    int status;
};

static void take_items(void *given) {
    struct work *work = given;
    struct buffer *buffer = borrow(work->scratch);
    if (!buffer) {
        __atomic_store_n(&work->status, NO_MEMORY, __ATOMIC_RELAXED);
        return;
    }
    for (;;) {
        int64_t item = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED);
        if (item >= work->items) break;
        work->kernel->run(work->call, item, buffer->memory);
    }
    give_back(buffer);
}

static int run_all(const struct kernel *kernel, const void *call, int64_t items) {
    struct work work = {kernel, call, items, 0, kernel->scratch(call) + 64, DONE};
    int64_t threads = fedperfix_threads();
    if (threads > items) threads = items;
    if (threads > 1 && parallel_region)
        parallel_region(take_items, &work, (unsigned)threads, 0);
    else if (items > 0)
        take_items(&work);
    return work.status;
}

/* Attention ------------------------------------------------------------------------------------------------------- */

static const struct instruction_set *set_of(int32_t dtype) { return dtype == 3 ? &kernels_float64 : chosen; }

EXPORT int fedperfix_attention_forward(struct attention *call) {
    int64_t items = call->batch * call->heads;
    /* Few heads are divided further, into ranges of queries, each of which reads the keys anew. */
    call->parts = items >= 2 * fedperfix_threads() ? 1 : 4;
    return run_all(&set_of(call->dtype)->attention_forward, call, items * call->parts);
}

EXPORT int fedperfix_attention_backward(struct attention *call) {
    const struct instruction_set *set = set_of(call->dtype);
    int status = run_all(&set->attention_backward, call, call->chunks * call->heads);
    if (status == DONE && call->dprefix) status = run_all(&set->attention_prefix, call, call->rows);
    if (status == DONE && call->dbias) {
        int64_t blocks = set->attention_bias_blocks(call);
        status = run_all(&set->attention_bias, call, call->bias_groups * call->heads * blocks);
    }
    return status;
}

/* Aggregation ----------------------------------------------------------------------------------------------------- */

EXPORT int fedperfix_weighted_mean(const struct aggregation *call) {
    return run_all(&chosen->weighted_mean, call, call->pieces);
}

EXPORT int fedperfix_trimmed_mean(const struct aggregation *call) {
    return run_all(&chosen->trimmed_mean, call, call->pieces);
}

EXPORT int fedperfix_quantize(const struct aggregation *call) {
    return run_all(&chosen->quantize, call, call->pieces);
}

/* total = Σ of the pieces' results, in order */
static int run_and_add(const struct kernel *kernel, const struct aggregation *call) {
    int status = run_all(kernel, call, call->pieces);
    memset(call->total, 0, (size_t)call->results * sizeof(double));
    for (int64_t piece = 0; piece < call->pieces; piece++)
        for (int64_t i = 0; i < call->results; i++) call->total[i] += call->partial[piece * call->results + i];
    return status;
}

EXPORT int fedperfix_squared_norms(const struct aggregation *call) {
    return run_and_add(&chosen->squared_norms, call);
}

EXPORT int fedperfix_gram(const struct aggregation *call) { return run_and_add(&chosen->gram, call); }

/* Activations ----------------------------------------------------------------------------------------------------- */

#define ACTIVATION(name)                                                                    \
    EXPORT int fedperfix_##name(struct elementwise *call) {                                 \
        return run_all(&set_of(call->dtype)->name, call, (call->count + PART - 1) / PART);  \
    }
ACTIVATION(gelu_forward)
ACTIVATION(gelu_backward)
ACTIVATION(tanh_forward)
