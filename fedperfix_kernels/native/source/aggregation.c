/* Aggregation of K clients' tensors, a piece of them at a time: means, robust means, distances and int8.

   A piece's sums lie in the first-level cache and every upload passes by once, a few KiB of a few rows at a time.
   All arithmetic is in float32. Clients are added in order, and sums over elements go piece by piece into float64: the
   bits depend on nothing but the input and the instruction set. */
#include "library.h"
#include "scratch.h"
#include "storage.h"

#define GROUP 8                /* rows that are added at a time: a sum is loaded and stored once for so many */
#define FEW_CLIENTS 16         /* whose values the sorting network keeps in registers */
#define AHEAD 1024             /* bytes of a row that are asked for ahead of their use */
#define CACHE_LINE 64
#define SORTED_BYTES 24576     /* of a tile of the sorting network, which stays in the first-level cache */
#define GRAM_BYTES 262144      /* of a tile of updates, which stays in the second-level cache */
#define STREAMED_BYTES 4194304 /* from this size on, a result goes around the caches */

/* A piece of one tensor. */
struct piece {
    const void *const *rows; /* [K] */
    long tensor, first, count;
};

static struct piece piece_of(const struct aggregation *call, int64_t item) {
    long low = 0, high = call->tensors; /* first_piece[low] ≤ item < first_piece[high] */
    while (high - low > 1) {
        long middle = (low + high) / 2;
        if (call->first_piece[middle] <= item) low = middle;
        else high = middle;
    }
    long first = (item - call->first_piece[low]) * call->piece;
    long count = least(call->piece, call->numel[low] - first);
    return (struct piece){call->rows + low * call->clients, low, first, count};
}

INLINE const void *from(enum dtype dtype, const void *row, long first) {
    return (const char *)row + first * size_of(dtype);
}

#if defined(__AVX512F__)
#define STREAM(to, x) _mm512_stream_si512((__m512i *)(to), _mm512_loadu_si512(x))
#elif defined(__AVX2__)
#define STREAM(to, x) _mm256_stream_si256((__m256i *)(to), _mm256_loadu_si256((const __m256i *)(x)))
#elif defined(__SSE2__)
#define STREAM(to, x) _mm_stream_si128((__m128i *)(to), _mm_loadu_si128((const __m128i *)(x)))
#endif

/* Copies around the caches: memory then need not be read before it is written. */
static void stream(char *to, const char *x, long bytes) {
    long i = 0;
#ifdef STREAM
    if ((uintptr_t)to % VECTOR_BYTES == 0) {
        for (; i + VECTOR_BYTES <= bytes; i += VECTOR_BYTES) STREAM(to + i, x + i);
        _mm_sfence();
    }
#endif
    memcpy(to + i, x + i, (size_t)(bytes - i));
}

/* A piece's results; `spare` has room for them. Those that would fit a cache are left there. */
static void write_piece(const struct aggregation *call, const struct piece *piece, const float *x, float *spare) {
    enum dtype dtype = (enum dtype)call->out_dtype;
    char *to = (char *)call->out[piece->tensor] + piece->first * size_of(dtype);
    if (call->numel[piece->tensor] * size_of(dtype) < STREAMED_BYTES) {
        write_row(dtype, x, piece->count, 1, to);
        return;
    }
    if (dtype != FLOAT32) write_row(dtype, x, piece->count, 1, spare);
    stream(to, (const char *)(dtype == FLOAT32 ? x : spare), piece->count * size_of(dtype));
}

/* The weighted mean -------------------------------------------------------------------------------------------- */

/* Asks for what lies AHEAD bytes further in each row; the hardware follows only so many rows by itself. */
INLINE void prefetch(const enum dtype dtype, const int rows, const void *const *x, long i) {
    UNROLL for (int g = 0; g < rows; g++) __builtin_prefetch((const char *)from(dtype, x[g], i) + AHEAD);
}

