// Scales of binary-coded groups of weights: signs of the nearest levels and least squares for the scales, in turns.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "binary_fit.h"
#include "workers.h"

namespace trimtab {
namespace {

constexpr int most_bits = 4, most_levels = 1 << most_bits;
constexpr int least_exponent = -63, most_exponent = 63;

// The nearest sum of `terms` signed powers of two, largest first; 0 terms: the number itself.
float in_powers(float scale, int terms) {
    if (terms == 0) return scale;
    double left = scale, total = 0;
    for (int t = 0; t < terms && left != 0; ++t) {
        int exponent;
        const double part = std::frexp(std::fabs(left), &exponent);  // in [0.5, 1); nearest by logarithms
        if (part < 0.70710678118654752) exponent -= 1;
        if (exponent < least_exponent) break;
        const double term = std::copysign(std::ldexp(1.0, std::min(exponent, most_exponent)), left);
        left -= term, total += term;
    }
    return static_cast<float>(total);
}

// What least squares needs to know: B^T C B and B^T C w, with signs B and costs C.
struct Moments {
    double gram[most_bits][most_bits], cross[most_bits];

    void clear() {
        for (auto& row : gram) std::fill(row, row + most_bits, 0.0);
        std::fill(cross, cross + most_bits, 0.0);
    }
    // The error of these scales, less the sum of squares of the weights, which is the same for all.
    double error(const float* scales, int bits) const {
        double sum = 0;
        for (int i = 0; i < bits; ++i) {
            for (int j = 0; j < bits; ++j) sum += gram[i][j] * scales[i] * scales[j];
            sum -= 2 * cross[i] * scales[i];
        }
        return sum;
    }
    // Scales that fit the signs best, positive and descending.
    void solve(float* scales, int bits) const {
        double a[most_bits][most_bits], x[most_bits], trace = 0;
        for (int i = 0; i < bits; ++i) trace += gram[i][i];
        // Two planes alike would leave it singular; a little of its trace decides for sharing their scale.
        for (int i = 0; i < bits; ++i) {
            for (int j = 0; j < bits; ++j) a[i][j] = gram[i][j] + (i == j ? 1e-6 * trace / bits + 1e-30 : 0);
            x[i] = cross[i];
        }
        for (int i = 0; i < bits; ++i)  // positive definite: no pivots are needed
            for (int r = i + 1; r < bits; ++r) {
                const double by = a[r][i] / a[i][i];
                for (int j = i; j < bits; ++j) a[r][j] -= by * a[i][j];
                x[r] -= by * x[i];
            }
        for (int i = bits - 1; i >= 0; --i) {
            for (int j = i + 1; j < bits; ++j) x[i] -= a[i][j] * x[j];
            x[i] /= a[i][i];
        }
        for (int i = 0; i < bits; ++i) {
            const float scale = static_cast<float>(std::fabs(x[i]));
            int at = i;
            for (; at > 0 && scales[at - 1] < scale; --at) scales[at] = scales[at - 1];
            scales[at] = scale;
        }
    }
};

// A group of weights, sorted, with running sums: what every level stands for follows from where its interval ends, so that a round costs
// as much as there are levels, not weights.
class Group {
  public:
    Group(int64_t size, const BinaryFit& how) : how_(how), size_(size), order_(size), sorted_(size), count_(size + 1), total_(size + 1) {}

    void fit(const float* w, const float* cost, float* scales) {
        w_ = w, cost_ = cost;
        if (how_.nearest) sort();
        least_ = std::numeric_limits<double>::infinity();
        float start[most_bits];
        greedy_start(start);
        descend(start, scales);
        if (how_.bits < 3) return;  // from there on even levels are often the better start
        float largest = 0;
        for (int64_t k = 0; k < size_; ++k) largest = std::max(largest, std::fabs(w[k]));
        for (const double share : how_.even) {
            for (int i = 0; i < how_.bits; ++i)
                start[i] = static_cast<float>(largest * share * (1 << (how_.bits - 1 - i)) / ((1 << how_.bits) - 1));
            descend(start, scales);
        }
    }

  private:
    double cost(int64_t k) const { return cost_ ? cost_[k] : 1.0; }

    void sort() {
        std::iota(order_.begin(), order_.end(), 0);
        std::sort(order_.begin(), order_.end(), [&](int64_t a, int64_t b) { return w_[a] < w_[b] || (w_[a] == w_[b] && a < b); });
        for (int64_t k = 0; k < size_; ++k) {
            const int64_t from = order_[static_cast<size_t>(k)];
            const size_t at = static_cast<size_t>(k);
            sorted_[at] = w_[from];
            count_[at + 1] = count_[at] + cost(from), total_[at + 1] = total_[at] + cost(from) * w_[from];
        }
    }

