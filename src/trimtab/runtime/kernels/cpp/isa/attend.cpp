// Attention of a few queries over pages of keys and values, compiled once per instruction set.
#include <cmath>

#include "isa/softmax.h"

namespace trimtab::TRIMTAB_ISA {
namespace {

// Whether rows are read 2 * lanes elements at a time, even ones first, then odd ones: bf16 then takes one operation a register
// to become float. Queries are brought into that order before, and sums out of it afterwards.
template <Coding CODING, int HEAD>
constexpr bool paired = CODING == Coding::bf16 && HEAD > 0;

// Elements i .. i + lanes - 1 of a row in the order in which it is read.
template <Coding CODING, int HEAD>
inline FV load_row(const uint8_t* row, int64_t i) {
    if constexpr (CODING == Coding::f32) return load<FV>(reinterpret_cast<const float*>(row) + i);
    if constexpr (CODING == Coding::f16) return load_halves(reinterpret_cast<const uint16_t*>(row) + i);
    if constexpr (paired<CODING, HEAD>) {
        const UV both = load<UV>(row + i / (2 * lanes) * (4 * lanes));
        return as<FV>(i / lanes % 2 ? both & 0xffff0000u : both << 16);
    }
    return load_bf16s(reinterpret_cast<const uint16_t*>(row) + i);
}

// Place of element i in the order in which a row is read.
inline int64_t place_of(int64_t i) {
    const int64_t inside = i % (2 * lanes);
    return i - inside + inside % 2 * lanes + inside / 2;
}

// Keeps a value in its register, to be used several times: GCC would read it from memory each time.
inline void hold([[maybe_unused]] FV& v) {
#if defined(__AVX2__)
    asm("" : "+x"(v));
#endif
}

// out[j] = sum of the lanes of v[j], for j < 4, added in the same order by every instruction set of 8 lanes.
inline void store_sums(const FV* v, float* out) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    auto two = [](FV a, FV b) {  // of both halves: a0+a2, b0+b2, a1+a3, b1+b3
        const __m256 x = as<__m256>(a), y = as<__m256>(b);
        return as<__m256>(as<FV>(_mm256_unpacklo_ps(x, y)) + as<FV>(_mm256_unpackhi_ps(x, y)));
    };
    const __m256 x = two(v[0], v[1]), y = two(v[2], v[3]);
    const FV four = as<FV>(_mm256_shuffle_ps(x, y, 0x44)) + as<FV>(_mm256_shuffle_ps(x, y, 0xee));
    const __m256 both = as<__m256>(four);
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1)));
#elif defined(__AVX512F__)
    for (int j = 0; j < 4; ++j) out[j] = sum_of(v[j]);
#else
    for (int j = 0; j < 4; ++j)
        out[j] = ((v[j][0] + v[j][2]) + (v[j][1] + v[j][3])) + ((v[j][4] + v[j][6]) + (v[j][5] + v[j][7]));
#endif
}

// Products of Q queries with KEYS neighbouring keys; the sum of query n and key j goes to scores[n * block + j].
template <Coding CODING, int Q, int KEYS, int HEAD>
inline void products(const float* const* q, const uint8_t* k, int64_t row_bytes, int64_t head_dim, float* scores) {
    FV acc[Q][4] = {};
    auto step = [&](int64_t i) {
        FV query[Q];
        for (int n = 0; n < Q; ++n) {
            query[n] = load<FV>(q[n] + i);
            hold(query[n]);
        }
        for (int j = 0; j < KEYS; ++j) {
            const FV key = load_row<CODING, HEAD>(k + j * row_bytes, i);
            for (int n = 0; n < Q; ++n) {
                acc[n][j] += key * query[n];
                hold(acc[n][j]);
            }
        }
    };
    if constexpr (HEAD > 0) {
#pragma GCC unroll 16
        for (int64_t i = 0; i < HEAD; i += lanes) step(i);
    } else {
        for (int64_t i = 0; i < head_dim; i += lanes) step(i);
    }
    for (int n = 0; n < Q; ++n) {
        if constexpr (KEYS == 4) store_sums(acc[n], scores + n * block);
        else scores[n * block] = sum_of(acc[n][0]);
    }
}

