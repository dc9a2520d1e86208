// Products of int8 rows of every instruction set against sums in int64, and whole kernels against the method in doubles.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "check.h"
#include "isas.h"
#include "matrices.h"
#include "native/program.h"

namespace trimtab {
namespace {

std::vector<int8_t> random_codes(Random& random, int64_t count) {
    std::vector<int8_t> made(static_cast<size_t>(count));
    for (int8_t& code : made) code = static_cast<int8_t>(random.between(-127, 127));
    return made;
}

TEST(int8_products_are_exact) {
    Random random(1);
    for (const Isa& isa : isas()) {
        use(isa);
        for (int i = 0; i < 60; ++i) {
            const bool largest = i == 0;
            const int64_t n = largest ? 2 : random.between(1, 40), k = largest ? 133000 : random.between(1, 300);
            const int64_t tokens = largest ? 3 : random.of<int64_t>({1, 2, 3, 4, 7, 65});
            std::vector<int8_t> w = random_codes(random, n * k), x = random_codes(random, tokens * k);
            if (largest) std::fill(w.begin(), w.end(), int8_t{127}), std::fill(x.begin(), x.begin() + k, int8_t{127});
            std::vector<int32_t> y(static_cast<size_t>(tokens * n));
            int8_product(w.data(), n, k, x.data(), tokens, i % 3 + 1, y.data());
            for (int64_t t = 0; t < tokens; ++t)
                for (int64_t r = 0; r < n; ++r) {
                    int64_t sum = 0;
                    for (int64_t j = 0; j < k; ++j) sum += int64_t{x[static_cast<size_t>(t * k + j)]} * w[static_cast<size_t>(r * k + j)];
                    CHECK(y[static_cast<size_t>(t * n + r)] == sum, "%s n=%lld k=%lld t=%lld: %d", isa.name, static_cast<long long>(n),
                          static_cast<long long>(k), static_cast<long long>(t), y[static_cast<size_t>(t * n + r)]);
                }
        }
    }
}

TEST(int8_codes_leave_out_what_is_marked) {
    Random random(2);
    for (const Isa& isa : isas())
        for (int i = 0; i < 60; ++i) {
            const int64_t cols = random.between(1, 150), padded = padded_codes(cols);
            std::vector<float> x = random.floats(cols, -7, 7);
            std::vector<uint8_t> mask(static_cast<size_t>(cols));
            isa.int8->find(x.data(), cols, 6.0f, mask.data());
            float peak = 0;
            for (size_t j = 0; j < x.size(); ++j) {
                CHECK(mask[j] == (std::fabs(x[j]) >= 6.0f), "%s column %zu of %g", isa.name, j, static_cast<double>(x[j]));
                if (!mask[j]) peak = std::max(peak, std::fabs(x[j]));
            }
            std::vector<int8_t> codes(static_cast<size_t>(padded), int8_t{9});
            int32_t sum = 0, expected = 0;
            const float unit = isa.int8->code(x.data(), cols, mask.data(), codes.data(), &sum);
            CHECK(unit == peak / 127.0f, "%s %g", isa.name, static_cast<double>(unit));
            for (size_t j = 0; j < codes.size(); ++j) {
                expected += codes[j];
                if (j >= x.size() || mask[j])
                    CHECK(codes[j] == 0, "%s column %zu", isa.name, j);
                else
                    CHECK(std::fabs(codes[j] * unit - x[j]) <= 0.501f * unit, "%s column %zu", isa.name, j);
            }
            CHECK(sum == expected, "%s: %d, not %d", isa.name, sum, expected);
            x[static_cast<size_t>(random.below(cols))] = random.coin() ? std::numeric_limits<float>::infinity() : NAN;
            std::fill(mask.begin(), mask.end(), uint8_t{0});
            CHECK(std::isnan(isa.int8->code(x.data(), cols, mask.data(), codes.data(), &sum)) && sum == 0, "%s", isa.name);
        }
}

struct PlainRows {
    int64_t n, k;
    std::vector<int8_t> data;
    std::vector<float> scale, bias;
    std::vector<uint16_t> columns;

