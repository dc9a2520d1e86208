// Sums of signs times powers of two, compiled once per instruction set: a gather, an integer addition to the exponents and an
// addition of floats for every eight weights of a plane. No multiplication.
#include "binary.h"

#include <cstring>

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
    // Eight loads: on processors that stop at AVX2 a gather takes longer.
    const __m128 low = _mm_setr_ps(table[bytes[0]], table[bytes[1]], table[bytes[2]], table[bytes[3]]);
    const __m128 high = _mm_setr_ps(table[bytes[4]], table[bytes[5]], table[bytes[6]], table[bytes[7]]);
    return as<FV>(_mm256_set_m128(high, low));
#else
    FV v;
    for (int i = 0; i < lanes; ++i) v[i] = table[bytes[i]];
    return v;
#endif
}

#if defined(__AVX512F__)
// What terms do to the lanes of a vector: the exponents to add, far below all floats where there is no term, and the signs.
struct Shift {
    FV exponent;
    UV sign;
    using First = float;
    using Vector = FV;
    static First first(Term t) { return t.none ? -1000.0f : static_cast<float>(t.exponent); }
    static uint32_t second(Term t) { return t.negative ? 0x80000000u : 0u; }
};

// Sums of a plane, and their terms.
struct Plane {
    FV v;
    explicit Plane(FV sums) : v(sums) {}
    FV shifted(const Shift& by) const {
        return as<FV>(as<UV>(as<FV>(_mm512_maskz_scalef_ps(0xffff, as<__m512>(v), as<__m512>(by.exponent)))) ^ by.sign);
    }
};

struct Overflow {
    void see(const Plane&) {}
    bool any() const { return false; }  // the instruction knows
};
#else
// What terms do to the bits of the lanes of a vector: above what exponents this makes a number (0 stays 0, and so does what would fall
// below the smallest one), and what is added to them: exponent and sign.
struct Shift {
    IV floor;
    UV step;
    using First = int32_t;
    using Vector = IV;
    static First first(Term t) { return t.none ? 255 : t.exponent < 0 ? -t.exponent : 0; }
    static uint32_t second(Term t) { return (static_cast<uint32_t>(t.exponent) << 23) + (t.negative ? 0x80000000u : 0u); }
};

struct Plane {
    UV bits;
    IV exponent;
    explicit Plane(FV sums) : bits(as<UV>(sums)), exponent(as<IV>((bits << 1) >> 24)) {}
    FV shifted(const Shift& by) const { return as<FV>((bits + by.step) & as<UV>(exponent > by.floor)); }
};

// Whether a sum is so large that a term could take it beyond the largest float.
struct Overflow {
    static constexpr int safe = 254 - 63;
    IV most{};
    void see(const Plane& plane) { most = plane.exponent > most ? plane.exponent : most; }
    bool any() const {
        for (int r = 0; r < lanes; ++r)
            if (most[r] > safe) return true;
        return false;
    }
};
#endif

// By code of a term. Small, so that the tables of a block of chunks stay in the nearest cache beside it.
struct Shifts {
    Shift::First first[256];
    uint32_t second[256];
    Shifts() {
        for (int code = 0; code < 256; ++code) {
            const Term t = term(static_cast<uint8_t>(code));
            first[code] = Shift::first(t), second[code] = Shift::second(t);
        }
    }
    Shift same(uint8_t code) const { return {Shift::Vector{} + first[code], UV{} + second[code]}; }
    Shift each(const uint8_t* codes) const {
        alignas(64) Shift::First one[lanes];
        alignas(64) uint32_t other[lanes];
        for (int r = 0; r < lanes; ++r) one[r] = first[codes[r]], other[r] = second[codes[r]];
        Shift by;
        std::memcpy(&by, one, sizeof one), std::memcpy(reinterpret_cast<char*>(&by) + sizeof one, other, sizeof other);
        return by;
    }
};

// One row in plain code, with the sums of `dot` in the same order.
float dot_row(const Binary& w, int64_t row, int64_t first, int64_t last, const float* tables, float start) {
    float sum[2] = {start, 0.0f};
    for (int64_t c = first; c < last; ++c)
        for (int i = 0; i < w.bits; ++i)
            for (int t = 0; t < w.apot; ++t) {
                const float v = tables[c * chunk_sums + w.chunk(row / 16, c)[i * 16 + row % 16]];
                sum[t & 1] += shifted(v, term(w.scale(row, c * chunk_cols)[i * w.apot + t]));
            }
    return sum[0] + sum[1];
}

void dot(const Binary& w, int64_t tile, int64_t first, int64_t last, const float* tables, float* out) {
    static const Shifts shifts;
    const int count = w.bits * w.apot;
    for (int p = 0; p < parts; ++p) {
        const int64_t row = tile * 16 + p * lanes, end = row + lanes - 1 < w.rows ? row + lanes - 1 : w.rows - 1;
        if (row >= w.rows) break;
        const bool shared = row / w.scale_rows == end / w.scale_rows;
        const uint8_t* codes = w.scale(row, first * chunk_cols);
        FV sum[2] = {load<FV>(out + p * lanes), FV{}};  // two chains: an addition takes several cycles
        Overflow overflow;
        for (int64_t c = first; c < last; ++c, codes += count) {
            const uint8_t* bytes = w.chunk(tile, c) + p * lanes;
            for (int i = 0; i < w.bits; ++i) {
                const Plane plane(gather(tables + c * chunk_sums, bytes + i * 16));
                overflow.see(plane);
                for (int t = 0; t < w.apot; ++t) {
                    const int at = i * w.apot + t;
                    if (shared) {
                        sum[t & 1] += plane.shifted(shifts.same(codes[at]));
                        continue;
                    }
                    uint8_t mixed[lanes];
                    for (int r = 0; r < lanes; ++r) mixed[r] = w.scale(row + r < w.rows ? row + r : w.rows - 1, c * chunk_cols)[at];
                    sum[t & 1] += plane.shifted(shifts.each(mixed));
                }
            }
        }
        if (overflow.any()) {
            for (int64_t r = row; r <= end; ++r) out[r - tile * 16] = dot_row(w, r, first, last, tables, out[r - tile * 16]);
            continue;
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
