// Table lookup with AVX-512 VBMI and VNNI: one permutation indexes four tables at once. Apart, so that a test can compile it
// against an emulation (TRIMTAB_EMULATE_AVX512) on processors without these instructions.
#pragma once
#include <cstdint>

#if defined(TRIMTAB_EMULATE_AVX512)
#include <simde/x86/avx512.h>
#elif defined(__AVX512VBMI__) && defined(__AVX512VNNI__)
#include <immintrin.h>
#endif

#if defined(TRIMTAB_EMULATE_AVX512) || (defined(__AVX512VBMI__) && defined(__AVX512VNNI__))
namespace {

// Four lookups in each of 16 rows, weighted and added: byte j of a 32-bit lane looks into table j of `tables`.
inline __m512i look_up(__m512i acc, __m512i nibbles, __m512i tables, __m512i weight) {
    const __m512i mask = _mm512_set1_epi8(15), table_of_byte = _mm512_set1_epi32(0x30201000);
    const __m512i index = _mm512_ternarylogic_epi32(nibbles, mask, table_of_byte, 0xea);  // (nibbles & mask) | table
    return _mm512_dpbusd_epi32(acc, weight, _mm512_permutexvar_epi8(index, tables));
}

// Sum over `units` of 32 columns and planes of 2^plane * entry, int32 of 16 rows. Coding lanes.
template <int BITS>
inline __m512i sum_lanes(const uint8_t* data, const int8_t* table, int64_t units) {
    __m512i sum[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};  // two chains: a product takes several cycles
    for (int64_t u = 0; u < units; ++u) {
        const __m512i one = _mm512_loadu_si512(table + u * 128), two = _mm512_loadu_si512(table + u * 128 + 64);
        for (int p = 0; p < BITS; ++p) {
            const __m512i both = _mm512_loadu_si512(data + (u * BITS + p) * 64);
            const __m512i weight = _mm512_set1_epi8(static_cast<char>(1 << p));
            sum[0] = look_up(sum[0], both, one, weight);
            sum[1] = look_up(sum[1], _mm512_srli_epi16(both, 4), two, weight);
        }
    }
    return _mm512_add_epi32(sum[0], sum[1]);
}

}  // namespace
#endif
