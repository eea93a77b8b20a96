/* x @ weight.T + bias with a packed weight, by vectors; linear_tiles.c is for bfloat16 by tiles.
 *
 * Order of summation. For every output: k runs in order within blocks of KC, the blocks' sums are added in order, and
 * the bias comes last. The order depends on K alone. So a row's result doesn't depend on the other rows, on the number
 * of threads, or on how the batch is divided, bit for bit.
 *
 * Loops. A chunk of rows is copied into float32 (or bfloat16 pairs), interleaved in blocks of at most MR rows; threads
 * divide the panels; a micro kernel multiplies one block of rows by one panel (by several for very few rows, when
 * reading weights takes nearly all the time).
 */
#include <stdlib.h>

#include "linear.h"

#define KC 512
#if VL == 16
#define MR 12
#else
#define MR 6
#endif
#define MAX_PANELS 4      /* that one call of a micro kernel takes */
#define CHUNK_ROWS 192    /* rows of a chunk, whose copy should stay in the L2 and L3 caches */

/* ---- packing ------------------------------------------------------------------------------------------------ */

EXPORT long sensorium_packed_bytes(int dtype, long n, long k) {
    return (n + NR - 1) / NR * panel_steps(dtype, k) * step_bytes(dtype);
}

/* A weight (n, k) with rows `row_bytes` apart, from the first row of a panel on, of which `columns` there are. */
typedef struct {
    const char *first;
    long row_bytes, columns, k;
} panel_rows;

INLINE float weight_at(const int dtype, const panel_rows *rows, long column, long k) {
    if (column >= rows->columns || k >= rows->k) return 0;
    return load1(dtype, rows->first + column * rows->row_bytes, k);
}

/* The place of weight (column, k) in its panel, in elements. */
INLINE long packed_index(const int dtype, long column, long k) {
    if (dtype == BF16 && BF16_PAIRS) return k / 2 * (2 * NR) + column * 2 + k % 2;
    if (dtype == BF16) return k * NR + column % VL * 2 + column / VL;
    return k * NR + column;
}

/* A step of a panel is a row of 32-bit units: one float32, two bfloat16 of one column, or two narrow floats of two
 * columns. Load unit `unit` of VL steps from step s on. */
INLINE vf load_units(const int dtype, const panel_rows *rows, long unit, long s) {
    if (dtype == F32 || k_per_step(dtype) == 2)
        return unit < rows->columns ? vload(F32, rows->first + unit * rows->row_bytes, s) : (vf){0};
    const long low = dtype == BF16 ? unit : 2 * unit, high = dtype == BF16 ? unit + VL : 2 * unit + 1;
    vu pair = {0};
    if (low < rows->columns) pair = vload_u16((const uint16_t *)(rows->first + low * rows->row_bytes) + s);
    if (high < rows->columns)
        pair |= vload_u16((const uint16_t *)(rows->first + high * rows->row_bytes) + s) << 16;
    return (vf)pair;
}

INLINE void pack_panel(const int dtype, char *panel, const panel_rows *rows) {
    const long steps = panel_steps(dtype, rows->k), whole = rows->k / k_per_step(dtype);
    const long units = step_bytes(dtype) / 4;
    long s = 0;
    for (; s + VL <= whole; s += VL)
        for (long unit = 0; unit < units; unit += VL) {
            vf square[VL];
            UNROLL for (int j = 0; j < VL; j++) square[j] = load_units(dtype, rows, unit + j, s);
            transpose(square);
            UNROLL for (int i = 0; i < VL; i++) *(vf *)(panel + (s + i) * step_bytes(dtype) + unit * 4) = square[i];
        }
    for (long k = s * k_per_step(dtype); k < steps * k_per_step(dtype); k++)
        for (long column = 0; column < NR; column++)
            store1(dtype, panel, packed_index(dtype, column, k), weight_at(dtype, rows, column, k));
}

typedef struct {
    char *packed;
    const char *weight; /* (n, k), rows row_bytes apart */
    long n, k, row_bytes;
    int dtype, threads;
} pack_args;

