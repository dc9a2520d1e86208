// Steps of one layer of attention over pages, as records tell of them: what is written, read, sealed and counted.
// Legend: B rows, N query heads, G KV heads, H head size.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>
#include <stdexcept>

#include "check.h"
#include "heads.h"

namespace trimtab {
namespace {

constexpr int64_t room = 220;  // slots a head has pages for

enum Side { keys, values };

int64_t at(const std::vector<int64_t>& list, int64_t i) { return list[static_cast<size_t>(i)]; }

// One KV head of one row between steps.
struct State {
    HeadForms forms;
    Paged landing[2], sealed[2];
    int64_t held = 0, border[2] = {0, 0}, after[2] = {0, 0};  // slots in use, and those that are sealed
    std::vector<uint8_t> channels;
    std::vector<int32_t> positions, chosen;
    std::vector<uint16_t> bounds;  // not empty: a pass of one token chooses what it reads, `most` pieces
    int64_t chosen_tokens = 16, most = 0;

    bool seals(int side) const { return side == keys ? forms.has_k_sealed : forms.has_v_sealed; }
    double value(int side, int64_t slot, int64_t i) const {
        if (slot >= border[side]) return landing[side].value(slot, i);
        if (side == values || channels.empty()) return i < sealed[side].form.width ? sealed[side].value(slot, i) : 0;
        const auto found = std::find(channels.begin(), channels.end(), static_cast<uint8_t>(i));
        return found == channels.end() ? 0 : sealed[side].value(slot, found - channels.begin());
    }
    bool reads(int64_t slot) const {
        return chosen.empty() || std::count(chosen.begin(), chosen.end(), static_cast<int32_t>(slot / chosen_tokens));
    }
};

struct Made {
    std::vector<std::vector<float>> outs, queries;  // of each step
    std::vector<int64_t> counts;
    std::vector<std::vector<uint8_t>> pages;
    int64_t recomputed = 0;
    bool operator==(const Made& other) const {
        return outs == other.outs && queries == other.queries && counts == other.counts && pages == other.pages &&
               recomputed == other.recomputed;
    }
};

class Scenario {
  public:
    Scenario(uint64_t seed, const Isa& isa, int threads)
        : random_(seed), isa_(isa), what_(std::string(isa.name) + " seed=" + std::to_string(seed)), program_(threads) {
        rows_ = random_.between(1, 3), kv_heads_ = random_.between(1, 3), heads_ = kv_heads_ * random_.between(1, 4);
        head_dim_ = random_.of<int64_t>({16, 32, 64}), watched_ = random_.of<int64_t>({0, 1, 4});
        window_ = random_.below(3) ? 0 : random_.between(1, 80);
        evicts_ = random_.coin();
        if (window_ == 0 && random_.coin())
            prompt_local_ = random_.between(1, 60), prompt_sink_ = random_.of<int64_t>({0, 4, 40});
        Attention a;
        a.heads = heads_, a.kv_heads = kv_heads_, a.head_dim = head_dim_, a.window = window_;
        a.scale = 1.0f / std::sqrt(static_cast<float>(head_dim_)), a.softcap = random_.below(3) ? 0 : 20;
        a.prompt_sink = prompt_sink_, a.prompt_local = prompt_local_;
        a.unified = random_.coin(), a.phi = 0.5f, a.low = -0.25f, a.high = 0.5f;  // narrow: some are computed again
        a.qkv = program_.add_values(width(), false), a.out = program_.add_values(heads_ * head_dim_, false);
        std::vector<HeadForms> forms;
        for (int64_t g = 0; g < kv_heads_; ++g) forms.push_back(random_forms());
        program_.attend_heads("attend", a, forms), program_.split(random_.of<int64_t>({0, 16, 48}));
        program_.watch(watched_);
        attention_ = a;
        for (int64_t i = 0; i < rows_ * kv_heads_; ++i)
            states_.push_back(fresh(forms[static_cast<size_t>(i % kv_heads_)]));
        past_.assign(static_cast<size_t>(rows_), 0);
    }

