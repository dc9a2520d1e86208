#include "native/workers.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>
#include <climits>

namespace trimtab {
namespace {

// How long a worker looks out before it sleeps. For the next step: longer than a caller takes from one to the next (sampling,
// text), since waking up costs a tenth of a millisecond, and short enough that an idle program costs nothing. Inside a step:
// shorter, so that on a machine with more threads than processors the one that is waited for gets to run.
constexpr auto between_steps = std::chrono::milliseconds(2);
constexpr auto inside_step = std::chrono::microseconds(100);

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Returns when `word` is no longer `seen`.
void await(const std::atomic<uint32_t>& word, uint32_t seen, std::atomic<uint32_t>& sleepers,
           std::chrono::microseconds patience) {
    const auto until = std::chrono::steady_clock::now() + patience;
    do {
        for (int i = 0; i < 64; ++i) {
            if (word.load(std::memory_order_acquire) != seen) return;
            pause();
        }
    } while (std::chrono::steady_clock::now() < until);
    sleepers.fetch_add(1, std::memory_order_seq_cst);
    while (word.load(std::memory_order_seq_cst) == seen)
        syscall(SYS_futex, reinterpret_cast<const uint32_t*>(&word), FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
    sleepers.fetch_sub(1, std::memory_order_relaxed);
}

// Changes `word`, and calls the system only if somebody sleeps on it.
void advance(std::atomic<uint32_t>& word, const std::atomic<uint32_t>& sleepers) {
    word.fetch_add(1, std::memory_order_seq_cst);
    if (sleepers.load(std::memory_order_seq_cst) > 0)
        syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

}  // namespace

Workers::Workers(int count) : count_(count) {
    for (int id = 1; id < count; ++id) threads_.emplace_back([this, id] { serve(id); });
}

Workers::~Workers() {
    stop_ = true;
    advance(start_, sleepers_);
    for (auto& thread : threads_) thread.join();
}

void Workers::serve(int id) {
    uint32_t seen = 0;
    for (;;) {
        await(start_, seen, sleepers_, between_steps);
        ++seen;
        if (stop_) return;
        Worker worker{id, count_, this};
        work_(context_, worker);
        barrier();
    }
}

void Workers::run(Work work, void* context) {
    Worker worker{0, count_, this};
    if (count_ == 1) return work(context, worker);
    work_ = work, context_ = context;
    advance(start_, sleepers_);
    work(context, worker);
    barrier();
}

void Workers::barrier() {
    const uint32_t phase = phase_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == static_cast<uint32_t>(count_)) {
        arrived_.store(0, std::memory_order_relaxed);
        advance(phase_, sleepers_);
        return;
    }
    await(phase_, phase, sleepers_, inside_step);
}

void Worker::wait() {
    if (count > 1) team->barrier();
}

}  // namespace trimtab
