// Eight floats at a time in the vector extension of GCC and Clang: one AVX register, or two of SSE or NEON.
// Everything is static: this header is compiled once per instruction set and nothing of it may be shared by the linker.
#pragma once
#include <cstdint>
#include <cstring>
#ifdef __F16C__
#include <immintrin.h>
#endif

namespace {

typedef float F8 __attribute__((vector_size(32)));
typedef uint32_t U8 __attribute__((vector_size(32)));
typedef int32_t I8 __attribute__((vector_size(32)));
typedef uint16_t H8 __attribute__((vector_size(16)));

template <class V, class P>
inline V load(const P* from) {
    V v;
    memcpy(&v, from, sizeof v);
    return v;
}

inline void store(float* to, F8 v) { memcpy(to, &v, sizeof v); }

inline F8 splat(float x) { return F8{x, x, x, x, x, x, x, x}; }

inline float total(F8 v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }

inline float half(uint16_t bits) {
#ifdef __F16C__
    return _cvtsh_ss(bits);
#else
    const uint32_t sign = (bits & 0x8000u) << 16, rest = bits & 0x7fffu;
    uint32_t word;
    if (rest >= 0x7c00) {
        word = 0x7f800000u | ((rest & 0x3ff) << 13);  // infinity, NaN
    } else if (rest >= 0x400) {
        word = (rest + (112u << 10)) << 13;
    } else {
        const float small = static_cast<float>(rest) * 5.9604644775390625e-8f;  // 2^-24: subnormals are multiples of it
        memcpy(&word, &small, 4);
    }
    word |= sign;
    float value;
    memcpy(&value, &word, 4);
    return value;
#endif
}

// The half nearest to x, ties to even.
inline uint16_t half_bits(float x) {
#ifdef __F16C__
    return static_cast<uint16_t>(_cvtss_sh(x, 0));
#else
    uint32_t word;
    memcpy(&word, &x, 4);
    const uint32_t sign = word >> 16 & 0x8000u, rest = word & 0x7fffffffu;
    if (rest > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00);  // NaN
    if (rest >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00);  // rounds to 65536 or more
    if (rest < 0x38800000u) {  // subnormal: adding 2^-1 * 2^-13 units lines the bits up and rounds
        float magnitude;
        memcpy(&magnitude, &rest, 4);
        magnitude += 0.5f;
        memcpy(&word, &magnitude, 4);
        return static_cast<uint16_t>(sign | (word - 0x3f000000u));
    }
    return static_cast<uint16_t>(sign | ((rest - 0x38000000u + 0xfff + (rest >> 13 & 1)) >> 13));
#endif
}

inline F8 load_half(const uint16_t* from) {
#ifdef __F16C__
    return reinterpret_cast<F8>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
    F8 v;
    for (int i = 0; i < 8; ++i) v[i] = half(from[i]);
    return v;
#endif
}

inline F8 load_bf16(const uint16_t* from) {
    const U8 wide = __builtin_convertvector(load<H8>(from), U8) << 16;
    F8 v;
    memcpy(&v, &wide, sizeof v);
    return v;
}

inline float bf16(uint16_t bits) {
    const uint32_t word = static_cast<uint32_t>(bits) << 16;
    float v;
    memcpy(&v, &word, 4);
    return v;
}

// BITS bytes as one word. Two loads joined by a shift, never a partial copy through memory: that would stall each load.
template <int BITS>
inline uint64_t word_of(const uint8_t* from) {
    if constexpr (BITS == 2) return load<uint16_t>(from);
    if constexpr (BITS == 3) return load<uint16_t>(from) | static_cast<uint64_t>(from[2]) << 16;
    if constexpr (BITS == 4) return load<uint32_t>(from);
    if constexpr (BITS == 5) return load<uint32_t>(from) | static_cast<uint64_t>(from[4]) << 32;
    if constexpr (BITS == 6) return load<uint32_t>(from) | static_cast<uint64_t>(load<uint16_t>(from + 4)) << 32;
    if constexpr (BITS == 7) return load<uint32_t>(from) | static_cast<uint64_t>(load<uint32_t>(from + 3)) << 24;
    return load<uint64_t>(from);
}

// Eight codes of BITS bits, which are BITS bytes. Up to 4 bits they fit one 32-bit word; above, four codes a word.
template <int BITS>
inline F8 codes8(const uint8_t* from) {
    constexpr uint32_t b = BITS, mask = (1u << BITS) - 1;
    const uint64_t word = word_of<BITS>(from);
    U8 v;
    if constexpr (BITS <= 4) {
        const uint32_t w = static_cast<uint32_t>(word);
        v = U8{w, w, w, w, w, w, w, w} >> U8{0, b, 2 * b, 3 * b, 4 * b, 5 * b, 6 * b, 7 * b};
    } else {
        const uint32_t lo = static_cast<uint32_t>(word), hi = static_cast<uint32_t>(word >> (4 * b));
        v = U8{lo, lo, lo, lo, hi, hi, hi, hi} >> U8{0, b, 2 * b, 3 * b, 0, b, 2 * b, 3 * b};
    }
    v &= mask;
    // Through int32: AVX2 converts signed words only, and a code is at most 255.
    return __builtin_convertvector(reinterpret_cast<I8>(v), F8);
}

// The code at position `i` of a row, for rows whose groups do not start at whole bytes.
inline uint32_t code_at(const uint8_t* row, int64_t i, int bits) {
    const int64_t bit = i * bits;
    const int shift = static_cast<int>(bit & 7);
    uint32_t word = row[bit >> 3];
    if (shift + bits > 8) word |= static_cast<uint32_t>(row[(bit >> 3) + 1]) << 8;
    return (word >> shift) & ((1u << bits) - 1);
}

}  // namespace
