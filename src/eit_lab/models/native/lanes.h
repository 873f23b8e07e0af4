/* What the kernels share: vectors of as many floats as the processor has lanes, 2^x, and bfloat16. */

#ifndef EIT_LAB_LANES_H
#define EIT_LAB_LANES_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__) || defined(__AVX__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4 * LANES)));
#define INLINE static inline __attribute__((always_inline))

INLINE vec same(float x) { return (vec){0} + x; }

/* b where either is not a number. */
INLINE vec larger(vec a, vec b) {
#if defined(__AVX512F__)
    return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX__)
    return (vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
    ivec first = a > b;
    return (vec)((first & (ivec)a) | (~first & (ivec)b));
#endif
}

/* 2^x for x <= 0 or a little above, within 2 units in the last place; next to nothing below -126; not a number stays none. */
INLINE vec exp2v(vec x) {
    const vec magic = same(12582912.0f); /* 1.5 2^23: adding it rounds to a whole number, in the low bits */
    x = larger(same(-126.0f), x);
    vec t = x + magic, r = x - (t - magic);
    vec p = same(1.54035304e-4f);
    p = p * r + same(1.33335581e-3f);
    p = p * r + same(9.61812911e-3f);
    p = p * r + same(5.55041087e-2f);
    p = p * r + same(2.40226507e-1f);
    p = p * r + same(6.93147181e-1f);
    p = p * r + same(1.0f);
    return (vec)((ivec)p + ((ivec)t << 23));
}

INLINE float from_bf16(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* To nearest, ties to even; not a number stays one. */
INLINE uint16_t to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return x != x ? 0x7fc0 : (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#endif