/* sum[i] += Σ_g weight[g] · (x_g[i] − center[i]), clients in order; without `shifted` there is no center. */
INLINE void add_rows(const enum dtype dtype, const int rows, const int shifted, const void *const *x, long first,
                     long count, const float *weight, const float *center, float *sum) {
    lanes factor[GROUP];
    UNROLL for (int g = 0; g < rows; g++) factor[g] = all(weight[g]);
    long i = 0;
    for (const long line = CACHE_LINE / size_of(dtype); i + LANES <= count; i += LANES) {
        if (i % line == 0) prefetch(dtype, rows, x, first + i);
        lanes total = load(sum + i), shift = shifted ? load(center + i) : all(0);
        UNROLL for (int g = 0; g < rows; g++) {
            lanes value = load_as(dtype, x[g], first + i);
            total += factor[g] * (shifted ? value - shift : value);
        }
        store(sum + i, total);
    }
    for (; i < count; i++)
        for (int g = 0; g < rows; g++) {
            float value = load_one(dtype, x[g], first + i);
            sum[i] += weight[g] * (shifted ? value - center[i] : value);
        }
}

/* Rows that are taken at a time when so many are left: a power of two. */
static int group_of(long left) {
    int rows = GROUP;
    while (rows > left) rows /= 2;
    return rows;
}

#define FOR_GROUP(call, dtype, rows, ...)                          \
    switch (rows) {                                                \
        case 8: call(dtype, 8, __VA_ARGS__); break;                \
        case 4: call(dtype, 4, __VA_ARGS__); break;                \
        case 2: call(dtype, 2, __VA_ARGS__); break;                \
        default: call(dtype, 1, __VA_ARGS__);                      \
    }
#define FOR_FLOATS(call, dtype, rows, ...)                                        \
    case FLOAT32: FOR_GROUP(call, FLOAT32, rows, __VA_ARGS__) break;              \
    case BFLOAT16: FOR_GROUP(call, BFLOAT16, rows, __VA_ARGS__) break;            \
    case FLOAT16: FOR_GROUP(call, FLOAT16, rows, __VA_ARGS__) break;

static void add(enum dtype dtype, int rows, const void *const *x, long first, long count, const float *weight,
                float *sum) {
    switch (dtype) {
        FOR_FLOATS(add_rows, dtype, rows, 0, x, first, count, weight, 0, sum)
        default: FOR_GROUP(add_rows, INT8, rows, 0, x, first, count, weight, 0, sum)
    }
}

static void add_shifted(enum dtype dtype, int rows, const void *const *x, long first, long count,
                        const float *weight, const float *center, float *sum) {
    switch (dtype) {
        FOR_FLOATS(add_rows, dtype, rows, 1, x, first, count, weight, center, sum)
        default: break; /* int8 has no center */
    }
}

/* How many of the next elements have the same weights: one block where each has its own, else all of a layer. */
static long same_weights(const struct aggregation *call, long first, long count) {
    if (!call->block_layer && !call->scales) return count;
    long block = first / BLOCK, length = BLOCK;
    while (!call->scales && length < count && call->block_layer[block] == call->block_layer[block + length / BLOCK])
        length += BLOCK;
    return least(length, count);
}

/* Clients `client` and on: weight = share of the layer · scale of the block. */
static void weights_of(const struct aggregation *call, long tensor, long block, long client, int rows,
                       float *weight) {
    long layer = call->block_layer ? call->block_layer[block] : tensor;
    for (int g = 0; g < rows; g++) {
        float scale = call->scales ? call->scales[(client + g) * call->blocks + block] : 1;
        weight[g] = call->shares[(client + g) * call->layers + layer] * scale;
    }
}

/* Whether all are finite: x − x is 0, or NaN for NaN and Inf. */
static int all_finite(const float *x, long count) {
    lanes difference = all(0);
    long i = 0;
    for (; i + LANES <= count; i += LANES) difference += load(x + i) - load(x + i);
    float sum = sum_of(difference);
    for (; i < count; i++) sum += x[i] - x[i];
    return sum == 0;
}

