// The threads of one program: they stay alive between steps, spin for a while at every barrier and sleep when nothing comes.
#pragma once
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace trimtab {

class Workers;

// One thread's place in a step.
struct Worker {
    int id = 0, count = 1;
    Workers* team = nullptr;
    void wait();  // until every worker of the team is here
    // The part of [0, total) that is this worker's: contiguous, alike in size.
    int64_t begin(int64_t total) const { return total * id / count; }
    int64_t end(int64_t total) const { return total * (id + 1) / count; }
};

class Workers {
  public:
    using Work = void (*)(void* context, Worker& worker);

    explicit Workers(int count);
    ~Workers();
    Workers(const Workers&) = delete;
    Workers& operator=(const Workers&) = delete;

    int count() const { return count_; }
    // Runs work on the calling thread and on count - 1 others; returns when all are done.
    void run(Work work, void* context);

  private:
    friend struct Worker;
    void serve(int id);
    void barrier();

    int count_;
    std::vector<std::thread> threads_;
    Work work_ = nullptr;
    void* context_ = nullptr;
    bool stop_ = false;
    alignas(64) std::atomic<uint32_t> start_{0};
    alignas(64) std::atomic<uint32_t> arrived_{0};
    alignas(64) std::atomic<uint32_t> phase_{0};
    alignas(64) std::atomic<uint32_t> sleepers_{0};
};

}  // namespace trimtab
