/* Vectors of floats, one type for every instruction set.
 *
 * Written with the compiler's vector extension, which GCC and Clang lower to whatever the machine has: AVX-512 when
 * VL is 16, AVX2 or pairs of SSE or NEON registers when it is 8. Intrinsics appear only where that is not enough.
 *
 * Storage types are float32, bfloat16 and float16; everything is computed in float32 and rounded once, to nearest
 * even, when it is stored.
 */
#ifndef SENSORIUM_SIMD_H
#define SENSORIUM_SIMD_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define VL 16
#else
#define VL 8
#endif

#define INLINE static inline __attribute__((always_inline))
#define OUTLINE static __attribute__((noinline, unused))
#define EXPORT __attribute__((visibility("default")))
#define UNROLL _Pragma("GCC unroll 32")
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

typedef float vf __attribute__((vector_size(VL * 4), may_alias));
typedef int32_t vi __attribute__((vector_size(VL * 4), may_alias));
typedef uint32_t vu __attribute__((vector_size(VL * 4), may_alias));
typedef uint16_t vh __attribute__((vector_size(VL * 2), may_alias));

/* The same at any address. */
typedef vf vf_any __attribute__((aligned(4)));
typedef vh vh_any __attribute__((aligned(2)));

/* Codes of the storage types; library.py knows them too. */
enum dtype { F32 = 0, BF16 = 1, F16 = 2 };

/* Call `function` with the storage type as a constant, so that each type gets its own code. */
#define FOR_DTYPE(dtype, function, ...)                      \
    do {                                                     \
        if ((dtype) == F32) function(F32, __VA_ARGS__);      \
        else if ((dtype) == BF16) function(BF16, __VA_ARGS__); \
        else function(F16, __VA_ARGS__);                     \
    } while (0)

INLINE long size_of(int dtype) { return dtype == F32 ? 4 : 2; }

INLINE vf splat(float x) { return x - (vf){0}; }

INLINE vf blend(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }

INLINE vf vmax(vf a, vf b) { return blend(a > b, a, b); }

INLINE vf vmin(vf a, vf b) { return blend(a < b, a, b); }

/* ---- one element -------------------------------------------------------------------------------------------- */

INLINE float float_of_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

INLINE uint32_t bits_of_float(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

INLINE float float_of_half(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
    if (rest >= 0x7c00) return float_of_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13); /* infinity, NaN */
    if (rest < 0x400) { /* subnormal: rest * 2^-24 */
        float x = (float)rest * 0x1p-24f;
        return sign ? -x : x;
    }
    return float_of_bits(sign | (rest + (112 << 10)) << 13);
}

INLINE uint16_t half_of_float(float x) {
    uint32_t bits = bits_of_float(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) return (uint16_t)(sign | 0x7e00);   /* NaN */
    if (rest >= 0x477ff000) return (uint16_t)(sign | 0x7c00);  /* rounds beyond 65504 */
    if (rest < 0x38800000)                                     /* subnormal: adding 0.5 shifts the bits into place */
        return (uint16_t)(sign | (bits_of_float(float_of_bits(rest) + 0.5f) - 0x3f000000));
    return (uint16_t)(sign | (rest + 0xfff + (rest >> 13 & 1) - (112 << 23)) >> 13);
}

INLINE uint16_t bf16_of_float(float x) {
    uint32_t bits = bits_of_float(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40); /* NaN stays one */
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

INLINE float load1(int dtype, const void *p, long i) {
    if (dtype == F32) return ((const float *)p)[i];
    uint16_t h = ((const uint16_t *)p)[i];
    return dtype == BF16 ? float_of_bits((uint32_t)h << 16) : float_of_half(h);
}

INLINE void store1(int dtype, void *p, long i, float x) {
    if (dtype == F32)
        ((float *)p)[i] = x;
    else
        ((uint16_t *)p)[i] = dtype == BF16 ? bf16_of_float(x) : half_of_float(x);
}

/* ---- VL elements -------------------------------------------------------------------------------------------- */

INLINE vf vload_f16(const uint16_t *p) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif defined(__F16C__) && defined(__AVX__)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#else
    vf x;
    for (int i = 0; i < VL; i++) x[i] = float_of_half(p[i]);
    return x;
#endif
}

INLINE void vstore_f16(uint16_t *p, vf x) {
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__) && defined(__AVX__)
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
    for (int i = 0; i < VL; i++) p[i] = half_of_float(x[i]);
#endif
}

/* Float bits rounded to bfloat16, in the upper half of each lane. */
INLINE vu round_to_bf16(vf x) {
    vu bits = (vu)x;
    vu rounded = bits + 0x7fff + (bits >> 16 & 1);
    vu nan = (vu)(x != x);
    return ((rounded & ~nan) | ((bits | 0x400000) & nan)) & 0xffff0000u;
}

