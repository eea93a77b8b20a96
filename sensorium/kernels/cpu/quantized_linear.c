/* x @ weight.T + bias in int8: rows of x are quantized, sums are int32, results are scaled in float32.
 *
 * out = float(sum) * (scale of the row * scale of the column) + bias, each operation rounded on its own, then rounded
 * to the storage type. Integer sums are exact in any order, so a row's result has the same bits with every instruction
 * set, by vectors and by tiles, and whatever the other rows are.
 *
 * Loops. A chunk of rows is quantized into row tiles [tile of k][row][64]; threads divide the panels of the weight, and
 * if those are few, bands of the row tiles. A task iterates over K in blocks whose weights stay in the L1 cache; for
 * few rows, when reading weights takes nearly all the time, there is one block.
 */
#include "quantized.h"
#include "tile_products.h"
#include "workspace.h"

#define CHUNK_ROWS 512
#define BLOCK_DEPTH (16384 / PANEL_TILE_BYTES) /* tiles of k in a block of weights */
#define MAX_PANELS 4                           /* of a task */
#define STREAM_AHEAD 4096                      /* how many bytes ahead weights are prefetched */
#define MIN_TILE_ROWS 5                        /* fewer rows are computed by vectors even if there are tiles */
#if VL == 16
#define MR 8 /* rows that a vector kernel takes at once */
#else
#define MR 4
#endif

typedef struct {
    const linear_args *args;
    const float *scales;        /* of the weight's rows */
    const int32_t *starts;
    char *rows;                 /* the integers, [row tile][tile of k][tile_rows][64] */
    float *row_scales;
    int32_t *sums;              /* for each thread, [rows of a band][columns of a task] */
    long first_row, num_rows;   /* of the chunk */
    long tile_rows, row_tiles;  /* rows of a tile, and tiles */
    long depth, panels, panels_per_task, bands;
    int by_tiles;
} quantized_chunk;

/* Keeps the compiler from fusing a multiplication with the next addition, which would round once instead of twice. */
INLINE vf rounded(vf x) {
#if defined(USE_AVX512)
    __asm__("" : "+v"(x));
#elif defined(USE_AVX2)
    __asm__("" : "+x"(x));
#else
    __asm__("" : "+m"(x));
#endif
    return x;
}

/* ---- rows --------------------------------------------------------------------------------------------------- */

INLINE void quantize_tile(const int dtype, const quantized_chunk *chunk, long tile) {
    const long tile_bytes = chunk->tile_rows * DEPTH;
    char *to = chunk->rows + tile * chunk->depth * tile_bytes;
    for (long r = 0; r < chunk->tile_rows; r++, to += DEPTH) {
        const long row = tile * TILE_ROWS + r;
        if (row < chunk->num_rows)
            chunk->row_scales[row] =
                quantize_row(dtype, chunk->args->x + (chunk->first_row + row) * chunk->args->x_row_bytes, chunk->args->k,
                             to, tile_bytes, DOT_UNSIGNED && !chunk->by_tiles ? -128 : 0);
        else
            for (long k = 0; k < chunk->depth; k++) memset(to + k * tile_bytes, 0, DEPTH);
    }
}

static void quantize_task(const void *context, long first, long last, long thread) {
    (void)thread;
    const quantized_chunk *chunk = context;
    for (long tile = first; tile < last; tile++) FOR_DTYPE(chunk->args->dtype, quantize_tile, chunk, tile);
}

/* ---- sums by vectors ---------------------------------------------------------------------------------------- */

/* sum + the dot product, in each lane, of four values of a row and four weights. */
INLINE vi dot_fours(vi sum, vi x, vi weights) {
#if DOT_UNSIGNED && defined(USE_AVX512)
    return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)weights);
#elif DOT_UNSIGNED
    return (vi)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)x, (__m256i)weights);
#elif defined(USE_AVX512) && defined(__AVX512BW__)
    /* |x| times the weight with x's sign: with magnitudes up to 127 no sum of two products exceeds 16 bits. */
    const __m512i wanted = _mm512_mask_sub_epi8((__m512i)weights, _mm512_movepi8_mask((__m512i)x), _mm512_setzero_si512(),
                                                (__m512i)weights);
    const __m512i twos = _mm512_maddubs_epi16(_mm512_abs_epi8((__m512i)x), wanted);
    return sum + (vi)_mm512_madd_epi16(twos, _mm512_set1_epi16(1));
