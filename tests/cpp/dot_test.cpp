// dot_tile of every instruction set against plain sums in double precision.
#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "check.h"
#include "isas.h"
#include "matrices.h"

namespace trimtab {
namespace {

constexpr int64_t most_tokens = 9;  // twice four and one: every number of tokens a kernel works on together

// An input of `rows` tokens with room for exactly that.
struct Made {
    Input in;
    std::vector<float> x, scale, second_scale, sum;
    std::vector<int8_t> codes, second;
    std::vector<int32_t> twice;

    Made(const Tiles& w, int64_t rows, float twice_from) {
        in.ints = w.integers(), in.stride = w.padded(), in.twice_from = twice_from;
        if (!in.ints) {
            x.resize(static_cast<size_t>(rows * in.stride)), in.x = x.data();
            return;
        }
        in.act_group = w.act_group(), in.group = w.group;
        codes.resize(static_cast<size_t>(rows * in.stride)), second.resize(codes.size());
        scale.resize(static_cast<size_t>(rows * acts())), second_scale.resize(scale.size());
        sum.resize(static_cast<size_t>(rows * groups())), twice.resize(static_cast<size_t>(rows * (1 + acts())));
        in.codes = codes.data(), in.second = second.data(), in.scale = scale.data();
        in.second_scale = second_scale.data(), in.sum = sum.data(), in.twice = twice.data();
    }
    int64_t acts() const { return in.acts(); }
    int64_t groups() const { return in.sums(); }
    bool is_twice(int64_t row, int64_t a) const {
        const int32_t* listed = in.listed(row);
        return std::find(listed + 1, listed + 1 + listed[0], a) != listed + 1 + listed[0];
    }
    double value(int64_t row, int64_t k) const {
        if (!in.ints) return x[static_cast<size_t>(row * in.stride + k)];
        const auto a = static_cast<size_t>(row * acts() + k / in.act_group), at = static_cast<size_t>(row * in.stride + k);
        return static_cast<double>(scale[a]) * codes[at] +
               (is_twice(row, k / in.act_group) ? static_cast<double>(second_scale[a]) * second[at] : 0);
    }
};

void fill(Made& made, Random& random, int64_t rows, int64_t cols, Fill how) {
    Input& in = made.in;
    for (int64_t row = 0; row < rows; ++row) {
        if (!in.ints) {
            for (int64_t k = 0; k < cols; ++k) in.x[row * in.stride + k] = random.uniform(-1, 1);
            continue;
        }
        int32_t* listed = in.listed(row);
        listed[0] = 0;
        for (int64_t a = 0; a < made.acts(); ++a) {
            in.scale[row * made.acts() + a] = random.uniform(0.001f, 0.01f);
            in.second_scale[row * made.acts() + a] = random.uniform(0.001f, 0.01f);
            // Columns behind the row are zero, and zeros are never coded twice.
            if (a * in.act_group < cols && random.below(3) == 0) listed[++listed[0]] = static_cast<int32_t>(a);
        }
        std::vector<double> sums(static_cast<size_t>(made.groups()));
        for (int64_t k = 0; k < cols; ++k) {
            const int64_t code = how == Fill::largest ? (row % 2 ? -127 : 127) : random.between(-127, 127);
            in.codes[row * in.stride + k] = static_cast<int8_t>(code);
            in.second[row * in.stride + k] = static_cast<int8_t>(how == Fill::largest ? -code : random.between(-127, 127));
            sums[static_cast<size_t>(k / in.group)] += made.value(row, k);
        }
        for (int64_t g = 0; g < made.groups(); ++g)
            in.sum[row * made.groups() + g] = static_cast<float>(sums[static_cast<size_t>(g)]);
    }
}

// By blocks of tokens; `all`: and one token after the other, and decoded to floats.
void check_matrix(const Isa& isa, const Plain& p, Random& random, Fill how, const std::string& what, bool all = false) {
    const Tiles& w = p.tiles;
    Made made(w, most_tokens, 0);
    fill(made, random, most_tokens, w.cols, how);
    if (all && made.in.ints) {
        made.x.resize(static_cast<size_t>(most_tokens * made.in.stride));
        for (int64_t t = 0; t < most_tokens; ++t)
            for (int64_t k = 0; k < w.cols; ++k)
                made.x[static_cast<size_t>(t * made.in.stride + k)] = static_cast<float>(made.value(t, k));
        made.in.x = made.x.data();
    }
    // Every addition rounds by at most half an ulp of what has been added up. Integers are added up exactly inside a
    // scale.
    const double roundings = static_cast<double>(made.in.ints && !all ? 8 * made.acts() + 16 : w.cols + 8);
    std::vector<double> expected(static_cast<size_t>(most_tokens * w.rows)), room(expected.size());
    for (int64_t t = 0; t < most_tokens; ++t)
        for (int64_t n = 0; n < w.rows; ++n) {
            double y = 0, terms = 0;
            for (int64_t k = 0; k < w.cols; ++k) {
                const double x = made.value(t, k);
                y += p.at(n, k) * x, terms += p.bound(n, k) * std::fabs(x);
            }
            expected[static_cast<size_t>(t * w.rows + n)] = y;
            room[static_cast<size_t>(t * w.rows + n)] = roundings * std::ldexp(terms, -24);
        }
    for (int64_t tokens = 1; tokens <= most_tokens; ++tokens)
        for (int64_t tile = 0; tile < w.tiles(); ++tile) {
            const int64_t t0 = most_tokens - tokens;  // the last row ends where its buffer ends
            std::vector<float> out(static_cast<size_t>(tokens * 16));
            for (auto dot : {isa.table->dot_tile, isa.table->dot_each, isa.table->dot_decoded}) {
                dot(w, tile, made.in, t0, tokens, out.data());
                for (int64_t t = 0; t < tokens; ++t)
                    for (int64_t n = tile * 16; n < std::min(w.rows, tile * 16 + 16); ++n) {
                        const size_t at = static_cast<size_t>((t0 + t) * w.rows + n);
                        const double y = out[static_cast<size_t>(t * 16 + n % 16)];
                        CHECK(std::fabs(y - expected[at]) <= room[at],
                              "%s %s rows=%d cols=%d tokens=%d t=%d n=%d: %.9g, not %.9g", isa.name, what.c_str(),
                              static_cast<int>(w.rows), static_cast<int>(w.cols), static_cast<int>(tokens),
                              static_cast<int>(t), static_cast<int>(n), y, expected[at]);
                    }
                if (!all) break;
            }
        }
}

TEST(dot_tile_of_floats) {
    for (const Isa& isa : isas()) {
        Random random(1);
        for (Coding coding : {Coding::f32, Coding::f16, Coding::bf16})
            for (int64_t cols : {1, 2, 3, 7, 48, 101})
                for (int64_t rows : {1, 19, 32})
                    check_matrix(isa, float_matrix(random, coding, rows, cols), random, Fill::random,
                                 "float coding " + std::to_string(static_cast<int>(coding)));
    }
}

TEST(dot_tile_of_ints) {
    for (const Isa& isa : isas()) {
        Random random(2);
        for (int bits = 1; bits <= 8; ++bits)
            for (bool minimum : {false, true})
                for (int64_t group : {0, 16, 32, 48, 64, 96, 128}) {
                    const std::string what = "bits=" + std::to_string(bits) + (minimum ? " minimum" : "") +
                                             " group=" + std::to_string(group);
                    // Groups divide the row; whole rows have any length. One group, and an odd number of them.
                    const int64_t lengths[] = {group ? group : random.between(1, 40),
                                               group ? 3 * group : random.between(41, 300)};
                    for (int64_t cols : lengths) {
                        const int64_t rows = random.between(1, 37);
                        check_matrix(isa, int_matrix(random, Scales::half, bits, minimum, rows, cols, group), random,
                                     Fill::random, what);
                    }
                    check_matrix(isa,
                                 int_matrix(random, Scales::half, bits, minimum, 17, lengths[1], group, Fill::largest),
                                 random, Fill::largest, what + " largest");
                }
    }
}

TEST(dot_tile_of_super_blocks) {
    for (const Isa& isa : isas()) {
        Random random(3);
        for (int64_t cols : {256, 768})
            for (Fill how : {Fill::random, Fill::largest})
                for (int64_t rows : {5, 33}) {
                    check_matrix(isa, int_matrix(random, Scales::q4_k, 4, true, rows, cols, 32, how), random, how,
                                 "q4_k");
                    check_matrix(isa, int_matrix(random, Scales::q4_k, 5, true, rows, cols, 32, how), random, how,
                                 "q5_k");
                    check_matrix(isa, int_matrix(random, Scales::q6_k, 6, false, rows, cols, 16, how), random, how,
                                 "q6_k");
                }
    }
}

TEST(dots_of_grids) {
    for (const Isa& isa : isas()) {
        Random random(5);
        for (Scales scales : {Scales::half, Scales::stepped, Scales::powers})
            for (int bits = 1; bits <= 8; ++bits)
                for (int tables : {0, 1, 2, 4})
                    for (int64_t group : {0, 16, 48, 64}) {
                        if ((tables > 1 && bits > 4) || (tables && bits == 1)) continue;
                        const std::string what = "grid bits=" + std::to_string(bits) + " tables=" + std::to_string(tables) +
                                                 " group=" + std::to_string(group) +
                                                 " scales=" + std::to_string(static_cast<int>(scales));
                        const std::vector<int32_t> values = tables ? table_of(random, bits, tables) : std::vector<int32_t>();
                        const int64_t cols = group ? 3 * group : random.between(1, 200), rows = random.between(1, 37);
                        for (Fill how : {Fill::random, Fill::largest})
                            check_matrix(isa, grid_matrix(random, values, tables, false, scales, bits, rows, cols, group, how), random,
                                         how, what, true);
                    }
    }
}

TEST(dots_of_pairs) {
    for (const Isa& isa : isas()) {
        Random random(6);
        for (bool flint : {false, true})
            for (int bits : {4, 8})
                for (int64_t group : {0, 16, 48, 64}) {
                    if (flint && bits == 8) continue;
                    const std::string what = std::string(flint ? "flint" : "int") + " pairs of " + std::to_string(bits) +
                                             " bits, group=" + std::to_string(group);
                    const int64_t cols = group ? 3 * group : 2 * random.between(1, 100), rows = random.between(1, 37);
                    for (Fill how : {Fill::random, Fill::largest})
                        check_matrix(isa,
                                     grid_matrix(random, pair_tables(bits, flint), 2, true, Scales::half, bits, rows, cols, group, how),
                                     random, how, what, true);
                }
    }
}

// quantize and dot_tile together: off by what the codes of x round away, half a step of each.
TEST(products_of_quantized_inputs_coded_once_and_twice) {
    constexpr int64_t tokens = 5;
    for (const Isa& isa : isas()) {
        Random random(4);
        for (float twice_from : {0.0f, 2.0f, std::numeric_limits<float>::infinity()})
            for (int bits = 1; bits <= 8; ++bits)
                for (int64_t group : {0, 16, 48, 32, 128}) {
                    const int64_t cols = group ? group * 3 : random.between(1, 200), rows = 21;
                    const Plain p = int_matrix(random, Scales::half, bits, random.coin(), rows, cols, group);
                    Made made(p.tiles, tokens, twice_from);
                    std::vector<std::vector<float>> x;
                    for (int64_t t = 0; t < tokens; ++t) {
                        x.push_back(random.floats(cols));
                        x.back()[static_cast<size_t>(random.below(cols))] = 40;  // as the residual stream has them
                        isa.table->quantize(made.in, t, x.back().data(), cols);
                    }
                    for (int64_t tile = 0; tile < p.tiles.tiles(); ++tile) {
                        std::vector<float> out(static_cast<size_t>(tokens * 16));
                        isa.table->dot_tile(p.tiles, tile, made.in, 0, tokens, out.data());
                        for (int64_t t = 0; t < tokens; ++t)
                            for (int64_t n = tile * 16; n < std::min(rows, tile * 16 + 16); ++n) {
                                double expected = 0, room = 0;
                                const double y = out[static_cast<size_t>(t * 16 + n % 16)];
                                for (int64_t k = 0; k < cols; ++k) {
                                    const double v = x[static_cast<size_t>(t)][static_cast<size_t>(k)];
                                    const int64_t a = k / made.in.act_group;
                                    const double step = made.in.scale[t * made.acts() + a];
                                    expected += p.at(n, k) * v;
                                    room += std::fabs(p.at(n, k)) * step * (made.is_twice(t, a) ? 0.5 / 254 : 0.5) +
                                            p.bound(n, k) * std::fabs(v) * 1e-5;
                                }
                                CHECK(std::fabs(y - expected) <= room * 1.001,
                                      "%s bits=%d group=%d twice_from=%g: %.9g, not %.9g", isa.name, bits,
                                      static_cast<int>(group), twice_from, y, expected);
                            }
                    }
                }
    }
}

}  // namespace
}  // namespace trimtab