/* Sets the flags of the clients with NaN or Inf in a piece whose sum is not finite: 0 · NaN is NaN, so a finite sum
   proves every term finite. */
static void name_nonfinite(const struct aggregation *call, const struct piece *piece, float *row) {
    for (long k = 0; k < call->clients; k++) {
        long count = piece->count;
        const float *x = row;
        if (call->scales) {
            x = call->scales + k * call->blocks + piece->first / BLOCK;
            count = (count + BLOCK - 1) / BLOCK;
        } else {
            enum dtype dtype = (enum dtype)call->dtype;
            read_row(dtype, from(dtype, piece->rows[k], piece->first), count, 1, row);
        }
        if (!all_finite(x, count)) __atomic_store_n(call->nonfinite + k, 1, __ATOMIC_RELAXED);
    }
}

static int64_t weighted_mean_scratch(const void *given) {
    return 3 * (((const struct aggregation *)given)->piece * (long)sizeof(float) + 64);
}

/* out = center + Σ_k weight_k · (x_k − center) + std · noise, center and noise being optional. Item: a piece. */
static void weighted_mean(const void *given, int64_t item, char *scratch) {
    struct memory memory = {scratch, 0};
    const struct aggregation *call = given;
    struct piece piece = piece_of(call, item);
    float *sum = take(&memory, call->piece), *spare = take(&memory, call->piece);
    float *center = call->center ? take(&memory, call->piece) : 0;
    enum dtype dtype = (enum dtype)call->dtype;
    memset(sum, 0, piece.count * sizeof(float));
    if (center) read_row(dtype, from(dtype, call->center, piece.first), piece.count, 1, center);
    int rows;
    for (long k = 0; k < call->clients; k += rows) {
        rows = group_of(call->clients - k);
        for (long start = 0, length; start < piece.count; start += length) {
            float weight[GROUP];
            length = same_weights(call, piece.first + start, piece.count - start);
            weights_of(call, piece.tensor, (piece.first + start) / BLOCK, k, rows, weight);
            if (center)
                add_shifted(dtype, rows, piece.rows + k, piece.first + start, length, weight, center + start,
                            sum + start);
            else
                add(dtype, rows, piece.rows + k, piece.first + start, length, weight, sum + start);
        }
    }
    if (call->nonfinite && !all_finite(sum, piece.count)) name_nonfinite(call, &piece, spare);
    for (long i = 0; center && i < piece.count; i++) sum[i] += center[i];
    for (long i = 0; call->noise && i < piece.count; i++) sum[i] += call->std * call->noise[piece.first + i];
    write_piece(call, &piece, sum, spare);
}

/* The trimmed mean --------------------------------------------------------------------------------------------- */

/* Batcher's odd-even merge sort of 16 as `network.py` lists it: it merges sorted runs of 1, 2, 4 and 8. For fewer
   rows the pairs that reach beyond them are left out. */
#define MERGES_OF_1(C)                                                    \
    C(0, 1) C(2, 3) C(4, 5) C(6, 7) C(8, 9) C(10, 11) C(12, 13) C(14, 15)
#define MERGES_OF_2(C)                                                                             \
    C(0, 2) C(1, 3) C(4, 6) C(5, 7) C(8, 10) C(9, 11) C(12, 14) C(13, 15) C(1, 2) C(5, 6) C(9, 10) \
    C(13, 14)
#define MERGES_OF_4(C)                                                                              \
    C(0, 4) C(1, 5) C(2, 6) C(3, 7) C(8, 12) C(9, 13) C(10, 14) C(11, 15) C(2, 4) C(3, 5) C(10, 12) \
    C(11, 13) C(1, 2) C(3, 4) C(5, 6) C(9, 10) C(11, 12) C(13, 14)
