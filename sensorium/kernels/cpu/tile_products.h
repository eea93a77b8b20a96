/* The inner loop over tiles, for both kinds of values. */
#ifndef SENSORIUM_TILE_PRODUCTS_H
#define SENSORIUM_TILE_PRODUCTS_H

#include "tiles.h"

#if TILES

#define COLUMN_TILES_BYTES (2 * TILE_BYTES) /* of the two column tiles that stand side by side in a panel */

INLINE void dot_tiles(const int is_int8, const int row_tiles) {
    if (is_int8) {
#if INT8_TILES
        TILE_DOT_INT8(0, 4, 6);
        TILE_DOT_INT8(1, 4, 7);
        if (row_tiles == 2) {
            TILE_DOT_INT8(2, 5, 6);
            TILE_DOT_INT8(3, 5, 7);
        }
#endif
    } else {
        TILE_DOT(0, 4, 6);
        TILE_DOT(1, 4, 7);
        if (row_tiles == 2) {
            TILE_DOT(2, 5, 6);
            TILE_DOT(3, 5, 7);
        }
    }
}

/* sums (+)= one or two row tiles times a panel over `depth` tiles of k; prefetch `lines` cache lines from `ahead` on at
 * each of them. Row tiles of successive k lie `row_step` bytes apart, the second one `second_row` bytes behind the
 * first; `sums` are float32 or int32, `width` to a row. */
INLINE void multiply_tiles(const int is_int8, const int row_tiles, const char *rows, long row_step, long second_row,
                           const char *weights, long depth, char *sums, long width, int first, const char *ahead,
                           long lines) {
    char *below = sums + TILE_ROWS * width * 4;
    if (first) {
        TILE_ZERO(0);
        TILE_ZERO(1);
        if (row_tiles == 2) {
            TILE_ZERO(2);
            TILE_ZERO(3);
        }
    } else {
        TILE_LOAD(0, sums, width * 4);
        TILE_LOAD(1, sums + 64, width * 4);
        if (row_tiles == 2) {
            TILE_LOAD(2, below, width * 4);
            TILE_LOAD(3, below + 64, width * 4);
        }
    }
    for (long k = 0; k < depth; k++, rows += row_step, weights += COLUMN_TILES_BYTES) {
        TILE_LOAD(4, rows, 64);
        TILE_LOAD(6, weights, 128);
        TILE_LOAD(7, weights + 64, 128);
        if (row_tiles == 2) TILE_LOAD(5, rows + second_row, 64);
        dot_tiles(is_int8, row_tiles);
        for (long i = 0; i < lines; i++, ahead += 64) __builtin_prefetch(ahead, 0, 2);
    }
    TILE_STORE(0, sums, width * 4);
    TILE_STORE(1, sums + 64, width * 4);
    if (row_tiles == 2) {
        TILE_STORE(2, below, width * 4);
        TILE_STORE(3, below + 64, width * 4);
    }
}

#endif
#endif