    Made run(bool checked) {
        Made made;
        for (int step = 0; step < 6; ++step) {
            std::vector<int64_t> starts = {0};
            for (int64_t row = 0; row < rows_; ++row)
                starts.push_back(starts.back() + (step % 2 ? 1 : random_.of<int64_t>({1, 2, 9, 70})));
            pass(starts, checked, made);
        }
        for (const State& state : states_)
            for (const auto* side :
                 {&state.landing[keys], &state.landing[values], &state.sealed[keys], &state.sealed[values]})
                made.pages.insert(made.pages.end(), side->pages.begin(), side->pages.end());
        made.recomputed = program_.recomputed.load();
        return made;
    }

  private:
    int64_t width() const { return (heads_ + 2 * kv_heads_) * head_dim_; }
    State& state(int64_t row, int64_t g) { return states_[static_cast<size_t>(row * kv_heads_ + g)]; }

    HeadForms random_forms() {
        HeadForms forms;
        forms.k_landing = random_form(random_, head_dim_, true),
        forms.v_landing = random_form(random_, head_dim_, true);
        forms.has_k_sealed = random_.coin(), forms.has_v_sealed = random_.coin();
        const bool thin = random_.coin();
        forms.k_sealed = random_form(random_, thin ? random_.between(1, head_dim_) : head_dim_, false);
        forms.v_sealed = random_form(random_, head_dim_, false);
        if (random_.below(3)) return forms;
        forms.recent = random_.between(1, 90), forms.sink = random_.below(5);
        forms.has_k_sealed = forms.has_v_sealed = false;  // a ring is not sealed
        return forms;
    }

    State fresh(const HeadForms& forms) {
        State s;
        s.forms = forms;
        s.landing[keys] = Paged(forms.k_landing, room), s.landing[values] = Paged(forms.v_landing, room);
        if (forms.has_k_sealed) s.sealed[keys] = Paged(forms.k_sealed, room);
        if (forms.has_v_sealed) s.sealed[values] = Paged(forms.v_sealed, room);
        if (forms.has_k_sealed && random_.below(3)) {
            std::vector<uint8_t> all(static_cast<size_t>(head_dim_));
            std::iota(all.begin(), all.end(), uint8_t{0});
            std::shuffle(all.begin(), all.end(), random_.engine);
            s.channels.assign(all.begin(), all.begin() + forms.k_sealed.width);
            std::sort(s.channels.begin(), s.channels.end());
        }
        if (evicts_ || random_.coin()) s.positions.assign(room, 0);
        if (!forms.has_k_sealed && forms.recent == 0 && random_.coin()) {
            s.most = random_.between(1, 6), s.chosen_tokens = random_.of<int64_t>({8, 16, 20});
            s.bounds.assign(static_cast<size_t>((room / s.chosen_tokens + 1) * 2 * head_dim_), 0xffff);
        }
        return s;
    }

    // Fills in the record of one head for a pass that adds `count` tokens.
    void tell(State& s, int64_t position, int64_t count, int64_t* record) {
        // The newest tokens go, as far as they are not sealed: what is left lies in other slots than its positions.
        if (evicts_ && random_.below(3) == 0)
            s.held = random_.between(std::max(s.border[keys], s.border[values]), s.held);
        const int64_t readable = s.held + count;
        for (int64_t t = 0; t < count && !s.positions.empty(); ++t)
            s.positions[static_cast<size_t>(s.held + t)] = static_cast<int32_t>(position + t);
        s.chosen.clear();
        if (s.most == 0) s.chosen_tokens = random_.of<int64_t>({1, 8, 16, 20});
        if (s.most == 0 && s.forms.recent == 0 && prompt_local_ == 0 && random_.below(3) == 0)
            for (int64_t piece = 0; piece * s.chosen_tokens < readable; ++piece)
                if (random_.coin() || (piece + 1) * s.chosen_tokens > s.held)
                    s.chosen.push_back(static_cast<int32_t>(piece));
        for (int side : {keys, values}) {
            const int64_t by = step(side == keys ? s.forms.k_sealed : s.forms.v_sealed);
            s.after[side] = s.border[side];
            if (s.seals(side)) s.after[side] += random_.between(0, readable - s.border[side]) / by * by;
            record[side] = s.landing[side].address(), record[2 + side] = s.sealed[side].address();
            record[5 + side] = s.border[side], record[7 + side] = s.after[side];
        }
        record[4] = readable, record[9] = address_of(s.channels), record[10] = address_of(s.positions);
        record[11] = address_of(s.chosen), record[12] = static_cast<int64_t>(s.chosen.size());
        record[13] = s.chosen_tokens, record[14] = s.held;
        if (s.most) record[12] = s.most, record[15] = address_of(s.bounds);
    }

