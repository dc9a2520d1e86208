// Whole products of planes of bits over threads, the coding of their input, and the Python bindings of both.
#include "popcount.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <new>
#include <vector>

#include "kernels.h"
#include "workers.h"

namespace nb = nanobind;

namespace trimtab {

namespace baseline {
extern const BitKernels bit_table;
}
#ifdef TRIMTAB_HAS_AVX2
namespace avx2 {
extern const BitKernels bit_table;
}
#endif
#ifdef TRIMTAB_HAS_AVX512
namespace avx512 {
extern const BitKernels bit_table;
}
namespace avx512_popcnt {  // the same file once more: counting bits is an instruction that not all of AVX-512 has
extern const BitKernels bit_table;
}
#endif

const BitKernels& bit_kernels() {
    [[maybe_unused]] const char* isa = kernels().isa;
#ifdef TRIMTAB_HAS_AVX512
    static const bool counts = (__builtin_cpu_init(), __builtin_cpu_supports("avx512vpopcntdq"));
    if (std::strcmp(isa, "avx512") == 0) return counts ? avx512_popcnt::bit_table : avx512::bit_table;
#endif
#ifdef TRIMTAB_HAS_AVX2
    if (std::strcmp(isa, "avx2") == 0) return avx2::bit_table;
#endif
    return baseline::bit_table;
}

namespace {

template <class T, int N>
using Array = nb::ndarray<T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;

// Waking a worker takes about as long as working on this many pairs of words.
constexpr int64_t words_per_worker = 1 << 17;

int useful_workers(int64_t words, int threads) {
    return static_cast<int>(std::clamp<int64_t>(words / words_per_worker, 1, std::max(threads, 1)));
}

// Memory that begins with a cache line, all zero.
class Lines {
  public:
    explicit Lines(int64_t bytes) : data_(static_cast<char*>(::operator new(static_cast<size_t>(bytes), std::align_val_t(64)))) {
        std::memset(data_, 0, static_cast<size_t>(bytes));
    }
    ~Lines() { ::operator delete(data_, std::align_val_t(64)); }
    Lines(const Lines&) = delete;
    Lines& operator=(const Lines&) = delete;
    template <class P = char>
    P* as() const { return reinterpret_cast<P*>(data_); }

  private:
    char* data_;
};

// A row of bytes: whole registers.
int64_t padded_cols(const BitMatrix& w) { return (w.row_words() + 1) / 2 * 2 * word_cols; }

// Tokens as planes of bits, and where bytes are multiplied, as bytes.
struct Coded {
    BitInput input;
    int64_t each, padded;  // words, columns of a row
    Lines words, codes;
    std::vector<float> scale;

