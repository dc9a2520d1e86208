// Whole programs of random shapes against the same model computed plainly, with every number of threads. Legend: D
// hidden size, N query heads, G KV heads, H head size, F neurons, V vocabulary.
#include "native/program.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "check.h"
#include "paged.h"

namespace trimtab {
namespace {

using Row = std::vector<double>;

struct PlainNorm {
    Norm norm;
    std::vector<float> weight, bias;

    PlainNorm() = default;
    PlainNorm(Random& random, int64_t size, bool layer)
        : weight(random.floats(size, 0.5f, 1.5f)), bias(random.floats(size)) {
        norm.layer = layer, norm.eps = 1e-5f, norm.size = size, norm.weight = weight.data();
        if (layer) norm.bias = bias.data();
    }
    PlainNorm(PlainNorm&&) = default;
    PlainNorm& operator=(PlainNorm&&) = default;

    Row operator()(const double* x) const {
        const size_t size = weight.size();
        double mean = 0, square = 0;
        for (size_t i = 0; i < size && norm.layer; ++i) mean += x[i] / static_cast<double>(size);
        for (size_t i = 0; i < size; ++i) square += (x[i] - mean) * (x[i] - mean) / static_cast<double>(size);
        Row y(size);
        for (size_t i = 0; i < size; ++i)
            y[i] = (x[i] - mean) / std::sqrt(square + 1e-5) * weight[i] + (norm.bias ? bias[i] : 0.0);
        return y;
    }
};

Row times(const Plain& w, const Row& x, const std::vector<float>& bias = {}) {
    Row y(static_cast<size_t>(w.tiles.rows));
    for (size_t n = 0; n < y.size(); ++n) {
        y[n] = bias.empty() ? 0.0 : bias[n];
        for (size_t k = 0; k < x.size(); ++k) y[n] += w.value[n * x.size() + k] * x[k];
    }
    return y;
}

double act_of(Act act, double v) {
    if (act == Act::silu) return v / (1 + std::exp(-v));
    if (act == Act::gelu_tanh) return 0.5 * v * (1 + std::tanh(0.7978845608028654 * (v + 0.044715 * v * v * v)));
    if (act == Act::gelu) return 0.5 * v * (1 + std::erf(v / std::sqrt(2.0)));
    return std::max(v, 0.0);
}

struct Layer {
    PlainNorm before, between, after, q_norm, k_norm;
    Plain q, k, v, o, gate, up, down;
    std::vector<float> v_bias;
    int64_t window = 0;
};

struct Model {
    int64_t hidden, heads, kv_heads, head_dim, neurons, vocabulary;
    bool gated, has_head_norms, has_positions, has_after;
    float twice_from;
    float softcap = 0, head_softcap = 0, embed_scale = 1;
    bool unified = false;
    float phi = 0;
    Act act;
    Coding cache;
    std::vector<HeadForms> forms;  // of each KV head; sealed pages hold what landing pages do
    std::vector<float> inverse;    // empty: no rope
    Plain embed, positions, head;
    PlainNorm last;
    std::vector<Layer> layers;
    double room;  // relative error of the logits that its formats explain