#elif defined(USE_AVX2)
    const __m256i twos = _mm256_maddubs_epi16(_mm256_abs_epi8((__m256i)x), _mm256_sign_epi8((__m256i)weights, (__m256i)x));
    return sum + (vi)_mm256_madd_epi16(twos, _mm256_set1_epi16(1));
#else
    sum += (x << 24 >> 24) * (weights << 24 >> 24);
    sum += (x << 16 >> 24) * (weights << 16 >> 24);
    sum += (x << 8 >> 24) * (weights << 8 >> 24);
    return sum + (x >> 24) * (weights >> 24);
#endif
}

/* sums[row][column] (+)= rows times panels over `depth` tiles of k; they begin with `starts`, unless that is null. */
INLINE void multiply_vectors(const int rows, const int panels, const char *x, long tile_bytes, const char *weights,
                             long panel_bytes, long depth, int32_t *sums, long width, const int32_t *starts) {
    vi acc[MR][2 * MAX_PANELS];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int j = 0; j < 2 * panels; j++)
            acc[r][j] = *(const vi *)((starts ? starts : sums + r * width) + j * VL);
    for (long k = 0; k < depth; k++, x += tile_bytes, weights += PANEL_TILE_BYTES)
        for (int s = 0; s < STEPS; s++)
            UNROLL for (int p = 0; p < panels; p++) {
                const char *from = weights + p * panel_bytes + s * NR * 4;
                __builtin_prefetch(from + STREAM_AHEAD);
                if (NR * 4 > 64) __builtin_prefetch(from + STREAM_AHEAD + 64);
                const vi low = *(const vi *)from, high = *(const vi *)(from + VL * 4);
                UNROLL for (int r = 0; r < rows; r++) {
                    int32_t four;
                    memcpy(&four, x + r * DEPTH + s * 4, 4);
                    acc[r][2 * p] = dot_fours(acc[r][2 * p], four - (vi){0}, low);
                    acc[r][2 * p + 1] = dot_fours(acc[r][2 * p + 1], four - (vi){0}, high);
                }
            }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int j = 0; j < 2 * panels; j++) *(vi *)(sums + r * width + j * VL) = acc[r][j];
}

/* Panels that one call takes, for so many rows: enough independent sums to hide an addition's latency. */
INLINE long panels_for(long rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }

static void multiply_rows(long rows, long panels, const char *x, long tile_bytes, const char *weights, long panel_bytes,
                          long depth, int32_t *sums, long width, const int32_t *starts) {
#define ROWS(R, P) \
    case (R) * 8 + (P): multiply_vectors(R, P, x, tile_bytes, weights, panel_bytes, depth, sums, width, starts); break;
    switch (rows * 8 + panels) {
        ROWS(1, 1) ROWS(1, 2) ROWS(1, 3) ROWS(1, 4) ROWS(2, 1) ROWS(2, 2) ROWS(3, 1) ROWS(4, 1)
#if MR > 4
        ROWS(5, 1) ROWS(6, 1) ROWS(7, 1) ROWS(8, 1)
#endif
    }
#undef ROWS
}

/* One block of panels times the row tiles of a band, each in parts of at most MR rows. */
static void multiply_by_vectors(const quantized_chunk *chunk, long first_tile, long last_tile, const char *weights, long k,
                                long depth, long panels, int32_t *sums, long width, const int32_t *starts) {
    const long tile_bytes = chunk->tile_rows * DEPTH;
    for (long tile = first_tile; tile < last_tile; tile++, sums += TILE_ROWS * width) {
        const char *x = chunk->rows + (tile * chunk->depth + k) * tile_bytes;
        const long rows = MIN(TILE_ROWS, chunk->num_rows - tile * TILE_ROWS), parts = (rows + MR - 1) / MR;
        for (long part = 0; part < parts; part++) {
            const long row = rows * part / parts;
            multiply_rows(rows * (part + 1) / parts - row, panels, x + row * DEPTH, tile_bytes, weights,
                          chunk->depth * PANEL_TILE_BYTES, depth, sums + row * width, width, k == 0 ? starts : NULL);
        }
    }
}

/* ---- sums by tiles ------------------------------------------------------------------------------------------ */

