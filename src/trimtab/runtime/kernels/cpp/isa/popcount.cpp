// Bit-serial products: words of planes, xor, and counts of bits; or the planes unpacked to bytes once for many tokens.
//
// D = sum over columns of v_w v_x, where both are odd. Of two planes of +-1, D_ij = K - 2 popcount(w_i xor x_j), hence
// D = most_w most_x K - 2 sum 2^(i+j) popcount(w_i xor x_j). From bytes, D = 2 sum v_w u_x - most_x sum v_w.
// A tile is 16 sums: rows times tokens. They stay in registers over all pairs of planes, in order of falling i + j, doubled
// where i + j falls by one; the recovery costs nothing that leaves the registers.
#include "popcount.h"

#include <utility>

#include "isa/planes.h"

namespace trimtab::TRIMTAB_ISA {
namespace {

// Blocks [first, last) of the words of a row.
struct Range {
    int64_t first, last, words;
    int64_t whole() const { return least(last, words / block_words); }
    int64_t rest() const { return last > words / block_words ? words % block_words : 0; }  // words of a last, shorter block
};

// Adds popcount(w_i xor x_j) to every sum; part p of a block, or all of them for p < 0. Sum t * R + r is that of row r, token t.
template <int R, int T>
inline void count_pair(const uint32_t* const* w, int n, int i, const uint32_t* const* x, int a, int j, const Range& range, int p,
                       IV (&acc)[tile]) {
    const int begin = p < 0 ? 0 : p, end = p < 0 ? parts_of : p + 1;
    for (int64_t b = range.first; b < range.whole(); ++b)
        for (int part = begin; part < end; ++part) {
            const int64_t at = part * lanes, in_w = (b * n + i) * block_words + at, in_x = (b * a + j) * block_words + at;
            UV xs[T];
            UNROLL for (int t = 0; t < T; ++t) xs[t] = load<UV>(x[t] + in_x);
            UNROLL for (int r = 0; r < R; ++r) {
                const UV ws = load<UV>(w[r] + in_w);
                UNROLL for (int t = 0; t < T; ++t) acc[t * R + r] += popcounts(ws ^ xs[t]);
            }
        }
    const int64_t rest = range.rest(), b = range.words / block_words * block_words;
    if (!rest) return;
    for (int part = begin; part < end; ++part) {
        const int64_t at = part * lanes, some = least(rest - at, lanes), in_w = b * n + i * rest + at, in_x = b * a + j * rest + at;
        UV xs[T];
        UNROLL for (int t = 0; t < T; ++t) xs[t] = load_some(x[t] + in_x, some);
        UNROLL for (int r = 0; r < R; ++r) {
            const UV ws = load_some(w[r] + in_w, some);
            UNROLL for (int t = 0; t < T; ++t) acc[t * R + r] += popcounts(ws ^ xs[t]);
        }
    }
}

// acc = sum of 2^(i+j) popcount(w_i xor x_j), lane by lane.
template <int R, int T>
inline void count_all(const uint32_t* const* w, int n, const uint32_t* const* x, int a, const Range& range, int p, IV (&acc)[tile]) {
    UNROLL for (int k = 0; k < tile; ++k) acc[k] = IV{};
    for (int s = n + a - 2;; --s) {
        for (int i = s < a ? 0 : s - a + 1; i < n && i <= s; ++i) count_pair<R, T>(w, n, i, x, a, s - i, range, p, acc);
        if (s == 0) return;
        UNROLL for (int k = 0; k < tile; ++k) acc[k] += acc[k];
    }
}

// A tile of R rows and T tokens: where its rows and tokens are, and what its integers are multiplied with.
template <int R, int T>
struct Tile {
    const BitMatrix& w;
    const BitInput& x;
    const BitOutput& out;
    int64_t row = 0, rows = 0, token = 0, tokens = 0;  // rows and tokens of it that there are; the last one stands in for others
    const uint32_t *of_rows[R], *of_tokens[T];
    float by_row[R];                                   // one group: its scale
    alignas(64) float scale[tile];                     // of the token
    alignas(64) int32_t base[tile];                    // D = base + factor * sum
    int64_t wide_base[R];
    float* word_scale = nullptr;                       // [R, words], several groups
    float* group_scale = nullptr;                      // [G] of a row, and room for a register
    int32_t of_lane[lanes];                            // group of the word in a lane, counted from the first lane's
    int32_t* valid = nullptr;                          // [words] most_w most_x * columns of a word

