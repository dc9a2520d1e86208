// L-Mul: a product is one addition of bit patterns. With A, B the fields (exponent and mantissa, no sign) of both operands,
// S = A + B - (127 << 23) + offset is the field of the result, and may lie anywhere in [-125, 383) << 23: too wide for a sum
// that is compared as it stands, so the sum kept is S - (129 << 23) = A + B + offset - 2^31, which always fits.
//
// Source: Luo and Sun, Addition is All You Need, arXiv 2410.00907, equation 1; Mitchell, 1962 (without the offset).
#include "lmul.h"

#include <type_traits>

#include "isa/simd.h"

namespace trimtab::TRIMTAB_ISA {
namespace {

constexpr int32_t sign_bit = INT32_MIN, infinite = 0x7f800000, moved = 129 << 23;
constexpr int vectors = lanes == 16 ? 2 : 1;  // registers of outputs that are summed side by side
constexpr int64_t width = vectors * lanes;
constexpr int together = 4;                   // tokens that share what is loaded of w

inline int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
inline IV pick(IV mask, IV yes, IV no) { return (mask & yes) | (~mask & no); }
inline IV less(IV a, IV b) { return a < b ? a : b; }
inline IV plus(IV a, IV b) { return as<IV>(as<UV>(a) + as<UV>(b)); }  // modulo 2^32

// Fields rounded to `bits` of mantissa, ties to even; a carry goes into the exponent.
inline IV rounded(IV field, int bits) {
    const int cut = 23 - bits;
    if (cut == 0) return field;
    const IV odd = (field >> cut) & 1;
    return plus(field, odd + ((1 << (cut - 1)) - 1)) & ~((1 << cut) - 1);
}

// An operand as its product takes it: mantissa cut or rounded, below the smallest normal number zero, above the largest that one.
inline IV operand(const AddRule& rule, FV x) {
    const IV word = as<IV>(x), field = word & INT32_MAX, sign = word & sign_bit;
    const IV special = field >= infinite;
    IV kept = rule.nearest ? rounded(field, rule.mantissa) : field & ~((1 << (23 - rule.mantissa)) - 1);
    if (rule.multiply != Multiply::exact) {
        kept = less(kept, splat_i(rule.high));
        kept &= kept >= rule.low;
    }
    return pick(special, field, kept) | sign;
}

// The field of a product of finite operands, less `moved`.
template <Multiply HOW>
inline IV field_sum(IV a, IV b, int32_t offset) {
    if constexpr (HOW == Multiply::integer) return plus(plus(a, b), splat_i(offset) ^ sign_bit);
    constexpr int32_t mantissas = (1 << 23) - 1;
    const IV sum = (a & mantissas) + (b & mantissas) + offset + (1 << 23);
    const IV exponents = plus(a & infinite, b & infinite);
    return plus(plus(as<IV>(to_float(sum)), exponents), splat_i(static_cast<int32_t>(-406u << 23)));
}

// A product of operands, whatever they are: NaN of NaN, else zero of zero, else infinity of infinity.
template <Multiply HOW>
inline FV product(const AddRule& rule, IV a, IV b) {
    if constexpr (HOW == Multiply::exact) return as<FV>(a) * as<FV>(b);
    const IV sign = (a ^ b) & sign_bit;
    a &= INT32_MAX, b &= INT32_MAX;
    const IV sum = field_sum<HOW>(a, b, rule.offset);
    IV field = plus(less(sum, splat_i(rule.high - moved)), splat_i(moved)) & (sum >= rule.low - moved);
    field = pick((a == infinite) | (b == infinite), splat_i(infinite), field);
    field &= (a != 0) & (b != 0);
    field = pick((a > infinite) | (b > infinite), splat_i(0x7fc00000), field);
    return as<FV>(field | sign);
}

template <Sum TO>
inline FV summed(FV x, int bits) {
    if constexpr (TO == Sum::fp32) return x;
    const IV word = as<IV>(x), field = word & INT32_MAX, sign = word & sign_bit;
    if constexpr (TO == Sum::e4m3) {
        // Added to 1.5 * 2^20 times its power of two a number keeps 3 bits of mantissa; below 2^-6 the step stays 2^-9.
        const IV least = splat_i(121 << 23), most = splat_i(136 << 23);
        const IV power = field & infinite;
        const IV held = less(pick(power > least, power, least), most);
        const FV magic = as<FV>(held + ((20 << 23) | (1 << 22)));
        FV y = as<FV>(field);
        y = (y + magic) - magic;
        const IV cut = less(as<IV>(y), splat_i(0x43e00000));  // 448
        return as<FV>(pick(field > infinite, field, cut) | sign);
    }
    const IV kept = rounded(field, TO == Sum::bf16 ? 7 : bits);
    return as<FV>(pick(field >= infinite, field, kept) | sign);
}

// What a token brings to the sums: its field as the sum wants it, what brings the sum back (with the sign), and from where on
// a sum is no zero.
struct Term {
    int32_t field, back, low;
};

inline Term term_of(const AddRule& rule, int32_t word) {
    const int32_t field = word & INT32_MAX;
    const auto wrapped = [](uint32_t v) { return static_cast<int32_t>(v); };
    return {wrapped(static_cast<uint32_t>(field) + static_cast<uint32_t>(rule.offset) + (1u << 31)),
            wrapped(static_cast<uint32_t>(moved) + (static_cast<uint32_t>(word) & (1u << 31))), field ? rule.low - moved : INT32_MAX};
}

// `count` tokens times one tile of w, packed [K, vectors * lanes]; sums in the order of k.
template <Multiply HOW, Sum TO, int COUNT>
void sums(const AddRule& rule, const int32_t* x, const Term* terms, int64_t stride, const int32_t* w, bool finite, float* out) {
    FV sum[COUNT][vectors] = {};
    const bool quick = HOW == Multiply::integer && finite;
    const IV high = splat_i(rule.high - moved);
    for (int64_t k = 0; k < stride; ++k)
        for (int v = 0; v < vectors; ++v) {
            const IV word = load<IV>(w + (k * vectors + v) * lanes);
            if (quick) {
                const IV field = word & INT32_MAX, sign = word & sign_bit, there = field != 0;
                for (int t = 0; t < COUNT; ++t) {
                    const Term& term = terms[t * stride + k];
                    const IV s = plus(splat_i(term.field), field);
                    const IV found = plus(less(s, high), splat_i(term.back)) ^ sign;
                    sum[t][v] = summed<TO>(sum[t][v] + as<FV>(found & there & (s >= term.low)), rule.sum_bits);
                }
            } else {
                for (int t = 0; t < COUNT; ++t)
                    sum[t][v] = summed<TO>(sum[t][v] + product<HOW>(rule, splat_i(x[t * stride + k]), word), rule.sum_bits);
            }
        }
    for (int t = 0; t < COUNT; ++t)
        for (int v = 0; v < vectors; ++v) store_f(out + (t * vectors + v) * lanes, sum[t][v]);
}

bool all_finite(const int32_t* words, int64_t count) {
    bool all = true;
    for (int64_t i = 0; i < count; ++i) all &= (words[i] & INT32_MAX) < infinite;
    return all;
}

// Operands of `count` numbers; `to` has room for a whole register behind them.
void operands(const AddRule& rule, const float* from, int64_t count, int32_t* to) {
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes) store_f(reinterpret_cast<float*>(to + i), as<FV>(operand(rule, load<FV>(from + i))));
    if (i == count) return;
    float rest[lanes] = {};
    memcpy(rest, from + i, static_cast<size_t>(count - i) * 4);
    const IV last = operand(rule, load<FV>(rest));
    memcpy(to + i, &last, sizeof last);
}

// Rows [n, n + width) of w as operands [K, width]; outputs behind `last` are zero.
void pack(const AddRule& rule, const float* w, int64_t terms, int64_t w_row, int64_t w_col, int64_t n, int64_t last, int32_t* row, int32_t* to) {
    const int64_t there = lesser(width, last - n);
    if (w_col == 1) {
        for (int64_t j = 0; j < width; ++j) {
            if (j < there) operands(rule, w + (n + j) * w_row, terms, row);
            for (int64_t k = 0; k < terms; ++k) to[k * width + j] = j < there ? row[k] : 0;
        }
        return;
    }
    for (int64_t k = 0; k < terms; ++k) {
        operands(rule, w + k * w_col + n, there, row);
        for (int64_t j = 0; j < width; ++j) to[k * width + j] = j < there ? row[j] : 0;
    }
}

int64_t scratch_words(int64_t tokens, int64_t terms) {
    constexpr int64_t per_term = 1 + sizeof(Term) / 4;  // the operand, and what it brings
    return per_term * tokens * terms + terms * width + terms + width + 2 * lanes;
}

template <Multiply HOW, Sum TO>
void matmul_of(const AddRule& rule, const float* x, int64_t tokens, int64_t terms, const float* w, int64_t w_row, int64_t w_col,
               int64_t first, int64_t last, int32_t* scratch, float* y, int64_t y_stride) {
    auto* brought = reinterpret_cast<Term*>(scratch);
    int32_t* words = scratch + tokens * terms * static_cast<int64_t>(sizeof(Term) / 4);
    int32_t *tile = words + tokens * terms + lanes, *row = tile + terms * width;
    operands(rule, x, tokens * terms, words);
    const bool finite = all_finite(words, tokens * terms);
    if (HOW == Multiply::integer && finite)
        for (int64_t i = 0; i < tokens * terms; ++i) brought[i] = term_of(rule, words[i]);
    float out[together * width];
    for (int64_t n = first; n < last; n += width) {
        pack(rule, w, terms, w_row, w_col, n, last, row, tile);
        const bool quick = finite && all_finite(tile, terms * width);
        for (int64_t t = 0; t < tokens;) {
            const int64_t some = tokens - t >= together ? together : 1;
            const auto of = some == together ? sums<HOW, TO, together> : sums<HOW, TO, 1>;
            of(rule, words + t * terms, brought + t * terms, terms, tile, quick, out);
            for (int64_t i = 0; i < some; ++i)
                memcpy(y + (t + i) * y_stride + n, out + i * width, static_cast<size_t>(lesser(width, last - n)) * 4);
            t += some;
        }
    }
}

// f(a constant that says how), so that inner loops do not ask.
template <class F>
void with_sum(const AddRule& rule, F f) {
    switch (rule.sum) {
        case Sum::fp32: return f(std::integral_constant<Sum, Sum::fp32>());
        case Sum::bf16: return f(std::integral_constant<Sum, Sum::bf16>());
        case Sum::e4m3: return f(std::integral_constant<Sum, Sum::e4m3>());
        case Sum::bits: return f(std::integral_constant<Sum, Sum::bits>());
    }
}

template <class F>
void with_product(const AddRule& rule, F f) {
    switch (rule.multiply) {
        case Multiply::integer: return f(std::integral_constant<Multiply, Multiply::integer>());
        case Multiply::formula: return f(std::integral_constant<Multiply, Multiply::formula>());
        case Multiply::exact: return f(std::integral_constant<Multiply, Multiply::exact>());
    }
}

void multiply(const AddRule& rule, const float* a, const float* b, int64_t count, float* y) {
    with_product(rule, [&](auto how) {
        for (int64_t i = 0; i < count; i += lanes) {
            float left[lanes] = {}, right[lanes] = {}, out[lanes];
            const int64_t some = lesser(lanes, count - i);
            memcpy(left, a + i, static_cast<size_t>(some) * 4), memcpy(right, b + i, static_cast<size_t>(some) * 4);
            const IV first = operand(rule, load<FV>(left)), second = operand(rule, load<FV>(right));
            store_f(out, product<decltype(how)::value>(rule, first, second));
            memcpy(y + i, out, static_cast<size_t>(some) * 4);
        }
    });
}

void matmul(const AddRule& rule, const float* x, int64_t tokens, int64_t terms, const float* w, int64_t w_row, int64_t w_col,
            int64_t first, int64_t last, int32_t* scratch, float* y, int64_t y_stride) {
    with_product(rule, [&](auto how) {
        with_sum(rule, [&](auto to) {
            matmul_of<decltype(how)::value, decltype(to)::value>(rule, x, tokens, terms, w, w_row, w_col, first, last, scratch, y,
                                                                 y_stride);
        });
    });
}

void round(const AddRule& rule, const float* x, int64_t count, float* y) {
    with_sum(rule, [&](auto to) {
        for (int64_t i = 0; i < count; i += lanes) {
            float in[lanes] = {}, out[lanes];
            const auto some = static_cast<size_t>(lesser(lanes, count - i)) * 4;
            memcpy(in, x + i, some);
            store_f(out, summed<decltype(to)::value>(load<FV>(in), rule.sum_bits));
            memcpy(y + i, out, some);
        }
    });
}

}  // namespace

extern const LmulKernels lmul_table;
const LmulKernels lmul_table = {multiply, scratch_words, matmul, round};

}  // namespace trimtab::TRIMTAB_ISA
