// Attention over a paged KV cache, for mixed batches of prefill chunks and decodes. Float32 and bfloat16.
//
// A work item is one sequence, one key-value head, some rows and a span of keys. Rows are (token, query head of the group) pairs,
// so the heads that share keys share their loads. Every item runs the online softmax of FlashAttention (Dao et al. 2022) in
// float32; long spans are split over threads and merged (Flash-Decoding, 2023). Few rows stream through K and V where they lie;
// many rows pack a tile of them first and multiply in registers.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <type_traits>
#include <vector>

#include "parallel.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

#define UNROLL _Pragma("GCC unroll 16")

using bf16 = c10::BFloat16;
using at::Tensor;

#if defined(__AVX512F__)
constexpr int64_t LANES = 16, TILE_ROWS = 8;
#elif defined(__AVX2__)
constexpr int64_t LANES = 8, TILE_ROWS = 4;
#else
constexpr int64_t LANES = 4, TILE_ROWS = 4;
#endif
constexpr int64_t PANEL = 2 * LANES;     // columns multiplied at once
constexpr int64_t ROWS = 128;            // rows of an item at most
constexpr int64_t PACKED_KEYS = 128;     // keys packed at once
constexpr int64_t STREAM_KEYS = 256;     // keys streamed between two updates of the running maximum
constexpr int64_t STREAM_ROWS = 8;       // packing pays off above
constexpr int64_t SPLIT_KEYS = 512;      // a span is not split below
constexpr int64_t FIXED_KEYS = 2048;     // where spans end if what else is computed must not decide it
constexpr int64_t SERIAL_COST = 1 << 16; // multiplications that a second thread is not woken for
constexpr float NOTHING = -1e30f;        // maximum of no scores; finite, so that masked - NOTHING is no NaN
constexpr float LOG2E = 1.44269504f;

typedef float Vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t IntVec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
inline void store(float* p, Vec x) { *reinterpret_cast<Vec*>(p) = x; }
inline Vec all(float x) { return Vec{} + x; }

#if defined(__AVX512F__)
inline Vec larger(Vec a, Vec b) { return (Vec)_mm512_max_ps((__m512)a, (__m512)b); }
inline float max_lane(Vec x) { return _mm512_reduce_max_ps((__m512)x); }
inline float sum_lanes(Vec x) { return _mm512_reduce_add_ps((__m512)x); }
#else
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }
inline float max_lane(Vec x) {
    float best = x[0];
    for (int i = 1; i < LANES; i++) best = std::max(best, x[i]);
    return best;
}
inline float sum_lanes(Vec x) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += x[i];
    return sum;
}
#endif

// 2^x for x <= 0, exactly 0 below 2^-126. Polynomial of Cephes' exp2f, 2e-7 off.
inline Vec exp2_negative(Vec x) {
    const Vec lowest = all(-126.f);
    const Vec y = larger(x, lowest);
    const IntVec n = __builtin_convertvector(y - 0.5f, IntVec);
    const Vec f = y - __builtin_convertvector(n, Vec);
    Vec p = all(1.535336188319500e-4f);
    p = p * f + 1.339887440266574e-3f;
    p = p * f + 9.618437357674640e-3f;
    p = p * f + 5.550332471162809e-2f;
    p = p * f + 2.402264791363012e-1f;
    p = p * f + 6.931472028550421e-1f;
    p = p * f + 1.f;
    const Vec scaled = reinterpret_cast<Vec>(reinterpret_cast<IntVec>(p) + (n << 23));
    return x > lowest ? scaled : Vec{};
}
inline float exp2_negative(float x) { return exp2_negative(all(x))[0]; }

inline Vec tanh_vec(Vec x) {
    const Vec size = x < 0 ? -x : x, square = x * x;
    const Vec e = exp2_negative(size * (-2 * LOG2E));
    const Vec large = (1.f - e) / (1.f + e);
    // 1 - e cancels near 0
    const Vec small = x * (1.f + square * (-1.f / 3 + square * (2.f / 15 + square * (-17.f / 315 + square * (62.f / 2835)))));
    return size < 0.3f ? small : x < 0 ? -large : large;
}

