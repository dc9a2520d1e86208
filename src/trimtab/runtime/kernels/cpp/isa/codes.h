// Raw scores with keys of codes that lie channel after channel, and sums of values of codes. Where an instruction set multiplies
// pairs of 16-bit integers, codes of 2 and 4 bits are such integers: half the products that floats take. What they are multiplied
// with, a scaled query or scaled weights, is then rounded to 2^-16 of its largest element, which moves a result by far less than
// the codes' own steps do.
#pragma once
#include "isa/scores.h"

namespace trimtab::TRIMTAB_ISA {
namespace {

// Queries as they are multiplied with the codes of one group of tokens.
template <int Q>
struct Scaled {
    alignas(64) float q[Q][max_head_dim];  // times the scales of their channels
    alignas(16) float start[4];            // times the minima, added up
#if defined(__AVX512VNNI__)
    alignas(64) int32_t pairs[Q][max_head_dim / 2];  // times the scales in 16-bit integers, two channels each
    alignas(16) float step[4];                       // what a unit of `pairs` stands for
#endif
};

// Weights as they are multiplied with the codes of one group of elements.
template <int Q>
struct Weights {
    alignas(64) float by[Q][block];  // times the scales of their tokens
    alignas(16) float base[4];       // times the minima, added up
#if defined(__AVX512VNNI__)
    alignas(64) int32_t pairs[Q][block / 2];  // times the scales in 16-bit integers, two tokens each
    alignas(16) float step[4];                // what a unit of `pairs` stands for
#endif
};

#if defined(__AVX512VNNI__)

// Sums of both products of 16-bit integers of a lane.
inline IV add_pairs(IV sum, IV a, IV b) { return as<IV>(_mm512_dpwssd_epi32(as<__m512i>(sum), as<__m512i>(a), as<__m512i>(b))); }

// Rounds 16 floats times `by` to integers of 16 bits.
inline __m256i narrow(FV x, FV by) {
    const FV magic = splat_f(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer, which stands in the lowest bits
    return _mm512_maskz_cvtepi32_epi16(0xffff, as<__m512i>(fma_of(x, by, magic)));
}

// Scales so that the largest of each of 4 vectors becomes 32767: what to multiply by, and what a unit stands for afterwards.
inline void units_of(const FV* most, float* by, float* step) {
    alignas(16) float peak[4];
    store_folded(most, peak, [](auto a, auto b) { return a > b ? a : b; });
    typedef float Quarter __attribute__((vector_size(16)));
    const Quarter peaks = load<Quarter>(peak), zero = {}, factor = peaks > zero ? 32767.0f / peaks : zero, unit = peaks * (1.0f / 32767.0f);
    memcpy(by, &factor, sizeof factor), memcpy(step, &unit, sizeof unit);
}

// Place of channels in a word of codes: both halves of a word yield a pair.
template <int BITS>
inline __m256i channel_pairs() {
    return BITS == 2 ? _mm256_setr_epi16(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15)
                     : _mm256_setr_epi16(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
}

// Scores of TILES * 16 tokens that share their scales.
template <int BITS, int Q, int TILES>
inline void score_pairs(const PageForm& form, const uint8_t* tiles, const Scaled<Q>& q, float* scores) {
    constexpr int half = 16 / BITS;
    constexpr uint32_t mask = (1u << BITS) - 1;
    const int64_t bytes = form.row_bytes(), tile_bytes = tile_tokens * bytes, words = bytes / 4;
    IV acc[chains * Q * TILES];
    each<chains * Q * TILES>([&](auto i) TRIMTAB_INLINE { acc[i] = IV{}; });
    for (int64_t w = 0; w < words; ++w) {
        UV word[TILES];
        each<TILES>([&](auto p) TRIMTAB_INLINE { word[p] = load<UV>(tiles + p * tile_bytes + 64 * w); });
        each<half>([&](auto i) TRIMTAB_INLINE {
            IV code[TILES];
            each<TILES>([&](auto p) TRIMTAB_INLINE { code[p] = as<IV>((word[p] >> (BITS * i)) & (mask | mask << 16)); });
            each<Q>([&](auto n) TRIMTAB_INLINE {
                FV pair = as<FV>(splat_i(q.pairs[n][w * half + i]));
                hold(pair);
                each<TILES>([&](auto p) TRIMTAB_INLINE {
                    constexpr int k = (decltype(i)::value % chains * Q + decltype(n)::value) * TILES + decltype(p)::value;
                    acc[k] = add_pairs(acc[k], code[p], as<IV>(pair));
                });
            });
        });
    }
    if (bytes % 4) score_codes<BITS, Q, TILES, true>(form, tiles, q.q, q.start, scores);
    each<Q * TILES>([&](auto i) TRIMTAB_INLINE {
        constexpr int n = decltype(i)::value / TILES;
        float* at = scores + n * score_stride + i % TILES * lanes;
        store_f(at, fma_of(to_float(acc[i] + acc[Q * TILES + i]), splat_f(q.step[n]), bytes % 4 ? load<FV>(at) : splat_f(q.start[n])));
    });
}

// Codes of two neighbouring tokens' V * 16 elements of a row, a pair in each lane.
template <int BITS, int V>
TRIMTAB_INLINE inline void row_pairs(const uint8_t* one, const uint8_t* other, IV* out) {
    constexpr int bytes = 2 * BITS * V, shared = 16 / BITS;  // lanes whose pairs come out of the same 32 bits
    constexpr uint32_t mask = (1u << BITS) - 1;
    auto row = [](const uint8_t* from) TRIMTAB_INLINE {
        if constexpr (bytes == 4) return _mm_cvtsi32_si128(load<int32_t>(from));
        else if constexpr (bytes == 8) return _mm_cvtsi64_si128(load<int64_t>(from));
        else return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    };
    const __m128i a = row(one), b = row(other);
    each<V>([&](auto v) TRIMTAB_INLINE {
        constexpr bool upper = bytes == 16 && decltype(v)::value == 1;
        const __m128i both = upper ? _mm_unpackhi_epi16(a, b) : _mm_unpacklo_epi16(a, b);
        IV from, by;
        for (int i = 0; i < lanes; ++i) from[i] = i / shared + (bytes == 8 ? v * lanes / shared : 0), by[i] = i % shared * BITS;
        const __m512i spread = _mm512_maskz_permutexvar_epi32(0xffff, as<__m512i>(from), _mm512_castsi128_si512(both));
        out[v] = as<IV>((as<UV>(spread) >> as<UV>(by)) & (mask | mask << 16));
    });
}

// out [Q, V registers] += weights of `count` tokens times codes; weights in pairs of tokens, whose unit stands for `step`.
template <int BITS, int Q, int V>
inline void weigh_pairs(const int32_t (*weights)[block / 2], const float* step, const float* base, const uint8_t* rows, int64_t row_bytes,
                        int64_t head_dim, int count, int64_t pace, Ahead& ahead, float* out) {
    IV acc[chains * Q * V];
    each<chains * Q * V>([&](auto i) TRIMTAB_INLINE { acc[i] = IV{}; });
    auto add = [&](int64_t pair, const uint8_t* row, const uint8_t* next, auto chain) TRIMTAB_INLINE {
        IV code[V];
        row_pairs<BITS, V>(row, next, code);
        each<Q>([&](auto n) TRIMTAB_INLINE {
            FV weight = as<FV>(splat_i(weights[n][pair]));
            hold(weight);
            each<V>([&](auto i) TRIMTAB_INLINE {
                constexpr int k = (decltype(chain)::value * Q + decltype(n)::value) * V + decltype(i)::value;
                acc[k] = add_pairs(acc[k], code[i], as<IV>(weight));
            });
        });
    };
    int64_t pair = 0;
    for (; 2 * pair + 4 <= count; pair += 2, rows += 4 * row_bytes) {
        if (pair % 8 == 0) ahead.some(4 * pace);
        each<2>([&](auto i) TRIMTAB_INLINE { add(pair + i, rows + 2 * i * row_bytes, rows + (2 * i + 1) * row_bytes, i); });
    }
    for (; 2 * pair < count; ++pair, rows += 2 * row_bytes)  // the last token may have no neighbour
        add(pair, rows, 2 * pair + 1 < count ? rows + row_bytes : rows, std::integral_constant<int, 0>{});
    each<Q * V>([&](auto k) TRIMTAB_INLINE {
        constexpr int n = decltype(k)::value / V;
        float* at = out + n * head_dim + k % V * lanes;
        store_f(at, fma_of(to_float(acc[k] + acc[Q * V + k]), splat_f(step[n]), load<FV>(at) + splat_f(base[n])));
    });
}

#endif

// Q <= 3 queries times the scales of their channels, and times the minima, added up.
template <int BITS, int Q>
TRIMTAB_INLINE inline void scale_query(const float* const* q, const uint16_t* scale, const uint16_t* minimum, int64_t width, Scaled<Q>& out) {
    FV sum[4], most[4];
    each<4>([&](auto n) TRIMTAB_INLINE { sum[n] = most[n] = FV{}; });
    for (int64_t c = 0; c < width; c += lanes) {
        const FV s = first_of(scale + c, static_cast<int>(width - c)), m = first_of(minimum + c, static_cast<int>(width - c));
        each<Q>([&](auto n) TRIMTAB_INLINE {
            const FV x = load<FV>(q[n] + c), by = x * s;
            store_f(out.q[n] + c, by);
            most[n] = max_of(as<FV>(as<UV>(by) & 0x7fffffffu), most[n]);
            sum[n] = multiply_add(x, m, sum[n]);
        });
    }
    store_sums(sum, out.start);
#if defined(__AVX512VNNI__)
    if constexpr (BITS < 8) {
        alignas(16) float by[4];
        units_of(most, by, out.step);
        const __m256i place = channel_pairs<BITS>();
        for (int64_t c = 0; c < width; c += lanes)
            each<Q>([&](auto n) TRIMTAB_INLINE {
                const __m256i pairs = _mm256_maskz_permutexvar_epi16(0xffff, place, narrow(load<FV>(out.q[n] + c), splat_f(by[n])));
                _mm256_store_si256(reinterpret_cast<__m256i*>(out.pairs[n] + c / 2), pairs);
            });
    }
#endif
}

#if defined(__AVX512VNNI__)
// The same of the usual width, for pairs alone: what they are made of stays in registers.
constexpr int usual = 64;
template <int BITS, int Q>
TRIMTAB_INLINE inline void pair_query(const float* const* q, const uint16_t* scale, const uint16_t* minimum, Scaled<Q>& out) {
    constexpr int parts = usual / lanes;
    FV by[Q * parts], sum[4], most[4];
    each<4>([&](auto n) TRIMTAB_INLINE { sum[n] = most[n] = FV{}; });
    each<parts>([&](auto c) TRIMTAB_INLINE {
        const FV s = load_halves(scale + c * lanes), m = load_halves(minimum + c * lanes);
        each<Q>([&](auto n) TRIMTAB_INLINE {
            constexpr int k = decltype(n)::value * parts + decltype(c)::value;
            const FV x = load<FV>(q[n] + c * lanes);
            by[k] = x * s;
            most[n] = max_of(as<FV>(as<UV>(by[k]) & 0x7fffffffu), most[n]);
            sum[n] = fma_of(x, m, sum[n]);
        });
    });
    alignas(16) float factor[4];
    units_of(most, factor, out.step);
    store_sums(sum, out.start);
    const __m256i place = channel_pairs<BITS>();
    each<Q * parts>([&](auto k) TRIMTAB_INLINE {
        const __m256i pairs = _mm256_maskz_permutexvar_epi16(0xffff, place, narrow(by[k], splat_f(factor[k / parts])));
        _mm256_store_si256(reinterpret_cast<__m256i*>(out.pairs[k / parts] + k % parts * lanes / 2), pairs);
    });
}

// Weights of as many tokens, alike.
template <int Q>
TRIMTAB_INLINE inline void pair_weights(const float* weights, const uint16_t* scale, const uint16_t* minimum, Weights<Q>& out) {
    constexpr int parts = usual / lanes;
    FV by[Q * parts], base[4], most[4];
    each<4>([&](auto n) TRIMTAB_INLINE { base[n] = most[n] = FV{}; });
    each<parts>([&](auto s) TRIMTAB_INLINE {
        const FV step = load_halves(scale + s * lanes), least = load_halves(minimum + s * lanes);
        each<Q>([&](auto n) TRIMTAB_INLINE {
            constexpr int k = decltype(n)::value * parts + decltype(s)::value;
            const FV weight = load<FV>(weights + n * score_stride + s * lanes);
            by[k] = weight * step;
            most[n] = max_of(by[k], most[n]);
            base[n] = fma_of(weight, least, base[n]);
        });
    });
    alignas(16) float factor[4];
    units_of(most, factor, out.step);
    store_sums(base, out.base);
    each<Q * parts>([&](auto k) TRIMTAB_INLINE {
        _mm256_store_si256(reinterpret_cast<__m256i*>(out.pairs[k / parts] + k % parts * lanes / 2), narrow(by[k], splat_f(factor[k / parts])));
    });
}
#endif

template <int BITS, int Q>
__attribute__((noinline)) void scale_queries(const PageForm& form, const float* const* q, const uint8_t* page, int64_t inside, int count,
                                              Scaled<Q>* scaled) {
    const uint16_t *scale = reinterpret_cast<const uint16_t*>(form.scales(page)), *minimum = scale + form.page / form.group * form.width;
    const int64_t first = inside / form.group, last = (inside + count - 1) / form.group;
#if defined(__AVX512VNNI__)
    if (BITS < 8 && form.width == usual) {
        for (int64_t g = first; g <= last; ++g) pair_query<BITS, Q>(q, scale + g * usual, minimum + g * usual, scaled[g - first]);
        return;
    }
#endif
    for (int64_t g = first; g <= last; ++g)
        scale_query<BITS, Q>(q, scale + g * form.width, minimum + g * form.width, form.width, scaled[g - first]);
}

// Raw scores with keys of a tiled grid: a query times the scales of its channels, times the codes; the minima are one number for
// all tokens of a group. Source: Liu et al., KIVI, arXiv 2402.02750.
template <int BITS, int Q>
__attribute__((noinline)) void score_coded_tiles(const PageForm& form, const Scaled<Q>* scaled, const uint8_t* page, int64_t inside,
                                                  int count, int64_t pace, Ahead& ahead, float* scores) {
    const int64_t first = inside / form.group, last = (inside + count - 1) / form.group;
    for (int64_t g = first, t = 0; g <= last; ++g) {
        const int64_t border = (g + 1) * form.group - inside, end = border < count ? border : count;
        const Scaled<Q>& by = scaled[g - first];
        for (int tiles; t < end; t += tiles * tile_tokens) {
            tiles = chains > 1 && t + tile_tokens < end ? 2 : 1;
            ahead.some(tiles * pace);
            const uint8_t* at = page + (inside + t) * form.row_bytes();
#if defined(__AVX512VNNI__)
            if constexpr (BITS < 8) {
                if (tiles == 2) score_pairs<BITS, Q, 2>(form, at, by, scores + t);
                else score_pairs<BITS, Q, 1>(form, at, by, scores + t);
                continue;
            }
#endif
            if (tiles == 2) score_codes<BITS, Q, 2>(form, at, by.q, by.start, scores + t);
            else score_codes<BITS, Q, 1>(form, at, by.q, by.start, scores + t);
        }
    }
}

// out [Q, H] += weights times values of a grid by rows: weights times scales, times the codes; the weighted minima are one number
// for all elements of a group.
template <int BITS, int Q, int V>
inline void weigh_codes(const float (*scaled)[block], const float* base, const uint8_t* rows, int64_t row_bytes, int64_t head_dim, int count,
                        int64_t pace, Ahead& ahead, float* out) {
    FV acc[chains * Q * V];
    each<chains * Q * V>([&](auto k) TRIMTAB_INLINE {
        constexpr int i = decltype(k)::value, n = i % (Q * V) / V;
        acc[i] = i < Q * V ? load<FV>(out + n * head_dim + i % V * lanes) + splat_f(base[n]) : FV{};
    });
    auto step = [&](int s, auto chain) TRIMTAB_INLINE {
        FV weight[Q];
        each<Q>([&](auto n) TRIMTAB_INLINE {
            weight[n] = splat_f(scaled[n][s]);
            hold(weight[n]);
        });
        each<V>([&](auto i) TRIMTAB_INLINE {
            const FV code = row_codes<BITS>(rows + s * row_bytes + i * lanes * BITS / 8);
            each<Q>([&](auto n) TRIMTAB_INLINE {
                constexpr int k = (decltype(chain)::value % chains * Q + decltype(n)::value) * V + decltype(i)::value;
                acc[k] = multiply_add(code, weight[n], acc[k]);
            });
        });
    };
    int s = 0;
    for (; s + 4 <= count; s += 4) {
        ahead.some(pace);
        each<4>([&](auto i) TRIMTAB_INLINE { step(s + i, i); });
    }
    for (; s < count; ++s) step(s, std::integral_constant<int, 0>{});
    each<Q * V>([&](auto k) TRIMTAB_INLINE {
        constexpr int i = decltype(k)::value;
        FV sum = acc[i];
        if constexpr (chains == 2) sum += acc[Q * V + i];
        store_f(out + i / V * head_dim + i % V * lanes, sum);
    });
}

template <int BITS, int Q>
TRIMTAB_INLINE inline void scale_weights(const float* weights, const uint16_t* scale, const uint16_t* minimum, int count, Weights<Q>& out) {
    FV base[4], most[4];
    each<4>([&](auto n) TRIMTAB_INLINE { base[n] = most[n] = FV{}; });
    for (int s = 0; s < count; s += lanes) {
        const FV step = first_of(scale + s, count - s), least = first_of(minimum + s, count - s);
        each<Q>([&](auto n) TRIMTAB_INLINE {
            const FV weight = first_of(weights + n * score_stride + s, count - s), by = weight * step;
            store_f(out.by[n] + s, by);
            most[n] = max_of(by, most[n]);
            base[n] = multiply_add(weight, least, base[n]);
        });
    }
    store_sums(base, out.base);
#if defined(__AVX512VNNI__)
    if constexpr (BITS < 8) {
        alignas(16) float by[4];
        units_of(most, by, out.step);
        for (int s = 0; s < count; s += lanes)
            each<Q>([&](auto n) TRIMTAB_INLINE {
                _mm256_store_si256(reinterpret_cast<__m256i*>(out.pairs[n] + s / 2), narrow(load<FV>(out.by[n] + s), splat_f(by[n])));
            });
    }
#endif
}

// out [Q, V registers] += weights times codes.
template <int BITS, int Q, int V>
TRIMTAB_INLINE inline void weigh_group(const Weights<Q>& weights, const uint8_t* rows, int64_t row_bytes, int64_t head_dim, int count,
                                       int64_t pace, Ahead& ahead, float* out) {
#if defined(__AVX512VNNI__)
    if constexpr (BITS < 8) {
        weigh_pairs<BITS, Q, V>(weights.pairs, weights.step, weights.base, rows, row_bytes, head_dim, count, pace, ahead, out);
        return;
    }
#endif
    weigh_codes<BITS, Q, V>(weights.by, weights.base, rows, row_bytes, head_dim, count, pace, ahead, out);
}

template <int BITS, int Q>
__attribute__((noinline)) void weigh_coded_rows(const PageForm& form, const float* weights, const uint8_t* page, int64_t inside,
                                                 int count, int64_t pace, Ahead& ahead, float* out) {
    const uint16_t *scale = reinterpret_cast<const uint16_t*>(form.scales(page)) + inside, *minimum = scale + form.groups() * form.page;
    const int64_t row_bytes = form.row_bytes(), groups = form.groups();
    constexpr int together = 4;  // groups whose weights are scaled first: the steps of one need not wait for those of another
    Weights<Q> scaled[together];
    for (int64_t some = 0; some < groups; some += together) {
        const int64_t last = some + together < groups ? some + together : groups;
        for (int64_t g = some; g < last; ++g) {
#if defined(__AVX512VNNI__)
            if (BITS < 8 && count == usual) {
                pair_weights<Q>(weights, scale + g * form.page, minimum + g * form.page, scaled[g - some]);
                continue;
            }
#endif
            scale_weights<BITS, Q>(weights, scale + g * form.page, minimum + g * form.page, count, scaled[g - some]);
        }
        for (int64_t g = some; g < last; ++g) {
            int64_t at = g * form.group;
            const int64_t end = at + form.group < form.width ? at + form.group : form.width;
            while (at < end) {
                const uint8_t* rows = page + inside * row_bytes + at * BITS / 8;
                const int64_t lines = at ? 0 : pace;
                const Weights<Q>& by = scaled[g - some];
                if (at + 2 * lanes <= end) {
                    weigh_group<BITS, Q, 2>(by, rows, row_bytes, form.width, count, lines, ahead, out + at);
                    at += 2 * lanes;
                } else {
                    weigh_group<BITS, Q, 1>(by, rows, row_bytes, form.width, count, lines, ahead, out + at);
                    at += lanes;
                }
            }
        }
    }
}

}  // namespace
}  // namespace trimtab::TRIMTAB_ISA
