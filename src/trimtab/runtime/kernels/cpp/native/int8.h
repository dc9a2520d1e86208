// Matrices of int8 rows, multiplied as they lie, exactly: sums of int32. Legend: T tokens, K inputs, N outputs.
//
// Inputs are coded a row at a time. Columns of the input that hold an outlier in any row of the pass are left out of the codes
// and multiplied in floats instead. Source: Dettmers et al., LLM.int8(), arXiv 2208.07339.
#pragma once
#include <cstdint>
#include <vector>

#include "native/tiles.h"

namespace trimtab {

// Columns of a vector register, to a multiple of which rows of codes are padded with zeros.
constexpr int64_t code_cols = 64;
constexpr int64_t padded_codes(int64_t cols) { return (cols + code_cols - 1) / code_cols * code_cols; }

// Of the instruction set in use.
struct Int8Kernels;
const Int8Kernels& int8_kernels();

struct Int8Rows {
    const int8_t* data = nullptr;  // [N, K], -127 .. 127
    const float* scale = nullptr;  // [N] what a unit of a row stands for
    int64_t rows = 0, cols = 0;
    // Columns in fp16 by which outliers are multiplied: [K, N], or [those that are always listed, N]; null: the int8 ones.
    const uint16_t* columns = nullptr;

    int64_t tiles() const { return (rows + tile_rows - 1) / tile_rows; }
};

struct Int8Kernels {
    // mask[k] = 1 where |x[k]| >= threshold; other bytes stay.
    void (*find)(const float* x, int64_t cols, float threshold, uint8_t* mask);
    // Codes round(127 * x / peak) of one row, padded, 0 where `mask` is set; peak is the largest |x| elsewhere. Returns peak / 127,
    // or NaN with codes of 0 where an x is not finite. sum: of the codes.
    float (*code)(const float* x, int64_t cols, const uint8_t* mask, int8_t* codes, int32_t* sum);
    // out [T, 16] = codes [T, padded] times `rows` <= 16 rows [rows, cols] of a matrix. Codes are at least -127. Exact as long as
    // results fit int32: K up to 133,000.
    void (*dot)(const int8_t* w, int64_t rows, int64_t cols, const int8_t* codes, const int32_t* sums, int64_t tokens, int32_t* out);
    // out [T, 16] = sums times what a unit of their row and token stands for.
    void (*scale)(const int32_t* sums, const float* w, const float* x, int64_t tokens, float* out);
    // panel [count, 16] = columns `listed` of rows n0 .. n0 + 15 of W; those in fp16 lie in the order of the list if `always`.
    void (*take)(const Int8Rows& w, int64_t n0, const int32_t* listed, int64_t count, bool always, float* panel);
    // out [T, 16] += panel [count, 16] times columns `listed` of x [T, stride].
    void (*add)(const float* panel, const int32_t* listed, int64_t count, const float* x, int64_t stride, int64_t tokens, float* out);
};

// Which columns of an input are outliers.
struct Outliers {
    float threshold = 0;          // infinity: none
    bool listed = false;          // always `columns`, whatever their values
    std::vector<int32_t> columns;
};

// A matrix, and where its products go.
struct Int8Product {
    Int8Rows w;
    int values = 0;
    int64_t column = 0;
    const float* bias = nullptr;
    float factor = 1, softcap = 0;
};

// out [T, N] = codes [T, K] times W [N, K], all int8.
void int8_product(const int8_t* w, int64_t rows, int64_t cols, const int8_t* codes, int64_t tokens, int threads, int32_t* out);

}  // namespace trimtab
