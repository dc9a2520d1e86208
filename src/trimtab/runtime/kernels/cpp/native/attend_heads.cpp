// Attention of a step over pages: place new keys and values, attend over pieces of the cache, join partial sums, code what leaves the
// landing pages. Where everything lies is told by the records of a step.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <utility>

#include "native/program.h"

namespace trimtab {
namespace {

constexpr int turned_from = 6;  // queries from which turning keys round pays: as many as are multiplied with them at a time

// Fields of a record, see Step::records.
enum Field {
    k_pages, v_pages, k_sealed_pages, v_sealed_pages, readable, k_sealed, v_sealed, k_sealed_after, v_sealed_after, kept_channels,
    slot_positions, chosen_pieces, chosen_count, chosen_tokens, first_written, key_bounds
};

template <class T>
const T* array_at(int64_t address) { return reinterpret_cast<const T*>(static_cast<uintptr_t>(address)); }

struct AttendHeadsKernel : Kernel {
    Attention a;
    std::vector<HeadForms> forms;  // by KV head
    int64_t watched = 0;
    std::vector<float> queries;    // [B, watched, N, H] of the last step
    std::vector<std::vector<int32_t>> chosen;  // [B, KV heads] pieces that this step reads; none: all

    const int64_t* record(const Context& c, int64_t row, int64_t g) const {
        return c.step.records + ((a.layer * c.step.rows + row) * c.step.record_heads + g) * record_fields;
    }
    int64_t fresh(const Context& c, int64_t row) const { return c.step.starts[row + 1] - c.step.starts[row]; }
    int64_t position(const Context& c, int64_t row, int64_t token) const { return c.step.past[row] + token - c.step.starts[row]; }

    void prepare(const Step& step, int64_t watch) override {
        watched = watch;
        queries.assign(static_cast<size_t>(step.rows * watch * a.heads * a.head_dim), 0.0f);
        chosen.resize(static_cast<size_t>(step.rows * a.kv_heads));
    }

    void run(Context& c, Worker& worker) override {
        place(c, worker);
        worker.wait();
        if (choose(c, worker)) worker.wait();
        const auto& pieces = c.program.pieces();
        // Head after head: the keys of one piece follow those of the piece before, and are asked for with it. Where the heads of a
        // token lie side by side, piece after piece: the next head reads lines that were brought near with this one's.
        const int64_t count = static_cast<int64_t>(pieces.size()), jobs = count * a.kv_heads;
        const bool side_by_side = forms[0].k_landing.stride > 0;
        auto attend_job = [&](int64_t j) {
            const int64_t piece = side_by_side ? j / a.kv_heads : j % count;
            attend(c, pieces[static_cast<size_t>(piece)], side_by_side ? j % a.kv_heads : j / count);
        };
        bool partial = false;
        for (const Piece& piece : pieces) partial = partial || piece.slot >= 0;
        if (partial)
            for (int64_t j = worker.begin(jobs); j < worker.end(jobs); ++j) attend_job(j);
        else
            for (int64_t j; (j = c.next.fetch_add(1, std::memory_order_relaxed)) < jobs;) attend_job(j);
        worker.wait();
        if (worker.id == 0) c.next.store(0, std::memory_order_relaxed);
        const int64_t stores = c.step.rows * a.kv_heads;
        for (int64_t i = worker.begin(stores); i < worker.end(stores); ++i) seal(c, i / a.kv_heads, i % a.kv_heads);
        if (!partial) return worker.wait();
        const int64_t total = c.step.rows * a.heads;
        for (int64_t i = worker.begin(total); i < worker.end(total); ++i) merge(c, i / a.heads, i % a.heads);
        worker.wait();
    }

