/* The threads behind pool.h. */
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <time.h>

#define MAX_WORKERS 255
#define CLOSED (1L << 30)
/* How long a worker spins for the next job before it sleeps: longer than the gaps within a step. */
#define SPIN_NS 100000

static struct {
    pthread_mutex_t caller;      /* held while a job runs */
    int workers;                 /* that have been started */
    pthread_mutex_t sleep_lock;
    pthread_cond_t wake;
    atomic_int sleepers;
    /* Written at different moments by different threads, so each on a cache line of its own. */
    _Alignas(64) atomic_uint job_number; /* changes with each job */
    _Alignas(64) atomic_long inside;     /* workers at the job, plus CLOSED while none may join */
    _Alignas(64) atomic_long next_task;
    /* The job. */
    _Alignas(64) task_function *function;
    const void *context;
    long tasks, amount;
    int threads;
} pool = {
    .caller = PTHREAD_MUTEX_INITIALIZER,
    .sleep_lock = PTHREAD_MUTEX_INITIALIZER,
    .wake = PTHREAD_COND_INITIALIZER,
    .inside = CLOSED,
};

static void relax(void) {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t now_ns(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

/* ---- workers ------------------------------------------------------------------------------------------------ */

static void do_tasks(long thread) {
    for (long first; (first = atomic_fetch_add(&pool.next_task, pool.amount)) < pool.tasks;)
        pool.function(pool.context, first, MIN(first + pool.amount, pool.tasks), thread);
}

/* Wait for a job with another number than `last`, and return the number. */
static unsigned await_job(unsigned last) {
    unsigned number;
    for (const int64_t deadline = now_ns() + SPIN_NS; now_ns() < deadline;)
        for (int i = 0; i < 64; i++) {
            if ((number = atomic_load(&pool.job_number)) != last) return number;
            relax();
        }
    pthread_mutex_lock(&pool.sleep_lock);
    atomic_fetch_add(&pool.sleepers, 1);
    while ((number = atomic_load(&pool.job_number)) == last) pthread_cond_wait(&pool.wake, &pool.sleep_lock);
    atomic_fetch_sub(&pool.sleepers, 1);
    pthread_mutex_unlock(&pool.sleep_lock);
    return number;
}

static void *worker(void *thread) {
    for (unsigned number = atomic_load(&pool.job_number);;) {
        number = await_job(number);
        if (atomic_load(&pool.inside) & CLOSED) continue; /* too late */
        /* From here on the job stays: the caller waits for workers that have joined. It may be a later job than the one
         * waited for, and may have been closed since the last line. */
        const int joined = !(atomic_fetch_add(&pool.inside, 1) & CLOSED);
        if (joined && (intptr_t)thread < pool.threads) do_tasks((intptr_t)thread);
        atomic_fetch_sub(&pool.inside, 1);
    }
    return NULL;
}

/* ---- the caller --------------------------------------------------------------------------------------------- */

/* A forked child doesn't have its parent's threads. */
static void forget_workers(void) {
    pthread_mutex_init(&pool.caller, NULL);
    pthread_mutex_init(&pool.sleep_lock, NULL);
    pthread_cond_init(&pool.wake, NULL);
    pool.workers = 0;
    atomic_store(&pool.sleepers, 0);
    atomic_store(&pool.inside, CLOSED);
}

static void register_fork_handler(void) { pthread_atfork(NULL, NULL, forget_workers); }

/* Start workers until there are `wanted`, as far as the system allows. */
static void start_workers(int wanted) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, register_fork_handler);
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* block signals in workers */
    while (pool.workers < MIN(wanted, MAX_WORKERS)) {
        pthread_t started;
        if (pthread_create(&started, NULL, worker, (void *)(intptr_t)(pool.workers + 1))) break;
        pthread_detach(started);
        pool.workers++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static void open_job(void) {
    atomic_store(&pool.next_task, 0);
    atomic_fetch_and(&pool.inside, ~CLOSED);
    atomic_fetch_add(&pool.job_number, 1);
    if (atomic_load(&pool.sleepers) > 0) {
        pthread_mutex_lock(&pool.sleep_lock);
        pthread_cond_broadcast(&pool.wake);
        pthread_mutex_unlock(&pool.sleep_lock);
    }
}

static void close_job(void) {
    atomic_fetch_or(&pool.inside, CLOSED);
    for (int turns = 0; atomic_load(&pool.inside) != CLOSED; turns++) {
        relax();
        if (turns > 1000) sched_yield(); /* a worker may be waiting for this very core */
    }
}

void sensorium_parallel_for(int threads, long tasks, long amount, task_function *function, const void *context) {
    if (threads <= 1 || tasks <= amount || pthread_mutex_trylock(&pool.caller)) {
        function(context, 0, tasks, 0);
        return;
    }
    if (pool.workers < threads - 1) start_workers(threads - 1);
    pool.function = function;
    pool.context = context;
    pool.tasks = tasks;
    pool.amount = amount;
    pool.threads = threads;
    open_job();
    do_tasks(0);
    close_job();
    pthread_mutex_unlock(&pool.caller);
}
