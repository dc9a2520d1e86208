// Products of int8 codes with int8 rows, compiled once per instruction set.
#include "native/int8.h"

#include <cmath>
#include <limits>

#include "isa/simd.h"


namespace trimtab::TRIMTAB_ISA {
namespace {

constexpr int bytes = 4 * lanes;  // of a register
// Bytes between what is read and what is asked for, into the second level: into the first alone, past the others, which a matrix
// that is read once might do with, a core asked for 6.7 GB/s instead of 16.
constexpr int64_t ahead = 6144;

inline FV magnitude(FV v) { return as<FV>(as<UV>(v) & 0x7fffffffu); }

void find(const float* x, int64_t cols, float threshold, uint8_t* mask) {
    typedef int8_t Narrow __attribute__((vector_size(lanes)));
    const FV limit = splat_f(threshold);
    int64_t k = 0;
    for (; k + lanes <= cols; k += lanes) {
        const Narrow found = __builtin_convertvector(magnitude(load<FV>(x + k)) >= limit, Narrow);
        const Narrow all = load<Narrow>(mask + k) | (found & 1);
        memcpy(mask + k, &all, sizeof all);
    }
    for (; k < cols; ++k) mask[k] |= std::fabs(x[k]) >= threshold;
}

// The register of x at column k, zero where the mask is set and beyond the row.
inline FV kept(const float* x, int64_t cols, const uint8_t* mask, int64_t k) {
    typedef uint8_t Narrow __attribute__((vector_size(lanes)));
    FV v = {};
    Narrow out = {};
    if (k + lanes <= cols) {
        v = load<FV>(x + k), out = load<Narrow>(mask + k);
    } else {
        for (int64_t i = k; i < cols; ++i) v[i - k] = x[i], out[i - k] = mask[i];
    }
    return as<FV>(as<UV>(v) & (__builtin_convertvector(out, UV) - 1));
}

float code(const float* x, int64_t cols, const uint8_t* mask, int8_t* codes, int32_t* sum) {
    typedef int8_t Narrow __attribute__((vector_size(lanes)));
    const int64_t padded = padded_codes(cols);
    FV most = {};
    UV strange = {};
    for (int64_t k = 0; k < cols; k += lanes) {
        const UV bits = as<UV>(magnitude(kept(x, cols, mask, k)));
        strange |= as<UV>(bits >= 0x7f800000u);
        most = max_of(most, as<FV>(bits));
    }
    if (sum_of(as<IV>(strange & 1)) > 0) {
        memset(codes, 0, static_cast<size_t>(padded));
        *sum = 0;
        return std::numeric_limits<float>::quiet_NaN();
    }
    const float peak = largest(most);
    const FV by = splat_f(peak > 0 ? 127.0f / peak : 0.0f), magic = splat_f(12582912.0f);  // 1.5 * 2^23 rounds half to even
    IV all = {};
    for (int64_t k = 0; k < padded; k += lanes) {
        const IV q = as<IV>((k < cols ? kept(x, cols, mask, k) : FV{}) * by + magic) - as<IV>(magic);
        all += q;
        const Narrow small = __builtin_convertvector(q, Narrow);
        memcpy(codes + k, &small, sizeof small);
    }
    *sum = sum_of(all);
    return peak / 127.0f;
}

// Sums that pass 2^31 on their way come back within it: unsigned numbers wrap.
inline int32_t total_of(UV v) {
#if defined(__AVX2__)
    if constexpr (lanes == 16) v += turned<lanes / 2>(v);
    v += turned<4>(v);
    v += turned<2>(v);
    return static_cast<int32_t>((v + turned<1>(v))[0]);
#else
    uint32_t sum = 0;
    for (int i = 0; i < lanes; ++i) sum += v[i];
    return static_cast<int32_t>(sum);
#endif
}

#if defined(__AVX512VNNI__)
constexpr bool offset = true;  // unsigned times signed: codes of the matrix are 128 too large
inline BV weights_of(BV w) { return w ^ static_cast<uint8_t>(0x80); }
inline UV added(UV acc, BV w, CV x) { return as<UV>(_mm512_dpbusd_epi32(as<__m512i>(acc), as<__m512i>(w), as<__m512i>(x))); }
#else
constexpr bool offset = false;
inline BV weights_of(BV w) { return w; }
inline UV added(UV acc, BV w, CV x) { return acc + as<UV>(fold(signed_pairs(as<CV>(w), x))); }
#endif

// A register of a row; beyond its end zeros, which meet codes that are zero.
inline BV row_at(const int8_t* row, int64_t cols, int64_t k) {
    if (k + bytes <= cols) return weights_of(load<BV>(row + k));
    alignas(64) int8_t rest[bytes] = {};
    memcpy(rest, row + k, static_cast<size_t>(cols - k));
    return weights_of(load<BV>(rest));
}

template <int R, int T>
inline void block(const int8_t* w, int64_t cols, const int8_t* codes, const int32_t* sums, int64_t stride, int32_t* out) {
    UV acc[R][T];
    for (int r = 0; r < R; ++r)
        for (int t = 0; t < T; ++t) acc[r][t] = UV{};
    auto step = [&](int64_t k, auto read) __attribute__((always_inline)) {
        BV row[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) row[r] = read(w + r * cols, k);
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
            const CV x = load<CV>(codes + t * stride + k);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) acc[r][t] = added(acc[r][t], row[r], x);
        }
    };
    int64_t k = 0;
    for (; k + bytes <= cols; k += bytes)
        step(k, [](const int8_t* row, int64_t at) __attribute__((always_inline)) { return weights_of(load<BV>(row + at)); });
    if (k < cols) step(k, [&](const int8_t* row, int64_t at) { return row_at(row, cols, at); });
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const uint32_t sum = static_cast<uint32_t>(total_of(acc[r][t]));
            out[t * tile_rows + r] = static_cast<int32_t>(sum - (offset ? 128u * static_cast<uint32_t>(sums[t]) : 0u));
        }
}

