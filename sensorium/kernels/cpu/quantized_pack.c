/* Quantizes and packs a weight; see quantized.h. */
#include <stdlib.h>

#include "quantized.h"

EXPORT long sensorium_quantized_bytes(long n, long k) { return panels_of(n) * (panel_bytes_of(k) + 2 * NR * 4); }

typedef struct {
    char *packed;
    const char *weight; /* (n, k) of `dtype`, rows row_bytes apart */
    long n, k, row_bytes;
    int dtype, threads;
} quantize_args;

typedef struct {
    const quantize_args *args;
    char *scratch; /* for each thread, a panel's rows one by one */
} quantize_job;

/* Interleave fours of the columns, and compute the columns' starts. `rows` are NR rows of `bytes` integers. */
static void interleave(const char *rows, long bytes, char *panel, int32_t *starts) {
    for (long s = 0; s < bytes / 4; s++)
        for (long column = 0; column < NR; column++) memcpy(panel + (s * NR + column) * 4, rows + column * bytes + s * 4, 4);
    for (long column = 0; column < NR; column++) {
        int32_t sum = 0;
        for (long k = 0; k < bytes; k++) sum += (int8_t)rows[column * bytes + k];
        starts[column] = DOT_UNSIGNED ? -128 * sum : 0;
    }
}

INLINE void quantize_panel(const int dtype, const quantize_args *args, long panel, char *rows) {
    const long bytes = depth_of(args->k) * DEPTH;
    float *scales = scales_of(args->packed, args->n, args->k) + panel * NR;
    for (long column = 0; column < NR; column++) {
        const long n = panel * NR + column;
        scales[column] = 0;
        if (n < args->n)
            scales[column] = quantize_row(dtype, args->weight + n * args->row_bytes, args->k, rows + column * bytes, DEPTH, 0);
        else
            memset(rows + column * bytes, 0, (size_t)bytes);
    }
    interleave(rows, bytes, args->packed + panel * panel_bytes_of(args->k),
               starts_of(args->packed, args->n, args->k) + panel * NR);
}

static void quantize_task(const void *context, long first, long last, long thread) {
    const quantize_job *job = context;
    const quantize_args *args = job->args;
    char *rows = job->scratch + thread * NR * depth_of(args->k) * DEPTH;
    for (long panel = first; panel < last; panel++) FOR_DTYPE(args->dtype, quantize_panel, args, panel, rows);
}

/* Fills `packed`; returns 0, or -1 when memory ran out. */
ARGS_BYTES(sensorium_quantize, quantize_args);
EXPORT int sensorium_quantize(const quantize_args *args) {
    const long panels = panels_of(args->n), bytes = args->threads * NR * depth_of(args->k) * DEPTH;
    const quantize_job job = {args, malloc((size_t)bytes + 1)};
    if (!job.scratch) return -1;
    sensorium_parallel_for(args->threads, panels, fair_amount(panels, args->threads), quantize_task, &job);
    free(job.scratch);
    return 0;
}