    PlainRows(Random& random, int64_t rows, int64_t cols, const Outliers& how, bool halves)
        : n(rows), k(cols), data(random_codes(random, rows * cols)), scale(random.floats(rows, 0.001f, 0.01f)), bias(random.floats(rows)) {
        const int64_t kept = how.listed ? static_cast<int64_t>(how.columns.size()) : cols;
        for (int64_t i = 0; halves && i < kept * rows; ++i) columns.push_back(nearest_half(random.uniform(-1, 1)));
    }
    Int8Product product(int values) const {
        Int8Product made;
        made.w = {data.data(), scale.data(), n, k, columns.empty() ? nullptr : columns.data()};
        made.values = values, made.bias = bias.data();
        return made;
    }
    // Output r of one token, with the outlier columns given.
    double at(int64_t r, const float* x, const std::vector<int32_t>& out, bool listed) const {
        std::vector<bool> apart(static_cast<size_t>(k));
        for (int32_t j : out) apart[static_cast<size_t>(j)] = true;
        float peak = 0;
        for (int64_t j = 0; j < k; ++j)
            if (!apart[static_cast<size_t>(j)]) peak = std::max(peak, std::fabs(x[j]));
        int64_t sum = 0;
        for (int64_t j = 0; j < k && peak > 0; ++j)
            if (!apart[static_cast<size_t>(j)])
                sum += static_cast<int64_t>(std::nearbyint(x[j] * (127.0f / peak))) * data[static_cast<size_t>(r * k + j)];
        double y = static_cast<double>(sum) * scale[static_cast<size_t>(r)] * (peak / 127.0) + bias[static_cast<size_t>(r)];
        for (size_t i = 0; i < out.size(); ++i) {
            const int64_t j = out[i], row = listed ? static_cast<int64_t>(i) : j;
            y += x[j] * (columns.empty() ? static_cast<double>(data[static_cast<size_t>(r * k + j)]) * scale[static_cast<size_t>(r)]
                                         : half_value(columns[static_cast<size_t>(row * n + r)]));
        }
        return y;
    }
};

TEST(int8_kernels_are_the_method) {
    Random random(3);
    for (const Isa& isa : isas()) {
        use(isa);
        for (int i = 0; i < 40; ++i) {
            const int64_t k = random.between(1, 130), n = random.between(1, 40), tokens = random.of<int64_t>({1, 2, 3, 9, 70});
            const bool gated = random.coin(), halves = random.coin();
            Outliers how;
            how.threshold = random.of({2.5f, 2.95f, 0.0001f, std::numeric_limits<float>::infinity()});
            how.listed = random.below(3) == 0;
            for (int64_t j = 0; how.listed && j < k; j += random.between(1, 40)) how.columns.push_back(static_cast<int32_t>(j));
            const PlainRows one(random, n, k, how, halves), other(random, n, k, how, halves);
            const std::vector<float> x = random.floats(tokens * k, -3, 3);
            std::vector<int32_t> out = how.columns;
            for (int64_t j = 0; !how.listed && j < k; ++j)
                for (int64_t t = 0; t < tokens; ++t)
                    if (std::fabs(x[static_cast<size_t>(t * k + j)]) >= how.threshold) {
                        out.push_back(static_cast<int32_t>(j));
                        break;
                    }
            std::vector<float> first;
            for (int threads : {1, 2, 4}) {
                Program program(threads);
                const int source = program.add_values(k, false), values = program.add_values(n, false);
                std::vector<Int8Product> products = {one.product(values)};
                if (gated) products.push_back(other.product(values));
                program.int8_linear("product", source, nullptr, products, how, gated ? Store::gated : Store::set,
                                    gated ? Act::silu : Act::none);
                Step step;
                const int64_t starts[] = {0, tokens}, past[] = {0};
                step.tokens = tokens, step.rows = 1, step.starts = starts, step.past = past;
                std::vector<float> y(static_cast<size_t>(tokens * n));
                program.run_on(step, source, x.data(), values, y.data());
                if (first.empty()) first = y;
                CHECK(y == first, "%s threads=%d", isa.name, threads);
                CHECK(program.kernels()[0]->outliers == static_cast<int64_t>(out.size()), "%s: %lld outliers, not %zu", isa.name,
                      static_cast<long long>(program.kernels()[0]->outliers), out.size());
            }
            for (int64_t t = 0; t < tokens; ++t)
                for (int64_t r = 0; r < n; ++r) {
                    const float* row = x.data() + t * k;
                    double expected = one.at(r, row, out, how.listed);
                    if (gated) expected = expected / (1 + std::exp(-expected)) * other.at(r, row, out, how.listed);
                    // Sums of floats in another order.
                    CHECK(std::fabs(first[static_cast<size_t>(t * n + r)] - expected) < 2e-4 * (1 + std::fabs(expected)),
                          "%s n=%lld k=%lld: %g, not %g", isa.name, static_cast<long long>(n), static_cast<long long>(k),
                          static_cast<double>(first[static_cast<size_t>(t * n + r)]), expected);
                }
        }
    }
}

}  // namespace
}  // namespace trimtab