#define MERGES_OF_8(C)                                                                             \
    C(0, 8) C(1, 9) C(2, 10) C(3, 11) C(4, 12) C(5, 13) C(6, 14) C(7, 15) C(4, 8) C(5, 9) C(6, 10) \
    C(7, 11) C(2, 4) C(3, 5) C(6, 8) C(7, 9) C(10, 12) C(11, 13) C(1, 2) C(3, 4) C(5, 6) C(7, 8)   \
    C(9, 10) C(11, 12) C(13, 14)

#define LANES_NUMBER (VECTOR_BYTES / 4)

/* Vectors of a row of the tile of keys. */
static long sorted_vectors(const struct aggregation *call) {
    long vectors = SORTED_BYTES / VECTOR_BYTES / call->clients;
    return vectors < 4 ? 4 : vectors;
}

/* float32: a number is its own key, kept as bits. */
INLINE mask whole_load(const void *x, long i) { return (mask)load((const float *)x + i); }
INLINE mask whole_key(mask x) { return x; }
INLINE mask whole_is_nan(enum dtype dtype, mask x) {
    (void)dtype;
    return (lanes)x != (lanes)x;
}
INLINE mask whole_smaller(mask x, mask y) { return (mask)smaller((lanes)x, (lanes)y); }
INLINE mask whole_larger(mask x, mask y) { return (mask)larger((lanes)x, (lanes)y); }
INLINE void whole_add(enum dtype dtype, mask x, mask nan, lanes *sum) {
    (void)dtype;
    sum[0] += (lanes)(x | nan);
}

#define NETWORK(name) whole_##name
#define KEYS mask
#define WIDTH LANES_NUMBER
#define HIGHEST ((mask)all(INFINITY))
#include "network.h"

/* bfloat16 and float16: their bits as a signed integer, with the order of negative numbers turned round. */
typedef int16_t halves __attribute__((vector_size(VECTOR_BYTES)));
typedef int16_t halves_in_memory __attribute__((vector_size(VECTOR_BYTES), aligned(2), may_alias));

INLINE halves half_load(const void *x, long i) { return *(const halves_in_memory *)((const uint16_t *)x + i); }
INLINE halves half_key(halves x) { return x ^ ((x >> 15) & 0x7fff); }
INLINE halves half_is_nan(enum dtype dtype, halves x) {
    return (halves)((x & 0x7fff) > (int16_t)(dtype == BFLOAT16 ? 0x7f80 : 0x7c00));
}

INLINE halves half_smaller(halves x, halves y) {
#if defined(__AVX512BW__)
    return (halves)_mm512_min_epi16((__m512i)x, (__m512i)y);
#elif defined(__AVX2__)
    return (halves)_mm256_min_epi16((__m256i)x, (__m256i)y);
#elif defined(__SSE2__)
    return (halves)_mm_min_epi16((__m128i)x, (__m128i)y);
#elif defined(__ARM_NEON)
    return (halves)vminq_s16((int16x8_t)x, (int16x8_t)y);
#else
    halves less = x < y;
    return (less & x) | (~less & y);
#endif
}

INLINE halves half_larger(halves x, halves y) {
#if defined(__AVX512BW__)
    return (halves)_mm512_max_epi16((__m512i)x, (__m512i)y);
#elif defined(__AVX2__)
    return (halves)_mm256_max_epi16((__m256i)x, (__m256i)y);
#elif defined(__SSE2__)
    return (halves)_mm_max_epi16((__m128i)x, (__m128i)y);
#elif defined(__ARM_NEON)
    return (halves)vmaxq_s16((int16x8_t)x, (int16x8_t)y);
#else
    halves less = x < y;
    return (less & y) | (~less & x);
#endif
}

INLINE void half_add(enum dtype dtype, halves x, halves nan, lanes *sum) {
    halves value = half_key(x) | nan; /* a key's key is the number */
    uint16_t number[2 * LANES_NUMBER];
    memcpy(number, &value, sizeof(value));
    sum[0] += dtype == BFLOAT16 ? load_bfloat16(number) : load_float16(number);
    sum[1] += dtype == BFLOAT16 ? load_bfloat16(number + LANES) : load_float16(number + LANES);
}

