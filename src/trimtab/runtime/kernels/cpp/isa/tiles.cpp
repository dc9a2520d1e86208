// Products with tiles, compiled once per instruction set.
#include "isa/ints.h"

namespace trimtab::TRIMTAB_ISA {

void lookup_tile(const Tiles& w, int64_t tile, const Input& in, int64_t t0, int64_t tokens, float* out);  // lookup.cpp
void tabulate(const Input& in, int64_t t, const float* x, int64_t cols);
void decode_tile(const Tiles& w, int64_t tile, float* out);
void dot_grid(const Tiles& w, int64_t tile, const Input& in, int64_t t0, int64_t tokens, bool each, float* out);  // grids.cpp
void decode_grid(const Tiles& w, int64_t tile, int64_t first, int64_t units, float* out);

namespace {

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

template <int BITS, int T>
void dot_bits(const Tiles& w, int64_t tile, const Input& in, int64_t t0, bool once, float* out) {
    using Value = Counted<BITS>;
    if constexpr (BITS == 4 || BITS == 5)
        if (w.scales == Scales::q4_k) return dot_ints<Value, 8, T, Scales::q4_k>(w, tile, in, t0, once, out);
    if constexpr (BITS == 6)
        if (w.scales == Scales::q6_k) return dot_ints<Value, 4, T, Scales::q6_k>(w, tile, in, t0, once, out);
    dot_acts<Value, T>(w, tile, in, t0, once, out);
}

template <int T>
void dot_tokens(const Tiles& w, int64_t tile, const Input& in, int64_t t0, bool once, float* out) {
    with_bits(w.bits, [&](auto bits) { dot_bits<decltype(bits)::value, T>(w, tile, in, t0, once, out); });
}

void add_twice(const Tiles& w, int64_t tile, const Input& in, int64_t t0, int64_t tokens, float* out) {
    with_bits(w.bits, [&](auto bits) { add_twice<Counted<decltype(bits)::value>>(w, tile, in, t0, tokens, out); });
}

// ------------------------------------------------------------------------------------------------- any number of tokens

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

// --------------------------------------------------------------------------------------------------- decoded products

constexpr int64_t panel = 256;  // columns decoded at a time: 16 KiB of floats, half of a first-level cache

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
    if (w.coding != Coding::ints) return decode_grid(w, tile, k0 / 32, count / 32, out), out;
    for (int64_t u = 0; u < count / 32; ++u) {
        const int64_t at = k0 / 32 + u;
        float* to = out + u * 32 * 16;
        with_bits(w.bits, [&](auto bits) { decode_unit<Counted<decltype(bits)::value>>(w, tile, at, to); });
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

void dot_tile(const Tiles& w, int64_t tile, const Input& in, int64_t t0, int64_t tokens, float* out) {
    if (w.lookup()) return lookup_tile(w, tile, in, t0, tokens, out);
    if (w.coded() && !w.integers() && tokens > 4) return dot_decoded(w, tile, in, t0, tokens, out);  // decoding pays
    switch (w.coding) {
        case Coding::f32: return dot_floats<Coding::f32>(w, tile, in, t0, tokens, out);
        case Coding::f16: return dot_floats<Coding::f16>(w, tile, in, t0, tokens, out);
        case Coding::bf16: return dot_floats<Coding::bf16>(w, tile, in, t0, tokens, out);
        case Coding::grid:
        case Coding::pairs: return dot_grid(w, tile, in, t0, tokens, false, out);
        default: break;
    }
    halving_blocks(tokens, [&](auto size, int64_t t) {
        dot_tokens<decltype(size)::value>(w, tile, in, t0 + t, decltype(size)::value == tokens, out + t * 16);
    });
    add_twice(w, tile, in, t0, tokens, out);
}

void dot_each(const Tiles& w, int64_t tile, const Input& in, int64_t t0, int64_t tokens, float* out) {
    if (w.coding == Coding::ints) {
        for (int64_t t = 0; t < tokens; ++t) dot_tokens<1>(w, tile, in, t0 + t, tokens == 1, out + t * 16);
        return add_twice(w, tile, in, t0, tokens, out);
    }
    if (w.coded()) return dot_grid(w, tile, in, t0, tokens, true, out);
    for (int64_t t = 0; t < tokens; ++t) dot_tile(w, tile, in, t0 + t, 1, out + t * 16);
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
double exp_sum(const float* x, int64_t count, float top, float by);  // inputs.cpp

extern const TileKernels tile_table;
const TileKernels tile_table = {dot_tile, norm, quantize, tabulate, decode_tile, activate, rotate, dot_each, dot_decoded,
                                encode_page, decode_page, attend_head, bound, promise, exp_sum};

}  // namespace trimtab::TRIMTAB_ISA
