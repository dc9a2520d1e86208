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

struct Rows16 {
    __m256i first, second;  // int32 of rows 0..7 and 8..15
};

// Sums of pieces on their way, int16 of rows 0..7 and 8..15 in both halves. A piece of 16 columns adds at most
// 2 * 127 * 15 = 3810, so four pieces and both halves stay in range.
struct Pieces {
    __m256i low, high;

    template <int BITS>
    inline void add(const uint8_t* piece, const int8_t* table) {
        const __m256i nibble = _mm256_set1_epi8(15);
        const __m256i one = load_256(table), two = load_256(table + 32);
        for (int p = 0; p < BITS; ++p) {
            const __m256i both = load_256(piece + p * 64);
            const __m256i a = _mm256_shuffle_epi8(one, _mm256_and_si256(both, nibble));
            const __m256i b = _mm256_shuffle_epi8(two, _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble));
            const __m256i weight = _mm256_set1_epi8(static_cast<char>(1 << p));
            low = _mm256_add_epi16(low, _mm256_maddubs_epi16(weight, _mm256_unpacklo_epi8(a, b)));
            high = _mm256_add_epi16(high, _mm256_maddubs_epi16(weight, _mm256_unpackhi_epi8(a, b)));
        }
    }
};

// Sum over pieces [first, last) of 16 columns and planes of 2^plane * entry. Coding planes.
template <int BITS>
inline Rows16 sum_halves(const uint8_t* data, const int8_t* table, int64_t first, int64_t last) {
    const __m256i zero = _mm256_setzero_si256();
    Rows16 all = {zero, zero};
    auto take = [&](const Pieces& sum) {
        all.first = _mm256_add_epi32(all.first, joined(sum.low)), all.second = _mm256_add_epi32(all.second, joined(sum.high));
    };
    // Two pieces, which are one unit, from an even one on.
    auto unit = [&](Pieces& sum, int64_t piece) {
        const uint8_t* at = data + piece * 32 * BITS;
        for (int line = 0; line < BITS; ++line) _mm_prefetch(reinterpret_cast<const char*>(at + 2048 + 64 * line), _MM_HINT_T0);
        sum.add<BITS>(at, table + piece * 64);
        sum.add<BITS>(at + 32, table + piece * 64 + 64);
    };
    if (first % 2 == 0) {
        for (; first + 4 <= last; first += 4) {
            Pieces sum = {zero, zero};
            unit(sum, first), unit(sum, first + 2);
            take(sum);
        }
        if (first + 2 <= last) {
            Pieces sum = {zero, zero};
            unit(sum, first);
            take(sum);
            first += 2;
        }
    }
    for (; first < last; ++first) {
        Pieces sum = {zero, zero};
        sum.add<BITS>(data + first / 2 * 64 * BITS + first % 2 * 32, table + first * 64);
        take(sum);
    }
    return all;
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

// Sums of triples on their way: low bytes are added in int16, high bytes, -1, 0 or 1, in int8. Entries stay within
// [-127, 127], so that a sign is exact in a byte.
struct Triples {
    __m256i low, high, carry;

    // One unit; bit 7 of the bytes of `sign` is the sign of its first half, and moves on to that of the next unit.
    inline void add(const uint8_t* unit, const int8_t* table, __m256i& sign) {
        const __m256i nibble = _mm256_set1_epi8(15), one = _mm256_set1_epi8(1);
        const __m256i both = load_256(unit);
        const __m256i a = _mm256_and_si256(both, nibble), b = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
        const __m256i next = _mm256_add_epi8(sign, sign);
        const __m256i sign_a = _mm256_or_si256(sign, one), sign_b = _mm256_or_si256(next, one);
        sign = _mm256_add_epi8(next, next);
        const __m256i low_a = _mm256_sign_epi8(_mm256_shuffle_epi8(load_256(table), a), sign_a);
        const __m256i high_a = _mm256_sign_epi8(_mm256_shuffle_epi8(load_256(table + 32), a), sign_a);
        const __m256i low_b = _mm256_sign_epi8(_mm256_shuffle_epi8(load_256(table + 64), b), sign_b);
        const __m256i high_b = _mm256_sign_epi8(_mm256_shuffle_epi8(load_256(table + 96), b), sign_b);
        low = _mm256_add_epi16(low, _mm256_maddubs_epi16(one, _mm256_unpacklo_epi8(low_a, low_b)));
        high = _mm256_add_epi16(high, _mm256_maddubs_epi16(one, _mm256_unpackhi_epi8(low_a, low_b)));
        carry = _mm256_add_epi8(carry, _mm256_add_epi8(high_a, high_b));
    }
};

inline __m256i widened(__m256i v) {
    return _mm256_add_epi32(_mm256_cvtepi16_epi32(_mm256_castsi256_si128(v)), _mm256_cvtepi16_epi32(_mm256_extracti128_si256(v, 1)));
}

// Sum over units [first, last) of 12 columns of the entries with their signs.
inline Rows16 sum_triples_avx2(const uint8_t* tile, const int8_t* table, int64_t first, int64_t last) {
    Rows16 all = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    while (first < last) {
        // 60 units add at most 2 * 60 to an int8 and 60 * 2 * 127 to an int16.
        const int64_t stop = first + 60 < last ? first + 60 : last;
        Triples sum = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()};
        while (first < stop) {
            const uint8_t* block = tile + first / 4 * 160;
            int64_t place = first % 4;
            __m256i sign = load_256(block);
            _mm_prefetch(reinterpret_cast<const char*>(block + 2048), _MM_HINT_T0);
            _mm_prefetch(reinterpret_cast<const char*>(block + 2048 + 64), _MM_HINT_T0);
            _mm_prefetch(reinterpret_cast<const char*>(block + 2048 + 128), _MM_HINT_T0);
            if (place == 0 && first + 4 <= stop) {
                for (int u = 0; u < 4; ++u) sum.add(block + 32 + u * 32, table + (first + u) * 128, sign);
                first += 4;
                continue;
            }
            // What a shift carries into the neighbouring byte never reaches bit 7 within the halves that are left.
            sign = _mm256_sll_epi16(sign, _mm_cvtsi32_si128(static_cast<int>(2 * place)));
            for (; place < 4 && first < stop; ++place, ++first) sum.add(block + 32 + place * 32, table + first * 128, sign);
        }
        const __m256i carries = _mm256_add_epi16(_mm256_cvtepi8_epi16(_mm256_castsi256_si128(sum.carry)),
                                                 _mm256_cvtepi8_epi16(_mm256_extracti128_si256(sum.carry, 1)));
        const __m256i by = _mm256_set1_epi32(255);
        const __m256i low_carry = _mm256_cvtepi16_epi32(_mm256_castsi256_si128(carries));
        const __m256i high_carry = _mm256_cvtepi16_epi32(_mm256_extracti128_si256(carries, 1));
        all.first = _mm256_add_epi32(all.first, _mm256_add_epi32(widened(sum.low), _mm256_mullo_epi32(low_carry, by)));
        all.second = _mm256_add_epi32(all.second, _mm256_add_epi32(widened(sum.high), _mm256_mullo_epi32(high_carry, by)));
    }
    return all;
}

#endif

}  // namespace
