#include "workers.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>

namespace trimtab {

#ifdef TRIMTAB_PREEMPTED
void preempted();  // the tests': a thread loses the processor where that could matter
#else
inline void preempted() {}
#endif

namespace {

// How long a worker looks out for the others inside a call before it sleeps: short, so that on a machine with more threads
// than processors the one that is waited for gets to run.
constexpr Workers::Patience inside_call{100};

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Returns when `word` is no longer `seen`.
void await(const std::atomic<uint32_t>& word, uint32_t seen, std::atomic<uint32_t>& sleepers, Workers::Patience patience) {
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

// Sets `word`, and calls the system only if somebody sleeps on it.
void advance(std::atomic<uint32_t>& word, uint32_t value, const std::atomic<uint32_t>& sleepers) {
    word.store(value, std::memory_order_seq_cst);
    if (sleepers.load(std::memory_order_seq_cst) > 0)
        syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

}  // namespace

Workers& Workers::of_process() {
    // Never destroyed: its threads may outlive static destructors.
    static std::mutex guard;
    static Workers* team = nullptr;
    static pid_t owner = 0;
    std::lock_guard<std::mutex> lock(guard);
    if (team == nullptr || owner != getpid()) team = new Workers, owner = getpid();
    return *team;
}

Workers::~Workers() {
    stop_ = true;
    advance(start_, start_.load() + (1u << 8), asleep_outside_);
    for (auto& thread : threads_) thread.join();
}

void Workers::serve(int id, uint32_t seen) {
    for (;;) {
        await(start_, seen, asleep_outside_, Patience(patience_us_.load(std::memory_order_relaxed)));
        seen = start_.load(std::memory_order_acquire);
        if (stop_) return;
        const int count = static_cast<int>(seen & 0xff);
        if (id >= count) continue;
        Worker worker{id, count, this};
        work_(context_, worker);
        worker.wait();
    }
}

void Workers::run(int count, Work work, void* context, Patience patience) {
    Worker worker{0, count, this};
    if (count <= 1) return work(context, worker);
    std::lock_guard<std::mutex> lock(turn_);
    const uint32_t before = start_.load(std::memory_order_relaxed);
    while (static_cast<int>(threads_.size()) < count - 1) {
        const int id = static_cast<int>(threads_.size()) + 1;
        threads_.emplace_back([this, id, before] { serve(id, before); });
    }
    work_ = work, context_ = context;
    patience_us_.store(patience.count(), std::memory_order_relaxed);
    advance(start_, ((before >> 8) + 1) << 8 | static_cast<uint32_t>(count), asleep_outside_);
    work(context, worker);
    worker.wait();
}

// `count` is that of the worker's own call: one that is late here must not compare with the next call's.
void Workers::barrier(int count) {
    const uint32_t phase = phase_.load(std::memory_order_acquire);
    const uint32_t place = arrived_.fetch_add(1, std::memory_order_acq_rel) + 1;
    preempted();
    if (place == static_cast<uint32_t>(count)) {
        arrived_.store(0, std::memory_order_relaxed);
        advance(phase_, phase + 1, asleep_inside_);
        return;
    }
    await(phase_, phase, asleep_inside_, inside_call);
}

void Worker::wait() {
    if (count > 1) team->barrier(count);
}

}  // namespace trimtab
