/* Tensors in memory: float32, bfloat16, float16, int8 (or float64) elements, computed with as `real`. */
#ifndef FEDPERFIX_STORAGE_H
#define FEDPERFIX_STORAGE_H

#include "lanes.h"

enum dtype { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, DOUBLE = 3, INT8 = 4 };

INLINE long size_of(enum dtype dtype) {
    return dtype == DOUBLE ? 8 : dtype == FLOAT32 ? 4 : dtype == INT8 ? 1 : 2;
}

INLINE float from_bfloat16(uint16_t x) {
    uint32_t word = (uint32_t)x << 16;
    float value;
    memcpy(&value, &word, 4);
    return value;
}

/* Round to nearest, ties to even; every NaN becomes the quiet one, as in PyTorch. */
INLINE uint16_t to_bfloat16(float x) {
    uint32_t word;
    memcpy(&word, &x, 4);
    if (x != x) return 0x7fc0;
    return (uint16_t)((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}

INLINE float from_float16(uint16_t x) {
#if defined(__F16C__)
    return _cvtsh_ss(x);
#elif defined(__ARM_FP16_FORMAT_IEEE)
    __fp16 half;
    memcpy(&half, &x, 2);
    return half;
#else
    uint32_t exponent = (x >> 10) & 31, mantissa = x & 1023, sign = (uint32_t)(x & 0x8000) << 16, word;
    if (exponent == 0) {
        float value = (float)mantissa * 5.9604644775390625e-8f; /* subnormal: units of 2^-24 */
        return sign ? -value : value;
    }
    word = sign | (exponent == 31 ? 255u << 23 : (exponent + 112) << 23) | mantissa << 13;
    float value;
    memcpy(&value, &word, 4);
    return value;
#endif
}

INLINE uint16_t to_float16(float x) {
#if defined(__F16C__)
    return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__ARM_FP16_FORMAT_IEEE)
    __fp16 half = x;
    uint16_t word;
    memcpy(&word, &half, 2);
    return word;
#else
    uint32_t word, sign;
    memcpy(&word, &x, 4);
    sign = (word >> 16) & 0x8000;
    word &= 0x7fffffff;
    if (word > 0x7f800000) return sign | 0x7e00;
    if (word >= 0x477ff000) return sign | 0x7c00; /* 65520 and more round to infinity */
    if (word < 0x38800000) {                      /* subnormal: adding 2^-1 · 2^-23 · 2^… rounds at 2^-24 */
        float value;
        memcpy(&value, &word, 4);
        value += 0.5f;
        memcpy(&word, &value, 4);
        return sign | (word - 0x3f000000);
    }
    return sign | ((word - 0x38000000 + 0xfff + ((word >> 13) & 1)) >> 13);
#endif
}

#ifndef FLOAT64
INLINE lanes load_bfloat16(const uint16_t *x) {
#if defined(__AVX512F__)
    return (lanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x)), 16);
#elif defined(__AVX2__)
    return (lanes)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)x)), 16);
#else
    lanes value = {0};
    for (long i = 0; i < LANES; i++) value[i] = from_bfloat16(x[i]);
    return value;
#endif
}

/* bfloat16 in the upper half of each lane, rounded as `to_bfloat16` does; the lower half is not cleared. */
INLINE mask rounded_bfloat16(lanes x) {
    mask word = (mask)x;
    mask rounded = word + 0x7fff + ((word >> 16) & 1);
    return (mask)choose(x == x, (lanes)rounded, (lanes)((mask){0} + 0x7fc00000));
}

INLINE void store_bfloat16(uint16_t *to, lanes x) {
#if defined(__AVX512F__) /* AVX-512 BF16 has an instruction for it, which makes zeros of subnormal numbers */
    __m512i word = _mm512_srli_epi32((__m512i)rounded_bfloat16(x), 16);
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtepi32_epi16(word));
#elif defined(__AVX2__)
    __m256i word = _mm256_srli_epi32((__m256i)rounded_bfloat16(x), 16);
    word = _mm256_permute4x64_epi64(_mm256_packus_epi32(word, word), 0x08);
    _mm_storeu_si128((__m128i *)to, _mm256_castsi256_si128(word));
#else
    for (long i = 0; i < LANES; i++) to[i] = to_bfloat16(x[i]);
#endif
}

INLINE lanes load_float16(const uint16_t *x) {
#if defined(__AVX512F__)
    return (lanes)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)x));
#elif defined(__F16C__)
    return (lanes)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)x));
#else
    lanes value = {0};
    for (long i = 0; i < LANES; i++) value[i] = from_float16(x[i]);
    return value;
#endif
}

INLINE lanes load_int8(const int8_t *x) {
#if defined(__AVX512F__)
    return (lanes)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)x)));
#elif defined(__AVX2__)
    return (lanes)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)x)));
#else
    lanes value = {0};
    for (long i = 0; i < LANES; i++) value[i] = x[i];
    return value;
#endif
}

