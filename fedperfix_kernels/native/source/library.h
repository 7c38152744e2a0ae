/* What the instruction sets' kernels and the library around them agree on. The structs are filled in from Python:
   `native_launch.py` of each operation mirrors its own field by field. */
#ifndef FEDPERFIX_LIBRARY_H
#define FEDPERFIX_LIBRARY_H

#include <stdint.h>

enum mode { GATED = 0, CONCAT = 1, ADDITIVE = 2 };

/* One call of prefix attention. Strides are in elements: image, token, head. */
struct attention {
    const void *q, *k, *v, *prefix_k, *prefix_v; /* [B, N, H, D] and [rows, L, H, D], of `dtype`, innermost stride 1 */
    const void *gate;                            /* [H], or [rows, H] with gate_stride H */
    const void *bias;                            /* [G, H, N, N], rows and columns contiguous, or NULL */
    const uint8_t *key_mask;                     /* [B, N], 0 for tokens that are no keys, or NULL */
    const void *dout;                            /* [B, N, H, D] */
    void *out;                                   /* [B, N, H, D] */
    void *lse;                                   /* [1 or 2, B, H, N]: base-2 log-sum-exps of each softmax */
    void *dqkv;                                  /* [B, N, 3, H, D] */
    void *dprefix;                               /* [rows, L, 2, H, D] of `dtype`, or NULL */
    void *partial;                               /* [chunks, H, L, 2, D] of rows with several chunks, or NULL */
    void *dgate;                                 /* [B, H] */
    void *dbias;                                 /* [G, H, N, N], or NULL */
    /* Images in order of their prefix row; each chunk is a range of them that share a row. */
    const int64_t *images;      /* [B] */
    const int64_t *chunk_start; /* [chunks + 1] */
    const int64_t *row;         /* [B]: each image's prefix row */
    const int64_t *row_chunks;  /* [rows + 1]: the first chunk of each row */
    int64_t q_strides[3], k_strides[3], v_strides[3], prefix_k_strides[3], prefix_v_strides[3], dout_strides[3];
    int64_t gate_stride, bias_strides[2];
    int64_t batch, tokens, heads, head_dim, prefix_len, rows, chunks, bias_groups, parts;
    double scale;
    int32_t dtype, mode;
};

/* Elements of a block, as `arena.BLOCK`: a layer starts with a block, and int8 uploads have a scale for each. */
#define BLOCK 1024

/* One call of an aggregation of K clients' tensors, T of each; all but the weighted mean have one, of P elements.
   A tensor is cut into pieces of `piece` elements, whole blocks, whatever the number of threads. */
struct aggregation {
    const void *const *rows;    /* [T, K]: where each client's tensor lies, contiguous elements of `dtype` */
    void *const *out;           /* [T]: where each result lies, of `out_dtype` */
    const int64_t *numel;       /* [T] */
    const int64_t *first_piece; /* [T + 1] */
    const float *shares;        /* [K, layers] */
    const int32_t *block_layer; /* [blocks], or NULL: tensor t is layer t */
    const float *scales;        /* [K, blocks] of int8 rows, or NULL */
    uint8_t *nonfinite;         /* [K], set for clients with NaN or Inf, or NULL */
    const void *center;         /* [P] of `dtype`, subtracted from every row, or NULL */
    const float *noise;         /* [P], or NULL */
    const int32_t *pairs;       /* [pairs, 2]: the comparators of a sorting network over the clients */
    double *partial;            /* [pieces, results] */
    double *total;              /* [results]: the pieces' sum */
    int8_t *values;             /* [P]: of the first row, quantised */
    float *value_scales;        /* [blocks] */
    int64_t clients, tensors, layers, blocks, pieces, piece, pair_count, trim, results;
    float std;
    int32_t dtype, out_dtype;
};

/* Elements of an activation that one thread takes at a time. */
#define PART 16384

/* One call of an activation, on tensors without gaps. */
struct elementwise {
    const void *x, *dout; /* [count] of `dtype`; dout of gradients, else NULL */
    void *out;            /* [count] */
    int64_t count;
    int32_t dtype;
};

/* A kernel does item `item` of a call, in scratch memory of as many bytes as `scratch` says. */
struct kernel {
    void (*run)(const void *call, int64_t item, char *scratch);
    int64_t (*scratch)(const void *call);
};

struct instruction_set {
    const char *name;
    int32_t vector_bytes;
    struct kernel attention_forward, attention_backward, attention_prefix, attention_bias;
    struct kernel gelu_forward, gelu_backward, tanh_forward;
    int64_t (*attention_bias_blocks)(const void *call); /* items of attention_bias for each head of a group */
    struct kernel weighted_mean, trimmed_mean, squared_norms, gram, quantize;
};

#endif
