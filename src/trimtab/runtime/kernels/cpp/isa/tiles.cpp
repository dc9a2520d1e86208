// Products with tiles, and the preparation of their inputs, compiled once per instruction set.
#include <cmath>
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

// ------------------------------------------------------------------------------------------------------------ floats

template <Coding CODING>
inline FV load_column(const uint8_t* tile, int64_t k, int part) {
    if constexpr (CODING == Coding::f32) return load<FV>(reinterpret_cast<const float*>(tile) + k * 16 + part * lanes);
    return load_halves(reinterpret_cast<const uint16_t*>(tile) + k * 16 + part * lanes);
}

template <Coding CODING, int T>
void dot_float(const Tiles& w, int64_t tile, const Input& in, int64_t t0, float* out) {
    const uint8_t* data = w.data + tile * w.data_bytes();
    const float* x[T];
    for (int t = 0; t < T; ++t) x[t] = in.x + (t0 + t) * in.stride;
    constexpr int chains = T >= 4 ? 1 : T == 2 ? 2 : 4;
    FV sum[chains][T][parts] = {};
    const int64_t cols = w.padded();
    if constexpr (CODING == Coding::bf16) {
        const int64_t pairs_of = cols / 2;
        int64_t p = 0;
        auto step = [&](int c, int64_t at) {
            prefetch(data + at * 64 + 2048);
            for (int part = 0; part < parts; ++part) {
                const UV both = load<UV>(data + at * 64 + part * 4 * lanes);
                const FV first = as<FV>(both << 16), second = as<FV>(both & 0xffff0000u);
                for (int t = 0; t < T; ++t) {
                    sum[c][t][part] += first * x[t][2 * at];
                    sum[c][t][part] += second * x[t][2 * at + 1];
                }
            }
        };
        for (; p + chains <= pairs_of; p += chains)
            for (int c = 0; c < chains; ++c) step(c, p + c);
        for (; p < pairs_of; ++p) step(0, p);
    } else {
        int64_t k = 0;
        auto step = [&](int c, int64_t at) {
            if constexpr (CODING == Coding::f32)
                prefetch(data + at * 64 + 2048);
            else if (!(at & 1))
                prefetch(data + at * 32 + 2048);
            for (int part = 0; part < parts; ++part) {
                const FV column = load_column<CODING>(data, at, part);
                for (int t = 0; t < T; ++t) sum[c][t][part] += column * x[t][at];
            }
        };
        for (; k + chains <= cols; k += chains)
            for (int c = 0; c < chains; ++c) step(c, k + c);
        for (; k < cols; ++k) step(0, k);
    }
    for (int t = 0; t < T; ++t)
        for (int part = 0; part < parts; ++part) {
            FV all = sum[0][t][part];
            for (int c = 1; c < chains; ++c) all += sum[c][t][part];
            store_f(out + t * 16 + part * lanes, all);
        }
}

// -------------------------------------------------------------------------------------------------------------- ints

// Codes 4 i .. 4 i + 3 of every row of one part, as bytes; i < 8 counts fours of columns inside a unit.
template <int BITS, int I>
inline BV codes_of(const uint8_t* unit, int part) {
    const uint8_t* at = unit + part * 4 * lanes;
    if constexpr (BITS == 8) return load<BV>(at + I * 64);
    BV found = {};
    int shift = 0;
    if constexpr (BITS & 4) {
        const WV word = load<WV>(at + (I / 2) * 64);
        found = as<BV>((I % 2 ? word >> 4 : word) & 0x0f0f);
        at += 4 * 64, shift = 4;
    }
    if constexpr (BITS & 2) {
        const WV word = load<WV>(at + (I / 4) * 64);
        constexpr int by = 2 * (I % 4);
        if (shift)
            found |= as<BV>((by >= 4 ? word >> (by - 4) : word << (4 - by)) & 0x3030);
        else
            found = as<BV>((word >> by) & 0x0303);
        at += 2 * 64, shift += 2;
    }
    if constexpr (BITS & 1) {
        const WV word = load<WV>(at);
        const int by = I - shift;
        found |= as<BV>((by >= 0 ? word >> by : word << -by) & static_cast<uint16_t>(0x0101 << shift));
    }
    return found;
}

