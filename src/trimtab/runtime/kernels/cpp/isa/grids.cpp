// Products with codes that stand for something else than their number: grids, and pairs of neighbours. Codes are unpacked as those
// of integers are, a permutation of bytes looks values up, and the rest is the product of integers.
// Source: vpermb, Intel 64 and IA-32 Architectures Software Developer's Manual; pairs: Guo et al., OliVe, arXiv 2304.07493.
#include "isa/ints.h"

namespace trimtab::TRIMTAB_ISA {
namespace {

// A table of ENTRIES bytes; `of` looks up an index below ENTRIES in every byte.
template <int ENTRIES>
struct Lookup {
#if defined(__AVX512VBMI__)
    BV table;
    // Entries less `less`.
    explicit Lookup(const uint8_t* from, int less = 0) {
        uint8_t all[64] = {};
        memcpy(all, from, ENTRIES);
        table = load<BV>(all) - static_cast<uint8_t>(less);
    }
    BV of(BV index) const { return as<BV>(_mm512_maskz_permutexvar_epi8(~0ull, as<__m512i>(index), as<__m512i>(table))); }
#elif defined(__AVX2__)
    BV table[ENTRIES / 16];  // 16 entries in each half of the register
    explicit Lookup(const uint8_t* from, int less = 0) {
        for (int i = 0; i < ENTRIES / 16; ++i) {
            const __m128i entries = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 16 * i));
            table[i] = as<BV>(_mm256_broadcastsi128_si256(entries)) - static_cast<uint8_t>(less);
        }
    }
    BV of(BV index) const {
        const __m256i at = as<__m256i>(index);
        __m256i found[ENTRIES / 16];
        for (int i = 0; i < ENTRIES / 16; ++i) found[i] = _mm256_shuffle_epi8(as<__m256i>(table[i]), at);
        if constexpr (ENTRIES == 16) return as<BV>(found[0]);
        const __m256i bit_4 = _mm256_slli_epi16(at, 3);  // the highest bit of a byte chooses
        found[0] = _mm256_blendv_epi8(found[0], found[1], bit_4);
        if constexpr (ENTRIES == 64) {
            found[2] = _mm256_blendv_epi8(found[2], found[3], bit_4);
            found[0] = _mm256_blendv_epi8(found[0], found[2], _mm256_slli_epi16(at, 2));
        }
        return as<BV>(found[0]);
    }
#else
    uint8_t table[ENTRIES];
    explicit Lookup(const uint8_t* from, int less = 0) {
        for (int i = 0; i < ENTRIES; ++i) table[i] = static_cast<uint8_t>(from[i] - less);
    }
    BV of(BV index) const {
        BV found;
        for (int i = 0; i < 4 * lanes; ++i) found[i] = table[index[i]];
        return found;
    }
#endif
};

// Every byte of the row's lane holds 16 times the table that the row has in a group.
inline BV choice_of(const Tiles& w, int64_t tile, int64_t g, int part) {
    const int bits = w.grid.choice_bits();
    const uint8_t* at = w.choice + (tile * w.groups() + g) * 2 * bits;
    const uint32_t all = bits == 1 ? load<uint16_t>(at) : load<uint32_t>(at);
    UV row;
    for (int i = 0; i < lanes; ++i) row[i] = static_cast<uint32_t>(part * lanes + i);
    return as<BV>(((UV{} + all) >> (row << (bits - 1)) & (bits == 1 ? 1u : 3u)) * 0x10101010u);
}

// One table, or with 64 entries and up to 4 bits one of several.
template <int BITS, int ENTRIES>
struct Table {
    static constexpr int bits = BITS, shift = 0, steps = BITS <= 5 ? 4 : 1;  // up to 32, or up to 128, times 127, twice a step
    static constexpr bool negative = false, split = false, several = BITS <= 4 && ENTRIES == 64;
    Lookup<ENTRIES> table;
    BV choice[parts];