    explicit Model(Random& random) {
        head_dim = random.of<int64_t>({16, 32, 48}), kv_heads = random.between(1, 3),
        heads = kv_heads * random.between(1, 4);
        hidden = random.of<int64_t>({32, 48, 80, 96}), neurons = random.of<int64_t>({16, 64, 112}),
        vocabulary = random.between(17, 70);
        gated = random.coin(), has_head_norms = random.coin(), has_positions = random.coin(), has_after = random.coin();
        twice_from = random.of({-1.0f, 0.0f, 0.0f});
        act = random.of({Act::silu, Act::gelu_tanh, Act::gelu, Act::relu});
        cache = random.of({Coding::f32, Coding::f16, Coding::bf16});
        for (int64_t g = 0; g < kv_heads; ++g) {
            HeadForms made;
            for (PageForm* form : {&made.k_landing, &made.v_landing, &made.k_sealed, &made.v_sealed}) {
                // Kinds of rows of floats and of tiles of them stand in the same order.
                const int tiled = random.coin() ? static_cast<int>(PageKind::tiled_f32) : 0;
                form->kind = static_cast<PageKind>(tiled + (cache == Coding::f32 ? 0 : cache == Coding::f16 ? 1 : 2));
                form->page = random.of<int64_t>({16, 16, 32, 64}), form->width = head_dim;
            }
            made.has_k_sealed = random.coin(), made.has_v_sealed = random.coin();
            forms.push_back(made);
        }
        if (random.coin()) softcap = 20, head_softcap = 5;
        if (random.coin()) embed_scale = 1.5f;
        if (random.coin()) unified = true, phi = 0.5f;
        if (!has_positions)
            for (int64_t i = 0; i < head_dim / 2; ++i)
                inverse.push_back(std::pow(100.0f, -2.0f * static_cast<float>(i) / static_cast<float>(head_dim)));
        bool ints = false;
        auto matrix = [&](int64_t rows, int64_t cols) {
            const int64_t kind = random.below(6);
            if (kind < 3) return float_matrix(random, static_cast<Coding>(kind), rows, cols);
            ints = true;
            const int64_t group = random.of<int64_t>({0, 16, cols % 32 ? 16 : 32});
            return int_matrix(random, Scales::half, static_cast<int>(random.between(2, 8)), random.coin(), rows, cols,
                              group);
        };
        const bool layer_norm = random.coin();
        embed = matrix(vocabulary, hidden), head = matrix(vocabulary, hidden),
        last = PlainNorm(random, hidden, layer_norm);
        if (has_positions) positions = matrix(130, hidden);
        for (int64_t i = random.between(1, 2); i > 0; --i) {
            Layer l;
            l.before = PlainNorm(random, hidden, layer_norm), l.between = PlainNorm(random, hidden, layer_norm);
            l.after = PlainNorm(random, hidden, layer_norm);
            l.q_norm = PlainNorm(random, head_dim, false), l.k_norm = PlainNorm(random, head_dim, false);
            l.q = matrix(heads * head_dim, hidden), l.k = matrix(kv_heads * head_dim, hidden);
            l.v = matrix(kv_heads * head_dim, hidden), l.v_bias = random.floats(kv_heads * head_dim);
            l.o = matrix(hidden, heads * head_dim);
            l.gate = matrix(neurons, hidden), l.up = matrix(neurons, hidden), l.down = matrix(hidden, neurons);
            l.window = random.coin() ? random.between(1, 80) : 0;
            layers.push_back(std::move(l));
        }
        // An input in 8 bits is off by up to 1/254 of its largest value at each of about ten products in a row; in 16
        // bits, or a cache in bf16 whose rounding may go the other way, far less.
        room = !ints || twice_from == 0 ? (cache == Coding::f32 ? 1e-3 : cache == Coding::f16 ? 2e-3 : 1e-2) : 0.1;
        if (!ints && cache == Coding::f32) room = 2e-5;
    }

