// Dot products with stored rows (y = x W^T, W by rows) and sums of stored rows (y = x W, W^T by rows). Rows are decoded
// in registers, eight elements at a time; no row is ever written out as floats. Multiply-adds fuse by contraction.
#include "kernels.h"
#include "isa/vec.h"

namespace trimtab::TRIMTAB_ISA {
namespace {

constexpr int64_t token_block = 4;  // accumulators of four tokens fit the registers; a row is decoded once for them

template <Kind KIND>
inline F8 load8(const void* row, int64_t i) {
    if constexpr (KIND == Kind::f32) return load<F8>(static_cast<const float*>(row) + i);
    return load_bf16(static_cast<const uint16_t*>(row) + i);
}
template <Kind KIND>
inline float load1(const void* row, int64_t i) {
    if constexpr (KIND == Kind::f32) return static_cast<const float*>(row)[i];
    return bf16(static_cast<const uint16_t*>(row)[i]);
}

template <Kind KIND, int T>
void dot_float(const void* row, int64_t cols, const float* x, float* y, int64_t y_stride) {
    constexpr int U = T == 1 ? 4 : 2;  // independent sums hide the latency of the multiply-add
    F8 sum[T][U] = {};
    int64_t i = 0;
    for (; i + 8 * U <= cols; i += 8 * U)
        for (int u = 0; u < U; ++u) {
            const F8 w = load8<KIND>(row, i + 8 * u);
            for (int t = 0; t < T; ++t) sum[t][u] += w * load<F8>(x + t * cols + i + 8 * u);
        }
    for (int t = 0; t < T; ++t) {
        for (int u = 1; u < U; ++u) sum[t][0] += sum[t][u];
        float y_t = total(sum[t][0]);
        for (int64_t k = i; k < cols; ++k) y_t += load1<KIND>(row, k) * x[t * cols + k];
        y[t * y_stride] = y_t;
    }
}

struct Groups {  // of one row
    const uint16_t *scale, *minimum;
    float zero;  // 2^(bits-1)

    // w = scale * code + offset
    inline void affine(int64_t g, float* s, float* offset) const {
        *s = half(scale[g]);
        *offset = minimum ? half(minimum[g]) : -*s * zero;
    }

