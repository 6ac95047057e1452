// Linear layers over packed weights and the elementwise steps between them, for float32 and bfloat16.
//
// Weights lie in panels of 16 outputs, [N / 16][K][16] float, [N / 16][K / 2][16][2] bfloat16 (pairs of k, the layout of
// VNNI) or [N / 16][K / 4][16][4] bytes, zero-padded. A register tile is up to 12 tokens x 2 panels, its operands packed
// k-major, as in BLIS (Van Zee and van de Geijn, 2015). One layout serves one token (bound by memory) and a thousand (bound
// by arithmetic).
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "parallel.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include <immintrin.h>
#define FAIRLEAD_AVX512 1
#ifdef __AVX512VNNI__
#define FAIRLEAD_BYTES 1
#endif
#endif

namespace {

using at::Tensor;
using fairlead::parallel_for;
using fairlead::Pool;
using bf16 = at::BFloat16;

// Sixteen numbers, by the vector extension that GCC and Clang share: one register of AVX-512, several of a narrower machine.
typedef float vec __attribute__((vector_size(64)));
typedef uint32_t bits __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));
constexpr int LANES = 16;

inline vec splat(float x) { return vec{} + x; }

#ifdef FAIRLEAD_AVX512
inline __mmask16 first(int64_t n) { return n >= LANES ? 0xffff : (__mmask16)((1u << n) - 1); }
inline vec load(const float* p, int64_t n) { return (vec)_mm512_maskz_loadu_ps(first(n), p); }
inline void store(float* p, vec x, int64_t n) { _mm512_mask_storeu_ps(p, first(n), (__m512)x); }
inline vec load(const bf16* p, int64_t n) {
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(n), p)), 16);
}
inline __m256i narrow(vec x) {
#ifdef __AVX512BF16__
    return (__m256i)_mm512_cvtneps_pbh((__m512)x);
#else
    const __m512i u = (__m512i)x, odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i even = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask((__m512)x, (__m512)x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(nan, even, _mm512_set1_epi32(0x7fc0)));
#endif
}
inline void store(bf16* p, vec x, int64_t n) { _mm256_mask_storeu_epi16(p, first(n), narrow(x)); }
inline vec rounded(vec x, bf16) { return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow(x)), 16); }
inline vec fma(vec a, vec b, vec c) { return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
inline float sum(vec x) { return _mm512_reduce_add_ps((__m512)x); }
#else
template <typename T>
inline vec load(const T* p, int64_t n) {
    vec x{};
    for (int i = 0; i < std::min<int64_t>(n, LANES); i++) x[i] = (float)p[i];
    return x;
}
template <typename T>
inline void store(T* p, vec x, int64_t n) {
    for (int i = 0; i < std::min<int64_t>(n, LANES); i++) p[i] = (T)x[i];
}
inline vec rounded(vec x, bf16) {
    for (int i = 0; i < LANES; i++) x[i] = (float)(bf16)x[i];
    return x;
}
inline vec fma(vec a, vec b, vec c) { return a * b + c; }
inline float sum(vec x) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += x[i];
    return total;
}
#endif
inline vec rounded(vec x, float) { return x; }

// e^x by Cephes' polynomial: within 2 units of the last place.
inline vec exponential(vec x) {
    const vec low = splat(-87.3f), high = splat(88.3f);
    x = x < low ? low : x;
    x = x > high ? high : x;
    const vec scaled = x * 1.44269504088896341f;
    const ints n = __builtin_convertvector(scaled + (scaled < 0.f ? splat(-0.5f) : splat(0.5f)), ints);
    const vec whole = __builtin_convertvector(n, vec);
    x = fma(whole, splat(-0.693359375f), x);
    x = fma(whole, splat(2.12194440e-4f), x);
    vec y = splat(1.9875691500e-4f);
    y = fma(y, x, splat(1.3981999507e-3f));
    y = fma(y, x, splat(8.3334519073e-3f));
    y = fma(y, x, splat(4.1665795894e-2f));
    y = fma(y, x, splat(1.6666665459e-1f));
    y = fma(y, x, splat(5.0000001201e-1f));
    y = fma(y, x * x, x) + 1.f;
    return y * (vec)((n + 127) << 23);
}

enum Gate : int64_t { NO_GATE = 0, SILU = 1, GELU_TANH = 2, GELU = 3 };

inline vec activate(vec x, int64_t gate) {
    if (gate == SILU) return x / (exponential(-x) + 1.f);
    if (gate == GELU_TANH) return x / (exponential(-1.5957691216057308f * fma(x * x * x, splat(0.044715f), x)) + 1.f);
    for (int i = 0; i < LANES; i++) x[i] = 0.5f * x[i] * (1.f + std::erf(x[i] * 0.70710678118654752f));
    return x;
}

// ---- the tile: R tokens times P panels

#ifdef FAIRLEAD_AVX512
constexpr int MAX_ROWS = 12;
#else
constexpr int MAX_ROWS = 4;
#endif

// How a product is formed: weights as they lie and tokens packed k-major, R side by side.
struct FloatDot {  // float32 weights
    using Weight = float;
    using Token = float;
    using Sum = vec;
    static constexpr int DEPTH = 1;  // ks of one step
};
struct WidenDot {  // bfloat16 weights widened to float in registers: exact products, and the faster way where a fused
    using Weight = bf16;  // multiply-add of floats issues twice a cycle and a bfloat16 dot every second cycle (Intel)
    using Token = float;
    using Sum = vec;
    static constexpr int DEPTH = 2;
};
struct PairDot {  // vdpbf16ps: twice the products of a float multiply-add where it issues as often (Zen 4 and later)
    using Weight = bf16;
    using Token = uint32_t;  // a pair of bfloat16
    using Sum = vec;
    static constexpr int DEPTH = 2;
};
struct ByteDot {  // vpdpbusd: four products of a byte without sign, the weight, and one with, the token; sums are exact
    using Weight = uint8_t;  // 128 more than the number that it stands for
    using Token = uint32_t;  // four int8
    using Sum = ints;
    static constexpr int DEPTH = 4;
};

template <typename Dot, int R, int P>
inline void multiply(const typename Dot::Token* x, const typename Dot::Weight* w, int64_t stride, int64_t steps, typename Dot::Sum (&acc)[R][P]) {
    if constexpr (std::is_same_v<Dot, FloatDot>) {
        for (int64_t k = 0; k < steps; k++, x += R, w += LANES) {
            vec weight[P];
            for (int p = 0; p < P; p++) memcpy(&weight[p], w + p * stride, 64);
            for (int r = 0; r < R; r++)
                for (int p = 0; p < P; p++) acc[r][p] = fma(splat(x[r]), weight[p], acc[r][p]);
        }
    } else if constexpr (std::is_same_v<Dot, WidenDot>) {
        for (int64_t k = 0; k < steps; k++, x += 2 * R, w += 2 * LANES) {
            vec even[P], odd[P];
            for (int p = 0; p < P; p++) {
                bits pair;
                memcpy(&pair, w + p * stride, 64);
                even[p] = (vec)(pair << 16);
                odd[p] = (vec)(pair & 0xffff0000u);
            }
            for (int r = 0; r < R; r++)
                for (int p = 0; p < P; p++) acc[r][p] = fma(splat(x[r]), even[p], acc[r][p]);
            for (int r = 0; r < R; r++)
                for (int p = 0; p < P; p++) acc[r][p] = fma(splat(x[R + r]), odd[p], acc[r][p]);
        }
    } else if constexpr (std::is_same_v<Dot, ByteDot>) {
#ifdef FAIRLEAD_BYTES
        for (int64_t k = 0; k < steps; k++, x += R, w += 4 * LANES) {
            __m512i weight[P];
            for (int p = 0; p < P; p++) memcpy(&weight[p], w + p * stride, 64);
            for (int r = 0; r < R; r++)
                for (int p = 0; p < P; p++)
                    acc[r][p] = (ints)_mm512_dpbusd_epi32((__m512i)acc[r][p], weight[p], _mm512_set1_epi32((int)x[r]));
        }
#endif
    } else {
#ifdef __AVX512BF16__
        for (int64_t k = 0; k < steps; k++, x += R, w += 2 * LANES) {
            __m512bh weight[P];
            for (int p = 0; p < P; p++) memcpy(&weight[p], w + p * stride, 64);
            for (int r = 0; r < R; r++)
                for (int p = 0; p < P; p++)
                    acc[r][p] = (vec)_mm512_dpbf16_ps((__m512)acc[r][p], (__m512bh)_mm512_set1_epi32((int)x[r]), weight[p]);
        }
#endif
    }
}

