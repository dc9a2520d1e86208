// Which integers the codes of a grid or of pairs stand for.
#include <algorithm>
#include <cstdlib>
#include <stdexcept>

#include "native/tiles.h"

namespace trimtab {
namespace {

int sign_and_magnitude(int bits, int code) {
    const int magnitude = code & (victim(bits) - 1);
    return code & victim(bits) ? -magnitude : magnitude;
}

double wide_outlier(int code) {
    const int magnitude = code & 127;
    const double value = magnitude ? static_cast<double>((8 + magnitude % 8) * (int64_t{1} << (magnitude / 8 + 4))) : 0;
    return code & 128 ? -value : value;
}

}  // namespace

Grid Grid::of(const int32_t* values, int tables, int bits, bool pairs) {
    const bool known = pairs ? tables == 2 && (bits == 4 || bits == 8)
                             : bits >= 1 && bits <= 8 && (tables == 1 || (bits <= 4 && (tables == 2 || tables == 4)));
    if (!known) throw std::invalid_argument("A grid has one table of up to 8 bits, 2 or 4 of up to 4; pairs have two of 4 or 8 bits.");
    const int codes = 1 << bits;
    Grid grid;
    grid.tables = pairs ? 1 : tables;
    if (bits >= 7) {
        grid.form = pairs ? Form::wide_pairs : Form::magnitude;
        grid.offset = pairs ? 0 : victim(bits) - 1;
        for (int t = 0; t < tables; ++t)
            for (int c = 0; c < codes; ++c)
                if (values[t * codes + c] != (t ? wide_outlier(c) : sign_and_magnitude(bits, c)))
                    throw std::invalid_argument("7 and 8 bits have a kernel for sign and magnitude alone, pairs for outliers of 4 bits exponent.");
        return grid;
    }
    int most = 0;
    for (int i = 0; i < tables * codes; ++i) most = std::max(most, std::abs(values[i]));
    const int room = pairs ? 8 * 127 : bits <= 5 ? 16 : 64;
    if (most > room) throw std::invalid_argument("A value is beyond what the kernel of these bits holds.");
    if (pairs) grid.form = most <= 127 ? Form::pairs : Form::split_pairs;
    const int by = grid.form == Form::split_pairs ? 8 : 1 << 30;  // nothing is left for the high part
    for (int i = 0; i < tables * codes; ++i) {
        grid.offset = std::max(grid.offset, std::abs(values[i] % by));
        grid.high_offset = std::max(grid.high_offset, std::abs(values[i] / by));
    }
    for (int t = 0; t < tables; ++t)
        for (int c = 0; c < codes; ++c) {
            const int value = values[t * codes + c], at = 16 * t + c;
            grid.low[at] = static_cast<uint8_t>(value % by + grid.offset);
            if (at < 32) grid.high[at] = static_cast<uint8_t>(value / by + grid.high_offset);
        }
    return grid;
}

double Grid::value(int bits, int table, int code) const {
    if (form == Form::magnitude || (form == Form::wide_pairs && table == 0)) return sign_and_magnitude(bits, code);
    if (form == Form::wide_pairs) return wide_outlier(code);
    const int at = 16 * table + code;
    return low[at] - offset + (form == Form::split_pairs ? 8 * (high[at] - high_offset) : 0);
}

}  // namespace trimtab