    // The shape of W says how its columns are laid out. `clipped` of the elements of a token are beyond its largest value.
    Coded(const BitMatrix& w, const float* x, int64_t tokens, int bits, double clipped, int threads)
        : each(w.row_words() * bits), padded(padded_cols(w)), words(4 * tokens * each), codes(tokens * padded), scale(static_cast<size_t>(tokens)) {
        const BitKernels& k = bit_kernels();
        const int64_t group = w.group_words() * word_cols;
        const int most = (1 << bits) - 1;
        parallel_ranges(tokens, 1, useful_workers(tokens * w.cols / 4, threads), [&](int64_t begin, int64_t end) {
            std::vector<float> sorted;
            for (int64_t t = begin; t < end; ++t) {
                const float* from = x + t * w.cols;
                float largest = k.largest(from, w.cols);
                if (const auto beyond = static_cast<int64_t>(clipped * static_cast<double>(w.cols)); beyond > 0 && std::isfinite(largest)) {
                    sorted.resize(static_cast<size_t>(w.cols));
                    for (int64_t c = 0; c < w.cols; ++c) sorted[static_cast<size_t>(c)] = std::fabs(from[c]);
                    std::nth_element(sorted.begin(), sorted.end() - 1 - beyond, sorted.end());
                    largest = sorted[static_cast<size_t>(w.cols - 1 - beyond)];
                }
                const float s = largest / static_cast<float>(most), inverse = s > 0 ? 0.5f / s : 0.0f;
                uint8_t* to = codes.as<uint8_t>() + t * padded;
                if (w.group == group || w.groups() == 1)
                    k.code(from, w.cols, inverse, most, to);
                else
                    for (int64_t g = 0; g < w.groups(); ++g) k.code(from + g * w.group, w.group, inverse, most, to + g * group);
                k.pack(to, w.row_words(), bits, words.as<uint32_t>() + t * each);
                scale[static_cast<size_t>(t)] = s;
            }
        });
        input.tokens = tokens, input.bits = bits, input.words = words.as<uint32_t>(), input.codes = codes.as<uint8_t>(), input.padded = padded, input.scale = scale.data();
    }
};

BitMatrix bit_matrix(Array<const uint8_t, 2> planes, const std::optional<Array<const uint16_t, 2>>& scale, int bits, int64_t cols, int64_t group) {
    BitMatrix w;
    w.words = reinterpret_cast<const uint32_t*>(planes.data()), w.scale = scale ? scale->data() : nullptr;
    w.rows = static_cast<int64_t>(planes.shape(0)), w.cols = cols, w.group = group, w.bits = bits;
    return w;
}

float scale_of(const BitMatrix& w, int64_t row) {
    float v = 1;
    if (w.scale) bit_kernels().halves(w.scale + row, 1, &v);
    return v;
}

int64_t over_rows(const BitMatrix& w, const BitInput& x, bool bytes, int threads, const BitOutput& out) {
    const auto product = bytes ? bit_kernels().bytes : bit_kernels().popcount;
    std::atomic<int64_t> written{0};
    const int64_t words = w.rows * w.row_words() * x.tokens * (bytes ? 8 : w.bits * x.bits);
    parallel_ranges(w.rows, 16, useful_workers(words, threads), [&](int64_t begin, int64_t end) {
        const Lines scratch(scratch_bytes(w, x));
        written += product(w, x, begin, end, scratch.as(), out);
    });
    return written;
}

// y [T, N] = x [T, K] @ W.T with x coded on the way. Returns the bytes written by the product, and by what is done after it.
std::pair<int64_t, int64_t> multiply(Array<const uint8_t, 2> planes, std::optional<Array<const uint16_t, 2>> scale, int bits, int64_t cols,
                                     int64_t group, Array<const float, 2> x, int act_bits, double clipped, bool bytes, bool fused, int threads,
                                     Array<float, 2> y) {
    const BitMatrix w = bit_matrix(planes, scale, bits, cols, group);
    nb::gil_scoped_release release;
    const int64_t tokens = static_cast<int64_t>(x.shape(0));
    const Coded coded(w, x.data(), tokens, act_bits, clipped, threads);
    BitOutput out;
    if (fused) return out.y = y.data(), std::pair{over_rows(w, coded.input, bytes, threads, out), int64_t{0}};
    const int64_t all = tokens * w.rows;
    std::vector<int32_t> parts(static_cast<size_t>(bits * act_bits * all));
    out.parts = parts.data();
    const int64_t written = over_rows(w, coded.input, false, threads, out);
    parallel_ranges(tokens, 1, useful_workers(bits * act_bits * all, threads), [&](int64_t begin, int64_t end) {
        for (int64_t at = begin * w.rows; at < end * w.rows; ++at) {
            int64_t sum = 0;
            for (int i = 0; i < bits; ++i)
                for (int j = 0; j < act_bits; ++j) sum += static_cast<int64_t>(parts[static_cast<size_t>((i * act_bits + j) * all + at)]) * (1 << (i + j));
            y.data()[at] = static_cast<float>(sum) * scale_of(w, at % w.rows) * coded.scale[static_cast<size_t>(at / w.rows)];
        }
    });
    return {written, all * 4};
}

// out [T, N] = the integers of two matrices of planes.
int64_t integers(Array<const uint8_t, 2> planes, int bits, Array<const uint8_t, 2> x, int act_bits, int64_t cols, bool bytes, int threads,
                 Array<int64_t, 2> out) {
    const BitMatrix w = bit_matrix(planes, std::nullopt, bits, cols, cols);
    nb::gil_scoped_release release;
    BitInput input;
    input.tokens = static_cast<int64_t>(x.shape(0)), input.bits = act_bits, input.words = reinterpret_cast<const uint32_t*>(x.data());
    input.padded = padded_cols(w);
    const Lines codes(input.tokens * input.padded);
    for (int64_t t = 0; bytes && t < input.tokens; ++t)
        bit_kernels().unpack(input.words + t * w.row_words() * act_bits, w.row_words(), act_bits, codes.as<uint8_t>() + t * input.padded);
    input.codes = codes.as<uint8_t>();
    BitOutput to;
    to.sums = out.data();
    return over_rows(w, input, bytes, threads, to);
}

void pack(Array<const uint8_t, 2> codes, int bits, int64_t group, Array<uint8_t, 2> out) {
    nb::gil_scoped_release release;
    BitMatrix w;
    w.rows = static_cast<int64_t>(codes.shape(0)), w.cols = static_cast<int64_t>(codes.shape(1)), w.group = group, w.bits = bits;
    const int64_t each = w.group_words() * word_cols;
    std::vector<uint8_t> row(static_cast<size_t>(w.row_words() * word_cols));
    for (int64_t n = 0; n < w.rows; ++n) {
        for (int64_t g = 0; g < w.groups(); ++g) std::memcpy(row.data() + g * each, codes.data() + n * w.cols + g * group, static_cast<size_t>(group));
        bit_kernels().pack(row.data(), w.row_words(), bits, reinterpret_cast<uint32_t*>(out.data()) + n * w.row_words() * bits);
    }
}

void unpack(Array<const uint8_t, 2> planes, int bits, int64_t group, Array<uint8_t, 2> out) {
    nb::gil_scoped_release release;
    BitMatrix w;
    w.rows = static_cast<int64_t>(out.shape(0)), w.cols = static_cast<int64_t>(out.shape(1)), w.group = group, w.bits = bits;
    const int64_t each = w.group_words() * word_cols;
    std::vector<uint8_t> row(static_cast<size_t>(w.row_words() * word_cols));
    for (int64_t n = 0; n < w.rows; ++n) {
        bit_kernels().unpack(reinterpret_cast<const uint32_t*>(planes.data()) + n * w.row_words() * bits, w.row_words(), bits, row.data());
        for (int64_t g = 0; g < w.groups(); ++g) std::memcpy(out.data() + n * w.cols + g * group, row.data() + g * each, static_cast<size_t>(group));
    }
}

// Codes [T, K] and scales [T] that a product gives to its input.
void code(Array<const float, 2> x, int bits, double clipped, Array<uint8_t, 2> codes, Array<float, 1> scale) {
    nb::gil_scoped_release release;
    BitMatrix shape;
    shape.cols = shape.group = static_cast<int64_t>(x.shape(1));
    const Coded coded(shape, x.data(), static_cast<int64_t>(x.shape(0)), bits, clipped, 1);
    for (int64_t t = 0; t < coded.input.tokens; ++t) {
        std::memcpy(codes.data() + t * shape.cols, coded.input.codes + t * coded.padded, static_cast<size_t>(shape.cols));
        scale.data()[t] = coded.scale[static_cast<size_t>(t)];
    }
}

}  // namespace

void bind_bits(nb::module_& m) {
    m.def("pack_bits", &pack, nb::arg("codes"), nb::arg("bits"), nb::arg("group"), nb::arg("out").noconvert());
    m.def("unpack_bits", &unpack, nb::arg("planes"), nb::arg("bits"), nb::arg("group"), nb::arg("out").noconvert());
    m.def("code_bits", &code, nb::arg("x"), nb::arg("bits"), nb::arg("clipped"), nb::arg("codes").noconvert(), nb::arg("scale").noconvert());
    m.def("bit_integers", &integers, nb::arg("planes"), nb::arg("bits"), nb::arg("x"), nb::arg("act_bits"), nb::arg("cols"), nb::arg("bytes"),
          nb::arg("threads"), nb::arg("out").noconvert());
    m.def("bit_multiply", &multiply, nb::arg("planes"), nb::arg("scale").none(), nb::arg("bits"), nb::arg("cols"), nb::arg("group"), nb::arg("x"),
          nb::arg("act_bits"), nb::arg("clipped"), nb::arg("bytes"), nb::arg("fused"), nb::arg("threads"), nb::arg("y").noconvert());
}

}  // namespace trimtab
