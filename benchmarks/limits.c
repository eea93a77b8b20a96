/* What this machine can do at best: bytes read per second, and multiply-adds per second in each arithmetic that the
 * kernels use. Each function runs its loop on `threads` threads; the caller takes the time. */
#include <omp.h>
#include <stdint.h>

#if defined(__AVX512F__)
#define VL 16
#else
#define VL 8
#endif
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#define EXPORT __attribute__((visibility("default")))

typedef float vf __attribute__((vector_size(VL * 4), may_alias));

/* Read `count` floats once. */
EXPORT void limits_read(const float *data, long count, int threads) {
#pragma omp parallel num_threads(threads)
    {
        long share = count / threads / (8 * VL) * (8 * VL), first = share * omp_get_thread_num();
        vf sum[8] = {{0}};
        for (long i = first; i < first + share; i += 8 * VL)
            for (int j = 0; j < 8; j++) sum[j] += *(const vf *)(data + i + j * VL);
        for (int j = 0; j < 8; j++) __asm__ volatile("" : : "m"(sum[j]));
    }
}

/* Keep the compiler from seeing that all sums are the same. */
#define HIDE_EACH(sum) \
    for (int j = 0; j < 12; j++) __asm__ volatile("" : "+x"(sum[j]));

/* `rounds` times 12 independent multiply-adds of vectors of float32. */
EXPORT void limits_fma(long rounds, int threads) {
#pragma omp parallel num_threads(threads)
    {
        vf sum[12] = {{0}}, x = {0}, y = {0};
        HIDE_EACH(sum)
        for (long i = 0; i < rounds; i++) {
            __asm__ volatile("" : "+x"(x), "+x"(y));
#pragma GCC unroll 12
            for (int j = 0; j < 12; j++) sum[j] += x * y;
        }
        for (int j = 0; j < 12; j++) __asm__ volatile("" : : "x"(sum[j]));
    }
}

/* The same with dot products of pairs of bfloat16. Returns 0, or -1 where the machine has none. */
EXPORT int limits_bf16_dot(long rounds, int threads) {
#if defined(__AVX512BF16__)
#pragma omp parallel num_threads(threads)
    {
        __m512 sum[12] = {{0}};
        __m512bh x = {0}, y = {0};
        HIDE_EACH(sum)
        for (long i = 0; i < rounds; i++) {
            __asm__ volatile("" : "+x"(x), "+x"(y));
#pragma GCC unroll 12
            for (int j = 0; j < 12; j++) sum[j] = _mm512_dpbf16_ps(sum[j], x, y);
        }
        for (int j = 0; j < 12; j++) __asm__ volatile("" : : "x"(sum[j]));
    }
    return 0;
#else
    (void)rounds, (void)threads;
    return -1;
#endif
}

EXPORT int limits_vector_length(void) { return VL; }