    void pass(const std::vector<int64_t>& starts, bool checked, Made& made) {
        std::vector<int64_t> records(static_cast<size_t>(rows_ * kv_heads_ * record_fields));
        for (int64_t row = 0; row < rows_; ++row)
            for (int64_t g = 0; g < kv_heads_; ++g)
                tell(state(row, g), at(past_, row), at(starts, row + 1) - at(starts, row),
                     records.data() + (row * kv_heads_ + g) * record_fields);
        const std::vector<float> x = random_.floats(starts.back() * width(), -1.5f, 1.5f);
        std::vector<float> out(static_cast<size_t>(starts.back() * heads_ * head_dim_));
        Step step;
        step.tokens = starts.back(), step.rows = rows_, step.starts = starts.data(), step.past = past_.data();
        step.records = records.data(), step.record_heads = kv_heads_;
        whole_.clear();
        for (int64_t row = 0; row < rows_; ++row) whole_.push_back(random_.below(3) ? 0 : random_.below(20));
        step.whole = whole_.data();
        program_.run_on(step, attention_.qkv, x.data(), attention_.out, out.data());
        const Kernel& kernel = *program_.kernels()[0];
        for (const auto* count : {&kernel.weight_read, &kernel.kv_read, &kernel.kv_written, &kernel.flops})
            made.counts.push_back(count->load());
        if (checked) {
            choose(starts, x), check_pages(starts, x), check_outputs(starts, x, out), check_counts(starts, kernel),
                check_queries(starts, x);
        }
        made.outs.push_back(out), made.queries.push_back(*program_.watched(0).queries);
        for (int64_t row = 0; row < rows_; ++row) {
            const int64_t count = at(starts, row + 1) - at(starts, row);
            past_[static_cast<size_t>(row)] += count;
            for (int64_t g = 0; g < kv_heads_; ++g) {
                State& s = state(row, g);
                s.held += count;
                for (int side : {keys, values}) s.border[side] = s.after[side], s.landing[side].drop(s.border[side]);
            }
        }
    }

    // The new tokens are in landing pages, and what has been sealed is what these held.
    void check_pages(const std::vector<int64_t>& starts, const std::vector<float>& x) {
        for (int64_t row = 0; row < rows_; ++row)
            for (int64_t g = 0; g < kv_heads_; ++g)
                for (int side : {keys, values}) {
                    State& s = state(row, g);
                    const Paged &from = s.landing[side], &to = s.sealed[side];
                    for (int64_t t = at(starts, row); t < at(starts, row + 1); ++t) {
                        const float* token = x.data() + t * width() + (heads_ + side * kv_heads_ + g) * head_dim_;
                        const int64_t slot = s.held + t - at(starts, row), by = from.form.group ? from.form.group : 1;
                        for (int64_t i = 0; i < head_dim_; ++i) {
                            const int64_t first = i / by * by;
                            const double wanted =
                                kept(from.form, token + first, std::min(by, head_dim_ - first), i - first);
                            CHECK(from.value(slot, i) == wanted, "%s: %s slot %d element %d: %.9g, not %.9g",
                                  what_.c_str(), name(from.form).c_str(), static_cast<int>(slot), static_cast<int>(i),
                                  from.value(slot, i), wanted);
                        }
                    }
                    if (s.after[side] == s.border[side]) continue;
                    std::vector<float> rows;
                    for (int64_t slot = s.border[side]; slot < s.after[side]; ++slot)
                        for (int64_t i = 0; i < to.form.width; ++i) {
                            const bool picks = side == keys && !s.channels.empty();
                            rows.push_back(
                                static_cast<float>(from.value(slot, picks ? s.channels[static_cast<size_t>(i)] : i)));
                        }
                    Paged alike(to.form, s.after[side]);
                    alike.write(isa_, s.border[side], s.after[side] - s.border[side], rows.data());
                    for (int64_t slot = s.border[side]; slot < s.after[side]; ++slot)
                        for (int64_t i = 0; i < to.form.width; ++i)
                            CHECK(to.value(slot, i) == alike.value(slot, i),
                                  "%s: %s sealed slot %d element %d: %.9g, not %.9g", what_.c_str(),
                                  name(to.form).c_str(), static_cast<int>(slot), static_cast<int>(i), to.value(slot, i),
                                  alike.value(slot, i));
                }
    }

