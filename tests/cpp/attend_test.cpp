// attend of every instruction set against a softmax in double precision.
#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "check.h"
#include "isas.h"
#include "matrices.h"

namespace trimtab {
namespace {

struct Case {
    Coding coding;
    int64_t head_dim, keys, page;  // page 0: one page of any length
    int queries;
    int64_t window;  // 0: none
    float softcap;
    bool unified;
    int64_t first, last;
    bool turned;
};

// Rows of one head as a cache keeps them. The last page ends with the last key, so that a read behind it is seen.
struct Rows {
    std::vector<std::vector<uint8_t>> pages;
    std::vector<const uint8_t*> at;
    std::vector<double> value;  // [keys, head_dim]

    Rows(Random& random, const Isa& isa, const Case& c) {
        const int64_t page = c.page ? c.page : c.keys, item = c.coding == Coding::f32 ? 4 : 2;
        for (int64_t s = 0; s < c.keys; s += page) {
            const int64_t count = std::min(page, c.keys - s) * c.head_dim;
            const std::vector<float> x = random.floats(count, -1.5f, 1.5f);
            pages.emplace_back(static_cast<size_t>(count * item));
            isa.table->encode(c.coding, x.data(), count, pages.back().data());
            for (float v : x) value.push_back(coded(c.coding, v));
        }
        for (const auto& p : pages) at.push_back(p.data());
    }
};

void check_case(const Isa& isa, Random& random, const Case& c) {
    const Rows k(random, isa, c), v(random, isa, c);
    const size_t count = static_cast<size_t>(c.queries);
    std::vector<std::vector<float>> queries;
    std::vector<const float*> q;
    std::vector<int64_t> low(count), high(count);
    for (int n = 0; n < c.queries; ++n) {
        queries.push_back(random.floats(c.head_dim, -2, 2));
        high[static_cast<size_t>(n)] = c.keys - random.below(std::min<int64_t>(c.keys, 5));
        low[static_cast<size_t>(n)] = c.window ? std::max<int64_t>(0, high[static_cast<size_t>(n)] - c.window) : 0;
    }
    for (const auto& row : queries) q.push_back(row.data());
    std::vector<float> largest(count), weight(count), out(count * static_cast<size_t>(c.head_dim), 7.0f);
    Attend a;
    a.pages = {c.coding, k.at.data(), v.at.data(), c.page ? c.page : int64_t{1} << 40, c.head_dim};
    a.first = c.first, a.last = c.last, a.queries = c.queries, a.q = q.data(), a.low = low.data(), a.high = high.data();
    a.scale = 1.5f / std::sqrt(static_cast<float>(c.head_dim)), a.softcap = c.softcap, a.unified = c.unified,
    a.phi = 1.25f;
    a.largest = largest.data(), a.weight = weight.data(), a.out = out.data(), a.turned = c.turned;
    isa.table->attend(a);

    const std::string what = std::string(isa.name) + " coding=" + std::to_string(static_cast<int>(c.coding)) +
                             " head_dim=" + std::to_string(c.head_dim) + " keys=" + std::to_string(c.keys) +
                             " page=" + std::to_string(c.page) + " queries=" + std::to_string(c.queries) +
                             " window=" + std::to_string(c.window) + " softcap=" + std::to_string(c.softcap) +
                             " unified=" + std::to_string(c.unified) + " first=" + std::to_string(c.first) +
                             " last=" + std::to_string(c.last) + " turned=" + std::to_string(c.turned);
    for (int n = 0; n < c.queries; ++n) {
        const size_t at = static_cast<size_t>(n);
        const int64_t from = std::max(c.first, low[at]), to = std::min(c.last, high[at]);
        std::vector<double> scores;
        double top = -std::numeric_limits<double>::infinity();
        for (int64_t s = from; s < to; ++s) {
            double x = 0;
            for (int64_t i = 0; i < c.head_dim; ++i)
                x += queries[at][static_cast<size_t>(i)] * k.value[static_cast<size_t>(s * c.head_dim + i)];
            x *= a.scale;
            if (c.softcap > 0) x = c.softcap * std::tanh(x / c.softcap);
            scores.push_back(x), top = std::max(top, x);
        }
        if (scores.empty()) {
            CHECK(weight[at] == 0 && std::isinf(largest[at]), "%s: query %d sees nothing", what.c_str(), n);
            for (int64_t i = 0; i < c.head_dim; ++i)
                CHECK(out[at * static_cast<size_t>(c.head_dim) + static_cast<size_t>(i)] == 0, "%s: query %d",
                      what.c_str(), n);
            continue;
        }
        CHECK(std::fabs(largest[at] - top) < 2e-5, "%s: query %d: largest %g, not %g", what.c_str(), n, largest[at],
              top);
        const double shift = c.unified ? 1.25 : largest[at];
        double sum = 0;
        std::vector<double> mean(static_cast<size_t>(c.head_dim));
        for (int64_t s = from; s < to; ++s) {
            const double p = std::exp(scores[static_cast<size_t>(s - from)] - shift);
            sum += p;
            for (int64_t i = 0; i < c.head_dim; ++i)
                mean[static_cast<size_t>(i)] += p * v.value[static_cast<size_t>(s * c.head_dim + i)];
        }
        // Scores are sums of head_dim terms in fp32, about 1e-6 off, which is the relative error of their exponentials.
        CHECK(std::fabs(weight[at] - sum) < 2e-5 * sum, "%s: query %d: weight %g, not %g", what.c_str(), n, weight[at],
              sum);
        for (int64_t i = 0; i < c.head_dim; ++i) {
            const double y = out[at * static_cast<size_t>(c.head_dim) + static_cast<size_t>(i)];
            CHECK(std::fabs(y - mean[static_cast<size_t>(i)]) < 4e-5 * sum, "%s: query %d value %d: %.9g, not %.9g",
                  what.c_str(), n, static_cast<int>(i), y, mean[static_cast<size_t>(i)]);
        }
    }
}

TEST(attend_is_a_softmax) {
    for (const Isa& isa : isas()) {
        Random random(10);
        for (Coding coding : {Coding::f32, Coding::f16, Coding::bf16})
            for (int64_t head_dim : {16, 48, 64, 80, 128})
                for (int queries = 1; queries <= max_queries; ++queries) {
                    Case c = {};
                    c.coding = coding, c.head_dim = head_dim, c.queries = queries;
                    c.keys = random.of<int64_t>({1, 3, 15, 16, 17, 63, 64, 65, 130, 200});
                    c.page = random.of<int64_t>({0, 0, 16, 40, 64, 100});
                    c.window = random.of<int64_t>({0, 0, 1, 7, 64, 100});
                    c.softcap = random.coin() ? random.uniform(1, 30) : 0;
                    c.unified = random.coin(), c.turned = random.coin();
                    c.last = c.keys;
                    check_case(isa, random, c);
                    c.first = random.below(c.keys), c.last = random.between(c.first, c.keys);
                    check_case(isa, random, c);
                }
    }
}

// A rising score makes every block rescale what came before.
TEST(attend_follows_a_rising_maximum) {
    for (const Isa& isa : isas()) {
        constexpr int64_t head_dim = 16, keys = 300;
        std::vector<float> k(keys * head_dim), v(keys * head_dim), q(head_dim, 1), out(head_dim);
        double sum = 0, mean = 0;
        for (int64_t s = 0; s < keys; ++s) {
            k[static_cast<size_t>(s * head_dim)] = static_cast<float>(s) * 0.25f;
            for (int64_t i = 0; i < head_dim; ++i) v[static_cast<size_t>(s * head_dim + i)] = static_cast<float>(s % 7);
            const double p = std::exp(0.25 * static_cast<double>(s - keys + 1));
            sum += p, mean += p * static_cast<double>(s % 7);
        }
        const float* query = q.data();
        const uint8_t *keys_at = reinterpret_cast<uint8_t*>(k.data()),
                      *values_at = reinterpret_cast<uint8_t*>(v.data());
        const int64_t low = 0, high = keys;
        float largest, weight;
        Attend a;
        a.pages = {Coding::f32, &keys_at, &values_at, int64_t{1} << 40, head_dim};
        a.last = keys, a.queries = 1, a.q = &query, a.low = &low, a.high = &high;
        a.largest = &largest, a.weight = &weight, a.out = out.data();
        isa.table->attend(a);
        CHECK(largest == 0.25f * (keys - 1), "%s: %g", isa.name, largest);
        CHECK(std::fabs(weight - sum) < 1e-5 * sum, "%s: %.9g, not %.9g", isa.name, weight, sum);
        for (float y : out) CHECK(std::fabs(y - mean) < 1e-5 * sum, "%s: %.9g, not %.9g", isa.name, y, mean);
    }
}

}  // namespace
}  // namespace trimtab