#define NETWORK(name) half_##name
#define KEYS halves
#define WIDTH (2 * LANES_NUMBER)
#define HIGHEST ((halves){0} + (int16_t)0x7fff)
#include "network.h"

static void trim_rows(const struct aggregation *call, const void *const *rows, long first, long count, void *tile,
                      float *to) {
    if (call->dtype == FLOAT32) whole_trim(call, rows, first, count, tile, to);
    else half_trim(call, rows, first, count, tile, to);
}

static int64_t trimmed_mean_scratch(const void *given) {
    const struct aggregation *call = given;
    long tile = (call->clients + 1) * sorted_vectors(call) * VECTOR_BYTES;
    return tile + call->clients * (VECTOR_BYTES + 8) + 2 * call->piece * (long)sizeof(float) + 5 * 64;
}

/* Item: a piece. What is left beyond whole vectors goes through a copy with zeros behind it. */
static void trimmed_mean(const void *given, int64_t item, char *scratch) {
    struct memory memory = {scratch, 0};
    const struct aggregation *call = given;
    struct piece piece = piece_of(call, item);
    enum dtype dtype = (enum dtype)call->dtype;
    long size = size_of(dtype), width = VECTOR_BYTES / size, whole = piece.count / width * width;
    float *mean = take(&memory, call->piece), *spare = take(&memory, call->piece);
    void *tile = take(&memory, (call->clients + 1) * sorted_vectors(call) * LANES);
    trim_rows(call, piece.rows, piece.first, whole, tile, mean);
    if (whole < piece.count) {
        char *copies = (char *)take(&memory, call->clients * LANES);
        const void **rows = (const void **)take(&memory, call->clients * 2);
        memset(copies, 0, call->clients * VECTOR_BYTES);
        for (long k = 0; k < call->clients; k++) {
            rows[k] = copies + k * VECTOR_BYTES;
            memcpy(copies + k * VECTOR_BYTES, from(dtype, piece.rows[k], piece.first + whole),
                   (piece.count - whole) * size);
        }
        trim_rows(call, rows, 0, width, tile, mean + whole);
    }
    write_piece(call, &piece, mean, spare);
}

/* Norms and inner products of updates -------------------------------------------------------------------------- */

/* norms[g] += Σ (x_g[i] − center[i])², in float32 within a block. */
INLINE void add_squares(const enum dtype dtype, const int rows, const void *const *x, long first, long count,
                        const float *center, double *norms) {
    lanes sum[GROUP];
    UNROLL for (int g = 0; g < rows; g++) sum[g] = all(0);
    long i = 0;
    for (const long line = CACHE_LINE / size_of(dtype); i + LANES <= count; i += LANES) {
        if (i % line == 0) prefetch(dtype, rows, x, first + i);
        UNROLL for (int g = 0; g < rows; g++) {
            lanes update = load_as(dtype, x[g], first + i) - load(center + i);
            sum[g] += update * update;
        }
    }
    UNROLL for (int g = 0; g < rows; g++) {
        norms[g] += sum_of(sum[g]);
        for (long j = i; j < count; j++) {
            float update = load_one(dtype, x[g], first + j) - center[j];
            norms[g] += update * update;
        }
    }
}

static int64_t squared_norms_scratch(const void *given) {
    return ((const struct aggregation *)given)->piece * (long)sizeof(float) + 64;
}

/* partial [pieces, K]: Σ (x_k − center)² over each piece. Item: a piece. */
static void squared_norms(const void *given, int64_t item, char *scratch) {
    struct memory memory = {scratch, 0};
    const struct aggregation *call = given;
    struct piece piece = piece_of(call, item);
    float *center = take(&memory, call->piece);
    double *norms = call->partial + item * call->clients;
    enum dtype dtype = (enum dtype)call->dtype;
    memset(norms, 0, call->clients * sizeof(double));
    read_row(dtype, from(dtype, call->center, piece.first), piece.count, 1, center);
    int rows;
    for (long k = 0; k < call->clients; k += rows) {
        rows = group_of(call->clients - k);
        for (long start = 0; start < piece.count; start += BLOCK) {
            long count = least(BLOCK, piece.count - start), first = piece.first + start;
            switch (dtype) {
                FOR_FLOATS(add_squares, dtype, rows, piece.rows + k, first, count, center + start, norms + k)
                default: break;
            }
        }
    }
}

