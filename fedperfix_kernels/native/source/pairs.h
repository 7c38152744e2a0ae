/* bfloat16 products of pairs: each 32-bit lane of an operand holds two neighbours along the summed dimension.

       c[i, j] (+)= Σ_t a[i, 2t] · b[2t, j] + a[i, 2t+1] · b[2t+1, j]              accumulated in float32

   One instruction multiplies and adds both (AVX-512 BF16), or a whole tile of 16 x 16 x 32 (AMX). Included by
   attention.c where the instruction set has one of them. EMULATE_PAIRS and EMULATE_TILES compute the same with plain
   vectors and loops, so that operands and indices are tested on any processor. */
#ifndef FEDPERFIX_PAIRS_H
#define FEDPERFIX_PAIRS_H

#include "storage.h"

typedef int32_t pair;
typedef pair pairs_in_memory __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));

INLINE mask pair_load(const pair *x) { return *(const pairs_in_memory *)x; }
INLINE mask pair_all(pair x) { return x - (mask){0}; }

#if defined(__AVX512BF16__)
INLINE lanes pair_multiply(lanes c, mask a, mask b) {
    return (lanes)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
}
#else
INLINE lanes pair_multiply(lanes c, mask a, mask b) {
    const mask upper = (mask){0} + (int32_t)0xffff0000;
    c = c + (lanes)(a << 16) * (lanes)(b << 16);
    return c + (lanes)(a & upper) * (lanes)(b & upper);
}
#endif

#if defined(__AMX_BF16__) || defined(EMULATE_TILES)
#define TILES
#define GRAIN 32 /* operands are padded with zeros to whole tiles */
#else
#define GRAIN 2
#define PRODUCT(name) pair_##name
#define ELEMENT pair
#define OPERAND mask
#define MULTIPLY(c, a, b) pair_multiply(c, a, b)
#include "product.h"
#endif

#ifdef TILES
#ifdef __AMX_BF16__
#define TILE_ZERO(tile) _tile_zero(tile)
#define TILE_LOAD(tile, from, row) _tile_loadd(tile, from, (row) * 4)
#define TILE_STORE(tile, to, row) _tile_stored(tile, to, (row) * 4)
#define TILE_MULTIPLY(c, a, b) _tile_dpbf16ps(c, a, b)

/* Eight tiles of 16 rows of 64 bytes, for the calling thread. */
static void tiles_begin(void) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } __attribute__((aligned(64))) shape = {.palette = 1};
    for (int i = 0; i < 8; i++) shape.row_bytes[i] = 64, shape.rows[i] = 16;
    _tile_loadconfig(&shape);
}

static void tiles_end(void) { _tile_release(); }
#else
static _Thread_local union {
    float sum[16][16];
    pair word[16][16];
} tiles[8];

static void tile_load(int tile, const void *from, long row) {
    for (long i = 0; i < 16; i++) memcpy(tiles[tile].word[i], (const char *)from + i * row * 4, 64);
}

static void tile_store(int tile, void *to, long row) {
    for (long i = 0; i < 16; i++) memcpy((char *)to + i * row * 4, tiles[tile].word[i], 64);
}

static void tile_multiply(int c, int a, int b) {
    for (long i = 0; i < 16; i++)
        for (long t = 0; t < 16; t++)
            for (long j = 0; j < 16; j++) {
                uint32_t x = (uint32_t)tiles[a].word[i][t], y = (uint32_t)tiles[b].word[t][j];
                tiles[c].sum[i][j] += from_bfloat16((uint16_t)x) * from_bfloat16((uint16_t)y);
                tiles[c].sum[i][j] += from_bfloat16((uint16_t)(x >> 16)) * from_bfloat16((uint16_t)(y >> 16));
            }
}

#define TILE_ZERO(tile) memset(&tiles[tile], 0, sizeof(tiles[tile]))
#define TILE_LOAD(tile, from, row) tile_load(tile, from, row)
#define TILE_STORE(tile, to, row) tile_store(tile, to, row)
#define TILE_MULTIPLY(c, a, b) tile_multiply(c, a, b)
static void tiles_begin(void) {}
static void tiles_end(void) {}
#endif

