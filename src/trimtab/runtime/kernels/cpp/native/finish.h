// What stands behind the product of a tile, whatever its matrix is held in: bias, factor, cap, and the place of the result.
#pragma once
#include <cmath>
#include <cstring>

#include "native/program.h"

namespace trimtab {

// out [tokens, 16], of which `count` rows are there; bias: of the first of them, null: none; softcap 0: none.
inline void finish(const float* bias, float factor, float softcap, int64_t count, int64_t tokens, float* out) {
    if (bias)
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t i = 0; i < count; ++i) out[t * tile_rows + i] += bias[i];
    if (factor != 1)
        for (int64_t i = 0; i < tokens * tile_rows; ++i) out[i] *= factor;
    if (softcap > 0)
        for (int64_t i = 0; i < tokens * tile_rows; ++i) out[i] = softcap * std::tanh(out[i] / softcap);
}

// Writes out [tokens, 16] to columns column .. column + count - 1 of rows t0 .. of the values, or adds it to them.
inline void put(const Values& to, int64_t column, int64_t t0, Store store, const float* out, int64_t count, int64_t tokens) {
    for (int64_t t = 0; t < tokens; ++t) {
        float* row = to.data + (t0 + t) * to.width + column;
        const float* from = out + t * tile_rows;
        if (store == Store::add)
            for (int64_t i = 0; i < count; ++i) row[i] += from[i];
        else
            std::memcpy(row, from, static_cast<size_t>(count) * 4);
    }
}

}  // namespace trimtab