INLINE vf vload(int dtype, const void *p, long i) {
    if (dtype == F32) return *(const vf_any *)((const float *)p + i);
    const uint16_t *h = (const uint16_t *)p + i;
    if (dtype == F16) return vload_f16(h);
    return (vf)(__builtin_convertvector(*(const vh_any *)h, vu) << 16);
}

INLINE void vstore(int dtype, void *p, long i, vf x) {
    if (dtype == F32)
        *(vf_any *)((float *)p + i) = x;
    else if (dtype == F16)
        vstore_f16((uint16_t *)p + i, x);
    else
        *(vh_any *)((uint16_t *)p + i) = __builtin_convertvector(round_to_bf16(x) >> 16, vh);
}

/* The value that storing and loading again would give. */
INLINE vf vround(int dtype, vf x) {
    if (dtype == F32) return x;
    if (dtype == BF16) return (vf)round_to_bf16(x);
    uint16_t h[VL];
    vstore_f16(h, x);
    return vload_f16(h);
}

/* The first n < VL elements; the other lanes are 0 and are not touched in memory. */
OUTLINE vf vload_part(int dtype, const void *p, long i, long n) {
    vf x = {0};
    for (long j = 0; j < n; j++) x[j] = load1(dtype, p, i + j);
    return x;
}

OUTLINE void vstore_part(int dtype, void *p, long i, vf x, long n) {
    for (long j = 0; j < n; j++) store1(dtype, p, i + j, x[j]);
}

/* Sum of the lanes, in one fixed order. */
INLINE float vsum(vf x) {
    for (int half = VL / 2; half > 0; half /= 2)
        for (int j = 0; j < half; j++) x[j] += x[j + half];
    return x[0];
}

/* ---- functions ---------------------------------------------------------------------------------------------- */

/* e^x to about one unit in the last place; exactly 0 below the smallest normal result, so also for -infinity. The
 * argument is split into n ln 2 + r; e^r comes from its Taylor series (|r| <= 0.35, so the 8th term is below half a
 * unit in the last place) and 2^n is put into the exponent. */
INLINE vf vexp(vf x) {
    const vf low = splat(-87.33654f), high = splat(88.72283f);
    vf clamped = vmin(vmax(x, low), high);
    const float shift = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    vf n = (clamped * 1.44269504f + shift) - shift;
    vf r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
    vf p = splat(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    /* In two factors, since 2^128 is not a float. */
    vi half = __builtin_convertvector(n, vi) >> 1, rest = __builtin_convertvector(n, vi) - half;
    vf y = p * (vf)((half + 127) << 23) * (vf)((rest + 127) << 23);
    y = blend(x > high, splat(INFINITY), y);
    y = blend(x < low, (vf){0}, y);
    return blend(x != x, x, y);
}

/* tanh: by e^2x, and near 0, where that would cancel, by an odd polynomial fitted to a relative error of 4e-9. */
INLINE vf vtanh(vf x) {
    vf magnitude = blend(x < 0, -x, x);
    vf large = 1.0f - 2.0f / (vexp(2.0f * magnitude) + 1.0f);
    vf z = x * x;
    vf p = splat(-0.00571703864f);
    p = p * z + 0.0206505806f;
    p = p * z + -0.0537434965f;
    p = p * z + 0.133314908f;
    p = p * z + -0.333332837f;
    vf small = x + x * z * p;
    return blend(magnitude < 0.625f, small, blend(x < 0, -large, large));
}

/* 1 / (1 + e^-x) */
INLINE vf vsigmoid(vf x) { return 1.0f / (1.0f + vexp(-x)); }

/* erfc(z) for z >= 0, with a relative error below 3e-7 until it underflows: e^(-z^2) times a polynomial in
 * 1 / (1 + z / 2), fitted by least squares at Chebyshev nodes. */
INLINE vf verfc(vf z) {
    vf t = 1.0f / (1.0f + 0.5f * z);
    vf p = splat(-0.0590690002f);
    p = p * t + 0.284575135f;
    p = p * t + -0.48720026f;
    p = p * t + 0.278067559f;
    p = p * t + -0.0266259294f;
    p = p * t + 0.20268698f;
    p = p * t + 0.243103743f;
    p = p * t + 0.282375306f;
    p = p * t + 0.282086432f;
    return p * t * vexp(-z * z);
}

/* x * Phi(x), Phi being the normal distribution's cumulative function: 1 - erfc(x / sqrt 2) / 2. */
INLINE vf vgelu(vf x) {
    vf magnitude = blend(x < 0, -x, x);
    vf tail = 0.5f * verfc(magnitude * 0.707106781f);
    return x * blend(x < 0, tail, 1.0f - tail);
}

/* The tanh form: x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))). */
INLINE vf vgelu_tanh(vf x) { return 0.5f * x * (1.0f + vtanh(0.797884561f * (x + 0.044715f * x * x * x))); }

#endif
