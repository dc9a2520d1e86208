#include "native/program.h"

#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <new>
#include <optional>

namespace trimtab {
namespace {

constexpr int64_t alone = 2;         // tokens up to which every worker prepares the input for itself: cheaper than a barrier
constexpr int64_t lookup_tokens = 8;  // up to which products are looked up; above, decoding the matrix once is cheaper
constexpr int64_t token_block = 64;  // rows of input one tile is multiplied with before its results are stored
constexpr int64_t huge_page = int64_t{2} << 20;

int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// The row of a table of tiles as floats.
void decode_row(const Tiles& w, int64_t row, float* out) {
    const int64_t tile = row / tile_rows, r = row % tile_rows;
    const uint8_t* data = w.data + tile * w.data_bytes();
    auto half = [](const uint16_t* at) {
        const uint32_t bits = *at, sign = (bits & 0x8000u) << 16, rest = bits & 0x7fffu;
        if (rest < 0x400) {
            const float small = static_cast<float>(rest) * 5.9604644775390625e-8f;
            return sign ? -small : small;
        }
        const uint32_t word = sign | (rest >= 0x7c00 ? 0x7f800000u | (rest & 0x3ff) << 13 : (rest + (112u << 10)) << 13);
        float value;
        std::memcpy(&value, &word, 4);
        return value;
    };
    if (w.coding != Coding::ints) {
        for (int64_t k = 0; k < w.cols; ++k) {
            if (w.coding == Coding::f32) {
                std::memcpy(out + k, data + (k * 16 + r) * 4, 4);
            } else if (w.coding == Coding::f16) {
                out[k] = half(reinterpret_cast<const uint16_t*>(data) + k * 16 + r);
            } else {
                const uint32_t word = static_cast<uint32_t>(
                                          reinterpret_cast<const uint16_t*>(data)[(k / 2 * 16 + r) * 2 + k % 2])
                                      << 16;
                std::memcpy(out + k, &word, 4);
            }
        }
        return;
    }
    for (int64_t k = 0; k < w.cols; ++k) {
        const uint8_t* unit = data + k / 32 * 64 * w.bits;
        const int64_t four = k % 32 / 4, j = k % 4;
        uint32_t code = 0;
        int shift = 0;
        for (int part : {8, 4, 2, 1}) {
            if (!(w.bits & part)) continue;
            const int64_t per = 8 / part;  // fours of columns in a vector
            code |= (unit[four / per * 64 + r * 4 + j] >> (four % per * part) & ((1u << part) - 1)) << shift;
            unit += 64 * part, shift += part;
        }
        const int64_t g = k / w.group;
        float scale, minimum;
        if (w.scales == Scales::half) {
            const int64_t at = (tile * w.groups() + g) * 16 + r;
            scale = half(w.scale + at);
            minimum = w.minimum ? half(w.minimum + at) : -scale * static_cast<float>(1 << (w.bits - 1));
        } else if (w.scales == Scales::q4_k) {
            const int64_t block = tile * (w.padded() / 256) + g / 8;
            scale = half(w.scale + block * 32 + r) * w.sub[(block * 16 + g % 8) * 16 + r];
            minimum = -half(w.scale + block * 32 + 16 + r) * w.sub[(block * 16 + 8 + g % 8) * 16 + r];
        } else {
            const int64_t block = tile * (w.padded() / 256) + g / 16;
            scale = half(w.scale + block * 16 + r) * static_cast<int8_t>(w.sub[(block * 16 + g % 16) * 16 + r]);
            minimum = -32 * scale;
        }
        out[k] = scale * static_cast<float>(code) + minimum;
    }
}

// --------------------------------------------------------------------------------------------------------- embeddings

struct EmbedKernel : Kernel {
    Tiles table;
    float scale = 1;
    int64_t offset = 0;
    int values = 0;
    bool by_position = false;  // add the row of each token's position instead of setting the row of its id