// Raw scores of Q queries with `count` <= block keys: scores [Q, block]. The values of these keys, read next, are asked for.
template <Coding CODING, int Q, int HEAD>
__attribute__((noinline)) void score(const float* const* q, const uint8_t* k, const uint8_t* v, int64_t row_bytes, int64_t head_dim,
                                      int count, float* scores) {
    int s = 0;
    for (; s + 4 <= count; s += 4) {
        const uint8_t* row = k + s * row_bytes;
        for (int64_t ahead = 0; ahead < 4 * row_bytes; ahead += 64) {
            prefetch(row + 8 * row_bytes + ahead);
            prefetch(v + s * row_bytes + ahead);
        }
        products<CODING, Q, 4, HEAD>(q, row, row_bytes, head_dim, scores + s);
    }
    for (; s < count; ++s) products<CODING, Q, 1, HEAD>(q, k + s * row_bytes, row_bytes, head_dim, scores + s);
}

// out [Q, H] += weights [Q, block] times values, V registers of every query at a time. The keys at `next` are asked for.
template <Coding CODING, int Q, int V, int HEAD>
inline void weigh_columns(const float* weights, const uint8_t* v, int64_t row_bytes, int64_t head_dim, int64_t at, int count,
                          const uint8_t* next, float* out) {
    FV acc[Q][V];
    for (int n = 0; n < Q; ++n)
        for (int i = 0; i < V; ++i) acc[n][i] = load<FV>(out + n * head_dim + at + i * lanes);
    for (int s = 0; s < count; ++s) {
        const uint8_t* row = v + s * row_bytes;
        if (at == 0)
            for (int64_t line = 0; line < row_bytes; line += 64) prefetch(next + s * row_bytes + line);
        FV weight[Q];
        for (int n = 0; n < Q; ++n) {
            weight[n] = splat_f(weights[n * block + s]);
            hold(weight[n]);
        }
        for (int i = 0; i < V; ++i) {
            const FV value = load_row<CODING, HEAD>(row, at + i * lanes);
            for (int n = 0; n < Q; ++n) {
                acc[n][i] += value * weight[n];
                hold(acc[n][i]);
            }
        }
    }
    for (int n = 0; n < Q; ++n)
        for (int i = 0; i < V; ++i) store_f(out + n * head_dim + at + i * lanes, acc[n][i]);
}

template <Coding CODING, int Q, int HEAD>
void weigh(const float* weights, const uint8_t* v, int64_t row_bytes, int64_t head_dim, int count, const uint8_t* next,
           float* out) {
    int64_t at = 0;
    for (; at + 4 * lanes <= head_dim; at += 4 * lanes)
        weigh_columns<CODING, Q, 4, HEAD>(weights, v, row_bytes, head_dim, at, count, next, out);
    for (; at < head_dim; at += lanes) weigh_columns<CODING, Q, 1, HEAD>(weights, v, row_bytes, head_dim, at, count, next, out);
}

