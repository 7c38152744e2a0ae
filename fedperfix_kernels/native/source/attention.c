/* Prefix attention, forward and backward, one (image, head) at a time.

       gated     out = A(q, k, v) + A(q, p_k, g·p_v)
       concat    out = A(q, [k; g·p_k], [v; g·p_v])
       additive  out = A(q, k + g·p_k, v + g·p_v)              A(q, k, v) = softmax(q kᵀ · scale + bias) v

   All modes are attention over one list of W keys, base then prefix; they differ in the factors of the prefix pair
   and in which ranges of keys have a softmax of their own. Queries are taken in blocks of M. Scores are kept
   transposed, [W, M]: a vector holds one key's scores with several queries, so that maxima and sums over keys, masks
   and ranges are loops over rows, and every product reads its operands as they lie.

       Sᵀ  = K Qᵀ                  [W, M]      base-2 scores, so that exp is 2^x
       Pᵀ  = 2^(Sᵀ − lse)
       O   = P V                   [M, D]
       dPᵀ = V dOᵀ                 [W, M]
       dSᵀ = Pᵀ ∘ (dPᵀ − δ)        δ = Σ over a range's keys of P ∘ dP
       dQ  = dS K                  [M, D]
       dK += dSᵀ Q,  dV += Pᵀ dO   [W, D]

   Nothing larger than [W, M] is kept. The order of every sum depends on the shapes alone.

   Where the instruction set multiplies pairs of bfloat16, tensors of bfloat16 take another way through the products
   (pairs.h): their operands are bfloat16, and O and dQ are made transposed, [D, M]. Everything else is the same. */
#include "library.h"
#include "scratch.h"
#include "storage.h"

#define MOST_ROWS 12
#define MOST_VECTORS 3
#define CASES4(v) CASE(1, v) CASE(2, v) CASE(3, v) CASE(4, v)
#define CASES6(v) CASES4(v) CASE(5, v) CASE(6, v)
#define CASES8(v) CASES6(v) CASE(7, v) CASE(8, v)
#define CASES12(v) CASES8(v) CASE(9, v) CASE(10, v) CASE(11, v) CASE(12, v)

#define PRODUCT(name) real_##name
#define ELEMENT real
#define OPERAND lanes
#define MULTIPLY(c, a, b) ((c) + (a) * (b))
INLINE lanes real_load(const real *x) { return load(x); }
INLINE lanes real_all(real x) { return all(x); }
#include "product.h"

#if (defined(__AVX512BF16__) || defined(EMULATE_PAIRS)) && !defined(FLOAT64)
#define PAIRS
#include "pairs.h"
#endif

#define LOG2_E 1.4426950408889634
/* Bytes of a block's scores that should stay in the second-level cache. */
#define BLOCK_BYTES (VECTOR_BYTES == 64 ? 1 << 19 : 1 << 18)

/* One (image, head) of a call. */
struct item {
    const struct attention *call;
    enum dtype dtype;
    long image, head, row;
    long base, keys; /* visible base keys, and all keys W */
    long width;      /* D, rounded up to whole vectors */
    long pitch;      /* from row to row of a [·, D] in scratch memory */
    int pairs;       /* whether products are of pairs of bfloat16 */
    real gate;
    int ranges; /* of keys that share a softmax */
    long range_start[3];
};

/* Scratch memory of a thread. `lay_out` is the one place that knows the sizes. */
struct workspace {
    real *keys, *values;         /* [W, pitch]; the prefix times its factors */
    real *dk, *dv;               /* [W, pitch] */
    real *scores, *gradient;     /* [W, M]: S, then P; dP, then dS */
    real *queries, *douts;       /* [M, pitch] */
    real *query_columns;         /* [width, M] */
    real *dout_columns;          /* [width, M] */
    real *result;                /* [M, pitch]: O or dQ; rows on their way before and after */
    real *result_columns;        /* [width, M]: the same, of pairs */
    real *lse, *inverse;         /* [M] */
    real *dprefix;               /* [L, 2, width] */
    real *bias_columns, *dbias;  /* [N, M] */
#ifdef PAIRS
    pair *key_rows, *value_rows;       /* [W, pair_pitch]: pairs along D */
    pair *key_columns, *value_columns; /* [width, key_pitch]: pairs along W */
    pair *query_pairs, *dout_pairs;    /* [M / 2, width]: pairs along M */
    pair *query_depth, *dout_depth;    /* [width / 2, M]: pairs along D */
    pair *weight_rows, *gradient_rows; /* [W, M / 2]: pairs along M */
    pair *weight_pairs;                /* [W / 2, M]: pairs along W, of the weights or of their gradient */
    pair *block_rows;                  /* [M, width / 2] and [W / 2, width]: on the way to another order */
#endif
};

