// What the instruction-set specific files offer, and the shapes they work on. Legend: T tokens, K inputs, N outputs,
// F neurons of a gated FFN, D hidden size, G groups of a row.
#pragma once
#include <cstdint>
#include <string>

namespace trimtab {

enum class Kind : int { f32, bf16, ints };

// Rows of a matrix in their stored form.
//
// ints: codes of `bits` bits (2..8), packed little-endian along the row, each row starting at a byte;
// w = scale * (code - 2^(bits-1)), or scale * code + minimum. scale and minimum are IEEE halves [rows, groups].
struct Matrix {
    Kind kind = Kind::f32;
    const void* data = nullptr;
    const uint16_t* scale = nullptr;
    const uint16_t* minimum = nullptr;
    int64_t rows = 0, cols = 0, group = 0;
    int bits = 0;

    int64_t groups() const { return kind == Kind::ints ? cols / group : 0; }
    int64_t row_bytes() const {
        return kind == Kind::f32 ? cols * 4 : kind == Kind::bf16 ? cols * 2 : (cols * bits + 7) / 8;
    }
    // Bytes that one visit of columns [first, last) of a row reads; a group belongs to the range it starts in, so the
    // parts of a row sum to the row. `first` is a multiple of 8, which is a whole byte for every width.
    int64_t visit_bytes(int64_t first, int64_t last) const {
        if (kind != Kind::ints) return (last - first) * (kind == Kind::f32 ? 4 : 2);
        const int64_t started = (last + group - 1) / group - (first + group - 1) / group;
        return (last * bits + 7) / 8 - first * bits / 8 + started * (minimum ? 4 : 2);
    }
};

enum class Block : int { q4_0, q4_1, q5_0, q5_1, q8_0, q4_k, q5_k, q6_k };

struct BlockShape {
    int64_t elements, bytes;
};
constexpr BlockShape block_shapes[] = {{32, 18}, {32, 20}, {32, 22}, {32, 24}, {32, 34}, {256, 144}, {256, 176}, {256, 210}};

struct Kernels {
    const char* isa;

    // `count` ggml blocks to floats, rounded as ggml and the gguf package round them.
    void (*dequantize)(Block kind, const uint8_t* blocks, int64_t count, float* out);

    // Sums of x [tokens, cols] over each group: out [tokens, cols / group].
    void (*group_sums)(const float* x, int64_t tokens, int64_t cols, int64_t group, float* out);

    // y[t * y_stride + j] = x[t] . W[r(j)] for j in [begin, end), r(j) = index ? index[j] : j. x is [tokens, cols];
    // sums come from group_sums (ints only). Returns the bytes of W visited.
    int64_t (*dot_rows)(const Matrix& w, const float* x, const float* sums, int64_t tokens, const int64_t* index,
                        int64_t begin, int64_t end, float* y, int64_t y_stride);

    // y[t * y_stride + c] += sum over j < count of h[t * h_stride + j] * W[r(j), c] for c in [first, last), j in order.
    // Pairs (t, j) with flags[t * h_stride + j] == 0 are left out. `first` is a multiple of 8. Returns bytes visited.
    int64_t (*add_rows)(const Matrix& w, const float* h, const uint8_t* flags, int64_t h_stride, int64_t tokens,
                        const int64_t* index, int64_t count, int64_t first, int64_t last, float* y, int64_t y_stride);
};

const Kernels& kernels();              // of the instruction set in use
bool use_isa(const char* name);        // false: not compiled in, or this processor lacks it
int available_isas(const char** out);  // names, best last; returns how many (at most 4)
std::string missing_flags(const char* name);  // of this processor for an instruction set; "?": that one was not compiled in

int64_t int_gemv(const Matrix& w, const float* x, int64_t tokens, int threads, float* y);
int64_t int_gemv_t(const Matrix& w_t, const float* x, int64_t tokens, int threads, float* y);

enum class Act : int { silu, gelu_tanh, gelu, relu, none };

struct GateFirst {
    int64_t rows_touched = 0, gate_bytes = 0, up_bytes = 0, down_bytes = 0;
};

// y [T, D] = (act(x gate^T) kept where |.| > threshold, times x up^T) down_t; active [T] counts the kept neurons.
GateFirst gate_first(const Matrix& gate, const Matrix& up, const Matrix& down_t, const float* x, int64_t tokens,
                     float threshold, Act act, int threads, float* y, int64_t* active);

}  // namespace trimtab