    void run(Context& c, Worker& worker) override {
        const Values& to = c.program.values(values);
        const int64_t first = worker.begin(c.step.tokens), last = worker.end(c.step.tokens);
        std::vector<float> row(by_position ? static_cast<size_t>(table.cols) : 0);
        int64_t sequence = 0;
        for (int64_t t = first; t < last; ++t) {
            float* out = to.data + t * to.width;
            if (by_position) {
                while (t >= c.step.starts[sequence + 1]) ++sequence;
                decode_row(table, c.step.past[sequence] + t - c.step.starts[sequence] + offset, row.data());
                for (int64_t k = 0; k < table.cols; ++k) out[k] += row[static_cast<size_t>(k)];
            } else {
                decode_row(table, c.step.ids[t] + offset, out);
                if (scale != 1)
                    for (int64_t k = 0; k < table.cols; ++k) out[k] *= scale;
            }
        }
        weight_read += (last - first) * (table.tile_bytes() / tile_rows);
        worker.wait();
    }
};

// ------------------------------------------------------------------------------------------------------------- linear

struct LinearKernel : Kernel {
    int source = 0;
    bool has_norm = false;
    Norm norm;
    std::vector<Input> inputs;  // forms of the input its products want; pointers are set in each step
    std::vector<Product> products;
    Store store = Store::set;
    Act act = Act::silu;

    // Whether some product wants its tiles as floats, and so the input of codes as well.
    bool decodes(int64_t tokens) const {
        for (const Product& p : products)
            if (p.w.coding == Coding::ints && p.flow.decodes(tokens)) return true;
        return false;
    }
    bool lookups = false;  // some product works by table lookup

    int64_t scratch_bytes(int64_t tokens) const override {
        int64_t bytes = aligned(4 * products[0].w.cols) * (lookups ? 1 + 2 * tile_rows : 1);
        for (Input in : inputs) {
            in.decoded = in.ints && decodes(tokens);
            bytes += in.bytes(tokens);
        }
        return bytes;
    }

    void run(Context& c, Worker& worker) override {
        const Values& from = c.program.values(source);
        const bool gather = c.program.values(products[0].values).logits;
        const int64_t tokens = gather ? c.step.logits : c.step.tokens, cols = products[0].w.cols;
        const bool own = tokens <= alone, decoded = decodes(tokens);
        ask_for_first_tile(worker);
        char* private_ = c.own + worker.id * c.own_bytes;
        float* normed = reinterpret_cast<float*>(private_);
        char* at = own ? private_ + aligned(4 * cols) : c.shared;
        Input ready[4];
        const size_t forms = inputs.size();
        for (size_t i = 0; i < forms; ++i) {
            ready[i] = inputs[i];
            ready[i].decoded = decoded && ready[i].ints;
            ready[i].place(at, tokens);
            at += ready[i].bytes(tokens);
        }
        const TileKernels& k = tile_kernels();
        const int64_t first = own ? 0 : worker.begin(tokens), last = own ? tokens : worker.end(tokens);
        for (int64_t t = first; t < last; ++t) {
            const float* row = from.data + (gather ? c.step.logits_rows[t] : t) * from.width;
            if (has_norm) k.norm(norm, row, normed), row = normed;
            for (size_t i = 0; i < forms; ++i) ready[i].fill(t, row, cols);
        }
        if (!own) worker.wait();
        const int64_t step_by = store == Store::gated ? 2 : 1;
        int64_t jobs = 0;
        for (size_t p = 0; p < products.size(); p += static_cast<size_t>(step_by)) jobs += products[p].w.tiles();
        const int64_t begin = worker.begin(jobs), end = worker.end(jobs);
        int64_t bytes = 0, before = 0;
        for (size_t p = 0; p < products.size(); p += static_cast<size_t>(step_by)) {
            const int64_t tiles = products[p].w.tiles();
            for (int64_t j = std::max(begin, before); j < std::min(end, before + tiles); ++j)
                bytes += multiply(c, private_, ready, p, j - before, tokens);
            before += tiles;
        }
        weight_read += bytes;
        if (worker.id == 0 && has_norm) weight_read += norm.nbytes();
        if (worker.id == 0)
            for (const Product& p : products) flops += 2 * tokens * p.w.rows * p.w.cols;
        worker.wait();
    }