    // Logits of the last token of one row.
    Row logits(const std::vector<int64_t>& ids) const {
        const size_t tokens = ids.size(), d = static_cast<size_t>(hidden), size = static_cast<size_t>(head_dim);
        std::vector<Row> x(tokens, Row(d));
        for (size_t t = 0; t < tokens; ++t)
            for (size_t i = 0; i < d; ++i) {
                x[t][i] = embed.value[static_cast<size_t>(ids[t]) * d + i] * embed_scale;
                if (has_positions) x[t][i] += positions.value[(t + 2) * d + i];
            }
        for (const Layer& l : layers) {
            std::vector<Row> q, k, v;
            for (size_t t = 0; t < tokens; ++t) {
                const Row y = l.before(x[t].data());
                q.push_back(times(l.q, y)), k.push_back(times(l.k, y)), v.push_back(times(l.v, y, l.v_bias));
                for (Row* row : {&q[t], &k[t]})
                    for (size_t head = 0; head < row->size() / size; ++head) {
                        double* at = row->data() + head * size;
                        if (has_head_norms) {
                            const Row normed = (row == &q[t] ? l.q_norm : l.k_norm)(at);
                            std::copy(normed.begin(), normed.end(), at);
                        }
                        for (size_t i = 0; i < inverse.size(); ++i) {
                            const double angle = static_cast<double>(t) * inverse[i], a = at[i], b = at[i + size / 2];
                            at[i] = a * std::cos(angle) - b * std::sin(angle),
                            at[i + size / 2] = b * std::cos(angle) + a * std::sin(angle);
                        }
                    }
                for (double& value : k[t]) value = coded(cache, static_cast<float>(value));
                for (double& value : v[t]) value = coded(cache, static_cast<float>(value));
            }
            for (size_t t = 0; t < tokens; ++t) {
                Row mixed(static_cast<size_t>(heads) * size);
                for (size_t head = 0; head < static_cast<size_t>(heads); ++head) {
                    const size_t g = head / static_cast<size_t>(heads / kv_heads);
                    const size_t low =
                        l.window && t + 1 > static_cast<size_t>(l.window) ? t + 1 - static_cast<size_t>(l.window) : 0;
                    double sum = 0;
                    for (size_t s = low; s <= t; ++s) {
                        double score = 0;
                        for (size_t i = 0; i < size; ++i) score += q[t][head * size + i] * k[s][g * size + i];
                        score *= scale();
                        if (softcap > 0) score = softcap * std::tanh(score / softcap);
                        const double p = std::exp(score);
                        sum += p;
                        for (size_t i = 0; i < size; ++i) mixed[head * size + i] += p * v[s][g * size + i];
                    }
                    for (size_t i = 0; i < size; ++i) mixed[head * size + i] /= sum;
                }
                add(x[t], times(l.o, mixed));
                const Row y = l.between(x[t].data());
                Row h = times(l.gate, y);
                const Row up = times(l.up, y);
                for (size_t i = 0; i < h.size(); ++i) h[i] = act_of(act, h[i]) * (gated ? up[i] : 1.0);
                const Row back = times(l.down, h);
                add(x[t], has_after ? l.after(back.data()) : back);
            }
        }
        Row y = times(head, last(x.back().data()));
        for (double& value : y) {
            value *= 0.5;
            if (head_softcap > 0) value = head_softcap * std::tanh(value / head_softcap);
        }
        return y;
    }