static int in_pairs(const struct attention *call) {
#ifdef PAIRS
    return call->dtype == BFLOAT16;
#else
    (void)call;
    return 0;
#endif
}

/* What D, W and M are rounded up to: whole vectors, or whole tiles. */
static long grain_of(const struct attention *call) {
#ifdef PAIRS
    if (in_pairs(call)) return LANES > GRAIN ? LANES : GRAIN;
#endif
    (void)call;
    return LANES;
}

static long width_of(const struct attention *call) { return rounded_up(call->head_dim, grain_of(call)); }

static long most_keys(const struct attention *call) {
    return call->tokens + (call->mode == ADDITIVE ? 0 : call->prefix_len);
}

/* An odd number of cache lines, so that one column's rows do not compete for the same sets of a cache. */
static long pitch_of(const struct attention *call) {
    long line = 64 / (long)sizeof(real), lines = rounded_up(width_of(call), line) / line;
    return (lines | 1) * line;
}

/* Most queries in a block: nine vectors, or three where the scores of nine would not stay in the cache. */
static long most_queries(const struct attention *call) {
    long grain = grain_of(call), most = rounded_up(9 * LANES, grain), fewer = rounded_up(3 * LANES, grain);
    return most_keys(call) * most * 2 * (long)sizeof(real) <= BLOCK_BYTES ? most : fewer;
}

#ifdef PAIRS
/* Pairs from row to row of [W, D] and [D, W], an odd number of cache lines as in `pitch_of`. */
static long pair_pitch(const struct attention *call) { return (rounded_up(width_of(call), 32) / 32 | 1) * 16; }
static long key_pitch(const struct attention *call) { return (rounded_up(most_keys(call), 32) / 32 | 1) * 16; }

static void lay_out_pairs(const struct attention *call, int backward, struct memory *memory, struct workspace *w) {
    long keys = rounded_up(most_keys(call), 32), width = width_of(call), block = most_queries(call);
    w->key_rows = (pair *)take(memory, keys * pair_pitch(call));
    w->value_rows = (pair *)take(memory, keys * pair_pitch(call));
    w->key_columns = (pair *)take(memory, width * key_pitch(call));
    w->value_columns = (pair *)take(memory, width * key_pitch(call));
    w->query_depth = (pair *)take(memory, width / 2 * block);
    w->weight_pairs = (pair *)take(memory, keys / 2 * block);
    w->block_rows = (pair *)take(memory, (block + keys) * width / 2);
    w->result_columns = take(memory, width * block);
    if (backward) {
        w->dout_depth = (pair *)take(memory, width / 2 * block);
        w->query_pairs = (pair *)take(memory, block / 2 * width);
        w->dout_pairs = (pair *)take(memory, block / 2 * width);
        w->weight_rows = (pair *)take(memory, keys * block / 2);
        w->gradient_rows = (pair *)take(memory, keys * block / 2);
    }
}
#endif

