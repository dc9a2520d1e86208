// Attention of every instruction set, over pages of every pair of forms, against a softmax in double precision of what
// the pages hold.
#include <algorithm>
#include <cmath>
#include <string>

#include "check.h"
#include "heads.h"

namespace trimtab {
namespace {

constexpr float phi = 1.25f;

// How far scores, and the relative weights they yield, may be off. Scores are sums of head_dim terms in fp32, about
// 1e-6 off; where codes of a few bits are multiplied in 16-bit integers, a scaled query or weight is rounded to 2^-16
// of its largest.
double room(const Isa& isa, const HeadForms& forms) {
    auto few = [](bool has, const PageForm& form) { return has && form.scaled() && form.bits < 8; };
    const bool any = few(true, forms.k_landing) || few(true, forms.v_landing) ||
                     few(forms.has_k_sealed, forms.k_sealed) || few(forms.has_v_sealed, forms.v_sealed);
    return any && isa.words->lanes == 16 ? 1e-3 : 3e-5;
}

Queries ask(Random& random, const Head& head, int64_t count) {
    Queries asked;
    for (int64_t n = 0; n < count; ++n) {
        asked.q.push_back(random.floats(head.head_dim, -2, 2));
        asked.high.push_back(head.slots - random.below(std::min<int64_t>(head.slots, 5)));
        asked.low.push_back(0);
    }
    asked.positions.resize(asked.count());
    asked.scale = 1.5f / std::sqrt(static_cast<float>(head.head_dim)), asked.phi = phi;
    asked.unified = random.coin(), asked.turned = random.coin();
    asked.beyond = random.coin() ? head.slots : 0;
    return asked;
}

void check(const Isa& isa, const Head& head, const Queries& asked, int64_t first, int64_t last) {
    const std::string what = std::string(isa.name) + ": " + head.name() + ": " + asked.name() +
                             " first=" + std::to_string(first) + " last=" + std::to_string(last);
    const Partial made = attend(isa, head, asked, first, last);
    const double off = room(isa, head.forms);
    for (size_t n = 0; n < asked.count(); ++n) {
        const int query = static_cast<int>(n);
        const double shift = asked.unified ? phi : made.largest[n];
        const Exact wanted = exact(head, asked, n, first, last, &shift);
        const float* out = made.out.data() + n * static_cast<size_t>(head.head_dim);
        if (wanted.nothing) {
            CHECK(made.weight[n] == 0 && std::isinf(made.largest[n]), "%s: query %d sees nothing", what.c_str(), query);
            for (int64_t i = 0; i < head.head_dim; ++i) CHECK(out[i] == 0, "%s: query %d", what.c_str(), query);
            continue;
        }
        CHECK(std::fabs(made.largest[n] - wanted.top) < off, "%s: query %d: largest %g, not %g", what.c_str(), query,
              made.largest[n], wanted.top);
        CHECK(std::fabs(made.weight[n] - wanted.weight) < off * wanted.weight, "%s: query %d: weight %g, not %g",
              what.c_str(), query, made.weight[n], wanted.weight);
        for (int64_t i = 0; i < head.head_dim; ++i)
            CHECK(std::fabs(out[i] - wanted.out[static_cast<size_t>(i)]) < 2 * off * wanted.weight,
                  "%s: query %d value %d: %.9g, not %.9g", what.c_str(), query, static_cast<int>(i), out[i],
                  wanted.out[static_cast<size_t>(i)]);
    }
}

HeadForms landing(const PageForm& k, const PageForm& v) {
    HeadForms forms;
    forms.k_landing = k, forms.v_landing = v;
    return forms;
}

// The largest number of slots up to `most` that pages of a form can seal.
int64_t sealable(const PageForm& form, int64_t most) { return most / step(form) * step(form); }

TEST(attend_is_a_softmax_over_every_pair_of_forms) {
    constexpr int64_t size = 64, slots = 150;
    for (const Isa& isa : isas()) {
        Random random(10);
        std::vector<PageForm> forms = all_forms(size, 64, 64);
        forms.push_back({PageKind::grid, 16, size, 4, 32}), forms.push_back({PageKind::tiled_grid, 64, size, 2, 32});
        for (const PageForm& k : forms)
            for (const PageForm& v : forms) {
                const PageKind lands = random.of({PageKind::f32, PageKind::f16, PageKind::bf16});
                HeadForms mixed = landing({lands, 16, size, 0, 0}, {lands, 16, size, 0, 0});
                mixed.has_k_sealed = mixed.has_v_sealed = true, mixed.k_sealed = k, mixed.v_sealed = v;
                const Head head(random, isa, mixed, size, slots, sealable(k, random.between(64, slots)),
                                sealable(v, random.between(64, slots)), false);
                Queries asked = ask(random, head, random.between(1, 7));
                for (bool turned : {false, true}) {
                    asked.turned = turned;
                    check(isa, head, asked, 0, slots);
                }
            }
    }
}

TEST(attend_reads_thin_keys) {
    for (const Isa& isa : isas()) {
        Random random(11);
        for (int64_t size : {64, 80})
            for (int64_t width : {16, 39, 45, 61, 64})
                for (const PageForm& form : all_forms(width, 32, 16)) {
                    HeadForms forms = landing({PageKind::bf16, 16, size, 0, 0}, {PageKind::f16, 16, size, 0, 0});
                    forms.has_k_sealed = true, forms.k_sealed = form;
                    const Head head(random, isa, forms, size, 100, sealable(form, random.between(32, 100)), 0,
                                    random.below(4) > 0);
                    check(isa, head, ask(random, head, random.between(1, 9)), 0, head.slots);
                }
    }
}

// Everything at once: forms, sizes, borders, chosen pieces, positions, windows and rings, of as many queries as fit.
struct Fuzz {
    Random& random;
    const Isa& isa;

