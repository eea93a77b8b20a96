/* Attention over keys and values in the blocks of a paged cache, or in the rows of a flat batch.
 *
 * One task is one tile of query positions of one sequence, for one key/value head and all the query heads that share
 * it, so that keys and values are read once for the whole group; a tile of few positions takes several key/value heads,
 * whose keys are adjacent. A task walks over the keys in tiles of KEY_TILE positions counted from the sequence's start,
 * widens each tile to float32 (keys transposed), and keeps the running maximum, normaliser and weighted sum of the
 * online softmax (Milakov and Gimelshein 2018, algorithm 3; Dao et al. 2022, algorithm 1).
 *
 * Each row sees a contiguous range of keys, whatever the rules are: see `range_of`. Keys outside of the ranges of all
 * rows of a task are never read, nor are their entries of the block table.
 *
 * A row's result depends neither on the batch nor on how a prompt is divided into chunks, bit for bit: key tiles begin
 * at fixed positions, each sum has a fixed order, and a key that a row must not see adds an exact zero.
 */
#include <stdlib.h>

#include "pool.h"
#include "small_gemm.h"
#include "tiles.h"

#define KEY_TILE 64
#define ROW_TILE 96 /* query rows (positions times heads) of a task */

typedef struct {
    void *out;                   /* (tokens, heads, value_size) */
    const char *query;           /* (tokens, heads, head_size), tokens query_stride elements apart */
    const char *key, *value;     /* slot (or flat row) s, head h: at element s * key_stride + h * key_head_stride */
    const int32_t *block_table;  /* (sequences, max_blocks); null: flat rows */
    const int32_t *starts;       /* (sequences + 1,) first query row of each sequence; flat: first key row too */
    const int32_t *key_lens;     /* (sequences,) keys of each sequence; null: as many as queries */
    const float *sinks;          /* (heads,) score of a key of value 0 that every row sees; null: none */
    const int32_t *span_begins, *span_ends; /* (tokens,) each: what a row sees beside all else; null: nothing */
    long sequences, heads, kv_heads, head_size, value_size, query_stride;
    long key_stride, key_head_stride, value_stride, value_head_stride;
    long block_size, max_blocks;
    long window;                 /* positions seen, own included; 0: all */
    long chunk;                  /* positions that see one another; 0: all */
    float scale, softcap;        /* softcap 0: none */
    int causal, dtype, threads;
} attention_args;

/* One task's share: query positions [first, last), counted within the sequence's queries, for key/value heads
 * [first_head, last_head). */
typedef struct {
    int32_t sequence, first, last, first_head, last_head;
} query_tile;

/* A thread's working memory. `width` is the size of a value rounded up to whole vectors. */
typedef struct {
    float *query;   /* [rows][head_size], the rows of the first key/value head, then those of the next */
    float *keys;    /* [head_size][KEY_TILE], transposed */
    float *values;  /* [KEY_TILE][width] */
    float *scores;  /* [rows][KEY_TILE], then the weights */
    float *weights; /* for products by tiles: [rows][KEY_TILE] bfloat16 */
    float *sums;    /* [rows][width] */
    float *maxima, *normalisers; /* [rows] */
} workspace;

/* Lay the parts out from `memory` on, each aligned to a cache line, and return how many floats they take. */
static long carve_up(float *memory, long rows, const attention_args *args, workspace *w) {
    const long depth = round_up(args->head_size, VL), width = round_up(args->value_size, VL);
    float **parts[] = {&w->query, &w->keys, &w->values,  &w->scores,
                       &w->weights, &w->sums, &w->maxima, &w->normalisers};
    const long sizes[] = {rows * depth, depth * KEY_TILE, KEY_TILE * width, rows * KEY_TILE, rows * KEY_TILE / 2,
                          rows * width, rows,             rows};
    long used = 0;
    for (int i = 0; i < 8; i++) {
        *parts[i] = memory ? memory + used : NULL;
        used += round_up(sizes[i], 16);
    }
    return used;
}

