// Products of codes in units of 32 columns with int8 inputs, whatever the codes stand for. A VALUE turns codes as they are read into
// the bytes that are multiplied:
//   bits       of a code
//   steps      how many products of two bytes each a sum of 16 bits holds
//   negative   its bytes are signed; else they are not
//   shift      what has been taken from codes that are signed bytes by now
//   split      its bytes lie beyond int8: VALUE::high yields eighths of what is left
//   enter      what depends on the group
//   of         the bytes of 4 columns of the rows of a part
//   zero       what stands for 0
#pragma once
#include <type_traits>
#include <utility>

#include "isa/simd.h"
#include "native/native.h"

namespace trimtab::TRIMTAB_ISA {
namespace {

constexpr int parts = tile_rows / lanes;  // registers that hold one column of a tile
// Bytes between what is read and what is asked for: the latency of memory times what one core reads, about 120 ns at 45 GB/s on
// the fastest machine tried. 2 KiB lost a sixth there; 12 KiB and more were slower again.
constexpr int64_t ahead = 6144;

// Holds a sum in its register: left alone, GCC keeps all products of an unrolled loop alive, in memory, and adds them last.
template <class V>
inline void keep([[maybe_unused]] V& v) {
#if defined(__AVX2__)
    asm("" : "+x"(v));
#endif
}

// Reads the codes of one part, four columns after four: 4 i .. 4 i + 3 of every row as bytes. A vector that holds several fours is
// loaded with the first of them and stays in its register: read for each of them, loads and not products would set the pace.
template <int BITS>
struct Codes {
    WV four, two, one;

    // Part of the unit at `at`; i < 8 counts fours of columns inside it, FRESH: the first that is asked for.
    template <int I, bool FRESH>
    inline __attribute__((always_inline)) BV get(const uint8_t* at) {
        if constexpr (BITS == 8) return load<BV>(at + I * 64);
        BV found = {};
        int shift = 0;
        if constexpr (BITS & 4) {
            if constexpr (FRESH || I % 2 == 0) four = load<WV>(at + (I / 2) * 64), keep(four);
            found = as<BV>((I % 2 ? four >> 4 : four) & 0x0f0f);
            at += 4 * 64, shift = 4;
        }
        if constexpr (BITS & 2) {
            if constexpr (FRESH || I % 4 == 0) two = load<WV>(at + (I / 4) * 64), keep(two);
            constexpr int by = 2 * (I % 4);
            if (shift)
                found |= as<BV>((by >= 4 ? two >> (by - 4) : two << (4 - by)) & 0x3030);
            else
                found = as<BV>((two >> by) & 0x0303);
            at += 2 * 64, shift += 2;
        }
        if constexpr (BITS & 1) {
            if constexpr (FRESH || I == 0) one = load<WV>(at), keep(one);
            constexpr int by = I - (BITS & 6);  // BITS & 6 is `shift`, as a constant also where a sanitizer watches shifts
            constexpr uint16_t mask = 0x0101 << (BITS & 6);
            found |= as<BV>((by >= 0 ? one >> by : one << -by) & mask);
        }
        return found;
    }
};

template <class F, int... I>
inline __attribute__((always_inline)) void each(F&& f, std::integer_sequence<int, I...>) {
    (f(std::integral_constant<int, I>{}), ...);
}

// Calls f(bits) with the number as a constant.
template <class F>
inline void with_bits(int bits, F&& f) {
    switch (bits) {
        case 1: return f(std::integral_constant<int, 1>{});
        case 2: return f(std::integral_constant<int, 2>{});
        case 3: return f(std::integral_constant<int, 3>{});
        case 4: return f(std::integral_constant<int, 4>{});
        case 5: return f(std::integral_constant<int, 5>{});
        case 6: return f(std::integral_constant<int, 6>{});
        case 7: return f(std::integral_constant<int, 7>{});
        default: return f(std::integral_constant<int, 8>{});
    }
}

#if defined(__AVX512VNNI__)
constexpr bool signed_bytes = false;
#else
constexpr bool signed_bytes = true;  // bytes of more than 7 bits are taken as signed: unsigned ones would leave int16
#endif

// Codes that count from the least value up.
template <int BITS>
struct Counted {
    // int16 sums of 2 * (2^bits - 1) * 127 a step stay in range this many steps.
    static constexpr int bits = BITS, steps = BITS <= 2 ? 16 : BITS <= 4 ? 8 : BITS == 5 ? 4 : BITS == 6 ? 2 : 1;
    static constexpr bool negative = BITS == 8 && signed_bytes, split = false;
    static constexpr int shift = negative ? 128 : 0;

