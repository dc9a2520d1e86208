// Attention of a step: place new keys and values, attend over pieces of the cache, join partial sums.
#include "native/program.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace trimtab {
namespace {

constexpr int turned_from = 6;  // queries from which turning keys round pays: as many as are multiplied with them at a time

struct AttendKernel : Kernel {
    Attention a;

    bool coded() const { return a.coding == Coding::ints; }
    int64_t groups() const { return coded() ? (a.head_dim + a.group - 1) / a.group : 0; }
    // Bytes of one key or value: where they lie side by side, and in all.
    int64_t row_bytes() const { return a.head_dim * (coded() ? 1 : a.coding == Coding::f32 ? 4 : 2); }
    int64_t token_bytes() const { return row_bytes() + 4 * groups(); }

    // Keys or values of KV head g in a run with room for `room` tokens a head, see Step::cache.
    struct Run {
        uint8_t* data;
        uint16_t *scale, *minimum;
    };
    Run run_of(int64_t address, int64_t room, int64_t g) const {
        uint8_t* base = reinterpret_cast<uint8_t*>(static_cast<uintptr_t>(address));
        if (!coded()) return {base + g * room * row_bytes(), nullptr, nullptr};
        uint16_t* scales = reinterpret_cast<uint16_t*>(base + a.kv_heads * room * row_bytes());
        return {base + g * room * row_bytes(), scales + g * room * groups(), scales + (a.kv_heads + g) * room * groups()};
    }

    void run(Context& c, Worker& worker) override {
        place(c, worker);
        worker.wait();
        const auto& pieces = c.program.pieces();
        // Head after head: the keys of one piece follow those of the piece before, and are asked for with it.
        const int64_t count = static_cast<int64_t>(pieces.size()), jobs = count * a.kv_heads;
        bool partial = false;
        for (const Piece& piece : pieces) partial = partial || piece.slot >= 0;
        if (partial)
            for (int64_t j = worker.begin(jobs); j < worker.end(jobs); ++j) attend(c, pieces[static_cast<size_t>(j % count)], j / count);
        else
            for (int64_t j; (j = c.next.fetch_add(1, std::memory_order_relaxed)) < jobs;)
                attend(c, pieces[static_cast<size_t>(j % count)], j / count);
        worker.wait();
        if (worker.id == 0) c.next.store(0, std::memory_order_relaxed);
        if (!partial) return;
        const int64_t total = c.step.rows * a.heads;
        for (int64_t i = worker.begin(total); i < worker.end(total); ++i) merge(c, i / a.heads, i % a.heads);
        worker.wait();
    }

    const int64_t* cache(const Context& c, int64_t row) const { return c.step.cache + (a.layer * c.step.rows + row) * 3; }

    // Norms and rotates queries in place, and writes new keys and values into the cache.
    void place(Context& c, Worker& worker) {
        const TileKernels& k = tile_kernels();
        const int64_t each = a.heads + 2 * a.kv_heads, total = c.step.tokens * each;
        const int64_t first = worker.begin(total), last = worker.end(total);
        const Values& qkv = c.program.values(a.qkv);
        const Rope* rope = a.rope < 0 ? nullptr : &c.program.rope(a.rope);
        int64_t row = 0, written = 0;
        for (int64_t i = first; i < last; ++i) {
            const int64_t t = i / each, head = i % each;
            while (t >= c.step.starts[row + 1]) ++row;
            const int64_t position = c.step.past[row] + t - c.step.starts[row];
            const bool is_query = head < a.heads, is_key = !is_query && head < a.heads + a.kv_heads;
            const int64_t g = head - a.heads - (is_key ? 0 : a.kv_heads);
            float* x = qkv.data + t * qkv.width + head * a.head_dim;
            if (is_query && a.has_q_norm) k.norm(a.q_norm, x, x);
            if (is_key && a.has_k_norm) k.norm(a.k_norm, x, x);
            if (rope && (is_query || is_key)) {
                const float* table = rope->table + t * 2 * rope->half();
                k.rotate(x, table, table + rope->half(), rope->half());
            }
            if (is_query || !a.append) continue;
            const int64_t* at = cache(c, row);
            const Run to = run_of(at[is_key ? 0 : 1], at[2], g);
            if (coded())
                k.encode_grid(x, a.head_dim, a.group, to.data + position * a.head_dim, to.scale + position * groups(),
                              to.minimum + position * groups());
            else
                k.encode(a.coding, x, a.head_dim, to.data + position * row_bytes());
            written += token_bytes();
        }
        kv_written += written;
        if (worker.id == 0) weight_read += (a.has_q_norm ? a.q_norm.nbytes() : 0) + (a.has_k_norm ? a.k_norm.nbytes() : 0);
    }