/* ---- loading ------------------------------------------------------------------------------------------------ */

/* The addresses of the keys and values of one tile, from the task's first key/value head on, for columns `first` to
 * `count`. */
typedef struct {
    const char *keys[KEY_TILE], *values[KEY_TILE];
    long first, count;
} tile_rows;

INLINE int is_present(const tile_rows *rows, long j) {
    return (unsigned long)(j - rows->first) < (unsigned long)(rows->count - rows->first);
}

/* Which keys the queries of a tile see. Query i of the sequence stands at position `offset + i`. */
typedef struct {
    long offset, keys, first_key, last_key;
} sight;

/* Find the visible keys of a tile that begins at position `begin`, one run of consecutive slots at a time. */
INLINE void find_rows(const int dtype, const attention_args *args, query_tile tile, sight seen, long begin,
                      tile_rows *rows) {
    const long key_head = tile.first_head * args->key_head_stride * size_of(dtype);
    const long value_head = tile.first_head * args->value_head_stride * size_of(dtype);
    rows->first = MAX(0, seen.first_key - begin);
    rows->count = MAX(rows->first, MIN(KEY_TILE, seen.last_key - begin));
    for (long j = rows->first; j < rows->count;) {
        long place = args->starts[tile.sequence] + begin + j, run = rows->count - j;
        if (args->block_table) {
            const int32_t *blocks = args->block_table + tile.sequence * args->max_blocks;
            const long block = (begin + j) / args->block_size, offset = begin + j - block * args->block_size;
            place = blocks[block] * args->block_size + offset;
            run = MIN(run, args->block_size - offset);
        }
        for (const long stop = j + run; j < stop; j++, place++) {
            rows->keys[j] = args->key + place * args->key_stride * size_of(dtype) + key_head;
            rows->values[j] = args->value + place * args->value_stride * size_of(dtype) + value_head;
        }
    }
}

/* Prefetch one of `parts` parts of the rows of `heads` heads, in the order of their addresses: the hardware can't
 * predict where blocks are, but prefetches within each. */
INLINE void prefetch_rows(const int dtype, const attention_args *args, const tile_rows *rows, long heads, long part,
                          long parts) {
    const long present = rows->count - rows->first;
    const long first = rows->first + present * part / parts, last = rows->first + present * (part + 1) / parts;
    const long key_bytes = heads * args->key_head_stride * size_of(dtype);
    const long value_bytes = heads * args->value_head_stride * size_of(dtype);
    for (long j = first; j < last; j++)
        for (long i = 0; i < key_bytes; i += 64) __builtin_prefetch(rows->keys[j] + i, 0, 2);
    for (long j = first; j < last; j++)
        for (long i = 0; i < value_bytes; i += 64) __builtin_prefetch(rows->values[j] + i, 0, 2);
}

INLINE vf vload_head(const int dtype, const void *p, long i, long head_size) {
    return i + VL <= head_size ? vload(dtype, p, i) : vload_part(dtype, p, i, head_size - i);
}

/* Widen one head of the keys, `offset` bytes into each row, and transpose them; columns up to the next whole vector
 * are filled with zeros. */
INLINE void load_keys(const int dtype, long head_size, const tile_rows *rows, long offset, float *to) {
    for (long j = 0; j < rows->count; j += VL) {
        vf square[VL];
        long i = 0;
        if (dtype == BF16) /* as pairs of channels, which are split after the transposition */
            for (; i + 2 * VL <= head_size; i += 2 * VL) {
                UNROLL for (int r = 0; r < VL; r++)
                    square[r] = is_present(rows, j + r) ? vload(F32, rows->keys[j + r] + offset, i / 2) : (vf){0};
                transpose(square);
                UNROLL for (int r = 0; r < VL; r++) {
                    *(vu *)(to + (i + 2 * r) * KEY_TILE + j) = (vu)square[r] << 16;
                    *(vu *)(to + (i + 2 * r + 1) * KEY_TILE + j) = (vu)square[r] & 0xffff0000u;
                }
            }
        for (; i < head_size; i += VL) {
            UNROLL for (int r = 0; r < VL; r++)
                square[r] = is_present(rows, j + r) ? vload_head(dtype, rows->keys[j + r] + offset, i, head_size) : (vf){0};
            transpose(square);
            UNROLL for (int r = 0; r < VL; r++) *(vf *)(to + (i + r) * KEY_TILE + j) = square[r];
        }
    }
}