    explicit Counted(const Tiles&) {}
    void enter(const Tiles&, int64_t, int64_t) {}
    BV of(BV codes, int) const { return negative ? codes ^ static_cast<uint8_t>(0x80) : codes; }
    static float zero(const Tiles& w) { return w.bipolar ? 0.5f * ((1 << BITS) - 1) : static_cast<float>(1 << (BITS - 1)); }
};

// acc[p][t] = sum of value * x[t] for the rows of part p over FOURS fours of columns, from four FIRST of the unit on; over two
// units if FOURS is 16. Every broadcast of x serves all parts: without that, loads and not products set the pace.
template <int FIRST, int FOURS, class VALUE, int T>
inline __attribute__((always_inline)) void sum_fours(const VALUE& value, const uint8_t* unit, const int8_t* const (&x)[T],
                                                     IV (&acc)[parts][T]) {
    constexpr int bits = VALUE::bits;
#if defined(__AVX512VNNI__)
    // A sum of products waits four cycles for the one before it, and two are done a cycle.
    constexpr int chains = T >= 8 ? 1 : T >= 4 ? 2 : 4;
    IV sum[chains][T];
    Codes<bits> read;
    auto step = [&](auto index) __attribute__((always_inline)) {
        constexpr int i = decltype(index)::value, c = i % chains;
        const BV codes = value.of(read.template get<(FIRST + i) % 8, i == 0>(unit + (FIRST + i) / 8 * 64 * bits), 0);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t)
            sum[c][t] = as<IV>(_mm512_dpbusd_epi32(i >= chains ? as<__m512i>(sum[c][t]) : _mm512_setzero_si512(), as<__m512i>(codes),
                                                   as<__m512i>(splat_4(x[t] + 4 * i))));
        if constexpr (i == FOURS - 1) {
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) {
                acc[0][t] = sum[0][t];
#pragma GCC unroll 4
                for (int j = 1; j < chains; ++j) acc[0][t] += sum[j][t];
            }
        }
    };
#else
    constexpr int most = VALUE::steps;
    SV sum[parts][T];
    Codes<bits> read[parts];
    auto step = [&](auto index) __attribute__((always_inline)) {
        constexpr int i = decltype(index)::value, place = i % most;
        BV codes[parts];
#pragma GCC unroll 2
        for (int p = 0; p < parts; ++p)
            codes[p] = value.of(read[p].template get<(FIRST + i) % 8, i == 0>(unit + (FIRST + i) / 8 * 64 * bits + p * 4 * lanes), p);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
            const CV four = splat_4(x[t] + 4 * i);
#pragma GCC unroll 2
            for (int p = 0; p < parts; ++p) {
                const SV product = VALUE::negative ? signed_pairs(as<CV>(codes[p]), four) : pairs(codes[p], four);
                sum[p][t] = place ? sum[p][t] + product : product;
                keep(sum[p][t]);
            }
        }
        if constexpr (place == most - 1 || i == FOURS - 1) {
#pragma GCC unroll 2
            for (int p = 0; p < parts; ++p)
#pragma GCC unroll 8
                for (int t = 0; t < T; ++t) acc[p][t] = i < most ? fold(sum[p][t]) : acc[p][t] + fold(sum[p][t]);
        }
    };
#endif
    each(step, std::make_integer_sequence<int, FOURS>{});
}

template <int FIRST, int FOURS, class VALUE, int T>
inline __attribute__((always_inline)) void dot_fours(const VALUE& value, const uint8_t* unit, const int8_t* const (&x)[T],
                                                     IV (&acc)[parts][T]) {
    sum_fours<FIRST, FOURS>(value, unit, x, acc);
    if constexpr (VALUE::split) {
        IV eighths[parts][T];
        sum_fours<FIRST, FOURS>(value.high, unit, x, eighths);
#pragma GCC unroll 2
        for (int p = 0; p < parts; ++p)
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) acc[p][t] += eighths[p][t] * 8;
    }
}

// Act group `a` of FOURS fours: half of a unit where these are four.
template <int FOURS, class VALUE, int T>
inline __attribute__((always_inline)) void dot_group(const VALUE& value, const uint8_t* unit, int64_t a, const int8_t* const (&x)[T],
                                                     IV (&acc)[parts][T]) {
    if (FOURS == 4 && (a & 1))
        dot_fours<FOURS == 4 ? 4 : 0, FOURS>(value, unit, x, acc);
    else
        dot_fours<0, FOURS>(value, unit, x, acc);
}