template <int T>
inline void rows_of(const int8_t* w, int64_t rows, int64_t cols, const int8_t* codes, const int32_t* sums, int64_t stride, int32_t* out) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) block<4, T>(w + r * cols, cols, codes, sums, stride, out + r);
    for (; r < rows; ++r) block<1, T>(w + r * cols, cols, codes, sums, stride, out + r);
}

// One token: row after row as they come from memory, in four sums that do not wait for each other.
void rows_of_one(const int8_t* w, int64_t rows, int64_t cols, const int8_t* codes, int32_t sum, int32_t* out) {
    for (int64_t r = 0; r < rows; ++r) {
        const int8_t* row = w + r * cols;
        UV acc[4] = {};
        int64_t k = 0;
        for (; k + 4 * bytes <= cols; k += 4 * bytes)
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                __builtin_prefetch(row + k + i * bytes + ahead, 0, 2);
                acc[i] = added(acc[i], weights_of(load<BV>(row + k + i * bytes)), load<CV>(codes + k + i * bytes));
            }
        for (; k < cols; k += bytes) acc[0] = added(acc[0], row_at(row, cols, k), load<CV>(codes + k));
        const auto all = static_cast<uint32_t>(total_of(acc[0] + acc[1] + (acc[2] + acc[3])));
        out[r] = static_cast<int32_t>(all - (offset ? 128u * static_cast<uint32_t>(sum) : 0u));
    }
}

void dot(const int8_t* w, int64_t rows, int64_t cols, const int8_t* codes, const int32_t* sums, int64_t tokens, int32_t* out) {
    const int64_t stride = padded_codes(cols);
    int64_t t = 0;
    for (; t + 4 <= tokens; t += 4) rows_of<4>(w, rows, cols, codes + t * stride, sums + t, stride, out + t * tile_rows);
    for (; t + 2 <= tokens; t += 2) rows_of<2>(w, rows, cols, codes + t * stride, sums + t, stride, out + t * tile_rows);
    if (t < tokens) rows_of_one(w, rows, cols, codes + t * stride, sums[t], out + t * tile_rows);
}

void scale(const int32_t* sums, const float* w, const float* x, int64_t tokens, float* out) {
    for (int64_t t = 0; t < tokens; ++t)
        for (int p = 0; p < tile_rows; p += lanes)
            store_f(out + t * tile_rows + p, to_float(load<IV>(sums + t * tile_rows + p)) * (load<FV>(w + p) * x[t]));
}

void take(const Int8Rows& w, int64_t n0, const int32_t* listed, int64_t count, bool always, float* panel) {
    const int64_t rows = w.rows - n0 < tile_rows ? w.rows - n0 : tile_rows;
    for (int64_t i = 0; i < count; ++i) {
        float* out = panel + i * tile_rows;
        if (w.columns) {
            const uint16_t* from = w.columns + (always ? i : listed[i]) * w.rows + n0;
            if (rows == tile_rows)
                for (int p = 0; p < tile_rows; p += lanes) store_f(out + p, load_halves(from + p));
            else
                for (int64_t r = 0; r < tile_rows; ++r) out[r] = r < rows ? half(from[r]) : 0.0f;
        } else {
            const int8_t* from = w.data + n0 * w.cols + listed[i];
            for (int64_t r = 0; r < tile_rows; ++r) out[r] = r < rows ? static_cast<float>(from[r * w.cols]) * w.scale[n0 + r] : 0.0f;
        }
    }
}

template <int T>
inline void add_some(const float* panel, const int32_t* listed, int64_t count, const float* x, int64_t stride, float* out) {
    constexpr int parts = tile_rows / lanes;
    FV sum[T][parts];
    for (int t = 0; t < T; ++t)
        for (int p = 0; p < parts; ++p) sum[t][p] = load<FV>(out + t * tile_rows + p * lanes);
    for (int64_t i = 0; i < count; ++i) {
        FV column[parts];
        for (int p = 0; p < parts; ++p) column[p] = load<FV>(panel + i * tile_rows + p * lanes);
        for (int t = 0; t < T; ++t) {
            const FV value = splat_f(x[t * stride + listed[i]]);
            for (int p = 0; p < parts; ++p) sum[t][p] = fused(column[p], value, sum[t][p]);
        }
    }
    for (int t = 0; t < T; ++t)
        for (int p = 0; p < parts; ++p) store_f(out + t * tile_rows + p * lanes, sum[t][p]);
}

void add(const float* panel, const int32_t* listed, int64_t count, const float* x, int64_t stride, int64_t tokens, float* out) {
    int64_t t = 0;
    for (; t + 4 <= tokens; t += 4) add_some<4>(panel, listed, count, x + t * stride, stride, out + t * tile_rows);
    for (; t < tokens; ++t) add_some<1>(panel, listed, count, x + t * stride, stride, out + t * tile_rows);
}

}  // namespace

extern const Int8Kernels int8_table;
const Int8Kernels int8_table = {find, code, dot, scale, take, add};

}  // namespace trimtab::TRIMTAB_ISA