/* Columns of the tile of updates. */
static long gram_columns(const struct aggregation *call) {
    long columns = GRAM_BYTES / (long)sizeof(float) / call->clients / LANES * LANES;
    return columns < 4 * LANES ? 4 * LANES : least(columns, BLOCK / 2);
}

static int64_t gram_scratch(const void *given) {
    return (((const struct aggregation *)given)->clients + 1) * gram_columns(given) * (long)sizeof(float) + 128;
}

/* to[i] = x[i] − center[i], zeros up to whole vectors */
INLINE void read_update(const enum dtype dtype, const void *x, const float *center, long count, float *to) {
    long i = 0;
    for (; i + LANES <= count; i += LANES) store(to + i, load_as(dtype, x, i) - load(center + i));
    for (long j = i; j < rounded_up(count, LANES); j++) to[j] = j < count ? load_one(dtype, x, j) - center[j] : 0;
}

/* tile [K, columns]: the updates of all clients */
static void read_updates(const struct aggregation *call, const struct piece *piece, long start, long count,
                         long columns, const float *center, float *tile) {
    for (long k = 0; k < call->clients; k++, tile += columns) {
        const void *x = from((enum dtype)call->dtype, piece->rows[k], piece->first + start);
        if (call->dtype == FLOAT32) read_update(FLOAT32, x, center, count, tile);
        else if (call->dtype == BFLOAT16) read_update(BFLOAT16, x, center, count, tile);
        else read_update(FLOAT16, x, center, count, tile);
    }
}

/* gram[a, b] += x_a · y_b for `rows` by `others` rows of a tile; on the diagonal, where y is x, only for a ≥ b.
   Meanwhile memory brings two rows of the next tile, of elements of `bytes`, from `ahead` on. */
INLINE void add_products(const int rows, const int others, const int diagonal, const float *x, const float *y,
                         long columns, long count, const char *const *ahead, long bytes, double *gram,
                         long clients) {
    lanes sum[4][4];
    UNROLL for (int a = 0; a < rows; a++)
        UNROLL for (int b = 0; b < others; b++) sum[a][b] = all(0);
    for (long i = 0; i < count; i += LANES) {
        lanes other[4];
        __builtin_prefetch(ahead[i / LANES % 2] + i * bytes);
        UNROLL for (int b = 0; b < others; b++) other[b] = load(y + b * columns + i);
        UNROLL for (int a = 0; a < rows; a++) {
            lanes own = diagonal ? other[a] : load(x + a * columns + i);
            UNROLL for (int b = 0; b < others; b++)
                if (!diagonal || a >= b) sum[a][b] += own * other[b];
        }
    }
    UNROLL for (int a = 0; a < rows; a++)
        UNROLL for (int b = 0; b < others; b++)
            if (!diagonal || a >= b) gram[a * clients + b] += sum_of(sum[a][b]);
}

/* The products of all pairs of rows a ≥ b of a tile; `next` is where the next tile starts. */
static void multiply_tile(const struct aggregation *call, const struct piece *piece, long next, const float *tile,
                          long columns, long count, double *gram) {
    long clients = call->clients, bytes = size_of((enum dtype)call->dtype), asked = 0;
    for (long a = 0; a < clients; a += 4)
        for (long b = 0, others; b <= a; b += others, asked += 2) {
            const float *x = tile + a * columns, *y = tile + b * columns;
            double *to = gram + a * clients + b;
            const char *ahead[2];
            for (int i = 0; i < 2; i++)
                ahead[i] = (const char *)piece->rows[least(asked + i, clients - 1)] + next * bytes;
            others = a == b ? 4 : 2;
            if (clients - a >= 4 && a == b)
                add_products(4, 4, 1, x, y, columns, count, ahead, bytes, to, clients);
            else if (clients - a >= 4)
                add_products(4, 2, 0, x, y, columns, count, ahead, bytes, to, clients);
            else
                for (long i = 0; i < clients - a; i++)
                    for (long j = 0; j < least(others, a + i - b + 1); j++)
                        add_products(1, 1, 0, x + i * columns, y + j * columns, columns, count, ahead, bytes,
                                     to + i * clients + j, clients);
        }
}

