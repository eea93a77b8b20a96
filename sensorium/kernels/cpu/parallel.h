/* Sharing work among the threads of the OpenMP pool, which is torch's own.
 *
 * With one thread nothing of OpenMP is entered: a region costs more than a small kernel's work.
 */
#ifndef SENSORIUM_PARALLEL_H
#define SENSORIUM_PARALLEL_H

#include <omp.h>

#include "simd.h"

/* A thread's place in the team. */
typedef struct {
    long index, count;
} member;

/* `context` is the same for all members. */
typedef void work_function(const void *context, member me);

static void run_parallel(int threads, work_function *work, const void *context) {
    if (threads <= 1) {
        work(context, (member){0, 1});
        return;
    }
#pragma omp parallel num_threads(threads)
    work(context, (member){omp_get_thread_num(), omp_get_num_threads()});
}

/* Wait until every member has come here. */
INLINE void wait_for_all(member me) {
    if (me.count > 1) {
#pragma omp barrier
    }
}

/* A member's even share of `n` items begins at `share_begin(n, me)` and ends before `share_end(n, me)`. */
INLINE long share_begin(long n, member me) { return n * me.index / me.count; }

INLINE long share_end(long n, member me) { return n * (me.index + 1) / me.count; }

/* The next `amount` items of a common list, for whoever comes first. */
INLINE long take(long *next, long amount) { return __atomic_fetch_add(next, amount, __ATOMIC_RELAXED); }

/* How many threads `items` that can't be divided, of so much work together, are worth; `unit` of work pays for waking
 * another thread. */
INLINE int threads_worth(long items, long work, long unit, int threads) {
    return (int)MIN(MIN(threads, items), 1 + work / unit);
}

#endif
