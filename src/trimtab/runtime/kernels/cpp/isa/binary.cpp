// Sums of signs times powers of two, compiled once per instruction set: a gather, an integer addition to the exponents and an
// addition of floats for every eight weights of a plane. No multiplication.
#include "binary.h"

#include "isa/simd.h"

namespace trimtab::TRIMTAB_ISA {
namespace {

constexpr int parts = 16 / lanes;

void tabulate(const float* x, int64_t cols, float* tables) {
    for (int64_t c = 0; c < cols / chunk_cols; ++c) {
        float* t = tables + c * chunk_sums;
        const float* at = x + c * chunk_cols;
        float least = 0;
        for (int s = 0; s < chunk_cols; ++s) least -= at[s];
        t[0] = least;
        for (int s = 0, size = 1; s < chunk_cols; ++s, size *= 2) {
            const float twice = at[s] + at[s];
            int p = 0;
            for (; p + lanes <= size; p += lanes) store_f(t + size + p, load<FV>(t + p) + splat_f(twice));
            for (; p < size; ++p) t[size + p] = t[p] + twice;
        }
    }
}

inline FV gather(const float* table, const uint8_t* bytes) {
#if defined(__AVX512F__)
    const __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
    return as<FV>(_mm512_i32gather_ps(index, table, 4));
#elif defined(__AVX2__)
    const __m256i index = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
    return as<FV>(_mm256_i32gather_ps(table, index, 4));
#else
    FV v;
    for (int i = 0; i < lanes; ++i) v[i] = table[bytes[i]];
    return v;
#endif
}

// `shifted` of every lane, by terms whose exponents are shifted to their place; lanes of `keep` 0 become 0.
inline FV shift(FV v, IV exponent, IV flip, IV keep) {
    const IV bits = as<IV>(v), have = bits & 0x7f800000, sum = have + exponent;
    const IV ordinary = keep & (have != 0) & (sum > 0);
    const IV moved = (sum >= 0x7f800000 ? (bits & static_cast<int32_t>(0x80000000)) | 0x7f800000 : bits + exponent);
    return as<FV>((moved ^ flip) & ordinary);
}

// Terms of the rows of one register: where all share their scales, that is one.
struct Terms {
    IV exponent, flip, keep;
};

inline Terms same(uint8_t code) {
    const Term t = term(code);
    return {splat_i(t.exponent * (1 << 23)), splat_i(t.negative ? static_cast<int32_t>(0x80000000) : 0), splat_i(t.none ? 0 : -1)};
}

inline Terms of_rows(const Binary& w, int64_t row, int64_t col, int at) {
    Terms out;
    for (int i = 0; i < lanes; ++i) {
        const int64_t r = row + i < w.rows ? row + i : w.rows - 1;
        const Term t = term(w.scale(r, col)[at]);
        out.exponent[i] = t.exponent * (1 << 23), out.flip[i] = t.negative ? static_cast<int32_t>(0x80000000) : 0, out.keep[i] = t.none ? 0 : -1;
    }
    return out;
}

void dot(const Binary& w, int64_t tile, const float* tables, float* out) {
    FV sum[parts];
    for (int p = 0; p < parts; ++p) sum[p] = FV{};
    const int64_t chunks = w.chunks();
    for (int p = 0; p < parts; ++p) {
        const int64_t row = tile * 16 + p * lanes, last = row + lanes - 1 < w.rows ? row + lanes - 1 : w.rows - 1;
        if (row >= w.rows) break;
        const bool shared = row / w.scale_rows == last / w.scale_rows;
        const uint8_t* codes = w.scale(row, 0);
        for (int64_t c = 0; c < chunks; ++c) {
            const uint8_t* bytes = w.chunk(tile, c) + p * lanes;
            for (int i = 0; i < w.bits; ++i) {
                const FV v = gather(tables + c * chunk_sums, bytes + i * 16);
                for (int t = 0; t < w.apot; ++t) {
                    const int at = i * w.apot + t;
                    const Terms by = shared ? same(codes[c * w.bits * w.apot + at]) : of_rows(w, row, c * chunk_cols, at);
                    sum[p] += shift(v, by.exponent, by.flip, by.keep);
                }
            }
        }
    }
    for (int p = 0; p < parts; ++p) store_f(out + p * lanes, sum[p]);
}

void decode(const Binary& w, int64_t tile, float* out) {
    for (int64_t c = 0; c < w.chunks(); ++c) {
        const uint8_t* bytes = w.chunk(tile, c);
        float* at = out + c * chunk_cols * 16;
        for (int64_t i = 0; i < chunk_cols * 16; ++i) at[i] = 0;
        for (int r = 0; r < 16; ++r) {
            const int64_t row = tile * 16 + r;
            if (row >= w.rows) continue;
            for (int s = 0; s < chunk_cols; ++s) {
                const uint8_t* codes = w.scale(row, c * chunk_cols + s);
                float value = 0;
                for (int i = 0; i < w.bits; ++i) {
                    float scale = 0;
                    for (int t = 0; t < w.apot; ++t) scale += shifted(1.0f, term(codes[i * w.apot + t]));
                    value += bytes[i * 16 + r] >> s & 1 ? scale : -scale;
                }
                at[s * 16 + r] = value;
            }
        }
    }
}

}  // namespace

extern const BinaryKernels binary_table;
const BinaryKernels binary_table = {tabulate, dot, decode};

}  // namespace trimtab::TRIMTAB_ISA
