// What the native program calls in the instruction-set specific files. Legend: T tokens, N query heads, G KV heads, H head
// size, Q queries that share a KV head (of several tokens and heads), S keys.
#pragma once
#include <cstdint>

#include "kernels.h"
#include "native/tiles.h"

namespace trimtab {

struct Norm {
    bool layer = false;  // LayerNorm, else RMSNorm
    float eps = 0;
    int64_t size = 0;
    const float* weight = nullptr;  // unit offset already added
    const float* bias = nullptr;
    int64_t nbytes() const { return size * 4 * ((weight ? 1 : 0) + (bias ? 1 : 0)); }
};

constexpr int max_head_dim = 512;

// What the codes of one integer page stand for: scale * code + minimum, both fp16 [page, ceil(H / group)].
struct Grid {
    const uint16_t* scale = nullptr;
    const uint16_t* minimum = nullptr;
};

// Keys and values of one KV head of one sequence in pages of `page` tokens, [page, H] each.
struct Pages {
    Coding coding = Coding::f32;  // f32, f16, bf16, or ints: uint8 codes
    const uint8_t* const* k = nullptr;
    const uint8_t* const* v = nullptr;
    int64_t page = 0, head_dim = 0;
    const Grid* k_grid = nullptr;  // by page; ints only
    const Grid* v_grid = nullptr;
    int64_t group = 0;             // elements along H that share a scale
};

// Queries over keys [first, last): partial sums, largest score and sum of weights of each query, to be merged or divided.
struct Attend {
    Pages pages;
    int64_t first = 0, last = 0;
    int queries = 0;                 // at most max_queries
    const float* const* q = nullptr; // [queries] -> [H]
    const int64_t* low = nullptr;    // [queries] a query sees keys [low, high)
    const int64_t* high = nullptr;
    float scale = 1, softcap = 0;    // softcap 0: none
    bool turned = false;             // turn keys round once for all queries: for many of them over keys that are read once
    bool unified = false;            // subtract phi instead of the running maximum; ranges of keys know nothing of each other
    float phi = 0;
    float* largest = nullptr;        // [queries] out: running maximum (unified: the largest score)
    float* weight = nullptr;         // [queries] out: sum of exp(score - maximum or phi)
    float* out = nullptr;            // [queries, H] out: sum of exp(...) * v
};
constexpr int max_queries = 48;

struct TileKernels {
    // out [tokens, 16] = rows of `tile` times tokens t0 .. t0 + tokens - 1 of the input.
    void (*dot_tile)(const Tiles& w, int64_t tile, const Input& in, int64_t t0, int64_t tokens, float* out);
    void (*norm)(const Norm& norm, const float* x, float* y);
    // Codes of row t of `in`, of `cols` values.
    void (*quantize)(const Input& in, int64_t t, const float* x, int64_t cols);
    // Tables of row t of `in`, of `cols` values.
    void (*tabulate)(const Input& in, int64_t t, const float* x, int64_t cols);
    // The columns of a tile of a matrix multiplied by lookups, as floats [cols, 16].
    void (*decode_tile)(const Tiles& w, int64_t tile, float* out);
    // gate = act(gate) * up, or act(gate) where up is null; `count` is a multiple of 16.
    void (*activate)(Act act, float* gate, const float* up, int64_t count);
    void (*attend)(const Attend& a);
    // A row of keys or values into the coding of a page.
    void (*encode)(Coding coding, const float* x, int64_t count, uint8_t* out);
    // Rotate pairs (i, i + half) of x by cos, sin [half].
    void (*rotate)(float* x, const float* cos, const float* sin, int64_t half);
    // A row of keys or values into an integer page.
    void (*encode_grid)(const float* x, int64_t count, int64_t group, uint8_t* codes, uint16_t* scale, uint16_t* minimum);
    // As dot_tile, one token after the other.
    void (*dot_each)(const Tiles& w, int64_t tile, const Input& in, int64_t t0, int64_t tokens, float* out);
    // As dot_tile from floats in `in.x`, the tile decoded to floats once for all tokens.
    void (*dot_decoded)(const Tiles& w, int64_t tile, const Input& in, int64_t t0, int64_t tokens, float* out);
};

const TileKernels& tile_kernels();  // of the instruction set in use

}  // namespace trimtab