template <Coding CODING, int Q, bool UNIFIED, int HEAD>
void attend_some(const Attend& a, int first_query) {
    constexpr bool coded = CODING == Coding::ints;
    constexpr Coding READ = coded ? Coding::f32 : CODING;
    const int64_t head_dim = HEAD > 0 ? HEAD : a.pages.head_dim, row_bytes = head_dim * (READ == Coding::f32 ? 4 : 2);
    const int64_t *low = a.low + first_query, *high = a.high + first_query;
    float* out = a.out + first_query * head_dim;
    FV top[Q], weight[Q];
    float largest_score[Q], total_weight[Q];
    for (int n = 0; n < Q; ++n) top[n] = splat_f(none), weight[n] = FV{}, largest_score[n] = none, total_weight[n] = 0;
    for (int64_t i = 0; i < Q * head_dim; ++i) out[i] = 0;
    alignas(64) float scores[Q * block];
    const float* q[Q];
    for (int n = 0; n < Q; ++n) q[n] = a.q[first_query + n];
    alignas(64) float moved[paired<READ, HEAD> ? Q * HEAD : 1];
    if constexpr (paired<READ, HEAD>)
        for (int n = 0; n < Q; ++n) {
            for (int64_t i = 0; i < HEAD; ++i) moved[n * HEAD + place_of(i)] = q[n][i];
            q[n] = moved + n * HEAD;
        }
    alignas(64) float decoded[coded ? block * max_head_dim : 1];
    int64_t least = low[0], most = high[0], inner = low[0], outer = high[0];
    for (int n = 1; n < Q; ++n) {
        least = low[n] < least ? low[n] : least, inner = low[n] > inner ? low[n] : inner;
        most = high[n] > most ? high[n] : most, outer = high[n] < outer ? high[n] : outer;
    }
    const int64_t from = a.first > least ? a.first : least, to = a.last < most ? a.last : most;
    for (int64_t s = from; s < to;) {
        const int64_t page = s / a.pages.page, inside = s % a.pages.page;
        const int64_t left = a.pages.page - inside < to - s ? a.pages.page - inside : to - s;
        const int count = static_cast<int>(left < block ? left : block);
        const uint8_t *keys = a.pages.k[page] + inside * row_bytes, *values = a.pages.v[page] + inside * row_bytes;
        if constexpr (coded) {
            decode_rows(a.pages.k_grid[page], a.pages.k[page], head_dim, a.pages.group, inside, count, decoded);
            keys = values = reinterpret_cast<const uint8_t*>(decoded);
        }
        score<READ, Q, HEAD>(q, keys, values, row_bytes, head_dim, count, scores);
        float scale = a.scale;
        if (a.softcap > 0 || s < inner || s + count > outer || count % lanes) {
            // What the plain loops below do not know: a cap on the scores, keys a query does not see, lanes without a key.
            for (int n = 0; n < Q; ++n) hide(scores + n * block, s, count, a.scale, a.softcap, low[n], high[n]);
            scale = 1;
        }
        for (int n = 0; n < Q; ++n) {
            float* row = scores + n * block;
            if constexpr (UNIFIED) {
                weights_unified(row, count, scale, a.phi, top[n], weight[n]);
            } else {
                FV most_here = splat_f(none);
                for (int j = 0; j < count; j += lanes) most_here = max_of(load<FV>(row + j), most_here);
                const float peak = largest(most_here) * scale;
                if (peak > largest_score[n]) {
                    if (total_weight[n] > 0) {
                        const float by = std::exp(largest_score[n] - peak);
                        total_weight[n] *= by;
                        for (int64_t i = 0; i < head_dim; i += lanes)
                            store_f(out + n * head_dim + i, load<FV>(out + n * head_dim + i) * by);
                    }
                    largest_score[n] = peak;
                }
                total_weight[n] += sum_of(weights_online(row, count, scale, largest_score[n] == none ? 0.0f : largest_score[n]));
            }
        }
        if constexpr (coded) decode_rows(a.pages.v_grid[page], a.pages.v[page], head_dim, a.pages.group, inside, count, decoded);
        weigh<READ, Q, HEAD>(scores, values, row_bytes, head_dim, count, coded ? keys : keys + count * row_bytes, out);
        s += count;
    }
    if constexpr (paired<READ, HEAD>)
        for (int n = 0; n < Q; ++n) {
            memcpy(moved, out + n * HEAD, sizeof(float) * HEAD);
            for (int64_t i = 0; i < HEAD; ++i) out[n * HEAD + i] = moved[place_of(i)];
        }
    for (int n = 0; n < Q; ++n) {
        a.largest[first_query + n] = UNIFIED ? largest(top[n]) : largest_score[n];
        a.weight[first_query + n] = UNIFIED ? sum_of(weight[n]) : total_weight[n];
    }
}

