// What attention of a few queries over pages and that of many have in common: blocks of keys that lie in several pages, which of them
// a query sees, and weights out of scores.
#pragma once
#include <cmath>
#include <limits>
#include <type_traits>
#include <utility>

#include "isa/simd.h"
#include "native/native.h"

namespace trimtab::TRIMTAB_ISA {

void decode_page(const PageForm& form, const uint8_t* page, int64_t first, int64_t count, float* out, int64_t stride);  // pages.cpp

namespace {

constexpr int block = 64;  // keys scored before their values are read
constexpr float none = -std::numeric_limits<float>::infinity();
constexpr int64_t many_head_dim = 128;  // up to here a block of keys turned round stays in the caches of a core
constexpr int score_stride = block + tile_tokens;  // of a row of scores: a tile may reach beyond the last key of a block

// Neighbouring slots of one page of keys and one of values; their scores stand from `at` on.
struct Part {
    int64_t slot;
    int at, count;
};

struct Block {
    Part part[block];
    int parts = 0, count = 0;
    int64_t first() const { return part[0].slot; }
    int64_t end() const { return part[parts - 1].slot + part[parts - 1].count; }
};

// Cuts the slots [from, to) that are read, in their order, into blocks.
class Walk {
  public:
    Walk(const HeadView& kv, int64_t from, int64_t to) : kv_(kv), from_(from), to_(to) {
        if (!kv.chosen) s_ = from, end_ = to;
        else piece_ = kv.first_chosen(from);
    }

    bool next(Block& b) {
        b.parts = b.count = 0;
        while (b.count < block && (s_ < end_ || choose())) {
            int64_t some = end_ - s_;
            auto within = [&](int64_t limit) { some = some < limit ? some : limit; };
            within(block - b.count);
            within(kv_.k_form(s_).page - s_ % kv_.k_form(s_).page);
            within(kv_.v_form(s_).page - s_ % kv_.v_form(s_).page);
            if (s_ < kv_.k_sealed) within(kv_.k_sealed - s_);
            if (s_ < kv_.v_sealed) within(kv_.v_sealed - s_);
            if (!kv_.chosen && b.parts == 0) within(block - s_ % block);  // later blocks start with a tile, and mostly with a page
            b.part[b.parts++] = {s_, b.count, static_cast<int>(some)};
            b.count += static_cast<int>(some), s_ += some;
            if (!kv_.chosen && s_ % block == 0) break;
        }
        return b.count > 0;
    }

  private:
    // The next run of pieces that lie side by side.
    bool choose() {
        while (kv_.chosen && piece_ < kv_.chosen_count && kv_.chosen[piece_] * kv_.chosen_tokens < to_) {
            s_ = kv_.chosen[piece_++] * kv_.chosen_tokens, end_ = s_ + kv_.chosen_tokens;
            for (; piece_ < kv_.chosen_count && kv_.chosen[piece_] * kv_.chosen_tokens == end_; ++piece_) end_ += kv_.chosen_tokens;
            s_ = s_ > from_ ? s_ : from_, end_ = end_ < to_ ? end_ : to_;
            if (s_ < end_) return true;
        }
        return false;
    }

