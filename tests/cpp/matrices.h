// Random matrices in tiles beside their plain values, and conversions written from the definition of each format.
#pragma once
#include <cstdint>
#include <random>
#include <vector>

#include "native/tiles.h"

namespace trimtab {

struct Random {
    std::mt19937_64 engine;
    explicit Random(uint64_t seed) : engine(seed) {}
    int64_t below(int64_t n) { return static_cast<int64_t>(engine() % static_cast<uint64_t>(n)); }
    int64_t between(int64_t low, int64_t high) { return low + below(high - low + 1); }
    bool coin() { return below(2) != 0; }
    float uniform(float low, float high) { return low + (high - low) * static_cast<float>(below(1 << 24)) / (1 << 24); }
    std::vector<float> floats(int64_t count, float low = -1, float high = 1) {
        std::vector<float> made(static_cast<size_t>(count));
        for (float& x : made) x = uniform(low, high);
        return made;
    }
    template <class T>
    T of(std::initializer_list<T> choices) {
        return choices.begin()[below(static_cast<int64_t>(choices.size()))];
    }
};

double half_value(uint16_t bits);
double bf16_value(uint16_t bits);
uint16_t nearest_half(double x);  // ties to even; a magnitude of 65520 or more gives infinity
uint16_t nearest_bf16(float x);
double coded(Coding coding, float x);  // x as a page or a float matrix keeps it

// A matrix whose buffers are exactly as long as they must be, so that a read behind one is seen.
struct Plain {
    Tiles tiles;
    std::vector<uint8_t> data, sub, choice;
    std::vector<uint16_t> scale, minimum;
    std::vector<double> value;      // [rows, cols]
    std::vector<double> magnitude;  // [rows, cols]: bound of each term a kernel may add up for one element of W

    double at(int64_t row, int64_t col) const { return value[static_cast<size_t>(row * tiles.cols + col)]; }
    double bound(int64_t row, int64_t col) const { return magnitude[static_cast<size_t>(row * tiles.cols + col)]; }
    Plain() = default;
    Plain(Plain&&) = default;  // vectors keep their address
    Plain& operator=(Plain&&) = default;
};

enum class Fill { random, largest };  // largest: all codes at their largest, which brings 16-bit sums to their limit

Plain float_matrix(Random& random, Coding coding, int64_t rows, int64_t cols);
// group 0: one scale for the row. Values are about 1 / sqrt(cols).
Plain int_matrix(Random& random, Scales scales, int bits, bool minimum, int64_t rows, int64_t cols, int64_t group,
                 Fill fill = Fill::random);

// Values by code of a table that the kernels of these bits can hold, with its largest ones among them.
std::vector<int32_t> table_of(Random& random, int bits, int tables);
std::vector<int32_t> pair_tables(int bits, bool flint);  // OliVe's normal values, then its outliers
// tables 0: bipolar. pairs: of `values`, or one of several tables for every row of a group. largest: the codes of the largest
// magnitudes, alike in all columns.
Plain grid_matrix(Random& random, const std::vector<int32_t>& values, int tables, bool pairs, Scales scales, int bits, int64_t rows,
                  int64_t cols, int64_t group, Fill fill = Fill::random);

}  // namespace trimtab
