// Products of one input with matrices of int8 rows; columns of the input that hold outliers are multiplied in floats.
#include "native/int8.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "native/finish.h"
#include "native/program.h"

namespace trimtab {
namespace {

constexpr int64_t token_block = 64;  // rows of input a tile is multiplied with before its results are stored

// The input of a pass: floats, their codes, and which columns are outliers.
struct Coded {
    float* x;        // [T, K]
    int8_t* codes;   // [T, padded_codes(K)]
    float* scale;    // [T]
    int32_t* sums;   // [T]
    int32_t* listed; // [count]
    int64_t count = 0;
};

struct Int8Kernel : Kernel {
    int source = 0;
    bool has_norm = false;
    Norm norm;
    std::vector<Int8Product> products;
    Outliers how;
    Store store = Store::set;
    Act act = Act::none;

    int64_t cols() const { return products[0].w.cols; }
    bool searches() const { return !how.listed && !std::isinf(how.threshold); }
    int64_t panel_bytes() const { return aligned(4 * tile_rows * cols()); }
    int64_t scratch_bytes(int64_t tokens) const override {
        return aligned(4 * tokens * cols()) + aligned(tokens * padded_codes(cols())) + 2 * aligned(4 * tokens);
    }
    // What this worker saw, what all saw, the list of it and its columns of two tiles; the input, where it is coded by everyone.
    int64_t own_bytes(int64_t tokens) const override {
        return 2 * aligned(cols()) + aligned(4 * cols()) + 2 * panel_bytes() + scratch_bytes(std::min(tokens, alone));
    }

    void run(Context& c, Worker& worker) override {
        const Values& from = c.program.values(source);
        const bool gather = c.program.values(products[0].values).logits;
        const int64_t tokens = gather ? c.step.logits : c.step.tokens, width = cols(), padded = padded_codes(width);
        const bool own = tokens <= alone;
        const auto seen_by = [&](int id) { return reinterpret_cast<uint8_t*>(c.own + id * c.own_bytes); };
        uint8_t *seen = seen_by(worker.id), *mask = seen + aligned(width);
        Coded in;
        in.listed = reinterpret_cast<int32_t*>(mask + aligned(width));
        auto* panels = reinterpret_cast<float*>(mask + aligned(width) + aligned(4 * width));
        char* at = own ? reinterpret_cast<char*>(panels) + 2 * panel_bytes() : c.shared;
        in.x = reinterpret_cast<float*>(at), at += aligned(4 * tokens * width);
        in.codes = reinterpret_cast<int8_t*>(at), at += aligned(tokens * padded);
        in.scale = reinterpret_cast<float*>(at), at += aligned(4 * tokens);
        in.sums = reinterpret_cast<int32_t*>(at);

        const TileKernels& k = tile_kernels();
        const int64_t first = own ? 0 : worker.begin(tokens), last = own ? tokens : worker.end(tokens);
        std::memset(seen, 0, static_cast<size_t>(width));
        for (int64_t t = first; t < last; ++t) {
            const float* row = from.data + (gather ? c.step.logits_rows[t] : t) * from.width;
            float* x = in.x + t * width;
            if (has_norm)
                k.norm(norm, row, x);
            else
                std::memcpy(x, row, static_cast<size_t>(4 * width));
            if (searches()) int8_kernels().find(x, width, how.threshold, seen);
        }
        std::memcpy(mask, seen, static_cast<size_t>(width));
        if (!own && searches()) {  // a column is an outlier whoever saw it
            worker.wait();
            for (int id = 0; id < worker.count; ++id)
                for (int64_t j = 0; j < width; ++j) mask[j] |= seen_by(id)[j];
        }
        for (int64_t j : how.columns) mask[j] = 1;
        for (int64_t j = 0; j < width; ++j)
            if (mask[j]) in.listed[in.count++] = static_cast<int32_t>(j);
        for (int64_t t = first; t < last; ++t)
            in.scale[t] = int8_kernels().code(in.x + t * width, width, mask, in.codes + t * padded, in.sums + t);
        if (!own) worker.wait();

        const size_t by = store == Store::gated ? 2 : 1;
        int64_t jobs = 0, before = 0, bytes = 0;
        for (size_t p = 0; p < products.size(); p += by) jobs += products[p].w.tiles();
        const int64_t begin = worker.begin(jobs), end = worker.end(jobs);
        for (size_t p = 0; p < products.size(); p += by) {
            const int64_t tiles = products[p].w.tiles();
            for (int64_t j = std::max(begin, before); j < std::min(end, before + tiles); ++j)
                bytes += multiply(c, in, panels, p, j - before, tokens);
            before += tiles;
        }
        weight_read += bytes;
        if (worker.id == 0) {
            if (has_norm) weight_read += norm.nbytes();
            outliers = in.count;
            for (const Int8Product& p : products)
                flops += 2 * tokens * p.w.rows * ((in.count < width ? width : 0) + in.count);
        }
        worker.wait();
    }

