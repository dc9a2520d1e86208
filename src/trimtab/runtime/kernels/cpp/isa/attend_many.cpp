// Attention of many queries, as a prompt has them: two products of small matrices for every block of keys. The keys of a block
// are turned round once for all queries, so that no score takes a sum across a register.
#include <cmath>

#include "isa/matrices.h"
#include "isa/softmax.h"

namespace trimtab::TRIMTAB_ISA {
namespace {

// Keys or values [first, first + count) of one page as floats: in place where they are, else in `room` [block, head_dim].
const float* floats(const Pages& pages, bool keys, int64_t page, int64_t first, int count, float* room) {
    const uint8_t* data = (keys ? pages.k : pages.v)[page];
    const int64_t size = pages.head_dim;
    if (pages.coding == Coding::f32) return reinterpret_cast<const float*>(data) + first * size;
    if (pages.coding == Coding::ints) {
        decode_rows((keys ? pages.k_grid : pages.v_grid)[page], data, size, pages.group, first, count, room);
        return room;
    }
    const uint16_t* from = reinterpret_cast<const uint16_t*>(data) + first * size;
    for (int64_t i = 0; i < count * size; i += lanes)
        store_f(room + i, pages.coding == Coding::f16 ? load_halves(from + i) : load_bf16s(from + i));
    return room;
}

}  // namespace

void attend_many(const Attend& a) {
    const int64_t size = a.pages.head_dim;
    alignas(64) float room[block * many_head_dim], turned[many_head_dim * block], scores[max_queries * block];
    alignas(64) float q[max_queries * many_head_dim];
    float largest_score[max_queries], total_weight[max_queries];
    int64_t least = a.low[0], most = a.high[0], inner = a.low[0], outer = a.high[0];
    for (int n = 0; n < a.queries; ++n) {
        memcpy(q + n * size, a.q[n], static_cast<size_t>(size) * 4);
        largest_score[n] = none, total_weight[n] = 0;
        least = a.low[n] < least ? a.low[n] : least, inner = a.low[n] > inner ? a.low[n] : inner;
        most = a.high[n] > most ? a.high[n] : most, outer = a.high[n] < outer ? a.high[n] : outer;
    }
    for (int64_t i = 0; i < a.queries * size; ++i) a.out[i] = 0;
    const int64_t from = a.first > least ? a.first : least, to = a.last < most ? a.last : most;
    for (int64_t s = from; s < to;) {
        const int64_t page = s / a.pages.page, inside = s % a.pages.page;
        const int64_t left = a.pages.page - inside < to - s ? a.pages.page - inside : to - s;
        const int count = static_cast<int>(left < block ? left : block), padded = (count + 15) / 16 * 16;
        const float* keys = floats(a.pages, true, page, inside, count, room);
        if (count % lanes) {  // rows behind the last key are no numbers yet
            if (keys != room) memcpy(room, keys, static_cast<size_t>(count * size) * 4), keys = room;
            for (int64_t i = count * size; i < padded * size; ++i) room[i] = 0;
        }
        for (int64_t c = 0; c < size; c += lanes)
            for (int j = 0; j < count; j += lanes) transpose(keys + j * size + c, size, turned + c * block + j, block);
        multiply_all(a.queries, padded, q, size, turned, block, size, false, scores, block);
        const bool plain = a.softcap == 0 && s >= inner && s + count <= outer && count % lanes == 0;
        const float scale = plain ? a.scale : 1.0f;
        for (int n = 0; n < a.queries; ++n) {
            float* row = scores + n * block;
            if (!plain) hide(row, s, count, a.scale, a.softcap, a.low[n], a.high[n]);
            if (a.unified) {
                FV top = splat_f(none), weight = {};
                weights_unified(row, count, scale, a.phi, top, weight);
                const float peak = largest(top);
                largest_score[n] = peak > largest_score[n] ? peak : largest_score[n];
                total_weight[n] += sum_of(weight);
                continue;
            }
            FV here = splat_f(none);
            for (int j = 0; j < count; j += lanes) here = max_of(load<FV>(row + j), here);
            const float peak = largest(here) * scale;
            if (peak > largest_score[n]) {
                if (total_weight[n] > 0) {
                    const float by = std::exp(largest_score[n] - peak);
                    total_weight[n] *= by;
                    for (int64_t i = 0; i < size; i += lanes) store_f(a.out + n * size + i, load<FV>(a.out + n * size + i) * by);
                }
                largest_score[n] = peak;
            }
            total_weight[n] += sum_of(weights_online(row, count, scale, largest_score[n] == none ? 0.0f : largest_score[n]));
        }
        const float* values = floats(a.pages, false, page, inside, count, room);
        multiply_all(a.queries, size, scores, block, values, size, count, true, a.out, size);
        s += count;
    }
    for (int n = 0; n < a.queries; ++n) a.largest[n] = largest_score[n], a.weight[n] = total_weight[n];
}

}  // namespace trimtab::TRIMTAB_ISA