    // The same for groups [first, first + n).
    inline void affine(int64_t first, int64_t n, float* s, float* offset) const {
        int64_t i = 0;
        for (; i + 8 <= n; i += 8) {
            const F8 v = load_half(scale + first + i);
            store(s + i, v);
            store(offset + i, minimum ? load_half(minimum + first + i) : v * splat(-zero));
        }
        for (; i < n; ++i) affine(first + i, s + i, offset + i);
    }
};

inline Groups groups_of(const Matrix& w, int64_t row) {
    const int64_t first = row * w.groups();
    return {w.scale + first, w.minimum ? w.minimum + first : nullptr, static_cast<float>(1 << (w.bits - 1))};
}

// x . w = sum over groups of scale * (x . codes) + offset * sum(x): the scale is applied once per group.
template <int BITS, int T>
void dot_int(const Matrix& w, const uint8_t* codes, Groups groups, const float* x, const float* sums, float* y,
             int64_t y_stride) {
    constexpr int64_t chunk = 64;  // groups whose scales are decoded together, eight at a time
    const int64_t cols = w.cols, group = w.group, count = w.groups();
    F8 sum[T] = {}, rest[T] = {};
    float scale[chunk], offset[chunk];
    for (int64_t g0 = 0; g0 < count; g0 += chunk) {
        const int64_t n = count - g0 < chunk ? count - g0 : chunk;
        groups.affine(g0, n, scale, offset);
        int64_t i = 0;
        for (; i + 8 <= n; i += 8)
            for (int t = 0; t < T; ++t) rest[t] += load<F8>(offset + i) * load<F8>(sums + t * count + g0 + i);
        for (; i < n; ++i)
            for (int t = 0; t < T; ++t) rest[t][0] += offset[i] * sums[t * count + g0 + i];
        for (int64_t g = 0; g < n; ++g) {
            F8 even[T] = {}, odd[T] = {};
            const float* x_g = x + (g0 + g) * group;
            for (i = 0; i + 16 <= group; i += 16, codes += 2 * BITS) {
                const F8 a = codes8<BITS>(codes), b = codes8<BITS>(codes + BITS);
                for (int t = 0; t < T; ++t) {
                    even[t] += a * load<F8>(x_g + t * cols + i);
                    odd[t] += b * load<F8>(x_g + t * cols + i + 8);
                }
            }
            for (; i < group; i += 8, codes += BITS) {
                const F8 a = codes8<BITS>(codes);
                for (int t = 0; t < T; ++t) even[t] += a * load<F8>(x_g + t * cols + i);
            }
            for (int t = 0; t < T; ++t) sum[t] += (even[t] + odd[t]) * splat(scale[g]);
        }
    }
    for (int t = 0; t < T; ++t) y[t * y_stride] = total(sum[t] + rest[t]);
}

// Groups that are no multiple of eight: one element at a time. Correct for every shape, not fast.
void dot_int_any(const Matrix& w, const uint8_t* codes, Groups groups, const float* x, int64_t tokens, float* y,
                 int64_t y_stride) {
    for (int64_t t = 0; t < tokens; ++t) {
        float y_t = 0;
        for (int64_t g = 0; g < w.groups(); ++g) {
            float scale, offset;
            groups.affine(g, &scale, &offset);
            for (int64_t i = g * w.group; i < (g + 1) * w.group; ++i)
                y_t += x[t * w.cols + i] * (scale * static_cast<float>(code_at(codes, i, w.bits)) + offset);
        }
        y[t * y_stride] = y_t;
    }
}

template <Kind KIND, int T>
void add_float(const void* row, const float* h, int64_t first, int64_t last, float* y, int64_t y_stride) {
    int64_t c = first;
    for (; c + 8 <= last; c += 8) {
        const F8 w = load8<KIND>(row, c);
        for (int t = 0; t < T; ++t) store(y + t * y_stride + c, load<F8>(y + t * y_stride + c) + w * splat(h[t]));
    }
    for (; c < last; ++c)
        for (int t = 0; t < T; ++t) y[t * y_stride + c] += load1<KIND>(row, c) * h[t];
}

template <int BITS, int T>
void add_int(const Matrix& w, const uint8_t* codes, Groups groups, const float* h, int64_t first, int64_t last,
             float* y, int64_t y_stride) {
    int64_t g = first / w.group;
    for (int64_t c = first; c < last; ++g) {
        const int64_t end = (g + 1) * w.group < last ? (g + 1) * w.group : last;
        float scale, offset;
        groups.affine(g, &scale, &offset);
        F8 a[T], b[T];
        for (int t = 0; t < T; ++t) a[t] = splat(h[t] * scale), b[t] = splat(h[t] * offset);
        for (; c < end; c += 8) {
            const F8 q = codes8<BITS>(codes + c / 8 * BITS);
            for (int t = 0; t < T; ++t) {
                float* y_t = y + t * y_stride + c;
                store(y_t, (load<F8>(y_t) + b[t]) + q * a[t]);
            }
        }
    }
}

void add_int_any(const Matrix& w, const uint8_t* codes, Groups groups, float h, int64_t first, int64_t last, float* y) {
    for (int64_t c = first; c < last; ++c) {
        float scale, offset;
        groups.affine(c / w.group, &scale, &offset);
        y[c] += h * (scale * static_cast<float>(code_at(codes, c, w.bits)) + offset);
    }
}

// Calls f.template run<T>() for the number of tokens of a block.
template <class F>
inline void for_tokens(int64_t tokens, const F& f) {
    switch (tokens) {
        case 1: return f.template run<1>();
        case 2: return f.template run<2>();
        case 3: return f.template run<3>();
        default: return f.template run<4>();
    }
}

struct DotFloat {
    const Matrix& w;
    const void* row;
    const float* x;
    float* y;
    int64_t y_stride;
    template <int T>
    void run() const {
        if (w.kind == Kind::f32) return dot_float<Kind::f32, T>(row, w.cols, x, y, y_stride);
        return dot_float<Kind::bf16, T>(row, w.cols, x, y, y_stride);
    }
};

struct DotInt {
    const Matrix& w;
    const uint8_t* codes;
    Groups groups;
    const float *x, *sums;
    float* y;
    int64_t y_stride;
    template <int T>
    void run() const {
        switch (w.bits) {
            case 2: return dot_int<2, T>(w, codes, groups, x, sums, y, y_stride);
            case 3: return dot_int<3, T>(w, codes, groups, x, sums, y, y_stride);
            case 4: return dot_int<4, T>(w, codes, groups, x, sums, y, y_stride);
            case 5: return dot_int<5, T>(w, codes, groups, x, sums, y, y_stride);
            case 6: return dot_int<6, T>(w, codes, groups, x, sums, y, y_stride);
            case 7: return dot_int<7, T>(w, codes, groups, x, sums, y, y_stride);
            default: return dot_int<8, T>(w, codes, groups, x, sums, y, y_stride);
        }
    }
};

struct AddRow {
    const Matrix& w;
    const uint8_t* row;
    int64_t index;
    const float* h;
    int64_t first, last;
    float* y;
    int64_t y_stride;
    template <int T>
    void run() const {
        if (w.kind == Kind::f32) return add_float<Kind::f32, T>(row, h, first, last, y, y_stride);
        if (w.kind == Kind::bf16) return add_float<Kind::bf16, T>(row, h, first, last, y, y_stride);
        const Groups groups = groups_of(w, index);
        if (w.group % 8) {
            for (int t = 0; t < T; ++t) add_int_any(w, row, groups, h[t], first, last, y + t * y_stride);
            return;
        }
        switch (w.bits) {
            case 2: return add_int<2, T>(w, row, groups, h, first, last, y, y_stride);
            case 3: return add_int<3, T>(w, row, groups, h, first, last, y, y_stride);
            case 4: return add_int<4, T>(w, row, groups, h, first, last, y, y_stride);
            case 5: return add_int<5, T>(w, row, groups, h, first, last, y, y_stride);
            case 6: return add_int<6, T>(w, row, groups, h, first, last, y, y_stride);
            case 7: return add_int<7, T>(w, row, groups, h, first, last, y, y_stride);
            default: return add_int<8, T>(w, row, groups, h, first, last, y, y_stride);
        }
    }
};

inline const uint8_t* row_of(const Matrix& w, int64_t row) {
    return static_cast<const uint8_t*>(w.data) + row * w.row_bytes();
}

void group_sums(const float* x, int64_t tokens, int64_t cols, int64_t group, float* out) {
    for (int64_t i = 0; i < tokens * cols / group; ++i) {
        float sum = 0;
        for (int64_t k = 0; k < group; ++k) sum += x[i * group + k];
        out[i] = sum;
    }
}

int64_t dot_rows(const Matrix& w, const float* x, const float* sums, int64_t tokens, const int64_t* index, int64_t begin,
                 int64_t end, float* y, int64_t y_stride) {
    int64_t bytes = 0;
    for (int64_t j = begin; j < end; ++j) {
        const int64_t r = index ? index[j] : j;
        const uint8_t* row = row_of(w, r);
        bytes += w.visit_bytes(0, w.cols);
        for (int64_t t = 0; t < tokens; t += token_block) {
            const int64_t block = tokens - t < token_block ? tokens - t : token_block;
            const float* x_t = x + t * w.cols;
            float* y_t = y + t * y_stride + j;
            if (w.kind != Kind::ints)
                for_tokens(block, DotFloat{w, row, x_t, y_t, y_stride});
            else if (w.group % 8)
                dot_int_any(w, row, groups_of(w, r), x_t, block, y_t, y_stride);
            else
                for_tokens(block, DotInt{w, row, groups_of(w, r), x_t, sums + t * w.groups(), y_t, y_stride});
        }
    }
    return bytes;
}

int64_t add_rows(const Matrix& w, const float* h, const uint8_t* flags, int64_t h_stride, int64_t tokens,
                 const int64_t* index, int64_t count, int64_t first, int64_t last, float* y, int64_t y_stride) {
    int64_t bytes = 0;
    for (int64_t j = 0; j < count; ++j) {
        const int64_t r = index ? index[j] : j;
        const uint8_t* row = row_of(w, r);
        bytes += w.visit_bytes(first, last);
        for (int64_t t = 0; t < tokens; t += token_block) {
            const int64_t block = tokens - t < token_block ? tokens - t : token_block;
            float h_t[token_block];
            bool all = true;
            for (int64_t b = 0; b < block; ++b) {
                h_t[b] = h[(t + b) * h_stride + j];
                all = all && (!flags || flags[(t + b) * h_stride + j]);
            }
            if (all) {
                for_tokens(block, AddRow{w, row, r, h_t, first, last, y + t * y_stride, y_stride});
                continue;
            }
            for (int64_t b = 0; b < block; ++b)
                if (flags[(t + b) * h_stride + j])
                    AddRow{w, row, r, h_t + b, first, last, y + (t + b) * y_stride, y_stride}.run<1>();
        }
    }
    return bytes;
}

}  // namespace

void dequantize(Block kind, const uint8_t* blocks, int64_t count, float* out);  // dequant.cpp

#define TRIMTAB_STRING_(x) #x
#define TRIMTAB_STRING(x) TRIMTAB_STRING_(x)
extern const Kernels table;
const Kernels table = {TRIMTAB_STRING(TRIMTAB_ISA), dequantize, group_sums, dot_rows, add_rows};

}  // namespace trimtab::TRIMTAB_ISA