// Scale and minimum of one group for the rows of one part.
inline void scales_of(const Tiles& w, int64_t tile, int64_t g, int part, FV& scale, FV& minimum) {
    const int row = part * lanes;
    const int64_t blocks = w.padded() / 256;
    if (w.scales == Scales::q4_k) {
        const int64_t block = tile * blocks + g / 8;
        const uint8_t* sub = w.sub + (block * 16 + g % 8) * 16 + row;
        scale = load_halves(w.scale + block * 32 + row) * load_u8s(sub);
        minimum = -(load_halves(w.scale + block * 32 + 16 + row) * load_u8s(sub + 8 * 16));
        return;
    }
    if (w.scales == Scales::q6_k) {
        const int64_t block = tile * blocks + g / 16;
        const int8_t* sub = reinterpret_cast<const int8_t*>(w.sub) + (block * 16 + g % 16) * 16 + row;
        scale = load_halves(w.scale + block * 16 + row) * load_i8s(sub);
        return;
    }
    const int64_t at = (tile * w.groups() + g) * 16 + row;
    if (w.scales == Scales::stepped) {
        scale = load_halves(w.scale + tile * 16 + row) * load_u8s(w.sub + at);
    } else if (w.scales == Scales::powers) {
        const IV exponent = __builtin_convertvector(load_u8s(w.sub + at), IV);
        scale = as<FV>(exponent << 23 | ((exponent == 0) & 1 << 22));  // 2^-127 is subnormal
    } else {
        scale = load_halves(w.scale + at);
    }
    if (w.minimum) minimum = load_halves(w.minimum + at);
    if (w.bipolar) scale += scale;
}

// Scales, and minima where there are any, of group after group of one tile.
template <Scales KIND>
struct ScaleReader {
    const Tiles& w;
    const uint16_t *scale, *minimum;
    const uint8_t* sub;
    int64_t tile, g = 0;
    const bool plain;

    ScaleReader(const Tiles& w, int64_t tile) : w(w), tile(tile), plain(w.scales == Scales::half && !w.bipolar) {
        const int64_t at = tile * (KIND == Scales::half ? w.groups() : w.padded() / 256) * 16;
        scale = w.scale + at * (KIND == Scales::q4_k ? 2 : 1);
        minimum = w.minimum ? w.minimum + at : nullptr;
        sub = w.sub + at * 16;
    }
    void read(int part, FV& s, FV& m) const {
        const int row = part * lanes;
        if constexpr (KIND == Scales::half) {
            if (!plain) return scales_of(w, tile, g, part, s, m);
            s = load_halves(scale + row);
            if (minimum) m = load_halves(minimum + row);
        } else if constexpr (KIND == Scales::q4_k) {
            s = load_halves(scale + row) * load_u8s(sub + row);
            m = -(load_halves(scale + 16 + row) * load_u8s(sub + 8 * 16 + row));
        } else {
            s = load_halves(scale + row) * load_i8s(reinterpret_cast<const int8_t*>(sub) + row);
        }
    }
    void next() {
        ++g;
        if constexpr (KIND == Scales::half) {
            scale += 16;
            if (minimum) minimum += 16;
        } else if constexpr (KIND == Scales::q4_k) {
            sub += g % 8 ? 16 : 16 + 8 * 16;
            if (g % 8 == 0) scale += 32;
        } else {
            sub += 16;
            if (g % 16 == 0) scale += 16;
        }
    }
};