    Tile(const BitMatrix& w, const BitInput& x, const BitOutput& out, Scratch& scratch) : w(w), x(x), out(out) {
        if (!grouped()) return;
        const int64_t each = w.group_words(), words = w.row_words();
        word_scale = scratch.take<float>(R * padded()), valid = scratch.take<int32_t>(padded());
        group_scale = scratch.take<float>(w.groups() + 2 * block_words);
        for (int64_t g = 0; g < w.groups() + 2 * block_words; ++g) group_scale[g] = 0;
        for (int64_t k = 0; k < R * padded(); ++k) word_scale[k] = 0;
        for (int64_t k = 0; k < padded(); ++k)
            valid[k] = k < words ? static_cast<int32_t>(w.most() * x.most() * least(word_cols, w.group - k % each * word_cols)) : 0;
        for (int lane = 0; lane < lanes; ++lane) of_lane[lane] = lane / static_cast<int>(each);
    }

    int64_t blocks() const { return (w.row_words() + block_words - 1) / block_words; }
    bool grouped() const { return w.groups() > 1; }
    // Sums and twice them fit 32 bits.
    bool narrow() const { return 2 * w.most() * x.most() * w.cols < int64_t{1} << 31; }

    void at_row(int64_t first, int64_t end) {
        row = first, rows = least(R, end - first);
        const int64_t words = w.row_words(), groups = w.groups();
        for (int r = 0; r < R; ++r) {
            const int64_t n = row + least(r, rows - 1);
            of_rows[r] = w.words + n * words * w.bits;
            by_row[r] = w.scale && !grouped() ? half(w.scale[n]) : 1.0f;
            if (!grouped()) continue;
            spread(w.scale + n * groups, word_scale + r * padded());
        }
    }
    void at_token(int64_t first) {
        token = first, tokens = least(T, x.tokens - first);
        for (int t = 0; t < T; ++t) {
            const int64_t n = token + least(t, tokens - 1);
            of_tokens[t] = x.words + n * w.row_words() * x.bits;
            for (int r = 0; r < R; ++r) scale[t * R + r] = x.scale ? x.scale[n] : 1.0f;
        }
    }
    // The scales of the groups of a row, word by word.
    void spread(const uint16_t* from, float* to) {
        const int64_t each = w.group_words(), groups = w.groups();
        float* plain = group_scale;
        int64_t g = 0;
        for (; g + lanes <= groups; g += lanes) store_f(plain + g, load_halves(from + g));
        for (; g < groups; ++g) plain[g] = half(from[g]);
        if (each > lanes / 2 || lanes % each) {
            for (int64_t k = 0; k < groups * each; ++k) to[k] = plain[k / each];
            return;
        }
        const IV lane = load<IV>(of_lane);
        for (int64_t k = 0, step = lanes / each; k < padded(); k += lanes, plain += step) store_f(to + k, __builtin_shuffle(load<FV>(plain), lane));
    }
    int64_t padded() const { return blocks() * block_words; }
    int64_t store(const float (&values)[tile]) const {
        for (int64_t t = 0; t < tokens; ++t) {
            float* to = out.y + (token + t) * w.rows + row;
            if (rows == R)
                memcpy(to, values + t * R, sizeof(float) * R);
            else
                for (int64_t r = 0; r < rows; ++r) to[r] = values[t * R + r];
        }
        return tokens * rows * 4;
    }
    // From sums over lanes.
    int64_t finish(IV (&acc)[tile], int factor) const {
        sum_lanes(acc);
        alignas(64) float values[tile];
        alignas(64) float rows_by[tile];
        UNROLL for (int k = 0; k < tile; ++k) rows_by[k] = by_row[k % R];
        UNROLL for (int v = 0; v < tile / lanes; ++v) {
            const IV d = load<IV>(base + v * lanes) + acc[v] * factor;
            store_f(values + v * lanes, to_float(d) * load<FV>(rows_by + v * lanes) * load<FV>(scale + v * lanes));
        }
        return store(values);
    }
    int64_t finish(const int64_t (&sums)[tile], int64_t factor) const {
        alignas(64) float values[tile];
        for (int k = 0; k < tile; ++k) {
            const int64_t d = wide_base[k % R] + factor * sums[k];
            values[k] = static_cast<float>(d) * by_row[k % R] * scale[k];
            if (out.sums && k % R < rows && k / R < tokens) out.sums[(token + k / R) * w.rows + row + k % R] = d;
        }
        return out.sums ? tokens * rows * 8 : store(values);
    }
    // From sums of floats over lanes, part by part of a block, and what else belongs to a row.
    int64_t finish(FV (&low)[tile], FV (&high)[tile], const float* more) const {
        sum_lanes(low);
        if constexpr (parts_of == 2) sum_lanes(high);
        alignas(64) float values[tile];
        UNROLL for (int v = 0; v < tile / lanes; ++v)
            store_f(values + v * lanes, parts_of == 2 ? low[v] + high[v] : low[v]);
        for (int k = 0; k < tile; ++k) values[k] = (values[k] + (more ? more[k % R] : 0.0f)) * scale[k];
        return store(values);
    }
};

inline void add_wide(const IV (&acc)[tile], int64_t (&sums)[tile]) {
    for (int k = 0; k < tile; ++k)
        for (int lane = 0; lane < lanes; ++lane) sums[k] += acc[k][lane];
}

template <int R, int T>
int64_t popcount_tile(const Tile<R, T>& at) {
    const BitMatrix& w = at.w;
    const int n = w.bits, a = at.x.bits;
    const int64_t words = w.row_words(), blocks = at.blocks();
    IV acc[tile];
    if (at.out.parts) {
        for (int i = 0; i < n; ++i)
            for (int j = 0; j < a; ++j) {
                UNROLL for (int k = 0; k < tile; ++k) acc[k] = IV{};
                count_pair<R, T>(at.of_rows, n, i, at.of_tokens, a, j, {0, blocks, words}, -1, acc);
                for (int k = 0; k < tile; ++k)
                    if (k % R < at.rows && k / R < at.tokens)
                        at.out.parts[((i * a + j) * at.x.tokens + at.token + k / R) * w.rows + at.row + k % R] =
                            static_cast<int32_t>(w.cols) - 2 * sum_of(acc[k]);
            }
        return at.rows * at.tokens * n * a * 4;
    }
    if (at.grouped()) {
        FV low[tile], high[tile];
        UNROLL for (int k = 0; k < tile; ++k) low[k] = FV{}, high[k] = FV{};
        for (int64_t b = 0; b < blocks; ++b)
            UNROLL for (int p = 0; p < parts_of; ++p) {
                count_all<R, T>(at.of_rows, n, at.of_tokens, a, {b, b + 1, words}, p, acc);
                const int64_t first = b * block_words + p * lanes;
                const IV valid = load<IV>(at.valid + first);
                UNROLL for (int r = 0; r < R; ++r) {
                    const FV by = load<FV>(at.word_scale + r * at.padded() + first);
                    UNROLL for (int t = 0; t < T; ++t) {
                        FV& sum = (p ? high : low)[t * R + r];
                        sum = fused(to_float(valid - acc[t * R + r] * 2), by, sum);
                    }
                }
            }
        return at.finish(low, high, nullptr);
    }
    if (at.narrow() && !at.out.sums) {
        count_all<R, T>(at.of_rows, n, at.of_tokens, a, {0, blocks, words}, -1, acc);
        return at.finish(acc, -2);
    }
    int64_t sums[tile] = {};
    for (int64_t b = 0; b < blocks; b += most_blocks) {
        count_all<R, T>(at.of_rows, n, at.of_tokens, a, {b, least(blocks, b + most_blocks), words}, -1, acc);
        add_wide(acc, sums);
    }
    return at.finish(sums, -2);
}

template <int R, int T>
int64_t popcount_rows(const BitMatrix& w, const BitInput& x, int64_t begin, int64_t end, char* scratch, const BitOutput& out) {
    Scratch own{scratch};
    Tile<R, T> at(w, x, out, own);
    const int64_t base = w.most() * x.most() * w.cols;
    for (int64_t& each : at.wide_base) each = base;
    for (int32_t& each : at.base) each = static_cast<int32_t>(at.narrow() ? base : 0);
    int64_t written = 0;
    for (int64_t row = begin; row < end; row += R) {
        at.at_row(row, end);
        for (int64_t token = 0; token < x.tokens; token += T) at.at_token(token), written += popcount_tile(at);
    }
    return written;
}

int64_t sum_codes(const uint8_t* codes, int64_t words) {
    constexpr int64_t width = lanes / 8;  // words of a register
    IV sum{};
    int64_t k = 0;
    for (; k + width <= words; k += width) sum += fold(pairs(load<BV>(codes + k * word_cols), CV{} + 1));
    if (k < words) {
        BV some{};
        memcpy(&some, codes + k * word_cols, word_cols);
        sum += fold(pairs(some, CV{} + 1));
    }
    return sum_of(sum);
}

// Adds registers [first, last) of the bytes of R rows times those of T tokens. EIGHT: the bytes are (value - 1) / 2.
template <int R, int T, bool EIGHT>
inline __attribute__((always_inline)) void add_bytes(const int8_t* rows, const uint8_t* const* tokens, int64_t padded, int64_t first,
                                                     int64_t last, bool narrow, IV (&acc)[tile]) {
    for (int64_t v = first; v < last; ++v) {
        BV us[T];
        UNROLL for (int t = 0; t < T; ++t) us[t] = load<BV>(tokens[t] + v * 4 * lanes);
        UNROLL for (int r = 0; r < R; ++r) {
            const CV ws = load<CV>(rows + r * padded + v * 4 * lanes);
            UNROLL for (int t = 0; t < T; ++t) {
                acc[t * R + r] = dot(acc[t * R + r], us[t], ws, narrow);
                if constexpr (EIGHT) acc[t * R + r] = dot(dot(acc[t * R + r], us[t], ws, narrow), us[t], CV{} + 1, narrow);
            }
        }
    }
}

// Rows of a tile as signed bytes: the values, or for 8 bits, whose values do not fit, (value - 1) / 2.
template <int R, int T>
struct Bytes {
    Tile<R, T> at;
    int64_t padded;
    uint8_t* codes;  // of one row
    int8_t* rows;
    float more[R];  // several groups: what is left over of the product