// A token's bytes stand for multiples of `scale`; 128 times their sum is what the weights' offset adds to each product.
struct Quantized {
    float scale;
    int32_t offset;
};

// Where a tile's results go: `out` rows of `width` columns.
template <typename T>
struct Destination {
    T* out;
    int64_t width;
    const float* bias;  // of every packed column, or null
    int64_t gate;
    const float* scales = nullptr;  // of bytes: of every packed column,
    const Quantized* rows = nullptr;  // and of every row
};

template <typename Dot, typename T, int R, int P>
void tile(const void* tokens, const void* panel, int64_t stride, int64_t steps, const Destination<T>& to, int64_t row, int64_t first_panel) {
    vec acc[R][P] = {};
    if constexpr (std::is_same_v<Dot, ByteDot>) {
        ints sums[R][P];
        for (int r = 0; r < R; r++)
            for (int p = 0; p < P; p++) sums[r][p] = ints{} - to.rows[row + r].offset;
        multiply<Dot, R, P>((const typename Dot::Token*)tokens, (const typename Dot::Weight*)panel, stride, steps, sums);
        for (int p = 0; p < P; p++) {
            const vec scale = load(to.scales + (first_panel + p) * LANES, LANES);
            // By multiply-adds: products alone may be reordered, and in one tile otherwise than in another.
            for (int r = 0; r < R; r++) acc[r][p] = fma(fma(__builtin_convertvector(sums[r][p], vec), splat(to.rows[row + r].scale), vec{}), scale, vec{});
        }
    } else {
        multiply<Dot, R, P>((const typename Dot::Token*)tokens, (const typename Dot::Weight*)panel, stride, steps, acc);
    }
    if (to.bias)
        for (int p = 0; p < P; p++) {
            const vec bias = load(to.bias + (first_panel + p) * LANES, LANES);
            for (int r = 0; r < R; r++) acc[r][p] += bias;
        }
    if (to.gate == NO_GATE) {
        for (int r = 0; r < R; r++)
            for (int p = 0; p < P; p++) {
                const int64_t column = (first_panel + p) * LANES;
                store(to.out + (row + r) * to.width + column, acc[r][p], to.width - column);
            }
    } else {
        // Panels alternate between gate and up. Rounded where separate layers would round.
        for (int r = 0; r < R; r++)
            for (int p = 0; p + 1 < P; p += 2) {
                const int64_t column = (first_panel + p) / 2 * LANES;
                const vec gate = rounded(activate(rounded(acc[r][p], T{}), to.gate), T{});
                store(to.out + (row + r) * to.width + column, gate * rounded(acc[r][p + 1], T{}), to.width - column);
            }
    }
}

template <typename T>
using TileFunction = void (*)(const void*, const void*, int64_t, int64_t, const Destination<T>&, int64_t, int64_t);

template <typename Dot, typename T, int P, int... R>
constexpr std::array<TileFunction<T>, sizeof...(R)> tiles_of(std::integer_sequence<int, R...>) {
    return {&tile<Dot, T, R + 1, P>...};
}
template <typename Dot, typename T, int P>
inline constexpr auto TILES = tiles_of<Dot, T, P>(std::make_integer_sequence<int, MAX_ROWS>{});

// For few tokens more panels side by side: enough sums that do not wait for each other. (Partial sums of one output would
// do as well, but then its rounding would depend on how many tokens are computed with it.)
constexpr int WIDE_ROWS = 3, WIDEST_ROWS = 1;
template <typename Dot, typename T>
inline constexpr auto WIDE_TILES = tiles_of<Dot, T, 4>(std::make_integer_sequence<int, WIDE_ROWS>{});
template <typename Dot, typename T>
inline constexpr auto WIDEST_TILES = tiles_of<Dot, T, 8>(std::make_integer_sequence<int, WIDEST_ROWS>{});

// ---- tokens, packed k-major in tiles of rows

#ifdef FAIRLEAD_AVX512
inline void transpose(__m512i (&a)[16]) {
    __m512i b[16];
    for (int i = 0; i < 8; i++) {
        b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
        b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++) {
        a[4 * i] = _mm512_unpacklo_epi64(b[4 * i], b[4 * i + 2]);
        a[4 * i + 1] = _mm512_unpackhi_epi64(b[4 * i], b[4 * i + 2]);
        a[4 * i + 2] = _mm512_unpacklo_epi64(b[4 * i + 1], b[4 * i + 3]);
        a[4 * i + 3] = _mm512_unpackhi_epi64(b[4 * i + 1], b[4 * i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
        b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
        b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
        b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; i++) {
        a[i] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88);
        a[i + 8] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd);
    }
}
#endif

#ifdef FAIRLEAD_BYTES
// Sixteen numbers as bytes: the nearest of -127 to 127 multiples.
template <typename T>
inline __m128i bytes(const T* x, int64_t n, float inverse) {
    return _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32((__m512)(load(x, n) * inverse)));
}
#endif

// Sixteen units of one row: floats of 16 ks, pairs of 32, or bytes of 64, which stand for x * inverse.
template <typename Dot, typename T>
inline bits units(const T* row, int64_t k, int64_t size, [[maybe_unused]] float inverse) {
    if constexpr (std::is_same_v<Dot, ByteDot>) {
        bits quads{};
#ifdef FAIRLEAD_BYTES
        __m128i parts[4];
        for (int i = 0; i < 4; i++) parts[i] = bytes(row + 4 * k + 16 * i, std::max<int64_t>(0, size - 4 * k - 16 * i), inverse);
        memcpy(&quads, parts, 64);
#endif
        return quads;
    } else if constexpr (std::is_same_v<Dot, PairDot>) {
        bits pairs{};
        memcpy(&pairs, row + 2 * k, std::min<int64_t>(64, 2 * (size - 2 * k)));
        return pairs;
    } else {
        return (bits)load(row + k, size - k);
    }
}

// Four bytes a lane, added to its sum.
inline ints add_bytes(ints sum, [[maybe_unused]] bits row) {
#ifdef FAIRLEAD_BYTES
    return (ints)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi8(1), (__m512i)row);
#else
    return sum;
#endif
}

// Of a row's largest number: below it the inverse would not be finite, and the row counts as zeros.
constexpr float SMALLEST = 1e-30f;

// The largest number of a row, infinity and what is no number among them: as bits of positive floats these order alike.
template <typename T>
float largest(const T* x, int64_t size) {
    bits most{};
    for (int64_t k = 0; k < size; k += LANES) {
        const bits x_bits = (bits)load(x + k, size - k) & 0x7fffffffu;
        most = x_bits > most ? x_bits : most;
    }
    uint32_t largest = 0;
    for (int i = 0; i < LANES; i++) largest = std::max(largest, most[i]);
    float out;
    memcpy(&out, &largest, 4);
    return out;
}

