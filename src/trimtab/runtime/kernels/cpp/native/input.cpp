// The input of a product in the form its weights want.
#include <cstring>
#include <type_traits>

#include "native/native.h"

namespace trimtab {
int64_t Input::bytes(int64_t tokens) const {
    if (lookup() && tokens <= lookup_tokens)
        return aligned(tokens * table_bytes()) + aligned(tokens * scales() * 4) + aligned(tokens * sums() * 4);
    if (!ints) return aligned(tokens * stride * 4);
    return (decoded ? aligned(tokens * stride * 4) : 0) + 2 * aligned(tokens * stride) + 2 * aligned(tokens * acts() * 4) +
           aligned(tokens * sums() * 4) + aligned(tokens * (1 + acts()) * 4);
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
    auto take = [&](auto*& pointer, int64_t bytes) {
        pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(at);
        at += aligned(bytes);
    };
    take(codes, tokens * stride), take(second, tokens * stride);
    take(scale, tokens * acts() * 4), take(second_scale, tokens * acts() * 4);
    take(sum, tokens * sums() * 4);
    take(twice, tokens * (1 + acts()) * 4);
}

void Input::fill(int64_t t, const float* values, int64_t cols) const {
    if (tables) return tile_kernels().tabulate(*this, t, values, cols);
    float* to = x + t * stride;
    if (ints) {
        tile_kernels().quantize(*this, t, values, cols);
        if (!decoded) return;
        for (int64_t k = 0; k < stride; ++k)
            to[k] = scale[t * acts() + k / act_group] * static_cast<float>(codes[t * stride + k]);
        const int32_t* which = listed(t);
        for (int32_t i = 1; i <= which[0]; ++i)
            for (int64_t k = which[i] * act_group; k < (which[i] + 1) * act_group; ++k)
                to[k] += second_scale[t * acts() + which[i]] * static_cast<float>(second[t * stride + k]);
        return;
    }
    std::memcpy(to, values, static_cast<size_t>(cols) * 4);
    for (int64_t k = cols; k < stride; ++k) to[k] = 0;
}

}  // namespace trimtab
