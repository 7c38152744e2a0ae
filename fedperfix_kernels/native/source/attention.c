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
       Oᵀ  = Vᵀ Pᵀ                 [D, M]
       dPᵀ = V dOᵀ                 [W, M]
       dSᵀ = Pᵀ ∘ (dPᵀ − δ)        δ = Σ over a range's keys of P ∘ dP
       dQᵀ = Kᵀ dSᵀ                [D, M]
       dK += dSᵀ Q,  dV += Pᵀ dO   [W, D]

   Nothing larger than [W, M] is kept. The order of every sum depends on the shapes alone. */
#include "library.h"
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

#define LOG2_E 1.4426950408889634
#define LN_2 0.6931471805599453
/* Vectors of queries in a block: the scores of a block should fit the second-level cache beside keys and values. */
#define BLOCK_VECTORS 6

INLINE long least(long x, long y) { return x < y ? x : y; }
INLINE long rounded_up(long x, long to) { return (x + to - 1) / to * to; }

/* The ranges of keys that share a softmax. */
struct ranges {
    int count;
    long start[3];
};

/* One (image, head) of a call. */
struct item {
    const struct attention *call;
    enum dtype dtype;
    long image, head, row;
    long base, keys;   /* visible base keys, and all keys W */
    long width;        /* D, rounded up to whole vectors */
    real gate;
    struct ranges ranges;
};

/* Scratch memory is handed out in whole cache lines. */
static real *take(char **scratch, long count) {
    real *taken = (real *)*scratch;
    *scratch += rounded_up(count * (long)sizeof(real), 64);
    return taken;
}

static long most_keys(const struct attention *call) {
    return call->tokens + (call->mode == ADDITIVE ? 0 : call->prefix_len);
}

static int visible(const struct attention *call, long image, long token) {
    return !call->key_mask || call->key_mask[image * call->tokens + token];
}

static struct item item_of(const struct attention *call, long image, long head) {
    struct item item = {call, (enum dtype)call->dtype, image, head, call->row[image], 0, 0, 0, 0, {1, {0}}};
    for (long n = 0; n < call->tokens; n++) item.base += visible(call, image, n);
    item.keys = item.base + (call->mode == ADDITIVE ? 0 : call->prefix_len);
    item.width = rounded_up(call->head_dim, LANES);
    item.gate = ((const real *)call->gate)[item.row * call->gate_stride + head];
    if (call->mode == GATED) item.ranges.start[item.ranges.count++] = item.base;
    item.ranges.start[item.ranges.count] = item.keys;
    return item;
}

static const char *at(const struct item *item, const void *tensor, const int64_t *strides, long first, long token) {
    long offset = first * strides[0] + token * strides[1] + item->head * strides[2];
    return (const char *)tensor + offset * size_of(item->dtype);
}

/* to [columns padded with zeros] = factor · one token's row of a tensor */
static void read_token(const struct item *item, const void *tensor, const int64_t *strides, long first, long token,
                       real factor, real *to) {
    long head_dim = item->call->head_dim;
    read_row(item->dtype, at(item, tensor, strides, first, token), head_dim, factor, to);
    for (long d = head_dim; d < item->width; d++) to[d] = 0;
}

/* Keys or values of all W rows: [W, width], the prefix times `factor`; `added` is for additive. */
static void read_keys(const struct item *item, const void *base, const int64_t *strides, const void *prefix,
                      const int64_t *prefix_strides, real factor, real *to, real *added) {
    const struct attention *call = item->call;
    for (long n = 0; n < call->tokens; n++) {
        if (!visible(call, item->image, n)) continue;
        read_token(item, base, strides, item->image, n, 1, to);
        if (call->mode == ADDITIVE) {
            read_token(item, prefix, prefix_strides, item->row, n, factor, added);
            for (long d = 0; d < item->width; d += LANES) store(to + d, load(to + d) + load(added + d));
        }
        to += item->width;
    }
    for (long l = 0; call->mode != ADDITIVE && l < call->prefix_len; l++, to += item->width)
        read_token(item, prefix, prefix_strides, item->row, l, factor, to);
}

static void read_all_keys(const struct item *item, real *keys, real *values, real *added) {
    const struct attention *call = item->call;
    real key_factor = call->mode == GATED ? 1 : item->gate;
    read_keys(item, call->k, call->k_strides, call->prefix_k, call->prefix_k_strides, key_factor, keys, added);
    read_keys(item, call->v, call->v_strides, call->prefix_v, call->prefix_v_strides, item->gate, values, added);
}