// One tile times T tokens: FOURS fours of columns share an activation scale. once: the tile serves these tokens alone.
template <class VALUE, int FOURS, int T, Scales KIND>
void dot_ints(const Tiles& w, int64_t tile, const Input& in, int64_t t0, bool once, float* out) {
    constexpr int cols = 4 * FOURS, act_bytes = cols * 2 * VALUE::bits;  // bytes of a tile's codes in one act group
    const int64_t groups = w.groups(), acts = in.stride / cols, per_group = w.group / cols;
    const int64_t summed = (in.stride + in.group - 1) / in.group;  // groups of the padded input
    const bool centred = KIND == Scales::q6_k || (KIND == Scales::half && w.minimum == nullptr);
    const float zero = (centred ? VALUE::zero(w) : 0.0f) - static_cast<float>(VALUE::shift);
    VALUE value(w);
    ScaleReader<KIND> reader(w, tile);
    const uint8_t* codes = w.data + tile * w.data_bytes();
    const int8_t* x[T];
    const float *scales[T], *sums[T];
    FV total[parts][T];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
        x[t] = in.codes + (t0 + t) * in.stride, scales[t] = in.scale + (t0 + t) * acts, sums[t] = in.sum + (t0 + t) * summed;
#pragma GCC unroll 2
        for (int p = 0; p < parts; ++p) total[p][t] = FV{};
    }
    int64_t a = 0;
    for (int64_t g = 0; g < groups; ++g) {
        FV group_sum[parts][T];
#pragma GCC unroll 2
        for (int p = 0; p < parts; ++p)
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) group_sum[p][t] = FV{};
        value.enter(w, tile, g);
        const int64_t end = a + per_group < acts ? a + per_group : acts;
        for (; a < end; ++a) {
#pragma GCC unroll 16
            for (int line = 0; line < act_bytes; line += 64) prefetch(codes + ahead + line, once);
            IV acc[parts][T];
            dot_group<FOURS>(value, codes, a, x, acc);
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) {
#pragma GCC unroll 2
                for (int p = 0; p < parts; ++p)
                    group_sum[p][t] = fma_of(to_float(acc[p][t]), splat_f(scales[t][a]), group_sum[p][t]);
                x[t] += cols;
            }
            if (FOURS > 4)
                codes += act_bytes;
            else if (a & 1)
                codes += 2 * act_bytes;
        }
#pragma GCC unroll 2
        for (int p = 0; p < parts; ++p) {
            FV scale, minimum = {};
            reader.read(p, scale, minimum);
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) {
                const FV sum = splat_f(sums[t][g]);
                if (centred || VALUE::shift) group_sum[p][t] = fma_of(splat_f(-zero), sum, group_sum[p][t]);
                total[p][t] = fma_of(scale, group_sum[p][t], total[p][t]);
                if (!centred) total[p][t] = fma_of(minimum, sum, total[p][t]);
            }
        }
        reader.next();
    }
#pragma GCC unroll 2
    for (int p = 0; p < parts; ++p)
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) store_f(out + t * 16 + p * lanes, total[p][t]);
}

// What the second codes of act group `a` of T tokens add to their products with a tile: rows t of in and rows to of out.
template <int FOURS, int T, class VALUE>
inline void add_second(VALUE& value, const Tiles& w, int64_t tile, const Input& in, int64_t a, const int64_t* t, const int64_t* to,
                       float* out) {
    constexpr int cols = 4 * FOURS;
    const uint8_t* unit = w.data + tile * w.data_bytes() + a * cols / unit_cols * 64 * VALUE::bits;
    value.enter(w, tile, a * cols / w.group);
    const int8_t* x[T];
#pragma GCC unroll 4
    for (int i = 0; i < T; ++i) x[i] = in.second + t[i] * in.stride + a * cols;
    IV acc[parts][T];
    dot_group<FOURS>(value, unit, a, x, acc);
#pragma GCC unroll 2
    for (int p = 0; p < parts; ++p) {
        FV scale = {}, minimum = {};
        scales_of(w, tile, a * cols / w.group, p, scale, minimum);
#pragma GCC unroll 4
        for (int i = 0; i < T; ++i) {
            float* at = out + to[i] * 16 + p * lanes;
            store_f(at, fma_of(scale, to_float(acc[p][i]) * in.second_scale[t[i] * in.acts() + a], load<FV>(at)));
        }
    }
}

// The same of all groups of `tokens` <= 64 tokens: out [tokens, 16].
template <class VALUE, int FOURS>
void add_twice(const Tiles& w, int64_t tile, const Input& in, int64_t t0, int64_t tokens, float* out) {
    VALUE value(w);
    if (tokens == 1) {
        const int64_t zero = 0;
        const int32_t* listed = in.listed(t0);
        for (int32_t i = 1; i <= listed[0]; ++i) add_second<FOURS, 1>(value, w, tile, in, listed[i], &t0, &zero, out);
        return;
    }
    // Group after group, so that its codes are unpacked once for all tokens that have it listed: bit t of its mask.
    constexpr int64_t together = 128;
    for (int64_t first = 0; first < in.acts(); first += together) {
        uint64_t masks[together] = {};
        for (int64_t t = 0; t < tokens; ++t) {
            const int32_t* listed = in.listed(t0 + t);
            for (int32_t i = 1; i <= listed[0]; ++i)
                if (listed[i] >= first && listed[i] < first + together) masks[listed[i] - first] |= uint64_t{1} << t;
        }
        for (int64_t a = first; a < first + together && a < in.acts(); ++a) {
            int64_t t[4], to[4];
            int n = 0;
            for (uint64_t mask = masks[a - first]; mask; mask &= mask - 1) {
                to[n] = __builtin_ctzll(mask), t[n] = t0 + to[n];
                if (++n < 4) continue;
                add_second<FOURS, 4>(value, w, tile, in, a, t, to, out);
                n = 0;
            }
            for (int i = 0; i < n; ++i) add_second<FOURS, 1>(value, w, tile, in, a, t + i, to + i, out);
        }
    }
}

