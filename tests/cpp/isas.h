// The instruction sets that run here, and what a test reaches of each beside its table.
#pragma once
#include <vector>

#include "lmul.h"
#include "binary.h"
#include "native/int8.h"
#include "native/native.h"

namespace trimtab {

// Words of isa/simd.h and isa/vec.h over arrays; `count` is a multiple of 16.
struct Words {
    int lanes;
    void (*exp)(const float* x, int64_t count, float* y);
    void (*fma)(const float* a, const float* b, const float* c, int64_t count, float* y);
    void (*halves)(const uint16_t* from, int64_t count, float* y);  // a register at a time
    void (*half)(const uint16_t* from, int64_t count, float* y);    // one at a time
    void (*half_bits)(const float* x, int64_t count, uint16_t* y);
    void (*bf16s)(const uint16_t* from, int64_t count, float* y);
    float (*sum)(const float* x);      // of `lanes` floats
    float (*largest)(const float* x);  // alike
    // One register each: u, w, s of 4 * lanes bytes; y of lanes int32.
    void (*fold_pairs)(const uint8_t* u, const int8_t* s, int32_t* y);
    void (*fold_signed_pairs)(const int8_t* w, const int8_t* s, int32_t* y);
};

struct Isa {
    const char* name;
    const TileKernels* table;
    const LmulKernels* lmul;
    const Int8Kernels* int8;
    const BinaryKernels* binary;
    const Words* words;
};
const std::vector<Isa>& isas();
void use(const Isa& isa);  // what tile_kernels() gives from now on

}  // namespace trimtab
