// One table of kernels per instruction set; the best one this processor has is used.
//
// AVX2 is the widest set offered: these kernels wait for memory, and only what runs on the machines of the tests ships.
#include <atomic>
#include <cstring>

#include "kernels.h"

namespace trimtab {

namespace baseline {
extern const Kernels table;
}
#ifdef TRIMTAB_HAS_AVX2
namespace avx2 {
extern const Kernels table;
}
#endif

namespace {

int found(const Kernels** out) {
    int count = 0;
    out[count++] = &baseline::table;
#ifdef TRIMTAB_HAS_AVX2
    __builtin_cpu_init();
    // Every processor with AVX2 and FMA has F16C; older compilers cannot ask for it.
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) out[count++] = &avx2::table;
#endif
    return count;
}

std::atomic<const Kernels*>& current() {
    static std::atomic<const Kernels*> chosen = [] {
        const Kernels* tables[4];
        return tables[found(tables) - 1];
    }();
    return chosen;
}

}  // namespace

const Kernels& kernels() { return *current().load(std::memory_order_relaxed); }

int available_isas(const char** out) {
    const Kernels* tables[4];
    const int count = found(tables);
    for (int i = 0; i < count; ++i) out[i] = tables[i]->isa;
    return count;
}

bool use_isa(const char* name) {
    const Kernels* tables[4];
    for (int i = found(tables); i--;)
        if (std::strcmp(tables[i]->isa, name) == 0) return current().store(tables[i]), true;
    return false;
}

}  // namespace trimtab
