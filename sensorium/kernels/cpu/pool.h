/* Runs tasks on threads, without waiting for threads that are late.
 *
 * A thread that another process has preempted must not delay the step. So nothing waits for a thread to start, as a
 * barrier would: the caller runs tasks itself, workers that are awake help, and at the end it waits only for tasks that
 * a worker has begun.
 */
#ifndef SENSORIUM_POOL_H
#define SENSORIUM_POOL_H

#include "simd.h"

/* Run tasks [first, last). `thread` is a number below the requested number of threads, unique among those at work. */
typedef void task_function(const void *context, long first, long last, long thread);

/* Run tasks [0, tasks) on up to `threads` threads, which take `amount` of them at a time; returns when all are done. If
 * another caller uses the workers, the calling thread runs everything. */
void sensorium_parallel_for(int threads, long tasks, long amount, task_function *function, const void *context);

/* Tasks to take at a time, so that each thread takes some several times, and none runs much longer than the others. */
INLINE long fair_amount(long tasks, int threads) { return MAX(1, tasks / (16L * threads)); }

/* The number of threads for an amount of work; each further `unit` is worth waking another one. */
INLINE int threads_worth(long work, long unit, int threads) { return (int)MIN(threads, 1 + work / unit); }

#endif
