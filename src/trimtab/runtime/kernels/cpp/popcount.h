// Products of codes as planes of bits: W [N, K] of n bits times X [T, K] of a bits, both bipolar, v = sum (2 bit_i - 1) 2^i.
//
// Bits of 32 columns are a word; every group of columns begins with a new one, and bits behind its end are 0. Words stand in
// blocks of 16: the first plane of a block, the second, ...; the last block of a row may be shorter. So a register holds one
// plane of one block, and a row is read from its first byte to its last.
// Legend: N rows, K columns of W, T tokens, G groups of a row.
#pragma once
#include <cstdint>

namespace trimtab {

constexpr int64_t word_cols = 32, block_words = 16;

// W, or its shape alone for the input.
struct BitMatrix {
    const uint32_t* words = nullptr;
    const uint16_t* scale = nullptr;  // halves [N, G]
    int64_t rows = 0, cols = 0, group = 0;
    int bits = 0;

    int64_t groups() const { return cols / group; }
    int64_t group_words() const { return (group + word_cols - 1) / word_cols; }
    int64_t row_words() const { return groups() * group_words(); }  // of one plane
    int64_t most() const { return (int64_t{1} << bits) - 1; }       // largest value
};

struct BitInput {
    int64_t tokens = 0;
    int bits = 0;
    const uint32_t* words = nullptr;  // planes [T, row_words * bits]
    const uint8_t* codes = nullptr;   // [T, padded]; products of bytes alone read them
    int64_t padded = 0;               // columns of a row of `codes`, a multiple of 64; zero beyond the last word
    const float* scale = nullptr;     // [T]; y = scale of the token * scale of the row * integer

    int64_t most() const { return (int64_t{1} << bits) - 1; }
};

// Where a product goes: one of the three.
struct BitOutput {
    float* y = nullptr;         // [T, N]
    int64_t* sums = nullptr;    // [T, N] the integers alone; one group
    int32_t* parts = nullptr;   // [n * a, T, N] of every pair of planes for itself; one group, `popcount` alone
};

// What a worker needs: rows of 16 as bytes and as scales of words, with what belongs to up to four tiles of them.
inline int64_t scratch_bytes(const BitMatrix& w, const BitInput& x) {
    const int64_t words = w.row_words() + block_words;
    return 20 * x.padded + 20 * words * 4 + 4 * (words + w.groups() + 2 * block_words) * 4 + 4096;
}

struct BitKernels {
    float (*largest)(const float* x, int64_t count);  // magnitude; NaN if one is
    // codes[c] = clamp(round(x[c] * inverse + most / 2)), ties to even.
    void (*code)(const float* x, int64_t count, float inverse, int most, uint8_t* codes);
    // Planes of one row from its codes, 32 of them a word.
    void (*pack)(const uint8_t* codes, int64_t words, int bits, uint32_t* out);
    void (*unpack)(const uint32_t* from, int64_t words, int bits, uint8_t* codes);
    void (*halves)(const uint16_t* from, int64_t count, float* to);
    // Rows [begin, end) of the product, by counting bits and by multiplying bytes: the same integers. `scratch` is
    // scratch_bytes(w, x) at the beginning of a cache line. Bytes written.
    int64_t (*popcount)(const BitMatrix& w, const BitInput& x, int64_t begin, int64_t end, char* scratch, const BitOutput& out);
    int64_t (*bytes)(const BitMatrix& w, const BitInput& x, int64_t begin, int64_t end, char* scratch, const BitOutput& out);
};

const BitKernels& bit_kernels();  // of the instruction set in use

}  // namespace trimtab