    HeadForms forms(int64_t size, bool thin) const {
        HeadForms made = landing(random_form(random, size, true), random_form(random, size, true));
        made.has_k_sealed = thin || random.coin(), made.has_v_sealed = random.coin();
        made.k_sealed = random_form(random, thin ? random.between(1, size) : size, false);
        made.v_sealed = random_form(random, size, false);
        return made;
    }

    void choose(Head& head) const {
        const int64_t tokens = random.of<int64_t>({1, 8, 16, 16, 24, 64}), pieces = (head.slots + tokens - 1) / tokens;
        std::vector<int32_t> chosen;
        const int64_t one_of = random.between(1, 4);
        for (int64_t i = 0; i < pieces; ++i)
            if (random.below(one_of) == 0) chosen.push_back(static_cast<int32_t>(i));
        if (!chosen.empty()) head.choose(chosen, tokens);
    }

    // Positions grow, but for a ring that has wrapped.
    void place(Head& head, Queries& asked) const {
        std::vector<int32_t> positions;
        for (int32_t p = 0; static_cast<int64_t>(positions.size()) < head.slots; ++p)
            if (random.below(3) > 0) positions.push_back(p);
        const int32_t newest = positions.back();
        if (random.coin())
            std::rotate(positions.begin() + head.slots / 4, positions.begin() + head.slots / 2, positions.end());
        head.place(positions);
        for (int64_t& now : asked.positions) now = newest + random.between(-3, 3);
        if (random.coin()) asked.window = random.between(1, newest + 2);
        if (random.coin()) asked.recent = random.between(1, newest + 2), asked.sink = random.below(9);
    }