INLINE void load_values(const int dtype, long value_size, const tile_rows *rows, long offset, float *to) {
    const long width = round_up(value_size, VL);
    memset(to, 0, (size_t)(rows->first * width) * sizeof(float));
    for (long j = rows->first; j < rows->count; j++)
        for (long i = 0; i < width; i += VL)
            *(vf *)(to + j * width + i) = vload_head(dtype, rows->values[j] + offset, i, value_size);
}

/* Row r of a key/value head is query position `first + r / group`, head `r % group` of the group. */
INLINE void load_queries(const int dtype, const attention_args *args, query_tile tile, long kv_head, float *to) {
    const long group_size = args->heads / args->kv_heads * args->head_size;
    for (long position = tile.first; position < tile.last; position++, to += group_size) {
        const long token = args->starts[tile.sequence] + position;
        const char *from = args->query + (token * args->query_stride + kv_head * group_size) * size_of(dtype);
        long i = 0;
        for (; i + VL <= group_size; i += VL) *(vf_any *)(to + i) = vload(dtype, from, i);
        for (; i < group_size; i++) to[i] = load1(dtype, from, i);
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
    return vlargest(maximum);
}

/* Turn a row of scores into weights relative to the new running maximum, and rescale what was summed so far. */
OUTLINE void update_row(workspace w, long row, long columns, long width, float tile_maximum) {
    const float before = w.maxima[row], now = MAX(before, tile_maximum);
    const float base = now == -INFINITY ? 0 : now; /* nothing seen yet: every weight is 0 */
    float *scores = w.scores + row * KEY_TILE, *sums = w.sums + row * width;
    vf total = {0};
    for (long j = 0; j < columns; j += VL) {
        vf weight = vexp_nonpositive(*(vf *)(scores + j) - base);
        *(vf *)(scores + j) = weight;
        total += weight;
    }
    if (now != before) {
        const float shrink = vexp_nonpositive(splat(before - base))[0];
        w.normalisers[row] *= shrink;
        for (long i = 0; i < width; i += VL) *(vf *)(sums + i) *= shrink;
        w.maxima[row] = now;
    }
    w.normalisers[row] += vsum(total);
}

/* ---- a task ------------------------------------------------------------------------------------------------- */

/* The part of a workspace that belongs to rows from `row` on. */
INLINE workspace from_row(const attention_args *args, workspace w, long row) {
    w.query += row * args->head_size;
    w.sums += row * round_up(args->value_size, VL);
    w.maxima += row;
    w.normalisers += row;
    return w;
}

/* Start with empty sums, except for the sinks, whose values are 0. */
INLINE void clear_rows(const attention_args *args, query_tile tile, long rows, workspace w) {
    const long heads = tile.last_head - tile.first_head, group = args->heads / args->kv_heads;
    memset(w.sums, 0, (size_t)(heads * rows * round_up(args->value_size, VL)) * sizeof(float));
    for (long h = 0; h < heads; h++)
        for (long r = 0; r < rows; r++) {
            const float sink = args->sinks ? args->sinks[(tile.first_head + h) * group + r % group] : -INFINITY;
            w.maxima[h * rows + r] = sink;
            w.normalisers[h * rows + r] = sink > -INFINITY ? 1 : 0;
        }
}

INLINE void store_rows(const int dtype, const attention_args *args, query_tile tile, long kv_head, workspace w) {
    const long size = args->value_size, width = round_up(size, VL), group = args->heads / args->kv_heads;
    for (long r = 0; r < (tile.last - tile.first) * group; r++) {
        const long token = args->starts[tile.sequence] + tile.first + r / group, head = kv_head * group + r % group;
        const float inverse = w.normalisers[r] > 0 ? 1.0f / w.normalisers[r] : 0; /* a row without keys is 0 */
        const float *sums = w.sums + r * width;
        long to = (token * args->heads + head) * size, i = 0;
        for (; i + VL <= size; i += VL) vstore(dtype, args->out, to + i, *(const vf *)(sums + i) * inverse);
        if (i < size) vstore_part(dtype, args->out, to + i, *(const vf *)(sums + i) * inverse, size - i);
    }
}

typedef struct {
    long low, high;
} key_range;

/* The range of keys that query i of a sequence with `keys` keys sees. */
INLINE key_range range_of(const attention_args *args, long sequence, long i, long offset, long keys) {
    const long position = offset + i;
    long low = 0, high = args->causal ? position + 1 : keys;
    if (args->window > 0) {
        low = position - args->window + 1;
        if (!args->causal) high = position + args->window;
    }
    if (args->chunk > 0) {
        const long first = position / args->chunk * args->chunk;
        low = MAX(low, first), high = MIN(high, first + args->chunk);
    }
    if (args->span_ends) {
        const long token = args->starts[sequence] + i, end = args->span_ends[token];
        if (end > position) low = MIN(low, args->span_begins[token]), high = MAX(high, end);
    }
    return (key_range){MAX(low, 0), MIN(high, keys)};
}

INLINE sight sight_of(const attention_args *args, query_tile tile) {
    const long queries = args->starts[tile.sequence + 1] - args->starts[tile.sequence];
    const long keys = args->key_lens ? args->key_lens[tile.sequence] : queries;
    const long offset = args->causal ? keys - queries : 0;
    sight seen = {offset, keys, keys, 0};
    for (long i = tile.first; i < tile.last; i++) {
        const key_range range = range_of(args, tile.sequence, i, offset, keys);
        seen.first_key = MIN(seen.first_key, range.low), seen.last_key = MAX(seen.last_key, range.high);
    }
    return seen;
}

/* Attend to one tile of `count` keys from position `begin` on, which the workspace holds. */
OUTLINE void attend_to_tile(const attention_args *args, query_tile tile, sight seen, long begin, long count,
                            workspace w) {
    const long head_size = args->head_size, width = round_up(args->value_size, VL);
    const long group = args->heads / args->kv_heads, rows = (tile.last - tile.first) * group;
    const long columns = round_up(count, VL);
    small_gemm(rows, columns / VL, w.query, head_size, w.keys, KEY_TILE, head_size, w.scores, KEY_TILE, 0);
    for (long i = tile.first, r = 0; i < tile.last; i++) {
        const key_range range = range_of(args, tile.sequence, i, seen.offset, seen.keys);
        const long low = range.low - begin, high = MIN(count, range.high - begin);
        for (const long stop = r + group; r < stop; r++)
            update_row(w, r, columns, width, finish_scores(args, w.scores + r * KEY_TILE, columns, low, high));
    }
    small_gemm(rows, width / VL, w.scores, KEY_TILE, w.values, width, count, w.sums, width, 1);
}

INLINE void attend(const int dtype, const attention_args *args, workspace w, query_tile tile) {
    const long key_bytes = args->key_head_stride * size_of(dtype), heads = tile.last_head - tile.first_head;
    const long value_bytes = args->value_head_stride * size_of(dtype);
    const long rows = (tile.last - tile.first) * (args->heads / args->kv_heads); /* of each key/value head */
    const sight seen = sight_of(args, tile);
    const long first_tile = seen.first_key / KEY_TILE * KEY_TILE;
    tile_rows found[2], *now = &found[0], *next = &found[1];

    find_rows(dtype, args, tile, seen, first_tile, next);
    prefetch_rows(dtype, args, next, heads, 0, 1);
    for (long h = 0; h < heads; h++)
        load_queries(dtype, args, tile, tile.first_head + h, w.query + h * rows * args->head_size);
    clear_rows(args, tile, rows, w);

    for (long begin = first_tile; begin < seen.last_key; begin += KEY_TILE) {
        tile_rows *done = now;
        now = next, next = done;
        find_rows(dtype, args, tile, seen, begin + KEY_TILE, next);
        for (long h = 0; h < heads; h++) {
            load_keys(dtype, args->head_size, now, h * key_bytes, w.keys);
            load_values(dtype, args->value_size, now, h * value_bytes, w.values);
            prefetch_rows(dtype, args, next, heads, h, heads);
            attend_to_tile(args, tile, seen, begin, now->count, from_row(args, w, h * rows));
        }
    }
    for (long h = 0; h < heads; h++)
        store_rows(dtype, args, tile, tile.first_head + h, from_row(args, w, h * rows));
}

#include "attention_tiles.h"

/* ---- driver ------------------------------------------------------------------------------------------------- */

/* Divide the work into tasks of at most `most_rows` rows (or one position of one head), and into several for each
 * thread if there is enough. Fill `tiles`, or only count them if it is null. */
static long list_tiles(const attention_args *args, long most_rows, query_tile *tiles) {
    const long group = args->heads / args->kv_heads, most_positions = MAX(1, most_rows / group);
    const long fair_heads = MAX(1, args->sequences * args->kv_heads / (4 * args->threads));
    long count = 0;
    for (long s = 0; s < args->sequences; s++) {
        const long queries = args->starts[s + 1] - args->starts[s];
        for (long first = 0; first < queries; first += most_positions) {
            const long last = MIN(queries, first + most_positions);
            const long heads = MIN(fair_heads, MAX(1, most_rows / ((last - first) * group)));
            for (long head = 0; head < args->kv_heads; head += heads, count++)
                if (tiles)
                    tiles[count] = (query_tile){(int32_t)s, (int32_t)first, (int32_t)last, (int32_t)head,
                                                (int32_t)MIN(args->kv_heads, head + heads)};
        }
    }
    return count;
}

typedef struct {
    const attention_args *args;
    const query_tile *tiles;
    long num_tiles, rows, floats; /* rows of a workspace, and its size */
    float *memory;                /* a workspace for each thread */
} attention_job;

static void attention_task(const void *context, long first, long last, long thread) {
    const attention_job *job = context;
    workspace w;
    carve_up(job->memory + thread * job->floats, job->rows, job->args, &w);
    /* Start with the last tile, which is the longest in causal attention. */
    for (long task = first; task < last; task++) {
        const query_tile tile = job->tiles[job->num_tiles - 1 - task];
#if TILES
        if (job->args->dtype == BF16 && sensorium_tiles_on) {
            attend_by_tiles(job->args, w, tile);
            continue;
        }
#endif
        FOR_DTYPE(job->args->dtype, attend, job->args, w, tile);
    }
}

/* Returns 0, or -1 when memory ran out. */
ARGS_BYTES(sensorium_attention, attention_args);
EXPORT int sensorium_attention(const attention_args *args) {
    const long num_tiles = list_tiles(args, ROW_TILE, NULL);
    if (num_tiles == 0) return 0;
    /* Twice a task's rows, since each head may pad a tile. */
    const long rows = MAX(2 * ROW_TILE, round_up(args->heads / args->kv_heads, 16));
    const int threads = (int)MIN(args->threads, num_tiles);
    workspace unused;
    const long floats = carve_up(NULL, rows, args, &unused);
    query_tile *tiles = malloc((size_t)num_tiles * sizeof(query_tile));
    float *memory = aligned_alloc(64, (size_t)(floats * threads) * sizeof(float));
    if (tiles && memory) {
        const attention_job job = {args, tiles, num_tiles, rows, floats, memory};
        list_tiles(args, ROW_TILE, tiles);
        sensorium_parallel_for(threads, num_tiles, 1, attention_task, &job);
    }
    const int result = tiles && memory ? 0 : -1;
    free(tiles);
    free(memory);
    return result;
}