    const HeadView& kv_;
    int64_t from_, to_, s_ = 0, end_ = 0, piece_ = 0;
};

// Slots that some of the queries [first, first + count) see: [least, most); all see [inner, outer).
struct Seen {
    int64_t least, most, inner, outer;
    Seen(const AttendHead& a, int first, int count) : least(a.low[first]), most(a.high[first]), inner(least), outer(most) {
        for (int n = first + 1; n < first + count; ++n) {
            least = a.low[n] < least ? a.low[n] : least, inner = a.low[n] > inner ? a.low[n] : inner;
            most = a.high[n] > most ? a.high[n] : most, outer = a.high[n] < outer ? a.high[n] : outer;
        }
        least = least > a.first ? least : a.first, most = most < a.last ? most : a.last;
    }
    // Whether raw scores of a block are weights to be: every query sees all of it, and nothing is done to them but to scale them.
    bool plain(const AttendHead& a, const Block& b) const {
        return a.softcap == 0 && !a.kv.positions && b.first() >= inner && b.end() <= outer && b.count % lanes == 0;
    }
};

inline FV capped(FV x, float softcap) {
    const FV e = exp_of(x * (2.0f / softcap));
    return (1.0f - 2.0f / (e + 1.0f)) * softcap;
}

// Scores of a block, scaled and capped; keys that query n does not see, and lanes without a key, are hidden.
inline void hide(const AttendHead& a, int n, const Block& b, float* row) {
    for (int j = b.count; j % lanes; ++j) row[j] = none;
    for (int j = 0; j < b.count; j += lanes) {
        const FV x = load<FV>(row + j) * a.scale;
        store_f(row + j, a.softcap > 0 ? capped(x, a.softcap) : x);
    }
    for (int j = b.count; j % lanes; ++j) row[j] = none;
    for (int i = 0; i < b.parts; ++i) {
        const Part& part = b.part[i];
        float* scores = row + part.at;
        for (int64_t j = 0; j < part.count && part.slot + j < a.low[n]; ++j) scores[j] = none;
        for (int64_t j = a.high[n] > part.slot ? a.high[n] - part.slot : 0; j < part.count; ++j) scores[j] = none;
        if (!a.kv.positions) continue;
        const int32_t *at = a.kv.positions + part.slot, now = static_cast<int32_t>(a.positions[n]), sink = static_cast<int32_t>(a.sink);
        const int32_t after = a.window > 0 ? now - static_cast<int32_t>(a.window) : -1;  // positions are never negative
        const int32_t old = a.recent > 0 ? now - static_cast<int32_t>(a.recent) : -1;
        int j = 0;
        for (; j + lanes <= part.count; j += lanes) {
            const IV p = load<IV>(at + j), hidden = (p > now) | (p <= after) | ((p <= old) & (p >= sink));
            store_f(scores + j, hidden ? splat_f(none) : load<FV>(scores + j));
        }
        for (; j < part.count; ++j)
            if (at[j] > now || at[j] <= after || (at[j] <= old && at[j] >= sink)) scores[j] = none;
    }
}

// exp_of in fewer operations where there are such: 0 of minus infinity, NaN of what is too large.
inline FV power_of_e(FV x) {
#if defined(__AVX512F__)
    const FV low = splat_f(-104.0f), magic = splat_f(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
    x = low > x ? low : x;
    const FV n = fma_of(x, splat_f(1.44269504088896341f), magic) - magic;
    const FV r = fma_of(n, splat_f(2.12194440e-4f), fma_of(n, splat_f(-0.693359375f), x));
    FV p = fma_of(splat_f(1.9875691500e-4f), r, splat_f(1.3981999507e-3f));
    p = fma_of(p, r, splat_f(8.3334519073e-3f));
    p = fma_of(p, r, splat_f(4.1665795894e-2f));
    p = fma_of(p, r, splat_f(1.6666665459e-1f));
    p = fma_of(p, r, splat_f(5.0000001201e-1f));
    p = fma_of(p, r * r, r + 1.0f);
    return as<FV>(_mm512_maskz_scalef_ps(0xffff, as<__m512>(p), as<__m512>(n)));
#else
    return exp_of(x);
#endif
}

// f(0), ..., f(N - 1), each with its number as a type: arrays with such indices lie in registers, which loops do not ensure.
#define TRIMTAB_INLINE __attribute__((always_inline))
template <class F, int... I>
TRIMTAB_INLINE inline void each_of(F f, std::integer_sequence<int, I...>) {
    (f(std::integral_constant<int, I>{}), ...);
}
template <int N, class F>
TRIMTAB_INLINE inline void each(F f) {
    each_of(f, std::make_integer_sequence<int, N>{});
}

// What a query knows of the blocks before: in every lane the largest score, and by lane the sum of the weights.
struct Sums {
    FV top = splat_f(none), weight = {};
};

inline bool any_above(FV a, FV b) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask(as<__m512>(a), as<__m512>(b), _CMP_GT_OQ) != 0;
#else
    return sum_of(a > b) != 0;
#endif
}

// Makes `peak` the largest score of a query; `out` [H] is what earlier blocks summed up.
inline void raise(Sums& sums, float peak, float* out, int64_t head_dim) {
    if (sums.top[0] != none) {
        const float by = std::exp(sums.top[0] - peak);
        sums.weight *= by;
        for (int64_t i = 0; i < head_dim; i += lanes) store_f(out + i, load<FV>(out + i) * by);
    }
    sums.top = splat_f(peak);
}

// Weights of `count` keys in place of the scores of Q queries; `out` [Q, H] is what earlier blocks summed up. Step by step for all
// queries, so that they need not wait for each other.
template <int Q>
inline void weigh_online(float* scores, int count, float scale, Sums* sums, float* out, int64_t head_dim) {
    FV here[Q];
    each<Q>([&](auto n) TRIMTAB_INLINE { here[n] = splat_f(none); });
    for (int j = 0; j < count; j += lanes)
        each<Q>([&](auto n) TRIMTAB_INLINE { here[n] = max_of(load<FV>(scores + n * score_stride + j), here[n]); });
    FV base[Q], weight[Q];
    each<Q>([&](auto n) TRIMTAB_INLINE {
        here[n] *= scale;
        if (any_above(here[n], sums[n].top)) raise(sums[n], largest(here[n]), out + n * head_dim, head_dim);
        base[n] = sums[n].top == none ? FV{} : sums[n].top;
        weight[n] = sums[n].weight;
    });
    for (int j = 0; j < count; j += lanes)
        each<Q>([&](auto n) TRIMTAB_INLINE {
            const FV p = power_of_e(load<FV>(scores + n * score_stride + j) * scale - base[n]);
            weight[n] += p;
            store_f(scores + n * score_stride + j, p);
        });
    each<Q>([&](auto n) TRIMTAB_INLINE { sums[n].weight = weight[n]; });
}

// As weigh_online, with phi in place of the largest score, which nothing then waits for.
template <int Q>
inline void weigh_unified(float* scores, int count, float scale, float phi, Sums* sums) {
    FV top[Q], weight[Q];
    each<Q>([&](auto n) TRIMTAB_INLINE { top[n] = sums[n].top, weight[n] = sums[n].weight; });
    for (int j = 0; j < count; j += lanes)
        each<Q>([&](auto n) TRIMTAB_INLINE {
            const FV x = load<FV>(scores + n * score_stride + j) * scale, p = power_of_e(x - phi);
            top[n] = max_of(x, top[n]);
            weight[n] += p;
            store_f(scores + n * score_stride + j, p);
        });
    each<Q>([&](auto n) TRIMTAB_INLINE { sums[n].top = top[n], sums[n].weight = weight[n]; });
}

// The lowest BITS bits of every lane as floats.
template <int BITS>
inline FV low_bits(UV word) {
#if defined(__AVX512F__)
    // As masked operations of all lanes: GCC 12 warns about those without a mask.
    if constexpr (BITS == 2)
        return as<FV>(_mm512_maskz_permutevar_ps(0xffff, _mm512_setr_ps(0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3), as<__m512i>(word)));
    if constexpr (BITS == 4)
        return as<FV>(_mm512_maskz_permutexvar_ps(0xffff, as<__m512i>(word), _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)));
#elif defined(__AVX2__)
    if constexpr (BITS == 2) return as<FV>(_mm256_permutevar_ps(_mm256_setr_ps(0, 1, 2, 3, 0, 1, 2, 3), as<__m256i>(word)));
#endif
    return to_float(as<IV>(word & ((1u << BITS) - 1)));
}

// Keys in pages whose last elements do not fill a register are read as floats, filled up with zeros.
inline int64_t filled_up(int64_t width) { return (width + 15) / 16 * 16; }

// A query [H] as sealed keys want it: the channels they keep, filled up with zeros.
inline void thin_query(const HeadView& kv, const float* q, float* out) {
    const int64_t width = kv.k_sealed_form->width;
    for (int64_t i = 0; i < width; ++i) out[i] = q[kv.channels ? kv.channels[i] : i];
    for (int64_t i = width; i < filled_up(width); ++i) out[i] = 0;
}

// Whether sealed keys are multiplied with something else than the whole query.
inline bool thins(const AttendHead& a) { return a.kv.k_sealed_form && (a.kv.channels || a.kv.k_sealed_form->width < a.head_dim); }

}  // namespace
}  // namespace trimtab::TRIMTAB_ISA
