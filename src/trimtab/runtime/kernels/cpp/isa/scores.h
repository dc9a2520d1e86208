// Raw scores of a few queries with keys of a page. Codes of few bits are multiplied as they are: a query is scaled before, and what
// minima add is one number for all codes that share one.
#pragma once
#include "isa/heads.h"
#include "isa/matrices.h"

namespace trimtab::TRIMTAB_ISA {
namespace {

// Asks for some memory in small steps, between other work: all at once would fill the queues of the processor.
class Ahead {
  public:
    // `count` tokens of a page: what they are scaled by first, since that is needed first.
    void add(const PageForm& form, const uint8_t* page, int64_t inside, int64_t count) {
        const uint8_t *codes = page + inside * form.row_bytes(), *scales = form.scales(page);
        if (form.kind == PageKind::tiled_grid) {
            const int64_t first = inside / form.group, last = (inside + count - 1) / form.group + 1, apart = form.page / form.group;
            for (int64_t part = 0; part < 2; ++part)
                add(scales + 2 * form.width * (part * apart + first), scales + 2 * form.width * (part * apart + last));
            return add(codes, codes + count * form.row_bytes());
        }
        if (form.stride) return add_rows(page + inside * form.stride, form.row_bytes(), count, form.stride);
        add(codes, inside == 0 && count == form.page ? page + form.nbytes(count) : codes + count * form.row_bytes());
    }
    void add(const uint8_t* at, const uint8_t* end) {
        if (regions_ == most) return;
        region_[regions_++] = {at, end, 0, 0}, lines_ += (end - at) / 64 + 1;
    }
    // Rows with something else between them, which is not asked for.
    void add_rows(const uint8_t* at, int64_t bytes, int64_t count, int64_t stride) {
        if (regions_ == most) return;
        region_[regions_++] = {at, at + count * stride, bytes, stride}, lines_ += count * ((bytes + 63) / 64);
    }
    // Lines to ask for in each of `steps` steps.
    int64_t pace(int64_t steps) const { return steps > 0 ? (lines_ + steps - 1) / steps : 0; }
    void some(int64_t lines) {
        while (lines > 0 && next_ < regions_) {
            Region& region = region_[next_];
            if (region.stride) {
                for (int64_t i = 0; i < region.row; i += 64, --lines) prefetch(region.at + i);
                region.at += region.stride;
                if (region.at >= region.end) ++next_;
                continue;
            }
            const int64_t left = (region.end - region.at + 63) / 64, now = lines < left ? lines : left;
            const uint8_t* at = region.at;
            for (int64_t i = 0; i < now; ++i) prefetch(at + 64 * i);
            region.at = at + 64 * now, lines -= now;
            if (now == left) ++next_;
        }
    }