static void pack_task(const void *context, long first_panel, long last_panel, long thread) {
    (void)thread;
    const pack_args *args = context;
    const long panel_bytes = panel_steps(args->dtype, args->k) * step_bytes(args->dtype);
    for (long p = first_panel; p < last_panel; p++) {
        char *panel = args->packed + p * panel_bytes;
        const char *first = args->weight + p * NR * args->row_bytes;
        const panel_rows rows = {first, args->row_bytes, MIN(NR, args->n - p * NR), args->k};
        FOR_DTYPE(args->dtype, pack_panel, panel, &rows);
    }
}

ARGS_BYTES(sensorium_pack, pack_args);
EXPORT int sensorium_pack(const pack_args *args) {
    const long num_panels = (args->n + NR - 1) / NR;
    sensorium_parallel_for(args->threads, num_panels, fair_amount(num_panels, args->threads), pack_task, args);
    return 0;
}

/* ---- micro kernel ------------------------------------------------------------------------------------------- */

/* The two vectors of weights of one step of one panel, widened to float32. */
INLINE void load_weights(const int dtype, const char *b, vf *low, vf *high) {
    if (dtype == BF16) {
        vu pairs = *(const vu *)b;
        *low = (vf)(pairs << 16);
        *high = (vf)(pairs & 0xffff0000u);
    } else {
        *low = vload(dtype, b, 0);
        *high = vload(dtype, b, VL);
    }
}

/* sum + the dot product, in each lane, of two pairs of bfloat16. */
INLINE vf dot_pairs(vf sum, vu pair, vu weights) {
#if defined(USE_AVX512) && defined(__AVX512BF16__)
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)pair, (__m512bh)weights);
#else
    sum += (vf)(pair << 16) * (vf)(weights << 16);
    return sum + (vf)(pair & 0xffff0000u) * (vf)(weights & 0xffff0000u);
#endif
}

/* tile[row][column] (+)= sum over `steps` steps. `a` is interleaved: [step][rows]. */
INLINE void micro(const int dtype, const int rows, const int panels, const float *a, const char *b, long panel_bytes,
                  long steps, float *tile, long tile_width, int first) {
    vf acc[MR][2 * MAX_PANELS];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int j = 0; j < 2 * panels; j++) acc[r][j] = (vf){0};

    for (long s = 0; s < steps; s++) {
        UNROLL for (int p = 0; p < panels; p++) {
            const char *weights = b + p * panel_bytes + s * step_bytes(dtype);
            __builtin_prefetch(weights + 2048);
            if (step_bytes(dtype) > 64) __builtin_prefetch(weights + 2048 + 64);
            if (BF16_PAIRS && dtype == BF16) {
                const vu low = *(const vu *)weights, high = *(const vu *)(weights + VL * 4);
                UNROLL for (int r = 0; r < rows; r++) {
                    const vu pair = ((const uint32_t *)a)[s * rows + r] - (vu){0};
                    acc[r][2 * p] = dot_pairs(acc[r][2 * p], pair, low);
                    acc[r][2 * p + 1] = dot_pairs(acc[r][2 * p + 1], pair, high);
                }
                continue;
            }
            vf low, high;
            load_weights(dtype, weights, &low, &high);
            UNROLL for (int r = 0; r < rows; r++) {
                acc[r][2 * p] += low * a[s * rows + r];
                acc[r][2 * p + 1] += high * a[s * rows + r];
            }
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int j = 0; j < 2 * panels; j++) {
            vf *cell = (vf *)(tile + r * tile_width + j * VL);
            if (!first) acc[r][j] += *cell;
            *cell = acc[r][j];
        }
}

/* Panels that one call takes, for a block of so many rows: enough independent sums to hide an addition's latency. */
INLINE int panels_for(long rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }

INLINE void micro_for_rows(const int dtype, long rows, long panels, const float *a, const char *b, long panel_bytes,
                           long steps, float *tile, long tile_width, int first) {
#define ROWS(R, P) \
    case (R) * 8 + (P): micro(dtype, R, P, a, b, panel_bytes, steps, tile, tile_width, first); break;
    switch (rows * 8 + panels) {
        ROWS(1, 1) ROWS(1, 2) ROWS(1, 3) ROWS(1, 4) ROWS(2, 1) ROWS(2, 2) ROWS(3, 1)
        ROWS(4, 1) ROWS(5, 1) ROWS(6, 1)
#if MR > 6
        ROWS(7, 1) ROWS(8, 1) ROWS(9, 1) ROWS(10, 1) ROWS(11, 1) ROWS(12, 1)
#endif
    }
#undef ROWS
}

/* ---- driver ------------------------------------------------------------------------------------------------- */

/* `rows` rows divided as evenly as possible into blocks of at most MR: the first `larger` blocks have one row more than
 * `base`. */
typedef struct {
    long count, base, larger;
} row_blocks;

INLINE row_blocks split_rows(long rows) {
    long count = (rows + MR - 1) / MR;
    return (row_blocks){count, rows / count, rows % count};
}

INLINE long block_begin(row_blocks blocks, long i) { return i * blocks.base + MIN(i, blocks.larger); }

/* VL steps of a row from step s on: float32 values, or pairs of bfloat16 for the dot-product instruction. */
INLINE vf load_steps(const int dtype, const char *x, long s) {
    return k_per_step(dtype) == 2 ? vload(F32, x, s) : vload(dtype, x, s);
}

INLINE float load_step(const int dtype, const char *x, long s, long k) {
    if (k_per_step(dtype) == 1) return load1(dtype, x, s);
    const uint16_t *h = (const uint16_t *)x + 2 * s;
    return float_of_bits(2 * s + 1 < k ? h[0] | (uint32_t)h[1] << 16 : h[0]);
}

/* Copy one block of rows into `to` [step][rows]. */
INLINE void interleave_rows(const int dtype, const linear_args *args, long row, long rows, float *to) {
    const char *x[MR];
    const long steps = steps_of(dtype, args->k), whole = args->k / k_per_step(dtype);
    for (long r = 0; r < rows; r++) x[r] = args->x + (row + r) * args->x_row_bytes;
    long s = 0;
    /* Squares are written one step after the other, each over the unused lanes of the one before; the last must not
     * exceed the block. */
    for (; s + VL <= whole && (s + VL - 1) * rows + VL <= steps * rows; s += VL) {
        vf square[VL];
        if (rows == 1) {
            *(vf_any *)(to + s) = load_steps(dtype, x[0], s);
            continue;
        }
        UNROLL for (int r = 0; r < VL; r++) square[r] = r < rows && r < MR ? load_steps(dtype, x[r], s) : (vf){0};
        transpose(square);
        UNROLL for (int i = 0; i < VL; i++) *(vf_any *)(to + (s + i) * rows) = square[i];
    }
    for (; s < steps; s++)
        for (long r = 0; r < rows; r++) to[s * rows + r] = load_step(dtype, x[r], s, args->k);
}

/* Rows of blocks [first_block, last_block) times `panels` panels from `panel` on. */
INLINE void multiply_tile(const int dtype, const linear_args *args, const float *a, long chunk_row, row_blocks blocks,
                          long first_block, long last_block, long panel, long panels) {
    float tile[MAX(CHUNK_ROWS, 4 * MAX_PANELS) * NR] __attribute__((aligned(64)));
    const long steps = steps_of(dtype, args->k), block_steps = KC / k_per_step(dtype), width = panels * NR;
    const long panel_bytes = panel_steps(dtype, args->k) * step_bytes(dtype), row = block_begin(blocks, first_block);
    const char *weights = args->packed + panel * panel_bytes;

    for (long s = 0; s < steps; s += block_steps)
        for (long i = first_block; i < last_block; i++) {
            long begin = block_begin(blocks, i), rows = block_begin(blocks, i + 1) - begin;
            micro_for_rows(dtype, rows, panels, a + begin * steps + s * rows, weights + s * step_bytes(dtype),
                           panel_bytes, MIN(block_steps, steps - s), tile + (begin - row) * width, width, s == 0);
        }
    store_block(dtype, args, tile, width, chunk_row + row, block_begin(blocks, last_block) - row, panel * NR,
               MIN(width, args->n - panel * NR));
}