    float scale() const { return 1.0f / std::sqrt(static_cast<float>(head_dim)); }
    static void add(Row& x, const Row& y) {
        for (size_t i = 0; i < x.size(); ++i) x[i] += y[i];
    }
};

// The model as `lower.py` builds it. Returns the index of the logits.
int lower(const Model& m, Program& program) {
    const int64_t q_width = m.heads * m.head_dim, kv_width = m.kv_heads * m.head_dim;
    const int h = program.add_values(m.hidden, false), qkv = program.add_values(q_width + 2 * kv_width, false);
    const int mixed = program.add_values(q_width, false), inner = program.add_values(m.neurons, false);
    const int side = program.add_values(m.hidden, false), logits = program.add_values(m.vocabulary, true);
    int rope = -1;
    if (!m.inverse.empty()) {
        Rope made;
        made.inverse = m.inverse;
        rope = program.add_rope(made);
    }
    auto product = [](const Plain& w, int values, int64_t column = 0) {
        Product p;
        p.w = w.tiles, p.values = values, p.column = column;
        return p;
    };
    program.embed("embed", m.embed.tiles, m.embed_scale, h);
    if (m.has_positions) program.positions("positions", m.positions.tiles, 2, h);
    for (size_t i = 0; i < m.layers.size(); ++i) {
        const Layer& l = m.layers[i];
        std::vector<Product> three = {product(l.q, qkv), product(l.k, qkv, q_width),
                                      product(l.v, qkv, q_width + kv_width)};
        three[2].bias = l.v_bias.data();
        program.linear("qkv", h, &l.before.norm, three, Store::set, Act::none, m.twice_from);
        Attention a;
        a.layer = static_cast<int>(i), a.qkv = qkv, a.out = mixed, a.rope = rope, a.heads = m.heads,
        a.kv_heads = m.kv_heads;
        a.head_dim = m.head_dim, a.window = l.window, a.scale = m.scale(), a.softcap = m.softcap;
        a.has_q_norm = a.has_k_norm = m.has_head_norms, a.q_norm = l.q_norm.norm, a.k_norm = l.k_norm.norm;
        a.unified = m.unified, a.phi = m.phi, a.low = -0.25f, a.high = 0.5f;  // narrow: some rows are computed again
        program.attend_heads("attend", a, m.forms);
        program.linear("o", mixed, nullptr, {product(l.o, h)}, Store::add, Act::none, m.twice_from);
        if (m.gated)
            program.linear("up", h, &l.between.norm, {product(l.gate, inner), product(l.up, inner)}, Store::gated,
                           m.act, m.twice_from);
        else
            program.linear("up", h, &l.between.norm, {product(l.gate, inner)}, Store::set, m.act, m.twice_from);
        if (m.has_after) {
            program.linear("down", inner, nullptr, {product(l.down, side)}, Store::set, Act::none, m.twice_from);
            program.norm_add("after", side, l.after.norm, h);
        } else {
            program.linear("down", inner, nullptr, {product(l.down, h)}, Store::add, Act::none, m.twice_from);
        }
    }
    Product head = product(m.head, logits);
    head.scale = 0.5f, head.softcap = m.head_softcap;
    program.linear("head", h, &m.last.norm, {head}, Store::set, Act::none, m.twice_from);
    return logits;
}

struct Made {
    std::vector<std::vector<float>> logits;  // of each step: [R, V]
    std::vector<int64_t> counts;             // what each kernel of each step read, wrote and computed
    int64_t recomputed = 0;
};

// Pages of one KV head of one row in one layer, with room for exactly what all steps write.
struct HeadPages {
    Paged k_landing, v_landing, k_sealed, v_sealed;
    int64_t k_border = 0, v_border = 0;

