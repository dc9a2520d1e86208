// Matrices in tiles of 16 rows, the layout the native program multiplies. Legend: T tokens, K inputs, N outputs.
//
// A tile holds 16 rows of W [N, K] side by side, so that one vector register carries the same columns of 8 or 16 rows
// and no product needs a sum across a register. Rows beyond N and columns beyond K are zero.
//
//   f32, f16   data [tiles, K, 16]
//   bf16       data [tiles, ceil(K / 2), 16, 2]
//   ints       codes [tiles, Kp / 32, 64 * bits], Kp = K rounded up to 32: units of 32 columns. A unit is its 4-bit part,
//              then its 2-bit part, then its 1-bit part, as the binary digits of `bits` say (8 bits: whole bytes). In the
//              f-bit part every 64-byte vector holds 32 / f columns: byte 4 r + j keeps, from its lowest f bits up,
//              columns j, 4 + j, 8 + j, ... of row r.
//   grid       codes as those of ints; what a code stands for is looked up, see Grid
//   pairs      alike, and what a code stands for depends on its neighbour: columns 2 i and 2 i + 1 are a pair
//   planes     codes [tiles, Kp / 32, bits, 64]: a unit of 32 columns is one 64-byte piece for each plane (bit of the code),
//              lowest first. A piece holds the nibbles of 8 blocks of 4 columns: bit k of a nibble is column k of its block.
//              Byte 32 h + 16 l + r keeps row r of block 4 h + l in its low and of block 4 h + 2 + l in its high half, so
//              that a 128-bit half of a register needs one table.
//   lanes      as planes, but byte 4 r + j keeps row r of block j in its low and of block 4 + j in its high half, so that a
//              32-bit lane holds one row.
//   ternary    groups of whole units of 12 columns, 4 triples; the columns a group lacks are zero. 32 bytes a unit: byte
//              16 l + r keeps row r of triple l in its low and of triple 2 + l in its high half, as |9 w0 + 3 w1 + w2|. Before
//              every 4 units stand their 32 bytes of signs: bit 7 - v of byte i belongs to byte i of half v of the 8 halves.
#pragma once
#include <cstdint>

namespace trimtab {

constexpr int tile_rows = 16, unit_cols = 32;

// Up to a whole cache line.
constexpr int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

enum class Coding : int { f32, f16, bf16, ints, ternary, planes, lanes, grid, pairs };
// What a table of partial sums keeps of each: one byte, two bytes, or the float itself.
enum class Entry : int { i8, i16, f32 };
// How the scales of ints, grids and pairs are kept, each for 16 rows: half: fp16 [tiles, groups, 16], minimum alike. q4_k: fp16
// [tiles, K / 256, 2, 16] times uint8 [tiles, K / 256, 2, 8, 16]. q6_k: fp16 [tiles, K / 256, 16] times int8
// [tiles, K / 256, 16, 16]. stepped: fp16 [tiles, 16] times uint8 [tiles, groups, 16]. powers: 2^(uint8 [tiles, groups, 16] - 127).
enum class Scales : int { half, q4_k, q6_k, stepped, powers };

// What the codes of a grid or of pairs stand for, as the integers a product multiplies.
//   table        value + offset of code c of table t lies at low[16 t + c], or low[c] of codes of 5 and 6 bits
//   magnitude    7 and 8 bits: the highest bit is the sign
//   pairs        4 bits: low[c], or low[16 + c] where the other half of the pair is `victim`; the victim itself stands for 0
//   split_pairs  alike where values are beyond int8: low, and 8 times what `high` holds, with an offset of its own
//   wide_pairs   8 bits: normal values as those of magnitude; outliers have an exponent of 4 and a mantissa of 3 bits and are
//                (8 + mantissa) * 2^(exponent + 4). No integers: tiles are decoded to floats and multiplied with floats.
struct Grid {
    enum class Form : int { table, magnitude, pairs, split_pairs, wide_pairs };
    Form form = Form::table;
    int tables = 1;  // 1, 2 or 4; which one a group has stands in `choice`
    int offset = 0, high_offset = 0;
    uint8_t low[64] = {}, high[32] = {};

    int choice_bits() const { return tables / 2; }
    int zero() const { return offset + 8 * high_offset; }

