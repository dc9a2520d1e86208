// What the native program calls in the instruction-set specific files. Legend: T tokens, N query heads, G KV heads, H head
// size, Q queries that share a KV head (of several tokens and heads), S keys.
#pragma once
#include <algorithm>
#include <cstdint>

#include "kernels.h"
#include "native/pages.h"
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

constexpr int max_queries = 48;  // of one call of attention

// Keys and values of one KV head of one sequence: slot s lies in page s / page. New tokens land in pages of one form; where there
// is a second one, those in slots below `k_sealed` (or `v_sealed`) are read from pages of that form.
struct HeadView {
    const PageForm *k_landing = nullptr, *v_landing = nullptr, *k_sealed_form = nullptr, *v_sealed_form = nullptr;
    const int64_t *k_pages = nullptr, *v_pages = nullptr, *k_sealed_pages = nullptr, *v_sealed_pages = nullptr;  // addresses by page
    int64_t k_sealed = 0, v_sealed = 0;
    const uint8_t* channels = nullptr;   // thin keys: which channels the sealed ones keep; null: the first ones
    const int32_t* positions = nullptr;  // of the token in each slot; null: slot s holds position s
    const int32_t* chosen = nullptr;     // what is read: pieces of `chosen_tokens` slots, ascending; null: everything
    int64_t chosen_count = 0, chosen_tokens = 0;

    // The first chosen piece that reaches beyond a slot.
    int64_t first_chosen(int64_t slot) const {
        return std::partition_point(chosen, chosen + chosen_count, [&](int32_t piece) { return (piece + 1) * chosen_tokens <= slot; }) - chosen;
    }
    const PageForm& k_form(int64_t slot) const { return slot < k_sealed ? *k_sealed_form : *k_landing; }
    const PageForm& v_form(int64_t slot) const { return slot < v_sealed ? *v_sealed_form : *v_landing; }
    const uint8_t* k_page(int64_t slot) const {
        const int64_t page = slot / k_form(slot).page;  // not inside [] below: GCC 12 then loses it where divisions are checked
        return page_at((slot < k_sealed ? k_sealed_pages : k_pages)[page]);
    }
    const uint8_t* v_page(int64_t slot) const {
        const int64_t page = slot / v_form(slot).page;
        return page_at((slot < v_sealed ? v_sealed_pages : v_pages)[page]);
    }
};

// Queries over slots [first, last) of pages: partial sums, largest score and sum of weights of each, to be merged or divided.
struct AttendHead {
    HeadView kv;
    int64_t head_dim = 0;
    int64_t first = 0, last = 0;
    int64_t beyond = 0;                  // up to this slot the keys behind `last` are read by the next call; 0: they are not
    int queries = 0;                     // at most max_queries
    const float* const* q = nullptr;     // [queries] -> [H]
    const int64_t* low = nullptr;        // [queries] a query sees slots [low, high)
    const int64_t* high = nullptr;
    const int64_t* positions = nullptr;  // [queries]; needed where keys have positions: a query at p then sees keys at p' <= p ...
    int64_t window = 0;                  // ... with p' > p - window (0: no limit) ...
    int64_t recent = 0, sink = 0;        // ... and with p' > p - recent (0: no limit) or p' < sink
    float scale = 1, softcap = 0;        // softcap 0: none
    bool turned = false;                 // turn keys round once for all queries: for many of them over keys that are read once
    bool unified = false;                // subtract phi instead of the running maximum; ranges of keys know nothing of each other
    float phi = 0;
    float* largest = nullptr;            // [queries] out: running maximum (unified: the largest score)
    float* weight = nullptr;             // [queries] out: sum of exp(score - maximum or phi)
    float* out = nullptr;                // [queries, H] out: sum of exp(...) * v
};

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
    // Rotate pairs (i, i + half) of x by cos, sin [half].
    void (*rotate)(float* x, const float* cos, const float* sin, int64_t half);
    // As dot_tile, one token after the other.
    void (*dot_each)(const Tiles& w, int64_t tile, const Input& in, int64_t t0, int64_t tokens, float* out);
    // As dot_tile from floats in `in.x`, the tile decoded to floats once for all tokens.
    void (*dot_decoded)(const Tiles& w, int64_t tile, const Input& in, int64_t t0, int64_t tokens, float* out);
    // Tokens [first, first + count) of a page from and to float rows, `stride` floats apart; of a tiled grid whole groups are
    // written. False: a value that the form cannot hold, and what these tokens are is then unknown.
    bool (*encode_page)(const PageForm& form, uint8_t* page, int64_t first, int64_t count, const float* x, int64_t stride);
    void (*decode_page)(const PageForm& form, const uint8_t* page, int64_t first, int64_t count, float* out, int64_t stride);
    void (*attend_head)(const AttendHead& a);
    // Bounds of `count` keys [count, H]: bf16 [2, H], the least and the largest of each channel, rounded outwards.
    void (*bound)(const float* keys, int64_t count, int64_t width, uint16_t* bounds);
    // The largest products that bounds [pieces, 2, H] allow with a query, given as its negative and its positive part.
    void (*promise)(const float* negative, const float* positive, const uint16_t* bounds, int64_t pieces, int64_t width, float* out);
    // Sum of exp((x - top) * by) over `count` values, none of them above `top`.
    double (*exp_sum)(const float* x, int64_t count, float top, float by);
};

const TileKernels& tile_kernels();  // of the instruction set in use

}  // namespace trimtab