/* A block's rows [M, width], zeros for the padding up to M, and the same transposed: [width, M]. */
static void read_queries(const struct item *item, const void *tensor, const int64_t *strides, long first, long count,
                         long block, real *rows, real *columns) {
    for (long m = 0; m < count; m++)
        read_token(item, tensor, strides, item->image, first + m, 1, rows + m * item->width);
    memset(rows + count * item->width, 0, (block - count) * item->width * sizeof(real));
    transpose(rows, item->width, block, item->width, columns, block);
}

/* Query blocks of nearly equal size, in whole vectors. */
static long blocks_of(long tokens) { return (rounded_up(tokens, LANES) / LANES + BLOCK_VECTORS - 1) / BLOCK_VECTORS; }

static long block_start(long tokens, long block) {
    return rounded_up(tokens, LANES) / LANES * block / blocks_of(tokens) * LANES;
}

/* Scores of a block, base-2: scores [W, M] = log2(e) · (scale · K Qᵀ + bias). */
static void score(const struct item *item, long first, long count, long block, const real *keys,
                  const real *query_columns, real *scores, real *bias_columns, real *factors) {
    const struct attention *call = item->call;
    for (long m = 0; m < block; m++) factors[m] = (real)(call->scale * LOG2_E);
    real_product(item->keys, block, call->head_dim, keys, item->width, 1, query_columns, block, scores, block,
                 factors, 0);
    if (!call->bias) return;
    const real *bias = (const real *)call->bias + item->image % call->bias_groups * call->bias_strides[0] +
                       item->head * call->bias_strides[1] + first * call->tokens;
    transpose(bias, call->tokens, count, call->tokens, bias_columns, block);
    real *row = scores;
    for (long n = 0; n < call->tokens; n++) {
        if (!visible(call, item->image, n)) continue;
        for (long m = 0; m < count; m++) row[m] += (real)LOG2_E * bias_columns[n * block + m];
        row += block;
    }
}

/* Softmax of one range's rows, not yet divided by its sum: scores [rows, M] → 2^(score − max); lse [M] gets
   log2 Σ 2^score, and inverse [M] 1 / Σ. A range without a finite score has weights of zero. */
static void soften(real *scores, long rows, long block, real *lse, real *inverse) {
    for (long m = 0; m < block; m += LANES) {
        lanes most = all(-INFINITY), sum = all(0);
        for (long n = 0; n < rows; n++) most = larger(load(scores + n * block + m), most);
        most = choose(most == all(-INFINITY), all(0), most);
        for (long n = 0; n < rows; n++) {
            real *at = scores + n * block + m;
            lanes weight = exp2_of(load(at) - most);
            store(at, weight);
            sum += weight;
        }
        mask empty = sum == all(0);
        store(inverse + m, choose(empty, all(0), all(1) / sum));
        for (long i = 0; i < LANES; i++) lse[m + i] = empty[i] ? 0 : most[i] + (real)log2(sum[i]);
    }
}

static int64_t attention_forward_scratch(const void *given) {
    const struct attention *call = given;
    long keys = most_keys(call), block = BLOCK_VECTORS * LANES, width = rounded_up(call->head_dim, LANES);
    long count = 2 * keys * width + keys * block + 4 * block * width + width + 5 * block;
    return (count + (call->bias ? call->tokens * block : 0)) * (long)sizeof(real) + 16 * 64;
}

