// Attention of a few queries over pages of keys and values, compiled once per instruction set.
#include "isa/codes.h"

namespace trimtab::TRIMTAB_ISA {
namespace {

// out [Q, H] += weights times values in rows, V registers of every query at a time.
template <PageKind KIND, int Q, int V, bool PAIRED>
inline void weigh_columns(const float* weights, const uint8_t* v, int64_t row_bytes, int64_t head_dim, int64_t at, int count,
                          int64_t pace, Ahead& ahead, float* out) {
    FV acc[Q * V];
    each<Q * V>([&](auto k) TRIMTAB_INLINE { acc[k] = load<FV>(out + k / V * head_dim + at + k % V * lanes); });
    for (int s = 0; s < count; ++s) {
        const uint8_t* row = v + s * row_bytes;
        if (at == 0 && s % 4 == 0) ahead.some(pace);
        FV weight[Q];
        each<Q>([&](auto n) TRIMTAB_INLINE {
            weight[n] = splat_f(weights[n * score_stride + s]);
            hold(weight[n]);
        });
        each<V>([&](auto i) TRIMTAB_INLINE {
            const FV value = load_row<KIND, PAIRED>(row, at + i * lanes);
            each<Q>([&](auto n) TRIMTAB_INLINE {
                constexpr int k = decltype(n)::value * V + decltype(i)::value;
                acc[k] = multiply_add(value, weight[n], acc[k]);
            });
        });
    }
    each<Q * V>([&](auto k) TRIMTAB_INLINE { store_f(out + k / V * head_dim + at + k % V * lanes, acc[k]); });
}

template <PageKind KIND, int Q, bool PAIRED>
__attribute__((noinline)) void weigh_rows(const float* weights, const uint8_t* v, int64_t row_bytes, int64_t head_dim, int count,
                                           int64_t pace, Ahead& ahead, float* out) {
    int64_t at = 0;
    for (; at + 4 * lanes <= head_dim; at += 4 * lanes)
        weigh_columns<KIND, Q, 4, PAIRED>(weights, v, row_bytes, head_dim, at, count, pace, ahead, out);
    for (; at < head_dim; at += lanes) weigh_columns<KIND, Q, 1, PAIRED>(weights, v, row_bytes, head_dim, at, count, pace, ahead, out);
}

// Whether the kernels above read codes themselves: `lanes` elements have one scale, or a tile has.
inline bool reads_codes(const PageForm& form) {
    if (form.kind == PageKind::tiled_grid) return form.group % tile_tokens == 0;
    return form.kind == PageKind::grid && form.width % 16 == 0 && (form.group % 16 == 0 || form.group >= form.width);
}

// One call for Q queries: what it knows of them, and of the keys in work.
template <int Q, bool UNIFIED, int HEAD>
class Some {
  public:
    Some(const AttendHead& job, int first)
        : a(job), kv(job.kv), first_(first), head_dim(HEAD > 0 ? HEAD : job.head_dim),
          paired_out(HEAD > 0 && kv.v_landing->kind == PageKind::bf16 && kv.v_sealed == 0), out(job.out + first * head_dim) {
        for (int n = 0; n < Q; ++n) q[n] = q_paired[n] = q_thin[n] = a.q[first + n];
        for (int64_t i = 0; i < Q * head_dim; ++i) out[i] = 0;
        if constexpr (HEAD > 0)
            if (kv.k_landing->kind == PageKind::bf16 || (kv.k_sealed && kv.k_sealed_form->kind == PageKind::bf16))
                for (int n = 0; n < Q; ++n) pair_up(q[n], HEAD, moved + n * HEAD), q_paired[n] = moved + n * HEAD;
        if (kv.k_sealed && thins(a))
            for (int n = 0; n < Q; ++n) thin_query(kv, q[n], thin + n * max_head_dim), q_thin[n] = thin + n * max_head_dim;
    }

