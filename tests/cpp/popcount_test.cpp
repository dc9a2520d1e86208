// Products of planes of bits on every instruction set against plain sums, in memory that ends where the rows do.
#include "popcount.h"

#include <cmath>
#include <new>
#include <vector>

#include "check.h"
#include "matrices.h"

namespace trimtab {

namespace baseline {
extern const BitKernels bit_table;
}
#ifdef TRIMTAB_HAS_AVX2
namespace avx2 {
extern const BitKernels bit_table;
}
#endif
#ifdef TRIMTAB_HAS_AVX512
namespace avx512 {
extern const BitKernels bit_table;
}
#endif
#ifdef TRIMTAB_HAS_VPOPCNTDQ
namespace avx512_popcnt {
extern const BitKernels bit_table;
}
#endif

namespace {

struct Set {
    const char* name;
    const BitKernels* kernels;
};
const Set sets[] = {
    {"baseline", &baseline::bit_table},
#ifdef TRIMTAB_HAS_AVX2
    {"avx2", &avx2::bit_table},
#endif
#ifdef TRIMTAB_HAS_AVX512
    {"avx512", &avx512::bit_table},
#endif
#ifdef TRIMTAB_HAS_VPOPCNTDQ
    {"avx512 vpopcntdq", &avx512_popcnt::bit_table},
#endif
};

// Codes of rows, and their planes.
struct Codes {
    std::vector<uint8_t> codes;  // [rows, padded], groups begin with a word
    std::vector<uint32_t> planes;
    int64_t padded;

    Codes(const BitKernels& k, const BitMatrix& shape, int64_t rows, int bits, Random& random)
        : padded((shape.row_words() + 1) / 2 * 2 * word_cols) {
        codes.resize(static_cast<size_t>(rows * padded)), planes.resize(static_cast<size_t>(rows * shape.row_words() * bits));
        const int64_t each = shape.group_words() * word_cols;
        for (int64_t n = 0; n < rows; ++n) {
            for (int64_t c = 0; c < shape.cols; ++c)
                codes[static_cast<size_t>(n * padded + c / shape.group * each + c % shape.group)] = static_cast<uint8_t>(random.below(1 << bits));
            k.pack(codes.data() + n * padded, shape.row_words(), bits, planes.data() + n * shape.row_words() * bits);
        }
    }
    int64_t odd(int64_t n, int64_t c, const BitMatrix& shape, int bits) const {
        const int64_t each = shape.group_words() * word_cols;
        return 2 * codes[static_cast<size_t>(n * padded + c / shape.group * each + c % shape.group)] - ((1 << bits) - 1);
    }
};

struct Aligned {
    char* data;
    explicit Aligned(int64_t bytes) : data(static_cast<char*>(::operator new(static_cast<size_t>(bytes), std::align_val_t(64)))) {}
    ~Aligned() { ::operator delete(data, std::align_val_t(64)); }
    Aligned(const Aligned&) = delete;
    Aligned& operator=(const Aligned&) = delete;
};

void check_product(const Set& set, int bits, int act_bits, int64_t rows, int64_t tokens, int64_t cols, int64_t group, Random& random) {
    const BitKernels& k = *set.kernels;
    BitMatrix w;
    w.rows = rows, w.cols = cols, w.group = group, w.bits = bits;
    const Codes left(k, w, rows, bits, random), right(k, w, tokens, act_bits, random);
    std::vector<uint16_t> scale(static_cast<size_t>(rows * w.groups()));
    std::vector<double> scales;
    for (uint16_t& s : scale) {
        const auto step = static_cast<uint16_t>(random.below(512));
        s = static_cast<uint16_t>(0x3c00 + step), scales.push_back(1 + step / 1024.0);
    }
    const std::vector<float> token_scale(static_cast<size_t>(tokens), 0.5f);
    w.words = left.planes.data(), w.scale = scale.data();
    BitInput x;
    x.tokens = tokens, x.bits = act_bits, x.words = right.planes.data(), x.codes = right.codes.data(), x.padded = right.padded;
    x.scale = token_scale.data();
    const Aligned scratch(scratch_bytes(w, x));
    for (const bool bytes : {false, true}) {
        std::vector<float> y(static_cast<size_t>(tokens * rows));
        std::vector<int64_t> sums(y.size());
        BitOutput out;
        out.y = y.data();
        const auto product = bytes ? k.bytes : k.popcount;
        const int64_t half = rows / 2, written = product(w, x, 0, half, scratch.data, out) + product(w, x, half, rows, scratch.data, out);
        CHECK(written == 4 * tokens * rows, "%s: %lld bytes written", set.name, static_cast<long long>(written));
        if (w.groups() == 1) out.y = nullptr, out.sums = sums.data(), product(w, x, 0, rows, scratch.data, out);
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t n = 0; n < rows; ++n) {
                int64_t whole = 0;
                double value = 0, size = 0;
                for (int64_t g = 0; g < w.groups(); ++g) {
                    int64_t sum = 0;
                    for (int64_t c = g * group; c < (g + 1) * group; ++c) sum += left.odd(n, c, w, bits) * right.odd(t, c, w, act_bits);
                    const double s = scales[static_cast<size_t>(n * w.groups() + g)];
                    whole += sum, value += static_cast<double>(sum) * s * 0.5;
                    size += static_cast<double>(w.most() * x.most() * group) * s;
                }
                const auto at = static_cast<size_t>(t * rows + n);
                CHECK(w.groups() > 1 || sums[at] == whole, "%s W%dA%d %lld x %lld", set.name, bits, act_bits, static_cast<long long>(rows), static_cast<long long>(cols));
                CHECK(std::fabs(static_cast<double>(y[at]) - value) <= 1e-6 * size, "%s W%dA%d group %lld: %g for %g", set.name, bits, act_bits,
                      static_cast<long long>(group), static_cast<double>(y[at]), value);
            }
    }
}

}  // namespace

