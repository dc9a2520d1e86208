#include "pool.h"

#include <unistd.h>

#include <condition_variable>
#include <mutex>
#include <thread>

namespace trimtab {
namespace {

class Pool {
  public:
    void run(int workers, Work work, void* context) {
        std::lock_guard<std::mutex> turn(turn_);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            while (started_ < workers - 1) {
                const int worker = ++started_;
                std::thread([this, worker, seen = round_] { serve(worker, seen); }).detach();
            }
            work_ = work, context_ = context, workers_ = workers, pending_ = started_, ++round_;
        }
        wake_.notify_all();
        work(context, 0, workers);
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return pending_ == 0; });
    }

  private:
    void serve(int worker, uint64_t seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [&] { return round_ != seen; });
            seen = round_;
            if (worker < workers_) {
                lock.unlock();
                work_(context_, worker, workers_);
                lock.lock();
            }
            if (--pending_ == 0) done_.notify_one();
        }
    }

    std::mutex turn_, mutex_;
    std::condition_variable wake_, done_;
    Work work_ = nullptr;
    void* context_ = nullptr;
    int workers_ = 0, started_ = 0, pending_ = 0;
    uint64_t round_ = 0;
};

}  // namespace

void run_parallel(int workers, Work work, void* context) {
    // Never destroyed: its threads may outlive static destructors. Threads do not survive fork(): a child gets its own.
    static std::mutex guard;
    static Pool* pool = nullptr;
    static pid_t owner = 0;
    Pool* current;
    {
        std::lock_guard<std::mutex> lock(guard);
        if (pool == nullptr || owner != getpid()) pool = new Pool, owner = getpid();
        current = pool;
    }
    current->run(workers, work, context);
}

}  // namespace trimtab