// Holds a sum in its register: left alone, GCC keeps all products of an unrolled loop alive, in memory, and adds them last.
template <class V>
inline void keep([[maybe_unused]] V& v) {
#if defined(__AVX2__)
    asm("" : "+x"(v));
#endif
}

template <int FIRST, class F, int... I>
inline void each(F&& f, std::integer_sequence<int, I...>) {
    (f(std::integral_constant<int, FIRST + I>{}), ...);
}

#if defined(__AVX512VNNI__)
constexpr bool signed_bytes = false;
#else
constexpr bool signed_bytes = true;  // 8-bit codes are taken as signed: unsigned ones would leave int16
#endif

// acc[t] += sum over COLS columns of a unit, from fours FIRST on, of code * x.
template <int BITS, int FIRST, int FOURS, int T>
inline void dot_unit(const uint8_t* unit, int part, const int8_t* const* x, IV* acc) {
#if defined(__AVX512VNNI__)
    auto step = [&](auto index) {
        constexpr int i = decltype(index)::value;
        const BV codes = codes_of<BITS, i>(unit, part);
        for (int t = 0; t < T; ++t)
            acc[t] = as<IV>(_mm512_dpbusd_epi32(as<__m512i>(acc[t]), as<__m512i>(codes), as<__m512i>(splat_4(x[t] + 4 * i))));
    };
#else
    // int16 sums of 2 * (2^bits - 1) * 127 a step stay in range this many steps.
    constexpr int most = BITS <= 4 ? 8 : BITS == 5 ? 4 : BITS == 6 ? 2 : 1;
    SV part_sum[T];
    auto step = [&](auto index) {
        constexpr int i = decltype(index)::value, place = (i - FIRST) % most;
        const BV codes = codes_of<BITS, i>(unit, part);
        for (int t = 0; t < T; ++t) {
            const CV four = splat_4(x[t] + 4 * i);
            const SV product = BITS == 8 ? signed_pairs(as<CV>(codes ^ static_cast<uint8_t>(0x80)), four) : pairs(codes, four);
            part_sum[t] = place ? part_sum[t] + product : product;
            keep(part_sum[t]);
            if (place == most - 1 || i == FIRST + FOURS - 1) acc[t] += fold(part_sum[t]);
        }
    };
#endif
    each<FIRST>(step, std::make_integer_sequence<int, FOURS>{});
}

// Scale and minimum of one group for the rows of one part.
inline void scales_of(const Tiles& w, int64_t tile, int64_t g, int part, FV& scale, FV& minimum) {
    if (w.scales == Scales::half) {
        const int64_t at = (tile * w.groups() + g) * 16 + part * lanes;
        scale = load_halves(w.scale + at);
        if (w.minimum) minimum = load_halves(w.minimum + at);
        return;
    }
    if (w.scales == Scales::q4_k) {
        const int64_t block = tile * (w.padded() / 256) + g / 8;
        const uint8_t* sub = w.sub + (block * 16 + g % 8) * 16 + part * lanes;
        scale = load_halves(w.scale + block * 32 + part * lanes) * load_u8s(sub);
        minimum = -(load_halves(w.scale + block * 32 + 16 + part * lanes) * load_u8s(sub + 8 * 16));
        return;
    }
    const int64_t block = tile * (w.padded() / 256) + g / 16;
    const int8_t* sub = reinterpret_cast<const int8_t*>(w.sub) + (block * 16 + g % 16) * 16 + part * lanes;
    scale = load_halves(w.scale + block * 16 + part * lanes) * load_i8s(sub);
}

