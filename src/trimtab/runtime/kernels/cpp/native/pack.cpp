// Codes of one byte each into the layouts of tiles.h, and back. Nothing is rounded.
#include "native/pack.h"

#include <cstring>
#include <initializer_list>

#include "native/tiles.h"

namespace trimtab {
namespace {

// Place of the nibble of row r, block b (of 8) in a 64-byte piece of planes or lanes: byte, and whether it is the high half.
struct Place {
    int64_t byte;
    bool high;
};
Place place_of(bool lanes, int64_t b, int64_t r) {
    return lanes ? Place{4 * r + b % 4, b >= 4} : Place{b / 4 * 32 + b % 2 * 16 + r, b % 4 >= 2};
}

// Weights -1, 0, 1 [rows, cols] into triples of groups, and back: rows a multiple of 16.
template <class Visit>
void visit_triples(int64_t rows, int64_t cols, int64_t group, Visit&& visit) {
    Tiles w;
    w.coding = Coding::ternary, w.cols = cols, w.group = group;
    const int64_t bytes = w.data_bytes();
    for (int64_t row = 0; row < rows; ++row) {
        int64_t triple = 0;
        for (int64_t start = 0; start < cols; start += group) {
            const int64_t end = start + group < cols ? start + group : cols;
            for (int64_t k = start; k < end; k += 3, ++triple) {
                const int64_t unit = triple / 4, place = triple % 4, byte = place % 2 * 16 + row % 16;
                const int64_t signs = row / 16 * bytes + unit / 4 * 160;
                visit(row * cols + k, end - k < 3 ? end - k : 3, signs + 32 + unit % 4 * 32 + byte, place >= 2, signs + byte,
                      7 - (unit % 4 * 2 + place / 2));
            }
            triple = (triple + 3) / 4 * 4;
        }
    }
}

}  // namespace

void pack_tiles(const uint8_t* from, int64_t rows, int64_t cols, int bits, uint8_t* to) {
    for (int64_t tile = 0; tile < rows / 16; ++tile)
        for (int64_t u = 0; u < cols / 32; ++u) {
            uint8_t* unit = to + (tile * (cols / 32) + u) * 64 * bits;
            const uint8_t* source = from + tile * 16 * cols + u * 32;
            int shift = 0;
            for (int part : {8, 4, 2, 1}) {
                if (!(bits & part)) continue;
                const int per = 8 / part, mask = (1 << part) - 1;
                for (int v = 0; v < part; ++v)
                    for (int r = 0; r < 16; ++r)
                        for (int j = 0; j < 4; ++j) {
                            int byte = 0;
                            for (int i = 0; i < per; ++i)
                                byte |= (source[r * cols + (v * per + i) * 4 + j] >> shift & mask) << (i * part);
                            unit[v * 64 + r * 4 + j] = static_cast<uint8_t>(byte);
                        }
                unit += 64 * part, shift += part;
            }
        }
}

void unpack_tiles(const uint8_t* from, int64_t rows, int64_t cols, int bits, uint8_t* to) {
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t k = 0; k < cols; ++k) {
            const uint8_t* unit = from + (row / 16 * (cols / 32) + k / 32) * 64 * bits;
            const int64_t four = k % 32 / 4, byte = row % 16 * 4 + k % 4;
            int code = 0, shift = 0;
            for (int part : {8, 4, 2, 1}) {
                if (!(bits & part)) continue;
                const int64_t per = 8 / part;
                code |= (unit[four / per * 64 + byte] >> (four % per * part) & ((1 << part) - 1)) << shift;
                unit += 64 * part, shift += part;
            }
            to[row * cols + k] = static_cast<uint8_t>(code);
        }
}

void pack_planes(const uint8_t* from, int64_t rows, int64_t cols, int bits, bool lanes, uint8_t* to) {
    for (int64_t tile = 0; tile < rows / 16; ++tile)
        for (int64_t u = 0; u < cols / 32; ++u)
            for (int p = 0; p < bits; ++p) {
                uint8_t* piece = to + ((tile * (cols / 32) + u) * bits + p) * 64;
                std::memset(piece, 0, 64);
                for (int64_t r = 0; r < 16; ++r)
                    for (int64_t b = 0; b < 8; ++b) {
                        const uint8_t* four = from + (tile * 16 + r) * cols + u * 32 + b * 4;
                        int nibble = 0;
                        for (int k = 0; k < 4; ++k) nibble |= (four[k] >> p & 1) << k;
                        const Place at = place_of(lanes, b, r);
                        piece[at.byte] = static_cast<uint8_t>(piece[at.byte] | nibble << (at.high ? 4 : 0));
                    }
            }
}

void unpack_planes(const uint8_t* from, int64_t rows, int64_t cols, int bits, bool lanes, uint8_t* to) {
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t k = 0; k < cols; ++k) {
            const Place at = place_of(lanes, k % 32 / 4, row % 16);
            int code = 0;
            for (int p = 0; p < bits; ++p) {
                const uint8_t byte = from[((row / 16 * (cols / 32) + k / 32) * bits + p) * 64 + at.byte];
                code |= ((at.high ? byte >> 4 : byte) >> (k % 4) & 1) << p;
            }
            to[row * cols + k] = static_cast<uint8_t>(code);
        }
}

void pack_ternary(const int8_t* from, int64_t rows, int64_t cols, int64_t group, uint8_t* to) {
    Tiles w;
    w.coding = Coding::ternary, w.cols = cols, w.group = group;
    std::memset(to, 0, static_cast<size_t>(rows / tile_rows * w.data_bytes()));
    visit_triples(rows, cols, group,
                  [&](int64_t first, int64_t count, int64_t at, bool high, int64_t sign, int64_t bit) {
                      int index = 0;
                      for (int64_t j = 0; j < 3; ++j) index = 3 * index + (j < count ? from[first + j] : 0);
                      if (index < 0) to[sign] = static_cast<uint8_t>(to[sign] | 1 << bit), index = -index;
                      to[at] = static_cast<uint8_t>(to[at] | index << (high ? 4 : 0));
                  });
}

void unpack_ternary(const uint8_t* from, int64_t rows, int64_t cols, int64_t group, int8_t* to) {
    visit_triples(rows, cols, group,
                  [&](int64_t first, int64_t count, int64_t at, bool high, int64_t sign, int64_t bit) {
                      int rest = high ? from[at] >> 4 : from[at] & 15;
                      const bool negative = from[sign] >> bit & 1;
                      for (int64_t j = 2; j >= 0; --j) {
                          const int digit = (rest + 1) % 3 - 1;
                          rest = (rest - digit) / 3;
                          if (j < count) to[first + j] = static_cast<int8_t>(negative ? -digit : digit);
                      }
                  });
}

}  // namespace trimtab