// `quantized`, of bytes: what the rows' bytes stand for.
template <typename Dot, typename T>
void pack_rows(const T* x, int64_t size, int rows, int64_t num_units, uint32_t* to, [[maybe_unused]] Quantized* quantized) {
    float inverse[LANES] = {};
    ints sums[LANES] = {};
    if constexpr (std::is_same_v<Dot, ByteDot>)
        for (int r = 0; r < rows; r++) {
            const float most = largest(x + r * size, size);
            inverse[r] = most >= SMALLEST ? 127.f / most : 0.f;
            quantized[r].scale = most * (1.f / 127.f);
        }
    for (int64_t k = 0; k < num_units; k += LANES) {
        const int64_t n = std::min<int64_t>(LANES, num_units - k);
        if (rows == 1) {
            const bits row = units<Dot>(x, k, size, inverse[0]);
            if constexpr (std::is_same_v<Dot, ByteDot>) sums[0] = add_bytes(sums[0], row);
            memcpy(to + k, &row, n * 4);
            continue;
        }
#ifdef FAIRLEAD_AVX512
        __m512i block[16];
        for (int r = 0; r < 16; r++) block[r] = r < rows ? (__m512i)units<Dot>(x + r * size, k, size, inverse[r]) : _mm512_setzero_si512();
        if constexpr (std::is_same_v<Dot, ByteDot>)
            for (int r = 0; r < rows; r++) sums[r] = add_bytes(sums[r], (bits)block[r]);
        transpose(block);
        for (int j = 0; j < n; j++) _mm512_mask_storeu_epi32(to + (k + j) * rows, first(rows), block[j]);
#else
        for (int r = 0; r < rows; r++) {
            const bits row = units<Dot>(x + r * size, k, size, 0.f);
            for (int j = 0; j < n; j++) to[(k + j) * rows + r] = row[j];
        }
#endif
    }
    if constexpr (std::is_same_v<Dot, ByteDot>)
        for (int r = 0; r < rows; r++) {
            quantized[r].offset = 0;
            for (int i = 0; i < LANES; i++) quantized[r].offset += 128 * sums[r][i];
        }
}

// Rows split into tiles of nearly one size.
struct RowTiles {
    int64_t rows, num_tiles;
    explicit RowTiles(int64_t rows) : rows(rows), num_tiles((rows + MAX_ROWS - 1) / MAX_ROWS) {}
    int64_t begin(int64_t tile) const { return tile * (rows / num_tiles) + std::min(tile, rows % num_tiles); }
    int size(int64_t tile) const { return (int)(begin(tile + 1) - begin(tile)); }
};

// A thread costs some microseconds to wake: it gets at least this many weights times tokens' worth of work.
constexpr int64_t WEIGHT_BYTES_PER_THREAD = 96 << 10;
constexpr int64_t PRODUCTS_PER_THREAD = 512 << 10;
constexpr int64_t ELEMENTS_PER_THREAD = 16 << 10;
// Packed tokens of one round: they stay in the second-level cache while weights pass.
constexpr int64_t ROUND_BYTES = 512 << 10;
constexpr int64_t CHUNK_BYTES = 64 << 10;
// 127 * 127 of each, which is the result, stay within 31 bits; what overflows before the offset is taken off comes back.
constexpr int64_t MAX_INT8_DEPTH = 128 << 10;

template <typename Dot, typename T>
void run(const Tensor& x, const Tensor& packed, Tensor& out, const float* bias, int64_t gate, [[maybe_unused]] const float* scales = nullptr) {
    const int64_t size = x.size(1), num_panels = packed.size(0), steps = packed.size(1);
    const int64_t stride = packed.stride(0), width = out.size(1);
    const int64_t num_units = std::is_same_v<Dot, WidenDot> ? 2 * steps : steps;
    const T* from = x.const_data_ptr<T>();
    const auto* weights = (const typename Dot::Weight*)packed.const_data_ptr();
    const RowTiles tiles(x.size(0));

    static thread_local std::vector<uint32_t> memory;
    static thread_local std::vector<Quantized> row_scales;
    if ((int64_t)memory.size() < tiles.rows * num_units) memory.resize(tiles.rows * num_units);
    if (std::is_same_v<Dot, ByteDot> && (int64_t)row_scales.size() < tiles.rows) row_scales.resize(tiles.rows);
    uint32_t* const tokens = memory.data();
    Quantized* const quantized = row_scales.data();
    const Destination<T> to{out.mutable_data_ptr<T>(), width, bias, gate, scales, quantized};
    const int64_t tiles_per_thread = std::max<int64_t>(1, 4 * ELEMENTS_PER_THREAD / (size * MAX_ROWS + 1));
    parallel_for(0, tiles.num_tiles, tiles_per_thread, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; t++)
            pack_rows<Dot>(from + tiles.begin(t) * size, size, tiles.size(t), num_units, tokens + tiles.begin(t) * num_units, quantized + tiles.begin(t));
    });

    // Work is cut into rounds of row tiles times chunks of panels, taken one by one: a core that other work disturbs
    // takes fewer.
    const int panels_together = tiles.rows <= WIDEST_ROWS ? 8 : tiles.rows <= WIDE_ROWS ? 4 : 2;
    const int64_t num_groups = (num_panels + panels_together - 1) / panels_together;
    const int64_t group_bytes = panels_together * stride * (int64_t)sizeof(typename Dot::Weight);
    const int64_t chunk = tiles.num_tiles > 1 ? 1 : std::max<int64_t>(1, CHUNK_BYTES / std::max<int64_t>(1, group_bytes));
    const int64_t num_chunks = (num_groups + chunk - 1) / chunk;
    const int64_t round = std::max<int64_t>(1, ROUND_BYTES / std::max<int64_t>(1, MAX_ROWS * num_units * 4));
    const int64_t num_rounds = (tiles.num_tiles + round - 1) / round;
    const int64_t num_tasks = num_rounds * num_chunks;
    const int64_t bytes = packed.numel() * (int64_t)sizeof(typename Dot::Weight), products = packed.numel() * tiles.rows;
    const int64_t useful = std::max(bytes / WEIGHT_BYTES_PER_THREAD, products / PRODUCTS_PER_THREAD);

    Pool::get().run(num_tasks, std::max<int64_t>(1, useful), [&](int64_t task) {
            const int64_t first_tile = task / num_chunks * round, last_tile = std::min(tiles.num_tiles, first_tile + round);
            const int64_t begin = task % num_chunks * chunk, end = std::min(num_groups, begin + chunk);
            for (int64_t g = begin; g < end; g++) {
                const int64_t last = std::min(num_panels, (g + 1) * panels_together);
                for (int64_t t = first_tile; t < last_tile; t++) {
                    const int rows = tiles.size(t);
                    const int64_t row = tiles.begin(t);
                    for (int64_t p = g * panels_together; p < last;) {
                        const auto* panel = weights + p * stride;
                        const uint32_t* packed_rows = tokens + row * num_units;
                        if (last - p >= 8) {
                            WIDEST_TILES<Dot, T>[rows - 1](packed_rows, panel, stride, steps, to, row, p);
                            p += 8;
                        } else if (last - p >= 4) {
                            WIDE_TILES<Dot, T>[rows - 1](packed_rows, panel, stride, steps, to, row, p);
                            p += 4;
                        } else if (last - p >= 2) {
                            TILES<Dot, T, 2>[rows - 1](packed_rows, panel, stride, steps, to, row, p);
                            p += 2;
                        } else {
                            TILES<Dot, T, 1>[rows - 1](packed_rows, panel, stride, steps, to, row, p);
                            p += 1;
                        }
                    }
                }
            }
    });
}

bool dot_pairs() {
#if defined(__AVX512BF16__) && defined(FAIRLEAD_AVX512)
    static const bool fast = !__builtin_cpu_is("intel");
    return fast;
#else
    return false;
#endif
}

bool fast_int8() {
#ifdef FAIRLEAD_BYTES
    return true;
#else
    return false;
#endif
}

