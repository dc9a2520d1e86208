// AVX-512 intrinsics in portable C, for processors without them. The macros that announce AVX-512 are set by the build
// to select the kernels' branches; SIMDe must not see them, or it would call instructions that are not there.
#pragma once
#pragma push_macro("__AVX512F__")
#pragma push_macro("__AVX512BW__")
#pragma push_macro("__AVX512VL__")
#pragma push_macro("__AVX512DQ__")
#pragma push_macro("__AVX512VNNI__")
#pragma push_macro("__AVX512VBMI__")
#undef __AVX512F__
#undef __AVX512BW__
#undef __AVX512VL__
#undef __AVX512DQ__
#undef __AVX512VNNI__
#undef __AVX512VBMI__
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#pragma pop_macro("__AVX512F__")
#pragma pop_macro("__AVX512BW__")
#pragma pop_macro("__AVX512VL__")
#pragma pop_macro("__AVX512DQ__")
#pragma pop_macro("__AVX512VNNI__")
#pragma pop_macro("__AVX512VBMI__")

// SIMDe 0.7 gives this alias four parameters.
#undef _mm512_madd_epi16
#define _mm512_madd_epi16(a, b) simde_mm512_madd_epi16(a, b)

// SIMDe 0.7 lacks these. Elements whose bit of a mask is 0 are 0, and are not loaded.
#ifndef __mmask16
#define __mmask16 simde__mmask16
#endif
static inline simde__m512 trimtab_mm512_maskz_loadu_ps(uint32_t mask, const float* from) {
    float x[16] = {};
    for (int i = 0; i < 16; ++i)
        if (mask >> i & 1) x[i] = from[i];
    simde__m512 all;
    __builtin_memcpy(&all, x, sizeof all);
    return all;
}
static inline simde__m256i trimtab_mm256_maskz_loadu_epi16(uint32_t mask, const uint16_t* from) {
    uint16_t x[16] = {};
    for (int i = 0; i < 16; ++i)
        if (mask >> i & 1) x[i] = from[i];
    simde__m256i all;
    __builtin_memcpy(&all, x, sizeof all);
    return all;
}
static inline simde__m512 trimtab_mm512_maskz_cvtph_ps(uint32_t mask, simde__m256i halves) {
    simde__m128i part[2];
    __builtin_memcpy(part, &halves, sizeof part);
    const simde__m256 wide[2] = {simde_mm256_cvtph_ps(part[0]), simde_mm256_cvtph_ps(part[1])};
    float x[16];
    __builtin_memcpy(x, wide, sizeof x);
    return trimtab_mm512_maskz_loadu_ps(mask, x);
}
static inline simde__m256i trimtab_mm512_maskz_cvtepi32_epi16(uint32_t mask, simde__m512i v) {
    uint32_t from[16];
    uint16_t to[16];
    __builtin_memcpy(from, &v, sizeof from);
    for (int i = 0; i < 16; ++i) to[i] = static_cast<uint16_t>(from[i]);
    return trimtab_mm256_maskz_loadu_epi16(mask, to);
}
static inline simde__m512 trimtab_mm512_maskz_permutevar_ps(uint32_t mask, simde__m512 v, simde__m512i places) {
    float from[16], to[16];
    int32_t place[16];
    __builtin_memcpy(from, &v, sizeof from), __builtin_memcpy(place, &places, sizeof place);
    for (int i = 0; i < 16; ++i) to[i] = from[(i & ~3) | (place[i] & 3)];
    return trimtab_mm512_maskz_loadu_ps(mask, to);
}
template <class Byte>
static inline simde__m512i trimtab_widen(simde__m128i bytes) {
    Byte from[16];
    int32_t to[16];
    __builtin_memcpy(from, &bytes, sizeof from);
    for (int i = 0; i < 16; ++i) to[i] = from[i];
    simde__m512i all;
    __builtin_memcpy(&all, to, sizeof all);
    return all;
}
#ifndef _mm512_maskz_cvtph_ps
#define _mm512_maskz_cvtph_ps(mask, halves) trimtab_mm512_maskz_cvtph_ps(mask, halves)
#endif
#ifndef _mm512_maskz_cvtepi32_epi16
#define _mm512_maskz_cvtepi32_epi16(mask, v) trimtab_mm512_maskz_cvtepi32_epi16(mask, v)
#endif
#ifndef _mm512_maskz_permutevar_ps
#define _mm512_maskz_permutevar_ps(mask, v, places) trimtab_mm512_maskz_permutevar_ps(mask, v, places)
#endif
#ifndef _mm512_maskz_loadu_ps
#define _mm512_maskz_loadu_ps(mask, from) trimtab_mm512_maskz_loadu_ps(mask, from)
#endif
#ifndef _mm256_maskz_loadu_epi16
#define _mm256_maskz_loadu_epi16(mask, from) trimtab_mm256_maskz_loadu_epi16(mask, from)
#endif
#ifndef _mm512_cvtepu8_epi32
#define _mm512_cvtepu8_epi32(bytes) trimtab_widen<uint8_t>(bytes)
#endif
#ifndef _mm512_cvtepi8_epi32
#define _mm512_cvtepi8_epi32(bytes) trimtab_widen<int8_t>(bytes)
#endif

static inline simde__m512 trimtab_mm512_i32gather_ps(simde__m512i places, const float* from, int scale) {
    int32_t place[16];
    float to[16];
    __builtin_memcpy(place, &places, sizeof place);
    for (int i = 0; i < 16; ++i)
        __builtin_memcpy(to + i, reinterpret_cast<const char*>(from) + int64_t{place[i]} * scale, sizeof(float));
    simde__m512 all;
    __builtin_memcpy(&all, to, sizeof all);
    return all;
}
#ifndef _mm512_i32gather_ps
#define _mm512_i32gather_ps(places, from, scale) trimtab_mm512_i32gather_ps(places, from, scale)
#endif

// SIMDe rounds twice without FMA; the instruction rounds once.
static inline simde__m512 trimtab_mm512_fmadd_ps(simde__m512 a, simde__m512 b, simde__m512 c) {
    float x[16], y[16], z[16];
    __builtin_memcpy(x, &a, sizeof x), __builtin_memcpy(y, &b, sizeof y), __builtin_memcpy(z, &c, sizeof z);
    for (int i = 0; i < 16; ++i) z[i] = __builtin_fmaf(x[i], y[i], z[i]);
    simde__m512 all;
    __builtin_memcpy(&all, z, sizeof all);
    return all;
}
#undef _mm512_fmadd_ps
#define _mm512_fmadd_ps(a, b, c) trimtab_mm512_fmadd_ps(a, b, c)