/* Item: (image · H + head) · parts + part; a part is a range of the query blocks. */
static void attention_forward(const void *given, int64_t index, char *scratch) {
    const struct attention *call = given;
    long part = index % call->parts, image = index / call->parts / call->heads;
    struct item item = item_of(call, image, index / call->parts % call->heads);
    long tokens = call->tokens, heads = call->heads, head_dim = call->head_dim, width = item.width;
    long most = BLOCK_VECTORS * LANES, blocks = blocks_of(tokens);
    real *keys = take(&scratch, item.keys * width), *values = take(&scratch, item.keys * width);
    real *scores = take(&scratch, item.keys * most), *rows = take(&scratch, most * width);
    real *columns = take(&scratch, most * width), *result = take(&scratch, most * width);
    real *lse = take(&scratch, most), *inverse = take(&scratch, most), *factors = take(&scratch, most);
    real *added = take(&scratch, width), *bias_columns = take(&scratch, call->bias ? tokens * most : 0);
    read_all_keys(&item, keys, values, added);
    for (long b = blocks * part / call->parts; b < blocks * (part + 1) / call->parts; b++) {
        long first = block_start(tokens, b), block = block_start(tokens, b + 1) - first;
        long count = least(block, tokens - first);
        read_queries(&item, call->q, call->q_strides, first, count, block, rows, columns);
        score(&item, first, count, block, keys, columns, scores, bias_columns, factors);
        for (int r = 0; r < item.ranges.count; r++) {
            long start = item.ranges.start[r], length = item.ranges.start[r + 1] - start;
            soften(scores + start * block, length, block, lse, inverse);
            real_product(width, block, length, values + start * width, 1, width, scores + start * block, block,
                         result, block, inverse, r > 0);
            real *to = (real *)call->lse + ((r * call->batch + image) * heads + item.head) * tokens + first;
            memcpy(to, lse, count * sizeof(real));
        }
        transpose(result, block, width, block, rows, width);
        for (long m = 0; m < count; m++) {
            long offset = ((image * tokens + first + m) * heads + item.head) * head_dim;
            write_row(item.dtype, rows + m * width, head_dim, 1, (char *)call->out + offset * size_of(item.dtype));
        }
    }
}

/* Weights of one range from its scores [rows, M], and the gradient of the scores from that of the weights:
   scores → P, gradient dP → P ∘ (dP − δ). */
static void soften_backward(real *scores, real *gradient, long rows, long block, const real *lse) {
    for (long m = 0; m < block; m += LANES) {
        lanes log_sum = load(lse + m), delta = all(0);
        for (long n = 0; n < rows; n++) {
            long at = n * block + m;
            lanes weight = exp2_of(load(scores + at) - log_sum);
            store(scores + at, weight);
            delta += weight * load(gradient + at);
        }
        for (long n = 0; n < rows; n++) {
            long at = n * block + m;
            store(gradient + at, load(scores + at) * (load(gradient + at) - delta));
        }
    }
}

/* Gradient of the scores of a block: scores [W, M] become the weights, gradient [W, M] that of the scores. */
static void score_backward(const struct item *item, long first, long count, long block, const real *keys,
                           const real *values, const real *query_columns, const real *dout_columns, real *scores,
                           real *gradient, real *bias_columns, real *lse) {
    const struct attention *call = item->call;
    score(item, first, count, block, keys, query_columns, scores, bias_columns, lse);
    real_product(item->keys, block, call->head_dim, values, item->width, 1, dout_columns, block, gradient, block, 0, 0);
    for (int r = 0; r < item->ranges.count; r++) {
        long start = item->ranges.start[r], length = item->ranges.start[r + 1] - start;
        const real *from = (const real *)call->lse +
                           ((r * call->batch + item->image) * call->heads + item->head) * call->tokens + first;
        memcpy(lse, from, count * sizeof(real));
        for (long m = count; m < block; m++) lse[m] = 0;
        soften_backward(scores + start * block, gradient + start * block, length, block, lse);
    }
}

/* to[m] = scale · columns[:, m] for the `count` queries of a block, as rows of dq. */
static void write_dq(const struct item *item, long first, long count, long block, const real *columns, real *rows) {
    const struct attention *call = item->call;
    transpose(columns, block, item->width, block, rows, item->width);
    for (long m = 0; m < count; m++) {
        long offset = ((item->image * call->tokens + first + m) * 3 * call->heads + item->head) * call->head_dim;
        char *to = (char *)call->dqkv + offset * size_of(item->dtype);
        write_row(item->dtype, rows + m * item->width, call->head_dim, (real)call->scale, to);
    }
}

/* The base keys' rows of dk (part 1, times scale) or dv (part 2); zeros for hidden tokens. */
static void write_base(const struct item *item, const real *gradient, int part, real factor) {
    const struct attention *call = item->call;
    long head_dim = call->head_dim, size = size_of(item->dtype);
    for (long n = 0; n < call->tokens; n++) {
        long offset = (((item->image * call->tokens + n) * 3 + part) * call->heads + item->head) * head_dim;
        char *to = (char *)call->dqkv + offset * size;
        if (!visible(call, item->image, n)) {
            memset(to, 0, head_dim * size);
            continue;
        }
        write_row(item->dtype, gradient, head_dim, factor, to);
        gradient += item->width;
    }
}

