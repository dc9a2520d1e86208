// Pages of the cache, and what they hold, read as native/pages.h describes their layout. Legend: S slots, H head size,
// W elements of a token that are stored.
#pragma once
#include <string>
#include <vector>

#include "isas.h"
#include "matrices.h"
#include "native/program.h"

namespace trimtab {

std::string name(const PageForm& form);
inline int64_t step(const PageForm& form) {
    return form.kind == PageKind::tiled_grid ? form.group : 1;
}  // tokens written at once

// Every kind of form, of codes in all their widths: pages of tiles have `page` tokens, others `odd`.
std::vector<PageForm> all_forms(int64_t width, int64_t page, int64_t odd);
// Of any kind; a form that tokens land in takes them one by one.
PageForm random_form(Random& random, int64_t width, bool lands);

double f8_value(uint8_t bits);  // e4m3
// Element i of a token of a page: exact, as every form's values fit in a double.
double stored(const PageForm& form, const uint8_t* page, int64_t token, int64_t i);
// What element i of a group of neighbours [count] becomes in pages of a form.
double kept(const PageForm& form, const float* group, int64_t count, int64_t i);

// Pages for slots 0 .. S - 1, each exactly as long as it must be, so that a read behind one is seen. What has not been
// written is no number.
struct Paged {
    PageForm form;
    std::vector<std::vector<uint8_t>> pages;
    std::vector<int64_t> table;  // addresses by page; 0 where there is none

    Paged() = default;
    Paged(const PageForm& made_of, int64_t slots);
    Paged(Paged&&) = default;  // pages keep their addresses
    Paged& operator=(Paged&&) = default;

    // Writes tokens x [count, W] from slot `first` on; of a tiled grid whole groups.
    bool write(const Isa& isa, int64_t first, int64_t count, const float* x);
    double value(int64_t slot, int64_t i) const {
        return stored(form, pages[static_cast<size_t>(slot / form.page)].data(), slot % form.page, i);
    }
    void drop(int64_t slots);  // frees pages that hold nothing but slots below
    int64_t address() const { return static_cast<int64_t>(reinterpret_cast<uintptr_t>(table.data())); }
};

template <class T>
int64_t address_of(const std::vector<T>& array) {
    return array.empty() ? 0 : static_cast<int64_t>(reinterpret_cast<uintptr_t>(array.data()));
}

}  // namespace trimtab