/* partial [pieces, K, K]: (x_j − center) · (x_k − center) over each piece, symmetric. Item: a piece. */
static void gram(const void *given, int64_t item, char *scratch) {
    struct memory memory = {scratch, 0};
    const struct aggregation *call = given;
    struct piece piece = piece_of(call, item);
    long columns = gram_columns(call), clients = call->clients;
    float *tile = take(&memory, clients * columns), *center = take(&memory, columns);
    double *products = call->partial + item * clients * clients;
    enum dtype dtype = (enum dtype)call->dtype;
    memset(products, 0, clients * clients * sizeof(double));
    for (long start = 0; start < piece.count; start += columns) {
        long count = least(columns, piece.count - start), next = piece.first + start + columns;
        read_row(dtype, from(dtype, call->center, piece.first + start), count, 1, center);
        read_updates(call, &piece, start, count, columns, center, tile);
        for (long i = 0; i < columns * size_of(dtype); i += CACHE_LINE)
            __builtin_prefetch((const char *)from(dtype, call->center, next) + i);
        multiply_tile(call, &piece, next, tile, columns, count, products);
    }
    for (long a = 0; a < clients; a++)
        for (long b = a + 1; b < clients; b++) products[a * clients + b] = products[b * clients + a];
}

/* Int8 --------------------------------------------------------------------------------------------------------- */

static int64_t quantize_scratch(const void *given) {
    (void)given;
    return BLOCK * (long)sizeof(float) + 64;
}

/* The largest absolute value of a block [whole vectors]; NaN or Inf where there is one. */
static float largest_of(const float *x, long count) {
    lanes most = all(0), difference = all(0);
    for (long i = 0; i < count; i += LANES) {
        lanes value = load(x + i);
        most = larger((lanes)((mask)value & 0x7fffffff), most);
        difference += value - value;
    }
    float largest = 0;
    for (long i = 0; i < LANES; i++) largest = most[i] > largest ? most[i] : largest;
    return largest + sum_of(difference);
}

/* values = x / scale, rounded to nearest, ties to even; scale = max|block| / 127. A block with NaN or Inf has zeros
   and a scale of NaN. Item: a piece. */
static void quantize(const void *given, int64_t item, char *scratch) {
    struct memory memory = {scratch, 0};
    const struct aggregation *call = given;
    struct piece piece = piece_of(call, item);
    float *x = take(&memory, BLOCK);
    enum dtype dtype = (enum dtype)call->dtype;
    const float rounding = 12582912.0f; /* 1.5 · 2^23: added and subtracted, it leaves the nearest integer */
    for (long first = piece.first; first < piece.first + piece.count; first += BLOCK) {
        long count = least(BLOCK, piece.first + piece.count - first);
        read_row(dtype, from(dtype, piece.rows[0], first), count, 1, x);
        for (long i = count; i < rounded_up(count, LANES); i++) x[i] = 0;
        float scale = largest_of(x, count) / 127;
        int finite = scale - scale == 0;
        if (finite && scale < 1.17549435e-38f) scale = 1.17549435e-38f; /* a block may be zero */
        int8_t *to = call->values + first;
        for (long i = 0; finite && i < count; i++) to[i] = (int8_t)(int)((x[i] / scale + rounding) - rounding);
        if (!finite) memset(to, 0, count);
        call->value_scales[first / BLOCK] = finite ? scale : NAN;
    }
}