    // Norms and rotates queries in place, and writes new keys and values into landing pages.
    void place(Context& c, Worker& worker) {
        const TileKernels& k = tile_kernels();
        const int64_t each = a.heads + 2 * a.kv_heads, total = c.step.tokens * each;
        const Values& qkv = c.program.values(a.qkv);
        const Rope* rope = a.rope < 0 ? nullptr : &c.program.rope(a.rope);
        int64_t row = 0, written = 0;
        for (int64_t i = worker.begin(total); i < worker.end(total); ++i) {
            const int64_t t = i / each, head = i % each;
            while (t >= c.step.starts[row + 1]) ++row;
            const bool is_query = head < a.heads, is_key = !is_query && head < a.heads + a.kv_heads;
            float* x = qkv.data + t * qkv.width + head * a.head_dim;
            if (is_query && a.has_q_norm) k.norm(a.q_norm, x, x);
            if (is_key && a.has_k_norm) k.norm(a.k_norm, x, x);
            if (rope && (is_query || is_key)) {
                const float* table = rope->table + t * 2 * rope->half();
                k.rotate(x, table, table + rope->half(), rope->half());
            }
            if (is_query) {
                const int64_t place = watched - (c.step.starts[row + 1] - t);  // the newest token stands last
                if (watched && place >= 0)
                    std::memcpy(queries.data() + ((row * watched + place) * a.heads + head) * a.head_dim, x, static_cast<size_t>(a.head_dim) * 4);
                continue;
            }
            if (!a.append) continue;
            const int64_t g = head - a.heads - (is_key ? 0 : a.kv_heads);
            const int64_t* at = record(c, row, g);
            const PageForm& form = is_key ? forms[static_cast<size_t>(g)].k_landing : forms[static_cast<size_t>(g)].v_landing;
            const int64_t slot = at[first_written] + t - c.step.starts[row];
            uint8_t* page = const_cast<uint8_t*>(page_at(array_at<int64_t>(at[is_key ? k_pages : v_pages])[slot / form.page]));
            if (!k.encode_page(form, page, slot % form.page, 1, x, form.width)) c.lost = true;
            written += form.row_bytes() + form.scale_bytes(1);
        }
        kv_written += written;
        if (worker.id == 0) weight_read += (a.has_q_norm ? a.q_norm.nbytes() : 0) + (a.has_k_norm ? a.k_norm.nbytes() : 0);
    }

    // Brings bounds of pieces up to date and chooses what single tokens read. False: no head reads pieces.
    bool choose(Context& c, Worker& worker) {
        bool any = false;
        const int64_t stores = c.step.rows * a.kv_heads;
        for (int64_t i = 0; i < stores; ++i) any = any || record(c, i / a.kv_heads, i % a.kv_heads)[key_bounds];
        if (!any) return false;
        for (int64_t i = worker.begin(stores); i < worker.end(stores); ++i)
            if (record(c, i / a.kv_heads, i % a.kv_heads)[key_bounds]) choose(c, i / a.kv_heads, i % a.kv_heads);
        return true;
    }

    // Source: Tang et al., Quest, arXiv 2406.10774, section 3; of the queries that share the head, the one that promises most counts.
    void choose(Context& c, int64_t row, int64_t g) {
        const TileKernels& k = tile_kernels();
        const int64_t* at = record(c, row, g);
        const PageForm& form = forms[static_cast<size_t>(g)].k_landing;
        const int64_t tokens = at[chosen_tokens], most = at[chosen_count], per = a.heads / a.kv_heads;
        uint16_t* bounds = const_cast<uint16_t*>(array_at<uint16_t>(at[key_bounds]));
        std::vector<float> keys(static_cast<size_t>(tokens * a.head_dim));
        for (int64_t piece = at[first_written] / tokens; piece * tokens < at[readable]; ++piece) {
            const int64_t first = piece * tokens, count = std::min(tokens, at[readable] - first);
            for (int64_t done = 0; done < count;) {
                const int64_t inside = (first + done) % form.page, some = std::min(form.page - inside, count - done);
                k.decode_page(form, page_at(array_at<int64_t>(at[k_pages])[(first + done) / form.page]), inside, some, keys.data() + done * a.head_dim, a.head_dim);
                done += some;
            }
            k.bound(keys.data(), count, a.head_dim, bounds + 2 * piece * a.head_dim);
        }
        std::vector<int32_t>& read = chosen[static_cast<size_t>(row * a.kv_heads + g)];
        read.clear();
        if (fresh(c, row) != 1) return;
        const int64_t pieces = (at[readable] + tokens - 1) / tokens;
        kv_read += pieces * 2 * a.head_dim * 2;
        if (pieces <= most) return;
        const Values& qkv = c.program.values(a.qkv);
        std::vector<float> promised(static_cast<size_t>(pieces - 1)), one(promised.size());  // the newest piece is read in any case
        for (int64_t n = 0; n < per; ++n) {
            const float* q = qkv.data + c.step.starts[row] * qkv.width + (g * per + n) * a.head_dim;
            float negative[max_head_dim], positive[max_head_dim];
            for (int64_t d = 0; d < a.head_dim; ++d) negative[d] = std::min(q[d], 0.0f), positive[d] = std::max(q[d], 0.0f);
            k.promise(negative, positive, bounds, pieces - 1, a.head_dim, one.data());
            for (size_t p = 0; p < one.size(); ++p) promised[p] = n ? std::max(promised[p], one[p]) : one[p];
        }
        for (int32_t p = 0; p + 1 < pieces; ++p) read.push_back(p);
        auto better = [&](int32_t x, int32_t y) {
            const float one = promised[static_cast<size_t>(x)], other = promised[static_cast<size_t>(y)];
            return one > other || (one == other && x < y);
        };
        std::nth_element(read.begin(), read.begin() + (most - 1), read.end(), better);
        read.resize(static_cast<size_t>(most - 1));
        std::sort(read.begin(), read.end());
        read.push_back(static_cast<int32_t>(pieces - 1));
    }

