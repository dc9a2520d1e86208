#include "matrices.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

namespace trimtab {
namespace {

// A value of `mantissa` explicit bits whose exponent field has `exponent` bits.
double small_float(uint32_t bits, int exponent, int mantissa) {
    const uint32_t field = bits >> mantissa & ((1u << exponent) - 1), fraction = bits & ((1u << mantissa) - 1);
    const double sign = bits >> (exponent + mantissa) ? -1 : 1;
    const int bias = (1 << (exponent - 1)) - 1;
    if (field == (1u << exponent) - 1) return fraction ? std::nan("") : sign * std::numeric_limits<double>::infinity();
    if (field == 0) return sign * std::ldexp(fraction, 1 - bias - mantissa);
    return sign * std::ldexp(fraction + (1u << mantissa), static_cast<int>(field) - bias - mantissa);
}

// Signed magnitudes count upwards with their value, so the nearest is found by halving the interval.
uint16_t nearest(double x, int exponent, int mantissa) {
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0,
                   infinity = static_cast<uint16_t>(((1 << exponent) - 1) << mantissa);
    const double magnitude = std::fabs(x);
    if (std::isnan(x)) return static_cast<uint16_t>(sign | infinity | 1 << (mantissa - 1));
    uint16_t low = 0, high = infinity;  // value(low) <= magnitude
    while (high - low > 1) {
        const uint16_t middle = static_cast<uint16_t>((low + high) / 2);
        (small_float(middle, exponent, mantissa) <= magnitude ? low : high) = middle;
    }
    if (std::isinf(magnitude)) return static_cast<uint16_t>(sign | infinity);
    const double below = small_float(low, exponent, mantissa);
    // Infinity stands where the next finite value would.
    const double above =
        high == infinity ? std::ldexp(1.0, 1 << (exponent - 1)) : small_float(high, exponent, mantissa);
    const double middle = (below + above) / 2;
    return static_cast<uint16_t>(sign | (magnitude > middle || (magnitude == middle && low & 1) ? high : low));
}

void pack(std::vector<uint8_t>& data, const Tiles& t, int64_t row, int64_t col, uint32_t code) {
    uint8_t* unit = data.data() + row / 16 * t.data_bytes() + col / 32 * 64 * t.bits;
    const int64_t r = row % 16, c = col % 32;
    int shift = 0;
    for (int part : {8, 4, 2, 1}) {
        if (!(t.bits & part)) continue;
        const int64_t columns = 32 / part, vector = c / columns, place = c % columns / 4;
        unit[vector * 64 + 4 * r + c % 4] |=
            static_cast<uint8_t>((code >> shift & ((1u << part) - 1)) << (place * part));
        unit += 64 * part, shift += part;
    }
}

}  // namespace

double half_value(uint16_t bits) { return small_float(bits, 5, 10); }
double bf16_value(uint16_t bits) { return small_float(bits, 8, 7); }
uint16_t nearest_half(double x) { return nearest(x, 5, 10); }
uint16_t nearest_bf16(float x) { return nearest(x, 8, 7); }

double coded(Coding coding, float x) {
    if (coding == Coding::f16) return half_value(nearest_half(x));
    if (coding == Coding::bf16) return bf16_value(nearest_bf16(x));
    return x;
}

Plain float_matrix(Random& random, Coding coding, int64_t rows, int64_t cols) {
    Plain p;
    Tiles& t = p.tiles;
    t.coding = coding, t.rows = rows, t.cols = cols;
    p.data.assign(static_cast<size_t>(t.tiles() * t.data_bytes()), 0);
    const float most = 1.7f / std::sqrt(static_cast<float>(cols));
    for (int64_t n = 0; n < rows; ++n)
        for (int64_t k = 0; k < cols; ++k) {
            const float x = random.uniform(-most, most);
            const double kept = coded(coding, x);
            p.value.push_back(kept), p.magnitude.push_back(std::fabs(kept));
            uint8_t* tile = p.data.data() + n / 16 * t.data_bytes();
            if (coding == Coding::f32) {
                std::memcpy(tile + (k * 16 + n % 16) * 4, &x, 4);
                continue;
            }
            const uint16_t bits = coding == Coding::f16 ? nearest_half(x) : nearest_bf16(x);
            const int64_t place = coding == Coding::f16 ? k * 16 + n % 16 : (k / 2 * 16 + n % 16) * 2 + k % 2;
            std::memcpy(tile + place * 2, &bits, 2);
        }
    t.data = p.data.data();
    return p;
}

Plain int_matrix(Random& random, Scales scales, int bits, bool minimum, int64_t rows, int64_t cols, int64_t group,
                 Fill fill) {
    Plain p;
    Tiles& t = p.tiles;
    t.coding = Coding::ints, t.scales = scales, t.bits = bits, t.rows = rows, t.cols = cols;
    t.group = group ? group : t.padded();
    p.data.assign(static_cast<size_t>(t.tiles() * t.data_bytes()), 0);
    const int64_t groups = group ? cols / group : 1, blocks = cols / 256, padded_rows = t.tiles() * 16;
    const double most = 3.0 / std::sqrt(static_cast<double>(cols)) / (1 << bits);  // of a scale
    auto half = [&](double low, double high) { return nearest_half(low + (high - low) * random.uniform(0, 1)); };
    auto fill_halves = [&](std::vector<uint16_t>& to, int64_t count, double low, double high) {
        to.resize(static_cast<size_t>(count));
        for (uint16_t& h : to) h = half(low, high);
    };
    if (scales == Scales::half) {
        fill_halves(p.scale, padded_rows * groups, most / 2, most);
        if (minimum) fill_halves(p.minimum, padded_rows * groups, -most * (1 << bits), 0);
    } else {
        const int kinds = scales == Scales::q4_k ? 2 : 1;
        fill_halves(p.scale, padded_rows * blocks * kinds, most / 128, most / 64);
        p.sub.resize(static_cast<size_t>(padded_rows * blocks * kinds * (256 / group)));
        for (uint8_t& s : p.sub) s = static_cast<uint8_t>(kinds == 2 ? random.below(64) : random.below(256));
    }
    for (int64_t n = 0; n < rows; ++n)
        for (int64_t k = 0; k < cols; ++k) {
            const int64_t top = (1 << bits) - 1, r = n % 16, tile = n / 16;
            const int64_t code = fill == Fill::largest ? top : random.between(0, top);
            pack(p.data, t, n, k, static_cast<uint32_t>(code));
            double scale, offset;
            if (scales == Scales::half) {
                const size_t at = static_cast<size_t>((tile * groups + k / t.group) * 16 + r);
                scale = half_value(p.scale[at]);
                offset = minimum ? half_value(p.minimum[at]) : -scale * (1 << (bits - 1));
            } else if (scales == Scales::q4_k) {
                const int64_t block = tile * blocks + k / 256, inside = k % 256 / 32;
                scale = half_value(p.scale[static_cast<size_t>(block * 32 + r)]) *
                        p.sub[static_cast<size_t>((block * 16 + inside) * 16 + r)];
                offset = -half_value(p.scale[static_cast<size_t>(block * 32 + 16 + r)]) *
                         p.sub[static_cast<size_t>((block * 16 + 8 + inside) * 16 + r)];
            } else {
                const int64_t block = tile * blocks + k / 256, inside = k % 256 / 16;
                scale = half_value(p.scale[static_cast<size_t>(block * 16 + r)]) *
                        static_cast<int8_t>(p.sub[static_cast<size_t>((block * 16 + inside) * 16 + r)]);
                offset = -32 * scale;
            }
            p.value.push_back(scale * static_cast<double>(code) + offset);
            p.magnitude.push_back(std::fabs(scale) * (1 << bits) + std::fabs(offset));
        }
    t.data = p.data.data(), t.scale = p.scale.data();
    t.minimum = p.minimum.empty() ? nullptr : p.minimum.data(), t.sub = p.sub.empty() ? nullptr : p.sub.data();
    return p;
}

std::vector<int32_t> table_of(Random& random, int bits, int tables) {
    const int codes = 1 << bits, half = codes / 2, most = bits <= 5 ? 16 : 64;
    std::vector<int32_t> values;
    for (int t = 0; t < tables; ++t)
        for (int c = 0; c < codes; ++c)
            values.push_back(bits >= 7         ? (c < half ? c : half - c)
                             : c == codes - 1  ? -most
                             : c == half - 1   ? most
                                               : static_cast<int32_t>(random.between(-most, most)));
    return values;
}

std::vector<int32_t> pair_tables(int bits, bool flint) {
    const int half = 1 << (bits - 1), mantissa = bits == 8 ? 3 : 1, bias = bits == 8 ? 4 : flint ? 3 : 2;
    const int32_t flints[] = {0, 1, 2, 3, 4, 6, 8, 16};
    std::vector<int32_t> values;
    for (int t = 0; t < 2; ++t)
        for (int c = 0; c < 2 * half; ++c) {
            const int m = c % half, steps = 1 << mantissa;
            const int32_t outlier = m ? (steps + m % steps) << (m / steps + bias) : 0;
            const int32_t magnitude = t ? outlier : flint ? flints[m] : m;
            values.push_back(c < half ? magnitude : -magnitude);
        }
    return values;
}

Plain grid_matrix(Random& random, const std::vector<int32_t>& values, int tables, bool pairs, Scales scales, int bits, int64_t rows,
                  int64_t cols, int64_t group, Fill fill) {
    Plain p;
    Tiles& t = p.tiles;
    t.coding = pairs ? Coding::pairs : tables ? Coding::grid : Coding::ints;
    t.scales = scales, t.bits = bits, t.rows = rows, t.cols = cols, t.bipolar = tables == 0;
    t.group = group ? group : t.padded();
    const int codes = 1 << bits;
    if (tables) t.grid = Grid::of(values.data(), tables, bits, pairs);
    p.data.assign(static_cast<size_t>(t.tiles() * t.data_bytes()), 0);
    const int64_t groups = t.groups();
    double largest = codes;
    for (int32_t v : values) largest = std::max(largest, std::fabs(static_cast<double>(v)));
    const double most = 3.0 / std::sqrt(static_cast<double>(cols)) / largest;  // of a scale
    const double step = std::ldexp(1, -20);  // fp16 keeps little of less
    const auto count = static_cast<size_t>(t.tiles() * groups * 16);
    if (scales == Scales::stepped) p.scale.assign(static_cast<size_t>(t.tiles() * 16), nearest_half(16 * step));
    if (scales == Scales::half)
        for (size_t i = 0; i < count; ++i) p.scale.push_back(nearest_half(std::max(step, most * random.uniform(0.5f, 1))));
    for (size_t i = 0; scales != Scales::half && i < count; ++i)
        p.sub.push_back(static_cast<uint8_t>(scales == Scales::powers ? random.between(110, 120) : random.between(0, 255)));
    if (scales == Scales::powers && count > 16) p.sub[3] = 0;  // 2^-127
    std::vector<uint8_t> choice;
    if (!pairs && tables > 1)
        for (int64_t i = 0; i < t.tiles() * groups * tables; ++i) choice.push_back(static_cast<uint8_t>(random.below(256)));
    for (int64_t n = 0; n < rows; ++n) {
        std::vector<int> code(static_cast<size_t>(cols));
        for (int64_t k = 0; k < cols; ++k) {
            int& c = code[static_cast<size_t>(k)];
            c = static_cast<int>(random.below(codes));
            if (fill == Fill::largest) c = pairs ? (k % 2 ? codes / 2 : codes / 2 - 1) : n % 2 ? codes - 1 : codes / 2 - 1;
            pack(p.data, t, n, k, static_cast<uint32_t>(c));
        }
        for (int64_t k = 0; k < cols; ++k) {
            const int64_t r = n % 16, g = k / t.group, at = (n / 16 * groups + g) * 16 + r;
            const int width = tables / 2;  // bits of a choice
            int table = 0;
            if (pairs)
                table = (k ^ 1) < cols && code[static_cast<size_t>(k ^ 1)] == codes / 2;
            else if (tables > 1)
                for (int b = 0; b < width; ++b) {
                    const int64_t bit = r * width + b;
                    table |= (choice[static_cast<size_t>((n / 16 * groups + g) * 2 * width + bit / 8)] >> (bit % 8) & 1) << b;
                }
            const int c = code[static_cast<size_t>(k)];
            const double value = tables ? values[static_cast<size_t>(table * codes + c)] : 2 * c + 1 - codes;
            const double scale = scales == Scales::powers    ? std::ldexp(1, p.sub[static_cast<size_t>(at)] - 127)
                                 : scales == Scales::stepped ? half_value(p.scale[static_cast<size_t>(n / 16 * 16 + r)]) *
                                                                   p.sub[static_cast<size_t>(at)]
                                                             : half_value(p.scale[static_cast<size_t>(at)]);
            p.value.push_back(scale * value);
            p.magnitude.push_back(scale * 2 * (t.integers() ? largest : std::fabs(value)));  // what stands for 0 is added up too
        }
    }
    p.choice = std::move(choice);
    t.data = p.data.data(), t.scale = p.scale.empty() ? nullptr : p.scale.data();
    t.sub = p.sub.empty() ? nullptr : p.sub.data(), t.choice = p.choice.empty() ? nullptr : p.choice.data();
    return p;
}

}  // namespace trimtab
