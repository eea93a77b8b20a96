/* The operations between a layer's matrix products (normalisation, activations, rotary embedding, cache writes), and
 * greedy sampling.
 *
 * Every function works row by row, and divides the rows over threads if there is enough work. Rows of inputs may have
 * any stride (`*_stride`, in elements); outputs are contiguous. The rest of a row that doesn't fill a vector goes
 * through the same vector code, so an element's result doesn't depend on its place.
 */
#include "pool.h"

/* Run `function` on rows of n elements each. Waking a thread costs as much as about ten thousand elements. */
static void share_rows(long rows, long n, int threads, task_function *function, const void *args) {
    threads = threads_worth(rows * n, 32768, threads);
    sensorium_parallel_for(threads, rows, fair_amount(rows, threads), function, args);
}

/* Elements i to i + VL, or to `end` if that comes first. */
INLINE vf vload_to(int dtype, const void *p, long i, long end) {
    return i + VL <= end ? vload(dtype, p, i) : vload_part(dtype, p, i, end - i);
}

INLINE void vstore_to(int dtype, void *p, long i, vf x, long end) {
    if (i + VL <= end)
        vstore(dtype, p, i, x);
    else
        vstore_part(dtype, p, i, x, end - i);
}

INLINE const void *element(int dtype, const void *p, long i) { return (const char *)p + i * size_of(dtype); }

/* ---- root-mean-square norm ---------------------------------------------------------------------------------- */

typedef struct {
    void *out, *sum;                       /* (rows, n); `sum` is null without a residual */
    const void *x, *residual, *weight;     /* (rows, n), (rows, n) or null, (n,) */
    long rows, n, x_stride, residual_stride;
    float eps;
    int dtype, weight_dtype, threads; /* the weight's type is the rows', or float32 */
} norm_args;

INLINE void norm_row(const int dtype, const norm_args *args, long row) {
    const long n = args->n;
    const void *x = element(dtype, args->x, row * args->x_stride);
    void *out = (char *)args->out + row * n * size_of(dtype);
    vf squares[2] = {{0}, {0}};
    if (args->residual) {
        const void *residual = element(dtype, args->residual, row * args->residual_stride);
        void *sum = (char *)args->sum + row * n * size_of(dtype);
        for (long i = 0; i < n; i += VL) {
            vf total = vround(dtype, vload_to(dtype, x, i, n) + vload_to(dtype, residual, i, n));
            vstore_to(dtype, sum, i, total, n);
            squares[i / VL % 2] += total * total;
        }
        x = sum;
    } else {
        for (long i = 0; i < n; i += VL) {
            vf value = vload_to(dtype, x, i, n);
            squares[i / VL % 2] += value * value;
        }
    }
    const float scale = 1.0f / sqrtf(vsum(squares[0] + squares[1]) / (float)n + args->eps);
    for (long i = 0; i < n; i += VL) {
        vf normed = vload_to(dtype, x, i, n) * scale;
        if (args->weight_dtype == dtype)
            normed = vround(dtype, normed) * vload_to(dtype, args->weight, i, n);
        else
            normed *= vload_to(F32, args->weight, i, n);
        vstore_to(dtype, out, i, normed, n);
    }
}

INLINE void norm_rows(const int dtype, const norm_args *args, long first, long last) {
    for (long row = first; row < last; row++) norm_row(dtype, args, row);
}

static void norm_task(const void *context, long first, long last, long thread) {
    (void)thread;
    const norm_args *args = context;
    FOR_DTYPE(args->dtype, norm_rows, args, first, last);
}

/* With a residual: sum = x + residual, rounded to the storage type, and its norm; without: the norm of x. A weight of
 * the storage type is multiplied with the rounded norm; a float32 weight of narrower rows, with the norm in float32. */
ARGS_BYTES(sensorium_rms_norm, norm_args);
EXPORT int sensorium_rms_norm(const norm_args *args) {
    share_rows(args->rows, args->n, args->threads, norm_task, args);
    return 0;
}

/* ---- activations -------------------------------------------------------------------------------------------- */

enum activation { SILU = 0, GELU = 1, GELU_TANH = 2, QUICK_GELU = 3 }; /* activation.py knows these codes */

/* As vsigmoid without a division, exact to a few units in the last place, which rounding to a narrow type hides. */
INLINE vf sigmoid_for(const int dtype, vf x) {
#if defined(USE_AVX512)
    if (dtype != F32) {
        vi n;
        const vf p = vexp_parts(vmin(vmax(-x, splat(-87.0f)), splat(87.0f)), &n);
        const vf sum = 1.0f + p * (vf)((n + 127) << 23), near = (vf)_mm512_rcp14_ps((__m512)sum);
        const vf y = blend(x < -87.0f, (vf){0}, near * (2.0f - sum * near));
        return blend(x != x, x, y);
    }
#endif
    (void)dtype;
    return vsigmoid(x);
}

