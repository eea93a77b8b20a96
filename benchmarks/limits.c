/* What this machine can do at best: bytes read per second, and multiply-adds per second in each arithmetic that the
 * kernels use. Each function runs its loop on `threads` threads of the kernels' pool; the caller takes the time. */
#include "pool.h"
#include "tiles.h"

typedef struct {
    const float *data;
    long share, rounds; /* floats, or rounds, of each task */
} limits_job;

static void read_task(const void *context, long first, long last, long thread) {
    (void)thread;
    const limits_job *job = context;
    vf sum[8] = {{0}};
    for (const float *p = job->data + first * job->share; p < job->data + last * job->share; p += 8 * VL)
        for (int j = 0; j < 8; j++) sum[j] += *(const vf *)(p + j * VL);
    for (int j = 0; j < 8; j++) __asm__ volatile("" : : "m"(sum[j]));
}

/* Read `count` floats once; a multiple of 16384. */
EXPORT void limits_read(const float *data, long count, int threads) {
    const limits_job job = {data, 16384, 0};
    sensorium_parallel_for(threads, count / job.share, 4, read_task, &job);
}

/* Keep the compiler from seeing that all sums are the same. */
#define HIDE_EACH(sum) \
    for (int j = 0; j < 12; j++) __asm__ volatile("" : "+x"(sum[j]));

static void fma_task(const void *context, long first, long last, long thread) {
    (void)thread;
    const limits_job *job = context;
    vf sum[12] = {{0}}, x = {0}, y = {0};
    HIDE_EACH(sum)
    for (long i = 0; i < (last - first) * job->rounds; i++) {
        __asm__ volatile("" : "+x"(x), "+x"(y));
        UNROLL for (int j = 0; j < 12; j++) sum[j] += x * y;
    }
    HIDE_EACH(sum)
}

/* `rounds` times 12 independent multiply-adds of vectors of float32, on each thread. */
EXPORT void limits_fma(long rounds, int threads) {
    const limits_job job = {0, 0, rounds / 64};
    sensorium_parallel_for(threads, 64L * threads, 1, fma_task, &job);
}

#if defined(__AVX512BF16__)
static void dot_task(const void *context, long first, long last, long thread) {
    (void)thread;
    const limits_job *job = context;
    __m512 sum[12] = {{0}};
    __m512bh x = {0}, y = {0};
    HIDE_EACH(sum)
    for (long i = 0; i < (last - first) * job->rounds; i++) {
        __asm__ volatile("" : "+x"(x), "+x"(y));
        UNROLL for (int j = 0; j < 12; j++) sum[j] = _mm512_dpbf16_ps(sum[j], x, y);
    }
    HIDE_EACH(sum)
}

/* The same with dot products of pairs of bfloat16. Returns 0, or -1 where the machine has none. */
EXPORT int limits_bf16_dot(long rounds, int threads) {
    const limits_job job = {0, 0, rounds / 64};
    sensorium_parallel_for(threads, 64L * threads, 1, dot_task, &job);
    return 0;
}
#else
EXPORT int limits_bf16_dot(long rounds, int threads) {
    (void)rounds, (void)threads;
    return -1;
}
#endif

#if TILES == HARDWARE_TILES
static void tile_task(const void *context, long first, long last, long thread) {
    (void)thread;
    const limits_job *job = context;
    begin_tiles(TILE_ROWS);
    for (long i = 0; i < (last - first) * job->rounds; i++) {
        TILE_DOT(0, 4, 6);
        TILE_DOT(1, 4, 7);
        TILE_DOT(2, 5, 6);
        TILE_DOT(3, 5, 7);
    }
    end_tiles();
}

/* `rounds` times 4 products of tiles on each thread, of zeros, which don't heat: a limit that no real numbers reach.
 * Returns 0, or -1 where the process has no tiles. */
EXPORT int limits_tile_dot(long rounds, int threads) {
    const limits_job job = {0, 0, rounds / 64};
    if (!sensorium_tiles_on) return -1;
    sensorium_parallel_for(threads, 64L * threads, 1, tile_task, &job);
    return 0;
}
#else
EXPORT int limits_tile_dot(long rounds, int threads) {
    (void)rounds, (void)threads;
    return -1;
}
#endif

EXPORT int limits_vector_length(void) { return VL; }