  private:
    static constexpr int most = 24;
    struct Region {
        const uint8_t *at, *end;
        int64_t row, stride;  // stride 0: everything from `at` to `end`
    };
    Region region_[most];
    int regions_ = 0, next_ = 0;
    int64_t lines_ = 0;
};

// Whether rows are read 2 * lanes elements at a time, even ones first, then odd ones: bf16 then takes one operation a register
// to become float. Queries are brought into that order before, and sums out of it afterwards.
template <PageKind KIND, int HEAD>
constexpr bool paired = KIND == PageKind::bf16 && HEAD > 0;

// Elements i .. i + lanes - 1 of a row in the order in which it is read.
template <PageKind KIND, bool PAIRED>
inline FV load_row(const uint8_t* row, int64_t i) {
    if constexpr (KIND == PageKind::f32) return load<FV>(reinterpret_cast<const float*>(row) + i);
    if constexpr (KIND == PageKind::f16) return load_halves(reinterpret_cast<const uint16_t*>(row) + i);
    if constexpr (PAIRED) {
        const UV both = load<UV>(row + i / (2 * lanes) * (4 * lanes));
        return as<FV>(i / lanes % 2 ? both & 0xffff0000u : both << 16);
    }
    return load_bf16s(reinterpret_cast<const uint16_t*>(row) + i);
}

// The elements of a row into the order in which it is read, and back.
inline void pair_up(const float* from, int64_t count, float* to) {
    IV even;
    for (int i = 0; i < lanes; ++i) even[i] = 2 * i;
    for (int64_t i = 0; i < count; i += 2 * lanes) {
        const FV a = load<FV>(from + i), b = load<FV>(from + i + lanes);
        store_f(to + i, __builtin_shuffle(a, b, even)), store_f(to + i + lanes, __builtin_shuffle(a, b, even + 1));
    }
}
inline void part_again(float* row, int64_t count) {
    IV mixed;
    for (int i = 0; i < lanes; ++i) mixed[i] = i / 2 + i % 2 * lanes;
    for (int64_t i = 0; i < count; i += 2 * lanes) {
        const FV a = load<FV>(row + i), b = load<FV>(row + i + lanes);
        store_f(row + i, __builtin_shuffle(a, b, mixed)), store_f(row + i + lanes, __builtin_shuffle(a, b, mixed + lanes / 2));
    }
}

// Keeps a value in its register, to be used several times: GCC would read it from memory each time.
inline void hold([[maybe_unused]] FV& v) {
#if defined(__AVX512F__) && defined(__AVX2__)  // where AVX-512 is emulated, no register is as long
    asm("" : "+v"(v));
#elif defined(__AVX2__)
    asm("" : "+x"(v));
#endif
}

#if defined(__AVX512F__)
// out[j] = the lanes of v[j] joined two by two, for j < 4.
template <class Join>
TRIMTAB_INLINE inline void store_folded(const FV* v, float* out, Join join) {
    // Of both halves of 4 lanes: a0+a2, b0+b2, a1+a3, b1+b3; then all 4 vectors side by side, and 4 times 4 lanes joined.
    const IV low = {0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29}, high = low + 2;
    const IV left = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29}, right = left + 2;
    auto two = [&](FV a, FV b) { return join(FV(__builtin_shuffle(a, b, low)), FV(__builtin_shuffle(a, b, high))); };
    const FV x = two(v[0], v[1]), y = two(v[2], v[3]), four = join(FV(__builtin_shuffle(x, y, left)), FV(__builtin_shuffle(x, y, right)));
    typedef float Half __attribute__((vector_size(32)));
    typedef float Quarter __attribute__((vector_size(16)));
    Half halves[2];
    memcpy(halves, &four, sizeof halves);
    const Half half = join(halves[0], halves[1]);
    Quarter quarters[2];
    memcpy(quarters, &half, sizeof quarters);
    const Quarter sums = join(quarters[0], quarters[1]);
    memcpy(out, &sums, sizeof sums);
}
#endif

// out[j] = sum of the lanes of v[j], for j < 4, added in the same order by every instruction set of 8 lanes.
inline void store_sums(const FV* v, float* out) {
#if defined(__AVX512F__)
    store_folded(v, out, [](auto a, auto b) { return a + b; });
#elif defined(__AVX2__)
    auto two = [](FV a, FV b) {  // of both halves: a0+a2, b0+b2, a1+a3, b1+b3
        const __m256 x = as<__m256>(a), y = as<__m256>(b);
        return as<__m256>(as<FV>(_mm256_unpacklo_ps(x, y)) + as<FV>(_mm256_unpackhi_ps(x, y)));
    };
    const __m256 x = two(v[0], v[1]), y = two(v[2], v[3]);
    const FV four = as<FV>(_mm256_shuffle_ps(x, y, 0x44)) + as<FV>(_mm256_shuffle_ps(x, y, 0xee));
    const __m256 both = as<__m256>(four);
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1)));
#else
    for (int j = 0; j < 4; ++j)
        out[j] = ((v[j][0] + v[j][2]) + (v[j][1] + v[j][3])) + ((v[j][4] + v[j][6]) + (v[j][5] + v[j][7]));
#endif
}

