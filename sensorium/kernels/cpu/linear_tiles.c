/* x @ weight.T + bias for bfloat16, by tiles.
 *
 * Order of summation. For every output: the tiles' products (see tiles.h) are added in the order of k, and the bias
 * comes last. The order depends on K alone, so the other rows, the threads and the division of the batch change
 * nothing, bit for bit.
 *
 * Loops. A chunk of rows is copied into row tiles, padded with zeros; threads divide the panels of the weight, and if
 * those are few, bands of the rows. A task iterates over K in blocks that leave room in the L1 cache, and within a
 * block over its panels and over pairs of row tiles, for which 2 x 2 sums stay in tiles. Meanwhile it prefetches the
 * next block of weights. For few rows, when reading weights takes nearly all the time, there is one block.
 */
#include "linear.h"
#include "tile_products.h"
#include "workspace.h"

#if TILES
#define CHUNK_ROWS 512   /* rows whose copy should stay in the L2 cache, block by block */
#define BLOCK_DEPTH 8    /* tiles of k in a block of weights: 16 KiB */
#define MAX_PANELS 4     /* of a task */
#define STREAM_AHEAD 8192 /* how many bytes ahead weights are prefetched */

typedef struct {
    const linear_args *args;
    char *rows;                 /* the copy, [row tile][tile of k] */
    float *sums;                /* for each thread, [rows of a band][columns of a task] */
    long first_row, num_rows;   /* of the chunk */
    long row_tiles, depth;      /* tiles of rows, and of k */
    long panels, panels_per_task, bands;
} tiled_chunk;

INLINE long tiles_in(long n, long size) { return (n + size - 1) / size; }

/* ---- copying ------------------------------------------------------------------------------------------------ */

/* A row fills line `line` of every tile. */
INLINE void copy_row(const linear_args *args, long row, char *to) {
    const char *x = args->x + row * args->x_row_bytes;
    const long bytes = args->k * 2;
    for (long i = 0; i < bytes; i += 64, to += TILE_BYTES) {
        if (i + 64 <= bytes) {
            memcpy(to, x + i, 64);
        } else {
            memset(to, 0, 64);
            memcpy(to, x + i, (size_t)(bytes - i));
        }
    }
}

static void copy_task(const void *context, long first, long last, long thread) {
    (void)thread;
    const tiled_chunk *chunk = context;
    const long used_rows = MIN(TILE_ROWS, chunk->num_rows); /* the tiles' configuration leaves out the others */
    for (long tile = first; tile < last; tile++)
        for (long r = 0; r < used_rows; r++) {
            char *to = chunk->rows + tile * chunk->depth * TILE_BYTES + r * 64;
            const long row = tile * TILE_ROWS + r;
            if (row < chunk->num_rows)
                copy_row(chunk->args, chunk->first_row + row, to);
            else
                for (long k = 0; k < chunk->depth; k++) memset(to + k * TILE_BYTES, 0, 64);
        }
}

/* ---- multiplying -------------------------------------------------------------------------------------------- */

/* One block of a panel times all row tiles of a band. */
static void multiply_block(const tiled_chunk *chunk, long first_tile, long last_tile, const char *weights, long k,
                           long depth, float *sums, long width, const char *ahead) {
    const long tile_row_bytes = chunk->depth * TILE_BYTES, pairs = tiles_in(last_tile - first_tile, 2);
    const long lines = tiles_in(COLUMN_TILES_BYTES / 64, pairs);
    for (long tile = first_tile; tile < last_tile; tile += 2) {
        const char *rows = chunk->rows + tile * tile_row_bytes + k * TILE_BYTES;
        if (tile + 1 < last_tile)
            multiply_tiles(0, 2, rows, TILE_BYTES, tile_row_bytes, weights, depth, (char *)sums, width, k == 0,
                           ahead, lines);
        else
            multiply_tiles(0, 1, rows, TILE_BYTES, tile_row_bytes, weights, depth, (char *)sums, width, k == 0,
                           ahead, lines);
        sums += 2 * TILE_ROWS * width;
        ahead += depth * lines * 64;
    }
}