inline uint16_t to_bits(float x) {
    uint32_t u;
    std::memcpy(&u, &x, 4);
    return static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

// ---- Operands of the packed multiplication: 32-bit words, a float or two neighbours in bfloat16.
template <bool PAIRS> using Word = std::conditional_t<PAIRS, uint32_t, float>;
constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

inline Vec multiply_add(Vec acc, const float* a, const float* b) { return acc + load(b) * *a; }
#if defined(__AVX512BF16__)
inline Vec multiply_add(Vec acc, const uint32_t* a, const uint32_t* b) {
    return (Vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(static_cast<int>(*a)), (__m512bh)_mm512_loadu_si512(b));
}
#endif

// c [TILE_ROWS, VECS * LANES] (+)= a [TILE_ROWS, depth] b [depth, VECS * LANES], in registers.
template <typename W, int VECS> void multiply_tile(const W* a, int64_t lda, const W* b, int64_t depth, float* c, int64_t ldc, bool add) {
    Vec acc[TILE_ROWS][VECS];
    UNROLL for (int r = 0; r < TILE_ROWS; r++)
        UNROLL for (int i = 0; i < VECS; i++) acc[r][i] = add ? load(c + r * ldc + i * LANES) : Vec{};
    for (int64_t k = 0; k < depth; k++, b += VECS * LANES)
        UNROLL for (int r = 0; r < TILE_ROWS; r++)
            UNROLL for (int i = 0; i < VECS; i++) acc[r][i] = multiply_add(acc[r][i], a + r * lda + k, b + i * LANES);
    UNROLL for (int r = 0; r < TILE_ROWS; r++)
        UNROLL for (int i = 0; i < VECS; i++) store(c + r * ldc + i * LANES, acc[r][i]);
}

// c [rows, cols] (+)= a b; b lies in panels of PANEL columns, each [depth, PANEL], the last one perhaps [depth, LANES].
template <typename W>
void multiply(const W* a, int64_t lda, const W* b, float* c, int64_t ldc, int64_t rows, int64_t cols, int64_t depth, bool add) {
    for (int64_t col = 0; col < cols; col += PANEL)
        for (int64_t row = 0; row < rows; row += TILE_ROWS)
            if (cols - col > LANES) multiply_tile<W, 2>(a + row * lda, lda, b + col * depth, depth, c + row * ldc + col, ldc, add);
            else multiply_tile<W, 1>(a + row * lda, lda, b + col * depth, depth, c + row * ldc + col, ldc, add);
}

#if defined(__AVX512F__)
inline __mmask16 mask_of(int64_t n) { return n >= 16 ? 0xffff : static_cast<__mmask16>((1u << n) - 1); }
inline __m512 load_some(const float* p, __mmask16 some) { return _mm512_maskz_loadu_ps(some, p); }
#if defined(__AVX512BW__) && defined(__AVX512VL__)
inline __m512 load_some(const bf16* p, __mmask16 some) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, p)), 16));
}
#else
inline __m512 load_some(const bf16* p, __mmask16 some) {
    alignas(64) uint16_t bits[16] = {};
    for (int i = 0; i < 16; i++) if (some >> i & 1) bits[i] = p[i].x;
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_load_si256(reinterpret_cast<const __m256i*>(bits))), 16));
}
#endif

inline void transpose(__m512i r[16]) {
    __m512i t[16];
    UNROLL for (int i = 0; i < 16; i += 2) t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]), t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    UNROLL for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]), r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]), r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88), t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88), t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88), r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88), r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}
// Words w.. of a row, those of `some`.
template <bool PAIRS, typename T> inline __m512i load_words(const T* row, int64_t w, __mmask16 some) {
    if constexpr (PAIRS) return _mm512_maskz_loadu_epi32(some, reinterpret_cast<const uint32_t*>(row) + w);
    else return _mm512_castps_si512(load_some(row + w, some));
}

// Sums of 16 vectors, one in each lane: halves are added while they are interleaved.
inline __m512 sums(const __m512 (&r)[16]) {
    __m512 x[8];
    UNROLL for (int i = 0; i < 8; i++) x[i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]) + _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    UNROLL for (int i = 0; i < 4; i++) {
        const __m512d a = _mm512_castps_pd(x[2 * i]), b = _mm512_castps_pd(x[2 * i + 1]);
        x[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b)) + _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
    UNROLL for (int step = 2; step; step /= 2)
        UNROLL for (int i = 0; i < step; i++)
            x[i] = _mm512_shuffle_f32x4(x[2 * i], x[2 * i + 1], 0x88) + _mm512_shuffle_f32x4(x[2 * i], x[2 * i + 1], 0xdd);
    return x[0];
}
inline __m512 products(__m512 acc, const float* a, const float* b, int64_t n) {
    const __mmask16 some = mask_of(n);
    return _mm512_fmadd_ps(_mm512_maskz_loadu_ps(some, a), _mm512_maskz_loadu_ps(some, b), acc);
}
#if defined(__AVX512BF16__)
constexpr int64_t BF16_STEP = 32;
inline __m512 products(__m512 acc, const bf16* a, const bf16* b, int64_t n) {
    const __mmask32 some = n >= 32 ? 0xffffffff : (1u << n) - 1;
    return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_maskz_loadu_epi16(some, a), (__m512bh)_mm512_maskz_loadu_epi16(some, b));
}
#else
constexpr int64_t BF16_STEP = 16;
inline __m512 products(__m512 acc, const bf16* a, const bf16* b, int64_t n) {
    return _mm512_fmadd_ps(load_some(a, mask_of(n)), load_some(b, mask_of(n)), acc);
}
#endif
#endif