    Bytes(const BitMatrix& w, const BitInput& x, const BitOutput& out, Scratch& scratch)
        : at(w, x, out, scratch), padded(x.padded), codes(scratch.take<uint8_t>(padded)), rows(scratch.take<int8_t>(R * padded)) {
        for (int64_t c = 0; c < padded; ++c) codes[c] = 0;
    }

    void take(int64_t first, int64_t end) {
        at.at_row(first, end);
        const BitMatrix& w = at.w;
        const int64_t most = w.most(), each = w.group_words(), groups = w.groups();
        const auto less = static_cast<uint8_t>(w.bits == 8 ? 128 : most);
        for (int r = 0; r < R; ++r) {
            unpack(at.of_rows[r], w.row_words(), w.bits, codes);
            const int64_t n = at.row + least(r, at.rows - 1);
            int64_t sum = 0;
            more[r] = 0;
            for (int64_t g = 0; g < groups; ++g) {
                const int64_t part = 2 * sum_codes(codes + g * each * word_cols, each) - most * w.group;  // of the values
                sum += part;
                if (at.grouped()) more[r] -= static_cast<float>(at.x.most() * part) * half(w.scale[n * groups + g]);
            }
            for (int64_t c = 0; c < padded; c += 4 * lanes) {
                const BV u = load<BV>(codes + c), value = (w.bits == 8 ? u : u + u) - less;
                memcpy(rows + r * padded + c, &value, sizeof value);
            }
            at.wide_base[r] = -at.x.most() * sum;
            for (int t = 0; t < T; ++t) at.base[t * R + r] = static_cast<int32_t>(at.narrow() ? at.wide_base[r] : 0);
        }
    }

