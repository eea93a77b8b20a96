/* A product of small matrices that lie in the caches, for attention. */
#ifndef SENSORIUM_SMALL_GEMM_H
#define SENSORIUM_SMALL_GEMM_H

#include "simd.h"

/* Rows that stay in registers: with two vectors of columns, 12 sums of 16 registers, or 24 of 32. */
#if defined(__AVX512F__)
#define GEMM_ROWS 12
#else
#define GEMM_ROWS 6
#endif

INLINE void small_gemm_block(const int rows, const int vectors, const float *a, long lda, const float *b, long ldb,
                             long depth, float *c, long ldc, int accumulate) {
    vf sum[GEMM_ROWS][2];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int j = 0; j < vectors; j++)
            sum[r][j] = accumulate ? *(const vf *)(c + r * ldc + j * VL) : (vf){0};
    for (long k = 0; k < depth; k++)
        UNROLL for (int j = 0; j < vectors; j++) {
            vf column = *(const vf *)(b + k * ldb + j * VL);
            UNROLL for (int r = 0; r < rows; r++) sum[r][j] += column * a[r * lda + k];
        }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int j = 0; j < vectors; j++) *(vf *)(c + r * ldc + j * VL) = sum[r][j];
}

/* c (+)= a @ b: a (rows, depth), b (depth, vectors * VL), c (rows, vectors * VL); b and c are aligned to vectors. A
 * cell's sum runs through the depth in order, whatever the number of rows. */
OUTLINE void small_gemm(long rows, long vectors, const float *a, long lda, const float *b, long ldb, long depth,
                       float *c, long ldc, int accumulate) {
#define BLOCK(R)                                                                                                    \
    case R:                                                                                                         \
        if (two) small_gemm_block(R, 2, a_rows, lda, b + j * VL, ldb, depth, cells, ldc, accumulate);               \
        else small_gemm_block(R, 1, a_rows, lda, b + j * VL, ldb, depth, cells, ldc, accumulate);                   \
        break;
    const long blocks = (rows + GEMM_ROWS - 1) / GEMM_ROWS;
    for (long j = 0; j < vectors; j += 2) {
        const int two = j + 1 < vectors;
        for (long i = 0; i < blocks; i++) {
            long begin = rows * i / blocks, end = rows * (i + 1) / blocks;
            const float *a_rows = a + begin * lda;
            float *cells = c + begin * ldc + j * VL;
            switch (end - begin) {
                BLOCK(1) BLOCK(2) BLOCK(3) BLOCK(4) BLOCK(5) BLOCK(6)
#if GEMM_ROWS > 6
                BLOCK(7) BLOCK(8) BLOCK(9) BLOCK(10) BLOCK(11) BLOCK(12)
#endif
            }
        }
    }
#undef BLOCK
}

#endif