// x [M, K] times packed weights, plus a bias of every packed column: [M, N], or [M, N / 2] gated.
Tensor linear(const Tensor& x_in, const Tensor& packed, const std::optional<Tensor>& bias, int64_t num_columns, int64_t gate) {
    const Tensor x = x_in.is_contiguous() ? x_in : x_in.contiguous();
    TORCH_CHECK(x.dim() == 2 && x.scalar_type() == packed.scalar_type(), "linear: x is [M, K] of the weights' type");
    const bool narrow = x.scalar_type() == at::kBFloat16;
    const int64_t depth = packed.size(1) * (narrow ? 2 : 1);
    TORCH_CHECK(x.size(1) == depth || (narrow && x.size(1) + 1 == depth), "linear: x has ", x.size(1), " columns, the weights ", depth);
    Tensor out = at::empty({x.size(0), num_columns}, x.options());
    if (x.size(0) == 0) return out;
    const float* b = bias ? bias->const_data_ptr<float>() : nullptr;
    if (!narrow)
        run<FloatDot, float>(x, packed, out, b, gate);
    else if (dot_pairs())
        run<PairDot, bf16>(x, packed, out, b, gate);
    else
        run<WidenDot, bf16>(x, packed, out, b, gate);
    return out;
}

// x [M, K] times bytes, each row of x as bytes of its own scale: [M, N], or [M, N / 2] gated.
Tensor linear_int8(const Tensor& x_in, const Tensor& packed, const Tensor& scales, const std::optional<Tensor>& bias, int64_t num_columns, int64_t gate) {
    const Tensor x = x_in.is_contiguous() ? x_in : x_in.contiguous();
    const int64_t depth = packed.size(1) * 4;
    TORCH_CHECK(x.dim() == 2 && x.size(1) <= depth && x.size(1) + 4 > depth, "linear_int8: x has ", x.size(-1), " columns, the weights ", depth);
    TORCH_CHECK(packed.scalar_type() == at::kByte && scales.scalar_type() == at::kFloat && scales.numel() == packed.size(0) * LANES && scales.is_contiguous(),
                "linear_int8: a scale of every packed column");
    TORCH_CHECK(fast_int8(), "linear_int8: this processor has no AVX-512 VNNI");
    Tensor out = at::empty({x.size(0), num_columns}, x.options());
    if (x.size(0) == 0) return out;
    const float* b = bias ? bias->const_data_ptr<float>() : nullptr;
    if (x.scalar_type() == at::kFloat) {
        run<ByteDot, float>(x, packed, out, b, gate, scales.const_data_ptr<float>());
    } else {
        TORCH_CHECK(x.scalar_type() == at::kBFloat16, "linear_int8: x is float32 or bfloat16");
        run<ByteDot, bf16>(x, packed, out, b, gate, scales.const_data_ptr<float>());
    }
    return out;
}

// ---- low-rank additions (LoRA) of the adapters of one step, as Punica's SGMV (Chen et al., 2023): rows of one adapter together

// Where an adapter's weights for one layer lie in its arena: A of all siblings in panels, then for each sibling B in panels.
struct LowRank {
    static constexpr int MAX_PARTS = 3, PART = 6;
    static constexpr int64_t SIZE = 2 + MAX_PARTS * PART;
    const int64_t* at;
    int64_t a() const { return at[0]; }
    int64_t num_a_panels() const { return at[1]; }
    struct Part {
        int64_t b, rank, first_rank;  // rank 0: the adapter has nothing here
        int64_t column, num_columns;  // of the output
        int64_t step;  // columns from one panel to the next: 16, or 32 where two siblings alternate
    };
    Part part(int i) const {
        const int64_t* p = at + 2 + i * PART;
        return {p[0], p[1], p[2], p[3], p[4], p[5]};
    }
};

// Rows of one tile: few enough to be read where they lie, a pointer each, with sums for several panels beside them in registers.
constexpr int LOW_ROWS = std::min(MAX_ROWS, 6);

// What a row holds at `step`, in every lane: a float, or a pair of bfloat16 whose second one may be beyond the end.
template <typename T>
inline bits unit(const T* row, int64_t step, [[maybe_unused]] bool half = false) {
    if constexpr (std::is_same_v<T, float>) {
        return (bits)splat(row[step]);
    } else {
        uint32_t pair = 0;
        memcpy(&pair, row + 2 * step, half ? 2 : 4);
        return bits{} + pair;
    }
}

// Adapters are larger than what is at hand of them: their weights are asked for ahead, over pages' ends, where the processor stops.
constexpr int64_t AHEAD_BYTES = 4 << 10;
inline void ahead(const void* weights) { __builtin_prefetch((const char*)weights + AHEAD_BYTES); }

template <typename Dot>
inline vec multiply_unit(bits x, const typename Dot::Weight* w, vec acc) {
    bits weight;
    memcpy(&weight, w, 64);
    if constexpr (std::is_same_v<Dot, FloatDot>) return fma((vec)x, (vec)weight, acc);
#ifdef __AVX512BF16__
    if constexpr (std::is_same_v<Dot, PairDot>) return (vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)x, (__m512bh)weight);
#endif
    acc = fma((vec)(x << 16), (vec)(weight << 16), acc);
    return fma((vec)(x & 0xffff0000u), (vec)(weight & 0xffff0000u), acc);
}

// h = x A^T of R rows, one panel. Always as four sums, so that enough of them do not wait for each other whatever R is, and a
// row's bits do not depend on R.
template <typename Dot, typename T, int R>
void shrink(const T* x, int64_t size, const int64_t* rows, const T* a, T* h, int64_t width) {
    constexpr int SUMS = 4, DEPTH = Dot::DEPTH;
    const int64_t steps = size / DEPTH;
    const T* row[R];
    for (int r = 0; r < R; r++) row[r] = x + rows[r] * size;
    vec acc[R][SUMS] = {};
    int64_t k = 0;
    for (; k + SUMS <= steps; k += SUMS)
        for (int s = 0; s < SUMS; s++) {
            ahead(a + (k + s) * DEPTH * LANES);
            for (int r = 0; r < R; r++) acc[r][s] = multiply_unit<Dot>(unit(row[r], k + s), a + (k + s) * DEPTH * LANES, acc[r][s]);
        }
    for (; k < steps; k++)
        for (int r = 0; r < R; r++) acc[r][0] = multiply_unit<Dot>(unit(row[r], k), a + k * DEPTH * LANES, acc[r][0]);
    if (size % DEPTH)
        for (int r = 0; r < R; r++) acc[r][0] = multiply_unit<Dot>(unit(row[r], k, true), a + k * DEPTH * LANES, acc[r][0]);
    // By multiply-adds: sums alone may be reordered, and for one R otherwise than for another.
    const vec one = splat(1.f);
    for (int r = 0; r < R; r++) store(h + r * width, fma(fma(acc[r][0], one, acc[r][1]), one, fma(acc[r][2], one, acc[r][3])), LANES);
}

