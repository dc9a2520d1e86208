// Hands the words of isa/simd.h to the tests, once per instruction set.
#include "isa/simd.h"
#include "isas.h"

namespace trimtab::TRIMTAB_ISA {
namespace {

void exp(const float* x, int64_t count, float* y) {
    for (int64_t i = 0; i < count; i += lanes) store_f(y + i, exp_of(load<FV>(x + i)));
}

void fma(const float* a, const float* b, const float* c, int64_t count, float* y) {
    for (int64_t i = 0; i < count; i += lanes) store_f(y + i, fma_of(load<FV>(a + i), load<FV>(b + i), load<FV>(c + i)));
}

void halves(const uint16_t* from, int64_t count, float* y) {
    for (int64_t i = 0; i < count; i += lanes) store_f(y + i, load_halves(from + i));
}

void half_each(const uint16_t* from, int64_t count, float* y) {
    for (int64_t i = 0; i < count; ++i) y[i] = half(from[i]);
}

void half_bits_each(const float* x, int64_t count, uint16_t* y) {
    for (int64_t i = 0; i < count; ++i) y[i] = half_bits(x[i]);
}

void bf16s(const uint16_t* from, int64_t count, float* y) {
    for (int64_t i = 0; i < count; i += lanes) store_f(y + i, load_bf16s(from + i));
}

float sum(const float* x) { return sum_of(load<FV>(x)); }

float largest_of(const float* x) { return largest(load<FV>(x)); }

void fold_pairs(const uint8_t* u, const int8_t* s, int32_t* y) {
    const IV v = fold(pairs(load<BV>(u), load<CV>(s)));
    memcpy(y, &v, sizeof v);
}

void fold_signed_pairs(const int8_t* w, const int8_t* s, int32_t* y) {
    const IV v = fold(signed_pairs(load<CV>(w), load<CV>(s)));
    memcpy(y, &v, sizeof v);
}

}  // namespace

extern const Words words;
const Words words = {lanes, exp,        fma,        halves,           half_each, half_bits_each, bf16s,
                     sum,   largest_of, fold_pairs, fold_signed_pairs};

}  // namespace trimtab::TRIMTAB_ISA
