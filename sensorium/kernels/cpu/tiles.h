/* Products of bfloat16 and of int8 matrices by tiles: 16 rows of 64 bytes, multiplied by one instruction (Intel AMX).
 *
 * A row tile holds 16 rows of 32 values, a column tile 16 pairs of rows of 16 columns, with each column's pairs
 * adjacent; their product is added to a sum tile of 16 x 16 float32. With int8, rows have 64 values, columns have fours
 * instead of pairs, and the sums are int32, which are exact in any order.
 *
 * Order of summation of bfloat16, for every cell: the products of even and of odd values are summed separately, in
 * order, by fused multiply-adds from zero; the two sums are added; the result is added to the cell. Subnormal float32
 * numbers count as zero. (Intel's instruction-set reference, TDPBF16PS.) The emulation below computes the same, so that
 * machines without tiles can test the code that uses them, and machines with tiles can test the emulation.
 *
 * A thread brackets its use of tiles with `begin_tiles` and `end_tiles`; sums live in tiles 0 to 3.
 */
#ifndef SENSORIUM_TILES_H
#define SENSORIUM_TILES_H

#include "simd.h"

#define NO_TILES 0
#define HARDWARE_TILES 1
#define EMULATED_TILES 2

/* Which code is compiled for tiles; may be set by a compiler flag, to test the emulation. */
#if !defined(TILES)
#if defined(USE_AVX512) && defined(__AVX512BF16__) && defined(__AMX_TILE__) && defined(__AMX_BF16__)
#define TILES HARDWARE_TILES
#else
#define TILES NO_TILES
#endif
#endif

/* The same for int8. */
#if TILES == EMULATED_TILES || (TILES && defined(__AMX_INT8__))
#define INT8_TILES TILES
#else
#define INT8_TILES NO_TILES
#endif

#define TILE_ROWS 16
#define TILE_DEPTH 32   /* values of a row */
#define TILE_BYTES 1024

/* Whether this process uses tiles: the system has granted it, and they are not switched off. */
extern int sensorium_tiles_on;

#if TILES == HARDWARE_TILES

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tile_config;

/* Give row and sum tiles `rows` rows, column tiles 16. */
INLINE void begin_tiles(int rows) {
    tile_config config = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        config.row_bytes[i] = 64;
        config.rows[i] = (uint8_t)(i < 6 ? rows : TILE_ROWS);
    }
    __asm__ volatile("ldtilecfg %0" : : "m"(config));
}

/* Releases the tiles, so that a context switch has less to save. */
INLINE void end_tiles(void) { __asm__ volatile("tilerelease"); }

#define TILE_LOAD(tile, from, stride) \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile : : "r"(from), "r"((long)(stride)) : "memory")
#define TILE_STORE(tile, to, stride) \
    __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" : : "r"(to), "r"((long)(stride)) : "memory")
#define TILE_ZERO(tile) __asm__ volatile("tilezero %tmm" #tile)
#define TILE_DOT(sum, rows, columns) __asm__ volatile("tdpbf16ps %tmm" #columns ", %tmm" #rows ", %tmm" #sum)
#define TILE_DOT_INT8(sum, rows, columns) __asm__ volatile("tdpbssd %tmm" #columns ", %tmm" #rows ", %tmm" #sum)

#elif TILES == EMULATED_TILES

static _Thread_local struct {
    int rows;
    char tile[8][TILE_ROWS][64];
} emulated;

INLINE void begin_tiles(int rows) { emulated.rows = rows; }
INLINE void end_tiles(void) {}
INLINE int emulated_rows(int tile) { return tile < 6 ? emulated.rows : TILE_ROWS; }

OUTLINE void emulate_load(int tile, const char *from, long stride) {
    for (int r = 0; r < emulated_rows(tile); r++) memcpy(emulated.tile[tile][r], from + r * stride, 64);
}

OUTLINE void emulate_store(int tile, char *to, long stride) {
    for (int r = 0; r < emulated_rows(tile); r++) memcpy(to + r * stride, emulated.tile[tile][r], 64);
}

INLINE float without_subnormals(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0, x) : x; }

INLINE float emulate_term(float sum, uint16_t a, uint16_t b) {
    const float x = float_of_bits((uint32_t)a << 16), y = float_of_bits((uint32_t)b << 16);
    return without_subnormals(fmaf(without_subnormals(x), without_subnormals(y), sum));
}

OUTLINE void emulate_dot(int sum, int rows, int columns) {
    for (int r = 0; r < emulated.rows; r++)
        for (int n = 0; n < 16; n++) {
            float parts[2] = {0, 0}, cell;
            for (int k = 0; k < 32; k++) {
                uint16_t a, b;
                memcpy(&a, &emulated.tile[rows][r][2 * k], 2);
                memcpy(&b, &emulated.tile[columns][k / 2][4 * n + 2 * (k % 2)], 2);
                parts[k % 2] = emulate_term(parts[k % 2], a, b);
            }
            memcpy(&cell, &emulated.tile[sum][r][4 * n], 4);
            cell = without_subnormals(without_subnormals(cell) + without_subnormals(parts[0] + parts[1]));
            memcpy(&emulated.tile[sum][r][4 * n], &cell, 4);
        }
}

OUTLINE void emulate_dot_int8(int sum, int rows, int columns) {
    for (int r = 0; r < emulated.rows; r++)
        for (int n = 0; n < 16; n++) {
            int32_t cell;
            memcpy(&cell, &emulated.tile[sum][r][4 * n], 4);
            for (int k = 0; k < 64; k++)
                cell += (int8_t)emulated.tile[rows][r][k] * (int8_t)emulated.tile[columns][k / 4][4 * n + k % 4];
            memcpy(&emulated.tile[sum][r][4 * n], &cell, 4);
        }
}

#define TILE_LOAD(tile, from, stride) emulate_load(tile, (const char *)(from), stride)
#define TILE_STORE(tile, to, stride) emulate_store(tile, (char *)(to), stride)
#define TILE_ZERO(sum) memset(emulated.tile[sum], 0, TILE_BYTES)
#define TILE_DOT(sum, rows, columns) emulate_dot(sum, rows, columns)
#define TILE_DOT_INT8(sum, rows, columns) emulate_dot_int8(sum, rows, columns)

#endif
#endif