    // What a head with bounds reads for a single token: pieces whose bounds promise one of its queries the largest product.
    void choose(const std::vector<int64_t>& starts, const std::vector<float>& x) {
        for (int64_t row = 0; row < rows_; ++row)
            for (int64_t g = 0; g < kv_heads_; ++g) {
                State& s = state(row, g);
                const int64_t held = s.held + 1, pieces = (held + s.chosen_tokens - 1) / s.chosen_tokens,
                              per = heads_ / kv_heads_;
                if (at(starts, row + 1) - at(starts, row) != 1 || s.most == 0 || pieces <= s.most) continue;
                std::vector<std::pair<double, int32_t>> promised;
                for (int64_t piece = 0; piece + 1 < pieces; ++piece) {
                    std::vector<double> products(static_cast<size_t>(per));
                    for (int64_t i = 0; i < head_dim_; ++i) {
                        double least = s.value(keys, piece * s.chosen_tokens, i), most = least;
                        for (int64_t slot = piece * s.chosen_tokens; slot < (piece + 1) * s.chosen_tokens; ++slot)
                            least = std::min(least, s.value(keys, slot, i)),
                            most = std::max(most, s.value(keys, slot, i));
                        for (int64_t n = 0; n < per; ++n) {
                            const double q =
                                x[static_cast<size_t>(at(starts, row) * width() + (g * per + n) * head_dim_ + i)];
                            products[static_cast<size_t>(n)] +=
                                std::max(q, 0.0) * outwards(most, 1) + std::min(q, 0.0) * outwards(least, -1);
                        }
                    }
                    promised.emplace_back(-*std::max_element(products.begin(), products.end()), static_cast<int32_t>(piece));
                }
                std::sort(promised.begin(), promised.end());
                for (int64_t i = 0; i + 1 < s.most; ++i) s.chosen.push_back(promised[static_cast<size_t>(i)].second);
                s.chosen.push_back(static_cast<int32_t>(pieces - 1));
            }
    }

    // The nearest bf16 that is no smaller (towards 1) or no larger (towards -1).
    static double outwards(double x, int towards) {
        uint16_t bits = nearest_bf16(static_cast<float>(x));
        if (towards * (x - bf16_value(bits)) > 0)
            bits = static_cast<uint16_t>(bits + ((bits >> 15) == (towards > 0 ? 0 : 1) ? 1 : -1));
        return bf16_value(bits);
    }

    // Whether a pattern hides keys from token t of a row.
    bool patterned(const std::vector<int64_t>& starts, int64_t row, int64_t t) const {
        const int64_t end = at(starts, row + 1);
        return prompt_local_ > 0 && end - at(starts, row) > 1 && t < end - at(whole_, row);
    }

    bool sees(const State& s, int64_t now, int64_t high, int64_t slot) const {
        if (slot >= high || !s.reads(slot)) return false;
        if (s.positions.empty()) return window_ == 0 || slot > now - window_;
        const int64_t p = s.positions[static_cast<size_t>(slot)];
        const bool in_ring = s.forms.recent == 0 || p < s.forms.sink || p > now - s.forms.recent;
        return p <= now && (window_ == 0 || p > now - window_) && in_ring;
    }