/* All of K for some panels and a band of row tiles. */
static void multiply_panels(const tiled_chunk *chunk, long first_tile, long last_tile, long panel, long panels,
                            float *sums) {
    const long panel_bytes = chunk->depth * COLUMN_TILES_BYTES, width = panels * NR;
    const long blocks = last_tile - first_tile <= 2 ? 1 : MAX(1, tiles_in(chunk->depth, BLOCK_DEPTH));
    const char *weights = chunk->args->packed + panel * panel_bytes;
    for (long block = 0; block < blocks; block++) {
        const long k = chunk->depth * block / blocks, depth = chunk->depth * (block + 1) / blocks - k;
        for (long p = 0; p < panels; p++) {
            const char *now = weights + p * panel_bytes + k * COLUMN_TILES_BYTES;
            const char *next = p + 1 < panels ? now + panel_bytes : weights + (k + depth) * COLUMN_TILES_BYTES;
            multiply_block(chunk, first_tile, last_tile, now, k, depth, sums + p * NR, width,
                           blocks == 1 ? now + STREAM_AHEAD : next);
        }
    }
    const long row = first_tile * TILE_ROWS;
    store_block(BF16, chunk->args, sums, width, chunk->first_row + row, MIN(last_tile * TILE_ROWS, chunk->num_rows) - row,
                panel * NR, MIN(width, chunk->args->n - panel * NR));
}

static void multiply_task(const void *context, long first, long last, long thread) {
    const tiled_chunk *chunk = context;
    const long band_rows = tiles_in(chunk->row_tiles, chunk->bands) * TILE_ROWS;
    float *sums = chunk->sums + thread * band_rows * chunk->panels_per_task * NR;
    begin_tiles((int)MIN(TILE_ROWS, chunk->num_rows));
    for (long task = first; task < last; task++) {
        const long panel = task / chunk->bands * chunk->panels_per_task, band = task % chunk->bands;
        multiply_panels(chunk, chunk->row_tiles * band / chunk->bands, chunk->row_tiles * (band + 1) / chunk->bands,
                        panel, MIN(chunk->panels_per_task, chunk->panels - panel), sums);
    }
    end_tiles();
}

/* ---- driver ------------------------------------------------------------------------------------------------- */

/* Divide a chunk into tasks: of several panels if there are many for each thread; of bands of rows if there are few. */
static tiled_chunk plan_chunk(const linear_args *args, long first_row, long num_rows, int threads) {
    const long panels = tiles_in(args->n, NR), row_tiles = tiles_in(num_rows, TILE_ROWS);
    return (tiled_chunk){
        .args = args,
        .first_row = first_row,
        .num_rows = num_rows,
        .row_tiles = row_tiles,
        .depth = tiles_in(args->k, TILE_DEPTH),
        .panels = panels,
        .panels_per_task = row_tiles <= 2 ? 1 : MAX(1, MIN(MAX_PANELS, panels / (8L * threads))),
        .bands = threads == 1 ? 1 : MAX(1, MIN(row_tiles / 2, 4L * threads / panels)),
    };
}

static void run_chunk(tiled_chunk chunk, char *rows, float *sums, int threads) {
    const long tasks = tiles_in(chunk.panels, chunk.panels_per_task) * chunk.bands;
    chunk.rows = rows;
    chunk.sums = sums;
    sensorium_parallel_for(threads_worth(chunk.num_rows * chunk.args->k, 1 << 17, threads), chunk.row_tiles, 1, copy_task,
                           &chunk);
    sensorium_parallel_for(threads, tasks, fair_amount(tasks, threads), multiply_task, &chunk);
}

int sensorium_linear_by_tiles(const linear_args *args) {
    const int threads = threads_worth(args->m * args->n * args->k, 1 << 17, args->threads);
    const long chunks = tiles_in(args->m, CHUNK_ROWS), most_rows = tiles_in(args->m, chunks);
    const long row_tiles = tiles_in(most_rows, TILE_ROWS), depth = tiles_in(args->k, TILE_DEPTH);
    const long row_bytes = row_tiles * depth * TILE_BYTES, sum_bytes = row_tiles * TILE_ROWS * MAX_PANELS * NR * 4;
    char *memory = sensorium_open_workspace(row_bytes + threads * sum_bytes);
    if (!memory) return -1;
    for (long chunk = 0; chunk < chunks; chunk++) {
        const long first_row = args->m * chunk / chunks, num_rows = args->m * (chunk + 1) / chunks - first_row;
        run_chunk(plan_chunk(args, first_row, num_rows, threads), memory, (float *)(memory + row_bytes), threads);
    }
    sensorium_close_workspace(memory);
    return 0;
}
#else
int sensorium_linear_by_tiles(const linear_args *args) {
    (void)args;
    return -1;
}
#endif