/* Divides scratch memory; returns how many bytes that takes. */
static int64_t lay_out(const struct attention *call, int backward, char *start, struct workspace *w) {
    struct memory memory = {start, 0};
    long keys = rounded_up(most_keys(call), grain_of(call)), block = most_queries(call), width = width_of(call);
    long pitch = pitch_of(call), bias = call->bias ? call->tokens * block : 0;
    w->keys = take(&memory, keys * pitch);
    w->values = take(&memory, keys * pitch);
    w->scores = take(&memory, keys * block);
    w->queries = take(&memory, block * pitch);
    w->query_columns = take(&memory, width * block);
    w->result = take(&memory, block * pitch);
    w->lse = take(&memory, block);
    w->inverse = take(&memory, block);
    w->bias_columns = take(&memory, bias);
    if (backward) {
        w->dk = take(&memory, keys * pitch);
        w->dv = take(&memory, keys * pitch);
        w->gradient = take(&memory, keys * block);
        w->douts = take(&memory, block * pitch);
        w->dout_columns = take(&memory, width * block);
        w->dprefix = take(&memory, 2 * call->prefix_len * width);
        w->dbias = take(&memory, bias);
    }
#ifdef PAIRS
    if (in_pairs(call)) lay_out_pairs(call, backward, &memory, w);
#endif
    return memory.used;
}

static int64_t attention_forward_scratch(const void *call) {
    struct workspace w;
    return lay_out(call, 0, 0, &w);
}

static int64_t attention_backward_scratch(const void *call) {
    struct workspace w;
    return lay_out(call, 1, 0, &w);
}

static int64_t attention_bias_scratch(const void *call) { return attention_backward_scratch(call); }

static int visible(const struct attention *call, long image, long token) {
    return !call->key_mask || call->key_mask[image * call->tokens + token];
}

static struct item item_of(const struct attention *call, long image, long head) {
    struct item item = {.call = call, .dtype = (enum dtype)call->dtype, .image = image, .head = head};
    for (long n = 0; n < call->tokens; n++) item.base += visible(call, image, n);
    item.keys = item.base + (call->mode == ADDITIVE ? 0 : call->prefix_len);
    item.pairs = in_pairs(call);
    item.width = width_of(call);
    item.pitch = pitch_of(call);
    item.row = call->row[image];
    item.gate = ((const real *)call->gate)[item.row * call->gate_stride + head];
    item.ranges = call->mode == GATED ? 2 : 1;
    item.range_start[1] = item.base;
    item.range_start[item.ranges] = item.keys;
    return item;
}

/* Query blocks of nearly equal size, in whole vectors or tiles. */
static long blocks_of(const struct attention *call) {
    return (call->tokens + most_queries(call) - 1) / most_queries(call);
}

static int64_t attention_bias_blocks(const void *call) { return blocks_of(call); }

struct block {
    long first, size, count; /* size: in whole vectors; count: real queries among them */
};

static struct block block_of(const struct attention *call, long index) {
    long grain = grain_of(call), grains = rounded_up(call->tokens, grain) / grain, blocks = blocks_of(call);
    long first = grains * index / blocks * grain, size = grains * (index + 1) / blocks * grain - first;
    return (struct block){first, size, least(size, call->tokens - first)};
}

/* Reading and writing tensors --------------------------------------------------------------------------------------- */

/* to [count, pitch] = factor · rows of this head from `token` on, padded with zeros. */
static void read_tokens(const struct item *item, const void *tensor, const int64_t *strides, long first, long token,
                        long count, real factor, real *to) {
    long size = size_of(item->dtype), offset = first * strides[0] + token * strides[1] + item->head * strides[2];
    read_rows(item->dtype, (const char *)tensor + offset * size, strides[1] * size, count, item->call->head_dim, factor,
              to, item->pitch, item->width);
}

/* How many tokens from `token` on, at most `most`, are all visible or all hidden. */
static long same_visibility(const struct attention *call, long image, long token, long most) {
    long count = 1, limit = least(most, call->tokens - token);
    if (!call->key_mask) return limit;
    while (count < limit && visible(call, image, token + count) == visible(call, image, token)) count++;
    return count;
}

/* Keys or values of all W rows: [W, pitch], those of the prefix times `factor`. */
static void read_keys(const struct item *item, const void *base, const int64_t *strides, const void *prefix,
                      const int64_t *prefix_strides, real factor, real *to, real *spare) {
    const struct attention *call = item->call;
    long most = call->mode == ADDITIVE ? most_queries(call) : call->tokens; /* `spare` has so many rows */
    for (long n = 0, count; n < call->tokens; n += count) {
        count = same_visibility(call, item->image, n, most);
        if (!visible(call, item->image, n)) continue;
        read_tokens(item, base, strides, item->image, n, count, 1, to);
        if (call->mode == ADDITIVE) {
            read_tokens(item, prefix, prefix_strides, item->row, n, count, factor, spare);
            for (long i = 0; i < count * item->pitch; i += LANES) store(to + i, load(to + i) + load(spare + i));
        }
        to += count * item->pitch;
    }
    if (call->mode != ADDITIVE)
        read_tokens(item, prefix, prefix_strides, item->row, 0, call->prefix_len, factor, to);
}

