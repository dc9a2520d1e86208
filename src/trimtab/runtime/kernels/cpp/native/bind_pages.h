// What the bindings of pages and those of programs share.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>

#include <optional>
#include <tuple>

#include "native/program.h"

namespace trimtab {

// Kind, tokens of a page, elements of a token, bits of a code, elements that share a scale, bytes from token to token (0: dense).
using FormTuple = std::tuple<int, int64_t, int64_t, int, int64_t, int64_t>;

// Throws std::invalid_argument where that is no form.
PageForm page_form(const FormTuple& form);

// Of one KV head: keys and values as they land, sealed keys and values, sink and recent of a ring.
using FormsTuple = std::tuple<FormTuple, FormTuple, std::optional<FormTuple>, std::optional<FormTuple>, int64_t, int64_t>;

HeadForms head_forms(const FormsTuple& forms, int64_t head_dim);

void bind_pages(nanobind::module_& m);
void bind_slots(nanobind::module_& m);

}  // namespace trimtab