    // Of `tables` tables of 2^bits values by code; pairs: normal values, then outliers. Throws std::invalid_argument where no
    // kernel can hold them: beyond 16 with up to 5 bits, beyond 64 with 6, and with 7 and 8 whatever is not sign and magnitude.
    static Grid of(const int32_t* values, int tables, int bits, bool pairs);
    // What code `code` of table `table` stands for; of pairs, table 1 is that of outliers.
    double value(int bits, int table, int code) const;
};
constexpr int victim(int bits) { return 1 << (bits - 1); }

// How many times the typical scale of its token a group of activations has at least to be coded twice, see Input. What it keeps
// of SmolLM2 on 2,048 tokens, against the same weights with float inputs: 3 keeps a top-1 of 98 % with 5 to 8 bits, or 4 in groups of
// 32. Outputs of fewer bits lie closer together: with 4 bits in groups of 64, 3 keeps 96.7 % and 2.5 97.4 %; with 3 bits 1.5 keeps
// 97.5 % (codes of one byte alone 92.7 %). Of the groups of a matrix's inputs, 3 to 13 % are coded twice at 3, 18 to 32 % at 1.5.
constexpr float outlier(int bits, int64_t group) { return bits <= 3 ? 1.5f : bits == 4 && group > 32 ? 2.5f : 3.0f; }

struct Tiles {
    Coding coding = Coding::f32;
    Scales scales = Scales::half;
    int bits = 0;
    const uint8_t* data = nullptr;
    const uint16_t* scale = nullptr;
    const uint16_t* minimum = nullptr;  // null: w = scale * (code - 2^(bits-1)), else scale * code + minimum
    const uint8_t* sub = nullptr;
    bool bipolar = false;  // ints: w = scale * (2 * code + 1 - 2^bits)
    Grid grid;
    const uint8_t* choice = nullptr;  // [tiles, groups, 2 * choice_bits]: that of row r at bit r * choice_bits, little-endian
    int64_t rows = 0, cols = 0, group = 0;  // group: columns that share a scale, a multiple of 16 (lookups: of 4; ternary: any)
    // Products by table lookup alone.
    Entry entry = Entry::i8;
    int64_t table_group = 0;    // columns that share the scale of their tables, a multiple of 4; 0: all
    bool fast_average = false;  // planes with entries of one byte: rounding averages of bytes in place of sums