#ifdef PAIRS
/* rows [W, pitch] → pairs along D [W, pair_pitch] and along W [width, key_pitch], zeros up to whole tiles. */
static void pair_keys(const struct item *item, const real *rows, pair *along_depth, pair *along_keys,
                      struct workspace *w) {
    long keys = rounded_up(item->keys, GRAIN), width = item->width;
    pair_columns(rows, item->pitch, item->keys, width, along_depth, pair_pitch(item->call));
    memset(along_depth + item->keys * pair_pitch(item->call), 0, (keys - item->keys) * pair_pitch(item->call) * 4);
    pair_rows(rows, item->pitch, keys, item->keys, width, w->block_rows, width);
    transpose((const real *)w->block_rows, width, keys / 2, width, (real *)along_keys, key_pitch(item->call));
}
#endif

static void read_all_keys(const struct item *item, struct workspace *w) {
    const struct attention *call = item->call;
    real key_factor = call->mode == GATED ? 1 : item->gate;
    read_keys(item, call->k, call->k_strides, call->prefix_k, call->prefix_k_strides, key_factor, w->keys, w->result);
    read_keys(item, call->v, call->v_strides, call->prefix_v, call->prefix_v_strides, item->gate, w->values, w->result);
#ifdef PAIRS
    if (!item->pairs) return;
    pair_keys(item, w->keys, w->key_rows, w->key_columns, w);
    pair_keys(item, w->values, w->value_rows, w->value_columns, w);
#endif
}

/* rows [M, pitch] of a block of q or dout, zeros for the padding. */
static void read_block(const struct item *item, struct block block, const void *tensor, const int64_t *strides,
                       real *rows) {
    read_tokens(item, tensor, strides, item->image, block.first, block.count, 1, rows);
    memset(rows + block.count * item->pitch, 0, (block.size - block.count) * item->pitch * sizeof(real));
}

#ifdef PAIRS
/* rows [M, pitch] → pairs along D [width / 2, M], and along M [M / 2, width] where asked for. */
static void pair_block(const struct item *item, struct block block, const real *rows, pair *along_depth,
                       pair *along_queries, struct workspace *w) {
    long width = item->width;
    pair_columns(rows, item->pitch, block.size, width, w->block_rows, width / 2);
    transpose((const real *)w->block_rows, width / 2, block.size, width / 2, (real *)along_depth, block.size);
    if (along_queries) pair_rows(rows, item->pitch, block.size, block.size, width, along_queries, width);
}
#endif

static void read_queries(const struct item *item, struct block block, int backward, struct workspace *w) {
    read_block(item, block, item->call->q, item->call->q_strides, w->queries);
#ifdef PAIRS
    if (item->pairs) {
        pair_block(item, block, w->queries, w->query_depth, backward ? w->query_pairs : 0, w);
        return;
    }
#endif
    (void)backward;
    transpose(w->queries, item->pitch, block.size, item->width, w->query_columns, block.size);
}

static void read_douts(const struct item *item, struct block block, struct workspace *w) {
    read_block(item, block, item->call->dout, item->call->dout_strides, w->douts);
#ifdef PAIRS
    if (item->pairs) {
        pair_block(item, block, w->douts, w->dout_depth, w->dout_pairs, w);
        return;
    }
#endif
    transpose(w->douts, item->pitch, block.size, item->width, w->dout_columns, block.size);
}