    // One plane after the other, each with the mean of what is left.
    void greedy_start(float* scales) {
        std::vector<float> rest(w_, w_ + size_);
        for (int i = 0; i < how_.bits; ++i) {
            double sum = 0, weight = 0;
            for (int64_t k = 0; k < size_; ++k) sum += cost(k) * std::fabs(rest[static_cast<size_t>(k)]), weight += cost(k);
            scales[i] = static_cast<float>(sum / std::max(weight, 1e-30));
            for (float& r : rest) r -= r >= 0 ? scales[i] : -scales[i];
        }
    }

    void descend(const float* start, float* best) {
        float scales[most_bits], next[most_bits];
        for (int i = 0; i < how_.bits; ++i) scales[i] = in_powers(start[i], how_.apot);
        Moments m;
        for (int turn = 0; turn <= how_.rounds; ++turn) {
            if (how_.nearest) nearest(scales, m);
            else greedy(scales, m);
            const double error = m.error(scales, how_.bits);
            if (error < least_ - 1e-12 * std::fabs(least_) || !std::isfinite(least_)) least_ = error, std::copy_n(scales, how_.bits, best);
            m.solve(next, how_.bits);
            for (int i = 0; i < how_.bits; ++i) next[i] = in_powers(next[i], how_.apot);
            if (std::equal(next, next + how_.bits, scales)) return;  // every turn to come would be this one again
            std::copy_n(next, how_.bits, scales);
        }
    }

    // Moments of the signs of the nearest levels.
    void nearest(const float* scales, Moments& m) const {
        const int bits = how_.bits, levels = 1 << bits;
        float value[most_levels];
        int pattern[most_levels];
        for (int p = 0; p < levels; ++p) {
            float sum = 0;
            for (int i = 0; i < bits; ++i) sum += plus(p, i) ? scales[i] : -scales[i];
            int at = p;
            for (; at > 0 && value[at - 1] > sum; --at) value[at] = value[at - 1], pattern[at] = pattern[at - 1];
            value[at] = sum, pattern[at] = p;
        }
        m.clear();
        int64_t first = 0;
        for (int l = 0; l < levels; ++l) {
            int64_t end = size_;
            if (l + 1 < levels) {
                const float middle = (value[l + 1] + value[l]) / 2;
                end = std::upper_bound(sorted_.begin() + first, sorted_.end(), middle) - sorted_.begin();
            }
            if (end == first) continue;
            const double count = count_[static_cast<size_t>(end)] - count_[static_cast<size_t>(first)];
            const double total = total_[static_cast<size_t>(end)] - total_[static_cast<size_t>(first)];
            for (int i = 0; i < bits; ++i) {
                const bool positive = plus(pattern[l], i);
                m.cross[i] += positive ? total : -total;
                for (int j = 0; j < bits; ++j) m.gram[i][j] += positive == plus(pattern[l], j) ? count : -count;
            }
            first = end;
        }
    }

    // Moments of signs that are chosen one plane after the other.
    void greedy(const float* scales, Moments& m) const {
        m.clear();
        for (int64_t k = 0; k < size_; ++k) {
            bool positive[most_bits];
            float rest = w_[k];
            for (int i = 0; i < how_.bits; ++i) positive[i] = rest >= 0, rest -= positive[i] ? scales[i] : -scales[i];
            const double c = cost(k);
            for (int i = 0; i < how_.bits; ++i) {
                m.cross[i] += (positive[i] ? c : -c) * w_[k];
                for (int j = 0; j < how_.bits; ++j) m.gram[i][j] += positive[i] == positive[j] ? c : -c;
            }
        }
    }

    // Patterns count upwards with plane 0 as their highest bit.
    bool plus(int pattern, int plane) const { return pattern >> (how_.bits - 1 - plane) & 1; }

    const BinaryFit& how_;
    int64_t size_;
    const float *w_ = nullptr, *cost_ = nullptr;
    std::vector<int64_t> order_;
    std::vector<float> sorted_;
    std::vector<double> count_, total_;
    double least_ = 0;
};

}  // namespace

void binary_fit(const float* w, const float* cost, int64_t groups, int64_t size, const BinaryFit& how, int threads, float* scales) {
    constexpr int64_t grain = 16;
    parallel_ranges(groups, grain, threads, [&](int64_t begin, int64_t end) {
        Group group(size, how);
        for (int64_t r = begin; r < end; ++r) group.fit(w + r * size, cost ? cost + r * size : nullptr, scales + r * how.bits);
    });
}

}  // namespace trimtab
