#include "heads.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace trimtab {

Head::Head(Random& random, const Isa& isa, const HeadForms& made_of, int64_t size, int64_t count, int64_t k_border,
           int64_t v_border, bool thin)
    : forms(made_of), head_dim(size), slots(count), record(record_fields) {
    std::vector<int64_t> all(static_cast<size_t>(size));
    std::iota(all.begin(), all.end(), 0);
    std::vector<int64_t> whole = all;
    if (thin) {
        std::shuffle(all.begin(), all.end(), random.engine);
        all.resize(static_cast<size_t>(forms.k_sealed.width)), std::sort(all.begin(), all.end());
        channels.assign(all.begin(), all.end());
    }
    // Slots [first, end) of `paged`, and what it makes of them; which elements of a token it keeps.
    auto fill = [&](Paged& paged, const PageForm& form, int64_t first, int64_t end, const std::vector<int64_t>& kept,
                    std::vector<double>& value) {
        if (first >= end) return;
        paged = Paged(form, end);
        paged.write(isa, first, end - first, random.floats((end - first) * form.width, -1.5f, 1.5f).data());
        for (int64_t s = first; s < end; ++s)
            for (int64_t i = 0; i < form.width; ++i)
                value[static_cast<size_t>(s * size + kept[static_cast<size_t>(i)])] = paged.value(s, i);
        paged.drop(first);
    };
    k.assign(static_cast<size_t>(slots * size), 0), v = k;
    fill(k_landing, forms.k_landing, k_border, slots, whole, k);
    fill(v_landing, forms.v_landing, v_border, slots, whole, v);
    fill(k_sealed, forms.k_sealed, 0, k_border, all, k);
    fill(v_sealed, forms.v_sealed, 0, v_border, whole, v);
    record[0] = k_landing.address(), record[1] = v_landing.address();
    record[2] = k_sealed.address(), record[3] = v_sealed.address();
    record[4] = slots, record[5] = k_border, record[6] = v_border, record[9] = address_of(channels);
}

void Head::choose(std::vector<int32_t> pieces, int64_t tokens) {
    chosen = std::move(pieces);
    record[11] = address_of(chosen), record[12] = static_cast<int64_t>(chosen.size()), record[13] = tokens;
}

void Head::place(std::vector<int32_t> made) {
    positions = std::move(made);
    record[10] = address_of(positions);
}

bool Head::reads(int64_t slot) const {
    return chosen.empty() || std::count(chosen.begin(), chosen.end(), static_cast<int32_t>(slot / record[13]));
}

std::string Head::name() const {
    std::string text = "keys " + trimtab::name(forms.k_landing) + ", values " + trimtab::name(forms.v_landing);
    if (record[5]) text += ", " + std::to_string(record[5]) + " keys " + trimtab::name(forms.k_sealed);
    if (record[6]) text += ", " + std::to_string(record[6]) + " values " + trimtab::name(forms.v_sealed);
    if (!channels.empty()) text += ", thin";
    if (!positions.empty()) text += ", positions";
    if (!chosen.empty()) text += ", " + std::to_string(record[12]) + " pieces of " + std::to_string(record[13]);
    return text + ", head_dim=" + std::to_string(head_dim) + " slots=" + std::to_string(slots);
}

bool Queries::sees(const Head& head, size_t n, int64_t slot) const {
    if (slot < low[n] || slot >= high[n] || !head.reads(slot)) return false;
    if (head.positions.empty()) return true;
    const int64_t p = head.positions[static_cast<size_t>(slot)], now = positions[n];
    return p <= now && (window == 0 || p > now - window) && (recent == 0 || p < sink || p > now - recent);
}

std::string Queries::name() const {
    return "queries=" + std::to_string(count()) + " window=" + std::to_string(window) +
           " recent=" + std::to_string(recent) + " sink=" + std::to_string(sink) +
           " softcap=" + std::to_string(softcap) + " unified=" + std::to_string(unified) +
           " turned=" + std::to_string(turned);
}

Partial attend(const Isa& isa, const Head& head, const Queries& asked, int64_t first, int64_t last) {
    Partial made;
    made.largest.resize(asked.count()), made.weight.resize(asked.count());
    made.out.assign(asked.count() * static_cast<size_t>(head.head_dim), 7);
    std::vector<const float*> q;
    for (const auto& row : asked.q) q.push_back(row.data());
    AttendHead a;
    a.kv = head_view(head.record.data(), head.forms);
    a.head_dim = head.head_dim, a.first = first, a.last = last, a.beyond = asked.beyond;
    a.queries = static_cast<int>(asked.count()), a.q = q.data();
    a.low = asked.low.data(), a.high = asked.high.data(), a.positions = asked.positions.data();
    a.window = asked.window, a.recent = asked.recent, a.sink = asked.sink;
    a.scale = asked.scale, a.softcap = asked.softcap, a.turned = asked.turned;
    a.unified = asked.unified, a.phi = asked.phi;
    a.largest = made.largest.data(), a.weight = made.weight.data(), a.out = made.out.data();
    isa.table->attend_head(a);
    return made;
}

Exact exact(const Head& head, const Queries& asked, size_t n, int64_t first, int64_t last, const double* shift) {
    Exact made;
    made.out.assign(static_cast<size_t>(head.head_dim), 0);
    made.top = -std::numeric_limits<double>::infinity();
    std::vector<int64_t> seen;
    std::vector<double> scores;
    for (int64_t s = first; s < last; ++s) {
        if (!asked.sees(head, n, s)) continue;
        double x = 0;
        for (int64_t i = 0; i < head.head_dim; ++i)
            x += asked.q[n][static_cast<size_t>(i)] * head.k[static_cast<size_t>(s * head.head_dim + i)];
        x *= asked.scale;
        if (asked.softcap > 0) x = asked.softcap * std::tanh(x / asked.softcap);
        seen.push_back(s), scores.push_back(x), made.top = std::max(made.top, x);
    }
    made.nothing = seen.empty();
    for (size_t j = 0; j < seen.size(); ++j) {
        const double p = std::exp(scores[j] - (shift ? *shift : made.top));
        made.weight += p;
        for (int64_t i = 0; i < head.head_dim; ++i)
            made.out[static_cast<size_t>(i)] += p * head.v[static_cast<size_t>(seen[j] * head.head_dim + i)];
    }
    return made;
}

}  // namespace trimtab