// One tile times T tokens: FOURS fours of columns share an activation scale. STEP parts are worked on together.
template <int BITS, int FOURS, int T, int STEP>
void dot_ints(const Tiles& w, int64_t tile, const Input& in, int64_t t0, float* out) {
    constexpr int unit_bytes = 64 * BITS, cols = 4 * FOURS;
    const uint8_t* codes = w.data + tile * w.data_bytes();
    const int64_t groups = w.groups(), acts = in.stride / cols;
    const bool centred = w.minimum == nullptr && w.scales != Scales::q4_k;
    const float zero = (centred ? static_cast<float>(1 << (BITS - 1)) : 0.0f) - (BITS == 8 && signed_bytes ? 128.0f : 0.0f);
    const int64_t per_group = w.group / cols;
    for (int first = 0; first < parts; first += STEP) {
        FV total[STEP][T] = {};
        for (int64_t g = 0; g < groups; ++g) {
            FV part[STEP][T] = {};
            const int64_t end = (g + 1) * per_group < acts ? (g + 1) * per_group : acts;
            for (int64_t a = g * per_group; a < end; ++a) {
                IV acc[STEP][T] = {};
                const int8_t* x[T];
                for (int t = 0; t < T; ++t) x[t] = in.codes + (t0 + t) * in.stride + a * cols;
                if constexpr (FOURS >= 8) {
                    for (int u = 0; u < FOURS / 8; ++u) {
                        const uint8_t* unit = codes + (a * (FOURS / 8) + u) * unit_bytes;
                        if (T <= 2 || first == 0)
                            for (int line = 0; line < BITS; ++line) prefetch(unit + 2048 + 64 * line);
                        for (int s = 0; s < STEP; ++s) dot_unit<BITS, 0, 8, T>(unit, first + s, x, acc[s]);
                        for (int t = 0; t < T; ++t) x[t] += 32;
                    }
                } else {
                    const uint8_t* unit = codes + a / 2 * unit_bytes;
                    if (a & 1) {
                        for (int t = 0; t < T; ++t) x[t] -= 16;
                        for (int s = 0; s < STEP; ++s) dot_unit<BITS, 4, 4, T>(unit, first + s, x, acc[s]);
                    } else {
                        for (int line = 0; line < BITS; ++line) prefetch(unit + 2048 + 64 * line);
                        for (int s = 0; s < STEP; ++s) dot_unit<BITS, 0, 4, T>(unit, first + s, x, acc[s]);
                    }
                }
                for (int t = 0; t < T; ++t) {
                    const float scale = in.scale[(t0 + t) * acts + a];
                    for (int s = 0; s < STEP; ++s) part[s][t] += to_float(acc[s][t]) * scale;
                }
            }
            for (int s = 0; s < STEP; ++s) {
                FV scale, minimum = {};
                scales_of(w, tile, g, first + s, scale, minimum);
                for (int t = 0; t < T; ++t) {
                    const float sum = in.sum[(t0 + t) * groups + g];
                    total[s][t] += scale * (part[s][t] - zero * sum);
                    if (!centred) total[s][t] += minimum * sum;
                }
            }
        }
        for (int s = 0; s < STEP; ++s)
            for (int t = 0; t < T; ++t) store_f(out + t * 16 + (first + s) * lanes, total[s][t]);
    }
}

template <int BITS, int T>
void dot_bits(const Tiles& w, int64_t tile, const Input& in, int64_t t0, float* out) {
    constexpr int step = T <= 2 ? parts : 1;
    switch (in.act_group) {
        case 64: return dot_ints<BITS, 16, T, step>(w, tile, in, t0, out);
        case 32: return dot_ints<BITS, 8, T, step>(w, tile, in, t0, out);
        default: return dot_ints<BITS, 4, T, step>(w, tile, in, t0, out);
    }
}

