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

/* Lanes of a vector; may be set by a compiler flag, to test the other length. */
#if !defined(VL)
#if defined(__AVX512F__)
#define VL 16
#else
#define VL 8
#endif
#endif

/* The intrinsics for vectors of this length. */
#if VL == 16 && defined(__AVX512F__)
#define USE_AVX512 1
#elif VL == 8 && defined(__AVX2__) && defined(__F16C__)
#define USE_AVX2 1
#endif

#define INLINE static inline __attribute__((always_inline))
#define OUTLINE static __attribute__((noinline, unused))
#define EXPORT __attribute__((visibility("default")))
/* Exports the size of a function's struct, which native.py compares with that of its format. */
#define ARGS_BYTES(function, type) EXPORT const long function##_args_bytes = sizeof(type)
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

/* Codes of the storage types, also in native.py. */
enum dtype { F32 = 0, BF16 = 1, F16 = 2 };

/* Call `function` with the storage type as a constant, so that each type gets its own code. */
#define FOR_DTYPE(dtype, function, ...)                      \
    do {                                                     \
        if ((dtype) == F32) function(F32, __VA_ARGS__);      \
        else if ((dtype) == BF16) function(BF16, __VA_ARGS__); \
        else function(F16, __VA_ARGS__);                     \
    } while (0)

INLINE long round_up(long n, long step) { return (n + step - 1) / step * step; }

INLINE long size_of(int dtype) { return dtype == F32 ? 4 : 2; }

INLINE vf splat(float x) { return x - (vf){0}; }

/* Lane by lane: `yes` where the mask is -1, `no` where it is 0. */
INLINE vf blend(vi mask, vf yes, vf no) {
#if defined(USE_AVX2)
    return (vf)_mm256_blendv_ps((__m256)no, (__m256)yes, (__m256)mask);
#else
    return (vf)((mask & (vi)yes) | (~mask & (vi)no));
#endif
}

/* a > b ? a : b, which is b if either is NaN; likewise the smaller. */
#if defined(USE_AVX512)
INLINE vf vmax(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE vf vmin(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(USE_AVX2)
INLINE vf vmax(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE vf vmin(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
#else
INLINE vf vmax(vf a, vf b) { return blend(a > b, a, b); }
INLINE vf vmin(vf a, vf b) { return blend(a < b, a, b); }
#endif

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
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40); /* NaN stays NaN */
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

INLINE vu vload_u16(const uint16_t *p) {
#if defined(USE_AVX512)
    return (vu)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
#elif defined(USE_AVX2)
    return (vu)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
#else
    return __builtin_convertvector(*(const vh_any *)p, vu);
#endif
}

/* The upper halves of the lanes. */
INLINE void vstore_u16(uint16_t *p, vu x) {
#if defined(USE_AVX512)
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16((__m512i)(x >> 16)));
#elif defined(USE_AVX2)
    __m256i packed = _mm256_packus_epi32((__m256i)(x >> 16), _mm256_setzero_si256());
    _mm_storeu_si128((__m128i *)p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
#else
    *(vh_any *)p = __builtin_convertvector(x >> 16, vh);
#endif
}

INLINE vf vload_f16(const uint16_t *p) {
#if defined(USE_AVX512)
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif defined(USE_AVX2)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#else
    vf x;
    for (int i = 0; i < VL; i++) x[i] = float_of_half(p[i]);
    return x;
#endif
}

INLINE void vstore_f16(uint16_t *p, vf x) {
#if defined(USE_AVX512)
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(USE_AVX2)
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
    for (int i = 0; i < VL; i++) p[i] = half_of_float(x[i]);
#endif
}

/* Float bits rounded to bfloat16, in the upper half of each lane. Where the machine has an instruction for it, numbers
 * too small for a normal float32 become zero. */
INLINE vu round_to_bf16(vf x) {
#if defined(USE_AVX512) && defined(__AVX512BF16__)
    return (vu)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x)) << 16;
#else
    vu bits = (vu)x;
    vu rounded = bits + 0x7fff + (bits >> 16 & 1);
    vu nan = (vu)(x != x);
    return ((rounded & ~nan) | ((bits | 0x400000) & nan)) & 0xffff0000u;
#endif
}

INLINE void vstore_bf16(uint16_t *p, vf x) {
#if defined(USE_AVX512) && defined(__AVX512BF16__)
    _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh((__m512)x));
#else
    vstore_u16(p, round_to_bf16(x));
#endif
}

INLINE vf vload(int dtype, const void *p, long i) {
    if (dtype == F32) return *(const vf_any *)((const float *)p + i);
    const uint16_t *h = (const uint16_t *)p + i;
    if (dtype == F16) return vload_f16(h);
    return (vf)(vload_u16(h) << 16);
}

