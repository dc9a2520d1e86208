// Products of one input with several matrices, what stands before them (norm) and behind (bias, activation, residual).
#include "native/finish.h"
#include "native/program.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>

namespace trimtab {
namespace {

constexpr int64_t token_block = 64;  // rows of input one tile is multiplied with before its results are stored

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
            if (p.w.integers() && p.flow.decodes(tokens)) return true;
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
        for (int64_t t0 = 0; t0 < tokens; t0 += token_block) {
            const int64_t here = std::min(token_block, tokens - t0);
            dot(one, decoded, tile, ready[one.input], tokens, t0, here, out);
            finish(one.bias ? one.bias + n0 : nullptr, one.scale, one.softcap, count, here, out);
            if (store == Store::gated) {
                const Product& other = products[p + 1];
                dot(other, decoded2, tile, ready[other.input], tokens, t0, here, second);
                finish(other.bias ? other.bias + n0 : nullptr, other.scale, other.softcap, count, here, second);
                k.activate(act, out, second, here * tile_rows);
            } else if (act != Act::none) {
                k.activate(act, out, nullptr, here * tile_rows);
            }
            put(to, one.column + n0, t0, store, out, count, here);
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

    // out [here, 16] for tokens t0 .. of a step of `tokens`.
    static void dot(const Product& p, const std::optional<Tiles>& decoded, int64_t tile, const Input& in, int64_t tokens,
                    int64_t t0, int64_t here, float* out) {
        const TileKernels& k = tile_kernels();
        if (decoded) return k.dot_tile(*decoded, 0, in, t0, here, out);
        if (p.w.lookup()) return k.dot_tile(p.w, tile, in, t0, here, out);
        if (p.flow.decodes(tokens)) return k.dot_decoded(p.w, tile, in, t0, here, out);
        (tokens < p.flow.flat ? k.dot_each : k.dot_tile)(p.w, tile, in, t0, here, out);
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

}  // namespace

void Program::linear(const std::string& name, int source, const Norm* norm, std::vector<Product> products, Store store,
                     Act act, float twice_from) {
    auto kernel = std::make_unique<LinearKernel>();
    kernel->name = name, kernel->source = source, kernel->store = store, kernel->act = act;
    if (norm) kernel->has_norm = true, kernel->norm = *norm;
    for (Product& product : products) {
        kernel->lookups = kernel->lookups || product.w.lookup();
        const Input in = Input::of(product.w, twice_from);
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

}  // namespace trimtab
