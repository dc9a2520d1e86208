// Python bindings of pages of the cache, for tests and for what a store does between passes. Tables hold addresses of pages by page
// index, 0 where there is none; the GIL is released.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <cstring>
#include <string>

#include "native/bind_pages.h"

namespace nb = nanobind;

namespace trimtab {

PageForm page_form(const FormTuple& form) {
    const auto& [kind, page, width, bits, group, stride] = form;
    PageForm made;
    made.kind = static_cast<PageKind>(kind), made.page = page, made.width = width, made.bits = bits, made.group = group, made.stride = stride;
    made.check();
    return made;
}

HeadForms head_forms(const FormsTuple& forms, int64_t head_dim) {
    const auto& [k_landing, v_landing, k_sealed, v_sealed, sink, recent] = forms;
    HeadForms made;
    made.k_landing = page_form(k_landing), made.v_landing = page_form(v_landing);
    if (k_sealed) made.has_k_sealed = true, made.k_sealed = page_form(*k_sealed);
    if (v_sealed) made.has_v_sealed = true, made.v_sealed = page_form(*v_sealed);
    made.sink = sink, made.recent = recent;
    const bool whole = made.k_landing.width == head_dim && made.v_landing.width == head_dim && (!v_sealed || made.v_sealed.width == head_dim);
    if (!whole || (k_sealed && made.k_sealed.width > head_dim)) throw std::invalid_argument("Page forms and head size do not agree.");
    for (const PageForm* landing : {&made.k_landing, &made.v_landing})
        if (landing->kind == PageKind::tiled_grid) throw std::invalid_argument("Tokens land one by one, and a tiled grid takes whole groups of them.");
    if (head_dim % 16 || head_dim < 16 || head_dim > max_head_dim) throw std::invalid_argument("A head has a multiple of 16 elements, up to 512.");
    return made;
}

namespace {

template <class T, int N>
using Array = nb::ndarray<T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
using Table = Array<const int64_t, 2>;

void need(bool holds, const char* text) {
    if (!holds) throw std::invalid_argument(text);
}

// The page that holds a slot of head g.
uint8_t* page_of(const Table& table, const PageForm& form, int64_t g, int64_t slot) {
    const int64_t index = slot / form.page;
    const bool within = slot >= 0 && index < static_cast<int64_t>(table.shape(1));
    const int64_t address = within ? table.data()[g * static_cast<int64_t>(table.shape(1)) + index] : 0;
    if (!address) throw std::invalid_argument("Head " + std::to_string(g) + " has no page for slot " + std::to_string(slot) + ".");
    return const_cast<uint8_t*>(page_at(address));
}

// f(page, first token inside it, tokens, tokens before) for every page of slots [first, first + count) of head g.
template <class F>
void by_page(const Table& table, const PageForm& form, int64_t g, int64_t first, int64_t count, F f) {
    for (int64_t done = 0; done < count;) {
        const int64_t inside = (first + done) % form.page, some = std::min(form.page - inside, count - done);
        f(page_of(table, form, g, first + done), inside, some, done);
        done += some;
    }
}

bool encode_pages(const FormTuple& tuple, Table table, int64_t first, Array<const float, 3> x) {
    const PageForm form = page_form(tuple);
    const int64_t heads = static_cast<int64_t>(x.shape(0)), count = static_cast<int64_t>(x.shape(1));
    need(heads == static_cast<int64_t>(table.shape(0)), "encode_pages: table and values have different numbers of heads.");
    need(form.width == static_cast<int64_t>(x.shape(2)), "encode_pages: values are not as wide as the page form.");
    need(form.kind != PageKind::tiled_grid || (first % form.group == 0 && count % form.group == 0),
         "encode_pages: a tiled grid takes whole groups of tokens.");
    nb::gil_scoped_release release;
    bool held = true;
    for (int64_t g = 0; g < heads; ++g)
        by_page(table, form, g, first, count, [&](uint8_t* page, int64_t inside, int64_t some, int64_t done) {
            const float* from = x.data() + (g * count + done) * form.width;
            held = tile_kernels().encode_page(form, page, inside, some, from, form.width) && held;
        });
    return held;
}

void decode_pages(const FormTuple& tuple, Table table, int64_t first, int64_t count, Array<float, 3> out) {
    const PageForm form = page_form(tuple);
    const int64_t heads = static_cast<int64_t>(out.shape(0));
    need(heads == static_cast<int64_t>(table.shape(0)), "decode_pages: table and result have different numbers of heads.");
    need(count == static_cast<int64_t>(out.shape(1)) && form.width == static_cast<int64_t>(out.shape(2)),
         "decode_pages: the result has another shape than the tokens asked for.");
    nb::gil_scoped_release release;
    for (int64_t g = 0; g < heads; ++g)
        by_page(table, form, g, first, count, [&](const uint8_t* page, int64_t inside, int64_t some, int64_t done) {
            tile_kernels().decode_page(form, page, inside, some, out.data() + (g * count + done) * form.width, form.width);
        });
}

// Copies what is stored of one token.
void move_token(const PageForm& form, const uint8_t* source, int64_t from, uint8_t* target, int64_t to) {
    const int64_t row = form.row_bytes(), item = form.item(), groups = form.groups(), scales = form.page * row;
    if (form.tiled()) {
        for (int64_t i = 0; i < form.width; ++i) {
            auto at = [&](int64_t token) { return (token / tile_tokens * tile_tokens * form.width + i * tile_tokens + token % tile_tokens) * item; };
            std::memmove(target + at(to), source + at(from), static_cast<size_t>(item));
        }
        return;
    }
    std::memmove(target + to * form.pitch(), source + from * form.pitch(), static_cast<size_t>(row));
    if (form.kind == PageKind::bfp)
        std::memmove(target + scales + to * groups, source + scales + from * groups, static_cast<size_t>(groups));
    if (form.kind == PageKind::grid)
        for (int64_t g = 0; g < 2 * groups; ++g)
            std::memmove(target + scales + 2 * (g * form.page + to), source + scales + 2 * (g * form.page + from), 2);
}

void move_pages(const FormTuple& tuple, Table source, Table target, Array<const int64_t, 2> slots, int64_t first) {
    const PageForm form = page_form(tuple);
    need(form.kind != PageKind::tiled_grid, "move_pages: tokens of a tiled grid share their scales, and cannot be moved one by one.");
    const int64_t heads = static_cast<int64_t>(slots.shape(0)), count = static_cast<int64_t>(slots.shape(1));
    need(heads == static_cast<int64_t>(source.shape(0)) && heads == static_cast<int64_t>(target.shape(0)),
         "move_pages: tables and slots have different numbers of heads.");
    nb::gil_scoped_release release;
    for (int64_t g = 0; g < heads; ++g)
        for (int64_t i = 0; i < count; ++i) {
            const int64_t from = slots.data()[g * count + i], to = first + i;
            const uint8_t* there = page_of(source, form, g, from);
            move_token(form, there, from % form.page, page_of(target, form, g, to), to % form.page);
        }
}

// Partial sums of queries [Q, H] over slots [first, last) of one KV head: out [Q, H], weight and largest [Q]. A query n sees slots
// [low[n], high[n]), and where the record tells positions, those a ring of `sink` and `window` leaves it.
void attend_heads(Array<const float, 2> q, Array<const int64_t, 1> record, const FormsTuple& forms, int64_t first, int64_t last,
                  Array<const int64_t, 1> low, Array<const int64_t, 1> high, std::optional<Array<const int64_t, 1>> positions, int64_t window,
                  int64_t sink, float scale, float softcap, std::optional<float> phi, Array<float, 2> out, Array<float, 1> weight,
                  Array<float, 1> largest, bool turned) {
    const int64_t queries = static_cast<int64_t>(q.shape(0)), head_dim = static_cast<int64_t>(q.shape(1));
    const HeadForms made = head_forms(forms, head_dim);
    for (const size_t size : {low.shape(0), high.shape(0), out.shape(0), weight.shape(0), largest.shape(0), positions ? positions->shape(0) : q.shape(0)})
        need(size == q.shape(0), "attend_heads: arrays are of different numbers of queries.");
    need(record.shape(0) == record_fields, "attend_heads: a record has 16 fields.");
    AttendHead job;
    job.kv = head_view(record.data(), made);
    need(!job.kv.positions || positions, "attend_heads: keys have positions, and queries none.");
    job.head_dim = head_dim, job.first = first, job.last = last, job.recent = window, job.sink = sink;
    job.scale = scale, job.softcap = softcap, job.unified = phi.has_value(), job.phi = phi.value_or(0.0f);
    nb::gil_scoped_release release;
    for (int64_t n = 0; n < queries; n += max_queries) {
        const float* rows[max_queries];
        job.queries = static_cast<int>(std::min<int64_t>(max_queries, queries - n));
        for (int i = 0; i < job.queries; ++i) rows[i] = q.data() + (n + i) * head_dim;
        job.q = rows, job.low = low.data() + n, job.high = high.data() + n, job.positions = positions ? positions->data() + n : nullptr;
        job.turned = turned;
        job.largest = largest.data() + n, job.weight = weight.data() + n, job.out = out.data() + n * head_dim;
        tile_kernels().attend_head(job);
    }
}

}  // namespace

void bind_pages(nb::module_& m) {
    m.def("encode_pages", &encode_pages, nb::arg("form"), nb::arg("table"), nb::arg("first"), nb::arg("x"));
    m.def("decode_pages", &decode_pages, nb::arg("form"), nb::arg("table"), nb::arg("first"), nb::arg("count"),
          nb::arg("out").noconvert());
    m.def("attend_heads", &attend_heads, nb::arg("q"), nb::arg("record"), nb::arg("forms"), nb::arg("first"), nb::arg("last"),
          nb::arg("low"), nb::arg("high"), nb::arg("positions").none(), nb::arg("window"), nb::arg("sink"), nb::arg("scale"),
          nb::arg("softcap"), nb::arg("phi").none(), nb::arg("out").noconvert(), nb::arg("weight").noconvert(),
          nb::arg("largest").noconvert(), nb::arg("turned") = false);
    m.def("move_pages", &move_pages, nb::arg("form"), nb::arg("source"), nb::arg("target"), nb::arg("slots"), nb::arg("first"));
}

}  // namespace trimtab
