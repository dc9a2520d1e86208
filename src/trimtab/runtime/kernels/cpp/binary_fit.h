// How scales are found for groups of weights that become sums of signs times scales.
#pragma once
#include <cstdint>
#include <vector>

namespace trimtab {

struct BinaryFit {
    int bits = 1;              // 1..4
    int apot = 3;              // powers of two of a scale; 0: any number
    int rounds = 50;           // of refitting scales and choosing signs anew; the best of all is kept
    bool nearest = true;       // signs of the nearest level; false: one plane after the other
    std::vector<double> even;  // shares of the range that even levels to begin with span, tried from 3 bits on
};

// scales [groups, bits], descending, of weights w [groups, size]; cost [groups, size] of a squared error, or null.
void binary_fit(const float* w, const float* cost, int64_t groups, int64_t size, const BinaryFit& how, int threads, float* scales);

}  // namespace trimtab