#if INT8_TILES
static void multiply_by_tiles(const quantized_chunk *chunk, long first_tile, long last_tile, const char *weights, long k,
                              long depth, int32_t *sums, long width, const char *ahead) {
    const long step = chunk->tile_rows * DEPTH, below = chunk->depth * step;
    const long pairs = (last_tile - first_tile + 1) / 2, lines = (PANEL_TILE_BYTES / 64 + pairs - 1) / pairs;
    for (long tile = first_tile; tile < last_tile; tile += 2) {
        const char *rows = chunk->rows + tile * below + k * step;
        if (tile + 1 < last_tile)
            multiply_tiles(1, 2, rows, step, below, weights, depth, (char *)sums, width, k == 0, ahead, lines);
        else
            multiply_tiles(1, 1, rows, step, below, weights, depth, (char *)sums, width, k == 0, ahead, lines);
        sums += 2 * TILE_ROWS * width;
        ahead += depth * lines * 64;
    }
}
#define BEGIN_TILES(rows) begin_tiles(rows)
#define END_TILES() end_tiles()
#else
static void multiply_by_tiles(const quantized_chunk *chunk, long first_tile, long last_tile, const char *weights, long k,
                              long depth, int32_t *sums, long width, const char *ahead) {
    (void)chunk, (void)first_tile, (void)last_tile, (void)weights, (void)k, (void)depth, (void)sums, (void)width, (void)ahead;
}
#define BEGIN_TILES(rows) (void)0
#define END_TILES() (void)0
#endif

/* ---- results ------------------------------------------------------------------------------------------------ */

INLINE vf scaled(const int dtype, const linear_args *args, vi sums, float row_scale, vf scales, long column, long columns) {
    vf x = rounded(__builtin_convertvector(sums, vf) * rounded(row_scale * scales));
    if (args->bias)
        x += columns == VL ? vload(dtype, args->bias, column) : vload_part(dtype, args->bias, column, columns);
    return x;
}

INLINE void store_rows(const int dtype, const quantized_chunk *chunk, const int32_t *sums, long width, long row, long rows,
                       long column, long columns) {
    const linear_args *args = chunk->args;
    for (long r = row; r < row + rows; r++, sums += width)
        for (long c = 0; c < columns; c += VL) {
            const vf x = scaled(dtype, args, *(const vi *)(sums + c), chunk->row_scales[r],
                                *(const vf_any *)(chunk->scales + column + c), column + c, MIN(VL, columns - c));
            const long to = (chunk->first_row + r) * args->n + column + c;
            if (columns - c >= VL)
                vstore(dtype, args->out, to, x);
            else
                vstore_part(dtype, args->out, to, x, columns - c);
        }
}

/* ---- driver ------------------------------------------------------------------------------------------------- */

/* All of K for some panels and a band of row tiles. */
static void multiply_panels(const quantized_chunk *chunk, long first_tile, long last_tile, long panel, long panels,
                            int32_t *sums) {
    const long row = first_tile * TILE_ROWS, rows = MIN(last_tile * TILE_ROWS, chunk->num_rows) - row;
    const long few = chunk->by_tiles ? 2 * TILE_ROWS : MR, panel_bytes = chunk->depth * PANEL_TILE_BYTES;
    const long blocks = rows <= few ? 1 : MAX(1, (chunk->depth + BLOCK_DEPTH - 1) / BLOCK_DEPTH), width = panels * NR;
    const long at_once = chunk->by_tiles ? 1 : MIN(panels, panels_for(rows));
    const char *weights = chunk->args->packed + panel * panel_bytes;
    for (long block = 0; block < blocks; block++) {
        const long k = chunk->depth * block / blocks, depth = chunk->depth * (block + 1) / blocks - k;
        for (long p = 0; p < panels; p += at_once) {
            const char *now = weights + p * panel_bytes + k * PANEL_TILE_BYTES;
            const char *next = p + 1 < panels ? now + panel_bytes : weights + (k + depth) * PANEL_TILE_BYTES;
            if (chunk->by_tiles)
                multiply_by_tiles(chunk, first_tile, last_tile, now, k, depth, sums + p * NR, width,
                                  blocks == 1 ? now + STREAM_AHEAD : next);
            else
                multiply_by_vectors(chunk, first_tile, last_tile, now, k, depth, MIN(at_once, panels - p), sums + p * NR,
                                    width, chunk->starts + (panel + p) * NR);
        }
    }
    FOR_DTYPE(chunk->args->dtype, store_rows, chunk, sums, width, row, rows, panel * NR,
              MIN(width, chunk->args->n - panel * NR));
}

