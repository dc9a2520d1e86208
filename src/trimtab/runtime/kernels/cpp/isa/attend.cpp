// Attention of a few queries over pages of keys and values, compiled once per instruction set.
#include <cmath>
#include <limits>

#include "isa/simd.h"
#include "native/native.h"

namespace trimtab::TRIMTAB_ISA {
namespace {

constexpr int block = 64;  // keys scored before their values are read

template <Coding CODING>
inline FV load_row(const uint8_t* row, int64_t i) {
    if constexpr (CODING == Coding::f32) return load<FV>(reinterpret_cast<const float*>(row) + i);
    if constexpr (CODING == Coding::f16) return load_halves(reinterpret_cast<const uint16_t*>(row) + i);
    return load_bf16s(reinterpret_cast<const uint16_t*>(row) + i);
}

// Lane i = sum of the lanes of v[i].
inline FV sums_of(const FV* v) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    auto h = [](FV a, FV b) { return as<FV>(_mm256_hadd_ps(as<__m256>(a), as<__m256>(b))); };
    const FV low = h(h(v[0], v[1]), h(v[2], v[3])), high = h(h(v[4], v[5]), h(v[6], v[7]));
    const __m256 a = as<__m256>(low), b = as<__m256>(high);
    return as<FV>(_mm256_permute2f128_ps(a, b, 0x20)) + as<FV>(_mm256_permute2f128_ps(a, b, 0x31));
#else
    FV r;
    for (int i = 0; i < lanes; ++i) r[i] = sum_of(v[i]);
    return r;
#endif
}

// Raw scores of Q queries with `count` <= block keys: scores [Q, block].
template <Coding CODING, int Q>
void score(const float* const* q, const uint8_t* k, int64_t row_bytes, int64_t head_dim, int count, float* scores) {
    for (int s = 0; s < count; s += lanes) {
        FV sums[Q][lanes] = {};
        const int here = count - s < lanes ? count - s : lanes;
        for (int j = 0; j < here; ++j) {
            const uint8_t* row = k + (s + j) * row_bytes;
            prefetch(row + 8 * row_bytes);
            FV acc[Q] = {};
            for (int64_t i = 0; i < head_dim; i += lanes) {
                const FV key = load_row<CODING>(row, i);
                for (int n = 0; n < Q; ++n) acc[n] += key * load<FV>(q[n] + i);
            }
            for (int n = 0; n < Q; ++n) sums[n][j] = acc[n];
        }
        for (int n = 0; n < Q; ++n) store_f(scores + n * block + s, sums_of(sums[n]));
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

template <Coding CODING, int Q>
void attend_some(const Attend& a, int first_query) {
    constexpr float none = -std::numeric_limits<float>::infinity();
    const int64_t head_dim = a.pages.head_dim, row_bytes = head_dim * (CODING == Coding::f32 ? 4 : 2);
    const float* const* q = a.q + first_query;
    const int64_t *low = a.low + first_query, *high = a.high + first_query;
    float* out = a.out + first_query * head_dim;
    float largest_score[Q], weight[Q];
    for (int n = 0; n < Q; ++n) largest_score[n] = none, weight[n] = 0;
    for (int64_t i = 0; i < Q * head_dim; ++i) out[i] = 0;
    alignas(64) float scores[Q * block];
    int64_t least = high[0], most = 0;
    for (int n = 0; n < Q; ++n) least = low[n] < least ? low[n] : least, most = high[n] > most ? high[n] : most;
    const int64_t from = a.first > least ? a.first : least, to = a.last < most ? a.last : most;
    for (int64_t s = from; s < to;) {
        const int64_t page = s / a.pages.page, inside = s % a.pages.page;
        int64_t left = a.pages.page - inside < to - s ? a.pages.page - inside : to - s;
        const int count = static_cast<int>(left < block ? left : block);
        score<CODING, Q>(q, a.pages.k[page] + inside * row_bytes, row_bytes, head_dim, count, scores);
        for (int n = 0; n < Q; ++n) {
            float* row = scores + n * block;
            for (int j = count; j % lanes; ++j) row[j] = none;
            FV top = splat_f(none);
            for (int j = 0; j < count; j += lanes) {
                FV x = load<FV>(row + j) * a.scale;
                if (a.softcap > 0) {
                    const FV e = exp_of(x * (2.0f / a.softcap));
                    x = (1.0f - 2.0f / (e + 1.0f)) * a.softcap;
                }
                store_f(row + j, x);
            }
            for (int j = count; j % lanes; ++j) row[j] = none;
            if (s < low[n])
                for (int j = 0; j < count && s + j < low[n]; ++j) row[j] = none;
            for (int64_t j = high[n] > s ? high[n] - s : 0; j < count; ++j) row[j] = none;
            for (int j = 0; j < count; j += lanes) top = max_of(top, load<FV>(row + j));
            const float peak = largest(top);
            float shift = a.phi;
            if (a.unified) {
                if (peak > largest_score[n]) largest_score[n] = peak;
            } else {
                if (peak > largest_score[n]) {
                    if (weight[n] > 0) {
                        const float by = std::exp(largest_score[n] - peak);
                        weight[n] *= by;
                        for (int64_t i = 0; i < head_dim; i += lanes)
                            store_f(out + n * head_dim + i, load<FV>(out + n * head_dim + i) * by);
                    }
                    largest_score[n] = peak;
                }
                shift = largest_score[n] == none ? 0.0f : largest_score[n];
            }
            FV sum = {};
            for (int j = 0; j < count; j += lanes) {
                const FV p = exp_of(load<FV>(row + j) - shift);
                sum += p;
                store_f(row + j, p);
            }
            weight[n] += sum_of(sum);
        }
        weigh<CODING, Q>(scores, a.pages.v[page] + inside * row_bytes, row_bytes, head_dim, count, out);
        s += count;
    }
    for (int n = 0; n < Q; ++n) a.largest[first_query + n] = largest_score[n], a.weight[first_query + n] = weight[n];
}

template <Coding CODING>
void attend_coding(const Attend& a) {
    int n = 0;
    for (; n + 3 <= a.queries; n += 3) attend_some<CODING, 3>(a, n);
    if (a.queries - n == 2) attend_some<CODING, 2>(a, n);
    if (a.queries - n == 1) attend_some<CODING, 1>(a, n);
}

}  // namespace

void attend(const Attend& a) {
    switch (a.pages.coding) {
        case Coding::f32: return attend_coding<Coding::f32>(a);
        case Coding::f16: return attend_coding<Coding::f16>(a);
        default: return attend_coding<Coding::bf16>(a);
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
