// What stands between the products: norms, codes of activations, activations, roundings, rotations, and the words of
// simd.h.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "check.h"
#include "isas.h"
#include "matrices.h"

namespace trimtab {
namespace {

bool near(double y, double expected, double relative) {
    return std::fabs(y - expected) <= relative * std::max(1e-3, std::fabs(expected));
}

TEST(norm_is_the_definition) {
    for (const Isa& isa : isas()) {
        Random random(20);
        for (int64_t size = 1; size <= 67; ++size)
            for (bool layer : {false, true}) {
                const std::vector<float> x = random.floats(size, -1, 3), weight = random.floats(size),
                                         bias = random.floats(size);
                Norm n;
                n.layer = layer, n.eps = 1e-2f, n.size = size;
                if (random.coin()) n.weight = weight.data();
                if (random.coin()) n.bias = bias.data();
                double mean = 0, square = 0;
                for (float v : x) mean += layer ? v / static_cast<double>(size) : 0;
                for (float v : x) square += (v - mean) * (v - mean) / static_cast<double>(size);
                std::vector<float> y(x.size());
                isa.table->norm(n, x.data(), y.data());
                std::vector<float> same = x;
                isa.table->norm(n, same.data(), same.data());  // as queries and keys are normed
                CHECK(y == same, "%s size=%d in place", isa.name, static_cast<int>(size));
                for (size_t i = 0; i < x.size(); ++i) {
                    const double expected =
                        (x[i] - mean) / std::sqrt(square + static_cast<double>(n.eps)) * (n.weight ? weight[i] : 1.0) +
                        (n.bias ? bias[i] : 0.0);
                    // 1e-5: the mean of a layer norm is rounded, and then subtracted.
                    CHECK(std::fabs(y[i] - expected) < 1e-5, "%s size=%d layer=%d i=%d: %.9g, not %.9g", isa.name,
                          static_cast<int>(size), layer, static_cast<int>(i), y[i], expected);
                }
            }
    }
}

TEST(quantize_keeps_codes_in_range_and_their_sum) {
    for (const Isa& isa : isas()) {
        Random random(21);
        for (int64_t group : {16, 32, 48, 64, 96, 128})
            for (float twice_from : {0.0f, 1.2f, std::numeric_limits<float>::infinity()})
                for (int64_t cols : {1, 15, 31, 33, 100, 128}) {
                    constexpr int64_t tokens = 2;
                    Tiles w;
                    w.coding = Coding::ints, w.bits = 4, w.cols = cols, w.group = group;
                    if (w.padded() % w.act_group()) continue;  // groups divide a row, or are as long as it
                    Input in;
                    in.ints = true, in.twice_from = twice_from, in.stride = w.padded(), in.group = group,
                    in.act_group = w.act_group();
                    const int64_t acts = in.acts(), groups = in.sums();
                    std::vector<int8_t> codes(static_cast<size_t>(tokens * in.stride), 99), second(codes);
                    std::vector<float> scale(static_cast<size_t>(tokens * acts)), second_scale(scale);
                    std::vector<float> sum(static_cast<size_t>(tokens * groups));
                    std::vector<int32_t> twice(static_cast<size_t>(tokens * (1 + acts)));
                    in.codes = codes.data(), in.second = second.data(), in.scale = scale.data();
                    in.second_scale = second_scale.data(), in.sum = sum.data(), in.twice = twice.data();
                    for (int64_t t = 0; t < tokens; ++t) {
                        std::vector<float> x = random.floats(cols, -3, 3);
                        if (random.coin()) std::fill(x.begin(), x.begin() + std::min<int64_t>(cols, 20), 0.0f);
                        isa.table->quantize(in, t, x.data(), cols);
                        const int32_t* listed = in.listed(t);
                        auto is_twice = [&](int64_t a) {
                            return std::find(listed + 1, listed + 1 + listed[0], a) != listed + 1 + listed[0];
                        };
                        auto value = [&](int64_t k) {
                            const auto at = static_cast<size_t>(t * in.stride + k);
                            const auto a = static_cast<size_t>(t * acts + k / in.act_group);
                            return static_cast<double>(scale[a]) * codes[at] +
                                   (is_twice(k / in.act_group) ? static_cast<double>(second_scale[a]) * second[at] : 0);
                        };
                        for (int64_t a = 0; a < acts; ++a) {
                            const bool some = scale[static_cast<size_t>(t * acts + a)] > 0;
                            CHECK(twice_from > 0 || is_twice(a) == some, "%s: group %d", isa.name, static_cast<int>(a));
                            CHECK(twice_from < 2 || !is_twice(a), "%s: group %d", isa.name, static_cast<int>(a));
                        }
                        for (int64_t k = 0; k < in.stride; ++k) {
                            const double v = k < cols ? x[static_cast<size_t>(k)] : 0, y = value(k);
                            const int8_t code = codes[static_cast<size_t>(t * in.stride + k)];
                            const double step = scale[static_cast<size_t>(t * acts + k / in.act_group)];
                            const double room = 0.5 * step / (is_twice(k / in.act_group) ? 254 : 1);
                            CHECK(code >= -127, "%s: code %d", isa.name, code);
                            CHECK(k < cols || code == 0, "%s: code %d behind the row", isa.name, code);
                            CHECK(std::fabs(y - v) <= room * 1.01 + 3e-7, "%s twice_from=%g: %.9g, not %.9g", isa.name,
                                  twice_from, y, v);
                        }
                        for (int64_t g = 0; g < groups; ++g) {
                            double expected = 0, size = 0;
                            for (int64_t k = g * group; k < std::min(in.stride, (g + 1) * group); ++k)
                                expected += value(k), size += std::fabs(value(k));
                            const double y = sum[static_cast<size_t>(t * groups + g)];
                            CHECK(std::fabs(y - expected) <= 1e-6 * size, "%s: sum %.9g, not %.9g", isa.name, y, expected);
                        }
                    }
                }
    }
}

double plain_act(Act act, double v) {
    switch (act) {
        case Act::silu:
            return v / (1 + std::exp(-v));
        case Act::gelu_tanh:
            return 0.5 * v * (1 + std::tanh(0.7978845608028654 * (v + 0.044715 * v * v * v)));
        case Act::gelu:
            return 0.5 * v * (1 + std::erf(v / std::sqrt(2.0)));
        case Act::relu:
            return v > 0 ? v : 0;
        default:
            return v;
    }
}

TEST(activate_is_the_definition) {
    for (const Isa& isa : isas()) {
        Random random(22);
        for (Act act : {Act::silu, Act::gelu_tanh, Act::gelu, Act::relu})
            for (int64_t count : {16, 48, 512})
                for (bool gated : {false, true}) {
                    const std::vector<float> x = random.floats(count, -12, 12), up = random.floats(count);
                    std::vector<float> y = x;
                    isa.table->activate(act, y.data(), gated ? up.data() : nullptr, count);
                    for (size_t i = 0; i < y.size(); ++i) {
                        const double expected = plain_act(act, x[i]) * (gated ? up[i] : 1.0);
                        // Far below zero the two halves of gelu cancel in fp32: 1e-6 in all.
                        CHECK(near(y[i], expected, 3e-6) || std::fabs(y[i] - expected) < 1e-6,
                              "%s act=%d %g: %.9g, not %.9g", isa.name, static_cast<int>(act), x[i], y[i], expected);
                    }
                }
        for (Act act : {Act::silu, Act::gelu_tanh}) {
            std::vector<float> far(16, -1e4f);
            far[1] = 1e4f, far[2] = -100, far[3] = 100;
            const std::vector<float> x = far;
            isa.table->activate(act, far.data(), nullptr, 16);
            for (size_t i = 0; i < 16; ++i)
                CHECK(std::fabs(far[i] - std::max(0.0f, x[i])) < 1e-3, "%s act=%d %g: %g", isa.name,
                      static_cast<int>(act), x[i], far[i]);
        }
    }
}

float between(double low, double high) { return static_cast<float>((low + high) / 2); }

// A page of one element a token.
void write_page(const Isa& isa, PageKind kind, const std::vector<float>& x, uint16_t* page) {
    const PageForm form = {kind, static_cast<int64_t>(x.size()), 1, 0, 0};
    isa.table->encode_page(form, reinterpret_cast<uint8_t*>(page), 0, form.page, x.data(), 1);
}

// Every half comes back; a value between two goes to the nearer, the middle to the even one.
TEST(rounding_to_halves_is_exact) {
    for (const Isa& isa : isas()) {
        std::vector<float> x;
        std::vector<uint16_t> expected;
        for (uint32_t bits = 0; bits < 0x10000; ++bits) {
            const uint16_t here = static_cast<uint16_t>(bits), magnitude = here & 0x7fff;
            if (magnitude > 0x7c00) continue;  // not a number
            x.push_back(static_cast<float>(half_value(here))), expected.push_back(here);
            if (magnitude == 0x7c00) continue;
            const double above = magnitude == 0x7bff ? std::copysign(65536.0, half_value(here))
                                                     : half_value(static_cast<uint16_t>(here + 1));
            const float middle = between(half_value(here), above);
            const float away = std::copysign(std::numeric_limits<float>::infinity(), middle);
            x.push_back(middle), expected.push_back(static_cast<uint16_t>(here + (here & 1)));
            x.push_back(std::nextafter(middle, 0.0f)), expected.push_back(here);
            x.push_back(std::nextafter(middle, away)), expected.push_back(static_cast<uint16_t>(here + 1));
        }
        for (float far : {1e30f, -1e30f, 65520.0f, 1e-30f, -1e-30f})
            x.push_back(far), expected.push_back(nearest_half(far));
        std::vector<uint16_t> made(x.size()), word(x.size());
        write_page(isa, PageKind::f16, x, made.data());
        isa.words->half_bits(x.data(), static_cast<int64_t>(x.size()), word.data());
        for (size_t i = 0; i < x.size(); ++i)
            CHECK(made[i] == expected[i] && word[i] == expected[i], "%s: %.9g gives %04x, not %04x", isa.name, x[i],
                  made[i], expected[i]);
    }
}

TEST(rounding_to_bf16_is_exact) {
    for (const Isa& isa : isas()) {
        std::vector<float> x;
        std::vector<uint16_t> expected;
        for (uint32_t bits = 0; bits < 0x10000; ++bits) {
            const uint16_t here = static_cast<uint16_t>(bits);
            if ((here & 0x7fff) > 0x7f80) continue;
            for (uint32_t rest : {0u, 0x7fffu, 0x8000u, 0x8001u}) {
                if ((here & 0x7fff) == 0x7f80 && rest) continue;
                const uint32_t word = bits << 16 | rest;
                float v;
                std::memcpy(&v, &word, 4);
                x.push_back(v),
                    expected.push_back(static_cast<uint16_t>(here + (rest > 0x8000 || (rest == 0x8000 && here & 1))));
            }
        }
        std::vector<uint16_t> made(x.size());
        write_page(isa, PageKind::bf16, x, made.data());
        for (size_t i = 0; i < x.size(); ++i)
            CHECK(made[i] == expected[i], "%s: %.9g gives %04x, not %04x", isa.name, x[i], made[i], expected[i]);
    }
}

TEST(not_a_number_stays_one) {
    for (const Isa& isa : isas())
        for (uint32_t word : {0x7fc00000u, 0x7f800001u, 0xffc00000u, 0xff800001u, 0x7fffffffu}) {
            float x;
            std::memcpy(&x, &word, 4);
            uint16_t half, bf16;
            write_page(isa, PageKind::f16, {x}, &half), write_page(isa, PageKind::bf16, {x}, &bf16);
            CHECK((half & 0x7fff) > 0x7c00 && (bf16 & 0x7fff) > 0x7f80, "%s: %08x gives %04x and %04x", isa.name, word,
                  half, bf16);
        }
}

TEST(halves_and_bf16_decode_exactly) {
    std::vector<uint16_t> all(0x10000);
    for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<uint16_t>(i);
    auto same = [](float y, double expected) { return std::isnan(expected) ? std::isnan(y) : y == expected; };
    for (const Isa& isa : isas()) {
        std::vector<float> one(all.size()), many(all.size()), wide(all.size());
        isa.words->half(all.data(), 0x10000, one.data());
        isa.words->halves(all.data(), 0x10000, many.data());
        isa.words->bf16s(all.data(), 0x10000, wide.data());
        for (size_t i = 0; i < all.size(); ++i) {
            const double half = half_value(all[i]), bf16 = bf16_value(all[i]);
            CHECK(same(one[i], half) && same(many[i], half), "%s: half %04x", isa.name, all[i]);
            CHECK(same(wide[i], bf16), "%s: bf16 %04x", isa.name, all[i]);
        }
    }
}

// Every set rounds a * b + c once: the bits are those of std::fma.
TEST(fma_rounds_once) {
    for (const Isa& isa : isas()) {
        Random random(31);
        constexpr int64_t count = 1 << 16;
        std::vector<float> a(count), b(count), c(count), y(count);
        for (size_t i = 0; i < a.size(); ++i) {
            a[i] = random.uniform(-2, 2), b[i] = random.uniform(-2, 2);
            // From far below the last bit of the product to far above it, and what nearly cancels it.
            const float size = std::ldexp(1.0f, static_cast<int>(random.between(-60, 30)));
            c[i] = random.coin() ? random.uniform(-1, 1) * size : -a[i] * b[i] + random.uniform(-1, 1) * size;
            // Half an ulp of c as the product: a tie, or a hair beside one.
            if (random.below(4) == 0) {
                c[i] = random.uniform(1, 2), a[i] = std::ldexp(random.coin() ? 1.0f : 1.0f + std::ldexp(1.0f, -23), -12);
                b[i] = std::ldexp(random.coin() ? 1.0f : 1.0f - std::ldexp(1.0f, -24), -12) * (random.coin() ? 1.0f : -1.0f);
            }
        }
        const float big = std::numeric_limits<float>::infinity();
        a[0] = big, b[0] = 1, c[0] = 1;
        a[1] = 0, b[1] = 1, c[1] = 0;
        a[2] = 3e38f, b[2] = 2, c[2] = -3e38f;
        a[3] = 0, b[3] = 1, c[3] = -big;
        isa.words->fma(a.data(), b.data(), c.data(), count, y.data());
        for (size_t i = 0; i < a.size(); ++i) {
            const float expected = std::fma(a[i], b[i], c[i]);
            CHECK(std::memcmp(&y[i], &expected, 4) == 0, "%s: %a * %a + %a = %a, not %a", isa.name, a[i], b[i], c[i], y[i],
                  expected);
        }
        a[0] = std::numeric_limits<float>::quiet_NaN();
        isa.words->fma(a.data(), b.data(), c.data(), 16, y.data());
        CHECK(std::isnan(y[0]), "%s: a NaN became %g", isa.name, y[0]);
    }
}

TEST(exp_is_within_two_ulp) {
    for (const Isa& isa : isas()) {
        constexpr int64_t count = 1 << 17;
        std::vector<float> x(count), y(count);
        for (int64_t i = 0; i < count; ++i)
            x[static_cast<size_t>(i)] =
                static_cast<float>(-87.33654 + (88.0 + 87.33654) * static_cast<double>(i) / count);
        isa.words->exp(x.data(), count, y.data());
        for (size_t i = 0; i < y.size(); ++i) {
            const double expected = std::exp(static_cast<double>(x[i]));
            const double ulp = std::ldexp(1.0, std::ilogb(expected) - 23);
            CHECK(std::fabs(y[i] - expected) <= 2 * ulp, "%s: exp(%.9g) = %.9g, not %.9g", isa.name, x[i], y[i],
                  expected);
        }
        float far[16] = {-88, -1e4f, -std::numeric_limits<float>::infinity(), 0}, out[16];
        isa.words->exp(far, 16, out);
        CHECK(out[0] == 0 && out[1] == 0 && out[2] == 0 && out[3] == 1, "%s: %g %g %g %g", isa.name, out[0], out[1],
              out[2], out[3]);
        far[0] = 1e4f,
        far[1] = std::numeric_limits<float>::infinity();  // saturates, as the soft cap of a score relies on
        isa.words->exp(far, 16, out);
        CHECK(out[0] > 1e38f && out[1] > 1e38f, "%s: %g %g", isa.name, out[0], out[1]);
    }
}

TEST(rotate_turns_pairs) {
    for (const Isa& isa : isas()) {
        Random random(23);
        for (int64_t half : {1, 4, 8, 9, 40, 64}) {
            std::vector<float> x = random.floats(2 * half), cos, sin;
            const std::vector<float> before = x;
            for (int64_t i = 0; i < half; ++i) {
                const float angle = random.uniform(0, 6);
                cos.push_back(std::cos(angle)), sin.push_back(std::sin(angle));
            }
            isa.table->rotate(x.data(), cos.data(), sin.data(), half);
            for (size_t i = 0, h = static_cast<size_t>(half); i < h; ++i) {
                const double a = before[i], b = before[i + h];
                CHECK(std::fabs(x[i] - (a * cos[i] - b * sin[i])) < 3e-7 &&
                          std::fabs(x[i + h] - (b * cos[i] + a * sin[i])) < 3e-7,
                      "%s half=%d i=%d", isa.name, static_cast<int>(half), static_cast<int>(i));
            }
        }
    }
}

TEST(sums_of_bytes_are_exact) {
    for (const Isa& isa : isas()) {
        Random random(24);
        const int lanes = isa.words->lanes;
        const size_t bytes = static_cast<size_t>(4 * lanes);
        for (int round = 0; round < 200; ++round) {
            std::vector<uint8_t> u(bytes);
            std::vector<int8_t> w(bytes), s(bytes);
            std::vector<int32_t> y(static_cast<size_t>(lanes)), z(static_cast<size_t>(lanes));
            for (size_t i = 0; i < bytes; ++i) {
                u[i] = static_cast<uint8_t>(round ? random.below(128) : 127);  // 7 bits: two products stay in int16
                w[i] = static_cast<int8_t>(round ? random.between(-128, 127) : -128);
                s[i] = static_cast<int8_t>(round ? random.between(-127, 127) : -127);
            }
            isa.words->fold_pairs(u.data(), s.data(), y.data());
            isa.words->fold_signed_pairs(w.data(), s.data(), z.data());
            for (size_t i = 0; i < y.size(); ++i) {
                int32_t expected = 0, other = 0;
                for (size_t j = 4 * i; j < 4 * i + 4; ++j) expected += u[j] * s[j], other += w[j] * s[j];
                CHECK(y[i] == expected, "%s: %d, not %d", isa.name, y[i], expected);
                CHECK(z[i] == other, "%s: signed %d, not %d", isa.name, z[i], other);
            }
            const std::vector<float> x = random.floats(lanes);
            double total = 0;
            for (float v : x) total += v;
            CHECK(std::fabs(isa.words->sum(x.data()) - total) < 2e-6, "%s", isa.name);
            CHECK(isa.words->largest(x.data()) == *std::max_element(x.begin(), x.end()), "%s", isa.name);
        }
    }
}

}  // namespace
}  // namespace trimtab