    HeadView view(const Context& c, int64_t row, int64_t g) const {
        const int64_t* at = record(c, row, g);
        HeadView kv = head_view(at, forms[static_cast<size_t>(g)]);
        if (!at[key_bounds]) return kv;
        const std::vector<int32_t>& read = chosen[static_cast<size_t>(row * a.kv_heads + g)];
        kv.chosen = read.empty() ? nullptr : read.data(), kv.chosen_count = static_cast<int64_t>(read.size());
        return kv;
    }

    // The queries of one piece that share KV head g.
    struct Queries {
        const float* q[max_queries];
        int64_t low[max_queries], high[max_queries], positions[max_queries], token[max_queries], head[max_queries];
        float largest[max_queries], weight[max_queries];
        int count = 0;
    };

    // First slot that a query sees, and the one behind the last; with positions both hide less than these do.
    int64_t low(const Context& c, const int64_t* at, int64_t row, int64_t token) const {
        return a.window > 0 && !at[slot_positions] ? std::max<int64_t>(0, position(c, row, token) + 1 - a.window) : 0;
    }
    int64_t high(const Context& c, const int64_t* at, int64_t row, int64_t token) const {
        return at[readable] - (c.step.starts[row + 1] - 1 - token);
    }

    void add_query(const Context& c, Queries& set, int64_t row, int64_t token, int64_t head) const {
        const Values& q = c.program.values(a.qkv);
        const int64_t* at = record(c, row, head / (a.heads / a.kv_heads));
        set.q[set.count] = q.data + token * q.width + head * a.head_dim;
        set.low[set.count] = low(c, at, row, token), set.high[set.count] = high(c, at, row, token);
        set.positions[set.count] = position(c, row, token);
        set.token[set.count] = token, set.head[set.count] = head;
        ++set.count;
    }

    void call(const Context& c, Queries& set, int64_t row, int64_t g, int64_t first, int64_t last, bool unified, float* out) {
        const HeadForms& form = forms[static_cast<size_t>(g)];
        AttendHead job;
        job.kv = view(c, row, g);
        job.head_dim = a.head_dim, job.first = first, job.last = last, job.beyond = set.high[set.count - 1], job.queries = set.count;
        job.q = set.q, job.low = set.low, job.high = set.high, job.positions = set.positions;
        job.window = a.window, job.recent = form.recent, job.sink = form.sink;
        job.turned = set.count >= turned_from && set.token[0] != set.token[set.count - 1];
        job.scale = a.scale, job.softcap = a.softcap, job.unified = unified, job.phi = a.phi;
        job.largest = set.largest, job.weight = set.weight, job.out = out;
        tile_kernels().attend_head(job);
        flops += 4 * set.count * tokens_in(job.kv, first, last) * a.head_dim;
    }

    // Slots of [first, last) that are read: all, or those of pieces that were chosen.
    static int64_t tokens_in(const HeadView& kv, int64_t first, int64_t last) {
        int64_t tokens = 0;
        each_run(kv, first, last, [&](int64_t from, int64_t to) { tokens += to - from; });
        return tokens;
    }
    template <class F>
    static void each_run(const HeadView& kv, int64_t first, int64_t last, F f) {
        if (!kv.chosen && first < last) f(first, last);
        if (!kv.chosen) return;
        for (int64_t i = kv.first_chosen(first); i < kv.chosen_count && kv.chosen[i] * kv.chosen_tokens < last;) {
            int64_t from = kv.chosen[i] * kv.chosen_tokens, to = from + kv.chosen_tokens;
            for (++i; i < kv.chosen_count && kv.chosen[i] * kv.chosen_tokens == to; ++i) to += kv.chosen_tokens;
            from = std::max(from, first), to = std::min(to, last);
            if (from < to) f(from, to);
        }
    }