/* Adds one image's gradient of (p_k or p_v) to total [L, 2, width], and returns its part of the gate's gradient:
   the inner product of p with the gradient of g·p. */
static real add_prefix(const struct item *item, const real *gradient, int part, real factor, real gate, int counts,
                       const void *prefix, const int64_t *strides, real *total, real *added) {
    const struct attention *call = item->call;
    int additive = call->mode == ADDITIVE;
    real product = 0;
    if (!additive) gradient += item->base * item->width;
    for (long l = 0; l < call->prefix_len; l++) {
        if (additive && !visible(call, item->image, l)) continue;
        real *to = total + (l * 2 + part) * item->width;
        lanes sum = all(0);
        read_token(item, prefix, strides, item->row, l, 1, added);
        for (long d = 0; d < item->width; d += LANES) {
            lanes x = factor * load(gradient + d);
            store(to + d, load(to + d) + gate * x);
            sum += x * load(added + d);
        }
        product += counts ? sum_of(sum) : 0;
        gradient += item->width;
    }
    return product;
}

static int64_t attention_backward_scratch(const void *given) {
    const struct attention *call = given;
    long keys = most_keys(call), block = BLOCK_VECTORS * LANES, width = rounded_up(call->head_dim, LANES);
    long count = 4 * keys * width + 2 * keys * block + 5 * block * width + width + block;
    count += 2 * call->prefix_len * width + (call->bias ? call->tokens * block : 0);
    return count * (long)sizeof(real) + 20 * 64;
}

/* Item: chunk · H + head. The images of a chunk share a prefix row, whose gradient they add up one after the other. */
static void attention_backward(const void *given, int64_t index, char *scratch) {
    const struct attention *call = given;
    long chunk = index / call->heads, head = index % call->heads, most = BLOCK_VECTORS * LANES, tokens = call->tokens;
    long width = rounded_up(call->head_dim, LANES), most_rows = most_keys(call);
    real *keys = take(&scratch, most_rows * width), *values = take(&scratch, most_rows * width);
    real *dk = take(&scratch, most_rows * width), *dv = take(&scratch, most_rows * width);
    real *scores = take(&scratch, most_rows * most), *gradient = take(&scratch, most_rows * most);
    real *queries = take(&scratch, most * width), *query_columns = take(&scratch, most * width);
    real *douts = take(&scratch, most * width), *dout_columns = take(&scratch, most * width);
    real *dq_columns = take(&scratch, most * width), *lse = take(&scratch, most), *added = take(&scratch, width);
    real *total = take(&scratch, 2 * call->prefix_len * width);
    real *bias_columns = take(&scratch, call->bias ? tokens * most : 0);
    memset(total, 0, 2 * call->prefix_len * width * sizeof(real));
    struct item item = {0};
    for (long i = call->chunk_start[chunk]; i < call->chunk_start[chunk + 1]; i++) {
        item = item_of(call, call->images[i], head);
        read_all_keys(&item, keys, values, added);
        for (long b = 0; b < blocks_of(tokens); b++) {
            long first = block_start(tokens, b), block = block_start(tokens, b + 1) - first;
            long count = least(block, tokens - first);
            read_queries(&item, call->q, call->q_strides, first, count, block, queries, query_columns);
            read_queries(&item, call->dout, call->dout_strides, first, count, block, douts, dout_columns);
            score_backward(&item, first, count, block, keys, values, query_columns, dout_columns, scores, gradient,
                           bias_columns, lse);
            real_product(width, block, item.keys, keys, 1, width, gradient, block, dq_columns, block, 0, 0);
            real_product(item.keys, width, count, gradient, block, 1, queries, width, dk, width, 0, b > 0);
            real_product(item.keys, width, count, scores, block, 1, douts, width, dv, width, 0, b > 0);
            write_dq(&item, first, count, block, dq_columns, queries);
        }
        write_base(&item, dk, 1, (real)call->scale);
        write_base(&item, dv, 2, 1);
        if (!call->dprefix) continue;
        real key_gate = call->mode == GATED ? 1 : item.gate;
        real product = add_prefix(&item, dk, 0, (real)call->scale, key_gate, call->mode != GATED, call->prefix_k,
                                  call->prefix_k_strides, total, added);
        product += add_prefix(&item, dv, 1, 1, item.gate, 1, call->prefix_v, call->prefix_v_strides, total, added);
        ((real *)call->dgate)[item.image * call->heads + head] = product;
    }
    if (!call->dprefix) return;
    long alone = call->row_chunks[item.row + 1] - call->row_chunks[item.row] == 1;
    for (long l = 0; l < 2 * call->prefix_len; l++) {
        long offset = ((alone ? item.row : chunk) * 2 * call->prefix_len + l) * call->heads + head;
        void *to = alone ? call->dprefix : call->partial;
        enum dtype dtype = alone ? item.dtype : sizeof(real) == 8 ? DOUBLE : FLOAT32;
        write_row(dtype, total + l * width, call->head_dim, 1,
                  (char *)to + offset * call->head_dim * size_of(dtype));
    }
}