/* rows [count, pitch] times `factor` into a tensor [B, N, parts, H, D], from `token` on, as its part `part`. */
static void write_tokens(const struct item *item, const real *rows, long token, long count, real factor, void *tensor,
                         long parts, long part) {
    const struct attention *call = item->call;
    long size = size_of(item->dtype), step = parts * call->heads * call->head_dim * size;
    long offset = ((item->image * call->tokens + token) * parts * call->heads + part * call->heads + item->head) *
                  call->head_dim;
    write_rows(item->dtype, rows, item->pitch, count, call->head_dim, factor, (char *)tensor + offset * size, step);
}

/* The base keys' rows of dk (part 1) or dv (part 2); zeros for hidden tokens. */
static void write_base(const struct item *item, const real *gradient, int part, real factor, real *zeros) {
    const struct attention *call = item->call;
    for (long n = 0, count; n < call->tokens; n += count) {
        count = same_visibility(call, item->image, n, call->tokens);
        if (visible(call, item->image, n)) {
            write_tokens(item, gradient, n, count, factor, call->dqkv, 3, part);
            gradient += count * item->pitch;
        } else {
            memset(zeros, 0, item->width * sizeof(real));
            for (long hidden = n; hidden < n + count; hidden++)
                write_tokens(item, zeros, hidden, 1, 1, call->dqkv, 3, part);
        }
    }
}

/* Forward ----------------------------------------------------------------------------------------------------------- */

/* scores [W, M] of a block; returns what they are still to be multiplied with. */
static real score(const struct item *item, struct block block, struct workspace *w) {
    const struct attention *call = item->call;
    real factor = (real)(call->scale * LOG2_E);
#ifdef PAIRS
    if (item->pairs)
        pair_product(rounded_up(item->keys, GRAIN), block.size, item->width / 2, w->key_rows, pair_pitch(call), 1,
                     w->query_depth, block.size, w->scores, block.size, 0, 0);
    else
#endif
        real_product(item->keys, block.size, call->head_dim, w->keys, item->pitch, 1, w->query_columns, block.size,
                     w->scores, block.size, 0, 0);
    if (!call->bias) return factor;
    const real *bias = (const real *)call->bias + item->image % call->bias_groups * call->bias_strides[0] +
                       item->head * call->bias_strides[1] + block.first * call->tokens;
    transpose(bias, call->tokens, block.count, call->tokens, w->bias_columns, block.size);
    real *row = w->scores;
    for (long n = 0; n < call->tokens; n++) {
        const real *added = w->bias_columns + n * block.size;
        if (!visible(call, item->image, n)) continue;
        for (long m = 0; m < block.count; m++) row[m] = factor * row[m] + (real)LOG2_E * added[m];
        row += block.size;
    }
    for (long n = item->base; n < item->keys; n++, row += block.size)
        for (long m = 0; m < block.count; m++) row[m] *= factor;
    return 1;
}

/* Softmax of one range's rows, not yet divided by its sum: scores [rows, M] → 2^(factor · score − max); lse [M] gets
   log2 Σ 2^(factor · score), and inverse [M] 1 / Σ. A range without a finite score has weights of zero. */
static void soften(real *scores, long rows, long columns, real factor, real *lse, real *inverse) {
    for (long m = 0; m < columns; m += LANES) {
        lanes most = all(-INFINITY), sum = all(0);
        for (long n = 0; n < rows; n++) most = larger(factor * load(scores + n * columns + m), most);
        most = choose(most == all(-INFINITY), all(0), most);
        for (long n = 0; n < rows; n++) {
            real *at = scores + n * columns + m;
            lanes weight = exp2_of(factor * load(at) - most);
            store(at, weight);
            sum += weight;
        }
        mask empty = sum == all(0);
        store(inverse + m, choose(empty, all(0), all(1) / sum));
        for (long i = 0; i < LANES; i++) lse[m + i] = empty[i] ? 0 : most[i] + (real)log2(sum[i]);
    }
}

static real *lse_of(const struct item *item, int range, long first) {
    const struct attention *call = item->call;
    return (real *)call->lse + ((range * call->batch + item->image) * call->heads + item->head) * call->tokens + first;
}

