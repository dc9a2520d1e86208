// Tokens into pages of the cache and back to floats, compiled once per instruction set. What is written must not depend on the
// set, nor differ from the codec on arrays in runtime/cache/pages.py.
#include <cmath>

#include "isa/simd.h"
#include "native/native.h"

namespace trimtab::TRIMTAB_ISA {
namespace {

// e4m3: 4 bits of exponent with bias 7, 3 of mantissa; 0x7f and 0xff are NaN. Source: OCP 8-bit Floating Point, 2023.
struct EightBits {
    float value[256];
    EightBits() {
        for (int bits = 0; bits < 256; ++bits) {
            const int exponent = bits >> 3 & 15, mantissa = bits & 7;
            const float normal = std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
            const float magnitude = exponent ? normal : std::ldexp(static_cast<float>(mantissa), -9);
            value[bits] = (bits & 0x7f) == 0x7f ? std::nanf("") : bits & 0x80 ? -magnitude : magnitude;
        }
    }
};

float from_f8(uint8_t bits) {
    static const EightBits table;
    return table.value[bits];
}

// Rounds to the nearest, ties to even; what is too large becomes 448, the largest number.
uint8_t to_f8(float x) {
    if (std::isnan(x)) return 0x7f;
    uint32_t word;
    memcpy(&word, &x, 4);
    const uint32_t sign = word >> 24 & 0x80, magnitude = word & 0x7fffffffu;
    if (magnitude >= 0x43e00000u) return static_cast<uint8_t>(sign | 0x7e);
    if (magnitude < 0x3c800000u)  // below 2^-6: steps of 2^-9
        return static_cast<uint8_t>(sign | static_cast<uint32_t>(std::nearbyint(std::fabs(x) * 512.0f)));
    // 20 bits of the mantissa are rounded off; a carry raises the exponent, whose bias falls from 127 to 7.
    return static_cast<uint8_t>(sign | ((magnitude + 0x7ffff + (magnitude >> 20 & 1) - (120u << 23)) >> 20));
}

uint16_t bf16_bits(float x) {
    uint32_t word;
    memcpy(&word, &x, 4);
    const bool nan = (word & 0x7fffffffu) > 0x7f800000u;
    return static_cast<uint16_t>(nan ? (word >> 16) | 0x40 : (word + 0x7fff + ((word >> 16) & 1)) >> 16);
}

float from_item(PageKind kind, const uint8_t* at) {
    switch (kind) {
        case PageKind::f32:
        case PageKind::tiled_f32: return load<float>(at);
        case PageKind::f8: return from_f8(*at);
        case PageKind::f16:
        case PageKind::tiled_f16: return half(load<uint16_t>(at));
        default: return bf16(load<uint16_t>(at));
    }
}

void to_item(PageKind kind, float x, uint8_t* at) {
    uint16_t bits;
    switch (kind) {
        case PageKind::f32:
        case PageKind::tiled_f32: memcpy(at, &x, 4); return;
        case PageKind::f8: *at = to_f8(x); return;
        case PageKind::f16:
        case PageKind::tiled_f16: bits = half_bits(x); break;
        default: bits = bf16_bits(x);
    }
    memcpy(at, &bits, 2);
}

void put_half(uint8_t* at, int64_t i, uint16_t bits) { memcpy(at + 2 * i, &bits, 2); }

// A grid of 2^bits steps from the least to the largest of some numbers: scale and minimum, as bits of halves. The minimum is
// rounded first, and a scale below 0, which rounding it up may yield, is 0.
struct Steps {
    uint16_t scale, minimum;
    Steps(float least, float most, int bits) {
        minimum = half_bits(least);
        const float step = (most - half(minimum)) / static_cast<float>((1 << bits) - 1);
        scale = half_bits(step > 0 ? step : 0.0f);
    }
    bool finite() const { return (scale & 0x7c00) != 0x7c00 && (minimum & 0x7c00) != 0x7c00; }
};

// Codes of `lanes` numbers, or of one, in the lowest byte of each; adding 2^23 rounds to the nearest integer, ties to even.
inline UV codes_of(FV x, FV base, FV step, float top) {
    FV code = (x - base) / step;
    code = step > 0.0f ? code : FV{};
    code = code > 0.0f ? code : FV{};
    code = code < top ? code : splat_f(top);
    return as<UV>(code + 8388608.0f) & 0xff;
}
inline uint8_t code_of(float x, float base, float step, float top) {
    float code = step > 0 ? (x - base) / step : 0.0f;
    code = code > 0 ? code : 0.0f;
    code = (code < top ? code : top) + 8388608.0f;
    uint32_t word;
    memcpy(&word, &code, 4);
    return static_cast<uint8_t>(word);
}

inline void store_bytes(uint8_t* to, UV v) {
    typedef uint8_t Bytes __attribute__((vector_size(lanes)));
    const Bytes bytes = __builtin_convertvector(v, Bytes);
    memcpy(to, &bytes, sizeof bytes);
}

// Codes of a row, one a byte, packed little-endian. Eight of them at a time are moved together inside one word.
void pack_row(const uint8_t* codes, int64_t count, int bits, uint8_t* out) {
    int64_t i = 0;
    if (bits == 8) {
        memcpy(out, codes, static_cast<size_t>(count));
        return;
    }
    for (; i + 8 <= count; i += 8, out += bits) {
        uint64_t x = load<uint64_t>(codes + i);
        if (bits == 4) {
            x = (x | x >> 4) & 0x00ff00ff00ff00ffu, x = (x | x >> 8) & 0x0000ffff0000ffffu;
            const uint32_t packed = static_cast<uint32_t>(x | x >> 16);
            memcpy(out, &packed, 4);
        } else {
            x = (x | x >> 6) & 0x000f000f000f000fu, x = (x | x >> 12) & 0x000000ff000000ffu;
            const uint16_t packed = static_cast<uint16_t>(x | x >> 24);
            memcpy(out, &packed, 2);
        }
    }
    uint32_t word = 0;
    int filled = 0;
    for (; i < count; ++i) {
        word |= static_cast<uint32_t>(codes[i]) << filled, filled += bits;
        for (; filled >= 8; filled -= 8, word >>= 8) *out++ = static_cast<uint8_t>(word);
    }
    if (filled) *out = static_cast<uint8_t>(word);
}

// One code a byte of a row; `codes` has room for 7 more.
void unpack_row(const uint8_t* row, int64_t count, int bits, uint8_t* codes) {
    if (bits == 8) {
        memcpy(codes, row, static_cast<size_t>(count));
        return;
    }
    const int64_t bytes = (count * bits + 7) / 8;
    for (int64_t b = 0; b < bytes; ++b)
        for (int i = 0; i < 8 / bits; ++i) *codes++ = static_cast<uint8_t>(row[b] >> (bits * i) & ((1 << bits) - 1));
}

// Least and largest of `count` numbers, and whether all are finite: NaN compares with nothing.
bool bounds(const float* x, int64_t count, float& least, float& most) {
    int64_t i = 0;
    float lost = 0;
    least = most = x[0];
    if (count >= lanes) {
        FV low = load<FV>(x), high = low, zero = {};
        for (; i + lanes <= count; i += lanes) {
            const FV v = load<FV>(x + i);
            low = v < low ? v : low, high = v > high ? v : high, zero += v * 0.0f;
        }
        for (int j = 0; j < lanes; ++j) least = low[j] < least ? low[j] : least, most = high[j] > most ? high[j] : most, lost += zero[j];
    }
    for (; i < count; ++i) least = x[i] < least ? x[i] : least, most = x[i] > most ? x[i] : most, lost += x[i] * 0.0f;
    return lost == 0;
}

bool encode_grid_row(const PageForm& form, uint8_t* page, int64_t token, const float* x) {
    const int64_t groups = form.groups();
    const float top = static_cast<float>((1 << form.bits) - 1);
    uint8_t codes[max_head_dim];
    uint8_t* scales = page + form.page * form.row_bytes();
    for (int64_t g = 0; g < groups; ++g) {
        const int64_t first = g * form.group, end = first + form.group < form.width ? first + form.group : form.width;
        float least, most;
        if (!bounds(x + first, end - first, least, most)) return false;
        const Steps steps(least, most, form.bits);
        if (!steps.finite()) return false;
        const float base = half(steps.minimum), step = half(steps.scale);
        int64_t i = first;
        for (; i + lanes <= end; i += lanes) store_bytes(codes + i, codes_of(load<FV>(x + i), splat_f(base), splat_f(step), top));
        for (; i < end; ++i) codes[i] = code_of(x[i], base, step, top);
        put_half(scales, g * form.page + token, steps.scale);
        put_half(scales, (groups + g) * form.page + token, steps.minimum);
    }
    pack_row(codes, form.width, form.bits, page + token * form.row_bytes());
    return true;
}

void decode_grid_row(const PageForm& form, const uint8_t* page, int64_t token, float* out) {
    const int64_t groups = form.groups();
    const uint8_t *row = page + token * form.row_bytes(), *scales = form.scales(page);
    uint8_t codes[max_head_dim + 8];
    unpack_row(row, form.width, form.bits, codes);
    for (int64_t g = 0; g < groups; ++g) {
        const float scale = half(load<uint16_t>(scales + 2 * (g * form.page + token)));
        const float minimum = half(load<uint16_t>(scales + 2 * ((groups + g) * form.page + token)));
        const int64_t end = (g + 1) * form.group < form.width ? (g + 1) * form.group : form.width;
        int64_t i = g * form.group;
        for (; i + lanes <= end; i += lanes) store_f(out + i, load_u8s(codes + i) * scale + minimum);
        for (; i < end; ++i) out[i] = static_cast<float>(codes[i]) * scale + minimum;
    }
}

// Code i of a row of codes of `bits` bits, in place.
void put_code(uint8_t* row, int64_t i, int bits, uint32_t code) {
    const int64_t bit = i * bits;
    const int shift = static_cast<int>(bit & 7);
    const uint32_t mask = ((1u << bits) - 1) << shift, placed = (code << shift) & mask;
    for (int b = 0; 8 * b < shift + bits; ++b) {
        uint8_t& byte = row[(bit >> 3) + b];
        byte = static_cast<uint8_t>((byte & ~(mask >> (8 * b))) | placed >> (8 * b));
    }
}

uint32_t get_code(const uint8_t* row, int64_t i, int bits) {
    const int64_t bit = i * bits;
    const int shift = static_cast<int>(bit & 7);
    uint32_t word = 0;
    for (int b = 0; 8 * b < shift + bits; ++b) word |= static_cast<uint32_t>(row[(bit >> 3) + b]) << (8 * b);
    return word >> shift & ((1u << bits) - 1);
}

// 2^exponent of a normal double.
double power(int exponent) {
    const uint64_t bits = static_cast<uint64_t>(exponent + 1023) << 52;
    double value;
    memcpy(&value, &bits, 8);
    return value;
}

// The largest element of a block sets the exponent of all. Source: Trukhanov and Soloveychik, arXiv 2403.20137.
bool encode_bfp_row(const PageForm& form, uint8_t* page, int64_t token, const float* x) {
    const double limit = (1 << (form.bits - 1)) - 1;
    uint8_t *exponents = page + form.page * form.row_bytes() + token * form.groups(), *row = page + token * form.row_bytes();
    row[form.row_bytes() - 1] = 0;  // bits behind the last code
    for (int64_t g = 0; g < form.groups(); ++g) {
        const int64_t first = g * form.group, end = first + form.group < form.width ? first + form.group : form.width;
        float least, most;
        if (!bounds(x + first, end - first, least, most)) return false;
        most = most > -least ? most : -least;
        const int exponent = most > 0 ? std::ilogb(most) : -127, held = exponent < -127 ? -127 : exponent;
        exponents[g] = static_cast<uint8_t>(held + 127);
        const double by = power(form.bits - 2 - held);  // exact: a float times a power of two is a double
        for (int64_t i = first; i < end; ++i) {
            const double code = std::nearbyint(static_cast<double>(x[i]) * by);
            put_code(row, i, form.bits, static_cast<uint32_t>(static_cast<int>(code > limit ? limit : code < -limit ? -limit : code)));
        }
    }
    return true;
}

void decode_bfp_row(const PageForm& form, const uint8_t* page, int64_t token, float* out) {
    const uint8_t *exponents = form.scales(page) + token * form.groups(), *row = page + token * form.row_bytes();
    const uint32_t sign = 1u << (form.bits - 1);
    for (int64_t i = 0; i < form.width; ++i) {
        const int whole = static_cast<int>(get_code(row, i, form.bits) ^ sign) - static_cast<int>(sign);
        out[i] = static_cast<float>(whole * power(static_cast<int>(exponents[i / form.group]) - 125 - form.bits));
    }
}

// Bytes of the next piece of a token in its tile, see PageForm.
inline int64_t piece_of(int64_t left) { return left >= 4 ? 4 : left >= 2 ? 2 : 1; }

// Codes of W channels of `group` tokens each; scales and minima are those of the whole group.
bool encode_group(const PageForm& form, uint8_t* page, int64_t first, const float* x, int64_t stride) {
    const int64_t row = form.row_bytes(), width = form.width, g = first / form.group;
    const float top = static_cast<float>((1 << form.bits) - 1);
    alignas(64) float least[max_head_dim + lanes], most[max_head_dim + lanes];  // then base and step
    memcpy(least, x, static_cast<size_t>(width) * 4), memcpy(most, x, static_cast<size_t>(width) * 4);
    FV lost = {};
    float lost_rest = 0;
    for (int64_t t = 0; t < form.group; ++t) {
        const float* from = x + t * stride;
        int64_t c = 0;
        for (; c + lanes <= width; c += lanes) {
            const FV v = load<FV>(from + c), low = load<FV>(least + c), high = load<FV>(most + c);
            store_f(least + c, v < low ? v : low), store_f(most + c, v > high ? v : high);
            lost += v * 0.0f;
        }
        for (; c < width; ++c) {
            const float v = from[c];
            least[c] = v < least[c] ? v : least[c], most[c] = v > most[c] ? v : most[c], lost_rest += v * 0.0f;
        }
    }
    if (!(sum_of(lost) + lost_rest == 0)) return false;  // NaN is not 0 either
    uint8_t* scales = page + form.page * row;
    bool finite = true;
    for (int64_t c = 0; c < width; ++c) {
        const Steps steps(least[c], most[c], form.bits);
        finite = finite && steps.finite();
        put_half(scales, g * width + c, steps.scale), put_half(scales, (form.page / form.group + g) * width + c, steps.minimum);
        least[c] = half(steps.minimum), most[c] = half(steps.scale);
    }
    if (!finite) return false;
    for (int64_t t = 0; t < form.group; ++t) {
        uint8_t codes[max_head_dim], packed[max_head_dim];
        const float* from = x + t * stride;
        int64_t c = 0;
        for (; c + lanes <= width; c += lanes) store_bytes(codes + c, codes_of(load<FV>(from + c), load<FV>(least + c), load<FV>(most + c), top));
        for (; c < width; ++c) codes[c] = code_of(from[c], least[c], most[c], top);
        pack_row(codes, width, form.bits, packed);
        const int64_t token = first + t, inside = token % tile_tokens;
        uint8_t* tile = page + (token - inside) * row;
        for (int64_t i = 0; i < row; i += piece_of(row - i)) {
            const int64_t bytes = piece_of(row - i);
            memcpy(tile + tile_tokens * i + inside * bytes, packed + i, static_cast<size_t>(bytes));
        }
    }
    return true;
}

void decode_grouped(const PageForm& form, const uint8_t* page, int64_t token, float* out) {
    const int64_t row = form.row_bytes(), inside = token % tile_tokens;
    const uint8_t* tile = page + (token - inside) * row;
    uint8_t packed[max_head_dim], codes[max_head_dim + 8];
    for (int64_t i = 0; i < row; i += piece_of(row - i)) {
        const int64_t bytes = piece_of(row - i);
        memcpy(packed + i, tile + tile_tokens * i + inside * bytes, static_cast<size_t>(bytes));
    }
    unpack_row(packed, form.width, form.bits, codes);
    const uint16_t* scale = reinterpret_cast<const uint16_t*>(form.scales(page)) + token / form.group * form.width;
    const uint16_t* minimum = scale + form.page / form.group * form.width;
    int64_t c = 0;
    for (; c + lanes <= form.width; c += lanes) store_f(out + c, load_u8s(codes + c) * load_halves(scale + c) + load_halves(minimum + c));
    for (; c < form.width; ++c) out[c] = static_cast<float>(codes[c]) * half(scale[c]) + half(minimum[c]);
}

// Byte of a page at which element i of a token begins.
inline int64_t byte_of(const PageForm& form, int64_t token, int64_t i) {
    if (!form.tiled()) return token * form.pitch() + i * form.item();
    return (token / tile_tokens * tile_tokens * form.width + i * tile_tokens + token % tile_tokens) * form.item();
}

}  // namespace

bool encode_page(const PageForm& form, uint8_t* page, int64_t first, int64_t count, const float* x, int64_t stride) {
    if (form.kind == PageKind::tiled_grid) {
        for (int64_t t = 0; t < count; t += form.group)
            if (!encode_group(form, page, first + t, x + t * stride, stride)) return false;
        return true;
    }
    for (int64_t t = 0; t < count; ++t) {
        const float* row = x + t * stride;
        const int64_t token = first + t;
        if (form.kind == PageKind::grid) {
            if (!encode_grid_row(form, page, token, row)) return false;
        } else if (form.kind == PageKind::bfp) {
            if (!encode_bfp_row(form, page, token, row)) return false;
        } else if (form.kind == PageKind::f32) {
            memcpy(page + token * form.pitch(), row, static_cast<size_t>(form.width) * 4);
        } else if (form.kind == PageKind::bf16) {
            uint8_t* to = page + token * form.pitch();
            for (int64_t i = 0; i < form.width; ++i) put_half(to, i, bf16_bits(row[i]));
        } else {
            for (int64_t i = 0; i < form.width; ++i) to_item(form.kind, row[i], page + byte_of(form, token, i));
        }
    }
    return true;
}

void decode_page(const PageForm& form, const uint8_t* page, int64_t first, int64_t count, float* out, int64_t stride) {
    for (int64_t t = 0; t < count; ++t) {
        const int64_t token = first + t;
        const uint8_t* row = page + token * form.pitch();
        float* to = out + t * stride;
        int64_t i = 0;
        switch (form.kind) {
            case PageKind::bfp: decode_bfp_row(form, page, token, to); continue;
            case PageKind::grid: decode_grid_row(form, page, token, to); continue;
            case PageKind::tiled_grid: decode_grouped(form, page, token, to); continue;
            case PageKind::f32: memcpy(to, row, static_cast<size_t>(form.width) * 4); continue;
            case PageKind::f16:
                for (; i + lanes <= form.width; i += lanes) store_f(to + i, load_halves(reinterpret_cast<const uint16_t*>(row) + i));
                break;
            case PageKind::bf16:
                for (; i + lanes <= form.width; i += lanes) store_f(to + i, load_bf16s(reinterpret_cast<const uint16_t*>(row) + i));
                break;
            default: break;
        }
        for (; i < form.width; ++i) to[i] = from_item(form.kind, page + byte_of(form, token, i));
    }
}

}  // namespace trimtab::TRIMTAB_ISA
