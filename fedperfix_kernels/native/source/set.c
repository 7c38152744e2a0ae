/* All kernels of one instruction set: compiled once for each, with SET naming it. */
#include "attention.c"
#ifndef FLOAT64
#include "aggregation.c"
#endif
#include "elementwise.c"

#define JOINED(x, y) x##_##y
#define NAME(x, y) JOINED(x, y)
#define TEXT(x) #x
#define STRING(x) TEXT(x)
#define KERNEL(name) {name, name##_scratch}
#ifdef FLOAT64 /* PyTorch's own operations aggregate float64 */
#define FLOAT32_KERNEL(name) {0, 0}
#else
#define FLOAT32_KERNEL(name) KERNEL(name)
#endif

const struct instruction_set NAME(kernels, SET) = {
    STRING(SET),
    VECTOR_BYTES,
    KERNEL(attention_forward),
    KERNEL(attention_backward),
    KERNEL(attention_prefix),
    KERNEL(attention_bias),
    KERNEL(gelu_forward),
    KERNEL(gelu_backward),
    KERNEL(tanh_forward),
    attention_bias_blocks,
    FLOAT32_KERNEL(weighted_mean),
    FLOAT32_KERNEL(trimmed_mean),
    FLOAT32_KERNEL(squared_norms),
    FLOAT32_KERNEL(gram),
    FLOAT32_KERNEL(quantize),
};