// scores[j] = q . keys[j] for n keys of `size`, which lie one after another.
template <typename T> void dot_keys(const T* q, const T* keys, float* scores, int64_t n, int64_t size) {
    int64_t j = 0;
#if defined(__AVX512F__)
    constexpr int64_t STEP = std::is_same_v<T, bf16> ? BF16_STEP : 16;
    for (; j + 16 <= n; j += 16, keys += 16 * size) {
        __m512 acc[16];
        UNROLL for (int i = 0; i < 16; i++) acc[i] = _mm512_setzero_ps();
        int64_t d = 0;
        for (; d + STEP <= size; d += STEP)
            UNROLL for (int i = 0; i < 16; i++) acc[i] = products(acc[i], q + d, keys + i * size + d, STEP);
        if (d < size)
            UNROLL for (int i = 0; i < 16; i++) acc[i] = products(acc[i], q + d, keys + i * size + d, size - d);
        _mm512_storeu_ps(scores + j, sums(acc));
    }
#endif
    for (; j < n; j++, keys += size) {
        float sum = 0;
        for (int64_t d = 0; d < size; d++) sum += static_cast<float>(q[d]) * static_cast<float>(keys[d]);
        scores[j] = sum;
    }
}

#if defined(__AVX512F__)
// acc [N, VECS * 16] += weights [N, n] values [n, ..], the last vector as far as `some`.
template <typename T, int N, int VECS>
void add_panel(const float* weights, const T* values, int64_t n, int64_t size, float* acc, int64_t ld, __mmask16 some) {
    constexpr int CHAINS = N * VECS >= 8 ? 1 : N * VECS >= 4 ? 2 : 4; // enough sums at once to hide an addition's latency
    __m512 sum[CHAINS][N][VECS];
    UNROLL for (int r = 0; r < N; r++)
        UNROLL for (int i = 0; i < VECS; i++) {
            sum[0][r][i] = _mm512_loadu_ps(acc + r * ld + i * 16);
            UNROLL for (int c = 1; c < CHAINS; c++) sum[c][r][i] = _mm512_setzero_ps();
        }
    const auto add = [&](int c, int64_t j) __attribute__((always_inline)) {
        UNROLL for (int i = 0; i < VECS; i++) {
            const __m512 value = load_some(values + j * size + i * 16, i == VECS - 1 ? some : 0xffff);
            UNROLL for (int r = 0; r < N; r++)
                sum[c][r][i] = _mm512_fmadd_ps(_mm512_set1_ps(weights[r * STREAM_KEYS + j]), value, sum[c][r][i]);
        }
    };
    int64_t j = 0;
    for (; j + CHAINS <= n; j += CHAINS)
        UNROLL for (int c = 0; c < CHAINS; c++) add(c, j + c);
    for (; j < n; j++) add(0, j);
    UNROLL for (int r = 0; r < N; r++)
        UNROLL for (int i = 0; i < VECS; i++) {
            UNROLL for (int c = 1; c < CHAINS; c++) sum[0][r][i] += sum[c][r][i];
            _mm512_storeu_ps(acc + r * ld + i * 16, sum[0][r][i]);
        }
}
template <typename T, int N> void add_rows(const float* weights, const T* values, int64_t n, int64_t size, float* acc, int64_t ld) {
    constexpr int64_t WIDE = N == 4 ? 64 : 128;
    int64_t d = 0;
    while (d < size) {
        const int64_t left = size - d;
        const auto panel = [&](auto vecs) {
            add_panel<T, N, vecs.value>(weights, values + d, n, size, acc + d, ld, mask_of(left - (vecs.value - 1) * 16));
            d += vecs.value * 16;
        };
        if (WIDE == 128 && left > 112) panel(std::integral_constant<int, N == 4 ? 4 : 8>{});
        else if (left > 48) panel(std::integral_constant<int, 4>{});
        else if (left > 16) panel(std::integral_constant<int, 2>{});
        else panel(std::integral_constant<int, 1>{});
    }
}
#endif

// acc [rows, size] += weights [rows, n] values [n, size]; rows of weights are STREAM_KEYS apart.
template <typename T>
void add_values(const float* weights, const T* values, int64_t rows, int64_t n, int64_t size, float* acc, int64_t ld) {
#if defined(__AVX512F__)
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) add_rows<T, 4>(weights + r * STREAM_KEYS, values, n, size, acc + r * ld, ld);
    for (; r + 2 <= rows; r += 2) add_rows<T, 2>(weights + r * STREAM_KEYS, values, n, size, acc + r * ld, ld);
    for (; r < rows; r++) add_rows<T, 1>(weights + r * STREAM_KEYS, values, n, size, acc + r * ld, ld);
#else
    for (int64_t r = 0; r < rows; r++)
        for (int64_t j = 0; j < n; j++) {
            const float weight = weights[r * STREAM_KEYS + j];
            for (int64_t d = 0; d < size; d++) acc[r * ld + d] += weight * static_cast<float>(values[j * size + d]);
        }
#endif
}

// Memory of one thread, kept between calls.
struct Scratch {
    std::vector<float> memory;
    float* take(int64_t size) {
        if (memory.size() < static_cast<size_t>(size + 16)) memory.resize(size + 16);
        return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
    }
};

struct Item {
    int64_t sequence, row, num_rows, key, end; // rows row.. of the sequence, keys key..end
    int64_t partial;                           // where the results of head 0 go, in floats; -1: to the output
    int64_t cost;
};
struct Merge {
    Item item;
    int64_t num_parts;
};