// Products of Q queries with KEYS neighbouring keys; the sum of query n and key j goes to scores[n * score_stride + j].
// row(j, i): elements i .. i + lanes - 1 of key j.
template <int Q, int KEYS, int HEAD, class Row>
inline void products(const float* const* q, int64_t head_dim, Row row, float* scores) {
    FV acc[Q * KEYS];
    each<Q * KEYS>([&](auto k) TRIMTAB_INLINE { acc[k] = FV{}; });
    auto step = [&](int64_t i) TRIMTAB_INLINE {
        FV query[Q];
        each<Q>([&](auto n) TRIMTAB_INLINE {
            query[n] = load<FV>(q[n] + i);
            hold(query[n]);
        });
        each<KEYS>([&](auto j) TRIMTAB_INLINE {
            const FV key = row(j, i);
            each<Q>([&](auto n) TRIMTAB_INLINE {
                constexpr int k = decltype(n)::value * KEYS + decltype(j)::value;
                acc[k] = multiply_add(key, query[n], acc[k]);
            });
        });
    };
    if constexpr (HEAD > 0) {
#pragma GCC unroll 16
        for (int64_t i = 0; i < HEAD; i += lanes) step(i);
    } else {
        for (int64_t i = 0; i < head_dim; i += lanes) step(i);
    }
    each<Q>([&](auto n) TRIMTAB_INLINE {
        if constexpr (KEYS == 4) store_sums(acc + 4 * n, scores + n * score_stride);
        else scores[n * score_stride] = sum_of(acc[n]);
    });
}

// Raw scores of Q queries with `count` keys in rows.
template <PageKind KIND, int Q, int HEAD>
__attribute__((noinline)) void score_rows(const float* const* q, const uint8_t* k, int64_t row_bytes, int64_t head_dim, int count,
                                           int64_t pace, Ahead& ahead, float* scores) {
    const int64_t own = head_dim * (KIND == PageKind::f32 ? 4 : 2);  // bytes of a row; between rows may lie others
    int s = 0;
    for (; s < count; s += 4) {
        const uint8_t* row = k + s * row_bytes;
        auto element = [&](int j, int64_t i) { return load_row<KIND, paired<KIND, HEAD>>(row + j * row_bytes, i); };
        if (s + 4 > count) break;
        if (row_bytes == own)
            for (int64_t line = 0; line < 4 * own; line += 64) prefetch(row + 8 * own + line);
        else
            for (int64_t j = 8; j < 12; ++j)
                for (int64_t line = 0; line < own; line += 64) prefetch(row + j * row_bytes + line);
        ahead.some(pace);
        products<Q, 4, HEAD>(q, head_dim, element, scores + s);
    }
    for (; s < count; ++s) {
        const uint8_t* row = k + s * row_bytes;
        products<Q, 1, HEAD>(q, head_dim, [&](int, int64_t i) { return load_row<KIND, paired<KIND, HEAD>>(row, i); }, scores + s);
    }
}

// Sums that are kept apart, so that an addition need not wait for the one before; as many as registers hold.
constexpr int chains = lanes == 16 ? 2 : 1;

// The next `lanes` codes of a row as floats.
template <int BITS>
inline FV row_codes(const uint8_t* from) {
    if constexpr (BITS == 8) return load_u8s(from);
#if defined(__AVX512F__)
    const __m512i by_two = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i by_four = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
    const __m512i low = _mm512_set1_epi32(load<int32_t>(from));
    if constexpr (BITS == 2) return low_bits<2>(as<UV>(_mm512_srlv_epi32(low, by_two)));
    const __m512i both = _mm512_mask_set1_epi32(low, 0xff00, load<int32_t>(from + 4));
    return low_bits<4>(as<UV>(_mm512_srlv_epi32(both, by_four)));
#else
    constexpr uint32_t b = BITS;
    UV word;
    if constexpr (BITS == 2) word = UV{} + load<uint16_t>(from);
    else word = UV{} + load<uint32_t>(from);
    return low_bits<BITS>(word >> UV{0, b, 2 * b, 3 * b, 4 * b, 5 * b, 6 * b, 7 * b});
#endif
}

// The first `count` of `lanes` floats or halves, and 0: what stands behind may be anything.
inline FV first_of(const float* from, int count) {
    if (count >= lanes) return load<FV>(from);
#if defined(__AVX512F__)
    if (count > 0) return as<FV>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from));
    return FV{};
#endif
    alignas(64) float some[lanes] = {};
    memcpy(some, from, static_cast<size_t>(count) * 4);
    return load<FV>(some);
}
inline FV first_of(const uint16_t* from, int count) {
    if (count >= lanes) return load_halves(from);
#if defined(__AVX512F__)
    if (count <= 0) return FV{};
    const __m256i halves = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), from);
    return as<FV>(_mm512_maskz_cvtph_ps(0xffff, halves));
