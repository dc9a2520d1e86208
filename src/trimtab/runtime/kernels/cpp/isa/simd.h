// One vector register of this instruction set as `rows` floats, `rows` int32 or 4 * `rows` bytes, and the few operations
// the kernels need. Written with the vector extension of GCC and Clang; intrinsics only where the extension has no word.
#pragma once
#include <cstdint>
#include <cstring>

#include "isa/vec.h"
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

#ifdef __AVX512F__
constexpr int lanes = 16;
#else
constexpr int lanes = 8;
#endif

typedef float FV __attribute__((vector_size(4 * lanes)));
typedef int32_t IV __attribute__((vector_size(4 * lanes)));
typedef uint32_t UV __attribute__((vector_size(4 * lanes)));
typedef int16_t SV __attribute__((vector_size(4 * lanes)));
typedef uint16_t WV __attribute__((vector_size(4 * lanes)));
typedef int8_t CV __attribute__((vector_size(4 * lanes)));
typedef uint8_t BV __attribute__((vector_size(4 * lanes)));
typedef uint16_t HV __attribute__((vector_size(2 * lanes)));

template <class To, class From>
inline To as(From v) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &v, sizeof to);
    return to;
}

inline FV splat_f(float x) {  // FV{} + x would add, because of negative zeros
#if defined(__AVX512F__)
    return as<FV>(_mm512_set1_ps(x));
#elif defined(__AVX2__)
    return as<FV>(_mm256_set1_ps(x));
#else
    return FV{x, x, x, x, x, x, x, x};
#endif
}
inline IV splat_i(int32_t x) { return IV{} + x; }
inline FV to_float(IV v) { return __builtin_convertvector(v, FV); }

// a * b + c, rounded once, by every instruction set: what goes into int8 codes must not depend on the set, since one code of
// another value moves the logits by far more than a rounding does.
inline FV fma_of(FV a, FV b, FV c) {
#if defined(__AVX512F__)
    return as<FV>(_mm512_fmadd_ps(as<__m512>(a), as<__m512>(b), as<__m512>(c)));
#elif defined(__FMA__)
    return as<FV>(_mm256_fmadd_ps(as<__m256>(a), as<__m256>(b), as<__m256>(c)));
#else
    // In doubles: the product is exact, and the sum is rounded to odd, so that rounding it again to float is that of the exact
    // sum. Source: Boldo and Melquiond, Emulation of FMA and correctly rounded sums, 2008.
    typedef double DV __attribute__((vector_size(8 * lanes)));
    typedef int64_t QV __attribute__((vector_size(8 * lanes)));
    const DV product = __builtin_convertvector(a, DV) * __builtin_convertvector(b, DV), term = __builtin_convertvector(c, DV);
    const DV sum = product + term, moved = sum - product;
    const DV lost = (product - (sum - moved)) + (term - moved);
    QV bits = as<QV>(sum);
    const QV even = (bits & 1) - 1, inexact = (lost > 0) | (lost < 0), outwards = ~((lost > 0) ^ (sum > 0));
    bits += even & inexact & ((outwards & 2) - 1);
    return __builtin_convertvector(as<DV>(bits), FV);
#endif
}

// a * b + c in products of floats alone: rounded once where that is fast.
inline FV fused(FV a, FV b, FV c) {
#if defined(__AVX512F__) || defined(__FMA__)
    return fma_of(a, b, c);
#else
    return a * b + c;
#endif
}

inline void store_f(float* to, FV v) { memcpy(to, &v, sizeof v); }

inline FV load_halves(const uint16_t* from) {
#if defined(__AVX512F__)
    // GCC 12 warns about the operation without a mask.
    return as<FV>(_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(__F16C__)
    return as<FV>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
    FV v;
    for (int i = 0; i < lanes; ++i) v[i] = half(from[i]);
    return v;
#endif
}

inline FV load_bf16s(const uint16_t* from) {
    return as<FV>(__builtin_convertvector(load<HV>(from), UV) << 16);
}

inline FV load_u8s(const uint8_t* from) {
#if defined(__AVX512F__)
    return to_float(as<IV>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))));
#elif defined(__AVX2__)
    return as<FV>(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)))));
#else
    FV v;
    for (int i = 0; i < lanes; ++i) v[i] = from[i];
    return v;
#endif
}

inline FV load_i8s(const int8_t* from) {
#if defined(__AVX512F__)
    return to_float(as<IV>(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))));
#elif defined(__AVX2__)
    return as<FV>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)))));
#else
    FV v;
    for (int i = 0; i < lanes; ++i) v[i] = from[i];
    return v;
#endif
}

inline float sum_of(FV v) {
#ifdef __AVX512F__
    typedef float Half __attribute__((vector_size(32)));
    Half lo, hi;
    memcpy(&lo, &v, 32), memcpy(&hi, reinterpret_cast<const char*>(&v) + 32, 32);
    return total(lo + hi);
#else
    return total(v);
#endif
}

