/* The exact GELU, x Phi(x), and with its derivative Phi(x) + x phi(x) in one pass, on CPU.

   One exponential serves both: phi(x) = exp(-x^2 / 2) / sqrt(2 pi), and Phi follows from it by formula 7.1.26 of Abramowitz and Stegun
   (Handbook of Mathematical Functions, 1964), which is off by 1.5e-7 at most in erf. So the backward pass makes the activation anew
   for the next layer's weights at no cost, and it need not be kept from the forward pass.

   Arithmetic is float32; numbers may be bfloat16. Lanes do not depend on each other: the digits are the same for any number of threads. */

#include "lanes.h"

#define PART 4096 /* elements of a piece of work: its input and output stay in the nearest cache */

typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(4 * LANES)));

INLINE vec load(const void *from, size_t at, int bf16) {
    vec x;
    if (!bf16) {
        memcpy(&x, (const float *)from + at, sizeof x);
        return x;
    }
    halves narrow;
    memcpy(&narrow, (const uint16_t *)from + at, sizeof narrow);
    return (vec)(__builtin_convertvector(narrow, words) << 16);
}

/* As to_bf16 rounds. */
INLINE void store(void *to, size_t at, vec x, int bf16) {
    if (!bf16) {
        memcpy((float *)to + at, &x, sizeof x);
        return;
    }
    words bits = (words)x, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, number = (words)(x == x);
    halves narrow = __builtin_convertvector((number & rounded) | (~number & 0x7fc0), halves);
    memcpy((uint16_t *)to + at, &narrow, sizeof narrow);
}

INLINE void gelu(vec x, vec *value, vec *slope) {
    const vec positive = larger(x, -x), root_half = same(0.70710678118654752f);
    vec e = exp2v(x * x * same(-0.72134752044448170f)); /* exp(-x^2 / 2) */
    vec t = same(1.0f) / (same(1.0f) + same(0.3275911f) * (positive * root_half));
    vec tail = same(1.061405429f);
    tail = tail * t + same(-1.453152027f);
    tail = tail * t + same(1.421413741f);
    tail = tail * t + same(-0.284496736f);
    tail = tail * t + same(0.254829592f);
    tail = tail * t * e * same(0.5f); /* Phi(-|x|) */
    ivec right = x > same(0.0f);
    vec cdf = (vec)((right & (ivec)(same(1.0f) - tail)) | (~right & (ivec)tail));
    *value = x * cdf;
    *slope = cdf + x * e * same(0.39894228040143268f);
}

/* x (n) -> y (n), and with a gradient of y (dy not null) that of x. Arrays may not overlap. */
INLINE void piece(const void *x, const void *dy, void *y, void *dx, size_t from, size_t to, int bf16) {
    size_t at = from;
    vec value, slope;
    for (; at + LANES <= to; at += LANES) {
        gelu(load(x, at, bf16), &value, &slope);
        store(y, at, value, bf16);
        if (dy) store(dx, at, slope * load(dy, at, bf16), bf16);
    }
    if (at < to) { /* what is left, in rows of a whole vector */
        const size_t size = bf16 ? 2 : 4, left = to - at;
        float a[LANES] = {0}, b[LANES] = {0}, c[LANES] = {0}, d[LANES] = {0};
        memcpy(a, (const char *)x + at * size, left * size);
        if (dy) memcpy(b, (const char *)dy + at * size, left * size);
        gelu(load(a, 0, bf16), &value, &slope);
        store(c, 0, value, bf16);
        store(d, 0, slope * load(b, 0, bf16), bf16);
        memcpy((char *)y + at * size, c, left * size);
        if (dy) memcpy((char *)dx + at * size, d, left * size);
    }
}

INLINE void all(const void *x, const void *dy, void *y, void *dx, int64_t n, int bf16, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t from = 0; from < n; from += PART)
        piece(x, dy, y, dx, from, from + PART < n ? from + PART : n, bf16);
}

void eit_gelu(const void *x, void *y, int64_t n, int bf16, int threads) {
    if (bf16) all(x, NULL, y, NULL, n, 1, threads);
    else all(x, NULL, y, NULL, n, 0, threads);
}

void eit_gelu_backward(const void *x, const void *dy, void *y, void *dx, int64_t n, int bf16, int threads) {
    if (bf16) all(x, dy, y, dx, n, 1, threads);
    else all(x, dy, y, dx, n, 0, threads);
}
