// A small thread pool: run work(worker) for worker = 0..threads-1 and wait.
//
// Why not OpenMP: the wheels of torch bring their own, renamed libgomp. A second copy would keep a second set of
// spinning threads beside torch's on the same cores. Workers here sleep on a condition variable between calls.
#pragma once
#include <cstdint>

namespace trimtab {

using Work = void (*)(void* context, int worker, int workers);

// Runs on the calling thread and `workers - 1` pooled ones. One caller at a time; others wait their turn.
void run_parallel(int workers, Work work, void* context);

// f(begin, end) over [0, total) in contiguous pieces whose borders are multiples of `grain`. The pieces depend only
// on (total, grain, workers), so a sum over them has one order for a fixed number of threads.
template <class F>
void parallel_ranges(int64_t total, int64_t grain, int workers, F&& f) {
    if (total <= 0) return;
    const int64_t grains = (total + grain - 1) / grain;
    if (workers > grains) workers = static_cast<int>(grains);
    if (workers <= 1) return f(int64_t{0}, total);
    struct Context {
        F& f;
        int64_t total, grain, grains;
    } context{f, total, grain, grains};
    run_parallel(
        workers,
        [](void* pointer, int worker, int count) {
            auto& c = *static_cast<Context*>(pointer);
            const int64_t begin = c.grains * worker / count * c.grain, end = c.grains * (worker + 1) / count * c.grain;
            c.f(begin, end < c.total ? end : c.total);
        },
        &context);
}

}  // namespace trimtab