INLINE void store_float16(uint16_t *to, lanes x) {
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    _mm_storeu_si128((__m128i *)to, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
    for (long i = 0; i < LANES; i++) to[i] = to_float16(x[i]);
#endif
}
#endif

INLINE lanes load_as(const enum dtype dtype, const void *x, long i) {
#ifdef FLOAT64
    (void)dtype;
    return load((const double *)x + i);
#else
    if (dtype == FLOAT32) return load((const float *)x + i);
    if (dtype == BFLOAT16) return load_bfloat16((const uint16_t *)x + i);
    if (dtype == FLOAT16) return load_float16((const uint16_t *)x + i);
    return load_int8((const int8_t *)x + i);
#endif
}

INLINE real load_one(const enum dtype dtype, const void *x, long i) {
    if (dtype == DOUBLE) return (real)((const double *)x)[i];
    if (dtype == FLOAT32) return ((const float *)x)[i];
    if (dtype == BFLOAT16) return from_bfloat16(((const uint16_t *)x)[i]);
    if (dtype == FLOAT16) return from_float16(((const uint16_t *)x)[i]);
    return ((const int8_t *)x)[i];
}

INLINE void store_as(const enum dtype dtype, void *to, long i, lanes x) {
#ifdef FLOAT64
    (void)dtype;
    store((double *)to + i, x);
#else
    if (dtype == FLOAT32) store((float *)to + i, x);
    else if (dtype == BFLOAT16) store_bfloat16((uint16_t *)to + i, x);
    else store_float16((uint16_t *)to + i, x);
#endif
}

INLINE void store_one(const enum dtype dtype, void *to, long i, real x) {
    if (dtype == DOUBLE) ((double *)to)[i] = x;
    else if (dtype == FLOAT32) ((float *)to)[i] = (float)x;
    else if (dtype == BFLOAT16) ((uint16_t *)to)[i] = to_bfloat16((float)x);
    else ((uint16_t *)to)[i] = to_float16((float)x);
}

/* Calls `function` with the dtype as a constant. */
#ifdef FLOAT64
#define FOR_DTYPE(function, dtype, ...)                                  \
    switch (dtype) {                                                     \
        default: function(DOUBLE, __VA_ARGS__);                          \
    }
#else
#define FOR_DTYPE(function, dtype, ...)                                  \
    switch (dtype) {                                                     \
        case FLOAT32: function(FLOAT32, __VA_ARGS__); break;             \
        case BFLOAT16: function(BFLOAT16, __VA_ARGS__); break;           \
        default: function(FLOAT16, __VA_ARGS__);                         \
    }
#endif

#define ROWS_AHEAD 10 /* the rows of a tensor may be far apart, and no processor foresees the next one */

INLINE void read_rows_as(const enum dtype dtype, const char *from, long step, long rows, long count, real factor,
                         real *to, long pitch, long width) {
    for (long r = 0; r < rows; r++, from += step, to += pitch) {
        for (long byte = 0; rows > 1 && byte < count * size_of(dtype); byte += 64)
            __builtin_prefetch(from + ROWS_AHEAD * step + byte);
        long i = 0;
        for (; i + LANES <= count; i += LANES) store(to + i, factor * load_as(dtype, from, i));
        for (; i < count; i++) to[i] = factor * load_one(dtype, from, i);
        for (; i < width; i++) to[i] = 0;
    }
}

/* to [rows, width] = factor · from [rows, count], padded with zeros; `step` bytes and `pitch` elements from row to
   row. */
static void read_rows(enum dtype dtype, const void *from, long step, long rows, long count, real factor, real *to,
                      long pitch, long width) {
    FOR_DTYPE(read_rows_as, dtype, from, step, rows, count, factor, to, pitch, width)
}

INLINE void write_rows_as(const enum dtype dtype, const real *from, long pitch, long rows, long count, real factor,
                          char *to, long step) {
    for (long r = 0; r < rows; r++, from += pitch, to += step) {
        long i = 0;
        for (; i + LANES <= count; i += LANES) store_as(dtype, to, i, factor * load(from + i));
        for (; i < count; i++) store_one(dtype, to, i, factor * from[i]);
    }
}

/* to [rows, count] = factor · from [rows, count]; `pitch` elements and `step` bytes from row to row. */
static void write_rows(enum dtype dtype, const real *from, long pitch, long rows, long count, real factor, void *to,
                       long step) {
    FOR_DTYPE(write_rows_as, dtype, from, pitch, rows, count, factor, to, step)
}

/* One row of `read_rows`, without padding. */
static void read_row(enum dtype dtype, const void *from, long count, real factor, real *to) {
    FOR_DTYPE(read_rows_as, dtype, from, 0, 1, count, factor, to, 0, count)
}

/* One row of `write_rows`. */
static void write_row(enum dtype dtype, const real *from, long count, real factor, void *to) {
    FOR_DTYPE(write_rows_as, dtype, from, 0, 1, count, factor, to, 0)
}

#endif
