// Products by addition of bit patterns against 64-bit integers, one number at a time, in buffers that end where they must.
#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#include "check.h"
#include "isas.h"
#include "matrices.h"

namespace trimtab {
namespace {

uint32_t bits_of(float x) {
    uint32_t word;
    std::memcpy(&word, &x, 4);
    return word;
}

float float_of(uint32_t word) {
    float x;
    std::memcpy(&x, &word, 4);
    return x;
}

bool same(float a, float b) { return (std::isnan(a) && std::isnan(b)) || bits_of(a) == bits_of(b); }

// To `bits` of mantissa, ties to even, in doubles: what std::nearbyint does to the number scaled so.
float nearest(float x, int bits) {
    if (!std::isfinite(x) || x == 0) return x;
    int exponent;
    std::frexp(x, &exponent);
    if (exponent < -125) exponent = -125;  // below, the steps stay those of subnormals
    const double step = std::ldexp(1.0, exponent - 1 - bits);
    const double found = std::nearbyint(x / step) * step;
    return std::fabs(found) > std::numeric_limits<float>::max() ? std::copysign(INFINITY, x) : static_cast<float>(found);
}

int64_t field_of(const AddRule& rule, float x) {
    if (std::isinf(x)) return rule.high;
    int64_t field = bits_of(rule.nearest ? nearest(x, rule.mantissa) : x) & 0x7fffffff;
    field &= ~((int64_t{1} << (23 - rule.mantissa)) - 1);
    if (field > rule.high) field = rule.high;
    return field < rule.low ? 0 : field;
}

float product(const AddRule& rule, float a, float b) {
    if (rule.multiply == Multiply::exact) return nearest(a, rule.mantissa) * nearest(b, rule.mantissa);
    if (std::isnan(a) || std::isnan(b)) return NAN;
    const uint32_t sign = (bits_of(a) ^ bits_of(b)) & 0x80000000u;
    const int64_t x = field_of(rule, a), y = field_of(rule, b);
    if (x == 0 || y == 0) return float_of(sign);
    if (std::isinf(a) || std::isinf(b)) return float_of(sign | 0x7f800000u);
    int64_t field;
    if (rule.multiply == Multiply::integer) {
        field = x + y - (int64_t{127} << 23) + rule.offset;
    } else {
        const int64_t mask = (1 << 23) - 1, sum = (x & mask) + (y & mask) + rule.offset;
        const auto one = static_cast<float>(sum + (1 << 23));  // 2^23 (1 + sum), rounded
        field = static_cast<int64_t>(bits_of(one)) + ((x >> 23) + (y >> 23) - 127 - 150) * (int64_t{1} << 23);
    }
    if (field < rule.low) return float_of(sign);
    return float_of(sign | static_cast<uint32_t>(field > rule.high ? rule.high : field));
}

float rounded(const AddRule& rule, float x) {
    if (rule.sum == Sum::bf16) return nearest(x, 7);
    if (rule.sum == Sum::bits) return nearest(x, rule.sum_bits);
    if (rule.sum == Sum::fp32 || std::isnan(x)) return x;
    const double step = 1.0 / 512, size = std::fabs(static_cast<double>(x));
    const double found = size < 1.0 / 64 ? std::nearbyint(size / step) * step : nearest(static_cast<float>(size), 3);
    return static_cast<float>(std::copysign(found > 448 ? 448 : found, x));
}

std::vector<AddRule> rules() {
    std::vector<AddRule> made;
    for (Multiply how : {Multiply::integer, Multiply::formula, Multiply::exact})
        for (int mantissa : {2, 4, 7, 23})
            for (bool to_nearest : {false, true}) {
                AddRule rule;
                rule.multiply = how, rule.mantissa = mantissa, rule.nearest = to_nearest || how == Multiply::exact;
                rule.offset = 1 << (23 - (mantissa < 4 ? mantissa : 3));
                rule.high = how == Multiply::exact ? 0x7f7fffff : 0x7f800000 - (1 << (23 - mantissa));
                made.push_back(rule);
                if (how != Multiply::exact) rule.low = 121 << 23, rule.high = 0x43e00000, made.push_back(rule);
            }
    return made;
}

// Of all sizes, with zeros, subnormals, the largest numbers; where asked, infinities and NaN.
std::vector<float> numbers(Random& random, int64_t count, int spread, bool special) {
    std::vector<float> made(static_cast<size_t>(count));
    for (float& x : made) {
        x = std::ldexp(random.uniform(-1, 1), static_cast<int>(random.between(-spread, spread)));
        if (random.below(20) == 0) x = random.of({0.0f, -0.0f, 1e-40f, 3.4028235e38f, 448.0f, -0.015625f});
        if (special && random.below(30) == 0) x = random.of({INFINITY, -INFINITY, NAN});
    }
    return made;
}

TEST(lmul_products) {
    for (const Isa& isa : isas()) {
        Random random(5);
        for (const AddRule& rule : rules())
            for (int64_t count : {1, 7, 16, 333}) {
                const std::vector<float> a = numbers(random, count, 127, true), b = numbers(random, count, 127, true);
                std::vector<float> y(a.size());
                isa.lmul->multiply(rule, a.data(), b.data(), count, y.data());
                for (size_t i = 0; i < y.size(); ++i) {
                    const float wanted = product(rule, a[i], b[i]);
                    CHECK(same(y[i], wanted), "%s how=%d mantissa=%d: %.9g * %.9g = %.9g, not %.9g", isa.name,
                          static_cast<int>(rule.multiply), rule.mantissa, a[i], b[i], y[i], wanted);
                }
            }
    }
}

TEST(lmul_sums) {
    for (const Isa& isa : isas()) {
        Random random(6);
        for (AddRule rule : rules())
            for (Sum sum : {Sum::fp32, Sum::bf16, Sum::e4m3, Sum::bits}) {
                rule.sum = sum, rule.sum_bits = rule.mantissa;
                const int64_t tokens = random.between(1, 9), terms = random.between(1, 20), outputs = random.between(1, 70);
                const bool by_row = random.coin(), special = random.below(4) == 0;
                const std::vector<float> x = numbers(random, tokens * terms, 4, special), w = numbers(random, terms * outputs, 4, special);
                const int64_t w_row = by_row ? terms : 1, w_col = by_row ? 1 : outputs;
                std::vector<int32_t> scratch(static_cast<size_t>(isa.lmul->scratch(tokens, terms)));
                std::vector<float> y(static_cast<size_t>(tokens * outputs));
                const int64_t half = outputs / 2 / lmul_outputs * lmul_outputs;  // as two workers would
                for (int64_t first : {int64_t{0}, half})
                    isa.lmul->matmul(rule, x.data(), tokens, terms, w.data(), w_row, w_col, first, first ? outputs : half ? half : outputs,
                                     scratch.data(), y.data(), outputs);
                for (int64_t t = 0; t < tokens; ++t)
                    for (int64_t n = 0; n < outputs; ++n) {
                        float wanted = 0;
                        for (int64_t k = 0; k < terms; ++k)
                            wanted = rounded(rule, wanted + product(rule, x[static_cast<size_t>(t * terms + k)],
                                                                    w[static_cast<size_t>(n * w_row + k * w_col)]));
                        const float found = y[static_cast<size_t>(t * outputs + n)];
                        CHECK(same(found, wanted), "%s how=%d mantissa=%d sum=%d [%d, %d, %d]: %.9g, not %.9g", isa.name,
                              static_cast<int>(rule.multiply), rule.mantissa, static_cast<int>(sum), static_cast<int>(tokens),
                              static_cast<int>(terms), static_cast<int>(outputs), found, wanted);
                    }
            }
    }
}

}  // namespace
}  // namespace trimtab