static void multiply_task(const void *context, long first, long last, long thread) {
    const quantized_chunk *chunk = context;
    const long band_rows = (chunk->row_tiles + chunk->bands - 1) / chunk->bands * TILE_ROWS;
    int32_t *sums = chunk->sums + thread * band_rows * chunk->panels_per_task * NR;
    if (chunk->by_tiles) BEGIN_TILES((int)chunk->tile_rows);
    for (long task = first; task < last; task++) {
        const long panel = task / chunk->bands * chunk->panels_per_task, band = task % chunk->bands;
        multiply_panels(chunk, chunk->row_tiles * band / chunk->bands, chunk->row_tiles * (band + 1) / chunk->bands,
                        panel, MIN(chunk->panels_per_task, chunk->panels - panel), sums);
    }
    if (chunk->by_tiles) END_TILES();
}

/* Divide a chunk into tasks: of several panels if there are many for each thread; of bands of rows if there are few. */
static quantized_chunk plan_chunk(const linear_args *args, long first_row, long num_rows, int threads) {
    const long panels = panels_of(args->n), row_tiles = (num_rows + TILE_ROWS - 1) / TILE_ROWS;
    const int by_tiles = INT8_TILES && sensorium_tiles_on && num_rows >= MIN_TILE_ROWS;
    const long most = num_rows <= 2 ? panels_for(num_rows) : row_tiles <= 2 ? 1 : MAX_PANELS;
    return (quantized_chunk){
        .args = args,
        .scales = scales_of(args->packed, args->n, args->k),
        .starts = starts_of(args->packed, args->n, args->k),
        .first_row = first_row,
        .num_rows = num_rows,
        .tile_rows = MIN(TILE_ROWS, num_rows),
        .row_tiles = row_tiles,
        .depth = depth_of(args->k),
        .panels = panels,
        .panels_per_task = MAX(1, MIN(most, panels / (8L * threads))),
        .bands = threads == 1 ? 1 : MAX(1, MIN(row_tiles / 2, 4L * threads / panels)),
        .by_tiles = by_tiles,
    };
}

static void run_chunk(quantized_chunk chunk, char *memory, long row_bytes, long scale_bytes, int threads) {
    chunk.rows = memory;
    chunk.row_scales = (float *)(memory + row_bytes);
    chunk.sums = (int32_t *)(memory + row_bytes + scale_bytes);
    const long tasks = (chunk.panels + chunk.panels_per_task - 1) / chunk.panels_per_task * chunk.bands;
    sensorium_parallel_for(threads_worth(chunk.num_rows * chunk.args->k, 1 << 16, threads), chunk.row_tiles, 1,
                           quantize_task, &chunk);
    sensorium_parallel_for(threads, tasks, fair_amount(tasks, threads), multiply_task, &chunk);
}

/* Returns 0, or -1 when memory ran out. */
ARGS_BYTES(sensorium_quantized_linear, linear_args);
EXPORT int sensorium_quantized_linear(const linear_args *args) {
    if (args->m == 0 || args->n == 0) return 0;
    const int threads = threads_worth(args->m * args->n * args->k, 1 << 17, args->threads);
    const long chunks = (args->m + CHUNK_ROWS - 1) / CHUNK_ROWS, most_rows = (args->m + chunks - 1) / chunks;
    const long padded_rows = round_up(most_rows, TILE_ROWS);
    const long row_bytes = padded_rows * depth_of(args->k) * DEPTH, scale_bytes = padded_rows * 4;
    char *memory = sensorium_open_workspace(row_bytes + scale_bytes + threads * padded_rows * MAX_PANELS * NR * 4);
    if (!memory) return -1;
    for (long chunk = 0; chunk < chunks; chunk++) {
        const long first_row = args->m * chunk / chunks, num_rows = args->m * (chunk + 1) / chunks - first_row;
        run_chunk(plan_chunk(args, first_row, num_rows, threads), memory, row_bytes, scale_bytes, threads);
    }
    sensorium_close_workspace(memory);
    return 0;
}
