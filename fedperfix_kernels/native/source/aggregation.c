/* Aggregation of K clients' tensors, a piece of them at a time: means, robust means, distances and int8.

   A piece's sums lie in the first-level cache and every upload passes by once, a few KiB of a few rows at a time.
   All arithmetic is in float32. Clients are added in order, and sums over elements go piece by piece into float64, so
   that the bits depend on nothing but the input and the instruction set. */
#include "library.h"
#include "storage.h"

#define GROUP 4          /* rows that are added at a time: a sum is loaded and stored once for so many */
#define SORTED_BYTES 24576 /* of a tile of the sorting network, which stays in the first-level cache */
#define GRAM_BYTES 262144  /* of a tile of updates, which stays in the second-level cache */

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
    return (struct piece){call->rows + low * call->clients, low, first, least(call->piece, call->numel[low] - first)};
}

INLINE const void *from(enum dtype dtype, const void *row, long first) {
    return (const char *)row + first * size_of(dtype);
}

INLINE lanes load_lanes(enum dtype dtype, const void *x, long i) {
    if (dtype == FLOAT32) return load((const float *)x + i);
    if (dtype == BFLOAT16) return load_bfloat16((const uint16_t *)x + i);
    if (dtype == FLOAT16) return load_float16((const uint16_t *)x + i);
    return load_int8((const int8_t *)x + i);
}

INLINE float load_one(enum dtype dtype, const void *x, long i) {
    if (dtype == FLOAT32) return ((const float *)x)[i];
    if (dtype == BFLOAT16) return from_bfloat16(((const uint16_t *)x)[i]);
    if (dtype == FLOAT16) return from_float16(((const uint16_t *)x)[i]);
    return ((const int8_t *)x)[i];
}

/* The weighted mean ----------------------------------------------------------------------------------------------- */

