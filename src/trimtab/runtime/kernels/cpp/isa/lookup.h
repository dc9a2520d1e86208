// The inner loops of products by table lookup that need intrinsics. Layouts: native/tiles.h.
#pragma once
#include <cstdint>

#include "isa/lanes.h"
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

#ifdef __AVX2__

inline __m256i load_256(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

// int16 sums of 8 rows in both halves of a register, as 8 int32.
inline __m256i joined(__m256i v) {
    return _mm256_cvtepi16_epi32(_mm_add_epi16(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)));
}

// acc [16] = sum over pieces [first, last) of 16 columns and planes of 2^plane * entry. Coding planes.
template <int BITS>
inline void sum_halves(const uint8_t* data, const int8_t* table, int64_t first, int64_t last, int32_t* acc) {
    const __m256i nibble = _mm256_set1_epi8(15);
    __m256i all_low = _mm256_setzero_si256(), all_high = all_low;
    while (first < last) {
        // A piece adds at most 2 * 127 * 15 = 3810 to an int16, so four pieces and both halves stay in range.
        const int64_t stop = first + 4 < last ? first + 4 : last;
        __m256i low = _mm256_setzero_si256(), high = low;
        for (; first < stop; ++first) {
            const uint8_t* at = data + first / 2 * 64 * BITS + first % 2 * 32;
            const __m256i one = load_256(table + first * 64), two = load_256(table + first * 64 + 32);
            for (int p = 0; p < BITS; ++p) {
                const __m256i both = load_256(at + p * 64);
                const __m256i a = _mm256_shuffle_epi8(one, _mm256_and_si256(both, nibble));
                const __m256i b = _mm256_shuffle_epi8(two, _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble));
                const __m256i weight = _mm256_set1_epi8(static_cast<char>(1 << p));
                low = _mm256_add_epi16(low, _mm256_maddubs_epi16(weight, _mm256_unpacklo_epi8(a, b)));
                high = _mm256_add_epi16(high, _mm256_maddubs_epi16(weight, _mm256_unpackhi_epi8(a, b)));
            }
        }
        all_low = _mm256_add_epi32(all_low, joined(low)), all_high = _mm256_add_epi32(all_high, joined(high));
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc), all_low);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc + 8), all_high);
}

// The vector form of average_plainly: 2 or 4 pieces, unsigned entries.
inline void average_halves(const uint8_t* data, int bits, const uint8_t* table, int64_t first, int64_t last, int32_t* acc) {
    const __m256i nibble = _mm256_set1_epi8(15);
    __m256i sum = _mm256_setzero_si256();
    for (int p = 0; p < bits; ++p) {
        __m256i level[4];
        for (int64_t h = first; h < last; ++h) {
            const __m256i both = load_256(data + (h / 2 * bits + p) * 64 + h % 2 * 32);
            const __m256i a = _mm256_shuffle_epi8(load_256(table + h * 64), _mm256_and_si256(both, nibble));
            const __m256i b = _mm256_shuffle_epi8(load_256(table + h * 64 + 32), _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble));
            level[h - first] = _mm256_avg_epu8(a, b);
        }
        __m256i mean = _mm256_avg_epu8(level[0], level[1]);
        if (last - first == 4) mean = _mm256_avg_epu8(mean, _mm256_avg_epu8(level[2], level[3]));
        const __m128i rows = _mm_avg_epu8(_mm256_castsi256_si128(mean), _mm256_extracti128_si256(mean, 1));
        const __m256i value = _mm256_sub_epi16(_mm256_cvtepu8_epi16(rows), _mm256_set1_epi16(128));
        sum = _mm256_add_epi16(sum, _mm256_slli_epi16(value, p));
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc), _mm256_cvtepi16_epi32(_mm256_castsi256_si128(sum)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc + 8), _mm256_cvtepi16_epi32(_mm256_extracti128_si256(sum, 1)));
}

// acc [16] = sum over units [first, last) of 12 columns of the entries with their signs. Low bytes are added in int16; high
// bytes, -1, 0 or 1, in int8. Entries stay within [-127, 127], so that a sign is exact in a byte.
inline void sum_triples_avx2(const uint8_t* tile, const int8_t* table, int64_t first, int64_t last, int32_t* acc) {
    const __m256i nibble = _mm256_set1_epi8(15), one = _mm256_set1_epi8(1);
    __m256i low_rows = _mm256_setzero_si256(), high_rows = low_rows;
    while (first < last) {
        // 60 units add at most 2 * 60 to an int8 and 60 * 2 * 127 to an int16.
        const int64_t stop = first + 60 < last ? first + 60 : last;
        __m256i low = _mm256_setzero_si256(), high = low, carry = low;
        __m256i sign = low;
        bool fresh = true;
        for (; first < stop; ++first) {
            const int64_t place = first % 4;
            const uint8_t* block = tile + first / 4 * 160;
            if (place == 0 || fresh) {
                sign = load_256(block);
                // What a shift carries into the neighbouring byte never reaches bit 7 within the halves that are left.
                if (place) sign = _mm256_sll_epi16(sign, _mm_cvtsi32_si128(static_cast<int>(2 * place)));
                fresh = false;
            }
            const __m256i both = load_256(block + 32 + place * 32);
            const int8_t* at = table + first * 128;
            const __m256i a = _mm256_and_si256(both, nibble), b = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
            const __m256i sign_a = _mm256_or_si256(sign, one);
            sign = _mm256_add_epi8(sign, sign);
            const __m256i sign_b = _mm256_or_si256(sign, one);
            sign = _mm256_add_epi8(sign, sign);
            const __m256i low_a = _mm256_sign_epi8(_mm256_shuffle_epi8(load_256(at), a), sign_a);
            const __m256i high_a = _mm256_sign_epi8(_mm256_shuffle_epi8(load_256(at + 32), a), sign_a);
            const __m256i low_b = _mm256_sign_epi8(_mm256_shuffle_epi8(load_256(at + 64), b), sign_b);
            const __m256i high_b = _mm256_sign_epi8(_mm256_shuffle_epi8(load_256(at + 96), b), sign_b);
            low = _mm256_add_epi16(low, _mm256_maddubs_epi16(one, _mm256_unpacklo_epi8(low_a, low_b)));
            high = _mm256_add_epi16(high, _mm256_maddubs_epi16(one, _mm256_unpackhi_epi8(low_a, low_b)));
            carry = _mm256_add_epi8(carry, _mm256_add_epi8(high_a, high_b));
        }
        auto widened = [](__m256i v) {
            return _mm256_add_epi32(_mm256_cvtepi16_epi32(_mm256_castsi256_si128(v)),
                                    _mm256_cvtepi16_epi32(_mm256_extracti128_si256(v, 1)));
        };
        const __m256i carries = _mm256_add_epi16(_mm256_cvtepi8_epi16(_mm256_castsi256_si128(carry)),
                                                 _mm256_cvtepi8_epi16(_mm256_extracti128_si256(carry, 1)));
        const __m256i by = _mm256_set1_epi32(255);
        const __m256i low_carry = _mm256_cvtepi16_epi32(_mm256_castsi256_si128(carries));
        const __m256i high_carry = _mm256_cvtepi16_epi32(_mm256_extracti128_si256(carries, 1));
        low_rows = _mm256_add_epi32(low_rows, _mm256_add_epi32(widened(low), _mm256_mullo_epi32(low_carry, by)));
        high_rows = _mm256_add_epi32(high_rows, _mm256_add_epi32(widened(high), _mm256_mullo_epi32(high_carry, by)));
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc), low_rows);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc + 8), high_rows);
}

#endif

}  // namespace