template <int T>
void dot_tokens(const Tiles& w, int64_t tile, const Input& in, int64_t t0, float* out) {
    switch (w.coding) {
        case Coding::f32: return dot_float<Coding::f32, T>(w, tile, in, t0, out);
        case Coding::f16: return dot_float<Coding::f16, T>(w, tile, in, t0, out);
        case Coding::bf16: return dot_float<Coding::bf16, T>(w, tile, in, t0, out);
        default: break;
    }
    switch (w.bits) {
        case 1: return dot_bits<1, T>(w, tile, in, t0, out);
        case 2: return dot_bits<2, T>(w, tile, in, t0, out);
        case 3: return dot_bits<3, T>(w, tile, in, t0, out);
        case 4: return dot_bits<4, T>(w, tile, in, t0, out);
        case 5: return dot_bits<5, T>(w, tile, in, t0, out);
        case 6: return dot_bits<6, T>(w, tile, in, t0, out);
        case 7: return dot_bits<7, T>(w, tile, in, t0, out);
        default: return dot_bits<8, T>(w, tile, in, t0, out);
    }
}

void dot_tile(const Tiles& w, int64_t tile, const Input& in, int64_t t0, int64_t tokens, float* out) {
    if (w.lookup()) return lookup_tile(w, tile, in, t0, tokens, out);
    int64_t t = 0;
    for (; t + 4 <= tokens; t += 4) dot_tokens<4>(w, tile, in, t0 + t, out + t * 16);
    for (; t + 2 <= tokens; t += 2) dot_tokens<2>(w, tile, in, t0 + t, out + t * 16);
    for (; t < tokens; ++t) dot_tokens<1>(w, tile, in, t0 + t, out + t * 16);
}

// ------------------------------------------------------------------------------------------------------------ inputs

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
    typedef int8_t Narrow __attribute__((vector_size(lanes)));
    const int64_t acts = in.stride / in.act_group, groups = (in.stride + in.group - 1) / in.group;
    const int64_t row = t * in.passes;
    for (int64_t g = 0; g < groups * in.passes; ++g) in.sum[row * groups + g] = 0;
    for (int64_t a = 0; a < acts; ++a) {
        const int64_t from = a * in.act_group;
        alignas(64) float values[64];
        const int64_t have = cols - from < in.act_group ? (cols > from ? cols - from : 0) : in.act_group;
        memcpy(values, x + from, static_cast<size_t>(have) * 4);
        for (int64_t i = have; i < in.act_group; ++i) values[i] = 0;
        FV most = {};
        for (int64_t i = 0; i < in.act_group; i += lanes) {
            const FV v = load<FV>(values + i);
            most = max_of(most, max_of(v, -v));
        }
        const float peak = largest(most);
        float scale = peak / 127.0f, by = peak > 0 ? 127.0f / peak : 0.0f;
        for (int pass = 0; pass < in.passes; ++pass) {
            const FV magic = splat_f(12582912.0f);  // 1.5 * 2^23: adding it rounds half to even
            IV all = {};
            for (int64_t i = 0; i < in.act_group; i += lanes) {
                const FV v = load<FV>(values + i);
                const IV q = as<IV>(v * by + magic) - as<IV>(magic);
                all += q;
                const Narrow small = __builtin_convertvector(q, Narrow);
                memcpy(in.codes + (row + pass) * in.stride + from + i, &small, sizeof small);
                store_f(values + i, v - to_float(q) * scale);
            }
            int32_t sum = 0;
            for (int i = 0; i < lanes; ++i) sum += all[i];
            in.scale[(row + pass) * acts + a] = scale;
            in.sum[(row + pass) * groups + from / in.group] += scale * static_cast<float>(sum);
            scale /= 254.0f, by *= 254.0f;
        }
    }
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

void activate(Act act, float* gate, const float* up, int64_t count) {
    for (int64_t i = 0; i < count; i += lanes) {
        const FV g = act_of(act, load<FV>(gate + i));
        store_f(gate + i, up ? g * load<FV>(up + i) : g);
    }
}

}  // namespace

void attend(const Attend& a);  // attend.cpp
void encode(Coding coding, const float* x, int64_t count, uint8_t* out);
void rotate(float* x, const float* cos, const float* sin, int64_t half);

extern const TileKernels tile_table;
const TileKernels tile_table = {dot_tile, norm, quantize, tabulate, decode_tile, activate, attend, encode, rotate};

}  // namespace trimtab::TRIMTAB_ISA
