/* What this machine can do at best: bytes read per second, and multiply-adds per second in each arithmetic that the
 * kernels use. Each function runs its loop on `threads` threads and returns the seconds that it took. */
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

typedef float vf __attribute__((vector_size(VL * 4), may_alias));

/* Read `count` floats once. */
__attribute__((visibility("default"))) double limits_read(const float *data, long count, int threads) {
    double begin = omp_get_wtime();
#pragma omp parallel num_threads(threads)
    {
        long share = count / threads / (8 * VL) * (8 * VL), first = share * omp_get_thread_num();
        vf sum[8] = {{0}};
        for (long i = first; i < first + share; i += 8 * VL)
            for (int j = 0; j < 8; j++) sum[j] += *(const vf *)(data + i + j * VL);
        for (int j = 0; j < 8; j++) __asm__ volatile("" : : "m"(sum[j]));
    }
    return omp_get_wtime() - begin;
}

/* `rounds` times 12 independent multiply-adds of vectors of float32. */
__attribute__((visibility("default"))) double limits_fma(long rounds, int threads) {
    double begin = omp_get_wtime();
#pragma omp parallel num_threads(threads)
    {
        vf sum[12] = {{0}}, x = {0}, y = {0};
        for (long i = 0; i < rounds; i++) {
            __asm__ volatile("" : "+x"(x), "+x"(y));
#pragma GCC unroll 12
            for (int j = 0; j < 12; j++) sum[j] += x * y;
        }
        for (int j = 0; j < 12; j++) __asm__ volatile("" : : "x"(sum[j]));
    }
    return omp_get_wtime() - begin;
}

/* The same with dot products of pairs of bfloat16; -1 where the machine has none. */
__attribute__((visibility("default"))) double limits_bf16_dot(long rounds, int threads) {
#if defined(__AVX512BF16__)
    double begin = omp_get_wtime();
#pragma omp parallel num_threads(threads)
    {
        __m512 sum[12] = {{0}};
        __m512bh x = {0}, y = {0};
        for (long i = 0; i < rounds; i++) {
            __asm__ volatile("" : "+x"(x), "+x"(y));
#pragma GCC unroll 12
            for (int j = 0; j < 12; j++) sum[j] = _mm512_dpbf16_ps(sum[j], x, y);
        }
        for (int j = 0; j < 12; j++) __asm__ volatile("" : : "x"(sum[j]));
    }
    return omp_get_wtime() - begin;
#else
    (void)rounds, (void)threads;
    return -1;
#endif
}

__attribute__((visibility("default"))) int limits_vector_length(void) { return VL; }
