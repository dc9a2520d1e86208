// Products of small matrices that stay in the caches of a core, and their transposes.
#pragma once
#include "isa/simd.h"

namespace {

constexpr int wide = 4;                        // registers of a row of the result
constexpr int deep = lanes == 16 ? 6 : 3;      // rows of the result: as many as registers hold

// Rounded twice where registers hold 8 floats: instruction sets of one width yield the same bits.
inline FV multiply_add(FV a, FV b, FV c) {
    if constexpr (lanes == 16) return fused(a, b, c);
    return a * b + c;
}

// c [Q, V registers] (+)= a [Q, depth] times b [depth, V registers].
template <int Q, int V>
inline void multiply(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth, bool add, float* c, int64_t c_stride) {
    FV sum[Q][V];
    for (int n = 0; n < Q; ++n)
        for (int v = 0; v < V; ++v) sum[n][v] = add ? load<FV>(c + n * c_stride + v * lanes) : FV{};
    for (int64_t k = 0; k < depth; ++k) {
        FV row[V];
        for (int v = 0; v < V; ++v) row[v] = load<FV>(b + k * b_stride + v * lanes);
        for (int n = 0; n < Q; ++n) {
            const FV by = splat_f(a[n * a_stride + k]);
            for (int v = 0; v < V; ++v) sum[n][v] = multiply_add(row[v], by, sum[n][v]);
        }
    }
    for (int n = 0; n < Q; ++n)
        for (int v = 0; v < V; ++v) store_f(c + n * c_stride + v * lanes, sum[n][v]);
}

template <int V>
inline void multiply_rows(int rows, const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth, bool add, float* c,
                          int64_t c_stride) {
    int n = 0;
    for (; n + deep <= rows; n += deep) multiply<deep, V>(a + n * a_stride, a_stride, b, b_stride, depth, add, c + n * c_stride, c_stride);
    for (; n < rows; ++n) multiply<1, V>(a + n * a_stride, a_stride, b, b_stride, depth, add, c + n * c_stride, c_stride);
}

// c [rows, cols] (+)= a [rows, depth] times b [depth, cols]; cols is a multiple of 16.
inline void multiply_all(int rows, int64_t cols, const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth, bool add, float* c,
                  int64_t c_stride) {
    int64_t at = 0;
    for (; at + wide * lanes <= cols; at += wide * lanes)
        multiply_rows<wide>(rows, a, a_stride, b + at, b_stride, depth, add, c + at, c_stride);
    for (; at < cols; at += lanes) multiply_rows<1>(rows, a, a_stride, b + at, b_stride, depth, add, c + at, c_stride);
}

// out = the transpose of in, `lanes` rows each, by halves, quarters, ... of a register.
inline void transpose(const float* in, int64_t stride, float* out, int64_t out_stride) {
    FV row[lanes];
    for (int i = 0; i < lanes; ++i) row[i] = load<FV>(in + i * stride);
#pragma GCC unroll 4
    for (int half = lanes / 2; half > 0; half /= 2) {
        IV first, second;
        for (int i = 0; i < lanes; ++i) {
            first[i] = i & half ? lanes + i - half : i;
            second[i] = i & half ? lanes + i : i + half;
        }
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i)
            if (!(i & half)) {
                const FV a = row[i], b = row[i + half];
                row[i] = __builtin_shuffle(a, b, first), row[i + half] = __builtin_shuffle(a, b, second);
            }
    }
    for (int i = 0; i < lanes; ++i) store_f(out + i * out_stride, row[i]);
}

}  // namespace
