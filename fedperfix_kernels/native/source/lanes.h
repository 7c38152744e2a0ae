/* Vectors of one instruction set: how wide they are and what they can do.

   A source file is compiled once for each instruction set; the compiler's own macros say for which. GCC's and Clang's
   vector extensions carry the arithmetic, so that only what they lack is written per set. With FLOAT64 defined the
   same sources compute in float64, which is for tests. */
#ifndef FEDPERFIX_LANES_H
#define FEDPERFIX_LANES_H

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX2__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

#ifdef FLOAT64
typedef double real;
typedef int64_t bits;
#else
typedef float real;
typedef int32_t bits;
#endif
#define LANES ((long)(VECTOR_BYTES / sizeof(real)))

typedef real lanes __attribute__((vector_size(VECTOR_BYTES)));
typedef bits mask __attribute__((vector_size(VECTOR_BYTES)));
typedef real lanes_in_memory __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(real)), may_alias));

#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

INLINE lanes load(const real *x) { return *(const lanes_in_memory *)x; }
INLINE void store(real *x, lanes value) { *(lanes_in_memory *)x = value; }
INLINE lanes all(real x) { return x - (lanes){0}; }

/* Per lane: x where the mask is set, y elsewhere. */
INLINE lanes choose(mask m, lanes x, lanes y) { return (lanes)((m & (mask)x) | (~m & (mask)y)); }

/* Of a NaN and a number it returns y. */
INLINE lanes larger(lanes x, lanes y) {
#if defined(FLOAT64)
    return choose(x > y, x, y);
#elif defined(__AVX512F__)
    return (lanes)_mm512_max_ps((__m512)x, (__m512)y);
#elif defined(__AVX2__)
    return (lanes)_mm256_max_ps((__m256)x, (__m256)y);
#elif defined(__SSE2__)
    return (lanes)_mm_max_ps((__m128)x, (__m128)y);
#else
    return choose(x > y, x, y);
#endif
}

/* Of a NaN and a number it returns y. */
INLINE lanes smaller(lanes x, lanes y) {
#if defined(FLOAT64)
    return choose(x < y, x, y);
#elif defined(__AVX512F__)
    return (lanes)_mm512_min_ps((__m512)x, (__m512)y);
#elif defined(__AVX2__)
    return (lanes)_mm256_min_ps((__m256)x, (__m256)y);
#elif defined(__SSE2__)
    return (lanes)_mm_min_ps((__m128)x, (__m128)y);
#else
    return choose(x < y, x, y);
#endif
}

INLINE real sum_of(lanes x) {
    real sum = 0;
    for (long i = 0; i < LANES; i++) sum += x[i];
    return sum;
}

#ifdef FLOAT64
INLINE lanes exp2_of(lanes x) {
    for (long i = 0; i < LANES; i++) x[i] = exp2(x[i]);
    return x;
}
#else
/* 2^x for x < 128, to 1e-7; 0 below −126; NaN stays NaN.
   2^x = 2^n · 2^f with |f| ≤ 1/2. Adding 1.5·2^23 + 127 rounds to the integer n and leaves n + 127, the exponent's
   bits, at the end of the sum. The polynomial is the minimax one of degree 5 for the relative error. */
INLINE lanes exp2_of(lanes x) {
    const lanes shift = all(12582912.0f + 127.0f);
    mask tiny = x < all(-126.0f); /* the exponent's bits would wrap around */
    lanes shifted = x + shift;
    lanes f = x - (shifted - shift);
    lanes power = all(1.327647217e-3f);
    power = power * f + all(9.675541331e-3f);
    power = power * f + all(5.550713273e-2f);
    power = power * f + all(2.402211972e-1f);
    power = power * f + all(6.931469671e-1f);
    power = power * f + all(1.000000072f);
    lanes scale = (lanes)((mask)shifted << 23);
    return (lanes)(~tiny & (mask)(power * scale));
}
#endif

#if defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 12)
#define SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define SHUFFLE(x, y, ...) __builtin_shuffle(x, y, (mask){__VA_ARGS__})
#endif
#if VECTOR_BYTES / 4 == 16 && !defined(FLOAT64)
#define LOW_HALVES(x, y) SHUFFLE(x, y, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define HIGH_HALVES(x, y) SHUFFLE(x, y, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#elif (VECTOR_BYTES / 4 == 8 && !defined(FLOAT64)) || (VECTOR_BYTES / 8 == 8 && defined(FLOAT64))
#define LOW_HALVES(x, y) SHUFFLE(x, y, 0, 8, 1, 9, 2, 10, 3, 11)
#define HIGH_HALVES(x, y) SHUFFLE(x, y, 4, 12, 5, 13, 6, 14, 7, 15)
#elif (VECTOR_BYTES / 4 == 4 && !defined(FLOAT64)) || (VECTOR_BYTES / 8 == 4 && defined(FLOAT64))
#define LOW_HALVES(x, y) SHUFFLE(x, y, 0, 4, 1, 5)
#define HIGH_HALVES(x, y) SHUFFLE(x, y, 2, 6, 3, 7)
#else
#define LOW_HALVES(x, y) SHUFFLE(x, y, 0, 2)
#define HIGH_HALVES(x, y) SHUFFLE(x, y, 1, 3)
#endif

/* to[c, r] = from[r, c].   from: [rows, columns], to: [columns, rows], with the row strides given */
static void transpose(const real *from, long from_row, long rows, long columns, real *to, long to_row) {
    long r = 0;
    for (; r + LANES <= rows; r += LANES) {
        long c = 0;
        for (; c + LANES <= columns; c += LANES) {
            lanes x[VECTOR_BYTES / sizeof(real)], y[VECTOR_BYTES / sizeof(real)];
            UNROLL for (long i = 0; i < LANES; i++) x[i] = load(from + (r + i) * from_row + c);
            /* Interleaving row i with row i + LANES/2 is one of log2(LANES) steps of a transposition. */
            UNROLL for (long step = 1; step < LANES; step *= 2) {
                UNROLL for (long i = 0; i < LANES / 2; i++) {
                    y[2 * i] = LOW_HALVES(x[i], x[i + LANES / 2]);
                    y[2 * i + 1] = HIGH_HALVES(x[i], x[i + LANES / 2]);
                }
                UNROLL for (long i = 0; i < LANES; i++) x[i] = y[i];
            }
            UNROLL for (long i = 0; i < LANES; i++) store(to + (c + i) * to_row + r, x[i]);
        }
        for (; c < columns; c++)
            for (long i = r; i < r + LANES; i++) to[c * to_row + i] = from[i * from_row + c];
    }
    for (; r < rows; r++)
        for (long c = 0; c < columns; c++) to[c * to_row + r] = from[r * from_row + c];
}

#endif
