// Python bindings of the native program. Shapes are checked by trimtab/runtime/native; the GIL is released while a step runs.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <cstring>

#include "binary_fit.h"
#include "native/bind_pages.h"
#include "native/pack.h"
#include "native/program.h"
#include "rows.h"

namespace nb = nanobind;

namespace trimtab {
namespace {

template <class T, int N>
using Array = nb::ndarray<T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
using Bytes = Array<const uint8_t, 1>;
using Floats = Array<const float, 1>;

// A program, and the arrays its kernels point into.
struct Bound {
    explicit Bound(int threads) : program(threads) {}
    Program program;
    std::vector<nb::object> keep;

    const float* floats(const std::optional<Floats>& array) {
        if (!array) return nullptr;
        keep.push_back(nb::cast(*array));
        return array->data();
    }
};

struct BoundTiles {
    Tiles tiles;
    std::vector<nb::object> keep;
};

BoundTiles make_tiles(int coding, int scales, int bits, int64_t rows, int64_t cols, int64_t group, Bytes data,
                      std::optional<Bytes> scale, std::optional<Bytes> minimum, std::optional<Bytes> sub, int entry,
                      int64_t table_group, bool fast_average, bool bipolar, std::optional<Array<const int32_t, 2>> values,
                      std::optional<Bytes> choice) {
    BoundTiles b;
    b.tiles.coding = static_cast<Coding>(coding), b.tiles.scales = static_cast<Scales>(scales);
    b.tiles.bits = bits, b.tiles.rows = rows, b.tiles.cols = cols, b.tiles.group = group;
    b.tiles.entry = static_cast<Entry>(entry), b.tiles.table_group = table_group, b.tiles.fast_average = fast_average;
    b.tiles.data = data.data();
    b.keep.push_back(nb::cast(data));
    if (scale) b.tiles.scale = reinterpret_cast<const uint16_t*>(scale->data()), b.keep.push_back(nb::cast(*scale));
    if (minimum) b.tiles.minimum = reinterpret_cast<const uint16_t*>(minimum->data()), b.keep.push_back(nb::cast(*minimum));
    if (sub) b.tiles.sub = sub->data(), b.keep.push_back(nb::cast(*sub));
    if (choice) b.tiles.choice = choice->data(), b.keep.push_back(nb::cast(*choice));
    b.tiles.bipolar = bipolar;
    if (values) {
        if (static_cast<int64_t>(values->shape(1)) != int64_t{1} << bits) throw std::invalid_argument("A table has 2^bits values.");
        b.tiles.grid = Grid::of(values->data(), static_cast<int>(values->shape(0)), bits, b.tiles.coding == Coding::pairs);
    }
    return b;
}

// A function of a matrix [rows, cols] of one side, of whatever packing takes besides, and of the packed bytes.
template <class Code, class... Options, class F>
auto packing(F pack) {
    return [pack](Array<const Code, 2> codes, Options... options, Array<uint8_t, 1> out) {
        nb::gil_scoped_release release;
        pack(codes.data(), static_cast<int64_t>(codes.shape(0)), static_cast<int64_t>(codes.shape(1)), options..., out.data());
    };
}

template <class Code, class... Options, class F>
auto unpacking(F unpack) {
    return [unpack](Array<const uint8_t, 1> packed, Options... options, Array<Code, 2> out) {
        nb::gil_scoped_release release;
        unpack(packed.data(), static_cast<int64_t>(out.shape(0)), static_cast<int64_t>(out.shape(1)), options..., out.data());
    };
}

// y [T, N] = x [T, K] @ W.T with the codes of the activations made on the way: one product, outside a program.
int64_t multiply(const BoundTiles& w, Array<const float, 2> x, int threads, Array<float, 2> y, float twice_from,
                 int64_t flat, int64_t decoded) {
    nb::gil_scoped_release release;
    Program program(threads);
    const int64_t tokens = static_cast<int64_t>(x.shape(0)), cols = w.tiles.cols;
    const int source = program.add_values(cols, false), out = program.add_values(w.tiles.rows, false);
    Product product;
    product.w = w.tiles, product.values = out, product.flow = {flat, decoded};
    program.linear("product", source, nullptr, {product}, Store::set, Act::none, twice_from);
    Step step;
    const int64_t starts[] = {0, tokens}, past[] = {0};
    step.tokens = tokens, step.rows = 1, step.starts = starts, step.past = past;
    program.run_on(step, source, x.data(), out, y.data());
    return program.kernels()[0]->weight_read;
}

// W [N, K] of int8 rows, and the fp16 columns by which outliers are multiplied, where there are such.
using Int8Tuple = std::tuple<Array<const int8_t, 2>, Floats, std::optional<Array<const uint16_t, 2>>>;

// Signs and scales of a binary-coded matrix in tiles, and what they mean: rows, columns, rows and columns that share scales, bits, terms.
using RotationTuple = std::tuple<Array<const float, 2>, Array<const float, 2>, Array<const int32_t, 1>>;
using BinaryTuple = std::tuple<Bytes, Bytes, int64_t, int64_t, int64_t, int64_t, int, int>;

Binary binary_of(const BinaryTuple& matrix) {
    const auto& [signs, scales, rows, cols, scale_rows, scale_cols, bits, apot] = matrix;
    Binary w;
    w.signs = signs.data(), w.scales = scales.data(), w.rows = rows, w.cols = cols;
    w.scale_rows = scale_rows, w.scale_cols = scale_cols, w.bits = bits, w.apot = apot;
    return w;
}

// A number with additions and shifts, and no multiplication.
struct Additive {
    float value;
    explicit Additive(float v) : value(v) {}
    Additive operator+(Additive other) const { return Additive(value + other.value); }
    Additive operator-(Additive other) const { return Additive(value - other.value); }
};
Additive shifted(Additive v, Term by) { return Additive(trimtab::shifted(v.value, by)); }

void binary_multiply_plain(const BinaryTuple& matrix, Array<const float, 2> x, Array<float, 2> y) {
    const Binary w = binary_of(matrix);
    const size_t cols = x.shape(1), rows = y.shape(1);
    std::vector<Additive> in(cols, Additive(0.0f)), out(rows, Additive(0.0f));
    for (size_t t = 0; t < x.shape(0); ++t) {
        for (size_t k = 0; k < cols; ++k) in[k] = Additive(x.data()[t * cols + k]);
        binary_plain(w, in.data(), out.data());
        for (size_t n = 0; n < rows; ++n) y.data()[t * rows + n] = out[n].value;
    }
}

void fit_binary(Array<const float, 2> w, std::optional<Array<const float, 2>> cost, int bits, int apot, int rounds, bool nearest,
                std::vector<double> even, int threads, Array<float, 2> scales) {
    const float *from = w.data(), *by = cost ? cost->data() : nullptr;
    const int64_t groups = static_cast<int64_t>(w.shape(0)), size = static_cast<int64_t>(w.shape(1));
    const BinaryFit how{bits, apot, rounds, nearest, std::move(even)};
    float* to = scales.data();
    nb::gil_scoped_release release;
    binary_fit(from, by, groups, size, how, threads, to);
}

double seconds_since(std::chrono::steady_clock::time_point start) {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Seconds of the product of x [T, K] with matrices of one shape under several dataflows (flat, decoded), [flows][repeats].
// The flows take turns, and every run takes the next matrix, so that a long list of them comes from memory.
std::vector<std::vector<double>> time_products(const std::vector<const BoundTiles*>& w, Array<const float, 2> x,
                                               int threads, const std::vector<std::pair<int64_t, int64_t>>& flows, int repeats) {
    nb::gil_scoped_release release;
    Program program(threads);
    const int64_t tokens = static_cast<int64_t>(x.shape(0));
    const Tiles& first = w[0]->tiles;
    const int source = program.add_values(first.cols, false), out = program.add_values(first.rows, false);
    for (const BoundTiles* each : w)
        for (const auto& [flat, decoded] : flows) {
            Product product;
            product.w = each->tiles, product.values = out, product.flow = {flat, decoded};
            program.linear("product", source, nullptr, {product}, Store::set, Act::none);
        }
    Step step;
    const int64_t starts[] = {0, tokens}, past[] = {0};
    step.tokens = tokens, step.rows = 1, step.starts = starts, step.past = past;
    program.reserve(step);
    std::memcpy(program.values(source).data, x.data(), static_cast<size_t>(4 * tokens * first.cols));
    std::vector<std::vector<double>> found(flows.size());
    size_t next = 0;
    for (int i = 0; i < repeats; ++i)
        for (size_t f = 0; f < flows.size(); ++f) {
            const auto start = std::chrono::steady_clock::now();
            program.run_one(step, (next++ % w.size()) * flows.size() + f);
            found[f].push_back(seconds_since(start));
        }
    return found;
}

void add_records(Step& step, const Array<const int64_t, 4>& records) {
    if (records.shape(3) != record_fields || static_cast<int64_t>(records.shape(1)) != step.rows)
        throw std::invalid_argument("Records are [layers, rows, KV heads, 16] of the rows of a pass.");
    step.records = records.data(), step.record_heads = static_cast<int64_t>(records.shape(2));
}

Norm make_norm(Bound& b, bool layer, float eps, int64_t size, std::optional<Floats> weight, std::optional<Floats> bias) {
    Norm norm;
    norm.layer = layer, norm.eps = eps, norm.size = size;
    norm.weight = b.floats(weight), norm.bias = b.floats(bias);
    return norm;
}

}  // namespace

void bind_native(nb::module_& m) {
    bind_pages(m);
    bind_slots(m);
    nb::class_<BoundTiles>(m, "Tiles")
        .def_prop_ro("tile_bytes", [](const BoundTiles& b) { return b.tiles.tile_bytes() * b.tiles.tiles(); });
    m.def("tiles", &make_tiles, nb::arg("coding"), nb::arg("scales"), nb::arg("bits"), nb::arg("rows"), nb::arg("cols"),
          nb::arg("group"), nb::arg("data"), nb::arg("scale").none(), nb::arg("minimum").none(), nb::arg("sub").none(),
          nb::arg("entry") = 0, nb::arg("table_group") = 0, nb::arg("fast_average") = false,
          nb::arg("bipolar") = false, nb::arg("values").none() = nb::none(), nb::arg("choice").none() = nb::none());
    m.def("pack_tiles", packing<uint8_t, int>(&pack_tiles));
    m.def("unpack_tiles", unpacking<uint8_t, int>(&unpack_tiles));
    m.def("pack_planes", packing<uint8_t, int, bool>(&pack_planes));
    m.def("unpack_planes", unpacking<uint8_t, int, bool>(&unpack_planes));
    m.def("pack_ternary", packing<int8_t, int64_t>(&pack_ternary));
    m.def("unpack_ternary", unpacking<int8_t, int64_t>(&unpack_ternary));
    m.def("multiply", &multiply, nb::arg("w"), nb::arg("x"), nb::arg("threads"), nb::arg("y"),
          nb::arg("twice_from") = -1.0f, nb::arg("flat") = 1, nb::arg("decoded") = int64_t{1} << 40);
    m.def("time_products", &time_products);
    m.def("exp_sum", [](Array<const float, 1> x, float top, float by) {
        return tile_kernels().exp_sum(x.data(), static_cast<int64_t>(x.shape(0)), top, by);
    });
    m.def("binary_multiply", [](const BinaryTuple& w, Array<const float, 2> x, int threads, Array<float, 2> y) {
        const Binary made = binary_of(w);
        nb::gil_scoped_release release;
        binary_multiply(made, x.data(), static_cast<int64_t>(x.shape(0)), threads, y.data());
    });
    m.def("binary_multiply_plain", &binary_multiply_plain);
    m.def("binary_fit", &fit_binary, nb::arg("w"), nb::arg("cost").none(), nb::arg("bits"), nb::arg("apot"), nb::arg("rounds"),
          nb::arg("nearest"), nb::arg("even"), nb::arg("threads"), nb::arg("scales"));
    m.def("int8_product", [](Array<const int8_t, 2> w, Array<const int8_t, 2> x, int threads, Array<int32_t, 2> out) {
        nb::gil_scoped_release release;
        int8_product(w.data(), static_cast<int64_t>(w.shape(0)), static_cast<int64_t>(w.shape(1)), x.data(),
                     static_cast<int64_t>(x.shape(0)), threads, out.data());
    });
    nb::class_<Norm>(m, "Norm");
    nb::class_<Bound>(m, "Program")
        .def(nb::init<int>(), nb::arg("threads"))
        .def("values", [](Bound& b, int64_t width, bool logits) { return b.program.add_values(width, logits); })
        .def("norm", &make_norm, nb::arg("layer"), nb::arg("eps"), nb::arg("size"), nb::arg("weight").none(),
             nb::arg("bias").none())
        .def("rope",
             [](Bound& b, const std::vector<float>& inverse, const std::vector<float>& longer, int64_t original, float scale) {
                 Rope rope;
                 rope.inverse = inverse, rope.inverse_long = longer, rope.original = original, rope.scale = scale;
                 return b.program.add_rope(std::move(rope));
             })
        .def("embed",
             [](Bound& b, const std::string& name, const BoundTiles& table, float scale, int values) {
                 b.keep.insert(b.keep.end(), table.keep.begin(), table.keep.end());
                 b.program.embed(name, table.tiles, scale, values);
             })
        .def("positions",
             [](Bound& b, const std::string& name, const BoundTiles& table, int64_t offset, int values) {
                 b.keep.insert(b.keep.end(), table.keep.begin(), table.keep.end());
                 b.program.positions(name, table.tiles, offset, values);
             })
        .def("linear",
             [](Bound& b, const std::string& name, int source, const Norm* norm,
                const std::vector<std::tuple<const BoundTiles*, int, int64_t, std::optional<Floats>, float, float, int64_t, int64_t>>&
                    products,
                int store, int act) {
                 std::vector<Product> made;
                 for (const auto& [tiles, values, column, bias, scale, softcap, flat, decoded] : products) {
                     Product product;
                     product.w = tiles->tiles, product.values = values, product.column = column;
                     product.bias = b.floats(bias), product.scale = scale, product.softcap = softcap;
                     product.flow = {flat, decoded};
                     b.keep.insert(b.keep.end(), tiles->keep.begin(), tiles->keep.end());
                     made.push_back(product);
                 }
                 b.program.linear(name, source, norm, std::move(made), static_cast<Store>(store), static_cast<Act>(act));
             },
             nb::arg("name"), nb::arg("source"), nb::arg("norm").none(), nb::arg("products"), nb::arg("store"), nb::arg("act"))
        .def("int8_linear",
             [](Bound& b, const std::string& name, int source, const Norm* norm,
                const std::vector<std::tuple<Int8Tuple, int, int64_t, std::optional<Floats>, float, float>>& products, float threshold,
                std::optional<std::vector<int32_t>> columns, int store, int act) {
                 std::vector<Int8Product> made;
                 for (const auto& [matrix, values, column, bias, factor, softcap] : products) {
                     const auto& [data, scale, halves] = matrix;
                     Int8Product product;
                     product.w.data = data.data(), product.w.scale = scale.data();
                     product.w.rows = static_cast<int64_t>(data.shape(0)), product.w.cols = static_cast<int64_t>(data.shape(1));
                     b.keep.push_back(nb::cast(data)), b.keep.push_back(nb::cast(scale));
                     if (halves) product.w.columns = halves->data(), b.keep.push_back(nb::cast(*halves));
                     product.values = values, product.column = column, product.bias = b.floats(bias);
                     product.factor = factor, product.softcap = softcap;
                     made.push_back(product);
                 }
                 Outliers how;
                 how.threshold = threshold, how.listed = columns.has_value();
                 if (columns) how.columns = *columns;
                 b.program.int8_linear(name, source, norm, std::move(made), std::move(how), static_cast<Store>(store), static_cast<Act>(act));
             },
             nb::arg("name"), nb::arg("source"), nb::arg("norm").none(), nb::arg("products"), nb::arg("threshold"),
             nb::arg("columns").none(), nb::arg("store"), nb::arg("act"))
        .def("binary_linear",
             [](Bound& b, const std::string& name, int source, const Norm* norm, const std::optional<RotationTuple>& turn,
                const std::vector<std::tuple<BinaryTuple, int, int64_t, std::optional<Floats>, float, float>>& products, int store, int act) {
                 std::optional<Rotation> rotation;
                 if (turn) {
                     const auto& [left, right_t, order] = *turn;
                     rotation = Rotation{left.data(), right_t.data(), order.data(), static_cast<int64_t>(left.shape(0)),
                                         static_cast<int64_t>(right_t.shape(0))};
                     b.keep.push_back(nb::cast(left)), b.keep.push_back(nb::cast(right_t)), b.keep.push_back(nb::cast(order));
                 }
                 std::vector<BinaryProduct> made;
                 for (const auto& [matrix, values, column, bias, factor, softcap] : products) {
                     BinaryProduct product;
                     product.w = binary_of(matrix);
                     b.keep.push_back(nb::cast(std::get<0>(matrix))), b.keep.push_back(nb::cast(std::get<1>(matrix)));
                     product.values = values, product.column = column, product.bias = b.floats(bias);
                     product.factor = factor, product.softcap = softcap;
                     made.push_back(product);
                 }
                 b.program.binary_linear(name, source, norm, rotation, std::move(made), static_cast<Store>(store), static_cast<Act>(act));
             },
             nb::arg("name"), nb::arg("source"), nb::arg("norm").none(), nb::arg("rotation").none(), nb::arg("products"), nb::arg("store"), nb::arg("act"))
        .def("gate_first",
             [](Bound& b, const std::string& name, int source, int values, const Norm& norm, const BoundTiles& gate,
                const BoundRows& up, const BoundRows& down_t, int act, float threshold, int64_t max_tokens, bool prefill) {
                 GateFirstFFN f;
                 f.source = source, f.values = values, f.norm = norm, f.gate = gate.tiles, f.up = up.matrix;
                 f.down_t = down_t.matrix, f.act = static_cast<Act>(act), f.threshold = threshold;
                 f.max_tokens = max_tokens, f.threshold_prefill = prefill;
                 b.keep.insert(b.keep.end(), gate.keep.begin(), gate.keep.end());
                 b.keep.insert(b.keep.end(), up.keep.begin(), up.keep.end());
                 b.keep.insert(b.keep.end(), down_t.keep.begin(), down_t.keep.end());
                 b.program.gate_first(name, std::move(f));
             })
        .def("norm_add", [](Bound& b, const std::string& name, int source, const Norm& norm,
                            int values) { b.program.norm_add(name, source, norm, values); })
        .def("attend_heads",
             [](Bound& b, const std::string& name, int layer, int qkv, int out, int rope, int64_t heads, int64_t kv_heads,
                int64_t head_dim, int64_t window, const std::vector<FormsTuple>& forms, const Norm* q_norm, const Norm* k_norm,
                float scale, float softcap, std::optional<std::tuple<float, float, float>> unified, bool append,
                std::tuple<int64_t, int64_t> prompt) {
                 Attention a;
                 a.layer = layer, a.qkv = qkv, a.out = out, a.rope = rope, a.heads = heads, a.kv_heads = kv_heads;
                 a.head_dim = head_dim, a.window = window, a.append = append;
                 a.prompt_sink = std::get<0>(prompt), a.prompt_local = std::get<1>(prompt);
                 if (q_norm) a.has_q_norm = true, a.q_norm = *q_norm;
                 if (k_norm) a.has_k_norm = true, a.k_norm = *k_norm;
                 a.scale = scale, a.softcap = softcap;
                 if (unified) a.unified = true, a.phi = std::get<0>(*unified), a.low = std::get<1>(*unified), a.high = std::get<2>(*unified);
                 std::vector<HeadForms> made;
                 for (const FormsTuple& each : forms) made.push_back(head_forms(each, head_dim));
                 if (static_cast<int64_t>(made.size()) != kv_heads) throw std::invalid_argument("attend_heads: forms are wanted for every KV head.");
                 b.program.attend_heads(name, a, std::move(made));
             },
             nb::arg("name"), nb::arg("layer"), nb::arg("qkv"), nb::arg("out"), nb::arg("rope"), nb::arg("heads"),
             nb::arg("kv_heads"), nb::arg("head_dim"), nb::arg("window"), nb::arg("forms"), nb::arg("q_norm").none(),
             nb::arg("k_norm").none(), nb::arg("scale"), nb::arg("softcap"), nb::arg("unified").none(), nb::arg("append") = true,
             nb::arg("prompt") = std::make_tuple(int64_t{0}, int64_t{0}))
        .def("watch", [](Bound& b, int64_t count) { b.program.watch(count); }, nb::arg("count"))
        .def("queries",
             [](const Bound& b, int layer) {
                 const Program::Watched& seen = b.program.watched(layer);
                 if (!seen.queries) throw std::out_of_range("The layer has no attention over pages.");
                 const size_t count = static_cast<size_t>(b.program.watching()), heads = static_cast<size_t>(seen.heads);
                 const size_t size = static_cast<size_t>(seen.head_dim), all = seen.queries->size();
                 float* data = new float[all];
                 std::memcpy(data, seen.queries->data(), all * sizeof(float));
                 nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<float*>(p); });
                 const size_t rows = count ? all / (count * heads * size) : 0;
                 return nb::ndarray<nb::numpy, float, nb::ndim<4>>(data, {rows, count, heads, size}, owner);
             },
             nb::arg("layer"))
        .def("split", [](Bound& b, int64_t keys) { b.program.split(keys); })
        .def("run_on",
             [](Bound& b, Array<const int64_t, 1> starts, Array<const int64_t, 1> past, Array<const int64_t, 4> records, int source,
                Array<const float, 2> x, int out, Array<float, 2> y) {
                 Step step;
                 step.tokens = static_cast<int64_t>(x.shape(0)), step.rows = static_cast<int64_t>(past.shape(0));
                 step.starts = starts.data(), step.past = past.data();
                 add_records(step, records);
                 nb::gil_scoped_release release;
                 const auto start = std::chrono::steady_clock::now();
                 b.program.run_on(step, source, x.data(), out, y.data());
                 return seconds_since(start);
             })
        .def("run",
             [](Bound& b, Array<const int64_t, 1> ids, Array<const int64_t, 1> starts, Array<const int64_t, 1> past,
                Array<const int64_t, 1> reach, Array<const int64_t, 1> logits_rows, Array<const int64_t, 4> records, int values,
                bool timed, Array<float, 2> out, std::optional<Array<const int64_t, 1>> whole, int64_t first, int64_t end) {
                 Step step;
                 step.tokens = static_cast<int64_t>(ids.shape(0)), step.rows = static_cast<int64_t>(past.shape(0));
                 step.logits = static_cast<int64_t>(logits_rows.shape(0));
                 step.ids = ids.data(), step.starts = starts.data(), step.past = past.data(), step.logits_rows = logits_rows.data();
                 step.whole = whole ? whole->data() : nullptr;
                 add_records(step, records);
                 float* to = out.data();
                 const size_t bytes = out.nbytes();
                 nb::gil_scoped_release release;
                 b.program.run(step, reach.data(), timed, first, end);
                 if (bytes && end < 0) memcpy(to, b.program.values(values).data, bytes);
             },
             nb::arg("ids"), nb::arg("starts"), nb::arg("past"), nb::arg("reach"), nb::arg("logits_rows"), nb::arg("records"), nb::arg("values"),
             nb::arg("timed"), nb::arg("out"), nb::arg("whole").none() = nb::none(), nb::arg("first") = 0, nb::arg("end") = -1)
        .def_prop_ro("attends", [](const Bound& b) { return b.program.attends(); })
        .def("metered",
             [](const Bound& b) {
                 std::vector<std::tuple<std::string, int64_t, int64_t, int64_t, int64_t, double>> found;
                 for (const auto& k : b.program.kernels())
                     found.emplace_back(k->name, k->weight_read, k->kv_read, k->kv_written, k->flops, k->seconds);
                 return found;
             })
        .def("observed",
             [](const Bound& b) {
                 std::vector<std::tuple<std::string, int64_t, int64_t>> found;
                 for (const auto& k : b.program.kernels())
                     if (k->active_rows >= 0) found.emplace_back(k->name, k->active_rows, k->active_pairs);
                 return found;
             })
        .def("outliers",
             [](const Bound& b) {
                 std::vector<std::pair<std::string, int64_t>> found;
                 for (const auto& k : b.program.kernels())
                     if (k->outliers >= 0) found.emplace_back(k->name, k->outliers);
                 return found;
             })
        .def_prop_ro("recomputed", [](const Bound& b) { return b.program.recomputed.load(); })
        .def_prop_ro("arena_bytes", [](const Bound& b) { return b.program.arena_bytes(); })
        .def_prop_ro("threads", [](const Bound& b) { return b.program.threads(); });
}

}  // namespace trimtab