#endif
    alignas(32) uint16_t some[lanes] = {};
    memcpy(some, from, static_cast<size_t>(count) * 2);
    return load_halves(some);
}

// Raw scores with keys of a grid by rows: products with codes, group after group, times scales.
template <int BITS, int Q>
__attribute__((noinline)) void score_coded_rows(const PageForm& form, const float* const* q, const uint8_t* page, int64_t inside,
                                                 int count, int64_t pace, Ahead& ahead, float* scores) {
    const uint16_t *scale = reinterpret_cast<const uint16_t*>(form.scales(page)) + inside, *minimum = scale + form.groups() * form.page;
    const int64_t row_bytes = form.row_bytes();
    alignas(64) float raw[Q * score_stride];
    for (int64_t g = 0, first = 0; first < form.width; ++g, first += form.group) {
        const int64_t size = first + form.group < form.width ? form.group : form.width - first;
        const float* part[Q];
        float sum[Q];
        for (int n = 0; n < Q; ++n) {
            part[n] = q[n] + first;
            FV all = {};
            for (int64_t i = 0; i < size; i += lanes) all += load<FV>(part[n] + i);
            sum[n] = sum_of(all);
        }
        const uint8_t* rows = page + inside * row_bytes + first * BITS / 8;
        int s = 0;
        for (; s + 4 <= count; s += 4) {
            const uint8_t* row = rows + s * row_bytes;
            if (first == 0) ahead.some(pace);
            products<Q, 4, 0>(part, size, [&](int j, int64_t i) { return row_codes<BITS>(row + j * row_bytes + i * BITS / 8); }, raw + s);
        }
        for (; s < count; ++s) {
            const uint8_t* row = rows + s * row_bytes;
            products<Q, 1, 0>(part, size, [&](int, int64_t i) { return row_codes<BITS>(row + i * BITS / 8); }, raw + s);
        }
        for (int t = 0; t < count; t += lanes) {
            const FV step = first_of(scale + g * form.page + t, count - t), least = first_of(minimum + g * form.page + t, count - t);
            for (int n = 0; n < Q; ++n) {
                const FV before = first ? load<FV>(scores + n * score_stride + t) : FV{};
                const FV minima = multiply_add(least, splat_f(sum[n]), before), codes = load<FV>(raw + n * score_stride + t);
                store_f(scores + n * score_stride + t, multiply_add(codes, step, minima));
            }
        }
    }
}

// Scores of TILES * 16 tokens that share their scales, word after word: weights [Q, W] times codes, from `start` on. REST: only of
// channels behind the last whole word.
template <int BITS, int Q, int TILES, bool REST = false>
inline void score_codes(const PageForm& form, const uint8_t* tiles, const float (*q)[max_head_dim], const float* start, float* scores) {
    constexpr int parts = TILES * tile_tokens / lanes, apart = tile_tokens / lanes;  // registers of all tokens, of a tile
    const int64_t bytes = form.row_bytes(), tile_bytes = tile_tokens * bytes, words = bytes / 4;
    FV acc[chains * Q * parts];
    each<chains * Q * parts>([&](auto i) TRIMTAB_INLINE { acc[i] = FV{}; });
    // COUNT channels from c on, whose codes stand in words of SIZE bytes; FULL: the keys have all of them.
    auto channels = [&](auto narrow, int64_t at, int64_t c, auto count, auto full) TRIMTAB_INLINE {
        constexpr int64_t size = sizeof(narrow) / lanes;
        UV word[parts];
        each<parts>([&](auto p) TRIMTAB_INLINE {
            const uint8_t* from = tiles + p / apart * tile_bytes + tile_tokens * at + p % apart * size * lanes;
            word[p] = __builtin_convertvector(load<decltype(narrow)>(from), UV);
        });
        each<decltype(count)::value>([&](auto i) TRIMTAB_INLINE {
            if (!decltype(full)::value && c + i >= form.width) return;
            FV code[parts];
            each<parts>([&](auto p) TRIMTAB_INLINE { code[p] = low_bits<BITS>(word[p] >> (BITS * i)); });
            each<Q>([&](auto n) TRIMTAB_INLINE {
                FV query = splat_f(q[n][c + i]);
                hold(query);
                each<parts>([&](auto p) TRIMTAB_INLINE {
                    constexpr int k = (decltype(i)::value % chains * Q + decltype(n)::value) * parts + decltype(p)::value;
                    acc[k] = multiply_add(code[p], query, acc[k]);
                });
            });
        });
    };
    constexpr int per_word = 32 / BITS;
    for (int64_t w = REST ? words : 0; w < words; ++w)
        channels(UV{}, 4 * w, w * per_word, std::integral_constant<int, per_word>{}, std::true_type{});
    typedef uint8_t Narrow __attribute__((vector_size(lanes)));
    int64_t c = words * per_word;
    if (bytes % 4 >= 2) channels(HV{}, 4 * words, c, std::integral_constant<int, per_word / 2>{}, std::false_type{}), c += per_word / 2;
    if (bytes % 2) channels(Narrow{}, bytes - 1, c, std::integral_constant<int, per_word / 4>{}, std::false_type{});
    each<Q * parts>([&](auto i) TRIMTAB_INLINE {
        FV sum = acc[i];
        if constexpr (chains == 2) sum += acc[Q * parts + i];
        store_f(scores + i / parts * score_stride + i % parts * lanes, sum + splat_f(start[i / parts]));
    });
}