template <typename T, bool PAIRS> struct Attention {
    using W = Word<PAIRS>;
    static constexpr int64_t PER_WORD = PAIRS ? 2 : 1;

    const T *q, *k, *v;
    T* out;
    int64_t q_token, q_head, k_block, k_head, v_block, v_head; // strides
    const int32_t *starts, *lens, *tables;
    int64_t num_sequences, table_width;
    int64_t num_heads, num_kv_heads, group, k_size, v_size, block_size, window;
    float scale, softcap;
    bool fixed; // a row's sums are taken in one order, whatever rows are computed with it
    const float* sinks;
    int64_t ld; // of the accumulated rows
    float* partials = nullptr;

    int64_t num_new(int64_t s) const { return starts[s + 1] - starts[s]; }
    int64_t position(int64_t s, int64_t row) const { return lens[s] - num_new(s) + row / group; }
    int64_t first_key(int64_t s, int64_t row) const { return window > 0 ? std::max<int64_t>(0, position(s, row) - window + 1) : 0; }
    const T* query(int64_t s, int64_t row, int64_t head) const {
        return q + (starts[s] + row / group) * q_token + (head * group + row % group) * q_head;
    }
    int64_t partial_size(const Item& item) const { return item.num_rows * (v_size + 2); }

    // The hardware's own prefetch ends with a page, and the next block lies elsewhere.
    static void prefetch(const T* p, int64_t num) {
        for (int64_t i = 0; i < num; i += static_cast<int64_t>(64 / sizeof(T))) __builtin_prefetch(p + i);
    }
    int64_t block_of(int64_t s, int64_t key) const { return tables[s * table_width + key / block_size]; }

    // Calls f(first key of the run, its length, block id, offset in it) for the runs of keys begin..end that lie together.
    template <typename F> void runs(int64_t s, int64_t begin, int64_t end, F f) const {
        for (int64_t key = begin; key < end;) {
            const int64_t offset = key % block_size, n = std::min(block_size - offset, end - key);
            f(key, n, block_of(s, key), offset);
            key += n;
        }
    }
    const T* keys(int64_t block, int64_t head, int64_t offset) const { return k + block * k_block + head * k_head + offset * k_size; }
    const T* values(int64_t block, int64_t head, int64_t offset) const { return v + block * v_block + head * v_head + offset * v_size; }

    // One row of one tile: scores become weights, the running maximum, sum and accumulated values follow. Keys outside low..high
    // are masked. All exponents are of 2.
    template <bool AS_PAIRS> void soften(float* s, int64_t low, int64_t high, int64_t n, float& maximum, float& sum, float* acc) const {
        const int64_t padded = round_up(n, LANES);
        float factor = scale * LOG2E;
        if (softcap > 0) {
            for (int64_t j = 0; j < padded; j += LANES) store(s + j, tanh_vec(load(s + j) * (scale / softcap)));
            factor = softcap * LOG2E;
        }
        std::fill(s, s + std::clamp<int64_t>(low, 0, padded), -INFINITY);
        std::fill(s + std::clamp<int64_t>(high, 0, padded), s + padded, -INFINITY);
        Vec best = load(s);
        for (int64_t j = LANES; j < padded; j += LANES) best = larger(load(s + j), best);
        const float next = std::max(maximum, max_lane(best) * factor);
        Vec total = {};
        for (int64_t j = 0; j < padded; j += LANES) {
            const Vec weight = exp2_negative(load(s + j) * factor - next);
            total += weight;
            store(s + j, weight);
        }
        if constexpr (AS_PAIRS) {
            auto* pairs = reinterpret_cast<uint16_t*>(s);
#if defined(__AVX512BF16__)
            for (int64_t j = 0; j < padded; j += 16)
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(pairs + j), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(s + j)));
#endif
        }
        if (next != maximum) {
            const float shrink = exp2_negative(maximum - next);
            sum *= shrink;
            for (int64_t d = 0; d < ld; d += LANES) store(acc + d, load(acc + d) * shrink);
            maximum = next;
        }
        sum += sum_lanes(total);
    }

    void compute(const Item& item, int64_t head, Scratch& scratch) const {
        const bool packed = (item.num_rows > STREAM_ROWS || fixed) && k_size % PER_WORD == 0;
        const int64_t rows = item.num_rows, padded_rows = round_up(rows, TILE_ROWS), step = packed ? PACKED_KEYS : STREAM_KEYS;
        const int64_t depth = round_up(k_size, PER_WORD) / PER_WORD;
        float* acc = scratch.take(padded_rows * (ld + step + 2 + k_size) + PACKED_KEYS * (k_size + ld));
        float *scores = acc + padded_rows * ld, *maximum = scores + padded_rows * step, *sum = maximum + padded_rows;
        W* queries = reinterpret_cast<W*>(sum + padded_rows);
        W* packed_keys = queries + padded_rows * k_size;
        W* packed_values = packed_keys + PACKED_KEYS * k_size;
        std::fill(acc, acc + padded_rows * ld, 0.f);
        for (int64_t r = 0; r < rows; r++) {
            // A sink is a score that carries no value; of several spans the first has it.
            const bool sink = sinks && item.key == begin_of(item);
            maximum[r] = sink ? sinks[head * group + (item.row + r) % group] * LOG2E : NOTHING;
            sum[r] = sink ? 1.f : 0.f;
        }
        if (packed) {
            copy_queries(item, head, queries, depth);
            std::fill(scores + rows * step, scores + padded_rows * step, 0.f);
        }
        for (int64_t key = item.key; key < item.end; key += step) {
            const int64_t end = std::min(key + step, item.end), n = end - key;
            if (packed) {
                pack_keys(item.sequence, head, key, end, packed_keys, depth);
                multiply<W>(queries, depth, packed_keys, scores, step, padded_rows, round_up(n, PANEL), depth, false);
            } else {
                runs(item.sequence, key, end, [&](int64_t at, int64_t count, int64_t block, int64_t offset) {
                    const T* first = keys(block, head, offset);
                    if (at + count < end) prefetch(keys(block_of(item.sequence, at + count), head, 0), block_size * k_size);
                    for (int64_t r = 0; r < rows; r++)
                        dot_keys(query(item.sequence, item.row + r, head), first, scores + r * step + at - key, count, k_size);
                });
            }
            for (int64_t r = 0; r < rows; r++) {
                const int64_t low = first_key(item.sequence, item.row + r) - key, high = position(item.sequence, item.row + r) + 1 - key;
                if (packed) soften<PAIRS>(scores + r * step, low, high, n, maximum[r], sum[r], acc + r * ld);
                else soften<false>(scores + r * step, low, high, n, maximum[r], sum[r], acc + r * ld);
            }
            if (packed) {
                const int64_t words = round_up(n, PER_WORD) / PER_WORD;
                pack_values(item.sequence, head, key, end, packed_values, words);
                multiply<W>(reinterpret_cast<W*>(scores), step, packed_values, acc, ld, padded_rows, ld, words, true);
            } else {
                runs(item.sequence, key, end, [&](int64_t at, int64_t count, int64_t block, int64_t offset) {
                    if (at + count < end) prefetch(values(block_of(item.sequence, at + count), head, 0), block_size * v_size);
                    add_values(scores + at - key, values(block, head, offset), rows, count, v_size, acc, ld);
                });
            }
        }
        finish(item, head, acc, maximum, sum);
    }

    int64_t begin_of(const Item& item) const {
        const int64_t step = fixed ? FIXED_KEYS : block_size;
        if (fixed && sinks) return 0; // which of a row's spans has the sink must not depend on the other rows
        return first_key(item.sequence, item.row) / step * step;
    }

    void copy_queries(const Item& item, int64_t head, W* queries, int64_t depth) const {
        for (int64_t r = 0; r < item.num_rows; r++) {
            const T* row = query(item.sequence, item.row + r, head);
            if constexpr (sizeof(T) == sizeof(W) || PAIRS) std::memcpy(queries + r * depth, row, k_size * sizeof(T));
            else for (int64_t d = 0; d < k_size; d++) queries[r * depth + d] = row[d];
        }
        std::fill(queries + item.num_rows * depth, queries + round_up(item.num_rows, TILE_ROWS) * depth, W{});
    }

    // Panels [depth, PANEL keys]. Lanes past the last key keep what they had: those scores are masked.
    void pack_keys(int64_t s, int64_t head, int64_t begin, int64_t end, W* packed, int64_t depth) const {
        runs(s, begin, end, [&](int64_t at, int64_t n, int64_t block, int64_t offset) {
            const T* rows = keys(block, head, offset);
            int64_t j = 0;
#if defined(__AVX512F__)
            // The last group repeats its last key.
            for (; (at - begin + j) % 16 == 0 && j < n && (n - j >= 16 || at + n == end); j += 16) {
                W* target = packed + (at - begin + j) / PANEL * PANEL * depth + (at - begin + j) % PANEL;
                for (int64_t w = 0; w < depth; w += 16) {
                    const __mmask16 some = mask_of(depth - w);
                    __m512i words[16];
                    UNROLL for (int i = 0; i < 16; i++)
                        words[i] = load_words<PAIRS>(rows + std::min<int64_t>(j + i, n - 1) * k_size, w, some);
                    transpose(words);
                    const int64_t num = std::min<int64_t>(16, depth - w);
                    for (int64_t i = 0; i < num; i++) _mm512_storeu_si512(target + (w + i) * PANEL, words[i]);
                }
            }
#endif
            for (; j < n; j++) {
                W* target = packed + (at - begin + j) / PANEL * PANEL * depth + (at - begin + j) % PANEL;
                const T* row = rows + j * k_size;
                for (int64_t w = 0; w < depth; w++) {
                    if constexpr (PAIRS) std::memcpy(target + w * PANEL, row + 2 * w, 4);
                    else target[w * PANEL] = static_cast<float>(row[w]);
                }
            }
        });
    }

    // Panels [words of keys, PANEL columns of the values].
    void pack_values(int64_t s, int64_t head, int64_t begin, int64_t end, W* packed, int64_t words) const {
        const T* rows[PACKED_KEYS + 1];
        runs(s, begin, end, [&](int64_t at, int64_t n, int64_t block, int64_t offset) {
            for (int64_t i = 0; i < n; i++) rows[at - begin + i] = values(block, head, offset + i);
        });
        for (int64_t col = 0; col < v_size; col += PANEL) {
            const int64_t width = ld - col > LANES ? PANEL : LANES, filled = std::min(width, v_size - col);
            W* target = packed + col * words;
            for (int64_t w = 0; w < words; w++, target += width) {
                if constexpr (PAIRS) {
                    const auto* even = reinterpret_cast<const uint16_t*>(rows[2 * w] + col);
                    const bool last = begin + 2 * w + 1 == end;
                    const auto* odd = last ? even : reinterpret_cast<const uint16_t*>(rows[2 * w + 1] + col);
                    for (int64_t i = 0; i < filled; i++) target[i] = even[i] | static_cast<uint32_t>(odd[i]) << 16;
                } else {
                    const T* row = rows[w] + col;
                    for (int64_t i = 0; i < filled; i++) target[i] = static_cast<float>(row[i]);
                }
                for (int64_t i = filled; i < width; i++) target[i] = W{};
            }
        }
    }

    void finish(const Item& item, int64_t head, const float* acc, const float* maximum, const float* sum) const {
        if (item.partial >= 0) {
            float* part = partials + item.partial + head * partial_size(item);
            for (int64_t r = 0; r < item.num_rows; r++, part += v_size + 2) {
                part[0] = maximum[r], part[1] = sum[r];
                std::copy(acc + r * ld, acc + r * ld + v_size, part + 2);
            }
            return;
        }
        for (int64_t r = 0; r < item.num_rows; r++) write(item, r, head, acc + r * ld, 1 / sum[r]);
    }

    void write(const Item& item, int64_t r, int64_t head, const float* acc, float factor) const {
        const int64_t row = item.row + r;
        T* target = out + ((starts[item.sequence] + row / group) * num_heads + head * group + row % group) * v_size;
        for (int64_t d = 0; d < v_size; d++) {
            if constexpr (std::is_same_v<T, bf16>) target[d].x = to_bits(acc[d] * factor);
            else target[d] = acc[d] * factor;
        }
    }

    void merge(const Merge& job, int64_t head, Scratch& scratch) const {
        const Item& item = job.item;
        float* acc = scratch.take(v_size);
        for (int64_t r = 0; r < item.num_rows; r++) {
            const auto part = [&](int64_t i) {
                return partials + item.partial + (i * num_kv_heads + head) * partial_size(item) + r * (v_size + 2);
            };
            float maximum = NOTHING, sum = 0;
            for (int64_t i = 0; i < job.num_parts; i++) maximum = std::max(maximum, part(i)[0]);
            std::fill(acc, acc + v_size, 0.f);
            for (int64_t i = 0; i < job.num_parts; i++) {
                const float weight = exp2_negative(part(i)[0] - maximum);
                sum += weight * part(i)[1];
                for (int64_t d = 0; d < v_size; d++) acc[d] += weight * part(i)[2 + d];
            }
            write(item, r, head, acc, 1 / sum);
        }
    }

    int64_t cost(const Item& item) const { return (item.end - item.key) * (item.num_rows + 8) * (k_size + v_size); }

    // Items of one head, the dearest first; spans that would keep one thread busy alone are split.
    void plan(std::vector<Item>& items, std::vector<Merge>& merges, int64_t num_threads, int64_t& partials_size) const {
        items.clear(), merges.clear();
        partials_size = 0;
        int64_t total = 0;
        for (int64_t s = 0; s < num_sequences; s++) {
            const int64_t num_rows = num_new(s) * group;
            for (int64_t row = 0; row < num_rows; row += ROWS) {
                Item item{s, row, std::min(ROWS, num_rows - row), 0, 0, -1, 0};
                item.key = begin_of(item), item.end = position(s, row + item.num_rows - 1) + 1;
                item.cost = cost(item);
                total += item.cost;
                items.push_back(item);
            }
        }
        const int64_t fair = std::max<int64_t>(total * num_kv_heads / (num_threads * 4), SERIAL_COST);
        for (size_t i = 0, whole = items.size(); (num_threads > 1 || fixed) && i < whole; i++) {
            const Item item = items[i];
            const int64_t span = item.end - item.key;
            const int64_t parts = fixed ? (span + FIXED_KEYS - 1) / FIXED_KEYS : std::min((item.cost + fair - 1) / fair, span / SPLIT_KEYS);
            if (parts < 2) continue;
            const int64_t length = fixed ? FIXED_KEYS : round_up((span + parts - 1) / parts, std::max(block_size, PACKED_KEYS));
            Merge merge{item, 0};
            merge.item.partial = partials_size;
            for (int64_t key = item.key; key < item.end; key += length, merge.num_parts++) {
                Item part = item;
                part.key = key, part.end = std::min(key + length, item.end), part.partial = partials_size, part.cost = cost(part);
                partials_size += num_kv_heads * partial_size(item);
                if (key == item.key) items[i] = part;
                else items.push_back(part);
            }
            merges.push_back(merge);
        }
        std::stable_sort(items.begin(), items.end(), [](const Item& a, const Item& b) { return a.cost > b.cost; });
    }

    void run() {
        static thread_local std::vector<Item> items;
        static thread_local std::vector<Merge> merges;
        static thread_local Scratch parts;
        const int64_t num_threads = fairlead::Pool::get().num_threads();
        int64_t partials_size;
        plan(items, merges, num_threads, partials_size);
        if (partials_size) partials = parts.take(partials_size);
        int64_t total = 0;
        for (const Item& item : items) total += item.cost;
        // References: a lambda would see the other threads' own.
        auto &all_items = items;
        auto &all_merges = merges;
        const bool serial = num_threads == 1 || total * num_kv_heads < SERIAL_COST;
        share(all_items.size() * num_kv_heads, serial ? 1 : num_threads, [&](int64_t i, Scratch& scratch) {
            compute(all_items[i / num_kv_heads], i % num_kv_heads, scratch);
        });
        share(all_merges.size() * num_kv_heads, num_threads, [&](int64_t i, Scratch& scratch) {
            merge(all_merges[i / num_kv_heads], i % num_kv_heads, scratch);
        });
    }

    template <typename F> static void share(int64_t n, int64_t num_threads, const F& f) {
        fairlead::Pool::get().run(n, num_threads, [&](int64_t i) {
            static thread_local Scratch scratch;
            f(i, scratch);
        });
    }
};

