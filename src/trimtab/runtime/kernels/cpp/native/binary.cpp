// Products of one input with binary-coded matrices: tables of its sums once, then look-ups, additions and shifts.
#include "binary.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>

#include "native/finish.h"
#include "native/program.h"

namespace trimtab {
namespace {

constexpr int64_t token_block = 64;  // rows of input a decoded tile is multiplied with before its results are stored

struct BinaryLinear : Kernel {
    int source = 0;
    bool has_norm = false;
    Norm norm;
    std::optional<Rotation> rotation;
    std::vector<BinaryProduct> products;
    Store store = Store::set;
    Act act = Act::none;

    int64_t cols() const { return products[0].w.cols; }
    static bool looks(const BinaryProduct& p, int64_t tokens) { return p.w.looks_up() && tokens <= lookup_tokens; }
    int64_t table_bytes() const { return aligned(4 * cols() / chunk_cols * chunk_sums); }
    int64_t input_bytes(int64_t tokens) const {
        return aligned(4 * tokens * cols()) + (tokens <= lookup_tokens ? tokens * table_bytes() : 0);
    }
    int64_t scratch_bytes(int64_t tokens) const override { return input_bytes(tokens); }
    int64_t sum_bytes(int64_t tokens) const {
        int64_t tiles = 0;
        for (const BinaryProduct& p : products) tiles += p.w.tiles();
        return tokens <= lookup_tokens ? aligned(4 * tile_rows * tiles * tokens) : 0;
    }
    // Two decoded tiles; sums of the tiles that are looked up; the input, where every worker prepares it for itself.
    int64_t own_bytes(int64_t tokens) const override {
        return 2 * aligned(4 * tile_rows * cols()) + sum_bytes(tokens) + input_bytes(std::min(tokens, alone));
    }

    void run(Context& c, Worker& worker) override {
        const Values& from = c.program.values(source);
        const bool gather = c.program.values(products[0].values).logits;
        const int64_t tokens = gather ? c.step.logits : c.step.tokens, width = cols();
        const bool own = tokens <= alone;
        char* private_ = c.own + worker.id * c.own_bytes;
        auto* room = reinterpret_cast<float*>(private_);
        auto* sums = reinterpret_cast<float*>(private_ + 2 * aligned(4 * tile_rows * width));
        char* at = own ? private_ + 2 * aligned(4 * tile_rows * width) + sum_bytes(tokens) : c.shared;
        auto* x = reinterpret_cast<float*>(at);
        char* tables = at + aligned(4 * tokens * width);
        const int64_t first = own ? 0 : worker.begin(tokens), last = own ? tokens : worker.end(tokens);
        for (int64_t t = first; t < last; ++t) {
            const float* row = from.data + (gather ? c.step.logits_rows[t] : t) * from.width;
            if (has_norm)
                tile_kernels().norm(norm, row, x + t * width);
            else
                std::memcpy(x + t * width, row, static_cast<size_t>(4 * width));
            if (rotation) rotation->apply(x + t * width, room);
            if (tokens <= lookup_tokens) binary_kernels().tabulate(x + t * width, width, table(tables, t));
        }
        if (!own) worker.wait();
        const size_t by = store == Store::gated ? 2 : 1;
        int64_t jobs = 0, before = 0, bytes = 0;
        for (size_t p = 0; p < products.size(); p += by) jobs += products[p].w.tiles();
        const int64_t begin = worker.begin(jobs), end = worker.end(jobs);
        for (size_t p = 0; p < products.size(); p += by) {
            const int64_t tiles = products[p].w.tiles();
            const int64_t first_tile = std::max(begin, before) - before, last_tile = std::min(end, before + tiles) - before;
            before += tiles;
            if (first_tile >= last_tile) continue;
            float* theirs = look_up(products[p], tables, first_tile, last_tile, tokens, sums);
            if (by == 2) look_up(products[p + 1], tables, first_tile, last_tile, tokens, theirs);
            for (int64_t tile = first_tile; tile < last_tile; ++tile) {
                const int64_t at_sum = (tile - first_tile) * tokens * tile_rows;
                bytes += multiply(c, x, sums + at_sum, theirs + at_sum, room, p, tile, tokens);
            }
        }
        weight_read += bytes;
        if (worker.id == 0) {
            if (has_norm) weight_read += norm.nbytes();
            for (const BinaryProduct& p : products) flops += 2 * tokens * p.w.rows * p.w.cols;
        }
        worker.wait();
    }

    float* table(char* tables, int64_t t) const { return reinterpret_cast<float*>(tables + t * table_bytes()); }

