// ggml block formats to floats. Layouts: ggml-common.h; rounding: products and sums are rounded apart (no FMA), as in
// ggml's dequantize_row_* and the gguf package, so results are bit-identical.
#include "kernels.h"
#include "isa/vec.h"

namespace trimtab::TRIMTAB_ISA {
namespace {

inline float half_at(const uint8_t* p) { return half(load<uint16_t>(p)); }

// 16 bytes -> 32 codes: low nibbles are elements 0..15, high nibbles 16..31; `high` holds the fifth bits.
template <bool FIFTH, bool MINIMUM>
inline void nibbles32(const uint8_t* qs, uint32_t high, float d, float m, float* out) {
    constexpr int zero = MINIMUM ? 0 : FIFTH ? 16 : 8;
    for (int side = 0; side < 2; ++side)
        for (int i = 0; i < 16; i += 8) {
            const uint32_t a = load<uint32_t>(qs + i) >> (4 * side), b = load<uint32_t>(qs + i + 4) >> (4 * side);
            U8 codes = U8{a, a, a, a, b, b, b, b} >> U8{0, 8, 16, 24, 0, 8, 16, 24} & 15;
            if constexpr (FIFTH) {
                const uint32_t h = high >> (16 * side + i);
                codes |= (U8{h, h, h, h, h, h, h, h} >> U8{0, 1, 2, 3, 4, 5, 6, 7} & 1) << 4;
            }
            F8 v = __builtin_convertvector(reinterpret_cast<I8>(codes) - zero, F8) * splat(d);
            if constexpr (MINIMUM) v += splat(m);
            store(out + 16 * side + i, v);
        }
}

void q4_0(const uint8_t* b, int64_t count, float* out) {
    for (; count--; b += 18, out += 32) nibbles32<false, false>(b + 2, 0, half_at(b), 0, out);
}
void q4_1(const uint8_t* b, int64_t count, float* out) {
    for (; count--; b += 20, out += 32) nibbles32<false, true>(b + 4, 0, half_at(b), half_at(b + 2), out);
}
void q5_0(const uint8_t* b, int64_t count, float* out) {
    for (; count--; b += 22, out += 32) nibbles32<true, false>(b + 6, load<uint32_t>(b + 2), half_at(b), 0, out);
}
void q5_1(const uint8_t* b, int64_t count, float* out) {
    for (; count--; b += 24, out += 32)
        nibbles32<true, true>(b + 8, load<uint32_t>(b + 4), half_at(b), half_at(b + 2), out);
}
void q8_0(const uint8_t* b, int64_t count, float* out) {
    for (; count--; b += 34, out += 32) {
        const float d = half_at(b);
        for (int i = 0; i < 32; ++i) out[i] = static_cast<float>(static_cast<int8_t>(b[2 + i])) * d;
    }
}

// Eight 6-bit scales and minima in 12 bytes.
inline void scale_min(const uint8_t* s, int j, float* scale, float* minimum) {
    const int a = j < 4 ? s[j] & 63 : (s[j + 4] & 15) | (s[j - 4] >> 6 << 4);
    const int m = j < 4 ? s[j + 4] & 63 : s[j + 4] >> 4 | (s[j] >> 6 << 4);
    *scale = static_cast<float>(a), *minimum = static_cast<float>(m);
}

// 256 elements in eight sub-blocks of 32; 32 bytes hold the nibbles of two of them. FIFTH: one bit more in qh.
template <bool FIFTH>
void q45_k(const uint8_t* b, int64_t count, float* out) {
    constexpr int head = 16, extra = FIFTH ? 32 : 0;
    for (; count--; b += head + extra + 128, out += 256) {
        const float d = half_at(b), dmin = half_at(b + 2);
        for (int j = 0; j < 8; ++j) {
            float scale, minimum;
            scale_min(b + 4, j, &scale, &minimum);
            scale *= d, minimum *= dmin;
            const uint8_t *qs = b + head + extra + j / 2 * 32, *qh = b + head;
            const int shift = j % 2 * 4;
            float* y = out + j * 32;
            for (int i = 0; i < 32; ++i) {
                int q = qs[i] >> shift & 15;
                if constexpr (FIFTH) q |= (qh[i] >> j & 1) << 4;
                y[i] = static_cast<float>(q) * scale - minimum;
            }
        }
    }
}

// 256 elements in sixteen sub-blocks of 16: 128 bytes of low nibbles, 64 of upper two bits, 16 signed scales, d.
void q6_k(const uint8_t* b, int64_t count, float* out) {
    for (; count--; b += 210, out += 256) {
        const float d = half_at(b + 208);
        for (int half_block = 0; half_block < 2; ++half_block)
            for (int part = 0; part < 4; ++part) {
                const uint8_t *ql = b + half_block * 64 + part % 2 * 32, *qh = b + 128 + half_block * 32;
                const int low = part / 2 * 4, high = part * 2;
                for (int piece = 0; piece < 2; ++piece) {
                    const int first = half_block * 128 + part * 32 + piece * 16;
                    const float scale = static_cast<float>(static_cast<int8_t>(b[192 + first / 16])) * d;
                    for (int i = 0; i < 16; ++i) {
                        const int k = piece * 16 + i;
                        const int q = ((ql[k] >> low & 15) | (qh[k] >> high & 3) << 4) - 32;
                        out[first + i] = static_cast<float>(q) * scale;
                    }
                }
            }
    }
}

}  // namespace

void dequantize(Block kind, const uint8_t* blocks, int64_t count, float* out) {
    switch (kind) {
        case Block::q4_0: return q4_0(blocks, count, out);
        case Block::q4_1: return q4_1(blocks, count, out);
        case Block::q5_0: return q5_0(blocks, count, out);
        case Block::q5_1: return q5_1(blocks, count, out);
        case Block::q8_0: return q8_0(blocks, count, out);
        case Block::q4_k: return q45_k<false>(blocks, count, out);
        case Block::q5_k: return q45_k<true>(blocks, count, out);
        case Block::q6_k: return q6_k(blocks, count, out);
    }
}

}  // namespace trimtab::TRIMTAB_ISA