    explicit Table(const Tiles& w) : table(w.grid.low) {}
    void enter(const Tiles& w, int64_t tile, int64_t g) {
        if constexpr (several)
            for (int p = 0; p < parts; ++p) choice[p] = choice_of(w, tile, g, p);
    }
    BV of(BV codes, int part) const { return table.of(several ? codes | choice[part] : codes); }
    static float zero(const Tiles& w) { return static_cast<float>(w.grid.offset); }
};

// Sign and magnitude.
template <int BITS>
struct Magnitude {
    static constexpr int bits = BITS, shift = 0, steps = 1, most = (1 << (BITS - 1)) - 1;
    static constexpr bool negative = BITS == 8 && signed_bytes, split = false;

    explicit Magnitude(const Tiles&) {}
    void enter(const Tiles&, int64_t, int64_t) {}
    BV of(BV codes, int) const {
        const BV sign = as<BV>(as<CV>(BITS == 8 ? codes : codes + codes) < 0), value = ((codes & static_cast<uint8_t>(most)) ^ sign) - sign;
        return negative ? value : value + static_cast<uint8_t>(most);
    }
    static float zero(const Tiles&) { return negative ? 0.0f : most; }
};

// All bits of the bytes whose neighbour in the pair is a victim.
inline BV outliers(BV codes, uint8_t victim) {
    const WV both = as<WV>(codes);
    return as<BV>(as<BV>((both << 8) | (both >> 8)) == victim);
}

// Pairs of 4 bits. HIGH: eighths of what int8 does not hold, see Grid.
template <bool SPLIT, bool HIGH = false>
struct Pairs {
    // Up to 192 where not split, else up to 14 and 48.
    static constexpr int bits = 4, shift = 0, steps = SPLIT || HIGH ? 2 : 1;
    static constexpr bool negative = !SPLIT && !HIGH && signed_bytes, split = SPLIT;
    struct None {
        explicit None(const Tiles&) {}
    };
    Lookup<32> table;
    std::conditional_t<SPLIT, Pairs<false, true>, None> high;

    explicit Pairs(const Tiles& w) : table(HIGH ? w.grid.high : w.grid.low, negative ? w.grid.offset : 0), high(w) {}
    void enter(const Tiles&, int64_t, int64_t) {}
    BV of(BV codes, int) const { return table.of(codes | (outliers(codes, victim(4)) & 16)); }
    static float zero(const Tiles& w) { return negative ? 0.0f : static_cast<float>(w.grid.zero()); }
};

// Pairs of 8 bits, as floats alone.
struct WidePairs {
    static constexpr int bits = 8, shift = 0;
    explicit WidePairs(const Tiles&) {}
    void enter(const Tiles&, int64_t, int64_t) {}
    static float zero(const Tiles&) { return 0; }
};

inline void floats_of(const WidePairs&, BV codes, int, FV (&v)[4]) {
    const BV magnitude = codes & static_cast<uint8_t>(127), sign = as<BV>(as<CV>(codes) < 0);
    const UV normal = as<UV>((magnitude ^ sign) - sign), all = as<UV>(codes);
    const UV outlier = as<UV>(outliers(codes, victim(8)) & as<BV>(magnitude != 0));  // a magnitude of 0 is 0
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
        const UV code = all << (24 - 8 * j);
        // 1.mantissa times 2^(exponent + 7)
        const UV large = (((code >> 4) & (127u << 20)) + ((127u + 7u) << 23)) | (code & (1u << 31));
        const UV small = as<UV>(to_float(as<IV>(normal << (24 - 8 * j)) >> 24));
        v[j] = as<FV>(as<IV>(outlier << (24 - 8 * j)) < 0 ? large : small);
    }
}