    void run() const {
        const int64_t size = random.of<int64_t>({16, 32, 48, 64, 64, 80, 128, 144}),
                      slots = random.of<int64_t>({1, 3, 15, 16, 17, 63, 64, 65, 130, 200, 333});
        const bool thin = random.below(3) == 0;
        const HeadForms made = forms(size, thin);
        const int64_t k_border = made.has_k_sealed ? sealable(made.k_sealed, random.between(0, slots)) : 0;
        const int64_t v_border = made.has_v_sealed ? sealable(made.v_sealed, random.between(0, slots)) : 0;
        Head head(random, isa, made, size, slots, k_border, v_border, thin);
        Queries asked = ask(random, head, random.below(4) ? random.between(1, 9) : random.between(1, max_queries));
        if (random.below(3) == 0) asked.softcap = random.uniform(1, 30);
        if (random.below(3) == 0) choose(head);
        if (random.below(3) == 0)
            place(head, asked);
        else if (const int64_t window = random.of<int64_t>({0, 1, 7, 64, 100}))
            for (size_t n = 0; n < asked.count(); ++n) asked.low[n] = std::max<int64_t>(0, asked.high[n] - window);
        check(isa, head, asked, 0, slots);
        const int64_t first = random.below(slots);
        check(isa, head, asked, first, random.between(first, slots));
    }
};

TEST(attend_is_a_softmax_of_whatever_is_seen) {
    for (const Isa& isa : isas()) {
        Random random(12);
        for (int round = 0; round < 400; ++round) Fuzz{random, isa}.run();
    }
}

// Ranges of slots know nothing of each other, and yield the whole when they are joined.
TEST(attend_over_ranges_is_attention_over_all) {
    for (const Isa& isa : isas()) {
        Random random(13);
        for (int round = 0; round < 60; ++round) {
            const Fuzz fuzz{random, isa};
            const int64_t size = random.of<int64_t>({32, 64, 80}), slots = random.between(20, 300);
            const HeadForms forms = fuzz.forms(size, false);
            Head head(random, isa, forms, size, slots, forms.has_k_sealed ? sealable(forms.k_sealed, slots / 2) : 0,
                      forms.has_v_sealed ? sealable(forms.v_sealed, slots / 3) : 0, false);
            const Queries asked = ask(random, head, random.between(1, 12));
            const int64_t one = random.below(slots), other = random.between(one, slots);
            const Partial parts[] = {attend(isa, head, asked, 0, one), attend(isa, head, asked, one, other),
                                     attend(isa, head, asked, other, slots)};
            const double off = room(isa, forms);
            for (size_t n = 0; n < asked.count(); ++n) {
                const Exact wanted = exact(head, asked, n, 0, slots, nullptr);
                double weight = 0;
                std::vector<double> out(static_cast<size_t>(size));
                for (const Partial& part : parts) {
                    if (part.weight[n] == 0) continue;
                    const double by = std::exp((asked.unified ? phi : part.largest[n]) - wanted.top);
                    weight += by * part.weight[n];
                    for (size_t i = 0; i < out.size(); ++i) out[i] += by * part.out[n * out.size() + i];
                }
                CHECK(std::fabs(weight / wanted.weight - 1) < 2 * off, "%s: %s: %s", isa.name, head.name().c_str(),
                      asked.name().c_str());
                for (size_t i = 0; i < out.size(); ++i)
                    CHECK(std::fabs(out[i] / weight - wanted.out[i] / wanted.weight) < 3 * off,
                          "%s: %s: %s: %.9g, not %.9g", isa.name, head.name().c_str(), asked.name().c_str(),
                          out[i] / weight, wanted.out[i] / wanted.weight);
            }
        }
    }
}

// A rising score makes every block rescale what came before.
TEST(attend_follows_a_rising_maximum) {
    constexpr int64_t size = 16, keys = 300;
    for (const Isa& isa : isas())
        for (bool turned : {false, true}) {
            Random random(14);
            const PageForm form = {PageKind::f32, 64, size, 0, 0};
            Head head(random, isa, landing(form, form), size, keys, 0, 0, false);
            std::vector<float> k(keys * size), v(keys * size);
            double sum = 0, mean = 0;
            for (int64_t s = 0; s < keys; ++s) {
                k[static_cast<size_t>(s * size)] = static_cast<float>(s) * 0.25f;
                for (int64_t i = 0; i < size; ++i) v[static_cast<size_t>(s * size + i)] = static_cast<float>(s % 7);
                const double p = std::exp(0.25 * static_cast<double>(s - keys + 1));
                sum += p, mean += p * static_cast<double>(s % 7);
            }
            head.k_landing.write(isa, 0, keys, k.data()), head.v_landing.write(isa, 0, keys, v.data());
            Queries asked = ask(random, head, 5);
            asked.unified = false, asked.turned = turned, asked.scale = 1;
            for (size_t n = 0; n < asked.count(); ++n) asked.q[n].assign(size, 1), asked.high[n] = keys;
            const Partial made = attend(isa, head, asked, 0, keys);
            for (float y : made.largest) CHECK(y == 0.25f * (keys - 1), "%s: %g", isa.name, y);
            for (float y : made.weight) CHECK(std::fabs(y - sum) < 1e-5 * sum, "%s: %.9g, not %.9g", isa.name, y, sum);
            for (float y : made.out) CHECK(std::fabs(y - mean) < 1e-5 * sum, "%s: %.9g, not %.9g", isa.name, y, mean);
        }
}

// Sets whose registers hold eight floats agree bit for bit.
TEST(attend_gives_the_same_bits_with_registers_of_one_width) {
    for (const Isa& isa : isas()) {
        if (isa.words->lanes != isas()[0].words->lanes) continue;
        Random random(15);
        for (int round = 0; round < 100; ++round) {
            const int64_t size = random.of<int64_t>({32, 64, 128}), slots = random.between(1, 200);
            const HeadForms forms = Fuzz{random, isa}.forms(size, false);
            const Head head(random, isa, forms, size, slots,
                            forms.has_k_sealed ? sealable(forms.k_sealed, slots / 2) : 0,
                            forms.has_v_sealed ? sealable(forms.v_sealed, slots / 2) : 0, false);
            const Queries asked = ask(random, head, random.between(1, 12));
            const Partial one = attend(isas()[0], head, asked, 0, slots), other = attend(isa, head, asked, 0, slots);
            CHECK(one.out == other.out && one.weight == other.weight && one.largest == other.largest, "%s: %s: %s",
                  isa.name, head.name().c_str(), asked.name().c_str());
        }
    }
}

// Bounds enclose the keys of a piece as closely as bf16 allows, and promise a query what they allow at most.
TEST(bounds_of_pieces_hold_their_keys) {
    for (const Isa& isa : isas()) {
        Random random(16);
        for (int round = 0; round < 50; ++round) {
            const int64_t width = random.of<int64_t>({16, 48, 64, 512}), count = random.between(1, 20), pieces = 3;
            std::vector<uint16_t> bounds(static_cast<size_t>(2 * pieces * width));
            for (int64_t piece = 0; piece < pieces; ++piece) {
                const std::vector<float> keys = random.floats(count * width, random.of({-2.0f, 0.5f}), 1);
                uint16_t* least = bounds.data() + 2 * piece * width;
                isa.table->bound(keys.data(), count, width, least);
                for (int64_t i = 0; i < width; ++i) {
                    float low = keys[static_cast<size_t>(i)], high = low;
                    for (int64_t t = 1; t < count; ++t) {
                        low = std::min(low, keys[static_cast<size_t>(t * width + i)]);
                        high = std::max(high, keys[static_cast<size_t>(t * width + i)]);
                    }
                    const double below = bf16_value(least[i]), above = bf16_value(least[width + i]);
                    CHECK(below <= low && low - below <= std::fabs(low) / 128, "%s: %.9g for %.9g", isa.name, below,
                          low);
                    CHECK(above >= high && above - high <= std::fabs(high) / 128, "%s: %.9g for %.9g", isa.name, above,
                          high);
                }
            }
            const std::vector<float> negative = random.floats(width, -2, 0), positive = random.floats(width, 0, 2);
            std::vector<float> promised(pieces);
            isa.table->promise(negative.data(), positive.data(), bounds.data(), pieces, width, promised.data());
            for (size_t piece = 0; piece < promised.size(); ++piece) {
                double sum = 0, size = 0;
                for (size_t i = 0, w = negative.size(); i < w; ++i) {
                    const double low = bf16_value(bounds[2 * piece * w + i]),
                                 high = bf16_value(bounds[(2 * piece + 1) * w + i]);
                    sum += low * negative[i] + high * positive[i];
                    size += std::fabs(low * negative[i]) + std::fabs(high * positive[i]);
                }
                CHECK(std::fabs(promised[piece] - sum) < 1e-6 * size, "%s: %.9g, not %.9g", isa.name, promised[piece],
                      sum);
            }
        }
    }
}

}  // namespace
}  // namespace trimtab
