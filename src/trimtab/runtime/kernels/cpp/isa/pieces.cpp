// Bounds of pieces of keys, and what they promise a query. Legend: H head size.
#include "isa/simd.h"
#include "native/native.h"

namespace trimtab::TRIMTAB_ISA {

namespace {

// The bf16 that is no smaller, or no larger, than x.
uint16_t rounded(float x, bool up) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const bool away = (bits >> 31) == (up ? 0u : 1u);
    return static_cast<uint16_t>((bits + (away ? 0xffffu : 0u)) >> 16);
}

}  // namespace

void bound(const float* keys, int64_t count, int64_t width, uint16_t* bounds) {
    for (int64_t c = 0; c < width; ++c) {
        float least = keys[c], most = keys[c];
        for (int64_t t = 1; t < count; ++t) {
            const float x = keys[t * width + c];
            least = x < least ? x : least, most = x > most ? x : most;
        }
        bounds[c] = rounded(least, false), bounds[width + c] = rounded(most, true);
    }
}

void promise(const float* negative, const float* positive, const uint16_t* bounds, int64_t pieces, int64_t width, float* out) {
    for (int64_t p = 0; p < pieces; ++p) {
        const uint16_t *least = bounds + 2 * p * width, *most = least + width;
        FV sum{}, other{};
        for (int64_t c = 0; c < width; c += lanes) {
            sum = fma_of(load_bf16s(least + c), load<FV>(negative + c), sum);
            other = fma_of(load_bf16s(most + c), load<FV>(positive + c), other);
        }
        out[p] = sum_of(sum + other);
    }
}

}  // namespace trimtab::TRIMTAB_ISA
