// Threads meet at every barrier, whether they spin or sleep.
#include "workers.h"

#include <atomic>
#include <chrono>

#include "check.h"

namespace trimtab {

namespace {
std::atomic<int> preempt_every{0};
std::atomic<int> passed{0};
}  // namespace

// workers.cpp calls it between what a thread does and what it then looks at.
void preempted() {
    const int every = preempt_every;
    if (every && passed.fetch_add(1) % every == 0) std::this_thread::sleep_for(std::chrono::microseconds(200));
}

namespace {

void busy(int64_t microseconds) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(microseconds);
    while (std::chrono::steady_clock::now() < end) {
    }
}

struct Shared {
    std::vector<int64_t> before, after;
    int64_t round = 0;
    int late = -1;  // a worker that comes long after the others have gone to sleep
};

// Each worker writes its own place without a lock and reads those of the others behind the barrier.
void step(void* pointer, Worker& worker) {
    Shared& s = *static_cast<Shared*>(pointer);
    if (s.late == worker.id) busy(300);
    s.before[static_cast<size_t>(worker.id)] = s.round;
    worker.wait();
    int64_t sum = 0;
    for (int64_t v : s.before) sum += v;
    s.after[static_cast<size_t>(worker.id)] = sum;
}

void rounds(int threads, int64_t count, int64_t late_every) {
    Workers workers;
    Shared s;
    s.before.resize(static_cast<size_t>(threads)), s.after.resize(static_cast<size_t>(threads));
    for (s.round = 1; s.round <= count; ++s.round) {
        const bool late = late_every && s.round % late_every == 0;
        s.late = late ? static_cast<int>(s.round / late_every % threads) : -1;
        if (late) busy(300);  // the others sleep at the start
        workers.run(threads, step, &s, Workers::Patience(s.round % 2 ? 0 : 50));
        for (int64_t sum : s.after)
            CHECK(sum == threads * s.round, "round %d of %d threads: %d", static_cast<int>(s.round), threads,
                  static_cast<int>(sum));
    }
}

TEST(ten_thousand_short_runs_of_three_threads) { rounds(3, 10000, 0); }
TEST(workers_that_sleep_are_woken) {
    for (int threads : {1, 2, 3, 4}) rounds(threads, 200, 3);
}
TEST(teams_come_and_go) {
    for (int round = 0; round < 100; ++round) {
        rounds(1 + round % 4, 2, 0);
        Workers unused;
        unused.run(3, [](void*, Worker&) {}, nullptr);
        if (round % 4 == 0) busy(200);  // ended while asleep
    }
}

// Calls of one team by different numbers of workers: a thread that sits one out must not take part in it later.
TEST(calls_of_one_team_differ_in_size) {
    Workers workers;
    preempt_every = 7;
    for (int round = 0; round < 3000; ++round) {
        std::atomic<int> ran{0};
        const int count = 1 + (round * 7) % 5;
        workers.run(
            count,
            [](void* pointer, Worker& worker) {
                worker.wait();
                static_cast<std::atomic<int>*>(pointer)->fetch_add(1 << (6 * worker.id));
            },
            &ran, Workers::Patience(round % 3 * 20));
        CHECK(ran.load() == (((1 << (6 * count)) - 1) / 63), "%d workers: %x", count, static_cast<unsigned>(ran.load()));
    }
    preempt_every = 0;
}

TEST(parts_cover_all_work) {
    for (int count = 1; count <= 5; ++count)
        for (int64_t total : {0, 1, 2, 7, 100}) {
            int64_t next = 0;
            for (int id = 0; id < count; ++id) {
                const Worker worker{id, count, nullptr};
                CHECK(worker.begin(total) == next && worker.end(total) >= next, "%d of %d", id, count);
                next = worker.end(total);
            }
            CHECK(next == total, "%d workers", count);
        }
}

}  // namespace
}  // namespace trimtab