template <Coding CODING, int Q, bool UNIFIED>
inline void attend_sized(const Attend& a, int first_query) {
    if constexpr (CODING == Coding::f16) return attend_some<CODING, Q, UNIFIED, 0>(a, first_query);
    switch (a.pages.head_dim) {  // the usual sizes, unrolled
        case 64: return attend_some<CODING, Q, UNIFIED, 64>(a, first_query);
        case 128: return attend_some<CODING, Q, UNIFIED, 128>(a, first_query);
        default: return attend_some<CODING, Q, UNIFIED, 0>(a, first_query);
    }
}

template <Coding CODING, int Q>
inline void attend_as(const Attend& a, int first_query) {
    return a.unified ? attend_sized<CODING, Q, true>(a, first_query) : attend_sized<CODING, Q, false>(a, first_query);
}

template <Coding CODING>
void attend_coding(const Attend& a) {
    int n = 0;
    for (; n + 3 <= a.queries; n += 3) attend_as<CODING, 3>(a, n);
    if (a.queries - n == 2) attend_as<CODING, 2>(a, n);
    if (a.queries - n == 1) attend_as<CODING, 1>(a, n);
}

}  // namespace

void attend_many(const Attend& a);  // attend_many.cpp

void attend(const Attend& a) {
    if (a.turned && a.pages.head_dim <= many_head_dim) return attend_many(a);
    switch (a.pages.coding) {
        case Coding::f32: return attend_coding<Coding::f32>(a);
        case Coding::f16: return attend_coding<Coding::f16>(a);
        case Coding::ints: return attend_coding<Coding::ints>(a);
        default: return attend_coding<Coding::bf16>(a);
    }
}

void encode_grid(const float* x, int64_t count, int64_t group, uint8_t* codes, uint16_t* scale, uint16_t* minimum) {
    for (int64_t first = 0, g = 0; first < count; first += group, ++g) {
        const int64_t end = first + group < count ? first + group : count;
        float least = x[first], most = x[first];
        for (int64_t i = first; i < end; ++i) least = x[i] < least ? x[i] : least, most = x[i] > most ? x[i] : most;
        minimum[g] = half_bits(least);
        const float base = half(minimum[g]);
        scale[g] = half_bits((most - base) / 255.0f);
        const float step = half(scale[g]), by = step > 0 ? 1.0f / step : 0.0f;
        for (int64_t i = first; i < end; ++i) {
            const float code = (x[i] - base) * by + 0.5f;
            codes[i] = static_cast<uint8_t>(code > 255.0f ? 255.0f : code > 0 ? code : 0.0f);
        }
    }
}

void encode(Coding coding, const float* x, int64_t count, uint8_t* out) {
    if (coding == Coding::f32) {
        memcpy(out, x, static_cast<size_t>(count) * 4);
        return;
    }
    for (int64_t i = 0; i < count; ++i) {
        uint16_t bits;
        if (coding == Coding::bf16) {
            uint32_t word;
            memcpy(&word, x + i, 4);
            const bool nan = (word & 0x7fffffffu) > 0x7f800000u;
            bits = static_cast<uint16_t>(nan ? (word >> 16) | 0x40 : (word + 0x7fff + ((word >> 16) & 1)) >> 16);
        } else {
            bits = half_bits(x[i]);
        }
        memcpy(out + 2 * i, &bits, 2);
    }
}

void rotate(float* x, const float* cos, const float* sin, int64_t half) {
    for (int64_t i = 0; i < half; ++i) {
        const float a = x[i], b = x[i + half];
        x[i] = a * cos[i] - b * sin[i];
        x[i + half] = b * cos[i] + a * sin[i];
    }
}

}  // namespace trimtab::TRIMTAB_ISA