// y += h B^T of R rows, P panels.
template <typename Dot, typename T, int R, int P>
inline void expand(const T* h, int64_t low_width, const T* b, const LowRank::Part& part, int64_t first_panel, T* const* y) {
    const int64_t stride = part.rank * LANES;
    const T* const panel = b + first_panel * stride;
    vec acc[R][P] = {};
    for (int64_t k = 0; k < part.rank / Dot::DEPTH; k++) {
        for (int p = 0; p < P; p++) ahead(panel + p * stride + k * Dot::DEPTH * LANES);
        for (int r = 0; r < R; r++) {
            const bits x = unit(h + r * low_width, k);
            for (int p = 0; p < P; p++) acc[r][p] = multiply_unit<Dot>(x, panel + p * stride + k * Dot::DEPTH * LANES, acc[r][p]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++) {
            const int64_t n = part.num_columns - (first_panel + p) * LANES;
            T* const to = y[r] + part.column + (first_panel + p) * part.step;
            store(to, load(to, n) + acc[r][p], n);
        }
}

template <typename Dot, typename T, int R>
void expand_panels(const T* h, int64_t low_width, const T* b, const LowRank::Part& part, int64_t panel, int64_t end, T* y, int64_t width, const int64_t* rows) {
    T* row[R];
    for (int r = 0; r < R; r++) row[r] = y + rows[r] * width;
    for (; panel + 4 <= end; panel += 4) expand<Dot, T, R, 4>(h, low_width, b, part, panel, row);
    for (; panel < end; panel++) expand<Dot, T, R, 1>(h, low_width, b, part, panel, row);
}

template <typename T>
using Shrink = void (*)(const T*, int64_t, const int64_t*, const T*, T*, int64_t);
template <typename T>
using Expand = void (*)(const T*, int64_t, const T*, const LowRank::Part&, int64_t, int64_t, T*, int64_t, const int64_t*);
template <typename Dot, typename T, int... R>
constexpr std::array<Shrink<T>, sizeof...(R)> shrinks_of(std::integer_sequence<int, R...>) {
    return {&shrink<Dot, T, R + 1>...};
}
template <typename Dot, typename T, int... R>
constexpr std::array<Expand<T>, sizeof...(R)> expands_of(std::integer_sequence<int, R...>) {
    return {&expand_panels<Dot, T, R + 1>...};
}
template <typename Dot, typename T>
inline constexpr auto SHRINKS = shrinks_of<Dot, T>(std::make_integer_sequence<int, LOW_ROWS>{});
template <typename Dot, typename T>
inline constexpr auto EXPANDS = expands_of<Dot, T>(std::make_integer_sequence<int, LOW_ROWS>{});

constexpr int64_t PANELS_PER_TASK = 64;

template <typename Dot, typename T>
void add_low_rank_as(Tensor& y, const Tensor& x, const std::vector<const T*>& arenas, const int64_t* places, const int64_t* tiles, int64_t num_tiles, const int64_t* rows) {
    const int64_t size = x.size(1), width = y.size(1), stride = (size + Dot::DEPTH - 1) / Dot::DEPTH * Dot::DEPTH * LANES;
    const T* const from = x.const_data_ptr<T>();
    T* const to = y.mutable_data_ptr<T>();
    int64_t widest = 0, most_panels = 0;
    for (int64_t i = 0; i < (int64_t)arenas.size(); i++) {
        const LowRank place{places + i * LowRank::SIZE};
        widest = std::max(widest, place.num_a_panels() * LANES);
        int64_t num_panels = 0;
        for (int p = 0; p < LowRank::MAX_PARTS; p++)
            if (const auto part = place.part(p); part.rank) num_panels += (part.num_columns + LANES - 1) / LANES;
        most_panels = std::max(most_panels, num_panels);
    }
    static thread_local std::vector<T> memory;
    const int64_t each = widest * LOW_ROWS;
    if ((int64_t)memory.size() < num_tiles * each) memory.resize(num_tiles * each);
    T* const low = memory.data();

    const int64_t shrink_work = std::max<int64_t>(1, size * widest);
    parallel_for(0, num_tiles, std::max<int64_t>(1, WEIGHT_BYTES_PER_THREAD / (int64_t)sizeof(T) / shrink_work), [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; t++) {
            const int64_t adapter = tiles[3 * t];
            const LowRank place{places + adapter * LowRank::SIZE};
            const Shrink<T> shrink = SHRINKS<Dot, T>[tiles[3 * t + 2] - 1];
            for (int64_t p = 0; p < place.num_a_panels(); p++)
                shrink(from, size, rows + tiles[3 * t + 1], arenas[adapter] + place.a() + p * stride, low + t * each + p * LANES, widest);
        }
    });

    const int64_t tasks_each = (most_panels + PANELS_PER_TASK - 1) / PANELS_PER_TASK;
    const int64_t expand_work = std::max<int64_t>(1, PANELS_PER_TASK * widest * LANES / LowRank::MAX_PARTS);
    parallel_for(0, num_tiles * tasks_each, std::max<int64_t>(1, WEIGHT_BYTES_PER_THREAD / (int64_t)sizeof(T) / expand_work), [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; task++) {
            const int64_t t = task / tasks_each, adapter = tiles[3 * t];
            const LowRank place{places + adapter * LowRank::SIZE};
            // Panels of all siblings are counted on.
            int64_t skip = task % tasks_each * PANELS_PER_TASK, left = PANELS_PER_TASK;
            for (int i = 0; i < LowRank::MAX_PARTS && left > 0; i++) {
                const LowRank::Part part = place.part(i);
                if (!part.rank) continue;
                const int64_t num_panels = (part.num_columns + LANES - 1) / LANES;
                if (skip >= num_panels) {
                    skip -= num_panels;
                    continue;
                }
                const int64_t last = std::min(num_panels, skip + left);
                left -= last - skip;
                EXPANDS<Dot, T>[tiles[3 * t + 2] - 1](low + t * each + part.first_rank, widest, arenas[adapter] + part.b, part, skip, last, to, width, rows + tiles[3 * t + 1]);
                skip = 0;
            }
        }
    });
}

// y[row] += (x[row] A^T) B^T. `arenas`: an adapter's weights each, `places` [adapters, LowRank::SIZE]; `tiles` [., 3]: adapter,
// the first of its `rows`, how many (at most `low_rank_rows`).
void add_low_rank(Tensor y, const Tensor& x, at::TensorList arenas, const Tensor& places, const Tensor& tiles, const Tensor& rows) {
    TORCH_CHECK(x.is_contiguous() && y.is_contiguous() && x.dim() == 2 && y.dim() == 2 && x.size(0) == y.size(0) && x.scalar_type() == y.scalar_type(), "add_low_rank: x and y are contiguous rows of one type");
    TORCH_CHECK(places.is_contiguous() && places.scalar_type() == at::kLong && places.dim() == 2 && places.size(0) == (int64_t)arenas.size() && places.size(1) == LowRank::SIZE, "add_low_rank: a place for each adapter");
    TORCH_CHECK(tiles.is_contiguous() && tiles.scalar_type() == at::kLong && tiles.dim() == 2 && tiles.size(1) == 3, "add_low_rank: tiles are [., 3]");
    TORCH_CHECK(rows.is_contiguous() && rows.scalar_type() == at::kLong, "add_low_rank: rows are int64");
    const int64_t size = x.size(1) + (x.scalar_type() == at::kBFloat16 ? x.size(1) % 2 : 0);
    for (int64_t i = 0; i < (int64_t)arenas.size(); i++) {
        const LowRank place{places.const_data_ptr<int64_t>() + i * LowRank::SIZE};
        const auto fits = [&](int64_t begin, int64_t num) { return begin >= 0 && num >= 0 && begin + num <= arenas[i].numel(); };
        TORCH_CHECK(arenas[i].is_contiguous() && arenas[i].scalar_type() == x.scalar_type() && fits(place.a(), place.num_a_panels() * LANES * size), "add_low_rank: A of adapter ", i);
        for (int p = 0; p < LowRank::MAX_PARTS; p++) {
            const auto part = place.part(p);
            if (!part.rank) continue;
            const int64_t num_panels = (part.num_columns + LANES - 1) / LANES;
            TORCH_CHECK(part.rank > 0 && part.rank % 2 == 0 && part.first_rank >= 0 && part.first_rank % 2 == 0 && part.first_rank + part.rank <= place.num_a_panels() * LANES && fits(part.b, num_panels * LANES * part.rank), "add_low_rank: B of adapter ", i);
            TORCH_CHECK(part.column >= 0 && part.num_columns > 0 && part.step >= LANES && part.column + (num_panels - 1) * part.step + part.num_columns - (num_panels - 1) * LANES <= y.size(1), "add_low_rank: columns of adapter ", i);
        }
    }
    const int64_t num_tiles = tiles.size(0);
    const int64_t *tile = tiles.const_data_ptr<int64_t>(), *row = rows.const_data_ptr<int64_t>();
    for (int64_t t = 0; t < num_tiles; t++)
        TORCH_CHECK(tile[3 * t] >= 0 && tile[3 * t] < (int64_t)arenas.size() && tile[3 * t + 1] >= 0 && tile[3 * t + 2] > 0 && tile[3 * t + 2] <= LOW_ROWS && tile[3 * t + 1] + tile[3 * t + 2] <= rows.numel(), "add_low_rank: tile ", t);
    for (int64_t r = 0; r < rows.numel(); r++) TORCH_CHECK(row[r] >= 0 && row[r] < x.size(0), "add_low_rank: row ", row[r]);
    const auto run = [&](auto dot, auto type) {
        using T = decltype(type);
        std::vector<const T*> weights;
        for (const Tensor& arena : arenas) weights.push_back(arena.const_data_ptr<T>());
        add_low_rank_as<decltype(dot), T>(y, x, weights, places.const_data_ptr<int64_t>(), tile, num_tiles, row);
    };
    if (x.scalar_type() == at::kFloat)
        run(FloatDot{}, float{});
    else if (dot_pairs())
        run(PairDot{}, bf16{});
    else
        run(WidenDot{}, bf16{});
}

