// One table of kernels per instruction set; the best one this processor has is used.
//
// AVX-512 means F, BW, VL, DQ, VNNI and VBMI together: Ice Lake, Zen 4 and later.
#include <atomic>
#include <cstring>

#include "kernels.h"
#include "native/native.h"

namespace trimtab {

namespace baseline {
extern const Kernels table;
extern const TileKernels tile_table;
}
#ifdef TRIMTAB_HAS_AVX2
namespace avx2 {
extern const Kernels table;
extern const TileKernels tile_table;
}
#endif
#ifdef TRIMTAB_HAS_AVX512
namespace avx512 {
extern const Kernels table;
extern const TileKernels tile_table;
}
#endif

namespace {

struct Isa {
    const Kernels* rows;
    const TileKernels* tiles;
};

int found(Isa* out) {
    int count = 0;
    out[count++] = {&baseline::table, &baseline::tile_table};
#ifdef TRIMTAB_HAS_AVX2
    __builtin_cpu_init();
    // Every processor with AVX2 and FMA has F16C; older compilers cannot ask for it.
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) out[count++] = {&avx2::table, &avx2::tile_table};
#endif
#ifdef TRIMTAB_HAS_AVX512
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi"))
        out[count++] = {&avx512::table, &avx512::tile_table};
#endif
    return count;
}

std::atomic<int>& current() {
    static std::atomic<int> chosen = [] {
        Isa tables[4];
        return found(tables) - 1;
    }();
    return chosen;
}

const Isa& chosen() {
    static const struct All {
        Isa tables[4];
        All() { found(tables); }
    } all;
    return all.tables[current().load(std::memory_order_relaxed)];
}

}  // namespace

const Kernels& kernels() { return *chosen().rows; }

const TileKernels& tile_kernels() { return *chosen().tiles; }

int available_isas(const char** out) {
    Isa tables[4];
    const int count = found(tables);
    for (int i = 0; i < count; ++i) out[i] = tables[i].rows->isa;
    return count;
}

bool use_isa(const char* name) {
    Isa tables[4];
    for (int i = found(tables); i--;)
        if (std::strcmp(tables[i].rows->isa, name) == 0) return current().store(i), true;
    return false;
}

}  // namespace trimtab