    template <bool EIGHT>
    int64_t product() const {
        const BitMatrix& w = at.w;
        const int64_t registers = padded / (4 * lanes);
        const bool narrow = 2 * at.x.most() * (EIGHT ? 128 : w.most()) <= 32767;
        const uint8_t* tokens[T];
        for (int t = 0; t < T; ++t) tokens[t] = at.x.codes + (at.token + least(t, at.tokens - 1)) * padded;
        IV acc[tile];
        if (at.grouped()) {
            constexpr int64_t width = lanes / 8;  // words of a register
            const int64_t each = w.group_words(), step = each % width ? 1 : each / width;
            FV low[tile], high[tile];
            UNROLL for (int k = 0; k < tile; ++k) low[k] = FV{}, high[k] = FV{};
            for (int64_t v = 0; v * width < w.row_words(); v += step) {
                UNROLL for (int k = 0; k < tile; ++k) acc[k] = IV{};
                add_bytes<R, T, EIGHT>(rows, tokens, padded, v, v + step, narrow, acc);
                UNROLL for (int r = 0; r < R; ++r) {
                    const float* words = at.word_scale + r * at.padded() + v * width;
                    FV by = splat_f(2 * words[0]);
                    if constexpr (width == 2)
                        if (each % width)
                            for (int lane = 8; lane < 16; ++lane) by[lane] = 2 * words[1];
                    UNROLL for (int t = 0; t < T; ++t) low[t * R + r] = fused(to_float(acc[t * R + r]), by, low[t * R + r]);
                }
            }
            return at.finish(low, high, more);
        }
        if (at.narrow() && !at.out.sums) {
            UNROLL for (int k = 0; k < tile; ++k) acc[k] = IV{};
            add_bytes<R, T, EIGHT>(rows, tokens, padded, 0, registers, narrow, acc);
            return at.finish(acc, 2);
        }
        int64_t sums[tile] = {};
        for (int64_t v = 0; v < registers; v += most_blocks) {
            UNROLL for (int k = 0; k < tile; ++k) acc[k] = IV{};
            add_bytes<R, T, EIGHT>(rows, tokens, padded, v, least(registers, v + most_blocks), narrow, acc);
            add_wide(acc, sums);
        }
        return at.finish(sums, 2);
    }
};

// Several tiles of rows: what is read of the tokens is read once for all of them.
template <int R, int T, size_t... I>
int64_t bytes_rows(const BitMatrix& w, const BitInput& x, int64_t begin, int64_t end, char* scratch, const BitOutput& out, std::index_sequence<I...>) {
    Scratch own{scratch};
    Bytes<R, T> tiles[] = {((void)I, Bytes<R, T>(w, x, out, own))...};
    int64_t written = 0;
    for (int64_t row = begin; row < end; row += tile) {
        const int used = static_cast<int>((least(tile, end - row) + R - 1) / R);
        for (int i = 0; i < used; ++i) tiles[i].take(row + i * R, end);
        for (int64_t token = 0; token < x.tokens; token += T)
            for (int i = 0; i < used; ++i) {
                tiles[i].at.at_token(token);
                written += w.bits == 8 ? tiles[i].template product<true>() : tiles[i].template product<false>();
            }
    }
    return written;
}

int64_t popcount(const BitMatrix& w, const BitInput& x, int64_t begin, int64_t end, char* scratch, const BitOutput& out) {
    const auto product = x.tokens == 1 ? popcount_rows<16, 1> : x.tokens == 2 ? popcount_rows<8, 2> : popcount_rows<4, 4>;
    return product(w, x, begin, end, scratch, out);
}

int64_t bytes(const BitMatrix& w, const BitInput& x, int64_t begin, int64_t end, char* scratch, const BitOutput& out) {
    if (x.tokens == 1) return bytes_rows<16, 1>(w, x, begin, end, scratch, out, std::make_index_sequence<1>());
    if (x.tokens == 2) return bytes_rows<8, 2>(w, x, begin, end, scratch, out, std::make_index_sequence<2>());
    return bytes_rows<4, 4>(w, x, begin, end, scratch, out, std::make_index_sequence<4>());
}

float largest_magnitude(const float* x, int64_t count) {
    FV most{};
    IV broken{};
    int64_t c = 0;
    for (; c + lanes <= count; c += lanes) {
        const FV v = load<FV>(x + c);
        broken |= v != v;
        most = max_of(as<FV>(as<UV>(v) & 0x7fffffffu), most);
    }
    float found = largest(most);
    bool any = sum_of(broken) != 0;
    for (; c < count; ++c) {
        any |= x[c] != x[c];
        const float magnitude = x[c] < 0 ? -x[c] : x[c];
        found = magnitude > found ? magnitude : found;
    }
    return any ? __builtin_nanf("") : found;
}

void code(const float* x, int64_t count, float inverse, int most, uint8_t* codes) {
    typedef uint8_t Narrow __attribute__((vector_size(lanes)));
    const float middle = 0.5f * static_cast<float>(most), top = static_cast<float>(most), magic = 12582912.0f;  // 1.5 * 2^23
    int64_t c = 0;
    for (; c + lanes <= count; c += lanes) {
        FV v = max_of(load<FV>(x + c) * inverse + middle, FV{});  // NaN becomes 0
        v = v < top ? v : splat_f(top);
        const Narrow to = __builtin_convertvector(as<IV>(v + magic) & 255, Narrow);  // the low bits of the sum are the integer
        memcpy(codes + c, &to, sizeof to);
    }
    for (; c < count; ++c) {
        float v = x[c] * inverse + middle;
        v = v > 0 ? v : 0.0f;
        v = (v < top ? v : top) + magic;
        codes[c] = static_cast<uint8_t>(static_cast<int>(v - magic));
    }
}

void halves(const uint16_t* from, int64_t count, float* to) {
    for (int64_t i = 0; i < count; ++i) to[i] = half(from[i]);
}

}  // namespace

extern const BitKernels bit_table;
const BitKernels bit_table = {largest_magnitude, code, pack, unpack, halves, popcount, bytes};

}  // namespace trimtab::TRIMTAB_ISA