INLINE void vstore(int dtype, void *p, long i, vf x) {
    if (dtype == F32)
        *(vf_any *)((float *)p + i) = x;
    else if (dtype == F16)
        vstore_f16((uint16_t *)p + i, x);
    else
        vstore_bf16((uint16_t *)p + i, x);
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

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif

/* Sum and largest of the lanes, by combining halves, always in the same order. */
#if VL == 8
#define FOLD(x, OP)                                        \
    x = OP(x, SHUFFLE(x, x, 4, 5, 6, 7, 4, 5, 6, 7));      \
    x = OP(x, SHUFFLE(x, x, 2, 3, 2, 3, 6, 7, 6, 7));      \
    x = OP(x, SHUFFLE(x, x, 1, 1, 3, 3, 5, 5, 7, 7));
#else
#define FOLD(x, OP)                                                                                \
    x = OP(x, SHUFFLE(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 8, 9, 10, 11, 12, 13, 14, 15));          \
    x = OP(x, SHUFFLE(x, x, 4, 5, 6, 7, 4, 5, 6, 7, 12, 13, 14, 15, 12, 13, 14, 15));              \
    x = OP(x, SHUFFLE(x, x, 2, 3, 2, 3, 6, 7, 6, 7, 10, 11, 10, 11, 14, 15, 14, 15));              \
    x = OP(x, SHUFFLE(x, x, 1, 1, 3, 3, 5, 5, 7, 7, 9, 9, 11, 11, 13, 13, 15, 15));
#endif
#define ADD(a, b) ((a) + (b))

INLINE float vsum(vf x) {
    FOLD(x, ADD)
    return x[0];
}

INLINE float vlargest(vf x) {
    FOLD(x, vmax)
    return x[0];
}

/* ---- rearranging -------------------------------------------------------------------------------------------- */

/* Transpose a square of VL vectors: four by four within each quarter of the lanes, then the quarters. */
INLINE void transpose(vf r[VL]) {
    vf t[VL];
#if VL == 8
#define LOW(a, b) SHUFFLE(a, b, 0, 8, 1, 9, 4, 12, 5, 13)
#define HIGH(a, b) SHUFFLE(a, b, 2, 10, 3, 11, 6, 14, 7, 15)
#define LOW2(a, b) SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13)
#define HIGH2(a, b) SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15)
#else
#define LOW(a, b) SHUFFLE(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29)
#define HIGH(a, b) SHUFFLE(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31)
#define LOW2(a, b) SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
#define HIGH2(a, b) SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31)
#endif
    UNROLL for (int i = 0; i < VL; i += 4) {
        vf a = LOW(r[i], r[i + 1]), b = HIGH(r[i], r[i + 1]), c = LOW(r[i + 2], r[i + 3]), d = HIGH(r[i + 2], r[i + 3]);
        t[i] = LOW2(a, c);
        t[i + 1] = HIGH2(a, c);
        t[i + 2] = LOW2(b, d);
        t[i + 3] = HIGH2(b, d);
    }
    /* Now t[4 g + j] holds, in its quarter q, column 4 q + j of rows 4 g to 4 g + 3. */
    UNROLL for (int j = 0; j < 4; j++) {
#if VL == 8
        r[j] = SHUFFLE(t[j], t[4 + j], 0, 1, 2, 3, 8, 9, 10, 11);
        r[4 + j] = SHUFFLE(t[j], t[4 + j], 4, 5, 6, 7, 12, 13, 14, 15);
#else
        vf a = SHUFFLE(t[j], t[4 + j], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
        vf b = SHUFFLE(t[j], t[4 + j], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
        vf c = SHUFFLE(t[8 + j], t[12 + j], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
        vf d = SHUFFLE(t[8 + j], t[12 + j], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
        r[j] = SHUFFLE(a, c, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
        r[4 + j] = SHUFFLE(a, c, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
        r[8 + j] = SHUFFLE(b, d, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
        r[12 + j] = SHUFFLE(b, d, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
#endif
    }
}

/* ---- functions ---------------------------------------------------------------------------------------------- */

/* Split x into n ln 2 + r with |r| <= 0.35, and return e^r by its Taylor series, whose 8th term would be below half a
 * unit in the last place. */
INLINE vf vexp_parts(vf x, vi *n) {
    const float shift = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    vf whole = (x * 1.44269504f + shift) - shift;
    vf r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    vf p = splat(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    *n = __builtin_convertvector(whole, vi);
    return p;
}

/* e^x to about one unit in the last place; 0 below the smallest normal result. */
INLINE vf vexp(vf x) {
    const vf low = splat(-87.33654f), high = splat(88.72283f);
    vi n;
    vf p = vexp_parts(vmin(vmax(x, low), high), &n);
    vi half = n >> 1; /* in two factors, since 2^128 is not a float */
    vf y = p * (vf)((half + 127) << 23) * (vf)((n - half + 127) << 23);
    y = blend(x > high, splat(INFINITY), y);
    y = blend(x < low, (vf){0}, y);
    return blend(x != x, x, y);
}

/* e^x for x <= 0, as a softmax needs it: exactly 0 from about -87.7 down, where the exponent field of 2^n runs out. */
INLINE vf vexp_nonpositive(vf x) {
    vi n;
    vf p = vexp_parts(vmax(splat(-88.0f), x), &n);
    return p * (vf)((n + 127) << 23);
}

/* tanh: by e^2x, and near 0, where that would lose digits, by an odd polynomial with a relative error of 4e-9. */
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