int64_t low_rank_rows() { return LOW_ROWS; }

template <typename T>
void pack_panel(const T* w, int64_t size, int64_t rows, T* to) {
    constexpr int DEPTH = std::is_same_v<T, bf16> ? 2 : 1;
    for (int64_t k = 0; k < size; k += DEPTH)
        for (int64_t r = 0; r < rows; r++)
            for (int d = 0; d < DEPTH && k + d < size; d++) to[(k * LANES) + r * DEPTH + d] = w[r * size + k + d];
}

template <typename T>
Tensor pack_as(const std::vector<Tensor>& weights, bool alternate) {
    constexpr int DEPTH = std::is_same_v<T, bf16> ? 2 : 1;
    // One entry for each panel: sixteen rows of one weight, or the rows where two of them meet.
    int64_t num_rows = 0;
    const int64_t size = weights[0].size(1), steps = (size + DEPTH - 1) / DEPTH;
    for (const Tensor& w : weights) num_rows += w.size(0);
    const int64_t panels_each = (weights[0].size(0) + LANES - 1) / LANES;
    const int64_t num_panels = alternate ? 2 * panels_each : (num_rows + LANES - 1) / LANES;
    Tensor out = DEPTH == 2 ? at::empty({num_panels, steps, LANES, 2}, weights[0].options()) : at::empty({num_panels, steps, LANES}, weights[0].options());
    T* const to = out.mutable_data_ptr<T>();
    parallel_for(0, num_panels, 1, [&](int64_t begin, int64_t end) {
        std::vector<const T*> rows(LANES);
        std::vector<T> gathered(LANES * size);
        for (int64_t p = begin; p < end; p++) {
            T* const panel = to + p * steps * LANES * DEPTH;
            const int64_t first_row = (alternate ? p / 2 : p) * LANES;
            int64_t start = 0, count = 0;
            for (size_t i = alternate ? p % 2 : 0; i < weights.size() && count < LANES; i++) {
                const int64_t n = weights[i].size(0);
                for (int64_t r = std::max<int64_t>(0, first_row + count - start); r < n && count < LANES; r++)
                    rows[count++] = weights[i].const_data_ptr<T>() + r * size;
                if (alternate) break;
                start += n;
            }
            const bool together = count > 0 && rows[count - 1] == rows[0] + (count - 1) * size;
            if (!together)
                for (int64_t r = 0; r < count; r++) std::copy_n(rows[r], size, &gathered[r * size]);
            if (count < LANES || size % DEPTH) std::fill_n(panel, steps * LANES * DEPTH, T(0.f));
            pack_panel(together ? rows[0] : gathered.data(), size, count, panel);
        }
    });
    return out;
}

// Weights [N_i, K] one below the other as panels; or two of them, gate and up, in alternating panels.
Tensor pack(at::TensorList weights_in, bool alternate) {
    std::vector<Tensor> weights;
    for (const Tensor& w : weights_in) weights.push_back(w.contiguous());
    TORCH_CHECK(!weights.empty() && (!alternate || (weights.size() == 2 && weights[0].sizes() == weights[1].sizes())),
                "pack: two weights of one shape alternate");
    for (const Tensor& w : weights)
        TORCH_CHECK(w.dim() == 2 && w.size(1) == weights[0].size(1) && w.scalar_type() == weights[0].scalar_type(),
                    "pack: weights are [N, K] of one K and type");
    if (weights[0].scalar_type() == at::kFloat) return pack_as<float>(weights, alternate);
    TORCH_CHECK(weights[0].scalar_type() == at::kBFloat16, "pack: weights are float32 or bfloat16");
    return pack_as<bf16>(weights, alternate);
}

// Sixteen rows at most as a panel of bytes, each row of its own scale: its largest number is 127 times that.
template <typename T>
void pack_int8_panel(const T* from, int64_t rows, int64_t size, int64_t steps, uint32_t* to, float* scales) {
    std::vector<T> padded;
    if (rows < LANES) {
        padded.resize(LANES * size);
        std::copy_n(from, rows * size, padded.data());
        from = padded.data();
    }
    Quantized quantized[LANES];
    pack_rows<ByteDot>(from, size, LANES, steps, to, quantized);
    for (int64_t i = 0; i < steps * LANES; i++) to[i] ^= 0x80808080u;
    for (int64_t r = 0; r < LANES; r++) scales[r] = quantized[r].scale;
}

// Weights [N_i, K] one below the other as panels of bytes and a scale of every packed column; every weight begins a panel,
// so that N_i are multiples of 16 but for the last; or two of them, gate and up, in alternating panels.
std::tuple<Tensor, Tensor> pack_int8(at::TensorList weights, bool alternate) {
    TORCH_CHECK(!weights.empty() && (!alternate || (weights.size() == 2 && weights[0].sizes() == weights[1].sizes())), "pack_int8: two weights of one shape alternate");
    const int64_t size = weights[0].size(1), steps = (size + 3) / 4;
    TORCH_CHECK(fast_int8(), "pack_int8: this processor has no AVX-512 VNNI");
    TORCH_CHECK(size <= MAX_INT8_DEPTH, "pack_int8: sums of ", size, " products may overflow");
    struct Panel {
        size_t weight;
        int64_t row;
    };
    std::vector<Panel> panels;
    for (size_t i = 0; i < weights.size(); i++) {
        const Tensor& w = weights[i];
        TORCH_CHECK(w.dim() == 2 && w.size(1) == size && w.scalar_type() == weights[0].scalar_type() && w.is_contiguous(), "pack_int8: weights are contiguous [N, K] of one K and type");
        TORCH_CHECK(alternate || i + 1 == weights.size() || w.size(0) % LANES == 0, "pack_int8: siblings have a multiple of 16 rows");
        for (int64_t row = 0; row < w.size(0); row += LANES) panels.push_back({i, row});
    }
    if (alternate) {
        const std::vector<Panel> apart = panels;
        for (size_t p = 0; p < panels.size(); p++) panels[p] = apart[p % 2 * (apart.size() / 2) + p / 2];
    }
    Tensor out = at::empty({(int64_t)panels.size(), steps, LANES, 4}, weights[0].options().dtype(at::kByte));
    Tensor scales = at::empty({(int64_t)panels.size() * LANES}, weights[0].options().dtype(at::kFloat));
    const auto pack = [&](auto type) {
        using T = decltype(type);
        parallel_for(0, (int64_t)panels.size(), 1, [&](int64_t begin, int64_t end) {
            for (int64_t p = begin; p < end; p++) {
                const Tensor& w = weights[panels[p].weight];
                const int64_t row = panels[p].row;
                pack_int8_panel(w.const_data_ptr<T>() + row * size, std::min<int64_t>(LANES, w.size(0) - row), size, steps,
                                (uint32_t*)out.mutable_data_ptr<uint8_t>() + p * steps * LANES, scales.mutable_data_ptr<float>() + p * LANES);
            }
        });
    };
    if (weights[0].scalar_type() == at::kFloat) {
        pack(float{});
    } else {
        TORCH_CHECK(weights[0].scalar_type() == at::kBFloat16, "pack_int8: weights are float32 or bfloat16");
        pack(bf16{});
    }
    return {out, scales};
}

