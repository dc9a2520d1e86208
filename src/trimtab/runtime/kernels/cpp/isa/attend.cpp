// Attention of a few queries over pages of keys and values, compiled once per instruction set.
#include <cmath>
#include <limits>

#include "isa/simd.h"
#include "native/native.h"

namespace trimtab::TRIMTAB_ISA {
namespace {

constexpr int block = 64;  // keys scored before their values are read
constexpr float none = -std::numeric_limits<float>::infinity();

template <Coding CODING>
inline FV load_row(const uint8_t* row, int64_t i) {
    if constexpr (CODING == Coding::f32) return load<FV>(reinterpret_cast<const float*>(row) + i);
    if constexpr (CODING == Coding::f16) return load_halves(reinterpret_cast<const uint16_t*>(row) + i);
    return load_bf16s(reinterpret_cast<const uint16_t*>(row) + i);
}

// Lane i = sum of the lanes of v[i].
inline FV sums_of(const FV* v) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    auto two = [](FV a, FV b) {  // of both halves: a0+a2, b0+b2, a1+a3, b1+b3
        const __m256 x = as<__m256>(a), y = as<__m256>(b);
        return as<FV>(_mm256_unpacklo_ps(x, y)) + as<FV>(_mm256_unpackhi_ps(x, y));
    };
    auto four = [&](FV a, FV b, FV c, FV d) {
        const __m256 x = as<__m256>(two(a, b)), y = as<__m256>(two(c, d));
        return as<FV>(_mm256_shuffle_ps(x, y, 0x44)) + as<FV>(_mm256_shuffle_ps(x, y, 0xee));
    };
    const __m256 a = as<__m256>(four(v[0], v[1], v[2], v[3])), b = as<__m256>(four(v[4], v[5], v[6], v[7]));
    return as<FV>(_mm256_permute2f128_ps(a, b, 0x20)) + as<FV>(_mm256_permute2f128_ps(a, b, 0x31));
#else
    FV r;
    for (int i = 0; i < lanes; ++i) r[i] = sum_of(v[i]);
    return r;
#endif
}

// Products of Q queries with KEYS neighbouring keys, not yet summed over the lanes.
template <Coding CODING, int Q, int KEYS>
inline void products(const float* const* q, const uint8_t* k, int64_t row_bytes, int64_t head_dim, FV (*sums)[lanes], int at) {
    FV acc[KEYS][Q] = {};
    for (int64_t i = 0; i < head_dim; i += lanes) {
        FV query[Q];
        for (int n = 0; n < Q; ++n) query[n] = load<FV>(q[n] + i);
        for (int j = 0; j < KEYS; ++j) {
            const FV key = load_row<CODING>(k + j * row_bytes, i);
            for (int n = 0; n < Q; ++n) acc[j][n] += key * query[n];
        }
    }
    for (int j = 0; j < KEYS; ++j)
        for (int n = 0; n < Q; ++n) sums[n][at + j] = acc[j][n];
}

inline FV capped(FV x, float softcap) {
    if (softcap <= 0) return x;
    const FV e = exp_of(x * (2.0f / softcap));
    return (1.0f - 2.0f / (e + 1.0f)) * softcap;
}

// What the keys of one block are to each query.
struct Block {
    const float* const* q;
    const uint8_t* k;
    int64_t row_bytes, head_dim, first;  // first: index of the first key
    int count;
    const int64_t *low, *high;
    float scale, softcap, phi;
};

// Scores of Q queries with the keys of a block into scores [Q, block], or with UNIFIED their exp(score - phi): the next keys
// are multiplied while these are exponentiated, because nothing waits for a maximum. top: largest score by lane.
template <Coding CODING, int Q, bool UNIFIED>
inline void score(const Block& b, bool whole, float* scores, FV* top, FV* weight) {
    for (int s = 0; s < b.count; s += lanes) {
        FV sums[Q][lanes];
        const uint8_t* row = b.k + s * b.row_bytes;
        if (b.count - s >= lanes) {
            for (int j = 0; j < lanes; j += 2) {
                for (int64_t ahead = 0; ahead < 2 * b.row_bytes; ahead += 64) prefetch(row + (j + lanes) * b.row_bytes + ahead);
                products<CODING, Q, 2>(b.q, row + j * b.row_bytes, b.row_bytes, b.head_dim, sums, j);
            }
        } else {
            for (int n = 0; n < Q; ++n)
                for (int j = 0; j < lanes; ++j) sums[n][j] = FV{};
            for (int j = 0; j < b.count - s; ++j)
                products<CODING, Q, 1>(b.q, row + j * b.row_bytes, b.row_bytes, b.head_dim, sums, j);
        }
        for (int n = 0; n < Q; ++n) {
            FV x = capped(sums_of(sums[n]) * b.scale, b.softcap);
            if (!whole) {
                const int64_t from = b.low[n] - b.first - s, to = (b.high[n] - b.first < b.count ? b.high[n] - b.first : b.count) - s;
                for (int j = 0; j < lanes; ++j)
                    if (j < from || j >= to) x[j] = none;
            }
            top[n] = max_of(x, top[n]);
            if constexpr (UNIFIED) {
                x = exp_of(x - b.phi);
                weight[n] += x;
            }
            store_f(scores + n * block + s, x);
        }
    }
}

// out [Q, H] += weights [Q, block] times values, V registers of every query at a time.
template <Coding CODING, int Q, int V>
inline void weigh_columns(const float* weights, const uint8_t* v, int64_t row_bytes, int64_t head_dim, int64_t at, int count,
                          float* out) {
    FV acc[Q][V];
    for (int n = 0; n < Q; ++n)
        for (int i = 0; i < V; ++i) acc[n][i] = load<FV>(out + n * head_dim + at + i * lanes);
    for (int s = 0; s < count; ++s) {
        const uint8_t* row = v + s * row_bytes;
        for (int i = 0; i < V; ++i) {
            const FV value = load_row<CODING>(row, at + i * lanes);
            for (int n = 0; n < Q; ++n) acc[n][i] += value * weights[n * block + s];
        }
    }
    for (int n = 0; n < Q; ++n)
        for (int i = 0; i < V; ++i) store_f(out + n * head_dim + at + i * lanes, acc[n][i]);
}

template <Coding CODING, int Q>
void weigh(const float* weights, const uint8_t* v, int64_t row_bytes, int64_t head_dim, int count, float* out) {
    int64_t at = 0;
    for (; at + 4 * lanes <= head_dim; at += 4 * lanes)
        weigh_columns<CODING, Q, 4>(weights, v, row_bytes, head_dim, at, count, out);
    for (; at < head_dim; at += lanes) weigh_columns<CODING, Q, 1>(weights, v, row_bytes, head_dim, at, count, out);
}

// `count` rows of an integer page from token `first` on as floats [count, H].
void decode_rows(const Grid& grid, const uint8_t* codes, int64_t head_dim, int64_t group, int64_t first, int count, float* out) {
    const int64_t groups = (head_dim + group - 1) / group;
    for (int s = 0; s < count; ++s) {
        const uint8_t* row = codes + (first + s) * head_dim;
        for (int64_t g = 0; g < groups; ++g) {
            const float scale = half(grid.scale[(first + s) * groups + g]), minimum = half(grid.minimum[(first + s) * groups + g]);
            const int64_t end = (g + 1) * group < head_dim ? (g + 1) * group : head_dim;
            int64_t i = g * group;
            for (; i + lanes <= end; i += lanes) store_f(out + s * head_dim + i, load_u8s(row + i) * scale + minimum);
            for (; i < end; ++i) out[s * head_dim + i] = static_cast<float>(row[i]) * scale + minimum;
        }
    }
}

template <Coding CODING, int Q, bool UNIFIED>
void attend_some(const Attend& a, int first_query) {
    constexpr bool coded = CODING == Coding::ints;
    constexpr Coding READ = coded ? Coding::f32 : CODING;
    const int64_t head_dim = a.pages.head_dim, row_bytes = head_dim * (READ == Coding::f32 ? 4 : 2);
    const int64_t *low = a.low + first_query, *high = a.high + first_query;
    float* out = a.out + first_query * head_dim;
    FV top[Q], weight[Q];
    float largest_score[Q], total_weight[Q];
    for (int n = 0; n < Q; ++n) top[n] = splat_f(none), weight[n] = FV{}, largest_score[n] = none, total_weight[n] = 0;
    for (int64_t i = 0; i < Q * head_dim; ++i) out[i] = 0;
    alignas(64) float scores[Q * block];
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
        const Block b{a.q + first_query, keys, row_bytes, head_dim, s, count, low, high, a.scale, a.softcap, a.phi};
        const bool whole = s >= inner && s + count <= outer && count % lanes == 0;
        if constexpr (UNIFIED) {
            score<READ, Q, true>(b, whole, scores, top, weight);
        } else {
            for (int n = 0; n < Q; ++n) top[n] = splat_f(none);
            score<READ, Q, false>(b, whole, scores, top, weight);
            for (int n = 0; n < Q; ++n) {
                float* row = scores + n * block;
                const float peak = largest(top[n]);
                if (peak > largest_score[n]) {
                    if (total_weight[n] > 0) {
                        const float by = std::exp(largest_score[n] - peak);
                        total_weight[n] *= by;
                        for (int64_t i = 0; i < head_dim; i += lanes)
                            store_f(out + n * head_dim + i, load<FV>(out + n * head_dim + i) * by);
                    }
                    largest_score[n] = peak;
                }
                const float shift = largest_score[n] == none ? 0.0f : largest_score[n];
                FV sum = {};
                for (int j = 0; j < count; j += lanes) {
                    const FV p = exp_of(load<FV>(row + j) - shift);
                    sum += p;
                    store_f(row + j, p);
                }
                total_weight[n] += sum_of(sum);
            }
        }
        if constexpr (coded) decode_rows(a.pages.v_grid[page], a.pages.v[page], head_dim, a.pages.group, inside, count, decoded);
        weigh<READ, Q>(scores, values, row_bytes, head_dim, count, out);
        s += count;
    }
    for (int n = 0; n < Q; ++n) {
        a.largest[first_query + n] = UNIFIED ? largest(top[n]) : largest_score[n];
        a.weight[first_query + n] = UNIFIED ? sum_of(weight[n]) : total_weight[n];
    }
}

template <Coding CODING, int Q>
inline void attend_as(const Attend& a, int first_query) {
    return a.unified ? attend_some<CODING, Q, true>(a, first_query) : attend_some<CODING, Q, false>(a, first_query);
}

template <Coding CODING>
void attend_coding(const Attend& a) {
    int n = 0;
    for (; n + 3 <= a.queries; n += 3) attend_as<CODING, 3>(a, n);
    if (a.queries - n == 2) attend_as<CODING, 2>(a, n);
    if (a.queries - n == 1) attend_as<CODING, 1>(a, n);
}

}  // namespace

void attend(const Attend& a) {
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
