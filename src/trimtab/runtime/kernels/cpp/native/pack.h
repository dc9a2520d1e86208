// Codes [rows, cols] of one byte each into the layouts of tiles.h, and back: rows a multiple of 16.
#pragma once
#include <cstdint>

namespace trimtab {

// Units of ints; cols a multiple of 32.
void pack_tiles(const uint8_t* codes, int64_t rows, int64_t cols, int bits, uint8_t* out);
void unpack_tiles(const uint8_t* packed, int64_t rows, int64_t cols, int bits, uint8_t* out);

// Planes, or lanes; cols a multiple of 32.
void pack_planes(const uint8_t* codes, int64_t rows, int64_t cols, int bits, bool lanes, uint8_t* out);
void unpack_planes(const uint8_t* packed, int64_t rows, int64_t cols, int bits, bool lanes, uint8_t* out);

// Triples of the weights -1, 0, 1 in groups of `group` columns.
void pack_ternary(const int8_t* weights, int64_t rows, int64_t cols, int64_t group, uint8_t* out);
void unpack_ternary(const uint8_t* packed, int64_t rows, int64_t cols, int64_t group, int8_t* out);

}  // namespace trimtab
