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
        std::vector<float> room(look ? 0 : static_cast<size_t>(w.cols * tile_rows));
        float out[lookup_tokens * tile_rows];
        for (int64_t tile = begin / tile_rows; tile * tile_rows < end; ++tile) {
            const int64_t n0 = tile * tile_rows, count = std::min<int64_t>(tile_rows, w.rows - n0);
            Tiles decoded;
            if (!look) {
                k.decode(w, tile, room.data());
                decoded.data = reinterpret_cast<const uint8_t*>(room.data()), decoded.rows = tile_rows, decoded.cols = w.cols;
            }
            for (int64_t t0 = 0; t0 < tokens; t0 += lookup_tokens) {
                const int64_t here = std::min(lookup_tokens, tokens - t0);
                if (look) {
                    for (int64_t t = 0; t < here; ++t) k.dot(w, tile, tables.data() + (t0 + t) * w.chunks() * chunk_sums, out + t * tile_rows);
                } else {
                    Input in = Input::of(decoded);
                    in.x = const_cast<float*>(x), in.stride = w.cols;
                    tile_kernels().dot_tile(decoded, 0, in, t0, here, out);
                }
                for (int64_t t = 0; t < here; ++t) std::copy_n(out + t * tile_rows, count, y + (t0 + t) * w.rows + n0);
            }
        }
    });
}

}  // namespace trimtab
