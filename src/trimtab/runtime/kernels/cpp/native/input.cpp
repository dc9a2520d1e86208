// The input of a product in the form its weights want.
#include <cstring>

#include "native/native.h"

namespace trimtab {
int64_t Input::bytes(int64_t tokens) const {
    if (lookup() && tokens <= lookup_tokens)
        return aligned(tokens * table_bytes()) + aligned(tokens * scales() * 4) + aligned(tokens * sums() * 4);
    if (!ints) return aligned(tokens * stride * 4);
    const int64_t rows = tokens * passes;
    return (decoded ? aligned(tokens * stride * 4) : 0) + aligned(rows * stride) + aligned(rows * (stride / act_group) * 4) + aligned(rows * ((stride + group - 1) / group) * 4);
}

void Input::place(char* at, int64_t tokens) {
    if (lookup() && tokens <= lookup_tokens) {
        tables = reinterpret_cast<uint8_t*>(at);
        at += aligned(tokens * table_bytes());
        scale = reinterpret_cast<float*>(at);
        at += aligned(tokens * scales() * 4);
        sum = reinterpret_cast<float*>(at);
        return;
    }
    if (!ints) {
        x = reinterpret_cast<float*>(at);
        return;
    }
    if (decoded) x = reinterpret_cast<float*>(at), at += aligned(tokens * stride * 4);
    codes = reinterpret_cast<int8_t*>(at);
    at += aligned(tokens * passes * stride);
    scale = reinterpret_cast<float*>(at);
    at += aligned(tokens * passes * (stride / act_group) * 4);
    sum = reinterpret_cast<float*>(at);
}

void Input::fill(int64_t t, const float* values, int64_t cols) const {
    if (tables) return tile_kernels().tabulate(*this, t, values, cols);
    float* to = x + t * stride;
    if (ints) {
        tile_kernels().quantize(*this, t, values, cols);
        for (int pass = 0; decoded && pass < passes; ++pass) {
            const int64_t row = t * passes + pass, acts = stride / act_group;
            for (int64_t k = 0; k < stride; ++k)
                to[k] = (pass ? to[k] : 0.0f) + scale[row * acts + k / act_group] * static_cast<float>(codes[row * stride + k]);
        }
        return;
    }
    std::memcpy(to, values, static_cast<size_t>(cols) * 4);
    for (int64_t k = cols; k < stride; ++k) to[k] = 0;
}

void Input::dot(Kernel kernel, const Tiles& w, int64_t tile, int64_t t0, int64_t tokens, float* out) const {
    kernel(w, tile, *this, t0 * passes, tokens * passes, out);
    if (passes == 1) return;
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t i = 0; i < tile_rows; ++i) out[t * tile_rows + i] = out[2 * t * tile_rows + i] + out[(2 * t + 1) * tile_rows + i];
}

}  // namespace trimtab
