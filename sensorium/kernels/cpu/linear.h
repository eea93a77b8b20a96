/* The linear layer: the layout of its packed weight, and the code that both implementations share.
 *
 * Layout. The weight's N rows (output features) are divided into panels of NR = 2 * VL, the last one padded with zeros.
 * A panel holds, for each input feature k in turn, the NR weights that are multiplied with x[k], so that one pass over
 * a panel reads contiguous memory:
 *
 *   float32, float16   [N / NR][K][NR]
 *   bfloat16           [N / NR][K][VL][2]       lane i of a load holds columns i (low half) and i + VL (high half): a
 *                                               shift and a mask widen 2 * VL weights
 *   bfloat16, pairs    [N / NR][K / 2][NR][2]   pairs of k, as the dot-product instruction wants them; filled up with
 *                                               zeros to whole tiles of 16 pairs where the machine has tiles
 */
#ifndef SENSORIUM_LINEAR_H
#define SENSORIUM_LINEAR_H

#include "pool.h"
#include "tiles.h"

#define NR (2 * VL)

/* Whether bfloat16 weights are packed in pairs for the dot-product instruction; may be set by a compiler flag, to test
 * that layout without the instruction. */
#if !defined(BF16_PAIRS)
#if TILES || (defined(USE_AVX512) && defined(__AVX512BF16__))
#define BF16_PAIRS 1
#else
#define BF16_PAIRS 0
#endif
#endif

#if TILES && (VL != 16 || !BF16_PAIRS)
#error "tiles need panels of 32 columns in pairs"
#endif

typedef struct {
    void *out;         /* (m, n) of `dtype` */
    const char *x;     /* (m, k) of `dtype`, rows x_row_bytes apart */
    const char *packed;
    const void *bias;  /* (n,) of `dtype`, or null */
    long m, n, k, x_row_bytes;
    int dtype, threads;
} linear_args;

/* How many k make one step of a panel. */
INLINE long k_per_step(int dtype) { return BF16_PAIRS && dtype == BF16 ? 2 : 1; }

/* The number of steps with weights, and of all steps of a panel, padding included. */
INLINE long steps_of(int dtype, long k) { return (k + k_per_step(dtype) - 1) / k_per_step(dtype); }

INLINE long panel_steps(int dtype, long k) {
    return TILES && dtype == BF16 ? (k + TILE_DEPTH - 1) / TILE_DEPTH * (TILE_DEPTH / 2) : steps_of(dtype, k);
}

INLINE long step_bytes(int dtype) { return NR * size_of(dtype) * k_per_step(dtype); }

/* Add the bias to a block of sums, whose rows are `width` floats apart, round and store them. */
INLINE void store_block(const int dtype, const linear_args *args, const float *sums, long width, long row, long rows,
                        long column, long columns) {
    for (long r = 0; r < rows; r++) {
        const float *from = sums + r * width;
        long to = (row + r) * args->n + column, c = 0;
        for (; c + VL <= columns; c += VL) {
            vf x = *(const vf *)(from + c);
            if (args->bias) x += vload(dtype, args->bias, column + c);
            vstore(dtype, args->out, to + c, x);
        }
        for (; c < columns; c++)
            store1(dtype, args->out, to + c, from[c] + (args->bias ? load1(dtype, args->bias, column + c) : 0));
    }
}

/* The linear layer for bfloat16, by tiles; returns 0, or -1 when memory ran out. */
int sensorium_linear_by_tiles(const linear_args *args);

#endif
