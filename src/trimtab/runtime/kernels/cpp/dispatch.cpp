// One table of kernels per instruction set; the best one this processor has is used.
//
// AVX-512 means F, BW, VL, DQ, VNNI and VBMI together: Ice Lake, Zen 4 and later.
#include <atomic>
#include <cstring>
#include <string>

#include "binary.h"
#include "kernels.h"
#include "lmul.h"
#include "native/int8.h"
#include "native/native.h"

namespace trimtab {

namespace baseline {
extern const Kernels table;
extern const TileKernels tile_table;
extern const LmulKernels lmul_table;
extern const Int8Kernels int8_table;
extern const BinaryKernels binary_table;
}
#ifdef TRIMTAB_HAS_AVX2
namespace avx2 {
extern const Kernels table;
extern const TileKernels tile_table;
extern const LmulKernels lmul_table;
extern const Int8Kernels int8_table;
extern const BinaryKernels binary_table;
}
#endif
#ifdef TRIMTAB_HAS_AVX512
namespace avx512 {
extern const Kernels table;
extern const TileKernels tile_table;
extern const LmulKernels lmul_table;
extern const Int8Kernels int8_table;
extern const BinaryKernels binary_table;
}
#endif

namespace {

struct Isa {
    const Kernels* rows;
    const TileKernels* tiles;
    const LmulKernels* lmul;
    const Int8Kernels* int8;
    const BinaryKernels* binary;
};

// What this processor lacks of an instruction set that was compiled in, as the system spells it; empty if nothing.
std::string lacking([[maybe_unused]] const char* isa) {
    std::string missing;
#if defined(TRIMTAB_HAS_AVX2) || defined(TRIMTAB_HAS_AVX512)
    __builtin_cpu_init();
    [[maybe_unused]] auto want = [&](bool have, const char* flag) {
        if (!have) missing += (missing.empty() ? "" : ", ") + std::string(flag);
    };
#define TRIMTAB_WANT(flag) want(__builtin_cpu_supports(flag), flag)
    if (std::strcmp(isa, "baseline") != 0) {
        // Every processor with AVX2 and FMA has F16C; older compilers cannot ask for it.
        TRIMTAB_WANT("avx2");
        TRIMTAB_WANT("fma");
    }
    if (std::strcmp(isa, "avx512") == 0) {
        TRIMTAB_WANT("avx512f");
        TRIMTAB_WANT("avx512bw");
        TRIMTAB_WANT("avx512vl");
        TRIMTAB_WANT("avx512dq");
        TRIMTAB_WANT("avx512vnni");
        TRIMTAB_WANT("avx512vbmi");
    }
#undef TRIMTAB_WANT
#endif
    return missing;
}

int compiled(Isa* out) {
    int count = 0;
    out[count++] = {&baseline::table, &baseline::tile_table, &baseline::lmul_table, &baseline::int8_table, &baseline::binary_table};
#ifdef TRIMTAB_HAS_AVX2
    out[count++] = {&avx2::table, &avx2::tile_table, &avx2::lmul_table, &avx2::int8_table, &avx2::binary_table};
#endif
#ifdef TRIMTAB_HAS_AVX512
    out[count++] = {&avx512::table, &avx512::tile_table, &avx512::lmul_table, &avx512::int8_table, &avx512::binary_table};
#endif
    return count;
}

int found(Isa* out) {
    Isa all[4];
    int count = 0;
    for (int i = 0, total = compiled(all); i < total; ++i)
        if (lacking(all[i].rows->isa).empty()) out[count++] = all[i];
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

const LmulKernels& lmul_kernels() { return *chosen().lmul; }
const Int8Kernels& int8_kernels() { return *chosen().int8; }

const BinaryKernels& binary_kernels() { return *chosen().binary; }

int available_isas(const char** out) {
    Isa tables[4];
    const int count = found(tables);
    for (int i = 0; i < count; ++i) out[i] = tables[i].rows->isa;
    return count;
}

std::string missing_flags(const char* name) {
    Isa all[4];
    for (int i = compiled(all); i--;)
        if (std::strcmp(all[i].rows->isa, name) == 0) return lacking(name);
    return "?";
}

bool use_isa(const char* name) {
    Isa tables[4];
    for (int i = found(tables); i--;)
        if (std::strcmp(tables[i].rows->isa, name) == 0) return current().store(i), true;
    return false;
}

}  // namespace trimtab
