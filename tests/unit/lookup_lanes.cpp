// The AVX-512 table lookup against plain sums, on any processor: its intrinsics are emulated. Prints the number of mismatches.
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

#define SIMDE_ENABLE_NATIVE_ALIASES
#define TRIMTAB_EMULATE_AVX512
#include "isa/lanes.h"

template <int BITS>
int mismatches(std::mt19937& random) {
    const int64_t units = 1 + static_cast<int64_t>(random() % 5);
    std::vector<uint8_t> data(static_cast<size_t>(units * BITS * 64));
    std::vector<int8_t> table(static_cast<size_t>(units * 8 * 16));
    for (auto& byte : data) byte = static_cast<uint8_t>(random());
    for (auto& entry : table) entry = static_cast<int8_t>(static_cast<int>(random() % 255) - 127);
    int32_t found[16];
    simde_mm512_storeu_si512(found, sum_lanes<BITS>(data.data(), table.data(), units));
    int wrong = 0;
    for (int row = 0; row < 16; ++row) {
        int32_t wanted = 0;
        for (int64_t unit = 0; unit < units; ++unit)
            for (int plane = 0; plane < BITS; ++plane)
                for (int block = 0; block < 8; ++block) {
                    const uint8_t byte = data[static_cast<size_t>((unit * BITS + plane) * 64 + 4 * row + block % 4)];
                    const int nibble = block < 4 ? byte & 15 : byte >> 4;
                    wanted += table[static_cast<size_t>((unit * 8 + block) * 16 + nibble)] * (1 << plane);
                }
        wrong += wanted != found[row];
    }
    return wrong;
}

int main() {
    std::mt19937 random(7);
    int wrong = 0;
    for (int round = 0; round < 500; ++round)
        wrong += mismatches<1>(random) + mismatches<2>(random) + mismatches<3>(random) + mismatches<4>(random);
    std::printf("%d\n", wrong);
}