/* One or two tiles of rows by one or two of columns; `tall` and `wide` are constants where this is called. */
INLINE void tile_block(const int tall, const int wide, long depth, const pair *a, long a_row, const pair *b,
                       long b_step, real *c, long c_row, int add) {
    if (add) {
        TILE_LOAD(0, c, c_row);
        if (wide) TILE_LOAD(1, c + 16, c_row);
        if (tall) TILE_LOAD(2, c + 16 * c_row, c_row);
        if (tall && wide) TILE_LOAD(3, c + 16 * c_row + 16, c_row);
    } else {
        TILE_ZERO(0);
        TILE_ZERO(1);
        TILE_ZERO(2);
        TILE_ZERO(3);
    }
    for (long t = 0; t < depth; t += 16, a += 16, b += 16 * b_step) {
        TILE_LOAD(4, a, a_row);
        TILE_LOAD(6, b, b_step);
        TILE_MULTIPLY(0, 4, 6);
        if (wide) TILE_LOAD(7, b + 16, b_step);
        if (wide) TILE_MULTIPLY(1, 4, 7);
        if (tall) TILE_LOAD(5, a + 16 * a_row, a_row);
        if (tall) TILE_MULTIPLY(2, 5, 6);
        if (tall && wide) TILE_MULTIPLY(3, 5, 7);
    }
    TILE_STORE(0, c, c_row);
    if (wide) TILE_STORE(1, c + 16, c_row);
    if (tall) TILE_STORE(2, c + 16 * c_row, c_row);
    if (tall && wide) TILE_STORE(3, c + 16 * c_row + 16, c_row);
}

static void pair_product(long rows, long columns, long depth, const pair *a, long a_row, long a_step, const pair *b,
                         long b_step, real *c, long c_row, const real *scale, int add) {
    (void)a_step, (void)scale; /* 1 and NULL: a tile's row is contiguous */
    for (long j = 0; j < columns; j += 32)
        for (long i = 0; i < rows; i += 32) {
            const pair *from = a + i * a_row;
            real *to = c + i * c_row + j;
            if (i + 16 < rows && j + 16 < columns)
                tile_block(1, 1, depth, from, a_row, b + j, b_step, to, c_row, add);
            else if (i + 16 < rows)
                tile_block(1, 0, depth, from, a_row, b + j, b_step, to, c_row, add);
            else if (j + 16 < columns)
                tile_block(0, 1, depth, from, a_row, b + j, b_step, to, c_row, add);
            else
                tile_block(0, 0, depth, from, a_row, b + j, b_step, to, c_row, add);
        }
}
#else
static void tiles_begin(void) {}
static void tiles_end(void) {}
#endif

/* to[r/2, c] = (from[r, c], from[r+1, c]): neighbouring rows in one lane. [rows, columns] float32, zeros from `count`
   rows on; columns is a multiple of LANES. */
static void pair_rows(const real *from, long from_row, long rows, long count, long columns, pair *to, long to_row) {
    const mask upper = (mask){0} + (int32_t)0xffff0000;
    for (long r = 0; r < rows; r += 2, to += to_row)
        for (long c = 0; c < columns; c += LANES) {
            lanes even = r < count ? load(from + r * from_row + c) : all(0);
            lanes odd = r + 1 < count ? load(from + (r + 1) * from_row + c) : all(0);
            mask low = (rounded_bfloat16(even) >> 16) & ~upper;
            *(pairs_in_memory *)(to + c) = low | (rounded_bfloat16(odd) & upper);
        }
}

/* LANES numbers as bfloat16. The products take subnormal numbers for zero, as this instruction does. */
INLINE void narrow(uint16_t *to, lanes x) {
#if defined(__AVX512BF16__)
    _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh((__m512)x));
#else
    store_bfloat16(to, x);
#endif
}

/* to[r, c/2] = (from[r, c], from[r, c+1]): neighbouring columns in one lane, as bfloat16 lies in memory. */
static void pair_columns(const real *from, long from_row, long rows, long columns, pair *to, long to_row) {
    for (long r = 0; r < rows; r++) {
        uint16_t *half = (uint16_t *)(to + r * to_row);
        for (long c = 0; c < columns; c += LANES) narrow(half + c, load(from + r * from_row + c));
    }
}

#endif
