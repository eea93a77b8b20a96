/* Attention over keys and values that lie in the blocks of a paged cache, or in the rows of a flat batch.
 *
 * One task is one tile of query positions of one sequence, for all the query heads that share one key/value head, so
 * that keys and values are read once for the whole group. It walks over the keys in tiles of KEY_TILE positions
 * counted from the sequence's start, widens each tile to float32 (keys transposed), and keeps the running maximum,
 * normaliser and weighted sum of the online softmax (Milakov and Gimelshein 2018, algorithm 3; Dao et al. 2022,
 * algorithm 1).
 *
 * A row's result is the same bit for bit whatever else is in the batch and however a prompt is cut into chunks: the
 * key tiles begin at fixed positions, each sum runs in a fixed order, and a key that a row must not see adds an
 * exact zero.
 */
#include "small_gemm.h"

#include <omp.h>
#include <stdlib.h>

#define KEY_TILE 64
#define ROW_TILE 96  /* query rows (positions times heads of a group) of a task, about */

typedef struct {
    void *out;                   /* (tokens, heads, head_size) */
    const char *query;           /* (tokens, heads, head_size), tokens query_stride elements apart */
    const char *key, *value;     /* slot (or flat row) s, head h: at element s * key_stride + h * head_size */
    const int32_t *block_table;  /* (sequences, max_blocks); null: flat rows */
    const int32_t *starts;       /* (sequences + 1,) first query row of each sequence; flat: first key row too */
    const int32_t *key_lens;     /* (sequences,) keys of each sequence; null: as many as queries */
    long sequences, heads, kv_heads, head_size, query_stride, key_stride, value_stride;
    long block_size, max_blocks;
    long window;                 /* positions seen, own included; 0: all */
    float scale, softcap;        /* softcap 0: none */
    int causal, dtype, threads;
} attention_args;

/* One task's share: query positions [first, last), counted within the sequence's queries, for one key/value head. */
typedef struct {
    int32_t sequence, first, last;
} query_tile;

/* A thread's working memory. `width` is the head size rounded up to whole vectors. */
typedef struct {
    float *query;   /* [rows][head_size] */
    float *keys;    /* [head_size][KEY_TILE], transposed */
    float *values;  /* [KEY_TILE][width] */
    float *scores;  /* [rows][KEY_TILE], then the weights */
    float *sums;    /* [rows][width] */
    float *maxima, *normalisers; /* [rows] */
} workspace;

INLINE long round_up(long n, long step) { return (n + step - 1) / step * step; }

/* Lay the parts out from `memory` on, each aligned to a cache line, and return how many floats they take. */
static long carve_up(float *memory, long rows, long head_size, workspace *w) {
    const long width = round_up(head_size, VL);
    float **parts[] = {&w->query, &w->keys, &w->values, &w->scores, &w->sums, &w->maxima, &w->normalisers};
    const long sizes[] = {rows * head_size, width * KEY_TILE, KEY_TILE * width, rows * KEY_TILE,
                          rows * width,     rows,             rows};
    long used = 0;
    for (int i = 0; i < 7; i++) {
        *parts[i] = memory ? memory + used : NULL;
        used += round_up(sizes[i], 16);
    }
    return used;
}

/* ---- loading ------------------------------------------------------------------------------------------------ */

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif

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

/* Where position `position` of a sequence stands: its slot in the cache, or its row in the flat batch. */
INLINE long place_of(const attention_args *args, long sequence, long position) {
    if (!args->block_table) return args->starts[sequence] + position;
    return args->block_table[sequence * args->max_blocks + position / args->block_size] * args->block_size +
           position % args->block_size;
}

INLINE vf vload_head(const int dtype, const void *p, long i, long head_size) {
    return i + VL <= head_size ? vload(dtype, p, i) : vload_part(dtype, p, i, head_size - i);
}

/* Widen keys and values of positions [begin, begin + count) into the workspace; keys are transposed, and columns up
 * to the next whole vector are filled with zeros. */
