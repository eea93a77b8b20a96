/* A task of attention.c for bfloat16, its two products by matrix tiles; included there alone.
 *
 * Scores are summed in float32 from bfloat16 queries and keys. The weights of the softmax are rounded to bfloat16, and
 * so are the terms of their normaliser, so that they still add up to one; the weighted sum is kept in float32.
 *
 * The working memory holds tiles: queries and weights as row tiles, keys (channels by positions) and values (positions
 * by channels) as column tiles. Row tiles have as many rows as the task, at most 16. Tiles are padded with zeros beyond
 * the head's channels and the positions.
 */
#ifndef SENSORIUM_ATTENTION_TILES_H
#define SENSORIUM_ATTENTION_TILES_H

#if TILES

INLINE long row_tile_bytes(long rows) { return MIN(rows, TILE_ROWS) * 64; }

/* Rows of a key/value head, padded to whole tiles. */
INLINE long tiled_rows(long rows) { return rows <= TILE_ROWS ? rows : round_up(rows, TILE_ROWS); }

/* ---- loading ------------------------------------------------------------------------------------------------ */

static void load_query_tiles(const attention_args *args, query_tile tile, long kv_head, char *to) {
    const long head_size = args->head_size, group = args->heads / args->kv_heads;
    const long rows = (tile.last - tile.first) * group, tile_bytes = row_tile_bytes(rows);
    const long depth = round_up(head_size, TILE_DEPTH) / TILE_DEPTH;
    memset(to, 0, (size_t)(tiled_rows(rows) * depth * 64));
    for (long r = 0; r < rows; r++) {
        const long token = args->starts[tile.sequence] + tile.first + r / group;
        const char *from = args->query + (token * args->query_stride + (kv_head * group + r % group) * head_size) * 2;
        char *row = to + r / TILE_ROWS * depth * tile_bytes + r % TILE_ROWS * 64;
        for (long i = 0; i < head_size; i += TILE_DEPTH, row += tile_bytes)
            memcpy(row, from + 2 * i, (size_t)(2 * MIN(TILE_DEPTH, head_size - i)));
    }
}

/* [16 positions][32 channels]: pairs of channels, transposed. */
static void load_key_tiles(long head_size, const tile_rows *rows, long offset, char *to) {
    for (long j = 0; j < rows->count; j += TILE_ROWS)
        for (long i = 0; i < head_size; i += TILE_DEPTH, to += TILE_BYTES) {
            vf square[VL];
            if (i + TILE_DEPTH <= head_size) {
                UNROLL for (int r = 0; r < VL; r++)
                    square[r] = is_present(rows, j + r) ? vload(F32, rows->keys[j + r] + offset + 2 * i, 0) : (vf){0};
            } else {
                for (int r = 0; r < VL; r++) {
                    square[r] = (vf){0};
                    if (is_present(rows, j + r)) memcpy(&square[r], rows->keys[j + r] + offset + 2 * i, (size_t)(2 * (head_size - i)));
                }
            }
            transpose(square);
            UNROLL for (int r = 0; r < VL; r++) *(vf *)(to + r * 64) = square[r];
        }
}

INLINE vu load_half_row(const char *from, long i, long head_size) {
    uint16_t rest[VL] = {0};
    if (i + VL <= head_size) return vload_u16((const uint16_t *)from + i);
    memcpy(rest, from + 2 * i, (size_t)(2 * (head_size - i)));
    return vload_u16(rest);
}

/* [32 positions][16 channels]: pairs of positions, side by side. */
static void load_value_tiles(long value_size, const tile_rows *rows, long offset, char *to) {
    for (long j = 0; j < rows->count; j += TILE_DEPTH)
        for (long i = 0; i < value_size; i += VL)
            for (long pair = j; pair < j + TILE_DEPTH; pair += 2, to += 64) {
                vu both = {0};
                if (is_present(rows, pair)) both = load_half_row(rows->values[pair] + offset, i, value_size);
                if (is_present(rows, pair + 1))
                    both |= load_half_row(rows->values[pair + 1] + offset, i, value_size) << 16;
                *(vu *)to = both;
            }
}

/* ---- products ----------------------------------------------------------------------------------------------- */