    // Weights come from memory, and the first take longest: ask for them before the input is prepared.
    void ask_for_first_tile(const Worker& worker) const {
        const size_t by = store == Store::gated ? 2 : 1;
        int64_t jobs = 0;
        for (size_t p = 0; p < products.size(); p += by) jobs += products[p].w.tiles();
        int64_t tile = worker.begin(jobs);
        for (size_t p = 0; p < products.size(); p += by) {
            const Tiles& w = products[p].w;
            if (tile >= w.tiles()) {
                tile -= w.tiles();
                continue;
            }
            const uint8_t* data = w.data + tile * w.data_bytes();
            for (int64_t line = 0; line < std::min<int64_t>(w.data_bytes(), 2048); line += 64) __builtin_prefetch(data + line);
            return;
        }
    }

    int64_t multiply(Context& c, char* own, const Input* ready, size_t p, int64_t tile, int64_t tokens) {
        const TileKernels& k = tile_kernels();
        const Product& one = products[p];
        const Values& to = c.program.values(one.values);
        const int64_t n0 = tile * tile_rows, count = std::min<int64_t>(tile_rows, one.w.rows - n0);
        alignas(64) float out[token_block * tile_rows], second[token_block * tile_rows];
        float* room = reinterpret_cast<float*>(own + aligned(4 * one.w.cols));
        std::optional<Tiles> decoded, decoded2;
        if (lookups && tokens > lookup_tokens) {
            decoded = decode(one.w, tile, room);
            if (store == Store::gated) decoded2 = decode(products[p + 1].w, tile, room + one.w.cols * tile_rows);
        }
        // A second pass over the input makes two rows of every token.
        const bool doubled =
            ready[one.input].passes > 1 || (store == Store::gated && ready[products[p + 1].input].passes > 1);
        const int64_t together = doubled ? token_block / 2 : token_block;
        for (int64_t t0 = 0; t0 < tokens; t0 += together) {
            const int64_t here = std::min(together, tokens - t0);
            dot(one, decoded, tile, ready[one.input], tokens, t0, here, out);
            finish(one, n0, count, here, out);
            if (store == Store::gated) {
                const Product& other = products[p + 1];
                dot(other, decoded2, tile, ready[other.input], tokens, t0, here, second);
                finish(other, n0, count, here, second);
                k.activate(act, out, second, here * tile_rows);
            } else if (act != Act::none) {
                k.activate(act, out, nullptr, here * tile_rows);
            }
            for (int64_t t = 0; t < here; ++t) {
                float* row = to.data + (t0 + t) * to.width + one.column + n0;
                const float* from = out + t * tile_rows;
                if (store == Store::add)
                    for (int64_t i = 0; i < count; ++i) row[i] += from[i];
                else
                    std::memcpy(row, from, static_cast<size_t>(count) * 4);
            }
        }
        int64_t bytes = one.w.tile_bytes() + (one.bias ? 4 * count : 0);
        if (store == Store::gated) bytes += products[p + 1].w.tile_bytes() + (products[p + 1].bias ? 4 * count : 0);
        return bytes;
    }

    // A tile of a matrix that is looked up, decoded into `room` as the only tile of a matrix of floats; none of another matrix.
    static std::optional<Tiles> decode(const Tiles& w, int64_t tile, float* room) {
        if (!w.lookup()) return std::nullopt;
        tile_kernels().decode_tile(w, tile, room);
        Tiles decoded;
        decoded.data = reinterpret_cast<const uint8_t*>(room), decoded.rows = tile_rows, decoded.cols = w.cols;
        return decoded;
    }