// ---- between the linear layers

// out = x / rms(x) * w over `size`; rounded before the weight as Llama does, or after it as OLMo 2 does.
template <typename T>
void norm_row(const T* x, const T* w, T* out, int64_t size, float eps, bool round_first) {
    vec squares{};
    for (int64_t d = 0; d < size; d += LANES) {
        const vec v = load(x + d, size - d);
        squares = fma(v, v, squares);
    }
    const float inverse = 1.f / std::sqrt(sum(squares) / (float)size + eps);
    for (int64_t d = 0; d < size; d += LANES) {
        vec v = load(x + d, size - d) * inverse;
        if (round_first) v = rounded(v, T{});
        store(out + d, v * load(w + d, size - d), size - d);
    }
}

template <typename T>
void add_norm_as(Tensor& x, const std::optional<Tensor>& y, const Tensor& w, double eps, double scale, bool round_first, Tensor& out) {
    const int64_t rows = x.size(0), size = x.size(1);
    T *to = x.mutable_data_ptr<T>(), *o = out.mutable_data_ptr<T>();
    const T *from = y ? y->const_data_ptr<T>() : nullptr, *weight = w.const_data_ptr<T>();
    parallel_for(0, rows, std::max<int64_t>(1, ELEMENTS_PER_THREAD / size), [&](int64_t begin, int64_t end) {
        for (int64_t m = begin; m < end; m++) {
            T* row = to + m * size;
            if (from)
                for (int64_t d = 0; d < size; d += LANES) {
                    vec v = load(from + m * size + d, size - d);
                    if (scale != 1) v = rounded(v * (float)scale, T{});
                    store(row + d, load(row + d, size - d) + v, size - d);
                }
            norm_row(row, weight, o + m * size, size, (float)eps, round_first);
        }
    });
}

// x += scale * y in place (no y: x as it is), then RMSNorm of x.
Tensor add_norm(Tensor x, const std::optional<Tensor>& y, const Tensor& w, double eps, double scale, bool round_first) {
    TORCH_CHECK(x.is_contiguous() && (!y || (y->is_contiguous() && y->sizes() == x.sizes() && y->scalar_type() == x.scalar_type())), "add_norm: x and y are contiguous and alike");
    TORCH_CHECK(w.scalar_type() == x.scalar_type() && w.numel() == x.size(1), "add_norm: the weight fits x");
    Tensor out = at::empty(x.sizes(), x.options());
    if (x.scalar_type() == at::kFloat)
        add_norm_as<float>(x, y, w, eps, scale, round_first, out);
    else
        add_norm_as<bf16>(x, y, w, eps, scale, round_first, out);
    return out;
}

// x += scale * norm(y) in place: the residual of a layer that normalises what it adds (OLMo 2).
template <typename T>
void add_normed_as(Tensor& x, const Tensor& y, const Tensor& w, double eps, bool round_first) {
    const int64_t rows = x.size(0), size = x.size(1);
    T* to = x.mutable_data_ptr<T>();
    const T *from = y.const_data_ptr<T>(), *weight = w.const_data_ptr<T>();
    parallel_for(0, rows, std::max<int64_t>(1, ELEMENTS_PER_THREAD / size), [&](int64_t begin, int64_t end) {
        std::vector<T> normed(size);
        for (int64_t m = begin; m < end; m++) {
            norm_row(from + m * size, weight, normed.data(), size, (float)eps, round_first);
            T* row = to + m * size;
            for (int64_t d = 0; d < size; d += LANES)
                store(row + d, load(row + d, size - d) + load(normed.data() + d, size - d), size - d);
        }
    });
}

void add_normed(Tensor x, const Tensor& y, const Tensor& w, double eps, bool round_first) {
    TORCH_CHECK(x.is_contiguous() && y.is_contiguous() && y.sizes() == x.sizes() && y.scalar_type() == x.scalar_type(), "add_normed: x and y are contiguous and alike");
    TORCH_CHECK(w.scalar_type() == x.scalar_type() && w.numel() == x.size(1), "add_normed: the weight fits x");
    if (x.scalar_type() == at::kFloat)
        add_normed_as<float>(x, y, w, eps, round_first);
    else
        add_normed_as<bf16>(x, y, w, eps, round_first);
}

template <typename T>
void gate_as(const Tensor& both, int64_t gate, Tensor& out) {
    const int64_t rows = out.size(0), size = out.size(1);
    const T* from = both.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    parallel_for(0, rows, std::max<int64_t>(1, ELEMENTS_PER_THREAD / 4 / size), [&](int64_t begin, int64_t end) {
        for (int64_t m = begin; m < end; m++)
            for (int64_t d = 0; d < size; d += LANES) {
                const T* row = from + 2 * m * size + d;
                store(to + m * size + d, rounded(activate(load(row, size - d), gate), T{}) * load(row + size, size - d), size - d);
            }
    });
}

// [M, 2 F], gate then up: act(gate) * up.
Tensor gate_mul(const Tensor& both, int64_t gate) {
    TORCH_CHECK(both.is_contiguous() && both.dim() == 2, "gate_mul: [M, 2 F]");
    Tensor out = at::empty({both.size(0), both.size(1) / 2}, both.options());
    if (both.scalar_type() == at::kFloat)
        gate_as<float>(both, gate, out);
    else
        gate_as<bf16>(both, gate, out);
    return out;
}

template <typename T>
void gate_panels_as(const Tensor& both, int64_t gate, Tensor& out) {
    const int64_t rows = out.size(0), size = out.size(1), width = both.size(1);
    const T* from = both.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    parallel_for(0, rows, std::max<int64_t>(1, ELEMENTS_PER_THREAD / 4 / size), [&](int64_t begin, int64_t end) {
        for (int64_t m = begin; m < end; m++)
            for (int64_t d = 0; d < size; d += LANES) {
                const T* panel = from + m * width + 2 * d;
                store(to + m * size + d, rounded(activate(load(panel, LANES), gate), T{}) * load(panel + LANES, LANES), size - d);
            }
    });
}

// The same of [M, 2 F] as `linear` gives it ungated from alternating panels, F rounded up to whole ones.
Tensor gate_panels(const Tensor& both, int64_t num_columns, int64_t gate) {
    TORCH_CHECK(both.is_contiguous() && both.dim() == 2 && both.size(1) == (num_columns + LANES - 1) / LANES * 2 * LANES, "gate_panels: [M, whole panels]");
    Tensor out = at::empty({both.size(0), num_columns}, both.options());
    if (both.scalar_type() == at::kFloat)
        gate_panels_as<float>(both, gate, out);
    else
        gate_panels_as<bf16>(both, gate, out);
    return out;
}

// Rotary embedding (RoFormer) in the halves layout; cos and sin hold the first half of each position's angles.
template <typename T>
void rotate(const T* x, T* out, const float* cos, const float* sin, int64_t half) {
    for (int64_t d = 0; d < half; d += LANES) {
        const int64_t n = half - d;
        const vec a = load(x + d, n), b = load(x + half + d, n), c = load(cos + d, n), s = load(sin + d, n);
        store(out + d, a * c - b * s, n);
        store(out + half + d, b * c + a * s, n);
    }
}

