// Python bindings. Shapes are checked by the caller, trimtab/runtime/kernels/__init__.py; the GIL is released.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "kernels.h"
#include "lmul.h"
#include "rows.h"
#include "workers.h"

namespace nb = nanobind;
using namespace trimtab;

namespace {

template <class T, int N>
using Array = nb::ndarray<T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;

template <class T>
BoundRows floats(Kind kind, Array<const T, 2> data) {
    BoundRows rows;
    rows.matrix.kind = kind;
    rows.matrix.data = data.data();
    rows.matrix.rows = static_cast<int64_t>(data.shape(0)), rows.matrix.cols = static_cast<int64_t>(data.shape(1));
    rows.keep.push_back(nb::cast(data));
    return rows;
}

BoundRows ints(Array<const uint8_t, 2> codes, Array<const uint16_t, 2> scale, std::optional<Array<const uint16_t, 2>> minimum,
          int bits, int64_t group) {
    BoundRows rows;
    Matrix& m = rows.matrix;
    m.kind = Kind::ints, m.data = codes.data(), m.scale = scale.data();
    m.rows = static_cast<int64_t>(codes.shape(0)), m.cols = static_cast<int64_t>(scale.shape(1)) * group;
    m.bits = bits, m.group = group;
    rows.keep = {nb::cast(codes), nb::cast(scale)};
    if (minimum) m.minimum = minimum->data(), rows.keep.push_back(nb::cast(*minimum));
    return rows;
}

void dequantize(int kind, Array<const uint8_t, 1> blocks, Array<float, 1> out, int threads) {
    const BlockShape shape = block_shapes[kind];
    const int64_t count = static_cast<int64_t>(blocks.shape(0)) / shape.bytes;
    const uint8_t* from = blocks.data();
    float* to = out.data();
    nb::gil_scoped_release release;
    parallel_ranges(count, 256, threads, [&](int64_t begin, int64_t end) {
        kernels().dequantize(static_cast<Block>(kind), from + begin * shape.bytes, end - begin,
                             to + begin * shape.elements);
    });
}

// Little-endian bit packing along each row; one 64-bit window moves over the row.
void pack(Array<const uint8_t, 2> codes, int bits, Array<uint8_t, 2> out) {
    const size_t rows = codes.shape(0), cols = codes.shape(1), bytes = out.shape(1);
    const uint8_t* from = codes.data();
    uint8_t* to = out.data();
    nb::gil_scoped_release release;
    const uint32_t mask = (1u << bits) - 1;
    for (size_t r = 0; r < rows; ++r) {
        uint32_t window = 0;
        int held = 0;
        uint8_t* at = to + r * bytes;
        for (size_t c = 0; c < cols; ++c) {
            window |= (from[r * cols + c] & mask) << held;
            for (held += bits; held >= 8; held -= 8, window >>= 8) *at++ = static_cast<uint8_t>(window);
        }
        if (held > 0) *at = static_cast<uint8_t>(window);
    }
}

void unpack(Array<const uint8_t, 2> packed, int bits, Array<uint8_t, 2> out) {
    const size_t rows = out.shape(0), cols = out.shape(1), bytes = packed.shape(1);
    const uint8_t* from = packed.data();
    uint8_t* to = out.data();
    nb::gil_scoped_release release;
    const uint32_t mask = (1u << bits) - 1;
    for (size_t r = 0; r < rows; ++r) {
        uint32_t window = 0;
        int held = 0;
        const uint8_t* at = from + r * bytes;
        for (size_t c = 0; c < cols; ++c) {
            if (held < bits) window |= static_cast<uint32_t>(*at++) << held, held += 8;
            to[r * cols + c] = static_cast<uint8_t>(window & mask);
            window >>= bits, held -= bits;
        }
    }
}

template <int64_t (*OP)(const Matrix&, const float*, int64_t, int, float*)>
int64_t gemv(const BoundRows& w, Array<const float, 2> x, int threads, Array<float, 2> y) {
    nb::gil_scoped_release release;
    return OP(w.matrix, x.data(), static_cast<int64_t>(x.shape(0)), threads, y.data());
}

std::tuple<int64_t, int64_t, int64_t, int64_t> bound_gate_first(const BoundRows& gate, const BoundRows& up, const BoundRows& down_t,
                                                                Array<const float, 2> x, float threshold, int act,
                                                                int threads, Array<float, 2> y,
                                                                Array<int64_t, 1> active) {
    nb::gil_scoped_release release;
    const GateFirst done =
        gate_first(gate.matrix, up.matrix, down_t.matrix, x.data(), static_cast<int64_t>(x.shape(0)), threshold,
                   static_cast<Act>(act), threads, y.data(), active.data());
    return {done.rows_touched, done.gate_bytes, done.up_bytes, done.down_bytes};
}

// (multiply, mantissa, nearest, offset, low, high, sum, sum_bits), as `AddRule` names them.
using RuleTuple = std::tuple<int, int, bool, int32_t, int32_t, int32_t, int, int>;

AddRule add_rule(const RuleTuple& from) {
    const auto& [multiply, mantissa, nearest, offset, low, high, sum, sum_bits] = from;
    return {static_cast<Multiply>(multiply), mantissa, nearest, offset, low, high, static_cast<Sum>(sum), sum_bits};
}

void lmul(const RuleTuple& rule, Array<const float, 1> a, Array<const float, 1> b, int threads, Array<float, 1> y) {
    const AddRule made = add_rule(rule);
    nb::gil_scoped_release release;
    parallel_ranges(static_cast<int64_t>(a.shape(0)), 1 << 14, threads, [&](int64_t begin, int64_t end) {
        lmul_kernels().multiply(made, a.data() + begin, b.data() + begin, end - begin, y.data() + begin);
    });
}

void lmul_matmul(const RuleTuple& rule, Array<const float, 2> x, Array<const float, 2> w, bool transposed, int threads,
                 Array<float, 2> y) {
    const AddRule made = add_rule(rule);
    const auto tokens = static_cast<int64_t>(x.shape(0)), terms = static_cast<int64_t>(x.shape(1));
    const auto outputs = static_cast<int64_t>(y.shape(1));
    const int64_t w_row = transposed ? 1 : terms, w_col = transposed ? outputs : 1;
    nb::gil_scoped_release release;
    parallel_ranges(outputs, lmul_outputs, threads, [&](int64_t first, int64_t last) {
        const LmulKernels& k = lmul_kernels();
        std::vector<int32_t> scratch(static_cast<size_t>(k.scratch(tokens, terms)));
        k.matmul(made, x.data(), tokens, terms, w.data(), w_row, w_col, first, last, scratch.data(), y.data(), outputs);
    });
}

void lmul_round(const RuleTuple& rule, Array<const float, 1> x, Array<float, 1> y) {
    nb::gil_scoped_release release;
    lmul_kernels().round(add_rule(rule), x.data(), static_cast<int64_t>(x.shape(0)), y.data());
}

}  // namespace

