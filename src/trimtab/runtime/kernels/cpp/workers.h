// The threads of the process: they stay alive between calls, spin for a while at every barrier and sleep when nothing comes.
//
// There is one team however many programs there are: two of them would take the processors from each other by spinning. Not
// OpenMP: the wheels of torch bring their own, renamed libgomp, and a second copy would keep a second set of threads.
#pragma once
#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace trimtab {

class Workers;

// One thread's place in a call.
struct Worker {
    int id = 0, count = 1;
    Workers* team = nullptr;
    void wait();  // until every worker of this call is here
    // The part of [0, total) that is this worker's: contiguous, alike in size.
    int64_t begin(int64_t total) const { return total * id / count; }
    int64_t end(int64_t total) const { return total * (id + 1) / count; }
};

class Workers {
  public:
    using Work = void (*)(void* context, Worker& worker);
    using Patience = std::chrono::microseconds;

    static constexpr int most = 255;  // workers of one call

    Workers() = default;
    ~Workers();
    Workers(const Workers&) = delete;
    Workers& operator=(const Workers&) = delete;

    // The team of this process. Threads do not survive fork(): a child gets its own.
    static Workers& of_process();

    // Runs work on the calling thread and on count - 1 others; returns when all are done. One call at a time; others wait
    // their turn. The others then look out for the next call for `patience` before they sleep.
    void run(int count, Work work, void* context, Patience patience = Patience(0));

  private:
    friend struct Worker;
    void serve(int id, uint32_t seen);
    void barrier(int count);

    std::mutex turn_;
    std::vector<std::thread> threads_;
    Work work_ = nullptr;
    void* context_ = nullptr;
    bool stop_ = false;
    std::atomic<int64_t> patience_us_{0};
    // Number of the call in the upper bits, its workers in the lowest byte: read together, so that a thread which is not part
    // of one call cannot take the next one for it.
    alignas(64) std::atomic<uint32_t> start_{0};
    alignas(64) std::atomic<uint32_t> arrived_{0};
    alignas(64) std::atomic<uint32_t> phase_{0};
    alignas(64) std::atomic<uint32_t> asleep_outside_{0}, asleep_inside_{0};  // threads that wait for start_, for phase_
};

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
    Workers::of_process().run(
        workers < Workers::most ? workers : Workers::most,
        [](void* pointer, Worker& worker) {
            auto& c = *static_cast<Context*>(pointer);
            const int64_t begin = worker.begin(c.grains) * c.grain, end = worker.end(c.grains) * c.grain;
            c.f(begin, end < c.total ? end : c.total);
        },
        &context);
}

}  // namespace trimtab