void check_cache(const Tensor& cache, const char* name) {
    TORCH_CHECK(cache.dim() == 4 && cache.stride(3) == 1 && cache.stride(2) == cache.size(3), name,
                " must be [num_blocks, K, block_size, D] with the tokens of a head together");
}

// What is read by numbers of others is there.
void check_reads(const Tensor& starts, const Tensor& lens, const Tensor& tables, int64_t num_tokens, int64_t num_blocks, int64_t block_size) {
    const int32_t *start = starts.const_data_ptr<int32_t>(), *len = lens.const_data_ptr<int32_t>(), *table = tables.const_data_ptr<int32_t>();
    const int64_t num = lens.size(0);
    TORCH_CHECK(start[0] == 0 && start[num] == num_tokens, "query_starts end at ", start[num], ", and there are ", num_tokens, " tokens");
    for (int64_t s = 0; s < num; s++) {
        TORCH_CHECK(start[s] <= start[s + 1], "sequence ", s, " ends before it begins");
        TORCH_CHECK(start[s + 1] - start[s] <= len[s], "sequence ", s, " has fewer tokens than are asked of it");
        const int64_t blocks = (len[s] + block_size - 1) / block_size;
        TORCH_CHECK(blocks <= tables.size(1), "sequence ", s, " has ", len[s], " tokens, and a table of ", tables.size(1), " blocks");
        const int32_t* const mine = table + s * tables.stride(0);
        uint32_t largest = 0;  // of a number below zero, too
        for (int64_t b = 0; b < blocks; b++) largest = std::max(largest, (uint32_t)mine[b]);
        TORCH_CHECK(!blocks || largest < num_blocks, "a block of sequence ", s, " is not one of ", num_blocks);
    }
}