/* result [M, pitch] from the weights of every range and its inverse sums. */
static void attend(const struct item *item, struct block block, struct workspace *w) {
    real factor = score(item, block, w);
    for (int r = 0; r < item->ranges; r++) {
        long start = item->range_start[r], length = item->range_start[r + 1] - start;
        real *scores = w->scores + start * block.size;
        soften(scores, length, block.size, factor, w->lse, w->inverse);
        memcpy(lse_of(item, r, block.first), w->lse, block.count * sizeof(real));
        if (!item->pairs) {
            real_product(block.count, item->width, length, scores, 1, block.size, w->values + start * item->pitch,
                         item->pitch, w->result, item->pitch, w->inverse, r > 0);
            continue;
        }
        for (long n = 0; n < length; n++)
            for (long m = 0; m < block.size; m += LANES) {
                real *at = scores + n * block.size + m;
                store(at, load(at) * load(w->inverse + m));
            }
    }
#ifdef PAIRS
    if (!item->pairs) return;
    long keys = rounded_up(item->keys, GRAIN);
    pair_rows(w->scores, block.size, keys, item->keys, block.size, w->weight_pairs, block.size);
    pair_product(item->width, block.size, keys / 2, w->value_columns, key_pitch(item->call), 1, w->weight_pairs,
                 block.size, w->result_columns, block.size, 0, 0);
    transpose(w->result_columns, block.size, item->width, block.size, w->result, item->pitch);
#endif
}

static void begin(const struct attention *call) {
#ifdef PAIRS
    if (in_pairs(call)) tiles_begin();
#endif
    (void)call;
}

static void end(const struct attention *call) {
#ifdef PAIRS
    if (in_pairs(call)) tiles_end();
#endif
    (void)call;
}

/* Item: (image · H + head) · parts + part; a part is a range of the query blocks. */
static void attention_forward(const void *given, int64_t index, char *scratch) {
    const struct attention *call = given;
    long part = index % call->parts, blocks = blocks_of(call);
    struct item item = item_of(call, index / call->parts / call->heads, index / call->parts % call->heads);
    struct workspace w;
    lay_out(call, 0, scratch, &w);
    begin(call);
    read_all_keys(&item, &w);
    for (long b = blocks * part / call->parts; b < blocks * (part + 1) / call->parts; b++) {
        struct block block = block_of(call, b);
        read_queries(&item, block, 0, &w);
        attend(&item, block, &w);
        write_tokens(&item, w.result, block.first, block.count, 1, call->out, 1, 0);
    }
    end(call);
}

/* Backward ---------------------------------------------------------------------------------------------------------- */

/* Weights of one range from its scores [rows, M], and the gradient of the scores from that of the weights:
   scores → P, gradient dP → P ∘ (dP − δ). */
static void soften_backward(real *scores, real *gradient, long rows, long columns, real factor, const real *lse) {
    for (long m = 0; m < columns; m += LANES) {
        lanes log_sum = load(lse + m), delta = all(0);
        for (long n = 0; n < rows; n++) {
            long at = n * columns + m;
            lanes weight = exp2_of(factor * load(scores + at) - log_sum);
            store(scores + at, weight);
            delta += weight * load(gradient + at);
        }
        for (long n = 0; n < rows; n++) {
            long at = n * columns + m;
            store(gradient + at, load(scores + at) * (load(gradient + at) - delta));
        }
    }
}

/* scores [W, M] become the weights of a block, gradient [W, M] that of the scores. */
static void score_backward(const struct item *item, struct block block, struct workspace *w) {
    real factor = score(item, block, w);
#ifdef PAIRS
    if (item->pairs)
        pair_product(rounded_up(item->keys, GRAIN), block.size, item->width / 2, w->value_rows, pair_pitch(item->call),
                     1, w->dout_depth, block.size, w->gradient, block.size, 0, 0);
    else
#endif
        real_product(item->keys, block.size, item->call->head_dim, w->values, item->pitch, 1, w->dout_columns,
                     block.size, w->gradient, block.size, 0, 0);
    for (int r = 0; r < item->ranges; r++) {
        long start = item->range_start[r] * block.size, length = item->range_start[r + 1] - item->range_start[r];
        memset(w->lse, 0, block.size * sizeof(real));
        memcpy(w->lse, lse_of(item, r, block.first), block.count * sizeof(real));
        soften_backward(w->scores + start, w->gradient + start, length, block.size, factor, w->lse);
    }
}

