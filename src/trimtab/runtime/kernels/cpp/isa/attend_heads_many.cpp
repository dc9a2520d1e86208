// Attention of many queries over pages, as a prompt has them: two products of small matrices for every block of keys. The keys of a
// block are turned round once for all queries, so that no score takes a sum across a register; what lies channel after channel is
// turned round already.
#include "isa/heads.h"
#include "isa/matrices.h"

namespace trimtab::TRIMTAB_ISA {
namespace {

// Tokens inside .. inside + count - 1 of a page of rows as floats, `size` apart: in place where they are, else in `room`. A key whose
// elements do not fill a register is filled up with zeros, as is the last register of keys.
const float* floats(const PageForm& form, const uint8_t* page, int64_t inside, int count, int64_t size, bool keys, float* room) {
    const bool full = size == form.width && (!keys || count % lanes == 0);
    if (form.kind == PageKind::f32 && full && !form.stride) return reinterpret_cast<const float*>(page) + inside * size;
    decode_page(form, page, inside, count, room, size);
    if (full) return room;
    for (int s = 0; s < count; ++s)
        for (int64_t c = form.width; c < size; ++c) room[s * size + c] = 0;
    for (int64_t i = count * size; i < (count + lanes - 1) / lanes * lanes * size; ++i) room[i] = 0;
    return room;
}

// A tile of codes as floats, channel after channel.
template <int BITS>
void turn_codes(const PageForm& form, const uint8_t* tile, const uint16_t* scale, const uint16_t* minimum, float* turned) {
    constexpr int halves = tile_tokens / lanes, per_word = 32 / BITS;
    const int64_t bytes = form.row_bytes();
    int64_t c = 0;
    auto put = [&](auto narrow, int64_t at, int64_t channels) {
        constexpr int64_t size = sizeof(narrow) / lanes;
        for (int h = 0; h < halves; ++h) {
            UV word = __builtin_convertvector(load<decltype(narrow)>(tile + tile_tokens * at + h * size * lanes), UV);
            for (int64_t i = c; i < c + channels && i < form.width; ++i, word >>= BITS)
                store_f(turned + i * score_stride + h * lanes, low_bits<BITS>(word) * half(scale[i]) + half(minimum[i]));
        }
        c += channels;
    };
    typedef uint8_t Narrow __attribute__((vector_size(lanes)));
    for (int64_t at = 0; at + 4 <= bytes; at += 4) put(UV{}, at, per_word);
    if (bytes % 4 >= 2) put(HV{}, bytes / 4 * 4, per_word / 2);
    if (bytes % 2) put(Narrow{}, bytes - 1, per_word / 4);
}

// Whether the tokens of a tile lie as they are wanted, and share what they are scaled by.
bool lies_turned(const PageForm& form) { return form.tiled() && (form.kind != PageKind::tiled_grid || form.group % tile_tokens == 0); }

// Keys of a page turned round: turned [W filled up, score_stride]. What lies turned begins with a tile.
void turn(const PageForm& form, const uint8_t* page, int64_t inside, int count, float* room, float* turned) {
    const int64_t size = filled_up(form.width);
    if (!lies_turned(form)) {
        const float* keys = floats(form, page, inside, count, size, true, room);
        for (int64_t c = 0; c < size; c += lanes)
            for (int j = 0; j < count; j += lanes) transpose(keys + j * size + c, size, turned + c * score_stride + j, score_stride);
        return;
    }
    for (int t = 0; t < count; t += tile_tokens) {
        const uint8_t* tile = page + (inside + t) * form.row_bytes();
        const uint16_t* scale = reinterpret_cast<const uint16_t*>(form.scales(page)) + (form.group ? (inside + t) / form.group : 0) * form.width;
        const uint16_t* minimum = scale + (form.group ? form.page / form.group : 0) * form.width;
        auto channel = [&](int64_t c, int j) {
            const uint8_t* from = tile + (c * tile_tokens + j) * form.item();
            if (form.kind == PageKind::tiled_f32) return load<FV>(from);
            const uint16_t* halves = reinterpret_cast<const uint16_t*>(from);
            return form.kind == PageKind::tiled_f16 ? load_halves(halves) : load_bf16s(halves);
        };
        if (form.kind != PageKind::tiled_grid)
            for (int64_t c = 0; c < form.width; ++c)
                for (int j = 0; j < tile_tokens; j += lanes) store_f(turned + t + c * score_stride + j, channel(c, j));
        else if (form.bits == 2) turn_codes<2>(form, tile, scale, minimum, turned + t);
        else if (form.bits == 4) turn_codes<4>(form, tile, scale, minimum, turned + t);
        else turn_codes<8>(form, tile, scale, minimum, turned + t);
        for (int64_t c = form.width; c < size; ++c)
            for (int j = 0; j < tile_tokens; j += lanes) store_f(turned + t + c * score_stride + j, FV{});
    }
}

struct Work {
    alignas(64) float room[block * many_head_dim], turned[many_head_dim * score_stride], scores[max_queries * score_stride];
    alignas(64) float q[max_queries * many_head_dim], thin[max_queries * many_head_dim];
    Sums sums[max_queries];
};

// Raw scores of one part of a block.
void score(const AttendHead& a, const Part& part, bool thin, Work& w) {
    const PageForm& form = a.kv.k_form(part.slot);
    const int64_t size = filled_up(form.width), inside = part.slot % form.page;
    const int skipped = lies_turned(form) ? static_cast<int>(inside % tile_tokens) : 0, count = skipped + part.count;
    turn(form, a.kv.k_page(part.slot), inside - skipped, count, w.room, w.turned);
    const float* q = thin && part.slot < a.kv.k_sealed ? w.thin : w.q;
    const int64_t cols = (count + 15) / 16 * 16, stride = q == w.thin ? size : a.head_dim;
    if (skipped == 0) return multiply_all(a.queries, cols, q, stride, w.turned, score_stride, size, false, w.scores + part.at, score_stride);
    // In the middle of a tile: scores of its first tokens belong nowhere.
    alignas(64) float whole[max_queries * score_stride];
    multiply_all(a.queries, cols, q, stride, w.turned, score_stride, size, false, whole, score_stride);
    for (int n = 0; n < a.queries; ++n)
        memcpy(w.scores + n * score_stride + part.at, whole + n * score_stride + skipped, static_cast<size_t>(part.count) * 4);
}

// Weights of queries n .. n + Q - 1 in place of their scores.
template <int Q>
void weigh(const AttendHead& a, int n, int count, float scale, Work& w) {
    float* scores = w.scores + n * score_stride;
    if (a.unified) weigh_unified<Q>(scores, count, scale, a.phi, w.sums + n);
    else weigh_online<Q>(scores, count, scale, w.sums + n, a.out + n * a.head_dim, a.head_dim);
}

}  // namespace

void attend_head_many(const AttendHead& a) {
    const int64_t size = a.head_dim;
    Work w;
    const bool thin = a.kv.k_sealed && thins(a);
    for (int n = 0; n < a.queries; ++n) {
        memcpy(w.q + n * size, a.q[n], static_cast<size_t>(size) * 4);
        if (thin) thin_query(a.kv, a.q[n], w.thin + n * filled_up(a.kv.k_sealed_form->width));
    }
    for (int64_t i = 0; i < a.queries * size; ++i) a.out[i] = 0;
    const Seen seen(a, 0, a.queries);
    Walk walk(a.kv, seen.least, seen.most);
    for (Block b; walk.next(b);) {
        for (int i = 0; i < b.parts; ++i) score(a, b.part[i], thin, w);
        const bool plain = seen.plain(a, b);
        const float scale = plain ? a.scale : 1.0f;
        for (int n = 0; n < a.queries && !plain; ++n) hide(a, n, b, w.scores + n * score_stride);
        int n = 0;
        for (; n + 4 <= a.queries; n += 4) weigh<4>(a, n, b.count, scale, w);
        for (; n < a.queries; ++n) weigh<1>(a, n, b.count, scale, w);
        for (int i = 0; i < b.parts; ++i) {
            const Part& part = b.part[i];
            const PageForm& form = a.kv.v_form(part.slot);
            const float* values = floats(form, a.kv.v_page(part.slot), part.slot % form.page, part.count, size, false, w.room);
            multiply_all(a.queries, size, w.scores + part.at, score_stride, values, size, part.count, true, a.out, size);
        }
    }
    for (int n = 0; n < a.queries; ++n) a.largest[n] = largest(w.sums[n].top), a.weight[n] = sum_of(w.sums[n].weight);
}

}  // namespace trimtab::TRIMTAB_ISA
