// Keys and values of one KV head in pages, some of them sealed, and attention over them in double precision. Legend: S
// slots, H head size, Q queries.
#pragma once
#include <string>
#include <vector>

#include "paged.h"

namespace trimtab {

struct Head {
    HeadForms forms;
    int64_t head_dim = 0, slots = 0;
    Paged k_landing, v_landing, k_sealed, v_sealed;
    std::vector<uint8_t> channels;   // kept by sealed keys; empty: the first ones
    std::vector<int32_t> positions;  // empty: slots are positions
    std::vector<int32_t> chosen;     // pieces that are read; empty: all
    std::vector<double> k, v;        // [S, H] what pages hold
    std::vector<int64_t> record;     // see Step::records

    // `borders`: slots of keys and of values that are sealed, of a tiled grid whole groups. Slots below lie in no
    // landing page, unless one holds later slots too.
    Head(Random& random, const Isa& isa, const HeadForms& made_of, int64_t size, int64_t count, int64_t k_border,
         int64_t v_border, bool thin);
    Head(const Head&) = delete;  // the record knows where everything lies
    void choose(std::vector<int32_t> pieces, int64_t tokens);
    void place(std::vector<int32_t> made);
    bool reads(int64_t slot) const;
    std::string name() const;
};

// What is asked of a head, and what comes back.
struct Queries {
    std::vector<std::vector<float>> q;
    std::vector<int64_t> low, high, positions;
    int64_t window = 0, recent = 0, sink = 0, beyond = 0;
    float scale = 1, softcap = 0, phi = 0;
    bool unified = false, turned = false;

    size_t count() const { return q.size(); }
    bool sees(const Head& head, size_t n, int64_t slot) const;
    std::string name() const;
};

struct Partial {
    std::vector<float> largest, weight, out;  // [Q], [Q], [Q, H]
};
Partial attend(const Isa& isa, const Head& head, const Queries& asked, int64_t first, int64_t last);

// Of one query over slots [first, last): the largest score, and sums of exp(score - shift), weighted by values [H].
struct Exact {
    double top = 0, weight = 0;
    std::vector<double> out;
    bool nothing = false;  // it sees no slot
};
Exact exact(const Head& head, const Queries& asked, size_t n, int64_t first, int64_t last, const double* shift);

}  // namespace trimtab