    void run() {
        const Seen seen(a, first_, Q);
        Walk walk(kv, seen.least, seen.most);
        Block blocks[2];
        int now = 0;
        for (bool more = walk.next(blocks[0]); more; now ^= 1) {
            const Block& b = blocks[now];
            Block& next = blocks[now ^ 1];
            more = walk.next(next);
            if (!more && !kv.chosen && seen.most < a.beyond) Walk(kv, seen.most, a.beyond).next(next);
            Ahead values;
            for (int i = 0; i < b.parts; ++i) add(values, kv.v_form(b.part[i].slot), kv.v_page(b.part[i].slot), b.part[i]);
            for (int i = 0; i < b.parts; ++i) score(b.part[i], b.count, values);
            weights(b, seen);
            Ahead keys;
            for (int i = 0; i < next.parts; ++i) add(keys, kv.k_form(next.part[i].slot), kv.k_page(next.part[i].slot), next.part[i]);
            for (int i = 0; i < b.parts; ++i) weigh(b.part[i], b.count, keys);
        }
        if constexpr (HEAD > 0)
            if (paired_out)
                part_again(out, Q * HEAD);
        for (int n = 0; n < Q; ++n) {
            a.largest[first_ + n] = largest(sums[n].top);
            a.weight[first_ + n] = sum_of(sums[n].weight);
        }
    }

  private:
    static void add(Ahead& ahead, const PageForm& form, const uint8_t* page, const Part& part) {
        ahead.add(form, page, part.slot % form.page, part.count);
    }

    void score(const Part& part, int all, Ahead& values) {
        const PageForm& form = kv.k_form(part.slot);
        const int64_t inside = part.slot % form.page, skipped = form.tiled() ? inside % tile_tokens : 0;
        if (skipped == 0) return score(form, part, inside, part.count, all, values, scores + part.at);
        // In the middle of a tile: scores of its first tokens belong nowhere.
        alignas(64) float whole[Q * score_stride];
        const int some = tile_tokens - static_cast<int>(skipped) < part.count ? tile_tokens - static_cast<int>(skipped) : part.count;
        score(form, part, inside - skipped, static_cast<int>(skipped) + some, all, values, whole);
        for (int n = 0; n < Q; ++n) memcpy(scores + n * score_stride + part.at, whole + n * score_stride + skipped, static_cast<size_t>(some) * 4);
        if (some < part.count) score({part.slot + some, part.at + some, part.count - some}, all, values);
    }

    void score(const PageForm& form, const Part& part, int64_t inside, int count, int all, Ahead& values, float* to) {
        const bool sealed = part.slot < kv.k_sealed;
        const uint8_t* page = kv.k_page(part.slot);
        const int64_t bytes = form.pitch(), by_four = values.pace((all + 3) / 4), by_tile = values.pace((all + tile_tokens - 1) / tile_tokens);
        const uint8_t* rows = page + inside * bytes;
        const float* const* query = sealed ? q_thin : q;
        const bool whole = form.width == head_dim && query[0] == q[0];  // or some channels of a row
        switch (whole || form.tiled() || form.coded() ? form.kind : PageKind::f8) {
            case PageKind::f32: return score_rows<PageKind::f32, Q, HEAD>(query, rows, bytes, head_dim, count, by_four, values, to);
            case PageKind::bf16: return score_rows<PageKind::bf16, Q, HEAD>(q_paired, rows, bytes, head_dim, count, by_four, values, to);
            case PageKind::f16: return score_rows<PageKind::f16, Q, HEAD>(query, rows, bytes, head_dim, count, by_four, values, to);
            case PageKind::tiled_f32: return score_tiles<PageKind::tiled_f32, Q>(form, query, page, inside, count, by_tile, values, to);
            case PageKind::tiled_f16: return score_tiles<PageKind::tiled_f16, Q>(form, query, page, inside, count, by_tile, values, to);
            case PageKind::tiled_bf16: return score_tiles<PageKind::tiled_bf16, Q>(form, query, page, inside, count, by_tile, values, to);
            case PageKind::tiled_grid:
                if (!reads_codes(form)) break;
                scale(form, query, page, inside, count);
                if (form.bits == 2) return score_coded_tiles<2, Q>(form, scaled, page, inside, count, by_tile, values, to);
                if (form.bits == 4) return score_coded_tiles<4, Q>(form, scaled, page, inside, count, by_tile, values, to);
                return score_coded_tiles<8, Q>(form, scaled, page, inside, count, by_tile, values, to);
            case PageKind::grid:
                if (!reads_codes(form)) break;
                if (form.bits == 2) return score_coded_rows<2, Q>(form, query, page, inside, count, by_four, values, to);
                if (form.bits == 4) return score_coded_rows<4, Q>(form, query, page, inside, count, by_four, values, to);
                return score_coded_rows<8, Q>(form, query, page, inside, count, by_four, values, to);
            default: break;
        }
        const int64_t full = filled_up(form.width);
        decode_page(form, page, inside, count, decoded, full);
        for (int s = 0; s < count; ++s)
            for (int64_t c = form.width; c < full; ++c) decoded[s * full + c] = 0;
        score_rows<PageKind::f32, Q, 0>(query, reinterpret_cast<const uint8_t*>(decoded), 4 * full, full, count, by_four, values, to);
    }