    // out [here, 16] for tokens t0 .. of a step of `tokens`, with room for two rows a token where the input has two passes.
    static void dot(const Product& p, const std::optional<Tiles>& decoded, int64_t tile, const Input& in, int64_t tokens,
                    int64_t t0, int64_t here, float* out) {
        const TileKernels& k = tile_kernels();
        if (decoded) return k.dot_tile(*decoded, 0, in, t0, here, out);
        if (p.w.lookup()) return k.dot_tile(p.w, tile, in, t0, here, out);
        if (p.flow.decodes(tokens)) return k.dot_decoded(p.w, tile, in, t0, here, out);
        in.dot(tokens < p.flow.flat ? k.dot_each : k.dot_tile, p.w, tile, t0, here, out);
    }

    static void finish(const Product& p, int64_t n0, int64_t count, int64_t tokens, float* out) {
        if (p.bias)
            for (int64_t t = 0; t < tokens; ++t)
                for (int64_t i = 0; i < count; ++i) out[t * tile_rows + i] += p.bias[n0 + i];
        if (p.scale != 1)
            for (int64_t i = 0; i < tokens * tile_rows; ++i) out[i] *= p.scale;
        if (p.softcap > 0)
            for (int64_t i = 0; i < tokens * tile_rows; ++i) out[i] = p.softcap * std::tanh(out[i] / p.softcap);
    }
};

struct NormAddKernel : Kernel {
    int source = 0, values = 0;
    Norm norm;
    int64_t scratch_bytes(int64_t) const override { return aligned(4 * norm.size); }
    void run(Context& c, Worker& worker) override {
        const Values &from = c.program.values(source), &to = c.program.values(values);
        float* row = reinterpret_cast<float*>(c.own + worker.id * c.own_bytes);
        for (int64_t t = worker.begin(c.step.tokens); t < worker.end(c.step.tokens); ++t) {
            tile_kernels().norm(norm, from.data + t * from.width, row);
            float* out = to.data + t * to.width;
            for (int64_t i = 0; i < norm.size; ++i) out[i] += row[i];
        }
        if (worker.id == 0) weight_read += norm.nbytes();
        worker.wait();
    }
};

// ---------------------------------------------------------------------------------------------------------- attention

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
        const int64_t jobs = static_cast<int64_t>(pieces.size()) * a.kv_heads;
        bool partial = false;
        for (const Piece& piece : pieces) partial = partial || piece.slot >= 0;
        if (partial)
            for (int64_t j = worker.begin(jobs); j < worker.end(jobs); ++j) attend(c, pieces[static_cast<size_t>(j / a.kv_heads)], j % a.kv_heads);
        else
            for (int64_t j; (j = c.next.fetch_add(1, std::memory_order_relaxed)) < jobs;)
                attend(c, pieces[static_cast<size_t>(j / a.kv_heads)], j % a.kv_heads);
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

// ------------------------------------------------------------------------------------------------------------ program

Program::Arena::~Arena() {
    if (data) munmap(data, static_cast<size_t>(bytes));
}

char* Program::Arena::grow(int64_t wanted) {
    if (wanted <= bytes) return data;
    const int64_t size = (wanted + 4095) / 4096 * 4096;
    void* fresh = mmap(nullptr, static_cast<size_t>(size), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (fresh == MAP_FAILED) throw std::bad_alloc();
    if (size >= huge_page) madvise(fresh, static_cast<size_t>(size), MADV_HUGEPAGE);
    if (data) munmap(data, static_cast<size_t>(bytes));
    data = static_cast<char*>(fresh), bytes = size;
    return data;
}

int64_t Program::arena_bytes() const {
    return values_arena_.bytes + scratch_arena_.bytes + partial_arena_.bytes + rope_arena_.bytes;
}

int Program::add_values(int64_t width, bool logits) {
    values_.push_back({width, logits, nullptr});
    return static_cast<int>(values_.size()) - 1;
}

int Program::add_rope(Rope rope) {
    ropes_.push_back(std::move(rope));
    return static_cast<int>(ropes_.size()) - 1;
}

void Program::embed(const std::string& name, const Tiles& table, float scale, int values) {
    auto kernel = std::make_unique<EmbedKernel>();
    kernel->name = name, kernel->table = table, kernel->scale = scale, kernel->values = values;
    kernels_.push_back(std::move(kernel));
}

void Program::positions(const std::string& name, const Tiles& table, int64_t offset, int values) {
    auto kernel = std::make_unique<EmbedKernel>();
    kernel->name = name, kernel->table = table, kernel->offset = offset, kernel->values = values, kernel->by_position = true;
    kernels_.push_back(std::move(kernel));
}

void Program::linear(const std::string& name, int source, const Norm* norm, std::vector<Product> products, Store store,
                     Act act, int passes) {
    auto kernel = std::make_unique<LinearKernel>();
    kernel->name = name, kernel->source = source, kernel->store = store, kernel->act = act;
    if (norm) kernel->has_norm = true, kernel->norm = *norm;
    for (Product& product : products) {
        kernel->lookups = kernel->lookups || product.w.lookup();
        const Input in = Input::of(product.w, passes);
        size_t i = 0;
        while (i < kernel->inputs.size() && !kernel->inputs[i].same(in)) ++i;
        if (i == kernel->inputs.size()) kernel->inputs.push_back(in);
        product.input = static_cast<int>(i);
    }
    kernel->products = std::move(products);
    kernels_.push_back(std::move(kernel));
}

void Program::norm_add(const std::string& name, int source, const Norm& norm, int values) {
    auto kernel = std::make_unique<NormAddKernel>();
    kernel->name = name, kernel->source = source, kernel->norm = norm, kernel->values = values;
    kernels_.push_back(std::move(kernel));
}

void Program::attend(const std::string& name, const Attention& attention) {
    auto kernel = std::make_unique<AttendKernel>();
    kernel->name = name, kernel->a = attention;
    kernels_.push_back(std::move(kernel));
    heads_ = std::max(heads_, attention.heads), head_dim_ = std::max(head_dim_, attention.head_dim);
    per_kv_ = std::max(per_kv_, attention.heads / attention.kv_heads);
}

// Cuts the attention of a step into pieces: one token over ranges of its keys, or a few tokens over all of theirs. The cuts
// depend on lengths alone, so that results do not depend on the number of workers.
void Program::cut(const Step& step) {
    pieces_.clear(), slots_ = 0;
    const int64_t together = std::max<int64_t>(1, 12 / std::max<int64_t>(1, per_kv_));
    for (int64_t row = 0; row < step.rows; ++row) {
        const int64_t first = step.starts[row], fresh = step.starts[row + 1] - first, past = step.past[row];
        if (fresh == 1) {
            const int64_t keys = past + 1, range = split_ > 0 ? split_ : keys <= 512 ? 64 : keys <= 2048 ? 128 : 256;
            if (keys <= range) {
                pieces_.push_back({row, first, 1, 0, keys, -1});
                continue;
            }
            for (int64_t k = 0; k < keys; k += range) pieces_.push_back({row, first, 1, k, std::min(k + range, keys), slots_++});
            continue;
        }
        // Longest first: what is left at the end is short.
        for (int64_t end = fresh; end > 0; end -= together) {
            const int64_t start = std::max<int64_t>(0, end - together);
            pieces_.push_back({row, first + start, end - start, 0, past + end, -1});
        }
    }
}

// Cosines and sines of every new token.
void Program::turn(const Step& step, const int64_t* reach, Worker& worker) {
    for (Rope& rope : ropes_) {
        const int64_t half = rope.half();
        int64_t row = 0;
        for (int64_t t = worker.begin(step.tokens); t < worker.end(step.tokens); ++t) {
            while (t >= step.starts[row + 1]) ++row;
            const bool longer = !rope.inverse_long.empty() && reach[row] > rope.original;
            const std::vector<float>& inverse = longer ? rope.inverse_long : rope.inverse;
            const float position = static_cast<float>(step.past[row] + t - step.starts[row]);
            float* out = rope.table + t * 2 * half;
            for (int64_t i = 0; i < half; ++i) {
                const float angle = position * inverse[static_cast<size_t>(i)];
                out[i] = std::cos(angle) * rope.scale, out[half + i] = std::sin(angle) * rope.scale;
            }
        }
    }
}

void Program::run_on(const Step& step, int source, const float* x, int out, float* y) {
    lay_out(step);
    const Values &from = values(source), &to = values(out);
    std::memcpy(from.data, x, static_cast<size_t>(4 * step.tokens * from.width));
    run(step, step.past, false);
    std::memcpy(y, to.data, static_cast<size_t>(4 * step.tokens * to.width));
}

void Program::lay_out(const Step& step) {
    int64_t bytes = 0;
    for (const Values& v : values_) bytes += aligned(4 * v.width * (v.logits ? step.logits : step.tokens));
    char* at = values_arena_.grow(bytes);
    for (Values& v : values_) {
        v.data = reinterpret_cast<float*>(at);
        at += aligned(4 * v.width * (v.logits ? step.logits : step.tokens));
    }
}

// Lays out everything a step needs, and cuts its attention.
Context Program::prepare(const Step& step) {
    lay_out(step);
    int64_t bytes = 0;
    for (const Rope& rope : ropes_) bytes += aligned(8 * rope.half() * step.tokens);
    char* at = rope_arena_.grow(bytes);
    for (Rope& rope : ropes_) rope.table = reinterpret_cast<float*>(at), at += aligned(8 * rope.half() * step.tokens);
    cut(step);
    int64_t shared = 0, own = 0;
    for (const auto& kernel : kernels_) {
        shared = std::max(shared, kernel->scratch_bytes(std::max(step.tokens, step.logits)));
        own = std::max(own, kernel->own_bytes(step.tokens));
        kernel->weight_read = 0, kernel->kv_read = 0, kernel->kv_written = 0, kernel->flops = 0, kernel->seconds = 0;
        kernel->active_rows = -1, kernel->active_pairs = 0;
    }
    char* scratch = scratch_arena_.grow(shared + own * workers_.count());
    float* partial = reinterpret_cast<float*>(partial_arena_.grow(4 * slots_ * heads_ * (head_dim_ + 2)));
    return {*this, step, scratch, scratch + shared, own, partial};
}

void Program::run_one(const Step& step, size_t kernel) {
    Context context = prepare(step);
    struct Job {
        Kernel& kernel;
        Context& context;
    } job{*kernels_[kernel], context};
    workers_.run(
        [](void* pointer, Worker& worker) {
            Job& j = *static_cast<Job*>(pointer);
            j.kernel.run(j.context, worker);
        },
        &job);
}

void Program::run(const Step& step, const int64_t* reach, bool timed) {
    Context context = prepare(step);
    struct Job {
        Program& program;
        Context& context;
        const int64_t* reach;
        bool timed;
    } job{*this, context, reach, timed};
    workers_.run(
        [](void* pointer, Worker& worker) {
            Job& j = *static_cast<Job*>(pointer);
            j.program.turn(j.context.step, j.reach, worker);
            worker.wait();
            using Clock = std::chrono::steady_clock;
            for (const auto& kernel : j.program.kernels_) {
                const auto start = j.timed ? Clock::now() : Clock::time_point{};
                kernel->run(j.context, worker);
                if (j.timed && worker.id == 0)
                    kernel->seconds = std::chrono::duration<double>(Clock::now() - start).count();
            }
        },
        &job);
}

}  // namespace trimtab