template <class VALUE>
void add_twice(const Tiles& w, int64_t tile, const Input& in, int64_t t0, int64_t tokens, float* out) {
    switch (in.act_group) {
        case 64: return add_twice<VALUE, 16>(w, tile, in, t0, tokens, out);
        case 32: return add_twice<VALUE, 8>(w, tile, in, t0, tokens, out);
        default: return add_twice<VALUE, 4>(w, tile, in, t0, tokens, out);
    }
}

template <class VALUE, int T>
void dot_acts(const Tiles& w, int64_t tile, const Input& in, int64_t t0, bool once, float* out) {
    switch (in.act_group) {
        case 64: return dot_ints<VALUE, 16, T, Scales::half>(w, tile, in, t0, once, out);
        case 32: return dot_ints<VALUE, 8, T, Scales::half>(w, tile, in, t0, once, out);
        default: return dot_ints<VALUE, 4, T, Scales::half>(w, tile, in, t0, once, out);
    }
}

// Calls f(T, t) for blocks of 8, 4, 2 and 1 tokens.
template <class F>
inline void halving_blocks(int64_t tokens, F&& f) {
    int64_t t = 0;
    if constexpr (lanes == 16)  // 32 registers hold the sums of eight tokens
        for (; t + 8 <= tokens; t += 8) f(std::integral_constant<int, 8>{}, t);
    for (; t + 4 <= tokens; t += 4) f(std::integral_constant<int, 4>{}, t);
    for (; t + 2 <= tokens; t += 2) f(std::integral_constant<int, 2>{}, t);
    for (; t < tokens; ++t) f(std::integral_constant<int, 1>{}, t);
}

// Columns j, j + 1, .. of four as floats, less what `zero` takes away.
template <class VALUE>
inline void floats_of(const VALUE& value, BV codes, int part, FV (&v)[4]) {
    const BV bytes = value.of(codes, part);
    for (int j = 0; j < 4; ++j)
        v[j] = to_float(VALUE::negative ? as<IV>(as<UV>(bytes) << (24 - 8 * j)) >> 24 : as<IV>((as<UV>(bytes) >> (8 * j)) & 255u));
    if constexpr (VALUE::split) {
        FV eighths[4];
        floats_of(value.high, codes, part, eighths);
        for (int j = 0; j < 4; ++j) v[j] += eighths[j] * 8.0f;
    }
}

// Columns 32 u .. 32 u + 31 of a tile as floats [32, 16].
template <class VALUE>
void decode_unit(const Tiles& w, int64_t tile, int64_t u, float* out) {
    const uint8_t* unit = w.data + tile * w.data_bytes() + u * 64 * VALUE::bits;
    const float zero = (w.minimum == nullptr && w.scales != Scales::q4_k ? VALUE::zero(w) : 0.0f) - static_cast<float>(VALUE::shift);
    VALUE value(w);
    for (int part = 0; part < parts; ++part) {
        FV scale = {}, minimum = {};
        int64_t held = -1;  // group whose scales are at hand
        Codes<VALUE::bits> read;
        each(
            [&](auto index) {
                constexpr int i = decltype(index)::value;
                const int64_t at = (u * 32 + 4 * i) / w.group, g = at < w.groups() ? at : w.groups() - 1;  // padding has none
                if (g != held) scales_of(w, tile, g, part, scale, minimum), value.enter(w, tile, g);
                held = g;
                FV v[4];
                floats_of(value, read.template get<i, i == 0>(unit + part * 4 * lanes), part, v);
                for (int j = 0; j < 4; ++j) store_f(out + (4 * i + j) * 16 + part * lanes, (v[j] - zero) * scale + minimum);
            },
            std::make_integer_sequence<int, 8>{});
    }
}

}  // namespace
}  // namespace trimtab::TRIMTAB_ISA
