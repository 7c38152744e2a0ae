/* Activations, element by element.

       gelu(x) = x · Φ(x)        gelu'(x) = Φ(x) + x · φ(x)       Φ, φ: the normal distribution and its density
       tanh(x)

   A part of PART elements is an item. Half-precision elements, and the last ones of a tensor, go through buffers in
   the first-level cache, SLICE at a time, so that one loop serves all. */
#include "library.h"
#include "storage.h"

#define SLICE 512

#ifdef FLOAT64
INLINE lanes magnitude(lanes x) { return (lanes)((mask)x & INT64_MAX); }

INLINE lanes bell(lanes x) {
    for (long i = 0; i < LANES; i++) x[i] = exp(-0.5 * x[i] * x[i]);
    return x;
}

INLINE lanes tail(lanes size, lanes unused) {
    (void)unused;
    for (long i = 0; i < LANES; i++) size[i] = 0.5 * erfc(size[i] * 0.70710678118654752);
    return size;
}

INLINE lanes hyperbolic(lanes x) {
    for (long i = 0; i < LANES; i++) x[i] = tanh(x[i]);
    return x;
}
#else
INLINE lanes magnitude(lanes x) { return (lanes)((mask)x & INT32_MAX); }

/* e^(−x²/2) */
INLINE lanes bell(lanes x) { return exp2_of(x * x * all(-0.72134752f)); }

/* Φ(−|x|) from |x| and e^(−x²/2): to 2e-7, and to 1e-5 of itself. It is e^(−x²/2) · t · P(t), t = 1 / (1 + 0.34·|x|),
   the form of Abramowitz and Stegun, 7.1.26; the polynomial P is a minimax fit. */
INLINE lanes tail(lanes size, lanes bell) {
    lanes t = all(1) / (all(1) + all(0.34f) * size);
    lanes power = all(4.413004720e-2f);
    power = power * t + all(-1.974851871e-1f);
    power = power * t + all(2.587095433e-1f);
    power = power * t + all(-2.586216926e-2f);
    power = power * t + all(1.542193326e-1f);
    power = power * t + all(1.303166941e-1f);
    power = power * t + all(1.359717381e-1f);
    return power * t * bell;
}

/* tanh(x), to 2e-7 of itself: x + x³·P(x²) near zero (the coefficients are those of Cephes), else
   1 − 2 / (e^(2|x|) + 1). */
INLINE lanes hyperbolic(lanes x) {
    lanes size = magnitude(x), square = x * x;
    lanes power = all(-5.70498872745e-3f);
    power = power * square + all(2.06390887954e-2f);
    power = power * square + all(-5.37397155531e-2f);
    power = power * square + all(1.33314422036e-1f);
    power = power * square + all(-3.33332819422e-1f);
    lanes near = x * (all(1) + square * power);
    lanes exponent = size * all(2.88539008f);
    lanes far = all(1) - all(2) / (exp2_of(choose(exponent > all(100), all(100), exponent)) + all(1));
    return choose(size < all(0.625f), near, choose(x < all(0), -far, far));
}
#endif

/* x·Φ(x) = max(x, 0) − |x|·Φ(−|x|), for both signs of x. Beyond 40 the second term is zero, and ∞·0 would not be. */
INLINE lanes gelu_of(lanes x, lanes unused) {
    (void)unused;
    lanes size = magnitude(x), near = choose(size > all(40), all(40), size);
    return larger(all(0), x) - near * tail(near, bell(near));
}

INLINE lanes gelu_gradient(lanes x, lanes dout) {
    lanes weight = bell(x), below = tail(magnitude(x), weight);
    return dout * (choose(x > all(0), all(1) - below, below) + x * weight * all((real)0.39894228040143268));
}

INLINE lanes tanh_of(lanes x, lanes unused) {
    (void)unused;
    return hyperbolic(x);
}

static int64_t elementwise_scratch(const void *given) {
    (void)given;
    return 2 * SLICE * (long)sizeof(real);
}

INLINE void elementwise(const struct elementwise *call, int64_t part, char *scratch, lanes (*formula)(lanes, lanes)) {
    enum dtype dtype = (enum dtype)call->dtype;
    real *buffer = (real *)scratch, *dout_buffer = buffer + SLICE;
    long last = (part + 1) * PART < call->count ? (part + 1) * PART : call->count;
    memset(scratch, 0, 2 * SLICE * sizeof(real)); /* the end of a last vector is computed, and not written */
    for (long first = part * PART; first < last; first += SLICE) {
        long count = last - first < SLICE ? last - first : SLICE, offset = first * size_of(dtype);
        int buffered = size_of(dtype) != sizeof(real) || count < SLICE;
        const real *x = buffered ? buffer : (const real *)call->x + first;
        const real *dout = buffered || !call->dout ? dout_buffer : (const real *)call->dout + first;
        real *out = buffered ? buffer : (real *)call->out + first;
        if (buffered) read_row(dtype, (const char *)call->x + offset, count, 1, buffer);
        if (buffered && call->dout) read_row(dtype, (const char *)call->dout + offset, count, 1, dout_buffer);
        for (long i = 0; i < count; i += LANES) store(out + i, formula(load(x + i), load(dout + i)));
        if (buffered) write_row(dtype, buffer, count, 1, (char *)call->out + offset);
    }
}

#define ELEMENTWISE(name, formula)                                                                                 \
    static void name(const void *given, int64_t part, char *scratch) { elementwise(given, part, scratch, formula); } \
    static int64_t name##_scratch(const void *given) { return elementwise_scratch(given); }
ELEMENTWISE(gelu_forward, gelu_of)
ELEMENTWISE(gelu_backward, gelu_gradient)
ELEMENTWISE(tanh_forward, tanh_of)