    // The queries of one piece that share KV head g.
    struct Queries {
        const float* q[max_queries];
        int64_t low[max_queries], high[max_queries], token[max_queries], head[max_queries];
        float largest[max_queries], weight[max_queries];
        int count = 0;
    };

    void add_query(const Context& c, Queries& set, int64_t row, int64_t token, int64_t head) const {
        const Values& q = c.program.values(a.qkv);
        const int64_t position = c.step.past[row] + token - c.step.starts[row];
        set.q[set.count] = q.data + token * q.width + head * a.head_dim;
        set.low[set.count] = a.window > 0 ? std::max<int64_t>(0, position + 1 - a.window) : 0;
        set.high[set.count] = position + 1;
        set.token[set.count] = token, set.head[set.count] = head;
        ++set.count;
    }

    void call(const Context& c, Queries& set, int64_t row, int64_t g, int64_t first, int64_t last, bool unified, float* out) {
        const int64_t* at = cache(c, row);
        const Run keys = run_of(at[0], at[2], g), values = run_of(at[1], at[2], g);
        const uint8_t *k = keys.data, *v = values.data;
        const Grid k_grid{keys.scale, keys.minimum}, v_grid{values.scale, values.minimum};
        Attend job;
        job.pages = {a.coding, &k, &v, int64_t{1} << 40, a.head_dim, &k_grid, &v_grid, a.group};
        job.first = first, job.last = last, job.queries = set.count;
        job.q = set.q, job.low = set.low, job.high = set.high;
        job.turned = set.count >= turned_from && set.token[0] != set.token[set.count - 1];
        job.scale = a.scale, job.softcap = a.softcap, job.unified = unified, job.phi = a.phi;
        job.largest = set.largest, job.weight = set.weight, job.out = out;
        tile_kernels().attend(job);
        flops += 4 * set.count * (last - first) * a.head_dim;
    }

    bool safe(float largest) const { return largest - a.phi <= a.high && largest - a.phi >= a.low; }

    // One query again, over all its keys, with the running maximum.
    void again(Context& c, int64_t row, int64_t token, int64_t head, float* out) {
        Queries set;
        add_query(c, set, row, token, head);
        call(c, set, row, head / (a.heads / a.kv_heads), 0, set.high[0], false, out);
        const float by = 1.0f / set.weight[0];
        for (int64_t i = 0; i < a.head_dim; ++i) out[i] *= by;
        const_cast<Program&>(c.program).recomputed += 1;
    }

    void attend(Context& c, const Piece& piece, int64_t g) {
        const int64_t per = a.heads / a.kv_heads;
        const Values& to = c.program.values(a.out);
        alignas(64) float sums[max_queries * max_head_dim];
        const int64_t most = std::min<int64_t>(max_queries, static_cast<int64_t>(sizeof sums / 4) / a.head_dim);
        Queries set;
        auto flush = [&] {
            call(c, set, piece.row, g, piece.first_key, piece.last_key, a.unified, sums);
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
                if (set.count == most) flush();
                add_query(c, set, piece.row, t, g * per + i);
            }
        flush();
        // Every key once for all queries that share it: the last piece of a row sees all of them.
        const int64_t row_end = c.step.starts[piece.row + 1];
        if (piece.slot >= 0 || piece.first_token + piece.tokens == row_end) {
            const int64_t held = c.step.past[piece.row] + row_end - c.step.starts[piece.row];
            const int64_t oldest = c.step.past[piece.row];
            const int64_t from = a.window > 0 ? std::max<int64_t>(0, oldest + 1 - a.window) : 0;
            const int64_t first = std::max(piece.first_key, from), last = std::min(piece.last_key, held);
            kv_read += std::max<int64_t>(0, last - first) * 2 * token_bytes();
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

void Program::attend(const std::string& name, const Attention& attention) {
    auto kernel = std::make_unique<AttendKernel>();
    kernel->name = name, kernel->a = attention;
    kernels_.push_back(std::move(kernel));
    heads_ = std::max(heads_, attention.heads), head_dim_ = std::max(head_dim_, attention.head_dim);
    per_kv_ = std::max(per_kv_, attention.heads / attention.kv_heads);
}

}  // namespace trimtab