/* sum[i] += Σ_g weight[g] · (x_g[i] − center[i]), clients in order; without `shifted` there is no center. */
INLINE void add_rows(const enum dtype dtype, const int rows, const int shifted, const void *const *x, long first,
                     long count, const float *weight, const float *center, float *sum) {
    lanes factor[GROUP];
    UNROLL for (int g = 0; g < rows; g++) factor[g] = all(weight[g]);
    long i = 0;
    for (; i + LANES <= count; i += LANES) {
        lanes total = load(sum + i), shift = shifted ? load(center + i) : all(0);
        UNROLL for (int g = 0; g < rows; g++) {
            lanes value = load_lanes(dtype, x[g], first + i);
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

#define ADD(dtype)                                                                                \
    case dtype:                                                                                   \
        if (rows == GROUP && center) add_rows(dtype, GROUP, 1, x, first, count, weight, center, sum); \
        else if (rows == GROUP) add_rows(dtype, GROUP, 0, x, first, count, weight, center, sum);  \
        else if (center) add_rows(dtype, 1, 1, x, first, count, weight, center, sum);             \
        else add_rows(dtype, 1, 0, x, first, count, weight, center, sum);                         \
        break;

static void add(enum dtype dtype, int rows, const void *const *x, long first, long count, const float *weight,
                const float *center, float *sum) {
    switch (dtype) {
        ADD(FLOAT32)
        ADD(BFLOAT16)
        ADD(FLOAT16)
        default: ADD(INT8)
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
static void weights_of(const struct aggregation *call, long tensor, long block, long client, int rows, float *weight) {
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

/* Sets the flags of the clients with NaN or Inf in a piece. Called where the sum is not finite: 0 · NaN is NaN, so a
   finite sum proves every term finite. */
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
    return 2 * (((const struct aggregation *)given)->piece * (long)sizeof(float) + 64);
}

/* out = center + Σ_k weight_k · (x_k − center) + std · noise, center and noise being optional. Item: a piece. */
static void weighted_mean(const void *given, int64_t item, char *scratch) {
    const struct aggregation *call = given;
    struct piece piece = piece_of(call, item);
    float *sum = take(&scratch, call->piece), *center = call->center ? take(&scratch, call->piece) : 0;
    enum dtype dtype = (enum dtype)call->dtype, out_dtype = (enum dtype)call->out_dtype;
    memset(sum, 0, piece.count * sizeof(float));
    if (center) read_row(dtype, from(dtype, call->center, piece.first), piece.count, 1, center);
    int rows;
    for (long k = 0; k < call->clients; k += rows) {
        rows = call->clients - k >= GROUP ? GROUP : 1;
        for (long start = 0, length; start < piece.count; start += length) {
            float weight[GROUP];
            length = same_weights(call, piece.first + start, piece.count - start);
            weights_of(call, piece.tensor, (piece.first + start) / BLOCK, k, rows, weight);
            add(dtype, rows, piece.rows + k, piece.first + start, length, weight, center ? center + start : 0,
                sum + start);
        }
    }
    if (call->nonfinite && !all_finite(sum, piece.count)) {
        float *row = take(&scratch, call->piece);
        name_nonfinite(call, &piece, row);
    }
    for (long i = 0; center && i < piece.count; i++) sum[i] += center[i];
    for (long i = 0; call->noise && i < piece.count; i++) sum[i] += call->std * call->noise[piece.first + i];
    char *out = (char *)call->out[piece.tensor] + piece.first * size_of(out_dtype);
    write_row(out_dtype, sum, piece.count, 1, out);
}

/* The trimmed mean ------------------------------------------------------------------------------------------------ */

static long sorted_columns(const struct aggregation *call) {
    long columns = SORTED_BYTES / (long)sizeof(float) / call->clients / LANES * LANES;
    return columns < 4 * LANES ? 4 * LANES : least(columns, BLOCK);
}

static int64_t trimmed_mean_scratch(const void *given) {
    return (((const struct aggregation *)given)->clients + 1) * sorted_columns(given) * (long)sizeof(float) + 128;
}

/* tile [K, columns]: the rows' elements as float32, zeros up to whole vectors; notes coordinates where one is NaN. */
static void read_sorted(const struct aggregation *call, const struct piece *piece, long start, long count,
                        long columns, float *tile, float *poison) {
    enum dtype dtype = (enum dtype)call->dtype;
    memset(poison, 0, columns * sizeof(float));
    for (long k = 0; k < call->clients; k++) {
        float *row = tile + k * columns;
        read_row(dtype, from(dtype, piece->rows[k], piece->first + start), count, 1, row);
        for (long i = count; i < rounded_up(count, LANES); i++) row[i] = 0;
        for (long i = 0; i < count; i += LANES) {
            lanes x = load(row + i);
            store(poison + i, (lanes)((mask)load(poison + i) | (x != x)));
        }
    }
}

/* Item: a piece. A tile of columns is sorted by a network of minima and maxima of whole rows. */
static void trimmed_mean(const void *given, int64_t item, char *scratch) {
    const struct aggregation *call = given;
    struct piece piece = piece_of(call, item);
    long columns = sorted_columns(call), kept = call->clients - 2 * call->trim;
    float *tile = take(&scratch, call->clients * columns), *poison = take(&scratch, columns);
    enum dtype dtype = (enum dtype)call->dtype;
    for (long start = 0; start < piece.count; start += columns) {
        long count = least(columns, piece.count - start);
        read_sorted(call, &piece, start, count, columns, tile, poison);
        for (long p = 0; p < call->pair_count; p++) {
            float *low = tile + call->pairs[2 * p] * columns, *high = tile + call->pairs[2 * p + 1] * columns;
            for (long i = 0; i < count; i += LANES) {
                lanes x = load(low + i), y = load(high + i);
                store(low + i, smaller(x, y));
                store(high + i, larger(x, y));
            }
        }
        float *mean = tile + call->trim * columns;
        for (long i = 0; i < count; i += LANES) {
            lanes sum = load(mean + i);
            for (long rank = 1; rank < kept; rank++) sum += load(mean + rank * columns + i);
            /* All bits set is a NaN. */
            store(mean + i, (lanes)((mask)(sum / all((float)kept)) | (mask)load(poison + i)));
        }
        write_row(dtype, mean, count, 1, (char *)call->out[0] + (piece.first + start) * size_of(dtype));
    }
}

/* Norms and inner products of updates ----------------------------------------------------------------------------- */

/* to[i] = x[i] − center[i], zeros up to whole vectors */
static void read_update(enum dtype dtype, const void *x, const float *center, long count, float *to) {
    read_row(dtype, x, count, 1, to);
    for (long i = 0; i < count; i++) to[i] -= center[i];
    for (long i = count; i < rounded_up(count, LANES); i++) to[i] = 0;
}

static int64_t squared_norms_scratch(const void *given) {
    (void)given;
    return 2 * BLOCK * (long)sizeof(float) + 128;
}

/* partial [pieces, K]: Σ (x_k − center)² over each piece. Item: a piece. */
static void squared_norms(const void *given, int64_t item, char *scratch) {
    const struct aggregation *call = given;
    struct piece piece = piece_of(call, item);
    float *update = take(&scratch, BLOCK), *center = take(&scratch, BLOCK);
    double *norms = call->partial + item * call->clients;
    enum dtype dtype = (enum dtype)call->dtype;
    memset(norms, 0, call->clients * sizeof(double));
    for (long start = 0; start < piece.count; start += BLOCK) {
        long count = least(BLOCK, piece.count - start), first = piece.first + start;
        read_row(dtype, from(dtype, call->center, first), count, 1, center);
        for (long k = 0; k < call->clients; k++) {
            read_update(dtype, from(dtype, piece.rows[k], first), center, count, update);
            lanes sum = all(0);
            for (long i = 0; i < count; i += LANES) sum += load(update + i) * load(update + i);
            norms[k] += sum_of(sum);
        }
    }
}

static long gram_columns(const struct aggregation *call) {
    long columns = GRAM_BYTES / (long)sizeof(float) / call->clients / LANES * LANES;
    return columns < 4 * LANES ? 4 * LANES : least(columns, BLOCK);
}

static int64_t gram_scratch(const void *given) {
    return (((const struct aggregation *)given)->clients + 1) * gram_columns(given) * (long)sizeof(float) + 128;
}

/* gram[a, b] += x_a · y_b for `rows` by `others` rows of a tile. */
INLINE void add_products(const int rows, const int others, const float *x, const float *y, long columns, long count,
                         double *gram, long clients) {
    lanes sum[4][2];
    UNROLL for (int a = 0; a < rows; a++)
        UNROLL for (int b = 0; b < others; b++) sum[a][b] = all(0);
    for (long i = 0; i < count; i += LANES) {
        lanes other[2];
        UNROLL for (int b = 0; b < others; b++) other[b] = load(y + b * columns + i);
        UNROLL for (int a = 0; a < rows; a++) {
            lanes own = load(x + a * columns + i);
            UNROLL for (int b = 0; b < others; b++) sum[a][b] += own * other[b];
        }
    }
    UNROLL for (int a = 0; a < rows; a++)
        UNROLL for (int b = 0; b < others; b++) gram[a * clients + b] += sum_of(sum[a][b]);
}

/* partial [pieces, K, K]: (x_j − center) · (x_k − center) over each piece, symmetric. Item: a piece. */
static void gram(const void *given, int64_t item, char *scratch) {
    const struct aggregation *call = given;
    struct piece piece = piece_of(call, item);
    long columns = gram_columns(call), clients = call->clients;
    float *tile = take(&scratch, clients * columns), *center = take(&scratch, columns);
    double *products = call->partial + item * clients * clients;
    enum dtype dtype = (enum dtype)call->dtype;
    memset(products, 0, clients * clients * sizeof(double));
    for (long start = 0; start < piece.count; start += columns) {
        long count = least(columns, piece.count - start), first = piece.first + start;
        read_row(dtype, from(dtype, call->center, first), count, 1, center);
        for (long k = 0; k < clients; k++)
            read_update(dtype, from(dtype, piece.rows[k], first), center, count, tile + k * columns);
        for (long a = 0; a < clients; a += 4)
            for (long b = 0; b < least(a + 4, clients); b += 2) {
                const float *x = tile + a * columns, *y = tile + b * columns;
                double *to = products + a * clients + b;
                if (clients - a >= 4 && clients - b >= 2) {
                    add_products(4, 2, x, y, columns, count, to, clients);
                    continue;
                }
                for (long i = 0; i < least(4, clients - a); i++)
                    for (long j = 0; j < least(2, clients - b); j++)
                        add_products(1, 1, x + i * columns, y + j * columns, columns, count, to + i * clients + j,
                                     clients);
            }
    }
    for (long a = 0; a < clients; a++)
        for (long b = a + 1; b < clients; b++) products[a * clients + b] = products[b * clients + a];
}

/* Int8 ------------------------------------------------------------------------------------------------------------ */

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

/* values = x / scale, rounded to nearest, ties to even; scale = max|block| / 127, or NaN for a block with NaN or Inf,
   whose values are 0. Item: a piece. */
static void quantize(const void *given, int64_t item, char *scratch) {
    const struct aggregation *call = given;
    struct piece piece = piece_of(call, item);
    float *x = take(&scratch, BLOCK);
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