/* result [M, pitch] = dQ / scale, and dk / scale and dv increased, from `score_backward`. */
static void attend_backward(const struct item *item, struct block block, struct workspace *w) {
    int add = block.first > 0;
#ifdef PAIRS
    if (item->pairs) {
        long keys = rounded_up(item->keys, GRAIN), half = block.size / 2;
        pair_columns(w->scores, block.size, item->keys, block.size, w->weight_rows, half);
        pair_columns(w->gradient, block.size, item->keys, block.size, w->gradient_rows, half);
        pair_rows(w->gradient, block.size, keys, item->keys, block.size, w->weight_pairs, block.size);
        pair_product(item->width, block.size, keys / 2, w->key_columns, key_pitch(item->call), 1, w->weight_pairs,
                     block.size, w->result_columns, block.size, 0, 0);
        transpose(w->result_columns, block.size, item->width, block.size, w->result, item->pitch);
        pair_product(keys, item->width, half, w->gradient_rows, half, 1, w->query_pairs, item->width, w->dk,
                     item->pitch, 0, add);
        pair_product(keys, item->width, half, w->weight_rows, half, 1, w->dout_pairs, item->width, w->dv, item->pitch,
                     0, add);
        return;
    }
#endif
    real_product(block.count, item->width, item->keys, w->gradient, 1, block.size, w->keys, item->pitch, w->result,
                 item->pitch, 0, 0);
    real_product(item->keys, item->width, block.count, w->gradient, block.size, 1, w->queries, item->pitch, w->dk,
                 item->pitch, 0, add);
    real_product(item->keys, item->width, block.count, w->scores, block.size, 1, w->douts, item->pitch, w->dv,
                 item->pitch, 0, add);
}

/* Adds one image's gradient of p_k or p_v (part 0, 1) to dprefix [L, 2, width]; returns Σ p ∘ gradient, its share of
   the gate's gradient. gradient [W, pitch] · factor is that of gate · p. */
static real add_prefix(const struct item *item, const real *gradient, int part, real factor, real gate,
                       const void *prefix, const int64_t *strides, struct workspace *w) {
    const struct attention *call = item->call;
    lanes product = all(0);
    if (call->mode != ADDITIVE) gradient += item->base * item->pitch;
    for (long l = 0, count; l < call->prefix_len; l += count) {
        count = call->mode == ADDITIVE ? same_visibility(call, item->image, l, most_queries(call))
                                       : least(call->prefix_len - l, most_queries(call));
        if (call->mode == ADDITIVE && !visible(call, item->image, l)) continue;
        read_tokens(item, prefix, strides, item->row, l, count, 1, w->result);
        for (long i = 0; i < count; i++, gradient += item->pitch) {
            real *to = w->dprefix + ((l + i) * 2 + part) * item->width;
            for (long d = 0; d < item->width; d += LANES) {
                lanes x = factor * load(gradient + d);
                store(to + d, load(to + d) + gate * x);
                product += x * load(w->result + i * item->pitch + d);
            }
        }
    }
    return sum_of(product);
}

static void write_gradients(const struct item *item, struct workspace *w) {
    const struct attention *call = item->call;
    real scale = (real)call->scale;
    write_base(item, w->dk, 1, scale, w->result);
    write_base(item, w->dv, 2, 1, w->result);
    if (!call->dprefix) return;
    real gate = call->mode == GATED ? 1 : item->gate;
    real of_keys = add_prefix(item, w->dk, 0, scale, gate, call->prefix_k, call->prefix_k_strides, w);
    real of_values = add_prefix(item, w->dv, 1, 1, item->gate, call->prefix_v, call->prefix_v_strides, w);
    ((real *)call->dgate)[item->image * call->heads + item->head] = of_values + (call->mode == GATED ? 0 : of_keys);
}