INLINE void load_keys_and_values(const int dtype, const attention_args *args, workspace w, long sequence, long kv_head,
                                 long begin, long count) {
    const long head_size = args->head_size, width = round_up(head_size, VL), head = kv_head * head_size;
    const char *keys[KEY_TILE], *values[KEY_TILE];
    for (long j = 0; j < count; j++) {
        long place = place_of(args, sequence, begin + j);
        keys[j] = args->key + (place * args->key_stride + head) * size_of(dtype);
        values[j] = args->value + (place * args->value_stride + head) * size_of(dtype);
    }
    for (long j = 0; j < count; j += VL)
        for (long i = 0; i < head_size; i += VL) {
            vf square[VL];
            UNROLL for (int r = 0; r < VL; r++)
                square[r] = j + r < count ? vload_head(dtype, keys[j + r], i, head_size) : (vf){0};
            transpose(square);
            UNROLL for (int r = 0; r < VL; r++) *(vf *)(w.keys + (i + r) * KEY_TILE + j) = square[r];
        }
    for (long j = 0; j < count; j++)
        for (long i = 0; i < width; i += VL)
            *(vf *)(w.values + j * width + i) = vload_head(dtype, values[j], i, head_size);
}

/* Row r of a task is query position `first + r / group`, head `r % group` of the group. */
INLINE void load_queries(const int dtype, const attention_args *args, workspace w, query_tile tile, long kv_head) {
    const long head_size = args->head_size, group = args->heads / args->kv_heads;
    float *to = w.query;
    for (long position = tile.first; position < tile.last; position++) {
        const char *from = args->query + ((args->starts[tile.sequence] + position) * args->query_stride +
                                          kv_head * group * head_size) * size_of(dtype);
        long i = 0;
        for (; i + VL <= group * head_size; i += VL) *(vf_any *)(to + i) = vload(dtype, from, i);
        for (; i < group * head_size; i++) to[i] = load1(dtype, from, i);
        to += group * head_size;
    }
}

/* ---- softmax ------------------------------------------------------------------------------------------------ */

/* Scale, cap and mask a row of scores: keys before `low` and from `high` on (columns of the tile) become -infinity. */
OUTLINE float finish_scores(const attention_args *args, float *scores, long columns, long low, long high) {
    vi lane;
    for (int i = 0; i < VL; i++) lane[i] = i;
    vf maximum = splat(-INFINITY);
    for (long j = 0; j < columns; j += VL) {
        vf s = *(vf *)(scores + j) * args->scale;
        if (args->softcap > 0) s = args->softcap * vtanh(s / args->softcap);
        if (j < low || j + VL > high) {
            vi column = lane + (int32_t)j;
            s = blend((column >= (int32_t)low) & (column < (int32_t)high), s, splat(-INFINITY));
        }
        *(vf *)(scores + j) = s;
        maximum = vmax(s, maximum);
    }
    float largest = maximum[0];
    for (int i = 1; i < VL; i++) largest = MAX(largest, maximum[i]);
    return largest;
}

/* Turn a row of scores into weights relative to the new running maximum, and rescale what was summed so far. */
OUTLINE void update_row(workspace w, long row, long columns, long width, float tile_maximum) {
    const float before = w.maxima[row], now = MAX(before, tile_maximum);
    const float base = now == -INFINITY ? 0 : now; /* nothing seen yet: every weight is 0 */
    float *scores = w.scores + row * KEY_TILE, *sums = w.sums + row * width;
    vf total = {0};
    for (long j = 0; j < columns; j += VL) {
        vf weight = vexp(*(vf *)(scores + j) - base);
        *(vf *)(scores + j) = weight;
        total += weight;
    }
    if (now != before) {
        const float shrink = vexp(splat(before - base))[0];
        w.normalisers[row] *= shrink;
        for (long i = 0; i < width; i += VL) *(vf *)(sums + i) *= shrink;
        w.maxima[row] = now;
    }
    w.normalisers[row] += vsum(total);
}

/* ---- a task ------------------------------------------------------------------------------------------------- */

INLINE void store_rows(const int dtype, const attention_args *args, workspace w, query_tile tile, long kv_head) {
    const long head_size = args->head_size, width = round_up(head_size, VL), group = args->heads / args->kv_heads;
    for (long r = 0; r < (tile.last - tile.first) * group; r++) {
        long token = args->starts[tile.sequence] + tile.first + r / group, head = kv_head * group + r % group;
        const float inverse = w.normalisers[r] > 0 ? 1.0f / w.normalisers[r] : 0; /* a row without keys is 0 */
        const float *sums = w.sums + r * width;
        long to = (token * args->heads + head) * head_size, i = 0;
        for (; i + VL <= head_size; i += VL) vstore(dtype, args->out, to + i, *(const vf *)(sums + i) * inverse);
        if (i < head_size) vstore_part(dtype, args->out, to + i, *(const vf *)(sums + i) * inverse, head_size - i);
    }
}

