// What stands before a product, norm and int8 codes, and behind it, activations and rotations; compiled once per instruction set.
#include <cmath>

#include "isa/simd.h"
#include "native/native.h"

namespace trimtab::TRIMTAB_ISA {
namespace {

// Codes round(x * by) of `count` values; returns their sum.
inline int32_t code(const float* x, int64_t count, float by, int8_t* codes) {
    typedef int8_t Narrow __attribute__((vector_size(lanes)));
    const FV magic = splat_f(12582912.0f);  // 1.5 * 2^23: adding it rounds half to even
    IV all = {};
    for (int64_t i = 0; i < count; i += lanes) {
        const IV q = as<IV>(load<FV>(x + i) * by + magic) - as<IV>(magic);
        all += q;
        const Narrow small = __builtin_convertvector(q, Narrow);
        memcpy(codes + i, &small, sizeof small);
    }
    return sum_of(all);
}

// An act group of x: in place, or, where it reaches beyond `cols`, in `room` and filled up with zeros.
inline const float* group_of(const Input& in, const float* x, int64_t cols, int64_t a, float* room) {
    const int64_t from = a * in.act_group, left = cols > from ? cols - from : 0;
    if (left >= in.act_group) return x + from;
    for (int64_t i = 0; i < in.act_group; ++i) room[i] = i < left ? x[from + i] : 0.0f;
    return room;
}

inline FV act_of(Act act, FV v) {
    if (act == Act::silu) return v / (1.0f + exp_of(-v));
    if (act == Act::gelu_tanh) {
        const FV u = (v + v * v * v * 0.044715f) * 0.7978845608028654f;
        return v / (1.0f + exp_of(u * -2.0f));
    }
    FV y;
    for (int i = 0; i < lanes; ++i)
        y[i] = act == Act::relu ? (v[i] > 0 ? v[i] : 0.0f) : 0.5f * v[i] * (1.0f + std::erf(v[i] * 0.70710678f));
    return y;
}

}  // namespace

void norm(const Norm& n, const float* x, float* y) {
    const int64_t size = n.size;
    int64_t i = 0;
    float mean = 0, square;
    if (n.layer) {
        FV sum = {};
        for (i = 0; i + lanes <= size; i += lanes) sum += load<FV>(x + i);
        mean = sum_of(sum);
        for (; i < size; ++i) mean += x[i];
        mean /= static_cast<float>(size);
    }
    FV squares = {};
    for (i = 0; i + lanes <= size; i += lanes) {
        const FV v = load<FV>(x + i) - mean;
        squares += v * v;
    }
    square = sum_of(squares);
    for (; i < size; ++i) square += (x[i] - mean) * (x[i] - mean);
    const float by = 1.0f / std::sqrt(square / static_cast<float>(size) + n.eps);
    for (i = 0; i + lanes <= size; i += lanes) {
        FV v = (load<FV>(x + i) - mean) * by;
        if (n.weight) v *= load<FV>(n.weight + i);
        if (n.bias) v += load<FV>(n.bias + i);
        store_f(y + i, v);
    }
    for (; i < size; ++i) y[i] = (x[i] - mean) * by * (n.weight ? n.weight[i] : 1.0f) + (n.bias ? n.bias[i] : 0.0f);
}

// Codes of one token: q = round(x / scale), scale = largest |x| of an act_group / 127. `cols` values, zero beyond them.
void quantize(const Input& in, int64_t t, const float* x, int64_t cols) {
    const int64_t acts = in.acts(), groups = in.sums();
    float *scale = in.scale + t * acts, *second_scale = in.second_scale + t * acts, *sum = in.sum + t * groups;
    int8_t *codes = in.codes + t * in.stride, *second = in.second + t * in.stride;
    alignas(64) float room[64], left[64];
    for (int64_t g = 0; g < groups; ++g) sum[g] = 0;
    int64_t bits = 0, some = 0;
    for (int64_t a = 0; a < acts; ++a) {
        const float* values = group_of(in, x, cols, a, room);
        FV most = {};
        for (int64_t i = 0; i < in.act_group; i += lanes) {
            const FV v = load<FV>(values + i);
            most = max_of(most, max_of(v, -v));
        }
        const float peak = largest(most);
        scale[a] = peak / 127.0f;
        const int32_t all = code(values, in.act_group, peak > 0 ? 127.0f / peak : 0.0f, codes + a * in.act_group);
        sum[a * in.act_group / in.group] += scale[a] * static_cast<float>(all);
        if (scale[a] > 0) bits += as<int32_t>(scale[a]), ++some;
    }
    // The mean of the bits of positive floats is that of their logarithms, nearly: what is typical whatever the outliers.
    const float typical = some > 0 ? as<float>(static_cast<int32_t>(bits / some)) : 0.0f;
    int32_t* listed = in.listed(t);
    listed[0] = 0;
    for (int64_t a = 0; a < acts; ++a) {
        if (!(scale[a] > 0) || scale[a] < typical * in.twice_from) continue;
        listed[++listed[0]] = static_cast<int32_t>(a);
        const float* values = group_of(in, x, cols, a, room);
        for (int64_t i = 0; i < in.act_group; i += lanes)
            store_f(left + i, load<FV>(values + i) - load_i8s(codes + a * in.act_group + i) * scale[a]);
        second_scale[a] = scale[a] / 254.0f;
        const int32_t all = code(left, in.act_group, 254.0f / scale[a], second + a * in.act_group);
        sum[a * in.act_group / in.group] += second_scale[a] * static_cast<float>(all);
    }
}

void activate(Act act, float* gate, const float* up, int64_t count) {
    for (int64_t i = 0; i < count; i += lanes) {
        const FV g = act_of(act, load<FV>(gate + i));
        store_f(gate + i, up ? g * load<FV>(up + i) : g);
    }
}

double exp_sum(const float* x, int64_t count, float top, float by) {
    constexpr int64_t block = 16 * lanes;  // so few that single precision adds them up without loss
    double total = 0;
    int64_t i = 0;
    for (; i + block <= count; i += block) {
        FV sum[2] = {};
        for (int64_t j = 0; j < block; j += 2 * lanes)
            for (int k = 0; k < 2; ++k) sum[k] += exp_of((load<FV>(x + i + j + k * lanes) - top) * by);
        total += sum_of(sum[0] + sum[1]);
    }
    for (; i < count; ++i) total += std::exp((x[i] - top) * by);
    return total;
}

void rotate(float* x, const float* cos, const float* sin, int64_t half) {
    for (int64_t i = 0; i < half; ++i) {
        const float a = x[i], b = x[i + half];
        x[i] = a * cos[i] - b * sin[i];
        x[i + half] = b * cos[i] + a * sin[i];
    }
}

}  // namespace trimtab::TRIMTAB_ISA