/* sums (+)= a row tile times `blocks` column tiles side by side, over `depth` tiles. */
INLINE void multiply_row_tile(const int blocks, const char *rows, long rows_step, const char *columns, long block_step,
                              long depth_step, long depth, float *sums, long width, int accumulate) {
    if (accumulate) {
        TILE_LOAD(0, sums, width * 4);
        if (blocks > 1) TILE_LOAD(1, sums + 16, width * 4);
        if (blocks > 2) TILE_LOAD(2, sums + 32, width * 4);
        if (blocks > 3) TILE_LOAD(3, sums + 48, width * 4);
    } else {
        TILE_ZERO(0);
        if (blocks > 1) TILE_ZERO(1);
        if (blocks > 2) TILE_ZERO(2);
        if (blocks > 3) TILE_ZERO(3);
    }
    for (long k = 0; k < depth; k++, rows += rows_step, columns += depth_step) {
        TILE_LOAD(4, rows, 64);
        TILE_LOAD(6, columns, 64);
        TILE_DOT(0, 4, 6);
        if (blocks > 1) {
            TILE_LOAD(7, columns + block_step, 64);
            TILE_DOT(1, 4, 7);
        }
        if (blocks > 2) {
            TILE_LOAD(6, columns + 2 * block_step, 64);
            TILE_DOT(2, 4, 6);
        }
        if (blocks > 3) {
            TILE_LOAD(7, columns + 3 * block_step, 64);
            TILE_DOT(3, 4, 7);
        }
    }
    TILE_STORE(0, sums, width * 4);
    if (blocks > 1) TILE_STORE(1, sums + 16, width * 4);
    if (blocks > 2) TILE_STORE(2, sums + 32, width * 4);
    if (blocks > 3) TILE_STORE(3, sums + 48, width * 4);
}

static void multiply_columns(long blocks, const char *rows, long rows_step, const char *columns, long block_step,
                             long depth_step, long depth, float *sums, long width, int accumulate) {
#define BLOCKS(B) \
    case B: multiply_row_tile(B, rows, rows_step, columns, block_step, depth_step, depth, sums, width, accumulate); break;
    for (long block = 0; block < blocks; block += 4, columns += 4 * block_step, sums += 64) switch (MIN(4, blocks - block)) {
            BLOCKS(1) BLOCKS(2) BLOCKS(3) BLOCKS(4)
        }
#undef BLOCKS
}

/* ---- a task ------------------------------------------------------------------------------------------------- */

#define KEY_VECTORS (KEY_TILE / VL)
#define WEIGHT_TILES (KEY_TILE / TILE_DEPTH) /* beside one another */

/* Scale, cap and mask a row of scores, as `finish_scores` does, for all columns that a tile may have. */
INLINE void finish_row(const attention_args *args, const float *scores, long low, long high, vf s[KEY_VECTORS]) {
    UNROLL for (int j = 0; j < KEY_VECTORS; j++) s[j] = *(const vf *)(scores + j * VL) * args->scale;
    if (args->softcap > 0)
        for (int j = 0; j < KEY_VECTORS; j++) s[j] = args->softcap * vtanh(s[j] / args->softcap);
    if (low > 0 || high < KEY_TILE) {
        const vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        UNROLL for (int j = 0; j < KEY_VECTORS; j++) {
            const vi column = lane + j * VL;
            s[j] = blend((column >= (int32_t)low) & (column < (int32_t)high), s[j], splat(-INFINITY));
        }
    }
}

/* As `update_row`, with rounded weights, which go to line `line` of the row tiles `to`. */
INLINE void update_tiled_row(workspace w, long row, const vf s[KEY_VECTORS], long width, char *to, long line,
                             long tile_bytes) {
    vf largest = s[0], total = {0};
    UNROLL for (int j = 1; j < KEY_VECTORS; j++) largest = vmax(s[j], largest);
    const float before = w.maxima[row], now = MAX(before, vlargest(largest)), base = now == -INFINITY ? 0 : now;
    UNROLL for (int j = 0; j < KEY_VECTORS; j++) {
        const vf weight = vround(BF16, vexp_nonpositive(s[j] - base));
        vstore(BF16, to + j * VL / TILE_DEPTH * tile_bytes + line * 64 + j * VL % TILE_DEPTH * 2, 0, weight);
        total += weight;
    }
    if (now != before) {
        float *sums = w.sums + row * width;
        const float shrink = vexp_nonpositive(splat(before - base))[0];
        w.normalisers[row] *= shrink;
        for (long i = 0; i < width; i += VL) *(vf *)(sums + i) *= shrink;
        w.maxima[row] = now;
    }
    w.normalisers[row] += vsum(total);
}