    HeadPages(const HeadForms& forms, int64_t room)
        : k_landing(forms.k_landing, room), v_landing(forms.v_landing, room) {
        if (forms.has_k_sealed) k_sealed = Paged(forms.k_sealed, room);
        if (forms.has_v_sealed) v_sealed = Paged(forms.v_sealed, room);
    }
    // Adds the record of a step, after which all but the newest `open` of `held` slots are sealed.
    void tell(int64_t past, int64_t held, int64_t open, std::vector<int64_t>& records) {
        const int64_t after = std::max<int64_t>(0, held - open);
        const int64_t k_after = k_sealed.pages.empty() ? 0 : std::max(k_border, after);
        const int64_t v_after = v_sealed.pages.empty() ? 0 : std::max(v_border, after);
        const int64_t record[record_fields] = {k_landing.address(),
                                               v_landing.address(),
                                               k_sealed.address(),
                                               v_sealed.address(),
                                               held,
                                               k_border,
                                               v_border,
                                               k_after,
                                               v_after,
                                               0,
                                               0,
                                               0,
                                               0,
                                               0,
                                               past,
                                               0};
        records.insert(records.end(), record, record + record_fields);
        k_landing.drop(k_border), v_landing.drop(v_border);
        k_border = k_after, v_border = v_after;
    }
};

// Two rows through steps of the given numbers of tokens.
Made run(const Model& m, const std::vector<int64_t> (&ids)[2], const std::vector<std::vector<int64_t>>& steps,
         int threads) {
    Program program(threads);
    const int logits = lower(m, program);
    std::vector<HeadPages> pages;
    for (size_t layer = 0; layer < m.layers.size(); ++layer)
        for (const auto& row : ids)
            for (const HeadForms& forms : m.forms) pages.emplace_back(forms, static_cast<int64_t>(row.size()));
    Made made;
    int64_t past[2] = {0, 0};
    for (const auto& fresh : steps) {
        std::vector<int64_t> tokens, starts = {0}, wanted, records;
        for (size_t row = 0; row < 2; ++row) {
            tokens.insert(tokens.end(), ids[row].begin() + past[row], ids[row].begin() + past[row] + fresh[row]);
            starts.push_back(static_cast<int64_t>(tokens.size())), wanted.push_back(starts.back() - 1);
        }
        const size_t each = m.forms.size();
        for (size_t i = 0; i < pages.size(); ++i) {
            const size_t row = i / each % 2;
            pages[i].tell(past[row], past[row] + fresh[row], 7 * static_cast<int64_t>(i % each), records);
        }
        Step step;
        step.tokens = starts.back(), step.rows = 2, step.logits = 2, step.ids = tokens.data(),
        step.starts = starts.data();
        step.past = past, step.logits_rows = wanted.data();
        step.records = records.data(), step.record_heads = m.kv_heads;
        const int64_t reach[2] = {static_cast<int64_t>(ids[0].size()), static_cast<int64_t>(ids[1].size())};
        program.run(step, reach, false);
        const float* from = program.values(logits).data;
        made.logits.emplace_back(from, from + 2 * m.vocabulary);
        for (const auto& k : program.kernels())
            for (const auto* count : {&k->weight_read, &k->kv_read, &k->kv_written, &k->flops})
                made.counts.push_back(count->load());
        for (size_t row = 0; row < 2; ++row) past[row] += fresh[row];
    }
    made.recomputed = program.recomputed.load();
    return made;
}

TEST(programs_of_random_shapes_are_the_plain_model) {
    // A prompt in one step and one in pieces; single tokens over few keys, and over so many that their work is cut in
    // ranges.
    const std::vector<std::vector<int64_t>> steps = {{5, 70}, {1, 1}, {3, 1}, {40, 2}, {1, 1}, {1, 1}};
    int64_t recomputed = 0;
    for (const Isa& isa : isas()) {
        use(isa);
        const uint64_t first = static_cast<uint64_t>(&isa - isas().data()) * 4;  // other models for each
        for (uint64_t seed = first; seed < first + 4; ++seed) {
            Random random(100 + seed);
            const Model m(random);
            std::vector<int64_t> ids[2];
            for (const auto& fresh : steps)
                for (size_t row = 0; row < 2; ++row)
                    for (int64_t t = 0; t < fresh[row]; ++t) ids[row].push_back(random.below(m.vocabulary));
            const Made one = run(m, ids, steps, 1);
            recomputed += one.recomputed;
            for (int threads : {2, 3, 4}) {
                const Made many = run(m, ids, steps, threads);
                CHECK(many.logits == one.logits, "%s seed=%d: %d threads change the result", isa.name,
                      static_cast<int>(seed), threads);
                CHECK(many.counts == one.counts, "%s seed=%d: %d threads change the counts", isa.name,
                      static_cast<int>(seed), threads);
            }
            int64_t past[2] = {0, 0};
            for (size_t i = 0; i < steps.size(); ++i)
                for (size_t row = 0; row < 2; ++row) {
                    past[row] += steps[i][row];
                    const Row expected = m.logits({ids[row].begin(), ids[row].begin() + past[row]});
                    const float* y = one.logits[i].data() + row * expected.size();
                    double off = 0, size = 0;
                    for (size_t n = 0; n < expected.size(); ++n)
                        off += std::pow(y[n] - expected[n], 2), size += expected[n] * expected[n];
                    CHECK(std::sqrt(off) <= m.room * std::sqrt(size),
                          "%s seed=%d step=%d row=%d: off by %.3g of it, %.3g at most", isa.name,
                          static_cast<int>(seed), static_cast<int>(i), static_cast<int>(row), std::sqrt(off / size),
                          m.room);
                }
        }
    }
    CHECK(recomputed > 0, "no row left the range of its unified maximum");
    use(isas()[0]);
}

}  // namespace
}  // namespace trimtab