template <typename T, bool PAIRS = false>
Tensor attend_typed(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& starts, const Tensor& lens, const Tensor& tables,
                    double scale, int64_t window, double softcap, const std::optional<Tensor>& sinks, bool fixed) {
    Tensor out = at::empty({q.size(0), q.size(1), v.size(3)}, q.options());
    const Tensor logits = sinks ? sinks->to(at::kFloat).contiguous() : Tensor();
    Attention<T, PAIRS> a;
    a.q = q.const_data_ptr<T>(), a.k = k.const_data_ptr<T>(), a.v = v.const_data_ptr<T>(), a.out = out.mutable_data_ptr<T>();
    a.q_token = q.stride(0), a.q_head = q.stride(1);
    a.k_block = k.stride(0), a.k_head = k.stride(1), a.v_block = v.stride(0), a.v_head = v.stride(1);
    a.starts = starts.const_data_ptr<int32_t>(), a.lens = lens.const_data_ptr<int32_t>(), a.tables = tables.const_data_ptr<int32_t>();
    a.num_sequences = lens.size(0), a.table_width = tables.stride(0);
    a.num_heads = q.size(1), a.num_kv_heads = k.size(1), a.group = a.num_heads / a.num_kv_heads;
    a.k_size = k.size(3), a.v_size = v.size(3), a.block_size = k.size(2), a.window = window;
    a.scale = static_cast<float>(scale), a.softcap = static_cast<float>(softcap), a.fixed = fixed;
    a.sinks = sinks ? logits.const_data_ptr<float>() : nullptr;
    a.ld = round_up(a.v_size, LANES);
    a.run();
    return out;
}