INLINE vf activate(const int dtype, const int kind, vf x) {
    if (kind == SILU) return x * sigmoid_for(dtype, x);
    if (kind == GELU) return vgelu(x);
    if (kind == GELU_TANH) return vgelu_tanh(x);
    return x * sigmoid_for(dtype, 1.702f * x);
}

INLINE void activate_row(const int dtype, const int kind, void *out, const void *x, long n, int gated) {
    for (long i = 0; i < n; i += VL) {
        vf y = activate(dtype, kind, vload_to(dtype, x, i, n));
        if (gated) y *= vload_to(dtype, x, n + i, 2 * n);
        vstore_to(dtype, out, i, y, n);
    }
}

typedef struct {
    void *out;      /* (rows, n) */
    const void *x;  /* (rows, n), or [gate, up] (rows, 2 n) when gated */
    long rows, n, x_stride;
    int kind, gated, dtype, threads;
} activation_args;

INLINE void activate_rows(const int dtype, const activation_args *args, long first, long last) {
    for (long row = first; row < last; row++) {
        const void *x = element(dtype, args->x, row * args->x_stride);
        void *out = (char *)args->out + row * args->n * size_of(dtype);
        switch (args->kind) {
            case SILU: activate_row(dtype, SILU, out, x, args->n, args->gated); break;
            case GELU: activate_row(dtype, GELU, out, x, args->n, args->gated); break;
            case GELU_TANH: activate_row(dtype, GELU_TANH, out, x, args->n, args->gated); break;
            case QUICK_GELU: activate_row(dtype, QUICK_GELU, out, x, args->n, args->gated); break;
        }
    }
}

static void activation_task(const void *context, long first, long last, long thread) {
    (void)thread;
    const activation_args *args = context;
    FOR_DTYPE(args->dtype, activate_rows, args, first, last);
}

/* out = act(x), or act(gate) * up. */
ARGS_BYTES(sensorium_activation, activation_args);
EXPORT int sensorium_activation(const activation_args *args) {
    share_rows(args->rows, args->n, args->threads, activation_task, args);
    return 0;
}

/* ---- rotary embedding --------------------------------------------------------------------------------------- */

typedef struct {
    void *query_out, *key_out;
    const void *query, *key; /* (tokens, heads, head_size), (tokens, kv_heads, head_size); a token's heads adjoin */
    const void *cos, *sin;   /* (tokens, rotary_dim / 2) of `table_dtype`, contiguous */
    long tokens, heads, kv_heads, head_size, rotary_dim, query_stride, key_stride;
    int neox, dtype, table_dtype, threads;
} rotary_args;

INLINE void rotate_head(const int dtype, const int table_dtype, const rotary_args *args, long token, void *out,
                        const void *x) {
    const long half = args->rotary_dim / 2;
    const void *cos = element(table_dtype, args->cos, token * half);
    const void *sin = element(table_dtype, args->sin, token * half);
    if (args->neox) {
        for (long i = 0; i < half; i += VL) {
            vf c = vload_to(table_dtype, cos, i, half), s = vload_to(table_dtype, sin, i, half);
            vf a = vload_to(dtype, x, i, half), b = vload_to(dtype, x, half + i, 2 * half);
            vstore_to(dtype, out, i, a * c - b * s, half);
            vstore_to(dtype, out, half + i, b * c + a * s, 2 * half);
        }
    } else {
        for (long i = 0; i < half; i++) {
            float c = load1(table_dtype, cos, i), s = load1(table_dtype, sin, i);
            float a = load1(dtype, x, 2 * i), b = load1(dtype, x, 2 * i + 1);
            store1(dtype, out, 2 * i, a * c - b * s);
            store1(dtype, out, 2 * i + 1, b * c + a * s);
        }
    }
    long passed = args->rotary_dim;
    memcpy((char *)out + passed * size_of(dtype), element(dtype, x, passed),
           (size_t)((args->head_size - passed) * size_of(dtype)));
}

INLINE void rotate_heads(const int dtype, const rotary_args *args, long token, long heads, long stride, void *out,
                         const void *x) {
    for (long head = 0; head < heads; head++) {
        void *to = (char *)out + (token * heads + head) * args->head_size * size_of(dtype);
        const void *from = element(dtype, x, token * stride + head * args->head_size);
        if (args->table_dtype == dtype)
            rotate_head(dtype, dtype, args, token, to, from);
        else
            rotate_head(dtype, F32, args, token, to, from);
    }
}

INLINE void rotate_tokens(const int dtype, const rotary_args *args, long first, long last) {
    for (long token = first; token < last; token++) {
        rotate_heads(dtype, args, token, args->heads, args->query_stride, args->query_out, args->query);
        rotate_heads(dtype, args, token, args->kv_heads, args->key_stride, args->key_out, args->key);
    }
}

