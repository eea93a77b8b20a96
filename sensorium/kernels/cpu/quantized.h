/* Linear layers in int8: how rows are quantized, and the layout of a quantized weight.
 *
 * A row (an output channel of the weight, a token of the input) is stored as round(x / scale), scale = largest
 * magnitude / 127: integers from -127 to 127. An infinity or NaN in a row makes its scale NaN, and so all its results.
 *
 * Layout. As bfloat16 in pairs (linear.h), with fours instead of pairs: the weight's N rows are divided into panels of
 * NR, the last one padded with zeros, and K is padded to whole tiles of 64:
 *
 *   [N / NR][K / 4][NR][4] int8, then [N] float32 scales and [N] int32 starts, N filled up to whole panels
 *
 * A start is a sum's initial value. The dot-product instruction takes unsigned values on one side, so 128 is added to
 * every value of a row, and the start subtracts 128 times the column's sum. Sums may overflow on the way: they are
 * computed modulo 2^32, and every final sum is below 2^31, see MAX_INPUTS.
 */
#ifndef SENSORIUM_QUANTIZED_H
#define SENSORIUM_QUANTIZED_H

#include "linear.h"

#define DEPTH 64                            /* values of a row in one tile of k */
#define STEPS (DEPTH / 4)                   /* of a tile of k */
#define PANEL_TILE_BYTES (STEPS * NR * 4)
#define SMALLEST_MAGNITUDE 0x1p-100f        /* the smallest magnitude that isn't rounded to 0 */

/* How a machine multiplies fours of int8. */
#if (defined(USE_AVX512) && defined(__AVX512VNNI__)) || (defined(USE_AVX2) && defined(__AVXVNNI__))
#define DOT_UNSIGNED 1
#else
#define DOT_UNSIGNED 0
#endif

typedef int8_t vb __attribute__((vector_size(VL), may_alias));
typedef vb vb_any __attribute__((aligned(1)));

INLINE long depth_of(long k) { return (k + DEPTH - 1) / DEPTH; }
INLINE long panels_of(long n) { return (n + NR - 1) / NR; }
INLINE long panel_bytes_of(long k) { return depth_of(k) * PANEL_TILE_BYTES; }
INLINE float *scales_of(const char *packed, long n, long k) { return (float *)(packed + panels_of(n) * panel_bytes_of(k)); }
INLINE int32_t *starts_of(const char *packed, long n, long k) { return (int32_t *)scales_of(packed, n, k) + panels_of(n) * NR; }

/* Bits of the largest magnitude. As integers, NaN is above infinity, and that above every number. */
INLINE int32_t largest_bits(const int dtype, const char *x, long k) {
    vi largest = {0};
    for (long i = 0; i < k; i += VL) {
        const vi bits = (vi)(i + VL <= k ? vload(dtype, x, i) : vload_part(dtype, x, i, k - i)) & 0x7fffffff;
        largest = (vi)blend(largest < bits, (vf)bits, (vf)largest);
    }
    int32_t bits = 0;
    for (int lane = 0; lane < VL; lane++) bits = MAX(bits, largest[lane]);
    return bits;
}

/* To nearest, ties to even. */
INLINE vb round_to_bytes(vf x) {
#if defined(USE_AVX512)
    return __builtin_convertvector((vi)_mm512_cvtps_epi32((__m512)x), vb);
#elif defined(USE_AVX2)
    return __builtin_convertvector((vi)_mm256_cvtps_epi32((__m256)x), vb);
#else
    vb bytes;
    for (int lane = 0; lane < VL; lane++) bytes[lane] = (int8_t)__builtin_rintf(x[lane]);
    return bytes;
#endif
}

/* Write k values as integers, `flip` being xored to each (-128 adds 128 to unsigned ones): DEPTH at a time,
 * `tile_bytes` apart, the last filled up with zeros. Returns the scale. */
INLINE float quantize_row(const int dtype, const char *x, long k, char *to, long tile_bytes, int8_t flip) {
    const float largest = float_of_bits((uint32_t)largest_bits(dtype, x, k)), used = MAX(largest, SMALLEST_MAGNITUDE);
    const int is_finite = largest <= 0x1.fffffep127f;
    const float inverse = 127.0f / used;
    const vb flips = flip - (vb){0};
    for (long i = 0; i < k; i += DEPTH, to += tile_bytes) {
        memset(to, 0, DEPTH);
        if (!is_finite) continue;
        for (long j = i; j < MIN(i + DEPTH, k); j += VL) {
            const vf part = j + VL <= k ? vload(dtype, x, j) : vload_part(dtype, x, j, k - j);
            *(vb_any *)(to + j - i) = round_to_bytes(part * inverse) ^ flips;
        }
    }
    return is_finite ? used / 127.0f : NAN;
}

#endif