// q [T, H, D] of S sequences, one after another, in any strides but the last; k, v [num_blocks, K, block_size, D or Dv];
// starts int32 [S + 1]; lens int32 [S]; tables int32 [S, B]; sinks [H]. Returns [T, H, Dv]. `pairs`: bfloat16 by dot products of pairs,
// where the CPU has them; by default where they are the faster way. `fixed`: a token's result has the same bits whatever tokens are
// computed with it, by tiles alone and spans that end at fixed keys.
Tensor attend(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& starts, const Tensor& lens, const Tensor& tables,
              double scale, int64_t window, double softcap, const std::optional<Tensor>& sinks, std::optional<bool> pairs, bool fixed) {
    check_cache(k, "k_cache"), check_cache(v, "v_cache");
    TORCH_CHECK(q.dim() == 3 && q.stride(2) == 1 && q.size(2) == k.size(3), "q must be [T, H, D] with its last dimension contiguous");
    TORCH_CHECK(q.size(1) % k.size(1) == 0 && k.size(1) == v.size(1) && k.size(2) == v.size(2),
                "heads and blocks of q, k_cache and v_cache do not fit");
    TORCH_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(), "q, k_cache and v_cache must have one dtype");
    TORCH_CHECK(starts.scalar_type() == at::kInt && lens.scalar_type() == at::kInt && tables.scalar_type() == at::kInt,
                "query_starts, context_lens and block_tables must be int32");
    TORCH_CHECK(starts.is_contiguous() && lens.is_contiguous() && starts.size(0) == lens.size(0) + 1 && tables.dim() == 2 &&
                    tables.size(0) == lens.size(0) && tables.stride(1) == 1,
                "query_starts [S + 1], context_lens [S] and block_tables [S, B] do not fit");
    TORCH_CHECK(scale > 0, "scale must be positive");
    TORCH_CHECK(!sinks || sinks->numel() == q.size(1), "sinks must be [H]");
    check_reads(starts, lens, tables, q.size(0), k.size(0), k.size(2));
    if (q.scalar_type() == at::kFloat) return attend_typed<float>(q, k, v, starts, lens, tables, scale, window, softcap, sinks, fixed);
    TORCH_CHECK(q.scalar_type() == at::kBFloat16, "attention is for float32 and bfloat16, not ", q.scalar_type());