template <typename T>
void rope_store_as(Tensor& qkv, const int64_t* positions, const int64_t* slots, const float* cos, const float* sin, Tensor& k_cache, Tensor& v_cache,
                   const T* q_weight, const T* k_weight, bool whole, int64_t num_heads, int64_t num_kv_heads, float eps, bool round_first) {
    const int64_t num_tokens = qkv.size(0), size = k_cache.size(3), half = size / 2, block_size = k_cache.size(2);
    const int64_t width = (num_heads + 2 * num_kv_heads) * size;
    T *data = qkv.mutable_data_ptr<T>(), *keys = k_cache.mutable_data_ptr<T>(), *values = v_cache.mutable_data_ptr<T>();
    parallel_for(0, num_tokens, std::max<int64_t>(1, ELEMENTS_PER_THREAD / width), [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; t++) {
            T *q = data + t * width, *k = q + num_heads * size, *v = k + num_kv_heads * size;
            if (q_weight && whole) {
                norm_row(q, q_weight, q, num_heads * size, eps, round_first);
                norm_row(k, k_weight, k, num_kv_heads * size, eps, round_first);
            }
            for (int64_t h = 0; h < num_heads; h++) {
                T* head = q + h * size;
                if (q_weight && !whole) norm_row(head, q_weight, head, size, eps, round_first);
                if (cos) rotate(head, head, cos + positions[t] * half, sin + positions[t] * half, half);
            }
            const int64_t block = slots[t] / block_size, offset = slots[t] % block_size;
            for (int64_t h = 0; h < num_kv_heads; h++) {
                T* head = k + h * size;
                const int64_t at = ((block * num_kv_heads + h) * block_size + offset) * size;
                if (k_weight && !whole) norm_row(head, k_weight, head, size, eps, round_first);
                if (cos)
                    rotate(head, keys + at, cos + positions[t] * half, sin + positions[t] * half, half);
                else
                    std::copy_n(head, size, keys + at);
                std::copy_n(v + h * size, size, values + at);
            }
        }
    });
}

// qkv [T, (H + 2 K) D]: q is normed and rotated in place; k (normed, rotated) and v go to the slots of the blocks
// [num_blocks, K, block_size, D]. No cos: no rotation. A q_weight of D norms each head, one of H D the whole projection.
void rope_store(Tensor qkv, const Tensor& positions, const Tensor& slots, const std::optional<Tensor>& cos, const std::optional<Tensor>& sin, Tensor k_cache, Tensor v_cache,
                const std::optional<Tensor>& q_weight, const std::optional<Tensor>& k_weight, int64_t num_heads, double eps, bool round_first) {
    const int64_t num_kv_heads = k_cache.size(1), size = k_cache.size(3);
    TORCH_CHECK(qkv.is_contiguous() && k_cache.is_contiguous() && v_cache.is_contiguous(), "rope_store: contiguous tensors");
    TORCH_CHECK(qkv.scalar_type() == k_cache.scalar_type() && v_cache.sizes() == k_cache.sizes(), "rope_store: KV blocks fit");
    TORCH_CHECK(qkv.size(1) == (num_heads + 2 * num_kv_heads) * size, "rope_store: qkv has ", qkv.size(1), " columns");
    TORCH_CHECK(!cos || (2 * cos->size(1) == size && sin->sizes() == cos->sizes()), "rope_store: cos and sin are [positions, D / 2]");
    const bool whole = q_weight && q_weight->numel() != size;
    TORCH_CHECK(!whole || (q_weight->numel() == num_heads * size && k_weight->numel() == num_kv_heads * size), "rope_store: norm weights fit");
    const float *c = cos ? cos->const_data_ptr<float>() : nullptr, *s = sin ? sin->const_data_ptr<float>() : nullptr;
    const int64_t num_tokens = qkv.size(0), num_slots = k_cache.size(0) * k_cache.size(2);
    TORCH_CHECK(positions.numel() == num_tokens && slots.numel() == num_tokens && positions.is_contiguous() && slots.is_contiguous(), "rope_store: a position and a slot of each token");
    const int64_t *position = positions.const_data_ptr<int64_t>(), *slot = slots.const_data_ptr<int64_t>();
    for (int64_t t = 0; t < num_tokens; t++) {
        TORCH_CHECK(slot[t] >= 0 && slot[t] < num_slots, "slot ", slot[t], " is not one of ", num_slots);
        TORCH_CHECK(!cos || (position[t] >= 0 && position[t] < cos->size(0)), "position ", position[t], " is not one of ", cos->size(0));
    }
    const auto run = [&](auto type) {
        using T = decltype(type);
        rope_store_as<T>(qkv, position, slot, c, s, k_cache, v_cache, q_weight ? q_weight->const_data_ptr<T>() : nullptr,
                         k_weight ? k_weight->const_data_ptr<T>() : nullptr, whole, num_heads, num_kv_heads, (float)eps, round_first);
    };
    if (qkv.scalar_type() == at::kFloat)
        run(float{});
    else
        run(bf16{});
}

// Whether products run in vector registers of this processor; without, stock operators are the faster ones.
bool fast_linear() {
#ifdef FAIRLEAD_AVX512
    return true;
#else
    return false;
#endif
}

// Threads of these kernels; at first as many as torch has.
void set_num_threads(int64_t num) { Pool::get().set_num_threads(num); }
int64_t num_threads() { return Pool::get().num_threads(); }

}  // namespace

TORCH_LIBRARY_FRAGMENT(fairlead, m) {
    m.def("pack(Tensor[] weights, bool alternate) -> Tensor");
    m.def("linear(Tensor x, Tensor packed, Tensor? bias, int num_columns, int gate) -> Tensor");
    m.def("pack_int8(Tensor[] weights, bool alternate) -> (Tensor, Tensor)");
    m.def("linear_int8(Tensor x, Tensor packed, Tensor scales, Tensor? bias, int num_columns, int gate) -> Tensor");
    m.def("add_norm(Tensor(a!) x, Tensor? y, Tensor w, float eps, float scale, bool round_first) -> Tensor");
    m.def("add_normed(Tensor(a!) x, Tensor y, Tensor w, float eps, bool round_first) -> ()");
    m.def("gate_mul(Tensor both, int gate) -> Tensor");
    m.def("gate_panels(Tensor both, int num_columns, int gate) -> Tensor");
    m.def("add_low_rank(Tensor(a!) y, Tensor x, Tensor[] arenas, Tensor places, Tensor tiles, Tensor rows) -> ()");
    m.def("low_rank_rows() -> int", &low_rank_rows);
    m.def(
        "rope_store(Tensor(a!) qkv, Tensor positions, Tensor slots, Tensor? cos, Tensor? sin, Tensor(b!) k_cache, Tensor(c!) v_cache, "
        "Tensor? q_weight, Tensor? k_weight, int num_heads, float eps, bool round_first) -> ()");
    m.def("fast_linear() -> bool", &fast_linear);
    m.def("fast_int8() -> bool", &fast_int8);
    m.def("set_num_threads(int num) -> ()", &set_num_threads);
    m.def("num_threads() -> int", &num_threads);
}
TORCH_LIBRARY_IMPL(fairlead, CPU, m) {
    m.impl("pack", &pack);
    m.impl("linear", &linear);
    m.impl("pack_int8", &pack_int8);
    m.impl("linear_int8", &linear_int8);
    m.impl("add_norm", &add_norm);
    m.impl("add_normed", &add_normed);
    m.impl("gate_mul", &gate_mul);
    m.impl("gate_panels", &gate_panels);
    m.impl("add_low_rank", &add_low_rank);
    m.impl("rope_store", &rope_store);
}
