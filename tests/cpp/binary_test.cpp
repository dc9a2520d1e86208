// Sums of signs times powers of two of every instruction set against the plain sum, which has no multiplication, and in doubles.
#include <cmath>

#include "check.h"
#include "isas.h"
#include "matrices.h"
#include "native/program.h"

namespace trimtab {
namespace {

struct Made {
    std::vector<uint8_t> signs, scales;
    Binary w;
};

Made made(Random& random, int64_t rows, int64_t chunks, int64_t scale_rows, int64_t scale_cols, int bits, int apot) {
    Made m;
    m.w.rows = rows, m.w.cols = 8 * chunks, m.w.scale_rows = scale_rows, m.w.scale_cols = scale_cols, m.w.bits = bits, m.w.apot = apot;
    m.signs.resize(static_cast<size_t>(m.w.tiles() * chunks * bits * 16));
    m.scales.resize(static_cast<size_t>((rows + scale_rows - 1) / scale_rows * (m.w.cols / scale_cols) * bits * apot));
    for (uint8_t& byte : m.signs) byte = static_cast<uint8_t>(random.between(0, 255));
    for (uint8_t& code : m.scales)  // a quarter has no term; the others are 2^-8 .. 2^3, of both signs
        code = static_cast<uint8_t>(random.between(0, 3) ? random.between(56, 67) | random.between(0, 1) << 7 : random.between(0, 1) << 7);
    m.w.signs = m.signs.data(), m.w.scales = m.scales.data();
    return m;
}

double weight(const Binary& w, int64_t n, int64_t k) {
    double value = 0;
    for (int i = 0; i < w.bits; ++i) {
        double scale = 0;
        for (int t = 0; t < w.apot; ++t) {
            const Term by = term(w.scale(n, k)[i * w.apot + t]);
            if (!by.none) scale += std::ldexp(by.negative ? -1.0 : 1.0, by.exponent);
        }
        value += w.chunk(n / 16, k / 8)[i * 16 + n % 16] >> k % 8 & 1 ? scale : -scale;
    }
    return value;
}

TEST(binary_products_agree) {
    Random random(1);
    for (const Isa& isa : isas())
        for (int round = 0; round < 60; ++round) {
            const int64_t rows = random.between(1, 70), chunks = random.between(1, 9);
            const bool columns = round % 4 == 3;
            Made m = made(random, rows, chunks, random.between(1, 40), columns ? 1 : 8, static_cast<int>(random.between(1, 4)),
                          static_cast<int>(random.between(1, 4)));
            const std::vector<float> x = random.floats(8 * chunks, -2, 2);
            std::vector<float> plain(static_cast<size_t>(rows)), tables(static_cast<size_t>(chunks * chunk_sums));
            binary_plain(m.w, x.data(), plain.data());
            isa.binary->tabulate(x.data(), 8 * chunks, tables.data());
            std::vector<float> decoded(static_cast<size_t>(8 * chunks * 16));
            for (int64_t tile = 0; tile < m.w.tiles(); ++tile) {
                float out[16] = {};
                isa.binary->decode(m.w, tile, decoded.data());
                const int64_t middle = random.between(0, chunks);
                if (m.w.looks_up())
                    isa.binary->dot(m.w, tile, 0, middle, tables.data(), out), isa.binary->dot(m.w, tile, middle, chunks, tables.data(), out);
                for (int64_t r = 0; r < 16 && tile * 16 + r < rows; ++r) {
                    const int64_t n = tile * 16 + r;
                    double sum = 0, size = 0;
                    for (int64_t k = 0; k < 8 * chunks; ++k) {
                        const double value = weight(m.w, n, k);
                        CHECK(decoded[static_cast<size_t>(k * 16 + r)] == static_cast<float>(value), "%s row %lld column %lld", isa.name,
                              static_cast<long long>(n), static_cast<long long>(k));
                        sum += value * static_cast<double>(x[static_cast<size_t>(k)]);
                        size += std::fabs(value * static_cast<double>(x[static_cast<size_t>(k)]));
                    }
                    const double close = 1e-5 * size + 1e-6;
                    CHECK(std::fabs(static_cast<double>(plain[static_cast<size_t>(n)]) - sum) <= close, "plain row %lld",
                          static_cast<long long>(n));
                    if (m.w.looks_up())
                        CHECK(std::fabs(static_cast<double>(out[r]) - sum) <= close, "%s row %lld: %g for %g", isa.name,
                              static_cast<long long>(n), static_cast<double>(out[r]), sum);
                }
            }
        }
}

TEST(shifts_meet_the_ends_of_floats) {
    const float least = 1.17549435e-38f, most = 3.0e38f;
    CHECK(shifted(least, Term{false, false, -1}) == 0.0f, "below the smallest normal number");
    CHECK(shifted(least, Term{false, true, 3}) == -8 * least, "exact");
    CHECK(std::isinf(shifted(most, Term{false, false, 1})), "beyond the largest");
    CHECK(shifted(0.0f, Term{false, false, 63}) == 0.0f && shifted(5.0f, Term{true, false, 1}) == 0.0f, "zero, no term");
}

}  // namespace
}  // namespace trimtab