    void check_outputs(const std::vector<int64_t>& starts, const std::vector<float>& x, const std::vector<float>& out) {
        for (int64_t row = 0; row < rows_; ++row)
            for (int64_t head = 0; head < heads_; ++head) {
                const State& s = state(row, head / (heads_ / kv_heads_));
                const int64_t first = at(starts, row), end = at(starts, row + 1);
                const int64_t readable = s.held + end - first;
                std::vector<double> k, v;
                for (int64_t slot = 0; slot < readable; ++slot)
                    for (int64_t i = 0; i < head_dim_; ++i)
                        k.push_back(s.value(keys, slot, i)), v.push_back(s.value(values, slot, i));
                for (int64_t t = first; t < end; ++t) {
                    const float* q = x.data() + t * width() + head * head_dim_;
                    double weight = 0;
                    std::vector<double> mean(static_cast<size_t>(head_dim_));
                    for (int64_t slot = 0; slot < readable; ++slot) {
                        const int64_t high = readable - (end - 1 - t);
                        if (!sees(s, at(past_, row) + t - first, high, slot)) continue;
                        if (patterned(starts, row, t) && slot >= prompt_sink_ && slot < high - prompt_local_) continue;
                        double score = 0;
                        for (int64_t i = 0; i < head_dim_; ++i)
                            score += q[i] * k[static_cast<size_t>(slot * head_dim_ + i)];
                        score *= attention_.scale;
                        if (attention_.softcap > 0) score = attention_.softcap * std::tanh(score / attention_.softcap);
                        const double p = std::exp(score);
                        weight += p;
                        for (int64_t i = 0; i < head_dim_; ++i)
                            mean[static_cast<size_t>(i)] += p * v[static_cast<size_t>(slot * head_dim_ + i)];
                    }
                    for (int64_t i = 0; i < head_dim_; ++i) {
                        const double y = out[static_cast<size_t>((t * heads_ + head) * head_dim_ + i)],
                                     wanted = mean[static_cast<size_t>(i)] / weight;
                        // Codes of a few bits may be multiplied in 16-bit integers.
                        CHECK(std::fabs(y - wanted) < (isa_.words->lanes == 16 ? 1e-3 : 4e-5),
                              "%s: row %d token %d head %d value %d: %.9g, not %.9g", what_.c_str(),
                              static_cast<int>(row), static_cast<int>(t - first), static_cast<int>(head),
                              static_cast<int>(i), y, wanted);
                    }
                }
            }
    }

    // Every stored token in view is read once, with the scales it shares; new tokens and sealed ones are written.
    void check_counts(const std::vector<int64_t>& starts, const Kernel& kernel) {
        int64_t read = 0, written = 0;
        for (int64_t row = 0; row < rows_; ++row)
            for (int64_t g = 0; g < kv_heads_; ++g)
                for (int side : {keys, values}) {
                    const State& s = state(row, g);
                    const int64_t count = at(starts, row + 1) - at(starts, row);
                    written +=
                        s.landing[side].form.nbytes(count) + s.sealed[side].form.nbytes(s.after[side] - s.border[side]);
                    const int64_t past = at(past_, row), readable = s.held + count;
                    const int64_t oldest =
                        window_ && s.positions.empty() ? std::max<int64_t>(0, past + 1 - window_) : 0;
                    const bool hides = patterned(starts, row, at(starts, row)) && at(whole_, row) == 0;
                    if (s.most && side == keys && count == 1)
                        read += (readable + s.chosen_tokens - 1) / s.chosen_tokens * 4 * head_dim_;
                    std::set<int64_t> groups;
                    for (int64_t slot = oldest; slot < readable; ++slot) {
                        if (!s.reads(slot) || (hides && slot >= prompt_sink_ && slot < s.held + 1 - prompt_local_))
                            continue;
                        // What leaves a ring with the first of several new tokens is not read.
                        const bool ring =
                            !hides && count > 1 && s.forms.recent > 0 && !s.positions.empty() && slot < s.held;
                        const int64_t p = ring ? s.positions[static_cast<size_t>(slot)] : 0;
                        if (ring && p >= s.forms.sink && p <= past - s.forms.recent) continue;
                        const PageForm& form = slot < s.border[side] ? s.sealed[side].form : s.landing[side].form;
                        const bool shared = form.kind == PageKind::tiled_grid;
                        read += form.row_bytes() + (shared ? 0 : form.scale_bytes(1));
                        if (shared && groups.insert(slot / form.group).second) read += 4 * form.width;
                    }
                }
        CHECK(kernel.kv_read == read && kernel.kv_written == written,
              "%s: %lld bytes read, not %lld, and %lld written, not %lld", what_.c_str(),
              static_cast<long long>(kernel.kv_read), static_cast<long long>(read),
              static_cast<long long>(kernel.kv_written), static_cast<long long>(written));
    }

