/* All kernels of one instruction set: compiled once for each, with SET naming it. */
#include "attention.c"
#include "elementwise.c"

#define JOINED(x, y) x##_##y
#define NAME(x, y) JOINED(x, y)
#define TEXT(x) #x
#define STRING(x) TEXT(x)
#define KERNEL(name) {name, name##_scratch}

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
};
