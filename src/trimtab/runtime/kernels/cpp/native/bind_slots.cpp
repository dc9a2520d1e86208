// Python bindings of slots; the GIL is released where the system is called.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/vector.h>

#include "native/bind_pages.h"
#include "native/slots.h"

namespace nb = nanobind;

namespace trimtab {
namespace {

using Numbers = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

}  // namespace

void bind_slots(nb::module_& m) {
    nb::class_<SlotMemory>(m, "SlotMemory")
        .def("__init__",
             [](SlotMemory* self, std::vector<int64_t> token_bytes, int64_t slots, int64_t tokens, int64_t page, int64_t pool_groups,
                bool background, int64_t eager_steps, int64_t eager_groups, bool deferred, bool whole, bool secure) {
                 SlotForm form;
                 form.token_bytes = std::move(token_bytes), form.slots = slots, form.tokens = tokens, form.page = page;
                 form.pool_groups = pool_groups, form.background = background, form.eager_steps = eager_steps;
                 form.eager_groups = eager_groups, form.deferred = deferred, form.whole = whole, form.secure = secure;
                 new (self) SlotMemory(form);
             },
             nb::arg("token_bytes"), nb::arg("slots"), nb::arg("tokens"), nb::arg("page"), nb::arg("pool_groups"), nb::arg("background") = false,
             nb::arg("eager_steps") = 10, nb::arg("eager_groups") = 2, nb::arg("deferred") = true, nb::arg("whole") = false,
             nb::arg("secure") = false)
        .def("open", &SlotMemory::open)
        .def("fork", &SlotMemory::fork, nb::arg("seq"), nb::arg("tokens"))
        .def("close", &SlotMemory::close, nb::arg("seq"), nb::call_guard<nb::gil_scoped_release>())
        .def("cut", &SlotMemory::cut, nb::arg("seq"), nb::arg("tokens"), nb::call_guard<nb::gil_scoped_release>())
        .def("step",
             [](SlotMemory& self, Numbers seqs, Numbers first, Numbers end, nb::ndarray<int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu> found) {
                 const size_t count = seqs.shape(0);
                 if (first.shape(0) != count || end.shape(0) != count || found.shape(0) != count || found.shape(1) != 2)
                     throw std::invalid_argument("step: arrays are of different numbers of sequences.");
                 const int64_t *s = seqs.data(), *f = first.data(), *e = end.data();
                 int64_t* to = found.data();
                 nb::gil_scoped_release release;
                 self.step(s, f, e, static_cast<int64_t>(count), to);
             },
             nb::arg("seqs"), nb::arg("first"), nb::arg("end"), nb::arg("found").noconvert())
        .def("settle", &SlotMemory::settle, nb::call_guard<nb::gil_scoped_release>())
        .def("address", [](const SlotMemory& self, int64_t tensor) {
            if (tensor < 0 || tensor >= self.tensors()) throw std::invalid_argument("No such tensor.");
            return static_cast<int64_t>(reinterpret_cast<uintptr_t>(self.base(tensor)));
        }, nb::arg("tensor"))
        .def_prop_ro("slot_bytes", &SlotMemory::slot_bytes)
        .def_prop_ro("used_groups", &SlotMemory::used_groups)
        .def("counts", [](SlotMemory& self) {
            const SlotCounts c = self.counts();
            nb::dict found;
            found["map_calls"] = c.map_calls, found["unmap_calls"] = c.unmap_calls, found["copied_groups"] = c.copied_groups;
            found["used_groups"] = c.used_groups, found["kept_groups"] = c.kept_groups, found["mappings"] = c.mappings;
            found["file_bytes"] = c.file_bytes, found["reserved_bytes"] = c.reserved_bytes;
            return found;
        });
}

}  // namespace trimtab
