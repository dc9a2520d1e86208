// Products with binary-coded weights over threads.
#include "binary.h"

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "native/native.h"
#include "workers.h"

namespace trimtab {

void binary_multiply(const Binary& w, const float* x, int64_t tokens, int threads, float* y) {
    const BinaryKernels& k = binary_kernels();
    const bool look = w.scale_cols == chunk_cols && tokens <= lookup_tokens;
    std::vector<float> tables(look ? static_cast<size_t>(tokens * w.chunks() * chunk_sums) : 0);
    for (int64_t t = 0; look && t < tokens; ++t) k.tabulate(x + t * w.cols, w.cols, tables.data() + t * w.chunks() * chunk_sums);
    parallel_ranges(w.rows, tile_rows, threads, [&](int64_t begin, int64_t end) {
        const int64_t first = begin / tile_rows, last = (end + tile_rows - 1) / tile_rows;
        const auto put = [&](int64_t tile, int64_t t, const float* from) {
            std::copy_n(from, std::min<int64_t>(tile_rows, w.rows - tile * tile_rows), y + t * w.rows + tile * tile_rows);
        };
        if (look) {
            std::vector<float> sums(static_cast<size_t>((last - first) * tokens * tile_rows));
            const auto of = [&](int64_t tile, int64_t t) { return sums.data() + ((tile - first) * tokens + t) * tile_rows; };
            for (int64_t c = 0; c < w.chunks(); c += chunk_block)
                for (int64_t t = 0; t < tokens; ++t)
                    for (int64_t tile = first; tile < last; ++tile)
                        k.dot(w, tile, c, std::min(c + chunk_block, w.chunks()), tables.data() + t * w.chunks() * chunk_sums, of(tile, t));
            for (int64_t tile = first; tile < last; ++tile)
                for (int64_t t = 0; t < tokens; ++t) put(tile, t, of(tile, t));
            return;
        }
        std::vector<float> room(static_cast<size_t>(w.cols * tile_rows));
        float out[lookup_tokens * tile_rows];
        for (int64_t tile = first; tile < last; ++tile) {
            k.decode(w, tile, room.data());
            Tiles decoded;
            decoded.data = reinterpret_cast<const uint8_t*>(room.data()), decoded.rows = tile_rows, decoded.cols = w.cols;
            Input in = Input::of(decoded);
            in.x = const_cast<float*>(x), in.stride = w.cols;
            for (int64_t t0 = 0; t0 < tokens; t0 += lookup_tokens) {
                const int64_t here = std::min(lookup_tokens, tokens - t0);
                tile_kernels().dot_tile(decoded, 0, in, t0, here, out);
                for (int64_t t = 0; t < here; ++t) put(tile, t0 + t, out + t * tile_rows);
            }
        }
    });
}

}  // namespace trimtab
