// Products by table lookup, compiled once per instruction set: few-bit weights index sums of activations that are formed once
// per token, so that nothing is unpacked and nothing is multiplied but scales. Layouts: native/tiles.h.
//
// Source: T-MAC, arXiv 2407.00088, sections 3 and 4; ternary: bitnet.cpp, arXiv 2502.11880, section 3 (TL2).
#include <algorithm>
#include <cmath>
#include <numeric>

#include "isa/lookup.h"
#include "isa/simd.h"
#include "native/native.h"

namespace trimtab::TRIMTAB_ISA {
namespace {

constexpr int parts = tile_rows / lanes;
constexpr int64_t unit_triples = 4, superunit = 4;  // units that share one piece of signs

// ------------------------------------------------------------------------------------------------------------ planes

// Nibble of row r in block `block` of a 64-byte piece.
inline int nibble(Coding coding, const uint8_t* piece, int64_t block, int64_t r) {
    if (coding == Coding::lanes) {
        const uint8_t byte = piece[4 * r + block % 4];
        return block < 4 ? byte & 15 : byte >> 4;
    }
    const uint8_t byte = piece[block / 4 * 32 + block % 2 * 16 + r];
    return block % 4 < 2 ? byte & 15 : byte >> 4;
}

inline const uint8_t* piece_of(const Tiles& w, int64_t tile, int64_t unit, int plane) {
    return w.data + tile * w.data_bytes() + (unit * w.bits + plane) * 64;
}

// acc [16] = sum over blocks [first, last) and planes of 2^plane * entry, one byte of every entry; every instruction set can.
void sum_plainly(const Tiles& w, int64_t tile, const int8_t* table, int64_t first, int64_t last, int32_t* acc) {
    for (int r = 0; r < tile_rows; ++r) acc[r] = 0;
    for (int64_t b = first; b < last; ++b)
        for (int p = 0; p < w.bits; ++p) {
            const uint8_t* piece = piece_of(w, tile, b / 8, p);
            for (int r = 0; r < tile_rows; ++r) acc[r] += table[b * 16 + nibble(w.coding, piece, b % 8, r)] * (1 << p);
        }
}

void sum_floats(const Tiles& w, int64_t tile, const float* table, int64_t first, int64_t last, float* acc) {
    for (int r = 0; r < tile_rows; ++r) acc[r] = 0;
    for (int64_t b = first; b < last; ++b)
        for (int p = 0; p < w.bits; ++p) {
            const uint8_t* piece = piece_of(w, tile, b / 8, p);
            for (int r = 0; r < tile_rows; ++r)
                acc[r] += table[b * 16 + nibble(w.coding, piece, b % 8, r)] * static_cast<float>(1 << p);
        }
}

// The same of entries that are offset by 128.
void sum_offset(const Tiles& w, int64_t tile, const uint8_t* table, int64_t first, int64_t last, int32_t* acc) {
    for (int r = 0; r < tile_rows; ++r) acc[r] = 0;
    for (int64_t b = first; b < last; ++b)
        for (int p = 0; p < w.bits; ++p) {
            const uint8_t* piece = piece_of(w, tile, b / 8, p);
            for (int r = 0; r < tile_rows; ++r)
                acc[r] += (table[b * 16 + nibble(w.coding, piece, b % 8, r)] - 128) * (1 << p);
        }
}

// Rounding averages instead of sums, over one table group of 8 or 16 blocks: neighbours two blocks apart first, then four and
// eight, last one. acc [16] = sum over planes of 2^plane * average.
void average_plainly(const Tiles& w, int64_t tile, const uint8_t* table, int64_t first, int64_t last, int32_t* acc) {
    for (int r = 0; r < tile_rows; ++r) acc[r] = 0;
    auto mean = [](int a, int b) { return (a + b + 1) >> 1; };
    const int64_t pieces = (last - first) / 4;
    for (int p = 0; p < w.bits; ++p)
        for (int r = 0; r < tile_rows; ++r) {
            int half[2];
            for (int l = 0; l < 2; ++l) {
                int level[4];
                for (int64_t h = 0; h < pieces; ++h) {
                    auto at = [&](int64_t b) {
                        return static_cast<int>(table[b * 16 + nibble(w.coding, piece_of(w, tile, b / 8, p), b % 8, r)]);
                    };
                    level[h] = mean(at(first + 4 * h + l), at(first + 4 * h + 2 + l));
                }
                half[l] = pieces == 2 ? mean(level[0], level[1]) : mean(mean(level[0], level[1]), mean(level[2], level[3]));
            }
            acc[r] += (mean(half[0], half[1]) - 128) * (1 << p);
        }
}

#if defined(__AVX2__)
inline void keep_rows(const Rows16& sum, IV* acc) { memcpy(acc, &sum, sizeof sum); }
#endif

// Whether segments of `step` columns can be added by `sum_fast`.
inline bool has_fast([[maybe_unused]] const Tiles& w, [[maybe_unused]] int64_t step) {
#if defined(__AVX512VBMI__)
    if (w.coding == Coding::lanes) return step % 32 == 0;
#endif
#if defined(__AVX2__)
    return w.coding == Coding::planes && step % 16 == 0;
#else
    return false;
#endif
}

// As sum_plainly, in registers.
template <int BITS>
inline void sum_fast([[maybe_unused]] const Tiles& w, [[maybe_unused]] const uint8_t* data, [[maybe_unused]] const int8_t* table,
                     [[maybe_unused]] int64_t first, [[maybe_unused]] int64_t last, [[maybe_unused]] IV* acc) {
#if defined(__AVX512VBMI__)
    if (w.coding == Coding::lanes) {
        acc[0] = as<IV>(sum_lanes<BITS>(data + first / 8 * BITS * 64, table + first * 16, (last - first) / 8));
        return;
    }
#endif
#if defined(__AVX2__)
    keep_rows(sum_halves<BITS>(data, table, first / 4, last / 4), acc);
#endif
}

inline void average(const Tiles& w, int64_t tile, const uint8_t* table, int64_t first, int64_t last, int32_t* acc) {
#if defined(__AVX2__)
    if (w.coding == Coding::planes) return average_halves(piece_of(w, tile, 0, 0), w.bits, table, first / 4, last / 4, acc);
#endif
    average_plainly(w, tile, table, first, last, acc);
}

// One tile times one token. FAST: int8 or int16 entries, no averages, segments that sum_fast can add.
template <int BITS, bool FAST>
void planes_bits(const Tiles& w, int64_t tile, const Input& in, int64_t t, float* out) {
    const int64_t cols = w.padded(), groups = w.groups(), acts = in.scales(), blocks = cols / 4;
    const int64_t step = std::gcd(w.group, in.act_group);
    const uint8_t* table = in.tables + t * in.table_bytes();
    const int8_t* low = reinterpret_cast<const int8_t*>(table);
    const uint8_t* data = w.data + tile * w.data_bytes();
    const float* scales = in.scale + t * acts;
    const bool two = in.entry == Entry::i16;
    constexpr float half_levels = static_cast<float>((1 << BITS) - 1) * 0.5f;
    FV total[parts] = {};
    int64_t left = in.act_group;  // columns until the next table scale
    for (int64_t g = 0; g < groups; ++g) {
        FV part[parts] = {};
        const int64_t end = g == groups - 1 ? cols : (g + 1) * w.group;
        for (int64_t from = g * w.group; from < end; from += step) {
            const int64_t to = std::min(from + step, end), first = from / 4, last = to / 4;
            const float scale = *scales;
            left -= step;
            if (left == 0) ++scales, left = in.act_group;
            IV acc[parts] = {};
            if constexpr (FAST) {
                sum_fast<BITS>(w, data, low, first, last, acc);
                if (two) {
                    IV high[parts] = {};
                    sum_fast<BITS>(w, data, low + blocks * 16, first, last, high);
                    for (int i = 0; i < parts; ++i) acc[i] += 256 * high[i];
                }
            } else {
                alignas(64) int32_t sums[tile_rows], high[tile_rows];
                if (in.entry == Entry::f32) {
                    alignas(64) float exact[tile_rows];
                    sum_floats(w, tile, reinterpret_cast<const float*>(table), first, last, exact);
                    for (int i = 0; i < parts; ++i) part[i] += load<FV>(exact + i * lanes);
                    continue;
                }
                if (w.fast_average && to - from == in.act_group) {
                    average(w, tile, table, first, last, sums);
                    const float count = static_cast<float>(last - first);
                    // A level rounds up by a half every other time: log2(count) / 4 a sum, times the weights of all planes.
                    const float bias = count * std::log2(count) * 0.25f * 2.0f * half_levels;
                    for (int i = 0; i < parts; ++i) part[i] += (to_float(load<IV>(sums + i * lanes)) * count - bias) * scale;
                    continue;
                }
                if (w.fast_average)  // what is left of a row
                    sum_offset(w, tile, table, first, last, sums);
                else
                    sum_plainly(w, tile, low, first, last, sums);
                if (two) {
                    sum_plainly(w, tile, low + blocks * 16, first, last, high);
                    for (int r = 0; r < tile_rows; ++r) sums[r] += 256 * high[r];
                }
                for (int i = 0; i < parts; ++i) acc[i] = load<IV>(sums + i * lanes);
            }
            for (int i = 0; i < parts; ++i) part[i] += to_float(acc[i]) * scale;
        }
        const float sum = in.sum[t * in.sums() + g];
        for (int i = 0; i < parts; ++i) {
            const int64_t at = (tile * groups + g) * 16 + i * lanes;
            const FV weight = load_halves(w.scale + at);
            // 2 (q - 2^(b-1)) = sum over planes of 2^plane * (+-1) - 1
            if (w.minimum)
                total[i] += weight * (part[i] * 0.5f + half_levels * sum) + load_halves(w.minimum + at) * sum;
            else
                total[i] += weight * (part[i] - sum) * 0.5f;
        }
    }
    for (int i = 0; i < parts; ++i) store_f(out + i * lanes, total[i]);
}

void planes_tile(const Tiles& w, int64_t tile, const Input& in, int64_t t, float* out) {
    const bool fast = in.entry != Entry::f32 && !w.fast_average && has_fast(w, std::gcd(w.group, in.act_group));
    auto run = [&](auto with, auto without) { (fast ? with : without)(w, tile, in, t, out); };
    switch (w.bits) {
        case 1: return run(planes_bits<1, true>, planes_bits<1, false>);
        case 2: return run(planes_bits<2, true>, planes_bits<2, false>);
        case 3: return run(planes_bits<3, true>, planes_bits<3, false>);
        default: return run(planes_bits<4, true>, planes_bits<4, false>);
    }
}

// Tables of one token; see Input.
void planes_tables(const Input& in, int64_t t, const float* x, int64_t cols) {
    alignas(64) static const float signs[4][16] = {
        {-1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1},
        {-1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1},
        {-1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1},
        {-1, -1, -1, -1, -1, -1, -1, -1, 1, 1, 1, 1, 1, 1, 1, 1},
    };
    typedef int8_t Narrow __attribute__((vector_size(lanes)));
    const int64_t blocks = in.stride / 4, per = in.act_group / 4;
    uint8_t* table = in.tables + t * in.table_bytes();
    float* sums = in.sum + t * in.sums();
    for (int64_t g = 0; g < in.sums(); ++g) {
        sums[g] = 0;
        for (int64_t k = g * in.group; k < std::min((g + 1) * in.group, cols); ++k) sums[g] += x[k];
    }
    for (int64_t a = 0; a < in.scales(); ++a) {
        const int64_t first = a * per, last = std::min(first + per, blocks);
        float most = 0;
        for (int64_t b = first; b < last; ++b) {
            float sum = 0;
            for (int64_t k = 4 * b; k < std::min(4 * b + 4, cols); ++k) sum += std::fabs(x[k]);
            most = std::max(most, sum);
        }
        const float top = in.entry == Entry::i8 ? 127.0f : 32639.0f;  // 127 * 256 + 127: both bytes stay in [-127, 127]
        const float by = most > 0 ? top / most : 0.0f;
        in.scale[t * in.scales() + a] = most / top;
        for (int64_t b = first; b < last; ++b) {
            float four[4];
            for (int k = 0; k < 4; ++k) four[k] = 4 * b + k < cols ? x[4 * b + k] : 0.0f;
            for (int i = 0; i < parts; ++i) {
                FV v = load<FV>(signs[0] + i * lanes) * four[0];
                for (int k = 1; k < 4; ++k) v += load<FV>(signs[k] + i * lanes) * four[k];
                const int64_t at = b * 16 + i * lanes;
                if (in.entry == Entry::f32) {
                    store_f(reinterpret_cast<float*>(table) + at, v);
                    continue;
                }
                const FV magic = splat_f(12582912.0f);  // 1.5 * 2^23: adding it rounds half to even
                const IV q = as<IV>(v * by + magic) - as<IV>(magic);
                if (in.entry == Entry::i8) {
                    Narrow small = __builtin_convertvector(q, Narrow);
                    if (in.fast_average) small ^= static_cast<int8_t>(-128);
                    memcpy(table + at, &small, sizeof small);
                    continue;
                }
                const IV rest = (q << 24) >> 24;
                const Narrow small = __builtin_convertvector(rest, Narrow);
                const Narrow large = __builtin_convertvector((q - rest) >> 8, Narrow);
                memcpy(table + at, &small, sizeof small);
                memcpy(table + blocks * 16 + at, &large, sizeof large);
            }
        }
    }
}

// ----------------------------------------------------------------------------------------------------------- ternary

// Digits of an index: 9 w0 + 3 w1 + w2 for the 14 triples whose first weight that is not zero is positive.
struct Digits {
    alignas(64) int16_t of[3][16] = {};
    Digits() {
        for (int index = 0; index < 14; ++index) {
            int rest = index;
            for (int d = 2; d >= 0; --d) {
                const int digit = (rest + 1) % 3 - 1;
                of[d][index] = static_cast<int16_t>(digit);
                rest = (rest - digit) / 3;
            }
        }
    }
};
const Digits digits;

inline const uint8_t* signs_of(const uint8_t* tile, int64_t unit) { return tile + unit / superunit * (superunit + 1) * 32; }
inline const uint8_t* unit_of(const uint8_t* tile, int64_t unit) { return signs_of(tile, unit) + 32 + unit % superunit * 32; }

struct Triple {
    int index;
    bool negative;
};

inline Triple triple_of(const uint8_t* tile, int64_t triple, int64_t r) {
    const int64_t unit = triple / unit_triples, place = triple % unit_triples, byte = place % 2 * 16 + r;
    const uint8_t both = unit_of(tile, unit)[byte];
    const int64_t half = unit % superunit * 2 + place / 2;
    return {place < 2 ? both & 15 : both >> 4, (signs_of(tile, unit)[byte] >> (7 - half) & 1) != 0};
}

// Place of the low byte of an entry of a triple in the tables; the high byte is 32 further.
inline int64_t entry_at(int64_t triple) { return triple / 2 * 64 + triple % 2 * 16; }

// Sum over units [first, last) of the entries with their signs.
inline void sum_triples(const uint8_t* tile, const int8_t* table, int64_t first, int64_t last, IV* acc) {
#if defined(__AVX2__)
    keep_rows(sum_triples_avx2(tile, table, first, last), acc);
#else
    alignas(64) int32_t sums[tile_rows] = {};
    for (int64_t k = first * unit_triples; k < last * unit_triples; ++k)
        for (int r = 0; r < tile_rows; ++r) {
            const Triple found = triple_of(tile, k, r);
            const int value = table[entry_at(k) + found.index] + 255 * table[entry_at(k) + 32 + found.index];
            sums[r] += found.negative ? -value : value;
        }
    for (int i = 0; i < parts; ++i) acc[i] = load<IV>(sums + i * lanes);
#endif
}

void ternary_tile(const Tiles& w, int64_t tile, const Input& in, int64_t t, float* out) {
    const uint8_t* data = w.data + tile * w.data_bytes();
    const int8_t* table = reinterpret_cast<const int8_t*>(in.tables + t * in.table_bytes());
    IV acc[parts];
    FV total[parts] = {};
    const int64_t groups = w.groups(), per = (w.group + 11) / 12, units = w.units();
    for (int64_t g = 0; g < groups; ++g) {
        if (in.entry == Entry::f32) {
            alignas(64) float exact[tile_rows] = {};
            const float* entries = reinterpret_cast<const float*>(table);
            for (int64_t k = g * per * unit_triples; k < std::min((g + 1) * per, units) * unit_triples; ++k)
                for (int r = 0; r < tile_rows; ++r) {
                    const Triple found = triple_of(data, k, r);
                    exact[r] += found.negative ? -entries[k * 16 + found.index] : entries[k * 16 + found.index];
                }
            for (int i = 0; i < parts; ++i)
                total[i] += load_halves(w.scale + (tile * groups + g) * 16 + i * lanes) * load<FV>(exact + i * lanes);
            continue;
        }
        sum_triples(data, table, g * per, std::min((g + 1) * per, units), acc);
        for (int i = 0; i < parts; ++i)
            total[i] += load_halves(w.scale + (tile * groups + g) * 16 + i * lanes) * to_float(acc[i]);
    }
    const float scale = in.scale[t];
    for (int i = 0; i < parts; ++i) store_f(out + i * lanes, total[i] * scale);
}

// Keeps a product from being fused with the addition that follows: it is rounded by itself, as the definition does.
inline void apart([[maybe_unused]] FV& v) {
#if defined(__FMA__)
    asm("" : "+x"(v));
#endif
}

// One scale for the row, largest |x| / 127, so that products are those of integers.
void ternary_tables(const Input& in, int64_t t, const float* x, int64_t cols) {
    typedef int16_t V16 __attribute__((vector_size(32)));
    typedef int8_t N16 __attribute__((vector_size(16)));
    int64_t whole = cols / lanes * lanes;
    FV tops = {};
    for (int64_t k = 0; k < whole; k += lanes) {
        const FV v = load<FV>(x + k);
        tops = max_of(tops, max_of(v, -v));
    }
    float most = largest(tops);
    for (int64_t k = whole; k < cols; ++k) most = std::max(most, std::fabs(x[k]));
    const float by = most > 0 ? 127.0f / most : 0.0f;
    const bool exact = in.entry == Entry::f32;
    in.scale[t] = exact ? 1.0f : most / 127.0f;
    int8_t* table = reinterpret_cast<int8_t*>(in.tables + t * in.table_bytes());
    // Codes of a stretch of the row at a time, and zeros behind its end, so that a triple may reach beyond.
    constexpr int64_t stretch = 384;
    alignas(64) int16_t q[stretch + 16] = {};
    int64_t coded = 0, base = 0;
    auto code_from = [&](int64_t k, int64_t end) {
        base = k, coded = std::min(k + stretch, end);
        int64_t i = k;
        for (; i + lanes <= coded; i += lanes) {
            FV v = load<FV>(x + i) * by;
            apart(v);
            const IV whole_numbers = as<IV>(v + 12582912.0f) - as<IV>(splat_f(12582912.0f));  // rounds half to even
            for (int j = 0; j < lanes; ++j) q[i - k + j] = static_cast<int16_t>(whole_numbers[j]);
        }
        for (; i < coded; ++i) q[i - k] = static_cast<int16_t>(std::nearbyint(x[i] * by));
        for (int64_t j = coded - k; j < coded - k + 3; ++j) q[j] = 0;
    };
    const V16 d0 = load<V16>(digits.of[0]), d1 = load<V16>(digits.of[1]), d2 = load<V16>(digits.of[2]);
    int64_t triple = 0;
    for (int64_t start = 0; start < cols; start += in.group) {
        const int64_t end = std::min(start + in.group, cols);
        for (int64_t k = start; k < end || triple % unit_triples; k += 3, ++triple) {
            if (exact) {
                float* entry = reinterpret_cast<float*>(table) + triple * 16;
                for (int i = 0; i < 16; ++i) {
                    entry[i] = 0;
                    for (int j = 0; j < 3 && k + j < end; ++j) entry[i] += digits.of[j][i] * x[k + j];
                }
                continue;
            }
            if (k < end && (k >= coded || k < base)) code_from(k, end);
            const int16_t* three = q + (k < end ? k - base : coded - base);
            const V16 sum = d0 * three[0] + d1 * three[1] + d2 * three[2];
            const V16 high = (sum < -127) - (sum > 127);  // a comparison yields -1 where it holds
            const V16 low = sum - high * 255;
            const N16 low8 = __builtin_convertvector(low, N16), high8 = __builtin_convertvector(high, N16);
            memcpy(table + entry_at(triple), &low8, 16);
            memcpy(table + entry_at(triple) + 32, &high8, 16);
        }
    }
}

}  // namespace

void lookup_tile(const Tiles& w, int64_t tile, const Input& in, int64_t t0, int64_t tokens, float* out) {
    for (int64_t t = 0; t < tokens; ++t)
        (w.planes() ? planes_tile : ternary_tile)(w, tile, in, t0 + t, out + t * tile_rows);
}

void tabulate(const Input& in, int64_t t, const float* x, int64_t cols) {
    (in.coding == Coding::planes ? planes_tables : ternary_tables)(in, t, x, cols);
}

void decode_tile(const Tiles& w, int64_t tile, float* out) {
    const int64_t groups = w.groups();
    for (int64_t g = 0; g < groups; ++g) {
        float scale[tile_rows], minimum[tile_rows];
        for (int r = 0; r < tile_rows; ++r) {
            scale[r] = half(w.scale[(tile * groups + g) * 16 + r]);
            minimum[r] = w.minimum ? half(w.minimum[(tile * groups + g) * 16 + r])
                                   : -scale[r] * static_cast<float>(w.planes() ? 1 << (w.bits - 1) : 0);
        }
        const int64_t start = g * w.group, end = std::min(start + w.group, w.cols);
        if (w.planes()) {
            for (int64_t k = start; k < end; ++k) {
                int code[tile_rows] = {};
                for (int p = 0; p < w.bits; ++p) {
                    const uint8_t* piece = piece_of(w, tile, k / 32, p);
                    for (int r = 0; r < tile_rows; ++r) code[r] |= (nibble(w.coding, piece, k / 4 % 8, r) >> (k % 4) & 1) << p;
                }
                for (int r = 0; r < tile_rows; ++r) out[k * 16 + r] = scale[r] * static_cast<float>(code[r]) + minimum[r];
            }
            continue;
        }
        const uint8_t* data = w.data + tile * w.data_bytes();
        const int64_t first = g * ((w.group + 11) / 12) * unit_triples;
        for (int64_t k = start; k < end; ++k)
            for (int r = 0; r < tile_rows; ++r) {
                const Triple found = triple_of(data, first + (k - start) / 3, r);
                const int digit = digits.of[(k - start) % 3][found.index];
                out[k * 16 + r] = scale[r] * static_cast<float>(found.negative ? -digit : digit);
            }
    }
}

}  // namespace trimtab::TRIMTAB_ISA