static void rotary_task(const void *context, long first, long last, long thread) {
    (void)thread;
    const rotary_args *args = context;
    FOR_DTYPE(args->dtype, rotate_tokens, args, first, last);
}

/* The tables are of the storage type or float32. */
ARGS_BYTES(sensorium_rotary, rotary_args);
EXPORT int sensorium_rotary(const rotary_args *args) {
    const long token_size = (args->heads + args->kv_heads) * args->head_size;
    share_rows(args->tokens, token_size, args->threads, rotary_task, args);
    return 0;
}

/* ---- cache writes ------------------------------------------------------------------------------------------- */

typedef struct {
    char *key_cache, *value_cache; /* of each slot and head a piece */
    const char *key, *value;       /* of each token as many pieces, side by side */
    const int64_t *slots;          /* (tokens,); negative: not written */
    long tokens, heads;            /* heads whose channels follow one another may be given as one */
    long key_bytes, value_bytes;   /* of a piece */
    long key_slot_bytes, value_slot_bytes, key_head_bytes, value_head_bytes; /* from one to the next, in the cache */
    long key_stride_bytes, value_stride_bytes;                               /* from one token to the next */
    int threads;
} write_args;

static void write_task(const void *context, long first, long last, long thread) {
    (void)thread;
    const write_args *args = context;
    for (long token = first; token < last; token++) {
        const int64_t slot = args->slots[token];
        if (slot < 0) continue;
        char *key_to = args->key_cache + slot * args->key_slot_bytes;
        char *value_to = args->value_cache + slot * args->value_slot_bytes;
        const char *key = args->key + token * args->key_stride_bytes;
        const char *value = args->value + token * args->value_stride_bytes;
        for (long head = 0; head < args->heads; head++) {
            memcpy(key_to, key, (size_t)args->key_bytes);
            memcpy(value_to, value, (size_t)args->value_bytes);
            key_to += args->key_head_bytes, value_to += args->value_head_bytes;
            key += args->key_bytes, value += args->value_bytes;
        }
    }
}

/* Copy each token's key and value to its slot of a cache. */
ARGS_BYTES(sensorium_write_kv, write_args);
EXPORT int sensorium_write_kv(const write_args *args) {
    share_rows(args->tokens, args->heads * args->key_bytes, args->threads, write_task, args);
    return 0;
}

/* ---- greedy choice ------------------------------------------------------------------------------------------ */

typedef struct {
    int64_t *out;   /* (rows,) */
    const void *x;  /* (rows, n) */
    long rows, n, x_stride;
    int dtype, threads;
} argmax_args;

INLINE int any_lane(vi mask) {
    for (int i = 0; i < VL; i++)
        if (mask[i]) return 1;
    return 0;
}

/* The first NaN, if there is one; else the first of the largest values. The second of two passes reads from the cache,
 * and mostly only compares. */
INLINE long argmax_row(const int dtype, const void *x, long n) {
    vf largest[4] = {splat(-INFINITY), splat(-INFINITY), splat(-INFINITY), splat(-INFINITY)};
    vi nan = {0};
    long i = 0;
    for (; i + 4 * VL <= n; i += 4 * VL)
        UNROLL for (int j = 0; j < 4; j++) {
            vf value = vload(dtype, x, i + j * VL);
            largest[j] = vmax(value, largest[j]);
            nan |= value != value;
        }
    float best = vlargest(vmax(vmax(largest[0], largest[1]), vmax(largest[2], largest[3])));
    int any_nan = any_lane(nan);
    for (; i < n; i++) {
        float value = load1(dtype, x, i);
        best = value > best ? value : best;
        any_nan |= value != value;
    }
    for (i = 0; i + 4 * VL <= n; i += 4 * VL) {
        vi found = {0};
        UNROLL for (int j = 0; j < 4; j++) {
            vf value = vload(dtype, x, i + j * VL);
            found |= any_nan ? value != value : value == best;
        }
        if (any_lane(found)) break;
    }
    for (; i < n; i++) {
        float value = load1(dtype, x, i);
        if (any_nan ? value != value : value == best) return i;
    }
    return 0;
}

INLINE void argmax_rows(const int dtype, const argmax_args *args, long first, long last) {
    for (long row = first; row < last; row++)
        args->out[row] = argmax_row(dtype, element(dtype, args->x, row * args->x_stride), args->n);
}

static void argmax_task(const void *context, long first, long last, long thread) {
    (void)thread;
    const argmax_args *args = context;
    FOR_DTYPE(args->dtype, argmax_rows, args, first, last);
}

ARGS_BYTES(sensorium_argmax, argmax_args);
EXPORT int sensorium_argmax(const argmax_args *args) {
    share_rows(args->rows, args->n, args->threads, argmax_task, args);
    return 0;
}
