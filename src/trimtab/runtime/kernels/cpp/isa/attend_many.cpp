// Attention of many queries, as a prompt has them: two products of small matrices for every block of keys. The keys of a block
// are turned round once for all queries, so that no score takes a sum across a register.
#include <cmath>

#include "isa/softmax.h"

namespace trimtab::TRIMTAB_ISA {
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
void multiply_all(int rows, int64_t cols, const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth, bool add, float* c,
                  int64_t c_stride) {
    int64_t at = 0;
    for (; at + wide * lanes <= cols; at += wide * lanes)
        multiply_rows<wide>(rows, a, a_stride, b + at, b_stride, depth, add, c + at, c_stride);
    for (; at < cols; at += lanes) multiply_rows<1>(rows, a, a_stride, b + at, b_stride, depth, add, c + at, c_stride);
}

// out [lanes, block] = the transpose of in [lanes rows, `stride` floats apart] by halves, quarters, ... of a register.
inline void transpose(const float* in, int64_t stride, float* out) {
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
    for (int i = 0; i < lanes; ++i) store_f(out + i * block, row[i]);
}

// Keys or values [first, first + count) of one page as floats: in place where they are, else in `room` [block, head_dim].
const float* floats(const Pages& pages, bool keys, int64_t page, int64_t first, int count, float* room) {
    const uint8_t* data = (keys ? pages.k : pages.v)[page];
    const int64_t size = pages.head_dim;
    if (pages.coding == Coding::f32) return reinterpret_cast<const float*>(data) + first * size;
    if (pages.coding == Coding::ints) {
        decode_rows((keys ? pages.k_grid : pages.v_grid)[page], data, size, pages.group, first, count, room);
        return room;
    }
    const uint16_t* from = reinterpret_cast<const uint16_t*>(data) + first * size;
    for (int64_t i = 0; i < count * size; i += lanes)
        store_f(room + i, pages.coding == Coding::f16 ? load_halves(from + i) : load_bf16s(from + i));
    return room;
}

}  // namespace

void attend_many(const Attend& a) {
    const int64_t size = a.pages.head_dim;
    alignas(64) float room[block * many_head_dim], turned[many_head_dim * block], scores[max_queries * block];
    alignas(64) float q[max_queries * many_head_dim];
    float largest_score[max_queries], total_weight[max_queries];
    int64_t least = a.low[0], most = a.high[0], inner = a.low[0], outer = a.high[0];
    for (int n = 0; n < a.queries; ++n) {
        memcpy(q + n * size, a.q[n], static_cast<size_t>(size) * 4);
        largest_score[n] = none, total_weight[n] = 0;
        least = a.low[n] < least ? a.low[n] : least, inner = a.low[n] > inner ? a.low[n] : inner;
        most = a.high[n] > most ? a.high[n] : most, outer = a.high[n] < outer ? a.high[n] : outer;
    }
    for (int64_t i = 0; i < a.queries * size; ++i) a.out[i] = 0;
    const int64_t from = a.first > least ? a.first : least, to = a.last < most ? a.last : most;
    for (int64_t s = from; s < to;) {
        const int64_t page = s / a.pages.page, inside = s % a.pages.page;
        const int64_t left = a.pages.page - inside < to - s ? a.pages.page - inside : to - s;
        const int count = static_cast<int>(left < block ? left : block), padded = (count + 15) / 16 * 16;
        const float* keys = floats(a.pages, true, page, inside, count, room);
        if (count % lanes) {  // rows behind the last key are no numbers yet
            if (keys != room) memcpy(room, keys, static_cast<size_t>(count * size) * 4), keys = room;
            for (int64_t i = count * size; i < padded * size; ++i) room[i] = 0;
        }
        for (int64_t c = 0; c < size; c += lanes)
            for (int j = 0; j < count; j += lanes) transpose(keys + j * size + c, size, turned + c * block + j);
        multiply_all(a.queries, padded, q, size, turned, block, size, false, scores, block);
        const bool plain = a.softcap == 0 && s >= inner && s + count <= outer && count % lanes == 0;
        const float scale = plain ? a.scale : 1.0f;
        for (int n = 0; n < a.queries; ++n) {
            float* row = scores + n * block;
            if (!plain) hide(row, s, count, a.scale, a.softcap, a.low[n], a.high[n]);
            if (a.unified) {
                FV top = splat_f(none), weight = {};
                weights_unified(row, count, scale, a.phi, top, weight);
                const float peak = largest(top);
                largest_score[n] = peak > largest_score[n] ? peak : largest_score[n];
                total_weight[n] += sum_of(weight);
                continue;
            }
            FV here = splat_f(none);
            for (int j = 0; j < count; j += lanes) here = max_of(load<FV>(row + j), here);
            const float peak = largest(here) * scale;
            if (peak > largest_score[n]) {
                if (total_weight[n] > 0) {
                    const float by = std::exp(largest_score[n] - peak);
                    total_weight[n] *= by;
                    for (int64_t i = 0; i < size; i += lanes) store_f(a.out + n * size + i, load<FV>(a.out + n * size + i) * by);
                }
                largest_score[n] = peak;
            }
            total_weight[n] += sum_of(weights_online(row, count, scale, largest_score[n] == none ? 0.0f : largest_score[n]));
        }
        const float* values = floats(a.pages, false, page, inside, count, room);
        multiply_all(a.queries, size, scores, block, values, size, count, true, a.out, size);
        s += count;
    }
    for (int n = 0; n < a.queries; ++n) a.largest[n] = largest_score[n], a.weight[n] = total_weight[n];
}

}  // namespace trimtab::TRIMTAB_ISA
