// Whole operations over threads: integer matrix-vector products and the row-skipping gated FFN.
#include <atomic>
#include <cmath>
#include <vector>

#include "kernels.h"
#include "workers.h"

namespace trimtab {
namespace {

// Waking a worker costs about as long as reading this many bytes of weights from the cache.
constexpr int64_t bytes_per_worker = 1 << 16;

int useful_workers(int64_t bytes, int threads) {
    const int64_t most = bytes / bytes_per_worker;
    return static_cast<int>(most < 1 ? 1 : most < threads ? most : threads);
}

std::vector<float> sums_of(const Kernels& k, const Matrix& w, const float* x, int64_t tokens) {
    std::vector<float> sums(static_cast<size_t>(tokens * w.groups()));
    if (w.kind == Kind::ints) k.group_sums(x, tokens, w.cols, w.group, sums.data());
    return sums;
}

// y[t, j] = x[t] . W[r(j)] for j < count.
int64_t dot_all(const Kernels& k, const Matrix& w, const float* x, int64_t tokens, const int64_t* index, int64_t count,
                int threads, float* y, int64_t y_stride) {
    const std::vector<float> sums = sums_of(k, w, x, tokens);
    std::atomic<int64_t> bytes{0};
    parallel_ranges(count, 16, useful_workers(count * w.visit_bytes(0, w.cols), threads), [&](int64_t begin, int64_t end) {
        bytes += k.dot_rows(w, x, sums.data(), tokens, index, begin, end, y, y_stride);
    });
    return bytes;
}

// y = h W by columns: each worker owns a range of columns and walks all rows in order, so no sum depends on threads.
int64_t add_all(const Kernels& k, const Matrix& w, const float* h, const uint8_t* flags, int64_t tokens,
                const int64_t* index, int64_t count, int threads, float* y) {
    std::atomic<int64_t> bytes{0};
    parallel_ranges(w.cols, 64, useful_workers(count * w.visit_bytes(0, w.cols), threads), [&](int64_t first, int64_t last) {
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t c = first; c < last; ++c) y[t * w.cols + c] = 0;
        bytes += k.add_rows(w, h, flags, count, tokens, index, count, first, last, y, w.cols);
    });
    return bytes;
}

float activate(Act act, float v) {
    switch (act) {
        case Act::silu: return v / (1.0f + std::exp(-v));
        case Act::gelu_tanh: return 0.5f * v * (1.0f + std::tanh(0.7978845608028654f * (v + 0.044715f * v * v * v)));
        default: return 0.5f * v * (1.0f + std::erf(v * 0.7071067811865476f));
    }
}

}  // namespace

int64_t int_gemv(const Matrix& w, const float* x, int64_t tokens, int threads, float* y) {
    return dot_all(kernels(), w, x, tokens, nullptr, w.rows, threads, y, w.rows);
}

int64_t int_gemv_t(const Matrix& w_t, const float* x, int64_t tokens, int threads, float* y) {
    return add_all(kernels(), w_t, x, nullptr, tokens, nullptr, w_t.rows, threads, y);
}

GateFirst gate_first(const Matrix& gate, const Matrix& up, const Matrix& down_t, const float* x, int64_t tokens,
                     float threshold, Act act, int threads, float* y, int64_t* active) {
    const Kernels& k = kernels();
    const int64_t neurons = gate.rows;
    GateFirst result;

    std::vector<float> g(static_cast<size_t>(tokens * neurons));
    result.gate_bytes = dot_all(k, gate, x, tokens, nullptr, neurons, threads, g.data(), neurons);

    // Rows that at least one token needs. "Not at most the threshold" keeps a NaN visible instead of skipping it.
    std::vector<uint8_t> needed(static_cast<size_t>(neurons), 0);
    for (int64_t t = 0; t < tokens; ++t) {
        active[t] = 0;
        for (int64_t i = 0; i < neurons; ++i) {
            float& value = g[static_cast<size_t>(t * neurons + i)];
            value = activate(act, value);
            const bool keep = !(std::fabs(value) <= threshold);
            active[t] += keep;
            needed[static_cast<size_t>(i)] |= static_cast<uint8_t>(keep);
        }
    }
    std::vector<int64_t> rows;
    for (int64_t i = 0; i < neurons; ++i)
        if (needed[static_cast<size_t>(i)]) rows.push_back(i);
    const int64_t count = result.rows_touched = static_cast<int64_t>(rows.size());

    std::vector<float> h(static_cast<size_t>(tokens * count));
    std::vector<uint8_t> flags(static_cast<size_t>(tokens * count));
    result.up_bytes = dot_all(k, up, x, tokens, rows.data(), count, threads, h.data(), count);
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t j = 0; j < count; ++j) {
            const auto at = static_cast<size_t>(t * count + j);
            const float value = g[static_cast<size_t>(t * neurons + rows[static_cast<size_t>(j)])];
            flags[at] = !(std::fabs(value) <= threshold);
            h[at] *= value;
        }
    result.down_bytes = add_all(k, down_t, h.data(), flags.data(), tokens, rows.data(), count, threads, y);
    return result;
}

}  // namespace trimtab
