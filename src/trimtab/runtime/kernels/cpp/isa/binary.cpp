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

// By code of a term: the exponent, far below all floats where there is no term; and the sign.
struct Codes {
    float exponent[256];
    uint32_t sign[256];
    Codes() {
        for (int code = 0; code < 256; ++code) {
            const Term t = term(static_cast<uint8_t>(code));
            exponent[code] = t.none ? -1000.0f : static_cast<float>(t.exponent), sign[code] = t.negative ? 0x80000000u : 0u;
        }
    }
};

// v * 2^exponent with the sign flipped where `sign` says so, by adding to the exponents of v.
inline FV shift(FV v, FV exponent, UV sign) {
#if defined(__AVX512F__)
    const FV moved = as<FV>(_mm512_maskz_scalef_ps(0xffff, as<__m512>(v), as<__m512>(exponent)));
    return as<FV>(as<UV>(moved) ^ sign);
#else
    const UV bits = as<UV>(v);
    const IV have = as<IV>((bits >> 23) & 255), sum = have + __builtin_convertvector(exponent, IV);
    const UV ordinary = as<UV>((have != 0) & (sum > 0)), beyond = as<UV>(sum >= 255);
    const UV moved = (bits & 0x807fffffu) | (as<UV>(sum & 255) << 23), most = (bits & 0x80000000u) | 0x7f800000u;
    return as<FV>((((moved & ~beyond) | (most & beyond)) & ordinary) ^ sign);
#endif
}

void dot(const Binary& w, int64_t tile, int64_t first, int64_t last, const float* tables, float* out) {
    static const Codes terms;
    const int count = w.bits * w.apot;
    for (int p = 0; p < parts; ++p) {
        const int64_t row = tile * 16 + p * lanes, end = row + lanes - 1 < w.rows ? row + lanes - 1 : w.rows - 1;
        if (row >= w.rows) break;
        const bool shared = row / w.scale_rows == end / w.scale_rows;
        const uint8_t* codes = w.scale(row, first * chunk_cols);
        FV sum[2] = {load<FV>(out + p * lanes), FV{}};  // two chains: an addition takes several cycles
        for (int64_t c = first; c < last; ++c, codes += count) {
            const uint8_t* bytes = w.chunk(tile, c) + p * lanes;
            for (int i = 0; i < w.bits; ++i) {
                const FV v = gather(tables + c * chunk_sums, bytes + i * 16);
                for (int t = 0; t < w.apot; ++t) {
                    const int at = i * w.apot + t;
                    FV exponent;
                    UV sign;
                    if (shared) {
                        exponent = splat_f(terms.exponent[codes[at]]), sign = UV{} + terms.sign[codes[at]];
                    } else {
                        for (int r = 0; r < lanes; ++r) {
                            const uint8_t code = w.scale(row + r < w.rows ? row + r : w.rows - 1, c * chunk_cols)[at];
                            exponent[r] = terms.exponent[code], sign[r] = terms.sign[code];
                        }
                    }
                    sum[t & 1] += shift(v, exponent, sign);
                }
            }
        }
        store_f(out + p * lanes, sum[0] + sum[1]);
    }
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