    int64_t tiles() const { return (rows + tile_rows - 1) / tile_rows; }
    int64_t padded() const {
        return coded() || planes() ? (cols + unit_cols - 1) / unit_cols * unit_cols
               : coding == Coding::bf16 ? (cols + 1) / 2 * 2
                                        : cols;
    }
    // Units of codes; and whether they are multiplied as integers.
    bool coded() const { return coding == Coding::ints || coding == Coding::grid || coding == Coding::pairs; }
    bool integers() const { return coded() && !(coding == Coding::pairs && grid.form == Grid::Form::wide_pairs); }
    bool planes() const { return coding == Coding::planes || coding == Coding::lanes; }
    bool lookup() const { return coding == Coding::ternary || planes(); }
    // The table of a group's row.
    int choice_of(int64_t tile, int64_t g, int64_t row) const {
        const int bits = grid.choice_bits(), at = static_cast<int>(row) * bits;
        return bits ? choice[(tile * groups() + g) * 2 * bits + at / 8] >> at % 8 & ((1 << bits) - 1) : 0;
    }
    // Scales of a row. Padding has none: in rows of an odd number of groups of 16 it would be one group more.
    int64_t groups() const { return coded() || lookup() ? (cols + group - 1) / group : 0; }
    // Columns of an input that share one activation scale.
    int64_t act_group() const {
        if (lookup()) return table_group ? table_group : padded();
        return group % 64 == 0 && padded() % 64 == 0 ? 64 : group % 32 == 0 ? 32 : 16;
    }
    // Units of 12 columns of a ternary row.
    int64_t units() const { return cols / group * ((group + 11) / 12) + (cols % group + 11) / 12; }
    int64_t data_bytes() const {  // of one tile
        switch (coding) {
            case Coding::f32: return padded() * 64;
            case Coding::f16:
            case Coding::bf16: return padded() * 32;
            case Coding::ternary: return (units() + (units() + 3) / 4) * 32;
            default: return padded() * 2 * bits;
        }
    }
    int64_t tile_bytes() const {
        if (!coded() && !lookup()) return data_bytes();
        if (scales == Scales::q4_k) return data_bytes() + padded() / 256 * (2 * 32 + 2 * 8 * 16);
        if (scales == Scales::q6_k) return data_bytes() + padded() / 256 * (32 + 16 * 16);
        const int64_t choices = coding == Coding::grid ? groups() * 2 * grid.choice_bits() : 0;
        if (scales == Scales::stepped) return data_bytes() + choices + 32 + groups() * 16;
        if (scales == Scales::powers) return data_bytes() + choices + groups() * 16;
        return data_bytes() + choices + groups() * 32 * (minimum ? 2 : 1);
    }
};

// T rows of activations as a product wants them. Floats: x [T, stride]. Ints: codes, one scale per act_group columns, and
// per weight group the scaled sum of its codes (what a zero point or a minimum multiplies).
//
// One large value, as the residual stream of most models has, makes the other codes of its act group too coarse for 8 bits.
// A group whose scale is at least `twice_from` times the typical one of its token is coded twice: the second codes are those of
// what the first rounded away, 16 bits in all. Source: mixed precision by outlier columns, LLM.int8(), arXiv 2208.07339.
//
// Lookups: tables instead of codes. Planes: 16 entries for every 4 columns, entry j = sum over k of (bit k of j ? +x_k : -x_k);
// one byte: int8 [K / 4, 16]; two: the low bytes of all as signed numbers, then the high ones; or floats. A scale per act_group
// columns. Ternary: the entries of a unit are those of two triples, low bytes, high bytes, then of the other two: 128 bytes,
// entry = 255 * high + low; one scale for the row. Or floats [4 triples, 16] of x itself, and no scale.
struct Input {
    bool ints = false;
    Coding coding = Coding::f32;  // of the matrices whose tables these are: ternary or planes
    Entry entry = Entry::i8;
    bool fast_average = false;
    int64_t cols = 0;
    uint8_t* tables = nullptr;  // [T, table_bytes()]
    float twice_from = 0;  // 0: all groups, infinity: none
    bool decoded = false;  // ints only: what the codes stand for lies in x too
    int64_t stride = 0;  // columns of a row, padded
    int64_t act_group = 0, group = 0;
    float* x = nullptr;      // of ints: what the codes stand for, where a product wants it
    int8_t *codes = nullptr, *second = nullptr;               // [T, stride]
    float *scale = nullptr, *second_scale = nullptr;          // [T, stride / act_group]
    float* sum = nullptr;                                     // [T, ceil(stride / group)], of both codes
    int32_t* twice = nullptr;  // [T, 1 + stride / act_group]: number of groups coded twice, then which

    bool lookup() const { return coding == Coding::ternary || coding == Coding::planes; }
    int64_t table_bytes() const {  // of one token
        if (coding == Coding::ternary)
            return (cols / group * ((group + 11) / 12) + (cols % group + 11) / 12) * (entry == Entry::f32 ? 256 : 128);
        return stride * (entry == Entry::i8 ? 4 : entry == Entry::i16 ? 8 : 16);
    }
    int64_t scales() const { return (stride + act_group - 1) / act_group; }  // of one token
    int64_t sums() const { return (stride + group - 1) / group; }

    int64_t acts() const { return stride / act_group; }
    int32_t* listed(int64_t t) const { return twice + t * (1 + acts()); }  // of one token

    // twice_from below 0: as the bits of the weights ask for.
    static Input of(const Tiles& w, float twice_from = -1) {
        Input in;
        in.ints = w.integers(), in.stride = w.padded();
        if (in.ints || w.lookup()) in.act_group = w.act_group(), in.group = w.group;
        if (in.ints) in.twice_from = twice_from < 0 ? outlier(w.bits, w.group) : twice_from;
        if (w.lookup()) {
            in.coding = w.planes() ? Coding::planes : Coding::ternary, in.cols = w.cols;
            in.entry = w.entry, in.fast_average = w.fast_average;
        }
        return in;
    }
    // True if both ask for the same codes or tables.
    bool same(const Input& other) const {
        return ints == other.ints && stride == other.stride && group == other.group && twice_from == other.twice_from &&
               coding == other.coding && act_group == other.act_group && entry == other.entry &&
               fast_average == other.fast_average;
    }
    int64_t bytes(int64_t tokens) const;
    // Takes its buffers for `tokens` tokens from `at`, bytes(tokens) of them.
    void place(char* at, int64_t tokens);
    // Codes, tabulates or copies one token of `cols` values.
    void fill(int64_t t, const float* x, int64_t cols) const;
};

// Tokens up to which products are looked up; above, decoding the matrix once is cheaper.
constexpr int64_t lookup_tokens = 8;

}  // namespace trimtab
