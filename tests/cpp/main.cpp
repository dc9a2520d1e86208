// Runs the tests whose name contains the first argument, or all.
#include <unistd.h>

#include <chrono>
#include <cstring>

#include "check.h"
#include "isas.h"

std::vector<Test>& all_tests() {
    static std::vector<Test> tests;
    return tests;
}

namespace trimtab {

#define TRIMTAB_TABLES(isa)              \
    namespace isa {                      \
    extern const TileKernels tile_table; \
    extern const LmulKernels lmul_table; \
    extern const Int8Kernels int8_table; \
    extern const BinaryKernels binary_table; \
    extern const Words words;            \
    }
TRIMTAB_TABLES(baseline)
TRIMTAB_TABLES(avx2)
TRIMTAB_TABLES(avx512)

namespace {
const TileKernels* current = &baseline::tile_table;
const Int8Kernels* current_int8 = &baseline::int8_table;
const BinaryKernels* current_binary = &baseline::binary_table;
}

const std::vector<Isa>& isas() {
    static const std::vector<Isa> all = {
        {"baseline", &baseline::tile_table, &baseline::lmul_table, &baseline::int8_table, &baseline::binary_table, &baseline::words},
#ifdef TRIMTAB_HAS_AVX2
        {"avx2", &avx2::tile_table, &avx2::lmul_table, &avx2::int8_table, &avx2::binary_table, &avx2::words},
#endif
#ifdef TRIMTAB_EMULATED_AVX512
        {"avx512 (emulated)", &avx512::tile_table, &avx512::lmul_table, &avx512::int8_table, &avx512::binary_table, &avx512::words},
#elif defined(TRIMTAB_HAS_AVX512)
        {"avx512", &avx512::tile_table, &avx512::lmul_table, &avx512::int8_table, &avx512::binary_table, &avx512::words},
#endif
    };
    return all;
}

void use(const Isa& isa) { current = isa.table, current_int8 = isa.int8, current_binary = isa.binary; }

// Stands in for dispatch.cpp, which would never choose an emulated table.
const TileKernels& tile_kernels() { return *current; }
const Int8Kernels& int8_kernels() { return *current_int8; }
const BinaryKernels& binary_kernels() { return *current_binary; }

namespace baseline {
extern const Kernels table;
}
const Kernels& kernels() { return baseline::table; }

}  // namespace trimtab

int main(int count, char** arguments) {
    std::printf("instruction sets:");
    for (const trimtab::Isa& isa : trimtab::isas()) std::printf(" %s", isa.name);
    std::printf("\n");
    int run = 0;
    for (const Test& test : all_tests()) {
        if (count > 1 && !std::strstr(test.name, arguments[1])) continue;
        std::printf("%-60s ", test.name), std::fflush(stdout);
        alarm(600);  // ends what threads that wait for each other never would
        const auto start = std::chrono::steady_clock::now();
        test.body();
        const double time_s = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        std::printf("%6.2f s\n", time_s);
        ++run;
    }
    std::printf("%d tests passed\n", run);
    return run ? 0 : 1;
}
