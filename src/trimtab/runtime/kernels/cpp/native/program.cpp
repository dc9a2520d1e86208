#include "native/program.h"

#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

namespace trimtab {
namespace {

constexpr int64_t huge_page = int64_t{2} << 20;

constexpr int64_t shortest_range = 64, most_ranges = 8;  // keys of a piece of attention of one token, and pieces of a KV head

// How long the other workers look out for the next step: longer than a caller takes from one to the next (sampling, text), since
// waking up costs a tenth of a millisecond, and short enough that an idle program costs nothing.
constexpr Workers::Patience between_steps{2000};

// Names the bytes; Python shows it as a MemoryError.
struct OutOfMemory : std::bad_alloc {
    std::string text;
    explicit OutOfMemory(int64_t bytes) : text("The buffers of a step take " + std::to_string(bytes) + " bytes, and the system refuses them.") {}
    const char* what() const noexcept override { return text.c_str(); }
};

}  // namespace

Program::Arena::~Arena() {
    if (data) munmap(data, static_cast<size_t>(bytes));
}

char* Program::Arena::grow(int64_t wanted) {
    if (wanted <= bytes) return data;
    const int64_t size = (wanted + 4095) / 4096 * 4096;
    void* fresh = mmap(nullptr, static_cast<size_t>(size), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (fresh == MAP_FAILED) throw OutOfMemory(size);
    if (size >= huge_page) madvise(fresh, static_cast<size_t>(size), MADV_HUGEPAGE);
    if (data) munmap(data, static_cast<size_t>(bytes));
    data = static_cast<char*>(fresh), bytes = size;
    return data;
}

int64_t Program::arena_bytes() const {
    return values_arena_.bytes + scratch_arena_.bytes + partial_arena_.bytes + rope_arena_.bytes;
}

int Program::add_values(int64_t width, bool logits) {
    values_.push_back({width, logits, nullptr});
    return static_cast<int>(values_.size()) - 1;
}

int Program::add_rope(Rope rope) {
    ropes_.push_back(std::move(rope));
    return static_cast<int>(ropes_.size()) - 1;
}

// Cuts the attention of a step into pieces: one token over ranges of its keys, or a few tokens over all of theirs. The cuts
// depend on lengths alone, so that results do not depend on the number of workers.
void Program::cut(const Step& step) {
    pieces_.clear(), slots_ = 0;
    const int64_t together = std::clamp<int64_t>(max_queries / std::max<int64_t>(1, per_kv_), 1, 16);
    for (int64_t row = 0; row < step.rows; ++row) {
        const int64_t first = step.starts[row], fresh = step.starts[row + 1] - first, past = step.past[row];
        if (fresh == 1) {
            const int64_t keys = past + 1;
            int64_t range = split_ > 0 ? split_ : shortest_range;
            while (split_ <= 0 && range * most_ranges < keys) range *= 2;  // each of them starts with a wait for memory
            if (keys <= range) {
                pieces_.push_back({row, first, 1, 0, keys, -1});
                continue;
            }
            for (int64_t k = 0; k < keys; k += range) pieces_.push_back({row, first, 1, k, std::min(k + range, keys), slots_++, k + range >= keys});
            continue;
        }
        // Longest first: what is left at the end is short.
        for (int64_t end = fresh; end > 0; end -= together) {
            const int64_t start = std::max<int64_t>(0, end - together);
            pieces_.push_back({row, first + start, end - start, 0, past + end, -1});
        }
    }
}

// Cosines and sines of every new token.
void Program::turn(const Step& step, const int64_t* reach, Worker& worker) {
    for (Rope& rope : ropes_) {
        const int64_t half = rope.half();
        int64_t row = 0;
        for (int64_t t = worker.begin(step.tokens); t < worker.end(step.tokens); ++t) {
            while (t >= step.starts[row + 1]) ++row;
            const bool longer = !rope.inverse_long.empty() && reach[row] > rope.original;
            const std::vector<float>& inverse = longer ? rope.inverse_long : rope.inverse;
            const float position = static_cast<float>(step.past[row] + t - step.starts[row]);
            float* out = rope.table + t * 2 * half;
            for (int64_t i = 0; i < half; ++i) {
                const float angle = position * inverse[static_cast<size_t>(i)];
                out[i] = std::cos(angle) * rope.scale, out[half + i] = std::sin(angle) * rope.scale;
            }
        }
    }
}

void Program::run_on(const Step& step, int source, const float* x, int out, float* y) {
    lay_out(step);
    const Values &from = values(source), &to = values(out);
    std::memcpy(from.data, x, static_cast<size_t>(4 * step.tokens * from.width));
    run(step, step.past, false);
    std::memcpy(y, to.data, static_cast<size_t>(4 * step.tokens * to.width));
}

void Program::lay_out(const Step& step) {
    int64_t bytes = 0;
    for (const Values& v : values_) bytes += aligned(4 * v.width * (v.logits ? step.logits : step.tokens));
    char* at = values_arena_.grow(bytes);
    for (Values& v : values_) {
        v.data = reinterpret_cast<float*>(at);
        at += aligned(4 * v.width * (v.logits ? step.logits : step.tokens));
    }
}

// Lays out everything a step needs, and cuts its attention. What earlier parts of the same step left stays where it is.
Context Program::prepare(const Step& step, bool starts) {
    lay_out(step);
    int64_t bytes = 0;
    for (const Rope& rope : ropes_) bytes += aligned(8 * rope.half() * step.tokens);
    char* at = rope_arena_.grow(bytes);
    for (Rope& rope : ropes_) rope.table = reinterpret_cast<float*>(at), at += aligned(8 * rope.half() * step.tokens);
    cut(step);
    int64_t shared = 0, own = 0;
    for (const auto& kernel : kernels_) {
        // Not the larger of both numbers: tables of a few rows may take more than floats of many.
        shared = std::max({shared, kernel->scratch_bytes(step.tokens), kernel->scratch_bytes(step.logits)});
        own = std::max(own, kernel->own_bytes(step.tokens));
        if (!starts) continue;
        kernel->weight_read = 0, kernel->kv_read = 0, kernel->kv_written = 0, kernel->flops = 0, kernel->seconds = 0;
        kernel->active_rows = -1, kernel->active_pairs = 0;
        kernel->prepare(step, watch_);
    }
    char* scratch = scratch_arena_.grow(shared + own * threads_);
    float* partial = reinterpret_cast<float*>(partial_arena_.grow(4 * slots_ * heads_ * (head_dim_ + 2)));
    return {*this, step, scratch, scratch + shared, own, partial};
}

void Program::run_one(const Step& step, size_t kernel) {
    Context context = prepare(step);
    struct Job {
        Kernel& kernel;
        Context& context;
    } job{*kernels_[kernel], context};
    Workers::of_process().run(
        threads_,
        [](void* pointer, Worker& worker) {
            Job& j = *static_cast<Job*>(pointer);
            j.kernel.run(j.context, worker);
        },
        &job, between_steps);
}

void Program::run(const Step& step, const int64_t* reach, bool timed, int64_t first, int64_t end) {
    const int64_t count = static_cast<int64_t>(kernels_.size());
    if (end < 0) end = count;
    if (first < 0 || first > end || end > count) throw std::out_of_range("The program has no such kernels.");
    Context context = prepare(step, first == 0);
    struct Job {
        Program& program;
        Context& context;
        const int64_t* reach;
        bool timed;
        size_t first, end;
    } job{*this, context, reach, timed, static_cast<size_t>(first), static_cast<size_t>(end)};
    Workers::of_process().run(
        threads_,
        [](void* pointer, Worker& worker) {
            Job& j = *static_cast<Job*>(pointer);
            if (j.first == 0) {
                j.program.turn(j.context.step, j.reach, worker);
                worker.wait();
            }
            using Clock = std::chrono::steady_clock;
            for (size_t i = j.first; i < j.end; ++i) {
                const auto& kernel = j.program.kernels_[i];
                const auto start = j.timed ? Clock::now() : Clock::time_point{};
                kernel->run(j.context, worker);
                if (j.timed && worker.id == 0)
                    kernel->seconds = std::chrono::duration<double>(Clock::now() - start).count();
            }
        },
        &job, between_steps);
    if (context.lost) throw std::invalid_argument("A key or value is not finite, or beyond what an fp16 scale can express. Keep this cache in floats.");
}

}  // namespace trimtab