/* Item: chunk · H + head. The images of a chunk share a prefix row, whose gradient they add up one after the other. */
static void attention_backward(const void *given, int64_t index, char *scratch) {
    const struct attention *call = given;
    long chunk = index / call->heads, head = index % call->heads, row = call->row[call->images[call->chunk_start[chunk]]];
    struct workspace w;
    lay_out(call, 1, scratch, &w);
    begin(call);
    memset(w.dprefix, 0, 2 * call->prefix_len * width_of(call) * sizeof(real));
    for (long i = call->chunk_start[chunk]; i < call->chunk_start[chunk + 1]; i++) {
        struct item item = item_of(call, call->images[i], head);
        read_all_keys(&item, &w);
        for (long b = 0; b < blocks_of(call); b++) {
            struct block block = block_of(call, b);
            read_queries(&item, block, 1, &w);
            read_douts(&item, block, &w);
            score_backward(&item, block, &w);
            attend_backward(&item, block, &w);
            write_tokens(&item, w.result, block.first, block.count, (real)call->scale, call->dqkv, 3, 0);
        }
        write_gradients(&item, &w);
    }
    end(call);
    if (!call->dprefix) return;
    int alone = call->row_chunks[row + 1] - call->row_chunks[row] == 1;
    enum dtype dtype = alone ? (enum dtype)call->dtype : sizeof(real) == 8 ? DOUBLE : FLOAT32;
    for (long l = 0; l < 2 * call->prefix_len; l++) {
        long offset = ((alone ? row : chunk) * 2 * call->prefix_len + l) * call->heads + head;
        char *to = (char *)(alone ? call->dprefix : call->partial) + offset * call->head_dim * size_of(dtype);
        write_row(dtype, w.dprefix + l * width_of(call), call->head_dim, 1, to);
    }
}

static int64_t attention_prefix_scratch(const void *call) {
    return ((const struct attention *)call)->head_dim * (long)sizeof(real);
}

/* Item: a row of the prefix. Adds up what its chunks left in `partial`; a row without images has a gradient of zero. */
static void attention_prefix(const void *given, int64_t row, char *scratch) {
    const struct attention *call = given;
    long first = call->row_chunks[row], last = call->row_chunks[row + 1], head_dim = call->head_dim;
    long vectors = 2 * call->prefix_len * call->heads, size = size_of((enum dtype)call->dtype);
    real *sum = (real *)scratch;
    if (last - first == 1) return;
    for (long l = 0; l < vectors; l++) {
        memset(sum, 0, head_dim * sizeof(real));
        for (long chunk = first; chunk < last; chunk++) {
            const real *from = (const real *)call->partial + (chunk * vectors + l) * head_dim;
            for (long d = 0; d < head_dim; d++) sum[d] += from[d];
        }
        char *to = (char *)call->dprefix + (row * vectors + l) * head_dim * size;
        write_row((enum dtype)call->dtype, sum, head_dim, 1, to);
    }
}

/* Item: (group · H + head) · blocks + block. The gradient of the bias's rows of one query block: that of the scores,
   computed once more and summed over the images of the group in order. */
static void attention_bias(const void *given, int64_t index, char *scratch) {
    const struct attention *call = given;
    long tokens = call->tokens, blocks = blocks_of(call);
    long head = index / blocks % call->heads, group = index / blocks / call->heads;
    struct block block = block_of(call, index % blocks);
    struct workspace w;
    lay_out(call, 1, scratch, &w);
    begin(call);
    memset(w.dbias, 0, tokens * block.size * sizeof(real));
    for (long image = group; image < call->batch; image += call->bias_groups) {
        struct item item = item_of(call, image, head);
        read_all_keys(&item, &w);
        read_queries(&item, block, 0, &w);
        read_douts(&item, block, &w);
        score_backward(&item, block, &w);
        const real *from = w.gradient;
        for (long n = 0; n < tokens; n++) {
            if (!visible(call, image, n)) continue;
            real *to = w.dbias + n * block.size;
            for (long m = 0; m < block.size; m += LANES) store(to + m, load(to + m) + load(from + m));
            from += block.size;
        }
    }
    end(call);
    real *to = (real *)call->dbias + ((group * call->heads + head) * tokens + block.first) * tokens;
    transpose(w.dbias, block.size, tokens, block.count, to, tokens);
}