#if defined(__AVX512BF16__)
    // Measured: an Intel server core does a quarter as many of these as multiplications of floats, so that floats are twice as fast there.
    // A fixed rule, since the two round differently: the same machine gives the same tokens.
    if (pairs.value_or(__builtin_cpu_is("amd")))
        return attend_typed<bf16, true>(q, k, v, starts, lens, tables, scale, window, softcap, sinks, fixed);
#endif
    return attend_typed<bf16>(q, k, v, starts, lens, tables, scale, window, softcap, sinks, fixed);
}

void store_one(const Tensor& x, const Tensor& cache, const int64_t* slots) {
    const int64_t heads = cache.size(1), block_size = cache.size(2), row_bytes = cache.size(3) * cache.element_size();
    const int64_t x_token = x.stride(0) * x.element_size(), x_head = x.stride(1) * x.element_size();
    const int64_t block_bytes = cache.stride(0) * cache.element_size(), head_bytes = cache.stride(1) * cache.element_size();
    const char* from = static_cast<const char*>(x.const_data_ptr());
    char* to = static_cast<char*>(cache.data_ptr());
    fairlead::parallel_for(0, x.size(0), std::max<int64_t>(1, 65536 / (heads * row_bytes)), [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; t++) {
            char* token = to + slots[t] / block_size * block_bytes + slots[t] % block_size * row_bytes;
            for (int64_t h = 0; h < heads; h++) std::memcpy(token + h * head_bytes, from + t * x_token + h * x_head, row_bytes);
        }
    });
}

// k [T, K, D] and v [T, K, Dv], in any strides but the last, to the slots int64 [T] of the caches.
void store_tokens(const Tensor& k, const Tensor& v, Tensor k_cache, Tensor v_cache, const Tensor& slots) {
    check_cache(k_cache, "k_cache"), check_cache(v_cache, "v_cache");
    TORCH_CHECK(slots.scalar_type() == at::kLong && slots.is_contiguous(), "slots must be int64");
    for (const auto& [x, cache] : {std::pair<const Tensor&, const Tensor&>{k, k_cache}, {v, v_cache}}) {
        TORCH_CHECK(x.dim() == 3 && x.stride(2) == 1 && x.size(0) == slots.size(0) && x.size(1) == cache.size(1) &&
                        x.size(2) == cache.size(3),
                    "k and v must be [T, K, D] with their last dimension contiguous");
        TORCH_CHECK(x.scalar_type() == cache.scalar_type(), "k and v must have their cache's dtype");
    }
    const int64_t* slot = slots.const_data_ptr<int64_t>();
    const int64_t num_slots = k_cache.size(0) * k_cache.size(2);
    for (int64_t t = 0; t < slots.size(0); t++)
        TORCH_CHECK(slot[t] >= 0 && slot[t] < num_slots, "slot ", slot[t], " is not one of ", num_slots);
    store_one(k, k_cache, slot);
    store_one(v, v_cache, slot);
}

TORCH_LIBRARY_FRAGMENT(fairlead, m) {
    m.def("store(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots) -> ()");
    m.def("attend(Tensor q, Tensor k_cache, Tensor v_cache, Tensor query_starts, Tensor context_lens, Tensor block_tables, "
          "float scale, int window, float softcap, Tensor? sinks, bool? pairs=None, bool fixed=False) -> Tensor");
}
TORCH_LIBRARY_IMPL(fairlead, CPU, m) {
    m.impl("store", &store_tokens);
    m.impl("attend", &attend);
}

} // namespace
