// The gated FFN that reads rows of up and down only for neurons whose activation is large. Source: CATS, arXiv 2404.08763, 4.3.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "native/program.h"

namespace trimtab {
namespace {

struct GateFirstKernel : Kernel {
    GateFirstFFN f;

    int64_t width() const { return f.up.cols; }
    int64_t neurons() const { return f.up.rows; }
    int64_t sums_bytes(int64_t tokens) const { return aligned(4 * tokens * std::max<int64_t>(1, f.up.groups())); }

    // Shared: normed input, activations, then of every needed neuron its value and its flag, each by token. Own: indices of the
    // needed neurons, and sums of the input over groups of up.
    int64_t scratch_bytes(int64_t tokens) const override {
        const int64_t shared = aligned(4 * tokens * width()) + 2 * aligned(4 * tokens * neurons()) + aligned(tokens * neurons()) +
                               f.gate_input.bytes(tokens);
        return std::max(shared, aligned(8 * neurons()) + sums_bytes(tokens));
    }
    int64_t own_bytes(int64_t tokens) const override { return aligned(8 * neurons()) + sums_bytes(tokens); }

    void run(Context& c, Worker& worker) override {
        const TileKernels& tiles = tile_kernels();
        const Kernels& rows = kernels();
        const Values &from = c.program.values(f.source), &to = c.program.values(f.values);
        const int64_t tokens = c.step.tokens, D = width(), F = neurons();
        char* at = c.shared;
        float* x = reinterpret_cast<float*>(at);
        at += aligned(4 * tokens * D);
        float* gate = reinterpret_cast<float*>(at);
        at += aligned(4 * tokens * F);
        float* hidden = reinterpret_cast<float*>(at);
        at += aligned(4 * tokens * F);
        uint8_t* flags = reinterpret_cast<uint8_t*>(at);
        at += aligned(tokens * F);
        Input input = f.gate_input;
        input.place(at, tokens);
        for (int64_t t = worker.begin(tokens); t < worker.end(tokens); ++t) {
            tiles.norm(f.norm, from.data + t * from.width, x + t * D);
            input.fill(t, x + t * D, D);
        }
        worker.wait();

        int64_t bytes = 0;
        const int64_t count = f.gate.tiles();
        alignas(64) float out[64 * tile_rows];
        for (int64_t tile = worker.begin(count); tile < worker.end(count); ++tile) {
            const int64_t n0 = tile * tile_rows, here = std::min<int64_t>(tile_rows, F - n0);
            for (int64_t t0 = 0; t0 < tokens; t0 += 32) {
                const int64_t block = std::min<int64_t>(32, tokens - t0);
                tiles.dot_tile(f.gate, tile, input, t0, block, out);
                tiles.activate(f.act, out, nullptr, block * tile_rows);
                for (int64_t t = 0; t < block; ++t)
                    std::memcpy(gate + (t0 + t) * F + n0, out + t * tile_rows, static_cast<size_t>(here) * 4);
            }
            bytes += f.gate.tile_bytes();
        }
        worker.wait();

        // Neurons that at least one token needs. "Not at most the threshold" keeps a NaN visible instead of skipping it. A long
        // pass needs nearly all of them, so it reads them all.
        const bool few = tokens <= f.max_tokens, cut = few || f.threshold_prefill;
        int64_t* index = reinterpret_cast<int64_t*>(c.own + worker.id * c.own_bytes);
        float* sums = reinterpret_cast<float*>(c.own + worker.id * c.own_bytes + aligned(8 * F));
        int64_t needed = 0;
        for (int64_t i = 0; i < F; ++i) {
            bool any = !few;
            for (int64_t t = 0; few && t < tokens; ++t) any = any || !(std::fabs(gate[t * F + i]) <= f.threshold);
            if (any) index[needed++] = i;
        }
        if (f.up.kind == Kind::ints) rows.group_sums(x, tokens, D, f.up.group, sums);
        const int64_t first = worker.begin(needed), last = worker.end(needed);
        bytes += rows.dot_rows(f.up, x, sums, tokens, index, first, last, hidden, needed);
        int64_t kept = 0;
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t j = first; j < last; ++j) {
                const float value = gate[t * F + index[j]];
                const bool keep = !cut || !(std::fabs(value) <= f.threshold);
                flags[t * needed + j] = keep, kept += keep;
                hidden[t * needed + j] *= value;
            }
        worker.wait();

        // Each worker owns a range of columns and walks the rows in order, so no sum depends on their number.
        const int64_t grains = (D + 63) / 64;
        const int64_t left = worker.begin(grains) * 64, right = std::min(worker.end(grains) * 64, D);
        if (left < right)
            bytes += rows.add_rows(f.down_t, hidden, flags, needed, tokens, index, needed, left, right, to.data, to.width);
        if (worker.id == 0) {
            bytes += f.norm.nbytes() + 4;
            flops += 2 * tokens * F * D;
            if (few) active_rows = needed;
        }
        flops += 4 * kept * D;
        if (few) active_pairs += kept;
        weight_read += bytes;
        worker.wait();
    }
};

}  // namespace

void Program::gate_first(const std::string& name, GateFirstFFN ffn) {
    auto kernel = std::make_unique<GateFirstKernel>();
    ffn.gate_input = Input::of(ffn.gate);
    kernel->name = name, kernel->f = std::move(ffn);
    kernels_.push_back(std::move(kernel));
}

}  // namespace trimtab
