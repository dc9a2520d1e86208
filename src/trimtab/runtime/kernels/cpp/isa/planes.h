// Registers of planes and of bytes: counting bits, packing codes into planes and back, sums over lanes, products of bytes.
#pragma once
#include "isa/simd.h"
#include "popcount.h"

namespace trimtab::TRIMTAB_ISA {
namespace {

constexpr int tile = 16;                   // sums
constexpr int parts_of = 16 / lanes;       // registers of a block
constexpr int64_t most_blocks = 1024;      // 255 * 255 * 32 * 1024 < 2^31: what a lane can add up

// Not std::min: nothing that the linker could share with another instruction set.
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Memory from the caller, a piece after the other, each at the beginning of a cache line.
struct Scratch {
    char* at;
    template <class P>
    P* take(int64_t count) {
        P* found = reinterpret_cast<P*>(at);
        at += (count * static_cast<int64_t>(sizeof(P)) + 63) / 64 * 64;
        return found;
    }
};

#ifdef __AVX2__
#define UNROLL _Pragma("GCC unroll 16")
#else
#define UNROLL  // the registers of a tile do not fit, and the code would be many times as long
#endif

inline IV popcounts(UV v) {
#if defined(__AVX512VPOPCNTDQ__)
    return as<IV>(_mm512_popcnt_epi32(as<__m512i>(v)));
#elif defined(__AVX512BW__) && defined(__AVX512F__)
    const __m512i table = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
    const __m512i x = as<__m512i>(v), low = _mm512_set1_epi8(15);
    const __m512i bytes = _mm512_add_epi8(_mm512_shuffle_epi8(table, _mm512_and_si512(x, low)),
                                          _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(x, 4), low)));
    return fold(pairs(as<BV>(bytes), CV{} + 1));
#elif defined(__AVX2__)
    const __m256i table = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
    const __m256i x = as<__m256i>(v), low = _mm256_set1_epi8(15);
    const __m256i bytes = _mm256_add_epi8(_mm256_shuffle_epi8(table, _mm256_and_si256(x, low)),
                                          _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(x, 4), low)));
    return fold(pairs(as<BV>(bytes), CV{} + 1));
#else
    v -= (v >> 1) & 0x55555555u;
    v = (v & 0x33333333u) + ((v >> 2) & 0x33333333u);
    v = (v + (v >> 4)) & 0x0f0f0f0fu;
    v += v >> 8;
    return as<IV>((v + (v >> 16)) & 0x3fu);
#endif
}

// `count` words, 0 beyond.
inline UV load_some(const uint32_t* from, int64_t count) {
    if (count <= 0) return UV{};
#if defined(__AVX512F__)
    return as<UV>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), reinterpret_cast<const float*>(from)));
#elif defined(__AVX2__)
    static constexpr int32_t keep[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
    return as<UV>(_mm256_maskload_epi32(reinterpret_cast<const int*>(from), as<__m256i>(load<IV>(keep + 8 - count))));
#else
    UV v{};
    memcpy(&v, from, static_cast<size_t>(4 * count));
    return v;
#endif
}

// Words of the block that begins with word k of a row.
inline int64_t width_of(int64_t k, int64_t words) { return least(block_words, words - k); }

void pack(const uint8_t* codes, int64_t words, int bits, uint32_t* out) {
    for (int64_t first = 0; first < words; first += block_words, out += bits * block_words) {
        const int64_t width = width_of(first, words);
        for (int64_t k = 0; k < width; ++k, codes += word_cols)
            for (int i = 0; i < bits; ++i) {
#ifdef __AVX2__
                const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
                out[i * width + k] = static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_sll_epi16(v, _mm_cvtsi32_si128(7 - i))));
#else
                uint32_t word = 0;
                for (int c = 0; c < word_cols; ++c) word |= static_cast<uint32_t>(codes[c] >> i & 1) << c;
                out[i * width + k] = word;
#endif
            }
    }
}

void unpack(const uint32_t* from, int64_t words, int bits, uint8_t* codes) {
    for (int64_t first = 0; first < words; first += block_words, from += bits * block_words) {
        const int64_t width = width_of(first, words);
        int64_t k = 0;
#ifdef __AVX512BW__
        for (; k + 2 <= width; k += 2, codes += 2 * word_cols) {
            __m512i all = _mm512_setzero_si512();
            for (int i = 0; i < bits; ++i) {
                uint64_t both;
                memcpy(&both, from + i * width + k, 8);
                all = _mm512_or_si512(all, _mm512_and_si512(_mm512_movm_epi8(both), _mm512_set1_epi8(static_cast<char>(1 << i))));
            }
            _mm512_storeu_si512(codes, all);
        }
#endif
        for (; k < width; ++k, codes += word_cols) {
#ifdef __AVX2__
            const __m256i byte_of =
                _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
            const __m256i bit_of = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201u));
            __m256i all = _mm256_setzero_si256();
            for (int i = 0; i < bits; ++i) {
                const __m256i word = _mm256_set1_epi32(static_cast<int>(from[i * width + k]));
                const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(_mm256_shuffle_epi8(word, byte_of), bit_of), bit_of);
                all = _mm256_or_si256(all, _mm256_and_si256(set, _mm256_set1_epi8(static_cast<char>(1 << i))));
            }
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), all);
#else
            for (int c = 0; c < word_cols; ++c) {
                uint32_t value = 0;
                for (int i = 0; i < bits; ++i) value |= (from[i * width + k] >> c & 1) << i;
                codes[c] = static_cast<uint8_t>(value);
            }
#endif
        }
    }
}

// Lane i is the sum of lanes 2i and 2i + 1 of the two registers in a row.
template <class V>
inline V added_pairs(V a, V b) {
    IV even, odd;
    for (int i = 0; i < lanes; ++i) even[i] = 2 * i, odd[i] = 2 * i + 1;
    return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
}

// The sum of the lanes of v[k] becomes lane k of the registers v[0], ...
template <int COUNT = tile, class V>
inline void sum_lanes(V (&v)[tile]) {
    if constexpr (COUNT > tile / lanes) {
        UNROLL for (int i = 0; i < COUNT / 2; ++i) v[i] = added_pairs(v[2 * i], v[2 * i + 1]);
        sum_lanes<COUNT / 2>(v);
    }
}

#if defined(__AVX512VNNI__)
inline IV dot(IV acc, BV u, CV s, bool) { return as<IV>(_mm512_dpbusd_epi32(as<__m512i>(acc), as<__m512i>(u), as<__m512i>(s))); }
#else
// `narrow`: a pair of products fits 16 bits.
inline IV dot(IV acc, BV u, CV s, bool narrow) {
    if (narrow) return acc + fold(pairs(u, s));
    const BV high = as<BV>((as<WV>(u) >> 4) & 0x0f0f);
    return acc + fold(pairs(u & 15, s)) + (fold(pairs(high, s)) << 4);
}
#endif

}  // namespace
}  // namespace trimtab::TRIMTAB_ISA
