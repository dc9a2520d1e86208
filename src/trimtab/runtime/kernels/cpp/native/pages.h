// Pages of the cache: `page` tokens of the keys, or of the values, of one KV head. Legend: P tokens of a page, W elements of a
// token that are stored (the head size, or the channels that thin keys keep), G elements that share a scale.
//
//   f32, f16, bf16, f8   [P, W]; with a stride, tokens begin that many bytes apart: other heads lie between them
//   grid                 codes [P, bytes of a token], little-endian; fp16 scales [ceil(W / G), P], fp16 minima alike: scale * code + minimum
//   bfp                  codes [P, bytes of a token], two's complement; one exponent byte [P, ceil(W / G)]
//   tiled_*              [P / 16, W, 16]: channel after channel, so that scores of 16 tokens take no sum across a register
//   tiled_grid           codes in tiles of 16 tokens, then fp16 scales [P / G, W] of G tokens of a channel, and fp16 minima alike.
//                        The bytes of a token are cut into words of 4 bytes and what is left into one of 2 and one of 1; a tile
//                        is word after word [16] of its tokens.
#pragma once
#include <cstdint>
#include <stdexcept>

namespace trimtab {

constexpr int max_head_dim = 512;
constexpr int tile_tokens = 16;

enum class PageKind : int { f32, f16, bf16, f8, grid, bfp, tiled_f32, tiled_f16, tiled_bf16, tiled_grid };

struct PageForm {
    PageKind kind = PageKind::f32;
    int64_t page = 0, width = 0;
    int bits = 0;       // of a code
    int64_t group = 0;  // elements that share a scale or an exponent
    int64_t stride = 0;  // bytes from one token of floats to the next; 0: they lie side by side

    bool tiled() const { return kind >= PageKind::tiled_f32; }
    bool coded() const { return kind == PageKind::grid || kind == PageKind::bfp || kind == PageKind::tiled_grid; }
    bool scaled() const { return kind == PageKind::grid || kind == PageKind::tiled_grid; }  // scale * code + minimum
    int64_t groups() const { return group ? (width + group - 1) / group : 0; }              // of one token
    int64_t item() const {                                                                  // bytes of a float
        switch (kind) {
            case PageKind::f32:
            case PageKind::tiled_f32: return 4;
            case PageKind::f8: return 1;
            default: return 2;
        }
    }
    // Bytes of one token's elements, where they lie side by side.
    int64_t row_bytes() const { return coded() ? (width * bits + 7) / 8 : width * item(); }
    // Bytes from one token to the next.
    int64_t pitch() const { return stride ? stride : row_bytes(); }
    // Bytes of the scales or exponents that `count` tokens have, of a tiled grid in whole groups.
    int64_t scale_bytes(int64_t count) const {
        switch (kind) {
            case PageKind::grid: return 4 * groups() * count;
            case PageKind::bfp: return groups() * count;
            case PageKind::tiled_grid: return 4 * width * (count / group);
            default: return 0;
        }
    }
    // Bytes that `count` tokens take, scales included.
    int64_t nbytes(int64_t count) const { return count * row_bytes() + scale_bytes(count); }
    // Bytes read for tokens [first, end) of a page or a row of pages: a group of a tiled grid that is partly in it counts whole.
    int64_t read_bytes(int64_t first, int64_t end) const {
        if (end <= first) return 0;
        const int64_t scales = kind == PageKind::tiled_grid ? 4 * width * ((end + group - 1) / group - first / group) : scale_bytes(end - first);
        return (end - first) * row_bytes() + scales;
    }
    const uint8_t* scales(const uint8_t* page_at) const { return page_at + page * row_bytes(); }

    // Throws std::invalid_argument, which Python shows as a ValueError.
    void check() const {
        auto need = [](bool holds, const char* text) {
            if (!holds) throw std::invalid_argument(text);
        };
        need(kind >= PageKind::f32 && kind <= PageKind::tiled_grid, "A page form has a kind of 0..9.");
        need(page >= 1 && width >= 1 && width <= max_head_dim, "A page form has one token or more, of 1..512 elements.");
        need(!tiled() || page % tile_tokens == 0, "A tiled page form has a multiple of 16 tokens.");
        need(!stride || (kind <= PageKind::f8 && stride >= row_bytes()), "A page form with a stride holds floats in rows, no wider than it.");
        if (!coded()) return;
        need(group >= 1, "A page form of codes has a group of one element or more.");
        if (kind == PageKind::bfp) return need(bits >= 2 && bits <= 16, "A page form of block floats has codes of 2..16 bits.");
        need(bits == 2 || bits == 4 || bits == 8, "A page form of codes has 2, 4 or 8 bits.");
        need(kind != PageKind::tiled_grid || page % group == 0, "A tiled grid has whole groups of tokens in a page.");
    }
};

inline const uint8_t* page_at(int64_t address) { return reinterpret_cast<const uint8_t*>(static_cast<uintptr_t>(address)); }

}  // namespace trimtab