    // Sums of tiles [first, last) where they are looked up, [tile, token, 16]; returns where those of another product begin.
    float* look_up(const BinaryProduct& p, char* tables, int64_t first, int64_t last, int64_t tokens, float* sums) const {
        if (!looks(p, tokens)) return sums;
        float* end = sums + (last - first) * tokens * tile_rows;
        std::fill(sums, end, 0.0f);
        for (int64_t c = 0; c < p.w.chunks(); c += chunk_block)
            for (int64_t t = 0; t < tokens; ++t)
                for (int64_t tile = first; tile < last; ++tile)
                    binary_kernels().dot(p.w, tile, c, std::min(c + chunk_block, p.w.chunks()), table(tables, t),
                                         sums + ((tile - first) * tokens + t) * tile_rows);
        return end;
    }

    // A tile of product p, and of the one after it where they come in pairs; returns the bytes it read of them.
    int64_t multiply(Context& c, const float* x, const float* sums, const float* theirs, float* room, size_t p, int64_t tile,
                     int64_t tokens) {
        const BinaryProduct& one = products[p];
        const Values& to = c.program.values(one.values);
        const int64_t n0 = tile * tile_rows, count = std::min<int64_t>(tile_rows, one.w.rows - n0);
        const bool gated = store == Store::gated;
        float* other = room + aligned(4 * tile_rows * cols()) / 4;
        if (!looks(one, tokens)) binary_kernels().decode(one.w, tile, room);
        if (gated && !looks(products[p + 1], tokens)) binary_kernels().decode(products[p + 1].w, tile, other);
        alignas(64) float out[token_block * tile_rows], second[token_block * tile_rows];
        for (int64_t t0 = 0; t0 < tokens; t0 += token_block) {
            const int64_t here = std::min(token_block, tokens - t0);
            dot(one, x, sums, room, tile, tokens, t0, here, out);
            if (gated) dot(products[p + 1], x, theirs, other, tile, tokens, t0, here, second);
            if (act != Act::none) tile_kernels().activate(act, out, gated ? second : nullptr, here * tile_rows);
            put(to, one.column + n0, t0, store, out, count, here);
        }
        return bytes_of(one, tile, count) + (gated ? bytes_of(products[p + 1], tile, count) : 0);
    }

    static int64_t bytes_of(const BinaryProduct& p, int64_t tile, int64_t count) {
        return p.w.tile_bytes(tile) + (p.bias ? 4 * count : 0);
    }

    void dot(const BinaryProduct& p, const float* x, const float* sums, float* room, int64_t tile, int64_t tokens, int64_t t0, int64_t here,
             float* out) const {
        if (looks(p, tokens)) {
            std::memcpy(out, sums + t0 * tile_rows, static_cast<size_t>(4 * here * tile_rows));
        } else {
            Tiles decoded;
            decoded.data = reinterpret_cast<const uint8_t*>(room), decoded.rows = tile_rows, decoded.cols = cols();
            Input in = Input::of(decoded);
            in.x = const_cast<float*>(x), in.stride = cols();
            tile_kernels().dot_tile(decoded, 0, in, t0, here, out);
        }
        const int64_t n0 = tile * tile_rows, count = std::min<int64_t>(tile_rows, p.w.rows - n0);
        finish(p.bias ? p.bias + n0 : nullptr, p.factor, p.softcap, count, here, out);
    }
};

}  // namespace

void Rotation::apply(float* x, float* room) const {
    for (int64_t i = 0; i < cols(); ++i) room[i] = x[order[i]];
    std::fill_n(x, cols(), 0.0f);
    for (int64_t i = 0; i < lefts; ++i)
        for (int64_t k = 0; k < rights; ++k) {
            const float* row = right_t + k * rights;
            const float by = room[i * rights + k];
            for (int64_t j = 0; j < rights; ++j) x[i * rights + j] += by * row[j];
        }
    std::fill_n(room, cols(), 0.0f);
    for (int64_t i = 0; i < lefts; ++i)
        for (int64_t k = 0; k < lefts; ++k) {
            const float by = left[i * lefts + k];
            for (int64_t j = 0; j < rights; ++j) room[i * rights + j] += by * x[k * rights + j];
        }
    std::copy_n(room, cols(), x);
}

void Program::binary_linear(const std::string& name, int source, const Norm* norm, std::optional<Rotation> rotation,
                            std::vector<BinaryProduct> products, Store store, Act act) {
    auto kernel = std::make_unique<BinaryLinear>();
    kernel->name = name, kernel->source = source, kernel->store = store, kernel->act = act;
    if (norm) kernel->has_norm = true, kernel->norm = *norm;
    kernel->rotation = rotation;
    kernel->products = std::move(products);
    kernels_.push_back(std::move(kernel));
}

}  // namespace trimtab