static int64_t attention_prefix_scratch(const void *given) {
    return ((const struct attention *)given)->head_dim * (long)sizeof(real) + 64;
}

/* Item: a row of the prefix. Adds up what its chunks left in `partial`; a row without images has a gradient of zero. */
static void attention_prefix(const void *given, int64_t row, char *scratch) {
    const struct attention *call = given;
    long first = call->row_chunks[row], last = call->row_chunks[row + 1], head_dim = call->head_dim;
    long rows = 2 * call->prefix_len * call->heads, size = size_of((enum dtype)call->dtype);
    real *sum = (real *)scratch;
    if (last - first == 1) return;
    for (long l = 0; l < rows; l++) {
        memset(sum, 0, head_dim * sizeof(real));
        for (long chunk = first; chunk < last; chunk++) {
            const real *from = (const real *)call->partial + (chunk * rows + l) * head_dim;
            for (long d = 0; d < head_dim; d++) sum[d] += from[d];
        }
        write_row((enum dtype)call->dtype, sum, head_dim, 1, (char *)call->dprefix + (row * rows + l) * head_dim * size);
    }
}

static int64_t attention_bias_scratch(const void *given) {
    return attention_backward_scratch(given) +
           (((const struct attention *)given)->tokens * BLOCK_VECTORS * LANES) * (long)sizeof(real) + 64;
}

/* Item: (group · H + head) · blocks + block. The gradient of the bias's rows of one query block: that of the scores,
   computed once more and summed over the images of the group in order. */
static void attention_bias(const void *given, int64_t index, char *scratch) {
    const struct attention *call = given;
    long tokens = call->tokens, blocks = blocks_of(tokens), most = BLOCK_VECTORS * LANES;
    long b = index % blocks, head = index / blocks % call->heads, group = index / blocks / call->heads;
    long first = block_start(tokens, b), block = block_start(tokens, b + 1) - first;
    long count = least(block, tokens - first), width = rounded_up(call->head_dim, LANES), most_rows = most_keys(call);
    real *keys = take(&scratch, most_rows * width), *values = take(&scratch, most_rows * width);
    real *scores = take(&scratch, most_rows * most), *gradient = take(&scratch, most_rows * most);
    real *rows = take(&scratch, most * width), *query_columns = take(&scratch, most * width);
    real *dout_columns = take(&scratch, most * width), *lse = take(&scratch, most), *added = take(&scratch, width);
    real *bias_columns = take(&scratch, tokens * most), *total = take(&scratch, tokens * most);
    memset(total, 0, tokens * block * sizeof(real));
    for (long image = group; image < call->batch; image += call->bias_groups) {
        struct item item = item_of(call, image, head);
        read_all_keys(&item, keys, values, added);
        read_queries(&item, call->q, call->q_strides, first, count, block, rows, query_columns);
        read_queries(&item, call->dout, call->dout_strides, first, count, block, rows, dout_columns);
        score_backward(&item, first, count, block, keys, values, query_columns, dout_columns, scores, gradient,
                       bias_columns, lse);
        const real *from = gradient;
        for (long n = 0; n < tokens; n++) {
            if (!visible(call, image, n)) continue;
            for (long m = 0; m < block; m += LANES)
                store(total + n * block + m, load(total + n * block + m) + load(from + m));
            from += block;
        }
    }
    real *to = (real *)call->dbias + ((group * call->heads + head) * tokens + first) * tokens;
    transpose(total, block, tokens, count, to, tokens);
}
