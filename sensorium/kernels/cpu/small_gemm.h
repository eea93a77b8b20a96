/* A product of small matrices in the caches, for attention. */
#ifndef SENSORIUM_SMALL_GEMM_H
#define SENSORIUM_SMALL_GEMM_H

#include "simd.h"

/* The largest block of rows: with two vectors of columns, 12 sums of 16 registers, or 24 of 32. */
#if VL == 16
#define GEMM_ROWS 12
#else
#define GEMM_ROWS 6
#endif
#define GEMM_VECTORS 8

INLINE void small_gemm_block(const int rows, const int vectors, const float *a, long lda, const float *b, long ldb,
                             long depth, float *c, long ldc, int accumulate) {
    vf sum[GEMM_ROWS][GEMM_VECTORS];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int j = 0; j < vectors; j++)
            sum[r][j] = accumulate ? *(const vf *)(c + r * ldc + j * VL) : (vf){0};
    for (long k = 0; k < depth; k++) {
        /* For few rows the vectors of b are kept in registers; for many, only two of them, which leaves registers for
         * sums. */
        vf columns[GEMM_VECTORS];
        UNROLL for (int j = 0; j < vectors; j++) columns[j] = *(const vf *)(b + k * ldb + j * VL);
        UNROLL for (int r = 0; r < rows; r++) {
            const float x = a[r * lda + k];
            UNROLL for (int j = 0; j < vectors; j++) sum[r][j] += columns[j] * x;
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int j = 0; j < vectors; j++) *(vf *)(c + r * ldc + j * VL) = sum[r][j];
}

/* Vectors of columns that one call takes, for a block of so many rows: enough sums to hide an addition's latency. */
INLINE long vectors_for(long rows) { return rows == 1 ? 8 : rows == 2 ? 4 : 2; }

INLINE void small_gemm_rows(long rows, long vectors, const float *a, long lda, const float *b, long ldb, long depth,
                            float *c, long ldc, int accumulate) {
#define BLOCK(R, V) \
    case (R) * 16 + (V): small_gemm_block(R, V, a, lda, b, ldb, depth, c, ldc, accumulate); break;
    switch (rows * 16 + vectors) {
        BLOCK(1, 1) BLOCK(1, 2) BLOCK(1, 4) BLOCK(1, 8) BLOCK(2, 1) BLOCK(2, 2) BLOCK(2, 4)
        BLOCK(3, 1) BLOCK(3, 2) BLOCK(4, 1) BLOCK(4, 2) BLOCK(5, 1) BLOCK(5, 2) BLOCK(6, 1) BLOCK(6, 2)
#if GEMM_ROWS > 6
        BLOCK(7, 1) BLOCK(7, 2) BLOCK(8, 1) BLOCK(8, 2) BLOCK(9, 1) BLOCK(9, 2) BLOCK(10, 1) BLOCK(10, 2)
        BLOCK(11, 1) BLOCK(11, 2) BLOCK(12, 1) BLOCK(12, 2)
#endif
    }
#undef BLOCK
}

/* c (+)= a @ b: a (rows, depth), b (depth, vectors * VL), c (rows, vectors * VL); b and c are aligned to vectors. A
 * cell's sum runs through the depth in order, whatever the number of rows. */
OUTLINE void small_gemm(long rows, long vectors, const float *a, long lda, const float *b, long ldb, long depth,
                        float *c, long ldc, int accumulate) {
    const long blocks = (rows + GEMM_ROWS - 1) / GEMM_ROWS, most = vectors_for((rows + blocks - 1) / blocks);
    for (long j = 0, taken; j < vectors; j += taken) {
        for (taken = most; taken > vectors - j;) taken /= 2;
        for (long i = 0; i < blocks; i++) {
            const long begin = rows * i / blocks, end = rows * (i + 1) / blocks;
            small_gemm_rows(end - begin, taken, a + begin * lda, lda, b + j * VL, ldb, depth,
                            c + begin * ldc + j * VL, ldc, accumulate);
        }
    }
}

#endif
