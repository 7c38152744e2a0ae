/* What the instruction sets' kernels and the library around them agree on. The structs are filled in from Python:
   `native/attention.py` and its like mirror them field by field. */
#ifndef FEDPERFIX_LIBRARY_H
#define FEDPERFIX_LIBRARY_H

#include <stdint.h>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

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
};

#endif
