// Weights as sums of signs times powers of two: products by look-up, addition and shifts. Legend: T tokens, K inputs, N outputs,
// q planes of signs.
//
// Eight columns of a row are a byte of signs for each plane, and a byte is one of 256 sums of eight inputs. Source: You et al.,
// ShiftAddLLM, arXiv 2406.05981, section 4.1.
#pragma once
#include <cstdint>

namespace trimtab {

constexpr int64_t chunk_cols = 8, chunk_sums = 256;
constexpr int64_t chunk_block = 24;  // chunks whose tables stay in the nearest cache while all tiles look into them

struct Binary {
    const uint8_t* signs = nullptr;   // [ceil(N / 16), K / 8, q, 16]: bit s is column 8 c + s, 1 for +1; rows beyond N are 0
    const uint8_t* scales = nullptr;  // [ceil(N / scale_rows), K / scale_cols, q, apot], see `term`
    int64_t rows = 0, cols = 0;
    int64_t scale_rows = 1, scale_cols = chunk_cols;  // rows and columns that share scales; columns: 8 or 1
    int bits = 1, apot = 1;

    int64_t chunks() const { return cols / chunk_cols; }
    int64_t tiles() const { return (rows + 15) / 16; }
    bool looks_up() const { return scale_cols == chunk_cols; }  // else columns have scales of their own, and tables would be theirs
    // Signs of a tile, and the scales of the blocks of rows that begin in it: those of all tiles sum to the matrix.
    int64_t tile_bytes(int64_t tile) const {
        const int64_t end = (tile + 1) * 16 < rows ? (tile + 1) * 16 : rows;
        const int64_t blocks = (end + scale_rows - 1) / scale_rows - (tile * 16 + scale_rows - 1) / scale_rows;
        return chunks() * bits * 16 + blocks * (cols / scale_cols) * bits * apot;
    }
    const uint8_t* chunk(int64_t tile, int64_t c) const { return signs + (tile * chunks() + c) * bits * 16; }
    const uint8_t* scale(int64_t row, int64_t col) const {
        return scales + (row / scale_rows * (cols / scale_cols) + col / scale_cols) * bits * apot;
    }
};

// What a term of a scale multiplies by: +-2^exponent, or nothing (0).
struct Term {
    bool none, negative;
    int exponent;
};
constexpr Term term(uint8_t code) { return {(code & 127) == 0, code > 127, (code & 127) - 64}; }

// A number times a term, by adding to its exponent and flipping its sign. What falls below the smallest normal number is 0.
inline float shifted(float v, Term by) {
    uint32_t bits;
    __builtin_memcpy(&bits, &v, 4);
    const int exponent = static_cast<int>(bits >> 23 & 255) + by.exponent;
    if (by.none || (bits >> 23 & 255) == 0 || exponent <= 0) return 0.0f;
    bits = (bits & 0x807fffffu) | static_cast<uint32_t>(exponent < 255 ? exponent : 255) << 23;
    if (exponent >= 255) bits &= 0xff800000u;  // beyond the largest: infinite
    bits ^= by.negative ? 0x80000000u : 0u;
    __builtin_memcpy(&v, &bits, 4);
    return v;
}

// The product of one token in plain code over any number with +, - and `shifted`: what the others are compared with, and, over a
// number that has no multiplication, the proof that none is needed. y [N].
template <class F>
void binary_plain(const Binary& w, const F* x, F* y) {
    for (int64_t n = 0; n < w.rows; ++n) y[n] = F(0.0f);
    for (int64_t c = 0; c < w.chunks(); ++c)
        for (int i = 0; i < w.bits; ++i)
            for (int64_t n = 0; n < w.rows; ++n) {
                const uint8_t byte = w.chunk(n / 16, c)[i * 16 + n % 16];
                for (int t = 0; t < w.apot; ++t) {
                    F sum(0.0f);
                    for (int s = 0; s < chunk_cols; ++s) {
                        const F one = w.scale_cols == 1 ? shifted(x[8 * c + s], term(w.scale(n, 8 * c + s)[i * w.apot + t])) : x[8 * c + s];
                        sum = byte >> s & 1 ? sum + one : sum - one;
                    }
                    y[n] = y[n] + (w.scale_cols == 1 ? sum : shifted(sum, term(w.scale(n, 8 * c)[i * w.apot + t])));
                }
            }
}

// Rows of inputs [left, right] turned along both axes, after reordering: what a matrix coded in another basis is multiplied with.
struct Rotation {
    const float *left = nullptr, *right_t = nullptr;  // [left, left] and, transposed, [right, right]
    const int32_t* order = nullptr;                   // [left * right], which input stands where
    int64_t lefts = 0, rights = 0;

    int64_t cols() const { return lefts * rights; }
    int64_t flops() const { return 2 * cols() * (lefts + rights); }
    // x [cols] in place; room [cols].
    void apply(float* x, float* room) const;
};

struct BinaryKernels {
    // tables [K / 8, 256]: entry p of a chunk is the sum of +x_s where bit s of p is set and of -x_s elsewhere.
    void (*tabulate)(const float* x, int64_t cols, float* tables);
    // out [16] += rows of a tile times chunks [first, last) of the input whose tables these are; scales of whole chunks only.
    void (*dot)(const Binary& w, int64_t tile, int64_t first, int64_t last, const float* tables, float* out);
    // The rows of a tile as floats [K, 16].
    void (*decode)(const Binary& w, int64_t tile, float* out);
};

const BinaryKernels& binary_kernels();  // of the instruction set in use

// A matrix, and where its products go.
struct BinaryProduct {
    Binary w;
    int values = 0;
    int64_t column = 0;
    const float* bias = nullptr;
    float factor = 1, softcap = 0;
};

// y [T, N] = x [T, K] times W: few tokens by look-up, many (or where columns have scales of their own) with the decoded matrix.
void binary_multiply(const Binary& w, const float* x, int64_t tokens, int threads, float* y);

}  // namespace trimtab