/* The work on one chunk of rows, in two stages: copy the rows, then multiply. */
typedef struct {
    const linear_args *args;
    float *a;          /* the copy, [block][step][rows of the block] */
    long first_row;    /* of the chunk */
    row_blocks blocks;
    long panels, panels_per_task, bands; /* a task is some panels times one band of the blocks */
} linear_chunk;

INLINE void copy_blocks(const int dtype, const linear_chunk *chunk, long first, long last) {
    const long steps = steps_of(dtype, chunk->args->k);
    for (long i = first; i < last; i++) {
        const long begin = block_begin(chunk->blocks, i), rows = block_begin(chunk->blocks, i + 1) - begin;
        interleave_rows(dtype, chunk->args, chunk->first_row + begin, rows, chunk->a + begin * steps);
    }
}

static void copy_task(const void *context, long first, long last, long thread) {
    (void)thread;
    const linear_chunk *chunk = context;
    FOR_DTYPE(chunk->args->dtype, copy_blocks, chunk, first, last);
}

INLINE void multiply_tiles(const int dtype, const linear_chunk *chunk, long first, long last) {
    for (long task = first; task < last; task++) {
        const long panel = task / chunk->bands * chunk->panels_per_task, band = task % chunk->bands;
        const long first_block = chunk->blocks.count * band / chunk->bands;
        const long last_block = chunk->blocks.count * (band + 1) / chunk->bands;
        multiply_tile(dtype, chunk->args, chunk->a, chunk->first_row, chunk->blocks, first_block, last_block, panel,
                      MIN(chunk->panels_per_task, chunk->panels - panel));
    }
}

static void multiply_task(const void *context, long first, long last, long thread) {
    (void)thread;
    const linear_chunk *chunk = context;
    FOR_DTYPE(chunk->args->dtype, multiply_tiles, chunk, first, last);
}

static void multiply_chunk(const linear_args *args, float *a, long first_row, long rows, int threads) {
    const row_blocks blocks = split_rows(rows);
    const long panels = (args->n + NR - 1) / NR, panels_per_task = panels_for(blocks.base + (blocks.larger > 0));
    const long columns = (panels + panels_per_task - 1) / panels_per_task;
    /* Divide the rows, too, if there are few panels for many threads. */
    const long bands = MIN(blocks.count, MAX(1, 4 * threads / columns)), tasks = columns * bands;
    const linear_chunk chunk = {args, a, first_row, blocks, panels, panels_per_task, bands};
    sensorium_parallel_for(threads_worth(rows * args->k, 32768, threads), blocks.count, 1, copy_task, &chunk);
    sensorium_parallel_for(threads, tasks, fair_amount(tasks, threads), multiply_task, &chunk);
}

/* Returns 0, or -1 when memory ran out. */
ARGS_BYTES(sensorium_linear, linear_args);
EXPORT int sensorium_linear(const linear_args *args) {
    if (args->m == 0 || args->n == 0) return 0;
    if (sensorium_tiles_on && args->dtype == BF16) return sensorium_linear_by_tiles(args);
    const int threads = threads_worth(args->m * args->n * args->k, 1 << 16, args->threads);
    const long chunks = (args->m + CHUNK_ROWS - 1) / CHUNK_ROWS;
    const size_t bytes = (size_t)(MIN(args->m, CHUNK_ROWS) * steps_of(args->dtype, args->k)) * sizeof(float);
    float *a = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!a) return -1;
    for (long chunk = 0; chunk < chunks; chunk++) {
        const long first_row = args->m * chunk / chunks;
        multiply_chunk(args, a, first_row, args->m * (chunk + 1) / chunks - first_row, threads);
    }
    free(a);
    return 0;
}