    // Bytes of pages read for ascending ranges of slots [first, last) of keys and values, every token and every group once.
    static int64_t bytes_in(const HeadView& kv, std::initializer_list<std::pair<int64_t, int64_t>> ranges) {
        int64_t bytes = 0, k_end = 0, v_end = 0;  // ends of the last groups that were counted
        auto add = [&](const PageForm& form, int64_t from, int64_t end, int64_t& counted) {
            bytes += form.read_bytes(from, end);
            if (form.kind != PageKind::tiled_grid) return;
            if (from < counted) bytes -= 4 * form.width;
            counted = (end + form.group - 1) / form.group * form.group;
        };
        for (const auto& [first, last] : ranges)
            each_run(kv, first, last, [&](int64_t from, int64_t to) {
                const int64_t k = std::clamp(kv.k_sealed, from, to), v = std::clamp(kv.v_sealed, from, to);
                if (from < k) add(*kv.k_sealed_form, from, k, k_end);
                if (from < v) add(*kv.v_sealed_form, from, v, v_end);
                bytes += kv.k_landing->read_bytes(k, to) + kv.v_landing->read_bytes(v, to);
            });
        return bytes;
    }

    // Whether a token of a pass sees only the first and the last keys.
    bool patterned(const Context& c, int64_t row, int64_t token) const {
        const int64_t whole = c.step.whole ? c.step.whole[row] : 0;
        return a.prompt_local > 0 && fresh(c, row) > 1 && token < c.step.starts[row + 1] - whole;
    }

    // As `call`, for queries that see only the first and the last keys: two parts, joined.
    void call_patterned(const Context& c, Queries& set, int64_t row, int64_t g, int64_t last, bool unified, float* out) {
        Queries early = set;
        int64_t first = last;
        for (int n = 0; n < set.count; ++n) {
            set.low[n] = std::max(a.prompt_sink, set.high[n] - a.prompt_local);
            early.high[n] = std::min(set.high[n], a.prompt_sink);
            first = std::min(first, set.low[n]);
        }
        call(c, set, row, g, std::min(first, last), last, unified, out);
        if (a.prompt_sink == 0) return;
        alignas(64) float sums[max_queries * max_head_dim];
        call(c, early, row, g, 0, std::min(last, a.prompt_sink), unified, sums);
        for (int n = 0; n < set.count; ++n) {
            const float top = std::max(set.largest[n], early.largest[n]);
            const float by = unified ? 1.0f : std::exp(set.largest[n] - top), with = unified ? 1.0f : std::exp(early.largest[n] - top);
            for (int64_t d = 0; d < a.head_dim; ++d) {
                float& x = out[n * a.head_dim + d];
                x = by * x + with * sums[n * a.head_dim + d];
            }
            set.weight[n] = by * set.weight[n] + with * early.weight[n], set.largest[n] = top;
        }
    }

    bool safe(float largest) const { return largest - a.phi <= a.high && largest - a.phi >= a.low; }

    // One query again, over all the keys it sees, with the running maximum.
    void again(Context& c, int64_t row, int64_t token, int64_t head, float* out) {
        Queries set;
        add_query(c, set, row, token, head);
        const int64_t g = head / (a.heads / a.kv_heads);
        if (patterned(c, row, token)) call_patterned(c, set, row, g, set.high[0], false, out);
        else call(c, set, row, g, 0, set.high[0], false, out);
        const float by = 1.0f / set.weight[0];
        for (int64_t i = 0; i < a.head_dim; ++i) out[i] *= by;
        const_cast<Program&>(c.program).recomputed += 1;
    }