// Scores of TILES * 16 tokens whose floats lie channel after channel, as those of thin keys do.
template <PageKind KIND, int Q, int TILES>
inline void score_channels(const PageForm& form, const uint8_t* tiles, const float* const* q, float* scores) {
    constexpr int parts = TILES * tile_tokens / lanes, apart = tile_tokens / lanes;
    constexpr int64_t item = KIND == PageKind::tiled_f32 ? 4 : 2;
    const int64_t tile_bytes = tile_tokens * item * form.width;
    FV acc[chains * Q * parts];
    each<chains * Q * parts>([&](auto i) TRIMTAB_INLINE { acc[i] = FV{}; });
    auto channel = [&](int64_t c, auto chain) TRIMTAB_INLINE {
        FV key[parts];
        each<parts>([&](auto p) TRIMTAB_INLINE {
            const uint8_t* from = tiles + p / apart * tile_bytes + (c * tile_tokens + p % apart * lanes) * item;
            if constexpr (KIND == PageKind::tiled_f32) key[p] = load<FV>(from);
            else if constexpr (KIND == PageKind::tiled_f16) key[p] = load_halves(reinterpret_cast<const uint16_t*>(from));
            else key[p] = load_bf16s(reinterpret_cast<const uint16_t*>(from));
        });
        each<Q>([&](auto n) TRIMTAB_INLINE {
            FV query = splat_f(q[n][c]);
            hold(query);
            each<parts>([&](auto p) TRIMTAB_INLINE {
                constexpr int k = (decltype(chain)::value * Q + decltype(n)::value) * parts + decltype(p)::value;
                acc[k] = multiply_add(key[p], query, acc[k]);
            });
        });
    };
    int64_t c = 0;
    for (; c + chains <= form.width; c += chains) each<chains>([&](auto i) TRIMTAB_INLINE { channel(c + i, i); });
    for (; c < form.width; ++c) channel(c, std::integral_constant<int, 0>{});
    each<Q * parts>([&](auto i) TRIMTAB_INLINE {
        FV sum = acc[i];
        if constexpr (chains == 2) sum += acc[Q * parts + i];
        store_f(scores + i / parts * score_stride + i % parts * lanes, sum);
    });
}

template <PageKind KIND, int Q>
__attribute__((noinline)) void score_tiles(const PageForm& form, const float* const* q, const uint8_t* page, int64_t inside, int count,
                                            int64_t pace, Ahead& ahead, float* scores) {
    for (int t = 0, tiles; t < count; t += tiles * tile_tokens) {
        tiles = chains > 1 && t + tile_tokens < count ? 2 : 1;
        ahead.some(tiles * pace);
        const uint8_t* at = page + (inside + t) * form.row_bytes();
        if (tiles == 2) score_channels<KIND, Q, 2>(form, at, q, scores + t);
        else score_channels<KIND, Q, 1>(form, at, q, scores + t);
    }
}

}  // namespace
}  // namespace trimtab::TRIMTAB_ISA