    void scale(const PageForm& form, const float* const* query, const uint8_t* page, int64_t inside, int count) {
        if (form.bits == 2) return scale_queries<2, Q>(form, query, page, inside, count, scaled);
        if (form.bits == 4) return scale_queries<4, Q>(form, query, page, inside, count, scaled);
        scale_queries<8, Q>(form, query, page, inside, count, scaled);
    }

    void weigh(const Part& part, int all, Ahead& keys) {
        const PageForm& form = kv.v_form(part.slot);
        const int64_t inside = part.slot % form.page, bytes = form.pitch(), pace = keys.pace((all + 3) / 4);
        const uint8_t *page = kv.v_page(part.slot), *rows = page + inside * bytes;
        const float* by = scores + part.at;
        switch (form.kind) {
            case PageKind::f32: return weigh_rows<PageKind::f32, Q, false>(by, rows, bytes, head_dim, part.count, pace, keys, out);
            case PageKind::f16: return weigh_rows<PageKind::f16, Q, false>(by, rows, bytes, head_dim, part.count, pace, keys, out);
            case PageKind::bf16:
                if (paired_out) return weigh_rows<PageKind::bf16, Q, true>(by, rows, bytes, head_dim, part.count, pace, keys, out);
                return weigh_rows<PageKind::bf16, Q, false>(by, rows, bytes, head_dim, part.count, pace, keys, out);
            case PageKind::grid:
                if (!reads_codes(form)) break;
                if (form.bits == 2) return weigh_coded_rows<2, Q>(form, by, page, inside, part.count, pace, keys, out);
                if (form.bits == 4) return weigh_coded_rows<4, Q>(form, by, page, inside, part.count, pace, keys, out);
                return weigh_coded_rows<8, Q>(form, by, page, inside, part.count, pace, keys, out);
            default: break;
        }
        decode_page(form, page, inside, part.count, decoded, head_dim);
        weigh_rows<PageKind::f32, Q, false>(by, reinterpret_cast<const uint8_t*>(decoded), 4 * head_dim, head_dim, part.count, pace, keys, out);
    }

    // Weights in place of the raw scores of a block.
    void weights(const Block& b, const Seen& seen) {
        const bool plain = seen.plain(a, b);
        const float scale = plain ? a.scale : 1.0f;
        for (int n = 0; n < Q && !plain; ++n) hide(a, first_ + n, b, scores + n * score_stride);
        if constexpr (UNIFIED) weigh_unified<Q>(scores, b.count, scale, a.phi, sums);
        else weigh_online<Q>(scores, b.count, scale, sums, out, head_dim);
    }

    const AttendHead& a;
    const HeadView& kv;
    const int first_;
    const int64_t head_dim;
    const bool paired_out;
    float* out;
    const float *q[Q], *q_paired[Q], *q_thin[Q];
    Sums sums[Q];
    Scaled<Q> scaled[score_stride / tile_tokens];
    alignas(64) float scores[Q * score_stride];
    alignas(64) float moved[HEAD > 0 ? Q * HEAD : 1];
    alignas(64) float thin[Q * max_head_dim];
    alignas(64) float decoded[score_stride * max_head_dim];
};

template <int Q, bool UNIFIED>
inline void attend_sized(const AttendHead& a, int first) {
    switch (a.head_dim) {  // the usual sizes, unrolled
        case 64: return Some<Q, UNIFIED, 64>(a, first).run();
        case 128: return Some<Q, UNIFIED, 128>(a, first).run();
        default: return Some<Q, UNIFIED, 0>(a, first).run();
    }
}

template <int Q>
inline void attend_as(const AttendHead& a, int first) {
    return a.unified ? attend_sized<Q, true>(a, first) : attend_sized<Q, false>(a, first);
}

}  // namespace

void attend_head_many(const AttendHead& a);  // attend_heads_many.cpp

void attend_head(const AttendHead& a) {
    if (a.turned && a.head_dim <= many_head_dim) return attend_head_many(a);
    int n = 0;
    for (; n + 3 <= a.queries; n += 3) attend_as<3>(a, n);
    if (a.queries - n == 2) attend_as<2>(a, n);
    if (a.queries - n == 1) attend_as<1>(a, n);
}

}  // namespace trimtab::TRIMTAB_ISA