// One tile of them times T tokens.
template <int T>
void dot_wide(const Tiles& w, int64_t tile, const Input& in, int64_t t0, bool once, float* out) {
    const uint8_t* data = w.data + tile * w.data_bytes();
    const WidePairs value(w);
    for (int part = 0; part < parts; ++part) {
        FV total[T];
        for (int t = 0; t < T; ++t) total[t] = FV{};
        for (int64_t g = 0; g < w.groups(); ++g) {
            FV sum[T][4], scale = {}, minimum = {};
            scales_of(w, tile, g, part, scale, minimum);
            for (int t = 0; t < T; ++t)
                for (int j = 0; j < 4; ++j) sum[t][j] = FV{};
            for (int64_t k = g * w.group; k < (g + 1) * w.group; k += 4) {
                const uint8_t* four = data + k * 16 + part * 4 * lanes;
                if (part == 0) prefetch(four + ahead, once);
                FV v[4];
                floats_of(value, load<BV>(four), part, v);
#pragma GCC unroll 2
                for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
                    for (int j = 0; j < 4; ++j) {
                        sum[t][j] = fused(v[j], splat_f(in.x[(t0 + t) * in.stride + k + j]), sum[t][j]);
                        keep(sum[t][j]);
                    }
            }
            for (int t = 0; t < T; ++t) total[t] = fused(scale, (sum[t][0] + sum[t][1]) + (sum[t][2] + sum[t][3]), total[t]);
        }
        for (int t = 0; t < T; ++t) store_f(out + t * 16 + part * lanes, total[t]);
    }
}

template <class VALUE>
struct Type {
    using type = VALUE;
};

// Calls f(Type<VALUE>) for how the matrix is read.
template <class F>
inline void with_integers(const Tiles& w, F&& f) {
    switch (w.grid.form) {
        case Grid::Form::pairs: return f(Type<Pairs<false>>{});
        case Grid::Form::split_pairs: return f(Type<Pairs<true>>{});
        case Grid::Form::magnitude: return w.bits == 7 ? f(Type<Magnitude<7>>{}) : f(Type<Magnitude<8>>{});
        default: break;
    }
    const bool several = w.grid.tables > 1;
    switch (w.bits) {
        case 1:
        case 2: return several ? f(Type<Table<2, 64>>{}) : f(Type<Table<2, 16>>{});
        case 3: return several ? f(Type<Table<3, 64>>{}) : f(Type<Table<3, 16>>{});
        case 4: return several ? f(Type<Table<4, 64>>{}) : f(Type<Table<4, 16>>{});
        case 5: return f(Type<Table<5, 64>>{});
        default: return f(Type<Table<6, 64>>{});
    }
}

}  // namespace

// As dot_tile, or as dot_each, of grids and pairs.
void dot_grid(const Tiles& w, int64_t tile, const Input& in, int64_t t0, int64_t tokens, bool each, float* out) {
    if (!w.integers()) {
        int64_t t = 0;
        for (; !each && t + 2 <= tokens; t += 2) dot_wide<2>(w, tile, in, t0 + t, tokens == 2, out + t * 16);
        for (; t < tokens; ++t) dot_wide<1>(w, tile, in, t0 + t, tokens == 1, out + t * 16);
        return;
    }
    with_integers(w, [&](auto type) {
        using Value = typename decltype(type)::type;
        auto dot = [&](auto size, int64_t t) {
            dot_acts<Value, decltype(size)::value>(w, tile, in, t0 + t, decltype(size)::value == tokens, out + t * 16);
        };
#if !defined(__AVX2__)
        each = true;  // looking up byte by byte takes longest: blocks of tokens would only cost time to compile
#endif
        if (each)
            for (int64_t t = 0; t < tokens; ++t) dot(std::integral_constant<int, 1>{}, t);
#if defined(__AVX2__)
        else
            halving_blocks(tokens, dot);
#endif
        add_twice<Value>(w, tile, in, t0, tokens, out);
    });
}

// Units `first` .. of a tile as floats [32 units, 16].
void decode_grid(const Tiles& w, int64_t tile, int64_t first, int64_t units, float* out) {
    for (int64_t u = 0; u < units; ++u) {
        float* to = out + u * unit_cols * tile_rows;
        if (w.grid.form == Grid::Form::wide_pairs)
            decode_unit<WidePairs>(w, tile, first + u, to);
        else
            with_integers(w, [&](auto type) { decode_unit<typename decltype(type)::type>(w, tile, first + u, to); });
    }
}

}  // namespace trimtab::TRIMTAB_ISA