/* Attend to one tile of `count` keys from position `begin` on, which the workspace holds. Each stage runs for all rows
 * before the next one, since loading a tile right after writing it would be slow. */
static void attend_to_key_tiles(const attention_args *args, query_tile tile, sight seen, long begin, long count,
                                workspace w) {
    const long width = round_up(args->value_size, VL), group = args->heads / args->kv_heads;
    const long rows = (tile.last - tile.first) * group, tile_bytes = row_tile_bytes(rows);
    const long channel_tiles = round_up(args->head_size, TILE_DEPTH) / TILE_DEPTH;
    const long key_tiles = round_up(count, TILE_DEPTH) / TILE_DEPTH;
    char *queries = (char *)w.query, *keys = (char *)w.keys, *values = (char *)w.values, *weights = (char *)w.weights;
    for (long r = 0; r < rows; r += TILE_ROWS)
        multiply_columns(round_up(count, VL) / VL, queries + r / TILE_ROWS * channel_tiles * tile_bytes, tile_bytes, keys,
                         channel_tiles * TILE_BYTES, TILE_BYTES, channel_tiles, w.scores + r * KEY_TILE, KEY_TILE, 0);
    for (long i = tile.first, r = 0; i < tile.last; i++) {
        const key_range range = range_of(args, tile.sequence, i, seen.offset, seen.keys);
        const long low = range.low - begin, high = MIN(count, range.high - begin);
        for (const long stop = r + group; r < stop; r++) {
            vf scores[KEY_VECTORS];
            finish_row(args, w.scores + r * KEY_TILE, low, high, scores);
            update_tiled_row(w, r, scores, width, weights + r / TILE_ROWS * WEIGHT_TILES * tile_bytes, r % TILE_ROWS,
                             tile_bytes);
        }
    }
    for (long r = 0; r < rows; r += TILE_ROWS)
        multiply_columns(width / VL, weights + r / TILE_ROWS * WEIGHT_TILES * tile_bytes, tile_bytes, values, TILE_BYTES,
                         width / VL * TILE_BYTES, key_tiles, w.sums + r * width, width, 1);
}

static void attend_by_tiles(const attention_args *args, workspace w, query_tile tile) {
    const long head_size = args->head_size, heads = tile.last_head - tile.first_head;
    const long rows = tiled_rows((tile.last - tile.first) * (args->heads / args->kv_heads));
    const long query_floats = round_up(head_size, TILE_DEPTH) / 2; /* of a row */
    const sight seen = sight_of(args, tile);
    const long first_tile = seen.first_key / KEY_TILE * KEY_TILE;
    tile_rows found[2], *now = &found[0], *next = &found[1];

    find_rows(BF16, args, tile, seen, first_tile, next);
    prefetch_rows(BF16, args, next, heads, 0, 1);
    for (long h = 0; h < heads; h++)
        load_query_tiles(args, tile, tile.first_head + h, (char *)(w.query + h * rows * query_floats));
    clear_rows(args, tile, rows, w);

    begin_tiles((int)MIN(rows, TILE_ROWS));
    for (long begin = first_tile; begin < seen.last_key; begin += KEY_TILE) {
        tile_rows *done = now;
        now = next, next = done;
        find_rows(BF16, args, tile, seen, begin + KEY_TILE, next);
        for (long h = 0; h < heads; h++) {
            load_key_tiles(head_size, now, h * args->key_head_stride * 2, (char *)w.keys);
            load_value_tiles(args->value_size, now, h * args->value_head_stride * 2, (char *)w.values);
            prefetch_rows(BF16, args, next, heads, h, heads);
            workspace part = from_row(args, w, h * rows);
            part.query = w.query + h * rows * query_floats;
            attend_to_key_tiles(args, tile, seen, begin, now->count, part);
        }
    }
    end_tiles();
    for (long h = 0; h < heads; h++)
        store_rows(BF16, args, tile, tile.first_head + h, from_row(args, w, h * rows));
}

#endif
#endif
