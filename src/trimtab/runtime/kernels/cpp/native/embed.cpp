// Rows of tables of tiles: embeddings of ids, and of positions.
#include "native/program.h"

#include <cmath>
#include <cstring>
#include <vector>

namespace trimtab {
namespace {

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
    if (!w.coded()) {
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
    auto code_at = [&](int64_t k) {
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
        return static_cast<int>(code);
    };
    // What a code without a minimum stands for, in units of its scale.
    auto value_at = [&](int64_t k, int64_t g) {
        const int code = code_at(k);
        if (w.coding == Coding::grid) return w.grid.value(w.bits, w.choice_of(tile, g, r), code);
        if (w.coding == Coding::pairs) return w.grid.value(w.bits, code_at(k ^ 1) == victim(w.bits), code);
        return w.bipolar ? 2.0 * code + 1 - (1 << w.bits) : code - static_cast<double>(1 << (w.bits - 1));
    };
    for (int64_t k = 0; k < w.cols; ++k) {
        const int64_t g = k / w.group;
        float scale, minimum;
        if (w.scales == Scales::q4_k) {
            const int64_t block = tile * (w.padded() / 256) + g / 8;
            scale = half(w.scale + block * 32 + r) * w.sub[(block * 16 + g % 8) * 16 + r];
            minimum = -half(w.scale + block * 32 + 16 + r) * w.sub[(block * 16 + 8 + g % 8) * 16 + r];
        } else if (w.scales == Scales::q6_k) {
            const int64_t block = tile * (w.padded() / 256) + g / 16;
            scale = half(w.scale + block * 16 + r) * static_cast<int8_t>(w.sub[(block * 16 + g % 16) * 16 + r]);
            minimum = -32 * scale;
        } else {
            const int64_t at = (tile * w.groups() + g) * 16 + r;
            scale = w.scales == Scales::stepped  ? half(w.scale + tile * 16 + r) * w.sub[at]
                    : w.scales == Scales::powers ? std::ldexp(1.0f, w.sub[at] - 127)
                                                 : half(w.scale + at);
            if (!w.minimum) {
                out[k] = scale * static_cast<float>(value_at(k, g));
                continue;
            }
            minimum = half(w.minimum + at);
        }
        out[k] = scale * static_cast<float>(code_at(k)) + minimum;
    }
}

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

}  // namespace

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

}  // namespace trimtab
