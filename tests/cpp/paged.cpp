#include "paged.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace trimtab {
namespace {

uint16_t half_at(const uint8_t* at, int64_t i) {
    uint16_t bits;
    std::memcpy(&bits, at + 2 * i, 2);
    return bits;
}

uint32_t bits_at(const uint8_t* row, int64_t first, int count) {
    uint32_t value = 0;
    for (int b = 0; b < count; ++b) value |= (row[(first + b) / 8] >> ((first + b) % 8) & 1u) << b;
    return value;
}

double float_at(PageKind kind, const uint8_t* data, int64_t i) {
    switch (kind) {
        case PageKind::f32:
        case PageKind::tiled_f32: {
            float x;
            std::memcpy(&x, data + 4 * i, 4);
            return x;
        }
        case PageKind::f8:
            return f8_value(data[i]);
        case PageKind::f16:
        case PageKind::tiled_f16:
            return half_value(half_at(data, i));
        default:
            return bf16_value(half_at(data, i));
    }
}

// Where byte `byte` of a token lies in its tile: words of 4 bytes, then one of 2 and one of 1, each of all 16 tokens.
int64_t byte_of_tile(int64_t row_bytes, int64_t token, int64_t byte) {
    int64_t at = 0, size = 4;
    for (;; at += size) {
        while (row_bytes - at < size) size /= 2;
        if (byte < at + size) return 16 * at + token * size + byte - at;
    }
}

// The nearest number of 8 bits, ties to even, 448 at most.
double nearest_f8(float x) {
    int best = 0;
    for (int bits = 1; bits < 0x7f; ++bits) {
        const double before = std::fabs(f8_value(static_cast<uint8_t>(best)) - std::fabs(x));
        const double now = std::fabs(f8_value(static_cast<uint8_t>(bits)) - std::fabs(x));
        if (now < before || (now == before && bits % 2 == 0)) best = bits;
    }
    return std::copysign(f8_value(static_cast<uint8_t>(best)), x);
}

}  // namespace

std::string name(const PageForm& form) {
    static const char* const kinds[] = {"f32", "f16",       "bf16",      "f8",         "grid",
                                        "bfp", "tiled_f32", "tiled_f16", "tiled_bf16", "tiled_grid"};
    return std::string(kinds[static_cast<int>(form.kind)]) + "-" + std::to_string(form.bits) + "-g" +
           std::to_string(form.group) + "-w" + std::to_string(form.width) + "-p" + std::to_string(form.page);
}

std::vector<PageForm> all_forms(int64_t width, int64_t page, int64_t odd) {
    std::vector<PageForm> forms;
    for (PageKind kind : {PageKind::f32, PageKind::f16, PageKind::bf16, PageKind::f8})
        forms.push_back({kind, odd, width, 0, 0});
    for (PageKind kind : {PageKind::tiled_f32, PageKind::tiled_f16, PageKind::tiled_bf16})
        forms.push_back({kind, page, width, 0, 0});
    for (int bits : {2, 4, 8}) {
        for (int64_t group : {width, int64_t{16}, int64_t{5}})
            forms.push_back({PageKind::grid, odd, width, bits, group});
        for (int64_t group : {page, int64_t{16}, int64_t{8}})
            forms.push_back({PageKind::tiled_grid, page, width, bits, group});
    }
    for (int bits : {2, 3, 4, 8, 9, 16}) forms.push_back({PageKind::bfp, odd, width, bits, 12});
    return forms;
}

PageForm random_form(Random& random, int64_t width, bool lands) {
    PageForm form;
    form.kind = static_cast<PageKind>(random.below(lands ? 9 : 10)), form.width = width;
    form.page = form.tiled() ? random.of<int64_t>({16, 32, 64}) : random.of<int64_t>({1, 7, 16, 16, 64, 64, 100});
    if (form.scaled()) form.bits = random.of({2, 4, 8});
    if (form.kind == PageKind::bfp) form.bits = static_cast<int>(random.between(2, 16));
    if (form.kind == PageKind::tiled_grid)
        form.group = random.of<int64_t>({8, 16, form.page / 2, form.page});
    else if (form.coded())
        form.group = random.of<int64_t>({5, 16, 32, width, 1000});
    form.check();
    return form;
}