TEST(products_of_planes_are_sums_of_odd_integers) {
    for (const Set& set : sets) {
        Random random(7);
        for (const auto& [bits, act_bits] : {std::pair{1, 1}, {2, 3}, {4, 1}, {8, 8}})
            for (const int64_t tokens : {1, 2, 3, 6})
                for (const auto& [cols, group] : {std::pair<int64_t, int64_t>{31, 31}, {545, 545}, {576, 64}, {576, 96}, {80, 40}, {1024, 512}})
                    check_product(set, bits, act_bits, 1 + random.below(21), tokens, cols, group, random);
    }
}

TEST(codes_come_back_from_planes) {
    for (const Set& set : sets) {
        Random random(3);
        for (int bits = 1; bits <= 8; ++bits) {
            BitMatrix shape;
            shape.cols = shape.group = 37 * word_cols;
            const Codes made(*set.kernels, shape, 1, bits, random);
            std::vector<uint8_t> back(static_cast<size_t>(shape.cols));
            set.kernels->unpack(made.planes.data(), shape.row_words(), bits, back.data());
            for (size_t c = 0; c < back.size(); ++c) CHECK(back[c] == made.codes[c], "%s %d bits, column %zu", set.name, bits, c);
        }
    }
}

TEST(floats_become_codes_alike) {
    for (const Set& set : sets) {
        const float x[] = {-1, 1, 0, 0.3f, -0.3f, 2, -2, NAN, 0.999f, 1e30f, -1e30f, 0.1f, 0.2f, 0.4f, 0.5f, 0.6f, 0.7f, 0.8f, 0.9f};
        uint8_t codes[19];
        set.kernels->code(x, 19, 7.5f, 15, codes);
        for (int i = 0; i < 19; ++i) {
            const float v = x[i] * 7.5f + 7.5f;
            const float wanted = v > 0 ? std::nearbyint(v < 15 ? v : 15.0f) : 0.0f;
            CHECK(codes[i] == wanted, "%s: %d for %g", set.name, codes[i], static_cast<double>(x[i]));
        }
        CHECK(set.kernels->largest(x, 7) == 2, "%s", set.name);
        CHECK(std::isnan(set.kernels->largest(x, 19)), "%s", set.name);
    }
}

}  // namespace trimtab
