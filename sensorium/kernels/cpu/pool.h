/* Sharing tasks among threads, some of which may be late.
 *
 * A thread that another process has pushed off its core must not hold up the step. So nobody waits for a thread to
 * arrive, as a barrier does: the caller works through the tasks itself, whoever is there helps, and at the end it
 * waits only for tasks that a helper has begun.
 */
#ifndef SENSORIUM_POOL_H
#define SENSORIUM_POOL_H

#include "simd.h"

/* Do tasks [first, last). `thread` is below the number of threads asked for, and differs among those at work. */
typedef void task_function(const void *context, long first, long last, long thread);

/* Do tasks [0, tasks) on up to `threads` threads, which take `amount` of them at a time; returns when all are done. If
 * another caller has the threads, the calling thread does everything. */
void sensorium_parallel_for(int threads, long tasks, long amount, task_function *function, const void *context);

/* Tasks to take at a time, so that each of the threads comes several times and no one is left waiting for long. */
INLINE long fair_amount(long tasks, int threads) { return MAX(1, tasks / (16L * threads)); }

/* How many threads so much work is worth; `unit` of work pays for waking another one. */
INLINE int threads_worth(long work, long unit, int threads) { return (int)MIN(threads, 1 + work / unit); }

#endif