    void attend(Context& c, const Piece& piece, int64_t g) {
        const int64_t per = a.heads / a.kv_heads, row_end = c.step.starts[piece.row + 1];
        const int64_t* at = record(c, piece.row, g);
        const Values& to = c.program.values(a.out);
        alignas(64) float sums[max_queries * max_head_dim];
        const int64_t most = std::min<int64_t>(max_queries, static_cast<int64_t>(sizeof sums / 4) / a.head_dim);
        // A row may hold fewer tokens than it has seen: some of its pieces are empty then.
        const int64_t end = high(c, at, piece.row, piece.first_token + piece.tokens - 1);
        const int64_t first = std::min(piece.first_key, end), last = piece.last_piece ? end : std::min(piece.last_key, end);
        Queries set;
        auto flush = [&] {
            if (patterned(c, piece.row, set.token[0])) call_patterned(c, set, piece.row, g, last, a.unified, sums);
            else call(c, set, piece.row, g, first, last, a.unified, sums);
            for (int n = 0; n < set.count; ++n) {
                const float* from = sums + n * a.head_dim;
                if (piece.slot >= 0) {
                    float* part = c.partial + (piece.slot * a.heads + set.head[n]) * (a.head_dim + 2);
                    part[0] = set.largest[n], part[1] = set.weight[n];
                    std::memcpy(part + 2, from, static_cast<size_t>(a.head_dim) * 4);
                    continue;
                }
                float* out = to.data + set.token[n] * to.width + set.head[n] * a.head_dim;
                if (a.unified && !safe(set.largest[n])) {
                    again(c, piece.row, set.token[n], set.head[n], out);
                    continue;
                }
                const float by = 1.0f / set.weight[n];
                for (int64_t i = 0; i < a.head_dim; ++i) out[i] = from[i] * by;
            }
            set.count = 0;
        };
        for (int64_t t = piece.first_token; t < piece.first_token + piece.tokens; ++t)
            for (int64_t i = 0; i < per; ++i) {
                const bool other = set.count && patterned(c, piece.row, t) != patterned(c, piece.row, set.token[0]);
                if (set.count == most || other) flush();
                add_query(c, set, piece.row, t, g * per + i);
            }
        flush();
        // Every key once for all queries that share it: the last piece of a row counts for all of them.
        if (piece.last_piece && piece.first_token + piece.tokens == row_end) kv_read += bytes_read(c, piece.row, g);
    }

    // Bytes of the keys and values that some query of a row sees.
    int64_t bytes_read(const Context& c, int64_t row, int64_t g) const {
        const int64_t* at = record(c, row, g);
        const HeadView kv = view(c, row, g);
        const HeadForms& form = forms[static_cast<size_t>(g)];
        const int64_t start = c.step.starts[row], first = low(c, at, row, start);
        if (patterned(c, row, start) && (!c.step.whole || c.step.whole[row] == 0)) {
            const int64_t early = std::min(a.prompt_sink, at[readable]);
            const int64_t near = std::min(std::max(a.prompt_sink, high(c, at, row, start) - a.prompt_local), at[readable]);
            return bytes_in(kv, {{0, early}, {near, at[readable]}});
        }
        int64_t bytes = bytes_in(kv, {{first, at[readable]}});
        if (kv.positions && form.recent > 0 && fresh(c, row) > 1)  // of a full ring the oldest token is out of sight already
            for (int64_t slot = 0; slot < at[first_written]; ++slot)
                if (kv.positions[slot] >= form.sink && kv.positions[slot] <= position(c, row, start) - form.recent)
                    bytes -= form.k_landing.read_bytes(0, 1) + form.v_landing.read_bytes(0, 1);
        return bytes;
    }

    // Brings keys and values of KV head g of a row from landing pages into those they are kept in.
    void seal(Context& c, int64_t row, int64_t g) {
        const int64_t* at = record(c, row, g);
        const HeadForms& form = forms[static_cast<size_t>(g)];
        if (form.has_k_sealed) seal(c, form.k_landing, at[k_pages], form.k_sealed, at[k_sealed_pages], at[k_sealed], at[k_sealed_after], array_at<uint8_t>(at[kept_channels]));
        if (form.has_v_sealed) seal(c, form.v_landing, at[v_pages], form.v_sealed, at[v_sealed_pages], at[v_sealed], at[v_sealed_after], nullptr);
    }