    // A tile of product p, and of the one after it where they come in pairs; returns the bytes it read of them.
    int64_t multiply(Context& c, const Coded& in, float* panels, size_t p, int64_t tile, int64_t tokens) {
        const TileKernels& k = tile_kernels();
        const Int8Product& one = products[p];
        const Values& to = c.program.values(one.values);
        const int64_t n0 = tile * tile_rows, count = std::min<int64_t>(tile_rows, one.w.rows - n0);
        const bool gated = store == Store::gated;
        float* others = panels + tile_rows * cols();
        int64_t bytes = read(one, in, n0, count, panels);
        if (gated) bytes += read(products[p + 1], in, n0, count, others);
        alignas(64) float out[token_block * tile_rows], second[token_block * tile_rows];
        for (int64_t t0 = 0; t0 < tokens; t0 += token_block) {
            const int64_t here = std::min(token_block, tokens - t0);
            dot(one, in, panels, n0, count, t0, here, out);
            if (gated) dot(products[p + 1], in, others, n0, count, t0, here, second);
            if (act != Act::none) k.activate(act, out, gated ? second : nullptr, here * tile_rows);
            put(to, one.column + n0, t0, store, out, count, here);
        }
        return bytes;
    }

    // Makes the outlier columns of a tile; returns the bytes read of it in all.
    int64_t read(const Int8Product& p, const Coded& in, int64_t n0, int64_t count, float* panel) const {
        if (in.count) int8_kernels().take(p.w, n0, in.listed, in.count, how.listed, panel);
        const bool coded = in.count < cols();
        return count * ((coded ? cols() + 4 : 0) + in.count * (p.w.columns ? 2 : 1) + (p.bias ? 4 : 0));
    }

    void dot(const Int8Product& p, const Coded& in, const float* panel, int64_t n0, int64_t count, int64_t t0, int64_t here,
             float* out) const {
        const Int8Kernels& k = int8_kernels();
        if (in.count < cols()) {
            alignas(64) int32_t sums[token_block * tile_rows];
            alignas(64) float scale[tile_rows] = {};
            if (count < tile_rows) std::fill(sums, sums + here * tile_rows, 0);
            std::memcpy(scale, p.w.scale + n0, static_cast<size_t>(count) * 4);
            k.dot(p.w.data + n0 * cols(), count, cols(), in.codes + t0 * padded_codes(cols()), in.sums + t0, here, sums);
            k.scale(sums, scale, in.scale + t0, here, out);
        } else {
            std::fill(out, out + here * tile_rows, 0.0f);
        }
        if (in.count) k.add(panel, in.listed, in.count, in.x + t0 * cols(), cols(), here, out);
        finish(p.bias ? p.bias + n0 : nullptr, p.factor, p.softcap, count, here, out);
    }
};

}  // namespace

void Program::int8_linear(const std::string& name, int source, const Norm* norm, std::vector<Int8Product> products, Outliers how,
                          Store store, Act act) {
    auto kernel = std::make_unique<Int8Kernel>();
    kernel->name = name, kernel->source = source, kernel->store = store, kernel->act = act;
    if (norm) kernel->has_norm = true, kernel->norm = *norm;
    kernel->products = std::move(products), kernel->how = std::move(how);
    kernels_.push_back(std::move(kernel));
}

void int8_product(const int8_t* w, int64_t rows, int64_t cols, const int8_t* codes, int64_t tokens, int threads, int32_t* out) {
    const int64_t stride = padded_codes(cols);
    std::vector<int8_t> padded(static_cast<size_t>(tokens * stride));
    std::vector<int32_t> sums(static_cast<size_t>(tokens));
    for (int64_t t = 0; t < tokens; ++t) {
        std::memcpy(padded.data() + t * stride, codes + t * cols, static_cast<size_t>(cols));
        for (int64_t j = 0; j < cols; ++j) sums[static_cast<size_t>(t)] += codes[t * cols + j];
    }
    parallel_ranges(rows, tile_rows, threads, [&](int64_t begin, int64_t end) {
        alignas(64) int32_t part[token_block * tile_rows];
        for (int64_t n0 = begin; n0 < end; n0 += tile_rows) {
            const int64_t count = std::min<int64_t>(tile_rows, end - n0);
            for (int64_t t0 = 0; t0 < tokens; t0 += token_block) {
                const int64_t here = std::min(token_block, tokens - t0);
                int8_kernels().dot(w + n0 * cols, count, cols, padded.data() + t0 * stride, sums.data() + t0, here, part);
                for (int64_t t = 0; t < here; ++t)
                    std::memcpy(out + (t0 + t) * rows + n0, part + t * tile_rows, static_cast<size_t>(count) * 4);
            }
        }
    });
}

}  // namespace trimtab
