// Products with tiles, compiled once per instruction set.
#include <type_traits>
#include <utility>

#include "isa/simd.h"
#include "native/native.h"

namespace trimtab::TRIMTAB_ISA {

void lookup_tile(const Tiles& w, int64_t tile, const Input& in, int64_t t0, int64_t tokens, float* out);  // lookup.cpp
void tabulate(const Input& in, int64_t t, const float* x, int64_t cols);
void decode_tile(const Tiles& w, int64_t tile, float* out);

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

// ------------------------------------------------------------------------------------------------------------ floats

template <Coding CODING>
inline FV load_column(const uint8_t* tile, int64_t k, int part) {
    if constexpr (CODING == Coding::f32) return load<FV>(reinterpret_cast<const float*>(tile) + k * 16 + part * lanes);
    return load_halves(reinterpret_cast<const uint16_t*>(tile) + k * 16 + part * lanes);
}

// Columns `at` .. of one tile times T tokens into sums of chain c: one column, or two of bf16.
template <Coding CODING, int T>
inline __attribute__((always_inline)) void add_column(const uint8_t* data, int64_t at, const float* const (&x)[T],
                                                      FV (&sum)[T][parts]) {
#pragma GCC unroll 2
    for (int p = 0; p < parts; ++p) {
        if constexpr (CODING == Coding::bf16) {
            const UV both = load<UV>(data + at * 64 + p * 4 * lanes);
            const FV first = as<FV>(both << 16), second = as<FV>(both & 0xffff0000u);
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) {
                sum[t][p] = fused(first, splat_f(x[t][2 * at]), sum[t][p]);
                sum[t][p] = fused(second, splat_f(x[t][2 * at + 1]), sum[t][p]);
                keep(sum[t][p]);
            }
        } else {
            const FV column = load_column<CODING>(data, at, p);
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) {
                sum[t][p] = fused(column, splat_f(x[t][at]), sum[t][p]);
                keep(sum[t][p]);
            }
        }
    }
}

template <Coding CODING, int T>
void dot_float(const Tiles& w, int64_t tile, const Input& in, int64_t t0, bool once, float* out) {
    const uint8_t* data = w.data + tile * w.data_bytes();
    const float* x[T];
    constexpr int chains = T >= 4 ? 1 : T >= 2 ? 2 : 4;  // a multiply-add waits four cycles for the one before
    FV sum[chains][T][parts];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
        x[t] = in.x + (t0 + t) * in.stride;
#pragma GCC unroll 4
        for (int c = 0; c < chains; ++c)
#pragma GCC unroll 2
            for (int p = 0; p < parts; ++p) sum[c][t][p] = FV{};
    }
    constexpr int64_t step_bytes = CODING == Coding::f16 ? 32 : 64;
    const int64_t steps = CODING == Coding::bf16 ? w.padded() / 2 : w.padded();
    int64_t k = 0;
    for (; k + 4 <= steps; k += 4) {
#pragma GCC unroll 4
        for (int64_t line = 0; line < 4 * step_bytes; line += 64) prefetch(data + k * step_bytes + ahead + line, once);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) add_column<CODING, T>(data, k + i, x, sum[i % chains]);
    }
    for (; k < steps; ++k) add_column<CODING, T>(data, k, x, sum[0]);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
        for (int p = 0; p < parts; ++p) {
            FV all = sum[0][t][p];
            for (int c = 1; c < chains; ++c) all += sum[c][t][p];
            store_f(out + t * 16 + p * lanes, all);
        }
}

// -------------------------------------------------------------------------------------------------------------- ints

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
constexpr bool signed_bytes = true;  // 8-bit codes are taken as signed: unsigned ones would leave int16
#endif

