// Products of floats by addition of their bit patterns (L-Mul), and sums that are rounded after every addition.
// Legend: T tokens, K terms of a sum, N outputs.
#pragma once
#include <cstdint>

namespace trimtab {

// integer: fields are added, the carry out of the mantissa goes into the exponent. formula: (1 + sum of mantissas) times the
// power of two. exact: the product of floats.
enum class Multiply : int { integer, formula, exact };
// What a partial sum is rounded to; bits: to `sum_bits` of mantissa.
enum class Sum : int { fp32, bf16, e4m3, bits };

struct AddRule {
    Multiply multiply = Multiply::integer;
    int mantissa = 23;      // bits that operands keep
    bool nearest = false;   // operands are rounded (ties to even), else cut
    int32_t offset = 0;     // added to the fields: 2^-l of a mantissa
    int32_t low = 1 << 23;  // field of the smallest normal number; what lies below is zero
    int32_t high = 0x7f7fffff;  // field of the largest finite one; what lies above becomes it
    Sum sum = Sum::fp32;
    int sum_bits = 23;
};

struct LmulKernels {
    // y[i] = a[i] * b[i].
    void (*multiply)(const AddRule& rule, const float* a, const float* b, int64_t count, float* y);
    // Words of `scratch` that a worker's call of matmul needs.
    int64_t (*scratch)(int64_t tokens, int64_t terms);
    // y[t * y_stride + n] = sum over k in order of x[t * K + k] * w[n * w_row + k * w_col] for n in [first, last), rounded
    // after every addition. One of w_row, w_col is 1.
    void (*matmul)(const AddRule& rule, const float* x, int64_t tokens, int64_t terms, const float* w, int64_t w_row,
                   int64_t w_col, int64_t first, int64_t last, int32_t* scratch, float* y, int64_t y_stride);
    // x[i] rounded as a partial sum is.
    void (*round)(const AddRule& rule, const float* x, int64_t count, float* y);
};

constexpr int64_t lmul_outputs = 32;  // a worker's share of N is a multiple of it

const LmulKernels& lmul_kernels();  // of the instruction set in use

}  // namespace trimtab