namespace trimtab {
void bind_native(nb::module_& m);  // native/bind.cpp
void bind_bits(nb::module_& m);    // popcount.cpp
}

NB_MODULE(_core, m) {
    trimtab::bind_native(m);
    trimtab::bind_bits(m);
    nb::class_<BoundRows>(m, "Rows");
    m.def("f32_rows", [](Array<const float, 2> data) { return floats<float>(Kind::f32, data); });
    m.def("bf16_rows", [](Array<const uint16_t, 2> data) { return floats<uint16_t>(Kind::bf16, data); });
    m.def("int_rows", &ints, nb::arg("codes"), nb::arg("scale"), nb::arg("minimum").none(), nb::arg("bits"),
          nb::arg("group"));
    m.def("dequantize", &dequantize);
    m.def("pack", &pack);
    m.def("unpack", &unpack);
    m.def("int_gemv", &gemv<int_gemv>);
    m.def("int_gemv_t", &gemv<int_gemv_t>);
    m.def("gate_first", &bound_gate_first);
    m.def("lmul", &lmul);
    m.def("lmul_matmul", &lmul_matmul);
    m.def("lmul_round", &lmul_round);
    m.def("isa", [] { return std::string(kernels().isa); });
    m.def("isas", [] {
        const char* names[4];
        return std::vector<std::string>(names, names + available_isas(names));
    });
    m.def("missing_flags", [](const std::string& name) { return missing_flags(name.c_str()); });
    m.def("use_isa", [](const std::string& name) { return use_isa(name.c_str()); });
}