// acc[p][t] = sum of code * x[t] for the rows of part p over FOURS fours of columns, from four FIRST of the unit on; over two
// units if FOURS is 16. Every broadcast of x serves all parts: without that, loads and not products set the pace.
template <int BITS, int FIRST, int FOURS, int T>
inline __attribute__((always_inline)) void dot_fours(const uint8_t* unit, const int8_t* const (&x)[T], IV (&acc)[parts][T]) {
#if defined(__AVX512VNNI__)
    // A sum of products waits four cycles for the one before it, and two are done a cycle.
    constexpr int chains = T >= 8 ? 1 : T >= 4 ? 2 : 4;
    IV sum[chains][T];
    Codes<BITS> read;
    auto step = [&](auto index) __attribute__((always_inline)) {
        constexpr int i = decltype(index)::value, c = i % chains;
        const BV codes = read.template get<(FIRST + i) % 8, i == 0>(unit + (FIRST + i) / 8 * 64 * BITS);
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
    // int16 sums of 2 * (2^bits - 1) * 127 a step stay in range this many steps.
    constexpr int most = BITS <= 2 ? 16 : BITS <= 4 ? 8 : BITS == 5 ? 4 : BITS == 6 ? 2 : 1;
    SV sum[parts][T];
    Codes<BITS> read[parts];
    auto step = [&](auto index) __attribute__((always_inline)) {
        constexpr int i = decltype(index)::value, place = i % most;
        BV codes[parts];
#pragma GCC unroll 2
        for (int p = 0; p < parts; ++p)
            codes[p] = read[p].template get<(FIRST + i) % 8, i == 0>(unit + (FIRST + i) / 8 * 64 * BITS + p * 4 * lanes);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
            const CV four = splat_4(x[t] + 4 * i);
#pragma GCC unroll 2
            for (int p = 0; p < parts; ++p) {
                const SV product =
                    BITS == 8 ? signed_pairs(as<CV>(codes[p] ^ static_cast<uint8_t>(0x80)), four) : pairs(codes[p], four);
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

// Scales, and minima where there are any, of group after group of one tile.
template <Scales KIND>
struct ScaleReader {
    const uint16_t *scale, *minimum;
    const uint8_t* sub;
    int64_t g = 0;

    ScaleReader(const Tiles& w, int64_t tile) {
        const int64_t at = tile * (KIND == Scales::half ? w.groups() : w.padded() / 256) * 16;
        scale = w.scale + at * (KIND == Scales::q4_k ? 2 : 1);
        minimum = w.minimum ? w.minimum + at : nullptr;
        sub = w.sub + at * 16;
    }
    void read(int part, FV& s, FV& m) const {
        const int row = part * lanes;
        if constexpr (KIND == Scales::half) {
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
template <int BITS, int FOURS, int T, Scales KIND>
void dot_ints(const Tiles& w, int64_t tile, const Input& in, int64_t t0, bool once, float* out) {
    constexpr int cols = 4 * FOURS, act_bytes = cols * 2 * BITS;  // bytes of a tile's codes in one act group
    const int64_t groups = w.groups(), acts = in.stride / cols, per_group = w.group / cols;
    const int64_t summed = (in.stride + in.group - 1) / in.group;  // groups of the padded input
    const bool centred = KIND == Scales::q6_k || (KIND == Scales::half && w.minimum == nullptr);
    const float zero = (centred ? static_cast<float>(1 << (BITS - 1)) : 0.0f) - (BITS == 8 && signed_bytes ? 128.0f : 0.0f);
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
        const int64_t end = a + per_group < acts ? a + per_group : acts;
        for (; a < end; ++a) {
#pragma GCC unroll 16
            for (int line = 0; line < act_bytes; line += 64) prefetch(codes + ahead + line, once);
            IV acc[parts][T];
            if (FOURS == 4 && (a & 1))
                dot_fours<BITS, FOURS == 4 ? 4 : 0, FOURS, T>(codes, x, acc);
            else
                dot_fours<BITS, 0, FOURS, T>(codes, x, acc);
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
                if (centred || BITS == 8) group_sum[p][t] = fma_of(splat_f(-zero), sum, group_sum[p][t]);
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

// Scale and minimum of one group for the rows of one part.
inline void scales_of(const Tiles& w, int64_t tile, int64_t g, int part, FV& scale, FV& minimum) {
    const int row = part * lanes;
    if (w.scales == Scales::half) {
        const int64_t at = (tile * w.groups() + g) * 16 + row;
        scale = load_halves(w.scale + at);
        if (w.minimum) minimum = load_halves(w.minimum + at);
        return;
    }
    const int64_t blocks = w.padded() / 256;
    if (w.scales == Scales::q4_k) {
        const int64_t block = tile * blocks + g / 8;
        const uint8_t* sub = w.sub + (block * 16 + g % 8) * 16 + row;
        scale = load_halves(w.scale + block * 32 + row) * load_u8s(sub);
        minimum = -(load_halves(w.scale + block * 32 + 16 + row) * load_u8s(sub + 8 * 16));
        return;
    }
    const int64_t block = tile * blocks + g / 16;
    const int8_t* sub = reinterpret_cast<const int8_t*>(w.sub) + (block * 16 + g % 16) * 16 + row;
    scale = load_halves(w.scale + block * 16 + row) * load_i8s(sub);
}

// What the second codes of act group `a` of T tokens add to their products with a tile: rows t of in and rows to of out.
template <int BITS, int FOURS, int T>
inline void add_second(const Tiles& w, int64_t tile, const Input& in, int64_t a, const int64_t* t, const int64_t* to, float* out) {
    constexpr int cols = 4 * FOURS;
    const uint8_t* unit = w.data + tile * w.data_bytes() + a * cols / unit_cols * 64 * BITS;
    const int8_t* x[T];
#pragma GCC unroll 4
    for (int i = 0; i < T; ++i) x[i] = in.second + t[i] * in.stride + a * cols;
    IV acc[parts][T];
    if (FOURS == 4 && (a & 1))
        dot_fours<BITS, FOURS == 4 ? 4 : 0, FOURS, T>(unit, x, acc);
    else
        dot_fours<BITS, 0, FOURS, T>(unit, x, acc);
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
template <int BITS, int FOURS>
void add_twice(const Tiles& w, int64_t tile, const Input& in, int64_t t0, int64_t tokens, float* out) {
    if (tokens == 1) {
        const int64_t zero = 0;
        const int32_t* listed = in.listed(t0);
        for (int32_t i = 1; i <= listed[0]; ++i) add_second<BITS, FOURS, 1>(w, tile, in, listed[i], &t0, &zero, out);
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
                add_second<BITS, FOURS, 4>(w, tile, in, a, t, to, out);
                n = 0;
            }
            for (int i = 0; i < n; ++i) add_second<BITS, FOURS, 1>(w, tile, in, a, t + i, to + i, out);
        }
    }
}

template <int BITS>
void add_twice(const Tiles& w, int64_t tile, const Input& in, int64_t t0, int64_t tokens, float* out) {
    switch (in.act_group) {
        case 64: return add_twice<BITS, 16>(w, tile, in, t0, tokens, out);
        case 32: return add_twice<BITS, 8>(w, tile, in, t0, tokens, out);
        default: return add_twice<BITS, 4>(w, tile, in, t0, tokens, out);
    }
}

void add_twice(const Tiles& w, int64_t tile, const Input& in, int64_t t0, int64_t tokens, float* out) {
    with_bits(w.bits, [&](auto bits) { add_twice<decltype(bits)::value>(w, tile, in, t0, tokens, out); });
}

template <int BITS, int T>
void dot_bits(const Tiles& w, int64_t tile, const Input& in, int64_t t0, bool once, float* out) {
    if constexpr (BITS == 4 || BITS == 5)
        if (w.scales == Scales::q4_k) return dot_ints<BITS, 8, T, Scales::q4_k>(w, tile, in, t0, once, out);
    if constexpr (BITS == 6)
        if (w.scales == Scales::q6_k) return dot_ints<BITS, 4, T, Scales::q6_k>(w, tile, in, t0, once, out);
    switch (in.act_group) {
        case 64: return dot_ints<BITS, 16, T, Scales::half>(w, tile, in, t0, once, out);
        case 32: return dot_ints<BITS, 8, T, Scales::half>(w, tile, in, t0, once, out);
        default: return dot_ints<BITS, 4, T, Scales::half>(w, tile, in, t0, once, out);
    }
}

template <int T>
void dot_tokens(const Tiles& w, int64_t tile, const Input& in, int64_t t0, bool once, float* out) {
    switch (w.coding) {
        case Coding::f32: return dot_float<Coding::f32, T>(w, tile, in, t0, once, out);
        case Coding::f16: return dot_float<Coding::f16, T>(w, tile, in, t0, once, out);
        case Coding::bf16: return dot_float<Coding::bf16, T>(w, tile, in, t0, once, out);
        default: break;
    }
    with_bits(w.bits, [&](auto bits) { dot_bits<decltype(bits)::value, T>(w, tile, in, t0, once, out); });
}

// Calls f(T, t) for blocks of at most MOST tokens, alike in size.
template <int MOST, class F>
inline void blocks_of(int64_t tokens, F&& f) {
    const int64_t blocks = (tokens + MOST - 1) / MOST;
    for (int64_t i = 0; i < blocks; ++i) {
        const int64_t from = tokens * i / blocks, size = tokens * (i + 1) / blocks - from;
        switch (size) {
            case 1: f(std::integral_constant<int, 1>{}, from); break;
            case 2: f(std::integral_constant<int, 2>{}, from); break;
            case 3: f(std::integral_constant<int, 3>{}, from); break;
            case 4: f(std::integral_constant<int, 4>{}, from); break;
            case 5: f(std::integral_constant<int, 5>{}, from); break;
            default: f(std::integral_constant<int, 6>{}, from); break;
        }
    }
}

template <Coding CODING>
void dot_floats(const Tiles& w, int64_t tile, const Input& in, int64_t t0, int64_t tokens, float* out) {
    blocks_of<6>(tokens, [&](auto size, int64_t t) {
        dot_float<CODING, decltype(size)::value>(w, tile, in, t0 + t, decltype(size)::value == tokens, out + t * 16);
    });
}

void dot_tile(const Tiles& w, int64_t tile, const Input& in, int64_t t0, int64_t tokens, float* out) {
    if (w.lookup()) return lookup_tile(w, tile, in, t0, tokens, out);
    switch (w.coding) {
        case Coding::f32: return dot_floats<Coding::f32>(w, tile, in, t0, tokens, out);
        case Coding::f16: return dot_floats<Coding::f16>(w, tile, in, t0, tokens, out);
        case Coding::bf16: return dot_floats<Coding::bf16>(w, tile, in, t0, tokens, out);
        default: break;
    }
    int64_t t = 0;
    if constexpr (lanes == 16)  // 32 registers hold the sums of eight tokens
        for (; t + 8 <= tokens; t += 8) dot_tokens<8>(w, tile, in, t0 + t, tokens == 8, out + t * 16);
    for (; t + 4 <= tokens; t += 4) dot_tokens<4>(w, tile, in, t0 + t, tokens == 4, out + t * 16);
    for (; t + 2 <= tokens; t += 2) dot_tokens<2>(w, tile, in, t0 + t, tokens == 2, out + t * 16);
    for (; t < tokens; ++t) dot_tokens<1>(w, tile, in, t0 + t, tokens == 1, out + t * 16);
    add_twice(w, tile, in, t0, tokens, out);
}

void dot_each(const Tiles& w, int64_t tile, const Input& in, int64_t t0, int64_t tokens, float* out) {
    for (int64_t t = 0; t < tokens; ++t) dot_tokens<1>(w, tile, in, t0 + t, tokens == 1, out + t * 16);
    if (in.ints) add_twice(w, tile, in, t0, tokens, out);
}

// --------------------------------------------------------------------------------------------------- decoded products

constexpr int64_t panel = 256;  // columns decoded at a time: 16 KiB of floats, half of a first-level cache

// Columns 32 u .. 32 u + 31 of a tile of ints as floats [32, 16].
template <int BITS>
void decode_unit(const Tiles& w, int64_t tile, int64_t u, float* out) {
    const uint8_t* unit = w.data + tile * w.data_bytes() + u * 64 * BITS;
    const bool centred = w.minimum == nullptr && w.scales != Scales::q4_k;
    for (int part = 0; part < parts; ++part) {
        FV scale = {}, minimum = {};
        int64_t held = -1;  // group whose scales are at hand
        Codes<BITS> read;
        each(
            [&](auto index) {
                constexpr int i = decltype(index)::value;
                const int64_t g = (u * 32 + 4 * i) / w.group;
                if (g != held) {
                    scales_of(w, tile, g, part, scale, minimum);
                    if (centred) minimum = scale * -static_cast<float>(1 << (BITS - 1));
                    held = g;
                }
                const UV codes = as<UV>(read.template get<i, i == 0>(unit + part * 4 * lanes));
                for (int j = 0; j < 4; ++j)
                    store_f(out + (4 * i + j) * 16 + part * lanes, to_float(as<IV>((codes >> (8 * j)) & 255u)) * scale + minimum);
            },
            std::make_integer_sequence<int, 8>{});
    }
}

// Columns k0 .. k0 + count - 1 of a tile as floats [count, 16]; k0 is a multiple of `panel`.
const float* decode_panel(const Tiles& w, int64_t tile, int64_t k0, int64_t count, float* out) {
    const uint8_t* data = w.data + tile * w.data_bytes();
    switch (w.coding) {
        case Coding::f32: return reinterpret_cast<const float*>(data) + k0 * 16;
        case Coding::f16:
            for (int64_t i = 0; i < count * 16; i += lanes)
                store_f(out + i, load_halves(reinterpret_cast<const uint16_t*>(data) + k0 * 16 + i));
            return out;
        case Coding::bf16:
            for (int64_t p = 0; p < count / 2; ++p)
                for (int part = 0; part < parts; ++part) {
                    const UV both = load<UV>(data + (k0 / 2 + p) * 64 + part * 4 * lanes);
                    store_f(out + 2 * p * 16 + part * lanes, as<FV>(both << 16));
                    store_f(out + (2 * p + 1) * 16 + part * lanes, as<FV>(both & 0xffff0000u));
                }
            return out;
        default: break;
    }
    for (int64_t u = 0; u < count / 32; ++u) {
        const int64_t at = k0 / 32 + u;
        float* to = out + u * 32 * 16;
        with_bits(w.bits, [&](auto bits) { decode_unit<decltype(bits)::value>(w, tile, at, to); });
    }
    return out;
}

// out [T, 16] (+)= columns [count, 16] times x [T, stride].
template <int T>
inline void dot_panel(const float* columns, const float* x, int64_t stride, int64_t count, bool add, float* out) {
    FV sum[T][parts];
    for (int t = 0; t < T; ++t)
        for (int part = 0; part < parts; ++part) sum[t][part] = add ? load<FV>(out + t * 16 + part * lanes) : FV{};
    for (int64_t k = 0; k < count; ++k) {
        FV column[parts];
        for (int part = 0; part < parts; ++part) column[part] = load<FV>(columns + k * 16 + part * lanes);
        for (int t = 0; t < T; ++t)
            for (int part = 0; part < parts; ++part) sum[t][part] = fused(column[part], splat_f(x[t * stride + k]), sum[t][part]);
    }
    for (int t = 0; t < T; ++t)
        for (int part = 0; part < parts; ++part) store_f(out + t * 16 + part * lanes, sum[t][part]);
}

void dot_decoded(const Tiles& w, int64_t tile, const Input& in, int64_t t0, int64_t tokens, float* out) {
    alignas(64) float decoded[panel * 16];
    const int64_t cols = w.padded();
    for (int64_t k0 = 0; k0 < cols; k0 += panel) {
        const int64_t count = cols - k0 < panel ? cols - k0 : panel;
        const float* columns = decode_panel(w, tile, k0, count, decoded);
        blocks_of<6>(tokens, [&](auto size, int64_t t) {
            dot_panel<decltype(size)::value>(columns, in.x + (t0 + t) * in.stride + k0, in.stride, count, k0 > 0, out + t * 16);
        });
    }
}

}  // namespace

void norm(const Norm& n, const float* x, float* y);  // inputs.cpp
void quantize(const Input& in, int64_t t, const float* x, int64_t cols);
void activate(Act act, float* gate, const float* up, int64_t count);
void rotate(float* x, const float* cos, const float* sin, int64_t half);
bool encode_page(const PageForm& form, uint8_t* page, int64_t first, int64_t count, const float* x, int64_t stride);  // pages.cpp
void decode_page(const PageForm& form, const uint8_t* page, int64_t first, int64_t count, float* out, int64_t stride);
void attend_head(const AttendHead& a);  // attend_heads.cpp
void bound(const float* keys, int64_t count, int64_t width, uint16_t* bounds);  // pieces.cpp
void promise(const float* negative, const float* positive, const uint16_t* bounds, int64_t pieces, int64_t width, float* out);

extern const TileKernels tile_table;
const TileKernels tile_table = {dot_tile, norm, quantize, tabulate, decode_tile, activate, rotate, dot_each, dot_decoded,
                                encode_page, decode_page, attend_head, bound, promise};

}  // namespace trimtab::TRIMTAB_ISA