    void seal(Context& c, const PageForm& from, int64_t from_pages, const PageForm& to, int64_t to_pages, int64_t first, int64_t last, const uint8_t* channels) {
        const TileKernels& k = tile_kernels();
        std::vector<float> rows;
        for (int64_t slot = first; slot < last;) {
            const int64_t count = std::min(to.page - slot % to.page, last - slot);
            rows.resize(static_cast<size_t>(count * from.width));
            for (int64_t done = 0; done < count;) {
                const int64_t inside = (slot + done) % from.page, some = std::min(from.page - inside, count - done);
                k.decode_page(from, page_at(array_at<int64_t>(from_pages)[(slot + done) / from.page]), inside, some, rows.data() + done * from.width, from.width);
                done += some;
            }
            if (to.width < from.width || channels)
                for (int64_t t = 0; t < count; ++t) {
                    float row[max_head_dim];
                    for (int64_t i = 0; i < to.width; ++i) row[i] = rows[static_cast<size_t>(t * from.width + (channels ? channels[i] : i))];
                    std::memcpy(rows.data() + t * from.width, row, static_cast<size_t>(to.width) * 4);
                }
            uint8_t* page = const_cast<uint8_t*>(page_at(array_at<int64_t>(to_pages)[slot / to.page]));
            if (!k.encode_page(to, page, slot % to.page, count, rows.data(), from.width)) c.lost = true;
            kv_written += to.nbytes(count);
            slot += count;
        }
    }

    // Joins the partial sums of one query of a row.
    void merge(Context& c, int64_t row, int64_t head) {
        const Values& to = c.program.values(a.out);
        const int64_t token = c.step.starts[row], stride = a.heads * (a.head_dim + 2);
        const Piece *first = nullptr, *last = nullptr;
        for (const Piece& piece : c.program.pieces())
            if (piece.row == row) first = first ? first : &piece, last = &piece;
        if (first->slot < 0) return;
        float* out = to.data + token * to.width + head * a.head_dim;
        const float* parts = c.partial + (first->slot * a.heads + head) * (a.head_dim + 2);
        const int64_t count = last->slot - first->slot + 1;
        float top = parts[0];
        for (int64_t i = 1; i < count; ++i) top = std::max(top, parts[i * stride]);
        if (a.unified && !safe(top)) return again(c, row, token, head, out);
        float weight = 0;
        for (int64_t d = 0; d < a.head_dim; ++d) out[d] = 0;
        for (int64_t i = 0; i < count; ++i) {
            const float* part = parts + i * stride;
            if (part[1] == 0) continue;
            const float by = a.unified ? 1.0f : std::exp(part[0] - top);
            weight += by * part[1];
            for (int64_t d = 0; d < a.head_dim; ++d) out[d] += by * part[2 + d];
        }
        const float by = 1.0f / weight;
        for (int64_t d = 0; d < a.head_dim; ++d) out[d] *= by;
    }
};

}  // namespace

HeadView head_view(const int64_t* at, const HeadForms& forms) {
    HeadView kv;
    kv.k_landing = &forms.k_landing, kv.v_landing = &forms.v_landing, kv.k_sealed_form = &forms.k_sealed, kv.v_sealed_form = &forms.v_sealed;
    kv.k_pages = array_at<int64_t>(at[k_pages]), kv.v_pages = array_at<int64_t>(at[v_pages]);
    kv.k_sealed_pages = array_at<int64_t>(at[k_sealed_pages]), kv.v_sealed_pages = array_at<int64_t>(at[v_sealed_pages]);
    kv.k_sealed = forms.has_k_sealed ? at[k_sealed] : 0, kv.v_sealed = forms.has_v_sealed ? at[v_sealed] : 0;
    kv.channels = array_at<uint8_t>(at[kept_channels]), kv.positions = array_at<int32_t>(at[slot_positions]);
    kv.chosen = array_at<int32_t>(at[chosen_pieces]), kv.chosen_count = at[chosen_count], kv.chosen_tokens = at[chosen_tokens];
    return kv;
}

void Program::attend_heads(const std::string& name, const Attention& attention, std::vector<HeadForms> forms) {
    auto kernel = std::make_unique<AttendHeadsKernel>();
    kernel->name = name, kernel->a = attention, kernel->forms = std::move(forms);
    watched_.resize(std::max(watched_.size(), static_cast<size_t>(attention.layer) + 1));
    watched_[static_cast<size_t>(attention.layer)] = {&kernel->queries, attention.heads, attention.head_dim};
    kernels_.push_back(std::move(kernel));
    attends_.resize(watched_.size());
    attends_[static_cast<size_t>(attention.layer)] = static_cast<int64_t>(kernels_.size());
    heads_ = std::max(heads_, attention.heads), head_dim_ = std::max(head_dim_, attention.head_dim);
    per_kv_ = std::max(per_kv_, attention.heads / attention.kv_heads);
}

}  // namespace trimtab