inline FV max_of(FV a, FV b) { return a > b ? a : b; }

// Lane i of the result is lane i + by.
template <int BY, class V>
inline V turned(V v) {
    IV from;
    for (int i = 0; i < lanes; ++i) from[i] = (i + BY) % lanes;
    return __builtin_shuffle(v, from);
}

inline float largest(FV v) {
#if defined(__AVX2__)
    if constexpr (lanes == 16) v = max_of(v, turned<lanes / 2>(v));
    v = max_of(v, turned<4>(v));
    v = max_of(v, turned<2>(v));
    return max_of(v, turned<1>(v))[0];
#else
    float most = v[0];
    for (int i = 1; i < lanes; ++i) most = v[i] > most ? v[i] : most;
    return most;
#endif
}

inline int32_t sum_of(IV v) {
#if defined(__AVX2__)
    if constexpr (lanes == 16) v += turned<lanes / 2>(v);
    v += turned<4>(v);
    v += turned<2>(v);
    return (v + turned<1>(v))[0];
#else
    int32_t sum = 0;
    for (int i = 0; i < lanes; ++i) sum += v[i];
    return sum;
#endif
}

// exp within 2 ulp: 0 below about -87.7, infinity from about 88.4 on, NaN of NaN. Source: Cephes expf (argument reduction by
// ln 2, polynomial of degree 5), Moshier. The exponents -127 and 128, to which x is clamped, are those of 0 and infinity.
inline FV exp_of(FV x) {
    const FV low = splat_f(-88.0f), high = splat_f(89.0f);
    x = low > x ? low : x;
    x = high < x ? high : x;
    const FV magic = splat_f(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
    const FV n = x * 1.44269504088896341f + magic;
    const FV whole = n - magic;
    FV r = x - whole * 0.693359375f;
    r = r - whole * -2.12194440e-4f;
    FV p = splat_f(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    const FV y = p * (r * r) + r + 1.0f;
    const IV power = (as<IV>(n) - as<IV>(magic) + 127) << 23;
    return y * as<FV>(power);
}

// Sums of products of neighbouring bytes, unsigned times signed, as int16; the caller keeps them in range.
inline SV pairs(BV u, CV s) {
#if defined(__AVX512BW__)
    return as<SV>(_mm512_maddubs_epi16(as<__m512i>(u), as<__m512i>(s)));
#elif defined(__AVX2__)
    return as<SV>(_mm256_maddubs_epi16(as<__m256i>(u), as<__m256i>(s)));
#else
    const SV even = as<SV>(u) & 0xff, odd = as<SV>(as<WV>(u) >> 8);
    return even * (as<SV>(as<WV>(s) << 8) >> 8) + odd * (as<SV>(s) >> 8);
#endif
}

// As `pairs`, signed times signed, for |s| <= 127.
inline SV signed_pairs(CV w, CV s) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    const __m256i a = as<__m256i>(w);
    return as<SV>(_mm256_maddubs_epi16(_mm256_abs_epi8(a), _mm256_sign_epi8(as<__m256i>(s), a)));
#else
    const SV even = as<SV>(as<WV>(w) << 8) >> 8, odd = as<SV>(w) >> 8;
    return even * (as<SV>(as<WV>(s) << 8) >> 8) + odd * (as<SV>(s) >> 8);
#endif
}

// Sums of neighbouring int16 as int32.
inline IV fold(SV v) {
#if defined(__AVX512BW__)
    return as<IV>(_mm512_madd_epi16(as<__m512i>(v), _mm512_set1_epi16(1)));
#elif defined(__AVX2__)
    return as<IV>(_mm256_madd_epi16(as<__m256i>(v), _mm256_set1_epi16(1)));
#else
    return (as<IV>(as<UV>(v) << 16) >> 16) + (as<IV>(v) >> 16);
#endif
}

inline CV splat_4(const int8_t* x) { return as<CV>(splat_i(load<int32_t>(x))); }

inline void prefetch(const void* at) { __builtin_prefetch(at, 0, 3); }
// Lines that are not kept beyond the nearest cache leave the larger ones to code, activations and keys. That pays on AMD; on Intel's
// servers such lines come late: decoding a 1B model in 8 bits took 174 ms a token with them and 68 without (Xeon, family 6 model 207).
const bool keeps_none_pays = [] {
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_is("amd") != 0;
#else
    return false;
#endif
}();
// once: nobody reads it again soon.
inline void prefetch(const void* at, bool once) {
    if (once && keeps_none_pays)
        __builtin_prefetch(at, 0, 0);
    else
        __builtin_prefetch(at, 0, 3);
}

}  // namespace