double f8_value(uint8_t bits) {
    const int exponent = bits >> 3 & 15, mantissa = bits & 7;
    if ((bits & 0x7f) == 0x7f) return std::nan("");
    const double magnitude = exponent ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
    return bits & 0x80 ? -magnitude : magnitude;
}

double stored(const PageForm& form, const uint8_t* page, int64_t token, int64_t i) {
    const int64_t row = form.row_bytes(), g = form.group ? i / form.group : 0, groups = form.groups();
    const uint8_t* scales = page + form.page * row;
    switch (form.kind) {
        case PageKind::grid: {
            const uint32_t code = bits_at(page + token * row, i * form.bits, form.bits);
            return code * half_value(half_at(scales, g * form.page + token)) +
                   half_value(half_at(scales, (groups + g) * form.page + token));
        }
        case PageKind::bfp: {
            const int64_t code = bits_at(page + token * row, i * form.bits, form.bits),
                          sign = int64_t{1} << (form.bits - 1);
            return std::ldexp(static_cast<double>((code ^ sign) - sign), scales[token * groups + g] - 125 - form.bits);
        }
        case PageKind::tiled_grid: {
            const uint8_t* tile = page + token / 16 * 16 * row;
            const uint32_t code =
                bits_at(tile + byte_of_tile(row, token % 16, i * form.bits / 8), i * form.bits % 8, form.bits);
            const int64_t at = token / form.group * form.width + i;
            return code * half_value(half_at(scales, at)) +
                   half_value(half_at(scales, form.page / form.group * form.width + at));
        }
        default:
            return float_at(form.kind, page,
                            form.tiled() ? token / 16 * 16 * form.width + i * 16 + token % 16 : token * form.width + i);
    }
}

double kept(const PageForm& form, const float* group, int64_t count, int64_t i) {
    const float x = group[i];
    if (form.scaled()) {
        const float top = static_cast<float>((1 << form.bits) - 1);
        const float minimum = static_cast<float>(half_value(nearest_half(*std::min_element(group, group + count))));
        const float wanted = (*std::max_element(group, group + count) - minimum) / top;
        const float scale = static_cast<float>(half_value(nearest_half(std::max(wanted, 0.0f))));
        const float code = scale > 0 ? std::nearbyint(std::clamp((x - minimum) / scale, 0.0f, top)) : 0;
        return static_cast<double>(code) * scale + minimum;
    }
    if (form.kind == PageKind::bfp) {
        double most = 0;
        for (int64_t j = 0; j < count; ++j) most = std::max(most, std::fabs(static_cast<double>(group[j])));
        const double unit = std::ldexp(1.0, (most > 0 ? std::max(std::ilogb(most), -127) : -127) + 2 - form.bits);
        const double limit = (1 << (form.bits - 1)) - 1;
        return std::clamp(std::nearbyint(x / unit), -limit, limit) * unit;
    }
    if (form.kind == PageKind::f8) return nearest_f8(x);
    if (form.item() == 4) return x;
    return form.kind == PageKind::f16 || form.kind == PageKind::tiled_f16 ? half_value(nearest_half(x))
                                                                          : bf16_value(nearest_bf16(x));
}

Paged::Paged(const PageForm& made_of, int64_t slots) : form(made_of) {
    for (int64_t s = 0; s < slots; s += form.page)
        pages.emplace_back(static_cast<size_t>(form.nbytes(form.page)), 0xff);
    for (const auto& page : pages) table.push_back(address_of(page));
}

bool Paged::write(const Isa& isa, int64_t first, int64_t count, const float* x) {
    for (int64_t done = 0, some; done < count; done += some) {
        const int64_t slot = first + done, inside = slot % form.page;
        some = std::min(form.page - inside, count - done);
        uint8_t* page = pages[static_cast<size_t>(slot / form.page)].data();
        if (!isa.table->encode_page(form, page, inside, some, x + done * form.width, form.width)) return false;
    }
    return true;
}

void Paged::drop(int64_t slots) {
    for (size_t i = 0; i < pages.size() && static_cast<int64_t>(i + 1) * form.page <= slots; ++i)
        std::vector<uint8_t>().swap(pages[i]), table[i] = 0;
}

}  // namespace trimtab
