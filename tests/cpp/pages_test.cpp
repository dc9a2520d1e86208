// Tokens into pages of every form and back, by every instruction set: what a page holds is what its definition says.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "check.h"
#include "paged.h"

namespace trimtab {
namespace {

// Tokens [count, W] of all sizes, with zeros and with neighbours that are all alike.
std::vector<float> tokens(Random& random, int64_t count, int64_t width) {
    std::vector<float> x = random.floats(count * width, -2, 2);
    for (int64_t t = 0; t < count; ++t)
        for (int64_t i = 0; i < width; ++i) {
            float& value = x[static_cast<size_t>(t * width + i)];
            value = std::ldexp(value, static_cast<int>(i % 11) - 4);
            if (t % 7 == 3 && i % 5 == 1) value = 0;
            if (i % 9 == 4 || t % 13 == 6) value = 0.7f;
        }
    return x;
}

// Element i of token t of x [count, W], as the group it is written with makes it.
double expected(const PageForm& form, const std::vector<float>& x, int64_t t, int64_t i) {
    std::vector<float> group;
    if (form.kind == PageKind::tiled_grid) {
        const int64_t first = t / form.group * form.group;
        for (int64_t j = first; j < first + form.group; ++j)
            group.push_back(x[static_cast<size_t>(j * form.width + i)]);
        return kept(form, group.data(), form.group, t - first);
    }
    const int64_t first = form.group ? i / form.group * form.group : i;
    const int64_t end = form.group ? std::min(first + form.group, form.width) : i + 1;
    for (int64_t j = first; j < end; ++j) group.push_back(x[static_cast<size_t>(t * form.width + j)]);
    return kept(form, group.data(), end - first, i - first);
}

bool same(double a, double b) {
    return (std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b));
}

void check_form(const Isa& isa, Random& random, const PageForm& form) {
    form.check();
    const int64_t slots = 3 * form.page, by = step(form);
    const int64_t first = random.below(slots / by) * by, count = random.between(1, (slots - first) / by) * by;
    const std::vector<float> x = tokens(random, count, form.width);
    Paged paged(form, slots), alike(form, slots);
    for (size_t p = 0; p < paged.pages.size(); ++p)
        for (uint8_t& byte : paged.pages[p]) byte = static_cast<uint8_t>(random.below(256));
    alike.pages = paged.pages;
    const std::vector<std::vector<uint8_t>> before = paged.pages;
    const std::string what = std::string(isa.name) + " " + name(form) + " tokens " + std::to_string(first) + " .. " +
                             std::to_string(first + count);
    CHECK(paged.write(isa, first, count, x.data()), "%s", what.c_str());
    CHECK(alike.write(isas()[0], first, count, x.data()), "%s", what.c_str());
    CHECK(paged.pages == alike.pages, "%s: other bytes than %s writes", what.c_str(), isas()[0].name);
    for (int64_t s = 0; s < slots; ++s)
        for (int64_t i = 0; i < form.width; ++i) {
            const bool written = s >= first && s < first + count;
            const double was = stored(form, before[static_cast<size_t>(s / form.page)].data(), s % form.page, i);
            const double wanted = written ? expected(form, x, s - first, i) : was, found = paged.value(s, i);
            // A zero of either sign where numbers have a common scale.
            CHECK(same(found, wanted) || (form.coded() && found == wanted),
                  "%s: element %d of slot %d is %.9g, not %.9g", what.c_str(), static_cast<int>(i), static_cast<int>(s),
                  found, wanted);
        }
    for (int round = 0; round < 4; ++round) {
        const int64_t page = random.below(3), from = random.below(form.page),
                      some = random.between(1, form.page - from);
        const int64_t stride = form.width + random.below(3);
        std::vector<float> out(static_cast<size_t>((some - 1) * stride + form.width), 7);
        isa.table->decode_page(form, paged.pages[static_cast<size_t>(page)].data(), from, some, out.data(), stride);
        for (int64_t t = 0; t < some; ++t)
            for (int64_t i = 0; i < stride && t * stride + i < static_cast<int64_t>(out.size()); ++i) {
                const float y = out[static_cast<size_t>(t * stride + i)];
                const double wanted = i < form.width ? paged.value(page * form.page + from + t, i) : 7;
                CHECK(same(y, static_cast<float>(wanted)) || (form.coded() && y == static_cast<float>(wanted)),
                      "%s: token %d element %d decodes to %.9g, not %.9g", what.c_str(), static_cast<int>(from + t),
                      static_cast<int>(i), y, wanted);
            }
    }
}

TEST(pages_hold_what_their_definition_says) {
    for (const Isa& isa : isas()) {
        Random random(40);
        constexpr int64_t shapes[][3] = {{64, 64, 64}, {39, 16, 7}, {80, 32, 1}, {1, 16, 3}, {13, 32, 5}, {23, 48, 16}};
        for (const auto& [width, page, odd] : shapes)
            for (const PageForm& form : all_forms(width, page, odd)) check_form(isa, random, form);
        for (int round = 0; round < 150; ++round)
            check_form(isa, random, random_form(random, random.between(1, 130), false));
        check_form(isa, random, {PageKind::tiled_grid, 16, max_head_dim, 4, 16});
        check_form(isa, random, {PageKind::grid, 2, max_head_dim, 2, 48});
    }
}

// Between neighbouring numbers of 8 bits, at the middle, and far away from any.
TEST(rounding_to_eight_bits_is_exact) {
    for (const Isa& isa : isas()) {
        const float none = std::numeric_limits<float>::quiet_NaN(), endless = std::numeric_limits<float>::infinity();
        std::vector<float> x = {0.0f, -0.0f, 1e-30f, -1e-30f, 460.0f, 464.0f, 1e9f, -1e38f, endless, -endless};
        for (int bits = 0; bits < 0x7e; ++bits) {
            const float low = static_cast<float>(f8_value(static_cast<uint8_t>(bits))),
                        high = static_cast<float>(f8_value(static_cast<uint8_t>(bits + 1)));
            const float middle = (low + high) / 2;
            for (float value : {low, middle, std::nextafter(middle, 0.0f), std::nextafter(middle, 1e9f)})
                x.push_back(value), x.push_back(-value);
        }
        const PageForm form = {PageKind::f8, static_cast<int64_t>(x.size()), 1, 0, 0};
        Paged paged(form, form.page);
        CHECK(paged.write(isa, 0, form.page, x.data()), "%s", isa.name);
        for (size_t i = 0; i < x.size(); ++i) {
            const double found = paged.value(static_cast<int64_t>(i), 0);
            CHECK(same(found, kept(form, x.data() + i, 1, 0)), "%s: %.9g becomes %g", isa.name, x[i], found);
        }
        CHECK(paged.write(isa, 0, 1, &none) && std::isnan(paged.value(0, 0)), "%s: NaN becomes %g", isa.name,
              paged.value(0, 0));
    }
}

TEST(what_codes_cannot_express_is_reported) {
    const float endless = std::numeric_limits<float>::infinity();
    for (const Isa& isa : isas())
        for (const PageForm& form : all_forms(37, 32, 32))
            for (int64_t at : {0, 17, 36})
                for (float bad : {std::numeric_limits<float>::quiet_NaN(), endless, -endless, -1e6f}) {
                    std::vector<float> x(static_cast<size_t>(32 * form.width), 0.5f);
                    x[static_cast<size_t>(3 * form.width + at)] = bad;
                    // -1e6 is no minimum in fp16, and an exponent like any other.
                    const bool holds = !form.coded() || (form.kind == PageKind::bfp && bad == -1e6f);
                    Paged paged(form, 32);
                    CHECK(paged.write(isa, 0, 32, x.data()) == holds, "%s %s: %g at %d", isa.name, name(form).c_str(),
                          bad, static_cast<int>(at));
                }
}

// The smallest and the largest numbers have the exponents at both ends.
TEST(block_floats_reach_from_end_to_end) {
    for (const Isa& isa : isas())
        for (int bits = 2; bits <= 16; ++bits)
            for (int exponent = -149; exponent < 128; ++exponent) {
                const PageForm form = {PageKind::bfp, 1, 6, bits, 6};
                const float unit = std::ldexp(1.0f, exponent);
                const float x[6] = {unit, -unit, unit * 0.5f, 0, -unit * 0.75f, unit * 0.3f};
                Paged paged(form, 1);
                CHECK(paged.write(isa, 0, 1, x), "%s 2^%d", isa.name, exponent);
                for (int i = 0; i < 6; ++i)
                    CHECK(paged.value(0, i) == kept(form, x, 6, i), "%s %d bits 2^%d element %d: %g, not %g", isa.name,
                          bits, exponent, i, paged.value(0, i), kept(form, x, 6, i));
            }
}

}  // namespace
}  // namespace trimtab