INLINE void attend(const int dtype, const attention_args *args, workspace w, query_tile tile, long kv_head) {
    const long head_size = args->head_size, width = round_up(head_size, VL), group = args->heads / args->kv_heads;
    const long queries = args->starts[tile.sequence + 1] - args->starts[tile.sequence];
    const long keys = args->key_lens ? args->key_lens[tile.sequence] : queries;
    const long offset = keys - queries; /* query i stands at key position offset + i */
    const long rows = (tile.last - tile.first) * group, window = args->window > 0 ? args->window : keys + queries;
    /* Keys that any row of the tile sees. */
    const long first_key = MAX(0, offset + tile.first - window + 1);
    const long last_key = MIN(keys, args->causal ? offset + tile.last : offset + tile.last - 1 + window);

    load_queries(dtype, args, w, tile, kv_head);
    memset(w.sums, 0, (size_t)(rows * width) * sizeof(float));
    for (long r = 0; r < rows; r++) w.maxima[r] = -INFINITY, w.normalisers[r] = 0;

    for (long begin = first_key / KEY_TILE * KEY_TILE; begin < last_key; begin += KEY_TILE) {
        const long count = MIN(KEY_TILE, last_key - begin), columns = round_up(count, VL);
        load_keys_and_values(dtype, args, w, tile.sequence, kv_head, begin, count);
        small_gemm(rows, columns / VL, w.query, head_size, w.keys, KEY_TILE, head_size, w.scores, KEY_TILE, 0);
        for (long r = 0; r < rows; r++) {
            const long position = offset + tile.first + r / group;
            const long low = position - window + 1 - begin;
            const long high = MIN(count, (args->causal ? position + 1 : position + window) - begin);
            update_row(w, r, columns, width, finish_scores(args, w.scores + r * KEY_TILE, columns, low, high));
        }
        small_gemm(rows, width / VL, w.scores, KEY_TILE, w.values, width, count, w.sums, width, 1);
    }
    store_rows(dtype, args, w, tile, kv_head);
}

/* ---- driver ------------------------------------------------------------------------------------------------- */

/* Fill `tiles`, or only count them when it is null. */
static long list_tiles(const attention_args *args, long positions, query_tile *tiles) {
    long count = 0;
    for (long s = 0; s < args->sequences; s++) {
        long queries = args->starts[s + 1] - args->starts[s];
        for (long first = 0; first < queries; first += positions, count++)
            if (tiles) tiles[count] = (query_tile){(int32_t)s, (int32_t)first, (int32_t)MIN(queries, first + positions)};
    }
    return count;
}

INLINE void attend_tiles(const int dtype, const attention_args *args, const query_tile *tiles, long num_tiles,
                         float *memory, long floats, long rows, int threads) {
#pragma omp parallel num_threads(threads)
    {
        workspace w;
        carve_up(memory + omp_get_thread_num() * floats, rows, args->head_size, &w);
#pragma omp for schedule(dynamic)
        for (long task = 0; task < num_tiles * args->kv_heads; task++)
            /* From the last tile on: in causal attention it is the longest. */
            attend(dtype, args, w, tiles[num_tiles - 1 - task / args->kv_heads], task % args->kv_heads);
    }
}

/* Returns 0, or -1 when memory ran out. */
EXPORT int sensorium_attention(const attention_args *args) {
    const long group = args->heads / args->kv_heads, positions = MAX(1, ROW_TILE / group), rows = positions * group;
    const long num_tiles = list_tiles(args, positions, NULL);
    if (num_tiles == 0) return 0;
    const int threads = (int)MIN(args->threads, num_tiles * args->kv_heads);
    query_tile *tiles = malloc((size_t)num_tiles * sizeof(query_tile));
    workspace unused;
    const long floats = carve_up(NULL, rows, args->head_size, &unused); /* of one thread */
    float *memory = aligned_alloc(64, (size_t)(floats * threads) * sizeof(float));
    if (tiles && memory) {
        list_tiles(args, positions, tiles);
        FOR_DTYPE(args->dtype, attend_tiles, args, tiles, num_tiles, memory, floats, rows, threads);
    }
    const int result = tiles && memory ? 0 : -1;
    free(tiles);
    free(memory);
    return result;
}
