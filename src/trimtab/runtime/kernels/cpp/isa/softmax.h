// What attention of a few queries and that of many have in common: weights of a block of keys out of their scores.
#pragma once
#include <limits>

#include "isa/simd.h"
#include "native/native.h"

namespace {

using trimtab::Grid;

constexpr int block = 64;  // keys scored before their values are read
constexpr float none = -std::numeric_limits<float>::infinity();
constexpr int64_t many_head_dim = 128;  // up to here a block of keys turned round stays in the caches of a core

inline FV capped(FV x, float softcap) {
    const FV e = exp_of(x * (2.0f / softcap));
    return (1.0f - 2.0f / (e + 1.0f)) * softcap;
}

// Weights of one query in place of its raw scores, and what they add up to by lane; top: largest score by lane. A score is
// multiplied by `scale`, which is above 0, first. Nothing waits for the largest score.
inline void weights_unified(float* row, int count, float scale, float phi, FV& top, FV& weight) {
    FV most = splat_f(none), sum = {};
    for (int j = 0; j < count; j += lanes) {
        const FV x = load<FV>(row + j);
        most = max_of(x, most);
        const FV p = exp_of(x * scale - phi);
        sum += p;
        store_f(row + j, p);
    }
    top = max_of(most * scale, top);
    weight += sum;
}

inline FV weights_online(float* row, int count, float scale, float largest_score) {
    FV weight = {};
    for (int j = 0; j < count; j += lanes) {
        const FV p = exp_of(load<FV>(row + j) * scale - largest_score);
        weight += p;
        store_f(row + j, p);
    }
    return weight;
}

// Scores of `count` keys from s on, scaled and capped; a query sees keys [low, high). Lanes without a key are hidden.
inline void hide(float* row, int64_t s, int count, float scale, float softcap, int64_t low, int64_t high) {
    for (int j = count; j % lanes; ++j) row[j] = none;
    for (int j = 0; j < count; j += lanes) {
        const FV x = load<FV>(row + j) * scale;
        store_f(row + j, softcap > 0 ? capped(x, softcap) : x);
    }
    for (int j = count; j % lanes; ++j) row[j] = none;
    for (int j = 0; j < count && s + j < low; ++j) row[j] = none;
    for (int64_t j = high > s ? high - s : 0; j < count; ++j) row[j] = none;
}

// `count` rows of an integer page from token `first` on as floats [count, H].
inline void decode_rows(const Grid& grid, const uint8_t* codes, int64_t head_dim, int64_t group, int64_t first, int count, float* out) {
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

}  // namespace