    void check_queries(const std::vector<int64_t>& starts, const std::vector<float>& x) {
        const std::vector<float>& found = *program_.watched(0).queries;
        const int64_t size = heads_ * head_dim_;
        CHECK(static_cast<int64_t>(found.size()) == rows_ * watched_ * size, "%s", what_.c_str());
        for (int64_t row = 0; row < rows_; ++row)
            for (int64_t place = 0; place < watched_; ++place)
                for (int64_t i = 0; i < size; ++i) {
                    const int64_t t = at(starts, row + 1) - watched_ + place;
                    const float wanted = t < at(starts, row) ? 0 : x[static_cast<size_t>(t * width() + i)];
                    CHECK(found[static_cast<size_t>((row * watched_ + place) * size + i)] == wanted,
                          "%s: query %d of row %d", what_.c_str(), static_cast<int>(place), static_cast<int>(row));
                }
    }

    Random random_;
    const Isa& isa_;
    std::string what_;
    Program program_;
    Attention attention_;
    int64_t rows_, kv_heads_, heads_, head_dim_, watched_, window_;
    int64_t prompt_sink_ = 0, prompt_local_ = 0;
    bool evicts_;
    std::vector<State> states_;          // [B, G]
    std::vector<int64_t> past_, whole_;  // [B]
};

TEST(steps_over_records_do_what_these_tell) {
    int64_t recomputed = 0;
    for (const Isa& isa : isas()) {
        use(isa);
        const uint64_t first = static_cast<uint64_t>(&isa - isas().data()) * 100;
        for (uint64_t seed = first; seed < first + 20; ++seed) {
            const Made one = Scenario(seed, isa, 1).run(true);
            recomputed += one.recomputed;
            for (int threads : {2, 3})
                CHECK(Scenario(seed, isa, threads).run(false) == one, "%s seed=%d: %d threads change the result",
                      isa.name, static_cast<int>(seed), threads);
        }
    }
    CHECK(recomputed > 0, "no query left the range of its unified maximum");
    use(isas()[0]);
}

TEST(a_step_reports_what_its_pages_cannot_hold) {
    for (const Isa& isa : isas()) {
        use(isa);
        for (bool lands : {false, true})
            for (float bad : {1.0f, -1e6f}) {
                const PageForm floats = {PageKind::f32, 16, 16, 0, 0}, grid = {PageKind::grid, 16, 16, 8, 16};
                HeadForms forms;
                forms.k_landing = floats, forms.v_landing = lands ? grid : floats;
                forms.has_v_sealed = !lands, forms.v_sealed = grid;
                Program program(2);
                Attention a;
                a.heads = a.kv_heads = 1, a.head_dim = 16;
                a.qkv = program.add_values(48, false), a.out = program.add_values(16, false);
                program.attend_heads("attend", a, {forms});
                Paged k(floats, 16), v(forms.v_landing, 16), sealed(grid, 16);
                const int64_t starts[] = {0, 3}, past[] = {0};
                const int64_t record[record_fields] = {k.address(), v.address(), 0, sealed.address(), 3,
                                                       0,           0,           0, lands ? 0 : 3};
                std::vector<float> x(3 * 48, 0.5f), y(3 * 16);
                x[2 * 48 + 40] = bad;
                Step step;
                step.tokens = 3, step.rows = 1, step.starts = starts, step.past = past, step.records = record,
                step.record_heads = 1;
                bool reported = false;
                try {
                    program.run_on(step, a.qkv, x.data(), a.out, y.data());
                } catch (const std::invalid_argument&) {
                    reported = true;
                }
                CHECK(reported == (bad < 0), "%s: %g was %sreported", isa.name, bad, reported ? "" : "not ");
            }
    }
    use(isas()[0]);
}

}  // namespace
}  // namespace trimtab
